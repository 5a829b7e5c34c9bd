"""What kvutils costs on a GPU, with a published 7B architecture and random weights in bfloat16. Without a GPU nothing is measured.

gpu_capture_time_ratio   keys, values and features of a picture, left on the GPU / the bare `model.model` on the same picture;
                         both from pixels that are ready. `..._whole`: from the picture to main memory / processor and bare model.
gpu_rate_ratio_b1, ...   the measured rate of a large matrix product / that of all passes of a capture of 1, 2, 4 pictures
                         (operations of linear layers and attention, counted): 1.82 is a share of 0.55.
gpu_session_ratio_18, .. 18, 64 questions of about 30 tokens about one picture through a session, reading it included / as many
                         times `generate` from scratch, on inputs that are ready.
gpu_idle_share           of the seconds of the tasks' whole items, as a rehearsal runs them, those in which the GPU has nothing
                         to do; the detail has every step.

    python benchmarks/bench_gpu.py [--model NAME] [--table FILE]      --table: which kernels a capture spends its seconds in
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from architectures import random_mlm
from rehearse import IMAGE, Rehearsal

from kvutils.answer import ImageSession
from kvutils.kvcache import capture, capture_prepared
from kvutils.models import MLM
from kvutils.vision import prepare_images

MODEL = "llava-onevision-7b"
SHARE = 0.55  # of the rate of a matrix product: the goal
REPEATS, WORDS = 10, "is there a red fish on the left of the blue car and a green tree in the middle of the picture ?".split()


def run() -> list[dict]:
    """Figures {name, value, goal, detail}; lower is better. Some minutes on an H100, [] without a CUDA device."""
    if not torch.cuda.is_available():
        print("gpu: no CUDA device, nothing is measured", flush=True)
        return []
    return list(figures(MODEL))


def figures(model: str) -> Iterator[dict]:
    """One after the other."""
    mlm = random_mlm(model, "cuda", torch.bfloat16)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*IMAGE[::-1], 3), dtype=np.uint8))
    with torch.no_grad():
        yield from capture_figures(mlm, photo)
        yield from rate_figures(mlm, photo, matmul_rate(mlm))
        yield from session_figures(mlm, photo)
    del mlm
    torch.cuda.empty_cache()
    yield idle_figure(model)


def capture_figures(mlm: MLM, photo: Image.Image, repeats: int = REPEATS) -> list[dict]:
    """`capture` against the model itself."""
    layers, vision, bare = tuple(range(mlm.num_layers)), prepare_images(mlm, [photo]), inputs(mlm, photo)
    runs = {"ready": lambda: capture_prepared(mlm, vision, None, layers), "bare": lambda: forward(mlm, bare),
            "whole": lambda: capture(mlm, [photo]), "processed": lambda: forward(mlm, inputs(mlm, photo)),
            "prepared": lambda: prepare_images(mlm, [photo]), "fetched": lambda: capture_prepared(mlm, vision, None, layers, to="cpu")}  # fmt: skip
    taken = seconds(runs, repeats)
    sizes = f"{mlm.name}, {mlm.num_layers} layers, {len(vision.layouts[0])} image tokens, medians of {repeats} runs"
    copied = taken["fetched"] - taken["ready"]
    return [figure("gpu_capture_time_ratio", taken["ready"] / taken["bare"], 1.1, f"{taken['ready']:.3f} s / {taken['bare']:.3f} s, {sizes}"),
            figure("gpu_capture_time_ratio_whole", taken["whole"] / taken["processed"], None, f"{taken['whole']:.3f} s / {taken['processed']:.3f} s, "
                   f"of it {taken['prepared']:.3f} s on the processor for pixels, {copied:.3f} s to copy to main memory")]  # fmt: skip


def rate_figures(mlm: MLM, photo: Image.Image, rate: float, batches: tuple[int, ...] = (1, 2, 4), repeats: int = REPEATS) -> list[dict]:
    """rate: operations a second of a large matrix product."""
    found = []
    for batch in batches:
        vision = prepare_images(mlm, [photo] * batch)
        captured = {"it": lambda vision=vision: capture_prepared(mlm, vision, None, tuple(range(mlm.num_layers)))}
        work, taken = operations(captured["it"]), seconds(captured, repeats)["it"]
        detail = f"{work / 1e12:.1f} TFLOP in {taken:.3f} s, {work / taken / 1e12:.0f} of {rate / 1e12:.0f} TFLOP/s"
        detail = f"share {work / taken / rate:.3f}: {detail}, {batch} x {len(vision.layouts[0])} image tokens"
        found.append(figure(f"gpu_rate_ratio_b{batch}", rate * taken / work, 1 / SHARE, detail))
    return found


def session_figures(mlm: MLM, photo: Image.Image, numbers: tuple[int, ...] = (18, 64), repeats: int = 5) -> list[dict]:
    """Questions a second."""
    questions = [" ".join(np.roll(WORDS, number % len(WORDS)).tolist() + WORDS[: 1 + number % 4]) for number in range(max(numbers))]
    asked, found = [inputs(mlm, photo, question) for question in questions[:6]], []

    def session(number: int) -> list:
        with ImageSession(mlm, photo) as opened:
            return opened.choose(questions[:number], ["yes", "no"], max_new_tokens=1)

    def generate() -> list[int]:
        ends = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        return [int(mlm.model.generate(**one, **ends)[0, -1]) for one in asked]

    same = sum(answer.tokens == (token,) for answer, token in zip(session(len(asked)), generate(), strict=True))
    taken = seconds({"generate": generate} | {str(number): lambda number=number: session(number) for number in numbers}, repeats)
    each = taken["generate"] / len(asked)
    for number in numbers:
        ours, tokens = taken[str(number)], len(asked[0]["input_ids"][0])
        detail = f"{number / ours:.1f} questions a second, reading the picture included / {1 / each:.1f} by generate, {tokens} tokens"
        found.append(figure(f"gpu_session_ratio_{number}", ours / (number * each), 0.125, f"{detail}; {same} of {len(asked)} first tokens the same"))
    return found


def idle_figure(model: str, samples: int = 1) -> dict:
    """Every step of a rehearsal, watched."""
    rehearsal = WatchedRehearsal(model, torch.device("cuda"), samples, progress=False)
    rehearsal.run()
    wall, busy = np.array(list(rehearsal.watched.values())).sum(0)
    each = ", ".join(f"{name} {1 - busy / wall:.2f} of {wall:.2f} s" for name, (wall, busy) in rehearsal.watched.items())
    return figure("gpu_idle_share", 1 - busy / wall, None, f"of {wall:.1f} s in all steps: {each}")


class WatchedRehearsal(Rehearsal):
    """`watched`: step -> seconds of the clock, and seconds in which the GPU has worked."""

    def step(self, notebook: str, name: str, items: int, unit: str, run: Callable[[], Any]) -> Any:
        self.watched: dict[str, tuple[float, float]] = getattr(self, "watched", {})

        def watched() -> Any:
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                start, result = clock(), run()
                wall = clock() - start
            self.watched[name] = wall, sum(one.self_device_time_total for one in seen.key_averages() if not one.is_user_annotation) / 1e6
            return result

        return super().step(notebook, name, items, unit, watched)


def inputs(mlm: MLM, photo: Image.Image, question: str | None = None) -> dict:
    """What the model's own processor makes of a prompt, on the model's device."""
    made = mlm.processor(text=[mlm.prompt(question)], images=[photo], return_tensors="pt").to(mlm.device)
    return {name: each.to(mlm.dtype) if each.is_floating_point() else each for name, each in made.items()}


def forward(mlm: MLM, made: dict) -> None:
    mlm.model.model(**made, past_key_values=DynamicCache(), use_cache=True)


def matmul_rate(mlm: MLM, side: int = 8192) -> float:
    """Operations a second of side x side matrix products of random numbers, in the model's dtype and place."""
    one, other = torch.randn(2, side, side, device=mlm.device).to(mlm.dtype)
    return 2 * side**3 * 10 / seconds({"it": lambda: [one @ other for _ in range(10)]}, REPEATS)["it"]


def operations(run: Callable[[], Any]) -> float:
    """Multiplications and additions of the linear layers in run(), and of its attention: half of the square where it is causal."""
    found, attend = [], torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, *args, is_causal=False, **options) -> torch.Tensor:
        found.append(4.0 * query.numel() * key.shape[-2] * (0.5 if is_causal else 1))
        return attend(query, key, value, *args, is_causal=is_causal, **options)

    def linear(module, _, output) -> None:
        found.append(2.0 * module.in_features * output.numel() if isinstance(module, torch.nn.Linear) else 0.0)

    hook = register_module_forward_hook(linear)
    try:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
            run()
    finally:
        hook.remove()
    return sum(found)


def seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of interleaved runs, after two that warm up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, function in runs.items():
            start = clock()
            function()
            taken[name].append(clock() - start)
    return {name: statistics.median(each[2:]) for name, each in taken.items()}


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def figure(name: str, value: float, goal: float | None, detail: str) -> dict:
    return {"name": name, "value": round(value, 4), "goal": goal, "detail": detail}


def kernels(mlm: MLM, photo: Image.Image) -> str:
    """The profiler's table of one capture."""
    vision = prepare_images(mlm, [photo])
    captured = lambda: capture_prepared(mlm, vision, None, tuple(range(mlm.num_layers)))  # noqa: E731
    captured()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as seen:
        captured()
        torch.cuda.synchronize()
    return seen.key_averages(group_by_input_shape=False).table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--table", type=Path)
    chosen = parser.parse_args()
    if chosen.table and torch.cuda.is_available():
        chosen.table.write_text(kernels(random_mlm(chosen.model, "cuda", torch.bfloat16), Image.new("RGB", IMAGE)))
    for record in figures(chosen.model) if torch.cuda.is_available() else run():
        print(f"{record['name']}: {record['value']:.3f} (goal {record['goal']}) {record['detail']}", flush=True)
