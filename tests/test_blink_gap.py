"""Notebook 05: multiple-choice items, value readouts, 2 x 2 tables and interventions, on answers that are known."""

from collections import Counter
from dataclasses import replace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import tiny_models
import torch
from recipe.families import FAMILIES as POCKET
from recipe.packing import ImageTokens, encode, pack
from recipe.pool import make_pool
from recipe.samples import Sampler
from word_tokenizer import WORDS

from kvutils.answer import SessionBatch
from kvutils.datasets import open_dataset
from kvutils.datasets.pocket import sets as pocket
from kvutils.datasets.pocket.choices import SUBTASKS
from kvutils.datasets.pocket.world import draw_mark
from kvutils.datasets.samples import MultipleChoice
from kvutils.errors import DataError, ParameterError
from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import Effect
from kvutils.run import items as run_items
from kvutils.store import Parts, to_json
from kvutils.tasks import blink_interventions, blink_tables, choices
from kvutils.tasks.blink_interventions import DECIDES, GATE, HEADLINE, Evidence, add_values, choose_weight, claim_x5, interventions, results
from kvutils.tasks.blink_tables import CELLS, claim_c8, describe_example, describe_table, table_of_two
from kvutils.tasks.choices import UNRESOLVED, ChoiceTable, check_items, read_items, said, score_options, some_items
from kvutils.tasks.value_readouts import mean_similarity, point_similarity, style_similarity

FEW = 8  # items of each subtask


@pytest.fixture(scope="module")
def items():
    return open_dataset("pocket-blink", items=FEW)


@pytest.fixture(scope="module")
def mlm():
    return tiny_models.tiny_pocket(words=list(WORDS))


def test_items_are_whole_balanced_and_independent(items):
    assert Counter(item.subtask for item in items) == dict.fromkeys(SUBTASKS, FEW)
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert len(item.options) == len(item.choices) and item.answer.lower() in item.options
        assert item.prompt.startswith(item.question) and all(option in item.prompt for option in item.options)
        assert all(image.size == (96, 96) and image.mode == "RGB" for image in item.images)
    for subtask, options in zip(SUBTASKS, (2, 2, 4), strict=True):
        answers = Counter(item.answer for item in items if item.subtask == subtask)
        assert sorted(answers.values()) == [FEW // options] * options
    scenes = [scene for item in items for scene in item.group.split("+")]
    assert len(scenes) == len(set(scenes)) == FEW * (3 + 3 + 2)


def test_exactly_one_option_is_right(items):
    for item in items:
        things = []
        for name in item.group.split("+"):
            stream, _, index = name.rsplit("-", 2)
            kind = "mixed" if stream == "art_style" and int(index) % 5 else "portrait"
            things.append(pocket.pocket_scene(stream, int(index), kind=kind))
        right = item.options.index(item.answer.lower())
        if item.subtask == "Semantic_Correspondence":
            points = [scene.drawn.keypoints[0] for scene in things]
            (part,) = (i for i, point in enumerate(points[0]) if np.array_equal(point, item.reference_point))
            assert np.array_equal(item.candidate_points[right], points[1][part])
            assert len(np.unique(item.candidate_points, axis=0)) == 4
            assert things[0].scene.things[0].cls == things[1].scene.things[0].cls
            for scene, image, marks in zip(things, item.images, ("r", "abcd"), strict=True):
                picture = scene.drawn.image.copy()
                for letter, (x, y) in zip(marks, [item.reference_point] if marks == "r" else item.candidate_points, strict=True):
                    draw_mark(picture, letter, x, y)
                assert np.array_equal(picture, image)
            continue
        kinds = [s.scene.style if item.subtask == "Art_Style" else s.scene.things[0].cls for s in things]
        assert [kind == kinds[0] for kind in kinds[1:]] == [place == right for place in range(2)]
        assert all(np.array_equal(s.drawn.image, image) for s, image in zip(things, item.images, strict=True))


def test_prompts_are_those_of_training(items, mlm):
    mlm = replace(mlm, processor=POCKET["pocket"].processor())
    sampler = Sampler(make_pool(300, seed=3, processes=1, quiet=True))
    for item, kind in zip(items[::FEW], ("style_match", "class_match", "correspondence"), strict=True):
        (trained,) = sampler.draw(kind, 1, np.random.default_rng(0), hints=False)
        ((_, question, answer),) = trained.blocks
        assert item.prompt == question and answer in item.options and len(item.images) == len(trained.images)
        prompt = mlm.prompt(item.prompt, images=len(item.images)).replace("<image>", "<image>" * 5)
        assert pack([trained], ImageTokens(5)).tokens[0].tolist() == [*encode(prompt), *encode(answer)]


def test_a_larger_set_begins_with_the_smaller_one(items):
    more = open_dataset("pocket-blink", items=FEW + 3, subtasks=SUBTASKS[2:])
    for one, two in zip(items[2 * FEW :], more, strict=False):
        assert (one.id, one.group, one.answer) == (two.id, two.group, two.answer) and np.array_equal(one.images[1], two.images[1])
    assert open_dataset("pocket-blink", items=1, subtasks="Art_Style", seed=5)[0].group != items[0].group
    with pytest.raises(ParameterError, match="at least 1"):
        open_dataset("pocket-blink", items=0)
    with pytest.raises(ParameterError, match="unknown BLINK subtask of the pocket world 'Jigsaw'; expected one of Art_Style, "):
        open_dataset("pocket-blink", items=1, subtasks=("Jigsaw",))


def test_bad_items_are_named(items):
    style, point = items[0], items[-1]
    two = {"options": ("(a)", "(b)"), "choices": ("A", "B"), "answer": "(A)", "candidate_points": point.candidate_points[:2]}
    for bad, message in (
        ([], "expected at least one"),
        ([replace(style, subtask="Jigsaw")], "unknown subtask with a readout of values 'Jigsaw'; expected one of Art_Style"),
        ([replace(point, reference_point=None)], "only painted marks"),
        ([replace(point, reference_point=np.array([96.0, 3]))], r"reference: the point \(96, 3\) is outside its image of 96"),
        ([point, replace(point, id="x", **two)], "'x' has 2 options and the first of .* has 4"),
    ):
        with pytest.raises(DataError, match=message):
            check_items(bad)
    assert {name: len(mine) for name, mine in check_items(items).items()} == dict.fromkeys(SUBTASKS, FEW)


def test_answers_are_extracted_as_blink_does(items):
    style, point = items[0], items[-1]
    assert [said(style, text) for text in ("(a)", "(b)", "(c)", "fish", "")] == [0, 1, UNRESOLVED, UNRESOLVED, UNRESOLVED]
    assert said(point, "the point is (d)") == 3 and said(point, "(a) or (b)") == UNRESOLVED
    official = replace(style, options=("(A)", "(B)"))
    assert [said(official, text) for text in ("(B)", "A", "Both are nice. The answer is (B)", "(a)", "C")] == [1, 0, 1, 0, UNRESOLVED]


@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize("form", [
    "{}.", "({}).", "{})", "**{}**", "Answer: {}", "{}. the image", "Answer: **{}**", "The correct answer is {}, as the colours show.",
    "[{}]", "`{}`",
    "{} is closer", "Option {}", "{}. A dog is in both.", "<answer>{}</answer>", "{}\nThe second image has the style.", "({}) - a dog",
    "A man walks in image 1, so\nAnswer: ({}).",
])  # fmt: skip
def test_a_letter_without_doubt_is_read_in_any_form(items, form, letter):
    official = replace(items[0], options=("(A)", "(B)"))
    assert said(official, form.format(letter)) == "AB".index(letter)


@pytest.mark.parametrize("text", [
    "A or B", "(A) or (B)", "(A)(B)", "AB", "Neither A nor B.", "It is not B", "A dog", "A dog, as in B.", "Answer: a dog", "Answer: A or B",
    "the second image", "C.", "Yes", "!!!!", "A matches it more than B.",
])  # fmt: skip
def test_a_letter_in_doubt_stays_unresolved(items, text):
    assert said(replace(items[0], options=("(A)", "(B)")), text) == UNRESOLVED


def test_scores_by_hand():
    images = [torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[2.0, 0], [0, 2]]]), torch.tensor([[[1.0, 1], [-1, -1]]])]
    assert mean_similarity(images[:2]).tolist() == [[pytest.approx(1)]]
    # Candidate 2: mean 0 (cosine 0); its Gram is all ones, the reference's is half the identity.
    assert style_similarity(images).tolist() == [[pytest.approx(1), pytest.approx(1 / np.sqrt(2) / 2)]]
    grids, (reference, tokens) = [tiny_models.grid_layout(5, 5, (40, 40))] * 2, torch.zeros(2, 1, 25, 2)
    reference[0, 12] = torch.tensor([1.0, 0])  # row 2, column 2
    tokens[0, 6] = torch.tensor([1.0, 0])  # row 1, column 1: a neighbour of row 2, column 2 only
    tokens[0, 24] = torch.tensor([0.0, 1])  # row 4, column 4, whose neighbourhood has 4 tokens
    mean, points = 1 / 25, [[20, 20], [36, 36]]  # of each channel, subtracted
    for around, read in ((False, [(-mean, -mean), (-mean, 1 - mean)]), (True, [(1 / 9 - mean, -mean), (-mean, 1 / 4 - mean)])):
        expected = [x / np.hypot(x, y) for x, y in read]  # the reference is along the first channel
        found = point_similarity([reference, tokens], grids, [20, 20], points, around)
        assert found.tolist() == [pytest.approx(expected, rel=1e-5)]
    with pytest.raises(DataError, match=r"the point \(40, 2\) is outside its image of 40 x 40 pixels"):
        point_similarity([reference, tokens], grids, [20, 20], [[1, 1], [40, 2]])


def test_readouts_are_those_of_a_plain_full_prompt(items, mlm):
    chosen = [items[0], items[1], items[2 * FEW], items[2 * FEW + 1]]
    tables = read_items(mlm, chosen, progress=False, batch_size=2, max_new_tokens=2)
    for item in chosen:
        embeddings, text, vision = tiny_models.embedded(mlm, item.images, mlm.prompt(item.prompt, images=len(item.images)))
        with torch.no_grad():
            output = mlm.model(inputs_embeds=embeddings, attention_mask=text.attention_mask, use_cache=True)
        images = []
        for layout in vision.layouts:
            slots = layout.slots[~layout.is_newline]
            values = [layer.values[0][:, slots].transpose(0, 1).flatten(1) for layer in output.past_key_values.layers]
            images.append({f"value.{number}": each for number, each in enumerate(values)})
        expected = score_options(item, images, [layout.select(~layout.is_newline) for layout in vision.layouts])
        table = tables[item.subtask]
        row = table.ids.index(item.id)
        for readout, by_source in expected.items():
            assert table.layers() == list(by_source) and len(by_source) == mlm.num_layers
            for source, scores in by_source.items():
                assert table.of(source, readout)[row].tolist() == pytest.approx(scores, abs=1e-4)
        first = output.logits[0, -1].log_softmax(-1)[mlm.tokenizer.convert_tokens_to_ids(list(item.options))]
        assert table.option_scores[row].tolist() == pytest.approx(first.tolist(), abs=1e-4)


def test_every_source_is_read_and_no_more_depends_on_the_other_images_than_should(items, mlm):
    controls = {"encoder_original": tiny_models.tiny_siglip(), "untrained": tiny_models.tiny_pocket(seed=1, words=list(WORDS))}
    # The candidates of two items exchanged against the same reference: their scores change places where images are alone.
    item = items[0]
    turned = replace(item, id="turned", images=(item.images[0], item.images[2], item.images[1]))
    (table,) = read_items(mlm, [item, turned], **controls, progress=False, max_new_tokens=2).values()
    layers = [f"{family}.{layer}" for family in ("alone.value", "value", "untrained.value") for layer in range(mlm.num_layers)]
    assert set(table.sources) == {"pixels", "encoder_original", "encoder", "projector", *layers}
    for source in table.sources:
        one, two = table.of(source)
        same = np.allclose(one, two[::-1], atol=2e-3)
        assert same == (not (source.startswith(("value.", "untrained.")) and not source.endswith(".0"))), source


def test_a_stopped_run_goes_on_and_gives_the_same(items, mlm, tmp_path, monkeypatch):
    options = {"progress": False, "batch_size": 4, "max_new_tokens": 2}
    plain = read_items(mlm, items, **options)
    stops = Mock(wraps=choices._read_batch, side_effect=[DEFAULT] * 3 + [KeyboardInterrupt] + [DEFAULT] * 9)
    monkeypatch.setattr(choices, "_read_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        read_items(mlm, items, Parts(tmp_path, model="x"), **options)
    resumed = read_items(mlm, items, Parts(tmp_path, model="x"), **options)
    assert stops.call_count == 4 + 3  # six batches, three of them stored before the fourth was stopped
    for subtask, table in plain.items():
        assert all(np.array_equal(value, getattr(resumed[subtask], name)) for name, value in vars(table).items())
    with pytest.raises(ParameterError, match="batch_size"):
        read_items(mlm, items, batch_size=0)


def table_of(model, sources, options=2, subtask="Art_Style") -> ChoiceTable:
    """model, sources[name] (n,) bool: who is right; wrong answers are the option after the right one. A layer 0 that never is, unless
    it is given."""
    n = len(model)
    sources = {"value.0": np.zeros(n, bool)} | sources
    gold = np.arange(n) % options

    def scores(right) -> np.ndarray:
        answer = np.where(right, gold, (gold + 1) % options)
        return -1.0 - (np.arange(options) != answer[:, None])

    values = np.stack([scores(np.asarray(right)) for right in sources.values()], axis=1)
    values = np.stack([values, values], axis=1) + np.random.default_rng(0).normal(0, 0.01, (n, 2, len(sources), options))
    model, names, readouts = scores(np.asarray(model)), [f"{subtask}-{i}" for i in range(n)], list(choices.READOUTS[subtask])
    return ChoiceTable(subtask, names, names, ["(a)"] * n, gold, model.argmax(axis=1), model, readouts, list(sources), values)


def test_two_by_two_with_both_denominators():
    value = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    model = np.array([1, 0, 0, 0, 1, 1, 0, 0, 0, 0], bool)
    table = table_of(model, {"value.1": value}, options=4)
    found = table_of_two(table, table.says("value.1")[:, None], Halves.of(table.groups), n_boot=400)
    # The readout says 0 1 2 3 0 2 3 0 1 2; the model misses items whose answers are 1 2 3 2 3 0 1.
    guess = (3 * 1 + 2 * 2 + 3 * 2 + 2 * 2) / 100
    assert found["counts"] == {"both": 2, "value_only": 3, "model_only": 1, "neither": 4} and found["errors"] == 7
    assert [found["shares"][cell]["mean"] for cell in CELLS] == pytest.approx([0.2, 0.3, 0.1, 0.4])
    assert found["of_errors"]["mean"] == pytest.approx(3 / 7) and found["of_errors"]["n"] == 7
    for name, level in {"guess": guess, "chance": 0.7 / 4, "independence": 0.5 * 0.7}.items():
        assert found[f"at_{name}"]["mean"] == pytest.approx(level)
        assert found[f"above_{name}"]["mean"] == pytest.approx(0.3 - level)
    assert found["above_chance"]["low"] < found["above_chance"]["mean"] < found["above_chance"]["high"]
    right = table_of(np.ones(12, bool), {"value.1": np.ones(12, bool)})  # no errors: no share of them
    found = table_of_two(right, right.gold[:, None], Halves.of(right.groups), n_boot=50)
    undefined = dict.fromkeys(("mean", "low", "high", "error"))
    assert found["of_errors"] == undefined | {"n": 0, "units": 12} and found["shares"]["value_only"]["mean"] == 0


def test_c8_chooses_its_layer_anew_in_every_resample():
    random = np.random.default_rng(0)
    table = table_of(random.random(200) < 0.5, {f"value.{layer}": random.random(200) < 0.5 for layer in range(13)})
    halves = Halves.of(table.groups)
    anew = describe_table(table, n_boot=300)["table"]
    stays = table_of_two(table, blink_tables.says_of(table, halves, blink_tables.sources_of(table, halves))[:, None], halves, n_boot=300)
    assert anew["above_guess"]["mean"] == stays["above_guess"]["mean"] and anew["counts"] == stays["counts"]
    assert anew["above_guess"]["error"] > 1.2 * stays["above_guess"]["error"]
    # The interval is as wide as the few units whose answer can be read make it.
    table.said[5:] = UNRESOLVED
    few = Effect.of(describe_table(table, n_boot=300)["table"]["above_guess"])
    assert few.units == 5 and few.low < few.narrow[0] < few.narrow[1] < few.high


def test_opposite_preferences_are_not_knowledge(verdict):
    """A model that always says one option and a readout that always says the other: chance is passed, guessing is not."""
    table = table_of(np.zeros(200, bool), {"value.1": np.zeros(200, bool)})
    table.said[:] = 1
    table.scores[..., 0], table.scores[..., 1] = 1.0, 0.0
    described = describe_table(table, n_boot=200)
    found = described["table"]
    assert found["above_chance"]["low"] > 0.15 and found["value_accuracy"]["low"] < 0.5 < found["value_accuracy"]["high"]
    assert found["above_guess"]["mean"] == pytest.approx(0, abs=1e-9) and described["said"] == [200, 0]
    assert verdict("C8", claim_c8({"Art_Style": described})) == "absent"


@pytest.mark.parametrize("form", ["{}", "({})", "{}.", "({}).", "{})", "{}. the image", "Answer: {}", "**{}**", "?"])
def test_c8_and_x5_do_not_depend_on_how_the_letter_is_written(items, verdict, form):
    """A model that is right on every item: nothing is hidden, and nothing can be gained."""
    table = table_of(np.ones(200, bool), {"value.1": np.random.default_rng(0).random(200) < 0.8})
    item = replace(items[0], options=("(A)", "(B)"))
    table.said[:] = [said(item, form.format("AB"[gold])) for gold in table.gold]
    described, surfaced = describe_table(table, 200), interventions(table, 200)
    c8, x5 = claim_c8({"Art_Style": described}), claim_x5({"Art_Style": surfaced})
    read = form != "?"  # nothing can be read: nothing is claimed, not even a ceiling
    for name, claim in (("C8", c8), ("X5", x5)):
        assert verdict(name, claim) == ("cannot appear here" if read else "not measured")
        why = claim["prerequisites"][0]["reason"] if read else claim["primary"]["reason"]
        assert why == ("errors of the model: art style 0 in 200 answers; 20 are needed" if read else "no answer names an option on art style")
    assert described["model"]["unresolved"]["mean"] == (not read) and described["by_option_scores"]["shares"]["value_only"]["mean"] == 0


def test_unresolved_answers_are_counted_and_in_no_cell():
    right = np.ones(20, bool)
    table = table_of(right, {"value.1": right})
    table.said[:5] = UNRESOLVED
    found = describe_table(table, n_boot=50)
    assert found["model"]["unresolved"]["mean"] == 0.25 and found["model"]["accuracy"]["mean"] == 0.75
    assert found["model"]["option_scores"]["mean"] == 1 and found["model"]["said"]["-1"] == 5
    rest = some_items(table, table.resolved)
    all_of_it, without = found["table"], table_of_two(rest, rest.gold[:, None], Halves.of(rest.groups), n_boot=50)
    assert all_of_it["counts"] == {"both": 15, "value_only": 0, "model_only": 0, "neither": 0} and all_of_it["errors"] == 0
    assert all_of_it["n"] == all_of_it["shares"]["both"]["units"] == 15 and all_of_it["unresolved"] == 5
    assert found["by_option_scores"]["n"] == 20 and all_of_it["shares"]["both"] == without["shares"]["both"]
    assert found["model"]["option_mass"]["mean"] == pytest.approx(np.exp(-1) + np.exp(-2)) and found["model"]["warnings"] == []
    table.option_scores[:] -= 1  # the model would say something else
    assert "Art_Style".replace("_", " ").lower() in describe_table(table, n_boot=5)["model"]["warnings"][0]
    # What is not read changes nothing of the rest, whatever the values say of it.
    half = uncertain()
    half.said[np.arange(400) % 3 == 0] = UNRESOLVED
    some = interventions(half, n_boot=50)
    assert (some["n"], some["unresolved"], some["errors"]) == (266, 134, half.model_wrong.sum())
    assert some["model"]["mean"] == pytest.approx(half.model_right[half.resolved].mean())
    assert some["changes"][DECIDES]["accuracy"]["mean"] == pytest.approx(half.right("value.1")[half.resolved].mean())
    assert some["changes"][GATE]["accuracy"]["mean"] == 1 and some["changes"][GATE]["change"]["n"] == some["n"]


def test_official_scores_and_the_telling_item():
    value, model = np.ones(12, bool), np.arange(12) % 3 > 0
    table = table_of(model, {"value.1": value})
    table.said[1] = UNRESOLVED
    found = blink_tables.official_scores({"Art_Style": table, "b": table_of(value, {"value.1": value})})
    assert found["accuracy"] == {"Art_Style": 7 / 12, "b": 1, "Total": pytest.approx(19 / 24)}
    assert found["unresolved"] == {"Art_Style": 1 / 12, "b": 0}
    for right, place in ((model, 0), (value, 0), (np.arange(12) != 7, 7)):
        assert describe_table(table_of(right, {"value.1": value}), 5)["telling"] == {"id": table.ids[place], "source": "value.1"}


def test_the_layer_is_chosen_on_each_half_and_read_on_the_other():
    n = 80
    halves = Halves.of([f"Art_Style-{i}" for i in range(n)])
    always, never, second = np.ones(n, bool), np.zeros(n, bool), halves.second
    # Each layer is right in one half only, which chooses it, so that it is read on the other: never right. Layer 0 is never chosen.
    sources = {"pixels": never, "value.0": always, "value.1": second, "value.2": ~second, "untrained.value.0": never, "untrained.value.1": always}
    table = table_of(never, sources)
    found = describe_table(table, n_boot=50)
    assert found["table"]["layers"] == [1, 2] and found["table"]["n"] == n and found["table"]["shares"]["value_only"]["mean"] == 0
    assert found["others"]["untrained.value"]["values_minus_this"]["mean"] == -1 and found["others"]["untrained.value"]["layers"] == [1, 1]
    assert set(found["others"]) == {"pixels", "value.0", "untrained.value"} and found["others"]["value.0"]["counts"]["value_only"] == n
    # Nothing that is reported on a half changes what is read there.
    table.scores[second] = 0
    assert describe_table(table, n_boot=20)["table"]["layers"][1] == 2
    with pytest.raises(ParameterError, match="at least 4 independent units, two in each half, found 3"):
        describe_table(table_of(never[:3], {"value.1": never[:3]}))


def chosen_right(share: float, n: int, subtask: str, wrong: float = 1.0) -> ChoiceTable:
    """A readout that is right on exactly this share, and a model wrong on another, of each half of n items."""
    random, right, model = np.random.default_rng(3), np.zeros(n, bool), np.ones(n, bool)
    second = Halves.of([f"{subtask}-{i}" for i in range(n)]).second
    for members in map(np.flatnonzero, (second, ~second)):
        right[random.permutation(members)[: round(share * len(members))]] = True
        model[random.permutation(members)[: round(wrong * len(members))]] = False
    return table_of(model, {"value.1": right}, subtask=subtask)


@pytest.mark.parametrize("value, expected", [(1.0, "present"), (0.54, "cannot tell"), (0.1, "opposite")])
def test_c8_compares_with_a_readout_at_chance(verdict, value, expected):
    names = ("Art_Style", "Visual_Similarity")
    described = {name: describe_table(chosen_right(value, 200, name), n_boot=200) for name in names}
    claim = claim_c8(described)
    assert verdict("C8", claim) == expected and claim["primary"]["name"] == "art style: value right, model wrong, minus guessing"
    assert claim["size"]["value"] == pytest.approx(100 * value) and claim["primary"]["n"] == claim["primary"]["units"] == 200
    assert claim["primary"]["value"] == pytest.approx(100 * (value - 0.5), abs=3)  # the readout's options are not quite even
    named = {each["name"]: each["value"] for each in claim["others"]}
    assert named["visual similarity: of the model's errors"] == pytest.approx(100 * value) and len(named) == 2 * 6
    assert claim["note"].startswith(f"Above guessing on {2 * (value == 1)} of 2 subtasks (art style {claim['primary']['value']:+.1f}, ")


def test_where_art_style_is_at_the_ceiling_the_other_subtasks_speak(verdict):
    tables = {"Art_Style": chosen_right(0.9, 200, "Art_Style", wrong=0.09), "Visual_Similarity": chosen_right(0.9, 400, "Visual_Similarity"),
              "Semantic_Correspondence": chosen_right(0.7, 200, "Semantic_Correspondence")}  # fmt: skip
    described, surfaced = ({name: use(table, 200) for name, table in tables.items()} for use in (describe_table, interventions))
    c8, x5 = claim_c8(described), claim_x5(surfaced)
    speaking = "mean of visual similarity, semantic correspondence"
    assert c8["primary"]["name"] == f"{speaking}: value right, model wrong, minus guessing" and c8["size"]["value"] == pytest.approx(80)
    assert x5["primary"]["name"] == f"{speaking}: value added minus the model" and x5["primary"]["value"] == pytest.approx(80)
    assert (verdict("C8", c8), verdict("X5", x5)) == ("present", "holds")
    assert "; art style left out: 18 errors of the model in 200 answers." in x5["note"]
    ceiling = {"Art_Style": described["Art_Style"]}
    assert verdict("C8", claim_c8(ceiling)) == verdict("X5", claim_x5({"Art_Style": surfaced["Art_Style"]})) == "cannot appear here"
    # Of three subtasks one cannot be read: it is named, and no ceiling.
    tables["Visual_Similarity"].said[:] = UNRESOLVED
    described["Visual_Similarity"] = describe_table(tables["Visual_Similarity"], 200)
    c8 = claim_c8(described)
    assert c8["primary"]["name"].startswith("semantic correspondence: ")
    (silent,) = (each for each in c8["others"] if each["name"].startswith("visual similarity"))
    assert silent["reason"] == "no answer names an option" and "; 400 of 800 answers name no option." in c8["note"]


def uncertain(n=400) -> ChoiceTable:
    """The model is sure where it is right and unsure where it is wrong; the readout is right there."""
    random = np.random.default_rng(0)
    model = random.random(n) < 0.6
    value = np.where(model, random.random(n) < 0.7, True)
    table = table_of(model, {"pixels": random.random(n) < 0.5, "value.1": value})
    table.option_scores[:] = np.where(model[:, None], 5 * table.option_scores, 0.2 * table.option_scores)
    return table


def test_a_gate_that_can_help_helps_and_costs_nothing_and_others_do_not_help():
    found = interventions(uncertain(), n_boot=300)
    gate, decides = found["changes"][GATE], found["changes"][DECIDES]
    assert gate["accuracy"]["mean"] == 1 and gate["change"]["low"] > 0.2 and gate["cost"]["mean"] == 0
    assert decides["cost"]["mean"] > 0.15 and decides["lost"]["mean"] > 0.1
    for each in found["changes"].values():
        assert each["change"]["mean"] == pytest.approx(each["gained"]["mean"] - each["lost"]["mean"])
    either, scores = found["changes"]["either right"], found["changes"]["option scores alone"]
    assert either["accuracy"]["mean"] == 1 and scores["change"]["mean"] == 0 and min(found["weights"]) > 0 and found["n"] == 400
    assert found["others"]["pixels"]["mean"] < found["changes"][HEADLINE]["change"]["mean"]
    random = np.random.default_rng(1)  # values that know nothing
    found = interventions(table_of(random.random(400) < 0.8, {"value.1": random.random(400) < 0.5}), n_boot=300)
    assert found["changes"][GATE]["change"]["high"] <= 0.02 and found["changes"][HEADLINE]["change"]["high"] <= 0.02
    assert found["changes"][DECIDES]["change"]["high"] < 0 and found["changes"][DECIDES]["cost"]["low"] > 0.3


def test_no_half_fits_what_is_read_on_it():
    table = uncertain()
    second = Halves.of(table.groups).second
    before = interventions(table, n_boot=20)
    table.scores[second] *= -1  # there, the readout now says the opposite
    after = interventions(table, n_boot=20)
    assert (after["layers"][1], after["weights"][1]) == (before["layers"][1], before["weights"][1]) and after["weights"][0] != before["weights"][0]
    right = table.right("value.1")  # decides: as it now is on the second half, and as it was on the first
    assert after["changes"][DECIDES]["accuracy"]["mean"] == pytest.approx(right.mean()) and before["changes"][DECIDES]["accuracy"]["mean"] > 0.8


def test_weights_and_scores_by_hand():
    model, value = np.array([[0.5, -0.5], [0.5, -0.5]]), np.array([[-1.0, 1.0], [1.0, -1.0]])
    found = Evidence(model, value, np.zeros(2, int), np.array([1, 0]))
    assert add_values(found, 0).tolist() == [0, 0] and add_values(found, 0.25).tolist() == [0, 0]
    assert add_values(found, 1).tolist() == [1, 0]
    assert choose_weight(found, np.array([True, True])) == 1.0  # the smallest that is right on both
    assert choose_weight(found, np.array([False, True])) == 0.0  # nothing to gain
    table = uncertain(n=40)
    fit = np.arange(40) < 20
    seen = blink_interventions.evidence(table, "value.1", fit)
    assert seen.value[fit].std() == pytest.approx(1) and np.allclose(seen.model.mean(axis=1), 0)


def test_a_gate_without_two_kinds_of_disagreement_trusts_one_side():
    def says(right):
        return np.where(np.array(right)[:, None], [[1.0, -1.0]], [[-1.0, 1.0]])

    for value, model, expected in (
        ([1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]),  # only the readout is ever right alone
        ([0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]),  # only the model
        ([1, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0]),  # they never differ
    ):
        found = Evidence(says(model), says(value), says(model).argmax(axis=1), np.zeros(4, int))
        assert blink_interventions.gated(found, np.ones(4, bool)).tolist() == expected


@pytest.mark.parametrize("helps, expected", [(True, "holds"), (None, "does not hold"), (False, "opposite")])
def test_x5_is_the_mean_change_over_subtasks(verdict, helps, expected):
    found = {name: interventions(uncertain(n), n_boot=50) | {"title": name} for name, n in (("a", 400), ("b", 80))}
    changes = [each["changes"][HEADLINE]["change"] for each in found.values()]
    if helps is not True:  # a chosen weight can fall back to 0, so what is not so is put in by hand
        for change in changes:
            change |= {"mean": 0, "low": 0, "high": 0, "error": 0} if helps is None else {"mean": -change["mean"], "low": -change["high"]}
    claim = claim_x5(found)
    assert verdict("X5", claim) == expected and claim["primary"]["n"] == 480 and len(claim["others"]) == 2 * 5
    assert claim["primary"]["value"] == pytest.approx(100 * np.mean([each["mean"] for each in changes]))  # subtasks weigh alike
    assert found["a"]["beyond_scores"]["mean"] == pytest.approx(found["a"]["changes"][HEADLINE]["accuracy"]["mean"] - found["a"]["model"]["mean"])


def test_results_and_figures_need_only_the_items(items, redraw, tmp_path):
    random = np.random.default_rng(0)
    measured, examples = {}, {}
    names = ["pixels", "encoder_original", "encoder", "projector"]
    names += [f"{family}{layer}" for family in ("value.", "alone.value.", "untrained.value.") for layer in range(3)]
    for subtask, options in (("Art_Style", 2), ("Semantic_Correspondence", 4)):
        measured[subtask] = table = table_of(random.random(60) < 0.6, {name: random.random(60) < 0.6 for name in names}, options, subtask)
        item = next(each for each in items if each.subtask == subtask)
        table.ids[0], table.said[7] = item.id, UNRESOLVED
        examples[subtask] = describe_example(item, table)
    about = {"parameters": {"bootstrap": 50, "seed": 0, "profile": "pocket", "model": "pocket"}}
    run_items.write_items(tmp_path, "05_blink_gap", measured, about, {}, {})
    found = run_items.derive(tmp_path, "05_blink_gap")
    direct = results(measured, about)
    assert to_json({name: found[name] for name in direct}) == to_json(direct)
    assert all(len(row) == len(table["header"]) for table in found["tables"] for row in table["rows"])
    shown = {"examples": examples, "method": examples["Semantic_Correspondence"]}
    figures = redraw("05_blink_gap", found | shown)
    assert [name.removeprefix("05_") for name in figures] == ["gap", "readouts", "sources", "method", "examples"]
    left, right = figures["05_gap"].axes
    shares = [each["table"]["shares"] for each in found["subtasks"].values()]
    cells = [100 * each[cell]["mean"] for each in shares for cell in ("value_only", "both", "model_only", "neither")]
    assert [bar.get_width() for bar in left.patches] == pytest.approx(cells)
    drawn = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"]
    assert drawn == pytest.approx([100 * each["changes"][HEADLINE]["change"]["mean"] for each in found["interventions"].values()])
    assert not {"05_method", "05_examples"} & set(redraw("05_blink_gap", found | {"method": None, "examples": {}}))
    for table in measured.values():
        table.said[:] = UNRESOLVED  # nothing can be read: the places stay empty
    nothing = results(measured, about)
    assert "was measured: no answer names an option" in nothing["finding"]
    figures = redraw("05_blink_gap", nothing | shown)
    left, _ = figures["05_gap"].axes
    assert "05_sources" not in figures
    assert [bar.get_width() for bar in left.patches] == [0] * 8 and "not defined" in left.get_title()


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES])
def test_every_family_reads_items_in_their_official_form(family):
    """Photographs of different sizes, options "(A)" or "A", several images as base views or as grids of their own."""
    mlm = tiny_models.tiny(family, words=list(WORDS))
    pictures = [tiny_models.picture(*size) for size in ((50, 40), (40, 60), (64, 48))]
    about = {"question": "which image ?", "prompt": "which image ? (A) (B)", "options": ("(A)", "(B)"), "choices": ("A", "B")}
    style = MultipleChoice(id="s", subtask="Art_Style", images=tuple(pictures), answer="(B)", group="s", **about)
    points = {"reference_point": np.array([45.0, 5]), "candidate_points": np.array([[3.0, 55], [39, 3]])}
    about |= {"subtask": "Visual_Correspondence", **points}
    point = MultipleChoice(id="p", images=tuple(pictures[:2]), answer="(A)", group="p", **about)
    tables = read_items(mlm, [style, point], encoder_original=tiny_models.tiny_siglip(), progress=False, max_new_tokens=2)
    for name, gold in (("Art_Style", 1), ("Visual_Correspondence", 0)):
        table = tables[name]
        assert table.gold.tolist() == [gold] and len(table.layers()) == len(table.layers("alone.value")) == mlm.num_layers
        assert np.isfinite(table.scores).all() and (np.abs(table.scores) <= 1 + 1e-6).all()
        assert np.ptp(table.scores, axis=-1).min() > 0  # every source tells the options apart
    prompt = mlm.prompt(style.prompt, images=3)
    with SessionBatch(choices.base_views(mlm), [pictures]) as session:
        score = session.answer([[style.prompt]], [[["(A)", "A"]]], max_new_tokens=0)[0][0].scores
    assert prompt.count("<image>") + prompt.count("<|image_pad|>") == 3
    # Both spellings of an option count.
    assert tables["Art_Style"].option_scores[0, 0] == pytest.approx(np.logaddexp(score["(A)"], score["A"]), abs=1e-4)
