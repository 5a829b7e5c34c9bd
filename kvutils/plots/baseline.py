"""Figures of notebook 02: one picture along the chain, and what each step from the original encoder to the values adds or loses."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kvutils.plots.style import in_order, styled
from kvutils.plots.value_flow import overview

STEPS = {"finetuning": "finetuning\n(to encoder)", "projection": "projection\n(to projector)",
         "first value projection": "first value\nprojection", "language model": "language model\n(to best values)", "all steps": "all steps"}


@styled
def steps_along_chain(chains: Mapping[str, Mapping]) -> Figure:
    """What each step adds to each task's score (blue) or loses of it (red), in points; colourless where the 95 % interval includes 0."""
    chains = in_order(chains)
    steps = [[chain["steps"][step] for step in STEPS] for chain in chains.values()]
    figure, axis = plt.subplots(figsize=(8.2, 0.58 * len(chains) + 1.9))
    sure = np.array([[each["low"] is not None and (each["low"] > 0) - (each["high"] < 0) for each in row] for row in steps], dtype=int)
    known = np.array([[0.0 if each["mean"] is None else 100 * each["mean"] for each in row] for row in steps]).reshape(len(chains), len(STEPS))
    shades = np.where(sure, np.sign(known) * (0.35 + 0.65 * np.abs(known) / max(1e-9, np.abs(known).max())), 0)
    axis.imshow(shades, cmap="RdBu", vmin=-1.6, vmax=1.6, aspect="auto")
    for y, row in enumerate(steps):
        for x, each in enumerate(row):
            if each["mean"] is not None:
                text = f"{100 * each['mean']:+.1f}\n[{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]"
                axis.text(x, y, text, ha="center", va="center", fontsize=8.5, color="black" if sure[y, x] else "dimgrey")
    axis.set_xticks(range(len(STEPS)), STEPS.values())
    fair = [len(each := chain["above_control"]) == 2 and all((one["low"] or 0) > 0 for one in each.values()) for chain in chains.values()]
    notes = ("" if ok else ", not above its control" for ok in fair)
    axis.set_yticks(range(len(chains)), [f"{chain['title'].replace('-expression', '')}\n({chain['metric'].replace(' per image', '')}{note})"
                                         for chain, note in zip(chains.values(), notes, strict=True)])  # fmt: skip
    axis.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axis.grid(False)
    axis.axvline(len(STEPS) - 1.5, color="white", lw=6)
    axis.spines[:].set_visible(False)
    ahead, behind = (int((sure[fair, -1] == sign).sum()) for sign in (-1, 1))
    counts = [(sure[:, :-1] == sign).sum(0) for sign in (-1, 1)]
    lost, gained = (" and ".join(step for step, each in zip(STEPS, count, strict=False) if 0 < each == count.max()) + f" ({count.max()} of {len(sure)})"
                    if count.any() else "nothing" for count in counts)
    figure.suptitle(f"SigLIP ahead of the best values on {ahead} of {sum(fair)} tasks, behind on {behind};\n"
                    f"losing most often: {lost}; adding most often: {gained}", fontsize=11)  # fmt: skip
    figure.supxlabel("change of the score in points (100 times the metric), with 95 % interval; colourless where that includes 0", fontsize=8.5)
    return figure


def draw(results: Mapping) -> dict[str, Figure]:
    return {"02_steps": steps_along_chain(results["chains"]), **({"02_chain": overview(results["scene"])} if "scene" in results else {})}
