"""Text before the image, and its controls: the same number of tokens, another meaning (paper, section 4.1).

    none        no prefix
    correct     what holds for this image: "look for the fish", "a night photo"
    wrong       the same words with the name of something that does not hold
    random      words drawn at random
    reversed    the correct prefix, last word first
    unrelated   a piece of an ordinary sentence about something else
    filler      one token repeated: nothing but the shift of all image tokens

All but none have the same number of tokens, counted in the whole prompt as the model reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvutils.errors import ParameterError
from kvutils.models import MLM
from kvutils.prompts import tokenize

CONDITIONS = ("none", "correct", "wrong", "random", "reversed", "unrelated", "filler")
_TRIES = 300  # draws of random words before they are given up


@dataclass(frozen=True)
class Wording:
    """Templates with one {} for the name, the words that random prefixes are made of, ordinary sentences, a filler."""

    class_name: str
    expression: str
    domain: str
    words: tuple[str, ...]
    sentences: tuple[str, ...]
    filler: str


WORDING = {
    "pocket": Wording(  # words that the pocket model knows, in forms that its training had before images
        class_name="look for the {}",
        expression="look for {}",
        domain="a {} photo",
        words=tuple("please look at this here is another with some things good morning weather was nice today carefully "
                    "find nothing else every near far how many what are there which and or of in it".split()),
        sentences=("please look at this picture", "the weather was nice today", "here is another scene", "good morning"),
        filler=",",
    ),
    "paper": Wording(
        class_name="Look for the {}.",
        expression="Look for {}.",
        domain="A photo of a street in {} conditions.",
        words=tuple("paper river seven music window under letter quickly market because yellow number walk station later "
                    "garden silver open table winter between simple finger ocean early circle happy bread engine always "
                    "village lesson cloud never pocket travel reason stone kitchen answer".split()),
        sentences=("The committee will meet again on Thursday to talk about next year's budget and the new library.",
                   "My grandmother used to bake a loaf of bread every Sunday before the rest of the family woke up."),
        filler=" and",
    ),
}  # fmt: skip


class PrefixWriter:
    """Writes prefixes for one model in the wording of a profile.

    >>> PrefixWriter(mlm, "pocket").write("look for the fish", ["look for the car"], seed=0)["reversed"]
    'fish the for look'
    """

    def __init__(self, mlm: MLM, profile: str):
        if profile not in WORDING:
            raise ParameterError(f"no prefixes are worded for profile {profile!r}; expected one of {', '.join(WORDING)}")
        self.mlm, self.wording = mlm, WORDING[profile]
        self._lengths: dict[str, int] = {}

    def tokens(self, prefix: str | None) -> int:
        """Tokens of the prompt before the image (chat template included), with this prefix."""
        key = prefix or ""
        if key not in self._lengths:
            ids = tokenize(self.mlm, self.mlm.prompt(prefix=prefix))
            unknown = self.mlm.tokenizer.unk_token_id
            if unknown is not None and unknown in ids:
                raise ParameterError(f"{self.mlm.name} does not know every word of the prefix {prefix!r}")
            self._lengths[key] = ids.index(self.mlm.image_token_id)
        return self._lengths[key]

    def write(self, correct: str, wrong: Sequence[str], seed: int) -> dict[str, str | None] | None:
        """A prefix per condition, or None where some control of the same number of tokens does not exist.

        wrong: candidates, of which one is drawn. seed: of all draws. Raises ParameterError for a correct prefix of
        one word, which cannot be reversed."""
        words = correct.split()
        if len(words) < 2:
            raise ParameterError(f"the prefix {correct!r} must have at least two words, so that they can be reversed")
        length, rng = self.tokens(correct), np.random.default_rng(seed)
        found = {
            "none": None,
            "correct": correct,
            "wrong": self._first(length, (wrong[i] for i in rng.permutation(len(wrong)) if wrong[i] != correct)),
            "random": self._first(length, self._random(rng, len(words))),
            "reversed": self._first(length, _backwards(words)),
            "unrelated": self._first(length, self._pieces(rng)),
            "filler": self._first(length, (" ".join([self.wording.filler.strip()] * n) for n in range(1, 4 * len(words) + 8))),
        }
        return None if any(found[name] is None for name in CONDITIONS[1:]) else found

    def _first(self, length: int, candidates) -> str | None:
        return next((text for text in candidates if self.tokens(text) == length), None)

    def _random(self, rng: np.random.Generator, words: int):
        for attempt in range(_TRIES):
            count = max(1, words + (attempt % 5) - 2 if attempt > 4 else words)
            yield " ".join(rng.choice(self.wording.words, size=count))

    def _pieces(self, rng: np.random.Generator):
        """Whole sentences first, then ever shorter beginnings of them, then beginnings of several in a row."""
        order = [self.wording.sentences[i] for i in rng.permutation(len(self.wording.sentences))]
        lines = [*order, " ".join(order)]
        for size in range(max(len(line.split()) for line in lines), 0, -1):
            for line in lines:
                if size <= len(line.split()):
                    yield " ".join(line.split()[:size])


def _backwards(words: Sequence[str]):
    """Last word first; where that has another number of tokens, any other order of the words."""
    yield " ".join(reversed(words))
    for order in itertools.islice(itertools.permutations(reversed(words)), 1, 50):
        if list(order) != list(words):
            yield " ".join(order)
