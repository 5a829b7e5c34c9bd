"""Notebook 03's measurements: key statistics, knock-out curve, blocking experiment, claims; resumed and planted."""

import json
import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from kvutils import VOID
from kvutils.answer import ImageSession, spellings
from kvutils.datasets import USES, open_dataset
from kvutils.datasets.samples import LabelledImage, Question, YesNoSample
from kvutils.errors import DataError, ParameterError
from kvutils.keys import key_variance
from kvutils.layout import build_layout
from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import Effect
from kvutils.plots.keys import sweep_map
from kvutils.prompts import PromptTokens
from kvutils.readout.attention import attention_mass
from kvutils.readout.selections import select_all, select_highest, select_lowest, select_random, select_random_matched_mass, selected_mass, variance_threshold
from kvutils.run.judged import load_claims
from kvutils.run.verdicts import judge
from kvutils.store import Frame, Parts, read_frame, to_json, write_frame
from kvutils.tasks import key_blocking, key_statistics
from kvutils.tasks.bimodality import bimodal_layers
from kvutils.tasks.input_agnostic_keys import claim_c5, claim_x4, open_data, results
from kvutils.tasks.key_blocking import BLOCK, CONTROLS, EVERY, NONE, READING, claim_c6, claim_x2, conditions, effects
from kvutils.tasks.key_statistics import agnostic, compare_trained, describe_keys, thresholds
from kvutils.tasks.key_table import KeyTable, measure_keys, measure_turned, turned
from kvutils.tasks.knock_out import KnockOut, as_questions, blocked_layers, condition_of, knock_out, reading_layers, summarise_knock_out
from kvutils.tasks.yes_no import Answers, Mme, Pope
from tests.tiny_models import compare_answers, noisy, picture, summarise_answers, tiny, tiny_pocket

BLANK = picture(32, 32)
CLAIMS = {claim["id"]: claim for claim in load_claims()}
QUESTIONS = ["is the fish on the left", "what colour is the car"]


@pytest.fixture(scope="module")
def mlm():
    return tiny_pocket()


def labelled(count):
    """Foreground in the upper half of every second image, unknown on the right of all."""
    found = []
    for number in range(count):
        mask = np.zeros((32, 32), np.uint8)
        mask[:16] = number % 2
        mask[:, 24:] = VOID
        found.append(LabelledImage(f"image{number}", picture(32, 32, number), mask))
    return found


def table_of(variance, **changes):
    """A KeyTable of the 4 x 4 grid and newline of a tiny pocket model, or of a wider one; no model is run."""
    size = 8 * round((variance.shape[-1] - 1) ** 0.5)
    ones = torch.ones_like(variance)
    often = np.random.default_rng(0).random(variance.shape[-1])
    layout = build_layout(tiny_pocket(image_size=size), (size, size))
    return replace(KeyTable("made up", variance, ones, ones / 20, often, layout, 100, 100), **changes)


def log_normal(layers, heads, tokens, spread=0.3, seed=0):
    return torch.exp(spread * torch.from_numpy(np.random.default_rng(seed).normal(size=(layers, heads, tokens))))


def yes_no(images=8, subsets=("random", "popular")):
    return [
        YesNoSample(f"{subset}-{i}-{truth}", f"im{i}", picture(32, 32, i), f"is the {word} on the {side}", truth, subset)
        for subset, side in zip(subsets, ("left", "right"), strict=True) for i in range(images)
        for word, truth in (("fish", "no"), ("car", "yes"))
    ]  # fmt: skip


def test_the_table_is_what_its_parts_measure(mlm):
    images = labelled(10)
    pictures = [each.image for each in images]
    table, direct = measure_keys(mlm, images, QUESTIONS, chunk=3, mass_images=5, progress=False), key_variance(mlm, pictures)
    torch.testing.assert_close(table.variance, direct.result, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(table.norm, direct.mean_norm, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(table.mass, attention_mass(mlm, pictures[:5], QUESTIONS), rtol=1e-4, atol=1e-7)
    assert measure_keys(mlm, images, (), chunk=3, progress=False).mass is None
    assert (table.images, table.mass_images) == (10, 5) and table.variance.shape == (5, 2, 17)
    layout = table.layout
    upper = ~layout.is_newline & (layout.cells[:, 0] < 2) & (layout.cells[:, 1] < 3)
    np.testing.assert_array_equal(table.foreground, np.where(upper, 0.5, 0))


def test_a_stopped_measurement_goes_on(mlm, tmp_path):
    stopped = labelled(6)
    stopped[4] = LabelledImage(stopped[4].id, Mock(side_effect=KeyboardInterrupt), stopped[4].mask)
    plain = measure_keys(mlm, labelled(6), QUESTIONS[:1], chunk=2, progress=False)
    parts = Parts(tmp_path, seed=0)
    with pytest.raises(KeyboardInterrupt):
        measure_keys(mlm, stopped, QUESTIONS[:1], parts, chunk=2, progress=False)
    assert len([*parts.folder.rglob("keys/*.safetensors")]) == 2
    resumed = measure_keys(mlm, labelled(6), QUESTIONS[:1], parts, chunk=2, progress=False)
    again = measure_keys(mlm, labelled(6), QUESTIONS[:1], parts, chunk=2, progress=False)  # nothing left to read
    for one in (resumed, again):
        for name in ("variance", "norm", "mass"):
            assert torch.equal(getattr(one, name), getattr(plain, name)), name
        assert np.array_equal(one.foreground, plain.foreground) and one.layout.grids == plain.layout.grids
    with pytest.raises(DataError, match="needs images"):
        measure_keys(mlm, [], QUESTIONS, progress=False)
    with pytest.raises(ParameterError, match="mass_images"):
        measure_keys(mlm, labelled(3), QUESTIONS, chunk=1, mass_images=0, progress=False)



def test_stored_keys_of_another_grid_are_not_averaged(tmp_path):
    """What is read back was checked against nothing when it was measured: 8 tokens each, once upright and once across."""
    mlm, parts = tiny("qwen2_5_vl"), Parts(tmp_path, seed=0)
    images = [LabelledImage(f"{width}", picture(width, 168 - width, 3), np.zeros((168 - width, width), np.uint8)) for width in (56, 112)]
    for _ in range(2):
        with pytest.raises(DataError, match="grid"):
            measure_keys(mlm, images, (), parts, chunk=1, progress=False)
    assert len([*parts.folder.rglob("keys/*.safetensors")]) >= 1


def test_a_planted_constant_head_is_found():
    mlm = tiny_pocket(seed=3)
    attention = mlm.model.model.language_model.layers[3].self_attn
    with torch.no_grad():
        attention.k_proj.bias.normal_()
        attention.k_proj.weight[mlm.head_dim :] = 0  # of the second key-value head: its keys are the bias
    table = measure_keys(mlm, labelled(8), QUESTIONS[:1], chunk=2, progress=False)
    planted = torch.zeros_like(table.variance, dtype=torch.bool)
    planted[3, 1] = table.real
    found = thresholds(table)
    assert torch.equal(agnostic(table, found, "near_constant")[3], planted[3])
    assert agnostic(table, found, "raw")[planted].all() and found["near_constant"]["value"] == 0.1
    described = describe_keys(table, n_boot=50)
    assert described["shares"]["near_constant"]["heads"][3] == [0.0, 1.0]
    assert json.loads(to_json(described))["shares"] == described["shares"] and described["positions"] == 16


def test_planted_keys_make_two_modes_and_sinks(verdict):
    variance, planted = log_normal(4, 2, 145), torch.zeros(4, 2, 145, dtype=torch.bool)
    planted[2:, :, 10:35] = True
    variance = torch.where(planted, variance * 1e-2, variance)
    table = table_of(variance, mass=torch.where(planted, 0.03, 0.01).double())
    found = thresholds(table)
    assert found["raw"]["two_modes"] and torch.equal(agnostic(table, found, "raw"), planted)
    assert [each["method"] for each in found["within_heads"]] == ["near-constant"] * 2 + ["valley"] * 2
    assert torch.equal(agnostic(table, found, "within_heads"), planted)
    gap = key_statistics.sinks(table, planted, 100)["mass"]
    expected = 0.02 / (0.01 * (1 - 25 / 144) + 0.03 * 25 / 144)
    assert gap["all"]["mean"] == pytest.approx(expected) and gap["all"]["low"] > 1.2
    assert gap["layers"][0]["mean"] is None and gap["layers"][2]["mean"] == pytest.approx(expected)
    described = describe_keys(table, n_boot=100)
    claim = claim_c5(described)
    assert (claim["primary"]["value"], claim["primary"]["low"], claim["primary"]["units"]) == (2, 2, 144)
    heads, late, near = claim["others"]
    assert (heads["value"], heads["units"], late["value"], near["value"]) == (2, 2, 100, pytest.approx(100 * 25 / 288))
    assert verdict("C5", claim) == "present" and "in 2 of 3 layers after layer 0 (2, 3), open in 0 (none)" in claim["note"]
    assert verdict("C5", claim_c5(described | {"images": 99})) == "cannot appear here"


def test_scale_of_layers_and_heads_cannot_fake_two_modes(verdict):
    """Keys of one kind, ten times as long in some layers and in one head of each."""
    factor = torch.ones(6, 2, 1, dtype=torch.float64)
    factor[3:], factor[:, 1] = 10, factor[:, 1] * 10
    table = table_of(log_normal(6, 2, 145) * factor.square(), norm=factor.expand(6, 2, 145).clone())
    claim = claim_c5(describe_keys(table, n_boot=200))
    assert "all layers together have two modes" in claim["note"], "the artefact itself"
    assert (claim["primary"]["value"], verdict("C5", claim)) == (0, "absent")


ONE_MODE = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size),
    "heavy-tailed": lambda rng, size: rng.standard_t(3, size=size),
    "flat": lambda rng, size: 3 * rng.uniform(size=size),
    "wide and narrow heads": lambda rng, size: rng.normal(size=size) * rng.choice([0.3, 1, 3], size=(*size[:2], 1)),
    "heads skewed to either side": lambda rng, size: rng.exponential(size=size) * rng.choice([-3, -1, 0.3, 1, 3], size=(*size[:2], 1)),
    "all layers alike": lambda rng, size: rng.normal(size=(1, 1, size[2])) + 0.4 * rng.normal(size=size),
}


@pytest.mark.parametrize("kind", ONE_MODE)
def test_one_mode_is_not_counted_as_two(kind):
    """At the pocket's size, 12 tables of 8 layers: a layer is called bimodal in none, or by chance in one."""
    rng = np.random.default_rng(0)
    counts = [bimodal_layers(ONE_MODE[kind](rng, (8, 2, 144)), 100, seed)["count"] for seed in range(12)]
    assert sum(each["low"] > 0 for each in counts) <= 1
    assert np.mean([each["mean"] for each in counts]) < 0.5 and np.mean([each["high"] for each in counts]) < 2


@pytest.mark.parametrize(("size", "planted", "distance", "share"), [((8, 2, 144), 3, 6, 0.3), ((28, 4, 729), 10, 5, 0.15)])
def test_planted_layers_are_found(size, planted, distance, share):
    rng = np.random.default_rng(1)
    logs, low = rng.normal(size=size), rng.random(size[2]) < share
    logs[-planted:, :, low] -= distance
    found = bimodal_layers(logs, 100)
    count = Effect.of(found["count"])
    assert count.low <= planted == count.mean == count.high and count.low >= planted - 1
    assert [each["two_modes"] for each in found["layers"][:-planted]] == ["no"] * (size[0] - planted)
    assert np.mean([each["separation"] for each in found["layers"][-planted:]]) == pytest.approx(distance, abs=0.5)
    assert found["late_minus_early"]["mean"] == pytest.approx(planted / (size[0] // 2))


def test_what_the_foreground_explains():
    often = np.linspace(0, 0.5, 101)
    variance = log_normal(2, 2, 101, 0.05) * torch.from_numpy(np.exp(4 * often))
    table = table_of(variance, foreground=often)
    seen = key_statistics.foreground(table, 50)
    assert seen["correlation"]["all"]["low"] > 0.98 and len(seen["correlation"]["layers"]) == 2
    described = describe_keys(table, n_boot=50)
    assert described["foreground"]["correlation"] == seen["correlation"]
    assert np.array(described["foreground_map"]).shape == (10, 10)
    assert sum(map(sum, described["histograms"]["raw"]["layers"])) == 2 * 2 * 100


def test_smooth_maps_that_have_nothing_to_do_with_each_other_are_seldom_told_apart(monkeypatch):
    """Neighbouring tokens are alike: token by token, an interval would lie beside 0 more often than not."""
    random, beside = np.random.default_rng(3), {}

    def smooth(*shape: int) -> np.ndarray:
        return gaussian_filter(random.normal(size=(*shape, 36, 36)), (*[0] * len(shape), 1, 2))[..., 12:24, 12:24].reshape(*shape, 144)

    tables = []
    for _ in range(60):
        variance = torch.ones(2, 1, 145, dtype=torch.float64)
        variance[..., :144] = torch.from_numpy(np.exp(10 * smooth(1, 1)))
        tables.append(table_of(variance, foreground=np.append(smooth(), 0)))
    for name, strips in (("strips", KeyTable.strips), ("tokens", lambda table, axis: range(144))):
        monkeypatch.setattr(KeyTable, "strips", strips)
        found = [key_statistics.foreground(table, 100)["correlation"]["all"] for table in tables]
        beside[name] = np.mean([each["low"] > 0 or each["high"] < 0 for each in found])
    assert beside["strips"] < 0.2 and beside["tokens"] > 0.4


def test_trained_minus_untrained(verdict):
    trained = log_normal(4, 2, 145)
    trained[:, :, :29] *= 1e-3
    tables = [table_of(trained), table_of(log_normal(4, 2, 145, seed=1) / 1e3)]
    tables[0] = replace(tables[0], mass=torch.where(trained < 0.05, 0.02, 0.01).double())
    described = describe_keys(tables[0], n_boot=100)
    compared = compare_trained(tables[0], tables[1:], described["thresholds"], 100)
    assert compared["raw"]["all"]["mean"] < -0.7, "short keys all lie below an absolute threshold"
    claim = claim_x4(described, compared)
    only_first = compare_trained(replace(tables[0], variance=torch.cat([trained[:1], log_normal(3, 2, 145)])), tables[1:], described["thresholds"], 50)
    assert only_first["within_heads"]["behind_layer_0"]["mean"] == 0 < only_first["within_heads"]["all"]["low"]
    assert claim["primary"]["value"] == claim["others"][0]["value"] == pytest.approx(100 * 29 / 144) and verdict("X4", claim) == "holds"
    assert claim["others"][2]["low"] > 0.5 and "20.1 % of the trained model's keys vary little and 0.0 % with random weights (0.0 % in 1 of them)" in claim["note"]
    described["sinks"]["within_heads"]["mass"]["all"] = dict.fromkeys(("mean", "low", "high", "n", "error", "units"))
    claim = claim_x4(described, compared | {"within_heads": compared["near_constant"]})  # measured for hours, and of one kind: said, not raised
    assert claim["others"][2]["value"] is None and "above the threshold" in claim["others"][2]["reason"]


def test_a_trained_model_is_one_more_draw_of_weights():
    """Untrained models have 0 to 40 % such keys; one with 30 % is none of theirs by nothing, whatever the positions say."""
    def with_low(share: float, seed: int):
        variance = log_normal(4, 2, 145, seed=seed)
        variance[:, :, : round(share * 144)] *= 1e-4
        return table_of(variance)

    trained, draws = with_low(0.3, 0), [with_low(share, 1 + i) for i, share in enumerate((0.0, 0.1, 0.2, 0.4))]
    limits = describe_keys(trained, n_boot=20)["thresholds"]
    one, several = (compare_trained(trained, some, limits, 200)["within_heads"] for some in (draws[:1], draws))
    found = several["behind_layer_0"]
    assert one["behind_layer_0"]["low"] > 0.2 and [round(np.mean(each), 2) for each in several["draws"]] == [0.0, 0.1, 0.2, 0.4]
    assert found["low"] < 0 < found["high"] and found["mean"] == pytest.approx(0.3 - 0.175, abs=0.01)
    spread = np.std([0.0, 0.1, 0.2, 0.4], ddof=1) * np.sqrt(1 + 1 / 4)  # beside it positions add little: they differ alike in all draws
    assert found["error"] == pytest.approx(spread, rel=0.1) and 4 <= found["units"] <= 6
    assert several["untrained"]["all"]["mean"] == pytest.approx(0.175, abs=0.01)
    alike = compare_trained(trained, [draws[0], with_low(0, 9)], limits, 200)["within_heads"]["behind_layer_0"]
    assert alike["low"] > 0.2 and alike["error"] == pytest.approx(one["behind_layer_0"]["error"], rel=0.01)  # draws that do not differ


def test_patches_in_reverse_tell_place_from_picture(mlm):
    images = labelled(8)
    plain = measure_keys(mlm, images, QUESTIONS[:1], chunk=4, mass_images=1, progress=False)
    order, backward = turned(plain.layout), measure_turned(mlm, images, chunk=3, progress=False)
    assert np.array_equal(order[order], np.arange(17)) and order[16] == 16 and order[0] == 15
    torch.testing.assert_close(backward[0], plain.variance[0][:, order], rtol=1e-5, atol=1e-9)  # no attention yet: keys of the patches
    assert not torch.allclose(backward[2], plain.variance[2][:, order], rtol=1e-2)
    by_place = log_normal(4, 2, 145, 0.1)
    by_place[:, :, :12] *= 0.1
    table, flip = table_of(by_place), [*reversed(range(144)), 144]
    for turned_variance, place, low_row in ((by_place, 1, -1), (by_place[:, :, flip], 0, 0)):
        described = describe_keys(replace(table, turned=turned_variance), n_boot=50)
        found = described["order"]
        curves = {name: each["all"]["mean"] for name, each in found["curves"].items()}
        assert curves["first"] > 0.99 and curves["rest"] < 0.03
        assert (curves["turned_first"], curves["turned_picture"]) == pytest.approx((place, 1 - place), abs=0.05)
        assert found["row"] == 12 and np.array(found["maps"]["turned"])[low_row].mean() > 0.99
        note = claim_c5(described)["note"]
        assert f"in reverse {curves['turned_first']:.2f} of the new first row's, and {curves['turned_picture']:.2f} of" in note


def two_modes(low=0.0, high=4.0, spread=0.5, share=0.3, shape=(6, 2, 100)):
    """Variances whose logarithm has two normal modes."""
    rng = np.random.default_rng(0)
    centre = np.where(rng.random(shape) < share, low, high)
    return torch.from_numpy(np.exp(centre + spread * rng.standard_normal(shape)))


def test_the_threshold_is_the_valley_between_two_modes():
    variance = two_modes()
    found = variance_threshold(variance, "pocket")
    assert found["two_modes"] and found["method"] == "valley" and found == variance_threshold(variance)
    assert found["separation"] == pytest.approx(4 / 0.5, rel=0.05)
    assert np.log(found["modes"]) == pytest.approx([0, 4], abs=0.1)
    assert found["shares"] == pytest.approx((0.3, 0.7), abs=0.03)
    # Equal spreads: the density is lowest somewhat on the side of the smaller mode.
    assert 1.5 < np.log(found["value"]) < 2.1
    assert ((variance < found["value"]).double().mean() - 0.3).abs() < 0.03
    assert variance_threshold(variance * 1000)["value"] == pytest.approx(1000 * found["value"], rel=1e-3)
    assert variance_threshold(torch.cat([variance.flatten(), torch.zeros(5)]))["value"] == pytest.approx(found["value"])
    many = variance_threshold(two_modes(shape=(60, 2, 100)))
    assert many["two_modes"] and np.log(many["value"]) == pytest.approx(np.log(found["value"]), abs=0.2)
    paper = variance_threshold(variance, "llava-onevision-7b")
    assert (paper["value"], paper["method"], paper["two_modes"]) == (450.0, "paper", True)


def test_without_two_modes_the_threshold_is_a_stated_quantile():
    one, close = two_modes(high=0.0), two_modes(high=0.8)  # Ashman's D of the second is 1.6
    outliers = two_modes(low=-9.0, share=0.004)
    for variance in (one, close, outliers):
        found = variance_threshold(variance)
        assert not found["two_modes"] and found["method"] == "quantile 0.1"
        assert found["value"] == pytest.approx(variance.quantile(0.1).item())
    assert variance_threshold(close)["separation"] < 2 < variance_threshold(outliers)["separation"]
    with pytest.raises(DataError, match="10 different variances"):
        variance_threshold(torch.ones(3, 2, 50, dtype=torch.float64))


def questions(images=5):
    kinds = {"side": ("what is on the left", ("fish", "car")), "colour": ("what colour is this", ("red", "blue"))}
    return [Question(f"{kind}{i}", kind, (picture(32, 32, i),), text, options[i % 2], options, f"scene{i}")
            for i in range(images) for kind, (text, options) in kinds.items()]  # fmt: skip


def test_every_condition_is_that_block(mlm, tmp_path):
    asked, parts = questions(3), Parts(tmp_path, seed=0)
    table = knock_out(mlm, asked, parts, batch_size=2, progress=False)
    assert len(table.conditions) == 1 + 3 * 5 - 3 and table.values.shape == (6, 13, 3)
    assert table.groups == ["scene0", "scene0", "scene1", "scene1", "scene2", "scene2"]
    blocked = blocked_layers(5)
    assert blocked["from 3"] == (3, 4) and blocked["until 1"] == (0, 1) and blocked["from 0"] == (0, 1, 2, 3, 4)
    for number in (0, 3):
        sample = asked[number]
        with ImageSession(mlm, sample.images) as session:
            for name in ("none", "one 2", "from 3", "until 1"):
                block = select_all(blocked[name], 2, 17) if blocked[name] else None
                (answer,) = session.choose([sample.text], sample.options, 0, block=block)
                right, loss, mass = table.of(name)[number]
                assert loss == pytest.approx(-answer.scores[sample.answer], abs=1e-4)
                assert right == (answer.best == sample.answer) and mass == pytest.approx(sum(map(math.exp, answer.scores.values())), abs=1e-5)
    same = [condition_of("until", 0, 5), condition_of("from", 4, 5), condition_of("until", 4, 5)]
    assert same == ["one 0", "one 4", "from 0"]
    files = {path: path.stat().st_mtime_ns for path in parts.folder.rglob("knock_out/*")}
    again = knock_out(mlm, asked, parts, batch_size=2, progress=False)
    assert len(files) == 2 and np.array_equal(table.values, again.values)
    assert files == {path: path.stat().st_mtime_ns for path in parts.folder.rglob("knock_out/*")}
    for bad, message in (([], "none"), ([replace(asked[0], options=())], "right or wrong")):
        with pytest.raises(DataError, match=message):
            knock_out(mlm, bad, progress=False)


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next", "qwen2_5_vl"])
def test_published_models_may_answer_in_capitals(published, family):
    """A model that says "Yes" and "No", never "yes" and "no": what it says is right or wrong, and the options hold all of it."""
    mlm = replace(published(family), base_view_only=family != "qwen2_5_vl")
    spelled = PromptTokens(mlm).options({option: spellings(option) for option in ("yes", "no", "(A)")})
    assert {label: [mlm.tokenizer.decode(ids) for ids in found] for label, found in spelled.items()} == {
        "yes": ["yes", "Yes", "YES"], "no": ["no", "No", "NO"], "(A)": ["(A)", "A"]}  # fmt: skip
    (yes,), (no,) = spelled["yes"][1], spelled["no"][1]

    def capitals(module, inputs, output):
        logits = torch.zeros_like(output)
        logits[:, yes], logits[:, no] = 30, 29
        return logits

    asked = as_questions([YesNoSample(f"q{i}", f"im{i}", picture(40, 40, i), "Is it?", truth, "random") for i, truth in enumerate(("yes", "no"))])
    hook = mlm.model.lm_head.register_forward_hook(capitals)
    try:
        none = knock_out(mlm, asked, progress=False).of("none")
        held = key_blocking.ask_under_blocks(Pope([replace(s, image_id=s.id) for s in yes_no(1)]), mlm, {NONE: None}, progress=False).option_mass
    finally:
        hook.remove()
    share = 1 / (1 + math.exp(-1))
    assert none == pytest.approx(np.array([[1, -math.log(share), 1], [0, -math.log(1 - share), 1]]), abs=1e-5)
    assert held[NONE] == pytest.approx(1, abs=1e-5)


def test_a_layer_that_reads_nothing_can_be_knocked_out():
    mlm = tiny_pocket(seed=1)
    with torch.no_grad():
        mlm.model.model.language_model.layers[2].self_attn.o_proj.weight.zero_()
    table = knock_out(mlm, questions(), progress=False)
    moved = {layer: np.abs(table.of(f"one {layer}") - table.of("none")).max() for layer in range(5)}
    assert moved.pop(2) < 1e-5 and min(moved.values()) > 1e-3


def test_the_curve_and_the_reading_layers():
    names = list(blocked_layers(4))
    n, random = 240, np.random.default_rng(0)
    values = np.zeros((n, len(names), 3))
    values[..., 2] = np.where(np.arange(n) < 200, 0.9, 0.4)[:, None]
    for i, name in enumerate(names):
        hidden = blocked_layers(4)[name]
        values[:, i, 0] = 1 - 0.5 * (1 in hidden) - 0.25 * (2 in hidden)
        values[:, i, 1] = 0.1 + 2 * (1 in hidden) + (2 in hidden) + 0.1 * random.random(n)
    kinds = ["often"] * 200 + ["seldom"] * 40
    values[200:, 1:, 0] = values[200:, :1, 0]  # blocking changes nothing for the second kind
    table = KnockOut(4, names, [str(i) for i in range(n)], kinds, [f"scene{i // 4}" for i in range(n)], values)
    summary = summarise_knock_out(table, 100)
    often = summary["kinds"]["often"]
    assert [each["accuracy_change"]["mean"] for each in often["from"]] == pytest.approx([-0.75, -0.75, -0.25, 0])
    assert [each["accuracy_change"]["mean"] for each in often["until"]] == pytest.approx([0, -0.5, -0.75, -0.75])
    assert often["scenes"] == 50 and often["one"][1]["loss_change"]["low"] > 1.8
    assert often["none"]["option_mass"]["mean"] == pytest.approx(0.9)
    assert [text.split(":")[0] for text in summary["warnings"]] == [
        "in 10 of 30 cases the scored options hold less than 50% of the probability of how an answer begins (least in kind 'seldom', "
        "condition 'none'"]  # fmt: skip
    both = summary["kinds"]["all"]["from"][0]["accuracy_change"]["mean"]
    assert both == pytest.approx(-0.375), "kinds weigh equally"
    found = reading_layers(table, 2)
    assert found["layers"] == [1, 2] and found["held_out"] == pytest.approx(3, abs=0.05)
    values[..., 1], second = 0, Halves.of(table.groups).second  # one half reads in layers 0 and 1, the other in 2 and 3
    for half, layers, loss in ((~second, (0, 1), 1.5), (second, (2, 3), 0.5)):
        for layer in layers:
            values[half, names.index(f"one {layer}"), 1] = loss
    found = reading_layers(replace(table, kinds=["one"] * n), 2)
    assert found["layers"] == [0, 1] and found["windows"] == pytest.approx([1.5, 1, 0.5]) and found["held_out"] == 0
    assert json.loads(to_json(summary)) == summary


def experiment(draws=3):
    variance = log_normal(6, 2, 17, seed=2)
    variance[3:, :, 2:5] *= 1e-3
    variance[:3, :, 16], variance[3:, :, 16] = 1e-9, 99  # the newline: extreme, and never chosen
    mass = torch.from_numpy(np.random.default_rng(4).uniform(0.01, 0.03, (6, 2, 17)))
    table = table_of(variance, mass=mass)
    return table, *conditions(table, thresholds(table)["raw"], [2, 1], draws=draws)


def test_controls_match_the_block():
    table, blocks, about = experiment()
    block = blocks[BLOCK]
    assert block.layers == (4, 5) == key_blocking.last_layers(6) and key_blocking.last_layers(28) == tuple(range(18, 28))
    assert block.mask[:, :, 2:5].all() and int(block.mask.sum()) == 12 and blocks[NONE] is None
    drawn = [name for name in blocks if name.startswith("random/")]
    assert len(drawn) == 3 and len({tuple(blocks[name].mask.flatten().tolist()) for name in drawn}) == 3
    for name in (*drawn, CONTROLS[2], CONTROLS[3], READING[1], f"{READING[2]}/00"):
        assert torch.equal(blocks[name].mask.sum(-1), block.mask.sum(-1)), name
    for name, each in blocks.items():
        assert name in (NONE, "all keys") or not each.mask[..., ~table.real].any(), name
    target = selected_mass(block, table.mass[4:])
    reached = selected_mass(blocks[f"{CONTROLS[1]}/01"], table.mass[4:])
    assert (reached - target).abs().max() < 0.006
    assert blocks[CONTROLS[3]].layers == (0, 1) and torch.equal(blocks[CONTROLS[3]].mask, block.mask)
    assert blocks[READING[1]].layers == (1, 2) and blocks["all keys"].mask.all() and blocks["all keys"].layers == (4, 5)
    low, high = blocks[READING[1]], blocks[CONTROLS[2]]
    for row, head in np.ndindex(2, 2):
        near, late = table.variance[1 + row, head], table.variance[4 + row, head]
        chosen, highest = low.mask[row, head], high.mask[row, head]
        assert near[chosen].max() < near[~chosen & table.real].min()
        assert late[highest].min() > late[~highest & table.real].max()
    assert about["families"]["random"]["draws"] == 3 and about["families"][BLOCK]["keys"] == 12
    assert about["method"] == "raw threshold" and about["below"] == 12 and about["share"] == pytest.approx(12 / 64)


def test_without_a_key_below_the_threshold_the_lowest_are_blocked():
    table = table_of(log_normal(6, 2, 17) * torch.tensor([1e-3, 1, 1, 1, 1, 1]).double()[:, None, None])
    found = thresholds(table)
    assert not agnostic(table, found, "raw")[4:].any()
    blocks, about = conditions(table, found["raw"], [0, 1], draws=1)
    assert "lowest 0.1" in about["method"] and about["below"] == 0 and blocks[BLOCK].mask.sum((1, 2)).tolist() == [3, 3]
    assert blocks[BLOCK].name == BLOCK
    assert select_lowest(table.variance, table.real, 0.5, [5]).mask.sum() == 16
    for bad, message in (({"reading": [1]}, "2 reading layers"), ({"reading": [0, 1], "draws": 0}, "draws"),
                         ({"reading": [0, 1], "layers": [4, 6]}, "layer of the selection")):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            conditions(table, found["raw"], **bad)
    with pytest.raises(ParameterError, match="share"):
        select_lowest(table.variance, table.real, 0.0, [5])


def test_controls_want_the_values_of_the_layers_that_are_blocked(mlm):
    """Those of all layers would be taken for them, from the first on; a variance of some layers for one of all."""
    variance, real = log_normal(6, 2, 17), torch.arange(17) < 16
    block = select_lowest(variance, real.numpy(), 0.1, [4, 5])
    assert select_highest(block, variance[4:], real.numpy()).mask.sum() == block.mask.sum()
    for call in (lambda: select_highest(block, variance, real), lambda: selected_mass(block, variance), lambda: selected_mass(block, variance[4:5])):
        with pytest.raises(DataError, match=r"expected values \(2, 2, 17\) of layers \(4, 5\) alone"):
            call()
    with pytest.raises(DataError, match="variance must be .L, G, N. of all layers, of which it takes .4, 5.; found 2 layers"):
        select_lowest(variance[4:], real, 0.1, [4, 5])
    for control in (lambda: select_random(select_all([0], 2, 17), real, 0), lambda: select_highest(select_all([0], 2, 17), variance[:1], real)):
        with pytest.raises(DataError, match="all has more keys than the 16 that are no newlines"):
            control()
    everything = select_all([4, 5], 2, 17)
    assert select_random_matched_mass(everything, variance[4:], real, 0).mask.any(), "which needs no equal number"
    assert not select_lowest(variance, real, 0.1, []).mask.any()


def test_answers_under_blocks(mlm, tmp_path, monkeypatch):
    task = Pope(yes_no(5))
    blocks = {NONE: None, "everything": select_all(range(5), 2, 17), "late": select_all([4], 2, 17)}
    parts = Parts(tmp_path, seed=0)
    options = {"chunk": 2, "progress": False}
    found = key_blocking.ask_under_blocks(task, mlm, blocks, parts, **options)
    answers, held = found.texts, found.option_mass
    assert list(answers) == list(blocks) and all(len(texts) == len(task.samples) for texts in answers.values())
    for number in (0, 13):
        sample = task.samples[number]
        with ImageSession(mlm, sample.image) as session:
            for name, block in blocks.items():
                (said,) = session.yes_no([sample.question], block=block)
                assert said.text == answers[name][number]
    assert list(held) == list(blocks) and all(0 < mass < 1 for mass in held.values())
    assert answers[NONE] != answers["everything"], "nothing of the image is left"
    calls, real = [], key_blocking.answer_all
    monkeypatch.setattr(key_blocking, "answer_all", lambda *a, **k: calls.append(a) or real(*a, **k))
    assert key_blocking.ask_under_blocks(task, mlm, blocks, parts, **options).texts == answers and not calls
    next(parts.folder.rglob("blocked/pope/000002*")).unlink()
    assert key_blocking.ask_under_blocks(task, mlm, blocks, parts, **options).texts == answers and len(calls) == 1
    changed = blocks | {"late": select_all([3], 2, 17)}
    key_blocking.ask_under_blocks(task, mlm, changed, parts, **options)
    assert len(calls) == 4, "another block under the same name is another answer"


ABOUT = {"layers": [4, 5], "below": 12, "families": {BLOCK: {"keys": 12.0}, EVERY: {"keys": 64.0}}}


def answered(task, accuracy=0.75, block=0.1, every=-0.1, draws=8):
    """Answers of `accuracy`; of the block and with all keys hidden so much better; draws of other keys hardly differ."""
    plain = noisy(task, accuracy, 0)

    def changed(gain, seed):
        chance, truth = np.random.default_rng(seed).random(len(plain)), [s.truth for s in task.samples]
        other = {"yes": "no", "no": "yes"}
        turned = [t if gain > 0 else other[t] for t in truth]
        share = abs(gain) / (1 - accuracy if gain > 0 else accuracy)
        return [new if c < share else old for new, old, c in zip(turned, plain, chance, strict=True)]

    answers = {NONE: plain, BLOCK: changed(block, 1), EVERY: changed(every, 2)}
    answers |= {f"{name}/{draw:02d}": changed((-1) ** draw * 1e-3, 3 + draw) for name in CONTROLS[:2] for draw in range(draws)}
    return answers | dict.fromkeys(CONTROLS[2:], plain)


@pytest.fixture(scope="module")
def asked():
    subsets = ("random", "popular", "adversarial")
    pope = [YesNoSample(f"{subset}-{i}-{truth}-{k}", f"im{i}", BLANK, "is it there", truth, subset)
            for subset in subsets for i in range(200) for truth in ("yes", "no") for k in range(2)]  # fmt: skip
    mme = [YesNoSample(f"{i}{t}", f"im{i}", BLANK, f"{t} {i}", t, "existence") for i in range(80) for t in ("yes", "no")]
    return Pope(pope), Mme(mme)


def test_effects_of_a_block_and_of_its_controls(asked):
    pope, mme = asked
    answers = answered(pope)
    found, other = effects(pope, answers, 300), effects(mme, answered(mme), 300)
    assert set(found["families"]) == {BLOCK, EVERY, *CONTROLS} and set(found["versus"]) == {EVERY, *CONTROLS}
    assert found["families"]["random"]["sets"] == [8, 1] and len(found["families"]["random"]["draws"]) == 8
    assert found["versus"]["random"]["as_large"] == 0 and "as_large" not in found["versus"][CONTROLS[2]]
    gain, same = found["families"][BLOCK]["headline"], found["versus"][CONTROLS[2]]
    assert gain == compare_answers(pope, answers[BLOCK], answers[NONE], 300)["headline"] == same
    assert found["plain"] == summarise_answers(pope, answers[NONE], 300) and json.loads(to_json(found)) == found
    claim = claim_c6(ABOUT, found, other)
    assert claim["primary"]["value"] == pytest.approx(100 * gain["mean"]) and claim["primary"]["units"] == 200
    by_name = {each["name"]: each for each in claim["others"]}
    score = by_name["MME score, blocked minus unblocked"]
    assert score["value"] == pytest.approx(other["families"][BLOCK]["headline"]["mean"])
    assert (score["unit"], score["smallest"]) == ("score points", 2)
    assert "(paper: 78.1)" in claim["note"] and f"{score['detectable']:.1f} or more would have been found" in claim["note"]
    specific = claim_x2(ABOUT, found)
    assert specific["primary"]["value"] == pytest.approx(100 * found["versus"]["random"]["mean"])
    assert [each["name"] for each in specific["others"]] == [f"POPE F1, block minus {name}" for name in CONTROLS[1:]]
    assert specific["prerequisites"] == claim["prerequisites"] and "0% (random), 0% (random, same attention)" in specific["note"]


@pytest.mark.parametrize(("changes", "about", "words", "why"), [
    ({"block": 0.1}, {}, ("present", "holds"), "paper's size"),
    ({"block": -0.1}, {}, ("opposite", "opposite"), ""),
    ({"block": 0}, {}, ("absent", "does not hold"), "1.5 F1 points"),
    ({"block": 0, "every": 0}, {}, ("cannot appear here",) * 2, "hiding every image key of layers 4-5 makes a difference of +0.00"),
    ({"block": 0.1, "every": 0}, {}, ("present", "holds"), "paper's size"),  # hiding all of them is no bound of what hiding some does
    ({"block": 0, "every": 0.1}, {}, ("absent", "does not hold"), ""),  # better without any of them: something can change
    ({"block": 0.1}, {"below": 0}, ("cannot appear here",) * 2, "0 of 64 image keys of layers 4-5 are set apart by their variance"),
    ({"block": 0.005, "accuracy": 0.993}, {}, ("cannot appear here",) * 2, "eiling: 19 errors on POPE"),
    ({"block": 0.005, "accuracy": 0.989}, {}, ("cannot appear here",) * 2, "eiling: F1 could rise by 1.2 points, 1.5 would matter"),
])  # fmt: skip
def test_verdicts_on_a_block(asked, verdict, changes, about, words, why):
    found = [effects(task, answered(task, **changes), 300) for task in asked]
    claims = claim_c6(ABOUT | about, *found), claim_x2(ABOUT | about, found[0])
    assert (verdict("C6", claims[0]), verdict("X2", claims[1])) == words
    assert why in judge(CLAIMS["C6"], claims[0]).why


def test_what_matters_is_what_the_claims_say(asked):
    assert {100 * asked[0].smallest} == {CLAIMS[name]["smallest"] for name in ("C6", "X2")}


def test_the_sweep_of_too_few_images_is_drawn():
    one = {"mean": 0.02, "low": None, "high": None}
    figure = sweep_map({"grid": [[one, one]], "depths": [1, 2], "shares": [0.1], "best": {"depth": 1, "share": 0.1}, "held_out": one})
    assert "(too few images for an interval)" in figure.get_suptitle()


def test_the_sweep_reports_on_the_other_half(monkeypatch):
    task, seen, best = Pope(yes_no(60)), [], "lowest 0.2, last 3 layers"
    table = table_of(log_normal(6, 2, 17))

    def answer(half, mlm, blocks, parts, **options):
        seen.append((half.images, list(blocks)))
        right, wrong = noisy(half, 0.95, 9), noisy(half, 0.6, len(seen))
        mass = np.array([float(sample.image_id.removeprefix("im")) for sample in half.samples])
        return Answers(half, {name: right if name == best else wrong for name in blocks}, dict.fromkeys(blocks, mass))

    monkeypatch.setattr(key_blocking, "ask_under_blocks", answer)
    whole, *halves = key_blocking.ask_sweep(task, None, table, {NONE: None, BLOCK: None})
    found = key_blocking.sweep(*halves, 6, n_boot=100)
    assert list(whole.texts) == [NONE, BLOCK] and [f"im{int(place)}" for place in whole.mass[BLOCK]] == [s.image_id for s in task.samples]
    for half in halves:
        said = {s.id: text for s, text in zip(half.task.samples, half.texts[NONE], strict=True)}
        assert said.items() <= {s.id: text for s, text in zip(task.samples, whole.texts[NONE], strict=True)}.items()
    assert found["best"] == {"share": 0.2, "depth": 3} and found["held_out"]["low"] > 0.1 and found["depths"] == [1, 2, 3, 4, 6]
    assert np.array([[cell["mean"] for cell in row] for row in found["grid"]]).shape == (5, 5)
    (first, every), (second, one) = seen
    assert len(every) == 27 and one == [NONE, BLOCK, best]
    assert not set(first) & set(second) and len(first) + len(second) == 60 == sum(found["images"])


@pytest.fixture(scope="module")
def tables():
    """All that notebook 03 measures, made up; a token has no rectangle, a newline neither."""
    table, blocks, _ = experiment(draws=2)
    untrained, names, random = table_of(log_normal(6, 2, 17, seed=7)), list(blocked_layers(6)), np.random.default_rng(0)
    scenes, values = [str(i // 4) for i in range(40)], random.random((40, len(names), 3))
    curve = KnockOut(6, names, [f"q{i}" for i in range(40)], ["colour", "count"] * 20, scenes, values)

    def answers(task, conditions):
        texts = {name: noisy(task, 0.8, i) for i, name in enumerate(conditions)}
        return Answers(task, texts, {name: random.random(len(task.samples)) for name in conditions})

    pope, mme = Pope(yes_no(10)), Mme(yes_no(10, ("existence", "count")))
    found = {"keys": replace(table, turned=untrained.variance), "reading": curve}
    found |= {f"keys_untrained_{draw}": replace(untrained, mass=None, variance=untrained.variance * (1 + draw)) for draw in range(2)}
    found["mme"] = answers(mme, blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_blocking, "ask_under_blocks", lambda half, mlm, blocks, parts, **options: answers(half, blocks))
        return found | dict(zip(("pope", "sweep", "sweep_held_out"), key_blocking.ask_sweep(pope, None, table, blocks), strict=True))


PARAMETERS = {"parameters": {"model": "made up", "layers": [], "draws": 2, "random_weights": 2, "bootstrap": 20, "seed": 0}}


def test_results_follow_from_the_files_alone(tables, tmp_path):
    direct = results(tables, PARAMETERS)
    for name, table in tables.items():
        write_frame(tmp_path / f"{name}.parquet", table.frame())
    again = {name: type(table).of_frame(read_frame(tmp_path / f"{name}.parquet")) for name, table in tables.items()}
    assert to_json(results(again, PARAMETERS)) == to_json(direct) and set(direct["claims"]) == {"C5", "C6", "X2", "X4"}
    assert all(len(row) == len(each["header"]) for each in direct["tables"] for row in each["rows"]) and len(direct["tables"][2]["rows"]) == 6
    assert results(tables, {"parameters": PARAMETERS["parameters"] | {"layers": [-1, 4]}})["blocking"] == direct["blocking"]
    assert [sample.id for sample in again["mme"].task.samples] == [sample.id for sample in tables["mme"].task.samples]
    assert np.array_equal(again["keys"].layout.rects, tables["keys"].layout.rects, equal_nan=True)
    frame = tables["keys"].frame()
    with pytest.raises(DataError, match="a row for each of 6 layers x 2 heads x 17 tokens"):
        KeyTable.of_frame(Frame({name: each[::-1] for name, each in frame.columns.items()}, frame.about))


def test_figures_come_from_stored_results_alone(redraw, tables):
    figures = redraw("03_input_agnostic_keys", results(tables, PARAMETERS))
    assert len(figures) == 6 and all(name.startswith("03_") for name in figures)
    for name, figure in figures.items():
        labels = [axis.get_xlabel() + axis.get_ylabel() + axis.get_title() for axis in figure.axes]
        assert any(labels) and any(axis.has_data() for axis in figure.axes), name


def test_pocket_questions():
    asked = open_dataset("pocket-questions", per_kind=4, scenes=40, kinds=("existence", "colour", "hop_same"))
    assert {q.kind for q in asked} == {"existence", "colour", "hop_same"} and len({q.id for q in asked}) == len(asked)
    existence = [q.answer for q in asked if q.kind == "existence"]
    assert sorted(existence) == ["no", "no", "yes", "yes"] and asked[0].options == ("no", "yes")
    assert all(q.answer in q.options and len(q.images) == 1 and q.group.startswith("questions-") for q in asked)
    for options, message in (({"kinds": ("caption",)}, "caption"), ({"per_kind": 0}, "at least 1")):
        with pytest.raises(ParameterError, match=message):
            open_dataset("pocket-questions", **options)


def test_the_data_of_the_notebook():
    few = {"pocket-coco": {"count": 2}, "pocket-pope": {"scenes": 3}, "pocket-mme": {"images": 2, "split": "count"},
           "pocket-questions": {"per_kind": 2, "scenes": 40, "kinds": ("count",)}}  # fmt: skip
    data = open_data("pocket", few)
    assert {use: len(found) for use, found in data.items()} == {"keys": 2, "pope": len(data["pope"]), "mme": 4, "reading": 4}
    assert [one.id for one in data["keys"]] == ["keys-20000-00000", "keys-20000-00001"] and data["keys"][0].mask.shape == (96, 96)
    assert data["pope"][0].image.size == data["keys"][0].image.size == (96, 96)
    resized = open_data("pocket", few, [48, 24])
    assert resized["pope"][0].image.size == resized["mme"][0].image.size == resized["keys"][1].image.size == (48, 24)
    assert resized["keys"][1].mask.shape == (24, 48) and len(resized["keys"]) == 2
    assert set(np.unique(resized["keys"][1].mask)) <= set(np.unique(data["keys"][1].mask))
    for size in ([96], [0, 96], ["96", "96"]):
        with pytest.raises(ParameterError, match="a width and a height"):
            open_data("pocket", few, size)
    with pytest.raises(ParameterError, match="profile pocket: 'pocket-pop' .did you mean 'pocket-pope'"):
        open_data("pocket", {"pocket-pop": {}})


def test_a_profile_without_questions_by_kind_reads_by_pope_and_mme(monkeypatch):
    monkeypatch.delitem(USES["pocket"]["03"], "reading")
    monkeypatch.setattr("kvutils.tasks.input_agnostic_keys.READING_IMAGES", 2)
    few = {"pocket-coco": {"count": 2}, "pocket-pope": {"scenes": 4}, "pocket-mme": {"images": 3, "split": "count"}}
    asked = open_data("pocket", few)["reading"]
    images = {kind: {q.group for q in asked if q.kind == kind} for kind in {q.kind for q in asked}}
    assert {kind: len(found) for kind, found in images.items()} == {"random": 2, "popular": 2, "adversarial": 2, "count": 2}
