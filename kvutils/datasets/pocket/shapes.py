"""Silhouettes of the eight object classes, in a unit frame: x to the right (the object's front), y down.

A silhouette is a union of polygons and ellipses; `DETAILS` are darker parts painted on top (eyes, windows, wheels).
Every class has the same five named key points, so that correspondence has a meaning across two objects of a class.
The front is always to the right, so a mirrored object is told from an unmirrored one by its shape."""

import math
from collections.abc import Sequence

import numpy as np

CLASSES = ("fish", "bird", "car", "boat", "tree", "house", "cup", "flag")
PLURALS = ("fishes", "birds", "cars", "boats", "trees", "houses", "cups", "flags")
PARTS = ("front", "back", "top", "base", "middle")


def _ellipse(x: float, y: float, rx: float, ry: float, steps: int = 28) -> np.ndarray:
    turn = [2 * math.pi * i / steps for i in range(steps)]
    return np.array([(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turn])


def _box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


SILHOUETTES = {
    "fish": [_ellipse(0.15, 0.0, 0.78, 0.45), [(-0.45, 0.0), (-1.0, -0.52), (-0.82, 0.0), (-1.0, 0.52)],
             [(-0.15, -0.38), (0.1, -0.8), (0.45, -0.35)]],
    "bird": [_ellipse(-0.05, 0.12, 0.55, 0.36), _ellipse(0.52, -0.25, 0.27, 0.27), [(0.7, -0.42), (1.05, -0.22), (0.7, -0.1)],
             [(-0.45, 0.05), (-1.0, -0.35), (-0.95, 0.22)], [(-0.3, 0.0), (-0.3, -0.85), (0.25, -0.05)]],
    "car": [_box(-0.98, -0.12, 0.98, 0.36), [(-0.92, -0.1), (-0.8, -0.58), (0.12, -0.58), (0.4, -0.1)],
            _ellipse(-0.52, 0.4, 0.25, 0.25), _ellipse(0.55, 0.4, 0.25, 0.25)],
    "boat": [[(-0.85, 0.3), (1.0, 0.22), (0.6, 0.75), (-0.65, 0.75)], _box(-0.06, -0.95, 0.06, 0.35),
             [(-0.12, -0.85), (-0.12, 0.18), (-0.75, 0.18)], [(0.1, -0.6), (0.1, 0.15), (0.6, 0.15)]],
    "tree": [_ellipse(0.0, -0.35, 0.62, 0.6), _box(-0.13, 0.1, 0.13, 0.98),
             [(0.05, 0.62), (0.62, 0.3), (0.7, 0.42), (0.05, 0.8)], _ellipse(0.7, 0.3, 0.2, 0.17)],
    "house": [_box(-0.7, -0.1, 0.7, 0.85), [(-0.92, -0.08), (0.0, -0.9), (0.92, -0.08)], _box(-0.66, -0.95, -0.38, -0.3),
              [(0.65, 0.35), (1.0, 0.5), (1.0, 0.85), (0.65, 0.85)]],
    "cup": [[(-0.45, -0.7), (0.85, -0.7), (0.68, 0.75), (-0.28, 0.75)], _ellipse(-0.5, -0.05, 0.45, 0.42)],
    "flag": [_box(-0.78, -0.98, -0.58, 0.98),
             [(-0.6, -0.9), (0.2, -0.75), (0.98, -0.95), (0.8, -0.45), (0.98, 0.05), (0.2, 0.15), (-0.6, 0.0)]],
}  # fmt: skip
HOLES = {"cup": [_ellipse(-0.54, -0.05, 0.22, 0.2)]}  # the opening of the handle shows the background
DETAILS = {
    "fish": [_ellipse(0.55, -0.12, 0.1, 0.1)],
    "bird": [_ellipse(0.57, -0.3, 0.08, 0.08)],
    "car": [_ellipse(-0.52, 0.4, 0.14, 0.14), _ellipse(0.55, 0.4, 0.14, 0.14), _box(-0.68, -0.46, -0.3, -0.15)],
    "boat": [_box(-0.5, 0.44, 0.5, 0.54)],
    "tree": [_ellipse(-0.25, -0.45, 0.1, 0.1), _ellipse(0.2, -0.2, 0.1, 0.1), _ellipse(0.12, -0.65, 0.1, 0.1)],
    "house": [_box(0.12, 0.3, 0.42, 0.85), _box(-0.48, 0.12, -0.12, 0.42)],
    "cup": [_box(-0.38, -0.5, 0.78, -0.38)],
    "flag": [[(0.0, -0.55), (0.45, -0.6), (0.4, -0.2), (0.05, -0.15)]],
}
KEYPOINTS = {  # rows follow PARTS: front, back, top, base, middle
    "fish": [(0.9, 0.0), (-0.9, 0.0), (0.12, -0.7), (0.15, 0.4), (0.1, 0.0)],
    "bird": [(0.97, -0.23), (-0.92, -0.08), (-0.27, -0.72), (-0.05, 0.42), (-0.02, 0.1)],
    "car": [(0.92, 0.1), (-0.92, 0.1), (-0.35, -0.53), (0.55, 0.58), (0.05, 0.1)],
    "boat": [(0.88, 0.3), (-0.78, 0.34), (0.0, -0.9), (0.0, 0.7), (0.0, 0.1)],
    "tree": [(0.75, 0.3), (-0.55, -0.35), (0.0, -0.88), (0.0, 0.92), (0.0, 0.15)],
    "house": [(0.92, 0.65), (-0.62, 0.6), (0.0, -0.8), (0.27, 0.8), (0.0, 0.05)],
    "cup": [(0.78, -0.05), (-0.86, -0.05), (0.2, -0.65), (0.2, 0.7), (0.2, 0.0)],
    "flag": [(0.85, -0.45), (-0.64, -0.4), (-0.68, -0.92), (-0.68, 0.92), (0.2, -0.35)],
}


def place(points: Sequence | np.ndarray, x: float, y: float, radius: float, angle: float, flip: bool) -> np.ndarray:
    """Unit-frame points (K, 2) of an object at `(x, y)` px, `radius` px, rotated by `angle` radians: pixels (K, 2)."""
    unit = np.asarray(points, dtype=np.float64)
    if flip:
        unit = unit * (-1.0, 1.0)
    cos, sin = math.cos(angle), math.sin(angle)
    return unit @ np.array([[cos, sin], [-sin, cos]]) * radius + (x, y)
