"""Co-segmentation by clustering tokens of a group of images together, after Amir et al. (dino-vit-features).

1. `cluster_tokens`: k-means over the L2-normalised tokens of all images, k grown until the inertia stops
falling.
2. `salient_clusters`: clusters that are salient in most images are the common object. An MLM has no class
token whose attention gives saliency, so `oracle_clusters` reports beside it the best that any choice of
clusters could do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize

from kvutils.errors import DataError, ParameterError

MAX_CLUSTERS = 14


@dataclass(frozen=True)
class Clusters:
    """labels: one (N_i,) int array per image; inertias[j]: mean squared distance with j + 1 clusters."""

    labels: list[np.ndarray]
    num_clusters: int
    inertias: tuple[float, ...]


def cluster_tokens(
    tokens: Sequence[np.ndarray],
    max_clusters: int = MAX_CLUSTERS,
    elbow: float = 0.975,
    sample_interval: int = 1,
    n_init: int = 10,
    seed: int = 0,
) -> Clusters:
    """Joint k-means of the tokens (N_i, C) of all images of a group; grids may differ.

    k grows from 1 until inertia(k) > elbow * inertia(k - 1), at most max_clusters; that last k is the one
    used, as in the reference. Centres are fitted to every sample_interval-th token (reference: 100 of its
    dense patches; default all) and the inertia is that of all tokens. scikit-learn's k-means stands in for
    faiss, so labels are not bit-identical.
    """
    if not len(tokens) or any(t.ndim != 2 or t.shape[1] != tokens[0].shape[1] for t in tokens):
        raise DataError("tokens must be a list of (N_i, C) arrays with equal C, at least one")
    stacked = np.concatenate(tokens).astype(np.float32)
    if not np.isfinite(stacked).all():
        raise DataError("tokens hold NaN or infinite values")
    points = normalize(stacked)
    fitted = np.concatenate([normalize(np.asarray(t, dtype=np.float32)[::sample_interval]) for t in tokens])
    limit = min(max_clusters, len(np.unique(fitted, axis=0)))
    inertias: list[float] = []
    labels = np.zeros(len(points), dtype=np.int64)
    for k in range(1, limit + 1):
        model = KMeans(n_clusters=k, n_init=n_init, max_iter=300, random_state=seed).fit(fitted)
        labels = model.predict(points)
        inertias.append(float(np.square(points - model.cluster_centers_[labels]).sum(axis=1).mean()))
        if k > 1 and inertias[-1] > elbow * inertias[-2]:
            break
    ends = np.cumsum([len(t) for t in tokens])[:-1]
    return Clusters(np.split(labels.astype(np.int64), ends), len(inertias), tuple(inertias))


def salient_clusters(
    labels: Sequence[np.ndarray],
    saliency: Sequence[np.ndarray],
    num_clusters: int,
    threshold: float = 0.065,
    votes_percentage: float = 75,
) -> tuple[np.ndarray, np.ndarray]:
    """(votes (num_clusters,), indices of salient clusters). labels, saliency: (N_i,) per image.

    An image votes for a cluster if its tokens there have a mean saliency above the threshold; a cluster
    absent from the image gets no vote. Salient: votes >= ceil(images * votes_percentage / 100).
    """
    if len(labels) != len(saliency) or not len(labels):
        raise DataError(f"{len(labels)} label maps for {len(saliency)} saliency maps")
    votes = np.zeros(num_clusters)
    for i, (image_labels, image_saliency) in enumerate(zip(labels, saliency, strict=True)):
        image_labels, image_saliency = np.ravel(image_labels), np.ravel(image_saliency)
        if len(image_labels) != len(image_saliency):
            raise DataError(f"image {i}: {len(image_labels)} labels, {len(image_saliency)} saliency values")
        if len(image_labels) and not 0 <= image_labels.min() <= image_labels.max() < num_clusters:
            raise DataError(f"image {i}: cluster labels must be 0..{num_clusters - 1}")
        for cluster in np.unique(image_labels):
            votes[cluster] += image_saliency[image_labels == cluster].mean() > threshold
    return votes, np.flatnonzero(votes >= np.ceil(len(labels) * votes_percentage / 100))


def oracle_clusters(
    labels: Sequence[np.ndarray],
    foreground: Sequence[np.ndarray],
    pixels: Sequence[np.ndarray] | None = None,
    num_clusters: int | None = None,
) -> tuple[np.ndarray, float]:
    """(indices of the best union of clusters, its mean Jaccard over images): the upper bound of any choice.

    labels (N_i,) per image; foreground (N_i,) true foreground pixels in each token, pixels (N_i,) annotated
    pixels in it (default 1, so that foreground is a share). All unions of at most 16 clusters are tried. Two
    empty masks score 1.
    """
    k = 1 + max(int(image.max()) for image in labels) if num_clusters is None else num_clusters
    if k > 16:
        raise ParameterError(f"the oracle tries all unions of at most 16 clusters, found {k}")
    pixels = [np.ones(len(image)) for image in labels] if pixels is None else pixels
    inside = np.stack([np.bincount(c, f, k) for c, f in zip(labels, foreground, strict=True)]).astype(float)
    area = np.stack([np.bincount(c, p, k) for c, p in zip(labels, pixels, strict=True)]).astype(float)
    chosen = (np.arange(2**k)[:, None] >> np.arange(k)) & 1  # (unions, clusters)
    intersection = chosen @ inside.T
    union = chosen @ (area - inside).T + inside.sum(axis=1)
    score = np.where(union > 0, intersection / np.maximum(union, 1e-12), 1.0).mean(axis=1)
    best = int(score.argmax())
    return np.flatnonzero(chosen[best]), float(score[best])
