"""Results and parts of a run on disk: written whole or not at all, checked when read, reused only while valid.

Every write goes to a file of its own in the same folder, which is then renamed over the target: a killed run or a full disk leaves the
previous file, and processes, GPUs and nodes with a common file system share the parts of one run (`Parts.make_all`)."""

import ast
import hashlib
import json
import logging
import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from tqdm import tqdm

from kvutils.errors import StoreError, at_least, not_written, one_of

log = logging.getLogger(__name__)
WAIT = 0.5  # seconds between two looks at a part that another process computes
PACKAGE = Path(__file__).resolve().parent
NOT_MEASURING = ("plots/", "explorer/", "run/", "__main__")  # rooms that draw and report: a change there leaves stored parts valid


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an exception."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors makes files that others cannot read
        yield temporary
        with open(temporary, "rb+") as file:  # Windows syncs no file that is only read
            os.fsync(file.fileno())  # otherwise a power cut may leave the new name with old or no content
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is left
            temporary.unlink(missing_ok=True)


def need_writable(folder: Path, how: str) -> None:
    """StoreError unless files can be written into `folder`, which is made. how: what names another one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise StoreError(f"nothing was started: {folder} cannot be written ({error.strerror}). Name another folder with {how}.") from error


def plain(value: object, digits: int | None = None, where: str = "the value") -> object:
    """`value` in JSON's own types: arrays become lists, NaN (undefined) None; floats with so many significant `digits`. Raises
    `StoreError` that names the entry for infinities and types that JSON does not have."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and math.isinf(value):
        raise StoreError(f"{where} is {value}: only finite numbers can be stored.")
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{digits}g}") if digits else value
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            raise StoreError(f"{where} has keys other than strings and integers: {list(value)!r}")
        return {str(key): plain(item, digits, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        if not digits and {*map(type, value)} == {float} and all(map(math.isfinite, value)):
            return list(value)  # long ones at once
        return [plain(item, digits, f"{where}[{i}]") for i, item in enumerate(value)]
    raise StoreError(f"{where} is a {type(value).__name__}, which JSON cannot hold: {value!r}")


def to_json(value: object, indent: int | None = 1, digits: int | None = None, sort: bool = True) -> str:
    """Canonical JSON text: sorted keys, no NaN, a newline at the end; floats with `digits` digits. Same content, same bytes."""
    return json.dumps(plain(value, digits), sort_keys=sort, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def digest(value: object) -> str:
    """16 hex digits of a JSON-able value."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:16]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically (UTF-8, "\\n")."""
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | Path, value: object, digits: int | None = None) -> None:
    """Write `value` as canonical JSON, atomically. digits: of results 9, which another machine's last bits do not reach."""
    write_text(path, to_json(value, digits=digits))


def read_json(path: str | Path, kind: type = dict) -> dict | list:
    """Read a JSON file of a `dict` or `list`; a missing or unreadable one is a `StoreError`."""
    try:
        one_of("content", type(found := json.loads(Path(path).read_text(encoding="utf-8"))).__name__, (kind.__name__,), ValueError)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON ({error}). Remove it and make it again.") from error
    return found


@dataclass(frozen=True, eq=False)
class Frame:
    """A table for a Parquet file, one row per item: columns of n numbers, (n, k) numbers, texts or lists of texts (None: not there);
    about: what is said of the whole table, JSON-able."""

    columns: Mapping[str, np.ndarray | Sequence]
    about: Mapping = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray | list:
        one_of("column of the table", name, self.columns, StoreError)
        return self.columns[name]


def write_frame(path: str | Path, frame: Frame) -> None:
    """Write a table as Parquet, atomically: exactly its content and a checksum of it; the same content gives the same bytes."""
    import pyarrow
    from pyarrow.parquet import write_table
    table = pyarrow.table({name: pyarrow.array(list(each), pyarrow.list_(pyarrow.from_numpy_dtype(each.dtype), each.shape[1]))
                           if getattr(each, "ndim", 1) == 2 else pyarrow.array(each) for name, each in frame.columns.items()})  # fmt: skip
    note = to_json({"about": frame.about, "sha256": _content(table, frame.about)[1]}, indent=None, sort=False)
    numbers = [name for name, each in frame.columns.items() if getattr(each, "dtype", None) in (np.float32, np.float64) and each.ndim == 1]
    with atomic(Path(path)) as temporary:  # bytes of numbers by their place: a quarter less of scores than in a dictionary
        write_table(table.replace_schema_metadata({"kvutils": note}), temporary, compression="zstd", write_statistics=False,
                    use_byte_stream_split=numbers, use_dictionary=[each for each in frame.columns if each not in numbers])  # fmt: skip


def read_frame(path: str | Path) -> Frame:
    """A table that `write_frame` wrote: numbers as arrays, all else as lists. StoreError for one that is missing, damaged or changed."""
    from pyarrow.parquet import read_table
    try:
        table = read_table(path)
        note = json.loads((table.schema.metadata or {}).get(b"kvutils", b'{"about": {}, "sha256": ""}'))
        columns, found = _content(table, note["about"])
        if note["sha256"] != found:
            raise ValueError("its content does not match its checksum: it was changed after the run")
    except (OSError, LookupError, TypeError, ValueError, NotImplementedError) as error:  # what pyarrow raises is one of them
        raise StoreError(f"{path} cannot be read as a table ({error}). Take the run's own file, or run its notebook again.") from error
    return Frame(columns, note["about"])


def _content(table, about: Mapping) -> tuple[dict[str, np.ndarray | list], str]:
    """The columns of a pyarrow table as they are read, and the checksum of them and what is said about them."""
    from pyarrow import compute, types
    columns = {name: each.to_numpy() if types.is_primitive(each.type) and not each.null_count else each.to_pylist() if not
               types.is_fixed_size_list(each.type) else compute.list_flatten(each).to_numpy().reshape(-1, each.type.list_size)
               for name, each in zip(table.column_names, table.columns, strict=True)}  # fmt: skip
    arrays = {name: torch.tensor(each) for name, each in columns.items() if isinstance(each, np.ndarray)}
    return columns, _checksum(arrays, [about, list(columns), [each for name, each in columns.items() if name not in arrays]])


@cache
def code_version() -> str:
    """16 hex digits of the code that measures, the same under every Python; mending comments, docstrings, layout costs no measurement."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith(NOT_MEASURING):
            found.update(f"{name}\0{_meaning(ast.parse(path.read_text(encoding='utf-8'), name))}\0".encode())
    return found.hexdigest()[:16]


def _meaning(node: object) -> object:
    """A syntax tree as nested lists, without texts that are statements and without what is empty, of which Pythons differ."""
    if isinstance(node, list):
        return [_meaning(each) for each in node if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    if isinstance(node, ast.JoinedStr):  # 3.12 ends some with an empty text
        return ["JoinedStr", [_meaning(each) for each in node.values if getattr(each, "value", None) != ""]]
    if isinstance(node, ast.AST):
        fields = [[name, _meaning(value)] for name, value in ast.iter_fields(node) if value is not None and value != []]
        return [type(node).__name__, fields]
    return node


def fingerprint(**depends: object) -> str:
    """16 hex digits of all that a result depends on: `depends` (JSON-able), library versions, code."""
    libraries = {name: version(name) for name in ("torch", "transformers", "numpy", "scikit-learn", "pillow")}
    return digest({"depends": depends, "libraries": libraries, "code": code_version()})


class Parts:
    """The finished parts of one run, in `root/<fingerprint>/`: one safetensors file each, with its checksum in the header. Stale parts are
    not found; one that is truncated or altered counts as missing (the log says so) and is made again.

    >>> parts = Parts("data/cache/parts", model=mlm.revision, episodes=100, seed=0)
    >>> table = run_task(task, extractor, parts)   # chunks are computed once, then read
    """

    def __init__(self, root: str | Path, by: str = "", **depends: object):
        self.folder, self.by = Path(root) / fingerprint(**depends), by
        self.seconds: dict[str, float] = {}  # what each part took that was read and made `by` the same, whenever, in whichever process
        self.busy = 0.0  # CPU seconds of this process in parts
        for left in self.folder.rglob(".*.tmp"):
            with suppress(FileNotFoundError):  # another run has just finished writing it
                if time.time() - left.stat().st_mtime > 3600:  # left by a killed run: no write takes an hour
                    left.unlink()
        if not (self.folder / "depends.json").exists():
            write_json(self.folder / "depends.json", depends)

    def path(self, key: str) -> Path:
        """The file of a part; keys may contain "/" (folders)."""
        return self.folder / f"{key}.safetensors"

    def finished(self, key: str) -> bool:
        """Whether the part `key` is stored and intact (reads it whole, to check it)."""
        return self._read(key) is not None

    def save(self, key: str, value: object, seconds: float = 0.0) -> None:
        """Save a JSON-able value, or a non-empty dict of tensors on any device. seconds: that computing it took."""
        tensors = {}
        if isinstance(value, dict) and value and all(isinstance(item, torch.Tensor) for item in value.values()):
            # A copy of its own for each: safetensors refuses views that share memory.
            options = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
            tensors, value = {name: item.detach().to(**options) for name, item in value.items()}, None
        text = to_json(value, indent=None)  # as a text, which is the same when it is read and checked
        about = to_json({"value": text, "sha256": _checksum(tensors, text), "seconds": round(seconds, 3), "by": self.by}, indent=None)
        with atomic(self.path(key)) as temporary:
            save_file(tensors, temporary, {"kvutils": about})  # one entry: safetensors writes several in no fixed order

    def load(self, key: str) -> object:
        """What was saved under `key`; `StoreError` if it is not finished."""
        if (found := self._read(key)) is None:
            raise StoreError(f"part {key!r} is not finished in {self.folder}: compute and save it first.")
        return found[0]

    def _read(self, key: str) -> tuple[object] | None:
        if not (path := self.path(key)).exists():
            return None
        try:
            content = path.read_bytes()  # once: another process may put a new file in its place meanwhile
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about, tensors = json.loads(header["__metadata__"]["kvutils"]), load(content)
            if about["sha256"] != _checksum(tensors, about["value"]):
                raise ValueError("its content does not match its checksum")
            if about["by"] == self.by:
                self.seconds[key] = about["seconds"]
            return (tensors or json.loads(about["value"]),)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s): treated as missing, made again", path, error)
            return None

    def make_all(self, jobs: Sequence[tuple[str, Callable[[], object]]]) -> Iterator[object]:
        """The parts of all jobs (key, compute), in order, as the files hold them: a resumed run goes on from the same values. Processes that
        run the same jobs in this folder share them: a part is computed by the one that locks it first, and while one waits for a part of
        another it computes those that come later. A process that dies loses its locks, so another computes its part."""
        ahead = 0  # everything before it was finished or somebody's when it was last looked at
        for place, (key, compute) in enumerate(jobs):
            ahead = max(ahead, place + 1)
            while (found := self._read(key)) is None and not self._claims(key, compute):
                while ahead < len(jobs) and not self._claims(*jobs[ahead]):
                    ahead += 1
                if ahead == len(jobs):
                    time.sleep(WAIT)
            yield self.load(key) if found is None else found[0]

    def _claims(self, key: str, compute: Callable[[], object]) -> bool:
        """Compute and save a part that is neither finished nor another process's; whether that was done."""
        path = self.folder / ".locks" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.lock"
        lock = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft one would outlive its process
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            return False
        except OSError as error:  # also of a file system without locks
            raise not_written(f"{path}, a file lock by which runs share work,", error) from error
        try:  # apart from the above: what `compute` raises says nothing about this lock
            if self.finished(key):
                return False
            start, busy = time.monotonic(), time.process_time()
            self.save(key, compute(), time.monotonic() - start)
            self.busy += time.process_time() - busy
            return True
        finally:
            lock.release()


def _checksum(tensors: Mapping[str, torch.Tensor], value: object) -> str:
    """sha256 over names, types, shapes and bytes of all tensors and the value."""
    found = hashlib.sha256(to_json(value).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def in_chunks(parts: Parts | None, name: str, items: Sequence, compute: Callable[[list], object], size: int, depends: object = (),
              *, of: Callable[[object], object] = lambda item: item.id, unit: str = "sample", progress: bool = True) -> Iterator:
    """`compute(some)` for `size` items at a time, in order: the long work of every task. With `parts`, finished chunks are kept
    under `name` and all that they depend on, `depends` and `of(item)` of their items (both JSON-able): a run that was stopped
    goes on, and several processes share the chunks. unit: an item, beside the progress bar."""
    at_least("chunk", size)
    jobs, starts = [], range(0, len(items), size)
    for start in starts:
        some = [items[i] for i in range(start, min(start + size, len(items)))]
        jobs.append((f"{name}/{start:06d}-{digest([depends, [of(one) for one in some]])}", partial(compute, some)))
    with tqdm(total=len(items), desc=name, unit=unit, disable=not progress) as bar:
        found = (compute() for _, compute in jobs) if parts is None else parts.make_all(jobs)
        for start, done in zip(starts, found, strict=True):
            bar.update(min(size, len(items) - start))
            yield done
