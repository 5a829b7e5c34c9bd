"""Claims C5, C6, X2 and X4 from what notebook 03 measures, in the form that data/claims.yaml asks for."""

from __future__ import annotations

from collections.abc import Mapping

from kvutils.errors import DataError
from kvutils.tasks.key_blocking import BLOCK, CONTROLS

POINTS = {"pope": 100.0, "mme": 1.0}  # F1 in points; the score of MME is in points already


def claim_c5(described: Mapping) -> dict:
    """C5: median over layers of Ashman's D of the log-variance centred within each head. described: of `describe_keys`.

    A pooled histogram has two modes as soon as keys of some layers or heads are longer; this has not. Entries:
    the layers.
    """
    found = described["modes"]
    entries = [_entry(f"layer {layer}", each) for layer, each in enumerate(found["layers"])]
    unit = "Ashman's D within layers, median"
    return {**_headline(found["median"]), "unit": unit, "entries": entries}


def claim_c6(pope: Mapping, mme: Mapping) -> dict:
    """C6: blocked minus unblocked on POPE (F1 points) and MME (score). pope, mme: of `effects`."""
    blocked = [found["families"][BLOCK] for found in (pope, mme)]
    entries = [
        _scaled(f"{each['title']}: {each['metric']}", each["headline"], POINTS[each["task"]]) for each in blocked
    ]
    first = {key: entries[0][key] for key in ("value", "low", "high", "n")}
    return {**first, "unit": "POPE F1 points", "entries": entries}


def claim_x2(pope: Mapping) -> dict:
    """X2: effect of the block on POPE minus that of each control, in F1 points."""
    title = pope["plain"]["title"]
    entries = [_scaled(f"{title}: block minus {name}", pope["versus"][name], POINTS["pope"]) for name in CONTROLS]
    return {"value": None, "low": None, "high": None, "n": len(entries), "unit": f"controls of {len(entries)}",
            "entries": entries}  # fmt: skip


def claim_x4(described: Mapping, compared: Mapping) -> dict:
    """X4: share in the trained minus the untrained model, and attention per key minus that of other keys.

    The share is scale-free, as keys of random weights are short: below the valley of variance / mean norm^2 where
    it has two modes, else below a fixed value. The attention is that of the keys below the paper's kind of
    threshold, in multiples of the average key's. Raises DataError where no head has keys of both kinds.
    """
    scale = "scale_free" if described["thresholds"]["scale_free"]["two_modes"] else "near_constant"
    mass = described["sinks"]["raw"]["mass"]["all"]
    if mass["mean"] is None:
        raise DataError("no layer and head has keys below and above the threshold: are they sinks? cannot be said")
    entries = [
        _entry(f"share of keys ({scale}), trained minus untrained", compared[scale]["difference"]["all"]),
        _entry("attention per key (multiples of the average key's), input-agnostic minus others", mass),
    ]
    return {"value": None, "low": None, "high": None, "n": len(entries), "unit": "comparisons of 2", "entries": entries}


def _headline(interval: Mapping) -> dict:
    return {"value": interval["mean"], **{key: interval[key] for key in ("low", "high", "n")}}


def _entry(name: str, interval: Mapping) -> dict:
    return {"name": name, **_headline(interval)}


def _scaled(name: str, interval: Mapping, factor: float) -> dict:
    scaled = {key: interval[key] * factor for key in ("mean", "low", "high")}
    return _entry(name, scaled | {"n": interval["n"]})
