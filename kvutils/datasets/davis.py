"""DAVIS-2017 in its official layout: videos with tracked objects.

    DAVIS/JPEGImages/480p/<sequence>/00000.jpg ...    DAVIS/Annotations/480p/<sequence>/00000.png ...
    DAVIS/ImageSets/2017/val.txt                      one sequence name per line

Annotations are palette images whose index is the object (from 1), 255 is void.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.samples import Clip, Pictures
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image


def davis_clips(
    root: str | Path,
    split: str = "val",
    sequences: Sequence[str] | None = None,
    resolution: str = "480p",
    max_frames: int | None = None,
) -> list[Clip]:
    """Clips of a split (or the named `sequences`) in its order; `max_frames` keeps the first frames of each.

    root: the folder `DAVIS` or the one that holds it. That every frame has its annotation, and that the first of each
    sequence is of DAVIS-2017 and marks an object, is checked at once; frames and the other annotations are read when
    they are asked for. Raises DataError that names the missing or malformed file.
    """
    root = Path(root)
    if max_frames is not None and max_frames < 1:
        raise ParameterError(f"max_frames must be at least 1, not {max_frames}")
    home = next((folder for folder in (root / "DAVIS", root) if (folder / "JPEGImages").is_dir()), None)
    if home is None:
        expected = root / "DAVIS" / "JPEGImages" / resolution
        raise missing_data("davis-2017", f"no DAVIS data in {root}: expected {expected}")
    names = _read_split(home, split) if sequences is None else list(sequences)
    return [open_clip(home, name, resolution, max_frames) for name in names]


def _read_split(home: Path, split: str) -> list[str]:
    path = home / "ImageSets" / "2017" / f"{split}.txt"
    if not path.is_file():
        raise missing_data("davis-2017", f"{path} is missing: it lists the sequences of the split {split!r}, one a line")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def open_clip(home: Path, name: str, resolution: str = "480p", max_frames: int | None = None) -> Clip:
    """One sequence of the folder `DAVIS`; every frame must have its annotation."""
    folder = home / "JPEGImages" / resolution / name
    pictures = sorted(folder.glob("*.jpg"))[:max_frames]
    if not pictures:
        raise missing_data("davis-2017", f"{folder} holds no frames (*.jpg): is the sequence {name!r} extracted?")
    paths = [home / "Annotations" / resolution / name / f"{picture.stem}.png" for picture in pictures]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise missing_data("davis-2017", f"{missing[0]} is missing, and {len(missing) - 1} more of the {len(paths)} "
                                         f"annotations of {name}: every frame of a sequence needs its own")  # fmt: skip
    first = _read_mask(paths[0], pictures[0])
    if not first[first != VOID].any():
        raise DataError(f"{name}: the first annotation marks no object to follow")
    frames = Pictures([partial(open_image, picture) for picture in pictures])
    return Clip(name, frames, partial(_read_masks, paths, pictures))


def _read_masks(paths: Sequence[Path], pictures: Sequence[Path]) -> np.ndarray:
    masks = [_read_mask(path, picture) for path, picture in zip(paths, pictures, strict=True)]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise DataError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, but the first annotation of its sequence "
                            f"{masks[0].shape[1]}x{masks[0].shape[0]}")  # fmt: skip
    return np.stack(masks)


def _read_mask(path: Path, picture: Path) -> np.ndarray:
    """(H, W) uint8 object numbers of a palette image, in the pixels of its frame."""
    try:
        with Image.open(path) as image:
            if image.mode != "P":
                raise DataError(
                    f"{path} is a {image.mode!r} image, not a palette one: DAVIS-2016 marks its one object "
                    "with 255, which is void in DAVIS-2017; use the annotations of DAVIS-2017"
                )
            mask = np.array(image)
        with Image.open(picture) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} or its frame {picture} cannot be read: {error}") from error
    if mask.shape != (height, width):
        raise DataError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, but its frame {width}x{height}")
    return mask
