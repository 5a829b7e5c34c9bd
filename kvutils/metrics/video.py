"""DAVIS-2017 semi-supervised video object segmentation: J and F, equal to davis2017-evaluation.

Objects are labelled 1.. in index masks (frames, height, width); 255 is void. The first frame is given and the last is not
scored. In the semi-supervised task the toolkit turns void into background instead of ignoring it, and so does this.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree

from kvutils import VOID
from kvutils.errors import DataError

_TOLERANCE = 0.008  # boundary tolerance as a share of the image diagonal


def region_similarity(prediction: np.ndarray, mask: np.ndarray) -> float:
    """J of one binary frame (H, W) bool: intersection over union; 1 for two empty masks."""
    union = (prediction | mask).sum()
    return float((prediction & mask).sum() / union) if union else 1.0


def boundary_f(prediction: np.ndarray, mask: np.ndarray) -> float:
    """F of one binary frame (H, W) bool: harmonic mean of boundary precision and recall; 1 if neither has a boundary.

    Boundaries match within ceil(0.008 * diagonal) pixels.
    """
    radius = np.ceil(_TOLERANCE * np.linalg.norm(mask.shape))
    said, true = np.argwhere(_boundary(prediction)), np.argwhere(_boundary(mask))  # thin: points, not frames, are compared
    if not len(said) or not len(true):
        return float(not len(said) and not len(true))
    precision, recall = _share_near(said, true, radius), _share_near(true, said, radius)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """One pixel wide: where a pixel differs from its right, lower or lower-right neighbour."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _share_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    """Share of the points within `radius` of one of the others: what a dilation by a disk would cover."""
    distance, _ = KDTree(others).query(points, distance_upper_bound=radius + 1e-6)
    return float((distance <= radius).mean())


def davis_sequence(result: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J, F: (objects, frames - 2) of one sequence of index masks (frames, height, width).

    The number of objects is the largest label of the first true mask; an object missing from the result scores as empty.
    DataError for a result label above that, for other shapes, fewer than 3 frames and a first mask without an object.
    """
    masks = np.where(masks == VOID, 0, masks)
    objects = int(masks[0].max())
    if result.shape != masks.shape or len(masks) < 3 or not objects or result[1:-1].max() > objects:
        raise DataError(f"result and masks must be one (frames >= 3, height, width) and show the objects of the first mask; found "
                        f"{result.shape} with labels to {result.max()} and {masks.shape} with {objects} objects")  # fmt: skip
    frames = [(result[t] == i, masks[t] == i) for i in range(1, objects + 1) for t in range(1, len(masks) - 1)]
    j, f = (np.array([measure(*pair) for pair in frames]).reshape(objects, -1) for measure in (region_similarity, boundary_f))
    return j, f
