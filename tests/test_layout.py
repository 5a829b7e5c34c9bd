"""The token layout, verified by looking: without attention, changed pixels change the tokens over them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import grid_layout, tiny
from torch import nn
from transformers import (
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kvutils.checkpoints import FAMILIES, NEXT, ONEVISION
from kvutils.errors import DataError, ParameterError
from kvutils.kvcache import capture
from kvutils.layout import BASE, TILES, TokenLayout, build_layout, check_mlm, tiling
from kvutils.models import wrap_mlm
from kvutils.tasks.choices import base_views
from kvutils.vision import prepare_images

RNG = np.random.default_rng(0)
PATCH = 8  # pixels of a token in the resized image, in all four tiny models
SIZES = [(50, 40), (40, 90), (97, 96), (9, 7), (210, 30), (131, 67), (20, 200), (300, 251)]  # (W, H): wide, tall, square, tiny, large


def without_mixing(mlm):
    """Zero what attention and MLPs add in the vision tower: a token depends on its own patch alone."""
    tower = mlm.model.model.visual if mlm.family == "qwen2_5_vl" else mlm.model.model.vision_tower
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("out_proj", "attn.proj", "mlp.fc2", "mlp.down_proj")):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    mlm.processor.image_processor.resample = Image.Resampling.NEAREST  # a pixel is seen in one place only
    return mlm


def pixel_steps(mlm, layout):
    """{view: [(x, y), (x, y)]}: how many image pixels one pixel of the resized image spans, and where in it the image begins."""
    size, zero = np.array(layout.image_size), np.zeros(2)
    if mlm.family == "qwen2_5_vl":
        return {BASE: [size / (np.array(layout.grids["base"])[::-1] * PATCH), zero]}
    side = mlm.model.config.vision_config.image_size
    steps = {BASE: [np.repeat(size.max(), 2) / side, (size.max() - size) // 2] if mlm.pad_to_square else [size / side, zero]}
    if "tiles" in layout.grids:
        canvas = np.array(tiling(mlm, layout.image_size))[::-1]
        steps[TILES] = [size / np.minimum(np.ceil(size * (canvas / size).min() - 1e-9), canvas), zero]
    return steps


def changed_tokens(mlm, size, blocks):
    """(layout, blocks, bool (blocks, N)): random blocks of a picture, and which tokens change when their pixels do."""
    pixels = RNG.integers(40, 90, (size[1], size[0], 3), dtype=np.uint8)
    extents = RNG.integers(1, np.maximum(2, np.array(size) // 3), (blocks, 2))
    corners = RNG.integers(0, size - extents + 1)
    blocks, images = np.hstack([corners, corners + extents]), [pixels]
    for x0, y0, x1, y1 in blocks:
        images.append(pixels.copy())
        images[-1][y0:y1, x0:x1] = 255 - pixels[y0:y1, x0:x1]
    whole, *captures = capture(mlm, [Image.fromarray(one) for one in images], keys=False, layers=0, batch_size=16)
    changed = []
    for one in captures:
        sources = (one.encoder, whole.encoder), (one.projector, whole.projector), (one.value(0), whole.value(0))
        each = [(a != b).any(1).numpy() for a, b in sources]
        assert all(np.array_equal(each[0], other) for other in each)
        changed.append(each[0])
    return whole.layout, blocks, np.stack(changed)


def tokens_with_pixels(layout, steps, block, slack):
    """Tokens whose rectangle holds a sampled pixel of the block, found from the rectangles alone.

    slack widens the block a little: a centre exactly on a pixel's border may round either way.
    """
    expected = np.zeros(len(layout), dtype=bool)
    for view in (BASE, TILES):
        tokens = np.flatnonzero((layout.view == view) & ~layout.is_newline)
        if not len(tokens):
            continue
        rects = layout.rects[tokens]
        hits = np.ones(len(tokens), dtype=bool)
        for axis in (0, 1):
            # Nearest-neighbour resizing reads the pixel under each resized pixel's centre.
            step, shift = (each[axis] for each in steps[view])
            low = np.maximum(np.round(rects[:, axis], 6), block[axis] - slack)
            high = np.minimum(np.round(rects[:, axis + 2], 6), block[axis + 2] + slack)
            centres = np.ceil(np.round((high + shift) / step - 0.5, 6)) - np.ceil(np.round((low + shift) / step - 0.5, 6))
            hits &= (high > low) & (centres > 0)
        expected[tokens] = hits
    return expected


@pytest.mark.parametrize(("family", "base_only", "sizes"), [
    ("llava_onevision", False, SIZES[:-1]), ("llava_next", False, SIZES), ("qwen2_5_vl", False, SIZES),
    ("pocket", True, [(32, 32), *SIZES[:2], (9, 7)]), ("llava_onevision", True, SIZES[:4]), ("llava_next", True, SIZES[:4]),
    ("llava_onevision", "padded", SIZES[:7]),
])  # fmt: skip
def test_changed_pixels_change_exactly_the_tokens_that_hold_them(family, base_only, sizes):
    """The base view is the picture squashed or padded to a square, with one newline; a token of padding alone never changes."""
    mlm = without_mixing(tiny(family))
    mlm = replace(mlm, base_view_only=bool(base_only), pad_to_square=base_only == "padded")
    seen = 0
    for size in sizes:
        layout, blocks, changed = changed_tokens(mlm, size, 15)
        assert not base_only or (layout.grids == {"base": (4, 4)} and len(layout) == 17 and layout.is_newline[-1])
        steps = pixel_steps(mlm, layout)
        for block, found in zip(blocks, changed, strict=True):
            assert not (found & ~tokens_with_pixels(layout, steps, block, slack=1e-3)).any(), f"{block}: extra tokens"
            assert not (tokens_with_pixels(layout, steps, block, slack=-1e-3) & ~found).any(), f"{block}: tokens missed"
            seen += found.sum()
    assert seen > 100


@pytest.mark.parametrize("size", [(300, 251), (500, 200), (120, 480)])
def test_shrunk_grid_above_anyres_max_9(size):
    """A shrunk token reads the two patches around its centre along each axis: more than its rectangle."""
    layout, blocks, changed = changed_tokens(without_mixing(tiny("llava_onevision")), size, 20)
    rows, columns = layout.grids["tiles"]
    assert rows * columns < 10.9 * 16  # shrunk to about nine tiles of 4x4
    token_size = np.nanmax(layout.rects[:, 2:] - layout.rects[:, :2], axis=0)
    centers = layout.centers
    for (x0, y0, x1, y1), found in zip(blocks, changed, strict=True):
        tiles = np.flatnonzero((layout.view == TILES) & ~layout.is_newline)
        inside = (centers[tiles] >= [x0, y0]).all(1) & (centers[tiles] < [x1 - 1, y1 - 1]).all(1)
        near = ((centers[tiles] > [x0, y0] - 1.6 * token_size) & (centers[tiles] < [x1, y1] + 1.6 * token_size)).all(1)
        big = (np.array([x1 - x0, y1 - y0]) > token_size).all()
        assert not (found[tiles] & ~near).any()
        assert not big or not (inside & ~found[tiles]).any()
    # The rectangles tile the image: neither gaps beyond the unseen rim nor overlaps.
    edges = layout.rects[layout.spatial()].reshape(rows, columns, 4)
    assert np.all(edges[:, 1:, 0] - edges[:, :-1, 2] >= -1e-6) and np.all(edges[1:, :, 1] - edges[:-1, :, 3] >= -1e-6)
    assert edges[..., 0].min() == 0 and edges[..., 2].max() > 0.9 * size[0]


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next"])  # (5000, 1) has no row of tiles at all in the second
def test_layout_fits_every_shape(family):
    mlm = tiny(family)
    for size in [(1, 1), (1, 5000), (5000, 1), (33, 35), (640, 480), (357, 1023), (72, 36)]:
        layout = prepare_images(mlm, [Image.new("RGB", size)]).layouts[0]
        rows, columns = layout.grids["tiles"]
        assert len(layout) == 16 + rows * columns + rows == len(layout.rects)
        assert layout.is_newline.sum() == rows and np.isnan(layout.rects[layout.is_newline]).all()
        real = layout.rects[~layout.is_newline]
        assert (real >= 0).all() and (real[:, 2:] <= size).all() and (real[:, 2:] >= real[:, :2]).all()
        assert layout.to_pixels(torch.ones(len(layout))).shape == size[::-1]
        middle = layout.token_at([[size[0] / 2, size[1] / 2]])[0]
        assert layout.view[middle] == (TILES if rows * columns else BASE)


def test_token_counts_of_the_published_sizes():
    """640x480: 729 + 40 rows of 54 + 40 newlines; 576 + 36 rows of 48 + 36 newlines; 17 rows of 23."""
    text = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    photo = Image.new("RGB", (640, 480))
    with torch.device("meta"):
        onevision = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(text_config=Qwen2Config(**text)))
        following = LlavaNextForConditionalGeneration(LlavaNextConfig(text_config=LlamaConfig(**text)))
    for model, processor, grid, total in (
        (onevision, LlavaOnevisionImageProcessorPil(), (40, 54), 2929),
        (following, LlavaNextImageProcessorPil(size={"shortest_edge": 336}), (36, 48), 2340),
    ):
        layout = build_layout(wrap_mlm(model, SimpleNamespace(image_processor=processor, tokenizer=None)), photo.size)
        assert (layout.grids["tiles"], len(layout)) == (grid, total)
    _, rows, columns = Qwen2VLImageProcessorPil()([photo])["image_grid_thw"][0]
    assert (rows // 2, columns // 2) == (17, 23)


def handmade(size=(8, 6), rows=2, columns=4) -> TokenLayout:
    """A base view with a newline behind each row."""
    layout = grid_layout(rows, columns + 1, (size[0] / columns * (columns + 1), size[1]))
    newline = layout.cells[:, 1] == columns
    layout.rects[newline] = np.nan
    return replace(layout, is_newline=newline, image_size=size, grids={"base": (rows, columns)})


def test_token_labels_take_the_majority_and_skip_ignored_pixels():
    layout = handmade()  # tokens of 2x3 pixels
    mask = np.zeros((6, 8), dtype=int)
    mask[:3, 0] = 2  # half of token 0: a tie, the smaller class wins
    mask[:2, 2:4] = 3  # four of six pixels of token 1
    mask[:3, 4:6] = 255  # all of token 2
    mask[:2, 6:8], mask[2, 6:8] = 255, 4  # token 3: two pixels annotated
    labels, coverage = layout.token_labels(mask)
    assert labels[:5].tolist() == [0, 3, -1, 4, -1] and (labels[5:9] == 0).all()
    assert np.allclose(coverage[:5], [1 / 2, 4 / 6, 0, 2 / 6, 0])
    with pytest.raises(DataError, match="H, W"):
        layout.token_labels(mask.T)


def test_token_labels_of_an_enlarged_image():
    layout = handmade(size=(2, 2), rows=2, columns=8)  # tokens a quarter of a pixel wide
    labels, coverage = layout.token_labels(np.array([[1, 2], [3, 4]]))
    assert labels[~layout.is_newline].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert (coverage[~layout.is_newline] == 1).all()


def test_token_at_and_centers():
    layout = handmade()
    real = ~layout.is_newline
    assert np.array_equal(layout.token_at(layout.centers[real]), np.flatnonzero(real))
    points = [[0, 0], [2, 0], [1.99, 2.99], [7.9, 5.9], [8, 6], [-5, 100]]
    assert layout.token_at(points).tolist() == [0, 1, 0, 8, 8, 5]
    with pytest.raises(DataError):
        layout.token_at([[np.nan, 1]])


@pytest.mark.parametrize(("family", "size"), [
    ("llava_onevision", (131, 67)), ("llava_onevision", (300, 251)), ("llava_next", (131, 67)), ("qwen2_5_vl", (131, 67)),
])  # fmt: skip
def test_points_and_pixels_find_their_token(family, size):
    """A point that of the nearest rectangle (in the unseen rim of a tile the next one), the highest score that of its token."""
    layout = prepare_images(tiny(family), [Image.new("RGB", size)]).layouts[0]
    for view in layout.grids:
        rects = layout.rects[layout.spatial(view)]
        for point in RNG.random((200, 2)) * size:
            gaps = np.maximum(rects[:, :2] - point, point - rects[:, 2:]).clip(min=0).max(1)
            own = gaps[np.searchsorted(layout.spatial(view), layout.token_at([point], view)[0])]
            assert own <= gaps.min() + 1e-6
    tokens, cells = layout.spatial(), layout.cells[layout.spatial()]
    inner = ((cells > 0) & (cells < cells.max(0))).all(1)  # at the border scores are continued: ties
    for token in RNG.choice(tokens[inner], 5):
        scores = torch.zeros(len(layout))
        scores[token] = 1
        row, column = np.unravel_index(int(layout.to_pixels(scores).argmax()), size[::-1])
        assert layout.token_at([[column + 0.5, row + 0.5]]).tolist() == [token]


def test_to_pixels_is_bilinear_between_token_centres():
    layout = handmade(size=(40, 60), rows=6, columns=4)
    ramp = torch.from_numpy(np.nan_to_num(layout.centers[:, 0])).float()
    pixels = layout.to_pixels(torch.stack([ramp, torch.full_like(ramp, 2.0)]))
    assert pixels.shape == (2, 60, 40)
    assert torch.allclose(pixels[0, 7, 5:35], torch.arange(5, 35) + 0.5)  # exact between the outer centres
    assert torch.allclose(pixels[0, :, 0], torch.tensor(5.0)) and torch.allclose(pixels[1], torch.tensor(2.0))
    with pytest.raises(ParameterError, match="N = "):
        layout.to_pixels(torch.zeros(3))


def test_points_masks_and_indices_of_other_forms_are_errors():
    layout = grid_layout(2, 3, (24, 16))
    shape = layout.image_size[::-1]
    points = np.array([[1.0, 2.0, 2.0], [3.0, 1.0, 0.0]])  # as COCO's key points
    for wrong in (points, np.ones((2, 4)), points[None, :, :2], [1.0, 2.0, 3.0]):
        with pytest.raises(DataError, match="expected points"):
            layout.token_at(wrong)
    assert np.array_equal(layout.token_at((1.0, 2.0)), layout.token_at(points[:1, :2])) and not len(layout.token_at([]))
    for wrong in (np.full(shape, 0.9), np.full(shape, -1), np.full(shape, np.nan)):
        with pytest.raises(DataError, match="whole numbers from 0 on"):
            layout.token_labels(wrong)
    assert layout.token_labels(np.ones(shape, bool))[0].max() == 1
    for wrong in ([len(layout)], [True]):
        with pytest.raises(ParameterError, match="expected integers below"):
            layout.select(wrong)
    assert [len(layout.select(each)) for each in ([], 0, [[0, 1], [2, 3]])] == [0, 1, 4]


def test_select_keeps_positions():
    layout = handmade()
    part = layout.select(layout.spatial())
    assert len(part) == 8 and not part.is_newline.any() and part.grids == layout.grids
    assert part.token_at([[7, 5]]).tolist() == [7]
    assert len(layout.select(layout.is_newline)) == 2
    with pytest.raises(ParameterError, match="full grid"):
        layout.select([0, 1, 6]).to_pixels(torch.zeros(3))
    with pytest.raises(ParameterError, match="view"):
        layout.spatial("tile")


@pytest.mark.parametrize("family", FAMILIES)
def test_token_counts_are_those_of_the_published_processor(family, published):
    check_mlm(published(family), pictures=[*map(tuple, np.random.default_rng(1).integers(40, 1400, (12, 2)).tolist()), (640, 480)])


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_are_the_pixels_of_the_published_processor(family, published):
    """OneVision pads each to a square with the mean colour; NeXT is shown squashed base views, which are the first of its tiles."""
    images = [Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in ((301, 500), (640, 222), (90, 90))]
    mlm = base_views(published(family))
    ours = prepare_images(mlm, images)
    theirs = mlm.processor.image_processor(images=[images] if family == ONEVISION else images, return_tensors="pt")["pixel_values"]
    theirs = theirs[:, 0] if family in (ONEVISION, NEXT) else theirs
    torch.testing.assert_close(ours.pixels, theirs, rtol=0, atol=0)
    if family == ONEVISION:
        assert not torch.equal(prepare_images(replace(mlm, pad_to_square=False), images).pixels[:2], theirs[:2])
        first = ours.layouts[0]  # 500 x 301 in a square of 500: 99 pixels above, 100 below
        _, y0, _, y1 = first.rects[: 27 * 27].T
        size = 14 * 500 / 384
        rows = first.cells[: 27 * 27, 0]
        np.testing.assert_allclose(y0, np.clip(rows * size - 99, 0, 301))
        np.testing.assert_allclose(y1, np.clip((rows + 1) * size - 99, 0, 301))
        assert (first.rects[: 27 * 27, 2:] <= (500, 301)).all() and (y1 == y0).sum() == 27 * (5 + 5)
