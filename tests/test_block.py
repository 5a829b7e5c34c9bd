"""Blocked keys against a float64 softmax of its own, the mask that attention is given, and the bare model."""

import contextlib
import functools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, hooks, picture, tiny, tiny_next
from transformers import DynamicCache, MistralConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvutils.block import block_keys
from kvutils.errors import DataError, ModelError, ParameterError
from kvutils.keys import KeySelection
from kvutils.kvcache import capture

ATTENTIONS = ("sdpa", "eager")
QUESTIONS = ["what is this?", "what is the colour of the red fish on the left"]


@functools.cache
def model(family, attention):
    mlm = tiny(family, attention=attention)
    mlm.model.generation_config.eos_token_id = None  # all texts have the length asked for
    return mlm


def pictures(count=2, first=0):
    return [picture(40, 32, first + number) for number in range(count)]


def batch(mlm, side="left", questions=QUESTIONS, images=None):
    """(inputs of the model's own processor, image slots (B, N)) of questions of different lengths."""
    mlm.tokenizer.padding_side = side
    prompts = [mlm.prompt(question) for question in questions]
    inputs = mlm.processor(text=prompts, images=images or pictures(len(questions)), padding=True, return_tensors="pt")
    found = (inputs["input_ids"] == mlm.image_token_id).nonzero()[:, 1].reshape(len(questions), -1)
    return inputs, found.numpy()


def choose(mlm, slots, layers=(1, 3), share=0.5, seed=0):
    """Some keys of some layers, different ones for each head."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(layers), mlm.num_kv_heads, slots.shape[-1], generator=generator) < share
    return KeySelection("some", mask, layers)


def everything(mlm, slots):
    return choose(mlm, slots, tuple(range(mlm.num_layers)), share=2)


def union(a, b):
    """The keys that either selection chooses."""
    layers = sorted({*a.layers, *b.layers})
    masks = [sum(one.restrict([layer]).mask[0] for one in (a, b) if layer in one.layers) for layer in layers]
    return KeySelection("union", torch.stack(masks).bool(), tuple(layers))


@torch.no_grad()
def logits(mlm, inputs, **options):
    return mlm.model(**inputs, **options).logits


def generate(mlm, inputs, tokens=3, **options):
    return mlm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)


@contextlib.contextmanager
def attention_calls(mlm):
    """What the language model's attention function was given and returned, call after call."""
    layers = {id(layer.self_attn): n for n, layer in enumerate(mlm.model.model.language_model.layers)}
    module = sys.modules[type(mlm.model.model.language_model.layers[0].self_attn).__module__]
    calls, patch = [], pytest.MonkeyPatch()

    def recorded(function):
        def attention(owner, query, key, value, attention_mask, **options):
            output = function(owner, query, key, value, attention_mask, **options)
            if id(owner) in layers:
                mask = None if attention_mask is None else attention_mask.clone()
                calls.append((layers[id(owner)], query.clone(), key.clone(), value.clone(), mask, output[0]))
            return output

        return attention

    patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", recorded(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    patch.setattr(module, "eager_attention_forward", recorded(module.eager_attention_forward))
    try:
        yield calls
    finally:
        patch.undo()


def allowed_keys(mlm, selection, layer, slots, queries, present, seen, length):
    """(B, H, length, keys) bool, spelled out: causal, not padding, not blocked for the head that serves.

    present (B, keys): 1 for tokens, 0 for padding.
    """
    group = mlm.num_heads // mlm.num_kv_heads
    position = seen + np.arange(length)[:, None]
    causal = np.arange(present.shape[1]) <= position
    allowed = np.zeros((len(slots), mlm.num_heads, length, present.shape[1]), dtype=bool)
    for b, h in np.ndindex(allowed.shape[:2]):
        allowed[b, h] = causal & (present[b] == 1)
        if layer not in selection.layers:
            continue
        chosen = selection.mask[selection.layers.index(layer), h // group].numpy()
        for slot in slots[b][chosen]:
            if queries == "all":
                allowed[b, h, position[:, 0] != slot, slot] = False
            else:
                allowed[b, h, position[:, 0] > max(slots[b]), slot] = False
    return allowed


def softmax_reference(query, key, value, allowed):
    """(B, length, H, D) in float64; rows that see nothing, of padding, are NaN."""
    query, key, value = (x.double().numpy() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    output = np.empty((len(query), query.shape[2], query.shape[1], query.shape[3]))
    for b, h in np.ndindex(query.shape[:2]):
        scores = query[b, h] @ key[b, h // group].T / np.sqrt(query.shape[3])
        weights = np.where(allowed[b, h], np.exp(scores - scores.max(1, keepdims=True)), 0)
        with np.errstate(invalid="ignore"):
            output[b, :, h] = weights @ value[b, h // group] / weights.sum(1, keepdims=True)
    return output


def check_calls(mlm, calls, selection, slots, queries, present, tolerance=1e-5):
    """Every recorded call equals the reference, in the output and, where keys are blocked, in the mask."""
    seen = dict.fromkeys(range(mlm.num_layers), 0)
    for layer, query, key, value, mask, output in calls:
        length = query.shape[2]
        here = present[:, : key.shape[2]]
        allowed = allowed_keys(mlm, selection, layer, slots, queries, here, seen[layer], length)
        expected = softmax_reference(query, key, value, allowed)
        real = ~np.isnan(expected[:, :, 0, 0])
        assert np.abs(output.double().numpy() - expected)[real].max() < tolerance
        last = seen[layer] + length - 1
        if layer in selection.layers and (queries == "all" or last > slots.max(axis=1).min()):
            assert mask.shape == (len(query), mlm.num_heads, length, key.shape[2])
            assert set(mask.unique().tolist()) == {0, torch.finfo(mask.dtype).min}
            assert np.array_equal((mask == 0).numpy().swapaxes(1, 2)[real], allowed.swapaxes(1, 2)[real])
        seen[layer] += length
    assert set(seen.values()) != {0} and len(set(seen.values())) == 1


@pytest.mark.parametrize("queries", ["after", "all"])
@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_the_softmax_over_the_keys_that_are_left(family, attention, padding, queries):
    """Without padding sdpa gets no mask from the model, and the causal one has to be made."""
    mlm = model(family, attention)
    inputs, slots = batch(mlm, "left", QUESTIONS[:1]) if padding == "none" else batch(mlm, padding)
    with attention_calls(mlm) as bare:
        logits(mlm, inputs)
    assert (bare[0][4] is None) == (attention == "sdpa" and padding == "none")
    for selection in (choose(mlm, slots), everything(mlm, slots)):
        given = slots if padding == "left" else slots[0]  # one row serves both sequences
        with block_keys(mlm, selection, given, queries), attention_calls(mlm) as calls:
            logits(mlm, inputs)
        assert [call[0] for call in calls] == list(range(mlm.num_layers))
        check_calls(mlm, calls, selection, slots, queries, inputs["attention_mask"].numpy())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_of_generate(family, attention, beams):
    mlm = model(family, attention)
    inputs, slots = batch(mlm)
    selection = choose(mlm, slots, share=0.8)
    with block_keys(mlm, selection, slots), attention_calls(mlm) as calls:
        generate(mlm, inputs, num_beams=beams)
    assert len(calls) == 3 * mlm.num_layers and calls[0][1].shape[0] == 2 * beams
    assert [call[1].shape[2] for call in calls[:: mlm.num_layers]] == [inputs["input_ids"].shape[1], 1, 1]
    present = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1).numpy()
    rows = (np.repeat(slots, beams, axis=0), np.repeat(present, beams, axis=0))
    check_calls(mlm, calls, selection, rows[0], "after", rows[1])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_has_more_keys_than_tokens(family, attention):
    mlm = model(family, attention)
    for side in ("right", "left"):
        inputs, slots = batch(mlm, side)
        length = inputs["input_ids"].shape[1]
        selection = choose(mlm, slots)
        cache = StaticCache(config=mlm.text_config, max_cache_len=length + 9)
        real = inputs["attention_mask"].bool()
        for queries in ("after", "all"):
            cache.reset()
            with block_keys(mlm, selection, slots, queries):
                expected = logits(mlm, inputs)
                found = logits(mlm, inputs, past_key_values=cache)
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    with block_keys(mlm, selection, slots):
        static = generate(mlm, inputs, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, generate(mlm, inputs))


def test_a_prompt_in_several_passes():
    """The first ends where only one row's image has ended: its text must be kept from the keys already."""
    mlm = model("llava_next", "sdpa")
    inputs, slots = batch(mlm, "left")
    selection = choose(mlm, slots, share=0.9)
    first, second = sorted(slots.max(axis=1) + 1)
    assert first + 2 < second < inputs["input_ids"].shape[1]
    for queries in ("after", "all"):
        with block_keys(mlm, selection, slots, queries), attention_calls(mlm) as calls:
            whole = logits(mlm, inputs)
            calls.clear()
            cache, mask = DynamicCache(), inputs["attention_mask"]
            start = {**inputs, "input_ids": inputs["input_ids"][:, :second], "attention_mask": mask[:, :second]}
            rest = {"input_ids": inputs["input_ids"][:, second:], "attention_mask": mask}
            parts = [logits(mlm, part, past_key_values=cache) for part in (start, rest)]
        check_calls(mlm, calls, selection, slots, queries, mask.numpy())
        found = torch.cat(parts, dim=1)
        torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_mask_of_the_callers_own_is_combined_and_not_edited(attention):
    mlm = model("llava_next", attention)
    length, slots = 20, np.arange(2, 9)[None]
    selection = choose(mlm, slots)
    own = torch.rand(1, mlm.num_heads, length, length) < 0.7
    own = (own | torch.eye(length, dtype=torch.bool)).tril()
    given = own if attention == "sdpa" else torch.zeros(own.shape).masked_fill(~own, -1e30)
    before = given.clone()
    with block_keys(mlm, selection, slots), attention_calls(mlm) as calls, torch.no_grad():
        mlm.model.model.language_model(inputs_embeds=torch.randn(1, length, 32), attention_mask=given)
    assert torch.equal(given, before)
    for layer, query, key, value, _, output in calls:
        allowed = allowed_keys(mlm, selection, layer, slots, "after", np.ones((1, length)), 0, length)
        expected = softmax_reference(query, key, value, allowed & own.numpy())
        assert np.abs(output.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_half_precision(attention, dtype):
    mlm = tiny("llava_next", attention=attention)
    mlm.model.to(dtype)
    inputs, slots = batch(mlm)
    inputs = inputs.to(dtype)
    selection = everything(mlm, slots)
    with block_keys(mlm, selection, slots, "all"), attention_calls(mlm) as calls:
        assert torch.isfinite(logits(mlm, inputs)[inputs["attention_mask"].bool()]).all()
    check_calls(mlm, calls, selection, slots, "all", inputs["attention_mask"].numpy(), tolerance=0.1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_image_key_the_image_does_not_matter(family, attention):
    mlm = model(family, attention)
    inputs, slots = batch(mlm)
    others, _ = batch(mlm, images=pictures(2, first=9))
    assert (logits(mlm, inputs)[:, -1] - logits(mlm, others)[:, -1]).abs().min(0).values.max() > 0.01
    with block_keys(mlm, everything(mlm, slots), slots):
        torch.testing.assert_close(logits(mlm, inputs)[:, -1], logits(mlm, others)[:, -1])
        assert torch.equal(generate(mlm, inputs)[:, -3:], generate(mlm, others)[:, -3:])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_changes_the_image_tokens_and_after_does_not(family):
    mlm = model(family, "sdpa")
    image = pictures(1)
    plain = capture(mlm, image)[0]
    selection = choose(mlm, plain.layout.slots)
    with block_keys(mlm, selection, plain.layout):
        assert torch.equal(capture(mlm, image)[0].keys, plain.keys)  # not even another kernel
    with block_keys(mlm, selection, plain.layout, "all"):
        changed = capture(mlm, image)[0]
    assert torch.equal(changed.values[:2], plain.values[:2])  # layer 1 is the first with a blocked key
    assert (changed.values[2] - plain.values[2]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_restored_to_the_last_bit_also_after_an_exception(family, attention):
    mlm = model(family, attention)
    inputs, slots = batch(mlm)
    before, text, state = logits(mlm, inputs), generate(mlm, inputs), hooks(mlm)
    weights = {name: tensor._version for name, tensor in mlm.model.state_dict().items()}
    given = inputs["attention_mask"].clone()
    with block_keys(mlm, choose(mlm, slots), slots):
        assert hooks(mlm) != state
        assert not torch.equal(logits(mlm, inputs), before)
    assert hooks(mlm) == state
    with pytest.raises(RuntimeError, match="inside"), block_keys(mlm, choose(mlm, slots), slots, "all"):
        logits(mlm, inputs)
        raise RuntimeError("inside")
    assert hooks(mlm) == state
    assert torch.equal(logits(mlm, inputs), before) and torch.equal(generate(mlm, inputs), text)
    assert {name: tensor._version for name, tensor in mlm.model.state_dict().items()} == weights
    assert torch.equal(inputs["attention_mask"], given)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nested_blocks_act_together(attention):
    mlm = model("llava_next", attention)
    inputs, slots = batch(mlm)
    outer, inner = choose(mlm, slots, (1, 3)), choose(mlm, slots, (3, 4), seed=1)
    with block_keys(mlm, union(outer, inner), slots):
        expected = logits(mlm, inputs)
    with block_keys(mlm, outer, slots):
        alone = logits(mlm, inputs)
        with block_keys(mlm, inner, slots):
            assert torch.equal(logits(mlm, inputs), expected)
        assert torch.equal(logits(mlm, inputs), alone)
        with block_keys(mlm, outer, slots):  # twice the same is once
            assert torch.equal(logits(mlm, inputs), alone)
    assert not torch.equal(alone, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_selection_changes_nothing(family, attention):
    mlm = model(family, attention)
    inputs, slots = batch(mlm)
    before, text, state = logits(mlm, inputs), generate(mlm, inputs), hooks(mlm)
    nothing = KeySelection("none", torch.zeros(2, mlm.num_kv_heads, slots.shape[1], dtype=torch.bool), (0, 4))
    for selection in (nothing, everything(mlm, slots).restrict([])):
        for queries in ("after", "all"):
            with block_keys(mlm, selection, slots, queries):
                assert hooks(mlm) == state
                assert torch.equal(logits(mlm, inputs), before)
    with block_keys(mlm, nothing, slots):
        assert torch.equal(generate(mlm, inputs), text)
    partly = union(nothing, choose(mlm, slots, (2,)))
    with block_keys(mlm, partly, slots):
        changed = [name for name, found in hooks(mlm).items() if found != state[name]]
    assert [name.split(".")[-2:] for name in changed if name] == [["2", "self_attn"]]  # beside the whole model, whose prompt is looked at


def test_impossible_selections_are_one_clear_error():
    mlm = model("llava_onevision", "sdpa")
    _, slots = batch(mlm, questions=QUESTIONS[:1])
    state, tokens = hooks(mlm), slots.shape[1]

    def refuse(error, match, selection, slots=slots, queries="after"):
        with pytest.raises(error, match=match), block_keys(mlm, selection, slots, queries):
            pytest.fail("the block was entered")
        assert hooks(mlm) == state

    chosen = choose(mlm, slots)
    refuse(ParameterError, r"layers \(1, 5\); tiny-llava_onevision has 2 in layers 0\.\.4", choose(mlm, slots, (1, 5)))
    heads = KeySelection("four", torch.ones(1, 4, tokens, dtype=torch.bool), (1,))
    refuse(ParameterError, r"4 key-value heads .* tiny-llava_onevision has 2", heads)
    refuse(DataError, f"{tokens} image tokens, not {tokens - 1}", chosen, slots[:, 1:])
    refuse(ParameterError, "'before'; expected one of after, all", chosen, queries="before")
    for bad in (slots.astype(float), slots[None], [], np.zeros_like(slots), slots - slots.min() - 1):
        refuse(DataError, "integers .* different positions", chosen, bad)
    captures = capture(mlm, [pictures(1)[0], pictures(1)[0].resize((90, 40))], keys=False, values=False)
    refuse(DataError, "one token grid", chosen, [one.layout for one in captures])


def test_a_slot_without_an_image_token_is_an_error():
    mlm = model("llava_onevision", "sdpa")
    inputs, slots = batch(mlm)
    with block_keys(mlm, everything(mlm, slots), slots):
        generate(mlm, inputs)  # right for the prompt, and for the steps behind it
        with pytest.raises(ParameterError, match="no image token stands at slot"):  # a token more at the beginning
            logits(mlm, {**inputs, **{name: torch.cat([inputs[name][:, :1], inputs[name]], dim=1) for name in ("input_ids", "attention_mask")}})
    base = replace(mlm, base_view_only=True)
    with pytest.raises(ParameterError, match="pixels are of tiles"), block_keys(base, everything(mlm, slots), slots):
        logits(base, inputs)
    assert not mlm.model._forward_pre_hooks


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_slot_outside_the_sequence_is_an_error(attention):
    mlm = model("llava_onevision", attention)
    inputs, slots = batch(mlm)
    length = inputs["input_ids"].shape[1]
    beyond = slots + (length - slots.max())
    cache = StaticCache(config=mlm.text_config, max_cache_len=length + 20)
    for options in ({}, {"past_key_values": cache}):
        with block_keys(mlm, choose(mlm, slots), beyond):
            with pytest.raises(ParameterError, match=f"slot {length} lies beyond the sequence of {length}"):
                logits(mlm, inputs, **options)
    with block_keys(mlm, choose(mlm, slots), np.concatenate([slots, slots[:1]])):
        with pytest.raises(ParameterError, match="3 sequences, which do not divide the batch of 2"):
            logits(mlm, inputs)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_that_takes_no_mask_is_an_error(attention):
    mlm = tiny("llava_next")
    inputs, slots = batch(mlm)
    state = hooks(mlm)
    with block_keys(mlm, choose(mlm, slots), slots):
        mlm.text_config._attn_implementation = attention  # changed inside
        with pytest.raises(ModelError, match=f'{attention} attention takes no mask.*"sdpa" or "eager"'):
            mlm.model.model.language_model.layers[1].self_attn(hidden_states=torch.zeros(1, 60, 32))
    with pytest.raises(ModelError, match=f"{attention} attention takes no mask"):
        with block_keys(mlm, choose(mlm, slots), slots):
            pytest.fail("the block was entered")
    assert hooks(mlm) == state


def test_sliding_window_of_a_whole_model_is_an_error():
    """Mistral's attention reads it from the configuration, not from the layer."""
    mlm = tiny_next(language=MistralConfig, sliding_window=8)
    _, slots = batch(mlm)
    with pytest.raises(ModelError, match="layer 0 .* sliding-window"):
        with block_keys(mlm, choose(mlm, slots, (0, 1)), slots):
            pytest.fail("the block was entered")


def test_sliding_window_attention_is_an_error():
    mlm = tiny("llava_onevision", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    _, slots = batch(mlm)
    with block_keys(mlm, choose(mlm, slots, (0, 1)), slots):
        pass
    with pytest.raises(ModelError, match="layer 3 .* sliding-window"):
        with block_keys(mlm, choose(mlm, slots, (1, 3)), slots):
            pytest.fail("the block was entered")
