"""Tasks 3 and 4: what a text names, found among the image tokens (paper, section 3.1). Task 3 is semantic segmentation (ImageNet-S), read
with words or with a probe; task 4 is referring-expression segmentation and detection (RefCOCO), read with words. Both make score maps of an
image and ask how well they show one mask."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from kvutils.datasets.samples import LabelledImage, NamedMask
from kvutils.errors import DataError, ImageError, ModelError, one_of
from kvutils.layout import TokenLayout
from kvutils.metrics.masks import RankedMaps, box_iou, largest_region_boxes, true_and_void
from kvutils.metrics.statistics import column_mean, column_ratio
from kvutils.probes import LinearProbe, fit_linear_probe
from kvutils.readout.features import FeatureExtractor, ImageFeatures, Opener, stack_images
from kvutils.readout.words import UNCENTRED, start_tokens, text_values
from kvutils.tasks.base import SHUFFLED, UNTRAINED, Row, ScoreTable, Task, opener, sample_seed, shuffled_labels
from kvutils.tasks.tables import by_layer

AP, INTERSECTION, UNION, IOU, BOX = range(5)
COLUMNS = ("ap", "intersection", "union", "iou")
PIXELS = {"cpu": 2**19, "cuda": 2**26}  # of maps at once: what the cache, and a part of the memory, hold


def map_scores(scores: torch.Tensor, mask: np.ndarray, threshold: float | None = None, boxes: bool = False,
               layout: TokenLayout | None = None) -> np.ndarray:  # fmt: skip
    """(S, 4) `COLUMNS` of score maps (S, H, W), or of the scores (S, N) of a layout's tokens, brought to pixels. AP, I and U in pixels, IoU
    (0 for an empty union). Foreground is above the threshold (None: Otsu's, per map). boxes: a fifth column, is the box around the largest
    region right (IoU >= 0.5)? All on the device of the scores."""
    known, true_box, rows = true_and_void(mask, scores.device), Image.fromarray(mask == 1).getbbox(), []
    for some in scores.split(max(1, PIXELS["cpu" if scores.device.type == "cpu" else "cuda"] // mask.size)):
        maps = layout.to_pixels(some) if layout else some
        ranked = RankedMaps.of(maps, *known)
        thresholds = ranked.otsu() if threshold is None else maps.new_full((len(maps),), threshold)
        both, either = ranked.overlaps(thresholds).double().T
        columns = torch.stack([ranked.average_precisions(), both, either, both / either.clamp_min(1)], dim=1).cpu().numpy()
        if boxes:
            found = largest_region_boxes(maps > thresholds[:, None, None])
            columns = np.column_stack([columns, [float(box_iou(box, true_box) >= 0.5) for box in found]])
        rows.append(columns)
    return np.concatenate(rows)


class TextSegmentation(Task):
    """Score of a text on every image token, interpolated to pixels; Otsu's threshold per image (ours). Texts are centred, and as they are
    in `uncentred.` sources, which stand beside (`kvutils.readout.words`). Control: the same scores for the text of another sample that does
    not hold for this image. Samples without a foreground pixel are skipped."""

    columns = COLUMNS
    shuffled = True
    threshold: ClassVar[float | None] = None  # foreground is above it; None: Otsu's

    def __init__(self, samples: Sequence[NamedMask]):
        super().__init__(samples)
        own: dict[str, set[str]] = {}  # of an image, the texts and classes that hold
        for sample in samples:
            own.setdefault(sample.image_id, set()).update((sample.text, sample.class_name, *sample.shown))
        texts = sorted({(sample.text, sample.class_name) for sample in samples})
        self._wrong = {}  # for every sample a text of another image that no sample of its own image has
        for sample in samples:
            free = [text for text, name in texts if not {text, name} & own[sample.image_id]]
            # An image that shows everything leaves any other text of another class, or else any other text.
            free = free or [text for text, name in texts if text != sample.text and name != sample.class_name]
            free = free or [text for text, _ in texts if text != sample.text] or [sample.text]
            self._wrong[sample.id] = free[sample_seed(sample.id) % len(free)]

    def sources(self, extractor: FeatureExtractor) -> list[str]:
        names = extractor.alignment.sources
        return names + [SHUFFLED + name for name in names if name.startswith("value.")]

    def reads(self, source: str, extractor: FeatureExtractor) -> str:
        return extractor.alignment.reads(super().reads(source, extractor))

    def images(self, sample: NamedMask) -> list[tuple[str, Opener]]:
        return [(sample.image_id, opener(sample))]

    def near(self, sample: NamedMask) -> str:
        return sample.image_id

    def score(self, sample: NamedMask, features: Mapping[str, ImageFeatures], extractor: FeatureExtractor) -> list[Row]:
        mask = sample.mask  # read once: it may be a file
        if not (mask == 1).any():
            return []
        image, order = features[sample.image_id], self.sources(extractor)
        scores = self.token_scores(sample, image, extractor)
        stacked = torch.stack([scores[source] for source in order])
        values = map_scores(stacked, mask, self.threshold, "box" in self.columns, image.layout).tolist()
        return [Row(sample.id, sample.group, dict(zip(order, map(tuple, values), strict=True)))]

    def token_scores(self, sample: NamedMask, image: ImageFeatures, extractor: FeatureExtractor) -> dict[str, torch.Tensor]:
        """Source -> (N,) score of every token of the image."""
        scores = extractor.alignment.scores(image.features, [sample.text, self._wrong[sample.id]])
        wrong = {SHUFFLED + source: pair[1] for source, pair in scores.items()}
        return {source: pair[0] for source, pair in scores.items()} | wrong


class SemanticSegmentation(TextSegmentation):
    """Zero-shot: the class name's vector . every image token, in each text-aligned source. Headline: average precision over pixels, which
    needs no threshold. Second: IoU after Otsu's threshold (ours; the paper states no rule). Control: a class name that is not in the
    image."""

    name, title, metric = "semantic_segmentation", "Semantic segmentation, by text", "AP"
    statistic = staticmethod(column_mean(AP))
    statistics = {"IoU": column_mean(IOU)}


class SemanticSegmentationProbe(SemanticSegmentation):
    """Supervised counterpart of the same samples and metrics, for every source (ours). One multinomial probe per source, fitted on the
    tokens of other labelled images (`train`: class index + 1 of `class_names`, 0 background, void excluded), class-balanced. A class's
    score is its log-odds against all others, foreground is above 0. Control: the probe fitted on shuffled labels."""

    name, title = "semantic_segmentation_probe", "Semantic segmentation, by probe"
    threshold = 0.0
    sources, reads = Task.sources, Task.reads  # of every feature, not only those that texts are compared with

    def __init__(self, samples: Sequence[NamedMask], train: Sequence[LabelledImage], class_names: Sequence[str],
                 strength: float = 0.01, max_iter: int = 1000):  # fmt: skip
        super().__init__(samples)
        if {image.id for image in train} & {sample.image_id for sample in samples}:
            raise DataError("training and scored images overlap; pass labelled images that are not scored")
        self.train, self.class_names = train, list(class_names)
        self.fitting = {"strength": strength, "max_iter": max_iter}
        self.parameters = self.fitting | {"train": [image.id for image in train], "classes": self.class_names}
        self._probes: list[tuple[list[str], LinearProbe]] = []
        self._shown: set[str] = set()  # classes of the training tokens

    def prepare(self, extractor: FeatureExtractor) -> None:
        """Fit the probes. A source whose fit does not converge, or whose features are not finite, has no score. DataError if no
        token shows any class."""
        images = extractor.images([(image.id, image.image) for image in self.train], checked=False)
        found = [one.layout.token_labels(image.mask)[0] for one, image in zip(images, self.train, strict=True)]
        labels = torch.from_numpy(np.concatenate(found))
        known, names = labels >= 0, ["background", *self.class_names]
        self._shown = {names[i] for i in set(labels[known].tolist())}
        if len(self._shown) < 2:
            raise DataError(f"the training tokens show only {', '.join(self._shown) or 'void'}; pass more training images")
        shuffled = shuffled_labels(labels, 0, known)
        self._probes, unusable = [], set().union(*(one.not_finite for one in images))
        for sources in images[0].by_width(extractor.sources, rows=len(labels)):
            values = [source for source in sources if source.startswith("value.")]
            for group, y, prefix in ((sources, labels, ""), (values, shuffled, SHUFFLED)):
                if group:
                    X = stack_images(images, group)
                    probe = fit_linear_probe(X, y.to(X.device), len(names), sample_weight=known.to(X.device), **self.fitting)
                    fitted = [prefix + source for source in group]
                    self._probes.append((fitted, probe))
                    unusable |= {source for source, done in zip(fitted, probe.converged.tolist(), strict=True) if not done}
        self.lacking = frozenset(unusable)

    def token_scores(self, sample: NamedMask, image: ImageFeatures, extractor: FeatureExtractor) -> dict[str, torch.Tensor]:
        one_of(f"class of {sample.id}", sample.class_name, self.class_names)
        if sample.class_name not in self._shown:
            raise DataError(f"no training token shows {sample.class_name}; pass more training images")
        number = self.class_names.index(sample.class_name) + 1
        odds = {}
        for names, probe in self._probes:
            logits = probe.logits(image.stack([name.removeprefix(SHUFFLED) for name in names]))
            others = [k for k in range(logits.shape[-1]) if k != number]
            scores = logits[..., number] - logits[..., others].logsumexp(-1)
            odds |= dict(zip(names, scores, strict=True))
        return odds


class ReferringSegmentation(TextSegmentation):
    """Zero-shot: the expression's vector . every image token, in each text-aligned source. Rows are sentences. Headline: mIoU after Otsu's
    threshold (ours; an empty union counts 0, as LAVT). Beside it oIoU (sum I / sum U), the average precision over pixels, and Acc@0.5, the
    share of sentences whose box around the largest region has an IoU of at least 0.5 with the true box. Control: an expression for another
    image."""

    name, title, metric = "referring_segmentation", "Referring-expression segmentation", "mIoU"
    columns = (*COLUMNS, "box")
    statistic = staticmethod(column_mean(IOU))
    statistics = {"oIoU": column_ratio(INTERSECTION, UNION), "AP": column_mean(AP), "Acc@0.5": column_mean(BOX)}


def uncentred(table: ScoreTable) -> ScoreTable:
    """A task's table as if its texts were not centred: those scores under the plain names, and the controls as they are."""
    beside = {source.removeprefix(UNCENTRED): source for source in table.sources if source.startswith(UNCENTRED)}
    names = [source for source in table.sources if source in beside or source.startswith((UNTRAINED, SHUFFLED))]
    values = np.stack([table.of(beside.get(source, source)) for source in names], axis=1)
    return replace(table, sources=names, values=values)


def read_otherwise(task: TextSegmentation, extractor: FeatureExtractor, table: ScoreTable, count: int = 80) -> tuple[ScoreTable, dict]:
    """Scores of the task's first samples with texts read our way and the other way, and the words that each reads a text behind. Ours:
    behind the model's `start_tokens`, and at the start for a model without. The other: at the start, or behind the end-of-text token. With
    centred texts and the values of the layer that is best in the task's `table`, the first layer aside (whose values do not depend on what
    is before a text): sources `ours/value.3` and `other/value.3`."""
    mlm, everything = extractor.mlm, np.ones((1, len(table)))
    usable = [layer for layer, _ in by_layer(table.sources, "value") if layer > 0]  # others are `left_out`
    layer = max(usable, key=lambda each: float(task.statistic(everything, table.of(f"value.{each}"))[0]))
    start, end = start_tokens(mlm), [mlm.tokenizer.eos_token_id]
    read = {"ours": start, "other": [] if start else end}
    samples, rows = [], []

    @cache
    def vectors(texts: tuple[str, ...]) -> torch.Tensor:
        """(ways, channels), the mean over the texts."""
        return torch.cat([text_values(mlm, texts, layer, behind=behind).mean(0).flatten(1) for behind in read.values()])

    for sample in task.samples[:count]:
        try:
            if not (sample.mask == 1).any():
                continue
            (image,) = extractor.images([(sample.image_id, sample.image)], sources=[f"value.{layer}"])
        except (DataError, ImageError, ModelError):  # `run_task` has counted and named it
            continue
        samples.append(sample)
        values, centred = image.stack([f"value.{layer}"])[0], vectors((sample.text,)) - vectors(extractor.alignment.names_like(sample.text))
        rows.append(map_scores(centred.to(values.device) @ values.T, sample.mask, task.threshold, layout=image.layout))
    ids, groups, sources = [each.id for each in samples], [each.group for each in samples], [f"{way}/value.{layer}" for way in read]
    behind = {way: mlm.tokenizer.convert_ids_to_tokens(tokens) for way, tokens in read.items()}
    return ScoreTable(task.name, ids, groups, sources, list(COLUMNS), np.array(rows)), behind


def other_reading(table: ScoreTable, task: type[TextSegmentation], behind: Mapping, n_boot: int = 2000, seed: int = 0) -> dict:
    """What the headline would be with texts read the other way, of what `read_otherwise` found; JSON-able."""
    found = {source.partition("/")[0]: table.interval(source, task.statistic, n_boot, seed) for source in table.sources}
    minus = table.difference(table.sources[1], table.sources[0], task.statistic, n_boot, seed)
    layer = int(table.sources[0].rpartition(".")[2])
    return {"layer": layer, "metric": task.metric, "n": len(table), "behind": dict(behind), **found, "other_minus_ours": minus}
