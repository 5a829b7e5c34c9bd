"""Which image keys to hide: those that vary least, and the controls they are compared with (section 3.2, C6, X2).

Every selection is a `KeySelection` by layer, key-value head and image token. The controls take a selection (`like`) and choose as many
keys, or keys that receive as much attention, in another way. real (N,) bool: the tokens that show a part of the image; newlines are never
drawn."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from kvutils.errors import ParameterError
from kvutils.keys import KeySelection
from kvutils.tasks.key_table import KeyTable

_TRIES = 16  # random orders of which the one with the closest attention mass is taken


def select_all(layers: Iterable[int], heads: int, tokens: int) -> KeySelection:
    """All image keys of these layers, newline tokens included: they carry what they read from the image."""
    layers = tuple(layers)
    return KeySelection("all", torch.ones(len(layers), heads, tokens, dtype=torch.bool), layers)


def select_lowest(table: KeyTable, share: float, layers: Sequence[int]) -> KeySelection:
    """The given share (0..1) of the keys of each layer, those that vary least; newlines are never among them."""
    if not 0 < share <= 1:
        raise ParameterError(f"share must be above 0 and at most 1, not {share}")
    layers = tuple(layers)
    mask = torch.zeros(len(layers), *table.variance.shape[1:], dtype=torch.bool)
    for row, layer in enumerate(layers):
        values = table.variance[layer].masked_fill(~table.real, torch.inf).flatten()
        count = max(1, round(share * int(table.real.sum()) * table.variance.shape[1]))
        mask[row].view(-1)[values.argsort(stable=True)[:count]] = True
    return KeySelection(f"lowest {share:g}", mask, layers)


def select_random(like: KeySelection, real: torch.Tensor, seed: int) -> KeySelection:
    """As many keys in each layer and head as `like` has, drawn from all that are no newlines."""
    places, random = np.flatnonzero(real), np.random.default_rng(seed)
    return _filled("random", like, like.mask.sum(-1), lambda _, count: random.permutation(places)[:count])


def _filled(name: str, like: KeySelection, wanted: torch.Tensor, choose: Callable) -> KeySelection:
    """The positions that choose((layer, head), wanted (L, G) there) gives, in the layers of `like`."""
    mask = torch.zeros_like(like.mask)
    for place, each in np.ndenumerate(wanted.numpy()):
        mask[(*place, choose(place, each))] = True
    return KeySelection(name, mask, like.layers)


def select_highest(like: KeySelection, values: torch.Tensor, real: torch.Tensor) -> KeySelection:
    """As many keys in each layer and head as `like` has, those of the highest values (L, G, N), such as the variance."""
    order = values.masked_fill(~real, -torch.inf).argsort(descending=True, stable=True)
    return _filled("highest variance", like, like.mask.sum(-1), lambda place, count: order[place][:count])


def select_same_positions(like: KeySelection, layers: Iterable[int]) -> KeySelection:
    """The same heads and positions in as many other layers: the lowest stands for the lowest, and so on."""
    return KeySelection("same positions", like.restrict(sorted(like.layers)).mask, tuple(sorted(layers)))


def select_random_matched_mass(like: KeySelection, mass: torch.Tensor, real: torch.Tensor, seed: int) -> KeySelection:
    """Random keys that receive as much attention as those of `like`, however many that takes.

    mass (L, G, N), as from `attention_mass`, of the layers of `like`. In each layer and head keys are drawn one by one, and the draw ends
    where its mass is closest to that of `like`; of 16 draws the closest is taken. `selected_mass` of both says how close that is: where
    few keys receive most of the attention it may not be."""
    places, random, weights = np.flatnonzero(real), np.random.default_rng(seed), mass.numpy()

    def choose(place: tuple[int, ...], target: float) -> np.ndarray:
        orders = [random.permutation(places) for _ in range(_TRIES)]
        gaps = [np.abs(np.concatenate([[0], weights[place][order].cumsum()]) - target) for order in orders]
        closest = int(np.argmin([each.min() for each in gaps]))
        return orders[closest][: gaps[closest].argmin()]

    return _filled("random, same attention", like, selected_mass(like, mass), choose)


def selected_mass(selection: KeySelection, mass: torch.Tensor) -> torch.Tensor:
    """(L, G) float64: the attention mass (L, G, N) that the selected keys receive together."""
    return torch.where(selection.mask, mass, 0.0).sum(-1)
