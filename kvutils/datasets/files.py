"""What the loaders of official files share: the one place for "N of M files are missing", for text that cannot be read, for
options that do not exist, and for label images (exact values, over the pixels of the picture that `open_image` shows)."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.errors import DataError, ParameterError, at_least, one_of


@contextmanager
def reading(where: object, expected: str) -> Iterator[None]:
    """What malformed content raises becomes a DataError that says where it is and what was expected there."""
    try:
        yield
    except (DataError, OSError, SyntaxError, AttributeError, LookupError, TypeError, ValueError) as error:  # Pillow raises most of them
        found = f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: expected {expected}, but it cannot be read ({found}); is it complete?") from error


def expect(holds: object, message: str) -> None:
    """DataError with the message unless it holds."""
    if not holds:
        raise DataError(message)


def limits(**counts: int | None) -> None:
    """ParameterError unless each option is None (no limit) or a whole number of at least 1."""
    for name, count in counts.items():
        if count is not None:
            at_least(name, count)


def some_of(what: str, asked: str | Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Those of `known` that are asked for, one or several, each once. ParameterError for an unknown one and for none."""
    named = tuple(dict.fromkeys([asked] if isinstance(asked, str) else asked))
    if not named:
        raise ParameterError(f"no {what} is named; expected some of {', '.join(known)}")
    for one in named:
        one_of(what, one, known)
    return named


def find(name: str, *places: Path, hint: str = "") -> Path:
    """The first of the places, files or folders, that is there. Raises DataError with how to get the data set `name`."""
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise missing_data(name, f"there is no {places[0]}{hint}")
    return found


def every(name: str, folder: Path, pattern: str, hint: str = "") -> list[Path]:
    """The files of a folder, by name. Raises DataError with how to get the data set where there is none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise missing_data(name, f"{folder} holds no {pattern}{hint}")
    return found


def need(name: str, what: str, *choices: Iterable[Path], hint: str = "") -> list[Path]:
    """The first of several lists of files that is complete. Raises DataError about the one that lacks the fewest."""
    lacking: list[tuple[list[Path], int]] = []
    for files in map(list, choices):
        absent = [file for file in dict.fromkeys(files) if not file.is_file()]
        if files and not absent:
            return files
        lacking.append((absent, len(set(files))))
    absent, total = min(lacking, key=lambda each: len(each[0]))
    first = f" (first: {absent[0]})" if absent else ""
    raise missing_data(name, f"{len(absent)} of the {total} {what} are missing{first}{hint}")


def coco_files(name: str, year: str, images: str | Path | None, places: Sequence[Path], names: Iterable[str]) -> dict[str, Path]:
    """The named images of COCO train2014 or val2014 (`year`) in the folder `images`, by default the first of the places."""
    names, places = list(dict.fromkeys(names)), places if images is None else [Path(images)]
    others = f" (nor {', '.join(map(str, places[1:]))})" if places[1:] else ""
    folder = find(name, *places, hint=f"{others}: the images are those of COCO {year}; images= names another folder")
    hint = "; images= names another folder, max_images= reads fewer"
    return dict(zip(names, need(name, f"images of COCO {year}", [folder / each for each in names], hint=hint), strict=True))


def read_text(path: Path) -> str:
    """UTF-8 text, without a byte order mark. Raises DataError."""
    with reading(path, "a text file"):
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path, kind: type = dict, **options: Any) -> Any:
    """Content of a JSON file whose outermost value is a `kind`. Raises DataError. options: those of `json.loads`."""
    text = read_text(path)
    with reading(path, "JSON"):
        found = json.loads(text, **options)
    expect(isinstance(found, kind), f"{path}: expected a {kind.__name__}, found a {type(found).__name__}")
    return found


def read_lines(path: Path) -> list[tuple[str, str]]:
    """("<path>, line <number>", content) of each line of a file that is not blank."""
    return [(f"{path}, line {i}", line) for i, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]


def read_labels(path: Path, picture: Path, modes: Sequence[str], expected: str, highest: int | None = None) -> np.ndarray:
    """(H, W) indices of a grey or palette image, or (H, W, 3) of an RGB one, in the upright pixels of `picture`.

    modes: the Pillow modes that the data set may have; expected says in the error what these are. Colours are never
    converted. highest: the indices are 0 to this one, and `VOID`. Raises DataError for a file that cannot be read, has
    another mode, another index, or does not fit its picture.
    """
    with reading(path, expected), Image.open(path) as image:
        mode, labels = image.mode, np.array(image)
    expect(mode in modes, f"{path}: expected {expected}, found a {mode!r} image; was the file converted?")
    if highest is not None:
        strange = [int(value) for value in np.flatnonzero(np.bincount(labels.ravel())) if highest < value != VOID]
        expect(not strange, f"{path}: expected {expected} 0..{highest} and {VOID} (void), found {strange[:1]}")
    return upright_labels(labels, picture, str(path))


def upright_labels(labels: np.ndarray, picture: Path, name: str) -> np.ndarray:
    """Labels over the stored pixels of a picture, turned as its EXIF orientation says; DataError if they do not fit.

    Data sets are annotated, and their own tools read them, without that turn. Labels of the turned size stay.
    """
    with reading(picture, f"the picture of {name}"), Image.open(picture) as image:
        (width, height), orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    if labels.shape[:2] == (height, width):
        stored = Image.fromarray(labels)
        stored.getexif()[ExifTags.Base.Orientation] = orientation
        return np.array(ImageOps.exif_transpose(stored))
    turned = orientation in (5, 6, 7, 8) and labels.shape[:2] == (width, height)
    expect(turned, f"{name}: expected {width}x{height} pixels as its picture {picture}, found {labels.shape[1]}x{labels.shape[0]}")
    return labels


def class_mask(labels: np.ndarray, wanted: int, void: int) -> np.ndarray:
    """(H, W) uint8: 1 where `labels` is `wanted`, `VOID` where it is `void`, 0 elsewhere."""
    return np.where(labels == void, VOID, labels == wanted).astype(np.uint8)


def annotated_picture(opener: Callable[[], Image.Image], size: tuple[int, int], name: str) -> Image.Image:
    """The picture, of the (width, height) that its annotation has. Raises DataError."""
    image = opener()
    annotated = f"{size[0]}x{size[1]}: is this the published image, unscaled?"
    expect(image.size == size, f"{name} is {image.width}x{image.height}, but its annotation {annotated}")
    return image
