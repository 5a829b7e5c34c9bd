"""Figures of notebook 01: the method on one image, the scores layer by layer, best layer against the ends, photographs."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots import style
from kvutils.plots.style import BEFORE, COLOURS, along_the_flow, decode_image, forest, in_order, layers_text, legend_below, panels, picture, styled

SIX = style.TASK_ORDER[:6]  # the tasks of the claims


def _label(source: str) -> str:
    return BEFORE.get(source) or (style.FIRST if source == "value.0" else f"values, layer {source.rpartition('.')[2]}")


def _sources(maps: Mapping[str, object]) -> list[str]:
    """Along the data flow."""
    return [*in_order(maps, BEFORE), *sorted((name for name in maps if name not in BEFORE), key=lambda name: int(name.rpartition(".")[2]))]


def _height(scene: Mapping) -> float:
    """Of a picture, in its widths; within what a figure can show."""
    return min(max(scene["size"][1] / scene["size"][0], 0.4), 1.6)


def _photo(axis, scene: Mapping, title: str = "") -> None:
    """The picture, with the point that others are compared with."""
    picture(axis, decode_image(scene["image"]), scene["size"], title)
    for colour, width in (("black", 3), ("white", 1.2)):
        axis.plot(*scene["point"], "o", ms=8, mfc="none", mec=colour, mew=width)


def _similarity(axis, scene: Mapping, source: str):
    return picture(axis, np.array(scene["similarity"][source], dtype=float), scene["size"], vmin=-1, vmax=1, cmap="cividis")


def _counts(tasks: Mapping[str, Mapping], *keys: str) -> tuple[int, int]:
    """On how many of the six tasks the difference under these keys is above 0, and of how many it is known."""
    found = []
    for each in in_order(tasks, SIX).values():
        for key in keys:
            each = each.get(key, {})
        found += [each["low"] > 0] if each.get("low") is not None else []
    return sum(found), len(found)


@styled
def token_layout(scene: Mapping) -> Figure:
    """Where each image token sits: the image cut into tokens, and at which place of the sequence each of them stands. scene: image
    (base64), size (W, H), rects (N, 4), slots (N,), newlines (slots), clicked (token index)."""
    rects, slots = np.array(scene["rects"]), np.array(scene["slots"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 0.6 + 3.9 * _height(scene)), sharey=True)
    picture(left, decode_image(scene["image"]), scene["size"])
    picture(right, np.full((1, 1, 3), 255, np.uint8), scene["size"])
    shades = plt.get_cmap("cividis")((slots - slots.min()) / max(1, np.ptp(slots)))
    for token, ((x0, y0, x1, y1), slot, shade) in enumerate(zip(rects, slots, shades, strict=True)):
        edge = {"ec": COLOURS[1], "lw": 2.5, "zorder": 3} if token == scene["clicked"] else {"ec": "white", "lw": 0.5}
        left.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **edge))
        right.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fc=shade, **edge))
        if len(rects) <= 196:
            ink = "white" if shade[:3].mean() < 0.5 else "black"
            right.text((x0 + x1) / 2, (y0 + y1) / 2, slot, ha="center", va="center", fontsize=7, color=ink, zorder=4)
    lines = scene["newlines"]
    newlines = f"place {lines[0]} is a newline, which shows" if len(lines) == 1 else f"the {len(lines)} newlines between show"
    left.set_title(f"{scene['size'][0]} x {scene['size'][1]} pixels become {len(rects)} image tokens")
    right.set_title(f"places {slots.min()} to {slots.max()} of the sequence, row by row")
    beside = f"; {newlines} nothing" if lines else ""
    figure.supxlabel(f"orange: the token under the point, at place {slots[scene['clicked']]}{beside}", fontsize=9)
    return figure


@styled
def overview(scene: Mapping, tasks: Mapping[str, Mapping] | None = None, profile: str = "") -> Figure:
    """One picture along the data flow: its tokens' principal components as colours, what is similar to one point; and the result of `tasks`."""
    names = _sources(scene["pca"])
    side = 10 / (len(names) + 2.4)  # of a map, in inches
    figure = plt.figure(figsize=(10.67, 2 * side * _height(scene) + 1.3), dpi=150)
    grid = figure.add_gridspec(2, len(names) + 1, width_ratios=(2.2, *[1] * len(names)))
    _photo(figure.add_subplot(grid[:, 0]), scene, "picture and point")
    rows = [[figure.add_subplot(grid[row, 1 + column]) for column in range(len(names))] for row in range(2)]
    for above, below, name in zip(*rows, names, strict=True):
        picture(above, np.array(scene["pca"][name], dtype=np.uint8), scene["size"], _label(name).replace(", ", ",\n").replace("first ", "first\n"))
        shown = _similarity(below, scene, name)
    for (axis, *_), text in zip(rows, ("colours", "similarity"), strict=True):
        axis.set_ylabel(text, fontsize=10)
    figure.colorbar(shown, ax=rows[1], shrink=0.9, ticks=(-1, 0, 1)).set_label("cosine", fontsize=10)
    above, known = _counts(tasks or {}, "value_best", "minus", "control")
    here = "in this small model, " if profile == "pocket" else ""
    said = (f"\n{here}on {above} of {known} perception tasks the image values hold more than their controls give" if known else
            "\nprincipal components as colours, and what is similar to one point")  # fmt: skip
    figure.suptitle(f"What image tokens hold, from the encoder through the language model: {said}", fontsize=12, x=0.01, ha="left")
    return figure


@styled
def photographs(maps: Mapping[str, Mapping], numbers: Mapping) -> Figure:
    """Similarity to one point in photographs, in a grey picture, and in that read column by column; beneath each map how much of what its
    tokens differ in lies between rows and between columns of the grid."""
    names = max((_sources(each["similarity"]) for each in maps.values()), key=len)
    order = sorted(maps, key=lambda name: name.startswith("grey"))
    height = 6.4 / (len(names) + 1) * max(map(_height, maps.values())) + 0.3
    figure, axes = plt.subplots(len(order), len(names) + 1, figsize=(8, height * len(order) + 0.8), squeeze=False)
    for row, name in zip(axes, order, strict=True):
        _photo(row[0], maps[name])
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=9)
        for axis, source in zip(row[1:], names, strict=True):
            axis.set_axis_off()
            if source in maps[name]["similarity"]:
                shares = [numbers["pictures"][name][source][kind] for kind in ("rows", "columns")]
                if None in shares:  # a map would show rounding
                    axis.text(0.5, 0.5, "equal tokens", ha="center", fontsize=8, transform=axis.transAxes)
                    continue
                axis.set_axis_on()
                shown = _similarity(axis, maps[name], source)
                axis.set_xlabel(" | ".join(f"{100 * each:.0f}" for each in shares), fontsize=8, labelpad=2)
    for axis, name in zip(axes[0], ("picture and point", *map(_label, names)), strict=True):
        axis.set_title(name, fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="cosine similarity to the point (centred)")
    turns = ", upright where it is read by columns" if numbers["turns"] else ""
    band = f"A grey picture has a horizontal band{turns}" if numbers["band"] else "A grey picture has no horizontal band"
    figure.suptitle(f"{band}\nbelow: % of the variance between tokens that lies between rows | between columns", fontsize=10)
    return figure


@styled
def layer_curves(tasks: Mapping[str, Mapping]) -> Figure:
    """Score of each of the six tasks along the data flow, with 95 % bands, and how far the best value layer is above its control."""
    tasks = in_order(tasks, SIX)
    columns = min(3, len(tasks))
    figure, axes = panels(len(tasks), columns, 8.4 / columns, 2.5 if len(tasks) > columns else 3.6, sharex=True)
    for axis, summary in zip(axes, tasks.values(), strict=True):
        sources, control = summary["sources"], summary.get("value_best", {}).get("minus", {}).get("control")
        along_the_flow(axis, sources, style.SOURCE_STYLE)
        if "projector" in sources:
            axis.axhline(sources["projector"]["mean"], color="black", lw=0.7, ls=(0, (6, 4)), label="projector, carried on")
        axis.set_title(summary["title"].replace("-expression", ""), fontsize=9)
        axis.set(ylabel=summary["metric"].replace(" per image", ""))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.2 * (high - low))  # for the words
        if control and control["low"] is not None:
            said = "above" if control["low"] > 0 else "below" if control["high"] < 0 else "not apart from"
            axis.text(0.98, 0.98, f"{100 * control['mean']:+.0f} points: {said} control", transform=axis.transAxes, ha="right", va="top",
                      fontsize=8.5, color=COLOURS[0] if control["low"] > 0 else COLOURS[3])  # fmt: skip
        axis.tick_params(axis="x", labelsize=8.5)
    above, known = _counts(tasks, "value_best", "minus", "control")
    (up, _), (down, _) = (_counts(tasks, "build_then_degrade", "value", end) for end in ("minus_first", "minus_last"))
    figure.suptitle(f"Image values hold more than their controls on {above} of {known} tasks;\nfrom layer 1 on they build up on {up} and "
                    f"fall towards the last layer on {down}", fontsize=11)  # fmt: skip
    for axis in axes[-columns:]:  # the lowest of each column
        axis.set_xlabel("before the language model | layer", fontsize=8.5)
        axis.tick_params(axis="x", labelbottom=True)
    legend_below(figure, axes, {"before the language model": style.BEFORE_HANDLE}, ncols=5, fontsize=8, columnspacing=1, handlelength=1.6)
    return figure


@styled
def build_then_degrade(tasks: Mapping[str, Mapping]) -> Figure:
    """Best layer between the first and the last minus each of the two, chosen for each half of the items on the other."""
    tasks = {name: each for name, each in in_order(tasks, SIX).items() if "value" in each["build_then_degrade"]}
    figure, axis = plt.subplots(figsize=(8, 0.55 * len(tasks) + 1.4))
    parts = (("minus_first", 0.15, COLOURS[0], "o", "minus layer 1: above 0, it builds up"),
             ("minus_last", -0.15, COLOURS[1], "s", "minus the last layer: above 0, it degrades"))  # fmt: skip
    found = [each["build_then_degrade"]["value"] for each in tasks.values()]
    points = [(row + shift, each[part], colour, marker, None if row else label)
              for row, each in enumerate(found) for part, shift, colour, marker, label in parts]  # fmt: skip
    forest(axis, points, [f"{task['title']}\n({layers_text(each['best'])})" for task, each in zip(tasks.values(), found, strict=True)], 100)
    (up, known), (down, _) = (_counts(tasks, "build_then_degrade", "value", end) for end in ("minus_first", "minus_last"))
    axis.set(xlabel="difference in points of the task's score, with 95 % interval")
    axis.set_title(f"The best layer in between is better than layer 1 on {up} of {known} tasks, than the last on {down}", loc="right")
    legend_below(figure, [axis], ncols=2)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    figures = {"01_value_flow": layer_curves(results["tasks"]), "01_build_then_degrade": build_then_degrade(results["tasks"])}
    if "scene" in results:
        figures |= {"01_tokens": token_layout(results["scene"]), "01_overview": overview(results["scene"], results["tasks"], results["profile"])}
    if "maps" in results:
        figures["01_photographs"] = photographs(results["maps"], results["photographs"])
    return figures
