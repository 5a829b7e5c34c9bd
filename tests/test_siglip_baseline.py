"""Notebook 02: differences along the chain from SigLIP to the values, on tables whose differences are known."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_models import score_table

from kvutils import plots
from kvutils.errors import ParameterError
from kvutils.images import encode_image
from kvutils.metrics.statistics import choosing_half
from kvutils.plots import baseline as plots_baseline
from kvutils.tasks.text_segmentation import SemanticSegmentation
from kvutils.tasks.value_flow import CHAIN, SIX, STEPS, claim_c4, compare_along_chain

LEVELS = {"pixels": 0.1, "encoder_original": 0.5, "encoder": 0.7, "projector": 0.6, "value.0": 0.3, "value.1": 0.45}


def table_of(levels: dict[str, float], n: int = 80):
    shuffled = {f"shuffled.{source}": 0.1 for source in levels if source.startswith("value.")}
    return score_table("semantic_segmentation", levels | shuffled, SemanticSegmentation.columns, n)


def chain_of(levels: dict[str, float]) -> dict:
    return compare_along_chain(table_of(levels), SemanticSegmentation([]), n_boot=300)


def test_steps_are_the_planted_differences_and_add_up():
    chain = chain_of(LEVELS)
    assert chain["best"] == "value.1" and list(chain["scores"]) == list(CHAIN)
    for step, value in {"finetuning": 0.2, "projection": -0.1, "language model": -0.15, "all steps": -0.05}.items():
        found = chain["steps"][step]
        assert found["mean"] == pytest.approx(value, abs=0.02) and found["low"] < found["mean"] < found["high"]
        # Paired: what an item gives to all sources (0.2) does not widen the interval.
        assert found["high"] - found["low"] < 0.05 < chain["scores"]["value"]["high"] - chain["scores"]["value"]["low"]
    total = sum(chain["steps"][step]["mean"] for step in list(STEPS)[:-1])
    assert total == pytest.approx(chain["steps"]["all steps"]["mean"], abs=1e-12)


def test_only_the_half_that_did_not_choose_the_layer_is_reported():
    table = table_of(LEVELS)
    choosing = choosing_half(table.groups)
    # Where the layer is chosen, layer 0 is by far the best; elsewhere it is as before, the worse of the two.
    table.values[choosing, table.sources.index("value.0"), 0] += 1
    chain = compare_along_chain(table, SemanticSegmentation([]), n_boot=300)
    assert chain["best"] == "value.0" and chain["n"] == (~choosing).sum() and chain["groups"] == 20
    assert chain["scores"]["value"]["mean"] == pytest.approx(0.3, abs=0.1) and chain["steps"]["all steps"]["high"] < 0


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
    assert claim_c4({task.name: chain for task in SIX})["entries"][0]["value"] > 0
    chains = {task.name: chain | {"title": task.title, "metric": task.metric} for task in SIX}
    drawn = {"a": plots_baseline.scores_along_chain(chains), "b": plots_baseline.steps_along_chain(chains)}
    assert all(path.stat().st_size > 10_000 for path in plots.save(drawn, tmp_path))


@pytest.mark.parametrize("values, expected", [(0.45, "reproduced"), (0.65, "not reproduced"), (0.5, "inconclusive")])
def test_the_claim_is_that_siglip_is_ahead(verdict, values, expected):
    chain = chain_of(LEVELS | {"value.1": values})
    claim = claim_c4({task.name: chain for task in SIX})
    assert len(claim["entries"]) == 6 and claim["entries"][0]["name"].endswith("SigLIP minus value.1")
    assert all(e["low"] < e["value"] < e["high"] for e in claim["entries"])
    assert claim["entries"][0]["value"] == pytest.approx(0.5 - values, abs=0.02) and verdict("C4", claim) == expected


def test_figures_need_only_the_results_file(redraw):
    grid = np.random.default_rng(0).random((4, 4)).tolist()
    scene = {"image": encode_image(Image.new("RGB", (32, 32), "teal")), "size": [32, 32], "point": [8, 8],
             "similarity": {source: grid for source in ("encoder_original", "encoder", "projector", "value.0")}}  # fmt: skip
    chain = chain_of(LEVELS)
    chains = {task.name: chain | {"title": task.title, "metric": task.metric} for task in SIX}
    figures = redraw("02_siglip_baseline", {"chains": chains, "picture": scene})
    assert list(figures) == ["02_scores", "02_steps", "02_similarity"]
    (axis,) = figures["02_steps"].axes
    right = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "s"]  # finetuning
    assert right == pytest.approx([chain["steps"]["finetuning"]["mean"]] * 6)
