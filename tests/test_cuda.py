"""On a GPU: the same numbers as on the CPU, from the cache to the scores. Every test also runs CPU against CPU."""

import bench_gpu
import numpy as np
import pytest
import torch

from kvutils.answer import answer_all
from kvutils.datasets import open_dataset
from kvutils.keys import key_variance
from kvutils.kvcache import capture
from kvutils.models import load_encoder, load_mlm
from kvutils.readout.attention import attention_mass
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.selections import select_all
from kvutils.readout.words import load_siglip_text
from kvutils.tasks.base import run_task
from kvutils.tasks.choices import read_items
from kvutils.tasks.value_flow import SIX, value_flow_tasks
from tests.tiny_models import FAMILIES, tiny

SMALL = {"pocket-pascal-5i": {"per_fold": 1, "scenes": 30}, "pocket-msrc": {"per_class": 1, "images": 2},
         "pocket-imagenet-s": {"scenes": 3}, "pocket-imagenet-s-train": {"scenes": 20}, "pocket-refcoco": {"scenes": 2},
         "pocket-spair-71k": {"pairs": 3}, "pocket-davis-2017": {"count": 1, "frames": 4}}  # fmt: skip
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])
devices = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture(autouse=True)
def _exact():
    """float32 as on the CPU: no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@devices
@pytest.mark.parametrize("family", FAMILIES)
def test_capture_variance_attention_and_answers(family, device):
    pictures = [one.image for one in open_dataset("pocket-coco", count=3)]
    found = []
    for place in ("cpu", device):
        mlm = tiny(family)
        mlm.model.to(place)
        captured = capture(mlm, pictures, prefix="a red fish", batch_size=2)
        block = select_all([3, 4], mlm.num_kv_heads, len(captured[0].layout))
        asked = [(str(i), one, ["is the fish on the left", "what colour is the car"]) for i, one in enumerate(pictures)]
        answers = list(answer_all(mlm, asked, {"none": None, "all": block}, options=["yes", "no"], max_new_tokens=3))
        scores = [[answer.scores["yes"] for answer in by_block[name]] for _, by_block in answers for name in by_block]
        found.append((captured, key_variance(mlm, pictures).result.cpu(), attention_mass(mlm, pictures, ["is this a car"]), scores))
    (one, *numbers), (other, *others) = found
    for a, b in zip(one, other, strict=True):
        for name in ("keys", "values", "encoder", "projector"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name).cpu(), rtol=1e-3, atol=1e-4)
    for a, b in zip(numbers, others, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4)


@devices
def test_every_task_gives_the_same_scores(device):
    tables, layers = [], "all" if device == "cuda" else (0, 3, 7)
    for place in ("cpu", device):
        extractor = FeatureExtractor(
            load_mlm("pocket", device=place), load_mlm("pocket", device=place, untrained=True),
            load_encoder("pocket-siglip", device=place), encoder_text=load_siglip_text("pocket-siglip"), layers=layers,
        )  # fmt: skip
        tasks = value_flow_tasks("pocket", SMALL)
        assert len(tasks) == len(SIX) + 1
        if device == "cpu":  # this test itself is tried
            tasks = {name: tasks[name] for name in ("foreground_segmentation", "semantic_correspondence")}
        tables.append({name: run_task(task, extractor, progress=False) for name, task in tasks.items()})
    for name, table in tables[0].items():
        other = tables[1][name]
        assert (table.ids, table.sources, table.columns) == (other.ids, other.sources, other.columns)
        # Scores are counts of pixels and nearest neighbours: a difference in the last bits may turn a few over.
        scale = np.abs(table.values).max(axis=(0, 1)) + 1e-9
        assert np.mean(np.abs(table.values - other.values) / scale > 0.02) < 0.02, name


@devices
def test_multiple_choice(device):
    items = open_dataset("pocket-blink", items=2)
    tables = [read_items(load_mlm("pocket", device=place), items, progress=False,
                         untrained=load_mlm("pocket", device=place, untrained=True),
                         encoder_original=load_encoder("pocket-siglip", device=place)) for place in ("cpu", device)]  # fmt: skip
    for name, table in tables[0].items():
        np.testing.assert_allclose(table.option_scores, tables[1][name].option_scores, rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(table.scores, tables[1][name].scores, atol=5e-3)


@devices
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bench_of_a_gpu(family, device):
    mlm = tiny(family)
    mlm.model.to(device)
    text, tokens = mlm.model.model.language_model, 50
    with torch.no_grad():
        found = bench_gpu.operations(lambda: text(inputs_embeds=torch.zeros(1, tokens, text.config.hidden_size, device=device)))
        weights = sum(each.numel() for name, each in text.layers.named_parameters() if "proj.weight" in name)
        assert found == 2 * tokens * weights + 2 * tokens**2 * mlm.num_layers * mlm.num_heads * mlm.head_dim  # causal
        picture = open_dataset("pocket-coco", count=1)[0].image
        figures = [*bench_gpu.capture_figures(mlm, picture, 1), *bench_gpu.rate_figures(mlm, picture, 1e9, (1, 2), 1),
                   *bench_gpu.session_figures(mlm, picture, (6, 9), 1)]  # fmt: skip
    assert len({figure["name"] for figure in figures}) == 6 and all(0 < figure["value"] < np.inf for figure in figures)
    assert all("6 of 6 first tokens the same" in figure["detail"] for figure in figures if "session" in figure["name"])
    ratio = next(figure for figure in figures if figure["name"] == "gpu_rate_ratio_b1")
    assert float(ratio["detail"].split()[1].rstrip(":")) == pytest.approx(1 / ratio["value"], rel=1e-2)


def test_the_bench_of_a_gpu_says_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.run() == [] and "no CUDA device" in capsys.readouterr().out
