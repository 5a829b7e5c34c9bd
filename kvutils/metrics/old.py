"""Goes with issue 13: what its parts no longer use, piece by piece."""

import numpy as np

from kvutils.metrics.statistics import _TAILS, UNDEFINED, Interval, _scores, choosing_half, mean_statistic, paired_difference, resample


def undefined(name, reason):
    return UNDEFINED.claim(name, reason=reason)


def claim_of_parts(entries, unit):
    return UNDEFINED.claim(reason="", unit=unit, entries=entries) | {"n": len(entries)}


def percentile_interval(value, draws, n):
    if draws.ndim > 1:
        return [percentile_interval(v, d, n) for v, d in zip(value, np.moveaxis(draws, 1, 0), strict=True)]
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, _TAILS) if len(draws) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), n)


def peak_then_degrade(scores, groups=None, seed=0, statistic=mean_statistic, n_boot=2000):
    scores = _scores(scores)
    names = list(range(len(scores)) if groups is None else groups)
    chosen = choosing_half(names, seed)

    def curve(weights, items):
        return np.stack([statistic(weights, items[:, layer]) for layer in range(items.shape[1])], axis=1)

    best = int(np.nanargmax(curve(np.ones((1, chosen.sum())), scores[chosen])[0]))
    held_out, held_groups = scores[~chosen], [name for name, c in zip(names, chosen, strict=True) if not c]
    options = (statistic, n_boot, seed, held_groups)
    first, last = (paired_difference(held_out[:, best], held_out[:, other], *options) for other in (0, -1))
    found = resample(lambda w: curve(w, scores), len(scores), n_boot, seed, names)
    peaks = np.nanargmax(found.draws, axis=1)
    low, high = np.quantile(peaks, _TAILS, method="inverted_cdf")
    return {
        "best": best, "minus_first": first.as_dict(), "minus_last": last.as_dict(), "builds": first.low > 0, "degrades": last.low > 0,
        "peak": Interval(float(np.nanargmax(found.value)), float(low), float(high), len(scores)).as_dict(),
        "peak_shares": (np.bincount(peaks, minlength=scores.shape[1]) / len(peaks)).tolist(),
    }
