"""Names to where a model comes from, and whether it can be had. Nothing heavy is imported here: a misspelt name, or a hub that cannot be
reached, is said before torch is loaded."""

import json
import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kvutils import data_folder
from kvutils.errors import DataError, ModelError, ask_hub, of_kind, one_of

ONEVISION, QWEN, NEXT = FAMILIES = ("llava_onevision", "qwen2_5_vl", "llava_next")  # config.model_type
_POCKET = data_folder() / "pocket"
GET = "with network it comes by itself; without, `hf download {}` elsewhere and copy HF_HOME"
_TOKENIZER = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module that SigLIP's needs
logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # its retries; what they end in is said


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from. source: hub id or saved folder; sizes: what `check_mlm` expects; revision: a commit of the hub."""

    name: str
    family: str
    source: str
    profile: str
    sizes: tuple[int, ...] = ()
    revision: str = "main"


MODELS = {spec.name: spec for spec in (
    ModelSpec("pocket", ONEVISION, str(_POCKET / "llava-onevision"), "pocket"),
    ModelSpec("pocket-2", ONEVISION, str(_POCKET / "llava-onevision-2"), "pocket"),
    ModelSpec("pocket-3", ONEVISION, str(_POCKET / "llava-onevision-3"), "pocket"),
    ModelSpec("pocket-qwen", QWEN, str(_POCKET / "qwen2_5_vl"), "pocket"),
    ModelSpec("pocket-next", NEXT, str(_POCKET / "llava_next"), "pocket"),
    ModelSpec("llava-onevision-7b", ONEVISION, "llava-hf/llava-onevision-qwen2-7b-ov-hf", "paper", (28, 28, 4, 128, 2929)),
    ModelSpec("llava-onevision-0.5b", ONEVISION, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "paper", (24, 14, 2, 64, 2929)),
    ModelSpec("qwen2.5-vl-7b", QWEN, "Qwen/Qwen2.5-VL-7B-Instruct", "paper", (28, 28, 4, 128, 391)),
    ModelSpec("qwen2.5-vl-3b", QWEN, "Qwen/Qwen2.5-VL-3B-Instruct", "paper", (36, 16, 2, 128, 391)),
    ModelSpec("llava-next-llama3-8b", NEXT, "llava-hf/llama3-llava-next-8b-hf", "paper", (32, 32, 8, 128, 2340)))}  # fmt: skip
# The pocket models before the last stage of their training, as points of C3: trained with them, not shipped.
MODELS |= {f"{name}-read": replace(each, name=f"{name}-read", source=f"{each.source}-read") for name, each in MODELS.items() if each.profile == "pocket"}
ENCODERS = {spec.name: spec for spec in (
    *(ModelSpec(f"pocket-siglip{seed}", "siglip", str(_POCKET / f"siglip{seed}"), "pocket") for seed in ("", "-2", "-3")),
    ModelSpec("siglip-so400m", "siglip", "google/siglip-so400m-patch14-384", "paper"))}  # fmt: skip


def base_name(model: str) -> str:
    """The name in `MODELS` under which all that is known of a model is found, of name@commit and of its hub id; others as they are."""
    base = model.partition("@")[0]
    return next((name for name, spec in MODELS.items() if base == name or base == spec.source and spec.profile == "paper"), model)


def original_encoder(model: str) -> str:
    """Name in `ENCODERS` of the SigLIP that an MLM is compared with: its own origin if it has one."""
    known = MODELS.get(base_name(model))
    own = known.name.removesuffix("-read").replace("pocket", "pocket-siglip") if known and known.profile == "pocket" else "siglip-so400m"
    return own if own in ENCODERS else "pocket-siglip"  # pocket-qwen's and pocket-next's towers are no SigLIP


def find_model(name: str | PathLike, known: dict[str, ModelSpec] = MODELS) -> ModelSpec:
    """The specification of a name, folder or hub id; ModelError with the names that exist for an unknown one."""
    of_kind("a model", name, (str, PathLike), "a name, a folder or a hub id")
    name = fspath(name)
    base, at, revision = name.partition("@")
    if at and not Path(name).is_dir():
        spec = find_model(base, known)
        if Path(spec.source).is_dir() or not revision:
            raise ModelError(f"{name}: a revision is a commit of a model on the hub, given as name@commit or org/name@commit")
        return replace(spec, name=spec.name if spec.name in known else name, revision=revision)
    if (known_as := base_name(name)) in known:
        return known[known_as]
    folder = name and Path(name).is_dir()
    if not folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        one_of("model", name, [*known, "a folder", "a hub id org/name"], ModelError)
    try:
        folder or validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a hub id: {str(error).splitlines()[0]}") from error
    base = Path(name).resolve().name.replace("@", "-") if folder else name  # behind @ is a commit
    return ModelSpec(f"{base}-folder" if base_name(base) in known else base, "", name, "custom")  # a folder is no published model


def look_for_model(spec: ModelSpec) -> tuple[str, float]:
    """What is said of a checkpoint that is neither here nor can be fetched, else ""; the gigabytes to fetch. One short request at most."""
    if spec.profile == "pocket" and not Path(spec.source).is_dir():
        name = spec.name.replace("-siglip", "").removesuffix("-read")  # made with the model of whose training it is a stage
        model, _, seed = name.partition("-") if name[-1].isdigit() else (name, "", "1")
        return f"{spec.source} is missing; train it with `make train MODEL={model} SEED={seed}`", 0.0
    if spec.name == "siglip-so400m" and (lacking := [name for name, module in _TOKENIZER.items() if not find_spec(module)]):
        return f"the tokenizer of {spec.source} needs {', '.join(lacking)}: pip install sentencepiece protobuf, or make install anew", 0.0
    if Path(spec.source).is_dir():
        there = Path(spec.source, "config.json").is_file()
        return "" if there else f"{spec.source} holds no config.json; expected a folder as save_pretrained writes it", 0.0
    if isinstance(config := try_to_load_from_cache(spec.source, "config.json", revision=spec.revision), str):
        index = Path(config).with_name("model.safetensors.index.json")
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        if all(index.with_name(name).is_file() for name in names):
            return "", 0.0
    get = GET.format(spec.source)
    if constants.HF_HUB_OFFLINE:
        return f"{spec.source} is not in the local cache, and HF_HUB_OFFLINE is set\n  {get}", 0.0
    try:
        info = ask_hub(spec.source, lambda: HfApi().model_info(spec.source, revision=spec.revision, timeout=10, files_metadata=True))
    except DataError as error:
        return f"not in the local cache; {error}\n  {get}", 0.0
    if (family := (info.config or {}).get("model_type", "")) not in ("", *FAMILIES, "siglip"):
        return f"{spec.source} is a {family}; kvutils reads {', '.join(FAMILIES)}", 0.0
    return "", sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")) / 1e9


def need_model(spec: ModelSpec, weights: bool = False) -> None:
    """ModelError for a checkpoint that is neither on this machine nor can be fetched: in one sentence, before the hub's client retries.
    weights: they too, not the configuration alone."""
    if Path(spec.source).is_dir():
        return  # what it lacks is said when it is read
    config = None if weights or spec.profile == "pocket" else try_to_load_from_cache(spec.source, "config.json", revision=spec.revision)
    if not isinstance(config, str) and (problem := look_for_model(spec)[0]):
        raise ModelError(f"{spec.name}: {problem}")
