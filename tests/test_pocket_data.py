"""Pocket data sets: exact, seeded, disjoint; the twins of POPE and MME ask what is true and what the models know."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
from recipe.packing import TOKEN, encode
from recipe.pool import make_pool

from kvutils import VOID
from kvutils.datasets import mme, open_dataset, pope
from kvutils.datasets.pocket import sets as pocket
from kvutils.datasets.pocket import yes_no as pocket_questions
from kvutils.datasets.pocket.questions import ask, facts_of
from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.datasets.pocket.world import PRESENT, Scene, Thing, render
from kvutils.datasets.samples import LabelledImage
from kvutils.errors import ParameterError
from tests.mini_data import contents

SMALL = {
    "pocket-pascal-5i": {"per_fold": 2, "scenes": 30},
    "pocket-msrc": {"per_class": 1, "images": 2},
    "pocket-imagenet-s": {"scenes": 8},
    "pocket-imagenet-s-train": {"scenes": 8},
    "pocket-refcoco": {"scenes": 4},
    "pocket-spair-71k": {"pairs": 6},
    "pocket-davis-2017": {"count": 2, "frames": 4},
    "pocket-pope": {"scenes": 8},
    "pocket-mme": {"images": 3},
}


def pictures(samples) -> set[bytes]:
    """Every image of samples of any type."""
    found = []
    for sample in samples:
        parts = (sample.query, *sample.supports) if hasattr(sample, "supports") else getattr(sample, "images", [sample])
        for one in parts:
            found += [getattr(one, name) for name in ("image", "source", "target") if hasattr(one, name)]
            found += getattr(one, "frames", [])
    return {image.tobytes() for image in found}


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_samples_other_seed_others(name):
    pocket.pocket_scene.cache_clear()
    first = open_dataset(name, **SMALL[name])
    pocket.pocket_scene.cache_clear()
    assert contents(first) == contents(open_dataset(name, **SMALL[name])) and len({s.id for s in first}) == len(first)
    assert not pictures(first) & pictures(open_dataset(name, **SMALL[name], seed=30_000))


def test_sets_share_no_scene_with_each_other_or_with_training():
    found = [pictures(open_dataset(name, **options)) for name, options in SMALL.items()]
    assert sum(map(len, found)) == len(set().union(*found))
    seen = {image.tobytes() for image in make_pool(4, 1, processes=1, quiet=True).images}
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


def test_groups_share_no_scene_and_masks_show_the_class_that_is_named():
    groups = open_dataset("pocket-msrc", per_class=2, images=3)
    images = [image for group in groups for image in group.images]
    assert len(groups) == 16 and len(images) == len({image.id for image in images}) == 48
    assert all((image.mask == 1).any() for image in images)
    for sample in open_dataset("pocket-imagenet-s", scenes=10):
        assert sample.text == sample.class_name in pocket.CLASS_NAMES
        assert sample.group == sample.image_id and (sample.mask == 1).any()


def test_expressions_name_one_of_several():
    samples, by_image = open_dataset("pocket-refcoco", scenes=10), defaultdict(list)
    for sample in samples:
        by_image[sample.image_id].append(sample)
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
    assert len(pictures(pairs)) == 20


def test_clips_start_with_all_objects_and_move_smoothly():
    for clip in open_dataset("pocket-davis-2017", count=3, frames=6):
        objects = clip.masks[0].max()
        assert clip.masks.shape == (6, 96, 96) and set(np.unique(clip.masks[0])) == set(range(objects + 1))
        assert 2 <= objects <= 3
        for before, after in pairwise(clip.masks):
            assert (before != after).mean() < 0.2


@pytest.mark.parametrize(("name", "options", "message"), [
    ("pocket-davis-2017", {"frames": 2}, "frames"),
    ("pocket-imagenet-s", {"scenes": 0}, "at least 1"),
    ("pocket-pascal-5i", {"shot": 0}, "at least 1"),
    ("pocket-pope", {"scenes": 0}, "at least 1"),
    ("pocket-pope", {"scenes": None}, "scenes of pocket-pope must be int"),
    ("pocket-blink", {"subtasks": []}, "subtasks of pocket-blink must be .*not empty"),
    ("pocket-questions", {"kinds": {}}, "kinds of pocket-questions must be .*not empty"),
    ("pocket-mme", {"images": 0}, "at least 1"),
    ("pocket-pope", {"scenes": 1, "split": "hard"}, "split of POPE 'hard'"),
    ("pocket-mme", {"images": 1, "split": "perception"}, "split of MME 'perception'.*one of .*same_color, hallucination, all"),
])  # fmt: skip
def test_impossible_sizes_and_splits(name, options, message):
    with pytest.raises(ParameterError, match=message):
        open_dataset(name, **options)


def test_opened_fields_are_values_or_functions():
    opened = Mock(return_value="picture")
    lazy, plain = (LabelledImage("a", image, np.zeros(2)) for image in (opened, "picture"))
    assert not opened.called and lazy.image == plain.image == lazy.image == "picture" and opened.call_count == 2
    with pytest.raises(TypeError):
        LabelledImage("a")
    with pytest.raises(AttributeError):
        lazy.image = "other"


@pytest.fixture(scope="module")
def pocket_pope():
    return open_dataset("pocket-pope", scenes=60)


@pytest.fixture(scope="module")
def pocket_mme():
    return open_dataset("pocket-mme", images=8)


def facts_by_image(samples) -> dict:
    """Scene description of each image id, drawn again from its name."""
    found = {}
    for name in {s.image_id for s in samples}:
        stream, seed, index = name.split("-")
        scene = pocket.pocket_scene(stream, int(index), int(seed))
        found[name] = facts_of(scene.scene, scene.drawn)
    return found


def test_pocket_pope_is_balanced_in_every_scene_and_split_and_tells_the_truth(pocket_pope):
    counts = defaultdict(Counter)
    for sample in pocket_pope:
        counts[sample.subset, sample.image_id][sample.truth] += 1
    assert len(counts) == 3 * 60 and {c["yes"] - c["no"] for c in counts.values()} == {0}
    assert {c["yes"] for c in counts.values()} == {1, 2, 3}
    assert [s.truth for s in pocket_pope] == ["yes", "no"] * (len(pocket_pope) // 2)
    asked = [[(s.image_id, s.question) for s in pocket_pope if s.subset == split] for split in pope.SPLITS]
    assert asked[0][::2] == asked[1][::2] == asked[2][::2]
    assert all(len(set(each)) == len(each) for each in asked)
    facts = facts_by_image(pocket_pope)
    for sample in pocket_pope:
        cls = CLASSES.index(sample.question.split()[3])
        shares = [thing[4] for thing in facts[sample.image_id].things if thing[0] == cls]
        assert max(shares, default=0) >= PRESENT if sample.truth == "yes" else max(shares, default=0) <= 0.02


def test_pocket_pope_chooses_negatives_as_pope_does(pocket_pope):
    facts = facts_by_image(pocket_pope)
    present = {name: {thing[0] for thing in f.present} for name, f in facts.items()}
    often = Counter(cls for classes in present.values() for cls in classes)
    together = Counter((a, b) for classes in present.values() for a in classes for b in classes if a != b)
    asked = defaultdict(list)
    for sample in pocket_pope:
        asked[sample.subset, sample.image_id].append(CLASSES.index(sample.question.split()[3]))
    differ = 0
    for name, classes in present.items():
        popular, adversarial = asked["popular", name][1::2], asked["adversarial", name][1::2]
        absent = sorted(set(range(8)) - classes, key=lambda cls: -often[cls])
        assert [often[cls] for cls in popular] == [often[cls] for cls in absent[: len(popular)]]
        for step, (positive, negative) in enumerate(zip(asked["adversarial", name][::2], adversarial, strict=True)):
            free = set(absent) - set(adversarial[:step])
            assert together[positive, negative] == max(together[positive, cls] for cls in free)
        differ += set(popular) != set(adversarial) and set(asked["random", name][1::2]) != set(popular)
    assert differ > 10
    mean = {split: np.mean([often[cls] for name in present for cls in asked[split, name][1::2]]) for split in pope.SPLITS}
    assert mean["popular"] > mean["adversarial"] > mean["random"]


def test_hardly_visible_things_are_not_asked_about():
    scene = Scene((Thing(0, 0, 60, 60, 20, 0, False), Thing(6, 2, 1, 1, 16, 0, False)), 0, 0, seed=5)  # a fish, a cup in the corner
    facts, random = facts_of(scene, render(scene)), np.random.default_rng(0)
    assert 0.02 < facts.things[1][4] < PRESENT
    assert pocket_questions._count(facts, random) is None  # who knows how many cups there are
    asked = {pocket_questions._existence(facts, random) for _ in range(200)}
    assert {yes for yes, _ in asked} == {"is there a fish ?"} and len(asked) == 6 and "cup" not in str(asked)


def test_pocket_mme_has_a_true_and_a_false_question_per_image(pocket_mme):
    assert list(dict.fromkeys(s.subset for s in pocket_mme)) == list(pocket_questions.MME_FORMS)
    pairs = defaultdict(dict)
    for sample in pocket_mme:
        pairs[sample.subset, sample.image_id][sample.truth] = sample.question
    assert Counter(subset for subset, _ in pairs) == dict.fromkeys(pocket_questions.MME_FORMS, 8)
    for (subset, _), pair in pairs.items():
        yes, no = pair["yes"].split(), pair["no"].split()
        if subset in ("position", "count"):  # the same question with the two classes exchanged
            assert sorted(yes) == sorted(no)
        if subset in ("existence", "color"):  # one word is another
            assert sum(a != b for a, b in zip(yes, no, strict=True)) == 1
        assert yes != no


def test_pocket_questions_are_those_that_the_models_learned(pocket_pope, pocket_mme):
    """Each with its answer is among the questions that are asked of the scene in training."""
    random = np.random.default_rng(0)
    samples = [*pocket_pope[:8], *pocket_mme]
    facts, forms = facts_by_image(samples), {**pocket_questions.MME_FORMS, **dict.fromkeys(pope.SPLITS, "existence")}
    asked = {(s.image_id, forms[s.subset]) for s in samples}
    known = {(name, form): {ask(facts[name], form, random) for _ in range(600)} for name, form in sorted(asked, key=str)}
    for sample in samples:
        assert (sample.question, sample.truth) in known[sample.image_id, forms[sample.subset]]
        assert TOKEN["<unk>"] not in encode(sample.question)


def test_larger_pocket_sets_begin_with_the_smaller_ones_and_take_parts(pocket_pope, pocket_mme):
    few = open_dataset("pocket-mme", images=3)
    assert {s.id for s in few} < {s.id for s in pocket_mme}
    fewer = open_dataset("pocket-pope", scenes=20, split="random")  # the other splits follow the set's frequencies
    assert [(s.id, s.question) for s in fewer] == [(s.id, s.question) for s in pocket_pope][: len(fewer)]
    one = open_dataset("pocket-pope", scenes=30, per_scene=1, split="popular")
    assert len(one) == 60 and {s.subset for s in one} == {"popular"}
    assert {s.subset for s in open_dataset("pocket-mme", images=1, split="hallucination")} == set(mme.HALLUCINATION)
