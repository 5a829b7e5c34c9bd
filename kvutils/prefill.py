"""The language model, run on embeddings and only as far as needed; keys and values are read on the way."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from kvutils.errors import LayerError
from kvutils.models import MLM


def resolve_layers(mlm: MLM, layers: str | int | Iterable[int]) -> tuple[int, ...]:
    """Increasing layer numbers of "all", a number, or several; negative numbers count from the end."""
    if isinstance(layers, str):
        if layers != "all":
            raise LayerError(f"layers must be 'all' or integers, not {layers!r}")
        return tuple(range(mlm.num_layers))
    wanted = [layers] if isinstance(layers, int | np.integer) else list(layers)
    found = set()
    for layer in wanted:
        if not isinstance(layer, int | np.integer) or not -mlm.num_layers <= layer < mlm.num_layers:
            raise LayerError(f"layer {layer!r} does not exist: {mlm.name} has layers 0..{mlm.num_layers - 1}")
        found.add(int(layer) % mlm.num_layers)
    if not found:
        raise LayerError("no layers asked for; pass 'all' or at least one layer number")
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
