"""A folder of one's own pictures: what tasks read of it, what `kvutils probe` makes of it, and what is said of one that does not fit."""

import json
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import kvutils as kv
from kvutils.datasets.pocket.sets import pocket_scene
from kvutils.errors import DataError, KVUtilsError
from kvutils.readout.maps import picture
from kvutils.run.cli import main
from kvutils.tasks.base import Task
from tests.mini_models import save_tiny

COUNT = 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Scenes with one large thing, their class maps, and the key points that are seen, one of a common name."""
    root, lines = tmp_path_factory.mktemp("own") / "pictures", ["image,name,x,y"]
    (root / "masks").mkdir(parents=True)
    for i in range(COUNT):
        scene = pocket_scene("pairs", i, kind="portrait")
        scene.image.save(root / f"p{i}.png")
        Image.fromarray(scene.class_map()).save(root / "masks" / f"p{i}.png")
        seen = scene.drawn.keypoints[0][scene.drawn.keypoint_seen[0]]
        lines += [f"p{i}{'.png' * (i % 2)},{'first' if k == 0 else f'{scene.scene.things[0].cls} {k}'},{x},{y}" for k, (x, y) in enumerate(seen)]
    (root / "points.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    (root / "notes.txt").write_text("left alone")
    return root


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "pictures")


def test_what_the_tasks_read_of_a_folder(whole):
    pictures, episodes, training, named, pairs = (kv.open_dataset("folder", whole, samples=kind)
                                                  for kind in ("pictures", "episodes", "training", "named", "pairs"))  # fmt: skip
    masks = [pocket_scene("pairs", i, kind="portrait").class_map() for i in range(COUNT)]
    assert [one.id for one in pictures] == [f"p{i}" for i in range(COUNT)] and all(set(one.classes) == set(mask.flat) - {0, kv.VOID}
                                                                                   for one, mask in zip(pictures, masks, strict=True))
    wanted = [(i, number) for i, mask in enumerate(masks) for number in sorted(set(mask.flat) - {0, kv.VOID})
              if any((other == number).any() for j, other in enumerate(masks) if j != i)]  # fmt: skip
    assert [one.id for one in episodes] == [f"p{i}, class {number}" for i, number in wanted]
    for (i, number), one in zip(wanted, episodes, strict=True):
        assert np.array_equal(one.query.mask, np.where(masks[i] == kv.VOID, kv.VOID, masks[i] == number))
        assert one.query.id not in {support.id for support in one.supports} and all((support.mask == 1).any() for support in one.supports)
    assert len(training) == COUNT // 2 and not {one.id for one in training} & {one.image_id for one in named}
    for pair in pairs:
        source, target = (pictures[int(name[1:])] for name in (pair.source_id, pair.target_id))
        names = sorted(source.points.keys() & target.points.keys())
        assert source is not target and "first" in names and pair.source_points.tolist() == [list(source.points[name]) for name in names]
        assert np.array_equal(pair.target_box, Image.fromarray(~np.isin(target.mask, (0, kv.VOID))).getbbox())
    assert len({pair.category for pair in pairs}) == COUNT // 2 and len(pairs) == COUNT  # two pictures a group, each way


def test_black_and_white_masks_and_turned_pictures(folder):
    for i in range(COUNT):
        with Image.open(folder / "masks" / f"p{i}.png") as mask:
            Image.fromarray(np.array(mask) % kv.VOID > 0).save(folder / "masks" / f"p{i}.png")  # mode "1"
    plain = [(one.classes, one.mask, one.box) for one in kv.open_dataset("folder", folder)]  # masks are files, opened when asked for
    for i in range(COUNT):
        with Image.open(folder / "masks" / f"p{i}.png") as mask:
            mask.convert("L").save(folder / "masks" / f"p{i}.png")  # 0 and 255
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(folder / "p0.png") as image:
        image.crop((0, 0, 96, 60)).save(folder / "p0.jpg", exif=turned)
    with Image.open(folder / "masks" / "p0.png") as mask:
        mask.crop((0, 0, 96, 60)).save(folder / "masks" / "p0.png")
    (folder / "p0.png").unlink()
    (folder / "points.csv").write_text("image,name,x,y\np0.jpg,a,59,95\n")
    white = kv.open_dataset("folder", folder)
    assert white[0].image.size == (60, 96) and white[0].mask.shape == (96, 60)
    for (classes, mask, box), one in zip(plain[1:], white[1:], strict=True):
        assert classes == one.classes == (1,) and np.array_equal(mask, one.mask) and np.array_equal(box, one.box)


def small(path, **change):
    with Image.open(path) as image:
        image.resize((40, 40)).convert(change.get("mode", "L")).save(path)


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: shutil.rmtree(f), "pictures: expected a folder of pictures, found nothing"),
    (lambda f: [p.unlink() for p in f.glob("*.png")], "holds no picture .*; name the folder in which the pictures themselves are"),
    (lambda f: (f / "p3.png").write_bytes(b"Dear reader"), "p3.png: .*cannot be read"),
    (lambda f: (f / "p3.png").write_bytes((f / "p3.png").read_bytes()[:2000]), "p3.png: .*cannot be read"),
    (lambda f: shutil.copy(f / "p3.png", f / "p3.bmp"), "p3.png: .*p3.bmp has the same name; rename"),
    (lambda f: small(f / "masks" / "p3.png"), r"p3.png: expected 96x96 pixels as its picture .*, found 40x40"),
    (lambda f: small(f / "masks" / "p3.png", mode="RGB"), "p3.png: expected class numbers in one channel .*, found a 'RGB' image"),
    (lambda f: (f / "masks" / "p3.png").rename(f / "masks" / "q3.png"), "q3.png: .* has no picture q3; name the mask as its picture"),
    (lambda f: (f / "points.csv").write_text("image,name,x,y\np1,a,3,4\np2,a,97,4"), "line 3: expected x,y in the 96x96 pixels of p2, found 97,4"),
    (lambda f: (f / "points.csv").write_text("image,name,x,y\np1,a,3,here"), "line 2: expected x,y .* found 3,here"),
    (lambda f: (f / "points.csv").write_text("image;name;x;y\np1;a;3;4"), "line 2: expected image,name,x,y .*separated by commas"),
    (lambda f: (f / "points.csv").write_text("image,name,x,y\np1.jpg,a,3,4"), "line 2: there is no picture 'p1.jpg'; .* p0.png"),
    (lambda f: (f / "points.csv").write_text("image,name,x,y\np1,a,3,4\np1,a,4,4"), "line 3: p1 has a point 'a' already"),
])  # fmt: skip
def test_what_does_not_fit_is_named_before_a_model_is_loaded(folder, tmp_path, change, words, capsys, monkeypatch):
    change(folder)
    with pytest.raises(KVUtilsError, match=words):
        kv.open_dataset("folder", folder)
    monkeypatch.setattr("kvutils.run.probe.load_mlm", None)
    assert main(["probe", str(folder), "--out", str(tmp_path / "out")]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_what_a_folder_lacks_is_said(folder):
    for options, words in (({}, "root= is the folder of your pictures"), ({"root": folder, "samples": "triples"}, "unknown samples .*'triples'")):
        with pytest.raises(KVUtilsError, match=words):
            kv.open_dataset("folder", **options)
    shutil.rmtree(folder / "masks")
    (folder / "points.csv").unlink()
    for kind, words in (("episodes", "masks that show one class, found 0"), ("named", "found 0"), ("pairs", "one name, found 0 with points")):
        with pytest.raises(DataError, match=words):
            kv.open_dataset("folder", folder, samples=kind)


@pytest.mark.parametrize("family", ["pocket", "llava_onevision", "llava_next", "qwen2_5_vl"])
def test_probe_measures_what_the_folder_allows(family, folder, tmp_path, capsys, monkeypatch):
    model, out = "pocket" if family == "pocket" else str(save_tiny(family, tmp_path / "tiny")), folder / "out"  # within what is read
    monkeypatch.setattr("kvutils.run.probe.SHOWN", 1)
    few = 11 if family in ("pocket", "llava_next") else 2
    monkeypatch.setattr("kvutils.run.probe.SAY_FEW", few)
    arguments = ["probe", str(folder), "--model", model, "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    shown, found = capsys.readouterr().out, json.loads((out / "probe.json").read_text())
    assert f"{COUNT} pictures, {COUNT} with a mask" in shown and found["failed"] == found["not_asked"] == {}
    for task in ("foreground_segmentation", "semantic_segmentation_probe", "semantic_correspondence"):
        summary = found["tasks"][task]
        line = next(line for line in shown.splitlines() if line.startswith(summary["title"]))
        best = summary.get("value_best", {}).get("score")
        last = "units are too few to choose a layer"
        if best:
            last = (f"[{best['low']:.3f}, {best['high']:.3f}], layer" if few == 2
                    else f"{best['mean']:.3f} (too few pictures for an interval: {summary['groups']} units), layer")
        assert f"{summary['sources']['pixels']['mean']:.3f}" in line and last in line
        ends = [each[end] for each in summary["sources"].values() for end in ("low", "high")]
        assert set(ends) == {None} if few == 11 else min(ends) >= 0 and max(ends) <= 1
    assert "first projection" in shown
    assert {path.name for path in out.glob("*.png")} == {"scores.png", "picture-p0.png"}
    monkeypatch.setattr(Task, "prepare", Mock(side_effect=AssertionError))
    before = (out / "probe.json").read_bytes()
    assert main(arguments) == 0 and (out / "probe.json").read_bytes() == before  # from the stored parts
    for place in (folder, folder / "masks"):
        assert main([*arguments[:4], "--out", str(place)]) == 2 and "name another one" in capsys.readouterr().err
    other = shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("out"))
    assert main(["probe", str(other), *arguments[2:]]) == 2 and "holds the results of" in capsys.readouterr().err
    assert (out / "probe.json").read_bytes() == before


def test_every_class_is_fitted_and_scored_however_pictures_are_named(tmp_path):
    """Cats and dogs by turns: every other picture would fit on the cats and score on the dogs."""
    (tmp_path / "masks").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        Image.fromarray(np.full((8, 8), 1 + i % 2, np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    training, named = (kv.open_dataset("folder", tmp_path, samples=kind) for kind in ("training", "named"))
    assert {int(one.mask[0, 0]) for one in training} == {1, 2} and sorted(one.class_name for one in named) == ["class 1"] * 2 + ["class 2"] * 2


def test_a_mask_with_soft_edges_is_no_mask_of_classes(folder):
    Image.fromarray(np.arange(96 * 96, dtype=np.uint8).reshape(96, 96)).save(folder / "masks" / "p1.png")
    with pytest.raises(DataError, match="p1.png: expected class numbers, found 256 values, as the soft edges .* make; save it as PNG"):
        kv.open_dataset("folder", folder)


def test_probe_of_pictures_alone_draws_them(folder, tmp_path, capsys):
    shutil.rmtree(folder / "masks")
    (folder / "points.csv").write_text("image;name;x;y\np1;a;3;4\n")
    assert main(["probe", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "image,name,x,y, separated by commas, found 'image;name;x;y'" in capsys.readouterr().err
    (folder / "points.csv").unlink()
    assert main(["probe", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "No scores:" in (shown := capsys.readouterr().out) and "masks/NAME.png" in shown and "points.csv" in shown
    assert "Semantic correspondence needs two pictures with points of one name, found 0" in shown and "samples=" not in shown
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_probe_shows_what_is_like_a_point_on_the_first_thing(folder, tmp_path, monkeypatch):
    corners = np.zeros((96, 96), np.uint8)
    corners[:24, :24], corners[72:, 72:], corners[8:16, 8:16] = 1, 2, 0  # two things, the first with a hole in its middle
    Image.fromarray(corners).save(folder / "masks" / "p0.png")
    shown = {}
    monkeypatch.setattr("kvutils.run.probe.SHOWN", 1)
    monkeypatch.setattr("kvutils.run.probe.picture", lambda *given: shown.update(point=given[3]) or picture(*given))
    assert main(["probe", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    x, y = (int(each) for each in shown["point"])
    assert corners[y, x] == 1 and max(x, y) < 18


def test_white_with_soft_edges_is_no_mask_of_classes(folder):
    """Its few greys would be classes, and the thing itself void."""
    large = np.zeros((384, 384), np.uint8)
    large[82:251, 101:303] = 255
    Image.fromarray(large).resize((96, 96), Image.Resampling.BOX).save(folder / "masks" / "p1.png")
    with pytest.raises(DataError, match="p1.png: expected class numbers, found . values, as the soft edges"):
        kv.open_dataset("folder", folder)


def test_masks_in_a_format_of_pictures_are_refused(folder):
    """A class number would come back as several, on the edges of what it marks."""
    with Image.open(folder / "masks" / "p1.png") as mask:
        mask.convert("L").save(folder / "masks" / "p1.jpg", quality=95)
    with pytest.raises(DataError, match="p1.png: .*p1.jpg has the same name; remove|p1.jpg: .*p1.png has the same name; remove"):
        kv.open_dataset("folder", folder)
    (folder / "masks" / "p1.png").unlink()
    with pytest.raises(DataError, match="p1.jpg: JPEG changes class numbers; save masks as PNG"):
        kv.open_dataset("folder", folder)
    with Image.open(folder / "masks" / "p1.jpg") as mask:
        mask.save(folder / "masks" / "p1.gif")
    (folder / "masks" / "p1.jpg").unlink()
    with pytest.raises(DataError, match="p1.gif: GIF changes class numbers"):
        kv.open_dataset("folder", folder)


def test_white_is_white_in_one_bit_and_in_eight(folder):
    for i in range(COUNT):
        with Image.open(folder / "masks" / f"p{i}.png") as mask:
            Image.fromarray((np.array(mask) % kv.VOID > 0) * np.uint8(255)).convert("1" if i % 2 else "L").save(folder / "masks" / f"p{i}.png")
    found = kv.open_dataset("folder", folder)
    assert all(one.classes == (1,) and set(np.unique(one.mask)) == {0, 1} for one in found)


def test_a_mask_that_may_be_turned_or_not_is_refused(folder):
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    with Image.open(folder / "p0.png") as image:
        image.save(folder / "p0.png", exif=upside_down)
    with pytest.raises(DataError, match="p0.png: EXIF turns its picture, which keeps its size, .* save the picture upright"):
        kv.open_dataset("folder", folder)


def test_every_picture_with_points_is_in_a_pair(folder):
    for count in (2, 3, 5):
        (folder / "points.csv").write_text("image,name,x,y\n" + "".join(f"p{i},eye,{i},4\n" for i in range(count)))
        pairs = kv.open_dataset("folder", folder, samples="pairs")
        assert {each for pair in pairs for each in (pair.source_id, pair.target_id)} == {f"p{i}" for i in range(count)}
    (folder / "points.csv").write_text("image,name,x,y\np0,eye,1,4\np1,nose,1,4\np2,nose,3,4\n")
    assert len(kv.open_dataset("folder", folder, samples="pairs")) == 2


def test_names_that_are_no_utf8_are_named(folder):
    shutil.copy(folder / "p0.png", os.fsencode(folder) + b"/caf\xe9.png")
    with pytest.raises(DataError, match=r"caf.udce9.png': its name is no UTF-8, which results are written in; rename it"):
        kv.open_dataset("folder", folder)


def test_scores_are_kept_though_a_picture_cannot_be_drawn(folder, tmp_path, capsys):
    Image.new("RGB", (2, 900)).save(folder / "a.png")  # too thin for Qwen2.5-VL
    code = main(["probe", str(folder), "--model", "pocket-qwen", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "a is not drawn: " in said and "too thin" in said and (tmp_path / "out" / "probe.json").is_file() and code in (0, 1)
