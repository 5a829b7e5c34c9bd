"""How well the pocket model answers on held-out scenes, beside the blind baseline:
`PYTHONPATH=data/pocket python -m recipe.evaluate`.

Blind: the same questions to the same model with every image replaced by that of another sample. In view: who names the class or colour of any
thing in view, whatever is asked, is far above blind as well; only a model above that looks the right thing up.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from kvutils.checkpoints import MODELS
from kvutils.datasets.pocket import questions as q
from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.datasets.pocket.world import COLOURS
from kvutils.metrics.statistics import bootstrap_ci
from recipe.families import FAMILIES
from recipe.model import answer_logits
from recipe.packing import ImageTokens, Packed, pack, pixel_batch
from recipe.pool import Pool, make_pool
from recipe.samples import PLAIN, Sample, Sampler

SEVERAL = ("letter", "part", "correspondence", "style_match", "class_match")
GATES = {"existence": (0.80, 0.97)}  # at least, and below: between chance and ceiling
ABOVE_BLIND = ("existence", "class", "colour", "position")  # clearly above blind and the most frequent answer; others are in no gate
IN_VIEW = {"class": 0, "hop_class": 0, "hop_match": 0, "colour": 1, "hop_colour": 1}  # kinds that ask for a thing's class (0) or colour (1)
UNTRAINED = ("style_match",)  # styles are named in training, never compared


def block_right(packed: Packed, logits: torch.Tensor) -> list[tuple[int, int, bool]]:
    """(sequence, block index, right): right when every answer token is the most likely one, greedily, given the true
    tokens before it (for the one-word answers this is what generation gives)."""
    where = packed.labels >= 0
    right = (logits.argmax(-1) == packed.labels[where]).cpu()
    row, block = where.nonzero()[:, 0].cpu(), packed.block[where].cpu()
    verdict: dict[tuple[int, int], bool] = {}
    for r, b, ok in zip(row.tolist(), block.tolist(), right.tolist(), strict=True):
        verdict[r, b - 1] = verdict.get((r, b - 1), True) and ok
    return [(r, b, ok) for (r, b), ok in verdict.items()]


@torch.no_grad()
def answer_blocks(mlm, samples: list[Sample], embed: Callable, image: ImageTokens, batch: int = 50) -> list[list[bool]]:
    """Right or wrong, per sample and block. `embed(images)` gives the image embeddings (n, slots, hidden)."""
    device = next(mlm.parameters()).device
    out = [[False] * len(sample.blocks) for sample in samples]
    for first in range(0, len(samples), batch):
        packed = pack(samples[first : first + batch], image).to(device)
        logits = answer_logits(mlm, packed, embed(packed.images))
        for row, block, ok in block_right(packed, logits):
            out[first + row][block] = ok
    return out


def quick_accuracy(mlm, sampler: Sampler, embed: Callable, image: ImageTokens, kinds: Iterable[str], scenes: int = 150,
                   seed: int = 5) -> dict[str, float]:  # fmt: skip
    """Accuracy per question kind on a few held-out scenes, to watch training (in training precision). Where several
    processes train, each answers its share."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    right = defaultdict(list)
    for kind in kinds:
        samples = sampler.draw(kind, scenes, np.random.default_rng(seed))[rank::ranks]
        for sample, found in zip(samples, answer_blocks(mlm, samples, embed, image), strict=True):
            for (name, _, _), ok in zip(sample.blocks, found, strict=True):
                if name not in ("list_colours", "list_sides"):  # in any order: no token is the right one
                    right[name].append(ok)
    shares = [right]
    if ranks > 1:
        dist.all_gather_object(shares := [None] * ranks, dict(right))
    right = {name: [ok for share in shares for ok in share.get(name, ())] for name in set().union(*shares)}
    return {name: float(np.mean(found)) for name, found in sorted(right.items())}


def balanced_samples(pool: Pool, kind: str, count: int, seed: int) -> list[Sample]:
    """At least `count` questions of a kind if the scenes allow so many, answers balanced; one question per sample."""
    if kind in q.KINDS:
        found = q.balanced_questions([pool.facts(row) for row in range(len(pool))], kind, count, seed)
        return [Sample([(row, PLAIN)], [(kind, question, answer)]) for row, question, answer in found]
    rng = np.random.default_rng((seed, len(kind), sum(map(ord, kind))))
    by_answer: dict[str, list[Sample]] = defaultdict(list)
    step = "marked" if kind in ("letter", "part") else kind
    for sample in Sampler(pool).draw(step, (5 if kind == "part" else 2) * count, rng, hints=False):
        block = sample.blocks[int(rng.integers(len(sample.blocks)))]
        if block[0] == kind:
            by_answer[block[2]].append(replace(sample, blocks=[block]))
    return q.evenly(by_answer, count)


def _packed_by_scene(samples: list[Sample]) -> tuple[list[Sample], list[tuple[int, int]]]:
    """Questions about one scene behind one image; where each question went (sample, block)."""
    merged: dict[str, Sample] = {}
    number: dict[str, int] = {}
    where = []
    for sample in samples:
        key = str(sample.images)
        if key not in merged:
            number[key] = len(merged)
            merged[key] = replace(sample, blocks=[])
        merged[key].blocks.extend(sample.blocks)
        where.append((number[key], len(merged[key].blocks) - 1))
    return list(merged.values()), where


def answers_right(mlm, samples: list[Sample], embed: Callable, image: ImageTokens, progress: bool = False, name: str = "") -> np.ndarray:
    """(n,) right or wrong of samples with one question each, through one image pass per scene."""
    packed, where = _packed_by_scene(samples)
    found: list[list[bool]] = []
    bar = tqdm(total=len(packed), desc=name, unit="image", disable=not progress)
    for first in range(0, len(packed), 40):
        found += answer_blocks(mlm, packed[first : first + 40], embed, image)
        bar.update(len(packed[first : first + 40]))
    bar.close()
    return np.array([found[sample][block] for sample, block in where], dtype=float)


def in_view(kind: str, facts: q.Facts, question: str, answer: str) -> float:
    """How often the class or colour of a random thing in view is the answer; of kinds in two steps, of one that the question does not name."""
    names = [(CLASSES, COLOURS)[IN_VIEW[kind]][thing[IN_VIEW[kind]]] for thing in facts.present
             if not kind.startswith("hop") or CLASSES[thing[0]] not in question.split()]  # fmt: skip
    return names.count(answer) / len(names)


def evaluate(mlm, family, pool: Pool, count: int = 500, seed: int = 11, progress: bool = True) -> dict[str, dict]:
    """Per question kind: n, scenes, accuracy and blind accuracy with 95 % intervals over scenes, share of the most frequent answer; of
    `IN_VIEW` also what naming any thing in view would give."""
    device = next(mlm.parameters()).device
    mlm.eval()

    def embed(images):
        return family.tokens(mlm, family.features(mlm, pixel_batch(pool, images).to(device)))

    samples = {kind: balanced_samples(pool, kind, count, seed) for kind in (*q.KINDS, *SEVERAL)}
    report = {}
    for name, kinds in {"one image": tuple(q.KINDS), **{kind: (kind,) for kind in SEVERAL}}.items():
        asked = [sample for kind in kinds for sample in samples[kind]]
        seen = answers_right(mlm, asked, embed, family.full, progress, name)
        blind = answers_right(mlm, _other_images(asked, seed), embed, family.full, progress, f"{name}, blind")
        first = 0
        for kind in kinds:
            here = slice(first, first + len(samples[kind]))
            first = here.stop
            scenes = [str(sample.images) for sample in samples[kind]]
            answers = Counter(sample.blocks[0][2] for sample in samples[kind])
            report[kind] = {
                "n": len(scenes),
                "scenes": len(set(scenes)),
                "answers": len(answers),
                "majority": max(answers.values()) / len(scenes),
                "accuracy": bootstrap_ci(seen[here], groups=scenes, seed=seed).as_dict(),
                "blind": bootstrap_ci(blind[here], groups=scenes, seed=seed).as_dict(),
            }
            if kind in IN_VIEW:
                report[kind]["in_view"] = float(np.mean([in_view(kind, pool.facts(one.images[0][0]), *one.blocks[0][1:]) for one in samples[kind]]))
    return report


def _other_images(samples: list[Sample], seed: int) -> list[Sample]:
    """Every scene's images replaced by another scene's (a random cycle), the questions kept."""
    pictures = {str(s.images): s.images for s in samples}
    names = sorted(pictures)
    order = np.random.default_rng(seed).permutation(len(names))
    swapped = {names[a]: pictures[names[b]] for a, b in zip(order, np.roll(order, 1), strict=True)}
    return [replace(s, images=swapped[str(s.images)]) for s in samples]


def above_blind(found: dict) -> bool:
    """Whether the interval of a kind's accuracy lies above that of the blind one and the most frequent answer."""
    return found["accuracy"]["low"] > max(found["blind"]["high"], found["majority"])


def missed_gates(report: dict[str, dict]) -> list[str]:
    """Sentences about every gate that is not met; empty when the model may be used."""
    missed = []
    for kind, (least, below) in GATES.items():
        if not least <= (value := report[kind]["accuracy"]["mean"]) < below:
            missed.append(f"{kind}: accuracy {value:.3f} is not within its gate, at least {least:.2f} and below {below:.2f}")
    for kind in ABOVE_BLIND:
        if not above_blind(found := report[kind]):
            missed.append(
                f"{kind}: accuracy {found['accuracy']['mean']:.3f} (from {found['accuracy']['low']:.3f}) is not clearly above blind "
                f"{found['blind']['mean']:.3f} and the most frequent answer {found['majority']:.3f}"
            )
    return missed


def print_report(report: dict[str, dict]) -> None:
    print(f"{'kind':18s}{'n':>6s}  {'accuracy [95 % interval]':28s}{'blind [95 % interval]':28s}{'majority':>8s}")
    for kind, found in report.items():
        cells = ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found[name]) for name in ("accuracy", "blind")]
        print(f"{kind:18s}{found['n']:6d}  {cells[0]:28s}{cells[1]:28s}{found['majority']:8.3f}")


def family_of(mlm):
    """How the recipe builds a model that kvutils has loaded."""
    return {MODELS[name].family: family for name, family in FAMILIES.items()}[mlm.family]


def main(arguments: list[str] | None = None) -> None:
    from kvutils.models import load_mlm

    parser = argparse.ArgumentParser(prog="python -m recipe.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket", help="a pocket model: a name or folder (default: pocket)")
    parser.add_argument("--scenes", type=int, default=6000, help="held-out scenes to draw (default 6000)")
    parser.add_argument("--questions", type=int, default=500, help="questions per kind (default 500)")
    options = parser.parse_args(arguments)
    mlm = load_mlm(options.model, dtype="float32")
    report = evaluate(mlm.model, family_of(mlm), make_pool(options.scenes, seed=3), options.questions)
    print_report(report)
    for line in missed_gates(report):
        print("missed:", line)


if __name__ == "__main__":
    main()
