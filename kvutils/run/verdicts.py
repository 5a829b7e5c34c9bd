"""From a measurement to a verdict and one plain sentence. The rules are here, their numbers in data/claims.yaml; see both.

In this order:

    not measured         no measurement, or one that is undefined, and why
    cannot appear here   a prerequisite that was measured fails: ceiling, floor, no lever, too few images or models
    present              the 95 % interval lies above 0; of the paper's size where it reaches the paper's figure, else smaller
    opposite             the 95 % interval lies below 0 and reaches beyond minus the smallest effect of interest
    absent               the 90 % interval lies within +- the smallest effect of interest: larger effects are excluded
    cannot tell          none of these; the effect that would have been found with probability .8 is stated

Claims about a number of tasks (`kind: tasks`) are present if some task is ahead by Holm's procedure over the tasks, of the paper's
size if as many are as in the paper; opposite if none is ahead and some behind; absent if all are equal. A question whether nothing
changes (`kind: equal`) holds where `absent` is shown, and fails where a change of the smallest size of interest is.
X claims are questions of ours: they hold (present) or do not hold (absent); the other words are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

NOT_MEASURED, CANNOT_APPEAR, PRESENT, OPPOSITE, ABSENT, CANNOT_TELL = (
    "not measured", "cannot appear here", "present", "opposite", "absent", "cannot tell")
HOLDS, FAILS = "holds", "does not hold"
VERDICTS = (NOT_MEASURED, CANNOT_APPEAR, PRESENT, OPPOSITE, ABSENT, CANNOT_TELL, HOLDS, FAILS)
FEW_UNITS = 10  # below: "few units" is said
LEVEL = 0.025  # one-sided, of a 95 % interval


@dataclass(frozen=True)
class Verdict:
    """A word of `VERDICTS`, and one plain sentence of why, with numbers."""

    word: str
    why: str


def judge(claim: Mapping, found: Mapping | None) -> Verdict:
    """The verdict on a claim of data/claims.yaml from what a notebook stored of it (`kvutils.metrics.effects`)."""
    if found is None:
        return Verdict(NOT_MEASURED, "Nothing has measured it yet.")
    failed = [each["reason"] for each in found["prerequisites"] if not each["holds"]]
    if failed:
        return Verdict(CANNOT_APPEAR, f"It cannot appear here: {'; '.join(failed)}.")
    rule = {"effect": of_effect, "tasks": of_tasks, "equal": of_equality}[claim["kind"]]
    verdict = rule(claim, found)
    if claim["id"].startswith("X"):
        verdict = Verdict({PRESENT: HOLDS, ABSENT: FAILS}.get(verdict.word, verdict.word), verdict.why)
    return verdict


def of_effect(claim: Mapping, found: Mapping) -> Verdict:
    """By the primary comparison."""
    one, unit = found["primary"], claim["unit"]
    if one["low"] is None:
        return Verdict(NOT_MEASURED, f"Not defined: {one['reason']}.")
    smallest, about = claim["smallest"], _about(one, unit)
    word = word_of(one, smallest)
    if word == PRESENT:
        return Verdict(word, f"The effect is there: {about}{_size(claim, found)}.")
    if word == OPPOSITE:
        return Verdict(word, f"It points the other way: {about}.")
    if word == ABSENT:
        return Verdict(word, f"Effects of {smallest:g} {unit} or more are excluded: {about}.")
    least = "nothing ever differed" if one["detectable"] is None else f"only {one['detectable']:.2g} {unit} or more would have been found"
    return Verdict(word, f"Open: {about}; {least} with probability .8.")


def word_of(one: Mapping, smallest: float) -> str:
    """Verdict on one comparison: `PRESENT`, `OPPOSITE`, `ABSENT`, `CANNOT_TELL`, or `NOT_MEASURED` where it is undefined."""
    if one["low"] is None:
        return NOT_MEASURED
    if one["low"] > 0:
        return PRESENT
    if one["high"] < 0 and one["low"] < -smallest:
        return OPPOSITE
    return ABSENT if -smallest < one["low90"] and one["high90"] < smallest else CANNOT_TELL


def of_equality(claim: Mapping, found: Mapping) -> Verdict:
    """Does nothing change? By the largest change, the primary comparison."""
    one, smallest, unit = found["primary"], claim["smallest"], claim["unit"]
    if one["low"] is None:
        return Verdict(NOT_MEASURED, f"Not defined: {one['reason']}.")
    if -smallest < one["low90"] and one["high90"] < smallest:
        return Verdict(PRESENT, f"Changes of {smallest:g} {unit} or more are excluded; the largest is {_about(one, unit)}.")
    if one["low"] > smallest or one["high"] < -smallest:
        return Verdict(ABSENT, f"It changes by more than {smallest:g} {unit}: {_about(one, unit)}.")
    return Verdict(CANNOT_TELL, f"Open: the largest change is {_about(one, unit)}.")


def of_tasks(claim: Mapping, found: Mapping) -> Verdict:
    """By the number of tasks that are ahead."""
    tasks, smallest = [each for each in found["tasks"] if each["low"] is not None], claim["smallest"]
    if not tasks:
        return Verdict(NOT_MEASURED, "No task was measured.")
    ahead, behind = (_surely(tasks, sign) for sign in (1, -1))
    behind = [each for each in behind if each["low"] < -smallest]
    words = [word_of(each, smallest) for each in tasks]
    about = f"{words.count(PRESENT)} of {len(tasks)} tasks ahead, {words.count(OPPOSITE)} behind, {words.count(ABSENT)} equal, "
    about += f"{len(tasks) - sum(map(words.count, (PRESENT, OPPOSITE, ABSENT)))} open"
    if ahead:
        size = "as many as in the paper" if words.count(PRESENT) >= claim["effect"] else f"fewer than the paper's {claim['effect']}"
        return Verdict(PRESENT, f"It is there: {about}; {size}.")
    if behind:
        return Verdict(OPPOSITE, f"It points the other way: {about} (paper: {claim['effect']} ahead).")
    if words.count(ABSENT) == len(tasks):
        return Verdict(ABSENT, f"Differences of {smallest:g} {claim['unit']} or more are excluded: {about}.")
    return Verdict(CANNOT_TELL, f"Open: {about}.")


def _surely(tasks: Sequence[Mapping], sign: int) -> list[Mapping]:
    """The tasks above 0 (sign 1) or below (-1) by Holm's procedure: one false one among them in 2.5 % of the cases."""
    def chance(one: Mapping) -> float:
        if not one["error"]:
            return 0.0 if sign * one["value"] > 0 else 1.0
        return float(student.sf(sign * one["value"] / one["error"], one["units"] - 1))

    sure = []
    for rank, one in enumerate(sorted(tasks, key=chance)):
        if chance(one) > LEVEL / (len(tasks) - rank):
            break
        sure.append(one)
    return sure


def _about(one: Mapping, unit: str) -> str:
    few = f", few units ({one['units']})" if one["units"] < FEW_UNITS else ""
    return f"{one['value']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}] {unit}{few}"


def _size(claim: Mapping, found: Mapping) -> str:
    """How a present effect compares with the paper's figure, where it states one."""
    one = found.get("size") or found["primary"]
    if claim["effect"] is None:
        return "" if one["high"] >= claim["smallest"] else f", smaller than what would matter ({claim['smallest']:g})"
    reaches = one["high"] is not None and one["high"] >= claim["effect"]
    return f", of the paper's size ({claim['effect']:g})" if reaches else f", smaller than the paper's {claim['effect']:g}"
