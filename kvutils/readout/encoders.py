"""What image values are compared with: features of another vision tower, such as SigLIP before any finetuning, on the very
crops that the model sees and on its token grid."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from kvutils.images import ImageLike
from kvutils.layout import pack_crops
from kvutils.models import MLM, QWEN, Encoder
from kvutils.vision import compact, over_images, prepare_images


@torch.no_grad()
def capture_encoder(
    encoder: Encoder, mlm: MLM, images: Iterable[ImageLike], *, batch_size: int = 8, to: str | torch.device | None = "cpu"
) -> list[torch.Tensor]:
    """Features (N, C) of another SigLIP tower on the crops that `capture` shows the model, on its token grid.

    They are those of the depth that the MLM reads from its own tower if that is a SigLIP too, else of the last layer. LLaVA
    families: every crop is normalised anew (and resized if the tower has another input size) and the patches are packed
    like the model's own; newline rows are zeros. Qwen2.5-VL has no crops: the tower sees the whole image squashed to its
    square input. Patch grids of another size are interpolated bilinearly.
    """
    config = encoder.model.config
    device = encoder.model.device if to is None else torch.device(to)
    own, layer = mlm.model.config.vision_config, getattr(mlm.model.config, "vision_feature_layer", None)
    if own.model_type == "siglip_vision_model" and isinstance(layer, int):
        layer = min(layer % (own.num_hidden_layers + 1), config.num_hidden_layers)
    else:
        layer = config.num_hidden_layers
    own_side = config.image_size // config.patch_size

    def run(pictures: Sequence[Image.Image], names: Sequence[str]) -> list[torch.Tensor]:
        vision = prepare_images(mlm, pictures, names)
        if mlm.family == QWEN:
            pixels = encoder.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        else:
            pixels = _renormalise(vision.pixels.float(), mlm.processor.image_processor, encoder.processor)
            if pixels.shape[-1] != config.image_size:
                pixels = F.interpolate(pixels, (config.image_size, config.image_size), mode="bicubic", antialias=True)
        pixels = pixels.to(encoder.model.device, encoder.model.dtype)
        states = encoder.model(pixels, output_hidden_states=True).hidden_states[layer]
        squares = states.transpose(1, 2).unflatten(2, (own_side, own_side))  # (crops, C, rows, columns)
        if mlm.family == QWEN:
            grids = [layout.grids["base"] for layout in vision.layouts]
            packed = [_resampled(square[None], grid)[0] for square, grid in zip(squares, grids, strict=True)]
        else:
            crops = _resampled(squares, vision.layouts[0].grids["base"]).split(vision.crops)
            sizes = [layout.image_size for layout in vision.layouts]
            packed = pack_crops(mlm, list(crops), sizes, states.new_zeros(states.shape[-1]))
        return [compact(item, device) for item in packed]

    return list(over_images(run, images, batch_size))


def _resampled(squares: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, C, rows, columns) -> (B, grid rows * grid columns, C)."""
    if squares.shape[-2:] != grid:
        squares = F.interpolate(squares.float(), grid, mode="bilinear", antialias=True).to(squares.dtype)
    return squares.flatten(2).transpose(1, 2)


def _renormalise(pixels: torch.Tensor, old, new) -> torch.Tensor:
    """From the mean and deviation of one image processor to those of another."""
    numbers = torch.tensor([old.image_std, old.image_mean, new.image_mean, new.image_std], device=pixels.device)
    std, mean, new_mean, new_std = numbers[..., None, None]
    return (pixels * std + mean - new_mean) / new_std
