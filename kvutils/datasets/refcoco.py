"""One reference of RefCOCO, wherever it was read from: what it names, its sentences, its mask.

RefCOCO from the Hugging Face hub, where three repositories hold it in three forms.

    jxu124/refcoco-benchmark   one row per image: image, ref_list of {ref_info, ann_info}, image_info. All is there
                               (val, testA, testB by UNC; val, test by Google): read, and the one that "hub" means
    jxu124/refcoco             one row per reference, by UNC, train too; annotations only: read, with COCO's images
    lmms-lab/RefCOCO           refused: its val mixes the 3,811 references of UNC with 5,000 of Google and no column
                               says which is which; a mask is one flat list of points; no category

A local copy is told by its columns. No copy has category names, only COCO's ids: their names are here.

RefCOCO in the layout of its toolkit: sentences that name one thing in a photograph, and the mask of that thing.

    refcoco/refs(unc).p, refs(google).p    pickled lists of objects referred to, each with its sentences
    refcoco/instances.json                 COCO annotations: images, polygons, category names
    images/mscoco/images/train2014/COCO_train2014_000000581857.jpg ...   (or ../coco/train2014)

One sample is one sentence, as the scores of LAVT and LISA count. Two copies on the Hugging Face hub are read too
(`kvutils.datasets.refcoco`). A pickle can run programs when it is read: this one is read with every class and
function refused. The `file_name` of a reference ("..._9.jpg") is no file: images go by their id.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import Dataset
from PIL import Image

from kvutils.datasets.catalog import missing_data
from kvutils.datasets.coco_masks import segmentation_mask
from kvutils.datasets.hub import HUB, holds_parquet, open_rows, picture_at
from kvutils.datasets.samples import NamedMask
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image


@dataclass(frozen=True)
class Reference:
    """One thing in one image. segmentation: COCO's, in pixels of (width, height). sentences: (id, text). open: opens
    the image, None where it is the file `file_name`. where: how errors call it."""

    id: int
    image_id: int
    file_name: str
    width: int
    height: int
    segmentation: Any
    class_name: str
    sentences: list[tuple[int, str]]
    where: str
    open: Callable[[], Image.Image] | None = None


def check_reference(record: Any, where: str) -> dict:
    """The fields of a record that are used, with sentences as (id, text). Raises DataError for any that is
    malformed."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a dictionary, found {type(record).__name__}")
    found: dict[str, Any] = {}
    for key in ("ref_id", "image_id", "ann_id", "category_id"):
        found[key] = record.get(key)
        if type(found[key]) is not int:
            raise DataError(f"{where}: {key!r} must be a whole number, found {found[key]!r}")
    found["split"] = record.get("split")
    if not isinstance(found["split"], str):
        raise DataError(f"{where}: 'split' must be text, found {found['split']!r}")
    sentences = record.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise DataError(f"{where}: 'sentences' must be a list of at least one, found {sentences!r}")
    found["sentences"] = []
    for one in sentences:
        text, number = (one.get("sent"), one.get("sent_id")) if isinstance(one, dict) else (None, None)
        if not isinstance(text, str) or not text.strip() or type(number) is not int:
            raise DataError(f"{where}: a sentence needs the text 'sent' and the number 'sent_id', found {one!r}")
        found["sentences"].append((number, text))
    return found


WHOLE, ANNOTATIONS = "jxu124/refcoco-benchmark", "jxu124/refcoco"
# Of jxu124/refcoco: its own names of the UNC splits.
_ANNOTATION_SPLITS = {"train": "train", "val": "validation", "testA": "test", "testB": "testB"}
_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, stop "
    "sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, backpack, "
    "umbrella, -, -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball "
    "glove, skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, "
    "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, "
    "dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, "
    "sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
CATEGORIES = {number: name for number, name in enumerate(_NAMES, start=1) if name != "-"}  # COCO's 80, of ids 1 to 90


def hub_references(root: str | Path, splits: Sequence[str], split_by: str) -> list[Reference]:
    """The references of the splits from a hub copy; the images of `jxu124/refcoco` are left to the files on disk."""
    columns = {"ref_list"} if str(root) == HUB else _columns(Path(root))
    if "ref_list" in columns:
        if "train" in splits:
            raise ParameterError(f"{WHOLE} has no train split; a copy of {ANNOTATIONS} and the official files have it")
        return [one for split in splits for one in _whole(root, split, split_by)]
    if "raw_anns" in columns:
        if split_by != "unc":
            raise ParameterError(f"{ANNOTATIONS} is split by UNC only, not {split_by!r}")
        return [one for split in splits for one in _annotations(root, split)]
    if {"segmentation", "answer"} <= columns:
        raise DataError(f"{root} is a copy of lmms-lab/RefCOCO: its val mixes the splits of UNC and Google, its masks are "
                        f"one polygon each and it has no class names; use a copy of {WHOLE} or the official files")  # fmt: skip
    raise DataError(f"{root} holds Parquet files with the columns {', '.join(sorted(columns))}: expected a copy of "
                    f"{WHOLE} (ref_list) or {ANNOTATIONS} (raw_anns)")  # fmt: skip


def _columns(root: Path) -> set[str]:
    """The columns of the first Parquet file below a folder."""
    path = next(iter(sorted(root.rglob("*.parquet"))), None)
    if path is None:
        raise missing_data("refcoco", f"there is no Parquet file in {root}")
    try:
        return set(pyarrow.parquet.read_schema(path).names)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path} is not a Parquet file that can be read ({error}); is it extracted whole?") from error


def _whole(root: str | Path, split: str, split_by: str) -> Iterator[Reference]:
    name = f"refcoco_{split_by}_{split}"
    rows = open_rows("refcoco", root, name, ("ref_list", "image_info"), pictures=("image",), repository=WHOLE)
    for index, row in enumerate(rows.select_columns(["ref_list", "image_info"])):
        for part, entry in enumerate(row["ref_list"]):
            where = f"{name}, row {index}, reference {part}"
            record = check_reference(entry["ref_info"], where)
            yield _reference(record, entry["ann_info"], row["image_info"], where, _opener(rows, index, where))


def _opener(rows: Dataset, index: int, where: str):
    return picture_at(rows, index, "image", f"the image of {where}")


def _annotations(root: str | Path, split: str) -> Iterator[Reference]:
    name = _ANNOTATION_SPLITS[split]
    used = ("ref_id", "image_id", "ann_id", "category_id", "split", "sentences", "raw_anns", "raw_image_info")
    rows = open_rows("refcoco", root, name, used, repository=ANNOTATIONS)
    for index, row in enumerate(rows.select_columns(list(used))):
        where = f"{name}, row {index}"
        try:
            annotation, image = json.loads(row["raw_anns"]), json.loads(row["raw_image_info"])
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: raw_anns and raw_image_info must be JSON ({error})") from error
        yield _reference(check_reference(row, where), annotation, image, where, None)


def _reference(record: dict, annotation: Any, image: Any, where: str, opener) -> Reference:
    try:
        if annotation["id"] != record["ann_id"] or image["id"] != record["image_id"]:
            raise DataError(f"{where}: it names the annotation {record['ann_id']} of image {record['image_id']}, but beside "
                            f"it are the annotation {annotation['id']} and image {image['id']}")  # fmt: skip
        size = int(image["width"]), int(image["height"])
        segmentation, file_name = annotation["segmentation"], str(image["file_name"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the annotation or image information is malformed ({error!r})") from error
    if record["category_id"] not in CATEGORIES:
        raise DataError(f"{where}: category_id {record['category_id']} is none of COCO's")
    if Path(file_name).name != file_name:
        raise DataError(f"{where}: file_name must be the name of a file, found {file_name!r}")
    name = CATEGORIES[record["category_id"]]
    return Reference(record["ref_id"], record["image_id"], file_name, *size, segmentation, name, record["sentences"],
                     where, opener)  # fmt: skip


SPLITS = {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")}


def refcoco_masks(
    root: str | Path,
    split: str | Sequence[str] = "val",
    split_by: str = "unc",
    images: str | Path | None = None,
    max_images: int | None = None,
    rule: str = "union",
) -> list[NamedMask]:
    """One sample per sentence of a split (or several), in the order of the references.

    root: the toolkit's data folder, a local copy of a hub repository, or "hub". split_by: "unc" (val, testA: people,
    testB: other things) or "google". images: the folder of COCO train2014. max_images keeps the first images. rule:
    how polygons that overlap are drawn, see `segmentation_mask`. Masks are 1 on the thing, `group` is the image,
    `class_name` COCO's category. Raises ParameterError for options that do not exist and DataError for missing and
    malformed files.
    """
    splits = _splits(split, split_by)
    if max_images is not None and max_images < 1:
        raise ParameterError(f"max_images must be at least 1, not {max_images}")
    if rule not in ("union", "refer"):
        raise ParameterError(f"rule must be 'union' or 'refer', found {rule!r}")
    parquet = holds_parquet(root)
    found = (hub_references if parquet else _toolkit_references)(root, splits, split_by)
    if not found:
        raise DataError(f"RefCOCO: no reference of the split {', '.join(splits)} ({split_by}) in {root}")
    kept = set(list(dict.fromkeys(one.image_id for one in found))[:max_images])
    found = [one for one in found if one.image_id in kept]
    folder = _picture_folder(Path(root), images, [one for one in found if one.open is None])
    samples, opened = [], {}
    for one in found:
        opener = one.open or partial(open_image, folder / one.file_name)
        image = opened.setdefault(one.image_id, partial(_picture, opener, one))
        for sentence_id, sentence in one.sentences:
            samples.append(
                NamedMask(
                    id=f"{one.id}-{sentence_id}",
                    image_id=str(one.image_id),
                    image=image,
                    text=sentence,
                    mask=partial(_mask, one, rule),
                    group=str(one.image_id),
                    class_name=one.class_name,
                )
            )
    return samples


def _splits(split: str | Sequence[str], split_by: str) -> list[str]:
    if split_by not in SPLITS:
        raise ParameterError(f"RefCOCO is split by {' or '.join(SPLITS)}, not {split_by!r}")
    named = [split] if isinstance(split, str) else list(split)
    unknown = [name for name in named if name not in SPLITS[split_by]]
    if unknown or not named:
        raise ParameterError(
            f"RefCOCO ({split_by}) has no split {', '.join(map(repr, unknown)) or named}: expected one or several of "
            f"{', '.join(SPLITS[split_by])}"
        )
    return list(dict.fromkeys(named))


def _picture(opener: Callable[[], Image.Image], one: Reference) -> Image.Image:
    image = opener()
    if image.size != (one.width, one.height):
        raise DataError(f"the image of {one.where} is {image.width}x{image.height}, but its annotation "
                        f"{one.width}x{one.height}: is this COCO train2014, unscaled?")  # fmt: skip
    return image


def _mask(one: Reference, rule: str) -> np.ndarray:
    """(H, W) uint8 in the pixels of the annotation, which are those of the image (`_picture` checks it)."""
    try:
        mask = segmentation_mask(one.segmentation, one.height, one.width, rule)
    except DataError as error:
        raise DataError(f"{one.where}: {error}") from error
    return mask.astype(np.uint8)


def _picture_folder(root: Path, images: str | Path | None, wanted: list[Reference]) -> Path:
    """The folder that holds every wanted image; any folder where none is wanted."""
    if not wanted:
        return root
    official = root / "images" / "mscoco" / "images" / "train2014"
    places = [official, root / "train2014", root.parent / "coco" / "train2014"] if images is None else [Path(images)]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise missing_data("refcoco", f"the images are COCO's train2014, and none of {', '.join(map(str, places))} is a "
                                      "folder; images= names another")  # fmt: skip
    names = list(dict.fromkeys(one.file_name for one in wanted))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise missing_data("refcoco", f"{len(missing)} of {len(names)} images are missing in {folder} (first: "
                                      f"{missing[0]}); split= or max_images= can leave them out")  # fmt: skip
    return folder


# --- the toolkit's files -----------------------------------------------------------------------------------


def _toolkit_references(root: str | Path, splits: Sequence[str], split_by: str) -> list[Reference]:
    places = (Path(root) / "refcoco", Path(root))
    home = next((place for place in places if (place / "instances.json").is_file()), None)
    if home is None:
        raise missing_data("refcoco", f"there is no {Path(root) / 'refcoco' / 'instances.json'}")
    path = home / f"refs({split_by}).p"
    if not path.is_file():
        raise missing_data("refcoco", f"there is no {path}")
    references = [(number, one) for number, one in enumerate(read_references(path)) if one["split"] in splits]
    named = {key: {one[f"{key}_id"] for _, one in references} for key in ("ann", "image", "category")}
    file = home / "instances.json"
    known = _instances(file, named)
    found = []
    for number, one in references:
        where = f"{path}, reference {number} (ref_id {one['ref_id']})"
        parts = {}
        for key, kind in (("ann", "annotations"), ("image", "images"), ("category", "categories")):
            parts[kind] = known[kind].get(one[f"{key}_id"])
            if parts[kind] is None:
                raise DataError(f"{where}: {key}_id {one[f'{key}_id']} is none of the {kind} in {file}")
        try:
            found.append(
                Reference(
                    id=one["ref_id"],
                    image_id=one["image_id"],
                    file_name=_plain_name(parts["images"]["file_name"]),
                    width=int(parts["images"]["width"]),
                    height=int(parts["images"]["height"]),
                    segmentation=parts["annotations"]["segmentation"],
                    class_name=str(parts["categories"]["name"]),
                    sentences=one["sentences"],
                    where=where,
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: what ref_id {one['ref_id']} refers to is malformed ({error!r})") from error
    return found


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        raise ValueError(f"file_name must be the name of a file, found {name!r}")
    return name


def _instances(file: Path, named: Mapping[str, set]) -> dict[str, dict[int, dict]]:
    """The images, annotations and categories of instances.json that are named, by id."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    found = {}
    for key, kind in (("ann", "annotations"), ("image", "images"), ("category", "categories")):
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{file}: expected a list of {kind!r}; is this the instances.json of RefCOCO?")
        found[kind] = {entry["id"]: entry for entry in entries if entry.get("id") in named[key]}
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers, which need no class or function; refuses all that does."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; a list of references needs no class or function")


def read_references(path: str | Path) -> list[dict]:
    """The checked records of refs(...).p, a Python 2 pickle; nothing in it is executed. Raises DataError."""
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        raise DataError(f"{path} is not a list of references that can be read: {error!r}") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of references, found {type(content).__name__}")
    return [check_reference(one, f"{path}, reference {number}") for number, one in enumerate(content)]
