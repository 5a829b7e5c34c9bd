"""Figures of notebook 05, in the style of `kvutils.plots.style`."""

import re
import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.datasets.blink import DISCLAIMER
from kvutils.images import encode_image
from kvutils.metrics.answers import LETTERS
from kvutils.plots.style import _COLOURS, BEFORE, _picture, _styled, decode_image, error_bar, flow_axis, layer_count, layer_ticks

ORDER = ("Art_Style", "Visual_Similarity", "Semantic_Correspondence", "Functional_Correspondence", "Visual_Correspondence")
FAMILIES = {  # family of sources -> colour, line, marker, label
    "value": (_COLOURS[0], "-", "o", "values in the item's prompt"),
    "alone.value": (_COLOURS[1], "--", "s", "values, each image alone"),
    "untrained.value": (_COLOURS[7], ":", "^", "values, untrained model"),
}
READOUT_LABELS = {
    "style": "style statistics (mean and Gram)", "mean": "mean token", "point": "token at the point",
    "around": "3 x 3 tokens at the point",
}  # fmt: skip
INTERVENTION_STYLE = {  # -> colour, marker
    "value decides": (_COLOURS[1], "s"),
    "value added": (_COLOURS[0], "o"),
    "learned gate": (_COLOURS[2], "^"),
    "option scores alone": ("grey", "x"),
    "either right": ("black", "D"),
}
_LONGER = {"either right": "either right (upper bound)", "option scores alone": "option scores alone (no values)"}


def in_order(subtasks: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """As BLINK's subtasks are always listed here (results files sort their keys)."""
    return {name: subtasks[name] for name in ORDER if name in subtasks}


def _source_label(source: str) -> str:
    family, _, layer = source.rpartition(".")
    return f"{FAMILIES[family][3]}, layer {layer}" if family in FAMILIES else BEFORE[source]


@_styled
def readout_curves(subtasks: Mapping[str, Mapping]) -> Figure:
    """Accuracy of the readouts along the data flow beside the model's, with 95 % bands; a column per subtask, a row per
    readout (the first row has the readout that the claims are about).
    """
    subtasks = in_order(subtasks)
    rows = max(len(each["readouts"]) for each in subtasks.values())
    figure, axes = plt.subplots(rows, len(subtasks), figsize=(4.4 * len(subtasks), 3.1 * rows + 0.5), squeeze=False, sharey="col")
    for column, found in zip(axes.T, subtasks.values(), strict=True):
        names = [found["chosen"]["readout"], *(name for name in found["readouts"] if name != found["chosen"]["readout"])]
        for axis, name in zip(column, names, strict=False):
            _curves(axis, found, found["readouts"][name])
            also = "" if name == names[0] else "also measured: "
            axis.set_title(f"{found['title']} ({found['n']} items)\n{also}{READOUT_LABELS[name]}")
        column[-1].set_xlabel("before the language model  |  layer")
        chosen = int(found["chosen"]["source"].rsplit(".", 1)[1])
        offset = flow_axis(layer_count(found["readouts"][names[0]]))[-1]
        column[0].axvline(chosen + offset, color=_COLOURS[0], lw=6, alpha=0.12)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (share of items)")
    handles = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    handles["layer chosen on one half of the items"] = plt.Line2D([], [], color=_COLOURS[0], lw=6, alpha=0.25)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def _curves(axis, found: Mapping, sources: Mapping[str, Mapping]) -> None:
    before, between, offset = flow_axis(layer_count(sources))
    ticks = {}
    for family, (colour, line, marker, label) in FAMILIES.items():
        layers = sorted(int(match[1]) for name in sources if (match := re.fullmatch(re.escape(family) + r"\.(\d+)", name)))
        each = [sources[f"{family}.{layer}"] for layer in layers]
        x = np.array(layers) + offset
        if layers:
            axis.plot(x, [e["mean"] for e in each], line, color=colour, marker=marker, ms=3.5, label=label)
            axis.fill_between(x, [e["low"] for e in each], [e["high"] for e in each], color=colour, alpha=0.15, lw=0)
        ticks |= {layer + offset: str(layer) for layer in layer_ticks(layers)}
    for x, (source, label) in zip(before, BEFORE.items(), strict=True):
        if source in sources:
            axis.errorbar(x, sources[source]["mean"], yerr=error_bar(sources[source]), fmt="D", ms=4, color="black", capsize=2,
                          label="before the language model")  # fmt: skip
            ticks[x] = label
    model = found["model"]["accuracy"]
    axis.axhline(model["mean"], color=_COLOURS[3], lw=1.4, label="the model's answers")
    axis.axhspan(model["low"], model["high"], color=_COLOURS[3], alpha=0.12, lw=0)
    axis.axhline(found["chance"], color="black", lw=0.9, ls=":", label="chance")
    axis.axvline(between, color="grey", lw=0.5)
    axis.set_xticks(sorted(ticks), [ticks[x] for x in sorted(ticks)])
    for label in axis.get_xticklabels():
        if not label.get_text().isdigit():
            label.set(rotation=40, ha="right")
    axis.set_ylim(0, 1.02)


@_styled
def tables_of_two(subtasks: Mapping[str, Mapping]) -> Figure:
    """Value right or wrong by model right or wrong, on the items that did not choose the layer."""
    subtasks = in_order(subtasks)
    figure, axes = plt.subplots(1, len(subtasks), figsize=(4.2 * len(subtasks), 4.0), squeeze=False)
    for axis, found in zip(axes.flat, subtasks.values(), strict=True):
        held_out = found["held_out"]
        cells = (("both", "value_only"), ("model_only", "neither"))
        shares = np.array([[held_out["shares"][name]["mean"] for name in row] for row in cells])
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.3)
        for y, row in enumerate(cells):
            for x, name in enumerate(row):
                share = held_out["shares"][name]
                mean, low, high = (100 * share[key] for key in ("mean", "low", "high"))
                text = f"{held_out['counts'][name]}\n{mean:.1f} %\n[{low:.1f}, {high:.1f}]"
                weight, colour = "bold" if name == "value_only" else "normal", "white" if shares[y, x] > 0.75 else "black"
                axis.text(x, y, text, ha="center", va="center", fontsize=10, weight=weight, color=colour)
        axis.set_xticks((0, 1), ("model right", "model wrong"))
        axis.set_yticks((0, 1), ("value\nright", "value\nwrong"))
        axis.grid(False)
        layer, errors = found["chosen"]["source"].rsplit(".", 1)[1], held_out["of_errors"]
        share = "the model makes no error" if errors["mean"] is None else (
            f"of the model's {errors['n']} errors {100 * errors['mean']:.0f} %"
            + ("" if errors["low"] is None else f" [{100 * errors['low']:.0f}, {100 * errors['high']:.0f}]"))  # fmt: skip
        chance = f"by guessing: {100 * held_out['at_guess']['mean']:.1f} % of all items"
        axis.set_title(f"{found['title']}, values of layer {layer}\n{held_out['n']} items that did not choose the layer")
        axis.set_xlabel(f"value right, model wrong:\n{share}\n{chance}")
    figure.supxlabel("in the cells: number of items, share of all items [95 % interval]", fontsize=8)
    return figure


@_styled
def shares_by_source(subtasks: Mapping[str, Mapping]) -> Figure:
    """The share of items that a readout of each source has right and the model wrong; bars: the same by guessing."""
    subtasks = in_order(subtasks)
    figure, axes = plt.subplots(1, len(subtasks), figsize=(3.3 * len(subtasks) + 2.6, 3.5), squeeze=False, sharex=True)
    for place, (axis, found) in enumerate(zip(axes.flat, subtasks.values(), strict=True)):
        held_out = found["held_out"]
        tables = {found["chosen"]["source"]: held_out}
        tables |= dict(sorted(held_out["others"].items(), key=lambda pair: (pair[0] in BEFORE, list(BEFORE)[::-1].index(pair[0])
                                                                             if pair[0] in BEFORE else pair[0])))  # fmt: skip
        for row, (source, each) in enumerate(tables.items()):
            family = source.rpartition(".")[0]
            colour, _, marker, _ = FAMILIES.get(family, ("black", "", "D", ""))
            share = each["shares"]["value_only"]
            axis.errorbar(share["mean"], row, xerr=error_bar(share), fmt=marker, color=colour, ms=5, capsize=3)
            axis.plot(each["at_guess"]["mean"], row, "|", ms=16, mew=2, color=_COLOURS[3],
                      label=None if row else "by guessing, options as often as this readout")  # fmt: skip
        labels = [_source_label(source) for source in tables]
        labels = labels if place == 0 else [label.rpartition(", ")[2] if ", " in label else "" for label in labels]
        axis.set_yticks(range(len(tables)), labels)
        axis.invert_yaxis()
        axis.set(title=f"{found['title']}\n{held_out['n']} items", xlabel="share of all items")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center")
    figure.suptitle("Readout right, model wrong, with 95 % intervals (layers chosen on the other half of the items)", fontsize=10)
    return figure


@_styled
def intervention_effects(found: Mapping[str, Mapping]) -> Figure:
    """What each way to surface the readout changes, and what it costs, on the items that fitted nothing."""
    found = in_order(found)
    rows = [(subtask, name) for subtask in found for name in INTERVENTION_STYLE if name in found[subtask]["changes"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.36 * len(rows) + 1.5), sharey=True, width_ratios=(1.5, 1))
    labels = []
    for row, (subtask, name) in enumerate(rows):
        each = found[subtask]["changes"][name]
        colour, marker = INTERVENTION_STYLE[name]
        left.errorbar(each["change"]["mean"], row, xerr=error_bar(each["change"]), fmt=marker, color=colour, ms=5, capsize=3)
        cost = each["cost"]
        if cost["mean"] is not None and cost["low"] is not None:
            right.errorbar(cost["mean"], row, xerr=error_bar(cost), fmt=marker, color=colour, ms=5, capsize=3)
        first = row == 0 or rows[row - 1][0] != subtask
        about = f"{found[subtask]['title']} (n = {found[subtask]['n']}):  " if first else ""
        labels.append(about + _LONGER.get(name, name))
        if first and row:
            for axis in (left, right):
                axis.axhline(row - 0.5, color="grey", lw=0.5)
    left.axvline(0, color="black", lw=0.8)
    left.set_yticks(range(len(rows)), labels)
    left.invert_yaxis()
    left.set(xlabel="change of accuracy against the model's answers", title="what it brings")
    right.set(xlabel="now wrong, as a share of the items\nthat the model had right", title="what it costs")
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
    return figure


@_styled
def example_item(example: Mapping) -> Figure:
    """One item: its images as the model sees them, and the scores that values and model give each option."""
    images = example["images"]
    widths = (*[1] * len(images), 1.25, 1.25)
    figure, axes = plt.subplots(1, len(widths), figsize=(2.1 * len(images) + 6.2, 2.9), width_ratios=widths)
    for place, (axis, text) in enumerate(zip(axes, images, strict=False)):
        picture = decode_image(text)
        _picture(axis, picture, picture.shape[1::-1], ("first image", "second image", "third image")[place])
        points = example["points"][place]
        if points:
            x, y = np.array(points).T
            axis.plot(x, y, "o", ms=15, mfc="none", mec=_COLOURS[1], mew=1.6)
    names = [f"({letter})" for letter in LETTERS[: len(example["value"])]]
    chosen = {"value": int(np.argmax(example["value"])), "model": example["said"]}
    panels = (("value", f"values, layer {example['layer']}", "cosine similarity to the reference"),
              ("model", "the model", "log-probability of the option (nats)"))  # fmt: skip
    for axis, (key, title, label) in zip(axes[len(images) :], panels, strict=True):
        scores = np.array(example[key])
        for place, score in enumerate(scores):
            axis.plot(score, place, "o", ms=10, color=_COLOURS[0] if place == chosen[key] else "darkgrey")
        axis.margins(0.2)
        right = [f"{name} right" if place == example["gold"] else name for place, name in enumerate(names)]
        axis.set_yticks(range(len(scores)), right)
        axis.invert_yaxis()
        verdict = "unresolved" if chosen[key] < 0 else "right" if chosen[key] == example["gold"] else "wrong"
        axis.set_title(f"{title}: {verdict}")
        axis.set_xlabel(label)
        axis.tick_params(axis="x", labelsize=7)
        axis.locator_params(axis="x", nbins=4)
    prompt = textwrap.fill(textwrap.shorten(example["prompt"], 390, placeholder=" ..."), 130)
    figure.suptitle(f"{prompt}\nblue: the option that values and model answer", fontsize=9)
    return figure


def describe_example(item, table, source: str) -> dict:
    """What `example_item` draws, for the results file. item: a `MultipleChoice`; table: the `ChoiceTable` with it."""
    row = table.ids.index(item.id)
    points = [[] for _ in item.images]
    if item.reference_point is not None:
        points[0], points[1] = [list(map(float, item.reference_point))], np.asarray(item.candidate_points, dtype=float).tolist()
    scale = [min(1.0, 320 / max(image.size)) for image in item.images]  # as `encode_image` shrinks them
    return {
        "id": item.id,
        "prompt": item.prompt.removeprefix(DISCLAIMER),  # which is the same for all items
        "images": [encode_image(image) for image in item.images],
        "points": [(np.array(each) * factor).tolist() if each else [] for each, factor in zip(points, scale, strict=True)],
        "layer": int(source.rsplit(".", 1)[1]),
        "value": table.of(source)[row].tolist(),
        "model": table.option_scores[row].tolist(),
        "gold": int(table.gold[row]),
        "said": int(table.said[row]),
    }


def draw(results: Mapping) -> dict[str, Figure]:
    figures = {
        "05_readouts": readout_curves(results["subtasks"]),
        "05_two_by_two": tables_of_two(results["subtasks"]),
        "05_sources": shares_by_source(results["subtasks"]),
        "05_interventions": intervention_effects(results["interventions"]),
    }
    if results["method"]:  # None where no item has points
        figures["05_method"] = example_item(results["method"])
    return figures | {f"05_example_{name.lower()}": example_item(each) for name, each in results["examples"].items()}
