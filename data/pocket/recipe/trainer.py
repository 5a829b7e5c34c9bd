"""One stage of training: its schedule, optimisers, gradient exchange, checkpoints and learning curve."""

import json
import math
import os
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kvutils.errors import ParameterError
from kvutils.store import atomic, digest, write_text
from recipe.muon import Muon

WORK = Path(__file__).resolve().parents[2] / "training"


@dataclass(frozen=True)
class Stage:
    """`lr` of AdamW; that of matrices is `Ingredients.matrix_rate` times as high. `scenes` per step, over all ranks.
    `horizon`: the steps that the cosine schedule is laid out for, if more than are run."""

    number: int
    steps: int
    lr: float
    scenes: int
    horizon: int = 0


STAGES = {
    "encoder": Stage(1, 5000, 1.5e-3, 64),
    "text": Stage(2, 1000, 1.5e-3, 24),
    "read": Stage(3, 2500, 1.5e-3, 24),
    "all": Stage(4, 600, 8e-4, 24),
}


def load_stage(module: nn.Module, stage: str, folder: Path) -> None:
    """The weights that a stage ended with; folder: of the training."""
    file = folder / stage / "checkpoint.pt"
    if not file.exists():
        raise ParameterError(f"stage {stage!r} must be trained first: {file} is missing. Run --stage {stage}.")
    state = torch.load(file, map_location="cpu", weights_only=True)["model"]
    module.load_state_dict({k.partition(".")[2]: v for k, v in state.items()})


class Trainer:
    """Optimisers, schedule, gradient exchange, checkpoints and the learning curve of one stage."""

    def __init__(self, name: str, modules: nn.ModuleDict, groups: list[tuple[list, float, int]], options: Namespace):
        """`groups`: (named parameters, their rate relative to the stage's, steps over which it rises). options: those of the
        command line, with the steps of this stage, the time it was `started` and the `ingredients` of the recipe."""
        self.name, self.modules, self.steps, self.quiet, self.seed = name, modules, options.steps, options.quiet, options.seed
        made = options.ingredients
        self.stage = made.stages[name]
        self.horizon = max(self.steps, self.stage.horizon)
        self.planned = {"horizon": self.horizon, "ingredients": digest(repr(made))}
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        matrices, rest = [], []
        for named, scale, warm in groups:
            for key, parameter in named:
                hidden = parameter.ndim == 2 and not any(w in key for w in ("embed", "lm_head"))
                (matrices if hidden else rest).append({"params": [parameter], "scale": scale, "warm": warm})
        lr, betas = self.stage.lr, (0.9, 0.98)
        of_matrices = {"params": _merge(matrices), "lr": made.matrix_rate * lr, "weight_decay": made.decay}
        self.optimizers = [
            Muon(**of_matrices, adjust_lr_fn="match_rms_adamw") if made.muon else torch.optim.AdamW(**of_matrices, betas=betas),
            torch.optim.AdamW(_merge(rest), lr=lr, weight_decay=0.0, betas=betas),
        ]
        self.parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        self.file = options.out / name / "checkpoint.pt"
        self.curve: list[dict] = []
        self.step, self.before = 0, 0.0
        if self.file.exists():
            self._resume()
        for optimizer, times in zip(self.optimizers, (made.matrix_rate, 1), strict=True):
            for group in optimizer.param_groups:
                group["initial"] = lr * times * group["scale"]
        self.begun, self.started, self.first = options.started, time.time(), self.step
        self.machine = {"device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU", "cores": os.cpu_count(),
                        "processes": self.ranks, "threads": torch.get_num_threads(), "bfloat16": computes_bfloat16(options.device)}
        self.recent: list[torch.Tensor] = []  # losses not yet in the curve, read at once: each reading makes the host wait for a GPU

    def _resume(self) -> None:
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        if (planned := state.get("planned", self.planned)) != self.planned:
            other = "other ingredients" if planned["horizon"] == self.horizon else f"rates over {planned['horizon']} steps instead of {self.horizon}"
            raise ParameterError(f"{self.file} is of a training with {other}: remove {self.file.parent}, or train elsewhere (--out FOLDER)")
        self.modules.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            recipe = [{k: group[k] for k in ("scale", "warm")} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, ours in zip(optimizer.param_groups, recipe, strict=True):
                group.update(ours)  # the recipe's, not the checkpoint's
        self.step, self.curve, self.before = state["step"], state["curve"], state.get("seconds", math.nan)

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    def save_when_due(self, every: int = 250) -> None:
        if self.rank or not self.due(every):
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        seconds = round(self.before + time.time() - self.begun, 1)  # without what was done behind the checkpoint of a run that was stopped
        state = {"model": self.modules.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                 "step": self.step, "curve": self.curve, "seconds": seconds, "planned": self.planned}  # fmt: skip
        told = {"step": self.step, "seconds": seconds, "machine": self.machine, "points": self.curve}
        write_text(self.file.with_name("curve.json"), json.dumps(told))  # before the checkpoint, with which the stage has ended
        with atomic(self.file) as temporary:
            torch.save(state, temporary)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.stage.number, self.step, self.rank))

    def step_rng(self) -> np.random.Generator:
        """The same on every rank: for choices that all ranks share."""
        return np.random.default_rng((self.seed, self.stage.number, self.step, 10_000))

    def update(self, loss: torch.Tensor, every: int = 50) -> None:
        loss.backward()
        if self.ranks > 1:
            flat = torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in self.parameters])
            dist.all_reduce(flat)
            flat /= self.ranks
            for parameter, piece in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                parameter.grad = piece.view_as(parameter)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.horizon)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * factor * min(1.0, (self.step + 1) / group["warm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.recent.append(loss.detach())
        self.step += 1
        if self.step % every == 0:
            self.curve.append({"step": self.step, "loss": round(float(torch.stack(self.recent).mean()), 4)})
            self.recent.clear()
            if not self.rank and not self.quiet:
                rate = (time.time() - self.started) / (self.step - self.first)
                left = rate * (self.steps - self.step) / 60
                print(
                    f"{self.name:9s} step {self.step:5d}/{self.steps}  loss {self.curve[-1]['loss']:.4f}  "
                    f"{rate:.2f} s/step, {left:.0f} min left",
                    flush=True,
                )

    def note(self, **values: float) -> None:
        """Held-out figures, beside the loss in the learning curve."""
        self.curve.append({"step": self.step, **{k: round(float(v), 4) for k, v in values.items()}})
        if not self.rank and not self.quiet:
            print(f"{self.name:9s} held out: " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)


def _merge(entries: list[dict]) -> list[dict]:
    kinds = sorted({(e["scale"], e["warm"]) for e in entries})
    return [
        {"params": [e["params"][0] for e in entries if (e["scale"], e["warm"]) == kind], "scale": kind[0], "warm": kind[1]}
        for kind in kinds
    ]


def computes_bfloat16(device: str) -> bool:
    """False for a CPU that only emulates it, at a third of float32's speed, or an Intel one without AMX, at half (60 to 90 for 110 to 160 GFLOP/s)."""
    if torch.device(device).type != "cpu":
        return True
    found = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 cannot tell: float32 is right anywhere
    return bool(found.get("amx_bf16") or found.get("avx512_bf16") and not found.get("cpu_name", "").startswith("Intel"))


def autocast(device: str):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=computes_bfloat16(device))


def fast(model, device: str, compiled: tuple[str, ...]):
    """On a CPU: compiled layers, which fuse the many small operations between the matrix products (after a minute of
    compiling), and in bfloat16 eager attention (0.4 of the time of sdpa's backward pass on one thread)."""
    if torch.device(device).type == "cpu":
        model.set_attn_implementation("eager" if computes_bfloat16(device) else "sdpa")
        for module in model.modules():
            if type(module).__name__ in compiled:
                module.compile(dynamic=True)
    return model
