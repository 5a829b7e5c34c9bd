"""Token ids of `prefix + images + question`, split behind the last image: what is cached, what is asked."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvutils.checkpoints import ONEVISION, QWEN
from kvutils.errors import ModelError, ParameterError
from kvutils.models import MLM
from kvutils.vision import VisionInputs

Options = Sequence[str] | Mapping[str, Sequence[str]]
_QUESTION = "kvutils-question"  # stands for a question, to see where a chat template puts it


@dataclass
class TextInputs:
    """Token ids (B, T), mask (B, T) and positions (B, T) or for Qwen (3, B, T); padded on the right."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def prepare_text(mlm: MLM, prompts: Sequence[str], vision: VisionInputs, images_only: bool = True) -> TextInputs:
    """Tokenise prompts and place the layouts' slots; images belong to the prompts' image tokens in order. images_only ends every
    sequence after its last image token: attention is causal, so what follows cannot change image tokens."""
    token, rows, first = mlm.processor.image_token, [], 0
    for prompt in prompts:
        head, *tails = prompt.split(token)
        if len(tails) > 1 and mlm.family == ONEVISION and not mlm.base_view_only:
            raise ParameterError("LLaVA-OneVision sees several images as base views, each padded to a square: "
                                 "dataclasses.replace(mlm, base_view_only=True, pad_to_square=True)")  # fmt: skip
        layouts = vision.layouts[first : first + len(tails)]
        text = head + "".join(token * len(one) + tail for one, tail in zip(layouts, tails, strict=True))
        ids = torch.tensor(tokenize(mlm, text))
        slots = (ids == mlm.image_token_id).nonzero().flatten()
        if len(slots) != sum(map(len, layouts)):
            raise ModelError(f"the tokenizer of {mlm.name} makes {len(slots)} image tokens (id {mlm.image_token_id}), the layout has "
                             f"{sum(map(len, layouts))}: does every {token!r} become the image token of the model?")  # fmt: skip
        for part in slots.split([len(one) for one in layouts]):
            vision.layouts[first] = replace(vision.layouts[first], slots=part.numpy())
            first += 1
        rows.append(ids[: slots[-1] + 1] if images_only else ids)
    need_room(mlm, max(map(len, rows)))
    text = pad(mlm, rows)
    if mlm.family == QWEN:
        kinds = (text.input_ids == mlm.image_token_id).int()
        text.position_ids, _ = mlm.model.model.get_rope_index(text.input_ids, mm_token_type_ids=kinds, image_grid_thw=vision.grids,
                                                              attention_mask=text.attention_mask)
    return text


def need_room(mlm: MLM, tokens: int) -> None:
    """ParameterError for a sequence that is longer than any that the model was made for: it would answer, and mean nothing."""
    if tokens > (limit := mlm.text_config.max_position_embeddings):
        raise ParameterError(f"{tokens:,} tokens are more than the {limit:,} that {mlm.name} was made for: take fewer or smaller pictures, or less text")


def tokenize(mlm: MLM, text: str) -> list[int]:
    """Token ids as the processor makes them; a template that wrote the first token gets no second one."""
    start = mlm.tokenizer.bos_token
    return mlm.tokenizer(text, add_special_tokens=not (start and text.startswith(start)))["input_ids"]


def pad(mlm: MLM, rows: list[torch.Tensor]) -> TextInputs:
    """Rows of token ids, padded on the right (left padding would rotate the keys), with the positions of a text."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=mlm.tokenizer.pad_token_id or 0)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long().to(mlm.device)
    return TextInputs(ids.to(mlm.device), mask, (mask.cumsum(-1) - 1).clamp(min=0))


def end_tokens(mlm: MLM) -> set[int]:
    """Ids that end an answer: those of the generation settings, and the one that the chat template writes behind a turn of the
    model, such as `<|im_end|>` or `<|eot_id|>`, which the settings of a published checkpoint may lack."""
    ends = set(np.atleast_1d(mlm.model.generation_config.eos_token_id).tolist()) - {None}  # a token, several, or None
    turns = [{"role": role, "content": [{"type": "text", "text": _QUESTION + role}]} for role in ("user", "assistant")]
    rendered = mlm.processor.apply_chat_template(turns, tokenize=False)
    behind = mlm.tokenizer(rendered.partition(_QUESTION + "assistant")[2].lstrip(), add_special_tokens=False)["input_ids"][:1]
    added = mlm.tokenizer.added_tokens_decoder
    return ends | {token for token in behind if token in added and added[token].special}


class PromptTokens:
    """Prompts of one model and prefix. Every question is tokenised within its whole prompt, and only once."""

    def __init__(self, mlm: MLM, prefix: str | None = None):
        self.mlm, self.prefix = mlm, prefix
        self._prompts: dict[tuple[str, int], list[int]] = {}
        self._heads: dict[int, list[int]] = {}
        self._spelled: dict[str, list[int]] = {}

    def up_to_images(self, images: int) -> str:
        """A prompt that is meant up to its last image only; a stand-in for the question follows."""
        prompt = self.mlm.prompt(question=_QUESTION, prefix=self.prefix, images=images)
        if prompt.rfind(self.mlm.processor.image_token) > prompt.find(_QUESTION):
            raise ParameterError(f"the chat template of {self.mlm.name} does not put the question after the image, so no "
                                 f"cached image can serve several questions: {prompt[:200]!r}")  # fmt: skip
        return prompt

    def head(self, images: int) -> list[int]:
        """Token ids up to the last image, one token per image (tokenised as if each image were one token)."""
        if images not in self._heads:
            ids = tokenize(self.mlm, self.up_to_images(images))
            self._heads[images] = ids[: self._behind_images(ids)]
        return self._heads[images]

    def tail(self, question: str, images: int) -> list[int]:
        """Token ids behind the last image of the whole prompt with this question. ParameterError where the prompt up to there is
        not what every other question shares."""
        if not isinstance(question, str) or not question.strip():
            raise ParameterError(f"a question must be a text of at least one word, not {question!r}")
        if (question, images) not in self._prompts:
            ids = tokenize(self.mlm, self.mlm.prompt(question=question, prefix=self.prefix, images=images))
            end = self._behind_images(ids)
            if ids[:end] != self.head(images) or end == len(ids):
                raise ParameterError(f"the prompt of {question!r} does not begin with the tokens that are cached: the chat "
                                     f"template or the tokenizer of {self.mlm.name} mixes it with what is before it")  # fmt: skip
            if self.mlm.tokenizer.unk_token_id in ids[end:]:
                warnings.warn(f"{self.mlm.name} has no token for some characters of {question!r}: it reads 'unknown' in their place", stacklevel=2)
            self._prompts[question, images] = ids[end:]
        return self._prompts[question, images]

    def options(self, options: Options) -> dict[str, list[list[int]]]:
        """Label -> token ids of each spelling, as the model would begin its turn with them. options: texts, or label ->
        spellings. Spellings with equal tokens count once, those that continue another one with it, those with tokens unknown to
        the model not at all; ParameterError where an option has no other, and for two options of the same tokens."""
        texts = [] if isinstance(options, str) else [one for one in options or () if isinstance(one, str)]
        if not texts or len(set(texts)) < len(options):
            raise ParameterError(f"options must be a list of different texts, at least one, not {options!r}")
        spelled = options if isinstance(options, Mapping) else dict(zip(options, options, strict=True))
        spelled = {label: (texts,) if isinstance(texts, str) else texts for label, texts in spelled.items()}
        found, unknown = {label: [] for label in spelled}, self.mlm.tokenizer.unk_token_id
        for label, text in ((label, text) for label, spellings in spelled.items() for text in spellings):
            if text not in self._spelled:
                self._spelled[text] = self.mlm.tokenizer(text, add_special_tokens=False)["input_ids"]
            if (ids := self._spelled[text]) and ids not in found[label] and unknown not in ids:
                found[label].append(ids)
        if lacking := [label for label, spellings in found.items() if not spellings]:
            raise ParameterError(f"the option {lacking[0]!r} has no tokens that {self.mlm.name} knows")
        found = {label: [ids for ids in some if not any(ids != one and ids[: len(one)] == one for one in some)] for label, some in found.items()}
        told: dict[tuple[int, ...], str] = {}
        for label, ids in ((label, tuple(ids)) for label, some in found.items() for ids in some):
            if (other := told.setdefault(ids, label)) != label:
                raise ParameterError(f"an answer that begins with {other!r} may also begin with {label!r} and would count for both: the same tokens")
        return found

    def _behind_images(self, ids: list[int]) -> int:
        return len(ids) - ids[::-1].index(self.mlm.image_token_id)


def for_all(options) -> bool:
    """Whether these are one question's options, meant for every question, and not options of each."""
    return options is None or isinstance(options, str | Mapping) or not len(options) or isinstance(next(iter(options)), str)
