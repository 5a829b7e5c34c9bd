"""What a run of the notebooks needs, and what of it is there: data, gigabytes, memory, hours.

Nothing is downloaded and no checkpoint is loaded. Hours are those of a rehearsal of the model on such a device (`make
rehearse`, which measures whole items); without one there are none.
"""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import psutil
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache

from kvutils.datasets import FOLDERS, USES, open_dataset
from kvutils.datasets.catalog import CATALOG, data_root
from kvutils.datasets.hub import ask_hub
from kvutils.errors import DataError
from kvutils.models import ENCODERS, MODELS, ModelSpec, base_name, find_model, original_encoder
from kvutils.run.notebook import cache_root
from kvutils.store import read_json

NOTEBOOKS = ("01", "02", "03", "04", "05")
GIB = 2**30
SIZES = {"llava-onevision-7b": 8.03, "llava-onevision-0.5b": 0.89, "qwen2.5-vl-7b": 8.29, "qwen2.5-vl-3b": 3.75,
         "llava-next-llama3-8b": 8.36}  # billions of weights, as published
_ONE_MODEL = ("04",)  # the others load a second one with random weights, as a control
_NO_ENCODER = ("03", "04")  # the others compare with SigLIP
_GET = "with network it comes by itself; without, `hf download {}` elsewhere and copy HF_HOME"


def data_of(notebook: str, profile: str) -> list[str]:
    """The data sets that a notebook (by its number) reads in a profile."""
    return [*dict.fromkeys(USES[profile][notebook].values())]


def look_for_data(names: Iterable[str], options: Mapping[str, Mapping] | None = None) -> dict[str, str]:
    """What is said of each data set that does not open; its loader looks for every file that it will read."""
    missing = {}
    for name in dict.fromkeys(names):
        try:
            open_dataset(name, **(options or {}).get(name, {}))
        except DataError as error:
            missing[name] = str(error)
    return missing


def look_for_model(spec: ModelSpec) -> tuple[str, float]:
    """What is said of a checkpoint that is neither on this machine nor can be fetched, else ""; the gigabytes that loading it fetches."""
    if Path(spec.source).is_dir():
        return "", 0.0
    config = try_to_load_from_cache(spec.source, "config.json", revision=spec.revision)
    if isinstance(config, str):
        index = Path(config).with_name("model.safetensors.index.json")
        names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        if all(index.with_name(name).is_file() for name in names):
            return "", 0.0
    get = _GET.format(spec.source)
    if constants.HF_HUB_OFFLINE:
        return f"{spec.source} is not in the local cache, and HF_HUB_OFFLINE is set\n  {get}", 0.0
    try:
        info = ask_hub(spec.source, lambda: HfApi().model_info(spec.source, revision=spec.revision, timeout=10, files_metadata=True))
    except DataError as error:
        return f"not in the local cache; {error}\n  {get}", 0.0
    return "", sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")) / 1e9


def check_ready(profile: str, model: str, notebooks: Sequence[str], options: Mapping[str, Mapping] | None = None) -> None:
    """Raises DataError, one screen of what is missing and how to get it, unless every notebook can run to its end."""
    wanted = {number: data_of(number, profile) for number in notebooks}
    data = look_for_data(chain(*wanted.values()), options)
    specs = [find_model(model), *([ENCODERS[original_encoder(model)]] if set(notebooks) - set(_NO_ENCODER) else [])]
    models = [problem for problem, _ in map(look_for_model, specs) if problem]
    missing = [*models, *data.values()]
    if not missing:
        return
    if len(missing) == 1:
        raise DataError(f"Nothing was started.\n{missing[0]}")
    lines = ["Nothing was started: this is missing.", "", *(f"  model     {problem.splitlines()[0]}" for problem in models)]
    lines += [f"            {_GET.format('<id>')}", ""] if models else []
    for name, problem in _by_folder(data).items():
        about = CATALOG[name]
        lines.append(f"  {name:<12}{about.to_get:5.2g} GB  {about.how:<14} {about.licence}")
        if data_root() and (data_root() / name).is_dir():  # something is there, but not all
            lines.append(f"      {problem.splitlines()[0]}")
    lines += ["", *_next(data)]
    if ready := [number for number in notebooks if not models and not data.keys() & wanted[number]]:
        lines += ["", f'  What can run now:  make replicate PROFILE={profile} MODEL={model} NOTEBOOKS="{" ".join(ready)}"']
    lines += ["", f"  make plan PROFILE={profile} MODEL={model}    the same with gigabytes, memory and hours per notebook",
              "  make replicate                        the pocket profile: no data, no network, minutes"]  # fmt: skip
    raise DataError("\n".join(lines))


def _by_folder(missing: Mapping[str, str]) -> dict[str, str]:
    """What is missing, by the names of the catalog: two data sets may share a folder."""
    return {FOLDERS.get(name, name): problem for name, problem in missing.items()}


def _next(missing: Mapping[str, str]) -> list[str]:
    """The command that gets what is missing, [] where nothing is."""
    known = [] if os.environ.get("KVUTILS_DATA") else ["  KVUTILS_DATA is not set: export KVUTILS_DATA=/a/folder/with/space, then"]
    get = f'  make data DATASETS="{" ".join(_by_folder(missing))}"'
    return [*known, get, "    fetches what is free and says what to do for the rest"] if missing else []


def weights_on_gpu(spec: ModelSpec, notebook: str) -> float | None:
    """GiB of the weights that a notebook loads, in bfloat16 (SigLIP: 0.8); None for a model that is not a published one."""
    size = {known.source: SIZES.get(name) for name, known in MODELS.items()}.get(spec.source)
    models = 1 if notebook in _ONE_MODEL else 2
    return size and (2e9 * models * size + (0 if notebook in _NO_ENCODER else 0.86e9)) / GIB


def device_name() -> str:
    """The GPU of this machine, or what its processor is: hours are those of one such device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def rehearsal_file(model: str) -> Path:
    """Where `make rehearse` leaves the report of a model at full size: {device, hours: {notebook: hours}, peak: {notebook: GiB}}."""
    return cache_root() / "rehearsal" / f"{base_name(model)}.json"


def table(profile: str, model: str, notebooks: Sequence[str] = NOTEBOOKS) -> str:
    """The plan as text; hours and memory where a rehearsal of the model on such a device is stored."""
    spec, report = find_model(model), rehearsal_file(model)
    measured = read_json(report) if report.is_file() else {}
    measured = measured if measured.get("device") == device_name() else {}
    data = look_for_data(name for number in notebooks for name in data_of(number, profile))
    models = {each.name: look_for_model(each) for each in (spec, ENCODERS[original_encoder(model)])}
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_properties(0).total_memory / GIB:.0f} GiB, " if torch.cuda.is_available() else ""
    lines = [f"make replicate PROFILE={profile} MODEL={model}", "",
             f"device   {device_name()}, {gpus}{psutil.virtual_memory().total / GIB:.0f} GiB of main memory"]  # fmt: skip
    for name, (problem, gigabytes) in models.items():
        state = problem.splitlines()[0] if problem else f"{gigabytes:.1f} GB to download, by itself" if gigabytes else "there"
        lines.append(f"model    {name}: {state}")
    lines += ["hours    " + ("as a rehearsal measured them, on one such device" if measured else
              f"run `make rehearse MODEL={model}` for hours and for the memory of images in flight"), "",
              f"{'':<4}{'GB to get':>10}{'GPU GiB':>9}{'hours':>8}  {'can run now':<20}data sets (missing ones in brackets)"]  # fmt: skip
    for number in notebooks:
        names = data_of(number, profile)
        absent = {name: data[name] for name in names if name in data}
        gigabytes = sum(CATALOG[name].to_get for name in _by_folder(absent))
        weights = weights_on_gpu(spec, number)
        memory = f"{measured['peak'][number]:.0f}" if measured else f"> {weights:.0f}" if weights else "?"
        hours = f"{measured['hours'][number]:,.1f}" if measured else "?"
        lacks = " and ".join(["model"] * bool(models[spec.name][0]) + ["data"] * bool(absent))
        named = " ".join(f"[{name}]" if name in absent else name for name in names)
        lines.append(f"{number:<4}{gigabytes:>10.1f}{memory:>9}{hours:>8}  {f'no: {lacks}' if lacks else 'yes':<20}{named}")
    return "\n".join([*lines, "", "Notebook 02 reads what 01 has stored.", *_next(data)])
