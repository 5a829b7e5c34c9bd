"""Pocket data sets: exact, seeded, disjoint; the DAVIS loader; the registry."""

import os
from dataclasses import replace
from itertools import pairwise

import datasets
import numpy as np
import pytest
from PIL import Image

from kvutils import VOID
from kvutils.datasets import data_sources, open_dataset
from kvutils.datasets.davis import davis_clips
from kvutils.datasets.pocket import sets as pocket
from kvutils.datasets.pocket.world import PRESENT, Scene, Thing, render
from kvutils.datasets.samples import LabelledImage
from kvutils.errors import DataError, ImageError, ParameterError

SMALL = {
    "pocket-pascal-5i": {"per_fold": 2, "scenes": 30},
    "pocket-msrc": {"per_class": 1, "images": 2},
    "pocket-imagenet-s": {"scenes": 8},
    "pocket-imagenet-s-train": {"scenes": 8},
    "pocket-refcoco": {"scenes": 4},
    "pocket-spair-71k": {"pairs": 6},
    "pocket-davis-2017": {"count": 2, "frames": 4},
}


def pictures(sample) -> dict:
    """Every (image id, image) of a sample of any type."""
    if hasattr(sample, "supports"):
        return {one.id: one.image for one in (sample.query, *sample.supports)}
    if hasattr(sample, "images"):
        return {one.id: one.image for one in sample.images}
    if hasattr(sample, "frames"):
        return {f"{sample.id}/{i}": frame for i, frame in enumerate(sample.frames)}
    if hasattr(sample, "target"):
        return {sample.source_id: sample.source, sample.target_id: sample.target}
    return {getattr(sample, "image_id", sample.id): sample.image}


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_samples_other_seed_others(name):
    pocket.pocket_scene.cache_clear()
    first = open_dataset(name, **SMALL[name])
    pocket.pocket_scene.cache_clear()
    again = open_dataset(name, **SMALL[name])
    other = open_dataset(name, **SMALL[name], seed=30_000)
    assert [s.id for s in first] == [s.id for s in again] and len({s.id for s in first}) == len(first)
    bytes_of = [[image.tobytes() for image in pictures(s).values()] for s in first]
    assert bytes_of == [[image.tobytes() for image in pictures(s).values()] for s in again]
    assert bytes_of != [[image.tobytes() for image in pictures(s).values()] for s in other]


def test_sets_share_no_scene():
    names = [{name for s in open_dataset(set_name, **options) for name in pictures(s)} for set_name, options in SMALL.items()]
    assert sum(map(len, names)) == len(set().union(*names))


def test_scenes_are_not_those_of_training():
    from recipe.pool import make_pool

    pool = make_pool(4, 1, processes=1, quiet=True)
    seen = {image.tobytes() for image in pool.images}
    assert all(pocket.pocket_scene("named", i).drawn.image.tobytes() not in seen for i in range(4))


def test_episodes_follow_hsnet():
    episodes = open_dataset("pocket-pascal-5i", per_fold=4, scenes=30)
    assert [e.fold for e in episodes] == [k for k in range(4) for _ in range(4)]
    for episode in episodes:
        assert episode.class_index // pocket.CLASSES_PER_FOLD == episode.fold
        assert pocket.CLASS_NAMES[episode.class_index] == episode.class_name
        assert len(episode.supports) == 5 and episode.query.id not in {s.id for s in episode.supports}
        for one in (episode.query, *episode.supports):
            assert set(np.unique(one.mask)) == {0, 1} and one.mask.shape == one.image.size[::-1]


def test_a_class_mask_covers_all_its_things_and_voids_hardly_visible_ones():
    fish, corner, cup = (Thing(0, 0, 60, 60, 20, 0, False), Thing(0, 1, 1, 1, 16, 0, False), Thing(6, 2, 30, 75, 15, 0, True))
    scene = Scene((fish, corner, cup, replace(fish, x=80, y=20, radius=15)), 0, 0, seed=5)
    scene = pocket.PocketScene("by hand", scene, render(scene))
    assert scene.drawn.visible[1] < PRESENT and scene.present == [0, 2, 3] and scene.present_classes == [0, 6]
    owner = scene.drawn.mask
    assert (scene.class_mask(0) == np.select([np.isin(owner, (1, 4)), owner == 2], [1, VOID])).all()
    assert (scene.class_mask(0, ambiguous=1) == np.isin(owner, (1, 2, 4))).all()
    assert (scene.class_map() == np.select([np.isin(owner, (1, 4)), owner == 2, owner == 3], [1, VOID, 7])).all()


def test_groups_share_their_class_and_no_scene():
    groups = open_dataset("pocket-msrc", per_class=2, images=3)
    assert len(groups) == 16
    names = [image.id for group in groups for image in group.images]
    assert len(names) == len(set(names)) == 48
    assert all((image.mask == 1).any() for group in groups for image in group.images)


def test_named_masks_say_what_is_there():
    for sample in open_dataset("pocket-imagenet-s", scenes=10):
        assert sample.text == sample.class_name in pocket.CLASS_NAMES
        assert sample.group == sample.image_id and (sample.mask == 1).any()


def test_expressions_name_one_of_several():
    samples = open_dataset("pocket-refcoco", scenes=10)
    by_image: dict = {}
    for sample in samples:
        by_image.setdefault(sample.image_id, []).append(sample)
    assert len(by_image) <= 10 and any(len(s) > 1 for s in by_image.values())
    for mine in by_image.values():
        assert len({s.text for s in mine}) == len(mine)
        assert (np.sum([s.mask for s in mine], axis=0) <= 1).all()
    assert any(len(s.text.split()) == 3 for s in samples)


def test_pairs_correspond_and_a_larger_set_begins_with_the_smaller_one():
    small, pairs = (open_dataset("pocket-spair-71k", pairs=n) for n in (3, 10))
    assert [pair.id for pair in small] == [pair.id for pair in pairs][:3]
    for pair in pairs:
        assert len(pair.source_points) == len(pair.target_points) >= 2
        x0, y0, x1, y1 = pair.target_box
        assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
        assert (pair.target_points >= (x0 - 6, y0 - 6)).all() and (pair.target_points <= (x1 + 6, y1 + 6)).all()
    names = [name for pair in pairs for name in pictures(pair)]
    assert len(names) == len(set(names))


def test_clips_start_with_all_objects_and_move_smoothly():
    for clip in open_dataset("pocket-davis-2017", count=3, frames=6):
        objects = clip.masks[0].max()
        assert clip.masks.shape == (6, 96, 96) and set(np.unique(clip.masks[0])) == set(range(objects + 1))
        assert 2 <= objects <= 3
        for before, after in pairwise(clip.masks):
            assert (before != after).mean() < 0.2


@pytest.mark.parametrize(
    "call", [lambda: pocket.clips(frames=2), lambda: pocket.named_masks(0), lambda: pocket.few_shot_episodes(shot=0)]
)
def test_impossible_sizes(call):
    with pytest.raises(ParameterError):
        call()


# --- DAVIS --------------------------------------------------------------------------------------------------


@pytest.fixture
def davis(tmp_path):
    home = tmp_path / "DAVIS"
    for kind in ("JPEGImages", "Annotations"):
        (home / kind / "480p" / "cat").mkdir(parents=True)
    (home / "ImageSets" / "2017").mkdir(parents=True)
    (home / "ImageSets" / "2017" / "val.txt").write_text("cat\n")
    for i in range(3):
        mask = np.zeros((6, 9), np.uint8)
        mask[1:3, i : i + 3], mask[5, 8] = 2, VOID
        palette = Image.fromarray(mask)
        palette.putpalette(sum(([i, i, i] for i in range(256)), []))
        palette.save(home / "Annotations" / "480p" / "cat" / f"{i:05d}.png")
        Image.fromarray(np.full((6, 9, 3), 40 * i, np.uint8)).save(home / "JPEGImages" / "480p" / "cat" / f"{i:05d}.jpg")
    return home


def test_davis_layout(davis):
    for root in (davis, davis.parent):
        (clip,) = open_dataset("davis-2017", root=root)
        assert clip.id == "cat" and len(clip.frames) == 3 and clip.frames[0].size == (9, 6)
        assert set(np.unique(clip.masks)) == {0, 2, VOID} and clip.masks[1][1, 1] == 2
    (short,) = davis_clips(davis, max_frames=2)
    assert len(short.frames) == 2


def test_davis_frames_are_opened_when_they_are_asked_for(davis):
    frame = davis / "JPEGImages" / "480p" / "cat" / "00002.jpg"
    frame.write_bytes(frame.read_bytes()[:50])
    (clip,) = davis_clips(davis)
    assert len(clip.frames) == 3 and clip.frames[:2][1].size == (9, 6) and clip.frames[0] is not clip.frames[0]
    with pytest.raises(ImageError, match="00002.jpg"):
        _ = clip.frames[2]
    with pytest.raises(ParameterError, match="max_frames"):
        davis_clips(davis, max_frames=0)


@pytest.mark.skipif("KVUTILS_SAMPLES" not in os.environ, reason="KVUTILS_SAMPLES names no folder with sample clips")
def test_davis_sample_clips():
    clips = open_dataset("davis-2017", root=os.path.join(os.environ["KVUTILS_SAMPLES"], "davis2017"))
    assert [c.id for c in clips] == ["libby", "car-shadow"]
    assert all(len(c.frames) == len(c.masks) == 11 and c.masks.max() == 1 for c in clips)


# --- the registry -------------------------------------------------------------------------------------------


def test_the_data_folder_is_found(monkeypatch, davis):
    davis.parent.joinpath("davis-2017").symlink_to(davis)
    monkeypatch.setenv("KVUTILS_DATA", str(davis.parent))
    assert [clip.id for clip in open_dataset("davis-2017")] == ["cat"]


def test_opened_fields_are_values_or_functions():
    opened = []

    def image():
        opened.append(1)
        return "picture"

    lazy, plain = LabelledImage("a", image, np.zeros(2)), LabelledImage("a", "picture", np.zeros(2))
    assert not opened and lazy.image == plain.image == "picture" and lazy.image == "picture" and len(opened) == 2
    with pytest.raises(TypeError):
        LabelledImage("a")
    with pytest.raises(AttributeError):
        lazy.image = "other"


def test_where_data_were_read_from_is_told(monkeypatch, davis, tmp_path):
    assert data_sources(["pocket-msrc", "pocket-blink"]) == {}
    (tmp_path / "copy").mkdir()
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "copy" / "test-00000-of-00001.parquet")
    monkeypatch.setattr("kvutils.datasets.revision_of", lambda repository: "0123abc")
    options = {"davis-2017": {"root": davis}, "pope": {"root": "hub"}, "mme": {"root": tmp_path / "copy"}}
    assert data_sources(options, options) == {"data": {
        "davis-2017": "files in the official layout", "pope": "hub: lmms-lab/POPE at 0123abc",
        "mme": "copy of the hub's lmms-lab/MME"}}  # fmt: skip
    with pytest.raises(DataError, match="no Parquet copy on the hub"):
        data_sources(["msrc"], {"msrc": {"root": "hub"}})
