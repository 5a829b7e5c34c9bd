"""How often do the rules say what is true? Every claim on synthetic measurements, at the paper's n and at the pocket profile's.

    python benchmarks/simulate_verdicts.py [--runs 100] [--only C2b ...] [--write]

Drawn at random are the measurements alone (scores of items, answers, variances of keys). All that follows, the choice of layers, the
resampling, the claim and the verdict, is the code that the notebooks run. A line of the table is a claim, a size and a truth: the
paper's effect (where it states no figure, twice the smallest effect of interest), none, the opposite one, and what makes a claim
impossible to judge: a ceiling, a floor, no lever. "Said so" is how often the verdict was the right one; "would find" the effect that shows
with probability .8, and the smallest that matters: an effect or its absence can be expected only where the data can tell.
The two halves that choose layers for each other choose alike where layers hardly differ, and their estimates go together. With layers that
stay in every resample C1 was therefore present in 12 % of 120 runs without an effect, and C7a opposite in 9 %; so every resample chooses anew
(C1, C2, C4, C7, C8, X1, X3), and where layers hardly differ intervals are wider than they would have to be: at most 2 % false ones of
either sign (X1: 4 %), where 2.5 % would be exact, and effects have to be larger by a fifth to a third to be found (C8: by up to two thirds).
X5 keeps its layers and weights: where its readout knows nothing, none of 40 runs finds a gain.
Absence is rarely shown at these sizes: of C1, C3, C4, X1 and, at the paper's, C8 in none of the runs or one in a hundred; in the pocket profile
of C7a and X3 in none either, of C2 in one in thirty.
A fault of C2's rule that is known: the best of several layers is ahead of the ends as well where the layers' levels only scatter, without a
trend; so the mean of the layers between, which nothing has chosen, stands beside it in every report.
--write puts the table into benchmarks/VERDICTS.md.

Noise: per unit (image, group, clip, pair) as large as in the first pocket results, see `NOISE`; how large it is in the paper's is unknown.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from kvutils.datasets.samples import YesNoSample
from kvutils.layout import TokenLayout
from kvutils.metrics.effects import measured, part
from kvutils.metrics.statistics import Effect, column_mean
from kvutils.run import across, notebook, report
from kvutils.run.judged import load_claims
from kvutils.run.verdicts import VERDICTS, judge
from kvutils.store import read_json
from kvutils.tasks.base import SHUFFLED, UNTRAINED, ScoreTable, summarise
from kvutils.tasks.bimodality import bimodal_layers
from kvutils.tasks.blink_interventions import claim_x5, interventions
from kvutils.tasks.blink_tables import claim_c8, describe_table
from kvutils.tasks.choices import ChoiceTable
from kvutils.tasks.input_agnostic_keys import claim_c5, claim_x4
from kvutils.tasks.key_blocking import BLOCK, CONTROLS, EVERY, NONE, claim_c6, claim_x2, effects
from kvutils.tasks.key_statistics import agnostic, compare_trained, shares, sinks, thresholds
from kvutils.tasks.key_table import KeyTable
from kvutils.tasks.prefix_effects import claim_c7a, claim_c7b, claim_x3, summarise_prefixes
from kvutils.tasks.prefixes import CONDITIONS
from kvutils.tasks.settings import claim_x6
from kvutils.tasks.siglip_baseline import claim_c4, compare_along_chain
from kvutils.tasks.value_flow import SIX, claim_c1, claim_c2a, claim_c2b
from kvutils.tasks.yes_no import Mme, Pope

TABLE = Path(__file__).resolve().parent / "VERDICTS.md"
BOOT = 200  # resamples of a simulated run; a notebook makes 2,000
WEIGHTS = 5  # draws of random weights, as in notebook 03
PAPER, POCKET = "paper", "pocket"
Random = np.random.Generator
Draw = Callable[[str, float, Random], dict]  # (size, true effect in the claim's unit, random) -> the claim as a notebook stores it


@dataclass(frozen=True)
class Truth:
    """What is true in a simulation: an effect in the claim's unit, how it is drawn, and the words that say so."""

    name: str
    effect: float
    right: tuple[str, ...]
    draw: Draw


FOUND = read_json(notebook.ROOT / "data" / "results" / "pocket" / "pocket" / "01_value_flow.json")  # the sizes of the pocket profile
# The six tasks: units of the paper's data sets and of the pocket's, and noise of one unit's score at one layer.
UNITS = {PAPER: (1000, 7, 12419, 1500, 540, 30), POCKET: tuple(FOUND["tasks"][task.name]["groups"] for task in SIX)}
NOISE = (0.12, 0.06, 0.15, 0.15, 0.20, 0.10)
LAYERS = {PAPER: 28, POCKET: 1 + FOUND["tasks"][SIX[0].name]["build_then_degrade"]["value"]["layers"][-1]}
MOST = 200  # units that are drawn; of more, the noise is made smaller by as much


def score_table(task: type, levels: dict[str, float], units: int, noise: float, random: Random) -> ScoreTable:
    """A table of one column: level of the source + what is common to an item + noise of its own."""
    drawn = min(units, MOST)
    noise *= (drawn / units) ** 0.5
    values = np.array(list(levels.values())) + 0.2 * random.normal(size=(drawn, 1)) + noise * random.normal(size=(drawn, len(levels)))
    names = [f"{task.name}-{i}" for i in range(drawn)]
    return ScoreTable(task.name, names, names, list(levels), ["score"], values[..., None])


def levels_of(task: type, size: str, curve: Sequence[float], control: float, siglip: float = 0.6) -> dict[str, float]:
    """Scores of the sources of a task; curve: of the value layers from 1 on."""
    beside = {"encoder_original": siglip, "encoder": 0.6, "projector": 0.6, "value.0": 0.6}
    controls = {"pixels": control - 0.05} if "text" not in task.__module__ else {}
    return beside | {f"value.{i + 1}": level for i, level in enumerate(curve)} | controls | {
        f"{UNTRAINED}value.{i}": control for i in (1, LAYERS[size] // 2)} | {f"{SHUFFLED}value.1": control - 0.1}


def as_task(task: type) -> SimpleNamespace:
    return SimpleNamespace(name=task.name, title=task.title, metric=task.metric, statistic=column_mean(0), statistics={},
                           parameters={})  # fmt: skip


def curve_of(size: str, builds: float, falls: float, gradual: bool = True) -> np.ndarray:
    """From layer 1 up by `builds` to the middle, down by `falls` to the last; not gradual: the ends alone differ."""
    layers = LAYERS[size] - 1
    if not gradual:
        return 0.6 - np.eye(layers)[0] * builds - np.eye(layers)[-1] * falls
    middle = layers // 2
    return 0.6 - np.concatenate([builds * np.linspace(1, 0, middle, endpoint=False), falls * np.linspace(0, 1, layers - middle)])


def of_six(claim: Callable, size: str, curve: np.ndarray | Callable, control: float, random: Random) -> dict:
    found = {}
    for task, units, noise in zip(SIX, UNITS[size], NOISE, strict=True):
        levels = curve() if callable(curve) else curve
        table = score_table(task, levels_of(task, size, levels, control), units, noise, random)
        found[task.name] = summarise(table, as_task(task), BOOT, int(random.integers(2**31)))
    return claim(found)


def draw_c1(size: str, points: float, random: Random) -> dict:
    return of_six(claim_c1, size, curve_of(size, 0, 0), 0.6 - points / 100, random)


def draw_c2(claim: Callable, size: str, points: float, random: Random) -> dict:
    return of_six(claim, size, curve_of(size, points / 100, points / 100, gradual=points > 0), 0.3, random)


def draw_jagged(claim: Callable, size: str, points: float, random: Random) -> dict:
    """Levels of layers that scatter by so many points, another way in every task, without any trend."""
    return of_six(claim, size, lambda: 0.6 + points / 100 * random.normal(size=LAYERS[size] - 1), 0.3, random)


def draw_only_falls(claim: Callable, size: str, points: float, random: Random) -> dict:
    layers = LAYERS[size] - 1
    return of_six(claim, size, 0.6 - points / 100 * np.linspace(0, 2, layers), 0.3, random)


def draw_floor(claim: Callable, size: str, points: float, random: Random) -> dict:
    return of_six(claim, size, curve_of(size, points / 100, points / 100), 0.65, random)


def draw_c4(size: str, points: float, random: Random) -> dict:
    """SigLIP ahead by so many points on three of the tasks; behind by as many, if negative."""
    chains = {}
    for place, (task, units, noise) in enumerate(zip(SIX, UNITS[size], NOISE, strict=True)):
        levels = levels_of(task, size, curve_of(size, 0, 0), 0.3, 0.6 + (points / 100 if place % 2 == 0 else 0))
        chains[task.name] = compare_along_chain(score_table(task, levels, units, noise, random), as_task(task), BOOT,
                                                int(random.integers(2**31)))  # fmt: skip
    return claim_c4(chains)


# Keys: tables of variances. 28 layers of 4 heads and 729 positions, as LLaVA-OneVision; 12 of 2 and 144.
GRIDS = {PAPER: (28, 4, 27), POCKET: (LAYERS[POCKET], 2, 12)}
LOW = 0.15  # share of the keys that vary little, where there are any


@cache
def grid(side: int) -> TokenLayout:
    """A square grid of tokens."""
    n, cells = side * side, np.stack(np.divmod(np.arange(side * side), side), axis=1)
    rects = np.concatenate([cells[:, ::-1], cells[:, ::-1] + 1], axis=1).astype(float)
    return TokenLayout(np.arange(n), rects, cells, np.zeros(n, int), np.zeros(n, bool), (side, side), {"base": (side, side)})


def key_table(size: str, low: torch.Tensor, random: Random) -> KeyTable:
    """Log-normal variances, heads of different scale; a hundredth where `low` (L, G, N)."""
    layers, heads, side = GRIDS[size]
    shape = layers, heads, side * side
    scale = np.exp(random.normal(size=(layers, heads, 1)))
    variance = torch.from_numpy(0.5 * scale * np.exp(0.5 * random.normal(size=shape))) * torch.where(low, 0.01, 1.0)
    norm = torch.from_numpy(np.broadcast_to(scale**0.5, shape).copy())
    mass = torch.full(shape, 1 / shape[-1], dtype=torch.float64)
    return KeyTable("simulated", variance, norm, mass, np.full(shape[-1], 0.2), grid(side), 1000, 200)


def low_keys(size: str, layers: int, share: float, random: Random) -> torch.Tensor:
    """(L, G, N) bool: so large a share of the keys of the last layers."""
    shape = GRIDS[size][0], GRIDS[size][1], GRIDS[size][2] ** 2
    low = torch.zeros(shape, dtype=torch.bool)
    if layers:
        low[-layers:] = torch.from_numpy(random.random((layers, *shape[1:])) < share)
    return low


def described(table: KeyTable, seed: int) -> dict:
    """What C5 and X4 read of `describe_keys`, without what is for figures."""
    modes = bimodal_layers(table.variance.log().numpy(), BOOT, seed)
    found = thresholds(table, None, modes)
    near, within = (agnostic(table, found, scale) for scale in ("near_constant", "within_heads"))
    return {"images": table.images, "modes": modes, "thresholds": found, "order": None,
            "shares": {"near_constant": shares(table, near, 20, seed)}, "sinks": {"within_heads": sinks(table, within, 20, seed)}}


def draw_c5(size: str, layers: float, random: Random) -> dict:
    found = key_table(size, low_keys(size, round(layers), LOW, random), random)
    return claim_c5(described(found, int(random.integers(2**31))))


def draw_few_images(size: str, layers: float, random: Random) -> dict:
    found = key_table(size, low_keys(size, round(layers), LOW, random), random)
    return claim_c5(described(found, 0) | {"images": 60})


def draw_x4(size: str, percent: float, random: Random) -> dict:
    """All models have keys that vary little, in the first rows; the trained one has more, or those with random weights if negative. Others follow
    from the draw of weights: up to 3 % of the keys of each model, as in `pocket-qwen` with random weights."""
    layers, _, side = GRIDS[size]
    both, seed = torch.arange(side * side) < 0.1 * side * side, int(random.integers(2**31))
    trained, *untrained = (key_table(size, both | low_keys(size, layers, (max(sign * percent, 0) + random.uniform(0, 3)) / 90, random), random)
                           for sign in (1, *[-1] * WEIGHTS))  # fmt: skip
    found = described(trained, seed)
    return claim_x4(found, compare_trained(trained, untrained, found["thresholds"], BOOT, seed))


# POPE: 3 x 3,000 questions about 500 images; 2,424 about 600 in the pocket profile. Draws of random keys as in notebook 03.
QUESTIONS = {PAPER: (500, 6), POCKET: (600, 4)}
DRAWS, CHURN = 20, 0.02  # share of the answers that a block changes to either side without any effect
LEVEL = {PAPER: 0.78, POCKET: 0.91}


@cache
def pope(size: str) -> tuple[Pope, Mme]:
    images, each = QUESTIONS[size]
    picture = Image.new("RGB", (1, 1))
    asked = [YesNoSample(f"{split}-{i}-{q}", f"i{i}", picture, f"{q} ?", ("yes", "no")[q % 2], split)
             for split in ("random", "popular", "adversarial") for i in range(images) for q in range(each)]  # fmt: skip
    pairs = [YesNoSample(f"{i}-{q}", f"m{i}", picture, f"{q} ?", ("yes", "no")[q], "count") for i in range(30) for q in range(2)]
    return Pope(asked), Mme(pairs)


def answers_of(task: Pope | Mme, right: np.ndarray) -> list[str]:
    return [sample.truth if r else {"yes": "no", "no": "yes"}[sample.truth] for sample, r in zip(task.samples, right, strict=True)]


def blocked(size: str, block: float, every: float, level: float, random: Random, draws: int = 1, apart: float = 0.0) -> tuple[dict, dict, dict]:
    """about, POPE's and MME's effects: the block adds `block` points, hiding all late keys costs `every`, the model is at `level`.
    draws of random keys, whose effects have a standard deviation of `apart` points."""
    seed = int(random.integers(2**31))

    def after(right: np.ndarray, points: float) -> np.ndarray:
        gain = max(points, 0) / 100 / max(1 - right.mean(), 1e-9) + CHURN * right.mean() / max(1 - right.mean(), 1e-9)
        lose = max(-points, 0) / 100 / right.mean() + CHURN
        return np.where(right, random.random(len(right)) >= lose, random.random(len(right)) < gain)

    found = []
    for task in pope(size):
        easy = np.clip(level + 0.5 * (1 - level) * random.normal(size=len(task.images)), 0, 1)[task.image_of]
        plain = random.random(len(task.samples)) < easy
        conditions = {NONE: plain, BLOCK: after(plain, block), EVERY: after(plain, -every)}
        for name in CONTROLS:
            for draw in range(draws if name == CONTROLS[0] else 1):
                conditions[f"{name}/{draw:02d}"] = after(plain, apart * random.normal())
        said = {name: answers_of(task, right) for name, right in conditions.items()}
        found.append(effects(task, said, BOOT, seed))
    return {"layers": list(range(18, 28)), "below": 1000, "method": "valley", "families": {BLOCK: {"keys": 1000}, EVERY: {"keys": 4000}}}, *found


def draw_c6(size: str, points: float, random: Random, every: float = 10.0, level: float | None = None) -> dict:
    return claim_c6(*blocked(size, points, every, level or LEVEL[size], random))


def draw_x2(size: str, points: float, random: Random, level: float | None = None, apart: float = 0.5) -> dict:
    """The block is better than random keys by so many points; without an effect it is one more draw of them."""
    about, found, _ = blocked(size, points + apart * random.normal(), 10.0, level or LEVEL[size], random, DRAWS, apart)
    return claim_x2(about, found)


# Prefixes: sentences of 1,500 images in RefCOCO, of 59 in the pocket profile; some 300 street scenes of night and highway, or 160.
IMAGES = {"C7a": {PAPER: 1500, POCKET: 59}, "C7b": {PAPER: 300, POCKET: 160}}
SPREAD = {"C7a": 0.015, "C7b": 0.025}  # of an image's change by a prefix


def prefixes(claim: str, size: str, correct: float, random: Random, above: float = 0.05) -> dict:
    units, layers = IMAGES[claim][size], (0, 1, 2)
    drawn = min(units, MOST)
    noise, names = SPREAD[claim] * (drawn / units) ** 0.5, [f"i{i}" for i in range(drawn)]
    families = [*CONDITIONS, UNTRAINED.rstrip(".")]
    common, sources, values = 0.3 + 0.1 * random.normal(size=drawn), [], []
    for family in families:
        level = {"correct": correct / 100, families[-1]: -above}.get(family, 0.0)
        for layer in layers:
            sources.append(f"{family}.{layer}")
            values.append(common + level + noise * random.normal(size=drawn))
    table = ScoreTable(claim, names, names, sources, ["iou"], np.stack(values, axis=1)[..., None])
    return summarise_prefixes(table, column_mean(0), BOOT, int(random.integers(2**31)))


def draw_c7(name: str, claim: Callable, size: str, points: float, random: Random, above: float = 0.05) -> dict:
    readout = {"C7a": "referring_by_class_name", "C7b": "domain_by_text"}[name]
    return claim({readout: prefixes(name, size, points, random, above)})


# Choices: the paper's Art Style has 117 items, the pocket profile 400 a subtask.
ITEMS = {PAPER: {"Art_Style": 117}, POCKET: dict.fromkeys(("Art_Style", "Visual_Similarity", "Semantic_Correspondence"), 400)}


def choice_table(subtask: str, n: int, layers: int, model: float, on_errors: float, elsewhere: float, random: Random) -> ChoiceTable:
    """The model is right with chance `model`; the best value layer with `on_errors` where it is wrong, else with `elsewhere`."""
    gold, right = random.integers(0, 2, n), random.random(n) < model
    said, sure = np.where(right, gold, 1 - gold), random.exponential(1.0, n)  # nats between the model's options
    options = np.log(np.stack([1 / (1 + np.exp(np.where(said == k, -sure, sure))) for k in (0, 1)], axis=1))
    scores = np.zeros((n, 1, layers, 2))
    for layer, depth in enumerate(np.linspace(-1, 1, layers)):
        chance = 0.5 + (1 - 0.5 * abs(depth)) * (np.where(right, elsewhere, on_errors) - 0.5)  # the middle layers know most
        answer = np.where(random.random(n) < chance, gold, 1 - gold)
        scores[np.arange(n), 0, layer, answer] = random.exponential(1.0, n)
    names = [f"{subtask}-{i}" for i in range(n)]
    return ChoiceTable(subtask, names, names, ["(A)"] * n, gold, said, options, ["style"], [f"value.{i}" for i in range(layers)], scores)


def draw_c8(size: str, percent: float, random: Random, model: float = 0.55) -> dict:
    """Value right and model wrong in so many % of the items beyond guessing."""
    on_errors = 0.5 + percent / 100 / (1 - model)
    return claim_c8({name: describe_table(choice_table(name, n, LAYERS[size], model, on_errors, 0.7, random), BOOT, int(random.integers(2**31)))
                     for name, n in ITEMS[size].items()})  # fmt: skip


def draw_x5(size: str, points: float, random: Random, model: float = 0.7) -> dict:
    """A readout that knows nothing if 0; else one that is right on errors and elsewhere alike, and worth about so many points."""
    knows = 0.5 if not points else 0.85
    return claim_x5({name: interventions(choice_table(name, n, LAYERS[size], model, knows, knows, random), BOOT, int(random.integers(2**31)))
                     for name, n in ITEMS[size].items()})  # fmt: skip


# Several models, as many as are shipped or a dozen; and settings, with the errors of a setting's 13 scores: none of ours, and those of bfloat16.
TRAININGS = {PAPER: 12, POCKET: 5}
ERRORS = {PAPER: (0.08,) * 13, POCKET: tuple(each["error"] for each in FOUND["settings"]["changes"]["precision bfloat16"].values())}


def draw_c3(size: str, r: float, random: Random) -> dict:
    x = random.normal(size=(models := TRAININGS[size]))
    return measured(across.correlation("r", x, r * x + (1 - r * r) ** 0.5 * random.normal(size=models), models))


def draw_x1(size: str, points: float, random: Random) -> dict:
    """Three families with C1, C2a and C2b, each with a standard error of 0.8 points; one of them without the effect, if `points` is 0."""
    models = {}
    for place, family in enumerate(("one", "two", "three")):
        true = {"C1": 20.0, "C2a": points if place == 2 else 4.0, "C2b": 4.0}
        found = {key: measured(part(key, _noisy(value, 0.8, random))) for key, value in true.items()}
        models[family] = {"01_value_flow": {"claims": found}}, {"01_value_flow": {"family": family}}
    return across.measure(models, load_claims())["X1"]


def draw_x6(size: str, points: float, random: Random) -> dict:
    """Thirteen scores under five settings; one of them changes by so many points."""
    changes = {f"setting {i}": {f"score {j}": part(f"{i}/{j}", _noisy(points if i == j == 0 else 0.0, error, random))
                                for j, error in enumerate(ERRORS[size])} for i in range(5)}  # fmt: skip
    return claim_x6({"layers": [4, 7], "changes": changes, "left_out": {}})


def _noisy(true: float, error: float, random: Random, units: int = 200) -> Effect:
    value = true + error * random.normal()
    return Effect(value, value - 1.97 * error, value + 1.97 * error, units, error, units)


@cache
def claims() -> dict[str, dict]:
    return {claim["id"]: claim for claim in load_claims()}


def truths(name: str, draw: Draw, opposite: bool = True, **cannot: Draw) -> list[Truth]:
    """The paper's effect, none and the opposite one of a claim; cannot: what makes it unjudgeable -> how that is drawn."""
    claim = claims()[name]
    yes, no = ("holds", "does not hold") if name.startswith("X") else ("present", "absent")
    size = float(claim["effect"] if claim["kind"] == "effect" and claim["effect"] else 2 * claim["smallest"])
    found = [Truth("the effect", size, (yes,), draw), Truth("none", 0.0, (no,), draw)]
    if opposite:
        found.append(Truth("opposite", -size, ("opposite",), draw))
    return found + [Truth(why.replace("_", " "), size, ("cannot appear here",), each) for why, each in cannot.items()]


JAGGED = "levels scatter by 2 points"  # a fault of the rule that is known, see above
SIMULATIONS: dict[str, Callable[[], list[Truth]]] = {
    "C1": lambda: truths("C1", draw_c1),
    "C2a": lambda: [*truths("C2a", partial(draw_c2, claim_c2a), floor=partial(draw_floor, claim_c2a)),
                    Truth("a curve that only falls", 4.0, ("absent", "opposite"), partial(draw_only_falls, claim_c2a)),
                    Truth(JAGGED, 2.0, ("absent",), partial(draw_jagged, claim_c2a))],
    "C2b": lambda: [*truths("C2b", partial(draw_c2, claim_c2b), floor=partial(draw_floor, claim_c2b)),
                    Truth("a curve that only falls", 4.0, ("present",), partial(draw_only_falls, claim_c2b)),
                    Truth(JAGGED, 2.0, ("absent",), partial(draw_jagged, claim_c2b))],
    "C3": lambda: [Truth(f"r = {r:g}", r, words, draw_c3) for r, words in ((0.8, ("present",)), (0.0, ("absent",)), (-0.8, ("opposite",)))],
    "C4": lambda: [Truth("ahead on 3 of 6 by 4 points", 4.0, ("present",), draw_c4), Truth("none", 0.0, ("absent",), draw_c4),
                   Truth("behind on 3 of 6", -4.0, ("opposite",), draw_c4)],
    "C5": lambda: [Truth("two modes in the last third", 0, ("present",), lambda size, _, random: draw_c5(size, GRIDS[size][0] // 3, random)),
                   Truth("none", 0, ("absent",), draw_c5), Truth("60 images", 3, ("cannot appear here",), draw_few_images)],
    "C6": lambda: truths("C6", draw_c6, ceiling=partial(draw_c6, level=0.999), no_lever=lambda size, _, random: draw_c6(size, 0.0, random, 0.2)),
    "C7a": lambda: truths("C7a", partial(draw_c7, "C7a", claim_c7a), floor=partial(draw_c7, "C7a", claim_c7a, above=0.0)),
    "C7b": lambda: truths("C7b", partial(draw_c7, "C7b", claim_c7b), floor=partial(draw_c7, "C7b", claim_c7b, above=0.0)),
    "C8": lambda: [Truth("33 % value right, model wrong", 10.8, ("present",), draw_c8), Truth("none", 0.0, ("absent",), draw_c8),
                   Truth("opposite", -20.0, ("opposite",), draw_c8), Truth("ceiling", 1.0, ("cannot appear here",), partial(draw_c8, model=0.97))],
    "X1": lambda: [*truths("X1", draw_x1, opposite=False), Truth("opposite in one family", -4.0, ("does not hold",), draw_x1)],
    "X2": lambda: truths("X2", draw_x2, ceiling=partial(draw_x2, level=0.999)),
    "X3": lambda: truths("X3", partial(draw_c7, "C7a", claim_x3), floor=partial(draw_c7, "C7a", claim_x3, above=0.0)),
    "X4": lambda: truths("X4", draw_x4),
    "X5": lambda: [Truth("the readout knows", 4.0, ("holds",), draw_x5),
                   Truth("ceiling", 4.0, ("cannot appear here",), partial(draw_x5, model=0.98)),
                   Truth("it knows nothing: choosing its weight costs", 0.0, ("does not hold", "opposite"), draw_x5)],
    "X6": lambda: [Truth("nothing changes", 0.0, ("holds",), draw_x6), Truth("one score by 1 point", 1.0, ("does not hold",), draw_x6)],
}


SLOW = {("C5", PAPER), ("X4", PAPER)}  # some seconds a run: a fifth of the runs


def runs_of(name: str, size: str, truth: Truth, runs: int) -> int:
    """Three times as many where there is no effect: it is the small rates that need them."""
    return -(-runs // 5) if (name, size) in SLOW else 3 * runs if truth.name == "none" else runs


def rates(name: str, size: str, truth: Truth, runs: int, seed: int = 0) -> tuple[dict[str, float], float]:
    """Word -> share of the runs, and the median effect that would have been found (of the task with the largest, where tasks are
    counted; NaN where nothing ever differed)."""
    words, seen = Counter(), []
    for run in range(runs):
        found = truth.draw(size, truth.effect, np.random.default_rng([seed, run, *f"{name}{size}".encode()]))
        words[judge(claims()[name], found).word] += 1
        seen.append(max((each["detectable"] or np.nan) for each in found.get("tasks", [found["primary"]])))
    return {word: words[word] / runs for word in VERDICTS if words[word]}, float(np.nanmedian(seen)) if np.isfinite(seen).any() else np.nan


def misses(name: str, truth: Truth, shares: dict[str, float], seen: float, runs: int) -> str:
    """"" where the rates are as they should be, else what is wrong. An effect is found, and its absence shown, in 80 % where the data can
    tell: where four fifths of an effect of that size would have been found (choosing a layer on half of the items costs some of it), or
    the smallest of interest. Without one at most 5 % say that there is. Both with two standard errors of so many runs."""
    slack = lambda share: 2 * (share * (1 - share) / runs) ** 0.5  # noqa: E731
    if truth.name == JAGGED:
        return ""
    false = max(shares.get(word, 0) for word in ("present", "holds")) if "present" not in truth.right and "holds" not in truth.right else 0
    if false > 0.05 + slack(0.05):
        return f"an effect that is not there in {false:.0%}"
    can_tell = seen <= (0.95 * claims()[name]["smallest"] if {"absent", "does not hold"} & {*truth.right} else 0.8 * abs(truth.effect))
    right = sum(shares.get(word, 0) for word in truth.right)
    return f"said in {right:.0%}" if right < 0.8 - slack(0.8) and (can_tell or np.isnan(seen) or "cannot appear here" in truth.right) else ""


def table(found: Sequence[tuple]) -> str:
    lines = [(name, size, truth.name, f"{sum(shares.get(word, 0) for word in truth.right):.0%}",
              ", ".join(f"{word} {share:.0%}" for word, share in shares.items()),
              "–" if np.isnan(seen) else f"{seen:.2g} ({claims()[name]['smallest']:g})") for name, size, truth, shares, seen in found]  # fmt: skip
    return report.markdown_table(("claim", "n of", "truth", "said so", "verdicts", "would find ≥ (matters from)"), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=SIMULATIONS, default=list(SIMULATIONS))
    parser.add_argument("--write", action="store_true", help=f"store the table in {TABLE.name}")
    options = parser.parse_args()
    cases = [(name, size, truth) for name in options.only for truth in SIMULATIONS[name]() for size in (PAPER, POCKET)]
    found = [(name, size, truth, *rates(name, size, truth, runs_of(name, size, truth, options.runs)))
             for name, size, truth in tqdm(cases, file=sys.stderr)]  # fmt: skip
    text = table(found)
    print(text)
    if options.write:
        about = __doc__.split("\n\n", 1)[1]
        often = (f"{options.runs} runs a line, three times as many where there is no effect (of 120 runs the standard error of a rate of 5 % is "
                 "2 points), a fifth of them for C5 and X4 at the paper's size.")
        TABLE.write_text(f"# How often the rules say what is true\n\n{about.rstrip()}\n\n{often}\n\n{text}\n", encoding="utf-8")
    wrong = [f"{name}, {size}, {truth.name}: {why}" for name, size, truth, shares, seen in found
             if (why := misses(name, truth, shares, seen, runs_of(name, size, truth, options.runs)))]  # fmt: skip
    print("\n".join(wrong) or "every line is as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
