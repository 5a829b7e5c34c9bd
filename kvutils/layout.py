"""Which sequence slot is which image token, and which rectangle of the original image it covers.

Geometry of the three families:
  LLaVA-OneVision, LLaVA-NeXT   base view (the image squashed to a square), then the tiles (the image resized
                                into the best resolution, padded, cut) row by row, a newline after every row.
  Qwen2.5-VL                    one grid of merged 2x2 patches, row by row, no newlines.
Token order, unpadding and OneVision's shrinking above anyres_max_9 are not re-implemented: grid coordinates
are packed by the model's own `pack_image_features` in place of features.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from kvutils.errors import DataError, ModelError, ParameterError

BASE, TILES = 0, 1
VIEWS = {"base": BASE, "tiles": TILES}


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where the N image tokens of one image are.

    slots (N,) int64 positions in the token sequence; rects (N, 4) float64 x0, y0, x1, y1 in pixels of the
    original upright image, clipped to it (NaN for newlines; empty for tokens that see only padding);
    cells (N, 2) int64 row and column within the view's grid (a newline has column = number of columns);
    view (N,) int64 `BASE` or `TILES`; is_newline (N,) bool; image_size (W, H); grids: view name -> (rows,
    columns).
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

    @property
    def centers(self) -> np.ndarray:
        """(N, 2) x, y of the middle of each rectangle; NaN for newlines."""
        return (self.rects[:, :2] + self.rects[:, 2:]) / 2

    def spatial(self, view: str | None = None) -> np.ndarray:
        """Indices of the non-newline tokens of a view; None: the tiles if there are any, else the base."""
        if view is not None and view not in VIEWS:
            raise ParameterError(f"view must be one of {sorted(VIEWS)}, not {view!r}")
        real = ~self.is_newline
        wanted = VIEWS[view] if view else self.view[real].max(initial=BASE)
        return np.flatnonzero(real & (self.view == wanted))

    def select(self, index) -> "TokenLayout":
        """The layout of some of the tokens (integer indices or a bool mask over N)."""
        index = np.asarray(index)
        names = ("slots", "rects", "cells", "view", "is_newline")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def at(self, slots: np.ndarray) -> "TokenLayout":
        """The same layout at these positions of a sequence."""
        return replace(self, slots=slots)

    def token_labels(self, mask: np.ndarray, ignore: int = 255) -> tuple[np.ndarray, np.ndarray]:
        """Class of every token: the majority of the pixels in its rectangle, `ignore` pixels left out.

        mask (H, W) int. Returns labels (N,) int64 (-1: newline, padding, or only ignored pixels; the smaller
        class on a tie) and coverage (N,) float64, the share of the rectangle's pixels that carry the label. A
        rectangle without a pixel centre (an enlarged image) takes the pixel under its middle.
        """
        mask = np.asarray(mask)
        width, height = self.image_size
        if mask.shape != (height, width):
            raise DataError(f"the mask must be (H, W) = {(height, width)} like its image, not {mask.shape}")
        labels, coverage = np.full(len(self), -1), np.zeros(len(self))
        seen = np.flatnonzero(~self.is_newline & (self._areas() > 0))
        low = np.ceil(self.rects[seen, :2] - 0.5).astype(int)
        high = np.ceil(self.rects[seen, 2:] - 0.5).astype(int)
        under = np.minimum(np.floor(self.centers[seen]).astype(int), [width - 1, height - 1])
        thin = high <= low
        low, high = np.where(thin, under, low), np.where(thin, under + 1, high)
        (x0, y0), (x1, y1) = low.T, high.T
        classes = np.unique(mask[mask != ignore])
        if not len(seen) or not len(classes):
            return labels, coverage
        counts = []
        for value in classes:
            sums = np.pad((mask == value).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            counts.append(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0])
        counts = np.stack(counts, axis=1)  # (tokens, classes)
        most = counts.max(axis=1)
        labels[seen] = np.where(most > 0, classes[counts.argmax(axis=1)], -1)
        coverage[seen] = most / ((x1 - x0) * (y1 - y0))
        return labels, coverage

    def token_at(self, points: np.ndarray, view: str | None = None) -> np.ndarray:
        """(K,) index of the token of the finest (or given) view under each point.

        points (K, 2) x, y in image pixels, clipped to the image. Pixels that no token sees (the rim that
        patches do not divide) go to the nearest one.
        """
        points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise DataError("points must be finite x, y pixel coordinates")
        index, ys, xs = self._grid(view)
        row = _interval_at(ys, np.clip(points[:, 1], 0, self.image_size[1] - 1e-9))
        column = _interval_at(xs, np.clip(points[:, 0], 0, self.image_size[0] - 1e-9))
        return index[row, column]

    def to_pixels(self, scores: torch.Tensor, view: str | None = None) -> torch.Tensor:
        """Token scores (..., N) -> pixel scores (..., H, W): bilinear between centres, constant beyond."""
        if scores.shape[-1] != len(self):
            raise ParameterError(f"scores must end in N = {len(self)}, not {tuple(scores.shape)}")
        dtype = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
        index, ys, xs = self._grid(view)
        down = _interpolation(ys.mean(1), self.image_size[1]).to(scores.device, dtype)
        across = _interpolation(xs.mean(1), self.image_size[0]).to(scores.device, dtype)
        grid = scores[..., torch.from_numpy(index).to(scores.device)].to(dtype)
        return down @ grid @ across.T

    def _areas(self) -> np.ndarray:
        return np.prod(np.nan_to_num(self.rects[:, 2:] - self.rects[:, :2]), axis=1)

    def _grid(self, view: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token index (rows, columns), y intervals (rows, 2), x intervals (columns, 2); no padding lines."""
        tokens = self.spatial(view)
        tokens = tokens[self._areas()[tokens] > 0]
        if not len(tokens):
            raise ParameterError(f"this layout has no tokens of the view {view!r} that show the image")
        rows, row = np.unique(self.cells[tokens, 0], return_inverse=True)
        columns, column = np.unique(self.cells[tokens, 1], return_inverse=True)
        if len(tokens) != len(rows) * len(columns):
            raise ParameterError("these tokens are not a full grid; use the whole layout or .spatial()")
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
    weights = 1 - np.abs(position[:, None] - np.arange(len(centers)))
    return torch.from_numpy(weights.clip(0))


# ---- building layouts ---------------------------------------------------------------------------


def tiling(mlm, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of the canvas that a LLaVA family cuts into tiles."""
    width, height = image_size
    best = select_best_resolution((height, width), mlm.model.config.image_grid_pinpoints)
    return int(best[0]), int(best[1])


def pack_crops(
    mlm, crops: list[torch.Tensor], image_sizes: list[tuple[int, int]], newline: torch.Tensor
) -> list[torch.Tensor]:
    """The model's own unpadding, shrinking and newline insertion, for any features of the LLaVA families.

    crops: per image (P, g*g, C), base view first; image_sizes (W, H); newline (C,). Returns per image (N, C).
    """
    config = mlm.model.config
    if mlm.family == "llava_onevision":
        options = {"vision_aspect_ratio": config.vision_aspect_ratio}
    else:
        options = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    sizes = [(height, width) for width, height in image_sizes]
    packed, _ = mlm.model.model.pack_image_features(crops, sizes, image_newline=newline, **options)
    return list(packed)


def build_layout(mlm, image_size: tuple[int, int], grid: tuple[int, int] | None = None) -> TokenLayout:
    """Layout of one image of `image_size` (W, H), with slots 0..N-1.

    `grid` is the (rows, columns) of merged patches of Qwen2.5-VL, as its image processor chose them.
    """
    if mlm.family == "qwen2_5_vl":
        if grid is None:
            raise ParameterError("Qwen2.5-VL layouts need the grid that the image processor chose")
        rows, columns = grid
        cells = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
        edges = [np.linspace(0, image_size[0], columns + 1), np.linspace(0, image_size[1], rows + 1)]
        return _layout(image_size, {"base": grid}, cells, np.zeros(len(cells), int), {BASE: edges})
    return _llava_layout(mlm, image_size)


def _llava_layout(mlm, image_size: tuple[int, int]) -> TokenLayout:
    vision = mlm.model.config.vision_config
    side, patch = vision.image_size, vision.patch_size
    g = side // patch
    tall, wide = (side, side) if mlm.base_view_only else tiling(mlm, image_size)
    tile_rows, tile_columns = (0, 0) if mlm.base_view_only else (tall // side, wide // side)

    # Coordinates in place of features: view, row, column of every patch of every crop; NaN marks newlines.
    row, column = np.divmod(np.arange(g * g), g)
    crops = [np.stack([np.full(g * g, BASE), row, column], axis=1)]
    for i, j in np.ndindex(tile_rows, tile_columns):
        crops.append(np.stack([np.full(g * g, TILES), i * g + row, j * g + column], axis=1))
    coordinates = torch.from_numpy(np.stack(crops).astype(np.float64))
    newline = torch.full((3,), float("nan"), dtype=torch.float64)
    packed = pack_crops(mlm, [coordinates], [image_size], newline)[0].numpy()

    is_newline = np.isnan(packed[:, 0])
    view = np.zeros(len(packed), dtype=np.int64)
    view[g * g :] = TILES if tile_rows else BASE
    grids, edges = {"base": (g, g)}, {}
    cells = np.zeros((len(packed), 2), dtype=np.int64)
    cells[: g * g] = np.stack([row, column], axis=1)
    edges[BASE] = [_squashed_edges(g, patch, side, size) for size in image_size]
    if tile_rows:
        tokens = g * g + np.flatnonzero(~is_newline[g * g :])
        grids["tiles"] = (int(is_newline.sum()), len(tokens) // max(1, int(is_newline.sum())))
        rows, columns = grids["tiles"]
        cells[g * g :] = np.stack(np.divmod(np.arange(rows * (columns + 1)), columns + 1), axis=1)
        centers = packed[tokens].reshape(rows, columns, 3)
        resized = _resized_size(image_size, (tall, wide))
        edges[TILES] = [
            _tile_edges(centers[0, :, 2] if rows else [], g, patch, side, wide, resized[0], image_size[0]),
            _tile_edges(centers[:, 0, 1] if columns else [], g, patch, side, tall, resized[1], image_size[1]),
        ]
    else:
        cells[g * g :] = (g - 1, g)  # the one newline that closes the base view
    return _layout(image_size, grids, cells, view, edges)


def _squashed_edges(g: int, patch: int, side: int, size: int) -> np.ndarray:
    """(g, 2) intervals in image pixels of the patches of an image squashed to `side`; a rim may be unseen."""
    starts = np.arange(g) * patch
    return np.stack([starts, starts + patch], axis=1) * size / side


def _tile_edges(centers, g: int, patch: int, side: int, canvas: int, resized: int, size: int) -> np.ndarray:
    """(n, 2) intervals in image pixels along one axis of the tile grid.

    `centers` are patch coordinates on the padded canvas, fractional where the model shrank the grid; every
    token nominally covers the spacing around its centre. The last pixels of a tile may belong to no patch.
    """
    centers = np.asarray(centers, dtype=np.float64)
    spacing = (centers[-1] - centers[0]) / (len(centers) - 1) if len(centers) > 1 else 1.0
    low, high = centers + 0.5 - spacing / 2, centers + 0.5 + spacing / 2

    def to_canvas(u: np.ndarray, upper: bool) -> np.ndarray:
        u = np.round(u, 6)  # the interpolated coordinates are not exact
        tile = np.floor_divide(u, g) if not upper else np.ceil(u / g) - 1
        return tile * side + (u - tile * g) * patch

    offset = (canvas - resized) // 2
    edges = np.stack([to_canvas(low, upper=False), to_canvas(high, upper=True)], axis=1)
    return (edges - offset) * size / resized


def _resized_size(image_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(W, H) to which the image is resized, keeping its aspect, before it is padded to the canvas (H, W)."""
    width, height = image_size
    blank = np.broadcast_to(np.uint8(0), (3, height, width))  # only its shape is read
    new_height, new_width = get_patch_output_size(blank, canvas, input_data_format=ChannelDimension.FIRST)
    return new_width, new_height


def _layout(image_size, grids, cells, view, edges) -> TokenLayout:
    """Rectangles from the intervals per view, clipped to the image; a column beyond the grid is a newline."""
    width, height = image_size
    rects = np.full((len(cells), 4), np.nan)
    is_newline = np.zeros(len(cells), dtype=bool)
    for name, (_, columns) in grids.items():
        mine = view == VIEWS[name]
        is_newline |= mine & (cells[:, 1] >= columns)
        tokens = np.flatnonzero(mine & ~is_newline)
        xs, ys = (e if e.ndim == 2 else np.stack([e[:-1], e[1:]], axis=1) for e in edges[VIEWS[name]])
        rects[tokens] = np.concatenate([xs[cells[tokens, 1]], ys[cells[tokens, 0]]], axis=1)[:, [0, 2, 1, 3]]
    rects = np.clip(rects, 0, [width, height, width, height])
    if len(cells) != sum(r * c for r, c in grids.values()) + is_newline.sum():
        raise ModelError(f"image tokens do not form the grids {grids}; this model packs them in another way")
    return TokenLayout(
        slots=np.arange(len(cells)),
        rects=rects,
        cells=cells,
        view=view,
        is_newline=is_newline,
        image_size=(width, height),
        grids=dict(grids),
    )
