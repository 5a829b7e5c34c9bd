"""RefCOCO: sentences that name one thing in a photograph, and the mask of that thing. One sample is one sentence, as the scores of
LAVT and LISA count. The toolkit's files (data/catalog.yaml): refs(unc).p and refs(google).p, pickled lists of objects referred to,
each with its sentences; instances.json, COCO annotations with images, polygons and category names; the images of COCO train2014.

A pickle can run programs when it is read: this one is read with every class and function refused. The `file_name` of a reference
("..._9.jpg") is no file: images go by their id. On the Hugging Face hub three repositories hold RefCOCO:

    jxu124/refcoco-benchmark   one row per image: image, ref_list of {ref_info, ann_info}, image_info. All is there
                               (val, testA, testB by UNC; val, test by Google): read, and the one that "hub" means
    jxu124/refcoco             one row per reference, by UNC, train too; annotations only: read, with COCO's images
    lmms-lab/RefCOCO           refused: its val mixes the 3,811 references of UNC with 5,000 of Google and no column
                               says which is which; a mask is one flat list of points; no category

A local copy is told by its columns. No copy has category names, only COCO's ids: their names are here."""

import json
import logging
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvutils import data_folder
from kvutils.datasets.coco_masks import check_segmentation, segmentation_mask
from kvutils.datasets.files import coco_files, expect, find, limits, read_json, reading, some_of, visible
from kvutils.datasets.hub import HUB, holds_parquet, open_rows, picture_at
from kvutils.datasets.labels import Picture
from kvutils.datasets.samples import NamedMask
from kvutils.errors import DataError, ParameterError, one_of

log = logging.getLogger(__name__)
OFFICIAL = ("refcoco/instances.json", "instances.json")  # the toolkit's annotations, below its data folder
SPLITS = {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")}
WHOLE, ANNOTATIONS = "jxu124/refcoco-benchmark", "jxu124/refcoco"
# Of jxu124/refcoco: its own names of the UNC splits.
_ANNOTATION_SPLITS = {"train": "train", "val": "validation", "testA": "test", "testB": "testB"}
_NAMES = (data_folder() / "coco_names.txt").read_text(encoding="utf-8").splitlines()  # "-": an id without a category
CATEGORIES = {number: name for number, name in enumerate(_NAMES, start=1) if name != "-"}  # COCO's 80, of ids 1 to 90


@dataclass(frozen=True)
class _Reference:
    """One thing in one image. segmentation: COCO's, in pixels of (width, height). sentences: (id, text). picture: None where
    it is the file `file_name`. where: how errors call it."""

    id: int
    image_id: int
    file_name: str
    size: tuple[int, int]
    segmentation: Any
    class_name: str
    sentences: list[tuple[int, str]]
    where: str
    picture: Picture | None = None
    shown: frozenset[str] = frozenset()


def refcoco_masks(root: str | Path, split: str | Sequence[str] = "val", split_by: str = "unc", images: str | Path | None = None,
                  max_images: int | None = None) -> list[NamedMask]:  # fmt: skip
    """One sample per sentence of a split (or several), in the order of the references.

    root: the toolkit's data folder, a local copy of a hub repository, or "hub". split_by: "unc" (val, testA: people,
    testB: other things) or "google". images: the folder of COCO train2014. max_images keeps the first images. Masks are
    1 on the thing (inside any of its polygons), `group` is the image, `class_name` COCO's category. Raises ParameterError
    for options that do not exist and DataError for missing and malformed files."""
    one_of("split_by", split_by, SPLITS)
    splits = some_of(f"split of RefCOCO ({split_by})", split, SPLITS[split_by])
    limits(max_images=max_images)
    copied = holds_parquet(root, OFFICIAL)
    found = (_hub_references if copied else _toolkit_references)(root, splits, split_by)
    if copied:
        log.warning("RefCOCO's copies on the hub say of an image what is referred to alone: a wrong prefix may name another thing that it shows")
    expect(found, f"RefCOCO: no reference of the split {', '.join(splits)} ({split_by}) in {root}")
    kept = set(list(dict.fromkeys(one.image_id for one in found))[:max_images])
    found = [one for one in found if one.image_id in kept]
    places = [Path(root) / "images/mscoco/images/train2014", Path(root) / "train2014", Path(root).parent / "coco" / "train2014"]
    names = [one.file_name for one in found if one.picture is None]
    files = coco_files("refcoco", "train2014", images, places, names) if names else {}
    samples, pictures = [], {}
    for one in found:
        picture = pictures.setdefault(one.image_id, one.picture or Picture(files[one.file_name]))
        if one.picture is None:  # a file, whose header is soon read
            picture.turn(one.size, one.where)
        for sentence_id, sentence in one.sentences:
            samples.append(NamedMask(f"{one.id}-{sentence_id}", str(one.image_id), picture, text=sentence, mask=partial(_mask, one, picture),
                                     group=str(one.image_id), class_name=one.class_name, shown=one.shown))  # fmt: skip
    return samples


def _mask(one: _Reference, picture: Picture) -> np.ndarray:
    """(H, W) uint8, upright."""
    turn = picture.turn(one.size, one.where)
    with reading(one.where, "a segmentation"):
        return turn.mask(segmentation_mask(one.segmentation, one.size[1], one.size[0]).astype(np.uint8))


def _toolkit_references(root: str | Path, splits: Sequence[str], split_by: str) -> list[_Reference]:
    file = find("refcoco", *(Path(root, path) for path in OFFICIAL))
    path = find("refcoco", file.parent / f"refs({split_by}).p")
    content, known = read_json(file), {}
    for kind in ("images", "annotations", "categories"):
        with reading(file, f"the instances of RefCOCO with a list {kind!r}"):
            known[kind] = {entry["id"]: entry for entry in content[kind]}
    found, shown = [], defaultdict(set)
    for each in known["annotations"].values():
        shown[each.get("image_id")].add(known["categories"].get(each.get("category_id"), {}).get("name"))
    for number, record in enumerate(read_references(path)):
        if record["split"] not in splits:
            continue
        where = f"{path}, reference {number} (ref_id {record['ref_id']})"
        for key, kind in (("image_id", "images"), ("ann_id", "annotations"), ("category_id", "categories")):
            expect(record[key] in known[kind], f"{where}: {key} {record[key]} is none of the {kind} in {file}")
        category = known["categories"][record["category_id"]].get("name")
        one = _reference(record, known["annotations"][record["ann_id"]], known["images"][record["image_id"]], category, where)
        found.append(replace(one, shown=frozenset(shown[one.image_id])))
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
    expect(isinstance(content, list), f"{path}: expected a list of references, found {type(content).__name__}")
    return [_checked(one, f"{path}, reference {number}") for number, one in enumerate(content)]


def _checked(record: Any, where: str) -> dict:
    """The fields of a record that are used, with sentences as (id, text). Raises DataError for any that is malformed."""
    with reading(where, "a reference with ref_id, image_id, ann_id, category_id, split and sentences with sent and sent_id"):
        found = {key: record[key] for key in ("ref_id", "image_id", "ann_id", "category_id")}
        sentences = [(one["sent_id"], one["sent"]) for one in record["sentences"]]
        for number in (*found.values(), *(number for number, _ in sentences)):
            expect(type(number) is int, f"{number!r} is no whole number")
        for text in (record["split"], *(text for _, text in sentences)):
            expect(isinstance(text, str) and text.strip(), f"{text!r} is no text")
        expect(sentences, "it has no sentence")
    return found | {"split": record["split"], "sentences": sentences}


def _reference(record: dict, annotation: Any, image: Any, category: Any, where: str, picture: Picture | None = None) -> _Reference:
    with reading(where, "an annotation with id and segmentation, an image with id, file_name, width and height, a category of COCO"):
        ids = annotation["id"], image["id"]
        expect(ids == (record["ann_id"], record["image_id"]), f"annotation and image are {ids}, not those that it names")
        file_name, size = image["file_name"], (int(image["width"]), int(image["height"]))
        expect(Path(file_name).name == file_name, f"file_name must be the name of a file, found {file_name!r}")
        expect(isinstance(category, str), f"category_id {record['category_id']} is none of COCO's")
        segmentation = annotation["segmentation"]
        check_segmentation(segmentation, size[1], size[0])
    return _Reference(record["ref_id"], record["image_id"], file_name, size, segmentation, category, record["sentences"], where, picture)


def _hub_references(root: str | Path, splits: Sequence[str], split_by: str) -> list[_Reference]:
    """The references of the splits from a hub copy; the images of `jxu124/refcoco` are left to the files on disk."""
    columns = {"ref_list"}
    if str(root) != HUB:
        import pyarrow.parquet
        path = visible(Path(root).rglob("*.parquet"))[0]
        with reading(path, "a Parquet file"):  # ArrowInvalid is a ValueError
            columns = set(pyarrow.parquet.read_schema(path).names)
    if "ref_list" in columns:
        if "train" in splits:
            raise ParameterError(f"{WHOLE} has no train split; a copy of {ANNOTATIONS} and the official files have it")
        return [one for split in splits for one in _whole(root, f"refcoco_{split_by}_{split}")]
    if "raw_anns" in columns:
        if split_by != "unc":
            raise ParameterError(f"{ANNOTATIONS} is split by UNC only, not {split_by!r}")
        return [one for split in splits for one in _annotations(root, _ANNOTATION_SPLITS[split])]
    raise DataError(f"{root} holds Parquet files with the columns {', '.join(sorted(columns))}: expected a copy of {WHOLE} (ref_list) "
                    f"or {ANNOTATIONS} (raw_anns). lmms-lab/RefCOCO cannot be used: its val mixes the splits of UNC and Google, its "
                    "masks are one polygon each and it has no class names")  # fmt: skip


def _whole(root: str | Path, name: str) -> Iterator[_Reference]:
    rows = open_rows("refcoco", root, name, ("ref_list", "image_info"), pictures=("image",), repository=WHOLE)
    for index, row in enumerate(rows.select_columns(["ref_list", "image_info"])):
        with reading(f"{name}, row {index}", "a list of references, each with ref_info and ann_info"):
            entries = [(entry["ref_info"], entry["ann_info"]) for entry in row["ref_list"]]
        for part, (record, annotation) in enumerate(entries):
            where = f"{name}, row {index}, reference {part}"
            record, picture = _checked(record, where), picture_at(rows, index, "image", f"the image of {where}")
            yield _reference(record, annotation, row["image_info"], CATEGORIES.get(record["category_id"]), where, picture)


def _annotations(root: str | Path, name: str) -> Iterator[_Reference]:
    used = ("ref_id", "image_id", "ann_id", "category_id", "split", "sentences", "raw_anns", "raw_image_info")
    rows = open_rows("refcoco", root, name, used, repository=ANNOTATIONS)
    for index, row in enumerate(rows.select_columns(list(used))):
        where = f"{name}, row {index}"
        with reading(where, "JSON in raw_anns and raw_image_info"):
            annotation, image = json.loads(row["raw_anns"]), json.loads(row["raw_image_info"])
        record = _checked(row, where)
        yield _reference(record, annotation, image, CATEGORIES.get(record["category_id"]), where)
