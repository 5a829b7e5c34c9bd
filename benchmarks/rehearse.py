"""A rehearsal of the paper run without checkpoint and data: `python -m rehearse --model llava-onevision-7b`.

The published architecture at full size with random weights reads generated pictures: capture, variance of keys, blocked
and plain questions, a probe. What is reported is memory, speed and an estimate of the whole run; answers mean nothing.
Without a CUDA device the architecture is scaled down (the same layers, heads, views and image tokens, narrow), which
shows that the code runs and says nothing about speed on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from architectures import architecture, random_encoder, random_mlm
from PIL import Image
from tqdm import tqdm

from kvutils.answer import answer_all
from kvutils.datasets.pocket.sets import few_shot_episodes, key_images
from kvutils.datasets.samples import Episode, LabelledImage, ResizedImages
from kvutils.errors import KVUtilsError
from kvutils.keys import KeySelection, key_variance
from kvutils.kvcache import capture, capture_encoder
from kvutils.models import MLM, MODELS, QWEN
from kvutils.readout.features import FeatureExtractor
from kvutils.run.notebook import cache_root, provenance
from kvutils.run.plan import IMAGE, SIGLIP_WEIGHTS, WORK, Costs, Work, costs, timed
from kvutils.store import read_json, write_json
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.key_blocking import last_layers

GIB = 2**30
QUESTIONS = [f"is there a {thing} in the image ?" for thing in ("person", "dog", "car", "person or a dog")]
BLOCKED = 0.1  # share of the image keys of the last third of the layers


@dataclass(frozen=True)
class Speed:
    """Seconds: of an image read and captured, of its base view, of the same by the control model and SigLIP, of a text
    token behind the image, of a probe over all layers. about: how they were found."""

    about: str
    read: float
    small_read: float
    twin: float
    small_twin: float
    asked: float
    probe: float

    def seconds(self, work: Work) -> float:
        read, twin = (self.small_read, self.small_twin) if work.small else (self.read, self.twin)
        return work.reads * read + work.twins * twin + work.asked * self.asked + work.probes * self.probe

    @classmethod
    def from_rate(cls, rate: float, price: Costs, about: str) -> Speed:
        """From operations per second; probes count nothing."""
        whole, small = price.read / rate, price.small_read / rate
        siglip = price.siglip / rate
        return cls(about, whole, small, whole + siglip, small + siglip, price.asked / rate, 0.0)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix multiplication, the most that the device gives; best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5))


@dataclass
class Step:
    """One line of the report: what was done, how many, seconds, operations (0: not counted), peak memory in GiB."""

    what: str
    count: int
    unit: str
    seconds: float
    operations: float
    peak: float


class Rehearsal:
    """Runs the steps and keeps what they cost."""

    def __init__(self, model: str, device: torch.device, images: int, progress: bool = True):
        self.model, self.device, self.images, self.progress = model, device, images, progress
        self.small = device.type == "cpu"
        self.dtype = torch.float32 if self.small else torch.bfloat16
        self.steps: list[Step] = []

    def run(self) -> dict:
        """All steps; JSON-able report."""
        with tqdm(total=7, desc=f"rehearsal of {self.model}", unit="step", disable=not self.progress) as self.bar:
            self.rate = matmul_rate(self.device, self.dtype)
            self.bar.update()
            price = costs(*architecture(self.model, self.small))
            mlm = random_mlm(self.model, self.device, self.dtype, self.small)
            encoder = random_encoder(self.device, self.dtype, self.small)
            pictures = [one.image for one in ResizedImages(key_images(self.images), IMAGE)]
            capture(mlm, pictures[:1])  # kernels are chosen and memory is reserved in the first pass
            read = self.step("capture", len(pictures), "image", price.read, lambda: capture(mlm, pictures))
            small = read
            if mlm.family != QWEN:
                small = self.step("capture, base view only", len(pictures), "image", price.small_read,
                                  lambda: capture(replace(mlm, base_view_only=True), pictures))  # fmt: skip
            weights = sum(each.numel() for each in encoder.model.parameters())
            siglip = self.step("SigLIP", len(pictures), "image", price.siglip * weights / SIGLIP_WEIGHTS,
                               lambda: capture_encoder(encoder, mlm, pictures))  # fmt: skip
            self.block = self._block(mlm, pictures)
            blocks, asked = {"none": None, "blocked": self.block}, [(str(i), one, QUESTIONS) for i, one in enumerate(pictures)]
            tokens = 2 * len(pictures) * sum(len(mlm.tokenizer(q)["input_ids"]) + 4 for q in QUESTIONS)
            questions = self.step("questions, plain and blocked", tokens, "token", price.asked,
                                  lambda: list(answer_all(mlm, asked, blocks, max_new_tokens=4)))  # fmt: skip
            extra = max(questions - read * len(pictures) / tokens, 0.0)  # an image is read once for all questions
            probe = self._probe(mlm, encoder)
        speed = Speed(f"measured by a rehearsal on {self.device_name}", read, small, read + siglip, small + siglip, extra, probe)
        if self.small:
            full = costs(*architecture(self.model))
            achieved = price.read / read
            speed = Speed.from_rate(achieved, full, f"from {achieved / 1e9:.0f} GFLOP/s of the narrow model")
        numbers = sorted({work.notebook for work in WORK})
        return {
            "model": self.model, "device": self.device_name, "full_size": not self.small, "images": len(pictures),
            "tokens": price.tokens, "weights": price.weights, "matmul_rate": self.rate, "speed": asdict(speed),
            "steps": [asdict(step) | {"rate": self._rate(step)} for step in self.steps], "versions": provenance(mlm),
            "hours": {n: sum(speed.seconds(w) for w in WORK if w.notebook == n) / 3600 for n in numbers},
        }  # fmt: skip

    @property
    def device_name(self) -> str:
        return _device_name(self.device)

    def step(self, what: str, count: int, unit: str, operations: float, run: Callable[[], object]) -> float:
        """Seconds per unit of run(), kept for the report; operations: of one unit."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = timed(run, self.device)
        self.steps.append(Step(what, count, unit, seconds, operations * count, _peak(self.device)))
        self.bar.update()
        return seconds / count

    def _block(self, mlm: MLM, pictures: list[Image.Image]) -> KeySelection:
        """The keys of the last third of the layers that vary least over the pictures."""
        layers = last_layers(mlm.num_layers)
        found = []
        self.step("variance of keys", len(pictures), "image", 0,
                  lambda: found.append(key_variance(mlm, pictures, layers).result))  # fmt: skip
        values = found[0].flatten(1).cpu()
        least = values.argsort(dim=1)[:, : max(1, round(BLOCKED * values.shape[1]))]
        mask = torch.zeros_like(values, dtype=torch.bool).scatter(1, least, True).view(found[0].shape)
        return KeySelection("lowest variance", mask, layers)

    def _probe(self, mlm: MLM, encoder) -> float:
        """Seconds of a few-shot probe with its control, all sources."""
        episode = few_shot_episodes(per_fold=1, scenes=30)[0]
        images = dict(zip("abcdef", (*episode.supports, episode.query), strict=True))
        large = {name: LabelledImage(name, one.image, one.mask) for name, one in
                 zip(images, ResizedImages(list(images.values()), IMAGE), strict=True)}  # fmt: skip
        sample = Episode("probe", 0, episode.class_name, 0, large["f"], tuple(large[name] for name in "abcde"))
        extractor = FeatureExtractor(mlm, None, encoder, batch_size=2)
        features = dict(zip(large, extractor.images([(name, one.image) for name, one in large.items()]), strict=True))
        task = ForegroundSegmentation([sample], max_iter=100)  # features of random weights need not be separable
        return self.step("probes of one episode", 2, "probe", 0, lambda: task.score(sample, features, extractor))

    @staticmethod
    def _rate(step: Step) -> float:
        return step.operations / step.seconds


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def _peak(device: torch.device) -> float:
    """GiB: allocated on the GPU in this step, or resident of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def stored(model: str) -> Path:
    """Where the report of a full-size rehearsal is kept for `make plan`."""
    return cache_root() / "rehearsal" / f"{model}.json"


def stored_speed(model: str, device: torch.device) -> Speed | None:
    """The speed of the last full-size rehearsal of a model, if it was on such a device."""
    if not stored(model).is_file():
        return None
    report = read_json(stored(model))
    return Speed(**report["speed"]) if report["full_size"] and report["device"] == _device_name(device) else None


def text_of(report: dict) -> str:
    """The report for a terminal."""
    size = "full size" if report["full_size"] else "SCALED DOWN (no CUDA device): the same layers, heads and image tokens, narrow"
    versions = report["versions"]
    lines = [f"{report['model']}, random weights, {size}", f"{report['device']}, {versions['dtype']}, "
             f"{versions['attention']}, torch {versions['torch']}, transformers {versions['transformers']}",
             f"{report['weights'] / 1e9:.2f} billion weights, {report['tokens']:,} image tokens of {IMAGE[0]} x {IMAGE[1]}",
             f"matrix multiplication {report['matmul_rate'] / 1e12:.3g} TFLOP/s", "",
             f"{'step':<32}{'count':>8}{'per second':>12}{'of the matmul rate':>20}{'peak GiB':>10}"]  # fmt: skip
    for step in report["steps"]:
        share = f"{step['rate'] / report['matmul_rate']:.0%}" if step["operations"] else ""
        pace = f"{step['count'] / step['seconds']:.3g}"
        lines.append(f"{step['what']:<32}{step['count']:>8}{pace:>12}{share:>20}{step['peak']:>10.1f}")
    hours = report["hours"]
    lines += ["", "Estimate of the paper run at full size on this device, hours" + ("" if report["full_size"] else
              " (model alone, from the narrow model's rate)") + ":",
              "  " + "   ".join(f"{name} {value:,.1f}" for name, value in hours.items()) + f"   together {sum(hours.values()):,.1f}"]  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rehearse", description=__doc__.splitlines()[0])
    published = [name for name, spec in MODELS.items() if spec.profile == "paper"]
    parser.add_argument("--model", default="llava-onevision-7b", choices=published)
    parser.add_argument("--images", type=int, help="pictures to read (default 32 on a GPU, 2 without)")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = chosen.images or (2 if device.type == "cpu" else 32)
    if device.type == "cpu":
        print("No CUDA device: the architecture is scaled down. This takes some minutes.", file=sys.stderr, flush=True)
    try:
        report = Rehearsal(chosen.model, device, max(images, 2), sys.stderr.isatty()).run()
    except KVUtilsError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; a rehearsal is short and keeps nothing: start it again.", file=sys.stderr)
        return 130
    print(text_of(report))
    if report["full_size"]:
        write_json(stored(chosen.model), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
