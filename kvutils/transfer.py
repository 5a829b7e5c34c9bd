"""Receive one file over HTTP: resumed where it stopped, with patience, and only if it is still the same file.

What has arrived is in `<file>.part`, what the server said of it (address, ETag or Last-Modified, size) in
`<file>.part.json`; the rest is asked for with `If-Range`, so that halves of two versions are never glued together.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from kvutils import __version__
from kvutils.errors import DataError
from kvutils.store import read_json, write_json

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
