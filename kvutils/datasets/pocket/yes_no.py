"""Questions about one pocket scene each: POPE and MME, built as the real ones are, and every kind that the models know.

Everything follows from a seed and from scene streams of its own (see `kvutils.datasets.pocket.sets`), so no scene is
shared with training or with another set. A class is present in a scene if a share of `PRESENT` or more of one of its
things is visible, absent if at most 2 % of any is, as in `Facts`; any other class is not asked about."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from PIL import Image

from kvutils.datasets.files import limits
from kvutils.datasets.mme import mme_subtasks
from kvutils.datasets.pocket.questions import KINDS, MARGIN, OF, SIDES, Facts, balanced_questions, facts_of, offset, pick, unique
from kvutils.datasets.pocket.sets import SEED, PocketScene, describe_scene, pocket_scene, tries
from kvutils.datasets.pocket.shapes import CLASSES, PLURALS
from kvutils.datasets.pocket.world import CLASS_PRIOR, COLOURS, render, sample_kind, sample_scene
from kvutils.datasets.pope import pope_splits
from kvutils.datasets.samples import Question, YesNoSample
from kvutils.errors import at_least, one_of

_POSITIVES, _NEGATIVES, _PAIRS = 1, 2, 3  # what a seed is for, beside the scene; pairs: and on


def pocket_pope(scenes: int = 600, split: str = "all", per_scene: int = 3, seed: int = SEED) -> list[YesNoSample]:
    """Twin of POPE: is there a thing of a class, with three kinds of negatives.

    Each scene is asked about up to `per_scene` (POPE: 3) of its present classes, and in every split about as many absent ones, so yes
    and no are equally many in every scene and split; POPE gets there by leaving out images with fewer than three objects, which most
    pocket scenes are. The positives are the same in all splits. The negatives are drawn as by POPE's own script, from the truth of this
    very set of scenes: random (any absent class), popular (the absent classes that most scenes show), adversarial (for each positive,
    the absent class that is seen with it most often). Yes and no alternate.

    600 scenes show a true difference of 3 F1 points with probability 0.8 as long as at most one answer in six changes;
    where 6 % of the answers change, as when a third of the image is hidden from the model, they show 1.6 points."""
    limits(scenes=scenes, per_scene=per_scene)
    splits = pope_splits(split)
    found: list[tuple[int, PocketScene]] = []
    for index in tries(found, scenes, "scenes with a visible thing"):
        scene = pocket_scene("pope", index, seed)
        if scene.present:
            found.append((index, scene))
    presence = np.array([np.isin(np.arange(len(CLASSES)), s.present_classes) for _, s in found], dtype=int)
    together = presence.T @ presence  # (8, 8) scenes that show both classes; on the diagonal, that show it

    samples = []
    for name in splits:
        for index, scene in found:
            positives = _draw(scene.present_classes, (seed, index, _POSITIVES))[:per_scene]
            absent = _absent(facts_of(scene.scene, scene.drawn))
            negatives = _negatives(name, positives, _draw(absent, (seed, index, _NEGATIVES)), together)
            for number, cls in enumerate(c for pair in zip(positives, negatives, strict=True) for c in pair):
                question, truth = f"is there a {CLASSES[cls]} ?", "no" if number % 2 else "yes"
                samples.append(YesNoSample(f"{name}-{scene.id}-{number}", scene.id, scene.image, question, truth, name))
    return samples


def _negatives(split: str, positives: list[int], absent: list[int], together: np.ndarray) -> list[int]:
    """One absent class per positive, each only once. absent: in random order, in which ties are broken."""
    chosen: list[int] = []
    for positive in positives:
        free = [cls for cls in absent if cls not in chosen]
        score = {"random": 0 * together[0], "popular": together.diagonal(), "adversarial": together[positive]}
        chosen.append(max(free, key=lambda cls: score[split][cls]))  # noqa: B023 - called at once
    return chosen


def _absent(facts: Facts) -> list[int]:
    """Classes of which nothing can be seen."""
    seen = {thing[0] for thing in (*facts.present, *facts.partial)}
    return [cls for cls in range(len(CLASSES)) if cls not in seen]


# Subtask of MME -> the form of question (`kvutils.datasets.pocket.questions.KINDS`) that stands for it. MME counts by number ("are
# there two dogs"); the pocket models know only yes-no questions that compare two counts. same_color, which compares the colours
# of two things, is no subtask of MME and in none of its totals.
MME_FORMS = {"existence": "existence", "count": "hop_more", "position": "relation", "color": "existence_colour", "same_color": "hop_same"}


def pocket_mme(images: int = 300, split: str | Sequence[str] = "all", seed: int = SEED) -> list[YesNoSample]:
    """Twin of MME: per subtask of `MME_FORMS`, `images` scenes with two questions each, one true, one false.

    The false question is the true one with one thing changed, as in MME: another class (as frequent classes more often, so
    that frequency does not tell), another colour, the two classes exchanged (position, count), another pair of things
    (same_color). Each subtask takes the first scenes of one stream that allow its pair, so subtasks share scenes and `image_id`."""
    at_least("images", images)
    subtasks = mme_subtasks(split, tuple(MME_FORMS))
    samples: dict[str, list[YesNoSample]] = {name: [] for name in subtasks}
    for index in tries((), images, "scenes for each subtask"):
        lacking = [name for name in subtasks if len(samples[name]) < 2 * images]
        if not lacking:
            break
        described = describe_scene("mme", index, seed)
        facts = Facts(tuple((t.cls, t.colour, t.x, t.y, 1.0) for t in described.things), 0, 0)
        if not any(_pair(name, facts, seed, index) for name in lacking):
            continue  # drawing takes long: only what can be asked about if all of it is visible
        scene = pocket_scene("mme", index, seed)
        facts = facts_of(scene.scene, scene.drawn)
        for name in lacking:
            pair = _pair(name, facts, seed, index) or ()
            for truth, question in zip(("yes", "no"), pair, strict=False):
                sample_id = f"{name}-{scene.id}-{truth}"
                samples[name].append(YesNoSample(sample_id, scene.id, scene.image, question, truth, name))
    return [sample for name in subtasks for sample in samples[name]]


def _pair(subtask: str, facts: Facts, seed: int, index: int) -> tuple[str, str] | None:
    """The true and the false question of a scene, or None where it does not allow them."""
    return _PAIR_OF[subtask](facts, np.random.default_rng((seed, index, _PAIRS + list(MME_FORMS).index(subtask))))


def _existence(facts: Facts, random: np.random.Generator) -> tuple[str, str] | None:
    if not facts.present:
        return None
    absent = _absent(facts)
    weight = CLASS_PRIOR[absent]
    wrong = absent[int(random.choice(len(absent), p=weight / weight.sum()))]
    right = pick(random, sorted({thing[0] for thing in facts.present}))
    return f"is there a {CLASSES[right]} ?", f"is there a {CLASSES[wrong]} ?"


def _colour(facts: Facts, random: np.random.Generator) -> tuple[str, str] | None:
    if not facts.present:
        return None
    cls, colour = pick(random, facts.present)[:2]
    seen = {thing[1] for thing in (*facts.present, *facts.partial) if thing[0] == cls}
    wrong = pick(random, [other for other in range(len(COLOURS)) if other not in seen])
    return f"is there a {COLOURS[colour]} {CLASSES[cls]} ?", f"is there a {COLOURS[wrong]} {CLASSES[cls]} ?"


def _position(facts: Facts, random: np.random.Generator) -> tuple[str, str] | None:
    side = pick(random, SIDES)
    pairs = [(CLASSES[a[0]], CLASSES[b[0]]) for a, b in permutations(unique(facts, 0), 2) if offset(a, b, side) >= MARGIN]
    if not pairs:
        return None
    one, two = pick(random, pairs)
    return f"is the {one} {OF[side]} the {two} ?", f"is the {two} {OF[side]} the {one} ?"


def _count(facts: Facts, random: np.random.Generator) -> tuple[str, str] | None:
    if facts.partial:
        return None
    classes = [thing[0] for thing in facts.present]
    pairs = [(a, b) for a, b in permutations(sorted(set(classes)), 2) if classes.count(a) > classes.count(b)]
    if not pairs:
        return None
    more, less = (PLURALS[cls] for cls in pick(random, pairs))
    return f"are there more {more} than {less} ?", f"are there more {less} than {more} ?"


def _same_colour(facts: Facts, random: np.random.Generator) -> tuple[str, str] | None:
    pairs = list(permutations(unique(facts, 0), 2))
    chosen = []
    for same in (True, False):
        fitting = [(a, b) for a, b in pairs if (a[1] == b[1]) == same]
        if not fitting:
            return None
        one, two = (CLASSES[thing[0]] for thing in pick(random, fitting))
        chosen.append(f"are the {one} and the {two} the same colour ?")
    return chosen[0], chosen[1]


_PAIR_OF = {"existence": _existence, "count": _count, "position": _position, "color": _colour, "same_color": _same_colour}


def _draw(items: Sequence[int], seed: tuple[int, ...]) -> list[int]:
    """The items in random order."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def questions_of_every_kind(per_kind: int = 200, scenes: int = 1200, kinds: Sequence[str] = tuple(KINDS),
                            seed: int = SEED) -> list[Question]:  # fmt: skip
    """About `per_kind` questions of each kind, every answer equally often as far as `scenes` scenes allow.

    The scenes are those of a training pool of this seed, so no model was trained on them and no other set has them. The
    options of a kind are its answers. Raises ParameterError for sizes below 1 and unknown kinds."""
    limits(per_kind=per_kind, scenes=scenes)
    for kind in kinds:
        one_of("kind of question about one image", kind, KINDS)
    pictures, facts = [], []
    for index in range(scenes):
        random = np.random.default_rng((seed, index))
        scene = sample_scene(random, sample_kind(random))
        drawn = render(scene)
        pictures.append(Image.fromarray(drawn.image))
        facts.append(facts_of(scene, drawn))
    questions = []
    for kind in kinds:
        asked = balanced_questions(facts, kind, per_kind, seed)
        options = tuple(sorted({answer for _, _, answer in asked}))
        for number, (index, text, answer) in enumerate(asked):
            name = f"questions-{seed}-{index:05d}"
            questions.append(Question(f"{kind}-{number:04d}", kind, (pictures[index],), text, answer, options, name))
    return questions
