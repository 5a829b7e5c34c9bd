"""Parsing and scoring of the answers to POPE, MME and BLINK, by every convention in use.

The published evaluators read the same answer differently ("I cannot tell" is *yes* for POPE's own script and
wrong for lmms-eval), so each function takes a named `convention` and a result must say which one it used.
Scores are fractions in 0..1, except MME's score, which is 100 * (acc + acc_plus) in 0..200 per subtask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from kvutils.errors import DataError, ParameterError

NAN = float("nan")
# --- POPE --------------------------------------------------------------------------------------------------

POPE_CONVENTIONS = ("pope", "lmms_eval", "vlmevalkit")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # of the VQA evaluator, which VLMEvalKit calls


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ParameterError(f"{name} must be one of {', '.join(allowed)}; found {value!r}")


def pope_parse(answer: str, convention: str = "pope") -> str:
    """Read one answer as "yes", "no" or "unknown".

    pope (RUCAIBox/POPE evaluate.py, LLaVA eval_pope.py): the words before the first full stop, commas
    deleted; "no" where one of them is No, not or no (case counts), "yes" for anything else, even for an empty
    answer.
    lmms_eval: the lower-cased answer must be exactly yes or no.
    vlmevalkit: yes or no as a word of the lower-cased answer without punctuation, but not both.
    """
    _check("convention", convention, POPE_CONVENTIONS)
    if not isinstance(answer, str):
        raise DataError(f"an answer must be text, found {type(answer).__name__}")
    if convention == "pope":
        words = answer.split(".", 1)[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"
    if convention == "lmms_eval":
        text = answer.lower().strip()
        return text if text in ("yes", "no") else "unknown"
    words = set(_without_punctuation(answer.lower()).split())
    found = words & {"yes", "no"}
    return found.pop() if len(found) == 1 else "unknown"


def _without_punctuation(text: str) -> str:
    """Marks next to a space (all of them if some digit,digit occurs) are deleted, others become spaces."""
    digits_with_comma = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _PUNCTUATION:
        joined = digits_with_comma or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined else " ")
    return re.sub(r"\.(?!\d)", "", result)


def pope_counts(answers: Sequence[str], labels: Sequence[str], convention: str = "pope") -> np.ndarray:
    """(n, 6) int, per question: TP, FP, TN, FN, right, said yes. Positive: yes.

    The first four follow the convention: for pope each question falls in exactly one; for lmms_eval an answer
    that is neither yes nor no falls in none; for vlmevalkit it counts as no. Feed these to `bootstrap_ci`
    with `f1_statistic`.
    """
    if len(answers) != len(labels):
        raise DataError(f"{len(answers)} answers for {len(labels)} labels")
    truth = np.array([str(label).strip().lower() for label in labels])
    for i in np.flatnonzero(~np.isin(truth, ["yes", "no"])):
        raise DataError(f"label {i} must be yes or no, found {labels[i]!r}")
    said = np.array([pope_parse(answer, convention) for answer in answers])
    positive, yes = truth == "yes", said == "yes"
    no = said != "yes" if convention == "vlmevalkit" else said == "no"
    columns = (positive & yes, ~positive & yes, ~positive & no, positive & no, said == truth, yes)
    return np.stack(columns, axis=1).astype(np.int64).reshape(len(answers), 6)


def pope_scores(answers: Sequence[str], labels: Sequence[str], convention: str = "pope") -> dict:
    """accuracy, precision, recall, f1, yes_ratio (positive class: yes), TP, FP, TN, FN and unknown (share).

    Division by zero: "pope" reports what its script had computed before it crashed, NaN from there on (order:
    precision, recall, f1, accuracy), and names it in "error"; the other conventions count 0. Under lmms_eval
    `yes_ratio` is still the share of *answers* that are yes; what that evaluator prints, the share of true
    labels, is `yes_ratio_of_labels`.
    """
    counts = pope_counts(answers, labels, convention)
    if not len(counts):
        raise DataError("no answer to score")
    tp, fp, tn, fn, right, yes = (int(v) for v in counts.sum(axis=0))
    result: dict = {"TP": tp, "FP": fp, "TN": tn, "FN": fn, "error": None}
    result |= dict.fromkeys(("precision", "recall", "f1", "accuracy"), NAN)
    result["yes_ratio"] = yes / len(counts)
    result["yes_ratio_of_labels"] = sum(str(label).strip().lower() == "yes" for label in labels) / len(counts)
    result["unknown"] = sum(pope_parse(answer, convention) == "unknown" for answer in answers) / len(counts)

    def divide(a: float, b: float) -> float:
        return a / b if b or convention == "pope" else 0.0

    try:
        result["precision"] = divide(tp, tp + fp)
        result["recall"] = divide(tp, tp + fn)
        result["f1"] = divide(
            2 * result["precision"] * result["recall"], result["precision"] + result["recall"]
        )
        result["accuracy"] = right / len(counts)
    except ZeroDivisionError:
        result["error"] = (
            f"ZeroDivisionError: {tp} true positives of {tp + fp} yes answers and {tp + fn} yes labels"
        )
    return result


def f1_statistic(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n_boot,) F1 of resampled `pope_counts`; 0 where there is no true positive. For `bootstrap_ci`."""
    tp, fp, fn = (weights @ counts[:, [0, 1, 3]].astype(float)).T
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)


# --- MME ---------------------------------------------------------------------------------------------------

MME_PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
MME_COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
MME_CONVENTIONS = ("official", "lmms_eval")


def mme_parse(answer: str, convention: str = "official") -> str:
    """Read one answer as "yes", "no" or "other".

    official (the authors' calculation.py): yes, else no, within the first four characters of the lower-cased
    answer.
    lmms_eval: the same after stripping blanks and full stops, and the single letters y and n count.
    """
    _check("convention", convention, MME_CONVENTIONS)
    if not isinstance(answer, str):
        raise DataError(f"an answer must be text, found {type(answer).__name__}")
    text = answer.lower()
    if convention == "lmms_eval":
        text = text.strip().replace(".", "")
        if len(text) == 1:
            return {"y": "yes", "n": "no"}.get(text, "other")
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def mme_scores(rows: Mapping[str, Sequence[tuple[str, str, str, str]]], convention: str = "official") -> dict:
    """acc (with acc_plus) and task_score = 100 * (acc + acc_plus) by subtask, totals, parsed, error.

    rows: subtask -> [(image, question, truth, answer)], the two questions of an image in consecutive rows. A
    total is NaN unless all its subtasks are there. The official script crashes on a subtask without a single
    yes or no among its answers: then "error" names it, task_score is empty and the totals are NaN, while acc
    and acc_plus are still given; lmms_eval scores it 0.
    """
    acc: dict[str, dict[str, float]] = {}
    parsed: dict[str, list[str]] = {}
    unanswered = []
    for subtask, items in rows.items():
        if subtask not in MME_PERCEPTION + MME_COGNITION:
            raise DataError(f"unknown MME subtask {subtask!r}")
        if not items or len(items) % 2:
            raise DataError(f"MME {subtask}: two questions per image expected, found {len(items)} rows")
        right = []
        parsed[subtask] = []
        for number, (image, _question, truth, answer) in enumerate(items, start=1):
            if image != items[(number - 1) // 2 * 2][0]:
                raise DataError(
                    f"MME {subtask}, row {number}: image {image!r} is not that of the row before; give pairs"
                )
            gold = truth.strip().lower().replace(".", "") if convention == "lmms_eval" else truth.lower()
            if gold not in ("yes", "no"):
                raise DataError(f"MME {subtask}, row {number}: truth must be yes or no, found {truth!r}")
            parsed[subtask].append(mme_parse(answer, convention))
            right.append(parsed[subtask][-1] == gold)
        pairs = np.reshape(right, (-1, 2))
        acc[subtask] = {"acc": float(pairs.mean()), "acc_plus": float(pairs.all(axis=1).mean())}
        if set(parsed[subtask]) == {"other"}:
            unanswered.append(subtask)
    result: dict = {"acc": acc, "parsed": parsed, "error": None, "task_score": {}}
    if unanswered and convention == "official":
        result["error"] = (
            f"no answer to {', '.join(unanswered)} is yes or no: the official score is undefined"
        )
    else:
        result["task_score"] = {name: 100 * (a["acc"] + a["acc_plus"]) for name, a in acc.items()}
    for name, group in (("perception_total", MME_PERCEPTION), ("cognition_total", MME_COGNITION)):
        result[name] = sum(result["task_score"].get(subtask, NAN) for subtask in group)
    return result


# --- BLINK -------------------------------------------------------------------------------------------------

BLINK_CONVENTIONS = ("blink", "lmms_eval", "vlmevalkit")
LETTERS = "ABCDE"
NEEDS_JUDGE = "<<LLM>>"  # BLINK's own script asks GPT-3.5 here; we count such an answer as unresolved
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def blink_extract(text: str | None, choices: Sequence[str], convention: str = "blink") -> str | None:
    """The option a free-text answer chooses; its form depends on the convention.

    blink (BLINK_Benchmark analyze_answer): "(A)".."(E)"; `NEEDS_JUDGE` where that script asks a language
    model; None where it swallows an exception (no text, or more than five choices to list for the judge).
    lmms_eval: the first letter of the text, upper case, whatever it is ("The answer is B" gives "T"); "" if
    none.
    vlmevalkit: "A", "B", ... if exactly one letter, else exactly one option's text, can be inferred; "Z" for
    a refusal; None where it would ask a judge.
    """
    _check("convention", convention, BLINK_CONVENTIONS)
    if convention == "blink":
        return _blink_official(text, len(choices))
    if text is None:
        raise DataError(f"an answer must be text for the convention {convention!r}, found None")
    if convention == "lmms_eval":
        match = re.match(r"[(\s]*([A-Z])", text.strip(), flags=re.IGNORECASE)
        return match.group(1).upper() if match else ""
    return _infer_option(text, dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False)))


def _blink_official(text: str | None, n_choices: int) -> str | None:
    if not isinstance(text, str):
        return None
    options = {f"({letter})" for letter in LETTERS[:n_choices]}
    anywhere = options & set(text.split())
    last = options & set(text.split("\n\n")[-1].split())
    if text in tuple(LETTERS):
        return f"({text})"
    if text in {f"({letter})" for letter in LETTERS}:
        return text
    if len(last) == 1:
        return last.pop()
    if len(anywhere) == 1:
        return anywhere.pop()
    return NEEDS_JUDGE if n_choices <= len(LETTERS) else None


def _infer_option(text: str, choices: dict[str, str]) -> str | None:
    if "Failed to obtain answer via API" not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return "Z"
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
        named = [letter for letter in choices if letter in words]
        if (
            len(named) == 1 and words.index(named[0]) > len(words) - 5
        ):  # a letter early in a sentence may be an article
            return named[0]
        if not named and "Z" in words:
            return "Z"
    if len(text) > 2 * sum(len(str(choice)) for choice in choices.values()):
        return None
    found = [letter for letter, choice in choices.items() if str(choice).lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def blink_scores(items: Mapping[str, Sequence[tuple[str, str | None]]]) -> dict:
    """accuracy by subtask and "Total" (their plain mean), unresolved (share) and n by subtask.

    items: subtask -> [(gold, prediction)], both "(A)".."(E)"; a prediction counts when the strings are equal,
    so None and `NEEDS_JUDGE` are wrong, and their share is reported. Total weighs subtasks alike, as BLINK
    does.
    """
    accuracy, unresolved, n = {}, {}, {}
    for subtask, pairs in items.items():
        if not pairs:
            raise DataError(f"BLINK {subtask}: no item to score")
        for i, (gold, _) in enumerate(pairs):
            if gold not in {f"({letter})" for letter in LETTERS}:
                raise DataError(f"BLINK {subtask}, item {i}: gold answer must be (A)..(E), found {gold!r}")
        accuracy[subtask] = sum(gold == said for gold, said in pairs) / len(pairs)
        unresolved[subtask] = sum(said in (None, NEEDS_JUDGE, "") for _, said in pairs) / len(pairs)
        n[subtask] = len(pairs)
    if not accuracy:
        raise DataError("no BLINK subtask to score")
    accuracy["Total"] = sum(accuracy.values()) / len(accuracy)
    return {"accuracy": accuracy, "unresolved": unresolved, "n": n}
