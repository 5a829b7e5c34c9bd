"""Pictures -> pixels -> what the vision tower and the projector make of them: the one vision pass that feeds everything."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TypeVar

import numpy as np
import torch
from accelerate.utils import align_module_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image
from tqdm import tqdm
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from kvutils.checkpoints import NEXT, ONEVISION, QWEN
from kvutils.errors import ImageError, MemoryLimitError, ModelError, ParameterError, at_least
from kvutils.images import ImageLike, open_image
from kvutils.layout import TokenLayout, build_layout, pack_crops, tiling
from kvutils.models import MLM

log = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")


def over_images(run: Callable[..., list[R]], images: Iterable[ImageLike], batch_size: int, progress: bool = False) -> Iterator[R]:
    """What run(opened images, their names in errors) gives, in order: `batch_size` images at a time, fewer as `in_halves`."""
    if isinstance(images, str | PathLike | Image.Image | np.ndarray | torch.Tensor) or not isinstance(images, Iterable):
        raise ParameterError(f"images must be a list or another iterable of pictures, not a single {type(images).__name__}; write [picture]")
    named = ((one, str(one) if isinstance(one, str | PathLike) else f"images[{i}]") for i, one in enumerate(images))
    opened = ((open_image(one, name), name) for one, name in named)
    total = len(images) if isinstance(images, Sequence) else None
    return in_batches(lambda some: run(*zip(*some, strict=True)), opened, batch_size, progress, total)


def in_batches(run: Callable[[Sequence[T]], list[R]], items: Iterable[T], batch_size: int, progress: bool = False,
               total: int | None = None) -> Iterator[R]:
    """The results of run(items), one per item and in order: `batch_size` items at a time, fewer as `in_halves`."""
    at_least("batch_size", batch_size)
    source, total = iter(items), len(items) if isinstance(items, Sequence) else total
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        while batch := list(itertools.islice(source, batch_size)):
            yield from in_halves(run, batch)
            bar.update(len(batch))


def in_halves(run: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """run(items), one result per item; where memory does not suffice, the results of its halves, one after the other. A smaller
    batch may change a result's last bits (as another GPU does): it is logged. MemoryLimitError where one item does not fit."""
    try:
        return run(items)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        said = str(error).splitlines()[0]
    # Out of the handler: it would hold the frames, and with them the tensors, of what has failed.
    clear_device_cache(garbage_collection=True)
    if len(items) == 1:
        raise MemoryLimitError(f"one image does not fit the memory that is left ({said}). Free the device of other work, use a "
                               "smaller model, fewer layers, a larger device, or dataclasses.replace(mlm, base_view_only=True) "
                               "for LLaVA, max_pixels=... for Qwen.")
    half = len(items) // 2
    log.warning("a batch of %d does not fit the memory: taken in halves (%s)", len(items), said)
    return in_halves(run, items[:half]) + in_halves(run, items[half:])


@dataclass
class VisionInputs:
    """Preprocessed images, on the model's device. pixels: LLaVA families (crops of all images, 3, S, S), the base view of an
    image first; Qwen2.5-VL (patches of all images, patch values). layouts: one per image; `prepare_text` places their slots.
    crops: crops per image (LLaVA). grids (n, 3): temporal, rows and columns of unmerged patches (Qwen)."""

    pixels: torch.Tensor
    layouts: list[TokenLayout]
    crops: list[int] | None = None
    grids: torch.Tensor | None = None


def prepare_images(mlm: MLM, images: Sequence[Image.Image], names: Sequence[str] | None = None) -> VisionInputs:
    """Preprocess upright RGB images as the model looks at them; sizes may differ. names: images in errors."""
    if mlm.base_view_only if mlm.family == QWEN else mlm.max_pixels is not None:
        raise ParameterError("base_view_only is for the LLaVA families, which have several views, max_pixels for Qwen2.5-VL")
    if mlm.pad_to_square and not mlm.base_view_only:
        raise ParameterError("pad_to_square is of the base view alone: set base_view_only too")
    if mlm.family == QWEN:
        return _prepare_qwen(mlm, list(images), names or [f"images[{index}]" for index in range(len(images))])
    side, config = mlm.model.config.vision_config.image_size, mlm.model.config
    if not mlm.base_view_only:
        theirs, ours = ([tuple(size) for size in each.image_grid_pinpoints] for each in (mlm.processor.image_processor, config))
        if theirs != ours:
            raise ModelError(f"the image processor of {mlm.name} cuts tiles by image_grid_pinpoints {theirs}, its configuration places them by {ours}")
    # With one square resolution there is one tile to cut, and to drop: the base view is the same either way.
    processor, options = mlm.processor.image_processor, {"image_grid_pinpoints": [[side, side]]} if mlm.base_view_only else {}
    shown = [_padded(image, processor.image_mean) for image in images] if mlm.pad_to_square else list(images)
    batch = processor(images=shown, return_tensors="pt", **options)
    crops = [1 + (tall // side) * (wide // side) for tall, wide in (tiling(mlm, image.size) for image in images)]
    pixels = torch.cat([views[:count] for views, count in zip(batch["pixel_values"], crops, strict=True)])
    return VisionInputs(pixels.to(mlm.device, mlm.dtype), [build_layout(mlm, image.size) for image in images], crops=crops)


def _padded(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """In the middle of a square of the mean colour, as LLaVA-OneVision's processor pads the images of a prompt with several."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), tuple(int(255 * value) for value in mean))
    square.paste(image, [(longest - side) // 2 for side in image.size])
    return square


def _prepare_qwen(mlm: MLM, images: list[Image.Image], names: Sequence[str]) -> VisionInputs:
    for name, (width, height) in zip(names, (image.size for image in images), strict=True):
        if max(width, height) > 200 * min(width, height):  # the limit of Qwen's own resize
            raise ImageError(f"{name}: {width}x{height} is too thin for Qwen2.5-VL (at most 200:1)")
    merge = mlm.processor.image_processor.merge_size
    batches = [_within(mlm, image) for image in images]
    grids = torch.cat([batch["image_grid_thw"] for batch in batches])
    tokens = [(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]
    layouts = [build_layout(mlm, image.size, grid) for image, grid in zip(images, tokens, strict=True)]
    pixels = torch.cat([batch["pixel_values"] for batch in batches]).to(mlm.device, mlm.dtype)
    return VisionInputs(pixels, layouts, grids=grids.to(mlm.device))


def _within(mlm: MLM, image: Image.Image) -> BatchFeature:
    """What Qwen2.5-VL's processor makes of a picture, in at most `max_pixels`: its own resize exceeds them for thin pictures."""
    processor, largest = mlm.processor.image_processor, mlm.max_pixels
    if largest is None:
        return processor(images=[image], return_tensors="pt")
    token = processor.patch_size * processor.merge_size
    at_least("max_pixels", largest, token**2)
    smallest = min(processor.size["shortest_edge"], largest)
    height, width = smart_resize(image.height, image.width, token, smallest, largest)
    if height * width > largest:
        most = largest // token**2  # tokens
        short = min(height // token, width // token, math.isqrt(most))
        long = min(max(height, width) // token, most // short)
        size = (long * token, short * token) if width > height else (short * token, long * token)
        image, smallest, largest = image.resize(size, processor.resample), size[0] * size[1], size[0] * size[1]
    return processor(images=[image], return_tensors="pt", size={"shortest_edge": smallest, "longest_edge": largest})


def encode_images(mlm: MLM, vision: VisionInputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The vision pass. Per image, on its token grid: tower features (N, C_v) and projector output (N, C_h). The tower features
    are what the projector reads: the configured feature layer, unpadded, shrunk and packed like the tokens (newline rows are
    zeros). Qwen2.5-VL merges 2x2 patches in its projector: its tower features are the mean of each 2x2 group, in image order (the
    tower itself works in window order)."""
    with align_module_device(mlm.model.model):  # as in `forward`: offloaded, `image_newline` is read without going through it
        states, projected = (_encode_qwen if mlm.family == QWEN else _encode_llava)(mlm, vision)
    for layout, tower, tokens in zip(vision.layouts, states, projected, strict=True):
        if not len(layout) == len(tower) == len(tokens):
            raise ModelError(f"{mlm.name}: {len(layout)} tokens laid out, {len(tower)} tower and {len(tokens)} projected: "
                             "do model and processor belong together?")  # fmt: skip
    return states, projected


def _encode_llava(mlm: MLM, vision: VisionInputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    inner, config = mlm.model.model, mlm.model.config
    image_sizes = [layout.image_size for layout in vision.layouts]
    if mlm.family == NEXT and mlm.base_view_only:  # the class always tiles; this is its `get_image_features` for images of one crop
        states = _feature_states(config, inner.vision_tower(vision.pixels, output_hidden_states=True))
        projected = pack_crops(mlm, list(inner.multi_modal_projector(states)[:, None]), image_sizes, inner.image_newline)
    else:
        sizes = torch.tensor([(height, width) for width, height in image_sizes])
        # More than one image per prompt is how the class is told not to tile.
        images = [max(2, len(image_sizes))] if mlm.base_view_only else [1] * len(image_sizes)
        options = {"batch_num_images": images} if mlm.family == ONEVISION else {}
        output = inner.get_image_features(vision.pixels, sizes, return_dict=True, **options)
        states, projected = _feature_states(config, output), list(output.pooler_output)
    return pack_crops(mlm, list(states.split(vision.crops)), image_sizes, states.new_zeros(states.shape[-1])), projected


def _feature_states(config, output) -> torch.Tensor:
    """(crops, g*g, C_v) the vision-tower states that the projector reads."""
    layers = [config.vision_feature_layer] if isinstance(config.vision_feature_layer, int) else config.vision_feature_layer
    states = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
    return states[:, 1:] if config.vision_feature_select_strategy == "default" else states


def _encode_qwen(mlm: MLM, vision: VisionInputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    config = mlm.model.config.vision_config
    output = mlm.model.model.get_image_features(vision.pixels, vision.grids, return_dict=True)
    merged = output.last_hidden_state.unflatten(0, (-1, config.spatial_merge_size**2)).mean(1)
    window = config.window_size // (config.spatial_merge_size * config.patch_size)
    states = []
    for layout, tokens in zip(vision.layouts, merged.split([len(layout) for layout in vision.layouts]), strict=True):
        row, column = torch.from_numpy(layout.cells).to(merged.device).T
        rows, columns = layout.grids["base"]
        # Windows run row by row over the image, tokens row by row in a window: sort by (window, place in it).
        place = (row // window * columns + column // window) * rows * columns + row * columns + column
        states.append(tokens[place.argsort().argsort()])
    return states, list(output.pooler_output)


def compact(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A compact copy: a view would keep the features of the whole batch alive."""
    return tensor.to(device, copy=True, memory_format=torch.contiguous_format)
