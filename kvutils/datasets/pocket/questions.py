"""Questions about pocket scenes and their answers, in the language of the pocket models (`WORDS` of the recipe's tokenizer).

Every question kind is balanced where it is drawn: yes and no equally often, negative classes in proportion to how
frequent the class is (so that frequency does not give the answer away), and nothing is asked whose answer depends on
a thing that is hardly visible. What only training needs (descriptions, prefixes, hints) is in the recipe, data/pocket/recipe."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from kvutils.datasets.pocket.shapes import CLASSES, PLURALS
from kvutils.datasets.pocket.world import CLASS_PRIOR, COLOURS, DOMAINS, PRESENT, STYLES, Rendered, Scene

NUMBERS = ("none", "one", "two", "three", "four")
OF = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
SIDES = tuple(OF)
MARGIN = 8.0  # pixels by which one thing must be further left (or higher) before it is asked about
OPTIONS = ("(a)", "(b)", "(c)", "(d)")


@dataclass(frozen=True)
class Facts:
    """What the questions are asked about: things as (class, colour, x, y, visible share), style and domain index."""

    things: tuple[tuple[int, int, float, float, float], ...]
    style: int
    domain: int

    @property
    def present(self) -> list[tuple[int, int, float, float, float]]:
        return [t for t in self.things if t[4] >= PRESENT]

    @property
    def partial(self) -> list[tuple[int, int, float, float, float]]:
        return [t for t in self.things if 0.02 < t[4] < PRESENT]


def facts_of(scene: Scene, rendered: Rendered) -> Facts:
    """Places and shares in float32, as the training pool stores them: the same scene allows the same questions."""
    exact = np.array([(t.x, t.y, v) for t, v in zip(scene.things, rendered.visible, strict=True)], np.float32)
    return Facts(tuple((t.cls, t.colour, *row) for t, row in zip(scene.things, exact.tolist(), strict=True)), scene.style, scene.domain)


def unique(facts: Facts, field: int) -> list[tuple]:
    """Present things whose class (field 0) or colour (field 1) no other visible thing shares."""
    counts = Counter(t[field] for t in facts.things if t[4] > 0.02)
    return [t for t in facts.present if counts[t[field]] == 1]


def pick(rng: np.random.Generator, items: Sequence) -> Any:
    return items[int(rng.integers(len(items)))]


def _existence(facts, rng):
    if rng.random() < 0.5:
        if not facts.present:
            return None
        return f"is there a {CLASSES[pick(rng, facts.present)[0]]} ?", "yes"
    weight = CLASS_PRIOR.copy()
    weight[[t[0] for t in facts.things]] = 0
    return f"is there a {CLASSES[rng.choice(len(CLASSES), p=weight / weight.sum())]} ?", "no"


def _existence_colour(facts, rng):
    if not facts.present:
        return None
    cls, colour = pick(rng, facts.present)[:2]
    if rng.random() < 0.5:
        return f"is there a {COLOURS[colour]} {CLASSES[cls]} ?", "yes"
    seen = {(t[0], t[1]) for t in facts.things}
    change_colour = rng.random() < 0.5
    wrong = [(cls, i) if change_colour else (i, colour) for i in range(8)]
    wrong = pick(rng, [pair for pair in wrong if pair not in seen])
    return f"is there a {COLOURS[wrong[1]]} {CLASSES[wrong[0]]} ?", "no"


def _classes(facts, rng):
    return [(f"what is the {COLOURS[t[1]]} thing ?", CLASSES[t[0]]) for t in unique(facts, 1)]


def _colours(facts, rng):
    return [(f"what colour is the {CLASSES[t[0]]} ?", COLOURS[t[1]]) for t in unique(facts, 0)]


def _count(facts, rng):
    if facts.partial or not facts.present:
        return None
    return "how many things are there ?", NUMBERS[len(facts.present)]


def _count_class(facts, rng):
    if facts.partial:
        return None
    counts = Counter(t[0] for t in facts.present)
    several = [c for c, n in counts.items() if n > 1]
    draw = rng.random()
    if draw < 0.4 and several:
        cls = pick(rng, several)
    elif draw < 0.75 and counts:
        cls = pick(rng, list(counts))
    else:
        cls = int(rng.integers(len(CLASSES)))
    return f"how many {PLURALS[cls]} are there ?", NUMBERS[counts[cls]]


def _positions(facts, rng):
    """One axis for all: "left" for one thing and "right" for another makes the class in the question matter."""
    axis, near, far = (2, "left", "right") if rng.random() < 0.5 else (3, "top", "bottom")
    return [(f"is the {CLASSES[t[0]]} {near} or {far} ?", near if t[axis] < 48 else far)
            for t in unique(facts, 0) if abs(t[axis] - 48) >= MARGIN]  # fmt: skip


def offset(one, two, side) -> float:
    """By how many pixels thing `one` lies to the given side of thing `two` (negative: on the other side)."""
    return {"left": two[2] - one[2], "right": one[2] - two[2], "above": two[3] - one[3], "below": one[3] - two[3]}[side]


def _relations(facts, rng):
    """Each pair of things, on one random side, in both orders: one "yes" and one "no"."""
    found = []
    for one, two in combinations(unique(facts, 0), 2):
        side = pick(rng, SIDES)
        gap = offset(one, two, side)
        if abs(gap) >= MARGIN:
            a, b = (CLASSES[t[0]] for t in ((one, two) if gap > 0 else (two, one)))
            found += [(f"is the {a} {OF[side]} the {b} ?", "yes"), (f"is the {b} {OF[side]} the {a} ?", "no")]
    return found


def _neighbour(facts, rng):
    """A side of a thing of unique class, in words, and the only other thing that lies there; None if there is no such."""
    anchors = unique(facts, 0)
    if not anchors or facts.partial or len(facts.present) < 2:
        return None
    anchor, side = pick(rng, anchors), pick(rng, SIDES)
    gaps = [(offset(t, anchor, side), t) for t in facts.present if t is not anchor]
    if any(abs(gap) < MARGIN for gap, _ in gaps):
        return None
    there = [t for gap, t in gaps if gap > 0]
    return (f"{OF[side]} the {CLASSES[anchor[0]]}", there[0]) if len(there) == 1 else None


def _hop_colour(facts, rng):
    found = _neighbour(facts, rng)
    return found and (f"what colour is the thing {found[0]} ?", COLOURS[found[1][1]])


def _hop_class(facts, rng):
    found = _neighbour(facts, rng)
    return found and (f"what is the thing {found[0]} ?", CLASSES[found[1][0]])


def _hop_same(facts, rng):
    things = unique(facts, 0)
    pairs = [(a, b) for a in things for b in things if a is not b]
    wanted = rng.random() < 0.7  # equal colours are rarer than unequal ones: this comes out near half and half
    pairs = [(a, b) for a, b in pairs if (a[1] == b[1]) == wanted]
    if not pairs:
        return None
    one, two = pick(rng, pairs)
    return f"are the {CLASSES[one[0]]} and the {CLASSES[two[0]]} the same colour ?", "yes" if wanted else "no"


def _hop_more(facts, rng):
    if facts.partial:
        return None
    counts = Counter(t[0] for t in facts.present)
    pairs = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    if not pairs:
        return None
    more, less = pick(rng, pairs)
    if rng.random() < 0.5:
        return f"are there more {PLURALS[more]} than {PLURALS[less]} ?", "yes"
    return f"are there more {PLURALS[less]} than {PLURALS[more]} ?", "no"


def _hop_match(facts, rng):
    if facts.partial:
        return None
    alike = Counter(t[1] for t in facts.present)
    pairs = [(a, b) for a in unique(facts, 0) for b in facts.present if a is not b and a[1] == b[1] and alike[a[1]] == 2]
    if not pairs:
        return None
    one, other = pick(rng, pairs)
    return f"what has the same colour as the {CLASSES[one[0]]} ?", CLASSES[other[0]]


# Kinds that look one thing up: every question of the kind that a scene allows.
LOOKUPS = {"class": _classes, "colour": _colours, "position": _positions, "relation": _relations}
KINDS = {
    "existence": _existence, "existence_colour": _existence_colour, "class": _classes, "colour": _colours,
    "count": _count, "count_class": _count_class, "style": lambda facts, rng: ("what style is the image ?", STYLES[facts.style]),
    "domain": lambda facts, rng: ("what is the light ?", DOMAINS[facts.domain]), "position": _positions,
    "relation": _relations, "hop_colour": _hop_colour, "hop_class": _hop_class, "hop_same": _hop_same, "hop_more": _hop_more,
    "hop_match": _hop_match,
}  # fmt: skip


def ask(facts: Facts, kind: str, rng: np.random.Generator, kinds: Mapping = KINDS) -> tuple[str, str] | None:
    """One (question, answer) of a kind, or None when the scene does not allow it."""
    for _ in range(4):
        found = kinds[kind](facts, rng)
        if kind in LOOKUPS:
            found = pick(rng, found) if found else None
        if found is not None:
            return found
    return None


def referring_expression(facts: Facts, index: int) -> str | None:
    """The shortest expression that names exactly one thing: class, else colour and class, else with left/right."""
    cls, colour, x, _, _ = facts.things[index]
    visible = [t for t in facts.things if t[4] > 0.02]
    if sum(t[0] == cls for t in visible) == 1:
        return f"the {CLASSES[cls]}"
    alike = [t for t in visible if t[:2] == (cls, colour)]
    if len(alike) == 1:
        return f"the {COLOURS[colour]} {CLASSES[cls]}"
    same = sorted(t[2] for t in visible if t[0] == cls)
    if len(same) == 2 and same[1] - same[0] >= MARGIN:
        return f"the {'left' if x == same[0] else 'right'} {CLASSES[cls]}"
    return None


def balanced_questions(facts: Sequence[Facts], kind: str, count: int, seed: int) -> list[tuple[int, str, str]]:
    """(scene, question, answer) of a kind: at least `count` of them if the scenes allow so many, answers balanced."""
    rng = np.random.default_rng((seed, len(kind), sum(map(ord, kind))))
    by_answer: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for scene, one in enumerate(facts):
        for question, answer in sorted({ask(one, kind, rng) for _ in range(3)} - {None}):
            by_answer[answer].append((scene, question, answer))
    return evenly(by_answer, count)


def evenly(by_answer: dict[str, list], count: int) -> list:
    """`count` of what the answers have (or all), every answer equally often as far as there are enough of it."""
    cap = 1
    while sum(min(len(found), cap) for found in by_answer.values()) < count and cap < max(map(len, by_answer.values()), default=0):
        cap += 1
    return [one for answer in sorted(by_answer) for one in by_answer[answer][:cap]]


STYLE_MATCH = "which image has the same style as the first image ? (a) the second image (b) the third image"
CLASS_MATCH = "which image shows the same thing as the first image ? (a) the second image (b) the third image"
CORRESPONDENCE = "which point on the second image corresponds to the reference point ? (a) (b) (c) (d)"
