"""Rows of a data set that the Hugging Face hub holds as Parquet: from a local copy, or from the hub at a fixed revision.

A local copy has the repository's own layout, `<config>/<split>-00000-of-00001.parquet` or `data/<split>-...parquet`.
From the hub (`root=HUB`) only the files of the split are downloaded, to the hub's own cache. The revision that is found
first is written down and used ever after, so that two runs read the same rows; it goes into the results as provenance.
Pictures stay encoded until they are asked for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
from huggingface_hub import HfApi, snapshot_download
from PIL import Image

from kvutils.datasets.catalog import CATALOG, data_root, missing_data
from kvutils.errors import DataError
from kvutils.images import open_image
from kvutils.store import read_json, write_json

T = TypeVar("T")
HUB = "hub"  # given as root=: read from the hub instead of a folder


def holds_parquet(root: str | Path) -> bool:
    """Whether `root` is the hub or a folder with a local copy of a hub repository."""
    return str(root) == HUB or next(Path(root).rglob("*.parquet"), None) is not None


def open_rows(
    name: str,
    root: str | Path,
    split: str,
    columns: Sequence[str],
    config: str | None = None,
    pictures: Sequence[str] = (),
    streaming: bool = False,
    repository: str = "",
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of one split of the data set `name`, with at least `columns`; `pictures` are image columns.

    root: `HUB`, or the folder of a local copy. streaming (hub only): an iterable that downloads what it yields, for large
    sets. repository: another one than the catalog's. Raises DataError for a missing file, repository or column.
    """
    repository = repository or CATALOG[name].hub
    datasets.disable_progress_bars()
    try:
        if str(root) == HUB and streaming:
            rows = datasets.load_dataset(repository, config, split=split, revision=revision_of(repository), streaming=True)
        else:
            if str(root) == HUB:
                root = snapshot_download(
                    repository, repo_type="dataset", revision=revision_of(repository),
                    allow_patterns=[f"{config or 'data'}/{split}-*.parquet"],
                )  # fmt: skip
            files = parquet_files(Path(root), split, config)
            if not files:
                where = f"{config}/{split}" if config else split
                raise missing_data(name, f"{root} holds no Parquet file of {where!r} ({where}-*.parquet)")
            _check_parts(name, files)
            rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except DataError:
        raise
    except Exception as error:  # datasets raises whatever its readers and the network raise
        raise missing_data(name, f"cannot be read from {repository if str(root) == HUB else root}: {error}") from error
    absent = sorted({*columns, *pictures} - set(rows.column_names))
    if absent:
        raise DataError(
            f"{name}: expected the columns {', '.join([*columns, *pictures])}, but {', '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} missing; there are {', '.join(rows.column_names)}. Is this another version?"
        )
    for column in pictures:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def parquet_files(root: Path, split: str, config: str | None = None) -> list[Path]:
    """The Parquet files of a split (and config) in a local copy, in the order of their numbers."""
    pattern = re.compile(rf"{re.escape(split)}(-\d+-of-\d+.*)?\.parquet")
    found = [path for path in sorted(root.rglob("*.parquet")) if pattern.fullmatch(path.name)]
    return [path for path in found if config is None or config in path.relative_to(root).parts[:-1]]


def _check_parts(name: str, files: Sequence[Path]) -> None:
    """Raises DataError unless the files "<split>-00000-of-00003..." are all the parts of a split, each once."""
    numbers = [re.search(r"-(\d+)-of-(\d+)", file.name) for file in files]
    if not all(numbers):
        return  # a single file without a number
    there = sorted(int(number[1]) for number in numbers if number)
    totals = {int(number[2]) for number in numbers if number}
    if len(totals) != 1 or len(set(there)) != len(there):
        raise DataError(f"{name}: {', '.join(file.name for file in files)} are the parts of more than one copy of a split; "
                        "keep one")  # fmt: skip
    total = totals.pop()
    if there != list(range(total)):
        raise missing_data(name, f"{len(there)} of the {total} Parquet files of a split are there: "
                                 f"{', '.join(file.name for file in files)}, in {files[0].parent}")  # fmt: skip


def picture_of(value: dict | None, name: str) -> Callable[[], Image.Image]:
    """A function that opens an undecoded picture ({"bytes", "path"}); `name` says in errors which it is."""
    if not value or not value.get("bytes"):
        raise DataError(f"{name}: the row holds no picture; is this another version of the data set?")
    return partial(_open, value["bytes"], name)


def picture_at(rows: datasets.Dataset, index: int, column: str, name: str) -> Callable[[], Image.Image]:
    """The same of a row that stays on disk until then."""
    return lambda: picture_of(rows[index][column], name)()


def _open(data: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return open_image(image, name)
    except OSError as error:
        raise DataError(f"{name}: the picture cannot be read ({error})") from error


def revision_of(repository: str) -> str:
    """The commit of a hub repository that is used: the one written down in `KVUTILS_DATA`/hub_revisions.json, else the
    present one, which is written down. Raises DataError where it can be neither read nor looked up."""
    path = (data_root() or Path.home() / ".cache" / "kvutils") / "hub_revisions.json"
    known: dict[str, Any] = read_json(path) if path.is_file() else {}
    if repository not in known:
        known[repository] = ask_hub(repository, lambda: HfApi().dataset_info(repository).sha)
        write_json(path, known)
    return known[repository]


def ask_hub(repository: str, ask: Callable[[], T]) -> T:
    """What the hub answers; DataError where it does not."""
    try:
        return ask()
    except Exception as error:  # of which kind depends on the HTTP library that huggingface_hub brings
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{repository} cannot be looked up on the hub ({said}): that needs network, or a copy on this "
                        "machine") from error  # fmt: skip
