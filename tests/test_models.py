"""What is asked of a checkpoint before it is used: configuration, tokens, revision, memory. Tiny models, real geometry."""

import errno
import os
import re
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from accelerate import dispatch_model

from kvutils import models
from kvutils.checkpoints import ENCODERS, FAMILIES, MODELS, NEXT, QWEN, base_name, find_model, look_for_model, original_encoder
from kvutils.errors import MemoryLimitError, ModelError, ParameterError, StoreError
from kvutils.kvcache import capture
from kvutils.layout import check_mlm
from kvutils.models import load_encoder, load_mlm, placement
from kvutils.readout.selections import variance_threshold
from kvutils.run.notebook import Run
from tests.published import write_checkpoint
from tests.tiny_models import picture, save, tiny, tiny_pocket


@pytest.mark.parametrize("family", FAMILIES)
def test_models_as_expected_pass(family):
    check_mlm(tiny(family))


def test_every_published_model_has_its_numbers():
    assert all(len(spec.sizes) == (5 if spec.profile == "paper" else 0) for spec in MODELS.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("change", "said"), [
    (lambda m: setattr(m, "image_token_id", 7), "image token .* says id 7"),
    (lambda m: setattr(m, "num_layers", 9), r"says \(9, .*found \(5, "),
    (lambda m: setattr(m, "num_kv_heads", 4), "width of keys and values"),
])  # fmt: skip
def test_what_differs_is_named(family, change, said):
    mlm = tiny(family)
    change(mlm)
    with pytest.raises(ModelError, match=said):
        check_mlm(mlm)


def test_keys_that_would_depend_on_the_batch_are_refused():
    mlm = tiny("llava_next")
    mlm.model.config.text_config.rope_parameters["rope_type"] = "longrope"
    with pytest.raises(ModelError, match="longrope"):
        models.wrap_mlm(mlm.model, mlm.processor)


def test_an_adapter_around_a_model_is_refused():
    """It forwards what it lacks, as peft's do, and its `model` is the whole model."""
    mlm = tiny("llava_next")

    class Adapter:
        def __getattr__(self, name):
            return mlm.model if name == "model" else getattr(mlm.model, name)

    with pytest.raises(ModelError, match=r"merge_and_unload\(\)"):
        models.wrap_mlm(Adapter(), mlm.processor)


@pytest.mark.parametrize(("family", "change", "said"), [
    ("llava_next", {"vision_feature_select_strategy": "full"}, "'full'; expected one from -[0-9]+ to [0-9]+, and 'default'"),
    ("llava_onevision", {"vision_feature_select_strategy": "default"}, "'default'; expected .*, and 'full'"),
    ("llava_next", {"vision_feature_layer": -99}, "reads layer -99 of its vision tower"),
    ("llava_onevision", {"vision_feature_layer": [-2, 99]}, r"reads layer \[-2, 99\] of its vision tower"),
])  # fmt: skip
def test_features_that_its_tower_does_not_have_are_refused(family, change, said):
    mlm = tiny(family)
    models.wrap_mlm(mlm.model, mlm.processor)
    for name, value in change.items():
        setattr(mlm.model.config, name, value)
    with pytest.raises(ModelError, match=said):
        models.wrap_mlm(mlm.model, mlm.processor)


def test_a_processor_of_another_model_is_found():
    mlm = tiny("llava_onevision")
    mlm.processor.num_image_tokens += 5
    with pytest.raises(ModelError, match="processor makes .* layout has"):
        check_mlm(mlm)


def test_a_published_name_must_have_the_published_numbers():
    mlm = tiny("llava_next")
    with pytest.raises(ModelError, match=r"(?s)expected \(32, 32, 8, 128, 2340\), found \(5, .*another checkpoint"):
        check_mlm(mlm, MODELS["llava-next-llama3-8b"].sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny("llava_onevision"), tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder_is_no_published_model_whatever_its_name(folder, tmp_path, monkeypatch):
    for name in ("llava-onevision-7b", "pocket"):
        shutil.copytree(folder, tmp_path / name)
        mlm = load_mlm(tmp_path / name, device="cpu")
        assert mlm.name == f"{name}-folder" and mlm.num_layers == 5
    assert load_mlm(shutil.copytree(folder, tmp_path / "pocket@x"), device="cpu").name == "pocket-x"
    monkeypatch.chdir(tmp_path / "pocket")
    assert load_mlm(".", device="cpu").name == "pocket-folder"


def test_a_loaded_folder_is_checked(folder, tmp_path):
    assert load_mlm(str(folder), device="cpu").num_layers == 5
    broken = shutil.copytree(folder, tmp_path / "broken")
    settings = (broken / "config.json").read_text()
    (broken / "config.json").write_text(re.sub(r'("image_token_i\w+": )3', r"\g<1>5", settings))
    with pytest.raises(ModelError, match="image token"):
        load_mlm(str(broken), device="cpu")


def test_without_network_the_error_says_how_to_get_the_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("qwen2.5-vl-3b", "qwen2.5-vl-3b@" + "0" * 40, "owner/name"):
        with pytest.raises(ModelError, match="hf download .*HF_HOME"):
            load_mlm(name)


def test_stored_parts_belong_to_the_weights_and_to_how_the_model_is_set(folder, tmp_path):
    """Another processor, template or tokenizer gives other numbers from the same weights; another model in memory has no folder."""
    copy = shutil.copytree(folder, tmp_path / folder.name)
    usual, again = (load_mlm(str(each), device="cpu").settings for each in (folder, copy))
    file = copy / "processor_config.json"
    file.write_text(file.read_text().replace("0.5", "0.4"))
    other = load_mlm(str(copy), device="cpu").settings
    assert usual == again and other["revision"] == usual["revision"] and other["configuration"] != usual["configuration"] != ""
    settings = [tiny("llava_next", seed=seed).settings for seed in (0, 0, 1)]
    assert settings[0] == settings[1] != settings[2]


def test_a_revision_is_passed_on(monkeypatch):
    asked = []

    def config_of(source, revision):
        asked.append((source, revision))
        raise OSError("no network")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", config_of)
    monkeypatch.setattr(models, "need_model", lambda *_, **__: None)  # the hub has them
    for name in ("llava-onevision-0.5b@abc", "me/mine@abc", "llava-onevision-0.5b"):
        with pytest.raises(ModelError):
            load_mlm(name)
    source = MODELS["llava-onevision-0.5b"].source
    assert asked == [(source, "abc"), ("me/mine", "abc"), (source, "main")]
    for name in ("pocket@abc", "siglip-so400m@"):
        with pytest.raises(ModelError, match="a revision is a commit"):
            (load_encoder if "siglip" in name else load_mlm)(name)


@pytest.mark.parametrize(("share", "places"), [(3.0, {0}), (0.6, {0, 1, "cpu"})])
def test_a_model_larger_than_the_gpu_is_spread(monkeypatch, share, places):
    """Placed on the first GPU while it leaves room, then over the others; nothing is allocated."""
    mlm = tiny_pocket()
    size = share * mlm.model.get_memory_footprint()
    monkeypatch.setattr(models, "get_max_memory", lambda: {0: size, 1: size, "cpu": 100 * size})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    gpu = torch.device("cuda", 0)
    assert set(placement(mlm.model.config, torch.float32, gpu).values()) == places
    assert placement(mlm.model.config, torch.float32, torch.device("cpu")) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert placement(mlm.model.config, torch.float32, gpu) is None


def test_every_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, index in (("0", 0), ("3", 3), ("5", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert models.usable_device(None) == torch.device("cuda", index)


def test_weights_that_do_not_fit_say_so(folder, monkeypatch):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(models.AutoModelForImageTextToText, "from_config", full)
    with pytest.raises(MemoryLimitError, match="device_map='auto'"):
        load_mlm(str(folder), device="cpu", untrained=True)


def test_float16_where_bfloat16_is_only_emulated(monkeypatch):
    """A T4, for example: bfloat16 is many times slower there."""
    cuda, paper = torch.device("cuda", 0), MODELS["llava-onevision-0.5b"]
    for real, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, real=real: real)
        assert models._dtype(None, paper, cuda) == dtype
    assert models._dtype(None, paper, torch.device("cpu")) == torch.float32
    assert models._dtype(None, MODELS["pocket"], cuda) == torch.float32
    assert models._dtype(None, MODELS["qwen2.5-vl-7b"], cuda) == torch.float32  # bfloat16 is only emulated here


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_qwen_is_refused_in_float16(tmp_path, dtype):
    """Its vision tower exceeds it, and the answers are "!!!!". A folder names its family only in its configuration."""
    folder = save(tiny("qwen2_5_vl"), tmp_path / "tiny")
    with pytest.raises(ParameterError, match="tiny exceeds float16.*bfloat16 or float32"):
        load_mlm(str(folder), device="cpu", dtype=dtype)
    assert load_mlm(str(folder), device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_what_does_not_fit_is_placed_by_accelerate(folder, monkeypatch):
    """Where there is only a CPU everything is placed there: the same numbers, trained and untrained."""
    for untrained in (False, True):
        plain = capture(load_mlm(str(folder), untrained=untrained), [picture(60, 40)])[0]
        monkeypatch.setattr(models, "placement", lambda *_: {"": "cpu"})
        placed = []
        monkeypatch.setattr(models, "dispatch_model", lambda model, places, to=placed: to.append(places) or dispatch_model(model, places))
        spread = load_mlm(str(folder), untrained=untrained)
        assert placed == ([{"": "cpu"}] if untrained else [])  # from_pretrained places what it loads
        assert torch.equal(capture(spread, [picture(60, 40)])[0].values, plain.values)
        monkeypatch.undo()


@pytest.mark.parametrize("form", ["new", "old", "jinja"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folders_as_on_the_hub_load_with_every_weight(family, form, published, tmp_path, tmp_path_factory):
    """Weights under the names of older transformers; fields, template and generation settings where older folders have them."""
    weights = tmp_path_factory.getbasetemp() / f"{family}.safetensors"
    expected, mlm = write_checkpoint(family, tmp_path, form, weights), load_mlm(str(tmp_path), device="cpu")
    found = mlm.model.state_dict()
    assert found.keys() == expected.model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.model.state_dict().items())
    told = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio", "patch_size", "num_additional_image_tokens")
    assert [getattr(mlm.processor, name, None) for name in told] == [getattr(expected.processor, name, None) for name in told]
    assert mlm.max_pixels == (1280 * 28 * 28 if family == QWEN else None)
    for asked in ({"question": "Is it?"}, {"question": "Is it?", "prefix": "A dog."}, {"question": "Which?", "images": 2}):
        prompt = expected.prompt(**asked)
        if (family, form) == (NEXT, "old"):  # its tokenizer has a template of its own, of texts only, as Llama 3 was published
            prompt = f"<|begin_of_text|>{prompt}".replace("\n\n\n", "\n\n")
        assert mlm.prompt(**asked) == prompt


@pytest.mark.parametrize(("name", "base"), [
    ("llava-onevision-7b@abc", "llava-onevision-7b"), ("pocket@abc", "pocket"),
    (MODELS["llava-onevision-7b"].source, "llava-onevision-7b"), (MODELS["llava-onevision-7b"].source + "@abc", "llava-onevision-7b"),
])  # fmt: skip
def test_a_commit_or_hub_id_of_a_model_keeps_what_is_known_of_the_model(name, base):
    assert (base_name(name), base_name("me/mine@abc")) == (base, "me/mine@abc")
    assert base == "pocket" or (find_model(name).name, find_model(name).sizes) == (base, MODELS[base].sizes)
    assert original_encoder(name) == original_encoder(base) and Run("01", "paper", name).folder == Run("01", "paper", base).folder
    assert base == "pocket" or variance_threshold(torch.arange(1.0, 99), name)["value"] == 450.0


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize(("name", "said"), [("pocket-2", "MODEL=pocket SEED=2"), ("pocket-qwen-read", "MODEL=pocket-qwen SEED=1")])
def test_a_pocket_model_that_is_not_there_says_how_to_train_it(tmp_path, monkeypatch, name, said, untrained):
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], source=str(tmp_path / "nowhere")))
    with pytest.raises(ModelError, match=f"^{name}: .*nowhere is missing; train it with `make train {said}`$"):
        load_mlm(name, untrained=untrained)


@pytest.mark.parametrize(("name", "seed"), [("pocket-siglip", 1), ("pocket-siglip-2", 2)])
def test_an_encoder_of_a_pocket_model_is_trained_with_it(tmp_path, name, seed):
    problem, _ = look_for_model(replace(ENCODERS[name], source=str(tmp_path / "nowhere")))
    assert problem.endswith(f"nowhere is missing; train it with `make train MODEL=pocket SEED={seed}`")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("size", [0, 200])
def test_a_damaged_folder_is_one_sentence(tmp_path, file, size):
    """Weights of a download that was stopped raise an error of safetensors, a tokenizer's one of its parser."""
    folder = shutil.copytree(MODELS["pocket"].source, tmp_path / "my model")
    os.truncate(folder / file, size)
    with pytest.raises(ModelError, match="(?s)my model cannot be loaded from .*whole"):
        load_mlm(str(folder))


def test_a_model_without_a_name_is_unknown():
    with pytest.raises(ModelError, match="unknown model ''"):
        find_model("")


def test_a_full_disk_is_not_a_missing_model(monkeypatch):
    """As transformers says it: an OSError of its own, whose cause is the disk's."""
    wrapped = OSError("There was a specific connection error when trying to load the model")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", Mock(side_effect=wrapped))
    monkeypatch.setattr(models, "need_model", lambda *_, **__: None)
    with pytest.raises(StoreError, match="files of .* could not be written .*No space left.*HF_HOME"):
        models.load_mlm("org/model")
