"""What the image keys of a model are like: modes of the variance, shares, sinks, foreground (section 3.2, X4).

Three scales of the same variance are told apart throughout:

  raw            squared key units, as in the paper; layers and heads whose keys are longer vary more
  within_heads   in relation to the variance that most keys of the same head have; below the valley of a layer with two modes whose
                 upper one holds most keys, in other layers near_constant
  near_constant  variance / mean norm^2 below a fixed `NEAR_CONSTANT`, which needs no modes and so compares models that have none

Most intervals are over six strips of the picture, by leaving each out (`KeyTable.strips`): the noise of a variance over so many images is
small, and places are what another crop would change. Neighbouring tokens are alike, most of all in a row: taken one by one, intervals of
smooth random maps, which have no effect, lie beside 0 in 58 % of the cases; by strips in about 13 %, of smoother ones more often. Modes,
and trained minus untrained, have intervals of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from kvutils.metrics.statistics import Interval, Statistic, mean_statistic, ratio, resample, with_draws
from kvutils.readout.selections import variance_threshold
from kvutils.tasks.bimodality import bimodal_layers, head_modes
from kvutils.tasks.key_table import KeyTable

SCALES = ("raw", "within_heads", "near_constant")
NEAR_CONSTANT = 0.1  # of the squared norm varies, the rest is the same in every image (ours)
LOWEST = 0.1  # share of a head's keys that are called its lowest: a number that needs neither modes nor a threshold (ours)
_BINS, _RANGE = 60, (-2.0, 0.5)  # of a histogram; log10 of a variance within heads


def _logs(variance: torch.Tensor, real: torch.Tensor) -> np.ndarray:
    """(L, G, P) log of variances (L, G, N), newlines left out."""
    return variance[..., real].clamp(min=1e-30).log().numpy()


def thresholds(table: KeyTable, model: str | None = None, modes: Mapping | None = None) -> dict:
    """What counts as input-agnostic, on each of the `SCALES`: a `variance_threshold`, a list of limits per layer, a fixed number. model: a
    name in `MODELS`, for the paper's threshold of its own model. modes: of `bimodal_layers`, if they are known."""
    modes = modes or bimodal_layers(_logs(table.variance, table.real))
    near = {"value": NEAR_CONSTANT, "two_modes": None, "method": "near-constant"}
    limits = []
    for each in modes["layers"]:
        low, valley, high = each["modes"]
        # Two modes, the lower one of fewer keys: the head's mode is the upper one.
        lower = each["two_modes"] == "yes" and np.abs(np.log(high)) < np.abs(np.log(low))
        limits.append({"value": valley, "two_modes": True, "method": "valley"} if lower else near)
    return {"raw": variance_threshold(table.variance[..., table.real], model), "within_heads": limits, "near_constant": near}


def agnostic(table: KeyTable, found: dict, scale: str = "raw") -> torch.Tensor:
    """(L, G, N) bool: the keys below the threshold of a scale, never a newline. found: from `thresholds`."""
    if scale == "raw":
        return (table.variance < found["raw"]["value"]) & table.real
    scale_free = torch.where(table.norm > 0, table.variance / table.norm.square().clamp(min=1e-300), 0.0)  # no unit; 0 where a key is always 0
    near = (scale_free < NEAR_CONSTANT) & table.real
    if scale == "within_heads":
        usual = torch.from_numpy(np.exp(head_modes(_logs(table.variance, table.real))))
        for layer, limit in enumerate(found[scale]):
            if limit["method"] == "valley":
                near[layer] = (table.variance[layer] < limit["value"] * usual[layer]) & table.real
    return near


def describe_keys(table: KeyTable, model: str | None = None, n_boot: int = 2000, seed: int = 0) -> dict:
    """All that the figures and the tables of a model's keys need; JSON-able. model: as in `thresholds`."""
    modes = bimodal_layers(_logs(table.variance, table.real), n_boot, seed)
    found = thresholds(table, model, modes)
    chosen = {scale: agnostic(table, found, scale) for scale in SCALES}
    return {"model": table.name, "images": table.images, "mass_images": table.mass_images, "layers": len(table.variance),
            "heads": table.variance.shape[1], "positions": int(table.real.sum()), "thresholds": found, "modes": modes,
            "order": None if table.turned is None else causal_order(table, n_boot, seed),
            "shares": {scale: shares(table, mask, n_boot, seed) for scale, mask in chosen.items()},
            "sinks": {scale: sinks(table, mask, n_boot, seed) for scale, mask in chosen.items()},
            "foreground": foreground(table, n_boot, seed), "histograms": histograms(table),
            "foreground_map": _grid(table, table.foreground), "size": list(table.layout.image_size)}  # fmt: skip


def shares(table: KeyTable, mask: torch.Tensor, n_boot: int = 2000, seed: int = 0) -> dict:
    """Share of the keys that a mask (L, G, N) holds: of all, by layer, by layer and head; intervals over strips."""
    held = mask[..., table.real].double()  # (L, G, P)
    found = _all_and_layers(_over_heads(held.movedim(-1, 0).numpy()), mean_statistic, table, n_boot, seed, 0, 1)
    return found | {"heads": held.mean(-1).tolist()}


def sinks(table: KeyTable, mask: torch.Tensor, n_boot: int = 2000, seed: int = 0) -> dict:
    """Chosen keys minus the others of their own layer and head; intervals over strips, None where no head has both. mass: attention per
    key, as a multiple of that of the average image key of the head; norm: mean norm over that of the head."""
    on = mask[..., table.real].double().numpy()
    result: dict = {"heads": int((on.any(-1) & ~on.all(-1)).sum())}
    for name, each in (("mass", table.mass), ("norm", table.norm)):
        values = each[..., table.real].numpy()
        values = values / np.maximum(values.mean(-1, keepdims=True), 1e-300)
        packed = np.moveaxis(np.stack([on * values, on, (1 - on) * values, 1 - on]), -1, 0)  # (P, 4, L, G)

        def difference(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
            sums = np.tensordot(weights, packed, 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                return _over_heads(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])  # of (n_boot, L, G)

        result[name] = _all_and_layers(packed, difference, table, n_boot, seed)
    return result


def foreground(table: KeyTable, n_boot: int = 2000, seed: int = 0) -> dict:
    """Does a key vary little because its position is seldom foreground? Correlation of the log-variance with the foreground frequency
    over positions, mean over heads, for all and by layer; intervals over strips."""
    logs, often = _logs(table.variance, table.real), table.foreground[table.real.numpy()]
    packed = np.concatenate([np.moveaxis(logs, -1, 0).reshape(len(often), -1), often[:, None]], axis=1)

    def correlate(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
        weights = weights / weights.sum(1, keepdims=True)
        y, x = packed[:, :-1], packed[:, -1:]
        mean_y, mean_x = weights @ y, weights @ x
        cov = weights @ (x * y) - mean_x * mean_y
        spread = (weights @ y**2 - mean_y**2) * (weights @ x**2 - mean_x**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.where(spread > 1e-24, cov / np.sqrt(np.maximum(spread, 1e-300)), np.nan)
        return _over_heads(r.reshape(len(weights), *logs.shape[:2]))

    return {"correlation": _all_and_layers(packed, correlate, table, n_boot, seed, -1, 1)}


def causal_order(table: KeyTable, n_boot: int = 2000, seed: int = 0) -> dict:
    """Do keys vary little for what their patch shows, or for being among the first tokens that are read? JSON-able.

    In `turned` the patches were fed in reverse. Of each head the `LOWEST` share of keys: their share among the first `row` tokens (the
    first row of the grid) and among the others, in the usual order (`first`, `rest`) and in reverse (`turned_first`, and `turned_picture`,
    the last tokens, which show the first row's patches). Above `LOWEST` by chance, the one is an effect of the place, the other of the
    picture. all: mean over layers but layer 0, whose keys are computed before any token has seen another. maps: the share at each patch,
    mean over layers and heads."""
    real, row = table.real, next(iter(table.layout.grids.values()))[1]
    orders = (each[..., real].argsort(-1).argsort(-1) for each in (table.variance, table.turned))
    lowest = [(each < LOWEST * int(real.sum())).double().mean(1).numpy() for each in orders]
    first = np.arange(lowest[0].shape[-1]) < row
    places = {"first": (0, first), "rest": (0, ~first), "turned_first": (1, first), "turned_picture": (1, first[::-1])}
    packed = np.stack([each.T for each in lowest], axis=1)  # (P, 2, L)

    def statistic(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
        curves = [weights @ (packed[:, order] * there[:, None]) / np.maximum(weights @ there, 1)[:, None] for order, there in places.values()]
        curves = np.stack(curves, axis=1)  # (R, 4, L)
        return np.concatenate([curves[..., 1:].mean(-1, keepdims=True), curves], axis=-1).reshape(len(weights), -1)

    strips = table.strips(0)  # of which each has a part of the first row
    found = _within(resample(lambda w: statistic(w, packed), len(packed), n_boot, seed, strips).intervals(), 0, 1)
    step = len(found) // len(places)
    curves = {name: {"all": found[i * step], "layers": found[i * step + 1 : (i + 1) * step]} for i, name in enumerate(places)}
    drawn = {}
    for name, each in zip(("usual", "turned"), (lowest[0], lowest[1][:, ::-1]), strict=True):
        values = np.full(len(real), np.nan)
        values[real.numpy()] = each[1:].mean(0)
        drawn[name] = _grid(table, values)
    return {"row": int(row), "lowest": LOWEST, "curves": curves, "maps": drawn}


def compare_trained(trained: KeyTable, untrained: Sequence[KeyTable], found: dict, n_boot: int = 2000, seed: int = 0) -> dict:
    """X4: share of input-agnostic keys, trained minus the mean of untrained models, draws of random weights; JSON-able. All by the trained
    model's thresholds. Keys of random weights are short, so that under the raw one all of them vary little; the other two are free of that.
    Intervals are over positions and draws, whose variance holds what neighbours share: the trained model is judged as one more of them.
    all: of every layer; behind_layer_0: without the one whose keys are computed from a patch alone; untrained: `shares` of the mean of the
    draws, over strips; draws (K, L): of each."""

    def difference(shares: np.ndarray) -> dict:
        """Of shares (P, 1 + K), the trained model's first."""
        drawn, k = resample(lambda w: mean_statistic(w, shares), len(shares), n_boot, seed), shares.shape[1] - 1
        between = [each[..., :1] - each[..., 1:].mean(-1, keepdims=True) for each in (drawn.value, drawn.draws)]
        effects = replace(drawn, value=between[0], draws=between[1]).effects()
        random = replace(drawn, value=drawn.value[1:, None], draws=drawn.draws[:, 1:, None])
        return (with_draws(effects, random, 1 + 1 / k) if k > 1 else effects)[0].as_dict()

    result = {}
    for scale in SCALES:
        masks = torch.stack([agnostic(each, found, scale) for each in (trained, *untrained)]).double()
        held = masks[..., trained.real].movedim(-1, 0).numpy()  # (P, 1 + K, L, G)
        layers = held.mean(-1)
        result[scale] = {"all": difference(layers.mean(-1)), "behind_layer_0": difference(layers[..., 1:].mean(-1)),
                         "untrained": shares(trained, masks[1:].mean(0), n_boot, seed), "draws": layers.mean(0)[1:].tolist()}  # fmt: skip
    return result


def _over_heads(values: np.ndarray) -> np.ndarray:
    """(n, 1 + L) from (n, L, G): the mean over all heads, then over those of each layer; NaN is left out."""
    columns = []
    for each in (values.reshape(len(values), 1, -1), values):
        there = np.isfinite(each)
        columns.append(ratio(np.where(there, each, 0).sum(-1), there.sum(-1)))
    return np.concatenate(columns, axis=1)


def _all_and_layers(values: np.ndarray, statistic: Statistic, table: KeyTable, n_boot: int, seed: int, least: float = -np.inf,
                    most: float = np.inf) -> dict:  # fmt: skip
    """Intervals over strips of a statistic of values (P, ...) that gives the model's number, then each layer's; least, most: what it can be."""
    found = resample(lambda w: statistic(w, values), len(values), n_boot, seed, table.strips(1))
    within = _within([found.effects()[0], *found.intervals()[1:]], least, most)
    return {"all": within[0], "layers": within[1:]}


def _within(found: Sequence[Interval], least: float, most: float) -> list[dict]:
    """Intervals that end at what a number can be."""
    return [replace(each, low=max(each.low, least), high=min(each.high, most)).as_dict() for each in found]


def histograms(table: KeyTable) -> dict:
    """Counts of log10 of the variance per layer on common edges: raw, and over that at the mode of the key's head, on the same edges for
    every model (`_RANGE`)."""
    logs, found = _logs(table.variance, table.real) / np.log(10), {}
    inside = (logs - head_modes(logs)).clip(*_RANGE)
    for name, each, (low, high) in (("raw", logs, (logs.min(), logs.max() + 1e-9)), ("within_heads", inside, _RANGE)):
        edges = np.linspace(low, high, _BINS + 1)
        found[name] = {"log10_edges": edges.tolist(), "layers": [np.histogram(layer, edges)[0].tolist() for layer in each]}
    return found


def _grid(table: KeyTable, values: np.ndarray) -> list:
    """(..., rows, columns) of values (..., N) of the base view, None where there is no token."""
    places = table.layout.spatial("base")
    cells = table.layout.cells[places]
    out = np.full((*values.shape[:-1], *(cells.max(axis=0) + 1)), None)
    out[..., cells[:, 0], cells[:, 1]] = values[..., places].round(4)
    return out.tolist()
