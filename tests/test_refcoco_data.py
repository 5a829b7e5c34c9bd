"""RefCOCO as its toolkit and the hub have it: small files written here, real records, hostile pickles."""

import json
import os
import pickle

import datasets
import numpy as np
import pytest

from kvutils.datasets import USES, open_dataset
from kvutils.datasets.refcoco import CATEGORIES, read_references
from kvutils.errors import DataError, ParameterError
from tests.mini_data import SAMPLES, needs_samples, noise, save, write_rows

# --- RefCOCO -----------------------------------------------------------------------------------------------

BOX = [8, 8, 40, 8, 40, 32, 8, 32]  # a polygon
THINGS = {"fish": 1, "car": 2}


def reference(number, image, thing, sentences, split="val"):
    texts = [
        {"tokens": text.split(), "raw": text, "sent": text, "sent_id": 10 * number + i}
        for i, text in enumerate(sentences)
    ]
    return {"ref_id": number, "ann_id": 100 + number, "image_id": image, "category_id": THINGS[thing], "split": split,
            "file_name": f"COCO_train2014_{image:012d}_{number}.jpg", "sentences": texts,
            "sent_ids": [one["sent_id"] for one in texts]}  # fmt: skip


REFERENCES = [
    reference(1, 7, "fish", ["the fish", "left fish"]),
    reference(2, 7, "car", ["the car"]),
    reference(3, 8, "car", ["the red car"]),
    reference(4, 9, "fish", ["the small fish"], "testA"),
]


def instances(references=REFERENCES) -> dict:
    images = sorted({one["image_id"] for one in references})
    return {
        "images": [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": 64, "height": 48} for i in images],
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in THINGS.items()],
        "annotations": [
            {"id": one["ann_id"], "image_id": one["image_id"], "category_id": one["category_id"], "segmentation": [BOX, BOX],
             "bbox": [8, 8, 32, 24], "area": 768, "iscrowd": 0}
            for one in references
        ],
    }  # fmt: skip


@pytest.fixture
def refcoco_root(tmp_path):
    home = tmp_path / "refcoco" / "refcoco"
    home.mkdir(parents=True)
    (home / "instances.json").write_text(json.dumps(instances()))
    with open(home / "refs(unc).p", "wb") as file:
        pickle.dump(REFERENCES, file, protocol=0)
    for i in (7, 8, 9):
        save(noise(i), tmp_path / "coco" / "train2014" / f"COCO_train2014_{i:012d}.jpg")
    return tmp_path / "refcoco"


def test_refcoco_has_one_sample_per_sentence(refcoco_root):
    samples = open_dataset("refcoco", refcoco_root)
    assert [s.id for s in samples] == ["1-10", "1-11", "2-20", "3-30"]
    assert [s.text for s in samples] == ["the fish", "left fish", "the car", "the red car"]
    assert [s.class_name for s in samples] == ["fish", "fish", "car", "car"]
    assert [s.group for s in samples] == [s.image_id for s in samples] == ["7", "7", "7", "8"]
    first = samples[0]
    assert first.image.size == (64, 48) and first.mask.shape == (48, 64) and first.mask.dtype == np.uint8
    assert first.mask.sum() == 32 * 24 and (first.mask[8:32, 8:40] == 1).all()
    assert len(open_dataset("refcoco", refcoco_root, max_images=1)) == 3
    both = open_dataset("refcoco", refcoco_root, split=["testA", "val"], max_images=2)
    assert [s.id for s in both] == ["1-10", "1-11", "2-20", "3-30"]
    assert USES["paper"]["01"]["referring_segmentation"] == USES["paper"]["04"]["referring"] == "refcoco"


def test_refcoco_images_where_people_keep_them(refcoco_root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "coco" / "train2014").rename(elsewhere)
    with pytest.raises(DataError, match="RefCOCO.*there is no .*nor .*coco/train2014.*images="):
        open_dataset("refcoco", refcoco_root)
    assert len(open_dataset("refcoco", refcoco_root, images=elsewhere)) == 4
    official = refcoco_root / "images" / "mscoco" / "images"
    official.mkdir(parents=True)
    elsewhere.rename(official / "train2014")
    assert open_dataset("refcoco", refcoco_root)[-1].image.size == (64, 48)


class Runs:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_runs_nothing(tmp_path, protocol):
    victim, path = tmp_path / "victim", tmp_path / "refs(unc).p"
    calls = [(os.system, f"touch {victim}"), (eval, f"open({str(victim)!r}, 'w')"), (open, str(victim), "w")]
    for function, *arguments in calls:
        path.write_bytes(pickle.dumps([REFERENCES[0], Runs(function, *arguments)], protocol))
        with pytest.raises(DataError, match=r"refs\(unc\).p is not a list .*needs no class or function"):
            read_references(path)
        assert not victim.exists()
        pickle.loads(path.read_bytes())  # it would have
        assert victim.exists()
        victim.unlink()


def test_a_truncated_pickle_is_an_error(tmp_path):
    path = tmp_path / "refs(unc).p"
    whole = pickle.dumps(REFERENCES, 2)
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a list of references that can be read"):
            read_references(path)
    with pytest.raises(DataError, match="No such file"):
        read_references(tmp_path / "nothing.p")


@needs_samples
def test_refcoco_sample_records():
    root = SAMPLES / "refcoco"
    samples = open_dataset("refcoco", root, split=("val", "testA", "testB"))
    assert [s.text for s in samples[:2]] == ["left cat", "the cat on the left"] and samples[0].class_name == "cat"
    assert {s.class_name for s in samples} == {"cat", "remote"} and len(samples) == 7
    assert all(s.image.size == (640, 480) and s.mask.shape == (480, 640) and 0 < s.mask.mean() < 0.5 for s in samples)
    with pytest.raises(DataError, match="1 of the 1 images of COCO train2014 are missing.*COCO_train2014_000000460986.jpg"):
        open_dataset("refcoco", root, split="train")


# --- the hub copies ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def whole_rows(references=REFERENCES, width=64):
    """As jxu124/refcoco-benchmark: one row per image."""
    content, rows = instances(references), []
    for image in content["images"]:
        mine = [
            {"ann_info": annotation, "ref_info": one}
            for one, annotation in zip(references, content["annotations"], strict=True) if one["image_id"] == image["id"]
        ]  # fmt: skip
        rows.append({"ref_list": mine, "image_info": image | {"width": width}, "image": noise(image["id"])})
    return rows


def annotation_rows(references):
    """As jxu124/refcoco: one row per reference, annotations as JSON."""
    content = instances(references)
    images = {image["id"]: image for image in content["images"]}
    return [
        one | {"raw_anns": json.dumps(annotation), "raw_image_info": json.dumps(images[one["image_id"]]), "image_path": "x"}
        for one, annotation in zip(references, content["annotations"], strict=True)
    ]


@pytest.mark.usefixtures("cache")
def test_the_hub_copy_with_images_holds_the_same_samples(tmp_path, refcoco_root):
    copy = tmp_path / "copy"
    write_rows(copy / "data" / "refcoco_unc_val-00000-of-00001-350dcb478fc06c10.parquet", whole_rows(REFERENCES[:3]))
    write_rows(copy / "data" / "refcoco_google_test-00000-of-00001-ab.parquet", whole_rows(REFERENCES[3:]))
    official, found = open_dataset("refcoco", refcoco_root), open_dataset("refcoco", copy)
    for one, other in zip(official, found, strict=True):
        assert (one.id, one.text, one.group) == (other.id, other.text, other.group)
        assert (one.mask == other.mask).all() and one.image.size == other.image.size
    assert [s.class_name for s in found] == [CATEGORIES[THINGS[s.class_name]] for s in official]
    assert np.array_equal(found[3].image, noise(8))
    assert len(open_dataset("refcoco", copy, max_images=1)) == 3
    assert [s.id for s in open_dataset("refcoco", copy, split_by="google", split="test")] == ["4-40"]
    with pytest.raises(ParameterError, match="has no train split"):
        open_dataset("refcoco", copy, split="train")
    with pytest.raises(DataError, match="no Parquet file of 'refcoco_unc_testA'"):
        open_dataset("refcoco", copy, split="testA")


@pytest.mark.usefixtures("cache")
def test_the_hub_copy_of_annotations_needs_the_images(tmp_path, refcoco_root):
    copy = tmp_path / "annotations"
    write_rows(copy / "data" / "validation-00000-of-00001-x.parquet", annotation_rows(REFERENCES[:3]), [])
    write_rows(copy / "data" / "test-00000-of-00001-x.parquet", annotation_rows(REFERENCES[3:]), [])
    official, found = (open_dataset("refcoco", root, split=["val", "testA"]) for root in (refcoco_root, copy))
    assert [s.id for s in found] == [s.id for s in official] and np.array_equal(found[0].image, official[0].image)
    assert all((one.mask == other.mask).all() for one, other in zip(official, found, strict=True))
    (tmp_path / "coco" / "train2014" / "COCO_train2014_000000000007.jpg").unlink()
    with pytest.raises(DataError, match="1 of the 2 images of COCO train2014 are missing"):
        open_dataset("refcoco", copy)
    with pytest.raises(ParameterError, match="by UNC only"):
        open_dataset("refcoco", copy, split_by="google")


@pytest.mark.usefixtures("cache")
def test_other_and_broken_hub_copies_are_refused(tmp_path):
    mixed = {"question_id": "1", "question": "", "answer": ["the fish"], "segmentation": [1.0], "file_name": "x_0.jpg"}
    broken = whole_rows(REFERENCES[:3])
    broken[0]["ref_list"][1]["ann_info"]["id"] = 5
    unknown = whole_rows([REFERENCES[0] | {"category_id": 12}])
    raw = annotation_rows(REFERENCES[:1])[0]
    for number, (split, row, image, message) in enumerate([
        ("val", [mixed], None, "expected a copy of jxu124/refcoco-benchmark .*lmms-lab/RefCOCO cannot be used: its val mixes the splits"),
        ("val", [{"a": 1}], None, "with the columns a: expected a copy of"),
        ("refcoco_unc_val", broken, "image", "row 0, reference 1: .*annotation and image are .5, 7., not those"),
        ("refcoco_unc_val", unknown, "image", "category_id 12 is none of COCO's"),
        ("validation", [raw | {"raw_anns": "{"}], None, "validation, row 0: expected JSON in raw_anns and raw_image_info"),
        ("validation", [raw | {"raw_anns": "[]"}], None, "validation, row 0: expected an annotation with id .*TypeError"),
    ]):  # fmt: skip
        copy = tmp_path / str(number)
        write_rows(copy / "data" / f"{split}-00000-of-00001.parquet", row, ["image"] if image else [])
        with pytest.raises(DataError, match=message):
            open_dataset("refcoco", copy)
    scaled = tmp_path / "scaled"
    write_rows(scaled / "data" / "refcoco_unc_val-00000-of-00001.parquet", whole_rows(REFERENCES[:3], width=65))
    with pytest.raises(DataError, match="reference 0 is 64x48, but its annotation 65x48"):
        _ = open_dataset("refcoco", scaled)[0].image
    (scaled / "data" / "refcoco_unc_val-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="expected a Parquet file, but it cannot be read"):
        open_dataset("refcoco", scaled)


def test_category_names_are_those_of_coco():
    assert len(CATEGORIES) == len(set(CATEGORIES.values())) == 80
    assert {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} == set(range(1, 91)) - set(CATEGORIES)
    known = {1: "person", 17: "cat", 47: "cup", 63: "couch", 75: "remote", 84: "book", 86: "vase", 90: "toothbrush"}
    assert {number: CATEGORIES[number] for number in known} == known


@needs_samples
def test_category_names_are_those_of_the_sample_records():
    categories = json.loads((SAMPLES / "refcoco" / "refcoco" / "instances.json").read_text())["categories"]
    assert {one["id"]: one["name"] for one in categories}.items() <= CATEGORIES.items()
