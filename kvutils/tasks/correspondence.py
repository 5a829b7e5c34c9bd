"""Task 5: semantic correspondence (SPair-71k) by nearest neighbours (paper, section 3.1).

Task 6: temporal correspondence (DAVIS-2017), a mask carried through a video (paper, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvutils.datasets.samples import Clip, KeypointPair
from kvutils.errors import DataError
from kvutils.metrics.masks import column_mean, column_ratio
from kvutils.metrics.statistics import Statistic
from kvutils.metrics.video import davis_sequence
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Item
from kvutils.readout.matching import copy_first_mask, copy_labels, cosine_similarity, propagate_labels, soft_argmax
from kvutils.tasks.base import UNTRAINED, Row, Task

ALPHA = 0.1
_POINTS, _HITS, _HITS_STRICT, _HITS_IMAGE, _SOFT, _SOFT_IMAGE = range(6)


class SemanticCorrespondence(Task):
    """The centre of the target token most similar (cosine) to the token under each source key point.

    Headline: PCK@0.1 of the target's box, per pair, then the mean over pairs (HPF's rule, distance <=).
    Beside it PCK per point (SD-DINO's rule, distance <), PCK@0.1 of the image's longer side, because 0.1 of a
    box can be less than a token, and a soft-argmax over the tokens within `radius` token sizes of the best
    match (ours), which predicts between token centres. Points that are not finite (not visible in both
    images) are left out; a pair without points is skipped. Rows are resampled by source image.
    """

    name = "semantic_correspondence"
    title = "Semantic correspondence"
    metric = "PCK@0.1 per image"
    columns = ("points", "hits", "hits_strict", "hits_image", "soft_hits", "soft_hits_image")
    control = UNTRAINED

    def __init__(self, samples: Sequence[KeypointPair], temperature: float = 0.04, radius: float = 1.5):
        self.samples, self.temperature, self.radius = samples, temperature, radius

    def parameters(self) -> dict:
        return {"alpha": ALPHA, "temperature": self.temperature, "radius": self.radius}

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        return extractor.sources

    def images(self, sample: KeypointPair) -> list[Item]:
        return [(sample.source_id, sample.source), (sample.target_id, sample.target)]

    def score(
        self, sample: KeypointPair, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor
    ) -> list[Row]:
        points = np.asarray(sample.source_points, float).reshape(-1, 2)
        truth = np.asarray(sample.target_points, float).reshape(-1, 2)
        if len(points) != len(truth):
            raise DataError(
                f"{sample.id}: {len(points)} source and {len(truth)} target points do not correspond"
            )
        seen = np.isfinite(points).all(axis=1) & np.isfinite(truth).all(axis=1)
        if not seen.any():
            return []
        x0, y0, x1, y1 = sample.target_box
        if not max(x1 - x0, y1 - y0) > 0:
            raise DataError(f"{sample.id}: the target's box x0, y0, x1, y1 is empty: {sample.target_box}")
        source, target = features[sample.source_id], features[sample.target_id]
        at = torch.from_numpy(source.layout.token_at(points[seen]))
        width, height = target.layout.image_size
        limits = np.array([max(x1 - x0, y1 - y0), max(width, height)]) * ALPHA
        centers = torch.from_numpy(target.layout.centers)
        sides = target.layout.rects[:, 2:] - target.layout.rects[:, :2]
        radius = self.radius * float(sides.max())
        values: dict[str, tuple[float, ...]] = {}
        for names in source.by_width(self.sources(extractor)):
            similarity = cosine_similarity(source.stack(names)[:, at], target.stack(names)).cpu().double()
            hard = centers[similarity.argmax(-1)]  # (S, K, 2)
            soft = soft_argmax(similarity, centers, self.temperature, radius)
            for name, one, other in zip(names, hard, soft, strict=True):
                near, between = (np.linalg.norm(p.numpy() - truth[seen], axis=1) for p in (one, other))
                box, image = limits
                hits = (near <= box, near < box, near <= image, between <= box, between <= image)
                values[name] = (float(seen.sum()), *(float(h.sum()) for h in hits))
        return [Row(sample.id, sample.source_id, values)]

    @staticmethod
    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """PCK@0.1 of the box per pair, mean over pairs."""
        return _per_pair(_HITS)(weights, values)

    @property
    def statistics(self) -> dict[str, Statistic]:
        return {
            "PCK@0.1 per point": column_ratio(_HITS_STRICT, _POINTS),
            "PCK@0.1 of the image": _per_pair(_HITS_IMAGE),
            "soft PCK@0.1 per image": _per_pair(_SOFT),
            "soft PCK@0.1 of the image": _per_pair(_SOFT_IMAGE),
        }


def _per_pair(column: int) -> Statistic:
    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        return weights @ (values[:, column] / values[:, _POINTS]) / weights.sum(axis=1)

    return statistic


COPY_FIRST = "copy_first_mask"  # the baseline without features
_J, _F, _J_NEAREST, _F_NEAREST = range(4)


class TemporalCorrespondence(Task):
    """Labels travel along token similarities from frame to frame; rows are objects, resampled by clip.

    Headline: J&F of DINO's label propagation (context: the first frame and the `n_last` before; `radius` in
    tokens; the `topk` most similar tokens, temperature 0.1). Beside it plain nearest neighbours in the first
    frame, which is how the paper matches key points. Ours: a token's first label is the share of its pixels
    (DINO takes the centre pixel), which does not lose objects smaller than a token. The first frame is given,
    the last not scored, void is background.
    """

    name = "temporal_correspondence"
    title = "Temporal correspondence"
    metric = "J&F"
    columns = ("j", "f", "j_nearest", "f_nearest")
    control = UNTRAINED
    chunk = 1  # a clip has a hundred frames

    def __init__(
        self, samples: Sequence[Clip], n_last: int = 7, radius: int = 12, topk: int = 5, rule: str = "area"
    ):
        self.samples, self.n_last, self.radius, self.topk, self.rule = samples, n_last, radius, topk, rule

    def parameters(self) -> dict:
        return {name: getattr(self, name) for name in ("n_last", "radius", "topk", "rule")}

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        return [COPY_FIRST, *extractor.sources]

    def images(self, sample: Clip) -> list[Item]:
        return [(f"{sample.id}/{i:05d}", frame) for i, frame in enumerate(sample.frames)]

    def score(
        self, sample: Clip, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor
    ) -> list[Row]:
        frames = [features[f"{sample.id}/{i:05d}"] for i in range(len(sample.frames))]
        rows, columns = (len(np.unique(frames[0].layout.cells[:, axis])) for axis in (0, 1))
        if any(len(frame.layout) != rows * columns for frame in frames):
            raise DataError(
                f"{sample.id}: the frames have different token grids; give all frames the same size"
            )
        masks = sample.masks  # read once: they may be files
        first = masks[0]
        options = {"n_last": self.n_last, "radius": self.radius, "topk": self.topk, "rule": self.rule}
        copied = np.concatenate(davis_sequence(copy_first_mask(first, len(frames)), masks))
        scores = {COPY_FIRST: [copied, copied]}
        for names in frames[0].by_width(extractor.sources, rows=rows * columns * len(frames)):
            stacked = torch.stack([frame.stack(names) for frame in frames], dim=1)  # (S, T, N, C)
            carried = propagate_labels(first, stacked, (rows, columns), **options)
            nearest = copy_labels(first, stacked, (rows, columns), self.rule)
            for name, *results in zip(names, carried, nearest, strict=True):
                scores[name] = [np.concatenate(davis_sequence(result, masks)) for result in results]
        # Per source and method (2 * objects, frames): J of every object, then F of every object.
        means = {source: np.stack([one.mean(axis=1) for one in both]) for source, both in scores.items()}
        objects = means[COPY_FIRST].shape[1] // 2
        return [
            Row(
                f"{sample.id}_{i + 1}",
                sample.id,
                {
                    source: tuple(float(m) for m in mean[:, [i, objects + i]].ravel())
                    for source, mean in means.items()
                },
            )
            for i in range(objects)
        ]

    @staticmethod
    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """J&F of label propagation, mean over objects."""
        return weights @ values[:, [_J, _F]].mean(axis=1) / weights.sum(axis=1)

    @property
    def statistics(self) -> dict[str, Statistic]:
        return {
            "J": column_mean(_J),
            "F": column_mean(_F),
            "J, nearest neighbour": column_mean(_J_NEAREST),
            "F, nearest neighbour": column_mean(_F_NEAREST),
        }
