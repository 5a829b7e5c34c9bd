"""The interactive explorer for JupyterLab: `explore(extractor, "photo.jpg")`."""

import ipywidgets
import matplotlib.pyplot as plt

from kvutils.features import FeatureExtractor
from kvutils.images import ImageLike, open_image
from kvutils.maps import similarity_to_point, to_grid


def explore(extractor: FeatureExtractor, image: ImageLike) -> ipywidgets.Widget:
    """Sliders for a point and a feature source; shows which tokens are similar to the one under the point."""
    picture = open_image(image)
    features = extractor.images([("explored", picture)])[0]
    width, height = picture.size

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

    best = [s for s in features.features if s.startswith("value.")] or list(features.features)
    return ipywidgets.interactive(
        show,
        source=ipywidgets.Dropdown(options=list(features.features), value=best[len(best) // 2], description="source"),
        x=ipywidgets.IntSlider(width // 2, 0, width - 1, description="x", continuous_update=False),
        y=ipywidgets.IntSlider(height // 2, 0, height - 1, description="y", continuous_update=False),
    )
