"""Every metric of the replication, each equal to the field's reference implementation.

Here: binary masks, boxes and key points. Many-class maps are in `semantic_metrics`, videos in
`video_metrics`, questions in `question_metrics`, bootstrap intervals in `statistics`; all are re-exported.
Scores are fractions in 0..1. Masks are bool or integer (height, width) arrays in which `VOID` (255) means no
annotation. What a reference leaves undefined (0/0) is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score

from kvutils.datasets.samples import VOID
from kvutils.errors import DataError, ParameterError
from kvutils.question_metrics import (  # noqa: F401
    NEEDS_JUDGE,
    blink_extract,
    blink_scores,
    f1_statistic,
    mme_parse,
    mme_scores,
    pope_counts,
    pope_parse,
    pope_scores,
)
from kvutils.semantic_metrics import (  # noqa: F401
    bdd_scores,
    confusion_matrix,
    decode_imagenet_s,
    imagenet_s_scores,
    label_map,
    label_pair,
    mean_iou_statistic,
)
from kvutils.statistics import (  # noqa: F401
    Interval,
    PeakThenDegrade,
    bootstrap_ci,
    class_iou_statistic,
    overall_iou_statistic,
    paired_difference,
    peak_then_degrade,
)
from kvutils.video_metrics import boundary_f, davis_scores, davis_sequence, region_similarity  # noqa: F401

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
