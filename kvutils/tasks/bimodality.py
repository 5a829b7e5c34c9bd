"""Two groups of keys or one? `readout.selections.variance_threshold` asks it of all keys together, as the paper does; `bimodal_layers`
within heads (ours).

Ashman's D = |m1 - m2| / sqrt((s1^2 + s2^2) / 2) alone calls a flat or a skewed distribution bimodal, so it counts only where the keys
themselves are rarer between the two means. The deepest valley of a sample is there by chance, and deeper still in its resamples: so that of
a layer is chosen on one half of the token positions and read on the other, both ways; of keys of one mode it is none."""

from dataclasses import replace

import numpy as np
from scipy.stats import t as student
from sklearn.mixture import GaussianMixture

from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import UNDEFINED, Effect, Resampled, resample

VALLEY = 0.8  # of the lower mode's density: a layer whose valley is above has one mode
SIDE = 0.05  # share of the keys on each side of a valley, at least; the tails of fewer are noise (ours)
LEVEL = 0.025  # one-sided, of a 95 % interval
_GRID = 200  # places at which a density is read


def bimodal_layers(logs: np.ndarray, n_boot: int = 2000, seed: int = 0) -> dict:
    """In how many layers has the log-variance (L, G, P), each head's mode subtracted, two modes? JSON-able.

    Heads are aligned at their modes since a mixture of one-moded heads of any width and skew then has one mode; at means or medians it may
    have two. A layer has two (`two_modes`: "yes") if its valley is below `VALLEY` of the lower mode's density, Ashman's D is above 2, and
    the valley is real by Holm's procedure over the layers; "no" if the 95 % interval, over the P positions, excludes such a valley; else
    "open". layers: of each `two_modes`, `separation` (D), `valley` (the density in it over the lower mode's; 1: none) and `modes` (lower
    mode, valley, upper mode, as multiples of the variance at the head's mode). Behind layer 0, whose keys no attention has reached: count:
    an effect: the layers that have them in the sample, from those with "yes" to all but those with "no"; its error is that of a 90 %
    interval as wide. late_minus_early: the same of the share of the later half's layers minus the earlier's. heads: the count with whole
    heads left out in turn. ParameterError for fewer than four positions."""
    layers, heads, positions = logs.shape
    halves, values = Halves.of(range(positions), seed), logs - head_modes(logs)
    packed = np.stack([_at_chosen(each, halves) for each in values], axis=1)
    found = resample(lambda w: _depth(np.tensordot(w, packed, 1)), positions, n_boot, seed)
    depths, where = found.effects(), np.array([_valley(each) for each in values])
    separate = np.array([_ashman(*each) for each in zip(values, where, strict=True)])
    there = (found.value > -np.log(VALLEY)) & (separate > 2)
    chance = np.array([student.sf(each.mean / each.error, positions - 1) if each.error > 0 else float(each.mean <= 0) for each in depths])
    order = chance.argsort()
    sure = np.zeros(layers, bool)
    sure[order] = np.logical_and.accumulate(chance[order] * (layers - np.arange(layers)) <= LEVEL)
    sure, possible = sure & there, there | np.array([not each.high < -np.log(VALLEY) for each in depths])
    behind, late = np.arange(layers) > 0, np.arange(layers) >= layers // 2
    early, without = behind & ~late, [np.delete(values, head, axis=1) for head in range(heads) if heads > 1]

    def within(of: np.ndarray, sign: np.ndarray) -> Effect:
        """Sum over layers of a weight, from what is sure to what is possible."""
        low, high = (float((sign * np.where(sign > 0, a, b)).sum()) for a, b in ((sure, possible), (possible, sure)))
        value = float((sign * of).sum())
        return replace(UNDEFINED, mean=value, low=low, high=high, n=positions, units=positions,
                       error=max(value - low, high - value) / float(student.ppf(1 - 2 * LEVEL, positions - 1)))  # fmt: skip

    counts = np.array([_count(each[1:], halves) for each in without])
    by_layer = [{"two_modes": "yes" if yes else "open" if maybe else "no", "separation": float(d), "modes": np.exp(points).tolist(),
                 "valley": {name: float(np.exp(-max(x, 0.0))) for name, x in (("mean", each.mean), ("low", each.high), ("high", each.low))}}
                for yes, maybe, d, points, each in zip(sure, possible, separate, where, depths, strict=True)]  # fmt: skip
    by_head = Resampled(np.array(there[1:].sum()), counts, heads, heads, jackknife=True).effects() if heads > 1 else UNDEFINED
    balance = np.where(late, 1 / late.sum(), -1.0 * early / max(early.sum(), 1))
    return {"layers": by_layer, "count": within(there, behind.astype(float)).as_dict(), "late_minus_early": within(there, balance).as_dict(),
            "heads": by_head.as_dict()}  # fmt: skip


def head_modes(logs: np.ndarray) -> np.ndarray:
    """(L, G, 1) where the density of each head's log-variances (L, G, P) is highest."""
    def mode(values: np.ndarray) -> float:
        grid = np.linspace(*np.quantile(values, (0.01, 0.99)), _GRID)
        return grid[_density(values, grid, _width(values)).sum(1).argmax()]

    return np.array([[[mode(head)] for head in layer] for layer in logs])


def _count(values: np.ndarray, halves: Halves) -> int:
    """Layers of centred log-variances (L, G, P) with a valley and D above 2, in this sample."""
    depths = [_depth(_at_chosen(each, halves).sum(0)) > -np.log(VALLEY) for each in values]
    return sum(deep and _ashman(each, _valley(each)) > 2 for deep, each in zip(depths, values, strict=True))


def _density(values: np.ndarray, where: np.ndarray, width: float) -> np.ndarray:
    """(places, ...) unnormalised Gaussian kernels of values (...) at some places."""
    return np.exp(-0.5 * ((where.reshape(-1, *[1] * values.ndim) - values) / width) ** 2)


def _width(values: np.ndarray) -> float:
    """Silverman's width. By the standard deviation: by the quartiles it is so small that the tails of a wide head are all valleys."""
    return max(0.9 * values.std() * values.size**-0.2, 1e-9)


def _valley(values: np.ndarray) -> np.ndarray:
    """(3,) lower mode, valley, upper mode: where the density is lowest in relation to what is higher on both sides of it."""
    values, grid = values.ravel(), np.linspace(values.min(), values.max(), _GRID)
    density = _density(values, grid, _width(values)).sum(1)
    left, right = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
    low, high = np.quantile(values, (SIDE, 1 - SIDE))
    depth = np.where((grid > low) & (grid < high), np.minimum(left, right) / (density + 1e-12), 0)
    valley = depth.argmax()
    return grid[[density[: valley + 1].argmax(), valley, valley + density[valley:].argmax()]]


def _at_chosen(values: np.ndarray, halves: Halves) -> np.ndarray:
    """(P, 2, 3) what each position adds to the density at the places that the other half has chosen; values (G, P) of a layer."""
    found = np.zeros((values.shape[1], 2, 3))
    for half, chooses in enumerate(halves.choosing):
        chosen, read = values[:, chooses], values[:, ~chooses]
        found[~chooses, half] = _density(read, _valley(chosen), _width(chosen)).mean(1).T
    return found


def _depth(sums: np.ndarray) -> np.ndarray:
    """(...) log of the lower mode's density over the valley's, mean over the halves of sums (..., 2, 3)."""
    logs = np.log(sums + 1e-6)
    return (np.minimum(logs[..., 0], logs[..., 2]) - logs[..., 1]).mean(-1)


def _ashman(values: np.ndarray, modes: np.ndarray) -> float:
    """Ashman's D of two normal distributions fitted from the two modes on; 0 where they are one."""
    if modes[0] == modes[2] or np.ptp(values) < 1e-9:
        return 0.0
    two = GaussianMixture(2, means_init=modes[[0, 2], None], random_state=0).fit(values.reshape(-1, 1))
    return float(abs(np.subtract(*two.means_[:, 0])) / np.sqrt(two.covariances_.mean()))
