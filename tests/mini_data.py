"""Every data set of the paper profile in its official layout, a few pictures each, drawn in the pocket world.

`write_data(folder)` makes `KVUTILS_DATA`: real class names, file names, colour codes, void labels, lists and sizes that
differ from picture to picture. Everything follows from a seed. Only what a loader insists on has the official count:
options as in `OPTIONS` say how much of it is there.
"""

import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from kvutils.datasets import imagenet_s, msrc
from kvutils.datasets.blink import READABLE
from kvutils.datasets.coco import POPE_IMAGES
from kvutils.datasets.mme import SUBTASKS
from kvutils.datasets.pocket.choices import pocket_blink
from kvutils.datasets.pocket.sets import PocketScene, pocket_scene
from kvutils.datasets.pocket.shapes import CLASSES, SILHOUETTES, place
from kvutils.datasets.pocket.world import COLOURS, PRESENT, SIZE, render, sample_clip
from kvutils.datasets.pope import SPLITS

IN_A_WORD = "\nAnswer the question using a single word or phrase."  # as lmms-eval asks
SAMPLES = Path(os.environ.get("KVUTILS_SAMPLES", ""))  # real records of the data sets, where there are some
needs_samples = pytest.mark.skipif("KVUTILS_SAMPLES" not in os.environ, reason="KVUTILS_SAMPLES names no folder with samples")
SEED = 77_000  # scenes of no pocket set
VOID = 255
SIZES = ((128, 96), (96, 128), (150, 100), (112, 112), (125, 94), (84, 126))  # width, height; as mixed as flickr's
OPTIONS = {"imagenet-s": {"max_images": 16}, "coco": {"count": 100}}  # what of these sets is written
FEW = {"pascal-5i": {"per_fold": 1}, "msrc": {"images": 3}, "imagenet-s": {"max_images": 4}, "coco": {"count": 3}}  # to read


class View:
    """A scene as a photograph of another size: `image`, `things` (H, W) with thing index + 1, points and polygons."""

    def __init__(self, scene: PocketScene, size: tuple[int, int]):
        self.scene, self.size = scene, size
        self.image = scene.image.resize(size, Image.Resampling.BICUBIC)
        self.things = np.asarray(Image.fromarray(scene.drawn.mask).resize(size, Image.Resampling.NEAREST))
        self.scale = np.array(size) / SIZE

    def classes(self, label: Callable[[int], int], unsure: int = VOID) -> np.ndarray:
        """(H, W) int32: label(class) of the clearly visible things, `unsure` on the others, 0 elsewhere."""
        drawn = self.scene
        values = [label(t.cls) if v >= PRESENT else unsure for t, v in zip(drawn.scene.things, drawn.drawn.visible, strict=True)]
        return np.array([0, *values])[self.things]

    def polygons(self, index: int) -> list[list[float]]:
        """The outline of a thing as COCO has it, in whole pixels of the picture."""
        thing = self.scene.scene.things[index]
        parts = [place(part, thing.x, thing.y, thing.radius, thing.angle, thing.flip) for part in SILHOUETTES[CLASSES[thing.cls]]]
        limit = np.array(self.size) - 1.0
        return [np.clip(part * self.scale, 0, limit).round(2).ravel().tolist() for part in parts]


def views(stream: str, count: int, seed: int, sizes=SIZES, kind: str = "mixed", wanted: Callable = lambda scene: scene.present) -> list[View]:
    """The first `count` scenes of a stream that are `wanted`, in sizes that take turns."""
    found: list[View] = []
    index = 0
    while len(found) < count:
        scene = pocket_scene(stream, index, SEED + seed, kind)
        if wanted(scene):
            found.append(View(scene, sizes[len(found) % len(sizes)]))
        index += 1
    return found


def shows(cls: int) -> Callable[[PocketScene], bool]:
    return lambda scene: cls in scene.present_classes


def save(image: Image.Image | np.ndarray, path: Path, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
    if palette:
        picture.putpalette([v for i in range(256) for v in (i * 37 % 256, i * 59 % 256, i * 83 % 256)])  # not the labels
    picture.save(path)


def contents(found: object) -> object:
    """Samples with every picture and mask read, to be compared; where a picture lies is not part of them."""
    if dataclasses.is_dataclass(found):
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "picture"}
        return [contents(value) for value in (*fields.values(), getattr(found, "image", None))]
    if isinstance(found, Image.Image | np.ndarray):
        return (found.size if isinstance(found, Image.Image) else found.shape), found.tobytes()
    return [contents(one) for one in found] if hasattr(found, "__len__") and not isinstance(found, str) else found


def write(path: Path, text: str | list | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def photograph(image: Image.Image) -> bytes:
    """The picture as a JPEG file."""
    image.save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def with_orientation(jpeg: bytes, turned: int) -> bytes:
    """The same JPEG file with an EXIF orientation, its pixels as they are."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    body = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    return jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


def as_shown(array: np.ndarray | Image.Image, turned: int) -> np.ndarray:
    """By Pillow: the array of a picture with this orientation, upright."""
    image = Image.fromarray(np.asarray(array))
    image.getexif()[ExifTags.Base.Orientation] = turned
    return np.asarray(ImageOps.exif_transpose(image))


def write_rows(path: Path, rows: list[dict], images=("image",)) -> None:
    """A Parquet file as on the hub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for column in images:
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(path)


def rim(labels: np.ndarray) -> np.ndarray:
    """Void where the label changes, as the annotators' borders in VOC."""
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    return np.where(edge, VOID, labels)


def rle_encode(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a binary mask, column by column; the first run is of zeros."""
    flat = mask.ravel(order="F").astype(np.int8)
    return np.diff([0, *(np.flatnonzero(np.diff([0, *flat]))), flat.size]).tolist()


VOC = (12, 3, 7, 4, 16, 11, 5, 20)  # VOC's number (from 1) of each pocket class: every fold has some of its five


def write_pascal(root: Path, seed: int, images: int = 24) -> None:
    lines: dict[int, list[str]] = {fold: [] for fold in range(4)}
    for i, view in enumerate(views("episodes", images, seed)):
        name = f"2007_{i:06d}"
        labels = rim(view.classes(lambda cls: VOC[cls]))
        save(view.image, root / "VOC2012" / "JPEGImages" / f"{name}.jpg")
        save(labels, root / "VOC2012" / "SegmentationClass" / f"{name}.png", palette=True)
        for number in np.unique(labels[(labels > 0) & (labels < VOID)]).tolist():
            lines[(number - 1) // 5].append(f"{name}__{number:02d}")
    for fold, mine in lines.items():
        numbers = [line[-2:] for line in mine]
        mine = [line for line in mine if numbers.count(line[-2:]) > 1]  # a support must differ from the query
        write(root / "splits" / "pascal" / "val" / f"fold{fold}.txt", "\n".join(mine) + "\n")


MSRC = ("sheep", "bird", "car", "plane", "cow", "house", "cat", "dog")  # of each pocket class; "house" is none of MSRC7


def write_msrc(root: Path, seed: int, images: int = 10) -> None:
    home = root / "MSRC_ObjCategImageDatabase_v2"
    colours = np.array([msrc.COLOURS[{"house": "building"}.get(name, name)] for name in MSRC])
    for number, name in enumerate(msrc.MSRC7, start=2):
        wanted = shows(MSRC.index(name))
        for i, view in enumerate(views("groups", images, seed + number, [(128, 85), (85, 128)], wanted=wanted), start=1):
            labels = view.classes(lambda cls: cls + 1, unsure=len(MSRC) + 1)
            truth = np.concatenate([[msrc.COLOURS["grass"]], colours, [(0, 0, 0)]])[labels]
            truth[:3] = 0  # never labelled
            save(view.image, home / "Images" / f"{number}_{i}_s.bmp")
            save(truth, home / "GroundTruth" / f"{number}_{i}_s_GT.bmp")


def write_imagenet_s(root: Path, seed: int, images: int = OPTIONS["imagenet-s"]["max_images"]) -> None:
    classes = 50
    wnids = [f"n{1_000_000 + 977 * i:08d}" for i in range(classes)]
    names = [" ".join([*([COLOURS[i // 8]] if i >= 8 else []), CLASSES[i % 8]]) for i in range(classes)]
    data, home = root / "data", root / "ImageNetS50"
    write(data / "categories" / "ImageNetS_categories_im50.txt", "\n".join(wnids))
    write(data / "data.py", f"import torch\n\nclass Dataset:\n    def __init__(self):\n        self.classes_50 = {', '.join(names)!r}\n")
    total = imagenet_s.VARIANTS[classes]
    of_class = [total // classes + (i < total % classes) for i in range(classes)]
    listed = [f"{wnids[c]}/ILSVRC2012_val_{100 * c + i:08d}" for c in range(classes) for i in range(of_class[c])]
    write(data / "names" / "ImageNetS_im50_validation.txt", "".join(f"{name}.JPEG {name}.png\n" for name in listed))
    training = [f"{wnid}/{wnid}_{i}" for wnid in wnids for i in range(10)]
    write(data / "names" / "ImageNetSemi_im50_train.txt", "".join(f"{name}.JPEG\n" for name in training))
    turns = sorted(listed, key=lambda name: int(name[-8:]) % 100)[:images]  # the first of every class, then the second
    for split, chosen in (("validation", turns), ("train-semi", training[::10])):
        for i, name in enumerate(chosen):
            own = wnids.index(name.split("/")[0])
            (view,) = views("named", 1, seed + 100 * i + len(split), [SIZES[i % len(SIZES)]], wanted=shows(own % 8))
            labels = rim(view.classes(lambda cls, own=own: own + 1 if cls == own % 8 else cls + 1))
            labels = np.where(labels == VOID, imagenet_s.IGNORED, labels)
            save(view.image, home / split / f"{name}.JPEG")
            save(np.stack([labels % 256, labels // 256, 0 * labels], -1), home / f"{split}-segmentation" / f"{name}.png")


def write_davis(root: Path, seed: int, clips: int = 4, frames: int = 5) -> None:
    home, names = root / "DAVIS", [f"clip-{i}" for i in range(clips)]
    write(home / "ImageSets" / "2017" / "val.txt", "\n".join(names) + "\n")
    for i, name in enumerate(names):
        for number, scene in enumerate(sample_clip(np.random.default_rng((SEED, seed, i)), frames)):
            view = View(PocketScene(name, scene, render(scene)), (142, 80) if i % 2 == 0 else (96, 80))
            labels = view.things.copy()
            labels[:2] = VOID
            save(view.image, home / "JPEGImages" / "480p" / name / f"{number:05d}.jpg")
            save(labels, home / "Annotations" / "480p" / name / f"{number:05d}.png", palette=True)


BDD = (11, 7, 13, 12, 8, 2, 5, 6)  # of each pocket class: person, sign, car, rider, vegetation, building, pole, light ...


def write_bdd(root: Path, seed: int, images: int = 40) -> None:
    home, entries = root / "bdd100k", []
    for i, view in enumerate(views("domains", images, seed, [(160, 90)])):
        split, name = ("val" if i % 5 == 0 else "train"), f"{i // 2:08x}-{i:08x}"  # two of each recording
        labels = view.classes(lambda cls: BDD[cls])
        labels[(view.things == 0) & (np.arange(90)[:, None] < 45)] = 10  # the upper half: sky; the lower stays road (0)
        image = view.image if i // 2 % 2 else view.image.point(lambda value: value // 3)
        save(image, home / "images" / "10k" / split / f"{name}.jpg")
        save(labels, home / "labels" / "sem_seg" / "masks" / split / f"{name}.png")
        attributes = {"weather": "clear", "scene": "highway", "timeofday": "daytime" if i // 2 % 2 else "night"}
        if i % 10 != 9:  # some have none, as in the published labels
            entries.append({"name": f"{name}.jpg", "attributes": attributes, "labels": [{"id": "0", "category": "car"}]})
    write(home / "labels" / "det_20" / "det_train.json", entries)
    write(home / "labels" / "det_20" / "det_val.json", [])


def write_refcoco(root: Path, seed: int, images: int = 12) -> None:
    references, photos, annotations = [], [], []
    several = views("referring", images, seed, wanted=lambda scene: len(scene.present) > 1)
    for number, view in enumerate(several, start=1):
        name = f"COCO_train2014_{number:012d}.jpg"
        save(view.image, root / "images" / "mscoco" / "images" / "train2014" / name)
        photos.append({"id": number, "file_name": name, "width": view.size[0], "height": view.size[1]})
        for index in view.scene.present[:2]:
            thing, ref = view.scene.scene.things[index], len(references) + 1
            texts = [f"the {COLOURS[thing.colour]} {CLASSES[thing.cls]}", f"{CLASSES[thing.cls]} on the {'left' if thing.x < 48 else 'right'}"]
            sentences = [{"tokens": text.split(), "raw": text, "sent": text, "sent_id": 10 * ref + i} for i, text in enumerate(texts)]
            references.append({"ref_id": ref, "ann_id": 1000 + ref, "image_id": number, "category_id": 1 + thing.cls, "split": "val",
                               "file_name": f"COCO_train2014_{number:012d}_{ref}.jpg", "sentences": sentences,
                               "sent_ids": [one["sent_id"] for one in sentences]})  # fmt: skip
            annotations.append({"id": 1000 + ref, "image_id": number, "category_id": 1 + thing.cls, "iscrowd": 0,
                                "segmentation": view.polygons(index), "area": 1.0})  # fmt: skip
    categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(CLASSES, start=1)]
    write(root / "refcoco" / "instances.json", {"images": photos, "annotations": annotations, "categories": categories})
    for split_by in ("unc", "google"):
        (root / "refcoco" / f"refs({split_by}).p").write_bytes(pickle.dumps(references, protocol=0))


SPAIR = ("cat", "bird", "car", "boat", "pottedplant", "bus", "bottle", "tvmonitor")


def write_spair(root: Path, seed: int, pairs: int = 24) -> None:
    home, lines = root / "SPair-71k", []
    by_class: dict[int, list[tuple[str, View]]] = {}
    for i, view in enumerate(views("pairs", 3 * pairs, seed, kind="portrait")):
        by_class.setdefault(view.scene.scene.things[0].cls, []).append((f"2008_{i:06d}", view))
    while len(lines) < pairs:
        cls = max(by_class, key=lambda cls: len(by_class[cls]))
        (source, one), (target, two) = by_class[cls].pop(), by_class[cls].pop()
        both = np.flatnonzero(one.scene.drawn.keypoint_seen[0] & two.scene.drawn.keypoint_seen[0])
        name, about = f"{len(lines) + 1:06d}-{source}-{target}:{SPAIR[cls]}", {"category": SPAIR[cls], "kps_ids": both.astype(str).tolist()}
        for side, file, view in (("src", source, one), ("trg", target, two)):
            save(view.image, home / "JPEGImages" / SPAIR[cls] / f"{file}.jpg")
            box = (view.scene.thing_box(0).reshape(2, 2) * view.scale).ravel()
            about |= {f"{side}_imname": f"{file}.jpg", f"{side}_imsize": [*view.size, 3], f"{side}_bndbox": box.round().astype(int).tolist(),
                      f"{side}_kps": (view.scene.drawn.keypoints[0][both] * view.scale).astype(int).tolist()}  # fmt: skip
        write(home / "PairAnnotation" / "test" / f"{name}.json", about)
        lines.append(name)
    for layout in ("large", "small"):
        write(home / "Layout" / layout / "test.txt", "\n".join(lines) + "\n")


def write_coco(root: Path, seed: int, images: int = OPTIONS["coco"]["count"]) -> None:
    photos, objects = [], []
    numbers = [number for number in range(100, 100_000, 317) if number not in POPE_IMAGES]
    for number, view in zip(numbers, views("keys", images, seed, SIZES[:3], wanted=lambda scene: True), strict=False):
        save(view.image, root / "val2017" / f"{number:012d}.jpg")
        photos.append({"id": number, "file_name": f"{number:012d}.jpg", "width": view.size[0], "height": view.size[1]})
        for index in view.scene.present:
            crowd = index == 2
            shape = {"size": list(view.size[::-1]), "counts": rle_encode(view.things == index + 1)} if crowd else view.polygons(index)
            objects.append({"id": len(objects) + 1, "image_id": number, "category_id": 1, "iscrowd": int(crowd), "segmentation": shape})
    write(root / "annotations" / "instances_val2017.json", {"images": photos, "annotations": objects})


def write_pope(root: Path, seed: int, images: int = 8) -> None:
    lines: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for number, view in zip(sorted(POPE_IMAGES), views("pope", images, seed), strict=False):
        name, here = f"COCO_val2014_{number:012d}.jpg", view.scene.present_classes
        save(view.image, root / "val2014" / name)
        random = np.random.default_rng((SEED, seed, number))
        for mine in lines.values():
            absent = random.permutation([c for c in range(len(CLASSES)) if c not in here])[:3]
            for i in range(3):
                for cls, label in ((here[i % len(here)], "yes"), (absent[i], "no")):
                    text = f"Is there a {CLASSES[cls]} in the image?"
                    mine.append({"question_id": len(mine) + 1, "image": name, "text": text, "label": label})
    for split, mine in lines.items():
        write(root / "output" / "coco" / f"coco_pope_{split}.json", "".join(json.dumps(line) + "\n" for line in mine))


def write_mme(root: Path, seed: int, images: int = 3) -> None:
    home = root / "MME_Benchmark_release_version"
    for number, subtask in enumerate(SUBTASKS):
        nested, folder = subtask in ("artwork", "celebrity", "landmark", "posters", "scene"), home / subtask
        for i, view in enumerate(views("mme", images, seed + number)):
            there = view.scene.present_classes[0]
            absent = next(c for c in range(len(CLASSES)) if c not in view.scene.present_classes)
            asked = [(f"Is there a {CLASSES[cls]} in this image? Please answer yes or no.", answer)
                     for cls, answer in ((there, "Yes"), (absent, "No"))]  # fmt: skip
            save(view.image, folder / ("images" if nested else "") / f"{i:04d}.{('jpg', 'png', 'JPG')[i % 3]}")
            ending = ("\n", " \r\n")[i % 2]  # both are in the release
            write(folder / ("questions_answers_YN" if nested else "") / f"{i:04d}.txt", ending.join("\t".join(one) for one in asked))


def write_blink(root: Path, seed: int, items: int = 12) -> None:
    for subtask in READABLE:
        rows = []
        for i, item in enumerate(pocket_blink(items, subtask, SEED + seed)):
            pictures = [image.resize(SIZES[(i + j) % len(SIZES)], Image.Resampling.BICUBIC) for j, image in enumerate(item.images)]
            choices = [f"({letter}) {text}" for letter, text in zip("AB", item.choices, strict=True)]
            prompt = "\n".join([item.question, "Select from the following choices.", *choices])
            rows.append({"idx": f"val_{subtask}_{i + 1}", "question": item.question, "sub_task": subtask, "choices": list(item.choices),
                         "answer": item.answer, "prompt": prompt, "image_4": None}
                        | {f"image_{j}": picture for j, picture in enumerate(pictures, start=1)})  # fmt: skip
        write_rows(root / subtask / "val-00000-of-00001.parquet", rows, [f"image_{j}" for j in range(1, 5)])


WRITE = {
    "pascal-5i": write_pascal, "msrc": write_msrc, "imagenet-s": write_imagenet_s, "refcoco": write_refcoco,
    "spair-71k": write_spair, "davis-2017": write_davis, "coco": write_coco, "pope": write_pope, "mme": write_mme,
    "bdd-10k": write_bdd, "blink": write_blink,
}  # fmt: skip


def write_data(root: Path, names=tuple(WRITE), seed: int = 0, **sizes: int) -> Path:
    """Write the named sets below a folder; `sizes`, such as `pope=4`, say how many pictures, pairs, clips or items."""
    datasets.disable_progress_bars()
    for name in names:
        WRITE[name](Path(root) / name, seed, *([sizes[name]] if name in sizes else []))
    return Path(root)
