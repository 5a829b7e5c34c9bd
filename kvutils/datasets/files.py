"""What the loaders of official files share: the one place for "N of M files are missing", for lists and JSON (byte order marks,
blank lines and the companions that desktops leave are nothing), for content that cannot be read and options that do not exist."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from typing import Any

from kvutils.datasets.catalog import missing_data
from kvutils.errors import DataError, ParameterError, at_least, one_of
from kvutils.images import MALFORMED


@contextmanager
def reading(where: object, expected: str) -> Iterator[None]:
    """What malformed content raises becomes a DataError that says where it is and what was expected there."""
    try:
        yield
    except (DataError, *MALFORMED) as error:
        found = f"{type(error).__name__}: {error}"[:400]
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


def visible(paths: Iterable[Path]) -> list[Path]:
    """Sorted, without the companions of files that desktops leave, such as ._00000.jpg and .DS_Store."""
    return sorted(path for path in paths if not path.name.startswith("."))


def every(name: str, folder: Path, pattern: str, hint: str = "") -> list[Path]:
    """The files of a folder, by name. Raises DataError with how to get the data set where there is none."""
    found = visible(folder.glob(pattern))
    if not found:
        raise missing_data(name, f"{folder} holds no {pattern}{hint}")
    return found


def need(name: str, what: str, *choices: Iterable[Path], hint: str = "") -> list[Path]:
    """The first of several lists of files that is complete. Raises DataError about the one that lacks the fewest."""
    lacking: list[tuple[list[Path], int]] = []
    for files in map(list, choices):
        absent = [file for file in dict.fromkeys(files) if not isfile(file)]
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
