"""Semantic segmentation over many classes: the evaluators of ImageNet-S and BDD100K."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from kvutils.errors import DataError

NAN = float("nan")
IMAGENET_S_IGNORE = 1000
# upper bound of an object's size in percent of the annotated pixels
_SIZES = {"S": 5, "MS": 25, "ML": 50, "L": 100}
_BOUNDARY = 0.03  # width of the boundary band as a share of the image diagonal
_EPS = 1e-10


def label_map(array, name: str) -> np.ndarray:
    """The array itself if it is a (height, width) map of bool or integer labels, else DataError."""
    array = np.asarray(array)
    if array.ndim != 2 or (array.dtype != bool and not np.issubdtype(array.dtype, np.integer)):
        raise DataError(
            f"{name} must be a (height, width) map of integer labels, found {array.dtype} {array.shape}; "
            "threshold scores and upsample them first"
        )
    return array


def label_pair(prediction, mask) -> tuple[np.ndarray, np.ndarray]:
    """Both as label maps of one shape, else DataError."""
    prediction, mask = label_map(prediction, "the prediction"), label_map(mask, "the mask")
    if prediction.shape != mask.shape:
        raise DataError(
            f"prediction {prediction.shape} and mask {mask.shape} differ in size; upsample the prediction"
        )
    return prediction, mask


def decode_imagenet_s(rgb: np.ndarray) -> np.ndarray:
    """(height, width) ids of a label image (height, width, 3): R + 256 G; 0 background, 1000 ignored."""
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[2] < 3 or rgb.dtype != np.uint8:
        raise DataError(
            f"an ImageNet-S label image is uint8 (height, width, 3), found {rgb.dtype} {rgb.shape}"
        )
    return rgb[..., 0] + 256 * rgb[..., 1].astype(np.int64)


def imagenet_s_scores(predictions: Iterable, masks: Iterable, num_classes: int) -> dict:
    """miou, ious, boundary_miou, accuracy, f_measure, S, MS, ML, L, as LUSSeg/ImageNet-S evaluator.py.

    Label maps of ids 0..num_classes; mask pixels of 1000 are ignored. miou and boundary_miou are means over
    *all* num_classes + 1 classes, background included, and a class that never occurs counts 0. accuracy:
    share of images whose largest predicted object class is present. f_measure: foreground against background,
    beta 0.3, mean over images. S..L: mean IoU over the classes that occur as objects of at most 5, 25, 50,
    100 percent of the pixels, NaN if none.
    """
    n_labels = num_classes + 1
    everywhere, boundary = np.zeros((2, 3, n_labels))  # rows: intersection, predicted, true pixels
    by_size = {name: np.zeros((3, n_labels)) for name in _SIZES}
    accuracy, f_measure = [], []
    for prediction, mask in zip(predictions, masks, strict=True):
        prediction, mask = label_pair(prediction, mask)
        valid = mask != IMAGENET_S_IGNORE
        said, true = prediction[valid].astype(np.int64), mask[valid].astype(np.int64)
        if true.size and (true.min() < 0 or true.max() > num_classes or said.min() < 0):
            raise DataError(f"labels must be 0..{num_classes} (or {IMAGENET_S_IGNORE} in the mask)")
        areas = _areas(said, true, n_labels)
        everywhere += areas
        boundary += _boundary_areas(prediction, mask, valid, n_labels)
        for name, members in _size_groups(true).items():
            if members:
                kept = np.isin(true, [0, *members])
                by_size[name] += _areas(said[kept], true[kept], n_labels)
        largest = areas[1, 1:].argmax() + 1
        accuracy.append(areas[1, largest] > 0 and areas[2, largest] > 0)
        f_measure.append(_f_measure(said > 0, true > 0))
    if not accuracy:
        raise DataError("no image to score")
    ious = _iou(everywhere)
    result = {
        "miou": float(ious.mean()),
        "ious": ious.tolist(),
        "boundary_miou": float(_iou(boundary).mean()),
    }
    result |= {"accuracy": float(np.mean(accuracy)), "f_measure": float(np.mean(f_measure))}
    for name, areas in by_size.items():
        occurs = areas[2] > 0
        result[name] = float(_iou(areas)[occurs].mean()) if occurs.any() else NAN
    return result


def _areas(said: np.ndarray, true: np.ndarray, n_labels: int) -> np.ndarray:
    """(3, n_labels) pixels: intersection, predicted, true; labels beyond the classes count nowhere."""
    parts = (said[said == true], said, true)
    return np.stack([np.bincount(part, minlength=n_labels)[:n_labels] for part in parts]).astype(float)


def _iou(areas: np.ndarray) -> np.ndarray:
    return areas[0] / (areas[1] + areas[2] - areas[0] + _EPS)


def _size_groups(true: np.ndarray) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {name: [] for name in _SIZES}
    labels, counts = np.unique(true, return_counts=True)
    for label, count in zip(labels, counts, strict=True):
        if label:
            percent = np.ceil(100.0 * count / true.size)
            groups[next(name for name, bound in _SIZES.items() if percent <= bound)].append(int(label))
    return groups


def _f_measure(said: np.ndarray, true: np.ndarray, beta: float = 0.3) -> float:
    both = (said & true).sum()
    if not both:
        return 0.0
    recall, precision = both / true.sum(), both / said.sum()
    return float((1 + beta) * precision * recall / (beta * precision + recall))


def _boundary_areas(prediction: np.ndarray, mask: np.ndarray, valid: np.ndarray, n_labels: int) -> np.ndarray:
    """As `_areas`, on every class's inner boundary band, found before ignored pixels are dropped."""
    areas = np.zeros((3, n_labels))
    for label in np.union1d(prediction, mask):
        if label < n_labels:
            said, true = (_band(labels == label) & valid for labels in (prediction, mask))
            areas[:, label] = (said & true).sum(), said.sum(), true.sum()
    return areas


def _band(region: np.ndarray) -> np.ndarray:
    width = max(1, round(_BOUNDARY * float(np.hypot(*region.shape))))
    return region & ~ndimage.binary_erosion(region, np.ones((3, 3)), iterations=width)


# --- BDD100K -----------------------------------------------------------------------------------------------


def confusion_matrix(prediction, mask, num_classes: int = 19, void: int = 255) -> np.ndarray:
    """(num_classes + 1, num_classes + 1) pixels of one image, true by predicted, as bdd100k/eval/seg.py.

    The last row and column are "ignored": void mask pixels are dropped (empty last row), predictions beyond
    the classes stay in the denominators (last column). prediction None, a missing file, is all ignored.
    """
    if prediction is None:
        prediction = np.full(np.shape(mask), num_classes)
    prediction, mask = label_pair(prediction, mask)
    true, said = mask.astype(np.int64), np.minimum(prediction.astype(np.int64), num_classes)
    if said.min(initial=0) < 0 or ((true != void) & ((true < 0) | (true > num_classes))).any():
        raise DataError(f"mask labels must be 0..{num_classes - 1}, {num_classes} (ignored) or {void} (void)")
    kept = true < num_classes
    size = num_classes + 1
    return np.bincount(size * true[kept] + said[kept], minlength=size**2).reshape(size, size)


def bdd_scores(confusion: np.ndarray) -> dict:
    """miou, ious, pixel_accuracy, frequency_iou of a summed confusion matrix.

    miou is over the classes that occur in the masks; the others have IoU 0. NaN if no pixel is annotated.
    """
    confusion = np.asarray(confusion, dtype=float)
    right, true = np.diag(confusion)[:-1], confusion.sum(axis=1)[:-1]
    union = true + confusion.sum(axis=0)[:-1] - right
    ious = np.divide(right, union, out=np.zeros_like(right), where=union > 0)
    if not true.any():
        return {"miou": NAN, "ious": ious.tolist(), "pixel_accuracy": NAN, "frequency_iou": NAN}
    return {
        "miou": float(ious[true > 0].mean()),
        "ious": ious.tolist(),
        "pixel_accuracy": float(right.sum() / true.sum()),
        "frequency_iou": float((ious * true).sum() / true.sum()),
    }


def mean_iou_statistic(weights: np.ndarray, confusions: np.ndarray) -> np.ndarray:
    """(n_boot,) mean IoU of resampled confusion matrices (n, K + 1, K + 1), for `bootstrap_ci`."""
    n, size, _ = confusions.shape
    sums = (weights @ confusions.reshape(n, -1).astype(float)).reshape(-1, size, size)
    right, true = np.diagonal(sums, axis1=1, axis2=2)[:, :-1], sums.sum(axis=2)[:, :-1]
    union = true + sums.sum(axis=1)[:, :-1] - right
    ious = right / np.maximum(union, 1)
    return ious.sum(axis=1) / np.maximum((true > 0).sum(axis=1), 1)
