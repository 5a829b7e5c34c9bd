"""Value right or wrong by model right or wrong: the 2 x 2 table, its denominators and its controls (section 4.2), claim C8.

Cross-fitted: the layer that answers an item is chosen on the other half of the items, in every resample anew, so that every item is
reported and none has chosen its own layer. With more folds than two the same items choose for all, and intervals become too narrow: of
readouts that know nothing (28 layers, 117 items, chosen once), 3 to 5 % lay above guessing with halves, 7 % with five folds, 12 % with twenty.
Layers from 1 on: the values of layer 0 are a linear map of the projector's output, and stand beside as the first value projection."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem

import numpy as np

from kvutils.datasets.samples import MultipleChoice
from kvutils.images import SMALL, encode_image
from kvutils.metrics.answers import LETTERS, NEEDS_JUDGE, blink_scores, low_mass
from kvutils.metrics.effects import FEWEST_ERRORS, measured, part, prerequisite
from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import Effect, Level, bootstrap_ci, mean_effect, mean_statistic, ratio, resample
from kvutils.tasks.choices import UNRESOLVED, ChoiceTable
from kvutils.tasks.tables import FIRST

CELLS = ("both", "value_only", "model_only", "neither")  # who is right
OTHERS = ("pixels", "encoder_original", "encoder", "projector", FIRST, "alone.value", "untrained.value")  # beside the values
HEADLINE = "art style"  # the paper's subtask


def answers_of(table: ChoiceTable, name: str = "value", readout: str | None = None) -> tuple[list[str], np.ndarray]:
    """The L sources that the halves choose from, `name` or, of a family, its layers >= 1; and (n, L) what each answers to each item."""
    sources = [name] if name in table.sources else table.layers(name)[1:]
    return sources, np.stack([table.says(source, readout) for source in sources], axis=1)


def sources_of(table: ChoiceTable, halves: Halves, name: str = "value", readout: str | None = None) -> list[str]:
    """[2] the source that answers the first, and the second half: the one that is right most often on the items that choose for it."""
    sources, says = answers_of(table, name, readout)
    return [sources[best] for best in halves.best(says == table.gold[:, None])]


def says_of(table: ChoiceTable, halves: Halves, sources: Sequence[str]) -> np.ndarray:
    """(n,) what the source of its half answers to each item."""
    return np.where(halves.second, *(table.says(source) for source in reversed(sources)))


def other_sources(table: ChoiceTable, halves: Halves) -> dict[str, list[str]]:
    """What the values are compared with, and its sources of the two halves."""
    return {name: sources_of(table, halves, name) for name in OTHERS if name in table.sources or table.layers(name)}


def layers_of(sources: Sequence[str]) -> list[int]:
    """The layers of the two sources; none where there was no choice."""
    return [int(source.rpartition(".")[2]) for source in sources if source not in OTHERS]


def describe_table(table: ChoiceTable, n_boot: int = 2000, seed: int = 0) -> dict:
    """Everything that notebook 05 reports on a subtask but the interventions; JSON-able, intervals with n.

    model: accuracy (unresolved answers count as wrong, as in BLINK), unresolved (share), accuracy of the highest option score, said (how
    often each option, -1 unresolved), option_mass (probability that the options hold together), warnings. readouts: readout -> source ->
    accuracy. said: how often the values say each option. telling: id and source of the first item with value right and model wrong, of the
    first one if there is none. Cross-fitted, each a `table_of_two` with its layers: table, of the values; others, of every other source;
    by_option_scores, with the model's most probable option as its answer; by_readouts, by the subtask's other readouts. ParameterError for
    fewer than four independent items."""
    halves = Halves.of(table.groups, seed)
    sources = sources_of(table, halves)
    says = says_of(table, halves, sources)
    telling = int(np.argmax((says == table.gold) & table.model_wrong))

    def accuracies(right: Mapping[str, np.ndarray]) -> dict[str, dict]:
        found = bootstrap_ci(np.column_stack([*right.values()]), mean_statistic, n_boot, seed, table.groups)
        return {name: each.as_dict() for name, each in zip(right, found, strict=True)}

    def two(name: str = "value", readout: str | None = None, against: ChoiceTable = table) -> dict:
        found = table_of_two(against, answers_of(table, name, readout)[1], halves, n_boot, seed)
        return found | {"layers": layers_of(sources_of(table, halves, name, readout))}

    return {"subtask": table.subtask, "title": table.title, "n": len(table), "groups": len(set(table.groups)),
            "options": table.options, "chance": 1 / table.options,
            "model": {**accuracies({"accuracy": table.model_right, "unresolved": ~table.resolved, "option_mass": table.mass,
                                    "option_scores": table.option_scores.argmax(axis=1) == table.gold}),
                      "said": {str(option): int((table.said == option).sum()) for option in range(UNRESOLVED, table.options)},
                      "warnings": low_mass({f"{table.title}, {len(table)} items": table.mass.mean()})},
            "readouts": {name: accuracies({source: table.right(source, name) for source in table.sources}) for name in table.readouts},
            "readout": table.readouts[0], "said": np.bincount(says, minlength=table.options).tolist(),
            "telling": {"id": table.ids[telling], "source": sources[int(halves.second[telling])]},
            "table": two(),
            "others": {name: two(name) | _minus(table, halves, name, n_boot, seed) for name in other_sources(table, halves)},
            "by_option_scores": two(against=replace(table, said=table.option_scores.argmax(axis=1))),
            "by_readouts": {name: two(readout=name) for name in table.readouts[1:]}}  # fmt: skip


def table_of_two(table: ChoiceTable, says: np.ndarray, halves: Halves, n_boot: int = 2000, seed: int = 0) -> dict:
    """The 2 x 2 table of a readout's answers, in that of L layers (n, L) which is right most often on the half that chooses, against the
    model's, as effects over the n items whose answer names an option: what cannot be read (`unresolved`, a number) is no wrong answer.

    counts, shares: of `CELLS`. of_all_items: value_only as a share of all items, the unresolved among them; of_errors: of the model's
    errors (None where it makes none). value_accuracy, model_accuracy. Three levels that the value_only share is compared with, on the same
    items (above_...: the share minus it):

      at_chance        a readout that guesses all options alike: errors / K
      at_guess         a readout that guesses, each option as often as this one says it: opposite preferences alone do not pass it
      at_independence  a readout of this accuracy that is as good on the model's errors as elsewhere"""
    k, read, right = table.options, table.resolved[:, None], says == table.gold[:, None]
    model, wrong = table.model_right[:, None], table.model_wrong[:, None]
    cells = np.stack([right & model, right & wrong, ~right & model, ~right & wrong], axis=2)
    missed = (table.gold[:, None] == np.arange(k)) & wrong  # (n, K) the right option where the model is wrong
    packed = np.concatenate([cells, (says[:, :, None] == np.arange(k)) & read[:, None]], axis=2).astype(float)

    def statistic(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
        sums, n = weights @ packed, weights @ read
        both, only, _, neither = shares = ratio(sums[:, :-k], n).T
        wrong = only + neither
        levels = [wrong / k, (ratio(sums[:, -k:], n) * ratio(weights @ missed, n)).sum(axis=1), (both + only) * wrong]
        of = [sums[:, 1] / weights.sum(axis=1), ratio(only, wrong)]
        return np.stack([*shares, *of, both + only, 1 - wrong, *levels, *(only - level for level in levels)], axis=1)

    names = [*CELLS, "of_all_items", "of_errors", "value_accuracy", "model_accuracy"]
    names += [f"{side}_{level}" for side in ("at", "above") for level in ("chance", "guess", "independence")]
    effects = _effects(table, halves.chosen(packed, statistic, right, mean_statistic), n_boot, seed)
    shares = [replace(each, low=max(each.low, 0.0), high=min(each.high, 1.0)) for each in effects[:-3]]  # the others are differences
    found = {name: each.as_dict() for name, each in zip(names, shares + effects[-3:], strict=True)}
    found["of_errors"]["n"] = errors = int(table.model_wrong.sum())
    found["of_all_items"] |= {"n": len(table), "units": len(set(table.groups))}
    counts = halves.read(cells, halves.best(right)).sum(axis=0).tolist()
    return {"n": int(read.sum()), "unresolved": int((~read).sum()), "errors": errors, "counts": dict(zip(CELLS, counts, strict=True)),
            "shares": {name: found[name] for name in CELLS}, **{name: found[name] for name in names[len(CELLS) :]}}  # fmt: skip


def _effects(table: ChoiceTable, level: Level, n_boot: int, seed: int) -> list[Effect]:
    """What a level of all items gives, with the items whose answer names an option, and the units of these."""
    n, units = int(table.resolved.sum()), len(set(itertools.compress(table.groups, table.resolved)))
    return replace(resample(level, len(table), n_boot, seed, table.groups, around=True), n=n, units=units).effects()


def _minus(table: ChoiceTable, halves: Halves, name: str, n_boot: int, seed: int) -> dict:
    """By how much the values' answers exceed those of another source: in their share of "value right, model wrong", and in accuracy."""
    of = np.column_stack([table.model_wrong, table.resolved])

    def level(name: str) -> Level:
        right = answers_of(table, name)[1] == table.gold[:, None]
        return halves.chosen(right[:, :, None] & of[:, None], lambda w, each: ratio(w @ each, w @ of[:, 1:]), right, mean_statistic)

    values, others = level("value"), level(name)
    more, better = _effects(table, lambda w: values(w) - others(w), n_boot, seed)
    return {"values_minus_this": more.as_dict(), "accuracy_minus_this": better.as_dict()}


def official_scores(tables: Mapping[str, ChoiceTable]) -> dict:
    """BLINK's own accuracies (`blink_scores`): by subtask, and their plain mean as Total."""
    letter = {UNRESOLVED: NEEDS_JUDGE} | {option: f"({name})" for option, name in enumerate(LETTERS)}
    pairs = {name: zip(table.gold.tolist(), table.said.tolist(), strict=True) for name, table in tables.items()}
    return blink_scores({name: [(letter[gold], letter[said]) for gold, said in mine] for name, mine in pairs.items()})


class Subtasks:
    """The subtasks of a claim, from {title: {n, unresolved, errors, ...}}: `able`, those on which the model makes enough errors to gain
    anything; `silent`, of the others why they say nothing; `needs`, the prerequisite that one is able, if any answer can be read."""

    def __init__(self, found: Mapping[str, Mapping]) -> None:
        self.found = found
        self.able = [title for title, each in found.items() if each["errors"] >= FEWEST_ERRORS]
        self.silent = {title: f"{each['errors']} errors of the model in {each['n']} answers" if each["n"] else "no answer names an option"
                       for title, each in found.items() if title not in self.able}  # fmt: skip
        counts = ", ".join(f"{title} {each['errors']} in {each['n']} answers" for title, each in found.items())
        needed = prerequisite("errors of the model", self.able, f"errors of the model: {counts}; {FEWEST_ERRORS} are needed")
        self.needs = [needed] if any(each["n"] for each in found.values()) else []

    def effect(self, title: str, *keys: str) -> Effect:
        """What lies under `keys` for a subtask, times 100."""
        return Effect.of(reduce(getitem, keys, self.found[title])).scaled(100)

    def mean(self, name: str, titles: Sequence[str], *keys: str) -> dict:
        """The part of a claim about these subtasks, each with the same weight."""
        effects = [self.effect(title, *keys) for title in titles]
        about = f"mean of {', '.join(titles)}" if len(titles) > 1 else "".join(titles) or "no subtask"
        reason = "the model makes too few errors" if self.needs else f"no answer names an option on {', '.join(self.found)}"
        units = sum(each.units for each in effects)
        return part(f"{about}: {name}", effects[0] if len(effects) == 1 else mean_effect(effects), reason, units=units)

    def parts(self, names: Mapping[str, Sequence[str]]) -> list[dict]:
        """{name: keys} for every subtask that is able, and of the others one that says why not."""
        found = [part(f"{title}: {name}", self.effect(title, *keys)) for title in self.able for name, keys in names.items()]
        return found + [part(f"{title}: {next(iter(names))}", reason=reason) for title, reason in self.silent.items()]

    def note(self, verb: str, *keys: str) -> str:
        """On how many of the subtasks that are able the effect is above 0, what it is on each, and what is left out; "" of none."""
        effects = {title: self.effect(title, *keys) for title in self.able}
        each = ", ".join(f"{title} {effect.mean:+.1f}" for title, effect in effects.items())
        text = f"{verb} on {sum(effect.low > 0 for effect in effects.values())} of {len(effects)} subtasks ({each})"
        text += "".join(f"; {title} left out: {reason}" for title, reason in self.silent.items())
        unresolved, read = (sum(one[key] for one in self.found.values()) for key in ("unresolved", "n"))
        text += f"; {unresolved} of {unresolved + read} answers name no option" if unresolved else ""
        return f"{text}." if effects else ""


def claim_c8(described: Mapping[str, Mapping]) -> dict:
    """C8 from `describe_table` of each subtask: "value right, model wrong" minus what guessing gives (`at_guess`), in % of the items whose
    answer names an option. Primary: art style, the paper's subtask; where the model makes too few errors on it, the mean over the subtasks
    where it makes enough. size: the share itself of all items, as the paper states it. beyond: what is more than if the two were
    right independently of each other."""
    subtasks = Subtasks({each["title"]: each | {key: each["table"][key] for key in ("n", "unresolved", "errors")}
                         for each in described.values()})  # fmt: skip
    speaking = [HEADLINE] if HEADLINE in subtasks.able else subtasks.able
    share, key = "value right, model wrong", ("table", "above_guess")
    names = {f"{share}, minus {name}": ("table", f"above_{level}") for name, level in (("guessing", "guess"), ("chance", "chance"),
                                                                                       ("independence", "independence"))}  # fmt: skip
    others = subtasks.parts(names | {"first value projection right, model wrong, minus guessing": ("others", FIRST, "above_guess")})
    for title in subtasks.able:
        others += [part(f"{title}: readout {name} right, model wrong, minus guessing", Effect.of(each["above_guess"]).scaled(100))
                   for name, each in subtasks.found[title]["by_readouts"].items()]  # fmt: skip
        others.append(part(f"{title}: of the model's errors", subtasks.effect(title, "table", "of_errors"), unit="% of errors"))
    return measured(subtasks.mean(f"{share}, minus guessing", speaking, *key), others, subtasks.needs, subtasks.note("Above guessing", *key),
                    size=subtasks.mean(share, speaking, "table", "of_all_items"),
                    beyond=subtasks.mean(f"{share}, minus independence", speaking, "table", "above_independence"))  # fmt: skip


def describe_example(item: MultipleChoice, table: ChoiceTable) -> dict:
    """One item for a figure, with the scores that the values of every layer and the model give its options."""
    row = table.ids.index(item.id)
    points = [[] for _ in item.images]
    if item.reference_point is not None:
        points[0], points[1] = [list(map(float, item.reference_point))], np.asarray(item.candidate_points, dtype=float).tolist()
    scale = [min(1.0, SMALL / max(image.size)) for image in item.images]
    prompt = item.prompt[max(item.prompt.find(item.question), 0) :]  # without what stands before
    return {"id": item.id, "title": table.title, "prompt": prompt, "images": [encode_image(image) for image in item.images],
            "points": [(np.array(each) * factor).tolist() if each else [] for each, factor in zip(points, scale, strict=True)],
            "values": [table.of(source)[row].tolist() for source in table.layers()],
            "model": table.option_scores[row].tolist(), "gold": int(table.gold[row]), "said": int(table.said[row])}  # fmt: skip
