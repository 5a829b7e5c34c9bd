"""Claims and what a run stored of them: the lines of claims.json, each with its verdict and the comparisons behind it.

Reads data/claims.yaml and data/results/<profile>/<model>/<notebook>.json. A verdict is computed here or not at all."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from kvutils import data_folder
from kvutils.errors import DataError
from kvutils.run import DEFAULT, across
from kvutils.run.verdicts import HOLDS, NOT_MEASURED, OPPOSITE, PRESENT, SAY_FEW, decided_by, interval_of, is_current, judge, rough, smallest_of, word_of_part
from kvutils.store import read_json

COMPARISONS = ("claim", "comparison", "value [95 % interval]", "smallest effect of interest", "detectable", "n", "units", "verdict")


@cache
def load_claims() -> list[dict]:
    """The claims of data/claims.yaml, in their order."""
    file = data_folder() / "claims.yaml"
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))["claims"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise DataError(f"{file}: expected YAML with a list `claims`, found {error}") from error


def row(claim: Mapping, found: Mapping | None) -> dict:
    """One line of claims.json: the verdict, why, and the numbers that it rests on, in the claim's unit."""
    verdict = judge(claim, found)
    found = found if found and is_current(found) else {}
    one, tasks = decided_by(claim, found) if found else {}, found.get("tasks", []) if claim["kind"] == "tasks" else []
    return {"id": claim["id"], "verdict": verdict.word, "why": verdict.why, "note": found.get("note", ""),
            **{key: claim[key] for key in ("kind", "paper", "effect", "unit", "smallest", "notebook")}, "comparison": one.get("name"),
            **{key: one.get(key) for key in ("value", "low", "high", "detectable", "n", "units", "reason")},
            "tasks": {each["name"]: word_of_part(claim, each) for each in tasks}, "prerequisites": found.get("prerequisites", [])}  # fmt: skip


def ours(line: Mapping) -> str:
    """What was measured of a line of claims.json: `+0.04 [+0.00, +0.10] F1 points`, or on how many tasks it is ahead, and behind on any."""
    if line["kind"] == "tasks":
        ahead, behind = (list(line["tasks"].values()).count(word) for word in (PRESENT, OPPOSITE))
        return f"{ahead} of {len(line['tasks'])} tasks{f' ({behind} behind)' if behind else ''}" if line["tasks"] else "–"
    if line["value"] is None:
        return "–"
    return interval_of(line) if line["low"] is None else f"{interval_of(line)} {line['unit']}"


def sentence(line: Mapping) -> str:
    """One sentence on a line of claims.json whose numbers stand beside: why the verdict is what it is; of an effect that is there, and of
    which the paper states no figure to compare with, what it consists of."""
    there = line["verdict"] in (PRESENT, HOLDS) and line["kind"] == "effect" and line["effect"] is None
    return re.split(r"(?<=\.) (?=[A-Z])", line["note"])[0] if there and line["note"] else line["why"]


def comparisons(claim: Mapping, found: Mapping) -> list[list]:
    """What stands behind a verdict: rows under `COMPARISONS`, the one that decides in bold, each with its own word."""
    if not is_current(found):
        return [[claim["id"], judge(claim, found).why, *[""] * (len(COMPARISONS) - 3), NOT_MEASURED]]
    parts = {each["name"]: each for each in (found["primary"], *found.get("tasks", ()), *found["others"])}
    first, line = decided_by(claim, found), row(claim, found)
    del parts[first["name"]]
    counted = claim["kind"] == "tasks" and first["low"] is not None  # what is judged is the number; its mean is one of the others
    lines = [(claim["id"], first, *((f"{interval_of(first)} {claim['unit']}", word_of_part(claim, first)) if counted
                                    else (ours(line), line["verdict"])))]
    for one in parts.values():
        value = interval_of(one) if one["low"] is None else f"{interval_of(one)} {one.get('unit', claim['unit'])}"
        lines.append((claim["id"], one, value, word_of_part(claim, one)))
    cells = [[name, one["name"], value, (least := smallest_of(claim, one)) and f"{least:g}", one["detectable"] and rough(one["detectable"]),
              one["n"], units(one), word] for name, one, value, word in lines]  # fmt: skip
    cells[0][:2] = (f"**{text}**" for text in cells[0][:2])
    return cells


def units(one: Mapping) -> str:
    """The number of independent units, and whether an interval rests on few."""
    few = one["low"] is not None and one["units"] < SAY_FEW
    return f"{one['units']:,}{', few units' if few else ''}" if one["units"] else "–"


def measurement(claim: Mapping, results: Mapping) -> Mapping | None:
    """What is stored of a claim, by its notebook or for several models; None if it was not measured."""
    return results.get(claim["notebook"], {}).get("claims", {}).get(claim["id"])


def rows(results: Mapping) -> list[dict]:
    """The lines of claims.json, one per claim, from `read_all`."""
    return [row(claim, measurement(claim, results)) for claim in load_claims()]


def read_results(folder: Path) -> dict[str, dict]:
    """{notebook: results} of the results files in a folder."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("[0-9][0-9]_*.json"))}


def read_all(folder: Path) -> dict:
    """The results in data/results/<profile>/<model>, and under None the claims that all models of the profile are read for."""
    return {**read_results(folder), None: {"claims": across.measure(of_profile(folder.resolve().parent), load_claims())}}


def of_profile(home: Path) -> across.Models:
    """Results and provenance of every model in data/results/<profile>."""
    models = sorted({path.parent for path in home.glob("*/[0-9][0-9]_*.json")})
    return {each.name: (read_results(each), read_results(each / "provenance")) for each in models}


def result_folders(root: Path) -> list[Path]:
    """data/results/<profile>/<model> folders that hold results, the committed run's first."""
    folders = {path.parent for path in (root / "data" / "results").glob("*/*/[0-9][0-9]_*.json")}
    return sorted(folders, key=lambda path: ((path.parent.name, path.name) != DEFAULT, path))
