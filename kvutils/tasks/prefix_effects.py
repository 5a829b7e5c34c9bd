"""What prefixes do to scores, values and answers, with intervals; claims C7a, C7b and X3: all that notebook 04 derives is `results`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kvutils.metrics.effects import measured, no_floor, part
from kvutils.metrics.layers import Halves, each_layer
from kvutils.metrics.statistics import UNDEFINED, Effect, Resampled, Statistic, bootstrap_ci, column_mean, interval_text, resample
from kvutils.readout.words import UNCENTRED
from kvutils.store import Frame
from kvutils.tasks.base import ScoreTable, by_layer
from kvutils.tasks.prefix_answers import ABSENT, NAMED, summarise_prefix_answers
from kvutils.tasks.prefix_readouts import FEWER, MOVED, TITLES, UNTRAINED, DomainPrefix, ReferringPrefix
from kvutils.tasks.prefixes import CONDITIONS
from kvutils.tasks.text_segmentation import AP

REFERRING, EXPRESSION, DOMAIN, PROBE = TITLES
REFERRING_SMALLEST, DOMAIN_SMALLEST = 0.3, 2.4  # points: those of C7a and C7b in data/claims.yaml
FEWEST = 4  # images: two in each half


def results(tables: Mapping[str, ScoreTable | Frame], about: Mapping) -> dict:
    """Everything that notebook 04 derives from its tables: those of the readouts by name, and of the answers ("answers").
    about["parameters"]: `bootstrap`, `seed` and `profile`. average_precision: as `readouts`, of the readouts of expressions, scored without
    a threshold."""
    options = about["parameters"]["bootstrap"], about["parameters"]["seed"]
    readouts, precision = {}, {}
    for name in (name for name in TITLES if name in tables):
        kind, smallest = (ReferringPrefix, REFERRING_SMALLEST) if name in (REFERRING, EXPRESSION) else (DomainPrefix, DOMAIN_SMALLEST)
        named = {"title": TITLES[name], "metric": kind.metric, "smallest": smallest}
        readouts[name] = named | summarise_prefixes(tables[name], kind.statistic, *options)
        if kind is ReferringPrefix:
            precision[name] = summarise_prefixes(tables[name], column_mean(AP), *options)
    answers = summarise_prefix_answers(tables["answers"], *options)
    claims = {"C7a": claim_c7a(readouts), "C7b": claim_c7b(readouts), "X3": claim_x3(readouts)}
    return {"readouts": readouts, "average_precision": precision, "answers": answers, "claims": claims,
            "finding": _finding(claims, answers, about["parameters"]), "tables": _tables(readouts, precision, answers)}  # fmt: skip


def _finding(claims: Mapping[str, Mapping], answers: Mapping, parameters: Mapping) -> str:
    def by(name: str) -> str:
        found = claims[name]["primary"]
        return f"by {interval_text(found, 2, sign=True)} mIoU points" if found["low"] is not None else "by an amount that was not measured"

    here = "In this small model" if parameters["profile"] == "pocket" else f"In {parameters['model']}"
    def change(rate: str, first: str, other: str) -> tuple[str, str]:
        before, behind = (interval_text(answers["rates"][rate][c], 1, factor=100).partition(" [")[0] for c in (other, first))
        found = answers["correct_minus"][rate][other] if first == "correct" else answers["minus_none"][rate][first]
        return f"{behind} % instead of {before} %", interval_text(found, 1, sign=True, factor=100)

    (named, more), (absent, less) = change(NAMED, "correct", "none"), change(ABSENT, "wrong", "none")
    return (f"{here}, the correct class name before the image changes what its values say about referring expressions {by('C7a')} against no prefix "
            f"(C7a) and {by('X3')} against random words (X3), the correct domain what they say about street scenes {by('C7b')} (C7b). Of the answers "
            f"about the object named, {named} are right, {more} points ({change(NAMED, 'correct', 'unrelated')[1]} against unrelated words of the "
            f"same length); about an object that is named and not there, {absent}, {less} points ({answers['images']} images).")


def _tables(readouts: Mapping, precision: Mapping, answers: Mapping) -> list[dict]:
    """Every condition, and the same samples with and without threshold and centring: what is too wide for the notebook."""
    def points(found: Mapping, name: str, sign: bool = False) -> str:
        return interval_text(found[name], 1, sign, 100) if name in found else "–"

    kinds = [(name, kind, each) for name in precision for metric, found in (("mIoU", readouts[name]), ("average precision", precision[name]))
             for kind, each in ((metric, found), (f"{metric}, texts uncentred", found.get("uncentred"))) if each]  # fmt: skip
    minus = [(name, kind, ", ".join(map(str, best["layers"])), points(best["scores"], "none"),
              *(points(best["correct_minus"], c, True) for c in ("none", "random"))) for name, kind, found in kinds for best in [found["best"]]]
    rates = {**answers["rates"], "probability of yes and no together": answers["option_mass"]}
    return [{"title": "Readouts behind every prefix, mIoU points", "header": ["readout", *CONDITIONS],
             "rows": [[name, *(points(each["best"]["scores"], c) for c in CONDITIONS)] for name, each in readouts.items()]},
            {"title": "Referring expressions with and without threshold and centring, points",
             "header": ["readout", "score", "layers", "without prefix", "correct minus none", "correct minus random"],
             "rows": [list(row) for row in minus]},
            {"title": f"Answers to {answers['questions']} questions about {answers['images']} images, %", "header": ["", *CONDITIONS],
             "rows": [[rate, *(points(each, c) for c in CONDITIONS)] for rate, each in rates.items()]}]  # fmt: skip


def summarise_prefixes(table: ScoreTable, statistic: Statistic, n_boot: int = 2000, seed: int = 0, kind: str = "") -> dict:
    """Scores by condition and layer, what each prefix adds, and the comparisons at the best layer; JSON-able. kind: `UNCENTRED` for these
    families.

    best_layer: that of the values *without* prefix, over all samples, of all layers but the first, which no prefix can reach. `best`: each
    sample in the layer that is best so in the other half of the groups (`layers`), which every resample chooses anew: score per condition,
    `correct_minus` every other, `random_minus_none`, and `above_untrained`, without prefix minus the untrained model in its own best layer;
    with fewer than four groups it has no numbers, and says why. added: per condition and layer, its score minus that without prefix. moved: the same over the
    samples that show objects or background; None where none does. uncentred: a summary of those families."""
    conditions = [c for c in CONDITIONS if by_layer(table.sources, kind + c)]
    layers = [layer for layer, _ in by_layer(table.sources, f"{kind}none")]
    families = conditions + [UNTRAINED] * bool(not kind and by_layer(table.sources, UNTRAINED))
    scores = np.stack([np.stack([table.of(f"{kind}{family}.{layer}") for family in families], axis=1) for layer in layers], axis=1)
    first, groups = sum(layer == 0 for layer in layers), len(set(table.groups))
    why = "" if groups >= FEWEST else f"{groups} images are too few to choose a layer on some and read it on others, {FEWEST} are needed"
    why = why if first < len(layers) else "only the first layer, which no prefix reaches, has a score"
    scored, options = each_layer(statistic), (len(table), n_boot, seed, table.groups)
    layered = resample(lambda w: each_layer(scored)(w, scores), *options)
    if not why:
        halves, inside = Halves.of(table.groups, seed), scores[:, first:]
        chosen = halves.best(inside[:, :, 0], statistic)
        at_chosen = resample(halves.chosen(inside, scored, inside[:, :, 0], statistic), *options, around=True)

    def of(drawn: Resampled, family: str, other: str | None = None) -> Resampled:
        """The score in a family, or its difference to that in another."""
        a, b = (None if each is None else families.index(each) for each in (family, other))
        value, draws = (each[..., a] - (0 if b is None else each[..., b]) for each in (drawn.value, drawn.draws))
        return replace(drawn, value=value, draws=draws)

    def by_layers(*names: str) -> list[dict]:
        return [each.as_dict() for each in of(layered, *names).intervals()]

    def at_best(*names: str) -> dict:
        return UNDEFINED.as_dict() | {"reason": why} if why else of(at_chosen, *names).effects().as_dict()

    plain = layered.value[first:, 0]
    best = {"layers": [] if why else [layers[first + each] for each in chosen], "scores": {c: at_best(c) for c in conditions},
            "correct_minus": {c: at_best("correct", c) for c in conditions if c != "correct"}, "random_minus_none": at_best("random", "none")}
    summary: dict = {"n": len(table), "groups": groups, "skipped": len(table.skipped), "why_skipped": dict(table.skipped),
                     "left_out": dict(table.left_out), "layers": layers, "best": best,
                     "best_layer": layers[first + int(np.argmax(plain))] if len(plain) else layers[0],
                     "scores": {family: by_layers(family) for family in families}, "added": {c: by_layers(c, "none") for c in conditions[1:]}}
    if UNTRAINED in families:
        best["above_untrained"] = UNDEFINED.as_dict() | {"reason": why}
        if not why:  # the untrained model too in the best of its layers, the first included, as the control of C1
            levels = [halves.chosen(each, statistic) for each in (inside[:, :, 0], scores[:, :, families.index(UNTRAINED)])]
            best["above_untrained"] = resample(lambda w: levels[0](w) - levels[1](w), *options, around=True).effects().as_dict()
    if not kind and MOVED[0] in table.columns:
        summary["moved"] = {column.removeprefix("moved_"): _moved(table, column, conditions[1:], layers, n_boot, seed) for column in MOVED}
    if not kind and by_layer(table.sources, f"{UNCENTRED}none"):
        summary["uncentred"] = summarise_prefixes(table, statistic, n_boot, seed, UNCENTRED)
    return summary


def _moved(table: ScoreTable, column: str, conditions: Sequence[str], layers: Sequence[int], n_boot: int, seed: int) -> dict:
    """Per condition and layer the mean over the samples that show the part; None where none does."""
    place = table.columns.index(column)
    far = np.stack([table.of(f"{c}.{layer}")[:, place] for c in conditions for layer in layers], axis=1)
    shown, found = (far >= 0).all(axis=1), [UNDEFINED] * far.shape[1]  # not NOWHERE
    if shown.any():
        found = bootstrap_ci(far[shown], n_boot=n_boot, seed=seed, groups=[g for g, s in zip(table.groups, shown, strict=True) if s])
    rows = iter(found)
    return {c: [next(rows).as_dict() for _ in layers] for c in conditions}


def claim_c7a(summaries: Mapping[str, Mapping]) -> dict:
    """C7a, in points of mIoU: the class name before referring expressions, correct prefix minus none."""
    others = ((REFERRING, "correct", "wrong"), (REFERRING, "random", "none"), (EXPRESSION, "correct", "none"), (EXPRESSION, "correct", "wrong"),
              (UNCENTRED + REFERRING, "correct", "none"))  # fmt: skip
    return _claim(summaries, REFERRING, "none", [_part(summaries, *each) for each in others], FEWER)


def claim_c7b(summaries: Mapping[str, Mapping]) -> dict:
    """C7b, in points of mIoU: the domain before street scenes, correct prefix minus none, read by text; by the probe in `others`."""
    others = ((DOMAIN, "correct", "wrong"), (DOMAIN, "random", "none"), (PROBE, "correct", "none"), (PROBE, "correct", "wrong"),
              (PROBE, "random", "none"))  # fmt: skip
    return _claim(summaries, DOMAIN, "none", [_part(summaries, *each) for each in others], FEWER)


def claim_x3(summaries: Mapping[str, Mapping]) -> dict:
    """X3, in points of mIoU: the class name before referring expressions, correct prefix minus random words; in `others` minus the
    other controls of the same number of tokens, and the same for domains."""
    controls = ("random", "reversed", "unrelated", "filler")
    others = [_part(summaries, REFERRING, "correct", control) for control in controls[1:]]
    others += [_part(summaries, DOMAIN, "correct", control, smallest=DOMAIN_SMALLEST) for control in controls]
    return _claim(summaries, REFERRING, "random", others, ("correct", *controls))


def _claim(summaries: Mapping[str, Mapping], readout: str, other: str, others: Sequence[dict], told: Sequence[str]) -> dict:
    primary = _part(summaries, readout, "correct", other)
    if primary["low"] is None:
        return measured(primary, others)
    best, name = summaries[readout]["best"], readout.replace("_", " ")
    floor = [no_floor(f"{name} without a prefix", Effect.of(found).scaled(100), "mIoU points") for found in [best.get("above_untrained")] if found]
    levels = ", ".join(f"{100 * best['scores'][c]['mean']:.1f} ({c})" for c in told)
    places = " and layer ".join(map(str, dict.fromkeys(best["layers"])))
    return measured(primary, others, floor, f"{name.capitalize()} has an mIoU of {levels}, read in layer {places}.")


def _part(summaries: Mapping[str, Mapping], readout: str, one: str, other: str, **more: object) -> dict:
    """One difference at the best layers, in points."""
    name = f"{readout.replace('_', ' ').replace('.', ' ')}: {one} minus {other}" + " (expected: absent)" * (one == "random")
    summary = summaries.get(readout.removeprefix(UNCENTRED), {})
    summary = summary.get("uncentred", {}) if readout.startswith(UNCENTRED) else summary
    if not summary:
        return part(name, reason="its data set was left out", **more)
    best = summary["best"]
    found = best["random_minus_none"] if one == "random" else best["correct_minus"][other]
    return part(name, Effect.of(found).scaled(100), found.get("reason", "too few independent units to resample"), **more)
