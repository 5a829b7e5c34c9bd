"""The data that notebook 03 reads, and claims C5 and X4 in the form that data/claims.yaml asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvutils.datasets import open_uses
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import ParameterError
from kvutils.metrics.old import claim_of_parts, undefined
from kvutils.metrics.statistics import Interval
from kvutils.tasks.knock_out import as_questions

ATTENTION_QUESTIONS = {  # the text whose attention to the image keys is measured
    "pocket": ("is there a fish ?", "what colour is the car ?", "how many things are there ?", "what style is the image ?"),
    "paper": ("Is there a person in the image?", "What color is the largest object?", "How many people are there?",
              "Describe the image."),
}  # fmt: skip
IMAGE_SIZE = {"pocket": None, "paper": (640, 480)}  # pocket scenes are of one size; most COCO images are of this one
READING_IMAGES = 100  # of each subset of POPE and MME, for the knock-out curve of a profile without questions by kind


def open_data(profile: str, options: Mapping[str, Mapping] | None = None, size: Sequence[int] = (), prompts: str = "paper"
              ) -> dict[str, Sequence]:  # fmt: skip
    """What the notebook reads: `keys` (images), `pope`, `mme` (questions), `reading` (questions for the knock-out curve).

    options, prompts: as in `open_uses`. size: (width, height) to which every image is resized, default `IMAGE_SIZE`: keys
    are compared position by position, which needs one token grid.
    The pocket profile has questions of every kind to read by; the paper profile takes those about the first
    `READING_IMAGES` images of each subset of POPE and MME. Raises ParameterError for a size that is none and for
    options of a set that the profile does not use.
    """
    size = tuple(size) or IMAGE_SIZE[profile]
    if size is not None and (len(size) != 2 or not all(type(each) is int and each > 0 for each in size)):
        raise ParameterError(f"the image size must be a width and a height in pixels, not {size}")
    found = open_uses(profile, "03", options, prompts)
    if size is not None:
        found["keys"] = [one.resized(size) for one in found["keys"]]
        found |= {use: [replace(sample, size=size) for sample in found[use]] for use in ("pope", "mme")}
    if "reading" not in found:
        found["reading"] = as_questions(_first_images([*found["pope"], *found["mme"]], READING_IMAGES))
    return found


def _first_images(samples: list[YesNoSample], count: int) -> list[YesNoSample]:
    """The questions about the first `count` images of each subset."""
    images: dict[str, dict[str, None]] = {}
    for sample in samples:
        images.setdefault(sample.subset, {})[sample.image_id] = None
    first = {subset: set(list(names)[:count]) for subset, names in images.items()}
    return [sample for sample in samples if sample.image_id in first[sample.subset]]


def claim_c5(described: Mapping) -> dict:
    """C5: median over layers of Ashman's D of the log-variance centred within each head. described: of `describe_keys`.

    A pooled histogram has two modes as soon as keys of some layers or heads are longer; this has not. Entries: the layers.
    """
    found = described["modes"]
    entries = [Interval.of(each).claim(f"layer {layer}") for layer, each in enumerate(found["layers"])]
    return Interval.of(found["median"]).claim(unit="Ashman's D within layers, median", entries=entries)


def claim_x4(described: Mapping, compared: Mapping) -> dict:
    """X4: share in the trained minus the untrained model, and attention per key minus that of other keys.

    The share is scale-free, as keys of random weights are short: below the valley of variance / mean norm^2 where
    it has two modes, else below a fixed value. The attention is that of the keys below the paper's kind of
    threshold, in multiples of the average key's; undefined where no head has keys of both kinds.
    """
    scale = "scale_free" if described["thresholds"]["scale_free"]["two_modes"] else "near_constant"
    share = Interval.of(compared[scale]["difference"]["all"])
    mass = Interval.of(described["sinks"]["raw"]["mass"]["all"])
    attention = "attention per key (multiples of the average key's), input-agnostic minus others"
    missing = undefined(attention, "no layer and head has keys below and above the threshold")
    received = missing if math.isnan(mass.mean) else mass.claim(attention)
    return claim_of_parts([share.claim(f"share of keys ({scale}), trained minus untrained"), received], "comparisons of 2")
