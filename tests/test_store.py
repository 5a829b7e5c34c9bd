"""What is stored is whole, checked and still valid, or it counts as missing."""

import json
import logging
import multiprocessing
import os
import resource

import numpy as np
import pytest
import torch

from kvutils import store
from kvutils.errors import StoreError
from kvutils.store import Parts, Store, code_version, fingerprint, rounded, write_json


def tensors() -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator)
    return {"x": x, "view": x[:, ::2], "half": x.to(torch.bfloat16), "empty": torch.zeros(0, 3),
            "array": np.arange(6, dtype=np.int64).reshape(2, 3).T, "scalar": np.array(2.5)}


def test_json_is_canonical_and_atomic(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": np.float64(0.5), "a": (np.int64(1), torch.tensor([1.5])), 3: float("nan")})
    assert path.read_bytes() == b'{\n "3": null,\n "a": [\n  1,\n  [\n   1.5\n  ]\n ],\n "b": 0.5\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_results_are_rounded_to_nine_significant_digits():
    found = rounded({"a": [1 / 3, np.float64(2e9 / 3)], "n": 10**12 + 1, "none": float("nan"), "text": "1/3", "yes": True})
    assert found == {"a": [0.333333333, 666666667.0], "n": 10**12 + 1, "none": None, "text": "1/3", "yes": True}
    assert rounded(found) == found


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


def test_put_and_get(tmp_path):
    shelf = Store(tmp_path)
    assert not shelf.has("image/1") and shelf.get("image/1") is None
    shelf.put("image/1", tensors(), {"size": [3, 4]})
    found, meta = shelf.get("image/1")
    assert meta == {"size": [3, 4]} and shelf.has("image/1")
    for name, value in tensors().items():
        assert type(found[name]) is type(value) and found[name].dtype == value.dtype
        np.testing.assert_array_equal(torch.as_tensor(found[name]).float(), torch.as_tensor(value).float())


def test_same_content_same_bytes(tmp_path):
    shelf = Store(tmp_path)
    for key in ("a", "b"):
        shelf.put(key, tensors(), {"z": 1, "a": 2})
    assert shelf.path("a").read_bytes() == shelf.path("b").read_bytes()


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/..", "."])
def test_keys_stay_inside_the_folder(tmp_path, key):
    with pytest.raises(StoreError, match="not a usable key"):
        Store(tmp_path).put(key, {})


def test_long_and_odd_keys(tmp_path):
    shelf = Store(tmp_path)
    keys = ["é" * 300, "é" * 299, "a:b?c*", "a%3Ab", "x y"]
    for i, key in enumerate(keys):
        shelf.put(key, {}, {"i": i})
    assert [shelf.get(key)[1]["i"] for key in keys] == list(range(len(keys)))


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip data", "flip header", "other file"])
def test_a_damaged_shard_counts_as_missing(tmp_path, caplog, damage):
    shelf = Store(tmp_path)
    shelf.put("a", tensors(), {"size": 1})
    path = shelf.path("a")
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[:-5]
    elif damage == "empty":
        content = b""
    elif damage == "flip data":
        content[-3] ^= 1
    elif damage == "flip header":
        at = content.index(b"size")
        content[at:at + 4] = b"sise"
    else:
        content = b"not a safetensors file at all"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert not shelf.has("a")
    assert str(path) in caplog.text and "made again" in caplog.text
    shelf.put("a", tensors())
    assert shelf.has("a")


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of a file makes writes fail half-way, as a full disk does."""
    shelf = Store(tmp_path)
    shelf.put("a", {"x": torch.ones(4)})
    write_json(tmp_path / "r.json", [1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(StoreError, match="could not be written"):
            shelf.put("a", {"x": torch.ones(40_000)})
        with pytest.raises(StoreError, match="could not be written"):
            write_json(tmp_path / "r.json", list(range(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert shelf.get("a")[0]["x"].tolist() == [1, 1, 1, 1]
    assert json.loads((tmp_path / "r.json").read_text()) == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "r.json"]


def _write_many(root: str, seed: int) -> None:
    shelf = Store(root)
    for _ in range(30):
        shelf.put("a", {"x": torch.full((5_000,), seed)})


def test_two_writers_leave_whole_shards(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        found = Store(tmp_path).get("a")
        if found is not None:
            assert len(found[0]["x"].unique()) == 1
            reads += 1
    assert reads and [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_left_overs_of_killed_runs_go(tmp_path):
    old, new = tmp_path / ".1.tmp", tmp_path / ".2.tmp"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    Store(tmp_path)
    assert not old.exists() and new.exists()


def test_parts_are_made_once_and_go_stale(tmp_path):
    made = []

    def compute():
        made.append(1)
        return {"scores": [0.1, 0.2], "note": None}

    parts = Parts(tmp_path, model="sha256:1", seed=0)
    assert not parts.finished("t")
    assert parts.make("t", compute) == Parts(tmp_path, seed=0, model="sha256:1").make("t", compute)
    assert len(made) == 1 and parts.finished("t")
    assert not Parts(tmp_path, model="sha256:1", seed=1).finished("t")
    assert not Parts(tmp_path, model="sha256:1", seed=0, extra=None).finished("t")
    parts.save("arrays", {"a": np.arange(3)})
    assert parts.load("arrays")["a"].tolist() == [0, 1, 2]
    with pytest.raises(StoreError, match="not finished"):
        parts.load("never")


def test_the_fingerprint_follows_the_code_but_not_its_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / "probes.py").write_text("x = 1\n")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/style.py").write_text("x = 1\n")
    code_version.cache_clear()  # it is asked for once per run
    before = fingerprint(seed=0)
    (tmp_path / "probes.py").write_text("# why\nx  =  1\n")
    (tmp_path / "plots/style.py").write_text("x = 2\n")
    code_version.cache_clear()
    assert fingerprint(seed=0) == before != fingerprint(seed=1)
    (tmp_path / "probes.py").write_text("x = 2\n")
    code_version.cache_clear()
    assert fingerprint(seed=0) != before
    code_version.cache_clear()
