"""Which questions a training sequence asks: samples of scenes, with marks, prefixes and hints, drawn from a pool."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from kvutils.datasets.pocket import questions as q
from kvutils.datasets.pocket.shapes import CLASSES, PARTS
from kvutils.datasets.pocket.world import COLOURS, DOMAINS, SIZE, STYLES
from recipe.pool import Pool
from recipe.tokenizer import NTH

# How often each kind is drawn for a scene. A lookup kind then asks about every thing, so that "colour", which breaks
# late, still gets the largest share of the blocks.
MIX = {
    "existence": 2.0, "existence_colour": 1.2, "class": 0.8, "colour": 2.0, "count": 0.6, "count_class": 1.0,
    "style": 0.2, "domain": 0.1, "position": 0.8, "relation": 0.8, "hop_colour": 1.0, "hop_class": 1.0,
    "hop_same": 0.8, "hop_more": 0.6, "hop_match": 0.5, "caption": 0.2, "list_colours": 3.0, "list_sides": 0.3,
}  # fmt: skip
# By the mix of the others a Qwen2.5-VL, whose tokens are merged of four patches each, said what is there nearly always rightly (0.984, above
# its gate) and where it is hardly better than blind (0.60).
OWN_MIX = {"pocket-qwen": {"existence": 0.3, "existence_colour": 0.8, "position": 2.0}}
PLAIN, REFERENCE, LETTERED = range(3)  # versions of a picture: as it is, with one marked point, with four lettered ones
LETTERS_QUESTION = "which part has which letter ?"  # "top (b) , front (a)": as the lists of things
PARTS_QUESTION = "which letter has which part ?"  # "(a) front , (b) top": at the letter, its part
PART_QUESTION = "which part is marked ?"  # about one portrait with one point, and about the first image of a pair
LEVELS = ("far {0}", "{0}", "{1}", "far {1}")
_NEUTRAL = (
    "please look at this picture",
    "good morning",
    "here is another scene",
    "the weather was nice today",
    "look carefully",
    "a picture with some things",
)


def place_words(x: float, y: float) -> tuple[str, str]:
    """In which quarter of the columns and of the rows a point lies: ("far left", "top")."""
    level = [min(max(int(v / (SIZE / 4)), 0), 3) for v in (x, y)]
    return LEVELS[level[0]].format("left", "right"), LEVELS[level[1]].format("top", "bottom")


def describe(facts: q.Facts, marks: list[tuple[str, int]], rng: np.random.Generator) -> str:
    """A picture in plain words, its things from left to right, its marks (letter, part) in any order: what the text stage reads."""
    things = [f"a {COLOURS[t[1]]} {CLASSES[t[0]]} {' '.join(place_words(t[2], t[3]))}" for t in sorted(facts.present, key=lambda t: t[2])]
    told = [f"{'marked' if letter == 'r' else f'({letter})'} {PARTS[part]}" for letter, part in marks]
    about = [f"a {STYLES[facts.style]} image", f"a {DOMAINS[facts.domain]} photo"]
    about += [" , ".join(told[i] for i in rng.permutation(len(told)))] if told else []
    return " . ".join([" , ".join(things) or "nothing", *(about[i] for i in rng.permutation(len(about)))]) + " ."


def _caption(facts, rng):
    """The present things from left to right."""
    things = sorted(facts.present, key=lambda t: t[2])
    named = " and ".join(f"a {COLOURS[t[1]]} {CLASSES[t[0]]}" for t in things) or "nothing"
    return None if facts.partial else ("describe the image .", named)


def _list_things(facts, rng, question, values):
    """"fish red , car blue", in any order. The word behind a class is its colour (or side): one look from the class word, at the class
    word. A question has the look and the answer at different tokens; without these lists neither step was ever learned, and the model was
    content with a colour that is somewhere in view. From left to right, a text's could be copied without looking at the class."""
    things = q.unique(facts, 0)
    told = [f"{CLASSES[things[i][0]]} {values(things[i])}" for i in rng.permutation(len(things))]
    return (question, " , ".join(told)) if told else None


def _list_sides(facts, rng):
    if rng.random() < 0.5:
        return _list_things(facts, rng, "are the things left or right ?", lambda t: "left" if t[2] < 48 else "right")
    return _list_things(facts, rng, "are the things top or bottom ?", lambda t: "top" if t[3] < 48 else "bottom")


KINDS = q.KINDS | {  # and descriptions, of several words: trained on, not scored
    "caption": _caption, "list_sides": _list_sides,
    "list_colours": lambda facts, rng: _list_things(facts, rng, "what colour are the things ?", lambda t: COLOURS[t[1]]),
}  # fmt: skip


@dataclass
class Sample:
    """One sequence: its images as (pool row, version), words before, and (kind, question, answer) blocks.

    `question_first` puts the only block's question before the image."""

    images: list[tuple[int, int]]
    blocks: list[tuple[str, str, str]]
    prefix: str = ""
    question_first: bool = False


def ask_about_all(facts: q.Facts, kind: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """The questions of a kind that look up each thing in turn, in random order; one question for the other kinds.

    Where the answers differ from thing to thing, the class (or colour) in the question must be found in the image:
    asked about one thing per scene, the model was content with a frequent answer for any thing in view."""
    if kind not in q.LOOKUPS:
        found = q.ask(facts, kind, rng, KINDS)
        return [found] if found else []
    found = q.LOOKUPS[kind](facts, rng)
    return [found[i] for i in rng.permutation(len(found))]


def prefix(facts: q.Facts, rng: np.random.Generator) -> str:
    """Words before the image, as a chat brings them: a name or description (mostly true), the light, or small talk."""
    draw = rng.random()
    if draw < 0.4 and facts.present:
        cls, colour = q.pick(rng, facts.present)[:2]
        form = q.pick(rng, ("{1}", "the {1}", "look for the {1}", "a photo of a {1}", "the {0} {1}", "find the {0} {1}"))
        return form.format(COLOURS[colour], CLASSES[cls])
    if draw < 0.55:
        return q.pick(rng, ("the {}", "look for the {}", "{}")).format(q.pick(rng, CLASSES))
    if draw < 0.75:
        return q.pick(rng, (f"a {DOMAINS[facts.domain]} photo", f"a {STYLES[facts.style]} image", DOMAINS[facts.domain]))
    return q.pick(rng, _NEUTRAL)


def single_image_sample(pool: Pool, row: int, rng: np.random.Generator, mix: Mapping[str, float] = MIX, blocks: int = 16) -> Sample:
    facts = pool.facts(row)
    words = prefix(facts, rng) if rng.random() < 0.25 else ""
    return Sample([(row, PLAIN)], _questions(facts, rng, mix, blocks), words)


def question_first_sample(pool: Pool, row: int, rng: np.random.Generator, mix: Mapping[str, float] = MIX) -> Sample | None:
    """The question before the image, as many chats have it."""
    kind = str(rng.choice(list(mix), p=_shares(mix)))
    found = q.ask(pool.facts(row), kind, rng, KINDS)
    return Sample([(row, PLAIN)], [(kind, *found)], question_first=True) if found else None


def in_words(pool: Pool, sample: Sample, rng: np.random.Generator) -> Sample:
    """A sample with its pictures told in words, before its questions; nothing is asked that the words leave open."""
    told = [describe(pool.facts(row), marks_of(pool, row, version), rng) for row, version in sample.images]
    if len(told) > 1:
        told = [f"{place} {words}" for place, words in zip(NTH, told, strict=False)]
    asked = [block for block in sample.blocks if not {"above", "below"} & set(block[1].split())]
    return replace(sample, images=[], blocks=asked, prefix=" ".join([sample.prefix, *told]).strip())


def crowd_sample(rng: np.random.Generator) -> Sample:
    """A text of four to seven things, more than a picture holds, no two of one class or colour; what each is and which colour it has."""
    count = int(rng.integers(4, 8))
    classes, colours = (rng.permutation(len(names))[:count].tolist() for names in (CLASSES, COLOURS))
    places = rng.uniform(0, SIZE, (count, 2)).tolist()
    things = tuple((cls, colour, *place, 1.0) for cls, colour, place in zip(classes, colours, places, strict=True))
    facts = q.Facts(things, int(rng.integers(len(STYLES))), int(rng.integers(len(DOMAINS))))
    blocks = [(kind, *found) for kind in ("class", "colour") for found in ask_about_all(facts, kind, rng)]
    return Sample([], [blocks[i] for i in rng.permutation(len(blocks))], describe(facts, [], rng))


def _shares(mix: Mapping[str, float]) -> np.ndarray:
    return np.array(list(mix.values())) / sum(mix.values())


def _questions(facts: q.Facts, rng: np.random.Generator, mix: Mapping[str, float], blocks: int) -> list[tuple[str, str, str]]:
    kinds = rng.choice(list(mix), size=2 * blocks, p=_shares(mix))
    asked: dict[str, tuple[str, str, str]] = {}
    for kind in map(str, kinds):
        found = ask_about_all(facts, kind, rng)
        if kind in q.LOOKUPS and len({answer for _, answer in found}) < 2 and rng.random() < 0.7:
            continue  # one answer holds for whatever is in view: little to learn
        for question, answer in found[:4]:
            if len(asked) < blocks:
                asked[question] = (kind, question, answer)
    return _even(list(asked.values()), rng)


def _even(blocks: list[tuple[str, str, str]], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """As many "yes" as "no" per scene for the existence kinds: repeats of a "yes" were dropped more often."""
    for kind in ("existence", "existence_colour"):
        by_answer = {a: [b for b in blocks if b[0] == kind and b[2] == a] for a in ("yes", "no")}
        keep = min(len(found) for found in by_answer.values())
        for found in by_answer.values():
            for i in rng.permutation(len(found))[keep:]:
                blocks.remove(found[i])
    return blocks


def marks_of(pool: Pool, row: int, version: int) -> list[tuple[str, int]]:
    """Letter and part of each mark on a version of a portrait; always the same."""
    parts = [int(p) for p in np.random.default_rng((row, version)).permutation(np.flatnonzero(pool.keypoints[row, 0, :, 2] > 0))]
    return list(zip({PLAIN: "", REFERENCE: "r", LETTERED: "abcd"}[version], parts, strict=False))


def marked_sample(pool: Pool, row: int, rng: np.random.Generator) -> Sample | None:
    """A portrait with lettered points: which letter is at a part; or with one point: which part it marks."""
    if rng.random() < 0.35:
        marks = marks_of(pool, row, REFERENCE)
        return Sample([(row, REFERENCE)], [("part", PART_QUESTION, PARTS[part]) for _, part in marks])
    marks = marks_of(pool, row, LETTERED)
    blocks = [("letter", f"which letter marks the {PARTS[part]} ?", f"({letter})") for letter, part in marks]
    return Sample([(row, LETTERED)], blocks + _lists(marks))


def _lists(marks: list[tuple[str, int]]) -> list[tuple[str, str, str]]:
    """Which letter each part has, part by part, and which part each letter marks, letter by letter."""
    if not marks:
        return []
    to_letter = " , ".join(f"{PARTS[part]} ({letter})" for letter, part in sorted(marks, key=lambda mark: mark[1]))
    to_part = " , ".join(f"({letter}) {PARTS[part]}" for letter, part in sorted(marks))
    return [("list_letters", LETTERS_QUESTION, to_letter), ("list_parts", PARTS_QUESTION, to_part)]


def correspondence_sample(pool: Pool, rows: tuple[int, int], rng: np.random.Generator, hints: bool = True) -> Sample | None:
    """BLINK's form: a reference point on the first image, lettered points on the second."""
    reference, lettered = marks_of(pool, rows[0], REFERENCE), marks_of(pool, rows[1], LETTERED)
    letters = {part: f"({letter})" for letter, part in lettered}
    if len(letters) < 4 or not reference or reference[0][1] not in letters:
        return None
    part = reference[0][1]
    blocks = [("correspondence", q.CORRESPONDENCE, letters[part])]
    if hints:
        blocks += [("part", PART_QUESTION, PARTS[part])]
        blocks += [("letter", f"which letter marks the {PARTS[p]} ?", letter) for p, letter in letters.items()]
        blocks += _lists(lettered)
    return Sample([(rows[0], REFERENCE), (rows[1], LETTERED)], blocks)


def triple_sample(pool: Pool, rows: tuple[int, int, int], kind: str, hints: bool = True, compare_styles: bool = False) -> Sample:
    """BLINK's form of style (or class) matching: the first image is the reference, one of the others shares it.

    The caller draws `rows` so that exactly one candidate matches. Styles are named, image by image, and not compared in training
    (`style_match` is drawn with `hints` alone there, see `train.STEP_KINDS`), unless `compare_styles`."""
    of = (lambda row: int(pool.style[row])) if kind == "style_match" else (lambda row: int(pool.things[row, 0, 0]))
    answer = "(a)" if of(rows[1]) == of(rows[0]) else "(b)"
    images = [(row, PLAIN) for row in rows]
    if not hints:
        return Sample(images, [(kind, q.STYLE_MATCH if kind == "style_match" else q.CLASS_MATCH, answer)])
    seen = [of(row) for row in rows]
    if kind == "style_match":
        named = [("nth_style", f"what style is the {place} image ?", STYLES[found]) for place, found in zip(NTH, seen, strict=True)]
        return Sample(images, [(kind, q.STYLE_MATCH, answer)] * compare_styles + named)
    blocks = [(kind, q.CLASS_MATCH, answer)]
    for place, found in zip(NTH, seen, strict=True):  # the two steps of the match: what a given image shows, and which image shows a given thing
        blocks.append(("nth_class", f"what is the thing on the {place} image ?", CLASSES[found]))
        which = f"which image shows the {CLASSES[found]} ?"
        if seen.count(found) == 1:
            blocks.append(("class_which", which, place))
        elif place != "first":
            blocks.append(("class_also", f"{which[:-2]} as the first ?", place))
    return Sample(images, blocks)


# What the answer in a sentence is made of: the question's form, and the sentence around its parts and the word ("{a}").
_SENTENCES = (
    (r"what (?:colour|style) is (.+) \?", "{0} is {a}"), (r"what is the light \?", "the light is {a}"), (r"what is (.+) \?", "{0} is a {a}"),
    (r"how many (.+) are there \?", "there are {a} {0}"), (r"is (.+) (?:left or right|top or bottom) \?", "{0} is {a}"),
    (r"is there a (.+) \?", "{a} , there is {no} {0}"), (r"what has (the same colour as .+) \?", "the {a} has {0}"),
)  # fmt: skip


def in_sentence(block: tuple[str, str, str]) -> tuple[str, str, str]:
    """A block (kind, question, answer) that is answered in a sentence: "the fish is red" for "red". Lists, letters and what has no such
    form stay as they are."""
    kind, question, answer = block
    for form, sentence in _SENTENCES:
        if kind in (*q.KINDS, "nth_style", "nth_class") and (found := re.fullmatch(form, question)):
            return kind, question, sentence.format(*found.groups(), a=answer, no="no" if answer == "no" else "a")
    return block


_OF_ONE_SCENE = {"single": single_image_sample, "first": question_first_sample}


class Sampler:
    """Draws samples of each step type from a pool; `draw(kind, n, rng)`. mix: weights of the question kinds of one scene; compare_styles,
    sentences: whether styles are compared across images, and answers given in a sentence; words: pictures told in words."""

    def __init__(self, pool: Pool, mix: Mapping[str, float] = MIX, compare_styles: bool = False, sentences: bool = False, words: bool = False):
        self.pool, self.mix, self.compare_styles, self.sentences, self.words = pool, mix, compare_styles, sentences, words
        self.portraits = np.flatnonzero(pool.portrait)
        self.by_style = [np.flatnonzero(pool.style == s) for s in range(len(STYLES))]
        portrait_class = np.where(pool.portrait, pool.things[:, 0, 0], -1)
        self.by_class = [np.flatnonzero(portrait_class == c) for c in range(len(CLASSES))]

    def draw(self, kind: str, count: int, rng: np.random.Generator, hints: bool = True) -> list[Sample]:
        out: list[Sample] = []
        while len(out) < count:
            sample = self._one(kind, rng, hints)
            sample = in_words(self.pool, sample, rng) if sample and self.words else sample
            if sample is not None and sample.blocks:
                out.append(replace(sample, blocks=[in_sentence(b) for b in sample.blocks]) if self.sentences else sample)
        return out

    def _one(self, kind: str, rng: np.random.Generator, hints: bool) -> Sample | None:
        if kind in _OF_ONE_SCENE:
            return _OF_ONE_SCENE[kind](self.pool, int(rng.integers(len(self.pool))), rng, self.mix)
        if kind == "crowd":
            return crowd_sample(rng)
        if kind == "marked":
            return marked_sample(self.pool, int(rng.choice(self.portraits)), rng)
        if kind == "correspondence":
            rows = rng.choice(self.by_class[int(rng.integers(len(CLASSES)))], 2, replace=False)
            return correspondence_sample(self.pool, (int(rows[0]), int(rows[1])), rng, hints)
        groups = self.by_style if kind == "style_match" else self.by_class
        same, other = rng.choice(len(groups), 2, replace=False)
        reference, match = rng.choice(groups[same], 2, replace=False)
        rest = [int(match), int(rng.choice(groups[other]))]
        if rng.random() < 0.5:
            rest.reverse()
        return triple_sample(self.pool, (int(reference), *rest), kind, hints, self.compare_styles)
