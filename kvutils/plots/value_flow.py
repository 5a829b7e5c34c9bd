"""Figures."""

import re
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import (
    _COLOURS,
    BEFORE,
    SOURCE_STYLE,
    _curve,
    _gallery,
    _in_order,
    _label,
    _picture,
    _styled,
    _tasks_in_order,
    decode_image,
    error_bar,
    flow_axis,
    layer_count,
    layer_ticks,
)


@_styled
def token_layout(picture: Mapping) -> Figure:
    """Where each image token sits: the image with every token's rectangle and number; and the token sequence.

    picture: image (base64), size (W, H), rects (N, 4), slots (N,), newlines (slots), clicked (token index)."""
    image, rects = decode_image(picture["image"]), np.array(picture["rects"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=(1, 1.1))
    left.imshow(image, extent=(0, picture["size"][0], picture["size"][1], 0))
    for index, (x0, y0, x1, y1) in enumerate(rects):
        chosen = index == picture["clicked"]
        left.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=2.2 if chosen else 0.4,
                                     ec=_COLOURS[1] if chosen else "white", zorder=3 if chosen else 2))  # fmt: skip
    left.set(xlabel="x (pixels of the original image)", ylabel="y (pixels)", title=f"{len(rects)} image tokens; orange: the token under the point")
    left.grid(False)
    order = right.scatter(picture["slots"], np.arange(len(rects)), c=rects[:, 1], s=5, cmap="viridis")
    for slot in picture["newlines"]:
        right.axvline(slot, color=_COLOURS[1], lw=1)
    figure.colorbar(order, ax=right, label="y of the token (pixels)")
    newline = f"{len(picture['newlines'])} newline token" + ("s" if len(picture["newlines"]) != 1 else "")
    right.set(xlabel="slot in the token sequence", ylabel="image token", title=f"row by row; orange: {newline}")
    return figure


@_styled
def value_pca(picture: Mapping) -> Figure:
    """First three principal components of each source's tokens as red, green and blue, source by source."""
    maps, size = picture["pca"], picture["size"]
    figure, axes = _gallery(len(maps) + 1, size)
    _picture(axes[0], decode_image(picture["image"]), size, "image")
    for axis, (source, colours) in zip(axes[1:], _in_order(maps), strict=True):
        _picture(axis, np.array(colours, dtype=np.uint8), size, _label(source))
    return figure


@_styled
def similarity_maps(picture: Mapping) -> Figure:
    """Cosine similarity of every token to the token under one point, source by source, one colour scale."""
    maps, size = picture["similarity"], picture["size"]
    figure, axes = _gallery(len(maps) + 1, size)
    _picture(axes[0], decode_image(picture["image"]), size, "image and point")
    for colour, width in (("black", 3), ("white", 1.2)):
        axes[0].plot(*picture["point"], "o", ms=9, mfc="none", mec=colour, mew=width)
    for axis, (source, scores) in zip(axes[1:], _in_order(maps), strict=True):
        shown = _picture(axis, np.array(scores), size, _label(source), vmin=-1, vmax=1, cmap="cividis")
    label = "cosine similarity to the token under the point (centred)"
    if figure.get_figheight() < 4.1:  # few rows of wide pictures
        label = label.replace(" under", "\nunder")
    figure.colorbar(shown, ax=axes, shrink=0.6, label=label)
    return figure


@_styled
def layer_curves(tasks: Mapping[str, Mapping]) -> Figure:
    """Each task's score along the data flow: pixels, encoders and projector, then the layers, with 95 % bands."""
    tasks = _tasks_in_order(tasks)
    rows = -(-(len(tasks) + 1) // 4)  # the last place is the legend's
    figure, axes = plt.subplots(rows, 4, figsize=(13, 3.2 * rows), squeeze=False)
    handles: dict[str, object] = {}
    for axis, summary in zip(axes.flat, tasks.values(), strict=False):
        sources = summary["sources"]
        before, line, offset = flow_axis(layer_count(sources))
        for family in SOURCE_STYLE:
            _curve(axis, sources, family, offset)
        for x, source in zip(before, BEFORE, strict=True):
            if source in sources:
                found = sources[source]
                axis.errorbar(x, found["mean"], yerr=error_bar(found), fmt="D", ms=4, color="black", capsize=2)
        if "projector" in sources:
            axis.axhline(sources["projector"]["mean"], color="black", lw=0.7, ls=(0, (6, 4)), label="projector, continued")
        layers = layer_ticks(sorted({int(m[1]) for s in sources if (m := re.fullmatch(r"value\.(\d+)", s))}))
        axis.set_xticks([*before, *(layer + offset for layer in layers)],
                        [*BEFORE.values(), *map(str, layers)], fontsize=7.5)  # fmt: skip
        for tick in axis.get_xticklabels()[: len(BEFORE)]:
            tick.set(rotation=40, ha="right")
        axis.axvline(line, color="grey", lw=0.5)
        axis.set(title=f"{summary['title']}\n{summary['n']} items in {summary['groups']} units", ylabel=summary["metric"])
        axis.set_xlabel("before the language model  |  layer", fontsize=8)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_axis_off()
    handles["before the language model"] = plt.Line2D([], [], color="black", marker="D", ms=4, ls="none")
    list(axes.flat)[len(tasks)].legend(handles.values(), handles.keys(), loc="center", title="95 % bands and bars")
    return figure


@_styled
def build_then_degrade(tasks: Mapping[str, Mapping]) -> Figure:
    """Best value layer minus first and minus last, on the half of the items that did not choose it."""
    tasks = {name: each for name, each in _tasks_in_order(tasks).items() if "value" in each["build_then_degrade"]}
    figure, axis = plt.subplots(figsize=(8.5, 0.55 * len(tasks) + 1.3))
    for row, summary in enumerate(tasks.values()):
        found = summary["build_then_degrade"]["value"]
        for part, shift, colour, marker, label in (
            ("minus_first", 0.13, _COLOURS[0], "o", "best minus first layer (builds up)"),
            ("minus_last", -0.13, _COLOURS[1], "s", "best minus last layer (degrades)"),
        ):
            value = found[part]
            axis.errorbar(value["mean"], row + shift, xerr=error_bar(value), fmt=marker, color=colour, capsize=3, ms=5,
                          label=label if row == 0 else None)  # fmt: skip
    axis.axvline(0, color="black", lw=0.8)
    names = [f"{s['title']} (layer {s['build_then_degrade']['value']['best_layer']})" for s in tasks.values()]
    axis.set_yticks(range(len(tasks)), names)
    axis.invert_yaxis()
    axis.set(xlabel="difference of the task's score, with 95 % interval", title="Image values: best layer against the ends")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_value_flow(results: Mapping) -> dict[str, Figure]:
    figures = {"01_value_flow": layer_curves(results["tasks"]), "01_build_then_degrade": build_then_degrade(results["tasks"])}
    for name, picture in results["pictures"].items():
        figures[f"01_pca_{name}"] = value_pca(picture)
        figures[f"01_similarity_{name}"] = similarity_maps(picture)
        if "slots" in picture:
            figures[f"01_tokens_{name}"] = token_layout(picture)
    return figures
