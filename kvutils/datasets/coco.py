"""COCO val2017: images as they come, with what is annotated as foreground, for statistics of the image keys.

    val2017/000000000139.jpg ...
    annotations/instances_val2017.json

or a Parquet copy of detection-datasets/coco on the Hugging Face hub (split val; columns image_id, image, width,
height, objects with bbox as x_min, y_min, x_max, y_max). That copy has boxes but no masks, and does not tell crowds
apart: its foreground is coarse, the inside of the boxes. The images are the same.

The 500 images of COCO val2014 that POPE asks about, by number: other measurements on COCO leave them out.

From the published lists (RUCAIBox/POPE, MIT licence, commit 3df3ba1b, output/coco). They are written down here
because a choice of COCO images must not depend on whether POPE happens to be on the disk. val2017 is a part of
val2014 with the same numbers.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvutils import VOID
from kvutils.datasets.catalog import missing_data
from kvutils.datasets.coco_masks import segmentation_mask
from kvutils.datasets.files import upright_labels
from kvutils.datasets.hub import HUB, holds_parquet, open_rows, picture_at, picture_of
from kvutils.datasets.samples import LabelledImage
from kvutils.errors import DataError, ParameterError
from kvutils.images import open_image

log = logging.getLogger(__name__)
IMAGES = 5000  # of val2017
_COLUMNS = ("image_id", "width", "height", "objects")


def coco_images(root: str | Path, count: int = 1000, annotated: bool = True) -> list[LabelledImage]:
    """`count` images with label maps: 1 any annotated object, `VOID` in crowds, 0 background.

    The paper takes 1,000 COCO images and does not say which. Here they are those of val2017 with the lowest numbers,
    without the images that POPE asks about (`POPE_IMAGES`), in the order of their numbers: a number says nothing of
    the content, a larger set begins with the smaller one, and disk and hub give the same images. annotated=False
    needs no annotations; masks are then `VOID` everywhere, and shares of foreground 0. From the hub (root="hub") the
    rows are streamed, 0.8 GB, and the chosen pictures are kept in memory, encoded. Raises ParameterError, and
    DataError for missing images or annotations before anything is opened.
    """
    if count < 1:
        raise ParameterError(f"count must be at least 1, not {count}")
    if str(root) == HUB:
        return _streamed(count, annotated)
    root = Path(root)
    folder = next((place for place in (root / "val2017", root / "images" / "val2017") if place.is_dir()), None)
    if folder is None:
        if holds_parquet(root):
            return _from_parquet(root, count, annotated)
        raise missing_data("coco", f"there is no folder {root / 'val2017'}")
    return _from_json(root, folder, count) if annotated else _unannotated(folder, count)


def _choose(numbers: Sequence[int], count: int, where: str) -> list[int]:
    """The lowest `count` numbers that are not POPE's."""
    chosen = sorted(set(numbers) - POPE_IMAGES)[:count]
    if len(chosen) < count:
        raise missing_data("coco", f"{count} images are wanted, and {where} has {len(chosen)} that POPE does not use")
    return chosen


# --- the official files -------------------------------------------------------------------------------------


def _from_json(root: Path, folder: Path, count: int) -> list[LabelledImage]:
    path = root / "annotations" / "instances_val2017.json"
    if not path.is_file():
        raise missing_data("coco", f"{path} is missing: it says where the objects are (annotated=False does without)")
    images, objects = _read_annotations(path)
    chosen = _choose(list(images), count, str(path))
    pictures = {number: folder / images[number]["file_name"] for number in chosen}
    lacking = [path.name for path in pictures.values() if not path.is_file()]
    if lacking:
        what = f"{len(lacking)} of the {count} images are missing in {folder}"
        raise missing_data("coco", f"{what} (first: {lacking[0]})")
    samples = []
    for number, picture in pictures.items():
        size = images[number]["height"], images[number]["width"]
        mask = partial(_draw, objects[number], *size, picture)
        samples.append(LabelledImage(f"{number:012d}", partial(open_image, picture), mask))
    return samples


def _read_annotations(path: Path) -> tuple[dict[int, dict], dict[int, list[dict]]]:
    """The records of the images by number, and the objects of each."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); is the file complete?") from error
    images: dict[int, dict] = {}
    objects: dict[int, list[dict]] = defaultdict(list)
    wanted = {"images": ("id", "file_name", "height", "width"), "annotations": ("id", "image_id", "segmentation")}
    for kind, keys in wanted.items():
        records = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise DataError(f"{path}: expected COCO's instances with a list {kind!r}, found {type(records).__name__}")
        for place, record in enumerate(records):
            absent = [key for key in keys if not isinstance(record, dict) or key not in record]
            if absent:
                raise DataError(f"{path}: {kind}[{place}] lacks {', '.join(absent)}")
            if kind == "images":
                images[int(record["id"])] = record
            else:
                objects[int(record["image_id"])].append(record)
    return images, objects


def _draw(objects: Sequence[dict], height: int, width: int, picture: Path) -> np.ndarray:
    """(H, W) uint8: crowds first, so that an object in a crowd stays an object."""
    mask = np.zeros((height, width), np.uint8)
    for one in sorted(objects, key=lambda one: not one.get("iscrowd", 0)):
        try:
            mask[segmentation_mask(one["segmentation"], height, width)] = VOID if one.get("iscrowd", 0) else 1
        except (DataError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"{picture.name}: the segmentation of annotation {one['id']} is bad ({error})") from error
    return upright_labels(mask, picture, f"the annotation of {picture.name}")


def _unannotated(folder: Path, count: int) -> list[LabelledImage]:
    pictures = {int(path.stem): path for path in folder.iterdir() if path.stem.isdigit()}
    if len(pictures) != IMAGES:
        log.warning("%s holds %d images, val2017 has %d: the lowest numbers may be others.",
                    folder, len(pictures), IMAGES)  # fmt: skip
    chosen = _choose(list(pictures), count, str(folder))
    return [
        LabelledImage(f"{number:012d}", opened := partial(open_image, pictures[number]), partial(_void, opened))
        for number in chosen
    ]


def _void(picture: Callable[[], Image.Image]) -> np.ndarray:
    width, height = picture().size
    return np.full((height, width), VOID, np.uint8)


# --- copies of the hub's data set ---------------------------------------------------------------------------


def _from_parquet(root: Path, count: int, annotated: bool) -> list[LabelledImage]:
    rows = open_rows("coco", root, "val", _COLUMNS, pictures=("image",))
    places = {int(number): place for place, number in enumerate(rows["image_id"])}
    records = rows.select_columns(list(_COLUMNS))  # without the pictures, which stay on disk
    samples = []
    for number in _choose(list(places), count, str(root)):
        picture = picture_at(rows, places[number], "image", f"{number:012d}")
        samples.append(_boxed(records[places[number]], picture, annotated))
    return samples


def _streamed(count: int, annotated: bool) -> list[LabelledImage]:
    """Of rows in any order the lowest `count`; no more than these are kept at a time."""
    rows = open_rows("coco", HUB, "val", _COLUMNS, pictures=("image",), streaming=True)
    wanted = (row for row in rows if int(row["image_id"]) not in POPE_IMAGES)
    kept = heapq.nsmallest(count, wanted, key=lambda row: int(row["image_id"]))
    _choose([int(row["image_id"]) for row in kept], count, "the hub")
    return [_boxed(row, picture_of(row["image"], f"{int(row['image_id']):012d}"), annotated) for row in kept]


def _boxed(row: dict[str, Any], picture: Callable[[], Image.Image], annotated: bool) -> LabelledImage:
    name, objects = f"{int(row['image_id']):012d}", row["objects"]
    boxes = objects["bbox"] if isinstance(objects, dict) else [one["bbox"] for one in objects]
    drawn = partial(_fill, boxes, row["height"], row["width"], picture, name)
    return LabelledImage(name, picture, drawn if annotated else partial(_void, picture))


def _fill(boxes: Sequence[Sequence[float]], height: int, width: int, picture: Callable, name: str) -> np.ndarray:
    """(H, W) uint8: 1 inside the boxes."""
    if picture().size != (width, height):
        raise DataError(f"{name}: expected a picture of {width}x{height} pixels, found {picture().size}")
    mask = np.zeros((height, width), np.uint8)
    for box in boxes:
        x0, y0, x1, y1 = box
        if not (-1 <= x0 <= x1 <= width + 1 and -1 <= y0 <= y1 <= height + 1):
            what = f"expected boxes x_min, y_min, x_max, y_max in {width}x{height} pixels"
            raise DataError(f"{name}: {what}, found {box}")
        mask[max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = 1
    return mask


POPE_IMAGES = frozenset(
    int(number)
    for number in """
1171 3845 6033 7320 7795 8749 11241 12333 13348 15338 15738 16451 16775 17379 17708 18150 18918 21327 21645 23084
23731 25972 31773 31971 32610 33270 34773 37900 38645 39516 40361 41180 42190 42685 44520 44801 44993 45685 49473
50627 52689 54025 59383 60213 61507 63953 65001 68418 69189 69196 69863 70813 71738 73182 75591 76416 79213 79446
80022 81336 83275 84410 84447 87435 88507 91954 92624 93946 93948 94501 94944 97994 98493 100215 100238 102439
102906 105732 108189 111817 112664 113701 114710 114941 115626 115636 117527 120648 120792 121959 122962 123017
123570 124629 124930 125524 125572 131018 131115 134075 140583 140983 141278 142056 142774 147165 147289 148766
149592 153300 153865 154846 155131 156282 156704 157084 159969 163575 163814 167110 167724 170077 170365 170517
172342 172648 175437 175506 178078 183757 183965 184338 186709 188958 189694 190185 190788 191964 192660 196053
196462 197219 198312 198397 199122 199764 199940 199959 200583 200739 201148 203479 204100 204360 205206 205729
207205 208028 209290 209755 210789 211674 212241 214244 214421 217397 218224 219622 222118 224155 226097 227204
227227 230175 231589 233426 233521 235203 235541 236023 236370 236865 237767 238029 238691 239130 239347 239444
239773 240434 243158 244455 245448 245642 246145 246199 246928 246999 249715 249720 252135 252911 256906 257327
259755 262736 263594 264155 265472 265719 267684 270609 273450 275863 276693 277289 278226 278771 279499 280734
280810 281028 281766 283168 283412 286342 287035 287305 288042 288576 288639 291936 293564 294475 295377 297078
298633 299074 299986 300368 300876 301575 302405 303099 303534 303652 303971 304387 304819 307166 307262 308907
309371 310196 311327 311759 312406 313034 313162 314992 316237 316700 318204 318209 318550 323752 325347 327038
327532 327771 328301 329717 331366 332025 332625 332908 333237 333756 336872 337502 338291 343401 343967 346707
348469 348524 349936 350898 353096 353180 354088 354229 354398 354976 355256 355342 355776 356424 358255 360600
361430 363908 365317 365822 366141 367528 368541 369541 370900 372009 372817 372819 374061 375909 376959 377352
377401 377879 377951 378751 378873 379162 379404 381195 381895 382617 382670 383185 384040 384970 387098 388237
388983 390157 390184 391735 392364 394535 396068 396338 397665 397705 399702 401398 405205 405740 405762 406403
407386 408757 410597 414516 415727 418471 418680 419453 421455 424585 424642 424792 427113 429033 429109 429580
429706 429913 430052 431615 433574 434179 436127 437347 441156 442809 443240 445200 446651 447787 449432 452297
454607 454642 455157 456178 456552 458325 458338 459680 460931 461331 462805 463522 463542 463640 465275 465346
465418 467176 467887 468169 468934 468997 470699 472143 472375 473199 474741 477598 478736 480122 482275 482476
482829 485485 485564 489728 493753 495311 497599 498100 498374 498759 499105 500257 500473 500680 501294 501652
501898 505335 505542 505933 506178 506483 510138 511341 511622 513136 514248 514292 515820 515904 516601 516916
518177 520524 521643 524979 525667 526321 526368 528136 528905 529668 533201 534121 534516 534942 536073 538054
538236 539251 541783 542145 543393 544456 545353 549390 550514 550691 551881 551908 553165 553992 554002 554328
555538 557016 559547 560064 560744 562155 564336 564511 565941 567886 569839 572075 572260 573796 574057 574454
574692 574790 575355 575755 579231 579277 579415 580294
""".split()
)
