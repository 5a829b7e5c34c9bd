"""From samples to training batches: many question blocks packed behind one image.

A packed sequence is `system prompt, prefix, image(s), block, block ...`. Every block sees what is before it once, and itself, and its
positions restart right after the last image, so that each block is exactly the prompt that the model meets at inference (the chat
template's), at a tenth of the cost. The blocks of all sequences begin at the same place and are cut into pieces no shorter than a
block, so that a piece attends to what is shared, to the piece before it and to itself (`recipe.model.packed_attention`): under half of
the products that one mask over everything would ask for.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from kvutils.datasets.pocket.world import draw_mark
from recipe.pool import Pool
from recipe.samples import Sample, marks_of
from recipe.tokenizer import ASSISTANT, END, NTH, SYSTEM, SYSTEM_PROMPT, USER, build_tokenizer

TOKENIZER = build_tokenizer()
TOKEN = TOKENIZER.get_vocab()
PAD, EOS, IMAGE = TOKEN["<pad>"], TOKEN[END], TOKEN["<image>"]
IGNORE = -100


@lru_cache(maxsize=300_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


HEAD = encode(f"{SYSTEM}{SYSTEM_PROMPT}{END}{USER}")
TURN = encode(END + ASSISTANT)  # between question and answer


@dataclass(frozen=True)
class ImageTokens:
    """How a model family writes an image: `begin` of every prompt and its `head`, up to what the user says; tokens `before` and `after`
    the `slots` image tokens; `grid` (rows, columns) where their positions have rows and columns of their own (Qwen2.5-VL)."""

    slots: int
    begin: tuple[int, ...] = ()
    head: tuple[int, ...] = HEAD
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None

    @property
    def ids(self) -> list[int]:
        return [*self.before, *[IMAGE] * self.slots, *self.after]

    def positions(self, start: int) -> np.ndarray:
        """(3, tokens): time, row and column, from `start` on."""
        if self.grid is None:
            return np.tile(np.arange(start, start + len(self.ids)), (3, 1))
        first = start + len(self.before)
        rows, columns = np.indices(self.grid).reshape(2, -1)
        inside = first + np.stack((np.zeros_like(rows), rows, columns))
        behind = first + max(self.grid) + np.arange(len(self.after))
        return np.concatenate((np.tile(np.arange(start, first), (3, 1)), inside, np.tile(behind, (3, 1))), axis=1)


@dataclass
class Packed:
    """`tokens`, `labels` (B, T) int64, `positions` (3, B, T), T = S + n C: S shared places, then n pieces of C;
    `shared` (B, 1, 1, S) and `own` (B, 1, n, C, 2 C) float32, 0 where a piece may attend to shared places, and to the piece
    before it and itself, else -10,000;
    `block` (B, T) number of the block from 1, 0 shared, -1 padding; `asked` places in (B T) that have a label; `images` list
    of (pool row, version), in the order of the image slots."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    shared: torch.Tensor
    own: torch.Tensor
    block: torch.Tensor
    asked: torch.Tensor
    images: list[tuple[int, int]]

    def to(self, device) -> "Packed":
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)})


def _head(sample: Sample, image: ImageTokens) -> tuple[list[int], np.ndarray]:
    """Tokens before the blocks and their positions (3, tokens)."""
    tokens = [*image.begin, *image.head, *encode(sample.prefix)]
    if sample.question_first:
        tokens += encode(sample.blocks[0][1])
    where = [np.tile(np.arange(len(tokens)), (3, 1))]
    for place, _ in zip(NTH, sample.images, strict=False):
        start = int(where[-1].max()) + 1 if where[-1].size else 0
        if len(sample.images) > 1:
            announced = encode(place)
            tokens += announced
            where.append(np.tile(np.arange(start, start + len(announced)), (3, 1)))
            start += len(announced)
        tokens += image.ids
        where.append(image.positions(start))
    return tokens, np.concatenate(where, axis=1)


def pack(samples: list[Sample], image: ImageTokens, limit: int | None = None) -> Packed:
    """Sequences, both parts right-padded to one length. Labels stand on the token *before* each answer token (already shifted).

    limit: tokens of the blocks of one sequence, at least one block; those that go beyond it are left out (a third would be padding)."""
    heads, tails, piece = [], [], 1
    for sample in samples:
        head, where = _head(sample, image)
        heads.append((head, where))
        start = int(where.max()) + 1
        tokens, positions, block, labels = [], [], [], []
        for number, (_, question, answer) in enumerate(sample.blocks, start=1):
            asked = [*(() if sample.question_first else encode(question)), *TURN]
            answered = [*encode(answer), EOS]
            if limit and tokens and len(tokens) + len(asked) + len(answered) > limit:
                break
            tokens += asked + answered[:-1]
            labels += [IGNORE] * (len(asked) - 1) + answered
            length = len(asked) + len(answered) - 1
            positions += range(start, start + length)
            block += [number] * length
            piece = max(piece, length)
        tails.append((tokens, positions, block, labels))
    places, longest = max(len(head) for head, _ in heads), max(len(tail[0]) for tail in tails)
    pieces = longest // piece
    piece = -(-longest // pieces)
    shape = (len(samples), places + pieces * piece)
    tokens, block, labels = (np.full(shape, fill, np.int64) for fill in (PAD, -1, IGNORE))
    positions = np.zeros((3, *shape), np.int64)
    for row, ((head, where), tail) in enumerate(zip(heads, tails, strict=True)):
        tokens[row, : len(head)], positions[:, row, : len(head)], block[row, : len(head)] = head, where, 0
        here = slice(places, places + len(tail[0]))
        tokens[row, here], positions[:, row, here], block[row, here], labels[row, here] = tail
    block = torch.from_numpy(block)
    here = block[:, places:].unflatten(1, (pieces, piece))
    both = torch.cat((nn.functional.pad(here[:, :-1], (0, 0, 1, 0), value=-2), here), dim=-1)
    causal = torch.ones(piece, 2 * piece, dtype=torch.bool).tril(piece)
    own = causal & (here[..., None] == both[..., None, :])
    masks = [torch.where(allowed, 0.0, -1e4)[:, None] for allowed in ((block[:, :places] == 0)[:, None], own)]
    tokens, positions, labels = map(torch.from_numpy, (tokens, positions, labels))
    return Packed(tokens, positions, labels, *masks, block, (labels.flatten() >= 0).nonzero()[:, 0],
                  [image for s in samples for image in s.images])  # fmt: skip


def paint(pool: Pool, images: list[tuple[int, int]]) -> np.ndarray:
    """(n, 96, 96, 3) uint8 pictures of (row, version): the marks of `marks_of` painted on."""
    out = np.stack([pool.images[row] for row, _ in images])
    for picture, (row, version) in zip(out, images, strict=True):
        for letter, part in marks_of(pool, row, version):
            draw_mark(picture, letter, *map(float, pool.keypoints[row, 0, part, :2]))
    return out


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """(n, 3, 96, 96) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def pixel_batch(pool: Pool, images: list[tuple[int, int]]) -> torch.Tensor:
    return to_pixels(paint(pool, images))
