"""From scenes to training batches: many question blocks packed behind one image.

A packed sequence is `prefix image(s) block block ...`. Every block sees the prefix, the images and itself, and its
positions restart right after the last image, so that each block is exactly the prompt `prefix images question` that
the model meets at inference, at a tenth of the cost.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from kvutils.datasets.pocket import questions as q
from kvutils.datasets.pocket.shapes import CLASSES, PARTS
from kvutils.datasets.pocket.world import STYLES, draw_mark
from kvutils.processors import build_word_tokenizer
from recipe.pool import Pool

TOKEN = build_word_tokenizer(list(q.WORDS)).get_vocab()
PAD, EOS, IMAGE = TOKEN["<pad>"], TOKEN["<eos>"], TOKEN["<image>"]
IGNORE = -100
# How often each kind is drawn for a scene. A lookup kind then asks about every thing, so that "colour", which breaks
# late, still gets the largest share of the blocks.
MIX = {
    "existence": 2.0, "existence_colour": 1.2, "class": 0.8, "colour": 2.0, "count": 0.6, "count_class": 1.0,
    "style": 0.2, "domain": 0.1, "position": 0.8, "relation": 0.8, "hop_colour": 1.0, "hop_class": 1.0,
    "hop_same": 0.8, "hop_more": 0.6, "hop_match": 0.5, "caption": 0.2, "list_colours": 3.0, "list_sides": 0.3,
}  # fmt: skip


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKEN[word] for word in text.split())


@dataclass
class Sample:
    """One sequence: pool rows of its images, marks to paint on each, words before, and (kind, question, answer) blocks.

    `question_first` puts the only block's question before the image."""

    images: list[int]
    blocks: list[tuple[str, str, str]]
    marks: list[list[tuple[str, float, float]]] = field(default_factory=list)
    prefix: str = ""
    question_first: bool = False


def single_image_sample(pool: Pool, row: int, rng: np.random.Generator, blocks: int = 12) -> Sample:
    facts = pool.facts(row)
    if rng.random() < 0.08:  # the question before the image, as many chats have it
        kind = str(rng.choice(list(MIX), p=np.array(list(MIX.values())) / sum(MIX.values())))
        found = q.ask(facts, kind, rng)
        if found:
            return Sample([row], [(kind, *found)], [[]], question_first=True)
    prefix = q.prefix(facts, rng) if rng.random() < 0.25 else ""
    kinds = rng.choice(list(MIX), size=2 * blocks, p=np.array(list(MIX.values())) / sum(MIX.values()))
    asked: dict[str, tuple[str, str, str]] = {}
    for kind in map(str, kinds):
        found = q.ask_about_all(facts, kind, rng)
        if kind in q.LOOKUPS and len({answer for _, answer in found}) < 2 and rng.random() < 0.7:
            continue  # one answer holds for whatever is in view: little to learn
        for question, answer in found[:4]:
            if len(asked) < blocks:
                asked[question] = (kind, question, answer)
    return Sample([row], _even(list(asked.values()), rng), [[]], prefix)


def _even(blocks: list[tuple[str, str, str]], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """As many "yes" as "no" per scene for the existence kinds: repeats of a "yes" were dropped more often."""
    for kind in ("existence", "existence_colour"):
        by_answer = {a: [b for b in blocks if b[0] == kind and b[2] == a] for a in ("yes", "no")}
        keep = min(len(found) for found in by_answer.values())
        for found in by_answer.values():
            for i in rng.permutation(len(found))[keep:]:
                blocks.remove(found[i])
    return blocks


def seen_points(pool: Pool, row: int) -> list[int]:
    return [k for k in range(len(PARTS)) if pool.keypoints[row, 0, k, 2] > 0]


def point(pool: Pool, row: int, part: int) -> tuple[float, float]:
    return float(pool.keypoints[row, 0, part, 0]), float(pool.keypoints[row, 0, part, 1])


def marked_sample(pool: Pool, row: int, rng: np.random.Generator) -> Sample:
    """A portrait with lettered points: which letter is at a part; or with one point: which part it marks."""
    parts = [int(p) for p in rng.permutation(seen_points(pool, row))]
    if rng.random() < 0.35:
        letter = str(rng.choice(("r", "r", "r", "a", "b", "c", "d")))
        return Sample([row], [("part", q.PART_QUESTION, PARTS[parts[0]])], [[(letter, *point(pool, row, parts[0]))]])
    letters = [str(c) for c in rng.permutation(list("abcd"))]
    marks = [(letter, *point(pool, row, part)) for letter, part in zip(letters, parts[:4])]
    blocks = [("letter", q.letter_question(part), f"({letter})") for (letter, _, _), part in zip(marks, parts)]
    blocks += _lists([letter for letter, _, _ in marks], parts, rng)
    return Sample([row], blocks, [marks])


def _lists(
    letters: list[str], parts: list[int], rng: np.random.Generator, reference: int | None = None
) -> list[tuple[str, str, str]]:
    """Which letter each part has, and which part each letter (and the reference point) marks, in random order."""
    to_letter = [(PARTS[part], f"({letter})") for letter, part in zip(letters, parts)]
    to_part = [(letter, part) for part, letter in to_letter]
    if reference is not None:
        to_part.append(("reference", PARTS[reference]))
    return [
        (kind, question, " , ".join(" ".join(pairs[i]) for i in rng.permutation(len(pairs))))
        for kind, question, pairs in (("list_letters", q.LETTERS_QUESTION, to_letter), ("list_parts", q.PARTS_QUESTION, to_part))
    ]


def correspondence_sample(pool: Pool, rows: tuple[int, int], rng: np.random.Generator, hints: bool = True) -> Sample | None:
    """BLINK's form: a reference point on the first image, lettered points on the second."""
    first, second = (seen_points(pool, row) for row in rows)
    common = [p for p in first if p in second]
    if not common or len(second) < 4:
        return None
    part = int(rng.choice(common))
    shown = [part, *(int(p) for p in rng.permutation([p for p in second if p != part])[:3])]
    letters = [str(c) for c in rng.permutation(list("abcd"))]
    marks = [(letter, *point(pool, rows[1], p)) for letter, p in zip(letters, shown)]
    blocks = [("correspondence", q.CORRESPONDENCE, f"({letters[0]})")]
    if hints:
        blocks += [("part", q.PART_QUESTION, PARTS[part])]
        blocks += [("part_then_letter", q.PART_THEN_LETTER, f"{PARTS[part]} ({letters[0]})")]
        blocks += [("letter", q.letter_question(p), f"({letter})") for letter, p in zip(letters, shown)]
        blocks += _lists(letters, shown, rng, reference=part)
        for letter, same in ((letters[0], "yes"), (letters[int(rng.integers(1, len(shown)))], "no")):
            blocks.append(("same_point", q.same_point_question(f"({letter})"), same))
    return Sample(list(rows), blocks, [[("r", *point(pool, rows[0], part))], marks])


def lettered_pair_sample(pool: Pool, rows: tuple[int, int], rng: np.random.Generator) -> Sample | None:
    """The same parts lettered on both images, in different orders, and asked for each: four answers behind one pair of
    images, so that neither image alone nor the options give them. BLINK's form has one reference point per pair."""
    first, second = (seen_points(pool, row) for row in rows)
    parts = [int(p) for p in rng.permutation([p for p in first if p in second])[:4]]
    if len(parts) < 3:
        return None
    letters = [[str(c) for c in rng.permutation(list("abcd"))[: len(parts)]] for _ in rows]
    marks = [[(a, *point(pool, row, p)) for a, p in zip(names, parts)] for row, names in zip(rows, letters)]
    blocks = [("counterpart", q.counterpart_question(f"({a})"), f"({b})") for a, b in zip(*letters)]
    return Sample(list(rows), blocks, marks)


def triple_sample(pool: Pool, rows: tuple[int, int, int], kind: str, hints: bool = True) -> Sample:
    """BLINK's form of style (or class) matching: the first image is the reference, one of the others shares it.

    The caller draws `rows` so that exactly one candidate matches."""
    of = (lambda row: int(pool.style[row])) if kind == "style_match" else (lambda row: int(pool.things[row, 0, 0]))
    answer = "(a)" if of(rows[1]) == of(rows[0]) else "(b)"
    blocks = [(kind, q.STYLE_MATCH if kind == "style_match" else q.CLASS_MATCH, answer)]
    if hints:  # the two steps of the match: what a given image shows, and which image shows a given thing
        seen = [of(row) for row in rows]
        for place, found in zip(q.NTH, seen):
            if kind == "style_match":
                blocks.append(("nth_style", f"what style is the {place} image ?", STYLES[found]))
                which = f"which image is {STYLES[found]} ?"
            else:
                blocks.append(("nth_class", f"what is the thing on the {place} image ?", CLASSES[found]))
                which = f"which image shows the {CLASSES[found]} ?"
            if seen.count(found) == 1:
                blocks.append((kind.replace("match", "which"), which, place))
            elif place != "first":
                blocks.append((kind.replace("match", "also"), f"{which[:-2]} as the first ?", place))
    return Sample(list(rows), blocks, [[], [], []])


class Sampler:
    """Draws samples of each step type from a pool; `draw(kind, n, rng)`."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.portraits = np.flatnonzero(pool.portrait)
        self.by_style = [np.flatnonzero(pool.style == s) for s in range(len(STYLES))]
        portrait_class = np.where(pool.portrait, pool.things[:, 0, 0], -1)
        self.by_class = [np.flatnonzero(portrait_class == c) for c in range(len(CLASSES))]

    def draw(self, kind: str, count: int, rng: np.random.Generator, hints: bool = True) -> list[Sample]:
        out: list[Sample] = []
        while len(out) < count:
            sample = self._one(kind, rng, hints)
            if sample is not None and sample.blocks:
                out.append(sample)
        return out

    def _one(self, kind: str, rng: np.random.Generator, hints: bool) -> Sample | None:
        if kind == "single":
            return single_image_sample(self.pool, int(rng.integers(len(self.pool))), rng)
        if kind == "marked":
            return marked_sample(self.pool, int(rng.choice(self.portraits)), rng)
        if kind == "correspondence":
            rows = rng.choice(self.by_class[int(rng.integers(len(CLASSES)))], 2, replace=False)
            pair = int(rows[0]), int(rows[1])
            if hints and rng.random() < 0.25:
                return lettered_pair_sample(self.pool, pair, rng)
            return correspondence_sample(self.pool, pair, rng, hints)
        groups = self.by_style if kind == "style_match" else self.by_class
        same, other = rng.choice(len(groups), 2, replace=False)
        reference, match = rng.choice(groups[same], 2, replace=False)
        rest = [int(match), int(rng.choice(groups[other]))]
        if rng.random() < 0.5:
            rest.reverse()
        return triple_sample(self.pool, (int(reference), *rest), kind, hints)


@dataclass
class Packed:
    """`tokens`, `positions`, `labels` (B, T) int64; `mask` (B, 1, T, T) bool, True where attention is allowed;
    `block` (B, T) number of the block from 1, 0 shared, -1 padding; `images` list of (pool row, marks), in the order of
    the image slots; `kinds` the question kinds of each sequence's blocks."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    block: torch.Tensor
    images: list[tuple[int, list]]
    kinds: list[list[str]]

    def to(self, device) -> "Packed":
        moved = {n: getattr(self, n).to(device) for n in ("tokens", "positions", "labels", "mask", "block")}
        return replace(self, **moved)


def pack(samples: list[Sample], image_slots: int) -> Packed:
    """Sequences, right-padded to one length. Labels stand on the token *before* each answer token (already shifted)."""
    rows = []
    for sample in samples:
        tokens = list(encode(sample.prefix))
        if sample.question_first:
            tokens += encode(sample.blocks[0][1])
        for place, _ in zip(q.NTH, sample.images):  # several images are announced: "first <image> second <image>"
            tokens += [TOKEN[place]] * (len(sample.images) > 1) + [IMAGE] * image_slots
        shared = len(tokens)
        positions, block, labels = list(range(shared)), [0] * shared, [IGNORE] * shared
        for number, (_, question, answer) in enumerate(sample.blocks, start=1):
            asked = [*(() if sample.question_first else encode(question)), TOKEN[":"]]
            answered = [*encode(answer), EOS]
            tokens += asked + answered[:-1]
            labels += [IGNORE] * (len(asked) - 1) + answered
            length = len(asked) + len(answered) - 1
            positions += range(shared, shared + length)
            block += [number] * length
        rows.append((tokens, positions, block, labels))
    longest = max(len(row[0]) for row in rows)
    fill = (PAD, 0, -1, IGNORE)
    columns = [
        torch.from_numpy(np.array([row[i] + [fill[i]] * (longest - len(row[0])) for row in rows], dtype=np.int64))
        for i in range(4)
    ]
    tokens, positions, block, labels = columns
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    same = block[:, :, None] == block[:, None, :]
    mask = (causal & (same | (block == 0)[:, None, :]))[:, None]
    images = [(row, marks) for s in samples for row, marks in zip(s.images, s.marks, strict=True)]
    return Packed(tokens, positions, labels, mask, block, images, [[b[0] for b in s.blocks] for s in samples])


def pixel_batch(pool: Pool, images: list[tuple[int, list]]) -> torch.Tensor:
    """(n, 3, 96, 96) float32 in [-1, 1], marks painted on."""
    out = np.stack([pool.images[row] for row, _ in images])
    for picture, (_, marks) in zip(out, images):
        for letter, x, y in marks:
            draw_mark(picture, letter, x, y)
    return torch.from_numpy(out).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
