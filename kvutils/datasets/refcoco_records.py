"""One reference of RefCOCO, wherever it was read from: what it names, its sentences, its mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kvutils.errors import DataError


@dataclass(frozen=True)
class Reference:
    """One thing in one image. segmentation: COCO's, in pixels of (width, height). sentences: (id, text). open: opens
    the image, None where it is the file `file_name`. where: how errors call it."""

    id: int
    image_id: int
    file_name: str
    width: int
    height: int
    segmentation: Any
    class_name: str
    sentences: list[tuple[int, str]]
    where: str
    open: Callable[[], Image.Image] | None = None


def check_reference(record: Any, where: str) -> dict:
    """The fields of a record that are used, with sentences as (id, text). Raises DataError for any that is
    malformed."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a dictionary, found {type(record).__name__}")
    found: dict[str, Any] = {}
    for key in ("ref_id", "image_id", "ann_id", "category_id"):
        found[key] = record.get(key)
        if type(found[key]) is not int:
            raise DataError(f"{where}: {key!r} must be a whole number, found {found[key]!r}")
    found["split"] = record.get("split")
    if not isinstance(found["split"], str):
        raise DataError(f"{where}: 'split' must be text, found {found['split']!r}")
    sentences = record.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise DataError(f"{where}: 'sentences' must be a list of at least one, found {sentences!r}")
    found["sentences"] = []
    for one in sentences:
        text, number = (one.get("sent"), one.get("sent_id")) if isinstance(one, dict) else (None, None)
        if not isinstance(text, str) or not text.strip() or type(number) is not int:
            raise DataError(f"{where}: a sentence needs the text 'sent' and the number 'sent_id', found {one!r}")
        found["sentences"].append((number, text))
    return found
