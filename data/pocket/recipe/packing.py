"""From samples to training batches: many question blocks packed behind one image.

A packed sequence is `prefix image(s) block block ...`. Every block sees the prefix, the images and itself, and its
positions restart right after the last image, so that each block is exactly the prompt `prefix images question` that
the model meets at inference, at a tenth of the cost. The blocks of all sequences begin at the same place and are cut
into pieces no shorter than a block, so that a piece attends to what is shared, to the piece before it and to itself
(`recipe.model.packed_attention`): under half of the products that one mask over everything would ask for.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from kvutils.datasets.pocket.world import draw_mark
from recipe.pool import Pool
from recipe.samples import NTH, Sample
from recipe.tokenizer import WORDS, build_word_tokenizer

TOKEN = build_word_tokenizer(list(WORDS)).get_vocab()
PAD, EOS, IMAGE = TOKEN["<pad>"], TOKEN["<eos>"], TOKEN["<image>"]
IGNORE = -100


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKEN[word] for word in text.split())


@dataclass
class Packed:
    """`tokens`, `positions`, `labels` (B, T) int64, T = S + n C: S shared places, then n pieces of C;
    `shared` (B, 1, 1, S) and `own` (B, 1, n, C, 2 C) float32, 0 where a piece may attend to shared places, and to the piece
    before it and itself, else -10,000;
    `block` (B, T) number of the block from 1, 0 shared, -1 padding; `asked` places in (B T) that have a label; `images` list
    of (pool row, marks), in the order of the image slots; `kinds` the question kinds of each sequence's blocks."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    shared: torch.Tensor
    own: torch.Tensor
    block: torch.Tensor
    asked: torch.Tensor
    images: list[tuple[int, list]]
    kinds: list[list[str]]

    def to(self, device) -> "Packed":
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)})


def pack(samples: list[Sample], image_slots: int) -> Packed:
    """Sequences, both parts right-padded to one length. Labels stand on the token *before* each answer token (already shifted)."""
    heads, tails, piece = [], [], 1
    for sample in samples:
        tokens = list(encode(sample.prefix))
        if sample.question_first:
            tokens += encode(sample.blocks[0][1])
        for place, _ in zip(NTH, sample.images):
            tokens += [TOKEN[place]] * (len(sample.images) > 1) + [IMAGE] * image_slots
        shared = len(tokens)
        heads.append((tokens, range(shared), [0] * shared, [IGNORE] * shared))
        tokens, positions, block, labels = [], [], [], []
        for number, (_, question, answer) in enumerate(sample.blocks, start=1):
            asked = [*(() if sample.question_first else encode(question)), TOKEN[":"]]
            answered = [*encode(answer), EOS]
            tokens += asked + answered[:-1]
            labels += [IGNORE] * (len(asked) - 1) + answered
            length = len(asked) + len(answered) - 1
            positions += range(shared, shared + length)
            block += [number] * length
            piece = max(piece, length)
        tails.append((tokens, positions, block, labels))
    places, longest = (max(len(row[0]) for row in part) for part in (heads, tails))
    pieces = longest // piece
    piece = -(-longest // pieces)
    tokens, positions, block, labels = np.empty((4, len(samples), places + pieces * piece), np.int64)
    for column, values, fill in zip((tokens, positions, block, labels), range(4), (PAD, 0, -1, IGNORE), strict=True):
        column.fill(fill)
        for line, head, tail in zip(column, heads, tails, strict=True):
            line[: len(head[0])] = head[values]
            line[places : places + len(tail[0])] = tail[values]
    block = torch.from_numpy(block)
    here = block[:, places:].unflatten(1, (pieces, piece))
    both = torch.cat((nn.functional.pad(here[:, :-1], (0, 0, 1, 0), value=-2), here), dim=-1)
    causal = torch.ones(piece, 2 * piece, dtype=torch.bool).tril(piece)
    own = causal & (here[..., None] == both[..., None, :])
    masks = [torch.where(allowed, 0.0, -1e4)[:, None] for allowed in ((block[:, :places] == 0)[:, None], own)]
    images = [(row, marks) for s in samples for row, marks in zip(s.images, s.marks, strict=True)]
    tokens, positions, labels = map(torch.from_numpy, (tokens, positions, labels))
    return Packed(tokens, positions, labels, *masks, block,
                  (labels.flatten() >= 0).nonzero()[:, 0], images, [[b[0] for b in s.blocks] for s in samples])  # fmt: skip


def pixel_batch(pool: Pool, images: list[tuple[int, list]]) -> torch.Tensor:
    """(n, 3, 96, 96) float32 in [-1, 1], marks painted on."""
    out = np.stack([pool.images[row] for row, _ in images])
    for picture, (_, marks) in zip(out, images):
        for letter, x, y in marks:
            draw_mark(picture, letter, x, y)
    return torch.from_numpy(out).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
