"""Pascal-5i: few-shot episodes over PASCAL VOC 2012, drawn from the lists of HSNet as its test does.

The lists (layout: data/catalog.yaml) have lines <image>__<class 1..20>, from data/splits of juhongm999/hsnet. `VOC2012` may be in
`VOCdevkit` (as the archive extracts), and `splits` in `data` (as HSNet's repository has it). All 1,381 images of these four lists
are in VOC's own ImageSets/Segmentation/val.txt, and none is in HSNet's training lists: the plain VOC archive is enough, the
additional masks of SBD are for training only. SegmentationClassAug is single channel, SegmentationClass a palette image; both hold
class numbers, 0 background, 255 void.

Copies on the Hugging Face hub are not read: nateraw/pascal-voc-2012 has only image and mask, the lists go by name."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID
from kvutils.datasets.files import expect, find, limits, need, read_lines
from kvutils.datasets.labels import Picture, check_sizes, class_mask, read_labels
from kvutils.datasets.samples import Episode, LabelledImage
from kvutils.errors import ParameterError

CLASS_NAMES = ("aeroplane bicycle bird boat bottle bus car cat chair cow "
               "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()  # fmt: skip
FOLDS, CLASSES_PER_FOLD = 4, 5


def sample_episodes(entries: Sequence[tuple[str, int]], shot: int = 5, n_episodes: int = 1000,
                    seed: int = 0) -> list[tuple[str, tuple[str, ...], int]]:  # fmt: skip
    """[(query, supports, class index)] of one fold, as HSNet (data/pascal.py) draws them. entries: (image name, class
    index) in list order.

    The query of episode i is line i mod n of the list. Supports are drawn one at a time from the images of the query's
    class with the legacy numpy generator; only the query itself is rejected, so a support may appear twice. Raises
    DataError for a class whose only image is the query."""
    by_class: dict[int, list[str]] = {}
    for name, class_index in entries:
        by_class.setdefault(class_index, []).append(name)
    random = np.random.RandomState(seed)
    episodes = []
    for i in range(n_episodes):
        query, class_index = entries[i % len(entries)]
        names = by_class[class_index]
        expect(set(names) != {query}, f"class {class_index} has no image but the query {query!r}: no support can be drawn")
        supports: list[str] = []
        while len(supports) < shot:
            # np.random.choice(names, 1, replace=False) is the first element of a permutation
            name = names[random.permutation(len(names))[0]]
            if name != query:
                supports.append(name)
        episodes.append((query, tuple(supports), class_index))
    return episodes


def pascal5i_episodes(root: str | Path, folds: Sequence[int] = tuple(range(FOLDS)), per_fold: int = 1000, shot: int = 5,
                      seed: int = 0) -> list[Episode]:  # fmt: skip
    """HSNet's test episodes, fold by fold: masks 1 on the class, 0 elsewhere, `VOID` on the annotators' borders.

    per_fold keeps the first episodes of each fold's 1,000. Pictures and masks keep their size (HSNet's test resizes both to
    400 x 400), because the readout is interpolated to the pixels of the query's mask. Images are named by VOC, so one that
    serves several classes keeps its id. Raises ParameterError for an impossible fold or number, DataError for missing files
    (before anything is opened), a malformed list, and a mask that is no class image or lacks the class of its list."""
    if not folds or len(set(folds)) != len(folds) or set(folds) - set(range(FOLDS)):
        raise ParameterError(f"folds must be different ones of 0..{FOLDS - 1}, found {list(folds)}")
    limits(per_fold=per_fold, shot=shot)
    places, hint = [Path(root) / place / "splits/pascal/val" for place in (".", "data", "hsnet/data")], ": HSNet's list of its images"
    lists = {fold: find("pascal-5i", *(place / f"fold{fold}.txt" for place in places), hint=hint) for fold in folds}
    drawn = {fold: sample_episodes(read_split(path, fold), shot, per_fold, seed) for fold, path in lists.items()}
    names = dict.fromkeys(name for each in drawn.values() for query, shots, _ in each for name in (query, *shots))
    home = find("pascal-5i", *(Path(root) / place / "JPEGImages" for place in ("VOC2012", "VOCdevkit/VOC2012", "."))).parent
    pictures = [Picture(each) for each in need("pascal-5i", "images of the episodes", [home / "JPEGImages" / f"{name}.jpg" for name in names])]
    folders = [home / "SegmentationClassAug", home / "SegmentationClass"]
    masks = need("pascal-5i", "masks of the episodes", *([folder / f"{name}.png" for name in names] for folder in folders))
    check_sizes(masks, pictures)
    files = dict(zip(names, zip(pictures, masks, strict=True), strict=True))

    def labelled(name: str, class_index: int) -> LabelledImage:
        picture, mask = files[name]
        return LabelledImage(name, picture, partial(_read_mask, mask, picture, class_index))

    episodes = []
    for fold, each in drawn.items():
        for i, (query, supports, index) in enumerate(each):
            shown = tuple(labelled(name, index) for name in supports)
            episodes.append(Episode(f"fold{fold}-{i:04d}", index, CLASS_NAMES[index], fold, labelled(query, index), shown))
    return episodes


def read_split(path: Path, fold: int) -> list[tuple[str, int]]:
    """(image name, class index 0..19) of the lines of a fold's list, all of the fold's classes. Raises DataError."""
    first, last = fold * CLASSES_PER_FOLD + 1, (fold + 1) * CLASSES_PER_FOLD
    entries = []
    for where, line in read_lines(path):
        name, _, number = line.strip().partition("__")
        fits = name and number.isdigit() and first <= int(number) <= last
        expect(fits, f"{where}: expected '<image>__<class {first}..{last}>' (fold {fold}), found {line!r}; is it the list of another fold?")
        entries.append((name, int(number) - 1))
    expect(entries, f"{path} is empty; it should list the images of fold {fold}")
    return entries


def _read_mask(path: Path, picture: Picture, class_index: int) -> np.ndarray:
    """(H, W) uint8 of one class: 1, 0 or `VOID`."""
    labels = read_labels(path, picture, ("L", "P"), "class numbers (a palette or single-channel image)", len(CLASS_NAMES))
    found = np.flatnonzero(np.bincount(labels.ravel())).tolist()
    shown = f"class {class_index + 1} ({CLASS_NAMES[class_index]})"
    expect(class_index + 1 in found, f"{path}: its list says that it shows {shown}, found only {found}; are these SegmentationClass masks?")
    return class_mask(labels, class_index + 1, VOID)
