"""The sample types that every data set yields, real or generated.

A task sees only these, so that Pascal-5i and the pocket scenes run through the same code. Images are upright RGB
`PIL.Image`; masks are `(height, width)` integer arrays in the pixels of that image, with `VOID` where the
annotation says nothing; points are `(x, y)` in pixels of that image.

Fields marked `Opened()` are given as a value, or as a function without arguments that is called each time the field
is read: the pictures of a whole benchmark, decoded, fill the memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvutils.errors import DataError, ImageError
from kvutils.images import open_image


class Opened:
    """A dataclass field that holds a value or the function that opens it; see the module."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, instance: object, value: object) -> None:
        instance.__dict__[self.name] = value

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            raise AttributeError(self.name)  # tells dataclass that the field has no default
        value = instance.__dict__[self.name]
        try:
            return value() if callable(value) else value
        except (DataError, ImageError) as error:
            if instance.id in str(error):
                raise
            raise type(error)(f"{instance.id}: {error}") from error


class Pictures(Sequence):
    """Images in order, each opened when it is asked for. `len` opens none; a slice is `Pictures` again.

    >>> Pictures([lambda: Image.new("RGB", (4, 3))])[0].size
    (4, 3)
    """

    def __init__(self, openers: Sequence[Callable[[], Image.Image]]) -> None:
        self._openers = tuple(openers)

    def __len__(self) -> int:
        return len(self._openers)

    def __getitem__(self, index: int | slice) -> Any:
        return Pictures(self._openers[index]) if isinstance(index, slice) else self._openers[index]()


@dataclass(frozen=True)
class LabelledImage:
    """One image with a label map: 0 background, 1.. objects or classes, `VOID` unknown."""

    id: str
    image: Image.Image = Opened()
    mask: np.ndarray = Opened()

    def resized(self, size: tuple[int, int]) -> "LabelledImage":
        """The same, brought to (width, height) when it is asked for: image bicubic, mask nearest."""

        def mask() -> np.ndarray:
            return np.asarray(Image.fromarray(np.asarray(self.mask, np.uint8)).resize(size, Image.Resampling.NEAREST))

        return LabelledImage(self.id, lambda: self.image.resize(size, Image.Resampling.BICUBIC), mask)


@dataclass(frozen=True)
class DomainImage(LabelledImage):
    """A labelled image of a known domain, in words: "night", "fog" (BDD-10K: time of day, scene, weather)."""

    domain: str


@dataclass(frozen=True)
class Episode:
    """Few-shot foreground segmentation (Pascal-5i): masks are 1 on the class, 0 elsewhere, `VOID` unknown."""

    id: str
    class_index: int
    class_name: str
    fold: int
    query: LabelledImage
    supports: tuple[LabelledImage, ...]


@dataclass(frozen=True)
class ImageGroup:
    """Images that share one object class (co-segmentation, MSRC); masks are 1 on that class."""

    id: str
    class_name: str
    images: tuple[LabelledImage, ...]


@dataclass(frozen=True)
class NamedMask:
    """An image, a text and the pixels it names: a class name (ImageNet-S) or a referring expression (RefCOCO).

    `group` is the unit of resampling when several samples come from one image. `shown`: all classes that the image is known to show."""

    id: str
    image_id: str
    image: Image.Image = Opened()
    text: str
    mask: np.ndarray = Opened()
    group: str
    class_name: str = ""
    shown: frozenset[str] = frozenset()


@dataclass(frozen=True)
class KeypointPair:
    """Two images of one class with corresponding key points (SPair-71k).

    `source_points` and `target_points` are (K, 2) x, y and correspond row by row; points that are not visible in
    both images are left out by the data set. `target_box` is x0, y0, x1, y1."""

    id: str
    category: str
    source_id: str
    source: Image.Image = Opened()
    source_points: np.ndarray
    target_id: str
    target: Image.Image = Opened()
    target_points: np.ndarray
    target_box: np.ndarray


@dataclass(frozen=True)
class Clip:
    """A video with tracked objects (DAVIS-2017): masks (frames, height, width), object ids from 1, `VOID` unknown."""

    id: str
    frames: Sequence[Image.Image] = Opened()
    masks: np.ndarray = Opened()


@dataclass(frozen=True)
class Question:
    """A question about one or more images with a short answer.

    `kind` names the question type (existence, colour, ...); `options` are the possible answers when there is a
    fixed set; `group` is the scene: questions about one scene are not independent and are resampled together."""

    id: str
    kind: str
    images: tuple[Image.Image, ...] = Opened()
    text: str
    answer: str
    options: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class MultipleChoice:
    """A multiple-choice item with BLINK's fields: 2 to 4 images in prompt order, `prompt` as it is asked.

    answer: "(A)", "(B)", ... `options` are the answers as the prompt spells them, one per choice: BLINK's "(A)" or the pocket models'
    "(a)". reference_point (x, y) in pixels of the first image and candidate_points (K, 2) of the second, one per choice, are None where
    there are none or where they are only painted in the pictures, as in BLINK itself. `group` is the unit of resampling."""

    id: str
    subtask: str
    images: Sequence[Image.Image] = Opened()
    question: str
    choices: tuple[str, ...]
    answer: str
    prompt: str
    options: tuple[str, ...]
    group: str
    reference_point: np.ndarray | None = None
    candidate_points: np.ndarray | None = None


@dataclass(frozen=True)
class YesNoSample:
    """A question about one image, to be answered yes or no (POPE, MME).

    `subset` is the split of POPE or the subtask of MME; `truth` is "yes" or "no". `image_id` is the unit of
    resampling. The questions of one image, in all subsets, share `picture`: an image, the file that holds it or a
    function that opens it (the images of a whole benchmark, decoded, fill the memory), for `image`. size: (width,
    height) to which `image` is resized, whatever its proportions; None leaves it as it is."""

    id: str
    image_id: str
    picture: Image.Image | Path | Callable[[], Image.Image]
    question: str
    truth: str
    subset: str
    size: tuple[int, int] | None = None

    @property
    def image(self) -> Image.Image:
        """The upright RGB image; a file is opened anew each time. Raises ImageError."""
        image = open_image(self.picture() if callable(self.picture) else self.picture, self.image_id)
        return image if self.size is None else image.resize(self.size, Image.Resampling.BICUBIC)
