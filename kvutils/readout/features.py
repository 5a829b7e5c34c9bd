"""Every feature source of an image on one token grid: what the six tasks read.

    pixels             mean colour and position of a token's rectangle: the floor
    encoder_original   another vision tower, before it was finetuned in the MLM
    encoder            the MLM's vision tower
    head.encoder...    the two after the last layer of encoder_original, for its pooling head: only for text scores, where the MLM's is cut before
    projector          what enters the language model
    value.l, key.l     image values and keys of layer l, heads concatenated (keys after rotary embedding)
    untrained.value.l  the same of a model of the same architecture with random weights (control)

A picture's features depend on no other and on no interruption, and are made once while memory allows (several may share a pass: on a CPU
no bit depends on it). They are rounded to float16; what exceeds that (65,504, as the tower of Qwen2.5-VL does) is kept as the model wrote it."""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from PIL import Image

from kvutils.errors import ImageError, MemoryLimitError, ModelError, of_kind, one_of
from kvutils.images import ImageLike, open_image
from kvutils.kvcache import capture_prepared
from kvutils.language import resolve_layers
from kvutils.layout import TokenLayout
from kvutils.models import MLM, Encoder
from kvutils.readout.attention import prompt_saliency
from kvutils.readout.encoders import encode_prepared
from kvutils.readout.words import SiglipText, TextAlignment
from kvutils.store import digest
from kvutils.vision import VisionInputs, encode_images, in_halves, prepare_images

HEADS = ("head.encoder_original", "head.encoder")
STACK_BYTES = 2**31  # of features, in float32, that a task computes with at once
TOGETHER = 2**13  # image tokens in one pass: more would only cost memory
FULL = 2 / 3  # of a GPU's memory: the features of further pictures live in main memory
Item = tuple[str, ImageLike]  # image id, for errors, and picture
Row = tuple[str, str, Image.Image, str | None]  # of one pass: image id, `picture_key`, picture, text before it
Opener = Callable[[], Image.Image]
Picture = tuple[str, str, Opener]  # image id, `picture_key`, and what opens it


@dataclass(frozen=True, eq=False, repr=False)
class ImageFeatures:
    """One image: the full grid of its finest view, no newlines, no padding; features: source -> (N, C). device: where stacks are
    made, so that a GPU computes with features that the main memory holds. not_finite: sources that the model itself filled with
    NaN or Inf; zeros stand in for them, and a task counts them as without a score."""

    layout: TokenLayout
    features: dict[str, torch.Tensor]
    device: torch.device | None = None
    not_finite: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        width, height = self.layout.image_size
        channels = {re.sub(r"\d+$", "l", source): tokens.shape[-1] for source, tokens in self.features.items()}
        shown = ", ".join(f"{source} {count}" for source, count in channels.items())
        return f"ImageFeatures({len(self.layout)} image tokens of a {width}x{height} picture; channels: {shown})"

    @property
    def nbytes(self) -> int:
        return sum(tokens.nbytes for tokens in self.features.values())

    def stack(self, sources: Sequence[str], tokens: torch.Tensor | None = None) -> torch.Tensor:
        """(S, N, C) float32 of sources with the same number of channels, on `device`; tokens (K,): only these."""
        if tokens is None:
            return stack_images([self], sources)
        return torch.stack([self.features[source][tokens].to(self.device).float() for source in sources])

    def by_width(self, sources: Iterable[str], rows: int = 0) -> list[list[str]]:
        """The sources in groups of equal C, each of which can be stacked; order is kept within a group. rows: tokens, of all
        images together, that will be stacked per source; a group has at most `STACK_BYTES` then."""
        groups: dict[int, list[str]] = {}
        for source in sources:
            one_of("source", source, self.features)
            groups.setdefault(self.features[source].shape[-1], []).append(source)
        portions = []
        for width, names in groups.items():
            most = max(1, STACK_BYTES // (4 * width * max(rows, 1)))
            portions += [names[i : i + most] for i in range(0, len(names), most)]
        return portions


def stack_images(images: Sequence[ImageFeatures], sources: Sequence[str]) -> torch.Tensor:
    """(S, tokens of all images, C) float32 of sources with the same number of channels, on the images' `device`."""
    device, ends = images[0].device, np.cumsum([0, *(len(one.layout) for one in images)]).tolist()
    out = torch.empty(len(sources), ends[-1], images[0].features[sources[0]].shape[-1], device=device)
    for row, source in zip(out, sources, strict=True):
        for one, start, end in zip(images, ends, ends[1:], strict=False):
            row[start:end] = one.features[source].to(device)  # moved as it is kept and widened there: less goes over the bus
    return out


def image_tokens(layout: TokenLayout) -> np.ndarray:
    """Indices of the tokens that tasks read: the finest view's grid without newlines and padding."""
    tokens = layout.spatial()
    return tokens[layout.seeing[tokens]]


def token_means(layout: TokenLayout, planes: np.ndarray) -> np.ndarray:
    """(N, K) mean of pixel planes (H, W, K) over the pixels of each token's rectangle, see `TokenLayout.pixel_sums`."""
    sums, pixels = layout.pixel_sums(np.asarray(planes, dtype=np.float64), np.arange(len(layout)))
    return sums / pixels[:, None]


def pixel_features(layout: TokenLayout, image: Image.Image) -> torch.Tensor:
    """(N, 5) mean red, green, blue and the centre's x, y, all in -1..1."""
    colour = token_means(layout, np.asarray(image)) / 127.5 - 1
    return torch.from_numpy(np.concatenate([colour, 2 * layout.centers / np.array(layout.image_size) - 1], axis=1))


class FeatureExtractor:
    """Features of images and texts from one MLM and its baselines; see the module for the sources. layers: of values and keys ("all" or numbers).
    encoder_text: the text tower of encoder_original, for text scores of the encoders. `alignment` scores texts. Pictures are kept up to
    `memory_bytes`, the least recently used goes first (default: a third of what is free, shared by the processes of this machine): on the
    model's device until that is `FULL`, then in main memory. vocabulary: as in `TextAlignment`."""

    def __init__(self, mlm: MLM, untrained: MLM | None = None, encoder_original: Encoder | None = None, *,
                 encoder_text: SiglipText | None = None, layers: str | int | Iterable[int] = "all", keys: bool = True,
                 memory_bytes: int | None = None, vocabulary: Sequence[str] | None = None):  # fmt: skip
        if encoder_original is not None:
            of_kind("encoder_original", encoder_original, Encoder, "an Encoder, as load_encoder gives it")
        self.mlm, self.untrained, self.encoder_original = mlm, untrained, encoder_original
        self.layers, self.keys = resolve_layers(mlm, layers), keys
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free += torch.cuda.mem_get_info(mlm.device)[0] if mlm.device.type == "cuda" else 0
        self.memory_bytes = free // 3 if memory_bytes is None else memory_bytes
        self.alignment = TextAlignment(mlm, self.layers, untrained, encoder_original, encoder_text, vocabulary)
        self._memory: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._held = 0
        self._seen: tuple[list[str], VisionInputs | None, list] = [], None, []  # keys of the last pictures, pixels, what the tower made of them
        self._longest = TOGETHER  # image tokens of a picture in the last pass
        self._saliency: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        layers = f"{self.layers[0]}-{self.layers[-1]}" if len(self.layers) > 1 else self.layers[0]
        return f"FeatureExtractor({self.mlm.name}, {len(self.sources)} sources, layers {layers}, {len(self._memory)} images in memory)"

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
        return digest([models, text and [text.name, text.template], self.layers, self.alignment.vocabulary])

    def images(self, items: Sequence[Item], prefix: str | None | Sequence[str | None] = None, sources: Iterable[str] | None = None,
               checked: bool = True, seen: tuple[VisionInputs, Sequence[list[torch.Tensor]]] | None = None) -> list[ImageFeatures]:  # fmt: skip
        """Features of images, in passes of up to `TOGETHER` tokens. prefix: text before the image, of all or of each. sources: only these. checked:
        ModelError where the model gives NaN or Inf, which else is said by `not_finite`. seen: the pixels of all and what the tower made of them."""
        wanted = set(self.sources if sources is None else [sources] if isinstance(sources, str) else sources)
        for source in wanted:
            one_of("source", source, [*self.sources, *(HEADS if self.encoder_original else ())])
        texts = [prefix] * len(items) if isinstance(prefix, str | None) else prefix
        rows = [(name, picture_key(image := open_image(each, name)), image, text) for (name, each), text in zip(items, texts, strict=True)]
        places = [f"{key} {text!r}" for _, key, _, text in rows]
        found = {place: self._memory[place] for place in places if place in self._memory}
        missing = {place: row for place, row in zip(places, rows, strict=True) if place not in found or self._lacking(place, wanted)}
        if seen:
            self._seen = [key for _, key, *_ in rows], seen[0], [*seen[1]]
        while missing:
            lacking = self._lacking(next(iter(missing)), wanted)
            some = [each for each in missing if self._lacking(each, wanted) == lacking][: len(rows) if seen else max(1, TOGETHER // self._longest)]
            known = [self._memory.get(place) for place in some]  # which may have gone from memory by then
            made = self._extract([missing.pop(place) for place in some], lacking)
            found |= {place: self._keep(place, one, before) for place, one, before in zip(some, made, known, strict=True)}
        return [self._checked(name, found[place]) if checked else found[place] for (name, *_), place in zip(rows, places, strict=True)]

    def image(self, name: str, key: str, opened: Opener, sources: Set[str], ahead: Iterable[Picture] = ()) -> ImageFeatures:
        """Features of the image of this `picture_key` from memory, or from the models, for which it is opened. ahead: pictures that are wanted
        next: on a CPU as many of them as `TOGETHER` allows share its pass."""
        if not (lacking := self._lacking(f"{key} None", sources)):
            self._memory.move_to_end(f"{key} None")
            return self._memory[f"{key} None"]
        rows, coming = {key: (name, key, opened(), None)}, iter(ahead)
        alone = self.mlm.device.type != "cpu" or self._held > self.memory_bytes / 2  # a GPU's last bits would depend on what is in memory
        while len(rows) < (1 if alone else TOGETHER // self._longest) and (picture := next(coming, None)):
            if picture[1] not in rows and self._lacking(f"{picture[1]} None", sources) == lacking:
                rows[picture[1]] = *picture[:2], picture[2](), None
        known = [self._memory.get(f"{each} None") for each in rows]
        try:
            made = self._extract([*rows.values()], lacking)
        except ImageError:  # perhaps of another picture: that is said when it is its turn
            rows = {key: rows[key]}
            made = self._extract([*rows.values()], lacking)
        return [self._keep(f"{each} None", one, before) for each, one, before in zip(rows, made, known, strict=False)][0]

    def _lacking(self, place: str, sources: Set[str]) -> Set[str]:
        return sources - self._memory[place].features.keys() if place in self._memory else sources

    def _keep(self, place: str, made: ImageFeatures, kept: ImageFeatures | None) -> ImageFeatures:
        """In memory, with what was known of it before; the oldest go."""
        if held := self._memory.pop(place, None):
            self._held -= held.nbytes
        if kept:
            made = replace(kept, features=kept.features | made.features, not_finite=kept.not_finite | made.not_finite)
        self._held += made.nbytes
        self._memory[place] = made
        while self._held > self.memory_bytes and len(self._memory) > 1:
            self._held -= self._memory.popitem(last=False)[1].nbytes
        return made

    def _checked(self, name: str, found: ImageFeatures) -> ImageFeatures:
        if lacking := sorted(found.not_finite):
            raise ModelError(f"image {name}: {', '.join(lacking[:3])} of {self.mlm.name} hold NaN or Inf in {self.mlm.dtype}; "
                             "load it in bfloat16 or float32")  # fmt: skip
        return found

    def shown(self, image: Image.Image) -> Image.Image:
        """A picture as the models are shown it."""
        return image

    def saliency(self, item: Item) -> torch.Tensor:
        """(N,) float32 attention of the last prompt token of "Describe the image.", scaled to 0..1 over the image's tokens (0 if constant)."""
        if (key := picture_key(image := open_image(item[1], item[0]))) not in self._saliency:
            layout, attention = prompt_saliency(self.mlm, self.shown(image))
            attention = attention[torch.from_numpy(image_tokens(layout))]
            low, high = attention.min(), attention.max()
            self._saliency[key] = (attention - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        return self._saliency[key]

    def _extract(self, rows: Sequence[Row], wanted: Set[str]) -> list[ImageFeatures]:
        """From the models, on their device; rounded and put in its place there."""
        try:
            states = in_halves(lambda some: self._read(some, wanted), rows)
        except MemoryLimitError:  # what is kept of other pictures may be what fills the memory
            if not self._memory:
                raise
            self._memory.clear()
            self._held = 0
            states = in_halves(lambda some: self._read(some, wanted), rows)
        return [self._rounded(image, *each, wanted) for (*_, image, _), each in zip(rows, states, strict=True)]

    def _rounded(self, image: Image.Image, whole: TokenLayout, found: dict[str, torch.Tensor], wanted: Set[str]) -> ImageFeatures:
        place = device = self.mlm.device
        if device.type == "cuda" and torch.cuda.memory_allocated(device) >= FULL * torch.cuda.get_device_properties(device).total_memory:
            place = torch.device("cpu")
        tokens, features, not_finite = image_tokens(whole), {}, set()
        layout, index = whole.select(tokens), torch.from_numpy(tokens)
        for source in (each for each in (*self.sources, *HEADS) if each in wanted):
            if source == "pixels":
                kept = pixel_features(layout, image).half()
            else:
                kept = _rows(found[source].half(), index)
                if not _finite(kept):
                    kept = _rows(found[source], index)
                if not _finite(kept):
                    not_finite.add(source)
                    kept = torch.zeros_like(kept, dtype=torch.float16)
            features[source] = kept.to(place)
        return ImageFeatures(layout, features, self.mlm.device, frozenset(not_finite))

    @torch.no_grad()
    def _read(self, rows: Sequence[Row], wanted: Set[str]) -> list[tuple[TokenLayout, dict[str, torch.Tensor]]]:
        """Layout, and the wanted sources of the models as they write them: (tokens, C), or (G, tokens, D) of a layer's heads."""
        names, keys, images, prefixes = map(list, zip(*rows, strict=True))
        families = {source.rpartition(".")[0] or source for source in wanted}
        shown = dict(zip(keys, zip(map(self.shown, images), names, strict=True), strict=True))  # behind another prefix, the tower sees the same
        if self._seen[0] != list(shown):
            self._seen = list(shown), prepare_images(self.mlm, *map(list, zip(*shown.values(), strict=True))), []
        _, vision, encoded = self._seen
        place = [list(shown).index(key) for key in keys]
        every = replace(vision, layouts=[vision.layouts[i] for i in place], grids=None if vision.grids is None else vision.grids[place])
        self._longest = max(map(len, every.layouts))
        found: list[dict[str, torch.Tensor]] = [{} for _ in rows]

        def capture(mlm: MLM, encoded: Sequence[list[torch.Tensor]], family: str, **what: bool) -> None:
            some = capture_prepared(mlm, every, prefixes, self.layers, encoded=tuple([each[i] for i in place] for each in encoded), **what)
            for one, into in zip(some, found, strict=True):
                into |= {"encoder": one.encoder, "projector": one.projector} if what["features"] else {}
                for kind, states in (("key", one.keys), ("value", one.values)):
                    into |= {f"{family}{kind}.{layer}": heads for layer, heads in zip(self.layers, () if states is None else states, strict=False)}

        own = {"keys": "key" in families, "values": "value" in families, "features": bool(families & {"encoder", "projector"})}
        if any(own.values()):
            encoded += [] if encoded else encode_images(self.mlm, vision)
            capture(self.mlm, encoded, "", **own)
        if "untrained.value" in families:
            capture(self.untrained, encode_images(self.untrained, vision), "untrained.", keys=False, values=True, features=False)
        for source in wanted & {"encoder_original", *HEADS}:
            about = {"head": source.startswith("head."), "own": source == "head.encoder"}
            states = encode_prepared(self.encoder_original, self.mlm, vision, [image for image, _ in shown.values()], **about)
            for into, i in zip(found, place, strict=True):
                into[source] = states[i]
        return [(layout, into) for layout, into in zip(every.layouts, found, strict=True)]


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(N, C) of the tokens of an index, compact, from (tokens, C) or (G, tokens, D)."""
    chosen = states.index_select(-2, index.to(states.device))
    return chosen if chosen.ndim == 2 else chosen.transpose(0, 1).flatten(1)


def _finite(tokens: torch.Tensor) -> bool:
    """Neither NaN, which `aminmax` passes on, nor infinite; 20 times faster than looking at the answer for each number."""
    return all(bool(torch.isfinite(each)) for each in tokens.aminmax())


def picture_key(image: Image.Image) -> str:
    """Name of a picture: of its pixels, whatever file or sample they come from."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()[:32]
