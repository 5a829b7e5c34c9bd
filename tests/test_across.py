"""X1 and C3 are read from the results of several models together."""

import json
import shutil

import numpy as np
import pytest
from scipy.special import stdtrit
from scipy.stats import pearsonr

from kvutils.checkpoints import MODELS
from kvutils.metrics.effects import measured, no_floor, part
from kvutils.metrics.statistics import Effect
from kvutils.plots.models import BEFORE, beside_each_other
from kvutils.run import report
from kvutils.run.across import at_once, correlation, shown
from kvutils.run.judged import of_profile
from kvutils.store import write_json


def effect(value: float, reach: float = 1.0) -> Effect:
    return Effect(value, value - reach, value + reach, 100, reach / 1.96, 100)


FLOOR = no_floor("referring", effect(0.2), "points")


def write_model(root, name, family="llava_onevision", values=(5.0, 4.0, 6.0), reach=1.0, needs=(), size="full", more=(), **points):
    """The results of a model as notebooks 01, 03 and 05 leave them; values: the effects of C1, C2a and C2b, in points."""
    folder = root / "data" / "results" / "paper" / name
    parts = {key: part("mean", effect(value, reach)) for key, value in zip(("C1", "C2a", "C2b"), values, strict=True)}
    claims = {key: measured(each, prerequisites=needs, tasks=[each]) for key, each in parts.items()}
    added, accuracy, tasks = (points.get(key, other) for key, other in {"added": None, "accuracy": 0.8, "tasks": 6}.items())
    one = part("task", effect(added or 0.0))
    adds = {} if added is None else {"language_model_adds": {"mean": one, "tasks": [one] * tasks}}
    write_json(folder / "01_value_flow.json", {"claims": claims | {key: claims["C1"] for key in more}, "parameters": {"size": size}, **adds})
    write_json(folder / "provenance" / "01_value_flow.json", {"family": family})
    if added is not None:
        write_json(folder / "03_input_agnostic_keys.json", {"blocking": {"pope": {"plain": {"scores": {"mean": {"accuracy": {"mean": accuracy}}}}}}})
        write_json(folder / "05_blink_gap.json", {"official": {"accuracy": {"Total": accuracy - 0.1}}})


def lines_of(root) -> dict[str, dict[str, dict]]:
    """{model: {claim: its line in claims.json}}"""
    report.write(root)
    return {path.parent.name: {line["id"]: line for line in json.loads(path.read_text())} for path in root.rglob("claims.json")}


@pytest.mark.parametrize(("second", "verdict", "weakest"), [
    ({"values": (5.0, 3.0, 6.0)}, "holds", "C2a in qwen2_5_vl (b)"), ({"values": (5.0, 0.1, 6.0)}, "does not hold", "C2a in qwen2_5_vl (b)"),
    ({"values": (5.0, -9.0, 0.1)}, "does not hold", "C2a in qwen2_5_vl (b)"),
    ({"values": (5.0, 0.0, 2.0), "reach": 4.0}, "cannot tell", "C2a in qwen2_5_vl (b)"),
    ({"values": (3.9, 9.0, 2.5), "reach": 3.0}, "cannot tell", "C2b in qwen2_5_vl (b)"),  # the smallest of all is present elsewhere
    ({"needs": [FLOOR]}, "cannot appear here", None), ({"family": "llava_onevision"}, "not measured", None),
    ({"size": "quick"}, "not measured", None)])  # fmt: skip
def test_x1_is_as_strong_as_its_weakest_effect(tmp_path, second, verdict, weakest):
    write_model(tmp_path, "a", values=(5.0, 4.0, 2.4))
    write_model(tmp_path, "b", **{"family": "qwen2_5_vl"} | second)
    found = lines_of(tmp_path)
    assert found["a"]["X1"] == found["b"]["X1"], "the same in each model's report"
    assert found["a"]["X1"]["verdict"] == verdict and found["a"]["C1"]["verdict"] == "present"
    said = found["a"]["X1"]["why"]
    if verdict == "holds":  # of all effects the smallest is the first family's
        weakest = "C2b in llava_onevision (a)"
    if weakest:  # what is not there is said by an interval that holds for all six
        beyond = "" if verdict == "holds" else ", its interval for 6 effects at once"
        assert found["a"]["X1"]["comparison"] == weakest + beyond
    assert verdict != "not measured" or said == "1 of 2 families measured."
    assert verdict != "cannot appear here" or said.endswith("points from its control (qwen2_5_vl).") and said.count("Floor") == 1


def test_an_interval_for_several_has_the_freedom_of_the_effect_that_is_one_of_them():
    """Of a mean over tasks that is less than its units."""
    few, many = (part("C2a", Effect(1.0, 0.0, 2.0, 500, 0.5, units), units=400) for units in (11, 400))
    assert few["freedom"] == 10 and at_once(few, 9)["low"] == pytest.approx(1 - 0.5 * float(stdtrit(10, 1 - 0.025 / 9)))
    assert at_once(few, 9)["low"] < at_once(many, 9)["low"]


def test_results_of_another_version_beside_these_do_no_harm(tmp_path):
    for name in ("a", "b"):
        write_model(tmp_path, name, values=(5.0, 4.0, 2.4), family=name)
    path = tmp_path / "data/results/paper/b/01_value_flow.json"
    path.write_text(path.read_text().replace('"freedom"', '"degrees"'))
    found = lines_of(tmp_path)
    assert found["a"]["C1"]["verdict"] == "present" and found["a"]["X1"]["why"] == "1 of 2 families measured."
    assert found["b"]["C1"]["why"].startswith("Its results are of another version of kvutils")


def test_a_copy_of_a_folder_is_no_further_training(tmp_path):
    for number in range(6):
        write_model(tmp_path, f"m{number}", added=number + 0.1 * number**2, accuracy=0.5 + 0.04 * number)
        write_json(tmp_path / f"data/results/paper/m{number}/provenance/01_value_flow.json", {"family": "one", "revision": f"sha256:{number}"})
    found = lines_of(tmp_path)["m0"]["C3"]
    shutil.copytree(tmp_path / "data/results/paper/m3", tmp_path / "data/results/paper/m3-backup")
    assert lines_of(tmp_path)["m0"]["C3"] == found and found["units"] == 6


def test_a_family_speaks_by_its_fullest_model_and_samples_where_there_is_nothing_else(tmp_path):
    write_model(tmp_path, "a", values=(0.0, 0.0, 0.0), size="quick")
    write_model(tmp_path, "b", values=(5.0, 5.0, 5.0), size="quick", more=["C9"])
    write_model(tmp_path, "c", family="qwen2_5_vl", size="quick")
    assert lines_of(tmp_path)["c"]["X1"]["verdict"] == "holds"
    write_json(tmp_path / "data/results/paper/c/01_value_flow.json", {"claims": {"C1": {"entries": []}, "C2": {}}})  # of an older version, full
    found = lines_of(tmp_path)["c"]
    assert found["X1"]["why"] == "0 of 2 families measured." and found["C1"]["why"].endswith("run notebook 01 again.")


@pytest.mark.parametrize(("noise", "count", "verdict"), [(0.001, 6, "present"), (0.001, 5, "not measured"), (1.0, 8, "cannot tell")])
def test_c3_is_a_correlation_over_models(tmp_path, noise, count, verdict):
    rng = np.random.default_rng(1)
    ability = np.linspace(0.5, 0.8, count)
    added = 20 * ability + 20 * noise * rng.normal(size=count)
    for index in range(count):
        write_model(tmp_path, f"stage-{index}", added=added[index], accuracy=ability[index])
    write_model(tmp_path, "stage-without-answers")
    write_model(tmp_path, "stage-of-one-task", added=-90, accuracy=0.9, tasks=1)
    line = lines_of(tmp_path)["stage-0"]["C3"]
    assert line["verdict"] == verdict
    if verdict == "not measured":
        assert line["why"] == "5 of 6 models or stages measured."
        return
    assert line["n"] == line["units"] == count and line["note"].startswith("Mean over 6 tasks: stage-0 adds") and "accuracy 45.0 %" in line["note"]
    found = pearsonr(added, ability)
    assert line["value"] == pytest.approx(found.statistic, abs=1e-5)
    assert (line["low"], line["high"]) == pytest.approx(tuple(found.confidence_interval()), abs=1e-5)
    write_model(tmp_path, "stage-0-read", added=added[0], accuracy=ability[0])  # the same training once more: a point, no unit
    line = lines_of(tmp_path)["stage-0"]["C3"]
    assert (line["n"], line["units"]) == (count + 1, count) and f"counts {count} trainings" in line["note"]


def test_a_correlation_of_zero_is_absent_with_enough_models_alone():
    x = np.arange(200.0)
    y = np.where(np.arange(200) % 2, 1.0, -1.0)
    many = correlation("r", x, y, 200)
    assert -0.5 < many["low90"] < many["high90"] < 0.5 and many["detectable"] == pytest.approx(0.197, abs=0.002)
    few = correlation("r", x[:6], y[:6], 6)
    assert few == correlation("r", x[:6], y[:6], 5) | {key: few[key] for key in ("units", "freedom", "error", "low", "high", "low90", "high90", "detectable")}
    assert correlation("r", x[:6], y[:6], 5)["low"] < few["low"] and correlation("r", x[:6], y[:6], 3)["reason"] == "3 trainings are too few"
    assert few["low90"] < -0.5 and few["detectable"] == pytest.approx(0.924, abs=0.002)
    assert correlation("r", x, x, 200)["low"] > 0.99 and correlation("r", x, np.ones(200), 200)["reason"] == "the models do not differ"


def test_c3_within_families_is_a_partial_correlation():
    """Two families that differ the other way than their members do."""
    x, y, families = np.array([0, 1, 2, 10, 11, 12.0]), np.array([5, 6, 7.5, 0, 1, 2.0]), ["a"] * 3 + ["b"] * 3
    found = correlation("r", x, y, 6, families)
    is_a = np.array(families) == "a"
    rest_x, rest_y = (each - np.polyval(np.polyfit(is_a, each, 1), is_a) for each in (x, y))
    assert found["value"] == pytest.approx(pearsonr(rest_x, rest_y).statistic) and correlation("r", x, y, 6)["value"] < 0 < found["value"]
    assert found["n"] == 6 and found["detectable"] == correlation("r", x[:5], y[:5], 5)["detectable"]
    assert correlation("r", x[:4], y[:4], 4, families[:4])["reason"] == "4 trainings are too few for their families"
    assert correlation("r", x, y, 6, range(6))["reason"] == "the models do not differ"


def test_the_models_of_a_profile_stand_in_one_figure(tmp_path):
    write_model(tmp_path, "alone", added=3.0)
    report.draw_models(tmp_path)
    assert not (tmp_path / "figures").exists(), "one model has nothing to stand beside"
    write_model(tmp_path, "qwen", family="qwen2_5_vl", added=5.0)
    write_model(tmp_path, "bare", family="qwen2_5_vl", values=(1.0, 2.0, 3.0))
    write_json(tmp_path / "data/results/paper/old/01_value_flow.json", {"claims": {"C1": {"entries": []}}, "parameters": {"size": "full"}})
    report.draw_models(tmp_path)
    assert (tmp_path / "figures" / "models_paper.png").stat().st_size > 10_000
    drawn = beside_each_other(shown(of_profile(tmp_path / "data/results/paper")))
    c1, *_, scatter = drawn.axes
    assert [label.get_text() for label in c1.get_yticklabels()] == ["alone", "bare", "old", "qwen"]
    places = {bar.lines[0].get_xdata()[0] for bar in c1.containers}
    assert places == {5.0, 1.0} and len(c1.containers) == 3, "each model's own value, none of what was not measured"
    assert {(line.get_xdata()[0], line.get_ydata()[0]) for line in scatter.lines} == {(3.0, 75.0), (5.0, 75.0)}


def test_a_line_leads_from_a_model_before_its_last_stage_to_the_model(tmp_path):
    for name, added in (("alone", 3.0), (f"alone{BEFORE}", 1.0), ("other", 5.0)):
        write_model(tmp_path, name, added=added)
    scatter = beside_each_other(shown(of_profile(tmp_path / "data/results/paper"))).axes[-1]
    assert [1.0, 3.0] in [list(line.get_xdata()) for line in scatter.lines if line.get_linestyle() == "-"]
    hollow = {line.get_xdata()[0]: line.get_markerfacecolor() == "white" for line in scatter.lines if line.get_marker() != "None"}
    assert hollow == {3.0: False, 1.0: True, 5.0: False}
    assert {text.get_text() for text in scatter.texts} - {""} == {"alone", "other"}
    assert f"pocket{BEFORE}" in MODELS, "kvutils.checkpoints names these models by the same ending"
