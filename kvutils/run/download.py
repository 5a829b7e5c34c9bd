"""Fetch real data sets below `KVUTILS_DATA`: `make data DATASETS="NAME ..."`, `python -m kvutils.run.download NAME ...`.

Without a name: every data set, whether it is there, its size, its licence, and whether it is free. What is there is
not fetched again (nor looked into: the loaders do that). A file arrives as `<file>.part`; after a lost connection, a
full disk or Ctrl-C the same command goes on (`kvutils.run.download`). Its size and checksum are compared with the
published ones, and one that differs becomes `<file>.bad`; archives are extracted (`kvutils.run.download`) and removed.
`<file>.fetched.json` beside it records address, size, sha256 and date, and whether there was a published checksum to
compare with. Data sets without free official files come as Parquet from the Hugging Face hub, at the revision that
`kvutils.datasets.hub` holds. For those behind a login the steps for a person are shown. Only one such command works
in a folder at a time; another one waits.

Exit codes: 0 everything is there; 1 something failed; 2 the command cannot be understood (unknown name or option,
KVUTILS_DATA is not set); 3 nothing failed, but something is left to do by hand; 130 stopped by Ctrl-C.

Extract zip and tar archives of data sets that come from elsewhere, without trusting what they contain.

Everything is looked at before anything is written: names that leave the folder (absolute, `..`, drive letters),
links, devices, encrypted members, a place that is a link already, more bytes than the disk or an honest archive has.
Then it is extracted into a folder beside the target and moved into place when it is complete, so that an interrupted
extraction leaves nothing half done. Names keep characters such as ":". Apple's resource forks (`__MACOSX`, `._*`)
are left out.

Receive one file over HTTP: resumed where it stopped, with patience, and only if it is still the same file.

What has arrived is in `<file>.part`, what the server said of it (address, ETag or Last-Modified, size) in
`<file>.part.json`; the rest is asked for with `If-Range`, so that halves of two versions are never glued together.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from kvutils import __version__
from kvutils.datasets.catalog import CATALOG, About, Download, data_root
from kvutils.errors import DataError, KVUtilsError
from kvutils.store import read_json, write_json

OK, FAILED, MISUSED, BY_HAND, STOPPED = 0, 1, 2, 3, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvutils.run.download", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets; none: list them")
    parser.add_argument("--hub", action="store_true", help="the hub's Parquet copy, even if official files are free")
    parser.add_argument("--keep-archives", action="store_true", help="keep archives after they are extracted")
    parser.add_argument("--accept-changed", action="store_true",
                        help="take a file that is not the published one (other size or checksum)")  # fmt: skip
    options = parser.parse_args(arguments)
    names, root = list(dict.fromkeys(map(_full_name, options.names))), data_root()
    if unknown := [name for name in names if name not in CATALOG]:
        near = difflib.get_close_matches(unknown[0], CATALOG, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"error: no data set {unknown[0]!r}{hint}; there are {', '.join(CATALOG)}", file=sys.stderr)
        return MISUSED
    if root is None and names:
        print("error: KVUTILS_DATA is not set. It names the folder for the real data sets, such as\n  make data "
              f'DATASETS="{" ".join(names)}" KVUTILS_DATA=$HOME/kvutils-data', file=sys.stderr)  # fmt: skip
        return MISUSED
    try:
        if not names:
            return _list(root)
        with _alone(root):
            results = {name: _fetch_set(CATALOG[name], root, options) for name in names}
    except KeyboardInterrupt:
        print("\nstopped; what has arrived is kept, and the same command goes on", file=sys.stderr)
        return STOPPED
    except (OSError, KVUtilsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    said = ((OK, "there"), (BY_HAND, "left to do by hand"), (FAILED, "failed"))
    groups = {text: [name for name in names if results[name] == code] for code, text in said}
    print("; ".join(f"{text}: {', '.join(found)}" for text, found in groups.items() if found))
    return FAILED if FAILED in results.values() else max(results.values())


def _full_name(name: str) -> str:
    """"davis" is davis-2017: a beginning that only one data set has stands for it."""
    found = [each for each in CATALOG if each.startswith(name)]
    return found[0] if len(found) == 1 else name


def _list(root: Path | None) -> int:
    print(f"data sets below {root} (KVUTILS_DATA)" if root else "KVUTILS_DATA, the folder for data sets, is not set")
    print(f"\n  {'name':11} {'state':8} {'GB':>5}  {'how':14} licence")
    for about in CATALOG.values():
        state = "?" if root is None else "present" if _is_there(about, root) else "missing"
        print(f"  {about.name:11} {state:8} {about.to_get:5.2g}  {about.how:14} {about.licence}")
    print('\nget some:  make data DATASETS="davis-2017 pope"   (by hand: shows the steps)')
    return OK


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Nobody else fetches into `root` meanwhile. The lock goes with the process, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another command fetches into {root}: waiting until it is done", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_there(about: About, root: Path) -> bool:
    copy = _marker(root / about.name / "hub")
    if copy.is_file() and all((root / about.name / file).is_file() for file in read_json(copy)["files"]):
        return True
    official = [_has(download, root) for download in about.downloads]
    official += [any(any(root.glob(pattern)) for pattern in either.split("|")) for either in about.by_hand]
    return bool(official) and all(official)


def _has(download: Download, root: Path) -> bool:
    """Whether a file, or what an archive brings, is there: fetched from this address, or put there by hand."""
    file = _file(download, root)
    if staging_folder(file, file.parent).exists() or not (root / (download.holds or download.path)).exists():
        return False
    if _marker(file).is_file():
        return read_json(_marker(file))["address"] in (download.url, *download.mirrors)
    kind, _, expected = download.checksum.partition(":")  # lists are small; other versions of them are in circulation
    return _is_archive(file) or not kind or _digests(file, {kind})[kind] == expected


def _is_archive(file: Path) -> bool:
    return file.name.endswith(SUFFIXES)


def _file(download: Download, root: Path) -> Path:
    name = unquote(urlsplit(download.url).path).rpartition("/")[2]
    return root / download.path / name if name.endswith(SUFFIXES) else root / download.path


def _marker(file: Path) -> Path:
    return file.with_name(file.name + ".fetched.json")


def _fetch_set(about: About, root: Path, options: argparse.Namespace) -> int:
    print(f"{about.name}: {about.title}, {about.to_get:.2g} GB, {about.licence}", flush=True)
    if _is_there(about, root):
        print(f"  all there already in {root / about.name}")
        return OK
    if about.hub and (options.hub or not about.downloads):
        jobs = [lambda: _fetch_hub(about, root)]
    else:
        jobs = [lambda download=download: _fetch(download, root, options) for download in about.downloads]
    code = OK
    for job in jobs:
        try:
            job()
        except (OSError, KVUtilsError) as error:
            print(f"  failed: {_full(error) or error}", flush=True)
            code = FAILED
    if about.steps and (code or not _is_there(about, root)):
        print(f"  left to do by hand, see {about.source}:")
        for number, step in enumerate(about.steps, start=1):
            print(f"    {number}. {step.replace('$KVUTILS_DATA', str(root))}")
        code = code or BY_HAND
    return code


def _full(error: Exception) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; what has arrived is kept. Free some space and run the same command: it goes on."
    return ""


def _fetch(download: Download, root: Path, options: argparse.Namespace) -> None:
    """One file or archive, unless it is there. Raises DataError or OSError that says what to do."""
    if _has(download, root):
        return
    file = source = _file(download, root)
    address, is_archive = download.url, _is_archive(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (is_archive and file.is_file()):  # an archive that was not yet extracted, or was put there by hand
        source, size = part_of(file), None if options.accept_changed else download.size
        address = receive((download.url, *download.mirrors), file, size, room=2 if is_archive else 1)
    size, (kind, _, expected) = source.stat().st_size, download.checksum.partition(":")
    found = _digests(source, {"sha256", kind or "sha256"})
    pairs = (("size", download.size, size), (kind, expected, found.get(kind)))
    wrong = "; ".join(f"expected {what} {want}, found {got}" for what, want, got in pairs if want and want != got)
    notes_of(file).unlink(missing_ok=True)
    bad = file.with_name(file.name + ".bad")
    if wrong and not options.accept_changed:
        os.replace(source, bad)
        raise DataError(f"{file.name} is not the published file: {wrong}. It is kept as {bad}; the next run begins "
                        "anew (--accept-changed takes it as it is)")  # fmt: skip
    compared = f"NOT the published file: {wrong}" if wrong else f"{kind} as published" if kind else (
        "no checksum is published, nothing to compare with")  # fmt: skip
    if file != source and file.exists():
        os.replace(file, bad)
        compared += f"; the other version that was there is now {bad.name}"
    os.replace(source, file)
    report = f"  {file.name}: {size / 1e6:,.1f} MB, {compared}"
    if is_archive:
        holds = Path(download.holds).relative_to(download.path).as_posix() if download.holds else ""
        try:
            report += f"; {extract(file, file.parent, download.strip, holds):,} files extracted into {file.parent}"
        except Damaged:
            os.replace(file, bad)  # the next run begins anew
            raise
    record = {"address": address, "size": size, "sha256": found["sha256"], "compared": compared}
    write_json(_marker(file), record | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")})
    if is_archive and not options.keep_archives:
        file.unlink()
    print(report if kind else f"{report}; sha256 {found['sha256']} is in {_marker(file).name}", flush=True)


def _digests(path: Path, kinds: set[str]) -> dict[str, str]:
    hashes = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    with open(path, "rb") as file, bytes_bar(f"check {path.name}", path.stat().st_size) as bar:
        while block := file.read(1 << 20):
            for each in hashes.values():
                each.update(block)
            bar.update(len(block))
    return {kind: each.hexdigest() for kind, each in hashes.items()}


def _fetch_hub(about: About, root: Path) -> None:
    """The Parquet copy on the hub, which resumes and checks by itself."""
    import huggingface_hub

    from kvutils.datasets.hub import revision_of

    free = shutil.disk_usage(root).free
    if about.gigabytes * 1e9 > free:
        raise DataError(f"{about.gigabytes:g} GB are needed, but {free / 1e9:.1f} GB are free in {root}")
    folder, revision = root / about.name, revision_of(about.hub)
    try:
        huggingface_hub.snapshot_download(about.hub, repo_type="dataset", revision=revision, local_dir=folder,
                                          allow_patterns=list(about.hub_files))  # fmt: skip
    except Exception as error:  # whatever the hub's client and the network raise
        raise DataError(f"{about.hub} on the hub: {_full(error) or error}; the same command goes on") from error
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{about.hub} on the hub has no file like {', '.join(about.hub_files)}")
    write_json(_marker(folder / "hub"), {"repository": about.hub, "revision": revision, "files": files})
    print(f"  {about.hub} @ {revision[:12]}: {len(files)} Parquet files in {folder}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz")
MEMBERS = 2_000_000  # more files than this, or more than RATIO times the archive's size (where that is
RATIO = 100  # above SMALL bytes), are no data set: pictures hardly compress
SMALL = 50_000_000
ARCHIVE_BLOCK = 1 << 20


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
        while block := source.read(ARCHIVE_BLOCK):
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


TRIES = 6  # in a row without a single new byte; half of them where nothing has arrived yet
PAUSE = 2.0  # seconds before the second try, twice as long before each further one
WAIT = (20, 60)  # seconds for a connection, for the next bytes
BLOCK = 1 << 16


class _Dropped(Exception):
    """The server or the connection failed in a way that may pass."""


def bytes_bar(name: str, total: int | None, start: int = 0) -> tqdm:
    """A progress bar with rate and remaining time; silent where the output is no terminal."""
    return tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None, leave=False)


def part_of(file: Path) -> Path:
    """What has arrived of `file`."""
    return file.with_name(file.name + ".part")


def notes_of(file: Path) -> Path:
    """What the server said of `part_of(file)`."""
    return file.with_name(file.name + ".part.json")


def receive(addresses: Sequence[str], file: Path, size: int | None = None, room: int = 1) -> str:
    """Receive `part_of(file)` whole, from the first address that has it; returns that address.

    size: the bytes it must have, if known. room: how many times its size must be free on the disk. Raises DataError
    that says what went wrong and what is kept; OSError where the disk is full.
    """
    for url in addresses:
        last = url == addresses[-1]
        most, failures = _length(file), 0
        while True:
            try:
                _receive(url, file, size, room)
                return url
            except (_Dropped, DataError) as error:
                arrived = _length(file)
                most, failures = max(most, arrived), 1 if arrived > most else failures + 1
                final = isinstance(error, DataError) or failures >= (TRIES if last and arrived else TRIES // 2)
                if final and last:
                    kept = f"; {arrived / 1e6:,.1f} MB are kept, the same command goes on" if arrived else ""
                    raise DataError(f"{file.name} from {url}: {error}{kept}") from error
                pause = PAUSE * 2 ** (failures - 1)
                then = "trying another address" if final else f"trying again in {pause:.2g} s"
                print(f"  {file.name}: {error}; {then}", flush=True)
                if final:
                    break
                time.sleep(pause)
    raise DataError(f"{file.name} has no address")


def _length(file: Path) -> int:
    part = part_of(file)
    return part.stat().st_size if part.exists() else 0


def _receive(url: str, file: Path, size: int | None, room: int) -> None:
    """Go on receiving, or begin. Raises _Dropped for what may pass, DataError for what will not."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError("only http and https addresses are fetched")
    part, notes = part_of(file), read_json(notes_of(file)) if notes_of(file).is_file() else {}
    have = _length(file) if notes.get("address") == url and notes.get("validator") else 0
    if have and have == notes["size"]:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": f"kvutils/{__version__}"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": notes["validator"]}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=WAIT) as answer:
            _refuse(answer)
            validator = _validator(answer)
            have, total = _extent(answer, have, validator == notes.get("validator"), notes_of(file))
            if size and total and total != size:
                raise DataError(f"expected {size:,} bytes, but the server has {total:,}: it is another file by now "
                                "(--accept-changed takes it)")  # fmt: skip
            needed, free = (total or size or 0) * room - have, shutil.disk_usage(part.parent).free
            if needed > free:
                raise DataError(f"{needed / 1e9:.1f} GB are needed{' to download and extract' * (room > 1)}, but "
                                f"{free / 1e9:.1f} GB are free in {part.parent}")  # fmt: skip
            if not have:
                write_json(notes_of(file), {"address": url, "validator": validator, "size": total})
            with open(part, "ab" if have else "wb") as out, bytes_bar(file.name, total or size, have) as bar:
                for block in answer.iter_content(BLOCK):
                    bar.update(out.write(block))
    except (requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects) as error:
        raise DataError(f"the server leads elsewhere ({error})") from error
    except requests.RequestException as error:
        raise _Dropped(f"no connection, or lost at byte {_length(file):,} ({type(error).__name__})") from error
    if total and _length(file) < total:
        raise _Dropped(f"connection lost after {_length(file):,} of {total:,} bytes")


def _refuse(answer: requests.Response) -> None:
    """Raise for an answer that is not the file."""
    status = answer.status_code
    if status in (408, 425, 429) or status >= 500:
        raise _Dropped(f"the server answers {status} {answer.reason}")
    if status not in (200, 206, 416):
        raise DataError(f"the server answers {status} {answer.reason}: the file may have moved, or want a login")
    if status == 200 and answer.headers.get("Content-Type", "").startswith("text/html"):
        raise DataError("the server sends a web page instead of the file: it may have moved, or want a login")


def _validator(answer: requests.Response) -> str:
    """What tells this version of the file from others; "" where nothing does (weak ETags do not)."""
    etag = answer.headers.get("ETag", "")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return ""
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _extent(answer: requests.Response, have: int, same: bool, notes: Path) -> tuple[int, int | None]:
    """(the bytes that are kept, those that the whole file has)."""
    if answer.status_code != 200:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if answer.status_code == 416 or not found or int(found[1]) != have or not same:
            notes.unlink(missing_ok=True)  # so that the next try begins
            raise _Dropped("the server cannot go on where it stopped")
        return have, int(found[2]) if found[2].isdigit() else None
    if have:
        print("  the server's file is another one by now, or it cannot go on: from the start", flush=True)
    length = answer.headers.get("Content-Length", "")
    encoded = answer.headers.get("Content-Encoding", "identity") != "identity"
    return 0, int(length) if length.isdigit() and not encoded else None
