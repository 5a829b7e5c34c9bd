"""What stage 1 learns from: windows of scenes, and which captions hold in each."""

import numpy as np
import torch

from kvutils.datasets.pocket.shapes import CLASSES, PARTS
from kvutils.datasets.pocket.world import COLOURS, DOMAINS, LETTERS, PRESENT, STYLES, draw_mark
from recipe.packing import PAD, encode, to_pixels
from recipe.pool import GRID, PATCH, Pool
from recipe.samples import place_words

LONGEST = 7  # tokens of a caption, and one padding behind it at least, where CLIP reads it
PLACES = [f"{far}{side}" for side in ("left", "right", "top", "bottom") for far in ("", "far ")]
_POINTS = ("reference", *(f"({letter})" for letter in LETTERS[:4]))
CAPTIONS = (
    [f"a {c}" for c in CLASSES]
    + [f"a {k} {c}" for c in CLASSES for k in COLOURS]
    + [f"a {k} thing" for k in COLOURS]
    + [f"a {s} image" for s in STYLES]
    + [f"a {d} photo" for d in DOMAINS]
    + [f"a {c} {p}" for c in CLASSES for p in PLACES]
    + [f"point {point}" for point in _POINTS]
    + [f"point {point} at the {part}" for point in _POINTS for part in PARTS]
)
_NUMBER = {caption: number for number, caption in enumerate(CAPTIONS)}
GROUPS = {  # of captions, by the prefix of their number, for the held-out figures
    "class": slice(0, 8), "colour_class": slice(8, 72), "style": slice(80, 85), "light": slice(85, 88), "place": slice(88, 152),
    "letter": slice(152, 157), "part": slice(157, 182),
}  # fmt: skip


def caption_tokens() -> torch.Tensor:
    rows = [list(encode(c)) for c in CAPTIONS]
    return torch.tensor([row + [PAD] * (LONGEST - len(row)) for row in rows])


def entailment(pool: Pool, rows: np.ndarray, first: np.ndarray, side: int, marks: list) -> tuple[np.ndarray, np.ndarray]:
    """Which captions hold in each window: labels and weights (B, captions). A thing of which only a small part is in
    the window makes its captions neither true nor false (weight 0). marks: (point, part, x, y) of each window's scene."""
    labels, weights = np.zeros((2, len(rows), len(CAPTIONS)), np.float32)
    weights += 1
    for b, row in enumerate(rows):
        r, c = first[b]
        for i in range(pool.things.shape[1]):
            cls, colour, x, y, visible, _ = pool.things[row, i]
            if cls < 0:
                continue
            total = pool.coverage[row, i].sum(dtype=float)
            share = pool.coverage[row, i, r : r + side, c : c + side].sum(dtype=float) / max(total, 1) * visible
            kind, colour_name = CLASSES[int(cls)], COLOURS[int(colour)]
            captions = [f"a {kind}", f"a {colour_name} {kind}", f"a {colour_name} thing"]
            captions += [f"a {kind} {p}" for word in place_words(x, y) for p in {word, word.removeprefix("far ")}]
            captions = [_NUMBER[caption] for caption in captions]
            if share >= PRESENT:
                labels[b, captions] = 1
                weights[b, captions] = 1
            elif share > 0.03:
                weights[b, [k for k in captions if not labels[b, k]]] = 0
        labels[b, _NUMBER[f"a {STYLES[pool.style[row]]} image"]] = 1
        labels[b, _NUMBER[f"a {DOMAINS[pool.domain[row]]} photo"]] = 1
        for point, part, x, y in marks[b]:
            found = [_NUMBER[f"point {point}"], _NUMBER[f"point {point} at the {PARTS[part]}"]]
            if r * PATCH + 4 <= y <= (r + side) * PATCH - 4 and c * PATCH + 4 <= x <= (c + side) * PATCH - 4:
                labels[b, found] = 1
            else:
                weights[b, found] = 0
    return labels, weights


def encoder_batch(pool: Pool, rows: np.ndarray, rng: np.random.Generator, side: int, places: bool):
    """Pixels (B, 3, 96, 96), first patch (B, 2) and side of each window (`GRID`: the whole scene), labels and weights (B, captions).
    places: whether the tower is told where a window was cut; captions of places are left out where it is not."""
    whole, count = side == GRID, len(rows)
    first = np.zeros((count, 2), int)
    marks: list[list] = [[] for _ in rows]
    pictures = np.stack([pool.images[row] for row in rows])
    for b, row in enumerate(rows):
        things = [i for i in range(4) if pool.things[row, i, 0] >= 0]
        thing = things[int(rng.integers(len(things)))]
        if not whole:
            x, y = pool.things[row, thing, 2:4]
            corner = np.array([y, x]) / PATCH - side / 2 + rng.uniform(-1.3, 1.3, 2)
            first[b] = np.clip(np.round(corner), 0, GRID - side)
        seen = np.flatnonzero(pool.keypoints[row, thing, :, 2] > 0)
        if rng.random() < (0.5 if pool.portrait[row] else 0.15):
            points = rng.permutation(len(_POINTS))[: int(rng.integers(1, 5))]
            for number, part in zip(points, rng.permutation(seen), strict=False):  # letters or parts are left over
                x, y = map(float, pool.keypoints[row, thing, part, :2])
                marks[b].append((_POINTS[number], int(part), x, y))
                draw_mark(pictures[b], _POINTS[number].strip("()")[0], x, y)
    labels, weights = entailment(pool, rows, first, side, marks)
    if not (whole or places):
        weights[:, GROUPS["place"]] = 0
    return to_pixels(pictures), torch.from_numpy(first), side, torch.from_numpy(labels), torch.from_numpy(weights)
