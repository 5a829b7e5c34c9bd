"""A rehearsal of the paper run without checkpoint and data: `make rehearse MODEL=llava-onevision-7b`.

The published architecture with random weights does what the notebooks do, on generated pictures of the usual size that are
stored as JPEG files: whole items, by the tasks themselves, decoding, processor, probes and scores included. Of every step are
reported the host's seconds beside the models' passes, what a GPU does of them on tensors, and what goes through the models at the
published size; answers mean nothing. `make plan` makes hours of it, for a stated GPU. On a GPU the architecture has its full size,
and the seconds of the passes are measured too. Without one a GPU is simulated, which tells the host's work from its own
(`simulated_gpu.py`), and the architecture is scaled down (the same layers, views and image tokens, keys and values as wide; narrow
else), attention takes the mean of all values, and all pictures and prefixes are one: passes then are few, cost little and are
not measured.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from architectures import random_encoder, random_mlm
from PIL import Image
from simulated_gpu import SimulatedGPU
from tqdm import tqdm

from kvutils import data_folder
from kvutils.checkpoints import MODELS
from kvutils.datasets import class_names, open_dataset
from kvutils.datasets.samples import Pictures
from kvutils.errors import KVUtilsError, at_least
from kvutils.images import open_image
from kvutils.kvcache import capture
from kvutils.models import MLM
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.selections import select_lowest
from kvutils.run.notebook import provenance
from kvutils.run.plan import COSTS, GIB, device_name, hours_of, rehearsal_file
from kvutils.store import need_writable, read_json, write_json
from kvutils.tasks.base import run_task
from kvutils.tasks.choices import read_items
from kvutils.tasks.key_blocking import ask_under_blocks, last_layers
from kvutils.tasks.key_table import measure_keys
from kvutils.tasks.prefix import run_prefixes
from kvutils.tasks.prefix_answers import ask_behind_prefixes
from kvutils.tasks.prefix_readouts import DomainPrefix, ReferringPrefix
from kvutils.tasks.prefixes import PrefixWriter
from kvutils.tasks.value_flow import value_flow_tasks
from kvutils.tasks.yes_no import Pope

IMAGE = (640, 480)  # the usual size of COCO's images
GENERATED = {"pocket-pascal-5i": {"per_fold": 1, "scenes": 40}, "pocket-msrc": {"per_class": 1, "images": 3},
             "pocket-imagenet-s": {"scenes": 4}, "pocket-imagenet-s-train": {"scenes": 12}, "pocket-refcoco": {"scenes": 4},
             "pocket-spair-71k": {"pairs": 8}, "pocket-davis-2017": {"count": 4, "frames": 4}}  # fmt: skip


class Meter:
    """What went through the models so far, and how long all took: `COSTS` as an array; `reads`: pictures that an extractor read.

    gpu: one that is simulated, where there is none; it tells the host's seconds from its own, passes included."""

    def __init__(self, device: torch.device, gpu: SimulatedGPU | None = None):
        self.device, self.gpu = device, gpu
        self.passes, self.reading, self.reads = np.zeros(len(COSTS)), np.zeros(len(COSTS)), 0
        self.began = self.clock()

    def clock(self) -> np.ndarray:
        """Seconds in all, of the host, of the simulated GPU, and its launches; of a CPU's work its own, as others may work beside."""
        if self.gpu:
            return np.array([self.gpu.host + self.gpu.device, self.gpu.host, self.gpu.device, self.gpu.launches])
        torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter()] * 2 + [0, 0])

    def now(self) -> np.ndarray:
        """As `COSTS` says."""
        seconds, host, tensor, calls = self.clock() - self.began
        return self.passes + [seconds, host, 0, 0, 0, tensor, calls]

    def watch(self, module: torch.nn.Module, published: torch.nn.Module, attention: int = 0) -> None:
        """Count the passes of a module. published: its like at full size, whose weights count. attention: layers x heads x
        head dimension where attention is causal; that of the towers, a tenth of their work, is not counted."""
        weights, started = sum(each.numel() for each in published.parameters()), []
        (blocks,) = [each for each in module.modules() if isinstance(each, torch.nn.ModuleList)][:1]

        def tokens(_, args, options) -> None:
            states, cache = args[0] if args else options["hidden_states"], options.get("past_key_values")
            seen = states.shape[-2] + 2 * (cache.get_seq_length() if attention and cache is not None else 0)
            self.passes[2] += 2 * states.shape[:-1].numel() * (weights + attention * seen) / 1e12

        def before(*_) -> None:
            started.append(self.clock())

        def after(*_) -> None:  # the passes' own seconds are left to the arithmetic
            _, host, tensor, calls = started.pop() - self.clock()
            self.passes += [0, host, 0, 2 * weights / 1e9, 1, tensor, calls]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)  # also where a pass is left at the last layer that is wanted
        blocks[0].register_forward_pre_hook(tokens, with_kwargs=True)

    def read(self, image: Callable) -> Callable:
        """`FeatureExtractor.image`, metered."""

        def metered(*args, **options):
            before = self.now()
            found = image(*args, **options)
            cost = self.now() - before
            self.reading, self.reads = self.reading + cost, self.reads + bool(cost[4])
            return found

        return metered


def mean_of_values(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_, **__) -> torch.Tensor:
    """In place of attention where only the work beside the passes is measured."""
    groups = query.shape[1] // value.shape[1]
    return value.mean(-2, keepdim=True).repeat_interleave(groups, 1).expand(*query.shape[:3], value.shape[-1])


class Rehearsal:
    """Runs the steps and keeps what they cost. samples: of each kind."""

    def __init__(self, model: str, device: torch.device, samples: int, progress: bool = True):
        self.model, self.device, self.samples, self.progress = model, device, samples, progress
        self.small = device.type == "cpu"
        self.gpu = SimulatedGPU() if self.small else None
        self.meter = Meter(device, self.gpu)
        self.steps: list[dict] = []
        self.opened: dict[int, tuple[Image.Image, Callable]] = {}
        shipped = read_json(data_folder() / "rehearsal" / "llava-onevision-0.5b.json")["steps"]
        self.takes = {each["step"]: each["of_items"]["seconds"] + each["of_reads"]["seconds"] for each in shipped}  # how steps compare
        self.bar = tqdm(total=round(sum(self.takes.values())), disable=None if progress else True, delay=0.1,  # None: unless it is a terminal
                        bar_format="{desc} {percentage:.0f}% |{bar:20}| {elapsed} so far, about {remaining} left")
        self.began, self.done = 0.0, 0.0

    def run(self) -> dict:
        """All steps; a JSON-able report, from which `hours_of` makes hours."""
        with self.gpu or nullcontext():
            mlm = self._steps()
        return {"model": self.model, "device": device_name(), "full_size": not self.small, "versions": provenance(mlm), "steps": self.steps}

    def _steps(self) -> MLM:
        dtype = torch.float32 if self.small else torch.bfloat16
        models = []
        for seed in (0, 1):
            self._say(f"making model {seed + 1} of 3")
            models.append(random_mlm(self.model, self.device, dtype, self.small, seed=seed))
        mlm, untrained = models
        self._say("making model 3 of 3")
        encoder, published = random_encoder(self.device, dtype, self.small), random_mlm(self.model, "meta", torch.bfloat16)
        for each in (mlm, untrained):
            attention = published.num_layers * published.num_heads * published.head_dim
            self.meter.watch(each.model.model.language_model, published.model.model.language_model.layers, attention)
            self.meter.watch(_tower(each), _tower(published))
            each.model.generation_config.eos_token_id = list(range(each.text_config.vocab_size))  # answers are a word long
        self.meter.watch(encoder.model, random_encoder("meta", torch.bfloat16).model)
        if self.small:
            for each in (mlm, untrained, encoder):
                each.model.to("cuda")  # the simulated one
        with ExitStack() as stack:
            stack.enter_context(self.bar)
            self.files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(mock.patch.object(FeatureExtractor, "image", self.meter.read(FeatureExtractor.image)))
            if self.small:
                stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", mean_of_values))
            capture(mlm, [Image.new("RGB", IMAGE)])  # kernels are chosen and memory is reserved in the first pass
            self._value_flow(FeatureExtractor(mlm, untrained, encoder, keys=False))
            self._keys(mlm)
            self._prefixes(mlm, FeatureExtractor(mlm, untrained, keys=False))
            items = self._enlarged("pocket-blink", items=self.samples)
            self.step("05", "choices", len(items), "item", lambda: read_items(
                mlm, items, encoder_original=encoder, untrained=untrained, max_new_tokens=16, progress=False))  # random weights end nowhere
        return mlm

    def step(self, notebook: str, name: str, items: int, unit: str, run: Callable[[], Any]) -> Any:
        """What run() gives; its cost is kept for the report: that of reading pictures as features apart, which are read once each."""
        self.began = self.began or time.monotonic()  # making the models is not counted
        self._say(f"{notebook} {name.replace('_', ' ')}")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        before, reading, reads = self.meter.now(), self.meter.reading, self.meter.reads
        found = run()
        read, reads = self.meter.reading - reading, self.meter.reads - reads
        self.steps.append({"notebook": notebook, "step": name, "unit": unit, "items": items, "reads": reads, "peak": self._peak(),
                           "of_items": dict(zip(COSTS, (self.meter.now() - before - read).tolist(), strict=True)),
                           "of_reads": dict(zip(COSTS, read.tolist(), strict=True))})  # fmt: skip
        self.done += self.takes[name]
        self.bar.update(self.takes[name])
        return found

    def _say(self, what: str) -> None:
        """What is being done, also where there is no terminal to show a bar."""
        self.bar.set_description(f"rehearsal of {self.model}: {what}")
        if self.progress and self.bar.disable:
            rest = sum(self.takes.values()) - self.done
            left = (time.monotonic() - self.began) / self.done * rest if self.done else rest  # at first as on the machine of the shipped one
            print(f"{what} ... ({self.done / (self.done + rest):.0%} done, about {tqdm.format_interval(left)} min left)", file=sys.stderr, flush=True)

    def _value_flow(self, extractor: FeatureExtractor) -> None:
        """The tasks of notebook 01 (02 reads what they have stored)."""
        for name, task in value_flow_tasks("pocket", GENERATED).items():
            task.samples = [self._enlarge(sample) for sample in task.samples[: self.samples]]
            task.max_iter = 100  # features of random weights need not be separable
            if name == "semantic_segmentation_probe":
                self.step("01", "semantic_segmentation_probe_fit", len(task.train), "image", lambda task=task: task.prepare(extractor))
                task.prepare = lambda _: None  # it is fitted
            items = sum(len(clip.frames) for clip in task.samples) if name == "temporal_correspondence" else len(task.samples)
            self.step("01", name, items, "frame" if name == "temporal_correspondence" else "item",
                      lambda task=task: run_task(task, extractor, progress=False))  # fmt: skip

    def _keys(self, mlm) -> None:
        """Notebook 03: variance of keys, of the model and its control; questions, plain and under more and more blocks."""
        images = self._enlarged("pocket-coco", count=self.samples + 1)
        table = self.step("03", "keys", len(images), "image", lambda: measure_keys(
            mlm, images, ["is there a fish ?"], mass_images=1, chunk=1, progress=False))  # fmt: skip
        block = select_lowest(table.variance, table.real, 0.1, last_layers(mlm.num_layers))
        pope = Pope(self._enlarged("pocket-pope", scenes=16))  # a batch
        plain, blocks = {"none": None}, {f"blocked {i}": block for i in range(4)}
        self.step("03", "pictures", len({s.image_id for s in pope.samples}), "image", lambda: ask_under_blocks(pope, mlm, plain, progress=False))
        self.step("03", "questions", 4 * len({(s.image_id, s.question) for s in pope.samples}), "question",
                  lambda: ask_under_blocks(pope, mlm, plain | blocks, progress=False))  # fmt: skip
        *_, pictures, questions = self.steps  # the images are read once for all conditions
        questions["of_items"] = {name: max(questions["of_items"][name] - pictures["of_items"][name], 0.0) for name in COSTS}

    def _prefixes(self, mlm, extractor: FeatureExtractor) -> None:
        """Notebook 04: readouts behind prefixes, and answers."""
        writer, few = PrefixWriter(mlm, "pocket"), 2 * self.samples
        named = self._enlarged("pocket-refcoco", scenes=few + 2)
        readout = ReferringPrefix(named, extractor, writer, "class_name")  # all tell which names are wrong
        readout.samples = [sample for sample in named if readout.prefixes(sample)][: self.samples]
        prefixes = readout.prefixes(readout.samples[0])
        if self.small:
            readout.prefixes = lambda _: prefixes
        self.step("04", "referring", len(readout.samples), "sentence", lambda: run_prefixes(readout, progress=False))
        scored = self._enlarge(tuple({one.domain: one for one in open_dataset("pocket-bdd-10k", scenes=12)}.values()))  # one of each
        train = self._enlarged("pocket-bdd-10k-train", scenes=few)
        names = class_names("pocket-bdd-10k-train")
        for kind in ("probe", "text"):
            each = DomainPrefix(scored, train, names, extractor, writer, kind)
            if self.small:
                each.prefixes = lambda _: prefixes
            if kind == "probe":
                self.step("04", "domains_fit", len(train), "image", lambda each=each: each.fit())
            each.fit = lambda: None  # it is fitted
            self.step("04", f"domains_by_{kind}", len(scored), "image", lambda each=each: run_prefixes(each, progress=False))
        pope = self._enlarged("pocket-pope", scenes=2 * few)
        self.step("04", "answers", len({s.image_id for s in pope}), "image", lambda: ask_behind_prefixes(pope, mlm, writer, progress=False))

    def _enlarged(self, name: str, **options) -> list:
        return [self._enlarge(sample) for sample in open_dataset(name, **options)]

    def _enlarge(self, value: Any) -> Any:
        """A sample of the pocket world at the size `IMAGE`, its pictures opened from JPEG files when they are asked for."""
        if isinstance(value, Image.Image):
            key = 0 if self.small else id(value)
            if key not in self.opened:  # samples that share a picture share its file
                file = self.files / f"{len(self.opened)}.jpg"
                value.resize(IMAGE, Image.Resampling.BICUBIC).save(file, quality=95)
                self.opened[key] = value, lambda: open_image(file)
            return self.opened[key][1]
        if isinstance(value, np.ndarray) and value.dtype == np.uint8:  # masks (height, width) or (frames, height, width)
            planes = [np.asarray(Image.fromarray(one).resize(IMAGE, Image.Resampling.NEAREST)) for one in value.reshape(-1, *value.shape[-2:])]
            return np.stack(planes).reshape(*value.shape[:-2], *planes[0].shape)
        if isinstance(value, np.ndarray):  # points (..., 2) and boxes (4,) in pixels of 96 x 96
            return value * np.resize(np.array(IMAGE) / 96, value.shape[-1])
        if is_dataclass(value):
            return replace(value, **{each.name: self._enlarge(getattr(value, each.name)) for each in fields(value)})
        if isinstance(value, tuple) and value and isinstance(value[0], Image.Image):
            return Pictures([self._enlarge(one) for one in value])
        return tuple(map(self._enlarge, value)) if isinstance(value, tuple) else value

    def _peak(self) -> float:
        """GiB: allocated on the GPU in this step, or resident of this process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def _tower(mlm) -> torch.nn.Module:
    inner = mlm.model.model
    return inner.visual if hasattr(inner, "visual") else inner.vision_tower


def text_of(report: dict) -> str:
    """The report for a terminal."""
    size = "full size" if report["full_size"] else "SCALED DOWN (no CUDA device): the same layers, heads and image tokens, narrow, no attention"
    versions = report["versions"] | report["versions"]["machine"]
    lines = [f"{report['model']}, random weights, {size}", f"{report['device']}, {versions['dtype']}, "
             f"{versions['attention']}, torch {versions['torch']}, transformers {versions['transformers']}", "",
             f"{'':<4}{'step':<32}{'unit':<10}{'host s each':>12}{'tensor s each':>14}{'a read':>8}"
             f"{'TFLOP in all':>13}{'passes':>8}{'peak GiB':>9}"]  # fmt: skip
    for step in report["steps"]:
        item, read = step["of_items"], step["of_reads"]
        lines.append(f"{step['notebook']:<4}{step['step'].replace('_', ' '):<32}{step['unit']:<10}{item['host'] / step['items']:>12.3g}"
                     f"{item['tensor'] / step['items']:>14.3g}{read['host'] / max(step['reads'], 1):>8.2g}{item['tflop'] + read['tflop']:>13.4g}"
                     f"{item['passes'] + read['passes']:>8.0f}{step['peak']:>9.1f}")  # fmt: skip
    hours, said = hours_of(report, "full")
    named = "   ".join(f"{name} {value:,.1f}" for name, value in (hours | {"together": sum(hours.values())}).items())
    return "\n".join([*lines, "", f"The paper run, hours {said}:", f"  {named}", "", f"make plan MODEL={report['model']}    hours on another GPU"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse", description=__doc__.splitlines()[0])
    published = [name for name, spec in MODELS.items() if spec.profile == "paper"]
    parser.add_argument("--model", default="llava-onevision-7b", choices=published)
    parser.add_argument("--samples", type=int, help="episodes, pairs, clips, ... of each kind (default 4 on a GPU, 1 without)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the report here, not where `make plan` looks for it first")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("No CUDA device: the architecture is scaled down. This takes some minutes.", file=sys.stderr, flush=True)
    samples = chosen.samples if chosen.samples is not None else 1 if device.type == "cpu" else 4
    try:
        at_least("--samples", samples)
        need_writable((chosen.out or rehearsal_file(chosen.model)).parent, "--out or KVUTILS_CACHE")
        report = Rehearsal(chosen.model, device, samples).run()
    except KVUtilsError as error:
        print(error, file=sys.stderr)
        return 1
    print(text_of(report))
    write_json(chosen.out or rehearsal_file(chosen.model), report, digits=4)
    return 0


if __name__ == "__main__":
    sys.exit(main())
