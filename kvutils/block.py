"""Attention-mask patching: queries that must not attend to chosen image keys (paper, section 3.2).

    with block_keys(mlm, selection, layout):
        output = mlm.model.generate(**inputs)

The weights, the cache and the keys themselves stay as they are. Each chosen layer's attention gets a mask of
its own, (B, H, queries, keys), in which the query heads h = g*H/G .. (g+1)*H/G - 1 that KV head g serves do
not see the keys chosen for g; the softmax runs over the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from kvutils.errors import DataError, ModelError, ParameterError
from kvutils.keys import KeySelection
from kvutils.layout import TokenLayout
from kvutils.models import MLM

QUERIES = ("after", "all")
Slots = TokenLayout | Sequence[TokenLayout] | np.ndarray | torch.Tensor | Sequence[int]


@contextmanager
def block_keys(mlm: MLM, selection: KeySelection, slots: Slots, queries: str = "after") -> Iterator[None]:
    """Block attention to the selected image keys for every forward pass, step of `generate` included, inside.

    slots: where the selection's N tokens are in the sequence, counted from the start of the cache and with
    padding: a `TokenLayout`, one per sequence of the batch, or integers (N,) or (B, N). One row serves every
    sequence; B rows serve B*k sequences, k consecutive ones each, as beam search lays them out. Several
    images of one prompt are one row of all their slots (and a selection over all of them).
    queries: "after", those that come after the last of the slots of their sequence, so that the image tokens
    stay as they are and a cached image can be used again; or "all", where every query is kept from the keys
    but for its own (a token that may not see itself could be left with nothing).

    Exact for prefill, for a continued or static cache, and for decoding, with "sdpa" and "eager" attention. A
    forward pass whose queries all come before is untouched, and so is every layer without a selected key.
    Blocks inside each other act together. At the end, or after an exception, the model is as it was. Raises
    ModelError (attention that takes no mask), ParameterError, DataError; inside, ParameterError
    for a slot beyond the sequence or a batch that the rows do not fit.
    """
    if queries not in QUERIES:
        raise ParameterError(f"queries must be one of {', '.join(QUERIES)}, not {queries!r}")
    rows = _slot_rows(slots)
    _check_fit(mlm, selection, rows)
    with ExitStack() as stack:
        for layer, mask in zip(selection.layers, selection.mask, strict=True):
            if mask.any():
                attention = mlm.model.model.language_model.layers[layer].self_attn
                hook = _blocking_hook(_by_query_head(mlm, mask, rows), rows.max(axis=1), queries)
                stack.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _slot_rows(slots: Slots) -> np.ndarray:
    """(rows, N) int64 of any form of `slots`."""
    if isinstance(slots, TokenLayout):
        slots = slots.slots
    elif isinstance(slots, torch.Tensor):
        slots = slots.cpu().numpy()
    elif len(slots) and isinstance(slots[0], TokenLayout):
        sizes = {len(layout) for layout in slots}
        if len(sizes) > 1:
            raise DataError(
                f"the layouts have {sorted(sizes)} image tokens, but one selection fits one token grid; "
                "give every image the same size"
            )
        slots = [layout.slots for layout in slots]
    rows = np.asarray(slots)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "iu":
        raise DataError(f"slots must be integers (N,) or (B, N), found {rows.dtype} {rows.shape}")
    if rows.min() < 0 or (np.diff(np.sort(rows, axis=1), axis=1) == 0).any():
        raise DataError("slots must be different positions from 0 on, counted from the start of the sequence")
    return rows.astype(np.int64)


def _check_fit(mlm: MLM, selection: KeySelection, rows: np.ndarray) -> None:
    _check_attention(mlm.attention)
    _, heads, tokens = selection.mask.shape
    missing = [layer for layer in selection.layers if layer >= mlm.num_layers]
    if missing:
        raise ParameterError(
            f"{selection.name} chooses keys of layer {missing[0]}; {mlm.name} has 0..{mlm.num_layers - 1}"
        )
    if heads != mlm.num_kv_heads:
        raise ParameterError(
            f"{selection.name} is for {heads} key-value heads; {mlm.name} has {mlm.num_kv_heads} "
            f"(they serve its {mlm.num_heads} query heads)"
        )
    if tokens != rows.shape[1]:
        raise DataError(f"{selection.name} chooses among {tokens} image tokens, not {rows.shape[1]} as given")
    for layer in selection.layers:
        attention = mlm.model.model.language_model.layers[layer].self_attn
        if getattr(attention, "sliding_window", None) is not None:
            raise ModelError(
                f"layer {layer} of {mlm.name} has sliding-window attention: it cannot be blocked"
            )


def _check_attention(implementation: str) -> None:
    if implementation not in ("sdpa", "eager"):
        raise ModelError(
            f"{implementation} attention takes no mask per head, so keys cannot be blocked; "
            'load the model with attention="sdpa" or "eager"'
        )


def _by_query_head(mlm: MLM, mask: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """(rows, H, S) bool from (G, N): is the key in a slot blocked? S ends with the last image slot."""
    slots = torch.from_numpy(rows)[:, None].expand(-1, len(mask), -1)
    by_slot = torch.zeros(len(rows), len(mask), rows.max() + 1, dtype=torch.bool)
    by_slot.scatter_(2, slots, mask.cpu().expand(len(rows), -1, -1))
    return by_slot.repeat_interleave(mlm.num_heads // mlm.num_kv_heads, dim=1).to(mlm.device)


def _blocking_hook(by_slot: torch.Tensor, last: np.ndarray, queries: str) -> Callable:
    """A forward pre-hook for one `self_attn` that edits its attention mask.

    by_slot (rows, H, S) as from `_by_query_head`; last (rows,), the slot of each row's last image token.
    """

    def hook(module, args, kwargs):
        _check_attention(module.config._attn_implementation)
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, length = hidden.shape[:2]
        seen, total = _lengths(kwargs.get("past_key_values"), module.layer_idx, length)
        if last.max() >= seen + length:
            raise ParameterError(
                f"the image slot {last.max()} lies beyond the sequence of {seen + length} tokens; give the "
                "slots of this sequence, and run it up to the last image token at once"
            )
        if batch % len(by_slot):
            raise ParameterError(
                f"slots were given for {len(by_slot)} sequences, which do not divide the batch of {batch}"
            )
        if queries == "after" and seen + length - 1 <= last.min():
            return None  # the model's own fast path for the image itself
        repeats, device = batch // len(by_slot), hidden.device
        query = torch.arange(seen, seen + length, device=device)
        keys = by_slot.to(device).repeat_interleave(repeats, dim=0)[:, :, None]  # (B, H, 1, S)
        if queries == "after":
            ends = torch.from_numpy(last).to(device).repeat_interleave(repeats)
            blocked = keys & (query > ends[:, None])[:, None, :, None]
        else:
            blocked = keys & (query[:, None] != torch.arange(keys.shape[-1], device=device))
        mask = kwargs.get("attention_mask")
        if mask is None:  # how sdpa is told to be causal
            mask = torch.arange(total, device=device) <= query[:, None]
        mask = mask.to(device).expand(*blocked.shape[:3], total).clone()
        if mask.dtype == torch.bool:
            mask[..., : keys.shape[-1]] &= ~blocked
        else:
            mask[..., : keys.shape[-1]].masked_fill_(blocked, torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    return hook


def _lengths(cache, layer: int, length: int) -> tuple[int, int]:
    """Tokens that the cache holds of a layer before this pass, and keys that attention will be given.

    Their difference is the length of the pass, but for a static cache, whose keys are as many as it can hold.
    """
    if cache is None:
        return 0, length
    return int(cache.get_seq_length(layer)), cache.get_mask_sizes(length, layer)[0]
