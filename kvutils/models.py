"""Names to loaded models: three families of multimodal language models (MLMs) behind one small interface, and SigLIP."""

import gc
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_max_memory
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvutils.checkpoints import ENCODERS, FAMILIES, QWEN, ModelSpec, find_model, need_model
from kvutils.errors import KVUtilsError, MemoryLimitError, ModelError, ParameterError, at_least, of_kind, one_of, writing
from kvutils.layout import check_mlm, check_tower
from kvutils.processors import PROMPTS, load_processor, quiet_transformers, render, turn_of

QWEN_MAX_PIXELS = 1280 * 28 * 28  # of a picture for Qwen2.5-VL: 1280 tokens, the upper end that its model card recommends
IN_MEMORY = "in memory"  # the revision of a model that was wrapped
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # of a checkpoint's folder, beside its weights: configuration, tokenizer, template
_PROBE = "kvutils-prefix"  # stands for a prefix, to see where a chat template puts it


@dataclass(repr=False)
class MLM:
    """A multimodal language model with its processor; all sizes come from the configuration.

    How it looks at pictures (`dataclasses.replace(mlm, ...)` for another way, the weights are shared): base_view_only
    (LLaVA), only the picture squashed to a square, no tiles; pad_to_square with it, not squashed but padded with the mean
    colour, which is how LLaVA-OneVision is shown several images; max_pixels (Qwen2.5-VL), scaled down to at most so many.
    prompts: the form of its prompts in data/prompts.yaml. One thread at a time may use a model: blocked keys are hooks on its layers."""

    model: PreTrainedModel
    processor: Any
    name: str
    family: str
    revision: str
    configuration: str = ""
    base_view_only: bool = False
    max_pixels: int | None = None
    pad_to_square: bool = False
    prompts: str = "paper"

    def __post_init__(self):  # L, H, G, D of the vocabulary
        text = self.text_config = self.model.config.get_text_config()
        self.num_layers, self.num_heads = text.num_hidden_layers, text.num_attention_heads
        self.num_kv_heads = text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.tokenizer, self.image_token_id = self.processor.tokenizer, self.model.config.image_token_id
        one_of("form of prompts", self.prompts, PROMPTS)
        self._turn = turn_of(self.processor, self.prompts, self.family)
        self.image_backend = "pil" if type(self.processor.image_processor).__name__.endswith("Pil") else "torchvision"  # which resizes

    def __repr__(self) -> str:
        heads = f"{self.num_heads} query and {self.num_kv_heads} key-value heads of {self.head_dim}"
        where = f"{self.dtype} on {self.device}, {self.attention}{', base view only' if self.base_view_only else ''}"
        return f"MLM {self.name} ({self.family}, {self.revision})\n  {self.num_layers} layers, {heads}, {where}"

    @property
    def settings(self) -> dict:
        """All that results depend on, JSON-able: stored parts are reused only where it is the same, and the provenance shows it."""
        return {"model": self.name, "family": self.family, "revision": self.revision, "dtype": str(self.dtype).removeprefix("torch."),
                "configuration": weights_sample(self.model) if self.revision == IN_MEMORY else self.configuration,
                "attention": self.attention, "image_backend": self.image_backend, "base_view_only": self.base_view_only,
                "max_pixels": self.max_pixels, "pad_to_square": self.pad_to_square, "prompts": self.prompts}  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def attention(self) -> str:  # "sdpa", "eager" or a flash variant
        return self.text_config._attn_implementation

    @property
    def device(self) -> torch.device:
        """Where inputs go. With weights offloaded by accelerate this is where the embedding is executed."""
        embedding = self.model.get_input_embeddings()
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if device is None else torch.empty(0, device=device).device

    def prompt(self, question: str | None = None, prefix: str | None = None, images: int = 1) -> str:
        """The text `prefix + images + question` as the model's chat template writes it. Published LLaVA templates move images to
        the front of a message. If that would put the prefix after the image, prefix, image tokens and question are given to the
        template as one text, a line each."""
        token = self.processor.image_token
        for name, text in (("prefix", prefix or ""), ("question", question or "")):
            of_kind(name, text, str, "a text")
            if token in text or not text.isascii() and text != text.encode(errors="replace").decode():  # of a terminal in another code
                raise ParameterError(f"{name} must be UTF-8 text without the image token {token!r}, which kvutils places; found {text!r}")
        rest = [{"type": "image"}] * images + ([{"type": "text", "text": question}] if question else [])
        rendered = self._render([{"type": "text", "text": prefix}] * bool(prefix) + rest)
        probe = self._render([{"type": "text", "text": _PROBE}] + rest) if prefix else ""
        if 0 <= probe.find(token) < probe.find(_PROBE):
            rendered = self._render([{"type": "text", "text": "\n".join([prefix] + [token] * images + [question or ""])}])
        before, *others = rendered.split(token)
        if len(others) != images or (prefix and prefix.strip() not in before):
            raise ParameterError(f"the chat template of {self.name} wrote {len(others)} image tokens {token!r} for {images} "
                                 f"image(s), or does not put the prefix before them: {rendered[:200]!r}")  # fmt: skip
        return rendered

    def _render(self, content: list[dict]) -> str:
        if not getattr(self.processor, "chat_template", None):
            raise ParameterError(f"the processor of {self.name} has no chat template")
        return render(self.processor, content, self._turn)


@dataclass(repr=False)
class Encoder:
    """A SigLIP vision tower of its own, such as the one an MLM was built from."""

    model: SiglipVisionModel
    processor: Any
    name: str
    revision: str
    configuration: str = ""

    @property
    def settings(self) -> dict:
        """All that its features depend on, as of an `MLM`."""
        return {"encoder": self.name, "revision": self.revision, "configuration": self.configuration, "dtype": str(self.model.dtype).removeprefix("torch.")}

    def __repr__(self) -> str:
        layers, channels = self.model.config.num_hidden_layers, self.model.config.hidden_size
        return f"Encoder {self.name} ({self.revision})\n  {layers} layers of {channels} channels, {self.model.dtype} on {self.model.device}"


def load_mlm(name: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
             attention: str = "sdpa", device_map: str | dict | None = None, untrained: bool = False, seed: int = 0,
             max_pixels: int = 0, prompts: str = "paper") -> MLM:
    """Load a model by its name in `MODELS`, a folder, or a hub id of one of the three families ("id@revision" for a commit).

    device: default CUDA if there is one, of several processes to each its own. dtype: default float32 on CPU and for pocket
    models, else bfloat16 (on GPUs that have none float16, Qwen2.5-VL float32). device_map: as in accelerate, not with `device`; default
    `placement`. untrained: the same configuration with the random initialisation of its class under `seed` (control).
    max_pixels: of a picture, for Qwen2.5-VL alone (0: `QWEN_MAX_PIXELS`, 1280 tokens, or fewer if the checkpoint's own bound is lower; of the
    published one it is 16,384). prompts: the form in which it is asked (data/prompts.yaml).
    Only safetensors are read. Raises ParameterError, MemoryLimitError, ModelError also where `check_mlm` finds another model than expected.

    >>> kv.load_mlm("pocket", device="cpu").num_layers
    12
    """
    spec = find_model(name)
    at_least("max_pixels (or 0)", max_pixels, 0)
    at_least("seed", seed, 0)
    one_of("attention", attention, ("sdpa", "eager", "flash_attention_2", "flash_attention_3"))
    one_of("form of prompts", prompts, PROMPTS)
    if device_map is not None and (device is not None or untrained):
        raise ParameterError("device_map places a trained checkpoint itself: pass no device and no untrained")
    chosen, device = device, usable_device(device)
    need_model(spec, weights=not untrained)
    with _reading(spec, device):
        config = AutoConfig.from_pretrained(spec.source, revision=spec.revision)
        one_of(f"family of {spec.name}", config.model_type, FAMILIES, ModelError)
        if max_pixels and config.model_type != QWEN:
            raise ParameterError(f"max_pixels is for Qwen2.5-VL; {spec.name} is a {config.model_type}, which cuts pictures into tiles")
        options = {"dtype": _dtype(dtype, replace(spec, family=config.model_type), device), "attn_implementation": attention}
        if chosen is None and device_map is None:
            device_map = placement(config, options["dtype"], device)
        processor = load_processor(spec.source, config.model_type, spec.revision)
        if untrained:
            with torch.random.fork_rng(devices=[]):  # on the CPU: the same weights on every machine
                torch.default_generator.manual_seed(seed)
                model = AutoModelForImageTextToText.from_config(config, **options)
        else:
            model = _pretrained(AutoModelForImageTextToText, spec, **options, device_map=device_map)
        if device_map is None:
            model.to(device)
        elif untrained:
            dispatch_model(model, device_map)
    if getattr(tower := getattr(model.model, "vision_tower", None), "use_head", False):
        tower.use_head = False  # SigLIP's pooled output, which no language model reads
    mlm = replace(wrap_mlm(model, processor, spec.name), prompts=prompts)
    if mlm.family == QWEN:
        mlm.max_pixels = max_pixels or min(QWEN_MAX_PIXELS, processor.image_processor.size["longest_edge"])
    mlm.revision, mlm.configuration = f"untrained seed {seed}" if untrained else _revision(spec), _checksum(spec.source, SMALL_FILES)
    if spec.profile != "pocket":
        check_mlm(mlm, spec.sizes)
    return mlm


def wrap_mlm(model: PreTrainedModel, processor, name: str = "custom", base_view_only: bool | None = None) -> MLM:
    """Use a model that is already in memory; it is put into evaluation mode. base_view_only: None for no tile where its only one would
    repeat the base view, as in the pocket models; False for a model that was trained with such a tile. Raises ModelError for another kind.

    >>> kv.wrap_mlm(mlm.model, mlm.processor, "mine").name     # what AutoModelForImageTextToText and AutoProcessor load
    'mine'
    """
    one_of("model family", getattr(getattr(model, "config", None), "model_type", type(model).__name__), FAMILIES, ModelError)
    if not all(map(hasattr, (getattr(model, "model", None), model, processor, processor), ("language_model", "lm_head", "tokenizer", "image_processor"))):
        raise ModelError("expected a model with lm_head, as AutoModelForImageTextToText makes it (of an adapter: merge_and_unload()), and its processor, "
                         f"with a tokenizer and an image processor, found {type(model).__name__} and {type(processor).__name__}")  # fmt: skip
    if "longrope" in str(getattr(model.config.get_text_config(), "rope_parameters", "")):
        raise ModelError(f"{name} has rotary embeddings of type longrope, which depend on the longest prompt of a batch: keys would as well")
    if model.config.model_type != QWEN:
        check_tower(name, model.config)
    side, sizes = getattr(model.config.vision_config, "image_size", None), getattr(model.config, "image_grid_pinpoints", None) or []
    views = [list(size) for size in sizes] == [[side, side]] if base_view_only is None else base_view_only
    return MLM(model.eval(), processor, name, model.config.model_type, IN_MEMORY, base_view_only=views)


def need_mlm(mlm: object) -> None:
    """ParameterError for all but an `MLM`, such as its name, and for one in training mode, whose dropout and checkpoints change what is read."""
    of_kind("the model", mlm, MLM, 'an MLM, as load_mlm("pocket") gives it')
    if any(part.training for part in mlm.model.modules() if isinstance(part, PreTrainedModel)):
        raise ParameterError(f"{mlm.name} is in training mode, or a part of it: call mlm.model.eval() first")


def load_encoder(name: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Encoder:
    """Load a SigLIP vision tower by its name in `ENCODERS`, a folder or a hub id; device, dtype as for `load_mlm`, and its errors (ModelError, ...).

    >>> kv.load_encoder("pocket-siglip", device="cpu").model.config.hidden_size     # C
    128
    """
    spec, device = find_model(name, ENCODERS), usable_device(device)
    need_model(spec)
    with _reading(spec, device), quiet_transformers():
        model = _pretrained(SiglipVisionModel, spec, dtype=_dtype(dtype, spec, device)).to(device)
        processor = SiglipImageProcessorPil.from_pretrained(spec.source, revision=spec.revision)
    return Encoder(model.eval(), processor, spec.name, _revision(spec), _checksum(spec.source, SMALL_FILES))


@contextmanager
def _reading(spec: ModelSpec, device: torch.device) -> Iterator[None]:
    """What goes wrong while weights are read, in words."""
    try:
        with writing(f"the files of {spec.name} (below HF_HOME)"):
            yield
    except KVUtilsError:
        raise
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(f"the weights of {spec.name} do not fit {device} beside what is there ({error}). Free it, use a "
                               "smaller model, or device_map='auto' over several devices.") from error  # fmt: skip
    except Exception as error:  # the libraries raise whatever their parsers do at a damaged file
        get = ("Is every file of it whole?" if Path(spec.source).is_dir() else f"With network it comes by itself or with `hf download "
               f"{spec.source}`; without, copy it to another machine's HF_HOME, or pass a folder.")  # fmt: skip
        raise ModelError(f"{spec.name} cannot be loaded from {spec.source}: {str(error) or type(error).__name__}\nExpected a folder as "
                         f"save_pretrained writes it (config.json, weights, processor) or a model of the hub. {get}") from error


def _pretrained(model_class, spec: ModelSpec, **options) -> PreTrainedModel:
    options |= {"revision": spec.revision, "use_safetensors": True}
    model, info = model_class.from_pretrained(spec.source, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"])):  # it would go on with random weights
        raise ModelError(f"{spec.name}: {len(missing)} weights missing or misshapen in {spec.source}: {missing[0]}")
    return model


def placement(config, dtype: torch.dtype, device: torch.device) -> dict[str, int | str] | None:
    """Module -> device, as accelerate maps it: all on one GPU where that leaves room, else over all GPUs, then the CPU.
    None where there is no GPU, or each process has one of its own."""
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return None
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    gc.collect()
    torch.cuda.empty_cache()  # of a model that was put away
    memory = {place: int(0.8 * free) for place, free in get_max_memory().items()}  # the rest is for activations and features
    return infer_auto_device_map(model, memory, list(model._no_split_modules))  # accelerate before 1.15 takes a set for one name


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of a name, or the default one of `load_mlm`; ParameterError for one that this machine cannot compute on."""
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        if (found := torch.empty(0, device=device or "cpu").device).type != "meta":  # on which nothing is computed
            return found
        raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, TypeError) as error:
        said = str(error).splitlines()[0][:200]
        raise ParameterError(f"device {device!r} is not usable: expected cpu, cuda or cuda:1, for example ({said})") from error


def _dtype(dtype: str | torch.dtype | None, spec: ModelSpec, device: torch.device) -> torch.dtype:
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        one_of("dtype", name, ("float32", "bfloat16", "float16", "float64"))
        if (spec.family, name) == (QWEN, "float16"):
            raise ParameterError(f'the vision tower of {spec.name} exceeds float16, and it answers "!!!!": take bfloat16 or float32')
        return getattr(torch, name)
    if device.type == "cpu" or spec.profile == "pocket":
        return torch.float32
    # GPUs before Ampere, such as the T4, only emulate bfloat16, many times slower.
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if not emulated else torch.float32 if spec.family == QWEN else torch.float16


def _revision(spec: ModelSpec) -> str:
    """Commit on the hub, or the checksum of a folder's weights."""
    if not Path(spec.source).is_dir():  # just loaded, so it is in the cache; transformers 5 does not keep the commit
        config = try_to_load_from_cache(spec.source, "config.json", revision=spec.revision)
        return Path(config).parent.name if isinstance(config, str) else "unknown"
    return _checksum(spec.source, ("*.safetensors",))


def _checksum(folder: str, patterns: Sequence[str]) -> str:
    """Of the files of a folder that match; "" of what is none, such as a hub id, where the commit tells all."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in Path(folder).glob(pattern)):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return f"sha256:{digest.hexdigest()[:16]}" if Path(folder).is_dir() else ""


def weights_sample(model: PreTrainedModel) -> str:
    """Checksum of the configuration and of some values of every weight: another training of a model in memory is another model."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, each in model.state_dict().items():
        tensor = isinstance(each, torch.Tensor)  # torch's quantised modules keep packed ones and dtypes as well
        digest.update(f"{name} {tuple(each.shape) if tensor else each}".encode())
        if tensor and not each.is_meta:  # offloaded by accelerate
            digest.update(each.detach().flatten()[:: max(1, each.numel() // 64)].cpu().double().numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"
