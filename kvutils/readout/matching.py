"""Correspondence by nearest neighbours: between two images (key points) and through a video (labels).

Features are tokens (..., N, C) on a grid of h x w = N cells in row order; leading dimensions, such as S feature sources,
are handled together. Similarity is the cosine. Points are x, y in pixels. Clips follow DINO's eval_video_segmentation.py."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from kvutils import VOID

CHUNK_BYTES = 2**29  # affinities held at once while labels are propagated


def cosine_similarity(source: Tensor, target: Tensor) -> Tensor:
    """(..., K, N) cosine of source tokens (..., K, C) with target tokens (..., N, C), in at least float32."""
    return unit_length(source) @ unit_length(target).mT


def unit_length(tokens: Tensor) -> Tensor:
    """Tokens (..., C) scaled to length 1 (zeros stay), in at least float32."""
    return normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1, eps=1e-8)


def match_nearest(source: Tensor, target: Tensor) -> Tensor:
    """(..., K) index of the target token (..., N, C) most similar to each source token (..., K, C)."""
    return cosine_similarity(source, target).argmax(dim=-1)


def soft_argmax(similarity: Tensor, centers: Tensor, temperature: float, radius: float) -> Tensor:
    """(..., K, 2) expected position under softmax(similarity / temperature); ours, beside the hard match. similarity (..., K, N),
    centers (N, 2) x, y of the tokens. Only tokens within `radius` pixels of the most similar one count, which keeps a second,
    distant mode from pulling the point between the two."""
    centers = centers.to(similarity)
    best = centers[similarity.argmax(dim=-1)]  # (..., K, 2)
    far = (best.unsqueeze(-2) - centers).norm(dim=-1) > radius
    return (similarity / temperature).masked_fill(far, -torch.inf).softmax(dim=-1) @ centers


def restrict_neighborhood(h: int, w: int, radius: int, device: torch.device | None = None) -> Tensor:
    """(h*w, h*w) bool: cells at most `radius` rows and columns apart."""
    row, column = (torch.arange(n, device=device) for n in (h, w))
    near = [(axis[:, None] - axis[None, :]).abs() <= radius for axis in (row, column)]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(h * w, h * w)


def propagate_step(cosine: Tensor, labels: Tensor, neighborhood: Tensor, topk: int = 5, temperature: float = 0.1) -> Tensor:
    """(..., N, K) soft labels of one frame, as DINO's label_propagation. cosine (..., N, n * N) of its tokens with those of n
    earlier frames, overwritten; labels (..., n, N, K) of these. Weights are exp(cosine / temperature), zero outside the
    neighbourhood; each target token keeps its topk largest over *all* context frames together (ties with the last are kept too)
    and takes the weighted mean of their labels."""
    frames, cells = labels.shape[-3:-1]
    affinity = cosine.div_(temperature).exp_()
    affinity.unflatten(-1, (frames, cells)).mul_(neighborhood.unsqueeze(1))
    affinity.masked_fill_(affinity < affinity.topk(min(topk, frames * cells), dim=-1).values[..., -1:], 0)
    affinity /= affinity.sum(dim=-1, keepdim=True)
    return affinity @ labels.flatten(-3, -2).to(affinity)


def norm_mask(labels: Tensor) -> Tensor:
    """Soft labels (..., K, h, w) stretched to 0..1 per channel, as DINO's norm_mask. Channels that are constant stay as they are
    (DINO divides 0 by 0 where the constant is positive)."""
    low, high = labels.amin(dim=(-2, -1), keepdim=True), labels.amax(dim=(-2, -1), keepdim=True)
    varies = (high > 0) & (high > low)
    return (labels - low.where(varies, 0)).div_((high - low).clamp_min(1e-38).where(varies, 1))


def grid_labels(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(h*w, 1 + objects) share of each label of an index mask (H, W) in the cells of a token grid (ours: DINO takes the
    pixel at the cell's centre, which loses objects smaller than a cell). Void counts as background."""
    mask = _without_void(mask)
    planes = [Image.fromarray((mask == i).astype(np.float32)) for i in range(int(mask.max()) + 1)]
    shares = [np.array(plane.resize(grid[::-1], Image.Resampling.BOX)).ravel() for plane in planes]
    return torch.from_numpy(np.stack(shares, axis=1))


def propagate_labels(first_mask: np.ndarray, features: Tensor, grid: tuple[int, int], n_last: int = 7, radius: int = 12,
                     topk: int = 5) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(S, T, H, W) uint8 index masks of a clip, twice, from its first mask (H, W) and features (S, T, h*w, C): as DINO on DAVIS,
    and where each token copies the label of its nearest token in the first frame. The context of a frame is the first frame and
    the n_last before it, see `propagate_step`; the grid covers the whole frame. The first frame is returned as given, with void
    as background. Sources are independent of each other and taken as many at a time as fit in `CHUNK_BYTES`, all on the features'
    device."""
    sources, frames, cells, _ = features.shape
    features, first = unit_length(features), grid_labels(first_mask, grid).to(features.device)
    neighborhood = restrict_neighborhood(*grid, radius, features.device)
    carried, copied = (first.expand(sources, frames, *first.shape).clone() for _ in range(2))
    per_source = 8 * (n_last + 1) * cells**2  # float32, and as much again for what is chosen of it
    step = max(1, CHUNK_BYTES // per_source)
    for start in range(0, sources, step):
        part = slice(start, start + step)
        for t in range(1, frames):
            context = [0, *range(max(1, t - n_last), t)]
            cosine = features[part, t] @ features[part][:, context].flatten(1, 2).mT
            copied[part, t] = first[cosine[..., :cells].argmax(-1)]
            carried[part, t] = propagate_step(cosine, carried[part][:, context], neighborhood, topk)
    return _masks(carried, first_mask, grid), _masks(copied, first_mask, grid)


def copy_first_mask(first_mask: np.ndarray, frames: int) -> np.ndarray:
    """(frames, H, W): the first mask for every frame, the baseline that uses no features."""
    return np.repeat(_without_void(first_mask)[None], frames, axis=0)


def _without_void(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == VOID, 0, mask).astype(np.uint8)


def _masks(soft: Tensor, first_mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(S, T, H, W) uint8 index masks of soft labels (S, T, h*w, K): upsampled, `norm_mask`, argmax; the first as given."""
    found = torch.empty(*soft.shape[:2], *first_mask.shape, dtype=torch.uint8, device=soft.device)
    found[:, 0] = torch.from_numpy(_without_void(first_mask))
    for source, row in zip(soft, found, strict=True):
        for t in range(1, len(row)):  # one at a time: upsampled soft labels of a clip do not fit in memory
            planes = interpolate(source[t].T.reshape(1, -1, *grid), size=first_mask.shape, mode="bilinear")[0]
            row[t] = norm_mask(planes).max(dim=0).indices  # 20 times faster than argmax on a CPU
    return found
