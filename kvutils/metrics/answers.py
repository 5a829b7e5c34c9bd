"""How the published evaluators read and score the answers to POPE, MME and BLINK.

Other evaluators read the same answer otherwise ("I cannot tell" is *yes* for POPE's own script and wrong for lmms-eval);
these are the rules of the benchmarks' authors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LETTERS = "ABCDE"
NEEDS_JUDGE = "<<LLM>>"  # BLINK's own script asks GPT-3.5 here; we count such an answer as unresolved


def pope_parse(answer: str) -> str:
    """Read one answer as "yes" or "no" (RUCAIBox/POPE evaluate.py, LLaVA eval_pope.py).

    Of the words before the first full stop, commas deleted: "no" where one of them is No, not or no (case counts),
    "yes" for anything else, even for an empty answer.
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_counts(answers: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(n, 6) int, per question: TP, FP, TN, FN, right, said yes. Positive: yes; labels are yes or no."""
    positive = np.array(labels) == "yes"
    yes = np.array([pope_parse(answer) for answer in answers]) == "yes"
    columns = (positive & yes, ~positive & yes, ~positive & ~yes, positive & ~yes, positive == yes, yes)
    return np.stack(columns, axis=1).astype(np.int64)


def mme_parse(answer: str) -> str:
    """Read one answer as "yes", "no" or "other" (the authors' calculation.py): its first four characters, lower-cased."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def blink_extract(text: str | None, choices: Sequence[str]) -> str | None:
    """The option that a free-text answer chooses (BLINK_Benchmark analyze_answer), as "(A)" to "(E)".

    `NEEDS_JUDGE` where that script asks a language model; None where it swallows an exception (no text, or more than
    five choices to list for the judge).
    """
    if not isinstance(text, str):
        return None
    if text in tuple(LETTERS):
        return f"({text})"
    if text in {f"({letter})" for letter in LETTERS}:
        return text
    options = {f"({letter})" for letter in LETTERS[: len(choices)]}
    for part in (text.split("\n\n")[-1], text):  # the last paragraph, then the whole answer
        found = options & set(part.split())
        if len(found) == 1:
            return found.pop()
    return NEEDS_JUDGE if len(choices) <= len(LETTERS) else None


def blink_scores(items: Mapping[str, Sequence[tuple[str, str | None]]]) -> dict:
    """accuracy by subtask and "Total" (their plain mean), unresolved (share) and n by subtask.

    items: subtask -> [(gold, prediction)], both "(A)".."(E)"; a prediction counts when the strings are equal, so None and
    `NEEDS_JUDGE` are wrong, and their share is reported. Total weighs subtasks alike, as BLINK does.
    """
    accuracy = {name: sum(gold == said for gold, said in pairs) / len(pairs) for name, pairs in items.items()}
    accuracy["Total"] = sum(accuracy.values()) / len(accuracy)
    unresolved = {name: sum(said in (None, NEEDS_JUDGE) for _, said in pairs) / len(pairs) for name, pairs in items.items()}
    return {"accuracy": accuracy, "unresolved": unresolved, "n": {name: len(pairs) for name, pairs in items.items()}}
