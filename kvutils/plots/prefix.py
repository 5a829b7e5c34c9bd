"""Figures of notebook 04: what words before the image change in its values, and in the answers."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import COLOURS, curve, decode_image, forest, in_order, legend_below, panels, picture, styled

CONDITION_STYLE = {"none": ("black", "-", "D", "no prefix"),  # condition -> colour, line, marker, label
                   "correct": (COLOURS[0], "-", "o", "correct"),
                   "wrong": (COLOURS[3], "--", "v", "wrong"),
                   "random": (COLOURS[1], ":", "s", "random words"),
                   "reversed": (COLOURS[2], "-.", "^", "correct, reversed"),
                   "unrelated": (COLOURS[4], "--", "P", "unrelated words"),
                   "filler": (COLOURS[7], ":", "X", "filler (token count only)")}
JUDGED = ("referring_by_class_name", "domain_by_text")  # the readouts that claims are about
ABOUT = {"referring_by_class_name": "referring expressions", "domain_by_text": "scenes by domain"}
NAMED = "accuracy on the object named"


def _told(found: Mapping, smallest: float) -> tuple[str, str]:
    """A difference in words and points with one digit, and its colour: blue where the interval is above 0, orange below, grey else."""
    if None in (found["mean"], found["low"]):
        return "not defined", "grey"
    mean, low, high = (round(100 * found[key], 3) + 0.0 for key in ("mean", "low", "high"))
    words = "better" if low > 0 else "worse" if high < 0 else "no effect" if -smallest < low and high < smallest else "open"
    colour = {"better": COLOURS[0], "worse": COLOURS[3]}.get(words, "grey")
    words += ", too small to matter" if colour != "grey" and -smallest < low and high < smallest else ""
    return f"{words}:\n{round(mean, 1) + 0.0:+.1f} [{low:+.1f}, {high:+.1f}]", colour


@styled
def prefix_effects(readouts: Mapping[str, Mapping], answers: Mapping) -> Figure:
    """Correct prefix minus every other condition: what values hold, at the best layers, and what is answered about the object named, with
    95 % intervals. Grey band: differences smaller than the smallest effect of interest."""
    readouts = in_order(readouts, JUDGED)
    columns = [(f"values on {ABOUT[name]}", found["best"]["correct_minus"], "mIoU points", f"{found['n']} samples", found["smallest"])
               for name, found in readouts.items()]
    columns.append(("answers about the object", answers["correct_minus"][NAMED], "points of accuracy", f"{answers['images']} images", 0))
    figure, axes = panels(len(columns), len(columns), 8.6 / len(columns), 3.2, sharey=True)
    others = [condition for condition in CONDITION_STYLE if condition != "correct"]
    for axis, (title, found, unit, n, smallest) in zip(axes, columns, strict=True):
        axis.axvspan(-smallest, smallest, color="0.9", lw=0)
        forest(axis, [(row, found[c], _told(found[c], smallest)[1], "o", None) for row, c in enumerate(others)],
               [f"minus {CONDITION_STYLE[c][3]}" for c in others], factor=100)  # fmt: skip
        axis.set(title=f"{title}\n{_told(found['none'], smallest)[0]}", xlabel=f"{unit} ({n})")
    head = "A true word before the image: blue, surely better than the control; orange, surely worse;\ngrey band: too small to matter (titles: against no prefix)"
    figure.suptitle(head, fontsize=10)
    return figure


@styled
def by_layer(readouts: Mapping[str, Mapping]) -> Figure:
    """Layer by layer: what prefixes add to the score without one, with the 95 % band of the correct prefix, and how far they move values."""
    readouts = in_order(readouts, JUDGED)
    figure, axes = plt.subplots(2, len(readouts), figsize=(8.4, 5.2), squeeze=False, sharex="col", sharey="row")
    for (above, below), (name, found) in zip(axes.T, readouts.items(), strict=True):
        for condition in ("correct", "wrong", "random", "filler"):
            style = CONDITION_STYLE[condition]
            curve(above, found["layers"], found["added"][condition], style, 100, band=condition == "correct")
            curve(below, found["layers"], found["moved"]["objects"][condition], style, 100, band=False)
        above.axhline(0, color="black", lw=0.8)
        far = [found["moved"]["objects"][c][-1]["mean"] for c in ("correct", "random")]
        far = "" if None in far else " by {:.0%} (random words: {:.0%})".format(*far)
        above.set_title(f"{ABOUT[name].capitalize()} ({found['n']} samples)")
        below.set_title(f"Values of objects move{far}")
        below.set_xlabel("layer")
    axes[0, 0].set_ylabel("mIoU minus that\nwithout prefix (points)")
    axes[1, 0].set_ylabel("distance moved\n(% of the value's length)")
    legend_below(figure, axes[:1, 0], ncols=4)
    return figure


@styled
def prefix_maps(scene: Mapping) -> Figure:
    """Score of one text on every token behind four prefixes, one colour scale; in brackets the IoU after Otsu. scene: image (base64), size
    (W, H), text, layer, n, maps {condition: grid}, prefixes, ious, order."""
    conditions, size = scene["order"], scene["size"]
    figure, axes = panels(len(conditions) + 1, len(conditions) + 1, 1.75, 2.5)
    picture(axes[0], decode_image(scene["image"]), size, "the image")
    maps = {name: np.array(scene["maps"][name]) for name in conditions}
    low, high = min(each.min() for each in maps.values()), max(each.max() for each in maps.values())
    for axis, (condition, grid) in zip(axes[1:], maps.items(), strict=True):
        prefix = scene["prefixes"][condition]
        quoted = textwrap.fill(f'"{prefix}"', 20) if prefix else ""
        shown = picture(axis, grid, size, f"{CONDITION_STYLE[condition][3]}\nIoU {scene['ious'][condition]:.2f}", vmin=low, vmax=high, cmap="cividis")
        axis.set_xlabel(quoted)
    figure.colorbar(shown, ax=axes, shrink=0.6, label=f"dot product, layer {scene['layer']}")
    figure.suptitle(f'Where is "{scene["text"]}"? The sample of {scene["n"]} that the four prefixes together find best', fontsize=10)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    return {"04_prefix_effects": prefix_effects(results["readouts"], results["answers"]), "04_layers": by_layer(results["readouts"]),
            "04_maps": prefix_maps(results["picture"])}
