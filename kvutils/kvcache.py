"""Image keys, values and features of a batch of pictures, in one vision pass and as few layers as needed.

    captures = capture(load_mlm("pocket"), ["photo.jpg"], layers=[3, 7])
    captures[0].value(7)  # (N, G*D) image value tokens of layer 7, one row per `captures[0].layout` token

From the command line: `kvutils capture PHOTO... --out FILE.safetensors` (see --help)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from kvutils.errors import ParameterError, at_least, one_of
from kvutils.images import ImageLike
from kvutils.language import embed, not_finite, read_layers, resolve_layers
from kvutils.layout import TokenLayout, chosen
from kvutils.models import MLM, usable_device
from kvutils.prompts import prepare_text
from kvutils.vision import VisionInputs, compact, encode_images, over_images, prepare_images


@dataclass(eq=False, repr=False)
class Capture:
    """What one image became; tensors that were not asked for are None.

    keys, values (L, G, N, D) of `layers`, keys after rotary embedding as cached; encoder (N, C_v), the vision tower's features;
    projector (N, C_h), what enters the language model. In newline rows encoder is zero and projector the newline embedding. `value` and
    `key` raise ParameterError for what was not captured.

    >>> shot = kv.capture(mlm, [scene])[0]
    >>> shot.value(3).shape, shot.value(3, head=1).shape, shot.encoder.shape     # (N, G*D), (N, D), (N, C_v)
    (torch.Size([145, 32]), torch.Size([145, 16]), torch.Size([145, 128]))
    """

    layout: TokenLayout
    layers: tuple[int, ...]
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    encoder: torch.Tensor | None = None
    projector: torch.Tensor | None = None
    prefix: str | None = None

    def __repr__(self) -> str:
        (width, height), layers = self.layout.image_size, self.layers
        in_a_row = layers and layers == tuple(range(layers[0], layers[-1] + 1))
        layers = f"layers {layers[0]} to {layers[-1]}" if in_a_row else f"layers {', '.join(map(str, layers)) or 'none'}"
        found = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in self._tensors().items()]
        prefix = f" behind {self.prefix!r}" if self.prefix else ""
        about = f"{len(self.layout)} image tokens of a {width}x{height} picture{prefix}, {layers}"
        return f"Capture({about},\n        {', '.join(found).replace('torch.', '')})"

    def value(self, layer: int, head: int | None = None) -> torch.Tensor:
        """(N, G*D) values of a layer, heads concatenated; (N, D) of one key-value head."""
        return self._read("values", layer, head)

    def key(self, layer: int, head: int | None = None) -> torch.Tensor:
        """(N, G*D) keys of a layer, heads concatenated; (N, D) of one key-value head."""
        return self._read("keys", layer, head)

    def select(self, index) -> "Capture":
        """The capture of some tokens: integer indices, as from `layout.spatial()`, or a bool mask over N."""
        index = chosen(index, len(self.layout))
        rows = {name: t.index_select(-2, torch.from_numpy(index).to(t.device)) for name, t in self._tensors().items()}
        return replace(self, layout=self.layout.select(index), **rows)

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("keys", "values", "encoder", "projector")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _read(self, name: str, layer: int, head: int | None) -> torch.Tensor:
        if (tensor := getattr(self, name)) is None:
            raise ParameterError(f"{name} were not captured; pass {name}=True to capture")
        at_least("layer", layer, 0)
        if layer not in self.layers:
            raise ParameterError(f"layer {layer} was not captured; captured: {self.layers}")
        tensor = tensor[self.layers.index(layer)]  # (G, N, D)
        if head is not None:
            at_least("head", head, 0)
            one_of("key-value head", head, range(len(tensor)))
        return tensor.transpose(0, 1).flatten(1) if head is None else tensor[head]


@torch.no_grad()
def capture(mlm: MLM, images: Iterable[ImageLike], prefix: str | None = None, layers: str | int | Iterable[int] = "all", *,
            keys: bool = True, values: bool = True, features: bool = True, batch_size: int = 8, to: str | torch.device | None = "cpu",
            on_capture: Callable[[int, Capture], None] | None = None, progress: bool = False) -> list[Capture] | None:
    """Capture the image tokens of any number of pictures (sizes may differ).

    The prompt is `prefix + image` under the model's chat template; it ends after the image, and the model runs up to the
    last requested layer only (not at all without keys and values). How it looks at pictures is a setting of the `MLM`.
    features adds encoder and projector. to: where results go (None: the model's device). With on_capture(index, capture)
    nothing is kept and None is returned, and `images` may be a generator: memory stays constant. A batch that does not fit
    the device is halved. Raises ImageError, ParameterError, MemoryLimitError; ModelError for keys or values that are not finite.

    >>> shot = kv.capture(mlm, [scene], layers=[3, 7])[0]
    >>> shot.layers, shot.values.shape     # (L, G, N, D)
    ((3, 7), torch.Size([2, 2, 145, 16]))
    """
    layers, to = resolve_layers(mlm, layers), to if to is None else usable_device(to)
    mlm.prompt(prefix=prefix)  # one for all: a list is said to be none

    def run(pictures: Sequence[Image.Image], names: Sequence[str]) -> list[Capture]:
        shots = capture_prepared(mlm, prepare_images(mlm, pictures, names), prefix, layers, keys=keys, values=values, features=features, to=to)
        for name, shot in zip(names, shots, strict=True):
            for which, found in (("keys", shot.keys), ("values", shot.values)):
                if found is not None and not (finite := found.isfinite().flatten(1).all(1)).all():
                    raise not_finite(mlm, f"{which} of {name} that are not finite in layer {layers[int(finite.logical_not().nonzero()[0])]}, the first of them")
        return shots

    captures = over_images(run, images, batch_size, progress)
    if on_capture is None:
        if not (found := list(captures)):
            raise ParameterError("images is empty: expected at least one picture; does the pattern or folder that they come from match any?")
        return found
    for index, one in enumerate(captures):
        on_capture(index, one)
    return None


@torch.no_grad()
def capture_prepared(mlm: MLM, vision: VisionInputs, prefix: str | None | Sequence[str | None], layers: tuple[int, ...], *, keys: bool = True,
                     values: bool = True, features: bool = True, to: str | torch.device | None = None,
                     encoded: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None) -> list[Capture]:
    """As `capture`, of one batch of pictures whose pixels are ready: two models of one kind read the same ones. prefix: of all, or of each.
    encoded: what `encode_images` gave for them, if the model's tower has looked at them before."""
    layers = layers if keys or values else ()
    device = mlm.device if to is None else torch.device(to)
    wanted = ["keys"] * keys + ["values"] * values
    prefixes = [prefix] * len(vision.layouts) if prefix is None or isinstance(prefix, str) else prefix
    prompts = {each: mlm.prompt(prefix=each) for each in set(prefixes)}
    text = prepare_text(mlm, [prompts[each] for each in prefixes], vision)
    encoder, projector = encoded or encode_images(mlm, vision)
    slots = [torch.from_numpy(layout.slots).to(mlm.device) for layout in vision.layouts]
    shapes = [(len(layers), mlm.num_kv_heads, len(slot), mlm.head_dim) for slot in slots]
    rows = [{name: torch.empty(shape, dtype=mlm.dtype, device=device) for name in wanted} for shape in shapes]

    def store(position: int, *keys_and_values: torch.Tensor) -> None:
        for name, states in zip(("keys", "values"), keys_and_values, strict=True):
            for row, one, slot in zip(rows, states, slots, strict=True):
                if name in row:
                    row[name][position].copy_(one.index_select(1, slot.to(one.device)))

    if layers:
        read_layers(mlm, embed(mlm, text.input_ids, projector), text, layers, store)
    if features:
        for row, seen, entered in zip(rows, encoder, projector, strict=True):
            row |= {"encoder": compact(seen, device), "projector": compact(entered, device)}
    return [Capture(layout, layers, prefix=each, **row) for layout, each, row in zip(vision.layouts, prefixes, rows, strict=True)]
