"""Task 4: referring-expression segmentation and detection (RefCOCO), read with words (paper, section 3.1)."""

from __future__ import annotations

import numpy as np

from kvutils.statistics import Statistic
from kvutils.tasks.counting import column_mean, column_ratio
from kvutils.tasks.text_segmentation import AP, BOX, INTERSECTION, IOU, UNION, TextSegmentation


class ReferringSegmentation(TextSegmentation):
    """Zero-shot: the expression's vector . every image token, in each text-aligned source.

    Rows are sentences. Headline: mIoU after Otsu's threshold (ours; an empty union counts 0, as LAVT). Beside
    it oIoU (sum I / sum U), the average precision over pixels, and Acc@0.5, the share of sentences whose box
    around the largest region has an IoU of at least 0.5 with the true box. Control: an expression for another
    image.
    """

    name = "referring_segmentation"
    title = "Referring-expression segmentation"
    metric = "mIoU"

    @staticmethod
    def statistic(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Mean over sentences of the IoU."""
        return column_mean(IOU)(weights, values)

    @property
    def statistics(self) -> dict[str, Statistic]:
        return {"oIoU": column_ratio(INTERSECTION, UNION), "AP": column_mean(AP), "Acc@0.5": column_mean(BOX)}
