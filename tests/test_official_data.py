"""The data sets of the paper profile in their official layouts: files written by `mini_data` read back, real records."""

import io
import json
import os
import pickle
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from kvutils import VOID
from kvutils.datasets import FOLDERS, bdd10k, class_names, imagenet_s, mme, msrc, open_dataset, pascal5i, pope
from kvutils.datasets.coco import POPE_IMAGES
from kvutils.datasets.coco_masks import segmentation_mask
from kvutils.datasets.labels import Picture, read_labels
from kvutils.datasets.refcoco import CATEGORIES, read_references
from kvutils.errors import DataError, ImageError, ParameterError
from tests.mini_data import FEW, IN_A_WORD, SAMPLES, as_shown, contents, needs_samples, noise, save, with_orientation, write


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of one data set, to be changed."""
    return lambda name: shutil.copytree(whole / name, tmp_path / "copies" / name)


def pixels(path):
    return np.array(Image.open(path))


def same_mask(mask, one, void):
    """Whether a mask is 1, VOID and 0 elsewhere."""
    return mask.dtype == np.uint8 and np.array_equal(mask, np.where(void, VOID, one))


def values(mask):
    return set(np.unique(mask).tolist())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_turn_with_their_picture(tmp_path, orientation):
    stored = np.arange(5 * 9, dtype=np.uint8).reshape(5, 9)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    save(stored, tmp_path / "stored.png")
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    picture = Picture(tmp_path / "a.png")
    found = read_labels(tmp_path / "stored.png", picture, ("L",), "labels")
    np.testing.assert_array_equal(found, shown)
    if shown.shape != stored.shape:  # annotated as it is shown
        save(shown, tmp_path / "shown.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "shown.png", picture, ("L",), "labels"), shown)
    save(stored[:-1], tmp_path / "other.png")
    with pytest.raises(DataError, match=r"other.png: expected 9x5 pixels as its picture .*a.png.*, found 9x4"):
        read_labels(tmp_path / "other.png", picture, ("L",), "labels")


def marks(points, size):
    """A picture of (width, height) for each point, 1 at its pixel."""
    pictures = np.zeros((len(points), size[1], size[0]), np.uint8)
    for picture, (x, y) in zip(pictures, points.astype(int), strict=True):
        picture[y, x] = 1
    return pictures


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("name", ["pascal-5i", "imagenet-s", "imagenet-s-train", "coco", "refcoco", "davis-2017", "bdd-10k", "spair-71k"])
def test_every_loader_turns_its_labels(whole, tmp_path, name, turned):
    folder = FOLDERS.get(name, name)
    root = shutil.copytree(whole / folder, tmp_path / folder)
    for path in [path for path in root.rglob("*") if path.suffix in (".jpg", ".JPEG")]:
        path.write_bytes(with_orientation(path.read_bytes(), turned))
    for plain, found in zip(*(open_dataset(name, place, **FEW.get(name, {})) for place in (whole / folder, root)), strict=True):
        if name == "spair-71k":
            for side in ("source", "target"):
                (old, points), (new, moved) = ((getattr(one, side), getattr(one, f"{side}_points")) for one in (plain, found))
                assert np.array_equal(new, as_shown(old, turned))
                for mark, expected in zip(marks(moved, new.size), marks(points, old.size), strict=True):
                    assert np.array_equal(mark, as_shown(expected, turned))
            (x0, y0, x1, y1), box = plain.target_box.astype(int), found.target_box.astype(int)
            inside = np.zeros(plain.target.size[::-1], np.uint8)
            inside[y0 : y1 + 1, x0 : x1 + 1] = 1
            rows, columns = np.nonzero(as_shown(inside, turned))
            assert box.tolist()[:2] == [columns.min(), rows.min()] and [box[2] - box[0], box[3] - box[1]] == [np.ptp(columns), np.ptp(rows)]
            continue
        old, new = ([*zip(one.frames, one.masks, strict=True)] if name == "davis-2017" else [(one.image, one.mask)]
                    for one in (getattr(plain, "query", plain), getattr(found, "query", found)))  # fmt: skip
        for (image, mask), (shown, moved) in zip(old, new, strict=True):
            assert np.array_equal(shown, as_shown(image, turned)) and np.array_equal(moved, as_shown(mask, turned))


@pytest.mark.parametrize("name", ["pascal-5i", "msrc", "imagenet-s", "imagenet-s-train", "coco", "refcoco", "davis-2017", "bdd-10k",
                                  "spair-71k", "pope", "mme"])  # fmt: skip
def test_what_desktops_leave_in_files_and_folders_is_nothing(whole, tmp_path, name):
    folder = FOLDERS.get(name, name)
    root = shutil.copytree(whole / folder, tmp_path / folder)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.suffix in (".txt", ".json"):
            lines = path.read_text().rstrip("\n").split("\n")
            path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", "  ", ""]).encode())
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        for companion in (".DS_Store", "Thumbs.db", "desktop.ini"):
            path.with_name(companion).write_bytes(b"\0")
    options = FEW.get(name, {})
    assert contents(open_dataset(name, root, **options)) == contents(open_dataset(name, whole / folder, **options))


MOVES = [  # data set, where its files are moved (below its folder), options that name folders below it
    ("pascal-5i", {"VOC2012": "VOCdevkit/VOC2012", "splits": "data/splits"}, {}),
    ("pascal-5i", {"VOC2012/*": ".", "splits": "hsnet/data/splits"}, {}),
    ("msrc", {"*/Images": "Images", "*/GroundTruth": "GroundTruth"}, {}),
    ("imagenet-s", {"data": "ImageNet-S/data"}, {}),
    ("coco", {"val2017": "images/val2017"}, {}),
    ("refcoco", {"images/mscoco/images/train2014": "../coco/train2014"}, {}),
    ("refcoco", {"images/mscoco/images/train2014": "train2014", "refcoco/*": "."}, {}),
    ("refcoco", {"images/mscoco/images/train2014": "elsewhere"}, {"images": "elsewhere"}),
    ("spair-71k", {"SPair-71k/*": "."}, {}),
    ("davis-2017", {"DAVIS/*": "."}, {}),
    ("pope", {"output/coco/*": "coco", "val2014": "../coco/val2014"}, {}),
    ("pope", {"output/coco/*": ".", "val2014": "coco/val2014"}, {}),
    ("pope", {"val2014": "elsewhere"}, {"images": "elsewhere"}),
    ("mme", {"MME_Benchmark_release_version/*": "."}, {}),
    ("mme", {"MME_Benchmark_release_version/*": "MME_Benchmark_release_version/MME_Benchmark"}, {}),
    ("bdd-10k", {"bdd100k/*": "."}, {}),
    ("bdd-10k", {"bdd100k/labels/det_20/det_val.json": "bdd100k/labels/bdd100k_labels_images_train.json",
                 "bdd100k/labels/det_20/det_train.json": "bdd100k/labels/bdd100k_labels_images_val.json"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "moves", "options"), MOVES)
def test_files_are_found_where_people_keep_them(whole, copy, name, moves, options):
    root = copy(name)
    for old, new in moves.items():
        for path in sorted(root.glob(old)):
            target = root / new / path.name if old.endswith("*") or new == "." else root / new
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    found = open_dataset(name, root, **FEW.get(name, {}), **{option: root / folder for option, folder in options.items()})
    assert contents(found) == contents(open_dataset(name, whole / name, **FEW.get(name, {})))


def test_pascal_episodes_are_those_of_hsnet(whole):
    root = whole / "pascal-5i"
    episodes = open_dataset("pascal-5i", root, per_fold=5)
    assert len(episodes) == 20 and [e.id for e in episodes[:2]] == ["fold0-0000", "fold0-0001"]
    for fold in range(4):
        entries = pascal5i.read_split(root / "splits" / "pascal" / "val" / f"fold{fold}.txt", fold)
        of_fold = [e for e in episodes if e.fold == fold]
        drawn = [(e.query.id, tuple(s.id for s in e.supports), e.class_index) for e in of_fold]
        assert drawn == pascal5i.sample_episodes(entries, 5, 5, 0)
        assert [e.class_name for e in of_fold] == [pascal5i.CLASS_NAMES[e.class_index] for e in of_fold]
    ones = [(one, e.class_index + 1) for e in episodes for one in (e.query, *e.supports)]
    for one, number in ones:
        stored = pixels(root / "VOC2012" / "SegmentationClass" / f"{one.id}.png")
        assert one.mask.shape == one.image.size[::-1] and same_mask(one.mask, stored == number, stored == 255)
    assert len({(one.id, number) for one, number in ones}) > len({one.id for one, _ in ones})  # one image, two masks
    assert [e.id for e in open_dataset("pascal-5i", root, per_fold=2, folds=(3, 1))] == [
        "fold3-0000", "fold3-0001", "fold1-0000", "fold1-0001"]  # fmt: skip
    (short, *_) = open_dataset("pascal-5i", root, per_fold=1, shot=1)
    assert [s.id for s in short.supports] == [episodes[0].supports[0].id]


def test_pascal_takes_the_folder_of_masks_that_is_whole(whole, copy):
    root, options, expected = copy("pascal-5i"), {"per_fold": 1}, open_dataset("pascal-5i", whole / "pascal-5i", per_fold=1)
    official = root / "VOC2012" / "SegmentationClass"
    shutil.copytree(official, official.with_name("SegmentationClassAug"))
    names = [e.query.id for e in expected]
    (official / f"{names[0]}.png").unlink()
    assert contents(open_dataset("pascal-5i", root, **options)) == contents(expected)
    (official.with_name("SegmentationClassAug") / f"{names[1]}.png").unlink()
    with pytest.raises(DataError, match=rf"1 of the \d+ masks .* \(first: .*SegmentationClassAug/{names[1]}.png\)"):
        open_dataset("pascal-5i", root, **options)


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
    noise(0, (1, 1)).save(dot := io.BytesIO(), "PNG")
    for name in names - {"2007_000129"}:
        for path in (home / "JPEGImages" / f"{name}.jpg", home / "SegmentationClassAug" / f"{name}.png"):
            path.write_bytes(dot.getvalue())  # for its size, not to be shown
    episodes = open_dataset("pascal-5i", tmp_path)
    assert len(episodes) == 4000 and len({e.id for e in episodes}) == 4000
    cases = [e for e in episodes if e.query.id == "2007_000129"]  # VOC's own picture and mask
    assert {e.class_name for e in cases} == {"bicycle", "person"}
    stored = pixels(root / "VOC2012" / "SegmentationClassAug" / "2007_000129.png")
    for case in cases:
        one = case.query
        assert one.mask.shape == one.image.size[::-1] == (500, 334) and values(one.mask) == {0, 1, VOID}
        assert same_mask(one.mask, stored == case.class_index + 1, stored == 255)


def test_msrc_groups_take_the_set_of_the_class(copy, caplog):
    root = copy("msrc")
    home = root / "MSRC_ObjCategImageDatabase_v2"
    for path in [*home.glob("*/2_2_s*"), *home.glob("*/2_3_s*")]:
        path.rename(path.with_name(path.name.replace("2_2", "2_10").replace("2_3", "2_4")))
    for path in home.glob("GroundTruth/2_*"):
        shown = pixels(path)
        shown[-60:] = msrc.COLOURS["bird"]  # other sets show birds too, but smaller
        save(shown, path)
    groups = open_dataset("msrc", root, images=3)
    assert "21 images, the published database 591" in caplog.text
    assert [g.id for g in groups] == [g.class_name for g in groups] == list(msrc.MSRC7)
    assert [one.id for one in groups[0].images] == ["2_1_s", "2_4_s", "2_10_s"]  # by number, not by letter
    assert all(len({one.id.split("_")[0] for one in g.images}) == 1 for g in groups)
    for one, name in ((one, group.class_name) for group in groups for one in group.images):
        stored = pixels(home / "GroundTruth" / f"{one.id}_GT.bmp")
        assert one.mask.shape == one.image.size[::-1]
        assert same_mask(one.mask, (stored == msrc.COLOURS[name]).all(-1), (stored == 0).all(-1))
    (two,), (own,) = (open_dataset("msrc", root, classes=("bird",), images=count) for count in (2, None))
    assert [each.id for each in two.images] == ["2_1_s", "2_4_s"] and len(own.images) == 3


def test_every_colour_of_msrc_is_its_own_and_an_unknown_one_is_named(copy):
    root = copy("msrc")
    (path,) = root.glob("*/GroundTruth/5_2_s_GT.bmp")
    stored = pixels(path)
    shown = stored.copy()
    shown[0, :3] = (64, 64, 64)  # where it was black
    save(shown, path)
    (group,), (left,) = (open_dataset("msrc", root, classes=("cow",), images=3, unknown_colours=u) for u in ("error", "void"))
    with pytest.raises(DataError, match=r"5_2_s_GT.bmp: the colour \(64, 64, 64\) is no class of MSRC v2 \(3 such pixels\)"):
        _ = group.images[1].mask
    assert same_mask(left.images[1].mask, (stored == msrc.COLOURS["cow"]).all(-1), (stored == 0).all(-1))
    for path in root.glob("*/GroundTruth/*"):
        shown = np.zeros_like(pixels(path))
        shown[: len(msrc.COLOURS)] = np.array(list(msrc.COLOURS.values()))[:, None]
        save(shown, path)
    groups = open_dataset("msrc", root, classes=tuple(msrc.COLOURS), images=1)
    for row, group in enumerate(groups):
        (one,) = group.images
        number = np.arange(one.mask.shape[0])[:, None].repeat(one.mask.shape[1], axis=1)
        assert same_mask(one.mask, number == row, number >= 23)


def class_ids(path):
    stored = pixels(path).astype(int)
    return stored[..., 0] + 256 * stored[..., 1]


def test_imagenet_s_takes_the_class_of_the_folder(whole):
    root = whole / "imagenet-s"
    samples = open_dataset("imagenet-s", root, max_images=16)
    wnids = (root / "data" / "categories" / "ImageNetS_categories_im50.txt").read_text().split()
    names, stems = class_names("imagenet-s-train", root), [f"ILSVRC2012_val_{100 * i:08d}" for i in range(16)]
    assert [s.class_name for s in samples] == [s.text for s in samples] == list(names[:16])  # the classes take turns
    assert [s.id for s in samples] == [f"{stem}-{wnid}" for stem, wnid in zip(stems, wnids, strict=False)]
    assert [s.image_id for s in samples] == [s.group for s in samples] == stems
    for number, one in enumerate(samples, start=1):
        ids = class_ids(root / "ImageNetS50" / "validation-segmentation" / wnids[number - 1] / f"{one.image_id}.png")
        assert one.mask.shape == one.image.size[::-1] and same_mask(one.mask, ids == number, ids == 1000)
    chosen = open_dataset("imagenet-s", root, max_images=2, classes=(wnids[4], names[1]))
    assert [s.id for s in chosen] == [samples[1].id, samples[4].id]
    with pytest.raises(DataError, match=f"1 of the 3 images .*first: .*{wnids[1]}/ILSVRC2012_val_00000101.JPEG"):
        open_dataset("imagenet-s", root, max_images=3, classes=(wnids[4], names[1]))


def test_class_ids_beyond_a_byte(tmp_path):
    path = tmp_path / "a.png"
    save(np.array([[(1, 0, 0), (255, 0, 0), (0, 1, 0), (151, 3, 0), (232, 3, 0)]]), path)
    for place, number in enumerate((1, 255, 256, 919)):
        assert imagenet_s._read_mask(path, Picture(path), 919, number).tolist() == [[*np.eye(4)[place], VOID]]


def test_imagenet_s_training_maps(copy):
    root = copy("imagenet-s")
    train, names = open_dataset("imagenet-s-train", root), root / "data" / "names" / "ImageNetSemi_im50_train.txt"
    firsts = [line.removesuffix(".JPEG") for line in names.read_text().split()[::10]]
    assert [one.id for one in train] == [name.split("/")[1] for name in firsts] and len(train) == 50
    for one, name in zip(train, firsts, strict=True):
        ids = class_ids(root / "ImageNetS50" / "train-semi-segmentation" / f"{name}.png")
        assert same_mask(one.mask, ids, ids == 1000)
    for variant in (300, 919):
        wnids = [f"n{i:08d}" for i in range(variant)]
        (root / "data" / "categories" / f"ImageNetS_categories_im{variant}.txt").write_text("\n".join(wnids))
        with pytest.raises(ParameterError, match=f"fewer than 255 classes .*not {variant}: variant=50"):
            open_dataset("imagenet-s-train", root, variant=variant)


@pytest.mark.parametrize("place", ["val/n99999999", "val", "."])
def test_imagenet_s_images_that_stay_in_imagenet(whole, copy, tmp_path, place):
    """The mapping file says which class ImageNet has an image in, which may be another one."""
    root, options = copy("imagenet-s"), FEW["imagenet-s"]
    listed = (root / "data" / "names" / "ImageNetS_im50_validation.txt").read_text().split()[::2]
    mapping = "\n".join(f"n99999999/{name.split('/')[1]} {name}" for name in listed)
    write(root / "data" / "mapping" / "ImageNetS_im50_mapping_validation.txt", mapping)
    (tmp_path / "elsewhere" / place).mkdir(parents=True)
    for path in (root / "ImageNetS50" / "validation").rglob("*.JPEG"):
        path.rename(tmp_path / "elsewhere" / place / path.name)
    expected = contents(open_dataset("imagenet-s", whole / "imagenet-s", **options))
    assert contents(open_dataset("imagenet-s", root, imagenet=tmp_path / "elsewhere", **options)) == expected
    (tmp_path / "elsewhere").rename(root / "imagenet")
    assert contents(open_dataset("imagenet-s", root, **options)) == expected


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


def test_coco_takes_the_lowest_numbers_that_pope_does_not_use(copy):
    root = copy("coco")
    path = root / "annotations" / "instances_val2017.json"
    content, numbers = json.loads(path.read_text()), [100, 417, 734, 2000]
    objects = {number: [one for one in content["annotations"] if one["image_id"] == min(number, 1051)] for number in numbers}
    for one in objects[2000]:
        one["image_id"] = 2000
    content["images"][3]["id"] = 2000
    content["images"] = [content["images"][0] | {"id": min(POPE_IMAGES)}, *reversed(content["images"])]
    path.write_text(json.dumps(content))
    images = open_dataset("coco", root, count=4)
    assert [one.id for one in images] == [f"{number:012d}" for number in numbers] and min(POPE_IMAGES) < 2000
    assert [one.id for one in open_dataset("coco", root, count=2)] == [one.id for one in images[:2]]
    for number, one in zip(numbers, images, strict=True):
        inside = np.zeros((2, *one.image.size[::-1]), bool)  # of objects, of crowds
        for each in objects[number]:
            inside[each["iscrowd"]] |= segmentation_mask(each["segmentation"], *inside.shape[1:])
        np.testing.assert_array_equal(one.mask, np.select([inside[0], inside[1]], [1, VOID], 0))
    assert set.union(*(values(one.mask) for one in images)) == {0, 1, VOID}


@needs_samples
def test_a_real_coco_image_and_the_images_of_pope():
    (one,) = open_dataset("coco", SAMPLES / "coco", count=1)
    assert one.id == "000000039769" and one.image.size == (640, 480) and values(one.mask) == {0, 1}
    content = json.loads((SAMPLES / "coco" / "annotations" / "instances_val2017.json").read_text())
    objects = [segmentation_mask(each["segmentation"], 480, 640) for each in content["annotations"]]
    np.testing.assert_array_equal(one.mask, np.any(objects, axis=0))  # two cats, two remote controls, a bed
    lists = (SAMPLES / "pope" / "output" / "coco").glob("coco_pope_*.json")
    named = {int(Path(json.loads(line)["image"]).stem.split("_")[-1]) for path in lists for line in path.open()}
    assert named == POPE_IMAGES


def test_refcoco_has_one_sample_per_sentence(copy):
    root = copy("refcoco")
    path = root / "refcoco" / "refs(unc).p"
    references, content = pickle.loads(path.read_bytes()), json.loads((root / "refcoco" / "instances.json").read_text())
    *rest, last = references
    path.write_bytes(pickle.dumps([*rest, last | {"split": "testA"}], 0))
    samples = open_dataset("refcoco", root)
    names = {one["id"]: one["name"] for one in content["categories"]}
    assert [(s.id, s.text, s.image_id, s.group, s.class_name) for s in samples] == [
        (f"{one['ref_id']}-{each['sent_id']}", each["sent"], *2 * [str(one["image_id"])], names[one["category_id"]])
        for one in rest for each in one["sentences"]
    ]  # fmt: skip
    there = {(str(one["image_id"]), names[one["category_id"]]) for one in content["annotations"]}  # of all things, those without a sentence too
    assert all(one.shown == {name for image, name in there if image == one.image_id} for one in samples)
    for number, one in enumerate(samples):
        mask = segmentation_mask(content["annotations"][number // 2]["segmentation"], *one.image.size[::-1])
        assert one.mask.dtype == np.uint8 and np.array_equal(one.mask, mask) and mask.any()
    both, by_google = open_dataset("refcoco", root, split=["testA", "val"]), open_dataset("refcoco", root, split_by="google")
    assert [s.id for s in both] == [s.id for s in by_google] and len(both) == len(samples) + 2
    assert [s.id for s in open_dataset("refcoco", root, max_images=1)] == [s.id for s in samples if s.image_id == "1"]


class Runs:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_hostile_or_truncated_pickle_is_an_error_and_runs_nothing(whole, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "refs(unc).p"
    calls = [Runs(os.system, f"touch {victim}"), Runs(eval, f"open({str(victim)!r}, 'w')"), Runs(open, str(victim), "w")]
    for protocol, call in product((0, 2, 4), calls):
        path.write_bytes(pickle.dumps([{"ref_id": 1}, call], protocol))
        with pytest.raises(DataError, match=r"refs\(unc\).p is not a list .*needs no class or function"):
            read_references(path)
        assert not victim.exists()
        pickle.loads(path.read_bytes())  # it would have
        assert victim.exists()
        victim.unlink()
    raw = (whole / "refcoco" / "refcoco" / path.name).read_bytes()
    for length in (0, 1, 10, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
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
    categories = json.loads((root / "refcoco" / "instances.json").read_text())["categories"]
    assert {one["id"]: one["name"] for one in categories}.items() <= CATEGORIES.items()


@pytest.mark.parametrize(("colon", "ending"), [(":", ""), ("_", ""), ("%3A", ".json")])
def test_spair_reads_the_list_in_its_order(copy, colon, ending):
    root = copy("spair-71k")
    home = root / "SPair-71k"
    names = (home / "Layout" / "large" / "test.txt").read_text().split()
    known = [json.loads((home / "PairAnnotation" / "test" / f"{name}.json").read_text()) for name in names]
    for path in [*(home / "PairAnnotation" / "test").iterdir()]:
        path.rename(path.with_name(path.name.replace(":", colon)))
    (home / "Layout" / "large" / "test.txt").write_text("".join(f"{name}{ending}\n" for name in names))
    pairs = open_dataset("spair-71k", root)
    assert [p.id for p in pairs] == names
    for one, about in zip(pairs, known, strict=True):
        assert one.category == about["category"] and [*one.source.size, 3] == about["src_imsize"]
        assert (f"{one.source_id}.jpg", f"{one.target_id}.jpg") == (about["src_imname"], about["trg_imname"])
        points = (one.source_points, one.target_points, one.target_box)
        assert [each.tolist() for each in points] == [about[key] for key in ("src_kps", "trg_kps", "trg_bndbox")]
    of_class = {p.category: [q.id for q in pairs if q.category == p.category] for p in pairs}
    assert [p.id for p in open_dataset("spair-71k", root, categories=["cat"])] == of_class["cat"]
    assert [p.id for p in open_dataset("spair-71k", root, layout="small", max_pairs=2)] == names[:2]
    one, two = ({p.id for p in open_dataset("spair-71k", root, per_category=count)} for count in (1, 2))
    assert one == {mine[0] for mine in of_class.values()}
    assert two == {mine[i * len(mine) // 2] for mine in of_class.values() for i in (0, 1)} and len(two) < len(names)


@needs_samples
def test_spair_and_davis_sample_records():
    pairs = open_dataset("spair-71k", SAMPLES / "SPair-71k")
    assert pairs[0].id == "000006-2008_002719-2008_007604:aeroplane" and len({p.category for p in pairs}) == 3
    assert pairs[0].target_points[0].tolist() == [62, 462] and pairs[0].target.size == (333, 500)
    for one in pairs:
        assert (one.source_points < one.source.size).all() and (one.target_points < one.target.size).all()
    clips = open_dataset("davis-2017", root=SAMPLES / "davis2017")
    assert [c.id for c in clips] == ["libby", "car-shadow"]
    assert all(len(c.frames) == len(c.masks) == 11 and c.masks.max() == 1 for c in clips)


def test_davis_layout_whose_frames_are_opened_when_they_are_asked_for(copy):
    root = copy("davis-2017")
    clips = open_dataset("davis-2017", root)
    assert [(clip.id, clip.frames[0].size) for clip in clips] == [("clip-0", (142, 80)), ("clip-1", (96, 80))]
    for clip in clips:
        stored = [pixels(path) for path in sorted((root / "DAVIS" / "Annotations" / "480p" / clip.id).iterdir())]
        assert len(clip.frames) == 5 and np.array_equal(clip.masks, stored) and {0, 1, VOID} <= values(clip.masks)
    (short,) = open_dataset("davis-2017", root, sequences=["clip-1"], max_frames=3)
    assert short.id == "clip-1" and len(short.frames) == len(short.masks) == 3
    frame = root / "DAVIS" / "JPEGImages" / "480p" / "clip-1" / "00002.jpg"
    frame.write_bytes(frame.read_bytes()[:-200])
    clip = open_dataset("davis-2017", root)[1]
    assert len(clip.frames) == 5 and clip.frames[:2][1].size == (96, 80)
    with pytest.raises(ImageError, match="00002.jpg"):
        _ = clip.frames[2]


def test_pope_reads_the_lists_in_their_order(copy, caplog):
    root = copy("pope")
    lists = {split: root / "output" / "coco" / f"coco_pope_{split}.json" for split in pope.SPLITS}
    known = [(split, json.loads(line)) for split, path in lists.items() for line in path.read_text().splitlines()]
    samples = open_dataset("pope", root)
    assert [(s.subset, s.id, s.question, s.truth, f"{s.image_id}.jpg") for s in samples] == [
        (split, f"{split}-{line['question_id']}", line["text"], line["label"], line["image"]) for split, line in known
    ]
    assert len(samples) == 72 and np.array_equal(samples[0].image, pixels(root / "val2014" / known[0][1]["image"]))
    few = open_dataset("pope", root, split="popular", max_images=1, prompts="lmms-eval")
    first = [s for s in samples if s.subset == "popular" and s.image_id == samples[0].image_id]
    assert [(s.id, s.question) for s in few] == [(s.id, f"{s.question}{IN_A_WORD}") for s in first] and not caplog.text
    line = known[0][1] | {"text": "Is there a car in the imange?"}
    lists["random"].write_text(json.dumps(line) + "\r\n")  # an older list
    (old,) = open_dataset("pope", root, split="random")
    assert (old.id, old.question) == ("random-1", "Is there a car in the image?")
    assert "1 of 1 answers are yes" in caplog.text and "2,910" in caplog.text


@needs_samples
def test_the_published_pope_lists(tmp_path):
    root = SAMPLES / "pope"
    lines = (root / "output/coco/coco_pope_random.json").read_text(encoding="utf-8").splitlines()
    names = {json.loads(line)["image"] for line in lines}
    for name in names:
        (tmp_path / name).write_bytes(b"")
    samples = open_dataset("pope", root, images=tmp_path)
    assert len(samples) == 9000 and len(names) == 500
    balance = Counter((s.subset, s.image_id, s.truth) for s in samples)
    assert set(balance.values()) == {3} and len(balance) == 3 * 500 * 2
    positives = [{(s.image_id, s.question) for s in samples if (s.subset, s.truth) == (each, "yes")} for each in pope.SPLITS]
    assert positives[0] == positives[1] == positives[2]


def test_mme_reads_both_forms_and_every_subtask(whole):
    root = whole / "mme"
    samples, home = open_dataset("mme", root), root / "MME_Benchmark_release_version"
    assert [s.subset for s in samples] == [name for name in mme.SUBTASKS for _ in range(6)]
    assert [s.truth for s in samples] == ["yes", "no"] * 42 and all(s.question.endswith("yes or no.") for s in samples)
    assert [s.image_id for s in samples[:6]] == ["existence/0000"] * 2 + ["existence/0001"] * 2 + ["existence/0002"] * 2
    for sample in samples:
        subtask, stem = sample.image_id.split("/")
        (path,) = [path for path in (home / subtask).rglob(f"{stem}.*") if path.suffix != ".txt"]
        assert np.array_equal(sample.image, pixels(path))
    assert len(open_dataset("mme", root, split="perception", max_images=1)) == 20
    assert {s.subset for s in open_dataset("mme", root, split="cognition")} == set(mme.COGNITION)
    chosen = open_dataset("mme", root, split=("color", "hallucination"), prompts="lmms-eval")
    assert list(dict.fromkeys(s.subset for s in chosen)) == ["color", "existence", "count", "position"]
    assert chosen[0].question == next(s for s in samples if s.id == chosen[0].id).question.replace(" Please answer yes or no.", IN_A_WORD)


def set_attributes(root, attributes):
    """Write the detection labels of the images, a file for each, in the split of the 100K set, which may be another."""
    shutil.rmtree(root / "bdd100k" / "labels" / "det_20")
    box = {"id": "0", "category": "car", "attributes": {"occluded": False}, "box2d": {"x1": 1}}
    for name, (time, scene) in attributes.items():
        entry = {"name": name, "attributes": {"timeofday": time, "scene": scene}, "frames": [{"objects": [box]}]}
        write(root / "bdd100k" / "labels" / "100k" / "train" / f"{name}.json", entry)


def test_bdd_domains_come_from_the_detection_labels(copy, caplog):
    root = copy("bdd-10k")
    a, b, c, d, e, *others = sorted(path.stem for path in root.glob("bdd100k/images/10k/*/*"))
    known = {a: ("night", "highway"), b: ("daytime", "highway"), c: ("night", "city street"), e: ("dawn/dusk", "residential")}
    set_attributes(root, known | dict.fromkeys(others, ("dawn/dusk", "tunnel")))
    found = open_dataset("bdd-10k", root, part="all", domains=bdd10k.DOMAINS)
    assert {one.id: one.domain for one in found} == {a: "night highway", b: "day highway"}
    assert [one.id for one in open_dataset("bdd-10k", root, part="all")] == [a], "what the paper scores"
    assert "1 of 40 images have no attributes" in caplog.text
    any_scene = open_dataset("bdd-10k", root, part="all", domains=[("night", ""), ("dawn/dusk", "residential")], balance=False)
    assert {one.id: one.domain for one in any_scene} == {a: "night", c: "night", e: "dusk residential"}


def test_bdd_masks_are_numbers_plus_one_and_keep_void(copy):
    root = copy("bdd-10k")
    names = {path.stem: path for path in root.glob("bdd100k/labels/sem_seg/masks/*/*.png")}
    for path in names.values():
        stored = pixels(path)
        stored[:, :3] = 255
        save(stored, path)
    for one in open_dataset("bdd-10k", root, part="all"):
        stored = pixels(names[one.id]).astype(int)
        assert one.image.size == (160, 90) and {1, 11, VOID} <= values(one.mask)
        assert same_mask(one.mask, stored + 1, stored == 255)
    assert class_names("bdd-10k-train")[:2] == ("road", "sidewalk") and len(class_names("bdd-10k-train")) == 19


def test_bdd_parts_share_no_recording_and_are_balanced(copy):
    root = copy("bdd-10k")
    names = sorted(path.stem for path in root.glob("bdd100k/images/10k/*/*"))
    set_attributes(root, {name: ("night" if i // 2 % 3 else "daytime", "highway") for i, name in enumerate(names)})
    both_of = {"domains": bdd10k.DOMAINS}
    scored, training = open_dataset("bdd-10k", root, **both_of), open_dataset("bdd-10k-train", root)
    recordings = [{one.id.partition("-")[0] for one in part} for part in (scored, training)]
    assert not recordings[0] & recordings[1] and min(map(len, recordings)) > 4
    both = [[one.domain for one in part] for part in (scored, training)]
    assert both[0].count("day highway") <= both[0].count("night highway") and {*both[0]} == {*both[1]}
    assert len(open_dataset("bdd-10k", root, balance=False, **both_of)) + len(training) == len(names)
    assert [one.id for one in scored] == sorted(one.id for one in scored)
    few, again = (open_dataset("bdd-10k-train", root, images=4) for _ in range(2))
    assert {one.id for one in few} < {one.id for one in training} and [one.id for one in few] == [one.id for one in again]
    assert [one.domain for one in few].count("day highway") == 2


@needs_samples
def test_bdd_sample_layout(caplog):
    domains = [("night", "highway"), ("daytime", "city street")]
    found = open_dataset("bdd-10k", SAMPLES / "bdd100k", domains=domains, part="all")
    assert [one.id for one in found] == ["7d06fefd-f7be05a6", "7d128593-0ccfea4c"]
    assert [one.domain for one in found] == ["night highway", "day city street"]
    assert [np.unique(one.mask).tolist() for one in found] == [[3], [9]] and "4 of 6 images have no attributes" in caplog.text
    toolkit = SAMPLES / "bdd100k_toolkit" / "sem_seg_mask_13classes.png"
    labels = bdd10k.read_mask(toolkit, Picture(toolkit))
    assert labels.shape == (720, 1280) and (labels == pixels(toolkit) + 1).all()
    void = SAMPLES / "bdd100k_toolkit" / "semseg_mask_1280x720.png"
    assert np.unique(bdd10k.read_mask(void, Picture(void))).tolist() == [14, VOID]
