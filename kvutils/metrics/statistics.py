"""Intervals over items or groups, and paired differences.

Resampling is a matrix of weights (n_boot, n): how often each item was drawn. A statistic is a function of the weights and the scores, so
that ratios of sums (overall IoU, class-wise mIoU, F1) are resampled by a few matrix products. Questions about one scene, or sentences
about one image, are not independent: pass them as `groups`. An item of two groups, (a, b), such as a pair of images, is drawn as often as
both (Owen's pigeonhole bootstrap; see `units_of`).

Below `FEW_UNITS` units a percentile bootstrap is too narrow (of 4 groups it misses a null effect in 15 % of the samples, not 5 %);
there the interval is Student's t around the value, with the jackknife's standard error (units left out one by one)."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import stdtrit

from kvutils.errors import DataError, at_least

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
Level = Callable[[np.ndarray], np.ndarray]  # weights (R, n) -> (R, ...): a statistic of scores that it knows
Units = Sequence[Hashable] | None  # of the items; None: each its own
TAILS = (1 - 0.95) / 2, (1 + 0.95) / 2  # of a 95 % interval
_CHUNK, _KEPT = 2**25, 2**23  # weights held at once (256 MiB), and kept for the next statistic of the same items
FEW_UNITS = 30  # below: Student's t instead of percentiles
POWER = 0.8  # probability with which a detectable difference would show


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; n is the number of items."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, found: Mapping) -> Interval:
        """From `as_dict`."""
        return cls(**{each.name: math.nan if found[each.name] is None else found[each.name] for each in fields(cls)})

    def as_dict(self) -> dict:
        """{mean, low, high, n}, with None where a number is undefined: JSON has no NaN."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}

    def scaled(self, factor: float) -> Interval:
        """In another unit; a negative factor turns the interval round."""
        low, high = sorted((self.low * factor, self.high * factor))
        return replace(self, mean=self.mean * factor, low=low, high=high)


@dataclass(frozen=True)
class Effect(Interval):
    """A difference that a verdict may be about: beside its 95 % interval its standard error, and how many independent units it rests on."""

    error: float
    units: int

    def scaled(self, factor: float) -> Effect:
        return replace(super().scaled(factor), error=self.error * abs(factor))

    @property
    def narrow(self) -> tuple[float, float]:
        """The 90 % interval, which decides on equivalence (two one-sided tests of 5 %)."""
        reach = _quantile(0.95, self.units) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def detectable(self) -> float:
        """The true difference that the two-sided 5 % test finds with probability `POWER`; NaN where nothing ever differed.

        >>> round(Effect(1.0, 0.8, 1.2, 10_000, 0.1, 10_000).detectable, 2)
        0.28
        """
        factor = _quantile(TAILS[1], self.units) + _quantile(POWER, self.units)
        return float(factor * self.error) if self.error > 0 else math.nan


UNDEFINED = Effect(math.nan, math.nan, math.nan, 0, math.nan, 0)


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


def bootstrap_ci(scores, statistic: Statistic = mean_statistic, n_boot: int = 2000, seed: int = 0, groups: Units = None) -> Interval | list[Interval]:
    """95 % interval of a statistic of scores (n,) or (n, k).

    statistic: (weights (n_boot, n), scores) -> (n_boot,). One that returns (n_boot, L), such as the mean of a curve (n, L), gives a list of
    L intervals from the same resamples. groups (n,): the resampled units, pairs of them as tuples. DataError for no scores or scores that
    are not finite; resamples with an undefined (NaN) value are left out.

    >>> bootstrap_ci([0.0, 1.0, 1.0, 1.0]).mean
    0.75
    """
    scores = finite_scores(scores)
    return resample(lambda w: statistic(w, scores), len(scores), n_boot, seed, groups).intervals()


def effect(scores, statistic: Statistic = mean_statistic, n_boot: int = 2000, seed: int = 0, groups: Units = None) -> Effect | list[Effect]:
    """As `bootstrap_ci`, of a statistic that is a difference already."""
    scores = finite_scores(scores)
    return resample(lambda w: statistic(w, scores), len(scores), n_boot, seed, groups).effects()


def paired_difference(a, b, statistic: Statistic = mean_statistic, n_boot: int = 2000, seed: int = 0, groups: Units = None) -> Effect | list[Effect]:
    """Statistic(a) - statistic(b), two measurements of the same n items, resampled together."""
    a, b = finite_scores(a), finite_scores(b)
    return resample(lambda w: statistic(w, a) - statistic(w, b), len(a), n_boot, seed, groups).effects()


@dataclass(frozen=True, eq=False)
class Resampled:
    """A value () or (L,) of n items in `units`, and its resamples (R, ...); jackknife: those without one unit each, not bootstrap.
    around: intervals are Student's t around the value, with the standard error of the resamples."""

    value: np.ndarray
    draws: np.ndarray
    n: int
    units: int
    jackknife: bool = False
    around: bool = False

    @property
    def error(self) -> np.ndarray:
        """() or (L,) standard error; NaN with fewer than two defined resamples."""
        draws = self.draws if len(self.draws) > 1 and np.isfinite(self.draws).all() else np.ma.masked_invalid(self.draws)
        units, spread = max(self.units, 2), draws.std(axis=0, ddof=1)
        if self.jackknife:
            spread *= (units - 1) / math.sqrt(units)
        elif self.around:  # resamples of few units vary by less than new ones would
            spread *= math.sqrt(units / (units - 1))
        return np.ma.filled(spread, np.nan)[()]

    def intervals(self) -> Interval | list[Interval]:
        return self._each(lambda value, low, high, error: Interval(value, low, high, self.n))

    def effects(self) -> Effect | list[Effect]:
        return self._each(lambda value, low, high, error: Effect(value, low, high, self.n, error, self.units))

    def _each(self, make: Callable) -> Any:
        error = self.error
        if self.jackknife or self.around:
            reach = _quantile(TAILS[1], self.units) * error
            low, high = self.value - reach, self.value + reach
        else:
            drawn = ~np.isnan(self.draws)
            quantile = np.quantile if drawn.all() else np.nanquantile  # which goes column by column
            low, high = np.where(drawn.any(0), quantile(np.where(drawn.any(0), self.draws, 0.0), TAILS, axis=0), np.nan)
        found = [make(*map(float, each)) for each in zip(*map(np.ravel, (self.value, low, high, error)), strict=True)]
        return found if np.ndim(self.value) else found[0]


def resample(compute: Level, n: int, n_boot: int, seed: int, groups: Units = None, few: int = FEW_UNITS,
             around: bool = False) -> Resampled:  # fmt: skip
    """compute (weights (R, n)) -> (R, ...) of all n items, and of n_boot resamples of their groups or, where these are fewer than
    `few`, without each group in turn. few: 0 for what hardly moves without one group, such as the place of a maximum. around: for what
    chooses by the weights, whose resamples lie to one side of the value, and which hardly moves without one group either."""
    few = 0 if around else few
    at_least("n_boot", n_boot)
    groups = tuple(range(n) if groups is None else groups)
    (unit, units), value = _numbered(groups), np.asarray(compute(np.ones((1, n))))[0]
    drawn = [_weights(1 - np.eye(units), unit)] if units < few else (_kept if n_boot * unit.size <= _KEPT else _drawn)(groups, n_boot, seed)
    draws = [np.asarray(compute(weights)) for weights in drawn if len(weights)] or [np.full((1, *value.shape), np.nan)]
    return Resampled(value, np.concatenate(draws), n, units, units < few, around)


def _drawn(groups: tuple[Hashable, ...], n_boot: int, seed: int) -> Iterator[np.ndarray]:
    random, (unit, units) = np.random.default_rng(seed), _numbered(groups)
    step = max(1, _CHUNK // unit.size)
    for start in range(0, n_boot, step):
        yield _weights(random.multinomial(units, np.full(units, 1 / units), size=min(step, n_boot - start)), unit)


_kept = lru_cache(maxsize=2)(lambda *resamples: list(_drawn(*resamples)))  # a table's statistics are taken one after the other


def _weights(counts: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Of items, where any is drawn, from those of units and `_numbered`."""
    drawn = np.pad(counts, ((0, 0), (0, 1)), constant_values=1)[:, unit].prod(axis=2).astype(float)
    return drawn if (some := drawn.any(axis=1)).all() else drawn[some]  # a copy would sum to other last bits


@lru_cache(maxsize=4)
def _numbered(groups: tuple[Hashable, ...]) -> tuple[np.ndarray, int]:
    """(n, 1 or 2) numbers of the items' units, by first appearance, so that names do not matter; -1: it is no pair. How many units."""
    order, widest = {}, max(map(len, names := units_of(groups)), default=1)
    unit = [[order.setdefault(name, len(order)) for name in each] + [-1] * (widest - len(each)) for each in names]
    return np.array(unit, dtype=int).reshape(len(names), widest), len(order)


def units_of(groups: Sequence[Hashable]) -> list[tuple]:
    """What each item is resampled by: its group; of a pair, what other items have too. A pair that shares nothing is one unit, not two:
    the product of two counts varies three times as much as one."""
    names = [each if isinstance(each, tuple) else (each,) for each in groups]
    times = Counter(itertools.chain.from_iterable(names))
    return [tuple(name for name in each if times[name] > 1) or each[:1] for each in names]


def _quantile(level: float, units) -> np.ndarray:
    """Of Student's t for so many units; of the normal distribution, all but, for many."""
    return stdtrit(np.maximum(units, 2) - 1, level)


def mean_effect(effects: Sequence[Effect]) -> Effect:
    """The mean of effects on different items, `UNDEFINED` of none. Student's t with Welch and Satterthwaite's degrees of freedom: `units` - 1."""
    if not effects:
        return UNDEFINED
    errors = np.array([each.error for each in effects]) / len(effects)
    freedom = (errors**2).sum() ** 2 / (errors**4 / [max(each.units - 1, 1) for each in effects]).sum() if errors.any() else math.nan
    units = max(2, round(freedom) + 1) if math.isfinite(freedom) else sum(each.units for each in effects)
    mean, error = float(np.mean([each.mean for each in effects])), float(np.sqrt((errors**2).sum()))
    reach = float(_quantile(TAILS[1], units)) * error
    return Effect(mean, mean - reach, mean + reach, sum(each.n for each in effects), error, units)


def with_draws(effects: Sequence[Effect], drawn: Resampled, times: float) -> list[Effect]:
    """Effects (metrics) that rest on drawn (K, metrics), with the variance between draws beside that of images, or whatever was resampled.

    Scores R_k of K draws have a sample variance s2 of v (what was drawn) + t (the images) on average, t = sum_k Var(R_k - mean R) / (K - 1)
    over resamples of images. So v = s2 - t, at least 0, and error^2 is that over images + times v: times = 1 / K for the mean of all draws
    that could be; 1 + 1 / K if one more of them is compared with it. Student's t with Welch and Satterthwaite's freedom, at least K - 1: K
    - 1 of s2, units - 1 of the rest."""
    k, found = len(drawn.value), []
    chance = replace(drawn, draws=drawn.draws - drawn.draws.mean(axis=1, keepdims=True)).error
    for each, total, noise in zip(effects, drawn.value.var(axis=0, ddof=1), (chance**2).sum(axis=0) / (k - 1), strict=True):
        if total > noise:
            draws, images = times * total, each.error**2 - times * noise
            freedom = max(k - 1, (draws + images) ** 2 / (draws**2 / (k - 1) + images**2 / (each.units - 1)))
            error = math.sqrt(draws + images)
            reach = float(stdtrit(freedom, TAILS[1])) * error
            each = Effect(each.mean, each.mean - reach, each.mean + reach, each.n, error, round(freedom) + 1)
        found.append(each)
    return found


def finite_scores(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    bad = int((~np.isfinite(scores).all(axis=tuple(range(1, scores.ndim)))).sum())
    if not len(scores) or bad:
        raise DataError(f"expected finite scores of at least one item, found {len(scores)} items, {bad} of them with NaN or "
                        "infinite scores; leave undefined items out")  # fmt: skip
    return scores
