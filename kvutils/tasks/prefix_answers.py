"""Does a prefix change the answers? POPE's questions with the name of an object before the image."""

import re
from collections.abc import Sequence

import numpy as np

from kvutils.answer import YES_NO, answer_all
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError
from kvutils.metrics.answers import low_mass, pope_parse
from kvutils.metrics.statistics import column_ratio
from kvutils.models import MLM
from kvutils.store import Frame, Parts, in_chunks
from kvutils.tasks.base import ScoreTable, sample_seed
from kvutils.tasks.prefixes import CONDITIONS, PrefixWriter

COLUMNS = ("right", "yes", "changed", "right about correct", "right about wrong", "asked", "correct", "wrong", "mass")
NAMED, ABSENT = "accuracy on the object named", "accuracy on the wrong object"  # by the correct prefix, and it is there; by the wrong, and it is not
RATES = {"accuracy": ("right", "asked"), "share of yes": ("yes", "asked"), "changed answers": ("changed", "asked"),  # column above, below
         NAMED: ("right about correct", "correct"), ABSENT: ("right about wrong", "wrong")}
_OBJECT = re.compile(r"is there an? (.+?)(?: in the image)?\s*\?", re.IGNORECASE)


def object_of(question: str) -> str:
    """The object that a question of POPE asks about in its first line; DataError for a question of another form."""
    found = _OBJECT.fullmatch(question.strip().partition("\n")[0])
    if not found:
        raise DataError(f"not a question of POPE: expected 'Is there a <object> in the image?', found {question!r}")
    return found[1]


def ask_behind_prefixes(samples: Sequence[YesNoSample], mlm: MLM, writer: PrefixWriter, parts: Parts | None = None, images: int = 150,
                        seed: int = 0, batch_size: int = 16, progress: bool = True) -> Frame:  # fmt: skip
    """Answers about the first `images` images under every condition: a row per question, with its image's correct and wrong prefix, and per
    condition the text of the answer and the probability that yes and no hold together. The correct prefix names an object that one of the
    image's questions is about and that is there, the wrong one an object that is asked about and is not. Wordings count once per image.
    Images without an object of each kind, or without controls of equal length, are `skipped`; DataError if all are."""
    asked: dict[str, dict[str, YesNoSample]] = {}
    for sample in samples:
        asked.setdefault(sample.image_id, {}).setdefault(sample.question, sample)
    names = list(asked)[:images]
    plans: dict = {}
    for name in names:
        objects = {truth: [object_of(q) for q, s in asked[name].items() if s.truth == truth] for truth in ("yes", "no")}
        number = sample_seed(str(seed), "answers", name)
        present, absent = ([writer.correct("class_name", each) for each in objects[truth]] for truth in ("yes", "no"))
        first = number % max(1, len(present))
        written = (writer.write(each, absent, number) for each in present[first:] + present[:first] if absent)
        plans[name] = next(filter(None, written), None)
    skipped = [name for name in names if plans[name] is None]
    plans = {name: prefixes for name, prefixes in plans.items() if prefixes is not None}
    if not plans:
        raise DataError(f"none of {len(names)} images has questions about a present and an absent object, and prefixes of "
                        "equal length; pass more images")  # fmt: skip

    def answers(some: list[str]) -> dict[str, list[tuple[str, float]]]:
        (condition,) = some
        behind = {name: prefixes[condition] for name, prefixes in plans.items()}
        found = {}
        for prefix in dict.fromkeys(behind.values()):
            rows = [(name, next(iter(asked[name].values())).image, list(asked[name])) for name, each in behind.items() if each == prefix]
            for name, blocks in answer_all(mlm, rows, options=YES_NO, prefix=prefix, batch_size=batch_size):
                found[name] = [(answer.text, answer.mass) for answer in blocks["none"]]
        return found

    depends = [mlm.settings, plans, {name: list(asked[name]) for name in plans}]
    chunks = in_chunks(parts, "prefix/answers", CONDITIONS, answers, 1, depends, of=str, unit="condition", progress=progress)
    told = dict(zip(CONDITIONS, chunks, strict=True))
    rows = [sample for name in plans for sample in asked[name].values()]
    columns: dict[str, Sequence] = {key: [getattr(sample, key) for sample in rows] for key in ("id", "image_id", "question", "truth")}
    columns |= {f"prefix: {c}": [plans[sample.image_id][c] for sample in rows] for c in ("correct", "wrong")}
    for condition in CONDITIONS:
        texts, mass = zip(*(each for name in plans for each in told[condition][name]), strict=True)
        columns |= {f"answer: {condition}": list(texts), f"yes or no: {condition}": np.array(mass, dtype=float)}
    return Frame(columns, {"skipped": skipped})


def counts(frame: Frame) -> ScoreTable:
    """Rows are images, sources conditions, `COLUMNS`: right, yes and changed answers (against those without prefix), right ones about the
    object that the correct and that the wrong prefix names, how many were asked of each kind, and the sum of the probability of yes and
    no. Answers are parsed as POPE's own script does (what is no "no" counts as yes)."""
    images = list(dict.fromkeys(frame["image_id"]))
    member = np.array([[image == name for image in frame["image_id"]] for name in images], dtype=float)
    said = {condition: np.array([pope_parse(text) for text in frame[f"answer: {condition}"]]) for condition in CONDITIONS}
    objects = [object_of(question) for question in frame["question"]]
    longest = sorted({*objects}, key=len, reverse=True)  # "teddy bear" names no bear

    def named_by(prefix: str) -> str:
        return next((name for name in longest if re.search(rf"\b{re.escape(name)}\b", prefix)), "")

    named = [np.array([one == named_by(prefix) for one, prefix in zip(objects, frame[f"prefix: {kind}"], strict=True)]) for kind in ("correct", "wrong")]
    values = []
    for condition, words in said.items():
        right = words == np.array(frame["truth"])
        columns = [right, words == "yes", words != said["none"], *(right & each for each in named), np.ones(len(right)), *named,
                   frame[f"yes or no: {condition}"]]  # fmt: skip
        values.append(member @ np.column_stack(columns))
    return ScoreTable("prefix_answers", images, images, list(CONDITIONS), list(COLUMNS), np.stack(values, axis=1), frame.about["skipped"])


def summarise_prefix_answers(frame: Frame, n_boot: int = 2000, seed: int = 0) -> dict:
    """Every rate per condition, per condition its difference to no prefix, and the correct prefix minus each other condition; intervals
    over images; JSON-able. option_mass: the probability that yes and no hold together, with a warning where it is low."""
    table = counts(frame)
    found: dict = {"images": len(table), "questions": len(frame["id"]), "skipped": len(table.skipped)}
    found |= {"rates": {}, "minus_none": {}, "correct_minus": {}}
    for name, ends in RATES.items():
        options = (column_ratio(*(COLUMNS.index(end) for end in ends)), n_boot, seed)
        found["rates"][name] = {c: table.interval(c, *options) for c in CONDITIONS}
        found["minus_none"][name] = {c: table.difference(c, "none", *options) for c in CONDITIONS[1:]}
        found["correct_minus"][name] = {c: table.difference("correct", c, *options) for c in CONDITIONS if c != "correct"}
    held = column_ratio(COLUMNS.index("mass"), COLUMNS.index("asked"))
    found["option_mass"] = {c: table.interval(c, held, n_boot, seed) for c in CONDITIONS}
    return found | {"warnings": low_mass({c: found["option_mass"][c]["mean"] for c in CONDITIONS})}
