"""The figure of several models: C1 and C2 in each of them, and what the language model adds beside what the model can do (X1, C3)."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from kvutils.plots.style import COLOURS, forest, legend_below, panels, styled

TITLES = {"C1": "C1: best value layer\nminus its control", "C2a": "C2a: best layer between\nminus layer 1",
          "C2b": "C2b: best layer between\nminus the last"}  # fmt: skip
ABILITY = "C3: what the language model\nadds, and ability"
MARKERS, BEFORE = "osD^v", "-read"  # behind the name of a model: as it was before the last stage of its training


@styled
def beside_each_other(found: Mapping[str, Mapping]) -> Figure:
    """A row per model, the seeds of a family one below the other; its points and those of its family have one colour and marker. In the
    last panel a line leads from what a model was before its last stage, a hollow marker, to what it is.

    found: model -> {"family", of `TITLES` {mean, low, high} in points where it was measured, "adds": (points, accuracy in %) or None}."""
    names = dict.fromkeys(each["family"] for each in found.values())
    families = dict(zip(names, zip(COLOURS, MARKERS, strict=False), strict=False))
    figure, axes = panels(len(TITLES) + 1, len(TITLES) + 1, 2.6, 2.1 + 0.3 * len(found))
    for axis, (claim, title) in zip(axes, TITLES.items(), strict=False):
        points = [(row, each[claim], *families[each["family"]], None) for row, each in enumerate(found.values()) if claim in each]
        forest(axis, points, list(found) if axis is axes[0] else [""] * len(found))
        axis.set(title=title, xlabel="points, mean over tasks", ylim=(len(found) - 0.5, -0.5))
    for name, each in found.items():
        colour, marker = families[each["family"]]
        if each["adds"]:
            before = found.get(f"{name}{BEFORE}", {}).get("adds") or each["adds"]
            axes[-1].plot(*zip(before, each["adds"], strict=True), color=colour, lw=0.8)
            axes[-1].plot(*each["adds"], marker, color=colour, ms=5, alpha=0.75, mfc="white" if name.endswith(BEFORE) else None)
            axes[-1].annotate("" if name.endswith(BEFORE) else name, each["adds"], xytext=(4, -9 if MARKERS.index(marker) % 2 else 4),
                              textcoords="offset points", fontsize=7, color=colour)  # fmt: skip
    axes[-1].set(title=ABILITY, xlabel="best value layer minus\nprojector, points (hollow: -read,\nbefore the last stage)", ylabel="accuracy of POPE\nand BLINK, %")
    axes[-1].margins(x=0.35, y=0.25)
    for family, (colour, marker) in families.items():
        axes[0].plot([], [], marker, color=colour, label=family)
    legend_below(figure, axes[:1], ncols=len(families))
    figure.suptitle("C1 and C2 in every model, and C3 over all of them (95 % intervals)", fontsize=11)
    return figure
