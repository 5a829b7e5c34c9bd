"""BLINK as the Hugging Face hub holds it (Parquet, one folder per subtask), the only form in which it is published.

Columns: idx, question, image_1 ... image_4, choices, answer "(A)", prompt. Asked is the column `prompt`, by default as BLINK's
own evaluation does, after a disclaimer in three subtasks (data/prompts.yaml). The answers of the test split are hidden. The
questions about corresponding points paint their points into the images and give no coordinates, so notebook 05 reads only
the subtasks that compare whole images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvutils.datasets.catalog import missing_data
from kvutils.datasets.files import expect, limits, some_of
from kvutils.datasets.hub import holds_parquet, open_rows, picture_at
from kvutils.datasets.samples import MultipleChoice, Pictures
from kvutils.datasets.wording import put
from kvutils.errors import DataError, one_of

SUBTASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw", "Multi-view_Reasoning",
    "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
    "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip
READABLE = ("Art_Style", "Visual_Similarity")  # by `kvutils.tasks.value_readouts`, without points
_TEXT = ("idx", "question", "choices", "answer", "prompt")
_IMAGES = ("image_1", "image_2", "image_3", "image_4")
_LETTERS = "ABCDE"


def blink_items(root: str | Path, subtasks: str | Sequence[str] = READABLE, split: str = "val",
                max_items: int | None = None, prompts: str = "paper") -> list[MultipleChoice]:  # fmt: skip
    """The items of the subtasks, in the order of the rows; `options` are "(A)", "(B)", ..., `group` is the item.

    root: a local copy, or "hub". max_items keeps the first of each subtask. prompts: the form in which they are asked, see
    `wording`. Raises ParameterError for options that do not
    exist, DataError for missing files and malformed rows, and for the test split, whose answers are not published."""
    named = some_of("subtask of BLINK", subtasks, SUBTASKS)
    limits(max_items=max_items)
    expect(split != "test", "BLINK: the answers of the test split are hidden, nothing can be scored on it; use split val")
    one_of("split of BLINK", split, ("val",))
    if not holds_parquet(root):
        raise missing_data("blink", f"there is no Parquet file in {root}")
    return [item for name in named for item in _subtask_items(root, name, split, max_items, prompts)]


def _subtask_items(root: str | Path, subtask: str, split: str, max_items: int | None, prompts: str) -> list[MultipleChoice]:
    rows = open_rows("blink", root, split, _TEXT, config=subtask, pictures=_IMAGES)
    columns = [name for name in _IMAGES if name in rows.column_names]
    counts = _image_counts(rows, columns, subtask)
    items = []
    for index, row in enumerate(rows.select_columns(list(_TEXT)).take(min(max_items or len(rows), len(rows)))):
        where = f"BLINK {subtask}, row {index}"
        _check_row(row, where)
        openers = [picture_at(rows, index, name, f"{where}, {name}") for name in columns[: counts[index]]]
        letters = _LETTERS[: len(row["choices"])]
        asked = put(prompts, "blink", row["prompt"], subtask, letters)
        items.append(MultipleChoice(row["idx"], subtask, Pictures(openers), row["question"], tuple(row["choices"]), row["answer"],
                                    asked, tuple(f"({letter})" for letter in letters), group=row["idx"]))  # fmt: skip
    once = len({item.id for item in items}) == len(items)
    expect(once, f"BLINK {subtask}: two rows have the same idx; is this one copy of the data set?")
    return items


def _image_counts(rows: Any, columns: Sequence[str], subtask: str) -> list[int]:
    """How many images each row has, from what is known to be absent: no image is read."""
    import pyarrow.compute as pc
    there = [pc.is_valid(pc.struct_field(rows.data[name], "bytes")).to_pylist() for name in columns]
    counts = []
    for index, row in enumerate(zip(*there, strict=True)):
        found = [name for name, each in zip(columns, row, strict=True) if each]
        in_order = found and found == columns[: len(found)]
        expect(in_order, f"BLINK {subtask}, row {index}: images must fill image_1, image_2, ... in order, found {', '.join(found)}")
        counts.append(sum(row))
    return counts


def _check_row(row: dict, where: str) -> None:
    """Raises DataError."""
    choices = row["choices"] if isinstance(row["choices"], list) else []
    known = [f"({letter})" for letter in _LETTERS[: len(choices)]]
    texts = all(isinstance(row[key], str) and row[key].strip() for key in ("idx", "question", "prompt"))
    expect(texts, f"{where}: idx, question and prompt must be text, found {row}")
    expect(2 <= len(choices) <= len(_LETTERS), f"{where}: expected 2 to {len(_LETTERS)} choices, found {row['choices']!r}")
    one_of(f"answer in {where}", row["answer"], known, DataError)
