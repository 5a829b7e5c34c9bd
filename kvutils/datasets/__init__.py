"""Data sets by name. Real ones are read from their official layout, `pocket-*` ones are generated from a seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from kvutils.datasets import bdd10k, blink, coco, davis, imagenet_s, mme, msrc, pascal5i, pope, refcoco, spair
from kvutils.datasets.catalog import CATALOG, data_root, missing_data
from kvutils.datasets.files import find
from kvutils.datasets.hub import HUB, holds_parquet, revision_of
from kvutils.datasets.pocket import choices, yes_no
from kvutils.datasets.pocket import sets as pocket
from kvutils.errors import DataError, one_of

# Each pocket set is the generated twin of the real one it is named after.
_GENERATED: dict[str, Callable[..., Iterable]] = {
    "pocket-pascal-5i": pocket.few_shot_episodes,
    "pocket-msrc": pocket.image_groups,
    "pocket-imagenet-s": pocket.named_masks,
    "pocket-imagenet-s-train": pocket.training_maps,
    "pocket-refcoco": pocket.referring_masks,
    "pocket-spair-71k": pocket.keypoint_pairs,
    "pocket-davis-2017": pocket.clips,
    "pocket-pope": yes_no.pocket_pope,
    "pocket-mme": yes_no.pocket_mme,
    "pocket-blink": choices.pocket_blink,
    "pocket-coco": pocket.key_images,
    "pocket-bdd-10k": pocket.domain_scenes,
    "pocket-bdd-10k-train": partial(pocket.domain_scenes, scenes=100, stream="domain-training"),
    "pocket-questions": yes_no.questions_of_every_kind,
}
_ON_DISK: dict[str, Callable[..., Iterable]] = {
    "pascal-5i": pascal5i.pascal5i_episodes,
    "msrc": msrc.msrc_groups,
    "imagenet-s": imagenet_s.imagenet_s_masks,
    "imagenet-s-train": imagenet_s.imagenet_s_training,
    "coco": coco.coco_images,
    "davis-2017": davis.davis_clips,
    "pope": pope.pope_questions,
    "mme": mme.mme_questions,
    "refcoco": refcoco.refcoco_masks,
    "spair-71k": spair.spair_pairs,
    "bdd-10k": bdd10k.bdd10k_images,
    "bdd-10k-train": partial(bdd10k.bdd10k_images, part="training", balance=False, images=100),
    "blink": blink.blink_items,
}
DATASETS = (*_GENERATED, *_ON_DISK)
FOLDERS = {"imagenet-s-train": "imagenet-s", "bdd-10k-train": "bdd-10k"}  # where it is not the data set's name
_SIX_TASKS = {
    "foreground_segmentation": "pascal-5i",
    "co_segmentation": "msrc",
    "semantic_segmentation": "imagenet-s",
    "semantic_segmentation_probe": "imagenet-s-train",
    "referring_segmentation": "refcoco",
    "semantic_correspondence": "spair-71k",
    "temporal_correspondence": "davis-2017",
}
_PAPER = {
    "01": _SIX_TASKS,
    "02": _SIX_TASKS,
    "03": {"keys": "coco", "pope": "pope", "mme": "mme"},
    "04": {"referring": "refcoco", "domains": "bdd-10k", "domains_train": "bdd-10k-train", "questions": "pope"},
    "05": {"choices": "blink"},
}
# profile -> notebook, by its number -> use -> the data set that is read for it
USES = {
    "paper": _PAPER,
    "pocket": {number: {use: f"pocket-{name}" for use, name in uses.items()} for number, uses in _PAPER.items()},
}
USES["pocket"]["03"]["reading"] = "pocket-questions"  # of every kind; the paper profile has no such set
# data set -> the names of its classes 1, 2, ...: given, or read from the data set with its loader's options
_CLASS_NAMES: dict[str, tuple[str, ...] | Callable[..., Sequence[str]]] = {
    "pocket-imagenet-s-train": pocket.CLASS_NAMES,
    "imagenet-s-train": imagenet_s.class_names,
    "pocket-bdd-10k-train": pocket.CLASS_NAMES,
    "bdd-10k-train": bdd10k.CLASS_NAMES,
}


def open_dataset(name: str, root: str | Path | None = None, **options) -> Sequence:
    """The samples of a data set, as in `kvutils.datasets.samples`.

    root: the folder of a real data set (default: its own in `KVUTILS_DATA`), or "hub" for those that the Hugging Face hub
    holds. options: those of the loader, such as sizes and the seed of a pocket set. Raises DataError for an unknown name, a
    missing folder and options that do not exist.

    >>> len(open_dataset("pocket-davis-2017", count=2, frames=3))
    2
    """
    one_of("data set", name, DATASETS, DataError)
    loader = _GENERATED.get(name) or _ON_DISK[name]
    if name in _ON_DISK:
        options["root"] = find_root(name, root)
    elif root is not None:
        raise DataError(f"{name} is generated, not read: leave root out")
    for option in options:
        one_of(f"option of {name}", option, inspect.signature(loader).parameters, DataError)
    found = loader(**options)
    return found if isinstance(found, Sequence) else list(found)


def find_root(name: str, root: str | Path | None = None) -> str | Path:
    """The folder from which a real data set is read, or `HUB`. Raises DataError that says how to get what is missing."""
    folder = FOLDERS.get(name, name)
    if str(root) == HUB:
        if not CATALOG[folder].hub:
            raise missing_data(folder, "no Parquet copy on the hub is known; read it from disk (root=)")
        return HUB
    if root is None and data_root() is None:
        raise missing_data(folder, "KVUTILS_DATA is not set: the folder that holds the real data sets (or pass root=)")
    return find(folder, Path(root or data_root() / folder))


def data_sources(names: Iterable[str], options: Mapping[str, Mapping] | None = None) -> dict[str, dict[str, str]]:
    """{"data": name -> where it was read from} of the real data sets among `names`, for the provenance of a result: the
    hub's repository and revision, a copy of it, or files in the official layout; {} where all are generated.

    options: those that each was opened with.
    """
    found = {}
    for name in names:
        if name not in _ON_DISK:
            continue
        hub = CATALOG[FOLDERS.get(name, name)].hub
        root = find_root(name, (options or {}).get(name, {}).get("root"))
        if root == HUB:
            found[name] = f"hub: {hub} at {revision_of(hub)}"
        elif hub and holds_parquet(root):
            found[name] = f"copy of the hub's {hub}"
        else:
            found[name] = "files in the official layout"
    return {"data": found} if found else {}


def class_names(name: str, root: str | Path | None = None, **options) -> tuple[str, ...]:
    """The names of the classes 1, 2, ... in the label maps of a data set that a probe is fitted on. options: its loader's."""
    known = _CLASS_NAMES[name]
    if not callable(known):
        return known
    wanted = inspect.signature(known).parameters
    return tuple(known(root=find_root(name, root), **{key: value for key, value in options.items() if key in wanted}))
