"""Which sequence slot is which image token, and which rectangle of the original image it covers.

LLaVA-OneVision and LLaVA-NeXT: base view (the image squashed to a square, or padded to one where `MLM.pad_to_square`), then the tiles
(the image resized into the best resolution, padded, cut) row by row, a newline after every row. Qwen2.5-VL: one grid of merged 2x2
patches, no newlines. Token order, unpadding and OneVision's shrinking above anyres_max_9 are not re-implemented: grid coordinates are
packed by the model's own `pack_image_features` in place of features."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from kvutils import VOID
from kvutils.errors import DataError, ModelError, ParameterError, one_of

BASE, TILES = 0, 1
VIEWS = {"base": BASE, "tiles": TILES}


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where the N image tokens of one image are.

    slots (N,) int64 positions in the token sequence; rects (N, 4) float64 x0, y0, x1, y1 in pixels of the original upright
    image, clipped to it (NaN for newlines; empty for tokens that see only padding); cells (N, 2) int64 row and column
    within the view's grid (a newline has column = number of columns); view (N,) int64 `BASE` or `TILES`; is_newline (N,)
    bool; image_size (W, H); grids: view name -> (rows, columns).

    >>> layout = kv.capture(mlm, [scene])[0].layout
    >>> token = int(layout.token_at([(50, 30)])[0])     # under a point x, y in pixels; DataError for what is none
    >>> token, layout.rects[token].tolist()
    (42, [48.0, 24.0, 56.0, 32.0])
    """

    slots: np.ndarray
    rects: np.ndarray
    cells: np.ndarray
    view: np.ndarray
    is_newline: np.ndarray
    image_size: tuple[int, int]
    grids: dict[str, tuple[int, int]]

    def __len__(self) -> int:
        return len(self.slots)

    def __repr__(self) -> str:
        (width, height), grids = self.image_size, ", ".join(f"{name} {rows}x{columns}" for name, (rows, columns) in self.grids.items())
        return f"TokenLayout({len(self)} image tokens of a {width}x{height} picture: {grids}, {self.is_newline.sum()} newlines)"

    @property
    def centers(self) -> np.ndarray:
        """(N, 2) x, y of the middle of each rectangle; NaN for newlines."""
        return (self.rects[:, :2] + self.rects[:, 2:]) / 2

    def spatial(self, view: str | None = None) -> np.ndarray:
        """Indices of the non-newline tokens of a view; None: the tiles if there are any, else the base."""
        if view is not None:
            one_of("view", view, VIEWS)
        real = ~self.is_newline
        wanted = VIEWS[view] if view else self.view[real].max(initial=BASE)
        return np.flatnonzero(real & (self.view == wanted))

    def select(self, index) -> "TokenLayout":
        """The layout of some of the tokens (integer indices or a bool mask over N); ParameterError for others."""
        index = chosen(index, len(self))
        names = ("slots", "rects", "cells", "view", "is_newline")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def token_labels(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class of every token: the majority of the pixels in its rectangle (see `pixel_sums`), `VOID` pixels left out. mask (H,
        W) int. Returns labels (N,) int64 (-1: newline, padding, or only void pixels; the smaller class on a tie) and coverage
        (N,) float64, the share of the rectangle's pixels that carry the label."""
        if (mask := np.asarray(mask)).shape != self.image_size[::-1]:
            raise DataError(f"the mask must be (H, W) = {self.image_size[::-1]} like its image, not {mask.shape}")
        if mask.dtype.kind not in "biu" or mask.min() < 0:
            raise DataError(f"the mask must hold whole numbers from 0 on ({VOID}: no class), not {mask.min() if mask.dtype.kind == 'i' else mask.dtype}")
        labels, coverage = np.full(len(self), -1), np.zeros(len(self))
        seen = np.flatnonzero(self.seeing)
        for value in np.unique(mask[mask != VOID]):
            pixels, all_pixels = self.pixel_sums(mask == value, seen)
            share = pixels / all_pixels
            more = share > coverage[seen]
            labels[seen[more]], coverage[seen[more]] = value, share[more]
        return labels, coverage

    def pixel_sums(self, planes: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums (n, ...) of pixel planes (H, W, ...) over the pixels whose centre is in each token's rectangle, and their number
        (n,). A rectangle without a pixel centre (an enlarged image) takes the pixel under its middle."""
        low, high = np.ceil(self.rects[tokens] - 0.5).astype(int).reshape(-1, 2, 2).swapaxes(0, 1)
        under = np.minimum(np.floor(self.centers[tokens]).astype(int), np.array(self.image_size) - 1)
        thin = high <= low
        (x0, y0), (x1, y1) = np.where(thin, under, low).T, np.where(thin, under + 1, high).T
        sums = np.pad(planes.cumsum(0).cumsum(1), [(1, 0), (1, 0)] + [(0, 0)] * (planes.ndim - 2))
        return sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0], (x1 - x0) * (y1 - y0)

    def token_at(self, points: np.ndarray, view: str | None = None) -> np.ndarray:
        """(K,) index of the token of the finest (or given) view under each point. points (K, 2) x, y in image pixels, clipped to
        the image; what no token sees (a rim that no patch covers) goes to the nearest."""
        points = check_points(points)
        index, ys, xs = self._grid(view)
        row = _interval_at(ys, np.clip(points[:, 1], 0, self.image_size[1] - 1e-9))
        column = _interval_at(xs, np.clip(points[:, 0], 0, self.image_size[0] - 1e-9))
        return index[row, column]

    def to_pixels(self, scores: torch.Tensor, view: str | None = None) -> torch.Tensor:
        """Token scores (..., N) -> pixel scores (..., H, W): bilinear between centres, constant beyond."""
        if (scores := torch.as_tensor(scores)).shape[-1] != len(self):
            raise ParameterError(f"scores must end in N = {len(self)}, not {tuple(scores.shape)}")
        dtype = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
        index, ys, xs = self._grid(view)
        down = _interpolation(ys.mean(1), self.image_size[1]).to(scores.device, dtype)
        across = _interpolation(xs.mean(1), self.image_size[0]).to(scores.device, dtype)
        grid = scores[..., torch.from_numpy(index).to(scores.device)].to(dtype)
        return down @ (grid @ across.T) if len(ys) < len(xs) else down @ grid @ across.T  # the shorter side last: its sum is per pixel

    @property
    def seeing(self) -> np.ndarray:
        """(N,) bool: tokens that see pixels of the image, no newline and no padding."""
        return (self.rects[:, 2:] > self.rects[:, :2]).all(axis=1)

    def _grid(self, view: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token index (rows, columns), y intervals (rows, 2), x intervals (columns, 2); no padding lines."""
        tokens = self.spatial(view)
        tokens = tokens[self.seeing[tokens]]
        rows, row = np.unique(self.cells[tokens, 0], return_inverse=True)
        columns, column = np.unique(self.cells[tokens, 1], return_inverse=True)
        if not len(tokens) or len(tokens) != len(rows) * len(columns):
            raise ParameterError(f"these {len(tokens)} tokens of view {view!r} are no full grid; use the whole layout or .spatial()")
        index = np.empty((len(rows), len(columns)), dtype=np.int64)
        index[row, column] = tokens
        return index, self.rects[index[:, 0]][:, [1, 3]], self.rects[index[0]][:, [0, 2]]


def _interval_at(intervals: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the half-open interval that holds each value, or else of the nearest one."""
    below = np.clip(np.searchsorted(intervals[:, 0], values, side="right") - 1, 0, None)
    above = np.minimum(below + 1, len(intervals) - 1)
    nearer_above = values - intervals[below, 1] > intervals[above, 0] - values
    return np.where((values >= intervals[below, 1]) & nearer_above, above, below)


def _interpolation(centers: np.ndarray, size: int) -> torch.Tensor:
    """(size, len(centers)) weights that interpolate linearly between increasing centres at pixel centres."""
    position = np.interp(np.arange(size) + 0.5, centers, np.arange(len(centers)))
    return torch.from_numpy((1 - np.abs(position[:, None] - np.arange(len(centers)))).clip(0))


def chosen(index, count: int) -> np.ndarray:
    """(n,) int64 of integer indices into `count` tokens, or of a bool mask over them; ParameterError for others."""
    try:
        index = np.ravel(index)
        return np.arange(count)[index if len(index) else index.astype(int)]
    except IndexError as error:
        raise ParameterError(f"index: expected integers below {count}, or as many booleans ({error})") from error


def check_points(points, size: tuple[float, float] = (np.inf, np.inf), where: str = "points") -> np.ndarray:
    """(K, 2) float64 of points x, y; DataError unless all are finite and lie in a picture of (width, height), if that is given."""
    try:
        points = np.asarray(points, dtype=np.float64)
        points = points.reshape(-1, 2) if points.ndim < 2 and points.size in (0, 2) else points
        if points.ndim != 2 or points.shape[1] != 2:  # such as key points with a column of what is visible
            raise ValueError
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: expected points (K, 2) of x, y pixel coordinates, found {str(points)[:60]!r}") from error
    inside = np.isfinite(points).all(axis=1) & ((points >= 0) & (points < size) | np.isinf(size)).all(axis=1)
    if not inside.all():
        x, y = points[~inside][0]
        raise DataError(f"{where}: the point ({x:g}, {y:g}) is outside its image of {size[0]} x {size[1]} pixels; "
                        "points are x, y in pixels of the original image")  # fmt: skip
    return points


def tiling(mlm, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of the canvas that a LLaVA family cuts into tiles; (0, 0) where it is shown base views only."""
    if mlm.base_view_only:
        return 0, 0
    height, width = select_best_resolution(image_size[::-1], mlm.model.config.image_grid_pinpoints)
    return int(height), int(width)


def pack_crops(mlm, crops: list[torch.Tensor], image_sizes: list[tuple[int, int]], newline: torch.Tensor) -> list[torch.Tensor]:
    """The model's own unpadding, shrinking and newline insertion, for any features of the LLaVA families. crops: per image (P,
    g*g, C), base view first; image_sizes (W, H); newline (C,). Returns per image (N, C)."""
    option = "vision_aspect_ratio" if mlm.family == "llava_onevision" else "vision_feature_select_strategy"
    options, sizes = {option: getattr(mlm.model.config, option)}, [(height, width) for width, height in image_sizes]
    return list(mlm.model.model.pack_image_features(crops, sizes, image_newline=newline, **options)[0])


def build_layout(mlm, image_size: tuple[int, int], grid: tuple[int, int] | None = None) -> TokenLayout:
    """Layout of one image of `image_size` (W, H), with slots 0..N-1. grid: (rows, columns) of merged patches of Qwen2.5-VL, as
    its image processor chose them."""
    if mlm.family == "qwen2_5_vl":
        edges = [np.linspace(0, size, count + 1) for size, count in zip(image_size, grid[::-1], strict=True)]
        intervals = {BASE: [np.stack([ends[:-1], ends[1:]], axis=1) for ends in edges]}
        cells = _cells(*grid)
        return _layout(image_size, {"base": grid}, cells, np.zeros(len(cells), int), intervals)

    side, patch = mlm.model.config.vision_config.image_size, mlm.model.config.vision_config.patch_size
    g, (tall, wide) = side // patch, tiling(mlm, image_size)

    # Coordinates in place of features: row and column of every patch of every crop; NaN marks newlines.
    square = _cells(g, g)
    crops = [square, *(square + [i * g, j * g] for i, j in np.ndindex(tall // side, wide // side))]
    coordinates = torch.from_numpy(np.stack(crops).astype(np.float64))
    tiles = pack_crops(mlm, [coordinates], [image_size], torch.full((2,), torch.nan, dtype=torch.float64))[0].numpy()[g * g :]

    starts = np.arange(g)[:, None] * patch + [0, patch]  # of a picture squashed or padded to `side`; a rim may be unseen
    seen = [max(image_size)] * 2 if mlm.pad_to_square else image_size
    base = [starts * square / side - (square - size) // 2 for square, size in zip(seen, image_size, strict=True)]
    grids, intervals = {"base": (g, g)}, {BASE: base}
    rest = np.array([[g - 1, g]])  # the one newline that closes the base view
    if tall:
        centers = tiles[~np.isnan(tiles[:, 0])]
        rows = len(tiles) - len(centers)
        columns = len(centers) // max(1, rows)
        grids["tiles"], rest = (rows, columns), _cells(rows, columns + 1)
        down, across = np.moveaxis(centers.reshape(rows, columns, 2), 2, 0)
        blank = np.broadcast_to(np.uint8(0), (3, *image_size[::-1]))  # only its shape is read
        high, broad = get_patch_output_size(blank, (tall, wide), input_data_format="channels_first")
        intervals[TILES] = [_tile_intervals(across[0] if rows else [], g, patch, side, wide, broad, image_size[0]),
                            _tile_intervals(down[:, 0] if columns else [], g, patch, side, tall, high, image_size[1])]  # fmt: skip
    view = np.repeat([BASE, TILES if tall else BASE], [g * g, len(tiles)])
    return _layout(image_size, grids, np.concatenate([square, rest]), view, intervals)


def _cells(rows: int, columns: int) -> np.ndarray:
    """(rows * columns, 2) row and column, row by row."""
    return np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)


def _tile_intervals(centers, g: int, patch: int, side: int, canvas: int, resized: int, size: int) -> np.ndarray:
    """(n, 2) intervals in image pixels along one axis of the tile grid. centers: patch coordinates on the padded canvas,
    fractional where the model shrank the grid; every token nominally covers the spacing around its centre. The last pixels of a
    tile may belong to no patch. resized: of `canvas` pixels those that show the image, with its aspect kept; size: of the
    image."""
    centers = np.asarray(centers, dtype=np.float64)
    spacing = (centers[-1] - centers[0]) / (len(centers) - 1) if len(centers) > 1 else 1.0
    low, high = (np.round(centers + 0.5 + half, 6) for half in (-spacing / 2, spacing / 2))  # interpolated coordinates are not exact
    ends = [tile * side + (end - tile * g) * patch for end, tile in ((low, low // g), (high, np.ceil(high / g) - 1))]
    return (np.stack(ends, axis=1) - (canvas - resized) // 2) * size / resized


def _layout(image_size, grids, cells, view, intervals) -> TokenLayout:
    """Rectangles from each view's intervals of columns and rows, clipped to the image; a column beyond the grid is a newline."""
    rects, is_newline = np.full((len(cells), 4), np.nan), np.zeros(len(cells), dtype=bool)
    if len(cells) != len(view):
        raise ModelError(f"image tokens do not form the grids {grids}; this model packs them in another way")
    for name, (_, columns) in grids.items():
        mine = view == VIEWS[name]
        is_newline |= mine & (cells[:, 1] >= columns)
        tokens = np.flatnonzero(mine & ~is_newline)
        xs, ys = intervals[VIEWS[name]]
        rects[tokens] = np.concatenate([xs[cells[tokens, 1]], ys[cells[tokens, 0]]], axis=1)[:, [0, 2, 1, 3]]
    rects = np.clip(rects, 0, [*image_size, *image_size])
    return TokenLayout(np.arange(len(cells)), rects, cells, view, is_newline, tuple(image_size), dict(grids))


def check_mlm(mlm, sizes: tuple[int, ...] = (), pictures: Sequence[tuple[int, int]] = ((300, 500), (96, 96), (640, 480))) -> None:
    """Raises ModelError, with all that differs, unless the model is one that the code was written for: the weights against the
    configuration, the published processor's token counts against the layout's, published models against the paper's protocol.

    sizes: layers, query heads, key-value heads, head dimension, tokens of the last picture, () for any; pictures: their (W, H)."""
    wrong: list[str] = []
    layers, token = mlm.model.model.language_model.layers, mlm.processor.image_token
    widths = {getattr(layer.self_attn, name).weight.shape[0] for layer in layers for name in ("k_proj", "v_proj")}
    found, expected = (len(layers), widths), (mlm.num_layers, {mlm.num_kv_heads * mlm.head_dim})
    if found != expected:
        wrong.append(f"decoder layers, and width of keys and values: the configuration says {expected}, found {found}")
    if (ids := mlm.tokenizer(token, add_special_tokens=False)["input_ids"]) != [mlm.image_token_id]:
        wrong.append(f"image token {token!r}: the configuration says id {mlm.image_token_id}, the tokenizer makes {ids}")
    for size in pictures:
        batch = mlm.processor(images=[Image.new("RGB", size)], text=[token], return_tensors="pt")
        merge = mlm.processor.image_processor.merge_size if mlm.family == "qwen2_5_vl" else 0
        ours = len(build_layout(mlm, size, (batch["image_grid_thw"][0, 1:] // merge).tolist() if merge else None))
        theirs = int((batch["input_ids"] == mlm.image_token_id).sum())
        if theirs != ours and not mlm.base_view_only:  # of which the processor counts the tile that is left out
            wrong.append(f"image tokens of a {size[0]}x{size[1]} image: the processor makes {theirs}, the layout has {ours}")
    found = (mlm.num_layers, mlm.num_heads, mlm.num_kv_heads, mlm.head_dim, ours)
    if sizes not in ((), found):
        wrong.append("layers, query heads, key-value heads, head dimension, image tokens of a 640x480 image: "
                     f"expected {sizes}, found {found}")  # fmt: skip
    if wrong:
        raise ModelError(f"{mlm.name} is not what kvutils expects:\n  " + "\n  ".join(wrong) + "\nThis is another checkpoint, or "
                         "another version of transformers reads it differently (requirements.txt names the one tested).")  # fmt: skip


def check_tower(name: str, config) -> None:
    """ModelError unless a LLaVA configuration reads layers that its vision tower has, and only tokens that have a place in the picture."""
    read, strategy, tower = config.vision_feature_layer, config.vision_feature_select_strategy, config.vision_config
    depth, needed = tower.num_hidden_layers, "default" if tower.model_type == "clip_vision_model" else "full"
    if strategy != needed or not all(-depth - 1 <= layer <= depth for layer in ([read] if isinstance(read, int) else read)):
        raise ModelError(f"{name} reads layer {read} of its vision tower with vision_feature_select_strategy {strategy!r}; expected one from {-depth - 1} to "
                         f"{depth}, and {needed!r}: the class token that CLIP has, and no other tower, has no place in the picture")  # fmt: skip
