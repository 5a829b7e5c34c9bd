"""From samples to training batches: many question blocks packed behind one image.

A packed sequence is `prefix image(s) block block ...`. Every block sees the prefix, the images and itself, and its
positions restart right after the last image, so that each block is exactly the prompt `prefix images question` that
the model meets at inference, at a tenth of the cost.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

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
        for place, _ in zip(NTH, sample.images):
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
