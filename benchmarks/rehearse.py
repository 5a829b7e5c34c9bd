"""A rehearsal of the paper run without checkpoint and data: `make rehearse MODEL=llava-onevision-7b`.

The published architecture at full size with random weights does what the notebooks do, on generated pictures of the usual
size that are stored as JPEG files: whole items are timed, decoding, processor, probes and scores included. Reported are
seconds and memory of each measurement and the hours of every notebook; answers mean nothing. `make plan` reads the report.
Without a CUDA device the architecture is scaled down (the same layers, heads, views and image tokens, narrow), which shows
that the code runs and says nothing about hours.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import random_encoder, random_mlm
from PIL import Image
from tqdm import tqdm

from kvutils.datasets import open_dataset
from kvutils.datasets.samples import Pictures
from kvutils.errors import KVUtilsError, at_least
from kvutils.images import open_image
from kvutils.kvcache import capture
from kvutils.models import MODELS
from kvutils.readout.features import FeatureExtractor
from kvutils.run.notebook import provenance
from kvutils.run.plan import GIB, NOTEBOOKS, device_name, rehearsal_file
from kvutils.store import write_json
from kvutils.tasks.base import run_task
from kvutils.tasks.choices import read_items
from kvutils.tasks.key_blocking import ask_under_blocks, last_layers, select_lowest
from kvutils.tasks.key_table import measure_keys
from kvutils.tasks.value_flow import value_flow_tasks
from kvutils.tasks.yes_no import Pope

IMAGE = (640, 480)  # the usual size of COCO's images
IMAGES = {  # task of notebook 01 -> images that it reads in the paper profile
    "foreground_segmentation": 24_000,  # 4 folds x 1,000 episodes of 1 + 5
    "co_segmentation": 70,  # 7 classes x 10
    "semantic_segmentation": 752,  # ImageNet-S-50 validation
    "semantic_segmentation_probe": 802,  # and 50 to train on
    "referring_segmentation": 1_934,  # 1,500, of which 434 are cut by the chunks of 25 of 10,834 sentences
    "semantic_correspondence": 24_468,  # 12,234 pairs
    "temporal_correspondence": 1_999,  # frames of 30 sequences
}
ASKED = 6_000 * 64 + 2_374 * 51 + 4_000 * 84  # questions x conditions of notebook 03: POPE and its sweep, MME, knock-out
BEHIND_PREFIX = 10_834 * 2 * 5 + 2 * 5 * 250 + 150 * 5  # images read in notebook 04: sentences x kinds x conditions, domains, POPE
CHOICES = 252  # items of BLINK in notebook 05
GENERATED = {"pocket-pascal-5i": {"per_fold": 1, "scenes": 40}, "pocket-msrc": {"per_class": 1, "images": 3},
             "pocket-imagenet-s": {"scenes": 4}, "pocket-imagenet-s-train": {"scenes": 12}, "pocket-refcoco": {"scenes": 4},
             "pocket-spair-71k": {"pairs": 8}, "pocket-davis-2017": {"count": 4, "frames": 4}}  # fmt: skip


@dataclass
class Step:
    """One measurement: what was done, on how many, in how many seconds, the peak memory in GiB; wanted: how many of these
    the notebook has in the paper profile."""

    notebook: str
    what: str
    count: int
    unit: str
    seconds: float
    peak: float
    wanted: int

    @property
    def hours(self) -> float:
        return self.seconds / self.count * self.wanted / 3600


class Rehearsal:
    """Runs the steps and keeps what they cost. samples: of each kind."""

    def __init__(self, model: str, device: torch.device, samples: int, progress: bool = True):
        self.model, self.device, self.samples = model, device, samples
        self.small = device.type == "cpu"
        self.steps: list[Step] = []
        self.opened: dict[int, tuple[Image.Image, Callable]] = {}
        self.bar = tqdm(total=len(IMAGES) + 5, desc=f"rehearsal of {model}", unit="step", disable=not progress)

    def run(self) -> dict:
        """All steps; JSON-able report, with hours where the model has its full size."""
        dtype = torch.float32 if self.small else torch.bfloat16
        mlm = random_mlm(self.model, self.device, dtype, self.small)
        untrained = random_mlm(self.model, self.device, dtype, self.small, seed=1)
        encoder = random_encoder(self.device, dtype, self.small)
        capture(mlm, [Image.new("RGB", IMAGE)])  # kernels are chosen and memory is reserved in the first pass
        with self.bar, tempfile.TemporaryDirectory() as folder:
            self.files = Path(folder)
            self._value_flow(FeatureExtractor(mlm, untrained, encoder))
            self._keys(mlm)
            pictures = [(str(i), one.image) for i, one in enumerate(self._enlarged("pocket-coco", count=self.samples))]
            extractor = FeatureExtractor(mlm, keys=False)
            self.step("04", "images behind a prefix", len(pictures), "image", BEHIND_PREFIX,
                      lambda: extractor.images(pictures, prefix="look for the fish"))  # fmt: skip
            items = self._enlarged("pocket-blink", items=self.samples)
            self.step("05", "multiple choice", len(items), "item", CHOICES, lambda: read_items(
                mlm, items, encoder_original=encoder, untrained=untrained, progress=False, max_new_tokens=16))  # random weights end nowhere
        report = {"model": self.model, "device": device_name(), "full_size": not self.small, "versions": provenance(mlm),
                  "steps": [asdict(step) for step in self.steps]}  # fmt: skip
        if not self.small:
            mine = {number: [step for step in self.steps if step.notebook == number] for number in NOTEBOOKS}
            report["hours"] = {number: sum(step.hours for step in steps) for number, steps in mine.items()}
            report["peak"] = {number: max(step.peak for step in steps or mine["01"]) for number, steps in mine.items()}
        return report

    def step(self, notebook: str, what: str, count: int, unit: str, wanted: int, run: Callable[[], Any]) -> Any:
        """What run() gives; its cost is kept for the report."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        found = run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.steps.append(Step(notebook, what, count, unit, time.perf_counter() - start, self._peak(), wanted))
        self.bar.update()
        return found

    def _value_flow(self, extractor: FeatureExtractor) -> None:
        """The tasks of notebook 01 (02 reads what they have stored)."""
        for name, task in value_flow_tasks("pocket", GENERATED).items():
            task.samples = [self._enlarge(sample) for sample in task.samples[: self.samples]]
            task.max_iter = 100  # features of random weights need not be separable
            count = sum(len(task.images(sample)) for sample in task.samples)
            self.step("01", name.replace("_", " "), count, "image", IMAGES[name],
                      lambda task=task: run_task(task, extractor, progress=False))  # fmt: skip

    def _keys(self, mlm) -> None:
        """Notebook 03: variance of keys, of the model and its control; questions, plain and under more and more blocks."""
        images = self._enlarged("pocket-coco", count=self.samples + 1)
        table = self.step("03", "variance of keys", len(images), "image", 2_000, lambda: measure_keys(
            mlm, images, ["is there a fish ?"], mass_images=1, chunk=1, progress=False))  # fmt: skip
        block = select_lowest(table, 0.1, last_layers(mlm.num_layers))
        pope = Pope(self._enlarged("pocket-pope", scenes=self.samples))
        plain, blocks = {"none": None}, {f"blocked {i}": block for i in range(4)}
        self.step("03", "images and their questions", len({s.image_id for s in pope.samples}), "image", 1_000 + 1_187 + 1_600,
                  lambda: ask_under_blocks(pope, mlm, plain, progress=False))  # fmt: skip
        self.step("03", "questions under a block", 4 * len({(s.image_id, s.question) for s in pope.samples}), "question", ASKED,
                  lambda: ask_under_blocks(pope, mlm, plain | blocks, progress=False))  # fmt: skip
        self.steps[-1].seconds = max(self.steps[-1].seconds - self.steps[-2].seconds, 0.0)  # images are read once for all

    def _enlarged(self, name: str, **options) -> list:
        return [self._enlarge(sample) for sample in open_dataset(name, **options)]

    def _enlarge(self, value: Any) -> Any:
        """A sample of the pocket world at the size `IMAGE`, its pictures opened from JPEG files when they are asked for."""
        if isinstance(value, Image.Image):
            if id(value) not in self.opened:  # samples that share a picture share its file
                file = self.files / f"{len(self.opened)}.jpg"
                value.resize(IMAGE, Image.Resampling.BICUBIC).save(file, quality=95)
                self.opened[id(value)] = value, lambda: open_image(file)
            return self.opened[id(value)][1]
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


def text_of(report: dict) -> str:
    """The report for a terminal."""
    size = "full size" if report["full_size"] else "SCALED DOWN (no CUDA device): the same layers, heads and image tokens, narrow"
    versions = report["versions"] | report["versions"]["machine"]
    lines = [f"{report['model']}, random weights, {size}", f"{report['device']}, {versions['dtype']}, "
             f"{versions['attention']}, torch {versions['torch']}, transformers {versions['transformers']}", "",
             f"{'':<4}{'step':<30}{'seconds':>10}  {'each':<10}{'peak GiB':>9}{'of these in the paper run':>28}"]  # fmt: skip
    for step in report["steps"]:
        lines.append(f"{step['notebook']:<4}{step['what']:<30}{step['seconds'] / step['count']:>10.3g}  {step['unit']:<10}"
                     f"{step['peak']:>9.1f}{step['wanted']:>28,}")  # fmt: skip
    if "hours" not in report:
        return "\n".join([*lines, "", "Hours are known on a GPU only, where the architecture has its full size."])
    hours = report["hours"] | {"together": sum(report["hours"].values())}
    named = "   ".join(f"{name} {value:,.1f}" for name, value in hours.items())
    return "\n".join([*lines, "", "The paper run on one such device, hours:", f"  {named}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse", description=__doc__.splitlines()[0])
    published = [name for name, spec in MODELS.items() if spec.profile == "paper"]
    parser.add_argument("--model", default="llava-onevision-7b", choices=published)
    parser.add_argument("--samples", type=int, help="episodes, pairs, clips, ... of each kind (default 4 on a GPU, 1 without)")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("No CUDA device: the architecture is scaled down. This takes some minutes.", file=sys.stderr, flush=True)
    samples = chosen.samples if chosen.samples is not None else 1 if device.type == "cpu" else 4
    try:
        at_least("--samples", samples)
        report = Rehearsal(chosen.model, device, samples, sys.stderr.isatty()).run()
    except KVUtilsError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; a rehearsal is short and keeps nothing: start it again.", file=sys.stderr)
        return 130
    print(text_of(report))
    if report["full_size"]:
        write_json(rehearsal_file(chosen.model), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
