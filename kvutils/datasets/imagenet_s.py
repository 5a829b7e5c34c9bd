"""ImageNet-S: ImageNet pictures with pixel masks of their classes, in 50, 300 or 919 classes.

Layout: data/catalog.yaml; train-semi holds ten images per class, for a probe. The folder data of github.com/LUSSeg/ImageNet-S says
the class ids, which images there are (in names, or mapping) and the class names (data.py, read as text, never run). Masks are RGB
images: class id = R + 256 G, 1 for the first of the sorted categories; 0 is everything else and 1000 is ignored. The images
themselves may also stay where ImageNet has them (folder `imagenet`, or `imagenet=`): the official lists say which they are.
ILSVRC/imagenet-1k on the Hugging Face hub is not read: its columns are image and label, and the lists go by file name."""

import ast
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID
from kvutils.datasets.files import expect, find, limits, need, read_lines, read_text, reading
from kvutils.datasets.labels import Picture, check_sizes, class_mask, read_labels
from kvutils.datasets.samples import LabelledImage, NamedMask
from kvutils.errors import DataError, ParameterError, one_of

_Entries = list[tuple[str, str]]  # (where ImageNet has it, "<class>/<image>" in ImageNet-S) of each image
VARIANTS = {50: 752, 300: 4097, 919: 12419}  # classes -> images of the validation split
IGNORED = 1000
_TRAINING = """; its training split (148 GB) is for the supervised probe alone, which -p data_options '{"imagenet-s-train": null}' leaves out"""


def imagenet_s_masks(root: str | Path, variant: int = 50, max_images: int | None = None, classes: Sequence[str] | None = None,
                     imagenet: str | Path | None = None) -> list[NamedMask]:  # fmt: skip
    """The validation split: per image the class of its folder, its name and its pixels (1, `VOID` ignored, 0 else).

    variant: 50, 300 or 919 classes. max_images takes the first image of every class, then the second, and so on: a part in which
    as many classes occur as can. classes: only these (names or WordNet ids). An image may show more classes than the one of its
    folder; which is only known when its mask is decoded, and they count as background here. imagenet: where ImageNet is, if not
    in the folder `imagenet` of root, for images that are not in ImageNetS50/validation. Two of the 919 classes have the same
    name (crane). Raises ParameterError, and DataError for missing files before anything is opened."""
    limits(max_images=max_images)
    lists, wnids = _lists(Path(root), variant)
    names = class_names(root, variant)
    entries = _validation_list(lists, variant, wnids)
    if classes is not None:
        unknown = [name for name in classes if name not in wnids and name not in names]
        if unknown or not classes:
            raise ParameterError(f"ImageNet-S with {variant} classes has no class {', '.join(map(repr, unknown)) or '(none is named)'}")
        kept = {wnid for wnid, name in zip(wnids, names, strict=True) if wnid in classes or name in classes}
        entries = [entry for entry in entries if entry[1].split("/")[0] in kept]
    entries = _spread(entries, max_images)
    samples = []
    for (_, name), picture, mask in zip(entries, *_find_files(Path(root), variant, "validation", imagenet, entries), strict=True):
        wnid, image_id = name.split("/")
        index = wnids.index(wnid)
        opened = partial(_read_mask, mask, picture, len(wnids), index + 1)
        samples.append(NamedMask(f"{image_id}-{wnid}", image_id, picture, text=names[index], mask=opened,
                                 group=image_id, class_name=names[index]))  # fmt: skip
    return samples


def imagenet_s_training(root: str | Path, variant: int = 50, per_class: int = 1,
                        imagenet: str | Path | None = None) -> list[LabelledImage]:  # fmt: skip
    """Images of train-semi to fit a probe on: label maps with class index + 1, 0 background, `VOID` ignored.

    They are of ImageNet's training split, so none is in `imagenet_s_masks`. per_class: the first of each class's ten
    (the probe holds the tokens of all images in memory). Only variant 50: 255 is void, so more classes do not fit a
    label map. imagenet: as in `imagenet_s_masks`. Raises ParameterError, and DataError for missing files."""
    limits(per_class=per_class)
    lists, wnids = _lists(Path(root), variant)
    if variant >= VOID:
        raise ParameterError(f"a label map holds fewer than {VOID} classes ({VOID}: void), not {variant}: variant=50")
    path = find("imagenet-s", lists / f"names/ImageNetSemi_im{variant}_train.txt", hint=": the official list of training images")
    of_class: dict[str, _Entries] = defaultdict(list)
    for entry in _read_list(path, wnids):
        of_class[entry[1].split("/")[0]].append(entry)
    for wnid in wnids:
        if len(of_class[wnid]) < per_class:
            raise ParameterError(f"per_class={per_class}, but {path} lists {len(of_class[wnid])} images of {wnid}")
    chosen = [entry for wnid in wnids for entry in of_class[wnid][:per_class]]
    files = zip(chosen, *_find_files(Path(root), variant, "train-semi", imagenet, chosen), strict=True)
    return [LabelledImage(Path(name).name, picture, partial(_read_mask, mask, picture, len(wnids)))
            for (_, name), picture, mask in files]  # fmt: skip


def class_names(root: str | Path, variant: int = 50) -> tuple[str, ...]:
    """The names of the classes 1, 2, ...: from the official data.py, or from class_names_<variant>.json (a list that
    begins with "background")."""
    lists, _ = _lists(Path(root), variant)
    path = find("imagenet-s", lists / "data.py", lists / f"class_names_{variant}.json", hint=": the official list of class names")
    text = read_text(path)
    with reading(path, f"{variant} class names"):
        names = json.loads(text)[1:] if path.suffix == ".json" else _assigned_text(text, f"classes_{variant}").split(", ")
        expect(all(names) and list(map(type, names)) == [str] * variant, f"found {len(names)}")
    return tuple(names)


def _assigned_text(source: str, attribute: str) -> str:
    """The text that is first assigned to an attribute of that name in Python source."""
    assigned = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    named = [node.value.value for node in assigned if any(getattr(each, "attr", None) == attribute for each in node.targets)]
    expect(named, f"it assigns no text to {attribute}")
    return named[0]


def _lists(root: Path, variant: int) -> tuple[Path, list[str]]:
    """The official repository's folder `data`, and the WordNet ids of the classes 1, 2, ...: the sorted lines of its file."""
    one_of("variant of ImageNet-S", variant, VARIANTS)
    name = f"categories/ImageNetS_categories_im{variant}.txt"
    path = find("imagenet-s", *(place / name for place in (root / "data", root, root / "ImageNet-S/data")), hint=": the class ids")
    wnids = sorted(read_text(path).split())
    expect(len(set(wnids)) == variant, f"{path}: expected {variant} different WordNet ids, one per line, found {len(set(wnids))}")
    return path.parents[1], wnids


def _validation_list(lists: Path, variant: int, wnids: Sequence[str]) -> _Entries:
    """As `_read_list`; the mapping knows where ImageNet keeps an image, the names only where ImageNet-S does."""
    mapping, names = lists / f"mapping/ImageNetS_im{variant}_mapping_validation.txt", lists / f"names/ImageNetS_im{variant}_validation.txt"
    path = mapping if mapping.is_file() else find("imagenet-s", names, hint=": the official list of the validation images")
    entries = _read_list(path, wnids)
    expect(len(entries) == VARIANTS[variant], f"{path}: expected {VARIANTS[variant]} images, found {len(entries)}; is the file complete?")
    return entries


def _read_list(path: Path, wnids: Sequence[str]) -> _Entries:
    """The entry of every line, in file order.

    Lines are "<class>/<image>.JPEG" (training), "<class>/<image>.JPEG <class>/<image>.png" (names) or
    "<ImageNet's class>/<image>.JPEG <class>/<image>.JPEG" (mapping)."""
    known, entries = set(wnids), []
    for where, line in read_lines(path):
        parts = line.split()
        kept = Path(parts[-1]).with_suffix("").as_posix()
        fits = len(parts) <= 2 and kept.count("/") == 1 and kept.split("/")[0] in known
        expect(fits, f"{where}: expected '<class>/<image>' of a known class, found {line!r}")
        entries.append((parts[0], kept))
    return entries


def _spread(entries: _Entries, count: int | None) -> _Entries:
    """The first `count` entries when the classes take turns, in their own order again."""
    turns: dict[str, Iterator[int]] = defaultdict(itertools.count)
    ranked = sorted((next(turns[name.split("/")[0]]), place) for place, (_, name) in enumerate(entries))
    return [entries[place] for place in sorted(place for _, place in ranked[:count])]


def _find_files(root: Path, variant: int, split: str, imagenet: str | Path | None,
                entries: _Entries) -> tuple[list[Picture], list[Path]]:  # fmt: skip
    """Pictures, all in the folder of ImageNet-S or all in one of ImageNet's (by class, or flat), and masks."""
    own = f"ImageNetS{variant}"
    home = root if root.name == own else find("imagenet-s", root / own)
    found = [[home / split / f"{name}.JPEG" for _, name in entries]]
    for folder in (Path(each) for each in (root / "imagenet", imagenet) if each is not None):
        for place in (folder / ("val" if split == "validation" else "train"), folder):
            found += [[place / source for source, _ in entries], [place / Path(source).name for source, _ in entries]]
    files = need("imagenet-s", f"images of {home / split}", *found, hint=f"; imagenet= may name ImageNet's folder{_TRAINING if split != 'validation' else ''}")
    pictures = [Picture(file) for file in files]
    folder = home / f"{split}-segmentation"
    masks = need("imagenet-s", f"masks in {folder}", [folder / f"{name}.png" for _, name in entries])
    check_sizes(masks, pictures)
    return pictures, masks


def _read_mask(path: Path, picture: Picture, count: int, wanted: int | None = None) -> np.ndarray:
    """(H, W) uint8: the label map with `VOID` where ignored, or 1, 0, `VOID` of the class `wanted`."""
    colours = read_labels(path, picture, ("RGB",), "an RGB image with class ids R + 256 G").astype(np.int32)
    labels = colours[..., 0] + 256 * colours[..., 1]  # int32: 256 does not fit the stored uint8
    strange = ((labels > count) & (labels != IGNORED)) | (colours[..., 2] != 0)
    if strange.any():
        first = tuple(colours[strange][0].tolist())
        raise DataError(f"{path}: the colour {first} is no class id R + 256 G of 0..{count} or {IGNORED}, with B = 0")
    if wanted is not None:
        return class_mask(labels, wanted, IGNORED)
    return np.where(labels == IGNORED, VOID, labels).astype(np.uint8)
