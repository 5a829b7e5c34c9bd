"""The published architectures without their weights: what a rehearsal runs and a plan counts.

The numbers are those of the published configurations, written down by hand: nothing is downloaded. `check_mlm` compares
the same numbers with the real configuration when a checkpoint is loaded. The tokenizer is a small one of words, so
questions have other token counts than the real models give them; image tokens are exactly the real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvutils.checkpoints import MODELS, NEXT, ONEVISION, QWEN, base_name
from kvutils.errors import ModelError, one_of
from kvutils.models import MLM, Encoder, wrap_mlm
from kvutils.processors import ImageOnlyLlavaOnevisionProcessor, ImageOnlyQwen2_5_VLProcessor, quiet_transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data" / "pocket"))
from word_tokenizer import WORDS, build_word_tokenizer

# width of the MLP, vocabulary, tied word embeddings; layers, heads and head dimension are those of `MODELS`
_TEXT: dict[str, tuple[int, int, bool]] = {
    "llava-onevision-7b": (18944, 152000, False),
    "llava-onevision-0.5b": (4864, 152000, True),
    "qwen2.5-vl-7b": (18944, 152064, False),
    "qwen2.5-vl-3b": (11008, 151936, True),
    "llava-next-llama3-8b": (14336, 128320, False),
}
SMALL_MLP = 64  # of a scaled-down model: as many query heads as key-value heads; layers, and the width of keys and values, stay
_WORDS = [*WORDS, *"person dog ( ) user assistant".split()]
_LLAVA_TEMPLATE = (
    "{% for m in messages %}user {% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endfor %} assistant"
)
_QWEN_TEMPLATE = (
    "{% for m in messages %}user {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} assistant"
)
_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def architecture(name: str, small: bool = False) -> tuple[PretrainedConfig, Any]:
    """(configuration, processor) of a published model. small: the same structure, geometry, layers and heads, but narrow.

    Raises ModelError for a name that is not among the published models.
    """
    name = base_name(name)
    one_of("architecture", name, _TEXT, ModelError)
    layers, heads, kv_heads, head_dim, _ = MODELS[name].sizes
    mlp, vocabulary, tied = _TEXT[name]
    if small:
        heads, mlp, vocabulary = kv_heads, SMALL_MLP, 1024
    text = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "hidden_size": heads * head_dim, "intermediate_size": mlp, "vocab_size": vocabulary,
            "tie_word_embeddings": tied, "max_position_embeddings": 32768, "pad_token_id": 0}  # fmt: skip
    with quiet_transformers():  # they miss the published vocabulary's special tokens
        return _BUILD[MODELS[name].family](text, head_dim, small)


def random_mlm(name: str, device: str | torch.device, dtype: torch.dtype, small: bool = False, seed: int = 0) -> MLM:
    """A model of the published architecture with random weights, ready for everything that takes an MLM."""
    config, processor = architecture(name, small)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return wrap_mlm(model, processor, f"{name}, random{' and narrow' if small else ''}")


def random_encoder(device: str | torch.device, dtype: torch.dtype, small: bool = False, seed: int = 0) -> Encoder:
    """SigLIP so400m patch14-384 with random weights."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = SiglipVisionModel(_siglip(27, small)).to(dtype).eval()
    return Encoder(model, SiglipImageProcessorPil(size={"height": 384, "width": 384}), "siglip-so400m, random", "in memory")


def _siglip(layers: int, small: bool) -> SiglipVisionConfig:
    width = {"hidden_size": 128, "intermediate_size": 256} if small else {"hidden_size": 1152, "intermediate_size": 4304}
    return SiglipVisionConfig(image_size=384, patch_size=14, num_hidden_layers=layers, num_attention_heads=16,
                              vision_use_head=False, **width)  # fmt: skip


def _onevision(text: dict, head_dim: int, small: bool):
    side, patch, token = 384, 14, "<image>"
    pinpoints = [[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)]
    tokenizer = build_word_tokenizer(_WORDS)
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=pinpoints
    )
    processor = ImageOnlyLlavaOnevisionProcessor(
        image_processor, tokenizer, (side // patch) ** 2, "full", chat_template=_LLAVA_TEMPLATE
    )
    config = LlavaOnevisionConfig(
        vision_config=_siglip(26, small), text_config=Qwen2Config(rope_parameters=_rope(1e6), **text),
        image_token_index=tokenizer.convert_tokens_to_ids(token), video_token_index=len(tokenizer) + 1,
        image_grid_pinpoints=pinpoints, tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    return config, processor


def _next(text: dict, head_dim: int, small: bool):
    side, patch = 336, 14
    pinpoints = [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    tokenizer = build_word_tokenizer(_WORDS)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_LLAVA_TEMPLATE,
    )  # fmt: skip
    width = {"hidden_size": 128, "intermediate_size": 256} if small else {"hidden_size": 1024, "intermediate_size": 4096}
    tower = CLIPVisionConfig(image_size=side, patch_size=patch, num_hidden_layers=24, num_attention_heads=16, **width)
    config = LlavaNextConfig(
        vision_config=tower, text_config=LlamaConfig(rope_parameters=_rope(5e5), **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
        tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    return config, processor


def _qwen(text: dict, head_dim: int, small: bool):
    tokenizer = build_word_tokenizer(_WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": _MARKS})
    start, end, image, video = tokenizer.convert_tokens_to_ids(_MARKS)
    image_processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    processor = ImageOnlyQwen2_5_VLProcessor(image_processor, tokenizer, chat_template=_QWEN_TEMPLATE)
    tower = {"depth": 32, "num_heads": 16, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
             "out_hidden_size": text["hidden_size"]}  # fmt: skip
    tower |= {"hidden_size": 128, "intermediate_size": 256} if small else {"hidden_size": 1280, "intermediate_size": 3420}
    sections = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]  # 16, 24, 24 of the 64 rotary frequencies
    config = Qwen2_5_VLConfig(
        vision_config=tower, text_config=text | {"rope_parameters": _rope(1e6) | {"mrope_section": sections}},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    return config, processor


def _rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


_BUILD = {ONEVISION: _onevision, QWEN: _qwen, NEXT: _next}
