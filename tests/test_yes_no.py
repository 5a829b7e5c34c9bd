"""POPE and MME as tasks: scores with intervals over images, answers that say neither, paired differences, power."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kvutils.datasets.mme import SUBTASKS
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError
from kvutils.metrics.statistics import bootstrap_ci, detectable, paired_difference, standard_error
from kvutils.store import to_json
from kvutils.tasks.yes_no import Mme, Pope, compare_answers, summarise_answers
from tests.tiny_models import noisy

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
    extra = Mme(mme_samples(2, ("existence", "same_color")))  # a subtask that MME does not have
    assert set(extra.totals) == {"total"}
    assert summarise_answers(extra, ["yes", "no"] * 4, n_boot=50)["headline"]["mean"] == 400


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
    assert found["headline"]["low"] > 0.03 and found["headline"]["detectable"] < 0.03
    a, b = (summarise_answers(task, x, n_boot=5)["headline"]["mean"] for x in (better, plain))
    assert found["headline"]["mean"] == pytest.approx(a - b)
    for split in SPLITS:
        assert found["changed"][split]["now_wrong"] == 0
        accuracy = found["scores"][split]["accuracy"]["mean"]
        assert found["changed"][split]["now_right"] == pytest.approx(accuracy)
    reverse = compare_answers(task, plain, better, n_boot=500)["headline"]
    assert reverse["mean"] == pytest.approx(-found["headline"]["mean"])
    other = noisy(task, 0.97, seed=6, start=plain)  # now_right and now_wrong in proportion to what was there
    none = compare_answers(task, other, noisy(task, 0.97, seed=7, start=plain), n_boot=500)["headline"]
    assert none["low"] < 0 < none["high"]
    same = compare_answers(task, plain, plain, n_boot=50)["headline"]
    assert same == {"mean": 0, "low": 0, "high": 0, "n": 900, "detectable": None}
    assert json.loads(to_json(found)) == found


def test_a_difference_is_the_paired_one_of_the_statistics_module():
    task = Pope(pope_samples(30, ("popular",)))
    a, b = noisy(task, 0.9, 1), noisy(task, 0.8, 2)
    groups, counts = [s.image_id for s in task.samples], [task.values(x) for x in (a, b)]
    direct = paired_difference(*counts, f1_statistic, 300, 9, groups).as_dict()

    def difference(weights, both):
        return f1_statistic(weights, both[:, 0]) - f1_statistic(weights, both[:, 1])

    size = detectable(standard_error(np.stack(counts, axis=1), difference, 300, 9, groups))
    found = compare_answers(task, a, b, 300, 9)["scores"]["popular"]["f1"]
    assert found == pytest.approx(direct | {"detectable": size})


def test_several_answer_sets_are_averaged():
    task = Mme(mme_samples(30))
    plain, draws = noisy(task, 0.9, 0), [noisy(task, 0.8, seed) for seed in (1, 2, 3)]
    found = compare_answers(task, plain, draws, n_boot=300)
    each = [summarise_answers(task, draw, n_boot=5)["headline"]["mean"] for draw in draws]
    plain_score = summarise_answers(task, plain, n_boot=5)["headline"]["mean"]
    assert found["headline"]["mean"] == pytest.approx(plain_score - np.mean(each)) and found["sets"] == [1, 3]
    now, *before = [task.right(answers)[60:120] for answers in (plain, *draws)]
    gained = np.mean([now & ~was for was in before])
    lost = np.mean([was & ~now for was in before])
    assert gained > 0 and lost > 0
    assert found["changed"]["count"] == pytest.approx({"now_right": gained, "now_wrong": lost})
    narrow = found["headline"]["high"] - found["headline"]["low"]
    one = compare_answers(task, plain, draws[0], n_boot=300)["headline"]
    assert narrow < one["high"] - one["low"]


def test_standard_errors():
    scores = np.random.default_rng(1).normal(size=(300, 2)) * (1, 3)
    expected = scores.std(axis=0) / np.sqrt(300)
    assert standard_error(scores, n_boot=4000) == pytest.approx(expected, rel=0.05)
    assert standard_error(scores[:, 0], n_boot=4000) == pytest.approx(expected[0], rel=0.05)
    groups = [i // 30 for i in range(300)]
    clustered = np.repeat(scores[:10, 0], 30)
    assert standard_error(clustered, groups=groups) > 4 * standard_error(clustered)
    assert math.isnan(standard_error([1.0, 2.0], lambda w, s: np.full(len(w), np.nan)))
    assert detectable(0.01) == pytest.approx(0.02802, abs=1e-5), "z of 97.5 % and of the power, 80 %, add up"
    assert detectable(0.01, power=0.9) == pytest.approx(0.03242, abs=1e-5)
    assert math.isnan(detectable(0.0)) and np.isnan(detectable(np.array([0, np.nan]))).all()


def test_unusable_samples_and_answers():
    samples = pope_samples(2)
    for call, message in (
        (lambda: Pope([]), "no questions"),
        (lambda: Pope([samples[0], replace(samples[1], picture=Image.new("RGB", (5, 5)))]), "two images have"),
        (lambda: Mme(mme_samples(2)[:3]), "image 'im1' has 1 questions, not two"),
        (lambda: summarise_answers(Pope(samples), ["yes"]), "1 answers for 12 questions"),
        (lambda: compare_answers(Pope(samples), ["yes"] * 12, [["yes"] * 12, ["no"]]), "1 answers for 12"),
    ):
        with pytest.raises(DataError, match=message):
            call()
