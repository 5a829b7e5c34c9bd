"""Masks, score maps and boxes: pixel counts of many predictions at once, and the metrics that follow from them.

Masks are integer (H, W) arrays in which `VOID` (255) means no annotation; void pixels count nowhere. Scores are fractions
in 0..1. Each equals the field's reference implementation, see tests/test_reference_metrics.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kvutils import VOID
from kvutils.metrics.statistics import ratio


def binary_counts(predicted: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    """(S, 4) I_background, I_foreground, U_background, U_foreground in pixels of predictions (S, H, W) bool.

    mask (H, W) of 0, 1 and void."""
    flat = torch.from_numpy(np.require(mask, requirements=["C", "W"])).to(predicted.device).flatten()
    valid = flat != VOID
    true = (flat == 1)[valid]
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


@dataclass(frozen=True, eq=False)
class RankedMaps:
    """Score maps as ascending rows, from which thresholds, overlaps and precisions follow without another look at the maps.

    scores (S, n) of all pixels; true (S, P) of the foreground; void (S, V) of pixels without annotation. All float32 or float64."""

    scores: torch.Tensor
    true: torch.Tensor
    void: torch.Tensor

    @classmethod
    def of(cls, maps: torch.Tensor, true: torch.Tensor, void: torch.Tensor) -> RankedMaps:
        """The maps (S, H, W) of an image; true, void: the numbers of these pixels, see `true_and_void`."""
        rows = maps.flatten(1)
        return cls(*(_ascending(each) for each in (rows, rows.index_select(1, true), rows.index_select(1, void))))

    def otsu(self) -> torch.Tensor:
        """(S,) Otsu's thresholds (1979): the split of all pixels with the largest variance between the two classes.

        Exact over all splits, without a histogram. Foreground is `scores > threshold`; the threshold is the largest score of the
        lower class, and the score itself when all are equal."""
        n = self.scores.shape[1]
        x = self.scores.double()
        lower = x.sub_(x.mean(1, keepdim=True)).cumsum(1)[:, :-1]  # centred, so the lower class's sum alone gives that variance
        count = torch.arange(1, n, device=x.device, dtype=x.dtype)
        between = lower.square_().div_(count * (n - count)).masked_fill_(self.scores[:, 1:] == self.scores[:, :-1], -1)
        return self.scores.gather(1, between.argmax(1, keepdim=True))[:, 0]

    def average_precisions(self) -> torch.Tensor:
        """(S,) float64 average precision over annotated pixels, as scikit-learn has it; NaN without foreground.

        The mean over foreground pixels of the precision among all that score as much or more: ties are taken together."""
        found, said = (_at_least(rows, self.true) for rows in (self.true, self.scores))
        return (found / (said - _at_least(self.void, self.true)).double()).mean(1)

    def overlaps(self, thresholds: torch.Tensor) -> torch.Tensor:
        """(S, 2) intersection and union, in annotated pixels, of the foreground with what is above thresholds (S,)."""
        every, both, void = ((rows > thresholds[:, None]).sum(1) for rows in (self.scores, self.true, self.void))
        return torch.stack([both, every - void + self.true.shape[1] - both], dim=1)


def true_and_void(mask: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Numbers of the foreground's and of the void pixels of a mask (H, W) of 0, 1 and void, row after row."""
    flat = np.asarray(mask).ravel()
    return tuple(torch.from_numpy(np.flatnonzero(flat == value)).to(device) for value in (1, VOID))


def _ascending(rows: torch.Tensor) -> torch.Tensor:
    """Each row sorted; on a CPU by numpy, which brings no indices and takes a third of torch's time."""
    return rows.sort(dim=1).values if rows.device.type != "cpu" else torch.from_numpy(np.sort(rows.numpy(), axis=1))


def _at_least(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """(S, P) how many of each ascending row (S, n) are at least as large as each of the ascending scores (S, P)."""
    if rows.device.type != "cpu" or not rows.numel():
        return rows.shape[1] - torch.searchsorted(rows, scores)
    pairs = zip(rows.numpy(), scores.numpy(), strict=True)  # numpy makes use of it that the scores ascend, too
    return rows.shape[1] - torch.from_numpy(np.stack([np.searchsorted(*pair) for pair in pairs]))


def class_counts(said: torch.Tensor, true: torch.Tensor, labels: range) -> np.ndarray:
    """(3 * K,) pixels of label maps (H, W): right, true and said of each of K consecutive labels.

    Pixels count whose true label is one of them (void is none); they are counted on the device of the maps."""
    size = labels.stop + 1  # the last number stands for all beyond the labels: said, it is wrong, whatever it is
    pairs = true.long().clamp(max=labels.stop) * size + said.long().clamp(max=labels.stop)
    table = torch.bincount(pairs.flatten(), minlength=size**2).view(size, size)[labels.start : labels.stop]
    all_said = table[:, labels.start : labels.stop]
    return torch.stack([all_said.diagonal(), table.sum(1), all_said.sum(0)]).flatten().cpu().numpy()


def class_mean_iou(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n_boot,) mean IoU of `class_counts` (n, 3 * K) over the classes that occur in a resample, as BDD100K's seg.py; NaN without any."""
    right, true, said = np.split(weights @ counts, 3, axis=1)
    ious = right / np.maximum(true + said - right, 1)
    return ratio(ious.sum(axis=1), (true > 0).sum(axis=1))


def largest_region_boxes(masks: torch.Tensor) -> list[tuple[int, int, int, int] | None]:
    """x0, y0, x1, y1 (exclusive) around the largest 8-connected region of each mask (S, H, W) bool (first of equals); None if
    empty.

    Regions are joined from runs of a row, of all masks together: pixels never leave the device."""
    count, height, width = masks.shape
    padded = torch.nn.functional.pad(masks, (1, 1, 0, 1))  # an empty row below each mask: no run touches the next mask's
    edges = (padded[..., 1:] != padded[..., :-1]).flatten().nonzero()[:, 0].cpu().numpy()
    starts, ends = edges[::2], edges[1::2]
    row, x0 = np.divmod(starts, width + 1)
    x1, (image, y) = ends % (width + 1), np.divmod(row, height + 1)
    below = width + 1  # to the same column of the next row; runs touch if they have a corner in common
    first, last = np.searchsorted(ends, starts + below), np.searchsorted(starts, ends + below, side="right")
    touching = np.maximum(last - first, 0)
    mine = np.repeat(np.arange(len(starts)), touching)
    other = np.arange(len(mine)) + np.repeat(first - touching.cumsum() + touching, touching)
    n, region = connected_components(coo_array((np.ones(len(mine), bool), (mine, other)), shape=(len(starts),) * 2), directed=False)
    owner, chosen = np.empty(n, int), np.zeros(n, bool)
    owner[region] = image
    order = np.lexsort((-np.bincount(region, x1 - x0, n), owner))  # regions are numbered by their first run
    chosen[order[np.unique(owner[order], return_index=True)[1]]] = True
    runs = chosen[region]
    shown, begin = np.unique(image[runs], return_index=True)
    lows, highs = np.stack([x0, y], axis=1)[runs], np.stack([x1, y + 1], axis=1)[runs]
    boxes = np.hstack([np.minimum.reduceat(lows, begin), np.maximum.reduceat(highs, begin)]) if len(shown) else lows
    found = dict(zip(shown.tolist(), map(tuple, boxes.tolist()), strict=True))
    return [found.get(k) for k in range(count)]


def box_iou(a: Sequence[float] | None, b: Sequence[float] | None) -> float:
    """IoU of two boxes x0, y0, x1, y1; 0 where one is None or both are empty. Acc@0.5 asks for >= 0.5."""
    if a is None or b is None:
        return 0.0
    a, b = [float(edge) for edge in a], [float(edge) for edge in b]  # products of small integers or halves overflow
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0
