"""Figures of notebook 03: which keys vary little, where the image is read, and what blocking chosen keys does."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import COLOURS, curve, forest, in_order, legend_below, picture, styled

TASKS = {"pope": ("POPE F1", 100.0), "mme": ("MME score", 1.0)}  # -> score, what it is multiplied by for points
KNOCK_OUT_STYLE = {"one": (COLOURS[0], "-", "o", "in this layer alone"),  # which layers are hidden -> colour, line, marker, label
                   "from": (COLOURS[1], "--", "s", "in this layer and all after it"),
                   "until": (COLOURS[2], "-.", "D", "in this layer and all before it")}
MODES = {"yes": "two modes", "open": "open", "no": "one mode"}
_NUMBERS = ("mean", "low", "high")
BLOCK, EVERY, BELOW, LOWEST = "input-agnostic", "all keys", "reading layers, input-agnostic", "reading layers, lowest variance"
ROWS = {EVERY: ("every image key", COLOURS[3], "v"),  # condition -> its label, colour and marker
        BLOCK: ("the block: keys that vary least", COLOURS[0], "o"),
        "random": ("random keys", COLOURS[7], "s"),
        "random, same attention": ("random keys, same attention", COLOURS[7], "s"),
        "highest variance": ("keys that vary most", COLOURS[7], "s"),
        "same positions, early layers": ("same positions as the block", COLOURS[7], "s"),
        BELOW: ("all below the block's threshold", COLOURS[2], "D"),
        LOWEST: ("as many as the block, varying least", COLOURS[2], "D"),
        "reading layers, random": ("as many as the block, random", COLOURS[2], "D")}


def _span(layers: Sequence[int]) -> str:
    return f"layers {min(layers)}-{max(layers)}" if len(layers) > 1 else f"layer {layers[0]}"


def _tick_layers(axis, layers: int, which: str = "x") -> None:
    axis.set(**{f"{which}ticks": range(0, layers, max(1, layers // 10)), f"{which}label": "layer"})


@styled
def variance(trained: Mapping) -> Figure:
    """Log10 of the keys' variance: all layers together above, each layer as a row below; at the left as it is, as in the paper, at the
    right in relation to most keys of the same head. trained: of `describe_keys`."""
    layers, modes, limit = trained["layers"], trained["modes"]["layers"], trained["thresholds"]["raw"]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 4.2 + 0.12 * layers), height_ratios=(1, 1 + 0.09 * layers), sharex="col")
    units = {"raw": "log$_{10}$ variance (squared key units)", "within_heads": "log$_{10}$ variance / that of most keys of its head"}
    for (above, below), (scale, unit) in zip(axes.T, units.items(), strict=True):
        counts, edges = (np.array(trained["histograms"][scale][name]) for name in ("layers", "log10_edges"))
        above.stairs(counts.sum(0), edges, fill=True, color=COLOURS[0], alpha=0.75)
        below.pcolormesh(edges, np.arange(layers + 1) - 0.5, counts / counts.max(axis=1, keepdims=True), cmap="Blues")
        held = np.flatnonzero(counts.sum(0))
        below.set(xlim=(edges[held[0]], edges[held[-1] + 1]), ylim=(layers - 0.5, -0.5), title="each layer by itself (darker: more keys)")
        _tick_layers(below, layers, "y")
        below.set_xlabel(unit)
    for axis in axes[:, 0]:
        axis.axvline(np.log10(limit["value"]), color="black", lw=1.2, ls="--", label=f"threshold ({limit['method']})")
    axes[0, 0].legend(loc="upper left", frameon=True, framealpha=1, edgecolor="none")
    axes[0, 0].set(title=f"all layers together: {MODES['yes' if limit['two_modes'] else 'no']}", ylabel="keys")
    axes[0, 1].set_title("all layers together, heads aligned")
    right = axes[1, 1].secondary_yaxis("right")
    right.set_yticks(range(layers), ["" if layers > 12 and each["two_modes"] == "no" else MODES[each["two_modes"]] for each in modes])
    right.tick_params(length=0)
    behind = [each["two_modes"] for each in modes[1:]]
    cause = "two modes, which layers of different scale alone can make" if limit["two_modes"] else "one mode"
    figure.suptitle(f"All layers together have {cause};\nwithin heads, {behind.count('yes')} of the {layers - 1} layers after layer 0 have "
                    f"two modes (open in {behind.count('open')})")  # fmt: skip
    return figure


@styled
def places(trained: Mapping) -> Figure:
    """Which positions the lowest keys of each head have, in the usual order and with patches fed in reverse: maps, and by layer."""
    about, size, curves = trained["order"], trained["size"], trained["order"]["curves"]
    figure = plt.figure(figsize=(9.6, 5.2))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes = top.subplots(1, 3)
    often = picture(axes[0], np.array(trained["foreground_map"], dtype=float), size, "shows an object how often", cmap="cividis", vmin=0)
    top.colorbar(often, ax=axes[0], shrink=0.8, label="share of images")
    for axis, (name, title) in zip(axes[1:], {"usual": "read from the upper left", "turned": "read from the lower right"}.items(), strict=True):
        drawn = picture(axis, np.array(about["maps"][name], dtype=float), size, title, vmin=0, vmax=1, cmap="magma")
    top.colorbar(drawn, ax=axes[1:], shrink=0.8, label=f"share among the\nlowest {about['lowest']:.0%} of a head")
    axis = bottom.subplots()
    styles = {"first": (COLOURS[0], "-", "o", "first row of patches, usual order"),
              "turned_first": (COLOURS[1], "--", "s", "reverse order: what is read first (the place)"),
              "turned_picture": (COLOURS[2], "-.", "D", "reverse order: the patches of the first row (the picture)"),
              "rest": (COLOURS[7], ":", "^", "other rows, usual order")}
    for name, style in styles.items():
        curve(axis, range(trained["layers"]), curves[name]["layers"], style)
    _tick_layers(axis, trained["layers"])
    axis.set(ylabel=f"share of these keys among\nthe lowest {about['lowest']:.0%} of their head", ylim=(-0.03, 1.03))
    axis.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    place, shown = (curves[name]["all"]["mean"] for name in ("turned_first", "turned_picture"))
    figure.suptitle(f"With patches in reverse, {place:.0%} of the keys read first are among the lowest {about['lowest']:.0%} of their head "
                    f"(the place),\nand {shown:.0%} of those that show the old first row (the picture); layers 1 on")  # fmt: skip
    return figure


@styled
def shares_by_layer(keys: Mapping) -> Figure:
    """Share of keys that vary little, trained and untrained, by layer; attention to the keys that vary least against others."""
    trained, compared = keys["trained"], keys["compared"]["within_heads"]
    layers, limits = trained["layers"], trained["thresholds"]["within_heads"]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.9))
    curve(axes[0], range(layers), trained["shares"]["within_heads"]["layers"], (COLOURS[0], "-", "o", "trained"), factor=100)
    curve(axes[0], range(layers), compared["untrained"]["layers"], (COLOURS[7], ":", "^", f"random weights, {len(compared['draws'])} draws"), factor=100)
    axes[0].plot(range(layers), 100 * np.array(compared["draws"]).T, "_", color=COLOURS[7], alpha=0.6)  # each draw
    valleys, near = sum(each["method"] == "valley" for each in limits), trained["thresholds"]["near_constant"]["value"]
    axes[0].set(title=f"below the valley in {valleys} layers, in others\nvariance below {near:.0%} of the squared norm", ylabel="% of a layer's keys")
    axes[0].legend()
    curve(axes[1], range(layers), trained["sinks"]["raw"]["mass"]["layers"], (COLOURS[2], "--", "D", ""))
    axes[1].axhline(0, color="black", lw=0.8)
    sink = trained["sinks"]["raw"]["mass"]["all"]["mean"]
    gap = "none to compare" if sink is None else f"{sink:+.2f} (above 0: sinks)"
    axes[1].set(title=f"attention to keys below the pooled threshold\nminus that to others of their head: {gap}", ylabel="attention, in multiples of the mean key's")
    for axis in axes:
        _tick_layers(axis, layers)
    first, (mean, low, high) = trained["shares"]["within_heads"]["layers"][0]["mean"], (100 * compared["behind_layer_0"][key] for key in _NUMBERS)
    figure.suptitle(f"{first:.0%} of the keys of layer 0, where no attention has run, vary little;\nafter it, trained minus untrained is "
                    f"{mean:+.1f} % of the keys [{low:+.1f}, {high:+.1f}]")  # fmt: skip
    return figure


@styled
def knock_out(found: Mapping, block: Sequence[int]) -> Figure:
    """Accuracy with the image hidden from the text, in one layer, from it on, up to it; and what each kind of question loses without the
    image from a layer on. block: the layers of the blocking experiment, shaded."""
    kinds, every, layers = found["kinds"], found["kinds"]["all"], found["layers"]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.9), width_ratios=(1, 1.2))
    for hidden, style in KNOCK_OUT_STYLE.items():
        curve(axes[0], range(layers), [each["accuracy"] for each in every[hidden]], style, factor=100)
    axes[0].axhline(100 * every["none"]["accuracy"]["mean"], color="black", lw=1, label="never hidden")
    axes[0].axvspan(min(block) - 0.5, max(block) + 0.5, color=COLOURS[7], alpha=0.18, lw=0, label="layers of the blocking experiment")
    axes[0].set(ylabel="right answers (%), mean over kinds", title="the image is hidden from the text ...")
    _tick_layers(axes[0], layers)
    lost = {kind: [-100 * each["accuracy_change"]["mean"] for each in about["from"]] for kind, about in kinds.items() if kind != "all"}
    order = sorted(lost, key=lambda kind: sum(lost[kind][1:]))
    values = np.array([lost[kind] for kind in order])
    drawn = axes[1].imshow(values, cmap="cividis_r", aspect="auto", vmin=0)
    axes[1].grid(False)
    if layers <= 12:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.55 * values.max() else "black"
            axes[1].text(column, row, f"{round(round(value, 6)) + 0}", ha="center", va="center", fontsize=8.5, color=colour)
    axes[1].set_yticks(range(len(order)), [kind.replace("_", " ") for kind in order], fontsize=8.5)
    axes[1].set_title("points lost without the image from this layer on")
    _tick_layers(axes[1], layers)
    figure.colorbar(drawn, ax=axes[1], label="points of accuracy")
    legend_below(figure, axes[:1], ncols=3, fontsize=8.5)
    alone = [-100 * each["accuracy_change"]["mean"] for each in every["one"]]
    worst, late = int(np.argmax(alone)), -100 * every["from"][min(block)]["accuracy_change"]["mean"]
    figure.suptitle(f"Hiding the image in layer {worst} alone costs {alone[worst]:.0f} points of accuracy, from layer {min(block)} on {late:.0f}")
    return figure


@styled
def block_effects(blocking: Mapping) -> Figure:
    """POPE and MME: score under each block minus without it, with 95 % intervals and single draws of random controls; the layers of the
    block first, then others. What is beyond the axis, which the block and its controls choose, is an arrow with its number."""
    about, late = blocking["about"]["families"], blocking["about"]["layers"]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in ROWS:
        groups.setdefault(tuple(about[name]["layers"]), []).append(name)
    what = {tuple(late): "the last ones", tuple(about[BELOW]["layers"]): "where the image is read most"}
    rows = []  # (condition or "", label)
    for layers, members in groups.items():
        rows.append(("", f"{_span(layers)}, {what.get(layers, 'the first')}"))
        rows += [(name, f"{ROWS[name][0]} ({about[name]['keys']:,.0f})") for name in members]
    tasks = in_order(blocking, TASKS)
    figure, axes = plt.subplots(1, len(tasks), figsize=(9.6, 0.34 * len(rows) + 1.9), sharey=True, squeeze=False)
    for axis, (task, measured) in zip(axes[0], tasks.items(), strict=True):
        score, factor = TASKS[task]
        families, small = measured["families"], measured["smallest"] * factor
        ends = {name: factor * max(abs(families[name]["headline"][end]) for end in ("low", "high")) for name in groups[tuple(late)]}
        reach = 1.15 * max(small, min(ends.pop(EVERY), 3 * small), *ends.values())
        inside = (each["headline"] for each in families.values() if abs(each["headline"]["mean"]) * factor < reach)
        reach = max(reach, *(1.05 * factor * max(-each["low"], each["high"]) for each in inside))  # no interval is cut
        axis.axvspan(-small, small, color=COLOURS[7], alpha=0.18, lw=0, label="too small to matter")
        points = []
        for row, name in ((row, name) for row, (name, _) in enumerate(rows) if name):
            (_, colour, marker), mean = ROWS[name], families[name]["headline"]["mean"] * factor
            draws = factor * np.array(families[name].get("draws", []))
            axis.plot(draws, np.full(len(draws), row + 0.3), "|", color=colour, ms=6, alpha=0.6)
            if abs(mean) < reach:
                points.append((row, families[name]["headline"], colour, marker, None))
                continue
            side, place = ("left", -reach) if mean < 0 else ("right", reach)
            axis.plot(0.96 * place, row, "<" if mean < 0 else ">", color=colour, ms=8)
            axis.text(0.88 * place, row, f"{mean:+.1f}", color=colour, weight="bold", va="center", ha=side)
        forest(axis, points, [label for _, label in rows], factor=factor)
        plain = measured["plain"]["headline"]["mean"] * factor
        axis.set(xlim=(-reach, reach), xlabel=f"change of the {score} (points)", title=f"{score} {plain:.1f} without a block")
    for tick, (name, _) in zip(axes[0, 0].get_yticklabels(), rows, strict=True):
        tick.set(weight="normal" if name else "bold", size=9)
    axes[0, 0].tick_params(axis="y", length=0)
    note = "in brackets: how many keys are hidden; bars: 95 % intervals; ticks: single draws of random keys"
    legend_below(figure, axes[0, :1], title=note, fontsize=8.5, title_fontsize=8.5)
    pope = {name: each["headline"] for name, each in blocking["pope"]["families"].items()}
    change = {name: 100 * pope[name]["mean"] for name in (EVERY, BLOCK, BELOW, LOWEST)}
    idle = max(abs(pope[EVERY]["low"]), abs(pope[EVERY]["high"])) < blocking["pope"]["smallest"]
    figure.suptitle(f"{_span(late).capitalize()} {'are no lever for' if idle else 'and'} POPE: hiding every image key changes it by "
                    f"{change[EVERY]:+.1f} points, the block by {change[BLOCK]:+.1f};\nin {_span(about[LOWEST]['layers'])}, hiding all below the "
                    f"block's threshold changes it by {change[BELOW]:+.1f}, as many as the block by {change[LOWEST]:+.1f}")  # fmt: skip
    return figure


@styled
def sweep_map(sweep: Mapping) -> Figure:
    """Effect on POPE by share of keys and number of last layers, on the half of the images that chooses the best."""
    # None, of too few images, becomes NaN.
    values, low, high = 100 * np.array([[[cell[key] for cell in row] for row in sweep["grid"]] for key in _NUMBERS], dtype=float)
    size = max(np.abs(values).max(), 0.1)
    figure, axis = plt.subplots(figsize=(8.5, 4.0))
    drawn = axis.imshow(values, cmap="PuOr_r", vmin=-size, vmax=size, aspect="auto", origin="lower")
    axis.grid(False)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * size else "black"
        star = "*" * bool(low[row, column] > 0 or high[row, column] < 0)
        axis.text(column, row, f"{round(value, 1) + 0.0:+.1f}{star}", ha="center", va="center", color=colour)
    place = sweep["depths"].index(sweep["best"]["depth"]), sweep["shares"].index(sweep["best"]["share"])
    axis.add_patch(plt.Rectangle((place[0] - 0.48, place[1] - 0.48), 0.96, 0.96, fill=False, lw=2, ec="black"))
    axis.set_xticks(range(len(sweep["depths"])), sweep["depths"])
    axis.set_yticks(range(len(sweep["shares"])), [f"{share:.0%}" for share in sweep["shares"]])
    mean, low, high = 100 * np.array([sweep["held_out"][key] for key in _NUMBERS], dtype=float)
    interval = f"[{low:+.1f}, {high:+.1f}]" if np.isfinite(low) else "(too few images for an interval)"
    axis.set(xlabel="in how many last layers (*: 95 % interval without 0)", ylabel="keys blocked in each layer\n(those that vary least)")
    figure.colorbar(drawn, ax=axis, label="change of POPE F1 (points),\non the half that chooses")
    figure.suptitle(f"The best cell (framed) changes POPE by {mean:+.1f} F1 points {interval}\n"
                    "on the half of the images that did not choose it")  # fmt: skip
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    keys, blocking = results["keys"], results["blocking"]
    return {"03_variance": variance(keys["trained"]), "03_places": places(keys["trained"]), "03_shares": shares_by_layer(keys),
            "03_knock_out": knock_out(results["knock_out"], blocking["about"]["layers"]), "03_block_effects": block_effects(blocking),
            "03_sweep": sweep_map(results["sweep"])}
