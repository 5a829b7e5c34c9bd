"""Hub copies of POPE and MME, BLINK, and the rows they are read from: Parquet files written here, documented columns."""

import json
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest

from kvutils.datasets import USES, blink, hub, open_dataset, pope
from kvutils.errors import DataError, ParameterError
from kvutils.tasks.choices import check_items
from kvutils.tasks.yes_no import Mme, Pope
from tests.mini_data import SAMPLES, needs_samples, noise, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Rows are converted into a folder of the test, not into the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- POPE --------------------------------------------------------------------------------------------------

ASKED = [("a", "dog", "yes"), ("a", "cat", "no"), ("b", "cup", "no"), ("b", "tie", "yes")]


def pope_rows(order=("adversarial", "popular", "random")) -> list[dict]:
    return [
        {"id": str(i), "question_id": str(number), "question": f"Is there a {thing} in the image?", "answer": answer,
         "image_source": f"COCO_val2014_{name}", "image": noise(ord(name)), "category": category}
        for i, (category, (number, (name, thing, answer))) in enumerate(
            (category, each) for category in order for each in enumerate(ASKED, start=1))
    ]  # fmt: skip


@pytest.fixture
def pope_copy(tmp_path):
    rows = pope_rows()
    for part in range(2):
        write_rows(tmp_path / "pope" / "data" / f"test-{part:05d}-of-00002.parquet", rows[6 * part : 6 * part + 6])
    return tmp_path / "pope"


def test_the_hub_copy_of_pope_holds_the_official_samples(pope_copy, tmp_path):
    home = tmp_path / "official" / "output" / "coco"
    home.mkdir(parents=True)
    for split in pope.SPLITS:
        lines = [
            {"question_id": i, "image": f"COCO_val2014_{name}.jpg", "text": f"Is there a {thing} in the image?", "label": label}
            for i, (name, thing, label) in enumerate(ASKED, start=1)
        ]
        (home / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    for name in "ab":
        path = tmp_path / "official" / "val2014" / f"COCO_val2014_{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        noise(ord(name)).save(path)
    found, official = open_dataset("pope", pope_copy), open_dataset("pope", tmp_path / "official")
    assert [replace(s, picture=None) for s in found] == [replace(s, picture=None) for s in official] and len(found) == 12
    assert all(np.array_equal(s.image, noise(ord(s.image_id[-1]))) for s in found)
    assert len({s.picture for s in found}) == 2  # questions about one image share it
    assert replace(found[0], size=(4, 4)).image.size == (4, 4) and found[0].image.size == (64, 48)
    short = open_dataset("pope", pope_copy, split="popular", max_images=1, suffix=pope.SHORT_ANSWER)
    assert [s.id for s in short] == ["popular-1", "popular-2"] and short[0].question.endswith("word or phrase.")


def test_pictures_of_rows_stay_on_disk(pope_copy, monkeypatch):
    opened = []
    monkeypatch.setattr(hub, "picture_of", lambda value, name: opened.append(name) or (lambda: noise(0)))
    samples = open_dataset("pope", pope_copy)
    task = Pope(samples)
    assert not opened and len(task.images) == 2
    assert samples[0].image.size == (64, 48) and len(opened) == 1


def test_the_rows_of_pope_are_checked(tmp_path):
    good = pope_rows()
    for number, (change, message) in enumerate([
        ({"category": "hard"}, "category of POPE hard, row 1 'hard'; expected one of random"),
        ({"answer": "maybe"}, "POPE adversarial, row 1: .*'label' must be yes or no, found 'maybe'"),
        ({"question_id": "1"}, "POPE adversarial, row 1: question_id 1 is that of row 0"),
        ({"image_source": "../a"}, "row 1: .*'image' must be the name of a file"),
    ]):  # fmt: skip
        copy = tmp_path / str(number)
        write_rows(copy / "data" / "test-00000-of-00001.parquet", [good[0], good[1] | change, *good[2:]])
        with pytest.raises(DataError, match=message):
            open_dataset("pope", copy)
    less = {key: value for key, value in good[0].items() if key != "category"}
    write_rows(tmp_path / "less" / "data" / "test-00000-of-00001.parquet", [less])
    with pytest.raises(DataError, match="expected the columns category too, found id, question_id"):
        open_dataset("pope", tmp_path / "less")


def test_a_copy_with_a_part_missing_is_refused(pope_copy):
    first = pope_copy / "data" / "test-00000-of-00002.parquet"
    other = first.with_name("test-00000-of-00003.parquet")
    other.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="parts of more than one copy"):
        open_dataset("pope", pope_copy)
    other.unlink()
    first.unlink()
    with pytest.raises(DataError, match=r"POPE.*: 1 of the 2 Parquet files of a split are there: test-00001-of-00002.parquet in"):
        open_dataset("pope", pope_copy)


def test_the_hub_is_asked_for_the_files_of_one_split(pope_copy, tmp_path, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(pope_copy)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "revision_of", lambda repository: "abc")
    assert len(open_dataset("pope", "hub", split="random")) == 4
    options = {"repo_type": "dataset", "revision": "abc", "allow_patterns": ["data/test-*.parquet"]}
    assert asked == [("lmms-lab/POPE", options)]
    asked.clear()
    with pytest.raises(DataError, match="no Parquet file of 'Art_Style/val'"):
        open_dataset("blink", "hub")
    assert asked[0][1]["allow_patterns"] == ["Art_Style/val-*.parquet"]


# --- MME ---------------------------------------------------------------------------------------------------


def mme_rows() -> list[dict]:
    return [
        {"question_id": f"{subtask}/{name}.png", "image": noise(i), "answer": answer, "category": subtask,
         "question": f"Is it {answer}? Please answer yes or no."}
        for i, (subtask, name) in enumerate([("count", "b"), ("count", "a"), ("code_reasoning", "0020")])
        for answer in ("Yes", "No")
    ]  # fmt: skip


def test_the_hub_copy_of_mme_holds_the_official_samples(tmp_path):
    home = tmp_path / "official"
    for i, (subtask, name) in enumerate([("count", "b"), ("count", "a"), ("code_reasoning", "0020")]):
        (home / subtask).mkdir(parents=True, exist_ok=True)
        noise(i).save(home / subtask / f"{name}.png")
        lines = [f"Is it {answer}? Please answer yes or no.\t{answer}" for answer in ("Yes", "No")]
        (home / subtask / f"{name}.txt").write_text("\n".join(lines))
    write_rows(tmp_path / "copy" / "data" / "test-00000-of-00001-ab12.parquet", mme_rows())
    names = ["count", "code_reasoning"]
    found, official = (open_dataset("mme", tmp_path / root, split=names) for root in ("copy", "official"))
    assert [replace(s, picture=None) for s in found] == [replace(s, picture=None) for s in official]
    assert all(np.array_equal(one.image, other.image) for one, other in zip(found, official, strict=True))
    images = ["count/a", "count/b", "code_reasoning/0020"]
    assert [s.id for s in found] == [f"{image}-{number}" for image in images for number in (1, 2)]
    assert len(open_dataset("mme", tmp_path / "copy", split="count", max_images=1)) == 2
    with pytest.raises(DataError, match="MME existence, .*: no row of that category among the 6"):
        open_dataset("mme", tmp_path / "copy")
    with pytest.raises(ParameterError, match="split of MME 'counting'"):
        open_dataset("mme", tmp_path / "copy", split="counting")


def test_the_rows_of_mme_are_checked(tmp_path):
    good = mme_rows()
    for number, (rows, message) in enumerate([
        (good[:3], "MME count/a: expected two rows, found 1"),
        ([good[0] | {"answer": "maybe"}, *good[1:]], "answer in MME count/b, row 0 'maybe'; expected one of yes, no"),
        ([good[0] | {"question": " "}, *good[1:]], "MME count/b, row 0: there is no question before"),
    ]):  # fmt: skip
        write_rows(tmp_path / str(number) / "data" / "test-00000-of-00001.parquet", rows)
        with pytest.raises(DataError, match=message):
            open_dataset("mme", tmp_path / str(number), split="count")


def test_questions_of_hub_copies_are_scored_by_their_tasks(pope_copy, tmp_path):
    write_rows(tmp_path / "mme" / "data" / "test-00000-of-00001.parquet", mme_rows())
    pope, mme = Pope(open_dataset("pope", pope_copy)), Mme(open_dataset("mme", tmp_path / "mme", split="count"))
    assert (pope.images, mme.images) == (["COCO_val2014_a", "COCO_val2014_b"], ["count/a", "count/b"])
    assert {s.image.size for s in (*pope.samples, *mme.samples)} == {(64, 48)}
    assert pope.right(["yes"] * 12).sum() == 6 and mme.right(["yes"] * 4).sum() == 2


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
    assert {name: len(mine) for name, mine in check_items(items).items()} == {"Art_Style": 4, "Visual_Similarity": 2}
    assert not opened
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
