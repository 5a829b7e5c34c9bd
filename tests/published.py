"""The published checkpoints' folders (tokenizer, chat template, processor, configuration; no weights) with narrow random models.

`KVUTILS_PUBLISHED` names the folder that holds them. Tests that need it take the fixture `published` of conftest, which
skips where it is unset."""

import json
import os
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from kvutils.checkpoints import NEXT, ONEVISION, QWEN
from kvutils.models import MLM, wrap_mlm
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


# What older transformers called the weights, as the hub's files still do: (in the model, in the file).
OLD_NAMES = [(r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
             (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."), (r"^model\.", "")]  # fmt: skip
OLD_QWEN_NAMES = [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")]


def write_checkpoint(family: str, place: Path, form: str, weights: Path) -> MLM:
    """A folder as on the hub, with narrow random weights under the hub's old names; returns the model they are of.

    form: "new"; "old", without processor_config.json and generation_config.json, with the template in the tokenizer and an
    image processor called ...Fast; "jinja", with the template in chat_template.jinja alone. weights: the file of all forms, linked to; it is
    written where it is not there."""
    mlm, source = published_model(family), folder(family)
    for file in source.iterdir():
        (place / file.name).symlink_to(file)
    about = read(place / "config.json")
    text, vision, side = about.get("text_config", about), about["vision_config"], 8
    text |= {"num_hidden_layers": 2, "hidden_size": text["num_attention_heads"] * side, "intermediate_size": 32, "head_dim": side}
    if family == QWEN:
        about["rope_scaling"]["mrope_section"] = [1, 1, 2]
        vision |= {"depth": 2, "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [1]}
    else:
        vision["num_hidden_layers"] = 2
    vision |= {"hidden_size": 16 * side, "intermediate_size": 32}
    write(place / "config.json", about)
    template = read(place / "chat_template.json")["chat_template"]
    if form != "new":
        (place / "chat_template.json").unlink()
    if form == "jinja":
        (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    if form == "old":
        for name in ("processor_config.json", "generation_config.json"):
            (place / name).unlink(missing_ok=True)
        settings = read(place / "preprocessor_config.json")
        write(place / "preprocessor_config.json", settings | {"image_processor_type": settings["image_processor_type"] + "Fast"})
        write(place / "tokenizer_config.json", {"chat_template": template} | read(place / "tokenizer_config.json"))
    if not weights.exists():
        names = OLD_QWEN_NAMES if family == QWEN else OLD_NAMES
        save_file({next((re.sub(old, hub, name) for old, hub in names if re.search(old, name)), name): tensor
                   for name, tensor in mlm.model.state_dict().items()}, weights, {"format": "pt"})  # fmt: skip
    (place / "model.safetensors").symlink_to(weights)
    return mlm


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, about: dict) -> None:
    """In place of what is there, which may be a link to the published file."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(about), encoding="utf-8")
