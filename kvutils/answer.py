"""Questions about a cached image: it is read once, and any number of questions and interventions follow.

    with ImageSession(load_mlm("pocket"), "photo.png") as session:
        session.yes_no(["is there a red car ?"])[0].text                      # "yes"
        session.ask(["describe the image ."], block=selection)[0].text        # with some image keys hidden

`SessionBatch` does the same for several prompts at once, `answer_all` for any number of images. Prompts are
those of `MLM.prompt`, and the numbers are those of a full prefill of each. Decoding is greedy; of the model's
generation settings the end tokens and the repetition penalty apply, as in `generate(do_sample=False)`.

Option scores and greedy answers to many questions behind cached prefixes, in as few passes as possible.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from kvutils.block import block_keys
from kvutils.errors import DataError, ImageError, ParameterError
from kvutils.images import ImageLike, open_image
from kvutils.keys import KeySelection
from kvutils.language import Continuation, Piece, Prefix, check_masks, embed, prefill
from kvutils.layout import TokenLayout
from kvutils.models import MLM
from kvutils.prompts import Options, PromptTokens, for_all, per_question, prepare_text
from kvutils.vision import encode_images, in_halves, prepare_images

# Answer -> spellings whose probabilities add up: models differ in which one they use.
YES_NO: dict[str, tuple[str, ...]] = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}
MAX_NEW_TOKENS = 16
_TOKENS_AT_ONCE = 256  # behind the prefix of a row, in one forward pass


@dataclass(frozen=True)
class Answer:
    """What a model says to a question.

    text: greedy, without special tokens; tokens: its ids; complete: the model ended it, not max_new_tokens.
    scores: option -> log-probability (natural) that the answer begins with it.
    """

    question: str
    text: str
    tokens: tuple[int, ...]
    complete: bool
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The option with the highest score."""
        if not self.scores:
            raise ParameterError("this answer has no scores: ask with options")
        return max(self.scores, key=self.scores.__getitem__)


class SessionBatch:
    """B prompts, each of one image or a sequence of images, read up to their last image exactly once.

    prefix as in `capture`; `tokens` of an earlier session saves tokenising its
    questions again. Memory is held until `close()` or the end of the `with` block. Raises ImageError,
    ParameterError, ModelError, and ParameterError also where the chat template puts questions before the image.
    """

    @torch.no_grad()
    def __init__(
        self,
        mlm: MLM,
        images: Sequence[ImageLike | Sequence[ImageLike]],
        prefix: str | None = None,
        tokens: PromptTokens | None = None,
    ):
        check_masks(mlm, range(mlm.num_layers))
        rows = [_as_list(row) for row in _as_list(images)]
        if not rows or not all(rows):
            raise ImageError("expected at least one image per prompt, found none")
        if tokens is not None and (tokens.mlm is not mlm or tokens.prefix != prefix):
            raise ParameterError("these tokens belong to another model or prefix")
        self.mlm, self.tokens = mlm, tokens or PromptTokens(mlm, prefix)
        names = [f"images[{i}][{j}]" for i, row in enumerate(rows) for j in range(len(row))]
        opened = [open_image(*pair) for pair in zip(itertools.chain(*rows), names, strict=True)]
        vision = prepare_images(mlm, opened, names)
        self._text = prepare_text(mlm, [self.tokens.up_to_images(len(row)) for row in rows], vision)
        placed = iter(vision.layouts)
        #: layouts[row][image]: which slots of the row's prompt are which tokens of the image
        self.layouts: list[list[TokenLayout]] = [list(itertools.islice(placed, len(row))) for row in rows]
        _, projected = encode_images(mlm, vision)
        self._embeddings = embed(mlm, self._text.input_ids, projected)
        self._prefix: Prefix | None = prefill(mlm, self._embeddings, self._text)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache and the image features; nothing can be asked afterwards."""
        self._prefix = self._text = self._embeddings = None

    @property
    def slots(self) -> np.ndarray:
        """(B, N) sequence slots of the image tokens, as `block_keys` takes them.

        DataError where N differs between prompts: a selection of keys belongs to one token grid.
        """
        rows = [np.concatenate([layout.slots for layout in row]) for row in self.layouts]
        counts = sorted({len(row) for row in rows})
        if len(counts) > 1:
            raise DataError(
                f"a selection of keys needs one token grid, and these prompts have {counts} image tokens: "
                "resize the images to one size, or use a session for each"
            )
        return np.stack(rows)

    def image_values(self) -> list[list[torch.Tensor]]:
        """values[row][image] (L, G, N, D): the values that the cache holds at the tokens of `layouts[row][image]`."""
        if self._prefix is None:
            raise ParameterError("this session is closed; open a new one")
        layers = [values for _, values in self._prefix.keys_values]
        return [[_at(layers, row, layout) for layout in layouts] for row, layouts in enumerate(self.layouts)]

    @torch.no_grad()
    def answer(
        self,
        questions: Sequence[Sequence[str]],
        options: Options | Sequence[Sequence[Options]] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        block: KeySelection | None = None,
        queries: str = "after",
    ) -> list[list[Answer]]:
        """Answers to the questions of every prompt: answers[row][i] belongs to questions[row][i].

        options: texts to score (or label -> spellings whose probabilities add up) for all questions, or
        options[row][i] for each. max_new_tokens: 0 for scores alone, with options. block: image keys hidden
        from queries="after" (what follows the last image; the cached image is used) or from "all" (image
        tokens too: the prompt is read anew under the block). Raises ParameterError, and what
        `block_keys` raises.
        """
        if self._prefix is None:
            raise ParameterError("this session is closed; open a new one")
        if queries not in ("after", "all"):
            raise ParameterError(f"queries must be 'after' or 'all', not {queries!r}")
        if max_new_tokens < 0 or (max_new_tokens == 0 and options is None):
            raise ParameterError(f"max_new_tokens must be positive (or 0 with options), not {max_new_tokens}")
        asked = self._asked(questions, options)
        with self._reading(block, queries) as prefix:
            for some in portions(asked, _TOKENS_AT_ONCE):
                answer_together(self.mlm, prefix, some, max_new_tokens)
        answers: list[list[Answer]] = [[] for _ in self.layouts]
        for one in asked:
            text = self.mlm.tokenizer.decode(one.tokens, skip_special_tokens=True).strip()
            said = Answer(one.question, text, tuple(one.tokens), one.complete, one.scores)
            answers[one.row].append(said)
        return answers

    @contextlib.contextmanager
    def _reading(self, block: KeySelection | None, queries: str) -> Iterator[Prefix]:
        """The prefix that questions continue, with the block in force."""
        if block is None:
            yield self._prefix
            return
        with block_keys(self.mlm, block, self.slots, queries=queries):
            # Later tokens never change earlier ones, so a full blocked prefill is these two parts.
            yield self._prefix if queries == "after" else prefill(self.mlm, self._embeddings, self._text)

    def _asked(self, questions, options) -> list[Asked]:
        """The questions as tokens, each with its options."""
        if isinstance(questions, str) or len(questions) != len(self.layouts):
            raise ParameterError(f"expected a list of questions for each of {len(self.layouts)} prompts")
        for texts in questions:
            if isinstance(texts, str) or not len(texts):
                raise ParameterError(f"questions must be a list of at least one text, not {texts!r}")
        asked = []
        choices = per_question(options, questions)
        for row, texts in enumerate(questions):
            images = len(self.layouts[row])
            for text, choice in zip(texts, choices[row], strict=True):
                spelled = {} if choice is None else self.tokens.options(choice)
                ids = self.tokens.tail(text, images)
                asked.append(Asked(row, text, self.tokens.head(images), ids, spelled))
        return asked


class ImageSession:
    """One prompt with one image, or several: `prefix + images` is read once, then questions are asked.

    Arguments and errors as for `SessionBatch`; every method takes `block` and `queries` of its `answer`.
    """

    def __init__(
        self,
        mlm: MLM,
        images: ImageLike | Sequence[ImageLike],
        prefix: str | None = None,
    ):
        self._batch = SessionBatch(mlm, [_as_list(images)], prefix)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache and the image features; nothing can be asked afterwards."""
        self._batch.close()

    @property
    def layouts(self) -> list[TokenLayout]:
        """One per image; their slots count the prompt's tokens."""
        return self._batch.layouts[0]

    def ask(
        self, questions: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, **intervention
    ) -> list[Answer]:
        """Free text."""
        return self._answer(questions, None, max_new_tokens, intervention)

    def yes_no(
        self, questions: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, **intervention
    ) -> list[Answer]:
        """Text, and scores of "yes" and "no", each in small and capital letters."""
        return self._answer(questions, YES_NO, max_new_tokens, intervention)

    def choose(
        self,
        questions: Sequence[str],
        options: Options | Sequence[Options],
        max_new_tokens: int = MAX_NEW_TOKENS,
        **intervention,
    ) -> list[Answer]:
        """Multiple choice: text, and scores of the options, which are everyone's or options[i] of each."""
        return self._answer(questions, options, max_new_tokens, intervention)

    def score(self, questions: Sequence[str], options: Options, **intervention) -> torch.Tensor:
        """(questions, options) float32 log-probabilities that the answer begins with the option."""
        answers = self._answer(questions, options, 0, intervention)
        return torch.tensor([list(answer.scores.values()) for answer in answers])

    def _answer(self, questions, options, max_new_tokens: int, intervention: dict) -> list[Answer]:
        if not for_all(options):
            options = [options]
        return self._batch.answer([questions], options, max_new_tokens, **intervention)[0]


def answer_all(
    mlm: MLM,
    samples: Iterable[tuple[str, ImageLike | Sequence[ImageLike], Sequence[str]]],
    blocks: Mapping[str, KeySelection | None] | None = None,
    *,
    options: Options | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    queries: str = "after",
    prefix: str | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Iterator[tuple[str, dict[str, list[Answer]]]]:
    """(image id, intervention -> its answers), in order, for samples (image id, image or images, questions).

    Each image is read once for all its questions and all `blocks` (name -> selection, None for no block; by
    default only {"none": None}), `batch_size` images together, or fewer where memory does not suffice. The other
    arguments are those of `SessionBatch.answer`. `samples` may be a generator.
    """
    blocks = {"none": None} if blocks is None else blocks
    if not blocks or batch_size < 1:
        raise ParameterError(f"expected at least one block, and a batch size from 1: {blocks}, {batch_size}")
    tokens, source = PromptTokens(mlm, prefix), iter(samples)

    def run(batch: Sequence[tuple]) -> list[tuple[str, dict[str, list[Answer]]]]:
        names, images, questions = zip(*batch, strict=True)
        with SessionBatch(mlm, images, prefix, tokens) as session:
            found = {
                name: session.answer(questions, options, max_new_tokens, block, queries)
                for name, block in blocks.items()
            }
        return [(name, {block: answers[row] for block, answers in found.items()}) for row, name in enumerate(names)]

    total = len(samples) if isinstance(samples, Sequence) else None
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        while batch := list(itertools.islice(source, batch_size)):
            yield from in_halves(run, batch)
            bar.update(len(batch))


def _at(layers: Sequence[torch.Tensor], row: int, layout: TokenLayout) -> torch.Tensor:
    """(L, G, N, D) of cached tensors (B, G, T, D), on the device of the first."""
    slots = torch.from_numpy(layout.slots)
    return torch.stack([each[row].index_select(1, slots.to(each.device)).to(layers[0].device) for each in layers])


def _as_list(images) -> list:
    """A single picture becomes a list of one."""
    single = images is None or isinstance(images, str | PathLike | Image.Image | np.ndarray | torch.Tensor)
    return [images] if single else list(images)


_LOGITS_AT_ONCE = 256  # rows of (tokens, vocabulary) held in float32


@dataclass(eq=False)
class Asked:
    """A question as tokens, and what comes of it.

    row: its prompt; head: ids before the question, one per image; ids: of the question; options: label ->
    spellings. Results: tokens, generated before the end token; complete, whether the model ended; scores, per
    label the log-probability that the answer begins with one of its spellings.
    """

    row: int
    question: str
    head: list[int]
    ids: list[int]
    options: dict[str, list[list[int]]]
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    scores: dict[str, float] = field(default_factory=dict)


def portions(asked: Sequence[Asked], tokens: int) -> Iterator[list[Asked]]:
    """The questions in groups that put at most about `tokens` tokens behind a row's prefix at once."""
    used: dict[int, int] = {}
    groups: dict[int, list[Asked]] = {}
    for one in asked:
        size = len(one.ids) + sum(len(ids) - 1 for spelled in one.options.values() for ids in spelled)
        used[one.row] = used.get(one.row, 0) + size
        groups.setdefault((used[one.row] - 1) // tokens, []).append(one)
    yield from groups.values()


def answer_together(mlm: MLM, prefix: Prefix, asked: Sequence[Asked], max_new_tokens: int) -> None:
    """Fill in the results of questions: one pass for all of them, one for longer options, one per token."""
    state = Continuation(mlm, prefix)
    hidden = state.extend([Piece(one.row, owner, one.ids) for owner, one in enumerate(asked)])
    ends = torch.tensor([len(one.ids) for one in asked]).cumsum(0) - 1
    logits = next_logits(mlm, hidden[ends.to(hidden.device)])
    if any(one.options for one in asked):
        _score(mlm, state, asked, logits)
    if max_new_tokens:
        _decode(mlm, state, asked, logits, max_new_tokens)


def next_logits(mlm: MLM, hidden: torch.Tensor) -> torch.Tensor:
    """(n, vocabulary) float32 of last hidden states (n, C)."""
    return mlm.model.lm_head(hidden).float()


def _score(mlm: MLM, state: Continuation, asked: Sequence[Asked], logits: torch.Tensor) -> None:
    """Sum the log-probabilities of each spelling's tokens; spellings of one label add their probabilities.

    First tokens are read from `logits`; the others from one pass in which each longer spelling is a branch.
    """
    spelled = [
        (owner, label, ids)
        for owner, one in enumerate(asked)
        for label, spellings in one.options.items()
        for ids in spellings
    ]
    owners = torch.tensor([owner for owner, _, _ in spelled], device=logits.device)
    first = torch.tensor([ids[0] for _, _, ids in spelled], device=logits.device)
    scores = logits.log_softmax(-1)[owners, first].tolist()
    longer = [number for number, (_, _, ids) in enumerate(spelled) if len(ids) > 1]
    if longer:
        pieces = []
        for number in longer:
            owner, _, ids = spelled[number]
            one = asked[owner]
            pieces.append(Piece(one.row, owner, ids[:-1], offset=len(one.ids), branch=number + 1))
        hidden = state.fork().extend(pieces)
        targets = torch.tensor([token for number in longer for token in spelled[number][2][1:]])
        rest = []
        for part, wanted in zip(hidden.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True):
            found = next_logits(mlm, part).log_softmax(-1)
            rest += found.gather(1, wanted.to(found.device)[:, None])[:, 0].tolist()
        following = iter(rest)
        for number in longer:
            scores[number] += sum(next(following) for _ in spelled[number][2][1:])
    for (owner, label, _), score in zip(spelled, scores, strict=True):
        found = asked[owner].scores
        found[label] = _log_add(found[label], score) if label in found else score


def _log_add(one: float, two: float) -> float:
    high, low = max(one, two), min(one, two)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _decode(
    mlm: MLM, state: Continuation, asked: Sequence[Asked], logits: torch.Tensor, max_new_tokens: int
) -> None:
    """Greedy decoding; an answer ends at one of the model's end tokens."""
    settings = mlm.model.generation_config
    ends = settings.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    penalty = settings.repetition_penalty or 1.0
    seen = torch.zeros(logits.shape if penalty != 1 else (0, 0), dtype=torch.bool, device=logits.device)
    for owner in range(len(seen)):
        seen[owner, asked[owner].head + asked[owner].ids] = True
    going = list(range(len(asked)))
    while going:
        if penalty != 1:  # as transformers' RepetitionPenaltyLogitsProcessor
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen[going], penalised, logits)
        following = []
        for owner, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            one = asked[owner]
            one.complete = token in ends
            if one.complete:
                continue
            one.tokens.append(token)
            if penalty != 1:
                seen[owner, token] = True
            if len(one.tokens) < max_new_tokens:
                following.append(owner)
        going = following
        if going:
            pieces = []
            for owner in going:
                one = asked[owner]
                offset = len(one.ids) + len(one.tokens) - 1
                pieces.append(Piece(one.row, owner, one.tokens[-1:], offset))
            logits = next_logits(mlm, state.extend(pieces))
