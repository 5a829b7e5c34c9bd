"""What the six tasks share: rows of scores, a resumable run over samples, and the summary with its intervals.

A task turns one sample (an episode, a pair, a clip, ...) into rows; a row holds, for every feature source, a few numbers
(`columns`) from which the metrics follow. Metrics such as mIoU are ratios of sums over items, hence a metric is a
statistic `(weights (n_boot, n), values (n, k)) -> (n_boot,)`, see `kvutils.metrics.statistics`.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from kvutils.errors import DataError, one_of
from kvutils.metrics.statistics import Statistic, bootstrap_ci, choosing_half, paired_difference, peak_then_degrade
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Item
from kvutils.store import Parts, in_chunks

SHUFFLED, UNTRAINED = "shuffled.", "untrained."  # prefixes of control sources


def sample_seed(*names: str) -> int:
    """A seed from names: the same on every machine, another for every sample."""
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:4], "big")


def shuffled_labels(labels: torch.Tensor, seed: int, known: torch.Tensor) -> torch.Tensor:
    """Control: labels (N,) permuted among the `known` ones (N,) bool, the same on every machine.

    The share of each class is kept, so a probe that beats chance on new images with these has found no meaning in them."""
    out = labels.clone()
    out[known] = torch.from_numpy(np.random.default_rng(seed).permutation(labels[known].numpy()))
    return out


def by_layer(sources: Iterable[str], family: str) -> list[tuple[int, str]]:
    """(layer, source) of the sources `<family>.<layer>`, by layer."""
    found = (re.fullmatch(re.escape(family) + r"\.(\d+)", source) for source in sources)
    return sorted((int(match[1]), match[0]) for match in found if match)


@dataclass(frozen=True)
class Row:
    """Scores of one scored item: its id, its group (the unit of resampling), and per source its `columns`."""

    id: str
    group: str
    values: dict[str, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """All rows of a task: values (n, S, k) float64 for n ids, S sources, k columns. skipped: samples without a score."""

    task: str
    ids: list[str]
    groups: list[str]
    sources: list[str]
    columns: list[str]
    values: np.ndarray
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, source: str) -> np.ndarray:
        """(n, k) values of a source."""
        one_of(f"source of {self.task}", source, self.sources)
        return self.values[:, self.sources.index(source)]

    def held_out(self, seed: int = 0) -> ScoreTable:
        """The rows of the half of the groups that chooses no layer, see `choosing_half`."""
        kept = np.flatnonzero(~choosing_half(self.groups, seed))
        ids, groups = ([names[i] for i in kept] for names in (self.ids, self.groups))
        return replace(self, ids=ids, groups=groups, values=self.values[kept])

    def interval(self, source: str, statistic: Statistic, n_boot: int, seed: int) -> dict:
        """A statistic of a source, with its interval; JSON-able."""
        return bootstrap_ci(self.of(source), statistic, n_boot, seed, self.groups).as_dict()

    def difference(self, source: str, other: str, statistic: Statistic, n_boot: int, seed: int) -> dict:
        """That of a source minus that of another, paired; JSON-able."""
        return paired_difference(self.of(source), self.of(other), statistic, n_boot, seed, self.groups).as_dict()


class Task(ABC):
    """One task over its samples. `columns` are the numbers per row and source; `control` prefixes the control sources;
    `statistic` is the headline metric of values (n, k) for each row of weights (n_boot, n), called `metric`;
    `parameters` (JSON-able) are all that changes the scores but the samples."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    control: ClassVar[str]
    chunk: ClassVar[int] = 25  # samples that are scored, and kept, together
    statistic: ClassVar[Statistic]
    statistics: ClassVar[Mapping[str, Statistic]] = {}  # the other metrics, by name
    parameters: Mapping[str, Any] = {}

    def __init__(self, samples: Sequence[Any]):
        self.samples = samples

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        """The sources of this task's rows, in order."""
        shuffled = [f"{SHUFFLED}value.{layer}" for layer in extractor.layers] if self.control == SHUFFLED else []
        return extractor.sources + shuffled

    @abstractmethod
    def images(self, sample: Any) -> list[Item]:
        """(id, image) of every image of a sample; equal ids are equal images."""

    @abstractmethod
    def score(self, sample: Any, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor) -> list[Row]:
        """Rows of a sample from the features of its images; none if it cannot be scored. Depends on nothing else."""

    def prepare(self, extractor: FeatureExtractor) -> None:  # noqa: B027
        """Work before the first sample, such as fitting a probe; left out when every part is stored."""


class _Batches:
    """The images of a chunk in fixed batches, whatever is already in memory: a resumed run repeats them exactly."""

    def __init__(self, extractor: FeatureExtractor, images: Iterable[Item]):
        self.extractor = extractor
        unique = list(dict(images).items())
        size = extractor.batch_size
        self.batches = [unique[i : i + size] for i in range(0, len(unique), size)]
        self.keys = [extractor.batch_key(batch) for batch in self.batches]
        self.where = {name: divmod(i, size) for i, (name, _) in enumerate(unique)}

    def features(self, name: str) -> ImageFeatures:
        batch, place = self.where[name]
        return self.extractor.batch(self.keys[batch], self.batches[batch])[place]


def run_task(
    task: Task, extractor: FeatureExtractor, parts: Parts | None = None, progress: bool = True, chunk: int | None = None
) -> ScoreTable:
    """Score all samples of a task. With `parts`, finished chunks are kept there and a run that was stopped goes on.

    Bytes do not depend on interruptions. Raises DataError when no sample can be scored.
    """
    sources = task.sources(extractor)
    depends = [task.name, task.parameters, sources, list(task.columns), extractor.fingerprint]
    prepare = cache(task.prepare)  # once, before the first chunk that is not stored

    def compute(samples: list) -> dict:
        prepare(extractor)
        items = [task.images(sample) for sample in samples]  # once: it may decode files
        batches = _Batches(extractor, (item for each in items for item in each))
        done: dict = {"rows": [], "skipped": []}
        for sample, each in zip(samples, items, strict=True):
            scored = task.score(sample, {name: batches.features(name) for name, _ in each}, extractor)
            done["rows"] += [[row.id, row.group, [row.values[s] for s in sources]] for row in scored]
            done["skipped"] += [] if scored else [sample.id]
        return done

    size = task.chunk if chunk is None else chunk
    rows = list(in_chunks(parts, task.name, task.samples, compute, size, depends, progress=progress))
    found = [row for part in rows for row in part["rows"]]
    if not found:
        raise DataError(f"{task.name}: none of {len(task.samples)} samples could be scored")
    ids, groups, values = ([row[i] for row in found] for i in range(3))
    skipped = [name for part in rows for name in part["skipped"]]
    return ScoreTable(task.name, ids, groups, sources, list(task.columns), np.array(values, dtype=float), skipped)


def summarise(table: ScoreTable, task: Task, n_boot: int = 2000, seed: int = 0) -> dict:
    """Every metric of every source with its interval, and the tests on layers; JSON-able.

    sources: headline metric per source. secondary: the other metrics. build_then_degrade: per family of layers (value,
    key, ...) what `peak_then_degrade` finds. value_best: the best value layer, chosen on one half of the groups; its score
    and its paired differences to every other source, and to its own control, on the other half. Families are tested only
    with at least 4 groups.
    """
    summary: dict = {
        "task": table.task, "title": task.title, "metric": task.metric,
        "n": len(table), "groups": len(set(table.groups)), "skipped": len(table.skipped), "parameters": task.parameters,
        "sources": _intervals(table, task.statistic, n_boot, seed),
        "secondary": {name: _intervals(table, s, n_boot, seed) for name, s in task.statistics.items()},
        "build_then_degrade": {},
    }  # fmt: skip
    if summary["groups"] < 4:
        return summary
    for family in sorted({re.sub(r"\.\d+$", "", s) for s in table.sources if re.search(r"\.\d+$", s)}):
        numbers, sources = zip(*by_layer(table.sources, family), strict=True)
        if len(numbers) > 1:
            curve = np.stack([table.of(source) for source in sources], axis=1)
            found = peak_then_degrade(curve, table.groups, seed, task.statistic, n_boot)
            peak, low, high = (numbers[int(found["peak"][name])] for name in ("mean", "low", "high"))
            summary["build_then_degrade"][family] = found | {
                "layers": list(numbers), "best_layer": numbers[found["best"]],
                "peak_layer": peak, "peak_layer_low": low, "peak_layer_high": high,
            }  # fmt: skip
    if "value" in summary["build_then_degrade"]:
        best = f"value.{summary['build_then_degrade']['value']['best_layer']}"
        rest, options = table.held_out(seed), (task.statistic, n_boot, seed)
        minus = {source: rest.difference(best, source, *options) for source in table.sources if source != best}
        score = rest.interval(best, *options)
        summary["value_best"] = {"source": best, "score": score, "minus": minus, "control": task.control + best}
    return summary


def _intervals(table: ScoreTable, statistic: Statistic, n_boot: int, seed: int) -> dict[str, dict]:
    def curve(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.stack([statistic(weights, values[:, s]) for s in range(values.shape[1])], axis=1)

    found = bootstrap_ci(table.values, curve, n_boot, seed, table.groups)
    return {source: interval.as_dict() for source, interval in zip(table.sources, found, strict=True)}
