"""The pocket world, its questions, the packing of training batches, and training itself on a few steps."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe import export, train, trainer
from recipe.captions import CAPTIONS, LONGEST, caption_tokens, encoder_batch
from recipe.evaluate import UNTRAINED, answer_blocks, balanced_samples, in_view, missed_gates
from recipe.families import FAMILIES
from recipe.model import answer_logits
from recipe.muon import Muon
from recipe.packing import EOS, IGNORE, IMAGE, TOKEN, TOKENIZER, encode, pack, paint, pixel_batch, to_pixels
from recipe.pool import GRID, make_pool
from recipe.samples import KINDS, LETTERED, MIX, OWN_MIX, PLAIN, REFERENCE, Sample, Sampler, ask_about_all, marks_of
from recipe.shared import patch_windows
from recipe.tokenizer import NTH
from transformers import AutoTokenizer

from kvutils.checkpoints import ENCODERS, MODELS, original_encoder
from kvutils.datasets.pocket import questions as q
from kvutils.datasets.pocket.shapes import CLASSES, KEYPOINTS, PARTS, SILHOUETTES
from kvutils.datasets.pocket.world import COLOURS, DOMAINS, STYLES, Scene, Thing, render, sample_kind, sample_scene
from kvutils.errors import ParameterError
from kvutils.models import load_mlm, wrap_mlm
from kvutils.processors import render as write
from kvutils.readout.words import load_siglip_text
from kvutils.tasks.prefixes import PrefixWriter

FAMILY = FAMILIES["pocket"]


@pytest.fixture(scope="module")
def pool():
    return make_pool(500, seed=9, processes=1, quiet=True)


@pytest.fixture(scope="module")
def mlm():
    torch.manual_seed(0)
    return FAMILY.build_mlm().eval()


def embedding(mlm, pool):
    """As the evaluation embeds pictures."""
    return lambda images: FAMILY.tokens(mlm, FAMILY.features(mlm, pixel_batch(pool, images)))


def test_the_pool_is_the_same_however_the_work_is_split_and_allows_the_questions_of_its_scenes(pool):
    other = make_pool(40, seed=9, processes=2, chunk=7, quiet=True)
    assert all(np.array_equal(array, getattr(pool, name)[:40]) for name, array in vars(other).items())
    for row in range(40):  # so the questions of every kind need no pool
        rng = np.random.default_rng((9, row))
        scene = sample_scene(rng, sample_kind(rng))
        assert pool.facts(row) == q.facts_of(scene, render(scene))


def drawn(*things):
    return render(Scene(tuple(Thing(*thing) for thing in things), 0, 0, 1))


def test_key_points_are_on_or_near_the_silhouette_and_move_with_the_object():
    assert set(SILHOUETTES) == set(KEYPOINTS) == set(CLASSES)
    for index, name in enumerate(CLASSES):
        found = drawn((index, 0, 48, 48, 30, 0.0, False))
        rows, columns = np.nonzero(found.mask)
        for part, (x, y) in zip(PARTS, found.keypoints[0], strict=True):
            nearest = np.hypot(columns - x, rows - y).min()
            assert nearest < 4, f"{part} of {name} is {nearest:.1f} px off"
    ways = ((0.0, False), (0.0, True), (0.3, False))
    plain, mirrored, turned = (drawn((0, 0, 48, 48, 30, *way)).keypoints[0] for way in ways)
    assert np.allclose(mirrored[:, 0] - 48, 48 - plain[:, 0]) and np.allclose(mirrored[:, 1], plain[:, 1])
    assert np.allclose(np.hypot(*(turned - 48).T), np.hypot(*(plain - 48).T))
    assert turned[0, 1] > plain[0, 1]  # the front, to the right, goes down: y points down, angles are clockwise


def test_visibility_is_the_share_of_the_whole_silhouette():
    whole, half = (drawn((3, 0, x, 48, 20, 0.0, False)).visible[0] for x in (48, 0))
    behind, before = drawn((6, 0, 48, 48, 16, 0.0, False), (5, 1, 48, 48, 28, 0.0, False)).visible
    assert whole == before == 1.0 and 0.3 < half < 0.7 and behind < 0.2


def test_colour_does_not_give_the_class_and_positions_are_flat():
    scenes = [sample_scene(np.random.default_rng((1, i))) for i in range(3000)]
    pairs = np.array([(t.cls, t.colour) for s in scenes for t in s.things])
    table = np.histogram2d(*pairs.T, bins=np.arange(9))[0]
    share = table / table.sum(1, keepdims=True)
    assert np.abs(share - 1 / 8).max() < 0.07
    x = np.array([t.x for s in scenes for t in s.things if len(s.things) <= 2])
    counts = np.histogram(x, bins=4, range=(6, 90))[0]
    assert counts.min() > 0.75 * counts.max()


def _facts(*things, style=0, domain=0):
    rows = tuple((CLASSES.index(c), COLOURS.index(k), float(x), float(y), 1.0) for c, k, x, y in things)
    return q.Facts(rows, style, domain)


def in_order(answer):
    """Lists are in any order."""
    return tuple(sorted(answer.split(" , ")))


PLACES = (("left of", "car", "fish", "red"), ("above", "car", "fish", "red"),
          ("right of", "fish", "car", "blue"), ("below", "fish", "car", "blue"))  # fmt: skip


@pytest.mark.parametrize(("kind", "expected"), [
    ("class", {"what is the red thing ?": "fish", "what is the blue thing ?": "car"}),
    ("colour", {"what colour is the fish ?": "red", "what colour is the car ?": "blue"}),
    ("count", {"how many things are there ?": "two"}),
    ("hop_colour", {f"what colour is the thing {where} the {cls} ?": colour for where, cls, _, colour in PLACES}),
    ("hop_class", {f"what is the thing {where} the {cls} ?": other for where, cls, other, _ in PLACES}),
    ("position", {"is the fish left or right ?": "left", "is the car left or right ?": "right",
                  "is the fish top or bottom ?": "top", "is the car top or bottom ?": "bottom"}),
    ("caption", {"describe the image .": "a red fish and a blue car"}),
    ("list_colours", {"what colour are the things ?": "fish red , car blue"}),
    ("list_sides", {"are the things left or right ?": "fish left , car right",
                    "are the things top or bottom ?": "fish top , car bottom"}),
])  # fmt: skip
def test_answers_follow_from_the_facts(kind, expected):
    facts, rng = _facts(("fish", "red", 20, 20), ("car", "blue", 70, 70)), np.random.default_rng(0)
    found = dict(found for _ in range(60) if (found := q.ask(facts, kind, rng, KINDS)))
    assert {question: in_order(answer) for question, answer in found.items()} == {question: in_order(answer) for question, answer in expected.items()}


def test_lookups_ask_about_every_thing():
    facts = _facts(("fish", "red", 20, 20), ("car", "blue", 70, 70), ("cup", "green", 20, 70))
    rng = np.random.default_rng(0)
    assert dict(ask_about_all(facts, "colour", rng)) == {
        "what colour is the fish ?": "red", "what colour is the car ?": "blue", "what colour is the cup ?": "green"}  # fmt: skip
    relations = ask_about_all(facts, "relation", rng)
    assert relations and sum(answer == "yes" for _, answer in relations) * 2 == len(relations)
    assert len(ask_about_all(facts, "existence", rng)) == 1


def test_yes_and_no_are_right_and_balanced(pool):
    rng = np.random.default_rng(0)
    for kind in ("existence", "existence_colour", "relation", "hop_same", "hop_more"):
        asked = [(facts, found) for facts in map(pool.facts, range(len(pool))) if (found := q.ask(facts, kind, rng))]
        assert 0.3 < np.mean([answer == "yes" for _, (_, answer) in asked]) < 0.7, kind
        for facts, (question, answer) in asked if kind == "existence" else ():
            cls = CLASSES.index(question.split()[3])
            assert (answer == "yes") == any(thing[0] == cls for thing in facts.things)


def test_nothing_is_asked_about_things_that_hardly_show():
    facts = q.Facts(((0, 0, 20.0, 20.0, 0.2), (2, 1, 70.0, 70.0, 1.0)), 0, 0)
    rng = np.random.default_rng(0)
    asked = [q.ask(facts, kind, rng) for kind in q.KINDS for _ in range(30)]
    assert any(asked) and not any("fish" in "".join(found) for found in asked if found)


def test_referring_expressions_name_one_thing():
    facts = _facts(("fish", "red", 20, 20), ("fish", "blue", 70, 20), ("car", "red", 50, 70))
    twins, close = (_facts(("fish", "red", 20, 20), ("fish", "red", *place)) for place in ((70, 20), (22, 60)))
    assert [q.referring_expression(facts, i) for i in range(3)] == ["the red fish", "the blue fish", "the car"]
    assert [q.referring_expression(twins, i) for i in range(2)] == ["the left fish", "the right fish"]
    assert q.referring_expression(close, 0) is None


def test_training_is_written_in_pieces_that_can_be_read_back(pool, tmp_path):
    """Also by the tokenizer as it is loaded with a model."""
    FAMILY.processor().save_pretrained(tmp_path)
    loaded, rng = AutoTokenizer.from_pretrained(tmp_path), np.random.default_rng(1)
    samples = [s for words in (False, True) for kind in train.SEQUENCES for s in Sampler(pool, words=words).draw(kind, 30, rng)]
    texts = {text for sample in samples for text in (sample.prefix, *(t for block in sample.blocks for t in block[1:]))}
    texts = {*texts, *CAPTIONS} - {""}
    assert len(texts) > 500 and loaded.get_vocab() == TOKEN
    for text in sorted(texts):
        ids = encode(text)
        assert TOKEN["<unk>"] not in ids and TOKENIZER.decode(ids) == text
        assert loaded(text, add_special_tokens=False)["input_ids"] == list(ids) == list(encode(text.upper()))
    assert encode("fish,car?") == encode("fish , car ?") and TOKEN["<unk>"] in encode("señor")
    assert max(len(encode(caption)) for caption in CAPTIONS) + 1 == LONGEST == caption_tokens().shape[1]


def test_every_prefix_of_notebook_04_has_controls_of_its_length(mlm):
    """Of the two lights that are scored each is the other's wrong prefix."""
    writer = PrefixWriter(wrap_mlm(mlm, FAMILY.processor()), "pocket")
    names = {"class_name": CLASSES, "domain": DOMAINS[1:], "expression": [f"the {colour} {cls}" for colour in COLOURS for cls in CLASSES]}
    for kind, named in names.items():
        correct = [writer.correct(kind, name) for name in named]
        assert all(writer.write(each, correct, seed) for seed, each in enumerate(correct)), writer.unmatched


SCENE = "a red fish far left top , a blue car right far bottom . a plain image . a day photo ."
BLOCKS = [("colour", "what colour is the fish ?", "red"), ("caption", "describe the image .", "a red fish"),
          ("count", "how many things are there ?", "one")]  # fmt: skip


def test_a_packed_block_is_the_prompt_the_model_meets_at_inference(pool, mlm):
    """Logits of every block of a packed batch equal those of the chat template's prompt through the processor and the model's own
    forward, one at a time: words before the image, several images, the question before the image, text alone."""
    processor, image = FAMILY.processor(), FAMILY.full
    samples = [Sample([(0, PLAIN)], BLOCKS, "look for the fish"), Sample([(1, PLAIN), (2, PLAIN)], BLOCKS[:2]),
               Sample([(3, PLAIN)], BLOCKS[:1], question_first=True), Sample([], BLOCKS, SCENE)]  # fmt: skip
    packed = pack(samples, image)
    pixels, found, start = pixel_batch(pool, packed.images), [], 0
    with torch.no_grad():
        logits = answer_logits(mlm, packed, embedding(mlm, pool)(packed.images))
        sizes, number = torch.tensor([[96, 96]] * len(pixels)), torch.tensor([len(pixels)])  # several images are not tiled
        features = mlm.model.get_image_features(pixels[:, None], sizes, batch_num_images=number)
        features = list(getattr(features, "pooler_output", features))
        for sample in samples:
            own = [features.pop(0) for _ in sample.images]
            for _, question, answer in sample.blocks:
                before = [sample.prefix] if sample.prefix else [question] if sample.question_first else []
                texts = [{"type": "text", "text": text} for text in (*before, *([] if sample.question_first else [question]))]
                content = texts[: len(before)] + [{"type": "image"}] * len(own) + texts[len(before) :]
                text = write(processor, content).replace("<image>", "<image>" * image.slots)
                ids = torch.tensor([TOKENIZER(text)["input_ids"] + list(encode(answer))])
                tokens = mlm.get_input_embeddings()(ids)
                if own:
                    tokens = tokens.masked_scatter((ids == IMAGE)[..., None], torch.cat(own))
                wanted = mlm(inputs_embeds=tokens).logits[0, -len(encode(answer)) - 1 :]
                assert torch.allclose(logits[start : start + len(wanted)], wanted, atol=1e-4)
                start += len(wanted)
                found += [*encode(answer), EOS]
    assert start == len(logits) and found == packed.labels.flatten()[packed.asked].tolist()


def test_pictures_are_read_as_the_processor_gives_them(pool, mlm):
    wrapped = wrap_mlm(mlm, FAMILY.processor())
    given = wrapped.processor(images=[pool.images[0]], text=wrapped.prompt("what ?"), return_tensors="pt")
    assert wrapped.base_view_only and not wrap_mlm(mlm, FAMILY.processor(), base_view_only=False).base_view_only
    assert torch.allclose(given["pixel_values"][0, 0], to_pixels(pool.images[:1])[0], atol=1e-6)
    assert wrapped.prompt("same colour?", images=3).count("first <image> second <image> third <image>") == 1


def test_question_first_samples_answer_behind_the_image():
    packed = pack([Sample([(0, PLAIN)], [("count", "how many things are there ?", "one")], question_first=True)], FAMILY.full)
    before, *_, behind = TOKENIZER.decode(packed.tokens[0]).split("<image>")
    assert before.split("<|user|>")[1].strip() == "how many things are there ?" and behind.split() == ["<|end|><|assistant|>", "one"]
    assert packed.labels[0][packed.labels[0] != IGNORE].tolist() == [*encode("one"), EOS]


def words_read(text, rng):
    """A scene as somebody imagines it who has read its description: places at random, where the words leave them open."""
    found = re.findall(r"a (\w+) (\w+) ((?:far )?(?:left|right)) ((?:far )?(?:top|bottom))", text)
    low = {"far left": 0, "far top": 0, "left": 24, "top": 24, "right": 48, "bottom": 48, "far right": 72, "far bottom": 72}
    across, down = (np.array([low[thing[i]] for thing in found]) + rng.uniform(0, 24, len(found)) for i in (2, 3))
    things = [(CLASSES.index(cls), COLOURS.index(colour), x, y, 1.0)
              for (colour, cls, *_), x, y in zip(found, np.sort(across), down, strict=True)]  # fmt: skip
    style, domain = (re.search(rf"a (\w+) {what}", text)[1] for what in ("image", "photo"))
    return q.Facts(tuple(things), STYLES.index(style), DOMAINS.index(domain))


def test_texts_leave_nothing_open_that_is_asked(pool):
    """However the words are imagined, the answer is the same."""
    rng, seen = np.random.default_rng(0), []
    for sample in Sampler(pool, words=True).draw("single", 40, rng):
        assert not sample.images
        read: dict[str, set] = {}
        for facts in (words_read(sample.prefix, rng) for _ in range(12)):
            for kind in {block[0] for block in sample.blocks}:
                for question, answer in [pair for _ in range(6) for pair in ask_about_all(facts, kind, rng)]:
                    read.setdefault(question, set()).add(in_order(answer))
        for kind, question, answer in sample.blocks:
            assert read.get(question, {in_order(answer)}) == {in_order(answer)}, (sample.prefix, question)
            seen.append((kind, question in read))
    assert np.mean([found for _, found in seen]) > 0.8 and len({kind for kind, _ in seen}) > 12


def test_marks_and_several_pictures_are_told_as_they_are_painted(pool):
    """Read back from the words: which letter each part has, what each picture shows, and so what is asked."""
    sampler, rng = Sampler(pool, words=True), np.random.default_rng(0)
    for sample in (one for kind in ("marked", "correspondence", "class_match", "style_match") for one in sampler.draw(kind, 20, rng)):
        pictures = re.split(r"(?:first|second|third) ", sample.prefix)[1:] or [sample.prefix]
        things = [[cls for cls in re.findall(r"\w+", told.partition(" .")[0]) if cls in CLASSES] for told in pictures]
        styles = [re.search(r"a (\w+) image", told)[1] for told in pictures]
        marks = {part: letter for letter, part in re.findall(r"(\([a-d]\)) (\w+)", pictures[-1])}
        marked = re.findall(r"marked (\w+)", pictures[0])
        for kind, question, answer in sample.blocks:
            nth = next((i for i, place in enumerate(NTH) if f"the {place} image" in question), None)
            if kind == "part":
                wanted = marked[0]
            elif kind == "letter":
                wanted = marks[re.search(r"the (\w+) \?", question)[1]]
            elif kind == "correspondence":
                wanted = marks[marked[0]]
            elif kind == "nth_class":
                wanted = things[nth][0]
            elif kind == "nth_style":
                wanted = styles[nth]
            elif kind == "class_match":
                wanted = "(a)" if things[1] == things[0] else "(b)"
            else:
                continue
            assert wanted == answer, (sample.prefix, question)


def test_full_windows_are_the_siglip_of_the_class(pool):
    torch.manual_seed(0)
    pair = FAMILY.build_pair().eval()
    pixels = pixel_batch(pool, [(0, PLAIN), (1, PLAIN)])
    with torch.no_grad():
        window, ids = patch_windows(pixels, torch.zeros(2, 2, dtype=torch.long), 12)
        assert torch.equal(window, pixels) and ids[1].tolist() == list(range(144))
        whole = FAMILY.encode_windows(pair, pixels, torch.zeros(2, 2, dtype=torch.long), 12)
        assert torch.allclose(whole, pair.vision_model(pixels).pooler_output, atol=1e-5)
        part, part_ids = patch_windows(pixels, torch.tensor([[2, 3], [0, 5]]), 7)
        assert torch.equal(part[0], pixels[0, :, 16:72, 24:80]) and part_ids[0, 0] == 2 * 12 + 3


def test_captions_hold_for_what_is_in_the_window(pool):
    rows, number = np.arange(60), {caption: i for i, caption in enumerate(CAPTIONS)}
    _, _, _, labels, weights = encoder_batch(pool, rows, np.random.default_rng(0), GRID, True)
    for row in rows:
        facts = pool.facts(row)
        for cls, name in enumerate(CLASSES):
            in_view = [thing[4] for thing in facts.things if thing[0] == cls]
            column = row, number[f"a {name}"]
            assert labels[column] == any(share >= 0.4 for share in in_view)
            assert weights[column] == (labels[column] == 1 or not any(share > 0.03 for share in in_view))
        assert labels[row, number[f"a {STYLES[facts.style]} image"]] == 1 and labels[row, 80:85].sum() == 1


def test_marks_are_always_the_same_and_painted_where_the_part_is(pool):
    portraits = np.flatnonzero(pool.portrait)[:20]
    for row in portraits:
        for version, letters in ((PLAIN, ""), (REFERENCE, "r"), (LETTERED, "abcd")):
            marks = marks_of(pool, row, version)
            assert marks == marks_of(pool, row, version) and "".join(letter for letter, _ in marks) == letters[: len(marks)]
            assert len({part for _, part in marks}) == len(marks) and all(pool.keypoints[row, 0, part, 2] for _, part in marks)
            changed = (paint(pool, [(row, version)])[0] != pool.images[row]).any(-1)
            rows, columns = np.nonzero(changed)
            for _, part in marks:
                x, y = pool.keypoints[row, 0, part, :2]
                assert np.hypot(columns - x, rows - y).min() < 4
            assert changed.any() == bool(marks)
    assert len({marks_of(pool, row, REFERENCE)[0][1] for row in portraits if marks_of(pool, row, REFERENCE)}) == len(PARTS)


def test_the_reading_stage_begins_with_tokens_as_long_as_words(pool):
    torch.manual_seed(0)
    mlm = FAMILY.build_mlm().eval()
    with torch.no_grad():
        features = FAMILY.halve(FAMILY.features(mlm, pixel_batch(pool, [(row, PLAIN) for row in range(16)])))
        before = FAMILY.tokens(mlm, features)
        FAMILY.match_words(mlm, features)
        after = FAMILY.tokens(mlm, features)
        wanted = mlm.get_input_embeddings().weight.norm(dim=-1).mean().item()
    assert after[:, :-1].norm(dim=-1).mean().item() == pytest.approx(wanted, rel=1e-4)
    assert after[0, -1].norm().item() == pytest.approx(wanted, rel=1e-4)
    scale = after[:, :-1].norm() / before[:, :-1].norm()
    assert torch.allclose(after[:, :-1], scale * before[:, :-1], atol=1e-5)


def test_triples_and_pairs_have_one_right_answer(pool):
    sampler, rng = Sampler(pool), np.random.default_rng(0)
    for kind in ("style_match", "class_match"):
        for sample in sampler.draw(kind, 20, rng, hints=False):
            of = [int(pool.style[row] if kind == "style_match" else pool.things[row, 0, 0]) for row, _ in sample.images]
            assert (of[1] == of[0]) != (of[2] == of[0])
            assert [block[2] for block in sample.blocks] == ["(a)" if of[1] == of[0] else "(b)"]
    for sample in sampler.draw("correspondence", 40, rng):
        (reference,), marks = (marks_of(pool, *image) for image in sample.images)
        assert [version for _, version in sample.images] == [REFERENCE, LETTERED]
        for kind, question, answer in sample.blocks:
            if kind == "correspondence":
                assert {f"({letter})": part for letter, part in marks}[answer] == reference[1]
            if kind == "letter":
                assert {PARTS[part]: f"({letter})" for letter, part in marks}[re.search(r"marks the (\w+) ", question)[1]] == answer
            if kind == "part":
                assert answer == PARTS[reference[1]]


def test_styles_are_named_in_training_and_never_compared(pool):
    sampler, rng = Sampler(pool), np.random.default_rng(0)
    asked = [b for kinds in train.STEP_KINDS.values() for kind in kinds for sample in sampler.draw(kind, 60, rng) for b in sample.blocks]
    assert set(UNTRAINED) == {"style_match"} and not {b[0] for b in asked} & {*UNTRAINED}
    assert not [question for _, question, _ in asked if "style" in question and ("same" in question or "which" in question)]
    assert {b[2] for b in asked if b[0] == "nth_style"} == set(STYLES)


def test_yes_and_no_are_as_frequent_in_what_training_asks(pool):
    for words in (False, True):
        samples = Sampler(pool, words=words).draw("single", 60, np.random.default_rng(0))
        blocks = [block for sample in samples for block in sample.blocks if block[0].startswith("existence")]
        assert len(blocks) > 50 and sum(answer == "yes" for *_, answer in blocks) * 2 == len(blocks)


def test_what_naming_any_thing_in_view_would_give():
    """Of a scene with two red fish and a blue car; in two steps the thing that is named is none of them."""
    facts = q.Facts(((0, 0, 20.0, 20.0, 1.0), (0, 0, 50.0, 20.0, 1.0), (1, 5, 70.0, 70.0, 1.0)), 0, 0)
    fish, car, red, blue = CLASSES[0], CLASSES[1], COLOURS[0], COLOURS[5]
    for kind, question, answer, share in (
        ("class", f"what is the {blue} thing ?", car, 1 / 3), ("colour", f"what colour is the {fish} ?", red, 2 / 3),
        ("hop_class", f"what is the thing left of the {car} ?", fish, 1.0), ("hop_colour", f"what colour is the thing left of the {fish} ?", blue, 1.0),
    ):  # fmt: skip
        assert in_view(kind, facts, question, answer) == pytest.approx(share)


def test_evaluation_balances_the_answers_and_says_which_gates_are_missed(pool, mlm):
    samples = balanced_samples(pool, "existence", 60, seed=1)
    answers = [s.blocks[0][2] for s in samples]
    assert answers.count("yes") == answers.count("no") > 20
    right = answer_blocks(mlm, samples, embedding(mlm, pool), FAMILY.full)
    assert len(right) == len(samples) and not all(r[0] for r in right)
    assert missed_gates(REPORT) == []
    for kind, mean, low, said in (("existence", 0.7, 0.68, "existence: accuracy 0.700 is not within its gate, at least 0.80 and below 0.97"),
                                  ("existence", 0.98, 0.97, "below 0.97"), ("position", 0.5, 0.45, "position: .* is not clearly above blind 0.40")):
        (missed,) = missed_gates(REPORT | {kind: REPORT[kind] | {"accuracy": {"mean": mean, "low": low, "high": 0.99}}})
        assert re.search(said, missed)
    assert not missed_gates(REPORT | {"style_match": REPORT["style_match"] | {"accuracy": {"mean": 0.3, "low": 0.2, "high": 0.4}}})


REPORT = {kind: {"n": 10, "scenes": 10, "answers": 2, "majority": 0.5, "blind": {"mean": 0.4, "low": 0.3, "high": 0.5},
                 "accuracy": {"mean": 0.9, "low": 0.8, "high": 0.95}} for kind in (*q.KINDS, "letter", "part", "correspondence", "style_match",
                                                                                   "class_match")}  # fmt: skip


def _train(stage, steps, monkeypatch, folder):
    monkeypatch.setattr(train, "fast", lambda model, device, compiled: model)  # nothing to compile for a few steps
    train.main(["--stage", stage, "--steps", str(steps), "--scenes", "300", "--device", "cpu", "--ranks", "1", "--quiet",
                "--seed", "4", "--out", str(folder)])  # fmt: skip
    return torch.load(folder / "pocket-4" / stage / "checkpoint.pt", weights_only=True)


def test_a_family_with_its_own_weights_of_questions_is_trained_with_them_and_its_card_names_them(monkeypatch):
    asked = {}
    monkeypatch.setattr(train, "train", lambda stages, options, made: asked.update({options.model: made.mix}))
    for model in ("pocket", "pocket-next", "pocket-qwen"):
        train.main(["--model", model])
    assert asked["pocket"] == asked["pocket-next"] == MIX and MIX["existence"] == 2.0
    assert {kind: weight for kind, weight in asked["pocket-qwen"].items() if weight != MIX[kind]} == OWN_MIX["pocket-qwen"]
    cards = {name: (export.HOME / name / "README.md").read_text() for name in ("llava-onevision", "qwen2_5_vl")}
    assert "existence 0.3 instead of 2" in cards["qwen2_5_vl"] and "instead of" not in cards["llava-onevision"].split("**Questions**")[1]


@pytest.mark.slow
def test_stages_say_what_they_need_follow_each_other_and_resume(tmp_path, monkeypatch):
    with pytest.raises(ParameterError, match="'read' must be trained first: .*pocket-4.* Run --stage read"):
        _train("all", 1, monkeypatch, tmp_path)
    small = {name: replace(stage, scenes=4, horizon=20) for name, stage in trainer.STAGES.items()}
    monkeypatch.setattr(train, "RECIPE", replace(train.RECIPE, stages=small))
    monkeypatch.setattr(train, "quick_accuracy", lambda *a, **k: {"existence": 0.5})
    for stage in trainer.STAGES:
        assert _train(stage, 2, monkeypatch, tmp_path)["step"] == 2
    folder = tmp_path / "pocket-4"
    before = json.loads((folder / "all" / "curve.json").read_text())
    resumed = _train("all", 4, monkeypatch, tmp_path)
    told = json.loads((folder / "all" / "curve.json").read_text())
    assert 0 < before["seconds"] < told["seconds"] == resumed["seconds"] and told["machine"]["cores"] >= 1 and told["step"] == 4
    assert told["points"] == [{"step": 2, "existence": 0.5}, {"step": 4, "existence": 0.5}]
    (folder / "all" / "checkpoint.pt").unlink()
    straight = _train("all", 4, monkeypatch, tmp_path)
    assert resumed["step"] == straight["step"] == 4
    assert all(torch.allclose(resumed["model"][k], v, atol=1e-6) for k, v in straight["model"].items())
    with pytest.raises(ParameterError, match="rates over 20 steps instead of 30: remove .*all, or train elsewhere"):
        _train("all", 30, monkeypatch, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ParameterError, match="with other ingredients"):
        patch.setattr(train, "RECIPE", replace(train.RECIPE, tower_rate=0.9))
        _train("all", 4, monkeypatch, tmp_path)
    encoder, text, read = (torch.load(folder / name / "checkpoint.pt", weights_only=True)["model"] for name in ("encoder", "text", "read"))
    tower, word = "vision_model.encoder.layers.0.self_attn.q_proj.weight", "mlm.model.language_model.layers.0.self_attn.q_proj.weight"
    seen = [model["mlm.model.vision_tower." + tower.removeprefix("vision_model.")] for model in (read, straight["model"])]
    assert torch.equal(seen[0], encoder["pair." + tower]) and not torch.equal(*seen)
    assert not torch.equal(read[word], text[word]) and not torch.equal(straight["model"][word], read[word])
    fresh = [FAMILY.projector_parameters(k) and torch.equal(v, read[k]) for k, v in text.items()]
    assert not any(fresh)  # the projector learns in the third stage

    monkeypatch.setattr(export, "evaluate", lambda *a, **k: REPORT)
    home = tmp_path / "home"
    export.main(["--seed", "4", "--out", str(tmp_path), "--home", str(home), "--scenes", "2"])
    mlm = load_mlm(str(home / "pocket-4"))
    assert torch.equal(mlm.model.state_dict()[word.removeprefix("mlm.")], straight["model"][word].half().float())
    card = (home / "pocket-4" / "README.md").read_text()
    for told in ("make train MODEL=pocket SEED=4", "All gates are met.", f"4 of {trainer.STAGES['all'].steps:,}", "style_match was asked"):
        assert told in card
    assert json.loads((home / "pocket-4" / "curves.json").read_text())["all"] == json.loads((folder / "all" / "curve.json").read_text())


@pytest.mark.parametrize(("found", "pays"), [
    ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True), ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
    ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False), ({"cpu_name": "AMD EPYC"}, False), ({}, False),
])  # fmt: skip
def test_training_is_in_bfloat16_where_that_is_faster(found, pays, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert trainer.computes_bfloat16("cpu") is pays and trainer.computes_bfloat16("cuda")


def test_a_trained_model_is_written_where_kvutils_looks_for_it(tmp_path, monkeypatch, pool):
    torch.manual_seed(0)
    mlm, pair, folder = FAMILY.build_mlm(), FAMILY.build_pair(), tmp_path / "training" / "pocket-1"
    curve = {"step": 5, "seconds": 60.0, "machine": {"device": "CPU", "cores": 2, "processes": 2, "threads": 1, "bfloat16": True},
             "points": [{"step": 5, "loss": 1.0}, {"step": 5, "existence": 0.5}]}  # fmt: skip
    for stage in trainer.STAGES:
        (folder / stage).mkdir(parents=True)
        (folder / stage / "curve.json").write_text(json.dumps(curve))
        module = torch.nn.ModuleDict({"pair": pair} if stage == "encoder" else {"mlm": mlm})
        torch.save({"model": module.state_dict()}, folder / stage / "checkpoint.pt")
    monkeypatch.setattr(export, "evaluate", lambda *a, **k: REPORT)
    home = tmp_path / "home"
    command = ["--out", str(tmp_path / "training"), "--home", str(home), "--scenes", "2"]
    export.main(command)
    assert sorted(path.name for path in home.iterdir()) == ["README.md", "llava-onevision", "llava-onevision-read", "siglip"]
    assert load_siglip_text(str(home / "siglip")).embed("the red car").shape == (128,)
    card, table = (home / "llava-onevision" / "README.md").read_text(), (home / "README.md").read_text()
    assert "All stages together took 0.1 hours" in card and "model before" in card
    assert re.search(r"\[pocket\]\(llava-onevision/README.md\) \| 2.96 \| 6.0 \| 0.900 \[0.800, 0.950\], blind 0.400 .* met \|", table)
    shutil.rmtree(folder / "text")
    export.main([*command, "--card-only"])
    assert "not recorded" in (home / "llava-onevision" / "README.md").read_text()
    monkeypatch.setitem(export.LIMITS_MB, "weights", 1)
    with pytest.raises(ParameterError, match=r"pocket makes 5\.\d+ MB \(weights\), more than the 1 MB"):
        export.main(command)
    for name in FAMILIES:
        assert export.folder_of(export.shipped_name(name, 1)).as_posix() == MODELS[name].source
    assert export.folder_of(export.shipped_name("pocket", 3)).as_posix() == MODELS["pocket-3"].source
    assert [ENCODERS[original_encoder(name)].source.rpartition("/")[2] for name in ("pocket-read", "pocket-3", "pocket-qwen")
            ] == ["siglip", "siglip-3", "siglip"]


def test_muon_is_torchs_up_to_the_rounding_of_bfloat16():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (8, 16), (48, 16), (16, 48), (16, 16))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    both = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    before = [parameter.detach().clone() for parameter in ours]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in both:
            optimizer.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_processes_that_share_muons_work_compute_what_one_does(monkeypatch):
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 3, 8, 16)

    def step():
        parameters = [torch.nn.Parameter(each.clone()) for each in start]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        Muon(parameters, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        return torch.stack(parameters)

    alone, shares = step(), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda share: shares.append(share.clone()))
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        step()
    assert all((share == 0).all(dim=(1, 2)).tolist() == [i % 2 != rank for i in range(3)] for rank, share in enumerate(shares))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda share: share.copy_(shares[0] + shares[1]))
    assert torch.equal(step(), alone)
