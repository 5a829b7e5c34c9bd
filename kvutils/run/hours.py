"""Hours of a run, from a rehearsal of the model: the host's seconds as rehearsed, the models' passes as measured on this GPU or by
arithmetic on a stated one (data/sizes.yaml says how much each size reads, and how fast GPUs are)."""

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from kvutils import data_folder
from kvutils.models import base_name
from kvutils.run.notebook import cache_root
from kvutils.run.sizes import declared
from kvutils.store import read_json

# What a rehearsal keeps of a step: seconds in all; of the host, beside the models' passes; of the passes the tera-operations, the
# gigabytes of weights that they read, and their number; of the rest what a GPU would do: seconds on one core, and number of operations.
COSTS = ("seconds", "host", "tflop", "gbytes", "passes", "tensor", "calls")


def device_name() -> str:
    """The GPU of this machine, or what its processor is."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def rehearsal_file(model: str) -> Path:
    """Where `make rehearse` leaves its report."""
    return cache_root() / "rehearsal" / f"{base_name(model)}.json"


def find_rehearsal(model: str) -> dict:
    """The report of `make rehearse` here, else the one that is shipped; {} where there is none."""
    shipped = data_folder() / "rehearsal" / f"{base_name(model)}.json"
    return next((read_json(path) for path in (rehearsal_file(model), shipped) if path.is_file()), {})


def hours_of(report: Mapping, size: str, gpu: str | None = None, lost: Mapping[str, Mapping] = {}) -> tuple[dict[str, float], str]:
    """({notebook: hours of the paper profile}, on what and how they were made).

    gpu: a name of data/sizes.yaml; default: this machine's, else an H100. lost: {notebook: {use: data set}} that is left out."""
    known = declared()
    gpus, rate, work = known["gpus"], known["assumed"], known["work"][size]
    if gpu is None and report["full_size"] and report["device"] == device_name():
        gpu, fast, wide, said = "", 0, 0, f"on one {device_name()}: as a rehearsal measured them there"
    else:
        gpu = next((name for name in gpus if name in device_name().lower()), "h100") if gpu is None else gpu.lower()
        fast, wide = gpus[gpu]["tflops"], gpus[gpu]["tbytes"]
        said = (f"on one {gpu.upper()}: host seconds as rehearsed ({report['device']}) x items; per pass operations / ({rate['share']:.0%} of {fast} "
                f"TFLOP/s) + weights / {wide} TB/s + {rate['pause']} s;\n         other tensor work at {wide} to a core's {rate['core']} TB/s "
                f"+ {rate['call']:g} s a call")

    def seconds(cost: Mapping) -> float:
        if not gpu:
            return cost["seconds"]
        passes = cost["tflop"] / (rate["share"] * fast) + cost["gbytes"] / 1000 / wide + cost["passes"] * rate["pause"]
        return cost["host"] + passes + cost["tensor"] * rate["core"] / wide + cost["calls"] * rate["call"]

    found: dict[str, float] = {}
    for notebook in dict.fromkeys(step["notebook"] for step in report["steps"]):
        steps = [step for step in report["steps"] if step["notebook"] == notebook]
        a_read = sum(seconds(step["of_reads"]) for step in steps) / max(sum(step["reads"] for step in steps), 1)
        kept = [step for step in steps if not step["step"].startswith(tuple(lost.get(notebook, {"-": ""})))]
        found[notebook] = sum(work[step["step"]][0] * seconds(step["of_items"]) / step["items"] + work[step["step"]][1] * a_read
                              for step in kept) / 3600  # fmt: skip
    return found, said
