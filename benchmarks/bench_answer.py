"""What questions over a cached image cost, against the plain way: a full prefill for each.

session_time_ratio     18 questions about a picture through a session / 18 full prefills. The session's time
                       includes opening, preprocessing and tokenising, the prefills' is that of the bare model
                       on inputs that are ready. The first token of every answer must be the same.
session_difference     largest difference of the two ways' log-probabilities of an answer's first token.
blocked_suffix_ratio   the 18 questions with half of the image keys blocked in the last third of the layers /
                       without a block, on a session that is open. `..._all_layers`: blocked in every layer.

Medians of interleaved runs, CPU time on one thread (other work on the machine does not count).
"""

import statistics
import time

import numpy as np
import torch
from PIL import Image

from benchmarks.bench_capture import onevision_shaped
from kvutils.answer import ImageSession
from kvutils.keys import KeySelection
from kvutils.models import MLM
from kvutils.prompts import prepare_text
from kvutils.vision import prepare_images

QUESTIONS = [
    f"is there {'a ' * (number % 3)}photo number {number} in it ? answer using a single word or phrase ."
    for number in range(18)
]
WORDS = ["a", "photo", "of"]


def run(repeats: int = 5) -> list[dict]:
    """Figures {name, value, goal, detail}; lower is better. About a minute on one core."""
    mlm = onevision_shaped(layers=6)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    return [*_against_full_prefills(mlm, photo), *_against_no_block(mlm, photo, repeats)]


def _against_full_prefills(mlm: MLM, photo: Image.Image) -> list[dict]:
    vision = prepare_images(mlm, [photo])
    tokens = len(vision.layouts[0])
    inputs = [prepare_text(mlm, [mlm.prompt(question)], vision, images_only=False) for question in QUESTIONS]
    words = mlm.tokenizer.convert_tokens_to_ids(WORDS)

    @torch.no_grad()
    def full(text) -> torch.Tensor:
        return mlm.model(
            input_ids=text.input_ids, attention_mask=text.attention_mask, position_ids=text.position_ids,
            pixel_values=vision.pixels, image_sizes=torch.tensor([[480, 640]]), batch_num_images=[2],
            use_cache=False, logits_to_keep=1,
        ).logits[0, -1]  # fmt: skip

    def session() -> list:
        with ImageSession(mlm, photo) as opened:
            return opened.choose(QUESTIONS, WORDS, max_new_tokens=1)

    session(), full(inputs[0])  # warm up
    session_times, full_time, logits = [], 0.0, []
    for number, text in enumerate(inputs):
        if number % 6 == 0:
            seconds, answers = _timed(session)
            session_times.append(seconds)
        seconds, found = _timed(lambda text=text: full(text))
        full_time += seconds
        logits.append(found)
    if [answer.tokens[0] for answer in answers] != [int(one.argmax()) for one in logits]:
        raise AssertionError("the session's answers are not those of the full prefills")
    exact = torch.stack(logits).log_softmax(-1)[:, words]
    ours = torch.tensor([list(answer.scores.values()) for answer in answers])
    session_time = statistics.median(session_times)
    return [
        {
            "name": "session_time_ratio",
            "value": round(session_time / full_time, 4),
            "goal": 0.125,
            "detail": f"{session_time:.2f} s / {full_time:.2f} s, {len(QUESTIONS)} questions, "
            f"{mlm.num_layers} layers, {tokens} image tokens",
        },
        {
            "name": "session_difference",
            "value": float(f"{(ours - exact).abs().max():.2g}"),
            "goal": 1e-5,
            "detail": f"log-probabilities of {exact.numel()} first tokens, float32",
        },
    ]


def _against_no_block(mlm: MLM, photo: Image.Image, repeats: int) -> list[dict]:
    times: dict[str, list[float]] = {"none": [], "last third": [], "all": []}
    with ImageSession(mlm, photo) as session:
        generator = torch.Generator().manual_seed(0)
        shape = (mlm.num_layers, mlm.num_kv_heads, len(session.layouts[0]))
        mask = torch.rand(shape, generator=generator) < 0.5
        third = mlm.num_layers // 3
        blocks = {
            "none": None,
            "last third": KeySelection("half", mask[-third:], tuple(range(mlm.num_layers))[-third:]),
            "all": KeySelection("half", mask, tuple(range(mlm.num_layers))),
        }
        for repeat in range(-1, repeats):
            for name in sorted(blocks, reverse=bool(repeat % 2)):
                seconds, _ = _timed(lambda block=blocks[name]: session.choose(QUESTIONS, WORDS, 0, block=block))
                times[name] += [seconds] * (repeat >= 0)  # the first round warms up
    plain, *blocked = (statistics.median(times[name]) for name in blocks)
    figures = [("blocked_suffix_ratio", 1.2), ("blocked_suffix_ratio_all_layers", None)]
    return [
        {
            "name": name,
            "value": round(seconds / plain, 4),
            "goal": goal,
            "detail": f"{seconds:.3f} s / {plain:.3f} s, {len(QUESTIONS)} questions, {repeats} runs",
        }
        for (name, goal), seconds in zip(figures, blocked, strict=True)
    ]


def _timed(function):
    """(CPU seconds, result)"""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result
