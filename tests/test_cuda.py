"""On a GPU: the same numbers as on the CPU, from the cache to the scores. Every test also runs CPU against CPU."""

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
    tables = []
    for place in ("cpu", device):
        extractor = FeatureExtractor(
            load_mlm("pocket", device=place), load_mlm("pocket", device=place, untrained=True),
            load_encoder("pocket-siglip", device=place), encoder_text=load_siglip_text("pocket-siglip"),
        )  # fmt: skip
        tasks = value_flow_tasks("pocket", SMALL)
        assert len(tasks) == len(SIX) + 1
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
