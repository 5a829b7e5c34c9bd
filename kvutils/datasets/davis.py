"""DAVIS-2017 in its official layout: videos with tracked objects.

    DAVIS/JPEGImages/480p/<sequence>/00000.jpg ...    DAVIS/Annotations/480p/<sequence>/00000.png ...
    DAVIS/ImageSets/2017/val.txt                      one sequence name per line

Annotations are palette images whose index is the object (from 1), 255 is void.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kvutils.datasets.samples import VOID, Clip
from kvutils.errors import DataError
from kvutils.images import open_image


def davis_clips(
    root: str | Path,
    split: str = "val",
    sequences: Sequence[str] | None = None,
    resolution: str = "480p",
    max_frames: int | None = None,
) -> Iterator[Clip]:
    """Clips of a split (or the named `sequences`), one at a time; `max_frames` keeps the first frames of
    each.

    root: the folder `DAVIS` or the one that holds it. Raises DataError that names the missing or malformed
    file.
    """
    root = Path(root)
    home = next((folder for folder in (root / "DAVIS", root) if (folder / "JPEGImages").is_dir()), None)
    if home is None:
        raise DataError(f"no DAVIS data in {root}: expected {root / 'DAVIS' / 'JPEGImages' / resolution}")
    for name in sequences if sequences is not None else _read_split(home, split):
        yield read_clip(home, name, resolution, max_frames)


def _read_split(home: Path, split: str) -> list[str]:
    path = home / "ImageSets" / "2017" / f"{split}.txt"
    if not path.is_file():
        raise DataError(f"{path} is missing: it lists the sequences of the split {split!r}, one per line")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_clip(home: Path, name: str, resolution: str = "480p", max_frames: int | None = None) -> Clip:
    """One sequence of the folder `DAVIS`; every frame must have its annotation."""
    folder = home / "JPEGImages" / resolution / name
    pictures = sorted(folder.glob("*.jpg"))[:max_frames]
    if not pictures:
        raise DataError(f"{folder} holds no frames (*.jpg): is the sequence {name!r} extracted?")
    masks = []
    frames = tuple(open_image(picture) for picture in pictures)
    for picture, frame in zip(pictures, frames, strict=True):
        path = home / "Annotations" / resolution / name / f"{picture.stem}.png"
        if not path.is_file():
            raise DataError(f"{path} is missing: every frame of a DAVIS sequence needs its annotation")
        masks.append(_read_mask(path, frame.size))
    if not masks[0][masks[0] != VOID].any():
        raise DataError(f"{name}: the first annotation marks no object to follow")
    return Clip(name, frames, np.stack(masks))


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 object numbers of a palette image."""
    try:
        with Image.open(path) as image:
            if image.mode != "P":
                raise DataError(
                    f"{path} is a {image.mode!r} image, not a palette one: DAVIS-2016 marks its one object "
                    "with 255, which is void in DAVIS-2017; use the annotations of DAVIS-2017"
                )
            mask = np.array(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if mask.shape != (size[1], size[0]):
        raise DataError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, but its frame {size[0]}x{size[1]}")
    return mask
