"""SPair-71k and BDD-10K in their official layouts: small files written here, real records."""

import json

import numpy as np
import pytest
from PIL import Image

from kvutils import VOID
from kvutils.datasets import bdd10k, class_names, open_dataset
from tests.mini_data import SAMPLES, needs_samples, noise, save

# --- SPair-71k ---------------------------------------------------------------------------------------------


def pair(number, source, target, category="bird", **other):
    return {"pair_id": number, "src_imname": f"{source}.jpg", "trg_imname": f"{target}.jpg", "src_imsize": [64, 48, 3],
            "trg_imsize": [64, 48, 3], "src_bndbox": [2, 2, 60, 40], "trg_bndbox": [4, 4, 60, 44], "category": category,
            "src_kps": [[10, 10], [30, 20]], "trg_kps": [[12, 11], [33, 21]], "kps_ids": ["0", "3"]} | other  # fmt: skip


def write_pairs(root, pairs, colon=":", ending=""):
    home = root / "SPair-71k"
    names = [f"{one['pair_id']:06d}-{one['src_imname'][:-4]}-{one['trg_imname'][:-4]}:{one['category']}" for one in pairs]
    for layout in ("large", "small"):
        (home / "Layout" / layout).mkdir(parents=True, exist_ok=True)
        (home / "Layout" / layout / "test.txt").write_text("".join(f"{name}{ending}\n" for name in names))
    (home / "PairAnnotation" / "test").mkdir(parents=True, exist_ok=True)
    for name, one in zip(names, pairs, strict=True):
        (home / "PairAnnotation" / "test" / f"{name.replace(':', colon)}.json").write_text(json.dumps(one))
        for side in ("src", "trg"):
            path = home / "JPEGImages" / one["category"] / one[f"{side}_imname"]
            save(noise(one["pair_id"]), path)
    return names


PAIRS = [pair(1, "a", "b"), pair(2, "a", "c"), pair(3, "d", "e", "cat"), pair(4, "a", "d"), pair(5, "e", "d", "cat")]


@pytest.mark.parametrize(("colon", "ending"), [(":", ""), ("_", ""), ("%3A", ".json")])
def test_spair_reads_the_list_in_its_order(tmp_path, colon, ending):
    names = write_pairs(tmp_path, PAIRS, colon, ending)
    pairs = open_dataset("spair-71k", tmp_path)
    assert [p.id for p in pairs] == names and [p.category for p in pairs] == ["bird", "bird", "cat", "bird", "cat"]
    first = pairs[0]
    assert first.source_points.tolist() == [[10, 10], [30, 20]] and first.target_points.tolist() == [[12, 11], [33, 21]]
    assert first.target_box.tolist() == [4, 4, 60, 44] and (first.source_id, first.target_id) == ("a", "b")
    assert first.source.size == first.target.size == (64, 48)
    assert [p.id for p in open_dataset("spair-71k", tmp_path / "SPair-71k", categories=["cat"])] == [names[2], names[4]]
    assert [p.id for p in open_dataset("spair-71k", tmp_path, layout="small", max_pairs=2)] == names[:2]
    assert [p.id for p in open_dataset("spair-71k", tmp_path, per_category=1)] == [names[0], names[2]]
    assert [p.id for p in open_dataset("spair-71k", tmp_path, per_category=2)] == [names[0], names[1], names[2], names[4]]


@needs_samples
def test_spair_sample_records():
    pairs = open_dataset("spair-71k", SAMPLES / "SPair-71k")
    assert pairs[0].id == "000006-2008_002719-2008_007604:aeroplane" and len({p.category for p in pairs}) == 3
    assert pairs[0].target_points[0].tolist() == [62, 462] and pairs[0].target.size == (333, 500)
    for one in pairs:
        assert (one.source_points < one.source.size).all() and (one.target_points < one.target.size).all()


# --- BDD-10K -----------------------------------------------------------------------------------------------

NUMBERS = np.arange(48)[:, None] * 64 + np.arange(64)  # pixel numbers


def bdd(root, names: dict[str, tuple[str, str, str] | None], form="det_20"):
    """names: image -> (split, time of day, scene), scene "-" for no attributes."""
    home, entries = root / "bdd100k", []
    for seed, (name, (split, time, scene)) in enumerate(names.items()):
        save(noise(seed), home / "images" / "10k" / split / f"{name}.jpg")
        mask = home / "labels" / "sem_seg" / "masks" / split / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(NUMBERS % 64 < 3, 255, NUMBERS // 64 // 16).astype(np.uint8)).save(mask)
        if scene != "-":
            attributes = {"weather": "clear", "scene": scene, "timeofday": time}
            box = {"id": "0", "category": "car", "attributes": {"occluded": False}, "box2d": {"x1": 1}}
            entries.append({"name": f"{name}.jpg", "attributes": attributes, "labels": [box]})
    labels = home / "labels"
    if form == "single":  # in the split of the 100K set, which may be another
        (labels / "100k" / "train").mkdir(parents=True)
        for entry in entries:
            one = {"name": entry["name"][:-4], "attributes": entry["attributes"], "frames": [{"objects": entry["labels"]}]}
            (labels / "100k" / "train" / f"{one['name']}.json").write_text(json.dumps(one))
    else:
        path = labels / ("det_20/det_train.json" if form == "det_20" else "bdd100k_labels_images_val.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"name": "other.jpg"}, *entries]))
    return home


MANY = {
    f"{i:08x}-{j:08x}": ("train" if i % 5 else "val", "night" if i % 3 else "daytime", "highway")
    for i in range(30) for j in range(2)
}  # fmt: skip


@pytest.mark.parametrize("form", ["det_20", "2018", "single"])
def test_bdd_domains_come_from_the_detection_labels(tmp_path, form, caplog):
    names = {"a-1": ("val", "night", "highway"), "b-1": ("train", "daytime", "highway"), "d-1": ("val", "", "-"),
             "c-1": ("train", "night", "city street"), "e-1": ("train", "dawn/dusk", "residential")}  # fmt: skip
    bdd(tmp_path, names, form)
    found = open_dataset("bdd-10k", tmp_path, part="all")
    assert {one.id: one.domain for one in found} == {"a-1": "night highway", "b-1": "day highway"}
    assert "1 of 5 images have no attributes" in caplog.text
    domains = [("night", ""), ("dawn/dusk", "residential")]
    any_scene = open_dataset("bdd-10k", tmp_path, part="all", domains=domains, balance=False)
    assert {one.id: one.domain for one in any_scene} == {"a-1": "night", "c-1": "night", "e-1": "dusk residential"}


def test_bdd_masks_are_numbers_plus_one_and_keep_void(tmp_path):
    bdd(tmp_path, {"a-1": ("val", "night", "highway"), "b-1": ("train", "daytime", "highway")})
    one = open_dataset("bdd-10k", tmp_path, part="all")[0]
    assert one.image.size == (64, 48) and one.mask.shape == (48, 64) and one.mask.dtype == np.uint8
    assert (one.mask[:, :3] == VOID).all() and one.mask[:, 3:].min() == 1 and one.mask.max() == VOID
    assert (one.mask[:16, 3:] == 1).all() and (one.mask[32:, 3:] == 3).all()
    assert class_names("bdd-10k-train")[one.mask[20, 20] - 1] == "sidewalk" and len(class_names("bdd-10k-train")) == 19


def test_bdd_parts_share_no_recording_and_are_balanced(tmp_path):
    bdd(tmp_path, MANY)
    scored, training = open_dataset("bdd-10k", tmp_path), open_dataset("bdd-10k-train", tmp_path)
    recordings = [{one.id.partition("-")[0] for one in part} for part in (scored, training)]
    assert not recordings[0] & recordings[1] and min(map(len, recordings)) > 4
    both = [[one.domain for one in part] for part in (scored, training)]
    assert both[0].count("day highway") <= both[0].count("night highway") and {*both[0]} == {*both[1]}
    assert len(open_dataset("bdd-10k", tmp_path, balance=False)) + len(training) == len(MANY)
    assert [one.id for one in scored] == sorted(one.id for one in scored)
    few = open_dataset("bdd-10k-train", tmp_path, images=4)
    assert {one.id for one in few} < {one.id for one in training}
    assert [one.domain for one in few].count("day highway") == 2
    assert [one.id for one in few] == [one.id for one in open_dataset("bdd-10k-train", tmp_path, images=4)]


@needs_samples
def test_bdd_sample_layout(caplog):
    domains = [("night", "highway"), ("daytime", "city street")]
    found = open_dataset("bdd-10k", SAMPLES / "bdd100k", domains=domains, part="all")
    assert [one.id for one in found] == ["7d06fefd-f7be05a6", "7d128593-0ccfea4c"]
    assert [one.domain for one in found] == ["night highway", "day city street"]
    assert [np.unique(one.mask).tolist() for one in found] == [[3], [9]] and "4 of 6 images have no attributes" in caplog.text
    whole = SAMPLES / "bdd100k_toolkit" / "sem_seg_mask_13classes.png"
    labels, numbers = bdd10k.read_mask(whole, whole), np.array(Image.open(whole))
    assert labels.shape == (720, 1280) and (labels == numbers + 1).all()
    void = SAMPLES / "bdd100k_toolkit" / "semseg_mask_1280x720.png"
    assert np.unique(bdd10k.read_mask(void, void)).tolist() == [14, VOID]
