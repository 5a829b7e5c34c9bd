"""How much the paper profile computes: images read, text asked, probes fitted, per notebook, and what that costs a device.

Counts follow the protocol of every data set (data/claims.yaml, the loaders' defaults); where the number depends on the
draw (a support image that was read for the episode before) the larger one is taken. Costs are the model's alone unless
they were measured by a rehearsal: multiply-adds count as two operations, attention over the image included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoModelForImageTextToText

from kvutils.layout import build_layout, tiling
from kvutils.models import MLM, QWEN, quiet_transformers

IMAGE = (640, 480)  # the usual image of COCO, by which all images are counted
SIGLIP_WEIGHTS = 428_000_000  # of so400m/14 at 384, the tower
_DRAWS, _READING_DRAWS = 20, 5  # of the random controls of notebook 03
_BLOCKS = 2 * _DRAWS + _READING_DRAWS + 6  # conditions of the blocking experiment
_CELLS = 25  # of the sweep


@dataclass(frozen=True)
class Work:
    """One measurement. reads: images read by the model, with a prefix or without; twins: how many of these also by the model
    with random weights and by SigLIP; asked: text tokens behind images that are read already; probes: probes fitted, each
    for all layers; small: base views only."""

    notebook: str
    what: str
    reads: int
    twins: int = 0
    asked: int = 0
    probes: int = 0
    small: bool = False


WORK: tuple[Work, ...] = (
    # 4 folds x 1,000 episodes of 1 + 5 images; a probe and its shuffled control each
    Work("01", "foreground segmentation", 24_000, 24_000, probes=8_000),
    Work("01", "co-segmentation", 140, 70),  # 7 classes x 10 images, read again for the saliency
    Work("01", "semantic segmentation", 752, 752),  # ImageNet-S-50 validation
    Work("01", "semantic segmentation by probe", 802, 802, probes=2),  # and 50 to train on
    Work("01", "referring segmentation", 1_934, 1_934),  # 1,500 images, 434 cut by the chunks of 25 of 10,834 sentences
    Work("01", "semantic correspondence", 24_468, 24_468),  # 12,234 pairs
    Work("01", "temporal correspondence", 1_999, 1_999),  # frames of 30 sequences
    Work("02", "the six tasks again, from stored scores", 0),
    Work("03", "variance of keys and attention to them", 1_200, 1_200, asked=200 * 4 * 20 * 2),
    # 3 x 1,000 + 14 x 100 images at most, 3 families of conditions over 28 layers, questions of 20 tokens
    Work("03", "knock-out curve", 1_600, asked=4_000 * 20 * 3 * 28),
    # 500 images with 12 different questions each: every block once; the sweep on one half, its best cell on the other
    Work("03", "POPE under blocks", 1_000, asked=6_000 * 20 * (_BLOCKS + (_CELLS + 3) // 2)),
    Work("03", "MME under blocks", 1_187, asked=2_374 * 30 * _BLOCKS),
    Work("04", "referring segmentation behind prefixes", 10_834 * 2 * 5),  # sentences x kinds of prefix x conditions
    Work("04", "domains behind prefixes", 2 * 5 * 250, probes=5),
    Work("04", "answers behind prefixes", 150 * 5, asked=150 * 12 * 20 * 5),
    # 117 + 135 items of three images, in their prompt and alone
    Work("05", "multiple choice", 252 * 3 * 2, 252 * 3 * 2, asked=252 * 80, small=True),
)


@dataclass(frozen=True)
class Costs:
    """Operations of one model: of an image of `IMAGE` size, of its base view, of a text token behind it, of SigLIP on it.
    tokens, small_tokens: image tokens of both; weights: number of weights; held: bytes of an image's features in main memory;
    stacked: bytes of what a few-shot probe and its control would read at once."""

    tokens: int
    small_tokens: int
    weights: int
    read: float
    small_read: float
    asked: float
    siglip: float
    held: int
    stacked: int

    def of(self, work: Work) -> float:
        """Operations of a measurement, without its probes."""
        read = self.small_read if work.small else self.read
        return work.reads * read + work.twins * (read + self.siglip) + work.asked * self.asked


def costs(config, processor) -> Costs:
    """Costs of an architecture; nothing is allocated."""
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForImageTextToText.from_config(config)
    mlm = MLM(model, processor, "meta", config.model_type, "")
    text = config.get_text_config()
    per_token = 2 * _weights(model.model.language_model.layers)
    tower = model.model.visual if mlm.family == QWEN else model.model.vision_tower
    per_patch = 2 * _weights(tower)
    width = text.num_attention_heads * mlm.head_dim
    sizes = _sizes(mlm)
    reads = []
    for tokens, patches in sizes:
        attention = 2 * text.num_hidden_layers * tokens**2 * width  # causal: half of the square
        reads.append(per_token * tokens + attention + per_patch * patches)
    (tokens, patches), (small_tokens, _) = sizes
    asked = per_token + 4 * text.num_hidden_layers * tokens * width + 2 * text.hidden_size * text.vocab_size
    cached = 3 * text.num_hidden_layers * mlm.num_kv_heads * mlm.head_dim  # keys, values, values of the control model
    channels = 5 + 2 * 1152 + text.hidden_size + cached
    siglip = 2 * SIGLIP_WEIGHTS * (729 if mlm.family == QWEN else patches)
    return Costs(tokens, small_tokens, _weights(model), *reads, asked, siglip, 2 * tokens * channels, 4 * 12 * tokens * cached)


def _sizes(mlm: MLM) -> list[tuple[int, int]]:
    """(image tokens, patches in the tower) of a whole image and of its base view alone."""
    if mlm.family == QWEN:
        grid = (round(IMAGE[1] / 28), round(IMAGE[0] / 28))
        tokens = len(build_layout(mlm, IMAGE, grid=grid))
        return [(tokens, 4 * tokens)] * 2
    config = mlm.model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    tall, wide = tiling(mlm, IMAGE)
    crops = 1 + (tall // config.image_size) * (wide // config.image_size)
    return [(len(build_layout(mlm, IMAGE)), crops * patches), (len(build_layout(mlm, IMAGE, True)), patches)]


def _weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def decoder_rate(config, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Operations per second of one decoder layer of full size, measured: random weights, `tokens` tokens, best of three."""
    text = config.get_text_config()
    settings = {name: value for name, value in text.to_dict().items() if name != "layer_types"}
    with quiet_transformers(), torch.device(device):
        text = type(text).from_dict(settings | {"num_hidden_layers": 1, "vocab_size": 8})
        layer = AutoModel.from_config(text, dtype=dtype).eval()
        states = torch.randn(1, tokens, text.hidden_size, dtype=dtype)
    seconds = min(timed(lambda: layer(inputs_embeds=states, use_cache=False), device) for _ in range(3))
    return (2 * _weights(layer.layers) * tokens + 2 * tokens**2 * text.hidden_size) / seconds


def timed(run, device: torch.device) -> float:
    """Seconds of run(), its work on the device included."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
