"""How well the pocket model answers on held-out scenes, beside the blind baseline."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch

from .model import answer_logits
from .packing import Packed, Sampler, pack


def block_right(packed: Packed, logits: torch.Tensor) -> list[tuple[int, str, bool]]:
    """(sequence, kind, right) of every block: right when every answer token is the most likely one, greedily, given
    the true tokens before it (for the one-word answers this is what generation gives)."""
    where = packed.labels >= 0
    right = (logits.argmax(-1) == packed.labels[where]).cpu()
    row, block = where.nonzero()[:, 0].cpu(), packed.block[where].cpu()
    verdict: dict[tuple[int, int], bool] = {}
    for r, b, ok in zip(row.tolist(), block.tolist(), right.tolist(), strict=True):
        verdict[r, b] = verdict.get((r, b), True) and ok
    return [(r, packed.kinds[r][b - 1], ok) for (r, b), ok in verdict.items()]


@torch.no_grad()
def quick_accuracy(
    mlm, sampler: Sampler, embed: Callable, slots: int, device: str, scenes: int = 150, seed: int = 5
) -> dict[str, float]:
    """Accuracy per question kind on a few held-out scenes, to watch training."""
    mlm.eval()
    right = defaultdict(list)
    for kind in ("single", "marked", "correspondence", "style_match", "class_match"):
        samples = sampler.draw(kind, scenes, np.random.default_rng(seed))
        for first in range(0, scenes, 50):
            packed = pack(samples[first : first + 50], slots).to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                logits = answer_logits(mlm, packed, embed(packed.images))
            for _, name, ok in block_right(packed, logits):
                right[name].append(ok)
    mlm.train()
    return {name: float(np.mean(found)) for name, found in sorted(right.items())}
