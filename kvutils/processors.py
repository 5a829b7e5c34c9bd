"""Processors that work with and without torchvision.

The published OneVision and Qwen2.5-VL processors own a video processor, which needs torchvision. This project
only shows images, so `ImageOnly...` leave video out and use the PIL image processors of `transformers`. The
torchvision path resizes slightly differently; `MLM.image_backend` says which one a model has."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, LlavaNextProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging


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


# family -> (published processor, processor without video, PIL image processor)
_CLASSES = {
    "llava_onevision": (LlavaOnevisionProcessor, ImageOnlyLlavaOnevisionProcessor, LlavaOnevisionImageProcessorPil),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, ImageOnlyQwen2_5_VLProcessor, Qwen2VLImageProcessorPil),
    "llava_next": (LlavaNextProcessor, LlavaNextProcessor, LlavaNextImageProcessorPil),
}


def load_processor(source: str | Path, family: str, revision: str = "main"):
    """Processor of a checkpoint, by explicit class: of an unknown one `AutoProcessor` gives the tokenizer.

    Images are resized as the checkpoint was made: by torchvision for published ones if it is installed, by PIL for
    processors saved by this project (so that its results do not depend on what else is installed)."""
    published, image_only, pil_class = _CLASSES[family]
    settings, _ = image_only.get_processor_dict(source, revision=revision)
    ours = settings.get("processor_class", "").startswith("ImageOnly")
    if not ours and find_spec("torchvision") is not None:
        return published.from_pretrained(source, revision=revision)
    image_processor = pil_class.from_pretrained(source, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    return image_only.from_args_and_dict([image_processor, tokenizer], settings)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings of transformers: 5.23 warns about the token ids of its own default SigLIP configuration."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
