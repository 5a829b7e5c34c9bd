"""What tasks 3 and 4 share: score maps of an image, and the numbers that say how well they show one mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvutils.datasets.samples import NamedMask
from kvutils.features import FeatureExtractor, ImageFeatures, Item
from kvutils.metrics import box_iou, largest_region_box
from kvutils.probes import otsu
from kvutils.tasks.base import SHUFFLED, Row, Task
from kvutils.tasks.counting import average_precisions, binary_counts, sample_seed

AP, INTERSECTION, UNION, IOU, BOX = range(5)
COLUMNS = ("ap", "intersection", "union", "iou", "box")
CONTROLLED = ("value.", "lens.value.")  # families that also get a control with the wrong text


def map_scores(maps: torch.Tensor, mask: np.ndarray, thresholds: Sequence[float]) -> list[tuple[float, ...]]:
    """`COLUMNS` of score maps (S, H, W): AP, I and U in pixels, IoU (0 for an empty union), box hit.

    Foreground is above the threshold. box: is the box around the largest region right (IoU >= 0.5)?
    """
    said = maps > torch.tensor(thresholds, dtype=torch.float64, device=maps.device)[:, None, None]
    precision = average_precisions(maps, mask)
    counts = binary_counts(said, mask)[:, [1, 3]]
    true_box = _bounding_box(mask == 1)
    boxes = [largest_region_box(one) for one in said.cpu().numpy()]
    return [
        (float(ap), float(i), float(u), float(i / max(u, 1)), float(box_iou(box, true_box) >= 0.5))
        for ap, (i, u), box in zip(precision, counts, boxes, strict=True)
    ]


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class TextSegmentation(Task):
    """Score of a text on every image token, interpolated to pixels; Otsu's threshold per image (ours).

    Control: the same scores for the text of another sample that does not hold for this image. Samples without
    a foreground pixel are skipped.
    """

    columns = COLUMNS
    control = SHUFFLED

    def __init__(self, samples: Sequence[NamedMask]):
        self.samples = samples
        self._wrong = _wrong_texts(samples)

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        names = extractor.text_sources
        return names + [SHUFFLED + name for name in names if name.startswith(CONTROLLED)]

    def images(self, sample: NamedMask) -> list[Item]:
        return [(sample.image_id, sample.image)]

    def score(
        self, sample: NamedMask, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor
    ) -> list[Row]:
        mask = sample.mask  # read once: it may be a file
        if not (mask == 1).any():
            return []
        image, order = features[sample.image_id], self.sources(extractor)
        scores = extractor.text_scores(image, [sample.text, self._wrong[sample.id]])
        right = {source: pair[0] for source, pair in scores.items()}
        wrong = {SHUFFLED + source: pair[1] for source, pair in scores.items()}
        maps = image.layout.to_pixels(torch.stack([(right | wrong)[source] for source in order]))
        values = map_scores(maps, mask, [otsu(one) for one in maps])
        return [Row(sample.id, sample.group, dict(zip(order, values, strict=True)))]


def _wrong_texts(samples: Sequence[NamedMask]) -> dict[str, str]:
    """For every sample a text of another image that no sample of its own image has (by text and class)."""
    own: dict[str, set[str]] = {}
    for sample in samples:
        own.setdefault(sample.image_id, set()).update((sample.text, sample.class_name))
    texts = sorted({(sample.text, sample.class_name) for sample in samples})
    wrong = {}
    for sample in samples:
        free = [text for text, name in texts if not {text, name} & own[sample.image_id]]
        # An image that shows everything leaves any other text of another class, or else any other text.
        free = free or [text for text, name in texts if text != sample.text and name != sample.class_name]
        free = free or [text for text, _ in texts if text != sample.text] or [sample.text]
        wrong[sample.id] = free[sample_seed(sample.id) % len(free)]
    return wrong
