"""What is stored is whole, checked and still valid, or it counts as missing."""

import errno
import inspect
import json
import logging
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from kvutils import plots, store
from kvutils.errors import ParameterError, StoreError
from kvutils.store import Frame, Parts, code_version, fingerprint, in_chunks, read_frame, write_frame, write_json


def tensors() -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator)
    return {"x": x, "view": x[:, ::2], "half": x.to(torch.bfloat16), "empty": torch.zeros(0, 3),
            "turned": torch.arange(6).reshape(2, 3).T, "scalar": torch.tensor(2.5)}


def test_json_is_canonical_rounded_and_atomic(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": np.float64(0.5), "a": (np.int64(1), torch.tensor([1.5])), 3: float("nan")})
    assert path.read_bytes() == b'{\n "3": null,\n "a": [\n  1,\n  [\n   1.5\n  ]\n ],\n "b": 0.5\n}\n'
    write_json(path, {"a": [1 / 3, np.float64(2e9 / 3)], "n": 10**12 + 1, "text": "1/3"}, digits=9)
    assert json.loads(path.read_text()) == {"a": [0.333333333, 666666667.0], "n": 10**12 + 1, "text": "1/3"}
    again = path.read_bytes()
    write_json(path, json.loads(again), digits=9)
    assert path.read_bytes() == again and [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("value", "names"), [
    ({"curves": {"f": [1.0, -np.inf]}}, "curves.f[1] is -inf"),
    ({"a": np.array([np.inf])}, "a[0] is inf"),
    ({"a": object()}, "a is a object"),
    ({("a", 1): 2}, "keys other than strings and integers"),
])
def test_json_refuses_what_it_cannot_hold(tmp_path, value, names):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(StoreError) as error:
        write_json(path, value)
    assert names in str(error.value)
    assert json.loads(path.read_text()) == {"old": 1}


def test_values_and_tensors_come_back_as_they_were_saved(tmp_path):
    parts = Parts(tmp_path)
    assert not parts.finished("image/1")
    parts.save("image/1", tensors())
    found = parts.load("image/1")
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    for value in (None, 0, [], {}, {"scores": [0.1, 0.2], "note": None}):
        parts.save("value", value)
        assert parts.finished("value") and parts.load("value") == value
    with pytest.raises(StoreError, match="not finished"):
        parts.load("never")


def test_same_content_same_bytes(tmp_path):
    parts = Parts(tmp_path)
    for content in (tensors(), {"z": 1, "a": 2}):
        for key in ("a", "b"):
            parts.save(key, content)
        assert parts.path("a").read_bytes() == parts.path("b").read_bytes()


@pytest.mark.parametrize(("content", "damage"), [
    (tensors(), lambda data: data[:-5]), (tensors(), lambda data: b""), (tensors(), lambda data: b"not a safetensors file at all"),
    (tensors(), lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]),
    ([{"size": 1}], lambda data: data.replace(b"size", b"sise", 1)),
], ids=["truncate", "empty", "other file", "flip data", "flip header"])  # fmt: skip
def test_a_damaged_shard_counts_as_missing(tmp_path, caplog, content, damage):
    parts = Parts(tmp_path)
    parts.save("a", content)
    path = parts.path("a")
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert not parts.finished("a")
    assert str(path) in caplog.text and "made again" in caplog.text
    parts.save("a", tensors())
    assert parts.finished("a")


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of a file makes writes fail half-way, as a full disk does."""
    parts = Parts(tmp_path / "parts")
    parts.save("a", {"x": torch.ones(4)})
    write_json(tmp_path / "r.json", [1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(StoreError, match="could not be written"):
            parts.save("a", {"x": torch.ones(40_000)})
        with pytest.raises(StoreError, match="could not be written"):
            write_json(tmp_path / "r.json", list(range(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert parts.load("a")["x"].tolist() == [1, 1, 1, 1]
    assert json.loads((tmp_path / "r.json").read_text()) == [1]
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["a.safetensors", "depends.json", "r.json"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    """Marker files in their place would stay when their process dies on another machine, and all others wait for ever."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(StoreError, match="a file lock by which runs share work, could not be written .*not implemented.*KVUTILS_CACHE"):
        list(Parts(tmp_path, x=1).make_all([("part", lambda: 1)]))


def test_what_cannot_be_written_is_said_and_what_was_there_stays(tmp_path, monkeypatch):
    """Where a folder cannot be made, a part be locked or a figure be drawn."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory.*KVUTILS_CACHE"):
        Parts(tmp_path / "file" / "parts")
    parts = Parts(tmp_path / "parts")
    (parts.folder / ".locks").write_text("")
    with pytest.raises(StoreError, match="could not be written.*KVUTILS_CACHE"):
        list(parts.make_all([("a", dict)]))
    figure = plots.plt.figure()
    (picture,) = plots.save({"x": figure}, tmp_path)
    before = picture.read_bytes()

    def half(temporary, **_):
        Path(temporary).write_bytes(before[:99])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(StoreError, match="x.png could not be written .*No space left.*untouched"):
        plots.save({"x": figure}, tmp_path)
    assert picture.read_bytes() == before and not list(tmp_path.glob(".*.tmp"))


def _write_many(root: str, seed: int) -> None:
    parts = Parts(root)
    for _ in range(30):
        parts.save("a", {"x": torch.full((5_000,), seed)})


def test_two_writers_leave_whole_shards(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        parts = Parts(tmp_path)
        if parts.finished("a"):
            assert len(parts.load("a")["x"].unique()) == 1
            reads += 1
    assert reads and [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(p.name for p in parts.folder.iterdir()) == ["a.safetensors", "depends.json"]


def test_left_overs_of_killed_runs_go(tmp_path):
    old, new = (Parts(tmp_path).folder / name for name in (".1.tmp", ".2.tmp"))
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    Parts(tmp_path)
    assert not old.exists() and new.exists()


def test_parts_are_made_once_and_go_stale(tmp_path):
    made = []
    first, second = Parts(tmp_path, model="sha256:1", seed=0), Parts(tmp_path, seed=0, model="sha256:1")
    for parts in (first, second):
        assert list(parts.make_all([("t", lambda: made.append(1) or {"scores": [0.1]})])) == [{"scores": [0.1]}]
    assert len(made) == 1 and first.finished("t")
    assert not Parts(tmp_path, model="sha256:1", seed=1).finished("t")
    assert not Parts(tmp_path, model="sha256:1", seed=0, extra=None).finished("t")


@pytest.mark.parametrize("kept", [True, False])
def test_chunks_are_computed_in_order_and_kept_under_what_they_depend_on(tmp_path, kept, capsys):
    parts, taken = Parts(tmp_path) if kept else None, []

    def compute(some):
        taken.append(some)
        return [2 * item for item in some]

    def run(items, depends=(), size=2):
        return list(in_chunks(parts, "twice", items, compute, size, depends, of=int, unit="number"))

    assert run(range(5)) == [[0, 2], [4, 6], [8]] and taken == [[0, 1], [2, 3], [4]]
    assert "twice" in (shown := capsys.readouterr().err) and "5/5" in shown and "number" in shown
    assert run([0, 1, 2, 7, 4]) == [[0, 2], [4, 14], [8]] and len(taken) == (4 if kept else 6)  # one chunk has other items
    run(range(5), depends=["another model"])
    assert len(taken) == (7 if kept else 9)
    with pytest.raises(ParameterError, match="chunk"):
        run(range(5), size=0)


CODE = '''
import a.b as c
@d
class E(F):
    """What."""
    async def f(self, x: int = 1, *, y=None, **z) -> list[int]:
        g, h = f"{x!r:>{y}} {x:<{len(z)}}", lambda: (yield)
        return [*range(-x)] if x else None
def nothing(): pass
match x:
    case {"k": [1, *_], **rest} if not rest: del x[1:], y
with open("") as file: assert b"\\0" < file <= 1e-3j or ...
'''


def test_the_same_code_has_the_same_fingerprint_under_every_python(tmp_path, monkeypatch):
    """Under the one that runs the tests it is what 3.11, 3.12 and 3.13 gave; and the others that are here are asked."""
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    code_version.cache_clear()
    assert code_version() == "57fcf792ec9ceb5d"
    code_version.cache_clear()
    monkeypatch.undo()
    alone = "\n".join(["import ast, hashlib", "from pathlib import Path", "from functools import cache",
                       f"PACKAGE, NOT_MEASURING = Path({str(store.PACKAGE)!r}), {store.NOT_MEASURING!r}",
                       *map(inspect.getsource, (store._meaning, code_version.__wrapped__)), "print(code_version())"])  # fmt: skip
    for name in filter(shutil.which, ("python3.11", "python3.12", "python3.13", "python3.14")):
        asked = subprocess.run([name, "-c", alone], capture_output=True, text=True)
        assert asked.stdout.strip() in ("", code_version()), name  # a launcher without an interpreter behind it says nothing


def test_the_fingerprint_follows_the_code_but_not_its_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / "plots").mkdir()

    def of(probes, style="x = 1\n", seed=0):
        (tmp_path / "probes.py").write_text(probes)
        (tmp_path / "plots/style.py").write_text(style)
        code_version.cache_clear()  # it is asked for once per run
        return fingerprint(seed=seed)

    before = of("x = 1\n")
    assert before == of('"""What."""\n# why\nx  =  1\n', style="x = 2\n")
    assert before != of("x = 2\n") and before != of("x = 1\n", seed=1)
    code_version.cache_clear()


def test_a_table_comes_back_exactly_or_is_refused(tmp_path):
    columns = {"id": ["a", "b", None], "x": np.array([0.1, np.nan, -0.0]), "wide": np.arange(6, dtype="float32").reshape(3, 2),
               "yes": np.array([True, False, True]), "names": [["a"], [], ["b", "c"]], "some": [1.5, None, 2.0]}  # fmt: skip
    first, again = tmp_path / "new" / "a.parquet", tmp_path / "b.parquet"

    def holds(frame: Frame) -> bool:
        arrays = [name for name, column in columns.items() if isinstance(column, np.ndarray)]
        exact = all(frame[name].dtype == columns[name].dtype and frame[name].tobytes() == columns[name].tobytes() for name in arrays)
        return exact and list(frame.columns) == list(columns) and all(frame[name] == columns[name] for name in columns.keys() - arrays)

    write_frame(first, Frame(columns, {"skipped": {"c": "why"}}))
    found = read_frame(first)
    write_frame(again, found)
    assert holds(found) and first.read_bytes() == again.read_bytes() and found.about == {"skipped": {"c": "why"}}
    data, refused = first.read_bytes(), 0
    for place in range(0, len(data), 23):
        first.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert holds(read_frame(first)), place  # a byte of no meaning
        except StoreError as error:
            assert "a.parquet cannot be read as a table" in str(error)
            refused += 1
    assert refused > len(data) / 23 / 4
    for left in (data[:-5], data[:100], b""):
        first.write_bytes(left)
        with pytest.raises(StoreError, match="a.parquet cannot be read as a table"):
            read_frame(first)


def test_a_table_that_was_edited_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_frame(path, Frame({"id": ["a", "b"], "x": np.array([0.1, 0.2])}))
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(1, "x", [[0.1, 0.3]]), path)
    with pytest.raises(StoreError, match="changed after the run"):
        read_frame(path)
    parquet.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(StoreError, match="changed after the run"):
        read_frame(path)
    with pytest.raises(StoreError, match="unknown column of the table 'y'.*one of id, x"):
        Frame({"id": ["a"], "x": [1]})["y"]


def test_the_time_that_parts_took_is_kept_with_them(tmp_path):
    """Also for a run that finds them finished: by it, or by another process."""
    def slow() -> int:
        time.sleep(0.02)
        return 1

    first, second = Parts(tmp_path), Parts(tmp_path)
    assert list(first.make_all([("a", slow), ("b", slow)])) == [1, 1] and list(second.make_all([("b", None), ("a", None), ("b", None)])) == [1, 1, 1]
    assert first.seconds == second.seconds and all(0.02 <= each < 5 for each in first.seconds.values()) and first.seconds.keys() == {"a", "b"}
    (third := Parts(tmp_path, "another notebook")).load("a")
    assert third.seconds == {}  # what several read is counted once


def test_files_can_be_read_by_those_whom_the_umask_allows(tmp_path):
    """safetensors makes files that only their owner can read: of no use on a disk that several share."""
    before = os.umask(0o022)
    try:
        Parts(tmp_path, seed=0).make_all([("one", lambda: {"x": torch.ones(2)})]).__next__()
    finally:
        os.umask(before)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o644
