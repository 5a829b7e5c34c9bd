"""Name -> where a model comes from: the published checkpoints by hub id, the pocket ones by folder, and any other.

Is a checkpoint what the code expects? Asked whenever one is loaded, before hours are spent on it.

Everything that can be derived is derived (the processor's own token count against the layout's, the layers that are
there against the configuration's); for the published models the numbers of the paper's protocol are compared as well.

Name -> loaded model. Three families of multimodal language models (MLMs) behind one small interface.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model, infer_auto_device_map
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, SiglipVisionModel
from transformers.utils import logging as transformers_logging

from kvutils import data_folder
from kvutils.errors import MemoryLimitError, ModelError, ParameterError
from kvutils.layout import build_layout
from kvutils.processors import image_backend, load_processor, load_siglip_image_processor

ONEVISION, QWEN, NEXT = FAMILIES = ("llava_onevision", "qwen2_5_vl", "llava_next")  # config.model_type
_POCKET = data_folder() / "pocket"


@dataclass(frozen=True)
class ModelSpec:
    """Where a named model comes from: `source` is a hub id or a folder written by `save_pretrained`; `revision` a commit
    of the hub ("" for the newest)."""

    name: str
    family: str
    source: str
    profile: str
    base_view_only: bool = False
    revision: str = ""

    @property
    def where(self) -> dict[str, str]:
        """The source and its revision, as `from_pretrained` takes them."""
        return {"pretrained_model_name_or_path": self.source} | ({"revision": self.revision} if self.revision else {})


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("pocket", ONEVISION, str(_POCKET / "llava-onevision"), "pocket", base_view_only=True),
        ModelSpec("llava-onevision-7b", ONEVISION, "llava-hf/llava-onevision-qwen2-7b-ov-hf", "paper"),
        ModelSpec("llava-onevision-0.5b", ONEVISION, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "paper"),
        ModelSpec("qwen2.5-vl-7b", QWEN, "Qwen/Qwen2.5-VL-7B-Instruct", "paper"),
        ModelSpec("qwen2.5-vl-3b", QWEN, "Qwen/Qwen2.5-VL-3B-Instruct", "paper"),
        ModelSpec("llava-next-llama3-8b", NEXT, "llava-hf/llama3-llava-next-8b-hf", "paper"),
    )
}
ENCODERS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("pocket-siglip", "siglip", str(_POCKET / "siglip"), "pocket"),
        ModelSpec("siglip-so400m", "siglip", "google/siglip-so400m-patch14-384", "paper"),
    )
}


def original_encoder(model: str) -> str:
    """Name in `ENCODERS` of the SigLIP that an MLM is compared with: its own origin if it has one."""
    spec = MODELS.get(model)
    return "pocket-siglip" if spec and spec.profile == "pocket" else "siglip-so400m"


def find_model(name: str, known: dict[str, ModelSpec] = MODELS) -> ModelSpec:
    """The specification of a name, folder or hub id; ModelError with the names that exist for an unknown one."""
    base, at, revision = name.partition("@")
    if at and not Path(name).is_dir():
        spec = find_model(base, known)
        if Path(spec.source).is_dir() or not revision:
            raise ModelError(f"{name}: a revision is a commit of a model on the hub, given as name@commit or org/name@commit")
        return replace(spec, name=name if base not in known else spec.name, revision=revision)
    if name in known:
        spec = known[name]
        if Path(spec.source).is_absolute() and not Path(spec.source).is_dir():
            raise ModelError(f"{name} is not at {spec.source}; make it with `python -m recipe.train`")
        return spec
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"{name}: a model folder must hold config.json, as save_pretrained writes it")
        return ModelSpec(Path(name).name, "", str(name), "custom")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSpec(name, "", name, "custom")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    names = ", ".join(known)
    raise ModelError(f"unknown model {name!r}{hint}; expected one of {names}, a folder, or a hub id org/name")


# layers, query heads, key-value heads, head dimension, image tokens of a 640 x 480 image (newlines included)
EXPECTED: dict[str, tuple[int, int, int, int, int]] = {
    "llava-onevision-7b": (28, 28, 4, 128, 2929),
    "llava-onevision-0.5b": (24, 14, 2, 64, 2929),
    "qwen2.5-vl-7b": (28, 28, 4, 128, 391),
    "qwen2.5-vl-3b": (36, 16, 2, 128, 391),
    "llava-next-llama3-8b": (32, 32, 8, 128, 2340),
}
_ABOUT = ("layers", "query heads", "key-value heads", "head dimension", "image tokens of a 640x480 image")
SIZES = ((640, 480), (300, 500), (96, 96))  # of the pictures that are laid out
_SHARE = 0.8  # of the free memory of a GPU may be weights; the rest is for activations and features


def check_mlm(mlm: MLM) -> None:
    """Raises ModelError, with all that differs, unless the model is one that the code was written for."""
    wrong = [*_weights(mlm), *_tokens(mlm)]
    if mlm.name in EXPECTED:
        found = (mlm.num_layers, mlm.num_heads, mlm.num_kv_heads, mlm.head_dim, _laid_out(mlm, SIZES[0]))
        wrong += [f"{about}: expected {one}, found {other}"
                  for about, one, other in zip(_ABOUT, EXPECTED[mlm.name], found, strict=True) if one != other]  # fmt: skip
    if wrong:
        raise ModelError(
            f"{mlm.name} is not what kvutils expects:\n  " + "\n  ".join(wrong) + "\nThis is another checkpoint, or another "
            "version of transformers reads it differently (requirements.txt names the one that was tested)."
        )


def _weights(mlm: MLM) -> list[str]:
    """What the decoder's modules say against the configuration."""
    layers = getattr(mlm.model.model.language_model, "layers", ())
    if len(layers) != mlm.num_layers:
        return [f"decoder layers: the configuration says {mlm.num_layers}, found {len(layers)}"]
    width = mlm.num_kv_heads * mlm.head_dim
    found = {getattr(layer.self_attn, name).weight.shape[0] for layer in layers for name in ("k_proj", "v_proj")}
    return [] if found == {width} else [f"width of keys and values: the configuration says {width}, found {sorted(found)}"]


def _tokens(mlm: MLM) -> list[str]:
    """The image token's id, and the processor's number of image tokens against the layout's."""
    token = mlm.processor.image_token
    ids = mlm.tokenizer(token, add_special_tokens=False)["input_ids"]
    if ids != [mlm.image_token_id]:
        return [f"image token {token!r}: the configuration says id {mlm.image_token_id}, the tokenizer makes {ids}"]
    if mlm.base_view_only:  # the processor would count the tile that is left out
        return []
    wrong = []
    for size in SIZES:
        expanded = mlm.processor(images=[_picture(size)], text=[token], return_tensors="pt")["input_ids"]
        theirs, ours = int((expanded == mlm.image_token_id).sum()), _laid_out(mlm, size)
        if theirs != ours:
            wrong.append(f"image tokens of a {size[0]}x{size[1]} image: the processor makes {theirs}, the layout has {ours}")
    return wrong


def _picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))


def _laid_out(mlm: MLM, size: tuple[int, int]) -> int:
    """Image tokens of the layout; Qwen2.5-VL's grid comes from its processor."""
    processor, options = mlm.processor.image_processor, {}
    if merge := getattr(processor, "merge_size", 0):
        _, rows, columns = processor(images=[_picture(size)], return_tensors="pt")["image_grid_thw"][0].tolist()
        options["grid"] = (rows // merge, columns // merge)
    return len(build_layout(mlm, size, **options))


def weight_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of the weights of a configuration's model; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return sum(each.numel() * each.element_size() for each in model.parameters())


def fits(config, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights go on this GPU; True on a CPU, and where every process has a GPU of its own."""
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return weight_bytes(config, dtype) <= _SHARE * free


_PROBE = "kvutils-prefix"  # stands for a prefix, to see where a chat template puts it
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


@dataclass
class MLM:
    """A multimodal language model with its processor; all sizes come from the configuration.

    How it looks at pictures (`dataclasses.replace(mlm, ...)` for another way, the weights are shared): base_view_only
    (LLaVA), only the picture squashed to a square, no tiles; max_pixels (Qwen2.5-VL), pictures are scaled down to so many.
    """

    model: PreTrainedModel
    processor: Any
    name: str
    family: str
    revision: str
    base_view_only: bool = False
    max_pixels: int | None = None

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def text_config(self):
        return self.model.config.get_text_config()

    @property
    def num_layers(self) -> int:
        return self.text_config.num_hidden_layers

    @property
    def num_heads(self) -> int:
        """H, query heads."""
        return self.text_config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """G, key-value heads."""
        return self.text_config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """D."""
        config = self.text_config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def device(self) -> torch.device:
        """Where inputs go. With weights offloaded by accelerate this is where the embedding is executed."""
        embedding = self.model.get_input_embeddings()
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if device is None else torch.empty(0, device=device).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def attention(self) -> str:
        """The attention backend: "sdpa", "eager" or a flash variant."""
        return self.text_config._attn_implementation

    @property
    def image_backend(self) -> str:
        """Which code resizes the images: "pil" or "torchvision" (they differ slightly)."""
        return image_backend(self.processor)

    def prompt(self, question: str | None = None, prefix: str | None = None, images: int = 1) -> str:
        """The text `prefix + images + question` as the model's chat template writes it.

        Published LLaVA templates move images to the front of a message. If that would put the prefix behind
        the image, prefix, image tokens and question are given to the template as one text, a line each.
        """
        token = self.processor.image_token
        for name, text in (("prefix", prefix), ("question", question)):
            if text and token in text:
                raise ParameterError(f"{name} must not contain the image token {token!r}: kvutils places it")
        rest = [{"type": "image"}] * images + ([{"type": "text", "text": question}] if question else [])
        rendered = self._render([{"type": "text", "text": prefix}] * bool(prefix) + rest)
        probe = self._render([{"type": "text", "text": _PROBE}] + rest) if prefix else ""
        if 0 <= probe.find(token) < probe.find(_PROBE):
            lines = "\n".join([prefix] + [token] * images + [question or ""])
            rendered = self._render([{"type": "text", "text": lines}])
        if rendered.count(token) != images:
            raise ParameterError(
                f"the chat template of {self.name} wrote {rendered.count(token)} image tokens {token!r} "
                f"for {images} image(s): {rendered[:200]!r}"
            )
        if prefix and prefix.strip() not in rendered.split(token)[0]:
            raise ParameterError(f"the chat template of {self.name} does not put the prefix before the image")
        return rendered

    def _render(self, content: list[dict]) -> str:
        if not getattr(self.processor, "chat_template", None):
            raise ParameterError(f"the processor of {self.name} has no chat template")
        message = {"role": "user", "content": content}
        return self.processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


@dataclass
class Encoder:
    """A SigLIP vision tower of its own, such as the one an MLM was built from."""

    model: SiglipVisionModel
    processor: Any
    name: str
    revision: str


def load_mlm(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "sdpa",
    device_map: str | dict | None = None,
    untrained: bool = False,
    seed: int = 0,
) -> MLM:
    """Load a model by its name in `MODELS`, a folder, or a hub id of one of the three families ("id@revision" for a commit).

    device: default CUDA if there is one, of several processes to each its own. dtype: default float32 on CPU and for
    pocket models, else bfloat16 (float16 on GPUs that have none). device_map: as in accelerate; default "auto" where the
    weights do not fit the GPU that would be used (a model without training is spread alike), not with `device`.
    untrained: the same configuration with the random initialisation of its class under `seed` (control). Only safetensors
    are read. Raises ModelError also where `check_mlm` finds the model to be another than the code expects.
    """
    spec = find_model(name)
    family, config = read_family(name, spec)
    if attention not in ATTENTIONS:
        raise ParameterError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
    if device_map is not None and (device is not None or untrained):
        raise ParameterError("device_map places a trained checkpoint itself: pass no device and no untrained")
    chosen, device = device, _device(device)
    dtype = _dtype(dtype) or _default_dtype(spec, device)
    if chosen is None and device_map is None and not fits(config, dtype, device):
        device_map = "auto"
    options = {"dtype": dtype, "attn_implementation": attention}
    try:
        processor = load_processor(spec.source, family, revision=spec.revision or None)
        if untrained and device_map is None:
            model = _random_model(config, seed, device, **options)
        elif untrained:
            model = _random_model(config, seed, torch.device("cpu"), **options)
            places = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
            model = dispatch_model(model, places)
        else:
            if device_map is not None:
                options["device_map"] = device_map
            model = _pretrained(AutoModelForImageTextToText, name, spec, **options)
        if device_map is None:
            model.to(device)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{name} cannot be loaded from {spec.source}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(f"the weights of {name} do not fit {device} beside what is there ({error}). Free it, use a "
                               "smaller model, or device_map='auto' over several devices.") from error  # fmt: skip
    revision = f"untrained seed {seed}" if untrained else _revision(spec)
    base_view_only = spec.base_view_only or _nothing_to_tile(config)
    mlm = MLM(model.eval(), processor, spec.name, family, revision, base_view_only)
    if spec.profile != "pocket":
        check_mlm(mlm)
    return mlm


def wrap_mlm(model: PreTrainedModel, processor, name: str = "custom", base_view_only: bool = False) -> MLM:
    """Use a model that is already in memory; it is put into evaluation mode."""
    family = model.config.model_type
    if family not in FAMILIES:
        raise ModelError(f"expected a model of the families {', '.join(FAMILIES)}, not {family!r}")
    base_view_only = base_view_only or _nothing_to_tile(model.config)
    return MLM(model.eval(), processor, name, family, "in memory", base_view_only)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings of transformers: 5.23 warns about the token ids of its own default SigLIP configuration."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_encoder(
    name: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Encoder:
    """Load a SigLIP vision tower by its name in `ENCODERS`, a folder or a hub id."""
    spec = find_model(name, ENCODERS)
    device = _device(device)
    dtype = _dtype(dtype) or _default_dtype(spec, device)
    try:
        with quiet_transformers():
            model = _pretrained(SiglipVisionModel, name, spec, dtype=dtype)
            processor = load_siglip_image_processor(spec.source, spec.revision or None)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be loaded from {spec.source}: {error}") from error
    return Encoder(model.to(device).eval(), processor, spec.name, _revision(spec))


def read_family(name: str, spec: ModelSpec):
    """(family, configuration) of a checkpoint; ModelError if it is not there or of another family."""
    try:
        config = AutoConfig.from_pretrained(**spec.where)
    except (OSError, ValueError) as error:
        raise ModelError(_not_there(name, spec, error)) from error
    if config.model_type not in FAMILIES:
        raise ModelError(f"{name} is a {config.model_type!r} model, not one of {', '.join(FAMILIES)}")
    return config.model_type, config


def _not_there(name: str, spec: ModelSpec, error: Exception) -> str:
    if Path(spec.source).is_dir():
        return f"{name}: no model configuration at {spec.source} ({error})"
    return (
        f"{name}: {spec.source} is neither in the local cache nor can it be fetched from the hub. With network, it comes by "
        f"itself or with `hf download {spec.source}`; without, copy it to another machine's HF_HOME, or pass the folder that "
        f"save_pretrained wrote as the model.\n  ({str(error).splitlines()[0]})"
    )


def _pretrained(model_class, name: str, spec: ModelSpec, **options) -> PreTrainedModel:
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, info = model_class.from_pretrained(**spec.where, **options)
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:  # transformers would go on with random weights
        raise ModelError(f"{name}: {len(missing)} weights missing or misshapen in {spec.source}: {missing[0]}")
    return model


def _default_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    if device.type == "cpu" or spec.profile == "pocket":
        return torch.float32
    # GPUs before Ampere, such as the T4, only emulate bfloat16, many times slower.
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulated else torch.bfloat16


def _random_model(config, seed: int, device: torch.device, **options) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, **options)


def _nothing_to_tile(config) -> bool:
    """True for a LLaVA configuration whose only resolution is one tile: it repeats the base view (pocket)."""
    side = getattr(config.vision_config, "image_size", None)
    return [list(size) for size in getattr(config, "image_grid_pinpoints", None) or []] == [[side, side]]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if device is None:
        return torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ParameterError(f"device {device!r} is not usable: {error}") from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ParameterError(f"dtype must be float32, float16 or bfloat16, not {dtype!r}")
    return found


def _revision(spec: ModelSpec) -> str:
    """Commit on the hub, or the checksum of a folder's weights."""
    if not Path(spec.source).is_dir():  # just loaded, so it is in the cache; transformers 5 does not keep the commit
        config = try_to_load_from_cache(spec.source, "config.json", revision=spec.revision or None)
        return Path(config).parent.name if isinstance(config, str) else "unknown"
    digest = hashlib.sha256()
    for path in sorted(Path(spec.source).glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:16]}"
