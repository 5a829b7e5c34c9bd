"""Figures of notebook 03: how much keys vary, where the image is read, and what blocking chosen keys does."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import COLOURS, curve, decode_image, forest, in_order, legend_below, panels, picture, styled

TASKS = {"pope": ("POPE F1 (points)", 100.0), "mme": ("MME score (points)", 1.0)}  # -> unit, what the score is multiplied by
KNOCK_OUT_STYLE = {  # which layers are hidden -> colour, line, marker, label
    "one": (COLOURS[0], "-", "o", "hidden in this layer alone"),
    "from": (COLOURS[1], "--", "s", "hidden in this layer and all after it"),
    "until": (COLOURS[2], "-.", "D", "hidden in this layer and all before it"),
}
MODES = {"yes": "two modes, D = {:.2f}", "open": "open, D = {:.2f}", "no": "one mode"}
BLOCK_STYLE = {"input-agnostic": (COLOURS[0], "o"), "reading": (COLOURS[2], "D"), "all": (COLOURS[3], "v")}  # else: a control


@styled
def variance_histograms(keys: Mapping, scale: str = "raw") -> Figure:
    """Log10 of the keys' variance per layer; last panel: all layers together, as in the paper.

    keys: trained and untrained descriptions. scale: "raw", with the threshold of all layers together; or "within_heads", over the variance
    at the mode of the key's head, with the valley of a layer that has one."""
    trained, raw = keys["trained"], scale == "raw"
    layers, found = trained["layers"], trained["thresholds"]["raw"]
    columns = 4 if layers < 16 else 7
    figure, axes = panels(layers + 1, columns, 3.1, 2.2, sharex=True)
    unit = "variance (squared key units)" if raw else "variance / that of most keys of the head"
    for layer, axis in enumerate(axes):
        whole = layer == layers
        for label, colour in (("untrained", COLOURS[7]), ("trained", COLOURS[0])):
            counts, edges = (np.array(keys[label]["histograms"][scale][name]) for name in ("layers", "log10_edges"))
            counts = counts.sum(0) if whole else counts[layer]
            axis.stairs(counts, edges, fill=label == "trained", color=colour, alpha=0.75, lw=1.2, label=label)
        if raw:
            axis.axvline(np.log10(found["value"]), color="black", lw=1.3, label="threshold of all layers together")
        name = "all layers together" + (f": D = {found['separation']:.2f}" if raw else "")
        if not whole:
            about = trained["modes"]["layers"][layer]
            name = f"layer {layer}: " + MODES[about["two_modes"]].format(about["separation"])
            if not raw and about["two_modes"] != "no":
                axis.axvline(np.log10(about["modes"][1]), color=COLOURS[1], ls="--", lw=1.3, label="valley")
        axis.set(title=name, ylabel="keys" if layer % columns == 0 else "")
        if layer + columns > layers:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(f"log$_{{10}}$ {unit}", fontsize=8)
    legend_below(figure, axes, ncols=4)
    return figure


@styled
def causal_order(keys: Mapping) -> Figure:
    """Share of keys among the lowest of their head: at each patch, in the usual order and in reverse, and by layer."""
    trained = keys["trained"]
    about, size = trained["order"], trained["maps"]["size"]
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.1), width_ratios=(1, 1, 1.6))
    titles = {"usual": "usual order:\nupper left patch first", "turned": "reverse order:\nlower right patch first"}
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        drawn = picture(axis, np.array(about["maps"][name], dtype=float), size, title, vmin=0, vmax=1, cmap="magma")
    figure.colorbar(drawn, ax=axes[:2], shrink=0.8, label=f"share among the lowest {about['lowest']:.0%}\n(heads, layers 1 on)")
    styles = {
        "first": (COLOURS[0], "-", "o", "first row, usual order"),
        "turned_first": (COLOURS[1], "--", "s", "first tokens in reverse order"),
        "turned_picture": (COLOURS[2], "-.", "D", "what the first row shows, in reverse"),
        "rest": (COLOURS[7], ":", "^", "other rows, usual order"),
    }
    for name, style in styles.items():
        curve(axes[2], range(trained["layers"]), about["curves"][name]["layers"], style)
    title = f"the lowest {about['lowest']:.0%} of each head's keys"
    axes[2].set(title=title, xlabel="layer", ylabel="share of these tokens' keys", ylim=(-0.03, 1.03))
    axes[2].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled
def position_maps(keys: Mapping, scene: Mapping) -> Figure:
    """Layer x position of the trained model: variance, heads that hold the key input-agnostic, attention received.

    Last column: an image (base64, of `scene`), the mean over layers on it, foreground frequency."""
    about = keys["trained"]
    maps, size, layers = about["maps"], about["maps"]["size"], about["layers"]
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
            title = f"layer {layer}" if row == 0 else ""
            drawn = picture(axes[row, column], values[layer], size, title, vmin=low, vmax=high, cmap=colours)
        figure.colorbar(drawn, ax=axes[row, : len(shown)], shrink=0.85, pad=0.01, label=label)
    picture(axes[0, -1], decode_image(scene["image"]), size, "an image")
    picture(axes[1, -1], decode_image(scene["image"]), size)
    mean = np.array(maps["agnostic"], dtype=float).mean(0)
    picture(axes[1, -1], mean, size, "mean over layers", cmap="magma", alpha=0.6, vmin=0, vmax=1)
    often = picture(axes[2, -1], np.array(maps["foreground"], dtype=float), size, "foreground", cmap="cividis", vmin=0)
    figure.colorbar(often, ax=axes[2, -1], shrink=0.7, label="share of images", location="bottom")
    return figure


@styled
def shares_by_layer(keys: Mapping) -> Figure:
    """Share of input-agnostic keys per layer, trained and untrained, on each scale; what these keys are."""
    trained, compared = keys["trained"], keys["compared"]
    layers = range(trained["layers"])
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), width_ratios=(1, 1, 1, 1.05))
    titles = {
        "raw": "raw: below the threshold\nof all layers together",
        "within_heads": "within heads: below the valley\nof {} layers, else near-constant",
        "near_constant": "near-constant: variance below\n{:.0%} of mean norm$^2$",
    }
    for axis, (scale, title) in zip(axes, titles.items(), strict=False):
        curve(axis, layers, trained["shares"][scale]["layers"], (COLOURS[0], "-", "o", "trained"))
        curve(axis, layers, compared[scale]["untrained"]["layers"], (COLOURS[7], ":", "^", "untrained"))
        limit = trained["thresholds"][scale]
        title = title.format(sum(each["method"] == "valley" for each in limit) if scale == "within_heads" else limit["value"])
        if scale == "raw" and not limit["two_modes"]:
            title += f"\n(no two modes: {limit['method']})"
        axis.set(title=title, xlabel="layer", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("share of keys")
    axes[0].legend(fontsize=7.5)
    sinks = trained["sinks"]["raw"]
    curve(axes[3], layers, trained["foreground"]["correlation"]["layers"], (COLOURS[4], "-", "o", "variance and foreground (r)"))
    curve(axes[3], layers, sinks["mass"]["layers"], (COLOURS[2], "--", "D", "attention: agnostic minus others"))
    curve(axes[3], layers, sinks["norm"]["layers"], (COLOURS[3], "-.", "v", "norm: agnostic minus others"))
    axes[3].axhline(0, color="black", lw=0.7)
    axes[3].set(title="what these keys are", xlabel="layer", ylabel="r, or multiples of the average key's")
    axes[3].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled
def knock_out_curves(knock_out: Mapping, measure: str, block: Sequence[int]) -> Figure:
    """Accuracy or loss per kind of question with the image hidden in one layer, from it on, up to it.

    block: the layers of the blocking experiment, shaded."""
    kinds, layers = knock_out["kinds"], range(knock_out["layers"])
    order = ["all", *sorted(kind for kind in kinds if kind != "all")]
    figure, axes = panels(len(order), 4, 3.25, 2.6, sharex=True)
    unit = "accuracy" if measure == "accuracy" else "loss of the right answer (nats)"
    for number, (axis, kind) in enumerate(zip(axes, order, strict=True)):
        for hidden, style in KNOCK_OUT_STYLE.items():
            curve(axis, layers, [each[measure] for each in kinds[kind][hidden]], style)
        axis.axhline(kinds[kind]["none"][measure]["mean"], color="black", lw=1, label="image seen in every layer")
        axis.axvspan(min(block) - 0.5, max(block) + 0.5, color=COLOURS[7], alpha=0.18, lw=0, label="layers of the blocking experiment")
        axis.set(title=f"{kind.replace('_', ' ')} (n = {kinds[kind]['n']})", ylabel=unit if number % 4 == 0 else "")
        axis.set_xticks(layers[:: max(1, len(layers) // 10)])
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("layer" if number + 4 >= len(order) else "")
    legend_below(figure, axes[:1], ncols=3, title="95 % bands over scenes", fontsize=8)
    return figure


@styled
def block_effects(blocking: Mapping) -> Figure:
    """POPE and MME: score under each block minus without it, with 95 % intervals; single draws of random controls.

    First the gate, every key of the layers hidden: while it stays in the band of changes too small to matter, no other can leave it."""
    about, tasks = blocking["about"]["families"], in_order(blocking, TASKS)
    rank = {"all": 0, "input-agnostic": 1, "random": 2, "random,": 2, "highest": 3, "same": 4, "reading": 5}
    names = sorted(about, key=lambda name: (rank.get(name.split()[0], 9), name))
    size = (4.6 + 3.6 * len(tasks), 0.42 * len(names) + 1.9)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False)
    spans = [np.unique([min(about[name]["layers"]), max(about[name]["layers"])]) for name in names]
    shown = [{"all keys": "gate: all keys", "input-agnostic": "the block: input-agnostic"}.get(name, name) for name in names]
    labels = [f"{each}\n({about[name]['keys']:.0f} keys, layers {'-'.join(map(str, span))})" for each, name, span in zip(shown, names, spans, strict=True)]
    for axis, (task, measured) in zip(axes[0], tasks.items(), strict=True):
        points, (unit, factor) = [], TASKS[task]
        small = measured["smallest"] * factor
        axis.axvspan(-small, small, color=COLOURS[7], alpha=0.18, lw=0, label="too small to matter (smallest effect of interest)")
        for row, name in enumerate(names):
            colour, marker = BLOCK_STYLE.get(name.split()[0], (COLOURS[7], "s"))
            draws = np.array(measured["families"][name].get("draws", [])) * factor
            axis.plot(draws, np.full(len(draws), row + 0.28), "|", color=colour, ms=7, alpha=0.6)
            points.append((row, measured["families"][name]["headline"], colour, marker, None))
        forest(axis, points, labels, factor=factor)
        axis.axhline(0.55, color="black", lw=0.8, ls=":")
        axis.set_xscale("symlog", linthresh=small, linscale=2)  # or a change of 20 points hides those of 0.2
        low, high = (1.3 * edge for edge in axis.get_xlim())
        ticks = [small * each for each in (-64, -16, -4, -1, -0.5, 0, 0.5, 1, 4, 16) if min(low, -small) <= small * each <= max(high, small)]
        axis.set_xlim(low, high)
        axis.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
        axis.minorticks_off()
        plain = measured["plain"]["headline"]["mean"] * factor
        axis.set(xlabel=f"change of {unit}", title=f"{unit.split()[0]}: {plain:.1f} without a block")
    axes[0, 0].tick_params(axis="y", labelsize=7.5)
    legend_below(figure, axes[0, :1], title="points and bars: mean and 95 % interval; ticks: single draws of random keys; beyond the band the scale is "
                 "logarithmic", fontsize=8)  # fmt: skip
    return figure


@styled
def sweep_map(sweep: Mapping) -> Figure:
    """Effect on POPE by share of keys and number of last layers, on the half of the images that chooses the best."""
    values = 100 * np.array([[cell["mean"] for cell in row] for row in sweep["grid"]])
    clear = np.array([[cell["low"] > 0 or cell["high"] < 0 for cell in row] for row in sweep["grid"]])
    size = max(np.abs(values).max(), 0.1)
    figure, axis = plt.subplots(figsize=(1.0 * values.shape[1] + 3.4, 0.55 * values.shape[0] + 2.0))
    drawn = axis.imshow(values, cmap="PuOr_r", vmin=-size, vmax=size, aspect="auto", origin="lower")
    axis.grid(False)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * size else "black"
        axis.text(column, row, f"{value:+.1f}{'*' if clear[row, column] else ''}", ha="center", va="center", fontsize=8, color=colour)
    place = sweep["depths"].index(sweep["best"]["depth"]), sweep["shares"].index(sweep["best"]["share"])
    axis.add_patch(plt.Rectangle((place[0] - 0.48, place[1] - 0.48), 0.96, 0.96, fill=False, lw=2, ec="black"))
    axis.set_xticks(range(len(sweep["depths"])), sweep["depths"])
    axis.set_yticks(range(len(sweep["shares"])), [f"{share:.0%}" for share in sweep["shares"]])
    mean, low, high = (100 * sweep["held_out"][key] for key in ("mean", "low", "high"))
    best = f"{mean:+.2f} F1 points [{low:+.2f}, {high:+.2f}]"
    axis.set(xlabel="number of last layers", ylabel="keys blocked in each layer\n(lowest variance first)",
             title=f"best cell, on the other half of the images:\n{best}")  # fmt: skip
    figure.colorbar(drawn, ax=axis, label="change of POPE F1 (points)")
    figure.supxlabel("*: 95 % interval without 0", fontsize=8)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    keys, block = results["keys"], results["blocking"]["about"]["layers"]
    return {
        "03_variance": variance_histograms(keys),
        "03_variance_within_heads": variance_histograms(keys, "within_heads"),
        "03_causal_order": causal_order(keys),
        "03_position_maps": position_maps(keys, results["picture"]),
        "03_shares": shares_by_layer(keys),
        "03_knock_out_accuracy": knock_out_curves(results["knock_out"], "accuracy", block),
        "03_knock_out_loss": knock_out_curves(results["knock_out"], "loss", block),
        "03_block_effects": block_effects(results["blocking"]),
        "03_sweep": sweep_map(results["sweep"]),
    }
