"""Label images as they are stored: exact values, over the pixels of the picture that `open_image` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from kvutils.errors import DataError

# EXIF orientation -> what turns the stored pixels upright, as PIL.ImageOps.exif_transpose does
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}


def read_labels(path: Path, picture: Path, modes: Sequence[str], expected: str) -> np.ndarray:
    """(H, W) indices of a grey or palette image, or (H, W, 3) of an RGB one, in the upright pixels of `picture`.

    modes: the Pillow modes that the data set may have; expected says in the error what these are. Colours are never
    converted. Raises DataError for a file that cannot be read, has another mode or does not fit its picture.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in modes:
                raise DataError(f"{path}: expected {expected}, found a {image.mode!r} image; was the file converted?")
            labels = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on bad data
        raise DataError(f"{path}: expected {expected}, but it cannot be read ({error})") from error
    return upright_labels(labels, picture, str(path))


def upright_labels(labels: np.ndarray, picture: Path, name: str) -> np.ndarray:
    """Labels over the stored pixels of a picture, turned as its EXIF orientation says; DataError if they do not fit.

    Data sets are annotated, and their own tools read them, without that turn. Labels of the turned size stay.
    """
    try:
        with Image.open(picture) as image:
            (width, height), orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{picture}: the picture of {name} cannot be read ({error})") from error
    turned = orientation in (5, 6, 7, 8)
    if labels.shape[:2] == (height, width):
        return np.ascontiguousarray(_TURNS[orientation](labels)) if orientation in _TURNS else labels
    if turned and labels.shape[:2] == (width, height):
        return labels
    raise DataError(
        f"{name}: expected {width}x{height} pixels as its picture {picture}, found "
        f"{labels.shape[1]}x{labels.shape[0]}"
    )


def class_mask(labels: np.ndarray, wanted: int, void: int, void_value: int) -> np.ndarray:
    """(H, W) uint8: 1 where `labels` is `wanted`, `void_value` where it is `void`, 0 elsewhere."""
    return np.where(labels == void, void_value, labels == wanted).astype(np.uint8)
