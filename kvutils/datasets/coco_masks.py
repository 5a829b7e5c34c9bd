"""COCO segmentations (polygons, plain or compressed run lengths) as masks, pixel for pixel as pycocotools.

Run lengths are column-major and start with a run of zeros. A polygon is drawn as the COCO mask API does:
edges are walked on a grid five times finer, the crossings of pixel-column centres toggle inside and outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvutils.errors import DataError, ParameterError

_FINER = 5  # steps per pixel along an edge


def rle_from_string(text: str | bytes) -> list[int]:
    """Run lengths of a compressed COCO string: 5 bits a character, counts relative to two runs before."""
    data = text.encode("ascii") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for position, byte in enumerate(data):
        bits = byte - 48
        if not 0 <= bits < 64:
            raise DataError(f"compressed run lengths: character {position} ({byte!r}) is outside '0'..'o'")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:  # the last group of this count; its fifth bit is the sign
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise DataError("compressed run lengths end in the middle of a count: the string is truncated")
    return counts


def rle_to_string(counts: Sequence[int]) -> str:
    """Inverse of `rle_from_string`."""
    characters = []
    for i, count in enumerate(counts):
        value = int(count) - (int(counts[i - 2]) if i > 2 else 0)
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != -1 if bits & 0x10 else value != 0
            characters.append(chr((bits | 0x20 if more else bits) + 48))
    return "".join(characters)


def rle_encode(mask: np.ndarray) -> list[int]:
    """Run lengths of a (height, width) binary mask; the first run is of zeros and may be 0 long."""
    flat = np.asarray(mask).astype(bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8)))
    return np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()


def rle_decode(counts: Sequence[int] | str | bytes, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of run lengths, plain or compressed; DataError if they do not fill it."""
    if isinstance(counts, (str, bytes)):
        counts = rle_from_string(counts)
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise DataError(
            f"run lengths sum to {runs.sum()}, expected {height} x {width} = {height * width} pixels"
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape((height, width), order="F")


def polygon_mask(polygon: Sequence[float], height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of one polygon [x0, y0, x1, y1, ...] in pixels."""
    points = np.asarray(polygon, dtype=np.float64)
    if points.ndim != 1 or len(points) % 2 or len(points) < 6 or not np.isfinite(points).all():
        raise DataError(
            f"a polygon is a flat list of at least 3 finite x, y pairs, found {len(points)} numbers"
        )
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


def segmentation_mask(segmentation, height: int, width: int, rule: str = "union") -> np.ndarray:
    """(height, width) bool mask of a COCO `segmentation`: polygons, or run lengths {"size", "counts"}.

    rule "union" (default): a pixel inside any polygon. rule "refer": a pixel inside exactly one polygon,
    which is what the RefCOCO toolkit's summed masks become in the evaluation of LAVT; they differ where
    polygons overlap.
    """
    if rule not in ("union", "refer"):
        raise ParameterError(f"rule must be 'union' or 'refer', found {rule!r}")
    if isinstance(segmentation, dict):
        size = tuple(segmentation.get("size", (height, width)))
        if size != (height, width):
            raise DataError(
                f"run lengths are for an image of {size}, expected height, width = {(height, width)}"
            )
        return rle_decode(segmentation["counts"], height, width)
    if not segmentation:
        raise DataError("an empty segmentation has no mask; leave the annotation out")
    layers = np.sum([polygon_mask(polygon, height, width) for polygon in segmentation], axis=0)
    return layers > 0 if rule == "union" else layers == 1


def mask_box(mask: np.ndarray) -> list[float]:
    """COCO box [x, y, width, height] in pixels around a mask; zeros where it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0.0, 0.0, 0.0, 0.0]
    x, y = columns[0], rows[0]
    return [float(x), float(y), float(columns[-1] - x + 1), float(rows[-1] - y + 1)]
