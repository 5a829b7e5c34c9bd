"""Two groups or one? Two normal distributions fitted to numbers, many resamples at once (ours).

Ashman's D = |m1 - m2| / sqrt((s1^2 + s2^2) / 2) alone calls a flat or a skewed distribution bimodal: two normals
describe it better than one. So D counts only where the numbers themselves are rarer between the two means.
"""

import numpy as np

from kvutils.errors import DataError

VALLEY = 0.8  # of the lower mode's density: above that there is no valley
_SMALLEST = 0.01  # share of the numbers; fewer are outliers
_MOST = 5_000  # numbers that are fitted; evenly spaced ranks stand for more
Fit = tuple[np.ndarray, np.ndarray, np.ndarray]  # means, standard deviations, shares: (R, 2) each, lower first


def fit_two_normals(values: np.ndarray, start: Fit | None = None, steps: int = 150) -> Fit:
    """Expectation maximisation for each row of values (R, n). Without a start, the likeliest of five splits.

    Standard deviations stay above 1 % of a row's. Raises DataError unless rows have at least 10 finite numbers.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.shape[1] < 10 or not np.isfinite(values).all():
        raise DataError(f"two modes need rows of at least 10 finite numbers, found shape {values.shape}")
    if start is None:
        fits = []
        for cut in (0.1, 0.25, 0.5, 0.75, 0.9):
            limit = np.quantile(values, cut, axis=1, keepdims=True)
            fits.append(_climb(values, [values <= limit, values > limit], steps))
        best = np.argmax([likelihood for _, likelihood in fits], axis=0)
        start = tuple(np.stack([fits[b][0][k][row] for row, b in enumerate(best)]) for k in range(3))
    else:
        start, _ = _climb(values, _responsible(values, start)[0], steps)
    order = np.argsort(start[0], axis=1)
    return tuple(np.take_along_axis(each, order, axis=1) for each in start)


def _climb(values: np.ndarray, parts, steps: int) -> tuple[Fit, np.ndarray]:
    """From (responsibility of the first, of the second) to the fit and its mean log-likelihood (R,)."""
    floor = np.maximum(1e-2 * values.std(axis=1), 1e-12)
    for _ in range(steps):
        sums = [np.maximum(part.sum(1), 1e-9) for part in parts]
        means = [(part * values).sum(1) / n for part, n in zip(parts, sums, strict=True)]
        spread = [
            np.maximum(np.sqrt((part * (values - mean[:, None]) ** 2).sum(1) / n), floor)
            for part, mean, n in zip(parts, means, sums, strict=True)
        ]
        fit = tuple(np.stack(each, axis=1) for each in (means, spread, [n / values.shape[1] for n in sums]))
        parts, likelihood = _responsible(values, fit)
    return fit, likelihood


def _responsible(values: np.ndarray, fit: Fit) -> tuple[list[np.ndarray], np.ndarray]:
    logs = [
        np.log(share[:, None]) - np.log(sd[:, None]) - 0.5 * ((values - mean[:, None]) / sd[:, None]) ** 2
        for mean, sd, share in zip(*(each.T for each in fit), strict=True)
    ]
    total = np.logaddexp(*logs)
    return [np.exp(each - total) for each in logs], total.mean(axis=1)


def separation(values: np.ndarray, start: Fit | None = None) -> tuple[np.ndarray, Fit]:
    """(R,) Ashman's D of each row of values (R, n), 0 where there is no valley between the means; and the fit.

    A valley: between the means a kernel density (Gaussian, Silverman's width for the spread within the groups)
    falls below `VALLEY` of the lower mode's, and each group has 1 % of the numbers; never among equal ones.
    start: an earlier fit of one row, for resamples of it.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float))
    if values.shape[1] > _MOST:
        values = np.quantile(values, (np.arange(_MOST) + 0.5) / _MOST, axis=1).T
    if start is not None:
        start = tuple(np.repeat(each, len(values), axis=0) for each in start)
    fit = fit_two_normals(values, start, 150 if start is None else 50)
    means, sds, shares = fit
    d = (means[:, 1] - means[:, 0]) / np.sqrt((sds**2).mean(axis=1))
    there = [_has_valley(*each) for each in zip(values, means, sds, strict=True)]
    return np.where(np.array(there) & (shares.min(axis=1) >= _SMALLEST), d, 0.0), fit


def _has_valley(values: np.ndarray, means: np.ndarray, sds: np.ndarray) -> bool:
    width = 0.9 * np.sqrt((sds**2).mean()) * len(values) ** -0.2
    grid = np.linspace(means[0] - sds[0], means[1] + sds[1], 121)
    density = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).sum(1)
    between = np.flatnonzero((grid > means[0]) & (grid < means[1]))
    if not len(between):
        return False
    valley = between[density[between].argmin()]
    return bool(density[valley] < VALLEY * min(density[:valley].max(initial=0), density[valley:].max()))
