"""Which image keys: selections by variance, and the controls they are compared with (paper, section 3.2).

Every selection is a `KeySelection` by layer, key-value head and image token. The controls take a selection
(`like`) and choose as many keys, or keys that receive as much attention, in another way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from kvutils.errors import DataError, LayerError, ParameterError
from kvutils.key_variance import (
    PAPER_THRESHOLDS,
    KeyVariance,
    Threshold,
    key_variance,
    residual_log_variance,
    variance_threshold,
)

__all__ = [
    "PAPER_THRESHOLDS", "KeySelection", "KeyVariance", "Threshold", "key_variance", "residual_log_variance",
    "select_all", "select_highest_variance", "select_input_agnostic", "select_random",
    "select_random_matched_mass", "select_same_positions", "selected_mass", "variance_threshold",
]  # fmt: skip
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
