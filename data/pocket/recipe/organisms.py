"""Train and measure the arms of the open questions: `make organisms`, or `PYTHONPATH=data/pocket python -m recipe.organisms`.

Each arm (see `recipe.arms`) is a training of the main model that differs from the recipe in one ingredient and begins with the weights that
are shipped, or where it reads texts alone with random ones.
What is measured goes to data/results/organisms/<arm>-<seed>.json; weights stay in data/training/organisms. A run can be stopped
at any time and goes on from its last checkpoint; what is stored is not made again.
"""

import argparse
import json
import time
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvutils import plots
from kvutils.checkpoints import ENCODERS, MODELS
from kvutils.errors import ParameterError, one_of
from kvutils.store import atomic, digest, read_json, to_json, write_text
from recipe.arms import ARMS, RATES, SEEDS, USUAL, Arm
from recipe.effects import effects, load
from recipe.families import FAMILIES
from recipe.measure import CHOICE, SEED, SIZES, accuracies, lookups, measure
from recipe.organism_plots import draw
from recipe.pool import load_or_make_pool
from recipe.train import train
from recipe.trainer import WORK, computes_bfloat16, load_stage

RESULTS = Path(__file__).resolve().parents[2] / "results" / "organisms"
MODEL = "pocket"
GUESS = {"step": 2.4, "measure": 150.0}  # seconds on two CPU cores, until some have been measured here
SHIPPED = ENCODERS["pocket-siglip"], MODELS[MODEL]
_EVERY = ARMS | RATES


def changed(arm: Arm) -> dict[str, Any]:
    """The ingredients that differ from the usual, JSON-able."""
    return {name: value if not isinstance(value, Mapping) else {key: repr(each) if name == "stages" else each for key, each in value.items()}
            for name, value in vars(arm.ingredients).items() if value != getattr(USUAL, name)}  # fmt: skip


@cache
def shipped() -> str:
    """Of the weights that arms begin with, which a newly trained model replaces."""
    return digest([sha256((Path(spec.source) / "model.safetensors").read_bytes()).hexdigest() for spec in SHIPPED])


def begins(arm: Arm) -> str:
    """Digest of the weights that an arm begins with; nothing where they are random and no tower is read."""
    return shipped() if arm.stage == "all" else ""


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Of an arm's training from the shipped weights; a trial of fewer steps has its own."""
    return options.out / f"arm-{name}-{seed}-{shipped()}{f'-of-{options.steps}' if options.steps else ''}"


def begin_in(out: Path, arm: Arm) -> Path:
    """The folder of the checkpoints that an arm begins with: the shipped weights, laid there as the stages they ended. An arm that reads
    plain text first begins in its own folder, where that stage's checkpoint will lie."""
    own, family = arm.ingredients.before["all"] == "text", FAMILIES[MODEL]
    folder = out if own else out.with_name(f"arm-shipped-{shipped()}")
    parts = {"encoder": ("pair", family.build_pair, SHIPPED[0]), "all": ("mlm", family.build_mlm, SHIPPED[1])}
    for stage in ("encoder",) if own else parts:
        module, build, spec = parts[stage]
        file = folder / stage / "checkpoint.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            weights = type(build()).from_pretrained(spec.source, dtype=torch.float32).state_dict()
            with atomic(file) as temporary:
                torch.save({"model": {f"{module}.{name}": each for name, each in weights.items()}}, temporary)
    return folder


def result_file(name: str, seed: int, results: Path = RESULTS) -> Path:
    """What is not trained is the same with every seed."""
    return results / f"{name}-{seed if _EVERY[name].steps else 0}.json"


def _text(result: Mapping) -> str:
    return to_json(result, indent=None, digits=5)


def steps_of(arm: Arm, options: argparse.Namespace) -> int:
    return arm.steps and (options.steps or arm.steps)


def describe(name: str, seed: int, options: argparse.Namespace) -> str:
    """How far an arm is: "measured", "trained", "250 of 400 steps", "-"."""
    arm = _EVERY[name]
    curve, steps = folder_of(name, seed, options) / arm.stage / "curve.json", steps_of(arm, options)
    done = json.loads(curve.read_text())["step"] if curve.exists() else 0
    if is_measured(name, seed, options):
        return "measured"
    return "trained" if done >= steps else f"{done} of {steps} steps" if done else "-"


def is_measured(name: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether the stored result is of these steps and ingredients; ParameterError where it is of others."""
    file, arm = result_file(name, seed, options.results), _EVERY[name]
    if not file.exists():
        return False
    about = read_json(file)["about"]
    wanted = json.loads(_text({"steps": steps_of(arm, options), "changed": changed(arm), "sizes": options.sizes, "begins": begins(arm)}))  # rounded as stored
    if {key: about.get(key) for key in wanted} != wanted:
        raise ParameterError(f"{file} was measured after {about['steps']} steps; its steps, ingredients, sizes or the weights that it began with are "
                             "not those that are asked for: remove it, or give another --results")  # fmt: skip
    return True


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and measure an arm; seconds that each took."""
    arm = _EVERY[name]
    out, steps, began = folder_of(name, seed, options), steps_of(_EVERY[name], options), time.time()
    start = begin_in(out, arm)
    if steps:
        how = {"model": MODEL, "seed": seed, "steps": steps, "out": out, "start": start}
        stages = ["text"] * (start == out and arm.stage == "all") + [arm.stage]
        train(stages, argparse.Namespace(**vars(options) | how), arm.ingredients)
    trained = time.time()
    torch.manual_seed(seed)
    torch.set_num_threads(options.threads)
    family = FAMILIES[MODEL]
    model = family.build_mlm(**arm.ingredients.language)
    load_stage(model, arm.stage, out if steps else start)
    pool = load_or_make_pool(options.out, options.development, CHOICE if name in RATES else SEED)
    if name in RATES:
        found = {"accuracy": accuracies(model.eval(), family, arm.ingredients, pool, options.sizes["questions"], CHOICE)}
    elif arm.stage == "text":
        found = lookups(model.eval(), arm.ingredients.written(family.full), options.sizes["scenes"])
    else:
        found = measure(model.eval(), family, arm.ingredients, pool, options.sizes)
    seconds = {"train": round(trained - began, 1), "measure": round(time.time() - trained, 1)}
    curve = json.loads((out / arm.stage / "curve.json").read_text())["points"] if steps else []
    losses = [point for point in curve if "loss" in point]
    about = {"arm": name, "seed": seed if steps else 0, "steps": steps, "changed": changed(arm), "seconds": seconds, "loss": losses, "sizes": options.sizes,
             "begins": begins(arm), "precision": "bfloat16" if computes_bfloat16(options.device) else "float32"}  # fmt: skip
    write_text(result_file(name, seed, options.results), _text({"about": about, **found}))
    return seconds


def table(names: list[str], seeds: list[int], options: argparse.Namespace, pace: Mapping[str, float]) -> str:
    """Progress: a line per arm, a column per seed, and how long what is left takes."""
    lines, left = [f"{'arm':20s}{'steps':>6s}  " + "".join(f"seed {seed:<13d}" for seed in seeds) + "varies"], 0.0
    for name in names:
        states = [describe(name, seed, options) for seed in seeds]
        steps = steps_of(_EVERY[name], options)
        for state in states:
            done = steps if state == "trained" else int(state.split()[0]) if " of " in state else 0
            left += 0.0 if state == "measured" else (steps - done) * pace["step"] + pace["measure"]
        lines.append(f"{name:20s}{steps:6d}  " + "".join(f"{state:18s}" for state in states) + _EVERY[name].varies)
    return "\n".join([*lines, f"left: about {left / 3600:.1f} hours"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make organisms", description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="*", default=[], metavar="ARM", help=f"default: all of {', '.join(ARMS)}")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of training (default 2,3,4)")
    parser.add_argument("--steps", type=int, help="of every arm (default: each arm's own)")
    parser.add_argument("--rates", action="store_true", help="the candidates for AdamW's rate instead, by accuracy on scenes that nothing is reported of")
    parser.add_argument("--scenes", type=int, default=60_000, help="training scenes (default 60000)")
    parser.add_argument("--development", type=int, default=600, help="development scenes (default 600)")
    parser.add_argument("--small", type=float, default=1.0, metavar="SHARE", help="of what is measured (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="processes that share each step (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (default 1)")
    parser.add_argument("--out", type=Path, default=WORK, metavar="FOLDER", help="with the trainings (default: data/training)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="default: data/results/organisms; of trials (--steps, --small, --scenes, --development, --rates) in --out")
    parser.add_argument("--status", action="store_true", help="only say how far it is")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="only draw the figures there")
    parser.add_argument("--quiet", action="store_true", help="print nothing while training")
    options = parser.parse_args(arguments)
    trial = options.steps or options.rates or any(getattr(options, name) != parser.get_default(name) for name in ("small", "scenes", "development"))
    options.results = options.results or (options.out / "trials" if trial else RESULTS)
    if options.figures:
        plots.save(draw(effects(load(options.results))), options.figures)
        return
    names = options.arms or [*(RATES if options.rates else ARMS)]
    for name in names:
        one_of("arm", name, _EVERY)
    try:
        seeds = [int(each) for each in options.seeds.split(",")]
    except ValueError:
        raise ParameterError(f"seeds must be numbers with commas, such as 2,3,4, not {options.seeds!r}") from None
    least = {"images": 16, "per_fold": 2, "episode_scenes": 60, "items": 8, "scenes": 40}  # below, the tasks have nothing to measure
    options.sizes = {key: max(least.get(key, 4), round(each * options.small)) for key, each in SIZES.items()}
    options.sizes["scenes"] = min(options.sizes["scenes"], options.development)
    took: dict[str, list[float]] = {"step": [], "measure": []}

    def pace() -> dict[str, float]:
        return {key: float(np.mean(found)) if (found := took[key]) else GUESS[key] for key in took}

    print(table(names, seeds, options, pace()))
    if options.status:
        return
    for seed in seeds:  # all arms of one seed first: a seed is a whole comparison
        for name in names:
            if is_measured(name, seed, options):
                continue
            print(f"\n{name}, seed {seed}: {_EVERY[name].varies}", flush=True)
            before = describe(name, seed, options)
            seconds = run(name, seed, options)
            took["measure"].append(seconds["measure"])
            if before == "-" and (steps := steps_of(_EVERY[name], options)):
                took["step"].append(seconds["train"] / steps)
            print(table(names, seeds, options, pace()), flush=True)
    if options.rates:
        for name in names:
            right = {seed: read_json(result_file(name, seed, options.results))["accuracy"] for seed in seeds}
            each = [np.mean([bit == "1" for bit in kind["right"]]) for found in right.values() for kind in found.values()]
            print(f"{name:20s}mean accuracy over kinds and seeds {np.mean(each):.4f}")


if __name__ == "__main__":
    main()
