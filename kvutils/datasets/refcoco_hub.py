"""RefCOCO from the Hugging Face hub, where three repositories hold it in three forms.

    jxu124/refcoco-benchmark   one row per image: image, ref_list of {ref_info, ann_info}, image_info. All is there
                               (val, testA, testB by UNC; val, test by Google): read, and the one that "hub" means
    jxu124/refcoco             one row per reference, by UNC, train too; annotations only: read, with COCO's images
    lmms-lab/RefCOCO           refused: its val mixes the 3,811 references of UNC with 5,000 of Google and no column
                               says which is which; a mask is one flat list of points; no category

A local copy is told by its columns. No copy has category names, only COCO's ids: their names are here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset

from kvutils.datasets.catalog import missing_data
from kvutils.datasets.hub import HUB, open_rows, picture_at
from kvutils.datasets.refcoco_records import Reference, check_reference
from kvutils.errors import DataError, ParameterError

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
