"""Statistics of the image keys of a model over many images; `kvutils.tasks.key_statistics` says what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image

from kvutils import VOID
from kvutils.datasets.samples import LabelledImage
from kvutils.errors import DataError, at_least
from kvutils.keys import KeyVariance, SameGrid
from kvutils.kvcache import Capture, capture, capture_prepared
from kvutils.layout import TokenLayout
from kvutils.models import MLM
from kvutils.readout.attention import attention_mass
from kvutils.store import Frame, Parts, in_chunks
from kvutils.vision import encode_images, over_images, prepare_images

# columns of a table in a file: what a row is about, what is said of its token
_PLACE, _TOKEN = ("layer", "head", "token"), ("slot", "view", "newline", "foreground")
_CELL, _RECT = ("row", "column"), ("x0", "y0", "x1", "y1")
_MEASURED = {"variance": "variance", "norm": "norm", "mass": "attention", "turned": "variance, patches reversed"}  # field -> column


@dataclass(frozen=True, eq=False)
class KeyTable:
    """Statistics of every image key of a model. All tensors are float64 on the CPU; mass and turned are None where they were not measured.
    variance, norm, mass (L, G, N): L2 variance over images (squared key units), mean L2 norm, mean attention weight (0..1) from the text.
    foreground (N,): share of images, 0..1, in which the token is mostly foreground. layout: of every image. turned (L, G, N): the variance
    over images with their patches in reverse order, from `measure_turned`."""

    name: str
    variance: torch.Tensor
    norm: torch.Tensor
    mass: torch.Tensor | None
    foreground: np.ndarray
    layout: TokenLayout
    images: int
    mass_images: int
    turned: torch.Tensor | None = None

    @property
    def real(self) -> torch.Tensor:
        """(N,) bool: tokens that are no newlines."""
        return torch.from_numpy(~self.layout.is_newline)

    def strips(self, axis: int, count: int = 6) -> list[int]:
        """For each token that is no newline, in which of so many strips of the picture it lies, side by side (axis 0) or above each other (1)."""
        place = self.layout.centers[self.real.numpy(), axis] / self.layout.image_size[axis]
        return (count * place).astype(int).clip(0, count - 1).tolist()

    def frame(self) -> Frame:
        """A row per layer, key-value head and image token: where the token is, and its key's statistics."""
        layout, shape = self.layout, self.variance.shape
        each = (layout.slots, layout.view, layout.is_newline, self.foreground, *layout.cells.T, *layout.rects.T)
        places = dict(zip(_TOKEN + _CELL + _RECT, each, strict=True))
        columns = dict(zip(_PLACE, np.indices(shape).reshape(3, -1), strict=True))
        columns |= {name: np.tile(each, shape[0] * shape[1]) for name, each in places.items()}
        columns |= {column: found.flatten().numpy() for name, column in _MEASURED.items() if (found := getattr(self, name)) is not None}
        about = {"name": self.name, "images": self.images, "mass_images": self.mass_images, "image_size": layout.image_size, "grids": layout.grids}
        return Frame(columns, about)

    @classmethod
    def of_frame(cls, frame: Frame) -> Self:
        """DataError unless the rows are all layers x heads x tokens, in this order."""
        about, places = frame.about, np.stack([frame[name] for name in _PLACE])
        shape = tuple(places.max(axis=1) + 1)
        if places.shape[1] != np.prod(shape) or (places != np.indices(shape).reshape(3, -1)).any():
            raise DataError(f"keys of {about['name']}: expected a row for each of {shape[0]} layers x {shape[1]} heads x {shape[2]} tokens, in "
                            f"this order, found {places.shape[1]} rows in another")  # fmt: skip
        slots, view, newline, often = (frame[name][: shape[2]] for name in _TOKEN)
        cells, rects = (np.stack([frame[name][: shape[2]] for name in names], axis=1) for names in (_CELL, _RECT))
        grids = {name: tuple(size) for name, size in about["grids"].items()}
        layout = TokenLayout(slots, rects, cells, view, newline, tuple(about["image_size"]), grids)
        found = {name: torch.tensor(frame[column].reshape(shape)) if column in frame.columns else None for name, column in _MEASURED.items()}
        return cls(about["name"], **found, foreground=often, layout=layout, images=about["images"], mass_images=about["mass_images"])


def measure_keys(mlm: MLM, images: Sequence[LabelledImage], questions: Sequence[str], parts: Parts | None = None, *,
                 mass_images: int = 200, chunk: int = 250, progress: bool = True) -> KeyTable:  # fmt: skip
    """Read the keys of all images, and the attention that `questions` pay to them, if there are any. images: any
    sequence of samples with `id`, `image` and `mask` (0 background, `VOID` unknown), all of one token grid. mass_images: how many of them
    the attention is measured on. With `parts` finished chunks are kept (at 7B some 0.3 to 0.6 GB each), and a stopped run goes on. Raises
    DataError for different grids and for no images, and what `capture` raises."""
    at_least("mass_images", mass_images)
    if not len(images):
        raise DataError("a variance across images needs images, found none")
    mass_images = min(mass_images, len(images)) if questions else 0
    grid, total, mass, foreground = SameGrid(), KeyVariance(), 0.0, 0.0

    def compute(some: list[int]) -> dict:
        samples, variance, seen = [images[i] for i in some], KeyVariance(), []

        def add(index: int, one: Capture) -> None:
            grid.check(one.layout, samples[index].id)
            variance.update(one.keys[None])
            mask = np.asarray(samples[index].mask)
            labels, _ = one.layout.token_labels(np.where(mask == VOID, VOID, mask > 0))
            seen.append(labels == 1)

        capture(mlm, [s.image for s in samples], values=False, features=False, to=None, on_capture=add)
        found = variance.state_dict() | {"foreground": torch.from_numpy(np.sum(seen, axis=0, dtype=float)), "cells": torch.from_numpy(grid.layout.cells)}
        heard = [sample.image for i, sample in zip(some, samples, strict=True) if i < mass_images]
        if heard:
            found["mass"] = attention_mass(mlm, heard, questions) * len(heard)
        return found

    chunks = in_chunks(parts, "keys", range(len(images)), compute, chunk, [mlm.settings, list(questions)],
                       of=lambda i: [images[i].id, i < mass_images], unit="image", progress=progress)  # fmt: skip
    cells = None
    for found in chunks:
        if cells is not None and not torch.equal(cells, found["cells"]):  # the images of stored chunks are not opened again
            raise DataError("the images have several token grids: resize all of them to one size, or, with a LLaVA model, use "
                            "dataclasses.replace(mlm, base_view_only=True)")  # fmt: skip
        cells = found["cells"]
        foreground, mass = foreground + found["foreground"], mass + found.get("mass", 0.0)
        total.merge(KeyVariance.from_state(found))
    # The layout of images whose keys were stored: one is read again.
    layout = grid.layout or capture(mlm, [images[0].image], layers=[0], values=False, features=False)[0].layout
    return KeyTable(mlm.name, total.result, total.mean_norm, mass / mass_images if questions else None,
                    np.asarray(foreground) / total.count, layout, total.count, mass_images)  # fmt: skip


@torch.no_grad()
def measure_turned(mlm: MLM, images: Sequence[LabelledImage], parts: Parts | None = None, *, chunk: int = 250, progress: bool = True) -> torch.Tensor:
    """(L, G, N) variance of the keys over images whose patches are fed in reverse order; newlines and positions stay where they are. What
    is low at the same slots as in the usual order comes from the place in the order; what moves along with the patches from what they show.
    images, parts: as in `measure_keys`, whose grid they have."""

    def run(pictures: Sequence[Image.Image], names: Sequence[str]) -> list[Capture]:
        vision = prepare_images(mlm, pictures, names)
        encoder, projected = encode_images(mlm, vision)
        projected = [tokens[torch.from_numpy(turned(layout)).to(tokens.device)] for tokens, layout in zip(projected, vision.layouts, strict=True)]
        return capture_prepared(mlm, vision, None, tuple(range(mlm.num_layers)), values=False, features=False, encoded=(encoder, projected))

    def compute(some: list[int]) -> dict:
        variance = KeyVariance()
        for one in over_images(run, [images[i].image for i in some], batch_size=8):
            variance.update(one.keys[None])
        return variance.state_dict()

    total = KeyVariance()
    for found in in_chunks(parts, "keys_turned", range(len(images)), compute, chunk, mlm.settings, of=lambda i: images[i].id, unit="image",
                           progress=progress):  # fmt: skip
        total.merge(KeyVariance.from_state(found))
    return total.result


def turned(layout: TokenLayout) -> np.ndarray:
    """(N,) which token's patch is at each token where patches are in reverse order; newlines keep their places."""
    order, real = np.arange(len(layout)), np.flatnonzero(~layout.is_newline)
    order[real] = real[::-1]
    return order
