"""BDD-10K, the semantic segmentation of BDD100K, by domain: time of day and kind of road.

Layout: data/catalog.yaml. Masks have one channel (0..18 classes, 255 unknown); label maps here are the file's number + 1, as 0 is
background and BDD has none. The domain of an image is known only from the detection labels of the 100K images, which lack about
4,000 of these 10,000 (bdd100k issues 22 and 120); some labels are wrong (issue 20). Images of images/10k/test have no masks.

What the paper read as "night and highway" is not published further. Ours: every image of train and val that its labels call night
and highway; what a probe is fitted on are these and those by day on a highway, whose domain is the wrong one. Images whose names begin alike
(one recording) go either to those that are scored or to those that a probe is fitted on."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.files import every, expect, find, limits, need, read_json, some_of
from kvutils.datasets.labels import Picture, check_sizes, read_labels
from kvutils.datasets.samples import DomainImage
from kvutils.errors import ParameterError, one_of

log = logging.getLogger(__name__)
# Of the labels 1, 2, ...: Cityscapes' train ids plus 1; "Semantic Segmentation" in doc/source/format.rst of BDD100K.
CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
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


def bdd10k_images(root: str | Path, domains: Sequence[Sequence[str]] = DOMAINS[:1], split: str | Sequence[str] = _SPLITS,
                  part: str = "scored", balance: bool = True, images: int | None = None) -> list[DomainImage]:  # fmt: skip
    """Images of the domains, by name; `domain` is in words, such as "night highway".

    domains: (time of day, scene) as BDD spells them, "" for any scene. split: train, val or both, as few images of val are at night on
    a highway. part: "scored", "training" (the other recordings, 40 % of them) or "all". balance: as many of every domain as the first
    has. images: so many in all, evenly from the domains while they last, chosen by a hash of their names. Raises ParameterError for
    options that do not exist, DataError for missing and malformed files and for a domain without images."""
    words = _check_domains(domains)
    splits = some_of("split of BDD-10K with masks", split, _SPLITS)
    one_of("part", part, PARTS)
    limits(images=images)
    home = find("bdd-10k", Path(root) / "bdd100k/images/10k", Path(root) / "images/10k").parents[1]
    pictures: dict[str, Picture] = {}
    for name in splits:
        pictures |= {file.stem: Picture(file) for file in every("bdd-10k", home / "images/10k" / name, "*.jpg")}
    known = read_attributes(home, set(pictures))
    if len(known) < len(pictures) and part != "training":  # which is read beside the scored part: said once
        log.warning("BDD-10K: %d of %d images have no attributes in the detection labels and are left out",
                    len(pictures) - len(known), len(pictures))  # fmt: skip
    chosen = _choose(known, words, part, balance, images)
    names = sorted(chosen)
    folder = home / "labels/sem_seg/masks"
    masks = need("bdd-10k", "masks", [folder / pictures[name].source.parent.name / f"{name}.png" for name in names])
    check_sizes(masks, (pictures[name] for name in names))
    return [DomainImage(name, pictures[name], partial(read_mask, mask, pictures[name]), chosen[name])
            for name, mask in zip(names, masks, strict=True)]  # fmt: skip


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


def read_attributes(home: Path, names: set[str]) -> dict[str, dict]:
    """name -> {weather, scene, timeofday} of those images that the detection labels know, in any of three forms.

    labels/det_20/det_{train,val}.json, labels/bdd100k_labels_images_{train,val}.json: a list of {name, attributes};
    labels/100k/{train,val}/<name>.json: one image per file. The split of an image in the 100K set may be another than
    in the 10K set, so all are read. Raises DataError where there is none of them, or one is malformed."""
    labels = home / "labels"
    forms = "det_20/det_{}.json", "bdd100k_labels_images_{}.json"
    files = [file for form in forms for split in _SPLITS if (file := labels / form.format(split)).is_file()]
    single = [path for split in _SPLITS for name in sorted(names) if (path := labels / "100k" / split / f"{name}.json").is_file()]
    if not files and not single:
        raise missing_data("bdd-10k", f"scene and time of day are in none of {labels / 'det_20'}, {labels} "
                                      f"(bdd100k_labels_images_*.json) and {labels / '100k'}")  # fmt: skip
    for split in _SPLITS:
        if not single and not {labels / form.format(split) for form in forms} & {*files}:
            log.warning("BDD-10K: %s has no list of the 100K images of %s, so that those among these images are left out", labels, split)
    known: dict[str, dict] = {}
    for file in files:
        for number, entry in enumerate(read_json(file, list, object_hook=_without_boxes)):
            name = entry.get("name") if isinstance(entry, dict) else None
            expect(isinstance(name, str), f"{file}, image {number}: expected its 'name', found {str(entry)[:200]}")
            if Path(name).stem in names:
                known.setdefault(Path(name).stem, _attributes(entry, f"{file}, image {number} ({name})"))
    for file in single:
        known.setdefault(file.stem, _attributes(read_json(file, object_hook=_without_boxes), str(file)))
    return known


def _without_boxes(entry: dict) -> dict | None:  # a million boxes would fill the memory
    return entry if entry.keys() & {"name", "attributes", "timeofday"} and "category" not in entry else None


def _attributes(entry: dict, where: str) -> dict:
    found = entry.get("attributes")
    known = isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("scene", "timeofday"))
    expect(known, f"{where}: expected attributes with scene and timeofday, found {str(found)[:200]}")
    return found


def _choose(known: dict[str, dict], words: dict[tuple[str, str], str], part: str, balance: bool,
            images: int | None) -> dict[str, str]:  # fmt: skip
    """name -> domain in words."""
    members: dict[str, list[str]] = {domain: [] for domain in words.values()}
    for name in sorted(known, key=_hash):
        time, scene = known[name]["timeofday"], known[name]["scene"]
        domain = words.get((time, scene)) or words.get((time, ""))
        if domain and (part == "all" or (_hash(name.partition("-")[0]) < TRAINING_SHARE) == (part == "training")):
            members[domain].append(name)
    empty = [domain for domain, mine in members.items() if not mine]
    counts = Counter(f"{each['timeofday']}, {each['scene']}" for each in known.values())
    there = "; ".join(f"{count} of {name}" for name, count in sorted(counts.items())) or "none"
    expect(not empty, f"BDD-10K: no image ({part}) of {', '.join(empty)}; of all images with attributes there are {there}")
    if balance:
        size = len(next(iter(members.values())))
        members = {domain: mine[:size] for domain, mine in members.items()}
    longest = max(map(len, members.values()))
    turns = [(mine[i], domain) for i in range(longest) for domain, mine in members.items() if i < len(mine)]
    return dict(turns[:images])


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def read_mask(path: Path, picture: Picture) -> np.ndarray:
    """(H, W) uint8: 1..19 classes, VOID, in the pixels of the picture. Raises DataError."""
    expected = "class numbers (one channel, not a colormap)"
    return _LABEL[read_labels(path, picture, ("L", "P"), expected, len(CLASS_NAMES) - 1)]
