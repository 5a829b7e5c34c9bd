"""POPE: is an object in the image? F1 of "yes", by split and as the mean over splits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from kvutils.question_metrics import POPE_CONVENTIONS, f1_statistic, pope_counts, pope_parse, pope_scores
from kvutils.tasks.yes_no import Measures, YesNoTask, ratio

MEAN, POOLED = "mean", "pooled"


class Pope(YesNoTask):
    """POPE with the published parsing and scores (see `kvutils.question_metrics`); positive class: yes.

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
        found = {(name, key): value for name, each in groups.items() for key, value in _scores(each).items()}
        for key in _scores(sums[:, 0]):
            found[MEAN, key] = np.mean([found[name, key] for name in self.subsets], axis=0)
        pooled = _scores(sums.sum(axis=1))
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


def _scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    tp, fp, _, fn, right, yes, unknown, n = sums.T
    return {
        "f1": f1_statistic(sums, np.eye(sums.shape[1])),  # the sums are those of the counts already
        "accuracy": ratio(right, n),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "yes_ratio": ratio(yes, n),
        "unknown": ratio(unknown, n),
    }
