"""POPE and MME: the official files and their pocket twins."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from kvutils.datasets import mme, open_dataset, pope
from kvutils.datasets.pocket import sets as pocket
from kvutils.datasets.pocket import yes_no as pocket_questions
from kvutils.datasets.pocket.questions import WORDS, ask, facts_of
from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.datasets.pocket.world import PRESENT, Scene, Thing, render
from kvutils.errors import DataError, ParameterError
from tests.mini_data import SAMPLES, needs_samples


def picture(path, colour=(9, 90, 200), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# --- POPE --------------------------------------------------------------------------------------------------

LINES = [("a.jpg", "dog", "yes"), ("a.jpg", "cat", "no"), ("b.jpg", "cup", "no"), ("b.jpg", "tie", "yes")]


def pope_line(number, image="a.jpg", thing="dog", label="yes", **other):
    line = {"question_id": number, "image": image, "text": f"Is there a {thing} in the image?", "label": label}
    return json.dumps(line | other)


@pytest.fixture
def pope_root(tmp_path):
    folder = tmp_path / "pope" / "output" / "coco"
    folder.mkdir(parents=True)
    for split in pope.SPLITS:
        lines = [pope_line(i, *line) for i, line in enumerate(LINES, start=1)]
        (folder / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n")
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "pope" / "val2014" / name)
    return tmp_path / "pope"


def test_pope_reads_the_lists_in_their_order(pope_root):
    (first, *_), samples = open_dataset("pope", pope_root, split="popular"), open_dataset("pope", pope_root)
    assert first.question == "Is there a dog in the image?" and first.truth == "yes" and first.id == "popular-1"
    assert first.image_id == "a" and first.subset == "popular" and first.image.size == (8, 6)
    assert [s.subset for s in samples] == [name for name in pope.SPLITS for _ in LINES]
    assert [s.truth for s in samples[:4]] == ["yes", "no", "no", "yes"] and len({s.id for s in samples}) == 12
    assert [s.image_id for s in open_dataset("pope", pope_root, split="random", max_images=1)] == ["a", "a"]
    (short, *_) = open_dataset("pope", pope_root, suffix="\nIn one word.")
    assert short.question == first.question + "\nIn one word."


@pytest.mark.parametrize("where", ["output/coco", "coco", "."])
def test_pope_lists_and_images_where_people_keep_them(tmp_path, pope_root, where):
    home = tmp_path / "elsewhere" / "lists"
    (home / where).mkdir(parents=True)
    for path in (pope_root / "output" / "coco").iterdir():
        (home / where / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="there is no .*val2014.*images="):
        open_dataset("pope", home)
    assert len(open_dataset("pope", home, images=pope_root / "val2014")) == 12
    (tmp_path / "elsewhere" / "coco").mkdir()
    (pope_root / "val2014").rename(tmp_path / "elsewhere" / "coco" / "val2014")
    assert len(open_dataset("pope", home, split="random")) == 4


def test_an_older_list_of_pope_is_told(pope_root, caplog):
    (pope_root / "output" / "coco" / "coco_pope_random.json").write_text(pope_line(1) + "\r\n")
    assert len(open_dataset("pope", pope_root, split="random")) == 1
    assert "1 of 1 answers are yes" in caplog.text and "2,910" in caplog.text


@needs_samples
def test_the_published_pope_lists(tmp_path):
    root = SAMPLES / "pope"
    names = {
        json.loads(line)["image"] for line in (root / "output/coco/coco_pope_random.json").open(encoding="utf-8")
    }
    for name in names:
        (tmp_path / name).write_bytes(b"")
    samples = open_dataset("pope", root, images=tmp_path)
    assert len(samples) == 9000 and len(names) == 500
    balance = Counter((s.subset, s.image_id, s.truth) for s in samples)
    assert set(balance.values()) == {3} and len(balance) == 3 * 500 * 2
    positives = [{(s.image_id, s.question) for s in samples if (s.subset, s.truth) == (split, "yes")}
                 for split in pope.SPLITS]  # fmt: skip
    assert positives[0] == positives[1] == positives[2]


# --- MME ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mme_root(tmp_path):
    """The release with two images per subtask: some subtasks in the one form, some in the other."""
    home = tmp_path / "MME_Benchmark_release_version"
    for number, subtask in enumerate(mme.SUBTASKS):
        texts, pictures = home / subtask, home / subtask
        if number % 2:
            texts, pictures = home / subtask / "questions_answers_YN", home / subtask / "images"
        for name in ("0", "1"):
            picture(pictures / f"{name}{'.png' if number % 3 else '.JPG'}", (number, 0, int(name)))
            texts.mkdir(exist_ok=True)
            lines = [f"Is it {subtask}? Please answer yes or no.\tYes", "Is it not? Please answer yes or no.\tNo "]
            (texts / f"{name}.txt").write_bytes("\r\n".join(lines).encode())
    return home


def test_mme_reads_both_forms_and_every_subtask(mme_root):
    for root in (mme_root, mme_root.parent):
        samples = open_dataset("mme", root)
        assert [s.subset for s in samples] == [name for name in mme.SUBTASKS for _ in range(4)]
        assert [s.truth for s in samples] == ["yes", "no"] * 28
        assert samples[0].question == "Is it existence? Please answer yes or no."
        assert [s.image_id for s in samples[:4]] == ["existence/0"] * 2 + ["existence/1"] * 2
        assert samples[6].image.getpixel((0, 0)) == (1, 0, 1)
    assert len(open_dataset("mme", mme_root, split="perception", max_images=1)) == 20
    assert {s.subset for s in open_dataset("mme", mme_root, split="cognition")} == set(mme.COGNITION)
    chosen = open_dataset("mme", mme_root, split=("color", "hallucination"), suffix="!")
    assert list(dict.fromkeys(s.subset for s in chosen)) == ["color", "existence", "count", "position"]
    assert chosen[0].question.endswith("no.!")


@needs_samples
def test_the_sample_mme_folders():
    root = SAMPLES / "mme_synthetic"
    samples = open_dataset("mme", root, split=("existence", "color", "artwork", "landmark"))
    assert Counter(s.truth for s in samples) == {"yes": 8, "no": 8}
    assert {s.image.size for s in samples} == {(40, 32)} and len({s.image_id for s in samples}) == 8
    with pytest.raises(DataError, match="MME count, position.*which holds existence, color, landmark, artwork"):
        open_dataset("mme", root)


# --- the pocket twins --------------------------------------------------------------------------------------


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


def test_pocket_pope_is_balanced_in_every_scene_and_split(pocket_pope):
    counts = defaultdict(Counter)
    for sample in pocket_pope:
        counts[sample.subset, sample.image_id][sample.truth] += 1
    assert len(counts) == 3 * 60 and {c["yes"] - c["no"] for c in counts.values()} == {0}
    assert {c["yes"] for c in counts.values()} == {1, 2, 3}
    assert [s.truth for s in pocket_pope] == ["yes", "no"] * (len(pocket_pope) // 2)
    by_split = {split: [s for s in pocket_pope if s.subset == split] for split in pope.SPLITS}
    positives = [[(s.image_id, s.question) for s in by_split[split][::2]] for split in pope.SPLITS]
    assert positives[0] == positives[1] == positives[2]
    for samples in by_split.values():
        assert len({(s.image_id, s.question) for s in samples}) == len(samples)


def test_pocket_pope_tells_the_truth(pocket_pope):
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
        for step, (positive, negative) in enumerate(
            zip(asked["adversarial", name][::2], adversarial, strict=True)
        ):
            free = set(absent) - set(adversarial[:step])
            assert together[positive, negative] == max(together[positive, cls] for cls in free)
        differ += set(popular) != set(adversarial) and set(asked["random", name][1::2]) != set(popular)
    assert differ > 10
    mean = {s: np.mean([often[c] for (split, _), a in asked.items() if split == s for c in a[1::2]])
            for s in pope.SPLITS}  # fmt: skip
    assert mean["popular"] > mean["adversarial"] > mean["random"]


def test_hardly_visible_things_are_not_asked_about():
    fish, corner = Thing(0, 0, 60, 60, 20, 0, False), Thing(6, 2, 1, 1, 16, 0, False)
    scene = Scene((fish, corner), 0, 0, seed=5)
    facts = facts_of(scene, render(scene))
    assert 0.02 < facts.things[1][4] < PRESENT
    assert pocket_questions._absent(facts) == [1, 2, 3, 4, 5, 7]
    random = np.random.default_rng(0)
    assert pocket_questions._count(facts, random) is None  # who knows how many cups there are
    asked = {pocket_questions._existence(facts, random) for _ in range(200)}
    assert {yes for yes, _ in asked} == {"is there a fish ?"} and len(asked) == 6
    assert not any("cup" in question for pair in asked for question in pair)


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
        assert set(sample.question.split()) <= set(WORDS)


def test_pocket_twins_are_seeded_and_share_no_scene():
    sizes = {"pocket-pope": {"scenes": 8}, "pocket-mme": {"images": 3}, "pocket-imagenet-s": {"scenes": 10}}
    seen: set[bytes] = set()
    for name, size in sizes.items():
        first = open_dataset(name, **size)
        pictures = {s.image.tobytes() for s in first}
        assert not seen & pictures and len({s.id for s in first}) == len(first)
        seen |= pictures
        if name == "pocket-imagenet-s":
            continue
        pocket.pocket_scene.cache_clear()
        again, other = (open_dataset(name, **size, **seed) for seed in ({}, {"seed": 30_000}))
        content = [(s.id, s.question, s.truth, s.image.tobytes()) for s in first]
        assert content == [(s.id, s.question, s.truth, s.image.tobytes()) for s in again]
        assert not pictures & {s.image.tobytes() for s in other}


def test_larger_pocket_sets_begin_with_the_smaller_ones(pocket_pope, pocket_mme):
    few = open_dataset("pocket-mme", images=3)
    assert {s.id for s in few} < {s.id for s in pocket_mme}
    fewer = open_dataset("pocket-pope", scenes=20, split="random")  # the other splits follow the set's frequencies
    assert [(s.id, s.question) for s in fewer] == [(s.id, s.question) for s in pocket_pope][: len(fewer)]


def test_pocket_options():
    one = open_dataset("pocket-pope", scenes=30, per_scene=1, split="popular")
    assert len(one) == 60 and {s.subset for s in one} == {"popular"}
    assert {s.subset for s in open_dataset("pocket-mme", images=1, split="hallucination")} == set(mme.HALLUCINATION)
    with pytest.raises(ParameterError, match="split of POPE 'hard'"):
        open_dataset("pocket-pope", scenes=1, split="hard")
    with pytest.raises(ParameterError, match="split of MME 'perception'.*expected one of .*same_color, hallucination, all"):
        open_dataset("pocket-mme", images=1, split="perception")
    for call in (lambda: pocket_questions.pocket_pope(0), lambda: pocket_questions.pocket_mme(0)):
        with pytest.raises(ParameterError, match="at least 1"):
            call()
