"""Image keys: how much each varies across images, and a choice among them (paper, section 3.2 and A.6.1).

An image key that hardly changes from image to image is *input-agnostic*. The statistic is the L2 variance

    variance[l, g, n] = mean over images i of || key_i[l, g, n] - mean_i key_i[l, g, n] ||^2

in squared key units (divisor: the number of images). Rotary position encoding rotates the keys of one position alike in
every image, so it leaves this number unchanged. `block_keys` hides the keys of a `KeySelection` from the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvutils.errors import DataError, ParameterError, at_least, of_kind, one_of
from kvutils.images import ImageLike
from kvutils.kvcache import Capture, capture
from kvutils.language import resolve_layers
from kvutils.layout import TokenLayout
from kvutils.models import MLM, need_mlm

_SUMS = ("mean", "sum_squares", "sum_norms")


@dataclass(eq=False, repr=False)
class KeyVariance:
    """Streaming, mergeable L2 variance and mean norm of keys in float64.

    Welford's update within a stream, that of Chan et al. between streams. Images are taken one at a time, so the result
    does not depend on how they were batched, and the memory is that of one mean key per position however many are seen.
    Raises DataError: see `update`.

    >>> variance = kv.KeyVariance()
    >>> variance.update(torch.zeros(3, 2, 4)).update(torch.ones(3, 2, 4)).result
    tensor([1., 1.], dtype=torch.float64)
    """

    count: int = 0  # images seen
    mean: torch.Tensor | None = None  # (..., D) float64
    sum_squares: torch.Tensor | None = None  # (...) float64, over images: of the squared L2 distance to the mean
    sum_norms: torch.Tensor | None = None  # (...) float64, over images: of the norm

    def __repr__(self) -> str:
        about = f"images: {self.count}, keys {tuple(self.mean.shape)}, mean variance {self.result.mean():.4g}" if self.count else "no image yet"
        return f"KeyVariance({about})"

    def update(self, keys: torch.Tensor) -> KeyVariance:
        """Add B images and return itself. keys: (B, ..., D), any float type, every call the same (..., D). Raises DataError for
        another shape and for keys that are not finite (half precision may have overflowed)."""
        keys = torch.as_tensor(keys)
        if not torch.isfinite(keys).all():
            raise DataError("keys hold NaN or infinite values; run the model in bfloat16 or float32 instead of float16")
        for image in keys:
            self._begin(image)
            image = image.to(self.mean)
            delta = image - self.mean
            self.mean += delta / (self.count + 1)
            self.sum_squares += delta.square().sum(-1) * (self.count / (self.count + 1))
            self.sum_norms += image.norm(dim=-1)
            self.count += 1
        return self

    def merge(self, other: KeyVariance) -> KeyVariance:
        """Add the images another stream (another process, another shard) has seen. Returns itself; DataError for another shape."""
        if other.count == 0:
            return self
        self._begin(other.mean)
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
        return self._per_image(self.sum_squares)

    @property
    def mean_norm(self) -> torch.Tensor:
        """(...) float64: the L2 norm of each key, averaged over images."""
        return self._per_image(self.sum_norms)

    def _begin(self, key: torch.Tensor) -> None:
        if self.mean is None:
            with torch.inference_mode(False):  # what a stream holds may be changed there and outside
                self.mean = torch.zeros_like(key, dtype=torch.float64)
                self.sum_squares, self.sum_norms = self.mean.new_zeros(2, *key.shape[:-1])
        elif key.shape != self.mean.shape:
            raise DataError(f"keys of shape {tuple(self.mean.shape)} of each image were expected, found {tuple(key.shape)}; "
                            "give every image the same token grid (same resize)")  # fmt: skip

    def _per_image(self, sums: torch.Tensor | None) -> torch.Tensor:
        if self.count == 0:
            raise DataError("no key has been seen yet: call update(keys) first")
        return sums / self.count

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All it holds as tensors on the CPU, such as `Parts` keeps."""
        return {"count": torch.tensor(self.count)} | {name: getattr(self, name).cpu().clone() for name in _SUMS if self.count}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> KeyVariance:
        """The stream that `state_dict` described, to go on with or to merge."""
        return cls(int(state["count"]), *(state[name].double().clone() for name in _SUMS if name in state))


@dataclass
class SameGrid:
    """Compares the layouts of images that are to be averaged position by position."""

    layout: TokenLayout | None = None  # of the first one

    def check(self, layout: TokenLayout, name: str) -> None:
        """DataError unless the image `name` has the token grid of the first one."""
        self.layout = self.layout or layout
        if layout.grids != self.layout.grids or len(layout) != len(self.layout):
            width, height = layout.image_size
            raise DataError(f"{name} ({width}x{height}) has the token grids {layout.grids}, the images before it {self.layout.grids}: "
                            "resize all images to one size, or, with a LLaVA model, use dataclasses.replace(mlm, base_view_only=True)")


def key_variance(mlm: MLM, images: Iterable[ImageLike], layers: str | int | Iterable[int] = "all", *, prefix: str | None = None,
                 batch_size: int = 8, progress: bool = False) -> KeyVariance:
    """Variance and mean norm (L, G, N) of the image keys of any number of images with one token grid.

    Row i belongs to the i-th of the increasing layer numbers. Memory stays that of one batch, so `images` may be a
    generator; parts of them can be streamed elsewhere and merged. Newline tokens are in N and mean nothing. Arguments as
    in `capture`. Raises DataError for images with different token grids and for none, and what `capture` raises.

    >>> variance = kv.key_variance(mlm, [scene, scene.rotate(90)], layers=[3, 7])
    >>> variance.count, variance.result.shape     # (L, G, N)
    (2, torch.Size([2, 2, 145]))
    """
    variance, grid = KeyVariance(), SameGrid()

    def add(index: int, one: Capture) -> None:
        grid.check(one.layout, f"images[{index}]")
        variance.update(one.keys[None])

    capture(mlm, images, prefix, layers, values=False, features=False, batch_size=batch_size, to=None, on_capture=add, progress=progress)
    if not variance.count:
        raise DataError("a variance across images needs images, found none")
    return variance


@dataclass(frozen=True, eq=False, repr=False)
class KeySelection:
    """Which image keys are chosen, such as those that `block_keys` blocks.

    mask (L, G, N) bool: mask[i] belongs to layer layers[i], different numbers from 0 on; N counts an image's tokens in the
    order of its `TokenLayout`, newlines included. Raises DataError for another mask, ParameterError for other layers.

    >>> variance = kv.key_variance(mlm, [scene, scene.rotate(90)], layers=[3, 7]).result
    >>> kv.KeySelection("steady", variance < variance.median(), layers=[3, 7])
    KeySelection('steady': 289 of 580 keys, layers [3, 7], 2 heads, 145 tokens)
    """

    name: str
    mask: torch.Tensor
    layers: tuple[int, ...]

    def __post_init__(self):
        of_kind(f"mask of {self.name}", self.mask, (torch.Tensor, np.ndarray, list), "a bool tensor or array (L, G, N)")
        mask, layers = torch.as_tensor(self.mask), tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,)
        if mask.dtype != torch.bool or mask.ndim != 3 or len(mask) != len(layers):
            raise DataError(f"{self.name}: the mask must be bool of shape (L, G, N) for the {len(layers)} layers {layers}, "
                            f"found {mask.dtype} {tuple(mask.shape)}")  # fmt: skip
        bad = [x for x in layers if isinstance(x, bool) or not isinstance(x, int | np.integer) or x < 0]
        if bad or len(set(layers)) != len(layers):
            raise ParameterError(f"{self.name}: layers must be different numbers from 0 on, found {layers}")
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in layers))

    def __repr__(self) -> str:
        (_, heads, tokens), chosen = self.mask.shape, f"{int(self.mask.sum())} of {self.mask.numel()} keys"
        return f"KeySelection({self.name!r}: {chosen}, layers {list(self.layers)}, {heads} heads, {tokens} tokens)"

    def restrict(self, layers: Iterable[int]) -> KeySelection:
        """The same selection in some of its layers only."""
        layers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        for layer in layers:
            one_of(f"layer of the selection {self.name!r}", layer, self.layers)
        return KeySelection(self.name, self.mask[[self.layers.index(layer) for layer in layers]], layers)


def select_region(mlm: MLM, layout: TokenLayout, region: Sequence[float] | np.ndarray | torch.Tensor,
                  layers: str | int | Iterable[int] = "all", heads: int | Iterable[int] | None = None) -> KeySelection:
    """The keys of the image tokens of which at least half is in a region of the picture; newlines are in none.

    layout: of the picture, from a `Capture` or an `ImageSession`. region: a box (x0, y0, x1, y1) in pixels of the upright picture, or a
    mask (height, width) bool, counted by its pixels. Where base view and tiles show the picture, the tokens of both are chosen.
    layers as in `capture`; heads: key-value heads, None for all. Raises ParameterError for a box that is not in the picture, for layers
    and heads that the model lacks and for a region that holds half of no token, DataError for a mask of another size.

    >>> kv.select_region(mlm, kv.capture(mlm, [scene])[0].layout, (0, 0, 48, 96), layers=[3], heads=1)
    KeySelection('region': 72 of 290 keys, layers [3], 2 heads, 145 tokens)
    """
    need_mlm(mlm)
    of_kind("layout", layout, TokenLayout, "a TokenLayout, such as capture.layout")
    tokens, size = np.flatnonzero(layout.seeing), np.array(layout.image_size)
    try:
        found = (region.double() if region.is_floating_point() else region).numpy(force=True) if isinstance(region, torch.Tensor) else np.array(region)
    except ValueError:  # a ragged list: no box
        found = np.array(str(region))
    low, high = layout.rects[tokens, :2], layout.rects[tokens, 2:]
    if found.ndim == 2:
        if found.dtype != bool or found.shape != layout.image_size[::-1]:
            raise DataError(f"a mask must be bool of shape (height, width) = {layout.image_size[::-1]} like its picture, found {found.dtype} "
                            f"{found.shape}")  # fmt: skip
        inside, whole = layout.pixel_sums(found, tokens)
    else:
        is_box = found.shape == (4,) and found.dtype.kind in "iuf"
        if not is_box or not ((found[:2] >= 0) & (found[:2] < found[2:]) & (found[2:] <= size)).all():
            raise ParameterError(f"a region is a box (x0, y0, x1, y1), x0 < x1 and y0 < y1, in the picture of {size[0]}x{size[1]} pixels, or "
                                 f"a mask (height, width) bool; found {str(region)[:100]!r}")  # fmt: skip
        inside = (np.minimum(high, found[2:]) - np.maximum(low, found[:2])).clip(0).prod(axis=1)
        whole = (high - low).prod(axis=1)
    if not (chosen := tokens[inside >= whole / 2]).size:
        wide, tall = (high - low).max(axis=0)
        raise ParameterError(f"the region holds half of no image token, which cover up to {wide:.0f}x{tall:.0f} pixels of this picture; choose a "
                             "larger one")  # fmt: skip
    heads = range(mlm.num_kv_heads) if heads is None else np.atleast_1d(np.array(heads)).tolist()
    at_least("the number of key-value heads", len(heads), 1)
    for head in heads:
        at_least("a key-value head", head, 0)
        one_of(f"key-value head of {mlm.name}", head, range(mlm.num_kv_heads))
    layers = resolve_layers(mlm, layers)
    mask = torch.zeros(len(layers), mlm.num_kv_heads, len(layout), dtype=torch.bool)
    mask[:, torch.tensor(heads)[:, None], torch.from_numpy(chosen)] = True
    return KeySelection("region", mask, layers)
