"""What the six tasks share: rows of scores, a resumable run over samples, and the summary with its intervals. A task turns one sample (an
episode, a pair, a clip, ...) into rows; a row holds, for every feature source, a few numbers (`columns`) from which the metrics follow.
Metrics such as mIoU are ratios of sums over items, hence a metric is a statistic `(weights (n_boot, n), values (n, k)) -> (n_boot,)`, see
`kvutils.metrics.statistics`."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import torch

from kvutils.errors import DataError, ImageError, ParameterError
from kvutils.metrics.layers import build_then_degrade, each_layer
from kvutils.metrics.statistics import Statistic, bootstrap_ci, resample
from kvutils.probes import ConvergenceError
from kvutils.readout.features import HEADS, FeatureExtractor, ImageFeatures, Opener, Picture, picture_key
from kvutils.store import Parts, in_chunks
from kvutils.tasks.tables import FIRST, SHUFFLED, UNTRAINED, BestValues, Group, ScoreTable, by_layer, differences

SKIPPED, FEW = 0.1, 5  # a run stops when more than both, a share and a number, of its samples cannot be scored


def sample_seed(*names: str) -> int:
    """A seed from names: the same on every machine, another for every sample."""
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:4], "big")


def shuffled_labels(labels: torch.Tensor, seed: int, known: torch.Tensor) -> torch.Tensor:
    """Control: labels (N,) permuted among the `known` ones (N,) bool, the same on every machine. The share of each class is kept, so a
    probe that beats chance on new images with these has found no meaning in them."""
    out = labels.clone()
    out[known] = torch.from_numpy(np.random.default_rng(seed).permutation(labels[known].numpy()))
    return out


@dataclass(frozen=True)
class Row:
    """Scores of one scored item: its id, its group, and per source its `columns`."""

    id: str
    group: Group
    values: dict[str, tuple[float, ...]]


class Task(ABC):
    """One task over its samples. `columns` are the numbers per row and source; `shuffled`: it has a control of shuffled labels or texts;
    `statistic` is the headline metric of values (n, k) for each row of weights (n_boot, n), called `metric`;
    `parameters` (JSON-able) are all that changes the scores but the samples."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    shuffled: ClassVar[bool] = False
    chunk: ClassVar[int] = 25  # samples that are scored, and kept, together
    statistic: ClassVar[Statistic]
    statistics: ClassVar[Mapping[str, Statistic]] = {}  # the other metrics, by name
    parameters: Mapping[str, Any] = {}
    lacking: frozenset[str] = frozenset()  # sources of which `prepare` finds that no sample can have a score

    def __init__(self, samples: Sequence[Any]):
        self.samples = samples

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        """The sources of this task's rows, in order."""
        shuffled = [f"{SHUFFLED}value.{layer}" for layer in extractor.layers] if self.shuffled else []
        return extractor.sources + shuffled

    def reads(self, source: str, extractor: FeatureExtractor) -> str:
        """The feature source that a source of rows is made of."""
        return source.removeprefix(SHUFFLED)

    @abstractmethod
    def images(self, sample: Any) -> list[tuple[str, Opener]]:
        """Id of every image of a sample, and what opens it when its features are not in memory; equal ids are equal images."""

    def near(self, sample: Any) -> str:
        """Samples of one name share pictures: they are scored one after the other."""
        return ""

    def split(self, sample: Any) -> str:
        """Rows of one name are in one half where a layer is chosen on the other; "": rows of one group."""
        return ""

    @abstractmethod
    def score(self, sample: Any, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor) -> list[Row]:
        """Rows of a sample from the features of its images; none if it cannot be scored. Depends on nothing else."""

    def prepare(self, extractor: FeatureExtractor) -> None:  # noqa: B027
        """Work before the first sample, such as fitting a probe; left out when every part is stored."""


def opener(sample: Any, field: str = "image") -> Opener:
    """Opens a picture of a sample when it is needed: fields may be files."""
    return partial(getattr, sample, field)


def run_task(task: Task, extractor: FeatureExtractor, parts: Parts | None = None, progress: bool = True, chunk: int | None = None) -> ScoreTable:
    """Score all samples of a task. With `parts`, finished chunks are kept there and a run that was stopped goes on. Bytes do not depend on
    interruptions. A sample that cannot be scored (a damaged picture, a mask of another size) is skipped and says why; so is a row where a
    source is not finite, but a source of which more than `SKIPPED` of the rows are not is left out itself. Raises DataError when no sample
    can be scored, or too many cannot, see `SKIPPED`."""
    sources, order = task.sources(extractor), sorted(range(len(task.samples)), key=lambda i: task.near(task.samples[i]))
    depends = [task.name, task.parameters, sources, list(task.columns), extractor.fingerprint]
    prepare = cache(task.prepare)  # once, before the first chunk that is not stored
    read = {source: task.reads(source, extractor) for source in sources}
    wanted, keys = {*extractor.sources, *HEADS}.intersection(read.values()), {}

    def pictures(sample: Any) -> Iterator[Picture]:
        """One whose key is known is not opened for it again."""
        for name, opened in task.images(sample):
            if name not in keys:
                image = opened()
                keys[name], opened = picture_key(image), image.copy  # it is open already
            yield name, keys[name], opened

    def coming(samples: Sequence) -> Iterator[Picture]:
        for sample in samples:
            with suppress(DataError, ImageError):  # said when it is its turn
                yield from pictures(sample)

    def score(sample: Any, *more: Any) -> dict:
        try:
            features = {name: extractor.image(name, *rest, sources=wanted, ahead=coming([sample, *more])) for name, *rest in pictures(sample)}
            rows = task.score(sample, features, extractor)
        except (DataError, ImageError, ConvergenceError) as error:
            return {"id": sample.id, "rows": [], "why": str(error).removeprefix(f"{sample.id}: ")}
        lacking = task.lacking.union(*(each.not_finite for each in features.values()))
        none = [None] * len(task.columns)
        rows = [[row.id, row.group, [none if {s, read[s]} & lacking else row.values[s] for s in sources]] for row in rows]
        why = "" if rows else "nothing in it can be scored"
        return {"id": sample.id, "rows": rows, "why": why, "split": task.split(sample), "pictures": list(features)}

    def compute(some: list) -> list[dict]:
        prepare(extractor)
        return [score(*some[place:]) for place in range(len(some))]

    size, found, skipped = task.chunk if chunk is None else chunk, [], {}
    for part in in_chunks(parts, task.name, [task.samples[i] for i in order], compute, size, depends, progress=progress):
        found += part
        skipped |= {each["id"]: each["why"] for each in part if not each["rows"]}
        if len(skipped) > max(FEW, SKIPPED * len(order)):
            raise _too_many(task, skipped, parts)
    rows = [(name, tuple(group) if isinstance(group, list) else group, scores, each["split"], tuple(each["pictures"]))
            for _, each in sorted(zip(order, found, strict=True), key=lambda pair: pair[0]) for name, group, scores in each["rows"]]
    if not rows:
        raise _too_many(task, skipped, parts)
    values = np.array([row[2] for row in rows], dtype=float)  # (n, S, k)
    missing = np.isnan(values).any(-1)
    left = missing.mean(0) > SKIPPED
    if left.all():
        raise DataError(f"{task.name}: no source has finite features and a probe that converged; load the model in float32, or raise max_iter")
    whole = ~missing[:, ~left].any(1)
    skipped |= {row[0]: f"{sources[int((lacks & ~left).argmax())]} is not finite" for row, lacks in zip(rows, missing, strict=True)
                if (lacks & ~left).any()}  # fmt: skip
    if not whole.any():
        raise _too_many(task, skipped, parts)
    ids, groups, splits, shown = ([row[i] for row, kept in zip(rows, whole, strict=True) if kept] for i in (0, 1, 3, 4))
    splits = [split or group for split, group in zip(splits, groups, strict=True)]
    left_out = {source: int(missing[:, i].sum()) for i, source in enumerate(sources) if left[i]}
    sources = [source for source in sources if source not in left_out]
    return ScoreTable(task.name, ids, groups, sources, list(task.columns), values[whole][:, ~left], skipped, left_out, splits, shown)


def _too_many(task: Task, skipped: Mapping[str, str], parts: Parts | None) -> DataError:
    first = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
    stored = f", remove {parts.folder}, where they are stored as skipped," if parts else ""
    return DataError(f"{task.name}: {len(skipped)} of {len(task.samples)} samples could not be scored ({first}); mend them{stored} and run again")


def summarise(table: ScoreTable, task: Task, n_boot: int = 2000, seed: int = 0) -> dict:
    """Every metric of every source with its interval, and the tests on layers; JSON-able.

    skipped, why_skipped, left_out: what has no score, see `ScoreTable`. sources: headline metric per source. secondary: the other metrics.
    Layers are chosen on one half of the rows and read on the other, both ways, anew in every resample, from 1 on: values of layer 0 are a
    linear map of the projector's output. build_then_degrade: per family of at least three such layers, but of controls, what `layers.build_then_degrade`
    finds; its peak in layers, and as a share of the depth. value_best: see `BestValues`; its score, and its paired differences to every
    source without layers, to the first value projection, and to the "control". no_layer: why no layer was chosen."""
    summary: dict = {"task": table.task, "title": task.title, "metric": task.metric, "n": len(table), "groups": table.units,
                     "skipped": len(table.skipped), "parameters": task.parameters, "why_skipped": dict(table.skipped),
                     "left_out": dict(table.left_out), "sources": _intervals(table, task.statistic, n_boot, seed),
                     "secondary": {name: _intervals(table, s, n_boot, seed) for name, s in task.statistics.items()},
                     "build_then_degrade": {}}  # fmt: skip
    try:
        halves = table.halves(seed)
    except ParameterError:
        return summary | {"no_layer": f"{table.units} units are too few to choose a layer and to read it"}
    families = {re.sub(r"\.\d+$", "", s) for s in table.sources if re.search(r"\.\d+$", s) and not s.startswith((SHUFFLED, UNTRAINED))}
    for family in sorted(families):
        layers = {layer: source for layer, source in by_layer(table.sources, family) if layer > 0}
        if len(layers) >= 3:
            curve = np.stack([table.of(source) for source in layers.values()], axis=1)
            found, numbers = build_then_degrade(curve, halves, table.groups, task.statistic, n_boot, seed), list(layers)
            peak = {key: numbers[int(found["peak"][key])] for key in ("mean", "low", "high")}
            summary["build_then_degrade"][family] = found | {"layers": numbers, "best": [numbers[index] for index in found["best"]],
                                                             "peak": peak,
                                                             "peak_depth": {key: layer / numbers[-1] for key, layer in peak.items()}}  # fmt: skip
    if any(layer for layer, _ in by_layer(table.sources, "value")):
        best = BestValues.of(table, task.statistic, halves)
        others = {name: table.level(name, task.statistic) for name in table.sources if "." not in name or name == FIRST}
        others |= {"control": best.control_level} if best.control_level else {}
        minus = differences({name: (best.level, other) for name, other in others.items()}, table, n_boot, seed, around=True)
        score = resample(best.level, len(table), n_boot, seed, table.groups, around=True).intervals().as_dict()
        summary["value_best"] = {"layers": best.layers, "score": score, "minus": minus, "control": best.control, "nothing": best.nothing}
    return summary


def _intervals(table: ScoreTable, statistic: Statistic, n_boot: int, seed: int) -> dict[str, dict]:
    found = bootstrap_ci(table.values, each_layer(statistic), n_boot, seed, table.groups)
    return {source: interval.as_dict() for source, interval in zip(table.sources, found, strict=True)}
