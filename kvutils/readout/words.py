"""Scores of words on image tokens: each source in which an image token and a text have vectors in one space.

    value.l            image values of layer l . mean value of the text's tokens in a text-only forward
    untrained.value.l  the same in a model with random weights (control)
    lens.value.l       image values, repeated over their query group, through o_proj of layer l and final norm
                       . mean row of the language-model head over the text's tokens (a logit lens on values)
    projector          projector output . mean input embedding of the text's tokens
    encoder_original   each patch of SigLIP's last layer alone through its pooling head . SigLIP's text embedding, both of
                       unit length (MaskCLIP's trick)
    encoder            the same for the finetuned tower, with the head of encoder_original and the layers that it was cut by

    uncentred....      value.l and the last three by the plain text vector, beside

All scores are dot products (paper, section 3.1; sources beyond value.l are ours). Text vectors are centred (ours): from each the mean
over a fixed vocabulary of names is subtracted, per source and layer; the names are read behind the article that the text begins with,
whose value would else be in every expression and in no name. Vectors of different texts share most of their direction (anisotropy:
Ethayarajh, EMNLP 2019, and, with the same remedy, Mu & Viswanath, ICLR 2018); that part lays the same map under every text, and its size,
which differs between layers, would be read as what a layer knows. A constant added to all text vectors changes no centred score, and
centring adds one number per token to the scores of all class names, so that their argmax stays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, SiglipModel, SiglipTextModel

from kvutils import data_folder
from kvutils.checkpoints import ENCODERS, find_model
from kvutils.errors import ModelError, ParameterError, at_least
from kvutils.language import not_finite, read_layers, resolve_layers
from kvutils.models import MLM, Encoder
from kvutils.processors import quiet_transformers
from kvutils.prompts import pad, tokenize
from kvutils.readout.encoders import depth_read

# SigLIP learned captions, not bare names; a leading "the " of an expression gives way to it.
SIGLIP_TEMPLATE = "a {}"
ARTICLES = ("the", "a", "an")
UNCENTRED = "uncentred."  # prefix of the sources whose text vectors are as they are
# Vocabularies of names, whatever data are scored: COCO's 80, and, for a model with a closed vocabulary of words, those of the pocket world.
COCO_NAMES = tuple(name for name in (data_folder() / "coco_names.txt").read_text(encoding="utf-8").splitlines() if name != "-")
POCKET_NAMES = ("fish", "bird", "car", "boat", "tree", "house", "cup", "flag")


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
        return normalize(self.model(input_ids=tokens["input_ids"].to(self.model.device)).pooler_output[0].float(), dim=-1).cpu()


def load_siglip_text(name: str, device: str | torch.device = "cpu") -> SiglipText:
    """The text tower of a SigLIP (name in `ENCODERS`, folder or hub id); ModelError if it has none."""
    source, at = (spec := find_model(name, ENCODERS)).source, {"revision": spec.revision}
    try:
        with quiet_transformers():
            if (kind := AutoConfig.from_pretrained(source, **at).model_type) != "siglip":
                raise ModelError(f"{name}: {source} is a {kind!r}, not a SigLIP pair of two towers")
            tokenizer = AutoTokenizer.from_pretrained(source, **at)  # before the weights: it may need packages that are not there
            # Whole: for the text tower alone, every weight of the other would be reported as unexpected.
            model = SiglipModel.from_pretrained(source, **at, dtype=torch.float32, use_safetensors=True).text_model
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
    behind: tokens that are read before it and not averaged; default `start_tokens`. Raises ParameterError, and ModelError where values
    are not finite.

    >>> kv.text_values(mlm, ["the tree", "red car"]).shape     # (texts, L, G, D)
    torch.Size([2, 12, 2, 16])
    """
    at_least("batch_size", batch_size)
    texts = check_texts(mlm, texts)
    layers, before = resolve_layers(mlm, layers), list(start_tokens(mlm) if behind is None else behind)
    result = torch.empty(len(texts), len(layers), mlm.num_kv_heads, mlm.head_dim)
    for start in range(0, len(texts), batch_size):
        read = pad(mlm, [torch.tensor(before + words_of(mlm, text)) for text in texts[start : start + batch_size]])
        weight = read.attention_mask.float()
        weight[:, : len(before)] = 0
        weight = weight / weight.sum(1, keepdim=True)

        def store(position: int, _: torch.Tensor, values: torch.Tensor, start=start, weight=weight) -> None:
            mean = torch.einsum("bgtd,bt->bgd", values.float(), weight.to(values.device))
            result[start : start + len(mean), position] = mean.cpu()

        read_layers(mlm, mlm.model.get_input_embeddings()(read.input_ids), read, layers, store)
    if len(broken := (~result.isfinite()).any(-1).any(-1).nonzero()):  # (text, layer): scores with NaN would pass for a map
        first = broken[broken[:, 1].argmin()].tolist()
        raise not_finite(mlm, f"values of the text {texts[first[0]]!r} that are not finite in layer {layers[first[1]]}, the first of them")
    return result


def check_texts(mlm: MLM, texts: Iterable[str]) -> list[str]:
    """The texts as a list; ParameterError for a single one, for none, and for one without a word or with the image token."""
    found = [None] if isinstance(texts, str) else list(texts) or [""]
    for text in found:
        if not isinstance(text, str) or not text.strip() or mlm.processor.image_token in text:
            said = repr(texts if text is None else text)
            raise ParameterError(f"texts must be a list of texts of at least one word each, without the image token; found {said}")
    return found


def start_tokens(mlm: MLM) -> list[int]:
    """The special token that the model's prompts begin with: Llama's first token, Qwen's `<|im_start|>`. Such models pile
    attention and huge activations on whatever stands there, a name of one token too. [] where prompts begin with words or an
    image: such models have no such token."""
    (first, *_), added = tokenize(mlm, mlm.prompt()), mlm.tokenizer.added_tokens_decoder
    return [first] if first != mlm.image_token_id and first in added and added[first].special else []


def words_of(mlm: MLM, text: str) -> list[int]:
    """Token ids of a text as it stands in a sentence."""
    return mlm.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]


def vocabulary_of(mlm: MLM) -> tuple[str, ...]:
    """The names whose mean vector is subtracted: `COCO_NAMES`, or, where the tokenizer lacks some, those of `POCKET_NAMES` it knows. One
    that it can only spell, in pieces of fewer than two letters on average, it does not know."""
    pieces = {name: words_of(mlm, name) for name in (*COCO_NAMES, *POCKET_NAMES)}
    known = {name for name, ids in pieces.items() if mlm.tokenizer.unk_token_id not in ids and 2 * len(ids) <= len(name.replace(" ", ""))}
    return COCO_NAMES if known.issuperset(COCO_NAMES) else tuple(name for name in POCKET_NAMES if name in known)


class TextAlignment:
    """Text vectors and text scores of the sources above, for the layers of one extractor. vocabulary: names whose mean vector is
    subtracted from each; default `vocabulary_of`."""

    def __init__(self, mlm: MLM, layers: Sequence[int], untrained: MLM | None, encoder: Encoder | None,
                 encoder_text: SiglipText | None, vocabulary: Sequence[str] | None = None):  # fmt: skip
        if encoder_text is not None and encoder is None:
            raise ParameterError("encoder_text needs the encoder it belongs to: pass encoder_original as well")
        self.mlm, self.layers, self.untrained = mlm, tuple(layers), untrained
        self.encoder, self.encoder_text = encoder, encoder_text
        self.vocabulary = vocabulary_of(mlm) if vocabulary is None else tuple(check_texts(mlm, vocabulary))
        self.sources = []
        if encoder_text is not None:
            self.sources.append("encoder_original")
            # The finetuned tower can use the original head only if it is the same kind of tower.
            own = mlm.model.config.vision_config
            if own.model_type == "siglip_vision_model" and own.hidden_size == encoder.model.config.hidden_size:
                self.sources.append("encoder")
        self.sources.append("projector")
        # A tower that is cut before the last layer (26 of 27 in LLaVA-OneVision) has no state that the head was trained on.
        self._cut = bool(encoder) and depth_read(encoder, mlm) < encoder.model.config.num_hidden_layers
        families = ["value", *(["untrained.value"] if untrained else []), "lens.value"]
        plain = [*self.sources, *(f"value.{layer}" for layer in self.layers)]
        self.sources += [*(f"{family}.{layer}" for family in families for layer in self.layers), *(UNCENTRED + source for source in plain)]
        self._texts: dict[str, dict[str, torch.Tensor]] = {}
        self._means: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}  # over the names that texts are like
        self._image: tuple[Any, dict[str, torch.Tensor]] = None, {}  # features of the image before, and what was made of them
        self._roots: dict[int, torch.Tensor] = {}

    def reads(self, source: str) -> str:
        """The feature source that the scores of a source are made of."""
        source = source.removeprefix(UNCENTRED).removeprefix("lens.")
        return f"head.{source}" if self._cut and source in ("encoder_original", "encoder") else source

    def names_like(self, text: str) -> tuple[str, ...]:
        """The names whose mean vector is subtracted from that of a text. ParameterError where they are fewer than two, no vocabulary."""
        if len(self.vocabulary) < 2:
            raise ParameterError(f"text vectors are centred over names that the model knows, found {list(self.vocabulary)} for "
                                 f"{self.mlm.name}; pass vocabulary=[...], at least two names, to FeatureExtractor")  # fmt: skip
        first, *rest = text.lower().split()
        return tuple(f"{first} {name}" for name in self.vocabulary) if rest and first in ARTICLES else self.vocabulary

    def text(self, text: str) -> dict[str, torch.Tensor]:
        """Vector (C,) float32 of the text in every source, centred or, in `uncentred.` ones, as it is; read one at a time, so without
        batch effects. ParameterError as `names_like` and `text_values`."""
        if text not in self._texts:
            check_texts(self.mlm, [text])
            names, plain = self.names_like(text), self._plain([text])
            mean = self._means[names] = self._means[names] if names in self._means else self._plain(names)
            made = {source: vector - mean[source] for source, vector in plain.items()}
            made |= {UNCENTRED + source: vector for source, vector in plain.items()}
            self._texts[text] = {source: made[source] for source in self.sources}
        return self._texts[text]

    @torch.no_grad()
    def _plain(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Vector in every source as it is, of one text, or the mean over several."""
        vectors = {}
        for family, mlm in {"value": self.mlm, **({"untrained.value": self.untrained} if self.untrained else {})}.items():
            values = text_values(mlm, texts, layers=self.layers).mean(0).flatten(1)
            vectors |= {f"{family}.{layer}": value for layer, value in zip(self.layers, values, strict=True)}
        ids = [torch.tensor(words_of(self.mlm, text)) for text in texts]
        vectors["projector"], lens = (_mean_row(table, ids) for table in (self.mlm.model.get_input_embeddings(), self.mlm.model.lm_head))
        with align_module_device(norm := self.mlm.model.model.language_model.norm):
            seen = norm.weight.float().cpu() * lens  # g * t, see `_lens_scale`
        for layer in self.layers:
            output = self._summed_output(layer)
            vectors[f"lens.value.{layer}"] = (output.T @ seen.to(output.device)).cpu()
        if self.encoder_text is not None:
            vectors["encoder_original"] = vectors["encoder"] = torch.stack([self.encoder_text.embed(text) for text in texts]).mean(0)
        return vectors

    @torch.no_grad()
    def scores(self, features: Mapping[str, torch.Tensor], texts: Sequence[str], sources: Sequence[str] | None = None
               ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Per source (default all) the dot products (len(texts), N), float32 on the model's device, with plain features (N, C) of an image.

        What follows from the image alone is made once as long as the same `features` are asked about, text after text."""
        if features is not self._image[0]:
            self._image = features, {}
        vectors, made = [self.text(text) for text in check_texts(self.mlm, texts)], self._image[1]
        scores = {}
        for source in self.sources if sources is None else sources:
            texts_here = torch.stack([v[source] for v in vectors]).to(self.mlm.device)
            image, plain = features[self.reads(source)].to(self.mlm.device).float(), source.removeprefix(UNCENTRED)
            if plain.startswith("encoder"):
                image = made[plain] = made[plain] if plain in made else self._pooled(image)
            scores[source] = texts_here @ image.T
            if source.startswith("lens."):
                made[source] = made[source] if source in made else self._lens_scale(image, int(source.rsplit(".", 1)[1]))
                scores[source] *= made[source]
        return scores

    def _pooled(self, image: torch.Tensor) -> torch.Tensor:
        """Each patch (N, C_v) alone through last norm and pooling head; of unit length."""
        model = self.encoder.model
        tower = getattr(model, "vision_model", model)
        patches = image.unsqueeze(1).to(model.device, model.dtype)
        return normalize(tower.head(tower.post_layernorm(patches)).float(), dim=-1).to(image.device)

    # What values v (N, G*D) add to the residual stream when attended to with full weight is x = W v, where W sums the output
    # projection over the query heads that share a value; its final norm is x / rms(x) * g. A text's row t of the head then scores
    # v . W' (g * t) / rms(x), and |x| = |R v| for the root R of W'W: both in the width of the values, in float32.
    def _lens_scale(self, values: torch.Tensor, layer: int) -> torch.Tensor:
        """(N,) 1 / rms(x) of values (N, G*D)."""
        if layer not in self._roots:
            self._roots[layer] = torch.linalg.qr(self._summed_output(layer), mode="r").R.T.contiguous()
        norm = self.mlm.model.model.language_model.norm
        width = norm.weight.numel()
        return ((values @ self._roots[layer].to(values.device)).square().sum(-1) / width + norm.variance_epsilon).rsqrt()

    def _summed_output(self, layer: int) -> torch.Tensor:
        """W (C_h, G*D) float32; the output projections of the three families have no bias."""
        mlm = self.mlm
        with align_module_device(module := mlm.model.model.language_model.layers[layer].self_attn.o_proj):  # offloaded weights are nowhere
            return module.weight.float().unflatten(1, (mlm.num_kv_heads, -1, mlm.head_dim)).sum(2).flatten(1)


def _mean_row(table: torch.nn.Module, ids: Sequence[torch.Tensor]) -> torch.Tensor:
    """(C_h,) float32 on the CPU: of the rows of a module's weights the mean of each text, and of all texts."""
    with align_module_device(table):
        return torch.stack([table.weight[each.to(table.weight.device)].float().mean(0) for each in ids]).mean(0).cpu()
