"""What capture costs beyond the model itself: time and memory.

capture_time_ratio     capture() of a picture, K and V of all layers / a bare `model.model` forward of the
                       same inputs, already preprocessed. Medians of interleaved runs, CPU time on one thread
                       (other work on the machine does not count). Below 1 is possible: capture stops at the
                       keys and values of the last layer.
capture_memory_ratio   bytes of all tensor storages that stay alive after capture / bytes asked for.
"""

import gc
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    DynamicCache,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "pocket")]

from word_tokenizer import build_word_processor

from kvutils.kvcache import capture
from kvutils.models import MLM, wrap_mlm
from kvutils.prompts import prepare_text
from kvutils.vision import prepare_images


def onevision_shaped(layers: int = 8, hidden: int = 1024) -> MLM:
    """A random LLaVA-OneVision: 27x27 + 1 image tokens, grouped-query attention, MLPs that cost the most."""
    processor = build_word_processor(["a", "photo", "of"], image_size=378, patch=14)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=378, patch_size=14, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(processor.tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
            num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256,
        ),
        image_token_index=processor.image_token_id,
        video_token_index=len(processor.tokenizer) + 1,
        image_grid_pinpoints=[[378, 378]],
    )  # fmt: skip
    torch.manual_seed(0)
    return wrap_mlm(LlavaOnevisionForConditionalGeneration(config), processor, "onevision-shaped")


def run(repeats: int = 4) -> list[dict]:
    """Figures {name, value, goal, detail}; lower is better. Under a minute on one core."""
    mlm = onevision_shaped()
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    return [_time_ratio(mlm, photo, repeats), _memory_ratio(mlm, photo)]


def _time_ratio(mlm: MLM, photo: Image.Image, repeats: int) -> dict:
    vision = prepare_images(mlm, [photo])
    text = prepare_text(mlm, [mlm.prompt(prefix="a photo of")], vision)

    def bare() -> None:
        with torch.no_grad():
            mlm.model.model(
                input_ids=text.input_ids, attention_mask=text.attention_mask, position_ids=text.position_ids,
                pixel_values=vision.pixels, image_sizes=torch.tensor([[480, 640]]), batch_num_images=[2],
                past_key_values=DynamicCache(), use_cache=True,
            )  # fmt: skip

    def captured() -> None:
        capture(mlm, [photo], prefix="a photo of", features=False)

    times: dict[str, list[float]] = {"bare": [], "captured": []}
    bare(), captured()  # warm up
    for repeat in range(repeats):
        pair = [("bare", bare), ("captured", captured)]
        for name, function in pair if repeat % 2 else pair[::-1]:
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    bare_s, captured_s = (statistics.median(times[name]) for name in ("bare", "captured"))
    tokens = len(vision.layouts[0])
    detail = (
        f"{captured_s:.3f} s / {bare_s:.3f} s, {mlm.num_layers} layers, {tokens} image tokens, {repeats} runs"
    )
    return {
        "name": "capture_time_ratio",
        "value": round(captured_s / bare_s, 4),
        "goal": 1.10,
        "detail": detail,
    }


def _storages() -> dict[int, int]:
    """{address: bytes} of the storages of all tensors that are alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _memory_ratio(mlm: MLM, photo: Image.Image) -> dict:
    photos = [photo, photo.rotate(90, expand=True)]
    layers = [1, 3, 5]
    capture(mlm, photos, layers=layers)  # what the first call leaves in caches is not this capture's
    before = _storages()
    captures = capture(mlm, photos, layers=layers)
    kept = sum(size for address, size in _storages().items() if address not in before)
    config = mlm.model.config
    width = 2 * len(layers) * mlm.num_kv_heads * mlm.head_dim
    width += config.vision_config.hidden_size + config.text_config.hidden_size
    asked = sum(len(one.layout) for one in captures) * width * 4
    detail = f"{kept / 2**20:.2f} MiB kept / {asked / 2**20:.2f} MiB asked for, {len(captures)} photos"
    return {"name": "capture_memory_ratio", "value": round(kept / asked, 4), "goal": 1.2, "detail": detail}
