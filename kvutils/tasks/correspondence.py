"""Task 5: semantic correspondence (SPair-71k) by nearest neighbours (paper, section 3.1). Task 6: temporal correspondence (DAVIS-2017), a
mask carried through a video (paper, section 3.1)."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from kvutils.datasets.samples import Clip, KeypointPair
from kvutils.errors import DataError
from kvutils.metrics.statistics import Statistic, column_mean, column_ratio
from kvutils.metrics.video import davis_sequence
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Opener, stack_images
from kvutils.readout.matching import copy_first_mask, cosine_similarity, propagate_labels, soft_argmax
from kvutils.tasks.base import Row, Task, opener

ALPHA, TEMPERATURE, RADIUS = 0.1, 0.04, 1.5  # of PCK; of the soft-argmax, its radius in token sizes
_POINTS, _HITS, _HITS_STRICT, _HITS_IMAGE, _SOFT, _SOFT_IMAGE = range(6)


def mean_over_pairs(column: int) -> Statistic:
    """HPF's rule: the share of a pair's points, then the mean over pairs."""
    return lambda weights, values: weights @ (values[:, column] / values[:, _POINTS]) / weights.sum(axis=1)


def point_hits(predicted: np.ndarray, truth: np.ndarray, size: float, alpha: float = ALPHA) -> tuple[float, float]:
    """How many of the predicted points (K, 2) are within alpha * size of the true ones: distance <= (HPF), < (SD-DINO)."""
    distance = np.linalg.norm(predicted - truth, axis=1)
    return float((distance <= alpha * size).sum()), float((distance < alpha * size).sum())


class SemanticCorrespondence(Task):
    """The centre of the target token most similar (cosine) to the token under each source key point.

    Headline: PCK@0.1 of the target's box, per pair, then the mean over pairs (HPF's rule, distance <=). Beside it PCK per point (pooled over
    all pairs; distance < as SD-DINO), PCK@0.1 of the image's longer side, because 0.1 of a box can be less than a token, and a soft-argmax
    over the tokens within `RADIUS` token sizes of the best match (ours). Points that are not visible in both images are left out; a pair
    without points is skipped. Rows are resampled over both images, which in SPair serve dozens of pairs each; layers are chosen on other categories than they
    are read on, so that halves share no image."""

    name, title, metric = "semantic_correspondence", "Semantic correspondence", "PCK@0.1 per image"
    columns = ("points", "hits", "hits_strict", "hits_image", "soft_hits", "soft_hits_image")
    statistic = staticmethod(mean_over_pairs(_HITS))
    statistics = {"PCK@0.1 per point": column_ratio(_HITS_STRICT, _POINTS), "PCK@0.1 of the image": mean_over_pairs(_HITS_IMAGE),
                  "soft PCK@0.1 per image": mean_over_pairs(_SOFT), "soft PCK@0.1 of the image": mean_over_pairs(_SOFT_IMAGE)}
    parameters = {"alpha": ALPHA, "temperature": TEMPERATURE, "radius": RADIUS}

    def images(self, sample: KeypointPair) -> list[tuple[str, Opener]]:
        return [(sample.source_id, opener(sample, "source")), (sample.target_id, opener(sample, "target"))]

    def split(self, sample: KeypointPair) -> str:
        return sample.category

    def score(self, sample: KeypointPair, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor) -> list[Row]:
        points, truth = (np.asarray(each, float).reshape(-1, 2) for each in (sample.source_points, sample.target_points))
        seen = np.isfinite(points).all(axis=1) & np.isfinite(truth).all(axis=1)
        if not seen.any():
            return []
        truth = truth[seen]
        source, target = features[sample.source_id], features[sample.target_id]
        at = torch.from_numpy(source.layout.token_at(points[seen]))
        x0, y0, x1, y1 = sample.target_box
        box, image = max(x1 - x0, y1 - y0), max(target.layout.image_size)
        centers = torch.from_numpy(target.layout.centers)
        sides = target.layout.rects[:, 2:] - target.layout.rects[:, :2]
        radius = RADIUS * float(sides.max())
        values: dict[str, tuple[float, ...]] = {}
        for names in source.by_width(self.sources(extractor)):
            similarity = cosine_similarity(source.stack(names, at), target.stack(names)).cpu().double()
            hard = centers[similarity.argmax(-1)].numpy()  # (S, K, 2)
            soft = soft_argmax(similarity, centers, TEMPERATURE, radius).numpy()
            for name, one, other in zip(names, hard, soft, strict=True):
                values[name] = (float(len(truth)), *point_hits(one, truth, box), point_hits(one, truth, image)[0],
                                point_hits(other, truth, box)[0], point_hits(other, truth, image)[0])  # fmt: skip
        return [Row(sample.id, (sample.source_id, sample.target_id), values)]


COPY_FIRST = "copy_first_mask"  # the baseline without features
N_LAST, NEAR, TOPK = 7, 12, 5  # context frames before this one, neighbourhood in tokens, most similar tokens (DINO's)
_J, _F, _J_DINO, _F_DINO = range(4)


def j_and_f(j: int, f: int) -> Statistic:
    """J&F of two columns, mean over objects."""
    return lambda weights, values: weights @ values[:, [j, f]].mean(axis=1) / weights.sum(axis=1)


class TemporalCorrespondence(Task):
    """The mask of the first frame, carried through a clip by token similarities; rows are objects, resampled by clip.

    Headline: J&F of plain nearest neighbours, each token takes the label of its nearest (cosine) token in the first frame: the
    paper matches frames by the "same method" as key points. Beside it DINO's label propagation (context: the first frame and the
    `N_LAST` before; temperature 0.1), whose many votes smooth over what single tokens lack. Ours: a token's first label is the
    share of its pixels (DINO takes the centre pixel), which does not lose objects smaller than a token. The first frame is given,
    the last not scored, void is background."""

    name, title, metric = "temporal_correspondence", "Temporal correspondence", "J&F"
    columns = ("j", "f", "j_dino", "f_dino")
    chunk = 1  # a clip has a hundred frames
    statistic = staticmethod(j_and_f(_J, _F))
    statistics = {"J": column_mean(_J), "F": column_mean(_F), "J&F, label propagation": j_and_f(_J_DINO, _F_DINO),
                  "J, label propagation": column_mean(_J_DINO), "F, label propagation": column_mean(_F_DINO)}  # fmt: skip
    parameters = {"n_last": N_LAST, "radius": NEAR, "topk": TOPK, "rule": "area"}

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        return [COPY_FIRST, *extractor.sources]

    def images(self, sample: Clip) -> list[tuple[str, Opener]]:
        frames = sample.frames
        return [(f"{sample.id}/{i:05d}", partial(frames.__getitem__, i)) for i in range(len(frames))]

    def score(self, sample: Clip, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor) -> list[Row]:
        frames = list(features.values())
        masks = sample.masks  # read once: they may be files
        wanted = masks.shape[:0:-1]
        for number, frame in enumerate(frames):
            if frame.layout.image_size != wanted:
                raise DataError(f"clip {sample.id}, frame {number}: a picture of {frame.layout.image_size} and a mask of {wanted} (width, "
                                "height) do not belong together; is the picture turned, or one of the two scaled?")  # fmt: skip
        grid = tuple(len(np.unique(frames[0].layout.cells[:, axis])) for axis in (0, 1))
        first = masks[0]
        still = np.concatenate(davis_sequence(copy_first_mask(first, len(frames)), masks))
        scores = {COPY_FIRST: [still, still]}  # per source and method (2 * objects, frames - 2): J of every object, then F
        for names in frames[0].by_width(extractor.sources, rows=len(frames[0].layout) * len(frames)):
            stacked = stack_images(frames, names).unflatten(1, (len(frames), -1))  # (S, T, N, C)
            carried, copied = propagate_labels(first, stacked, grid, N_LAST, NEAR, TOPK)
            both = np.concatenate(davis_sequence(torch.stack([copied, carried], dim=1), masks), axis=2)
            scores |= dict(zip(names, both, strict=True))
        means = {source: np.stack([one.mean(axis=1) for one in both]) for source, both in scores.items()}
        objects = len(still) // 2
        return [Row(f"{sample.id}_{i + 1}", sample.id, {s: tuple(mean[:, [i, objects + i]].ravel().tolist()) for s, mean in means.items()})
                for i in range(objects)]  # fmt: skip
