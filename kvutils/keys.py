"""Which image keys: selections by variance, and the controls they are compared with (paper, section 3.2).

Every selection is a `KeySelection` by layer, key-value head and image token. The controls take a selection
(`like`) and choose as many keys, or keys that receive as much attention, in another way.

How much each image key varies across images: one pass, constant memory (paper, section 3.2 and A.6.1).

An image key that hardly changes from image to image is *input-agnostic*. The statistic is the L2 variance

    variance[l, g, n] = mean over images i of || key_i[l, g, n] - mean_i key_i[l, g, n] ||^2

in squared key units (divisor: the number of images). Rotary position encoding rotates the keys of one
position alike in every image, so it leaves this number unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kvutils.errors import DataError, ParameterError
from kvutils.images import ImageLike
from kvutils.kvcache import Capture, capture
from kvutils.layout import TokenLayout
from kvutils.models import MLM

_TRIES = 16  # random orders of which the one with the closest attention mass is taken


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
            raise ParameterError(f"{self.name}: layers must be different numbers from 0 on, found {layers}")
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
            raise ParameterError(f"{self.name} says nothing about layer {layer}, only about {self.layers}")
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


def select_all(layers: Iterable[int], heads: int, tokens: int) -> KeySelection:
    """All image keys of these layers, newline tokens included: they carry what they read from the image."""
    layers = tuple(layers)
    return KeySelection("all", torch.ones(len(layers), heads, tokens, dtype=torch.bool), layers)


def select_input_agnostic(
    variance: torch.Tensor, threshold: float, layers: Iterable[int], is_newline: np.ndarray
) -> KeySelection:
    """The keys whose variance is below the threshold; newlines are never among them.

    variance (L, G, N) of exactly these layers (`restrict` chooses among them afterwards); is_newline (N,).
    """
    variance = _per_key(variance, "variance")
    mask = (variance < threshold) & _eligible(is_newline, variance)
    return KeySelection("input-agnostic", mask, tuple(layers))


def select_random(like: KeySelection, is_newline: np.ndarray, seed: int) -> KeySelection:
    """As many keys in each layer and head as `like` has, drawn from all that are no newlines."""
    places = np.flatnonzero(_eligible(is_newline, like.mask))
    random, mask = np.random.default_rng(seed), torch.zeros_like(like.mask)
    for layer, head in np.ndindex(like.mask.shape[:2]):
        count = _fitting(like, layer, head, len(places))
        mask[layer, head, random.permutation(places)[:count]] = True
    return KeySelection("random", mask, like.layers)


def select_highest_variance(
    like: KeySelection, variance: torch.Tensor, is_newline: np.ndarray
) -> KeySelection:
    """As many keys in each layer and head as `like` has, those that vary most. variance: as `like.mask`."""
    variance = _per_key(variance, "variance", like)
    eligible = _eligible(is_newline, like.mask)
    mask = torch.zeros_like(like.mask)
    for layer, head in np.ndindex(like.mask.shape[:2]):
        count = _fitting(like, layer, head, int(eligible.sum()))
        order = variance[layer, head].masked_fill(~eligible, -torch.inf).argsort(descending=True, stable=True)
        mask[layer, head, order[:count]] = True
    return KeySelection("highest variance", mask, like.layers)


def select_same_positions(like: KeySelection, layers: Iterable[int]) -> KeySelection:
    """The same heads and positions in as many other layers: the lowest stands for the lowest, and so on."""
    layers = tuple(sorted(layers))
    if len(layers) != len(like.layers):
        raise ParameterError(f"{like.name} has {len(like.layers)} layers {like.layers}, asked for {layers}")
    return KeySelection("same positions", like.restrict(sorted(like.layers)).mask, layers)


def select_random_matched_mass(
    like: KeySelection, mass: torch.Tensor, is_newline: np.ndarray, seed: int
) -> KeySelection:
    """Random keys that receive as much attention as those of `like`, however many that takes.

    mass (L, G, N), as from `attention_mass`, of the layers of `like`. In each layer and head keys are drawn
    one by one, newlines never, and the draw ends where its mass is closest to that of `like`; of 16 draws the
    closest is taken. `selected_mass` of both says how close that is: where few keys receive most of the
    attention it may not be.
    """
    mass = _per_key(mass, "mass", like)
    places = np.flatnonzero(_eligible(is_newline, like.mask))
    random, mask = np.random.default_rng(seed), torch.zeros_like(like.mask)
    for (layer, head), target in np.ndenumerate(selected_mass(like, mass).numpy()):
        weights, nearest = mass[layer, head].numpy(), np.inf
        for _ in range(_TRIES):
            order = random.permutation(places)
            gaps = np.abs(np.concatenate([[0], weights[order].cumsum()]) - target)
            if gaps.min() < nearest:
                nearest, chosen = gaps.min(), order[: gaps.argmin()]
        mask[layer, head, chosen] = True
    return KeySelection("random, same attention", mask, like.layers)


def selected_mass(selection: KeySelection, mass: torch.Tensor) -> torch.Tensor:
    """(L, G) float64: the attention mass (L, G, N) that the selected keys receive together."""
    return torch.where(selection.mask.cpu(), _per_key(mass, "mass", selection), 0.0).sum(-1)


def _per_key(values: torch.Tensor, name: str, like: KeySelection | None = None) -> torch.Tensor:
    """(L, G, N) float64 on the CPU."""
    values = torch.as_tensor(values).double().cpu()
    if values.ndim != 3 or (like is not None and values.shape != like.mask.shape):
        expected = "(L, G, N)" if like is None else f"{tuple(like.mask.shape)} like {like.name}"
        raise DataError(f"{name} must have the shape {expected}, found {tuple(values.shape)}")
    return values


def _eligible(is_newline: np.ndarray, values: torch.Tensor) -> torch.Tensor:
    """(N,) bool: the tokens that show a part of the image."""
    newline = np.asarray(is_newline)
    if newline.dtype != bool or newline.shape != values.shape[-1:]:
        raise DataError(
            f"is_newline must be bool (N,) = {tuple(values.shape[-1:])}, "
            f"found {newline.dtype} {newline.shape}"
        )
    return torch.from_numpy(~newline)


def _fitting(like: KeySelection, layer: int, head: int, eligible: int) -> int:
    """How many keys `like` has in a head; DataError if there are not as many to choose from."""
    count = int(like.mask[layer, head].sum())
    if count > eligible:
        raise DataError(
            f"{like.name} has {count} keys in layer {like.layers[layer]}, head {head}; "
            f"only {eligible} tokens are no newlines"
        )
    return count


_SUMS = ("mean", "sum_squares", "sum_norms")


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
                "dataclasses.replace(mlm, base_view_only=True)"
            )


def key_variance(
    mlm: MLM,
    images: Iterable[ImageLike],
    layers: str | int | Iterable[int] = "all",
    *,
    prefix: str | None = None,
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

    capture(mlm, images, prefix, layers, values=False, features=False,
            batch_size=batch_size, to=None, on_capture=add, progress=progress)  # fmt: skip
    if not variance.count:
        raise DataError("a variance across images needs images, found none")
    return variance
