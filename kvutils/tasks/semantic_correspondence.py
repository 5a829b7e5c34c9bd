"""Task 5: semantic correspondence (SPair-71k) by nearest neighbours (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvutils.datasets.samples import KeypointPair
from kvutils.errors import DataError
from kvutils.features import FeatureExtractor, ImageFeatures, Item
from kvutils.matching import cosine_similarity, soft_argmax
from kvutils.statistics import Statistic
from kvutils.tasks.base import UNTRAINED, Row, Task
from kvutils.tasks.counting import column_ratio

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
