"""The pocket world, its questions, the packing of training batches, and training itself on a few steps."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe import train, trainer
from recipe.evaluate import answer_blocks, balanced_samples, missed_gates
from recipe.model import IMAGE_SLOTS, answer_logits, build_mlm, build_siglip, encode_windows, image_embeddings, patch_windows
from recipe.muon import Muon
from recipe.packing import IGNORE, TOKEN, encode, pack, pixel_batch
from recipe.pool import make_pool
from recipe.samples import KINDS, Sample, Sampler, ask_about_all
from recipe.start import SHIPPED, add_places, load_places, match_words
from recipe.symbolic import SymbolicImage, mark_loss, place_loss
from recipe.tokenizer import WORDS, build_pocket_processor

from kvutils.datasets.pocket import questions as q
from kvutils.datasets.pocket.shapes import CLASSES, KEYPOINTS, PARTS, SILHOUETTES
from kvutils.datasets.pocket.world import COLOURS, Scene, Thing, render, sample_kind, sample_scene
from kvutils.errors import ParameterError
from kvutils.models import wrap_mlm


@pytest.fixture(scope="module")
def pool():
    return make_pool(500, seed=9, processes=1, quiet=True)


@pytest.fixture(scope="module")
def mlm():
    torch.manual_seed(0)
    return build_mlm().eval()


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
    assert dict(found for _ in range(60) if (found := q.ask(facts, kind, rng, KINDS))) == expected


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


def test_every_word_is_in_the_vocabulary(pool):
    sampler, rng = Sampler(pool), np.random.default_rng(1)
    for kind in train.SEQUENCES:
        for sample in sampler.draw(kind, 30, rng):
            for _, question, answer in sample.blocks:
                assert encode(question) and encode(answer)
            encode(sample.prefix)


def test_a_packed_block_is_the_prompt_the_model_meets_at_inference(pool, mlm):
    """Logits of every block of a packed batch equal those of `prefix + image + question` through the chat template,
    the processor and the model's own forward, one at a time."""
    wrapped = wrap_mlm(mlm, build_pocket_processor(list(WORDS)), base_view_only=True)
    blocks = [("colour", "what colour is the fish ?", "red"), ("caption", "describe the image .", "a red fish"),
              ("count", "how many things are there ?", "one")]  # fmt: skip
    samples = [Sample([0], blocks, [[]], "look for the fish"), Sample([1, 2], blocks[:2], [[], []])]
    packed = pack(samples, IMAGE_SLOTS)
    pixels = pixel_batch(pool, packed.images)
    with torch.no_grad():
        found = answer_logits(mlm, packed, image_embeddings(mlm, pixels))
        start = 0
        sizes, number = torch.tensor([[96, 96]] * len(pixels)), torch.tensor([len(pixels)])  # several images are not tiled
        features = mlm.model.get_image_features(pixels[:, None], sizes, batch_num_images=number)
        features = torch.stack(list(getattr(features, "pooler_output", features)))
        for sample, images in zip(samples, (features[:1], features[1:]), strict=True):
            for _, question, answer in sample.blocks:
                prompt = wrapped.prompt(question, sample.prefix or None, images=len(sample.images))
                text = f"{prompt} {answer}".replace("<image>", " ".join(["<image>"] * IMAGE_SLOTS))
                ids = wrapped.tokenizer(text, return_tensors="pt").input_ids
                tokens = mlm.get_input_embeddings()(ids)
                tokens = tokens.masked_scatter((ids == TOKEN["<image>"])[..., None], images)
                wanted = mlm(inputs_embeds=tokens).logits[0, -len(answer.split()) - 1 :]
                assert torch.allclose(found[start : start + len(wanted)], wanted, atol=1e-4)
                start += len(wanted)
    assert start == len(found)


def test_question_first_samples_answer_behind_the_image():
    packed = pack([Sample([0], [("count", "how many things are there ?", "one")], [[]], question_first=True)], IMAGE_SLOTS)
    words = {v: k for k, v in TOKEN.items()}
    text = [words[int(t)] for t in packed.tokens[0]]
    assert text[:6] == "how many things are there ?".split() and text[-2:] == [":", "one"]
    assert [words[int(t)] for t in packed.labels[0] if t != IGNORE] == ["one", "<eos>"]


def test_marks_that_read_as_their_letters_and_tokens_that_hold_their_place_lose_nothing(mlm):
    words, images = mlm.get_input_embeddings(), [(0, []), (1, [("a", 20.0, 30.0), ("r", 95.9, 0.0)])]
    tokens = torch.zeros(2, IMAGE_SLOTS, words.embedding_dim)
    flat = mark_loss(words, tokens, images)
    assert flat == pytest.approx(np.log(5) + np.log(144))
    tokens[1, 3 * 12 + 2] = 5 * words.weight[TOKEN["(a)"]].detach()
    tokens[1, 11] = 5 * words.weight[TOKEN["reference"]].detach()
    right = mark_loss(words, tokens, images)
    assert right < 0.05 < mark_loss(words, tokens, [(0, []), (1, [("b", 20.0, 30.0), ("r", 95.9, 0.0)])])
    assert right < 0.05 < mark_loss(words, tokens, [(0, []), (1, [("a", 28.0, 30.0), ("r", 95.9, 0.0)])])
    assert mark_loss(words, tokens, [(0, []), (1, [])]) == 0
    columns, rows = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
    told = torch.zeros(2, IMAGE_SLOTS, 128)
    assert place_loss(columns, rows, told) > 3
    for row in range(12):
        for column in range(12):
            told[:, 12 * row + column] = 2 * (columns[column // 2] + rows[row // 2])
    assert place_loss(columns, rows, told) < 0.1
    # What all tokens share says nothing of places, and does not hide them.
    assert place_loss(columns + 3, rows, told) == pytest.approx(float(place_loss(columns, rows, told)), abs=1e-3)
    swapped = told[:, :144].reshape(2, 12, 12, -1).transpose(1, 2).reshape(2, 144, -1)
    assert place_loss(columns, rows, torch.cat((swapped, told[:, 144:]), dim=1)) > 2


def test_the_symbolic_image_says_where_its_cells_are(mlm, pool):
    symbolic, words = SymbolicImage(), mlm.get_input_embeddings()
    with torch.no_grad():
        before = symbolic(words, pool, [(0, []), (1, [])], seed=0)
        symbolic.columns[4] += 1  # a shift of one column, so of the noise's scale there as well
        moved = (symbolic(words, pool, [(0, []), (1, [])], seed=0) - before).abs().amax(-1) > 0
    assert moved[:, :36].unflatten(1, (6, 6))[:, :, 4].all() and moved.sum() == 12


def test_places_come_from_the_text_stage_trained_here_or_shipped(tmp_path, monkeypatch):
    shipped = load_places(tmp_path)
    assert [codes.shape for codes in shipped] == [(6, 128), (6, 128)]
    (tmp_path / "language").mkdir()
    trained = {f"symbolic.{name}": codes + 1 for name, codes in zip(("columns", "rows"), shipped, strict=True)}
    torch.save({"model": trained}, tmp_path / "language" / "checkpoint.pt")
    assert torch.equal(load_places(tmp_path)[1], shipped[1] + 1)
    monkeypatch.setitem(SHIPPED, "language", tmp_path)
    with pytest.raises(ParameterError, match="--stage language"):
        load_places(tmp_path / "elsewhere")


def test_the_tower_can_read_off_where_a_patch_is(pool):
    torch.manual_seed(0)
    mlm, pixels = build_mlm(), pixel_batch(pool, [(row, []) for row in range(32)])
    tower = mlm.model.vision_tower.embeddings
    before = tower.position_embedding.weight.detach().clone()
    add_places(mlm, pixels)
    added = tower.position_embedding.weight.detach() - before
    patches = tower.patch_embedding(pixels).detach().flatten(2).transpose(1, 2)
    assert added.norm(dim=-1).mean().item() == pytest.approx(0.35 * patches.norm(dim=-1).mean().item(), rel=1e-4)
    # Column and row of a patch are linear in patch and place together; in what was there before they are not.
    column, row = torch.arange(12.0).repeat(12), torch.arange(12.0).repeat_interleave(12)
    wanted = torch.stack((column, row), dim=1).repeat(32, 1) - 5.5
    for places, low, high in ((before, -1, 0.6), (before + added, 0.95, 1)):
        found = (patches + places).flatten(0, 1)
        found = torch.cat((found, torch.ones(len(found), 1)), dim=1)
        fitted = found @ torch.linalg.lstsq(found[: 16 * 144], wanted[: 16 * 144]).solution
        left = (wanted - fitted)[16 * 144 :].square().mean(0) / wanted.square().mean(0)
        assert (low < 1 - left).all() and (1 - left <= high).all()


def test_the_projector_stage_begins_with_tokens_as_long_as_words(pool):
    torch.manual_seed(0)
    mlm, pixels = build_mlm().eval(), pixel_batch(pool, [(row, []) for row in range(16)])
    before = image_embeddings(mlm, pixels).detach()
    match_words(mlm, pixels)
    after = image_embeddings(mlm, pixels).detach()
    wanted = mlm.get_input_embeddings().weight.detach().norm(dim=-1).mean().item()
    assert after[:, :-1].norm(dim=-1).mean().item() == pytest.approx(wanted, rel=1e-4)
    assert after[0, -1].norm().item() == pytest.approx(wanted, rel=1e-4)
    scale = after[:, :-1].norm() / before[:, :-1].norm()
    assert torch.allclose(after[:, :-1], scale * before[:, :-1], atol=1e-5)


def test_full_windows_are_the_siglip_of_the_class(pool):
    torch.manual_seed(0)
    siglip = build_siglip().eval()
    pixels = pixel_batch(pool, [(0, []), (1, [])])
    with torch.no_grad():
        window, ids = patch_windows(pixels, torch.zeros(2, 2, dtype=torch.long), 12)
        assert torch.equal(window, pixels)
        assert torch.allclose(encode_windows(siglip, window, ids), siglip.vision_model(pixels).pooler_output, atol=1e-5)
        part, part_ids = patch_windows(pixels, torch.tensor([[2, 3], [0, 5]]), 7)
        assert torch.equal(part[0], pixels[0, :, 16:72, 24:80]) and part_ids[0, 0] == 2 * 12 + 3


def test_triples_and_pairs_have_one_right_answer(pool):
    sampler, rng = Sampler(pool), np.random.default_rng(0)
    for sample in sampler.draw("style_match", 20, rng):
        style = [int(pool.style[row]) for row in sample.images]
        assert (style[1] == style[0]) != (style[2] == style[0])
        assert sample.blocks[0][2] == ("(a)" if style[1] == style[0] else "(b)")

    def part_at(row, mark):
        return int(np.hypot(*(pool.keypoints[row, 0, :, :2] - mark[1:]).T).argmin())

    for sample in sampler.draw("correspondence", 40, rng):
        for kind, question, answer in sample.blocks:
            if kind in ("correspondence", "counterpart"):
                (asked,) = [mark for mark in sample.marks[0] if kind == "correspondence" or f"({mark[0]})" in question]
                (given,) = [mark for mark in sample.marks[1] if f"({mark[0]})" == answer]
                assert part_at(sample.images[0], asked) == part_at(sample.images[1], given)


def test_evaluation_balances_the_answers_and_says_which_gates_are_missed(pool, mlm):
    samples = balanced_samples(pool, "existence", 60, seed=1)
    answers = [s.blocks[0][2] for s in samples]
    assert answers.count("yes") == answers.count("no") > 20
    with torch.no_grad():
        right = answer_blocks(mlm, samples, lambda images: image_embeddings(mlm, pixel_batch(pool, images)), IMAGE_SLOTS)
    assert len(right) == len(samples) and not all(r[0] for r in right)
    report = {"existence": {"accuracy": dict(mean=0.6, low=0.55), "blind": dict(mean=0.5, high=0.56), "majority": 0.5}}
    missed = missed_gates(report)
    assert len(missed) == 2 and "gate 0.85" in missed[0] and "not clearly above blind" in missed[1]


def _train(stage, steps, monkeypatch, folder):
    monkeypatch.setattr("recipe.start.SHIPPED", {})
    monkeypatch.setattr(train, "fast", lambda model, device: model)  # nothing to compile for a few steps
    train.main(["--stage", stage, "--steps", str(steps), "--scenes", "500", "--device", "cpu", "--ranks", "1", "--quiet",
                "--out", str(folder)])  # fmt: skip
    return torch.load(folder / stage / "checkpoint.pt", weights_only=True)


@pytest.mark.slow
def test_stages_say_what_they_need_follow_each_other_and_resume(tmp_path, monkeypatch):
    with pytest.raises(ParameterError, match="'language' must be trained first"):
        _train("projector", 1, monkeypatch, tmp_path)
    with pytest.raises(ParameterError, match="needs one stage"):
        train.main(["--start-from", str(tmp_path)])
    with pytest.raises(ParameterError, match="config.json is missing"):
        train.main(["--stage", "all", "--start-from", str(tmp_path)])
    small = {name: replace(stage, scenes=4, horizon=20) for name, stage in trainer.STAGES.items()}
    monkeypatch.setattr(trainer, "STAGES", small)
    monkeypatch.setattr(train, "quick_accuracy", lambda *a, **k: {"existence": 0.5})
    for stage in trainer.STAGES:
        assert _train(stage, 2, monkeypatch, tmp_path)["step"] == 2
    resumed = _train("all", 4, monkeypatch, tmp_path)
    (tmp_path / "all" / "checkpoint.pt").unlink()
    straight = _train("all", 4, monkeypatch, tmp_path)
    assert resumed["step"] == straight["step"] == 4
    assert all(torch.allclose(resumed["model"][k], v, atol=1e-6) for k, v in straight["model"].items())
    stored = (torch.load(tmp_path / stage / "checkpoint.pt", weights_only=True) for stage in ("projector", "language"))
    frozen, language = (each["model"] for each in stored)
    key = "mlm.model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(frozen[key], language[key]) and not torch.equal(straight["model"][key], language[key])
    assert json.loads((tmp_path / "all" / "curve.json").read_text())


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
