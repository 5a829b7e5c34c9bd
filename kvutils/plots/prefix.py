"""Figures of notebook 04, in the style of `kvutils.plots.style`."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import _COLOURS, _picture, _styled, decode_image, error_bar

CONDITION_STYLE = {  # condition -> colour, line, marker, label
    "none": ("black", "-", "D", "no prefix"),
    "correct": (_COLOURS[0], "-", "o", "correct"),
    "wrong": (_COLOURS[3], "--", "v", "wrong"),
    "random": (_COLOURS[1], ":", "s", "random words"),
    "reversed": (_COLOURS[2], "-.", "^", "correct, reversed"),
    "unrelated": (_COLOURS[4], "--", "P", "unrelated words"),
    "filler": (_COLOURS[7], ":", "X", "filler (token count only)"),
}
READOUT_ORDER = ("referring_by_class_name", "referring_by_expression", "domain_by_text", "domain_by_probe")


def _in_order(readouts: Mapping[str, Mapping]) -> dict[str, Mapping]:
    return {name: readouts[name] for name in READOUT_ORDER if name in readouts}


@_styled
def prefix_effects(readouts: Mapping[str, Mapping]) -> Figure:
    """Correct prefix minus every other condition at the best layer, in points of mIoU with 95 % intervals."""
    readouts = _in_order(readouts)
    figure, axes = plt.subplots(1, len(readouts), figsize=(3.1 * len(readouts), 3.4), sharey=True, squeeze=False)
    others = [condition for condition in CONDITION_STYLE if condition != "correct"]
    for axis, found in zip(axes[0], readouts.values(), strict=True):
        for row, condition in enumerate(others):
            colour, _, marker, _ = CONDITION_STYLE[condition]
            value = found["best"]["correct_minus"][condition]
            axis.errorbar(100 * value["mean"], row, xerr=error_bar(value, 100), fmt=marker, color=colour, ms=5, capsize=3)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=f"{found['title']}\nlayer {found['best_layer']}, {found['held_out']} samples", xlabel="mIoU points")
        axis.title.set_fontsize(8.5)
    axes[0][0].set_yticks(range(len(others)), [f"correct minus {CONDITION_STYLE[c][3]}" for c in others])
    axes[0][0].invert_yaxis()
    return figure


@_styled
def added_by_layer(readouts: Mapping[str, Mapping]) -> Figure:
    """What each prefix adds to the score without prefix, layer by layer, with 95 % bands."""
    readouts = _in_order(readouts)
    figure, axes = plt.subplots(1, len(readouts), figsize=(3.3 * len(readouts), 3.3), squeeze=False)
    for axis, found in zip(axes[0], readouts.values(), strict=True):
        for condition, (colour, line, marker, label) in CONDITION_STYLE.items():
            if condition == "none":
                continue
            each = found["added"][condition]
            axis.plot(found["layers"], [100 * e["mean"] for e in each], line, color=colour, marker=marker, ms=3.5, label=label)
            if condition == "correct":  # bands of all six would hide each other; the results file has them
                low, high = ([100 * e[end] for e in each] for end in ("low", "high"))
                axis.fill_between(found["layers"], low, high, color=colour, alpha=0.18, lw=0)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=f"{found['title']}\n{found['n']} samples", xlabel="layer")
        axis.title.set_fontsize(8.5)
    axes[0][0].set_ylabel("mIoU minus that without prefix (points)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


@_styled
def movement_by_layer(readouts: Mapping[str, Mapping]) -> Figure:
    """How far values move with each prefix, on objects and on background, layer by layer."""
    readouts = {name: each for name, each in _in_order(readouts).items() if name != "domain_by_text"}  # as in domain_by_probe
    figure, axes = plt.subplots(1, len(readouts), figsize=(3.6 * len(readouts), 3.4), sharey=True, squeeze=False)
    for axis, found in zip(axes[0], readouts.values(), strict=True):
        for condition in ("correct", "wrong", "random", "filler"):
            colour, _, marker, label = CONDITION_STYLE[condition]
            for part, line in (("objects", "-"), ("background", ":")):
                means = [np.nan if each["mean"] is None else 100 * each["mean"] for each in found["moved"][part][condition]]
                axis.plot(found["layers"], means, line, color=colour, marker=marker, ms=3.5, label=f"{label}, {part}")
        axis.set(title=f"{found['title'].replace(' by probe', '')}\n{found['n']} samples", xlabel="layer")
        axis.title.set_fontsize(8.5)
    axes[0][0].set_ylabel("distance moved (% of the value's length)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


@_styled
def answer_effects(answers: Mapping) -> Figure:
    """Change of POPE's rates behind each prefix, with 95 % intervals; and the share of answers that change."""
    rates = list(answers["minus_none"])
    figure, axes = plt.subplots(1, len(rates), figsize=(3.0 * len(rates), 3.2), sharey=True, squeeze=False)
    conditions = [condition for condition in CONDITION_STYLE if condition != "none"]
    for axis, rate in zip(axes[0], rates, strict=True):
        for row, condition in enumerate(conditions):
            colour, _, marker, _ = CONDITION_STYLE[condition]
            value = answers["minus_none"][rate][condition]
            axis.errorbar(100 * value["mean"], row, xerr=error_bar(value, 100), fmt=marker, color=colour, ms=5, capsize=3)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=rate, xlabel="change (percentage points)")
    axes[0][0].set_yticks(range(len(conditions)), [CONDITION_STYLE[c][3] for c in conditions])
    axes[0][0].invert_yaxis()
    return figure


@_styled
def prefix_maps(picture: Mapping) -> Figure:
    """Score of one text on every token behind four prefixes, one colour scale; in brackets the IoU after Otsu.

    picture: image (base64), size (W, H), text, layer, maps {condition: grid}, prefixes, ious."""
    conditions = list(picture["order"])
    figure, axes = plt.subplots(1, len(conditions) + 1, figsize=(2.1 * (len(conditions) + 1), 2.9))
    size = picture["size"]
    _picture(axes[0], decode_image(picture["image"]), size, textwrap.fill(f'"{picture["text"]}"', 28))
    low, high = (edge([np.min(m) if edge is min else np.max(m) for m in picture["maps"].values()]) for edge in (min, max))
    for axis, condition in zip(axes[1:], conditions, strict=True):
        prefix = picture["prefixes"][condition]
        quoted = textwrap.fill(f'"{prefix}"', 36) if prefix else ""
        title = f"{CONDITION_STYLE[condition][3]}\n{quoted}\nIoU {picture['ious'][condition]:.2f}"
        shown = _picture(axis, np.array(picture["maps"][condition]), size, title, vmin=low, vmax=high, cmap="cividis")
        axis.title.set_fontsize(8)
    figure.colorbar(shown, ax=axes, shrink=0.7, label=f"dot product, layer {picture['layer']}")
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    return {
        "04_prefix_effects": prefix_effects(results["readouts"]),
        "04_added": added_by_layer(results["readouts"]),
        "04_movement": movement_by_layer(results["readouts"]),
        "04_answers": answer_effects(results["answers"]),
        "04_maps": prefix_maps(results["picture"]),
    }
