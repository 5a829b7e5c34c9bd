"""Notebook 02, the paper's Table 1: what each step from SigLIP to the values adds to, or loses of, what the six tasks read; claim C4."""

import math
from collections.abc import Mapping

from kvutils.errors import ParameterError
from kvutils.metrics.effects import measured, part, prerequisite
from kvutils.metrics.statistics import UNDEFINED, Effect, resample
from kvutils.tasks.base import Task
from kvutils.tasks.co_segmentation import BestUnion
from kvutils.tasks.tables import FIRST, BestValues, ScoreTable, differences
from kvutils.tasks.text_segmentation import ReferringSegmentation, SemanticSegmentation, uncentred
from kvutils.tasks.value_flow import BY_BEST, SIX, named_tasks, says, task_parts

CHAIN = ("encoder_original", "encoder", "projector", FIRST, "value")  # along the data flow; value: of the best layer from 1 on
STEPS = {"finetuning": ("encoder_original", "encoder"), "projection": ("encoder", "projector"),  # step -> (before, after)
         "first value projection": ("projector", FIRST), "language model": (FIRST, "value"), "all steps": ("encoder_original", "value")}


def compare_along_chain(table: ScoreTable, task: Task, n_boot: int = 2000, seed: int = 0) -> dict:
    """Scores of the chain's sources and the paired differences between them; JSON-able.

    The best value layer (from 1 on) is chosen for each half of the rows on the other, `layers`. scores: {name: interval}, steps: {name:
    `Effect`}, of None for a source that the table has left out, and where the task has no score of the model's own encoder: the tower of
    Qwen2.5-VL and LLaVA-NeXT has no text to compare its patches with. above_control: SigLIP, and the best values, minus the control of
    `BestValues`. Raises ParameterError where another source is missing, and where there are too few units to choose a layer."""
    best, statistic, options = BestValues.of(table, task.statistic, table.halves(seed)), task.statistic, (len(table), n_boot, seed, table.groups)
    gone = {"encoder", FIRST, *table.left_out}.difference(table.sources)
    there = {name: best.level if name == "value" else table.level(name, statistic) for name in CHAIN if name not in gone}
    scores, steps = (dict.fromkeys(names, UNDEFINED.as_dict()) for names in (CHAIN, STEPS))
    scores |= {name: resample(level, *options, around=name == "value").intervals().as_dict() for name, level in there.items()}
    pairs = {name: (there[after], there[before]) for name, (before, after) in STEPS.items() if {before, after} <= there.keys()}
    above = {name: (there[name], best.control_level) for name in ("encoder_original", "value") if best.control and name in there}
    chosen = {name: pair for name, pair in (pairs | above).items() if {best.level, best.control_level} & {*pair}}
    found = differences({name: pair for name, pair in pairs.items() if name not in chosen}, table, n_boot, seed)
    found |= differences(chosen, table, n_boot, seed, around=True)
    return {"title": task.title, "metric": task.metric, "n": len(table), "groups": table.units, "layers": best.layers, "control": best.control,
            "scores": scores, "steps": steps | {name: found[name] for name in pairs}, "above_control": {name: found[name] for name in above}}


def claim_c4(chains: Mapping[str, Mapping], best_union: Mapping | None = None) -> dict:
    """C4: SigLIP before any finetuning minus the best value layer, in points, on the tasks where both are above their control
    (`tasks`); the others are named. A task that `chains` lacks has no data, or too few units. Beside it co-segmentation by its best
    clusters (`best_union`, its chain)."""
    name = "SigLIP minus best value layer"
    lost = task_parts(chains, name, "steps", "all steps", factor=-100)
    control = {label: task_parts(chains, "", "above_control", name) for label, name in {"SigLIP": CHAIN[0], "the best layer": CHAIN[-1]}.items()}
    silent = [title for title, each in lost.items() if each["low"] is not None and any(c[title]["low"] is None for c in control.values())]
    floor = {title: [label for label, parts in control.items() if title not in named_tasks(parts, 1)]
             for title, each in lost.items() if each["low"] is not None and title not in silent}  # fmt: skip
    parts = lost | {title: lost[title] | {"low": None, "reason": f"{' and '.join(labels)} not above the control"}
                    for title, labels in floor.items() if labels}  # fmt: skip
    parts |= {title: lost[title] | {"low": None, "reason": "no control predicts anything"} for title in silent}
    tasks, left = [each for each in parts.values() if each["low"] is not None], [title for title, labels in floor.items() if labels]
    said = f"both above their control on {len(tasks)} of {len(floor)} tasks" + (f", not on {'; '.join(left)}" if left else "")
    need = prerequisite("both above their control", bool(tasks or not left), said if tasks else f"floor: {said}")
    ahead = len(named_tasks(parts, 1))
    number = part("tasks on which SigLIP is ahead", Effect(ahead, math.nan, math.nan, len(tasks), math.nan, len(tasks)), "a count", unit="tasks")
    beside = [part(f"{name}, {BY_BEST}", Effect.of(best_union["steps"]["all steps"]).scaled(-100))] if best_union else []
    return measured(number, beside, [need], f"SigLIP is {says(parts, 'ahead', 'behind')}.", tasks=tasks)


def results(measured: Mapping[str, ScoreTable], about: Mapping) -> dict:
    """Everything that notebook 02 derives; JSON-able. measured: `run_task` of the six tasks, by name; about: `parameters`. chains:
    `compare_along_chain` of every task that has units enough to choose a layer; left_out: of the others why not; uncentred: of the two
    tasks by text as if texts were not centred."""
    options = about["parameters"]["bootstrap"], about["parameters"]["seed"]
    chains, left_out, plain = {}, {}, {}
    for task in (each for each in SIX if each.name in measured):
        try:
            chains[task.name] = compare_along_chain(measured[task.name], task, *options)
        except ParameterError as error:
            left_out[task.name] = str(error)
    for task in (each for each in (SemanticSegmentation, ReferringSegmentation) if each.name in chains):
        plain[task.name] = compare_along_chain(uncentred(measured[task.name]), task, *options)
    name = BestUnion.name
    claim = claim_c4(chains, compare_along_chain(measured[name], BestUnion, *options) if name in chains else None)
    steps = {step: [chain["steps"][step] for chain in chains.values() if chain["steps"][step]["mean"] is not None] for step in STEPS}
    adds, loses = ({step: sum(test(each) for each in found) for step, found in steps.items()}
                   for test in (lambda each: each["low"] > 0, lambda each: each["high"] < 0))  # fmt: skip
    along = ", ".join(f"{step} adds on {adds[step]} and loses on {loses[step]}" for step in list(STEPS)[:-1])
    finding = f"{claim['note']} (Paper: ahead on 3 of 6.) Of the steps between, {along}."
    return {"chains": chains, "left_out": left_out, "uncentred": plain, "claims": {"C4": claim}, "finding": finding}
