"""Task 6: temporal correspondence (DAVIS-2017), a mask carried through a video (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvutils.datasets.samples import Clip
from kvutils.errors import DataError
from kvutils.features import FeatureExtractor, ImageFeatures, Item
from kvutils.matching import copy_first_mask, copy_labels, propagate_labels
from kvutils.statistics import Statistic
from kvutils.tasks.base import UNTRAINED, Row, Task
from kvutils.tasks.counting import column_mean
from kvutils.video_metrics import davis_sequence

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
