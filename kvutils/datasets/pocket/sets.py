"""The pocket world as data sets: each function is the generated twin of one real data set, with the same sample types.

Everything follows from a seed. Scene `i` of a stream depends on (seed, stream, i) alone, so a larger set begins with the
smaller one; streams keep the sets disjoint, and the default seed keeps them apart from the scenes the pocket models were
trained on (the recipe draws those from seeds 1 and 2). `group` in every sample is its scene.

A thing counts as present from a visible share of `PRESENT` on. Below that it is ambiguous and its pixels are `VOID`."""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

from kvutils import VOID
from kvutils.datasets.files import limits
from kvutils.datasets.pascal5i import sample_episodes
from kvutils.datasets.pocket.questions import facts_of, referring_expression
from kvutils.datasets.pocket.shapes import CLASSES
from kvutils.datasets.pocket.world import DOMAINS, PRESENT, Rendered, Scene, Thing, render, sample_clip, sample_scene
from kvutils.datasets.samples import Clip, DomainImage, Episode, ImageGroup, KeypointPair, LabelledImage, NamedMask
from kvutils.errors import ParameterError, at_least, one_of

SEED = 20_000  # held out from the training seeds
FOLDS = 4
CLASSES_PER_FOLD = len(CLASSES) // FOLDS
CLASS_NAMES = CLASSES
_STREAMS = {"episodes": 1, "groups": 2, "named": 3, "training": 4, "referring": 5, "pairs": 6, "clips": 7,
            "pope": 8, "mme": 9, "keys": 10, "domains": 11, "domain-training": 12, "art_style": 13, "visual_similarity": 14,
            "correspondence": 15}  # fmt: skip
MAX_TRIES = 100  # scenes looked at per sample wanted, before a set is declared impossible


@dataclass(frozen=True)
class PocketScene:
    """A drawn scene. `id` names it in every sample made from it."""

    id: str
    scene: Scene
    drawn: Rendered

    @cached_property
    def image(self) -> Image.Image:
        return Image.fromarray(self.drawn.image)

    @property
    def present(self) -> list[int]:
        """Indices of the things that are clearly visible."""
        return [i for i, share in enumerate(self.drawn.visible) if share >= PRESENT]

    @property
    def present_classes(self) -> list[int]:
        return sorted({self.scene.things[i].cls for i in self.present})

    def class_mask(self, cls: int, ambiguous: int = VOID) -> np.ndarray:
        """(96, 96) uint8: 1 on the present things of a class, `ambiguous` on hardly visible ones, else 0."""
        return self._labels(lambda thing: int(thing.cls == cls), ambiguous)

    def class_map(self) -> np.ndarray:
        """(96, 96) uint8: class index + 1 of the present things, `VOID` on ambiguous ones, 0 background."""
        return self._labels(lambda thing: thing.cls + 1, VOID)

    def _labels(self, label: Callable[[Thing], int], ambiguous: int) -> np.ndarray:
        """label(thing) over the pixels of each thing; where that is not 0, `ambiguous` on hardly visible ones."""
        values = np.zeros(len(self.scene.things) + 1, np.uint8)
        for i, thing in enumerate(self.scene.things):
            values[i + 1] = label(thing) and (label(thing) if self.drawn.visible[i] >= PRESENT else ambiguous)
        return values[self.drawn.mask]

    def thing_box(self, index: int) -> np.ndarray:
        """(4,) x0, y0, x1, y1 around the visible pixels of a thing."""
        rows, columns = np.nonzero(self.drawn.mask == index + 1)
        return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=float)


def describe_scene(stream: str, index: int, seed: int = SEED, kind: str = "mixed") -> Scene:
    """What is in scene `index` of a stream, always the same; drawing it takes far longer."""
    return sample_scene(np.random.default_rng((seed, _STREAMS[stream], index)), kind)


@lru_cache(maxsize=4096)
def pocket_scene(stream: str, index: int, seed: int = SEED, kind: str = "mixed") -> PocketScene:
    """Scene `index` of a stream, drawn."""
    scene = describe_scene(stream, index, seed, kind)
    return PocketScene(f"{stream}-{seed}-{index:05d}", scene, render(scene))


def tries(found: Sized, wanted: int, what: str) -> Iterator[int]:
    """0, 1, ...: the scenes to look at until `wanted` of `what` are in `found`; a ParameterError instead of searching for ever."""
    for index in range(MAX_TRIES * wanted):
        if len(found) == wanted:
            return
        yield index
    if len(found) < wanted:
        raise ParameterError(f"{wanted} {what} were not found among {MAX_TRIES * wanted} scenes")


def few_shot_episodes(per_fold: int = 50, scenes: int = 240, shot: int = 5, seed: int = SEED) -> list[Episode]:
    """Twin of Pascal-5i: 4 folds of 2 classes, episodes drawn from `scenes` scenes exactly as HSNet draws them.

    The list of a fold holds every (scene, class of the fold) with a present thing; masks are 1 on all visible pixels of
    the class, however little of a thing shows (Pascal's masks know no minimum)."""
    limits(per_fold=per_fold, scenes=scenes, shot=shot)
    pool = {s.id: s for s in (pocket_scene("episodes", i, seed) for i in range(scenes))}
    episodes = []
    for fold in range(FOLDS):
        members = range(fold * CLASSES_PER_FOLD, (fold + 1) * CLASSES_PER_FOLD)
        entries = [(s.id, c) for s in pool.values() for c in s.present_classes if c in members]
        for i, (query, supports, cls) in enumerate(sample_episodes(entries, shot, per_fold, seed)):
            shown, *shots = (LabelledImage(name, pool[name].image, pool[name].class_mask(cls, ambiguous=1)) for name in (query, *supports))
            episodes.append(Episode(f"fold{fold}-{i:04d}", cls, CLASSES[cls], fold, shown, tuple(shots)))
    return episodes


def image_groups(per_class: int = 2, images: int = 8, seed: int = SEED) -> list[ImageGroup]:
    """Twin of MSRC: sets of `images` scenes that share a class. No scene is in two sets."""
    limits(per_class=per_class, images=images)
    sets: dict[int, list[list[PocketScene]]] = {c: [[] for _ in range(per_class)] for c in range(len(CLASSES))}
    taken: list[int] = []
    for index in tries(taken, len(CLASSES) * per_class * images, "scenes of all classes"):
        scene = pocket_scene("groups", index, seed)
        # The class that lacks most takes the scene, so that rare classes fill up.
        takers = [(sum(len(g) for g in sets[c]), c) for c in scene.present_classes]
        takers = [(filled, c) for filled, c in takers if filled < per_class * images]
        if takers:
            filled, cls = min(takers)
            sets[cls][filled // images].append(scene)
            taken.append(index)
    return [ImageGroup(f"{CLASSES[c]}-{number}", CLASSES[c], tuple(LabelledImage(s.id, s.image, s.class_mask(c)) for s in members))
            for c, groups in sets.items() for number, members in enumerate(groups)]  # fmt: skip


def named_masks(scenes: int = 100, seed: int = SEED) -> list[NamedMask]:
    """Twin of ImageNet-S: every class that is present in a scene, with its name and pixels."""
    at_least("scenes", scenes)
    samples = []
    for scene in (pocket_scene("named", i, seed) for i in range(scenes)):
        for cls in scene.present_classes:
            name, mask = CLASSES[cls], scene.class_mask(cls)
            samples.append(NamedMask(f"{scene.id}-{name}", scene.id, scene.image, name, mask, scene.id, name))
    return samples


def training_maps(scenes: int = 60, seed: int = SEED) -> list[LabelledImage]:
    """Labelled scenes to fit a class probe on: class index + 1; disjoint from `named_masks`."""
    at_least("scenes", scenes)
    return _labelled("training", scenes, seed)


def _labelled(stream: str, count: int, seed: int) -> list[LabelledImage]:
    return [LabelledImage(s.id, s.image, s.class_map()) for s in (pocket_scene(stream, i, seed) for i in range(count))]


def referring_masks(scenes: int = 60, seed: int = SEED) -> list[NamedMask]:
    """Twin of RefCOCO: scenes that show some class at least twice, and the shortest expression for each of its things.

    An expression names exactly one thing: by class, else colour and class, else left or right; things for which none of
    these is enough have no sample."""
    at_least("scenes", scenes)
    samples: list[NamedMask] = []
    used: list[int] = []
    for number in tries(used, scenes, "scenes with two things of a class"):
        scene = pocket_scene("referring", number, seed)
        if len(scene.present_classes) == len(scene.present):
            continue
        facts = facts_of(scene.scene, scene.drawn)
        for index in scene.present:
            if text := referring_expression(facts, index):
                mask = (scene.drawn.mask == index + 1).astype(np.uint8)
                name = CLASSES[scene.scene.things[index].cls]
                samples.append(NamedMask(f"{scene.id}-{index}", scene.id, scene.image, text, mask, scene.id, name))
        used.append(number)
    return samples


def keypoint_pairs(pairs: int = 160, seed: int = SEED, min_points: int = 2) -> list[KeypointPair]:
    """Twin of SPair-71k: two scenes with one large thing of the same class each. No scene is in two pairs."""
    limits(pairs=pairs, min_points=min_points)
    waiting: dict[int, PocketScene] = {}
    samples: list[KeypointPair] = []
    for index in tries(samples, pairs, "pairs of scenes"):
        scene = pocket_scene("pairs", index, seed, "portrait")
        cls = scene.scene.things[0].cls
        first = waiting.pop(cls, scene)
        both = first.drawn.keypoint_seen[0] & scene.drawn.keypoint_seen[0]
        if first is scene or both.sum() < min_points:
            waiting[cls] = scene
            continue
        source_points, target_points = (each.drawn.keypoints[0][both] for each in (first, scene))
        samples.append(KeypointPair(f"{first.id}-{scene.id}", CLASSES[cls], first.id, first.image, source_points, scene.id, scene.image,
                                    target_points, scene.thing_box(0)))  # fmt: skip
    return samples


def clips(count: int = 24, frames: int = 12, seed: int = SEED) -> list[Clip]:
    """Twin of DAVIS-2017: short videos of two or three moving things, all clearly visible at first."""
    at_least("count", count)
    at_least("frames", frames, 3)  # the first is given, the last not scored
    samples: list[Clip] = []
    for index in tries(samples, count, "clips with visible things"):
        scenes = sample_clip(np.random.default_rng((seed, _STREAMS["clips"], index)), frames)
        first = render(scenes[0])
        if first.visible.min() < PRESENT:
            continue
        drawn = [first, *(render(scene) for scene in scenes[1:])]
        samples.append(Clip(f"clips-{seed}-{index:05d}", tuple(Image.fromarray(d.image) for d in drawn), np.stack([d.mask for d in drawn])))
    return samples


def key_images(count: int = 1000, seed: int = SEED) -> list[LabelledImage]:
    """Twin of the COCO images over which the variance of image keys is taken: scenes as they come.

    Label maps as in `training_maps`: 0 is background. The real set may open its images when they are asked for."""
    at_least("count", count)
    return _labelled("keys", count, seed)


def domain_scenes(scenes: int = 160, stream: str = "domains", domains: Sequence[str] = ("night", "fog"),
                  seed: int = SEED) -> list[DomainImage]:  # fmt: skip
    """Twin of BDD-10K split by domain: labelled scenes of these lights only, label maps as in `training_maps`.

    stream "domain-training" gives scenes of the same kind to fit a probe on."""
    at_least("scenes", scenes)
    at_least("number of domains", len(domains))
    for name in domains:
        one_of("domain", name, DOMAINS)
    one_of("stream", stream, ("domains", "domain-training"))
    samples: list[DomainImage] = []
    for index in tries(samples, scenes, f"scenes with {' or '.join(domains)}"):
        name = DOMAINS[describe_scene(stream, index, seed).domain]
        if name in domains:
            scene = pocket_scene(stream, index, seed)
            samples.append(DomainImage(scene.id, scene.image, scene.class_map(), name))
    return samples
