"""The published checkpoints' folders (tokenizer, chat template, processor, configuration; no weights) with narrow random models.

`KVUTILS_PUBLISHED` names the folder that holds them. Tests that need it take the fixture `published` of conftest, which
skips where it is unset."""

import os
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from kvutils.models import MLM, NEXT, ONEVISION, QWEN, wrap_mlm
from kvutils.processors import load_processor

FOLDERS = {ONEVISION: "llava-onevision-qwen2-7b-ov-hf", NEXT: "llama3-llava-next-8b-hf", QWEN: "Qwen2.5-VL-7B-Instruct"}


def folder(family: str) -> Path:
    """The folder of a family's published checkpoint."""
    return Path(os.environ["KVUTILS_PUBLISHED"]) / FOLDERS[family]


def narrow_config(family: str, layers: int = 2):
    """The published configuration with few and narrow layers; vocabulary, heads and geometry (tiles, patches, grids) are kept."""
    config = AutoConfig.from_pretrained(folder(family))
    text, vision = config.get_text_config(), config.vision_config
    side = 8  # channels of a head
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = layers, text.num_attention_heads * side, 32
    text.layer_types = (getattr(text, "layer_types", None) or [])[:layers] or None
    text.head_dim = side
    if family == QWEN:
        text.rope_parameters["mrope_section"] = [1, 1, 2]  # of the head's half
        vision.depth, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 2, 16 * side, 32, text.hidden_size
        vision.fullatt_block_indexes = [1]
    else:
        vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size = 2, 16 * side, 32
    return config


@cache
def published_model(family: str, layers: int = 2) -> MLM:
    """A narrow random model behind the published processor; share it, and leave it as it is."""
    config = narrow_config(family, layers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return wrap_mlm(model, load_processor(folder(family), family), FOLDERS[family])
