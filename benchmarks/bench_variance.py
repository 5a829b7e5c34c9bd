"""What the variance of keys across images costs in memory: it must not grow with the number of images.

variance_memory_ratio    peak memory of a process that streams 1,000 images / of one that streams 10, in the
                         same batches. Keeping the keys of all images would about double it (see the detail).
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FEW, MANY, BATCH = 10, 1000, 5
STATUS = Path("/proc/self/status")


def run() -> list[dict]:
    """Figures {name, value, goal, detail}; lower is better. Each stream runs in a fresh process."""
    few, many = (_measure(count) for count in (FEW, MANY))
    added = [one["peak"] - one["start"] for one in (many, few)]
    kept = MANY * many["bytes_per_image"] / 2**20
    detail = (
        f"peak {many['peak']:.0f} MiB ({added[0]:.0f} more than at its start) / {few['peak']:.0f} MiB "
        f"({added[1]:.0f} more), {MANY} and {FEW} images; the keys of all would be {kept:.0f} MiB"
    )
    value = round(many["peak"] / few["peak"], 4)
    return [{"name": "variance_memory_ratio", "value": value, "goal": 1.05, "detail": detail}]


def _measure(images: int) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "--stream", str(images)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def _memory(field: str) -> float:
    """MiB of the resident set (VmRSS) or its peak (VmHWM); elsewhere than on Linux the peak for both."""
    if STATUS.exists():
        return int(STATUS.read_text().split(f"{field}:")[1].split()[0]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _pictures(count: int) -> Iterator:
    import numpy as np
    from PIL import Image

    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        yield Image.fromarray(pixels)


def _stream(images: int) -> None:
    """Stream in this process and print {start, peak} in MiB and the bytes of one image's keys as JSON."""
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "data" / "pocket")]
    import torch
    from word_tokenizer import build_word_processor
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    from kvutils.keys import key_variance
    from kvutils.models import wrap_mlm

    processor = build_word_processor(["a", "photo"], image_size=96, patch=8)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=96, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(processor.tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=8,
        ),
        image_token_index=processor.image_token_id,
        video_token_index=len(processor.tokenizer) + 1,
        image_grid_pinpoints=[[96, 96]],
    )  # fmt: skip
    torch.manual_seed(0)
    mlm = wrap_mlm(LlavaOnevisionForConditionalGeneration(config), processor, "bench")
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is that of the stream
    start = _memory("VmRSS")
    variance = key_variance(mlm, _pictures(images), batch_size=BATCH)
    result = {"start": start, "peak": _memory("VmHWM"), "bytes_per_image": 4 * variance.mean.numel()}
    assert variance.count == images
    print(json.dumps(result))


if __name__ == "__main__":
    if "--stream" in sys.argv:
        _stream(int(sys.argv[-1]))
    else:
        for record in run():
            print(f"{record['name']}: {record['value']:.3f} (goal <= {record['goal']}) {record['detail']}")
