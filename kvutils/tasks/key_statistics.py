"""What the image keys of a model are like: modes of the variance, shares, sinks, foreground (section 3.2, X4).

Three scales of the same variance are told apart throughout:

  raw         squared key units, as in the paper. Layers and heads whose keys are longer vary more, so a pooled
              histogram can have two modes only because there are two kinds of layers.
  per_layer   the raw variance with a threshold of each layer's own.
  scale_free  variance / mean norm^2: what is left when a model multiplies all its keys by a number.
  near_constant  the same below a fixed `NEAR_CONSTANT`, which needs no modes and so compares models that have none.

Intervals are over token positions (the same resample in all layers and heads): images are so many that the
noise of a variance is small (`reliability` says how small), and positions are what another crop would change.

Key statistics as numbers to draw: histograms of the variance, and maps over layers and positions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kvutils.errors import ParameterError
from kvutils.metrics.statistics import bootstrap_ci, percentile_interval
from kvutils.tasks.bimodality import residual_log_variance, separation, variance_threshold
from kvutils.tasks.key_table import KeyTable

SCALES = ("raw", "per_layer", "scale_free", "near_constant")
NEAR_CONSTANT = 0.1  # of the squared norm varies, the rest is the same in every image (ours)


def centred_logs(table: KeyTable) -> np.ndarray:
    """(L, G, positions) log-variance minus the median of its head, newlines left out.

    Heads and layers of different scale cannot make two modes of this.
    """
    values = table.variance[..., table.real].clamp(min=1e-30).log().numpy()
    return values - np.median(values, axis=-1, keepdims=True)


def modes(table: KeyTable, n_boot: int = 200, seed: int = 0) -> dict:
    """Is the variance bimodal within layers? Per layer, and as the median over layers; JSON-able.

    D is that of `separation` of the log-variance centred within each head, so that neither layers nor heads of
    different scale can make two modes. layers: per layer D with its 95 % interval over positions. median: of
    the layers' D (the claim). best: the layer with the highest D on the even chunks of images, and its D on the
    odd ones. pooled: all layers together, raw and scale-free, which that artefact can fake.
    """
    logs = centred_logs(table)
    n, layers = logs.shape[-1], len(logs)
    value, draws = np.zeros(layers), np.zeros((n_boot, layers))
    places = np.random.default_rng(seed).integers(0, n, size=(n_boot, n))
    for layer, each in enumerate(logs):
        value[layer], draws[:, layer] = _separated(each, places)
    even, odd = (centred_logs(replace(table, variance=half)) for half in table.halves)
    best = int(np.argmax([separation(each.reshape(1, -1))[0] for each in even]))
    again, again_draws = _separated(odd[best], places)
    return {
        "n": n,
        "unit": "Ashman's D of the log-variance, centred within each head; 0 without a valley",
        "interval": "over token positions",
        "layers": [each.as_dict() for each in percentile_interval(value, draws, n)],
        "median": percentile_interval(np.median(value), np.median(draws, axis=1), n).as_dict(),
        "best": {"layer": best} | percentile_interval(again, again_draws, n).as_dict(),
        "pooled": {
            name: variance_threshold(each, table.is_newline).as_dict()
            for name, each in (("raw", table.variance), ("scale_free", table.scale_free))
        },
    }


def thresholds(table: KeyTable, model: str | None = None) -> dict:
    """What counts as input-agnostic, on each of the `SCALES`: `Threshold.as_dict`, a list of them per layer.

    model: a name in `MODELS`; the paper's threshold holds for the raw variance of its own model.
    """
    return {
        "raw": variance_threshold(table.variance, table.is_newline, model).as_dict(),
        "per_layer": [variance_threshold(each, table.is_newline).as_dict() for each in table.variance],
        "scale_free": variance_threshold(table.scale_free, table.is_newline).as_dict(),
        "near_constant": {"value": NEAR_CONSTANT, "two_modes": None, "method": "fixed"},
    }


def agnostic(table: KeyTable, found: dict, scale: str = "raw") -> torch.Tensor:
    """(L, G, N) bool: the keys below the threshold of a scale, never a newline. found: from `thresholds`."""
    if scale not in SCALES:
        raise ParameterError(f"scale must be one of {', '.join(SCALES)}, not {scale!r}")
    values = table.scale_free if scale in ("scale_free", "near_constant") else table.variance
    limit = found[scale]
    limits = [each["value"] for each in limit] if isinstance(limit, list) else [limit["value"]] * len(values)
    return (values < torch.tensor(limits, dtype=torch.float64)[:, None, None]) & table.real


def describe_keys(table: KeyTable, model: str | None = None, n_boot: int = 2000, mode_draws: int = 200,
                  seed: int = 0) -> dict:  # fmt: skip
    """All that the figures and the tables of a model's keys need; JSON-able. model: as in `thresholds`."""
    found = thresholds(table, model)
    chosen = {scale: agnostic(table, found, scale) for scale in SCALES}
    real = table.real
    return {
        "model": table.name,
        "images": table.images,
        "mass_images": table.mass_images,
        "layers": len(table.variance),
        "heads": table.variance.shape[1],
        "positions": int(real.sum()),
        "thresholds": found,
        "modes": modes(table, mode_draws, seed),
        "reliability": _correlations(table.halves[0][..., real].log(), table.halves[1][..., real].log()),
        "shares": {scale: shares(table, mask, n_boot, seed) for scale, mask in chosen.items()},
        "mean_norm": _mean(table.norm, real),
        "mean_variance": _mean(table.variance, real),
        "image_mass": table.mass[..., real].sum(-1).tolist(),
        "sinks": {scale: sinks(table, mask, n_boot, seed) for scale, mask in chosen.items()},
        "foreground": foreground(table, chosen["raw"], found["raw"]["value"], n_boot, seed),
        "histograms": histograms(table),
        "maps": maps(table, chosen["raw"]),
    }


def shares(table: KeyTable, mask: torch.Tensor, n_boot: int = 2000, seed: int = 0) -> dict:
    """Share of the keys that a mask (L, G, N) holds: of all, by layer, by layer and head; intervals over positions."""
    by_head = mask[..., table.real].double().numpy()  # (L, G, P)
    values = np.concatenate([by_head.mean((0, 1))[None], by_head.mean(1)]).T  # (P, 1 + L)
    every, *layers = (each.as_dict() for each in bootstrap_ci(values, "mean", n_boot, seed))
    return {"all": every, "layers": layers, "heads": by_head.mean(-1).tolist()}


def sinks(table: KeyTable, mask: torch.Tensor, n_boot: int = 2000, seed: int = 0) -> dict:
    """Chosen keys against the others of their own layer and head; intervals over positions, None where no head
    has both.

    mass: attention per key, as a multiple of that of the average image key of the head, chosen minus others;
    norm: mean norm over that of the head, chosen minus others. layers: the same per layer.
    """
    keep = table.real
    on = mask[..., keep].double().numpy()
    result: dict = {"heads": int((on.any(-1) & ~on.all(-1)).sum())}
    for name, each in (("mass", table.mass), ("norm", table.norm)):
        values = each[..., keep].numpy()
        values = values / np.maximum(values.mean(-1, keepdims=True), 1e-300)
        packed = np.moveaxis(np.stack([on * values, on, (1 - on) * values, 1 - on]), -1, 0)  # (P, 4, L, G)

        def difference(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
            sums = (weights @ packed.reshape(len(packed), -1)).reshape(len(weights), *packed.shape[1:])
            with np.errstate(invalid="ignore", divide="ignore"):
                gap = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]  # (n_boot, L, G)
            return np.concatenate([_nanmean(gap.reshape(len(gap), -1))[:, None], _nanmean(gap)], axis=1)

        every, *layers = (found.as_dict() for found in bootstrap_ci(packed, difference, n_boot, seed))
        result[name] = {"all": every, "layers": layers}
    return result


def foreground(table: KeyTable, mask: torch.Tensor, threshold: float, n_boot: int = 2000, seed: int = 0) -> dict:
    """Does a key vary little because its position is seldom foreground? Correlation, and what is left without it.

    correlation: of the log-variance with the foreground frequency over positions, mean over heads, with intervals
    over positions, for all and by layer. share_after: input-agnostic share when the linear part is taken out of
    the log-variance and the same threshold is used; kept: share of the keys of `mask` still below it.
    """
    real = table.real
    logs = table.variance[..., real].clamp(min=1e-30).log().numpy()
    often = table.foreground[real.numpy()]
    packed = np.concatenate([np.moveaxis(logs, -1, 0).reshape(len(often), -1), often[:, None]], axis=1)

    def correlate(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
        weights = weights / weights.sum(1, keepdims=True)
        y, x = packed[:, :-1], packed[:, -1:]
        mean_y, mean_x = weights @ y, weights @ x
        cov = weights @ (x * y) - mean_x * mean_y
        spread = (weights @ y**2 - mean_y**2) * (weights @ x**2 - mean_x**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.where(spread > 1e-24, cov / np.sqrt(np.maximum(spread, 1e-300)), np.nan)
        r = r.reshape(len(weights), *logs.shape[:2])
        return np.concatenate([_nanmean(r.reshape(len(r), -1))[:, None], _nanmean(r)], axis=1)

    every, *layers = (found.as_dict() for found in bootstrap_ci(packed, correlate, n_boot, seed))
    after = (residual_log_variance(table.variance, table.foreground, table.is_newline).exp() < threshold) & real
    return {
        "frequency": {"mean": float(often.mean()), "low": float(often.min()), "high": float(often.max())},
        "correlation": {"all": every, "layers": layers},
        "share_after": shares(table, after, n_boot, seed),
        "kept": float((after & mask).sum() / mask.sum()) if mask.any() else None,
    }


def compare_trained(trained: KeyTable, untrained: KeyTable, found: dict, n_boot: int = 2000, seed: int = 0) -> dict:
    """X4: share of input-agnostic keys, trained minus untrained, with intervals over positions; JSON-able.

    Both are measured with the trained model's threshold. Keys of random weights are short, so that under an
    absolute threshold (raw) all of them vary little; the other two are free of that.
    """
    result = {}
    for scale in ("raw", "scale_free", "near_constant"):
        masks = [agnostic(each, found, scale)[..., trained.real].double().numpy() for each in (trained, untrained)]
        gap = masks[0] - masks[1]
        values = np.concatenate([gap.mean((0, 1))[None], gap.mean(1)]).T
        every, *layers = (each.as_dict() for each in bootstrap_ci(values, "mean", n_boot, seed))
        result[scale] = {"difference": {"all": every, "layers": layers},
                         "untrained": shares(untrained, agnostic(untrained, found, scale), n_boot, seed)}  # fmt: skip
    return result


def _separated(logs: np.ndarray, places: np.ndarray) -> tuple[float, np.ndarray]:
    """D of the log-variances (G, P) of a layer, and of its resamples places (n_boot, P)."""
    value, fit = separation(logs.reshape(1, -1))
    draws, _ = separation(logs[:, places].swapaxes(0, 1).reshape(len(places), -1), fit)
    return float(value[0]), draws


def _correlations(one: torch.Tensor, two: torch.Tensor) -> list[float | None]:
    """Per layer, Pearson's r of two log-variances (L, G, P) over heads and positions."""
    found = []
    for a, b in zip(one.flatten(1).numpy(), two.flatten(1).numpy(), strict=True):
        fine = np.isfinite(a) & np.isfinite(b)
        varied = fine.sum() > 2 and a[fine].std() > 0 and b[fine].std() > 0
        found.append(float(np.corrcoef(a[fine], b[fine])[0, 1]) if varied else None)
    return found


def _mean(values: torch.Tensor, real: torch.Tensor) -> list:
    return values[..., real].mean(-1).tolist()


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is defined; NaN where nothing is."""
    there = np.isfinite(values)
    total = np.where(there, values, 0).sum(-1)
    return np.divide(total, there.sum(-1), out=np.full(total.shape, np.nan), where=there.any(-1))


_BINS = 60  # of a histogram


def histograms(table: KeyTable) -> dict:
    """Counts of log10 of the variance, raw and scale-free, per layer on common edges."""
    found = {}
    for name, each in (("raw", table.variance), ("scale_free", table.scale_free)):
        logs = each[..., table.real].clamp(min=1e-30).log10().numpy()
        edges = np.linspace(logs.min(), logs.max() + 1e-9, _BINS + 1)
        counts = [np.histogram(layer, edges)[0].tolist() for layer in logs]
        found[name] = {"log10_edges": edges.tolist(), "layers": counts}
    return found


def maps(table: KeyTable, mask: torch.Tensor, view: str | None = "base") -> dict:
    """Layer x rows x columns of one view: mean over heads of log10 variance, of attention (multiples of the
    average key's), share of heads that hold the key; foreground frequency (rows, columns)."""
    layout = table.layout
    places = layout.spatial(view)
    cells = layout.cells[places]
    rows, columns = cells.max(axis=0) + 1

    def grid(values: np.ndarray) -> list:
        out = np.full((*values.shape[:-1], rows, columns), np.nan)
        out[..., cells[:, 0], cells[:, 1]] = values[..., places]
        return np.where(np.isnan(out), None, out.round(4)).tolist()

    mass = table.mass / table.mass[..., table.real].mean(-1, keepdim=True).clamp(min=1e-300)
    return {
        "log10_variance": grid(table.variance.clamp(min=1e-30).log10().mean(1).numpy()),
        "mass": grid(mass.mean(1).numpy()),
        "agnostic": grid(mask.double().mean(1).numpy()),
        "foreground": grid(table.foreground),
        "size": list(layout.image_size),
    }
