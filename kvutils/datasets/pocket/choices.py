"""BLINK's multiple-choice subtasks in the pocket world: the same fields, asked exactly as the models were trained.

    Art_Style                reference, two candidates: which has the reference's style?
    Visual_Similarity        reference, two candidates: which shows the same thing as the reference?
    Semantic_Correspondence  a reference mark on the first image, lettered marks a-d on the second: which corresponds?

Everything follows from a seed, and a larger set begins with the smaller one. Every scene is in one item only, so that
items are independent. The right option is each letter equally often (in every run of as many items as there are options)."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from PIL import Image

from kvutils.datasets.files import some_of
from kvutils.datasets.pocket import questions as q
from kvutils.datasets.pocket.sets import SEED, PocketScene, describe_scene, pocket_scene
from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.datasets.pocket.world import STYLES, Scene, draw_mark
from kvutils.datasets.samples import MultipleChoice
from kvutils.errors import at_least

_PORTRAIT_EVERY = 5  # scenes in which all kinds are mixed: every fifth a portrait, as in the training pool
_ITEMS, _ANSWERS = 31, 32  # what random numbers are for


def pocket_blink(items: int = 400, subtasks: str | Sequence[str] | None = None, seed: int = SEED) -> list[MultipleChoice]:
    """`items` multiple-choice items of each subtask (default: all of `SUBTASKS`), subtask by subtask.

    Drawing takes about 10 to 20 ms an item. Raises ParameterError for no items and for an unknown subtask."""
    at_least("items", items)
    wanted = SUBTASKS if subtasks is None else some_of("BLINK subtask of the pocket world", subtasks, SUBTASKS)
    return [item for name in wanted for item in _MAKE[name](items, seed)]


class _Shelf:
    """Scenes of a stream by what they are, each handed out once, in the order of the stream."""

    def __init__(self, stream: str, seed: int, key: Callable[[Scene], Hashable], portraits: bool):
        self.stream, self.seed, self.key, self.portraits = stream, seed, key, portraits
        self.waiting: dict[Hashable, list[int]] = defaultdict(list)
        self.seen = 0

    def take(self, key: Hashable) -> PocketScene:
        """The next scene with that key, drawn; only scenes that are handed out are drawn."""
        while not self.waiting[key]:
            scene = describe_scene(self.stream, self.seen, self.seed, self._kind(self.seen))
            self.waiting[self.key(scene)].append(self.seen)
            self.seen += 1
        index = self.waiting[key].pop(0)
        return pocket_scene(self.stream, index, self.seed, self._kind(index))

    def _kind(self, index: int) -> str:
        return "portrait" if self.portraits or index % _PORTRAIT_EVERY == 0 else "mixed"


def _class_of(scene: Scene) -> int:
    return scene.things[0].cls


def _triples(subtask: str, shelf: _Shelf, kinds: int, question: str, items: int) -> list[MultipleChoice]:
    """A reference and two candidates, one of its kind and one of another; kinds equally likely, as in training."""
    found = []
    for number in range(items):
        random = np.random.default_rng((shelf.seed, _ITEMS, SUBTASKS.index(subtask), number))
        same, other = (int(kind) for kind in random.choice(kinds, 2, replace=False))
        right = _balanced(shelf.seed, subtask, number, 2)
        scenes = [shelf.take(kind) for kind in (same, *((same, other) if right == 0 else (other, same)))]
        pictures = [scene.drawn.image for scene in scenes]
        found.append(_item(subtask, number, scenes, pictures, question, ("the second image", "the third image"), right))
    return found


def _semantic_correspondence(items: int, seed: int) -> list[MultipleChoice]:
    """Two portraits of a class; the marked part of the first is one of four lettered parts of the second."""
    subtask = "Semantic_Correspondence"
    shelf = _Shelf("correspondence", seed, _class_of, portraits=True)
    found: list[MultipleChoice] = []
    for number in range(items):
        random = np.random.default_rng((seed, _ITEMS, SUBTASKS.index(subtask), number))
        cls = int(random.integers(len(CLASSES)))
        while True:  # a part must be in view on both, and three more on the second
            scenes = [shelf.take(cls), shelf.take(cls)]
            first, second = (np.flatnonzero(scene.drawn.keypoint_seen[0]) for scene in scenes)
            common = np.intersect1d(first, second)
            if len(common) and len(second) >= len(q.OPTIONS):
                break
        part = int(random.choice(common))
        right = _balanced(seed, subtask, number, len(q.OPTIONS))
        shown = random.permutation(second[second != part])[: len(q.OPTIONS) - 1].tolist()
        shown.insert(right, part)
        reference = scenes[0].drawn.keypoints[0][part]
        candidates = scenes[1].drawn.keypoints[0][shown]
        pictures = [scene.drawn.image.copy() for scene in scenes]
        draw_mark(pictures[0], "r", *reference)
        for option, (x, y) in zip(q.OPTIONS, candidates, strict=True):
            draw_mark(pictures[1], option[1], x, y)
        choices = tuple(f"Point {option[1].upper()}" for option in q.OPTIONS)
        points = {"reference_point": reference, "candidate_points": candidates}
        found.append(_item(subtask, number, scenes, pictures, q.CORRESPONDENCE, choices, right, **points))
    return found


def _item(subtask, number, scenes, pictures, prompt, choices, right, **points) -> MultipleChoice:
    """The prompt is the question with its options, as the models were trained on it."""
    question, group = prompt.split(" ?")[0] + " ?", "+".join(scene.id for scene in scenes)
    return MultipleChoice(f"{subtask}-{number:04d}", subtask, tuple(map(Image.fromarray, pictures)), question, choices,
                          q.OPTIONS[right].upper(), prompt, q.OPTIONS[: len(choices)], group, **points)  # fmt: skip


def _balanced(seed: int, subtask: str, number: int, options: int) -> int:
    """Index of the right option: every run of `options` items has each once, in random order."""
    random = np.random.default_rng((seed, _ANSWERS, SUBTASKS.index(subtask), number // options))
    return int(random.permutation(options)[number % options])


_MAKE = {  # Visual_Similarity: portraits, one large thing each; its class decides, colour, style and light are free
    "Art_Style": lambda items, seed: _triples(
        "Art_Style", _Shelf("art_style", seed, lambda scene: scene.style, portraits=False), len(STYLES), q.STYLE_MATCH, items),
    "Visual_Similarity": lambda items, seed: _triples(
        "Visual_Similarity", _Shelf("visual_similarity", seed, _class_of, portraits=True), len(CLASSES), q.CLASS_MATCH, items),
    "Semantic_Correspondence": _semantic_correspondence,
}  # fmt: skip
SUBTASKS = tuple(_MAKE)
