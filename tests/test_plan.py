"""What a run of the paper profile needs: counted without data, weights or network, and said before anything starts."""

import json
from types import SimpleNamespace

import pytest
import rehearse
import torch
from architectures import architecture, random_mlm
from rehearse import Rehearsal, Speed, stored, stored_speed, text_of
from transformers import AutoModelForImageTextToText

from kvutils.datasets.catalog import CATALOG
from kvutils.errors import DataError, ModelError
from kvutils.models import MODELS, ModelSpec, check_mlm, find_model
from kvutils.run import plan
from kvutils.run.notebook import ROOT
from kvutils.run.plan import NOTEBOOKS, WORK, Found, Work, check_ready, costs, data_of, decoder_rate, look_for_model, memory_needed, table
from kvutils.store import write_json
from tests.tiny_models import tiny

PAPER = [name for name, spec in MODELS.items() if spec.profile == "paper"]


@pytest.fixture(autouse=True)
def _nothing_here(monkeypatch, tmp_path):
    monkeypatch.delenv("KVUTILS_DATA", raising=False)
    monkeypatch.setenv("KVUTILS_CACHE", str(tmp_path / "cache"))


# --- architectures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "billions"), [("llava-onevision-7b", 8.03), ("llava-onevision-0.5b", 0.894),
                                                ("qwen2.5-vl-7b", 8.29), ("qwen2.5-vl-3b", 3.75),
                                                ("llava-next-llama3-8b", 8.36)])  # fmt: skip
def test_full_size_architectures_have_the_published_size(name, billions):
    config, _ = architecture(name)
    text = config.get_text_config()
    with torch.device("meta"):
        weights = AutoModelForImageTextToText.from_config(config).num_parameters()
    assert weights / 1e9 == pytest.approx(billions, abs=0.006)
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == MODELS[name].sizes[:3]


@pytest.mark.parametrize("name", PAPER)
def test_narrow_ones_have_the_structure_and_the_image_tokens(name):
    mlm = random_mlm(name, "cpu", torch.float32, small=True)
    check_mlm(mlm)
    heads = (mlm.num_layers, mlm.num_heads, mlm.num_kv_heads)
    assert heads == MODELS[name].sizes[:3] and costs(*architecture(name, small=True)).tokens == MODELS[name].sizes[4]
    with pytest.raises(ModelError, match="llava-onevision-7b"):
        architecture("gpt")


# --- counts and costs ---------------------------------------------------------------------------------------


def test_costs_count_what_a_layer_computes():
    """Against PyTorch's own counter, on the decoder of the narrow architecture."""
    from torch.utils.flop_counter import FlopCounterMode

    config, processor = architecture("qwen2.5-vl-3b", small=True)
    price = costs(config, processor)
    mlm = random_mlm("qwen2.5-vl-3b", "cpu", torch.float32, small=True)
    mlm.model.set_attn_implementation("eager")  # the counter does not see into the fused attention of a CPU
    states = torch.zeros(1, price.tokens, config.get_text_config().hidden_size)
    positions = torch.arange(price.tokens).expand(3, 1, -1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mlm.model.model.language_model(inputs_embeds=states, position_ids=positions, use_cache=False)
    tower = 2 * 4 * price.tokens * sum(p.numel() for p in mlm.model.model.visual.parameters())
    half = 2 * mlm.num_layers * price.tokens**2 * mlm.num_heads * mlm.head_dim  # of the square is masked, and not computed
    assert price.read - tower + half == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_work_adds_up():
    price = costs(*architecture("llava-onevision-7b"))
    assert price.tokens == 2929 and price.small_tokens == 730 and price.weights == pytest.approx(8.03e9, rel=0.01)
    one = Work("01", "x", reads=2, twins=1, asked=3)
    assert price.of(one) == 3 * price.read + price.siglip + 3 * price.asked
    speed = Speed.from_rate(1e12, price, "made up")
    assert speed.seconds(one) == pytest.approx(price.of(one) / 1e12)
    assert speed.seconds(Work("05", "y", reads=1, small=True)) == pytest.approx(price.small_read / 1e12)
    assert {work.notebook for work in WORK} == set(NOTEBOOKS)


def test_a_layer_is_timed():
    for family in ("llava_onevision", "qwen2_5_vl", "llava_next"):
        assert decoder_rate(tiny(family).model.config, torch.device("cpu"), torch.float32, 16) > 1e5


# --- plan ---------------------------------------------------------------------------------------------------


def test_every_data_set_of_a_notebook_is_looked_for():
    assert data_of("01", "paper") == data_of("02", "paper") and len(data_of("01", "paper")) == 7
    assert data_of("03", "paper") == ["coco", "pope", "mme"] and data_of("05", "paper") == ["blink"]
    assert "pocket-questions" in data_of("03", "pocket")


def test_the_plan_says_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "decoder_rate", lambda *_: 1e14)
    monkeypatch.setattr(plan, "look_for_model", lambda spec: Found(spec.name, "", 16.1))
    monkeypatch.setattr(plan, "look_for_data", lambda names, options=None: {
        name: Found(name, "" if name == "davis-2017" else f"{name} is missing\nin full", 1.0) for name in names})
    text = table("paper", "llava-onevision-7b")
    rows = {line[:2]: line for line in text.splitlines() if line[:2] in NOTEBOOKS}
    assert set(rows) == set(NOTEBOOKS) and "davis-2017" in rows["01"] and "no: data" in rows["01"]
    assert "16.1 GB to download" in text and "2,929 tokens" in text and "4,801" in rows["01"]
    hours = float(rows["01"].split()[-3].replace(",", ""))
    price = costs(*architecture("llava-onevision-7b"))
    assert hours == pytest.approx(sum(price.of(w) for w in WORK if w.notebook == "01") / 1e14 / 3600, abs=0.06)
    assert 'make data DATASETS="pascal-5i' in text
    assert max(map(len, text.splitlines())) < 180


def test_a_rehearsal_on_this_device_is_believed(tmp_path, monkeypatch):
    device = torch.device("cpu")
    assert stored_speed("qwen2.5-vl-3b", device) is None
    speed = {"about": "measured", "read": 1.0, "small_read": 1.0, "twin": 1.0, "small_twin": 1.0, "asked": 0.1, "probe": 2.0}
    report = {"full_size": True, "device": rehearse._device_name(device), "speed": speed}
    write_json(stored("qwen2.5-vl-3b"), report)
    assert stored_speed("qwen2.5-vl-3b", device) == Speed(**speed)
    write_json(stored("qwen2.5-vl-3b"), report | {"device": "another"})
    assert stored_speed("qwen2.5-vl-3b", device) is None


def test_an_unknown_model_has_a_plan_without_costs(monkeypatch):
    monkeypatch.setattr(plan, "look_for_model", lambda spec: Found(spec.name, "not here"))
    text = table("paper", "owner/name", ["05"])
    assert "speed    not known before the configuration of owner/name is there" in text and "no: model and data" in text


def test_a_checkpoint_is_looked_for_in_the_cache(monkeypatch, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    spec = find_model("qwen2.5-vl-3b")
    assert "HF_HUB_OFFLINE" in look_for_model(spec).problem  # the tests run offline
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one", "b": "two"}}))
    (snapshot / "one").touch()
    assert look_for_model(spec).problem, "half a checkpoint is none"
    (snapshot / "two").touch()
    assert not look_for_model(spec).problem
    assert not look_for_model(ModelSpec("mine", "", str(tmp_path), "custom")).problem


def test_the_hub_tells_the_size(monkeypatch):
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in (("a.safetensors", 3e9), ("b.bin", 9e9))]
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(plan.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(plan, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=files)))
    assert look_for_model(find_model("qwen2.5-vl-3b")) == Found("qwen2.5-vl-3b", "", 3.0)

    def unreachable(*_, **__):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(plan, "HfApi", lambda: SimpleNamespace(model_info=unreachable))
    assert "Name or service not known" in look_for_model(find_model("qwen2.5-vl-3b")).problem


def test_without_data_and_network_one_screen_says_what_to_do():
    with pytest.raises(DataError) as error:
        check_ready("paper", "llava-onevision-7b", NOTEBOOKS)
    said = str(error.value)
    for part in ("Nothing was started", "KVUTILS_DATA", "bdd-10k", "14 GB", "research only", "hf download", "make plan",
                 'make data DATASETS="pascal-5i msrc imagenet-s refcoco spair-71k davis-2017 coco pope mme bdd-10k blink"'):
        assert part in said, part
    assert len(said.splitlines()) <= 30


def test_one_missing_set_is_told_in_full_and_what_can_run_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("KVUTILS_DATA", str(tmp_path))
    monkeypatch.setattr(plan, "look_for_model", lambda spec: Found(spec.name, ""))
    with pytest.raises(DataError) as error:
        check_ready("paper", "qwen2.5-vl-3b", ["05"])
    for part in ("Nothing was started", "BLINK", "0.6 GB", "Apache-2.0", f"{tmp_path}/blink/Art_Style/val-00000"):
        assert part in str(error.value), part
    with pytest.raises(DataError, match=r'What can run now: .*NOTEBOOKS="05"') as error:
        monkeypatch.setattr(plan, "look_for_data", lambda names, options=None: {
            name: Found(name, "" if name == "blink" else f"{name}: 3 of 5 files are missing") for name in names})
        (tmp_path / "coco").mkdir()
        check_ready("paper", "qwen2.5-vl-3b", ["03", "05"])
    assert "coco: 3 of 5 files are missing" in str(error.value)


def test_what_is_there_runs(monkeypatch):
    monkeypatch.setattr(plan, "look_for_data", lambda names, options=None: {name: Found(name, "") for name in names})
    check_ready("paper", "pocket", NOTEBOOKS)


# --- rehearsal ----------------------------------------------------------------------------------------------


def test_a_rehearsal_without_a_gpu_is_narrow_and_says_so(monkeypatch):
    monkeypatch.setattr(rehearse, "matmul_rate", lambda *_: 1e12)
    report = Rehearsal("qwen2.5-vl-3b", torch.device("cpu"), images=2, progress=False).run()
    assert not report["full_size"] and report["tokens"] == 391
    steps = {step["what"]: step for step in report["steps"]}
    assert {"capture", "SigLIP", "variance of keys", "questions, plain and blocked", "probes of one episode"} == set(steps)
    assert all(step["seconds"] > 0 and step["peak"] > 0 for step in steps.values())
    capture = steps["capture"]
    assert capture["rate"] == pytest.approx(costs(*architecture("qwen2.5-vl-3b", small=True)).read * 2 / capture["seconds"])
    text = text_of(report)
    assert "SCALED DOWN" in text and "narrow model's rate" in text and "together" in text
    assert set(report["hours"]) == set(NOTEBOOKS) and json.dumps(report)


def test_the_command_keeps_no_narrow_report(monkeypatch, capsys):
    monkeypatch.setattr(Rehearsal, "run", lambda self: {
        "model": "qwen2.5-vl-3b", "device": "CPU", "full_size": False, "tokens": 391, "weights": 1e9, "matmul_rate": 1e12,
        "versions": {"dtype": "float32", "attention": "sdpa", "torch": "2", "transformers": "5"}, "hours": {"01": 1.0},
        "steps": [{"what": "capture", "count": 2, "seconds": 1.0, "operations": 1e11, "rate": 1e11, "peak": 1.0}]})  # fmt: skip
    assert rehearse.main(["--model", "qwen2.5-vl-3b"]) == 0
    assert "10%" in capsys.readouterr().out and not stored("qwen2.5-vl-3b").exists()


def test_the_readme_has_the_computed_numbers():
    """Parameters, gigabytes, tokens, GPU memory of notebooks 01 and 04, operations of all notebooks."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `") and "GiB" in line}
    assert set(rows) == set(PAPER)
    for name, row in rows.items():
        price = costs(*architecture(name))
        memory = " / ".join(f"{memory_needed(price, number):.0f}" for number in ("01", "04"))
        operations = sum(map(price.of, WORK)) / 1e18
        expected = [f"{price.weights / 1e9:.2f} B", f"{price.weights * 2 / 1e9:.0f} GB", f"{price.tokens:,}", f"{memory} GiB",
                    f"{operations:.1f} × 10¹⁸"]  # fmt: skip
        assert [cell.strip() for cell in row.split("|")[2:-1]] == expected
    total = sum(about.to_get for about in CATALOG.values())
    assert f"about {5 * round(total / 5):.0f} GB of" in " ".join(lines)


def test_ctrl_c_is_answered_in_words(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Rehearsal, "run", interrupted)
    assert rehearse.main(["--model", "qwen2.5-vl-3b"]) == 130
    assert "Interrupted" in capsys.readouterr().err
