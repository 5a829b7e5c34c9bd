"""Processors that work with and without torchvision.

The published OneVision and Qwen2.5-VL processors own a video processor, which needs torchvision. This project
only shows images, so `ImageOnly...` leave video out and use the PIL image processors of `transformers`. The
torchvision path resizes slightly differently; `MLM.image_backend` records which one runs.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlavaNextProcessor, LlavaOnevisionProcessor, PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvutils.errors import ParameterError

SPECIAL_TOKENS = ("<pad>", "<unk>", "<eos>", "<image>")  # ids 0, 1, 2, 3 of a word-level tokenizer
PUNCTUATION = ("?", ",", ".")
# Content items in order, text as is and images as "<image>", joined by one space; the answer follows a colon.
# Several images of a message are announced: "first <image> second <image>".
POCKET_CHAT_TEMPLATE = (
    "{%- set ns = namespace(parts=[], image=0) -%}"
    "{%- set names = ['first', 'second', 'third'] -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set ns.parts = ns.parts + [message['content']] -%}"
    "{%- else -%}"
    "{%- set several = message['content'] | selectattr('type', 'equalto', 'image') | list | length > 1 -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}"
    "{%- if several -%}{%- set ns.parts = ns.parts + [names[ns.image]] -%}{%- endif -%}"
    "{%- set ns.image = ns.image + 1 -%}{%- set ns.parts = ns.parts + ['<image>'] -%}"
    "{%- else -%}{%- set ns.parts = ns.parts + [item['text']] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{%- set ns.parts = ns.parts + [':'] -%}{%- endif -%}"
    "{{- ns.parts | join(' ') -}}"
)


class ImageOnlyLlavaOnevisionProcessor(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` without video, hence without torchvision."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        vision_aspect_ratio="anyres_max_9",
    ):
        super().__init__(
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            vision_aspect_ratio=vision_aspect_ratio,
        )
        # A tokenizer without "<video>" maps it to its unknown token, which the parent would count in texts.
        self.video_token = self.video_token_id = None


class ImageOnlyQwen2_5_VLProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without video, hence without torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.video_token = self.video_token_id = None


# family -> (published processor, processor without video, PIL image processor)
_CLASSES = {
    "llava_onevision": (
        LlavaOnevisionProcessor,
        ImageOnlyLlavaOnevisionProcessor,
        LlavaOnevisionImageProcessorPil,
    ),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, ImageOnlyQwen2_5_VLProcessor, Qwen2VLImageProcessorPil),
    "llava_next": (LlavaNextProcessor, LlavaNextProcessor, LlavaNextImageProcessorPil),
}


def load_processor(source: str | Path, family: str, backend: str | None = None, revision: str | None = None):
    """Processor of a checkpoint, by explicit class: of an unknown one `AutoProcessor` gives the tokenizer.

    `backend` is "pil" or "torchvision"; None takes what the checkpoint was made with: torchvision for
    published ones if it is installed, PIL for processors saved by this project (so that its results do not
    depend on what else is installed). Ask `image_backend(processor)` which one came.
    """
    published, image_only, pil_class = _CLASSES[family]
    where = {} if revision is None else {"revision": revision}
    settings, _ = image_only.get_processor_dict(source, **where)
    if backend is None:
        ours = settings.get("processor_class", "").startswith("ImageOnly")
        backend = "pil" if ours or find_spec("torchvision") is None else "torchvision"
    if backend == "torchvision":
        return published.from_pretrained(source, **where)
    if backend != "pil":
        raise ParameterError(f"backend must be 'pil' or 'torchvision', not {backend!r}")
    image_processor = pil_class.from_pretrained(source, **where)
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    return image_only.from_args_and_dict([image_processor, tokenizer], settings)


def image_backend(processor) -> str:
    """Which code resizes the images of this processor: "pil" or "torchvision"."""
    return "pil" if type(processor.image_processor).__name__.endswith("Pil") else "torchvision"


def load_siglip_image_processor(source: str | Path, revision: str | None = None) -> SiglipImageProcessorPil:
    """Image processor of a SigLIP encoder checkpoint; needs no torchvision."""
    where = {} if revision is None else {"revision": revision}
    return SiglipImageProcessorPil.from_pretrained(source, **where)


def build_word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer: lower-cased, split on white space, `? , .` as tokens of their own.

    Ids: <pad> 0, <unk> 1, <eos> 2, <image> 3, then the punctuation, then `words` in order without duplicates.
    """
    vocabulary = dict.fromkeys(SPECIAL_TOKENS + PUNCTUATION)
    for word in words:
        if word not in PUNCTUATION and (word != word.lower() or not re.fullmatch(r"[^\s?,.]+", word)):
            raise ParameterError(f"a word is lower-case, without white space or any of '?,.'; found {word!r}")
        vocabulary[word] = None
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?,.]"), behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_pocket_processor(
    words: list[str], image_size: int = 96, patch: int = 8
) -> ImageOnlyLlavaOnevisionProcessor:
    """Processor of the pocket LLaVA-OneVision: word-level tokens; images squashed to `image_size` squares,
    mean and standard deviation 0.5 as SigLIP; one token per patch."""
    if image_size % patch:
        raise ParameterError(f"image_size {image_size} must be a multiple of the patch size {patch}")
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_grid_pinpoints=[[image_size, image_size]],
    )
    return ImageOnlyLlavaOnevisionProcessor(
        image_processor,
        build_word_tokenizer(words),
        num_image_tokens=(image_size // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=POCKET_CHAT_TEMPLATE,
    )
