"""Every feature source of an image on one token grid: what the six tasks read.

    pixels             mean colour and position of a token's rectangle: the floor
    encoder_original   another vision tower, before it was finetuned in the MLM
    encoder            the MLM's vision tower
    projector          what enters the language model
    value.l, key.l     image values and keys of layer l, heads concatenated (keys after rotary embedding)
    untrained.value.l  the same of a model of the same architecture with random weights (control)

Features are rounded to half precision when they are made, so that they are the same numbers whether they come from memory
or from the model. Images are run in fixed batches: a batch of another composition may differ in its last bits, and a
resumed run must not.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from PIL import Image

from kvutils.errors import ModelError, at_least, one_of
from kvutils.kvcache import Capture, capture
from kvutils.language import resolve_layers
from kvutils.layout import TokenLayout
from kvutils.models import MLM, Encoder
from kvutils.readout.attention import QUESTION, prompt_saliency
from kvutils.readout.encoders import capture_encoder
from kvutils.readout.words import SiglipText, TextAlignment
from kvutils.store import digest

STACK_BYTES = 2**31  # of features, in float32, that a task computes with at once
Item = tuple[str, Image.Image]  # image id (for errors) and upright RGB image


@dataclass(frozen=True, eq=False, repr=False)
class ImageFeatures:
    """One image: the full grid of its finest view, no newlines, no padding; features: source -> (N, C).

    device: where stacks are made, so that a GPU computes with features that the main memory holds."""

    layout: TokenLayout
    features: dict[str, torch.Tensor]
    device: torch.device | None = None

    def __repr__(self) -> str:
        width, height = self.layout.image_size
        channels = {re.sub(r"\d+$", "l", source): tokens.shape[-1] for source, tokens in self.features.items()}
        shown = ", ".join(f"{source} {count}" for source, count in channels.items())
        return f"ImageFeatures({len(self.layout)} image tokens of a {width}x{height} picture; channels: {shown})"

    @property
    def nbytes(self) -> int:
        return sum(tokens.nbytes for tokens in self.features.values())

    def stack(self, sources: Sequence[str]) -> torch.Tensor:
        """(S, N, C) float32 of sources with the same number of channels, on `device`."""
        return torch.stack([self.features[source] for source in sources]).to(self.device).float()

    def by_width(self, sources: Iterable[str], rows: int = 0) -> list[list[str]]:
        """The sources in groups of equal C, each of which can be stacked; order is kept within a group.

        rows: tokens, of all images together, that will be stacked per source; a group has at most `STACK_BYTES` then.
        """
        groups: dict[int, list[str]] = {}
        for source in sources:
            one_of("source", source, self.features)
            groups.setdefault(self.features[source].shape[-1], []).append(source)
        portions = []
        for width, names in groups.items():
            most = max(1, STACK_BYTES // (4 * width * max(rows, 1)))
            portions += [names[i : i + most] for i in range(0, len(names), most)]
        return portions


def image_tokens(layout: TokenLayout) -> np.ndarray:
    """Indices of the tokens that tasks read: the finest view's grid without newlines and padding."""
    tokens = layout.spatial()
    sides = layout.rects[tokens, 2:] - layout.rects[tokens, :2]
    return tokens[(sides > 0).all(axis=1)]


def token_means(layout: TokenLayout, planes: np.ndarray) -> np.ndarray:
    """(N, K) mean of pixel planes (H, W, K) over the pixels whose centre is in each token's rectangle.

    A rectangle without a pixel centre (an enlarged image) takes the pixel under its middle.
    """
    sums, pixels = layout.pixel_sums(np.asarray(planes, dtype=np.float64), np.arange(len(layout)))
    return sums / pixels[:, None]


def pixel_features(layout: TokenLayout, image: Image.Image) -> torch.Tensor:
    """(N, 5) mean red, green, blue and the centre's x, y, all in -1..1."""
    colour = token_means(layout, np.asarray(image)) / 127.5 - 1
    position = 2 * layout.centers / np.array(layout.image_size) - 1
    return torch.from_numpy(np.concatenate([colour, position], axis=1))


class FeatureExtractor:
    """Features of images and texts from one MLM and its baselines; see the module for the sources.

    layers: of values and keys ("all" or numbers). encoder_text: the text tower of encoder_original, for text scores of the
    encoders. `alignment` scores texts. Batches are kept in memory up to `memory_bytes` (default: a third of what is free, shared by the processes of
    this machine). to: where features live (None: the model's device).
    """

    def __init__(
        self, mlm: MLM, untrained: MLM | None = None, encoder_original: Encoder | None = None, *,
        encoder_text: SiglipText | None = None, layers: str | int | Iterable[int] = "all", keys: bool = True,
        batch_size: int = 8, memory_bytes: int | None = None, to: str | torch.device | None = "cpu",
    ):  # fmt: skip
        at_least("batch_size", batch_size)
        self.mlm, self.untrained, self.encoder_original = mlm, untrained, encoder_original
        self.layers, self.keys, self.batch_size, self.to = resolve_layers(mlm, layers), keys, batch_size, to
        share = psutil.virtual_memory().available // (3 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.memory_bytes = share if memory_bytes is None else memory_bytes
        self.alignment = TextAlignment(mlm, self.layers, untrained, encoder_original, encoder_text)
        self._memory: OrderedDict[str, list[ImageFeatures]] = OrderedDict()
        self._held = 0
        self._saliency: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        held = sum(len(batch) for batch in self._memory.values())
        layers = f"{self.layers[0]}-{self.layers[-1]}" if len(self.layers) > 1 else self.layers[0]
        return f"FeatureExtractor({self.mlm.name}, {len(self.sources)} sources, layers {layers}, {held} images in memory)"

    @property
    def sources(self) -> list[str]:
        """The ids of all sources with a feature per token."""
        names = ["pixels", *(["encoder_original"] if self.encoder_original else []), "encoder", "projector"]
        families = ["value", *(["key"] if self.keys else []), *(["untrained.value"] if self.untrained else [])]
        return names + [f"{family}.{layer}" for family in families for layer in self.layers]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything that the features depend on besides the code and the libraries."""
        text = self.alignment.encoder_text
        models = [m and m.settings for m in (self.mlm, self.untrained, self.encoder_original)]
        return digest([models, text and [text.name, text.template], self.layers, self.batch_size])

    def images(self, items: Sequence[Item], prefix: str | None = None) -> list[ImageFeatures]:
        """Features of images, in consecutive batches of `batch_size`. prefix: text before the image."""
        batches = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        return [features for batch in batches for features in self.batch(self.batch_key(batch, prefix), batch, prefix)]

    def batch_key(self, items: Sequence[Item], prefix: str | None = None) -> str:
        """Name of a batch: it depends on the pixels of all its images and on the prefix."""
        pixels = [f"{image.mode}{image.size}".encode() + image.tobytes() for _, image in items]
        digests = [hashlib.sha256(each).hexdigest() for each in pixels]
        return hashlib.sha256("\n".join([str(prefix), *digests]).encode()).hexdigest()[:32]

    def batch(self, key: str, items: Sequence[Item], prefix: str | None = None) -> list[ImageFeatures]:
        """Features of a batch under its `batch_key`, from memory or the models."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        batch = self._memory[key] = self._extract(items, prefix)
        self._held += sum(one.nbytes for one in batch)
        while self._held > self.memory_bytes and len(self._memory) > 1:
            self._held -= sum(one.nbytes for one in self._memory.popitem(last=False)[1])
        return batch

    def saliency(self, item: Item, question: str = QUESTION) -> torch.Tensor:
        """(N,) float32 attention of the last prompt token, scaled to 0..1 over the image's tokens (0 if constant)."""
        key = self.batch_key([item], question)
        if key not in self._saliency:
            layout, attention = prompt_saliency(self.mlm, item[1], question)
            attention = attention[torch.from_numpy(image_tokens(layout))]
            low, high = attention.min(), attention.max()
            self._saliency[key] = (attention - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        return self._saliency[key]

    def _extract(self, items: Sequence[Item], prefix: str | None) -> list[ImageFeatures]:
        images = [image for _, image in items]
        options = {"batch_size": len(images), "to": self.to}
        captured = capture(self.mlm, images, prefix, self.layers, keys=self.keys, **options)
        control = original = [None] * len(images)
        if self.untrained:
            control = capture(self.untrained, images, prefix, self.layers, keys=False, features=False, **options)
        if self.encoder_original:
            original = capture_encoder(self.encoder_original, self.mlm, images, **options)
        return [self._features(*each) for each in zip(items, captured, control, original, strict=True)]

    def _features(self, item: Item, captured: Capture, control: Capture | None, original: torch.Tensor | None) -> ImageFeatures:
        tokens = image_tokens(captured.layout)
        grid = captured.select(tokens)
        features = {"pixels": pixel_features(grid.layout, item[1]).to(grid.encoder.device)}
        if original is not None:
            features["encoder_original"] = original[torch.from_numpy(tokens).to(original.device)]
        features |= {"encoder": grid.encoder, "projector": grid.projector}
        features |= {f"value.{layer}": grid.value(layer) for layer in self.layers}
        if self.keys:
            features |= {f"key.{layer}": grid.key(layer) for layer in self.layers}
        if control is not None:
            random = control.select(tokens)
            features |= {f"untrained.value.{layer}": random.value(layer) for layer in self.layers}
        rounded = {source: tensor.half() for source, tensor in features.items()}
        for source, tensor in rounded.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"image {item[0]}: the features of {source} are not finite in half precision (largest "
                                 f"{features[source].abs().max():.3g}); leave this source's layer out")  # fmt: skip
        return ImageFeatures(grid.layout, rounded, self.mlm.device)
