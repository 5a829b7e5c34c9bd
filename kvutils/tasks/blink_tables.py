"""Value right or wrong by model right or wrong: the 2 x 2 table, its denominators and its controls (section 4.2), claim C8.

The layer is chosen on one half of the items (`choosing_half`) and everything is reported on the other; beside it, by
cross-validation over all items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kvutils.datasets.samples import MultipleChoice
from kvutils.errors import ParameterError
from kvutils.images import encode_image
from kvutils.metrics.answers import LETTERS, NEEDS_JUDGE, blink_scores, low_mass
from kvutils.metrics.statistics import Interval, bootstrap_ci, choosing_half, column_ratio, mean_statistic, paired_difference, ratio
from kvutils.tasks.choices import UNRESOLVED, ChoiceTable, some_items

CELLS = ("both", "value_only", "model_only", "neither")  # who is right
SINGLE = ("pixels", "encoder_original", "encoder", "projector")  # sources without layers
FAMILIES = ("alone.value", "untrained.value")
FOLDS = 5
UNREAD = "no answer names an option"
_FEWEST = 4  # items, to have two in each half


def halves(table: ChoiceTable, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool each: the items that choose, and those that are reported. ParameterError for fewer than four groups."""
    if len(set(table.groups)) < _FEWEST:
        raise ParameterError(f"{table.subtask}: {len(set(table.groups))} independent items are too few to choose a layer on one "
                             f"half and report the other; at least {_FEWEST} are needed: ask the data set for more")  # fmt: skip
    choosing = choosing_half(table.groups, seed)
    return choosing, ~choosing


def choose_layer(table: ChoiceTable, items: np.ndarray, family: str = "value", readout: str | None = None) -> str:
    """The source of the family that is right most often on `items` (n,) bool; the earliest layer on a tie."""
    sources = table.layers(family)
    return sources[int(np.argmax([table.right(source, readout)[items].mean() for source in sources]))]


def other_sources(table: ChoiceTable, choosing: np.ndarray) -> list[str]:
    """What the values are compared with: the sources without layers, and of the other families the layer chosen alike."""
    families = [family for family in FAMILIES if table.layers(family)]
    return [*(name for name in SINGLE if name in table.sources), *(choose_layer(table, choosing, family) for family in families)]


def describe_table(table: ChoiceTable, n_boot: int = 2000, seed: int = 0) -> dict:
    """Everything that notebook 05 reports on a subtask but the interventions; JSON-able, intervals with n.

    model: accuracy (unresolved answers count as wrong, as in BLINK), unresolved (share), accuracy of the highest option score,
    said (how often each option, -1 unresolved), option_mass (probability that the options hold together), warnings.
    readouts: readout -> source -> accuracy on all items. chosen: the value layer, and how often it says each option.
    held_out: on the other half, its `table_of_two`, and in `others` that of every other source (families by a layer
    chosen in the same way); in `by_option_scores` with the model's most probable option as its answer, for all items; in
    `readouts` by the subtask's other readouts. cross_validated: `table_of_two` with the layer chosen on the other folds.
    """
    choosing, held_out = halves(table, seed)

    def accuracy(right: np.ndarray) -> dict:
        return bootstrap_ci(right, mean_statistic, n_boot, seed, table.groups).as_dict()

    chosen, rest = choose_layer(table, choosing), some_items(table, held_out)
    scored = replace(rest, said=rest.option_scores.argmax(axis=1))
    folds, by_fold = _cross_validated(table, seed)
    return {
        "subtask": table.subtask, "title": table.title, "n": len(table), "groups": len(set(table.groups)),
        "options": table.options, "chance": 1 / table.options,
        "model": {
            "accuracy": accuracy(table.model_right),
            "unresolved": accuracy(table.said == UNRESOLVED),
            "option_scores": accuracy(table.option_scores.argmax(axis=1) == table.gold),
            "said": {str(option): int((table.said == option).sum()) for option in range(UNRESOLVED, table.options)},
            "option_mass": accuracy(table.mass), "warnings": low_mass({f"{table.title}, {len(table)} items": table.mass.mean()}),
        },
        "readouts": {name: {source: accuracy(table.right(source, name)) for source in table.sources} for name in table.readouts},
        "chosen": {
            "source": chosen, "readout": table.readouts[0],
            "accuracy_where_chosen": float(table.right(chosen)[choosing].mean()),
            "said": np.bincount(table.says(chosen), minlength=table.options).tolist(),
        },
        "held_out": {
            **table_of_two(rest, rest.says(chosen), n_boot, seed),
            "others": {source: _other(rest, source, chosen, n_boot, seed) for source in other_sources(table, choosing)},
            "by_option_scores": table_of_two(scored, rest.says(chosen), n_boot, seed),
            "readouts": {name: table_of_two(rest, rest.says(choose_layer(table, choosing, "value", name), name), n_boot, seed)
                         for name in table.readouts[1:]},
        },
        "cross_validated": {**table_of_two(table, folds, n_boot, seed), "layers": by_fold},
    }  # fmt: skip


def table_of_two(table: ChoiceTable, says: np.ndarray, n_boot: int = 2000, seed: int = 0) -> dict:
    """The 2 x 2 table of a readout's answers (n,) against the model's, with intervals over independent items.

    All of it over the n items whose answer names an option: what cannot be read (`unresolved`, a number) is no wrong answer.
    counts, shares: of `CELLS`, shares of these n. of_errors: value_only as a share of the model's errors (None where
    it makes none). value_accuracy, model_accuracy. Three levels that the value_only share is compared with, on the same
    items (above_...: the share minus it):
      at_chance        a readout that guesses all options alike: errors / K
      at_guess         a readout that guesses, each option as often as this one says it. Where the model prefers one
                       option and the readout another, the first level is passed without any knowledge; this is not
      at_independence  a readout of this accuracy that is as good on the model's errors as elsewhere (below it: values
                       and model fail on the same items)
    """
    model, wrong, value, k = table.model_right, table.model_wrong, says == table.gold, table.options
    cells = np.stack([value & model, value & wrong, ~value & model, ~value & wrong], axis=1)
    each = np.arange(k)
    said = (says[:, None] == each) & table.resolved[:, None]  # (n, K)
    missed = (table.gold[:, None] == each) & wrong[:, None]  # the right option where the model is wrong
    packed = np.column_stack([cells, said, missed, table.resolved]).astype(float)

    def statistic(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
        sums = weights @ packed
        means = ratio(sums[:, :-1], sums[:, -1:])
        both, only, _, neither = shares = means[:, : len(CELLS)].T
        wrong = only + neither
        levels = [wrong / k, (means[:, -2 * k : -k] * means[:, -k:]).sum(axis=1), (both + only) * wrong]
        found = [*shares, ratio(only, wrong), both + only, 1 - wrong, *levels, *(only - level for level in levels)]
        return np.stack(found, axis=1)

    names = [*CELLS, "of_errors", "value_accuracy", "model_accuracy"]
    names += [f"{side}_{level}" for side in ("at", "above") for level in ("chance", "guess", "independence")]
    found = dict(zip(names, bootstrap_ci(packed, statistic, n_boot, seed, table.groups), strict=True))
    n, errors = int(table.resolved.sum()), int(wrong.sum())
    found = {name: interval.as_dict() | {"n": errors if name == "of_errors" else n} for name, interval in found.items()}
    return {
        "n": n, "unresolved": len(table) - n, "errors": errors, "counts": dict(zip(CELLS, cells.sum(axis=0).tolist(), strict=True)),
        "shares": {name: found[name] for name in CELLS}, **{name: found[name] for name in names[len(CELLS) :]},
    }  # fmt: skip


def _other(table: ChoiceTable, source: str, chosen: str, n_boot: int, seed: int) -> dict:
    """The 2 x 2 table of another source, and by how much the chosen values' share of "value right, model wrong" exceeds its."""
    mine, this, among = table.right(chosen), table.right(source), table.resolved
    options = (column_ratio(0, 1), n_boot, seed, table.groups)

    def minus(items: np.ndarray) -> dict:
        found = paired_difference(*(np.column_stack([right & items, among]) for right in (mine, this)), *options)
        return found.as_dict() | {"n": int(among.sum())}

    return {
        **table_of_two(table, table.says(source), n_boot, seed),
        "values_minus_this": minus(table.model_wrong), "accuracy_minus_this": minus(among),
    }  # fmt: skip


def _cross_validated(table: ChoiceTable, seed: int) -> tuple[np.ndarray, list[str]]:
    """(n,) answers of the layer chosen on the other folds; and that layer's source for each fold."""
    units = sorted(set(table.groups), key=lambda name: hashlib.sha256(f"{seed}:folds:{name}".encode()).hexdigest())
    fold_of = {name: place % FOLDS for place, name in enumerate(units)}
    folds = np.array([fold_of[group] for group in table.groups])
    says, layers = np.zeros(len(table), dtype=int), []
    for fold in range(min(FOLDS, len(units))):
        here = folds == fold
        layers.append(choose_layer(table, ~here))
        says[here] = table.says(layers[-1])[here]
    return says, layers


def official_scores(tables: Mapping[str, ChoiceTable]) -> dict:
    """BLINK's own accuracies (`blink_scores`): by subtask, and their plain mean as Total."""
    letter = {UNRESOLVED: NEEDS_JUDGE} | {option: f"({name})" for option, name in enumerate(LETTERS)}
    pairs = {name: zip(table.gold.tolist(), table.said.tolist(), strict=True) for name, table in tables.items()}
    return blink_scores({name: [(letter[gold], letter[said]) for gold, said in mine] for name, mine in pairs.items()})


def telling_item(table: ChoiceTable, source: str, seed: int = 0) -> str:
    """Id of the first reported item with value right and model wrong; the first reported one if there is none."""
    _, held_out = halves(table, seed)
    telling = held_out & table.right(source) & table.model_wrong
    return table.ids[int(np.argmax(telling if telling.any() else held_out))]


def claim_c8(described: Mapping[str, Mapping]) -> dict:
    """C8 from `describe_table` of each subtask: "value right, model wrong" in % of the items whose answer names an option, on
    the half that did not choose.

    Headline: art style, the paper's subtask (else the first). Entries: per subtask the share minus what guessing would
    give on the same items (`at_guess`).
    """
    headline = described.get("Art_Style") or next(iter(described.values()))
    above = {f"{each['title']}: {each['chosen']['source']} right, model wrong, minus guessing": each["held_out"]["above_guess"]
             for each in described.values()}  # fmt: skip
    entries = [Interval.of(found).scaled(100).claim(name, UNREAD) for name, found in above.items()]
    return Interval.of(headline["held_out"]["shares"]["value_only"]).scaled(100).claim(None, UNREAD, unit="% of items", entries=entries)


def describe_example(item: MultipleChoice, table: ChoiceTable, source: str) -> dict:
    """One item for the results file, with the scores that the values of `source` and the model give its options."""
    row = table.ids.index(item.id)
    points = [[] for _ in item.images]
    if item.reference_point is not None:
        points[0], points[1] = [list(map(float, item.reference_point))], np.asarray(item.candidate_points, dtype=float).tolist()
    scale = [min(1.0, 320 / max(image.size)) for image in item.images]  # as `encode_image` shrinks them
    return {
        "id": item.id, "prompt": item.prompt[max(item.prompt.find(item.question), 0) :],  # without what stands before every question
        "images": [encode_image(image) for image in item.images],
        "points": [(np.array(each) * factor).tolist() if each else [] for each, factor in zip(points, scale, strict=True)],
        "layer": int(source.rsplit(".", 1)[1]), "value": table.of(source)[row].tolist(),
        "model": table.option_scores[row].tolist(), "gold": int(table.gold[row]), "said": int(table.said[row]),
    }  # fmt: skip
