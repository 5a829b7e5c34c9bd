"""Claims about several models: X1 over families, C3 over models, seeds and training stages, from their results read together."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

from kvutils.metrics.effects import measured, part
from kvutils.metrics.statistics import POWER, Effect
from kvutils.plots.models import BEFORE
from kvutils.run.verdicts import ABSENT, CANNOT_TELL, OPPOSITE, PRESENT, is_current, judge, word_of

FEWEST_MODELS, FEWEST_FAMILIES = 6, 2
IN_EVERY_FAMILY = ("C1", "C2a", "C2b")
Models = Mapping[str, tuple[Mapping, Mapping]]  # name -> ({notebook: results}, {notebook: provenance})


def measure(models: Models, claims: Sequence[Mapping]) -> dict[str, dict]:
    """{"C3": ..., "X1": ...}, those of them that `claims` has, as a notebook stores them, of the models of one profile. Samples
    (`SIZE=quick`) count where there is nothing else."""
    full = fullest(models)
    by_id = {claim["id"]: claim for claim in claims}
    return {name: read(full, by_id) for name, read in {"C3": ability, "X1": families}.items() if name in by_id}


def fullest(models: Models) -> Models:
    full = {name: each for name, each in models.items() if size_of(each[0]) == "full"} or models
    weights: dict[str, str] = {}  # of the same ones, such as a copy of a folder, the first by name counts
    for name in sorted(full):
        weights.setdefault(full[name][1].get("01_value_flow", {}).get("revision") or name, name)
    return {name: each for name, each in full.items() if name in weights.values()}


def size_of(results: Mapping[str, Mapping]) -> str:
    """Of the data that a folder of results was measured on."""
    return next((found["parameters"]["size"] for found in results.values() if "size" in found.get("parameters", {})), "full")


def families(models: Models, claims: Mapping[str, Mapping]) -> dict:
    """X1: the weakest of the effects of C1, C2a and C2b over the families, by verdict, then by value. Each family speaks by the model
    of which most claims are measured. What cannot appear in one of them cannot be said of all. That one effect is there is said by its own
    interval, that one of several is not by an interval that holds for all of them at once."""
    chosen: dict[str, tuple[str, dict]] = {}
    for name, (results, provenance) in sorted(models.items(), key=lambda each: -sum(len(found.get("claims", ())) for found in each[1][0].values())):
        found = {key: each for key, each in results.get("01_value_flow", {}).get("claims", {}).items() if is_current(each)}
        family = provenance.get("01_value_flow", {}).get("family")
        if family and set(IN_EVERY_FAMILY) <= found.keys():
            chosen.setdefault(family, (name, found))
    if len(chosen) < FEWEST_FAMILIES:
        return measured(part("weakest effect over the families", reason=f"{len(chosen)} of {FEWEST_FAMILIES} families measured"))
    parts, needs, words = [], {}, []
    for family, (name, found) in chosen.items():
        for key in IN_EVERY_FAMILY:
            one = found[key]["primary"]
            parts.append(one | {"name": f"{key} in {family} ({name})"})
            said = {f"{each['reason']} ({family})": each for each in found[key]["prerequisites"]}
            needs |= {reason: {**each, "reason": reason} for reason, each in said.items()}
            words.append(judge(claims[key], found[key]).word)
    order = [OPPOSITE, ABSENT, CANNOT_TELL, PRESENT]  # of an undefined one the reason comes first
    smallest, listed = claims["X1"]["smallest"], parts
    parts = [one if one["low"] is None or word_of(one, smallest) == PRESENT else at_once(one, len(listed)) for one in listed]
    weakest = min(parts, key=lambda one: (-1, 0) if one["low"] is None else (order.index(word_of(one, smallest)), one["value"]))
    about = {"what": f"weakest of {len(listed)} effects, {weakest['name'].partition(', its')[0]},"}
    note = f"{words.count(PRESENT)} of {len(words)} effects are present, over {len(chosen)} families, of " \
           f"which one model speaks for each ({', '.join(name for name, _ in chosen.values())})."
    others = [each for each, other in zip(listed, parts, strict=True) if other is not weakest]
    return measured(weakest | about, others, list(needs.values()), note)


def at_once(one: Mapping, count: int) -> dict:
    """A part with intervals that hold for so many parts at once (Bonferroni)."""
    reach, narrow = (float(stdtrit(max(one["freedom"], 1), 1 - level / count)) * one["error"] for level in (0.025, 0.05))
    value = one["value"]
    return {**one, "name": f"{one['name']}, its interval for {count} effects at once", "low": value - reach, "high": value + reach,
            "low90": value - narrow, "high90": value + narrow,
            "detectable": reach + float(stdtrit(max(one["freedom"], 1), POWER)) * one["error"]}  # fmt: skip


def ability(models: Models, claims: Mapping[str, Mapping]) -> dict:
    """C3: correlation of what the language model adds, mean over the tasks of notebook 01, with accuracy, the mean of POPE's (notebook
    03) and the mean of the subtasks of BLINK that are asked (05; BLINK has 14). Models that lack one of the three, or a task that others
    have, are left out. A model and what it was before its last stage are one training: both are in the correlation, its interval counts
    them once."""
    points = adds_and_ability(models)
    most = max((tasks for *_, tasks in points.values()), default=0)
    points = {model: (x, y) for model, (x, y, tasks) in points.items() if tasks == most}
    name = "correlation of best value minus projector with accuracy (mean of POPE and BLINK)"
    if len(points) < FEWEST_MODELS:
        return measured(part(name, reason=f"{len(points)} of {FEWEST_MODELS} models or stages measured"))
    added, accuracy = np.array(list(points.values())).T
    of_family = [models[model][1].get("01_value_flow", {}).get("family", "?") for model in points]
    note = f"Mean over {most} tasks: " + "; ".join(f"{model} adds {x:+.1f} points, accuracy {y:.1f} %" for model, (x, y) in points.items())
    trainings = len({model.removesuffix(BEFORE) for model in points})
    note += f". The interval counts {trainings} trainings: a model and its own earlier stage are not two; seeds of a family count as two."
    least = math.ceil(3 + (NormalDist().inv_cdf(0.95) / math.atanh(claims["C3"]["smallest"])) ** 2)  # then the 90 % interval of r = 0 lies within +- smallest
    note += f" Fewer than {least} cannot show that there is no correlation."
    within = [correlation("the same within families: each family's mean taken off", added, accuracy, trainings, of_family)] if 1 < len({*of_family}) else []
    return measured(correlation(name, added, accuracy, trainings), within, note=note)


def shown(models: Models) -> dict[str, dict]:
    """What `plots.models` draws of the models of one profile."""
    full = fullest(models)
    points, found = adds_and_ability(full), {}
    for name, (results, provenance) in full.items():
        claims = results.get("01_value_flow", {}).get("claims", {})
        parts = {key: claims[key]["primary"] for key in IN_EVERY_FAMILY if claims.get(key, {}).get("primary", {}).get("low") is not None}
        found[name] = {"family": provenance.get("01_value_flow", {}).get("family", "?"), "adds": points[name][:2] if name in points else None,
                       **{key: {"mean": one["value"], "low": one["low"], "high": one["high"]} for key, one in parts.items()}}  # fmt: skip
    return found


def adds_and_ability(models: Models) -> dict[str, tuple[float, float, int]]:
    """model -> what its language model adds, in points, mean over so many tasks; its accuracy in %; the number of tasks."""
    points = {}
    for name, (results, _) in sorted(models.items()):
        adds = results.get("01_value_flow", {}).get("language_model_adds", {"mean": {"value": None}, "tasks": []})
        pope = results.get("03_input_agnostic_keys", {}).get("blocking", {}).get("pope", {}).get("plain", {})
        pope = pope.get("scores", {}).get("mean", {}).get("accuracy", {}).get("mean")
        blink = results.get("05_blink_gap", {}).get("official", {}).get("accuracy", {}).get("Total")
        if None not in (adds["mean"]["value"], pope, blink):
            points[name] = adds["mean"]["value"], 50 * (pope + blink), sum(each["value"] is not None for each in adds["tasks"])
    return points


def correlation(name: str, x: np.ndarray, y: np.ndarray, units: int, groups: Sequence | None = None) -> dict:
    """Part of Pearson's r of n pairs, its intervals by Fisher's transformation for so many independent units; undefined below 4 of them
    and where one of the two never differs. With groups, of what is left when each group's mean is taken off: a partial correlation, with
    as many fewer units as there are groups beyond the first."""
    left = units
    if groups is not None:
        member = np.equal.outer(np.unique(groups), groups).astype(float)  # (groups, n)
        x, y = (each - (member @ each / member.sum(axis=1)) @ member for each in (x, y))
        left -= len(member) - 1
    if min(np.ptp(x), np.ptp(y)) < 1e-12:
        return part(name, reason="the models do not differ")
    if left < 4:
        return part(name, reason=f"{units} trainings are too few{'' if groups is None else ' for their families'}")
    r, error, normal = float(np.corrcoef(x, y)[0, 1]), 1 / math.sqrt(left - 3), NormalDist()
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    (low90, high90), (low, high) = ((math.tanh(z - reach), math.tanh(z + reach)) for reach in (error * normal.inv_cdf(p) for p in (0.95, 0.975)))
    detectable = math.tanh(error * (normal.inv_cdf(0.975) + normal.inv_cdf(POWER)))
    return part(name, Effect(r, low, high, len(x), error, units), low90=low90, high90=high90, detectable=detectable)
