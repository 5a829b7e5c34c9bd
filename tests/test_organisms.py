"""The arms of the open questions: one ingredient each, written as the model is asked, and effects over seeds and items."""

import copy
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from recipe import effects, organisms, train
from recipe.arms import ARMS, BASE, QUESTIONS, USUAL, question_first
from recipe.families import FAMILIES
from recipe.measure import SEED, SIZES, lookups
from recipe.organism_plots import judged, sign
from recipe.packing import IMAGE, PAD, encode, pack
from recipe.pool import make_pool
from recipe.samples import PLAIN, Sample, crowd_sample, in_sentence
from scipy.stats import t as scipy_t

from kvutils.datasets.pocket import questions as q
from kvutils.errors import ParameterError
from kvutils.metrics.statistics import interval_text
from kvutils.run import notebook

FAMILY = FAMILIES["pocket"]


@pytest.fixture(scope="module")
def pool():
    return make_pool(300, seed=3, processes=1, quiet=True)


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_asked_as_it_was_trained(name, pool):
    """The packed prompt is that of the processor with the arm's chat template."""
    made, processor = ARMS[name].ingredients, FAMILY.processor()
    processor.chat_template = made.template()
    sample = Sample([(0, PLAIN)], [("colour", "what colour is the fish ?", "red")], "look carefully")
    content = [{"type": "text", "text": sample.prefix}, {"type": "image"}, {"type": "text", "text": sample.blocks[0][1]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    wanted = processor.tokenizer(text.replace("<image>", "<image>" * FAMILY.full.slots), add_special_tokens=False)["input_ids"]
    packed = pack([sample], made.written(FAMILY.full))
    found = [token for token in packed.tokens[0].tolist() if token != PAD]
    assert found == [*wanted, *encode("red")] and found.count(IMAGE) == FAMILY.full.slots
    changed = {key for key, value in vars(made).items() if value != getattr(USUAL, key)}
    assert (not changed) == (name in ("start", BASE)) and ARMS[name].against in ARMS


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.ingredients.shares != train.RECIPE.shares])
def test_the_shares_of_an_arm_can_be_drawn(name, pool):
    made, rng = ARMS[name].ingredients, np.random.default_rng(0)
    assert sum(made.shares["all"].values()) == pytest.approx(1)
    kinds = {b[0] for kind in made.shares["all"] for sample in made.sampler(pool, False).draw(kind, 20, rng) for b in sample.blocks}
    assert (kinds == {"existence"}) == name.startswith("narrow")


def test_a_crowd_is_asked_about_what_its_text_says():
    for number in range(30):
        sample = crowd_sample(np.random.default_rng(number))
        told = {tuple(words[1:3]) for thing in sample.prefix.split(" .")[0].split(" , ") if (words := thing.split())}  # ("red", "fish")
        assert 4 <= len(told) <= 7 and len({colour for colour, _ in told}) == len({cls for _, cls in told}) == len(told) and not sample.images
        asked = {(question.split()[3], answer) if kind == "class" else (answer, question.split()[4]) for kind, question, answer in sample.blocks}
        assert asked == told and len(sample.blocks) == 2 * len(told)


def test_biases_of_queries_and_keys_begin_where_an_arm_has_them():
    mlm, usual = FAMILY.build_mlm(), FAMILY.build_mlm()
    train.begin_biases(mlm, 1.0)
    drawn = {name: each for name, each in mlm.state_dict().items() if name.endswith(("q_proj.bias", "k_proj.bias")) and "language_model" in name}
    assert 0.95 < torch.cat([*drawn.values()]).std() < 1.05
    values = [each for name, each in mlm.state_dict().items() if name.endswith("v_proj.bias") and "language_model" in name]
    assert len(values) == 12 and not any(each.any() for each in [*values, *(usual.state_dict()[name] for name in drawn)])


def test_look_ups_in_texts_are_measured():
    mlm = FAMILY.build_mlm().eval()
    found = lookups(mlm, FAMILY.full, 12)
    assert {kind: len(each["right"]) for kind, each in found["accuracy"].items()} == {"class": 12, "colour": 12}
    for layer in mlm.model.language_model.layers:  # attention is even: each of the t tokens that the t-th sees gets 1 / t
        layer.self_attn.q_proj.weight.data.zero_()
    even = []
    for number in range(3):
        things = crowd_sample(np.random.default_rng((SEED, number))).prefix.split(" .")[0].split(" , ")
        for place, thing in enumerate(things):
            read = len(FAMILY.full.head) + len(encode(" , ".join([*things[:place], " ".join(thing.split()[:3])])))
            even.append(len(encode(thing.split()[1])) / read)
    bound = np.array(lookups(mlm, FAMILY.full, 12)["bound"])
    assert bound.shape == (12, 14) and np.allclose(bound, np.mean(even), atol=1e-6)
    with torch.no_grad():
        mlm.lm_head.weight.zero_()
        assert "1" not in lookups(mlm, FAMILY.full, 12)["accuracy"]["class"]["right"]  # says the first of the vocabulary


def test_an_arm_of_texts_begins_with_no_weights_that_are_shipped(monkeypatch):
    monkeypatch.setattr(organisms, "shipped", lambda: "theirs")
    assert organisms.begins(ARMS["lookups"]) == "" and organisms.begins(ARMS["text-first"]) == organisms.begins(ARMS["base"]) == "theirs"


@pytest.mark.parametrize("share", [0.0, 0.08, 0.45])
def test_questions_before_the_image_are_a_share_of_the_samples(share):
    sequences = {kind: each * train.SEQUENCES[kind] for kind, each in question_first(share).items()}
    assert sequences["first"] / sum(sequences.values()) == pytest.approx(share)


def test_answers_in_a_sentence_say_the_word(pool):
    wanted = {"what colour is the fish ?": ("red", "the fish is red"), "is there a car ?": ("no", "no , there is no car"),
              "what is the red thing ?": ("fish", "the red thing is a fish"), "are there more fishes than cars ?": ("yes", "yes")}
    assert all(in_sentence(("colour", question, word))[2] == answer for question, (word, answer) in wanted.items())
    plain, spoken = ([b for s in train.Ingredients(sentences=say).sampler(pool, False).draw("single", 40, np.random.default_rng(0)) for b in s.blocks]
                     for say in (False, True))  # fmt: skip
    assert all(word in answer.split() and (kind in q.KINDS or word == answer)
               for (kind, _, word), (*_, answer) in zip(plain, spoken, strict=True) if " " not in word)
    assert sum(a != b for a, b in zip(plain, spoken, strict=True)) > len(plain) / 3


def test_patches_are_fed_in_reverse_and_the_newline_stays(pool):
    mlm, features = FAMILY.build_mlm(), torch.randn(1, 144, 128)
    with torch.no_grad():
        usual, turned = (train.Ingredients(turned=each).embed(FAMILY, mlm, features) for each in (False, True))
    assert torch.allclose(turned[:, :-1].flip(1), usual[:, :-1], atol=1e-6) and torch.equal(turned[:, -1], usual[:, -1])


def _of_seeds(reading: effects.Reading, results: dict) -> tuple[float, float]:
    """Mean and standard error of the differences of the seeds."""
    each = [reading.each(results["narrow-0.2"][seed]) - reading.each(results["base"][seed]) for seed in results["narrow-0.2"]]
    return float(np.mean(each)), float(np.std(each, ddof=1) / np.sqrt(len(each)))


def test_effects_are_differences_over_seeds_and_items():
    rng = np.random.default_rng(0)

    def result(seed: int, share: float) -> dict:
        right = "".join("01"[int(each < share)] for each in rng.random(200))
        return {"accuracy": {"existence": {"scenes": [str(i // 2) for i in range(200)], "right": right}},
                "keys": {"norm": [[1.0], [2.0 + seed / 10]]}}  # fmt: skip

    results = {"base": {seed: result(seed, 0.5) for seed in (2, 3, 4)}, "narrow-0.2": {seed: result(seed, 0.9) for seed in (2, 3)}}
    accuracy = next(each for each in effects.READINGS["OQ1"] if each.name == "accuracy, existence")
    found = effects.effect_of(accuracy, results, "narrow-0.2", "base")
    each = [accuracy.each(results["narrow-0.2"][seed]) - accuracy.each(results["base"][seed]) for seed in (2, 3)]
    assert found.mean == pytest.approx(np.mean(each)) and 20 < found.low < found.mean < found.high and found.n == 400
    one = {name: {2: seeds[2]} for name, seeds in results.items()}
    assert np.isnan(effects.effect_of(accuracy, one, "narrow-0.2", "base").low)  # one seed says nothing about others
    for seed, shift in ((2, 0.3), (3, -0.3)):  # seeds that differ by more than their items let expect
        results["narrow-0.2"][seed] = result(seed, 0.6 + shift)
    wide, (low, high) = effects.effect_of(accuracy, results, "narrow-0.2", "base"), scipy_t.interval(0.95, 1, *_of_seeds(accuracy, results))
    assert wide.low == pytest.approx(low) and wide.high == pytest.approx(high)
    norm = next(each for each in effects.READINGS["OQ2"] if each.name == "norm of keys")
    higher = copy.deepcopy(results)
    for seed in (2, 3):
        higher["narrow-0.2"][seed]["keys"]["norm"][1] = [3.0 + seed / 10]
    assert effects.effect_of(norm, higher, "narrow-0.2", "base").mean == pytest.approx(1.0)
    assert effects.effect_of(accuracy, results, "medium-0", "base").n == 0
    assert {*effects.READINGS} == {*QUESTIONS} and "base (seed" not in " ".join(effects.missing(results)["OQ1"])
    assert "medium-0.9 (seed 2,3,4)" in effects.missing(results)["OQ2"]  # with which broad-0.9 is compared


def test_what_is_0_in_both_arms_has_no_interval():
    keys = {"keys": {"relative_variance": np.full((2, 1, 20), 0.5).tolist()}}
    found = effects.effects({name: {seed: keys for seed in (2, 3)} for name in ("base", "narrow-0.2")})["OQ2"]["narrow-0.2"]["readings"]
    near, varies = found["near-constant keys"], found["variance of the most constant 1 % of keys"]
    assert near["mean"] == 0 and interval_text(near) == "not defined: 0 in both" and judged({"narrow-0.2": {"readings": found}}) == []
    assert interval_text(varies) == "not defined: no item differs"


def test_levels_hold_what_arms_are_compared_with():
    keys = {"keys": {"norm": [[1.0], [2.0]]}}
    assert {*effects.levels({"broad-0.9": {2: keys}, "medium-0.9": {2: keys}})["OQ2"]["norm of keys"]} == {"broad-0.9", "medium-0.9"}


def test_what_is_not_trained_counts_with_every_seed(tmp_path):
    for name, seed, steps, share in (("start", 1, 0, 1), ("base", 2, 200, 1), ("base", 3, 40, 1), ("base", 4, 200, 2)):  # the last two: trials
        about = {"arm": name, "seed": seed, "steps": steps, "sizes": {key: each // share for key, each in SIZES.items()}}
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps({"about": about}))
    assert {name: [*seeds] for name, seeds in effects.load(tmp_path).items()} == {"start": [2, 3, 4], "base": [2]}
    assert organisms.result_file("start", 3, tmp_path).name == "start-0.json"


def test_results_count_for_the_weights_that_are_shipped(monkeypatch):
    options = Namespace(results=organisms.RESULTS, steps=None, sizes=SIZES)
    assert organisms.is_measured("start", 2, options) and organisms.is_measured("base", 2, options)
    assert not organisms.is_measured("base", 99, options)
    with pytest.raises(ParameterError, match="after 200 steps; .* or the weights that it began with"):
        organisms.is_measured("base", 2, Namespace(**vars(options) | {"steps": 40}))
    monkeypatch.setattr(organisms, "shipped", lambda: "others")
    with pytest.raises(ParameterError, match="start-0.json was measured after 0 steps"):
        organisms.is_measured("start", 2, options)


def test_readme_tells_the_effects_that_are_stored():
    results = effects.load(organisms.RESULTS)
    wanted = {("colour read from values", "narrow-0.9", "narrow-0.2"), ("style read from values", "narrow-0.9", "narrow-0.2"),
              ("colour read from the tower", "narrow-0", "narrow-0.2"), ("style read from values", "medium-0.9", "base"),
              ("style read from values", "narrow-0.9-distil", "narrow-0.9"), ("light read from values", "narrow-0.9", "narrow-0.2"),
              ("style read from values", "broad-0.9", "medium-0.9")}  # fmt: skip
    by_name, told = {each.name: each for each in effects.READINGS["OQ1"]}, " ".join((notebook.ROOT / "README.md").read_text().split())
    found = {question: judged(arms) for question, arms in effects.effects(results).items()}
    for differences in (found["OQ1"], sum(found.values(), [])):
        sure, chance = sum(sign(each) != 0 for each in differences), len(differences) / 20
        assert f"{sure} of {len(differences)} differences have an interval without 0, where {chance:.0f} would by chance" in told
    assert {name: len(seeds) for name, seeds in results.items()} == dict.fromkeys(ARMS, 3)

    def counted(arm: str, reading: int, keys: int) -> list[int]:
        return [round(effects.READINGS["OQ2"][reading].each(result) / 100 * keys) for result in results[arm].values()]

    few, some, many, read = (counted(arm, 0, 3168) for arm in ("adamw-10", "sentences", "nothing-12", "text-first"))
    assert f"weight decay ({min(few)} or {max(few)} of 3,168) and with answers in a sentence ({min(some)} to {max(some)})" in told
    elsewhere = {arm: most for arm in results if ARMS[arm].stage == "all" and (most := max(counted(arm, 2, 11 * 2 * 129)))}
    most = elsewhere.pop("nothing-12")
    assert f"before ({min(many)} to {max(many)}, at most {most} of them elsewhere; with plain text before {min(read)} to {max(read)})" in told
    assert not elsewhere and f"trains all {len(ARMS) - 1} arms (variants of the recipe; a {len(ARMS)}th is the shipped model)" in told
    found = {arm: [round(effects.READINGS["OQ6"][0].each(result)) for result in results[arm].values()] for arm, made in ARMS.items() if made.stage == "text"}
    both = sorted(found.pop("lookups-rope-biases"), reverse=True)
    others = sum(found.values(), [])
    assert f"all nine name any thing of the text ({min(others)} to {max(others)} % right)" in told and len(others) == 9
    assert f"500 steps give {both[0]}, {both[1]} and {both[2]} %" in told
    first = next(each for each in effects.READINGS["OQ2"] if each.name == "attention to the first 15 image tokens")
    assert f"({interval_text(effects.effect_of(first, results, 'no-system', 'base').as_dict(), 1, True)})".replace(" [", " % of its attention [") in told
    for name, *arms in wanted:
        found = effects.effect_of(by_name[name], results, *arms)
        assert re.search(rf"{found.mean:+.1f} (points )?\[{found.low:+.1f}, {found.high:+.1f}\]".replace("+", r"\+"), told), (name, found)


def test_notebook_06_tells_the_effects_of_beginning_from_nothing():
    cells = json.loads((notebook.ROOT / "notebooks" / "06_open_questions.ipynb").read_text())["cells"]
    told, results = {cell["id"]: "".join(cell["source"]) for cell in cells}, effects.load(organisms.RESULTS)
    for question, index, text in (("OQ2", 0, "({mean:.1f} % of keys [{low:+.1f}, {high:+.1f}])"), ("OQ2", 3, "without plain text [{low:+.1f}, {high:+.1f}]"),
                                  ("OQ5", 0, "({mean:+.1f} [{low:+.1f}, {high:+.1f}])"),
                                  ("OQ6", 0, "difference of {mean:.0f} points cannot be told from 0 [{low:+.0f}, {high:+.0f}]")):  # fmt: skip
        arms = ("nothing-12", "text-first") if question != "OQ6" else ("lookups-rope-biases", "lookups-rope")
        found = effects.effect_of(effects.READINGS[question][index], results, *arms)
        assert text.format(**vars(found)) in told[f"came-{question.lower()}"]
