"""DAVIS-2017 in its official layout (data/catalog.yaml): videos with tracked objects. A list of a split holds one sequence name per
line; annotations are palette images whose index is the object (from 1), 255 is void."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID
from kvutils.datasets.files import every, expect, find, need, read_lines, visible
from kvutils.datasets.labels import Picture, check_sizes, read_labels
from kvutils.datasets.samples import Clip, Pictures
from kvutils.errors import at_least

_FEWEST = 3  # frames: the first is given and the last not scored


def davis_clips(root: str | Path, split: str = "val", sequences: Sequence[str] | None = None, resolution: str = "480p",
                max_frames: int | None = None) -> list[Clip]:  # fmt: skip
    """Clips of a split (or the named `sequences`) in its order; `max_frames` (at least 3) keeps the first frames of each.

    root: the folder `DAVIS` or the one that holds it. That every frame has an annotation of its size, that a clip has the
    three frames of which one is scored, and that the first annotation is of DAVIS-2017 and marks an object, is checked at
    once; frames and the other annotations are read when they are asked for. Raises DataError that names the file."""
    if max_frames is not None:
        at_least("max_frames", max_frames, _FEWEST)
    home = find("davis-2017", Path(root) / "DAVIS" / "JPEGImages", Path(root) / "JPEGImages").parent
    if sequences is None:
        path = find("davis-2017", home / "ImageSets" / "2017" / f"{split}.txt", hint=": it lists the sequences of the split, one a line")
        sequences = [line.strip() for _, line in read_lines(path)]
    return [_open_clip(home, name, resolution, max_frames) for name in sequences]


def _open_clip(home: Path, name: str, resolution: str, max_frames: int | None) -> Clip:
    """One sequence of the folder `DAVIS`; every frame must have its annotation."""
    folder = home / "JPEGImages" / resolution / name
    files = every("davis-2017", folder, "*.jpg", f": is the sequence {name!r} extracted?")[:max_frames]
    expect(len(files) >= _FEWEST, f"DAVIS-2017 {name}: expected at least {_FEWEST} frames in {folder}, found {len(files)}; name other sequences=")
    pictures = [Picture(file) for file in files]
    masks = home / "Annotations" / resolution / name
    paths = need("davis-2017", f"annotations of {name}", [masks / f"{file.stem}.png" for file in files])
    need("davis-2017", f"frames of {name}", [folder / f"{mask.stem}.jpg" for mask in visible(masks.glob("*.png"))])
    check_sizes(paths, pictures)
    first = _read_mask(paths[0], pictures[0])
    expect(first[first != VOID].any(), f"DAVIS-2017 {name}: the first annotation marks no object to follow")
    return Clip(name, Pictures(pictures), partial(_read_masks, paths, pictures))


def _read_masks(paths: Sequence[Path], pictures: Sequence[Picture]) -> np.ndarray:
    masks = [_read_mask(path, picture) for path, picture in zip(paths, pictures, strict=True)]
    for path, mask in zip(paths, masks, strict=True):
        expect(mask.shape == masks[0].shape, f"{path} has (height, width) {mask.shape}, but the first annotation of its sequence {masks[0].shape}")
    return np.stack(masks)


def _read_mask(path: Path, picture: Picture) -> np.ndarray:
    """(H, W) uint8 object numbers of a palette image, in the pixels of its frame."""
    expected = "a palette image of object numbers (grey ones are of DAVIS-2016, whose 255 is the object and void in DAVIS-2017)"
    return read_labels(path, picture, ("P",), expected)
