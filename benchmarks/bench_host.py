"""Seconds of work per item beside the model's forward: `host_seconds_per_item`, here and in another checkout.

    python benchmarks/bench_host.py [--gpu] [--old FOLDER] [--only NAME ...] [--layers 4]

One item of real size per task, scored by the task itself: the layout, the widths and the layers of LLaVA-OneVision-7B, random
features in place of those of a model. A sentence is timed as the benchmarks have them, several of one picture. The model here
is random, has the real widths where a readout uses its weights (output projection, norm, head) and is never run on a picture.
Times are CPU seconds of one thread, of all the work: what a GPU does in a run with one (maps, sorts, probes) is counted as
well. With a GPU they are seconds of the clock.

--gpu tells the two apart on a CPU: a GPU is simulated (`simulated_gpu`, where is said what is counted), the model and what each
checkout keeps there live on it, and the host's seconds of a run with a GPU stand beside the CPU seconds of the GPU's work.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from architectures import architecture
from PIL import Image
from simulated_gpu import CUDA, SimulatedGPU
from transformers import AutoModelForImageTextToText, SiglipVisionConfig, SiglipVisionModel

from kvutils.datasets.samples import Clip, DomainImage, Episode, ImageGroup, KeypointPair, LabelledImage, NamedMask
from kvutils.kvcache import Capture
from kvutils.layout import build_layout
from kvutils.models import MLM, Encoder, wrap_mlm
from kvutils.readout import features as features_module
from kvutils.readout.features import FeatureExtractor, ImageFeatures, image_tokens
from kvutils.tasks.co_segmentation import CoSegmentation
from kvutils.tasks.correspondence import SemanticCorrespondence, TemporalCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.prefix import run_prefixes
from kvutils.tasks.prefix_readouts import DomainPrefix, ReferringPrefix
from kvutils.tasks.prefixes import CONDITIONS
from kvutils.tasks.text_segmentation import ReferringSegmentation, SemanticSegmentation
from kvutils.vision import VisionInputs

COCO, IMAGENET, MSRC, DAVIS, BDD = (640, 480), (500, 375), (320, 213), (854, 480), (1280, 720)  # usual sizes of pictures
SENTENCES = 7  # of one picture of RefCOCO: 10,834 of 1,500
GROUP, FRAMES, POINTS = 10, 4, 12  # pictures of a class of MSRC; frames of a clip (a real one has about 67); key points of a pair
LAYERS, BATCH = 28, 8
NAMES = ("foreground_segmentation", "co_segmentation", "semantic_segmentation", "referring_segmentation", "semantic_correspondence",
         "temporal_correspondence", "feature_extraction", "prefix_referring", "prefix_domain")  # methods of `Workshop`
WRITER = SimpleNamespace(wording=SimpleNamespace(expression="{}", domain="{}"), correct=lambda kind, name: name)  # of prefixes, which nothing reads
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # freed memory is kept, as on a GPU; returning it would be host time


@dataclass
class Item:
    """What one item is, and the run that is timed after all that it needs was made; `count`: items of one run."""

    unit: str
    run: Callable[[], object]
    count: int = 1


def real_width_mlm(device: torch.device) -> MLM:
    """LLaVA-OneVision-7B with its real hidden size, heads and layers, and a narrow MLP; the layers share their weights."""
    config, processor = architecture("llava-onevision-7b", small=True)
    text = config.text_config
    text.hidden_size, text.head_dim, text.intermediate_size = 3584, 128, 64
    text.num_hidden_layers, config.vision_config.num_hidden_layers, config.vision_config.hidden_size = 1, 1, 1152
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    layers = model.model.language_model.layers
    weights = {id(each): each for each in layers[0].parameters()}
    for number in range(1, LAYERS):
        layers.append(copy.deepcopy(layers[0], dict(weights)))  # known to the copy, so not copied
        layers[-1].self_attn.layer_idx = number
    text.num_hidden_layers = LAYERS
    return wrap_mlm(model.to(device), processor, "llava-onevision-7b, random")


class Workshop:
    """Makes pictures, masks and features, and the extractor that has them at hand."""

    def __init__(self, layers: int, device: torch.device = DEVICE):
        torch.manual_seed(0)
        self.device, self.mlm = device, real_width_mlm(device)
        tower = SiglipVisionModel(SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=1,
                                                     num_attention_heads=16, image_size=384, patch_size=14))  # fmt: skip
        encoder = Encoder(tower.eval().to(device), None, "siglip-so400m, random", "in memory")
        text = SimpleNamespace(name="random", template="{}", embed=lambda _: torch.nn.functional.normalize(torch.randn(1152), dim=0))
        self.chosen = np.linspace(0, LAYERS - 1, layers).round().astype(int).tolist()
        self.extractor = FeatureExtractor(self.mlm, self.mlm, encoder, encoder_text=text, keys=False, layers=self.chosen)
        self.of_prefixes = FeatureExtractor(self.mlm, keys=False, layers=self.chosen)
        self.rng = np.random.default_rng(0)

    def mask(self, size: tuple[int, int], labels: int = 2) -> np.ndarray:
        """(H, W) uint8 of a few smooth regions; an object shows on a tenth of the picture, as in RefCOCO."""
        coarse = torch.from_numpy(self.rng.normal(size=(1, labels, 5, 6)))
        planes = torch.nn.functional.interpolate(coarse, size=size[::-1], mode="bicubic")[0].numpy()
        shown = planes.argmax(0) if labels > 2 else planes[0] > np.quantile(planes[0], 0.9)
        return shown.astype(np.uint8)

    def picture(self, name: str, size: tuple[int, int], labels: int = 2, kind=LabelledImage, **more):
        return kind(name, Image.new("RGB", size, "grey"), self.mask(size, labels), **more)

    def features(self, picture, extractor: FeatureExtractor | None = None) -> ImageFeatures:
        """Noise, and in each channel a little of what the mask shows, so that there is something to find."""
        extractor = extractor or self.extractor
        layout = build_layout(self.mlm, picture.image.size)
        layout = layout.select(image_tokens(layout))
        shown = torch.from_numpy(layout.token_labels(picture.mask)[0].clip(0))
        found = {}
        for source in (*extractor.sources, "head.encoder", "head.encoder_original"):  # head: what text scores read of a tower that is cut
            width = {"pixels": 5, "projector": 3584}.get(source, 1152 if "encoder" in source else 512)
            means = torch.randn(int(shown.max()) + 1, width, generator=torch.Generator().manual_seed(width))
            found[source] = (torch.randn(len(layout), width) + 0.3 * means[shown]).half().to(self.device)
        return ImageFeatures(layout, found, self.device)

    def scored(self, task, pictures: list, unit: str, count: int = 1) -> Item:
        found = {one.id: self.features(one) for one in pictures}

        def run() -> None:
            for sample in task.samples:
                needed = {name: found[name] for name, _ in task.images(sample)}
                assert task.score(sample, needed, self.extractor), f"{task.name} scored nothing"

        return Item(unit, run, count)

    def named(self, picture: LabelledImage, texts: list[str]) -> list[NamedMask]:
        for text in texts:
            self.extractor.alignment.text(text)  # the model reads a text once for all pictures
        return [NamedMask(f"{picture.id}/{i}", picture.id, picture.image, text, picture.mask, picture.id, "fish")
                for i, text in enumerate(texts)]  # fmt: skip

    def foreground_segmentation(self) -> Item:
        pictures = [self.picture(f"e{i}", COCO) for i in range(6)]
        episode = Episode("episode", 0, "fish", 0, pictures[0], tuple(pictures[1:]))
        return self.scored(ForegroundSegmentation([episode]), pictures, "episode of 1 + 5 pictures")

    def co_segmentation(self) -> Item:
        pictures = [self.picture(f"g{i}", MSRC) for i in range(GROUP)]
        saliency = {one.id: torch.rand(len(image_tokens(build_layout(self.mlm, MSRC)))) for one in pictures}
        self.extractor.saliency = lambda item, *_: saliency[item[0]]
        return self.scored(CoSegmentation([ImageGroup("group", "fish", tuple(pictures))]), pictures, f"group of {GROUP} pictures")

    def semantic_segmentation(self) -> Item:
        picture = self.picture("imagenet", IMAGENET)
        return self.scored(SemanticSegmentation(self.named(picture, ["fish"])), [picture], "picture with a class name")

    def referring_segmentation(self) -> Item:
        picture = self.picture("coco", COCO)
        task = ReferringSegmentation(self.named(picture, [f"fish {'car ' * i}" for i in range(SENTENCES)]))
        return self.scored(task, [picture], f"sentence with its control, {SENTENCES} of a picture", SENTENCES)

    def semantic_correspondence(self) -> Item:
        source, target = (self.picture(name, IMAGENET) for name in "ab")
        sides = [value for one in (source, target) for value in (one.id, one.image, self.rng.uniform(1, 300, (POINTS, 2)))]
        pair = KeypointPair("pair", "fish", *sides, np.array([50.0, 50, 250, 250]))
        return self.scored(SemanticCorrespondence([pair]), [source, target], "pair of pictures")

    def temporal_correspondence(self) -> Item:
        pictures = [self.picture(f"clip/{i:05d}", DAVIS, 3) for i in range(FRAMES)]
        clip = Clip("clip", tuple(one.image for one in pictures), np.stack([one.mask for one in pictures]))
        return self.scored(TemporalCorrespondence([clip]), pictures, "frame of a clip", FRAMES)

    def feature_extraction(self) -> Item:
        """From what a forward leaves on the device to features: the models are replaced by what they return."""
        layout = build_layout(self.mlm, COCO)
        images = [(str(i), Image.new("RGB", COCO, (i, 0, 0))) for i in range(BATCH)]
        states = torch.randn(len(self.chosen), self.mlm.num_kv_heads, len(layout), self.mlm.head_dim, device=self.device)
        towers = [torch.randn(len(layout), width, device=self.device) for width in (1152, 3584)]
        captured = Capture(layout, tuple(self.chosen), states, states, *towers)
        forward = {"prepare_images": lambda _, images, *__: VisionInputs(torch.empty(0), [layout] * len(images)),
                   "encode_images": lambda _, vision: tuple([tower] * len(vision.layouts) for tower in towers),
                   "capture_prepared": lambda _, vision, *__, **___: [captured] * len(vision.layouts),
                   "encode_prepared": lambda _, __, vision, *___, **____: [captured.encoder] * len(vision.layouts)}  # fmt: skip

        def run() -> None:
            with mock.patch.multiple(features_module, **forward):
                self.extractor.images(images)

        return Item(f"picture, {BATCH} in a batch", run, BATCH)

    def prefix(self, readout, unit: str) -> Item:
        """A readout of notebook 04 over its only sample."""
        readout.prefixes = lambda sample: {condition: condition for condition in CONDITIONS}
        found = {condition: [self.features(readout.samples[0], self.of_prefixes)] for condition in CONDITIONS}
        self.of_prefixes.images = lambda items, prefix=None, *_, **__: [found[each or "none"][0] for each in prefix or [None]]
        return Item(f"{unit}, {len(readout.families)} scores", lambda: run_prefixes(readout, progress=False))

    def prefix_referring(self) -> Item:
        sample = self.named(self.picture("coco", COCO), ["fish"])[0]
        self.of_prefixes.alignment.text("fish")
        return self.prefix(ReferringPrefix([sample], self.of_prefixes, WRITER, "expression"), "sentence")

    def prefix_domain(self) -> Item:
        names = [f"fish {'car ' * i}" for i in range(19)]
        for name in names:
            self.of_prefixes.alignment.text(name)
        pictures = [self.picture(domain, BDD, len(names) + 1, DomainImage, domain=domain) for domain in ("night", "fog")]
        readout = DomainPrefix(pictures, [], names, self.of_prefixes, WRITER, "text")
        readout.samples = pictures[:1]
        return self.prefix(readout, "street scene by text")


def measure(names: list[str], layers: int) -> dict[str, dict]:
    """{name: seconds per item and what an item is}; every item is timed once, with nothing of it at hand."""
    torch.set_num_threads(1)
    workshop, found = Workshop(layers), {}
    for name in names:
        item = getattr(workshop, name)()
        start = time.process_time() if DEVICE.type == "cpu" else time.perf_counter()
        item.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        end = time.process_time() if DEVICE.type == "cpu" else time.perf_counter()
        found[name] = {"unit": item.unit, "seconds": (end - start) / item.count}
        print(f"{name}: {found[name]['seconds']:.3g} s", file=sys.stderr, flush=True)
    return found


def measure_shares(names: list[str], layers: int) -> dict[str, dict]:
    """As `measure`, on a simulated GPU: seconds are the host's; the GPU's, and its launches, stand beside."""
    torch.set_num_threads(1)
    found = {}
    with SimulatedGPU() as gpu:
        workshop = Workshop(layers, CUDA)
        for name in names:
            item = getattr(workshop, name)()
            gpu.restart()
            item.run()
            shares = {"seconds": gpu.host, "gpu_seconds": gpu.device, "overhead": gpu.overhead, "launches": gpu.launches}
            found[name] = {"unit": item.unit} | {key: value / item.count for key, value in shares.items()}
            print(name, *(f"{key} {value / item.count:.3g}" for key, value in shares.items()), file=sys.stderr, flush=True)
    return found


def elsewhere(checkout: Path, names: list[str], layers: int, gpu: bool) -> dict[str, dict]:
    """`measure` or `measure_shares` with the package and the architectures of another checkout."""
    paths = os.pathsep.join([*(str(checkout / part) for part in ("", "benchmarks", "data/pocket")), str(Path(__file__).parent)])
    command = [sys.executable, "-P", __file__, "--json", "--layers", str(layers), "--only", *names, *["--gpu"] * gpu]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths} | KEPT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def run() -> list[dict]:
    """Figures {name, value, goal, detail} of what takes seconds on a CPU; the whole table is `main`'s."""
    found = measure(["semantic_segmentation", "referring_segmentation", "feature_extraction", "prefix_referring"], 4)
    return [{"name": f"host_seconds_per_item_{name}", "value": round(one["seconds"], 4), "goal": None,
             "detail": f"{one['unit']}; 4 of {LAYERS} layers"} for name, one in found.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true",
                        help="on a CPU: the host's seconds of a run with a GPU, which is simulated (without launches and bus)")
    parser.add_argument("--old", type=Path, help="folder of another checkout, whose times stand beside")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"some of: {', '.join(NAMES)}")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers to read, of {LAYERS} (default: all)")
    parser.add_argument("--json", action="store_true", help="print the seconds as JSON")
    chosen = parser.parse_args()
    if chosen.json:
        print(json.dumps((measure_shares if chosen.gpu else measure)(chosen.only, chosen.layers)))
        return
    here = elsewhere(Path(__file__).resolve().parents[1], chosen.only, chosen.layers, chosen.gpu)
    there = elsewhere(chosen.old.resolve(), chosen.only, chosen.layers, chosen.gpu) if chosen.old else {}
    columns = {"seconds": DEVICE.type}
    if chosen.gpu:
        columns = {"seconds": "host seconds", "gpu_seconds": "CPU seconds of the GPU's work", "launches": "launches"}
    print(f"host_seconds_per_item, {chosen.layers} of {LAYERS} layers: {', '.join(columns.values())}")
    for name, one in here.items():
        cells = []
        for key in columns:
            old = there[name][key] if name in there else None
            cells.append(f"{one[key]:>10.3g}" + (f" (old {old:.3g}, {old / max(one[key], 1e-9):.1f}x)" if old else ""))
        print(f"  {name:<26}{''.join(cells)}   {one['unit']}")


if __name__ == "__main__":
    main()
