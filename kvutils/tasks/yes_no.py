"""What POPE and MME share: questions in, one answer each, and scores by subset with intervals over images.

An answer set is a list of texts, one per sample of the task, in that order. Whatever gives it (a plain model,
one with keys blocked) is a callable, so nothing here knows about models.

POPE: is an object in the image? F1 of "yes", by split and as the mean over splits.

MME: two questions per image, one true and one false; acc, acc+ and their sum, the score, by subtask.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from kvutils.datasets.mme import GROUPS, SUBTASKS
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError, ParameterError
from kvutils.metrics.answers import MME_CONVENTIONS, POPE_CONVENTIONS, f1_statistic, mme_parse, mme_scores, pope_counts, pope_parse, pope_scores
from kvutils.metrics.statistics import Interval, Statistic, bootstrap_ci, detectable, standard_error
from kvutils.store import Parts, make_all, to_json

Answerer = Callable[[str, Image.Image, list[str]], Sequence[str]]
Measures = dict[tuple[str, str], np.ndarray]  # (subset or summary, metric) -> (n_boot,)


class YesNoTask(ABC):
    """Questions with a yes or no each, in subsets, and how a convention scores the answers to them.

    Raises DataError for no samples, an id given twice, a truth other than yes or no, an image_id of two images.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[tuple[str, str]]  # the headline: (subset or summary, metric)
    conventions: ClassVar[tuple[str, ...]]

    def __init__(self, samples: Sequence[YesNoSample], convention: str | None = None):
        self.samples = list(samples)
        self.convention = self.conventions[0] if convention is None else convention
        if self.convention not in self.conventions:
            raise ParameterError(
                f"{self.name} is scored by {' or '.join(self.conventions)}, found {self.convention!r}"
            )
        if not self.samples:
            raise DataError(f"{self.name}: no questions")
        pictures: dict[str, object] = {}
        ids: set[str] = set()
        for sample in self.samples:
            if sample.id in ids:
                raise DataError(f"{self.name}: two questions have the id {sample.id!r}")
            if sample.truth not in ("yes", "no"):
                raise DataError(
                    f"{self.name}: the truth of {sample.id!r} must be yes or no, found {sample.truth!r}"
                )
            first = pictures.setdefault(sample.image_id, sample.picture)
            if first is not sample.picture and first != sample.picture:
                raise DataError(f"{self.name}: two images have the id {sample.image_id!r}")
            ids.add(sample.id)
        self.subsets = list(dict.fromkeys(sample.subset for sample in self.samples))
        names = np.array([sample.subset for sample in self.samples])
        self.member = names[:, None] == np.array(self.subsets)  # (n, subsets)
        self.images = list(pictures)
        places = {name: place for place, name in enumerate(self.images)}
        self.image_of = np.array([places[sample.image_id] for sample in self.samples])  # (n,)

    @abstractmethod
    def read(self, answer: str) -> tuple[str, bool]:
        """What the convention takes an answer for, and whether it says neither yes nor no."""

    @abstractmethod
    def values(self, answers: Sequence[str]) -> np.ndarray:
        """(n, k) numbers per question; every metric is a function of their sums over questions."""

    @abstractmethod
    def measures(self, sums: np.ndarray) -> Measures:
        """Every metric from sums (n_boot, subsets, k) of the values over the questions of each subset."""

    def members(self, summary: str) -> Sequence[str]:
        """The subsets that a summary is over; all, if a task has no other."""
        return self.subsets

    @abstractmethod
    def official(self, answers: Sequence[str]) -> dict:
        """What the convention's own script prints."""

    def rows(self, answers: Sequence[str]) -> list[dict]:
        """Per question: id, image, subset, question, truth, answer, said, right, unknown (says neither)."""
        self.check(answers)
        rows = []
        for sample, answer in zip(self.samples, answers, strict=True):
            said, unknown = self.read(answer)
            row = {"id": sample.id, "image": sample.image_id, "subset": sample.subset}
            row |= {"question": sample.question, "truth": sample.truth, "answer": answer}
            rows.append(row | {"said": said, "right": said == sample.truth, "unknown": unknown})
        return rows

    def check(self, answers: Sequence[str]) -> None:
        """Raises DataError unless there is one text per question."""
        if isinstance(answers, str) or len(answers) != len(self.samples):
            raise DataError(f"{self.name}: {len(answers)} answers for {len(self.samples)} questions")
        for sample, answer in zip(self.samples, answers, strict=True):
            if not isinstance(answer, str):
                raise DataError(
                    f"{self.name}: the answer to {sample.id!r} must be text, found {type(answer).__name__}"
                )


def run_questions(
    task: YesNoTask,
    answer: Answerer,
    parts: Parts | None = None,
    condition: str = "plain",
    progress: bool = True,
    chunk: int = 25,
) -> list[str]:
    """The answers to all questions of a task: texts in the order of `task.samples`.

    answer(image_id, image, questions) gets every question about an image at once, each wording once (the
    positives of POPE are in all three splits), and returns one text per question. With `parts`, finished chunks
    of images are kept under the name of the `condition`, and a run that was stopped goes on; all that the
    answers depend on, such as the model and which keys are blocked, must be in the `depends` of `parts` or in
    that name. Raises DataError that names the image for anything but one text per question.
    """
    if chunk < 1:
        raise ParameterError(f"chunk must be at least 1, not {chunk}")
    if not condition:
        raise ParameterError("condition must be a name for what answers, such as 'plain' or 'blocked'")
    asked: dict[str, dict[str, None]] = {}
    first: dict[str, YesNoSample] = {}
    for sample in task.samples:
        asked.setdefault(sample.image_id, {})[sample.question] = None
        first.setdefault(sample.image_id, sample)
    images = list(asked)
    found: dict[tuple[str, str], str] = {}
    description = f"{task.title}, {condition}"
    jobs, asked_in = [], []
    with tqdm(total=len(images), desc=description, unit="image", disable=not progress) as bar:
        for start in range(0, len(images), chunk):
            names = images[start : start + chunk]
            questions = [list(asked[name]) for name in names]

            def compute(names: list[str] = names, questions: list[list[str]] = questions) -> list[list[str]]:
                return [
                    _texts(answer(name, first[name].image, list(texts)), name, len(texts))
                    for name, texts in zip(names, questions, strict=True)
                ]

            content = to_json([task.name, condition, names, questions])
            digest = hashlib.sha256(content.encode()).hexdigest()[:16]
            jobs.append((f"{task.name}/{condition}/{start:06d}-{digest}", compute))
            asked_in.append((names, questions))
        for (names, questions), texts in zip(asked_in, make_all(parts, jobs), strict=True):
            for name, wording, replies in zip(names, questions, texts, strict=True):
                found |= {(name, question): reply for question, reply in zip(wording, replies, strict=True)}
            bar.update(len(names))
    return [found[sample.image_id, sample.question] for sample in task.samples]


def _texts(answers: Sequence[str], image_id: str, questions: int) -> list[str]:
    if isinstance(answers, str) or len(answers) != questions:
        raise DataError(f"image {image_id!r}: {questions} questions, found {len(answers)} answers")
    for answer in answers:
        if not isinstance(answer, str):
            raise DataError(f"image {image_id!r}: an answer must be text, found {type(answer).__name__}")
    return list(answers)


def summarise_answers(task: YesNoTask, answers: Sequence[str], n_boot: int = 2000, seed: int = 0) -> dict:
    """Every metric of every subset with its 95 % interval over images, and the official scores; JSON-able.

    scores: by subset, then summaries over subsets, each metric as mean, low, high, n. headline: one of them.
    unknown: how many answers say neither yes nor no; they are scored as the convention does, never dropped.
    """
    values = _values(task, [answers])
    keys, statistic = _statistic(task)
    intervals = bootstrap_ci(values, statistic, n_boot, seed)
    scores = _scores(task, keys, intervals)
    return {
        **_about(task),
        "unknown": sum(row["unknown"] for row in task.rows(answers)),
        "headline": scores[task.metric[0]][task.metric[1]],
        "scores": scores,
        "official": _finite(task.official(answers)),
    }


def compare_answers(
    task: YesNoTask,
    answers: Sequence[str] | Sequence[Sequence[str]],
    baseline: Sequence[str] | Sequence[Sequence[str]],
    n_boot: int = 2000,
    seed: int = 0,
    power: float = 0.8,
) -> dict:
    """Answers minus baseline over the same questions: paired differences of every metric; JSON-able.

    Either may be several answer sets, such as 20 draws of random keys: then the mean of their scores is meant
    (the interval is over images, not over draws). scores: as in `summarise_answers`, each with `detectable`, the
    true difference that would show with probability `power` (None where no score changed in any resample).
    changed: by subset the share of questions that are right and were wrong, and the reverse, over all pairs of
    sets.
    """
    now, before = (_sets(each) for each in (answers, baseline))
    sides = [_values(task, each) for each in (now, before)]
    keys, statistic = _statistic(task)

    def paired(weights: np.ndarray, both: np.ndarray) -> np.ndarray:
        return statistic(weights, both[:, : len(now)]) - statistic(weights, both[:, len(now) :])

    both = np.concatenate(sides, axis=1)
    scores = _scores(task, keys, bootstrap_ci(both, paired, n_boot, seed))
    visible = detectable(standard_error(both, paired, n_boot, seed), power)
    for (subset, metric), size in zip(keys, visible.tolist(), strict=True):
        scores[subset][metric]["detectable"] = _finite(size)
    gained, lost = _changes(task, now, before)
    return {
        **_about(task),
        "sets": [len(now), len(before)],
        "power": power,
        "headline": scores[task.metric[0]][task.metric[1]],
        "scores": scores,
        "changed": {
            subset: {"now_right": float(gained[mine].mean()), "now_wrong": float(lost[mine].mean())}
            for subset, mine in zip(task.subsets, task.member.T, strict=True)
        },
    }


def _sets(answers: Sequence[str] | Sequence[Sequence[str]]) -> list[Sequence[str]]:
    return [answers] if not len(answers) or isinstance(answers[0], str) else list(answers)


def _values(task: YesNoTask, sets: Sequence[Sequence[str]]) -> np.ndarray:
    """(images, sets, subsets, k): sums of the values over the questions of an image, the unit of resampling."""
    for answers in sets:
        task.check(answers)
    values = np.stack([task.values(answers) for answers in sets], axis=1)
    sums = np.zeros((len(task.images), len(sets), len(task.subsets), values.shape[-1]))
    np.add.at(sums, task.image_of, values[:, :, None, :] * task.member[:, None, :, None])
    return sums


def _statistic(task: YesNoTask) -> tuple[list[tuple[str, str]], Statistic]:
    """The (subset, metric) of every metric, and the statistic that gives them: their mean over answer sets."""
    k = task.values([""] * len(task.samples)).shape[1]
    keys = list(task.measures(np.ones((1, len(task.subsets), k))))

    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        sums = (weights @ values.reshape(len(values), -1)).reshape(len(weights), *values.shape[1:])
        each = (task.measures(sums[:, number]) for number in range(values.shape[1]))
        return np.mean([np.stack([found[key] for key in keys], axis=1) for found in each], axis=0)

    return keys, statistic


def _changes(task: YesNoTask, now: Sequence, before: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(n,) each: share of the pairs of answer sets in which a question is newly right, and newly wrong."""

    def right(sets: Sequence[Sequence[str]]) -> np.ndarray:  # (n,) share of the sets
        return np.mean([[row["right"] for row in task.rows(answers)] for answers in sets], axis=0)

    is_now, was = right(now), right(before)
    return is_now * (1 - was), (1 - is_now) * was


def _about(task: YesNoTask) -> dict:
    return {
        "task": task.name,
        "title": task.title,
        "metric": ".".join(task.metric),
        "convention": task.convention,
        "n": len(task.samples),
        "images": len(task.images),
        "questions": dict(zip(task.subsets, task.member.sum(axis=0).tolist(), strict=True)),
    }


def _scores(task: YesNoTask, keys: Sequence[tuple[str, str]], intervals: Sequence[Interval]) -> dict:
    """subset -> metric -> mean, low, high and n, the number of questions."""
    counts = dict(zip(task.subsets, task.member.sum(axis=0).tolist(), strict=True))
    scores: dict[str, dict[str, dict]] = {}
    for (subset, metric), interval in zip(keys, intervals, strict=True):
        n = counts[subset] if subset in counts else sum(counts[name] for name in task.members(subset))
        scores.setdefault(subset, {})[metric] = interval.as_dict() | {"n": n}
    return scores


def _finite(value):
    """The same nested dicts, with None where a number is undefined: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; NaN where the latter is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


MEAN, POOLED = "mean", "pooled"


class Pope(YesNoTask):
    """POPE with the published parsing and scores (see `kvutils.metrics.answers`); positive class: yes.

    Scores per split, as `mean` the plain mean over splits (the headline is its F1), and as `pooled` over all
    questions at once. f1 is 0 without a true positive; precision is undefined without a yes.

    An answer counts as unknown where the convention reads neither yes nor no, and, for the convention "pope",
    which takes everything but a no for yes, where it is taken for yes without the word.
    """

    name = "pope"
    title = "POPE"
    metric = (MEAN, "f1")
    conventions = POPE_CONVENTIONS

    def read(self, answer: str) -> tuple[str, bool]:
        said = pope_parse(answer, self.convention)
        by_default = self.convention == "pope" and said == "yes" and not re.search(r"\byes\b", answer.lower())
        return said, said == "unknown" or by_default

    def values(self, answers: Sequence[str]) -> np.ndarray:
        """(n, 8) TP, FP, TN, FN, right, said yes (`pope_counts`), unknown, 1."""
        counts = pope_counts(answers, [sample.truth for sample in self.samples], self.convention)
        unknown = [self.read(answer)[1] for answer in answers]
        return np.column_stack([counts, unknown, np.ones(len(counts))]).astype(float)

    def measures(self, sums: np.ndarray) -> Measures:
        groups = {name: sums[:, i] for i, name in enumerate(self.subsets)}
        found = {(name, key): value for name, each in groups.items() for key, value in _pope_scores(each).items()}
        for key in _pope_scores(sums[:, 0]):
            found[MEAN, key] = np.mean([found[name, key] for name in self.subsets], axis=0)
        pooled = _pope_scores(sums.sum(axis=1))
        return found | {(POOLED, key): value for key, value in pooled.items()}

    def official(self, answers: Sequence[str]) -> dict:
        """`pope_scores` by split."""
        self.check(answers)
        pairs = list(zip(answers, self.samples, strict=True))
        return {
            name: pope_scores(
                [answer for answer, sample in pairs if sample.subset == name],
                [sample.truth for _, sample in pairs if sample.subset == name],
                self.convention,
            )
            for name in self.subsets
        }


def _pope_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    tp, fp, _, fn, right, yes, unknown, n = sums.T
    return {
        "f1": f1_statistic(sums, np.eye(sums.shape[1])),  # the sums are those of the counts already
        "accuracy": ratio(right, n),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "yes_ratio": ratio(yes, n),
        "unknown": ratio(unknown, n),
    }


TOTAL = "total"


class Mme(YesNoTask):
    """MME with the published parsing and scores (see `kvutils.metrics.answers`).

    Per subtask: acc, share of questions that are right; acc_plus, share of images with both right; score, 100
    times their sum (0 to 200). Summaries add scores up: `total` over all subtasks of the samples (the headline),
    and perception, cognition and hallucination where all of their subtasks are there. An answer that is neither
    yes nor no is wrong, and counts as unknown. Raises DataError unless every image of a subtask has two
    questions.
    """

    name = "mme"
    title = "MME"
    metric = (TOTAL, "score")
    conventions = MME_CONVENTIONS

    def __init__(self, samples: Sequence[YesNoSample], convention: str | None = None):
        super().__init__(samples, convention)
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
        said = mme_parse(answer, self.convention)
        return said, said == "other"

    def values(self, answers: Sequence[str]) -> np.ndarray:
        """(n, 5) right, both of the pair right, said yes, unknown, 1."""
        said = [self.read(answer) for answer in answers]
        right = np.array([word == s.truth for (word, _), s in zip(said, self.samples, strict=True)])
        both = np.zeros(len(right))
        for pair in self.pairs.values():
            both[pair] = right[pair].all()
        yes, unknown = [word == "yes" for word, _ in said], [missing for _, missing in said]
        return np.column_stack([right, both, yes, unknown, np.ones(len(right))]).astype(float)

    def measures(self, sums: np.ndarray) -> Measures:
        right, both, yes, unknown, n = np.moveaxis(sums, -1, 0)  # each (n_boot, subsets)
        acc, acc_plus = ratio(right, n), ratio(both, n)
        each = {"score": 100 * (acc + acc_plus), "acc": acc, "acc_plus": acc_plus}
        each |= {"yes_ratio": ratio(yes, n), "unknown": ratio(unknown, n)}
        found = {
            (name, key): value[:, i] for i, name in enumerate(self.subsets) for key, value in each.items()
        }
        for name, members in self.totals.items():
            found[name, "score"] = each["score"][:, members].sum(axis=1)
            found[name, "yes_ratio"] = ratio(yes[:, members].sum(axis=1), n[:, members].sum(axis=1))
            found[name, "unknown"] = ratio(unknown[:, members].sum(axis=1), n[:, members].sum(axis=1))
        return found

    def members(self, summary: str) -> list[str]:
        return [self.subsets[i] for i in self.totals[summary]]

    def official(self, answers: Sequence[str]) -> dict:
        """`mme_scores` of the subtasks that MME has; `not_in_mme` names the others."""
        self.check(answers)
        rows: dict[str, list[tuple[str, str, str, str]]] = {}
        for (subtask, image), pair in self.pairs.items():
            if subtask in SUBTASKS:
                for number in pair:
                    sample = self.samples[number]
                    row = (image, sample.question, sample.truth, answers[number])
                    rows.setdefault(subtask, []).append(row)
        scores = mme_scores(rows, self.convention)
        others = [name for name in self.subsets if name not in SUBTASKS]
        return {key: value for key, value in scores.items() if key != "parsed"} | {"not_in_mme": others}
