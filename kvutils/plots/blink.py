"""Figures of notebook 05: what a readout of the values has right and the model wrong."""

import string
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots import style
from kvutils.plots.style import BEFORE, COLOURS, along_the_flow, decode_image, forest, legend_below, panels, picture, styled

ORDER = ("Art_Style", "Visual_Similarity", "Semantic_Correspondence", "Functional_Correspondence", "Visual_Correspondence")
READING_STYLE = {  # family of sources -> colour, line, marker, label
    "value": (COLOURS[0], "-", "o", "values in the item's prompt"),
    "alone.value": (COLOURS[1], "--", "s", "values, each image alone"),
    "untrained.value": (COLOURS[7], ":", "^", "values, untrained model"),
}
SOURCES = {**{family: each[3] for family, each in READING_STYLE.items()}, "value.0": "first value projection", **dict(reversed(BEFORE.items()))}
READOUT_LABELS = {
    "style": "style statistics (mean and Gram)", "mean": "mean token", "point": "token at the point",
    "around": "3 x 3 tokens at the point",
}  # fmt: skip
INTERVENTION_STYLE = {  # -> colour, marker, label
    "value decides": (COLOURS[1], "s", "value decides"),
    "value added": (COLOURS[0], "o", "value added"),
    "learned gate": (COLOURS[2], "^", "learned gate"),
    "option scores alone": ("grey", "x", "option scores alone (no values)"),
    "either right": ("black", "D", "either right (upper bound)"),
}


@styled
def readout_curves(subtasks: Mapping[str, Mapping]) -> Figure:
    """Accuracy of the readouts along the data flow beside the model's, with 95 % bands; a column per subtask, a row per
    readout (the first row has the readout that the claims are about, and the layers that were chosen, each on one half)."""
    subtasks = style.in_order(subtasks, ORDER)
    rows = max(len(each["readouts"]) for each in subtasks.values())
    figure, axes = plt.subplots(rows, len(subtasks), figsize=(4.4 * len(subtasks), 3.1 * rows + 0.5), squeeze=False, sharey="col")
    for column, found in zip(axes.T, subtasks.values(), strict=True):
        names = [found["readout"], *(name for name in found["readouts"] if name != found["readout"])]
        for axis, name in zip(column, names, strict=False):
            offset = along_the_flow(axis, found["readouts"][name], READING_STYLE)
            accuracy = found["model"]["accuracy"]
            axis.axhline(accuracy["mean"], color=COLOURS[3], lw=1.4, label="the model's answers")
            axis.axhspan(accuracy["low"], accuracy["high"], color=COLOURS[3], alpha=0.12, lw=0)
            axis.axhline(found["chance"], color="black", lw=0.9, ls=":", label="chance")
            also = "" if name == names[0] else "also measured: "
            axis.set(ylim=(0, 1.02), title=f"{found['title']} ({found['n']} items)\n{also}{READOUT_LABELS[name]}")
        column[-1].set_xlabel("before the language model  |  layer")
        for layer in set(found["table"]["layers"]):
            column[0].axvline(layer + offset, color=COLOURS[0], lw=6, alpha=0.12)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (share of items)")
    more = {"before the language model": style.BEFORE_HANDLE,
            "layer chosen on one half of the items, read on the other": plt.Line2D([], [], color=COLOURS[0], lw=6, alpha=0.25)}  # fmt: skip
    legend_below(figure, axes.flat, more, ncols=3)
    return figure


@styled
def tables_of_two(subtasks: Mapping[str, Mapping]) -> Figure:
    """Value right or wrong by model right or wrong, over all items, each read at the layer that the other half has chosen."""
    subtasks = style.in_order(subtasks, ORDER)
    figure, axes = panels(len(subtasks), len(subtasks), 4.2, 4.0)
    for axis, found in zip(axes, subtasks.values(), strict=True):
        table = found["table"]
        cells = np.array((("both", "value_only"), ("model_only", "neither")))
        shares = np.array([[table["shares"][name]["mean"] for name in row] for row in cells], dtype=float)  # NaN: undefined
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.3)
        for (y, x), name in np.ndenumerate(cells):
            text = f"{table['counts'][name]}\n" + "\n".join(_percent(table["shares"][name]))
            weight, colour = "bold" if name == "value_only" else "normal", "white" if shares[y, x] > 0.75 else "black"
            axis.text(x, y, text, ha="center", va="center", fontsize=10, weight=weight, color=colour)
        axis.set_xticks((0, 1), ("model right", "model wrong"))
        axis.set_yticks((0, 1), ("value\nright", "value\nwrong"))
        axis.grid(False)
        chance = f"by guessing: {_percent(table['at_guess'])[0]} of these items"
        unread = f"; {table['unresolved']} more unresolved" if table["unresolved"] else ""
        axis.set_title(f"{found['title']}, values of {style.layers_text(table['layers'])}\n{table['n']} items{unread}")
        axis.set_xlabel(f"value right, model wrong:\n{_of_errors(table['of_errors'])}\n{chance}")
    figure.supxlabel("in the cells: number of items, share of them [95 % interval]", fontsize=8)
    return figure


def _percent(found: Mapping) -> tuple[str, str]:
    """(value, interval)."""
    if None in found.values():
        return "not defined", ""
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} %", f"[{low:.1f}, {high:.1f}]"


def _of_errors(found: Mapping) -> str:
    if found["mean"] is None:
        return "the model makes no error that can be read"
    interval = "" if found["low"] is None else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    return f"of the model's {found['n']} errors {100 * found['mean']:.0f} %{interval}"


@styled
def shares_by_source(subtasks: Mapping[str, Mapping]) -> Figure:
    """The share of items that a readout of each source has right and the model wrong; bars: the same by guessing."""
    subtasks = style.in_order(subtasks, ORDER)
    figure, axes = panels(len(subtasks), len(subtasks), 3.3 + 2.6 / len(subtasks), 3.5, sharex=True)
    for place, (axis, found) in enumerate(zip(axes, subtasks.values(), strict=True)):
        tables = {"value": found["table"]} | style.in_order(found["others"], SOURCES)
        points = []
        for row, (source, each) in enumerate(tables.items()):
            colour, _, marker, _ = READING_STYLE.get(source, ("black", "", "D", ""))
            points.append((row, each["shares"]["value_only"], colour, marker, None))
            label = None if row else "by guessing, options as often as this readout"
            guess = np.nan if each["at_guess"]["mean"] is None else each["at_guess"]["mean"]
            axis.plot(guess, row, "|", ms=16, mew=2, color=COLOURS[3], label=label)
        forest(axis, points, [_label(source, each["layers"], place == 0) for source, each in tables.items()], zero=False)
        axis.set(title=f"{found['title']}\n{found['table']['n']} items", xlabel="share of these items")
    legend_below(figure, axes[:1])
    figure.suptitle("Readout right, model wrong, with 95 % intervals (layers chosen on one half, read on the other)", fontsize=10)
    return figure


def _label(source: str, layers: Sequence[int], first: bool) -> str:
    """In the first column in full, in the others what differs there: the layers."""
    return ", ".join([SOURCES[source]] * first + [style.layers_text(layers)] * bool(layers))


@styled
def intervention_effects(found: Mapping[str, Mapping]) -> Figure:
    """What each way to surface the readout changes, and what it costs, each item by what was fitted on the other half."""
    rows = [(task, name) for task in style.in_order(found, ORDER) for name in INTERVENTION_STYLE if name in found[task]["changes"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.36 * len(rows) + 1.5), sharey=True, width_ratios=(1.5, 1))
    firsts = [row for row, (task, _) in enumerate(rows) if row == 0 or rows[row - 1][0] != task]
    labels = [INTERVENTION_STYLE[name][2] for _, name in rows]
    for row in firsts:
        about = found[rows[row][0]]
        labels[row] = f"{about['title']} (n = {about['n']}):  {labels[row]}"
    for axis, part in ((left, "change"), (right, "cost")):
        forest(axis, [(row, found[task]["changes"][name][part], *INTERVENTION_STYLE[name][:2], None) for row, (task, name) in enumerate(rows)],
               labels, zero=axis is left)  # fmt: skip
        for row in firsts[1:]:
            axis.axhline(row - 0.5, color="grey", lw=0.5)
        axis.grid(axis="y", visible=False)
    left.set(xlabel="change of accuracy against the model's answers", title="what it brings")
    right.set(xlabel="now wrong, as a share of the items\nthat the model had right", title="what it costs")
    return figure


@styled
def example_item(example: Mapping) -> Figure:
    """One item: its images as the model sees them, and the scores that values and model give each option."""
    images, letters = example["images"], [f"({letter})" for letter in string.ascii_uppercase[: len(example["value"])]]
    widths = (*[1] * len(images), 1.25, 1.25)
    figure, axes = plt.subplots(1, len(widths), figsize=(2.1 * len(images) + 6.2, 2.9), width_ratios=widths)
    for axis, text, points, name in zip(axes, images, example["points"], ("first image", "second image", "third image"), strict=False):
        image = decode_image(text)
        picture(axis, image, image.shape[1::-1], name)
        axis.plot(*np.reshape(points, (-1, 2)).T, "o", ms=15, mfc="none", mec=COLOURS[1], mew=1.6)
    scored = (("value", int(np.argmax(example["value"])), f"values, layer {example['layer']}", "cosine similarity to the reference"),
              ("model", example["said"], "the model", "log-probability of the option (nats)"))  # fmt: skip
    for axis, (key, chosen, title, label) in zip(axes[len(images) :], scored, strict=True):
        for place, score in enumerate(example[key]):
            axis.plot(score, place, "o", ms=10, color=COLOURS[0] if place == chosen else "darkgrey")
        axis.margins(0.2)
        axis.set_yticks(range(len(letters)), [f"{name} right" if place == example["gold"] else name for place, name in enumerate(letters)])
        axis.invert_yaxis()
        verdict = "unresolved" if chosen < 0 else "right" if chosen == example["gold"] else "wrong"
        axis.set(title=f"{title}: {verdict}", xlabel=label)
        axis.tick_params(axis="x", labelsize=7)
        axis.locator_params(axis="x", nbins=4)
    prompt = textwrap.fill(textwrap.shorten(example["prompt"], 390, placeholder=" ..."), 130)
    figure.suptitle(f"{prompt}\nblue: the option that values and model answer", fontsize=9)
    return figure


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
