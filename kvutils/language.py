"""The language model, run on embeddings and only as far as needed; keys and values are read on the way.

A cached prompt prefix is continued by many questions at once without one copy of the cache per question. A row of the batch
is one prompt: its prefix (text and images) is cached once, and all its questions are appended to that row side by side. A
mask lets every token see the prefix and its own question, nothing of the others, and positions continue after the prefix
for each question anew: each is computed as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvutils.checkpoints import QWEN
from kvutils.errors import ModelError, ParameterError
from kvutils.models import MLM, need_mlm
from kvutils.prompts import TextInputs

Store = Callable[[int, torch.Tensor, torch.Tensor], None]
_PREFIX, _PADDING = -1, -2  # owners of tokens that no question has


def resolve_layers(mlm: MLM, layers: str | int | Iterable[int]) -> tuple[int, ...]:
    """Increasing layer numbers of "all", a number, or several; negative numbers count from the end."""
    need_mlm(mlm)
    wanted = range(mlm.num_layers) if isinstance(layers, str) and layers == "all" else layers
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
    if mlm.attention not in ("sdpa", "eager"):
        raise ModelError(f"{mlm.attention} attention takes no mask per head, so keys cannot be blocked and questions not be kept "
                         'apart; load the model with attention="sdpa" or "eager"')  # fmt: skip
    for layer in layers:
        if getattr(mlm.model.model.language_model.layers[layer].self_attn, "sliding_window", None) is not None:
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
        self.wanted, self.store = {layer: position for position, layer in enumerate(layers)}, store

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx in self.wanted:
            self.store(self.wanted[layer_idx], key_states, value_states)
        if layer_idx >= max(self.wanted):
            raise _LastLayerReached
        return key_states, value_states


def read_layers(mlm: MLM, embeddings: torch.Tensor, text: TextInputs, layers: Sequence[int], store: Store) -> None:
    """Run the language model on embeddings (B, T, C) up to the last of the layers; no head. store(position in `layers`, keys (B,
    G, T, D), values (B, G, T, D)) is called layer after layer."""
    language_model = mlm.model.model.language_model
    with contextlib.suppress(_LastLayerReached):
        language_model(inputs_embeds=embeddings, attention_mask=text.attention_mask, position_ids=text.position_ids,
                       past_key_values=_ReadingCache(layers, store), use_cache=True)  # fmt: skip
    # accelerate's hooks put offloaded weights away after a forward, which the modules left early missed.
    layer = language_model.layers[max(layers)]
    for module in (layer.self_attn, layer, language_model):
        if hook := getattr(module, "_hf_hook", None):
            hook.post_forward(module, None)


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


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one question: `owner` is the question's number, `row` its prompt. offset: tokens between the end of
    the prefix and this piece. Pieces of one owner see each other in order; a piece with a `branch` other than 0 (an answer
    option) sees branch 0 and itself."""

    row: int
    owner: int
    ids: Sequence[int]
    offset: int = 0
    branch: int = 0


class Continuation:
    """Tokens after a `Prefix`, in any number of forward passes. The prefix itself is never changed."""

    def __init__(self, mlm: MLM, prefix: Prefix):
        self.mlm, self.prefix = mlm, prefix
        self.cache = _cache(prefix.keys_values)
        self.owner = torch.where(prefix.mask, _PREFIX, _PADDING)  # (B, T) of every cached token
        self.branch = torch.zeros_like(self.owner)

    def fork(self) -> Continuation:
        """Another continuation of the same tokens; nothing is copied."""
        other = Continuation(self.mlm, self.prefix)
        other.cache = _cache([(layer.keys, layer.values) for layer in self.cache.layers])
        other.owner, other.branch = self.owner, self.branch
        return other

    def extend(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Append pieces and return the last hidden state of each of their tokens, (tokens, C), in order."""
        rows: list[list[tuple]] = [[] for _ in self.owner]  # id, position after the prefix, owner, branch of each token
        places = []  # row, first and last column of each piece
        for piece in pieces:
            row = rows[piece.row]
            places.append((piece.row, slice(len(row), len(row) + len(piece.ids))))
            row += [(token, piece.offset + i, piece.owner, piece.branch) for i, token in enumerate(piece.ids)]
        longest = max(map(len, rows))  # S; shorter rows are padded on the right
        table = torch.tensor([row + [(0, 0, _PADDING, 0)] * (longest - len(row)) for row in rows], device=self.owner.device)
        ids, offsets, owner, branch = table.unbind(-1)
        self.owner, self.branch = torch.cat([self.owner, owner], dim=1), torch.cat([self.branch, branch], dim=1)
        positions = self.prefix.next_position[:, None] + offsets
        positions = positions.expand(3, -1, -1) if self.mlm.family == QWEN else positions
        output = self.mlm.model.model.language_model(inputs_embeds=self.mlm.model.get_input_embeddings()(ids), position_ids=positions,
                                                     attention_mask=self._mask(longest), past_key_values=self.cache, use_cache=True)  # fmt: skip
        return torch.cat([output.last_hidden_state[place] for place in places])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, vocabulary) float32 of last hidden states (tokens, C). ModelError where one is not finite: a NaN has a largest
        logit as well, and its token would pass for an answer."""
        if (logits := self.mlm.model.lm_head(hidden).float()).isfinite().all():
            return logits
        raise not_finite(self.mlm, f"logits that are not finite, first because of {self._first_not_finite()}")

    def _first_not_finite(self) -> str:
        """Where the first number came from that is not finite, as the cache shows it: a layer's input spoils its keys and values."""
        for number, layer in enumerate(self.cache.layers):
            keys, values = (not each.isfinite().all() for each in (layer.keys, layer.values))
            if keys and values:
                return f"the output of layer {number - 1}" if number else "the embeddings of text and images (vision tower or projector)"
            if keys or values:
                return f"the {'keys' if keys else 'values'} of layer {number}"
        return f"the output of layer {self.mlm.num_layers - 1}, the last, or of the output head"

    def _mask(self, new: int) -> torch.Tensor:
        """(B, 1, S, T) for the S newest of T tokens: bool for sdpa, additive for eager attention."""
        owner, branch = self.owner[:, None], self.branch[:, None]  # of the keys (B, 1, T)
        mine, my_branch = self.owner[:, -new:, None], self.branch[:, -new:, None]  # of the queries (B, S, 1)
        seen = (owner == mine) & ((branch == 0) | (branch == my_branch))
        seen = (seen.tril(self.owner.shape[1] - new) | (owner == _PREFIX)).unsqueeze(1)
        if self.mlm.attention == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=self.mlm.dtype).masked_fill(~seen, torch.finfo(self.mlm.dtype).min)


def not_finite(mlm: MLM, what: str) -> ModelError:
    """The error for numbers of a model that are NaN or infinite; raise it."""
    return ModelError(f"{mlm.name} in {str(mlm.dtype).removeprefix('torch.')} has {what}. Load it with dtype=\"bfloat16\" or "
                      "\"float32\" (float16 ends at 65,504); if that is what it has, its weights are damaged: fetch the checkpoint again.")


def _cache(keys_values: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that begins with these tensors; `DynamicLayer` appends by `torch.cat` and leaves them alone."""
    cache = DynamicCache()
    for keys, values in keys_values:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
