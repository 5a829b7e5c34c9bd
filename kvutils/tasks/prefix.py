"""Do words before the image make its values better? Section 4.1: one measurement, three readouts.

Every sample is read under every condition of `kvutils.tasks.prefixes`; a readout turns the values of each layer into a few
numbers (`columns`). Sources are `<condition>.<layer>`, so that a layer's conditions are compared on the same samples.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch

from kvutils import VOID
from kvutils.datasets.bdd10k import CLASS_NAMES as BDD_NAMES
from kvutils.datasets.samples import DomainImage, LabelledImage, NamedMask
from kvutils.errors import DataError, ImageError
from kvutils.images import encode_image
from kvutils.metrics.masks import class_counts, class_mean_iou
from kvutils.metrics.statistics import Statistic, column_mean
from kvutils.probes import LinearProbe, fit_linear_probe, join_probes
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Item, token_means
from kvutils.readout.maps import to_grid
from kvutils.store import Parts, in_chunks
from kvutils.tasks.base import FEW, SKIPPED, ScoreTable, sample_seed
from kvutils.tasks.prefixes import CONDITIONS, PrefixWriter
from kvutils.tasks.text_segmentation import COLUMNS, IOU, map_scores

log = logging.getLogger(__name__)
MOVED = ("moved_objects", "moved_background")  # the last columns of every readout
NOWHERE = -1.0  # in these columns: the image shows no object, or no background
STUFF = frozenset(BDD_NAMES[: BDD_NAMES.index("person")])  # road, sky ...: every pixel of BDD has a class, these are no objects
Prefixes = dict[str, str | None]


class PrefixReadout(ABC):
    """Samples, the prefixes that go before their images, and what is read from the values."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric = "mIoU"
    statistic: ClassVar[Statistic]  # the metric of values (n, k), for each row of weights (n_boot, n)
    columns: Sequence[str]
    samples: Sequence[Any]
    lacking: frozenset[int] = frozenset()  # places of layers of which `fit` finds that they can have no score

    def __init__(self, writer: PrefixWriter, seed: int = 0):
        self.writer, self.seed = writer, seed

    @abstractmethod
    def prefixes(self, sample: Any) -> Prefixes | None:
        """A prefix per condition; None where there is no control of the same length."""

    @abstractmethod
    def score(
        self, sample: Any, mask: np.ndarray, values: torch.Tensor, image: ImageFeatures, condition: str
    ) -> list[tuple[float, ...]]:
        """`columns` of each layer's values (L, N, C) of a sample with a mask (H, W) under a condition."""

    def fit(self, extractor: FeatureExtractor) -> None:  # noqa: B027
        """Work before the first sample, such as fitting a probe; left out when every part is stored."""

    def objects(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool: the pixels of objects in a mask, for how far values move there."""
        return (mask > 0) & (mask != VOID)

    def image_of(self, sample: Any) -> tuple[str, Any]:
        return getattr(sample, "image_id", sample.id), sample.image

    def group_of(self, sample: Any) -> str:
        return getattr(sample, "group", sample.id)


class ReferringPrefix(PrefixReadout):
    """Task 4 with a prefix: the class name, or the expression itself; the readout is that of the expression.

    wrong: the prefix of a thing of another image whose class this image does not show (of all samples' classes)."""

    statistic = staticmethod(column_mean(IOU))
    columns = (*COLUMNS, *MOVED)

    def __init__(self, samples: Sequence[NamedMask], extractor: FeatureExtractor, writer: PrefixWriter, kind: str, seed: int = 0):
        super().__init__(writer, seed)
        self.samples, self.extractor, self.kind = samples, extractor, kind
        self.name = f"referring_by_{kind}"
        self.title = f"Referring segmentation,\n{'class name' if kind == 'class_name' else 'expression'} before the image"
        self._shown: dict[str, set[str]] = {}
        for sample in samples:
            self._shown.setdefault(sample.image_id, set()).add(sample.class_name)
        self._things = sorted({(self._text(sample), sample.class_name) for sample in samples})

    def _text(self, sample: NamedMask) -> str:
        return self.writer.correct(self.kind, sample.class_name if self.kind == "class_name" else sample.text)

    def prefixes(self, sample: NamedMask) -> Prefixes | None:
        wrong = [text for text, name in self._things if name not in self._shown[sample.image_id]]
        return self.writer.write(self._text(sample), wrong, sample_seed(str(self.seed), self.name, sample.id))

    def score(
        self, sample: NamedMask, mask: np.ndarray, values: torch.Tensor, image: ImageFeatures, condition: str
    ) -> list[tuple[float, ...]]:
        text = self.extractor.alignment.text(sample.text)
        vectors = torch.stack([text[f"value.{layer}"] for layer in self.extractor.layers]).to(values.device)
        scores = torch.einsum("lnc,lc->ln", values, vectors)
        return [tuple(row) for row in map_scores(scores, mask, layout=image.layout).tolist()]


class DomainPrefix(PrefixReadout):
    """Semantic segmentation of one domain with the domain's name before the image; mIoU over the classes that occur.

    readout "text": the class name with the largest dot product, on pixels that show some class (background has no
    name). readout "probe": a linear probe per condition, fitted on the tokens of other images of the domains, each
    with its own prefix of that condition, for the classes (and background) that their tokens show: it says no other.
    Objects, for how far values move, are all classes but `STUFF`."""

    statistic = staticmethod(lambda weights, values: class_mean_iou(weights, values[:, : -len(MOVED)]))

    def __init__(
        self, samples: Sequence[DomainImage], train: Sequence[DomainImage], class_names: Sequence[str],
        extractor: FeatureExtractor, writer: PrefixWriter, readout: str, seed: int = 0, strength: float = 0.01,
    ):  # fmt: skip
        super().__init__(writer, seed)
        self.samples, self.train, self.class_names, self.extractor = samples, train, tuple(class_names), extractor
        self.readout, self.strength = readout, strength
        self.name = f"domain_by_{readout}"
        self.title = f"Domain segmentation by {readout},\ndomain before the image"
        self.domains = sorted({sample.domain for sample in samples})
        if len(self.domains) < 2:
            raise DataError(f"prefixes of a wrong domain need at least two domains, found {self.domains}")
        labels = self.class_names if readout == "text" else ("background", *self.class_names)
        self.columns = (*(f"{part} {name}" for part in ("right", "true", "said") for name in labels), *MOVED)
        self._first = 1 if readout == "text" else 0  # the label that stands in the first column
        self._probes: dict[str, LinearProbe] = {}
        self._seen = np.arange(self._first, len(self.class_names) + 1)  # the label of each row of scores

    def objects(self, mask: np.ndarray) -> np.ndarray:
        stuff = [label for label, name in enumerate(self.class_names, start=1) if name in STUFF]
        return (mask > 0) & (mask != VOID) & ~np.isin(mask, stuff)

    def prefixes(self, sample: DomainImage) -> Prefixes | None:
        texts = {name: self.writer.correct("domain", name) for name in self.domains}
        wrong = [text for name, text in texts.items() if name != sample.domain]
        return self.writer.write(texts[sample.domain], wrong, sample_seed(str(self.seed), "domain", sample.id))

    def fit(self, extractor: FeatureExtractor) -> None:
        if self.readout != "probe":
            return
        chosen = [(image, prefixes) for image in self.train if (prefixes := self.prefixes(image)) is not None]
        for condition in CONDITIONS:
            found = [_read(extractor, (image.id, image.image), prefixes[condition]) for image, prefixes in chosen]
            pairs = zip(found, chosen, strict=True)
            labels = np.concatenate([one.layout.token_labels(image.mask)[0] for one, (image, _) in pairs])
            self._seen = np.unique(labels[labels >= 0])
            if len(self._seen) < 2:
                raise DataError(f"{self.name}: the training tokens show fewer than two classes; pass more training images")
            absent = [name for label, name in enumerate(("background", *self.class_names)) if label not in self._seen]
            if condition == CONDITIONS[0] and absent:
                log.warning("%s: no training token shows %s; the probe never says so", self.name, ", ".join(absent))
            y = torch.from_numpy(np.where(labels < 0, -1, np.searchsorted(self._seen, labels)))
            probes = []
            for names in found[0].by_width(_sources(extractor), rows=len(labels)):
                features = torch.cat([one.stack(names) for one in found], dim=1)
                probe = fit_linear_probe(features, y.to(features.device), len(self._seen), self.strength,
                                         sample_weight=(y >= 0).to(features.device))  # fmt: skip
                probes.append(probe)
            self._probes[condition] = join_probes(probes)
            self.lacking |= set((~self._probes[condition].converged).nonzero()[:, 0].tolist())

    def score(
        self, sample: LabelledImage, mask: np.ndarray, values: torch.Tensor, image: ImageFeatures, condition: str
    ) -> list[tuple[float, ...]]:
        if self.readout == "text":
            texts = [self.extractor.alignment.text(name) for name in self.class_names]
            names = [f"value.{layer}" for layer in self.extractor.layers]
            vectors = torch.stack([torch.stack([text[name] for text in texts]) for name in names]).to(values.device)
            scores = torch.einsum("lnc,lkc->lkn", values, vectors)
        else:
            logits = self._probes[condition].logits(values)
            logits = logits if logits.ndim == 3 else torch.stack([torch.zeros_like(logits), logits], dim=-1)  # two classes
            scores = logits.transpose(1, 2)
        true, labels = torch.from_numpy(mask.astype(np.int64)).to(scores.device), range(self._first, len(self.class_names) + 1)
        counts, label_of = [], torch.from_numpy(self._seen).to(scores.device)
        for one in scores:  # layer by layer: the maps of all layers and classes of one large photograph would take gigabytes
            winner = image.layout.to_pixels(one).max(dim=0).indices  # 20 times faster than argmax on a CPU
            counts.append(tuple(class_counts(label_of[winner], true, labels).astype(float).tolist()))
        return counts


def _sources(extractor: FeatureExtractor) -> list[str]:
    return [f"value.{layer}" for layer in extractor.layers]


def _read(extractor: FeatureExtractor, item: Item, prefix: str | None) -> ImageFeatures:
    """The values, and nothing else, of an image behind a prefix."""
    return extractor.images([item], prefix, _sources(extractor))[0]


def moved(values: torch.Tensor, plain: torch.Tensor, objects: np.ndarray) -> list[tuple[float, float]]:
    """How far tokens move, per layer: |v - v without prefix| / |v without prefix|, mean over objects and background.

    values, plain (L, N, C); objects (N,): the share of each token's pixels that show an object, its weight. `NOWHERE`
    where there is none of the two."""
    distance = ((values - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-12)).double().cpu().numpy()
    weights = np.stack([objects, 1 - objects], axis=1)
    found = np.where(weights.sum(0) > 0, distance @ weights / np.maximum(weights.sum(0), 1e-12), NOWHERE)
    return [tuple(row) for row in found]


def run_prefixes(
    readout: PrefixReadout, extractor: FeatureExtractor, parts: Parts | None = None, progress: bool = True, chunk: int = 20
) -> ScoreTable:
    """The rows of a readout: sources `<condition>.<layer>`. Samples without controls of equal length, or that cannot be read, are
    `skipped`, layers whose probe did not converge `left_out`. DataError if nothing is left or too many cannot be read.

    With `parts`, finished chunks are kept there and a run that was stopped goes on, with the same bytes."""
    sources = [f"{condition}.{layer}" for condition in CONDITIONS for layer in extractor.layers]
    depends = [readout.name, sources, list(readout.columns), extractor.fingerprint]
    items = [(sample, readout.prefixes(sample)) for sample in readout.samples]
    fit = cache(readout.fit)  # once, before the first chunk that is not stored

    def score(sample: Any, prefixes: Prefixes | None) -> list:
        """Id, group, columns by source or why there are none."""
        try:
            values = "has no prefixes of equal length in every condition" if prefixes is None else _values(readout, extractor, sample, prefixes)
        except (DataError, ImageError) as error:
            values = str(error)
        return [sample.id, readout.group_of(sample), values]

    def compute(some: list) -> list:
        fit(extractor)
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
    usable = ~np.isnan(table).any((0, 2)).reshape(len(CONDITIONS), -1).any(0)  # a layer has scores in all conditions or in none
    if not usable.any():
        raise DataError(f"{readout.name}: the probe converged in no layer; lower its strength or load the model in float32")
    kept = np.tile(usable, len(CONDITIONS))
    left_out = {source: len(ids) for source, there in zip(sources, kept, strict=True) if not there}
    sources = [source for source in sources if source not in left_out]
    return ScoreTable(readout.name, ids, groups, sources, list(readout.columns), table[:, kept], skipped, left_out)


def _values(readout: PrefixReadout, extractor: FeatureExtractor, sample: Any, prefixes: Prefixes) -> list:
    """Per source the columns of a sample. All conditions in a row: the vision tower sees the image once."""
    item, mask = readout.image_of(sample), np.asarray(sample.mask)  # read once: both may be files
    found: list = []
    for condition in CONDITIONS:
        image = _read(extractor, item, prefixes[condition])
        values = image.stack(_sources(extractor))
        if condition == "none":
            plain, shares = values, token_means(image.layout, readout.objects(mask)[..., None])[:, 0]
        scores = zip(readout.score(sample, mask, values, image, condition), moved(values, plain, shares), strict=True)
        none = [None] * len(readout.columns)
        found += [none if place in readout.lacking else [*score, *distance] for place, (score, distance) in enumerate(scores)]
    return found


def with_controls(readout: PrefixReadout, start: int = 0) -> int:
    """Number of the first sample from `start` on (else before it) that has prefixes of equal length in every condition.

    Raises DataError where fewer than four images have such: nothing can be measured, which is better known before hours of reading."""
    count = len(readout.samples)
    order = [*range(min(start, count), count), *range(min(start, count))]
    usable = (number for number in order if readout.prefixes(readout.samples[number]) is not None)
    found = next(usable, None)
    if found is None:
        absent = sorted(set(chain(*readout.writer.unmatched.values())))
        raise DataError(f"{readout.name}: none of {count} samples has prefixes of equal length in every condition for "
                        f"{readout.writer.mlm.name}; there is no {', no '.join(absent)} for any. Read more samples or other domains, "
                        "or word the prefixes anew (kvutils/tasks/prefixes.py)")  # fmt: skip
    groups = {readout.group_of(readout.samples[found])}
    while len(groups) < 4:
        if (number := next(usable, None)) is None:
            raise DataError(f"{readout.name}: {len(groups)} images with prefixes of equal length are too few to choose a layer on some of "
                            "them and test it on others; at least 4 are needed: read more samples")  # fmt: skip
        groups.add(readout.group_of(readout.samples[number]))
    return found


def prefix_picture(
    readout: ReferringPrefix, number: int, layer: int, order: Sequence[str] = ("none", "correct", "wrong", "random")
) -> dict:
    """What the figure of one referring expression needs, JSON-able: its score on every token behind some prefixes, in one
    layer. Raises DataError where the sample has no controls of equal length."""
    sample, extractor = readout.samples[number], readout.extractor
    prefixes = readout.prefixes(sample)
    if prefixes is None:
        raise DataError(f"{sample.id} has no prefixes of equal length in every condition; show another sample")
    place, item, mask = list(extractor.layers).index(layer), readout.image_of(sample), np.asarray(sample.mask)
    vector = extractor.alignment.text(sample.text)[f"value.{layer}"]
    maps, ious = {}, {}
    for condition in order:
        image = _read(extractor, item, prefixes[condition])
        values = image.stack(_sources(extractor))
        maps[condition] = to_grid(image.layout, (values[place].cpu() @ vector.cpu()).numpy()).round(4).tolist()
        ious[condition] = readout.score(sample, mask, values, image, condition)[place][IOU]
    return {"image": encode_image(sample.image), "size": list(sample.image.size), "text": sample.text, "layer": layer,
            "order": list(order), "maps": maps, "ious": ious, "prefixes": {c: prefixes[c] for c in order}}  # fmt: skip
