"""X6: do batch size, precision, attention backend, image backend or resolution change any figure? Under each setting, one change to how a
model runs, the headline scores of the six tasks are measured again, in a middle and in the last layer of the values, on some of the same
items, and POPE's F1. Every picture is read alone: a batch can change answers only."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from kvutils.checkpoints import QWEN
from kvutils.datasets import USES, open_dataset
from kvutils.errors import DataError, ImageError, MemoryLimitError, ModelError, ParameterError
from kvutils.metrics.effects import measured, part
from kvutils.metrics.statistics import UNDEFINED, paired_difference, resample
from kvutils.models import MLM
from kvutils.processors import other_backend
from kvutils.readout.features import FeatureExtractor
from kvutils.store import Parts, digest, in_chunks
from kvutils.tasks.base import ScoreTable, Task, run_task
from kvutils.tasks.key_blocking import NONE, ask_under_blocks
from kvutils.tasks.yes_no import Answers, Pope

log = logging.getLogger(__name__)
PICTURES, FEWEST = 40, 4  # of each task, about; its items at least
BATCH = 16  # prompts that are answered together
COARSE = 3 / 4  # of the side of a picture
DTYPES, ATTENTION = ("float32", "bfloat16", "float16"), ("sdpa", "eager")
UNDER = "settings_"  # before the name of a task: its table under other settings
Load, T = Callable[..., MLM], TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """A model, pictures at `scale` of their side and brought back, and how many prompts are answered together."""

    mlm: MLM
    scale: float = 1.0
    batch_size: int = BATCH

    def shown(self, image: Image.Image) -> Image.Image:
        """A picture as the model is shown it: of the same size, so that points and masks fit it."""
        small = [max(1, round(side * self.scale)) for side in image.size]
        return image if self.scale == 1 else image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


class ValueReader(FeatureExtractor):
    """The image values of some layers under a setting, and nothing else."""

    def __init__(self, setting: Setting, layers: Sequence[int]):
        super().__init__(setting.mlm, layers=layers, keys=False)
        self.setting, self.shown = setting, setting.shown
        self.alignment.sources = self.sources

    @property
    def sources(self) -> list[str]:
        return [f"value.{layer}" for layer in self.layers]

    @property
    def fingerprint(self) -> str:
        return digest([super().fingerprint, self.setting.scale])


def settings_of(mlm: MLM, load: Load, pixels: Callable[[], float]) -> dict[str, Callable[[], Setting]]:
    """The settings of a model by name; each is made when it is called, and raises ParameterError where it cannot be had. load(dtype=,
    attention=) gives the model anew. pixels: of a usual picture. A lower resolution is `COARSE` of the side: fixed grids of tokens are
    shown pictures made smaller and brought back, Qwen2.5-VL gets fewer tokens. float16 is for GPUs alone."""
    now = {"dtype": str(mlm.dtype).removeprefix("torch."), "attention": mlm.attention}
    looks = {name: getattr(mlm, name) for name in ("base_view_only", "max_pixels", "pad_to_square", "prompts")}

    def loaded(**change: str) -> Setting:
        if change.get("dtype") == "float16" and mlm.device.type == "cpu":
            raise ParameterError("float16 is for GPUs; a CPU takes three times as long for it as for float32")
        return Setting(replace(load(**now | change), **looks))

    found: dict[str, Callable[[], Setting]] = {"batch size 1": lambda: Setting(mlm, batch_size=1)}
    found |= {f"precision {name}": partial(loaded, dtype=name) for name in DTYPES if name != now["dtype"]}
    found |= {f"attention {name}": partial(loaded, attention=name) for name in ATTENTION if name != now["attention"]}
    backend = "torchvision" if mlm.image_backend == "pil" else "pil"
    found[f"image backend {backend}"] = lambda: Setting(replace(mlm, processor=other_backend(mlm.processor, mlm.family)))
    fewer = lambda: int(COARSE**2 * min(pixels(), mlm.max_pixels or math.inf))  # noqa: E731
    lower = (lambda: Setting(replace(mlm, max_pixels=fewer()))) if mlm.family == QWEN else lambda: Setting(mlm, COARSE)
    return found | {f"resolution {COARSE:g} of the side": lower}


def some_of(task: Task, pictures: int = PICTURES) -> Task:
    """A task with a few of its samples, spread over all of them, that show about so many pictures."""
    few = copy.copy(task)
    few.samples = _spread(task.samples, max(FEWEST, pictures // len(task.images(task.samples[0]))))
    return few


def _spread(items: Sequence[T], count: int) -> list[T]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def open_pope(profile: str, data_options: Mapping[str, Mapping | None]) -> Pope | None:
    """POPE as notebook 03 reads it, from the hub where others are read from there; None where it is not to be had."""
    hub = any((options or {}).get("root") == "hub" for options in data_options.values())
    try:
        return Pope(open_dataset(USES[profile]["03"]["pope"], "hub" if hub else None))
    except DataError as error:
        log.warning("X6 goes without POPE: %s", error)
        return None


def measure_settings(tasks: Mapping[str, Task], tables: Mapping[str, ScoreTable], pope: Pope | None, mlm: MLM, load: Load,
                     parts: Parts | None = None, *, pictures: int = PICTURES,
                     progress: bool = True) -> tuple[dict[str, ScoreTable | Answers], dict[str, str]]:  # fmt: skip
    """Every headline score and POPE's answers under every setting, and of other settings why they cannot be had or have nothing to change.
    tables: the tasks' scores under the model's own settings, of all layers. Those under others are of a middle and of the last layer, by
    the name `settings_<task>`: a row for each row of `tables` that was measured, sources such as `precision bfloat16/value.7`; NaN where
    there is no score. `settings_pope`: a condition per setting, the model's own as `NONE`. pictures: of each task, and of POPE."""
    layers = sorted({mlm.num_layers // 2, mlm.num_layers - 1})
    few = [some_of(task, pictures) for name, task in tasks.items() if name in tables]
    if pope is not None:
        shown = set(_spread(pope.images, pictures))
        pope = Pope([sample for sample in pope.samples if sample.image_id in shown])
    first = [task.images(task.samples[0])[0][1] for task in few]
    plain, left_out = Setting(mlm), {}
    scored: dict[str, dict[str, ScoreTable]] = {}
    said = {} if pope is None else {NONE: _answers(pope, plain, parts)}
    for name, make in tqdm(settings_of(mlm, load, lambda: np.median([np.prod(each().size) for each in first] or [1])).items(), "settings", disable=not progress):
        setting = reader = None  # the model before is put away first: two hardly fit
        try:
            setting, now = make(), {}
            if setting.batch_size == plain.batch_size:
                reader = ValueReader(setting, layers)
                now = {task.name: run_task(task, reader, parts, progress=False) for task in few}
            said |= {} if pope is None else {name: _answers(pope, setting, parts)}
        except (DataError, ImageError, MemoryLimitError, ModelError, ParameterError) as error:  # such as values that exceed a precision
            left_out[name] = str(error)
            continue
        for task, table in now.items():
            scored.setdefault(task, {})[name] = table
        if pope is None and not now:
            left_out[name] = "nothing is answered without POPE, which could not be read"
    sources = [f"value.{layer}" for layer in layers]
    found: dict[str, ScoreTable | Answers] = {UNDER + task: _beside(tables[task], each, sources) for task, each in scored.items()}
    return found | ({} if pope is None else {UNDER + pope.name: Answers(pope, said, {})}), left_out


def _beside(before: ScoreTable, under: Mapping[str, ScoreTable], sources: Sequence[str]) -> ScoreTable:
    """The tables of several settings as one, with the rows of `before` that any of them has."""
    scores = {f"{setting}/{source}": dict(zip(table.ids, table.of(source), strict=True)) if source in table.sources else {}
              for setting, table in under.items() for source in sources}  # fmt: skip
    kept, nothing = {name for table in under.values() for name in table.ids}, [math.nan] * len(before.columns)
    ids, groups = zip(*((name, group) for name, group in zip(before.ids, before.groups, strict=True) if name in kept), strict=True)
    values = np.array([[found.get(name, nothing) for found in scores.values()] for name in ids])
    return ScoreTable(before.task, list(ids), list(groups), list(scores), before.columns, values)


def setting_changes(measured: Mapping[str, ScoreTable | Answers], tasks: Sequence[type[Task]], left_out: Mapping[str, str],
                    n_boot: int = 2000, seed: int = 0) -> dict:  # fmt: skip
    """Every setting's change of every headline score, with it minus without, paired; JSON-able. measured: of `run_task` and
    `measure_settings`. layers: those that are compared. changes: setting -> score -> part, in points."""
    changes: dict[str, dict] = {name: {} for name in getattr(measured.get(UNDER + Pope.name), "texts", {}) if name != NONE}
    layers = set()
    for task in (each for each in tasks if UNDER + each.name in measured):
        before, after = measured[task.name], measured[UNDER + task.name]
        places = {name: place for place, name in enumerate(before.ids)}
        same = np.array([places[name] for name in after.ids], dtype=int)
        for each in after.sources:
            (setting, _, source), values = each.rpartition("/"), after.of(each)
            layer, known = source.rpartition(".")[2], np.isfinite(values).all(axis=1)
            name, change = f"{task.title}, layer {layer}", UNDEFINED
            if there := known.any() and source in before.sources:
                groups = [after.groups[row] for row in np.flatnonzero(known)]
                change = paired_difference(values[known], before.of(source)[same[known]], task.statistic, n_boot, seed, groups).scaled(100)
            reason = "too few independent units" if there else "the values are not finite with or without it"
            changes.setdefault(setting, {})[name] = part(f"{setting}: {name}", change, reason)
            layers.add(int(layer))
    if UNDER + Pope.name in measured:
        asked = measured[UNDER + Pope.name]
        pope, name = asked.task, f"{asked.task.title}, F1"
        for setting in changes:  # of the headline, resampled over images
            values = [pope.values(asked.texts[each]) for each in (setting, NONE)]

            def change(weights: np.ndarray, values: Sequence[np.ndarray] = values) -> np.ndarray:
                now, before = (np.einsum("rn,ns,nk->rsk", weights, pope.member, each, optimize=True) for each in values)
                return pope.measures(now)[pope.metric] - pope.measures(before)[pope.metric]

            found = resample(change, len(pope.samples), n_boot, seed, pope.image_of.tolist()).effects().scaled(100)
            changes[setting][name] = part(f"{setting}: {name}", found)
    return {"layers": sorted(layers), "changes": changes, "left_out": dict(sorted(left_out.items()))}


def _answers(pope: Pope, setting: Setting, parts: Parts | None) -> list[str]:
    opened = {each.image_id: partial(lambda sample: setting.shown(sample.image), each) for each in pope.samples}
    asked = Pope([replace(sample, picture=opened[sample.image_id], size=None) for sample in pope.samples])

    def ask(some: list) -> list[str]:
        return ask_under_blocks(asked, setting.mlm, {NONE: None}, batch_size=setting.batch_size, progress=False).texts[NONE]

    depends = [setting.mlm.settings, setting.scale, setting.batch_size]
    return list(in_chunks(parts, "settings/pope", asked.samples, ask, len(asked.samples), depends, progress=False))[0]


def claim_x6(found: Mapping) -> dict:
    """X6. The largest of many changes is biased upwards and says little by itself; what decides is a bound that holds for every score.
    So the primary comparison is the change whose 90 % interval reaches furthest from 0; all others are listed."""
    listed = [each for scores in found["changes"].values() for each in scores.values()]
    known = [each for each in listed if each["low90"] is not None]
    primary = max(known, key=lambda each: max(-each["low90"], each["high90"]), default=part("any setting", reason="no setting can be changed here"))
    notes = [largest_change(name, scores) for name, scores in found["changes"].items()]
    notes += [f"{name}: not measured ({why.rstrip('.')})" for name, why in found["left_out"].items()]
    about = {"what": f"change whose interval reaches furthest ({primary['name']})"}
    return measured(primary | about, [each for each in listed if each is not primary], note=f"Largest changes, in points: {'; '.join(notes)}.")


def largest_change(setting: str, scores: Mapping[str, Mapping]) -> str:
    """The score that a setting changes most, in words, and how much the scores of other tasks change at most."""
    sizes = {score: abs(each["value"]) for score, each in scores.items() if each["value"] is not None}
    if not sizes:
        return f"{setting}: not defined"
    most = max(sizes, key=sizes.get)
    others = [size for score, size in sizes.items() if score.split(",")[0] != most.split(",")[0]]
    return f"{setting}: {round(scores[most]['value'], 2) + 0.0:+.2f} ({most})" + (f", other tasks at most {max(others):.2f}" if others else "")
