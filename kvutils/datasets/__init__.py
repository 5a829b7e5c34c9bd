"""Data sets by name. Real ones are read from their official layout, `pocket-*` ones are generated from a seed, "folder" is one's own."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from kvutils.datasets import bdd10k, blink, coco, davis, folder, imagenet_s, mme, msrc, pascal5i, pope, refcoco, spair
from kvutils.datasets.catalog import CATALOG, data_root, missing_data
from kvutils.datasets.files import expect, find
from kvutils.datasets.hub import HUB, holds_parquet, revision_of
from kvutils.datasets.pocket import choices, yes_no
from kvutils.datasets.pocket import sets as pocket
from kvutils.errors import DataError, ParameterError, at_least, of_kind, one_of

# The loader of each real data set and of its generated twin, which is named pocket-* after it.
_LOADERS: dict[str, tuple[Callable[..., Iterable], Callable[..., Iterable]]] = {
    "pascal-5i": (pascal5i.pascal5i_episodes, pocket.few_shot_episodes),
    "msrc": (msrc.msrc_groups, pocket.image_groups),
    "imagenet-s": (imagenet_s.imagenet_s_masks, pocket.named_masks),
    "imagenet-s-train": (imagenet_s.imagenet_s_training, pocket.training_maps),
    "refcoco": (refcoco.refcoco_masks, pocket.referring_masks),
    "spair-71k": (spair.spair_pairs, pocket.keypoint_pairs),
    "davis-2017": (davis.davis_clips, pocket.clips),
    "pope": (pope.pope_questions, yes_no.pocket_pope),
    "mme": (mme.mme_questions, yes_no.pocket_mme),
    "blink": (blink.blink_items, choices.pocket_blink),
    "coco": (coco.coco_images, pocket.key_images),
    "bdd-10k": (bdd10k.bdd10k_images, pocket.domain_scenes),
    "bdd-10k-train": (partial(bdd10k.bdd10k_images, domains=bdd10k.DOMAINS, part="training", balance=False, images=100),
                      partial(pocket.domain_scenes, scenes=100, stream="domain-training")),
}  # fmt: skip
_ON_DISK = {name: real for name, (real, _) in _LOADERS.items()}
_GENERATED = {f"pocket-{name}": twin for name, (_, twin) in _LOADERS.items()} | {"pocket-questions": yes_no.questions_of_every_kind}
_EVERY = _GENERATED | _ON_DISK | {"folder": folder.folder_samples}
DATASETS = tuple(_EVERY)
_OFFICIAL = {"coco": coco.OFFICIAL, "refcoco": refcoco.OFFICIAL}  # sets that are read from these where a copy of the hub's lies beside
FOLDERS = {"imagenet-s-train": "imagenet-s", "bdd-10k-train": "bdd-10k"}  # where it is not the data set's name
_SIX_TASKS = {
    "foreground_segmentation": "pascal-5i", "co_segmentation": "msrc", "semantic_segmentation": "imagenet-s",
    "semantic_segmentation_probe": "imagenet-s-train", "referring_segmentation": "refcoco", "semantic_correspondence": "spair-71k",
    "temporal_correspondence": "davis-2017",
}  # fmt: skip
_PAPER = {
    "01": _SIX_TASKS,
    "02": _SIX_TASKS,
    "03": {"keys": "coco", "pope": "pope", "mme": "mme"},
    "04": {"referring": "refcoco", "domains": "bdd-10k", "domains_train": "bdd-10k-train", "questions": "pope"},
    "05": {"choices": "blink"},
}
# profile -> notebook, by its number -> use -> the data set that is read for it
USES = {"paper": _PAPER, "pocket": {number: {use: f"pocket-{name}" for use, name in uses.items()} for number, uses in _PAPER.items()}}
USES["pocket"]["03"]["reading"] = "pocket-questions"  # of every kind; the paper profile has no such set
# Uses without which a notebook has nothing to say; the others may be left out, and what they were for is then not measured.
NEEDED = {"03": ("keys", "pope", "mme"), "04": ("referring", "questions"), "05": ("choices",)}


def open_dataset(name: str, root: str | Path | None = None, **options) -> Sequence:
    """The samples of a data set, as in `kvutils.datasets.samples`.

    root: the folder of a real data set (default: its own in `KVUTILS_DATA`), or "hub" for those that the Hugging Face hub
    holds; of "folder", that of your pictures (`kvutils.datasets.folder` says what may be in it). options: those of the loader,
    such as sizes and the seed of a pocket set, or samples="episodes" of a folder. Raises DataError for an unknown name, a
    missing folder and options that do not exist, ParameterError for what an option cannot be.

    >>> len(kv.open_dataset("pocket-davis-2017", count=2, frames=3))
    2
    """
    if name not in DATASETS and Path(str(name)).is_dir():
        raise DataError(f'{name} is a folder: open_dataset("folder", root="{name}")')
    one_of("data set", name, DATASETS, DataError)
    of_kind("root", root, (str, PathLike, type(None)), "a folder")
    at_least("seed", options.get("seed", 0), 0)
    loader = _EVERY[name]
    if name in _ON_DISK:
        options["root"] = find_root(name, root)
    elif name == "folder":
        expect(root is not None, 'open_dataset("folder", root=...): root= is the folder of your pictures')
        options["root"] = root
    elif root is not None:
        raise DataError(f"{name} is generated, not read: leave root out")
    known = inspect.signature(loader).parameters
    for option, value in options.items():
        one_of(f"option of {name}", option, known, DataError)
        kind = known[option].annotation
        kinds = [{int: Integral, Path: PathLike}.get(each, get_origin(each) or each) for each in (get_args(kind) if isinstance(kind, UnionType) else [kind])]
        if Sequence in kinds and isinstance(value, Iterable) and not isinstance(value, str):
            options[option] = value = list(value)
        if not isinstance(value, tuple(kinds)) or isinstance(value, Sized) and not len(value):
            raise ParameterError(f"{option} of {name} must be {inspect.formatannotation(kind)}, and not empty; found {value!r}")
    found = loader(**options)
    return found if isinstance(found, Sequence) else list(found)


def open_uses(profile: str, notebook: str, options: Mapping[str, Mapping | None] | None = None, prompts: str = "paper"
              ) -> dict[str, Sequence]:  # fmt: skip
    """{use: samples} of what a notebook (by its number) reads in a profile.

    options: loader options per data set name, such as {"pocket-pope": {"scenes": 60}}; None leaves the set out. prompts:
    the form in which published questions are asked (`wording`); generated ones have words of their own. Raises
    ParameterError for a set that the notebook does not read, for one left out that it needs, and if all are."""
    names, options = USES[profile][notebook], dict(options or {})
    for name in options:
        one_of(f"data set in the options of notebook {notebook}, profile {profile}:", name, names.values())
    kept = {use: name for use, name in names.items() if options.get(name, {}) is not None}
    if lacking := [names[use] for use in NEEDED.get(notebook, ()) if use not in kept] or ([] if kept else list(names.values())):
        raise ParameterError(f"notebook {notebook} has nothing to measure without {', '.join(lacking)}: do not leave it out")
    asking = {name: {"prompts": prompts} for name in kept.values() if "prompts" in inspect.signature(_EVERY[name]).parameters}
    return {use: open_dataset(name, **asking.get(name, {}) | options.get(name, {})) for use, name in kept.items()}


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

    options: those that each was opened with, None for one that was left out."""
    found = {}
    for name in names:
        chosen = (options or {}).get(name, {})
        if name not in _ON_DISK or chosen is None:
            continue
        hub = CATALOG[FOLDERS.get(name, name)].hub
        root = find_root(name, chosen.get("root"))
        if root == HUB:
            found[name] = f"hub: {hub} at {revision_of(hub)}"
        else:
            found[name] = f"copy of the hub's {hub}" if hub and holds_parquet(root, _OFFICIAL.get(name, ())) else "files in the official layout"
    return {"data": found} if found else {}


def class_names(name: str, root: str | Path | None = None, variant: int = 50, **_: object) -> tuple[str, ...]:
    """The names of the classes 1, 2, ... in the label maps of a data set that a probe is fitted on, with its loader's options."""
    if name == "imagenet-s-train":
        return imagenet_s.class_names(find_root(name, root), variant)
    return bdd10k.CLASS_NAMES if name == "bdd-10k-train" else pocket.CLASS_NAMES
