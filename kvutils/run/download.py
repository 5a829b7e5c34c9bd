"""Fetch real data sets below `KVUTILS_DATA`: `make data DATASETS="NAME ..."`, `kvutils data NAME ...`.

What is there is not fetched again (nor looked into: the loaders do that). A file arrives as `<file>.part`; after a lost connection,
a full disk or Ctrl-C the same command goes on. Its size and checksum are compared with the published ones, and one that differs
becomes `<file>.bad`; archives are extracted beside the target, moved into place when complete, and removed. `<file>.fetched.json`
records address, size, checksum, date, and what they were compared with. Data sets without free official files come as Parquet from
the Hugging Face hub; for those behind a login the steps for a person are shown."""

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

import huggingface_hub
import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from kvutils import __version__
from kvutils.datasets.catalog import CATALOG, About, Download, data_root
from kvutils.errors import DataError, KVUtilsError, ParameterError, one_of
from kvutils.run import BY_HAND, DONE, FAILED
from kvutils.store import need_writable, read_json, write_json

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")
TRIES = 5  # in a row without a single new byte
PAUSE = 2.0  # seconds before the second try, twice as long before each further one
WAIT = (20, 60)  # seconds for a connection, for the next bytes
BLOCK = 1 << 16
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError)  # the last: encrypted


def fetch(options: argparse.Namespace) -> int:
    """What `kvutils data` does; returns the exit code. Only one such command works in a folder at a time."""
    if not options.names:
        return _list(data_root())
    names, root = [], data_root()
    for name in options.names:
        found = [each for each in CATALOG if each.startswith(name)]  # "davis" is davis-2017: only one begins so
        names.append(found[0] if len(found) == 1 else name)
        one_of("data set", names[-1], CATALOG)
    if root is None:
        raise ParameterError("KVUTILS_DATA is not set. It names the folder for the real data sets, such as\n"
                             f'  make data DATASETS="{" ".join(names)}" KVUTILS_DATA=$HOME/kvutils-data')
    need_writable(root, "KVUTILS_DATA")
    lock = FileLock(root / ".download.lock", fallback_to_soft=False)  # it goes with the process, however that ends
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"another command fetches into {root}: waiting until it is done", flush=True)
        held = lock.acquire()
    with held:
        results = {name: _fetch_set(CATALOG[name], root, options) for name in names}
    for code, said in {DONE: "there", BY_HAND: "left to do by hand", FAILED: "failed"}.items():
        if some := [name for name in results if results[name] == code]:
            print(f"{said}: {', '.join(some)}")
    return FAILED if FAILED in results.values() else max(results.values())


def _list(root: Path | None) -> int:
    print(f"data sets below {root} (KVUTILS_DATA)" if root else "KVUTILS_DATA, the folder for data sets, is not set")
    print(f"\n  {'name':11} {'state':8} {'GB':>5}  {'how':14} licence")
    for about in CATALOG.values():
        state = "?" if root is None else "present" if _is_there(about, root) else "missing"
        print(f"  {about.name:11} {state:8} {about.to_get:5.2g}  {about.how:14} {about.licence}")
    print('\nget some:  make data DATASETS="davis-2017 pope"   (by hand: shows the steps)')
    return DONE


def _is_there(about: About, root: Path) -> bool:
    hub_copy = _record(root / about.name / "hub").get("files", [])
    official = [_has(download, root) for download in about.downloads]
    official += [any(any(root.glob(pattern)) for pattern in either.split("|")) for either in about.by_hand]
    return any(found and all(found) for found in (official, [(root / about.name / file).is_file() for file in hub_copy]))


def _has(download: Download, root: Path) -> bool:
    """Whether a file, or what an archive brings, is there: fetched from this address, or put there by hand (of lists other
    versions are in circulation)."""
    file = _file(download, root)
    if _staging(file).exists() or not (root / (download.holds or download.path)).exists():
        return False
    if record := _record(file):
        return record["address"] in (download.url, *download.mirrors)
    return file.name.endswith(ARCHIVES) or not download.checksum or _checksum(file, download.checksum) == download.checksum


def _file(download: Download, root: Path) -> Path:
    name = unquote(urlsplit(download.url).path).rpartition("/")[2]
    return root / download.path / name if name.endswith(ARCHIVES) else root / download.path


def _marker(file: Path) -> Path:
    return file.with_name(file.name + ".fetched.json")


def _record(file: Path) -> dict:
    return read_json(_marker(file)) if _marker(file).is_file() else {}


def _checksum(file: Path, like: str) -> str:
    """`md5:...` or `sha256:...`, of the kind of `like` (sha256 where that is empty)."""
    kind = like.partition(":")[0] or "sha256"
    with open(file, "rb") as opened:
        return f"{kind}:{hashlib.file_digest(opened, partial(hashlib.new, kind, usedforsecurity=False)).hexdigest()}"


def _fetch_set(about: About, root: Path, options: argparse.Namespace) -> int:
    print(f"{about.name}: {about.title}, {about.to_get:.2g} GB, {about.licence}", flush=True)
    if _is_there(about, root):
        print(f"  all there already in {root / about.name}")
        return DONE
    jobs = [partial(_fetch, download, root, options) for download in about.downloads]
    if about.hub and (options.hub or not jobs):
        jobs = [partial(_fetch_hub, about, root)]
    code = DONE
    for job in jobs:
        try:
            job()
        except (OSError, KVUtilsError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                error = "the disk is full; what has arrived is kept. Free some space and run the same command: it goes on."
            print(f"  failed: {error}", flush=True)
            code = FAILED
    if about.steps and (code or not _is_there(about, root)):
        print(f"  left to do by hand, see {about.source}:")
        for number, step in enumerate(about.steps, start=1):
            print(f"    {number}. {step.replace('$KVUTILS_DATA', str(root))}")
        code = code or BY_HAND
    return code


def _fetch(download: Download, root: Path, options: argparse.Namespace) -> None:
    """One file or archive, unless it is there. Raises DataError or OSError that says what to do."""
    if _has(download, root):
        return
    file = source = _file(download, root)
    address, is_archive, bad = download.url, file.name.endswith(ARCHIVES), file.with_name(file.name + ".bad")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (is_archive and file.is_file()):  # an archive that was not yet extracted, or was put there by hand
        source = file.with_name(file.name + ".part")
        if not download.checksum:  # nothing would tell halves of two versions from one file
            source.unlink(missing_ok=True)
        address = receive((download.url, *download.mirrors), source, download.size, room=2 if is_archive else 1)
    found = {"size": source.stat().st_size, "checksum": _checksum(source, download.checksum)}
    wanted = {"size": download.size, "checksum": download.checksum}
    wrong = "; ".join(f"expected {what} {wanted[what]}, found {found[what]}" for what in found if wanted[what] not in (None, "", found[what]))
    compared = f"{found['checksum'].partition(':')[0]} as published"
    if wrong and not options.accept_changed:
        os.replace(source, bad)
        raise DataError(f"{file.name} is not the published file: {wrong}. It is kept as {bad}; the next run begins anew "
                        "(--accept-changed takes it as it is)")
    if wrong:
        compared = f"NOT the published file: {wrong}"
    elif not download.checksum:
        compared = f"no checksum is published, nothing to compare with; {found['checksum']} is in {_marker(file).name}"
    if file != source and file.exists():
        os.replace(file, bad)
        compared += f"; the other version that was there is now {bad.name}"
    os.replace(source, file)
    if is_archive:
        holds = Path(download.holds).relative_to(download.path).as_posix() if download.holds else ""
        compared += f"; {extract(file, file.parent, download.strip, holds):,} files extracted into {file.parent}"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(_marker(file), {"address": address, **found, "compared": compared, "date": date})
    if is_archive and not options.keep_archives:
        file.unlink()
    print(f"  {file.name}: {found['size'] / 1e6:,.1f} MB, {compared}", flush=True)


def _fetch_hub(about: About, root: Path) -> None:
    """The Parquet copy on the hub, at the revision that `kvutils.datasets.hub` holds; it resumes and checks by itself."""
    from kvutils.datasets.hub import revision_of
    _need_room(about.gigabytes * 1e9, root, "needed")
    folder, revision = root / about.name, revision_of(about.hub)
    try:
        huggingface_hub.snapshot_download(about.hub, repo_type="dataset", revision=revision, local_dir=folder, allow_patterns=list(about.hub_files))
    except Exception as error:  # whatever the hub's client and the network raise
        raise DataError(f"{about.hub} on the hub: {error}; the same command goes on") from error
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    write_json(_marker(folder / "hub"), {"repository": about.hub, "revision": revision, "files": files})
    print(f"  {about.hub} @ {revision[:12]}: {len(files)} Parquet files in {folder}", flush=True)


def _need_room(size: float, folder: Path, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{size / 1e9:.1f} GB are {what}, but {free / 1e9:.1f} GB are free in {folder}")


def _staging(archive: Path) -> Path:
    """Where `archive` is extracted before it is moved into place; there only while that is not finished."""
    return archive.with_name(f".{archive.name}.extracting")


def extract(archive: Path, target: Path, strip: str = "", holds: str = "") -> int:
    """Extract a zip, tar or gzipped tar into the folder `target`, without Apple's resource forks; returns how many files.
    Nothing in it can leave the folder: the standard library sees to that. strip: a leading folder that is left out. holds:
    what must be in it, relative to `target`. DataError for what is no such archive (it becomes `<archive>.bad`)."""
    staging = _staging(archive)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    print(f"  {archive.name}: extracting", flush=True)
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:  # shutil would skip every name with ".." in it, without a word
                opened.extractall(staging)
        else:
            shutil.unpack_archive(archive, staging, filter="data")
        if holds and not (staging / strip / holds).exists():
            found = ", ".join(sorted(path.name for path in staging.iterdir())[:8]) or "nothing"
            raise DataError(f"{archive.name}: expected {holds} in it, found {found}")
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, BROKEN) or isinstance(error, OSError) and error.errno is None:  # gzip's and shutil's own
            os.replace(archive, archive.with_name(archive.name + ".bad"))
            raise DataError(f"{archive.name} is damaged, or no archive to trust: {error}. It is kept as {archive.name}.bad") from error
        raise
    files = [file.relative_to(staging / strip) for file in sorted((staging / strip).rglob("*"))
             if not file.is_dir() and not file.name.startswith("._") and "__MACOSX" not in file.parts]
    for file in files:  # stopped in here, the staging folder stays, and the next run extracts again
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging / strip / file, target / file)  # into a folder on another disk, too
    shutil.rmtree(staging)
    return len(files)


def receive(addresses: Sequence[str], part: Path, size: int | None, room: int) -> str:
    """Receive the file `part` whole, going on where it stopped, from the first address that has it; returns that address.
    size: its bytes, if known. room: how many times them must be free on the disk. DataError says what is kept."""
    addresses, failures = list(addresses), 0
    while True:
        before = _length(part)
        try:
            _receive(addresses[0], part, size, room)
            return addresses[0]
        except (requests.RequestException, DataError) as error:
            failures = 1 if _length(part) > before else failures + 1
            final = isinstance(error, DataError) or failures == TRIES
            if final and len(addresses) == 1:
                kept = f"; {_length(part) / 1e6:,.1f} MB are kept, the same command goes on" if _length(part) else ""
                raise DataError(f"{part.stem} from {addresses[0]}: {error}{kept}") from error
            print(f"  {part.stem}: {error}; trying {'another address' if final else 'again'}", flush=True)
        if final:
            addresses, failures = addresses[1:], 0
        time.sleep(PAUSE / 2 * 2**failures)


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _receive(url: str, part: Path, size: int | None, room: int) -> None:
    """Go on receiving, or begin. Raises RequestException for what may pass, DataError for what will not."""
    have = _length(part)
    if have and have == size:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": f"kvutils/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=WAIT) as answer:
        status, place = answer.status_code, answer.headers.get("Content-Range", "")
        if status == 416 or status == 206 and not place.startswith(f"bytes {have}-"):
            part.unlink()
            raise requests.ConnectionError("the server cannot go on where it stopped: from the start")
        if status in (408, 425, 429) or status >= 500:
            answer.raise_for_status()
        if status not in (200, 206) or answer.headers.get("Content-Type", "").startswith("text/html"):
            found = "a web page" if status == 200 else f"{status} {answer.reason}"
            raise DataError(f"the server answers {found}: the file may have moved, or want a login")
        have = have if status == 206 else 0
        total = have + int(answer.headers.get("Content-Length", 0)) or size or 0
        _need_room(total * room - have, part.parent, "needed to download" + " and extract" * (room > 1))
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None, leave=False)
        with open(part, "ab" if have else "wb") as out, bar:
            for block in answer.iter_content(BLOCK):
                bar.update(out.write(block))
