"""Text before the image, and its controls: the same number of tokens, another meaning (paper, section 4.1).

    none        no prefix
    correct     what holds for this image: "look for the fish", "a night photo"
    wrong       the same words with the name of something that does not hold
    random      words drawn at random
    reversed    the correct prefix, last word first
    unrelated   a piece of an ordinary sentence about something else
    filler      one token repeated: nothing but the shift of all image tokens

All but none have the same number of tokens, counted in the whole prompt as the model reads it. In byte-pair tokenizers the tokens of a word
depend on what touches it: "umbrella" at the start of a line is two, " umbrella" one, and ".\\n" is one where the template ends the line. So
prefixes of published models begin with a space and end in a word: then the tokens of a text are those of its words, in any order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvutils.errors import ParameterError
from kvutils.models import MLM
from kvutils.prompts import tokenize

CONDITIONS = ("none", "correct", "wrong", "random", "reversed", "unrelated", "filler")
_TRIES = 300  # draws of random words before they are given up
_PUNCTUATION = " .,;:!?\"'()"


@dataclass(frozen=True)
class Wording:
    """Templates with one {} for the name, the words that random prefixes are made of, ordinary sentences, a filler, and what
    every prefix begins with."""

    class_name: str
    expression: str
    domain: str
    words: tuple[str, ...]
    sentences: tuple[str, ...]
    filler: str
    lead: str = ""


WORDING = {"pocket": Wording("look for the {}", "look for {}", "a {} photo",  # words and forms that its training had before images
                             words=tuple("please look at this here is another with some things good morning weather was nice today carefully "
                                         "find nothing else every near far how many what are there which and or of in it".split()),
                             sentences=("please look at this picture", "the weather was nice today", "here is another scene", "good morning"),
                             filler=","),
           "paper": Wording("Look for the {}", "Look for {}", "A photo of a street in {} conditions",
                            words=tuple("paper river seven music window under letter quickly market because yellow number walk station later "
                                        "garden silver open table winter between simple finger ocean early circle happy bread engine always "
                                        "village lesson cloud never pocket travel reason stone kitchen answer".split()),
                            sentences=("The committee will meet again on Thursday to talk about next year's budget and the new library.",
                                       "My grandmother used to bake a loaf of bread every Sunday before the rest of the family woke up."),
                            filler="and", lead=" ")}  # fmt: skip


class PrefixWriter:
    """Writes prefixes for one model in the wording of a profile. unmatched: correct prefix -> the controls that do not exist in its number
    of tokens, of all that were written."""

    def __init__(self, mlm: MLM, profile: str):
        if profile not in WORDING:
            raise ParameterError(f"no prefixes are worded for profile {profile!r}; expected one of {', '.join(WORDING)}")
        self.mlm, self.wording = mlm, WORDING[profile]
        self.unmatched: dict[str, list[str]] = {}
        self._lengths: dict[str, int] = {}

    def correct(self, kind: str, named: str) -> str:
        """The prefix about a class_name, expression or domain; punctuation around the name is left out."""
        return self.wording.lead + getattr(self.wording, kind).format(" ".join(named.split()).strip(_PUNCTUATION))

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
        """A prefix per condition, or None where some control of the same number of tokens does not exist (`unmatched`). correct, wrong: as
        `correct` writes them; of the candidates wrong, one is drawn. ParameterError for a correct prefix of one word, which cannot be
        reversed."""
        words = correct.split()
        if len(words) < 2:
            raise ParameterError(f"the prefix {correct!r} must have at least two words, so that they can be reversed")
        rng = np.random.default_rng(seed)
        candidates = {"wrong": (wrong[i] for i in rng.permutation(len(wrong)) if wrong[i] != correct),
                      "random": self._random(rng, len(words)), "reversed": self._led([words[::-1]]), "unrelated": self._pieces(rng),
                      "filler": self._led([self.wording.filler] * n for n in range(1, 4 * len(words) + 8))}
        found, length = {"none": None, "correct": correct}, self.tokens(correct)
        found |= {name: next((text for text in texts if self.tokens(text) == length), None) for name, texts in candidates.items()}
        if absent := [name for name in CONDITIONS[1:] if found[name] is None]:
            self.unmatched[correct] = absent
            return None
        return found

    def _led(self, texts: Iterable[Sequence[str]]) -> Iterator[str]:
        return (self.wording.lead + " ".join(words) for words in texts)

    def _random(self, rng: np.random.Generator, words: int) -> Iterator[str]:
        """As many words as the correct prefix has, then more (of which a name in several tokens takes the place), then fewer."""
        counts = (1 + (words - 1 + attempt) % (3 * words + 8) for attempt in range(_TRIES))
        return self._led(rng.choice(self.wording.words, size=count) for count in counts)

    def _pieces(self, rng: np.random.Generator) -> Iterator[str]:
        """Whole sentences first, then ever shorter beginnings of them, then beginnings of several in a row."""
        order = [self.wording.sentences[i].split() for i in rng.permutation(len(self.wording.sentences))]
        lines = [*order, sum(order, [])]
        sizes = range(max(map(len, lines)), 0, -1)
        yield from self._led(line[:size] for size in sizes for line in lines if size <= len(line))
