"""Hub copies of POPE and MME, BLINK, and the rows they are read from: Parquet files written here, documented columns."""

import json
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest

from kvutils.datasets import USES, blink, hub, open_dataset, pope
from kvutils.errors import DataError
from tests.mini_data import SAMPLES, needs_samples, noise, write_data, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Rows are converted into a folder of the test, not into the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- POPE and MME ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The samples of POPE and MME from their official files."""
    root = write_data(tmp_path_factory.mktemp("official"), ["pope", "mme"], pope=2, mme=2)
    return {name: open_dataset(name, root / name) for name in ("pope", "mme")}


def hub_rows(samples, name) -> list[dict]:
    """As lmms-lab/POPE, where the splits come in another order, and lmms-lab/MME, where the images do."""
    if name == "pope":
        samples = [one for split in reversed(pope.SPLITS) for one in samples if one.subset == split]
        ids = [{"question_id": one.id.split("-")[1], "image_source": one.image_id} for one in samples]
    else:
        samples = [one for image in reversed(dict.fromkeys(one.image_id for one in samples)) for one in samples if one.image_id == image]
        ids = [{"question_id": f"{one.image_id}.png"} for one in samples]
    return [
        {"question": one.question, "answer": one.truth.title(), "image": one.image, "category": one.subset, **each}
        for one, each in zip(samples, ids, strict=True)
    ]


@pytest.fixture
def copies(tmp_path, official):
    """Folders of both, POPE in two parts."""
    rows = hub_rows(official["pope"], "pope")
    for part in range(2):
        write_rows(tmp_path / "pope" / "data" / f"test-{part:05d}-of-00002.parquet", rows[part * 18 : part * 18 + 18])
    write_rows(tmp_path / "mme" / "data" / "test-00000-of-00001-ab12.parquet", hub_rows(official["mme"], "mme"))
    return tmp_path


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_a_hub_copy_holds_the_official_samples(copies, official, name):
    found = open_dataset(name, copies / name)
    assert [replace(s, picture=None) for s in found] == [replace(s, picture=None) for s in official[name]]
    assert all(np.array_equal(one.image, other.image) for one, other in zip(found, official[name], strict=True))
    assert len({s.picture for s in found}) == len({s.image_id for s in found})  # questions about one image share it
    assert replace(found[0], size=(4, 4)).image.size == (4, 4)
    split = {"pope": "popular", "mme": "count"}[name]
    few = open_dataset(name, copies / name, split=split, max_images=1, suffix=" In one word.")
    assert {(s.subset, s.image_id) for s in few} == {(split, next(s.image_id for s in found if s.subset == split))}
    assert few[0].question.endswith("In one word.")


def test_pictures_of_rows_stay_on_disk(copies, monkeypatch):
    opened = []
    monkeypatch.setattr(hub, "picture_of", lambda value, name: opened.append(name) or (lambda: noise(0)))
    samples = open_dataset("pope", copies / "pope")
    assert not opened and samples[0].image.size == (64, 48) and len(opened) == 1


@pytest.mark.parametrize(("name", "change", "message"), [
    ("pope", {"category": "hard"}, "category of POPE hard, row 1 'hard'; expected one of random"),
    ("pope", {"answer": "maybe"}, "POPE adversarial, row 1: .*'label' must be yes or no, found 'maybe'"),
    ("pope", {"question_id": "1"}, "POPE adversarial, row 1: question_id 1 is that of row 0"),
    ("pope", {"image_source": "../a"}, "row 1: .*'image' must be the name of a file"),
    ("mme", {"answer": "maybe"}, "answer in MME code_reasoning/0001, row 1 'maybe'; expected one of yes, no"),
    ("mme", {"question": " "}, "MME code_reasoning/0001, row 1: there is no question before"),
    ("mme", {"question_id": "0007.png"}, "MME code_reasoning/0001: expected two rows, found 1"),
    ("mme", {"question_id": None}, "MME, row 1: question_id, question, answer, category must be text"),
])  # fmt: skip
def test_rows_are_checked(tmp_path, official, name, change, message):
    first, second, *rest = hub_rows(official[name], name)
    write_rows(tmp_path / "data" / "test-00000-of-00001.parquet", [first, second | change, *rest])
    with pytest.raises(DataError, match=message):
        open_dataset(name, tmp_path)


def test_categories_and_columns_that_are_not_there(tmp_path, official):
    rows = [row for row in hub_rows(official["mme"], "mme") if row["category"] != "existence"]
    write_rows(tmp_path / "mme" / "data" / "test-00000-of-00001.parquet", rows)
    with pytest.raises(DataError, match="MME existence: no row of that category among the 52"):
        open_dataset("mme", tmp_path / "mme")
    write_rows(tmp_path / "pope" / "data" / "test-00000-of-00001.parquet", [{"image": noise(0), "question": ""}])
    with pytest.raises(DataError, match="expected the columns answer, category, .* too, found image, question"):
        open_dataset("pope", tmp_path / "pope")


def test_a_copy_with_a_part_missing_is_refused(copies):
    first = copies / "pope" / "data" / "test-00000-of-00002.parquet"
    other = first.with_name("test-00000-of-00003.parquet")
    other.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="parts of more than one copy"):
        open_dataset("pope", copies / "pope")
    other.unlink()
    first.unlink()
    with pytest.raises(DataError, match=r"POPE.*: 1 of the 2 Parquet files of a split are there: test-00001-of-00002.parquet in"):
        open_dataset("pope", copies / "pope")


def test_the_hub_is_asked_for_the_files_of_one_split(copies, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(copies / "pope")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "revision_of", lambda repository: "abc")
    assert len(open_dataset("pope", "hub", split="random")) == 12
    options = {"repo_type": "dataset", "revision": "abc", "allow_patterns": ["data/test-*.parquet"]}
    assert asked == [("lmms-lab/POPE", options)]
    with pytest.raises(DataError, match="no Parquet file of 'Art_Style/val'"):
        open_dataset("blink", "hub")
    assert asked[1][1]["allow_patterns"] == ["Art_Style/val-*.parquet"]


# --- BLINK -------------------------------------------------------------------------------------------------

QUESTION = "which image has the same style as the first image ?"


def blink_row(number, subtask="Art_Style", images=3, answer="(B)", **other):
    row = {f"image_{i}": noise(10 * number + i) if i <= images else None for i in range(1, 5)}
    return row | {"idx": f"val_{subtask}_{number}", "sub_task": subtask, "question": QUESTION, "answer": answer,
                  "choices": ["the second image", "the third image"], "explanation": "",
                  "prompt": f"{QUESTION} (A) the second image (B) the third image"} | other  # fmt: skip


def write_blink(root, subtask, rows, images=(1, 2, 3, 4)):
    kept = [f"image_{i}" for i in images]
    rows = [{key: value for key, value in row.items() if not key.startswith("image_") or key in kept} for row in rows]
    write_rows(root / subtask / "val-00000-of-00001.parquet", rows, kept)


@pytest.fixture
def blink_copy(tmp_path):
    root = tmp_path / "blink"
    write_blink(root, "Art_Style", [blink_row(i, answer="(A)" if i % 2 else "(B)") for i in range(1, 5)])
    write_blink(root, "Visual_Similarity", [blink_row(i, "Visual_Similarity") for i in range(1, 3)], images=(1, 2, 3))
    write_blink(root, "Relative_Depth", [blink_row(1, "Relative_Depth", 1)])
    return root


def test_blink_items_are_asked_as_blink_asks_them(blink_copy):
    items = open_dataset("blink", blink_copy)
    assert Counter(item.subtask for item in items) == {"Art_Style": 4, "Visual_Similarity": 2}
    first, last = items[0], items[-1]
    assert first.id == first.group == "val_Art_Style_1" and first.answer == "(A)" and first.options == ("(A)", "(B)")
    assert first.choices == ("the second image", "the third image") and first.question == QUESTION
    assert first.prompt == blink.DISCLAIMER + f"{QUESTION} (A) the second image (B) the third image"
    assert first.prompt.startswith("Disclaimer: This is not to make") and "gave you.\n\nwhich" in first.prompt
    assert last.prompt.startswith(QUESTION)
    assert len(first.images) == 3 and all(np.array_equal(image, noise(11 + i)) for i, image in enumerate(first.images))
    few = open_dataset("blink", blink_copy, subtasks="Art_Style", max_items=2)
    assert [item.id for item in few] == [item.id for item in items[:2]]
    (one,) = open_dataset("blink", blink_copy, subtasks=["Relative_Depth"])
    assert len(one.images) == 1
    assert USES["paper"]["05"]["choices"] == "blink" and set(blink.READABLE) < set(blink.SUBTASKS) and len(blink.SUBTASKS) == 14


def test_blink_images_are_opened_when_they_are_asked_for(blink_copy, monkeypatch):
    opened = []
    monkeypatch.setattr(hub, "picture_of", lambda value, name: opened.append(name) or (lambda: noise(0)))
    items = open_dataset("blink", blink_copy)
    assert not opened and len(items[0].images) == 3
    assert items[1].images[2].size == (64, 48) and opened == ["BLINK Art_Style, row 1, image_3"]


def test_the_rows_of_blink_are_checked(tmp_path):
    for number, (row, message) in enumerate([
        (blink_row(1, answer="hidden"), r"answer in BLINK Art_Style, row 0 'hidden'; expected one of \(A\), \(B\)"),
        (blink_row(1, choices=["x"]), "expected 2 to 5 choices"),
        (blink_row(1, prompt=" "), "idx, question and prompt must be text"),
        (blink_row(1, image_2=None), "images must fill image_1, image_2, ... in order, found image_1, image_3"),
    ]):  # fmt: skip
        write_blink(tmp_path / str(number), "Art_Style", [row, blink_row(2)])
        with pytest.raises(DataError, match=message):
            open_dataset("blink", tmp_path / str(number), subtasks="Art_Style")
    write_blink(tmp_path / "twice", "Art_Style", [blink_row(1), blink_row(1)])
    with pytest.raises(DataError, match="two rows have the same idx"):
        open_dataset("blink", tmp_path / "twice", subtasks="Art_Style")


def test_a_row_without_a_picture_names_itself(blink_copy):
    rows = [blink_row(1) | {"image_2": {"bytes": b"no picture", "path": None}}]
    write_blink(blink_copy, "Art_Style", rows)
    (item,) = open_dataset("blink", blink_copy, subtasks="Art_Style")
    with pytest.raises(DataError, match="BLINK Art_Style, row 0, image_2: expected a picture, but it cannot be read"):
        _ = item.images[1]


@needs_samples
def test_saved_outputs_of_blink_have_these_ids_and_answers():
    folder = SAMPLES / "blink" / "saved_outputs" / "QwenVLMax"
    named = {path.stem.replace(" ", "_"): json.loads(path.read_text())["val"] for path in folder.glob("*.json")}
    assert set(named) == set(blink.SUBTASKS) and sum(map(len, named.values())) == 1901
    for subtask, rows in named.items():
        assert [row["idx"] for row in rows] == [f"val_{subtask}_{i}" for i in range(1, len(rows) + 1)]
        assert {row["answer"] for row in rows} <= {"(A)", "(B)", "(C)", "(D)"}
