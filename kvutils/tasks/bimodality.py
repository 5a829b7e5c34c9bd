"""Two groups of keys or one? Two normal distributions fitted to the log-variance, and the threshold between them.

Ashman's D = |m1 - m2| / sqrt((s1^2 + s2^2) / 2) alone calls a flat or a skewed distribution bimodal: two normals describe
it better than one. So D counts only where the numbers themselves are rarer between the two means, and each group has 1 %
of them. `variance_threshold` asks this of all keys of a model, once; `separation` of many resamples at once (both ours).
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from kvutils.errors import DataError
from kvutils.models import base_name

PAPER_THRESHOLDS = {"llava-onevision-7b": 450.0}  # squared key units, section 3.2
QUANTILE = 0.1  # of the variances: the threshold where there are no two modes (ours)
VALLEY = 0.8  # of the lower mode's density: above that there is no valley
_SMALLEST = 0.01  # share of the numbers; fewer are outliers
_MOST = 5_000  # numbers that are fitted; evenly spaced ranks stand for more
Fit = tuple[np.ndarray, np.ndarray, np.ndarray]  # means, standard deviations, shares: (R, 2) each, lower first


def variance_threshold(variance: torch.Tensor, model: str | None = None) -> dict:
    """Below which variance a key is input-agnostic, and whether the keys fall into two groups at all; JSON-able.

    variance: of any keys, pooled; zeros count for the quantile only. model: a name in `MODELS`, also at a commit. value: squared key units,
    the paper's for its own model, else the valley of the log-variance (lowest density between the means of a mixture of two
    normal distributions), else, without two modes, the `QUANTILE` (ours); method: "paper", "valley" or "quantile ...".
    two_modes: two normal distributions describe the log-variance better than one (BIC), Ashman's D is above 2, the density
    has a valley between them, and each has 1 % of the keys. separation: Ashman's D; modes and shares: exp(m) and weight of
    the two, lower first. Raises DataError for variances all alike.
    """
    values = variance.flatten().numpy()
    logs = np.log(values[values > 0])
    if len(logs) < 10 or np.ptp(logs) < 1e-9:
        raise DataError(f"a threshold needs at least 10 different variances, found {len(np.unique(logs))}")
    points = _ranks(logs)[:, None]
    one, two = (GaussianMixture(k, n_init=3, random_state=0).fit(points) for k in (1, 2))
    order = two.means_[:, 0].argsort()
    means, spread, shares = two.means_[order, 0], two.covariances_[order, 0, 0], two.weights_[order]
    distance = float((means[1] - means[0]) / np.sqrt(spread.mean()))
    grid = np.linspace(*means, 1001)
    valley = int(two.score_samples(grid[:, None]).argmin())
    better, inside = two.bic(points) < one.bic(points), 0 < valley < len(grid) - 1
    two_modes = bool(better and distance > 2 and inside and shares.min() >= _SMALLEST)
    if (published := base_name(model or "")) in PAPER_THRESHOLDS:
        value, method = PAPER_THRESHOLDS[published], "paper"
    elif two_modes:
        value, method = float(np.exp(grid[valley])), "valley"
    else:
        value, method = float(np.quantile(values, QUANTILE)), f"quantile {QUANTILE:g}"
    return {"value": value, "two_modes": two_modes, "separation": distance, "method": method,
            "modes": np.exp(means).tolist(), "shares": shares.tolist()}  # fmt: skip


def separation(values: np.ndarray, start: Fit | None = None) -> tuple[np.ndarray, Fit]:
    """(R,) Ashman's D of each row of values (R, n), 0 where there is no valley between the means; and the fit.

    A valley: between the means a kernel density (Gaussian, Silverman's width for the spread within the groups) falls below
    `VALLEY` of the lower mode's, and each group has 1 % of the numbers; never among equal ones. start: an earlier fit of
    one row, for resamples of it.
    """
    values = _ranks(np.atleast_2d(values))
    if start is not None:
        start = tuple(np.repeat(each, len(values), axis=0) for each in start)
    means, sds, shares = fit = _fit_two_normals(values, start)
    d = (means[:, 1] - means[:, 0]) / np.sqrt((sds**2).mean(axis=1))
    there = [_has_valley(*each) for each in zip(values, means, sds, strict=True)]
    return np.where(np.array(there) & (shares.min(axis=1) >= _SMALLEST), d, 0.0), fit


def _ranks(values: np.ndarray) -> np.ndarray:
    """(..., n) numbers, or evenly spaced ranks of them where they are more than can be fitted."""
    if values.shape[-1] <= _MOST:
        return values
    return np.moveaxis(np.quantile(values, (np.arange(_MOST) + 0.5) / _MOST, axis=-1), 0, -1)


def _fit_two_normals(values: np.ndarray, start: Fit | None) -> Fit:
    """Expectation maximisation for each row of values (R, n). Without a start, the likeliest of five splits.

    Standard deviations stay above 1 % of a row's.
    """
    if start is None:
        fits = []
        for cut in (0.1, 0.25, 0.5, 0.75, 0.9):
            limit = np.quantile(values, cut, axis=1, keepdims=True)
            fits.append(_climb(values, [values <= limit, values > limit], 150))
        best = np.argmax([likelihood for _, likelihood in fits], axis=0)
        fit = tuple(np.stack([fits[b][0][k][row] for row, b in enumerate(best)]) for k in range(3))
    else:
        fit, _ = _climb(values, _responsible(values, start)[0], 50)
    order = np.argsort(fit[0], axis=1)
    return tuple(np.take_along_axis(each, order, axis=1) for each in fit)


def _climb(values: np.ndarray, parts, steps: int) -> tuple[Fit, np.ndarray]:
    """From (responsibility of the first, of the second) to the fit and its mean log-likelihood (R,)."""
    floor = np.maximum(1e-2 * values.std(axis=1), 1e-12)
    for _ in range(steps):
        sums = [np.maximum(part.sum(1), 1e-9) for part in parts]
        means = [(part * values).sum(1) / n for part, n in zip(parts, sums, strict=True)]
        spread = [np.maximum(np.sqrt((part * (values - mean[:, None]) ** 2).sum(1) / n), floor)
                  for part, mean, n in zip(parts, means, sums, strict=True)]  # fmt: skip
        fit = tuple(np.stack(each, axis=1) for each in (means, spread, [n / values.shape[1] for n in sums]))
        parts, likelihood = _responsible(values, fit)
    return fit, likelihood


def _responsible(values: np.ndarray, fit: Fit) -> tuple[list[np.ndarray], np.ndarray]:
    logs = [np.log(share[:, None]) - np.log(sd[:, None]) - 0.5 * ((values - mean[:, None]) / sd[:, None]) ** 2
            for mean, sd, share in zip(*(each.T for each in fit), strict=True)]  # fmt: skip
    total = np.logaddexp(*logs)
    return [np.exp(each - total) for each in logs], total.mean(axis=1)


def _has_valley(values: np.ndarray, means: np.ndarray, sds: np.ndarray) -> bool:
    width = 0.9 * np.sqrt((sds**2).mean()) * len(values) ** -0.2
    grid = np.linspace(means[0] - sds[0], means[1] + sds[1], 121)
    density = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).sum(1)
    between = np.flatnonzero((grid > means[0]) & (grid < means[1]))
    if not len(between):
        return False
    valley = between[density[between].argmin()]
    return bool(density[valley] < VALLEY * min(density[:valley].max(initial=0), density[valley:].max()))
