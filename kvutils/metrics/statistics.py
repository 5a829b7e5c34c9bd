"""Bootstrap intervals over items or groups, paired differences, and the test of "build, then degrade".

Resampling is a matrix of weights (n_boot, n): how often each item was drawn. A statistic is a function of the
weights and the scores, so that ratios of sums (overall IoU, class-wise mIoU, F1) are resampled by a few matrix
products. Questions about one scene, or sentences about one image, are not independent: pass them as `groups`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from kvutils.errors import DataError, ParameterError, at_least

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
_TAILS = (1 - 0.95) / 2, (1 + 0.95) / 2  # of a 95 % interval
_CHUNK = 2**25  # weights held at once: 256 MiB in float64


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile bootstrap interval; n is the number of items."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, found: Mapping) -> Interval:
        """From `as_dict`."""
        return cls(*(math.nan if found[key] is None else found[key] for key in ("mean", "low", "high")), found["n"])

    def as_dict(self) -> dict:
        """{mean, low, high, n}, with None where a number is undefined: JSON has no NaN."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}

    def scaled(self, factor: float) -> Interval:
        """In another unit; a negative factor turns the interval round."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Interval(self.mean * factor, low, high, self.n)

    def claim(self, name: str | None = None, reason: str = "too few independent units to resample", **more) -> dict:
        """{name, value, low, high, n, ...}: a part of a claim; without a name, its headline. reason: why, where it or its interval
        is undefined."""
        found = self.as_dict() | ({"reason": reason} if reason and math.isnan(self.mean + self.low) else {})
        return ({} if name is None else {"name": name}) | {"value": found.pop("mean")} | found | more


UNDEFINED = Interval(math.nan, math.nan, math.nan, 0)


def interval_text(found: Mapping, digits: int = 3, sign: bool = False, factor: float = 1) -> str:
    """`0.123 [0.100, 0.146]` of an interval as results hold it ({mean or value, low, high, ...}), or "not defined" and why.

    >>> interval_text({"mean": 0.5, "low": 0.25, "high": 0.75}, digits=1, sign=True, factor=100)
    '+50.0 [+25.0, +75.0]'
    """
    numbers = [found["mean" if "mean" in found else "value"], found["low"], found["high"]]
    if None in numbers:
        return f"not defined: {found['reason']}" if found.get("reason") else "not defined"
    value, low, high = (f"{number * factor:{'+' if sign else ''}.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def undefined(name: str, reason: str) -> dict:
    """A part of a claim whose measurement is undefined, and why: it neither holds nor is against."""
    return UNDEFINED.claim(name, reason=reason)


def claim_of_parts(entries: list[dict], unit: str) -> dict:
    """A claim without a number of its own: how many of its parts hold is for the verdict to say."""
    return UNDEFINED.claim(reason="", unit=unit, entries=entries) | {"n": len(entries)}


def mean_statistic(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Weighted mean over items of scores (n, ...): (n_boot, ...)."""
    sums = weights @ scores.reshape(len(scores), -1)
    return (sums / weights.sum(axis=1, keepdims=True)).reshape(len(weights), *scores.shape[1:])


def column_mean(index: int) -> Statistic:
    """The mean over items of one column of scores (n, k)."""
    return lambda weights, scores: weights @ scores[:, index] / weights.sum(axis=1)


def column_ratio(above: int, below: int) -> Statistic:
    """Sum of one column over items / sum of another; NaN where the latter is zero."""
    return lambda weights, scores: ratio(weights @ scores[:, above], weights @ scores[:, below])


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; NaN where the latter is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def bootstrap_ci(
    scores, statistic: Statistic = mean_statistic, n_boot: int = 2000, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> Interval | list[Interval]:
    """Percentile bootstrap interval of a statistic of scores (n,) or (n, k).

    statistic: (weights (n_boot, n), scores) -> (n_boot,). One that returns (n_boot, L), such as the mean of a curve
    (n, L), gives a list of L intervals from the same resamples. groups (n,): the resampled units. Raises DataError for
    no scores or scores that are not finite; resamples with an undefined (NaN) value are left out.

    >>> bootstrap_ci([0.0, 1.0, 1.0, 1.0]).mean
    0.75
    """
    scores = _scores(scores)
    return percentile_interval(*_resample(lambda w: statistic(w, scores), len(scores), n_boot, seed, groups), len(scores))


def paired_difference(
    a, b, statistic: Statistic = mean_statistic, n_boot: int = 2000, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> Interval | list[Interval]:
    """Interval of statistic(a) - statistic(b), two measurements of the same n items, resampled together."""
    a, b = _scores(a), _scores(b)
    return percentile_interval(*_resample(lambda w: statistic(w, a) - statistic(w, b), len(a), n_boot, seed, groups), len(a))


def percentile_interval(value, draws: np.ndarray, n: int) -> Interval | list[Interval]:
    """Of a value and its resamples (n_boot,), undefined ones left out; a list for values (L,) and resamples (n_boot, L)."""
    if draws.ndim > 1:
        return [percentile_interval(v, d, n) for v, d in zip(value, np.moveaxis(draws, 1, 0), strict=True)]
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, _TAILS) if len(draws) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), n)


def standard_error(scores, statistic: Statistic = mean_statistic, n_boot: int = 2000, seed: int = 0, groups=None) -> np.ndarray:
    """() or (L,) bootstrap standard error, from the resamples of `bootstrap_ci`; NaN with fewer than two defined ones."""
    scores = _scores(scores)
    _, draws = _resample(lambda w: statistic(w, scores), len(scores), n_boot, seed, groups)
    return np.ma.filled(np.ma.masked_invalid(draws).std(axis=0, ddof=1), np.nan)[()]


def detectable(error, power: float = 0.8) -> np.ndarray:
    """The true difference that a two-sided 5 % test finds with probability `power`, from its standard error.

    About 2.8 standard errors; it shrinks with the square root of the number of items. NaN where the error is 0:
    measurements that never differ tell nothing about the noise of a difference.

    >>> float(detectable(1.0).round(2))
    2.8
    """
    factor = NormalDist().inv_cdf(_TAILS[1]) + NormalDist().inv_cdf(power)
    return np.where(np.asarray(error) > 0, factor * np.asarray(error, dtype=float), np.nan)[()]


def peak_then_degrade(
    scores, groups: Sequence[Hashable] | None = None, seed: int = 0, statistic: Statistic = mean_statistic, n_boot: int = 2000
) -> dict:
    """Does quality build up to some layer and then degrade? (paper, section 3.1, Figure 2); JSON-able.

    scores (n, L >= 2) or, for a statistic of several columns, (n, L, k); higher is better. Units are `groups` (default:
    the items), at least 4 (ParameterError). `best` is the index of the best layer on one half of them (`choosing_half`);
    `minus_first` and `minus_last` are its paired differences on the other half, and it `builds` and `degrades` where their
    intervals are above 0. `peak` is the best layer of all items with its bootstrap interval (indices), `peak_shares` how
    often each layer is best among the resamples.
    """
    scores = _scores(scores)
    names = list(range(len(scores)) if groups is None else groups)
    if len(set(names)) < 4:
        raise ParameterError(f"choosing and testing a layer needs at least 4 independent units, found {len(set(names))}")
    chosen = choosing_half(names, seed)

    def curve(weights: np.ndarray, items: np.ndarray) -> np.ndarray:  # (n_boot, L)
        return np.stack([statistic(weights, items[:, layer]) for layer in range(items.shape[1])], axis=1)

    best = int(np.nanargmax(curve(np.ones((1, chosen.sum())), scores[chosen])[0]))
    held_out, held_groups = scores[~chosen], [name for name, c in zip(names, chosen, strict=True) if not c]
    options = (statistic, n_boot, seed, held_groups)
    first, last = (paired_difference(held_out[:, best], held_out[:, other], *options) for other in (0, -1))
    value, draws = _resample(lambda w: curve(w, scores), len(scores), n_boot, seed, names)
    peaks = np.nanargmax(draws, axis=1)
    low, high = np.quantile(peaks, _TAILS, method="inverted_cdf")
    return {
        "best": best, "minus_first": first.as_dict(), "minus_last": last.as_dict(),
        "builds": first.low > 0, "degrades": last.low > 0,
        "peak": Interval(float(np.nanargmax(value)), float(low), float(high), len(scores)).as_dict(),
        "peak_shares": (np.bincount(peaks, minlength=scores.shape[1]) / len(peaks)).tolist(),
    }  # fmt: skip


def choosing_half(groups: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """(n,) bool: the items of the half of the groups on which a layer is chosen, by a seeded hash of their names, so that
    adding data keeps the order of the rest."""
    names = [str(group) for group in groups]
    units = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    return np.isin(names, units[: len(units) // 2])


def _scores(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    bad = sum(not np.isfinite(item).all() for item in scores)
    if not len(scores) or bad:
        raise DataError(f"expected finite scores of at least one item, found {len(scores)} items, {bad} of them with NaN or "
                        "infinite scores; leave undefined items out")  # fmt: skip
    return scores


def _resample(
    compute: Callable[[np.ndarray], np.ndarray], n: int, n_boot: int, seed: int, groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The statistic of all items, and of n_boot resamples (n_boot, ...)."""
    at_least("n_boot", n_boot)
    order: dict[Hashable, int] = {}  # by first appearance, so that names do not matter
    unit = np.array([order.setdefault(group, len(order)) for group in (range(n) if groups is None else groups)])
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    draws = []
    for start in range(0, n_boot, step):
        counts = random.multinomial(len(order), np.full(len(order), 1 / len(order)), size=min(step, n_boot - start))
        draws.append(np.asarray(compute(counts[:, unit].astype(float))))
    return np.asarray(compute(np.ones((1, n))))[0], np.concatenate(draws)
