"""What prefixes do to scores and values, with intervals; claims C7a, C7b and X3."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kvutils.metrics.effects import measured, no_floor, part
from kvutils.metrics.statistics import UNDEFINED, Effect, Halves, Resampled, Statistic, bootstrap_ci, resample
from kvutils.readout.words import UNCENTRED
from kvutils.tasks.base import ScoreTable, by_layer
from kvutils.tasks.prefix_readouts import FEWER, MOVED, UNTRAINED
from kvutils.tasks.prefixes import CONDITIONS

REFERRING, EXPRESSION, DOMAIN, PROBE = "referring_by_class_name", "referring_by_expression", "domain_by_text", "domain_by_probe"
DOMAIN_SMALLEST = 2.4  # points: that of C7b in data/claims.yaml, where domains stand beside referring expressions
FEWEST = 4  # images: two in each half


def summarise_prefixes(table: ScoreTable, statistic: Statistic, n_boot: int = 2000, seed: int = 0, kind: str = "") -> dict:
    """Scores by condition and layer, what each prefix adds, and the comparisons at the best layer; JSON-able. kind: `UNCENTRED` for
    these families.

    best_layer: that of the values *without* prefix, over all samples, of all layers but the first (whose values no prefix can
    reach). `best` is over all samples too, each in the layer that is best so in the other half of the groups (`layers`: for the
    first half, and for the second): score per condition, `correct_minus` every other, `random_minus_none`, and `above_untrained`,
    without prefix minus the untrained model in the same layers; with fewer than four groups it has no numbers, and says why.
    added: per condition and layer, its score minus that without prefix. moved: per condition and layer, over the samples that show
    objects or background; None where none does. uncentred: a summary of those families."""
    conditions = [c for c in CONDITIONS if by_layer(table.sources, kind + c)]
    layers = [layer for layer, _ in by_layer(table.sources, f"{kind}none")]
    families = conditions + [UNTRAINED] * bool(not kind and by_layer(table.sources, UNTRAINED))
    scores = np.stack([np.stack([table.of(f"{kind}{family}.{layer}") for family in families], axis=1) for layer in layers], axis=1)
    first, groups, n_layers = sum(layer == 0 for layer in layers), len(set(table.groups)), len(layers)
    why = "" if groups >= FEWEST else f"{groups} images are too few to choose a layer on some and read it on others, {FEWEST} are needed"
    why = why if first < n_layers else "only the first layer, which no prefix reaches, has a score"
    chosen: list[int] = []
    if not why:
        halves = Halves.of(table.groups, seed)
        chosen = [first + each for each in halves.best(scores[:, first:, 0], statistic)]
        scores = np.concatenate([scores, halves.read(scores, chosen)[:, None]], axis=1)  # (n, layers and the chosen ones, families, k)

    def curves(weights: np.ndarray) -> np.ndarray:
        found = [statistic(weights, scores[:, layer, family]) for layer, family in np.ndindex(scores.shape[1:3])]
        return np.stack(found, axis=1).reshape(len(weights), *scores.shape[1:3])

    drawn = resample(curves, len(table), n_boot, seed, table.groups)

    def of(family: str, other: str | None = None) -> Resampled:
        """Per layer the score in a family, or its difference to that in another."""
        a, b = (None if each is None else families.index(each) for each in (family, other))
        value, draws = (each[..., a] - (0 if b is None else each[..., b]) for each in (drawn.value, drawn.draws))
        return replace(drawn, value=value, draws=draws)

    def by_layers(*families: str) -> list[dict]:
        return [each.as_dict() for each in of(*families).intervals()[:n_layers]]

    def at_best(*families: str) -> dict:
        return UNDEFINED.as_dict() | {"reason": why} if why else of(*families).effects()[-1].as_dict()

    plain = drawn.value[first:n_layers, 0]
    best = {"layers": [layers[each] for each in chosen], "scores": {c: at_best(c) for c in conditions},
            "correct_minus": {c: at_best("correct", c) for c in conditions if c != "correct"}, "random_minus_none": at_best("random", "none")}
    summary: dict = {
        "n": len(table), "groups": groups, "skipped": len(table.skipped), "why_skipped": dict(table.skipped), "left_out": dict(table.left_out),
        "layers": layers, "best_layer": layers[first + int(np.argmax(plain))] if len(plain) else layers[0], "best": best,
        "scores": {family: by_layers(family) for family in families}, "added": {c: by_layers(c, "none") for c in conditions[1:]},
    }
    if UNTRAINED in families:
        best["above_untrained"] = at_best("none", UNTRAINED)
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
