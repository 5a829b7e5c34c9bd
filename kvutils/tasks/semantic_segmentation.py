"""Task 3: semantic segmentation (ImageNet-S), read with words or with a probe (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvutils.datasets.samples import LabelledImage, NamedMask
from kvutils.errors import DataError, ParameterError
from kvutils.features import FeatureExtractor, ImageFeatures
from kvutils.probes import LinearProbe, fit_linear_probe, shuffled_labels
from kvutils.statistics import Statistic
from kvutils.tasks.base import SHUFFLED, Row
from kvutils.tasks.counting import column_mean
from kvutils.tasks.text_segmentation import AP, IOU, TextSegmentation, map_scores


class SemanticSegmentation(TextSegmentation):
    """Zero-shot: the class name's vector . every image token, in each text-aligned source.

    Headline: average precision over pixels, which needs no threshold. Second: IoU after Otsu's threshold
    (ours; the paper states no rule). Control: a class name that is not in the image.
    """

    name = "semantic_segmentation"
    title = "Semantic segmentation, by text"
    metric = "AP"

    @staticmethod
    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Mean over samples of the average precision."""
        return column_mean(AP)(weights, values)

    @property
    def statistics(self) -> dict[str, Statistic]:
        return {"IoU": column_mean(IOU)}


class SemanticSegmentationProbe(SemanticSegmentation):
    """Supervised counterpart of the same samples and metrics, for every source (ours).

    One multinomial probe per source, fitted on the tokens of other labelled images (`train`: class index + 1
    of `class_names`, 0 background, void excluded), class-balanced. A class's score is its log-odds against
    all others, foreground is above 0. Control: the probe fitted on shuffled labels.
    """

    name = "semantic_segmentation_probe"
    title = "Semantic segmentation, by probe"

    def __init__(
        self,
        samples: Sequence[NamedMask],
        train: Sequence[LabelledImage],
        class_names: Sequence[str],
        strength: float = 0.01,
        max_iter: int = 1000,
    ):
        super().__init__(samples)
        if {image.id for image in train} & {sample.image_id for sample in samples}:
            raise DataError("training and scored images overlap; pass labelled images that are not scored")
        self.train, self.class_names = train, list(class_names)
        self.strength, self.max_iter = strength, max_iter
        self._probes: list[tuple[list[str], LinearProbe]] = []

    def parameters(self) -> dict:
        names = [image.id for image in self.train]
        return {
            "strength": self.strength,
            "max_iter": self.max_iter,
            "train": names,
            "classes": self.class_names,
        }

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        return extractor.sources + [f"{SHUFFLED}value.{layer}" for layer in extractor.layers]

    def prepare(self, extractor: FeatureExtractor) -> None:
        """Fit the probes. ConvergenceError if one does not converge."""
        images = extractor.images([(image.id, image.image) for image in self.train])
        found = [
            one.layout.token_labels(image.mask)[0] for one, image in zip(images, self.train, strict=True)
        ]
        labels = torch.from_numpy(np.concatenate(found))
        known, classes = labels >= 0, len(self.class_names) + 1
        absent = sorted(set(range(classes)) - set(labels[known].tolist()))
        if absent:
            names = ["background", *self.class_names]
            raise DataError(
                f"no training token shows {', '.join(names[i] for i in absent)}; pass more training images"
            )
        self._probes = []
        for names in images[0].by_width(extractor.sources, rows=len(labels)):
            values = [name for name in names if name.startswith("value.")]
            for group, y, prefix in (
                (names, labels, ""),
                (values, shuffled_labels(labels, 0, known), SHUFFLED),
            ):
                if group:
                    X = torch.cat([one.stack(group) for one in images], dim=1)
                    probe = fit_linear_probe(
                        X,
                        y.to(X.device),
                        classes,
                        self.strength,
                        sample_weight=known.to(X.device),
                        max_iter=self.max_iter,
                    )
                    self._probes.append(([prefix + name for name in group], probe.require_converged()))

    def score(
        self, sample: NamedMask, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor
    ) -> list[Row]:
        if not (sample.mask == 1).any():
            return []
        if sample.class_name not in self.class_names:
            raise ParameterError(f"{sample.id}: the probe was not fitted for class {sample.class_name!r}")
        image, number = features[sample.image_id], self.class_names.index(sample.class_name) + 1
        odds = {}
        for names, probe in self._probes:
            logits = probe.logits(image.stack([name.removeprefix(SHUFFLED) for name in names]))
            others = [k for k in range(logits.shape[-1]) if k != number]
            scores = logits[..., number] - logits[..., others].logsumexp(-1)
            odds |= dict(zip(names, scores, strict=True))
        order = self.sources(extractor)
        maps = image.layout.to_pixels(torch.stack([odds[source] for source in order]))
        values = map_scores(maps, sample.mask, [0.0] * len(order))
        return [Row(sample.id, sample.group, dict(zip(order, values, strict=True)))]
