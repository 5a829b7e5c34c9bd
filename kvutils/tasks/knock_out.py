"""Where is the image read? Text that may not see the image in one layer, or from a layer on, or up to one.

Blocking keys of late layers can only matter for questions whose answer still depends on the image there. So this is measured first: per
kind of question, accuracy and loss with all image keys hidden from the text

  one    in layer l alone
  from   in layer l and all after it: what is read before l is enough, as far as nothing is lost
  until  in layer l and all before it

An answer is right when the right option scores highest among those of its kind (of every spelling that models use); the loss is minus the
log-probability (nats) that it begins with the right option."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
import torch

from kvutils.answer import SessionBatch, spellings
from kvutils.datasets.samples import Question, YesNoSample
from kvutils.errors import DataError
from kvutils.metrics.answers import low_mass
from kvutils.metrics.layers import Halves
from kvutils.metrics.statistics import bootstrap_ci, column_ratio, mean_statistic
from kvutils.models import MLM
from kvutils.prompts import PromptTokens
from kvutils.readout.selections import select_all
from kvutils.store import Frame, Parts, in_chunks
from kvutils.vision import in_halves

FAMILIES = ("one", "from", "until")
ALL = "all"  # kinds together, each with the same weight
MEASURED = ("right", "loss", "mass")


@dataclass(frozen=True, eq=False)
class KnockOut:
    """Per question and condition: values (n, C, 3) float64, right (0 or 1), loss (nats), and the probability that the options hold
    together. conditions (C,): "none", then "one 0", "from 0", ...; ids, kinds, groups (n,): of the question, its kind, its scene."""

    layers: int
    conditions: list[str]
    ids: list[str]
    kinds: list[str]
    groups: list[str]
    values: np.ndarray

    def of(self, condition: str) -> np.ndarray:
        """(n, 3) of one condition."""
        return self.values[:, self.conditions.index(condition)]

    @property
    def balance(self) -> np.ndarray:
        """(n,) weights that make kinds count alike."""
        return np.array([1 / self.kinds.count(kind) for kind in self.kinds])

    def frame(self) -> Frame:
        """A row per question, three columns per condition."""
        measured = {f"{name}: {condition}": self.values[:, i, j] for i, condition in enumerate(self.conditions) for j, name in enumerate(MEASURED)}
        return Frame({"id": self.ids, "kind": self.kinds, "scene": self.groups} | measured, {"layers": self.layers})

    @classmethod
    def of_frame(cls, frame: Frame) -> Self:
        conditions = [name.partition(": ")[2] for name in frame.columns if name.startswith(MEASURED[0])]
        values = np.stack([np.stack([frame[f"{name}: {each}"] for name in MEASURED], axis=1) for each in conditions], axis=1)
        return cls(frame.about["layers"], conditions, *(frame[name] for name in ("id", "kind", "scene")), values)


def blocked_layers(layers: int) -> dict[str, tuple[int, ...]]:
    """Condition -> layers in which the image is hidden. Equal sets are measured once, see `condition_of`."""
    found: dict[str, tuple[int, ...]] = {"none": ()}
    for family, layer in product(FAMILIES, range(layers)):
        bounds = {"one": (layer, layer + 1), "from": (layer, layers), "until": (0, layer + 1)}
        found.setdefault(condition_of(family, layer, layers), tuple(range(*bounds[family])))
    return found


def condition_of(family: str, layer: int, layers: int) -> str:
    """The condition that stands for a family's at a layer: until 0 is one 0, from the last is one, until it is all."""
    if (family == "until" and layer == 0) or (family == "from" and layer == layers - 1):
        return f"one {layer}"
    return "from 0" if family == "until" and layer == layers - 1 else f"{family} {layer}"


def as_questions(samples: Sequence[YesNoSample]) -> list[Question]:
    """POPE's and MME's questions as `knock_out` takes them; the subset is the kind."""
    return [Question(s.id, s.subset, lambda s=s: (s.image,), s.question, s.truth, ("yes", "no"), s.image_id) for s in samples]


def knock_out(mlm: MLM, samples: Sequence[Question], parts: Parts | None = None, *, batch_size: int = 16, progress: bool = True) -> KnockOut:
    """Every question under every condition; each image is read once, for all questions of its `group`. The images of a batch need the same
    number of tokens (batch_size=1 serves any). With `parts`, finished batches are kept. Raises DataError for no samples or a kind with
    fewer than two different options, and what `SessionBatch` raises."""
    if not samples:
        raise DataError("a knock-out curve needs questions, found none")
    scenes: dict[str, list[Question]] = {}
    named: dict[str, set[str]] = {}  # the options of each kind: those that its samples name, and all their answers
    for sample in samples:
        scenes.setdefault(sample.group or sample.id, []).append(sample)
        named.setdefault(sample.kind, set()).update((sample.answer, *sample.options))
    for kind, found in named.items():
        if len(found) < 2:
            raise DataError(f"all {kind} questions have the answer {found}: nothing can be right or wrong")
    options = {kind: sorted(found) for kind, found in named.items()}
    blocked, tokens = blocked_layers(mlm.num_layers), PromptTokens(mlm, None)

    def run(some: Sequence[list[Question]]) -> list[list]:
        questions = [[s.text for s in asked] for asked in some]
        choices = [[{option: spellings(option) for option in options[s.kind]} for s in asked] for asked in some]
        rows: list[list[list]] = [[[] for _ in asked] for asked in some]  # [scene][question][condition] -> [right, loss, mass]
        with SessionBatch(mlm, [asked[0].images for asked in some], tokens=tokens) as session:
            tokens_each = session.slots.shape[1]
            blocks = {name: select_all(layers, mlm.num_kv_heads, tokens_each) if layers else None for name, layers in blocked.items()}
            for answers in session.answer_under(blocks, questions, choices, 0).values():
                for asked, found, mine in zip(some, answers, rows, strict=True):
                    for sample, answer, row in zip(asked, found, mine, strict=True):
                        row.append([float(answer.best == sample.answer), -answer.scores[sample.answer], answer.mass])
        return rows

    def compute(some: list[list[Question]]) -> dict[str, torch.Tensor]:  # as JSON they would be slow to keep
        return {"values": torch.tensor([row for rows in in_halves(run, some) for row in rows], dtype=torch.float64)}

    batched = sorted(scenes.values(), key=lambda asked: len(" ".join(s.text for s in asked).split()))  # of like length: little padding
    chunks = in_chunks(parts, "knock_out", batched, compute, batch_size, [mlm.settings, options], unit="image",
                       progress=progress, of=lambda asked: [[s.group, s.id, s.text, s.answer] for s in asked])  # fmt: skip
    values = np.concatenate([chunk["values"].numpy() for chunk in chunks])
    places = {id(sample): place for place, sample in enumerate(sample for asked in batched for sample in asked)}
    ordered = [sample for asked in scenes.values() for sample in asked]
    return KnockOut(mlm.num_layers, list(blocked), [s.id for s in ordered], [s.kind for s in ordered], [s.group or s.id for s in ordered],
                    values[[places[id(sample)] for sample in ordered]])  # fmt: skip


def summarise_knock_out(table: KnockOut, n_boot: int = 2000, seed: int = 0) -> dict:
    """Per kind, and for all kinds: accuracy and loss without block and under each, with 95 % intervals over scenes. kinds -> kind -> n,
    scenes, none {accuracy, loss, option_mass}, and per family a list over layers of these three and the paired differences to none,
    accuracy_change and loss_change. warnings: where the options hold little probability. JSON-able."""
    every = table.balance
    kinds = {ALL: np.ones(len(table.kinds), bool), **{kind: np.array(table.kinds) == kind for kind in dict.fromkeys(table.kinds)}}
    names = ("accuracy", "loss", "option_mass", "accuracy_change", "loss_change")
    result, masses = {"layers": table.layers, "kinds": {}}, {}
    for kind, mine in kinds.items():
        values = table.values[mine]
        packed = np.concatenate([values, (values - values[:, :1])[..., :2]], axis=2).reshape(mine.sum(), -1)
        groups = [group for group, kept in zip(table.groups, mine, strict=True) if kept]

        def statistic(weights: np.ndarray, packed: np.ndarray, balance: np.ndarray = every[mine]) -> np.ndarray:
            return mean_statistic(weights * balance, packed)

        intervals = [each.as_dict() for each in bootstrap_ci(packed, statistic, n_boot, seed, groups)]
        by_condition = {condition: dict(zip(names, intervals[5 * i : 5 * i + 5], strict=True))
                        for i, condition in enumerate(table.conditions)}  # fmt: skip
        found: dict = {"n": int(mine.sum()), "scenes": len(set(groups)), "none": by_condition["none"]}
        for family in FAMILIES:
            found[family] = [by_condition[condition_of(family, layer, table.layers)] for layer in range(table.layers)]
        result["kinds"][kind] = found
        masses |= {f"kind {kind!r}, condition {name!r}": each["option_mass"]["mean"] for name, each in by_condition.items()}
    return result | {"warnings": low_mass(masses)}


def reading_layers(table: KnockOut, width: int, seed: int = 0) -> dict:
    """The `width` adjacent layers where the image is read: hiding it in each alone adds most loss, summed. Kinds count equally. layers:
    chosen on all scenes, where hiding the image adds `windows`. held_out: what is added in the layers that one half of the scenes chooses,
    on the other half, both ways. ParameterError for fewer than four scenes."""
    added = np.stack([table.of(f"one {layer}")[:, 1] - table.of("none")[:, 1] for layer in range(table.layers)], axis=1)
    sums = np.lib.stride_tricks.sliding_window_view(added, width, axis=1).sum(axis=-1)  # (n, windows)
    scores = np.stack([sums, np.ones_like(sums)], axis=-1) * table.balance[:, None, None]
    mean, halves = column_ratio(0, 1), Halves.of(table.groups, seed)
    held_out = halves.read(scores, halves.best(scores, mean)).sum(axis=0)
    windows = scores[..., 0].sum(axis=0) / table.balance.sum()
    first = int(windows.argmax())
    return {"layers": list(range(first, first + width)), "held_out": float(held_out[0] / held_out[1]), "windows": windows.tolist()}
