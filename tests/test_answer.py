"""Questions over a cached image against the plain model: full prefills, `generate`, one question alone."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, WORDS, tiny, tiny_pocket

from kvutils.answer import YES_NO, ImageSession, SessionBatch, answer_all
from kvutils.block import block_keys
from kvutils.errors import DataError, ImageError, KVUtilsError, ModelError, ParameterError
from kvutils.keys import KeySelection
from kvutils.models import wrap_mlm
from kvutils.prompts import prepare_text
from kvutils.vision import encode_images, prepare_images

ALL = [*FAMILIES, "pocket"]
QUESTIONS = ["is a red fish on the left ?", "yes", "what colour is the car on the right of this picture ?"]


def picture(width, height, seed=0) -> Image.Image:
    rng = np.random.default_rng([seed, width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [picture(50, 40), picture(40, 90), picture(130, 20)]


def scrambled(mlm, **settings):
    """Generation ends at two tokens that random models often say, and otherwise where the limit is."""
    mlm.model.generation_config.eos_token_id = [mlm.tokenizer.eos_token_id, 9]
    for name, value in settings.items():
        setattr(mlm.model.generation_config, name, value)
    return mlm


def full(mlm, images, question, prefix=None):
    """Inputs of a full prefill, as published: by the processor. The pocket model's and several images' are
    embeddings, because the published classes know no base view of a single image."""
    prompt = mlm.prompt(question, prefix=prefix, images=len(images))
    if mlm.base_view_only:
        vision = prepare_images(mlm, images)
        text = prepare_text(mlm, [prompt], vision, images_only=False)
        embeddings = mlm.model.get_input_embeddings()(text.input_ids)
        _, tokens = encode_images(mlm, vision)
        embeddings[text.input_ids == mlm.image_token_id] = torch.cat(tokens)
        return {"inputs_embeds": embeddings, "attention_mask": text.attention_mask}
    return dict(mlm.processor(text=[prompt], images=images, return_tensors="pt"))


@torch.no_grad()
def full_logits(mlm, images, question, prefix=None, answer=()):
    """(1 + len(answer), vocabulary): logits of what follows the prompt and each token of the answer."""
    inputs = full(mlm, images, question, prefix)
    extra = torch.tensor([answer], dtype=torch.long)
    if answer and "input_ids" in inputs:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], 1)
        if "mm_token_type_ids" in inputs:
            zeros = torch.zeros_like(extra).to(inputs["mm_token_type_ids"])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], 1)
    elif answer:
        more = mlm.model.get_input_embeddings()(extra)
        inputs["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], more], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1)
    return mlm.model(**inputs).logits[0, -1 - len(answer) :].float()


@torch.no_grad()
def generated(mlm, images, question, prefix=None, limit=6) -> list[int]:
    """Tokens of `generate` on the full prompt, without the end token."""
    inputs = full(mlm, images, question, prefix)
    length = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    ids = mlm.model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, length:].tolist()
    ends = mlm.model.generation_config.eos_token_id
    return ids[: min([ids.index(end) for end in ends if end in ids], default=len(ids))]


def vocabulary_scores(session, questions, **intervention):
    """(questions, vocabulary) log-probabilities of the next token, read through the session's own scores."""
    tokenizer = session.mlm.tokenizer
    return session.score(questions, WORDS, **intervention), tokenizer.convert_tokens_to_ids(WORDS)


def assert_same(mlm, session, images, prefix=None, questions=QUESTIONS):
    """Next-token log-probabilities and generated tokens are those of full prefills."""
    scores, ids = vocabulary_scores(session, questions)
    answers = session.ask(questions, max_new_tokens=6)
    for question, score, answer in zip(questions, scores, answers, strict=True):
        expected = full_logits(mlm, images, question, prefix)[0].log_softmax(-1)[ids]
        assert torch.allclose(score, expected, atol=1e-5)
        assert list(answer.tokens) == generated(mlm, images, question, prefix)
        assert answer.text == mlm.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()


def selection(mlm, tokens, layers=(1, 3), share=0.5, seed=0) -> KeySelection:
    rng = np.random.default_rng(seed)
    mask = rng.random((len(layers), mlm.num_kv_heads, tokens)) < share
    return KeySelection("some", torch.from_numpy(mask), layers)


# ---- the same answers as without a cache ---------------------------------------------------------


@pytest.mark.parametrize("attention, image, prefix", [("sdpa", 0, None), ("eager", 1, "a red fish")])
@pytest.mark.parametrize("family", ALL)
def test_a_session_is_a_full_prefill(family, attention, image, prefix):
    mlm = scrambled(tiny(family, attention=attention))
    with ImageSession(mlm, IMAGES[image], prefix=prefix) as session:
        assert_same(mlm, session, [IMAGES[image]], prefix)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_the_reference_differ_between_questions_and_images(family):
    """What the comparison above would miss: a model that ignores its input."""
    mlm = tiny(family)
    logits = [full_logits(mlm, [IMAGES[0]], question)[0] for question in QUESTIONS]
    logits.append(full_logits(mlm, [IMAGES[1]], QUESTIONS[0])[0])
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-2 for other in logits[:i])


@pytest.mark.parametrize("count", [2, 3])
def test_several_images_of_one_prompt(count):
    mlm = scrambled(tiny_pocket())
    images = IMAGES[:count]
    with ImageSession(mlm, images) as session:
        assert len(session.layouts) == count
        assert_same(mlm, session, images)
        swapped, _ = vocabulary_scores(ImageSession(mlm, images[::-1]), QUESTIONS)
        assert (swapped - vocabulary_scores(session, QUESTIONS)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_several_images_with_tiles_and_grids(family):
    mlm = scrambled(tiny(family))
    with ImageSession(mlm, IMAGES[:2]) as session:
        assert_same(mlm, session, IMAGES[:2], questions=QUESTIONS[:2])


@pytest.mark.parametrize("family", ALL)
def test_prompts_of_different_length_in_one_batch(family):
    mlm = scrambled(tiny(family))
    images = [IMAGES[0], IMAGES[1], IMAGES[2]]
    asked = [QUESTIONS, QUESTIONS[:1], QUESTIONS[1:3]]
    with SessionBatch(mlm, images, prefix="the car") as batch:
        answers = batch.answer(asked, options=["red", "yes"], max_new_tokens=3)
        assert [[a.question for a in row] for row in answers] == asked
        for image, row in zip(images, answers, strict=True):
            alone = ImageSession(mlm, image, prefix="the car")
            for answer in row:
                (one,) = alone.choose([answer.question], ["red", "yes"], max_new_tokens=3)
                assert one.tokens == answer.tokens and one.complete == answer.complete
                assert one.scores == pytest.approx(answer.scores, abs=1e-5)


def test_rows_with_one_image_and_with_two():
    mlm = scrambled(tiny_pocket())
    with SessionBatch(mlm, [IMAGES[0], IMAGES[1:]]) as batch:
        first, second = batch.answer([QUESTIONS[:1], QUESTIONS[:1]], max_new_tokens=6)
    assert list(first[0].tokens) == generated(mlm, IMAGES[:1], QUESTIONS[0])
    assert list(second[0].tokens) == generated(mlm, IMAGES[1:], QUESTIONS[0])


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
        scores = session.score(QUESTIONS, ["red", "yes"])
        assert scores.dtype == torch.float32 and scores.isfinite().all()
        exact = torch.stack([full_logits(mlm, [IMAGES[0]], q)[0].log_softmax(-1) for q in QUESTIONS])
        ids = mlm.tokenizer.convert_tokens_to_ids(["red", "yes"])
        assert torch.allclose(scores, exact[:, ids], atol=0.2)


# ---- decoding ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_repetition_penalty_of_the_model_is_that_of_generate(family):
    mlm = scrambled(tiny(family))
    session = ImageSession(mlm, IMAGES[0])
    plain = session.ask(QUESTIONS, 6)
    scrambled(mlm, repetition_penalty=3.0)
    penalised = session.ask(QUESTIONS, 6)
    assert [a.tokens for a in plain] != [a.tokens for a in penalised]
    for question, answer in zip(QUESTIONS, penalised, strict=True):
        assert list(answer.tokens) == generated(mlm, [IMAGES[0]], question)


def test_one_token_answers_take_one_pass(monkeypatch):
    mlm = scrambled(tiny_pocket())
    session = ImageSession(mlm, IMAGES[0])
    passes = []
    hook = mlm.model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    session.yes_no(QUESTIONS * 3, max_new_tokens=1)
    hook.remove()
    assert len(passes) == 1


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL)
def test_option_scores_are_sums_over_the_options_tokens(family, attention):
    mlm = tiny(family, attention=attention)
    options = ["yes", "a red fish", "car car"]
    with ImageSession(mlm, IMAGES[0]) as session:
        scores = session.score(QUESTIONS, options)
        assert scores.shape == (len(QUESTIONS), len(options))
        for i, question in enumerate(QUESTIONS):
            for j, option in enumerate(options):
                ids = mlm.tokenizer(option, add_special_tokens=False)["input_ids"]
                logits = full_logits(mlm, [IMAGES[0]], question, answer=ids)[:-1]
                expected = logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum()
                assert abs(scores[i, j] - expected) < 1e-5 * len(ids)
        # options of one question do not see each other
        alone = torch.cat([session.score(QUESTIONS, [option]) for option in options], dim=1)
        assert torch.allclose(scores, alone, atol=1e-5)


def test_yes_no_adds_spellings():
    mlm = scrambled(tiny_pocket())  # lower-cases everything: "yes", "Yes" and "YES" are one token
    session = ImageSession(mlm, IMAGES[0])
    for answer, score in zip(session.yes_no(QUESTIONS), session.score(QUESTIONS, ["yes", "no"]), strict=True):
        assert list(answer.scores) == list(YES_NO)
        assert list(answer.scores.values()) == pytest.approx(score.tolist(), abs=1e-6)
    spelled = {"either": ("yes", "no", "a red fish"), "fish": ["fish"]}
    (answer,) = session.choose(QUESTIONS[:1], spelled)
    total = session.score(QUESTIONS[:1], ["yes", "no", "a red fish"]).exp().sum().log()
    assert answer.scores["either"] == pytest.approx(float(total), abs=1e-5)


def test_choice_with_options_of_each_question():
    mlm = scrambled(tiny_pocket())
    session = ImageSession(mlm, IMAGES[0])
    options = [["red", "blue"], ["a car", "a fish", "this picture"]]
    answers = session.choose(QUESTIONS[:2], options)
    for question, some, answer in zip(QUESTIONS, options, answers, strict=False):
        expected = session.score([question], some)[0]
        assert list(answer.scores) == some and answer.best == some[int(expected.argmax())]
        assert list(answer.scores.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer.tokens == session.ask([question])[0].tokens
    batch = SessionBatch(mlm, IMAGES[:2])
    nested = batch.answer([QUESTIONS[:2], QUESTIONS[:1]], [options, options[:1]], max_new_tokens=0)
    assert nested[0][1].scores == pytest.approx(answers[1].scores, abs=1e-5)
    assert list(nested[1][0].scores) == options[0] and nested[1][0].text == ""


# ---- interventions -------------------------------------------------------------------------------


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
        # nothing is left behind, neither in the model nor in the cache
        assert torch.equal(vocabulary_scores(session, QUESTIONS)[0], plain)


def test_after_and_all_differ():
    mlm = tiny("llava_onevision")
    session = ImageSession(mlm, IMAGES[0])
    block = selection(mlm, len(session.layouts[0]))
    after, _ = vocabulary_scores(session, QUESTIONS, block=block)
    everything, _ = vocabulary_scores(session, QUESTIONS, block=block, queries="all")
    assert (after - everything).abs().max() > 1e-3


def test_after_reads_the_image_once_and_all_reads_it_again():
    mlm = scrambled(tiny_pocket())
    lengths, pictures = [], []
    language_model, tower = mlm.model.model.language_model, mlm.model.model.vision_tower
    hooks = [
        language_model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        tower.register_forward_pre_hook(lambda *_: pictures.append(1)),
    ]
    session = ImageSession(mlm, IMAGES[0])
    block = selection(mlm, len(session.layouts[0]))
    assert lengths == [17] and len(pictures) == 1
    session.score(QUESTIONS, ["yes"], block=block)
    assert len(lengths) == 2
    session.score(QUESTIONS, ["yes"], block=block, queries="all")
    assert lengths[2] == 17 and len(lengths) == 4 and len(pictures) == 1
    for hook in hooks:
        hook.remove()


def test_an_empty_block_changes_no_bit():
    mlm = scrambled(tiny("qwen2_5_vl"))
    session = ImageSession(mlm, IMAGES[0])
    block = selection(mlm, len(session.layouts[0]), share=0)
    for queries in ("after", "all"):
        assert torch.equal(
            session.score(QUESTIONS, ["yes"]), session.score(QUESTIONS, ["yes"], block=block, queries=queries)
        )


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
                for image, row in zip(images, rows, strict=True):
                    asked = [answer.question for answer in row]
                    alone = ImageSession(mlm, image).choose(asked, ["red"], 3, block=block, queries=queries)
                    assert [a.tokens for a in row] == [a.tokens for a in alone]
                    for one, other in zip(row, alone, strict=True):
                        assert one.scores == pytest.approx(other.scores, abs=1e-5)


# ---- state and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_the_model_is_as_it_was(family):
    mlm = scrambled(tiny(family))
    inner = mlm.model.model
    marker = torch.tensor([[7]])
    ImageSession(mlm, IMAGES[0]).close()  # transformers gives the vision tower hooks of its own, to stay
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in mlm.model.modules()]
    before = None if family == "pocket" else full_logits(mlm, [IMAGES[0]], QUESTIONS[0])
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
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in mlm.model.modules()] == hooks
    assert mlm.attention == "sdpa" and not mlm.model.training
    if before is not None:
        assert torch.equal(full_logits(mlm, [IMAGES[0]], QUESTIONS[0]), before)


def test_questions_leave_the_cache_as_it_is():
    mlm = scrambled(tiny("llava_next"))
    session = ImageSession(mlm, IMAGES[0])
    tensors = [tensor for pair in session._prefix.keys_values for tensor in pair]
    before = [tensor.clone() for tensor in tensors]
    first = session.choose(QUESTIONS, ["yes", "a red fish"])
    assert all(torch.equal(*pair) for pair in zip(before, tensors, strict=True))
    assert session.choose(QUESTIONS, ["yes", "a red fish"]) == first


def test_closing_frees_the_memory():
    mlm = scrambled(tiny("llava_onevision"))
    with ImageSession(mlm, IMAGES[0]) as session:
        session.choose(QUESTIONS, ["yes", "a red fish"], 2)
        batch = session
        tensors = [tensor for pair in batch._prefix.keys_values for tensor in pair] + [batch._embeddings]
        references = [weakref.ref(tensor) for tensor in tensors]
        del tensors, batch
        assert all(reference() is not None for reference in references)
    assert all(reference() is None for reference in references)
    with pytest.raises(ParameterError, match="closed"):
        session.ask(QUESTIONS)
    with pytest.raises(ParameterError, match="closed"):
        session.score(QUESTIONS, ["yes"])
    session.close()  # twice is fine
    assert len(session.layouts) == 1


def test_sessions_say_what_they_hold():
    mlm = tiny_pocket()
    session, batch = ImageSession(mlm, IMAGES[0]), SessionBatch(mlm, [IMAGES[:2], IMAGES[2]])
    assert repr(session) == f"ImageSession({mlm.name}: 17 tokens)"
    assert repr(batch) == f"SessionBatch({mlm.name}: 17 tokens and 17 tokens; 17 tokens)"
    session.close()
    assert repr(session).endswith("; closed)")


def test_an_exception_inside_frees_the_memory_too():
    mlm = tiny_pocket()
    with pytest.raises(ParameterError), ImageSession(mlm, IMAGES[0]) as session:
        reference = weakref.ref(session._embeddings)
        session.ask([])
    assert reference() is None


# ---- prompts that cannot share an image ----------------------------------------------------------

QUESTION_FIRST = (
    "{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}{% endfor %} yes"
)
QUESTION_TWICE = (
    "{% for m in messages %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'][:3] }} {% endfor %}<image> "
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endfor %}"
)


def test_a_question_before_the_image_is_an_error():
    mlm = tiny_pocket()
    mlm.processor.chat_template = QUESTION_FIRST
    with pytest.raises(ParameterError, match="behind the image"):
        ImageSession(mlm, IMAGES[0])


def test_a_prompt_that_does_not_begin_with_the_cached_tokens_is_an_error():
    mlm = tiny_pocket()
    mlm.processor.chat_template = QUESTION_TWICE
    session = ImageSession(mlm, IMAGES[0])
    with pytest.raises(ParameterError, match="cached"):
        session.ask(["red car ?"])


# ---- many images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answer_all_is_a_session_per_image_and_block(batch_size):
    mlm = scrambled(tiny_pocket())
    samples = [(f"image-{i}", image, QUESTIONS[i:]) for i, image in enumerate(IMAGES)]
    blocks = {"none": None, "some": selection(mlm, 17), "other": selection(mlm, 17, (0, 2), seed=1)}
    options = {"options": YES_NO, "max_new_tokens": 2}
    found = list(answer_all(mlm, iter(samples), blocks, **options, batch_size=batch_size))
    assert [image_id for image_id, _ in found] == ["image-0", "image-1", "image-2"]
    for (_, image, questions), (_, answers) in zip(samples, found, strict=True):
        assert list(answers) == list(blocks)
        session = ImageSession(mlm, image)
        for name, block in blocks.items():
            for one, other in zip(answers[name], session.yes_no(questions, 2, block=block), strict=True):
                assert (one.question, one.text) == (other.question, other.text)
                assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_answer_all_reads_every_image_once_and_no_more_than_asked(capsys):
    mlm = tiny_pocket()
    taken = []

    def samples():
        for number in range(100):
            taken.append(number)
            yield str(number), IMAGES[0], ["what is this ?"]

    pictures = []
    tower = mlm.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0])))
    found = answer_all(mlm, samples(), {"a": None, "b": selection(mlm, 17)}, max_new_tokens=1, batch_size=4)
    first = [next(found) for _ in range(5)]
    hook.remove()
    assert list(first[0][1]) == ["a", "b"] and len(taken) == 8 and pictures == [4, 4]
    assert capsys.readouterr().err == ""
    list(answer_all(mlm, [("0", IMAGES[0], ["yes"])], max_new_tokens=1, progress=True))
    assert "1/1" in capsys.readouterr().err


# ---- bad input -----------------------------------------------------------------------------------


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
        (lambda: session.ask([]), ParameterError, "at least one"),
        (lambda: session.ask("what is this ?"), ParameterError, "list"),
        (lambda: session.ask(["  "]), ParameterError, "at least one word"),
        (lambda: session.ask([None]), ParameterError, "None"),
        (lambda: session.ask(["what is <image> ?"]), ParameterError, "<image>"),
        (lambda: session.ask(QUESTIONS, max_new_tokens=0), ParameterError, "max_new_tokens"),
        (lambda: session.ask(QUESTIONS, max_new_tokens=-1), ParameterError, "max_new_tokens"),
        (lambda: session.ask(QUESTIONS, queries="before", block=selection(mlm, 17)), ParameterError, "before"),
        (lambda: session.score(QUESTIONS, []), ParameterError, "at least one"),
        (lambda: session.score(QUESTIONS, {}), ParameterError, "at least one"),
        (lambda: session.score(QUESTIONS, "yes"), ParameterError, "list"),
        (lambda: session.score(QUESTIONS, ["yes", " "]), ParameterError, "no tokens"),
        (lambda: session.score(QUESTIONS, ["yes", "zebra"]), ParameterError, "zebra"),
        (lambda: session.score(QUESTIONS, ["yes", "yes"]), ParameterError, "different"),
        (lambda: session.score(QUESTIONS, {"yes": []}), ParameterError, "no tokens"),
        (lambda: session.choose(QUESTIONS, [["yes"], ["no"]]), ParameterError, "options for"),
        (lambda: session.choose(QUESTIONS[:1], [[]]), ParameterError, "at least one"),
        (lambda: batch.answer([QUESTIONS]), ParameterError, "2 prompts"),
        (lambda: batch.answer("ab"), ParameterError, "2 prompts"),
        (lambda: batch.answer([QUESTIONS, []]), ParameterError, "at least one"),
        (lambda: batch.answer([QUESTIONS[:1]] * 2, [[["yes"]]]), ParameterError, "options for"),
        (lambda: batch.answer([["yes"]] * 2, ["yes", ["no"]]), ParameterError, "options must"),
        (lambda: list(answer_all(mlm, [], batch_size=0)), ParameterError, "batch_size"),
        (lambda: session.ask(QUESTIONS, block=selection(mlm, 5)), DataError, "17"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert session.ask(QUESTIONS, 2) and math.isfinite(session.score(QUESTIONS[:1], ["yes"])[0, 0])
    assert list(answer_all(mlm, [])) == []


def test_a_block_needs_one_token_grid():
    mlm = tiny("llava_onevision")
    with SessionBatch(mlm, IMAGES[:2]) as batch:
        counts = [len(row[0]) for row in batch.layouts]
        with pytest.raises(DataError, match=f"{min(counts)}, {max(counts)}"):
            batch.answer([QUESTIONS[:1]] * 2, block=selection(mlm, counts[0]))


def test_images_that_the_family_cannot_show():
    with pytest.raises(ParameterError, match="base views"):
        ImageSession(tiny("llava_onevision"), IMAGES[:2])
    with ImageSession(replace(tiny("llava_onevision"), base_view_only=True), IMAGES[:2]) as session:
        assert len(session.layouts) == 2 and len(session.ask(QUESTIONS, 2)) == 3


def test_attention_that_takes_no_mask():
    mlm = tiny_pocket()
    mlm.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="sdpa"):
        ImageSession(mlm, IMAGES[0])
    sliding = tiny_pocket(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ModelError, match="sliding"):
        ImageSession(wrap_mlm(sliding.model, sliding.processor), IMAGES[0])
