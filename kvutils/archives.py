"""Extract zip and tar archives of data sets that come from elsewhere, without trusting what they contain.

Everything is looked at before anything is written: names that leave the folder (absolute, `..`, drive letters),
links, devices, encrypted members, a place that is a link already, more bytes than the disk or an honest archive has.
Then it is extracted into a folder beside the target and moved into place when it is complete, so that an interrupted
extraction leaves nothing half done. Names keep characters such as ":". Apple's resource forks (`__MACOSX`, `._*`)
are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from kvutils.errors import DataError
from kvutils.transfer import bytes_bar

SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz")
MEMBERS = 2_000_000  # more files than this, or more than RATIO times the archive's size (where that is
RATIO = 100  # above SMALL bytes), are no data set: pictures hardly compress
SMALL = 50_000_000
BLOCK = 1 << 20


class Damaged(DataError):
    """An archive that cannot be read to its end."""


class Member(NamedTuple):
    """One entry: the parts of its path, its size in bytes, whether it is a folder, a function that opens it."""

    parts: tuple[str, ...]
    size: int
    is_folder: bool
    open: Callable[[], IO[bytes] | None]


def staging_folder(archive: Path, target: Path) -> Path:
    """Where `archive` is extracted before it is moved into `target`; there only while that is not finished."""
    return target / f".{archive.name}.extracting"


def extract(archive: Path, target: Path, strip: str = "", holds: str = "") -> int:
    """Extract a zip, tar or gzipped tar into the folder `target`; returns how many files.

    strip: a leading folder that is left out. holds: what must be in it, relative to `target`. Raises DataError that
    says what is wrong with the archive (nothing is written then, or removed again), OSError for a full disk.
    """
    staging = staging_folder(archive, target)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        with _opened(archive) as listing:
            members = list(_checked(listing, archive, target, PurePosixPath(strip).parts))
            if holds and not any("/".join(member.parts).startswith(holds) for member in members):
                tops = sorted({member.parts[0] for member in members})
                raise DataError(f"{archive.name}: expected {holds} in it, found {', '.join(tops[:8]) or 'nothing'}")
            total = _bounded(members, archive, target)
            with bytes_bar(f"extract {archive.name}", total) as bar:
                for member in members:
                    _write(member, staging.joinpath(*member.parts), bar)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise DataError(f"{archive.name}: two members of it want the same place ({error.filename})") from error
        damaged = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError)
        if isinstance(error, damaged) or isinstance(error, OSError) and error.errno is None:  # gzip's own OSErrors
            raise Damaged(f"{archive.name} is damaged, or not what its name says: {error}") from error
        raise
    _move(staging, target)  # stopped in here, the staging folder stays, and the next run extracts again
    shutil.rmtree(staging)
    return sum(not member.is_folder for member in members)


@contextmanager
def _opened(archive: Path) -> Iterator[Iterator[tuple[str, str, Member]]]:
    """For each entry: its name, what it is if neither file nor folder, the entry (whose parts are not yet known)."""
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            yield (_zip_entry(file, info) for info in file.infolist())
    else:
        with tarfile.open(archive) as file:
            yield (_tar_entry(file, info) for info in file.getmembers())


def _zip_entry(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, str, Member]:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was not packed on Unix
    odd = "encrypted" if info.flag_bits & 1 else "a link" if kind == stat.S_IFLNK else "a device"
    fine = not info.flag_bits & 1 and kind in (0, stat.S_IFREG, stat.S_IFDIR)
    return info.filename, "" if fine else odd, Member((), info.file_size, info.is_dir(), partial(file.open, info))


def _tar_entry(file: tarfile.TarFile, info: tarfile.TarInfo) -> tuple[str, str, Member]:
    odd = "a link" if info.issym() or info.islnk() else "" if info.isreg() or info.isdir() else "a device"
    return info.name, odd, Member((), info.size, info.isdir(), partial(_tar_open, file, info))


def _tar_open(file: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes] | None:
    if hasattr(tarfile, "data_filter"):  # Python's own look at it, since 3.11.4
        tarfile.data_filter(info, os.getcwd())
    return file.extractfile(info)


def _checked(listing: Iterator, archive: Path, target: Path, strip: tuple[str, ...]) -> Iterator[Member]:
    seen: dict[Path, bool] = {target: True}  # places in the target -> whether they exist
    for name, odd, member in listing:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name) or "\0" in name:
            raise DataError(f"{archive.name}: the name {name!r} in it leads out of the folder; nothing was extracted")
        if odd:
            raise DataError(f"{archive.name}: {name!r} in it is {odd}; nothing was extracted")
        parts = path.parts[len(strip) :] if path.parts[: len(strip)] == strip else path.parts
        if not parts or parts[0] == "__MACOSX" or parts[-1].startswith("._"):
            continue
        place = target
        for part in parts:
            known, place = seen[place], place / part
            if place not in seen:
                if known and place.is_symlink():
                    raise DataError(f"{place} is a link: {archive.name} is not extracted through it. Remove the link "
                                    "or extract the archive by hand")  # fmt: skip
                seen[place] = known and place.exists()
        yield member._replace(parts=parts)


def _bounded(members: list[Member], archive: Path, target: Path) -> int:
    """The bytes that the members say they have; DataError where that cannot be."""
    total, packed = sum(member.size for member in members), archive.stat().st_size
    if len(members) > MEMBERS or total > max(SMALL, RATIO * packed):
        raise DataError(f"{archive.name}: {packed:,} bytes that unpack to {total:,} in {len(members):,} files; this "
                        "is no honest archive, nothing was extracted")  # fmt: skip
    free = shutil.disk_usage(target).free
    if total > free:
        raise DataError(f"{archive.name}: {total / 1e9:.1f} GB to extract, but {free / 1e9:.1f} GB are free in "
                        f"{target}; free some space and run the same command again")  # fmt: skip
    return total


def _write(member: Member, path: Path, bar: tqdm) -> None:
    if member.is_folder:
        return path.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with member.open() as source, open(path, "xb") as file:  # x: never over, or through, what is there
        while block := source.read(BLOCK):
            written += file.write(block)
            bar.update(len(block))
            if written > member.size:
                break
    if written != member.size:
        raise DataError(f"{'/'.join(member.parts)}: declared {member.size:,} bytes, but it has {written:,} or more")


def _move(source: Path, target: Path) -> None:
    """Move what is in `source` into `target`, into the folders that are there already."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if place.is_symlink():
            raise DataError(f"{place} is a link: nothing is extracted through it")
        if entry.is_dir() and place.is_dir():
            _move(entry, place)
        else:
            os.replace(entry, place)
