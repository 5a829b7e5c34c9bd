"""How the published evaluators read and score the answers to POPE, MME and BLINK.

Other evaluators read the same answer otherwise ("I cannot tell" is *yes* for POPE's own script and wrong for lmms-eval);
these are the rules of the benchmarks' authors."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

LETTERS = "ABCDE"
NEEDS_JUDGE = "<<LLM>>"  # BLINK's own script asks GPT-3.5 here; we ask `read_letter`
LOW_MASS = 0.5  # of the probability of how an answer begins: options that hold less say little about what the model would say
_LETTER = re.compile(r"(?<![\w'’])([A-E])(?![\w'’])|\(([a-e])\)")  # by itself
_ARTICLE = re.compile(r"(?<![\w'’])A +(?!(?:is|was|has|or|and|nor|because|since)\b)[a-z]")
_ALONE = re.compile(r"[\W_]*([A-Ea-e])[\W_]*")
_LEADING = re.compile(r"[\W_]*([A-E])[\W_]*[.):]")
_ANNOUNCED = re.compile(r"(?i:\banswer\b(?: +is)?)[\W_]*([A-E])\b(?!\W*(?:or|and)\b| +[a-z])")
_DENIED = re.compile(r"(?i:\b(?:not|neither|nor|than|unlike)\b(?: the| option| point| image)*)[\W_]+[A-E]\b")


def pope_parse(answer: str) -> str:
    """Read one answer as "yes" or "no" (RUCAIBox/POPE evaluate.py, LLaVA eval_pope.py).

    Of the words before the first full stop, commas deleted: "no" where one of them is No, not or no (case counts),
    "yes" for anything else, even for an empty answer."""
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_counts(answers: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(n, 6) int, per question: TP, FP, TN, FN, right, said yes. Positive: yes; labels are yes or no."""
    said = {answer: pope_parse(answer) for answer in set(answers)}
    positive, yes = (np.array(each) == "yes" for each in (labels, [said[answer] for answer in answers]))
    columns = (positive & yes, ~positive & yes, ~positive & ~yes, positive & ~yes, positive == yes, yes)
    return np.stack(columns, axis=1).astype(np.int64)


def mme_parse(answer: str) -> str:
    """Read one answer as "yes", "no" or "other" (the authors' calculation.py): its first four characters, lower-cased."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def blink_extract(text: str | None, choices: Sequence[str]) -> str | None:
    """The option that a free-text answer chooses (BLINK_Benchmark analyze_answer), as "(A)" to "(E)".

    `NEEDS_JUDGE` where that script asks a language model; None where it swallows an exception (no text, or more than
    five choices to list for the judge)."""
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


def read_letter(text: str) -> str | None:
    """The option, "(A)" to "(E)", whose letter a text names without doubt; None where it names none, several, or denies one.

    For answers at which BLINK's script asks its judge: "A.", "**A**", "Answer: A", "B. a dog", "A is closer". The article A is
    no letter, and where one might be the other, only a text that begins with the option ("B. A dog") is sure. Of the answers
    that BLINK saved with GPT's reading, this resolves 57 %, and 99 % of these alike."""
    text = re.sub(r"</?\w+>", " ", text)  # "<answer>B</answer>"
    if alone := _ALONE.fullmatch(text):
        return f"({alone[1].upper()})"
    announced, article = set(_ANNOUNCED.findall(text)), [found.start() for found in _ARTICLE.finditer(text)]
    named = {(found[1] or found[2]).upper() for found in _LETTER.finditer(text) if found.start() not in article}
    if len(announced) == 1:
        return f"({announced.pop()})"
    if len(named) != 1 or _DENIED.search(text):
        return None
    (letter,), first = named, _LEADING.match(text)
    return f"({letter})" if letter == "A" or not article or (first and first[1] == letter) else None


def low_mass(means: Mapping[str, float]) -> list[str]:
    """One warning, or none: by name, how much probability the scored options hold together, where that is below `LOW_MASS`."""
    low = {name: mean for name, mean in means.items() if mean < LOW_MASS}
    least = min(low, key=low.__getitem__, default=None)
    return [] if least is None else [
        f"in {len(low)} of {len(means)} cases the scored options hold less than {LOW_MASS:.0%} of the probability of how an answer "
        f"begins (least in {least}: {low[least]:.0%}): the model would say something else, so their scores say little"]  # fmt: skip


def blink_scores(items: Mapping[str, Sequence[tuple[str, str | None]]]) -> dict:
    """accuracy by subtask and "Total" (their plain mean), unresolved (share) and n by subtask.

    items: subtask -> [(gold, prediction)], both "(A)".."(E)"; a prediction counts when the strings are equal, so None and
    `NEEDS_JUDGE` are wrong, and their share is reported. Total weighs subtasks alike, as BLINK does."""
    accuracy = {name: sum(gold == said for gold, said in pairs) / len(pairs) for name, pairs in items.items()}
    accuracy["Total"] = sum(accuracy.values()) / len(accuracy)
    unresolved = {name: sum(said in (None, NEEDS_JUDGE) for _, said in pairs) / len(pairs) for name, pairs in items.items()}
    return {"accuracy": accuracy, "unresolved": unresolved, "n": {name: len(pairs) for name, pairs in items.items()}}
