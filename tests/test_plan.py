"""What a run of the paper profile needs: said without data, weights or network; hours come from a rehearsal alone."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import rehearse
import torch
from architectures import architecture, random_mlm
from PIL import Image
from word_tokenizer import WORDS

from kvutils import checkpoints
from kvutils.checkpoints import ENCODERS, MODELS, ModelSpec, find_model, look_for_model
from kvutils.datasets import DATASETS
from kvutils.datasets.catalog import CATALOG
from kvutils.errors import DataError, ModelError, ParameterError
from kvutils.layout import check_mlm
from kvutils.run import plan
from kvutils.run.notebook import ROOT
from kvutils.run.plan import COSTS, NOTEBOOKS, check_ready, data_of, find_rehearsal, hours_of, rehearsal_file, table, weights_on_gpu
from kvutils.run.sizes import declared
from kvutils.store import read_json, write_json
from tests.tiny_models import tiny, tiny_siglip

PAPER = [name for name, spec in MODELS.items() if spec.profile == "paper"]
SCREEN = ("Nothing was started", "KVUTILS_DATA", "bdd-10k", "14 GB", "research only", "hf download", "make plan",
          'make data DATASETS="pascal-5i msrc imagenet-s refcoco spair-71k davis-2017 coco pope mme bdd-10k blink"')  # fmt: skip


STEP = {"notebook": "01", "step": "referring_segmentation", "items": 2, "reads": 1, "peak": 56.7,
        "of_items": dict(zip(COSTS, (5.0, 3.0, 0.0, 0.0, 0.0, 0.4, 1000.0), strict=True)),
        "of_reads": dict(zip(COSTS, (9.0, 0.5, 65.0, 320.0, 2.0, 0.0, 0.0), strict=True))}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_here(monkeypatch, tmp_path):
    monkeypatch.delenv("KVUTILS_DATA", raising=False)
    monkeypatch.setenv("KVUTILS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", PAPER)
def test_architectures_have_the_published_size_structure_and_image_tokens(name):
    mlm = random_mlm(name, "meta", torch.bfloat16)
    assert sum(each.numel() for each in mlm.model.parameters()) / 1e9 == pytest.approx(plan.SIZES[name], abs=0.006)
    narrow = random_mlm(name, "cpu", torch.float32, small=True)
    check_mlm(narrow)
    layers, _, heads, head_dim, _ = MODELS[name].sizes
    assert (narrow.num_layers, narrow.num_kv_heads, narrow.head_dim) == (layers, heads, head_dim)
    ids = narrow.processor(images=[Image.new("RGB", (640, 480))], text=narrow.prompt("what ?"), return_tensors="pt").input_ids
    assert (ids == narrow.image_token_id).sum() == MODELS[name].sizes[4]
    with pytest.raises(ModelError, match="llava-onevision-7b"):
        architecture("gpt")


def test_every_data_set_of_a_notebook_is_looked_for():
    assert data_of("01", "paper") == data_of("02", "paper") and {"pascal-5i", "davis-2017"} < set(data_of("01", "paper"))
    assert list(data_of("03", "paper")) == ["coco", "pope", "mme"] and list(data_of("05", "paper")) == ["blink"]
    assert data_of("03", "pocket") == {}  # generated, not looked for
    real = {name for number in NOTEBOOKS for name in data_of(number, "paper")}
    assert real == {name for name in DATASETS if not name.startswith("pocket-")} - {"folder"}


def test_the_plan_says_what_is_there(monkeypatch):
    monkeypatch.setattr(plan, "look_for_model", lambda spec: ("", 16.1))
    monkeypatch.setattr(plan, "look_for_data", lambda wanted: {
        name: (f"{name} is missing\nin full", 1.0) if name != "davis-2017" else ("", 0.0) for name in wanted})
    write_json(rehearsal_file("llava-onevision-7b"), {"device": "a processor", "full_size": False, "steps": [STEP]})
    text = table("paper", "llava-onevision-7b", gpu="t4")
    rows = {line[:2]: line for line in text.splitlines() if line[:2] in NOTEBOOKS}
    assert set(rows) == set(NOTEBOOKS) and "[msrc]" in rows["01"] and " davis-2017" in rows["01"] and "no: data" in rows["01"]
    assert "16.1 GB to download" in text and "> 31" in rows["01"] and "> 30" in rows["04"]
    assert "on one T4: host seconds as rehearsed" in text and float(rows["01"].split()[4]) > 1 and "together" in text
    assert 'make data DATASETS="pascal-5i' in text
    assert max(map(len, text.splitlines())) < 180
    text = table("paper", "owner/name", ["05"])
    (row,) = [line for line in text.splitlines() if line.startswith("05")]
    assert row.split()[2:4] == ["?", "?"] and "known of published models alone" in text  # its size is not known


def test_a_gpu_that_is_not_here_is_assumed(monkeypatch):
    """As stated, or an H100; what does not fit it is said."""
    monkeypatch.setattr(plan, "look_for_model", lambda spec: ("", 16.1))
    monkeypatch.setattr(plan, "look_for_data", lambda wanted: dict.fromkeys(wanted, ("", 0.0)))
    stated, any_one = (table("paper", "llava-onevision-7b", ["05"], gpu=gpu).splitlines() for gpu in ("T4", None))
    assert [line for line in stated if line.startswith("device")][0].startswith("device   one T4 of 16 GiB: assumed, as GPU= says. Here: CPU")
    assert [line for line in any_one if line.startswith("device")][0].startswith("device   one H100 of 80 GiB: assumed; GPU=NAME names another.")
    assert "no: memory" in next(line for line in stated if line.startswith("05")) and "yes" in next(line for line in any_one if line.startswith("05"))


def test_hours_are_host_seconds_and_passes_on_the_stated_gpu(monkeypatch):
    work = declared()["work"]
    assert work["full"].keys() == work["quick"].keys() and work["full"]["referring_segmentation"] == [10834, 1500]
    report = {"device": "a processor", "full_size": False, "steps": [STEP]}
    each = 0.5 + 65 / (0.4 * 65) + 0.32 / 0.32 + 2 * 0.03  # seconds a picture on a T4
    item = (3.0 + 0.4 * 0.01 / 0.32 + 1000 * 0.00003) / 2
    hours, said = hours_of(report, "full", "t4")
    assert hours == {"01": pytest.approx((10834 * item + 1500 * each) / 3600)}
    assert "on one T4" in said and "40% of 65 TFLOP/s" in said and "a processor" in said
    assert hours_of(report, "quick", "T4")[0]["01"] == pytest.approx((173 * item + 24 * each) / 3600)
    assert hours_of(report, "full", "h100")[0]["01"] < hours["01"] and "on one H100" in hours_of(report, "full")[1]  # no GPU here
    assert hours_of(report, "full", "t4", {"01": {"referring_segmentation": "refcoco"}})[0] == {"01": 0}
    with pytest.raises(ParameterError, match="unknown GPU 't5'; expected one of h200, h100, a100"):
        table("paper", "owner/name", ["05"], gpu="t5")  # also where there is no rehearsal to compute hours from
    monkeypatch.setattr("kvutils.run.plan.device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert "on one A100" in hours_of(report, "full")[1]
    for name, found in (("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("NVIDIA RTX A1000 Laptop GPU", "H100"), ("Tesla T4", "T4"), ("NVIDIA A10G", "A10")):
        monkeypatch.setattr("kvutils.run.plan.device_name", lambda name=name: name)
        assert f"on one {found}:" in hours_of(report, "full")[1]
    monkeypatch.setattr("kvutils.run.plan.device_name", lambda: "NVIDIA A100-SXM4-80GB")
    measured, said = hours_of(report | {"device": "NVIDIA A100-SXM4-80GB", "full_size": True}, "full")
    assert measured["01"] == pytest.approx((10834 * 2.5 + 1500 * 9) / 3600) and "as a rehearsal measured them" in said


def test_a_rehearsal_here_goes_before_the_one_that_is_shipped(monkeypatch):
    write_json(rehearsal_file("qwen2.5-vl-3b"), {"device": "a GPU", "full_size": True, "steps": [STEP | {"notebook": "05", "step": "choices"}]})
    (row,) = [line for line in table("paper", "qwen2.5-vl-3b@abc", ["05"], gpu="l4").splitlines() if line.startswith("05")]
    assert row.split()[2:4] == ["57", "0.1"]
    assert find_rehearsal("qwen2.5-vl-3b")["device"] == "a GPU" and find_rehearsal("owner/name") == {}


def test_a_checkpoint_is_looked_for_in_the_cache(monkeypatch, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    spec = find_model("qwen2.5-vl-3b")
    assert "HF_HUB_OFFLINE" in look_for_model(spec)[0]  # the tests run offline
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one", "b": "two"}}))
    (snapshot / "one").touch()
    assert look_for_model(spec)[0], "half a checkpoint is none"
    (snapshot / "two").touch()
    assert look_for_model(spec) == look_for_model(ModelSpec("mine", "", str(snapshot), "custom")) == ("", 0)
    assert "no config.json" in look_for_model(ModelSpec("mine", "", str(tmp_path), "custom"))[0]


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_the_packages_of_siglips_tokenizer_are_looked_for(monkeypatch, tmp_path, package):
    monkeypatch.setattr(checkpoints, "find_spec", lambda module: None if package in (module, {"google.protobuf": "protobuf"}.get(module)) else module)
    for name, needs in (("siglip-so400m", True), ("pocket-siglip", False)):
        problem, _ = look_for_model(replace(ENCODERS[name], source=str(tmp_path)))
        assert (f"needs {package}: pip install" in problem) == needs


def test_the_hub_tells_the_size(monkeypatch):
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in (("a.safetensors", 3e9), ("b.bin", 9e9))]
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoints, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=files, config=None)))
    assert look_for_model(find_model("qwen2.5-vl-3b")) == ("", 3.0)
    unreachable = Mock(side_effect=RuntimeError("Name or service not known"))
    monkeypatch.setattr(checkpoints, "HfApi", lambda: SimpleNamespace(model_info=unreachable))
    assert "Name or service not known" in look_for_model(find_model("qwen2.5-vl-3b"))[0]


def test_what_is_missing_is_said_before_anything_starts(monkeypatch, tmp_path):
    with pytest.raises(DataError) as error:
        check_ready("paper", "llava-onevision-7b", dict.fromkeys(NOTEBOOKS, {}))
    assert all(part in str(error.value) for part in SCREEN) and len(str(error.value).splitlines()) <= 30
    monkeypatch.setenv("KVUTILS_DATA", str(tmp_path))
    monkeypatch.setattr(plan, "look_for_model", lambda spec: ("", 0.0))
    with pytest.raises(DataError) as error:  # a single set is told in full
        check_ready("paper", "qwen2.5-vl-3b", {"05": {}})
    assert all(part in str(error.value) for part in ("BLINK", "0.6 GB", "Apache-2.0", f"{tmp_path}/blink/Art_Style/val-00000"))
    monkeypatch.setattr(plan, "look_for_data", lambda wanted: {
        name: (f"{name}: 3 of 5 files are missing" if name != "blink" else "", 1.0) for name in wanted})
    (tmp_path / "coco").mkdir()
    with pytest.raises(DataError, match=r'What can run now: .*NOTEBOOKS="05"') as error:
        check_ready("paper", "qwen2.5-vl-3b", {"03": {}, "05": {}})
    assert "coco: 3 of 5 files are missing" in str(error.value)
    hub = {"size": "quick", "data_options": {"coco": {"root": "hub"}}}
    with pytest.raises(DataError, match=r"(?s)coco +1 GB .*make plan PROFILE=paper MODEL=qwen2.5-vl-3b DATA=hub SIZE=quick "):
        check_ready("paper", "qwen2.5-vl-3b", {"03": hub})
    check_ready("paper", "pocket", {"05": {}})


def test_the_readme_has_the_computed_numbers():
    """Parameters, gigabytes, tokens, weights on the GPU in notebook 01."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `") and "GiB" in line}
    assert set(rows) == set(PAPER)
    for name, row in rows.items():
        memory = f"{weights_on_gpu(find_model(name), '01'):.0f}"
        expected = [f"{plan.SIZES[name]:.2f} B", f"{plan.SIZES[name] * 2:.0f} GB", f"{MODELS[name].sizes[4]:,}", f"{memory} GiB"]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == expected
    total = sum(about.to_get for about in CATALOG.values())
    assert f"about {5 * round(total / 5):.0f} GB of" in " ".join(lines)


def test_where_there_is_no_bfloat16_qwen_is_twice_as_large():
    on = {gpu: table("paper", "qwen2.5-vl-3b", ["01"], gpu=gpu) for gpu in ("t4", "l4")}
    (small,), (large,) = ([line.split()[2:4] for line in text.splitlines() if line.startswith("01 ")] for text in on.values())
    assert (small, large[0]) == ([">", "30"], ">") and "model, data, memory" in on["t4"] and "not known: Qwen2.5-VL" in on["t4"]
    assert "memory" not in table("paper", "llava-onevision-0.5b", ["01"], gpu="t4").partition("data sets")[2]


def test_a_rehearsal_measures_whole_items_of_every_notebook(monkeypatch, capsys):
    monkeypatch.setattr(rehearse, "random_mlm", lambda *_, seed=0: tiny("llava_onevision", seed=seed, words=[*WORDS, "user", "assistant"]))
    monkeypatch.setattr(rehearse, "random_encoder", lambda *_: tiny_siglip())
    monkeypatch.setattr(rehearse, "IMAGE", (96, 72))
    assert rehearse.main(["--model", "qwen2.5-vl-3b"]) == 0
    said = capsys.readouterr()
    assert "SCALED DOWN" in said.out and "on one H100" in said.out and "together" in said.out
    assert "No CUDA device" in said.err and "01 foreground segmentation ... (0% done, about 0" in said.err  # told meanwhile, without a terminal too
    assert [line for line in said.err.splitlines() if "04 referring ... (7" in line and line.endswith(" min left)")]
    report = read_json(rehearsal_file("qwen2.5-vl-3b"))
    steps = {step["step"]: step for step in report["steps"]}
    assert steps.keys() == declared()["work"]["full"].keys() and {step["notebook"] for step in report["steps"]} == set(NOTEBOOKS) - {"02"}
    assert all(step["of_items"]["host"] >= 0 and step["of_items"]["seconds"] >= step["of_items"]["host"] for step in report["steps"])
    read = steps["foreground_segmentation"]  # one picture, by two language models, their towers and SigLIP
    assert read["reads"] == 1 and read["of_reads"]["passes"] == 5 and read["of_reads"]["tflop"] > 0
    text = sum(each.numel() for each in tiny("llava_onevision").model.model.language_model.layers.parameters())
    tower = sum(each.numel() for each in tiny("llava_onevision").model.model.vision_tower.parameters())
    assert read["of_reads"]["gbytes"] * 1e9 == pytest.approx(2 * (2 * text + 2 * tower + sum(
        each.numel() for each in tiny_siglip().model.parameters())), rel=1e-3)  # fmt: skip


def test_a_rehearsal_answers_misuse_and_ctrl_c_in_words(capsys):
    assert rehearse.main(["--samples", "0"]) == 1 and "--samples must be" in capsys.readouterr().err
    command = [sys.executable, str(ROOT / "benchmarks"), "rehearse", "--model"]
    begun = subprocess.run([*command, "lava-onevision-7b"], capture_output=True, text=True)  # before torch is loaded
    assert begun.returncode == 2 and begun.stderr.startswith("error: unknown model 'lava-onevision-7b' (did you mean 'llava-onevision-7b'?)")
    process = subprocess.Popen([*command, "qwen2.5-vl-3b"], stderr=subprocess.PIPE, text=True)
    time.sleep(4)  # while it is, also on a busy machine
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=240)[1]  # a fast machine may have got as far as its progress
    assert said.endswith("\nStopped. A rehearsal is short and keeps nothing: start it again.\n") and "Traceback" not in said
    # To a shell both are 130: Python ends by the signal where it came while an extension ran Python code.
    assert process.returncode in (130, -signal.SIGINT)
