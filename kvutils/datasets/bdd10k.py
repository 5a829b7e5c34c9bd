"""BDD-10K, the semantic segmentation of BDD100K, by domain: time of day and kind of road.

    bdd100k/images/10k/{train,val}/0004a4c0-d4dff0ad.jpg ...
    bdd100k/labels/sem_seg/masks/{train,val}/0004a4c0-d4dff0ad.png ...   one channel: 0..18 classes, 255 unknown
    bdd100k/labels/det_20/det_train.json, det_val.json                   or the labels of 2018, see `read_attributes`

Label maps here are the file's number + 1, as 0 is background and BDD has none. The domain of an image is known only
from the detection labels of the 100K images, which lack about 4,000 of these 10,000 (bdd100k issues 22 and 120); some
labels are wrong (issue 20). Images of images/10k/test have no masks.

What the paper read as "night and highway" is not published further. Ours: every image of train and val that its
labels call night and highway, and as control, so that there is a wrong domain to name, as many by day on a highway.
Images whose names begin alike (one recording) go either to those that are scored or to those that a probe is fitted
on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.samples import DomainImage
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image

log = logging.getLogger(__name__)
# Of the labels 1, 2, ...: Cityscapes' train ids plus 1; "Semantic Segmentation" in doc/source/format.rst of BDD100K.
CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
# The attributes of format.rst, and the word for each time of day: one token in most vocabularies, as prefixes of a
# wrong domain must have as many tokens as the right one.
TIMES = {"daytime": "day", "night": "night", "dawn/dusk": "dusk"}
SCENES = ("city street", "highway", "residential", "parking lot", "gas stations", "tunnel")
DOMAINS = (("night", "highway"), ("daytime", "highway"))
PARTS = ("scored", "training", "all")
TRAINING_SHARE = 0.4  # of the recordings
_SPLITS = ("train", "val")
_LABEL = np.full(256, VOID, np.uint8)  # number in the file -> label; adding 1 would wrap 255 round to 0
_LABEL[: len(CLASS_NAMES)] = np.arange(1, len(CLASS_NAMES) + 1)


def bdd10k_images(
    root: str | Path,
    domains: Sequence[Sequence[str]] = DOMAINS,
    split: str | Sequence[str] = _SPLITS,
    part: str = "scored",
    balance: bool = True,
    images: int | None = None,
) -> list[DomainImage]:
    """Images of the domains, by name; `domain` is in words, such as "night highway".

    domains: (time of day, scene) as BDD spells them, "" for any scene. split: train, val or both, as few images of
    val are at night on a highway. part: "scored", "training" (the other recordings, 40 % of them) or "all". balance:
    as many of every domain as the first has. images: so many in all, evenly from the domains while they last, chosen
    by a hash of their names. Raises ParameterError for options that do not exist, DataError for missing and malformed
    files and for a domain without images.
    """
    words = _check_domains(domains)
    splits = (split,) if isinstance(split, str) else tuple(split)
    if not splits or set(splits) - set(_SPLITS):
        asked = ", ".join(map(repr, splits)) or "()"
        raise ParameterError(f"BDD-10K has masks for {' and '.join(_SPLITS)}, not for {asked}")
    if part not in PARTS:
        raise ParameterError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
    if images is not None and images < 1:
        raise ParameterError(f"images must be at least 1, not {images}")
    places = (Path(root) / "bdd100k", Path(root))
    home = next((place for place in places if (place / "images" / "10k").is_dir()), None)
    if home is None:
        raise missing_data("bdd-10k", f"there is no {Path(root) / 'bdd100k' / 'images' / '10k'}")
    pictures = _pictures(home, splits)
    known = read_attributes(home, set(pictures))
    if len(known) < len(pictures) and part != "training":  # which is read beside the scored part: said once
        log.warning("BDD-10K: %d of %d images have no attributes in the detection labels and are left out",
                    len(pictures) - len(known), len(pictures))  # fmt: skip
    chosen = _choose(known, words, part, balance, images)
    folder = home / "labels" / "sem_seg" / "masks"
    masks = {name: folder / pictures[name].parent.name / f"{name}.png" for name in chosen}
    missing = [path for path in masks.values() if not path.is_file()]
    if missing:
        raise missing_data("bdd-10k", f"{len(missing)} of {len(masks)} masks are missing (first: {missing[0]})")
    return [
        DomainImage(
            name, partial(open_image, pictures[name]), partial(read_mask, masks[name], pictures[name]), chosen[name]
        )
        for name in sorted(chosen)
    ]


def bdd10k_training(
    root: str | Path,
    domains: Sequence[Sequence[str]] = DOMAINS,
    split: str | Sequence[str] = _SPLITS,
    balance: bool = False,
    images: int = 100,
) -> list[DomainImage]:
    """Images of the domains from the other recordings, to fit a probe on; options as in `bdd10k_images`."""
    return bdd10k_images(root, domains, split, "training", balance, images)


def _check_domains(domains: Sequence[Sequence[str]]) -> dict[tuple[str, str], str]:
    """(time of day, scene) -> words. Raises ParameterError."""
    words = {}
    for each in domains:
        pair = (each, "") if isinstance(each, str) else tuple(each)
        if len(pair) != 2 or pair[0] not in TIMES or pair[1] not in ("", *SCENES):
            raise ParameterError(f"a domain is a time of day ({', '.join(TIMES)}) and a scene ({', '.join(SCENES)}, or "
                                 f"'' for any), found {each!r}")  # fmt: skip
        words[pair] = f"{TIMES[pair[0]]} {pair[1]}".strip()
    overlap = [time for time, scene in words if scene and (time, "") in words]
    if not words or overlap:
        raise ParameterError(f"domains must be at least one and must not overlap, found {list(words)}")
    return words


def _pictures(home: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Name without suffix -> file, of every image of the splits."""
    found: dict[str, Path] = {}
    for split in splits:
        folder = home / "images" / "10k" / split
        files = sorted(folder.glob("*.jpg")) if folder.is_dir() else []
        if not files:
            raise missing_data("bdd-10k", f"{folder} holds no images (*.jpg)")
        found |= {file.stem: file for file in files}
    return found


def read_attributes(home: Path, names: set[str]) -> dict[str, dict]:
    """name -> {weather, scene, timeofday} of those images that the detection labels know, in any of three forms.

    labels/det_20/det_{train,val}.json, labels/bdd100k_labels_images_{train,val}.json: a list of {name, attributes};
    labels/100k/{train,val}/<name>.json: one image per file. The split of an image in the 100K set may be another than
    in the 10K set, so all are read. Raises DataError where there is none of them, or one is malformed.
    """
    labels = home / "labels"
    files = [labels / "det_20" / f"det_{split}.json" for split in _SPLITS]
    files += [labels / f"bdd100k_labels_images_{split}.json" for split in _SPLITS]
    folders = [labels / "100k" / split for split in _SPLITS]
    files = [file for file in files if file.is_file()]
    single = [path for folder in folders for name in names if (path := folder / f"{name}.json").is_file()]
    if not files and not single:
        raise missing_data("bdd-10k", f"scene and time of day are in none of {labels / 'det_20'}, {labels} "
                                      f"(bdd100k_labels_images_*.json) and {labels / '100k'}")  # fmt: skip
    known: dict[str, dict] = {}
    for file in files:
        entries = _read_json(file)
        if not isinstance(entries, list):
            raise DataError(f"{file}: expected a list of images, found {type(entries).__name__}")
        for number, entry in enumerate(entries):
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise DataError(f"{file}, image {number}: expected its 'name', found {str(entry)[:200]}")
            if Path(name).stem in names:
                known.setdefault(Path(name).stem, _attributes(entry, f"{file}, image {number} ({name})"))
    for file in single:
        known.setdefault(file.stem, _attributes(_read_json(file), str(file)))
    return known


def _read_json(file: Path) -> object:
    def without_boxes(entry: dict) -> dict | None:  # a million boxes would fill the memory
        return entry if entry.keys() & {"name", "attributes", "timeofday"} and "category" not in entry else None

    try:
        return json.loads(file.read_text(encoding="utf-8"), object_hook=without_boxes)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _attributes(entry: object, where: str) -> dict:
    found = entry.get("attributes") if isinstance(entry, dict) else None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("scene", "timeofday")):
        raise DataError(f"{where}: expected attributes with scene and timeofday, found {str(found)[:200]}")
    return found


def _choose(
    known: dict[str, dict], words: dict[tuple[str, str], str], part: str, balance: bool, images: int | None
) -> dict[str, str]:
    """name -> domain in words."""
    members: dict[str, list[str]] = {domain: [] for domain in words.values()}
    for name in sorted(known, key=_hash):
        time, scene = known[name]["timeofday"], known[name]["scene"]
        domain = words.get((time, scene)) or words.get((time, ""))
        if domain and (part == "all" or (_hash(name.partition("-")[0]) < TRAINING_SHARE) == (part == "training")):
            members[domain].append(name)
    empty = [domain for domain, mine in members.items() if not mine]
    if empty:
        counts = Counter(f"{each['timeofday']}, {each['scene']}" for each in known.values())
        there = "; ".join(f"{count} of {name}" for name, count in sorted(counts.items())) or "none"
        raise DataError(f"BDD-10K: no image ({part}) of {', '.join(empty)}; of all images with attributes there are {there}")
    if balance:
        size = len(next(iter(members.values())))
        members = {domain: mine[:size] for domain, mine in members.items()}
    longest = max(map(len, members.values()))
    turns = [(mine[i], domain) for i in range(longest) for domain, mine in members.items() if i < len(mine)]
    return dict(turns[:images])


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def read_mask(path: Path, picture: Path) -> np.ndarray:
    """(H, W) uint8: 1..19 classes, VOID, in the pixels of the picture. Raises DataError."""
    try:
        with Image.open(path) as image:
            mode, numbers = image.mode, np.array(image)
        with Image.open(picture) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} or its picture {picture} cannot be read: {error}") from error
    if mode not in ("L", "P"):
        raise DataError(f"{path} is a {mode!r} image, not one of class numbers (one channel): is it a colormap?")
    strange = sorted(set(np.unique(numbers).tolist()) - set(range(len(CLASS_NAMES))) - {VOID})
    if strange:
        raise DataError(f"{path} holds the numbers {', '.join(map(str, strange))}: expected 0..{len(CLASS_NAMES) - 1}, "
                        f"and {VOID} for unknown; is it a colormap?")  # fmt: skip
    if numbers.shape != (height, width):
        raise DataError(f"{path} is {numbers.shape[1]}x{numbers.shape[0]}, but its picture {width}x{height}")
    return _LABEL[numbers]
