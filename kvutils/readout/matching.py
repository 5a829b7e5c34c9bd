"""Correspondence by nearest neighbours: between two images (key points) and through a video (labels).

Features are tokens (..., N, C) on a grid of h x w = N cells in row order; leading dimensions, such as S
feature sources, are handled together. Similarity is the cosine. Points are x, y in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from kvutils.datasets.samples import VOID
from kvutils.errors import DataError, ParameterError

CHUNK_BYTES = 2**29  # affinities held at once while labels are propagated


# --- two images --------------------------------------------------------------------------------------------


def cosine_similarity(source: Tensor, target: Tensor) -> Tensor:
    """(..., K, N) cosine of source tokens (..., K, C) with target tokens (..., N, C), in at least float32."""
    if source.shape[-1] != target.shape[-1]:
        raise DataError(f"source and target tokens have {source.shape[-1]} and {target.shape[-1]} channels")
    wide = torch.promote_types(source.dtype, torch.float32)
    return normalize(source.to(wide), dim=-1, eps=1e-8) @ normalize(target.to(wide), dim=-1, eps=1e-8).mT


def match_nearest(source: Tensor, target: Tensor) -> Tensor:
    """(..., K) index of the target token (..., N, C) most similar to each source token (..., K, C)."""
    return cosine_similarity(source, target).argmax(dim=-1)


def soft_argmax(
    similarity: Tensor, centers: Tensor, temperature: float = 0.04, radius: float | None = None
) -> Tensor:
    """(..., K, 2) expected position under softmax(similarity / temperature); ours, beside the hard match.

    similarity (..., K, N), centers (N, 2) x, y of the tokens. radius: only tokens within that many pixels of
    the most similar one count, which keeps a second, distant mode from pulling the point between the two.
    """
    if temperature <= 0:
        raise ParameterError(f"temperature must be positive, found {temperature}")
    centers = torch.as_tensor(centers).to(similarity)
    logits = similarity / temperature
    if radius is not None:
        best = centers[similarity.argmax(dim=-1)]  # (..., K, 2)
        logits = logits.masked_fill((best.unsqueeze(-2) - centers).norm(dim=-1) > radius, -torch.inf)
    return logits.softmax(dim=-1) @ centers


def letterbox_points(points, width: int, height: int, size: int) -> tuple[np.ndarray, tuple[int, int], float]:
    """Points in an image padded to a square: (points float32, (x, y) offset, scale), as SD-DINO.

    points (K, 2) x, y or (K, 3) x, y, visible. scale = size / max(width, height); the short side is centred
    with a whole-pixel offset. Points that are not visible become zero.
    """
    points = np.array(points, dtype=np.float32)
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise DataError(f"points must be (K, 2) or (K, 3), found {points.shape}")
    scale = size / max(width, height)
    offset = [0, 0]
    if width != height:
        short = int(np.around(size * min(width, height) / max(width, height)))
        offset[int(height < width)] = int((size - short) / 2)
    points[:, :2] = points[:, :2] * np.float32(scale) + np.array(offset, dtype=np.float32)
    if points.shape[1] == 3:
        points *= points[:, 2:]
    return points, (offset[0], offset[1]), scale


def patch_index(points, size: int, num_patches: int) -> np.ndarray:
    """(K,) index, in row order, of the patch that holds each point (K, >= 2) of a size x size image.

    The grid is num_patches x num_patches; points on or beyond the border belong to the border patch.
    """
    cells = (num_patches / size * np.asarray(points, dtype=np.float32)[:, :2]).astype(np.int64)
    x, y = np.clip(cells, 0, num_patches - 1).T
    return num_patches * y + x


def patch_centers(index, num_patches: int, stride: int, patch: int | None = None) -> np.ndarray:
    """(..., 2) x, y of patches: cell * stride + patch // 2 - 0.5, in pixels of the padded square image."""
    index = np.asarray(index)
    cells = np.stack([index % num_patches, index // num_patches], axis=-1)
    return cells * stride + (stride if patch is None else patch) // 2 - 0.5


# --- a video -----------------------------------------------------------------------------------------------


def restrict_neighborhood(h: int, w: int, radius: int, device: torch.device | None = None) -> Tensor | None:
    """(h*w, h*w) bool: cells at most `radius` rows and columns apart; None (no restriction) for radius 0."""
    if radius < 0:
        raise ParameterError(f"radius must be 0 (no restriction) or more, found {radius}")
    if not radius:
        return None
    row, column = (torch.arange(n, device=device) for n in (h, w))
    near = [(axis[:, None] - axis[None, :]).abs() <= radius for axis in (row, column)]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(h * w, h * w)


def propagate_step(
    target: Tensor,
    context: Tensor,
    labels: Tensor,
    neighborhood: Tensor | None = None,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """(..., N, K) soft labels of one frame, as label_propagation of DINO's eval_video_segmentation.py.

    target (..., N, C) tokens; context (..., n, N, C) tokens and labels (..., n, N, K) of n earlier frames.
    Weights are exp(cosine / temperature), zero outside the neighbourhood; each target token keeps its topk
    largest over *all* context frames together (ties with the last are kept too) and takes the weighted mean
    of their labels.
    """
    frames, cells = context.shape[-3:-1]
    cosine = cosine_similarity(target.unsqueeze(-3), context)  # (..., n, N target, N source)
    affinity = cosine.div_(temperature).exp_()
    if neighborhood is not None:
        affinity *= neighborhood
    affinity = affinity.transpose(-3, -2).flatten(-2)  # (..., N target, n * N source)
    smallest = affinity.topk(min(topk, frames * cells), dim=-1).values[..., -1:]
    affinity.masked_fill_(affinity < smallest, 0)
    affinity /= affinity.sum(dim=-1, keepdim=True)
    return affinity @ labels.flatten(-3, -2).to(affinity)


def norm_mask(labels: Tensor) -> Tensor:
    """Soft labels (..., K, h, w) stretched to 0..1 per channel, as DINO's norm_mask.

    Channels that are constant stay as they are (DINO divides 0 by 0 where the constant is positive).
    """
    low, high = labels.amin(dim=(-2, -1), keepdim=True), labels.amax(dim=(-2, -1), keepdim=True)
    return torch.where((high > 0) & (high > low), (labels - low) / (high - low).clamp_min(1e-38), labels)


def grid_labels(mask: np.ndarray, grid: tuple[int, int], rule: str = "nearest") -> Tensor:
    """(h*w, 1 + objects) one-hot labels of an index mask (H, W) on a token grid; void counts as background.

    rule "nearest": the pixel at each cell's centre (DINO); "area": the share of each label in the cell, which
    does not lose objects smaller than a cell.
    """
    mask = _index_mask(mask)
    h, w = grid
    labels = int(mask.max()) + 1
    if rule == "nearest":
        small = np.array(Image.fromarray(mask.astype(np.uint8)).resize((w, h), Image.Resampling.NEAREST))
        return torch.eye(labels)[torch.from_numpy(small.astype(np.int64)).flatten()]
    if rule != "area":
        raise ParameterError(f"rule must be nearest or area, found {rule!r}")
    shares = [
        np.array(Image.fromarray((mask == i).astype(np.float32)).resize((w, h), Image.Resampling.BOX)).ravel()
        for i in range(labels)
    ]
    return torch.from_numpy(np.stack(shares, axis=1))


def propagate_soft_labels(
    first: Tensor,
    features: Tensor,
    grid: tuple[int, int],
    n_last: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """(S, T, h*w, K) labels of a clip from its first frame's (h*w, K) and features (S, T, h*w, C).

    The context of a frame is the first frame and the n_last before it. Sources are taken as many at a time as
    fit in `CHUNK_BYTES`; each is independent of the others. S sources x T frames stay on the features'
    device.
    """
    sources, frames, cells, _ = features.shape
    if cells != grid[0] * grid[1] or first.shape[0] != cells:
        raise DataError(
            f"grid {grid} has {grid[0] * grid[1]} cells; features have {cells}, labels {first.shape[0]}"
        )
    neighborhood = restrict_neighborhood(*grid, radius, features.device)
    out = first.to(features.device, torch.float32).expand(sources, frames, *first.shape).clone()
    per_source = 8 * (n_last + 1) * cells**2  # float32, and as much again for the reordered copy
    step = max(1, CHUNK_BYTES // per_source)
    for start in range(0, sources, step):
        part = slice(start, start + step)
        for t in range(1, frames):
            context = [0, *range(max(1, t - n_last), t)]
            earlier = features[part][:, context], out[part][:, context]
            out[part, t] = propagate_step(features[part, t], *earlier, neighborhood, topk, temperature)
    return out


def labels_to_masks(soft: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """(..., H, W) uint8 index masks of soft labels (..., h*w, K): upsampled, `norm_mask`, argmax."""
    flat = soft.reshape(-1, *soft.shape[-2:])
    masks = []
    for frame in flat:  # one at a time: upsampled soft labels of a clip do not fit in memory
        planes = interpolate(frame.T.reshape(1, -1, *grid), size=size, mode="bilinear")[0]
        winner = norm_mask(planes).max(dim=0).indices  # 20 times faster than argmax on a CPU
        masks.append(winner.to(torch.uint8).cpu())
    return torch.stack(masks).reshape(*soft.shape[:-2], *size).numpy()


def propagate_labels(
    first_mask: np.ndarray,
    features: Tensor,
    grid: tuple[int, int],
    n_last: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
    rule: str = "nearest",
) -> np.ndarray:
    """Index masks (T, H, W), or (S, T, H, W), of a clip from its first mask (H, W), as DINO on DAVIS.

    features (T, h*w, C) of one source or (S, T, h*w, C); the grid covers the whole frame. The first frame is
    returned as given, with void as background. See `grid_labels` for `rule`, `propagate_step` for the method.
    """
    stacked = features.unsqueeze(0) if features.ndim == 3 else features
    first_mask = _index_mask(first_mask)
    first = grid_labels(first_mask, grid, rule)
    soft = propagate_soft_labels(first, stacked, grid, n_last, radius, topk, temperature)
    return _finish(soft, first_mask, grid, features.ndim == 3)


def copy_labels(
    first_mask: np.ndarray, features: Tensor, grid: tuple[int, int], rule: str = "nearest"
) -> np.ndarray:
    """As `propagate_labels`, but each token copies the label of its nearest token in the first frame."""
    stacked = features.unsqueeze(0) if features.ndim == 3 else features
    first_mask = _index_mask(first_mask)
    first = grid_labels(first_mask, grid, rule).to(stacked.device)
    if stacked.shape[2] != len(first):
        raise DataError(f"grid {grid} has {len(first)} cells, features have {stacked.shape[2]}")
    soft = torch.stack([first[match_nearest(frame, stacked[:, 0])] for frame in stacked.unbind(1)], dim=1)
    return _finish(soft, first_mask, grid, features.ndim == 3)


def copy_first_mask(first_mask: np.ndarray, frames: int) -> np.ndarray:
    """(frames, H, W): the first mask for every frame, the baseline that uses no features."""
    return np.repeat(_index_mask(first_mask).astype(np.uint8)[None], frames, axis=0)


def _index_mask(mask: np.ndarray) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer) or mask.min() < 0 or mask.max() > VOID:
        raise DataError(f"an index mask is (H, W) with labels 0..{VOID}, found {mask.dtype} {mask.shape}")
    return np.where(mask == VOID, 0, mask)


def _finish(soft: Tensor, first_mask: np.ndarray, grid: tuple[int, int], single: bool) -> np.ndarray:
    masks = labels_to_masks(soft, grid, first_mask.shape)
    masks[:, 0] = first_mask
    return masks[0] if single else masks
