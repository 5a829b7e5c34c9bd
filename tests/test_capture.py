"""Capture against the plain model: same bits, nothing left behind, one clear error for what cannot be."""

import copy
import json
import weakref
from dataclasses import replace
from unittest.mock import Mock

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, IMAGES_FIRST, WORDS, hooks, picture, save, tiny, tiny_pocket, tiny_siglip
from transformers import DynamicCache
from word_tokenizer import build_word_tokenizer

from kvutils.answer import ImageSession
from kvutils.datasets.refcoco import CATEGORIES
from kvutils.errors import ImageError, ModelError, ParameterError
from kvutils.kvcache import capture
from kvutils.language import read_layers, resolve_layers
from kvutils.models import load_encoder, load_mlm, wrap_mlm
from kvutils.prompts import prepare_text
from kvutils.readout.attention import prompt_saliency
from kvutils.readout.encoders import capture_encoder
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.words import text_values, words_of
from kvutils.vision import encode_images, prepare_images

ALL = [*FAMILIES, "pocket"]
IMAGES = [picture(50, 40), picture(40, 90), picture(130, 20)]


def plain_cache(mlm, image, prefix=None, whole=False):
    """(cache, token ids) of the published way: processor -> model.model -> DynamicCache, up to the last image token unless whole.

    The pocket model is shown base views only: the class's several-images mode."""
    if mlm.base_view_only:
        square = mlm.processor.image_processor([image.resize((32, 32), Image.Resampling.BICUBIC)], return_tensors="pt")
        inputs = mlm.tokenizer(mlm.prompt(prefix=prefix).replace("<image>", "<image>" * 17), return_tensors="pt")
        inputs |= {"pixel_values": square["pixel_values"][:, :1], "image_sizes": torch.tensor([[32, 32]]), "batch_num_images": [2]}
    else:
        inputs = dict(mlm.processor(text=[mlm.prompt(prefix=prefix)], images=[image], return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].to(mlm.dtype)
    end = None if whole else image_slots(mlm, inputs["input_ids"]).max() + 1
    for name in {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"} & set(inputs):
        inputs[name] = inputs[name][:, :end]
    cache = DynamicCache()
    with torch.no_grad():
        mlm.model.model(**inputs, past_key_values=cache, use_cache=True)
    return cache, inputs["input_ids"]


def looks(mlm):
    """With tiles, and base view only."""
    return mlm, replace(mlm, base_view_only=True)


def image_slots(mlm, ids):
    return (ids[0] == mlm.image_token_id).nonzero().flatten()


@pytest.mark.parametrize(("dtype", "prefix", "whole"), [
    (torch.float32, None, False), (torch.bfloat16, None, False), (torch.float32, "a red fish", False), (torch.float32, None, True),
])  # fmt: skip
@pytest.mark.parametrize("family", ALL)
def test_keys_and_values_are_those_of_the_plain_cache(family, dtype, prefix, whole):
    """To the last bit; the text after the image does not matter."""
    mlm = tiny(family)
    mlm.model.to(dtype)
    for image in IMAGES:
        cache, ids = plain_cache(mlm, image, prefix, whole)
        assert (ids[0, -1] != mlm.image_token_id) == whole
        slots = image_slots(mlm, ids)
        one = capture(mlm, [image], prefix=prefix)[0]
        assert np.array_equal(one.layout.slots, slots.numpy())
        assert one.keys.shape == (mlm.num_layers, mlm.num_kv_heads, len(slots), mlm.head_dim)
        for name in ("keys", "values"):
            plain = torch.stack([getattr(layer, name)[0][:, slots] for layer in cache.layers])
            torch.testing.assert_close(getattr(one, name), plain, rtol=0, atol=1e-5 if whole else 0)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("prefix", [None, "a red fish on the left"])
def test_features_at_image_slots_are_the_scattered_projector_output(family, prefix):
    mlm = tiny(family)
    seen = []
    hook = mlm.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    _, ids = plain_cache(mlm, IMAGES[1], prefix=prefix)
    hook.remove()
    one = capture(mlm, [IMAGES[1]], prefix=prefix, keys=False, values=False)[0]
    assert torch.equal(one.projector, seen[0][0, image_slots(mlm, ids)])
    if family != "qwen2_5_vl":
        newline = one.layout.is_newline
        assert newline.any() and (one.encoder[newline] == 0).all()
        assert torch.equal(one.projector[newline], mlm.model.model.image_newline.detach().expand(newline.sum(), -1))


@pytest.mark.parametrize(("family", "size"), [("llava_onevision", (50, 40)), ("llava_next", (50, 40)), ("llava_onevision", (300, 251))])
def test_projecting_the_encoder_features_gives_the_projector_features(family, size):
    shrunk = max(size) > 200
    for mlm in looks(tiny(family)):
        if shrunk:
            mlm.model.model.multi_modal_projector = torch.nn.Linear(24, 32, bias=False)  # commutes with the bilinear shrinking
        one = capture(mlm, [picture(*size)], keys=False, values=False)[0]
        assert mlm.base_view_only or one.layout.grids["tiles"][0] < 20
        projector, real = mlm.model.model.multi_modal_projector, ~one.layout.is_newline
        with torch.no_grad():
            assert torch.allclose(projector(one.encoder[real]), one.projector[real], atol=1e-4 if shrunk else 1e-5)


def test_encoder_features_of_qwen_are_means_of_what_is_merged_out_of_window_order():
    mlm = tiny("qwen2_5_vl")
    mlm.model.model.visual.merger.forward = lambda x: x.unflatten(0, (-1, 4)).mean(1)  # so the projector gives the means
    with torch.no_grad():
        encoder, averaged = encode_images(mlm, prepare_images(mlm, IMAGES))
    assert torch.equal(torch.cat(encoder), torch.cat(averaged))


@pytest.mark.parametrize("family", ALL)
def test_early_stop_equals_full_run(family):
    mlm = tiny(family)
    full = capture(mlm, IMAGES)
    for layers in ([0], [1, 3], [-1], 2):
        part = capture(mlm, IMAGES, layers=layers)
        numbers = resolve_layers(mlm, layers)
        for one, whole in zip(part, full, strict=True):
            assert one.layers == numbers
            assert torch.equal(one.keys, whole.keys[list(numbers)])
            assert torch.equal(one.values, whole.values[list(numbers)])


def test_early_stop_runs_no_later_layer_and_no_head():
    mlm = tiny("qwen2_5_vl")
    ran = []
    for number, layer in enumerate(mlm.model.model.language_model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    towers = [0]
    mlm.model.model.visual.register_forward_pre_hook(lambda *_: towers.__setitem__(0, towers[0] + 1))
    mlm.model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the language-model head ran"))
    capture(mlm, IMAGES, layers=[0, 2])
    assert ran == [0, 1, 2] and towers == [1]
    ran.clear()
    capture(mlm, IMAGES, keys=False, values=False)
    assert ran == []


@pytest.mark.parametrize("family", ALL)
def test_batch_equals_single_and_eager_equals_sdpa(family):
    mlm, slow = tiny(family), tiny(family, attention="eager")
    batched = capture(mlm, IMAGES, prefix="a fish", batch_size=3)
    eager = capture(slow, IMAGES, prefix="a fish")
    for image, one, other in zip(IMAGES, batched, eager, strict=True):
        alone = capture(mlm, [image], prefix="a fish")[0]
        for name in ("keys", "values", "encoder", "projector"):
            assert torch.allclose(getattr(one, name), getattr(alone, name), atol=1e-5, rtol=1e-5), name
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-4), name
        assert np.array_equal(one.layout.slots, alone.layout.slots)


def test_pocket_prompt_is_items_joined_by_spaces():
    mlm = tiny_pocket()
    assert mlm.prompt("what is this?", prefix="a red fish") == "a red fish <image> what is this? :"
    assert mlm.prompt("same colour?", images=3) == "first <image> second <image> third <image> same colour? :"
    assert mlm.prompt() == "<image> :"


@pytest.mark.parametrize("prefix", ["user", "s", "a red fish "])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_stands_before_the_image(family, prefix):
    """Also one of words that the template itself writes."""
    mlm = tiny(family)
    before = mlm.prompt("yes", prefix=prefix).split(mlm.processor.image_token)[0]
    assert before == f"user {prefix}" + ("<|vision_start|>" if family == "qwen2_5_vl" else "\n")


def test_prompt_errors():
    mlm = tiny("llava_onevision")
    for argument in ("prefix", "question"):
        with pytest.raises(ParameterError, match=argument):
            mlm.prompt(**{argument: "a <image> b"})
    with pytest.raises(ParameterError, match="base_view_only"):
        prepare_text(mlm, ["<image><image>"], prepare_images(mlm, IMAGES[:2]))
    mlm.processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ParameterError, match="0 image tokens"):
        mlm.prompt("what is this?")
    mlm.processor.chat_template = IMAGES_FIRST.replace("c['text']", "'hello'")
    with pytest.raises(ParameterError):
        capture(mlm, [IMAGES[0]], prefix="a red fish")
    mlm.processor.chat_template = None
    with pytest.raises(ParameterError, match="no chat template"):
        capture(mlm, [IMAGES[0]])


@pytest.mark.parametrize("ask", [lambda mlm: capture(mlm, IMAGES), lambda mlm: ImageSession(mlm, IMAGES[0])])
def test_a_tokenizer_with_other_image_tokens_is_an_error(ask):
    mlm = tiny("llava_next")
    mlm.processor.tokenizer = build_word_tokenizer([*WORDS, "other"])  # its image token has another id
    mlm.model.config.image_token_id += 1
    with pytest.raises(ModelError, match="tokenizer of tiny-llava_next makes 0 image tokens .* layout has"):
        ask(replace(mlm))  # which reads the token's id anew


def fingerprint(mlm):
    weights = {name: (tensor.data_ptr(), tensor._version) for name, tensor in mlm.model.state_dict().items()}
    rope = getattr(mlm.model.model, "rope_deltas", None)
    return hooks(mlm), weights, mlm.model.config.to_json_string(), mlm.model.training, None if rope is None else rope.tolist()


@torch.no_grad()
def question_logits(mlm):
    image = picture(32, 32) if mlm.base_view_only else IMAGES[0]
    return mlm.model(**mlm.processor(text=[mlm.prompt("what is this?")], images=[image], return_tensors="pt")).logits


@pytest.mark.parametrize("family", ALL)
def test_model_is_left_unmodified_also_after_an_exception(family, monkeypatch):
    mlm = tiny(family)
    before = question_logits(mlm)  # also installs the hooks that transformers keeps on the vision tower
    state = fingerprint(mlm)
    capture(mlm, IMAGES, prefix="a fish", layers=[1])
    text_values(mlm, ["red fish"], layers=[1])
    assert fingerprint(mlm) == state

    fail = Mock(side_effect=RuntimeError("the callback failed"))
    with pytest.raises(RuntimeError, match="callback"):
        capture(mlm, IMAGES, on_capture=fail)
    with pytest.raises(ImageError):
        capture(mlm, [IMAGES[0], "missing.png"], batch_size=1)
    monkeypatch.setattr("kvutils.language._ReadingCache.update", fail)
    with pytest.raises(RuntimeError):
        capture(mlm, IMAGES)
    assert fingerprint(mlm) == state
    assert torch.equal(question_logits(mlm), before)


def text_scores(mlm):
    """Of every source, by a new extractor."""
    extractor = FeatureExtractor(mlm, layers=[1, 3], keys=False, vocabulary=("fish", "cat"))
    return extractor.alignment.scores(extractor.images([("a", IMAGES[0])])[0].features, ["fish"])


@pytest.mark.parametrize("offload", [
    lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
    lambda model: accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),  # only aligns devices
    lambda model: accelerate.cpu_offload(model.model.language_model, execution_device="cpu"),
], ids=["everything", "nothing", "language model"])  # fmt: skip
@pytest.mark.parametrize("family", ALL)
def test_offloaded_models(family, offload):
    """Weights that accelerate keeps elsewhere are fetched by hooks, also around the early stop."""
    mlm = tiny(family)
    expected, texts = capture(mlm, IMAGES, layers=[1, 3]), text_values(mlm, ["red fish"])
    scored = text_scores(mlm)
    offload(mlm.model)
    devices = {name: p.device.type for name, p in mlm.model.named_parameters()}
    for _ in range(2):
        for one, plain in zip(capture(mlm, IMAGES, layers=[1, 3]), expected, strict=True):
            for name in ("keys", "values", "encoder", "projector"):
                assert torch.equal(getattr(one, name), getattr(plain, name)), name
        assert torch.equal(text_values(mlm, ["red fish"]), texts)
        for source, found in text_scores(mlm).items():
            assert torch.equal(found, scored[source]), source
        assert {name: p.device.type for name, p in mlm.model.named_parameters()} == devices


def retained_bytes(captures):
    """(bytes of the storages behind the captures, bytes of their tensors): a view would keep all of its base alive."""
    tensors = [t for c in captures for t in (c.keys, c.values, c.encoder, c.projector) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()), sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("to", ["cpu", None])
@pytest.mark.parametrize("family", ALL)
def test_only_what_was_asked_for_is_kept(family, to):
    mlm = tiny(family)
    captures = capture(mlm, IMAGES, prefix="a red fish", layers=[1, 3], to=to)
    for some in (captures, captures[1:2]):  # images of a batch share nothing
        kept, asked = retained_bytes(some)
        assert kept == asked == 4 * sum(len(c.layout) for c in some) * (2 * 2 * mlm.num_kv_heads * mlm.head_dim + 24 + 32)
    only = capture(mlm, IMAGES, layers=[2], keys=False, features=False)[0]
    assert only.keys is None and only.encoder is None and only.projector is None


def test_streaming_keeps_one_batch_at_a_time():
    mlm = tiny_pocket()
    alive, most, indices = weakref.WeakSet(), [], []

    def receive(index, item):
        indices.append(index)
        alive.add(item)
        most.append(len(alive))

    images = (picture(20 + i % 7, 30, seed=i) for i in range(60))  # a generator: opened as they are needed
    assert capture(mlm, images, layers=[1], batch_size=4, on_capture=receive) is None
    assert indices == list(range(60)) and max(most) <= 8


def test_results_can_be_used_with_autograd():
    weight = torch.ones(16, requires_grad=True)
    (capture(tiny_pocket(), [IMAGES[0]])[0].value(0) @ weight).sum().backward()
    assert weight.grad is not None


def test_reading_layers_heads_and_tokens():
    mlm = tiny("llava_onevision")
    one = capture(mlm, [IMAGES[0]], layers=[3, 1, 3, -1])[0]
    n, g, d = len(one.layout), mlm.num_kv_heads, mlm.head_dim
    assert one.layers == (1, 3, 4) and one.layout.image_size == (50, 40)
    assert one.value(3).shape == (n, g * d) and one.key(3, head=1).shape == (n, d)
    assert torch.equal(one.value(4)[:, d:], one.value(4, head=1)) and torch.equal(one.values[2, 1], one.value(4, 1))
    tiles = one.select(one.layout.spatial())
    assert torch.equal(tiles.value(1), one.value(1)[one.layout.spatial()])
    assert len(tiles.layout) == 6 * 8 == len(tiles.encoder) and tiles.prefix is None
    assert torch.equal(one.select(~one.layout.is_newline).key(1), one.key(1)[~one.layout.is_newline])
    for layer, head in ((0, None), (2, None), (1, 2), (1, -1)):
        with pytest.raises(ParameterError):
            one.value(layer, head)
    with pytest.raises(ParameterError, match="values"):
        capture(mlm, [IMAGES[0]], values=False)[0].value(0)


@pytest.mark.parametrize(("family", "setting", "call", "said"), [
    ("pocket", {}, lambda mlm: capture(mlm, IMAGES, batch_size=0), "batch_size"),
    ("pocket", {}, lambda mlm: capture(mlm, "photo.jpg"), "list"),
    ("pocket", {"max_pixels": 1000}, lambda mlm: capture(mlm, IMAGES), "max_pixels for Qwen"),
    ("qwen2_5_vl", {"base_view_only": True}, lambda mlm: capture(mlm, IMAGES), "base_view_only is for the LLaVA"),
    ("qwen2_5_vl", {"max_pixels": 10}, lambda mlm: capture(mlm, IMAGES), "max_pixels .* at least 64"),
    *[("pocket", {}, lambda mlm, layers=layers: capture(mlm, IMAGES, layers=layers), "layer")
      for layers in (5, [0, 9], [-6], [], "first", [1.5], ["2"], [None])],
    ("pocket", {}, lambda mlm: mlm.prompt(prefix="f\udcfcr"), "prefix must be UTF-8 text"),
    ("pocket", {}, lambda mlm: capture(replace(mlm, model=copy.deepcopy(mlm.model).train()), IMAGES), "training mode, or a part of it: call mlm.model.eval"),
    ("pocket", {}, lambda mlm: text_values(mlm, "fish"), "list"),
    ("pocket", {}, lambda mlm: text_values(mlm, ["fish", " "]), "at least one word"),
    ("pocket", {}, lambda mlm: text_values(mlm, ["fish", "a <image>"]), "without the image token"),
])  # fmt: skip
def test_arguments_out_of_range(family, setting, call, said):
    with pytest.raises(ParameterError, match=said):
        call(replace(tiny(family), **setting))


def test_a_cache_that_is_not_used_is_no_capture():
    """Gradient checkpointing in a part that trains drops it: what was reserved would be returned as it is."""
    mlm = replace(tiny("llava_onevision"), model=copy.deepcopy(tiny("llava_onevision").model))
    mlm.model.gradient_checkpointing_enable()
    expected = capture(tiny("llava_onevision"), IMAGES[:1])[0].keys
    assert torch.equal(capture(mlm, IMAGES[:1])[0].keys, expected), "in evaluation mode it is"
    text = prepare_text(mlm, [mlm.prompt()], prepare_images(mlm, IMAGES[:1]))
    for layer in mlm.model.model.language_model.layers:
        layer.train()
    with pytest.raises(ModelError, match="keys and values of 0 of 2 layers to its cache; is all of it in evaluation mode"):
        read_layers(mlm, mlm.model.get_input_embeddings()(text.input_ids), text, [1, 3], lambda *_: None)
    mlm.model.model.language_model.train()
    with pytest.raises(ParameterError, match="training mode, or a part of it"):
        capture(mlm, IMAGES[:1])


def test_some_of_the_tokens_of_a_capture():
    shot = capture(tiny("llava_onevision"), IMAGES[:1])[0]
    for index, tokens in ((3, 1), (np.int64(3), 1), (torch.tensor([3, 5]), 2), ([], 0), (torch.empty(0), 0), (shot.layout.is_newline, shot.layout.is_newline.sum())):
        some = shot.select(index)
        assert len(some.layout) == tokens == some.keys.shape[-2]
    assert torch.equal(shot.select(3).keys, shot.keys[..., 3:4, :])


def test_tiles_that_the_processor_cuts_otherwise_are_refused():
    mlm = tiny("llava_next")
    processor = copy.deepcopy(mlm.processor)
    processor.image_processor.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints[:1]
    with pytest.raises(ModelError, match="cuts tiles by image_grid_pinpoints .* its configuration places them by"):
        capture(replace(mlm, processor=processor), IMAGES[:1])


def test_bad_images_are_named(tmp_path):
    mlm = tiny_pocket()
    (tmp_path / "note.txt").write_text("not a picture")
    with pytest.raises(ImageError, match="note.txt"):
        capture(mlm, [IMAGES[0], tmp_path / "note.txt"])
    with pytest.raises(ImageError, match=r"images\[2\].*NoneType"):
        capture(mlm, [IMAGES[0], IMAGES[1], None], batch_size=2)
    with pytest.raises(ImageError, match=r"images\[1\].*200:1"):
        capture(tiny("qwen2_5_vl"), [IMAGES[0], picture(1, 5000)], batch_size=1)


@pytest.mark.parametrize("family", ALL)
def test_extreme_images(family):
    mlm = tiny(family)
    sizes = [(1, 1), (2, 150)] if family == "qwen2_5_vl" else [(1, 1), (1, 5000), (5000, 1)]
    for size, one in zip(sizes, capture(mlm, [picture(*size) for size in sizes]), strict=True):
        assert torch.isfinite(one.values).all() and one.layout.image_size == size and len(one.layout) > 0


@pytest.mark.parametrize("size", [(120, 96), (9, 182), (8, 1600), (690, 15420), (31, 639), (5, 1000), (4, 400), (1600, 8), (12, 2399), (3, 3)])
def test_qwen_keeps_its_bound_for_every_shape(size):
    """Also for thin pictures, whose short side the processor's own resize does not make smaller than a token."""
    mlm = tiny("qwen2_5_vl")
    processor = mlm.processor.image_processor
    whole = processor(images=[picture(*size)], return_tensors="pt")["image_grid_thw"]
    for most in (64, 65, 128, 20 * 64, 200, 1000, 4096, 10**6):
        (layout,) = prepare_images(replace(mlm, max_pixels=most), [picture(*size)]).layouts
        assert 1 <= len(layout) <= most // 64 and layout.image_size == size
    (layout,) = prepare_images(mlm, [picture(*size)]).layouts  # unbounded: as the processor does
    assert list(layout.grids["base"]) == (whole[0, 1:] // 2).tolist()


@pytest.mark.parametrize("family", ALL)
def test_a_bound_is_asked_for_where_there_is_one(family, tmp_path):
    folder = save(tiny(family), tmp_path)
    if family == "qwen2_5_vl":
        assert [load_mlm(str(folder), max_pixels=most).settings["max_pixels"] for most in (0, 5000)] == [16384, 5000]  # its own
    else:
        assert load_mlm(str(folder)).max_pixels is None
        with pytest.raises(ParameterError, match="max_pixels is for Qwen"):
            load_mlm(str(folder), max_pixels=5000)


def test_the_models_own_tower_loaded_as_another_encoder_gives_its_own_features(tmp_path):
    mlm, encoder = tiny("llava_onevision"), tiny_siglip()
    encoder.model.load_state_dict(mlm.model.model.vision_tower.state_dict())
    encoder = load_encoder(str(save(encoder, tmp_path)), device="cpu")
    assert encoder.revision.startswith("sha256:")
    images = [*IMAGES, picture(300, 251)]
    for model in looks(mlm):
        ours = capture_encoder(encoder, model, images, batch_size=2)
        for features, one in zip(ours, capture(model, images, keys=False, values=False), strict=True):
            assert torch.allclose(features, one.encoder, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_another_encoder_lands_on_the_same_grid(family):
    mlm, encoder = tiny(family), tiny_siglip(side=40)
    for features, one in zip(capture_encoder(encoder, mlm, IMAGES), capture(mlm, IMAGES, layers=0), strict=True):
        assert features.shape == (len(one.layout), 24) and torch.isfinite(features).all()
        assert (features[one.layout.is_newline] == 0).all()


@pytest.mark.parametrize("family", ALL)
def test_text_values_are_means_over_the_tokens_of_a_text(family):
    mlm = tiny(family)
    texts = ["fish", "a red fish on the left", "blue car"]
    found = text_values(mlm, texts, layers=[0, mlm.num_layers - 1], batch_size=2)
    assert found.shape == (3, 2, mlm.num_kv_heads, mlm.head_dim) and found.dtype == torch.float32
    for text, ours in zip(texts, found, strict=True):
        check_text_values(mlm, text, ours, len(text.split()))


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("read", [lambda mlm: text_values(mlm, ["red", "blue"]), lambda mlm: prompt_saliency(mlm, picture(40, 30)),
                                  lambda mlm: capture(mlm, [picture(40, 30)])])
def test_what_is_not_finite_gives_no_score(family, read):
    """A text whose value is NaN would score every token alike, and the whole picture would count as named."""
    mlm = tiny(family)
    mlm.model.model.language_model.layers[1].mlp.down_proj.register_forward_hook(lambda *parts: parts[-1] * torch.nan)
    with pytest.raises(ModelError, match="not finite in layer 2, the first .*float32"):
        read(mlm)


def check_text_values(mlm, text, found, words):
    """The values of the last `words` tokens of a plain forward, in two layers; before them stands what begins every prompt."""
    first = mlm.tokenizer.bos_token or ("<|im_start|>" if "<|im_start|>" in mlm.tokenizer.get_vocab() else "")
    ids = mlm.tokenizer(f"{first} {text}", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == words + bool(first)
    cache = DynamicCache()
    with torch.no_grad():
        mlm.model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    for ours, layer in zip(found, (0, mlm.num_layers - 1), strict=True):
        torch.testing.assert_close(ours, cache.layers[layer].values[0][:, -words:].mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_read_as_in_a_sentence_under_the_published_tokenizers(published, family):
    """No name breaks into more pieces than in a sentence, none stands where every sequence begins."""
    mlm = published(family)
    for name in CATEGORIES.values():
        pieces, sentence = words_of(mlm, name), mlm.tokenizer(f"a photo of the {name}")["input_ids"]
        assert sentence[-len(pieces) :] == pieces and mlm.tokenizer.decode(pieces) == f" {name}"
    assert len(words_of(mlm, "umbrella")) == 1  # at the start of a line it is "umb", "rella"
    for name, found in zip(("umbrella", "hot dog"), text_values(mlm, ["umbrella", "hot dog"], [0, 1]), strict=True):
        check_text_values(mlm, name, found, len(name.split()))
    bare = text_values(mlm, ["umbrella"], [0, 1], behind=[])[0] - text_values(mlm, ["umbrella"], [0, 1])[0]
    assert bare[0].abs().max() < 1e-5 < bare[1].abs().max()  # no attention has run before layer 0


@pytest.mark.parametrize("family", ALL)
def test_a_saved_folder_loads_and_captures_the_same(family, tmp_path):
    original = tiny(family)
    mlm = load_mlm(str(save(original, tmp_path)), device="cpu")
    assert (mlm.family, mlm.base_view_only, mlm.dtype) == (original.family, family == "pocket", torch.float32)
    for a, b in zip(capture(mlm, IMAGES, prefix="a fish"), capture(original, IMAGES, prefix="a fish"), strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) and torch.equal(a.projector, b.projector)
    assert mlm.prompt("yes", "a fish") == original.prompt("yes", "a fish")


def test_ways_to_load_a_folder(tmp_path):
    """Placed on the CPU or by accelerate, in another precision, and untrained under a seed."""
    folder = save(tiny_pocket(), tmp_path)

    def loaded(**options):
        mlm = load_mlm(str(folder), **options)
        return mlm, capture(mlm, IMAGES[:1])[0].values

    (mlm, trained), (placed, same) = loaded(device="cpu"), loaded(device_map="auto")
    assert mlm.revision.startswith("sha256:") and len(mlm.revision) == 23 and mlm.image_backend == "pil"
    assert torch.equal(same, trained) and placed.revision == mlm.revision
    eager = load_mlm(str(folder), device="cpu", dtype="bfloat16", attention="eager")
    assert (eager.dtype, eager.attention) == (torch.bfloat16, "eager")
    state = torch.random.get_rng_state()
    (mlm, first), (_, again), (_, other) = (loaded(device="cpu", untrained=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state) and mlm.revision == "untrained seed 1"
    assert torch.equal(first, again) and first.shape == trained.shape
    assert not torch.allclose(first, other) and not torch.allclose(first, trained)


@pytest.mark.parametrize(("load", "error", "said"), [
    (lambda folder: load_mlm("llava-onevision-7"), ModelError, "llava-onevision-7b"),
    (lambda folder: load_mlm("gpt"), ModelError, "expected one of.*pocket"),
    (lambda folder: load_mlm(str(folder / "empty")), ModelError, "config.json"),
    (lambda folder: load_mlm(str(folder / "bert")), ModelError, "bert"),
    (lambda folder: load_encoder("siglip"), ModelError, "siglip-so400m"),
    (lambda folder: wrap_mlm(tiny_siglip().model, None), ModelError, "model family"),
    (lambda folder: wrap_mlm(tiny("llava_next").model, None), ModelError, "expected a model with lm_head, .* and its processor, .* and NoneType"),
    (lambda folder: wrap_mlm((one := tiny("llava_next")).model.model, one.processor), ModelError, "expected a model with lm_head"),
    (lambda folder: load_mlm("pocket", dtype="float3"), ParameterError, "dtype"),
    (lambda folder: load_mlm("pocket", dtype="int8"), ParameterError, "dtype"),
    (lambda folder: load_mlm("pocket", device="abacus"), ParameterError, "abacus"),
    (lambda folder: load_mlm("pocket", attention="none"), ParameterError, "attention"),
    (lambda folder: load_mlm("pocket", device_map="auto", device="cpu"), ParameterError, "pass no device"),
])  # fmt: skip
def test_what_cannot_be_loaded(tmp_path, load, error, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(error, match=said):
        load(tmp_path)


def test_missing_weights_are_an_error(tmp_path):
    mlm = tiny_pocket()
    weights = {name: one for name, one in mlm.model.state_dict().items() if "linear_2.weight" not in name}
    save(mlm, tmp_path)
    mlm.model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match="linear_2.weight"):
        load_mlm(str(tmp_path), device="cpu")


def test_the_pocket_tokenizer_splits_words_and_punctuation():
    tokenizer = tiny_pocket().tokenizer
    ids = tokenizer("What is a red fish, on the left? zebra <image>")["input_ids"]
    assert ids[-2:] == [1, 3] and tokenizer.decode(ids[:5]) == "what is a red fish"
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "<eos>", "<image>"]) == [0, 1, 2, 3]
