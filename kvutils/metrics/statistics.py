"""Bootstrap intervals over items or groups, paired differences, and the test of "build, then degrade".

Resampling is a matrix of weights (n_boot, n): how often each item was drawn. A statistic is a function of the
weights and the scores, so that ratios of sums (overall IoU, class-wise mIoU, F1) are resampled by a few
matrix products. Questions about one scene, or sentences about one image, are not independent: pass them as
`groups`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from kvutils.errors import DataError, ParameterError

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
_CHUNK = 2**25  # weights held at once: 256 MiB in float64


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % (or as asked) percentile bootstrap interval; n is the number of items."""

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

    def claim(self, name: str | None = None, **more) -> dict:
        """{name, value, low, high, n, ...}: a part of a claim; without a name, its headline."""
        found = self.as_dict()
        return ({} if name is None else {"name": name}) | {"value": found.pop("mean")} | found | more

    def text(self, digits: int = 3, sign: bool = False) -> str:
        return interval_text(self.as_dict(), digits, sign)


def interval_text(found: Mapping, digits: int = 3, sign: bool = False, factor: float = 1) -> str:
    """`0.123 [0.100, 0.146]` of an interval as results hold it ({mean or value, low, high, ...}), or "not defined" and why.

    >>> interval_text({"mean": 0.5, "low": 0.25, "high": 0.75}, digits=1, sign=True, factor=100)
    '+50.0 [+25.0, +75.0]'
    """
    numbers = [found["mean" if "mean" in found else "value"], found["low"], found["high"]]
    if None in numbers:
        return f"not defined: {found['reason']}" if found.get("reason") else "not defined"
    value, low, high = (f"{round(number * factor, digits) + 0.0:{'+' if sign else ''}.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def undefined(name: str, reason: str, n: int = 0) -> dict:
    """A part of a claim whose measurement is undefined, and why: it neither holds nor is against."""
    return {"name": name, "value": None, "low": None, "high": None, "n": n, "reason": reason}


def claim_of_parts(entries: list[dict], unit: str) -> dict:
    """A claim without a number of its own: how many of its parts hold is for the verdict to say."""
    return {"value": None, "low": None, "high": None, "n": len(entries), "unit": unit, "entries": entries}


def mean_statistic(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Weighted mean over items of scores (n, ...): (n_boot, ...)."""
    sums = weights @ scores.reshape(len(scores), -1)
    return (sums / weights.sum(axis=1, keepdims=True)).reshape(len(weights), *scores.shape[1:])


def overall_iou_statistic(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """sum I / sum U of counts (n, 2): oIoU; NaN where a resample has no union."""
    intersection, union = (weights @ counts.astype(float)).T
    return np.divide(intersection, union, out=np.full(len(weights), np.nan), where=union > 0)


def class_iou_statistic(classes: Sequence[int], class_ids: Sequence[int]) -> Statistic:
    """HSNet's foreground mIoU of counts (n, 2) [I, U], summed within each class, as a statistic."""
    member = np.asarray(classes)[:, None] == np.asarray(class_ids)[None, :]  # (n, classes)

    def statistic(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
        intersection, union = (weights @ (member * counts[:, k, None]) for k in (0, 1))
        return (intersection / np.maximum(union, 1)).mean(axis=1)

    return statistic


def bootstrap_ci(
    scores,
    statistic: str | Statistic = "mean",
    n_boot: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval | list[Interval]:
    """Percentile bootstrap interval of a statistic of scores (n,) or (n, k).

    statistic: "mean", or a callable (weights (n_boot, n), scores) -> (n_boot,). One that returns (n_boot, L),
    such as the mean of a curve (n, L), gives a list of L intervals from the same resamples. groups (n,): the
    resampled units. Raises DataError for no scores or scores that are not finite; resamples with an undefined
    (NaN) value are left out.

    >>> bootstrap_ci([0.0, 1.0, 1.0, 1.0]).mean
    0.75
    """
    scores = _scores(scores)
    compute = _statistic(statistic)
    value, draws = _resample(lambda weights: compute(weights, scores), len(scores), n_boot, seed, groups)
    return percentile_interval(value, draws, len(scores), level)


def paired_difference(
    a,
    b,
    statistic: str | Statistic = "mean",
    n_boot: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval | list[Interval]:
    """Interval of statistic(a) - statistic(b), two measurements of the same n items, resampled together."""
    a, b = _scores(a), _scores(b)
    if a.shape != b.shape:
        raise DataError(f"paired scores must describe the same items, found shapes {a.shape} and {b.shape}")
    compute = _statistic(statistic)
    value, draws = _resample(lambda w: compute(w, a) - compute(w, b), len(a), n_boot, seed, groups)
    return percentile_interval(value, draws, len(a), level)


def standard_error(
    scores,
    statistic: str | Statistic = "mean",
    n_boot: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> float | np.ndarray:
    """Bootstrap standard error of a statistic, from the resamples of `bootstrap_ci`; (L,) for L values. NaN with
    fewer than two resamples in which it is defined.
    """
    scores = _scores(scores)
    compute = _statistic(statistic)
    _, draws = _resample(lambda weights: compute(weights, scores), len(scores), n_boot, seed, groups)
    defined = np.isfinite(draws)
    n = defined.sum(axis=0)
    mean = np.where(defined, draws, 0).sum(axis=0) / np.maximum(n, 1)
    squares = np.where(defined, (draws - mean) ** 2, 0).sum(axis=0)
    error = np.sqrt(squares / np.maximum(n - 1, 1))
    error = np.where(n < 2, np.nan, error)
    return float(error) if error.ndim == 0 else error


def detectable(error, power: float = 0.8, level: float = 0.95):
    """The true difference that a two-sided test finds with probability `power`, from its standard error.

    About 2.8 standard errors; it shrinks with the square root of the number of items. NaN where the error is
    0: measurements that never differ tell nothing about the noise of a difference.

    >>> round(detectable(1.0), 2)
    2.8
    """
    if not (0 < power < 1 and 0 < level < 1):
        raise ParameterError(f"power and level must be between 0 and 1, found {power} and {level}")
    normal = NormalDist()
    factor = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    found = np.where(np.asarray(error) > 0, factor * np.asarray(error, dtype=float), np.nan)
    return float(found) if found.ndim == 0 else found


def minimum_detectable_difference(
    a,
    b,
    statistic: str | Statistic = "mean",
    n_boot: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    power: float = 0.8,
    level: float = 0.95,
):
    """How large a true difference statistic(a) - statistic(b) had to be to show, given how a and b vary.

    a and b are two measurements of the same items, as in `paired_difference`; see `detectable`.
    """
    a, b = _scores(a), _scores(b)
    if a.shape != b.shape:
        raise DataError(f"paired scores must describe the same items, found shapes {a.shape} and {b.shape}")
    compute = _statistic(statistic)

    def difference(weights: np.ndarray, both: np.ndarray) -> np.ndarray:
        return compute(weights, both[:, 0]) - compute(weights, both[:, 1])

    error = standard_error(np.stack([a, b], axis=1), difference, n_boot, seed, groups)
    return detectable(error, power, level)


@dataclass(frozen=True)
class PeakThenDegrade:
    """Does quality build up to some layer and then degrade? (paper, section 3.1, Figure 2)

    `best` is the index of the best layer on one half of the units; `minus_first` and `minus_last` are its
    paired differences on the other half. `peak` is the best layer of all items with its bootstrap interval
    (an index), and `peak_shares` how often each layer is best among the resamples.
    """

    best: int
    minus_first: Interval
    minus_last: Interval
    peak: Interval
    peak_shares: tuple[float, ...]

    @property
    def builds(self) -> bool:
        return self.minus_first.low > 0

    @property
    def degrades(self) -> bool:
        return self.minus_last.low > 0

    def as_dict(self) -> dict:
        found = {name: value.as_dict() if isinstance(value, Interval) else value for name, value in vars(self).items()}
        return found | {"builds": self.builds, "degrades": self.degrades}


def peak_then_degrade(
    scores,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    statistic: str | Statistic = "mean",
    n_boot: int = 2000,
    level: float = 0.95,
) -> PeakThenDegrade:
    """Choose the best layer on one half of the units; test it against first and last on the other half.

    scores (n, L) or, for a statistic of several columns, (n, L, k); higher is better. Units are `groups`
    (default: the items) and fall into halves by a seeded hash of their name, so adding data keeps the order
    of the rest. At least 4.
    """
    scores = _scores(scores)
    if scores.ndim < 2 or scores.shape[1] < 2:
        raise ParameterError(f"scores must be (items, layers >= 2[, k]), found shape {scores.shape}")
    names = [str(g) for g in (range(len(scores)) if groups is None else groups)]
    if len(names) != len(scores):
        raise DataError(f"{len(names)} groups for {len(scores)} items")
    units = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    if len(units) < 4:
        raise ParameterError(
            f"choosing and testing a layer needs at least 4 independent units, found {len(units)}"
        )
    chosen = np.isin(names, units[: len(units) // 2])
    compute = _statistic(statistic)

    def curve(weights: np.ndarray, items: np.ndarray) -> np.ndarray:  # (n_boot, L)
        return np.stack([compute(weights, items[:, layer]) for layer in range(items.shape[1])], axis=1)

    best = int(np.nanargmax(curve(np.ones((1, chosen.sum())), scores[chosen])[0]))
    held_out, held_groups = scores[~chosen], [name for name, c in zip(names, chosen, strict=True) if not c]
    differences = [
        paired_difference(held_out[:, best], held_out[:, other], statistic, n_boot, seed, held_groups, level)
        for other in (0, -1)
    ]
    value, draws = _resample(lambda w: curve(w, scores), len(scores), n_boot, seed, names)
    peaks = np.nanargmax(draws, axis=1)
    low, high = np.quantile(peaks, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    peak = Interval(float(np.nanargmax(value)), float(low), float(high), len(scores))
    shares = np.bincount(peaks, minlength=scores.shape[1]) / len(peaks)
    return PeakThenDegrade(best, differences[0], differences[1], peak, tuple(shares.tolist()))


def _scores(scores) -> np.ndarray:
    scores = np.asarray(scores)
    scores = scores.astype(float) if scores.dtype == bool or scores.dtype.kind in "iuf" else scores
    if scores.dtype.kind != "f" or scores.ndim < 1 or not len(scores):
        raise DataError(
            f"scores must be numbers of shape (items >= 1, ...), found {scores.dtype} {scores.shape}"
        )
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores.reshape(len(scores), -1)).all(axis=1))
        raise DataError(
            f"{len(bad)} items have NaN or infinite scores (first: {bad[0]}); leave undefined items out"
        )
    return scores


def _statistic(statistic: str | Statistic) -> Statistic:
    if callable(statistic):
        return statistic
    if statistic != "mean":
        raise ParameterError(f"statistic must be 'mean' or a callable (weights, scores), found {statistic!r}")
    return mean_statistic


def _resample(
    compute: Callable[[np.ndarray], np.ndarray],
    n: int,
    n_boot: int,
    seed: int,
    groups: Sequence[Hashable] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The statistic of all items, and of n_boot resamples (n_boot, ...)."""
    if n_boot < 1:
        raise ParameterError(f"n_boot must be at least 1, found {n_boot}")
    if groups is None:
        unit = np.arange(n)
    else:
        if len(groups) != n:
            raise DataError(f"{len(groups)} groups for {n} items")
        order: dict[Hashable, int] = {}  # by first appearance, so that names do not matter
        unit = np.array([order.setdefault(g, len(order)) for g in groups])
    n_units = int(unit.max()) + 1
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    draws = []
    for start in range(0, n_boot, step):
        size = min(step, n_boot - start)
        counts = random.multinomial(n_units, np.full(n_units, 1 / n_units), size=size)
        draws.append(np.asarray(compute(counts[:, unit].astype(float))))
        if len(draws[-1]) != size:
            raise ParameterError(
                f"the statistic must return one value per resample ({size}), found {draws[-1].shape}"
            )
    return np.asarray(compute(np.ones((1, n))))[0], np.concatenate(draws)


def percentile_interval(value, draws: np.ndarray, n: int, level: float = 0.95) -> Interval | list[Interval]:
    """Of a value and its resamples (n_boot,), undefined ones left out; a list for values (L,) and resamples (n_boot, L)."""
    if not 0 < level < 1:
        raise ParameterError(f"level must be between 0 and 1, found {level}")
    if draws.ndim > 1:
        return [percentile_interval(v, d, n, level) for v, d in zip(value, np.moveaxis(draws, 1, 0), strict=True)]
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if len(draws) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), n)
