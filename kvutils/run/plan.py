"""How much the paper profile computes: images read, text asked, probes fitted, per notebook, and what that costs a device.

Counts follow the protocol of every data set (data/claims.yaml, the loaders' defaults); where the number depends on the
draw (a support image that was read for the episode before) the larger one is taken. Costs are the model's alone unless
they were measured by a rehearsal: multiply-adds count as two operations, attention over the image included.

What a run of the notebooks needs and what of it is there: `kvutils plan --model llava-onevision-7b`.

Nothing is downloaded and no checkpoint is loaded. Hours come from a rehearsal on this machine if there was one (`make
rehearse`), else from one decoder layer that is timed now; both count the model's work of `kvutils.run.plan`, and the
second leaves out decoding of images, probes and statistics.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from architectures import architecture
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from transformers import AutoModel, AutoModelForImageTextToText

from kvutils.datasets import FOLDERS, USES, open_dataset
from kvutils.datasets.catalog import CATALOG, data_root
from kvutils.datasets.hub import ask_hub
from kvutils.errors import DataError, KVUtilsError
from kvutils.layout import build_layout, tiling
from kvutils.models import ENCODERS, MLM, MODELS, QWEN, ModelSpec, find_model, original_encoder, read_config
from kvutils.processors import load_processor, quiet_transformers
from kvutils.readout.features import STACK_BYTES
from kvutils.store import read_json

IMAGE = (640, 480)  # the usual image of COCO, by which all images are counted
SIGLIP_WEIGHTS = 428_000_000  # of so400m/14 at 384, the tower
_DRAWS, _READING_DRAWS = 20, 5  # of the random controls of notebook 03
_BLOCKS = 2 * _DRAWS + _READING_DRAWS + 6  # conditions of the blocking experiment
_CELLS = 25  # of the sweep


@dataclass(frozen=True)
class Work:
    """One measurement. reads: images read by the model, with a prefix or without; twins: how many of these also by the model
    with random weights and by SigLIP; asked: text tokens behind images that are read already; probes: probes fitted, each
    for all layers; small: base views only."""

    notebook: str
    what: str
    reads: int
    twins: int = 0
    asked: int = 0
    probes: int = 0
    small: bool = False


WORK: tuple[Work, ...] = (
    # 4 folds x 1,000 episodes of 1 + 5 images; a probe and its shuffled control each
    Work("01", "foreground segmentation", 24_000, 24_000, probes=8_000),
    Work("01", "co-segmentation", 140, 70),  # 7 classes x 10 images, read again for the saliency
    Work("01", "semantic segmentation", 752, 752),  # ImageNet-S-50 validation
    Work("01", "semantic segmentation by probe", 802, 802, probes=2),  # and 50 to train on
    Work("01", "referring segmentation", 1_934, 1_934),  # 1,500 images, 434 cut by the chunks of 25 of 10,834 sentences
    Work("01", "semantic correspondence", 24_468, 24_468),  # 12,234 pairs
    Work("01", "temporal correspondence", 1_999, 1_999),  # frames of 30 sequences
    Work("02", "the six tasks again, from stored scores", 0),
    Work("03", "variance of keys and attention to them", 1_200, 1_200, asked=200 * 4 * 20 * 2),
    # 3 x 1,000 + 14 x 100 images at most, 3 families of conditions over 28 layers, questions of 20 tokens
    Work("03", "knock-out curve", 1_600, asked=4_000 * 20 * 3 * 28),
    # 500 images with 12 different questions each: every block once; the sweep on one half, its best cell on the other
    Work("03", "POPE under blocks", 1_000, asked=6_000 * 20 * (_BLOCKS + (_CELLS + 3) // 2)),
    Work("03", "MME under blocks", 1_187, asked=2_374 * 30 * _BLOCKS),
    Work("04", "referring segmentation behind prefixes", 10_834 * 2 * 5),  # sentences x kinds of prefix x conditions
    Work("04", "domains behind prefixes", 2 * 5 * 250, probes=5),
    Work("04", "answers behind prefixes", 150 * 5, asked=150 * 12 * 20 * 5),
    # 117 + 135 items of three images, in their prompt and alone
    Work("05", "multiple choice", 252 * 3 * 2, 252 * 3 * 2, asked=252 * 80, small=True),
)


@dataclass(frozen=True)
class Costs:
    """Operations of one model: of an image of `IMAGE` size, of its base view, of a text token behind it, of SigLIP on it.
    tokens, small_tokens: image tokens of both; weights: number of weights; held: bytes of an image's features in main memory;
    stacked: bytes of what a few-shot probe and its control would read at once."""

    tokens: int
    small_tokens: int
    weights: int
    read: float
    small_read: float
    asked: float
    siglip: float
    held: int
    stacked: int

    def of(self, work: Work) -> float:
        """Operations of a measurement, without its probes."""
        read = self.small_read if work.small else self.read
        return work.reads * read + work.twins * (read + self.siglip) + work.asked * self.asked


def costs(config, processor) -> Costs:
    """Costs of an architecture; nothing is allocated."""
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForImageTextToText.from_config(config)
    mlm = MLM(model, processor, "meta", config.model_type, "")
    text = config.get_text_config()
    per_token = 2 * _weights(model.model.language_model.layers)
    tower = model.model.visual if mlm.family == QWEN else model.model.vision_tower
    per_patch = 2 * _weights(tower)
    width = text.num_attention_heads * mlm.head_dim
    sizes = _sizes(mlm)
    reads = []
    for tokens, patches in sizes:
        attention = 2 * text.num_hidden_layers * tokens**2 * width  # causal: half of the square
        reads.append(per_token * tokens + attention + per_patch * patches)
    (tokens, patches), (small_tokens, _) = sizes
    asked = per_token + 4 * text.num_hidden_layers * tokens * width + 2 * text.hidden_size * text.vocab_size
    cached = 3 * text.num_hidden_layers * mlm.num_kv_heads * mlm.head_dim  # keys, values, values of the control model
    channels = 5 + 2 * 1152 + text.hidden_size + cached
    siglip = 2 * SIGLIP_WEIGHTS * (729 if mlm.family == QWEN else patches)
    return Costs(tokens, small_tokens, _weights(model), *reads, asked, siglip, 2 * tokens * channels, 4 * 12 * tokens * cached)


def _sizes(mlm: MLM) -> list[tuple[int, int]]:
    """(image tokens, patches in the tower) of a whole image and of its base view alone."""
    if mlm.family == QWEN:
        grid = (round(IMAGE[1] / 28), round(IMAGE[0] / 28))
        tokens = len(build_layout(mlm, IMAGE, grid=grid))
        return [(tokens, 4 * tokens)] * 2
    config = mlm.model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    tall, wide = tiling(mlm, IMAGE)
    crops = 1 + (tall // config.image_size) * (wide // config.image_size)
    return [(len(build_layout(mlm, IMAGE)), crops * patches), (len(build_layout(replace(mlm, base_view_only=True), IMAGE)), patches)]


def _weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def decoder_rate(config, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Operations per second of one decoder layer of full size, measured: random weights, `tokens` tokens, best of three."""
    text = config.get_text_config()
    settings = {name: value for name, value in text.to_dict().items() if name != "layer_types"}
    with quiet_transformers(), torch.device(device):
        text = type(text).from_dict(settings | {"num_hidden_layers": 1, "vocab_size": 8})
        layer = AutoModel.from_config(text, dtype=dtype).eval()
        states = torch.randn(1, tokens, text.hidden_size, dtype=dtype)
    seconds = min(timed(lambda: layer(inputs_embeds=states, use_cache=False), device) for _ in range(3))
    return (2 * _weights(layer.layers) * tokens + 2 * tokens**2 * text.hidden_size) / seconds


def timed(run, device: torch.device) -> float:
    """Seconds of run(), its work on the device included."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


NOTEBOOKS = ("01", "02", "03", "04", "05")
GIB = 2**30
_WITHOUT_TWIN = ("04",)  # notebooks that load one model only


def data_of(notebook: str, profile: str) -> list[str]:
    """The data sets that a notebook (by its number) reads in a profile."""
    return list(USES[profile][notebook].values())


@dataclass(frozen=True)
class Found:
    """What is missing of a data set or model ("" where nothing is), as a whole message, and the gigabytes to download."""

    name: str
    problem: str
    gigabytes: float = 0.0

    @property
    def reason(self) -> str:
        return self.problem.splitlines()[0] if self.problem else ""


def look_for_data(names: Sequence[str], options: Mapping[str, Mapping] | None = None) -> dict[str, Found]:
    """Whether each data set opens; its loader looks for every file that it will read."""
    found = {}
    for name in names:
        try:
            open_dataset(name, **(options or {}).get(name, {}))
            found[name] = Found(name, "")
        except DataError as error:
            found[name] = Found(name, str(error), CATALOG[FOLDERS.get(name, name)].to_get)
    return found


def look_for_model(spec: ModelSpec) -> Found:
    """Whether a checkpoint is on this machine, or can be fetched."""
    if Path(spec.source).is_dir():
        return Found(spec.name, "")
    config = try_to_load_from_cache(spec.source, "config.json", revision=spec.revision or None)
    if isinstance(config, str) and _weights_beside(Path(config)):
        return Found(spec.name, "")
    get = f"with network it comes by itself; without, `hf download {spec.source}` elsewhere and copy HF_HOME"
    if constants.HF_HUB_OFFLINE:
        return Found(spec.name, f"{spec.source} is not in the local cache, and HF_HUB_OFFLINE is set\n  {get}")
    revision = spec.revision or None
    try:
        info = ask_hub(spec.source, lambda: HfApi().model_info(spec.source, revision=revision, timeout=10, files_metadata=True))
    except DataError as error:
        return Found(spec.name, f"not in the local cache; {error}\n  {get}")
    size = sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors"))
    return Found(spec.name, "", size / 1e9)  # comes by itself when it is loaded


def _weights_beside(config: Path) -> bool:
    index = config.with_name("model.safetensors.index.json")
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return all(config.with_name(name).is_file() for name in names)


def _first(error: Exception) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


def check_ready(profile: str, model: str, notebooks: Sequence[str], options: Mapping[str, Mapping] | None = None) -> None:
    """Raises DataError, one screen of what is missing and how to get it, unless every notebook can run to its end."""
    wanted = {number: data_of(number, profile) for number in notebooks}
    data = look_for_data([*dict.fromkeys(name for names in wanted.values() for name in names)], options)
    models = [look_for_model(find_model(model))]
    models += [look_for_model(ENCODERS[original_encoder(model)])] if set(notebooks) - {"03", "04"} else []
    missing = [each for each in (*models, *data.values()) if each.problem]
    if not missing:
        return
    if len(missing) == 1:
        raise DataError(f"Nothing was started.\n{missing[0].problem}")
    lines = ["Nothing was started: this is missing.", ""]
    lines += [f"  model     {each.reason}" for each in models if each.problem]
    if any(each.problem for each in models):
        lines += ["            with network it comes by itself; without, `hf download <id>` elsewhere and copy HF_HOME", ""]
    folders = {FOLDERS.get(name, name): each for name, each in data.items() if each.problem}
    if folders and not os.environ.get("KVUTILS_DATA"):
        lines += ["  data      KVUTILS_DATA is not set: export KVUTILS_DATA=/a/folder/with/space", ""]
    for name, each in folders.items():
        about = CATALOG[name]
        lines.append(f"  {name:<12}{about.to_get:5.2g} GB  {about.how:<14} {about.licence}")
        if data_root() and (data_root() / name).is_dir():  # something is there, but not all
            lines.append(f"      {each.reason}")
    if folders:
        lines += ["", f'  make data DATASETS="{" ".join(folders)}"', "    fetches what is free and says what to do for the rest"]
    ready = [n for n in notebooks if not any(data[name].problem for name in wanted[n]) and not any(m.problem for m in models)]
    if ready:
        lines += ["", f'  What can run now:  make replicate PROFILE={profile} MODEL={model} NOTEBOOKS="{" ".join(ready)}"']
    lines += ["", f"  make plan PROFILE={profile} MODEL={model}    the same with gigabytes, memory and hours per notebook",
              "  make replicate                        the pocket profile: no data, no network, minutes"]  # fmt: skip
    raise DataError("\n".join(lines))


def speed_here(model: str, price: Costs, config):
    """`Speed`, measured by a rehearsal on this device, or from one layer timed now."""
    from rehearse import Speed, stored_speed  # which imports this module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (stored := stored_speed(model, device)) is not None:
        return stored
    dtype, tokens = (torch.bfloat16, price.tokens) if device.type == "cuda" else (torch.float32, 128)
    return Speed.from_rate(decoder_rate(config, device, dtype, tokens), price, "one decoder layer, timed now")


def _architecture(spec: ModelSpec) -> tuple:
    """(configuration, processor) of a published model, or those of the checkpoint."""
    published = [name for name, known in MODELS.items() if known.profile == "paper" and known.source == spec.source]
    if published:
        return architecture(published[0])
    config = read_config(spec)
    return config, load_processor(spec.source, config.model_type, spec.revision)


def device_name() -> str:
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        return f"{gpus} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores); no CUDA device"


def memory_needed(price: Costs, notebook: str) -> float:
    """GiB of a GPU: weights in bfloat16 (twice, with the control of random weights), a batch of 8 images in flight, and the
    features that a probe reads, with their copies. Batches shrink where there is less; weights do not."""
    weights = 2 * price.weights * (1 if notebook in _WITHOUT_TWIN else 2) + (0.9e9 if notebook not in ("03", "04") else 0)
    batch = 8 * price.tokens * 2 * 3 * 20_000  # three of the widest states of the decoder, and the tower's alike
    probes = 4 * min(STACK_BYTES, price.stacked) if notebook in ("01", "04") else 0
    return (weights + batch + probes) / GIB


def table(profile: str, model: str, notebooks: Sequence[str] = NOTEBOOKS, options: Mapping[str, Mapping] | None = None) -> str:
    """The plan as text."""
    spec = find_model(model)
    data = look_for_data([*dict.fromkeys(name for n in notebooks for name in data_of(n, profile))], options)
    found = [look_for_model(spec), look_for_model(ENCODERS[original_encoder(model)])]
    lines = [f"make replicate PROFILE={profile} MODEL={model}", "", f"device   {device_name()}, "
             f"{psutil.virtual_memory().total / GIB:.0f} GiB of main memory"]  # fmt: skip
    for each in found:
        state = each.reason or ("there" if not each.gigabytes else f"{each.gigabytes:.1f} GB to download, by itself")
        lines.append(f"model    {each.name}: {state}")
    price, speed = None, None
    try:
        config, processor = _architecture(spec)
        price = costs(config, processor)
        speed = speed_here(model, price, config)
        lines.append(f"speed    {speed.about}; an image of 640 x 480 has {price.tokens:,} tokens and takes {speed.read:.3g} s")
        lines.append(f"memory   features of an image take {price.held / 2**20:.0f} MiB of main memory; notebook 01 holds a clip of DAVIS "
                     f"at once, about a hundred frames ({100 * price.held / GIB:.0f} GiB)")  # fmt: skip
    except (KVUtilsError, OSError, ValueError) as error:
        lines.append(f"speed    not known before the configuration of {model} is there ({_first(error)})")
    lines += ["", f"{'':<10}{'data present':<30}{'missing':<34}{'GB to get':>10}{'GPU GiB':>9}{'PFLOP':>8}{'hours here':>12}  can run now"]
    for number in notebooks:
        names = data_of(number, profile)
        absent = [name for name in names if data[name].problem]
        folders = {FOLDERS.get(name, name) for name in absent}
        gigabytes = sum(CATALOG[name].to_get for name in folders)
        works = [work for work in WORK if work.notebook == number]
        cost = [f"{memory_needed(price, number):.0f}", f"{sum(map(price.of, works)) / 1e15:,.0f}",
                f"{sum(map(speed.seconds, works)) / 3600:,.1f}"] if price and speed else ["?"] * 3  # fmt: skip
        lacks = ["model"] * bool(found[0].problem) + ["data"] * bool(absent)
        can = f"no: {' and '.join(lacks)}" if lacks else "yes"
        rows = zip(_wrapped([n for n in names if n not in absent]), _wrapped(absent), strict=True)
        for line, (there, not_there) in enumerate(rows):
            if line == 0:
                lines.append(f"{number:<10}{there:<30}{not_there:<34}{gigabytes:>10.1f}{cost[0]:>9}{cost[1]:>8}{cost[2]:>12}  {can}")
            elif there or not_there:
                lines.append(f"{'':<10}{there:<30}{not_there:<34}")
    lines += ["", "Notebook 02 reads what 01 has stored. PFLOP: 10^15 operations of the model; hours: on one such device."]
    lacking = dict.fromkeys(FOLDERS.get(name, name) for name, each in data.items() if each.problem)
    if lacking:
        lines += [f'Next:  make data DATASETS="{" ".join(lacking)}"' + ("" if os.environ.get("KVUTILS_DATA") else
                  "     (after export KVUTILS_DATA=/a/folder/with/space)")]  # fmt: skip
    return "\n".join(lines)


def _wrapped(names: Sequence[str], width: int = 32, lines: int = 8) -> list[str]:
    """Names in at most `lines` lines, two to a line where they fit."""
    out = [""]
    for name in names:
        if out[-1] and len(out[-1]) + len(name) + 1 > width - 4:
            out.append("")
        out[-1] = f"{out[-1]} {name}".strip()
    return out + [""] * (lines - len(out))
