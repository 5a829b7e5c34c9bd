"""Whether a run gave what is committed: the verdicts, and every number of the results files."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvutils.run import notebook, report
from kvutils.store import read_json

TOLERANCE = 1e-6  # relative: what another machine of the same kind may differ by


def compare_verdicts(old: Path, new: Path, names: list[str]) -> list[str]:
    """Where the verdicts of two folders of results differ, for the claims of the notebooks `names`."""
    pairs = zip(report.rows(report.read_results(old)), report.rows(report.read_results(new)), strict=True)
    return [f"{before['id']}: {before['verdict']} in {old}, {after['verdict']} now" for before, after in pairs
            if before["notebook"] in names and before["verdict"] != after["verdict"]]


def committed(path: Path) -> dict:
    """A results file as git has it in HEAD; without git or before its first commit as it lies there; {} if it does not."""
    command = ["git", "-C", str(notebook.ROOT), "show", f"HEAD:./{path.relative_to(notebook.ROOT).as_posix()}"]
    try:
        return json.loads(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return read_json(path) if path.exists() else {}


def numbers(value: object, place: str = "") -> Iterator[tuple[str, float]]:
    """(place, number) of every number of a results file."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from numbers(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value


def compare_numbers(before: Mapping[str, Mapping], after: Mapping[str, Mapping]) -> str:
    """`N numbers as committed, M differ (largest relative difference X, at KEY)`, over {notebook: results}."""
    old, new = dict(numbers(before)), dict(numbers(after))
    if not old:
        return f"{len(new):,} numbers; no earlier results to compare with"
    apart = {key: abs(new[key] - old[key]) / max(abs(new[key]), abs(old[key]), 1e-9) for key in old.keys() & new.keys()}
    differ = {key: far for key, far in apart.items() if far > TOLERANCE}
    text = f"{len(apart) - len(differ):,} numbers as committed, {len(differ):,} differ"
    if differ:
        worst = max(sorted(differ), key=differ.get)
        text += f" (largest relative difference {differ[worst]:.2g}, at {worst}: {old[worst]:g} before, {new[worst]:g} now)"
    changed = [f"{len(keys):,} {what} ({min(keys)}{', ...' if len(keys) > 1 else ''})"
               for what, keys in (("new", new.keys() - old.keys()), ("gone", old.keys() - new.keys())) if keys]  # fmt: skip
    return "; ".join([text, *changed])
