"""Figures of notebook 01: the method on one image, the scores layer by layer, best layer against the ends."""

import re
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots import style
from kvutils.plots.style import BEFORE, COLOURS, along_the_flow, decode_image, forest, in_order, layers_text, panels, picture, styled


@styled
def token_layout(scene: Mapping) -> Figure:
    """Where each image token sits: the image with every token's rectangle and number; and the token sequence.

    scene: image (base64), size (W, H), rects (N, 4), slots (N,), newlines (slots), clicked (token index)."""
    image, rects = decode_image(scene["image"]), np.array(scene["rects"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=(1, 1.1))
    left.imshow(image, extent=(0, scene["size"][0], scene["size"][1], 0))
    for index, (x0, y0, x1, y1) in enumerate(rects):
        chosen = index == scene["clicked"]
        left.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=2.2 if chosen else 0.4,
                                     ec=COLOURS[1] if chosen else "white", zorder=3 if chosen else 2))  # fmt: skip
    left.set(xlabel="x (pixels of the original image)", ylabel="y (pixels)", title=f"{len(rects)} image tokens; orange: the token under the point")
    left.grid(False)
    order = right.scatter(scene["slots"], np.arange(len(rects)), c=rects[:, 1], s=5, cmap="viridis")
    for slot in scene["newlines"]:
        right.axvline(slot, color=COLOURS[1], lw=1)
    figure.colorbar(order, ax=right, label="y of the token (pixels)")
    newline = f"{len(scene['newlines'])} newline token" + ("s" if len(scene["newlines"]) != 1 else "")
    right.set(xlabel="slot in the token sequence", ylabel="image token", title=f"row by row; orange: {newline}")
    return figure


def _gallery(maps: Mapping[str, object], scene: Mapping, title: str) -> tuple[Figure, list, list[tuple]]:
    """The image, and beside it a place for each source; the sources along the data flow."""
    height = min(max(scene["size"][1] / scene["size"][0], 0.4), 1.6)
    figure, axes = panels(len(maps) + 1, 5, 1.85, 1.85 * height + 0.25)
    picture(axes[0], decode_image(scene["image"]), scene["size"], title)
    layered = sorted((name for name in maps if name not in BEFORE), key=lambda name: int(name.rpartition(".")[2]))
    names = [*in_order(maps, BEFORE), *layered]
    return figure, axes, [(axis, _label(name), np.array(maps[name])) for axis, name in zip(axes[1:], names, strict=True)]


def _label(source: str) -> str:
    layer = re.fullmatch(r"(.*)\.(\d+)", source)
    if layer and layer[1] == "value" and layer[2] == "0":
        return "first value projection"
    return f"{ {'value': 'values', 'key': 'keys'}.get(layer[1], layer[1])}, layer {layer[2]}" if layer else BEFORE[source]


@styled
def value_pca(scene: Mapping) -> Figure:
    """First three principal components of each source's tokens as red, green and blue, source by source."""
    figure, _, places = _gallery(scene["pca"], scene, "image")
    for axis, label, colours in places:
        picture(axis, colours.astype(np.uint8), scene["size"], label)
    return figure


@styled
def similarity_maps(scene: Mapping) -> Figure:
    """Cosine similarity of every token to the token under one point, source by source, one colour scale."""
    figure, axes, places = _gallery(scene["similarity"], scene, "image and point")
    for colour, width in (("black", 3), ("white", 1.2)):
        axes[0].plot(*scene["point"], "o", ms=9, mfc="none", mec=colour, mew=width)
    for axis, label, scores in places:
        shown = picture(axis, scores, scene["size"], label, vmin=-1, vmax=1, cmap="cividis")
    label = "cosine similarity to the token under the point (centred)"
    if figure.get_figheight() < 4.1:  # few rows of wide pictures
        label = label.replace(" under", "\nunder")
    figure.colorbar(shown, ax=axes, shrink=0.6, label=label)
    return figure


@styled
def layer_curves(tasks: Mapping[str, Mapping]) -> Figure:
    """Each task's score along the data flow: pixels, encoders, projector and first projection, then the layers, with 95 % bands."""
    tasks = in_order(tasks)
    figure, (*axes, last) = panels(len(tasks) + 1, 4, 3.25, 3.2)
    for axis, summary in zip(axes, tasks.values(), strict=True):
        sources = summary["sources"]
        along_the_flow(axis, sources, style.SOURCE_STYLE)
        axis.tick_params(axis="x", labelsize=7.5)
        if "projector" in sources:
            axis.axhline(sources["projector"]["mean"], color="black", lw=0.7, ls=(0, (6, 4)), label="projector, continued")
        axis.set(title=f"{summary['title']}\n{summary['n']} items in {summary['groups']} units", ylabel=summary["metric"])
        axis.set_xlabel("before the language model  |  layer", fontsize=8)
    last.set_axis_off()
    last.legend(**style.labelled(axes, {"before the language model": style.BEFORE_HANDLE}), loc="center", title="95 % bands and bars")
    return figure


@styled
def build_then_degrade(tasks: Mapping[str, Mapping]) -> Figure:
    """Best layer between the first and the last minus each of the two, chosen for each half of the items on the other."""
    tasks = {name: each for name, each in in_order(tasks).items() if "value" in each["build_then_degrade"]}
    figure, axis = plt.subplots(figsize=(8.5, 0.55 * len(tasks) + 1.3))
    parts = (("minus_first", 0.13, COLOURS[0], "o", "best layer between minus layer 1 (builds up)"),
             ("minus_last", -0.13, COLOURS[1], "s", "best layer between minus last layer (degrades)"))  # fmt: skip
    found = [each["build_then_degrade"]["value"] for each in tasks.values()]
    points = [(row + shift, each[part], colour, marker, None if row else label)
              for row, each in enumerate(found) for part, shift, colour, marker, label in parts]  # fmt: skip
    forest(axis, points, [f"{task['title']}\n({layers_text(each['best'])})" for task, each in zip(tasks.values(), found, strict=True)])
    axis.set(xlabel="difference of the task's score, with 95 % interval", title="Image values: best layer between against the ends")
    style.legend_below(figure, [axis], ncols=2)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    figures = {"01_value_flow": layer_curves(results["tasks"]), "01_build_then_degrade": build_then_degrade(results["tasks"])}
    for name, scene in results["pictures"].items():
        figures[f"01_pca_{name}"] = value_pca(scene)
        figures[f"01_similarity_{name}"] = similarity_maps(scene)
        if "slots" in scene:
            figures[f"01_tokens_{name}"] = token_layout(scene)
    return figures
