"""The blocking experiment of section 3.2 and its controls (C6, X2): which keys are hidden, and what that changes. Every condition is a
`KeySelection`; "family/07" is one draw of a family of random controls. One prefill of an image serves all conditions."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from kvutils.answer import YES_NO, answer_all
from kvutils.errors import ParameterError, at_least
from kvutils.keys import KeySelection
from kvutils.metrics.effects import lever, measured, no_ceiling, part, prerequisite
from kvutils.metrics.layers import choosing_half
from kvutils.metrics.statistics import Effect
from kvutils.models import MLM
from kvutils.readout import selections as keys
from kvutils.store import Parts, digest, in_chunks, to_json
from kvutils.tasks.key_statistics import agnostic
from kvutils.tasks.key_table import KeyTable
from kvutils.tasks.yes_no import Answers, Scored, YesNoTask

NONE, BLOCK, EVERY = "none", "input-agnostic", "all keys"
CONTROLS = ("random", "random, same attention", "highest variance", "same positions, early layers")
READING = ("reading layers, input-agnostic", "reading layers, lowest variance", "reading layers, random")
FALLBACK = 0.1  # share of the keys that is blocked where none is below the threshold
READING_DRAWS = 5  # of random keys in the reading layers
PAPER_F1 = 78.1  # of POPE, without a block


def last_layers(layers: int) -> tuple[int, ...]:
    """The last ten, as in the paper; of a model of up to 20 layers the last third, rounded up."""
    return tuple(range(layers - (10 if layers > 20 else -(-layers // 3)), layers))


def conditions(table: KeyTable, threshold: Mapping, reading: Sequence[int], layers: Sequence[int] | None = None, draws: int = 20,
               seed: int = 0) -> tuple[dict[str, KeySelection | None], dict]:  # fmt: skip
    """(name -> selection, what they are) of the experiment: no block, the block, every control.

    layers: where keys are blocked (default `last_layers`). threshold: of `variance_threshold`; where no key of these layers is below it,
    the `FALLBACK` share of each layer that varies least is blocked instead, and `method` says so. reading: as many layers where the image
    is read. Controls: random keys, as many in each layer and head; those that receive as much attention; the keys that vary most; the same
    positions in the first layers; in the reading layers the keys below the threshold, and as many lowest and random ones as the block has;
    "all keys" of the layers. about: JSON-able; `below`: how many keys of these layers are below
    the paper's threshold or one between two modes, 0 where there is neither or layer 0 alone makes the second mode."""
    at_least("draws", draws)
    total, heads, tokens = table.variance.shape
    layers = last_layers(total) if layers is None else tuple(layers)
    reading, real = tuple(reading), table.real
    if len(reading) != len(layers):
        raise ParameterError(f"expected {len(layers)} reading layers, as many as are blocked, found {reading}")
    every = KeySelection(BLOCK, agnostic(table, {"raw": threshold}), tuple(range(total)))
    block, method = every.restrict(layers), "raw threshold"
    # The shorter keys of layer 0, which no attention has reached, make a valley that tells nothing about the others.
    apart = threshold["method"] == "paper" or threshold["method"] == "valley" and keys.variance_threshold(table.variance[1:][..., real])["two_modes"]
    below = int(block.mask.sum()) if apart else 0
    if not block.mask.any():
        block = replace(keys.select_lowest(table.variance, real, FALLBACK, layers), name=BLOCK)
        method = f"no key below the raw threshold: lowest {FALLBACK:g} of each layer"
    variance, mass = table.variance[list(layers)], table.mass[list(layers)]
    like = keys.select_same_positions(block, reading)
    found: dict[str, KeySelection | None] = {NONE: None, BLOCK: block}
    seed *= 1000  # two seeds have no draw in common
    found |= {f"{CONTROLS[0]}/{draw:02d}": keys.select_random(block, real, seed + draw) for draw in range(draws)}
    found |= {f"{CONTROLS[1]}/{draw:02d}": keys.select_random_matched_mass(block, mass, real, seed + draw) for draw in range(draws)}
    found[CONTROLS[2]] = keys.select_highest(block, variance, real)
    found[CONTROLS[3]] = keys.select_same_positions(block, range(len(layers)))
    found[READING[0]] = every.restrict(reading)
    # The keys that vary least are those of which minus the variance is highest.
    found[READING[1]] = replace(keys.select_highest(like, -table.variance[sorted(reading)], real), name=READING[1])
    found |= {f"{READING[2]}/{draw:02d}": keys.select_random(like, real, seed + draw) for draw in range(READING_DRAWS)}
    found[EVERY] = keys.select_all(layers, heads, tokens)
    share = float(block.mask.sum() / (len(layers) * heads * real.sum()))
    families = {}
    for name, each in _by_family(found).items():  # mass: the share of its text's attention that they receive, mean over layers and heads
        masses = [keys.selected_mass(one, table.mass[list(one.layers)]).mean() for one in each]
        families[name] = {"keys": float(np.mean([int(one.mask.sum()) for one in each])), "draws": len(each),
                          "layers": list(each[0].layers), "mass": float(np.mean(masses))}  # fmt: skip
    return found, {"layers": list(layers), "method": method, "below": below, "share": share, "families": families}


def _by_family(found: Mapping[str, object]) -> dict[str, list]:
    """Family ("random" of "random/07") -> its members, without the plain condition."""
    families: dict[str, list] = {}
    for name, each in found.items():
        if name != NONE:
            families.setdefault(name.split("/")[0], []).append(each)
    return families


def ask_under_blocks(task: YesNoTask, mlm: MLM, blocks: Mapping[str, KeySelection | None], parts: Parts | None = None, *, batch_size: int = 16,
                     chunk: int = 48, progress: bool = True) -> Answers:  # fmt: skip
    """What the model says to every question of the task under every condition. batch_size as in `answer_all`. Questions with the same
    wording about one image are asked once. With `parts`, finished chunks of images are kept under their questions and blocks."""
    first, asked = {}, {}
    for sample in task.samples:
        first.setdefault(sample.image_id, sample)
        asked.setdefault(sample.image_id, {})[sample.question] = None
    # Images that are asked about as much stand side by side: little padding.
    items = sorted(((image, list(questions)) for image, questions in asked.items()), key=lambda item: len(" ".join(item[1]).split()))
    order = sorted(blocks)  # a part does not depend on the order of the blocks

    def compute(some: list[tuple[str, list[str]]]) -> dict[str, torch.Tensor]:
        """mass and text (blocks, questions) of these images, the latter as places in words; as JSON they would be slow to keep."""
        samples = [(image, first[image].image, questions) for image, questions in some]
        found = list(answer_all(mlm, samples, blocks, options=YES_NO, batch_size=batch_size, progress=progress))
        said = [[each for _, answers in found for each in answers[name]] for name in order]
        words = {text: place for place, text in enumerate(dict.fromkeys(each.text for row in said for each in row))}
        return {"mass": torch.tensor([[each.mass for each in row] for row in said], dtype=torch.float64),
                "text": torch.tensor([[words[each.text] for each in row] for row in said]),
                "words": torch.tensor(list(to_json(list(words), indent=None).encode()), dtype=torch.uint8)}  # fmt: skip

    # Of what is blocked, not of its name.
    blocked = {name: "" if each is None else digest([each.layers, np.packbits(each.mask.cpu()).tobytes().hex()]) for name, each in blocks.items()}
    depends = [mlm.settings, blocked]
    chunks = list(in_chunks(parts, f"blocked/{task.name}", items, compute, chunk, depends, unit="image", progress=progress,
                            of=lambda item: [*item, first[item[0]].size]))  # fmt: skip
    pairs = {pair: place for place, pair in enumerate((image, question) for image, questions in items for question in questions)}
    places = [pairs[sample.image_id, sample.question] for sample in task.samples]
    words = [np.array(json.loads(bytes(each["words"].tolist())), dtype=object) for each in chunks]
    texts = np.concatenate([own[each["text"].numpy()] for own, each in zip(words, chunks, strict=True)], axis=1)[:, places]
    mass = np.concatenate([each["mass"].numpy() for each in chunks], axis=1)[:, places]
    rows = {name: order.index(name) for name in blocks}
    return Answers(task, {name: texts[row].tolist() for name, row in rows.items()}, {name: mass[row] for name, row in rows.items()})


def effects(task: YesNoTask, answers: Mapping[str, Sequence[str]], n_boot: int = 2000, seed: int = 0) -> dict:
    """What every family of conditions changes, and how the block differs from each, from one set of resamples; JSON-able. plain: scores
    without a block. families: `Scored.change` of the family (its draws together) against no block, with the headline difference of each of
    its `draws`. versus: block minus family, judged as one more of its draws; `as_large`: share of a family's draws that change the headline
    at least as much as the block, upwards. smallest: effect of interest of the headline."""
    scored = Scored.of(task, answers, n_boot, seed)
    sets, versus = _by_family({name: name for name in answers}), {}
    families = {name: scored.change(members, [NONE]) for name, members in sets.items()}
    for name, members in sets.items():
        if name != BLOCK:
            versus[name] = scored.change([BLOCK], members)["headline"]
        if len(members) > 1:
            draws = families[name]["draws"] = [scored.headline(each) - scored.headline(NONE) for each in members]
            versus[name]["as_large"] = float(np.mean(np.array(draws) >= families[BLOCK]["headline"]["mean"]))
    return {"plain": scored.summary(NONE), "families": families, "versus": versus, "smallest": task.smallest}


def claim_c6(about: Mapping, pope: Mapping, mme: Mapping) -> dict:
    """C6: blocked minus unblocked on POPE, F1 points; MME beside. about: of `conditions`; pope, mme: of `effects`."""
    blocked, every = (_points(found["headline"]) for found in (pope["families"][BLOCK], pope["families"][EVERY]))
    beside = [part("POPE F1, all late image keys hidden minus none", every)]
    for metric, name in (("accuracy", "accuracy"), ("yes_ratio", "share of yes")):
        beside.append(part(f"POPE {name}, blocked minus unblocked", _points(pope["families"][BLOCK]["scores"]["mean"][metric]), unit="points"))
    for family, name in ((BLOCK, "blocked minus unblocked"), (EVERY, "all late image keys hidden minus none")):
        effect = Effect.of(mme["families"][family]["headline"])
        beside.append(part(f"MME score, {name}", effect, unit="score points", smallest=mme["smallest"]))
    effect, turned = Effect.of(mme["families"][BLOCK]["headline"]), pope["families"][EVERY]["changed"]
    seen = "no answer changed" if math.isnan(effect.detectable) else f"{effect.detectable:.1f} or more would have been found"
    hidden, late = (about["families"][name]["keys"] for name in (BLOCK, EVERY))
    note = (f"The block hides {hidden:,.0f} of {late:,.0f} late image keys. F1 is {100 * pope['plain']['headline']['mean']:.1f} without it (paper: {PAPER_F1}) "
            f"and changes by {blocked.mean:+.2f} with it, by {every.mean:+.2f} with every image key of these layers hidden, which turns "
            f"{turned['now_right']:.1%} of the questions right and {turned['now_wrong']:.1%} wrong. MME's total of at most {100 * mme['smallest']:g} changes "
            f"by {effect.mean:+.1f} ({seen}; 1 % of the total, {mme['smallest']:g}, would matter: ours, the paper states no figure).")  # fmt: skip
    return measured(part("POPE F1, blocked minus unblocked", blocked), beside, _needs(about, pope), note)


def claim_x2(about: Mapping, pope: Mapping) -> dict:
    """X2: effect of the block on POPE minus that of as many random keys, F1 points, draws as units; the other controls beside."""
    units = pope["plain"]["images"]  # the intervals' degrees of freedom count draws as well
    parts = [part(f"POPE F1, block minus {name}", _points(pope["versus"][name]), units=units) for name in CONTROLS]
    chances = [f"{pope['versus'][name]['as_large']:.0%} ({name})" for name in CONTROLS[:2] if "as_large" in pope["versus"][name]]
    note = f"F1 changes as favourably as with the block, or more so, in so many draws of other keys: {', '.join(chances) or 'one draw tells none'}."
    return measured(parts[0], parts[1:], _needs(about, pope), note)


def _points(found: Mapping) -> Effect:
    return Effect.of(found).scaled(100)


def _needs(about: Mapping, pope: Mapping) -> list[dict]:
    """What C6 and X2 need: keys to hide, layers in which the image is read, and errors."""
    smallest, room = 100 * pope["smallest"], 100 * (1 - pope["plain"]["headline"]["mean"])
    limit = f"{'' if room >= smallest else 'ceiling: '}F1 could rise by {room:.1f} points, {smallest:g} would matter"
    layers = f"layers {min(about['layers'])}-{max(about['layers'])}"
    every, own = (_points(pope["families"][name]["headline"]) for name in (EVERY, BLOCK))
    below = f"{about['below']} of {about['families'][EVERY]['keys']:,.0f} image keys of {layers} are set apart by their variance (by the paper's " \
            f"threshold for its model, else a gap between two modes that is there without layer 0 too); the block hides {about['families'][BLOCK]['keys']:,.0f}"
    return [prerequisite("keys that stand apart", about["below"] > 0, below),
            lever(f"hiding every image key of {layers}", every, own, smallest, "F1 points"),
            no_ceiling("POPE", pope["plain"]["errors"]), prerequisite("POPE: room for the effect", room >= smallest, limit)]


def sweep_cells(layers: int, shares: Sequence[float] = (0.05, 0.1, 0.2, 0.35, 0.5)) -> dict[str, tuple[float, int]]:
    """Name -> share of keys (lowest variance of each layer), and in how many last layers: 1, a third, half, two thirds, all."""
    depths = sorted({1, len(last_layers(layers)), -(-layers // 2), -(-2 * layers // 3), layers})
    return {f"lowest {share:g}, last {depth} layers": (share, depth) for share in shares for depth in depths}


def ask_sweep(task: YesNoTask, mlm: MLM, table: KeyTable, blocks: Mapping[str, KeySelection | None], parts: Parts | None = None, seed: int = 0,
              **options) -> tuple[Answers, Answers, Answers]:  # fmt: skip
    """Answers under `blocks`; under every cell of the sweep on one half of the images; and under the cell that is best there on the other:
    all cells on both would double the notebook's longest measurement. Each image is read once. options: those of `ask_under_blocks`."""
    total, chosen = len(table.variance), choosing_half([s.image_id for s in task.samples], seed)
    halves = [type(task)([s for s, c in zip(task.samples, chosen, strict=True) if c == side]) for side in (True, False)]
    cells = {name: keys.select_lowest(table.variance, table.real, share, range(total - depth, total))
             for name, (share, depth) in sweep_cells(total).items()}  # fmt: skip
    first = ask_under_blocks(halves[0], mlm, {**blocks, **cells}, parts, **options)
    sweep = first.under([NONE, *cells])
    best = _best(Scored.of(sweep.task, sweep.texts, 1, seed), cells)
    second = ask_under_blocks(halves[1], mlm, {**blocks, best: cells[best]}, parts, **options)
    order = np.argsort(~chosen, kind="stable").argsort()  # where each question is among those of both halves
    texts = {name: np.array([*first.texts[name], *second.texts[name]], dtype=object)[order].tolist() for name in blocks}
    mass = {name: np.concatenate([first.mass[name], second.mass[name]])[order] for name in blocks}
    return Answers(task, texts, mass), sweep, second.under([NONE, best])


def _best(scored: Scored, cells: Iterable[str]) -> str:
    return max(cells, key=lambda cell: scored.headline(cell) - scored.headline(NONE))


def sweep(choosing: Answers, held_out: Answers, layers: int, n_boot: int = 2000, seed: int = 0) -> dict:
    """What `ask_sweep` of a model of so many layers has found; JSON-able. grid[i][j]: effect on the headline for shares[i] and depths[j],
    on the choosing half of the images; held_out: the effect of the best cell on the other half."""
    scored, cells = Scored.of(choosing.task, choosing.texts, n_boot, seed), sweep_cells(layers)
    headlines = [scored.change([cell], [NONE])["headline"] for cell in cells]
    (shares, depths), best = (list(dict.fromkeys(each)) for each in zip(*cells.values(), strict=True)), _best(scored, cells)
    grid = [headlines[row * len(depths) : (row + 1) * len(depths)] for row in range(len(shares))]
    effect = Scored.of(held_out.task, held_out.texts, n_boot, seed).change([best], [NONE])["headline"]
    images = [len(each.task.images) for each in (choosing, held_out)]
    return {"shares": shares, "depths": depths, "grid": grid, "held_out": effect, "images": images,
            "best": dict(zip(("share", "depth"), cells[best], strict=True))}  # fmt: skip
