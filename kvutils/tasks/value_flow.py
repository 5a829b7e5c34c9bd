"""Notebook 01, the paper's section 3.1: the six tasks of a profile, the models they are run on, claims C1 and C2."""

from collections.abc import Mapping

from kvutils.checkpoints import original_encoder
from kvutils.datasets import USES, class_names, open_uses
from kvutils.metrics.effects import effect_of, measured, no_floor, part, prerequisite
from kvutils.metrics.statistics import UNDEFINED, Effect, interval_text, mean_effect
from kvutils.models import load_encoder, load_mlm
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.words import load_siglip_text
from kvutils.tasks import photographs
from kvutils.tasks.base import Task, summarise
from kvutils.tasks.co_segmentation import BestUnion, CoSegmentation
from kvutils.tasks.correspondence import SemanticCorrespondence, TemporalCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.settings import claim_x6, setting_changes
from kvutils.tasks.tables import FIRST
from kvutils.tasks.text_segmentation import ReferringSegmentation, SemanticSegmentation, SemanticSegmentationProbe, other_reading

SIX = (ForegroundSegmentation, CoSegmentation, SemanticSegmentation, ReferringSegmentation, SemanticCorrespondence, TemporalCorrespondence)
DEPTHS = {"segmentation": (0.52, 0.56), "correspondence": (0.26, 0.37)}  # the paper's peaks: layers 14-15 and 7-10 of 0..27
BY_BEST = "co-segmentation by the best union of clusters"
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


def task_parts(found: Mapping[str, Mapping], name: str, *keys: str, factor: float = 100) -> dict[str, dict]:
    """Title of each of the six tasks -> the difference that summaries (or chains) store under these keys, in points, as a part."""
    parts = {}
    for task in SIX:
        each = found.get(task.name, {})
        why = each.get("no_layer", "there is nothing to compare it with") if each else _LEFT_OUT
        for key in keys:
            each = each.get(key, {})
        parts[task.title] = part(f"{task.title}: {name}", Effect.of(each).scaled(factor) if each else UNDEFINED, why)
    return parts


def named_tasks(parts: Mapping[str, dict], sign: int) -> list[str]:
    """The tasks above 0 (sign 1) or below (-1)."""
    return [title for title, each in parts.items() if each["low"] is not None and (each["low"] > 0 if sign > 0 else each["high"] < 0)]


def _mean(name: str, parts: Mapping[str, dict]) -> dict:
    there = [effect_of(each) for each in parts.values() if each["low"] is not None]
    why, units = next((p["reason"] for p in parts.values() if "reason" in p), ""), sum(each.units for each in there)
    return part(f"{name}, mean over {len(there)} tasks", mean_effect(there), why, units=units)


def says(parts: Mapping[str, dict], above: str, below: str) -> str:
    """`fall on 5 of 6 tasks (...), rise on 0`: which these are, and which are missing."""
    missing, said = {title: each["reason"] for title, each in parts.items() if each["low"] is None}, []
    for verb, sign in ((above, 1), (below, -1)):
        names, of = named_tasks(parts, sign), len(parts) - len(missing)
        some = f" ({'; '.join(names)})" if 0 < len(names) < of else ""
        said.append(f"{verb} on {len(names)}" + (f" of {of} tasks" if sign > 0 else "") + some)
    return ", ".join([*said, *(f"without {title} ({why})" for title, why in missing.items())])


def claim_c1(summaries: Mapping[str, Mapping]) -> dict:
    """C1: the best value layer minus the better of pixels and untrained values (`BestValues`), in points, on each task (`tasks`); beside
    it their mean (`primary`), and the difference to the first value projection."""
    name = "best value layer minus its control"
    parts, first = task_parts(summaries, name, "value_best", "minus", "control"), task_parts(summaries, BEYOND_FIRST, "value_best", "minus", FIRST)
    nothing = [f"{each['title']}: {kind} predict nothing ({each['metric']} {score:.3f}), which is no control"
               for each in summaries.values() for kind, score in each.get("value_best", {}).get("nothing", {}).items()]  # fmt: skip
    usable = not nothing or any(each["low"] is not None for each in parts.values())
    need = prerequisite("a control that predicts something", usable, "; ".join(nothing) or "every control predicts something")
    note = f"The best value layer is {says(parts, 'above its control', 'below it')}."
    tasks = [each for each in parts.values() if each["low"] is not None]
    return measured(_mean(name, parts), [*parts.values(), _mean(BEYOND_FIRST, first)], [need], note, tasks=tasks)


def claim_c2a(summaries: Mapping[str, Mapping], best_union: Mapping | None = None) -> dict:
    """C2, first half: the best layer between the first and the last minus layer 1, in points, mean over the tasks, which are together
    above their controls. Beside it every task, the mean of all layers between, the mean with co-segmentation by its best clusters
    (`best_union`, its summary), and the difference to the first value projection."""
    first = task_parts(summaries, BEYOND_FIRST, "value_best", "minus", FIRST)
    said = []
    for kind, (low, high) in DEPTHS.items():
        shapes = [summaries[t.name]["build_then_degrade"].get("value") for t in SIX if kind in t.name and t.name in summaries]
        depths = [shape["peak_depth"]["mean"] for shape in shapes if shape]
        said += [f"the {kind} tasks have their peaks at {min(depths):.2f} to {max(depths):.2f} of the depth (paper: {low} to {high})"] if depths else []
    found = _shape(summaries, best_union, "first", "layer 1", "The values build up to a layer between", "fall from layer 1")
    return found | {"others": [*found["others"], *first.values()], "note": " ".join([found["note"], *(f"{each.capitalize()}." for each in said)])}


def claim_c2b(summaries: Mapping[str, Mapping], best_union: Mapping | None = None) -> dict:
    """C2, second half: the best layer between the first and the last minus the last, as `claim_c2a`."""
    return _shape(summaries, best_union, "last", "last layer", "The values fall towards the last layer", "rise")


def _shape(summaries: Mapping[str, Mapping], best_union: Mapping | None, against: str, end: str, above: str, below: str) -> dict:
    name, between = f"best layer between minus {end}", f"mean of the layers between minus {end}"
    parts, unchosen = (task_parts(summaries, name, "build_then_degrade", "value", f"{kind}_{against}") for kind in ("minus", "between"))
    beside = [_mean(between, unchosen)]
    if best_union:
        parts_of = task_parts({**summaries, CoSegmentation.name: best_union}, name, "build_then_degrade", "value", f"minus_{against}")
        beside.append(_mean(f"{name}, {BY_BEST}", parts_of))
    control = _mean("", task_parts(summaries, "", "value_best", "minus", "control"))  # of all: tasks that chance lifts would show a shape as well
    needs = [] if control["low"] is None else [no_floor("the best value layer", effect_of(control), "points, mean over the tasks,")]
    return measured(_mean(name, parts), [*parts.values(), *beside], needs, f"{says(parts, above, below)}.")


def language_model_adds(summaries: Mapping[str, Mapping]) -> dict:
    """What the language model adds over its projector input: best value layer minus projector, in points, on average (`mean`) and
    per task (`tasks`), as parts. C3 compares models by it."""
    name = "best value layer minus projector"
    parts = task_parts(summaries, name, "value_best", "minus", "projector")
    return {"mean": _mean(name, parts), "tasks": list(parts.values())}


def centring(summaries: Mapping[str, Mapping]) -> dict[str, str]:
    """Of the two tasks that compare with texts, what the difference of the best layer between to the ends is with centred texts and with
    texts as they are, in a sentence."""
    said = {}
    for task in (SemanticSegmentation, ReferringSegmentation):
        shapes = summaries.get(task.name, {}).get("build_then_degrade", {})
        if {"value", "uncentred.value"} <= shapes.keys():
            (rise, fall), (plain_rise, plain_fall) = ([interval_text(shapes[kind][end], 1, True, 100) for end in ("minus_first", "minus_last")]
                                                      for kind in ("value", "uncentred.value"))  # fmt: skip
            said[task.name] = (f"{task.title}: the best layer between is {rise} points from layer 1 with centred texts and {plain_rise} with texts "
                               f"as they are; from the last layer it is {fall} and {plain_fall}.")  # fmt: skip
    return said


def results(measured: Mapping, about: Mapping) -> dict:
    """Everything that notebook 01 derives; JSON-able. measured: `run_task` of each task by name, what `measure_settings` gives,
    `read_otherwise` as `text_<task>`, and `photographs`. about: `parameters`, those of every task (`task_parameters`), the settings that
    were `left_out`, the words that texts are read `behind`."""
    options = about["parameters"]["bootstrap"], about["parameters"]["seed"]
    there = [task for task in (*SIX, SemanticSegmentationProbe) if task.name in measured]
    tasks = {task.name: summarise(measured[task.name], task, *options) | {"parameters": about["task_parameters"][task.name]} for task in there}
    reading = {task.name: other_reading(measured[f"text_{task.name}"], task, about["behind"], *options)
               for task in there if f"text_{task.name}" in measured}  # fmt: skip
    settings = setting_changes(measured, SIX, about["left_out"], *options)
    name = CoSegmentation.name
    best_union = summarise(measured[name], BestUnion, *options) if name in measured else None
    claims = {"C1": claim_c1(tasks), "C2a": claim_c2a(tasks, best_union), "C2b": claim_c2b(tasks, best_union), "X6": claim_x6(settings)}
    says = [f"{claims[name]['note']} On average that is {interval_text(claims[name]['primary'], 1, True)} points." for name in ("C1", "C2a", "C2b")]
    return {"tasks": tasks, "language_model_adds": language_model_adds(tasks), "centring": centring(tasks), "text_reading": reading,
            "settings": settings, "photographs": photographs.summary(measured["photographs"]), "claims": claims, "finding": " ".join(says),
            "tables": [every_metric(tasks)]}


def every_metric(tasks: Mapping[str, Mapping]) -> dict:
    """For REPORT.md: {title, header, rows} of each task's headline and its other metrics."""
    before, rows = ("pixels", "encoder_original", "projector"), []
    for each in tasks.values():
        for layer in each.get("value_best", {"layers": []})["layers"][:1]:
            shown = *before, *(f"{family}.{layer}" for family in ("value", "untrained.value", "lens.value"))
            rows += [[each["title"], metric, layer, *(interval_text(found[source]) if source in found else None for source in shown)]
                     for metric, found in ((each["metric"], each["sources"]), *each["secondary"].items())]  # fmt: skip
    header = ["task", "metric", "layer", *before, "values of this layer", "untrained", "read through the language model's head"]
    return {"title": "every metric, in the value layer that the first half of the items chooses by the headline", "header": header, "rows": rows}
