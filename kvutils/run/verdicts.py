"""From a measurement to a verdict and one plain sentence. The rules are here, their numbers in data/claims.yaml; see both.

In this order:

    not measured         no measurement, or one that is undefined, and why
    cannot appear here   a prerequisite that was measured fails: ceiling, floor, no lever, too few images
    present              the 95 % interval lies above 0; of the paper's size where it reaches the paper's figure, else smaller
    opposite             the 95 % interval lies below 0 and reaches beyond minus the smallest effect of interest
    absent               the 90 % interval lies within +- the smallest effect of interest: larger effects are excluded
    cannot tell          none of these; the effect that would have been found with probability .8 is stated

Claims about a number of tasks (`kind: tasks`) are present if some task (of C4's several, `least` 2) is ahead by Holm's procedure over the
tasks, of the paper's size if as many are as in the paper (each by its own interval, as all counts that are said); opposite if none is ahead
and as many behind; absent if all are equal. A question whether nothing changes (`kind: equal`) holds where `absent` is shown, and fails where a change of the smallest size of interest is. X claims are questions of
ours: they hold (present) or do not hold (absent); the other words are the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr

NOT_MEASURED, CANNOT_APPEAR, PRESENT, OPPOSITE, ABSENT, CANNOT_TELL = (
    "not measured", "cannot appear here", "present", "opposite", "absent", "cannot tell")
HOLDS, FAILS = "holds", "does not hold"
VERDICTS = (NOT_MEASURED, CANNOT_APPEAR, PRESENT, OPPOSITE, ABSENT, CANNOT_TELL, HOLDS, FAILS)
NOTHING = "Nothing has measured it yet."
SAY_FEW = 10  # below: "few units" is said
FEW_TO_EXCLUDE = 30  # units: where nothing differs in fewer, nothing is excluded either
LEVEL = 0.025  # one-sided, of a 95 % interval


@dataclass(frozen=True)
class Verdict:
    """A word of `VERDICTS`, and one plain sentence of why, with numbers."""

    word: str
    why: str


def judge(claim: Mapping, found: Mapping | None) -> Verdict:
    """The verdict on a claim of data/claims.yaml from what a notebook stored of it (`kvutils.metrics.effects`)."""
    if found is None:
        return Verdict(NOT_MEASURED, NOTHING)
    if not is_current(found):
        again = f"run notebook {claim['notebook'][:2]} again" if claim["notebook"] else "run the notebooks again"
        return Verdict(NOT_MEASURED, f"Its results are of another version of kvutils: {again}.")
    failed = [each["reason"] for each in found["prerequisites"] if not each["holds"]]
    if failed:
        return Verdict(CANNOT_APPEAR, _sentence("; ".join(dict.fromkeys(failed))))
    verdict = of_tasks(claim, found) if claim["kind"] == "tasks" else of_effect(claim, found)
    return Verdict(_of_a_question(claim, verdict.word), verdict.why)


def is_current(found: Mapping) -> bool:
    """Whether what is stored of a claim has what this version judges by."""
    return "freedom" in found.get("primary", {})


def smallest_of(claim: Mapping, one: Mapping) -> float | None:
    """The smallest effect of interest of a comparison: its own, or that of the claim where it is in the same unit."""
    return one.get("smallest", claim["smallest"] if one.get("unit", claim["unit"]) == claim["unit"] else None)


def word_of_part(claim: Mapping, one: Mapping) -> str | None:
    """The word for one comparison of a claim; None where no smallest effect of interest is stated."""
    if (smallest := smallest_of(claim, one)) is None:
        return None
    return _of_a_question(claim, word_of(one, smallest, claim["kind"] == "equal"))


def _of_a_question(claim: Mapping, word: str) -> str:
    said = {PRESENT: HOLDS, ABSENT: FAILS} | ({OPPOSITE: FAILS} if claim["id"] == "X1" else {})  # one family that disagrees is enough
    return said.get(word, word) if claim["id"].startswith("X") else word


def word_of(one: Mapping, smallest: float, equal: bool = False) -> str:
    """Verdict on one comparison: `PRESENT`, `OPPOSITE`, `ABSENT`, `CANNOT_TELL`, or `NOT_MEASURED` where it is undefined; of a change
    that should not be (`equal`): `PRESENT` where equality is shown, `ABSENT` where a change is."""
    if one["low"] is None or one["low90"] is None:
        return NOT_MEASURED
    known = one["error"] or one["units"] >= FEW_TO_EXCLUDE
    excluded = known and -smallest < one["low90"] and one["high90"] < smallest
    if equal:
        return PRESENT if excluded else ABSENT if one["low"] > smallest or one["high"] < -smallest else CANNOT_TELL
    if one["low"] > 0:
        return PRESENT
    if one["high"] < 0 and one["low"] < -smallest:
        return OPPOSITE
    return ABSENT if excluded else CANNOT_TELL


def decided_by(claim: Mapping, found: Mapping) -> Mapping:
    """The comparison that a verdict rests on: the primary one. Of a question whether nothing changes that is the change that may be
    largest; that something changes is shown by any of the comparisons, by Holm's procedure over all, and decided by the largest of these."""
    return max(_changed(claim, found), key=lambda each: abs(each["value"]), default=found["primary"])


def _changed(claim: Mapping, found: Mapping) -> list[Mapping]:
    if claim["kind"] != "equal" or found["primary"]["low"] is None:
        return []
    listed = [each for each in (found["primary"], *found["others"]) if each["low"] is not None]
    return [each for sign in (1, -1) for each in _surely(listed, sign, claim["smallest"])]


def of_effect(claim: Mapping, found: Mapping) -> Verdict:
    """By the comparison of `decided_by`."""
    one, smallest, unit, equal = decided_by(claim, found), claim["smallest"], claim["unit"], claim["kind"] == "equal"
    word = word_of(one, smallest, equal)
    if equal and word != NOT_MEASURED:
        word = ABSENT if _changed(claim, found) else PRESENT if word == PRESENT else CANNOT_TELL
    if word == NOT_MEASURED:
        return Verdict(word, _sentence(one.get("reason") or "too few resamples"))
    what, about = one.get("what", "effect"), f"{interval_of(one)} {unit}{_few(one)}"
    if word == (PRESENT if equal else ABSENT):
        value, low, high = texts(one["value"], one["low90"], one["high90"])
        return Verdict(word, f"{'A change' if equal else 'An effect'} of {amount(smallest, unit)} or more is excluded: the {what} is {value} {unit}, "
                             f"its 90 % interval [{low}, {high}]{_few(one)}.")  # fmt: skip
    if word == CANNOT_TELL:
        least = f"only {rough(one['detectable'])} {unit} or more" if one["error"] and one["detectable"] <= one.get("most", one["detectable"]) else "none"
        least = f"{least} would have been found with probability .8" if one["error"] else "too few to differ"
        return Verdict(word, f"Open: the {what} is {about}; {least}.")
    if word == OPPOSITE:
        return Verdict(word, f"The effect points the other way: {about}.")
    return Verdict(word, f"It changes by more than {smallest:g}: {about} ({one['name']})." if equal else f"The effect is {about}{_size(claim, found)}.{_beyond(found, unit)}")


def of_tasks(claim: Mapping, found: Mapping) -> Verdict:
    tasks, smallest, paper = [each for each in found.get("tasks", ()) if each["low"] is not None], claim["smallest"], claim["effect"]
    if len(tasks) < claim["least"]:
        return Verdict(NOT_MEASURED, f"{len(tasks)} tasks were measured, {claim['least']} are needed." if tasks else "No task was measured.")
    ahead, behind = (_surely(tasks, sign) for sign in (1, -1))
    behind = [each for each in behind if each["low"] < -smallest]
    words = [word_of(each, smallest) for each in tasks]
    count = {word: words.count(word) for word in (PRESENT, OPPOSITE, ABSENT, CANNOT_TELL)}
    about = f"{count[PRESENT]} of {len(tasks)} tasks ahead, {count[OPPOSITE]} behind, {count[ABSENT]} equal, {count[CANNOT_TELL]} open"
    if len(ahead) >= claim["least"]:
        size = f"fewer ahead than the {paper} of the paper" if count[PRESENT] < paper else f"at least the {paper} of the paper"
        return Verdict(PRESENT, f"{about}; {size}.")
    if len(behind) >= claim["least"] and not ahead:
        return Verdict(OPPOSITE, f"It points the other way: {about}; in the paper {paper} are ahead.")
    if count[ABSENT] == len(tasks):
        return Verdict(ABSENT, f"Differences of {amount(smallest, claim['unit'])} or more are excluded on all {len(tasks)} tasks.")
    sure = f"; of all together surely {len(ahead)} ahead and {len(behind)} behind, {claim['least']} would do"
    few = sure if ahead or behind else " (one of several may be so by chance)" if count[PRESENT] + count[OPPOSITE] else ""
    return Verdict(CANNOT_TELL, f"Open: {about}{few}; in the paper {paper} are ahead.")


def _surely(tasks: Sequence[Mapping], sign: int, beyond: float = 0.0) -> list[Mapping]:
    """The tasks above `beyond` (sign 1) or below minus it (-1) by Holm's procedure: one false one among them in 2.5 % of the cases."""
    def chance(one: Mapping) -> float:
        over = sign * one["value"] - beyond
        if not one["error"]:
            return 0.0 if over > 0 else 1.0
        return float(stdtr(one["freedom"], -over / one["error"]))

    sure = []
    for rank, one in enumerate(sorted(tasks, key=chance)):
        if chance(one) > LEVEL / (len(tasks) - rank):
            break
        sure.append(one)
    return sure


def rough(value: float) -> str:
    """Two digits, no exponent.

    >>> rough(0.0123), rough(1.26), rough(168.2)
    ('0.012', '1.3', '168')
    """
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def amount(value: float, unit: str) -> str:
    """`1.5 F1 points`, `1 layer`."""
    return f"{value:g} {unit.removesuffix('s') if value == 1 and ' ' not in unit else unit}"


def texts(*values: float) -> list[str]:
    """`+0.04`, `-0.10`: with sign and the same number of decimals, two where all are below 10, else one; no `-0.00`.

    >>> texts(0.04, -0.001, 1.25), texts(12.34, 8)
    (['+0.04', '+0.00', '+1.25'], ['+12.3', '+8.0'])
    """
    digits = 2 if max(map(abs, values)) < 9.995 else 1
    return [f"{round(value, digits) + 0.0:+.{digits}f}" for value in values]


def interval_of(one: Mapping) -> str:
    """`+0.04 [+0.00, +0.10]` of a comparison, or why it is not defined."""
    if one["low"] is None:
        known = "" if one["value"] is None else f"{texts(one['value'])[0]}, interval "
        return f"{known}not defined: {one['reason']}"
    return "{} [{}, {}]".format(*texts(one["value"], one["low"], one["high"]))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _few(one: Mapping) -> str:
    if one["units"] < SAY_FEW:
        return f" (few units: {one['units']})"
    return f" (few degrees of freedom: {one['freedom']})" if one["freedom"] < SAY_FEW - 1 else ""


def _beyond(found: Mapping, unit: str) -> str:
    """What is left of an effect that two things which have nothing to do with each other would show as well (C8)."""
    return f" Beyond independence of the two it is {interval_of(found['beyond'])} {unit}." if "beyond" in found else ""


def _size(claim: Mapping, found: Mapping) -> str:
    """How a present effect compares with what would matter and with the paper's figure, if there is one; in the paper's terms if they differ."""
    one, paper, high = found.get("size") or found["primary"], claim["effect"], found["primary"]["high"]
    if paper is None or high < claim["smallest"]:
        return "" if high >= claim["smallest"] else f", smaller than what would matter ({claim['smallest']:g})"
    terms = f"; in its terms ours is {interval_of(one)}" if found.get("size") else ""
    reaches = one["high"] is not None and one["high"] >= paper
    return f", of the paper's size ({paper:g}{terms})" if reaches else f", smaller than the paper's {paper:g}{terms}"
