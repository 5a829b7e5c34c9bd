"""ImageNet-S: ImageNet pictures with pixel masks of their classes, in 50, 300 or 919 classes.

    ImageNetS50/validation/n01443537/ILSVRC2012_val_00004677.JPEG ...
    ImageNetS50/validation-segmentation/n01443537/ILSVRC2012_val_00004677.png ...
    ImageNetS50/train-semi/n01443537/n01443537_23292.JPEG ...              ten images per class, for a probe
    ImageNetS50/train-semi-segmentation/n01443537/n01443537_23292.png ...
    data/categories/ImageNetS_categories_im50.txt     folder data of github.com/LUSSeg/ImageNet-S: class ids,
    data/names/ImageNetS_im50_validation.txt          which images (or data/mapping/..._mapping_validation.txt),
    data/names/ImageNetSemi_im50_train.txt            which training images,
    data/data.py                                      class names (read as text, never run)

Masks are RGB images: class id = R + 256 G, 1 for the first of the sorted categories; 0 is everything else and
1000 is ignored. The images themselves may also stay where ImageNet has them (folder `imagenet`, or `imagenet=`): the
official lists say which they are. ILSVRC/imagenet-1k on the Hugging Face hub is not read: its columns are image and
label, and the lists go by file name.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.files import class_mask, read_labels
from kvutils.datasets.samples import LabelledImage, NamedMask
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image

VARIANTS = {50: 752, 300: 4097, 919: 12419}  # classes -> images of the validation split
IGNORED = 1000


def imagenet_s_masks(
    root: str | Path,
    variant: int = 50,
    max_images: int | None = None,
    classes: Sequence[str] | None = None,
    imagenet: str | Path | None = None,
) -> list[NamedMask]:
    """The validation split: per image the class of its folder, its name and its pixels (1, `VOID` ignored, 0 else).

    variant: 50, 300 or 919 classes. max_images takes the first image of every class, then the second, and so on: a
    part in which as many classes occur as can. classes: only these (names or WordNet ids). An image may show more
    classes than the one of its folder; which is only known when its mask is decoded, and they count as background
    here. imagenet: where ImageNet is, if not in the folder `imagenet` of root, for images that are not in
    ImageNetS50/validation. Two of the 919 classes have the same name (crane). Raises ParameterError, and DataError
    for missing files before anything is opened.
    """
    lists = _lists(Path(root), variant)
    wnids, names = read_categories(lists, variant), class_names(root, variant)
    if max_images is not None and max_images < 1:
        raise ParameterError(f"max_images must be at least 1, or None, not {max_images}")
    entries = _validation_list(lists, variant, wnids)
    entries = _only(entries, wnids, names, classes)
    entries = _spread(entries, max_images)
    home = _home(Path(root), variant)
    pictures = _find_pictures("validation", home, [Path(root) / "imagenet", imagenet], entries)
    masks = _find_masks(home / "validation-segmentation", entries)
    samples = []
    for (_, name), picture, mask in zip(entries, pictures, masks, strict=True):
        wnid, image_id = name.split("/")
        index = wnids.index(wnid)
        opened = partial(_read_mask, mask, picture, len(wnids), index + 1)
        samples.append(
            NamedMask(
                id=f"{image_id}-{wnid}",
                image_id=image_id,
                image=partial(open_image, picture),
                text=names[index],
                mask=opened,
                group=image_id,
                class_name=names[index],
            )
        )
    return samples


def imagenet_s_training(
    root: str | Path, variant: int = 50, per_class: int = 1, imagenet: str | Path | None = None
) -> list[LabelledImage]:
    """Images of train-semi to fit a probe on: label maps with class index + 1, 0 background, `VOID` ignored.

    They are of ImageNet's training split, so none is in `imagenet_s_masks`. per_class: the first of each class's ten
    (the probe holds the tokens of all images in memory). Only variant 50: 255 is void, so more classes do not fit a
    label map. imagenet: as in `imagenet_s_masks`. Raises ParameterError, and DataError for missing files.
    """
    lists = _lists(Path(root), variant)
    wnids = read_categories(lists, variant)
    if len(wnids) >= VOID:
        raise ParameterError(f"a label map holds fewer than {VOID} classes ({VOID}: void), not {variant}: variant=50")
    if per_class < 1:
        raise ParameterError(f"per_class must be at least 1, not {per_class}")
    path = lists / "names" / f"ImageNetSemi_im{variant}_train.txt"
    if not path.is_file():
        raise missing_data("imagenet-s", f"{path} is missing: the official list of the training images with masks")
    entries = _read_list(path, wnids)
    of_class: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for entry in entries:
        of_class[entry[1].split("/")[0]].append(entry)
    few = [wnid for wnid in wnids if len(of_class[wnid]) < per_class]
    if few:
        raise ParameterError(f"per_class={per_class}, but {path} lists {len(of_class[few[0]])} images of {few[0]}")
    chosen = [entry for wnid in wnids for entry in of_class[wnid][:per_class]]
    home = _home(Path(root), variant)
    pictures = _find_pictures("train-semi", home, [Path(root) / "imagenet", imagenet], chosen)
    masks = _find_masks(home / "train-semi-segmentation", chosen)
    return [
        LabelledImage(Path(name).name, partial(open_image, picture), partial(_read_mask, mask, picture, len(wnids)))
        for (_, name), picture, mask in zip(chosen, pictures, masks, strict=True)
    ]


def class_names(root: str | Path, variant: int = 50) -> tuple[str, ...]:
    """The names of the classes 1, 2, ...: from the official data.py, or from class_names_<variant>.json (a list that
    begins with "background")."""
    lists = _lists(Path(root), variant)
    places = [lists / "data.py", lists / f"class_names_{variant}.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise missing_data("imagenet-s", f"{places[0]} is missing: the official list of class names")
    try:
        source = path.read_text(encoding="utf-8")
        listed = _assigned_text(source, f"classes_{variant}") if path == places[0] else ""
        names = listed.split(", ") if listed else json.loads(source)[1:]
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise DataError(f"{path}: no class names can be read from it ({error})") from error
    if len(names) != variant or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: expected {variant} class names, found {len(names)}")
    return tuple(names)


def _assigned_text(source: str, attribute: str) -> str:
    """The text that is first assigned to an attribute of that name in Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and any(getattr(each, "attr", None) == attribute for each in node.targets):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                return node.value.value
    raise ValueError(f"it assigns no text to {attribute}")


def read_categories(lists: Path, variant: int) -> list[str]:
    """The WordNet ids of the classes 1, 2, ...: the sorted lines of the official file."""
    path = lists / "categories" / f"ImageNetS_categories_im{variant}.txt"
    wnids = sorted(path.read_text(encoding="utf-8").split())
    if len(set(wnids)) != variant:
        raise DataError(f"{path}: expected {variant} different WordNet ids, one per line, found {len(set(wnids))}")
    return wnids


def _lists(root: Path, variant: int) -> Path:
    """The official repository's folder `data`."""
    if variant not in VARIANTS:
        raise ParameterError(f"ImageNet-S has the variants {', '.join(map(str, VARIANTS))}, not {variant!r}")
    places = [root / "data", root, root / "ImageNet-S" / "data"]
    wanted = Path("categories") / f"ImageNetS_categories_im{variant}.txt"
    found = next((place for place in places if (place / wanted).is_file()), None)
    if found is None:
        raise missing_data("imagenet-s", f"{places[0] / wanted} is missing: the class ids")
    return found


def _home(root: Path, variant: int) -> Path:
    name = f"ImageNetS{variant}"
    home = root if root.name == name else root / name
    if not home.is_dir():
        raise missing_data("imagenet-s", f"there is no folder {home}")
    return home


def _validation_list(lists: Path, variant: int, wnids: Sequence[str]) -> list[tuple[str, str]]:
    """As `_read_list`; the mapping knows where ImageNet keeps an image, the names only where ImageNet-S does."""
    places = [lists / "mapping" / f"ImageNetS_im{variant}_mapping_validation.txt",
              lists / "names" / f"ImageNetS_im{variant}_validation.txt"]  # fmt: skip
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise missing_data("imagenet-s", f"{places[1]} is missing: the official list of the validation images")
    entries = _read_list(path, wnids)
    if len(entries) != VARIANTS[variant]:
        raise DataError(f"{path}: expected {VARIANTS[variant]} images, found {len(entries)}; is the file complete?")
    return entries


def _read_list(path: Path, wnids: Sequence[str]) -> list[tuple[str, str]]:
    """(where ImageNet has it, "<class>/<image>" in ImageNet-S) of every line, in file order.

    Lines are "<class>/<image>.JPEG" (training), "<class>/<image>.JPEG <class>/<image>.png" (names) or
    "<ImageNet's class>/<image>.JPEG <class>/<image>.JPEG" (mapping).
    """
    known, entries = set(wnids), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.split()
        kept = Path(parts[-1]).with_suffix("").as_posix()
        if len(parts) > 2 or kept.count("/") != 1 or kept.split("/")[0] not in known:
            raise DataError(f"{path}, line {number}: expected '<class>/<image>' of a known class, found {line!r}")
        entries.append((parts[0], kept))
    return entries


def _only(entries: list, wnids: Sequence[str], names: Sequence[str], classes: Sequence[str] | None) -> list:
    if classes is None:
        return entries
    unknown = [name for name in classes if name not in wnids and name not in names]
    if unknown or not classes:
        what = ", ".join(map(repr, unknown)) or "(none is named)"
        raise ParameterError(f"ImageNet-S with {len(wnids)} classes has no class {what}")
    kept = {wnid for wnid, name in zip(wnids, names, strict=True) if wnid in classes or name in classes}
    return [entry for entry in entries if entry[1].split("/")[0] in kept]


def _spread(entries: list, count: int | None) -> list:
    """The first `count` entries when the classes take turns, in their own order again."""
    turn: dict[str, int] = defaultdict(int)
    ranked = []
    for place, (_, name) in enumerate(entries):
        wnid = name.split("/")[0]
        ranked.append((turn[wnid], place))
        turn[wnid] += 1
    return [entries[place] for place in sorted(place for _, place in sorted(ranked)[:count])]


def _find_pictures(split: str, home: Path, imagenet: Sequence, entries: Sequence[tuple[str, str]]) -> list[Path]:
    """The pictures, all in the folder of ImageNet-S or all in one of ImageNet's (by class, or flat)."""
    official = home / split
    found = [[official / f"{name}.JPEG" for _, name in entries]]
    for folder in (Path(each) for each in imagenet if each is not None):
        for place in (folder / ("val" if split == "validation" else "train"), folder):
            found += [[place / source for source, _ in entries], [place / Path(source).name for source, _ in entries]]
    absent = [[path for path in paths if not path.is_file()] for paths in found]
    best = min(range(len(found)), key=lambda i: len(absent[i]))
    if absent[best]:
        what = f"{len(absent[best])} of the {len(entries)} images of {official} are missing"
        raise missing_data("imagenet-s", f"{what} (first: {absent[best][0]}); imagenet= may name ImageNet's folder")
    return found[best]


def _find_masks(folder: Path, entries: Sequence[tuple[str, str]]) -> list[Path]:
    masks = [folder / f"{name}.png" for _, name in entries]
    absent = [path for path in masks if not path.is_file()]
    if absent:
        what = f"{len(absent)} of the {len(masks)} masks in {folder} are missing (first: {absent[0]})"
        raise missing_data("imagenet-s", what)
    return masks


def _read_mask(path: Path, picture: Path, count: int, wanted: int | None = None) -> np.ndarray:
    """(H, W) uint8: the label map with `VOID` where ignored, or 1, 0, `VOID` of the class `wanted`."""
    colours = read_labels(path, picture, ("RGB",), "an RGB image with class ids R + 256 G").astype(np.int32)
    labels = colours[..., 0] + 256 * colours[..., 1]  # int32: 256 does not fit the stored uint8
    strange = ((labels > count) & (labels != IGNORED)) | (colours[..., 2] != 0)
    if strange.any():
        first = tuple(colours[strange][0].tolist())
        raise DataError(f"{path}: the colour {first} is no class id R + 256 G of 0..{count} or {IGNORED}, with B = 0")
    if wanted is not None:
        return class_mask(labels, wanted, IGNORED, VOID)
    return np.where(labels == IGNORED, VOID, labels).astype(np.uint8)
