"""The paper's section 3.1 as one measurement: the six tasks of a profile, the models they are run on, claims C1, C2, C4.

Along the data flow: SigLIP as published -> (finetuning) -> the model's own encoder -> (projection) -> projector ->
(language model) -> values. What each step adds to, or loses of, what the six tasks read is the paper's Table 1.
"""

from collections.abc import Mapping

from kvutils.datasets import USES, class_names, open_uses
from kvutils.errors import ParameterError
from kvutils.metrics.old import claim_of_parts, undefined
from kvutils.metrics.statistics import UNDEFINED, Interval
from kvutils.models import load_encoder, load_mlm, original_encoder
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.words import load_siglip_text
from kvutils.tasks.base import ScoreTable, Task, summarise
from kvutils.tasks.co_segmentation import CoSegmentation
from kvutils.tasks.correspondence import SemanticCorrespondence, TemporalCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.text_segmentation import ReferringSegmentation, SemanticSegmentation, SemanticSegmentationProbe

SIX = (ForegroundSegmentation, CoSegmentation, SemanticSegmentation, ReferringSegmentation, SemanticCorrespondence,
       TemporalCorrespondence)  # fmt: skip
CHAIN = ("encoder_original", "encoder", "projector", "value")  # along the data flow; value: of the best layer
STEPS = {  # step -> (before, after)
    "finetuning": ("encoder_original", "encoder"),
    "projection": ("encoder", "projector"),
    "language model": ("projector", "value"),
    "all steps": ("encoder_original", "value"),
}
_FEW = "independent units are too few to choose a layer and test it on others; at least 4 are needed"
_LEFT_OUT = "its data set was left out"


def open_extractor(model: str, seed: int = 0, max_pixels: int = 0, **options) -> FeatureExtractor:
    """Everything the tasks compare, loaded by the model's name: the MLM (max_pixels as in `load_mlm`), the same architecture
    with random weights (of the given seed), and the encoder before it was finetuned. options: those of `FeatureExtractor`."""
    encoder = original_encoder(model)
    text = load_siglip_text(encoder)  # first: what its tokenizer lacks is said before the large models are read
    mlm, untrained = load_mlm(model, max_pixels=max_pixels), load_mlm(model, max_pixels=max_pixels, untrained=True, seed=seed)
    return FeatureExtractor(mlm, untrained, load_encoder(encoder), encoder_text=text, **options)


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


def _why(summaries: Mapping[str, Mapping], name: str) -> str:
    return f"{summaries[name]['groups']} {_FEW}" if name in summaries else _LEFT_OUT


def claim_c1(summaries: Mapping[str, Mapping]) -> dict:
    """C1, per task: the best value layer (chosen on one half of the items) minus the task's control, on the other half."""
    entries = []
    for name in (task.name for task in SIX):
        best = summaries.get(name, {}).get("value_best")
        if best is None or best["control"] not in best["minus"]:
            entries.append(undefined(f"{name}: best value layer minus its control", _why(summaries, name)))
        else:
            minus = Interval.of(best["minus"][best["control"]])
            entries.append(minus.claim(f"{name}: {best['source']} minus {best['control']}"))
    return claim_of_parts(entries, "tasks of 6")


def claim_c2(summaries: Mapping[str, Mapping]) -> dict:
    """C2, per task: best value layer minus first and minus last, on the half of the items that did not choose it."""
    entries = []
    for name in (task.name for task in SIX):
        found = summaries.get(name, {}).get("build_then_degrade", {}).get("value")
        for part, against in (("minus_first", "first"), ("minus_last", "last")):
            if found is None:
                entries.append(undefined(f"{name}: best value layer minus {against}", _why(summaries, name)))
            else:
                entries.append(Interval.of(found[part]).claim(f"{name}: layer {found['best_layer']} minus {against}"))
    return claim_of_parts(entries, "comparisons of 12")


def compare_along_chain(table: ScoreTable, task: Task, n_boot: int = 2000, seed: int = 0) -> dict:
    """Scores of the chain's sources and the paired differences between them; JSON-able.

    The best value layer is chosen on one half of the groups; everything is measured on the other half, on the same items.
    scores, steps: {name: interval}, of None for a source that the table has left out, and where the task has no score of the
    model's own encoder: the tower of Qwen2.5-VL and LLaVA-NeXT is no SigLIP, so it has no text to compare its patches with.
    Raises ParameterError where another source is missing, and where there are too few groups to choose a layer."""
    summary = summarise(table, task, n_boot, seed)
    if "value_best" not in summary:
        raise ParameterError(f"{table.task}: {summary['groups']} units are too few to choose a layer; at least 4 are needed")
    best = summary["value_best"]["source"]
    rest, options = table.held_out(seed), (task.statistic, n_boot, seed)
    gone = {"encoder", *table.left_out}.difference(table.sources)
    there = {name: best if name == "value" else name for name in CHAIN if name not in gone}
    scores, steps = (dict.fromkeys(names, UNDEFINED.as_dict()) for names in (CHAIN, STEPS))
    scores |= {name: rest.interval(source, *options) for name, source in there.items()}
    steps |= {name: rest.difference(there[after], there[before], *options)
              for name, (before, after) in STEPS.items() if {before, after} <= there.keys()}  # fmt: skip
    return {"title": task.title, "metric": task.metric, "n": len(rest), "groups": len(set(rest.groups)), "best": best,
            "scores": scores, "steps": steps}  # fmt: skip


def claim_c4(chains: Mapping[str, Mapping]) -> dict:
    """C4, per task: SigLIP before any finetuning minus the best value layer, on items that did not choose the layer; undefined
    for a task that `chains` lacks: too few units, or no data."""
    entries = []
    for name in (task.name for task in SIX):
        if name not in chains:
            entries.append(undefined(f"{name}: SigLIP minus best value layer", f"{_LEFT_OUT}, or {_FEW}"))
        else:
            lost = Interval.of(chains[name]["steps"]["all steps"]).scaled(-1)
            entries.append(lost.claim(f"{name}: SigLIP minus {chains[name]['best']}"))
    return claim_of_parts(entries, "tasks of 6")
