"""Pictures of a data set and what is labelled in them, both in the upright pixels in which `open_image` shows a picture.

Cameras store what their sensor saw, with a note (EXIF orientation) how to turn it. `open_image` turns; data sets are annotated, and
their own tools read them, without that turn. So masks, points and boxes of every loader go through `Picture.turn`, which compares
the sizes as well: labels over the pixels of another picture would be scored in silence."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kvutils import VOID
from kvutils.datasets.files import expect, reading
from kvutils.images import open_image, orientation

# EXIF orientations in which the stored rows run from right to left, upside down, and then as columns.
_MIRRORED, _UPSIDE_DOWN, _SIDEWAYS = (2, 3, 7, 8), (3, 4, 6, 7), (5, 6, 7, 8)


@dataclass(frozen=True)
class Turn:
    """From the annotated pixels of a picture, `size` (width, height), to the upright ones."""

    size: tuple[int, int]
    orientation: int = 1

    def mask(self, labels: np.ndarray) -> np.ndarray:
        """Labels (height, width, ...), upright."""
        rows, columns = (-1 if self.orientation in turned else 1 for turned in (_UPSIDE_DOWN, _MIRRORED))
        labels = labels[::rows, ::columns]
        return np.ascontiguousarray(labels.swapaxes(0, 1) if self.orientation in _SIDEWAYS else labels)

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points (K, 2) x, y that name pixels (0 is the first), upright."""
        flipped = [self.orientation in _MIRRORED, self.orientation in _UPSIDE_DOWN]
        points = np.where(flipped, np.array(self.size) - 1 - points, points)
        return points[:, ::-1] if self.orientation in _SIDEWAYS else points

    def box(self, box: np.ndarray) -> np.ndarray:
        """A box (4,) x0, y0, x1, y1, both corners among its pixels, upright."""
        corners = self.points(box.reshape(2, 2))
        return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


@dataclass(frozen=True)
class Picture:
    """A picture that is opened anew at each call. source: its file, or what reads its encoded bytes, with `name` for errors."""

    source: Path | Callable[[], bytes]
    name: str = ""

    def __call__(self) -> Image.Image:
        """The upright RGB image. Raises ImageError, DataError."""
        if isinstance(self.source, Path):
            return open_image(self.source)
        with reading(self.name, "a picture"), Image.open(io.BytesIO(self.source())) as image:
            return open_image(image, self.name)

    def turn(self, size: tuple[int, int], what: str = "the annotation") -> Turn:
        """For what is annotated over (width, height) pixels: those that are stored, or those that are shown. Only the header
        is read. Raises DataError for any other size."""
        name = self.name or str(self.source)
        with reading(name, "a picture"), Image.open(self.source if isinstance(self.source, Path) else io.BytesIO(self.source())) as image:
            (width, height), turned = image.size, orientation(image)
        if size == (width, height):
            return Turn((width, height), turned)
        exif = f", which EXIF turns to {height}x{width}" if turned in _SIDEWAYS else ""
        expect(exif and size == (height, width), f"{what}: expected {width}x{height} pixels as its picture {name}{exif}, found "
                                                 f"{size[0]}x{size[1]}; is this the published picture, unscaled?")  # fmt: skip
        return Turn((height, width))


def check_sizes(masks: Iterable[Path], pictures: Iterable[Picture]) -> None:
    """DataError about the first mask that is not of its picture's size; only headers are read, some thousand a second."""
    for path, picture in zip(masks, pictures, strict=True):
        with reading(path, "a label image"), Image.open(path) as image:
            size = image.size
        picture.turn(size, str(path))


def read_labels(path: Path, picture: Picture, modes: Sequence[str], expected: str, highest: int | None = None) -> np.ndarray:
    """(H, W) indices of a grey or palette image, or (H, W, 3) of an RGB one, in the upright pixels of `picture`.

    modes: the Pillow modes that the data set may have; expected says in the error what these are. Colours are never
    converted. highest: the indices are 0 to this one, and `VOID`. Raises DataError for a file that cannot be read, has
    another mode, another index, or does not fit its picture."""
    with reading(path, expected), Image.open(path) as image:
        mode, labels = image.mode, np.array(image)
    expect(mode in modes, f"{path}: expected {expected}, found a {mode!r} image; was the file converted?")
    if highest is not None:
        strange = [int(value) for value in np.flatnonzero(np.bincount(labels.ravel())) if highest < value != VOID]
        expect(not strange, f"{path}: expected {expected} 0..{highest} and {VOID} (void), found {strange[:1]}")
    return picture.turn(labels.shape[1::-1], str(path)).mask(labels)


def class_mask(labels: np.ndarray, wanted: int, void: int) -> np.ndarray:
    """(H, W) uint8: 1 where `labels` is `wanted`, `VOID` where it is `void`, 0 elsewhere."""
    return np.where(labels == void, VOID, labels == wanted).astype(np.uint8)
