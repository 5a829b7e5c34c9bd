"""What prefixes do to scores, values and answers, with intervals; claims C7 and X3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvutils.errors import DataError
from kvutils.metrics.old import peak_then_degrade
from kvutils.metrics.statistics import UNDEFINED, Interval, Statistic, bootstrap_ci, column_mean
from kvutils.tasks.base import ScoreTable, by_layer
from kvutils.tasks.prefix import MOVED
from kvutils.tasks.prefixes import CONDITIONS


def summarise_prefixes(table: ScoreTable, statistic: Statistic, n_boot: int = 2000, seed: int = 0) -> dict:
    """Scores by condition and layer, what each prefix adds, and the comparisons at the best layer; JSON-able.

    The best layer is that of the values *without* prefix, chosen on one half of the groups among all but the first (whose
    values no prefix can reach); `best` is measured on the other half: score per condition, and `correct_minus` every
    other. added: per condition and layer, its score minus that without prefix, over all samples. moved: per condition and
    layer, over the samples that show objects or background; None where none does. Raises DataError for fewer than four groups."""
    layers = [layer for layer, _ in by_layer(table.sources, "none")]
    if len(set(table.groups)) < 4:
        raise DataError(f"{table.task}: {len(set(table.groups))} groups are too few to choose a layer; at least 4 are needed")
    reached = [layer for layer in layers if layer > 0]
    plain = np.stack([table.of(f"none.{layer}") for layer in reached], axis=1)
    best = reached[peak_then_degrade(plain, table.groups, seed, statistic, n_boot)["best"]]
    rest, options = table.held_out(seed), (statistic, n_boot, seed)
    first = len(table.columns) - len(MOVED)
    return {
        "n": len(table), "groups": len(set(table.groups)), "held_out": len(rest), "skipped": len(table.skipped),
        "why_skipped": dict(table.skipped), "left_out": dict(table.left_out),
        "layers": layers, "best_layer": best,
        "scores": {c: [table.interval(f"{c}.{layer}", *options) for layer in layers] for c in CONDITIONS},
        "added": {c: [table.difference(f"{c}.{layer}", f"none.{layer}", *options) for layer in layers] for c in CONDITIONS[1:]},
        "best": {
            "scores": {c: rest.interval(f"{c}.{best}", *options) for c in CONDITIONS},
            "correct_minus": {c: rest.difference(f"correct.{best}", f"{c}.{best}", *options) for c in CONDITIONS if c != "correct"},
        },
        "moved": {
            part: {c: [_where_shown(table.of(f"{c}.{layer}")[:, first + i], table.groups, n_boot, seed) for layer in layers]
                   for c in CONDITIONS[1:]}
            for i, part in enumerate(("objects", "background"))
        },
    }  # fmt: skip


def _where_shown(moved: np.ndarray, groups: Sequence[str], n_boot: int, seed: int) -> dict:
    """The mean over the samples that show the part; None where none does."""
    shown = moved >= 0  # not NOWHERE
    if not shown.any():
        return UNDEFINED.as_dict()
    kept = [group for group, each in zip(groups, shown, strict=True) if each]
    return bootstrap_ci(moved[shown, None], column_mean(0), n_boot, seed, kept).as_dict()


def claim_c7(summaries: Mapping[str, Mapping], headline: str = "domain_by_probe") -> dict:
    """C7: correct minus none, wrong and random prefix, in points of mIoU, for the class name before referring expressions
    and the domain before domain segmentation by a probe. Headline: the latter, correct minus none."""
    return _correct_minus(summaries, headline, ("none", "wrong", "random"), "none")


def claim_x3(summaries: Mapping[str, Mapping], headline: str = "domain_by_probe") -> dict:
    """X3: correct minus each control of the same number of tokens, in points of mIoU, for the same two readouts.
    Headline: the domain by a probe, correct minus random words."""
    return _correct_minus(summaries, headline, ("random", "reversed", "unrelated", "filler"), "random")


def _correct_minus(summaries: Mapping[str, Mapping], headline: str, others: Sequence[str], first: str) -> dict:
    """The correct prefix minus each of the others, in points, for both readouts; the headline's minus `first` in front."""

    def points(readout: str, other: str, **more) -> dict:
        if readout not in summaries:
            return UNDEFINED.claim(reason="its data set was left out", **more)
        return Interval.of(summaries[readout]["best"]["correct_minus"][other]).scaled(100).claim(**more)

    entries = [points(name, other, name=f"{name}: correct minus {other}")
               for name in ("referring_by_class_name", headline) for other in others]  # fmt: skip
    return points(headline, first, unit="mIoU points", entries=entries)
