"""Masks, score maps and boxes: pixel counts of many predictions at once, and the metrics that follow from them.

Masks are integer (H, W) arrays in which `VOID` (255) means no annotation; void pixels count nowhere. Scores are fractions
in 0..1. Each equals the field's reference implementation, see tests/test_reference_metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from kvutils import VOID


def binary_counts(predicted: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    """(S, 4) I_background, I_foreground, U_background, U_foreground in pixels of predictions (S, H, W) bool.

    mask (H, W) of 0, 1 and void.
    """
    valid, true = _annotated(mask, predicted.device)
    said = predicted.flatten(1)[:, valid]
    both = (said & true).sum(1)
    said, true, total = said.sum(1), true.sum(), valid.sum()
    either = said + true - both
    return torch.stack([total - either, both, total - both, either], dim=1).cpu().numpy().astype(float)


def jaccard_and_precision(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(...,) each, of `binary_counts` (..., 4): J = I / U of the foreground, 1 for an empty union (as DAVIS), and P, the
    share of correctly labelled pixels, foreground and background."""
    i_bg, i_fg, _, u_fg = np.moveaxis(counts, -1, 0)
    return np.where(u_fg > 0, i_fg / np.maximum(u_fg, 1), 1.0), (i_bg + i_fg) / np.maximum(i_bg + u_fg, 1)


def average_precisions(scores: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    """(S,) average precision over pixels of score maps (S, H, W), as scikit-learn has it; NaN without foreground."""
    valid, true = _annotated(mask, scores.device)
    ranked, order = scores.flatten(1)[:, valid].sort(dim=1, descending=True)
    hits = true[order].double()
    found = hits.cumsum(1)
    # Pixels with equal scores are taken together: each has the precision at the last of its ties.
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    place = torch.arange(ranked.shape[1], device=ranked.device)
    end = torch.where(last, place, ranked.shape[1]).flip(1).cummin(1).values.flip(1)
    precision = found.gather(1, end) / (end + 1)
    return ((hits * precision).sum(1) / true.sum()).cpu().numpy()


def _annotated(mask: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(H*W,) bool: is the pixel annotated; and (annotated pixels,) bool: is it foreground."""
    flat = torch.from_numpy(np.require(mask, requirements=["C", "W"])).to(device).flatten()
    valid = flat != VOID
    return valid, (flat == 1)[valid]


def class_counts(said: np.ndarray, true: np.ndarray, labels: range) -> np.ndarray:
    """(3 * K,) pixels of label maps (H, W): right, true and said of each of K consecutive labels.

    Pixels count whose true label is one of them (void is none).
    """
    valid = (true >= labels.start) & (true < labels.stop)
    said, true = said[valid], true[valid].astype(said.dtype)
    parts = (true[said == true], true, said)
    return np.concatenate([np.bincount(part, minlength=labels.stop)[labels.start : labels.stop] for part in parts])


def class_mean_iou(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n_boot,) mean IoU of `class_counts` (n, 3 * K) over the classes that occur in a resample, as BDD100K's seg.py."""
    right, true, said = np.split(weights @ counts, 3, axis=1)
    ious = right / np.maximum(true + said - right, 1)
    return ious.sum(axis=1) / np.maximum((true > 0).sum(axis=1), 1)


def largest_region_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """x0, y0, x1, y1 (exclusive) around the largest 8-connected region of 1s (first of equals); None if empty."""
    regions, n = ndimage.label(mask == 1, structure=np.ones((3, 3)))
    if not n:
        return None
    rows, columns = ndimage.find_objects(regions)[np.bincount(regions.ravel())[1:].argmax()]
    return columns.start, rows.start, columns.stop, rows.stop


def box_iou(a: Sequence[float] | None, b: Sequence[float] | None) -> float:
    """IoU of two boxes x0, y0, x1, y1; 0 where one is None or both are empty. Acc@0.5 asks for >= 0.5."""
    if a is None or b is None:
        return 0.0
    a, b = [float(edge) for edge in a], [float(edge) for edge in b]  # products of small integers or halves overflow
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0
