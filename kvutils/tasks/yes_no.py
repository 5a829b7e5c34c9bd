"""POPE and MME: one answer per question, read as the authors' scripts do, and scores with intervals over images.

An answer set is a list of texts, one per sample of the task, in that order. Whatever gives it (a plain model, one with
keys blocked), nothing here knows about models.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvutils.datasets.mme import GROUPS
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError
from kvutils.metrics.answers import mme_parse, pope_counts, pope_parse
from kvutils.metrics.old import standard_error
from kvutils.metrics.statistics import Interval, Statistic, bootstrap_ci, detectable, ratio

Measures = dict[tuple[str, str], np.ndarray]  # (subset or summary, metric) -> (n_boot,)
MEAN, POOLED, TOTAL = "mean", "pooled", "total"
POWER = 0.8  # probability with which a detectable difference would show


class YesNoTask(ABC):
    """Questions with a yes or no each, in subsets, and their scores; DataError for no samples or an image_id of two images."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[tuple[str, str]]  # the headline: (subset or summary, metric)
    convention: ClassVar[str]  # whose reading of an answer

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
        names = np.array([sample.subset for sample in self.samples])
        self.member = names[:, None] == np.array(self.subsets)  # (n, subsets)
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
        return np.array([self.read(answer)[0] == sample.truth for answer, sample in zip(answers, self.samples, strict=True)])

    def unknown(self, answers: Sequence[str]) -> np.ndarray:
        """(n,) bool: which answers say neither yes nor no."""
        return np.array([self.read(answer)[1] for answer in answers])


class Pope(YesNoTask):
    """POPE: is an object in the image? F1 of yes, read as by POPE's own script (`pope_parse`).

    Scores per split, as `mean` the plain mean over splits (the headline is its F1), and as `pooled` over all questions
    at once. f1 is 0 without a true positive; precision is undefined without a yes. What is no "no" is taken for yes;
    an answer counts as unknown where it is taken for yes without the word.
    """

    name, title, convention = "pope", "POPE", "pope"
    metric = (MEAN, "f1")

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

    Per subtask: acc, share of questions that are right; acc_plus, share of images with both right; score, 100 times
    their sum (0 to 200). Summaries add scores up: `total` over all subtasks of the samples (the headline), and
    perception, cognition and hallucination where all of their subtasks are there. An answer that is neither yes nor no
    is wrong, and counts as unknown: a subtask of such answers alone, on which the authors' script stops, scores 0.
    Raises DataError unless every image of a subtask has two questions.
    """

    name, title, convention = "mme", "MME", "official"
    metric = (TOTAL, "score")

    def __init__(self, samples: Sequence[YesNoSample]):
        super().__init__(samples)
        self.pairs: dict[tuple[str, str], list[int]] = {}
        for number, sample in enumerate(self.samples):
            self.pairs.setdefault((sample.subset, sample.image_id), []).append(number)
        for (subtask, image), pair in self.pairs.items():
            if len(pair) != 2:
                raise DataError(f"MME {subtask}: image {image!r} has {len(pair)} questions, not two")
        self.totals = {TOTAL: list(range(len(self.subsets)))}
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
        each = {"score": 100 * (acc + acc_plus), "acc": acc, "acc_plus": acc_plus, "yes_ratio": ratio(yes, n),
                "unknown": ratio(unknown, n)}  # fmt: skip
        found = {(name, key): value[:, i] for i, name in enumerate(self.subsets) for key, value in each.items()}
        for name, members in self.totals.items():
            questions = n[:, members].sum(axis=1)
            found[name, "score"] = each["score"][:, members].sum(axis=1)
            found[name, "yes_ratio"] = ratio(yes[:, members].sum(axis=1), questions)
            found[name, "unknown"] = ratio(unknown[:, members].sum(axis=1), questions)
        return found

    def members(self, name: str) -> Sequence[str]:
        return [self.subsets[i] for i in self.totals[name]] if name in self.totals else [name]


def summarise_answers(task: YesNoTask, answers: Sequence[str], n_boot: int = 2000, seed: int = 0) -> dict:
    """Every metric of every subset with its 95 % interval over images; JSON-able.

    scores: by subset, then summaries over subsets, each metric as mean, low, high, n. headline: one of them. unknown:
    how many answers say neither yes nor no; they are scored as the authors do, never dropped.
    """
    keys, statistic = _statistic(task)
    found = _report(task, keys, bootstrap_ci(_values(task, [answers]), statistic, n_boot, seed))
    return found | {"unknown": int(task.unknown(answers).sum())}


def compare_answers(
    task: YesNoTask, answers: Sequence[str] | Sequence[Sequence[str]], baseline: Sequence[str] | Sequence[Sequence[str]],
    n_boot: int = 2000, seed: int = 0,
) -> dict:  # fmt: skip
    """Answers minus baseline over the same questions: paired differences of every metric; JSON-able.

    Either may be several answer sets, such as 20 draws of random keys: then the mean of their scores is meant (the
    interval is over images, not over draws). scores: as in `summarise_answers`, each with `detectable`, the true
    difference that would show with probability `POWER` (None where no score changed in any resample). changed: by
    subset the share of questions that are right and were wrong, and the reverse, over all pairs of sets.
    """
    now, before = ([each] if isinstance(each[0], str) else list(each) for each in (answers, baseline))
    keys, statistic = _statistic(task)

    def paired(weights: np.ndarray, both: np.ndarray) -> np.ndarray:
        return statistic(weights, both[:, : len(now)]) - statistic(weights, both[:, len(now) :])

    both = np.concatenate([_values(task, each) for each in (now, before)], axis=1)
    found = _report(task, keys, bootstrap_ci(both, paired, n_boot, seed))
    visible = detectable(standard_error(both, paired, n_boot, seed), len(task.images), POWER)
    for (subset, metric), size in zip(keys, visible.tolist(), strict=True):
        found["scores"][subset][metric]["detectable"] = None if math.isnan(size) else size
    is_right, was_right = (np.mean([task.right(each) for each in sets], axis=0) for sets in (now, before))  # (n,) shares
    gained, lost = is_right * (1 - was_right), (1 - is_right) * was_right
    changed = {subset: {"now_right": float(gained[mine].mean()), "now_wrong": float(lost[mine].mean())}
               for subset, mine in zip(task.subsets, task.member.T, strict=True)}  # fmt: skip
    return found | {"sets": [len(now), len(before)], "power": POWER, "changed": changed}


def _values(task: YesNoTask, sets: Sequence[Sequence[str]]) -> np.ndarray:
    """(images, sets, subsets, k): sums of the values over the questions of an image, the unit of resampling."""
    for answers in sets:
        if isinstance(answers, str) or len(answers) != len(task.samples):
            raise DataError(f"{task.name}: {len(answers)} answers for {len(task.samples)} questions")
    values = np.stack([task.values(answers) for answers in sets], axis=1)
    sums = np.zeros((len(task.images), len(sets), len(task.subsets), values.shape[-1]))
    np.add.at(sums, task.image_of, values[:, :, None, :] * task.member[:, None, :, None])
    return sums


def _statistic(task: YesNoTask) -> tuple[list[tuple[str, str]], Statistic]:
    """The (subset, metric) of every metric, and the statistic that gives them: their mean over answer sets."""
    k = task.values([""] * len(task.samples)).shape[1]
    keys = list(task.measures(np.ones((1, len(task.subsets), k))))

    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        sums = np.tensordot(weights, values, 1)  # (n_boot, sets, subsets, k)
        each = (task.measures(sums[:, number]) for number in range(values.shape[1]))
        return np.mean([np.stack([found[key] for key in keys], axis=1) for found in each], axis=0)

    return keys, statistic


def _report(task: YesNoTask, keys: Sequence[tuple[str, str]], intervals: Sequence[Interval]) -> dict:
    """What was measured; scores: subset -> metric -> mean, low, high and n, the number of questions; the headline of them."""
    scores: dict[str, dict[str, dict]] = {}
    for (subset, metric), interval in zip(keys, intervals, strict=True):
        n = sum(task.questions[name] for name in task.members(subset))
        scores.setdefault(subset, {})[metric] = interval.as_dict() | {"n": n}
    return {
        "task": task.name, "title": task.title, "metric": ".".join(task.metric), "convention": task.convention,
        "n": len(task.samples), "images": len(task.images), "questions": task.questions,
        "headline": scores[task.metric[0]][task.metric[1]], "scores": scores,
    }  # fmt: skip
