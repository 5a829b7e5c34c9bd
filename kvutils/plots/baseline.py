"""Figures of notebook 02, in the style of `kvutils.plots.style`."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import _COLOURS, _styled, _tasks_in_order, error_bar
from kvutils.plots.value_flow import similarity_maps

CHAIN_LABELS = {"encoder_original": "SigLIP", "encoder": "encoder", "projector": "projector", "value": "best values"}
STEP_STYLE = {  # step -> colour, marker, label
    "finetuning": (_COLOURS[1], "s", "finetuning (encoder minus SigLIP)"),
    "projection": (_COLOURS[2], "^", "projection (projector minus encoder)"),
    "language model": (_COLOURS[0], "o", "language model (best values minus projector)"),
    "all steps": ("black", "D", "all steps (best values minus SigLIP)"),
}


@_styled
def scores_along_chain(chains: Mapping[str, Mapping]) -> Figure:
    """Each task's score from SigLIP to the best value layer, with 95 % intervals; one panel per task."""
    chains = _tasks_in_order(chains)
    rows = -(-len(chains) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10, 2.9 * rows), squeeze=False)
    for axis in list(axes.flat)[len(chains) :]:
        axis.set_axis_off()
    for axis, chain in zip(axes.flat, chains.values(), strict=False):
        found = [chain["scores"][name] for name in CHAIN_LABELS]
        known = [x for x, each in enumerate(found) if each["mean"] is not None]
        axis.plot(known, [found[x]["mean"] for x in known], color="grey", lw=0.8)
        for x, (name, each) in enumerate(zip(CHAIN_LABELS, found, strict=True)):
            if x not in known:
                continue
            colour = _COLOURS[0] if name == "value" else "black"
            axis.errorbar(x, each["mean"], yerr=error_bar(each), fmt="o" if name == "value" else "D", ms=5, color=colour, capsize=3)
        axis.axhline(found[0]["mean"], color="black", lw=0.7, ls=(0, (6, 4)))
        layer = chain["best"].split(".")[1]
        axis.set_xticks(range(len(found)), [*list(CHAIN_LABELS.values())[:-1], f"values,\nlayer {layer}"])
        axis.set(title=f"{chain['title']}\n{chain['n']} items in {chain['groups']} units", ylabel=chain["metric"])
        axis.margins(x=0.12)
    return figure


@_styled
def steps_along_chain(chains: Mapping[str, Mapping]) -> Figure:
    """What each step adds (right of 0) or loses (left of 0), per task, with 95 % intervals."""
    chains = _tasks_in_order(chains)
    figure, axis = plt.subplots(figsize=(8.5, 0.75 * len(chains) + 1.6))
    for row, chain in enumerate(chains.values()):
        for shift, (step, (colour, marker, label)) in zip((-0.27, -0.09, 0.09, 0.27), STEP_STYLE.items(), strict=True):
            found = chain["steps"][step]
            if found["mean"] is None:
                found = dict.fromkeys(found, np.nan)  # its place stays empty
            axis.errorbar(found["mean"], row + shift, xerr=error_bar(found), fmt=marker, color=colour, ms=5, capsize=3,
                          label=label if row == 0 else None)  # fmt: skip
        if row:
            axis.axhline(row - 0.5, color="grey", lw=0.3)
    axis.axvline(0, color="black", lw=0.8)
    axis.grid(axis="y", visible=False)
    axis.set_yticks(range(len(chains)), [f"{c['title']}\n({c['metric']})" for c in chains.values()])
    axis.invert_yaxis()
    axis.set(xlabel="difference of the task's score, with 95 % interval")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    chains = results["chains"]
    return {
        "02_scores": scores_along_chain(chains),
        "02_steps": steps_along_chain(chains),
        "02_similarity": similarity_maps(results["picture"]),
    }
