"""A folder of one's own pictures, with masks and named points where there are any, for the tasks of the paper.

    one.jpg, two.png, ...    the pictures (`FORMATS`); other files are left alone
    masks/one.png            grey or palette image with a class number in each pixel of its picture: 0 background, 255 unknown; where
                             all masks are black and white, white is class 1
    points.csv               image,name,x,y and below it a line for each named point, in pixels of the upright picture from its upper left
                             corner

A picture may lack a mask or points. What belongs to no picture, or does not fit it, is an error that names the file."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion
from tqdm import tqdm

from kvutils import VOID
from kvutils.datasets.files import expect, limits, read_text, visible
from kvutils.datasets.labels import Picture, class_mask, read_labels
from kvutils.datasets.samples import Episode, KeypointPair, LabelledImage, NamedMask, Opened
from kvutils.errors import one_of

FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SAMPLES = ("episodes", "training", "named", "pairs")
UNFAITHFUL = ("JPEG", "MPO", "JPEG2000", "GIF")  # formats in which a class number may become another
MOST_CLASSES = 40  # in one mask, and background; of more it is no drawing of classes
PARTNERS, PARTS = 5, 8  # of a picture, with which it is paired; groups of pictures that are paired among themselves


@dataclass(frozen=True)
class FolderPicture:
    """A picture by its file's name without the ending. mask (H, W) uint8 and the classes it shows, none where there is no mask;
    points: name -> (x, y); box (4,) x0, y0, x1, y1 around what the mask shows, of a picture without a mask its border."""

    id: str
    image: Image.Image = Opened()
    mask: np.ndarray = Opened()
    classes: tuple[int, ...]
    points: Mapping[str, tuple[float, float]]
    box: np.ndarray

    def labelled(self, number: int | None = None) -> LabelledImage:
        """With its mask, or that of one class: 1, 0 or `VOID`."""
        return LabelledImage(self.id, lambda: self.image, lambda: self.mask if number is None else class_mask(self.mask, number, VOID))


def folder_samples(root: str | Path, samples: str = "pictures", shot: int = 5, seed: int = 0, progress: bool = False) -> Sequence:
    """What tasks read of a folder as above: its pictures, by name, or what `samples_of` makes of them. Raises DataError."""
    one_of("samples of a folder", samples, ("pictures", *SAMPLES))
    limits(shot=shot)
    pictures = _read(Path(root), progress)
    return pictures if samples == "pictures" else samples_of(pictures, samples, shot, seed)


def samples_of(pictures: Sequence[FolderPicture], samples: str, shot: int = 5, seed: int = 0) -> list:
    """The samples of a task:

        "episodes"           `ForegroundSegmentation`: each class of each picture, and `shot` others that show it, drawn from the seed
        "training", "named"  `SemanticSegmentationProbe`: every other picture with a mask, to fit it on; the classes of those between
        "pairs"              `SemanticCorrespondence`: pictures with points of one name, each way. Pictures alike in their points are in
                             at most `PARTS` groups, each paired with its next `PARTNERS`, so that a layer can be chosen on others than
                             it is read on; PCK is of `FolderPicture.box`

    Raises DataError where there is none."""
    masked = [one for one in pictures if one.classes]
    by_class = sorted(masked, key=lambda one: (one.classes, one.id))
    if samples == "training":
        return [one.labelled() for one in by_class[::2]]
    if samples == "pairs":
        pointed = sorted((one for one in pictures if one.points), key=lambda one: (sorted(one.points), one.id))
        found, lacking = _pairs(pointed), f"points of one name, found {len(pointed)} with points; add lines to points.csv"
    elif samples == "episodes":
        found = [_episode(one, number, [other for other in masked if number in other.classes and other is not one], shot, seed)
                 for one in masked for number in one.classes]  # fmt: skip
        found = [one for one in found if one.supports]
    else:
        known = {number for one in by_class[::2] for number in one.classes}
        scored = [(name_of(number), one.labelled(number)) for one in by_class[1::2] for number in one.classes if number in known]
        found = [NamedMask(f"{one.id}, {name}", one.id, partial(getattr, one, "image"), name, partial(getattr, one, "mask"), one.id, name)
                 for name, one in scored]  # fmt: skip
    if samples != "pairs":
        lacking = f"masks that show one class, found {len(masked)} with a mask that shows anything; add masks/NAME.png for the picture NAME"
    expect(found, f"samples={samples!r} of a folder are made of two pictures with {lacking}")
    return found


def name_of(number: int) -> str:
    """What samples call the class of a number in masks."""
    return f"class {number}"


def _episode(query: FolderPicture, number: int, others: Sequence[FolderPicture], shot: int, seed: int) -> Episode:
    random = np.random.default_rng((seed, number, *query.id.encode()))
    supports = tuple(others[i].labelled(number) for i in sorted(random.permutation(len(others))[:shot]))
    return Episode(f"{query.id}, {name_of(number)}", number, name_of(number), 0, query.labelled(number), supports)


def _pairs(pictures: Sequence[FolderPicture]) -> list[KeypointPair]:
    found, count = [], max(1, min(PARTS, len(pictures) // 2))  # none of a single picture
    for number, some in enumerate(np.array_split(np.arange(len(pictures)), count)):
        group = [pictures[place] for place in some]
        steps = range(1, min(PARTNERS + 1, len(group)))
        for one, other in ((one, group[(i + step) % len(group)]) for i, one in enumerate(group) for step in steps):
            if names := sorted(one.points.keys() & other.points.keys()):
                points = [np.array([each.points[name] for name in names]) for each in (one, other)]
                found.append(KeypointPair(f"{one.id}-{other.id}", f"group {number}", one.id, partial(getattr, one, "image"), points[0],
                                          other.id, partial(getattr, other, "image"), points[1], other.box))  # fmt: skip
    return found


def _read(root: Path, progress: bool = False) -> list[FolderPicture]:
    """Every picture with what there is of it, by name. All is opened once: what is damaged shows before anything is measured."""
    expect(root.is_dir(), f"{root}: expected a folder of pictures, found {'a file' if root.exists() else 'nothing'}")
    files: dict[str, Path] = {}
    for path in (root, *root.iterdir()):
        expect("\\udc" not in ascii(str(path)), f"{ascii(str(path))}: its name is no UTF-8, which results are written in; rename it")
    for path in visible(path for path in root.iterdir() if path.suffix.lower() in FORMATS):
        expect(path.stem not in files, f"{path}: {files.get(path.stem)} has the same name; rename one of the two")
        files[path.stem] = path
    expect(files, f"{root} holds no picture ({', '.join(FORMATS)}); name the folder in which the pictures themselves are, or convert them")
    masks = {path.stem: path for path in visible((root / "masks").glob("*.*"))}
    for path in visible((root / "masks").glob("*.*")):
        name = path.stem
        expect(masks[name] == path, f"{path}: {masks[name]} has the same name; remove one of the two")
        expect(name in files, f"{path}: {root} has no picture {name}; name the mask as its picture, or remove it")
    pictures, sizes, shown, boxes = {name: Picture(path) for name, path in files.items()}, {}, {}, {}
    for name, picture in tqdm(pictures.items(), f"reading {root.name}", unit="picture", delay=3, disable=not progress):
        sizes[name] = picture().size
        labels = _labels(masks[name], picture) if name in masks else np.zeros((1, 1), np.uint8)
        shown[name] = np.unique(labels)
        boxes[name] = np.array([Image.fromarray(seen).getbbox() or (0, 0, *sizes[name]) for seen in (labels % VOID > 0, labels > 0)], float)
    white = all(np.isin(values, (0, VOID)).all() for values in shown.values())  # no class number: a drawing in black and white
    points = _points(root / "points.csv", files, sizes)

    def mask(name: str) -> np.ndarray:
        expect(name in masks, f"{root} has no mask of {name}")
        labels = _labels(masks[name], pictures[name])
        return (labels > 0).astype(np.uint8) if white else labels

    def classes(name: str) -> tuple[int, ...]:
        return tuple(1 if white else int(value) for value in shown[name] if value and (white or value != VOID))

    return [FolderPicture(name, picture, partial(mask, name), classes(name), points.get(name, {}), boxes[name][int(white)])
            for name, picture in pictures.items()]  # fmt: skip


def _labels(path: Path, picture: Picture) -> np.ndarray:
    labels = read_labels(path, picture, ("1", "L", "P"), "class numbers in one channel (a grey or palette image)")
    labels = (labels * VOID if labels.dtype == bool else labels).astype(np.uint8)  # of one bit or of eight, white is white
    with Image.open(path) as image:
        turn, kind = picture.turn(image.size), image.format
    expect(kind not in UNFAITHFUL, f"{path}: {kind} changes class numbers; save masks as PNG, BMP or TIFF")
    expect(turn.orientation == 1 or turn.size != picture().size, f"{path}: EXIF turns its picture, which keeps its size, so that nothing tells "
                                                                 "whether the mask is turned as well; save the picture upright")  # fmt: skip
    white, grey, shown = labels == VOID, (labels > 0) & (labels < VOID), len(np.unique(labels))
    thick = [binary_erosion(seen, np.ones((3, 3))).any() for seen in (white, grey)]  # soft edges of white are thin
    soft = shown > MOST_CLASSES or thick[0] and grey.any() and not thick[1]
    expect(not soft, f"{path}: expected class numbers, found {shown} values, as the soft edges of a drawing make; save it as PNG without "
                     "smoothing, 0 and the number of a class alone (or 255)")  # fmt: skip
    return labels


def _points(path: Path, files: Mapping[str, Path], sizes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, tuple[float, float]]]:
    """{picture: {name of a point: (x, y)}} of points.csv; {} where there is none."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    lines = csv.DictReader(read_text(path).splitlines() if path.is_file() else [])
    for line in lines:
        where, texts = f"{path}, line {lines.line_num}", [(line.get(name) or "").strip() for name in ("image", "name", "x", "y")]
        image, name = {files[stem].name: stem for stem in files}.get(texts[0], texts[0]), texts[1]
        expect(all(texts), f"{where}: expected image,name,x,y as the first line says, separated by commas, found {', '.join(filter(None, texts))!r}")
        expect(image in files, f"{where}: there is no picture {texts[0]!r}; expected a file's name, such as {next(iter(files.values())).name}")
        expect(name not in found.setdefault(image, {}), f"{where}: {image} has a point {name!r} already; give each its own name")
        width, height = sizes[image]
        try:
            x, y = map(float, texts[2:])
        except ValueError:
            x = y = np.nan
        expect(0 <= x <= width and 0 <= y <= height, f"{where}: expected x,y in the {width}x{height} pixels of {image}, found {','.join(texts[2:])}")
        found[image][name] = x, y
    return found
