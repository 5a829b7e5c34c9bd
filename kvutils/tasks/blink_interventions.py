"""Can what the values hold be surfaced? Three ways to let the value readout into the answer (claim X5).

    value decides    the readout of the chosen layer answers, whatever the model says
    value added      option log-probabilities plus a weight times the standardised readout score
    learned gate     where the two disagree, a logistic regression on both margins says whom to trust

Layer (from 1 on), weight and gate are fitted on each half of the items and read on the other, so that every item is used and none
has fitted its own; against the model's own answers where these name an option. All that notebook 05 derives is `results`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kvutils.metrics.effects import measured
from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import interval_text, ratio, resample
from kvutils.tasks.blink_tables import Subtasks, claim_c8, describe_table, layers_of, official_scores, other_sources, sources_of
from kvutils.tasks.choices import UNRESOLVED, ChoiceTable, some_items
from kvutils.tasks.tables import FIRST
from kvutils.tasks.value_readouts import READOUTS

WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # nats per standard deviation of the readout
INTERVENTIONS = DECIDES, ADDED, GATE = "value decides", "value added", "learned gate"
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
    """(n,) the readout's answer where it disagrees with the model and the gate trusts it, else the model's. Fitted on those of the items
    `fit` (n,) bool where they disagree and exactly one is right (an answer that names no option is not wrong); if it is always the same
    one, that one is always trusted, and if there is no such item, the model."""
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

    layers, weights: of the two halves. errors: of the model. changes: name -> accuracy, change (paired), gained and lost (shares of items
    newly right and newly wrong), cost (lost as a share of the items that the model had right). Beside `INTERVENTIONS`: `SCORES` (no values)
    and `EITHER` (a perfect gate: the upper bound). beyond_scores: accuracy by `HEADLINE` minus that by `SCORES`. others: the change by
    `HEADLINE` with every other source in place of the values."""
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
    return {"title": table.title, "layers": layers_of(sources), "weights": weights, "n": len(rest), "unresolved": len(table) - len(rest),
            "errors": int(rest.model_wrong.sum()), "model": found["model",], "beyond_scores": found["beyond_scores",],
            "changes": {name: {key: found[name, key] for key in ("accuracy", "change", "gained", "lost", "cost")} for name in answers},
            "others": {name: found[name, "change"] for name in others}}  # fmt: skip


def claim_x5(found: Mapping[str, Mapping]) -> dict:
    """X5 from `interventions` of each subtask: change of accuracy by `HEADLINE`, in points, mean over the subtasks on which the model
    makes enough errors (weighing alike, as in BLINK's total). others: every intervention on each of these."""
    subtasks = Subtasks({each["title"]: each for each in found.values()})
    names = {f"{name} minus the model": ("changes", name, "change") for name in (HEADLINE, DECIDES, GATE, SCORES)}
    others = subtasks.parts(names | {f"{HEADLINE} minus {SCORES}": ("beyond_scores",)})
    key = ("changes", HEADLINE, "change")
    return measured(subtasks.mean(f"{HEADLINE} minus the model", subtasks.able, *key), others, subtasks.needs, subtasks.note("Gains", *key))


def results(measured: Mapping[str, ChoiceTable], about: Mapping) -> dict:
    """Everything that notebook 05 derives from its tables by subtask. about["parameters"]: `bootstrap` and `seed`. -> official (BLINK's own
    scores), subtasks (`describe_table`), interventions, claims, finding and tables for the report."""
    measured = {name: measured[name] for name in READOUTS if name in measured}
    options = about["parameters"]["bootstrap"], about["parameters"]["seed"]
    subtasks = {name: describe_table(table, *options) for name, table in measured.items()}
    surfaced = {name: interventions(table, *options) for name, table in measured.items()}
    claims = {"C8": claim_c8(subtasks), "X5": claim_x5(surfaced)}
    return {"official": official_scores(measured), "subtasks": subtasks, "interventions": surfaced, "claims": claims,
            "finding": _finding(*claims.values()), "tables": _tables(subtasks, surfaced)}  # fmt: skip


def _finding(c8: Mapping, x5: Mapping) -> str:
    if "reason" in c8["primary"]:
        return f"Neither the gap (C8) nor whether it can be closed (X5) was measured: {c8['primary']['reason']}."
    return (f"Values right and model wrong on {interval_text(c8['size'], 1)} % of all items ({c8['size']['name'].split(':')[0]}); of the "
            f"{c8['primary']['n']:,} whose answer names an option {interval_text(c8['primary'], 1, sign=True)} beyond guessing. {c8['note']} Adding the readout to the option scores changes accuracy by "
            f"{interval_text(x5['primary'], 1, sign=True)} points ({x5['primary']['name'].split(':')[0]}). {x5['note']}")


def _tables(subtasks: Mapping, surfaced: Mapping) -> list[dict]:
    """Every comparison, source and intervention: what is too long for the notebook."""
    def percent(found: Mapping, sign: bool = False) -> str:
        return interval_text(found, 1, sign, 100)

    def named(source: str, layers: Sequence[int]) -> str:
        of = f", layer {' and '.join(map(str, dict.fromkeys(layers)))}" if layers else ""
        return "first value projection" if source == FIRST else source + of

    gaps, sources, ways = [], [], []
    for each, ways_of in zip(subtasks.values(), surfaced.values(), strict=True):
        title, found = each["title"], each["table"]
        levels = [percent(found[f"above_{level}"], True) for level in ("chance", "guess", "independence")]
        gaps.append([title, found["n"], found["unresolved"], percent(found["shares"]["value_only"]), *levels, percent(found["of_errors"]),
                     percent(each["by_option_scores"]["shares"]["value_only"])])  # fmt: skip
        changes = {"value": ways_of["changes"][HEADLINE]["change"], **ways_of["others"]}
        for source, one in {"value": found, **each["others"]}.items():
            minus = [percent(one[key], True) if key in one else "" for key in ("accuracy_minus_this", "values_minus_this")]
            sources.append([title, named(source, one["layers"]), percent(one["value_accuracy"]), minus[0],
                            percent(one["shares"]["value_only"]), minus[1], percent(changes[source], True)])  # fmt: skip
        ways += [[title, name, *(percent(one[key], key == "change") for key in ("accuracy", "change", "gained", "lost", "cost"))]
                 for name, one in ways_of["changes"].items()]  # fmt: skip
    return [
        {"title": "Values right, model wrong, % of items", "rows": gaps,
         "header": ["subtask", "n", "unresolved", "share", "minus chance", "minus guessing", "minus independence", "% of the model's errors",
                    "with the option that the model finds most probable as its answer"]},
        {"title": "Every source in place of the values, %", "rows": sources,
         "header": ["subtask", "source", "accuracy", "values minus this", "right where the model is wrong", "values minus this",
                    f"change by {HEADLINE}"]},
        {"title": "Ways to let the values into the answer, %", "rows": ways,
         "header": ["subtask", "way", "accuracy", "change", "newly right", "newly wrong", "of the items that were right, newly wrong"]},
    ]  # fmt: skip
