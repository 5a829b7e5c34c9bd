"""Features of another vision tower (SigLIP before MLM fine-tuning) on the crops and the grid of an MLM."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from kvutils.errors import LayerError
from kvutils.images import ImageLike
from kvutils.inputs import compact, open_batches, prepare_images
from kvutils.layout import pack_crops
from kvutils.memory import in_halves
from kvutils.models import MLM, QWEN, Encoder


@torch.no_grad()
def capture_encoder(
    encoder: Encoder,
    mlm: MLM,
    images: Iterable[ImageLike],
    *,
    layer: int | None = None,
    base_view_only: bool | None = None,
    max_pixels: int | None = None,
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
        raise LayerError(f"state {layer} does not exist: {encoder.name} has 0..{config.num_hidden_layers}")
    own_side = config.image_size // config.patch_size

    def run(named: Sequence[tuple[Image.Image, str]]) -> list[torch.Tensor]:
        batch, names = zip(*named, strict=True)
        vision = prepare_images(mlm, batch, base_view_only, max_pixels, names)
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
