"""A layer is chosen on one half of the items and read on the other; does quality build up to it, and degrade after it?"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from kvutils.errors import ParameterError
from kvutils.metrics.statistics import TAILS, Interval, Level, Statistic, Units, effect, finite_scores, mean_statistic, resample

TIE = 9  # digits: layers whose scores differ by less are equal, or the last bits of a processor's sums would choose


@dataclass(frozen=True, eq=False)
class Halves:
    """Which items report together, and which choose for them: `second` (n,) bool, the half of each item; `choosing` (2, n) bool, the
    items that choose for the first, and for the second half: those of the other, without what shares a picture with them."""

    second: np.ndarray
    choosing: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[Hashable], seed: int = 0, pictures: Sequence[Sequence[str]] | None = None) -> Halves:
        """groups (n,): what stays together; pictures (n,): names of each item's pictures. ParameterError unless each half has two to choose on."""
        names = [str(group) for group in groups]
        second = ~choosing_half(names, seed)
        choosing = np.stack([second, ~second])
        if pictures is not None:
            for half, chooses in zip((~second, second), choosing, strict=True):
                shown = {name for each, reported in zip(pictures, half, strict=True) if reported for name in each}
                chooses &= [shown.isdisjoint(each) for each in pictures]
        least = min(len({name for name, c in zip(names, chooses, strict=True) if c}) for chooses in choosing)
        if least < 2:
            raise ParameterError("choosing a layer on one half and reading it on the other needs at least 4 independent units, two in each "
                                 f"half, found {len(set(names))}, {least} of them free to choose")  # fmt: skip
        return cls(second, choosing)

    def best(self, scores: np.ndarray, statistic: Statistic = mean_statistic) -> list[int]:
        """[2] index of the best of the L layers of scores (n, L, ...) for the first, and for the second half; the earliest on a tie."""
        return [int(np.nanargmax(each_layer(statistic)(np.ones((1, chooses.sum())), scores[chooses])[0].round(TIE))) for chooses in self.choosing]

    def read(self, scores: np.ndarray, best: Sequence[int]) -> np.ndarray:
        """(n, ...) scores of every item at the layer that was chosen for its half: no item has chosen its own layer."""
        return scores[np.arange(len(scores)), np.where(self.second, best[1], best[0])]

    def chosen(self, scores: np.ndarray, statistic: Statistic = mean_statistic, by: np.ndarray | None = None, best: Statistic | None = None) -> Level:
        """That statistic of scores (n, L, ...) in the layers that the halves choose for each other *by the same weights*, so that every
        resample chooses anew: halves that choose alike where layers hardly differ have estimates that go together, and with layers that
        stay an interval would be too narrow (benchmarks/VERDICTS.md). by (n, L, ...), best: what chooses, and the statistic of it; these
        scores and this one unless they are given."""
        by, best = scores if by is None else by, each_layer(best or statistic)

        def level(weights: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore"):  # a resample may leave a half without any item to choose on: it takes the first
                by_half = [best(weights[:, chooses], by[chooses]) for chooses in self.choosing]
            best_of = np.stack([np.where(np.isnan(each), -np.inf, each.round(TIE)).argmax(axis=1) for each in by_half])
            pairs, which = np.unique(best_of, axis=1, return_inverse=True)
            rows = [np.flatnonzero(which == index) for index in range(pairs.shape[1])]
            found = [statistic(weights[each], self.read(scores, pair)) for each, pair in zip(rows, pairs.T, strict=True)]
            return np.concatenate(found)[np.concatenate(rows).argsort()]

        return level


def each_layer(statistic: Statistic) -> Statistic:
    """That statistic of every layer (or source) of scores (n, L, ...): (n_boot, L)."""
    return lambda weights, items: np.stack([statistic(weights, items[:, layer]) for layer in range(items.shape[1])], axis=1)


def build_then_degrade(scores, halves: Halves, groups: Units = None, statistic: Statistic = mean_statistic, n_boot: int = 2000,
                       seed: int = 0) -> dict:  # fmt: skip
    """Does quality build up to some layer, and degrade after it? (paper, section 3.1, Figure 2); JSON-able.

    scores (n, L >= 3, ...), higher is better. The best layer between the first and the last is chosen on each half and read on the
    other (`best`, two indices), so that every item is used; `minus_first` and `minus_last` are its paired differences, the choice made
    anew in every resample. On a curve that only falls the one is below 0 and the other above. The best of several is ahead of a layer by
    its noise between layers as well: `between_first` and `between_last` are the differences of the mean over all layers between, which chose
    nothing. `peak`: the best layer of all, over all items, with its interval (indices). ParameterError for fewer than three layers."""
    scores = finite_scores(scores)
    if scores.shape[1] < 3:
        raise ParameterError(f"a layer between the first and the last needs at least 3 layers, found {scores.shape[1]}")
    best = [1 + index for index in halves.best(scores[:, 1:-1], statistic)]
    inside, ends, options = halves.chosen(scores[:, 1:-1], statistic), each_layer(statistic), (n_boot, seed, groups)
    first, last = resample(lambda w: inside(w)[:, None] - ends(w, scores[:, [0, -1]]), len(scores), *options, around=True).effects()

    def between(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
        levels = each_layer(statistic)(weights, scores)
        return levels[:, 1:-1].mean(axis=1, keepdims=True) - levels[:, [0, -1]]

    between_first, between_last = effect(scores, between, *options)
    found = resample(lambda w: each_layer(statistic)(w, scores), len(scores), *options, few=0)
    peaks = np.nanargmax(found.draws.round(TIE), axis=1)
    low, high = np.quantile(peaks, TAILS, method="inverted_cdf")
    return {
        "best": best, "minus_first": first.as_dict(), "minus_last": last.as_dict(),
        "between_first": between_first.as_dict(), "between_last": between_last.as_dict(),
        "peak": Interval(float(np.nanargmax(found.value.round(TIE))), float(low), float(high), len(scores)).as_dict(),
    }  # fmt: skip


def choosing_half(groups: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """(n,) bool: the half of the groups on which a layer is chosen, by a seeded hash of their names: more data keep the order of the rest."""
    names = [str(group) for group in groups]
    units = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    return np.isin(names, units[: len(units) // 2])
