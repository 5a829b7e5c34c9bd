"""Can what the values hold be surfaced? Three ways to let the value readout into the answer (claim X5).

    value decides    the readout of the chosen layer answers, whatever the model says
    value added      option log-probabilities plus a weight times the standardised readout score
    learned gate     where the two disagree, a logistic regression on both margins says whom to trust

Layer (from 1 on), weight and gate are fitted on each half of the items and read on the other, so that every item is used and none
has fitted its own; against the model's own answers where these name an option."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kvutils.metrics.effects import measured
from kvutils.metrics.statistics import Halves, ratio, resample
from kvutils.tasks.blink_tables import Subtasks, layers_of, other_sources, sources_of
from kvutils.tasks.choices import UNRESOLVED, ChoiceTable, some_items

WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # nats per standard deviation of the readout
DECIDES, ADDED, GATE = "value decides", "value added", "learned gate"
INTERVENTIONS = (DECIDES, ADDED, GATE)
SCORES, EITHER = "option scores alone", "either right"
HEADLINE = ADDED  # set before anything was measured: it can fall back to the model (weight 0) and needs no second model


@dataclass(frozen=True, eq=False)
class Evidence:
    """The two sides of n items with K options: log-probabilities of the model, readout scores in units of their standard
    deviation on the fitting items; both with mean 0 over options. said (n,) the model's answer, gold (n,) the right one."""

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


def gated(found: Evidence, fit: np.ndarray) -> np.ndarray:
    """(n,) the readout's answer where it disagrees with the model and the gate trusts it, else the model's.

    Fitted on those of the items `fit` (n,) bool where they disagree and exactly one is right (an answer that names no option is not
    wrong); if it is always the same one, that one is always trusted, and if there is no such item, the model."""
    readout = found.value.argmax(axis=1)
    use = fit & (found.said != UNRESOLVED) & ((readout == found.gold) != (found.said == found.gold))
    value_right = (readout == found.gold)[use]
    if len(set(value_right.tolist())) < 2:
        return readout if value_right.any() else found.said
    ordered = [np.sort(scores, axis=1) for scores in (found.model, found.value)]
    margins = np.stack([each[:, -1] - each[:, -2] for each in ordered], axis=1)  # (n, 2) best minus second best option
    gate = make_pipeline(StandardScaler(), LogisticRegression()).fit(margins[use], value_right)
    return np.where(gate.predict(margins), readout, found.said)


def surface(table: ChoiceTable, halves: Halves, sources: Sequence[str]) -> tuple[dict[str, np.ndarray], list[float]]:
    """name -> (n,) answers of each intervention, and the two weights: those of a half by the source that is named for it, with what was
    fitted on the other."""
    answers = {name: np.zeros(len(table), dtype=int) for name in (*INTERVENTIONS, SCORES, EITHER)}
    weights = []
    for half, fit, source in zip((~halves.second, halves.second), halves.choosing, sources, strict=True):
        found = evidence(table, source, fit)
        readout, weight = found.value.argmax(axis=1), choose_weight(found, fit)
        weights.append(weight)
        said = {DECIDES: readout, ADDED: add_values(found, weight), GATE: gated(found, fit), SCORES: add_values(found, 0.0),
                EITHER: np.where(readout == found.gold, readout, found.said)}  # fmt: skip
        for name, each in said.items():
            answers[name][half] = each[half]
    return answers, weights


def interventions(table: ChoiceTable, n_boot: int = 2000, seed: int = 0) -> dict:
    """Each intervention on the n items whose answer names an option, against that; fitted on each half, read on the other; JSON-able.

    layers, weights: of the two halves. errors: of the model. changes: name -> accuracy, change (paired), gained and lost (shares of
    items newly right and newly wrong), cost (lost as a share of the items that the model had right), n. Beside `INTERVENTIONS`:
    `SCORES` (no values: what comes of reading the answer from log-probabilities) and `EITHER` (a perfect gate: the upper bound).
    beyond_scores: accuracy by `HEADLINE` minus that by `SCORES`. others: the change by `HEADLINE` with every other source in
    place of the values."""
    halves = Halves.of(table.groups, seed)
    sources = sources_of(table, halves)
    answers, weights = surface(table, halves, sources)
    rest, model = some_items(table, table.resolved), table.model_right[table.resolved]
    others = {name: surface(table, halves, each)[0][HEADLINE] for name, each in other_sources(table, halves).items()}
    right = {name: said[table.resolved] == rest.gold for name, said in (answers | others).items()}
    columns = {("model",): model, ("beyond_scores",): right[HEADLINE].astype(int) - right[SCORES]}
    for name, each in right.items():
        gained, lost = each & ~model, model & ~each
        parts = {"accuracy": each, "change": gained.astype(int) - lost, "gained": gained, "lost": lost, "cost": lost}
        columns |= {(name, key): column for key, column in parts.items()}
    of = np.stack([model if key[-1] == "cost" else rest.resolved for key in columns], axis=1).astype(float)  # the cost: of these items
    packed = np.stack([*columns.values()], axis=1).astype(float)
    effects = resample(lambda w: ratio(w @ packed, w @ of), len(rest), n_boot, seed, rest.groups).effects()
    found = {key: each.as_dict() | {"n": int(n)} for key, each, n in zip(columns, effects, of.sum(axis=0), strict=True)}
    return {
        "title": table.title, "layers": layers_of(sources), "weights": weights, "n": len(rest), "unresolved": len(table) - len(rest),
        "errors": int(rest.model_wrong.sum()), "model": found["model",], "beyond_scores": found["beyond_scores",],
        "changes": {name: {key: found[name, key] for key in ("accuracy", "change", "gained", "lost", "cost")} for name in answers},
        "others": {name: found[name, "change"] for name in others},
    }  # fmt: skip


def claim_x5(found: Mapping[str, Mapping]) -> dict:
    """X5 from `interventions` of each subtask: change of accuracy by `HEADLINE`, in points, mean over the subtasks on which the model
    makes enough errors (weighing alike, as in BLINK's total). others: every intervention on each of these."""
    subtasks = Subtasks({each["title"]: each for each in found.values()})
    names = {f"{name} minus the model": ("changes", name, "change") for name in (HEADLINE, DECIDES, GATE, SCORES)}
    others = subtasks.parts(names | {f"{HEADLINE} minus {SCORES}": ("beyond_scores",)})
    key = ("changes", HEADLINE, "change")
    return measured(subtasks.mean(f"{HEADLINE} minus the model", subtasks.able, *key), others, subtasks.needs, subtasks.note("Gains", *key))
