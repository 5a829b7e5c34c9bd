"""Notebooks 01 and 02: claims on C1, C2 and C4, and differences along the chain from SigLIP to the values, on tables whose differences are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, score_table, tiny, tiny_pocket, tiny_siglip
from tiny_models import picture as tiny_picture

from kvutils import plots
from kvutils.errors import ParameterError
from kvutils.images import encode_image
from kvutils.metrics.layers import choosing_half
from kvutils.plots import baseline as plots_baseline
from kvutils.readout.features import FeatureExtractor, ImageFeatures
from kvutils.store import to_json
from kvutils.tasks import photographs, siglip_baseline, value_flow
from kvutils.tasks.base import summarise
from kvutils.tasks.co_segmentation import BestUnion, CoSegmentation
from kvutils.tasks.siglip_baseline import CHAIN, STEPS, claim_c4, compare_along_chain
from kvutils.tasks.tables import ScoreTable
from kvutils.tasks.text_segmentation import SemanticSegmentation
from kvutils.tasks.value_flow import BY_BEST, SIX, claim_c1, claim_c2a, claim_c2b, language_model_adds

LEVELS = {"pixels": 0.1, "encoder_original": 0.5, "encoder": 0.7, "projector": 0.6, "value.0": 0.65, "value.1": 0.3, "value.2": 0.45}


def table_of(levels: dict[str, float], n: int = 80):
    untrained = {f"untrained.{source}": 0.05 for source in levels if source.startswith("value.")}
    return score_table("semantic_segmentation", levels | untrained, SemanticSegmentation.columns, n)


def chain_of(levels: dict[str, float]) -> dict:
    return compare_along_chain(table_of(levels), SemanticSegmentation([]), n_boot=300)


def test_steps_are_the_planted_differences_and_add_up():
    """Layer 0 is the best of all, but a step of its own: the language model begins behind it."""
    chain = chain_of(LEVELS)
    assert chain["layers"] == [2, 2] and list(chain["scores"]) == list(CHAIN) and chain["n"] == 80 and chain["groups"] == 40
    steps = {"finetuning": 0.2, "projection": -0.1, "first value projection": 0.05, "language model": -0.2, "all steps": -0.05}
    for step, value in steps.items():
        found = chain["steps"][step]
        assert found["mean"] == pytest.approx(value, abs=0.02) and found["low"] < found["mean"] < found["high"]
        # Paired: what an item gives to all sources (0.2) does not widen the interval.
        assert found["high"] - found["low"] < 0.05 < chain["scores"]["value"]["high"] - chain["scores"]["value"]["low"]
    total = sum(chain["steps"][step]["mean"] for step in list(STEPS)[:-1])
    assert total == pytest.approx(chain["steps"]["all steps"]["mean"], abs=1e-12)
    assert chain["control"] == ["pixels", "pixels"]
    assert chain["above_control"]["value"]["mean"] == pytest.approx(0.35, abs=0.02)


def test_each_half_is_read_in_the_layer_that_the_other_chose():
    table = table_of(LEVELS)
    choosing = choosing_half(table.groups)
    # In one half layer 1 is by far the best; in the other it is as before, the worse of the two.
    table.values[choosing, table.sources.index("value.1"), 0] += 1
    chain = compare_along_chain(table, SemanticSegmentation([]), n_boot=300)
    assert chain["layers"] == [2, 1] and chain["n"] == 80
    read = np.where(choosing, table.of("value.2")[:, 0], table.of("value.1")[:, 0])  # the +1 is never read
    assert chain["scores"]["value"]["mean"] == pytest.approx(read.mean()) and chain["steps"]["all steps"]["high"] < 0


def test_what_is_missing_is_an_error():
    with pytest.raises(ParameterError, match="encoder_original"):
        chain_of({source: level for source, level in LEVELS.items() if source != "encoder_original"})
    with pytest.raises(ParameterError, match="at least 4"):
        compare_along_chain(table_of(LEVELS, n=6), SemanticSegmentation([]), n_boot=20)


def test_a_source_that_was_left_out_is_undefined():
    table = table_of({source: level for source, level in LEVELS.items() if source != "projector"})
    chain = compare_along_chain(replace(table, left_out={"projector": 80}), SemanticSegmentation([]), n_boot=20)
    assert chain["scores"]["projector"]["mean"] is chain["steps"]["projection"]["mean"] is None
    assert chain["steps"]["all steps"]["mean"] == pytest.approx(-0.05, abs=0.02)


def test_a_tower_that_is_no_siglip_has_no_score_by_text(tmp_path):
    chain = chain_of({source: level for source, level in LEVELS.items() if source != "encoder"})
    scores, steps = chain["scores"], chain["steps"]
    assert scores["encoder"]["mean"] is steps["finetuning"]["low"] is steps["projection"]["mean"] is None
    assert steps["all steps"]["mean"] == pytest.approx(chain_of(LEVELS)["steps"]["all steps"]["mean"], abs=0.02)
    assert claim_c4({task.name: chain for task in SIX})["tasks"][0]["value"] > 0
    chains = {task.name: chain | {"title": task.title, "metric": task.metric} for task in SIX}
    figure = plots_baseline.steps_along_chain(chains)
    assert len(figure.axes[0].texts) == 3 * 6  # of two steps nothing is known
    assert plots.save({"a": figure}, tmp_path)[0].stat().st_size > 10_000


@pytest.mark.parametrize("values, expected", [(0.45, "present"), (0.65, "opposite"), (0.5, "absent")])
def test_the_claim_is_that_siglip_is_ahead(verdict, values, expected):
    chain = chain_of(LEVELS | {"value.2": values})
    claim = claim_c4({task.name: chain for task in SIX})
    assert len(claim["tasks"]) == 6 and claim["tasks"][0]["name"].endswith("SigLIP minus best value layer")
    assert all(e["low"] < e["value"] < e["high"] and e["units"] == 40 for e in claim["tasks"])
    assert claim["tasks"][0]["value"] == pytest.approx(50 - 100 * values, abs=1) and verdict("C4", claim) == expected
    assert claim["primary"]["value"] == (6 if expected == "present" else 0)


def test_a_task_at_the_floor_says_nothing_about_siglip(verdict):
    chains = {task.name: chain_of(LEVELS) for task in SIX}
    chains["co_segmentation"] = chain_of(LEVELS | {"encoder_original": 0.05})  # not above pixels
    claim = claim_c4(chains)
    assert len(claim["tasks"]) == 5 and "5 of 5 tasks" in claim["note"] and claim["prerequisites"][0]["holds"]
    assert "without Co-segmentation (SigLIP not above the control)" in claim["note"]
    claim = claim_c4({name: chains["co_segmentation"] for name in chains})
    assert verdict("C4", claim) == "cannot appear here" and verdict("C4", claim_c4({})) == "not measured"


FLOW = {"pixels": 0.1, "projector": 0.3, "value.0": 0.6} | {f"value.{i}": 0.3 for i in range(1, 7)}


def claims_of(levels: dict[str, float], **others: float) -> dict:
    """C1, C2a, C2b of six such tasks, and the summaries behind them."""
    untrained = {f"untrained.{source}": 0.05 for source in levels if source.startswith("value.")} | others
    table = score_table("semantic_segmentation", levels | untrained, SemanticSegmentation.columns, own=0.05)
    summaries = {task.name: summarise(table, SemanticSegmentation([]), 200) | {"title": task.title} for task in SIX}
    return {"C1": claim_c1(summaries), "C2a": claim_c2a(summaries), "C2b": claim_c2b(summaries)} | {"tasks": summaries}


@pytest.mark.parametrize("curve, c2a, c2b", [
    ({3: 0.45, 4: 0.45}, "present", "present"), ({1: 0.5, 2: 0.4, 6: 0.2}, "opposite", "present"),
    ({4: 0.35, 5: 0.38, 6: 0.5}, "present", "opposite"), ({}, "absent", "absent"),
])  # fmt: skip
def test_rise_and_fall_are_two_claims_and_layer_0_is_none(verdict, curve, c2a, c2b):
    found = claims_of(FLOW | {f"value.{layer}": level for layer, level in curve.items()})
    assert (verdict("C1", found["C1"]), verdict("C2a", found["C2a"]), verdict("C2b", found["C2b"])) == ("present", c2a, c2b)
    assert found["C2a"]["primary"]["name"].endswith("mean over 6 tasks") and len(found["C2b"]["others"]) == 7
    assert found["C2b"]["others"][-1]["name"] == "mean of the layers between minus last layer, mean over 6 tasks"
    last = {f"{task.title}: best value layer minus first value projection": -1 for task in SIX}
    assert {each["name"]: np.sign(each["high"]) for each in found["C2a"]["others"][7:]} == last
    adds = language_model_adds(found["tasks"])
    assert adds["mean"]["value"] == pytest.approx(100 * (max([0.3, *curve.values()]) - 0.3), abs=1.5) and len(adds["tasks"]) == 6
    to_json([found, adds])


def test_co_segmentation_by_its_best_clusters_stands_beside():
    """The task's rows by another column: that is what the claims list, with the other tasks as they are."""
    table, best = score_table("co_segmentation", FLOW | LEVELS | {"value.3": 0.65}, CoSegmentation.columns, own=0.05), "value.3"
    table.values[..., 1] = table.values[..., 0]  # `J, oracle` like J, but in the best layer
    table.values[:, table.sources.index(best), 1] += 0.3
    best_union, usual = (summarise(table, task([]), 200) for task in (BestUnion, CoSegmentation))
    summaries = {task.name: usual | {"title": task.title} for task in SIX}
    for claim in (claim_c2a, claim_c2b):
        beside = next(each for each in claim(summaries, best_union)["others"] if BY_BEST in each["name"])
        assert beside["value"] == pytest.approx(claim(summaries)["primary"]["value"] + 30 / 6)
    chain = compare_along_chain(table, CoSegmentation([]), 200)
    (beside,) = claim_c4({task.name: chain for task in SIX}, compare_along_chain(table, BestUnion([]), 200))["others"]
    assert beside["value"] == pytest.approx(-100 * chain["steps"]["all steps"]["mean"] - 30)


def test_what_predicts_nothing_is_no_control_and_a_floor_has_no_shape(verdict):
    without = {source: level for source, level in FLOW.items() if source != "pixels"}
    nothing = {f"untrained.value.{layer}": 0.0 for layer in range(7)}
    table = score_table("co_segmentation", without | nothing, CoSegmentation.columns, own=0.05, shared=0)
    table.values[:, -7:] = 0.0
    summary = summarise(table, CoSegmentation([]), 200)
    alone = {CoSegmentation.name: summary}
    assert verdict("C1", claim_c1(alone)) == "cannot appear here"
    assert "untrained values predict nothing (Jaccard 0.000)" in claim_c1(alone)["prerequisites"][0]["reason"]
    other = claims_of(FLOW)["tasks"] | alone
    claim = claim_c1(other)
    assert verdict("C1", claim) == "present" and "5 of 5 tasks" in claim["note"] and "without Co-segmentation" in claim["note"]
    floor = claims_of(dict.fromkeys(FLOW, 0.3))  # no better than pixels
    assert verdict("C1", floor["C1"]) == "absent" and verdict("C2a", floor["C2a"]) == verdict("C2b", floor["C2b"]) == "cannot appear here"


def test_figures_need_only_the_results_file(redraw):
    grid, colours = np.random.default_rng(0).random((4, 4)).tolist(), np.zeros((4, 4, 3), int).tolist()
    scene = {"image": encode_image(Image.new("RGB", (32, 32), "teal")), "size": [32, 32], "point": [8, 8],
             **{kind: dict.fromkeys(("encoder_original", "encoder", "value.0"), each) for kind, each in {"similarity": grid, "pca": colours}.items()}}
    chain = chain_of(LEVELS)
    chains = {task.name: chain | {"title": task.title, "metric": task.metric} for task in SIX}
    figures = redraw("02_siglip_baseline", {"chains": chains, "scene": scene})
    assert list(figures) == ["02_steps", "02_chain"]
    (axis,) = figures["02_steps"].axes
    said = {tuple(text.get_position()): text.get_text() for text in axis.texts}
    assert len(said) == 30 and said[0, 5].startswith(f"{100 * chain['steps']['finetuning']['mean']:+.1f}\n[")
    assert "SigLIP ahead of the best values on 6 of 6 tasks, behind on 0" in figures["02_steps"].get_suptitle()
    assert "losing most often: projection and language model (6 of 6); adding most often: finetuning and" in figures["02_steps"].get_suptitle()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_reading_is_changed_and_nothing_else(family):
    """Layer 0 computes every value from its token alone; from layer 1 on a token has read those before it."""
    mlm, image = tiny(family), tiny_picture(64, 40, 3)
    (usual,), turned = FeatureExtractor(mlm, keys=False).images([("x", image)]), photographs.columnwise(mlm, image)
    apart = [(turned.features[f"value.{layer}"].float() - usual.features[f"value.{layer}"].float()).abs().max() for layer in (0, 1, 2)]
    assert apart[0] < 2e-3 < 1e-2 < min(apart[1:]) and np.array_equal(turned.layout.cells, usual.layout.cells)


def test_photographs_are_measured_and_said(redraw):
    extractor = FeatureExtractor(tiny_pocket(), encoder_original=tiny_siglip(), keys=False)
    table, maps = photographs.look_at(extractor, {"one": (tiny_picture(64, 48, 1), (8, 8)), "two": (tiny_picture(48, 64, 2), (8, 8))})
    assert table.ids == ["one", "two", "grey", "grey, by columns"] and maps.keys() == set(table.ids)
    values = dict(zip(table.columns, np.moveaxis(table.values, -1, 0), strict=True))
    assert np.isnan(values["rows"][3, :2]).all() and (values["rows"] + values["columns"])[:3].max() <= 1
    assert values["like SigLIP"][:2, 0] == pytest.approx(1) and np.isnan(values["like grey"][2:]).all()
    numbers = photographs.summary(ScoreTable.of_frame(table.frame()))
    assert numbers == photographs.summary(table) and "(one) and" in numbers["said"]
    places = [table.sources.index(source) for source in table.sources if source.startswith("value.")]
    table.values[2:, places, 0], table.values[2:, places, 1] = np.array([[0.6], [0.1]]), np.array([[0.1], [0.6]])
    numbers = photographs.summary(table)
    assert numbers["band"] and numbers["turns"] and "the order in which causal attention reads" in numbers["said"]
    table.values[2:, places[1], :2] = 0.1  # one layer without, the others decide
    assert photographs.summary(table)["turns"]
    table.values[2:, places] = 0.1
    assert not photographs.summary(table)["band"] and "has no horizontal band" in photographs.summary(table)["said"]
    table.values[2:, places[:2]] = np.nan  # Qwen2.5-VL's tower makes equal tokens of a grey picture
    assert "rows of the grid account for none (equal tokens), none (equal tokens), 10 and 10 % of how" in photographs.summary(table)["said"]
    assert "equal tokens" in [text.get_text() for a in plots.value_flow.photographs(maps, photographs.summary(table)).axes for text in a.texts]
    flat = ImageFeatures(extractor.images([("x", tiny_picture(64, 48, 1))])[0].layout, {"value.1": torch.ones(4, 8)}, torch.device("cpu"))
    assert np.isnan(photographs._numbers(flat, "value.1", None)).all()
    summaries = claims_of(FLOW)["tasks"]
    figures = redraw("01_value_flow", {"tasks": summaries, "maps": maps, "photographs": numbers})
    assert "A grey picture has a horizontal band, upright" in figures["01_photographs"].get_suptitle()
    assert "on 6 of 6 tasks;" in figures["01_value_flow"].get_suptitle() and "build up on 0" in figures["01_value_flow"].get_suptitle()
    for count in (1, 5):  # with data sets left out each column has its sources and layers below it
        figure = plots.value_flow.layer_curves(dict([*summaries.items()][:count]))
        figure.canvas.draw()
        drawn = [axis for axis in figure.axes if axis.axison]
        assert len(drawn) == count and all(any(label.get_text() for label in axis.get_xticklabels()) for axis in drawn[-3:])
        assert min(axis.get_window_extent().height for axis in drawn) > 90 and figure.get_figwidth() > 8


def test_results_follow_from_tables_that_went_through_files(verdict):
    """Six tasks of planted scores, without settings, texts read otherwise or data: both notebooks, the same from tables that were read."""
    levels = FLOW | {"encoder_original": 0.5, "encoder": 0.4} | {f"untrained.value.{layer}": 0.05 for layer in range(7)} | {"value.4": 0.45}
    plain = {f"uncentred.{source}": level - 0.1 for source, level in levels.items() if source[:3] in ("val", "enc", "pro")}
    measured = {task.name: score_table(task.name, levels | (plain if "text" in task.title or "Ref" in task.title else {}), task.columns, own=0.05)
                for task in SIX if task is not CoSegmentation}  # fmt: skip
    photos = ScoreTable("photographs", ["one"], ["one"], ["value.0"], list(photographs.COLUMNS), np.full((1, 1, 4), 0.1))
    about = {"parameters": {"bootstrap": 200, "seed": 0}, "left_out": {"a": "not here"}, "behind": {}}
    about["task_parameters"] = dict.fromkeys(measured, {})
    found = value_flow.results(measured | {"photographs": photos}, about)
    read = {name: ScoreTable.of_frame(table.frame()) for name, table in (measured | {"photographs": photos}).items()}
    assert to_json(value_flow.results(read, about)) == to_json(found)
    words = {name: verdict(name, found["claims"][name]) for name in ("C1", "C2a", "C2b", "X6")}
    assert words == {"C1": "present", "C2a": "present", "C2b": "present", "X6": "not measured"} and "not here" in found["claims"]["X6"]["note"]
    assert list(found["tasks"]) == list(measured) and "without Co-segmentation" in found["finding"] and found["text_reading"] == {}
    assert list(found["centring"]) == ["semantic_segmentation", "referring_segmentation"]
    chain = siglip_baseline.results(measured, about)
    assert chain["chains"].keys() == measured.keys() and chain["uncentred"].keys() == {"semantic_segmentation", "referring_segmentation"}
    few = {name: replace(table, groups=["a"] * len(table)) for name, table in measured.items()}
    assert siglip_baseline.results(few, about)["left_out"].keys() == measured.keys()
