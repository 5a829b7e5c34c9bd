"""Statistics over columns of a score table, and pixel counts of all sources at once."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from kvutils.datasets.samples import VOID
from kvutils.statistics import Statistic


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

    mask (H, W) of 0, 1 and void: `kvutils.metrics.foreground_counts` of every source at once.
    """
    mask = torch.from_numpy(np.require(mask, requirements=["C", "W"])).to(predicted.device)
    valid = (mask != void).flatten()
    said, true = predicted.flatten(1)[:, valid], (mask == 1).flatten()[valid]
    both = (said & true).sum(1)
    said, true, total = said.sum(1), true.sum(), valid.sum()
    either = said + true - both
    return torch.stack([total - either, both, total - both, either], dim=1).cpu().numpy().astype(float)


def average_precisions(scores: torch.Tensor, mask: np.ndarray, void: int = VOID) -> np.ndarray:
    """(S,) average precision over pixels of score maps (S, H, W): `kvutils.metrics.pixel_average_precision`
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
