"""Metrics: definitions checked by hand on small cases, edge cases, bad input, and the bootstrap."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score

from kvutils import VOID
from kvutils.datasets import coco_masks
from kvutils.datasets import pascal5i as pascal5i_episodes
from kvutils.errors import DataError, ParameterError
from kvutils.metrics import effects, layers, masks, statistics, video
from kvutils.tasks.correspondence import point_hits
from kvutils.tasks.foreground_segmentation import foreground_background_iou, foreground_miou
from tests.mini_data import rle_encode


def mask(rows):
    return np.array([[int(c) if c != "v" else VOID for c in row] for row in rows.split()], dtype=np.uint8)


def test_void_pixels_count_nowhere():
    for said, true, found, scores in (
        ("1100 1100", "1v00 00v1", [2, 1, 5, 4], (1 / 4, 3 / 6)), ("00 00", "00 0v", [3, 0, 3, 0], (1, 1))):  # fmt: skip
        counts = masks.binary_counts(torch.from_numpy(mask(said) == 1)[None], mask(true))
        assert counts.tolist() == [found] and masks.jaccard_and_precision(counts) == scores


def test_few_shot_scores_are_summed_within_classes_and_folds():
    rows = np.array([[0, 0, 5, 3, 6, 4, 1], [0, 0, 5, 1, 9, 4, 1], [0, 1, 0, 9, 9, 9, 1], [1, 7, 9, 0, 9, 0, 1]], dtype=float)
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 0]])
    assert foreground_miou(weights, rows).tolist() == pytest.approx([((4 / 8 + 1) / 2 + 0) / 2, (6 / 8 + 1) / 2])
    few = np.array([[0, 0, 3, 0], [3, 0, 0, 0], [0, 0, 0, 0]])  # a class or a fold that a resample does not draw is left out, not 0
    assert foreground_miou(few, rows).tolist() == pytest.approx([1, 3 / 4, np.nan], nan_ok=True)
    assert foreground_background_iou(few[1:], rows).tolist() == pytest.approx([(5 / 6 + 3 / 4) / 2, np.nan], nan_ok=True)
    found = foreground_background_iou(weights[:1], rows)
    assert found.tolist() == pytest.approx([((10 / 24 + 13 / 17) / 2 + (1 + 0) / 2) / 2])


def test_box_of_the_largest_region():
    true = mask("1000000 0100110 0000110 0000110")
    for each, box in ((true, (4, 1, 6, 4)), (mask("100 010 001"), (0, 0, 3, 3)), (mask("000"), None)):  # diagonals connect
        assert masks.largest_region_boxes(torch.from_numpy(each == 1)[None]) == [box]
    assert masks.box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert masks.box_iou((0, 0, 2, 2), (2, 0, 4, 2)) == masks.box_iou(None, (0, 0, 1, 1)) == 0


def test_boxes_of_many_masks_are_those_that_scipy_labels():
    for shape in ((200, 5, 7), (40, 30, 40), (3, 1, 1), (9, 1, 9), (9, 9, 1)):
        for share in (0, 0.2, 0.5, 0.9):
            said = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < share
            for each, box in zip(said.numpy(), masks.largest_region_boxes(said), strict=True):
                regions, _ = ndimage.label(each, structure=np.ones((3, 3)))
                sizes = np.bincount(regions.ravel())[1:]
                found = ndimage.find_objects(regions)[sizes.argmax()] if len(sizes) else None
                assert box == (found and (found[1].start, found[0].start, found[1].stop, found[0].stop))


def test_ranked_maps_give_what_maps_give():
    """Average precision as scikit-learn's, Otsu's threshold as a search over all, overlaps as counted: with ties and void pixels."""
    random = np.random.default_rng(1)
    maps = random.normal(size=(5, 12, 15)).astype(np.float32)
    maps[1], maps[2], maps[3, :6] = maps[1].round(), 0.25, maps[3, :6] + 6  # many ties; all tied; two classes
    true = random.choice([0, 1, VOID], size=(12, 15), p=(0.6, 0.25, 0.15)).astype(np.uint8)
    known, scores = true != VOID, torch.from_numpy(maps)
    ranked = masks.RankedMaps.of(scores, *masks.true_and_void(true, scores.device))
    thresholds = ranked.otsu()
    counts = masks.binary_counts(scores > thresholds[:, None, None], true)
    assert ranked.overlaps(thresholds).tolist() == counts[:, [1, 3]].tolist()
    for one, threshold, precision in zip(maps, thresholds.numpy(), ranked.average_precisions(), strict=True):
        assert precision == pytest.approx(average_precision_score(true[known] == 1, one[known]))

        def between(t, one=one):
            upper = one > t
            return upper.mean() * (1 - upper.mean()) * (one[upper].mean() - one[~upper].mean()) ** 2 if upper.any() else 0.0

        assert between(threshold) == pytest.approx(max(map(between, one.ravel())), rel=1e-5)
    assert thresholds[2] == 0.25 and masks.RankedMaps.of(torch.tensor([[[0.0, 0, 0, 1]]]), *[torch.tensor([], dtype=int)] * 2).otsu() == 0


def test_pck_rules_differ_exactly_at_the_threshold():
    target, predicted = np.array([[0.0, 0], [5, 5]]), np.array([[10.0, 0], [5, 5]])
    assert point_hits(predicted, target, size=100) == (2, 1)


def test_predictions_beyond_the_classes_stay_in_the_denominator():
    found = masks.class_counts(*map(torch.from_numpy, (mask("0 1 9 1"), mask("0 1 1 v"))), range(2))
    assert found.tolist() == [1, 1, 1, 2, 1, 1]  # right, true, said
    assert masks.class_mean_iou(np.ones((1, 1)), found[None]).tolist() == [(1 + 0.5) / 2]
    nothing = masks.class_counts(*map(torch.from_numpy, (mask("0 1"), mask("v v"))), range(2))
    assert np.isnan(masks.class_mean_iou(np.ones((1, 1)), nothing[None])).all()
    from_one = masks.class_counts(*map(torch.from_numpy, (mask("0 1 2 2"), mask("0 1 2 1"))), range(1, 3))  # background is no class
    assert from_one.tolist() == [1, 1, 2, 1, 1, 2]


def test_davis_boundary_tolerance_is_a_disk():
    true, near, far = torch.zeros(3, 200, 200, dtype=torch.bool)
    true[50:100, 50:100] = near[53:103, 50:100] = far[56:106, 50:100] = True  # radius ceil(0.008 * 283) = 3
    assert video.boundary_f(near, true) == 1.0 and video.boundary_f(far, true) < 0.6


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


def test_width_is_that_of_the_standard_error_and_seeded():
    scores = np.random.default_rng(1).normal(size=400)
    interval = statistics.bootstrap_ci(scores, n_boot=4000)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.08)
    again, other = (statistics.bootstrap_ci(scores, n_boot=4000, seed=seed) for seed in (0, 1))
    assert interval == again != other and interval.n == 400


def test_an_effect_as_result_part_and_text():
    found, nothing = statistics.Effect(0.25, -0.0001, 0.5, 7, 0.125, 40), statistics.UNDEFINED
    assert statistics.Effect.of(found.as_dict()) == found and statistics.Interval.of(found.as_dict()) == statistics.Interval(0.25, -0.0001, 0.5, 7)
    assert found.scaled(-100) == statistics.Effect(-25, -50, 0.01, 7, 12.5, 40)
    assert nothing.as_dict() == {"mean": None, "low": None, "high": None, "n": 0, "error": None, "units": 0}
    stored = effects.part("a", found, unit="x")
    assert stored | {"low90": None, "high90": None, "detectable": None} == {
        "name": "a", "value": 0.25, "low": -0.0001, "high": 0.5, "n": 7, "error": 0.125, "units": 40, "freedom": 39, "unit": "x",
        "low90": None, "high90": None, "detectable": None}  # fmt: skip
    assert stored["high90"] == pytest.approx(0.25 + 1.685 * 0.125, abs=1e-3) and stored["detectable"] == pytest.approx(0.36, abs=0.01)
    assert effects.effect_of(stored) == found
    undefined = effects.part("a", reason="no item")
    assert undefined["value"] is undefined["low90"] is undefined["detectable"] is None and undefined["reason"] == "no item"
    assert statistics.interval_text(found.as_dict()) == "0.250 [-0.000, 0.500]"
    assert statistics.interval_text(stored, 1, sign=True, factor=100) == "+25.0 [-0.0, +50.0]"
    assert statistics.interval_text(nothing.as_dict()) == "not defined"
    assert statistics.interval_text(undefined) == "not defined: no item"


def test_what_has_to_hold():
    above, cost = statistics.Effect(1.0, 0.2, 1.8, 9, 0.4, 30), statistics.Effect(0.25, -0.4, 0.9, 9, 0.3, 30)
    flat, moved = statistics.Effect(0.0, 0.0, 0.0, 9, 0.0, 30), statistics.Effect(3.0, 2.0, 4.0, 9, 0.5, 30)
    for found, holds, said in (
        (effects.enough("images", 99, 100), False, "99 images, 100 are needed"), (effects.enough("images", 100, 100), True, "images"),
        (effects.no_ceiling("POPE", 19), False, "ceiling: 19 errors on POPE, fewer than 20"), (effects.no_ceiling("POPE", 20), True, "20"),
        (effects.no_floor("layer 3", above, "points"), True, "+1.0"), (effects.no_floor("layer 3", cost, "points"), False, "floor: layer 3"),
        (effects.lever("hiding all", cost, flat, 1.5, "F1 points"), False, "difference of +0.25 [-0.40, +0.90] F1 points; 1.5 or more, by that or by the block, is excluded"),
        (effects.lever("hiding all", above, flat, 0.9, "F1 points"), True, "hiding all"),
        (effects.lever("hiding all", cost, moved, 1.5, "F1 points"), True, "1.5 or more, by that or by the block, is not excluded")):  # fmt: skip
        assert found["holds"] is holds and said in found["reason"]


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
    monkeypatch.setattr("kvutils.metrics.statistics._KEPT", 0)
    chunked = statistics.bootstrap_ci(scores, n_boot=300)
    assert len(whole) == 3 and np.allclose([(a.low, a.high) for a in whole], [(b.low, b.high) for b in chunked])


def test_paired_difference_uses_the_pairing():
    random = np.random.default_rng(6)
    a = random.normal(size=100)
    b = a - 0.1 + 0.01 * random.normal(size=100)
    difference = statistics.paired_difference(a, b)
    assert 0.09 < difference.low < difference.high < 0.11
    assert statistics.paired_difference(a, a).as_dict() == {"mean": 0, "low": 0, "high": 0, "n": 100, "error": 0, "units": 100}
    assert math.isnan(statistics.paired_difference(a, a).detectable), "what never differs says nothing about the noise"


@pytest.mark.parametrize("units", [4, 8, 20, 40])
def test_null_rate_with_few_groups(units):
    """Items of a group share half of their noise; of 400 samples without an effect an interval lies above 0 in 2.5 %."""
    random, above = np.random.default_rng(units), 0
    for seed in range(400):
        noise = np.repeat(random.normal(size=units), 5) + random.normal(size=5 * units)
        above += statistics.effect(noise, n_boot=300, seed=seed, groups=np.repeat(np.arange(units), 5).tolist()).low > 0
    assert above / 400 <= 0.05


def test_few_groups_have_students_interval():
    found = statistics.effect([1.0, 2.0, 4.0, 5.0])
    assert (found.mean, found.error) == pytest.approx((3, np.std([1, 2, 4, 5], ddof=1) / 2))
    assert found.high - found.mean == pytest.approx(3.182 * found.error, rel=1e-3) and found.units == 4
    alone = statistics.effect([1.0, 3.0], groups=["a", "a"])
    assert alone.mean == 2 and math.isnan(alone.low) and math.isnan(alone.error) and alone.units == 1


@pytest.mark.parametrize("nodes", [12, 40])
def test_pairs_are_resampled_over_both_images(nodes):
    """Of pairs (i, j) with score a_i + a_j the mean has the error of 2 mean(a), whatever the number of pairs."""
    node = np.random.default_rng(3).normal(size=nodes)
    pairs = [(i, j) for i in range(nodes) for j in range(i)]
    found = statistics.effect([node[i] + node[j] for i, j in pairs], groups=[(f"image{i}", f"image{j}") for i, j in pairs])
    assert found.units == nodes and found.error == pytest.approx(2 * node.std(ddof=1) / np.sqrt(nodes), rel=0.15)
    assert found.error > 2 * statistics.effect([node[i] + node[j] for i, j in pairs]).error


@pytest.mark.parametrize("n", [12, 160])
def test_pairs_that_share_no_image_are_units_like_others(n):
    scores = np.random.default_rng(0).normal(size=n)
    assert statistics.effect(scores, groups=[(f"a{i}", f"b{i}") for i in range(n)]) == statistics.effect(scores)
    shared = [(f"a{i}", f"b{i % 4}") for i in range(n)]  # a source of its own each: those of one target are a group
    assert statistics.effect(scores, groups=shared) == statistics.effect(scores, groups=[i % 4 for i in range(n)])


def test_mean_over_tasks():
    one, other = statistics.Effect(1.0, 0.0, 2.0, 10, 0.5, 200), statistics.Effect(4.0, 3.0, 5.0, 20, 0.5, 200)
    found = statistics.mean_effect([one, other])
    assert (found.mean, found.error, found.n) == pytest.approx((2.5, 0.5 / np.sqrt(2), 30)) and found.units == 399
    few = statistics.mean_effect([one, statistics.Effect(4.0, 3.0, 5.0, 4, 0.5, 4)])
    assert few.units == 13 and few.high - few.low > found.high - found.low and statistics.mean_effect([]) is statistics.UNDEFINED
    assert statistics.mean_effect([statistics.Effect(0.0, 0.0, 0.0, 3, 0.0, 3)] * 2).error == 0


def test_no_item_chooses_its_own_layer():
    """Each item is best at a layer of its own group; whoever chooses for himself would see 1."""
    groups = [f"g{i // 3}" for i in range(60)]
    halves = layers.Halves.of(groups)
    scores = np.where(halves.second[:, None], [0.0, 1.0], [1.0, 0.0])
    best = halves.best(scores)
    assert best == [1, 0] and halves.read(scores, best).tolist() == [0.0] * 60
    almost = 1 + 1e-12 * np.arange(3) * np.ones((60, 1))  # what sums differ by between processors chooses no layer
    assert halves.best(almost) == [0, 0] and halves.chosen(almost)(np.ones((1, 60))).tolist() == [1.0]
    assert 0.3 < halves.second.mean() < 0.7 and all(len({halves.second[i] for i in range(60) if groups[i] == g}) == 1 for g in set(groups))


def test_what_shares_a_picture_does_not_choose():
    groups = [f"class{i % 8}" for i in range(80)]
    pictures = [(f"q{i}", "everywhere" if i in (0, 1) else f"s{i}") for i in range(80)]
    halves, free = (layers.Halves.of(groups, pictures=each) for each in (pictures, None))
    assert (halves.second == free.second).all()
    for half, chooses in zip((~halves.second, halves.second), halves.choosing, strict=True):
        assert not half[chooses].any()
        shown = {name for i in np.flatnonzero(half) for name in pictures[i]}
        assert shown.isdisjoint(name for i in np.flatnonzero(chooses) for name in pictures[i])
    assert halves.choosing.sum() == free.choosing.sum() - (2 if free.second[0] != free.second[1] else 0)
    with pytest.raises(ParameterError, match="at least 4 independent units"):
        layers.Halves.of(groups, pictures=[("one",)] * 80)
    with pytest.raises(ParameterError, match="found 3"):
        layers.Halves.of([0, 1, 2] * 3)


@pytest.mark.parametrize("curve, first, last", [
    ([0, 0.3, 0.6, 0.4, 0.1], 1, 1), ([0.3] * 5, 0, 0), ([0, 0.1, 0.3, 0.4, 0.6], 1, -1), ([0.6, 0.4, 0.3, 0.1, 0], -1, 1)])  # fmt: skip
def test_build_then_degrade(curve, first, last):
    random = np.random.default_rng(7)
    scores = np.array(curve) + 0.3 * random.normal(size=(120, 1)) + 0.1 * random.normal(size=(120, 5))
    groups = [f"image{i // 2}" for i in range(120)]
    result = layers.build_then_degrade(scores, layers.Halves.of(groups), groups, n_boot=500)
    for name, sign in (("minus_first", first), ("minus_last", last)):
        found = result[name]
        assert ((found["low"] > 0) - (found["high"] < 0)) == sign and (found["n"], found["units"]) == (120, 60)
    for name, end in (("between_first", 0), ("between_last", -1)):
        assert result[name]["mean"] == pytest.approx((scores[:, 1:-1].mean(axis=1) - scores[:, end]).mean()) and result[name]["units"] == 60
    if first == last == 1:
        assert result["best"] == [2, 2] and result["peak"] == {"mean": 2, "low": 2, "high": 2, "n": 120}


def test_noise_neither_builds_nor_degrades():
    """Testing on the items that a layer was chosen on would find a peak in noise."""
    noise = [np.random.default_rng(seed).normal(size=(40, 12)) for seed in range(60)]
    found = [layers.build_then_degrade(scores, layers.Halves.of(range(40), seed), seed=seed, n_boot=200)
             for seed, scores in enumerate(noise)]  # fmt: skip
    assert sum(each["minus_first"]["low"] > 0 for each in found) <= 4 >= sum(each["minus_last"]["low"] > 0 for each in found)


def test_an_interval_of_a_chosen_layer_knows_that_the_halves_choose_alike():
    """Where layers do not differ, the standard error is no smaller than the estimates' spread over draws; with layers that stay it is,
    by an eighth. Where one layer is clearly the best the two are the same."""
    values, anew, stays = np.empty((3, 400))
    for seed in range(400):
        scores, halves = np.random.default_rng(seed).normal(size=(60, 6)), layers.Halves.of(range(60), seed)
        found = statistics.resample(halves.chosen(scores), 60, 200, seed, around=True)
        values[seed], anew[seed] = found.value, found.error
        stays[seed] = statistics.effect(halves.read(scores, halves.best(scores)), n_boot=200, seed=seed).error
    assert stays.mean() < 0.9 * values.std() and values.std() < anew.mean() < 1.5 * values.std()
    assert abs(values.mean()) < 3 * values.std() / 20
    scores[:, 2] += 2
    found = statistics.resample(halves.chosen(scores), 60, 200, 5, around=True)
    plain = statistics.resample(lambda w: statistics.mean_statistic(w, scores[:, 2]), 60, 200, 5)
    assert np.allclose(found.draws, plain.draws)
    effect = found.effects()
    assert effect.high - effect.mean == pytest.approx(effect.mean - effect.low) and effect.units == 60
    few = scores[:6, 2]
    found = statistics.resample(lambda w: statistics.mean_statistic(w, few), 6, 20_000, 5, around=True)
    assert found.error == pytest.approx(few.std(ddof=1) / 6**0.5, rel=0.02) and not found.jackknife


def test_the_best_of_jagged_levels_is_ahead_of_the_ends_but_their_mean_is_not():
    """Levels of layers that differ without any trend, the same in every item: a best layer is above the first, the mean of all above 0 in
    as many draws as below."""
    found = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        scores = random.normal(size=12) + 0.3 * random.normal(size=(40, 12))
        found.append(layers.build_then_degrade(scores, layers.Halves.of(range(40), seed), seed=seed, n_boot=200))
    best, mean = (np.array([each[name]["mean"] for each in found]) for name in ("minus_first", "between_first"))
    assert (best > 0).mean() > 0.8 and abs((mean > 0).mean() - 0.5) < 0.2


@pytest.mark.parametrize("scores, options, error, message", [
    ([0.0, np.nan], {}, DataError, "2 items, 1 of them with NaN"), ([], {}, DataError, "at least one item"),
    ([1.0], {"n_boot": 0}, ParameterError, "n_boot")])  # fmt: skip
def test_scores_that_have_no_interval(scores, options, error, message):
    with pytest.raises(error, match=message):
        statistics.bootstrap_ci(scores, **options)
    with pytest.raises(ParameterError, match="at least 3 layers"):
        layers.build_then_degrade(np.zeros((9, 2)), layers.Halves.of(range(9)))


def test_run_lengths_round_trip_any_mask():
    random = np.random.default_rng(9)
    for shape in ((1, 1), (7, 5), (1, 300), (240, 320)):
        for share in (0, 0.1, 0.9, 1):
            true = random.random(shape) < share
            assert np.array_equal(coco_masks.rle_decode(rle_encode(true), *shape), true)


def test_polygons_cover_the_pixels_inside():
    square = coco_masks.segmentation_mask([[2, 1, 6, 1, 6, 4, 2, 4]], 6, 8)
    assert masks.largest_region_boxes(torch.from_numpy(square == 1)[None]) == [(2, 1, 6, 4)] and square.sum() == 12
    repeated_corners = coco_masks.segmentation_mask([[2, 1, 2, 1, 6, 1, 6, 4, 6, 4, 2, 4]], 6, 8)
    assert np.array_equal(square, repeated_corners)
    assert coco_masks.segmentation_mask([[-5, -5, 20, -5, 20, 20, -5, 20]], 6, 8).all()


@pytest.mark.parametrize("segmentation, message", [
    ([[1, 2, 3]], "at least 3"), ([[1, 2, 3, 4]], "at least 3"), ([[1, 2, 3, 4, 5, np.nan]], "finite"), ([], "none such"),
    ({"size": [4, 4], "counts": [3]}, "sum to 3"), ({"size": [4, 5], "counts": [20]}, "expected height, width"),
    ({"size": [4, 4], "counts": [2**63 - 1, 2**63 - 1, 18]}, "run lengths sum to no number"),
    ({"size": [4, 4], "counts": [2**70]}, "sum to no number"), ({"size": [4, 4], "counts": [16.5]}, "sum to no number"),
    ({"size": [4, 4], "counts": "ooooooooooooooooooo0"}, "sum to no number"), ({"size": 4, "counts": [16]}, "for an image of 4"),
    ({"size": [4, 4]}, "list or text, found None"), (None, "found None"), (5, "found 5"), ("polygon", "found polygon"),
    ([1, 2, 3, 4, 5, 6], "a polygon: expected a flat list"), ([[[1, 2], [3, 4], [5, 6]]], "a flat list"), ([["a", "b"] * 3], "a flat list"),
    ([[1e12, 0, 1, 1, 0, 1]], "finite x, y pairs in the picture"), ([None], "a flat list"),
    ({"size": [4, 4], "counts": "P"}, "truncated"), ({"size": [4, 4], "counts": "0 "}, "character 1")])  # fmt: skip
def test_malformed_segmentations(segmentation, message):
    with pytest.raises(DataError, match=message):
        coco_masks.segmentation_mask(segmentation, 4, 4)


SQUARE = [2, 2, 2, 10, 12, 10, 12, 2]


@pytest.mark.parametrize(("parts", "area"), [
    ([SQUARE, [5, 5, 9, 9]], 80), ([SQUARE, [15.0, 10.0]], 80), ([SQUARE, []], 80), ([[5, 5, 9, 9], SQUARE], 80), ([SQUARE[:7]], 40),
])  # fmt: skip
def test_degenerate_parts_are_drawn_as_pycocotools_draws_them(parts, area):
    assert coco_masks.segmentation_mask(parts, 20, 30).sum() == area  # but for the first of four, which it takes for a box


@pytest.mark.parametrize("kind", [list, np.int8, np.int16, np.uint16, np.float16, torch.int8])
def test_boxes_of_small_numbers_do_not_overflow(kind):
    size = (120, 100) if kind in (np.int8, torch.int8) else (640, 480)
    whole, half = [0, 0, *size], [0, 0, size[0] // 2, size[1]]
    if kind is not list:
        whole, half = (torch.tensor(box, dtype=kind) if isinstance(kind, torch.dtype) else np.array(box, kind) for box in (whole, half))
    assert masks.box_iou(whole, whole) == 1 and masks.box_iou(whole, half) == 0.5


def test_episode_lists(tmp_path):
    path = tmp_path / "fold0.txt"
    path.write_text("a__01\nb__01\nc__02\nd__02\n")
    entries = pascal5i_episodes.read_split(path, 0)
    assert entries == [("a", 0), ("b", 0), ("c", 1), ("d", 1)]
    np.random.seed(3)  # this generator is left alone
    episodes = pascal5i_episodes.sample_episodes(entries, shot=3, n_episodes=6)
    assert episodes[0] == ("a", ("b", "b", "b"), 0)  # only the query is rejected, repeats are not
    assert [query for query, _, _ in episodes] == ["a", "b", "c", "d", "a", "b"]
    assert np.random.randint(1000) == np.random.RandomState(3).randint(1000)
    with pytest.raises(DataError, match="no image but the query"):
        pascal5i_episodes.sample_episodes([("a", 0)], shot=1)
    path.write_text("a__01\nb__21\n")
    with pytest.raises(DataError, match="line 2"):
        pascal5i_episodes.read_split(path, 0)
