"""SPair-71k in its official layout (data/catalog.yaml): pairs of photographs of one class with corresponding key points. A list
holds one pair per line, an annotation its key points (x, y), boxes and image sizes.

File systems of Windows allow no ":" in a name. Where an unzipper wrote "_" or "%3A" instead, that file is taken."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kvutils.datasets.files import expect, find, limits, need, read_json, read_lines, reading, some_of
from kvutils.datasets.labels import Picture, Turn
from kvutils.datasets.pascal5i import CLASS_NAMES
from kvutils.datasets.samples import KeypointPair
from kvutils.errors import one_of

CATEGORIES = tuple(name for name in CLASS_NAMES if name not in ("diningtable", "sofa"))  # those of VOC but two
SPLITS, LAYOUTS = ("trn", "val", "test"), ("large", "small")
_COLONS = (":", "_", "%3A")  # the colon of a file name, and what unzippers make of it


def spair_pairs(root: str | Path, split: str = "test", layout: str = "large", categories: Sequence[str] | None = None,
                per_category: int | None = None, max_pairs: int | None = None, progress: bool = True) -> list[KeypointPair]:  # fmt: skip
    """The pairs of a split in the order of its list; the default is the benchmark's, all 12,234 of large/test.

    root: the folder SPair-71k or the one that holds it. categories: only these. per_category: so many pairs of each,
    spread evenly over its part of the list, whose neighbours share their source image (SD-DINO scores 20 drawn at
    random unless told otherwise). max_pairs keeps the first. progress: a bar where reading the annotations takes
    seconds. Raises ParameterError for options that do not exist and DataError for missing and malformed files."""
    one_of("split of SPair-71k", split, SPLITS)
    one_of("layout of SPair-71k", layout, LAYOUTS)
    limits(per_category=per_category, max_pairs=max_pairs)
    wanted = CATEGORIES if categories is None else some_of("category of SPair-71k", categories, CATEGORIES)
    home = find("spair-71k", Path(root) / "SPair-71k" / "Layout", Path(root) / "Layout").parent
    pairs = [pair for pair in _read_layout(find("spair-71k", home / "Layout" / layout / f"{split}.txt")) if pair[1] in wanted]
    if per_category is not None:
        pairs = _spread(pairs, per_category)
    pairs = pairs[:max_pairs]
    expect(pairs, f"{home}: no pair of {', '.join(wanted)} in {layout}/{split}.txt")
    folder = home / "PairAnnotation" / split
    spelled = ([folder / f"{name.replace(':', mark)}.json" for name, _ in pairs] for mark in _COLONS)
    files = need("spair-71k", "annotations", *spelled, hint=" (or with _ or %3A for the colon)")
    bar = tqdm(zip(pairs, files, strict=True), "SPair-71k", len(pairs), unit="pair", delay=3, disable=not progress)
    pictures = {name: [Picture(home / "JPEGImages" / category / f"{one}.jpg") for one in _images(name)] for name, category in pairs}
    need("spair-71k", "images", [picture.source for both in pictures.values() for picture in both])
    turn = cache(Picture.turn)  # an image serves dozens of pairs: its header is read once
    return [_read_pair(name, category, file, pictures[name], turn) for (name, category), file in bar]


def _images(pair: str) -> list[str]:
    """Source and target of a pair by its name."""
    return pair.partition(":")[0].split("-")[1:]


def _read_layout(path: Path) -> list[tuple[str, str]]:
    """(name of the pair, category) of each line of a list. Raises DataError that names the line."""
    found: dict[str, str] = {}
    for where, line in read_lines(path):
        name = line.strip().removesuffix(".json")
        images, _, category = name.partition(":")
        fits = category in CATEGORIES and len(images.split("-")) == 3 and Path(name).name == name and name not in found
        expect(fits, f"{where}: expected '<number>-<source>-<target>:<category>', each once, found {line!r}")
        found[name] = category
    return list(found.items())


def _spread(pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    kept: set[tuple[str, str]] = set()
    for category in {category for _, category in pairs}:
        mine = [pair for pair in pairs if pair[1] == category]
        kept |= {mine[i * len(mine) // count] for i in range(count)}
    return [pair for pair in pairs if pair in kept]


def _read_pair(name: str, category: str, file: Path, pictures: Sequence[Picture], turn: Callable[..., Turn]) -> KeypointPair:
    content, named = read_json(file), _images(name)
    with reading(file, f"the annotation of the pair {name}"):
        expect(content["category"] == category, f"its category is {content['category']!r}")
        points = [_numbers(content[key], (-1, 2), key) for key in ("src_kps", "trg_kps")]
        expect(len(points[0]) == len(points[1]), f"{len(points[0])} source and {len(points[1])} target points do not correspond")
        box = _numbers(content["trg_bndbox"], (4,), "trg_bndbox")
        images = [content["src_imname"], content["trg_imname"]]
        expect(images == [f"{one}.jpg" for one in named], f"its images are {images}")
        sizes = [(int(content[key][0]), int(content[key][1])) for key in ("src_imsize", "trg_imsize")]
    source, target = (turn(picture, size, f"the annotations of {category}") for picture, size in zip(pictures, sizes, strict=True))
    return KeypointPair(name, category, named[0], pictures[0], source.points(points[0]), named[1], pictures[1],
                        target.points(points[1]), target.box(box))  # fmt: skip


def _numbers(value: object, shape: tuple[int, ...], key: str) -> np.ndarray:
    found = np.asarray(value, dtype=float)
    fits = found.ndim == len(shape) and found.size % shape[-1] == 0 and np.isfinite(found).all()
    expect(fits, f"{key} must be finite numbers of shape {shape}, found {value!r}")
    return found.reshape(shape)
