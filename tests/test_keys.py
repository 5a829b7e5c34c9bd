"""Key variance (definition, streaming, precision), its threshold, and the selections and their controls."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from kvutils.block import block_keys
from kvutils.errors import DataError, ImageError, ParameterError
from kvutils.keys import KeySelection, KeyVariance, key_variance, select_region
from kvutils.kvcache import capture
from kvutils.readout.attention import attention_mass
from kvutils.readout.selections import select_random, select_random_matched_mass, selected_mass
from tests.tiny_models import FAMILIES, embedded, hooks, picture, tiny


def keys(images=20, shape=(3, 2, 5, 8), seed=0):
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))


def direct(x):
    x = x.double()
    return (x - x.mean(0)).square().sum(-1).mean(0)


def test_is_the_mean_squared_distance_to_the_mean_key_whatever_the_batch_size():
    x = keys()
    before, whole = x.clone(), KeyVariance().update(x)
    torch.testing.assert_close(whole.result, direct(x))
    assert whole.result.shape == (3, 2, 5) and whole.result.dtype == torch.float64 and torch.equal(x, before)
    assert repr(whole) == f"KeyVariance(images: 20, keys (3, 2, 5, 8), mean variance {direct(x).mean():.4g})"
    for size in (1, 3, 7):
        parts = KeyVariance()
        for batch in x.split(size):
            parts.update(batch)
        assert torch.equal(parts.result, whole.result)  # to the last bit
        assert parts.mean.shape == (3, 2, 5, 8) and parts.sum_squares.shape == (3, 2, 5), "memory is that of one mean key"


def test_a_stream_goes_on_in_and_out_of_inference_mode():
    keys = torch.randn(6, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stream = KeyVariance().update(keys[:2])
    stream.update(keys[2:4])
    stream.merge(KeyVariance().update(keys[4:]))
    torch.testing.assert_close(stream.result, KeyVariance().update(keys).result)


def test_merging_shards_in_any_order_equals_one_stream():
    x = keys()
    a, b, c = (KeyVariance().update(part) for part in x.split([2, 11, 7]))
    stored, nothing = (KeyVariance.from_state(one.state_dict()) for one in (c, KeyVariance()))
    merged = KeyVariance().merge(stored).merge(nothing).merge(a).merge(b)
    assert merged.count == 20 and merged.mean_norm.shape == (3, 2, 5)
    torch.testing.assert_close(merged.result, direct(x))
    torch.testing.assert_close(merged.mean_norm, x.double().norm(dim=-1).mean(0))
    torch.testing.assert_close(stored.result, direct(x[13:]))  # the merged stream is left as it was
    with pytest.raises(DataError, match="same token grid"):  # which would broadcast
        merged.merge(KeyVariance().update(x[:, :, :1]))
    assert torch.equal(stored.update(x).result, KeyVariance().update(x[13:]).update(x).result)
    torch.testing.assert_close(c.result, direct(x[13:]))  # a state is a copy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_common_offset_does_not_drown_the_variance(dtype):
    x = (keys(50, (4, 16)) + 100).to(dtype)
    torch.testing.assert_close(KeyVariance().update(x).result, direct(x))


def test_bad_input_is_one_clear_error():
    broken, variance = keys(), KeyVariance()
    broken[3, 0, 0, 0, 0] = torch.inf
    for call, message in (
        (lambda: variance.result, "no key"),
        (lambda: variance.update(broken), "NaN or infinite"),
        (lambda: KeyVariance().update(keys()).update(keys(shape=(3, 2, 6, 8))), "same token grid"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    assert repr(variance) == "KeyVariance(no image yet)"


def pictures(count, size=(40, 32)):
    return [picture(*size, seed) for seed in range(count)]


@pytest.mark.parametrize("family", [*FAMILIES, "pocket"])
def test_the_variance_of_the_keys_of_images(family):
    mlm = tiny(family)
    captured = torch.stack([one.keys for one in capture(mlm, pictures(7), layers=[1, 4])])
    found = key_variance(mlm, iter(pictures(7)), layers=[4, 1], batch_size=3)
    assert found.count == 7
    torch.testing.assert_close(found.result, direct(captured), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.mean_norm, captured.double().norm(dim=-1).mean(0), rtol=1e-5, atol=0)
    halves = [key_variance(mlm, pictures(7)[part], [1, 4]) for part in (slice(3), slice(3, None))]
    torch.testing.assert_close(halves[0].merge(halves[1]).result, found.result, rtol=1e-5, atol=1e-9)
    assert key_variance(mlm, pictures(2)).result.shape[:2] == (mlm.num_layers, mlm.num_kv_heads)


def test_the_rotary_embedding_leaves_the_variance_of_a_position_alone():
    mlm = tiny("llava_onevision")
    unrotated = []
    projection = mlm.model.model.language_model.layers[2].self_attn.k_proj
    hook = projection.register_forward_hook(lambda module, args, output: unrotated.append(output[0]))
    found = key_variance(mlm, pictures(6), layers=2, batch_size=1).result[0]
    hook.remove()
    slots = torch.from_numpy(capture(mlm, pictures(1))[0].layout.slots)
    keys = torch.stack(unrotated)[:, slots].unflatten(-1, (mlm.num_kv_heads, -1)).transpose(1, 2)
    torch.testing.assert_close(found, direct(keys), rtol=1e-5, atol=1e-9)


def test_images_must_share_one_token_grid_and_there_must_be_some():
    mlm = tiny("llava_onevision")
    images = [*pictures(2), *pictures(1, (90, 40))]
    with pytest.raises(DataError, match=r"images\[2\] \(90x40\) has the token grids .* one size"):
        key_variance(mlm, images)
    assert key_variance(replace(mlm, base_view_only=True), images).count == 3
    with pytest.raises(DataError, match="token grids"):
        key_variance(tiny("qwen2_5_vl"), [picture(36, 72), picture(72, 36)])  # as many tokens, differently arranged
    with pytest.raises(DataError, match="needs images, found none"):
        key_variance(mlm, [])
    with pytest.raises(ImageError, match="missing.png"):
        key_variance(mlm, ["missing.png"])
    with pytest.raises(ParameterError):
        key_variance(mlm, images, layers=[9])


@pytest.mark.parametrize("family", [*FAMILIES, "pocket"])
@torch.no_grad()
def test_attention_mass_is_the_mean_weight_of_the_text_behind_the_image(family):
    mlm, questions = tiny(family), ["what is this?", "yes"]
    eager = tiny(family, attention="eager")
    images = pictures(3)
    group = mlm.num_heads // mlm.num_kv_heads
    expected = torch.zeros(mlm.num_layers, mlm.num_kv_heads, len(capture(mlm, images[:1])[0].layout)).double()
    for image, question in product(images, questions):
        embeddings, text, vision = embedded(eager, [image], eager.prompt(question, "a red fish"))
        slots = torch.from_numpy(vision.layouts[0].slots)
        language_model = eager.model.model.language_model
        output = language_model(inputs_embeds=embeddings, position_ids=text.position_ids, output_attentions=True)
        for layer, weights in enumerate(output.attentions):  # (1, H, T, T)
            behind = weights[0, :, slots.max() + 1 :][..., slots].double()
            expected[layer] += behind.mean(1).unflatten(0, (-1, group)).mean(1) / 6
    found = attention_mass(mlm, iter(images), questions, prefix="a red fish", batch_size=2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert (found.sum(-1) < 1).all() and (found >= 0).all()


def test_attention_mass_leaves_the_model_alone_and_refuses_what_cannot_be(monkeypatch):
    mlm = tiny("llava_next")
    capture(mlm, pictures(1))  # transformers gives the vision tower hooks of its own, to stay
    before = hooks(mlm)
    attention_mass(mlm, pictures(1), ["yes"])
    assert hooks(mlm) == before and mlm.attention == "sdpa"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("kvutils.readout.attention.copy.deepcopy", lambda cache: 1 / 0)
        attention_mass(mlm, pictures(1), ["yes"])
    assert hooks(mlm) == before and mlm.attention == "sdpa"
    for questions in ("yes", []):
        with pytest.raises(ParameterError, match="list of at least one text"):
            attention_mass(mlm, pictures(1), questions)
    for images, message in (([], "needs images, found none"), ([picture(40, 32), picture(90, 40)], r"images\[1\] \(90x40\)")):
        with pytest.raises(DataError, match=message):
            attention_mass(mlm, images, ["yes"])
    mlm.processor.chat_template = "{% for c in messages[0]['content'] %}{{ c.get('text', '') }}{% endfor %}<image>"
    with pytest.raises(ParameterError, match="after the image"):
        attention_mass(mlm, pictures(1), ["yes"])


def test_a_selection_says_which_keys_of_which_layer():
    chosen = agnostic()
    part = chosen.restrict([9, 3])
    assert part.layers == (9, 3) and torch.equal(part.mask, chosen.mask[[2, 0]])
    assert chosen.restrict([]).layers == () and chosen.restrict([]).mask.shape == (0, 2, 11)
    assert repr(chosen) == f"KeySelection('some': {int(chosen.mask.sum())} of 66 keys, layers [3, 7, 9], 2 heads, 11 tokens)"
    mask = torch.ones(2, 2, 5, dtype=torch.bool)
    for bad, layers in ((mask.float(), (0, 1)), (mask[0], (0, 1)), (mask, (0, 1, 2))):
        with pytest.raises(DataError, match="bool of shape"):
            KeySelection("x", bad, layers)
    for layers in ((1, 1), (-1, 0), (0, "1"), (0, 1.0)):
        with pytest.raises(ParameterError, match="different numbers"):
            KeySelection("x", mask, layers)
    with pytest.raises(ParameterError, match="unknown layer of the selection 'some' 4.*3, 7, 9"):
        chosen.restrict([4])


@pytest.mark.parametrize("family", [*FAMILIES, "pocket"])
def test_a_region_chooses_the_tokens_that_it_holds_by_half(family):
    mlm, image = tiny(family), picture(100, 70)
    layout = capture(mlm, [image], layers=0)[0].layout
    box = (20.0, 10.0, 77.0, 60.0)
    found = select_region(mlm, layout, box, layers=[3, 1], heads=1)
    shape = mlm.num_kv_heads, len(layout)
    assert found.layers == (1, 3) and found.mask.shape == (2, *shape) and not found.mask[:, 0].any()
    for token, (x0, y0, x1, y1) in enumerate(layout.rects):
        overlap = max(0, min(x1, box[2]) - max(x0, box[0])) * max(0, min(y1, box[3]) - max(y0, box[1]))
        inside = not layout.is_newline[token] and (x1 - x0) * (y1 - y0) > 0 and overlap >= (x1 - x0) * (y1 - y0) / 2
        assert bool(found.mask[0, 1, token]) == bool(found.mask[1, 1, token]) == inside
    mask = np.zeros((70, 100), bool)
    mask[10:60, 20:77] = True
    by_mask, every = select_region(mlm, layout, mask), select_region(mlm, layout, (0, 0, 100, 70))
    assert by_mask.mask.shape == (5, *shape) and (by_mask.mask[0, 0] != found.mask[0, 1]).float().mean() < 0.15  # pixels, not areas
    seen = ~layout.is_newline & (np.nan_to_num(layout.rects[:, 2:] - layout.rects[:, :2]) > 0).all(1)
    assert torch.equal(every.mask[0, 0], torch.from_numpy(seen))
    assert torch.equal(select_region(mlm, layout, torch.from_numpy(mask)).mask, by_mask.mask)
    with block_keys(mlm, every, layout):
        pass
    for region, options, kind, words in (
        ((0, 0, 101, 70), {}, ParameterError, "in the picture of 100x70 pixels"), ((5, 5, 5, 9), {}, ParameterError, "x0 < x1"),
        ((0, 0, np.nan, 9), {}, ParameterError, "x0 < x1"), ("box", {}, ParameterError, "found 'box'"),
        ((0, 0, 1, 1), {}, ParameterError, "half of no image token"), (np.zeros((70, 100), bool), {}, ParameterError, "half of no"),
        (mask.T, {}, DataError, r"\(70, 100\) like its picture, found bool \(100, 70\)"), (mask.astype(int), {}, DataError, "must be bool"),
        (box, {"heads": 2}, ParameterError, "unknown key-value head .* 2"), (box, {"heads": 1.0}, ParameterError, "whole number"),
        (box, {"layers": 9}, ParameterError, "layer 9 does not exist"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            select_region(mlm, layout, region, **options)


REAL = torch.arange(11) % 4 != 3  # 9 of 11; the others are newlines


def random_variance(tokens=11, seed=5):
    return torch.rand(3, 2, tokens, generator=torch.Generator().manual_seed(seed)).double()


def agnostic(variance=None, real=REAL):
    variance = random_variance() if variance is None else variance
    return KeySelection("some", (variance < 0.4) & real, (3, 7, 9))


def test_random_keys_match_the_count_and_follow_the_seed():
    like = agnostic()
    draws = [select_random(like, REAL, seed) for seed in range(200)]
    for one in draws:
        assert torch.equal(one.mask.sum(-1), like.mask.sum(-1)) and one.layers == like.layers
        assert not one.mask[..., ~REAL].any()
    assert torch.equal(draws[0].mask, select_random(like, REAL, 0).mask)
    assert not torch.equal(draws[0].mask, draws[1].mask)
    share = torch.stack([one.mask for one in draws]).double().mean(0)[..., REAL]
    expected = like.mask.sum(-1, keepdim=True) / REAL.sum()
    assert (share - expected).abs().max() < 0.15  # no position is preferred


def test_random_keys_that_match_the_attention_mass():
    tokens = 400
    real = torch.arange(tokens) % 20 != 19
    variance, mass = random_variance(tokens), random_variance(tokens, seed=6)
    mass /= mass.sum(-1, keepdim=True)
    mass = torch.where(variance < 0.4, mass * 3, mass)  # the keys of interest are looked at more
    like = agnostic(variance, real)
    target = selected_mass(like, mass)
    torch.testing.assert_close(target, (mass * like.mask).sum(-1))
    for seed in range(3):
        chosen = select_random_matched_mass(like, mass, real, seed)
        torch.testing.assert_close(selected_mass(chosen, mass), target, rtol=0.005, atol=0)
        assert not chosen.mask[..., ~real].any() and (chosen.mask.sum(-1) > like.mask.sum(-1)).all()
        assert torch.equal(chosen.mask, select_random_matched_mass(like, mass, real, seed).mask)
    assert not torch.equal(chosen.mask, select_random_matched_mass(like, mass, real, 0).mask)
    nothing = KeySelection("none", torch.zeros_like(like.mask), like.layers)
    assert not select_random_matched_mass(nothing, mass, real, 0).mask.any()
