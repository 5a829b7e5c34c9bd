"""Metrics: definitions checked by hand on small cases, edge cases, bad input, and the bootstrap."""

import math

import numpy as np
import pytest
import torch

from kvutils import VOID
from kvutils.datasets import coco_masks
from kvutils.datasets import pascal5i as pascal5i_episodes
from kvutils.errors import DataError, ParameterError
from kvutils.metrics import answers, masks, statistics, video
from kvutils.tasks.correspondence import point_hits
from kvutils.tasks.foreground_segmentation import foreground_background_iou, foreground_miou
from tests.mini_data import rle_encode


def mask(rows):
    return np.array([[int(c) if c != "v" else VOID for c in row] for row in rows.split()], dtype=np.uint8)


# --- masks -------------------------------------------------------------------------------------------------


def counts(prediction, true):
    return masks.binary_counts(torch.from_numpy(prediction == 1)[None], true)


def test_void_pixels_count_nowhere():
    found = counts(mask("1100 1100"), mask("1v00 00v1"))
    assert found.tolist() == [[2, 1, 5, 4]]
    jaccard, precision = masks.jaccard_and_precision(found)
    assert jaccard.tolist() == [1 / 4] and precision.tolist() == [3 / 6]
    empty, _ = masks.jaccard_and_precision(counts(mask("00 00"), mask("00 0v")))
    assert empty.tolist() == [1]


def test_few_shot_scores_are_summed_within_classes_and_folds():
    rows = np.array([[0, 0, 5, 3, 6, 4, 1], [0, 0, 5, 1, 9, 4, 1], [0, 1, 0, 9, 9, 9, 1], [1, 7, 9, 0, 9, 0, 1]], dtype=float)
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 0]])
    assert foreground_miou(weights, rows).tolist() == pytest.approx([((4 / 8 + 1) / 2 + 0) / 2, ((6 / 8 + 1) / 2 + 0) / 2])
    found = foreground_background_iou(weights[:1], rows)
    assert found.tolist() == pytest.approx([((10 / 24 + 13 / 17) / 2 + (1 + 0) / 2) / 2])


def test_box_of_the_largest_region():
    true = mask("1000000 0100110 0000110 0000110")
    assert masks.largest_region_box(true) == (4, 1, 6, 4)
    diagonal = mask("100 010 001")  # connected
    assert masks.largest_region_box(diagonal) == (0, 0, 3, 3)
    assert masks.largest_region_box(mask("000")) is None
    assert masks.box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert masks.box_iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0
    assert masks.box_iou(None, (0, 0, 1, 1)) == 0


def test_pck_rules_differ_exactly_at_the_threshold():
    target, predicted = np.array([[0.0, 0], [5, 5]]), np.array([[10.0, 0], [5, 5]])
    assert point_hits(predicted, target, size=100) == (2, 1)


def test_predictions_beyond_the_classes_stay_in_the_denominator():
    found = masks.class_counts(mask("0 1 9 1"), mask("0 1 1 v"), range(2))
    assert found.tolist() == [1, 1, 1, 2, 1, 1]  # right, true, said
    assert masks.class_mean_iou(np.ones((1, 1)), found[None]).tolist() == [(1 + 0.5) / 2]
    from_one = masks.class_counts(mask("0 1 2 2"), mask("0 1 2 1"), range(1, 3))  # background is no class
    assert from_one.tolist() == [1, 1, 2, 1, 1, 2]


# --- video -------------------------------------------------------------------------------------------------


def test_davis_boundary_tolerance_is_a_disk():
    true, near, far = np.zeros((3, 200, 200), bool)
    true[50:100, 50:100] = near[53:103, 50:100] = far[56:106, 50:100] = True  # radius ceil(0.008 * 283) = 3
    assert video.boundary_f(near, true) == 1.0
    assert video.boundary_f(far, true) < 0.6


def test_davis_first_and_last_frames_are_not_scored():
    masks = np.zeros((4, 5, 5), np.uint8)
    masks[:, 1:3, 1:3] = 1
    result = masks.copy()
    result[0] = result[-1] = 7
    assert all((each == 1).all() and each.shape == (1, 2) for each in video.davis_sequence(result, masks))
    result[1, 4, 4] = 2
    for bad in ((result, masks), (masks[:2], masks[:2]), (masks * 0, masks * 0)):
        with pytest.raises(DataError, match="objects"):
            video.davis_sequence(*bad)


# --- questions ---------------------------------------------------------------------------------------------


def test_blink_unresolved_answers_are_wrong_and_counted():
    style = [("(A)", "(A)"), ("(B)", None), ("(A)", answers.NEEDS_JUDGE)]
    scores = answers.blink_scores({"Art Style": style, "IQ": [("(A)", "(A)")]})
    assert scores["accuracy"] == {"Art Style": pytest.approx(1 / 3), "IQ": 1.0, "Total": pytest.approx(2 / 3)}
    assert scores["unresolved"]["Art Style"] == pytest.approx(2 / 3)
    assert answers.blink_extract(None, ["a", "b"]) is None


# --- bootstrap ---------------------------------------------------------------------------------------------


def test_interval_covers_the_mean_at_its_level():
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        interval = statistics.bootstrap_ci(random.normal(1.0, 2.0, 60), n_boot=400, seed=trial)
        inside += interval.low <= 1.0 <= interval.high
    assert 0.89 <= inside / 200 <= 0.99


def test_width_is_that_of_the_standard_error_and_seeded():
    scores = np.random.default_rng(1).normal(size=400)
    interval = statistics.bootstrap_ci(scores, n_boot=4000)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.08)
    assert interval.n == 400
    assert interval == statistics.bootstrap_ci(scores, n_boot=4000)
    assert interval != statistics.bootstrap_ci(scores, n_boot=4000, seed=1)
    assert set(interval.as_dict()) == {"mean", "low", "high", "n"}


def test_an_interval_as_result_claim_and_text():
    found = statistics.Interval(0.25, -0.0001, 0.5, 7)
    assert statistics.Interval.of(found.as_dict()) == found
    assert statistics.interval_text(found.as_dict()) == "0.250 [-0.000, 0.500]"
    assert found.scaled(-100) == statistics.Interval(-25, -50, 0.01, 7)
    assert found.claim("a", unit="x") == {"name": "a", "value": 0.25, "low": -0.0001, "high": 0.5, "n": 7, "unit": "x"}
    assert statistics.interval_text(found.claim(), 1, sign=True, factor=100) == "+25.0 [-0.0, +50.0]"
    nothing = statistics.Interval(math.nan, math.nan, math.nan, 0)
    assert nothing.as_dict() == {"mean": None, "low": None, "high": None, "n": 0}
    assert statistics.interval_text(nothing.as_dict()) == "not defined"
    assert nothing.scaled(2).claim("a") == {"name": "a", "value": None, "low": None, "high": None, "n": 0}
    assert math.isnan(statistics.Interval.of(nothing.as_dict()).mean)
    assert statistics.interval_text(statistics.undefined("a", "no item")) == "not defined: no item"


def test_groups_are_resampled_as_units():
    scene = np.random.default_rng(2).normal(size=30)
    scores, groups = np.repeat(scene, 10), np.repeat([f"scene{i}" for i in range(30)], 10).tolist()
    alone, together = statistics.bootstrap_ci(scores), statistics.bootstrap_ci(scores, groups=groups)
    per_scene = statistics.bootstrap_ci(scene)
    assert (together.high - together.low) > 2.5 * (alone.high - alone.low)
    assert (together.low, together.high) == pytest.approx((per_scene.low, per_scene.high))  # the same draws


def test_ratio_statistics_equal_explicit_resampling():
    sums = np.random.default_rng(3).integers(1, 50, (20, 2)).cumsum(axis=1)
    weights = np.random.default_rng(4).multinomial(20, np.full(20, 1 / 20), size=5).astype(float)
    for w, value in zip(weights, statistics.column_ratio(0, 1)(weights, sums), strict=True):
        drawn = np.repeat(sums, w.astype(int), axis=0)
        assert value == pytest.approx(drawn[:, 0].sum() / drawn[:, 1].sum())
    assert np.isnan(statistics.column_ratio(0, 1)(np.ones((1, 2)), np.zeros((2, 2)))[0])


def test_chunks_of_resamples_do_not_change_the_numbers(monkeypatch):
    scores = np.random.default_rng(5).random((40, 3))
    whole = statistics.bootstrap_ci(scores, n_boot=300)
    monkeypatch.setattr("kvutils.metrics.statistics._CHUNK", 1000)
    chunked = statistics.bootstrap_ci(scores, n_boot=300)
    assert len(whole) == 3
    for a, b in zip(whole, chunked, strict=True):
        assert (a.low, a.high) == pytest.approx((b.low, b.high))


def test_paired_difference_uses_the_pairing():
    random = np.random.default_rng(6)
    a = random.normal(size=100)
    b = a - 0.1 + 0.01 * random.normal(size=100)
    difference = statistics.paired_difference(a, b)
    assert difference.low > 0.09
    assert difference.high < 0.11
    assert statistics.paired_difference(a, a).as_dict() == {"mean": 0, "low": 0, "high": 0, "n": 100}


@pytest.mark.parametrize("shape", ["rise and fall", "flat", "rise"])
def test_peak_then_degrade(shape):
    random = np.random.default_rng(7)
    curve = {"rise and fall": [0, 0.3, 0.6, 0.4, 0.1], "flat": [0.3] * 5, "rise": [0, 0.1, 0.3, 0.4, 0.6]}[shape]
    scores = np.array(curve) + 0.3 * random.normal(size=(120, 1)) + 0.1 * random.normal(size=(120, 5))
    result = statistics.peak_then_degrade(scores, groups=[f"image{i // 2}" for i in range(120)], n_boot=500)
    assert result["builds"] == (shape != "flat")
    assert result["degrades"] == (shape == "rise and fall")
    assert sum(result["peak_shares"]) == pytest.approx(1)
    if shape == "rise and fall":
        assert result["best"] == 2 and result["peak"] == {"mean": 2, "low": 2, "high": 2, "n": 120}
    assert result["minus_first"]["n"] == 60


def test_peak_then_degrade_of_a_ratio():
    random = np.random.default_rng(8)
    union = random.integers(50, 100, (40, 4))
    counts = np.stack([union * [0.2, 0.5, 0.7, 0.4] * random.uniform(0.8, 1, (40, 4)), union], axis=2)
    result = statistics.peak_then_degrade(counts, statistic=statistics.column_ratio(0, 1), n_boot=200)
    assert (result["best"], result["builds"], result["degrades"]) == (2, True, True)


def test_selection_and_test_halves_do_not_share_a_group():
    """On noise, testing on the items the layer was chosen on would find a peak; a held-out half does not."""
    found = 0
    for seed in range(60):
        scores = np.random.default_rng(seed).normal(size=(40, 12))
        result = statistics.peak_then_degrade(scores, seed=seed, n_boot=200)
        found += result["builds"] and result["degrades"]
    assert found <= 4


def test_bootstrap_bad_input():
    with pytest.raises(DataError, match="2 items, 1 of them with NaN"):
        statistics.bootstrap_ci([0.0, np.nan])
    with pytest.raises(DataError, match="at least one item"):
        statistics.bootstrap_ci([])
    with pytest.raises(ParameterError, match="n_boot"):
        statistics.bootstrap_ci([1.0], n_boot=0)
    with pytest.raises(ParameterError, match="at least 4"):
        statistics.peak_then_degrade(np.zeros((9, 3)), groups=[0, 1, 2] * 3)


# --- annotation formats ------------------------------------------------------------------------------------


def test_run_lengths_round_trip_any_mask():
    random = np.random.default_rng(9)
    for shape in ((1, 1), (7, 5), (1, 300), (240, 320)):
        for share in (0, 0.1, 0.9, 1):
            true = random.random(shape) < share
            counts = rle_encode(true)
            assert np.array_equal(coco_masks.rle_decode(counts, *shape), true)


def test_polygons_cover_the_pixels_inside():
    square = coco_masks.polygon_mask([2, 1, 6, 1, 6, 4, 2, 4], 6, 8)
    assert masks.largest_region_box(square) == (2, 1, 6, 4)
    assert square.sum() == 12
    twice = coco_masks.polygon_mask([2, 1, 2, 1, 6, 1, 6, 4, 6, 4, 2, 4], 6, 8)
    # repeated corners change nothing
    assert np.array_equal(square, twice)
    outside = coco_masks.polygon_mask([-5, -5, 20, -5, 20, 20, -5, 20], 6, 8)
    assert outside.all()


def test_malformed_segmentations():
    for segmentation in ([[1, 2, 3]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, np.nan]], [], {"size": [4, 4], "counts": [3]}):
        with pytest.raises(DataError):
            coco_masks.segmentation_mask(segmentation, 4, 4)
    with pytest.raises(DataError, match="expected height, width"):
        coco_masks.segmentation_mask({"size": [4, 5], "counts": [20]}, 4, 4)
    with pytest.raises(DataError, match="truncated"):
        coco_masks.rle_from_string("P")
    with pytest.raises(DataError, match="character 1"):
        coco_masks.rle_from_string("0 ")


def test_episode_lists(tmp_path):
    path = tmp_path / "fold0.txt"
    path.write_text("a__01\nb__01\nc__02\nd__02\n")
    entries = pascal5i_episodes.read_split(path, 0)
    assert entries == [("a", 0), ("b", 0), ("c", 1), ("d", 1)]
    np.random.seed(3)
    episodes = pascal5i_episodes.sample_episodes(entries, shot=3, n_episodes=6)
    assert episodes[0] == ("a", ("b", "b", "b"), 0)  # only the query is rejected, repeats are not
    assert [query for query, _, _ in episodes] == ["a", "b", "c", "d", "a", "b"]
    # the global generator is left alone
    assert np.random.randint(1000) == np.random.RandomState(3).randint(1000)
    with pytest.raises(DataError, match="no image but the query"):
        pascal5i_episodes.sample_episodes([("a", 0)], shot=1)
    path.write_text("a__01\nb__21\n")
    with pytest.raises(DataError, match="line 2"):
        pascal5i_episodes.read_split(path, 0)
