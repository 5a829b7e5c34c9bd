"""Rows of a data set that the Hugging Face hub holds as Parquet: from a local copy, or from the hub at a fixed revision.

A local copy has the repository's own layout, `<config>/<split>-00000-of-00001.parquet` or `data/<split>-...parquet`. From the hub
(`root=HUB`) only the files of the split are downloaded, to the hub's own cache (COCO's 0.8 GB too: its images are wanted in the order
of their numbers, which is not that of the rows). The revision that is found first is written down and used ever after, so that two runs
read the same rows; it goes into the results as provenance. Pictures stay encoded until they are asked for."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from kvutils.datasets.catalog import CATALOG, data_root, missing_data
from kvutils.datasets.files import expect, reading, visible
from kvutils.datasets.labels import Picture
from kvutils.errors import DataError, KVUtilsError, ask_hub, writing
from kvutils.store import read_json, write_json

HUB = "hub"  # given as root=: read from the hub instead of a folder


def holds_parquet(root: str | Path, official: Sequence[str] = ()) -> bool:
    """Whether `root` is the hub or a folder with a local copy of a hub repository, and without any of the `official` paths, which come first."""
    return str(root) == HUB or not any(Path(root, path).exists() for path in official) and bool(visible(Path(root).rglob("*.parquet")))


def open_rows(name: str, root: str | Path, split: str, columns: Sequence[str], pictures: Sequence[str] = (), config: str | None = None,
              repository: str = "") -> Any:  # fmt: skip
    """The rows of one split of the data set `name`, a `datasets.Dataset`, with at least `columns` and the first of the image columns `pictures`.

    root: `HUB`, or the folder of a local copy. repository: another one than the catalog's. Raises DataError for a missing
    file, repository or column."""
    import datasets  # half a second, and generated data need none
    repository = repository or CATALOG[name].hub
    datasets.disable_progress_bars()
    try:
        with writing(f"the rows of {name} (below {datasets.config.HF_DATASETS_CACHE})"):
            if str(root) == HUB:
                pattern = f"{config or 'data'}/{split}-*.parquet"
                root = snapshot_download(repository, repo_type="dataset", revision=revision_of(repository), allow_patterns=[pattern])
            files = _parts(name, Path(root), split, config)
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
    except KVUtilsError:
        raise
    except Exception as error:  # datasets raises whatever its readers and the network raise
        raise missing_data(name, f"cannot be read from {repository if str(root) == HUB else root}: {error}") from error
    absent = sorted({*columns, *pictures[:1]} - set(rows.column_names))
    there = ", ".join(rows.column_names)
    expect(not absent, f"{name}: expected the columns {', '.join(absent)} too, found {there}; is this another version of the data set?")
    with reading(f"{name} from {root}", "encoded pictures"):
        for column in set(pictures) & set(rows.column_names):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _parts(name: str, root: Path, split: str, config: str | None) -> list[str]:
    """The Parquet files of a split (and config): all the parts "<split>-00000-of-00003..." of one copy. Raises DataError."""
    pattern = re.compile(rf"{re.escape(split)}(-(\d+)-of-(\d+).*)?\.parquet")
    found = [(path, match) for path in visible(root.rglob("*.parquet")) if (match := pattern.fullmatch(path.name))]
    found = [(path, match) for path, match in found if config is None or config in path.relative_to(root).parts[:-1]]
    if not found:
        where = f"{config}/{split}" if config else split
        raise missing_data(name, f"{root} holds no Parquet file of {where!r} ({where}-*.parquet)")
    numbers = [int(match[2] or 0) for _, match in found]
    totals = {int(match[3] or 1) for _, match in found}
    names = f"{', '.join(path.name for path, _ in found)} in {found[0][0].parent}"
    expect(len(totals) == 1 and len(set(numbers)) == len(numbers), f"{name}: {names} are parts of more than one copy; keep one")
    if len(numbers) != max(totals):
        raise missing_data(name, f"{len(numbers)} of the {max(totals)} Parquet files of a split are there: {names}")
    return [str(path) for path, _ in found]


def picture_at(rows: Sequence[dict], index: int, column: str, name: str) -> Picture:
    """An undecoded picture ({"bytes", "path"}) of a row, which stays on disk until then; `name` says in errors which it is."""
    return Picture(lambda: _encoded(rows[index][column]), name)


def _encoded(value: dict | None) -> bytes:
    expect(value and value.get("bytes"), "the row holds no picture; is this another version of the data set?")
    return value["bytes"]


def revision_of(repository: str) -> str:
    """The commit of a hub repository that is used: the one written down in `KVUTILS_DATA`/hub_revisions.json, else the
    present one (offline the one in the hub's cache), which is written down. Raises DataError where there is none of these."""
    file, known = _revisions()
    if repository not in known:
        cached = _cached(repository) if constants.HF_HUB_OFFLINE else None
        known[repository] = cached.name if cached else ask_hub(repository, lambda: HfApi().dataset_info(repository).sha)
        write_json(file, known := {**known, **_revisions()[1]})  # another process may have added its own while the hub was asked
    return known[repository]


def _revisions() -> tuple[Path, dict[str, Any]]:
    """Where they are written down, and those that are."""
    file = (data_root() or Path.home() / ".cache" / "kvutils") / "hub_revisions.json"
    return file, read_json(file) if file.is_file() else {}


def _cached(repository: str) -> Path | None:
    """The folder of the hub's cache with the revision that is used; None where there is none."""
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=_revisions()[1].get(repository), local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def hub_download(name: str) -> float:
    """Gigabytes that reading the hub copy of a data set downloads, 0.0 where the hub's cache has it: one short request at most,
    nothing is fetched. Raises DataError where it is neither there nor to be had."""
    about = CATALOG[name]

    def wanted(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in about.hub_files)

    folder = _cached(about.hub)
    if folder and any(wanted(path.relative_to(folder).as_posix()) for path in folder.rglob("*.parquet")):
        return 0.0
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{about.title}: {about.hub} is not in the hub's cache here, and HF_HUB_OFFLINE is set\n  with network it comes by "
                        f"itself; without, `hf download --repo-type dataset {about.hub}` elsewhere and copy HF_HOME")
    info = ask_hub(about.hub, lambda: HfApi().dataset_info(about.hub, timeout=10, files_metadata=True))
    return sum(each.size or 0 for each in info.siblings or () if wanted(each.rfilename)) / 1e9
