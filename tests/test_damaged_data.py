"""What the loaders say of options that do not exist and of files that are missing, malformed or of another data set.

Every data set is written in its official layout (`mini_data`), damaged in one place, opened and read.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from kvutils.datasets import FOLDERS, USES, open_dataset
from kvutils.errors import DataError, ImageError, ParameterError
from tests.mini_data import FEW, contents

NAMES = list(dict.fromkeys(name for uses in USES["paper"].values() for name in uses.values()))


Damage = Callable[[Path], None]


def lose(pattern: str, everything: bool = False) -> Damage:
    def damage(root: Path) -> None:
        for path in sorted(root.glob(pattern))[: None if everything else 1]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def put(pattern: str, content: str | bytes | list | dict) -> Damage:
    """In place of what is in the first such file."""
    raw = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
    return lambda root: sorted(root.glob(pattern))[0].write_bytes(raw) and None


def swap(pattern: str, old: str, new: str) -> Damage:
    """In a text file, once."""

    def damage(root: Path) -> None:
        path = sorted(root.glob(pattern))[0]
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


def edit(pattern: str, change: Callable[[object], object]) -> Damage:
    """In the content of a JSON file or pickle."""

    def damage(root: Path) -> None:
        path = sorted(root.glob(pattern))[0]
        content = pickle.loads(path.read_bytes()) if path.suffix == ".p" else json.loads(path.read_text())
        content = change(content) or content
        path.write_bytes(pickle.dumps(content) if path.suffix == ".p" else json.dumps(content).encode())

    return damage


def draw(pattern: str, change: Callable[[Image.Image], Image.Image]) -> Damage:
    """In all such pictures."""

    def damage(root: Path) -> None:
        for path in root.glob(pattern):
            change(Image.open(path)).save(path)

    return damage


def shorter(image: Image.Image) -> Image.Image:
    return image.crop((0, 0, image.width, image.height - 1))


def filled(value) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        image.paste(value, (0, 0, *image.size))
        return image

    return change


def rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def first(**change) -> Callable[[list], None]:
    return lambda content: content[0].update(change)


def kind(key: str, **change) -> Callable[[dict], None]:
    return lambda content: content[key][0].update(change)


FOLD = "splits/pascal/val/fold0.txt"
TRUTH = "*/GroundTruth/*.bmp"
LISTS = "data/names/ImageNetS_im50_validation.txt"
PAIR, PAIRS = "*/PairAnnotation/test/*.json", "*/Layout/large/test.txt"
POPE = "output/coco/coco_pope_random.json"
MME = "*/existence/0000.txt"
LABELS = "*/labels/det_20/det_train.json"
REFS, INSTANCES = "refcoco/refs(unc).p", "refcoco/instances.json"
VAL = "annotations/instances_val2017.json"
DAMAGE = [
    ("pascal-5i", {}, draw("*/SegmentationClass/*", shorter), r"png: expected \d+x\d+ pixels as its picture .*jpg, found"),
    ("pascal-5i", {}, draw("*/SegmentationClass/*", filled(20)), r"png: its list says that it shows class \d+ .*found only \[20\]"),
    ("pascal-5i", {}, draw("*/SegmentationClass/*", filled(21)), r"png: expected class numbers .*0..20 and 255 .void., found \[21\]"),
    ("pascal-5i", {}, draw("*/SegmentationClass/*", rgb), "png: expected class numbers.*found a 'RGB' image"),
    ("pascal-5i", {}, lose("*/SegmentationClass/*", True), r"(\d+) of the \1 masks of the episodes are missing \(first: .*png"),
    ("pascal-5i", {}, lose("*/JPEGImages"), "(?s)there is no .*JPEGImages.*expected.*SegmentationClass"),
    ("pascal-5i", {}, put(FOLD, "a__01\nb__02\nc__06\n"), r"fold0.txt, line 3: expected '<image>__<class 1..5>' .*another fold"),
    ("pascal-5i", {}, put(FOLD, ""), "fold0.txt is empty"),
    ("pascal-5i", {}, put(FOLD, "a__01\n"), "class 0 has no image but the query 'a'"),
    ("msrc", {}, draw(TRUTH, shorter), r"GT.bmp: expected \d+x\d+ pixels .*found"),
    ("msrc", {}, draw(TRUTH, lambda image: image.convert("P")), "GT.bmp: expected a colour-coded ground truth.*found a 'P' image"),
    ("msrc", {}, draw(TRUTH, filled((0, 0, 127))), "only 0 of 21 images .* class 'bird', expected 3"),
    ("msrc", {"images": 4}, lose("nothing"), "only 3 of 21 images .* class 'bird', expected 4"),
    ("msrc", {}, lambda root: (root / "MSRC_ObjCategImageDatabase_v2/Images/copy.bmp").touch(), "copy.bmp: expected names such as 5_1_s"),
    ("imagenet-s", {}, draw("*/validation-segmentation/*/*", filled((51, 0, 0))), r"png: the colour \(51, 0, 0\) is no class id"),
    ("imagenet-s", {}, draw("*/validation-segmentation/*/*", filled((1, 0, 9))), r"png: the colour \(1, 0, 9\) is no class id"),
    ("imagenet-s", {}, draw("*/validation-segmentation/*/*", lambda i: i.convert("P")), "png: expected an RGB image .*found a 'P'"),
    ("imagenet-s", {}, lose("*/validation-segmentation/*/*"), r"1 of the 4 masks in .*segmentation are missing \(first: .*png"),
    ("imagenet-s", {}, lose("*/validation/*/*"), r"1 of the 4 images of .*validation are missing \(first: .*; imagenet= may name"),
    ("imagenet-s", {"max_images": None}, lose("nothing"), "736 of the 752 images of"),
    ("imagenet-s", {}, lose("ImageNetS50"), "there is no .*ImageNetS50"),
    ("imagenet-s", {"variant": 300}, lose("nothing"), "there is no .*ImageNetS_categories_im300.txt: the class ids"),
    ("imagenet-s", {}, put("data/categories/*", "n01"), "im50.txt: expected 50 different WordNet ids, one per line, found 1"),
    ("imagenet-s", {}, put("data/data.py", "classes = 1"), r"data.py: expected 50 class names, .*assigns no text to classes_50"),
    ("imagenet-s", {}, put("data/data.py", 'self.classes_50 = "goldfish, tench"'), "data.py: expected 50 class names, .*found 2"),
    ("imagenet-s", {}, put(LISTS, "n01000000/a.JPEG n01000000/a.png"), "validation.txt: expected 752 images, found 1"),
    ("imagenet-s", {}, put(LISTS, "\nn12345678/a.JPEG n12345678/a.png"), "validation.txt, line 2: expected '<class>/<image>' of a known"),
    ("imagenet-s-train", {}, lose("data/names/ImageNetSemi*"), "there is no .*im50_train.txt: the official list"),
    ("imagenet-s-train", {"per_class": 2}, lose("nothing"), "50 of the 100 images of .*train-semi are missing"),
    ("coco", {}, edit(VAL, kind("annotations", segmentation=[[1, 2, 3, 4]])), "100.jpg, annotation 1 of .*val2017.json: expected a segm"),
    ("coco", {}, draw("val2017/*100.jpg", shorter), "annotation: expected 128x95 .*000000000100.jpg, found 128x96"),
    ("coco", {}, edit(VAL, lambda found: found["annotations"][1].pop("image_id") and None), r"val2017.json: annotations\[1\] lacks image_id"),
    ("coco", {}, put(VAL, '{"images": []}'), "expected COCO's instances with a list 'annotations', found NoneType"),
    ("coco", {}, put(VAL, '{"images": ['), "val2017.json: expected JSON, but it cannot be read"),
    ("coco", {}, lose(VAL), r"there is no .*val2017.json: .*where the objects are(.|\n)*get it"),
    ("coco", {"count": 9}, lose("nothing"), "9 images are wanted, and .*json has 4 that POPE does not use"),
    ("refcoco", {}, edit(REFS, first(ref_id="1")), "reference 0: expected a reference .*'1' is no whole number"),
    ("refcoco", {}, edit(REFS, first(sentences=[])), "reference 0: .*it has no sentence"),
    ("refcoco", {}, edit(REFS, first(sentences=[{"sent": " ", "sent_id": 1}])), "reference 0: .*' ' is no text"),
    ("refcoco", {}, edit(REFS, lambda found: {"a": 1}), "expected a list of references, found dict"),
    ("refcoco", {}, edit(REFS, first(ann_id=5)), r"ref_id 1\): ann_id 5 is none of the annotations in .*instances.json"),
    ("refcoco", {}, edit(REFS, first(category_id=90)), "category_id 90 is none of the categories"),
    ("refcoco", {}, lose(REFS), r"there is no .*refs\(unc\).p"),
    ("refcoco", {"split": "train"}, lose("nothing"), "no reference of the split train"),
    ("refcoco", {}, put(INSTANCES, {"images": []}), "the instances of RefCOCO with a list 'annotations'"),
    ("refcoco", {}, edit(INSTANCES, kind("images", file_name="../x.jpg")), "ref_id 1.*name of a file, found '../x.jpg'"),
    ("refcoco", {}, edit(INSTANCES, lambda found: found["images"][0].pop("width") and None), "ref_id 1.*image with .*KeyError: 'width'"),
    ("refcoco", {}, edit(INSTANCES, kind("annotations", segmentation=[[1, 2, 3]])), "ref_id 1.*a polygon has at least 3 points"),
    ("refcoco", {}, lose(INSTANCES), "there is no .*instances.json"),
    ("refcoco", {}, draw("images/mscoco/images/train2014/*1.jpg", shorter), "ref_id .*: expected 128x95 pixels as its picture .*1.jpg, found 128x96"),
    ("refcoco", {}, lose("images/mscoco/images/train2014/*"),
     "1 of the 12 images of COCO train2014 are missing .*; images= names another folder, max_images= reads"),
    ("refcoco", {}, lose("images"), r"there is no .*train2014 \(nor .*coco/train2014\): .*images= names another folder"),
    ("spair-71k", {"split": "val"}, lose("nothing"), "SPair-71k: there is no .*large/val.txt"),
    ("spair-71k", {"categories": "dog"}, lose("nothing"), "no pair of dog"),
    ("spair-71k", {}, put(PAIRS, "x:bird"), "test.txt, line 1: expected '<number>-<source>-<target>:<category>', each once"),
    ("spair-71k", {}, put(PAIRS, "1-a-b:bird\n\n1-a-b:bird"), "test.txt, line 3: expected .*each once, found '1-a-b:bird'"),
    ("spair-71k", {}, lose("*/JPEGImages/*/*"), "1 of the 48 images are missing .*jpg"),
    ("spair-71k", {}, lose(PAIR), "1 of the 24 annotations are missing .first: .*:.*json. .or with _ or %3A for the colon"),
    ("spair-71k", {}, edit(PAIR, lambda found: {**found, "trg_kps": [[1, 2]] * 9}), r"annotation of the pair .* \d source and 9 target points"),
    ("spair-71k", {}, edit(PAIR, lambda found: {**found, "src_kps": [[1, 2, 3]]}), "src_kps must be finite numbers"),
    ("spair-71k", {}, edit(PAIR, lambda found: {**found, "trg_imname": "z.jpg"}), "its images are .*'z.jpg'"),
    ("spair-71k", {}, edit(PAIR, lambda found: {**found, "category": "sofa"}), "its category is 'sofa'"),
    ("spair-71k", {}, edit(PAIR, lambda found: {**found, "src_imsize": None}), "json: expected the annotation of the pair .*TypeError"),
    ("spair-71k", {}, edit(PAIR, lambda found: {**found, "src_imsize": []}), "json: expected the annotation of the pair .*IndexError"),
    ("spair-71k", {}, draw("*/JPEGImages/*/*", shorter), r"the annotations of \w+: expected \d+x\d+ pixels as its picture .*jpg, found \d+x\d+"),
    ("davis-2017", {}, lose("*/ImageSets/2017/val.txt"), "there is no .*val.txt: it lists the sequences"),
    ("davis-2017", {}, lose("*/JPEGImages/480p/clip-1"), r"clip-1 holds no \*.jpg: is the sequence 'clip-1' extracted"),
    ("davis-2017", {}, draw("*/Annotations/480p/clip-1/00000.png", filled(255)), "clip-1: the first annotation marks no object"),
    ("davis-2017", {}, draw("*/Annotations/*/*/*", lambda image: image.convert("L")), "palette .*DAVIS-2016.*found a 'L' image"),
    ("davis-2017", {}, draw("*/Annotations/480p/clip-1/00003.png", shorter), r"00003.png: expected 96x80 pixels .*found 96x79"),
    ("davis-2017", {}, draw("*/*/480p/clip-1/00003.*", shorter), r"00003.png has .* \(79, 96\), but the first annotation .* \(80, 96\)"),
    ("davis-2017", {}, lose("*/JPEGImages/480p/clip-1/00003.jpg"), r"1 of the \d+ frames of clip-1 are missing .*00003.jpg"),
    ("davis-2017", {}, lose("*/JPEGImages/480p/clip-1/0000[2-9].jpg", True), "DAVIS-2017 clip-1: expected at least 3 frames in .*, found 2"),
    ("refcoco", {}, edit(INSTANCES, kind("annotations", segmentation=None)), "ref_id 1.*list of polygons or run lengths, found None"),
    ("refcoco", {}, edit(INSTANCES, kind("annotations", segmentation=[1, 2, 3, 4, 5, 6])), "ref_id 1.*a flat list of finite x, y"),
    ("refcoco", {}, edit(INSTANCES, kind("annotations", segmentation={"counts": [2**63 - 1, 2**63 - 1, 128 * 96 + 2]})), "sum to no number"),
    ("coco", {}, edit(VAL, kind("annotations", image_id=[1])), "val2017.json: expected whole numbers as ids"),
    ("coco", {}, edit(VAL, kind("images", file_name="x" * 5000)), "1 of the 3 images in .*val2017 are missing"),
    ("coco", {}, edit(VAL, kind("images", file_name=7)), "val2017.json: expected file names of the images as text"),
    ("pope", {}, swap(POPE, "{", "["), "random.json, line 1: expected a JSON object, but it cannot be read"),
    ("pope", {}, put(POPE, '["yes"]'), "random.json, line 1: expected a question with question_id, image, text and label, .*TypeError"),
    ("pope", {}, swap(POPE, '"yes"', '"maybe"'), "random.json, line 1: .*'label' must be yes or no, found 'maybe'"),
    ("pope", {}, swap(POPE, "COCO_val", "../COCO_val"), "'image' must be the name of a file"),
    ("pope", {}, swap(POPE, '"question_id": 1', '"question_id": null'), "'question_id' must be a number or text"),
    ("pope", {}, swap(POPE, '"question_id": 2', '"question_id": 1'), "random.json, line 2: question_id 1 is that of line 1"),
    ("pope", {}, put(POPE, "\n"), "the list random of POPE holds no question"),
    ("pope", {}, put(POPE, b"\xff\xfe\x00"), "random.json: expected a text file, but it cannot be read"),
    ("pope", {}, lose(POPE), "there is no .*random.json: .*one JSON object per line"),
    ("pope", {}, lose("val2014/*"), r"1 of the 4 images of COCO val2014 are missing \(first: .*jpg\); images= names another folder"),
    ("pope", {}, lose("val2014"), "there is no .*val2014 .nor .*coco/val2014.: .*images= names another folder"),
    ("pope", {"images": "nowhere"}, lose("nothing"), "there is no nowhere"),
    ("pope", {}, put("val2014/*", b"no picture"), "COCO_val2014_.*jpg"),
    ("mme", {}, swap(MME, "\tNo", " No"), "0000.txt, line 2: there is no question before the answer"),
    ("mme", {}, swap(MME, "\tNo", "\tPerhaps"), "answer in .*0000.txt, line 2 'perhaps'.* expected one of yes, no"),
    ("mme", {}, put(MME, "Is it?\tYes"), "0000.txt: expected two lines of a question, a tab, and Yes or No, found 1"),
    ("mme", {}, lose("*/existence/*.txt", True), r"existence holds no \*.txt"),
    ("mme", {}, lose("*/existence/*.txt"), "existence: 1 of the . files of questions in .* are missing .first: 0000.txt"),
    ("mme", {}, lose("*/existence"), "MME existence: no such folder .*which holds count, position.*name in split="),
    ("bdd-10k", {"part": "all", "domains": [("night", "tunnel")]}, lose("nothing"),
     r"no image \(all\) of night tunnel; .* 18 of daytime, highway; 18 of night, highway"),
    ("bdd-10k", {}, draw("*/labels/sem_seg/masks/*/*", rgb), "png: expected class numbers .*found a 'RGB' image"),
    ("bdd-10k", {}, draw("*/labels/sem_seg/masks/*/*", filled(70)), r"png: expected class numbers .*0..18 and 255 .void., found \[70\]"),
    ("bdd-10k", {}, draw("*/labels/sem_seg/masks/*/*", shorter), "png: expected 160x90 pixels .*found 160x89"),
    ("bdd-10k", {}, lose("*/labels/sem_seg/masks/*/*", True), r"(\d+) of the \1 masks are missing .*png"),
    ("bdd-10k", {}, lose("*/images/10k/val"), r"10k/val holds no \*.jpg"),
    ("bdd-10k", {}, put(LABELS, '{"name": 1}'), "det_train.json: expected a list, found a dict"),
    ("bdd-10k", {}, edit(LABELS, first(name=None)), "det_train.json, image 0: expected its 'name'"),
    ("bdd-10k", {}, edit(LABELS, first(attributes={"scene": "highway"})), r"image 0 \(.*jpg\): expected attributes with scene and timeofday"),
    ("bdd-10k", {}, lose("*/labels/det_20"), "scene and time of day are in none of"),
    ("blink", {"split": "test"}, lose("nothing"), "answers of the test split are hidden"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "damage", "message"), DAMAGE)
def test_damage_is_named(whole, tmp_path, name, options, damage, message):
    root = shutil.copytree(whole / FOLDERS.get(name, name), tmp_path / name)
    damage(root)
    with pytest.raises((DataError, ImageError), match=message):
        contents(open_dataset(name, root, **{**FEW.get(name, {}), **options}))


@pytest.mark.parametrize("name", NAMES)
def test_whole_sets_can_be_read_and_an_empty_folder_is_refused(whole, tmp_path, name):
    contents(open_dataset(name, whole / FOLDERS.get(name, name), **FEW.get(name, {})))
    with pytest.raises(DataError, match="(?s)there is no .*get it.*licence.*expected"):
        open_dataset(name, tmp_path)


OPTIONS = [
    ("pascal-5i", {"folds": (0, 4)}, "folds must be different ones of 0..3"),
    ("pascal-5i", {"folds": (1, 1)}, "folds must be different"),
    ("msrc", {"classes": ("kitten",)}, "classes must be different ones of .*cat"),
    ("msrc", {"classes": ("cat", "cat")}, "classes must be different"),
    ("msrc", {"unknown_colours": "ignore"}, "unknown_colours 'ignore'; expected one of error, void"),
    ("imagenet-s", {"variant": 100}, "variant of ImageNet-S 100 .*expected one of 50, 300, 919"),
    ("imagenet-s", {"classes": ("goldfish",)}, "50 classes has no class 'goldfish'"),
    ("imagenet-s", {"classes": ()}, "classes of imagenet-s must be .*Sequence.*, and not empty; found \\[]"),
    ("imagenet-s-train", {"per_class": 11}, "per_class=11, but .*im50_train.txt lists 10 images of n01000000"),
    ("refcoco", {"split": "test"}, r"split of RefCOCO \(unc\) 'test'.*expected one of train, val, testA, testB"),
    ("refcoco", {"split": []}, "split of refcoco must be str .*not empty"),
    ("refcoco", {"split_by": "umd"}, "split_by 'umd'; expected one of unc, google"),
    ("spair-71k", {"split": "train"}, "split of SPair-71k 'train'.*expected one of trn, val, test"),
    ("spair-71k", {"layout": "huge"}, "layout of SPair-71k 'huge'.*expected one of large, small"),
    ("spair-71k", {"categories": ["sofa"]}, "category of SPair-71k 'sofa'"),
    ("pope", {"split": "hard"}, "split of POPE 'hard'; expected one of random, popular, adversarial, all"),
    ("mme", {"split": ["count", "colour"]}, "split of MME 'colour' .did you mean 'color'.*expected one of .*color.*perception"),
    ("bdd-10k", {"split": "test"}, "split of BDD-10K with masks 'test'; expected one of train, val"),
    ("bdd-10k", {"part": "rest"}, "part 'rest'; expected one of scored, training, all"),
    ("bdd-10k", {"domains": [("noon", "highway")]}, "a domain is a time of day .*found .'noon', 'highway'."),
    ("bdd-10k", {"domains": []}, "not empty"),
    ("davis-2017", {"sequences": []}, "sequences of davis-2017 must be .*not empty"),
    ("davis-2017", {"resolution": 480}, "resolution of davis-2017 must be str, and not empty; found 480"),
    ("pascal-5i", {"folds": 0}, "folds of pascal-5i must be collections.abc.Sequence.int., and not empty; found 0"),
    ("spair-71k", {"progress": "no"}, "progress of spair-71k must be bool"),
    ("bdd-10k", {"domains": ["night", ("night", "highway")]}, "must not overlap"),
    ("davis-2017", {"max_frames": 2}, "max_frames must be a whole number of at least 3, not 2"),
    ("blink", {"split": "train"}, "split of BLINK 'train'; expected one of val"),
    ("blink", {"subtasks": ("Style",)}, "subtask of BLINK 'Style'.*expected one of Art_Style"),
    *((name, {option: 0}, f"{option} must be a whole number of at least 1, not 0") for name, option in (
        ("pascal-5i", "shot"), ("msrc", "images"), ("imagenet-s", "max_images"),
        ("imagenet-s-train", "per_class"), ("coco", "count"), ("refcoco", "max_images"), ("spair-71k", "per_category"),
        ("spair-71k", "max_pairs"), ("pope", "max_images"), ("mme", "max_images"),
        ("bdd-10k", "images"), ("blink", "max_items"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), OPTIONS)
def test_impossible_options_are_named(whole, name, options, message):
    with pytest.raises(ParameterError, match=message):
        open_dataset(name, whole / FOLDERS.get(name, name), **options)


def test_roots_and_names_that_do_not_exist(whole, tmp_path, monkeypatch):
    monkeypatch.delenv("KVUTILS_DATA", raising=False)
    for name, root, message in [
        ("pascal-5i", "hub", "no Parquet copy on the hub is known"),
        ("pascal-5i", None, "KVUTILS_DATA is not set"),
        ("msrc", tmp_path / "nowhere", "there is no .*nowhere"),
        ("pascal5i", None, "unknown data set 'pascal5i' .did you mean 'pascal-5i'"),
        ("pocket-msrc", tmp_path, "is generated, not read"),
    ]:
        with pytest.raises(DataError, match=message):
            open_dataset(name, root)
    for name, root, option in (("msrc", whole / "msrc", "image"), ("pocket-imagenet-s", None, "scene")):
        with pytest.raises(DataError, match=f"option of {name} '{option}'.*did you mean '{option}s'"):
            open_dataset(name, root, **{option: 3})
