"""One model and one picture, read once: every number that a panel of the explorer shows, as arrays over all N image tokens.

Features are read at the first call and kept as the model wrote them; what is made of them (centred tokens, colours, attention) is kept
up to `KEPT` results. `free` gives the memory back, but for the texts of questions; the next call reads the picture again."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, count
from string import punctuation
from typing import Any

import numpy as np
import torch

from kvutils.answer import Answer, ImageSession, spellings
from kvutils.errors import ModelError, ParameterError, at_least, one_of
from kvutils.images import ImageLike, open_image
from kvutils.keys import KeySelection, key_variance, select_region
from kvutils.kvcache import Capture, capture_prepared
from kvutils.language import check_masks, not_finite, resolve_layers
from kvutils.layout import TokenLayout, check_points
from kvutils.prompts import PromptTokens
from kvutils.readout.attention import token_attention
from kvutils.readout.encoders import encode_prepared
from kvutils.readout.features import FeatureExtractor, image_tokens, pixel_features
from kvutils.readout.maps import directions, pca_colours
from kvutils.readout.selections import select_lowest, select_random, variance_threshold
from kvutils.readout.words import words_of
from kvutils.vision import VisionInputs, prepare_images

LABELS = {"pixels": "pixels", "encoder_original": "SigLIP", "encoder": "vision tower", "projector": "projector", "key": "keys", "value": "values"}
LAYERED = ("key", "value")
KEPT = 24  # results: of 2,929 tokens and 512 channels about 150 MB
QUESTIONS = 100  # asked last, whose attention can be shown: views of one panel have questions of their own
_NUMBERS = count(1)  # of questions; none comes twice, also not for another picture
SHOWN = 1024  # pixels of the longer side of the picture that is shown


class Panel:
    """extractor: the model, its layers and the towers beside it. picture: a path or `PIL.Image`. name: of the picture, in messages.
    context: other pictures, over which the variance of keys is taken, brought to the size of this one as notebook 03 does. point: x, y in
    pixels that is marked at first (default: the middle)."""

    def __init__(self, extractor: FeatureExtractor, picture: ImageLike, name: str = "picture", context: Sequence[ImageLike] = (),
                 point: Sequence[float] | None = None):  # fmt: skip
        self.extractor, self.mlm, self.given, self.name, self.context = extractor, extractor.mlm, picture, name, context
        self.picture = open_image(picture, name)
        point = np.array(self.picture.size) / 2 if point is None else point
        if np.size(point) != 2:
            raise ParameterError(f"point: expected x, y in pixels, found {point}")
        (self.point,) = check_points(np.reshape(point, (1, 2)), self.picture.size, "point").tolist()
        self.small = self.picture.reduce(max(1, max(self.picture.size) // SHOWN))  # a whole number of pixels first, which is fast
        self.small.thumbnail((SHOWN, SHOWN))
        self._sessions: dict[str | None, ImageSession] = {}
        self._asked: dict[int, dict] = {}  # number -> what was asked and how, `ids` of its tokens and of the answer's
        self.free()

    def free(self) -> None:
        """Give back what was read, the cached prompts included."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._kept: OrderedDict[tuple, Any] = OrderedDict()
        self._read: tuple[VisionInputs, Capture] | None = None
        self._variance: torch.Tensor | None = None

    def _keep(self, key: tuple, make: Callable[[], Any]) -> Any:
        """A result made before, or now; the least recently used goes first."""
        self._kept[key] = self._kept.pop(key) if key in self._kept else make()
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def read(self) -> tuple[VisionInputs, Capture]:
        """The prepared pixels, and all layers of the extractor on the model's device."""
        if self._read is None:
            vision = prepare_images(self.mlm, [self.picture], [self.name])
            self._read = vision, capture_prepared(self.mlm, vision, None, self.extractor.layers)[0]
        return self._read

    @property
    def layout(self) -> TokenLayout:
        return self.read()[1].layout

    @property
    def real(self) -> np.ndarray:
        """(N,) bool: no newlines."""
        return ~self.layout.is_newline

    @property
    def sources(self) -> list[str]:
        return [source for source in LABELS if source != "encoder_original" or self.extractor.encoder_original]

    @property
    def readable(self) -> list[str]:
        """Sources with a text side."""
        known = self.extractor.alignment.sources
        return [source for source in self.sources if source in known or f"{source}.{self.extractor.layers[0]}" in known]

    def describe(self) -> dict:
        """Sizes and sources, JSON-able. can_ask: the model's attention takes masks, without which no question follows a cached picture."""
        try:
            check_masks(self.mlm, range(self.mlm.num_layers))
            able = True
        except ModelError:
            able = False
        more = {"layers": list(self.extractor.layers), "heads": self.mlm.num_kv_heads}
        sources = [{"name": each, "label": LABELS[each], "text": each in self.readable} | (more if each in LAYERED else dict.fromkeys(more)) for each in self.sources]
        width, height = self.picture.size
        return {"model": f"{self.mlm.name} ({self.mlm.revision})", "width": width, "height": height, "point": self.point, "tokens": len(self.layout),
                "sources": sources, "heads": self.mlm.num_heads, "layers": self.mlm.num_layers, "interventions": able, "can_ask": able, "context": len(self.context) > 1}  # fmt: skip

    def tokens(self, source: str, layer: int | None = None, head: int | None = None) -> torch.Tensor:
        """(N, C) features as the model wrote them, newlines included; zeros there for pixels and towers. Raises ParameterError."""
        one_of("source", source, self.sources)
        if source in LAYERED:
            one_of(f"layer of the {LABELS[source]}", layer, self.extractor.layers)
            if head is not None:
                one_of("key-value head", head, range(self.mlm.num_kv_heads))
            return getattr(self.read()[1], source)(layer, head)
        if source == "pixels":
            return self._keep((source,), self._pixels)
        return self._tower(source) if source == "encoder_original" else getattr(self.read()[1], source)

    def _tower(self, source: str) -> torch.Tensor:
        """(N, C) of `encoder_original`, or of one of the towers after its last layer ("head.")."""
        about = {"head": source.startswith("head."), "own": source == "head.encoder"}
        return self._keep((source,), lambda: encode_prepared(self.extractor.encoder_original, self.mlm, self.read()[0], [self.picture], **about)[0])

    def _pixels(self) -> torch.Tensor:
        """Colours and places, of the picture as it is shown: sums over 12 megapixels would take seconds."""
        features, layout = torch.zeros(len(self.layout), 5), self.layout.select(self.real)
        layout = replace(layout, rects=layout.rects * np.tile(np.divide(self.small.size, self.picture.size), 2), image_size=self.small.size)
        features[torch.from_numpy(self.real)] = pixel_features(layout, self.small).float()
        return features

    def directions(self, source: str, layer: int | None = None, head: int | None = None) -> torch.Tensor:
        """(N, C) centred tokens of unit length; the mean is that of the finest view, which the tasks read. Raises ModelError for NaN."""
        def make() -> torch.Tensor:
            if not (tokens := self.tokens(source, layer, head)).isfinite().all():
                raise not_finite(self.mlm, f"{LABELS[source]} of this picture that are not finite{'' if layer is None else f' in layer {layer}'}")
            return directions(tokens, torch.from_numpy(image_tokens(self.layout)).to(tokens.device))

        return self._keep(("directions", source, layer, head), make)

    def token(self, number: object) -> int:
        """A token's number, checked; newlines show nothing of the picture."""
        at_least("a token", number, 0)
        if number >= len(self.layout) or self.layout.is_newline[number]:
            raise ParameterError(f"token {number} has no place in {self.name}, whose image tokens are 0..{len(self.layout) - 1} but for newlines")
        return int(number)

    def same_place(self, other: "Panel", token: int) -> int:
        """The token here that shows the place of another panel's token: of the finest view, or of the base view as that one is."""
        place = other.layout.centers[token] * np.divide(self.picture.size, other.picture.size)
        coarse = None if token in other.layout.spatial() else "base"
        return token if other is self else int(self.layout.token_at(place[None], coarse)[0])

    def similar(self, vector: torch.Tensor, source: str, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """(N,) float32 cosine of every token to a row of `directions`; NaN for newlines."""
        return np.where(self.real, (self.directions(source, layer, head) @ vector).cpu().numpy(), np.nan)

    def words(self, text: str, source: str, layer: int | None = None) -> np.ndarray:
        """(N,) float32 dot product with the centred vector of a text, as `readout.words`; NaN for newlines. Raises ParameterError."""
        alignment, name = self.extractor.alignment, source if layer is None else f"{source}.{layer}"
        tokens = self.tokens(source, layer)
        if not isinstance(text, str) or not text.strip():
            raise ParameterError(f"expected a word or an expression to look for, not {text!r}")
        if name not in alignment.sources:
            able = [LABELS[each] for each in self.readable]
            raise ParameterError(f"words cannot be looked for in the {LABELS[source]}, which have no text side; choose {' or '.join(able)}")
        read = alignment.reads(name)
        features = {read: self._tower(read) if read.startswith("head.") else tokens}
        return np.where(self.real, alignment.scores(features, [text.strip()], [name])[name][0].cpu().numpy(), np.nan)

    def session(self, prefix: str | None = None) -> ImageSession:
        """The picture read behind a prefix; the one without and the newest with a prefix are kept."""
        if prefix not in self._sessions:
            for other in [each for each in self._sessions if each is not None and prefix is not None]:
                self._sessions.pop(other).close()
            self._sessions[prefix] = ImageSession(self.mlm, self.picture, prefix, self.read()[0])
        return self._sessions[prefix]

    def ask(self, question: str, options: Sequence[str] | None = None, prefix: str | None = None, block: Mapping | None = None) -> dict:
        """The answer, and the probability that it begins with each option, in any of its `spellings`. block: parameters of a `selection`.
        `before`: the same without block and prefix where there is one of them; `asked`: the question's number, for `attention`; `unknown`: words
        that the model has no token for. Raises ParameterError, also where one answer could begin with two options and would count for
        both, and what `ImageSession` raises."""
        texts = isinstance(options, list | tuple) and all(isinstance(each, str) for each in options) and len(set(options)) == len(options)
        if options is not None and not texts:
            raise ParameterError(f"options must be a list of different texts, or none for a free answer, not {options!r}")
        choices = None if options is None else {option: spellings(option) for option in options}
        for (one, first), (other, second) in combinations(PromptTokens(self.mlm).options(choices).items() if choices is not None else (), 2):
            if any(a[: len(b)] == b[: len(a)] for a in first for b in second):
                raise ParameterError(f"an answer that begins with {one!r} may also begin with {other!r} and would count for both; leave one out")
        prefix, selection = (prefix or "").strip() or None, self.selection(block) if block else None

        def one(prefix: str | None, block: KeySelection | None) -> tuple[Answer, dict]:
            began = time.perf_counter()
            answer = self.session(prefix).choose([question], choices, block=block)[0]
            found = {option: float(np.exp(score)) for option, score in answer.scores.items()}
            said = answer.text or f"(no answer: {'only special tokens' if answer.tokens else 'the model ends at once'})"
            return answer, {"answer": said, "probabilities": found, "rest": max(0.0, 1 - answer.mass) if found else None,
                            "seconds": round(time.perf_counter() - began, 3)}  # fmt: skip

        before = one(None, None)[1] if prefix or block else None
        answer, found = one(prefix, selection)
        behind = self.session(prefix).tokens.tail(question, 1)
        ids = [*behind, *answer.tokens]
        self._asked[number := next(_NUMBERS)] = {"question": question, "options": options, "prefix": prefix, "block": block, "ids": ids}
        if len(self._asked) > QUESTIONS:
            del self._asked[next(iter(self._asked))]
        words = [{"index": i, "text": self.mlm.tokenizer.decode([each]), "answer": i >= len(behind)} for i, each in enumerate(ids)]
        lacking = [word.strip(punctuation) or word for word in f"{prefix or ''} {question}".split()
                   if self.mlm.tokenizer.unk_token_id in words_of(self.mlm, word)]  # fmt: skip
        return found | {"asked": number, "words": words, "unknown": list(dict.fromkeys(lacking)), "before": before}

    def question(self, number: int | None) -> dict:
        """What was asked under a number of `ask`. ParameterError for none, and for one of another picture or long ago."""
        if number not in self._asked:
            raise ParameterError("ask a question first: attention is that of its words and of the answer's" if number is None else
                                 "this question is no longer held; ask it again")  # fmt: skip
        return self._asked[number]

    def attention(self, number: int | None, word: int, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """(N,) float32 weights of a word of a question (its number) or its answer on the image tokens, under its block; None: the mean
        over layers or query heads. ParameterError as `question`."""
        asked = self.question(number)
        one_of("word of the question and its answer", word, range(len(asked["ids"])))
        for what, chosen, most in (("layer", layer, self.mlm.num_layers), ("query head", head, self.mlm.num_heads)):
            if chosen is not None:
                one_of(what, chosen, range(most))
        weights = self._keep(("attention", number, word), lambda: token_attention(
            self.session(asked["prefix"]), asked["ids"][: word + 1], self.selection(asked["block"]) if asked["block"] else None))  # fmt: skip
        weights = weights.mean(0) if layer is None else weights[layer]
        return (weights.mean(0) if head is None else weights[head]).numpy()

    @property
    def variance(self) -> torch.Tensor:
        """(L, G, N) float64 variance of the keys over the context. ParameterError where there are not two pictures."""
        if len(self.context) < 2:
            raise ParameterError("which keys are input-agnostic or vary least shows over other pictures: pass at least two, better a hundred, as "
                                 "kv.explore(..., context=[...])")  # fmt: skip
        if self._variance is None:
            pictures = (open_image(one, f"context[{i}]").resize(self.picture.size) for i, one in enumerate(self.context))
            self._variance = key_variance(self.mlm, pictures).result.cpu()
        return self._variance

    def selection(self, asked: Mapping) -> KeySelection:
        """Image keys by the parameters of a selection: layers and key-value heads (None: all), and kind

        agnostic  below the model's threshold of variance (`variance_threshold`)
        lowest    share: of each layer's keys, those that vary least
        random    share: of each layer's and head's keys; seed
        region    tokens: their numbers, or box: x0, y0, x1, y1 in pixels as `select_region`

        Raises ParameterError, also for a selection without a key."""
        kind, share, real = asked.get("kind"), asked.get("share"), torch.from_numpy(self.real)
        one_of("kind of selection", kind, ("agnostic", "lowest", "random", "region"))
        layers = resolve_layers(self.mlm, "all" if asked.get("layers") is None else asked["layers"])
        heads = list(range(self.mlm.num_kv_heads) if asked.get("heads") is None else asked["heads"])
        for head in heads:
            one_of("key-value head", head, range(self.mlm.num_kv_heads))
        if kind in ("lowest", "random") and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise ParameterError(f"share must be a number above 0 and at most 1, not {share!r}")
        found = torch.zeros(len(layers), self.mlm.num_kv_heads, len(real), dtype=torch.bool)
        if kind == "agnostic":
            found = ((self.variance < variance_threshold(self.variance[..., real], self.mlm.name)["value"]) & real)[list(layers)]
        elif kind == "lowest":
            found = select_lowest(self.variance, real, share, layers).mask
        elif kind == "random":
            at_least("seed", asked.get("seed"), 0)
            found[..., : max(1, round(share * int(real.sum())))] = True  # only their number counts
            found = select_random(KeySelection(kind, found, layers), real, asked["seed"]).mask
        elif asked.get("box") is not None:
            found = select_region(self.mlm, self.layout, asked["box"], layers).mask
        else:
            found[..., [self.token(each) for each in asked.get("tokens") or ()]] = True
        found[:, [head for head in range(self.mlm.num_kv_heads) if head not in heads]] = False
        if not found.any():
            raise ParameterError("no key is chosen: paint or box a region, or take a larger share, more layers or heads")
        return KeySelection(kind, found, layers)


def colours(panels: Sequence[Panel], source: str, layer: int | None = None, head: int | None = None) -> list[np.ndarray]:
    """Per panel (N, 3) uint8: principal components of the tokens of all these panels together, which need one model; 0 for newlines."""
    tokens = [panel.tokens(source, layer, head)[torch.from_numpy(panel.real)].float().cpu().numpy() for panel in panels]
    few = min(sum(map(len, tokens)), tokens[0].shape[1])
    if few < 3 or not all(np.isfinite(each).all() for each in tokens):
        raise ParameterError(f"three components need three finite channels of three tokens, found {few} in the {LABELS[source]}")
    found = [np.zeros((len(panel.real), 3), np.uint8) for panel in panels]
    for panel, row, each in zip(panels, found, pca_colours(tokens, "arpack" if few > 3 else "full"), strict=True):
        row[panel.real] = each
    return found
