"""Can what the values hold be surfaced? Three ways to let the value readout into the answer (claim X5).

    value decides    the readout of the chosen layer answers, whatever the model says
    value added      option log-probabilities plus a weight times the standardised readout score
    learned gate     where the two disagree, a logistic regression on both margins says whom to trust

Layer, weight and gate are fitted on one half of the items and reported on the other, against the model's own answers where
these name an option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kvutils.metrics.statistics import UNDEFINED, Interval, bootstrap_ci, column_ratio, ratio
from kvutils.tasks.blink_tables import UNREAD, choose_layer, halves, other_sources
from kvutils.tasks.choices import UNRESOLVED, ChoiceTable, some_items

WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # nats per standard deviation of the readout
DECIDES, ADDED, GATE = "value decides", "value added", "learned gate"
INTERVENTIONS = (DECIDES, ADDED, GATE)
HEADLINE = ADDED  # set before anything was measured: it can fall back to the model (weight 0) and needs no second model


@dataclass(frozen=True, eq=False)
class Evidence:
    """The two sides of n items with K options: log-probabilities of the model, readout scores in units of their standard
    deviation on the fitting items; both with mean 0 over options. said (n,) the model's answer, gold (n,) the right one.
    """

    model: np.ndarray
    value: np.ndarray
    said: np.ndarray
    gold: np.ndarray


def evidence(table: ChoiceTable, source: str, fit: np.ndarray) -> Evidence:
    """fit (n,) bool: the items whose readout scores give the standard deviation."""
    model, value = (scores - scores.mean(axis=1, keepdims=True) for scores in (table.option_scores, table.of(source)))
    return Evidence(model, value / max(value[fit].std(), 1e-12), table.said, table.gold)


def choose_weight(found: Evidence, fit: np.ndarray) -> float:
    """The weight of the readout that is right most often on the items `fit`; the smallest on a tie."""
    right = [(add_values(found, weight) == found.gold)[fit].mean() for weight in WEIGHTS]
    return WEIGHTS[int(np.argmax(right))]


def add_values(found: Evidence, weight: float) -> np.ndarray:
    """(n,) the option with the highest sum of log-probability and weighted readout score."""
    return (found.model + weight * found.value).argmax(axis=1)


def fit_gate(found: Evidence, fit: np.ndarray) -> Callable[[Evidence], np.ndarray]:
    """A function (evidence) -> answers (n,): the readout's where it disagrees with the model and the gate trusts it.

    Fitted where they disagree and exactly one is right (an answer that names no option is not wrong); if it is always the
    same one, that one is always trusted, and if there is no such item, the model.
    """
    readout = found.value.argmax(axis=1)
    use = fit & (found.said != UNRESOLVED) & ((readout == found.gold) != (found.said == found.gold))
    value_right = (readout == found.gold)[use]
    if len(set(value_right.tolist())) < 2:
        trusted = bool(value_right.any())
        return lambda new: new.value.argmax(axis=1) if trusted else new.said
    gate = make_pipeline(StandardScaler(), LogisticRegression())
    gate.fit(_margins(found)[use], value_right)
    return lambda new: np.where(gate.predict(_margins(new)), new.value.argmax(axis=1), new.said)


def _margins(found: Evidence) -> np.ndarray:
    """(n, 2) best minus second best option, of the model and of the readout."""
    ordered = (np.sort(scores, axis=1) for scores in (found.model, found.value))
    return np.stack([each[:, -1] - each[:, -2] for each in ordered], axis=1)


def interventions(table: ChoiceTable, n_boot: int = 2000, seed: int = 0) -> dict:
    """Each intervention on the n items that fitted nothing and whose answer names an option, against that; JSON-able.

    changes: name -> accuracy, change (paired), gained and lost (shares of items newly right and newly wrong), cost (lost
    as a share of the items that the model had right), n. Beside `INTERVENTIONS`: "option scores alone" (no values: what
    comes of reading the answer from log-probabilities) and "either right" (a perfect gate: the upper bound). others: the
    change by `HEADLINE` with every other source in place of the values. answers: of the reported items, per name.
    """
    fit, report = halves(table, seed)
    source = choose_layer(table, fit)
    found = evidence(table, source, fit)
    weight = choose_weight(found, fit)
    readout = found.value.argmax(axis=1)
    answers = {
        DECIDES: readout, ADDED: add_values(found, weight), GATE: fit_gate(found, fit)(found),
        "option scores alone": add_values(found, 0.0), "either right": np.where(readout == found.gold, readout, found.said),
    }  # fmt: skip
    rest = some_items(table, report)
    right = {name: each[report] == rest.gold for name, each in answers.items()}
    others = {}
    for other in other_sources(table, fit):
        instead = evidence(table, other, fit)
        added = add_values(instead, choose_weight(instead, fit))[report] == rest.gold
        others[other] = _change(rest, added, n_boot, seed)["change"]
    return {
        "title": table.title, "source": source, "weight": weight, "others": others,
        "n": int(rest.resolved.sum()), "unresolved": int((~rest.resolved).sum()),
        "groups": [group for group, kept in zip(rest.groups, rest.resolved, strict=True) if kept],
        "model": _share(rest, rest.model_right, rest.resolved, n_boot, seed),
        "changes": {name: _change(rest, each, n_boot, seed) for name, each in right.items()},
        "differences": {name: (each.astype(int) - rest.model_right)[rest.resolved].tolist() for name, each in right.items()},
    }  # fmt: skip


def _change(table: ChoiceTable, right: np.ndarray, n_boot: int, seed: int) -> dict:
    """Accuracy, paired change and cost of answers that are `right` (n,) bool where the model is `table.model_right`."""
    model, among = table.model_right, table.resolved
    gained, lost = right & table.model_wrong, model & ~right
    parts = {"accuracy": (right & among, among), "change": (gained.astype(int) - lost, among), "gained": (gained, among),
             "lost": (lost, among), "cost": (lost, model)}  # fmt: skip
    return {name: _share(table, *part, n_boot, seed) for name, part in parts.items()}


def _share(table: ChoiceTable, part: np.ndarray, among: np.ndarray, n_boot: int, seed: int) -> dict:
    """Sum of `part` (n,) as a share of the items `among` (n,) bool; undefined where there is none."""
    found = bootstrap_ci(np.column_stack([part, among]), column_ratio(0, 1), n_boot, seed, table.groups)
    return found.as_dict() | {"n": int(among.sum())}


def claim_x5(found: Mapping[str, Mapping], n_boot: int = 2000, seed: int = 0) -> dict:
    """X5 from `interventions` of each subtask: change of accuracy by `HEADLINE`, subtasks weighing alike (as in BLINK's
    total), on the items that fitted nothing. Entries: every intervention on every subtask.
    """
    changes = [each["differences"][HEADLINE] for each in found.values()]
    groups = [group for each in found.values() for group in each["groups"]]
    member = np.repeat(np.eye(len(changes)), [len(each) for each in changes], axis=0)  # (n, subtasks)
    packed = np.concatenate([member * np.concatenate(changes)[:, None], member], axis=1)

    def mean_of_subtasks(weights: np.ndarray, packed: np.ndarray) -> np.ndarray:
        sums = weights @ packed
        return ratio(sums[:, : len(changes)], sums[:, len(changes) :]).mean(axis=1)

    total = bootstrap_ci(packed, mean_of_subtasks, n_boot, seed, groups) if groups else UNDEFINED
    entries = [Interval.of(each["changes"][name]["change"]).claim(f"{each['title']}: {name} ({each['source']}) minus model", UNREAD)
               for each in found.values() for name in INTERVENTIONS]  # fmt: skip
    return total.claim(None, UNREAD, unit="accuracy", entries=entries)
