"""How much each image key varies across images: one pass, constant memory (paper, section 3.2 and A.6.1).

An image key that hardly changes from image to image is *input-agnostic*. The statistic is the L2 variance

    variance[l, g, n] = mean over images i of || key_i[l, g, n] - mean_i key_i[l, g, n] ||^2

in squared key units (divisor: the number of images). Rotary position encoding rotates the keys of one
position alike in every image, so it leaves this number unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from kvutils.capture import Capture, capture
from kvutils.errors import DataError, ParameterError
from kvutils.images import ImageLike
from kvutils.layout import TokenLayout
from kvutils.models import MLM

PAPER_THRESHOLDS = {"llava-onevision-7b": 450.0}  # squared key units, section 3.2
_SUMS = ("mean", "sum_squares", "sum_norms")
_MOST_POINTS = 5_000  # that the mixture is fitted to
_SMALLEST_MODE = 0.01  # share of the keys; fewer are outliers


class KeyVariance:
    """Streaming, mergeable L2 variance and mean norm of keys in float64.

    Welford's update within a stream, that of Chan et al. between streams.

    Images are taken one at a time, so the result does not depend on how they were batched, and the memory is
    that of one mean key per position however many images are seen.

    >>> variance = KeyVariance()
    >>> variance.update(torch.zeros(3, 2, 4)).update(torch.ones(3, 2, 4)).result
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.count = 0  # images seen
        self.mean: torch.Tensor | None = None  # (..., D) float64
        # (...) float64, sums over images: of the squared L2 distance to the mean, and of the norm
        self.sum_squares: torch.Tensor | None = None
        self.sum_norms: torch.Tensor | None = None

    def update(self, keys: torch.Tensor) -> KeyVariance:
        """Add B images and return itself. keys: (B, ..., D), any float type, every call the same (..., D).

        Raises DataError for another shape and for keys that are not finite (half precision may have
        overflowed).
        """
        keys = torch.as_tensor(keys)
        if keys.ndim < 2 or not keys.is_floating_point():
            raise DataError(
                f"keys must be floating point of shape (B, ..., D), found {keys.dtype} {tuple(keys.shape)}"
            )
        if self.mean is not None and keys.shape[1:] != self.mean.shape:
            raise DataError(
                f"keys of shape (B, *{tuple(self.mean.shape)}) were expected, found {tuple(keys.shape)}; "
                "give every image the same token grid (same resize)"
            )
        if not torch.isfinite(keys).all():
            raise DataError(
                "keys hold NaN or infinite values; run the model in bfloat16 or float32 instead of float16"
            )
        if self.mean is None and len(keys):
            self.mean = torch.zeros(keys.shape[1:], dtype=torch.float64, device=keys.device)
            self.sum_squares = torch.zeros(keys.shape[1:-1], dtype=torch.float64, device=keys.device)
            self.sum_norms = torch.zeros_like(self.sum_squares)
        for image in keys:
            image = image.to(self.mean)
            delta = image - self.mean
            self.count += 1
            self.mean += delta / self.count
            self.sum_squares += delta.square().sum(-1) * ((self.count - 1) / self.count)
            self.sum_norms += image.norm(dim=-1)
        return self

    def merge(self, other: KeyVariance) -> KeyVariance:
        """Add the images another stream (another process, another shard) has seen. Returns itself."""
        if other.count == 0:
            return self
        if self.count == 0:
            self.count, self.mean = other.count, other.mean.clone()
            self.sum_squares, self.sum_norms = other.sum_squares.clone(), other.sum_norms.clone()
            return self
        if self.mean.shape != other.mean.shape:
            raise DataError(
                f"cannot merge keys of shape {tuple(other.mean.shape)} into {tuple(self.mean.shape)}"
            )
        total = self.count + other.count
        delta = other.mean.to(self.mean) - self.mean
        self.mean += delta * (other.count / total)
        between = delta.square().sum(-1) * (self.count * other.count / total)
        self.sum_squares += other.sum_squares.to(between) + between
        self.sum_norms += other.sum_norms.to(between)
        self.count = total
        return self

    @property
    def result(self) -> torch.Tensor:
        """L2 variance (...) in float64, divisor n: zero for one image. DataError before the first image."""
        return self.variance(ddof=0)

    def variance(self, ddof: int = 0) -> torch.Tensor:
        """The same with divisor n - ddof; ParameterError where that is not positive."""
        self._check_seen()
        if self.count <= ddof:
            raise ParameterError(
                f"a variance with divisor n - {ddof} needs more than {ddof} images, found {self.count}"
            )
        return self.sum_squares / (self.count - ddof)

    @property
    def mean_norm(self) -> torch.Tensor:
        """(...) float64: the L2 norm of each key, averaged over images."""
        self._check_seen()
        return self.sum_norms / self.count

    def _check_seen(self) -> None:
        if self.count == 0:
            raise DataError("no key has been seen yet: call update(keys) first")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All it holds as tensors on the CPU, such as `Store` and `Parts` keep."""
        state = {"count": torch.tensor(self.count)}
        if self.count:
            state |= {name: getattr(self, name).cpu().clone() for name in _SUMS}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> KeyVariance:
        """The stream that `state_dict` described, to go on with or to merge; DataError for anything else."""
        found, self = {name: torch.as_tensor(value) for name, value in state.items()}, cls()
        seen = "count" in found and found["count"].ndim == 0 and int(found["count"]) > 0
        if set(found) != {"count", *(_SUMS if seen else ())}:
            raise DataError(
                f"not the state of a KeyVariance, which holds count, {', '.join(_SUMS)}: {[*found]}"
            )
        self.count = int(found["count"])
        for name in _SUMS if seen else ():
            setattr(self, name, found[name].double().clone())
        if seen and not self.mean.shape[:-1] == self.sum_squares.shape == self.sum_norms.shape:
            raise DataError("the state of this KeyVariance was mixed from different ones: its shapes differ")
        return self


class SameGrid:
    """Compares the layouts of images that are to be averaged position by position."""

    def __init__(self) -> None:
        self.layout: TokenLayout | None = None

    def check(self, layout: TokenLayout, name: str) -> None:
        """DataError unless the image `name` has the token grid of the first one."""
        if self.layout is None:
            self.layout = layout
        elif layout.grids != self.layout.grids or len(layout) != len(self.layout):
            raise DataError(
                f"{name} ({layout.image_size[0]}x{layout.image_size[1]}) has the token grids {layout.grids}, "
                f"the images before it {self.layout.grids}: resize all images to one size, or use "
                "base_view_only=True"
            )


def key_variance(
    mlm: MLM,
    images: Iterable[ImageLike],
    layers: str | int | Iterable[int] = "all",
    *,
    prefix: str | None = None,
    base_view_only: bool | None = None,
    max_pixels: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> KeyVariance:
    """Variance and mean norm (L, G, N) of the image keys of any number of images with one token grid.

    Row i belongs to the i-th of the increasing layer numbers. Memory stays that of one batch, so `images` may
    be a generator; parts of them can be streamed elsewhere and merged. Newline tokens are in N and mean
    nothing. Arguments as in `capture`. Raises DataError for images with different token grids and for none,
    and what `capture` raises.

    >>> key_variance(load_mlm("pocket"), scenes).merge(KeyVariance.from_state(stored)).result
    """
    variance, grid = KeyVariance(), SameGrid()

    def add(index: int, one: Capture) -> None:
        grid.check(one.layout, f"images[{index}]")
        variance.update(one.keys[None])

    capture(
        mlm, images, prefix, layers, values=False, features=False, base_view_only=base_view_only,
        max_pixels=max_pixels, batch_size=batch_size, to=None, on_capture=add, progress=progress,
    )  # fmt: skip
    if not variance.count:
        raise DataError("a variance across images needs images, found none")
    return variance


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
