"""What the image keys of a model are like: modes of the variance, shares, sinks, foreground (section 3.2, X4).

Three scales of the same variance are told apart throughout:

  raw         squared key units, as in the paper. Layers and heads whose keys are longer vary more, so a pooled
              histogram can have two modes only because there are two kinds of layers.
  per_layer   the raw variance with a threshold of each layer's own.
  scale_free  variance / mean norm^2: what is left when a model multiplies all its keys by a number.
  near_constant  the same below a fixed `NEAR_CONSTANT`, which needs no modes and so compares models that have none.

Intervals are over token positions (the same resample in all layers and heads): images are so many that the noise of a
variance is small (`reliability` says how small), and positions are what another crop would change.
"""

from __future__ import annotations

import numpy as np
import torch

from kvutils.metrics.old import percentile_interval
from kvutils.metrics.statistics import Statistic, bootstrap_ci, mean_statistic
from kvutils.tasks.bimodality import separation, variance_threshold
from kvutils.tasks.key_table import KeyTable

SCALES = ("raw", "per_layer", "scale_free", "near_constant")
NEAR_CONSTANT = 0.1  # of the squared norm varies, the rest is the same in every image (ours)
_BINS = 60  # of a histogram


def _logs(variance: torch.Tensor, real: torch.Tensor) -> np.ndarray:
    """(L, G, P) log of variances (L, G, N), newlines left out."""
    return variance[..., real].clamp(min=1e-30).log().numpy()


def modes(table: KeyTable, n_boot: int = 200, seed: int = 0) -> dict:
    """Is the variance bimodal within layers? Per layer, and as the median over layers; JSON-able.

    D is that of `separation` of the log-variance minus the median of its head, so that neither layers nor heads of
    different scale can make two modes. layers: per layer D with its 95 % interval over positions. median: of the layers' D
    (the claim). best: the layer with the highest D on the even chunks of images, and its D on the odd ones. pooled: all
    layers together, raw and scale-free, which that artefact can fake.
    """
    every, even, odd = (_logs(each, table.real) for each in (table.variance, *table.halves))
    logs, even, odd = (each - np.median(each, axis=-1, keepdims=True) for each in (every, even, odd))
    n = logs.shape[-1]
    places = np.random.default_rng(seed).integers(0, n, size=(n_boot, n))
    value, draws = zip(*(_separated(each, places) for each in logs), strict=True)
    value, draws = np.array(value), np.stack(draws, axis=1)
    best = int(np.argmax([separation(each.reshape(1, -1))[0] for each in even]))
    again, again_draws = _separated(odd[best], places)
    return {
        "n": n,
        "unit": "Ashman's D of the log-variance, centred within each head; 0 without a valley",
        "interval": "over token positions",
        "layers": [each.as_dict() for each in percentile_interval(value, draws, n)],
        "median": percentile_interval(np.median(value), np.median(draws, axis=1), n).as_dict(),
        "best": {"layer": best} | percentile_interval(again, again_draws, n).as_dict(),
        "pooled": {name: variance_threshold(each[..., table.real])
                   for name, each in (("raw", table.variance), ("scale_free", table.scale_free))},
    }  # fmt: skip


def thresholds(table: KeyTable, model: str | None = None) -> dict:
    """What counts as input-agnostic, on each of the `SCALES`: a `variance_threshold`, a list of them per layer.

    model: a name in `MODELS`; the paper's threshold holds for the raw variance of its own model.
    """
    variance, scale_free = table.variance[..., table.real], table.scale_free[..., table.real]
    return {
        "raw": variance_threshold(variance, model),
        "per_layer": [variance_threshold(each) for each in variance],
        "scale_free": variance_threshold(scale_free),
        "near_constant": {"value": NEAR_CONSTANT, "two_modes": None, "method": "fixed"},
    }


def agnostic(table: KeyTable, found: dict, scale: str = "raw") -> torch.Tensor:
    """(L, G, N) bool: the keys below the threshold of a scale, never a newline. found: from `thresholds`."""
    values = table.scale_free if scale in ("scale_free", "near_constant") else table.variance
    limit = found[scale]
    limits = [each["value"] for each in limit] if isinstance(limit, list) else [limit["value"]] * len(values)
    return (values < torch.tensor(limits, dtype=torch.float64)[:, None, None]) & table.real


def describe_keys(table: KeyTable, model: str | None = None, n_boot: int = 2000, mode_draws: int = 200, seed: int = 0) -> dict:
    """All that the figures and the tables of a model's keys need; JSON-able. model: as in `thresholds`."""
    found = thresholds(table, model)
    chosen = {scale: agnostic(table, found, scale) for scale in SCALES}
    real = table.real
    return {
        "model": table.name, "images": table.images, "mass_images": table.mass_images,
        "layers": len(table.variance), "heads": table.variance.shape[1], "positions": int(real.sum()),
        "thresholds": found,
        "modes": modes(table, mode_draws, seed),
        "reliability": _correlations(table.halves[0][..., real].log(), table.halves[1][..., real].log()),
        "shares": {scale: shares(table, mask, n_boot, seed) for scale, mask in chosen.items()},
        "mean_norm": table.norm[..., real].mean(-1).tolist(),
        "mean_variance": table.variance[..., real].mean(-1).tolist(),
        "image_mass": table.mass[..., real].sum(-1).tolist(),
        "sinks": {scale: sinks(table, mask, n_boot, seed) for scale, mask in chosen.items()},
        "foreground": foreground(table, chosen["raw"], found["raw"]["value"], n_boot, seed),
        "histograms": histograms(table),
        "maps": maps(table, chosen["raw"]),
    }  # fmt: skip


def shares(table: KeyTable, mask: torch.Tensor, n_boot: int = 2000, seed: int = 0) -> dict:
    """Share of the keys that a mask (L, G, N) holds: of all, by layer, by layer and head; intervals over positions."""
    held = mask[..., table.real].double()  # (L, G, P)
    found = _all_and_layers(_over_heads(held.movedim(-1, 0).numpy()), mean_statistic, n_boot, seed)
    return found | {"heads": held.mean(-1).tolist()}


def sinks(table: KeyTable, mask: torch.Tensor, n_boot: int = 2000, seed: int = 0) -> dict:
    """Chosen keys minus the others of their own layer and head; intervals over positions, None where no head has both.

    mass: attention per key, as a multiple of that of the average image key of the head; norm: mean norm over that of the
    head. layers: the same per layer.
    """
    keep = table.real
    on = mask[..., keep].double().numpy()
    result: dict = {"heads": int((on.any(-1) & ~on.all(-1)).sum())}
    for name, each in (("mass", table.mass), ("norm", table.norm)):
        values = each[..., keep].numpy()
        values = values / np.maximum(values.mean(-1, keepdims=True), 1e-300)
        packed = np.moveaxis(np.stack([on * values, on, (1 - on) * values, 1 - on]), -1, 0)  # (P, 4, L, G)

        def difference(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
            sums = np.tensordot(weights, packed, 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                return _over_heads(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])  # of (n_boot, L, G)

        result[name] = _all_and_layers(packed, difference, n_boot, seed)
    return result


def foreground(table: KeyTable, mask: torch.Tensor, threshold: float, n_boot: int = 2000, seed: int = 0) -> dict:
    """Does a key vary little because its position is seldom foreground? Correlation, and what is left without it.

    correlation: of the log-variance with the foreground frequency over positions, mean over heads, for all and by layer.
    share_after: input-agnostic share when the linear part is taken out of the log-variance and the same threshold is used;
    kept: share of the keys of `mask` still below it. Intervals are over positions.
    """
    real = table.real
    logs = _logs(table.variance, real)
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
        return _over_heads(r.reshape(len(weights), *logs.shape[:2]))

    after = torch.zeros_like(mask)
    after[..., real] = residual_log_variance(table.variance[..., real], often).exp() < threshold
    return {
        "frequency": {"mean": float(often.mean()), "low": float(often.min()), "high": float(often.max())},
        "correlation": _all_and_layers(packed, correlate, n_boot, seed),
        "share_after": shares(table, after, n_boot, seed),
        "kept": float((after & mask).sum() / mask.sum()) if mask.any() else None,
    }


def compare_trained(trained: KeyTable, untrained: KeyTable, found: dict, n_boot: int = 2000, seed: int = 0) -> dict:
    """X4: share of input-agnostic keys, trained minus untrained, with intervals over positions; JSON-able.

    Both are measured with the trained model's threshold. Keys of random weights are short, so that under an absolute
    threshold (raw) all of them vary little; the other two are free of that."""
    result = {}
    for scale in ("raw", "scale_free", "near_constant"):
        masks = [agnostic(each, found, scale) for each in (trained, untrained)]
        gap = (masks[0].double() - masks[1].double())[..., trained.real].movedim(-1, 0).numpy()
        result[scale] = {"difference": _all_and_layers(_over_heads(gap), mean_statistic, n_boot, seed),
                         "untrained": shares(untrained, masks[1], n_boot, seed)}  # fmt: skip
    return result


def residual_log_variance(variance: torch.Tensor, foreground: np.ndarray) -> torch.Tensor:
    """(..., P) log-variance without what is linear in how often, 0..1, a position (P,) is foreground.

    A position that always shows background varies little for that reason alone. One line per layer and head is fitted by
    least squares over the positions, variances of zero (minus infinity) left out; the mean of the log-variance stays, so
    that exp() of the result is a variance again.
    """
    logs, level = variance.log(), torch.from_numpy(foreground)
    used = logs.isfinite().double()
    x = level - (used * level).sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp(min=1)
    y = torch.where(used > 0, logs, 0.0)
    slope = (used * x * y).sum(-1, keepdim=True) / (used * x * x).sum(-1, keepdim=True).clamp(min=1e-12)
    return logs - slope * x


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


def _over_heads(values: np.ndarray) -> np.ndarray:
    """(n, 1 + L) from (n, L, G): the mean over all heads, then over those of each layer; NaN is left out."""
    columns = []
    for each in (values.reshape(len(values), 1, -1), values):
        there = np.isfinite(each)
        total = np.where(there, each, 0).sum(-1)
        columns.append(np.divide(total, there.sum(-1), out=np.full(total.shape, np.nan), where=there.any(-1)))
    return np.concatenate(columns, axis=1)


def _all_and_layers(values: np.ndarray, statistic: Statistic, n_boot: int, seed: int) -> dict:
    """Intervals over positions of a statistic of values (P, ...) that gives the model's number, then each layer's."""
    every, *layers = (each.as_dict() for each in bootstrap_ci(values, statistic, n_boot, seed))
    return {"all": every, "layers": layers}


def histograms(table: KeyTable) -> dict:
    """Counts of log10 of the variance, raw and scale-free, per layer on common edges."""
    found = {}
    for name, each in (("raw", table.variance), ("scale_free", table.scale_free)):
        logs = each[..., table.real].clamp(min=1e-30).log10().numpy()
        edges = np.linspace(logs.min(), logs.max() + 1e-9, _BINS + 1)
        found[name] = {"log10_edges": edges.tolist(), "layers": [np.histogram(layer, edges)[0].tolist() for layer in logs]}
    return found


def maps(table: KeyTable, mask: torch.Tensor) -> dict:
    """Layer x rows x columns of the base view: mean over heads of log10 variance, of attention (multiples of the
    average key's), share of heads that hold the key; foreground frequency (rows, columns)."""
    places = table.layout.spatial("base")
    cells = table.layout.cells[places]
    rows, columns = cells.max(axis=0) + 1

    def grid(values: np.ndarray) -> list:
        out = np.full((*values.shape[:-1], rows, columns), None)
        out[..., cells[:, 0], cells[:, 1]] = values[..., places].round(4)
        return out.tolist()

    mass = table.mass / table.mass[..., table.real].mean(-1, keepdim=True).clamp(min=1e-300)
    return {
        "log10_variance": grid(table.variance.clamp(min=1e-30).log10().mean(1).numpy()),
        "mass": grid(mass.mean(1).numpy()),
        "agnostic": grid(mask.double().mean(1).numpy()),
        "foreground": grid(table.foreground),
        "size": list(table.layout.image_size),
    }
