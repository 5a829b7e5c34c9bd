"""Tiny random models of the real `transformers` classes, with tokenizers and processors built in memory.

They keep what makes the families hard: grouped-query attention (4 query, 2 key-value heads), several tile
resolutions, newline tokens, patches that do not divide the tile, shrinking above anyres_max_9, a CLS token,
window attention with some full-attention blocks, a first token that the tokenizer adds. Beside them what else the tests
make by hand: a token grid, a table of scores, answers of a given accuracy.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from word_tokenizer import build_word_processor, build_word_tokenizer

from kvutils.layout import TokenLayout
from kvutils.models import MLM, Encoder, wrap_mlm
from kvutils.processors import ImageOnlyLlavaOnevisionProcessor, ImageOnlyQwen2_5_VLProcessor
from kvutils.prompts import TextInputs, prepare_text
from kvutils.tasks.base import ScoreTable
from kvutils.tasks.yes_no import Scored
from kvutils.vision import VisionInputs, encode_images, prepare_images

WORDS = "a red blue fish car on the left right what is colour of this picture user assistant yes no :".split()

# As the published LLaVA templates: images are moved to the front of the message.
IMAGES_FIRST = (
    "{% for m in messages %}user {% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
# As Qwen's: items in order, images between start and end tokens.
IN_ORDER = (
    "{% for m in messages %}user {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 8192, "initializer_range": 0.2, "pad_token_id": 0}  # fmt: skip
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def tiny_onevision(seed: int = 0, attention: str = "sdpa", words: list[str] = WORDS, **text) -> MLM:
    """36-pixel tiles of 4x4 patches (8 px: a rim of 4 px stays unseen), up to 6x6 tiles, shrunk above 9."""
    side, patch = 36, 8
    pinpoints = [[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)]
    tokenizer = build_word_tokenizer(words)
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=pinpoints
    )
    processor = ImageOnlyLlavaOnevisionProcessor(image_processor, tokenizer, (side // patch) ** 2, "full", chat_template=IMAGES_FIRST)
    config = LlavaOnevisionConfig(
        vision_config=_siglip(side, patch),
        text_config=Qwen2Config(vocab_size=len(tokenizer), **TEXT | text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=len(tokenizer) + 1,
        image_grid_pinpoints=pinpoints,
    )
    return _wrap(LlavaOnevisionForConditionalGeneration, config, processor, seed, attention)


def tiny_next(seed: int = 0, attention: str = "sdpa", words: list[str] = WORDS, language: type = LlamaConfig, **text) -> MLM:
    """CLIP tower, 32-pixel tiles of 4x4 patches, feature layer -2 without CLS; texts get a first token. language: its configuration."""
    side, patch = 32, 8
    pinpoints = [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    tokenizer = build_word_tokenizer([*words, "<bos>"])
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    start = [("<bos>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", special_tokens=start)
    square = {"height": side, "width": side}
    image_processor = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=pinpoints)
    processor = LlavaNextProcessor(
        image_processor, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=IMAGES_FIRST,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=side, patch_size=patch, initializer_range=0.2, **TOWER),
        text_config=language(vocab_size=len(tokenizer), **TEXT | text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    return _wrap(LlavaNextForConditionalGeneration, config, processor, seed, attention)


def tiny_qwen(seed: int = 0, attention: str = "sdpa", words: list[str] = WORDS, **text) -> MLM:
    """8-pixel tokens of 2x2 patches, windows of 3x3 tokens, full attention in the second and last block."""
    patch = 4
    tokenizer = build_word_tokenizer(words)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    edges = {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
    image_processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=edges)
    processor = ImageOnlyQwen2_5_VLProcessor(image_processor, tokenizer, chat_template=IN_ORDER)
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    text_config = TEXT | {"vocab_size": len(tokenizer)} | text
    head_dim = text_config["hidden_size"] // text_config["num_attention_heads"]
    sections = [head_dim // 4, head_dim // 8, head_dim // 8]  # of the rotary half dimensions
    text_config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    vision = {"depth": 4, "hidden_size": 24, "intermediate_size": 48, "num_heads": 3, "patch_size": patch, "initializer_range": 0.2,
              "window_size": 3 * 2 * patch, "fullatt_block_indexes": [1, 3], "out_hidden_size": text_config["hidden_size"]}  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text_config, image_token_id=image, video_token_id=video,
                              vision_start_token_id=start, vision_end_token_id=end)  # fmt: skip
    return _wrap(Qwen2_5_VLForConditionalGeneration, config, processor, seed, attention)


def tiny_pocket(seed: int = 0, attention: str = "sdpa", words: list[str] = WORDS, image_size: int = 32, **text) -> MLM:
    """The pocket model's shape at a smaller size: base view only, items in order; of whole words, and prompts that begin with them or the image."""
    processor = build_word_processor(words, image_size=image_size)
    config = LlavaOnevisionConfig(
        vision_config=_siglip(image_size, 8),
        text_config=Qwen2Config(vocab_size=len(processor.tokenizer), **TEXT | text),
        image_token_index=processor.image_token_id,
        video_token_index=len(processor.tokenizer) + 1,
        image_grid_pinpoints=[[image_size, image_size]],
    )
    return _wrap(LlavaOnevisionForConditionalGeneration, config, processor, seed, attention)


def tiny_siglip(seed: int = 0, side: int = 36, patch: int = 8) -> Encoder:
    """A SigLIP tower of its own with the shape of `tiny_onevision`'s."""
    torch.manual_seed(seed)
    processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    return Encoder(SiglipVisionModel(_siglip(side, patch)).eval(), processor, "tiny-siglip", "in memory")


FAMILIES = {"llava_onevision": tiny_onevision, "llava_next": tiny_next, "qwen2_5_vl": tiny_qwen}


def tiny(family: str, **options) -> MLM:
    """A tiny model by family name or "pocket"."""
    return (FAMILIES | {"pocket": tiny_pocket})[family](**options)


def grid_layout(rows: int, columns: int, size: tuple[int, int]) -> TokenLayout:
    """One view of rows x columns tokens over a picture of `size` (width, height)."""
    n = rows * columns
    cells = np.stack(np.divmod(np.arange(n), columns), axis=1)
    step = np.array(size) / (columns, rows)
    rects = np.concatenate([cells[:, ::-1] * step, (cells[:, ::-1] + 1) * step], axis=1)
    return TokenLayout(np.arange(n), rects, cells, np.zeros(n, int), np.zeros(n, bool), size, {"base": (rows, columns)})


def score_table(task: str, levels: dict[str, float], columns, n=80, column=0, shared=0.2, own=0.02) -> ScoreTable:
    """n items in groups of two: in one column every source has its level, what an item gives to all, and a little of its own."""
    random = np.random.default_rng(0)
    values = np.zeros((n, len(levels), len(columns)))
    values[..., column] = list(levels.values()) + random.normal(0, shared, (n, 1)) + random.normal(0, own, (n, len(levels)))
    items, groups = [f"i{i}" for i in range(n)], [f"g{i // 2}" for i in range(n)]
    return ScoreTable(task, items, groups, list(levels), list(columns), values)


def save(model: MLM | Encoder, folder: Path) -> Path:
    """A folder as `save_pretrained` writes it."""
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([seed, width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def noisy(task, accuracy: float, seed: int, start: list[str] | None = None) -> list[str]:
    """Answers to yes/no questions: the truth (or `start`), turned round with probability 1 - accuracy."""
    right = np.random.default_rng(seed).random(len(task.samples)) < accuracy
    flip = {"yes": "no", "no": "yes"}
    words = [sample.truth for sample in task.samples] if start is None else start
    return [word if fine else flip[word] for word, fine in zip(words, right, strict=True)]


def summarise_answers(task, answers: list[str], n_boot: int = 2000, seed: int = 0) -> dict:
    """Scores of one answer set."""
    return Scored.of(task, {"these": answers}, n_boot, seed).summary("these")


def compare_answers(task, now, before, n_boot: int = 2000, seed: int = 0) -> dict:
    """What changes from one answer set, or the mean of several, to another."""
    sides = [[each] if isinstance(each[0], str) else each for each in (now, before)]
    sets = {f"{side}{number}": answers for side, found in enumerate(sides) for number, answers in enumerate(found)}
    return Scored.of(task, sets, n_boot, seed).change(*([name for name in sets if name[0] == side] for side in "01"))


@torch.no_grad()
def embedded(mlm: MLM, images: list, prompt: str) -> tuple[torch.Tensor, TextInputs, VisionInputs]:
    """(1, tokens, hidden) embeddings of a prompt with its images, read without a cache; its tokens; its images."""
    vision = prepare_images(mlm, images)
    text = prepare_text(mlm, [prompt], vision, images_only=False)
    embeddings = mlm.model.get_input_embeddings()(text.input_ids)
    embeddings[text.input_ids == mlm.image_token_id] = torch.cat(encode_images(mlm, vision)[1])
    return embeddings, text, vision


def hooks(mlm: MLM) -> dict:
    """What patching would leave behind in the modules."""
    modules = mlm.model.named_modules()
    return {name: (tuple(m._forward_hooks), tuple(m._forward_pre_hooks), "forward" in vars(m)) for name, m in modules}


def _siglip(side: int, patch: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(image_size=side, patch_size=patch, vision_use_head=False, **TOWER)


def _wrap(model_class, config, processor, seed: int, attention: str) -> MLM:
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return wrap_mlm(model_class(config), processor, name=f"tiny-{config.model_type}")
