"""Copies of what the Hugging Face hub holds, written with the documented columns, and the rows they are read from."""

import json
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

from kvutils.datasets import blink, data_sources, hub, open_dataset, pope
from kvutils.datasets.coco import POPE_IMAGES
from kvutils.datasets.refcoco import CATEGORIES
from kvutils.errors import DataError, ParameterError, StoreError
from tests.mini_data import IN_A_WORD, SAMPLES, as_shown, contents, needs_samples, noise, photograph, with_orientation, write_rows

pytestmark = pytest.mark.usefixtures("rows_cache")
PICTURES = "images/mscoco/images/train2014"
QUESTION = "which image has the same style as the first image ?"
DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your assessment on this "
    "question. You don't need to identify the real people. You just need to analyze based on the information I gave you.\n\n"
)


def question_row(one) -> dict:
    return {"question": one.question, "answer": one.truth.title(), "image": one.image, "category": one.subset}


def pope_rows(whole) -> list[dict]:
    """As lmms-lab/POPE, where the splits come in another order."""
    samples = open_dataset("pope", whole / "pope", max_images=2)
    samples = [one for split in reversed(pope.SPLITS) for one in samples if one.subset == split]
    return [{"question_id": one.id.split("-")[1], "image_source": one.image_id} | question_row(one) for one in samples]


def mme_rows(whole) -> list[dict]:
    """As lmms-lab/MME, where the images come in another order."""
    samples = open_dataset("mme", whole / "mme", max_images=2)
    pairs = [samples[i : i + 2] for i in range(0, len(samples), 2)]
    return [{"question_id": f"{one.image_id}.png"} | question_row(one) for pair in reversed(pairs) for one in pair]


def annotation_rows(whole) -> list[dict]:
    """As jxu124/refcoco: one row per reference, annotations as JSON."""
    home = whole / "refcoco" / "refcoco"
    content = json.loads((home / "instances.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    return [
        one | {"raw_anns": json.dumps(annotation), "raw_image_info": json.dumps(images[one["image_id"]]), "image_path": "x"}
        for one, annotation in zip(pickle.loads((home / "refs(unc).p").read_bytes()), content["annotations"], strict=True)
    ]


def refcoco_rows(whole) -> list[dict]:
    """As jxu124/refcoco-benchmark: one row per image."""
    rows: dict[int, dict] = {}
    for one in annotation_rows(whole):
        image, annotation = json.loads(one.pop("raw_image_info")), json.loads(one.pop("raw_anns"))
        picture = {"bytes": (whole / "refcoco" / PICTURES / image["file_name"]).read_bytes(), "path": None}
        row = rows.setdefault(image["id"], {"ref_list": [], "image_info": image, "image": picture})
        row["ref_list"].append({"ann_info": annotation, "ref_info": one})
    return list(rows.values())


def coco_rows(whole=None) -> list[dict]:
    """As detection-datasets/coco: rows in no order of their numbers, boxes as corners."""
    return [{"image_id": number, "image": noise(number, (96, 72)), "width": 96, "height": 72, "objects": {
        "bbox_id": [number], "category": [0], "bbox": [[24.2, 16.5, 79.6, 63.9]], "area": [7]}}
        for number in (632, 139, min(POPE_IMAGES), 285)]  # fmt: skip


def blink_rows(whole=None, subtask="Art_Style", images=3) -> list[dict]:
    """As BLINK-Benchmark/BLINK."""
    return [
        {"idx": f"val_{subtask}_{number}", "sub_task": subtask, "question": QUESTION, "answer": "(A)" if number % 2 else "(B)",
         "choices": ["the second image", "the third image"], "explanation": "",
         "prompt": f"{QUESTION} (A) the second image (B) the third image"}
        | {f"image_{i}": noise(10 * number + i) if i <= images else None for i in range(1, 5)} for number in (1, 2, 3, 4)
    ]  # fmt: skip


COLUMNS = [f"image_{i}" for i in range(1, 5)]
COPIES = {  # rows, their file, columns of pictures
    "pope": (pope_rows, "data/test", ["image"]),
    "mme": (mme_rows, "data/test", ["image"]),
    "refcoco": (refcoco_rows, "data/refcoco_unc_val", ["image"]),
    "annotations": (annotation_rows, "data/validation", []),
    "coco": (coco_rows, "data/val", ["image"]),
    "blink": (blink_rows, "Art_Style/val", COLUMNS),
}


def write_copy(root, name, rows, part="00000-of-00001-ab12"):
    _, file, columns = COPIES[name]
    write_rows(root / f"{file}-{part}.parquet", rows, columns)


@pytest.fixture(scope="module")
def copies(whole, tmp_path_factory, rows_cache):
    """Folders of all: POPE in two parts, RefCOCO with other splits, BLINK with subtasks of fewer images."""
    home = tmp_path_factory.mktemp("copies")
    for name, (rows_of, _, _) in COPIES.items():
        rows = rows_of(whole)
        if name == "pope":
            write_copy(home / name, name, rows[:18], "00000-of-00002")
            write_copy(home / name, name, rows[18:], "00001-of-00002")
        else:
            write_copy(home / name, name, rows)
    write_rows(home / "refcoco/data/refcoco_google_test-00000-of-00001-ab.parquet", refcoco_rows(whole)[-1:])
    write_rows(home / "annotations/data/test-00000-of-00001-x.parquet", annotation_rows(whole)[:1], [])
    similar = [{key: value for key, value in row.items() if key != "image_4"} for row in blink_rows(subtask="Visual_Similarity")]
    write_rows(home / "blink/Visual_Similarity/val-00000-of-00001.parquet", similar, COLUMNS[:3])
    write_rows(home / "blink/Relative_Depth/val-00000-of-00001.parquet", blink_rows(subtask="Relative_Depth", images=1), COLUMNS)
    return home


@pytest.mark.parametrize(("name", "split"), [("pope", "popular"), ("mme", "count")])
def test_a_hub_copy_holds_the_official_questions(whole, copies, name, split):
    found = open_dataset(name, copies / name)
    assert contents(found) == contents(open_dataset(name, whole / name, max_images=2))
    assert len({s.picture for s in found}) == len({s.image_id for s in found})  # questions about one image share it
    assert replace(found[0], size=(4, 4)).image.size == (4, 4)
    few = open_dataset(name, copies / name, split=split, max_images=1, prompts="lmms-eval")
    assert {(s.subset, s.image_id) for s in few} == {(split, next(s.image_id for s in found if s.subset == split))}
    plain = next(s.question for s in found if s.id == few[0].id)
    assert few[0].question == plain.removesuffix(" Please answer yes or no.") + IN_A_WORD


def test_pictures_of_rows_stay_on_disk(copies, monkeypatch):
    opened = []
    encoded = hub._encoded
    monkeypatch.setattr(hub, "_encoded", lambda value: opened.append(value) or encoded(value))
    samples, items = open_dataset("pope", copies / "pope"), open_dataset("blink", copies / "blink")
    assert not opened and samples[0].image.size and len(opened) == 1
    assert len(items[0].images) == 3 and items[1].images[2].size == (64, 48) and len(opened) == 2
    assert items[1].images[2].tobytes() == noise(23).tobytes() and samples[0].picture.name.startswith("POPE adversarial, row ")


def row(number, **change):
    return lambda rows: rows[number].update(change)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("pope", row(1, category="hard"), "category of POPE hard, row 1 'hard'; expected one of random"),
    ("pope", row(1, question_id="1"), "POPE adversarial, row 1: question_id 1 is that of row 0"),
    ("pope", lambda rows: [one.pop("answer") for one in rows], "expected the columns answer too, found question_id, image"),
    ("mme", row(1, answer="maybe"), "answer in MME code_reasoning/0001, row 1 'maybe'; expected one of yes, no"),
    ("mme", row(1, question_id="0007.png"), "MME code_reasoning/0001: expected two rows, found 1"),
    ("mme", row(1, question_id=None), "MME, row 1: question_id, question, answer, category must be text"),
    ("mme", lambda rows: [rows.pop() for _ in range(4)], "MME existence: no row of that category among the 52"),
    ("refcoco", lambda rows: rows[0]["ref_list"][1]["ann_info"].update(id=5), "reference 1: .*annotation and image are .5, 1."),
    ("refcoco", lambda rows: rows[0]["ref_list"][0]["ref_info"].update(category_id=12), "category_id 12 is none of COCO's"),
    ("refcoco", row(0, ref_list=None), "refcoco_unc_val, row 0: expected a list of references"),
    ("coco", row(1, objects=None), "COCO 000000000139: expected objects with bbox"),
    ("coco", lambda rows: [one.update(height=72.0) for one in rows] and rows[0].update(height=1.5), "expected 96x72 .* found 96x1.5"),
    ("coco", row(1, image_id=None), "expected whole numbers as image_id"),
    ("refcoco", lambda rows: rows[0]["image_info"].update(width=65), "row 0, reference 0: expected 128x96 pixels as its picture .*, found 65x96"),
    ("annotations", row(0, raw_anns="{"), "validation, row 0: expected JSON in raw_anns and raw_image_info"),
    ("annotations", row(0, raw_anns="[]"), "validation, row 0: expected an annotation with id .*TypeError"),
    ("annotations", lambda rows: [one.pop("raw_anns") for one in rows], "a copy of jxu124/refcoco-benchmark .*lmms-lab/RefCOCO"),
    ("coco", lambda rows: rows[1]["objects"].update(bbox=[[60, 50, 20, 10]]), "COCO 000000000139: expected boxes x_min, y_min, x_max, y_max"),
    ("coco", row(1, height=71), "^the annotation: expected 96x72 pixels as its picture COCO 000000000139, found 96x71"),
    ("blink", row(0, answer="hidden"), r"answer in BLINK Art_Style, row 0 'hidden'; expected one of \(A\), \(B\)"),
    ("blink", row(0, choices=["x"]), "expected 2 to 5 choices"),
    ("blink", row(0, prompt=" "), "idx, question and prompt must be text"),
    ("blink", row(0, image_2=None), "images must fill image_1, image_2, ... in order, found image_1, image_3"),
    ("blink", row(0, image_2={"bytes": b"no picture", "path": None}), "row 0, image_2: expected a picture, but it cannot"),
    ("blink", row(0, idx="val_Art_Style_2"), "two rows have the same idx"),
])  # fmt: skip
def test_rows_are_checked(whole, tmp_path, name, change, message):
    rows = COPIES[name][0](whole)
    change(rows)
    write_copy(tmp_path, name, rows)
    options = {"coco": {"count": 3}, "blink": {"subtasks": "Art_Style"}, "annotations": {"images": whole / "refcoco" / PICTURES}}
    with pytest.raises(DataError, match=message):
        contents(open_dataset(name.replace("annotations", "refcoco"), tmp_path, **options.get(name, {})))


def test_a_column_without_pictures_is_named(tmp_path):
    write_rows(tmp_path / "Art_Style" / "val-00000-of-00001.parquet", [one | {"image_2": 7} for one in blink_rows()], [])
    with pytest.raises(DataError, match="blink from .*: expected encoded pictures"):
        open_dataset("blink", tmp_path, subtasks="Art_Style")


def test_a_copy_with_a_part_missing_is_refused(copies, tmp_path):
    first = shutil.copytree(copies / "pope", tmp_path / "pope") / "data" / "test-00000-of-00002.parquet"
    other = first.with_name("test-00000-of-00003.parquet")
    other.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="parts of more than one copy"):
        open_dataset("pope", tmp_path / "pope")
    other.unlink()
    first.unlink()
    with pytest.raises(DataError, match=r"POPE.*: 1 of the 2 Parquet files of a split are there: test-00001-of-00002.parquet in"):
        open_dataset("pope", tmp_path / "pope")


def test_the_hub_is_asked_for_the_files_of_one_split(copies, monkeypatch):
    download = Mock(return_value=str(copies / "pope"))
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "revision_of", lambda repository: "abc")
    assert len(open_dataset("pope", "hub", split="random")) == 12
    download.assert_called_once_with("lmms-lab/POPE", repo_type="dataset", revision="abc", allow_patterns=["data/test-*.parquet"])
    with pytest.raises(DataError, match="no Parquet file of 'Art_Style/val'"):
        open_dataset("blink", "hub")
    assert download.call_args.kwargs["allow_patterns"] == ["Art_Style/val-*.parquet"]


def test_where_data_were_read_from_is_told(monkeypatch, whole, copies):
    assert data_sources(["pocket-msrc", "pocket-blink"]) == {}
    monkeypatch.setattr("kvutils.datasets.revision_of", lambda repository: "0123abc")
    options = {"davis-2017": {"root": whole / "davis-2017"}, "pope": {"root": "hub"}, "mme": {"root": copies / "mme"}}
    assert data_sources(options, options) == {"data": {
        "davis-2017": "files in the official layout", "pope": "hub: lmms-lab/POPE at 0123abc",
        "mme": "copy of the hub's lmms-lab/MME"}}  # fmt: skip
    with pytest.raises(DataError, match="no Parquet copy on the hub"):
        data_sources(["msrc"], {"msrc": {"root": "hub"}})


def test_both_hub_copies_of_refcoco_hold_the_official_samples(whole, copies, tmp_path):
    official, images = open_dataset("refcoco", whole / "refcoco"), whole / "refcoco" / PICTURES
    for name, options in (("refcoco", {}), ("annotations", {"images": images})):
        found = open_dataset("refcoco", copies / name, **options)
        assert contents([replace(s, class_name="") for s in found]) == contents([replace(s, class_name="", shown=frozenset()) for s in official])
        assert {s.class_name for s in found} <= {CATEGORIES[number] for number in range(1, 9)}  # by the ids of the pocket classes
    first = [s.id for s in official if s.image_id == "1"]
    assert [s.id for s in open_dataset("refcoco", copies / "refcoco", max_images=1)] == first
    assert [s.image_id for s in open_dataset("refcoco", copies / "refcoco", split_by="google", split="test")][0] == "12"
    both = open_dataset("refcoco", copies / "annotations", split=["val", "testA"], images=images)
    assert [s.id for s in both] == [s.id for s in official] + [s.id for s in official][:2]
    for name, options, error, message in (
        ("refcoco", {"split": "train"}, ParameterError, "has no train split"),
        ("refcoco", {"split": "testA"}, DataError, "no Parquet file of 'refcoco_unc_testA'"),
        ("annotations", {"split_by": "google"}, ParameterError, "by UNC only"),
        ("annotations", {"images": tmp_path}, DataError, "12 of the 12 images of COCO train2014 are missing"),
    ):
        with pytest.raises(error, match=message):
            open_dataset("refcoco", copies / name, **options)
    assert len(CATEGORIES) == len(set(CATEGORIES.values())) == 80
    assert {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} == set(range(1, 91)) - set(CATEGORIES)
    known = {1: "person", 17: "cat", 47: "cup", 63: "couch", 75: "remote", 84: "book", 86: "vase", 90: "toothbrush"}
    assert known.items() <= CATEGORIES.items()
    (tmp_path / "refcoco_unc_val-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="expected a Parquet file, but it cannot be read"):
        open_dataset("refcoco", tmp_path)


def test_official_files_come_before_a_copy_beside_them(whole, copies, tmp_path, caplog):
    """Which knows less of an image, and says so where it is read."""
    beside = shutil.copytree(whole / "refcoco", tmp_path / "refcoco")
    shutil.copy(next((copies / "refcoco").rglob("*.parquet")), beside)
    assert open_dataset("refcoco", beside)[0].shown and data_sources(["refcoco"], {"refcoco": {"root": beside}}) == {
        "data": {"refcoco": "files in the official layout"}}  # fmt: skip
    assert not caplog.records
    assert not open_dataset("refcoco", copies / "refcoco")[0].shown
    assert "a wrong prefix may name another thing" in caplog.text


def test_images_of_coco_without_an_annotation_are_left_out_as_on_the_hub(whole, tmp_path):
    root = shutil.copytree(whole / "coco", tmp_path / "coco")
    first, second, *_ = (one.id for one in open_dataset("coco", root, count=3))
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != int(first)]
    path.write_text(json.dumps(content))
    assert open_dataset("coco", root, count=2)[0].id == second


def test_coco_from_a_parquet_copy(copies, monkeypatch):
    images = open_dataset("coco", copies / "coco", count=3)
    assert [one.id for one in images] == ["000000000139", "000000000285", "000000000632"]
    expected = np.zeros((72, 96), np.uint8)
    expected[16:64, 24:80] = 1
    for one in images:
        assert np.array_equal(one.image, noise(int(one.id), (96, 72))) and np.array_equal(one.mask, expected)
    with pytest.raises(DataError, match="4 images are wanted, and .* has 3"):
        open_dataset("coco", copies / "coco", count=4)
    monkeypatch.setattr(hub, "revision_of", lambda repository: "abc")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: str(copies / "coco"))
    assert contents(open_dataset("coco", "hub", count=2)) == contents(images[:2])
    with pytest.raises(DataError, match="9 images are wanted, and hub has 3"):
        open_dataset("coco", "hub", count=9)


def test_blink_items_are_asked_as_blink_asks_them(copies):
    items = open_dataset("blink", copies / "blink")
    assert Counter(item.subtask for item in items) == {"Art_Style": 4, "Visual_Similarity": 4}
    first = items[0]
    assert first.id == first.group == "val_Art_Style_1" and first.answer == "(A)" and first.options == ("(A)", "(B)")
    assert first.choices == ("the second image", "the third image") and first.question == QUESTION
    assert first.prompt == DISCLAIMER + f"{QUESTION} (A) the second image (B) the third image"
    assert items[-1].prompt.startswith(QUESTION)
    for ours, other in zip(items, open_dataset("blink", copies / "blink", prompts="lmms-eval"), strict=True):
        letters = ", ".join("ABCD"[: len(ours.choices)])
        note = f"Note: You only need to respond with {letters} without providing any additional information.\n"
        assert other.prompt == note + ours.prompt.removeprefix(DISCLAIMER)
    with pytest.raises(ParameterError, match="form of prompts 'lmms'.*paper, lmms-eval"):
        open_dataset("blink", copies / "blink", prompts="lmms")
    assert len(first.images) == 3 and all(np.array_equal(image, noise(11 + i)) for i, image in enumerate(first.images))
    few = open_dataset("blink", copies / "blink", subtasks="Art_Style", max_items=2)
    assert [item.id for item in few] == [item.id for item in items[:2]]
    assert len(open_dataset("blink", copies / "blink", subtasks=["Relative_Depth"])[0].images) == 1
    assert set(blink.READABLE) < set(blink.SUBTASKS) and len(blink.SUBTASKS) == 14


@pytest.mark.parametrize("turned", [1, 3, 6, 7])
@pytest.mark.parametrize("name", ["refcoco", "coco"])
def test_rows_turn_their_labels(whole, copies, tmp_path, name, turned):
    rows = COPIES[name][0](whole)
    for one in rows:
        raw = one["image"]["bytes"] if isinstance(one["image"], dict) else photograph(one["image"])
        one["image"] = {"bytes": with_orientation(raw, turned), "path": None}
    write_copy(tmp_path, name, rows)
    options = {"coco": {"count": 3}}.get(name, {})
    for plain, found in zip(*(open_dataset(name, root, **options) for root in (copies / name, tmp_path)), strict=True):
        assert np.array_equal(found.mask, as_shown(plain.mask, turned)) and found.image.size == as_shown(plain.image, turned).shape[1::-1]


@needs_samples
def test_saved_outputs_of_blink_have_these_ids_and_answers():
    folder = SAMPLES / "blink" / "saved_outputs" / "QwenVLMax"
    named = {path.stem.replace(" ", "_"): json.loads(path.read_text())["val"] for path in folder.glob("*.json")}
    assert set(named) == set(blink.SUBTASKS) and sum(map(len, named.values())) == 1901
    for subtask, rows in named.items():
        assert [row["idx"] for row in rows] == [f"val_{subtask}_{i}" for i in range(1, len(rows) + 1)]
        assert {row["answer"] for row in rows} <= {"(A)", "(B)", "(C)", "(D)"}


def test_a_disk_that_takes_no_rows_is_not_a_missing_data_set(whole, tmp_path, monkeypatch):
    """It would be fetched again, onto the same disk."""
    write_rows(tmp_path / "POPE" / "data" / "test-00000-of-00001.parquet", pope_rows(whole))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "rows")
    with pytest.raises(StoreError, match="rows of pope .*file/rows. could not be written .*Not a directory.*HF_HOME"):
        open_dataset("pope", tmp_path / "POPE")
