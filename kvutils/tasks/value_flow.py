"""The paper's section 3.1 as one measurement: the six tasks of a profile, and the models they are run on."""

from collections.abc import Mapping

from kvutils.datasets import TASK_DATA, class_names, open_dataset
from kvutils.errors import ParameterError
from kvutils.features import FeatureExtractor
from kvutils.models import original_encoder, load_encoder, load_mlm
from kvutils.report import undefined
from kvutils.store import Store
from kvutils.tasks.base import Task
from kvutils.tasks.co_segmentation import CoSegmentation
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.referring_segmentation import ReferringSegmentation
from kvutils.tasks.semantic_correspondence import SemanticCorrespondence
from kvutils.tasks.semantic_segmentation import SemanticSegmentation, SemanticSegmentationProbe
from kvutils.tasks.temporal_correspondence import TemporalCorrespondence
from kvutils.text_alignment import load_siglip_text

SIX = (ForegroundSegmentation, CoSegmentation, SemanticSegmentation, ReferringSegmentation, SemanticCorrespondence,
       TemporalCorrespondence)  # fmt: skip


def open_extractor(model: str, store: Store | None = None, seed: int = 0, **options) -> FeatureExtractor:
    """Everything the tasks compare, loaded by the model's name: the MLM, the same architecture with random weights
    (of the given seed), and the encoder before it was finetuned. options: those of `FeatureExtractor`."""
    encoder = original_encoder(model)
    return FeatureExtractor(
        load_mlm(model),
        untrained=load_mlm(model, untrained=True, seed=seed),
        encoder_original=load_encoder(encoder),
        encoder_text=load_siglip_text(encoder),
        store=store,
        **options,
    )


def value_flow_tasks(profile: str, options: Mapping[str, Mapping] | None = None) -> dict[str, Task]:
    """The six tasks of a profile by name, and the supervised counterpart of task 3. `options` gives loader options per
    data set name, such as {"pocket-davis-2017": {"count": 4}}."""
    options = dict(options or {})
    names = TASK_DATA[profile]
    unknown = set(options) - set(names.values())
    if unknown:
        raise ParameterError(f"options for {', '.join(sorted(unknown))}: profile {profile} uses {', '.join(names.values())}")
    data = {use: open_dataset(name, **options.get(name, {})) for use, name in names.items()}
    tasks = {task.name: task(data[task.name]) for task in SIX}
    probe = SemanticSegmentationProbe.name
    classes = class_names(names[probe], **options.get(names[probe], {}))
    tasks[probe] = SemanticSegmentationProbe(data[SemanticSegmentation.name], data[probe], classes)
    return tasks


def claim_c1(summaries: Mapping[str, Mapping]) -> dict:
    """C1, per task: the best value layer (chosen on one half of the items) minus the task's control, on the other half."""
    entries = []
    for name in (task.name for task in SIX):
        best = summaries[name].get("value_best")
        if best is None:
            entries.append(undefined(f"{name}: best value layer minus its control", _few(summaries[name])))
            continue
        entries.append(_entry(f"{name}: {best['source']} minus {best['control']}", best["minus"][best["control"]]))
    return {"value": None, "low": None, "high": None, "n": len(entries), "unit": "tasks of 6", "entries": entries}


def claim_c2(summaries: Mapping[str, Mapping]) -> dict:
    """C2, per task: best value layer minus first and minus last, on the half of the items that did not choose it."""
    entries = []
    for name in (task.name for task in SIX):
        found = summaries[name]["build_then_degrade"].get("value")
        for part, against in (("minus_first", "first"), ("minus_last", "last")):
            if found is None:
                entries.append(undefined(f"{name}: best value layer minus {against}", _few(summaries[name])))
                continue
            entries.append(_entry(f"{name}: layer {found['best_layer']} minus {against}", found[part]))
    return {"value": None, "low": None, "high": None, "n": len(entries), "unit": "comparisons of 12", "entries": entries}


def _few(summary: Mapping) -> str:
    return f"{summary['groups']} independent units are too few to choose a layer and test it on others; at least 4 are needed"


def _entry(name: str, interval: Mapping) -> dict:
    return {"name": name, "value": interval["mean"], **{k: interval[k] for k in ("low", "high", "n")}}
