"""What image values are compared with: features of another vision tower, such as SigLIP before any finetuning, on the very
crops that the model sees and on its token grid."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from kvutils.checkpoints import QWEN
from kvutils.images import ImageLike
from kvutils.layout import pack_crops
from kvutils.models import MLM, Encoder
from kvutils.vision import VisionInputs, compact, over_images, prepare_images


def depth_read(encoder: Encoder, mlm: MLM) -> int:
    """After how many layers an encoder is compared with an MLM's: as many as that reads from a SigLIP of its own, else all."""
    most = encoder.model.config.num_hidden_layers
    own, layer = mlm.model.config.vision_config, getattr(mlm.model.config, "vision_feature_layer", None)
    if own.model_type == "siglip_vision_model" and isinstance(layer, int):
        return min(layer % (own.num_hidden_layers + 1), most)
    return most


@torch.no_grad()
def capture_encoder(encoder: Encoder, mlm: MLM, images: Iterable[ImageLike], *, batch_size: int = 8) -> list[torch.Tensor]:
    """Features (N, C) on the CPU of another SigLIP tower on the crops that `capture` shows the model, on its token grid."""

    def run(pictures: Sequence[Image.Image], names: Sequence[str]) -> list[torch.Tensor]:
        states = encode_prepared(encoder, mlm, prepare_images(mlm, pictures, names), pictures)
        return [compact(item, torch.device("cpu")) for item in states]

    return list(over_images(run, images, batch_size))


@torch.no_grad()
def encode_prepared(encoder: Encoder, mlm: MLM, vision: VisionInputs, pictures: Sequence[Image.Image],
                    head: bool = False, own: bool = False) -> list[torch.Tensor]:  # fmt: skip
    """Features (N, C) of one batch of pictures whose pixels are ready, on the encoder's device.

    They are those of the depth of `depth_read`; head: of the last layer, which the pooling head was trained on. own: of the MLM's own
    SigLIP tower, with head continued by the layers of `encoder` that it was cut by. LLaVA families: every crop is normalised anew (and
    resized if the tower has another input size) and the patches are packed like the model's own; newline rows are zeros. Qwen2.5-VL has
    no crops: the tower sees the whole image squashed to its square input. Patch grids of another size are interpolated bilinearly."""
    depth = depth_read(encoder, mlm)
    tower = mlm.model.model.vision_tower if own else encoder.model
    config, side = tower.config, tower.config.image_size // tower.config.patch_size
    rest = getattr(encoder.model, "vision_model", encoder.model).encoder.layers[depth:] if head else []

    if mlm.family == QWEN:
        pixels = encoder.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    elif own:
        pixels = vision.pixels
    else:
        old, new = mlm.processor.image_processor, encoder.processor
        numbers = torch.tensor([old.image_std, old.image_mean, new.image_mean, new.image_std], device=vision.pixels.device)
        std, mean, new_mean, new_std = numbers[..., None, None]
        pixels = (vision.pixels.float() * std + mean - new_mean) / new_std
        if pixels.shape[-1] != config.image_size:
            pixels = F.interpolate(pixels, (config.image_size, config.image_size), mode="bicubic", antialias=True)
    states = tower(pixels.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states[depth]
    for layer in rest:
        states = layer(states.to(encoder.model.device, encoder.model.dtype), attention_mask=None)
    squares = states.transpose(1, 2).unflatten(2, (side, side))  # (crops, C, rows, columns)
    if mlm.family == QWEN:
        grids = [layout.grids["base"] for layout in vision.layouts]
        return [_resampled(square[None], grid)[0] for square, grid in zip(squares, grids, strict=True)]
    crops = _resampled(squares, vision.layouts[0].grids["base"]).split(vision.crops)
    return pack_crops(mlm, list(crops), [layout.image_size for layout in vision.layouts], states.new_zeros(states.shape[-1]))


def _resampled(squares: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, C, rows, columns) -> (B, grid rows * grid columns, C)."""
    if squares.shape[-2:] != grid:
        squares = F.interpolate(squares.float(), grid, mode="bilinear", antialias=True).to(squares.dtype)
    return squares.flatten(2).transpose(1, 2)
