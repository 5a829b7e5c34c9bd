"""COCO val2017: images as they come, with what is annotated as foreground, for statistics of the image keys.

Official files (data/catalog.yaml), or a Parquet copy of detection-datasets/coco on the Hugging Face hub (split val; columns
image_id, image, width, height, objects with bbox as x_min, y_min, x_max, y_max). That copy has boxes but no masks, and does not
tell crowds apart: its foreground is coarse, the inside of the boxes. The images are the same."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID, data_folder
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.coco_masks import check_segmentation, segmentation_mask
from kvutils.datasets.files import expect, find, limits, need, read_json, reading
from kvutils.datasets.hub import holds_parquet, open_rows, picture_at
from kvutils.datasets.labels import Picture, Turn
from kvutils.datasets.samples import LabelledImage

# The 500 images of COCO val2014 (val2017 is a part of it, with the same numbers) that POPE asks about: other measurements on
# COCO leave them out, whether or not POPE is on the disk. From its lists (RUCAIBox/POPE, MIT licence, commit 3df3ba1b).
POPE_IMAGES = frozenset(map(int, (data_folder() / "pope_images.txt").read_text(encoding="utf-8").split()))
OFFICIAL = ("val2017", "images/val2017")  # where its pictures lie
_COLUMNS = ("image_id", "width", "height", "objects")


def coco_images(root: str | Path, count: int = 1000) -> list[LabelledImage]:
    """`count` images with label maps: 1 any annotated object, `VOID` in crowds, 0 background.

    The paper takes 1,000 COCO images and does not say which. Here they are those of val2017 with the lowest numbers and any annotation (the
    hub's copy has no others), without the images that POPE asks about (`POPE_IMAGES`), in the order of their numbers: a number says nothing of
    the content, a larger set begins with the smaller one, and disk and hub give the same images. Raises ParameterError, and
    DataError for missing images or annotations before anything is opened."""
    limits(count=count)
    if holds_parquet(root, OFFICIAL):
        return _from_parquet(root, count)
    return _from_json(Path(root), find("coco", *(Path(root, folder) for folder in OFFICIAL)), count)


def _choose(numbers: Sequence[int], count: int, where: str) -> list[int]:
    """The lowest `count` numbers that are not POPE's."""
    chosen = sorted(set(numbers) - POPE_IMAGES)[:count]
    if len(chosen) < count:
        raise missing_data("coco", f"{count} images are wanted, and {where} has {len(chosen)} that POPE does not use")
    return chosen


def _from_json(root: Path, folder: Path, count: int) -> list[LabelledImage]:
    path = find("coco", root / "annotations" / "instances_val2017.json", hint=": it says where the objects are")
    images, objects = _read_annotations(path)
    chosen = _choose([number for number in images if number in objects], count, str(path))
    with reading(path, "file names of the images as text"):
        names = [folder / images[number]["file_name"] for number in chosen]
    pictures = [Picture(file) for file in need("coco", f"images in {folder}", names)]
    samples = []
    for number, picture in zip(chosen, pictures, strict=True):
        turn = picture.turn((images[number]["width"], images[number]["height"]))
        for one in objects[number]:
            with reading(f"{picture.source.name}, annotation {one['id']} of {path}", "a segmentation"):
                check_segmentation(one["segmentation"], *turn.size[::-1])
        samples.append(LabelledImage(f"{number:012d}", picture, partial(_draw, objects[number], turn, picture.source)))
    return samples


def _read_annotations(path: Path) -> tuple[dict[int, dict], dict[int, list[dict]]]:
    """The records of the images by number, and the objects of each."""
    content = read_json(path)
    for kind, keys in (("images", ("id", "file_name", "height", "width")), ("annotations", ("id", "image_id", "segmentation"))):
        records = content.get(kind)
        expect(isinstance(records, list), f"{path}: expected COCO's instances with a list {kind!r}, found {type(records).__name__}")
        for place, record in enumerate(records):
            absent = [key for key in keys if not isinstance(record, dict) or key not in record]
            expect(not absent, f"{path}: {kind}[{place}] lacks {', '.join(absent)}")
    objects: dict[int, list[dict]] = defaultdict(list)
    with reading(path, "whole numbers as ids"):
        for one in content["annotations"]:
            objects[int(one["image_id"])].append(one)
        return {int(one["id"]): one for one in content["images"]}, objects


def _draw(objects: Sequence[dict], turn: Turn, picture: Path) -> np.ndarray:
    """(H, W) uint8: crowds first, so that an object in a crowd stays an object."""
    mask = np.zeros(turn.size[::-1], np.uint8)
    for one in sorted(objects, key=lambda one: not one.get("iscrowd", 0)):
        with reading(f"{picture}, annotation {one['id']}", "a segmentation"):
            mask[segmentation_mask(one["segmentation"], *mask.shape)] = VOID if one.get("iscrowd", 0) else 1
    return turn.mask(mask)


def _from_parquet(root: str | Path, count: int) -> list[LabelledImage]:
    rows = open_rows("coco", root, "val", _COLUMNS, pictures=("image",))
    with reading(f"COCO in {root}", "whole numbers as image_id"):
        places = {int(number): place for place, number in enumerate(rows["image_id"])}
    records = rows.select_columns(list(_COLUMNS))  # without the pictures, which stay on disk
    samples = []
    for number in _choose(list(places), count, str(root)):
        row, picture = records[places[number]], picture_at(rows, places[number], "image", f"COCO {number:012d}")
        with reading(picture.name, "objects with bbox"):
            objects = row["objects"]
            boxes = objects["bbox"] if isinstance(objects, dict) else [one["bbox"] for one in objects]
        samples.append(LabelledImage(f"{number:012d}", picture, partial(_fill, boxes, (row["width"], row["height"]), picture)))
    return samples


def _fill(boxes: Sequence[Sequence[float]], size: tuple[int, int], picture: Picture) -> np.ndarray:
    """(H, W) uint8: 1 inside the boxes."""
    turn = picture.turn(size)
    width, height = turn.size
    mask = np.zeros((height, width), np.uint8)
    with reading(picture.name, f"boxes x_min, y_min, x_max, y_max in {width}x{height} pixels"):
        for box in boxes:
            x0, y0, x1, y1 = box
            expect(-1 <= x0 <= x1 <= width + 1 and -1 <= y0 <= y1 <= height + 1, f"found {box}")
            mask[max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = 1
    return turn.mask(mask)
