"""What stage 1 learns from: windows of scenes, and which captions hold in each."""

import numpy as np
import torch

from kvutils.datasets.pocket.shapes import CLASSES, PARTS
from kvutils.datasets.pocket.world import COLOURS, DOMAINS, LETTERS, PRESENT, STYLES
from recipe.packing import PAD, encode, pixel_batch
from recipe.pool import GRID, Pool

CAPTIONS = (
    [f"a {c}" for c in CLASSES]
    + [f"a {k} {c}" for c in CLASSES for k in COLOURS]
    + [f"a {k} thing" for k in COLOURS]
    + [f"a {s} image" for s in STYLES]
    + [f"a {d} photo" for d in DOMAINS]
    + [f"point {letter}" for letter in LETTERS]
)


def caption_tokens() -> torch.Tensor:
    rows = [list(encode(c)) for c in CAPTIONS]
    return torch.tensor([row + [PAD] * (8 - len(row)) for row in rows])


def entailment(pool: Pool, rows: np.ndarray, first: np.ndarray, side: int, marks: list) -> tuple[np.ndarray, np.ndarray]:
    """Which captions hold in each window: labels and weights (B, captions). A thing of which only a small part is in
    the window makes its captions neither true nor false (weight 0)."""
    labels, weights = np.zeros((2, len(rows), len(CAPTIONS)), np.float32)
    weights += 1
    for b, row in enumerate(rows):
        r, c = first[b]
        for i in range(pool.things.shape[1]):
            cls, colour, _, _, visible, _ = pool.things[row, i]
            if cls < 0:
                continue
            total = pool.coverage[row, i].sum(dtype=float)
            share = pool.coverage[row, i, r : r + side, c : c + side].sum(dtype=float) / max(total, 1) * visible
            cls, colour = int(cls), int(colour)
            captions = [cls, 8 + cls * 8 + colour, 72 + colour]
            if share >= PRESENT:
                labels[b, captions] = 1
                weights[b, captions] = 1
            elif share > 0.03:
                weights[b, [k for k in captions if not labels[b, k]]] = 0
        labels[b, 80 + pool.style[row]] = 1
        labels[b, 85 + pool.domain[row]] = 1
        for letter, x, y in marks[b]:
            if r * 8 + 4 <= y <= (r + side) * 8 - 4 and c * 8 + 4 <= x <= (c + side) * 8 - 4:
                labels[b, 88 + LETTERS.index(letter)] = 1
            else:
                weights[b, 88 + LETTERS.index(letter)] = 0
    return labels, weights


def encoder_batch(pool: Pool, rows: np.ndarray, rng: np.random.Generator, whole: bool):
    """Pixels (B, 3, 96, 96), first patch (B, 2) and side of each window, labels and weights (B, captions)."""
    side, count = GRID if whole else 7, len(rows)
    first = np.zeros((count, 2), int)
    marks: list[list] = [[] for _ in rows]
    for b, row in enumerate(rows):
        things = [i for i in range(4) if pool.things[row, i, 0] >= 0]
        thing = things[int(rng.integers(len(things)))]
        if not whole:
            x, y = pool.things[row, thing, 2:4]
            corner = np.array([y, x]) / 8 - side / 2 + rng.uniform(-1.3, 1.3, 2)
            first[b] = np.clip(np.round(corner), 0, GRID - side)
        if rng.random() < 0.3:
            letters = rng.permutation(list(LETTERS))[: int(rng.integers(1, 4))]
            for letter, part in zip(letters, rng.permutation(len(PARTS))):
                x, y = pool.keypoints[row, thing, part, :2]
                marks[b].append((str(letter), float(np.clip(x, 4, 91)), float(np.clip(y, 4, 91))))
    pixels = pixel_batch(pool, list(zip(rows, marks)))
    labels, weights = entailment(pool, rows, first, side, marks)
    return pixels, torch.from_numpy(first), side, torch.from_numpy(labels), torch.from_numpy(weights)
