"""Every metric of the replication, each equal to the field's reference implementation.

Here: binary masks, boxes and key points. Many-class maps are in `semantic_metrics`, videos in
`video_metrics`, questions in `question_metrics`, bootstrap intervals in `statistics`; all are re-exported.
Scores are fractions in 0..1. Masks are bool or integer (height, width) arrays in which `VOID` (255) means no
annotation. What a reference leaves undefined (0/0) is NaN.

Semantic segmentation over many classes: the evaluators of ImageNet-S and BDD100K.

Statistics over columns of a score table, and pixel counts of all sources at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score

from kvutils.datasets.samples import VOID
from kvutils.errors import DataError, ParameterError
from kvutils.metrics.statistics import Statistic

NAN = float("nan")


def _binary_pair(prediction, mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """prediction, mask, valid as bool arrays of one shape; only the mask may hold VOID."""
    prediction, mask = label_pair(prediction, mask)
    if prediction.dtype != bool and ((prediction != 0) & (prediction != 1)).any():
        raise DataError("a binary prediction must hold only 0 and 1")
    true, valid = _binary_mask(mask)
    return prediction.astype(bool), true, valid


def _binary_mask(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if mask.dtype == bool:
        return mask, np.ones(mask.shape, bool)
    if ((mask != 0) & (mask != 1) & (mask != VOID)).any():
        raise DataError(f"a binary mask must hold only 0, 1 and {VOID} (void)")
    return mask == 1, mask != VOID


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ParameterError(f"{name} must be one of {', '.join(allowed)}; found {value!r}")


# --- foreground segmentation (Pascal-5i) -------------------------------------------------------------------


def foreground_counts(prediction, mask) -> np.ndarray:
    """[[I_background, I_foreground], [U_background, U_foreground]] in pixels; void left out."""
    predicted, true, valid = _binary_pair(prediction, mask)
    both = (predicted & true).sum()
    either = ((predicted | true) & valid).sum()
    return np.array([[valid.sum() - either, both], [valid.sum() - both, either]], dtype=np.int64)


def foreground_iou(counts: np.ndarray, classes: Sequence[int], class_ids: Sequence[int]) -> dict:
    """miou (foreground, mean over `class_ids`), fb_iou, class_iou of few-shot episodes, as HSNet.

    counts (n, 2, 2): `foreground_counts` of each episode; classes (n,): its class; class_ids: the classes of
    the fold. I and U are summed over a class's episodes; a class without episodes counts 0 (denominator
    max(U, 1)); fb_iou is NaN when background or foreground never occurs. Episodes of other classes do not
    count.
    """
    counts, classes = np.asarray(counts), np.asarray(classes)
    if counts.shape != (len(classes), 2, 2):
        raise DataError(f"counts must have shape ({len(classes)}, 2, 2), found {counts.shape}")
    sums = np.array([counts[classes == c].sum(axis=0) for c in class_ids], float)  # (classes, I/U, bg/fg)
    class_iou = sums[:, 0, 1] / np.maximum(sums[:, 1, 1], 1)
    fb = [i / u if u else NAN for i, u in sums.sum(axis=0).T]
    return {"miou": float(class_iou.mean()), "fb_iou": float(np.mean(fb)), "class_iou": class_iou.tolist()}


# --- co-segmentation and referring expressions -------------------------------------------------------------


def intersection_union(prediction, mask) -> tuple[int, int]:
    """(I, U) of the foreground in pixels; void pixels are left out."""
    predicted, true, valid = _binary_pair(prediction, mask)
    return int((predicted & true).sum()), int(((predicted | true) & valid).sum())


def jaccard(prediction, mask, rule: str = "one") -> float:
    """I / U of the foreground, void left out. rule for an empty union: "one" (as DAVIS) or "zero"."""
    _choice("rule", rule, ("one", "zero"))
    intersection, union = intersection_union(prediction, mask)
    return intersection / union if union else float(rule == "one")


def pixel_precision(prediction, mask) -> float:
    """Share of correctly labelled pixels, foreground and background: the P of co-segmentation tables."""
    predicted, true, valid = _binary_pair(prediction, mask)
    return float((predicted == true)[valid].mean()) if valid.any() else NAN


def refseg_scores(
    counts: np.ndarray, convention: str = "lavt", thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9)
) -> dict:
    """ious, miou, oiou, precision_at of RefCOCO. counts (n, 2): `intersection_union` of each *sentence*.

    lavt (default): IoU 0 for an empty union; oIoU = sum I / sum U, NaN if every union is empty.
    lisa: IoU = I / (U + 1e-5), 1 for an empty union; oIoU (cIoU there) = sum I / (sum U + 1e-10).
    precision_at[t] is the share of sentences with IoU >= t.
    """
    _choice("convention", convention, ("lavt", "lisa"))
    counts = np.asarray(counts, dtype=float)
    if counts.ndim != 2 or counts.shape[1] != 2 or not len(counts):
        raise DataError(f"counts must have shape (sentences >= 1, 2), found {counts.shape}")
    intersection, union = counts.T
    if convention == "lavt":
        ious = intersection / np.maximum(union, 1)
        oiou = intersection.sum() / union.sum() if union.any() else NAN
    else:
        ious = intersection / (union + 1e-5) + (union == 0)
        oiou = intersection.sum() / (union.sum() + 1e-10)
    precision = {t: float((ious >= t).mean()) for t in thresholds}
    return {"ious": ious.tolist(), "miou": float(ious.mean()), "oiou": float(oiou), "precision_at": precision}


def pixel_average_precision(scores, mask) -> float:
    """Average precision over the pixels of a score map (height, width); NaN without foreground."""
    scores, (true, valid) = np.asarray(scores, dtype=float), _binary_mask(label_map(mask, "the mask"))
    if scores.shape != true.shape:
        raise DataError(f"scores {scores.shape} and mask {true.shape} differ in size; upsample the scores")
    if not np.isfinite(scores).all():
        raise DataError("the score map holds NaN or infinite values")
    return float(average_precision_score(true[valid], scores[valid])) if true.any() else NAN


def largest_region_box(mask) -> tuple[int, int, int, int] | None:
    """x0, y0, x1, y1 (exclusive) around the largest 8-connected region (first of equals); None if empty."""
    regions, n = ndimage.label(label_map(mask, "the mask") == 1, structure=np.ones((3, 3)))
    if not n:
        return None
    largest = np.bincount(regions.ravel())[1:].argmax()
    rows, columns = ndimage.find_objects(regions)[largest]
    return columns.start, rows.start, columns.stop, rows.stop


def box_iou(a: Sequence[float] | None, b: Sequence[float] | None) -> float:
    """IoU of two boxes x0, y0, x1, y1; 0 where one is None or both are empty. Acc@0.5 asks for >= 0.5."""
    if a is None or b is None:
        return 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


# --- key points (SPair-71k) --------------------------------------------------------------------------------


def correct_points(
    predicted, target, box: Sequence[float], alpha: float = 0.1, rule: str = "le"
) -> np.ndarray:
    """(K,) bool: is a predicted point within alpha * max(width, height) of the target's box x0, y0, x1, y1?

    Points (K, 2) x, y in pixels of the target image. rule "le": distance <= threshold (HPF);
    "lt": < (SD-DINO).
    """
    _choice("rule", rule, ("le", "lt"))
    predicted, target = np.asarray(predicted, dtype=float), np.asarray(target, dtype=float)
    if predicted.shape != target.shape or target.ndim != 2 or target.shape[1] != 2 or not len(target):
        raise DataError(
            f"predicted {predicted.shape} and target {target.shape} points must both be (K >= 1, 2)"
        )
    if not (np.isfinite(predicted).all() and np.isfinite(target).all()):
        raise DataError(
            "a key point is NaN or infinite; leave out points that are not visible in both images"
        )
    size = max(box[2] - box[0], box[3] - box[1])
    if not size > 0:
        raise DataError(f"the target's box x0, y0, x1, y1 must have a positive size, found {list(box)}")
    distance = np.sqrt(((predicted - target) ** 2).sum(axis=1))
    return distance <= alpha * size if rule == "le" else distance < alpha * size


def pck_scores(
    predicted: Sequence,
    targets: Sequence,
    boxes: Sequence,
    categories: Sequence[str] | None = None,
    alpha: float = 0.1,
    convention: str = "hpf",
) -> dict:
    """PCK@alpha of n image pairs: pck, per_pair, by_category, category_mean, pair_weighted_mean.

    hpf (default): distance <= threshold; PCK per image pair, then the mean over pairs.
    sd-dino: distance < threshold; all points of a category pooled (pck: all points of all categories);
    category_mean weighs categories alike, pair_weighted_mean by their number of pairs.
    """
    _choice("convention", convention, ("hpf", "sd-dino"))
    categories = [""] * len(targets) if categories is None else list(categories)
    if not len(targets) or not len(predicted) == len(targets) == len(boxes) == len(categories):
        raise DataError("predicted, targets, boxes and categories must list the same pairs, at least one")
    rule = "le" if convention == "hpf" else "lt"
    correct = [
        correct_points(p, t, b, alpha, rule) for p, t, b in zip(predicted, targets, boxes, strict=True)
    ]
    per_pair = [float(c.mean()) for c in correct]

    def pool(chosen: list[int]) -> float:
        if convention == "hpf":
            return float(np.mean([per_pair[i] for i in chosen]))
        return float(np.concatenate([correct[i] for i in chosen]).mean())

    members = {name: [i for i, c in enumerate(categories) if c == name] for name in sorted(set(categories))}
    by_category = {name: pool(chosen) for name, chosen in members.items()}
    values, weights = list(by_category.values()), [len(chosen) for chosen in members.values()]
    return {
        "pck": pool(list(range(len(correct)))),
        "per_pair": per_pair,
        "by_category": by_category,
        "category_mean": float(np.mean(values)),
        "pair_weighted_mean": float(np.average(values, weights=weights)),
    }


_NAN = float("nan")
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
        result[name] = float(_iou(areas)[occurs].mean()) if occurs.any() else _NAN
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
        return {"miou": _NAN, "ious": ious.tolist(), "pixel_accuracy": _NAN, "frequency_iou": _NAN}
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


def column_mean(index: int) -> Statistic:
    """The mean over items of one column."""

    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        return weights @ values[:, index] / weights.sum(axis=1)

    return statistic


def column_ratio(above: int, below: int) -> Statistic:
    """Sum of one column over items / sum of another; NaN where the latter is zero."""

    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        top, bottom = weights @ values[:, above], weights @ values[:, below]
        return np.divide(top, bottom, out=np.full(len(weights), np.nan), where=bottom > 0)

    return statistic


def sample_seed(*names: str) -> int:
    """A seed from names: the same on every machine, another for every sample."""
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:4], "big")


def binary_counts(predicted: torch.Tensor, mask: np.ndarray, void: int = VOID) -> np.ndarray:
    """(S, 4) I_background, I_foreground, U_background, U_foreground in pixels of predictions (S, H, W) bool.

    mask (H, W) of 0, 1 and void: `kvutils.metrics.masks.foreground_counts` of every source at once.
    """
    mask = torch.from_numpy(np.require(mask, requirements=["C", "W"])).to(predicted.device)
    valid = (mask != void).flatten()
    said, true = predicted.flatten(1)[:, valid], (mask == 1).flatten()[valid]
    both = (said & true).sum(1)
    said, true, total = said.sum(1), true.sum(), valid.sum()
    either = said + true - both
    return torch.stack([total - either, both, total - both, either], dim=1).cpu().numpy().astype(float)


def average_precisions(scores: torch.Tensor, mask: np.ndarray, void: int = VOID) -> np.ndarray:
    """(S,) average precision over pixels of score maps (S, H, W): `kvutils.metrics.masks.pixel_average_precision`
    of each.
    """
    mask = torch.from_numpy(np.require(mask, requirements=["C", "W"])).to(scores.device)
    valid = (mask != void).flatten()
    flat, true = scores.flatten(1)[:, valid], (mask == 1).flatten()[valid]
    ranked, order = flat.sort(dim=1, descending=True)
    hits = true[order].double()
    found = hits.cumsum(1)
    # Pixels with equal scores are taken together: each has the precision at the last of its ties.
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    place = torch.arange(ranked.shape[1], device=ranked.device)
    end = torch.where(last, place, ranked.shape[1]).flip(1).cummin(1).values.flip(1)
    precision = found.gather(1, end) / (end + 1)
    return ((hits * precision).sum(1) / true.sum()).cpu().numpy()
