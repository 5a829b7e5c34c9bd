"""POPE and MME: one answer per question, read as the authors' scripts do, and scores with intervals over images. An answer set is a list of
texts, one per sample of the task, in that order. Whatever gives it (a plain model, one with keys blocked), nothing here knows about
models."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvutils.datasets.mme import GROUPS, SUBTASKS
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError
from kvutils.metrics.answers import mme_parse, pope_counts, pope_parse
from kvutils.metrics.statistics import Interval, Resampled, ratio, resample, with_draws
from kvutils.store import Frame

Measures = dict[tuple[str, str], np.ndarray]  # (subset or summary, metric) -> (n_boot,)
MEAN, POOLED, TOTAL = "mean", "pooled", "total"
_ASKED = ("id", "image_id", "subset", "question", "truth")


class YesNoTask(ABC):
    """Questions with a yes or no each, in subsets, and their scores; DataError for no samples or an image_id of two images."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[tuple[str, str]]  # the headline: (subset or summary, metric)
    smallest: float  # effect of interest, in the headline's unit

    def __init__(self, samples: Sequence[YesNoSample]):
        self.samples = list(samples)
        if not self.samples:
            raise DataError(f"{self.name}: no questions")
        pictures: dict[str, object] = {}
        for sample in self.samples:
            first = pictures.setdefault(sample.image_id, sample.picture)
            if first is not sample.picture and first != sample.picture:
                raise DataError(f"{self.name}: two images have the id {sample.image_id!r}")
        self.subsets = list(dict.fromkeys(sample.subset for sample in self.samples))
        self.member = np.array([[sample.subset == name for name in self.subsets] for sample in self.samples])  # (n, subsets)
        self.questions = dict(zip(self.subsets, self.member.sum(axis=0).tolist(), strict=True))
        self.images = list(pictures)
        places = {name: place for place, name in enumerate(self.images)}
        self.image_of = np.array([places[sample.image_id] for sample in self.samples])  # (n,)

    @abstractmethod
    def read(self, answer: str) -> tuple[str, bool]:
        """What an answer is taken for, and whether it says neither yes nor no."""

    @abstractmethod
    def values(self, answers: Sequence[str]) -> np.ndarray:
        """(n, k) numbers per question; every metric is a function of their sums over questions."""

    @abstractmethod
    def measures(self, sums: np.ndarray) -> Measures:
        """Every metric from sums (n_boot, subsets, k) of the values over the questions of each subset."""

    def members(self, name: str) -> Sequence[str]:
        """The subsets that a subset or summary is over; all, if a task has no other."""
        return [name] if name in self.subsets else self.subsets

    def right(self, answers: Sequence[str]) -> np.ndarray:
        """(n,) bool: which questions are answered right."""
        said = {answer: self.read(answer)[0] for answer in set(answers)}
        return np.array([said[answer] == sample.truth for answer, sample in zip(answers, self.samples, strict=True)])

    def unknown(self, answers: Sequence[str]) -> np.ndarray:
        """(n,) bool: which answers say neither yes nor no."""
        neither = {answer: self.read(answer)[1] for answer in set(answers)}
        return np.array([neither[answer] for answer in answers])


class Pope(YesNoTask):
    """POPE: is an object in the image? F1 of yes, read as by POPE's own script (`pope_parse`). Scores per split, as `mean` over splits (the
    headline is its F1), and as `pooled` over all questions at once. f1 is 0 without a true positive; precision is undefined without a yes.
    What is no "no" is taken for yes, and counts as unknown without the word."""

    name, title = "pope", "POPE"
    metric = (MEAN, "f1")
    smallest = 0.015  # as claims C6 and X2 in data/claims.yaml, in points: half of the paper's +3.1

    def read(self, answer: str) -> tuple[str, bool]:
        said = pope_parse(answer)
        return said, said == "yes" and not re.search(r"\byes\b", answer.lower())

    def values(self, answers: Sequence[str]) -> np.ndarray:
        """(n, 8) TP, FP, TN, FN, right, said yes (`pope_counts`), unknown, 1."""
        counts = pope_counts(answers, [sample.truth for sample in self.samples])
        return np.column_stack([counts, self.unknown(answers), np.ones(len(counts))]).astype(float)

    def measures(self, sums: np.ndarray) -> Measures:
        each = {name: _pope_scores(sums[:, i]) for i, name in enumerate(self.subsets)}
        metrics = list(each[self.subsets[0]])
        each[MEAN] = {metric: np.mean([each[name][metric] for name in self.subsets], axis=0) for metric in metrics}
        each[POOLED] = _pope_scores(sums.sum(axis=1))
        return {(name, metric): scores[metric] for name, scores in each.items() for metric in metrics}


def _pope_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    tp, fp, _, fn, right, yes, unknown, n = sums.T
    return {"f1": 2 * tp / np.maximum(2 * tp + fp + fn, 1), "accuracy": ratio(right, n), "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn), "yes_ratio": ratio(yes, n), "unknown": ratio(unknown, n)}  # fmt: skip


class Mme(YesNoTask):
    """MME: two questions per image, one true and one false, read as by the authors' script (`mme_parse`).

    Per subtask: acc, share of questions that are right; acc_plus, share of images with both right; score, 100 times their sum (0 to 200).
    Summaries add scores up: `total` over the samples' subtasks that are MME's (the headline), and perception, cognition and hallucination
    where all of their subtasks are there. Another subtask is in no summary. An answer that is neither yes nor no is wrong, and counts as
    unknown: a subtask of such answers alone, on which the authors' script stops, scores 0. The smallest effect of interest is 1 % of the
    highest total (ours, the paper states no figure). Raises DataError unless a subtask is MME's, and every image of a subtask has two
    questions."""

    name, title = "mme", "MME"
    metric = (TOTAL, "score")

    def __init__(self, samples: Sequence[YesNoSample]):
        super().__init__(samples)
        self.pairs: dict[tuple[str, str], list[int]] = {}
        for number, sample in enumerate(self.samples):
            self.pairs.setdefault((sample.subset, sample.image_id), []).append(number)
        for (subtask, image), pair in self.pairs.items():
            if len(pair) != 2:
                raise DataError(f"MME {subtask}: image {image!r} has {len(pair)} questions, not two")
        self.totals = {TOTAL: [number for number, name in enumerate(self.subsets) if name in SUBTASKS]}
        if not self.totals[TOTAL]:
            raise DataError(f"MME's total needs a subtask of MME's, found {', '.join(self.subsets)}; name one of {', '.join(SUBTASKS)} in split=")
        self.smallest = 0.01 * 200 * len(self.totals[TOTAL])
        for name, members in GROUPS.items():
            if name != "all" and set(members) <= set(self.subsets):
                self.totals[name] = [self.subsets.index(member) for member in members]

    def read(self, answer: str) -> tuple[str, bool]:
        said = mme_parse(answer)
        return said, said == "other"

    def values(self, answers: Sequence[str]) -> np.ndarray:
        """(n, 5) right, both of the pair right, said yes, unknown, 1."""
        right, yes = self.right(answers), [self.read(answer)[0] == "yes" for answer in answers]
        both = np.zeros(len(right))
        for pair in self.pairs.values():
            both[pair] = right[pair].all()
        return np.column_stack([right, both, yes, self.unknown(answers), np.ones(len(right))]).astype(float)

    def measures(self, sums: np.ndarray) -> Measures:
        right, both, yes, unknown, n = np.moveaxis(sums, -1, 0)  # each (n_boot, subsets)
        acc, acc_plus = ratio(right, n), ratio(both, n)
        each = {"score": 100 * (acc + acc_plus), "acc": acc, "acc_plus": acc_plus, "yes_ratio": ratio(yes, n), "unknown": ratio(unknown, n)}
        found = {(name, key): value[:, i] for i, name in enumerate(self.subsets) for key, value in each.items()}
        for name, members in self.totals.items():
            score, said, neither, questions = (some[:, members].sum(axis=1) for some in (each["score"], yes, unknown, n))
            found |= {(name, "score"): score, (name, "yes_ratio"): ratio(said, questions), (name, "unknown"): ratio(neither, questions)}
        return found

    def members(self, name: str) -> Sequence[str]:
        return [self.subsets[i] for i in self.totals[name]] if name in self.totals else [name]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said to a task's questions under several conditions. texts: condition -> n answers; mass: condition -> (n,) the
    probability that yes and no hold together at the answer's beginning."""

    task: YesNoTask
    texts: Mapping[str, Sequence[str]]
    mass: Mapping[str, np.ndarray]

    @property
    def option_mass(self) -> dict[str, float]:
        return {name: float(np.mean(each)) for name, each in self.mass.items()}

    def under(self, names: Sequence[str]) -> Self:
        """The answers under some of the conditions."""
        return replace(self, texts={name: self.texts[name] for name in names}, mass={name: self.mass[name] for name in names})

    def frame(self) -> Frame:
        """A row per question, a column per condition."""
        columns = {name: [getattr(sample, name) for sample in self.task.samples] for name in _ASKED}
        columns |= {f"answer: {name}": list(said) for name, said in self.texts.items()}
        return Frame(columns | {f"yes or no: {name}": each for name, each in self.mass.items()}, {"task": self.task.name})

    @classmethod
    def of_frame(cls, frame: Frame) -> Self:
        """Its samples have no picture."""
        asked = [dict(zip(_ASKED, row, strict=True)) for row in zip(*(frame[name] for name in _ASKED), strict=True)]
        texts, mass = ({name.removeprefix(kind): each for name, each in frame.columns.items() if name.startswith(kind)}
                       for kind in ("answer: ", "yes or no: "))  # fmt: skip
        (task,) = (each for each in (Pope, Mme) if each.name == frame.about["task"])
        return cls(task([YesNoSample(picture=None, **each) for each in asked]), texts, mass)


@dataclass(frozen=True, eq=False)
class Scored:
    """Every metric of several answer sets to the same questions, resampled together over images. sets: name -> one answer text per
    question; keys: the (subset or summary, metric) of every metric; found: value (sets, metrics), draws (R, sets, metrics); right (sets, n)
    bool: which questions each set answers right."""

    task: YesNoTask
    sets: Mapping[str, Sequence[str]]
    keys: list[tuple[str, str]]
    found: Resampled
    right: np.ndarray

    @classmethod
    def of(cls, task: YesNoTask, sets: Mapping[str, Sequence[str]], n_boot: int = 2000, seed: int = 0) -> Self:
        """DataError where a set has more or fewer answers than the task has questions."""
        if wrong := [name for name, answers in sets.items() if isinstance(answers, str) or len(answers) != len(task.samples)]:
            raise DataError(f"{task.name}, {wrong[0]}: {len(sets[wrong[0]])} answers for {len(task.samples)} questions")
        values = np.stack([task.values(answers) for answers in sets.values()], axis=1)  # (n, sets, k)
        sums = np.zeros((len(task.images), len(sets), len(task.subsets), values.shape[-1]))  # over the questions of an image
        np.add.at(sums, task.image_of, values[:, :, None, :] * task.member[:, None, :, None])
        keys = list(task.measures(sums[:1].sum(axis=1)))

        def measured(weights: np.ndarray) -> np.ndarray:
            drawn = np.tensordot(weights, sums, 1)  # (R, sets, subsets, k)
            each = task.measures(drawn.reshape(-1, *drawn.shape[2:]))
            return np.stack([each[key] for key in keys], axis=1).reshape(*drawn.shape[:2], len(keys))

        right = np.stack([task.right(answers) for answers in sets.values()])
        return cls(task, sets, keys, resample(measured, len(task.images), n_boot, seed), right)

    def summary(self, name: str) -> dict:
        """Every metric of every subset of one answer set with its 95 % interval over images; JSON-able. scores: by subset, then summaries
        over subsets, each metric as mean, low, high, n. headline: one of them. errors: how many answers of its questions are not right;
        unknown: how many answers say neither yes nor no: they are scored as the authors do, never dropped."""
        place = list(self.sets).index(name)
        found = replace(self.found, value=self.found.value[place], draws=self.found.draws[:, place])
        mine = [self.task.subsets.index(subset) for subset in self.task.members(self.task.metric[0])]
        errors, unknown = self.task.member[:, mine].any(axis=1) & ~self.right[place], self.task.unknown(self.sets[name])
        return self._report(found.intervals()) | {"errors": int(errors.sum()), "unknown": int(unknown.sum())}

    def change(self, now: Sequence[str], before: Sequence[str]) -> dict:
        """Mean score of the sets `now` minus that of the sets `before`, an `Effect` of every metric, paired; JSON-able. Several sets are
        draws (of random keys, say) of many that could be: the variance between them counts as in `with_draws`, and a single set against
        several is judged as one more of theirs. changed: the share of questions that are right and were wrong, and the reverse, over all
        pairs of sets."""
        places, was = ([list(self.sets).index(name) for name in side] for side in (now, before))

        def between(values: np.ndarray) -> np.ndarray:
            return values[..., places, :].mean(axis=-2) - values[..., was, :].mean(axis=-2)

        found = replace(self.found, value=between(self.found.value), draws=between(self.found.draws)).effects()
        for side, other in ((places, was), (was, places)):
            if len(side) > 1:
                drawn = replace(self.found, value=self.found.value[side], draws=self.found.draws[:, side])
                found = with_draws(found, drawn, 1 / len(side) + (side is was and len(other) == 1))
        right, was_right = (self.right[side].mean(axis=0) for side in (places, was))  # (n,) shares
        changed = {"now_right": float((right * (1 - was_right)).mean()), "now_wrong": float(((1 - right) * was_right).mean())}
        return self._report(found) | {"sets": [len(now), len(before)], "changed": changed}

    def headline(self, name: str) -> float:
        return float(self.found.value[list(self.sets).index(name), self.keys.index(self.task.metric)])

    def _report(self, intervals: Sequence[Interval]) -> dict:
        """What was measured; scores: subset -> metric -> mean, low, high and n, the number of questions; the headline of them."""
        task, scores = self.task, {}
        for (subset, metric), interval in zip(self.keys, intervals, strict=True):
            n = sum(task.questions[name] for name in task.members(subset))
            scores.setdefault(subset, {})[metric] = interval.as_dict() | {"n": n}
        return {"title": task.title, "n": len(task.samples), "images": len(task.images), "questions": task.questions,
                "headline": scores[task.metric[0]][task.metric[1]], "scores": scores}  # fmt: skip
