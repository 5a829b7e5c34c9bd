"""Figures of notebook 04: what words before the image change in its values, and in the answers."""

import textwrap
from collections.abc import Iterable, Mapping
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import COLOURS, curve, decode_image, forest, in_order, layers_text, legend_below, panels, picture, styled

CONDITION_STYLE = {  # condition -> colour, line, marker, label
    "none": ("black", "-", "D", "no prefix"),
    "correct": (COLOURS[0], "-", "o", "correct"),
    "wrong": (COLOURS[3], "--", "v", "wrong"),
    "random": (COLOURS[1], ":", "s", "random words"),
    "reversed": (COLOURS[2], "-.", "^", "correct, reversed"),
    "unrelated": (COLOURS[4], "--", "P", "unrelated words"),
    "filler": (COLOURS[7], ":", "X", "filler (token count only)"),
}
READOUT_ORDER = ("referring_by_class_name", "referring_by_expression", "domain_by_text", "domain_by_probe")


def _title(axis, title: str, n: str, xlabel: str) -> None:
    axis.set(title=f"{title}\n{n}", xlabel=xlabel)
    axis.title.set_fontsize(8.5)


def _points(found: Mapping[str, Mapping], conditions: Iterable[str]) -> list[tuple]:
    """A row per condition; those that were not read stay empty."""
    return [(row, found[c], CONDITION_STYLE[c][0], CONDITION_STYLE[c][2], None) for row, c in enumerate(conditions) if c in found]


@styled
def prefix_effects(readouts: Mapping[str, Mapping]) -> Figure:
    """Correct prefix minus every other condition, and random words minus none, at the best layers, in points of mIoU with 95 %
    intervals; grey: differences smaller than the smallest effect of interest."""
    readouts = in_order(readouts, READOUT_ORDER)
    figure, axes = panels(len(readouts), len(readouts), 3.1, 3.6, sharey=True)
    others = [condition for condition in CONDITION_STYLE if condition != "correct"]
    names = [*(f"correct minus {CONDITION_STYLE[name][3]}" for name in others), "random words minus no prefix"]
    for axis, found in zip(axes, readouts.values(), strict=True):
        best, random = found["best"], ("dimgrey", "s")
        points = [*_points(best["correct_minus"], others), (len(others), best["random_minus_none"], *random, None)]
        axis.axvspan(-found["smallest"], found["smallest"], color="0.9", lw=0)
        forest(axis, points, names, factor=100)
        _title(axis, found["title"], f"{layers_text(best['layers'])}, {found['n']} samples", "mIoU points")
    return figure


@styled
def added_by_layer(readouts: Mapping[str, Mapping]) -> Figure:
    """What each prefix adds to the score without prefix, layer by layer, with the 95 % band of the correct prefix."""
    readouts = in_order(readouts, READOUT_ORDER)
    figure, axes = panels(len(readouts), len(readouts), 3.3, 3.3)
    for axis, found in zip(axes, readouts.values(), strict=True):
        for condition, style in CONDITION_STYLE.items():
            if condition in found["added"]:  # bands of all six would hide each other; the results file has them
                curve(axis, found["layers"], found["added"][condition], style, 100, band=condition == "correct")
        axis.axhline(0, color="black", lw=0.8)
        _title(axis, found["title"], f"{found['n']} samples", "layer")
    axes[0].set_ylabel("mIoU minus that without prefix (points)")
    legend_below(figure, axes[:1], ncols=len(CONDITION_STYLE) - 1)
    return figure


@styled
def movement_by_layer(readouts: Mapping[str, Mapping]) -> Figure:
    """How far values move with each prefix, on objects and on background, layer by layer."""
    readouts = in_order(readouts, [name for name in READOUT_ORDER if name != "domain_by_probe"])  # as in domain_by_text
    figure, axes = panels(len(readouts), len(readouts), 3.6, 3.4, sharey=True)
    for axis, found in zip(axes, readouts.values(), strict=True):
        shown = [condition for condition in ("correct", "wrong", "random", "filler") if condition in found["added"]]
        for condition, (part, line) in product(shown, (("objects", "-"), ("background", ":"))):
            colour, _, marker, label = CONDITION_STYLE[condition]
            style = (colour, line, marker, f"{label}, {part}")
            curve(axis, found["layers"], found["moved"][part][condition], style, 100, band=False)
        _title(axis, found["title"].replace(" by text", ""), f"{found['n']} samples", "layer")
    axes[0].set_ylabel("distance moved (% of the value's length)")
    legend_below(figure, axes[:1], ncols=4)
    return figure


@styled
def answer_effects(answers: Mapping) -> Figure:
    """Change of POPE's rates behind each prefix, with 95 % intervals; and the share of answers that change."""
    rates = answers["minus_none"]
    figure, axes = panels(len(rates), len(rates), 3.0, 3.2, sharey=True)
    conditions = [condition for condition in CONDITION_STYLE if condition != "none"]
    for axis, (rate, found) in zip(axes, rates.items(), strict=True):
        forest(axis, _points(found, conditions), [CONDITION_STYLE[name][3] for name in conditions], factor=100)
        axis.set(title=rate, xlabel="change (percentage points)")
    return figure


@styled
def prefix_maps(scene: Mapping) -> Figure:
    """Score of one text on every token behind four prefixes, one colour scale; in brackets the IoU after Otsu.

    scene: image (base64), size (W, H), text, layer, maps {condition: grid}, prefixes, ious, order."""
    conditions, size = scene["order"], scene["size"]
    figure, axes = panels(len(conditions) + 1, len(conditions) + 1, 2.1, 2.9)
    picture(axes[0], decode_image(scene["image"]), size, textwrap.fill(f'"{scene["text"]}"', 28))
    maps = {name: np.array(scene["maps"][name]) for name in conditions}
    low, high = min(each.min() for each in maps.values()), max(each.max() for each in maps.values())
    for axis, (condition, grid) in zip(axes[1:], maps.items(), strict=True):
        prefix = scene["prefixes"][condition]
        quoted = textwrap.fill(f'"{prefix}"', 36) if prefix else ""
        title = f"{CONDITION_STYLE[condition][3]}\n{quoted}\nIoU {scene['ious'][condition]:.2f}"
        shown = picture(axis, grid, size, title, vmin=low, vmax=high, cmap="cividis")
        axis.title.set_fontsize(8)
    figure.colorbar(shown, ax=axes, shrink=0.7, label=f"dot product, layer {scene['layer']}")
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    return {
        "04_prefix_effects": prefix_effects(results["readouts"]),
        "04_added": added_by_layer(results["readouts"]),
        "04_movement": movement_by_layer(results["readouts"]),
        "04_answers": answer_effects(results["answers"]),
        "04_maps": prefix_maps(results["picture"]),
    }
