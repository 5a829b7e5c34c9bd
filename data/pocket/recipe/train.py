"""Train the pocket models, built up as real ones are: `make train`, or `PYTHONPATH=data/pocket python -m recipe.train`.

Four stages, each with a gate and a checkpoint (the recipe and its reasons are in data/pocket/README.md):

1 encoder    a SigLIP pair, contrastively, labels by entailment; kept as `encoder_original`
2 language   the language model on text alone, the image replaced by a grid of word embeddings
3 projector  projector and newline, through the frozen language model, language-model loss only
4 all        everything end to end, from a copy of the encoder

Stages 1 and 2 do not depend on each other and may run side by side (`--stage encoder`, `--stage language`). A run can
be stopped at any time and goes on from its last checkpoint. Batches depend on (seed, stage, step, rank) alone.
"""

import argparse
import math
import os
import socket
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kvutils.errors import ParameterError
from recipe.captions import caption_tokens, encoder_batch
from recipe.evaluate import quick_accuracy
from recipe.model import IMAGE_SLOTS, answer_loss, build_mlm, build_siglip, encode_windows, image_embeddings, patch_windows, with_newline
from recipe.packing import pack, pixel_batch
from recipe.pool import Pool, load_or_make_pool
from recipe.samples import Sampler
from recipe.start import add_places, load_into, load_places, match_words, start_from
from recipe.symbolic import COARSE, SymbolicImage, mark_loss, place_loss
from recipe.trainer import SEED, STAGES, WORK, Trainer, autocast, fast

# Sequences in a step of this kind, relative to a step of single images.
SEQUENCES = {"single": 1.0, "marked": 1.5, "correspondence": 0.75, "style_match": 0.5, "class_match": 0.5}
# Which kind of sample a step is made of. What needs two looks in turn is learned in the text stage or not at all.
STEP_KINDS = {
    "language": {"single": 0.38, "marked": 0.08, "correspondence": 0.48, "style_match": 0.03, "class_match": 0.03},
    "projector": {"single": 0.90, "marked": 0.05, "style_match": 0.05},
    "all": {"single": 0.58, "marked": 0.14, "correspondence": 0.18, "style_match": 0.07, "class_match": 0.03},
}
MARK_WEIGHT, PLACE_WEIGHT = 0.3, 0.2  # of `mark_loss` and `place_loss`, in stages 3 and 4
EVALUATE = 1000  # steps between held-out figures
WARM_UP, LISTEN = 100, 1000  # steps over which a rate rises: of everything, and of the language model in stage 4


# --- stage 1 ---------------------------------------------------------------------------------------------------------

def siglip_logits(siglip, pixels, first, side, captions):
    window, ids = patch_windows(pixels, first, side)
    image = nn.functional.normalize(encode_windows(siglip, window, ids).float(), dim=-1)
    text = nn.functional.normalize(siglip.text_model(input_ids=captions).pooler_output.float(), dim=-1)
    return image @ text.T * siglip.logit_scale.exp() + siglip.logit_bias


def train_encoder(pool: Pool, held_out: Pool, options: argparse.Namespace) -> None:
    from sklearn.metrics import roc_auc_score

    device, steps = options.device, options.steps
    torch.manual_seed(SEED)
    siglip = fast(build_siglip().to(device), device)
    nn.init.constant_(siglip.logit_scale, math.log(10.0))
    nn.init.constant_(siglip.logit_bias, -4.0)  # a caption holds for about 1 image in 12 here, not in 32,000
    groups = [(list(siglip.named_parameters()), 1.0, WARM_UP)]
    trainer = Trainer("encoder", nn.ModuleDict({"siglip": siglip}), groups, options)
    captions = caption_tokens().to(device)
    fixed = encoder_batch(held_out, np.arange(min(400, len(held_out))), np.random.default_rng(7), whole=True)
    # Shapes first on clean daylight scenes: textures of the styles keep the classes from being learned at all early on.
    clean = np.flatnonzero((np.asarray(pool.style) == 0) & (np.asarray(pool.domain) == 0) & ~np.asarray(pool.portrait))
    while trainer.step < steps:
        whole = trainer.step_rng().random() < 0.3
        count, rng = int(trainer.stage.scenes * (0.4 if whole else 1.0) / trainer.ranks), trainer.rng()
        easy = rng.random(count) < np.clip(1.9 - 2 * trainer.step / steps, 0, 1)
        rows = np.where(easy, rng.choice(clean, count), rng.integers(len(pool), size=count))
        batch = encoder_batch(pool, rows, rng, whole)
        pixels, first, side, labels, weights = (x.to(device) if torch.is_tensor(x) else x for x in batch)
        with autocast(device):
            logits = siglip_logits(siglip, pixels, first, side, captions)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum") / len(labels)
        trainer.update(loss)
        if trainer.due(EVALUATE):
            with torch.no_grad(), autocast(device):
                logits = siglip_logits(siglip, fixed[0].to(device), fixed[1], fixed[2], captions).cpu()
            auc = {}
            for kind, part in (("existence", slice(0, 8)), ("colour_class", slice(8, 72)), ("style", slice(80, 85)), ("letter", slice(88, 93))):
                keep = fixed[4][:, part] > 0
                auc[kind] = roc_auc_score(fixed[3][:, part][keep], logits[:, part][keep])
            trainer.note(**{f"auc_{k}": v for k, v in auc.items()})
        trainer.save_when_due()


# --- stages 2 to 4 ---------------------------------------------------------------------------------------------------


def draw_step(trainer: Trainer, sampler: Sampler):
    """The samples of one step: every rank draws the same kind, so that no rank waits for a longer batch."""
    shares = STEP_KINDS[trainer.name]
    kind = str(trainer.step_rng().choice(list(shares), p=list(shares.values())))
    return sampler.draw(kind, max(2, int(trainer.stage.scenes * SEQUENCES[kind] / trainer.ranks)), trainer.rng())


def train_language(pool: Pool, held_out: Pool, options: argparse.Namespace) -> None:
    device, steps = options.device, options.steps
    torch.manual_seed(SEED)
    mlm, symbolic = fast(build_mlm().to(device), device), SymbolicImage().to(device)
    nn.init.normal_(mlm.get_input_embeddings().weight, std=0.1)
    start_from(mlm, options.start_from)
    modules = nn.ModuleDict({"mlm": mlm, "symbolic": symbolic})
    named = [
        *((k, p) for k, p in mlm.named_parameters() if "vision" not in k and "projector" not in k and "newline" not in k),
        *symbolic.named_parameters(),
    ]
    trainer = Trainer("language", modules, [(named, 1.0, WARM_UP)], options)
    sampler, fixed = Sampler(pool), Sampler(held_out)
    while trainer.step < steps:
        packed = pack(draw_step(trainer, sampler), COARSE**2 + 1).to(device)
        with autocast(device):
            images = symbolic(mlm.get_input_embeddings(), pool, packed.images, trainer.step)
            loss = answer_loss(mlm, packed, images)
        trainer.update(loss)
        if trainer.due(EVALUATE):
            def embed(images):
                return symbolic(mlm.get_input_embeddings(), held_out, images, 0)

            trainer.note(**quick_accuracy(mlm, fixed, embed, COARSE**2 + 1))
        trainer.save_when_due()


def train_vision_language(name: str, pool: Pool, held_out: Pool, options: argparse.Namespace) -> None:
    """Stage 3 (`projector`: everything else frozen) and stage 4 (`all`)."""
    device, steps, start = options.device, options.steps, options.start_from
    torch.manual_seed(SEED)
    mlm = fast(build_mlm().to(device), device)
    columns, rows = load_places(options.out)
    if name == "projector":
        some = pixel_batch(pool, [(row, []) for row in range(64)]).to(device)
        load_into(mlm, "language", options.out)
        siglip = build_siglip()
        load_into(siglip, "encoder", options.out)
        mlm.model.vision_tower.load_state_dict(siglip.vision_model.state_dict())
        if start is None:
            add_places(mlm, some)
        start_from(mlm, start, ("vision_tower", "projector", "newline"))
        match_words(mlm, some)
    else:
        load_into(mlm, "projector", options.out)
        start_from(mlm, start)
    for key, parameter in mlm.named_parameters():
        parameter.requires_grad_(name == "all" or "projector" in key or "newline" in key)
    vision = [(k, p) for k, p in mlm.named_parameters() if "vision_tower" in k and ".head." not in k and "post_layernorm" not in k]
    last = [(k, p) for k, p in mlm.named_parameters() if "projector.linear_2" in k]
    first = [(k, p) for k, p in mlm.named_parameters() if "projector.linear_1" in k or "newline" in k]
    words = [(k, p) for k, p in mlm.named_parameters() if "language_model" in k or "lm_head" in k]
    weight = mlm.model.multi_modal_projector.linear_2.weight
    small = min(1.0, float(weight.detach().square().mean().sqrt()) * weight.shape[1] ** 0.5)  # against its usual size
    groups = [(first, 1.0, WARM_UP), (last, small, WARM_UP)]
    if name == "all":
        groups += [(vision, 0.9, WARM_UP), (words, 1.0, LISTEN)]
    trainer = Trainer(name, nn.ModuleDict({"mlm": mlm}), groups, options)
    sampler, fixed = Sampler(pool), Sampler(held_out)
    while trainer.step < steps:
        packed = pack(draw_step(trainer, sampler), IMAGE_SLOTS).to(device)
        pixels = pixel_batch(pool, packed.images).to(device)
        with autocast(device):
            if name == "projector":
                with torch.no_grad():
                    tower = mlm.model.vision_tower(pixels, output_hidden_states=True)
                features = tower.hidden_states[mlm.config.vision_feature_layer]
                images = with_newline(mlm, mlm.model.multi_modal_projector(features))
            else:
                images = image_embeddings(mlm, pixels)
            loss = answer_loss(mlm, packed, images)
        loss = loss + MARK_WEIGHT * mark_loss(mlm.get_input_embeddings(), images, packed.images)
        loss = loss + PLACE_WEIGHT * place_loss(columns, rows, images)
        trainer.update(loss)
        if trainer.due(EVALUATE):
            def embed(images):
                return image_embeddings(mlm, pixel_batch(held_out, images).to(device))

            trainer.note(**quick_accuracy(mlm, fixed, embed, IMAGE_SLOTS))
        trainer.save_when_due()
        if name == "all" and trainer.rank == 0 and trainer.step in (steps // 4, steps // 2):
            quarter = "quarter" if trainer.step == steps // 4 else "half"
            trainer.file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(mlm.state_dict(), trainer.file.with_name(f"{quarter}.pt"))


def _pools(options: argparse.Namespace) -> tuple[Pool, Pool]:
    """The scenes to train on and those held out, drawn where they are missing."""
    held_out = min(3000, options.scenes)
    return load_or_make_pool(options.out, options.scenes, SEED), load_or_make_pool(options.out, held_out, SEED + 1)


def _run(rank: int, ranks: int, port: int, name: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, options.threads))
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    pool, held_out = _pools(options)
    options = argparse.Namespace(**vars(options) | {"steps": options.steps or STAGES[name].steps})
    if name == "encoder":
        train_encoder(pool, held_out, options)
    elif name == "language":
        train_language(pool, held_out, options)
    else:
        train_vision_language(name, pool, held_out, options)
    if ranks > 1:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make train", description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=[*STAGES, "every"], default="every", help="one stage, or every one in turn")
    parser.add_argument("--steps", type=int, help="steps of the stage (default: the recipe's)")
    parser.add_argument("--scenes", type=int, default=60_000, help="training scenes to draw (default 60000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="processes that share each step (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (default 1: with 2 ranks the fastest)")
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER",
        help="weights to begin stage 2 or 4 with, or the vision side of stage 3; a checkpoint of the stage goes first",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=WORK, metavar="FOLDER", help="for scenes and checkpoints (default: data/training)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    options = parser.parse_args(arguments)
    if options.start_from is not None:
        if options.stage not in ("language", "projector", "all"):
            raise ParameterError("--start-from needs one stage: --stage language, projector or all")
        if not (options.start_from / "config.json").is_file():
            raise ParameterError(f"{options.start_from} holds no model (config.json is missing): give a folder of save_pretrained")
    ranks = options.ranks or (1 if options.device.startswith("cuda") else min(2, os.cpu_count() or 1))
    _pools(options)
    for name in STAGES if options.stage == "every" else [options.stage]:
        if ranks == 1:
            _run(0, 1, 0, name, options)
            continue
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_run, args=(ranks, port, name, options), nprocs=ranks)


if __name__ == "__main__":
    main()
