"""How much each image key varies across images: one pass, constant memory (paper, section 3.2 and A.6.1).

An image key that hardly changes from image to image is *input-agnostic*. The statistic is the L2 variance

    variance[l, g, n] = mean over images i of || key_i[l, g, n] - mean_i key_i[l, g, n] ||^2

in squared key units (divisor: the number of images). Rotary position encoding rotates the keys of one
position alike in every image, so it leaves this number unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from kvutils.errors import DataError, LayerError, ParameterError


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


@dataclass(frozen=True, eq=False)
class KeySelection:
    """Which image keys are chosen, such as those that `block_keys` blocks.

    mask (L, G, N) bool: mask[i] belongs to layer layers[i]; N counts an image's tokens in the order of its
    `TokenLayout`, newlines included. layers are different non-negative numbers. Whether a model has these
    layers and heads shows when the selection is used.
    """

    name: str
    mask: torch.Tensor
    layers: tuple[int, ...]

    def __post_init__(self):
        mask = torch.as_tensor(self.mask)
        if mask.dtype != torch.bool or mask.ndim != 3:
            raise DataError(
                f"{self.name}: the mask must be bool of shape (L, G, N), "
                f"found {mask.dtype} {tuple(mask.shape)}"
            )
        layers = tuple(self.layers)
        bad = [x for x in layers if isinstance(x, bool) or not isinstance(x, int | np.integer) or x < 0]
        if bad or len(set(layers)) != len(layers):
            raise LayerError(f"{self.name}: layers must be different numbers from 0 on, found {layers}")
        if len(layers) != len(mask):
            raise DataError(f"{self.name}: a mask of {len(mask)} layers for {len(layers)} layers {layers}")
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in layers))

    @property
    def count(self) -> torch.Tensor:
        """(L, G) int64: how many keys are chosen in each layer and head."""
        return self.mask.sum(-1)

    def at(self, layer: int) -> torch.Tensor:
        """(G, N) bool mask of one layer."""
        if layer not in self.layers:
            raise LayerError(f"{self.name} says nothing about layer {layer}, only about {self.layers}")
        return self.mask[self.layers.index(layer)]

    def restrict(self, layers: Iterable[int]) -> KeySelection:
        """The same selection in some of its layers only."""
        layers = tuple(layers)
        mask = torch.stack([self.at(layer) for layer in layers]) if layers else self.mask[:0]
        return KeySelection(self.name, mask, layers)

    def __or__(self, other: KeySelection) -> KeySelection:
        """The keys that either selection chooses."""
        if not isinstance(other, KeySelection):
            return NotImplemented
        if self.mask.shape[1:] != other.mask.shape[1:]:
            raise DataError(
                f"{self.name} and {other.name} choose among different keys: (G, N) is "
                f"{tuple(self.mask.shape[1:])} and {tuple(other.mask.shape[1:])}"
            )
        layers = tuple(sorted({*self.layers, *other.layers}))
        mask = torch.zeros(len(layers), *self.mask.shape[1:], dtype=torch.bool, device=self.mask.device)
        for one in (self, other):
            for layer in one.layers:
                mask[layers.index(layer)] |= one.at(layer).to(mask.device)
        return KeySelection(f"{self.name} or {other.name}", mask, layers)
