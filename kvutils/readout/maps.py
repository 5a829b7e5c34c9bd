"""Feature sources as pictures: principal components as colours, similarity to the token under a point; to be explored."""

from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from kvutils.errors import one_of
from kvutils.images import ImageLike, encode_image, open_image
from kvutils.layout import TokenLayout
from kvutils.models import MLM
from kvutils.readout.features import FeatureExtractor, ImageFeatures

SHOWN = ("pixels", "encoder_original", "encoder", "projector")  # beside the values of every layer


def to_grid(layout: TokenLayout, values: np.ndarray) -> np.ndarray:
    """(rows, columns, ...) of per-token values (N, ...) of one view; NaN (or 0 for integers) where there is no token."""
    rows, columns = layout.cells.max(axis=0) + 1
    empty = np.nan if np.issubdtype(values.dtype, np.floating) else 0
    grid = np.full((rows, columns, *values.shape[1:]), empty, dtype=values.dtype)
    grid[layout.cells[:, 0], layout.cells[:, 1]] = values
    return grid


def pca_colours(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """First three principal components of all tokens together, as colours: per image (N, 3) uint8.

    Each component is stretched from its 1st to its 99th percentile; its sign makes its third moment positive, so that
    colours do not depend on the solver."""
    every = np.concatenate(tokens)
    parts = PCA(3, svd_solver="full").fit_transform(every - every.mean(0))
    parts = parts * np.where((parts**3).sum(0) < 0, -1, 1)
    low, high = np.percentile(parts, (1, 99), axis=0)
    colours = (np.clip((parts - low) / np.maximum(high - low, 1e-9), 0, 1) * 255).round().astype(np.uint8)
    return np.split(colours, np.cumsum([len(t) for t in tokens])[:-1])


def similarity_to_point(features: ImageFeatures, source: str, point: tuple[float, float]) -> np.ndarray:
    """(N,) cosine similarity of every token of a source to the token under a point (x, y in image pixels).

    The mean token is subtracted first: in many layers all tokens share one large direction, and without this every map is flat (ours)."""
    one_of("source", source, features.features)
    tokens = features.features[source].float().cpu()
    tokens = torch.nn.functional.normalize(tokens - tokens.mean(0), dim=-1)
    return (tokens @ tokens[int(features.layout.token_at(np.array([point]))[0])]).numpy()


def picture(extractor: FeatureExtractor, name: str, image: Image.Image, point: tuple[float, float],
            context: Mapping[str, Image.Image]) -> dict:  # fmt: skip
    """What the figures of one image need, JSON-able: thumbnail, token rectangles, PCA colours and similarity maps.

    The principal components are those of the image's and the `context` images' tokens together."""
    found = extractor.images([(name, image), *context.items()])
    layout = found[0].layout
    pca, similarity = {}, {}
    for source in (s for s in extractor.sources if s in SHOWN or s.startswith("value.")):
        colours = pca_colours([f.features[source].float().cpu().numpy() for f in found])[0]
        pca[source] = to_grid(layout, colours).tolist()
        similarity[source] = to_grid(layout, similarity_to_point(found[0], source, point).astype(float)).round(3).tolist()
    clicked = int(layout.token_at(np.array([point]))[0])
    return {"image": encode_image(image), "size": list(image.size), "point": list(point), "rects": layout.rects.round(2).tolist(),
            "clicked": clicked, "pca": pca, "similarity": similarity}  # fmt: skip


def explore(model: MLM | FeatureExtractor, image: ImageLike) -> ipywidgets.Widget:
    """Sliders for a point and a feature source, in JupyterLab; shows which tokens are similar to the one under the point.

    model: an `MLM`, or an extractor that has baselines beside it."""
    extractor = model if isinstance(model, FeatureExtractor) else FeatureExtractor(model, keys=False)
    picture = open_image(image)
    features = extractor.images([("explored", picture)])[0]
    width, height = picture.size
    best = [s for s in features.features if s.startswith("value.")]

    def show(source: str, x: int, y: int) -> None:
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
        extent = (0, width, height, 0)
        left.imshow(picture, extent=extent)
        for colour, size in (("black", 3), ("white", 1)):
            left.plot(x, y, "o", ms=10, mfc="none", mec=colour, mew=size)
        scores = to_grid(features.layout, similarity_to_point(features, source, (x, y)))
        shown = right.imshow(scores, extent=extent, vmin=-1, vmax=1, cmap="cividis", interpolation="nearest")
        figure.colorbar(shown, ax=right, label="cosine similarity (centred)")
        left.set(title="image", xlabel="x (pixels)", ylabel="y (pixels)")
        right.set(title=source, xlabel="x (pixels)")
        plt.show()
        plt.close(figure)  # backends other than the inline one keep it open

    return ipywidgets.interactive(
        show,
        source=ipywidgets.Dropdown(options=list(features.features), value=best[len(best) // 2], description="source"),
        x=ipywidgets.IntSlider(width // 2, 0, width - 1, description="x", continuous_update=False),
        y=ipywidgets.IntSlider(height // 2, 0, height - 1, description="y", continuous_update=False),
    )
