"""Feature sources as pictures: principal components as colours, similarity to the token under a point."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from kvutils.images import encode_image
from kvutils.layout import TokenLayout, check_points
from kvutils.readout.features import FeatureExtractor, ImageFeatures

SHOWN = ("pixels", "encoder_original", "encoder", "projector")  # beside the values of every layer


def to_grid(layout: TokenLayout, values: np.ndarray) -> np.ndarray:
    """(rows, columns, ...) of per-token values (N, ...) of one view; NaN (or 0 for integers) where there is no token."""
    empty = np.nan if np.issubdtype(values.dtype, np.floating) else 0
    grid = np.full((*layout.cells.max(axis=0) + 1, *values.shape[1:]), empty, dtype=values.dtype)
    grid[layout.cells[:, 0], layout.cells[:, 1]] = values
    return grid


def pca_colours(tokens: Sequence[np.ndarray], solver: str = "full") -> list[np.ndarray]:
    """First three principal components of all tokens together, as colours: per image (N, 3) uint8. Each component is stretched
    from its 1st to its 99th percentile; its sign makes its third moment positive, so that colours do not depend on the solver,
    one of scikit-learn's PCA ("arpack" for as few components of as many channels)."""
    every = np.concatenate(tokens)
    parts = PCA(3, svd_solver=solver, random_state=0).fit_transform(every - every.mean(0))
    parts = parts * np.where((parts**3).sum(0) < 0, -1, 1)
    low, high = np.percentile(parts, (1, 99), axis=0)
    colours = (np.clip((parts - low) / np.maximum(high - low, 1e-9), 0, 1) * 255).round().astype(np.uint8)
    return np.split(colours, np.cumsum([len(t) for t in tokens])[:-1])


def directions(tokens: torch.Tensor, over: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """(N, C) float32 tokens of unit length, whose dot products are centred cosines: the mean token (of those in `over`) is
    subtracted. In many layers all tokens share one large direction, and without this every map of similarity is flat (ours)."""
    tokens = tokens.float()
    return torch.nn.functional.normalize(tokens - tokens[over].mean(0), dim=-1)


def similarity_to_point(features: ImageFeatures, source: str, point: tuple[float, float]) -> np.ndarray:
    """(N,) cosine similarity of every token of a source to the token under a point (x, y in image pixels), centred as in `directions`."""
    tokens = directions(features.features[source].cpu())
    return (tokens @ tokens[int(features.layout.token_at(check_points(point, features.layout.image_size))[0])]).numpy()


def picture(extractor: FeatureExtractor, name: str, image: Image.Image, point: tuple[float, float],
            context: Mapping[str, Image.Image]) -> dict:  # fmt: skip
    """What the figures of one image need, JSON-able: thumbnail, token rectangles, PCA colours and similarity maps. The principal
    components are those of the image's and the `context` images' tokens together."""
    found, pca, similarity = extractor.images([(name, image), *context.items()]), {}, {}
    layout = found[0].layout
    for source in (s for s in extractor.sources if s in SHOWN or s.startswith("value.")):
        pca[source] = to_grid(layout, pca_colours([f.features[source].float().cpu().numpy() for f in found])[0]).tolist()
        similarity[source] = to_grid(layout, similarity_to_point(found[0], source, point).astype(float)).round(3).tolist()
    return {"image": encode_image(image), "size": list(image.size), "point": list(point), "rects": layout.rects.round(2).tolist(),
            "clicked": int(layout.token_at(np.array([point]))[0]), "pca": pca, "similarity": similarity}  # fmt: skip
