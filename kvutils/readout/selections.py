"""Which image keys to hide: those that vary least, by a threshold or a share, and the controls they are compared with (section 3.2, C6, X2).

Every selection is a `KeySelection` by layer, key-value head and image token. The controls choose as many keys as a selection (`like`),
or keys that receive as much attention, in another way. real (N,) bool: the tokens that show a part of the image, so no newlines."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from kvutils.checkpoints import base_name
from kvutils.errors import DataError, ParameterError
from kvutils.keys import KeySelection

PAPER_THRESHOLDS = {"llava-onevision-7b": 450.0}  # squared key units, section 3.2
QUANTILE = 0.1  # of the variances: the threshold where there are no two modes (ours)
_SMALLEST = 0.01  # share of the keys of a mode of all keys together
_MOST = 5_000  # numbers that are fitted; evenly spaced ranks stand for more
_TRIES = 16  # random orders of which the one with the closest attention mass is taken


def variance_threshold(variance: torch.Tensor, model: str | None = None) -> dict:
    """Below which variance a key is input-agnostic, and whether the keys fall into two groups at all; JSON-able. variance: of any
    keys, pooled; zeros count for the quantile only. model: a name in `MODELS`, also at a commit. value: squared key units, the
    paper's for its own model, else the valley of the log-variance (lowest density between the means of a mixture of two normal
    distributions), else, without two modes, the `QUANTILE` (ours); method: "paper", "valley" or "quantile ...". two_modes: two
    normal distributions describe the log-variance better than one (BIC), Ashman's D is above 2, the density has a valley between
    them, and each has 1 % of the keys. separation: Ashman's D; modes and shares: exp(m) and weight of the two, lower first.
    Raises DataError for variances all alike. """
    values = variance.flatten().numpy()
    logs = np.log(values[values > 0])
    if len(logs) < 10 or np.ptp(logs) < 1e-9:
        raise DataError(f"a threshold needs at least 10 different variances, found {len(np.unique(logs))}")
    if len(logs) > _MOST:
        logs = np.quantile(logs, (np.arange(_MOST) + 0.5) / _MOST)
    points = logs[:, None]
    one, two = (GaussianMixture(k, n_init=3, random_state=0).fit(points) for k in (1, 2))
    order = two.means_[:, 0].argsort()
    means, spread, shares = two.means_[order, 0], two.covariances_[order, 0, 0], two.weights_[order]
    distance, grid = float((means[1] - means[0]) / np.sqrt(spread.mean())), np.linspace(*means, 1001)
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


def select_all(layers: Iterable[int], heads: int, tokens: int) -> KeySelection:
    """All image keys of these layers, newline tokens included: they carry what they read from the image."""
    layers = tuple(layers)
    return KeySelection("all", torch.ones(len(layers), heads, tokens, dtype=torch.bool), layers)


def select_lowest(variance: torch.Tensor, real: torch.Tensor, share: float, layers: Sequence[int]) -> KeySelection:
    """The given share (0..1) of the keys of each of these layers, those of lowest variance (L, G, N), L all layers of the model; newlines are
    never among them."""
    if not 0 < share <= 1:
        raise ParameterError(f"share must be above 0 and at most 1, not {share}")
    layers, real = tuple(layers), torch.as_tensor(real)
    if any(layer >= len(variance) for layer in layers):
        raise DataError(f"variance must be (L, G, N) of all layers, of which it takes {layers}; found {len(variance)} layers")
    mask = torch.zeros(len(layers), *variance.shape[1:], dtype=torch.bool)
    for row, layer in enumerate(layers):
        values = variance[layer].masked_fill(~real, torch.inf).flatten()
        count = max(1, round(share * int(real.sum()) * variance.shape[1]))
        mask[row].view(-1)[values.argsort(stable=True)[:count]] = True
    return KeySelection(f"lowest {share:g}", mask, layers)


def select_random(like: KeySelection, real: torch.Tensor, seed: int) -> KeySelection:
    """As many keys in each layer and head as `like` has, drawn from all that are no newlines."""
    places, random = np.flatnonzero(real), np.random.default_rng(seed)
    return _filled("random", like, _counts(like, real), lambda _, count: random.permutation(places)[:count])


def _filled(name: str, like: KeySelection, wanted: torch.Tensor, choose: Callable) -> KeySelection:
    """The positions that choose((layer, head), wanted (L, G) there) gives, in the layers of `like`."""
    mask = torch.zeros_like(like.mask)
    for place, each in np.ndenumerate(wanted.numpy()):
        mask[(*place, choose(place, each))] = True
    return KeySelection(name, mask, like.layers)


def _counts(like: KeySelection, real: torch.Tensor) -> torch.Tensor:
    """(L, G) how many keys a selection has; DataError where so many are not `real`."""
    if (like.mask.sum(-1) > (most := np.count_nonzero(real))).any():
        raise DataError(f"{like.name} has more keys than the {most} that are no newlines: a control cannot have as many")
    return like.mask.sum(-1)


def select_highest(like: KeySelection, values: torch.Tensor, real: torch.Tensor) -> KeySelection:
    """As many keys in each layer and head as `like` has, those of the highest values (L, G, N), such as the variance, of the
    layers of `like`."""
    order = _of_layers(like, values).masked_fill(~torch.as_tensor(real), -torch.inf).argsort(descending=True, stable=True)
    return _filled("highest variance", like, _counts(like, real), lambda place, count: order[place][:count])


def select_same_positions(like: KeySelection, layers: Iterable[int]) -> KeySelection:
    """The same heads and positions in as many other layers: the lowest stands for the lowest, and so on."""
    return KeySelection("same positions", like.restrict(sorted(like.layers)).mask, tuple(sorted(layers)))


def select_random_matched_mass(like: KeySelection, mass: torch.Tensor, real: torch.Tensor, seed: int) -> KeySelection:
    """Random keys that receive as much attention as those of `like`, however many that takes. mass (L, G, N), as from
    `attention_mass`, of the layers of `like`. In each layer and head keys are drawn one by one, and the draw ends where its mass
    is closest to that of `like`; of 16 draws the closest is taken. `selected_mass` of both says how close that is: where few keys
    receive most of the attention it may not be."""
    places, random, weights = np.flatnonzero(real), np.random.default_rng(seed), mass.numpy()

    def choose(place: tuple[int, ...], target: float) -> np.ndarray:
        orders = [random.permutation(places) for _ in range(_TRIES)]
        gaps = [np.abs(np.concatenate([[0], weights[place][order].cumsum()]) - target) for order in orders]
        closest = int(np.argmin([each.min() for each in gaps]))
        return orders[closest][: gaps[closest].argmin()]

    return _filled("random, same attention", like, selected_mass(like, mass), choose)


def selected_mass(selection: KeySelection, mass: torch.Tensor) -> torch.Tensor:
    """(L, G) float64: the attention mass (L, G, N), of the selection's layers, that the selected keys receive together."""
    return torch.where(selection.mask, _of_layers(selection, mass), 0.0).sum(-1)


def _of_layers(selection: KeySelection, values: torch.Tensor) -> torch.Tensor:
    """Values as they are; DataError unless they are (L, G, N) of the selection's layers."""
    if values.shape != selection.mask.shape:
        raise DataError(f"expected values {tuple(selection.mask.shape)} of layers {selection.layers} alone, such as variance[list(selection.layers)], "
                        f"found {tuple(values.shape)}")  # fmt: skip
    return values
