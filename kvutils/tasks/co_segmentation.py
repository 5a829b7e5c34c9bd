"""Task 2: co-segmentation (MSRC) by clustering the tokens of a group of images (paper, section 3.1; Amir et al.)."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from kvutils import VOID
from kvutils.datasets.samples import ImageGroup
from kvutils.metrics.masks import binary_counts, jaccard_and_precision
from kvutils.metrics.statistics import column_mean
from kvutils.readout.attention import QUESTION
from kvutils.readout.clusters import MAX_CLUSTERS, cluster_tokens, oracle_clusters, salient_clusters
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Opener, token_means
from kvutils.tasks.base import Row, Task, opener

SEED = 0  # of k-means
_J, _J_ORACLE, _J_RELATIVE, _PRECISION, _CLUSTERS = range(5)


class CoSegmentation(Task):
    """k-means over the tokens of all images of a group; foreground is what is salient in most of them. Rows are images, resampled by group.

    Paper and Amir et al.: k grows until the inertia stops falling; clusters whose mean saliency is above 0.065 in 75 % of the images are
    the common object. Ours: saliency is the model's attention from the last prompt token, scaled to 0..1 per image; no GrabCut afterwards;
    clusters are brought to pixels bilinearly. A single attention sink would make a fixed threshold meaningless, hence `J, relative
    threshold` beside it: above the image's mean saliency. `J, oracle` is the best union of the same clusters (chosen on tokens)."""

    name, title, metric = "co_segmentation", "Co-segmentation", "Jaccard"
    columns = ("j", "j_oracle", "j_relative", "precision", "clusters")
    statistic = staticmethod(column_mean(_J))
    statistics = {"J, oracle": column_mean(_J_ORACLE), "J, relative threshold": column_mean(_J_RELATIVE),
                  "P": column_mean(_PRECISION), "clusters": column_mean(_CLUSTERS)}  # fmt: skip
    parameters = {"n_init": 1, "max_clusters": MAX_CLUSTERS, "question": QUESTION, "seed": SEED}

    def images(self, sample: ImageGroup) -> list[tuple[str, Opener]]:
        return [(one.id, opener(one)) for one in sample.images]

    def score(self, sample: ImageGroup, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor) -> list[Row]:
        order = self.sources(extractor)
        per_image = [features[one.id] for one in sample.images]
        saliency = [extractor.saliency((one.id, one.image)).numpy() for one in sample.images]
        relative = [s / s.mean() if s.mean() > 0 else s for s in saliency]
        shares = [token_means(one.layout, np.stack([image.mask == 1, image.mask != VOID], axis=-1))
                  for one, image in zip(per_image, sample.images, strict=True)]  # fmt: skip
        inside, area = ([share[:, column] for share in shares] for column in (0, 1))
        counts, chosen = [], []  # clusters per source; per source and rule the foreground tokens of all images

        def clustered(source: str) -> tuple[list[np.ndarray], list[float]]:
            return cluster_tokens([one.features[source].float().cpu().numpy() for one in per_image], SEED)

        # One k-means gains little by more threads, the sources gain all of them; and its last bits do not depend on how many there are.
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=threadpool_limits, initargs=(1,)) as pool, threadpool_limits(1):
            found = list(pool.map(clustered, order))
        for clusters, inertias in found:
            counts.append(k := len(inertias))
            rules = (salient_clusters(clusters, saliency, k)[1], oracle_clusters(clusters, inside, area, k)[0],
                     salient_clusters(clusters, relative, k, threshold=1.0)[1])  # fmt: skip
            chosen += [[np.isin(labels, rule) for labels in clusters] for rule in rules]
        rows = []
        for i, (image, one) in enumerate(zip(sample.images, per_image, strict=True)):
            foreground = torch.from_numpy(np.stack([masks[i] for masks in chosen])).float()
            pixels = binary_counts(one.layout.to_pixels(foreground) > 0.5, image.mask).reshape(len(order), 3, 4)
            jaccard, precision = jaccard_and_precision(pixels)  # (S, rules)
            values = np.column_stack([jaccard, precision[:, 0], counts])
            named = {source: tuple(row.tolist()) for source, row in zip(order, values, strict=True)}
            rows.append(Row(f"{sample.id}/{image.id}", sample.id, named))
        return rows


class BestUnion(CoSegmentation):
    """The same rows by `J, oracle`, which no threshold on the saliency decides."""

    metric = "Jaccard, oracle"
    statistic = staticmethod(column_mean(_J_ORACLE))
