"""Train a pocket model, built up as real ones are: `make train MODEL=pocket`, or `PYTHONPATH=data/pocket python -m recipe.train`.

Four stages, each with a checkpoint (a model's card, in its folder in data/pocket, tells what was run):

1 encoder  vision and text tower, contrastively, on captions of class, colour, place, style, light, marks and parts
2 text     the language model alone: pictures told in plain words, and questions about them
3 read     the tower frozen, its features at half resolution: projector and language model learn to read them
4 all      everything at full resolution, the tower at a fifth of the rate, on a narrower mix of questions

Stages 1 and 2 do not depend on each other. A run can be stopped at any time and goes on from its last checkpoint. Batches depend on
(seed, stage, step, rank) alone.
"""

import argparse
import copy
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from recipe.captions import GROUPS, caption_tokens, encoder_batch
from recipe.evaluate import quick_accuracy
from recipe.families import FAMILIES
from recipe.model import answer_loss
from recipe.packing import TOKEN, ImageTokens, encode, pack, pixel_batch
from recipe.pool import GRID, Pool, load_or_make_pool
from recipe.samples import MIX, OWN_MIX, PLAIN, Sampler
from recipe.tokenizer import BEGIN, END, SYSTEM, SYSTEM_PROMPT, USER, chat_template
from recipe.trainer import STAGES, WORK, Stage, Trainer, autocast, fast, load_stage

# Sequences in a step of this kind, relative to a step of single images.
SEQUENCES = {"single": 1.0, "crowd": 1.0, "first": 2.0, "marked": 1.5, "correspondence": 0.75, "style_match": 0.6, "class_match": 0.5}
# Which kind of sample a step is made of. What needs two looks in turn is learned in the text stage or not at all.
STEP_KINDS = {
    "text": {"single": 0.64, "marked": 0.14, "correspondence": 0.08, "style_match": 0.04, "class_match": 0.10},
    "read": {"single": 0.46, "first": 0.22, "marked": 0.12, "correspondence": 0.08, "style_match": 0.04, "class_match": 0.08},
    "all": {"single": 0.50, "first": 0.30, "marked": 0.06, "correspondence": 0.05, "style_match": 0.03, "class_match": 0.06},
}
TOWER_RATE = 0.2  # of the tower in stage 4, relative to the language model's
LIMIT = 144  # tokens of questions and answers behind an image
EVALUATE = 500  # steps between held-out figures
WARM_UP = 100  # steps over which a rate rises
# For glibc, in the processes of a training: freed memory is kept, in huge pages. To return it and to have it back took a tenth of a step.
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=268435456"


@dataclass(frozen=True)
class Ingredients:
    """What a training is made of; the defaults are the recipe's, `replace(RECIPE, ...)` is a training that differs in one of them.

    before: the stage whose language model each stage begins with, None: with random weights (and the tower of stage 1 where it reads
    images). shares: which kind of sample the steps of a stage are made of. mix: weights of the question kinds about one scene. tower_rate:
    of the tower in stage 4, relative to the language model's; 0: frozen. distil: weight of the mean squared error of the tower's features
    in stage 4 to those that the stage began with, in units of their variance. muon: the optimiser of matrices (else AdamW), matrix_rate
    their rate relative to a stage's (Muon's updates are scaled to AdamW's size), decay theirs. language: of the language model's
    configuration. biases: the deviation with which those of queries and keys begin where weights are random. system: a turn of the system
    before all; begin: a token before that. turned: patches are fed last to first. compare_styles, sentences: see `Sampler`."""

    stages: Mapping[str, Stage] = field(default_factory=lambda: STAGES)
    before: Mapping[str, str | None] = field(default_factory=lambda: {"text": None, "read": "text", "all": "read"})
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: STEP_KINDS)
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)
    tower_rate: float = TOWER_RATE
    distil: float = 0.0
    muon: bool = True
    matrix_rate: float = 3.0
    decay: float = 0.01
    language: Mapping[str, Any] = field(default_factory=dict)
    biases: float = 0.0
    system: bool = True
    begin: bool = False
    turned: bool = False
    compare_styles: bool = False
    sentences: bool = False

    def sampler(self, pool: Pool, words: bool) -> Sampler:
        return Sampler(pool, self.mix, self.compare_styles, self.sentences, words)

    def written(self, image: ImageTokens) -> ImageTokens:
        """How the prompts of this training write a family's image."""
        image = replace(image, begin=(TOKEN[BEGIN],)) if self.begin else image
        return image if self.system else replace(image, head=encode(USER))

    def template(self) -> str:
        """The chat template of these prompts, for families that write an image as one word."""
        return chat_template(begin=BEGIN if self.begin else "", system=f"{SYSTEM}{SYSTEM_PROMPT}{END}" if self.system else "")

    def embed(self, family, mlm: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """Image tokens (n, slots, hidden) of features (n, patches, hidden) in the order in which they are fed."""
        return family.tokens(mlm, features.flip(1) if self.turned else features)


RECIPE = Ingredients()


def train_encoder(family, pool: Pool, held_out: Pool, options: argparse.Namespace) -> None:
    from sklearn.metrics import roc_auc_score

    device = options.device
    pair = fast(family.build_pair().to(device), device, family.compiled)
    nn.init.constant_(pair.logit_scale, math.log(10.0))
    nn.init.constant_(pair.logit_bias, -4.0)  # a caption holds for about 1 image in 12 here, not in 32,000
    trainer = Trainer("encoder", nn.ModuleDict({"pair": pair}), [(list(pair.named_parameters()), 1.0, WARM_UP)], options)
    captions = caption_tokens().to(device)
    fixed = encoder_batch(held_out, np.arange(min(400, len(held_out))), np.random.default_rng(7), GRID, True)
    # Shapes first on clean daylight scenes: textures of the styles keep the classes from being learned at all early on.
    clean = np.flatnonzero((np.asarray(pool.style) == 0) & (np.asarray(pool.domain) == 0) & ~np.asarray(pool.portrait))

    def logits_of(pixels, first, side):
        image = nn.functional.normalize(family.encode_windows(pair, pixels.to(device), first.to(device), side).float(), dim=-1)
        text = nn.functional.normalize(pair.get_text_features(input_ids=captions).pooler_output.float(), dim=-1)
        return image @ text.T * pair.logit_scale.exp() + pair.logit_bias

    while trainer.step < options.steps:
        whole = trainer.step_rng().random() < 0.3
        count, rng = int(trainer.stage.scenes * (0.4 if whole else 1.0) / trainer.ranks), trainer.rng()
        easy = rng.random(count) < np.clip(1.9 - 2 * trainer.step / options.steps, 0, 1)
        rows = np.where(easy, rng.choice(clean, count), rng.integers(len(pool), size=count))
        *batch, labels, weights = encoder_batch(pool, rows, rng, GRID if whole else family.window, family.knows_places)
        with autocast(device):
            logits = logits_of(*batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(device), weights.to(device), reduction="sum")
        trainer.update(loss / len(labels))
        if trainer.due(EVALUATE):
            with torch.no_grad(), autocast(device):
                logits = logits_of(*fixed[:3]).float().cpu()
            auc = {}
            for kind, part in GROUPS.items():
                keep = fixed[4][:, part] > 0
                auc[f"auc_{kind}"] = roc_auc_score(fixed[3][:, part][keep], logits[:, part][keep])
            trainer.note(**auc)
        trainer.save_when_due()


def draw_step(trainer: Trainer, sampler: Sampler, shares: Mapping[str, float]):
    """The samples of one step: every rank draws the same kind, so that no rank waits for a longer batch."""
    kind = str(trainer.step_rng().choice(list(shares), p=list(shares.values())))
    return sampler.draw(kind, max(2, int(trainer.stage.scenes * SEQUENCES[kind] / trainer.ranks)), trainer.rng())


def begin_biases(mlm: nn.Module, deviation: float) -> None:
    """Draw the biases of queries and keys, which `transformers` begins with 0. What all queries and all keys have in common is what a head
    can attend by distance with."""
    for layer in mlm.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            nn.init.normal_(projection.bias, std=deviation)


def train_language(name: str, family, pool: Pool, held_out: Pool, options: argparse.Namespace) -> None:
    """Stages 2 to 4: the answers to questions about texts, about pictures at half resolution, about pictures."""
    device, made = options.device, options.ingredients
    mlm = fast(family.build_mlm(**made.language).to(device), device, family.compiled)
    image, before = made.written(family.full if name == "all" else family.coarse), made.before[name]
    if before:
        load_stage(mlm, before, options.start)
    else:
        nn.init.normal_(mlm.get_input_embeddings().weight, std=0.1)
        if made.biases:
            begin_biases(mlm, made.biases)
    reads_first = name != "text" and before in (None, "text")
    if reads_first:
        pair = family.build_pair()
        load_stage(pair, "encoder", options.start)
        family.take_tower(mlm, pair)

    def features(images: list, pool: Pool = pool, of: nn.Module = mlm) -> torch.Tensor:
        found = family.features(of, pixel_batch(pool, images).to(device))
        return family.halve(found) if name == "read" else found

    if reads_first:
        with torch.no_grad():
            family.match_words(mlm, features([(row, PLAIN) for row in range(min(64, len(held_out)))], held_out))

    def held_out_tokens(images: list) -> torch.Tensor | None:
        return made.embed(family, mlm, features(images, held_out)) if images else None

    vision = [(k, p) for k, p in mlm.named_parameters() if family.vision_parameters(k)]
    projector = [(k, p) for k, p in mlm.named_parameters() if family.projector_parameters(k)]
    words = [(k, p) for k, p in mlm.named_parameters() if "language_model" in k or "lm_head" in k]
    groups = [(words, 1.0, WARM_UP)] + [(projector, 1.0, WARM_UP)] * (name != "text")
    groups += [(vision, made.tower_rate, WARM_UP)] * (name == "all" and made.tower_rate > 0)
    trained = {k for group, *_ in groups for k, _ in group}
    for key, parameter in mlm.named_parameters():
        parameter.requires_grad_(key in trained)
    original = copy.deepcopy(mlm).requires_grad_(False) if made.distil else None  # before a checkpoint of this stage is taken up
    trainer = Trainer(name, nn.ModuleDict({"mlm": mlm}), groups, options)
    sampler, fixed, shares = made.sampler(pool, name == "text"), made.sampler(held_out, name == "text"), made.shares[name]
    while trainer.step < options.steps:
        packed = pack(draw_step(trainer, sampler, shares), image, LIMIT).to(device)
        with autocast(device):
            found = features(packed.images) if packed.images else None
            loss = answer_loss(mlm, packed, None if found is None else made.embed(family, mlm, found))
            if original and found is not None:
                with torch.no_grad():
                    wanted = features(packed.images, of=original).float()
                loss = loss + made.distil * (found.float() - wanted).square().mean() / wanted.var()
        trainer.update(loss)
        if trainer.due(EVALUATE):
            trainer.note(**quick_accuracy(mlm, fixed, held_out_tokens, image, shares))
        trainer.save_when_due()


def _pools(options: argparse.Namespace) -> tuple[Pool, Pool]:
    """The scenes to train on (of every seed of training the same) and those held out, drawn where they are missing."""
    held_out = min(3000, options.scenes)
    return load_or_make_pool(options.start.parent, options.scenes, 1), load_or_make_pool(options.start.parent, held_out, 2)


def _run(rank: int, ranks: int, port: int, name: str, options: argparse.Namespace) -> None:
    started = time.time()
    torch.set_num_threads(max(1, options.threads))
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    pool, held_out = _pools(options)
    options = argparse.Namespace(**vars(options) | {"steps": options.steps or options.ingredients.stages[name].steps, "started": started})
    torch.manual_seed(options.seed)
    family = FAMILIES[options.model]
    if name == "encoder":
        train_encoder(family, pool, held_out, options)
    else:
        train_language(name, family, pool, held_out, options)
    if ranks > 1:
        dist.destroy_process_group()


def train(stages: list[str], options: argparse.Namespace, ingredients: Ingredients) -> None:
    """These stages in turn. options: of the command line; `out`: the folder of this training, `start`: of the one whose checkpoints it
    begins with, beside which the scenes lie."""
    options = argparse.Namespace(**vars(options) | {"ingredients": ingredients})
    ranks = options.ranks or (1 if options.device.startswith("cuda") else min(2, os.cpu_count() or 1))
    _pools(options)
    for name in stages:
        if ranks == 1:
            _run(0, 1, 0, name, options)
            continue
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.setdefault("GLIBC_TUNABLES", KEPT)
        torch.multiprocessing.spawn(_run, args=(ranks, port, name, options), nprocs=ranks)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make train", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[*FAMILIES], default="pocket", help="which family (default: pocket)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and batches (default 1)")
    parser.add_argument("--stage", choices=[*STAGES, "every"], default="every", help="one stage, or every one in turn")
    parser.add_argument("--steps", type=int, help="steps of the stage (default: the recipe's)")
    parser.add_argument("--scenes", type=int, default=60_000, help="training scenes to draw (default 60000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="processes that share each step (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (default 1: with 2 ranks the fastest)")
    parser.add_argument("--out", type=Path, default=WORK, metavar="FOLDER", help="for scenes and checkpoints (default: data/training)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    options = parser.parse_args(arguments)
    options.out = options.start = options.out / f"{options.model}-{options.seed}"
    own = replace(RECIPE, mix={**RECIPE.mix, **OWN_MIX.get(options.model, {})})
    train(list(STAGES) if options.stage == "every" else [options.stage], options, own)


if __name__ == "__main__":
    main()
