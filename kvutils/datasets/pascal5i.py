"""The Pascal-5i episode list of HSNet (juhongm999/hsnet, data/pascal.py), reproduced draw for draw.

The query of episode i is line i mod n of the fold's list. Supports are drawn one at a time from the images of
the query's class with the legacy numpy generator; only the query itself is rejected, so a support may appear
twice.

Pascal-5i: few-shot episodes over PASCAL VOC 2012, drawn from the lists of HSNet as its test does.

    VOC2012/JPEGImages/2007_000129.jpg ...
    VOC2012/SegmentationClassAug/2007_000129.png ...    or SegmentationClass/, as in the VOC archive
    splits/pascal/val/fold0.txt ... fold3.txt           lines <image>__<class 1..20>, data/splits of juhongm999/hsnet

`VOC2012` may be in `VOCdevkit` (as the archive extracts), and `splits` in `data` (as HSNet's repository has it).
All 1,381 images of these four lists are in VOC's own ImageSets/Segmentation/val.txt, and none is in HSNet's training
lists: the plain VOC archive is enough, the additional masks of SBD are for training only. SegmentationClassAug is
single channel, SegmentationClass a palette image; both hold class numbers, 0 background, 255 void.

Copies on the Hugging Face hub are not read: nateraw/pascal-voc-2012 has only image and mask, the lists go by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.files import class_mask, read_labels
from kvutils.datasets.samples import Episode, LabelledImage
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image

CLASS_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
FOLDS, CLASSES_PER_FOLD = 4, 5


def fold_classes(fold: int) -> list[int]:
    """Class indices 0..19 of a fold 0..3."""
    if fold not in range(FOLDS):
        raise ParameterError(f"fold must be 0..{FOLDS - 1}, found {fold!r}")
    return list(range(fold * CLASSES_PER_FOLD, (fold + 1) * CLASSES_PER_FOLD))


def read_split(path: str | Path) -> list[tuple[str, int]]:
    """(image name, class index 0..19) of each line `<image>__<class 1..20>` of a list, in file order."""
    entries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        name, mark, class_id = line.strip().partition("__")
        if not name or not mark or not class_id.isdigit() or not 1 <= int(class_id) <= len(CLASS_NAMES):
            raise DataError(f"{path}, line {number}: expected '<image>__<class 1..20>', found {line!r}")
        entries.append((name, int(class_id) - 1))
    if not entries:
        raise DataError(f"{path} is empty; it should list the images of one Pascal-5i fold")
    return entries


def sample_episodes(
    entries: Sequence[tuple[str, int]], shot: int = 5, n_episodes: int = 1000, seed: int = 0
) -> list[tuple[str, tuple[str, ...], int]]:
    """[(query, supports, class index)] of one fold. entries: (image name, class index) in list order.

    Raises ParameterError for a shot below 1, DataError for a class whose only image is the query.
    """
    if shot < 1 or n_episodes < 1:
        raise ParameterError(f"shot and n_episodes must be at least 1, found {shot} and {n_episodes}")
    by_class: dict[int, list[str]] = {}
    for name, class_index in entries:
        by_class.setdefault(class_index, []).append(name)
    random = np.random.RandomState(seed)
    episodes = []
    for i in range(n_episodes):
        query, class_index = entries[i % len(entries)]
        names = by_class[class_index]
        if set(names) == {query}:
            raise DataError(
                f"class {class_index} has no image but the query {query!r}: no support can be drawn"
            )
        supports: list[str] = []
        while len(supports) < shot:
            # np.random.choice(names, 1, replace=False) is the first element of a permutation
            name = names[random.permutation(len(names))[0]]
            if name != query:
                supports.append(name)
        episodes.append((query, tuple(supports), class_index))
    return episodes


_MASKS = ("SegmentationClassAug", "SegmentationClass")


def pascal5i_episodes(
    root: str | Path,
    folds: Sequence[int] = tuple(range(FOLDS)),
    per_fold: int = 1000,
    shot: int = 5,
    seed: int = 0,
    image_size: int | None = None,
) -> list[Episode]:
    """HSNet's test episodes, fold by fold: masks 1 on the class, 0 elsewhere, `VOID` on the annotators' borders.

    per_fold keeps the first episodes of each fold's 1,000. image_size: side of the square to which pictures and
    masks (query and support) are resized, 400 in HSNet's test; None (default, ours) keeps them as they are, because
    the readout is interpolated to the pixels of the query's mask. Images are named by VOC, so one that serves
    several classes keeps its id. Raises ParameterError for an impossible fold or size, DataError for missing files
    (before anything is opened), a malformed list, and a mask that is no class image or lacks the class of its list.
    """
    if not folds or len(set(folds)) != len(folds):
        raise ParameterError(f"folds must be different ones of 0..{FOLDS - 1}, found {list(folds)}")
    if image_size is not None and image_size < 1:
        raise ParameterError(f"image_size must be at least 1, or None, not {image_size}")
    lists = {fold: _fold_list(Path(root), fold) for fold in folds}
    drawn = {fold: sample_episodes(entries, shot, per_fold, seed) for fold, entries in lists.items()}
    needed = dict.fromkeys(name for each in drawn.values() for query, shots, _ in each for name in (query, *shots))
    pictures, masks = _find_files(Path(root), list(needed))

    def labelled(name: str, class_index: int) -> LabelledImage:
        picture = pictures / f"{name}.jpg"
        mask = partial(_read_mask, masks / f"{name}.png", picture, class_index, image_size)
        return LabelledImage(name, partial(_read_picture, picture, image_size), mask)

    return [
        Episode(
            id=f"fold{fold}-{i:04d}",
            class_index=class_index,
            class_name=CLASS_NAMES[class_index],
            fold=fold,
            query=labelled(query, class_index),
            supports=tuple(labelled(name, class_index) for name in supports),
        )
        for fold, each in drawn.items()
        for i, (query, supports, class_index) in enumerate(each)
    ]


def _fold_list(root: Path, fold: int) -> list[tuple[str, int]]:
    """(image name, class index) of the validation list of a fold, all of the fold's classes."""
    members = fold_classes(fold)
    places = [root / home / "splits" / "pascal" / "val" / f"fold{fold}.txt" for home in (".", "data", "hsnet/data")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise missing_data("pascal-5i", f"{places[0]} is missing: HSNet's list of the images of fold {fold}")
    entries = read_split(path)
    strange = [f"{name}__{index + 1:02d}" for name, index in entries if index not in members]
    if strange:
        raise DataError(
            f"{path}: expected classes {members[0] + 1}..{members[-1] + 1} (fold {fold}), found {strange[0]!r}; "
            "is it the list of another fold, or a training list?"
        )
    return entries


def _find_files(root: Path, names: Sequence[str]) -> tuple[Path, Path]:
    """The folders of pictures and masks; every name must be in both."""
    places = [root / home for home in ("VOC2012", "VOCdevkit/VOC2012", ".")]
    home = next((place for place in places if (place / "JPEGImages").is_dir()), None)
    if home is None:
        raise missing_data("pascal-5i", f"there is no folder {places[0] / 'JPEGImages'}")
    lacking = [name for name in names if not (home / "JPEGImages" / f"{name}.jpg").is_file()]
    if lacking:
        what = f"{len(lacking)} of the {len(names)} images of the episodes are missing in {home / 'JPEGImages'}"
        raise missing_data("pascal-5i", f"{what} (first: {lacking[0]}.jpg)")
    folders = [home / name for name in _MASKS if (home / name).is_dir()] or [home / _MASKS[-1]]
    absent = [[name for name in names if not (folder / f"{name}.png").is_file()] for folder in folders]
    best = min(range(len(folders)), key=lambda i: len(absent[i]))
    if absent[best]:
        what = f"{len(absent[best])} of the {len(names)} masks of the episodes are missing in {folders[best]}"
        raise missing_data("pascal-5i", f"{what} (first: {absent[best][0]}.png)")
    return home / "JPEGImages", folders[best]


def _read_picture(path: Path, size: int | None) -> Image.Image:
    image = open_image(path)
    return image if size is None else image.resize((size, size), Image.Resampling.BILINEAR)


def _read_mask(path: Path, picture: Path, class_index: int, size: int | None) -> np.ndarray:
    """(H, W) uint8 of one class: 1, 0 or `VOID`."""
    labels = read_labels(path, picture, ("L", "P"), "class numbers (a palette or single-channel image)")
    found = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    strange = [int(value) for value in found if len(CLASS_NAMES) < value != VOID]
    if strange:
        raise DataError(f"{path}: expected classes 0..{len(CLASS_NAMES)} and {VOID} (void), found {strange[0]}")
    if class_index + 1 not in found:
        raise DataError(
            f"{path}: its list says that it shows class {class_index + 1} ({CLASS_NAMES[class_index]}), found only "
            f"{', '.join(map(str, found))}; are these SegmentationClass masks?"
        )
    mask = class_mask(labels, class_index + 1, VOID, VOID)
    if size is None:
        return mask
    # The nearest pixel as HSNet takes it: torch rounds down, where Pillow takes the middle.
    scaled = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), (size, size), mode="nearest")
    return scaled[0, 0].to(torch.uint8).numpy()
