"""POPE in its official layout (data/catalog.yaml): is an object in the image, three ways to choose the objects that are not.

A list holds one JSON object per line: question_id, image, text, label (yes or no). The published ones have
500 images of COCO val2014 with 6 questions each, half of them yes, and differ only in the negatives.

The hub copy lmms-lab/POPE (Parquet, split test; question_id, question, answer, image_source, image, category) holds
the same questions with their images: samples have the same ids, order and texts."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvutils.datasets.files import coco_files, expect, find, limits, read_lines, reading
from kvutils.datasets.hub import holds_parquet, open_rows, picture_at
from kvutils.datasets.samples import YesNoSample
from kvutils.datasets.wording import put
from kvutils.errors import DataError, one_of

log = logging.getLogger(__name__)
SPLITS = ("random", "popular", "adversarial")
_Lines = dict[str, list[tuple[str, dict]]]  # by split: where a question stands, and its fields


def pope_questions(root: str | Path, split: str = "all", images: str | Path | None = None, max_images: int | None = None,
                   prompts: str = "paper") -> Iterator[YesNoSample]:  # fmt: skip
    """The questions of a split, or of all three, in the order of the lists.

    root: the repository's folder, the one with the lists, a copy of lmms-lab/POPE or "hub". images: the folder of the COCO images
    (default: val2014 in root, or coco/val2014 in root or beside it); they are opened when they are asked for. max_images keeps
    the first images of each list. prompts: the form in which they are asked, see `wording`. Raises
    ParameterError for an unknown split, DataError for a missing list or image and, with file and line number, a malformed line."""
    splits = pope_splits(split)
    limits(max_images=max_images)
    hub = holds_parquet(root)
    lines, pictures = _rows(root) if hub else (_lists(Path(root), splits), {})
    kept = {name: _first(lines[name], name, max_images) for name in splits}
    if not hub:
        places = [Path(root) / "val2014", Path(root) / "coco" / "val2014", Path(root).parent / "coco" / "val2014"]
        pictures = coco_files("pope", "val2014", images, places, (line["image"] for each in kept.values() for line in each))
    for name, each in kept.items():
        for line in each:
            image, asked = line["image"], put(prompts, "pope", line["text"])
            yield YesNoSample(f"{name}-{line['question_id']}", Path(image).stem, pictures[image], asked, line["label"], name)


def pope_splits(split: str) -> tuple[str, ...]:
    """The named split, or all three; ParameterError for any other name."""
    one_of("split of POPE", split, (*SPLITS, "all"))
    return SPLITS if split == "all" else (split,)


def _first(lines: Sequence[tuple[str, dict]], split: str, max_images: int | None) -> list[dict]:
    """The lines about the first images of a list. Raises DataError for none and for an id given twice."""
    seen: dict[str, str] = {}
    for where, line in lines:
        same = seen.setdefault(line["question_id"], where)
        expect(same == where, f"{where}: question_id {line['question_id']} is that of {same.rpartition(', ')[2]}")
    expect(lines, f"the list {split} of POPE holds no question: expected one JSON object per line")
    yes = sum(line["label"] == "yes" for _, line in lines)
    if 2 * yes != len(lines):
        log.warning("POPE %s: %d of %d answers are yes. The published lists hold as many of each; an older "
                    "random list of 2,910 questions is in circulation.", split, yes, len(lines))  # fmt: skip
    kept = set(list(dict.fromkeys(line["image"] for _, line in lines))[:max_images])
    return [line for _, line in lines if line["image"] in kept]


def _lists(root: Path, splits: Sequence[str]) -> _Lines:
    found: _Lines = {}
    for split in splits:
        places = [root / folder / f"coco_pope_{split}.json" for folder in ("output/coco", "coco", ".")]
        hint = ": the questions of this split, one JSON object per line (from output/coco of github.com/RUCAIBox/POPE)"
        found[split] = []
        for where, raw in read_lines(find("pope", *places, hint=hint)):
            with reading(where, "a JSON object"):
                line = json.loads(raw)
            found[split].append((where, _check_line(line, where)))
    return found


def _rows(root: str | Path) -> tuple[_Lines, dict[str, Callable]]:
    """The same from the rows of lmms-lab/POPE; an image is that of its first row, wherever it is asked about."""
    text = ["question_id", "question", "answer", "image_source", "category"]
    rows = open_rows("pope", root, "test", text, pictures=("image",))
    found: _Lines = {name: [] for name in SPLITS}
    pictures: dict[str, Callable] = {}
    for index, row in enumerate(rows.select_columns(text)):
        where = f"POPE {row['category']}, row {index}"
        one_of(f"category of {where}", row["category"], SPLITS, DataError)
        raw = {"image": row["image_source"], "text": row["question"], "label": row["answer"]}
        line = _check_line(raw | {"question_id": row["question_id"]}, where)
        line["image"] = line["image"].removesuffix(".jpg")
        pictures.setdefault(line["image"], picture_at(rows, index, "image", f"{where}, image"))
        found[row["category"]].append((where, line))
    return found, pictures


def _check_line(line: dict, where: str) -> dict:
    """question_id as text, image, text, label in lower case. Raises DataError."""
    with reading(where, "a question with question_id, image, text and label"):
        for key in ("image", "text", "label"):
            expect(isinstance(line[key], str) and line[key].strip(), f"{key!r} must be text, found {line[key]!r}")
        expect(isinstance(line["question_id"], int | str), f"'question_id' must be a number or text, found {line['question_id']!r}")
        expect(Path(line["image"]).name == line["image"], f"'image' must be the name of a file, found {line['image']!r}")
        label = line["label"].strip().lower()
        expect(label in ("yes", "no"), f"'label' must be yes or no, found {label!r}")
    # 57 questions of the hub's copy ask about the "imange"; RUCAIBox/POPE has mended them since (issue 11).
    return {**line, "question_id": str(line["question_id"]), "text": line["text"].replace(" imange", " image"), "label": label}
