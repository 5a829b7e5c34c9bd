"""MME: two questions per image, one true and one false; acc, acc+ and their sum, the score, by subtask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvutils.datasets.mme import GROUPS, SUBTASKS
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError
from kvutils.question_metrics import MME_CONVENTIONS, mme_parse, mme_scores
from kvutils.tasks.yes_no import Measures, YesNoTask, ratio

TOTAL = "total"


class Mme(YesNoTask):
    """MME with the published parsing and scores (see `kvutils.question_metrics`).

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
