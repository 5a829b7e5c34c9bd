"""Notebook 04: prefixes of equal length, what is read behind them, and effects that are known beforehand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import score_table

from kvutils.checkpoints import FAMILIES
from kvutils.datasets import class_names, open_dataset
from kvutils.datasets.refcoco import CATEGORIES
from kvutils.datasets.samples import DomainImage, YesNoSample
from kvutils.errors import DataError, ParameterError
from kvutils.images import encode_image
from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import resample
from kvutils.models import load_mlm
from kvutils.probes import fit_linear_probe
from kvutils.prompts import tokenize
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.maps import to_grid
from kvutils.run.items import derive, write_items
from kvutils.run.judged import load_claims
from kvutils.run.verdicts import word_of
from kvutils.store import Frame, Parts, to_json
from kvutils.tasks import prefix_answers
from kvutils.tasks.base import ScoreTable
from kvutils.tasks.prefix import NOWHERE, moved, prefix_picture, run_prefixes, with_controls
from kvutils.tasks.prefix_answers import ABSENT, NAMED
from kvutils.tasks.prefix_effects import DOMAIN_SMALLEST, REFERRING_SMALLEST, claim_c7a, claim_c7b, claim_x3, results, summarise_prefixes
from kvutils.tasks.prefix_readouts import FEWER, MOVED, DomainPrefix, ReferringPrefix
from kvutils.tasks.prefixes import CONDITIONS, PrefixWriter
from kvutils.tasks.text_segmentation import ReferringSegmentation


@pytest.fixture(scope="module")
def mlm():
    return load_mlm("pocket", untrained=True, seed=3)


@pytest.fixture(scope="module")
def control():
    return load_mlm("pocket", untrained=True, seed=4)


@pytest.fixture(scope="module")
def writer(mlm):
    return PrefixWriter(mlm, "pocket")


class Letters(PrefixWriter):
    """A tokenizer that cuts words into pieces of three letters, as byte-pair tokenizers cut rare ones."""

    def tokens(self, prefix):
        return sum(-(-len(word) // 3) for word in (prefix or "").split())


@pytest.mark.parametrize("letters", [False, True])
def test_all_controls_have_the_tokens_of_the_correct_prefix(writer, letters):
    writer = Letters(writer.mlm, "paper") if letters else writer
    form = writer.wording.class_name.format
    wrong = [form(name) for name in ("tree", "house", "car")]
    for seed in range(20):
        found = writer.write(form("fish"), wrong, seed)
        assert list(found) == list(CONDITIONS) and found["none"] is None and found["correct"] == form("fish")
        assert {writer.tokens(found[name]) for name in CONDITIONS[1:]} == {writer.tokens(form("fish"))}
        assert found["wrong"] in wrong and len(set(found.values())) == len(CONDITIONS)
        assert sorted(found["reversed"].split()) == sorted(form("fish").split()) != found["reversed"].split()
        assert len(set(found["filler"].split())) == 1
        assert "fish" not in found["random"] + found["unrelated"]
    assert writer.write(form("fish"), wrong, 0) == writer.write(form("fish"), wrong, 0)
    assert len({writer.write(form("fish"), wrong, seed)["random"] for seed in range(20)}) > 10


def test_a_prefix_without_controls_of_its_length_has_none(writer):
    assert writer.write("look for the fish", ["look for the car"], 0)["reversed"] == "fish the for look"
    assert writer.write("look for the fish", ["look for the red car"], 0) is None
    assert writer.write("look for the fish", ["look for the fish"], 0) is None  # the correct one is no control


@pytest.mark.parametrize("family", FAMILIES)
def test_controls_under_the_published_tokenizers(published, family):
    """Every class name of COCO, domain and sentence has all controls, in as many tokens of the whole prompt; what has none is named."""
    writer = PrefixWriter(published(family), "paper")
    texts = {
        "class_name": list(CATEGORIES.values()),
        "domain": ["night highway", "day highway"],
        "expression": ["left cat", "the cat on the left", "very first one on the left.", "man, #13", "remote in the middle", "cat in the middle",
                       "guy's 2 cups", "right cat", "the cup on the right", "very last one on the right"],
    }  # fmt: skip
    for kind, names in texts.items():
        correct = [writer.correct(kind, name) for name in names]
        for seed, each in enumerate(correct):
            found = writer.write(each, correct, seed)
            if found is not None:
                ids = {c: tokenize(writer.mlm, writer.mlm.prompt("what?", found[c])) for c in CONDITIONS[1:]}
                assert {i.index(writer.mlm.image_token_id) for i in ids.values()} == {writer.tokens(each)}, found
                assert len(set(map(len, ids.values()))) == 1 and len(set(found.values())) == len(CONDITIONS)
                assert found["reversed"].split() == each.split()[::-1] and found["wrong"] in correct
    assert not writer.unmatched
    assert writer.write(correct[0], [], 0) is None and writer.unmatched[correct[0]] == ["wrong"]


def test_bad_prefixes_are_errors(writer, mlm):
    for correct, message in (("fish", "two words"), ("look for the señor", "does not know")):
        with pytest.raises(ParameterError, match=message):
            writer.write(correct, ["look for the car"], 0)
    with pytest.raises(ParameterError, match="pocket, paper"):
        PrefixWriter(mlm, "coffee")
    # The model knows every word of its own:
    for text in (*writer.wording.words, *writer.wording.sentences, writer.wording.filler):
        assert writer.tokens(text) > writer.tokens(None)


def test_domain_scenes_are_of_their_domains_and_disjoint():
    scored = open_dataset("pocket-bdd-10k", scenes=12)
    train = open_dataset("pocket-bdd-10k-train", scenes=6)
    assert {one.domain for one in scored} == {"night", "fog"} and len(scored) == 12 and len(train) == 6
    assert scored[0].mask.shape == (96, 96) and not {one.id for one in scored} & {one.id for one in train}
    dark, light = ([np.asarray(one.image).mean() for one in scored if one.domain == name] for name in ("night", "fog"))
    assert max(dark) < min(light)
    with pytest.raises(ParameterError, match="unknown domain 'rain'"):
        open_dataset("pocket-bdd-10k", domains=["rain"])


@pytest.fixture(scope="module")
def domain_readouts(mlm, control, writer):
    extractor = FeatureExtractor(mlm, control, layers=[0, 5], keys=False)
    scored, train = open_dataset("pocket-bdd-10k", scenes=6), open_dataset("pocket-bdd-10k-train", scenes=30)
    names = class_names("pocket-bdd-10k-train")
    return {r: DomainPrefix(scored, train, names, extractor, writer, r) for r in ("text", "probe")}


@pytest.mark.parametrize("readout", ["text", "probe"])
def test_domain_readouts_run_and_resume_with_the_same_bytes(domain_readouts, readout, tmp_path):
    readouts, parts = domain_readouts, Parts(tmp_path, model="m")
    table = run_prefixes(readouts[readout], parts, progress=False, chunk=4)
    assert table.sources[:3] == ["none.0", "none.5", "correct.0"] and len(table) == 6 and not table.skipped
    sorted(parts.folder.rglob("*.safetensors"))[-1].unlink()
    assert to_json(vars(run_prefixes(readouts[readout], parts, progress=False, chunk=4))) == to_json(vars(table))
    # Values of layer 0 cannot move, later ones do; without prefix nothing does.
    assert {source.partition(".")[0] for source in table.sources} == {*FEWER} | ({*CONDITIONS, "untrained"} if readout == "text" else set())
    moves = {source: table.of(source)[:, -2:] for source in table.sources}
    assert (moves["correct.0"] == 0).all() and (moves["none.5"] == 0).all() and (moves["correct.5"] > 0).all()
    # Every scored pixel is counted once: true and said pixels of all classes are equally many.
    k = (len(table.columns) - len(MOVED)) // 3
    _, true, said = (table.of("wrong.5")[:, i * k : (i + 1) * k].sum(1) for i in range(3))
    assert (true == said).all() and (true > 0).all()


def test_a_layer_without_a_probe_and_a_damaged_picture_are_left_out_and_named(mlm, writer, monkeypatch):
    scenes, train = open_dataset("pocket-bdd-10k", scenes=6), open_dataset("pocket-bdd-10k-train", scenes=30)

    def damaged():
        raise DataError("street.png is no picture")

    def second_layer_fails(*args, **options):
        probe = fit_linear_probe(*args, **options)
        probe.converged[1] = False
        return probe

    monkeypatch.setattr("kvutils.tasks.prefix_readouts.fit_linear_probe", second_layer_fails)
    extractor = FeatureExtractor(mlm, layers=[0, 5], keys=False)
    scenes = [DomainImage("bad", damaged, scenes[0].mask, domain="fog"), *scenes]
    table = run_prefixes(DomainPrefix(scenes, train, class_names("pocket-bdd-10k-train"), extractor, writer, "probe"), progress=False)
    assert len(table) == 6 and table.skipped == {"bad": "bad: street.png is no picture"} and np.isfinite(table.values).all()
    assert table.sources == [f"{c}.0" for c in FEWER] and table.left_out == {f"{c}.5": 6 for c in FEWER}


def test_the_vision_tower_sees_a_picture_once_behind_all_prefixes(mlm, control, writer):
    sample = list({one.domain: one for one in open_dataset("pocket-bdd-10k", scenes=6)}.values())
    extractor, seen = FeatureExtractor(mlm, control, layers=[0, 5], keys=False), []
    readout = DomainPrefix(sample, [], class_names("pocket-bdd-10k-train"), extractor, writer, "text")
    with mlm.model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1)):
        table = run_prefixes(readout, progress=False)
    assert len(table) == 2 == len(seen)
    assert np.abs(table.of("untrained.5") - table.of("none.5")).max() > 0  # the values of another model
    again = extractor.images([(sample[0].id, sample[0].image)], readout.prefixes(sample[0])["wrong"], ["value.5"])[0]
    apart = FeatureExtractor(mlm, keys=False).images([(sample[0].id, sample[0].image)], readout.prefixes(sample[0])["wrong"])[0]
    assert torch.equal(again.features["value.5"], apart.features["value.5"])


def test_referring_readout_scores_the_planted_thing(mlm, control, writer, monkeypatch):
    """Values that hold their expression where the mask is: the score is that of a perfect map, whatever the prefix."""
    samples = open_dataset("pocket-refcoco", scenes=6)
    extractor = FeatureExtractor(mlm, control, layers=[1, 4], keys=False)
    readout = ReferringPrefix(samples, extractor, writer, "class_name")
    number = next(i for i, one in enumerate(samples) if readout.prefixes(one))  # an image may show every class
    sample = samples[number]
    (image,) = extractor.images([(sample.image_id, sample.image)])
    labels = torch.from_numpy(image.layout.token_labels(sample.mask)[0]).float()
    vector = extractor.alignment.text(sample.text)["value.1"]
    planted = torch.stack([labels[:, None] * vector, torch.zeros(len(labels), len(vector))])
    right, empty = readout.score(sample, sample.mask, planted, image, "none")
    assert right[3] > 0.6 and right[0] > 0.9 > empty[0]
    with pytest.raises(DataError, match="mask is empty"):  # of one sample, which is left out; NaN would leave out every layer
        readout.score(sample, np.zeros_like(sample.mask), planted, image, "none")
    for family, source in (("uncentred.random", "uncentred.value.4"), ("untrained", "untrained.value.4")):  # by texts of their own
        assert torch.equal(readout.texts([sample.text], family)[1, 0], extractor.alignment.text(sample.text)[source])
    prefixes = readout.prefixes(sample)
    assert with_controls(readout) == number and prefixes["correct"] == f"look for the {sample.class_name}"
    shown = {one.class_name for one in samples if one.image_id == sample.image_id}
    assert prefixes["wrong"].split()[-1] not in shown
    table = score_table(readout.name, dict.fromkeys((f"{family}.4" for family in FEWER), 0.2), readout.columns, len(samples))
    table.ids[:], table.values[:] = [one.id for one in samples], 0.2
    table.values[number], table.values[number + 1, 1] = 0.5, 0.8  # another is found better, but only behind the correct prefix
    picture = prefix_picture(readout, table, 4)
    expected = image.features["value.4"].float() @ extractor.alignment.text(sample.text)["value.4"]
    assert picture["text"] == sample.text and len(picture["maps"]) == 4
    assert np.allclose(picture["maps"]["none"], to_grid(image.layout, expected.numpy()), atol=1e-3)
    monkeypatch.setattr(readout, "prefixes", lambda sample: None)
    for refused in (run_prefixes, with_controls):
        with pytest.raises(DataError, match="none of"):
            refused(readout)


def test_distance_moved_is_relative_and_weighted():
    plain = torch.ones(1, 4, 2)
    values = plain.clone()
    values[0, 0] *= 2  # moved by its own length
    values[0, 3] *= 1.5
    assert moved(values, plain, np.array([1.0, 1.0, 0.0, 0.0])) == [(pytest.approx(0.5), pytest.approx(0.25))]
    assert moved(values, plain, np.ones(4)) == [(pytest.approx(0.375), NOWHERE)]  # an image without background
    assert moved(values, plain, np.array([0.5, 0.0, 0.0, 0.0])) == [(pytest.approx(1.0), pytest.approx(1.0 / 3.5))]


COLUMNS = ("ap", "intersection", "union", "iou", "box", *MOVED)


def table_of(effects: dict[str, float], n: int = 80, floor: float = 0.2, own: float = 0.01):
    """IoU of 0.5 in layer 2, 0.4 in layer 1, 0.9 in layer 0; a condition adds its effect in layers 1 and 2. Uncentred half as much;
    the untrained model has `floor`."""
    level, reached = {0: 0.9, 1: 0.4, 2: 0.5}, (1, 2)
    levels = {f"{c}.{layer}": level[layer] + (layer in reached) * effects.get(c, 0.0) for c in CONDITIONS for layer in level}
    levels |= {f"uncentred.{c}.{layer}": (level[layer] + (layer in reached) * effects.get(c, 0.0)) / 2
               for c in ("none", "correct", "random") for layer in level}  # fmt: skip
    levels |= {f"untrained.{layer}": floor for layer in level}
    table = score_table("referring_by_class_name", levels, COLUMNS, n, column=3, shared=0.15, own=own)
    table.values[..., 5:] = -1
    table.values[:, : len(level) * len(CONDITIONS), 5:] = (0.2, 0.1)
    return table


def statistic(weights, values):
    return weights @ values[:, 3] / weights.sum(1)


def test_effects_are_the_planted_ones_in_a_layer_that_a_prefix_reaches():
    table = table_of({"correct": 0.04, "wrong": -0.02, "filler": 0.01})
    found = summarise_prefixes(table, statistic, 300)
    best = found["best"]
    assert found["best_layer"] == 2 and best["layers"] == [2, 2]
    for condition, wanted in {"none": 0.04, "wrong": 0.06, "random": 0.04, "filler": 0.03}.items():
        one = best["correct_minus"][condition]
        assert one["mean"] == pytest.approx(wanted, abs=0.01) and one["n"] == 80 and one["units"] == 40  # every sample reports
        assert one["high"] - one["low"] < 0.02  # paired: what items differ by does not matter
        assert 0 < one["error"] < 0.005
    assert best["random_minus_none"]["mean"] == pytest.approx(0, abs=0.01) and best["above_untrained"]["mean"] == pytest.approx(0.3, abs=0.01)
    assert found["added"]["wrong"][1]["mean"] == pytest.approx(-0.02, abs=0.01)
    assert found["uncentred"]["best"]["correct_minus"]["none"]["mean"] == pytest.approx(0.02, abs=0.01)
    assert "uncentred" not in found["uncentred"] and "moved" not in found["uncentred"]
    for part, distance in (("objects", 0.2), ("background", 0.1)):
        assert found["moved"][part]["correct"][0]["mean"] == pytest.approx(distance)
        assert found["moved"][part]["correct"][0]["n"] == 80
    table.values[:, :, 6] = -1  # no image has a background
    assert summarise_prefixes(table, statistic, 30)["moved"]["background"]["filler"][1]["mean"] is None


def test_the_untrained_model_is_read_in_its_own_best_layer():
    """The first included: where its layers scatter, the best of the trained ones would be ahead of any fixed one."""
    table = table_of({})
    for layer, level in ((0, 0.45), (1, 0.1), (2, 0.15)):
        place = table.sources.index(f"untrained.{layer}")
        table.values[:, place, 3] += level - 0.2
    found = summarise_prefixes(table, statistic, 300)["best"]["above_untrained"]
    assert found["mean"] == pytest.approx(0.05, abs=0.01)


def test_layers_are_chosen_without_a_prefix_on_the_other_half_and_all_samples_are_read():
    """One half is best in layer 1, the other in layer 2: each is read where the other is best, whatever prefixes do there."""
    table = table_of({"correct": 0.04})
    halves, sources = Halves.of(table.groups, 0), table.sources
    for half, (high, low) in ((halves.second, (1, 2)), (~halves.second, (2, 1))):
        for c in ("none", "correct"):
            table.values[half, sources.index(f"{c}.{high}"), 3] += 1
            table.values[half, sources.index(f"{c}.{low}"), 3] -= 0.2
    table.values[:, sources.index("correct.1"), 3] += 0.5  # would change the choice, if it were made on this
    best = summarise_prefixes(table, statistic, 300)["best"]
    assert best["layers"] == [1, 2]
    read = [np.where(halves.second, table.of(f"{c}.2")[:, 3], table.of(f"{c}.1")[:, 3]) for c in ("correct", "none")]
    stays = resample(lambda w: w @ (read[0] - read[1]) / w.sum(1), len(table), 300, 0, table.groups, around=True)  # no resample chooses another
    assert best["correct_minus"]["none"] == pytest.approx(stays.effects().as_dict())


def test_where_layers_hardly_differ_the_choice_is_part_of_the_interval():
    table = table_of({}, own=0.05)
    table.values[:, [name.endswith(".2") for name in table.sources], 3] -= 0.1
    best = summarise_prefixes(table, statistic, 300)["best"]
    halves = Halves.of(table.groups, 0)
    read = [np.where(halves.second, *(table.of(f"{c}.{layer}")[:, 3] for layer in reversed(best["layers"]))) for c in ("correct", "none")]
    stays = resample(lambda w: w @ (read[0] - read[1]) / w.sum(1), len(table), 300, 0, table.groups, around=True).effects()
    assert best["correct_minus"]["none"]["mean"] == pytest.approx(stays.mean) and best["correct_minus"]["none"]["error"] > 1.1 * stays.error


@pytest.mark.parametrize("change, why", [
    (dict(n=6), "3 images are too few to choose a layer"), (dict(floor=0.2), "only the first layer")])  # fmt: skip
def test_claims_that_cannot_be_measured_say_why(verdict, change, why):
    table = table_of({}, **change)
    if "floor" in change:
        kept = [i for i, source in enumerate(table.sources) if source.endswith(".0")]
        table = replace(table, sources=[table.sources[i] for i in kept], values=table.values[:, kept])
    found = summarise_prefixes(table, statistic, 20)
    assert found["best"]["layers"] == [] and found["best_layer"] in found["layers"] and found["scores"]["none"][0]["mean"] is not None
    for name, claim in (("C7a", claim_c7a), ("C7b", claim_c7b), ("X3", claim_x3)):
        for summaries, reason in (({"referring_by_class_name": found, "domain_by_text": found}, why), ({}, "left out")):
            claimed = claim(summaries)
            assert verdict(name, claimed) == "not measured" and reason in claimed["primary"]["reason"]
            assert claimed["prerequisites"] == [] and all(each["value"] is None and each["reason"] for each in claimed["others"])


@pytest.mark.parametrize("effects, floor, c7a, c7b, x3", [
    ({"correct": 0.04}, 0.2, "present", "present", "holds"),
    # Better than no prefix, but so is every control: the token count does it.
    ({name: 0.04 for name in CONDITIONS[1:]}, 0.2, "present", "present", "does not hold"),
    ({"correct": -0.04}, 0.2, "opposite", "opposite", "opposite"),
    ({"correct": 0.04, "reversed": 0.04}, 0.2, "present", "present", "holds"),
    ({}, 0.2, "absent", "absent", "does not hold"),
    # At 0.5 the untrained model reads as well: nothing can be improved.
    ({"correct": 0.04}, 0.6, "cannot appear here", "cannot appear here", "cannot appear here")])  # fmt: skip
def test_verdicts(verdict, effects, floor, c7a, c7b, x3):
    found = summarise_prefixes(table_of(effects, n=100, floor=floor, own=0.001), statistic, 300)
    summaries = dict.fromkeys(("referring_by_class_name", "referring_by_expression", "domain_by_text", "domain_by_probe"), found)
    claims = claim_c7a(summaries), claim_c7b(summaries), claim_x3(summaries)
    assert tuple(verdict(name, claim) for name, claim in zip(("C7a", "C7b", "X3"), claims, strict=True)) == (c7a, c7b, x3)
    first, _, third = claims
    assert first["primary"]["value"] == pytest.approx(100 * effects.get("correct", 0), abs=0.1)  # points
    (random,) = (each for each in first["others"] if "random minus none (expected: absent)" in each["name"])
    assert word_of(random, 0.3) == ("present" if effects.get("random") else "absent")
    assert ["uncentred" in each["name"] for each in first["others"]].count(True) == 1
    assert f"mIoU of {100 * found['best']['scores']['none']['mean']:.1f} (none), " in first["note"] and "in layer 2." in first["note"]
    assert [each.get("smallest") for each in third["others"]] == [None] * 3 + [DOMAIN_SMALLEST] * 4
    assert {"C7a": REFERRING_SMALLEST, "C7b": DOMAIN_SMALLEST}.items() <= {claim["id"]: claim["smallest"] for claim in load_claims()}.items()


def questions(images: int = 6) -> list[YesNoSample]:
    picture, asked = Image.new("RGB", (32, 32)), (("fish", "yes"), ("car", "no"))
    return [YesNoSample(f"{i}-{subset}-{name}", f"image{i}", picture, f"is there a {name} ?", truth, subset)
            for i in range(images) for subset in ("random", "popular") for name, truth in asked]  # fmt: skip


def test_answers_that_follow_the_prefix_are_counted(writer, mlm, monkeypatch, tmp_path):
    """A model that says yes to what its prefix names, and otherwise the truth."""

    def fake(mlm, rows, options, prefix=None, batch_size=16):
        for name, _, texts in rows:
            said = ["yes" if "fish" in text or (prefix or "").endswith(text.split()[-2]) else "no" for text in texts]
            yield name, {"none": [SimpleNamespace(text=each, mass=0.75) for each in said]}

    monkeypatch.setattr(prefix_answers, "answer_all", fake)
    parts = Parts(tmp_path, model="m")
    table = prefix_answers.ask_behind_prefixes(questions(), mlm, writer, parts, progress=False)
    assert table["truth"] == ["yes", "no"] * 6 and table["answer: wrong"] == ["yes", "yes"] * 6  # each wording once per image
    assert prefix_answers.counts(table).of("wrong").tolist() == [[1, 2, 1, 1, 0, 2, 1, 1, 1.5]] * 6
    # "teddy bear" names no bear: what is asked of a bear behind it is about neither prefix.
    words = {"question": ["is there a bear ?", "is there a teddy bear ?"] * 6, "prefix: wrong": ["look for the teddy bear"] * 12}
    assert prefix_answers.counts(replace(table, columns={**table.columns, **words})).values[:, 0, 7].tolist() == [1] * 6
    found = prefix_answers.summarise_prefix_answers(table, 50)
    assert found["images"] == 6 and found["questions"] == 12
    assert found["rates"]["accuracy"]["none"]["mean"] == 1 and found["rates"]["changed answers"]["correct"]["mean"] == 0
    for rate, minus in {"accuracy": -0.5, NAMED: 0, ABSENT: -1, "share of yes": 0.5}.items():
        assert found["minus_none"][rate]["wrong"]["mean"] == -found["correct_minus"][rate]["wrong"]["mean"] == minus
    assert found["option_mass"]["filler"]["mean"] == 0.75 and found["warnings"] == []
    monkeypatch.setattr(prefix_answers, "answer_all", None)  # all is stored
    again = prefix_answers.ask_behind_prefixes(questions(), mlm, writer, parts, progress=False)
    assert {name: list(each) for name, each in again.columns.items()} == {name: list(each) for name, each in table.columns.items()}


def test_questions_of_another_form_are_errors(writer, mlm):
    assert prefix_answers.object_of("Is there a dining table in the image?") == "dining table"
    assert prefix_answers.object_of("is there an owl ?") == "owl"
    with pytest.raises(DataError, match="What is this"):
        prefix_answers.object_of("What is this?")
    only_yes = [sample for sample in questions() if sample.truth == "yes"]
    with pytest.raises(DataError, match="present and an absent"):
        prefix_answers.ask_behind_prefixes(only_yes, mlm, writer, progress=False)


def answers(images: int = 8) -> Frame:
    """The named object is missed in every second image without a prefix, and found behind the correct one; the wrong one misleads in all."""
    rows = [(f"{i}-{truth}", f"image{i}", f"is there a {name} ?", truth) for i in range(images) for name, truth in (("fish", "yes"), ("car", "no"))]
    columns = dict(zip(("id", "image_id", "question", "truth"), map(list, zip(*rows, strict=True)), strict=True))
    columns |= {"prefix: correct": ["look for the fish"] * len(rows), "prefix: wrong": ["look for the car"] * len(rows)}
    for condition in CONDITIONS:
        seen = [condition == "correct" or i % 2 == 0 for i in range(images)]
        columns[f"answer: {condition}"] = sum(([["no", "yes"][see], "yes" if condition == "wrong" else "no"] for see in seen), [])
        columns[f"yes or no: {condition}"] = np.ones(len(rows))
    return Frame(columns, {"skipped": ["image9"]})


def test_results_and_figures_need_only_the_items(redraw, tmp_path):
    rng = np.random.default_rng(0)
    counts = np.repeat(rng.integers(1, 9, (40, 21, 6)), 1, axis=0).astype(float)
    domain = ScoreTable("domain_by_text", [f"{i}" for i in range(40)], [f"{i}" for i in range(40)],
                        [f"{c}.{layer}" for c in CONDITIONS for layer in range(3)],
                        [f"{part} {name}" for part in ("right", "true", "said") for name in ("road", "car")] + list(MOVED),
                        np.concatenate([counts, np.full((40, 21, 2), 0.1)], axis=2))  # fmt: skip
    measured = {"referring_by_class_name": table_of({"correct": 0.04}), "domain_by_text": domain, "answers": answers()}
    about = {"parameters": {"bootstrap": 30, "seed": 0, "profile": "pocket", "model": "pocket"}}
    write_items(tmp_path, "04_prefix", measured, about, {}, {})
    found = derive(tmp_path, "04_prefix")
    direct = results(measured, about)
    assert to_json({name: found[name] for name in direct}) == to_json(direct)
    assert "100.0 % instead of 50.0 % are right, +50.0 [" in found["finding"] and "0.0 % instead of 100.0 %, -100.0 [" in found["finding"]
    assert {len(row) for table in found["tables"] for row in [table["header"], *table["rows"]]} == {6, 8}
    grid, order = rng.random((4, 4)).tolist(), ["none", "correct", "wrong", "random"]
    picture = {"image": encode_image(Image.new("RGB", (32, 32), "teal")), "size": [32, 32], "text": "the fish", "layer": 2, "n": 9,
               "order": order, "maps": dict.fromkeys(order, grid), "ious": dict.fromkeys(order, 0.5),
               "prefixes": {"none": None, "correct": "look for the fish", "wrong": "the car", "random": "in of it"}}  # fmt: skip
    figures = redraw("04_prefix", found | {"picture": picture})
    assert list(figures) == ["04_prefix_effects", "04_layers", "04_maps"]
    left, _, right = figures["04_prefix_effects"].axes
    best = found["readouts"]["referring_by_class_name"]["best"]["correct_minus"]
    drawn = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "o"]
    assert drawn == pytest.approx([100 * best[c]["mean"] for c in CONDITIONS if c != "correct"])
    assert "better:\n+4." in left.get_title() and "better:\n+50.0" in right.get_title()


def test_nothing_that_an_image_is_known_to_show_is_a_wrong_name(mlm, writer):
    """Of things without an expression of their own, too: in prefixes, and in the control of notebook 01."""
    samples = open_dataset("pocket-refcoco", scenes=8)
    names = {one.class_name for one in samples}
    alone = samples[0].class_name
    known = [replace(one, shown=frozenset(names - {alone})) for one in samples]
    readout, task = ReferringPrefix(known, FeatureExtractor(mlm, keys=False), writer, "class_name"), ReferringSegmentation(known)
    apart = [one for one in known if alone not in {each.class_name for each in known if each.image_id == one.image_id}]
    found = [prefixes["wrong"] for one in apart if (prefixes := readout.prefixes(one))]
    assert apart and set(found) <= {writer.correct("class_name", alone)}
    assert {task._wrong[one.id] for one in apart} <= {one.text for one in known if one.class_name == alone}
