"""Pascal-5i, MSRC, ImageNet-S and COCO: official layouts and their traps, real records."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from kvutils import VOID
from kvutils.datasets import class_names, coco, imagenet_s, msrc, open_dataset, pascal5i
from kvutils.datasets.coco import POPE_IMAGES
from kvutils.datasets.coco_masks import segmentation_mask
from kvutils.datasets.files import read_labels
from kvutils.errors import DataError, ParameterError
from tests.mini_data import SAMPLES, needs_samples, save, write_rows

BOX = (slice(16, 64), slice(24, 80))  # rows, columns of the object in every picture below


def picture(path, size=(96, 72), colour=(200, 60, 40), seed=0):
    """Noise with a coloured box."""
    pixels = np.random.default_rng(seed).integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    pixels[BOX] = colour
    save(pixels, path)


def labels(value, void=VOID):
    """0 with a box of `value` and one row of void."""
    found = np.zeros((72, 96), np.int32)
    found[BOX] = value
    found[BOX[0].start - 1] = void
    return found


def values(mask):
    assert mask.dtype == np.uint8
    return set(np.unique(mask).tolist())


# --- label images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_turn_with_their_picture(tmp_path, orientation):
    pixels = np.arange(5 * 9, dtype=np.uint8).reshape(5, 9)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    save(pixels, tmp_path / "stored.png")
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    found = read_labels(tmp_path / "stored.png", tmp_path / "a.png", ("L",), "labels")
    np.testing.assert_array_equal(found, shown)
    if shown.shape != pixels.shape:  # annotated as it is shown
        save(shown, tmp_path / "shown.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "shown.png", tmp_path / "a.png", ("L",), "labels"), shown)
    save(pixels[:-1], tmp_path / "other.png")
    with pytest.raises(DataError, match=r"other.png: expected 9x5 pixels as its picture .*a.png, found 9x4"):
        read_labels(tmp_path / "other.png", tmp_path / "a.png", ("L",), "labels")


# --- Pascal-5i ----------------------------------------------------------------------------------------------

LISTS = {0: [2, 2, 2], 1: [7, 7], 2: [15, 15, 15], 3: [17, 17]}  # fold -> classes (from 1) of 2007_000001, 2007_000002, ...


@pytest.fixture
def pascal(tmp_path):
    """Two-class images: every one shows a class of fold 0 and one of another fold, with a void rim."""
    home = tmp_path / "VOC2012"
    for fold, members in LISTS.items():
        path = tmp_path / "splits" / "pascal" / "val" / f"fold{fold}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"2007_{i:06d}__{c:02d}" for i, c in enumerate(members, start=1)]
        path.write_text("\n".join(lines) + "\n")
    for i in range(1, 4):
        picture(home / "JPEGImages" / f"2007_{i:06d}.jpg", seed=i)
        shown = labels(2)
        shown[0, :40], shown[2, :40], shown[4, :40] = 7, 15, 17
        save(shown, home / "SegmentationClass" / f"2007_{i:06d}.png", palette=True)
    return tmp_path


def test_pascal_episodes_are_those_of_hsnet(pascal):
    episodes = open_dataset("pascal-5i", pascal, per_fold=5)
    assert len(episodes) == 20 and [e.id for e in episodes[:2]] == ["fold0-0000", "fold0-0001"]
    drawn = pascal5i.sample_episodes([(f"2007_{i:06d}", 14) for i in (1, 2, 3)], 5, 5, 0)
    of_fold = [e for e in episodes if e.fold == 2]
    assert [(e.query.id, tuple(s.id for s in e.supports), e.class_index) for e in of_fold] == drawn
    assert {e.class_name for e in of_fold} == {"person"} and len(of_fold[0].supports) == 5
    bicycle, person = episodes[0].query, of_fold[0].query
    assert bicycle.id == person.id and bicycle.image.size == (96, 72)  # one image, two masks
    assert values(bicycle.mask) == {0, 1, VOID} and (bicycle.mask[BOX] == 1).all()
    assert (person.mask == 1).sum() == 40 and (person.mask == VOID).sum() == 96
    assert [e.id for e in open_dataset("pascal-5i", pascal, per_fold=2, folds=(3, 1))] == [
        "fold3-0000", "fold3-0001", "fold1-0000", "fold1-0001"]  # fmt: skip
    (short, *_) = open_dataset("pascal-5i", pascal, per_fold=1, shot=1)
    assert short.supports[0].id == episodes[0].supports[0].id


def test_pascal_in_the_places_where_it_is_extracted(pascal):
    def described():
        return [(e.id, e.query.id, e.query.mask.tobytes()) for e in open_dataset("pascal-5i", pascal, per_fold=1)]

    first = described()
    (pascal / "VOCdevkit").mkdir()
    (pascal / "VOC2012").rename(pascal / "VOCdevkit" / "VOC2012")
    (pascal / "data").mkdir()
    (pascal / "splits").rename(pascal / "data" / "splits")
    home = pascal / "VOCdevkit" / "VOC2012"
    for path in sorted((home / "SegmentationClass").iterdir()):  # the same, single channel
        save(np.array(Image.open(path)), home / "SegmentationClassAug" / path.name)
    (home / "SegmentationClass" / "2007_000001.png").unlink()
    assert described() == first
    (home / "SegmentationClassAug" / "2007_000002.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 3 masks .* \(first: .*SegmentationClassAug/2007_000002.png\)"):
        described()


def test_pascal_at_the_size_of_hsnet(pascal):
    (episode, *_) = open_dataset("pascal-5i", pascal, per_fold=1)
    (small, *_) = open_dataset("pascal-5i", pascal, per_fold=1, image_size=40)
    assert small.query.image.size == (40, 40) and small.query.mask.shape == (40, 40)
    rows, columns = np.arange(40) * 72 // 40, np.arange(40) * 96 // 40  # torch's nearest rounds down
    np.testing.assert_array_equal(small.query.mask, episode.query.mask[np.ix_(rows, columns)])


@needs_samples
def test_the_published_pascal_lists(tmp_path):
    root = SAMPLES / "pascal-5i"
    with pytest.raises(DataError, match="344 of the 345 images"):
        open_dataset("pascal-5i", root, folds=(0,))
    home = tmp_path / "VOC2012"
    shutil.copytree(root / "splits", tmp_path / "splits")
    shutil.copytree(root / "VOC2012", home)
    names = {line.split("__")[0] for path in root.glob("splits/pascal/val/*") for line in path.read_text().split()}
    assert len(names) == 1381
    for name in names:
        for path in (home / "JPEGImages" / f"{name}.jpg", home / "SegmentationClassAug" / f"{name}.png"):
            path.touch()  # to be found, not to be read
    episodes = open_dataset("pascal-5i", tmp_path)
    assert len(episodes) == 4000 and len({e.id for e in episodes}) == 4000
    cases = [e for e in episodes if e.query.id == "2007_000129"]  # VOC's own picture and mask
    assert {e.class_name for e in cases} == {"bicycle", "person"}
    stored = np.array(Image.open(root / "VOC2012" / "SegmentationClassAug" / "2007_000129.png"))
    for case in cases:
        one = case.query
        assert one.mask.shape == one.image.size[::-1] == (500, 334) and values(one.mask) == {0, 1, VOID}
        np.testing.assert_array_equal(one.mask == 1, stored == case.class_index + 1)
        np.testing.assert_array_equal(one.mask == VOID, stored == 255)


# --- MSRC ---------------------------------------------------------------------------------------------------


def colours(name, size=(96, 72)):
    shown = np.zeros((size[1], size[0], 3), np.uint8)  # void
    shown[8:] = msrc.COLOURS["grass"]
    shown[BOX] = msrc.COLOURS[name]
    return shown


@pytest.fixture
def msrc_root(tmp_path):
    """Sets 5 (cows), 12 (birds) and 3 (buildings, each with a small cow)."""
    home = tmp_path / "MSRC_ObjCategImageDatabase_v2"
    for number, name in ((3, "building"), (5, "cow"), (12, "bird")):
        for i in (1, 2, 10):
            picture(home / "Images" / f"{number}_{i}_s.bmp", colour=msrc.COLOURS[name], seed=number + i)
            shown = colours(name)
            if number == 3:
                shown[-2:, -2:] = msrc.COLOURS["cow"]
            save(shown, home / "GroundTruth" / f"{number}_{i}_s_GT.bmp")
    return tmp_path


def test_msrc_groups_take_the_set_of_the_class(msrc_root, caplog):
    groups = open_dataset("msrc", msrc_root, classes=("cow", "bird"), images=3)
    assert "9 images, the published database 591" in caplog.text
    assert [g.id for g in groups] == [g.class_name for g in groups] == ["cow", "bird"]
    assert [one.id for one in groups[0].images] == ["5_1_s", "5_2_s", "5_10_s"]  # by number, not by letter
    one = groups[1].images[0]
    assert one.id == "12_1_s" and one.image.size == (96, 72) and values(one.mask) == {0, 1, VOID}
    np.testing.assert_array_equal(one.mask == 1, (colours("bird") == msrc.COLOURS["bird"]).all(-1))
    np.testing.assert_array_equal(one.mask == VOID, (colours("bird") == 0).all(-1))
    (two,) = open_dataset("msrc", msrc_root, classes=("cow",), images=2)
    assert [each.id for each in two.images] == ["5_1_s", "5_2_s"]
    (own,) = open_dataset("msrc", msrc_root, classes=("cow",), images=None)
    assert len(own.images) == 3


def test_every_colour_of_msrc_is_its_own(msrc_root):
    shown = np.zeros((72, 96, 3), np.uint8)
    for i, colour in enumerate(msrc.COLOURS.values()):
        shown[i] = colour
    for path in (msrc_root / "MSRC_ObjCategImageDatabase_v2" / "GroundTruth").iterdir():
        save(shown, path)
    groups = open_dataset("msrc", msrc_root, classes=tuple(msrc.COLOURS), images=1)
    for row, group in enumerate(groups):
        (one,) = group.images
        assert (np.flatnonzero((one.mask == 1).any(axis=1)) == row).all() and (one.mask == 1).sum() == 96
        assert (one.mask == VOID).sum() == (72 - 23) * 96


def test_an_unknown_msrc_colour_is_named(msrc_root):
    path = msrc_root / "MSRC_ObjCategImageDatabase_v2" / "GroundTruth" / "5_2_s_GT.bmp"
    for colour in ((0, 0, 127), (192, 192, 192), (64, 64, 64)):
        shown = colours("cow")
        shown[-1, :3] = colour
        save(shown, path)
        (group,) = open_dataset("msrc", msrc_root, classes=("cow",), images=3)
        with pytest.raises(DataError) as raised:
            _ = group.images[1].mask
        assert f"5_2_s_GT.bmp: the colour {colour} is no class of MSRC v2 (3 such pixels)" in str(raised.value)
        (left,) = open_dataset("msrc", msrc_root, classes=("cow",), images=3, unknown_colours="void")
        assert (left.images[1].mask[-1, :3] == VOID).all()
        assert (left.images[1].mask == 1).sum() == (group.images[0].mask == 1).sum()


@needs_samples
def test_the_sample_msrc_folder():
    root = SAMPLES / "msrc_synthetic"
    groups = open_dataset("msrc", root, classes=("cow", "car", "plane", "sheep"), images=1)
    assert [one.id for g in groups for one in g.images] == ["5_1_s", "7_1_s", "4_1_s", "9_1_s"]
    assert all(values(one.mask) == {0, 1, VOID} and one.mask.shape == (60, 80) for g in groups for one in g.images)


# --- ImageNet-S ---------------------------------------------------------------------------------------------

CATEGORIES = [f"n{i:08d}" for i in range(1, 51)]


def ids_to_rgb(found):
    return np.stack([found % 256, found // 256, np.zeros_like(found)], axis=-1)


@pytest.fixture
def imagenet(tmp_path):
    """Of the 752 validation images the first two of two classes exist, and one training image of every class."""
    data = tmp_path / "data"
    for folder in ("categories", "names"):
        (data / folder).mkdir(parents=True)
    (data / "categories" / "ImageNetS_categories_im50.txt").write_text("\n".join(reversed(CATEGORIES)))
    names = [f"{wnid}/ILSVRC2012_val_{i:02d}{n:06d}" for n, wnid in enumerate(CATEGORIES) for i in range(16)][:752]
    (data / "names" / "ImageNetS_im50_validation.txt").write_text("\n".join(f"{n}.JPEG {n}.png" for n in names))
    script = 'import torch\nclass A:\n    def __init__(self):\n        self.classes_50 = "{}"\n        boom\n'
    (data / "data.py").write_text(script.format(", ".join(f"thing {i}" for i in range(1, 51))))
    home = tmp_path / "ImageNetS50"
    for name in (names[0], names[1], names[16], names[17]):
        number = CATEGORIES.index(name.split("/")[0]) + 1
        picture(home / "validation" / f"{name}.JPEG", colour=(250, 250, 40 * number), seed=int(name[-6:]))
        shown = labels(number, void=imagenet_s.IGNORED)
        shown[-1] = 50  # another class
        save(ids_to_rgb(shown), home / "validation-segmentation" / f"{name}.png")
    lines = [f"{wnid}/{wnid}_{i}" for wnid in CATEGORIES for i in (9, 3)]
    (data / "names" / "ImageNetSemi_im50_train.txt").write_text("\n".join(f"{name}.JPEG" for name in lines))
    for number, name in enumerate(lines[::2], start=1):
        picture(home / "train-semi" / f"{name}.JPEG", colour=(250, 250, 5 * number), seed=100 + number)
        shown = ids_to_rgb(labels(number, void=imagenet_s.IGNORED))
        save(shown, home / "train-semi-segmentation" / f"{name}.png")
    return tmp_path


def test_imagenet_s_takes_the_class_of_the_folder(imagenet):
    samples = open_dataset("imagenet-s", imagenet, max_images=4, classes=("thing 1", CATEGORIES[1]))
    first, stem = samples[0], "ILSVRC2012_val_00000000"
    assert (first.id, first.image_id, first.group) == (f"{stem}-{CATEGORIES[0]}", stem, stem)
    assert first.text == first.class_name == "thing 1" and first.image.size == (96, 72)
    assert [s.class_name for s in samples] == ["thing 1", "thing 1", "thing 2", "thing 2"]
    mask = samples[-1].mask
    assert values(mask) == {0, 1, VOID} and (mask[BOX] == 1).all() and (mask == VOID).sum() == 96
    assert (mask[-1] == 0).all()
    spread = open_dataset("imagenet-s", imagenet, max_images=2, classes=("thing 1", "thing 2"))
    assert [s.id for s in spread] == [samples[0].id, samples[2].id]  # the classes take turns
    assert class_names("imagenet-s-train", imagenet, variant=50, per_class=1)[:2] == ("thing 1", "thing 2")
    with pytest.raises(DataError, match=r"748 of the 752 images of .*validation are missing \(first: .*JPEG\)"):
        open_dataset("imagenet-s", imagenet)


@pytest.mark.parametrize(
    ("number", "colour"), [(1, (1, 0, 0)), (255, (255, 0, 0)), (256, (0, 1, 0)), (919, (151, 3, 0))]
)
def test_class_ids_beyond_a_byte(tmp_path, number, colour):
    save(np.full((4, 4, 3), colour), tmp_path / "a.png")
    save(np.full((4, 4, 3), (232, 3, 0)), tmp_path / "b.png")  # 1000
    assert (imagenet_s._read_mask(tmp_path / "a.png", tmp_path / "b.png", 919, number) == 1).all()
    other = imagenet_s._read_mask(tmp_path / "a.png", tmp_path / "b.png", 919, number % 919 + 1)
    assert (other == 0).all()
    assert (imagenet_s._read_mask(tmp_path / "b.png", tmp_path / "a.png", 50) == VOID).all()


def test_imagenet_s_training_maps(imagenet):
    train = open_dataset("imagenet-s-train", imagenet)
    assert len(train) == 50 and train[0].id == f"{CATEGORIES[0]}_9"
    assert [values(one.mask) for one in (train[0], train[49])] == [{0, 1, VOID}, {0, 50, VOID}]
    scored = open_dataset("imagenet-s", imagenet, max_images=4, classes=("thing 1", "thing 2"))
    assert not {one.id for one in train} & {s.image_id for s in scored}
    with pytest.raises(DataError, match=r"50 of the 100 images of .*train-semi are missing"):
        open_dataset("imagenet-s-train", imagenet, per_class=2)
    with pytest.raises(ParameterError, match="per_class=3, but .*im50_train.txt lists 2 images of n00000001"):
        open_dataset("imagenet-s-train", imagenet, per_class=3)
    data = imagenet / "data"
    for variant in (300, 919):
        wnids = [f"n{i:08d}" for i in range(variant)]
        (data / "categories" / f"ImageNetS_categories_im{variant}.txt").write_text("\n".join(wnids))
        with pytest.raises(ParameterError, match=f"fewer than 255 classes .*not {variant}: variant=50"):
            open_dataset("imagenet-s-train", imagenet, variant=variant)


@pytest.mark.parametrize("form", ["val/by class", "val/flat", "flat"])
def test_imagenet_s_images_that_stay_in_imagenet(tmp_path, imagenet, form):
    """The mapping file says which class ImageNet has an image in, which may be another one."""
    listed = (imagenet / "data" / "names" / "ImageNetS_im50_validation.txt").read_text().split()[::2]
    (imagenet / "data" / "mapping").mkdir()
    mapping = "\n".join(f"n99999999/{name.split('/')[1]} {name}" for name in listed)
    (imagenet / "data" / "mapping" / "ImageNetS_im50_mapping_validation.txt").write_text(mapping)
    options = {"max_images": 4, "classes": ("thing 1", "thing 2")}
    first = [(s.id, s.mask.tobytes(), s.image.tobytes()) for s in open_dataset("imagenet-s", imagenet, **options)]
    place = tmp_path / "elsewhere" / {"val/by class": "val/n99999999", "val/flat": "val", "flat": "."}[form]
    place.mkdir(parents=True)
    for path in (imagenet / "ImageNetS50" / "validation").rglob("*.JPEG"):
        path.rename(place / path.name)
    with pytest.raises(DataError, match="4 of the 4 images of .*imagenet= may name"):
        open_dataset("imagenet-s", imagenet, **options)
    found = open_dataset("imagenet-s", imagenet, imagenet=tmp_path / "elsewhere", **options)
    assert [(s.id, s.mask.tobytes(), s.image.tobytes()) for s in found] == first
    (tmp_path / "elsewhere").rename(imagenet / "imagenet")
    assert len(open_dataset("imagenet-s", imagenet, **options)) == 4


@needs_samples
def test_the_official_imagenet_s_lists():
    root = SAMPLES / "imagenet-s"
    samples = open_dataset("imagenet-s", root, classes=("goldfish",), max_images=2)
    assert [s.id for s in samples] == [f"ILSVRC2012_val_{n}-n01443537" for n in ("00004677", "00021905")]
    assert all(values(s.mask) <= {0, 1, VOID} and s.mask.shape == s.image.size[::-1] for s in samples)
    assert (samples[0].mask == 1).any()
    names = class_names("imagenet-s-train", root)
    assert len(names) == 50 and names[:2] == ("goldfish", "tiger shark") and names[-1] == "agaric"
    assert len(class_names("imagenet-s-train", root, variant=919)) == 919
    with pytest.raises(DataError, match="750 of the 752 images"):
        open_dataset("imagenet-s", root)


# --- COCO ---------------------------------------------------------------------------------------------------

NUMBERS = (139, 285, 632, 724)


def coco_object(number, image, box, **other):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": [polygon], "iscrowd": 0} | other


@pytest.fixture
def coco_root(tmp_path):
    """Four images and one of POPE's: a box in each, in the first also a crowd around a second object."""
    numbers = (*NUMBERS, min(POPE_IMAGES))
    for number in numbers:
        picture(tmp_path / "val2017" / f"{number:012d}.jpg", seed=number % 1000)
    crowd = {"size": [72, 96], "counts": [0, 72 * 20, 72 * 76]}  # the first 20 columns
    content = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 72, "width": 96} for n in reversed(numbers)],
        "annotations": [
            coco_object(1, 139, (30, 20, 40, 30)),
            coco_object(2, 139, (0, 0, 10, 10)),
            coco_object(3, 139, (0, 0, 1, 1), segmentation=crowd, iscrowd=1),
            *(coco_object(n, n, (24, 16, 56, 48)) for n in NUMBERS[1:3]),
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_takes_the_lowest_numbers_that_pope_does_not_use(coco_root):
    images = open_dataset("coco", coco_root, count=4)
    assert [one.id for one in images] == [f"{n:012d}" for n in NUMBERS]
    assert [one.id for one in open_dataset("coco", coco_root, count=2)] == [one.id for one in images[:2]]
    mask = images[0].mask
    assert images[0].image.size == (96, 72) and values(mask) == {0, 1, VOID}
    assert (mask[:10, :10] == 1).all() and (mask[10:, :20] == VOID).all() and (mask[20:50, 30:70] == 1).all()
    assert (mask == 1).sum() == 100 + 1200 and (mask == VOID).sum() == 72 * 20 - 100
    assert values(images[3].mask) == {0} and values(images[1].mask) == {0, 1}
    with pytest.raises(DataError, match="1000 images are wanted, and .*json has 4 that POPE does not use"):
        open_dataset("coco", coco_root)


def test_coco_without_annotations(coco_root, caplog):
    (coco_root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match="there is no .*instances_val2017.json: .*annotated=False"):
        open_dataset("coco", coco_root, count=2)
    images = open_dataset("coco", coco_root, count=4, annotated=False)
    assert [one.id for one in images] == [f"{n:012d}" for n in NUMBERS] and "val2017 has 5000" in caplog.text
    assert values(images[0].mask) == {VOID} and images[0].mask.shape == (72, 96)


def coco_parquet(folder, numbers=(632, 139, min(POPE_IMAGES), 285), box=(24.2, 16.5, 79.6, 63.9), size=(96, 72)):
    """As detection-datasets/coco: rows in no order of their numbers, boxes as corners."""
    path = folder / "val-00000-of-00001-0123456789abcdef.parquet"
    write_rows(path, [
        {"image_id": number, "image": Image.new("RGB", size, (number % 256, 9, 9)), "width": 96, "height": 72,
         "objects": {"bbox_id": [number], "category": [0], "bbox": [list(box)], "area": [7]}} for number in numbers
    ])  # fmt: skip
    return path


def test_coco_from_a_parquet_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = coco_parquet(tmp_path / "copy" / "data")
    images = open_dataset("coco", tmp_path / "copy", count=3)
    assert [one.id for one in images] == ["000000000139", "000000000285", "000000000632"]
    assert images[0].image.getpixel((0, 0)) == (139, 9, 9)
    expected = np.zeros((72, 96), np.uint8)
    expected[16:64, 24:80] = 1
    np.testing.assert_array_equal(images[0].mask, expected)
    bare = open_dataset("coco", tmp_path / "copy", count=1, annotated=False)
    assert values(bare[0].mask) == {VOID} and bare[0].mask.shape == (72, 96)
    with pytest.raises(DataError, match="4 images are wanted, and .* has 3"):
        open_dataset("coco", tmp_path / "copy", count=4)
    rows = datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    monkeypatch.setattr(coco, "open_rows", lambda *args, **options: rows)  # what the hub streams
    streamed = open_dataset("coco", "hub", count=2)
    assert [one.id for one in streamed] == [one.id for one in images[:2]]
    np.testing.assert_array_equal(streamed[1].mask, images[1].mask)
    assert streamed[1].image.tobytes() == images[1].image.tobytes()
    with pytest.raises(DataError, match="9 images are wanted, and the hub has 3"):
        open_dataset("coco", "hub", count=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": (60, 50, 20, 10)}, "000000000139: expected boxes x_min, y_min, x_max, y_max"),
        ({"size": (96, 71)}, "000000000139 is 96x71, but its annotation 96x72"),
    ],
)
def test_coco_boxes_that_do_not_fit(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    coco_parquet(tmp_path / "copy", **change)
    (one,) = open_dataset("coco", tmp_path / "copy", count=1)
    with pytest.raises(DataError, match=message):
        _ = one.mask


@needs_samples
def test_a_real_coco_image_and_the_images_of_pope(tmp_path):
    (one,) = open_dataset("coco", SAMPLES / "coco", count=1)
    assert one.id == "000000039769" and one.image.size == (640, 480) and values(one.mask) == {0, 1}
    content = json.loads((SAMPLES / "coco" / "annotations" / "instances_val2017.json").read_text())
    objects = [segmentation_mask(each["segmentation"], 480, 640) for each in content["annotations"]]
    np.testing.assert_array_equal(one.mask, np.any(objects, axis=0))  # two cats, two remote controls, a bed
    (tmp_path / "val2017").symlink_to(SAMPLES / "coco" / "images_only")
    images = open_dataset("coco", tmp_path, count=5, annotated=False)
    assert [one.id for one in images] == sorted(one.id for one in images) and images[0].image.mode == "RGB"
    lists = (SAMPLES / "pope" / "output" / "coco").glob("coco_pope_*.json")
    named = {int(Path(json.loads(line)["image"]).stem.split("_")[-1]) for path in lists for line in path.open()}
    assert named == POPE_IMAGES
