"""Image keys, values and features of a batch of pictures, in one vision pass and as few layers as needed.

    captures = capture(load_mlm("pocket"), ["photo.jpg"], layers=[3, 7])
    captures[0].value(7)  # (N, G*D) image value tokens of layer 7, one row per `captures[0].layout` token

From the command line: `kvutils capture PHOTO... --out FILE.safetensors` (see --help).

Features of another vision tower (SigLIP before MLM fine-tuning) on the crops and the grid of an MLM.

Values of words: what the language model stores for a class name or a referring expression.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from kvutils.errors import ParameterError
from kvutils.images import ImageLike
from kvutils.language import RowCache, embed, in_halves, resolve_layers, run_layers
from kvutils.layout import TokenLayout, pack_crops
from kvutils.models import MLM, QWEN, Encoder
from kvutils.prompts import TextInputs, pad, prepare_text, text_positions
from kvutils.vision import VisionInputs, compact, encode_images, open_batches, prepare_images


@dataclass(eq=False)
class Capture:
    """What one image became; tensors that were not asked for are None.

    keys, values (L, G, N, D) of `layers`, keys after rotary embedding as cached; encoder (N, C_v), the vision
    tower's features; projector (N, C_h), what enters the language model. In newline rows encoder is zero and
    projector the newline embedding.
    """

    layout: TokenLayout
    layers: tuple[int, ...]
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    encoder: torch.Tensor | None = None
    projector: torch.Tensor | None = None
    prefix: str | None = None

    def __post_init__(self):
        for name in ("keys", "values", "encoder", "projector"):
            tensor = getattr(self, name)
            assert tensor is None or tensor.shape[-2] == len(self.layout), f"{name} does not fit the layout"

    @property
    def image_size(self) -> tuple[int, int]:
        """(W, H) of the original upright image."""
        return self.layout.image_size

    def value(self, layer: int, head: int | None = None) -> torch.Tensor:
        """(N, G*D) values of a layer, heads concatenated; (N, D) of one key-value head."""
        return self._read("values", layer, head)

    def key(self, layer: int, head: int | None = None) -> torch.Tensor:
        """(N, G*D) keys of a layer, heads concatenated; (N, D) of one key-value head."""
        return self._read("keys", layer, head)

    def select(self, index) -> "Capture":
        """The capture of some tokens: integer indices, as from `layout.spatial()`, or a bool mask over N."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index
        tensors = {name: getattr(self, name) for name in ("keys", "values", "encoder", "projector")}
        rows = {
            name: None if t is None else t.index_select(-2, torch.as_tensor(index, device=t.device))
            for name, t in tensors.items()
        }
        return replace(self, layout=self.layout.select(index), **rows)

    def _read(self, name: str, layer: int, head: int | None) -> torch.Tensor:
        tensor = getattr(self, name)
        if tensor is None:
            raise ParameterError(f"{name} were not captured; pass {name}=True to capture")
        if layer not in self.layers:
            raise ParameterError(f"layer {layer} was not captured; captured: {self.layers}")
        tensor = tensor[self.layers.index(layer)]  # (G, N, D)
        if head is None:
            return tensor.transpose(0, 1).flatten(1)
        if not 0 <= head < len(tensor):
            raise ParameterError(f"head {head} does not exist: there are key-value heads 0..{len(tensor) - 1}")
        return tensor[head]


@torch.no_grad()
def capture(
    mlm: MLM,
    images: Iterable[ImageLike],
    prefix: str | None = None,
    layers: str | int | Iterable[int] = "all",
    *,
    keys: bool = True,
    values: bool = True,
    features: bool = True,
    batch_size: int = 8,
    to: str | torch.device | None = "cpu",
    on_capture: Callable[[int, Capture], None] | None = None,
    progress: bool = False,
) -> list[Capture] | None:
    """Capture the image tokens of any number of pictures (sizes may differ).

    The prompt is `prefix + image` under the model's chat template; it ends after the image, and the model
    runs up to the last requested layer only (not at all without keys and values). features adds encoder and
    projector. How the model looks at pictures is said by `mlm` (base_view_only, max_pixels). to: where results go
    (None: the model's device). With on_capture(index, capture) nothing is kept and None is returned, and
    `images` may be a generator: memory stays constant. A batch that does not fit the device is halved.
    Raises ImageError, ParameterError, MemoryLimitError.
    """
    layers = resolve_layers(mlm, layers) if keys or values else ()
    prompt = mlm.prompt(prefix=prefix)
    device = mlm.device if to is None else torch.device(to)
    kept: list[Capture] = []

    def run(named: Sequence[tuple[Image.Image, str]]) -> list[Capture]:
        batch, names = zip(*named, strict=True)
        vision = prepare_images(mlm, batch, names)
        text = prepare_text(mlm, [prompt] * len(batch), vision)
        encoder, projector = encode_images(mlm, vision)
        rows = _image_rows(mlm, vision, text, projector, layers, keys, values, device)
        if features:
            for row, seen, entered in zip(rows, encoder, projector, strict=True):
                row |= {"encoder": compact(seen, device), "projector": compact(entered, device)}
        return [Capture(layout, layers, prefix=prefix, **row) for layout, row in zip(vision.layouts, rows, strict=True)]

    for start, batch, names in open_batches(images, batch_size, progress):
        for index, item in enumerate(in_halves(run, list(zip(batch, names, strict=True)))):
            if on_capture is None:
                kept.append(item)
            else:
                on_capture(start + index, item)
    return kept if on_capture is None else None


def _image_rows(
    mlm: MLM,
    vision: VisionInputs,
    text: TextInputs,
    projector: list[torch.Tensor],
    layers: tuple[int, ...],
    keys: bool,
    values: bool,
    device: torch.device,
) -> list[dict[str, torch.Tensor]]:
    """Per image {"keys", "values"}: (L, G, N, D), allocated once at the size asked for."""
    rows: list[dict[str, torch.Tensor]] = [{} for _ in vision.layouts]
    if not layers:
        return rows
    slots = [torch.from_numpy(layout.slots).to(mlm.device) for layout in vision.layouts]

    def store(position: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, wanted, states in (("keys", keys, key_states), ("values", values, value_states)):
            for row, states_of_one, slot in zip(rows, states, slots, strict=True):
                if wanted:
                    image_rows = states_of_one.index_select(1, slot.to(states.device))  # (G, N, D)
                    if name not in row:
                        shape = (len(layers), *image_rows.shape)
                        row[name] = torch.empty(shape, dtype=states.dtype, device=device)
                    row[name][position].copy_(image_rows)

    embeddings = embed(mlm, text.input_ids, projector)
    run_layers(mlm, embeddings, text.attention_mask, text.position_ids, RowCache(layers, store))
    return rows


@torch.no_grad()
def capture_encoder(
    encoder: Encoder,
    mlm: MLM,
    images: Iterable[ImageLike],
    *,
    layer: int | None = None,
    batch_size: int = 8,
    to: str | torch.device | None = "cpu",
    progress: bool = False,
) -> list[torch.Tensor]:
    """Features (N, C) of another SigLIP tower on the crops that `capture` shows the model, on its token grid.

    layer: hidden state of the tower (0: embeddings); None: the depth that the MLM reads from its own tower if
    that is a SigLIP too, else the last. LLaVA families: every crop is normalised anew (and resized if the
    tower has another input size) and the patches are packed like the model's own; newline rows are zeros.
    Qwen2.5-VL has no crops: the tower sees the whole image squashed to its square input. Patch grids of
    another size are interpolated bilinearly.
    """
    config = encoder.model.config
    device = encoder.model.device if to is None else torch.device(to)
    layer = _tower_depth(mlm, config.num_hidden_layers) if layer is None else layer
    if not -config.num_hidden_layers - 1 <= layer <= config.num_hidden_layers:
        raise ParameterError(f"state {layer} does not exist: {encoder.name} has 0..{config.num_hidden_layers}")
    own_side = config.image_size // config.patch_size

    def run(named: Sequence[tuple[Image.Image, str]]) -> list[torch.Tensor]:
        batch, names = zip(*named, strict=True)
        vision = prepare_images(mlm, batch, names)
        if mlm.family == QWEN:
            pixels = encoder.processor(images=list(batch), return_tensors="pt")["pixel_values"]
        else:
            pixels = _renormalise(vision.pixels.float(), mlm.processor.image_processor, encoder.processor)
            if pixels.shape[-1] != config.image_size:
                size = (config.image_size, config.image_size)
                pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        pixels = pixels.to(encoder.model.device, encoder.model.dtype)
        states = encoder.model(pixels, output_hidden_states=True).hidden_states[layer]
        squares = states.transpose(1, 2).unflatten(2, (own_side, own_side))  # (crops, C, rows, columns)
        if mlm.family == QWEN:
            packed = [
                _resampled(square[None], layout.grids["base"])[0]
                for square, layout in zip(squares, vision.layouts, strict=True)
            ]
        else:
            vision_config = mlm.model.config.vision_config
            g = vision_config.image_size // vision_config.patch_size
            crops = _resampled(squares, (g, g)).split(vision.crops)
            sizes = [layout.image_size for layout in vision.layouts]
            packed = pack_crops(mlm, list(crops), sizes, states.new_zeros(states.shape[-1]))
        return [compact(item, device) for item in packed]

    features: list[torch.Tensor] = []
    for _, batch, names in open_batches(images, batch_size, progress):
        features += in_halves(run, list(zip(batch, names, strict=True)))
    return features


def _resampled(squares: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, C, rows, columns) -> (B, grid rows * grid columns, C)."""
    if squares.shape[-2:] != grid:
        squares = F.interpolate(squares.float(), grid, mode="bilinear", antialias=True).to(squares.dtype)
    return squares.flatten(2).transpose(1, 2)


def _renormalise(pixels: torch.Tensor, old, new) -> torch.Tensor:
    """From the mean and deviation of one image processor to those of another."""

    def channels(values) -> torch.Tensor:
        return torch.tensor(values, device=pixels.device).view(-1, 1, 1)

    unit = pixels * channels(old.image_std) + channels(old.image_mean)
    return (unit - channels(new.image_mean)) / channels(new.image_std)


def _tower_depth(mlm: MLM, depth: int) -> int:
    """The hidden state of a SigLIP of `depth` layers that an MLM built from it reads."""
    config = mlm.model.config
    layer = getattr(config, "vision_feature_layer", None)
    if config.vision_config.model_type != "siglip_vision_model" or not isinstance(layer, int):
        return depth
    return min(depth, layer % (config.vision_config.num_hidden_layers + 1))


@torch.no_grad()
def text_values(
    mlm: MLM, texts: Sequence[str], layers: str | int | Iterable[int] = "all", batch_size: int = 64
) -> torch.Tensor:
    """(len(texts), L, G, D) float32 on the CPU: the values of each text, averaged over its tokens.

    Every text is read on its own, without image or chat template: section 3.1 needs a vector in the space of
    the image values. Special tokens that the tokenizer adds, such as a first token, are not averaged.
    """
    if isinstance(texts, str):
        raise ParameterError("texts must be a list of strings, not a single string")
    layers = resolve_layers(mlm, layers)
    tokenized = []
    for text in texts:
        if not text.strip():
            raise ParameterError("a text must hold at least one word; found an empty one")
        if mlm.processor.image_token in text:
            raise ParameterError(f"the text {text!r} holds the image token; text values need no image")
        tokenized.append(mlm.tokenizer(text, return_special_tokens_mask=True))
    result = torch.empty(len(tokenized), len(layers), mlm.num_kv_heads, mlm.head_dim)
    for start in range(0, len(tokenized), batch_size):
        batch = tokenized[start : start + batch_size]
        ids, mask = pad(mlm, [torch.tensor(item["input_ids"]) for item in batch])
        special, _ = pad(mlm, [torch.tensor(item["special_tokens_mask"]) for item in batch])
        weight = (mask * (1 - special)).float()
        weight = weight / weight.sum(1, keepdim=True)

        def store(position: int, _: torch.Tensor, values: torch.Tensor, start=start, weight=weight) -> None:
            mean = torch.einsum("bgtd,bt->bgd", values.float(), weight.to(values.device))
            result[start : start + len(mean), position] = mean.cpu()

        embeddings = mlm.model.get_input_embeddings()(ids)
        run_layers(mlm, embeddings, mask, text_positions(mask), RowCache(layers, store))
    return result
