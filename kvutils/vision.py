"""Images and prompts -> model inputs with explicit positions; the one vision pass that feeds everything."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from kvutils.errors import ImageError, ModelError, ParameterError
from kvutils.images import ImageLike, open_image
from kvutils.layout import TokenLayout, build_layout, pack_crops, tiling
from kvutils.models import MLM, NEXT, ONEVISION, QWEN


@dataclass
class VisionInputs:
    """Preprocessed images, on the model's device.

    pixels: LLaVA families (crops of all images, 3, S, S), the base view of an image first; Qwen2.5-VL
    (patches of all images, patch values). crops: crops per image (LLaVA). grids (n, 3): temporal, rows and
    columns of unmerged patches (Qwen). layouts: one per image; `prepare_text` places their slots.
    """

    pixels: torch.Tensor
    layouts: list[TokenLayout]
    crops: list[int] | None = None
    grids: torch.Tensor | None = None


def open_batches(
    images: Iterable[ImageLike], batch_size: int, progress: bool
) -> Iterator[tuple[int, list[Image.Image], list[str]]]:
    """(index of the first, opened images, their names in errors), `batch_size` at a time."""
    if batch_size < 1:
        raise ParameterError(f"batch_size must be at least 1, not {batch_size}")
    if isinstance(images, str | PathLike | Image.Image | np.ndarray | torch.Tensor):
        raise ParameterError("images must be a list or another iterable of pictures, not a single one")
    total = len(images) if isinstance(images, Sequence) else None
    source, start = iter(images), 0
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        while batch := list(itertools.islice(source, batch_size)):
            names = [
                str(image) if isinstance(image, str | PathLike) else f"images[{start + index}]"
                for index, image in enumerate(batch)
            ]
            yield start, [open_image(*pair) for pair in zip(batch, names, strict=True)], names
            start += len(batch)
            bar.update(len(batch))


def prepare_images(mlm: MLM, images: Sequence[Image.Image], names: Sequence[str] | None = None) -> VisionInputs:
    """Preprocess upright RGB images as the model looks at them; sizes may differ. names: images in errors."""
    processor = mlm.processor.image_processor
    sizes = [image.size for image in images]
    if mlm.family == QWEN:
        if mlm.base_view_only:
            raise ParameterError("base_view_only is for the LLaVA families; Qwen2.5-VL has a single view")
        for index, (width, height) in enumerate(sizes):
            if max(width, height) > 200 * min(width, height):  # the limit of Qwen's own resize
                name = names[index] if names else f"images[{index}]"
                raise ImageError(f"{name}: {width}x{height} is too thin for Qwen2.5-VL (at most 200:1)")
        options = {} if mlm.max_pixels is None else {"size": _qwen_size(processor, mlm.max_pixels)}
        batch = processor(images=list(images), return_tensors="pt", **options)
        grids, merge = batch["image_grid_thw"], processor.merge_size
        layouts = [
            build_layout(mlm, size, grid=(rows // merge, columns // merge))
            for size, (_, rows, columns) in zip(sizes, grids.tolist(), strict=True)
        ]
        pixels = batch["pixel_values"].to(mlm.device, mlm.dtype)
        return VisionInputs(pixels, layouts, grids=grids.to(mlm.device))

    if mlm.max_pixels is not None:
        raise ParameterError("max_pixels is for Qwen2.5-VL; LLaVA models have base_view_only")
    side = mlm.model.config.vision_config.image_size
    # With one square resolution there is one tile to cut, and to drop: the base view is the same either way.
    options = {"image_grid_pinpoints": [[side, side]]} if mlm.base_view_only else {}
    batch = processor(images=list(images), return_tensors="pt", **options)
    layouts = [build_layout(mlm, size) for size in sizes]
    if mlm.base_view_only:
        crops = [1] * len(images)
    else:
        crops = [1 + (tall // side) * (wide // side) for tall, wide in (tiling(mlm, size) for size in sizes)]
    pixels = torch.cat([views[:count] for views, count in zip(batch["pixel_values"], crops, strict=True)])
    return VisionInputs(pixels.to(mlm.device, mlm.dtype), layouts, crops=crops)


def _qwen_size(processor, max_pixels: int) -> dict[str, int]:
    smallest = (processor.patch_size * processor.merge_size) ** 2
    if max_pixels < smallest:
        raise ParameterError(f"max_pixels must be at least {smallest}, one token, not {max_pixels}")
    return {"shortest_edge": min(processor.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}


def encode_images(mlm: MLM, vision: VisionInputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The vision pass. Per image, on its token grid: tower features (N, C_v) and projector output (N, C_h).

    The tower features are what the projector reads: the configured feature layer, unpadded, shrunk and packed
    like the tokens (newline rows are zeros). Qwen2.5-VL merges 2x2 patches in its projector: its tower
    features are the mean of each 2x2 group, in image order (the tower itself works in window order).
    """
    with _awake(mlm.model.model):
        states, projected = _encode_qwen(mlm, vision) if mlm.family == QWEN else _encode_llava(mlm, vision)
    for layout, tower, tokens in zip(vision.layouts, states, projected, strict=True):
        if not len(layout) == len(tower) == len(tokens):
            raise ModelError(
                f"{mlm.name}: {len(layout)} tokens laid out, {len(tower)} tower and {len(tokens)} projected: "
                "do model and processor belong together?"
            )
    return states, projected


def _encode_llava(mlm: MLM, vision: VisionInputs):
    inner, config = mlm.model.model, mlm.model.config
    image_sizes = [layout.image_size for layout in vision.layouts]
    if mlm.family == NEXT and mlm.base_view_only:
        # The class always tiles; this is its `get_image_features` for images of one crop.
        output = inner.vision_tower(vision.pixels, output_hidden_states=True)
        states = _feature_states(config, output)
        crops = list(inner.multi_modal_projector(states)[:, None])
        projected = pack_crops(mlm, crops, image_sizes, inner.image_newline)
    else:
        sizes = torch.tensor([(height, width) for width, height in image_sizes])
        options = {}
        if mlm.family == ONEVISION:
            # More than one image per prompt is how the class is told not to tile.
            several = [max(2, len(image_sizes))]
            options["batch_num_images"] = several if mlm.base_view_only else [1] * len(image_sizes)
        output = inner.get_image_features(vision.pixels, sizes, return_dict=True, **options)
        states, projected = _feature_states(config, output), output.pooler_output
    newline = states.new_zeros(states.shape[-1])
    return pack_crops(mlm, list(states.split(vision.crops)), image_sizes, newline), list(projected)


def _feature_states(config, output) -> torch.Tensor:
    """(crops, g*g, C_v) the vision-tower states that the projector reads."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    states = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
    return states[:, 1:] if config.vision_feature_select_strategy == "default" else states


def _encode_qwen(mlm: MLM, vision: VisionInputs):
    config = mlm.model.config.vision_config
    output = mlm.model.model.get_image_features(vision.pixels, vision.grids, return_dict=True)
    merged = output.last_hidden_state.unflatten(0, (-1, config.spatial_merge_size**2)).mean(1)
    window = config.window_size // (config.spatial_merge_size * config.patch_size)
    states, start = [], 0
    for layout in vision.layouts:
        row, column = torch.from_numpy(layout.cells).to(merged.device).T
        rows, columns = layout.grids["base"]
        # Windows run row by row over the image, tokens row by row in a window: sort by (window, place in it).
        place = (row // window * columns + column // window) * rows * columns + row * columns + column
        states.append(merged[start + place.argsort().argsort()])
        start += len(layout)
    return states, list(output.pooler_output)


@contextlib.contextmanager
def _awake(module: torch.nn.Module) -> Iterator[None]:
    """Load a module's own offloaded weights, as accelerate's hook does around `forward`.

    `get_image_features` reads `image_newline` without going through `forward`.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def compact(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A compact copy: a view would keep the features of the whole batch alive."""
    return tensor.to(device, copy=True, memory_format=torch.contiguous_format)
