"""Scores of words on image tokens: each source in which an image token and a text have vectors in one space.

    value.l            image values of layer l . mean value of the text's tokens in a text-only forward
    untrained.value.l  the same in a model with random weights (control)
    lens.value.l       image values, repeated over their query group, through o_proj of layer l and final norm
                       . mean row of the language-model head over the text's tokens (a logit lens on values)
    projector          projector output . mean input embedding of the text's tokens
    encoder_original   each patch of SigLIP's last layer alone through its pooling head . SigLIP's text embedding, both of
                       unit length (MaskCLIP's trick)
    encoder            the same for the finetuned tower, with the head of encoder_original and the layers that it was cut by

All scores are dot products (paper, section 3.1; sources beyond value.l are ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, SiglipModel, SiglipTextModel

from kvutils.errors import ModelError, ParameterError
from kvutils.language import read_layers, resolve_layers
from kvutils.models import ENCODERS, MLM, Encoder
from kvutils.processors import quiet_transformers
from kvutils.prompts import pad, tokenize
from kvutils.readout.encoders import depth_read

# SigLIP learned captions, not bare names; a leading "the " of an expression gives way to it.
SIGLIP_TEMPLATE = "a {}"


@dataclass
class SiglipText:
    """The text tower that belongs to an `Encoder`."""

    model: SiglipTextModel
    tokenizer: Any
    name: str = "custom"
    template: str = SIGLIP_TEMPLATE

    @torch.no_grad()
    def embed(self, text: str) -> torch.Tensor:
        """(C,) unit-length embedding of a name or expression, padded to full length as SigLIP was trained."""
        caption = self.template.format(text.removeprefix("the "))
        length = self.model.config.max_position_embeddings
        tokens = self.tokenizer([caption], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids = tokens["input_ids"].to(self.model.device)
        return normalize(self.model(input_ids=ids).pooler_output[0].float(), dim=-1).cpu()


def load_siglip_text(name: str, device: str | torch.device = "cpu") -> SiglipText:
    """The text tower of a SigLIP (name in `ENCODERS`, folder or hub id); ModelError if it has none."""
    source = ENCODERS[name].source if name in ENCODERS else name
    try:
        with quiet_transformers():
            kind = AutoConfig.from_pretrained(source).model_type
            if kind != "siglip":
                raise ModelError(f"{name}: {source} is a {kind!r}, not a SigLIP pair of two towers")
            tokenizer = AutoTokenizer.from_pretrained(source)  # before the weights: it may need packages that are not there
            # Whole: for the text tower alone, every weight of the other would be reported as unexpected.
            model = SiglipModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True).text_model
    except ImportError as error:
        raise ModelError(f"{name}: the tokenizer of {source} needs the packages sentencepiece and protobuf (requirements.txt): "
                         f"pip install sentencepiece protobuf\n{str(error).strip().splitlines()[0]}") from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: no SigLIP text tower and tokenizer at {source}: {error}") from error
    return SiglipText(model.to(device).eval(), tokenizer, name)


@torch.no_grad()
def text_values(mlm: MLM, texts: Sequence[str], layers: str | int | Iterable[int] = "all", batch_size: int = 64,
                behind: Sequence[int] | None = None) -> torch.Tensor:  # fmt: skip
    """(len(texts), L, G, D) float32 on the CPU: the values of each text, averaged over its tokens.

    Every text is read without image or chat template: section 3.1 needs a vector in the space of the image values. It is
    read as it stands in a sentence, with a space before it, which byte-pair tokenizers make part of its first token.
    behind: tokens that are read before it and not averaged; default `start_tokens`."""
    for text in texts:
        if isinstance(texts, str) or not text.strip() or mlm.processor.image_token in text:
            raise ParameterError("texts must be a list of texts of at least one word each, without the image token; found "
                                 + repr(texts if isinstance(texts, str) else text))  # fmt: skip
    layers, before = resolve_layers(mlm, layers), list(start_tokens(mlm) if behind is None else behind)
    result = torch.empty(len(texts), len(layers), mlm.num_kv_heads, mlm.head_dim)
    for start in range(0, len(texts), batch_size):
        rows = [torch.tensor(before + words_of(mlm, text)) for text in texts[start : start + batch_size]]
        read = pad(mlm, rows)
        weight = read.attention_mask.float()
        weight[:, : len(before)] = 0
        weight = weight / weight.sum(1, keepdim=True)

        def store(position: int, _: torch.Tensor, values: torch.Tensor, start=start, weight=weight) -> None:
            mean = torch.einsum("bgtd,bt->bgd", values.float(), weight.to(values.device))
            result[start : start + len(mean), position] = mean.cpu()

        read_layers(mlm, mlm.model.get_input_embeddings()(read.input_ids), read, layers, store)
    return result


def start_tokens(mlm: MLM) -> list[int]:
    """The special token that the model's prompts begin with: Llama's first token, Qwen's `<|im_start|>`. Such models pile
    attention and huge activations on whatever stands there, a name of one token too. [] where prompts begin with words or an
    image, as the pocket models': they have no such token."""
    (first, *_), added = tokenize(mlm, mlm.prompt()), mlm.tokenizer.added_tokens_decoder
    return [first] if first != mlm.image_token_id and first in added and added[first].special else []


def words_of(mlm: MLM, text: str) -> list[int]:
    """Token ids of a text as it stands in a sentence."""
    return mlm.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]


class TextAlignment:
    """Text vectors and text scores of the sources above, for the layers of one extractor."""

    def __init__(self, mlm: MLM, layers: Sequence[int], untrained: MLM | None, encoder: Encoder | None,
                 encoder_text: SiglipText | None):  # fmt: skip
        if encoder_text is not None and encoder is None:
            raise ParameterError("encoder_text needs the encoder it belongs to: pass encoder_original as well")
        self.mlm, self.layers, self.untrained = mlm, tuple(layers), untrained
        self.encoder, self.encoder_text = encoder, encoder_text
        self.sources = []
        if encoder_text is not None:
            self.sources.append("encoder_original")
            # The finetuned tower can use the original head only if it is the same kind of tower.
            own = mlm.model.config.vision_config
            width = getattr(own, "hidden_size", None)
            if own.model_type == "siglip_vision_model" and width == encoder.model.config.hidden_size:
                self.sources.append("encoder")
        self.sources.append("projector")
        # A tower that is cut before the last layer (26 of 27 in LLaVA-OneVision) has no state that the head was trained on.
        self._cut = bool(encoder) and depth_read(encoder, mlm) < encoder.model.config.num_hidden_layers
        families = ["value", *(["untrained.value"] if untrained else []), "lens.value"]
        self.sources += [f"{family}.{layer}" for family in families for layer in self.layers]
        self._texts: dict[str, dict[str, torch.Tensor]] = {}

    def reads(self, source: str) -> str:
        """The feature source that the scores of a source are made of."""
        source = source.removeprefix("lens.")
        return f"head.{source}" if self._cut and source in ("encoder_original", "encoder") else source

    def text(self, text: str) -> dict[str, torch.Tensor]:
        """Vector (C,) float32 of the text in every source; read one at a time, so without batch effects."""
        if text not in self._texts:
            vectors = self._values("value", self.mlm, text)
            if self.untrained is not None:
                vectors |= self._values("untrained.value", self.untrained, text)
            ids = torch.tensor(words_of(self.mlm, text))
            tables = self.mlm.model.get_input_embeddings().weight, self.mlm.model.lm_head.weight
            vectors["projector"], lens = (rows[ids.to(rows.device)].float().mean(0).cpu().detach() for rows in tables)
            vectors |= {f"lens.value.{layer}": lens for layer in self.layers}
            if self.encoder_text is not None:
                vectors["encoder_original"] = vectors["encoder"] = self.encoder_text.embed(text)
            self._texts[text] = {source: vectors[source] for source in self.sources}
        return self._texts[text]

    @torch.no_grad()
    def scores(self, features: Mapping[str, torch.Tensor], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Per source the dot products (len(texts), N), float32, with plain features (N, C) of an image."""
        vectors = [self.text(text) for text in texts]
        scores = {}
        for source in self.sources:
            image = self._image_side(source, features)
            scores[source] = torch.stack([v[source] for v in vectors]).to(image.device) @ image.T
        return scores

    @torch.no_grad()
    def _image_side(self, source: str, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(N, C) float32 image vectors of a text-aligned source, from the plain features of an image."""
        if source.startswith("lens.value."):
            return self._lens(features[self.reads(source)], int(source.rsplit(".", 1)[1]))
        image = features[self.reads(source)].float()
        if not source.startswith("encoder"):
            return image
        # Each patch (N, C_v) alone through last norm and pooling head.
        model = self.encoder.model
        tower = getattr(model, "vision_model", model)
        patches = image.unsqueeze(1).to(model.device, model.dtype)
        return normalize(tower.head(tower.post_layernorm(patches)).float(), dim=-1).to(image.device)

    def _values(self, family: str, mlm: MLM, text: str) -> dict[str, torch.Tensor]:
        values = text_values(mlm, [text], layers=self.layers)[0]
        return {f"{family}.{layer}": value.flatten() for layer, value in zip(self.layers, values, strict=True)}

    def _lens(self, values: torch.Tensor, layer: int) -> torch.Tensor:
        """What values (N, G*D) add to the residual stream when attended to with full weight, normalised."""
        mlm, language_model = self.mlm, self.mlm.model.model.language_model
        output = language_model.layers[layer].self_attn.o_proj
        group = mlm.num_heads // mlm.num_kv_heads
        by_head = values.unflatten(-1, (mlm.num_kv_heads, mlm.head_dim)).repeat_interleave(group, dim=-2)
        states = output(by_head.flatten(-2).to(mlm.device, mlm.dtype))
        return language_model.norm(states).float().to(values.device)


def otsu(scores: np.ndarray | torch.Tensor) -> float:
    """Otsu's threshold (1979): the split of finite scores, of any shape, with the largest variance between classes.

    Exact over all splits, without a histogram. Foreground is `scores > threshold`; the threshold lies midway between the two
    scores at the split, and is the score itself when all are equal.
    """
    x = np.sort(np.asarray(scores.cpu() if isinstance(scores, torch.Tensor) else scores, dtype=float), axis=None)
    if x[0] == x[-1]:
        return float(x[0])
    lower = np.cumsum(x - x.mean())[:-1]  # centred, so the lower class's sum alone gives that variance
    count = np.arange(1, x.size)
    between = np.where(x[1:] > x[:-1], lower**2 / (count * (x.size - count)), -1.0)
    i = int(between.argmax())
    return float((x[i] + x[i + 1]) / 2)
