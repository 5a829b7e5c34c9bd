"""Two runs or two results files side by side: what differs, and by how much."""

import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvutils.run.judged import ours, read_results, rows
from kvutils.store import read_json

TOLERANCE = 1e-6  # relative: what another machine of the same kind may differ by
FAR = 0.1  # of half its interval: what another kind of processor may move the number behind a verdict by, which rounds otherwise
SHOWN = 5  # differences that are named


def verdicts_apart(old: Path, new: Path, names: list[str]) -> list[str]:
    """Where the verdicts of two folders of results differ, or the numbers behind them by more than `FAR`, for the claims of the notebooks `names`."""
    pairs = zip(rows(read_results(old)), rows(read_results(new)), strict=True)
    return [f"{before['id']}: {before['verdict']}, {ours(before)} in {old}; {after['verdict']}, {ours(after)} now" for before, after in pairs
            if before["notebook"] in names and (any(before[key] != after[key] for key in ("verdict", "tasks")) or _moved(before, after))]


def _moved(before: Mapping, after: Mapping) -> bool:
    ends = [(before[key], after[key]) for key in ("value", "low", "high")]
    # Else words differ or neither has an interval; of X6 another setting may reach furthest, and bfloat16 is another on another processor.
    defined = before["comparison"] == after["comparison"] and not any(None in pair for pair in ends)
    return defined and max(abs(one - other) for one, other in ends) > FAR * (before["high"] - before["low"]) / 2


def committed(path: Path) -> dict:
    """A results file as git has it in HEAD; without git or before its first commit as it lies there; {} if it does not."""
    there = next(each for each in path.parents if each.is_dir())
    command = ["git", "-C", str(there), "show", f"HEAD:./{path.relative_to(there).as_posix()}"]
    try:
        return json.loads(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return read_json(path) if path.exists() else {}


def leaves(value: object, place: str = "") -> Iterator[tuple[str, object]]:
    """(place, leaf) of everything in a results file; what is empty is a leaf."""
    if isinstance(value, Mapping | list) and value:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, f"{place}.{key}".lstrip("."))
    else:
        yield place, value


def _apart(old: object, new: object) -> float:
    """The relative difference of two numbers; of other leaves 0 where they are the same, else infinite."""
    if _is_number(old) and _is_number(new):
        return abs(new - old) / max(abs(new), abs(old), 1e-9)
    return 0.0 if old == new else math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers_apart(before: Mapping[str, Mapping], after: Mapping[str, Mapping]) -> str:
    """`N numbers as committed, M differ (largest relative difference X, at KEY)`, over {notebook: results}."""
    old, new = ({place: leaf for place, leaf in leaves(each) if _is_number(leaf)} for each in (before, after))
    if not old:
        return f"{len(new):,} numbers; no earlier results to compare with"
    both = old.keys() & new.keys()
    differ = {key: far for key in both if (far := _apart(old[key], new[key])) > TOLERANCE}
    text = f"{len(both) - len(differ):,} numbers as committed, {len(differ):,} differ"
    if differ:
        worst = max(sorted(differ), key=differ.get)
        text += f" (largest relative difference {differ[worst]:.2g}, at {worst}: {old[worst]:g} before, {new[worst]:g} now)"
    changed = [f"{len(keys):,} {what} ({min(keys)}{', ...' if len(keys) > 1 else ''})"
               for what, keys in (("new", new.keys() - old.keys()), ("gone", old.keys() - new.keys())) if keys]  # fmt: skip
    return "; ".join([text, *changed])


def differences(stored: Mapping, derived: Mapping, follows: str) -> list[str]:
    """Where the leaves of two JSON values differ, parameters and claims first; numbers by more than another machine's last bits."""
    old, new = dict(leaves(stored)), dict(leaves(derived))
    places = [place for place in old | new if place not in old or place not in new or _apart(old[place], new[place]) > TOLERANCE]
    places.sort(key=lambda place: (not place.startswith("parameters."), not place.startswith("claims."), place != "finding"))
    pairs = [(place, *_around(old.get(place, "missing"), new.get(place, "nothing"))) for place in places[:SHOWN]]
    told = [f"{place} is {one!r}, {other!r} {follows}" for place, one, other in pairs]
    return told + ([f"and {len(places) - SHOWN:,} more"] if len(places) > SHOWN else [])


def _around(one: object, other: object) -> tuple[object, object]:
    """Of two long texts what stands where they differ."""
    if not (isinstance(one, str) and isinstance(other, str)) or max(len(one), len(other)) < 100:
        return one, other
    start = max(0, len(os.path.commonprefix([one, other])) - 30)
    return tuple(f"{'...' if start else ''}{text[start : start + 90]}..." for text in (one, other))
