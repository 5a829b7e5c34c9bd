"""Questions about a cached image: it is read once, and any number of questions and interventions follow.

    with ImageSession(load_mlm("pocket"), "photo.png") as session:
        session.yes_no(["is there a red car ?"])[0].text                      # "yes"
        session.ask(["describe the image ."], block=selection)[0].text        # with some image keys hidden

`SessionBatch` does the same for several prompts at once, `answer_all` for any number of images. Prompts are
those of `MLM.prompt`, and the numbers are those of a full prefill of each. Decoding is greedy; of the model's
generation settings the end tokens and the repetition penalty apply, as in `generate(do_sample=False)`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from kvutils.block import block_keys
from kvutils.decoding import Asked, answer_together, portions
from kvutils.errors import DataError, ImageError, ParameterError
from kvutils.images import ImageLike, open_image
from kvutils.inputs import encode_images, prepare_images, prepare_text
from kvutils.keys import KeySelection
from kvutils.layout import TokenLayout
from kvutils.memory import in_halves
from kvutils.models import MLM
from kvutils.prompt_tokens import Options, PromptTokens, for_all, per_question
from kvutils.session_cache import Prefix, check_attention, embed, prefill

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

    prefix, base_view_only and max_pixels as in `capture`; `tokens` of an earlier session saves tokenising its
    questions again. Memory is held until `close()` or the end of the `with` block. Raises ImageError,
    ParameterError, ModelError, and PromptError also where the chat template puts questions before the image.
    """

    @torch.no_grad()
    def __init__(
        self,
        mlm: MLM,
        images: Sequence[ImageLike | Sequence[ImageLike]],
        prefix: str | None = None,
        base_view_only: bool | None = None,
        max_pixels: int | None = None,
        tokens: PromptTokens | None = None,
    ):
        check_attention(mlm)
        rows = [_as_list(row) for row in _as_list(images)]
        if not rows or not all(rows):
            raise ImageError("expected at least one image per prompt, found none")
        if tokens is not None and (tokens.mlm is not mlm or tokens.prefix != prefix):
            raise ParameterError("these tokens belong to another model or prefix")
        self.mlm, self.tokens = mlm, tokens or PromptTokens(mlm, prefix)
        names = [f"images[{i}][{j}]" for i, row in enumerate(rows) for j in range(len(row))]
        opened = [open_image(*pair) for pair in zip(itertools.chain(*rows), names, strict=True)]
        vision = prepare_images(mlm, opened, base_view_only, max_pixels, names)
        self._text = prepare_text(mlm, [self.tokens.up_to_images(len(row)) for row in rows], vision)
        placed = iter(vision.layouts)
        #: layouts[row][image]: which slots of the row's prompt are which tokens of the image
        self.layouts: list[list[TokenLayout]] = [list(itertools.islice(placed, len(row))) for row in rows]
        for row, layouts in enumerate(self.layouts):
            ids = self._text.input_ids[row][self._text.attention_mask[row].bool()].tolist()
            self.tokens.check(len(layouts), [len(layout) for layout in layouts], ids)
        _, projected = encode_images(mlm, vision)
        self._embeddings = embed(mlm, self._text, projected)
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
        tokens too: the prompt is read anew under the block). Raises ParameterError, PromptError, and what
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
        base_view_only: bool | None = None,
        max_pixels: int | None = None,
    ):
        self._batch = SessionBatch(mlm, [_as_list(images)], prefix, base_view_only, max_pixels)

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
    base_view_only: bool | None = None,
    max_pixels: int | None = None,
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
        with SessionBatch(mlm, images, prefix, base_view_only, max_pixels, tokens) as session:
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
