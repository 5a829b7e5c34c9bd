"""The language model, run on embeddings and only as far as needed; keys and values are read on the way.

A cached prompt prefix, continued by many questions at once without one copy of the cache per question.

A row of the batch is one prompt: its prefix (text and images) is cached once, and all its questions are
appended to that row side by side. A mask lets every token see the prefix and its own question, nothing of the
others, and positions continue after the prefix for each question anew: each is computed as if it were alone.

What to do when a batch does not fit the device's memory: take it in halves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvutils.errors import MemoryLimitError, ModelError, ParameterError
from kvutils.models import MLM, QWEN
from kvutils.prompts import TextInputs


def resolve_layers(mlm: MLM, layers: str | int | Iterable[int]) -> tuple[int, ...]:
    """Increasing layer numbers of "all", a number, or several; negative numbers count from the end."""
    if isinstance(layers, str):
        if layers != "all":
            raise ParameterError(f"layers must be 'all' or integers, not {layers!r}")
        return tuple(range(mlm.num_layers))
    wanted = [layers] if isinstance(layers, int | np.integer) else list(layers)
    found = set()
    for layer in wanted:
        if not isinstance(layer, int | np.integer) or not -mlm.num_layers <= layer < mlm.num_layers:
            raise ParameterError(f"layer {layer!r} does not exist: {mlm.name} has layers 0..{mlm.num_layers - 1}")
        found.add(int(layer) % mlm.num_layers)
    if not found:
        raise ParameterError("no layers asked for; pass 'all' or at least one layer number")
    return tuple(sorted(found))


class _LastLayerReached(Exception):
    """Ends a forward pass; never leaves this module."""


class RowCache(DynamicCache):
    """A cache that hands keys and values through unchanged and shows those of the wanted layers to `store`.

    store(layer position in `layers`, keys (B, G, T, D), values (B, G, T, D)).
    """

    def __init__(self, layers: Sequence[int], store: Callable[[int, torch.Tensor, torch.Tensor], None]):
        super().__init__()
        self.wanted, self.store = {layer: position for position, layer in enumerate(layers)}, store

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx in self.wanted:
            self.store(self.wanted[layer_idx], key_states, value_states)
        if layer_idx >= max(self.wanted):
            raise _LastLayerReached
        return key_states, value_states


def run_layers(mlm: MLM, embeddings: torch.Tensor, mask, positions, cache: RowCache) -> None:
    """Run the language model on embeddings (B, T, C) up to the last layer that `cache` wants; no head."""
    language_model = mlm.model.model.language_model
    with contextlib.suppress(_LastLayerReached):
        language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    # accelerate's hooks put offloaded weights away after a forward, which the modules left early missed.
    layer = language_model.layers[max(cache.wanted)]
    for module in (layer.self_attn, layer, language_model):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.post_forward(module, None)


_PREFIX, _PADDING = -1, -2  # owners that no question has


@dataclass(eq=False)
class Prefix:
    """The cache of B prompts up to their last image token, P tokens padded on the right.

    keys_values: per layer the keys and the values (B, G, P, D); mask (B, P) bool, False on padding;
    next_position (B,): the position of the first token after the prefix.
    """

    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor
    next_position: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one question: `owner` is the question's number, `row` its prompt.

    offset: tokens between the end of the prefix and this piece. Pieces of one owner see each other in order;
    a piece with a `branch` other than 0 (an answer option) sees branch 0 and itself.
    """

    row: int
    owner: int
    ids: Sequence[int]
    offset: int = 0
    branch: int = 0


def check_attention(mlm: MLM) -> None:
    """ModelError where the model cannot take the masks that keep questions apart."""
    if mlm.attention not in ("sdpa", "eager"):
        raise ModelError(
            f"questions over a cached image need attention 'sdpa' or 'eager', and {mlm.name} has "
            f"{mlm.attention!r}, which takes no mask: load_mlm(..., attention='sdpa')"
        )
    if "sliding_attention" in (getattr(mlm.text_config, "layer_types", None) or ()):
        raise ModelError(f"{mlm.name} has sliding-window layers; only full attention is supported here")


def embed(mlm: MLM, ids: torch.Tensor, projected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Embeddings (B, T, C) of token ids (B, T), the projected tokens of their images in place of the image tokens, in order."""
    embeddings = mlm.model.get_input_embeddings()(ids)
    at_image = (ids == mlm.image_token_id).unsqueeze(-1).to(embeddings.device)
    return embeddings.masked_scatter(at_image, torch.cat(list(projected)).to(embeddings.device, embeddings.dtype))


def prefill(mlm: MLM, embeddings: torch.Tensor, text: TextInputs) -> Prefix:
    """Read prefixes given as embeddings (B, P, C); the last layer stops at its keys and values."""
    kept: list = [None] * mlm.num_layers

    def store(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        kept[layer] = (keys, values)

    run_layers(mlm, embeddings, text.attention_mask, text.position_ids, RowCache(range(len(kept)), store))
    mask = text.attention_mask.bool()
    furthest = text.position_ids.amax(0) if text.position_ids.ndim == 3 else text.position_ids
    return Prefix(kept, mask, furthest.masked_fill(~mask, 0).amax(-1) + 1)


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
        rows, past = self.owner.shape
        filled = [0] * rows
        places = []
        for piece in pieces:
            places.append(filled[piece.row])
            filled[piece.row] += len(piece.ids)
        # ids, position after the prefix, owner, branch: all S tokens of a row, padded on the right
        table = np.zeros((4, rows, max(filled)), dtype=np.int64)
        table[2] = _PADDING
        for piece, start in zip(pieces, places, strict=True):
            end = start + len(piece.ids)
            table[0, piece.row, start:end] = piece.ids
            table[1, piece.row, start:end] = range(piece.offset, piece.offset + len(piece.ids))
            table[2, piece.row, start:end] = piece.owner
            table[3, piece.row, start:end] = piece.branch
        ids, offsets, owner, branch = torch.from_numpy(table).to(self.owner.device)
        self.owner = torch.cat([self.owner, owner], dim=1)
        self.branch = torch.cat([self.branch, branch], dim=1)
        positions = self.prefix.next_position[:, None] + offsets
        if self.mlm.family == QWEN:
            positions = positions.expand(3, -1, -1)
        output = self.mlm.model.model.language_model(
            inputs_embeds=self.mlm.model.get_input_embeddings()(ids),
            attention_mask=self._mask(past),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        lengths = [len(piece.ids) for piece in pieces]
        row = np.repeat([piece.row for piece in pieces], lengths)
        column = np.concatenate([np.arange(n) + start for n, start in zip(lengths, places, strict=True)])
        hidden = output.last_hidden_state
        return hidden[torch.from_numpy(row).to(hidden.device), torch.from_numpy(column).to(hidden.device)]

    def _mask(self, past: int) -> torch.Tensor:
        """(B, 1, S, T) for the S newest of T tokens: bool for sdpa, additive for eager attention."""
        owner, branch = self.owner[:, None], self.branch[:, None]  # of the keys (B, 1, T)
        mine, my_branch = self.owner[:, past:, None], self.branch[:, past:, None]  # of the queries (B, S, 1)
        seen = (owner == mine) & ((branch == 0) | (branch == my_branch))
        seen = (seen.tril(past) | (owner == _PREFIX)).unsqueeze(1)
        if self.mlm.attention == "sdpa":
            return seen
        lowest = torch.finfo(self.mlm.dtype).min
        return torch.zeros_like(seen, dtype=self.mlm.dtype).masked_fill(~seen, lowest)


def _cache(keys_values: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that begins with these tensors; `DynamicLayer` appends by `torch.cat` and leaves them alone."""
    cache = DynamicCache()
    for keys, values in keys_values:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


log = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")


def in_halves(run: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """run(items), one result per item; where memory does not suffice, the results of its halves, one after the other.

    A smaller batch may change the last bits of a result (as another GPU does), so it is logged. Raises
    MemoryLimitError where a single item does not fit.
    """
    try:
        return run(items)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        said = str(error).splitlines()[0]
    # Out of the handler: it would hold the frames, and with them the tensors, of what has failed.
    clear_device_cache(garbage_collection=True)
    if len(items) == 1:
        raise MemoryLimitError(
            f"one image does not fit the memory that is left ({said}). Free the device of other work, use a smaller model "
            "or a lower resolution (base_view_only=True for LLaVA, max_pixels for Qwen), fewer layers, or a larger device."
        )
    half = len(items) // 2
    log.warning("a batch of %d does not fit the memory: taken in halves (%s)", len(items), said)
    return in_halves(run, items[:half]) + in_halves(run, items[half:])
