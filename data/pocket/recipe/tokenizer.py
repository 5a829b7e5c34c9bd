"""The language of the pocket models: word pieces, and a chat template with a system prompt and turns, as published models have them."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvutils.datasets.pocket.questions import NUMBERS
from kvutils.datasets.pocket.shapes import CLASSES, PARTS, PLURALS
from kvutils.datasets.pocket.world import COLOURS, DOMAINS, STYLES

BEGIN, SYSTEM, USER, ASSISTANT, END = "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = ("<pad>", "<unk>", "<image>", "<|vision_start|>", "<|vision_end|>", BEGIN, SYSTEM, USER, ASSISTANT, END)
SYSTEM_PROMPT = "you are a helpful assistant ."
PIECES = 345  # entries of the vocabulary: function words are whole, three in five names of things, colours, styles and parts are two pieces
NTH = ("first", "second", "third")  # several images of a message are announced: "first <image> second <image>"
# Content items in order, text as is and images as `IMAGE`, joined by one space.
CHAT_TEMPLATE = (
    "{{- 'BEGIN' -}}"
    "{%- if messages[0]['role'] != 'system' -%}{{- 'SYSTEM' -}}{%- endif -%}"
    "{%- set names = ['first', 'second', 'third'] -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- set ns = namespace(parts=[], image=0) -%}"
    "{%- set several = message['content'] | selectattr('type', 'equalto', 'image') | list | length > 1 -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}"
    "{%- if several -%}{%- set ns.parts = ns.parts + [names[ns.image]] -%}{%- endif -%}"
    "{%- set ns.image = ns.image + 1 -%}{%- set ns.parts = ns.parts + ['IMAGE'] -%}"
    "{%- else -%}{%- set ns.parts = ns.parts + [item['text']] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{- ns.parts | join(' ') -}}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def chat_template(image: str = "<image>", begin: str = "", system: str = f"{SYSTEM}{SYSTEM_PROMPT}{END}") -> str:
    """image: what an image is written as; begin: the token in front of everything, for models that have one; system: the turn before all."""
    return CHAT_TEMPLATE.replace("IMAGE", image).replace("BEGIN", begin).replace("SYSTEM", system)


FORMS = (
    "is there a an the thing things what colour how many are style image on of or left right at top bottom above below same as and "
    "more than has which letter marks part marked describe light first second third shows point corresponds to reference yes no far "
    "it in this picture photo look for please find nothing else carefully good morning here another scene with some weather was nice "
    "today small large near every you helpful assistant ( ) ? . , (a) (b) (c) (d)"
)
NAMES = (*CLASSES, *PLURALS, *COLOURS, *STYLES, *DOMAINS, *PARTS, *NUMBERS)


def build_tokenizer(begin: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-pair pieces (`PIECES` entries), lower-cased; a word begins with "▁"; `? , .` are words of their own.
    begin: the token in front of every text, for models that have one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?,.]"), behavior="isolated"),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = [*"abcdefghijklmnopqrstuvwxyz()?,.:'-0123456789", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS],
        initial_alphabet=letters, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([FORMS] * 50 + [" ".join(NAMES)], trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, SPECIAL_TOKENS.index(begin))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=END, bos_token=begin,
        additional_special_tokens=[t for t in SPECIAL_TOKENS[2:] if t not in (END, begin)],
        model_specific_special_tokens={"image_token": "<image>"},  # where Qwen2.5-VL's processor looks for it
        padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip
