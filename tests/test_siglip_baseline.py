"""Notebook 02: differences along the chain from SigLIP to the values, on tables whose differences are known."""

import numpy as np
import pytest
from PIL import Image

from kvutils import plots
from kvutils.errors import ParameterError
from kvutils.images import encode_image
from kvutils.metrics.statistics import choosing_half
from kvutils.plots import baseline as plots_baseline
from kvutils.run.report import judge, load_claims
from kvutils.store import read_json, write_json
from kvutils.tasks.base import ScoreTable
from kvutils.tasks.text_segmentation import SemanticSegmentation
from kvutils.tasks.value_flow import CHAIN, SIX, STEPS, claim_c4, compare_along_chain

LEVELS = {"pixels": 0.1, "encoder_original": 0.5, "encoder": 0.7, "projector": 0.6, "value.0": 0.3, "value.1": 0.45}


def table_of(levels: dict[str, float], n: int = 80) -> ScoreTable:
    """Items in groups of two; every source has its level, what items share, and a little of its own."""
    rng = np.random.default_rng(0)
    sources = [*levels, *(f"shuffled.{source}" for source in levels if source.startswith("value."))]
    values = np.zeros((n, len(sources), len(SemanticSegmentation.columns)))
    values[..., 0] = [levels.get(source, 0.1) for source in sources]
    values[..., 0] += rng.normal(0, 0.2, (n, 1)) + rng.normal(0, 0.02, (n, len(sources)))
    items = [f"i{i}" for i in range(n)]
    return ScoreTable("semantic_segmentation", items, [f"g{i // 2}" for i in range(n)], sources,
                      list(SemanticSegmentation.columns), values)  # fmt: skip


def chain_of(levels: dict[str, float]) -> dict:
    return compare_along_chain(table_of(levels), SemanticSegmentation([]), n_boot=300)


def test_steps_are_the_planted_differences_and_add_up():
    chain = chain_of(LEVELS)
    assert chain["best"] == "value.1" and list(chain["scores"]) == list(CHAIN)
    wanted = {"finetuning": 0.2, "projection": -0.1, "language model": -0.15, "all steps": -0.05}
    for step, value in wanted.items():
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
    assert chain["scores"]["value"]["mean"] == pytest.approx(0.3, abs=0.1)
    assert chain["steps"]["all steps"]["high"] < 0


def test_what_is_missing_is_an_error():
    without = {source: level for source, level in LEVELS.items() if source != "encoder_original"}
    with pytest.raises(ParameterError, match="encoder_original"):
        chain_of(without)
    with pytest.raises(ParameterError, match="at least 4"):
        compare_along_chain(table_of(LEVELS, n=6), SemanticSegmentation([]), n_boot=20)


def test_a_tower_that_is_no_siglip_has_no_score_by_text(tmp_path):
    chain = chain_of({source: level for source, level in LEVELS.items() if source != "encoder"})
    assert (
        chain["scores"]["encoder"]["mean"] is chain["steps"]["finetuning"]["low"] is chain["steps"]["projection"]["mean"] is None
    )
    whole = chain_of(LEVELS)
    assert chain["steps"]["all steps"]["mean"] == pytest.approx(whole["steps"]["all steps"]["mean"], abs=0.02)
    assert claim_c4({task.name: chain for task in SIX})["entries"][0]["value"] > 0
    chains = {task.name: chain | {"title": task.title, "metric": task.metric} for task in SIX}
    drawn = {"a": plots_baseline.scores_along_chain(chains), "b": plots_baseline.steps_along_chain(chains)}
    assert all(path.stat().st_size > 10_000 for path in plots.save(drawn, tmp_path))


@pytest.mark.parametrize("values, verdict", [(0.45, "reproduced"), (0.65, "not reproduced"), (0.5, "inconclusive")])
def test_the_claim_is_that_siglip_is_ahead(values, verdict):
    chains = {task.name: chain_of(LEVELS | {"value.1": values}) for task in SIX}
    claim = claim_c4(chains)
    assert len(claim["entries"]) == 6 and claim["entries"][0]["name"].endswith("SigLIP minus value.1")
    assert all(e["low"] < e["value"] < e["high"] for e in claim["entries"])
    assert claim["entries"][0]["value"] == pytest.approx(0.5 - values, abs=0.02)
    (c4,) = (each for each in load_claims() if each["id"] == "C4")
    assert judge(c4, claim)[0] == verdict


def test_figures_need_only_the_results_file(tmp_path):
    grid = np.random.default_rng(0).random((4, 4)).tolist()
    scene = {"image": encode_image(Image.new("RGB", (32, 32), "teal")), "size": [32, 32], "point": [8, 8],
             "similarity": {source: grid for source in ("encoder_original", "encoder", "projector", "value.0")}}  # fmt: skip
    chains = {task.name: chain_of(LEVELS) | {"title": task.title, "metric": task.metric} for task in SIX}
    write_json(tmp_path / "02_siglip_baseline.json", {"chains": chains, "picture": scene})
    (tmp_path / "figures").mkdir()
    paths = plots.draw_all(tmp_path, tmp_path / "figures")
    assert [path.stem for path in paths] == ["02_scores", "02_steps", "02_similarity"]
    assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in paths)
    figure = plots.DRAW["02_siglip_baseline"](read_json(tmp_path / "02_siglip_baseline.json"))["02_steps"]
    (axis,) = figure.axes
    right = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "s"]  # finetuning
    assert right == pytest.approx([chain["steps"]["finetuning"]["mean"] for chain in chains.values()])
    plots.plt.close("all")
