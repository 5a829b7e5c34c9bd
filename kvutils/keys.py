"""How much each image key varies across images: one pass, constant memory (paper, section 3.2 and A.6.1).

An image key that hardly changes from image to image is *input-agnostic*. The statistic is the L2 variance

    variance[l, g, n] = mean over images i of || key_i[l, g, n] - mean_i key_i[l, g, n] ||^2

in squared key units (divisor: the number of images). Rotary position encoding rotates the keys of one
position alike in every image, so it leaves this number unchanged.
"""

from __future__ import annotations

import torch

from kvutils.errors import DataError, ParameterError


class KeyVariance:
    """Streaming, mergeable L2 variance of keys in float64 (Welford within, Chan et al. between streams).

    Images are taken one at a time, so the result does not depend on how they were batched, and the memory is
    that of one mean key per position however many images are seen.

    >>> variance = KeyVariance()
    >>> variance.update(torch.zeros(3, 2, 4)).update(torch.ones(3, 2, 4)).result
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.count = 0  # images seen
        self.mean: torch.Tensor | None = None  # (..., D) float64
        self.sum_squares: torch.Tensor | None = (
            None  # (...) float64: sum over images of the squared L2 distance
        )

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
        for image in keys:
            delta = image.to(self.mean) - self.mean
            self.count += 1
            self.mean += delta / self.count
            self.sum_squares += delta.square().sum(-1) * ((self.count - 1) / self.count)
        return self

    def merge(self, other: KeyVariance) -> KeyVariance:
        """Add the images another stream (another process, another shard) has seen. Returns itself."""
        if other.count == 0:
            return self
        if self.count == 0:
            self.count, self.mean, self.sum_squares = (
                other.count,
                other.mean.clone(),
                other.sum_squares.clone(),
            )
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
        self.count = total
        return self

    @property
    def result(self) -> torch.Tensor:
        """L2 variance (...) in float64, divisor n: zero for one image. DataError before the first image."""
        return self.variance(ddof=0)

    def variance(self, ddof: int = 0) -> torch.Tensor:
        """The same with divisor n - ddof; ParameterError where that is not positive."""
        if self.count == 0:
            raise DataError("no key has been seen yet: call update(keys) first")
        if self.count <= ddof:
            raise ParameterError(
                f"a variance with divisor n - {ddof} needs more than {ddof} images, found {self.count}"
            )
        return self.sum_squares / (self.count - ddof)
