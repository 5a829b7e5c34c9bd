"""Key statistics as numbers to draw: histograms of the variance, and maps over layers and positions."""

from __future__ import annotations

import numpy as np
import torch

from kvutils.tasks.key_table import KeyTable

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
