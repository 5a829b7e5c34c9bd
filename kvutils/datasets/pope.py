"""POPE in its official layout: is an object in the image, three ways to choose the objects that are not.

    output/coco/coco_pope_{random,popular,adversarial}.json    val2014/COCO_val2014_000000310196.jpg ...

A list holds one JSON object per line: question_id, image, text, label (yes or no). The published ones have
500 images of COCO val2014 with 6 questions each, half of them yes, and differ only in the negatives.

The hub copy lmms-lab/POPE (Parquet, split test; question_id, question, answer, image_source, image, category) holds
the same questions with their images: samples have the same ids, order and texts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvutils.datasets.catalog import missing_data
from kvutils.datasets.hub import holds_parquet, open_rows, picture_at
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError, ParameterError

log = logging.getLogger(__name__)
SPLITS = ("random", "popular", "adversarial")
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # what LLaVA and lmms-eval add
_IMAGES = "http://images.cocodataset.org/zips/val2014.zip"


def pope_questions(
    root: str | Path,
    split: str = "all",
    images: str | Path | None = None,
    max_images: int | None = None,
    suffix: str = "",
) -> Iterator[YesNoSample]:
    """The questions of a split, or of all three, in the order of the lists.

    root: the repository's folder, the one with the lists, a copy of lmms-lab/POPE or "hub". images: the folder of the
    COCO images (default: val2014 in root, or coco/val2014 in root or beside it); they are opened when they are asked
    for. max_images keeps the first images of each list. suffix is added to every question, such as `SHORT_ANSWER`.
    Raises ParameterError for an unknown split, DataError for a missing list or image and, with file and line
    number, a malformed line.
    """
    splits = pope_splits(split)
    if max_images is not None and max_images < 1:
        raise ParameterError(f"max_images must be at least 1, not {max_images}")
    if holds_parquet(root):
        yield from _hub_questions(root, splits, max_images, suffix)
        return
    found = {name: _read_list(_list_file(Path(root), name), max_images) for name in splits}
    pictures = _picture_folder(Path(root), images)
    names = dict.fromkeys(line["image"] for lines in found.values() for line in lines)
    missing = [name for name in names if not (pictures / name).is_file()]
    if missing:
        raise missing_data(
            "pope",
            f"{len(missing)} of the {len(names)} images of POPE are missing in {pictures} (first: "
            f"{missing[0]}); extract {_IMAGES} there, or pass images=, the folder that holds them",
        )
    for name, lines in found.items():
        for line in lines:
            yield YesNoSample(
                id=f"{name}-{line['question_id']}",
                image_id=Path(line["image"]).stem,
                picture=pictures / line["image"],
                question=line["text"] + suffix,
                truth=line["label"],
                subset=name,
            )


def pope_splits(split: str) -> tuple[str, ...]:
    """The named split, or all three; ParameterError for any other name."""
    if split != "all" and split not in SPLITS:
        raise ParameterError(f"POPE has no split {split!r}: expected {', '.join(SPLITS)}, or all")
    return SPLITS if split == "all" else (split,)


def _list_file(root: Path, split: str) -> Path:
    name = f"coco_pope_{split}.json"
    places = [root / "output" / "coco" / name, root / "coco" / name, root / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise missing_data(
            "pope",
            f"{places[0]} is missing: it holds the questions of the split {split!r}, one JSON object per "
            "line (from output/coco of github.com/RUCAIBox/POPE)",
        )
    return path


def _picture_folder(root: Path, images: str | Path | None) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise DataError(f"there is no folder {images}: images= must name the one with the COCO images")
        return Path(images)
    places = [root / "val2014", root / "coco" / "val2014", root.parent / "coco" / "val2014"]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise missing_data(
            "pope",
            f"POPE asks about images of COCO val2014, and none of {', '.join(map(str, places))} is a folder: "
            f"extract {_IMAGES} (6 GB) to the first, or pass images=, the folder that holds them",
        )
    return folder


def _read_list(path: Path, max_images: int | None) -> list[dict]:
    """Checked lines of one list: question_id, image, text, label in lower case."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    numbered = [(f"{path}, line {i}", raw) for i, raw in enumerate(text.split("\n"), start=1) if raw.strip()]
    return _checked([(where, _read_line(raw, where)) for where, raw in numbered], str(path), max_images)


def _checked(lines: Sequence[tuple[str, dict]], name: str, max_images: int | None) -> list[dict]:
    """The lines (where, content) about the first images of a list. Raises DataError for none and for an id given
    twice."""
    seen: dict[str, str] = {}
    for where, line in lines:
        if line["question_id"] in seen:
            same = seen[line["question_id"]].rpartition(", ")[2]
            raise DataError(f"{where}: question_id {line['question_id']} is that of {same}")
        seen[line["question_id"]] = where
    if not lines:
        raise DataError(f"{name} holds no question: expected one JSON object per line")
    yes = sum(line["label"] == "yes" for _, line in lines)
    if 2 * yes != len(lines):
        log.warning("%s: %d of %d answers are yes. The published lists hold as many of each; an older "
                    "random list of 2,910 questions is in circulation.", name, yes, len(lines))  # fmt: skip
    kept = set(list(dict.fromkeys(line["image"] for _, line in lines))[:max_images])
    return [line for _, line in lines if line["image"] in kept]


def _hub_questions(
    root: str | Path, splits: Sequence[str], max_images: int | None, suffix: str
) -> Iterator[YesNoSample]:
    """The same questions from the rows of lmms-lab/POPE; an image is that of its first row, wherever it is asked
    about."""
    text = ["question_id", "question", "answer", "image_source", "category"]
    rows = open_rows("pope", root, "test", text, pictures=("image",))
    found: dict[str, list[tuple[str, dict]]] = {name: [] for name in SPLITS}
    pictures: dict = {}
    for index, row in enumerate(rows.select_columns(text)):
        where = f"POPE {row['category']}, row {index}"
        if row["category"] not in found:
            raise DataError(f"{where}: the category must be one of {', '.join(SPLITS)}")
        raw = {"image": row["image_source"], "text": row["question"], "label": row["answer"]}
        line = _check_line(raw | {"question_id": row["question_id"]}, where)
        line["image"] = line["image"].removesuffix(".jpg")
        pictures.setdefault(line["image"], picture_at(rows, index, "image", f"{where}, image"))
        found[row["category"]].append((where, line))
    for name in splits:
        for line in _checked(found[name], f"POPE {name}", max_images):
            yield YesNoSample(f"{name}-{line['question_id']}", line["image"], pictures[line["image"]],
                              line["text"] + suffix, line["label"], name)  # fmt: skip


def _read_line(raw: str, where: str) -> dict:
    try:
        line = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(line, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(line).__name__}")
    return _check_line(line, where)


def _check_line(line: dict, where: str) -> dict:
    for key in ("image", "text", "label"):
        if not isinstance(line.get(key), str) or not line[key].strip():
            raise DataError(f"{where}: {key!r} must be text, found {line.get(key)!r}")
    if not isinstance(line.get("question_id"), int | str):
        raise DataError(f"{where}: 'question_id' must be a number or text, found {line.get('question_id')!r}")
    label = line["label"].strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{where}: 'label' must be yes or no, found {line['label']!r}")
    if Path(line["image"]).name != line["image"] or line["image"] == "..":
        raise DataError(f"{where}: 'image' must be the name of a file, found {line['image']!r}")
    return {**line, "question_id": str(line["question_id"]), "label": label}
