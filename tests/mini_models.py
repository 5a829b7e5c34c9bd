"""Tiny models of every family as folders, with words enough for the paper profile, and a SigLIP pair in a hub cache."""

import re
from pathlib import Path

import torch
from transformers import SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from word_tokenizer import PUNCTUATION, build_word_tokenizer

from kvutils.checkpoints import ENCODERS
from kvutils.datasets import bdd10k
from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.datasets.pocket.world import COLOURS
from kvutils.tasks.prefixes import WORDING
from tests.tiny_models import TOWER, WORDS, save, tiny


def known_words() -> list[str]:
    """What the paper profile says to a model about `mini_data`, in lower case."""
    wording = WORDING["paper"]
    text = " ".join([wording.class_name, wording.expression, wording.domain, *wording.words, *wording.sentences, wording.filler,
                     *bdd10k.CLASS_NAMES, *CLASSES, *COLOURS, *TEXTS])  # fmt: skip
    words = re.sub(r"[{}]", "", text).lower()
    return list(dict.fromkeys([*WORDS, *(word for word in re.findall(r"[^\s?,.]+", words) if word not in PUNCTUATION)]))


TEXTS = (
    "Is there a in the image? Is there a in this image? Please answer yes or no.",
    "What color is the largest object? How many people are there? Describe the image. person",
    "Select from the following choices. (A) (B) the second image the third image night day highway on the left right",
)


def save_tiny(family: str, folder: Path, **options) -> Path:
    """A tiny random model (see `tiny_models`) as `save_pretrained` writes it."""
    mlm = tiny(family, words=known_words(), seed=3, **options)  # not the seed of the untrained control
    mlm.model.config.text_config.update({"bos_token_id": None, "eos_token_id": None})  # Qwen's own are no tokens here
    return save(mlm, folder)


def save_siglip(home: Path) -> Path:
    """A tiny SigLIP pair under the name of the published one, in the layout of the hub's cache below HF_HOME."""
    commit = "0" * 39 + "1"
    repository = home / "hub" / f"models--{ENCODERS['siglip-so400m'].source.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    tokenizer = build_word_tokenizer(known_words())
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "projection_size": 24,
            "vocab_size": len(tokenizer), "max_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(1)
    SiglipModel(SiglipConfig(text_config=text, vision_config={"image_size": 48, "patch_size": 8} | TOWER)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder
