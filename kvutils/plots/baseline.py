"""Figures of notebook 02: each task's score from the original encoder to the values, and what each step adds."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from kvutils.plots.style import COLOURS, error_bar, forest, in_order, layers_text, legend_below, panels, styled
from kvutils.plots.value_flow import similarity_maps

CHAIN_LABELS = {"encoder_original": "SigLIP", "encoder": "encoder", "projector": "projector", "value.0": "first\nprojection", "value": "best\nvalues"}
STEP_STYLE = {  # step -> colour, marker, label
    "finetuning": (COLOURS[1], "s", "finetuning (encoder minus SigLIP)"),
    "projection": (COLOURS[2], "^", "projection (projector minus encoder)"),
    "first value projection": (COLOURS[4], "v", "first value projection (values of layer 0 minus projector)"),
    "language model": (COLOURS[0], "o", "language model (best values from layer 1 on minus layer 0)"),
    "all steps": ("black", "D", "all steps (best values minus SigLIP)"),
}


@styled
def scores_along_chain(chains: Mapping[str, Mapping]) -> Figure:
    """Each task's score from SigLIP to the best value layer, with 95 % intervals; one panel per task."""
    chains = in_order(chains)
    figure, axes = panels(len(chains), 3, 10 / 3, 2.9)
    for axis, chain in zip(axes, chains.values(), strict=True):
        found = [chain["scores"][name] for name in CHAIN_LABELS]
        known = [x for x, each in enumerate(found) if each["mean"] is not None]
        axis.plot(known, [found[x]["mean"] for x in known], color="grey", lw=0.8)
        for x in known:
            colour, marker = (COLOURS[0], "o") if x == len(found) - 1 else ("black", "D")
            axis.errorbar(x, found[x]["mean"], yerr=error_bar(found[x]), fmt=marker, ms=5, color=colour, capsize=3)
        axis.axhline(found[0]["mean"], color="black", lw=0.7, ls=(0, (6, 4)))
        axis.set_xticks(range(len(found)), CHAIN_LABELS.values(), fontsize=8)
        axis.set(title=f"{chain['title']}\n{chain['n']} items in {chain['groups']} units, {layers_text(chain['layers'])}", ylabel=chain["metric"])
        axis.margins(x=0.12)
    return figure


@styled
def steps_along_chain(chains: Mapping[str, Mapping]) -> Figure:
    """What each step adds (right of 0) or loses (left of 0), per task, with 95 % intervals."""
    chains = in_order(chains)
    figure, axis = plt.subplots(figsize=(8.5, 0.75 * len(chains) + 1.6))
    points = [(row + shift, chain["steps"][step], colour, marker, None if row else label) for row, chain in enumerate(chains.values())
              for shift, (step, (colour, marker, label)) in zip((-0.3, -0.15, 0, 0.15, 0.3), STEP_STYLE.items(), strict=True)]  # fmt: skip
    forest(axis, points, [f"{chain['title']}\n({chain['metric']})" for chain in chains.values()])
    for row in range(1, len(chains)):
        axis.axhline(row - 0.5, color="grey", lw=0.3)
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="difference of the task's score, with 95 % interval")
    legend_below(figure, [axis], ncols=2)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    chains = results["chains"]
    return {
        "02_scores": scores_along_chain(chains),
        "02_steps": steps_along_chain(chains),
        "02_similarity": similarity_maps(results["picture"]),
    }
