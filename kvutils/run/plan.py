"""What a run of the notebooks needs, and what of it is there: data, gigabytes, memory, hours.

Nothing is downloaded and no checkpoint is loaded. Hours come from a rehearsal of the model alone (`make rehearse`, which measures whole
items; those of two models are shipped): the host's seconds as rehearsed, the models' passes as measured on this GPU or by
arithmetic on a stated one (data/sizes.yaml says how much each size reads, and how fast GPUs are)."""

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from kvutils import data_folder
from kvutils.checkpoints import ENCODERS, GET, MODELS, QWEN, ModelSpec, base_name, find_model, look_for_model, original_encoder
from kvutils.datasets import FOLDERS, USES, open_dataset
from kvutils.datasets.catalog import CATALOG, data_root
from kvutils.datasets.hub import HUB, hub_download
from kvutils.errors import DataError, one_of
from kvutils.run.notebook import cache_root
from kvutils.run.sizes import declared, left_out, parameters_of
from kvutils.store import read_json

NOTEBOOKS = ("01", "02", "03", "04", "05")
GIB = 2**30
SIZES = {"llava-onevision-7b": 8.03, "llava-onevision-0.5b": 0.89, "qwen2.5-vl-7b": 8.29, "qwen2.5-vl-3b": 3.75,
         "llava-next-llama3-8b": 8.36}  # billions of weights, as published
# What a rehearsal keeps of a step: seconds in all; of the host, beside the models' passes; of the passes the tera-operations, the
# gigabytes of weights that they read, and their number; of the rest what a GPU would do: seconds on one core, and number of operations.
COSTS = ("seconds", "host", "tflop", "gbytes", "passes", "tensor", "calls")
_NO_ENCODER = ("00", "03", "04")  # the others compare with SigLIP


def data_of(notebook: str, profile: str, parameters: Mapping = {}) -> dict[str, Mapping]:
    """{data set: its loader's options} of the real data that a notebook (by its number) reads with these parameters."""
    names, absent = USES[profile].get(notebook, {}), left_out(notebook, profile, parameters)
    return {name: parameters.get("data_options", {}).get(name, {}) for use, name in names.items()
            if use not in absent and not name.startswith("pocket-")}  # fmt: skip


def look_for_data(wanted: Mapping[str, Mapping]) -> dict[str, tuple[str, float]]:
    """{data set: (what is said of it if it is not to be had, else "", gigabytes to get)} of {data set: its loader's options}.
    Files are opened: a loader looks for every one that it will read. For copies on the hub one short request each."""

    def look(name: str) -> tuple[str, float]:
        folder, options = FOLDERS.get(name, name), wanted[name]
        try:
            if options.get("root") == HUB:
                return "", hub_download(folder)
            open_dataset(name, **options)
        except DataError as error:
            return str(error), CATALOG[folder].gigabytes if options.get("root") == HUB else CATALOG[folder].to_get
        return "", 0.0

    with ThreadPoolExecutor() as pool:  # the hub is asked for all at once
        on_hub = {name: pool.submit(look, name) for name, options in wanted.items() if options.get("root") == HUB}
    found = {}
    for name in wanted:
        print(f"looking for {name} ...", file=sys.stderr, flush=True)
        found[name] = on_hub[name].result() if name in on_hub else look(name)
    return found


def check_ready(profile: str, model: str, notebooks: Mapping[str, Mapping]) -> None:
    """Raises DataError, one screen of what is missing and how to get it, unless every one of the notebooks {number: parameters}
    can run to its end. It takes seconds: before five notebooks start, not in each."""
    wanted = {number: data_of(number, profile, parameters) for number, parameters in notebooks.items()}
    specs = [find_model(model), *([ENCODERS[original_encoder(model)]] if set(notebooks) - set(_NO_ENCODER) else [])]
    with ThreadPoolExecutor() as pool:
        models = [problem for problem, _ in pool.map(look_for_model, specs) if problem]
    data = {name: found for name, found in look_for_data(_together(wanted)).items() if found[0]}
    missing = [*models, *(problem for problem, _ in data.values())]
    if not missing:
        return
    if len(missing) == 1:
        raise DataError(f"Nothing was started.\n{missing[0]}")
    from_hub = any(options.get("root") == HUB for options in _together(wanted).values())
    sizes = {f" SIZE={parameters['size']}" for parameters in notebooks.values() if "size" in parameters}
    this = f"PROFILE={profile} MODEL={model}{' DATA=hub' if from_hub else ''}{''.join(sizes)}"
    lines = ["Nothing was started: this is missing.", "", *(f"  model     {problem.splitlines()[0]}" for problem in models)]
    lines += [f"            {GET.format('<id>')}", ""] if models else []
    for name, (problem, gigabytes) in _by_folder(data).items():
        about = CATALOG[name]
        lines.append(f"  {name:<12}{gigabytes:5.2g} GB  {about.how:<14} {about.licence}")
        if from_hub or data_root() and (data_root() / name).is_dir():  # something is there, but not all
            lines.append(f"      {problem.splitlines()[0]}")
    lines += ["", *([] if from_hub else _next(data))]
    if ready := [number for number in notebooks if not models and not data.keys() & wanted[number]]:
        lines += ["", f'  What can run now:  make replicate {this} NOTEBOOKS="{" ".join(ready)}"']
    lines += ["", f"  make plan {this}    the same with gigabytes, memory and hours per notebook",
              "  make replicate                        the pocket profile: no data, no network, minutes"]  # fmt: skip
    raise DataError("\n".join(lines))


def _together(wanted: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """{data set: options} over notebooks; several read RefCOCO and POPE, from one place."""
    return {name: options for each in wanted.values() for name, options in each.items()}


def _by_folder(missing: Mapping) -> dict:
    """What is missing, by the names of the catalog: two data sets may share a folder."""
    return {FOLDERS.get(name, name): problem for name, problem in missing.items()}


def _next(missing: Mapping[str, object]) -> list[str]:
    """The command that gets what is missing, [] where nothing is."""
    known = [] if os.environ.get("KVUTILS_DATA") else ["  KVUTILS_DATA is not set: export KVUTILS_DATA=/a/folder/with/space, then"]
    get = f'  make data DATASETS="{" ".join(_by_folder(missing))}"'
    return [*known, get, "    fetches what is free and says what to do for the rest"] if missing else []


def weights_on_gpu(spec: ModelSpec, notebook: str, each: int = 2) -> float | None:
    """GiB of the weights that a notebook loads, of so many bytes each: a model, another with random weights as its control, SigLIP (0.8);
    None for a model that is not a published one."""
    size = {known.source: SIZES.get(name) for name, known in MODELS.items()}.get(spec.source)
    return size and (2 * each * 1e9 * size + (0 if notebook in _NO_ENCODER else each / 2 * 0.86e9)) / GIB


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
        gpu = next((name for name in gpus if re.search(rf"\b{name}(?!\d)", device_name().lower())), "h100") if gpu is None else gpu.lower()
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


def table(profile: str, model: str, notebooks: Sequence[str] = NOTEBOOKS, size: str = "full", source: str = "files", gpu: str | None = None) -> str:
    """The plan as text. size, source: SIZE and DATA; gpu: hours are those of one such (`hours_of`)."""
    if gpu is not None:
        one_of("GPU", gpu.lower(), declared()["gpus"])
    spec, report = find_model(model), find_rehearsal(model)
    chosen = {number: parameters_of(number, profile, size, source) for number in notebooks}
    lost = {number: left_out(number, profile, each) for number, each in chosen.items()}
    unknown = f"run `make rehearse MODEL={model}` to know them" if base_name(model) in MODELS else "known of published models alone"
    hours, said = hours_of(report, size, gpu, lost) if report else ({}, unknown)
    wanted = {number: data_of(number, profile, each) for number, each in chosen.items()}
    data = look_for_data(_together(wanted))
    models = {each.name: look_for_model(each) for each in (spec, ENCODERS[original_encoder(model)])}
    stated = gpu.lower() if gpu is not None else "" if torch.cuda.is_available() else "h100"
    cards = [torch.cuda.get_device_properties(i).total_memory / GIB for i in range(torch.cuda.device_count())]
    room = declared()["gpus"][stated]["gib"] if stated else sum(cards)
    whole = spec.family == QWEN and not (declared()["gpus"][stated].get("bf16", True) if stated else torch.cuda.is_bf16_supported(False))
    if whole:  # see `load_mlm`
        hours, said = {}, "not known: Qwen2.5-VL is loaded in float32 where there is no bfloat16"
    assumed = f"one {stated.upper()} of {room} GiB: assumed{', as GPU= says' if gpu else '; GPU=NAME names another'}. Here: " if stated else ""
    gpus = f"{len(cards)} x {cards[0]:.0f} GiB, " if cards else ""
    how = f"{' DATA=' + source if source != 'files' else ''}{' SIZE=' + size if size != 'full' else ''}"
    lines = [f"make replicate PROFILE={profile} MODEL={model}{how}", "",
             f"device   {assumed}{device_name()}, {gpus}{psutil.virtual_memory().total / GIB:.0f} GiB of main memory"]  # fmt: skip
    for name, (problem, gigabytes) in models.items():
        state = problem.splitlines()[0] if problem else f"{gigabytes:.1f} GB to download, by itself" if gigabytes else "there"
        lines.append(f"model    {name}: {state}")
    lines += [f"hours    {said}", "", f"{'':<4}{'GB to get':>10}{'GPU GiB':>9}{'hours':>8}  {'can run now':<25}data sets (missing ones in brackets)"]
    for number in notebooks:
        absent = [name for name in wanted[number] if data[name][0]]
        gigabytes = sum({FOLDERS.get(name, name): data[name][1] for name in wanted[number]}.values())
        weights, peaks = weights_on_gpu(spec, number, 4 if whole else 2), [step["peak"] for step in report.get("steps", ()) if step["notebook"] == number]
        memory = f"{max(peaks):.0f}" if peaks and report["full_size"] and not whole else f"> {weights:.0f}" if weights else "?"
        lacks = ", ".join(["model"] * bool(models[spec.name][0]) + ["data"] * bool(absent) + ["memory"] * bool((weights or 0) > room))
        named = " ".join(f"[{name}]" if name in absent else name for name in wanted[number])
        if lost[number]:
            named += f"; without {', '.join(lost[number])}"
        lines.append(f"{number:<4}{gigabytes:>10.1f}{memory:>9}{f'{hours.get(number, 0):,.1f}' if hours else '?':>8}  "
                     f"{f'no: {lacks}' if lacks else 'yes':<25}{named}")  # fmt: skip
    missing = {name: problem for name, (problem, _) in data.items() if problem}
    get = [f"  {name}: {problem.splitlines()[0]}" for name, problem in missing.items()] if source == HUB else _next(missing)
    together = [f"{'':<23}{sum(hours[number] for number in notebooks if number in hours):>8,.1f}  together"] * bool(hours)
    return "\n".join([*lines, *together, "", "Notebook 02 reads what 01 has stored.", *get])
