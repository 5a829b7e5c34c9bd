"""A tokenizer of whole words, and prompts without special tokens, for random models of any architecture: in benchmarks, rehearsals and
tests, where pieces of words do not matter."""

import re

from recipe.tokenizer import FORMS, NAMES
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from kvutils.datasets.pocket.questions import OPTIONS
from kvutils.errors import ParameterError
from kvutils.processors import ImageOnlyLlavaOnevisionProcessor

SPECIAL_TOKENS = ("<pad>", "<unk>", "<eos>", "<image>")  # ids 0, 1, 2, 3
PUNCTUATION = ("?", ",", ".")
WORDS = tuple(dict.fromkeys([*FORMS.split(), ":", *NAMES, *OPTIONS]))  # of the pocket world's questions and answers
# Content items in order, text as is and images as "<image>", joined by one space; the answer follows a colon.
# Several images of a message are announced: "first <image> second <image>".
CHAT_TEMPLATE = (
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
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>",
        additional_special_tokens=["<image>"], padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_word_processor(words: list[str], image_size: int = 96, patch: int = 8) -> ImageOnlyLlavaOnevisionProcessor:
    """Processor of a LLaVA-OneVision without tiles, as the pocket model is: images squashed to `image_size` squares,
    mean and standard deviation 0.5 as SigLIP; one token per patch."""
    if image_size % patch:
        raise ParameterError(f"image_size {image_size} must be a multiple of the patch size {patch}")
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
        image_grid_pinpoints=[[image_size, image_size]],
    )  # fmt: skip
    return ImageOnlyLlavaOnevisionProcessor(
        image_processor, build_word_tokenizer(words), num_image_tokens=(image_size // patch) ** 2,
        vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
