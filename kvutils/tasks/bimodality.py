"""Two groups or one? Two normal distributions fitted to numbers, many resamples at once (ours).

Ashman's D = |m1 - m2| / sqrt((s1^2 + s2^2) / 2) alone calls a flat or a skewed distribution bimodal: two normals
describe it better than one. So D counts only where the numbers themselves are rarer between the two means.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from kvutils.errors import DataError, ParameterError

PAPER_THRESHOLDS = {"llava-onevision-7b": 450.0}  # squared key units, section 3.2
_MOST_POINTS = 5_000  # that the mixture is fitted to
_SMALLEST_MODE = 0.01  # share of the keys; fewer are outliers


@dataclass(frozen=True)
class Threshold:
    """Below which variance a key is input-agnostic, and whether the keys fall into two groups at all.

    value: squared key units; method: "paper", "valley" (between two modes) or "quantile ...". two_modes: two
    normal distributions describe the log-variance better than one (BIC), Ashman's D is above 2, the density
    has a valley between them, and each has 1 % of the keys. separation: Ashman's D,
    |m1 - m2| / sqrt((s1^2 + s2^2) / 2); modes and shares: exp(m) and weight of the two, the lower first.
    """

    value: float
    two_modes: bool
    separation: float
    method: str
    modes: tuple[float, float]
    shares: tuple[float, float]

    def as_dict(self) -> dict:
        return asdict(self)


def variance_threshold(
    variance: torch.Tensor,
    is_newline: np.ndarray | None = None,
    model: str | None = None,
    quantile: float = 0.1,
    seed: int = 0,
) -> Threshold:
    """The paper's threshold for its own model; else the valley of the log-variance; else a quantile (ours).

    variance (..., N), pooled; is_newline (N,) leaves positions out; model: a name in `MODELS`. The valley is
    the lowest density between the means of a mixture of two normal distributions. Without two modes the value
    is the stated quantile of the variances. A variance of exactly zero counts for the quantile only. Raises
    DataError for variances that are negative, not finite, or all alike.
    """
    if not 0 < quantile < 1:
        raise ParameterError(f"quantile must be between 0 and 1, not {quantile}")
    values = torch.as_tensor(variance).double().cpu().numpy()
    if is_newline is not None:
        values = values[..., ~np.asarray(is_newline, dtype=bool)]
    values = values.reshape(-1)
    if not np.isfinite(values).all() or (values < 0).any():
        raise DataError("variances must be finite and not negative")
    logs = np.log(values[values > 0])
    if len(logs) < 10 or logs.max() - logs.min() < 1e-9:
        raise DataError(f"a threshold needs at least 10 different variances, found {len(np.unique(logs))}")
    if len(logs) > _MOST_POINTS:  # evenly spaced ranks stand for all
        logs = np.quantile(logs, (np.arange(_MOST_POINTS) + 0.5) / _MOST_POINTS)
    points = logs[:, None]
    one, two = (GaussianMixture(k, n_init=3, random_state=seed).fit(points) for k in (1, 2))
    order = two.means_[:, 0].argsort()
    means, spread = two.means_[order, 0], two.covariances_[order, 0, 0]
    shares = two.weights_[order]
    separation = float((means[1] - means[0]) / np.sqrt(spread.mean()))
    grid = np.linspace(*means, 1001)
    valley = int(two.score_samples(grid[:, None]).argmin())
    two_modes = bool(
        two.bic(points) < one.bic(points)
        and separation > 2
        and 0 < valley < len(grid) - 1
        and shares.min() >= _SMALLEST_MODE
    )
    if model in PAPER_THRESHOLDS:
        value, method = PAPER_THRESHOLDS[model], "paper"
    elif two_modes:
        value, method = float(np.exp(grid[valley])), "valley"
    else:
        value, method = float(np.quantile(values, quantile)), f"quantile {quantile:g}"
    modes = tuple(np.exp(means).tolist())
    return Threshold(value, two_modes, separation, method, modes, tuple(shares.tolist()))


def residual_log_variance(
    variance: torch.Tensor, foreground_frequency: np.ndarray, is_newline: np.ndarray | None = None
) -> torch.Tensor:
    """(..., N) float64 on the CPU: log-variance without what is linear in how often a position is foreground.

    A position that always shows background varies little for that reason alone. foreground_frequency (N,):
    share of images, 0..1, in which the token at a position is foreground. One line per layer and head is
    fitted by least squares over the positions, newlines (NaN in the result) and variances of zero (minus
    infinity) left out; the mean of the log-variance stays, so that exp() of the result is a variance again.
    """
    logs = torch.as_tensor(variance).double().cpu().log()
    frequency = np.asarray(foreground_frequency, dtype=np.float64)
    if frequency.shape != logs.shape[-1:]:
        raise DataError(
            f"foreground_frequency must be (N,) = {tuple(logs.shape[-1:])}, not {frequency.shape}"
        )
    newline = np.zeros(len(frequency), bool) if is_newline is None else np.asarray(is_newline, dtype=bool)
    if not np.isfinite(frequency[~newline]).all() or logs[..., ~newline].isnan().any():
        raise DataError("frequencies must be finite and variances not negative wherever there is no newline")
    level = torch.from_numpy(np.where(newline, 0, frequency))
    used = (logs.isfinite() & torch.from_numpy(~newline)).double()
    count = used.sum(-1, keepdim=True).clamp(min=1)
    x = level - (used * level).sum(-1, keepdim=True) / count
    y = torch.where(used > 0, logs, 0.0)
    slope = (used * x * y).sum(-1, keepdim=True) / (used * x * x).sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.where(torch.from_numpy(newline), torch.nan, logs - slope * x)


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
