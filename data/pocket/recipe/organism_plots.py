"""Figures of the arms: what each ingredient changes, seeds as points."""

from collections.abc import Mapping
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvutils.plots.style import COLOURS, forest, panels, styled
from recipe.arms import QUESTIONS
from recipe.effects import trained


def sign(found: Mapping) -> int:
    """1 or -1 where the interval lies above or below 0, else 0."""
    return 0 if found["low"] is None else int(found["low"] > 0) - int(found["high"] < 0)


def judged(arms: Mapping[str, Mapping]) -> list[Mapping]:
    """The effects of a question that have an interval."""
    return [found for arm in arms.values() for found in arm["readings"].values() if found["low"] is not None]


@styled
def differences(question: str, arms: Mapping[str, Mapping]) -> Figure:
    """A panel per reading, a row per arm: the arm minus the one it is compared with, with its 95 % interval, and the seeds as points."""
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm["readings"]))
    rows = [f"{name}\nminus {arm['against']}" for name, arm in arms.items()]
    columns = min(4, len(names))
    figure, axes = panels(len(names), columns, 10 / columns, 0.9 + 0.42 * len(rows), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        points, unit = [], ""
        for row, arm in enumerate(arms.values()):
            if found := arm["readings"].get(name):
                unit = found["unit"]
                points.append((row, found, COLOURS[0] if sign(found) else "grey", "o", None))
                axis.plot(found["seeds"], [row + 0.25] * len(found["seeds"]), ".", color="black", ms=3.5, alpha=0.6)
        forest(axis, points, rows)
        axis.set_title(name.replace(": ", ":\n") if ": " in name else fill(name, 32), fontsize=8.5)
        axis.set_xlabel(unit, fontsize=8)
        axis.tick_params(labelsize=7.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_ylim(len(rows) - 0.4, -0.5)
    found = judged(arms)
    seeds = sorted({seed for arm in arms.values() for seed in arm["seeds"]})
    figure.suptitle(f"{question}: {QUESTIONS[question].asked}\n{sum(sign(each) != 0 for each in found)} of {len(found)} differences have an interval without 0 "
                    f"(95 %, over seeds {', '.join(map(str, seeds))} and items)\nblue: such an interval; black points: seeds; no bar: nothing differs", fontsize=10)  # fmt: skip
    return figure


def draw(found: Mapping[str, Mapping]) -> dict[str, Figure]:
    """found: of `recipe.effects.effects`."""
    return {f"06_{question.lower()}": differences(question, arms) for question, arms in found.items() if trained(arms)}
