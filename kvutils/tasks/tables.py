"""Scores of a task as a table, the best value layer of it, and what that is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvutils.errors import ParameterError, one_of
from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import Level, Statistic, bootstrap_ci, paired_difference, resample, units_of
from kvutils.store import Frame

SHUFFLED, UNTRAINED = "shuffled.", "untrained."  # prefixes of control sources
FIRST = "value.0"  # the first value projection: a linear map of the projector's output, no attention has run
NOTHING = 0.005  # a score below half a point
Group = str | tuple[str, str]  # what is resampled together; two names: an item of two units, such as a pair of pictures


def by_layer(sources: Iterable[str], family: str) -> list[tuple[int, str]]:
    """(layer, source) of the sources `<family>.<layer>`, by layer."""
    found = (re.fullmatch(re.escape(family) + r"\.(\d+)", source) for source in sources)
    return sorted((int(match[1]), match[0]) for match in found if match)


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """All rows of a task: values (n, S, k) float64 for n ids, S sources, k columns. skipped: samples (or rows) without a score,
    and why; left_out: sources without one, and of how many rows. splits (n,): what stays together when halves are made, the groups
    where none are given; pictures (n,): ids of each row's pictures."""

    task: str
    ids: list[str]
    groups: list[Group]
    sources: list[str]
    columns: list[str]
    values: np.ndarray
    skipped: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    splits: Sequence[Group] = ()
    pictures: Sequence[tuple[str, ...]] = ()

    def __post_init__(self):
        # One layout in memory, that of `run_task`: the last bits of a sum depend on it, and a table that was read must give the same.
        object.__setattr__(self, "values", np.ascontiguousarray(self.values.transpose(1, 0, 2)).transpose(1, 0, 2))

    def __len__(self) -> int:
        return len(self.ids)

    def frame(self) -> Frame:
        """For a file: a row per id, a column such as `value.3/iou` per source and column; of a pair of units, the second in `group.2`."""
        scores = {f"{source}/{column}": self.values[:, i, j] for i, source in enumerate(self.sources) for j, column in enumerate(self.columns)}
        names = {"id": self.ids, **_written("group", self.groups), **_written("split", self.splits)}
        shown = {"pictures": [list(each) for each in self.pictures]} if self.pictures else {}
        about = {key: getattr(self, key) for key in ("task", "sources", "columns", "skipped", "left_out")}
        return Frame(names | shown | scores, about)

    @classmethod
    def of_frame(cls, frame: Frame) -> ScoreTable:
        """The table that `frame` wrote, with the same values to the last bit."""
        about = frame.about
        values = np.array([[frame[f"{source}/{column}"] for column in about["columns"]] for source in about["sources"]])  # (S, k, n)
        shown = [tuple(each) for each in frame["pictures"]] if "pictures" in frame.columns else ()
        return cls(about["task"], frame["id"], _read(frame, "group"), about["sources"], about["columns"], values.transpose(2, 0, 1),
                   about["skipped"], about["left_out"], _read(frame, "split"), shown)  # fmt: skip

    def of(self, source: str) -> np.ndarray:
        """(n, k) values of a source."""
        one_of(f"source of {self.task}", source, self.sources)
        return self.values[:, self.sources.index(source)]

    @property
    def units(self) -> int:
        """How many units the rows are resampled by."""
        return len({name for names in units_of(self.groups) for name in names})

    def halves(self, seed: int = 0) -> Halves:
        """Which rows choose a layer for which others. Splits stay together, and what shares a picture with the other half does not
        choose; where that leaves less than a tenth of the rows to choose, what shares a unit does not (the pictures that are scored are
        apart, others need not be), and then, or where there are fewer than 4 splits, groups stay together. ParameterError where
        there are fewer than 4 units."""
        units, splits = units_of(self.groups), self.splits if len(set(self.splits)) >= 4 else self.groups
        for together, apart in ((splits, self.pictures or units), (splits, units)):
            with suppress(ParameterError):
                halves = Halves.of(together, seed, apart)
                if halves.choosing.sum(axis=1).min() >= len(self) / 10:
                    return halves
        return Halves.of(self.groups, seed, units)

    def best_of(self, sources: Sequence[str], statistic: Statistic, halves: Halves) -> tuple[list[str], Level]:
        """The best of some sources for each half, chosen by the other [2], and their statistic, for which they are chosen anew by every weights."""
        values = self.values[:, [self.sources.index(source) for source in sources]]
        return [sources[index] for index in halves.best(values, statistic)], halves.chosen(values, statistic)

    def level(self, source: str, statistic: Statistic) -> Level:
        values = self.of(source)
        return lambda weights: statistic(weights, values)

    def interval(self, source: str, statistic: Statistic, n_boot: int, seed: int) -> dict:
        """A statistic of a source, with its interval; JSON-able."""
        return bootstrap_ci(self.of(source), statistic, n_boot, seed, self.groups).as_dict()

    def difference(self, source: str, other: str, statistic: Statistic, n_boot: int, seed: int) -> dict:
        """That of a source minus that of another, paired: an `Effect`, JSON-able."""
        return paired_difference(self.of(source), self.of(other), statistic, n_boot, seed, self.groups).as_dict()


def _written(name: str, groups: Sequence[Group]) -> dict[str, list]:
    """Units as columns of texts, the second of pairs apart."""
    pairs = [each if isinstance(each, tuple) else (each, None) for each in groups]
    columns = {name: [first for first, _ in pairs], f"{name}.2": [second for _, second in pairs]}
    return {key: column for key, column in columns.items() if any(each is not None for each in column)}


def _read(frame: Frame, name: str) -> Sequence[Group]:
    first, second = (frame.columns.get(key) for key in (name, f"{name}.2"))
    return first or () if second is None else [one if other is None else (one, other) for one, other in zip(first, second, strict=True)]


@dataclass(frozen=True, eq=False)
class BestValues:
    """The best value layer from 1 on, chosen for each half of a table on the other: two `layers`, and their `level`.

    control: the better of pixels and the untrained model's best layer, or where a task has no pixels of this and the wrong text's: two
    sources, and `control_level`; none where no control predicts anything. Layers are chosen across halves, the better of the two over all
    rows: a half that errs would take the weaker control, and every claim would gain by it (simulated: 40 % false ones). nothing: the
    controls whose score is below `NOTHING`, such as clusters of which none is salient, with it: to be better than these means little."""

    layers: list[int]
    level: Level
    control: list[str]
    control_level: Level | None
    nothing: dict[str, float]

    @classmethod
    def of(cls, table: ScoreTable, statistic: Statistic, halves: Halves) -> BestValues:
        plain, untrained, wrong = (by_layer(table.sources, f"{prefix}value") for prefix in ("", UNTRAINED, SHUFFLED))
        best, level = table.best_of([source for layer, source in plain if layer > 0], statistic, halves)
        pixels = [source for source in table.sources if source == "pixels"]
        kinds = {"pixels": pixels, "untrained values": [s for _, s in untrained], "wrong text": [] if pixels else [s for _, s in wrong]}
        read = {kind: table.best_of(names, statistic, halves) for kind, names in kinds.items() if names}
        scores = {kind: float(found(np.ones((1, len(table))))[0]) for kind, (_, found) in read.items()}
        nothing = {kind: score for kind, score in scores.items() if score < NOTHING}
        control = read[max(scores, key=scores.__getitem__)] if len(nothing) < len(scores) else ([], None)
        return cls([int(name.rpartition(".")[2]) for name in best], level, *control, nothing)


def differences(pairs: Mapping[str, tuple[Level, Level]], table: ScoreTable, n_boot: int, seed: int, **about: Any) -> dict:
    """The first minus the second of each pair of levels of a table's rows, all from the same resamples: name -> `Effect`, JSON-able."""

    def minus(weights: np.ndarray) -> np.ndarray:
        found = {level: level(weights) for level in {each for pair in pairs.values() for each in pair}}
        return np.stack([found[first] - found[second] for first, second in pairs.values()], axis=1)

    found = resample(minus, len(table), n_boot, seed, table.groups, **about).effects() if pairs else []
    return {name: each.as_dict() for name, each in zip(pairs, found, strict=True)}
