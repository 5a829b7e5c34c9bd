"""What the model answers to multiple-choice items, and what its image values answer without language (section 4.2). One pass per item: the
prompt with all its images is read once; the model answers from that cache, and the values are those of the same cache. `read_items` gives a
`ChoiceTable`; what follows from it is in `blink_tables` and `blink_interventions`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from kvutils.answer import Answer, SessionBatch, spellings
from kvutils.checkpoints import ONEVISION, QWEN
from kvutils.datasets.samples import MultipleChoice
from kvutils.errors import DataError, at_least, one_of
from kvutils.layout import TokenLayout, check_points
from kvutils.metrics.answers import LETTERS, blink_extract, read_letter
from kvutils.models import MLM, Encoder
from kvutils.readout.features import FeatureExtractor, image_tokens
from kvutils.store import Frame, Parts, in_chunks
from kvutils.tasks.base import by_layer
from kvutils.tasks.value_readouts import POINTS, READOUTS, mean_similarity, point_similarity, style_similarity
from kvutils.vision import encode_images, in_halves, prepare_images

MAX_NEW_TOKENS = 128  # verbose models come to their letter late; an answer ends before, at its end token
UNRESOLVED = -1


@dataclass(frozen=True, eq=False)
class ChoiceTable:
    """n items of one subtask with K options each. gold (n,) right option; said (n,) the model's, `UNRESOLVED` where its text names none;
    option_scores (n, K) natural log-probability that its answer begins with the option; scores (n, R, S, K) of the readouts by source."""

    subtask: str
    ids: list[str]
    groups: list[str]
    texts: list[str]
    gold: np.ndarray
    said: np.ndarray
    option_scores: np.ndarray
    readouts: list[str]
    sources: list[str]
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def frame(self) -> Frame:
        """For a file: a row per item, `truth` and `answer` as the numbers of options (-1: `text` names none), `options` the log-probability of
        each, and a column such as `value.3/mean` with every option's score by a source and readout."""
        scores = {f"{s}/{r}": self.scores[:, i, j] for j, s in enumerate(self.sources) for i, r in enumerate(self.readouts)}
        columns = {"id": self.ids, "group": self.groups, "truth": self.gold, "answer": self.said, "text": self.texts, "options": self.option_scores}
        return Frame(columns | scores, {key: getattr(self, key) for key in ("subtask", "readouts", "sources")})

    @classmethod
    def of_frame(cls, frame: Frame) -> Self:
        """The table that `frame` wrote, with the same values to the last bit."""
        readouts, sources = frame.about["readouts"], frame.about["sources"]
        scores = np.array([[frame[f"{s}/{r}"] for s in sources] for r in readouts])  # (R, S, n, K)
        return cls(frame.about["subtask"], frame["id"], frame["group"], frame["text"], frame["truth"], frame["answer"], frame["options"], readouts,
                   sources, np.ascontiguousarray(scores.transpose(2, 0, 1, 3)))  # fmt: skip

    @property
    def title(self) -> str:
        return self.subtask.replace("_", " ").lower()

    @property
    def options(self) -> int:
        return self.option_scores.shape[1]

    @property
    def resolved(self) -> np.ndarray:
        """(n,) bool: the text names an option. An answer that names none is neither right nor wrong where values are compared."""
        return self.said != UNRESOLVED

    @property
    def model_right(self) -> np.ndarray:
        """(n,) bool."""
        return self.said == self.gold

    @property
    def model_wrong(self) -> np.ndarray:
        """(n,) bool: another option, named."""
        return self.resolved & ~self.model_right

    @property
    def mass(self) -> np.ndarray:
        """(n,) the probability that the answer begins with one of the options."""
        return np.exp(self.option_scores).sum(axis=1)

    def of(self, source: str, readout: str | None = None) -> np.ndarray:
        """(n, K) scores of a source, by the subtask's first readout or the one named."""
        return self.scores[:, self.readouts.index(readout or self.readouts[0]), self.sources.index(source)]

    def says(self, source: str, readout: str | None = None) -> np.ndarray:
        """(n,) the option with the readout's highest score."""
        return self.of(source, readout).argmax(axis=1)

    def right(self, source: str, readout: str | None = None) -> np.ndarray:
        """(n,) bool: that is the right option."""
        return self.says(source, readout) == self.gold

    def layers(self, family: str = "value") -> list[str]:
        """The sources `<family>.<layer>`, by layer."""
        return [source for _, source in by_layer(self.sources, family)]


def check_items(items: Sequence[MultipleChoice]) -> dict[str, list[MultipleChoice]]:
    """The items by subtask. DataError for none, and for items that no readout of values can answer."""
    if not items:
        raise DataError("no multiple-choice item: expected at least one; ask the data set for more")
    found: dict[str, list[MultipleChoice]] = {}
    for item in items:
        one_of("subtask with a readout of values", item.subtask, READOUTS, DataError)
        mine = found.setdefault(item.subtask, [])
        mine.append(item)
        where, options = f"item {item.id!r}", len(item.options)
        if options != len(mine[0].options):
            raise DataError(f"{where} has {options} options and the first of {item.subtask} has {len(mine[0].options)}; items of "
                            "a subtask need as many options each: put others in a subtask of their own")  # fmt: skip
        if READOUTS[item.subtask][0] not in POINTS:
            continue
        if item.reference_point is None or item.candidate_points is None:
            raise DataError(f"{where}: a point readout needs reference_point and candidate_points, and this item has only "
                            "painted marks (as BLINK itself); annotate its points, or leave the subtask out")  # fmt: skip
        check_points(item.reference_point, item.images[0].size, f"{where}, reference")
        check_points(item.candidate_points, item.images[1].size, f"{where}, candidates")
    return found


def read_items(mlm: MLM, items: Sequence[MultipleChoice], parts: Parts | None = None, *, encoder_original: Encoder | None = None,
               untrained: MLM | None = None, max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 16,
               progress: bool = True) -> dict[str, ChoiceTable]:  # fmt: skip
    """subtask -> answers and readouts of its items. Sources: value.l, from the cache that the model answers from; alone.value.l, of each
    image in a prompt of its own (it cannot know the other images); projector, encoder and pixels; and, where these models are given,
    encoder_original and untrained.value.l (in the item's prompt). With `parts`, finished batches are kept there, and a run that was stopped
    goes on. Raises DataError as `check_items`."""
    at_least("batch_size", batch_size)
    by_subtask = check_items(items)
    mlm = base_views(mlm)
    extractor = FeatureExtractor(mlm, None, encoder_original, keys=False, memory_bytes=0)
    models = {"value": mlm} | ({"untrained.value": base_views(untrained)} if untrained else {})
    depends = [{name: each.settings for name, each in models.items()}, extractor.fingerprint, max_new_tokens]

    def compute(some: list[MultipleChoice]) -> list[dict]:
        return in_halves(lambda few: _read_batch(models, extractor, few, max_new_tokens), some)

    tables = {}
    for subtask, mine in by_subtask.items():
        chunks = in_chunks(parts, f"multiple_choice/{subtask}", mine, compute, batch_size, depends, unit="item",
                           of=lambda item: [item.id, item.group, item.prompt, item.answer], progress=progress)  # fmt: skip
        rows, readouts = [row for chunk in chunks for row in chunk], list(READOUTS[subtask])
        sources = sorted(rows[0]["scores"][readouts[0]])  # stored parts do not keep the order of keys
        gold, said = np.array([LETTERS.index(item.answer[1]) for item in mine]), np.array([row["said"] for row in rows])
        option_scores = np.array([row["options"] for row in rows], dtype=float)
        scores = np.array([[[row["scores"][r][s] for s in sources] for r in readouts] for row in rows], dtype=float)
        ids, groups, texts = [item.id for item in mine], [item.group for item in mine], [row["text"] for row in rows]
        tables[subtask] = ChoiceTable(subtask, ids, groups, texts, gold, said, option_scores, readouts, sources, scores)
    return tables


def base_views(mlm: MLM) -> MLM:
    """The model for several images. LLaVA-OneVision: a base view of each, padded to a square, as its processor shows them and
    it was trained. LLaVA-NeXT: the squashed base view of each (ours: its processor tiles every image, and three with up to
    2,928 tokens do not fit the 8,192 positions of Llama 3). Qwen2.5-VL: each on a grid of its own."""
    return mlm if mlm.family == QWEN else replace(mlm, base_view_only=True, pad_to_square=mlm.family == ONEVISION)


@torch.no_grad()
def _read_batch(models: Mapping[str, MLM], extractor: FeatureExtractor, batch: list[MultipleChoice], max_new_tokens: int) -> list[dict]:
    """Per item: answer text, the option said, option scores, and scores[readout][source] of every option."""
    images = [tuple(item.images) for item in batch]
    places = np.cumsum([0, *map(len, images)])
    named = [(f"{item.id}-{i}", image) for item, mine in zip(batch, images, strict=True) for i, image in enumerate(mine)]
    vision = prepare_images(models["value"], [image for _, image in named], [name for name, _ in named])  # both models read the same
    encoded = encode_images(models["value"], vision)
    alone = extractor.images(named, seen=(vision, encoded))
    features = [{f"alone.{name}" if name.startswith("value.") else name: tokens for name, tokens in each.features.items()} for each in alone]
    answers: list[list[Answer]] = []
    for family, mlm in models.items():
        with SessionBatch(mlm, images, vision=vision, encoded=encoded if family == "value" else None) as session:
            for row, in_prompt in enumerate(session.image_values()):
                for place, (values, layout) in enumerate(zip(in_prompt, session.layouts[row], strict=True), places[row]):
                    read = values[:, :, torch.from_numpy(image_tokens(layout)).to(values.device)]  # (L, G, N, D) of the tokens that tasks read
                    features[place] |= {f"{family}.{layer}": each.transpose(0, 1).flatten(1) for layer, each in enumerate(read)}
            if family == "value":
                options = [[{option: spellings(option) for option in item.options}] for item in batch]
                answers = session.answer([[item.prompt] for item in batch], options, max_new_tokens)
    rows = []
    for row, (item, (answer,)) in enumerate(zip(batch, answers, strict=True)):
        here = slice(places[row], places[row + 1])
        scores = score_options(item, features[here], [each.layout for each in alone[here]])
        options = [answer.scores[option] for option in item.options]
        rows.append({"text": answer.text, "said": said(item, answer.text), "options": options, "scores": scores})
    return rows


def score_options(item: MultipleChoice, features: Sequence[Mapping[str, torch.Tensor]],
                  layouts: Sequence[TokenLayout]) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """readout -> source -> score of every option, from source -> (N, C) of each image."""
    widths: dict[int, list[str]] = {}
    for source, tokens in features[0].items():
        widths.setdefault(tokens.shape[-1], []).append(source)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in READOUTS[item.subtask]}
    for sources in widths.values():
        stacks = [torch.stack([image[source].double() for source in sources]) for image in features]
        for name, by_source in found.items():
            if name in POINTS:
                points = item.reference_point, item.candidate_points
                scores = point_similarity(stacks, layouts, *points, around=name == "around")
            else:
                scores = (style_similarity if name == "style" else mean_similarity)(stacks)
            by_source |= dict(zip(sources, scores.tolist(), strict=True))
    return found


def said(item: MultipleChoice, text: str) -> int:
    """Index of the option that the text names by BLINK's own extraction or, where that would ask its judge, by `read_letter`;
    `UNRESOLVED` where neither finds one. An item's own spelling of its options is read as BLINK's, "(a)" as "(A)"."""
    letters = [f"({letter})" for letter in LETTERS[: len(item.options)]]
    for option, letter in zip(item.options, letters, strict=True):
        text = text.replace(option, letter)
    found = blink_extract(text, item.choices)
    found = found if found in letters else read_letter(text)
    return letters.index(found) if found in letters else UNRESOLVED


def some_items(table: ChoiceTable, chosen: np.ndarray) -> ChoiceTable:
    """The table of some of the items, (n,) bool."""
    arrays = {name: getattr(table, name)[chosen] for name in ("gold", "said", "option_scores", "scores")}
    lists = {name: [getattr(table, name)[i] for i in np.flatnonzero(chosen)] for name in ("ids", "groups", "texts")}
    return replace(table, **arrays, **lists)
