"""What a notebook stores of a claim: its primary comparison, the others, and what has to hold for the effect to show at all.

`kvutils.run.verdicts` judges it by the claim's entry in data/claims.yaml; nothing here knows a threshold or a verdict. A claim is

    {primary: part, others: [part, ...], prerequisites: [{name, holds, reason}, ...], note: text, tasks: [part, ...], size: part, beyond: part}

with `note` a sentence of plain words with numbers, `tasks` the parts that a claim about a number of tasks is judged by, `size` the
measurement in the paper's own terms, where the primary comparison is in others, and `beyond` what is more of it than chance agreement gives."""

import math
from collections.abc import Mapping, Sequence

from kvutils.metrics.statistics import UNDEFINED, Effect

FEWEST_ERRORS = 20  # of a model, below which nothing can be said about its errors


def part(name: str, found: Effect = UNDEFINED, reason: str = "too few independent units to resample", **more: object) -> dict:
    """{name, value, low, high, low90, high90, detectable, error, n, units, freedom, ...} of one comparison; `reason` is kept where it or its
    interval is undefined. freedom: degrees of the interval's Student's t, fewer than units - 1 where several effects or draws meet. more:
    `unit` and `smallest`, the smallest effect of interest, where they are not those of the claim; `what` it is called in a sentence,
    where that is not "effect"."""
    numbers = found.as_dict() | {"freedom": found.units - 1}
    low, high = found.narrow if found.units > 1 else (math.nan, math.nan)
    derived = {"low90": low, "high90": high, "detectable": found.detectable if found.units > 1 else math.nan}
    numbers |= {key: None if math.isnan(value) else float(value) for key, value in derived.items()}
    why = {"reason": reason} if math.isnan(found.mean + found.low) else {}
    return {"name": name, "value": numbers.pop("mean"), **numbers, **why, **more}


def effect_of(found: Mapping) -> Effect:
    return Effect.of({**found, "mean": found["value"]})


def measured(primary: dict, others: Sequence[dict] = (), prerequisites: Sequence[dict] = (), note: str = "", **more: object) -> dict:
    """A claim as it is stored; see above. more: `tasks`, `size`, `beyond`."""
    return {"primary": primary, "others": list(others), "prerequisites": list(prerequisites), "note": note, **more}


def prerequisite(name: str, holds: bool, reason: str) -> dict:
    """Something that has been measured and has to hold, or the effect cannot appear. reason: with its numbers, a sentence of its
    own where it fails."""
    return {"name": name, "holds": bool(holds), "reason": reason}


def enough(name: str, count: int, least: int) -> dict:
    """At least so many of them."""
    return prerequisite(name, count >= least, f"{count:,} {name}, {least:,} are needed")


def no_ceiling(name: str, errors: int, least: int = FEWEST_ERRORS) -> dict:
    """The model makes enough errors on it to gain anything."""
    found = f"ceiling: {errors:,} errors on {name}, fewer than" if errors < least else f"{errors:,} errors on {name}, at least"
    return prerequisite(f"{name}: below the ceiling", errors >= least, f"{found} {least}")


def no_floor(name: str, above_control: Effect, unit: str) -> dict:
    """The baseline is above its control, such as the untrained model: the interval of their difference lies above 0."""
    found = f"{above_control.mean:+.1f} [{above_control.low:+.1f}, {above_control.high:+.1f}] {unit}"
    holds = above_control.low > 0
    return prerequisite(f"{name}: above the floor", holds, f"{'' if holds else 'floor: '}{name} is {found} from its control")


def lever(name: str, change: Effect, own: Effect, smallest: float, unit: str) -> dict:
    """Removing all that an intervention could touch changes something, or the intervention does (of which that is no bound): it fails where
    the 90 % intervals of both lie within +- the smallest effect of interest."""
    mean, low, high = (round(each, 2) + 0.0 for each in (change.mean, change.low, change.high))  # + 0.0: no "-0.00"
    holds = not all(-smallest < each.narrow[0] and each.narrow[1] < smallest for each in (change, own))
    known = f"{name} makes a difference of {mean:+.2f} [{low:+.2f}, {high:+.2f}] {unit}; {smallest:g} or more, by that or by the block, is"
    return prerequisite(f"{name}: a lever", holds, f"{known} not excluded" if holds else f"nothing to change there: {known} excluded")
