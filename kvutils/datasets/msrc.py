"""MSRC v2 for co-segmentation: groups of images that show the same kind of object.

In the ground truth (layout: data/catalog.yaml) the colour of a pixel is its class, black is void. The first number of a file name
such as 5_1_s.bmp is the set of pictures (5: cows), the second counts within the set; the published database has 591 images.
Protocol of Amir et al. (Deep ViT Features, MSRC7): seven classes, ten images each. Which ten is not said there; here they are the
first, by number, of the set that shows most of the class."""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.files import every, expect, find, limits, need
from kvutils.datasets.labels import Picture, read_labels
from kvutils.datasets.samples import ImageGroup, LabelledImage
from kvutils.errors import DataError, ParameterError, one_of

log = logging.getLogger(__name__)
COLOURS = {  # the database's own colours; every channel is 0, 64, 128 or 192
    "building": (128, 0, 0), "grass": (0, 128, 0), "tree": (128, 128, 0), "cow": (0, 0, 128), "horse": (128, 0, 128),
    "sheep": (0, 128, 128), "sky": (128, 128, 128), "mountain": (64, 0, 0), "plane": (192, 0, 0), "water": (64, 128, 0),
    "face": (192, 128, 0), "car": (64, 0, 128), "bicycle": (192, 0, 128), "flower": (64, 128, 128), "sign": (192, 128, 128),
    "bird": (0, 64, 0), "book": (128, 64, 0), "chair": (0, 192, 0), "road": (128, 64, 128), "cat": (0, 192, 128),
    "dog": (128, 192, 128), "body": (64, 64, 0), "boat": (192, 64, 0),
}  # fmt: skip
MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
IMAGES = 591
_NAMES = list(COLOURS)
_UNKNOWN = len(COLOURS) + 1  # label of a colour that is no class; void is 0, classes are 1..
_LABEL = np.full(256, _UNKNOWN, np.uint8)  # by code: two bits per channel, see `_labels`
_CODE = (16, 4, 1)
_LABEL[0] = 0
_LABEL[np.array([*COLOURS.values()]) // 64 @ _CODE] = np.arange(1, _UNKNOWN)


def msrc_groups(root: str | Path, classes: Sequence[str] = MSRC7, images: int | None = 10,
                unknown_colours: str = "error") -> list[ImageGroup]:  # fmt: skip
    """One group per class: masks are 1 on the class, `VOID` where the ground truth is black, 0 elsewhere.

    images: how many per group, the first by number; None takes all that show the class, of the set (first number of the
    name) in which the class covers most pixels. Which images show a class is only in the ground truth, so that is read up
    front (a second or two); pictures and masks are opened when they are asked for. unknown_colours: a colour that is no
    class is an "error" that names file and colour, or "void". Raises ParameterError for an unknown class or option,
    DataError for a missing file, and for fewer images than asked."""
    if not classes or len(set(classes)) != len(classes) or set(classes) - set(COLOURS):
        raise ParameterError(f"classes must be different ones of {', '.join(COLOURS)}; found {list(classes)}")
    limits(images=images)
    one_of("unknown_colours", unknown_colours, ("error", "void"))
    files = _find_files(Path(root))
    shares = {number: np.bincount(_labels(*paths)[0].ravel(), minlength=_UNKNOWN + 1) for number, paths in files.items()}
    shares = {number: counts / counts.sum() for number, counts in shares.items()}
    groups = []
    for name in classes:
        label = _NAMES.index(name) + 1
        covered: dict[int, float] = defaultdict(float)
        for number, share in shares.items():
            covered[number[0]] += share[label]
        own = max(covered, key=covered.__getitem__)
        chosen = [files[number] for number, share in shares.items() if share[label] and number[0] == own][:images]
        if len(chosen) < (images or 1):
            raise missing_data("msrc", f"only {len(chosen)} of {len(files)} images in {root} can be taken for the class {name!r}, "
                                       f"expected {images or 'at least 1'}")  # fmt: skip
        groups.append(ImageGroup(name, name, tuple(
            LabelledImage(picture.source.stem, picture, partial(_read_mask, picture, truth, label, unknown_colours))
            for picture, truth in chosen)))  # fmt: skip
    return groups


def _find_files(root: Path) -> dict[tuple[int, int], tuple[Picture, Path]]:
    """(set, number) -> (picture, ground truth), by number; every picture must have its ground truth."""
    folder = find("msrc", root / "MSRC_ObjCategImageDatabase_v2" / "Images", root / "Images")
    files = {}
    for picture in every("msrc", folder, "*.bmp"):
        match = re.fullmatch(r"(\d+)_(\d+)_s", picture.stem)
        expect(match, f"{picture}: expected names such as 5_1_s.bmp in {folder}")
        files[int(match[1]), int(match[2])] = (Picture(picture), folder.parent / "GroundTruth" / f"{picture.stem}_GT.bmp")
    files = dict(sorted(files.items()))
    need("msrc", f"ground truths of the images in {folder}", (truth for _, truth in files.values()))
    if len(files) != IMAGES:
        log.warning("%s holds %d images, the published database %d: groups may differ from those of others.", folder, len(files), IMAGES)
    return files


def _labels(picture: Picture, truth: Path) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) labels: 0 void, 1.. classes in the order of `COLOURS`, or `_UNKNOWN`; and the (H, W, 3) colours."""
    colours = read_labels(truth, picture, ("RGB",), "a colour-coded ground truth (RGB)")
    exact = (colours % 64 == 0).all(axis=-1)
    return np.where(exact, _LABEL[colours // 64 @ _CODE], _UNKNOWN), colours


def _read_mask(picture: Picture, truth: Path, label: int, unknown_colours: str) -> np.ndarray:
    """(H, W) uint8 of one class: 1, 0 or `VOID`."""
    labels, colours = _labels(picture, truth)
    strange = labels == _UNKNOWN
    if strange.any() and unknown_colours == "error":
        first = tuple(colours[strange][0].tolist())
        raise DataError(f"{truth}: the colour {first} is no class of MSRC v2 ({int(strange.sum())} such pixels); was the file "
                        "smoothed or converted? unknown_colours='void' leaves such pixels out")  # fmt: skip
    return np.where((labels == 0) | strange, VOID, labels == label).astype(np.uint8)
