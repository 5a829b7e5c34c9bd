"""The blocking experiment of section 3.2 and its controls (C6, X2): which keys are hidden, and what that changes.

Every condition is a `KeySelection`; "family/07" is one draw of a family of random controls. One prefill of an
image serves all conditions, and finished chunks of images are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from kvutils.answer import MAX_NEW_TOKENS, answer_all
from kvutils.errors import ParameterError
from kvutils.keys import (
    KeySelection,
    select_all,
    select_highest_variance,
    select_random,
    select_random_matched_mass,
    select_same_positions,
    selected_mass,
)
from kvutils.metrics.statistics import choosing_half
from kvutils.models import MLM
from kvutils.store import Parts, digest, in_chunks
from kvutils.tasks.key_statistics import agnostic
from kvutils.tasks.key_table import KeyTable
from kvutils.tasks.yes_no import YesNoTask, compare_answers, summarise_answers

NONE, BLOCK = "none", "input-agnostic"
CONTROLS = ("random", "random, same attention", "highest variance", "same positions, early layers")
READING = ("reading layers, input-agnostic", "reading layers, lowest variance", "reading layers, random")
FALLBACK = 0.1  # share of the keys that is blocked where none is below the threshold


def last_layers(layers: int) -> tuple[int, ...]:
    """The last third, rounded up: the last 10 of 28, as in the paper."""
    return tuple(range(layers - -(-layers // 3), layers))


def select_lowest(table: KeyTable, share: float, layers: Sequence[int]) -> KeySelection:
    """The given share (0..1) of the keys of each layer, those that vary least; newlines are never among them."""
    if not 0 < share <= 1:
        raise ParameterError(f"share must be above 0 and at most 1, not {share}")
    layers = tuple(layers)
    mask = torch.zeros(len(layers), *table.variance.shape[1:], dtype=torch.bool)
    for row, layer in enumerate(layers):
        values = table.variance[layer].masked_fill(~table.real, torch.inf).flatten()
        count = max(1, round(share * int(table.real.sum()) * table.variance.shape[1]))
        mask[row].view(-1)[values.argsort(stable=True)[:count]] = True
    return KeySelection(f"lowest {share:g}", mask, layers)


def conditions(
    table: KeyTable, thresholds: dict, reading: Sequence[int], *, layers: Sequence[int] | None = None,
    scale: str = "raw", draws: int = 20, reading_draws: int = 5, seed: int = 0,
) -> tuple[dict[str, KeySelection | None], dict]:  # fmt: skip
    """(name -> selection, what they are) of the experiment: no block, the block, every control.

    layers: where keys are blocked (default `last_layers`). thresholds, scale: as in `agnostic`; where no key of
    these layers is below the threshold, the `FALLBACK` share of each layer that varies least is blocked instead,
    and `method` says so. reading: as many layers where the image is read, from `reading_layers`. Controls: random
    keys, as many in each layer and head; random keys that receive as much attention; the keys that vary most; the
    same positions in the first layers; in the reading layers the keys below the threshold, and as many lowest and
    random ones (`reading_draws`) as the block has. "all keys" of the layers bounds what any block of them
    can do. about: JSON-able.
    """
    total = len(table.variance)
    layers = last_layers(total) if layers is None else tuple(layers)
    reading, early = tuple(reading), tuple(range(len(layers)))
    if min(draws, reading_draws) < 1 or len(reading) != len(layers):
        raise ParameterError(f"expected draws from 1 and {len(layers)} reading layers, found {draws}, "
                             f"{reading_draws}, {reading}")  # fmt: skip
    newline = table.is_newline
    every = KeySelection(BLOCK, agnostic(table, thresholds, scale), tuple(range(total)))
    block, method = every.restrict(layers), f"{scale} threshold"
    if not block.mask.any():
        block = replace(select_lowest(table, FALLBACK, layers), name=BLOCK)
        method = f"no key below the {scale} threshold: lowest {FALLBACK:g} of each layer"
    here, there = list(layers), list(reading)
    like = select_same_positions(block, reading)
    # The keys that vary least are those of which minus the variance is highest.
    lowest = select_highest_variance(like, -table.variance[sorted(there)], newline)
    found: dict[str, KeySelection | None] = {NONE: None, BLOCK: block}
    for draw in range(draws):
        found[f"{CONTROLS[0]}/{draw:02d}"] = select_random(block, newline, seed + draw)
    for draw in range(draws):
        matched = select_random_matched_mass(block, table.mass[here], newline, seed + draw)
        found[f"{CONTROLS[1]}/{draw:02d}"] = matched
    found[CONTROLS[2]] = select_highest_variance(block, table.variance[here], newline)
    found[CONTROLS[3]] = select_same_positions(block, early)
    found[READING[0]] = every.restrict(reading)
    found[READING[1]] = replace(lowest, name=READING[1])
    for draw in range(reading_draws):
        found[f"{READING[2]}/{draw:02d}"] = select_random(like, newline, seed + draw)
    found["all keys"] = select_all(layers, table.variance.shape[1], len(table.real))
    about = {
        "layers": list(layers), "reading": list(reading), "early": list(early), "scale": scale, "method": method,
        "draws": draws, "reading_draws": reading_draws, "seed": seed, "count": block.count.tolist(),
        "share": float(block.mask.sum() / (len(layers) * table.variance.shape[1] * table.real.sum())),
        "families": {name: _about(each, table) for name, each in _by_family(found).items()},
    }  # fmt: skip
    return found, about


def _about(selections: Sequence[KeySelection], table: KeyTable) -> dict:
    """Keys of a selection, and the share of its text's attention they receive, mean over layers and heads."""
    masses = [selected_mass(each, table.mass[list(each.layers)]).mean() for each in selections]
    return {"keys": float(np.mean([int(each.mask.sum()) for each in selections])), "draws": len(selections),
            "layers": list(selections[0].layers), "mass": float(np.mean(masses))}  # fmt: skip


def family(name: str) -> str:
    """"random/07" is one of the family "random"."""
    return name.split("/")[0]


def _by_family(found: Mapping[str, object]) -> dict[str, list]:
    """Family -> its members, without the plain condition."""
    families: dict[str, list] = {}
    for name, each in found.items():
        if name != NONE:
            families.setdefault(family(name), []).append(each)
    return families


def ask_under_blocks(
    task: YesNoTask,
    mlm: MLM,
    blocks: Mapping[str, KeySelection | None],
    parts: Parts | None = None,
    *,
    queries: str = "after",
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
    chunk: int = 48,
    progress: bool = True,
) -> dict[str, list[str]]:
    """Condition -> one answer text per question of the task, in its order; other arguments as in `answer_all`.

    Questions with the same wording about one image are asked once. With `parts`, finished chunks of images are
    kept under their questions and blocks, and a run that was stopped goes on.
    """
    asked: dict[str, dict[str, None]] = {}
    first = {}
    for sample in task.samples:
        asked.setdefault(sample.image_id, {})[sample.question] = None
        first.setdefault(sample.image_id, sample)
    about = [mlm.name, task.name, queries, mlm.base_view_only, mlm.max_pixels, max_new_tokens,
             {name: _digest(block) for name, block in blocks.items()}]  # fmt: skip
    replies: dict[tuple[str, str, str], str] = {}
    items = [(name, list(questions)) for name, questions in asked.items()]

    def compute(some: list[tuple[str, list[str]]]) -> dict[str, list[list[str]]]:
        samples = [(name, first[name].image, questions) for name, questions in some]
        found: dict[str, list[list[str]]] = {name: [] for name in blocks}
        for _, answers in answer_all(
            mlm, samples, blocks, max_new_tokens=max_new_tokens, queries=queries, batch_size=batch_size, progress=progress,
        ):  # fmt: skip
            for name, each in answers.items():
                found[name].append([answer.text for answer in each])
        return found

    chunks = in_chunks(parts, f"blocked/{task.name}", items, compute, chunk, about, of=list, unit="image", progress=progress)
    for number, found in enumerate(chunks):
        some = items[number * chunk : (number + 1) * chunk]
        for condition, rows in found.items():
            for (image, questions), texts in zip(some, rows, strict=True):
                replies |= {(condition, image, q): text for q, text in zip(questions, texts, strict=True)}
    return {name: [replies[name, s.image_id, s.question] for s in task.samples] for name in blocks}


def _digest(block: KeySelection | None) -> str:
    """Of what is blocked, not of its name."""
    if block is None:
        return ""
    return digest([list(block.layers), block.mask.int().tolist()])


def effects(task: YesNoTask, answers: Mapping[str, Sequence[str]], n_boot: int = 2000, seed: int = 0) -> dict:
    """What every family of conditions changes, and how the block differs from each; JSON-able.

    plain: scores without a block. families: `compare_answers` of the family (its draws together) with no block;
    draws: the headline difference of each draw. versus: block minus family. as_large: share of a family's draws
    that change the headline at least as much as the block, upwards. Intervals are over images, not draws.
    """
    sets = _by_family(answers)
    families, versus = {}, {}
    for name, texts in sets.items():
        found = compare_answers(task, texts, answers[NONE], n_boot, seed)
        if len(texts) > 1:
            found["draws"] = [_headline(task, each, answers[NONE]) for each in texts]
        families[name] = found
    mine = families[BLOCK]["headline"]["mean"]
    for name, texts in sets.items():
        if name != BLOCK:
            versus[name] = compare_answers(task, answers[BLOCK], texts, n_boot, seed)["headline"]
        if len(texts) > 1:
            versus[name]["as_large"] = float(np.mean(np.array(families[name]["draws"]) >= mine))
    return {"plain": summarise_answers(task, answers[NONE], n_boot, seed), "families": families, "versus": versus}


def _headline(task: YesNoTask, answers: Sequence[str], baseline: Sequence[str]) -> float:
    return compare_answers(task, answers, baseline, n_boot=2)["headline"]["mean"]


def power_statement(found: Mapping, wanted: float) -> dict:
    """Would a true effect of `wanted` (in the headline's unit) show with probability 0.8? From measured effects.

    detectable: by family, None where no answer changed. largest: of the families that block as many keys. A family
    that changes more answers is noisier, so the largest is the careful figure.
    """
    sizes = {name: each["headline"]["detectable"] for name, each in found["families"].items()}
    matched = [sizes[name] for name in (BLOCK, *CONTROLS) if sizes.get(name) is not None]
    largest = max(matched) if matched else None
    return {"wanted": wanted, "power": 0.8, "detectable": sizes, "largest": largest,
            "enough": None if largest is None else largest <= wanted}  # fmt: skip


def sweep(
    task: YesNoTask,
    mlm: MLM,
    table: KeyTable,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.35, 0.5),
    depths: Sequence[int] | None = None,
    parts: Parts | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    **options,
) -> dict:
    """Share of keys (lowest variance of each layer) x number of last layers: chosen on one half, reported on the other.

    grid[i][j]: effect on the headline for shares[i] and depths[j], on the choosing half of the images; held_out:
    the effect of the best cell on the other half. options: those of `ask_under_blocks`.
    """
    total = len(table.variance)
    depths = _depths(total) if depths is None else list(depths)
    if not all(1 <= depth <= total for depth in depths):
        raise ParameterError(f"depths must be between 1 and {total} layers, found {depths}")
    chosen = choosing_half([s.image_id for s in task.samples], seed)
    halves = [type(task)([s for s, c in zip(task.samples, chosen, strict=True) if c == side]) for side in (True, False)]
    cells = {
        f"{share:g} {depth}": select_lowest(table, share, range(total - depth, total))
        for share in shares for depth in depths
    }  # fmt: skip
    answers = ask_under_blocks(halves[0], mlm, {NONE: None} | cells, parts, **options)
    grid = [
        [compare_answers(halves[0], answers[f"{share:g} {depth}"], answers[NONE], n_boot, seed)["headline"]
         for depth in depths]
        for share in shares
    ]  # fmt: skip
    place = int(np.argmax([[cell["mean"] for cell in row] for row in grid]))
    share, depth = shares[place // len(depths)], depths[place % len(depths)]
    best = f"{share:g} {depth}"
    again = ask_under_blocks(halves[1], mlm, {NONE: None, best: cells[best]}, parts, **options)
    held_out = compare_answers(halves[1], again[best], again[NONE], n_boot, seed)
    return {
        "metric": ".".join(task.metric), "shares": list(shares), "depths": list(depths), "grid": grid,
        "best": {"share": share, "depth": depth}, "held_out": held_out["headline"], "held_out_scores": held_out,
        "images": [len(half.images) for half in halves],
    }  # fmt: skip


def _depths(total: int) -> list[int]:
    return sorted({1, len(last_layers(total)), -(-total // 2), -(-2 * total // 3), total})
