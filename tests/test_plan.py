"""What a run of the paper profile needs: said without data, weights or network; hours come from a rehearsal alone."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import rehearse
import torch
from architectures import architecture, random_mlm
from PIL import Image
from rehearse import Rehearsal, text_of

from kvutils.datasets import DATASETS
from kvutils.datasets.catalog import CATALOG
from kvutils.datasets.pocket.questions import WORDS
from kvutils.errors import DataError, ModelError
from kvutils.layout import check_mlm
from kvutils.models import ENCODERS, MODELS, ModelSpec, find_model
from kvutils.run import plan
from kvutils.run.notebook import ROOT
from kvutils.run.plan import NOTEBOOKS, check_ready, data_of, look_for_model, rehearsal_file, table, weights_on_gpu
from kvutils.store import write_json
from tests.tiny_models import tiny, tiny_siglip

PAPER = [name for name, spec in MODELS.items() if spec.profile == "paper"]
SCREEN = ("Nothing was started", "KVUTILS_DATA", "bdd-10k", "14 GB", "research only", "hf download", "make plan",
          'make data DATASETS="pascal-5i msrc imagenet-s refcoco spair-71k davis-2017 coco pope mme bdd-10k blink"')  # fmt: skip


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
    assert (narrow.num_layers, narrow.num_heads, narrow.num_kv_heads) == MODELS[name].sizes[:3]
    ids = narrow.processor(images=[Image.new("RGB", (640, 480))], text=narrow.prompt("what ?"), return_tensors="pt").input_ids
    assert (ids == narrow.image_token_id).sum() == MODELS[name].sizes[4]
    with pytest.raises(ModelError, match="llava-onevision-7b"):
        architecture("gpt")


def test_every_data_set_of_a_notebook_is_looked_for():
    assert data_of("01", "paper") == data_of("02", "paper") and {"pascal-5i", "davis-2017"} < set(data_of("01", "paper"))
    assert list(data_of("03", "paper")) == ["coco", "pope", "mme"] and list(data_of("05", "paper")) == ["blink"]
    assert data_of("03", "pocket") == {}  # generated, not looked for
    real = {name for number in NOTEBOOKS for name in data_of(number, "paper")}
    assert real == {name for name in DATASETS if not name.startswith("pocket-")}


def test_the_plan_says_what_is_there(monkeypatch):
    monkeypatch.setattr(plan, "look_for_model", lambda spec: ("", 16.1))
    monkeypatch.setattr(plan, "look_for_data", lambda wanted: {
        name: (f"{name} is missing\nin full", 1.0) if name != "davis-2017" else ("", 0.0) for name in wanted})
    text = table("paper", "llava-onevision-7b")
    rows = {line[:2]: line for line in text.splitlines() if line[:2] in NOTEBOOKS}
    assert set(rows) == set(NOTEBOOKS) and "[msrc]" in rows["01"] and " davis-2017" in rows["01"] and "no: data" in rows["01"]
    assert "16.1 GB to download" in text and "> 31" in rows["01"] and "> 15" in rows["04"]
    assert "run `make rehearse MODEL=llava-onevision-7b` for hours" in text and rows["01"].split()[4] == "?"
    assert 'make data DATASETS="pascal-5i' in text
    assert max(map(len, text.splitlines())) < 180
    (row,) = [line for line in table("paper", "owner/name", ["05"]).splitlines() if line.startswith("05")]
    assert row.split()[2:4] == ["?", "?"]  # its size is not known


def test_a_rehearsal_on_this_device_is_believed():
    report = {"device": plan.device_name(), "hours": dict.fromkeys(NOTEBOOKS, 12.34), "peak": dict.fromkeys(NOTEBOOKS, 56.7)}
    for device, hours in ((report["device"], ["57", "12.3"]), ("another", [">", "15"])):
        write_json(rehearsal_file("qwen2.5-vl-3b"), report | {"device": device})
        (row,) = [line for line in table("paper", "qwen2.5-vl-3b", ["05"]).splitlines() if line.startswith("05")]
        assert row.split()[2:4] == hours


def test_a_checkpoint_is_looked_for_in_the_cache(monkeypatch, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
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
    monkeypatch.setattr(plan, f"is_{package}_available", lambda: False)
    for name, needs in (("siglip-so400m", True), ("pocket-siglip", False)):
        problem, _ = look_for_model(replace(ENCODERS[name], source=str(tmp_path)))
        assert (f"needs {package}: pip install" in problem) == needs


def test_the_hub_tells_the_size(monkeypatch):
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in (("a.safetensors", 3e9), ("b.bin", 9e9))]
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(plan.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(plan, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=files, config=None)))
    assert look_for_model(find_model("qwen2.5-vl-3b")) == ("", 3.0)
    unreachable = Mock(side_effect=RuntimeError("Name or service not known"))
    monkeypatch.setattr(plan, "HfApi", lambda: SimpleNamespace(model_info=unreachable))
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
    check_ready("paper", "pocket", {"05": {}})


def test_the_readme_has_the_computed_numbers():
    """Parameters, gigabytes, tokens, weights on the GPU in notebooks 01 and 04."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `") and "GiB" in line}
    assert set(rows) == set(PAPER)
    for name, row in rows.items():
        memory = " / ".join(f"{weights_on_gpu(find_model(name), number):.0f}" for number in ("01", "04"))
        expected = [f"{plan.SIZES[name]:.2f} B", f"{plan.SIZES[name] * 2:.0f} GB", f"{MODELS[name].sizes[4]:,}", f"{memory} GiB"]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == expected
    total = sum(about.to_get for about in CATALOG.values())
    assert f"about {5 * round(total / 5):.0f} GB of" in " ".join(lines)


def test_a_rehearsal_times_whole_items_of_every_notebook(monkeypatch, capsys):
    monkeypatch.setattr(rehearse, "random_mlm", lambda *_, seed=0: tiny("llava_onevision", seed=seed, words=list(WORDS)))
    monkeypatch.setattr(rehearse, "random_encoder", lambda *_: tiny_siglip())
    monkeypatch.setattr(rehearse, "IMAGE", (96, 72))
    assert rehearse.main(["--model", "qwen2.5-vl-3b"]) == 0
    said = capsys.readouterr()
    assert "SCALED DOWN" in said.out and "on a GPU only" in said.out and "No CUDA device" in said.err
    assert not rehearsal_file("qwen2.5-vl-3b").exists()
    rehearsal = Rehearsal("qwen2.5-vl-3b", torch.device("cpu"), 1, progress=False)
    rehearsal.small = False  # as on a GPU
    report = rehearsal.run()
    assert len(report["steps"]) == len(rehearse.IMAGES) + 5 and all(step["seconds"] >= 0 for step in report["steps"])
    hours = sum(s["seconds"] / s["count"] * s["wanted"] for s in report["steps"] if s["notebook"] == "05") / 3600
    assert report["hours"]["05"] == pytest.approx(hours) and report["hours"]["02"] == 0 and set(report["peak"]) == set(NOTEBOOKS)
    assert "together" in text_of(report)
    write_json(rehearsal_file("qwen2.5-vl-3b"), report)
    assert f"{report['hours']['01']:,.1f}" in table("paper", "qwen2.5-vl-3b", ["01"])


def test_a_rehearsal_answers_misuse_and_ctrl_c_in_words(monkeypatch, capsys):
    assert rehearse.main(["--samples", "0"]) == 1 and "--samples must be" in capsys.readouterr().err
    monkeypatch.setattr(Rehearsal, "run", Mock(side_effect=KeyboardInterrupt))
    assert rehearse.main([]) == 130 and "Interrupted" in capsys.readouterr().err
