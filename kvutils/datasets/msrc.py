"""MSRC v2 for co-segmentation: groups of images that show the same kind of object.

    MSRC_ObjCategImageDatabase_v2/Images/5_1_s.bmp ...
    MSRC_ObjCategImageDatabase_v2/GroundTruth/5_1_s_GT.bmp ...    the colour of a pixel is its class, black is void

The first number of a file name is the set of pictures (5: cows), the second counts within the set; the published
database has 591 images. Protocol of Amir et al. (Deep ViT Features, MSRC7): seven classes, ten images each. Which ten
is not said there; here they are the first, by number, of the set that shows most of the class.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.files import read_labels
from kvutils.datasets.samples import ImageGroup, LabelledImage
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image

log = logging.getLogger(__name__)
COLOURS = {  # the database's own colours; every channel is 0, 64, 128 or 192
    "building": (128, 0, 0), "grass": (0, 128, 0), "tree": (128, 128, 0), "cow": (0, 0, 128),
    "horse": (128, 0, 128), "sheep": (0, 128, 128), "sky": (128, 128, 128), "mountain": (64, 0, 0),
    "plane": (192, 0, 0), "water": (64, 128, 0), "face": (192, 128, 0), "car": (64, 0, 128),
    "bicycle": (192, 0, 128), "flower": (64, 128, 128), "sign": (192, 128, 128), "bird": (0, 64, 0),
    "book": (128, 64, 0), "chair": (0, 192, 0), "road": (128, 64, 128), "cat": (0, 192, 128),
    "dog": (128, 192, 128), "body": (64, 64, 0), "boat": (192, 64, 0),
}  # fmt: skip
MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
IMAGES = 591
_NAMES = list(COLOURS)
_UNKNOWN = len(COLOURS) + 1  # label of a colour that is no class; void is 0, classes are 1..
_LABEL = np.full(256, _UNKNOWN, np.uint8)  # by code: two bits per channel, see `_labels`
_LABEL[0] = 0
for _number, (_r, _g, _b) in enumerate(COLOURS.values(), start=1):
    _LABEL[_r // 64 * 16 + _g // 64 * 4 + _b // 64] = _number


def msrc_groups(
    root: str | Path,
    classes: Sequence[str] = MSRC7,
    images: int | None = 10,
    whole_database: bool = False,
    unknown_colours: str = "error",
) -> list[ImageGroup]:
    """One group per class: masks are 1 on the class, `VOID` where the ground truth is black, 0 elsewhere.

    images: how many per group, the first by number; None takes all that show the class. They come from the set
    (first number of the name) in which the class covers most pixels, or with whole_database from all sets. Which
    images show a class is only in the ground truth, so that is read up front (a second or two); pictures and masks
    are opened when they are asked for. unknown_colours: a colour that is no class is an "error" that names file and
    colour, or "void". Raises ParameterError for an unknown class or option, DataError for a missing file, and for
    fewer images than asked.
    """
    unknown = [name for name in classes if name not in COLOURS]
    if unknown or not classes or len(set(classes)) != len(classes):
        raise ParameterError(f"classes must be different ones of {', '.join(COLOURS)}; found {list(classes)}")
    if images is not None and images < 1:
        raise ParameterError(f"images must be at least 1, or None for all, not {images}")
    if unknown_colours not in ("error", "void"):
        raise ParameterError(f"unknown_colours must be 'error' or 'void', found {unknown_colours!r}")
    files = _find_files(Path(root))
    shares = {number: _shares(picture, truth) for number, (picture, truth) in files.items()}
    groups = []
    for name in classes:
        label = _NAMES.index(name) + 1
        showing = [number for number, share in shares.items() if share[label]]
        if not whole_database and showing:
            covered: dict[int, float] = defaultdict(float)
            for number in showing:
                covered[number[0]] += shares[number][label]
            own = max(covered, key=lambda number: covered[number])
            showing = [number for number in showing if number[0] == own]
        if not showing or (images is not None and len(showing) < images):
            what = f"only {len(showing)} of {len(files)} images in {root} can be taken for the class {name!r}"
            raise missing_data("msrc", what + ("" if images is None else f", expected {images}"))
        chosen = [files[number] for number in showing[:images]]
        groups.append(ImageGroup(name, name, tuple(_labelled(*paths, label, unknown_colours) for paths in chosen)))
    return groups


def _find_files(root: Path) -> dict[tuple[int, int], tuple[Path, Path]]:
    """(set, number) -> (picture, ground truth), by number; every picture must have its ground truth."""
    places = [root / "MSRC_ObjCategImageDatabase_v2", root]
    home = next((place for place in places if (place / "Images").is_dir()), None)
    if home is None:
        raise missing_data("msrc", f"there is no folder {places[0] / 'Images'}")
    files = {}
    for picture in (home / "Images").glob("*.bmp"):
        match = re.fullmatch(r"(\d+)_(\d+)_s", picture.stem)
        if not match:
            raise DataError(f"{picture}: expected names such as 5_1_s.bmp in {home / 'Images'}")
        files[int(match[1]), int(match[2])] = (picture, home / "GroundTruth" / f"{picture.stem}_GT.bmp")
    files = dict(sorted(files.items()))
    absent = [truth for _, truth in files.values() if not truth.is_file()]
    if absent or not files:
        what = f"{len(absent)} of the {len(files)} images in {home / 'Images'} have no ground truth"
        raise missing_data("msrc", what + (f" (first: {absent[0]})" if absent else ""))
    if len(files) != IMAGES:
        log.warning("%s holds %d images, the published database %d: groups may differ from those of others.",
                    home / "Images", len(files), IMAGES)  # fmt: skip
    return files


def _labels(truth: Path, picture: Path) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) labels: 0 void, 1.. classes in the order of `COLOURS`, or `_UNKNOWN`; and the (H, W, 3) colours."""
    colours = read_labels(truth, picture, ("RGB",), "a colour-coded ground truth (RGB)")
    codes = colours[..., 0] // 64 * 16 + colours[..., 1] // 64 * 4 + colours[..., 2] // 64
    exact = (colours % 64 == 0).all(axis=-1)
    return np.where(exact, _LABEL[codes], _UNKNOWN), colours


def _shares(picture: Path, truth: Path) -> np.ndarray:
    labels, _ = _labels(truth, picture)
    return np.bincount(labels.ravel(), minlength=_UNKNOWN + 1) / labels.size


def _labelled(picture: Path, truth: Path, label: int, unknown_colours: str) -> LabelledImage:
    mask = partial(_read_mask, truth, picture, label, unknown_colours)
    return LabelledImage(picture.stem, partial(open_image, picture), mask)


def _read_mask(truth: Path, picture: Path, label: int, unknown_colours: str) -> np.ndarray:
    """(H, W) uint8 of one class: 1, 0 or `VOID`."""
    labels, colours = _labels(truth, picture)
    strange = labels == _UNKNOWN
    if strange.any() and unknown_colours == "error":
        first = tuple(colours[strange][0].tolist())
        raise DataError(
            f"{truth}: the colour {first} is no class of MSRC v2 ({int(strange.sum())} such pixels); was the file "
            "smoothed or converted? unknown_colours='void' leaves such pixels out"
        )
    return np.where((labels == 0) | strange, VOID, labels == label).astype(np.uint8)
