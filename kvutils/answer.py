"""Questions about a cached image: it is read once, and any number of questions and interventions follow.

`SessionBatch` does the same for several prompts at once, `answer_all` for any number of images. Prompts are those of
`MLM.prompt`, and the numbers are those of a full prefill of each. Decoding is greedy; of the model's generation settings
the end tokens and the repetition penalty apply, as in `generate(do_sample=False)`, and the chat template's end of a turn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike

import numpy as np
import torch
from PIL import Image
from transformers import RepetitionPenaltyLogitsProcessor

from kvutils.block import block_keys, slot_rows
from kvutils.errors import ImageError, ParameterError, at_least, one_of
from kvutils.images import ImageLike, open_image
from kvutils.keys import KeySelection
from kvutils.language import Continuation, Prefix, check_masks, embed, prefill
from kvutils.layout import TokenLayout
from kvutils.models import MLM, need_mlm
from kvutils.prompts import Options, PromptTokens, end_tokens, for_all, prepare_text
from kvutils.vision import VisionInputs, encode_images, in_batches, prepare_images

Pictures = ImageLike | Sequence[ImageLike]  # of one prompt
Choices = Options | Sequence[Options] | None  # everyone's, or options[i] of each question
# Answer -> spellings whose probabilities add up: models differ in which one they use.
YES_NO: dict[str, tuple[str, ...]] = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}
MAX_NEW_TOKENS = 16
_TOKENS_AT_ONCE = 256  # behind the prefix of a row, in one forward pass
_LOGITS_AT_ONCE = 256  # rows of (tokens, vocabulary) held in float32


def spellings(option: str) -> tuple[str, ...]:
    """As which texts an option is scored: yes and no as in `YES_NO`, "(A)" also without its brackets, others as they are."""
    return YES_NO.get(option.lower(), (option, *([option.strip("()")] if option.isupper() else [])))


@dataclass(frozen=True)
class Answer:
    """What a model says to a question. text: greedy, without special tokens; tokens: its ids; complete: the model ended it, not
    max_new_tokens. scores: option -> log-probability (natural) that the answer begins with it."""

    question: str
    text: str
    tokens: tuple[int, ...]
    complete: bool
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def mass(self) -> float:
        """How much probability the options hold together: where it is low, the model would say something else."""
        return float(np.exp(list(self.scores.values())).sum())

    @property
    def best(self) -> str:
        """The option with the highest score; ParameterError for an answer to an open question."""
        at_least("the number of options (an open question has none: read .text)", len(self.scores))
        return max(self.scores, key=self.scores.__getitem__)


class SessionBatch(contextlib.AbstractContextManager):
    """B prompts, each of one image or a sequence of images, read up to their last image exactly once. prefix as in `capture`;
    `tokens` of an earlier session of the same model and prefix saves tokenising its questions again; vision: the images' pixels,
    where `prepare_images` has made them before, encoded: what `encode_images` gave for them. Memory is held until `close()` or the
    end of `with`. Raises ImageError, ModelError, ParameterError."""

    @torch.no_grad()
    def __init__(self, mlm: MLM, images: Sequence[Pictures], prefix: str | None = None, tokens: PromptTokens | None = None,
                 vision: VisionInputs | None = None, encoded: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None):  # fmt: skip
        need_mlm(mlm)
        check_masks(mlm, range(mlm.num_layers))
        rows = [_as_list(row) for row in _as_list(images)]
        if not rows or not all(rows):
            raise ImageError("expected at least one image per prompt, found none")
        self.mlm, self.tokens = mlm, tokens or PromptTokens(mlm, prefix)
        names = [f"images[{i}][{j}]" for i, row in enumerate(rows) for j in range(len(row))]
        opened = [open_image(*pair) for pair in zip(itertools.chain(*rows), names, strict=True)]
        vision = replace(vision, layouts=list(vision.layouts)) if vision else prepare_images(mlm, opened, names)
        self._text = prepare_text(mlm, [self.tokens.up_to_images(len(row)) for row in rows], vision)
        placed = iter(vision.layouts)
        self._layouts = [list(itertools.islice(placed, len(row))) for row in rows]
        self._embeddings = embed(mlm, self._text.input_ids, (encoded or encode_images(mlm, vision))[1])
        self._prefix: Prefix | None = prefill(mlm, self._embeddings, self._text)

    def __exit__(self, *exception) -> None:
        self.close()

    def __repr__(self) -> str:
        sizes = [" and ".join(f"{len(layout)} tokens" for layout in row) for row in self._layouts]
        return f"{type(self).__name__}({self.mlm.name}: {'; '.join(sizes)}{'' if self._prefix else '; closed'})"

    def close(self) -> None:
        """Free the cache and the image features; nothing can be asked afterwards."""
        self._prefix = self._text = self._embeddings = None

    @property
    def layouts(self) -> list[list[TokenLayout]]:
        """layouts[row][image]: which slots of the row's prompt are which tokens of the image."""
        return self._layouts

    @property
    def slots(self) -> np.ndarray:
        """(B, N) sequence slots of the image tokens, as `block_keys` takes them; DataError where N differs between prompts."""
        return slot_rows([np.concatenate([layout.slots for layout in row]) for row in self._layouts])

    def image_values(self) -> list[list[torch.Tensor]]:
        """values[row][image] (L, G, N, D): the values that the cache holds at the tokens of `layouts[row][image]`."""
        values = [values for _, values in self._open().keys_values]  # per layer (B, G, T, D), each on its device

        def of(row: int, layout: TokenLayout) -> torch.Tensor:
            slots = torch.from_numpy(layout.slots)
            return torch.stack([each[row][:, slots.to(each.device)].to(values[0].device) for each in values])

        return [[of(row, layout) for layout in layouts] for row, layouts in enumerate(self._layouts)]

    def continued(self) -> Continuation:
        """What its model has read, to be followed by tokens of one's own; the session stays as it is."""
        return Continuation(self.mlm, self._open())

    @torch.no_grad()
    def answer(self, questions: Sequence[Sequence[str]], options: Options | Sequence[Sequence[Options]] | None = None,
               max_new_tokens: int = MAX_NEW_TOKENS, block: KeySelection | None = None, queries: str = "after") -> list[list[Answer]]:
        """Answers to the questions of every prompt: answers[row][i] belongs to questions[row][i]. options: texts to score (or
        label -> spellings whose probabilities add up) for all questions, or options[row][i] for each. max_new_tokens: 0 for
        scores alone, with options. block: image keys hidden from queries="after" (what follows the last image; the cached image
        is used) or from "all" (image tokens too: the prompt is read anew under the block). Raises ParameterError, and what
        `block_keys` raises."""
        return self.answer_under({"": block}, questions, options, max_new_tokens, queries)[""]

    @torch.no_grad()
    def answer_under(self, blocks: Mapping[str, KeySelection | None], questions: Sequence[Sequence[str]],
                     options: Options | Sequence[Sequence[Options]] | None = None, max_new_tokens: int = MAX_NEW_TOKENS,
                     queries: str = "after") -> dict[str, list[list[Answer]]]:  # fmt: skip
        """What `answer` gives under each of several blocks; the layers before the first in which one hides a key are run once for all."""
        prefix, ends = self._open(), end_tokens(self.mlm)
        one_of("queries", queries, ("after", "all"))
        at_least("max_new_tokens (or 0 with options)", max_new_tokens, 1 if options is None else 0)
        groups = _portions(self._asked(questions, options))
        shared, slots = len(blocks) > 1 and queries == "after", self.slots if any(blocks.values()) else None
        starts = {name: min([layer for layer, mask in zip(block.layers, block.mask, strict=True) if mask.any()] + [self.mlm.num_layers - 1])
                  for name, block in blocks.items() if block and shared}  # fmt: skip
        plain = [Continuation(self.mlm, prefix, starts.values()) for _ in groups]
        found: dict[str, list[list[Answer]]] = {name: [[] for _ in self._layouts] for name in blocks}
        texts: dict[tuple[int, ...], str] = {}
        for name, block in blocks.items():
            within = partial(block_keys, self.mlm, block, slots, queries)
            if block and queries == "all":
                # Later tokens never change earlier ones, so a full blocked prefill is this and what follows it.
                with within():
                    prefix = prefill(self.mlm, self._embeddings, self._text)
            for number, some in enumerate(groups):
                like = plain[number] if shared else None
                state = Continuation(self.mlm, prefix, (), like, starts.get(name, 0), within) if block else plain[number]
                groups[number] = _answer_together(state, some, max_new_tokens, ends)
                for one in groups[number]:
                    if (tokens := tuple(one.tokens)) not in texts:
                        texts[tokens] = self.mlm.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                    found[name][one.row].append(Answer(one.question, texts[tokens], tokens, one.complete, one.scores))
        return found

    def _open(self) -> Prefix:
        if self._prefix is None:
            raise ParameterError("this session is closed; open a new one")
        return self._prefix

    def _asked(self, questions, options) -> list[_Asked]:
        """The questions as tokens, each with its options."""
        single = isinstance(questions, str) or any(isinstance(texts, str) or not isinstance(texts, Sequence) or not texts for texts in questions)
        if single or len(questions) != len(self._layouts):
            raise ParameterError(f"expected a list of at least one question for each of {len(self._layouts)} prompts, not {questions!r}; "
                                 "a single question is [question]")  # fmt: skip
        options = [[options] * len(texts) for texts in questions] if for_all(options) else options
        if (counts := list(map(len, questions))) != (found := list(map(len, options))):
            raise ParameterError(f"expected options for {counts} questions (of each prompt), found {found}")
        asked = []
        for row, (texts, choices) in enumerate(zip(questions, options, strict=True)):
            images = len(self._layouts[row])
            for text, choice in zip(texts, choices, strict=True):
                spelled = {} if choice is None else self.tokens.options(choice)
                asked.append(_Asked(row, text, self.tokens.head(images), self.tokens.tail(text, images), spelled))
        return asked


class ImageSession(SessionBatch):
    """One prompt with one image, or several: `prefix + images` is read once, then questions are asked. Arguments and errors (ImageError,
    ModelError, ParameterError) as for `SessionBatch`; every method takes `block` and `queries` of its `answer`.

    >>> with kv.ImageSession(mlm, scene) as session:
    ...     everything = kv.select_region(mlm, session.layouts[0], (0, 0, 96, 96))
    ...     [session.yes_no(["is there a tree ?"], block=block)[0].text for block in (None, everything)]
    ['yes', 'no']
    """

    def __init__(self, mlm: MLM, images: Pictures, prefix: str | None = None, vision: VisionInputs | None = None):
        super().__init__(mlm, [_as_list(images)], prefix, vision=vision)

    @property
    def layouts(self) -> list[TokenLayout]:
        """One per image; their slots count the prompt's tokens."""
        return self._layouts[0]

    def ask(self, questions: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, **intervention) -> list[Answer]:
        """Free text."""
        return self.choose(questions, None, max_new_tokens, **intervention)

    def yes_no(self, questions: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, **intervention) -> list[Answer]:
        """Text, and scores of "yes" and "no", each in small and capital letters."""
        return self.choose(questions, YES_NO, max_new_tokens, **intervention)

    def choose(self, questions: Sequence[str], options: Choices, max_new_tokens: int = MAX_NEW_TOKENS, **intervention) -> list[Answer]:
        """Multiple choice: text, and scores of the options."""
        options = options if options is None or isinstance(options, str | Mapping) else list(options)
        return self.answer([questions], options if for_all(options) else [options], max_new_tokens, **intervention)[0]


def answer_all(mlm: MLM, samples: Iterable[tuple[str, Pictures, Sequence[str]]],
               blocks: Mapping[str, KeySelection | None] | None = None, *, options: Options | None = None,
               max_new_tokens: int = MAX_NEW_TOKENS, prefix: str | None = None, batch_size: int = 16,
               progress: bool = False) -> Iterator[tuple[str, dict[str, list[Answer]]]]:
    """(image id, intervention -> its answers), in order, for samples (image id, image or images, questions). Each image is read
    once for all its questions and all `blocks` (name -> selection, None for no block; by default only {"none": None}),
    `batch_size` images together, or fewer where memory does not suffice. The other arguments are those of `SessionBatch.answer`.
    `samples` may be a generator."""
    blocks, tokens = blocks or {"none": None}, PromptTokens(mlm, prefix)

    def run(batch: Sequence[tuple]) -> list[tuple[str, dict[str, list[Answer]]]]:
        names, images, questions = zip(*batch, strict=True)
        with SessionBatch(mlm, images, prefix, tokens) as session:
            found = session.answer_under(blocks, questions, options, max_new_tokens)
        return [(name, {block: answers[row] for block, answers in found.items()}) for row, name in enumerate(names)]

    return in_batches(run, samples, batch_size, progress)


def _as_list(images) -> list:
    """A single picture becomes a list of one."""
    several = isinstance(images, Iterable) and not isinstance(images, str | PathLike | Image.Image | np.ndarray | torch.Tensor)
    return list(images) if several else [images]


@dataclass(eq=False)
class _Asked:
    """A question of a prompt (`row`) as tokens, and what comes of it: the fields of its `Answer`. head: ids before the question,
    one per image; ids: of the question; options: label -> spellings."""

    row: int
    question: str
    head: list[int]
    ids: list[int]
    options: dict[str, list[list[int]]]
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    scores: dict[str, float] = field(default_factory=dict)


def _portions(asked: Sequence[_Asked]) -> list[list[_Asked]]:
    """The questions in groups that put at most about `_TOKENS_AT_ONCE` tokens behind a row's prefix at once."""
    used: dict[int, int] = {}
    groups: dict[int, list[_Asked]] = {}
    for one in asked:
        size = len(one.ids) + sum(len(ids) - 1 for spelled in one.options.values() for ids in spelled)
        used[one.row] = used.get(one.row, 0) + size
        groups.setdefault((used[one.row] - 1) // _TOKENS_AT_ONCE, []).append(one)
    return [groups[number] for number in sorted(groups)]  # a row with a long question opens a later group first


def _answer_together(state: Continuation, asked: Sequence[_Asked], max_new_tokens: int, ends: set[int]) -> list[_Asked]:
    """The questions with their results: one pass for all of them and their longer options, then one per token. The answer they have from
    before, under another block, is read ahead: as far as it is given again, that needs no further pass."""
    ahead = [(one.row, one.ids + ids[:-1]) for one in asked for texts in one.options.values() for ids in texts if len(ids) > 1]
    state.extend([*ahead, *((one.row, one.ids + one.tokens) for one in asked)])
    asked = [replace(one, tokens=[], scores={}) for one in asked]
    logits = state.logits(state.extend([(one.row, one.ids) for one in asked]))  # (questions, vocabulary)
    if any(one.options for one in asked):
        _score(state, asked, logits)
    if max_new_tokens:
        _decode(state, asked, logits, max_new_tokens, ends)
    return asked


def _score(state: Continuation, asked: Sequence[_Asked], logits: torch.Tensor) -> None:
    """Sum the log-probabilities of each spelling's tokens, the first by `logits`; spellings of one label add their probabilities."""
    labels = [(one, label, len(texts)) for one in asked for label, texts in one.options.items()]
    spelled = [(owner, ids) for owner, one in enumerate(asked) for texts in one.options.values() for ids in texts]
    scores = logits.log_softmax(-1)[torch.tensor([(owner, ids[0]) for owner, ids in spelled], device=logits.device).unbind(1)].tolist()
    if longer := [(place, asked[owner], ids, end) for place, (owner, ids) in enumerate(spelled) for end in range(1, len(ids))]:
        hidden = state.extend([(one.row, one.ids + ids[:end]) for _, one, ids, end in longer])
        for first in range(0, len(longer), _LOGITS_AT_ONCE):
            some, part = (each[first : first + _LOGITS_AT_ONCE] for each in (longer, hidden))
            found = state.logits(part).log_softmax(-1)
            wanted = torch.tensor([[ids[end]] for *_, ids, end in some], device=found.device)
            for (place, *_), (score,) in zip(some, found.gather(1, wanted).tolist(), strict=True):
                scores[place] += score
    sums = np.logaddexp.reduceat(scores, np.cumsum([0, *(count for *_, count in labels[:-1])]))
    for (one, label, _), score in zip(labels, sums.tolist(), strict=True):
        one.scores[label] = score


def _decode(state: Continuation, asked: Sequence[_Asked], logits: torch.Tensor, max_new_tokens: int, ends: set[int]) -> None:
    """Greedy decoding; an answer ends at one of `ends`."""
    penalty, going = state.mlm.model.generation_config.repetition_penalty, asked
    while going:
        if penalty not in (None, 1):
            said = [one.head + one.ids + one.tokens for one in going]
            longest = max(map(len, said))  # a row is filled with a token that it has: one token is penalised once
            rows = torch.tensor([ids + ids[:1] * (longest - len(ids)) for ids in said], device=logits.device)
            logits = RepetitionPenaltyLogitsProcessor(penalty)(rows, logits)
        for one, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            one.complete = token in ends
            if not one.complete:
                one.tokens.append(token)
        if going := [one for one in going if not one.complete and len(one.tokens) < max_new_tokens]:
            logits = state.logits(state.extend([(one.row, one.ids + one.tokens) for one in going]))
