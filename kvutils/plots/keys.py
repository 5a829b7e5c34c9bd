"""The figures of notebook 03, drawn from its stored results alone; in the style of `kvutils.plots.style`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import _COLOURS, _picture, _styled, decode_image, error_bar

POINTS = {"pope": 100.0, "mme": 1.0}  # F1 in points
UNITS = {"pope": "POPE F1 (points)", "mme": "MME score (points)"}
FAMILY_STYLE = {  # of the knock-out curves: colour, line, marker, label
    "one": (_COLOURS[0], "-", "o", "hidden in this layer alone"),
    "from": (_COLOURS[1], "--", "s", "hidden in this layer and all after it"),
    "until": (_COLOURS[2], "-.", "D", "hidden in this layer and all before it"),
}
_ROLES = {"input-agnostic": (_COLOURS[0], "o"), "reading": (_COLOURS[2], "D"), "all": (_COLOURS[3], "v")}


@_styled
def variance_histograms(keys: Mapping, scale: str = "raw") -> Figure:
    """Log10 of the keys' variance per layer, with the pooled threshold and the layer's own; last panel: pooled.

    D of a layer is that of the variance centred within heads, and counts only with a valley; that of the pooled
    panel is not, and layers of different scale raise it. keys: trained and untrained descriptions. scale: "raw" or
    "scale_free"."""
    trained, untrained = keys["trained"], keys.get("untrained")
    layers, found = trained["layers"], trained["thresholds"]
    columns = 4 if layers < 16 else 7
    rows = -(-(layers + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.2 * rows), sharex=True, squeeze=False)
    axes = list(axes.flat)
    pooled = np.log10(found[scale]["value"])
    for layer in range(layers + 1):
        axis, whole = axes[layer], layer == layers
        for about, colour, label in ((untrained, _COLOURS[7], "untrained"), (trained, _COLOURS[0], "trained")):
            if about is not None:
                edges = np.array(about["histograms"][scale]["log10_edges"])
                counts = np.array(about["histograms"][scale]["layers"])
                axis.stairs(counts.sum(0) if whole else counts[layer], edges, fill=label == "trained",
                            color=colour, alpha=0.75, lw=1.2, label=label)  # fmt: skip
        axis.axvline(pooled, color="black", lw=1.3, label="threshold of all layers together")
        if scale == "raw" and not whole:
            axis.axvline(np.log10(found["per_layer"][layer]["value"]), color=_COLOURS[1], ls="--", lw=1.3,
                         label="threshold of this layer")  # fmt: skip
        d = trained["modes"]["layers"][layer]["mean"] if not whole else found[scale]["separation"]
        name = f"layer {layer}: " + (f"two modes, D = {d:.2f}" if d else "one mode")
        name = f"all layers together: D = {d:.2f}" if whole else name
        axis.set(title=name, ylabel="keys" if layer % columns == 0 else "")
        if layer + columns > layers:
            axis.tick_params(labelbottom=True)
            unit = "variance (squared key units)" if scale == "raw" else "variance / mean norm$^2$"
            axis.set_xlabel(f"log$_{{10}}$ {unit}", fontsize=8)
    for axis in axes[layers + 1 :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


@_styled
def position_maps(keys: Mapping, picture: Mapping | None = None) -> Figure:
    """Layer x position of the trained model: variance, heads that hold the key input-agnostic, attention received.

    Drawn over the image if `picture` has one (base64), else over nothing; last column: foreground frequency."""
    about = keys["trained"]
    maps, size = about["maps"], about["maps"]["size"]
    layers = about["layers"]
    shown = np.unique(np.linspace(0, layers - 1, min(layers, 10)).round().astype(int)).tolist()
    kinds = (
        ("log10_variance", "cividis", "log$_{10}$ variance", None),
        ("agnostic", "magma", "below threshold\n(share of heads)", (0, 1)),
        ("mass", "viridis", "attention (times\nthe average key's)", None),
    )
    figure, axes = plt.subplots(3, len(shown) + 1, figsize=(1.3 * (len(shown) + 1) + 1.2, 4.9))
    for row, (kind, colours, label, limits) in enumerate(kinds):
        values = np.array(maps[kind], dtype=float)
        low, high = limits or (np.nanmin(values), np.nanmax(values))
        for column, layer in enumerate(shown):
            drawn = _picture(axes[row, column], values[layer], size, f"layer {layer}" if row == 0 else "",
                             vmin=low, vmax=high, cmap=colours)  # fmt: skip
        figure.colorbar(drawn, ax=axes[row, : len(shown)], shrink=0.85, pad=0.01, label=label)
    if picture is not None:
        _picture(axes[0, -1], decode_image(picture["image"]), size, "an image")
        grid = np.array(maps["agnostic"], dtype=float).mean(0)
        _picture(axes[1, -1], decode_image(picture["image"]), size, "mean over layers")
        axes[1, -1].imshow(grid, extent=(0, size[0], size[1], 0), cmap="magma", alpha=0.6, vmin=0, vmax=1,
                           interpolation="nearest")  # fmt: skip
    else:
        axes[0, -1].set_visible(False)
        axes[1, -1].set_visible(False)
    often = _picture(axes[2, -1], np.array(maps["foreground"], dtype=float), size, "foreground", cmap="cividis", vmin=0)
    figure.colorbar(often, ax=axes[2, -1], shrink=0.7, label="share of images", location="bottom")
    return figure


@_styled
def shares_by_layer(keys: Mapping) -> Figure:
    """Share of input-agnostic keys per layer, trained and untrained, raw and scale-free; what foreground explains."""
    trained, compared = keys["trained"], keys["compared"]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), width_ratios=(1, 1, 1, 1.05))
    titles = {
        "raw": "raw: below the threshold\nof all layers together",
        "scale_free": "scale-free: below the threshold\nof variance / mean norm$^2$",
        "near_constant": "near-constant: variance below\n{:.0%} of mean norm$^2$",
    }
    for axis, (scale, title) in zip(axes, titles.items(), strict=False):
        _line(axis, trained["shares"][scale]["layers"], _COLOURS[0], "-", "o", "trained")
        _line(axis, compared[scale]["untrained"]["layers"], _COLOURS[7], ":", "^", "untrained")
        title = title.format(trained["thresholds"][scale]["value"])
        if not trained["thresholds"][scale]["two_modes"] and scale != "near_constant":
            title += f"\n(no two modes: {trained['thresholds'][scale]['method']})"
        axis.set(title=title, xlabel="layer", ylim=(-0.03, 1.03))
    after = trained["foreground"]["share_after"]["layers"]
    _line(axes[0], after, _COLOURS[1], "--", "s", "trained, without\nforeground frequency")
    axes[0].set_ylabel("share of keys")
    axes[0].legend(fontsize=7.5)
    _line(axes[3], trained["foreground"]["correlation"]["layers"], _COLOURS[4], "-", "o", "variance and foreground (r)")
    sinks = trained["sinks"]["raw"]
    _line(axes[3], sinks["mass"]["layers"], _COLOURS[2], "--", "D", "attention: agnostic minus others")
    _line(axes[3], sinks["norm"]["layers"], _COLOURS[3], "-.", "v", "norm: agnostic minus others")
    axes[3].axhline(0, color="black", lw=0.7)
    axes[3].set(title="what these keys are", xlabel="layer", ylabel="r, or multiples of the average key's")
    axes[3].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _line(axis, intervals: Sequence[Mapping], colour, line: str, marker: str, label: str) -> None:
    """A curve over layers with its 95 % band, undefined layers left out."""
    values = np.array([[each[key] if each[key] is not None else np.nan for key in ("mean", "low", "high")]
                       for each in intervals], dtype=float)  # fmt: skip
    x = np.arange(len(values))
    axis.plot(x, values[:, 0], line, color=colour, marker=marker, ms=3.5, label=label)
    axis.fill_between(x, values[:, 1], values[:, 2], color=colour, alpha=0.18, lw=0)


@_styled
def knock_out_curves(knock_out: Mapping, measure: str = "accuracy", block: Sequence[int] | None = None) -> Figure:
    """Accuracy (or loss) per kind of question with the image hidden in one layer, from it on, up to it.

    block: the layers of the blocking experiment, shaded."""
    kinds = knock_out["kinds"]
    order = ["all", *sorted(kind for kind in kinds if kind != "all")]
    rows = -(-len(order) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(13, 2.5 * rows + 0.3), sharex=True, squeeze=False)
    axes = list(axes.flat)
    for axis, kind in zip(axes, order, strict=False):
        found = kinds[kind]
        for family, (colour, line, marker, label) in FAMILY_STYLE.items():
            _line(axis, [each[measure] for each in found[family]], colour, line, marker, label)
        axis.axhline(found["none"][measure]["mean"], color="black", lw=1, label="image seen in every layer")
        if block:
            axis.axvspan(min(block) - 0.5, max(block) + 0.5, color=_COLOURS[7], alpha=0.18, lw=0,
                         label="layers of the blocking experiment")  # fmt: skip
        axis.set(title=f"{kind.replace('_', ' ')} (n = {found['n']})")
        axis.set_xticks(range(knock_out["layers"])[:: max(1, knock_out["layers"] // 10)])
        axis.tick_params(labelbottom=True)
    unit = "accuracy" if measure == "accuracy" else "loss of the right answer (nats)"
    for number, axis in enumerate(axes[: len(order)]):
        axis.set_ylabel(unit if number % 4 == 0 else "")
        axis.set_xlabel("layer" if number + 4 >= len(order) else "")
    for axis in axes[len(order) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title="95 % bands over scenes", fontsize=8)
    return figure


@_styled
def block_effects(blocking: Mapping) -> Figure:
    """POPE and MME: score under each block minus without it, with 95 % intervals; single draws of random controls."""
    about = blocking["about"]["families"]
    tasks = [name for name in ("pope", "mme") if name in blocking]
    names = _in_order(about)
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 + 3.6 * len(tasks), 0.42 * len(names) + 1.5), sharey=True,
                                squeeze=False)  # fmt: skip
    for axis, task in zip(axes[0], tasks, strict=True):
        for row, name in enumerate(names):
            found, factor = blocking[task]["families"][name], POINTS[task]
            value = found["headline"]
            colour, marker = _ROLES.get(name.split()[0], (_COLOURS[7], "s"))
            axis.plot([draw * factor for draw in found.get("draws", [])], [row + 0.28] * len(found.get("draws", [])),
                      "|", color=colour, ms=7, alpha=0.6)  # fmt: skip
            axis.errorbar(value["mean"] * factor, row, xerr=error_bar(value, factor), fmt=marker, color=colour, capsize=3, ms=5)
        plain = blocking[task]["plain"]["headline"]["mean"] * POINTS[task]
        axis.axvline(0, color="black", lw=0.8)
        axis.set(xlabel=f"change of {UNITS[task]}", title=f"{UNITS[task].split()[0]}: {plain:.1f} without a block")
    labels = [f"{name}\n({about[name]['keys']:.0f} keys, layers {_span(about[name]['layers'])})" for name in names]
    axes[0, 0].set_yticks(range(len(names)), labels, fontsize=7.5)
    axes[0, 0].invert_yaxis()
    note = "points and bars: mean and 95 % interval over images; ticks: single draws of random keys"
    figure.supxlabel(note, fontsize=8)
    return figure


def _in_order(families: Mapping) -> list[str]:
    """The block, its controls, the reading layers, everything."""
    rank = {"input-agnostic": 0, "random": 1, "random,": 1, "highest": 2, "same": 3, "reading": 4, "all": 5}
    return sorted(families, key=lambda name: (rank.get(name.split()[0], 9), name))


def _span(layers: Sequence[int]) -> str:
    return f"{min(layers)}-{max(layers)}" if len(layers) > 1 else str(layers[0])


@_styled
def sweep_map(sweep: Mapping) -> Figure:
    """Effect on POPE by share of keys and number of last layers, on the half of the images that chooses the best."""
    values = 100 * np.array([[cell["mean"] for cell in row] for row in sweep["grid"]])
    clear = np.array([[cell["low"] > 0 or cell["high"] < 0 for cell in row] for row in sweep["grid"]])
    size = max(np.abs(values).max(), 0.1)
    figure, axis = plt.subplots(figsize=(1.0 * values.shape[1] + 3.4, 0.55 * values.shape[0] + 2.0))
    drawn = axis.imshow(values, cmap="PuOr_r", vmin=-size, vmax=size, aspect="auto", origin="lower")
    axis.grid(False)
    for (row, column), value in np.ndenumerate(values):
        strong = abs(value) > 0.6 * size
        axis.text(column, row, f"{value:+.1f}{'*' if clear[row, column] else ''}", ha="center", va="center", fontsize=8,
                  color="white" if strong else "black")  # fmt: skip
    place = sweep["depths"].index(sweep["best"]["depth"]), sweep["shares"].index(sweep["best"]["share"])
    axis.add_patch(plt.Rectangle((place[0] - 0.48, place[1] - 0.48), 0.96, 0.96, fill=False, lw=2, ec="black"))
    axis.set_xticks(range(len(sweep["depths"])), sweep["depths"])
    axis.set_yticks(range(len(sweep["shares"])), [f"{share:.0%}" for share in sweep["shares"]])
    held = {key: 100 * sweep["held_out"][key] for key in ("mean", "low", "high")}
    cell = "{mean:+.2f} F1 points [{low:+.2f}, {high:+.2f}]".format(**held)
    axis.set(xlabel="number of last layers", ylabel="keys blocked in each layer\n(lowest variance first)",
             title=f"best cell, on the other half of the images:\n{cell}")  # fmt: skip
    figure.colorbar(drawn, ax=axis, label="change of POPE F1 (points)")
    figure.supxlabel("*: 95 % interval without 0", fontsize=8)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    """Every figure of the notebook's results file by name."""
    keys, block = results["keys"], results["blocking"]["about"]["layers"]
    return {
        "03_variance": variance_histograms(keys),
        "03_variance_scale_free": variance_histograms(keys, "scale_free"),
        "03_position_maps": position_maps(keys, results.get("picture")),
        "03_shares": shares_by_layer(keys),
        "03_knock_out_accuracy": knock_out_curves(results["knock_out"], "accuracy", block),
        "03_knock_out_loss": knock_out_curves(results["knock_out"], "loss", block),
        "03_block_effects": block_effects(results["blocking"]),
        "03_sweep": sweep_map(results["sweep"]),
    }
