"""Figure of `kvutils probe`: each task on one's own pictures along the data flow."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from kvutils.plots.style import BEFORE, BEFORE_HANDLE, SOURCE_STYLE, along_the_flow, legend_below, panels, styled

FAMILIES = {family: SOURCE_STYLE[family] for family in ("value", "shuffled.value")}


@styled
def own_curves(tasks: Mapping[str, Mapping]) -> Figure:
    """Score of each task of one's own pictures, from pixels over encoder and projector to the values of every layer, with 95 % bands; of few
    units, no bands."""
    figure, axes = panels(len(tasks), len(tasks), 3.6, 3.3)
    for axis, each in zip(axes, tasks.values(), strict=True):
        along_the_flow(axis, each["sources"], FAMILIES)
        for source, label in zip(BEFORE, axis.get_xticklabels(), strict=False):
            label.set_visible(source in each["sources"])
        few = ", too few for intervals" if all(found["low"] is None for found in each["sources"].values()) else ""
        axis.set(title=f"{each['title']}\n{each['n']} items{few}", ylabel=each["metric"], xlabel="before the language model | layer")
    legend_below(figure, axes, {"before the language model": BEFORE_HANDLE}, ncols=len(tasks))
    return figure
