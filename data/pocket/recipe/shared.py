"""What the pocket models of all families have in common: sizes, the text tower of stage 1, cut-outs of pictures."""

import torch
from torch import nn
from transformers import SiglipTextConfig

from recipe.captions import LONGEST
from recipe.packing import EOS, PAD, TOKEN
from recipe.pool import GRID, PATCH

HIDDEN = 128
# Of every family's language model; query and key-value heads are in the ratio of the published ones. Twelve layers are the main model's:
# the others, with more to compute per token or more tokens a picture, have 8, so that training takes about as long.
LANGUAGE = {
    "vocab_size": len(TOKEN), "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 12, "head_dim": 16,
    "max_position_embeddings": 1024, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS, "tie_word_embeddings": False,
    "initializer_range": 0.04,
}  # fmt: skip


def text_tower(projection: int = HIDDEN) -> dict:
    """Of the captions, in a contrastive pair."""
    return SiglipTextConfig(
        vocab_size=len(TOKEN), hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LONGEST, projection_size=projection, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    ).to_dict()  # fmt: skip


def finished(mlm: nn.Module) -> nn.Module:
    mlm.generation_config.eos_token_id = EOS
    mlm.generation_config.pad_token_id = PAD
    return mlm


@torch.no_grad()
def match_length(mlm: nn.Module, tokens: torch.Tensor, last: nn.Linear) -> None:
    """Scale the projector's last layer, which makes `tokens`, to tokens as long as words: the first layer replaces a token by what it
    computes from it, and tokens many times longer stay in all that later layers read."""
    factor = mlm.get_input_embeddings().weight.norm(dim=-1).mean() / tokens.norm(dim=-1).mean()
    last.weight *= factor
    last.bias *= factor


def patch_windows(pixels: torch.Tensor, first: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of `side` x `side` patches at their native scale, and the ids of their positions in the full grid.

    `pixels` (B, 3, 96, 96); `first` (B, 2) row and column of the first patch: (B, 3, 8 side, 8 side), (B, side²)."""
    steps = torch.arange(side * PATCH, device=pixels.device)
    rows = first[:, 0, None] * PATCH + steps
    columns = first[:, 1, None] * PATCH + steps
    window = pixels[torch.arange(len(pixels), device=pixels.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    cell = torch.arange(side, device=pixels.device)
    ids = (first[:, 0, None, None] + cell[:, None]) * GRID + first[:, 1, None, None] + cell
    return window.permute(0, 3, 1, 2), ids.flatten(1)
