"""The language model, run on embeddings and only as far as needed; keys and values are read on the way.

A cached prompt prefix is continued by many questions at once without one copy of the cache per question. A row of the batch
is one prompt: its prefix (text and images) is cached once, and all its questions are appended to that row side by side. A
mask lets every token see the prefix and what is before it in its own question, nothing of the others, and positions continue
after the prefix for each question anew: each is computed as if it were alone."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, eager_attention_forward

from kvutils.checkpoints import QWEN
from kvutils.errors import ModelError, ParameterError
from kvutils.models import MLM, need_mlm
from kvutils.prompts import TextInputs, need_room

Store = Callable[[int, torch.Tensor, torch.Tensor], None]
GROUPED, EXACT = "kvutils_grouped_sdpa", "kvutils_float32_eager"  # of continuations of a model with "sdpa", and where weights are shown
# What the past is called in a forward: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(Qwen2Model.forward).parameters else "past_key_values"


def resolve_layers(mlm: MLM, layers: str | int | Iterable[int]) -> tuple[int, ...]:
    """Increasing layer numbers of "all", a number, or several; negative numbers count from the end."""
    need_mlm(mlm)
    wanted = range(mlm.num_layers) if isinstance(layers, str) and layers == "all" else layers.tolist() if isinstance(layers, np.ndarray | torch.Tensor) else layers
    wanted = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not -mlm.num_layers <= layer < mlm.num_layers:
            raise ParameterError(f"layer {layer!r} does not exist: {mlm.name} has layers 0..{mlm.num_layers - 1}, given as a number, a list of "
                                 'numbers or "all"')  # fmt: skip
    if not wanted:
        raise ParameterError('no layers asked for; pass "all" or at least one layer number')
    return tuple(sorted({int(layer) % mlm.num_layers for layer in wanted}))


def check_masks(mlm: MLM, layers: Iterable[int]) -> None:
    """ModelError unless the attention of these layers takes a mask of our own, another one for every head."""
    if mlm.attention not in ("sdpa", "eager", GROUPED, EXACT):
        raise ModelError(f"{mlm.attention} attention takes no mask per head, so keys cannot be blocked and questions not be kept "
                         'apart; load the model with attention="sdpa" or "eager"')  # fmt: skip
    for layer in layers:
        attention, text = mlm.model.model.language_model.layers[layer].self_attn, mlm.text_config
        every = None if getattr(text, "layer_types", None) else getattr(text, "sliding_window", None)  # Mistral's attention reads it there
        if getattr(attention, "sliding_window", every) is not None:
            raise ModelError(f"layer {layer} of {mlm.name} has sliding-window attention; only full attention is supported here")


def embed(mlm: MLM, ids: torch.Tensor, projected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Embeddings (B, T, C) of token ids (B, T), the projected tokens of their images in place of the image tokens, in order."""
    embeddings = mlm.model.get_input_embeddings()(ids)
    at_image = (ids == mlm.image_token_id).unsqueeze(-1).to(embeddings.device)
    return embeddings.masked_scatter(at_image, torch.cat(list(projected)).to(embeddings.device, embeddings.dtype))


class _LastLayerReached(Exception):
    """Ends a forward pass; never leaves this module."""


class _ReadingCache(DynamicCache):
    """Hands keys and values through unchanged, and shows those of the wanted layers to `store`."""

    def __init__(self, layers: Sequence[int], store: Store):
        super().__init__()
        self.wanted, self.store, self.shown = {layer: position for position, layer in enumerate(layers)}, store, 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx in self.wanted:
            self.store(self.wanted[layer_idx], key_states, value_states)
            self.shown += 1
        if layer_idx >= max(self.wanted):
            raise _LastLayerReached
        return key_states, value_states


def read_layers(mlm: MLM, embeddings: torch.Tensor, text: TextInputs, layers: Sequence[int], store: Store) -> None:
    """Run the language model on embeddings (B, T, C) up to the last of the layers; no head. store(position in `layers`, keys (B,
    G, T, D), values (B, G, T, D)) is called layer after layer. ModelError where the model does not use its cache."""
    language_model, cache = mlm.model.model.language_model, _ReadingCache(layers, store)
    with contextlib.suppress(_LastLayerReached):
        language_model(inputs_embeds=embeddings, attention_mask=text.attention_mask, position_ids=text.position_ids, use_cache=True, **{CACHE: cache})
    if cache.shown != len(cache.wanted):  # such as gradient checkpointing in a part that trains
        raise ModelError(f"{mlm.name} hands the keys and values of {cache.shown} of {len(cache.wanted)} layers to its cache; is all of it in evaluation mode?")
    # accelerate's hooks put offloaded weights away after a forward, which the modules left early missed.
    layer = language_model.layers[max(layers)]
    for module in (layer.self_attn, layer, language_model):
        if hook := getattr(module, "_hf_hook", None):
            hook.post_forward(module, None)


def _grouped_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_) -> tuple[torch.Tensor, None]:
    """The numbers of transformers' sdpa, which repeats keys, values and mask for every query head where there is a mask. Here they stand
    once for the query heads (B, H, S, D) of a KV head (B, G, T, D): the mask is (B, 1 or G, S, T), for all heads or one per KV head."""
    heads, each = key.shape[1], query.shape[1] // key.shape[1]
    key, value = (one.flatten(0, 1)[:, None].expand(-1, each, -1, -1) for one in (key, value))
    mask = attention_mask.expand(-1, heads, -1, -1).flatten(0, 1)[:, None]
    query = query.unflatten(1, (heads, each)).flatten(0, 1)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return found.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2), None


def _float32_eager(module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its weights (B, H, S, T) in float32. transformers' eager rounds products of queries and keys to the model's dtype
    before the softmax: Qwen2's key biases make them so large that in bfloat16 hardly a weight is right (transformers PR 33317)."""
    found, weights = eager_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, scaling)
    return found.to(value.dtype), weights


AttentionInterface.register(GROUPED, _grouped_sdpa)
AttentionInterface.register(EXACT, _float32_eager)
AttentionMaskInterface.register(EXACT, eager_mask)


@contextlib.contextmanager
def attention_by(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Inside, the layers of this configuration compute their attention by a function of `AttentionInterface`."""
    usual, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = usual


@dataclass(eq=False)
class Prefix:
    """The cache of B prompts up to their last image token, P tokens padded on the right. keys_values: per layer the keys and the
    values (B, G, P, D); mask (B, P) bool, False on padding; next_position (B,): the position of the first token after the
    prefix."""

    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor
    next_position: torch.Tensor


def prefill(mlm: MLM, embeddings: torch.Tensor, text: TextInputs) -> Prefix:
    """Read prefixes given as embeddings (B, P, C); the last layer stops at its keys and values."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    read_layers(mlm, embeddings, text, range(mlm.num_layers), lambda layer, keys, values: kept.append((keys, values)))
    mask = text.attention_mask.bool()
    return Prefix(kept, mask, text.position_ids.view(-1, *mask.shape).amax(0).masked_fill(~mask, 0).amax(-1) + 1)


class Continuation:
    """Texts after a `Prefix`, in any number of forward passes. Where texts of one row begin alike, each token is computed once: it sees the
    prefix and the tokens that lead to it. The prefix is neither changed nor copied. keep: layers whose inputs are kept for continuations
    that are `like` this one before their layer `start`. within: a context of the passes, such as `block_keys`."""

    def __init__(self, mlm: MLM, prefix: Prefix, keep: Iterable[int] = (), like: Continuation | None = None, start: int = 0,
                 within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext):  # fmt: skip
        self.mlm, self.prefix, self.keep, self.like, self.start, self.within = mlm, prefix, set(keep), like, start, within
        self.cache = DynamicCache()
        self.cache.layers = [_Behind(*each) for each in prefix.keys_values]
        self.columns: list[dict[tuple[int, int], int]] = [{} for _ in prefix.mask]  # of each row: column of the token before, id -> column
        self.ends: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # text -> row and column of its last token
        self.paths = np.zeros((len(self.columns), 0, 0), dtype=bool)  # (B, T, T): the columns that lead to each column, and itself
        self.states: dict[int, torch.Tensor] = {}  # (B, T, C) of all columns: what enters the layers of `keep`, and what leaves the last

    def extend(self, texts: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """(texts, C) the last hidden state of the last token of each text (row, ids): all ids behind the prefix, also those read before."""
        texts = [(row, tuple(ids)) for row, ids in texts]
        if fresh := [text for text in texts if text not in self.ends]:
            if self.like:
                self.like.extend(fresh)
            new: list[list[tuple[int, int, int]]] = [[] for _ in self.columns]  # id, column before, column in `like`
            first, like = self.paths.shape[1], self.like or self
            for row, ids in fresh:
                known, alike, column, other = self.columns[row], like.columns[row], -1, -1
                for token in ids:
                    before, column = column, known.get((column, token))
                    if column is None:
                        column = known[before, token] = first + len(new[row])
                        new[row].append((token, before, alike[other, token]))
                    other = alike[other, token]
                self.ends[row, ids] = row, column
            if any(new):
                self._read(new)
        states = self.states[self.mlm.num_layers]  # on the last of several GPUs, ids and masks on the first
        rows, columns = torch.tensor([self.ends[text] for text in texts], device=states.device).T
        return states[rows, columns]

    def _read(self, new: Sequence[Sequence[tuple[int, int, int]]]) -> None:
        """One pass over the new tokens of every row; shorter rows are padded on the right."""
        first, longest, device = self.paths.shape[1], max(map(len, new)), self.prefix.mask.device
        table = np.zeros((len(new), longest, 2), dtype=np.int64)  # id, column in `like`
        self.paths = np.pad(self.paths, ((0, 0), (0, longest), (0, longest)))
        for row, tokens in enumerate(new):
            for column, (token, before, other) in enumerate(tokens, first):
                if before >= 0:
                    self.paths[row, column] = self.paths[row, before]
                table[row, column - first] = token, other
                self.paths[row, column, column] = True
        (ids, others), seen = torch.from_numpy(table).to(device).unbind(-1), torch.from_numpy(self.paths[:, first:]).to(device)
        need_room(self.mlm, self.prefix.mask.shape[1] + int(self.paths[:, first:].sum(axis=-1).max()))
        positions = self.prefix.next_position[:, None] + (seen.sum(-1) - 1).clamp(min=0)  # padding leads nowhere
        seen = torch.cat([self.prefix.mask[:, None].expand(-1, longest, -1), seen], dim=-1).unsqueeze(1)  # (B, 1, S, T)
        if self.like:
            states = self.like.states[self.start]
            inputs = states[torch.arange(len(new), device=states.device)[:, None], others.to(states.device)]
            inputs = inputs / getattr(self.mlm.text_config, "embedding_multiplier", 1)  # by which Granite multiplies what it is given
        else:
            inputs = self.mlm.model.get_input_embeddings()(ids)
        # Of a bool mask sdpa would make this one in every layer anew.
        mask = torch.zeros_like(seen, dtype=inputs.dtype).masked_fill(~seen, torch.finfo(inputs.dtype).min)
        positions = positions.expand(3, -1, -1) if self.mlm.family == QWEN else positions
        layers = (language_model := self.mlm.model.model.language_model).layers
        with contextlib.ExitStack() as stack:
            if self.mlm.attention == "sdpa":  # another attention stays
                stack.enter_context(attention_by(self.mlm.text_config, GROUPED))
            stack.enter_context(self.within())
            for layer in self.keep:
                stack.callback(layers[layer].register_forward_pre_hook(lambda _, args, layer=layer: self._keep(layer, args[0])).remove)
            if self.start:  # the layers before it have nothing to add
                stack.callback(setattr, language_model, "layers", layers)
                language_model.layers = layers[self.start :]
            output = language_model(inputs_embeds=inputs, position_ids=positions, attention_mask=mask, use_cache=True, **{CACHE: self.cache})
        self._keep(self.mlm.num_layers, output.last_hidden_state)

    def _keep(self, layer: int, states: torch.Tensor) -> None:
        self.states[layer] = torch.cat([self.states[layer], states], dim=1) if layer in self.states else states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(texts, vocabulary) float32 of last hidden states (texts, C). ModelError where one is not finite: a NaN has a largest
        logit as well, and its token would pass for an answer."""
        if (logits := self.mlm.model.lm_head(hidden).float()).isfinite().all():
            return logits
        raise not_finite(self.mlm, f"logits that are not finite, first because of {self._first_not_finite()}")

    def _first_not_finite(self) -> str:
        """Where the first number came from that is not finite, as the cache shows it: a layer's input spoils its keys and values."""
        for number, layer in enumerate(self.cache.layers):
            keys, values = (not all(each.isfinite().all() for each in some) for some in zip(layer.prefix, (layer.keys, layer.values), strict=True))
            if keys and values:
                return f"the output of layer {number - 1}" if number else "the embeddings of text and images (vision tower or projector)"
            if keys or values:
                return f"the {'keys' if keys else 'values'} of layer {number}"
        return f"the output of layer {self.mlm.num_layers - 1}, the last, or of the output head"


class _Behind(DynamicLayer):
    """A layer's keys and values (B, G, T, D) behind those of a prefix that others share, with which each pass puts them together."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.prefix, self.keys, self.values = (keys, values), keys[:, :, :0], values[:, :, :0]

    def update(self, key_states, value_states, *args, **kwargs):
        return tuple(torch.cat(each, dim=-2) for each in zip(self.prefix, super().update(key_states, value_states), strict=True))

    def get_seq_length(self) -> int:
        return self.prefix[0].shape[-2] + self.keys.shape[-2]


def not_finite(mlm: MLM, what: str) -> ModelError:
    """The error for numbers of a model that are NaN or infinite; raise it."""
    return ModelError(f"{mlm.name} in {str(mlm.dtype).removeprefix('torch.')} has {what}. Load it with dtype=\"bfloat16\" or "
                      "\"float32\" (float16 ends at 65,504); if that is what it has, its weights are damaged: fetch the checkpoint again.")

