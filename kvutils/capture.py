"""Image keys, values and features of a batch of pictures, in one vision pass and as few layers as needed.

    captures = capture(load_mlm("pocket"), ["photo.jpg"], layers=[3, 7])
    captures[0].value(7)  # (N, G*D) image value tokens of layer 7, one row per `captures[0].layout` token

From the command line: `python -m kvutils.capture PHOTO... --out FILE.safetensors` (see --help).
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from kvutils.encoders import capture_encoder
from kvutils.errors import LayerError, ParameterError
from kvutils.images import ImageLike
from kvutils.inputs import (
    TextInputs,
    VisionInputs,
    compact,
    encode_images,
    open_batches,
    prepare_images,
    prepare_text,
)
from kvutils.layout import TokenLayout
from kvutils.memory import in_halves
from kvutils.models import MLM
from kvutils.prefill import RowCache, resolve_layers, run_layers
from kvutils.textvalues import text_values

__all__ = ["Capture", "capture", "capture_encoder", "resolve_layers", "text_values"]


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
            raise LayerError(f"layer {layer} was not captured; captured: {self.layers}")
        tensor = tensor[self.layers.index(layer)]  # (G, N, D)
        if head is None:
            return tensor.transpose(0, 1).flatten(1)
        if not 0 <= head < len(tensor):
            raise LayerError(f"head {head} does not exist: there are key-value heads 0..{len(tensor) - 1}")
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
    base_view_only: bool | None = None,
    max_pixels: int | None = None,
    batch_size: int = 8,
    to: str | torch.device | None = "cpu",
    on_capture: Callable[[int, Capture], None] | None = None,
    progress: bool = False,
) -> list[Capture] | None:
    """Capture the image tokens of any number of pictures (sizes may differ).

    The prompt is `prefix + image` under the model's chat template; it ends after the image, and the model
    runs up to the last requested layer only (not at all without keys and values). features adds encoder and
    projector. base_view_only (LLaVA) and max_pixels (Qwen) as in `prepare_images`. to: where results go
    (None: the model's device). With on_capture(index, capture) nothing is kept and None is returned, and
    `images` may be a generator: memory stays constant. A batch that does not fit the device is halved.
    Raises ImageError, LayerError, PromptError, ParameterError, MemoryLimitError.
    """
    layers = resolve_layers(mlm, layers) if keys or values else ()
    prompt = mlm.prompt(prefix=prefix)
    device = mlm.device if to is None else torch.device(to)
    kept: list[Capture] = []

    def run(named: Sequence[tuple[Image.Image, str]]) -> list[Capture]:
        batch, names = zip(*named, strict=True)
        vision = prepare_images(mlm, batch, base_view_only, max_pixels, names)
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

    embeddings = mlm.model.get_input_embeddings()(text.input_ids)
    at_image = (text.input_ids == mlm.image_token_id).unsqueeze(-1)
    tokens = torch.cat(projector).to(embeddings.device, embeddings.dtype)
    embeddings = embeddings.masked_scatter(at_image.to(embeddings.device), tokens)
    run_layers(mlm, embeddings, text.attention_mask, text.position_ids, RowCache(layers, store))
    return rows


if __name__ == "__main__":
    from kvutils.capture_cli import main

    sys.exit(main())
