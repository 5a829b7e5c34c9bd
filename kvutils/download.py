"""Fetch real data sets below `KVUTILS_DATA`: `make data DATASETS="NAME ..."`, `python -m kvutils.download NAME ...`.

Without a name: every data set, whether it is there, its size, its licence, and whether it is free. What is there is
not fetched again (nor looked into: the loaders do that). A file arrives as `<file>.part`; after a lost connection, a
full disk or Ctrl-C the same command goes on (`kvutils.transfer`). Its size and checksum are compared with the
published ones, and one that differs becomes `<file>.bad`; archives are extracted (`kvutils.archives`) and removed.
`<file>.fetched.json` beside it records address, size, sha256 and date, and whether there was a published checksum to
compare with. Data sets without free official files come as Parquet from the Hugging Face hub, at the revision that
`kvutils.datasets.hub` holds. For those behind a login the steps for a person are shown. Only one such command works
in a folder at a time; another one waits.

Exit codes: 0 everything is there; 1 something failed; 2 the command cannot be understood (unknown name or option,
KVUTILS_DATA is not set); 3 nothing failed, but something is left to do by hand; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from kvutils.archives import SUFFIXES, Damaged, extract, staging_folder
from kvutils.datasets.catalog import CATALOG, About, Download, data_root
from kvutils.errors import DataError, KVUtilsError
from kvutils.store import read_json, write_json
from kvutils.transfer import bytes_bar, notes_of, part_of, receive

OK, FAILED, MISUSED, BY_HAND, STOPPED = 0, 1, 2, 3, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvutils.download", description=__doc__,
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
