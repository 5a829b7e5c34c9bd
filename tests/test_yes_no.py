"""POPE and MME as tasks: official scores, intervals over images, paired differences, resuming, bad answers."""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvutils.datasets.mme import SUBTASKS
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError, ParameterError
from kvutils.metrics.answers import POPE_CONVENTIONS, f1_statistic, mme_scores, pope_counts, pope_scores
from kvutils.metrics.statistics import (
    bootstrap_ci,
    detectable,
    minimum_detectable_difference,
    paired_difference,
    standard_error,
)
from kvutils.store import Parts, to_json
from kvutils.tasks.yes_no import Mme, Pope, compare_answers, run_questions, summarise_answers

FIXTURES = os.environ.get("KVUTILS_FIXTURES")
needs_fixtures = pytest.mark.skipif(not FIXTURES, reason="KVUTILS_FIXTURES names no folder of reference values")
BLANK = Image.new("RGB", (4, 4))
SPLITS = ("random", "popular", "adversarial")
FLIP = {"yes": "no", "no": "yes"}


def pope_samples(images=40, splits=SPLITS):
    """Per image and split two questions: the positive is the same in all splits."""
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(images)]
    return [
        YesNoSample(f"{split}-{i}-{truth}", f"im{i}", pictures[i],
                    f"is there a {'fish' if truth == 'yes' else split} ?", truth, split)
        for split in splits for i in range(images) for truth in ("yes", "no")
    ]  # fmt: skip


def mme_samples(images=20, subtasks=("existence", "count", "position", "color")):
    return [
        YesNoSample(f"{subtask}-{i}-{truth}", f"im{i}", BLANK, f"{subtask} {truth} ?", truth, subtask)
        for subtask in subtasks for i in range(images) for truth in ("yes", "no")
    ]  # fmt: skip


def noisy(task, accuracy, seed, start=None):
    """The truth (or `start`), turned round with probability 1 - accuracy."""
    random = np.random.default_rng(seed)
    words = [s.truth for s in task.samples] if start is None else start
    return [word if random.random() < accuracy else FLIP[word] for word in words]


# --- scores ------------------------------------------------------------------------------------------------


def test_pope_scores_are_the_official_ones_with_intervals_over_images():
    task = Pope(pope_samples())
    answers = noisy(task, 0.85, seed=1)
    summary = summarise_answers(task, answers, n_boot=500, seed=3)
    labels = [s.truth for s in task.samples]
    for i, split in enumerate(SPLITS):
        mine = slice(80 * i, 80 * (i + 1))
        expected = pope_scores(answers[mine], labels[mine])
        assert summary["official"][split] == expected
        for key in ("f1", "accuracy", "precision", "recall", "yes_ratio"):
            assert summary["scores"][split][key]["mean"] == pytest.approx(expected[key])
        assert summary["scores"][split]["unknown"]["mean"] == 0 and summary["scores"][split]["f1"]["n"] == 80
        groups = [s.image_id for s in task.samples[mine]]
        direct = bootstrap_ci(pope_counts(answers[mine], labels[mine]), f1_statistic, 500, 3, groups)
        assert summary["scores"][split]["f1"] == pytest.approx(direct.as_dict())
    f1 = [summary["scores"][split]["f1"]["mean"] for split in SPLITS]
    assert summary["scores"]["mean"]["f1"]["mean"] == pytest.approx(np.mean(f1))
    assert summary["scores"]["pooled"]["f1"]["mean"] == pytest.approx(pope_scores(answers, labels)["f1"])
    assert summary["headline"] == summary["scores"]["mean"]["f1"] and summary["headline"]["n"] == 240
    assert summary["headline"]["low"] < summary["headline"]["mean"] < summary["headline"]["high"]
    assert (summary["n"], summary["images"]) == (240, 40) and summary["questions"] == dict.fromkeys(SPLITS, 80)
    assert json.loads(to_json(summary)) == summary


def test_intervals_are_over_images_not_questions():
    """The same right and wrong answers, gathered in few images, say less."""
    spread, gathered = pope_samples(60, ("random",)), []
    for number, sample in enumerate(spread):
        gathered.append(replace(sample, image_id=f"im{number // 20}", picture=BLANK))
    answers = ["yes"] * 60 + [s.truth for s in spread[60:]]
    widths = []
    for samples in (spread, gathered):
        found = summarise_answers(Pope(samples), answers)["scores"]["random"]["accuracy"]
        assert found["mean"] == 0.75
        widths.append(found["high"] - found["low"])
    assert widths[1] > 2 * widths[0]


def test_mme_scores_are_the_official_ones():
    task = Mme(mme_samples())
    answers = noisy(task, 0.8, seed=2)
    summary = summarise_answers(task, answers, n_boot=500)
    scores, official = summary["scores"], summary["official"]
    for subtask in task.subsets:
        for key in ("acc", "acc_plus"):
            assert scores[subtask][key]["mean"] == pytest.approx(official["acc"][subtask][key])
        assert scores[subtask]["score"]["mean"] == pytest.approx(official["task_score"][subtask])
        assert scores[subtask]["score"]["low"] < scores[subtask]["score"]["mean"] < scores[subtask]["score"]["high"]
        assert scores[subtask]["score"]["n"] == 40
    total = sum(official["task_score"].values())
    assert scores["hallucination"]["score"]["mean"] == pytest.approx(total) and set(scores) == {
        *task.subsets, "total", "hallucination"
    }  # fmt: skip
    assert summary["headline"]["mean"] == pytest.approx(total) and summary["headline"]["n"] == 160
    assert official["perception_total"] is None and official["error"] is None
    assert json.loads(to_json(summary)) == summary


def test_mme_totals_need_all_their_subtasks():
    task = Mme(mme_samples(3, SUBTASKS))
    summary = summarise_answers(task, [s.truth for s in task.samples], n_boot=50)
    means = {name: summary["scores"][name]["score"]["mean"] for name in task.totals}
    assert means == pytest.approx({"total": 2800, "perception": 2000, "cognition": 800, "hallucination": 800})
    assert summary["official"]["perception_total"] == pytest.approx(2000)
    assert summary["scores"]["cognition"]["score"]["n"] == 24
    extra = Mme(mme_samples(2, ("existence", "same_color")))
    summary = summarise_answers(extra, ["yes", "no"] * 4, n_boot=50)
    assert summary["official"]["not_in_mme"] == ["same_color"] and set(summary["official"]["acc"]) == {"existence"}
    assert summary["headline"]["mean"] == 400


@needs_fixtures
@pytest.mark.parametrize("convention", ["official", "lmms_eval"])
def test_mme_reference_cases(convention):
    """On every reference case, the task's own sums give what the official script gives."""
    checked = 0
    for case in json.loads((Path(FIXTURES) / "mme" / "cases.json").read_text(encoding="utf-8")):
        samples, answers = [], []
        for subtask, rows in case["rows"].items():
            for number, (image, question, truth, answer) in enumerate(rows):
                sample_id = f"{subtask}-{number}"
                samples.append(YesNoSample(sample_id, image, BLANK, question, truth.lower(), subtask))
                answers.append(answer)
        task = Mme(samples, convention)
        scores = summarise_answers(task, answers, n_boot=5)["scores"]
        expected = mme_scores({name: [tuple(row) for row in rows] for name, rows in case["rows"].items()}, convention)
        for subtask, acc in expected["acc"].items():
            found = {key: scores[subtask][key]["mean"] for key in acc}
            assert found == pytest.approx(acc)
            other = np.mean([word == "other" for word in expected["parsed"][subtask]])
            assert scores[subtask]["unknown"]["mean"] == pytest.approx(other)
            checked += 1
    assert checked


@needs_fixtures
@pytest.mark.parametrize("convention", POPE_CONVENTIONS)
def test_pope_reference_cases(convention):
    cases = json.loads((Path(FIXTURES) / "pope" / "cases.json").read_text(encoding="utf-8"))
    for case in cases:
        samples = [YesNoSample(str(i), str(i // 2), BLANK, "?", label, "random")
                   for i, label in enumerate(case["labels"])]  # fmt: skip
        found = summarise_answers(Pope(samples, convention), case["answers"], n_boot=5)
        expected = pope_scores(case["answers"], case["labels"], convention)
        for metric in ("accuracy", "f1", "yes_ratio"):
            if not math.isnan(expected[metric]):
                assert found["scores"]["random"][metric]["mean"] == pytest.approx(expected[metric])
    assert cases


# --- answers that say neither ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "said", "unknown"),
    [
        ("pope", ["yes", "yes", "no", "yes", "yes", "no"], [1, 1, 0, 0, 1, 0]),
        ("lmms_eval", ["unknown", "unknown", "unknown", "unknown", "unknown", "no"], [1, 1, 1, 1, 1, 0]),
        ("vlmevalkit", ["unknown", "unknown", "unknown", "yes", "no", "no"], [1, 1, 1, 0, 0, 0]),
    ],
)
def test_pope_counts_what_says_neither(convention, said, unknown):
    """"It is. No": POPE's script stops at the full stop and takes what is left for yes."""
    texts = ["", "a fish", "I see no fish, or yes", "yes, a fish", "It is. No", "no"]
    if convention == "pope":
        texts[2] = "There is not a fish"
    samples = pope_samples(3, ("random",))
    task = Pope(samples, convention)
    rows = task.rows(texts)
    assert [row["said"] for row in rows] == said and [row["unknown"] for row in rows] == [bool(u) for u in unknown]
    summary = summarise_answers(task, texts, n_boot=20)
    assert summary["unknown"] == sum(unknown) and summary["scores"]["random"]["unknown"]["n"] == 6
    assert summary["scores"]["random"]["unknown"]["mean"] == pytest.approx(np.mean(unknown))
    right = np.mean([a == s.truth for a, s in zip(said, samples, strict=True)])
    assert summary["scores"]["random"]["accuracy"]["mean"] == pytest.approx(right)


def test_nothing_readable_is_reported_not_hidden():
    task = Mme(mme_samples(2, ("count",)))
    summary = summarise_answers(task, ["perhaps"] * 4, n_boot=20)
    assert summary["unknown"] == 4 and summary["headline"]["mean"] == 0
    assert "count" in summary["official"]["error"] and summary["official"]["task_score"] == {}
    task = Pope(pope_samples(3), "lmms_eval")
    summary = summarise_answers(task, ["perhaps"] * len(task.samples), n_boot=20)
    assert summary["headline"]["mean"] == 0 and summary["scores"]["mean"]["unknown"]["mean"] == 1
    assert summary["scores"]["random"]["precision"]["mean"] is None
    never = summarise_answers(Pope(pope_samples(3)), ["no"] * 18, n_boot=20)
    assert "ZeroDivisionError" in never["official"]["random"]["error"]
    assert never["official"]["random"]["f1"] is None and never["headline"]["mean"] == 0
    to_json(never)


# --- differences -------------------------------------------------------------------------------------------


def test_a_true_difference_shows_and_its_absence_too():
    task = Pope(pope_samples(150))
    plain = noisy(task, 0.80, seed=4)
    better = [s.truth if np.random.default_rng((5, i)).random() < 0.4 else a
              for i, (s, a) in enumerate(zip(task.samples, plain, strict=True))]  # fmt: skip
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
    assert json.loads(to_json(found)) == found


def test_a_difference_is_the_paired_one_of_the_statistics_module():
    task = Pope(pope_samples(30, ("popular",)))
    a, b = noisy(task, 0.9, 1), noisy(task, 0.8, 2)
    labels, groups = [s.truth for s in task.samples], [s.image_id for s in task.samples]
    counts = [pope_counts(x, labels) for x in (a, b)]
    direct = paired_difference(*counts, f1_statistic, 300, 9, groups).as_dict()
    size = minimum_detectable_difference(*counts, f1_statistic, 300, 9, groups)
    found = compare_answers(task, a, b, 300, 9)["scores"]["popular"]["f1"]
    assert found == pytest.approx(direct | {"detectable": size})


def test_several_answer_sets_are_averaged():
    task = Mme(mme_samples(30))
    plain, draws = noisy(task, 0.9, 0), [noisy(task, 0.8, seed) for seed in (1, 2, 3)]
    found = compare_answers(task, plain, draws, n_boot=300)
    each = [summarise_answers(task, draw, n_boot=5)["headline"]["mean"] for draw in draws]
    plain_score = summarise_answers(task, plain, n_boot=5)["headline"]["mean"]
    assert found["headline"]["mean"] == pytest.approx(plain_score - np.mean(each)) and found["sets"] == [1, 3]
    mine = [i for i, s in enumerate(task.samples) if s.subset == "count"]
    right = [[each[i] == task.samples[i].truth for i in mine] for each in (plain, *draws)]
    gained = np.mean([now and not was for draw in right[1:] for now, was in zip(right[0], draw, strict=True)])
    lost = np.mean([was and not now for draw in right[1:] for now, was in zip(right[0], draw, strict=True)])
    assert gained > 0 and lost > 0
    assert found["changed"]["count"] == pytest.approx({"now_right": gained, "now_wrong": lost})
    narrow = found["headline"]["high"] - found["headline"]["low"]
    one = compare_answers(task, plain, draws[0], n_boot=300)["headline"]
    assert narrow < one["high"] - one["low"]


def test_equal_answers_detect_nothing():
    task = Pope(pope_samples(5))
    answers = noisy(task, 0.7, 0)
    same = compare_answers(task, answers, answers, n_boot=50)
    assert same["headline"] == {"mean": 0, "low": 0, "high": 0, "n": 30, "detectable": None}
    to_json(same)


# --- power -------------------------------------------------------------------------------------------------


def test_a_detectable_difference_is_found_that_often():
    """Simulated: the share of experiments whose interval leaves out 0 is the power asked for."""
    random = np.random.default_rng(0)
    n = 400
    size = minimum_detectable_difference(random.normal(0, 1, n), random.normal(0, 1, n), n_boot=2000)
    assert size == pytest.approx(2.80 * np.sqrt(2 / n), rel=0.12)
    differences = random.normal(size, np.sqrt(2), (2000, n))
    errors = differences.std(axis=1, ddof=1) / np.sqrt(n)
    assert np.mean(differences.mean(axis=1) > 1.96 * errors) == pytest.approx(0.8, abs=0.06)


def test_standard_errors():
    scores = np.random.default_rng(1).normal(size=(300, 2)) * (1, 3)
    expected = scores.std(axis=0) / np.sqrt(300)
    assert standard_error(scores, n_boot=4000) == pytest.approx(expected, rel=0.05)
    assert standard_error(scores[:, 0], n_boot=4000) == pytest.approx(expected[0], rel=0.05)
    groups = [i // 30 for i in range(300)]
    clustered = np.repeat(scores[:10, 0], 30)
    assert standard_error(clustered, groups=groups) > 4 * standard_error(clustered)
    assert math.isnan(standard_error([1.0, 2.0], lambda w, s: np.full(len(w), np.nan)))
    assert detectable(0.01, power=0.9) > detectable(0.01) == pytest.approx(0.028, abs=1e-4)
    assert math.isnan(detectable(0.0)) and np.isnan(detectable(np.array([0, np.nan]))).all()
    with pytest.raises(ParameterError, match="power"):
        detectable(0.1, power=1.0)
    with pytest.raises(DataError, match="paired"):
        minimum_detectable_difference([1.0, 2.0], [1.0])


# --- asking ------------------------------------------------------------------------------------------------


class Model:
    """Answers from the samples' truth; notes what it was asked."""

    def __init__(self, samples, stop_after=math.inf):
        self.truth = {(s.image_id, s.question): s.truth for s in samples}
        self.calls, self.stop_after = [], stop_after

    def __call__(self, image_id, image, questions):
        assert isinstance(image, Image.Image) and image.mode == "RGB"
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((image_id, image.getpixel((0, 0)), tuple(questions)))
        return [self.truth[image_id, question] for question in questions]


def test_each_image_is_asked_once_about_everything():
    samples = pope_samples(5)
    model = Model(samples)
    answers = run_questions(Pope(samples), model, progress=False)
    assert answers == [s.truth for s in samples]
    assert [call[0] for call in model.calls] == [f"im{i}" for i in range(5)]
    assert [call[1] for call in model.calls] == [(i, 0, 0) for i in range(5)]
    asked = ("is there a fish ?", "is there a random ?", "is there a popular ?", "is there a adversarial ?")
    assert {call[2] for call in model.calls} == {asked}  # the positive once, not once per split
    rows = Pope(samples).rows(answers)
    assert all(row["right"] for row in rows) and Counter(row["subset"] for row in rows) == dict.fromkeys(SPLITS, 10)
    assert rows[1] == {"id": "random-0-no", "image": "im0", "subset": "random", "question": "is there a random ?",
                       "truth": "no", "answer": "no", "said": "no", "right": True, "unknown": False}  # fmt: skip


def test_a_stopped_run_goes_on(tmp_path):
    def parts(model="m"):
        return Parts(tmp_path, modules=("errors.py",), model=model)  # hashing all of the code takes long

    samples = pope_samples(10)
    task = Pope(samples)
    expected = run_questions(task, Model(samples), progress=False, chunk=3)
    stopped = Model(samples, stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        run_questions(task, stopped, parts(), progress=False, chunk=3)
    rest = Model(samples)
    found = run_questions(task, rest, parts(), progress=False, chunk=3)
    assert found == expected and [call[0] for call in rest.calls] == [f"im{i}" for i in range(6, 10)]
    again = Model(samples, stop_after=0)
    assert run_questions(task, again, parts(), progress=False, chunk=3) == expected
    convention = Pope(samples, "lmms_eval")  # the same answers, read another way
    assert run_questions(convention, again, parts(), progress=False, chunk=3) == expected
    for fresh in (  # nothing of another condition, model or question is taken for this one
        lambda m: run_questions(task, m, parts(), "blocked", progress=False, chunk=3),
        lambda m: run_questions(task, m, parts("n"), progress=False, chunk=3),
        lambda m: run_questions(Pope(m.samples), m, parts(), progress=False, chunk=3),
    ):
        other = [replace(s, question="please " + s.question) for s in samples]
        model = Model(samples + other)
        model.samples = other
        fresh(model)
        assert len(model.calls) == 10


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda questions: ["yes"], "image 'im0': 4 questions, found 1 answers"),
        (lambda questions: "yes!", "image 'im0': 4 questions, found 4 answers"),
        (lambda questions: [None] * 4, "image 'im0': an answer must be text, found NoneType"),
    ],
)
def test_unusable_replies_name_the_image(reply, message):
    with pytest.raises(DataError, match=message):
        run_questions(Pope(pope_samples(2)), lambda _id, _image, questions: reply(questions), progress=False)


def test_unusable_calls():
    samples = pope_samples(2)
    for call, message in (
        (lambda: Pope([]), "no questions"),
        (lambda: Pope(samples + samples[:1]), "two questions have the id 'random-0-yes'"),
        (lambda: Pope([replace(samples[0], truth="Yes")]), "must be yes or no, found 'Yes'"),
        (lambda: Pope([samples[0], replace(samples[1], picture=Image.new("RGB", (5, 5)))]), "two images have"),
        (lambda: Mme(mme_samples(2)[:3]), "image 'im1' has 1 questions, not two"),
        (lambda: summarise_answers(Pope(samples), ["yes"]), "1 answers for 12 questions"),
        (lambda: summarise_answers(Pope(samples), "yes no yes n"), "12 answers for 12"),
        (lambda: Pope(samples).rows([1] * 12), "the answer to 'random-0-yes' must be text, found int"),
        (lambda: compare_answers(Pope(samples), ["yes"] * 12, [["yes"] * 12, ["no"]]), "1 answers for 12"),
        (lambda: compare_answers(Pope(samples), ["yes"] * 12, []), "0 answers for 12"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(ParameterError, match="scored by official or lmms_eval, found 'pope'"):
        Mme(mme_samples(2), "pope")
    for options, message in (({"chunk": 0}, "chunk"), ({"condition": ""}, "condition")):
        with pytest.raises(ParameterError, match=message):
            run_questions(Pope(samples), Model(samples), progress=False, **options)
