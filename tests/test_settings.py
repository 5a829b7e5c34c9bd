"""X6: settings are changed for real, what they change is found, and nothing is found where nothing changes."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from kvutils.datasets.samples import KeypointPair, NamedMask, YesNoSample
from kvutils.errors import ModelError
from kvutils.metrics.effects import part
from kvutils.metrics.statistics import Effect
from kvutils.readout.features import FeatureExtractor
from kvutils.run.judged import load_claims
from kvutils.run.verdicts import judge
from kvutils.store import Parts
from kvutils.tasks import settings
from kvutils.tasks.base import run_task
from kvutils.tasks.correspondence import SemanticCorrespondence
from kvutils.tasks.settings import ValueReader, claim_x6, measure_settings, open_pope, setting_changes, settings_of, some_of
from kvutils.tasks.text_segmentation import ReferringSegmentation
from kvutils.tasks.yes_no import Answers, Pope
from tests.tiny_models import FAMILIES, picture, tiny

SIZE = (64, 56)
(X6,) = (claim for claim in load_claims() if claim["id"] == "X6")


def made(n: int = 6) -> dict:
    points = [np.random.default_rng(i).uniform(4, 50, (8, 2)) for i in range(n)]
    pairs = [KeypointPair(f"p{i}", "x", f"s{i}", picture(*SIZE, i), points[i], f"t{i}", picture(*SIZE, i).transpose(0), points[i],
                          np.array([0, 0, *SIZE])) for i in range(n)]  # fmt: skip
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[8:40, 8:30] = 1
    texts = [NamedMask(f"n{i}", f"s{i}", picture(*SIZE, i), ("red fish", "blue car")[i % 2], mask, f"s{i}", "fish") for i in range(n)]
    return {task.name: task for task in (SemanticCorrespondence(pairs), ReferringSegmentation(texts))}


def pope(n: int = 6) -> Pope:
    pictures = [picture(*SIZE, i) for i in range(n)]
    return Pope([YesNoSample(f"{i}{k}", f"s{i}", pictures[i], f"what is {('a fish', 'red car')[k]}", ("yes", "no")[k], "random")
                 for i in range(n) for k in range(2)])  # fmt: skip


def loader(family: str, seeds: dict):
    """A tiny model in any precision; its weights are others where `seeds` says so of a dtype or an attention."""

    def load(dtype: str, attention: str):
        mlm = tiny(family, attention=attention, seed=seeds.get(dtype, seeds.get(attention, 0)))
        mlm.model.to(getattr(torch, dtype))
        return mlm

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_is_found_where_one_is_planted_and_none_where_nothing_changes(family, monkeypatch, tmp_path):
    monkeypatch.setattr("kvutils.processors.find_spec", lambda name: None)
    tasks, load, mlm = made(), loader(family, {"bfloat16": 1}), tiny(family)
    tables = {name: run_task(task, FeatureExtractor(mlm, keys=False), progress=False) for name, task in tasks.items()}
    measure = partial(measure_settings, tasks, tables, pope(), mlm, load, progress=False)
    changes = partial(setting_changes, tasks=[type(task) for task in tasks.values()], n_boot=200)
    measured, left_out = measure(Parts(tmp_path, x=1))
    found = changes(tables | measured, left_out=left_out)
    again = {name: type(table).of_frame(table.frame()) for name, table in (tables | measure(Parts(tmp_path, x=1))[0]).items()}
    assert found["layers"] == [2, 4] and changes(again, left_out=left_out) == found  # parts and tables are read back
    assert list(found["left_out"]) == ["image backend torchvision", "precision float16"] and "pip install" in found["left_out"][
        "image backend torchvision"]  # fmt: skip
    scores = [f"{task.title}, layer {layer}" for task in tasks.values() for layer in (2, 4)] + ["POPE, F1"]
    assert {name: list(each) for name, each in found["changes"].items()} == {
        "batch size 1": scores[-1:], "precision bfloat16": scores, "attention eager": scores, "resolution 0.75 of the side": scores}  # fmt: skip
    largest = {name: max(abs(each["value"]) for each in scores.values()) for name, scores in found["changes"].items()}
    assert largest["batch size 1"] == 0 and largest["attention eager"] < 1e-3  # other kernels, rounded to half precision
    assert largest["precision bfloat16"] > 1 < largest["resolution 0.75 of the side"]  # other weights; coarser pictures
    (before,), (after,) = (run_task(tasks["referring_segmentation"], reader, progress=False).of("value.4")[:1, 3] for reader in (
        FeatureExtractor(mlm, keys=False), ValueReader(settings_of(mlm, load, lambda: 999)["precision bfloat16"](), [2, 4])))  # fmt: skip
    assert before != after
    claim = claim_x6(found)
    def broken(dtype: str, attention: str):
        if attention == "eager":
            raise ModelError("half of the weights are missing")
        mlm = load(dtype, attention)
        mlm.model.model.language_model.layers[1].mlp.down_proj.weight.data *= float("nan")
        return mlm

    one = {"referring_segmentation": tasks["referring_segmentation"]}
    measured, left_out = measure_settings(one, tables, None, mlm, broken, progress=False)
    without = changes(tables | measured, left_out=left_out)
    assert list(without["changes"]) == ["resolution 0.75 of the side"] and "without POPE" in without["left_out"]["batch size 1"]
    assert without["left_out"]["attention eager"] == "half of the weights are missing" and "finite" in without["left_out"]["precision bfloat16"]
    assert len(claim["others"]) == 15 and claim["primary"] in [
        each | {"what": claim["primary"]["what"]} for each in found["changes"][claim["primary"]["name"].split(":")[0]].values()]
    assert all(f"{name}: " in claim["note"] for name in (*found["changes"], *found["left_out"]))


def test_the_model_of_one_setting_is_gone_before_the_next_is_loaded():
    """Of 7B, two beside the first do not fit."""
    loaded, make, mlm = [], loader("llava_onevision", {}), tiny("llava_onevision")

    def load(**how):
        gc.collect()
        assert [each for each in loaded if each()] == []
        loaded.append(weakref.ref((one := make(**how)).model))
        return one

    task = {"referring_segmentation": made()["referring_segmentation"]}
    tables = {name: run_task(each, FeatureExtractor(mlm, keys=False), progress=False) for name, each in task.items()}
    measure_settings(task, tables, pope(), mlm, load, progress=False)
    assert len(loaded) == 2


def test_parts_of_one_setting_are_not_those_of_another(tmp_path):
    mlm, load = tiny("qwen2_5_vl"), loader("qwen2_5_vl", {})
    every = settings_of(mlm, load, lambda: 64 * 56)
    assert every["resolution 0.75 of the side"]().mlm.max_pixels == 64 * 56 * 9 // 16
    assert settings_of(replace(mlm, max_pixels=1024), load, lambda: 64 * 56)["resolution 0.75 of the side"]().mlm.max_pixels == 576
    assert str(settings_of(replace(mlm, max_pixels=1024), load, lambda: 1)["attention eager"]().mlm.max_pixels) == "1024"
    mlm = tiny("llava_next")
    every = [each() for name, each in settings_of(mlm, loader("llava_next", {}), lambda: 999).items()
             if name not in ("precision float16", "image backend torchvision")]  # fmt: skip
    readers = [ValueReader(setting, [1]).fingerprint for setting in every]
    assert len(set(readers)) == 4
    coarse, image = every[-1], picture(*SIZE, 3)
    assert coarse.shown(image).size == image.size and coarse.shown(image) != image and every[0].shown(image) is image
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "ask_under_blocks", lambda task, *rest, **more: Answers(task, {
            "none": asked.append((more["batch_size"], np.asarray(task.samples[0].image).sum())) or ["yes"] * len(task.samples)}, {}))
        for setting in (*every, *every):
            settings._answers(pope(), setting, Parts(tmp_path, x=1))
    assert len(asked) == 4 and len(set(asked)) == 3


def test_pope_is_read_where_it_is(monkeypatch):
    assert len(open_pope("pocket", {"pocket-davis-2017": None}).images) > 100
    monkeypatch.delenv("KVUTILS_DATA", raising=False)
    assert open_pope("paper", {}) is None


def test_items_are_spread_and_pictures_counted():
    tasks = made(30)
    assert [each.id for each in some_of(tasks["semantic_correspondence"], 20).samples] == [f"p{i}" for i in range(0, 30, 3)]
    assert len(some_of(tasks["referring_segmentation"], 20).samples) == 20 and len(some_of(tasks["semantic_correspondence"], 2).samples) == 4


def changes(*values, error=0.1) -> dict:
    named = {f"score {i}": part(f"a: score {i}", Effect(v, v - 2 * error, v + 2 * error, 60, error, 60)) for i, v in enumerate(values)}
    return {"layers": [1], "changes": {"a": named}, "left_out": {}}


@pytest.mark.parametrize(("found", "word"), [
    (changes(0.1, -0.2, 0.0), "holds"), (changes(0.1, -0.4, 0.0), "cannot tell"), (changes(0.1, -2.0, 0.0), "does not hold"),
    (changes(*[0.0] * 40, 0.77), "cannot tell"), (changes(0.77), "does not hold"),  # one of 41 may be that large by chance
    ({"layers": [1], "changes": {}, "left_out": {"a": "not here."}}, "not measured")])  # fmt: skip
def test_the_bound_holds_for_every_score_and_a_change_is_sure(found, word):
    claim = claim_x6(found)
    assert judge(X6, claim).word == word
    if word == "does not hold" and len(claim["others"]) == 2:
        noisy = {"score 3": part("b: score 3", Effect(1, -9, 11, 60, 5, 60))}  # reaches further, and says nothing
        assert judge(X6, claim_x6(found | {"changes": found["changes"] | {"b": noisy}})).word == word


def test_without_any_of_the_six_tasks_there_is_nothing_to_compare():
    """As where notebook 01 reads the probe's data set alone, and POPE is not to be had: no usual picture, whose size Qwen's would follow."""
    found, left_out = measure_settings({}, {}, None, tiny("qwen2_5_vl"), loader("qwen2_5_vl", {}), progress=False)
    assert not found and "without POPE, which could not be read" in left_out["resolution 0.75 of the side"]
