"""COCO segmentations (polygons, plain or compressed run lengths) as masks, pixel for pixel as pycocotools.

Run lengths are column-major and start with a run of zeros. A polygon is drawn as the COCO mask API does:
edges are walked on a grid five times finer, the crossings of pixel-column centres toggle inside and outside.
"""

from collections.abc import Sequence

import numpy as np

from kvutils.datasets.files import expect

_FINER = 5  # steps per pixel along an edge


def rle_from_string(text: str | bytes) -> list[int]:
    """Run lengths of a compressed COCO string: 5 bits a character, counts relative to two runs before."""
    data = text.encode("ascii") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for position, byte in enumerate(data):
        bits = byte - 48
        expect(0 <= bits < 64, f"compressed run lengths: character {position} ({byte!r}) is outside '0'..'o'")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:  # the last group of this count; its fifth bit is the sign
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    expect(not shift, "compressed run lengths end in the middle of a count: the string is truncated")
    return counts


def rle_decode(counts: Sequence[int] | str | bytes, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of run lengths, plain or compressed; DataError if they do not fill it."""
    if isinstance(counts, (str, bytes)):
        counts = rle_from_string(counts)
    runs = np.asarray(counts, dtype=np.int64)
    fit = runs.ndim == 1 and (runs >= 0).all() and runs.sum() == height * width
    expect(fit, f"run lengths sum to {runs.sum()}, expected {height} x {width} = {height * width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape((height, width), order="F")


def polygon_mask(polygon: Sequence[float], height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of one polygon [x0, y0, x1, y1, ...] in pixels."""
    points = np.asarray(polygon, dtype=np.float64)
    flat = points.ndim == 1 and len(points) % 2 == 0 and len(points) >= 6 and np.isfinite(points).all()
    expect(flat, f"a polygon is a flat list of at least 3 finite x, y pairs, found {len(points)} numbers")
    corners = (_FINER * points.reshape(-1, 2) + 0.5).astype(np.int64)  # truncation, as the C code
    x, y = np.concatenate([_walk(a, b) for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)]).T
    moved = np.flatnonzero(x[1:] != x[:-1]) + 1
    column = (np.where(x[moved] < x[moved - 1], x[moved], x[moved] - 1) + 0.5) / _FINER - 0.5
    row = (np.minimum(y[moved], y[moved - 1]) + 0.5) / _FINER - 0.5
    kept = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    row = np.ceil(np.clip(row[kept], 0, height))
    toggles = (column[kept] * height + row).astype(np.int64)
    inside = np.bincount(toggles, minlength=height * width + 1).cumsum() % 2 == 1
    return inside[: height * width].reshape((height, width), order="F")


def _walk(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Points (n, 2) of one edge on the finer grid, both ends included, in order from start to end."""
    dx, dy = np.abs(end - start)
    main = 0 if dx >= dy else 1  # the axis that is stepped; the other is rounded
    flip = start[main] > end[main]
    low, high = (end, start) if flip else (start, end)
    steps = np.arange(max(dx, dy) + 1)
    slope = (high[1 - main] - low[1 - main]) / max(dx, dy, 1)
    points = np.empty((len(steps), 2), dtype=np.int64)
    points[:, main] = low[main] + steps
    points[:, 1 - main] = (low[1 - main] + slope * steps + 0.5).astype(np.int64)
    return points[::-1] if flip else points


def segmentation_mask(segmentation, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of a COCO `segmentation`: inside any of its polygons, or run lengths {"size", "counts"}."""
    if isinstance(segmentation, dict):
        size = tuple(segmentation.get("size", (height, width)))
        expect(size == (height, width), f"run lengths are for an image of {size}, expected height, width = {(height, width)}")
        return rle_decode(segmentation["counts"], height, width)
    expect(segmentation, "an empty segmentation has no mask; leave the annotation out")
    return np.any([polygon_mask(polygon, height, width) for polygon in segmentation], axis=0)
