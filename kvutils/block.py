"""Attention-mask patching: queries that must not attend to chosen image keys (paper, section 3.2).

    with block_keys(mlm, selection, layout):
        output = mlm.model.generate(**inputs)

Weights, cache and keys stay as they are. Each chosen layer's attention gets a mask of its own, (B, H, queries, keys), in which the
query heads h = g*H/G .. (g+1)*H/G - 1 that KV head g serves do not see the keys chosen for g; the softmax runs over the rest."""

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch

from kvutils.errors import DataError, ParameterError, of_kind, one_of
from kvutils.keys import KeySelection
from kvutils.language import CACHE, GROUPED, check_masks
from kvutils.layout import TokenLayout
from kvutils.models import MLM, need_mlm

Slots = TokenLayout | Sequence[TokenLayout] | np.ndarray | torch.Tensor | Sequence[int]


@contextmanager
def block_keys(mlm: MLM, selection: KeySelection, slots: Slots, queries: str = "after") -> Iterator[None]:
    """Block attention to the selected image keys for every forward pass, step of `generate` included, inside.

    slots: where the selection's N tokens are in the sequence, counted from the start of the cache and with padding: a
    `TokenLayout`, one per sequence of the batch, or integers (N,) or (B, N). One row serves every sequence; B rows serve B*k
    sequences, k consecutive ones each, as beam search lays them out. Several images of one prompt are one row of all their
    slots (and a selection over all of them).
    queries: "after", those that come after the last of the slots of their sequence, so that the image tokens stay as they
    are and a cached image can be used again; or "all", where every query is kept from the keys but for its own (a token that
    may not see itself could be left with nothing).

    Exact for prefill, for a continued or static cache, and for decoding, with "sdpa" and "eager" attention. A forward pass
    whose queries all come before is untouched, and so is every layer without a selected key. Blocks inside each other act
    together. At the end, or after an exception, the model is as it was. Raises ModelError (attention that takes no mask),
    DataError, ParameterError; inside, ParameterError for a slot beyond the sequence, a batch that the rows do not fit, or a
    whole prompt with no image token at a slot. Slots are of one prompt: take them from the session, or a capture with its prefix.

    >>> with kv.ImageSession(mlm, scene) as session:
    ...     layout, question = session.layouts[0], ["is there a tree ?"]
    ...     before = session.yes_no(question)[0].text
    ...     with kv.block_keys(mlm, kv.select_region(mlm, layout, (0, 0, 96, 96)), layout):
    ...         before, session.yes_no(question)[0].text
    ('yes', 'no')
    """
    need_mlm(mlm)
    of_kind("selection", selection, KeySelection, "a KeySelection, such as select_region gives")
    one_of("queries", queries, ("after", "all"))
    rows = slot_rows(slots)
    _, heads, tokens = selection.mask.shape
    if max(selection.layers, default=0) >= mlm.num_layers or heads != mlm.num_kv_heads:
        raise ParameterError(f"{selection.name} chooses among {heads} key-value heads of layers {selection.layers}; {mlm.name} "
                             f"has {mlm.num_kv_heads} in layers 0..{mlm.num_layers - 1}")  # fmt: skip
    if tokens != rows.shape[1]:
        raise DataError(f"{selection.name} chooses among {tokens} image tokens, not {rows.shape[1]} as given")
    check_masks(mlm, selection.layers)
    with ExitStack() as stack:
        if selection.mask.any():
            stack.callback(mlm.model.register_forward_pre_hook(partial(_check_inputs, mlm, rows), with_kwargs=True).remove)
        for layer, mask in zip(selection.layers, selection.mask, strict=True):
            if mask.any():
                attention = mlm.model.model.language_model.layers[layer].self_attn
                hook = _blocking_hook(mlm, mask, rows, queries)
                stack.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def slot_rows(slots: Slots) -> np.ndarray:
    """(rows, N) int64 of any form of `slots` in `block_keys`; DataError for another, or where N differs between sequences."""
    if isinstance(slots, TokenLayout):
        slots = slots.slots
    elif isinstance(slots, torch.Tensor):
        slots = slots.cpu().numpy()
    elif not isinstance(slots, Sized):
        raise DataError(f"slots: expected a TokenLayout, such as capture.layout, or integers (N,), found {type(slots).__name__}")
    elif len(slots) and isinstance(slots[0], TokenLayout | np.ndarray):
        slots = [one.slots if isinstance(one, TokenLayout) else one for one in slots]
        if len(sizes := sorted({len(one) for one in slots})) > 1:
            raise DataError(f"the sequences have {sizes} image tokens, but one selection of keys fits one token grid: resize the "
                            "images to one size, or take each by itself")  # fmt: skip
    rows = np.atleast_2d(slots)
    different = rows.size and rows.ndim == 2 and rows.dtype.kind in "iu" and rows.min() >= 0
    if not different or (np.diff(np.sort(rows, axis=1), axis=1) == 0).any():
        raise DataError("slots must be integers (N,) or (B, N), different positions from 0 on, counted from the start of the "
                        f"sequence; found {rows.dtype} {rows.shape}")  # fmt: skip
    return rows.astype(np.int64)


def _check_inputs(mlm: MLM, rows: np.ndarray, module, args, kwargs) -> None:
    """A forward pre-hook of the whole model: ParameterError for a prompt whose image tokens are not where the slots say."""
    ids, cache, pixels = args[0] if args else kwargs.get("input_ids"), kwargs.get(CACHE), kwargs.get("pixel_values")
    if mlm.base_view_only and pixels is not None and pixels.ndim == 5 and pixels.shape[1] > 1:
        raise ParameterError(f"these pixels are of tiles, and {mlm.name} and its layouts are of base views alone: ask by `ImageSession`")
    if ids is None or cache is not None and cache.get_seq_length() or len(ids) % len(rows) or rows.max() >= ids.shape[1]:
        return  # what is no prompt from its start on; the layers say what does not fit
    images, slots = (ids == mlm.image_token_id).cpu(), torch.from_numpy(rows).repeat_interleave(len(ids) // len(rows), dim=0)
    if images.any() and not (found := images.gather(1, slots)).all():
        raise ParameterError(f"no image token stands at slot {int(slots[~found][0])} of this prompt: the layout is another's, or the prompt begins "
                             "otherwise (a prefix; a first token that the template and the tokenizer both wrote)")  # fmt: skip


def _blocking_hook(mlm: MLM, mask: torch.Tensor, rows: np.ndarray, queries: str) -> Callable:
    """A forward pre-hook for one `self_attn` that edits its attention mask: keys mask (G, N) in the slots rows (rows, N)."""
    last = rows.max(axis=1)  # the slot of each row's last image token
    by_slot = torch.zeros(len(rows), len(mask), last.max() + 1, dtype=torch.bool)
    by_slot.scatter_(2, torch.from_numpy(rows)[:, None].expand(-1, len(mask), -1), mask.cpu().expand(len(rows), -1, -1))
    by_slot = by_slot.to(mlm.device)  # (rows, G, S): is its key blocked?

    def hook(module, args, kwargs):
        check_masks(mlm, ())
        hidden, cache = args[0] if args else kwargs["hidden_states"], kwargs.get("cache", kwargs.get("past_key_values"))
        batch, length = hidden.shape[:2]
        seen, total = 0, length  # tokens that the cache holds before this pass; keys that attention will be given
        if cache is not None:  # a static cache has as many keys as it can hold
            seen, total = int(cache.get_seq_length(module.layer_idx)), cache.get_mask_sizes(length, module.layer_idx)[0]
        if last.max() >= seen + length:
            raise ParameterError(f"the image slot {last.max()} lies beyond the sequence of {seen + length} tokens; give the "
                                 "slots of this sequence, and run it up to the last image token at once")  # fmt: skip
        if batch % len(by_slot):
            raise ParameterError(f"slots were given for {len(by_slot)} sequences, which do not divide the batch of {batch}")
        if queries == "after" and seen + length - 1 <= last.min():
            return None  # the model's own fast path for the image itself
        repeats, device = batch // len(by_slot), hidden.device
        first = 0 if queries == "all" else max(0, int(last.min()) + 1 - seen)  # of this pass's queries, the first that is kept from a key
        query = torch.arange(seen + first, seen + length, device=device)[:, None]
        ends = torch.from_numpy(last).to(device).repeat_interleave(repeats)[:, None, None, None]
        keys = by_slot.to(device).repeat_interleave(repeats, dim=0)[:, :, None]  # (B, G, 1, S)
        if mlm.attention != GROUPED:
            keys = keys.repeat_interleave(mlm.num_heads // mlm.num_kv_heads, dim=1)  # (B, H, 1, S)
        blocked = keys & (query != torch.arange(keys.shape[-1], device=device) if queries == "all" else query > ends)
        mask = kwargs.get("attention_mask")
        if mask is None:  # how sdpa is told to be causal
            mask = torch.full((length, total), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=device).triu_(seen + 1)
        elif mask.dtype == torch.bool:  # sdpa itself would make this of every head's mask
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, torch.finfo(hidden.dtype).min)
        mask = mask.to(device).expand(batch, keys.shape[1], -1, -1).clone()
        mask[:, :, first:, : keys.shape[-1]].masked_fill_(blocked, torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    return hook
