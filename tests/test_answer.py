"""Questions over a cached image against the plain model: full prefills, `generate`, one question alone."""

import math
import weakref
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import GraniteConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvutils.answer import YES_NO, ImageSession, SessionBatch, answer_all
from kvutils.block import block_keys
from kvutils.errors import DataError, ImageError, KVUtilsError, ModelError, ParameterError
from kvutils.keys import KeySelection
from kvutils.language import GROUPED
from kvutils.models import wrap_mlm
from kvutils.prompts import PromptTokens, end_tokens
from tests.tiny_models import FAMILIES, WORDS, embedded, hooks, picture, tiny, tiny_next, tiny_pocket

ALL = [*FAMILIES, "pocket"]
QUESTIONS = ["is a red fish on the left ?", "yes", "what colour is the car on the right of this picture ?"]
IMAGES = [picture(50, 40), picture(40, 90), picture(130, 20)]


def scrambled(mlm):
    """Generation ends at two tokens that random models often say, and otherwise where the limit is."""
    mlm.model.generation_config.eos_token_id = [mlm.tokenizer.eos_token_id, 9]
    return mlm


def full(mlm, images, question, prefix=None, answer=""):
    """Inputs of a full prefill, as published: by the processor. The pocket model's and several images' are
    embeddings, because the published classes know no base view of a single image."""
    prompt = f"{mlm.prompt(question, prefix=prefix, images=len(images))} {answer}".strip()
    if not mlm.base_view_only:
        return dict(mlm.processor(text=[prompt], images=images, return_tensors="pt"))
    embeddings, text, _ = embedded(mlm, images, prompt)
    return {"inputs_embeds": embeddings, "attention_mask": text.attention_mask}


@torch.no_grad()
def full_logits(mlm, images, question, prefix=None, answer=""):
    """(1 + words of the answer, vocabulary): logits of what follows the prompt and each word of the answer."""
    return mlm.model(**full(mlm, images, question, prefix, answer)).logits[0, -1 - len(answer.split()) :].float()


@torch.no_grad()
def generated(mlm, images, question, prefix=None, limit=6) -> list[int]:
    """Tokens of `generate` on the full prompt, without the end token."""
    inputs = full(mlm, images, question, prefix)
    length = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    ids = mlm.model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, length:].tolist()
    ends = mlm.model.generation_config.eos_token_id
    return ids[: min([ids.index(end) for end in ends if end in ids], default=len(ids))]


def scores_of(session, questions, options, **intervention):
    """(questions, options) float32 log-probabilities that the answer begins with the option."""
    answers = session.choose(questions, options, 0, **intervention)
    return torch.tensor([list(answer.scores.values()) for answer in answers])


def vocabulary_scores(session, questions, **intervention):
    """(questions, vocabulary) log-probabilities of the next token, read through the session's own scores."""
    tokenizer = session.mlm.tokenizer
    return scores_of(session, questions, WORDS, **intervention), tokenizer.convert_tokens_to_ids(WORDS)


def assert_same(mlm, session, images, prefix=None, questions=QUESTIONS):
    """Next-token log-probabilities and generated tokens are those of full prefills."""
    scores, ids = vocabulary_scores(session, questions)
    answers = session.ask(questions, max_new_tokens=6)
    for question, score, answer in zip(questions, scores, answers, strict=True):
        expected = full_logits(mlm, images, question, prefix)[0].log_softmax(-1)[ids]
        assert torch.allclose(score, expected, atol=1e-5)
        assert list(answer.tokens) == generated(mlm, images, question, prefix)
        assert answer.text == mlm.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()


def assert_alone(mlm, images, answers, options, limit, prefix=None, **intervention):
    """The answers of a batch are those of one session for each of its prompts."""
    for image, row in zip(images, answers, strict=True):
        session = ImageSession(mlm, image, prefix=prefix)
        alone = session.choose([answer.question for answer in row], options, limit, **intervention)
        for one, other in zip(row, alone, strict=True):
            assert (one.tokens, one.text, one.complete) == (other.tokens, other.text, other.complete)
            assert one.scores == pytest.approx(other.scores, abs=1e-5)


def selection(mlm, tokens, layers=(1, 3), share=0.5, seed=0) -> KeySelection:
    rng = np.random.default_rng(seed)
    mask = rng.random((len(layers), mlm.num_kv_heads, tokens)) < share
    return KeySelection("some", torch.from_numpy(mask), layers)


@pytest.mark.parametrize("attention, image, prefix", [("sdpa", 0, None), ("eager", 1, "a red fish")])
@pytest.mark.parametrize("family", ALL)
def test_a_session_is_a_full_prefill(family, attention, image, prefix):
    mlm = scrambled(tiny(family, attention=attention))
    with ImageSession(mlm, IMAGES[image], prefix=prefix) as session:
        assert_same(mlm, session, [IMAGES[image]], prefix)
        if attention == "sdpa" and family != "pocket":  # `generate` must know the tokens of the prompt
            plain = session.ask(QUESTIONS, 6)
            mlm.model.generation_config.repetition_penalty = 3.0
            assert_same(mlm, session, [IMAGES[image]], prefix)
            assert [a.tokens for a in plain] != [a.tokens for a in session.ask(QUESTIONS, 6)]
    # what this would miss: a model that ignores its input
    logits = [full_logits(mlm, [IMAGES[0]], question)[0] for question in QUESTIONS]
    logits.append(full_logits(mlm, [IMAGES[1]], QUESTIONS[0])[0])
    assert all((one - other).abs().max() > 1e-2 for one, other in combinations(logits, 2))


@pytest.mark.parametrize("family, count", [("pocket", 2), ("pocket", 3), ("llava_next", 2), ("qwen2_5_vl", 2)])
def test_several_images_of_one_prompt(family, count):
    mlm, images = scrambled(tiny(family)), IMAGES[:count]
    with ImageSession(mlm, images) as session:
        assert len(session.layouts) == count
        assert_same(mlm, session, images)
        swapped, _ = vocabulary_scores(ImageSession(mlm, images[::-1]), QUESTIONS)
        assert (swapped - vocabulary_scores(session, QUESTIONS)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_prompts_of_different_length_in_one_batch(family):
    mlm = scrambled(tiny(family))
    asked = [QUESTIONS, QUESTIONS[:1], QUESTIONS[1:3]]
    with SessionBatch(mlm, IMAGES, prefix="the car") as batch:
        answers = batch.answer(asked, options=["red", "yes"], max_new_tokens=3)
        assert [[a.question for a in row] for row in answers] == asked
        assert_alone(mlm, IMAGES, answers, ["red", "yes"], 3, prefix="the car")


def test_rows_with_one_image_and_with_two():
    mlm, rows = scrambled(tiny_pocket()), [IMAGES[0], IMAGES[1:]]
    with SessionBatch(mlm, rows) as batch:
        assert repr(batch) == f"SessionBatch({mlm.name}: 17 tokens; 17 tokens and 17 tokens)"
        answers = batch.answer([QUESTIONS[:1], QUESTIONS[:1]], YES_NO, max_new_tokens=6)
    assert_alone(mlm, rows, answers, YES_NO, 6)


@pytest.mark.parametrize("tokens", [1, 16])
def test_how_many_questions_go_together_does_not_matter(monkeypatch, tokens):
    mlm = scrambled(tiny("llava_onevision"))
    session = ImageSession(mlm, IMAGES[0])
    together = session.choose(QUESTIONS, ["a red fish", "yes"], max_new_tokens=4)
    monkeypatch.setattr("kvutils.answer._TOKENS_AT_ONCE", tokens)
    apart = session.choose(QUESTIONS, ["a red fish", "yes"], max_new_tokens=4)
    for one, other in zip(together, apart, strict=True):
        assert one.tokens == other.tokens and one.scores == pytest.approx(other.scores, abs=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_half_precision_runs(family):
    mlm = scrambled(tiny(family))
    mlm.model.to(torch.bfloat16)
    with ImageSession(mlm, IMAGES[0]) as session:
        scores = scores_of(session, QUESTIONS, ["red", "yes"])
        assert scores.dtype == torch.float32 and scores.isfinite().all()
        exact = torch.stack([full_logits(mlm, [IMAGES[0]], q)[0].log_softmax(-1) for q in QUESTIONS])
        ids = mlm.tokenizer.convert_tokens_to_ids(["red", "yes"])
        assert torch.allclose(scores, exact[:, ids], atol=0.2)


@pytest.mark.parametrize("family", ALL)
def test_answers_end_at_every_end_token_and_at_the_limit(family):
    mlm = tiny(family)
    mlm.model.generation_config.eos_token_id = None
    session = ImageSession(mlm, IMAGES[0])
    endless = session.ask(QUESTIONS, max_new_tokens=8)
    assert all(len(answer.tokens) == 8 and not answer.complete for answer in endless)
    assert len({answer.tokens for answer in endless}) > 1
    said = {token for answer in endless for token in answer.tokens}
    never = min(set(range(mlm.model.lm_head.out_features)) - said)
    for end in {answer.tokens[3] for answer in endless}:  # becomes an end token, in second place
        mlm.model.generation_config.eos_token_id = [never, end]
        for before, now in zip(endless, session.ask(QUESTIONS, 8), strict=True):
            length = before.tokens.index(end) if end in before.tokens else 8
            assert now.tokens == before.tokens[:length] and now.complete == (length < 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL)
def test_option_scores_are_sums_over_the_options_tokens(family, attention):
    mlm = tiny(family, attention=attention)
    options = ["yes", "a red fish", "car car"]
    with ImageSession(mlm, IMAGES[0]) as session:
        scores = scores_of(session, QUESTIONS, options)
        assert scores.shape == (len(QUESTIONS), len(options))
        for i, question in enumerate(QUESTIONS):
            for j, option in enumerate(options):
                ids = mlm.tokenizer(option, add_special_tokens=False)["input_ids"]
                logits = full_logits(mlm, [IMAGES[0]], question, answer=option)[:-1]
                expected = logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum()
                assert abs(scores[i, j] - expected) < 1e-5 * len(ids)
        named = scores_of(session, QUESTIONS, {"it is": "yes", "fish": ("a red fish",), "cars": "car car"})  # one spelling each
        assert torch.equal(named, scores)
        with pytest.raises(ParameterError, match="queries 'befor'"):
            session.ask(QUESTIONS, queries="befor")
        # options of one question do not see each other
        alone = torch.cat([scores_of(session, QUESTIONS, [option]) for option in options], dim=1)
        assert torch.allclose(scores, alone, atol=1e-5)


def test_choices_add_spellings_and_may_be_of_each_question():
    mlm = scrambled(tiny_pocket())  # lower-cases everything: "yes", "Yes" and "YES" are one token
    session = ImageSession(mlm, IMAGES[0])
    for answer, score in zip(session.yes_no(QUESTIONS), scores_of(session, QUESTIONS, ["yes", "no"]), strict=True):
        assert list(answer.scores) == list(YES_NO)
        assert list(answer.scores.values()) == pytest.approx(score.tolist(), abs=1e-6)
    spelled = {"either": ("yes", "no", "a red fish"), "fish": ["fish"]}
    (answer,) = session.choose(QUESTIONS[:1], spelled)
    total = scores_of(session, QUESTIONS[:1], ["yes", "no", "a red fish"]).exp().sum().log()
    assert answer.scores["either"] == pytest.approx(float(total), abs=1e-5)
    assert answer.mass == pytest.approx(math.exp(answer.scores["either"]) + math.exp(answer.scores["fish"])) and 0 < answer.mass < 1
    # options of each question
    options = [["red", "blue"], ["a car", "a fish", "this picture"]]
    answers = session.choose(QUESTIONS[:2], options)
    for question, some, answer in zip(QUESTIONS, options, answers, strict=False):
        expected = scores_of(session, [question], some)[0]
        assert list(answer.scores) == some and answer.best == some[int(expected.argmax())]
        assert list(answer.scores.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer.tokens == session.ask([question])[0].tokens
    listed = session.choose(QUESTIONS[:1], options[0])[0].scores
    assert all(session.choose(QUESTIONS[:1], some)[0].scores == listed for some in (np.array(options[0]), (each for each in options[0])))
    with pytest.raises(ParameterError, match="an open question has none: read .text"):
        session.ask(QUESTIONS[:1])[0].best  # noqa: B018
    batch = SessionBatch(mlm, IMAGES[:2])
    nested = batch.answer([QUESTIONS[:2], QUESTIONS[:1]], [options, options[:1]], max_new_tokens=0)
    assert nested[0][1].scores == pytest.approx(answers[1].scores, abs=1e-5)
    assert list(nested[1][0].scores) == options[0] and nested[1][0].text == ""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", ["after", "all"])
@pytest.mark.parametrize("family", ALL)
def test_a_blocked_session_is_a_blocked_full_prefill(family, queries, attention):
    mlm = scrambled(tiny(family, attention=attention))
    image = IMAGES[1]
    with ImageSession(mlm, image, prefix="a red fish") as session:
        layout = session.layouts[0]
        block = selection(mlm, len(layout))
        plain, ids = vocabulary_scores(session, QUESTIONS)
        scores, _ = vocabulary_scores(session, QUESTIONS, block=block, queries=queries)
        answers = session.ask(QUESTIONS, 4, block=block, queries=queries)
        assert (scores - plain).abs().max() > 1e-3
        for question, score, answer in zip(QUESTIONS, scores, answers, strict=True):
            with block_keys(mlm, block, layout, queries=queries):
                expected = full_logits(mlm, [image], question, "a red fish")[0].log_softmax(-1)[ids]
                tokens = generated(mlm, [image], question, "a red fish", limit=4)
            assert torch.allclose(score, expected, atol=1e-5)
            assert list(answer.tokens) == tokens
        # nothing is left behind, neither in the model nor in the cache; an empty block changes no bit
        assert torch.equal(vocabulary_scores(session, QUESTIONS)[0], plain)
        nothing = selection(mlm, len(layout), share=0)
        assert torch.equal(vocabulary_scores(session, QUESTIONS, block=nothing, queries=queries)[0], plain)


def test_how_often_text_and_images_are_read():
    """With queries="after" the image is read once for all blocks, with "all" again by the text model alone."""
    mlm = scrambled(tiny_pocket())
    lengths, pictures = [], []
    inner = mlm.model.model

    def passed(_, args, kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])

    inner.language_model.register_forward_pre_hook(passed, with_kwargs=True)
    inner.vision_tower.register_forward_pre_hook(lambda *_: pictures.append(1))
    session = ImageSession(mlm, IMAGES[0])
    assert lengths == [17]
    session.yes_no(QUESTIONS * 3, max_new_tokens=1)
    assert len(lengths) == 2, "one token is one pass"
    block = selection(mlm, len(session.layouts[0]))
    scores_of(session, QUESTIONS, ["yes"], block=block)
    assert len(lengths) == 3
    scores_of(session, QUESTIONS, ["yes"], block=block, queries="all")
    assert lengths[3] == 17 and len(lengths) == 5 and len(pictures) == 1


def test_blocks_over_several_images_and_in_batches():
    mlm = scrambled(tiny_pocket())
    with ImageSession(mlm, IMAGES[:2]) as session:
        slots = np.concatenate([layout.slots for layout in session.layouts])
        block = selection(mlm, len(slots))
        scores, ids = vocabulary_scores(session, QUESTIONS[:1], block=block)
        with block_keys(mlm, block, slots):
            expected = full_logits(mlm, IMAGES[:2], QUESTIONS[0])[0].log_softmax(-1)[ids]
        assert torch.allclose(scores[0], expected, atol=1e-5)
    for family in ("qwen2_5_vl", "llava_onevision"):
        mlm = scrambled(tiny(family))
        images = [picture(50, 40, seed) for seed in range(2)]
        with SessionBatch(mlm, images) as batch:
            block = selection(mlm, len(batch.layouts[0][0]))
            for queries in ("after", "all"):
                rows = batch.answer([QUESTIONS, QUESTIONS[1:]], ["red"], 3, block=block, queries=queries)
                assert_alone(mlm, images, rows, ["red"], 3, block=block, queries=queries)


@pytest.mark.parametrize("family", ALL)
def test_the_model_is_as_it_was(family):
    mlm = scrambled(tiny(family))
    inner, marker = mlm.model.model, torch.tensor([[7]])
    ImageSession(mlm, IMAGES[0]).close()  # transformers gives the vision tower hooks of its own, to stay
    hooked = hooks(mlm)
    before = full_logits(mlm, [IMAGES[0]], QUESTIONS[0])
    if family == "qwen2_5_vl":
        inner.rope_deltas = marker  # as some other prompt left it
    with ImageSession(mlm, IMAGES[1]) as session:
        block = selection(mlm, len(session.layouts[0]))
        session.yes_no(QUESTIONS)
        session.yes_no(QUESTIONS, block=block, queries="all")
        with pytest.raises(KVUtilsError):
            session.ask(QUESTIONS, block=selection(mlm, 3))
    if family == "qwen2_5_vl":
        assert inner.rope_deltas is marker
    assert hooks(mlm) == hooked and mlm.attention == "sdpa" and not mlm.model.training
    assert torch.equal(full_logits(mlm, [IMAGES[0]], QUESTIONS[0]), before)


@pytest.mark.parametrize("family", ALL)
def test_attention_is_given_keys_and_masks_once_per_kv_head(family, monkeypatch):
    mlm = tiny(family)
    heads, each, seen = mlm.num_kv_heads, mlm.num_heads // mlm.num_kv_heads, []

    def compared(module, query, key, value, attention_mask, **options):
        found = grouped(module, query, key, value, attention_mask, **options)
        mask = attention_mask if attention_mask.shape[1] == 1 else attention_mask.repeat_interleave(each, dim=1)
        repeated = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)
        seen.append((module.layer_idx, key.shape[1], attention_mask.shape[1]))
        torch.testing.assert_close(found[0], repeated[0], rtol=0, atol=1e-6)
        return found

    grouped = ALL_ATTENTION_FUNCTIONS[GROUPED]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, GROUPED, compared)
    with ImageSession(mlm, IMAGES[0]) as session:
        session.yes_no(QUESTIONS, block=selection(mlm, len(session.layouts[0])))
    assert set(seen) == {(layer, heads, heads if layer in (1, 3) else 1) for layer in range(mlm.num_layers)}


def test_closing_frees_the_memory():
    mlm = scrambled(tiny("llava_onevision"))
    with pytest.raises(ParameterError, match="at least one"), ImageSession(mlm, IMAGES[0]) as session:
        session.choose(QUESTIONS, ["yes", "a red fish"], 2)
        tensors = [tensor for pair in session._prefix.keys_values for tensor in pair] + [session._embeddings]
        references = [weakref.ref(tensor) for tensor in tensors]
        del tensors
        assert all(reference() is not None for reference in references)
        session.ask([])
    assert all(reference() is None for reference in references)
    for ask in (session.ask, lambda asked: scores_of(session, asked, ["yes"])):
        with pytest.raises(ParameterError, match="closed"):
            ask(QUESTIONS)
    session.close()  # twice is fine
    assert len(session.layouts) == 1 and repr(session).endswith("; closed)")


QUESTION_FIRST = (
    "{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}{% endfor %} yes"
)
QUESTION_TWICE = (
    "{% for m in messages %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'][:3] }} {% endfor %}<image> "
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template, message", [(QUESTION_FIRST, "after the image"), (QUESTION_TWICE, "cached")])
def test_prompts_that_cannot_share_an_image(template, message):
    mlm = tiny_pocket()
    mlm.processor.chat_template = template
    with pytest.raises(ParameterError, match=message):
        ImageSession(mlm, IMAGES[0]).ask(["red car ?"])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answer_all_is_a_session_per_image_and_block(batch_size):
    mlm = scrambled(tiny_pocket())
    samples = [(f"image-{i}", image, QUESTIONS[i:]) for i, image in enumerate(IMAGES)]
    blocks = {"none": None, "some": selection(mlm, 17), "other": selection(mlm, 17, (0, 2), seed=1)}
    found = list(answer_all(mlm, iter(samples), blocks, options=YES_NO, max_new_tokens=2, batch_size=batch_size))
    assert [image_id for image_id, _ in found] == ["image-0", "image-1", "image-2"]
    assert all(list(answers) == list(blocks) for _, answers in found)
    for name, block in blocks.items():
        rows = [answers[name] for _, answers in found]
        assert [[answer.question for answer in row] for row in rows] == [questions for _, _, questions in samples]
        assert_alone(mlm, IMAGES, rows, YES_NO, 2, block=block)


def test_the_states_that_several_blocks_share_are_given_to_granite_as_it_scales_them():
    """Its forward multiplies the embeddings that it is given; the blocks' common states have been multiplied before."""
    mlm = scrambled(tiny_next(language=GraniteConfig, embedding_multiplier=12.0))
    with ImageSession(mlm, IMAGES[0]) as session:
        block = selection(mlm, len(session.layouts[0]), (2, 3))
    ((_, answers),) = answer_all(mlm, [("0", IMAGES[0], QUESTIONS)], {"none": None, "some": block}, options=YES_NO, max_new_tokens=2)
    for name, each in (("none", None), ("some", block)):
        assert_alone(mlm, IMAGES[:1], [answers[name]], YES_NO, 2, block=each)


def test_answers_stay_behind_their_questions_where_one_row_begins_with_a_long_one():
    """Groups of so many tokens are opened by rows in turn: the long question of the first row opens the second group first."""
    mlm = tiny_pocket(max_position_embeddings=4096)
    rows = [["red " * 300], [f"{word} car ?" for word in ("red", "blue") * 40]]
    with SessionBatch(mlm, IMAGES[:2]) as batch:
        assert [[each.question for each in row] for row in batch.answer(rows, max_new_tokens=1)] == rows


def test_what_is_longer_than_the_model_was_made_for_is_refused():
    mlm = tiny_pocket(max_position_embeddings=40)
    with ImageSession(mlm, IMAGES[0]) as session, pytest.raises(ParameterError, match="tokens are more than the 40 that .* made for"):
        session.ask(["red " * 40])
    with pytest.raises(ParameterError, match="fewer or smaller pictures, or less text"):
        ImageSession(mlm, IMAGES[0], prefix="red " * 40)


def test_answer_all_reads_every_image_once_and_no_more_than_asked(capsys):
    mlm = tiny_pocket()
    taken, pictures = [], []

    def samples():
        for number in range(100):
            taken.append(number)
            yield str(number), IMAGES[0], ["what is this ?"]

    hook = mlm.model.model.vision_tower.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0])))
    found = answer_all(mlm, samples(), {"a": None, "b": selection(mlm, 17)}, max_new_tokens=1, batch_size=4)
    first = [next(found) for _ in range(5)]
    hook.remove()
    assert list(first[0][1]) == ["a", "b"] and len(taken) == 8 and pictures == [4, 4]
    assert capsys.readouterr().err == ""
    list(answer_all(mlm, [("0", IMAGES[0], ["yes"])], max_new_tokens=1, progress=True))
    assert "1/1" in capsys.readouterr().err


def test_spellings_that_continue_another_and_options_alike():
    mlm = tiny("llava_onevision")
    tokens = PromptTokens(mlm)
    (red,), (fish,) = (mlm.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("red", "fish"))
    assert tokens.options({"a": ["red fish", "red"], "b": ["fish"]}) == {"a": [[red]], "b": [[fish]]}  # what begins so begins with "red"
    with ImageSession(mlm, picture(40, 32, 0)) as session:
        one, two = (session.choose(QUESTIONS[:1], {"a": texts, "b": ["fish"]}, 0)[0] for texts in (["red"], ["red", "red fish", "red red"]))
    assert one.scores == two.scores and one.mass <= 1
    with pytest.raises(ParameterError, match="with 'a' may also begin with 'b' .*: the same tokens"):
        tokens.options({"a": ["red"], "b": ["fish", "red"]})


def test_a_question_in_characters_that_the_model_does_not_know_is_said_once():
    with ImageSession(tiny_pocket(), IMAGES[0]) as session, pytest.warns(UserWarning, match="no token for some characters of 'what is 日本 .'") as said:
        session.ask([*QUESTIONS, "what is 日本 ?"], 1)
        session.ask([*QUESTIONS, "what is 日本 ?"], 1)
    assert len(said) == 1


@pytest.mark.parametrize("images", [[], [[]], [IMAGES[0], []], None, [None], ["gone.png"]])
def test_no_image(images):
    with pytest.raises(ImageError):
        SessionBatch(tiny_pocket(), images)
    with pytest.raises(ImageError):
        ImageSession(tiny_pocket(), [] if images is None else images)


def test_bad_questions_and_options():
    mlm = tiny_pocket()
    session, batch = ImageSession(mlm, IMAGES[0]), SessionBatch(mlm, IMAGES[:2])
    cases = [
        (lambda: session.ask([]), "at least one"),
        (lambda: session.ask("what is this ?"), "list"),
        (lambda: session.ask(["  "]), "at least one word"),
        (lambda: session.ask([None]), "None"),
        (lambda: session.ask(["what is <image> ?"]), "<image>"),
        (lambda: session.ask(QUESTIONS, max_new_tokens=0), "max_new_tokens"),
        (lambda: session.ask(QUESTIONS, queries="before", block=selection(mlm, 17)), "before"),
        (lambda: scores_of(session, QUESTIONS, []), "at least one"),
        (lambda: scores_of(session, QUESTIONS, "yes"), "options must"),
        (lambda: scores_of(session, QUESTIONS, ["yes", " "]), "no tokens"),
        (lambda: scores_of(session, QUESTIONS, ["yes", "zebra"]), "zebra"),
        (lambda: scores_of(session, QUESTIONS, ["yes", "yes"]), "different"),
        (lambda: scores_of(session, QUESTIONS, {"yes": []}), "no tokens"),
        (lambda: session.choose(QUESTIONS, [["yes"], ["no"]]), "options for"),
        (lambda: batch.answer([QUESTIONS]), "2 prompts"),
        (lambda: batch.answer("ab"), "2 prompts"),
        (lambda: batch.answer([QUESTIONS, []]), "at least one"),
        (lambda: batch.answer([["yes"]] * 2, ["yes", ["no"]]), "options must"),
        (lambda: list(answer_all(mlm, [], batch_size=0)), "batch_size"),
    ]
    for call, words in cases:
        with pytest.raises(ParameterError, match=words):
            call()
    with pytest.raises(DataError, match="17"):
        session.ask(QUESTIONS, block=selection(mlm, 5))
    assert session.ask(QUESTIONS, 2) and math.isfinite(scores_of(session, QUESTIONS[:1], ["yes"])[0, 0])
    assert list(answer_all(mlm, [])) == []


def test_a_block_needs_one_token_grid_and_several_images_base_views():
    mlm = tiny("llava_onevision")
    with SessionBatch(mlm, IMAGES[:2]) as batch:
        counts = [len(row[0]) for row in batch.layouts]
        with pytest.raises(DataError, match=f"{min(counts)}, {max(counts)}"):
            batch.answer([QUESTIONS[:1]] * 2, block=selection(mlm, counts[0]))
    with pytest.raises(ParameterError, match="base views"):
        ImageSession(mlm, IMAGES[:2])
    with ImageSession(replace(mlm, base_view_only=True), IMAGES[:2]) as session:
        assert len(session.layouts) == 2 and len(session.ask(QUESTIONS, 2)) == 3


def test_attention_that_takes_no_mask():
    mlm = tiny_pocket()
    mlm.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="sdpa"):
        ImageSession(mlm, IMAGES[0])
    sliding = tiny_pocket(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ModelError, match="sliding"):
        ImageSession(wrap_mlm(sliding.model, sliding.processor), IMAGES[0])


@pytest.mark.parametrize("named", [None, 7, [8, 9]])
@pytest.mark.parametrize("family, end", [("llava_onevision", "<|im_end|>"), ("llava_next", "<|eot_id|>"), ("qwen2_5_vl", "<|im_end|>")])
def test_published_models_end_where_their_template_ends_a_turn(published, monkeypatch, family, end, named):
    """generation_config of LLaVA-NeXT may name 128001, 128009, or be missing; the template writes <|eot_id|>."""
    mlm = published(family)
    monkeypatch.setattr(mlm.model.generation_config, "eos_token_id", named)
    end = mlm.tokenizer.convert_tokens_to_ids(end)
    assert end_tokens(mlm) == {end, *np.atleast_1d(named)} - {None}
    said, step = mlm.tokenizer("No", add_special_tokens=False)["input_ids"] + [end] * 2, iter(range(9))

    def always(module, inputs, output):
        return torch.nn.functional.one_hot(torch.tensor([said[next(step)]] * len(output)), output.shape[-1]).float()

    hook = mlm.model.lm_head.register_forward_hook(always)
    try:
        with ImageSession(replace(mlm, base_view_only=family == "llava_onevision"), picture(30, 30)) as session:
            (answer,) = session.ask(["Is it?"])
    finally:
        hook.remove()
    assert (answer.text, answer.complete, len(answer.tokens)) == ("No", True, 1)


CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
CHATML_IDS = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
LLAMA_TURN, LLAMA_END = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
)


@pytest.mark.parametrize("family, form, before, image, between, line, behind, ids, tail", [
    ("llava_onevision", "paper", "<|im_start|>user ", "<image>", "", "\n", "<|im_end|><|im_start|>assistant\n",
     [151644, 872, 220], [198, 3872, 432, 30, 151645, 151644, 77091, 198]),
    ("llava_onevision", "lmms-eval", CHATML, "<image>", " ", "\n", "<|im_end|>\n<|im_start|>assistant\n",
     CHATML_IDS, [198, 3872, 432, 30, 151645, 198, 151644, 77091, 198]),
    ("qwen2_5_vl", "paper", CHATML, "<|vision_start|><|image_pad|><|vision_end|>", "", "", "<|im_end|>\n<|im_start|>assistant\n",
     [*CHATML_IDS, 151652], [151653, 3872, 432, 30, 151645, 198, 151644, 77091, 198]),
    ("qwen2_5_vl", "lmms-eval", CHATML, "<|vision_start|><|image_pad|><|vision_end|>", "", "", "<|im_end|>\n<|im_start|>assistant\n",
     [*CHATML_IDS, 151652], [151653, 3872, 432, 30, 151645, 198, 151644, 77091, 198]),
    ("llava_next", "paper", LLAMA_TURN, "<image>", "", "\n", LLAMA_END,
     [128000, 128006, 882, 128007, 271], [198, 3957, 433, 30, 128009, 128006, 78191, 128007, 271]),
    ("llava_next", "lmms-eval", LLAMA_SYSTEM + LLAMA_TURN, "<image>", " ", "\n", LLAMA_END,
     [128000, 128006, 9125, 128007, 271, 2675, 527, 264, 11190, 4221, 323, 11376, 18328, 13, 1472, 527, 3025, 311, 3619, 279, 9302, 2262, 430, 279,
      1217, 5825, 11, 323, 7945, 279, 1217, 449, 264, 8205, 315, 9256, 1701, 5933, 4221, 13, 128009, 128006, 882, 128007, 271],
     [198, 3957, 433, 30, 128009, 128006, 78191, 128007, 271]),
])  # fmt: skip
def test_prompts_of_every_form(published, family, form, before, image, between, line, behind, ids, tail):
    """Text and tokens as the hub's template, or LLaVA-NeXT's repository under lmms-eval, writes them."""
    mlm = replace(published(family), prompts=form)
    assert mlm.prompt("Is it?") == before + image + line + "Is it?" + behind and mlm.settings["prompts"] == form
    assert mlm.prompt("Which?", images=2) == before + image + between + image + line + "Which?" + behind
    assert mlm.prompt("Is it?", " Look").startswith(before + {"paper": line}.get(form, "") + " Look" + line + image)
    tokens = PromptTokens(mlm)
    assert (tokens.head(1), tokens.tail("Is it?", 1)) == ([*ids, mlm.image_token_id], tail)
    assert end_tokens(mlm) == end_tokens(published(family))


def test_a_form_that_a_model_cannot_read():
    with pytest.raises(ParameterError, match="does not know the words"):
        replace(tiny_pocket(), prompts="lmms-eval")
    with pytest.raises(ParameterError, match="paper, lmms-eval"):
        replace(tiny_pocket(), prompts="chat")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("broken, named", [
    ("vision", "embeddings of text and images"), ("layer", "output of layer 1"), ("keys", "keys of layer 2"), ("last", "layer 4, the last"),
])  # fmt: skip
def test_logits_that_are_not_finite_are_no_answer(broken, named, dtype):
    """They would be "!!!!", and POPE's reading of that is yes."""
    mlm = tiny("llava_onevision")
    layers = mlm.model.model.language_model.layers
    module = {"vision": mlm.model.model.multi_modal_projector.linear_2, "layer": layers[1].mlp.down_proj,
              "keys": layers[2].self_attn.k_proj, "last": layers[4].mlp.down_proj}[broken]  # fmt: skip
    module.register_forward_hook(lambda *parts: parts[-1] * 1e5 * torch.finfo(dtype).max)
    mlm.model.to(dtype)
    for options, limit in ((None, 2), (YES_NO, 0)):
        with pytest.raises(ModelError, match=f"{str(dtype)[6:]} has logits that are not finite.*{named}.*bfloat16"):
            ImageSession(mlm, IMAGES[0]).choose(QUESTIONS[:1], options, limit)
