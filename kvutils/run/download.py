"""Fetch real data sets below `KVUTILS_DATA`: `make data DATASETS="NAME ..."`, `kvutils data NAME ...`.

What is there is not fetched again (nor looked into: the loaders do that). A file arrives as `<file>.part`; after a lost
connection, a full disk or Ctrl-C the same command goes on. Its size and checksum are compared with the published ones, and
one that differs becomes `<file>.bad`; archives are extracted beside the target, moved into place when complete, and removed.
`<file>.fetched.json` records address, size, checksum and date, and whether there was a published checksum to compare with.
Data sets without free official files come as Parquet from the Hugging Face hub, at the revision that `kvutils.datasets.hub`
holds. For those behind a login the steps for a person are shown. Only one such command works in a folder at a time.
"""

import argparse
import errno
import hashlib
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from kvutils import __version__
from kvutils.datasets.catalog import CATALOG, About, Download, data_root
from kvutils.errors import DataError, KVUtilsError, ParameterError, one_of
from kvutils.run.cli import BY_HAND, FAILED
from kvutils.store import read_json, write_json

SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz")
TRIES = 5  # in a row without a single new byte
PAUSE = 2.0  # seconds before the second try, twice as long before each further one
WAIT = (20, 60)  # seconds for a connection, for the next bytes
BLOCK = 1 << 16
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError)  # the last: encrypted


class Dropped(Exception):
    """The server or the connection failed in a way that may pass."""


def fetch(options: argparse.Namespace) -> int:
    """What `kvutils data` does; returns the exit code."""
    names, root = list(dict.fromkeys(map(_full_name, options.names))), data_root()
    for name in names:
        one_of("data set", name, CATALOG)
    if not names:
        return _list(root)
    if root is None:
        raise ParameterError("KVUTILS_DATA is not set. It names the folder for the real data sets, such as\n  make data "
                             f'DATASETS="{" ".join(names)}" KVUTILS_DATA=$HOME/kvutils-data')
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".download.lock")  # it goes with the process, however that ends
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"another command fetches into {root}: waiting until it is done", flush=True)
        held = lock.acquire()
    with held:
        results = {name: _fetch_set(CATALOG[name], root, options) for name in names}
    said = {"there": 0, "left to do by hand": BY_HAND, "failed": FAILED}
    groups = {text: [name for name in names if results[name] == code] for text, code in said.items()}
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
    return 0


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
    if _staging(file).exists() or not (root / (download.holds or download.path)).exists():
        return False
    if _marker(file).is_file():
        return read_json(_marker(file))["address"] in (download.url, *download.mirrors)
    # lists are small; other versions of them are in circulation
    return file.name.endswith(SUFFIXES) or not download.checksum or _checksum(file, download.checksum) == download.checksum


def _file(download: Download, root: Path) -> Path:
    name = unquote(urlsplit(download.url).path).rpartition("/")[2]
    return root / download.path / name if name.endswith(SUFFIXES) else root / download.path


def _marker(file: Path) -> Path:
    return file.with_name(file.name + ".fetched.json")


def _checksum(file: Path, like: str) -> str:
    """`md5:...` or `sha256:...`, of the kind of `like` (sha256 where that is empty)."""
    kind = like.partition(":")[0] or "sha256"
    with open(file, "rb") as opened:
        return f"{kind}:{hashlib.file_digest(opened, partial(hashlib.new, kind, usedforsecurity=False)).hexdigest()}"


def _fetch_set(about: About, root: Path, options: argparse.Namespace) -> int:
    print(f"{about.name}: {about.title}, {about.to_get:.2g} GB, {about.licence}", flush=True)
    if _is_there(about, root):
        print(f"  all there already in {root / about.name}")
        return 0
    if about.hub and (options.hub or not about.downloads):
        jobs = [partial(_fetch_hub, about, root)]
    else:
        jobs = [partial(_fetch, download, root, options) for download in about.downloads]
    code = 0
    for job in jobs:
        try:
            job()
        except (OSError, KVUtilsError) as error:
            print(f"  failed: {_reason(error)}", flush=True)
            code = FAILED
    if about.steps and (code or not _is_there(about, root)):
        print(f"  left to do by hand, see {about.source}:")
        for number, step in enumerate(about.steps, start=1):
            print(f"    {number}. {step.replace('$KVUTILS_DATA', str(root))}")
        code = code or BY_HAND
    return code


def _reason(error: Exception) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; what has arrived is kept. Free some space and run the same command: it goes on."
    return str(error)


def _fetch(download: Download, root: Path, options: argparse.Namespace) -> None:
    """One file or archive, unless it is there. Raises DataError or OSError that says what to do."""
    if _has(download, root):
        return
    file = source = _file(download, root)
    address, is_archive = download.url, file.name.endswith(SUFFIXES)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (is_archive and file.is_file()):  # an archive that was not yet extracted, or was put there by hand
        source = file.with_name(file.name + ".part")
        if not download.checksum:  # nothing would tell halves of two versions from one file
            source.unlink(missing_ok=True)
        size = None if options.accept_changed else download.size
        address = receive((download.url, *download.mirrors), source, size, room=2 if is_archive else 1)
    size, checksum = source.stat().st_size, _checksum(source, download.checksum)
    pairs = (("size", download.size, size), ("checksum", download.checksum, checksum))
    wrong = "; ".join(f"expected {what} {want}, found {got}" for what, want, got in pairs if want and want != got)
    bad = file.with_name(file.name + ".bad")
    if wrong and not options.accept_changed:
        os.replace(source, bad)
        raise DataError(f"{file.name} is not the published file: {wrong}. It is kept as {bad}; the next run begins "
                        "anew (--accept-changed takes it as it is)")
    compared = f"NOT the published file: {wrong}" if wrong else f"{checksum.partition(':')[0]} as published"
    if not download.checksum:
        compared = f"no checksum is published, nothing to compare with; {checksum} is in {_marker(file).name}"
    if file != source and file.exists():
        os.replace(file, bad)
        compared += f"; the other version that was there is now {bad.name}"
    os.replace(source, file)
    if is_archive:
        holds = Path(download.holds).relative_to(download.path).as_posix() if download.holds else ""
        compared += f"; {extract(file, file.parent, download.strip, holds):,} files extracted into {file.parent}"
    record = {"address": address, "size": size, "checksum": checksum, "compared": compared}
    write_json(_marker(file), record | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
    if is_archive and not options.keep_archives:
        file.unlink()
    print(f"  {file.name}: {size / 1e6:,.1f} MB, {compared}", flush=True)


def _fetch_hub(about: About, root: Path) -> None:
    """The Parquet copy on the hub, which resumes and checks by itself."""
    import huggingface_hub

    from kvutils.datasets.hub import revision_of

    _need_room(about.gigabytes * 1e9, root, "needed")
    folder, revision = root / about.name, revision_of(about.hub)
    try:
        huggingface_hub.snapshot_download(about.hub, repo_type="dataset", revision=revision, local_dir=folder,
                                          allow_patterns=list(about.hub_files))
    except Exception as error:  # whatever the hub's client and the network raise
        raise DataError(f"{about.hub} on the hub: {_reason(error)}; the same command goes on") from error
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{about.hub} on the hub has no file like {', '.join(about.hub_files)}")
    write_json(_marker(folder / "hub"), {"repository": about.hub, "revision": revision, "files": files})
    print(f"  {about.hub} @ {revision[:12]}: {len(files)} Parquet files in {folder}", flush=True)


def _need_room(size: float, folder: Path, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{size / 1e9:.1f} GB are {what}, but {free / 1e9:.1f} GB are free in {folder}; free some space and run the same command")


def _staging(archive: Path) -> Path:
    """Where `archive` is extracted before it is moved into place; there only while that is not finished."""
    return archive.with_name(f".{archive.name}.extracting")


def extract(archive: Path, target: Path, strip: str = "", holds: str = "") -> int:
    """Extract a zip, tar or gzipped tar into the folder `target`; returns how many files.

    Nothing in it can leave the folder: tarfile's "data" filter and zipfile see to that. Apple's resource forks (`__MACOSX`,
    `._*`) are left out. strip: a leading folder that is left out. holds: what must be in it, relative to `target`. Raises
    DataError for what is not such an archive (it becomes `<archive>.bad`, and nothing is left of it), OSError for a full disk.
    """
    staging = _staging(archive)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    print(f"  {archive.name}: extracting", flush=True)
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                _need_room(sum(info.file_size for info in opened.infolist()), target, f"needed to extract {archive.name}")
                opened.extractall(staging)
        else:
            with tarfile.open(archive) as opened:
                _need_room(sum(info.size for info in opened), target, f"needed to extract {archive.name}")
                opened.extractall(staging, filter="data")
        if holds and not (staging / strip / holds).exists():
            found = ", ".join(sorted(path.name for path in staging.iterdir())[:8]) or "nothing"
            raise DataError(f"{archive.name}: expected {holds} in it, found {found}")
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, BROKEN) or isinstance(error, OSError) and error.errno is None:  # gzip's own OSErrors
            os.replace(archive, archive.with_name(archive.name + ".bad"))
            raise DataError(f"{archive.name} is damaged, or no archive to trust: {error}. It is kept as {archive.name}.bad") from error
        raise
    count = _move(staging / strip, target)  # stopped in here, the staging folder stays, and the next run extracts again
    shutil.rmtree(staging)
    return count


def _move(source: Path, target: Path) -> int:
    """Move the files in `source` into `target`, into the folders that are there already; returns how many."""
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and entry.name != "__MACOSX":
            count += _move(entry, target / entry.name)
        elif not entry.name.startswith(("._", "__MACOSX")):
            shutil.move(entry, target / entry.name)  # into a folder on another disk, too
            count += 1
    return count


def receive(addresses: Sequence[str], part: Path, size: int | None = None, room: int = 1) -> str:
    """Receive the file `part` whole, going on where it stopped, from the first address that has it; returns that address.

    size: the bytes it must have, if known. room: how many times its size must be free on the disk. Raises DataError
    that says what went wrong and what is kept; OSError where the disk is full.
    """
    for url in addresses:
        most, failures = _length(part), 0
        while failures < TRIES:
            try:
                _receive(url, part, size, room)
                return url
            except Dropped as error:
                why, arrived = error, _length(part)
                most, failures = max(most, arrived), 1 if arrived > most else failures + 1
                print(f"  {part.stem}: {error}", flush=True)
                time.sleep(PAUSE * 2 ** (failures - 1) if failures < TRIES else 0)
            except DataError as error:
                why, failures = error, TRIES
        if url != addresses[-1]:
            print(f"  {part.stem}: {why}; trying another address", flush=True)
    kept = f"; {_length(part) / 1e6:,.1f} MB are kept, the same command goes on" if _length(part) else ""
    raise DataError(f"{part.stem} from {url}: {why}{kept}")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _receive(url: str, part: Path, size: int | None, room: int) -> None:
    """Go on receiving, or begin. Raises Dropped for what may pass, DataError for what will not."""
    have = _length(part)
    if have and have == size:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": f"kvutils/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=WAIT) as answer:
            have, total = _extent(answer, part, have)
            if size and total and total != size:
                raise DataError(f"expected {size:,} bytes, but the server has {total:,}: it is another file by now "
                                "(--accept-changed takes it)")
            _need_room((total or size or 0) * room - have, part.parent, "needed to download" + " and extract" * (room > 1))
            bar = tqdm(total=total or size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None, leave=False)
            with open(part, "ab" if have else "wb") as out, bar:
                for block in answer.iter_content(BLOCK):
                    bar.update(out.write(block))
    except (requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects) as error:
        raise DataError(f"the server leads elsewhere ({error})") from error
    except requests.RequestException as error:
        raise Dropped(f"no connection, or lost at byte {_length(part):,} ({type(error).__name__})") from error
    if total and _length(part) < total:
        raise Dropped(f"connection lost after {_length(part):,} of {total:,} bytes")


def _extent(answer: requests.Response, part: Path, have: int) -> tuple[int, int | None]:
    """(the bytes that are kept, those that the whole file has); raises for an answer that is not the file."""
    status = answer.status_code
    if status in (408, 425, 429) or status >= 500:
        raise Dropped(f"the server answers {status} {answer.reason}")
    if status == 416 or status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink()
        raise Dropped("the server cannot go on where it stopped: from the start")
    if status not in (200, 206):
        raise DataError(f"the server answers {status} {answer.reason}: the file may have moved, or want a login")
    if status == 200 and answer.headers.get("Content-Type", "").startswith("text/html"):
        raise DataError("the server sends a web page instead of the file: it may have moved, or want a login")
    have = have if status == 206 else 0
    length = answer.headers.get("Content-Length", "")
    plain = answer.headers.get("Content-Encoding", "identity") == "identity"
    return have, have + int(length) if length.isdigit() and plain else None
