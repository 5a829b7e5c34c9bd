"""What each step between SigLIP and the language model adds to, or loses of, what the six tasks read (section 3.1, Table 1).

SigLIP as published -> (finetuning) -> the model's own encoder -> (projection) -> projector -> (language model) -> values.
"""

from collections.abc import Mapping

from kvutils.errors import ParameterError
from kvutils.report import undefined
from kvutils.statistics import bootstrap_ci, paired_difference
from kvutils.tasks.base import ScoreTable, Task, choosing_half, summarise
from kvutils.tasks.value_flow import SIX

CHAIN = ("encoder_original", "encoder", "projector", "value")  # along the data flow; value: of the best layer
STEPS = {  # step -> (before, after)
    "finetuning": ("encoder_original", "encoder"),
    "projection": ("encoder", "projector"),
    "language model": ("projector", "value"),
    "all steps": ("encoder_original", "value"),
}
_UNDEFINED = {"mean": None, "low": None, "high": None, "n": 0}


def compare_along_chain(table: ScoreTable, task: Task, n_boot: int = 2000, seed: int = 0) -> dict:
    """Scores of the chain's sources and the paired differences between them; JSON-able.

    The best value layer is chosen on one half of the groups; everything is measured on the other half, on the same
    items. scores, steps: {name: interval}, of None where the task has no score of the model's own encoder: the tower of
    Qwen2.5-VL and LLaVA-NeXT is no SigLIP, so it has no text to compare its patches with. Raises ParameterError where
    another source is missing, and where there are too few groups to choose a layer."""
    summary = summarise(table, task, n_boot, seed)
    if "value_best" not in summary:
        raise ParameterError(f"{table.task}: {summary['groups']} units are too few to choose a layer; at least 4 are needed")
    best = summary["value_best"]["source"]
    held_out = ~choosing_half(table.groups, seed)
    groups = [group for group, kept in zip(table.groups, held_out, strict=True) if kept]
    there = [name for name in CHAIN if name != "encoder" or name in table.sources]
    values = {name: table.of(best if name == "value" else name)[held_out] for name in there}
    options = (task.statistic, n_boot, seed, groups)
    return {
        "title": task.title,
        "metric": task.metric,
        "n": int(held_out.sum()),
        "groups": len(set(groups)),
        "best": best,
        "scores": {name: bootstrap_ci(values[name], *options).as_dict() if name in values else _UNDEFINED for name in CHAIN},
        "steps": {
            name: paired_difference(values[after], values[before], *options).as_dict()
            if {before, after} <= values.keys() else _UNDEFINED
            for name, (before, after) in STEPS.items()
        },
    }


def claim_c4(chains: Mapping[str, Mapping]) -> dict:
    """C4, per task: SigLIP before any finetuning minus the best value layer, on items that did not choose the layer; undefined
    for a task that `chains` lacks."""
    entries = []
    for name in (task.name for task in SIX):
        if name not in chains:
            entries.append(undefined(f"{name}: SigLIP minus best value layer", "too few independent units to choose a layer"))
            continue
        lost = chains[name]["steps"]["all steps"]
        entries.append({
            "name": f"{name}: SigLIP minus {chains[name]['best']}",
            "value": -lost["mean"], "low": -lost["high"], "high": -lost["low"], "n": lost["n"],
        })  # fmt: skip
    return {"value": None, "low": None, "high": None, "n": len(entries), "unit": "tasks of 6", "entries": entries}
