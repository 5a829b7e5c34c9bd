"""COCO segmentations (polygons, plain or compressed run lengths) as masks, pixel for pixel as pycocotools.

Run lengths are column-major and start with a run of zeros. A polygon is drawn as the COCO mask API does: edges are walked on a grid
five times finer, the crossings of pixel-column centres toggle inside and outside; an odd last number is left out, and parts of fewer
than three points enclose nothing. (pycocotools takes a first part of four numbers for a box, and so all others: that is not followed.)"""

from collections.abc import Sequence

import numpy as np

from kvutils.datasets.files import expect, reading

_FINER = 5  # steps per pixel along an edge
_BEYOND = 100  # times the picture: a corner further away is no pixel, and its edge would not fit the memory


def rle_from_string(text: str | bytes) -> list[int]:
    """Run lengths of a compressed COCO string: 5 bits a character, counts relative to two runs before."""
    data = text.encode("utf-8") if isinstance(text, str) else text
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
    runs, pixels = np.asarray(counts), height * width
    whole = runs.ndim == 1 and runs.dtype.kind in "iu" and ((runs >= 0) & (runs <= pixels)).all()  # or the sum might wrap round
    total = int(runs.sum()) if whole else f"no number of pixels ({str(counts)[:60]})"
    expect(total == pixels, f"run lengths sum to {total}, expected {height} x {width} = {pixels}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape((height, width), order="F")


def _inside(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of one polygon of corners (n, 2) x, y in pixels."""
    corners = (_FINER * corners + 0.5).astype(np.int64)  # truncation, as the C code
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


def check_segmentation(segmentation: object, height: int, width: int) -> list[np.ndarray] | list[int] | str | bytes:
    """What is to be drawn of a COCO `segmentation`: corners (n, 2) x, y of each polygon, or run lengths, plain or compressed.

    DataError for other content, for polygons that enclose nothing and for another picture's size; nothing is drawn yet."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size", [height, width]), segmentation.get("counts")
        own = isinstance(size, (list, tuple)) and tuple(size) == (height, width)
        expect(own, f"run lengths are for an image of {size}, expected height, width = {(height, width)}")
        expect(isinstance(counts, (list, str, bytes)), f"run lengths must be a list or text, found {str(counts)[:60]}")
        return counts
    expect(isinstance(segmentation, list), f"a segmentation is a list of polygons or run lengths, found {str(segmentation)[:60]}")
    found = []
    for polygon in segmentation:
        with reading("a polygon", "a flat list of finite x, y pairs in the picture"):
            numbers = np.asarray(polygon, dtype=np.float64)
            near = numbers.ndim == 1 and (np.abs(numbers) <= _BEYOND * max(height, width)).all()  # NaN is not
            expect(near, f"found {str(polygon)[:60]}")
        found.append(numbers[: len(numbers) // 2 * 2].reshape(-1, 2))
    found = [corners for corners in found if len(corners) >= 3]
    expect(found, f"a polygon has at least 3 points, found none such in {str(segmentation)[:60]}; leave the annotation out")
    return found


def segmentation_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of a COCO `segmentation`: inside any of its polygons, or run lengths {"size", "counts"}.
    Raises DataError."""
    parts = check_segmentation(segmentation, height, width)
    if isinstance(segmentation, dict):
        return rle_decode(parts, height, width)
    return np.any([_inside(corners, height, width) for corners in parts], axis=0)
