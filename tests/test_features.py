"""Feature sources, text-aligned scores and saliency, each against a direct computation."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer
from torch.nn.functional import normalize
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward
from transformers.utils import import_utils
from word_tokenizer import WORDS as POCKET_WORDS
from word_tokenizer import build_word_tokenizer

from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.datasets.refcoco import CATEGORIES
from kvutils.datasets.samples import KeypointPair
from kvutils.errors import ModelError, ParameterError
from kvutils.kvcache import capture
from kvutils.language import EXACT
from kvutils.models import Encoder
from kvutils.readout import words
from kvutils.readout.attention import prompt_saliency
from kvutils.readout.encoders import capture_encoder
from kvutils.readout.features import FeatureExtractor, image_tokens, pixel_features, token_means
from kvutils.readout.maps import picture as picture_of
from kvutils.readout.words import COCO_NAMES, POCKET_NAMES, SiglipText, load_siglip_text, text_values, vocabulary_of
from kvutils.run.notebook import Run
from kvutils.store import write_json
from kvutils.tasks import value_flow
from kvutils.tasks.base import run_task
from kvutils.tasks.correspondence import SemanticCorrespondence
from kvutils.tasks.text_segmentation import ReferringSegmentation
from kvutils.vision import prepare_images
from tests.tiny_models import FAMILIES, WORDS, grid_layout, tiny, tiny_onevision, tiny_pocket, tiny_siglip

RNG = np.random.default_rng(0)


def picture(width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


ITEMS = [(f"image {i}", picture()) for i in range(3)]


def siglip(hidden: int = 24, layers: int = 2) -> SiglipModel:
    shape = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 3}
    tokens = {"vocab_size": 40, "max_position_embeddings": 8, "projection_size": hidden, "pad_token_id": 0}
    text = SiglipTextConfig(**shape, **tokens, bos_token_id=2, eos_token_id=2).to_dict()
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8})).eval()


@pytest.fixture(scope="module")
def pocket():
    torch.manual_seed(1)
    mlm, both = tiny_pocket(), siglip()
    encoder = Encoder(both.vision_model, tiny_siglip(side=32).processor, "tiny", "in memory")
    text = SiglipText(both.text_model, build_word_tokenizer(WORDS))
    return FeatureExtractor(mlm, tiny_pocket(seed=7), encoder, encoder_text=text)


def test_sources_and_shapes(pocket):
    features = pocket.images(ITEMS)
    expected = ["pixels", "encoder_original", "encoder", "projector"]
    expected += [f"{family}.{n}" for family in ("value", "key", "untrained.value") for n in range(pocket.mlm.num_layers)]
    assert pocket.sources == expected == list(features[0].features)
    assert "16 image tokens of a 32x32 picture; channels: pixels 5, encoder_original 24" in repr(features[0])
    for one in features:
        assert not one.layout.is_newline.any() and len(one.layout) == 16
        assert all(t.shape[0] == 16 and t.dtype == torch.float16 for t in one.features.values())
    groups = features[0].by_width(pocket.sources)
    assert sorted(sum(groups, [])) == sorted(expected)
    for names in groups:
        stack = features[0].stack(names)
        assert stack.shape[:2] == (len(names), 16) and stack.dtype == torch.float32
    with pytest.raises(ParameterError, match="value.9"):
        features[0].by_width(["value.9"])


def test_features_are_the_captured_ones(pocket):
    (one,) = capture(pocket.mlm, [ITEMS[1][1]])
    (control,) = capture(pocket.untrained, [ITEMS[1][1]])
    (original,) = capture_encoder(pocket.encoder_original, pocket.mlm, [ITEMS[1][1]])
    direct = {"encoder": one.encoder, "projector": one.projector, "encoder_original": original, "value.2": one.value(2),
              "key.1": one.key(1), "untrained.value.3": control.value(3)}  # fmt: skip
    features = pocket.images(ITEMS)[1]
    for source, tensor in direct.items():
        expected = tensor[image_tokens(one.layout)]
        torch.testing.assert_close(features.features[source].float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_one_full_grid(family):
    extractor = FeatureExtractor(tiny(family), layers=[1, 3], keys=False)
    items = [("wide", picture(90, 50)), ("tall", picture(40, 80))]
    for (_, image), one in zip(items, extractor.images(items), strict=True):
        assert one.layout.image_size == image.size
        rows, columns = (len(np.unique(one.layout.cells[:, axis])) for axis in (0, 1))
        assert len(one.layout) == rows * columns
        assert one.layout.to_pixels(one.features["value.3"].float().T).shape[1:] == image.size[::-1]
    assert extractor.sources == ["pixels", "encoder", "projector", "value.1", "value.3"]
    assert set(extractor.alignment.sources) >= {"projector", "value.1", "lens.value.3"}
    scores = extractor.alignment.scores(one.features, ["fish", "red car"])
    assert all(score.shape == (2, len(one.layout)) for score in scores.values())
    names, values = extractor.alignment.vocabulary, one.features["value.3"].float().T
    assert names == ("fish", "car")
    common = text_values(extractor.mlm, names, [3]).flatten(1).mean(0) @ values
    torch.testing.assert_close(scores["value.3"] + common, scores["uncentred.value.3"], rtol=1e-3, atol=1e-3)
    assert 0 <= extractor.saliency(items[0]).min() and extractor.saliency(items[0]).max() == 1


def test_pixel_features_are_means_and_positions():
    image = picture(10, 6)
    features = pixel_features(grid_layout(2, 5, (10, 6)), image)
    block = np.asarray(image)[3:6, 2:4].reshape(-1, 3).mean(0) / 127.5 - 1
    assert np.allclose(features[6], [*block, 2 * 3 / 10 - 1, 2 * 4.5 / 6 - 1])


def test_token_means_of_tokens_smaller_than_a_pixel():
    planes = RNG.random((3, 4, 2))
    assert np.allclose(token_means(grid_layout(9, 12, (4, 3)), planes).reshape(3, 3, 4, 3, 2).mean((1, 3)), planes)


def test_memory_is_limited_and_gives_the_same_bytes(pocket):
    plain, small = (FeatureExtractor(pocket.mlm, layers=[0, 2], memory_bytes=most) for most in (None, 1))
    for _ in range(2):  # what was dropped comes back the same
        for one, other in zip(plain.images(ITEMS), small.images(ITEMS), strict=True):
            assert all(torch.equal(one.features[s], other.features[s]) for s in one.features)
    assert "3 images in memory" in repr(plain) and "1 images in memory" in repr(small)
    assert "tiny" in repr(plain) and "7 sources, layers 0-2" in repr(plain)


def test_only_what_is_missing_is_read(monkeypatch, pocket):
    (whole,) = FeatureExtractor(pocket.mlm, pocket.untrained, layers=[1]).images(ITEMS[:1])
    extractor, read = FeatureExtractor(pocket.mlm, pocket.untrained, layers=[1]), []
    monkeypatch.setattr(extractor, "_read", lambda *given, plain=extractor._read: read.append(given[-1]) or plain(*given))
    extractor.images(ITEMS[:1], sources=["encoder", "value.1", "untrained.value.1"])
    (one,) = extractor.images(ITEMS[:1])
    assert read == [{"encoder", "value.1", "untrained.value.1"}, {"pixels", "projector", "key.1"}]
    assert one.features.keys() == whole.features.keys() and all(torch.equal(one.features[s], whole.features[s]) for s in whole.features)


def test_stacks_are_kept_small(monkeypatch, pocket):
    image, names = pocket.images(ITEMS)[0], [f"value.{layer}" for layer in range(5)]
    width = image.features["value.0"].shape[1]
    assert image.by_width(names) == image.by_width(names, rows=100) == [names]
    monkeypatch.setattr("kvutils.readout.features.STACK_BYTES", 2 * 4 * width * 100)
    assert image.by_width(names, rows=100) == [names[:2], names[2:4], names[4:]]
    assert image.by_width(names, rows=10**9) == [[name] for name in names]
    assert image.stack(names).device == pocket.mlm.device


def test_processes_of_one_machine_share_its_memory(monkeypatch, pocket):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    quarter = FeatureExtractor(pocket.mlm).memory_bytes
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert 3 < FeatureExtractor(pocket.mlm).memory_bytes / quarter < 5


@pytest.mark.parametrize("change", [{"name": "x"}, {"revision": "x"}, {"base_view_only": False}, {"max_pixels": 100},
                                    "dtype", "attention", "image_backend"])  # fmt: skip
def test_features_and_parts_depend_on_every_setting_of_the_model(change, tmp_path, monkeypatch):
    monkeypatch.setenv("KVUTILS_CACHE", str(tmp_path))
    mlm = tiny_pocket()

    def stored():
        return FeatureExtractor(mlm).fingerprint, Run("01").parts(mlm, {}, seed=0).folder, mlm.settings

    before = stored()
    assert before == stored() and before[2].keys() >= {"dtype", "attention", "image_backend"}
    if change == "dtype":
        mlm.model.to(torch.bfloat16)
    elif change == "attention":
        mlm.model.set_attn_implementation("eager")
    elif change == "image_backend":  # read from the processor when an MLM is made
        mlm.image_backend = "torchvision"
    else:
        mlm = replace(mlm, **change)
    assert all(old != new for old, new in zip(before, stored(), strict=True))


def test_parts_depend_on_the_data_and_where_they_are_read_from(whole, tmp_path, monkeypatch):
    """Samples of another size, or of the hub's copy, have the same ids."""
    monkeypatch.setenv("KVUTILS_CACHE", str(tmp_path))
    monkeypatch.setenv("KVUTILS_DATA", str(whole))
    mlm, run = tiny_pocket(), Run("05_blink_gap", "paper")
    others = [run.parts(mlm, {}), run.parts(mlm, {"blink": {"max_items": 4}}), run.parts(mlm, {}, image_size=[9, 9])]
    monkeypatch.setattr("kvutils.run.notebook.data_sources", lambda *_: {"data": {"blink": "hub: BLINK at abc"}})
    assert len({each.folder for each in (*others, run.parts(mlm, {}))}) == 4
    assert Run("01_value_flow").parts(mlm, {}).folder == Run("02_siglip_baseline").parts(mlm, {}).folder  # 02 reads what 01 stored


def test_a_picture_has_its_sources_though_memory_is_short(pocket):
    """Of two pictures in memory the first grows and drives the second out, before that one has its new source."""
    asked = [["value.0"], ["value.0", "value.1"]]
    one = FeatureExtractor(pocket.mlm).images(ITEMS[:1], sources=asked[0])[0].nbytes
    extractor = FeatureExtractor(pocket.mlm, memory_bytes=int(2.5 * one))
    for sources in asked:
        for found, (_, shown) in zip(extractor.images(ITEMS[:2], sources=sources), ITEMS[:2], strict=True):
            assert set(found.features) == set(sources)
            fresh = FeatureExtractor(pocket.mlm).images([("again", shown)], sources=sources)[0]
            assert all(torch.equal(found.features[source], fresh.features[source]) for source in sources)


def test_results_of_other_weights_are_not_written_over(tmp_path, monkeypatch):
    """Folders of checkpoints are often called alike."""
    monkeypatch.setenv("KVUTILS_CACHE", str(tmp_path))
    monkeypatch.setenv("KVUTILS_OUT", str(tmp_path))
    mlm, run = tiny_pocket(), Run("05_blink_gap", model="/a/checkpoint-1000")
    write_json(tmp_path / "data/results/pocket/checkpoint-1000/provenance/05_blink_gap.json", {"revision": mlm.revision})
    assert run.parts(mlm, {}).folder.parts[-3:-1] == ("checkpoint-1000", "parts")
    untrained = replace(mlm, revision="untrained seed 0")  # the control of a later run of the same folder
    assert run.parts(untrained, {}).folder.parts[-3] == "checkpoint-1000"
    with pytest.raises(ParameterError, match=f"holds results of other weights .{mlm.revision}; /a/checkpoint-1000 has 9."):
        run.parts(replace(mlm, revision="9"), {})
    monkeypatch.setenv("RANK", "1")  # of several processes only the first writes results; what others left of another run stays unread
    assert run.parts(replace(mlm, revision="9"), {}).folder.parts[-3] == "checkpoint-1000"


def test_the_fingerprint_names_what_features_depend_on(pocket):
    others = [FeatureExtractor(pocket.mlm, layers=[1]), FeatureExtractor(pocket.mlm, pocket.untrained), pocket,
              FeatureExtractor(replace(pocket.mlm, max_pixels=100))]  # fmt: skip
    own, again = (FeatureExtractor(pocket.mlm).fingerprint for _ in range(2))
    assert own == again and len({own, *(other.fingerprint for other in others)}) == 5


def test_a_picture_is_read_once_whatever_its_name_and_prefixes_apart(pocket, monkeypatch):
    calls = mock.Mock(wraps=pocket._read)
    monkeypatch.setattr(pocket, "_read", calls)
    fresh = picture()
    found = pocket.images([("a", fresh), ("b", fresh.copy())], sources=["value.1"])
    assert found[0] is found[1] and list(found[0].features) == ["value.1"] and calls.call_count == 1
    pocket.images([("a", fresh)], "a fish", ["value.1"])
    assert calls.call_count == 2 and len(pocket.images([("a", fresh)])[0].features) == len(pocket.sources) and calls.call_count == 3


def test_pictures_that_come_next_share_a_pass_and_a_bad_one_spoils_its_own_sample_alone(monkeypatch):
    mlm, point, box = tiny("qwen2_5_vl"), np.array([[3.0, 3]]), np.array([0, 0, 32, 32.0])
    shown = [*(picture(32 + 16 * (i % 2)) for i in range(4)), picture(804, 4)]
    pairs = [KeypointPair(f"{i}", "cat", "s", shown[0], point, f"t{i}", each, point, box) for i, each in enumerate(shown)]
    tables, passes = [], []
    for memory in (None, 0):  # where nothing is kept, nothing is read ahead
        extractor = FeatureExtractor(mlm, keys=False, memory_bytes=memory)
        monkeypatch.setattr(extractor, "_read", calls := mock.Mock(wraps=extractor._read))
        tables.append(run_task(SemanticCorrespondence(pairs), extractor, progress=False))
        passes.append(max(len(call.args[0]) for call in calls.call_args_list))
    assert passes[0] > 1 == passes[1] and tables[0].ids == tables[1].ids == ["0", "1", "2", "3"]
    assert all("too thin" in table.skipped["4"] for table in tables)
    np.testing.assert_array_equal(*(table.values for table in tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_exceeds_half_precision_is_kept_as_the_model_wrote_it(dtype):
    mlm = tiny("qwen2_5_vl")
    with torch.no_grad():
        mlm.model.model.visual.blocks[-1].mlp.down_proj.weight[3] *= 3e6  # one channel, as massive activations are
    mlm.model.to(dtype)
    (one,) = FeatureExtractor(mlm).images(ITEMS[:1])
    assert one.features["encoder"].dtype == dtype and one.features["encoder"].abs().max() > 65504
    assert one.features["value.0"].dtype == torch.float16 and not one.not_finite
    image = ITEMS[0][1]
    pair = KeypointPair("p", "cat", "a", image, np.array([[3.0, 3]]), "b", image, np.array([[3.0, 3]]), np.array([0, 0, 32, 32.0]))
    table = run_task(SemanticCorrespondence([pair]), FeatureExtractor(mlm), progress=False)
    assert table.of("encoder")[0, 1] == 1 and not table.left_out


def test_a_source_that_is_not_finite_is_left_out_and_the_others_are_not():
    mlm = tiny_pocket()
    with torch.no_grad():
        mlm.model.model.language_model.layers[-1].self_attn.v_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"image 0: value.\d of .* NaN or Inf in torch.float32"):
        FeatureExtractor(mlm, keys=False).images(ITEMS[:1])
    point, box = np.array([[3.0, 3]]), np.array([0, 0, 32, 32.0])
    pairs = [KeypointPair(name, "cat", name, image, point, ITEMS[0][0], ITEMS[0][1], point, box) for name, image in ITEMS]
    table = run_task(SemanticCorrespondence(pairs), FeatureExtractor(mlm), progress=False)
    last = f"value.{mlm.num_layers - 1}"
    assert table.left_out == {last: 3} and last not in table.sources and len(table) == 3 and not table.skipped


def test_arguments_are_checked(pocket):
    for options, message in (({"layers": [99]}, "layers"),
                             ({"encoder_text": pocket.alignment.encoder_text}, "encoder_original")):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            FeatureExtractor(pocket.mlm, **options)


def test_maps_of_one_image(pocket):
    (name, image), others = ITEMS[0], dict(ITEMS[1:])
    scene = picture_of(pocket, name, image, (9, 30), others)
    assert scene["clicked"] == 13 and list(scene["similarity"]) == [s for s in scene["pca"]]
    for source, colours in scene["pca"].items():
        grid = np.array(scene["similarity"][source])
        assert grid.shape == (4, 4) and grid[3, 1] == grid.max() == 1 and np.shape(colours) == (4, 4, 3)


TEXTS = ["fish", "the red car"]


def test_text_scores_are_dot_products_with_centred_values_and_embeddings(pocket):
    features, names = pocket.images(ITEMS)[0], ["fish", "car"]  # of the pocket world's, those that this tokenizer knows
    assert list(pocket.alignment.vocabulary) == names
    scores = pocket.alignment.scores(features.features, TEXTS)
    for mlm, prefix, beside in ((pocket.mlm, "", "uncentred."), (pocket.untrained, "untrained.", None)):
        texts, bare, behind = (text_values(mlm, each).flatten(2) for each in (TEXTS, names, ["the fish", "the car"]))  # (texts, L, G * D)
        common = torch.stack([bare.mean(0), behind.mean(0)])  # of names, and of those behind the article of "the red car"
        for layer in pocket.layers:
            image = features.features[f"{prefix}value.{layer}"].float().T
            for start, centre in (("", common[:, layer]), *([(beside, 0)] if beside else [])):
                expected = (texts[:, layer] - centre) @ image
                torch.testing.assert_close(scores[f"{start}{prefix}value.{layer}"], expected, rtol=1e-4, atol=1e-4)
    rows = pocket.mlm.model.get_input_embeddings().weight
    text, *common = (rows[pocket.mlm.tokenizer(each)["input_ids"]].mean(0) for each in ("the red car", "the fish", "the car"))
    for source, vector in {"projector": text - sum(common) / 2, "uncentred.projector": text}.items():
        torch.testing.assert_close(scores[source][1], features.features["projector"].float() @ vector)
    assert list(scores) == pocket.alignment.sources


@torch.no_grad()
def test_what_all_texts_share_changes_no_centred_score_and_no_choice_of_a_name(pocket, monkeypatch):
    """A constant on all text values, as anisotropy is: it moves the uncentred maps alone; the name with the largest score stays."""
    image, names = pocket.images(ITEMS)[0].features, ["fish", "red car", "blue picture"]
    before = pocket.alignment.scores(image, names)
    monkeypatch.setattr(words, "text_values", lambda *given, **options: text_values(*given, **options) + 3)
    after = FeatureExtractor(pocket.mlm, pocket.untrained).alignment.scores(image, names)
    for layer in pocket.layers:
        source = f"value.{layer}"
        torch.testing.assert_close(after[source], before[source], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(after[f"uncentred.{source}"], before[f"uncentred.{source}"], rtol=0.1, atol=0.1)
        assert torch.equal(before[source].argmax(0), before[f"uncentred.{source}"].argmax(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_published_tokenizers_spell_the_vocabulary(published, family):
    mlm = published(family)
    own, beside = (FeatureExtractor(mlm, layers=[1], keys=False).alignment.text("a left car")[name] for name in ("value.1", "uncentred.value.1"))
    names = [f"a {name}" for name in COCO_NAMES]
    assert vocabulary_of(mlm) == COCO_NAMES
    torch.testing.assert_close(own, beside - text_values(mlm, names, [1]).flatten(1).mean(0), rtol=1e-3, atol=1e-4)


def test_the_vocabulary_is_that_of_the_model_and_never_of_the_data():
    assert list(COCO_NAMES) == list(CATEGORIES.values()) and POCKET_NAMES == CLASSES
    assert vocabulary_of(tiny_pocket(words=list(POCKET_WORDS))) == POCKET_NAMES
    spelled = tiny_pocket(words=[*WORDS, *" ".join(COCO_NAMES).split()])
    assert vocabulary_of(spelled) == COCO_NAMES
    own, other = FeatureExtractor(spelled), FeatureExtractor(spelled, vocabulary=["cat", "dog"])
    assert own.fingerprint != other.fingerprint and own.fingerprint == FeatureExtractor(spelled, vocabulary=COCO_NAMES).fingerprint
    assert not torch.allclose(own.alignment.text("cat")["value.2"], other.alignment.text("cat")["value.2"])
    assert other.alignment.names_like("A cat on the left") == ("a cat", "a dog")
    assert [other.alignment.names_like(each) for each in ("cat", "the", "left cat")] == 3 * [("cat", "dog")]
    with pytest.raises(ParameterError, match=r"centred over names .* found \['fish'\].*vocabulary="):
        FeatureExtractor(tiny_pocket(words=["fish", "red", "the"])).alignment.text("red fish")


@torch.no_grad()
def test_the_lens_is_what_the_modules_give(pocket):
    """Attention that puts its full weight on one image token, through the model's own modules."""
    mlm, layer, token = pocket.mlm, 2, 5
    language_model = mlm.model.model.language_model
    features = pocket.images(ITEMS)[0]
    values = features.features[f"value.{layer}"][token].float().view(mlm.num_kv_heads, mlm.head_dim)
    per_query_head = [values[head // (mlm.num_heads // mlm.num_kv_heads)] for head in range(mlm.num_heads)]
    added = language_model.layers[layer].self_attn.o_proj(torch.cat(per_query_head))
    logits = mlm.model.lm_head(language_model.norm(added))
    text, *common = (logits[mlm.tokenizer(each)["input_ids"]].mean() for each in ("the red car", "the fish", "the car"))
    expected = text - sum(common) / 2
    torch.testing.assert_close(pocket.alignment.scores(features.features, TEXTS)[f"lens.value.{layer}"][1, token], expected)


@torch.no_grad()
def test_encoder_scores_use_the_pooling_head_on_single_patches(pocket):
    features = pocket.images(ITEMS)[0]
    scores = pocket.alignment.scores(features.features, TEXTS)
    vision, text = pocket.encoder_original.model, pocket.alignment.encoder_text
    red, fish, car = ["a", "red", "car"], ["a", "fish"], ["a", "car"]  # with the template, padded to the full length
    ids = torch.tensor([text.tokenizer.encode(" ".join(each)) + [0] * (8 - len(each)) for each in (red, fish, car)])
    plain, *names = normalize(text.model(input_ids=ids).pooler_output, dim=-1)
    for source in ("encoder_original", "encoder"):
        patch = features.features[source][3].float()
        pooled = vision.head(vision.post_layernorm(patch)[None, None])[0]
        for name, vector in {source: plain - sum(names) / 2, f"uncentred.{source}": plain}.items():
            torch.testing.assert_close(scores[name][1, 3], normalize(pooled, dim=-1) @ vector)


@torch.no_grad()
def test_text_scores_of_a_cut_tower_are_those_of_the_last_layer(pocket):
    """LLaVA-OneVision's tower is SigLIP without its last layers: features are compared at its depth, the pooling head, which
    was trained on the last layer, reads that."""
    mlm, both = tiny_pocket(), siglip(layers=5)  # the MLM's own tower has 3 layers
    vision, own = both.vision_model, mlm.model.model.vision_tower
    extractor = FeatureExtractor(mlm, None, replace(pocket.encoder_original, model=vision), encoder_text=SiglipText(
        both.text_model, build_word_tokenizer(WORDS)), keys=False)  # fmt: skip
    task = ReferringSegmentation([])
    read = {task.reads(source, extractor) for source in task.sources(extractor)}
    assert {"head.encoder", "head.encoder_original", "value.1"} <= read and not {"encoder", "encoder_original"} & read
    assert {task.reads(source, extractor) for source in ("lens.value.1", "shuffled.value.1", "uncentred.value.1")} == {"value.1"}
    assert task.reads("uncentred.encoder", extractor) == "head.encoder" and "head.encoder" not in extractor.sources
    (one,) = extractor.images(ITEMS[:1], sources=[*extractor.sources, *read])
    pixels = prepare_images(mlm, [ITEMS[0][1]]).pixels
    states, finetuned = vision(pixels, output_hidden_states=True).hidden_states, own(pixels, output_hidden_states=True).hidden_states[3]
    close = {"rtol": 2e-3, "atol": 2e-3}  # kept in half precision
    torch.testing.assert_close(one.features["encoder_original"].float(), states[3][0], **close)
    torch.testing.assert_close(one.features["head.encoder_original"].float(), states[5][0], **close)
    for layer in vision.encoder.layers[3:]:
        finetuned = layer(finetuned, attention_mask=None)
    torch.testing.assert_close(one.features["head.encoder"].float(), finetuned[0], **close)
    scores, words = extractor.alignment.scores(one.features, TEXTS), extractor.alignment.text(TEXTS[1])["encoder"]
    pooled = vision.head(vision.post_layernorm(states[5][0, 7])[None, None])[0]
    torch.testing.assert_close(scores["encoder_original"][1, 7], normalize(pooled, dim=-1) @ words, **close)
    assert pocket.alignment.reads("encoder") == "encoder"  # nothing is cut there


def test_encoders_have_text_scores_only_with_a_text_tower(pocket):
    plain = FeatureExtractor(pocket.mlm, encoder_original=pocket.encoder_original)
    assert not {"encoder", "encoder_original"} & set(plain.alignment.sources)
    other = siglip(hidden=48)  # another width than the MLM's tower: its head cannot read that tower
    encoder, text = replace(pocket.encoder_original, model=other.vision_model), SiglipText(other.text_model, pocket.mlm.tokenizer)
    wide = FeatureExtractor(pocket.mlm, encoder_original=encoder, encoder_text=text)
    assert "encoder_original" in wide.alignment.sources and "encoder" not in wide.alignment.sources


def test_load_siglip_text(tmp_path):
    both = siglip()
    both.half().save_pretrained(tmp_path / "siglip")
    build_word_tokenizer(WORDS).save_pretrained(tmp_path / "siglip")
    found = load_siglip_text(str(tmp_path / "siglip")).embed("fish")
    torch.testing.assert_close(found, SiglipText(both.float().text_model, build_word_tokenizer(WORDS)).embed("fish"))
    assert found.norm() == pytest.approx(1)
    both.vision_model.save_pretrained(tmp_path / "vision")
    with pytest.raises(ModelError, match="siglip_vision_model.*not a SigLIP pair"):
        load_siglip_text(str(tmp_path / "vision"))


@pytest.fixture(scope="module")
def published_siglip(tmp_path_factory):
    """A tiny pair with a SentencePiece tokenizer, in the files of google/siglip-so400m-patch14-384."""
    folder = tmp_path_factory.mktemp("siglip")
    siglip().save_pretrained(folder)
    with (folder / "spiece.model").open("wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter([" ".join(WORDS)]), model_writer=file, vocab_size=40, hard_vocab_limit=False,
                                   pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)  # fmt: skip
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "eos_token": "</s>",
                                                  "unk_token": "<unk>", "model_max_length": 64})  # fmt: skip
    return folder


def test_siglips_own_tokenizer(published_siglip):
    text = load_siglip_text(str(published_siglip))
    assert type(text.tokenizer).__name__ == "SiglipTokenizer" and text.tokenizer.tokenize("a fish") != text.tokenizer.tokenize("a car")
    assert not torch.equal(text.embed("fish"), text.embed("car"))
    torch.testing.assert_close(text.embed("fish"), text.embed("the Fish."))  # it reads lower case without punctuation


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_a_missing_package_is_named_before_any_weights_are_read(published_siglip, monkeypatch, package):
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, package, (lambda: False, "{0} requires " + package))
    monkeypatch.setattr(words.SiglipModel, "from_pretrained", mock.Mock())
    monkeypatch.setattr(value_flow, "original_encoder", lambda model: str(published_siglip))
    monkeypatch.setattr(value_flow, "load_mlm", mock.Mock())
    with pytest.raises(ModelError, match="pip install sentencepiece protobuf"):
        value_flow.open_extractor("pocket")
    assert not words.SiglipModel.from_pretrained.called and not value_flow.load_mlm.called



@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_attention_of_the_last_token(family):
    mlm, eager = tiny(family), tiny(family, attention="eager")
    image, question = picture(60, 40), "what colour is the fish"
    layout, saliency = prompt_saliency(mlm, image, question)
    batch = eager.processor(images=[image], text=[eager.prompt(question=question)], return_tensors="pt")
    output = eager.model.model(**batch, output_attentions=True)
    full = torch.stack(output.attentions).mean((0, 1, 2))[-1]  # over layers, batch, heads; the last query
    torch.testing.assert_close(saliency, full[torch.from_numpy(layout.slots)], rtol=1e-4, atol=1e-6)
    assert mlm.attention == "sdpa"


def test_what_is_no_source_no_picture_and_no_text_is_said(tmp_path):
    extractor = FeatureExtractor(tiny("llava_onevision"), layers=[1])
    for sources in (["value.2"], "value.2", ["foo"]):
        with pytest.raises(ParameterError, match="unknown source '(value.2|foo)'.*expected one of .*value.1"):
            extractor.images([("a", picture(60, 40))], sources=sources)
    assert extractor.images([("a", picture(60, 40))], sources="value.1")[0].features.keys() == {"value.1"}
    (image := picture(60, 40)).save(tmp_path / "a.png")
    assert torch.equal(extractor.saliency(("a", tmp_path / "a.png")), FeatureExtractor(extractor.mlm).saliency(("a", image)))
    for call in (lambda: extractor.alignment.text(""), lambda: extractor.alignment.scores({}, "fish"), lambda: FeatureExtractor(extractor.mlm, vocabulary="fish")):
        with pytest.raises(ParameterError, match="texts must be a list of texts of at least one word each"):
            call()


def test_weights_shown_are_right_in_half_precision():
    """What all keys have in common, such as Qwen2's biases, leaves the softmax as it is; transformers' eager rounds it into the differences."""
    layer = tiny_onevision().model.model.language_model.layers[0].self_attn
    query, key = torch.randn(2, 1, 4, 50, 128, generator=torch.Generator().manual_seed(0)).bfloat16() + torch.tensor([4.0, 4.0]).bfloat16().view(2, 1, 1, 1, 1)
    key, value = key[:, :2], torch.randn(1, 2, 50, 128).bfloat16()
    true = (query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 128**-0.5).softmax(-1)
    assert layer.num_key_value_groups == 2
    found, weights = ALL_ATTENTION_FUNCTIONS[EXACT](layer, query, key, value, None, scaling=128**-0.5)
    assert found.dtype == torch.bfloat16 and weights.dtype == torch.float32
    rounded = eager_attention_forward(layer, query, key, value, None, scaling=128**-0.5)[1]
    assert (weights - true).abs().sum(-1).max() < 1e-4 and (rounded - true).abs().sum(-1).mean() > 0.05


def test_saliency_leaves_the_model_as_it_was_after_an_error(monkeypatch):
    mlm = tiny_onevision()
    language_model = mlm.model.model.language_model
    passes = iter([language_model.forward])  # and no second
    monkeypatch.setattr(language_model, "forward", lambda **inputs: next(passes)(**inputs))
    with pytest.raises(StopIteration):
        prompt_saliency(mlm, picture())
    assert mlm.attention == "sdpa" and not list(passes)
