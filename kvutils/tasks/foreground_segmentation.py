"""Task 1: few-shot foreground segmentation (Pascal-5i) by a linear probe (paper, section 3.1)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvutils.datasets.samples import Episode
from kvutils.metrics.masks import binary_counts
from kvutils.metrics.statistics import column_mean, ratio
from kvutils.probes import fit_linear_probe
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Opener, stack_images, token_means
from kvutils.tasks.base import SHUFFLED, Row, Task, opener, sample_seed, shuffled_labels

_FOLD, _CLASS, _I_BG, _I_FG, _U_BG, _U_FG, _CONVERGED = range(7)


def foreground_miou(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """HSNet's foreground mIoU: IoU of summed I and U per class, mean within folds (over classes that a resample has drawn; HSNet
    counts the others as 0), then over folds."""
    folds = []
    for fold in np.unique(values[:, _FOLD]):
        in_fold = values[:, _FOLD] == fold
        classes = [in_fold & (values[:, _CLASS] == c) for c in np.unique(values[in_fold, _CLASS])]
        folds.append(_mean([_iou(weights, values, mine, _I_FG, _U_FG) for mine in classes]))
    return _mean(folds)


def foreground_background_iou(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """FB-IoU: mean of foreground and background IoU, I and U summed over a fold's episodes; mean over folds."""
    folds = [values[:, _FOLD] == fold for fold in np.unique(values[:, _FOLD])]
    pairs = ((_I_BG, _U_BG), (_I_FG, _U_FG))
    return _mean([_mean([_iou(weights, values, mine, *pair) for pair in pairs]) for mine in folds])


def _iou(weights: np.ndarray, values: np.ndarray, mine: np.ndarray, intersection: int, union: int) -> np.ndarray:
    """(n_boot,), NaN where none of `mine` is drawn."""
    drawn = weights[:, mine]
    return np.where(drawn.any(axis=1), drawn @ values[mine, intersection] / np.maximum(drawn @ values[mine, union], 1), np.nan)


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(n_boot,) mean of the parts (n_boot,) that are defined; NaN where none is."""
    known = np.isfinite(parts)
    return ratio(np.where(known, parts, 0).sum(0), known.sum(0))


class ForegroundSegmentation(Task):
    """A probe fitted on the tokens of the support images labels every token of the query.

    Paper: a linear classifier on value tokens, 5 support images. Ours: L2-regularised logistic regression, class-balanced, features
    standardised on the support; `strength` is scikit-learn's C (0.01 was best or close to it for every source on pocket scenes that are not
    scored); a token's label is the majority of its pixels, void excluded; logits are interpolated bilinearly to the query's mask and cut at
    0. If no support token has a foreground (or background) majority, that with the largest such share in each support image takes the
    label. Control: shuffled labels."""

    name, title, metric = "foreground_segmentation", "Foreground segmentation", "fg mIoU"
    columns = ("fold", "class", "i_bg", "i_fg", "u_bg", "u_fg", "converged")
    shuffled = True
    statistic = staticmethod(foreground_miou)
    statistics = {"FB-IoU": foreground_background_iou, "converged": column_mean(_CONVERGED)}

    def __init__(self, samples: Sequence[Episode], strength: float = 0.01, max_iter: int = 1000):
        super().__init__(samples)
        self.parameters = {"strength": strength, "max_iter": max_iter}

    def images(self, sample: Episode) -> list[tuple[str, Opener]]:
        return [(one.id, opener(one)) for one in (*sample.supports, sample.query)]

    def near(self, sample: Episode) -> str:
        return sample.class_name

    def split(self, sample: Episode) -> str:
        return sample.class_name  # episodes of a class share their pictures

    def score(self, sample: Episode, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor) -> list[Row]:
        supports, query = [features[one.id] for one in sample.supports], features[sample.query.id]
        labels = torch.from_numpy(support_labels(supports, [one.mask for one in sample.supports]))
        known = labels >= 0
        if len(torch.unique(labels[known])) < 2:  # the object fills every support: there is nothing to tell it from
            return []
        shuffled = shuffled_labels(labels, sample_seed(sample.id), known)
        logits, converged = {}, {}
        for names in query.by_width(extractor.sources, rows=len(labels)):
            train, test = stack_images(supports, names), query.stack(names)
            values = [i for i, name in enumerate(names) if name.startswith("value.")] or [-1]  # neighbours: their rows are a view
            # The control reads the same features under other labels.
            for prefix, rows, y in (("", slice(None), labels), (SHUFFLED, slice(values[0], values[-1] + 1), shuffled)):
                if fitted := [prefix + name for name in names[rows]]:
                    probe = fit_linear_probe(train[rows], y.to(train.device), sample_weight=known.to(train.device), **self.parameters)
                    logits |= dict(zip(fitted, probe.logits(test[rows]), strict=True))
                    converged |= dict(zip(fitted, probe.converged.tolist(), strict=True))
        order = self.sources(extractor)
        maps = query.layout.to_pixels(torch.stack([logits[source] for source in order]))
        counts = binary_counts(maps > 0, sample.query.mask)
        about = (float(sample.fold), float(sample.class_index))
        values = {s: (*about, *row.tolist(), float(converged[s])) for s, row in zip(order, counts, strict=True)}
        return [Row(sample.id, sample.query.id, values)]


def support_labels(supports: Sequence[ImageFeatures], masks: Sequence[np.ndarray]) -> np.ndarray:
    """(all support tokens,) int64: 0, 1, or -1 where all pixels are void; see the task for rare cases."""
    labels = [one.layout.token_labels(mask)[0] for one, mask in zip(supports, masks, strict=True)]
    for wanted in (0, 1):
        if any((found == wanted).any() for found in labels):
            continue
        for one, mask, found in zip(supports, masks, labels, strict=True):
            share = token_means(one.layout, (mask == wanted)[..., None])[:, 0]
            if share.max() > 0:
                found[share.argmax()] = wanted
    return np.concatenate(labels)
