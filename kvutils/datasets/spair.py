"""SPair-71k in its official layout: pairs of photographs of one class with corresponding key points.

    Layout/{large,small}/{trn,val,test}.txt            one pair per line: 000006-2008_002719-2008_007604:aeroplane
    PairAnnotation/test/000006-2008_002719-2008_007604:aeroplane.json ...      key points (x, y), boxes, image sizes
    JPEGImages/aeroplane/2008_002719.jpg ...

File systems of Windows allow no ":" in a name. Where an unzipper wrote "_" or "%3A" instead, that file is taken.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from kvutils.datasets.catalog import missing_data
from kvutils.datasets.samples import KeypointPair
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "train", "tvmonitor",
)  # fmt: skip
SPLITS, LAYOUTS = ("trn", "val", "test"), ("large", "small")
_COLONS = (":", "_", "%3A")  # the colon of a file name, and what unzippers make of it


def spair_pairs(
    root: str | Path,
    split: str = "test",
    layout: str = "large",
    categories: Sequence[str] | None = None,
    per_category: int | None = None,
    max_pairs: int | None = None,
    progress: bool = True,
) -> list[KeypointPair]:
    """The pairs of a split in the order of its list; the default is the benchmark's, all 12,234 of large/test.

    root: the folder SPair-71k or the one that holds it. categories: only these. per_category: so many pairs of each,
    spread evenly over its part of the list, whose neighbours share their source image (SD-DINO scores 20 drawn at
    random unless told otherwise). max_pairs keeps the first. progress: a bar where reading the annotations takes
    seconds. Raises ParameterError for options that do not exist and DataError for missing and malformed files.
    """
    wanted = _check(split, layout, categories, per_category, max_pairs)
    home = next((place for place in (Path(root) / "SPair-71k", Path(root)) if (place / "Layout").is_dir()), None)
    if home is None:
        raise missing_data("spair-71k", f"there is no {Path(root) / 'SPair-71k' / 'Layout'}")
    pairs = [pair for pair in read_layout(home / "Layout" / layout / f"{split}.txt") if pair[1] in wanted]
    if per_category is not None:
        pairs = _spread(pairs, per_category)
    pairs = pairs[:max_pairs]
    if not pairs:
        raise DataError(f"{home}: no pair of {', '.join(wanted)} in {layout}/{split}.txt")
    files = _annotation_files(home / "PairAnnotation" / split, [name for name, _ in pairs])
    bar = tqdm(zip(pairs, files, strict=True), "SPair-71k", len(pairs), unit="pair", delay=3, disable=not progress)
    found = [_read_pair(home, name, category, file) for (name, category), file in bar]
    _check_images(home, found)
    return [pair for pair, _ in found]


def _check(split, layout, categories, per_category, max_pairs) -> tuple[str, ...]:
    for name, value, known in (("split", split, SPLITS), ("layout", layout, LAYOUTS)):
        if value not in known:
            raise ParameterError(f"SPair-71k has no {name} {value!r}: expected one of {', '.join(known)}")
    for name, value in (("per_category", per_category), ("max_pairs", max_pairs)):
        if value is not None and value < 1:
            raise ParameterError(f"{name} must be at least 1, not {value}")
    wanted = (categories,) if isinstance(categories, str) else CATEGORIES if categories is None else tuple(categories)
    unknown = [name for name in wanted if name not in CATEGORIES]
    if unknown or not wanted:
        raise ParameterError(f"SPair-71k has no category {', '.join(map(repr, unknown)) or '()'}: expected some of "
                             f"{', '.join(CATEGORIES)}")  # fmt: skip
    return wanted


def read_layout(path: Path) -> list[tuple[str, str]]:
    """(name of the pair, category) of each line of a list. Raises DataError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise missing_data("spair-71k", f"there is no {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found, seen = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = line.strip().removesuffix(".json")
        images, _, category = name.partition(":")
        if category not in CATEGORIES or len(images.split("-")) != 3 or Path(name).name != name:
            form = "<number>-<source>-<target>:<category>"
            raise DataError(f"{path}, line {number}: expected '{form}', found {line!r}")
        if name in seen:
            raise DataError(f"{path}, line {number}: the pair {name} is listed twice")
        seen.add(name)
        found.append((name, category))
    return found


def _spread(pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    by_category: dict[str, list[int]] = {}
    for index, (_, category) in enumerate(pairs):
        by_category.setdefault(category, []).append(index)
    kept = set()
    for mine in by_category.values():
        kept |= {mine[i * len(mine) // count] for i in range(count)} if len(mine) > count else set(mine)
    return [pair for index, pair in enumerate(pairs) if index in kept]


def _annotation_files(folder: Path, names: list[str]) -> list[Path]:
    """The annotation of every pair; one listing of the folder instead of thousands of looks."""
    here = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    spelled = [[f"{name.replace(':', mark)}.json" for mark in _COLONS] for name in names]
    files = [next((file for file in ways if file in here), None) for ways in spelled]
    missing = [ways[0] for ways, file in zip(spelled, files, strict=True) if file is None]
    if missing:
        raise missing_data("spair-71k", f"{len(missing)} of {len(names)} annotations are missing in {folder} (first: "
                                        f"{missing[0]}, or with _ or %3A for the colon)")  # fmt: skip
    return [folder / file for file in files if file is not None]


def _check_images(home: Path, found: list[tuple[KeypointPair, tuple[Path, Path]]]) -> None:
    names = list(dict.fromkeys(path for _, paths in found for path in paths))
    missing = [path for path in names if not path.is_file()]
    if missing:
        raise missing_data("spair-71k", f"{len(missing)} of {len(names)} images are missing in {home} (first: "
                                        f"{missing[0].relative_to(home)})")  # fmt: skip


def _read_pair(home: Path, name: str, category: str, file: Path) -> tuple[KeypointPair, tuple[Path, Path]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["category"] != category:
            raise ValueError(f"its category is {content['category']!r}")
        points = [_numbers(content[key], (-1, 2), key) for key in ("src_kps", "trg_kps")]
        if len(points[0]) != len(points[1]):
            raise ValueError(f"{len(points[0])} source and {len(points[1])} target points do not correspond")
        box = _numbers(content["trg_bndbox"], (4,), "trg_bndbox")
        sides = []
        for side, listed in zip(("src", "trg"), name.partition(":")[0].split("-")[1:], strict=True):
            image = content[f"{side}_imname"]
            if Path(image).stem != listed or Path(image).name != image:
                raise ValueError(f"{side}_imname is {image!r}, expected {listed}.jpg")
            width, height = (int(number) for number in content[f"{side}_imsize"][:2])
            sides.append((home / "JPEGImages" / category / image, (width, height)))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: not the annotation of the pair {name} ({error!r})") from error
    (source, source_size), (target, target_size) = sides
    pair = KeypointPair(
        id=name,
        category=category,
        source_id=source.stem,
        source=partial(_picture, source, source_size),
        source_points=points[0],
        target_id=target.stem,
        target=partial(_picture, target, target_size),
        target_points=points[1],
        target_box=box,
    )
    return pair, (source, target)


def _numbers(value: object, shape: tuple[int, ...], key: str) -> np.ndarray:
    found = np.asarray(value, dtype=float)
    if found.size % shape[-1] or found.ndim != len(shape) or not np.isfinite(found).all():
        raise ValueError(f"{key} must be finite numbers of shape {shape}, found {value!r}")
    return found.reshape(shape)


def _picture(path: Path, size: tuple[int, int]) -> Image.Image:
    image = open_image(path)
    if image.size != size:
        raise DataError(f"{path} is {image.width}x{image.height}, but its annotation {size[0]}x{size[1]}: are these "
                        "the images of SPair-71k, unscaled?")  # fmt: skip
    return image
