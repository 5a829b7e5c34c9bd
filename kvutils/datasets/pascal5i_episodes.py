"""The Pascal-5i episode list of HSNet (juhongm999/hsnet, data/pascal.py), reproduced draw for draw.

The query of episode i is line i mod n of the fold's list. Supports are drawn one at a time from the images of
the query's class with the legacy numpy generator; only the query itself is rejected, so a support may appear
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvutils.errors import DataError, ParameterError

CLASS_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
FOLDS, CLASSES_PER_FOLD = 4, 5


def fold_classes(fold: int) -> list[int]:
    """Class indices 0..19 of a fold 0..3."""
    if fold not in range(FOLDS):
        raise ParameterError(f"fold must be 0..{FOLDS - 1}, found {fold!r}")
    return list(range(fold * CLASSES_PER_FOLD, (fold + 1) * CLASSES_PER_FOLD))


def read_split(path: str | Path) -> list[tuple[str, int]]:
    """(image name, class index 0..19) of each line `<image>__<class 1..20>` of a list, in file order."""
    entries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        name, mark, class_id = line.strip().partition("__")
        if not name or not mark or not class_id.isdigit() or not 1 <= int(class_id) <= len(CLASS_NAMES):
            raise DataError(f"{path}, line {number}: expected '<image>__<class 1..20>', found {line!r}")
        entries.append((name, int(class_id) - 1))
    if not entries:
        raise DataError(f"{path} is empty; it should list the images of one Pascal-5i fold")
    return entries


def sample_episodes(
    entries: Sequence[tuple[str, int]], shot: int = 5, n_episodes: int = 1000, seed: int = 0
) -> list[tuple[str, tuple[str, ...], int]]:
    """[(query, supports, class index)] of one fold. entries: (image name, class index) in list order.

    Raises ParameterError for a shot below 1, DataError for a class whose only image is the query.
    """
    if shot < 1 or n_episodes < 1:
        raise ParameterError(f"shot and n_episodes must be at least 1, found {shot} and {n_episodes}")
    by_class: dict[int, list[str]] = {}
    for name, class_index in entries:
        by_class.setdefault(class_index, []).append(name)
    random = np.random.RandomState(seed)
    episodes = []
    for i in range(n_episodes):
        query, class_index = entries[i % len(entries)]
        names = by_class[class_index]
        if set(names) == {query}:
            raise DataError(
                f"class {class_index} has no image but the query {query!r}: no support can be drawn"
            )
        supports: list[str] = []
        while len(supports) < shot:
            # np.random.choice(names, 1, replace=False) is the first element of a permutation
            name = names[random.permutation(len(names))[0]]
            if name != query:
                supports.append(name)
        episodes.append((query, tuple(supports), class_index))
    return episodes
