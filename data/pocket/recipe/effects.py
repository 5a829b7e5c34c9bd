"""What the ingredients of the arms change: each arm minus the one it is compared with, with intervals over seeds and items.

Items are the same development scenes in every arm and seed, so that a difference is paired and both are resampled: an item is drawn as
often as its seed and its scene (the pigeonhole bootstrap of `kvutils.metrics.statistics`). Few seeds vary more than it can see, so that the
interval is never narrower than that over the differences of the seeds alone (Student's t), and there is none with fewer than two."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import UNDEFINED, Effect, Statistic, mean_statistic, paired_difference
from kvutils.store import read_json
from kvutils.tasks.foreground_segmentation import foreground_miou
from kvutils.tasks.key_statistics import NEAR_CONSTANT
from recipe.arms import ARMS, QUESTIONS, SEEDS, START
from recipe.measure import FIRST, SIZES

Results = Mapping[str, Mapping[int, Mapping]]  # arm -> seed -> what `make organisms` stored


@dataclass(frozen=True)
class Reading:
    """One number of a training. of: result -> scores (items, ...) and the scenes of the items, None: it is one number. unit: of 100 times
    the statistic where `factor` is 100. control: as `of`, where what is read comes from nothing."""

    name: str
    of: Callable[[Mapping], tuple[np.ndarray, Sequence]]
    statistic: Statistic = mean_statistic
    factor: float = 100
    unit: str = "points"
    control: Callable[[Mapping], tuple[np.ndarray, Sequence]] | None = None

    def each(self, result: Mapping) -> float:
        scores, _ = self.of(result)
        return self.factor * float(self.statistic(np.ones((1, len(scores))), scores)[0])


def _read_from(attribute: str, name: str, family: str) -> Reading:
    of, control = (partial(_probe, attribute=attribute, family=family, labels=labels) for labels in ("right", "shuffled"))
    return Reading(f"{attribute} read from {name}", of, control=control)


def load(folder: Path) -> dict[str, dict[int, dict]]:
    """The stored results of the arms, in their order, without trials of fewer steps or items; what is not trained counts with every seed."""
    found: dict[str, dict[int, dict]] = {name: {} for name in ARMS}
    for file in sorted(folder.glob("*.json")):
        result = read_json(file)
        arm = ARMS.get((about := result["about"])["arm"])
        if arm and (about["steps"], about["sizes"]) == (arm.steps, SIZES):
            found[about["arm"]] |= {seed: result for seed in ((about["seed"],) if about["steps"] else SEEDS)}
    return {name: seeds for name, seeds in found.items() if seeds}


def _bits(text: str) -> np.ndarray:
    return np.array([each == "1" for each in text], dtype=float)


def _accuracy(*kinds: str) -> Callable:
    def of(result: Mapping) -> tuple[np.ndarray, list]:
        found = [result["accuracy"][kind] for kind in kinds or result["accuracy"]]
        return np.concatenate([_bits(each["right"]) for each in found]), sum((each["scenes"] for each in found), [])

    return of


def _probe(result: Mapping, attribute: str, family: str, labels: str) -> tuple[np.ndarray, list]:
    """Mean over the layers but that of the first value projection."""
    found = result["readouts"][attribute]
    right = [_bits(bits) for source, bits in found[labels].items() if source.partition(".")[0] == family and source != "value.0"]
    return np.mean(right, axis=0), found["scenes"]


def _near(places: slice) -> Callable:
    def of(result: Mapping) -> tuple[np.ndarray, list]:
        near = (np.array(result["keys"]["relative_variance"])[1:] < NEAR_CONSTANT).mean(axis=(0, 1))  # after layer 0
        return near[places], [*range(len(near))][places]

    return of


def _most_constant(result: Mapping) -> tuple[np.ndarray, None]:
    return np.array([np.quantile(result["keys"]["relative_variance"][1:], 0.01)]), None


def _of_keys(name: str, first: int = 1) -> Callable:
    return lambda result: (np.array([np.mean(result["keys"][name][first:])]), None)


def _blink(subtask: str, score: Callable) -> Callable:
    def of(result: Mapping) -> tuple[np.ndarray, list]:
        found = result["blink"][subtask]
        answers = {key: np.array(found[key]) for key in ("gold", "said", "value", "added", "gate")}
        right = {key: (each == answers["gold"]).astype(float) for key, each in answers.items()}
        return score(right, answers["said"] >= 0), found["ids"]

    return of


def _prefix(other: str) -> Callable:
    def of(result: Mapping) -> tuple[np.ndarray, list]:
        iou = {name: np.array(each)[:, 1:].mean(axis=1) for name, each in result["prefix"]["iou"].items()}
        return iou["correct"] - iou[other], result["prefix"]["groups"]

    return of


def _built(minus: int) -> Callable:
    """Foreground pixels (items, 2, 6) in the best layer between, chosen on the other half of the episodes, and in layer 1 or the last."""

    def of(result: Mapping) -> tuple[np.ndarray, list]:
        found = result["foreground"]
        layers = len(found["pixels"]) - sum("." not in source for source in found["pixels"])
        about, nothing = (np.array(found["fold"]), np.array(found["class"])), np.zeros(len(found["fold"]))
        curve = np.stack([np.column_stack([*about, nothing, inside, nothing, union]) for layer in range(1, layers)
                          for inside, union in [found["pixels"][f"value.{layer}"]]], axis=1)  # fmt: skip
        halves = Halves.of([*zip(*about, strict=True)], 0)  # by class: supports are shared within one
        best = [1 + index for index in halves.best(curve[:, 1:-1], foreground_miou)]
        return np.stack([halves.read(curve, best), curve[:, minus]], axis=1), found["groups"]

    return of


def _difference(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    return foreground_miou(weights, values[:, 0]) - foreground_miou(weights, values[:, 1])


_ATTRIBUTES = ("style", "light", "class", "colour", "side", "part")
_GAP = "values right, model wrong"
READINGS: Mapping[str, tuple[Reading, ...]] = {  # of each question; the first is its headline
    "OQ1": (*(_read_from(name, "the tower", "encoder") for name in _ATTRIBUTES), *(_read_from(name, "values", "value") for name in _ATTRIBUTES),
            Reading("accuracy, existence", _accuracy("existence")), Reading("accuracy, style", _accuracy("style"))),
    "OQ2": (Reading("near-constant keys", _near(slice(None)), unit="% of keys"),
            Reading(f"near-constant among the first {FIRST}", _near(slice(FIRST)), unit="% of keys"),
            Reading("near-constant among the others", _near(slice(FIRST, None)), unit="% of keys"),
            # Added when `start` and `base` had been measured and no key of theirs was near-constant: how near the nearest hundredth comes.
            Reading("variance of the most constant 1 % of keys", _most_constant, unit="% of their squared norm"),
            Reading("attention to the first token", _of_keys("mass_of_first_token"), unit="% of attention"),
            Reading(f"attention to the first {FIRST} image tokens", _of_keys("mass_first"), unit="% of attention"),
            Reading("norm of keys", _of_keys("norm"), factor=1, unit="key units"), Reading("norm of key biases", _of_keys("bias"), factor=1, unit="key units"),
            Reading("accuracy, all kinds", _accuracy())),
    "OQ3": tuple(Reading(f"{title}: {name}", _blink(subtask, score))
                 for subtask, title in (("Art_Style", "art style"), ("Visual_Similarity", "visual similarity")) for name, score in (
                     (_GAP, lambda right, named: right["value"] * (1 - right["said"]) * named), ("accuracy", lambda right, named: right["said"]),
                     ("gain by the readout added", lambda right, named: right["added"] - right["said"]),
                     ("gain by the gate", lambda right, named: right["gate"] - right["said"]))) + (
                         Reading("accuracy, questions in two steps", _accuracy("hop_class", "hop_colour", "hop_match", "hop_more", "hop_same")),),
    "OQ4": (Reading("correct minus wrong prefix", _prefix("wrong")), Reading("correct minus filler", _prefix("filler")),
            Reading("how far values of objects move", lambda result: (np.array([np.mean(result["prefix"]["moved"]["correct"][1:])]), None),
                    unit="% of their norm")),
    "OQ5": (Reading("best layer between minus layer 1", _built(0), _difference),
            Reading("best layer between minus the last", _built(-1), _difference)),
    "OQ6": (Reading("accuracy, class and colour in a text", _accuracy("class", "colour")), Reading("accuracy, class in a text", _accuracy("class")),
            Reading("accuracy, colour in a text", _accuracy("colour")),
            # In place of the attention to the token before, which told nothing: seen when two seeds had been trained.
            Reading("attention of a thing's name to its colour, the head with most", lambda result: (np.array([np.max(result["bound"])]), None),
                    unit="% of attention")),
}  # fmt: skip


def effect_of(reading: Reading, results: Results, arm: str, against: str) -> Effect:
    """The arm minus the other in what is read, over the seeds that both have; `UNDEFINED` where there are none, or it was not measured."""
    seeds = seeds_of(results, arm, against)
    try:
        read = [[(reading.of(results[name][seed]), reading.each(results[name][seed])) for seed in seeds] for name in (arm, against)]
    except KeyError:  # patches in reverse have no readouts
        return UNDEFINED
    if not seeds:
        return UNDEFINED
    over_seeds = paired_difference(*([each for _, each in one] for one in read))
    if read[0][0][0][1] is None:
        return over_seeds
    ones, others = (np.concatenate([scores for (scores, _), _ in one]) for one in read)
    groups = [(f"seed {seed}", str(scene)) for seed, ((_, scenes), _) in zip(seeds, read[0], strict=True) for scene in scenes]
    over_items = paired_difference(ones, others, reading.statistic, groups=groups).scaled(reading.factor)
    return replace(over_items, low=float(np.minimum(over_items.low, over_seeds.low)), high=float(np.maximum(over_items.high, over_seeds.high)))


def seeds_of(results: Results, arm: str, against: str) -> list[int]:
    """Those that both have."""
    return sorted(results.get(arm, {}).keys() & results.get(against, {}).keys())


def effects(results: Results) -> dict[str, dict[str, dict]]:
    """question -> arm -> {against, varies, seeds, readings: name -> effect as a mapping, with `seeds`: the difference of each; unit; control:
    of what it is compared with, or None}; only arms that exist, JSON-able. Where both have 0 with every seed, or no item differs, there is no interval."""
    found: dict[str, dict[str, dict]] = {}
    for question, readings in READINGS.items():
        found[question] = {}
        for name, arm in ARMS.items():
            seeds = seeds_of(results, name, arm.against)
            if question not in arm.questions or arm.against == name or not seeds:
                continue
            read = {}
            for reading in readings:
                each = effect_of(reading, results, name, arm.against)
                if each.n:
                    ones, others = ([reading.each(results[each][seed]) for seed in seeds] for each in (name, arm.against))
                    control = reading.control and float(np.mean([replace(reading, of=reading.control).each(results[arm.against][seed]) for seed in seeds]))
                    about = {"seeds": [one - other for one, other in zip(ones, others, strict=True)], "unit": reading.unit, "control": control}
                    same = "0 in both" if not any(ones + others) else "" if each.error else "no item differs"  # resampling 0 is no interval
                    nothing = {"low": None, "high": None, "reason": same} if same else {}
                    read[reading.name] = each.as_dict() | about | nothing
            found[question][name] = {"against": arm.against, "varies": arm.varies, "seeds": seeds, "readings": read}
    return found


def trained(arms: Mapping[str, Mapping]) -> bool:
    """Whether a question of `effects` has any arm beside the shipped model, which counts for all."""
    return bool(arms.keys() - {START})


def levels(results: Results) -> dict[str, dict[str, dict]]:
    """question -> reading -> arm -> its value in each seed: what the differences are differences of."""
    return {question: {reading.name: {name: [reading.each(result) for result in results[name].values()] for name in _arms(question)
                                      if name in results and _has(reading, results[name])} for reading in readings}
            for question, readings in READINGS.items()}  # fmt: skip


def _arms(question: str) -> list[str]:
    """Those of the question and those that they are compared with, in their order."""
    asked = {each for name, arm in ARMS.items() if question in arm.questions for each in (name, arm.against)}
    return [name for name in ARMS if name in asked]


def _has(reading: Reading, seeds: Mapping[int, Mapping]) -> bool:
    try:
        return all(np.isfinite(reading.each(result)) for result in seeds.values())
    except KeyError:
        return False


def missing(results: Results, seeds: Sequence[int] = SEEDS) -> dict[str, list[str]]:
    """question -> the arms that lack a seed, with these seeds."""
    lacking = {name: ",".join(str(seed) for seed in seeds if seed not in results.get(name, {})) for name in ARMS}
    return {question: [f"{name} (seed {lacking[name]})" for name in _arms(question) if lacking[name]] for question in QUESTIONS}
