"""POPE and MME as tasks: scores with intervals over images, answers that say neither, paired differences, power."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kvutils.datasets.mme import SUBTASKS
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError
from kvutils.metrics.statistics import Effect, bootstrap_ci, paired_difference
from kvutils.store import to_json
from kvutils.tasks.yes_no import Mme, Pope, Scored
from tests.tiny_models import compare_answers, noisy, summarise_answers

BLANK = Image.new("RGB", (4, 4))
SPLITS = ("random", "popular", "adversarial")


def pope_samples(images=40, splits=SPLITS):
    """Per image and split two questions: the positive is the same in all splits."""
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(images)]
    return [YesNoSample(f"{split}-{i}-{truth}", f"im{i}", pictures[i], f"is there a {fish} ?", truth, split)
            for split in splits for i in range(images) for truth, fish in (("yes", "fish"), ("no", split))]  # fmt: skip


def mme_samples(images=20, subtasks=("existence", "count", "position", "color")):
    return [YesNoSample(f"{subtask}-{i}-{truth}", f"im{i}", BLANK, f"{subtask} {truth} ?", truth, subtask)
            for subtask in subtasks for i in range(images) for truth in ("yes", "no")]  # fmt: skip


def f1_statistic(weights, counts):
    """(n_boot,) F1 of resampled columns TP, FP, TN, FN, ..."""
    tp, fp, _, fn = (weights @ counts[:, :4]).T
    return 2 * tp / (2 * tp + fp + fn)


def test_pope_scores_have_intervals_over_images():
    task = Pope(pope_samples())
    answers = noisy(task, 0.85, seed=1)
    summary = summarise_answers(task, answers, n_boot=500, seed=3)
    counts = task.values(answers)
    for i, split in enumerate(SPLITS):
        mine, found = slice(80 * i, 80 * (i + 1)), summary["scores"][split]
        tp, fp, tn, fn = counts[mine, :4].sum(axis=0)
        expected = {"f1": tp / (tp + (fp + fn) / 2), "accuracy": (tp + tn) / 80, "precision": tp / (tp + fp),
                    "recall": tp / (tp + fn), "yes_ratio": (tp + fp) / 80, "unknown": 0}  # fmt: skip
        assert {key: found[key]["mean"] for key in found} == pytest.approx(expected) and found["f1"]["n"] == 80
        groups = [s.image_id for s in task.samples[mine]]
        assert found["f1"] == pytest.approx(bootstrap_ci(counts[mine], f1_statistic, 500, 3, groups).as_dict())
    f1 = [summary["scores"][split]["f1"]["mean"] for split in SPLITS]
    assert summary["scores"]["mean"]["f1"]["mean"] == pytest.approx(np.mean(f1))
    assert summary["scores"]["pooled"]["f1"]["mean"] == pytest.approx(f1_statistic(np.ones((1, 240)), counts)[0])
    assert summary["headline"] == summary["scores"]["mean"]["f1"] and summary["headline"]["n"] == 240
    assert summary["headline"]["low"] < summary["headline"]["mean"] < summary["headline"]["high"]
    assert (summary["n"], summary["images"]) == (240, 40) and summary["questions"] == dict.fromkeys(SPLITS, 80)
    assert json.loads(to_json(summary)) == summary


def test_mme_scores_add_up_over_pairs_and_subtasks():
    task = Mme(mme_samples())
    answers = noisy(task, 0.8, seed=2)
    summary = summarise_answers(task, answers, n_boot=500)
    scores = summary["scores"]
    assert set(scores) == {*task.subsets, "total", "hallucination"}
    for i, subtask in enumerate(task.subsets):
        right = np.reshape(task.right(answers)[40 * i : 40 * (i + 1)], (20, 2))
        acc, acc_plus = right.mean(), right.all(axis=1).mean()
        found, score = {key: scores[subtask][key]["mean"] for key in ("acc", "acc_plus", "score")}, scores[subtask]["score"]
        assert found == pytest.approx({"acc": acc, "acc_plus": acc_plus, "score": 100 * (acc + acc_plus)})
        assert score["low"] < score["mean"] < score["high"] and score["n"] == 40
    total = sum(scores[subtask]["score"]["mean"] for subtask in task.subsets)
    assert scores["hallucination"]["score"]["mean"] == pytest.approx(total)
    assert summary["headline"]["mean"] == pytest.approx(total) and summary["headline"]["n"] == 160
    assert json.loads(to_json(summary)) == summary


def test_mme_totals_need_all_their_subtasks_but_not_a_yes_or_no_in_each():
    task = Mme(mme_samples(3, SUBTASKS))
    truth = [s.truth for s in task.samples]
    scores = summarise_answers(task, truth, n_boot=50)["scores"]
    means = {name: scores[name]["score"]["mean"] for name in task.totals}
    assert means == pytest.approx({"total": 2800, "perception": 2000, "cognition": 800, "hallucination": 800})
    assert scores["cognition"]["score"]["n"] == 24
    # Without a yes or no in a subtask the authors' script stops, and has no score at all.
    answers = ["perhaps" if s.subset == "OCR" else s.truth for s in task.samples]
    summary = summarise_answers(task, answers, n_boot=50)
    scores = {name: each["score"]["mean"] for name, each in summary["scores"].items()}
    assert summary["unknown"] == 6 and summary["scores"]["OCR"]["unknown"]["mean"] == 1
    assert scores.pop("OCR") == 0 and scores.pop("perception") == 1800 and scores.pop("total") == 2600
    assert scores.pop("cognition") == scores.pop("hallucination") == 800 and set(scores.values()) == {200}


def test_a_subtask_that_mme_does_not_have_stands_beside_its_total():
    extra = Mme(mme_samples(2, ("existence", "same_color", "count")))
    assert set(extra.totals) == {"total"} and extra.smallest == 4, "1 % of twice 200"
    answers = ["yes", "no"] * 2 + ["no", "yes"] * 2 + ["yes", "no"] * 2
    summary = summarise_answers(extra, answers, n_boot=50)
    assert summary["headline"]["mean"] == 400 and summary["headline"]["n"] == 8 and summary["errors"] == 0
    assert summary["scores"]["same_color"]["score"]["mean"] == 0
    with pytest.raises(DataError, match="MME's total needs a subtask of MME's, found same_color; name one of existence"):
        Mme(mme_samples(2, ("same_color",)))


def test_pope_counts_what_says_neither():
    """"It is. No": POPE's script stops at the full stop and takes what is left for yes."""
    texts = ["", "a fish", "There is not a fish", "yes, a fish", "It is. No", "no"]
    said, unknown = ["yes", "yes", "no", "yes", "yes", "no"], [1, 1, 0, 0, 1, 0]
    task = Pope(pope_samples(3, ("random",)))
    assert [task.read(text) for text in texts] == list(zip(said, map(bool, unknown), strict=True))
    summary = summarise_answers(task, texts, n_boot=20)
    assert summary["unknown"] == sum(unknown) and summary["scores"]["random"]["unknown"]["n"] == 6
    assert summary["scores"]["random"]["unknown"]["mean"] == pytest.approx(np.mean(unknown))
    right = np.mean([a == s.truth for a, s in zip(said, task.samples, strict=True)])
    assert summary["scores"]["random"]["accuracy"]["mean"] == pytest.approx(right)
    never = summarise_answers(task, ["no"] * 6, n_boot=20)
    assert never["headline"]["mean"] == 0 and never["scores"]["random"]["precision"]["mean"] is None
    to_json(never)  # no precision is null, not NaN


def test_a_true_difference_shows_and_its_absence_too():
    task = Pope(pope_samples(150))
    plain = noisy(task, 0.80, seed=4)
    mended = np.random.default_rng(5).random(900) < 0.4
    better = [s.truth if now else said for s, said, now in zip(task.samples, plain, mended, strict=True)]
    found = compare_answers(task, better, plain, n_boot=500)
    assert found["headline"]["low"] > 0.03 and Effect.of(found["headline"]).detectable < 0.03
    a, b = (summarise_answers(task, x, n_boot=5)["headline"]["mean"] for x in (better, plain))
    assert found["headline"]["mean"] == pytest.approx(a - b)
    assert found["changed"] == pytest.approx({"now_right": np.mean(task.right(better) & ~task.right(plain)), "now_wrong": 0})
    reverse = compare_answers(task, plain, better, n_boot=500)["headline"]
    assert reverse["mean"] == pytest.approx(-found["headline"]["mean"])
    other = noisy(task, 0.97, seed=6, start=plain)  # now_right and now_wrong in proportion to what was there
    none = compare_answers(task, other, noisy(task, 0.97, seed=7, start=plain), n_boot=500)["headline"]
    assert none["low"] < 0 < none["high"]
    same = compare_answers(task, plain, plain, n_boot=50)["headline"]
    assert same == {"mean": 0, "low": 0, "high": 0, "n": 900, "error": 0, "units": 150}
    assert json.loads(to_json(found)) == found


def test_a_difference_is_the_paired_one_of_the_statistics_module():
    task = Pope(pope_samples(30, ("popular",)))
    a, b = noisy(task, 0.9, 1), noisy(task, 0.8, 2)
    groups, counts = [s.image_id for s in task.samples], [task.values(x) for x in (a, b)]
    direct = paired_difference(*counts, f1_statistic, 300, 9, groups)
    found = compare_answers(task, a, b, 300, 9)["scores"]["popular"]["f1"]
    assert found == pytest.approx(direct.as_dict()) and Effect.of(found).detectable == pytest.approx(direct.detectable)


def test_several_answer_sets_are_averaged():
    task = Mme(mme_samples(30))
    plain, draws = noisy(task, 0.9, 0), [noisy(task, 0.8, seed) for seed in (1, 2, 3)]
    found = compare_answers(task, plain, draws, n_boot=300)
    each = [summarise_answers(task, draw, n_boot=5)["headline"]["mean"] for draw in draws]
    plain_score = summarise_answers(task, plain, n_boot=5)["headline"]["mean"]
    assert found["headline"]["mean"] == pytest.approx(plain_score - np.mean(each)) and found["sets"] == [1, 3]
    now, *before = [task.right(answers) for answers in (plain, *draws)]
    gained = np.mean([now & ~was for was in before])
    lost = np.mean([was & ~now for was in before])
    assert gained > 0 and lost > 0
    assert found["changed"] == pytest.approx({"now_right": gained, "now_wrong": lost})
    narrow = found["headline"]["high"] - found["headline"]["low"]
    one = compare_answers(task, plain, draws[0], n_boot=300)["headline"]
    assert narrow < one["high"] - one["low"]


def test_the_variance_between_draws_is_what_images_do_not_explain():
    """Draws of one family, answers with an effect of their own: its variance comes back, without what chance adds."""
    task, random, between = Pope(pope_samples(200, ("random",))), np.random.default_rng(3), []
    for _ in range(20):
        shifts = 0.8 + 0.05 * random.normal(size=20)
        scored = Scored.of(task, {str(d): noisy(task, shift, int(random.integers(2**32))) for d, shift in enumerate(shifts)}, 300)
        others = [str(d) for d in range(1, 20)]
        mean, one_more = (scored.change(*sides)["scores"]["pooled"]["accuracy"] for sides in ((others, ["0"]), (["0"], others)))
        assert one_more["mean"] == pytest.approx(-mean["mean"]) and 19 <= one_more["units"] <= 60 < mean["units"]
        between.append(one_more["error"] ** 2 - mean["error"] ** 2)
        assert one_more["high"] - one_more["low"] > 4 * one_more["error"], "Student's t"
    assert np.mean(between) == pytest.approx(0.05**2, rel=0.25)


@pytest.mark.parametrize("spread", (0.0, 0.15))
def test_a_draw_is_not_better_than_its_own_family(spread):
    """One of 13 draws of random keys against the others, over and over: without the draws as units up to 15 to 40 % would "hold"."""
    samples = pope_samples(60, ("random",))
    task, random, held, over_images = Pope(samples), np.random.default_rng(8), 0, 0
    for _ in range(120):
        hard = random.normal(size=120)
        wrong = (hard + 0.3 * random.normal(size=(13, 120)) < -0.8 + spread * random.normal(size=(13, 1))).tolist()
        flip = {"yes": "no", "no": "yes"}
        sets = {str(d): [flip[s.truth] if w else s.truth for s, w in zip(samples, row, strict=True)] for d, row in enumerate(wrong)}
        scored = Scored.of(task, sets, 200, int(random.integers(2**32)))
        held += scored.change(["0"], [str(d) for d in range(1, 13)])["headline"]["low"] > 0
        drawn = scored.found.draws[:, :, scored.keys.index(task.metric)]
        over_images += np.quantile(drawn[:, 0] - drawn[:, 1:].mean(axis=1), 0.025) > 0
    assert held / 120 <= 0.05 and (not spread or over_images / 120 > 0.1)


def test_unusable_samples_and_answers():
    samples = pope_samples(2)
    for call, message in (
        (lambda: Pope([]), "no questions"),
        (lambda: Pope([samples[0], replace(samples[1], picture=Image.new("RGB", (5, 5)))]), "two images have"),
        (lambda: Mme(mme_samples(2)[:3]), "image 'im1' has 1 questions, not two"),
        (lambda: summarise_answers(Pope(samples), ["yes"]), "these: 1 answers for 12 questions"),
        (lambda: compare_answers(Pope(samples), ["yes"] * 12, [["yes"] * 12, ["no"]]), "1 answers for 12"),
    ):
        with pytest.raises(DataError, match=message):
            call()
