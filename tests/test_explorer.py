"""The explorer's kernel side: every message against the library's own numbers, mistakes in one sentence, code, memory."""

import base64
import contextlib
import gc
import io
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kvutils as kv
import kvutils.errors
from kvutils.answer import spellings
from kvutils.explorer.widget import Explorer
from kvutils.readout.attention import attention_mass
from kvutils.readout.features import image_tokens
from kvutils.readout.maps import pca_colours, similarity_to_point
from tests.tiny_models import FAMILIES, picture, tiny, tiny_onevision, tiny_pocket, tiny_siglip

KINDS = [*FAMILIES, "pocket"]
QUESTION, OPTIONS = "what colour is this car", ["red", "blue"]
IMAGE, OTHERS = picture(60, 40), [picture(48, 48, seed) for seed in range(4)]
REGION = {"kind": "region", "tokens": [1, 2, 5], "layers": [1, 3], "heads": [0]}


def floats(reply) -> np.ndarray:
    return np.frombuffer(reply[1][0], "<f4")


@pytest.fixture(scope="module", params=KINDS)
def explored(request) -> Explorer:
    return kv.explore(tiny(request.param), IMAGE, context=OTHERS)


def test_open_tells_all_that_a_view_needs(explored):
    (about,), buffers = (explored.answer("open")[0]["panels"], explored.answer("open")[1])
    layout, mlm = kv.capture(explored.panels[0].mlm, [IMAGE])[0].layout, explored.panels[0].mlm
    shown, rects, slots, view, newline = buffers
    assert (about["width"], about["height"], about["tokens"], about["layers"], about["heads"]) == (60, 40, len(layout), 5, 4)
    assert about["point"] == [30, 20] and kv.explore(mlm, IMAGE, point=(7, 39)).answer("open")[0]["panels"][0]["point"] == [7, 39]
    with pytest.raises(kvutils.errors.DataError, match="point: the point .60, 3. is outside its image of 60 x 40 pixels"):
        kv.explore(mlm, IMAGE, point=(60, 3))
    for wrong in ((), (1, 2, 3, 4)):
        with pytest.raises(kvutils.errors.ParameterError, match="point: expected x, y in pixels, found"):
            kv.explore(mlm, IMAGE, point=wrong)
    assert Image.open(io.BytesIO(shown)).size == (60, 40) and about["can_ask"] and about["interventions"]
    np.testing.assert_array_equal(np.frombuffer(rects, "<f4").reshape(-1, 4), layout.rects.astype(np.float32))
    assert np.frombuffer(slots, "<i4").tolist() == layout.slots.tolist() and np.frombuffer(view, "<i4").tolist() == layout.view.tolist()
    assert np.frombuffer(newline, "u1").tolist() == layout.is_newline.tolist()
    assert {each["name"]: each["heads"] for each in about["sources"]} == {"pixels": None, "encoder": None, "projector": None, "key": 2, "value": 2}
    assert {each["name"] for each in about["sources"] if each["text"]} == {"projector", "value"} and about["context"]
    plain = kv.explore(mlm, IMAGE).answer("open")
    assert plain[1][1] == rects and not plain[0]["panels"][0]["context"]


def test_maps_are_those_of_the_library(explored):
    panel, layout = explored.panels[0], explored.panels[0].layout
    extractor, finest = panel.extractor, image_tokens(layout)
    features = extractor.images([("image", IMAGE)])[0]
    token = int(layout.token_at([[31, 22]])[0])
    for source, layer in (("value", 3), ("key", 0), ("encoder", None), ("projector", None), ("pixels", None)):
        name, of = source if layer is None else f"{source}.{layer}", {"source": source, "layer": layer, "head": None}
        reply = explored.answer("similar", {"panel": 0, "token": token} | of)
        assert reply[0]["token"] == token and np.isnan(floats(reply)[layout.is_newline]).all()
        np.testing.assert_allclose(floats(reply)[finest], similarity_to_point(features, name, (31, 22)), atol=5e-3)  # rounded to float16 there
        assert floats(reply)[token] == pytest.approx(1, abs=1e-5)
    one = floats(explored.answer("similar", {"token": token, "source": "value", "layer": 3, "head": 1}))
    tokens = kv.capture(panel.mlm, [IMAGE])[0].value(3, 1)[torch.from_numpy(~layout.is_newline)]
    assert not np.allclose(one[finest], floats(explored.answer("similar", {"token": token, "source": "value", "layer": 3}))[finest])
    colours = np.frombuffer(explored.answer("colours", {"source": "value", "layer": 3, "head": 1})[1][0], np.uint8).reshape(-1, 3)
    assert np.abs(colours[~layout.is_newline].astype(int) - pca_colours([tokens.numpy()])[0]).max() <= 1 and not colours[layout.is_newline].any()
    for source, layer in (("value", 2), ("projector", None)):
        name = source if layer is None else f"{source}.{layer}"
        expected = extractor.alignment.scores(features.features, ["the car"])[name][0]
        found = floats(explored.answer("words", {"text": " the car", "source": source, "layer": layer}))
        np.testing.assert_allclose(found[finest], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", KINDS)
def test_answers_and_attention_are_those_of_a_session(family, attention):
    explorer, mlm = kv.explore(tiny(family, attention=attention), IMAGE), tiny(family, attention=attention)
    found = explorer.answer("ask", {"question": QUESTION, "options": OPTIONS})[0]
    every = [floats(explorer.answer("attention", {"asked": found["asked"], "word": word["index"]})) for word in found["words"] if not word["answer"]]
    np.testing.assert_allclose(np.mean(every, axis=0), attention_mass(mlm, [IMAGE], [QUESTION]).mean((0, 1)), rtol=1e-4)
    reply = explorer.answer("attention", {"asked": found["asked"], "word": 2, "layer": 3, "head": 1})
    assert reply[0]["share"] == pytest.approx(floats(reply).sum()) and found["before"] is None
    selection = explorer.panels[0].selection(REGION)
    assert selection.mask.nonzero().tolist() == [[layer, 0, token] for layer in (0, 1) for token in (1, 2, 5)] and selection.layers == (1, 3)
    blocked = explorer.answer("ask", {"question": QUESTION, "options": OPTIONS, "block": REGION, "prefix": "a red fish"})[0]
    choices = {option: spellings(option) for option in OPTIONS}
    with kv.ImageSession(mlm, IMAGE) as plain, kv.ImageSession(mlm, IMAGE, "a red fish") as behind:
        before, now = plain.choose([QUESTION], choices)[0], behind.choose([QUESTION], choices, block=selection)[0]
    for said, expected in ((found, before), (blocked["before"], before), (blocked, now)):
        assert said["answer"] == expected.text
        assert said["probabilities"] == pytest.approx({option: np.exp(score) for option, score in expected.scores.items()})
        assert sum(said["probabilities"].values()) + said["rest"] == pytest.approx(1)
    assert blocked["probabilities"] != found["probabilities"]
    seen = [floats(explorer.answer("attention", {"asked": blocked["asked"], "word": 2, "layer": 3, "head": head})) for head in range(4)]
    assert [bool(each[[1, 2, 5]].any()) for each in seen] == [False, False, True, True]  # two query heads for each key-value head
    assert mlm.attention == explorer.panels[0].mlm.attention == attention


def test_views_of_one_explorer_have_questions_of_their_own(monkeypatch):
    """Two tabs, or one explorer shown twice: neither shows numbers of the other's question or picture."""
    explorer, sent = kv.explore(tiny_pocket(), IMAGE), []
    one, other = (explorer.answer("ask", {"question": text, "block": block})[0] for text, block in ((QUESTION, REGION), ("is there a bird", None)))
    seen = [explorer.answer("attention", {"asked": asked, "word": 2})[1][0] for asked in (one["asked"], other["asked"])]
    alone = kv.explore(tiny_pocket(), IMAGE)  # which also takes the memory of the first
    number = alone.answer("ask", {"question": QUESTION, "block": REGION})[0]["asked"]
    assert seen[0] == alone.answer("attention", {"asked": number, "word": 2})[1][0] != seen[1]
    assert explorer.answer("attention", {"asked": one["asked"], "word": 2})[1][0] == seen[0]  # read again, the question kept
    assert QUESTION in explorer.answer("code", {"state": {"mode": "attention", "asked": one["asked"], "word": 2}})[0]["text"]
    with pytest.raises(kv.errors.ParameterError, match="no longer held"):
        alone.answer("attention", {"asked": one["asked"], "word": 2})
    OTHERS[0].save(png := io.BytesIO(), "PNG")
    monkeypatch.setattr(Explorer, "send", lambda self, content, buffers=None: sent.append(content))
    for number, message in enumerate(({"op": "picture", "params": {"name": "mine.png"}}, {"op": "similar", "params": VALUE}, {"op": "open"})):
        explorer._handle_custom_msg({"id": number, "opened": 0} | message, [memoryview(png.getvalue())] * (number == 0))
    assert sent[1] == {"opened": 1} and "another view opened another picture" in sent[2]["error"]  # to all views; to the one that has not read it
    assert sent[0]["result"]["opened"] == sent[3]["result"]["opened"] == 1 and sent[3]["result"]["panels"][0]["title"] == "mine.png"
    explorer._handle_custom_msg({"id": 4, "opened": 1, "op": "similar", "params": VALUE}, [])
    assert sent[4]["ok"]


def test_an_answer_is_never_blank_and_unknown_words_are_named(monkeypatch):
    explorer = kv.explore(tiny_pocket(), IMAGE)
    found = explorer.answer("ask", {"question": "is this a roof?", "prefix": "a chimney , a red roof"})[0]
    assert found["unknown"] == ["chimney", "roof"] and found["answer"]
    assert explorer.answer("ask", {"question": QUESTION})[0]["unknown"] == []
    monkeypatch.setattr("kvutils.answer.end_tokens", lambda mlm: set(range(mlm.model.config.text_config.vocab_size)))
    assert explorer.answer("ask", {"question": QUESTION})[0]["answer"] == "(no answer: the model ends at once)"


def test_selections(explored):
    panel, real = explored.panels[0], int(explored.panels[0].real.sum())
    for kind in ("lowest", "random", "agnostic"):
        asked = {"kind": kind, "share": 0.25, "layers": [0, 2], "heads": None, "seed": 1}
        result, held = explored.answer("select", asked)[0], floats(explored.answer("select", asked))
        assert not held[panel.layout.is_newline].any() and 0 < held.sum() and result["share"] == pytest.approx(held.sum() / real)
        if kind != "agnostic":
            assert result["share"] == pytest.approx(0.25, abs=1 / real)
    lowest, others = panel.selection(asked | {"kind": "lowest"}).mask, panel.variance[[0, 2]][..., torch.from_numpy(panel.real)]
    mask = lowest[..., torch.from_numpy(panel.real)]
    assert all(others[row][mask[row]].max() <= others[row][~mask[row]].min() for row in (0, 1))
    one_head = explored.answer("select", asked | {"kind": "random", "heads": [1]})
    assert one_head[0]["share"] == pytest.approx(0.25, abs=1 / real) and set(floats(one_head)) <= {0.0, 0.5, 1.0}
    box = panel.selection({"kind": "region", "box": [0, 0, 60, 20], "layers": [1]})
    assert torch.equal(box.mask, kv.select_region(panel.mlm, panel.layout, [0, 0, 60, 20], 1).mask)


STATES = [
    {"mode": "similarity", "source": "value", "layer": 2, "head": 1, "token": 3}, {"mode": "similarity", "source": "encoder", "layer": 2, "token": 3},
    {"mode": "similarity", "source": "pixels", "token": 3}, {"mode": "colours", "source": "key", "layer": 4},
    {"mode": "words", "source": "value", "layer": 1, "text": "fish"},
    {"mode": "attention", "word": 1, "layer": 2}, {"mode": "attention", "word": 0, "head": 3},
    *({"mode": "selection", "question": QUESTION, "options": OPTIONS, "prefix": "a fish", "block": {"share": 0.2, "seed": 3, "layers": [0, 4]} | more}
      for more in ({"kind": "agnostic"}, {"kind": "lowest"}, {"kind": "random", "heads": [1]}, REGION, {"kind": "region", "box": [0, 0, 30, 40]})),
]  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=lambda state: f"{state['mode']}-{state.get('source') or state.get('block', state).get('kind', '')}")
def test_code_gives_the_same_numbers(explored, state, tmp_path, monkeypatch):
    """As it is copied, once the picture lies where its first line says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    IMAGE.save("picture", "PNG")
    panel = explored.panels[0]
    state = state | {"asked": explored.answer("ask", {"question": QUESTION, "options": OPTIONS, "block": REGION})[0]["asked"]}
    names, out = {"mlm": panel.mlm, "context": OTHERS}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(text := explored.answer("code", {"state": state})[0]["text"], names)
    assert "plt.imshow(" in text if state["mode"] != "selection" else out.getvalue().startswith(names["answer"].text)
    assert all(text.count(line.split()[-1]) > 1 for line in text.split("\n\n")[0].splitlines()), text  # nothing imported in vain
    op = {"similarity": "similar", "selection": "select"}.get(state["mode"], state["mode"])
    shown = explored.answer(op, state.get("block") or state)[1][0]
    real = panel.real
    if op == "select":
        assert torch.equal(names["selection"].mask, panel.selection(state["block"]).mask)
        said = explored.answer("ask", {name: state[name] for name in ("question", "options", "prefix", "block")})[0]
        assert said["probabilities"] == pytest.approx({option: np.exp(score) for option, score in names["answer"].scores.items()})
    elif op == "colours":
        np.testing.assert_array_equal(names["colours"], np.frombuffer(shown, np.uint8).reshape(-1, 3)[real])
    else:
        np.testing.assert_allclose(np.asarray(names[state["mode"]])[real], np.frombuffer(shown, "<f4")[real], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "options", "view", "said"), [
    ("pocket-qwen", {"max_pixels": 4000}, {}, "kv.load_mlm('pocket-qwen', max_pixels=4000)"),
    ("pocket-qwen", {"dtype": "bfloat16", "attention": "eager"}, {}, "kv.load_mlm('pocket-qwen', dtype='bfloat16', attention='eager')"),
    ("pocket-next", {}, {"base_view_only": True}, "kv.load_mlm('pocket-next')\nmlm = replace(mlm, base_view_only=True)")])
def test_code_loads_the_model_as_it_was_explored(name, options, view, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    IMAGE.save("picture", "PNG")
    explored, state = kv.explore(replace(kv.load_mlm(name, device="cpu", **options), **view), IMAGE), {"source": "value", "layer": 3, "token": 5}
    text = explored.answer("code", {"state": state | {"mode": "similarity"}})[0]["text"]
    assert f"mlm = {said}\n" in text
    exec(text, names := {})
    real = explored.panels[0].real
    np.testing.assert_allclose(np.asarray(names["similarity"])[real], floats(explored.answer("similar", state))[real], rtol=1e-4, atol=1e-6)


def test_two_models_or_two_pictures_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    wide = kv.explore([tiny_onevision(), tiny_pocket()], IMAGE)
    about = wide.answer("open")[0]["panels"]
    assert [each["title"] for each in about] == ["tiny-llava_onevision (in memory)"] * 2 and [each["tokens"] for each in about] == [70, 17]
    for origin, other in ((0, 1), (1, 0)):
        here, there = wide.panels[origin].layout, wide.panels[other].layout
        token = int(here.token_at([[50, 30]])[0])
        found = wide.answer("similar", {"panel": other, "from": origin, "token": token, "source": "value", "layer": 1})
        assert found[0]["token"] == there.token_at(here.centers[[token]])[0] and floats(found)[found[0]["token"]] == pytest.approx(1, abs=1e-5)
    mlm, turned = tiny_pocket(), IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pair = kv.explore(mlm, [IMAGE, IMAGE])
    found = pair.answer("similar", {"panel": 1, "from": 0, "token": 6, "source": "value", "layer": 1})
    assert found[0]["token"] == 6 and floats(found)[6] == pytest.approx(1, abs=1e-5)  # the same picture, the same token
    apart, together = (kv.explore(mlm, images).answer("colours", {"source": "value", "layer": 1})[1][0] for images in (IMAGE, [IMAGE, turned]))
    assert apart != together
    png = io.BytesIO()
    turned.save(png, "PNG")
    panels, _ = pair.answer("picture", {"panel": 1, "name": "mine.png"}, [memoryview(png.getvalue())])
    assert [each["title"] for each in panels["panels"]] == ["images[0]", "mine.png"]
    IMAGE.save("images[0]", "PNG")
    Path("mine.png").write_bytes(png.getvalue())
    of = {"panel": 1, "from": 0, "token": 6, "source": "value", "layer": 1}
    for mode in ("similarity", "colours"):
        exec(pair.answer("code", {"state": of | {"mode": mode}})[0]["text"], names := {"mlm": mlm})
        if mode == "similarity":
            np.testing.assert_allclose(names[mode][:16], floats(pair.answer("similar", of))[:16], atol=1e-6)  # the last is a newline
    np.testing.assert_array_equal(names["colours"], np.frombuffer(pair.answer("colours", of)[1][0], np.uint8).reshape(-1, 3)[:16])


def test_a_tower_beside_the_model(tmp_path, monkeypatch):
    explorer = kv.explore(tiny_onevision(), IMAGE, encoder=(tower := tiny_siglip()))
    panel, (about,) = explorer.panels[0], explorer.answer("open")[0]["panels"]
    assert about["sources"][1] == {"name": "encoder_original", "label": "SigLIP", "text": False, "layers": None, "heads": None}
    found = floats(explorer.answer("similar", {"token": int(panel.layout.token_at([[31, 22]])[0]), "source": "encoder_original"}))
    expected = similarity_to_point(panel.extractor.images([("image", IMAGE)])[0], "encoder_original", (31, 22))
    np.testing.assert_allclose(found[image_tokens(panel.layout)], expected, atol=5e-3)
    IMAGE.save(tmp_path / "picture", "PNG")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    state = {"mode": "similarity", "source": "encoder_original", "token": int(panel.layout.token_at([[31, 22]])[0])}
    exec(explorer.answer("code", {"state": state})[0]["text"], names := {"mlm": panel.mlm, "encoder": tower})
    np.testing.assert_allclose(names["similarity"].cpu().numpy()[panel.real], found[panel.real], atol=1e-5)


VALUE = {"token": 1, "source": "value", "layer": 1}
ASKED = {"question": QUESTION}
MISTAKES = [
    ("fly", {}, "unknown request of the explorer 'fly'"), (None, {}, "unknown request"),
    *(("similar", VALUE | wrong, words) for wrong, words in (
        ({"token": 999}, "999"), ({"token": 16}, "newlines"), ({"token": "3"}, "whole number"), ({"source": "values"}, "did you mean 'value'"),
        ({"layer": 5}, "unknown layer of the values 5"), ({"layer": None}, "layer"), ({"head": 2}, "key-value head 2"), ({"panel": 1}, "panel 1"))),
    *(("words", {"text": "fish", "source": "value", "layer": 1} | wrong, words) for wrong, words in (
        ({"source": "pixels"}, "no text side; choose projector or values"), ({"source": "key"}, "no text side"), ({"text": " "}, "a word"))),
    *(("ask", ASKED | wrong, words) for wrong, words in (
        ({"question": ""}, "question"), ({"question": None}, "question"), ({"options": []}, "options must be"),
        ({"options": "yes"}, "options must be"),
        ({"options": ["red", "red"]}, "options must be"), ({"options": ["no", "yes", "Yes"]}, "with 'yes' may also begin with 'Yes'"),
        ({"options": ["red fish", "blue", "red"]}, "count for both"), ({"block": {"kind": "best"}}, "kind of selection 'best'"))),
    ("attention", {"asked": "last", "word": 99}, "word of the question"), ("attention", {"asked": "last", "word": 0, "layer": 5}, "layer 5"),
    ("attention", {"asked": 0, "word": 0}, "no longer held"),
    *(("select", {"share": 0.1, "seed": 0, "tokens": [1]} | wrong, words) for wrong, words in (
        ({"kind": "best"}, "kind of selection 'best'"), ({"kind": "lowest"}, "context=[...]"), ({"kind": "agnostic"}, "context=[...]"),
        ({"kind": "random", "share": 0}, "share"), ({"kind": "random", "seed": None}, "seed"), ({"kind": "region", "tokens": []}, "no key"),
        ({"kind": "region", "layers": [9]}, "layer 9"), ({"kind": "region", "heads": [7]}, "key-value head 7"),
        ({"kind": "region", "box": [0, 0, 99, 99]}, "box"))),
    ("picture", {"name": "x.png"}, "bytes of one picture"), ("code", {"state": {"mode": "dream"}}, "mode 'dream'"),
]  # fmt: skip


def test_mistakes_are_one_sentence_and_the_widget_lives(monkeypatch):
    explorer, sent = kv.explore(tiny_pocket(), IMAGE), []
    monkeypatch.setattr(Explorer, "send", lambda self, content, buffers=None: sent.append((content, buffers)))
    explorer._handle_custom_msg({"id": 0, "op": "attention", "params": {"word": 0}}, [])
    assert "ask a question first" in sent.pop()[0]["error"]
    explorer._handle_custom_msg({"id": 1, "op": "ask", "params": {"question": QUESTION}}, [])
    assert (asked := sent.pop()[0]["result"])["probabilities"] == {}
    for number, (op, params, words) in enumerate(MISTAKES):
        params = params | {"asked": asked["asked"]} if params.get("asked") == "last" else params
        explorer._handle_custom_msg({"id": number, "op": op, "params": params}, [])
        content, buffers = sent.pop()
        assert not content["ok"] and content["id"] == number and buffers == [] and words in content["error"], (op, params, content)
        assert "\n" not in content["error"] and "internal" not in content["error"], content
    for data in (b"", b"no picture", base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAE=")):
        explorer._handle_custom_msg({"id": 1, "op": "picture", "params": {"name": "x.png"}}, [memoryview(data)])
        assert "x.png" in sent.pop()[0]["error"]
    monkeypatch.setattr("kvutils.explorer.panel.token_attention", lambda *_: 1 / 0)
    for content in ({"id": 2, "op": "attention", "params": {"asked": asked["asked"], "word": 0}}, {"id": 2, "op": "similar", "params": [1]}, "nonsense"):
        explorer._handle_custom_msg(content, [])
        assert not sent.pop()[0]["ok"]
    explorer._handle_custom_msg({"id": 3, "op": "similar", "params": {"panel": 0, "token": 1, "source": "value", "layer": 1}}, [])
    assert sent.pop()[0]["ok"]


@pytest.mark.parametrize(("models", "images", "words"), [
    ("pocket", "a", "expected a model"), ([], "a", "one or two models"), ("m", [], "one or two models"), ("m", ["a"] * 3, "found 1 and 3"),
    ("mm", "aa", "found 2 and 2"), ("m", "missing.jpg", "missing.jpg"),
])  # fmt: skip
def test_what_cannot_be_explored_is_an_error_of_the_cell(models, images, words):
    mlm = tiny_pocket()
    models = [mlm] * len(models) if models in ("m", "mm") else models
    images = images if images == "missing.jpg" else [IMAGE] * len(images)
    with pytest.raises(kv.errors.KVUtilsError, match=words):
        kv.explore(models, images)
    with pytest.raises(kv.errors.KVUtilsError, match="context must be a list"):
        kv.explore(mlm, IMAGE, context=IMAGE)


def test_a_model_that_fails_leaves_nothing_behind():
    before = len(widgets())
    with pytest.raises(kv.errors.ImageError, match="too thin"):
        kv.explore(tiny("qwen2_5_vl"), picture(900, 4))
    assert len(widgets()) == before
    broken = tiny_pocket()
    with torch.no_grad():
        broken.model.model.language_model.layers[2].self_attn.v_proj.bias.fill_(float("nan"))
    explorer = kv.explore(broken, IMAGE)
    assert "image/png" not in explorer._repr_mimebundle_()[0]
    with pytest.raises(kv.errors.ModelError, match="not finite in layer 2"):
        explorer.answer("similar", VALUE | {"layer": 2})
    assert explorer.answer("similar", VALUE)[1]


def widgets() -> list:
    return [each for each in gc.get_objects() if type(each) is Explorer and each.comm is not None]


def test_memory_is_freed_and_read_again_when_it_is_needed():
    first = kv.explore(tiny_pocket(), IMAGE)
    first.answer("ask", {"question": QUESTION})

    def held(explorer):
        panel = explorer.panels[0]
        return [weakref.ref(each) for each in (panel.read()[1].values, panel.session().continued().prefix.keys_values[0][0])]

    before, refs = first.answer("similar", {"token": 1, "source": "value", "layer": 1})[1], held(first)
    second = kv.explore(tiny_pocket(), IMAGE)  # another one takes the memory
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert first.answer("similar", {"token": 1, "source": "value", "layer": 1})[1] == before  # and an earlier view still works
    for close in (lambda: second.answer("close"), second.close):
        second.answer("ask", {"question": QUESTION})
        refs = held(second)
        close()
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
    with pytest.raises(kv.errors.ParameterError, match="closed"):
        second.answer("open")
    assert repr(second) == "Explorer(closed)" and repr(first) == "Explorer(17 image tokens of picture in tiny-llava_onevision)"


def test_a_reader_without_a_kernel_sees_a_picture():
    data, _ = kv.explore(tiny_onevision(), [IMAGE, OTHERS[0]])._repr_mimebundle_()
    shown = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert shown.width > 800 and np.asarray(shown.convert("L")).std() > 20 and "application/vnd.jupyter.widget-view+json" in data
