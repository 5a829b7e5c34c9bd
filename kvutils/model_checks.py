"""Is a checkpoint what the code expects? Asked whenever one is loaded, before hours are spent on it.

Everything that can be derived is derived (the processor's own token count against the layout's, the layers that are
there against the configuration's); for the published models the numbers of the paper's protocol are compared as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from kvutils.errors import ModelError
from kvutils.layout import build_layout

if TYPE_CHECKING:
    from kvutils.models import MLM

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
