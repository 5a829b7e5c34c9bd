"""The paper's section 3.1 as one measurement: the six tasks of a profile, the models they are run on, claims C1, C2, C4.

Along the data flow: SigLIP as published -> (finetuning) -> the model's own encoder -> (projection) -> projector ->
(first value projection) -> values of layer 0 -> (language model) -> values of later layers. What each step adds to, or loses of, what
the six tasks read is the paper's Table 1.
"""

import math
from collections.abc import Mapping

from kvutils.datasets import USES, class_names, open_uses
from kvutils.metrics.effects import effect_of, measured, no_floor, part, prerequisite
from kvutils.metrics.statistics import UNDEFINED, Effect, bootstrap_ci, mean_effect
from kvutils.models import load_encoder, load_mlm, original_encoder
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.words import load_siglip_text
from kvutils.tasks.base import Task
from kvutils.tasks.co_segmentation import CoSegmentation
from kvutils.tasks.correspondence import SemanticCorrespondence, TemporalCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.tables import FIRST, BestValues, ScoreTable, differences
from kvutils.tasks.text_segmentation import ReferringSegmentation, SemanticSegmentation, SemanticSegmentationProbe

SIX = (ForegroundSegmentation, CoSegmentation, SemanticSegmentation, ReferringSegmentation, SemanticCorrespondence,
       TemporalCorrespondence)  # fmt: skip
CHAIN = ("encoder_original", "encoder", "projector", FIRST, "value")  # along the data flow; value: of the best layer from 1 on
STEPS = {  # step -> (before, after)
    "finetuning": ("encoder_original", "encoder"),
    "projection": ("encoder", "projector"),
    "first value projection": ("projector", FIRST),
    "language model": (FIRST, "value"),
    "all steps": ("encoder_original", "value"),
}
DEPTHS = {"segmentation": (0.52, 0.56), "correspondence": (0.26, 0.37)}  # the paper's peaks: layers 14-15 and 7-10 of 0..27
BEYOND_FIRST = "best value layer minus first value projection"
_LEFT_OUT = "its data set was left out, or it has too few units to choose a layer"


def open_extractor(model: str, seed: int = 0, max_pixels: int = 0, **options) -> FeatureExtractor:
    """Everything the tasks compare, loaded by the model's name: the MLM (max_pixels as in `load_mlm`), the same architecture
    with random weights (of the given seed), and the encoder before it was finetuned. Keys are left to notebook 03: the claims of
    section 3.1 are about values. options: those of `FeatureExtractor`."""
    encoder = original_encoder(model)
    text = load_siglip_text(encoder)  # first: what its tokenizer lacks is said before the large models are read
    mlm, untrained = load_mlm(model, max_pixels=max_pixels), load_mlm(model, max_pixels=max_pixels, untrained=True, seed=seed)
    return FeatureExtractor(mlm, untrained, load_encoder(encoder), encoder_text=text, keys=False, **options)


def value_flow_tasks(profile: str, options: Mapping[str, Mapping | None] | None = None) -> dict[str, Task]:
    """The six tasks of a profile by name, and the supervised counterpart of task 3, without those whose data set is left out.
    `options` as in `open_uses`, such as {"pocket-davis-2017": {"count": 4}}."""
    data = open_uses(profile, "01", options)
    tasks = {task.name: task(data[task.name]) for task in SIX if task.name in data}
    probe = SemanticSegmentationProbe.name
    if {probe, SemanticSegmentation.name} <= data.keys():
        name = USES[profile]["01"][probe]
        classes = class_names(name, **(options or {}).get(name, {}))
        tasks[probe] = SemanticSegmentationProbe(data[SemanticSegmentation.name], data[probe], classes)
    return tasks


def _parts(found: Mapping[str, Mapping], name: str, *keys: str, factor: float = 100) -> dict[str, dict]:
    """Title of each of the six tasks -> the difference that summaries (or chains) store under these keys, in points, as a part."""
    parts = {}
    for task in SIX:
        each = found.get(task.name, {})
        why = each.get("no_layer", "there is nothing to compare it with") if each else _LEFT_OUT
        for key in keys:
            each = each.get(key, {})
        parts[task.title] = part(f"{task.title}: {name}", Effect.of(each).scaled(factor) if each else UNDEFINED, why)
    return parts


def _named(parts: Mapping[str, dict], sign: int) -> list[str]:
    """The tasks above 0 (sign 1) or below (-1)."""
    return [title for title, each in parts.items() if each["low"] is not None and (each["low"] > 0 if sign > 0 else each["high"] < 0)]


def _mean(name: str, parts: Mapping[str, dict]) -> dict:
    there = [effect_of(each) for each in parts.values() if each["low"] is not None]
    why, units = next((p["reason"] for p in parts.values() if "reason" in p), ""), sum(each.units for each in there)
    return part(f"{name}, mean over {len(there)} tasks", mean_effect(there), why, units=units)


def _says(parts: Mapping[str, dict], above: str, below: str) -> str:
    """`fall on 5 of 6 tasks (...), rise on 0`: which these are, and which are missing."""
    missing, said = {title: each["reason"] for title, each in parts.items() if each["low"] is None}, []
    for verb, sign in ((above, 1), (below, -1)):
        names, of = _named(parts, sign), len(parts) - len(missing)
        some = f" ({'; '.join(names)})" if 0 < len(names) < of else ""
        said.append(f"{verb} on {len(names)}" + (f" of {of} tasks" if sign > 0 else "") + some)
    return ", ".join([*said, *(f"without {title} ({why})" for title, why in missing.items())])


def claim_c1(summaries: Mapping[str, Mapping]) -> dict:
    """C1: the best value layer minus the better of pixels and untrained values (`BestValues`), in points, on each task (`tasks`); beside
    it their mean (`primary`), and the difference to the first value projection."""
    name = "best value layer minus its control"
    parts, first = _parts(summaries, name, "value_best", "minus", "control"), _parts(summaries, BEYOND_FIRST, "value_best", "minus", FIRST)
    nothing = [f"{each['title']}: {kind} predict nothing ({each['metric']} {score:.3f}), which is no control"
               for each in summaries.values() for kind, score in each.get("value_best", {}).get("nothing", {}).items()]  # fmt: skip
    usable = not nothing or any(each["low"] is not None for each in parts.values())
    need = prerequisite("a control that predicts something", usable, "; ".join(nothing) or "every control predicts something")
    note = f"The best value layer is {_says(parts, 'above its control', 'below it')}."
    tasks = [each for each in parts.values() if each["low"] is not None]
    return measured(_mean(name, parts), [*parts.values(), _mean(BEYOND_FIRST, first)], [need], note, tasks=tasks)


def claim_c2a(summaries: Mapping[str, Mapping]) -> dict:
    """C2, first half: the best layer between the first and the last minus layer 1, in points, mean over the tasks, which are together
    above their controls. Beside it every task, and the difference to the first value projection."""
    first = _parts(summaries, BEYOND_FIRST, "value_best", "minus", FIRST)
    said = []
    for kind, (low, high) in DEPTHS.items():
        shapes = [summaries[t.name]["build_then_degrade"].get("value") for t in SIX if kind in t.name and t.name in summaries]
        depths = [shape["peak_depth"]["mean"] for shape in shapes if shape]
        said += [f"{kind} peaks at {min(depths):.2f} to {max(depths):.2f} of the depth (paper: {low} to {high})"] if depths else []
    found = _shape(summaries, "minus_first", "layer 1", "The values build up to a layer between", "fall from layer 1")
    return found | {"others": [*found["others"], *first.values()], "note": " ".join([found["note"], *(f"{each.capitalize()}." for each in said)])}


def claim_c2b(summaries: Mapping[str, Mapping]) -> dict:
    """C2, second half: the best layer between the first and the last minus the last, as `claim_c2a`."""
    return _shape(summaries, "minus_last", "last layer", "The values fall towards the last layer", "rise")


def _shape(summaries: Mapping[str, Mapping], against: str, end: str, above: str, below: str) -> dict:
    name = f"best layer between minus {end}"
    parts = _parts(summaries, name, "build_then_degrade", "value", against)
    control = _mean("", _parts(summaries, "", "value_best", "minus", "control"))  # of all: tasks that chance lifts would show a shape as well
    needs = [] if control["low"] is None else [no_floor("the best value layer", effect_of(control), "points, mean over the tasks,")]
    return measured(_mean(name, parts), parts.values(), needs, f"{_says(parts, above, below)}.")


def language_model_adds(summaries: Mapping[str, Mapping]) -> dict:
    """What the language model adds over its projector input: best value layer minus projector, in points, on average (`mean`) and
    per task (`tasks`), as parts. C3 compares models by it."""
    name = "best value layer minus projector"
    parts = _parts(summaries, name, "value_best", "minus", "projector")
    return {"mean": _mean(name, parts), "tasks": list(parts.values())}


def compare_along_chain(table: ScoreTable, task: Task, n_boot: int = 2000, seed: int = 0) -> dict:
    """Scores of the chain's sources and the paired differences between them; JSON-able.

    The best value layer (from 1 on) is chosen for each half of the rows on the other, `layers`; all rows are used. scores: {name:
    interval}, steps: {name: `Effect`}, of None for a source that the table has left out, and where the task has no score of the model's
    own encoder: the tower of Qwen2.5-VL and LLaVA-NeXT is no SigLIP, so it has no text to compare its patches with. above_control:
    SigLIP, and the best values, minus the control of `BestValues`. Raises ParameterError where another source is missing, and where
    there are too few units to choose a layer."""
    options = (task.statistic, n_boot, seed)
    best = BestValues.of(table, task.statistic, table.halves(seed))
    gone = {"encoder", FIRST, *table.left_out}.difference(table.sources)
    there = {name: best.values if name == "value" else table.of(name) for name in CHAIN if name not in gone}
    scores, steps = (dict.fromkeys(names, UNDEFINED.as_dict()) for names in (CHAIN, STEPS))
    scores |= {name: bootstrap_ci(values, *options, table.groups).as_dict() for name, values in there.items()}
    pairs = {name: (there[after], there[before]) for name, (before, after) in STEPS.items() if {before, after} <= there.keys()}
    above = {name: (there[name], best.control_values) for name in ("encoder_original", "value") if best.control and name in there}
    found = differences(pairs | above, table, *options)
    return {"title": task.title, "metric": task.metric, "n": len(table), "groups": table.units, "layers": best.layers, "control": best.control,
            "scores": scores, "steps": steps | {name: found[name] for name in pairs}, "above_control": {name: found[name] for name in above}}


def claim_c4(chains: Mapping[str, Mapping]) -> dict:
    """C4: SigLIP before any finetuning minus the best value layer, in points, on the tasks where both are above their control
    (`tasks`); the others are named. A task that `chains` lacks has no data, or too few units."""
    lost = _parts(chains, "SigLIP minus best value layer", "steps", "all steps", factor=-100)
    control = {label: _parts(chains, "", "above_control", name) for label, name in {"SigLIP": CHAIN[0], "the best layer": CHAIN[-1]}.items()}
    silent = [title for title, each in lost.items() if each["low"] is not None and any(c[title]["low"] is None for c in control.values())]
    floor = {title: [label for label, parts in control.items() if title not in _named(parts, 1)]
             for title, each in lost.items() if each["low"] is not None and title not in silent}  # fmt: skip
    parts = lost | {title: lost[title] | {"low": None, "reason": f"{' and '.join(labels)} not above the control"}
                    for title, labels in floor.items() if labels}  # fmt: skip
    parts |= {title: lost[title] | {"low": None, "reason": "no control predicts anything"} for title in silent}
    tasks, left = [each for each in parts.values() if each["low"] is not None], [title for title, labels in floor.items() if labels]
    said = f"both above their control on {len(tasks)} of {len(floor)} tasks" + (f", not on {'; '.join(left)}" if left else "")
    need = prerequisite("both above their control", bool(tasks or not left), said if tasks else f"floor: {said}")
    ahead = len(_named(parts, 1))
    number = part("tasks on which SigLIP is ahead", Effect(ahead, math.nan, math.nan, len(tasks), math.nan, len(tasks)), "a count", unit="tasks")
    return measured(number, [], [need], f"SigLIP is {_says(parts, 'ahead', 'behind')}.", tasks=tasks)
