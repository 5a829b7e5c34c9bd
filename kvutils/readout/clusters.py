"""Co-segmentation by clustering tokens of a group of images together, after Amir et al. (dino-vit-features).

Clusters that are salient in most images are the common object. An MLM has no class token whose attention gives saliency,
so `oracle_clusters` reports beside it the best that any choice of clusters could do."""

from collections.abc import Sequence

import numpy as np
from sklearn import config_context
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize

MAX_CLUSTERS = 14
MANY = 64  # points that nearly always hold that many different ones
ELBOW = 0.975  # k grows while the inertia falls below this share of the one before


def cluster_tokens(tokens: Sequence[np.ndarray], seed: int = 0) -> tuple[list[np.ndarray], list[float]]:
    """Joint k-means of the L2-normalised tokens (N_i, C) of all images of a group, whose grids may differ: labels (N_i,) int per
    image, and inertias, the mean squared distance with 1, 2, ... clusters, as many as labels. k grows from 1 until inertia(k) >
    ELBOW * inertia(k - 1), at most MAX_CLUSTERS; that last k is the one used, as in the reference. scikit-learn's k-means, of
    one start per k, stands in for faiss, so labels are not bit-identical."""
    points = normalize(np.concatenate(tokens).astype(np.float32))
    limit = min(MAX_CLUSTERS, len(np.unique(points[:MANY], axis=0)))
    if limit < MAX_CLUSTERS:  # hardly ever: sorting all points would cost as much as the clusters
        limit = min(MAX_CLUSTERS, len(np.unique(points, axis=0)))
    inertias: list[float] = []
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for k in range(1, limit + 1):
            model = KMeans(k, n_init=1, random_state=seed).fit(points)
            inertias.append(model.inertia_ / len(points))
            if len(inertias) > 1 and inertias[-1] > ELBOW * inertias[-2]:
                break
        labels = model.predict(points).astype(np.int64)
    return np.split(labels, np.cumsum([len(t) for t in tokens])[:-1]), inertias


def salient_clusters(labels: Sequence[np.ndarray], saliency: Sequence[np.ndarray], num_clusters: int,
                     threshold: float = 0.065, percentage: float = 75) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(votes (num_clusters,), indices of salient clusters). labels, saliency: (N_i,) per image. An image votes for a cluster if
    its tokens there have a mean saliency above the threshold; a cluster absent from the image gets no vote. Salient: votes >=
    ceil(images * percentage / 100)."""
    votes = np.zeros(num_clusters)
    for image_labels, image_saliency in zip(labels, saliency, strict=True):
        for cluster in np.unique(image_labels):
            votes[cluster] += image_saliency[image_labels == cluster].mean() > threshold
    return votes, np.flatnonzero(votes >= np.ceil(len(labels) * percentage / 100))


def oracle_clusters(labels: Sequence[np.ndarray], foreground: Sequence[np.ndarray], pixels: Sequence[np.ndarray],
                    num_clusters: int) -> tuple[np.ndarray, float]:  # fmt: skip
    """(indices of the best union of clusters, its mean Jaccard over images): the upper bound of any choice. labels (N_i,) per
    image; foreground, pixels (N_i,) true foreground and annotated pixels, or shares of the pixels, in each token. All unions are
    tried. Two empty masks score 1."""
    inside, area = (np.stack([np.bincount(c, w, num_clusters) for c, w in zip(labels, weights, strict=True)]) for weights in (foreground, pixels))
    chosen = (np.arange(2**num_clusters)[:, None] >> np.arange(num_clusters)) & 1  # (unions, clusters)
    intersection = chosen @ inside.T
    union = chosen @ (area - inside).T + inside.sum(axis=1)
    score = np.where(union > 0, intersection / np.maximum(union, 1e-12), 1.0).mean(axis=1)
    return np.flatnonzero(chosen[score.argmax()]), float(score.max())
