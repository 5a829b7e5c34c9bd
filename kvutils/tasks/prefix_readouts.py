"""What is read from image values behind words: section 4.1's referring expressions, and street scenes by domain. A readout turns the values
of each layer into a few numbers (`columns`), for each of its families:

    none, correct, wrong, ...   the conditions of `kvutils.tasks.prefixes`
    uncentred.<condition>       the same values with texts that are not centred (`kvutils.readout.words`)
    untrained                   without a prefix, in a model with random weights: the floor"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from kvutils import VOID
from kvutils.datasets.bdd10k import CLASS_NAMES as BDD_NAMES
from kvutils.datasets.samples import DomainImage, LabelledImage, NamedMask
from kvutils.errors import DataError
from kvutils.metrics.masks import class_counts, class_mean_iou
from kvutils.metrics.statistics import Statistic, column_mean
from kvutils.probes import LinearProbe, fit_linear_probe, join_probes
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Item
from kvutils.readout.words import UNCENTRED
from kvutils.tasks.base import sample_seed
from kvutils.tasks.prefixes import CONDITIONS, PrefixWriter
from kvutils.tasks.text_segmentation import COLUMNS, IOU, map_scores

log = logging.getLogger(__name__)
UNTRAINED = "untrained"
FEWER = CONDITIONS[:4]  # none, correct, wrong, random: for readouts that stand beside the one that a claim is judged by
MOVED = ("moved_objects", "moved_background")  # the last columns of every readout
STUFF = frozenset(BDD_NAMES[: BDD_NAMES.index("person")])  # road, sky ...: every pixel of BDD has a class, these are no objects
TITLES = {"referring_by_class_name": "Referring segmentation,\nclass name before the image",
          "referring_by_expression": "Referring segmentation,\nexpression before the image",
          "domain_by_text": "Domain segmentation by text,\ndomain before the image",
          "domain_by_probe": "Domain segmentation by probe,\ndomain before the image"}
Prefixes = dict[str, str | None]


class PrefixReadout(ABC):
    """Samples, the prefixes that go before their images, and what is read from the values."""

    name: ClassVar[str]
    metric = "mIoU"
    statistic: ClassVar[Statistic]  # the metric of values (n, k), for each row of weights (n_boot, n)
    columns: Sequence[str]
    samples: Sequence[Any]
    parameters: Mapping[str, Any] = {}  # JSON-able: what else its scores depend on, beside the samples that are scored
    lacking: frozenset[int] = frozenset()  # places of layers of which `fit` finds that they can have no score

    def __init__(self, extractor: FeatureExtractor, writer: PrefixWriter, families: Sequence[str], seed: int = 0):
        self.extractor, self.writer, self.seed = extractor, writer, seed
        self.families = tuple(families if extractor.untrained else [each for each in families if each != UNTRAINED])

    @abstractmethod
    def prefixes(self, sample: Any) -> Prefixes | None:
        """A prefix per condition; None where there is no control of the same length."""

    @abstractmethod
    def score(self, sample: Any, mask: np.ndarray, values: torch.Tensor, image: ImageFeatures, family: str) -> list[tuple]:
        """`columns` but `MOVED` of each layer's values (L, N, C) of a sample with a mask (H, W) in a family."""

    def fit(self) -> None:  # noqa: B027
        """Work before the first sample, such as fitting a probe; left out when every part is stored."""

    def objects(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool: the pixels of objects in a mask, for how far values move there."""
        return (mask > 0) & (mask != VOID)

    def read(self, item: Item, prefixes: Prefixes, families: Sequence[str]) -> Iterator[tuple[str, ImageFeatures, torch.Tensor]]:
        """Of an image each family, the image's features behind its prefix, and its values there, (L, N, C)."""
        texts = {each: prefixes["none" if each == UNTRAINED else each.removeprefix(UNCENTRED)] for each in families}
        values, control = ([f"{kind}value.{layer}" for layer in self.extractor.layers] for kind in ("", f"{UNTRAINED}."))
        both = values + control * (UNTRAINED in self.families)  # the two models together: an image is prepared once
        found = {None: self.extractor.images([item], None, both)[0]} if None in texts.values() else {}
        behind = list(dict.fromkeys(filter(None, texts.values())))
        found |= zip(behind, self.extractor.images([item] * len(behind), behind, values), strict=True)
        for family, text in texts.items():
            yield family, found[text], found[text].stack(control if family == UNTRAINED else values)

    def texts(self, names: Sequence[str], family: str) -> torch.Tensor:
        """(L, K, C) vectors of K texts for the values of a family."""
        kind = f"{UNTRAINED}." if family == UNTRAINED else UNCENTRED * family.startswith(UNCENTRED)
        found = [self.extractor.alignment.text(name) for name in names]
        return torch.stack([torch.stack([text[f"{kind}value.{layer}"] for text in found]) for layer in self.extractor.layers])


class ReferringPrefix(PrefixReadout):
    """Task 4 with a prefix: the class name, or the expression itself; the readout is that of the expression. wrong: the prefix of a thing
    of another image whose class this image does not show, as far as its data set says (of all samples' classes). The class name is
    read in all families, the expression under `FEWER` conditions."""

    statistic = staticmethod(column_mean(IOU))
    columns = (*COLUMNS, *MOVED)

    def __init__(self, samples: Sequence[NamedMask], extractor: FeatureExtractor, writer: PrefixWriter, kind: str, seed: int = 0):
        also = [(each, UNCENTRED + each) if each in ("none", "correct", "random") else (each,) for each in CONDITIONS]
        super().__init__(extractor, writer, [*sum(also, ()), UNTRAINED] if kind == "class_name" else FEWER, seed)
        self.samples, self.kind = samples, kind
        self.name = f"referring_by_{kind}"
        self._shown: dict[str, set[str]] = {}
        for sample in samples:
            self._shown.setdefault(sample.image_id, set()).update((sample.class_name, *sample.shown))
        self._things = sorted({(self._text(sample), sample.class_name) for sample in samples})

    def _text(self, sample: NamedMask) -> str:
        return self.writer.correct(self.kind, sample.class_name if self.kind == "class_name" else sample.text)

    def prefixes(self, sample: NamedMask) -> Prefixes | None:
        wrong = [text for text, name in self._things if name not in self._shown[sample.image_id]]
        return self.writer.write(self._text(sample), wrong, sample_seed(str(self.seed), self.name, sample.id))

    def scores(self, sample: NamedMask, values: torch.Tensor, family: str) -> torch.Tensor:
        """(L, N) dot products of the expression with values (L, N, C)."""
        return torch.einsum("lnc,lc->ln", values, self.texts([sample.text], family)[:, 0].to(values.device))

    def score(self, sample: NamedMask, mask: np.ndarray, values: torch.Tensor, image: ImageFeatures, family: str) -> list[tuple]:
        if not (mask == 1).any():
            raise DataError("its mask is empty: nothing can be scored")
        return [tuple(row) for row in map_scores(self.scores(sample, values, family), mask, layout=image.layout).tolist()]


class DomainPrefix(PrefixReadout):
    """Semantic segmentation of one domain with the domain's name before the image; mIoU over the classes that occur. readout "text": the
    class name with the largest dot product, on pixels that show some class; centring texts does not change it. "probe": under `FEWER`
    conditions, a linear probe each, fitted on the tokens of other images of the domains, each with its own prefix of that condition, for
    the classes (and background) that their tokens show; a wrong domain is another one of all these images. Objects, for how far values
    move, are all classes but `STUFF`."""

    statistic = staticmethod(lambda weights, values: class_mean_iou(weights, values[:, : -len(MOVED)]))

    def __init__(self, samples: Sequence[DomainImage], train: Sequence[DomainImage], class_names: Sequence[str],
                 extractor: FeatureExtractor, writer: PrefixWriter, readout: str, seed: int = 0, strength: float = 0.01):  # fmt: skip
        super().__init__(extractor, writer, (*CONDITIONS, UNTRAINED) if readout == "text" else FEWER, seed)
        self.samples, self.train, self.class_names = samples, train, tuple(class_names)
        self.readout, self.strength = readout, strength
        self.parameters = {"strength": strength, "train": [sample.id for sample in train]}
        self.name = f"domain_by_{readout}"
        self.domains = sorted({sample.domain for sample in (*samples, *train)})
        if len(self.domains) < 2:
            raise DataError(f"prefixes of a wrong domain need at least two domains, found {self.domains}")
        labels = self.class_names if readout == "text" else ("background", *self.class_names)
        self.columns = (*(f"{part} {name}" for part in ("right", "true", "said") for name in labels), *MOVED)
        self._first = 1 if readout == "text" else 0  # the label that stands in the first column
        self._probes: dict[str, LinearProbe] = {}
        self._seen = np.arange(self._first, len(self.class_names) + 1)  # the label of each row of scores

    def objects(self, mask: np.ndarray) -> np.ndarray:
        stuff = [label for label, name in enumerate(self.class_names, start=1) if name in STUFF]
        return super().objects(mask) & ~np.isin(mask, stuff)

    def prefixes(self, sample: DomainImage) -> Prefixes | None:
        texts = {name: self.writer.correct("domain", name) for name in self.domains}
        wrong = [text for name, text in texts.items() if name != sample.domain]
        return self.writer.write(texts[sample.domain], wrong, sample_seed(str(self.seed), "domain", sample.id))

    def fit(self) -> None:
        if self.readout != "probe":
            return
        values = [f"value.{layer}" for layer in self.extractor.layers]
        chosen = [(image, prefixes) for image in self.train if (prefixes := self.prefixes(image)) is not None]
        for condition in self.families:
            found = self.extractor.images([(image.id, image.image) for image, _ in chosen], [prefixes[condition] for _, prefixes in chosen], values)
            labels = np.concatenate([one.layout.token_labels(image.mask)[0] for one, (image, _) in zip(found, chosen, strict=True)])
            self._seen = np.unique(labels[labels >= 0])
            if len(self._seen) < 2:
                raise DataError(f"{self.name}: the training tokens show fewer than two classes; pass more training images")
            absent = [name for label, name in enumerate(("background", *self.class_names)) if label not in self._seen]
            if condition == CONDITIONS[0] and absent:
                log.warning("%s: no training token shows %s; the probe never says so", self.name, ", ".join(absent))
            y = torch.from_numpy(np.where(labels < 0, -1, np.searchsorted(self._seen, labels)))
            probes = []
            for names in found[0].by_width(values, rows=len(labels)):
                features = torch.cat([one.stack(names) for one in found], dim=1)
                weight = (y >= 0).to(features.device)
                probes.append(fit_linear_probe(features, y.to(features.device), len(self._seen), self.strength, sample_weight=weight))
            self._probes[condition] = join_probes(probes)
            self.lacking |= set((~self._probes[condition].converged).nonzero()[:, 0].tolist())

    def score(self, sample: LabelledImage, mask: np.ndarray, values: torch.Tensor, image: ImageFeatures, family: str) -> list[tuple]:
        if self.readout == "text":
            scores = torch.einsum("lnc,lkc->lkn", values, self.texts(self.class_names, family).to(values.device))
        else:
            logits = self._probes[family].logits(values)
            logits = logits if logits.ndim == 3 else torch.stack([torch.zeros_like(logits), logits], dim=-1)  # two classes
            scores = logits.transpose(1, 2)
        true, labels = torch.from_numpy(mask.astype(np.int64)).to(scores.device), range(self._first, len(self.class_names) + 1)
        counts, label_of = [], torch.from_numpy(self._seen).to(scores.device)
        for one in scores:  # layer by layer: the maps of all layers and classes of one large photograph would take gigabytes
            winner = image.layout.to_pixels(one).max(dim=0).indices  # 20 times faster than argmax on a CPU
            counts.append(tuple(class_counts(label_of[winner], true, labels).astype(float).tolist()))
        return counts
