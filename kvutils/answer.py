"""Questions about a cached image: it is read once, and any number of questions and interventions follow.

`SessionBatch` does the same for several prompts at once, `answer_all` for any number of images. Prompts are those of
`MLM.prompt`, and the numbers are those of a full prefill of each. Decoding is greedy; of the model's generation settings
the end tokens and the repetition penalty apply, as in `generate(do_sample=False)`, and the chat template's end of a turn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike

import numpy as np
import torch
from PIL import Image
from transformers import RepetitionPenaltyLogitsProcessor

from kvutils.block import block_keys, slot_rows
from kvutils.errors import ImageError, ParameterError, at_least
from kvutils.images import ImageLike, open_image
from kvutils.keys import KeySelection
from kvutils.language import Continuation, Piece, Prefix, check_masks, embed, prefill
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
        """The option with the highest score."""
        return max(self.scores, key=self.scores.__getitem__)


class SessionBatch(contextlib.AbstractContextManager):
    """B prompts, each of one image or a sequence of images, read up to their last image exactly once. prefix as in `capture`;
    `tokens` of an earlier session of the same model and prefix saves tokenising its questions again; vision: the images' pixels,
    where `prepare_images` has made them before. Memory is held until `close()` or the end of `with`. Raises ImageError,
    ModelError, ParameterError."""

    @torch.no_grad()
    def __init__(self, mlm: MLM, images: Sequence[Pictures], prefix: str | None = None, tokens: PromptTokens | None = None,
                 vision: VisionInputs | None = None):  # fmt: skip
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
        self._embeddings = embed(mlm, self._text.input_ids, encode_images(mlm, vision)[1])
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
        prefix = self._open()
        at_least("max_new_tokens (or 0 with options)", max_new_tokens, 1 if options is None else 0)
        asked = self._asked(questions, options)
        with contextlib.nullcontext() if block is None else block_keys(self.mlm, block, self.slots, queries):
            if block is not None and queries == "all":
                # Later tokens never change earlier ones, so a full blocked prefill is this and what follows it.
                prefix = prefill(self.mlm, self._embeddings, self._text)
            for some in _portions(asked):
                _answer_together(self.mlm, prefix, some, max_new_tokens)
        answers: list[list[Answer]] = [[] for _ in self._layouts]
        for one in asked:
            text = self.mlm.tokenizer.decode(one.tokens, skip_special_tokens=True).strip()
            answers[one.row].append(Answer(one.question, text, tuple(one.tokens), one.complete, one.scores))
        return answers

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
            found = {name: session.answer(questions, options, max_new_tokens, block) for name, block in blocks.items()}
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


def _portions(asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
    """The questions in groups that put at most about `_TOKENS_AT_ONCE` tokens behind a row's prefix at once."""
    used: dict[int, int] = {}
    groups: dict[int, list[_Asked]] = {}
    for one in asked:
        size = len(one.ids) + sum(len(ids) - 1 for spelled in one.options.values() for ids in spelled)
        used[one.row] = used.get(one.row, 0) + size
        groups.setdefault((used[one.row] - 1) // _TOKENS_AT_ONCE, []).append(one)
    yield from groups.values()


def _answer_together(mlm: MLM, prefix: Prefix, asked: Sequence[_Asked], max_new_tokens: int) -> None:
    """Fill in the results of questions: one pass for all of them, one for longer options, one per token."""
    state = Continuation(mlm, prefix)
    hidden = state.extend([Piece(one.row, owner, one.ids) for owner, one in enumerate(asked)])
    ends = torch.tensor([len(one.ids) for one in asked]).cumsum(0) - 1
    logits = state.logits(hidden[ends.to(hidden.device)])  # (questions, vocabulary)
    if any(one.options for one in asked):
        _score(mlm, state, asked, logits)
    if max_new_tokens:
        _decode(mlm, state, asked, logits, max_new_tokens)


def _score(mlm: MLM, state: Continuation, asked: Sequence[_Asked], logits: torch.Tensor) -> None:
    """Sum the log-probabilities of each spelling's tokens; spellings of one label add their probabilities. First tokens are read
    from `logits`; the others from one pass in which each longer spelling is a branch."""
    spelled = [(owner, label, ids) for owner, one in enumerate(asked) for label, texts in one.options.items() for ids in texts]
    owners, first = torch.tensor([(owner, ids[0]) for owner, _, ids in spelled], device=logits.device).T
    scores = logits.log_softmax(-1)[owners, first].tolist()
    if longer := [(branch, *each) for branch, each in enumerate(spelled) if len(each[2]) > 1]:
        branches = state.fork()
        hidden = branches.extend([Piece(asked[owner].row, owner, ids[:-1], len(asked[owner].ids), branch + 1) for branch, owner, _, ids in longer])
        targets = torch.tensor([token for *_, ids in longer for token in ids[1:]])
        rest: list[float] = []
        for part, wanted in zip(hidden.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True):
            found = branches.logits(part).log_softmax(-1)
            rest += found.gather(1, wanted.to(found.device)[:, None])[:, 0].tolist()
        following = iter(rest)
        for branch, _, _, ids in longer:
            scores[branch] += sum(itertools.islice(following, len(ids) - 1))
    for (owner, label, _), score in zip(spelled, scores, strict=True):
        found = asked[owner].scores
        found[label] = float(np.logaddexp(found.get(label, -np.inf), score))


def _decode(mlm: MLM, state: Continuation, asked: Sequence[_Asked], logits: torch.Tensor, max_new_tokens: int) -> None:
    """Greedy decoding; an answer ends at one of `end_tokens`."""
    settings, ends, going = mlm.model.generation_config, end_tokens(mlm), list(enumerate(asked))
    while going:
        if settings.repetition_penalty not in (None, 1):
            said = [one.head + one.ids + one.tokens for _, one in going]
            longest = max(map(len, said))  # a row is filled with a token that it has: one token is penalised once
            rows = torch.tensor([ids + ids[:1] * (longest - len(ids)) for ids in said], device=logits.device)
            logits = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(rows, logits)
        for (_, one), token in zip(going, logits.argmax(-1).tolist(), strict=True):
            one.complete = token in ends
            if not one.complete:
                one.tokens.append(token)
        if going := [(owner, one) for owner, one in going if not one.complete and len(one.tokens) < max_new_tokens]:
            pieces = [Piece(one.row, owner, one.tokens[-1:], len(one.ids) + len(one.tokens) - 1) for owner, one in going]
            logits = state.logits(state.extend(pieces))
