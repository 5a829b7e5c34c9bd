"""Do words before the image make its values better? Section 4.1: one measurement, four readouts (`kvutils.tasks.prefix_readouts`). Every
sample is read in every family of its readout. Sources are `<family>.<layer>`, so that a layer's conditions are compared on the same
samples."""

from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from kvutils.errors import DataError, ImageError
from kvutils.images import encode_image
from kvutils.readout.features import token_means
from kvutils.readout.maps import to_grid
from kvutils.store import Parts, in_chunks
from kvutils.tasks.base import FEW, SKIPPED, ScoreTable
from kvutils.tasks.prefix_readouts import FEWER, Prefixes, PrefixReadout, ReferringPrefix
from kvutils.tasks.prefixes import CONDITIONS
from kvutils.tasks.text_segmentation import IOU

NOWHERE = -1.0  # in columns of movement: the image shows no object, or no background; or no values of their own are read


def moved(values: torch.Tensor, plain: torch.Tensor, objects: np.ndarray) -> list[tuple[float, float]]:
    """How far tokens move, per layer: |v - v without prefix| / |v without prefix|, mean over objects and background. values, plain (L, N,
    C); objects (N,): the share of each token's pixels that show an object, its weight. `NOWHERE` where there is none of the two."""
    distance = ((values - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-12)).double().cpu().numpy()
    weights = np.stack([objects, 1 - objects], axis=1)
    found = np.where(weights.sum(0) > 0, distance @ weights / np.maximum(weights.sum(0), 1e-12), NOWHERE)
    return [tuple(row) for row in found]


def run_prefixes(readout: PrefixReadout, parts: Parts | None = None, progress: bool = True, chunk: int = 20) -> ScoreTable:
    """The rows of a readout: sources `<family>.<layer>`. Samples without controls of equal length, or that cannot be read, are `skipped`,
    layers whose probe did not converge `left_out`. DataError if nothing is left or too many cannot be read. With `parts`, finished chunks
    are kept there and a run that was stopped goes on, with the same bytes."""
    sources = [f"{family}.{layer}" for family in readout.families for layer in readout.extractor.layers]
    depends = [readout.name, readout.parameters, sources, list(readout.columns), readout.extractor.fingerprint]
    items = [(sample, readout.prefixes(sample)) for sample in readout.samples]
    fit = cache(readout.fit)  # once, before the first chunk that is not stored

    def score(sample: Any, prefixes: Prefixes | None) -> list:
        """Id, group, columns by source or why there are none."""
        try:
            values = "has no prefixes of equal length in every condition" if prefixes is None else _values(readout, sample, prefixes)
        except (DataError, ImageError) as error:
            values = str(error)
        return [sample.id, getattr(sample, "group", sample.id), values]

    def compute(some: list) -> list:
        fit()
        return [score(*each) for each in some]

    chunks = in_chunks(parts, f"prefix/{readout.name}", items, compute, chunk, depends, progress=progress,
                       of=lambda item: [item[0].id, item[1]])  # fmt: skip
    found = [row for each in chunks for row in each]
    skipped = {name: why for name, _, why in found if isinstance(why, str)}
    rows = [row for row in found if row[0] not in skipped]
    broken = [f"{sample.id}: {skipped[sample.id]}" for sample, prefixes in items if prefixes is not None and sample.id in skipped]
    if not rows or len(broken) > max(FEW, SKIPPED * len(items)):
        why = "; ".join(broken[:3]) or "none of them has prefixes of equal length in every condition"
        raise DataError(f"{readout.name}: {len(skipped)} of {len(items)} samples could not be scored ({why})")
    ids, groups, values = ([row[i] for row in rows] for i in range(3))
    table = np.array(values, dtype=float)  # None becomes NaN
    usable = ~np.isnan(table).any((0, 2)).reshape(len(readout.families), -1).any(0)  # a layer has scores in all families or in none
    if not usable.any():
        raise DataError(f"{readout.name}: the probe converged in no layer; lower its strength or load the model in float32")
    kept = np.tile(usable, len(readout.families))
    left_out = {source: len(ids) for source, there in zip(sources, kept, strict=True) if not there}
    sources = [source for source in sources if source not in left_out]
    return ScoreTable(readout.name, ids, groups, sources, list(readout.columns), table[:, kept], skipped, left_out)


def _values(readout: PrefixReadout, sample: Any, prefixes: Prefixes) -> list:
    """Per source the columns of a sample; the vision tower sees the image once."""
    item, mask = (getattr(sample, "image_id", sample.id), sample.image), np.asarray(sample.mask)  # read once: both may be files
    found: list = []
    for family, image, values in readout.read(item, prefixes, readout.families):
        if family == "none":
            plain, shares = values, token_means(image.layout, readout.objects(mask)[..., None])[:, 0]
        distances = moved(values, plain, shares) if family in CONDITIONS else [(NOWHERE, NOWHERE)] * len(values)
        none = [None] * len(readout.columns)
        rows = enumerate(zip(readout.score(sample, mask, values, image, family), distances, strict=True))
        found += [none if place in readout.lacking else [*score, *distance] for place, (score, distance) in rows]
    return found


def with_controls(readout: PrefixReadout) -> int:
    """Number of the first sample that has prefixes of equal length in every condition. Raises DataError where none has: nothing can be
    measured, which is better known before hours of reading."""
    found = next((number for number, sample in enumerate(readout.samples) if readout.prefixes(sample) is not None), None)
    if found is None:
        absent = sorted(set(chain(*readout.writer.unmatched.values())))
        raise DataError(f"{readout.name}: none of {len(readout.samples)} samples has prefixes of equal length in every condition for "
                        f"{readout.writer.mlm.name}; there is no {', no '.join(absent)} for any. Read more samples or other domains, "
                        "or word the prefixes anew (kvutils/tasks/prefixes.py)")  # fmt: skip
    return found


def prefix_picture(readout: ReferringPrefix, table: ScoreTable, layer: int) -> dict:
    """What the figure of one referring expression needs, JSON-able: its score on every token behind `FEWER` prefixes, in one layer. Of the
    sample that these prefixes together find best in that layer: which of them finds it best is not asked."""
    found = np.mean([table.of(f"{condition}.{layer}")[:, IOU] for condition in FEWER], axis=0)
    (sample,) = (sample for sample in readout.samples if sample.id == table.ids[int(found.argmax())])
    prefixes = readout.prefixes(sample)
    place, item, mask = list(readout.extractor.layers).index(layer), (sample.image_id, sample.image), np.asarray(sample.mask)
    maps, ious = {}, {}
    for condition, image, values in readout.read(item, prefixes, FEWER):
        scores = readout.scores(sample, values, condition)[place]
        maps[condition] = to_grid(image.layout, scores.cpu().numpy()).round(4).tolist()
        ious[condition] = readout.score(sample, mask, values, image, condition)[place][IOU]
    return {"image": encode_image(sample.image), "size": list(sample.image.size), "text": sample.text, "layer": layer, "n": len(table),
            "order": list(FEWER), "maps": maps, "ious": ious, "prefixes": {c: prefixes[c] for c in FEWER}}  # fmt: skip
