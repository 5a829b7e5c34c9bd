"""DAVIS-2017 semi-supervised video object segmentation: J, F and J&F, equal to davis2017-evaluation.

Objects are labelled 1.. in index masks (frames, height, width); 255 is void. The first frame is given and the
last is not scored. In the semi-supervised task the toolkit turns void into background instead of ignoring it,
and so does this.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.spatial import KDTree

from kvutils.datasets.samples import VOID
from kvutils.errors import DataError

_TOLERANCE = 0.008  # boundary tolerance as a share of the image diagonal


def _check_frames(prediction, mask, void) -> tuple[np.ndarray, np.ndarray]:
    prediction, mask = np.asarray(prediction).astype(bool), np.asarray(mask).astype(bool)
    if prediction.ndim != 2 or prediction.shape != mask.shape:
        raise DataError(f"prediction {prediction.shape} and mask {mask.shape} must be one (height, width)")
    if void is not None:
        void = np.asarray(void).astype(bool)
        if void.shape != mask.shape:
            raise DataError(f"void pixels {void.shape} and mask {mask.shape} differ in size")
        prediction, mask = prediction & ~void, mask & ~void
    return prediction, mask


def region_similarity(prediction, mask, void=None) -> float:
    """J of one binary frame: intersection over union without the void pixels; 1 for two empty masks."""
    prediction, mask = _check_frames(prediction, mask, void)
    union = (prediction | mask).sum()
    return float((prediction & mask).sum() / union) if union else 1.0


def boundary_f(prediction, mask, void=None, tolerance: float = _TOLERANCE) -> float:
    """F of one binary frame: harmonic mean of boundary precision and recall; 1 if neither has a boundary.

    Boundaries match within ceil(tolerance * diagonal) pixels; tolerance >= 1 is in pixels. Void is background
    in both.
    """
    prediction, mask = _check_frames(prediction, mask, void)
    radius = tolerance if tolerance >= 1 else np.ceil(tolerance * np.linalg.norm(mask.shape))
    said, true = _boundary(prediction), _boundary(mask)
    if not said.any() or not true.any():
        return float(not said.any() and not true.any())
    said, true = np.argwhere(said), np.argwhere(true)  # boundaries are thin: points, not frames, are compared
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

    The number of objects is the largest label of the first true mask; an object missing from the result
    scores as empty. DataError for a result label above that, for other shapes and for fewer than 3 frames.
    """
    result, masks = np.asarray(result), np.asarray(masks)
    if result.shape != masks.shape or masks.ndim != 3 or len(masks) < 3:
        raise DataError(
            f"result {result.shape} and masks {masks.shape} must be one (frames >= 3, height, width)"
        )
    masks = np.where(masks == VOID, 0, masks)
    objects, result, masks = int(masks[0].max()), result[1:-1], masks[1:-1]
    if not objects:
        raise DataError("the first frame's mask has no object to follow")
    if result.max() > objects:
        raise DataError(
            f"the result has label {result.max()}, but the first frame has only {objects} objects"
        )
    frames = range(len(masks))
    pairs = [[(result[t] == i, masks[t] == i) for t in frames] for i in range(1, objects + 1)]
    j = np.array([[region_similarity(*pair) for pair in row] for row in pairs])
    f = np.array([[boundary_f(*pair) for pair in row] for row in pairs])
    return j, f


def davis_scores(results: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> dict:
    """J_mean, J_recall, J_decay, J_per_object ({"<sequence>_<i>": mean}), the same of F, and JF_mean.

    Means are over the objects of all sequences. recall: share of frames above 0.5; decay: first quarter minus
    last.
    """
    if not masks or set(results) != set(masks):
        missing, extra = sorted(set(masks) - set(results)), sorted(set(results) - set(masks))
        raise DataError(f"results and masks must name the same sequences; missing {missing}, unknown {extra}")
    rows: dict[str, dict[str, np.ndarray]] = {"J": {}, "F": {}}
    for name, true in masks.items():
        try:
            scores = davis_sequence(results[name], true)
        except DataError as error:
            raise DataError(f"sequence {name}: {error}") from error
        for measure, values in zip("JF", scores, strict=True):
            rows[measure] |= {f"{name}_{i}": row for i, row in enumerate(values, start=1)}
    result: dict = {}
    for measure, values in rows.items():
        per_object = {name: float(row.mean()) for name, row in values.items()}
        result[f"{measure}_mean"] = float(np.mean(list(per_object.values())))
        result[f"{measure}_recall"] = float(np.mean([(row > 0.5).mean() for row in values.values()]))
        result[f"{measure}_decay"] = float(np.mean([_decay(row) for row in values.values()]))
        result[f"{measure}_per_object"] = per_object
    result["JF_mean"] = (result["J_mean"] + result["F_mean"]) / 2
    return result


def _decay(row: np.ndarray) -> float:
    edges = (np.round(np.linspace(1, len(row), 5) + 1e-10) - 1).astype(int)
    return float(row[edges[0] : edges[1] + 1].mean() - row[edges[3] : edges[4] + 1].mean())
