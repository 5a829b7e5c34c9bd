"""Processors that work with and without torchvision.

The published OneVision and Qwen2.5-VL processors own a video processor, which needs torchvision. This project
only shows images, so `ImageOnly...` leave video out and use the PIL image processors of `transformers`. The
torchvision path resizes slightly differently; `MLM.image_backend` says which one a model has."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import transformers
import yaml
from transformers import AutoConfig, AutoTokenizer, LlavaNextProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from kvutils import data_folder
from kvutils.errors import ParameterError

PROMPTS = yaml.safe_load((data_folder() / "prompts.yaml").read_text(encoding="utf-8"))  # form -> why, turns by family, questions


class ImageOnlyLlavaOnevisionProcessor(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` without video, hence without torchvision."""

    # transformers reads the names of the settings from this signature
    def __init__(self, image_processor=None, tokenizer=None, num_image_tokens=None, vision_feature_select_strategy=None,
                 chat_template=None, image_token="<image>", vision_aspect_ratio="anyres_max_9"):
        super().__init__(image_processor, tokenizer, num_image_tokens=num_image_tokens, chat_template=chat_template,
                         vision_feature_select_strategy=vision_feature_select_strategy, image_token=image_token,
                         vision_aspect_ratio=vision_aspect_ratio)
        # A tokenizer without "<video>" maps it to its unknown token, which the parent would count in texts.
        self.video_token = self.video_token_id = None


class ImageOnlyQwen2_5_VLProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without video, hence without torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.video_token = self.video_token_id = None


class ImageOnlyLlavaNextProcessor(LlavaNextProcessor):
    """`LlavaNextProcessor`, which has no video; saved by this name it is read with PIL everywhere."""


# family -> (published processor, processor without video, PIL image processor)
_CLASSES = {"llava_onevision": (LlavaOnevisionProcessor, ImageOnlyLlavaOnevisionProcessor, LlavaOnevisionImageProcessorPil),
            "qwen2_5_vl": (Qwen2_5_VLProcessor, ImageOnlyQwen2_5_VLProcessor, Qwen2VLImageProcessorPil),
            "llava_next": (LlavaNextProcessor, ImageOnlyLlavaNextProcessor, LlavaNextImageProcessorPil)}  # fmt: skip

# Before a template that takes texts only: images first, then a line for each text, as the LLaVA templates write a message.
_AS_TEXT = """\
{%- set all = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set one = namespace(images='', lines=[], content=message['content']) -%}
{%- if one.content is not string -%}
{%- for part in one.content if part['type'] == 'image' %}{% set one.images = one.images + 'IMAGE' %}{% endfor -%}
{%- for part in one.content if part['type'] == 'text' %}{% set one.lines = one.lines + [part['text']] %}{% endfor -%}
{%- set one.content = ([one.images] * (one.images != '') + one.lines) | join('\n') -%}
{%- endif -%}
{%- set all.messages = all.messages + [{'role': message['role'], 'content': one.content}] -%}
{%- endfor -%}
{%- set messages = all.messages -%}
"""


def load_processor(source: str | Path, family: str, revision: str = "main"):
    """Processor of a checkpoint, by explicit class: of an unknown one `AutoProcessor` gives the tokenizer. Images are resized as
    the checkpoint was made: by torchvision for published ones if it is installed, by PIL for processors saved by this project (so
    that its results do not depend on what else is installed). What older folders do not say is read from the configuration, a
    chat template that is not there from the tokenizer."""
    published, image_only, pil_class = _CLASSES[family]
    settings, _ = image_only.get_processor_dict(source, revision=revision)
    if not settings.get("processor_class", "").startswith("ImageOnly") and find_spec("torchvision") is not None:
        processor = published.from_pretrained(source, revision=revision)
    else:
        parts = [each.from_pretrained(source, revision=revision) for each in (pil_class, AutoTokenizer)]
        processor = image_only.from_args_and_dict(parts, settings)
    for name, value in _told_by(AutoConfig.from_pretrained(source, revision=revision)).items():
        if settings.get(name) is None:
            setattr(processor, name, value)
    template = processor.tokenizer.chat_template
    if not processor.chat_template and isinstance(template, str):
        token = processor.image_token
        image = f"<|vision_start|>{token}<|vision_end|>" if family == "qwen2_5_vl" else token
        processor.chat_template = template if token in template else _AS_TEXT.replace("IMAGE", image) + template
    return processor


def other_backend(processor, family: str):
    """A processor that resizes pictures with the other of the two libraries, and is else the same. ParameterError without torchvision."""
    chosen = pil = _CLASSES[family][2]
    if isinstance(processor.image_processor, pil):
        if find_spec("torchvision") is None:
            raise ParameterError("torchvision is not installed here; `pip install torchvision` beside this torch, then run again")
        chosen = getattr(transformers, pil.__name__.removesuffix("Pil"))
    other = copy.copy(processor)
    other.image_processor = chosen.from_dict(processor.image_processor.to_dict())
    return other


def _told_by(config) -> dict:
    """The settings by which a processor counts image tokens, as the model's configuration has them (Qwen2.5-VL needs none)."""
    vision, strategy = config.vision_config, getattr(config, "vision_feature_select_strategy", None)
    if config.model_type == "llava_onevision":
        return {"num_image_tokens": (vision.image_size // vision.patch_size) ** 2, "vision_feature_select_strategy": strategy,
                "vision_aspect_ratio": config.vision_aspect_ratio}  # fmt: skip
    if config.model_type == "llava_next":  # the CLS token of CLIP is counted, and taken off again by the strategy "default"
        return {"patch_size": vision.patch_size, "vision_feature_select_strategy": strategy,
                "num_additional_image_tokens": int(vision.model_type == "clip_vision_model")}  # fmt: skip
    return {}


def render(processor, content: Sequence[dict], turn: dict | None = None) -> str:
    """A user's turn of texts and images, and the beginning of the answer: by the processor's chat template, or between the `begin` and
    `end` of a turn of `PROMPTS`, a line each, images on one."""
    if turn is None:
        return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    written = ""
    for part, before in zip(content, [None, *content], strict=False):
        written += "" if before is None else " " if part["type"] == before["type"] == "image" else "\n"
        written += part.get("text", processor.image_token)
    return turn["begin"] + written + turn["end"]


def turn_of(processor, prompts: str, family: str) -> dict | None:
    """What a form writes around a user's turn, None for the checkpoint's template. ParameterError for words that the tokenizer lacks."""
    turn = PROMPTS[prompts].get("turns", {}).get(family)
    unknown = processor.tokenizer.unk_token_id if turn else None
    if unknown is not None and unknown in processor.tokenizer(turn["begin"] + turn["end"])["input_ids"]:
        raise ParameterError(f"the tokenizer does not know the words of the prompts {prompts!r} (data/prompts.yaml): a model of a closed "
                             "vocabulary, such as the pocket model, is asked in its own words, prompts = 'paper'")  # fmt: skip
    return turn


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings of transformers: 5.23 warns about the token ids of its own default SigLIP configuration."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
