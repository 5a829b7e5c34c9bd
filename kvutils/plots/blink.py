"""Figures of notebook 05: what a readout of the values has right and the model wrong."""

import string
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots import style
from kvutils.plots.style import BEFORE, COLOURS, along_the_flow, decode_image, forest, legend_below, panels, picture, styled

ORDER = ("Art_Style", "Visual_Similarity", "Semantic_Correspondence", "Functional_Correspondence", "Visual_Correspondence")
READING_STYLE = {"value": (COLOURS[0], "-", "o", "values in the item's prompt"),  # family of sources -> colour, line, marker, label
                 "alone.value": (COLOURS[1], "--", "s", "values, each image alone"),
                 "untrained.value": (COLOURS[7], ":", "^", "values, untrained model")}
SOURCES = {**{family: each[3] for family, each in READING_STYLE.items()}, "value.0": "first value projection", **dict(reversed(BEFORE.items()))}
READOUT_LABELS = {"style": "style statistics (mean and Gram)", "mean": "mean token", "around": "3 x 3 tokens at the point"}  # the first of a subtask
CELLS = {"value_only": (COLOURS[0], "values right, model wrong"), "both": ("0.62", "both right"),  # of the 2 x 2 table -> colour, label
         "model_only": ("0.8", "model right, values wrong"), "neither": ("0.92", "both wrong")}  # fmt: skip
WAYS = {"value added": ("o", COLOURS[0]), "value decides": ("s", COLOURS[1]), "either right": ("D", "black")}


@styled
def gap(results: Mapping) -> Figure:
    """Left: who is right on the items of each subtask, with the share of "values right, model wrong" that guessing would give. Right: by how
    much accuracy changes where the values are let into the answer, with 95 % intervals."""
    subtasks, found = (style.in_order(results[key], ORDER) for key in ("subtasks", "interventions"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 1.5 + 0.75 * len(subtasks)), sharey=True, width_ratios=(1.6, 1))
    for row, each in enumerate(subtasks.values()):
        table, start = each["table"], 0.0
        for name, (colour, label) in CELLS.items():
            share = 100 * (table["shares"][name]["mean"] or 0)
            left.barh(row, share, left=start, height=0.6, color=colour, label=None if row else label)
            if share >= 6:
                left.text(start + share / 2, row, f"{share:.0f} %", ha="center", va="center", color="white" if name == "value_only" else "black")
            start += share
        guess = table["at_guess"]["mean"]
        left.plot(np.nan if guess is None else 100 * guess, row + 0.38, "^", ms=8, color=COLOURS[3], label=None if row else "by guessing")
        right.axhline(row + 0.5, color="0.8", lw=0.6)
    for place, (name, (marker, colour)) in enumerate(WAYS.items()):
        forest(right, [(row + 0.2 * (place - 1), each["changes"][name]["change"], colour, marker, None if row else name)
                       for row, each in enumerate(found.values())], factor=100)  # fmt: skip
    left.set_yticks(range(len(subtasks)), [f"{each['title']}\n{each['table']['n']} items" for each in subtasks.values()])
    beyond, added = (results["claims"][name]["primary"] for name in ("C8", "X5"))
    left.set(xlim=(0, 100), xlabel="% of items", title=f"Values right, model wrong, beyond guessing\n({beyond['name'].partition(':')[0]}): {_interval(beyond)} % of items")
    right.set(xlabel="accuracy minus the model's (points)", title=f"Values added to the option scores\n(mean): {_interval(added)} points")
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
    legend_below(figure, [left], place="left", ncols=3)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, columnspacing=0.8, handletextpad=0.2)
    return figure


def _interval(found: Mapping) -> str:
    """Of a claim's comparison, in its unit."""
    if None in (found["value"], found["low"]):
        return "not defined:"
    return f"{found['value']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"


@styled
def readout_curves(subtasks: Mapping[str, Mapping]) -> Figure:
    """Accuracy of the readout along the data flow beside the model's, with 95 % bands, and the layers that were chosen, each on one half."""
    subtasks = style.in_order(subtasks, ORDER)
    figure, axes = panels(len(subtasks), min(3, len(subtasks)), 9.2 / min(3, len(subtasks)), 4.0, sharey=True)
    for axis, found in zip(axes, subtasks.values(), strict=True):
        name, accuracy = found["readout"], found["model"]["accuracy"]
        offset = along_the_flow(axis, found["readouts"][name], READING_STYLE)
        axis.axhline(accuracy["mean"], color=COLOURS[3], lw=1.4, label="the model's answers")
        axis.axhspan(accuracy["low"], accuracy["high"], color=COLOURS[3], alpha=0.12, lw=0)
        axis.axhline(found["chance"], color="black", lw=0.9, ls=":", label="chance")
        axis.set(ylim=(0, 1.02), title=f"{found['title']}\n{READOUT_LABELS[name]}", xlabel="before  |  layer of the language model")
        for layer in set(found["table"]["layers"]):
            axis.axvline(layer + offset, color=COLOURS[0], lw=6, alpha=0.12)
    axes[0].set_ylabel("accuracy (share of items)")
    more = {"before the language model": style.BEFORE_HANDLE,
            "layer chosen on one half, read on the other": plt.Line2D([], [], color=COLOURS[0], lw=6, alpha=0.25)}  # fmt: skip
    legend_below(figure, axes, more, ncols=3)
    figure.suptitle("Above the line of its answers, the readout is right more often than the model", fontsize=10)
    return figure


@styled
def shares_by_source(subtasks: Mapping[str, Mapping]) -> Figure:
    """The share of items that a readout of each source has right and the model wrong; bars: the same by guessing."""
    subtasks = style.in_order(subtasks, ORDER)
    figure, axes = panels(len(subtasks), len(subtasks), 8.8 / len(subtasks), 3.3, sharex=True)
    for place, (axis, found) in enumerate(zip(axes, subtasks.values(), strict=True)):
        tables = {"value": found["table"]} | style.in_order(found["others"], SOURCES)
        points = []
        for row, (source, each) in enumerate(tables.items()):
            colour, _, marker, _ = READING_STYLE.get(source, ("black", "", "D", ""))
            points.append((row, each["shares"]["value_only"], colour, marker, None))
            guess = np.nan if each["at_guess"]["mean"] is None else 100 * each["at_guess"]["mean"]
            axis.plot(guess, row, "|", ms=15, mew=2.5, color=COLOURS[3], label=None if row else "by guessing, options as often as this readout")
        # In the first column in full, in the others what differs there: the layers.
        names = [", ".join([SOURCES[source]] * (place == 0) + [style.layers_text(each["layers"])] * bool(each["layers"]))
                 for source, each in tables.items()]  # fmt: skip
        forest(axis, points, names, factor=100, zero=False)
        axis.set_title(f"{found['title']}\n{found['table']['errors']} errors of the model", loc="right")  # wider than its axis: to the left
        axis.set_xlabel(f"% of {found['table']['n']} items")
    legend_below(figure, axes[:1])
    figure.suptitle("Readout right, model wrong: right of the bar, more than by guessing", fontsize=10)
    return figure


@styled
def example_items(examples: Sequence[Mapping]) -> Figure:
    """Items, one in a row: the images as the model sees them, the scores that the values of each layer give the options, and the model's.
    The right option is blue."""
    most = max(len(each["images"]) for each in examples)
    figure, axes = plt.subplots(len(examples), most + 2, figsize=(8.8, 2.7 * len(examples)), squeeze=False,
                                width_ratios=(*[1] * most, 1.7, 1.2))  # fmt: skip
    for (*pictures, values, model), example in zip(axes, examples, strict=True):
        for axis in pictures[len(example["images"]) :]:
            axis.set_axis_off()
        for axis, text, points, place in zip(pictures, example["images"], example["points"], ("first", "second", "third"), strict=False):
            image = decode_image(text)
            picture(axis, image, image.shape[1::-1], f"{place} image")
            axis.plot(*np.reshape(points, (-1, 2)).T, "o", ms=13, mfc="none", mec=COLOURS[1], mew=1.6)
        scores, gold, said = np.array(example["values"]), example["gold"], example["said"]
        letters = [f"({letter})" for letter in string.ascii_uppercase[: scores.shape[1]]]
        colours = [COLOURS[0] if option == gold else "darkgrey" for option in range(len(letters))]
        right = int((scores[1:].argmax(axis=1) == gold).sum())
        for option, (line, colour) in enumerate(zip(scores[1:].T, colours, strict=True)):
            values.plot(range(1, len(scores)), line, "o-", ms=3.5, color=colour, lw=2 if option == gold else 1.2)
            values.annotate(letters[option], (len(scores) - 1, line[-1]), (6, 0), textcoords="offset points", va="center", color=colour)
        pictures[0].set_ylabel(example["title"])
        values.locator_params(axis="x", integer=True)
        values.set(title=f"values: right in {right} of {len(scores) - 1} layers", xlabel="layer", ylabel="likeness to the reference")
        model.barh(letters, np.exp(example["model"]), color=colours)
        model.invert_yaxis()
        verdict = f"says {letters[said]}: {'right' if said == gold else 'wrong'}" if said >= 0 else "names no option"
        model.set(title=f"model {verdict}", xlabel="probability", xlim=(0, 1))
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    subtasks, examples = results["subtasks"], style.in_order(results["examples"], ORDER)
    figures = {"05_gap": gap(results), "05_readouts": readout_curves(subtasks)}
    if able := {name: each for name, each in subtasks.items() if each["table"]["errors"]}:
        figures["05_sources"] = shares_by_source(able)
    shown = {"05_method": [results["method"]] if results["method"] else [], "05_examples": [*examples.values()]}  # where there are such items
    return figures | {name: example_items(each) for name, each in shown.items() if each}
