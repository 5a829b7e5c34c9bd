"""Fetching data sets: from a local server that misbehaves on demand, and archives that mean harm."""

import errno
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
from filelock import FileLock

from kvutils.datasets import hub
from kvutils.datasets.catalog import CATALOG, About, Download
from kvutils.errors import DataError
from kvutils.run import BY_HAND, DONE, FAILED, MISUSED, STOPPED, cli
from kvutils.run import download as transfer
from kvutils.run.download import extract

BODY = bytes(range(256)) * 2000  # 512,000 bytes


def main(*arguments):
    return cli.main(["data", *arguments])


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; each request takes the next of `server.plan`, a function of (handler, body)."""

    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.asked.append((name, self.headers.get("Range")))
        plan = self.server.plan.pop(0) if self.server.plan else serve
        if name in self.server.files:
            plan(self, self.server.files[name])
        else:
            self.send_error(404)

    def log_message(self, *_):
        return


def serve(handler, body, cut=None, ranges=True, earlier=0, kind="application/octet-stream"):
    """As a good server does unless told to hang up (`cut`) after so many bytes, or to begin so many bytes too early."""
    asked, start = handler.headers.get("Range"), 0
    if asked and ranges:
        start = int(asked.removeprefix("bytes=").removesuffix("-")) - earlier
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) - start))
    handler.send_header("Content-Type", kind)
    handler.end_headers()
    handler.wfile.write(body[start:][:cut])
    handler.close_connection = True


CUT = partial(serve, cut=200_000)


def status(code):
    return lambda handler, body: handler.send_error(code)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.plan, running.asked = {}, [], []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("KVUTILS_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    return tmp_path / "data"


@pytest.fixture
def toy(server, monkeypatch, root):
    """A function that puts a data set of one file into the catalog, and the file onto the server."""
    def add(name="toy", body=BODY, file="list.bin", **fields):
        server.files[file] = body
        fields = {"path": f"{name}/{file}", "size": len(body), "checksum": sha256(body), **fields}
        address = f"http://127.0.0.1:{server.server_port}"
        fields["mirrors"] = tuple(f"{address}/{mirror}" for mirror in fields.pop("mirrors", ()))
        item = Download(f"{address}/{file}", **fields)
        monkeypatch.setitem(CATALOG, name, About(name, "A toy", 0.001, "free", "nowhere", name, downloads=(item,)))
        return root / fields["path"]

    return add


@pytest.fixture
def archive(toy):
    """The same of an archive; gives the folder it is extracted in."""
    return lambda members, holds, name="toy", **fields: toy(name, a_zip(members), "set.zip", path=name, holds=f"{name}/{holds}", **fields)


def a_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def record(place):
    return json.loads(place.with_name(place.name + ".fetched.json").read_text())


def test_a_file_arrives_is_compared_and_recorded_and_a_second_run_does_nothing(server, toy, capsys):
    place = toy()
    assert main("toy") == DONE and place.read_bytes() == BODY and len(server.asked) == 1
    found = record(place)
    assert found["size"] == len(BODY) and found["checksum"] == sha256(BODY) and found["compared"] == "sha256 as published"
    assert found["address"].startswith("http://127") and found["address"].endswith("/list.bin")
    assert sorted(path.name for path in place.parent.iterdir()) == ["list.bin", "list.bin.fetched.json"]
    assert "list.bin: 0.5 MB, sha256 as published" in capsys.readouterr().out
    assert main("toy") == DONE and len(server.asked) == 1 and "all there already" in capsys.readouterr().out
    place = toy("unknown", size=None, checksum="")
    assert main("unknown") == DONE and record(place)["compared"].startswith("no checksum")
    out = capsys.readouterr().out
    assert "no checksum is published, nothing to compare with" in out and sha256(BODY)[7:] in out


@pytest.mark.parametrize(("plan", "resumed", "said"), [
    ([partial(serve, cut=300_000), partial(serve, cut=100_000)], [False, True, True], "trying again"),
    ([CUT, partial(serve, ranges=False)], [False, True], "trying again"),
    ([CUT, partial(serve, earlier=1)], [False, True, False], "from the start"),
    ([CUT, status(416)], [False, True, False], "from the start"),
    ([status(429), status(500), status(503)], [False] * 4, "trying again"),
])
def test_a_file_arrives_whole_in_spite_of_its_server(server, toy, capsys, plan, resumed, said):
    place, server.plan = toy(), list(plan)
    assert main("toy") == DONE and place.read_bytes() == BODY and said in capsys.readouterr().out
    starts = [int((asked or "bytes=0-")[6:-1]) for _, asked in server.asked]
    assert [start > 0 for start in starts] == resumed and (starts == sorted(starts) or said == "from the start")


@pytest.mark.parametrize(("answer", "said"), [
    (status(404), "404 Not Found: the file may have moved, or want a login"), (status(403), "403"),
    (partial(serve, kind="text/html"), "answers a web page"),
])
def test_answers_that_no_patience_mends(server, toy, capsys, answer, said):
    place, server.plan = toy(), [answer]
    assert main("toy") == FAILED and len(server.asked) == 1 and not place.exists() and said in capsys.readouterr().out


class Full(io.FileIO):
    """A disk with room for one block."""

    def write(self, block):
        if self.tell():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(block)


@pytest.mark.parametrize(("name", "replacement", "code", "said"), [
    ("PAUSE", 0, FAILED, "503 Server Error"), ("PAUSE", 0, FAILED, "are kept, the same command goes on"),
    ("tqdm.update", Mock(side_effect=KeyboardInterrupt), STOPPED, "the same command goes on"),
    ("open", Full, FAILED, "the disk is full; what has arrived is kept"),
])
def test_what_has_arrived_serves_the_next_run(server, toy, monkeypatch, capsys, name, replacement, code, said):
    place, server.plan = toy(), [CUT] + [status(503)] * (transfer.TRIES - 1)
    with monkeypatch.context() as patch:
        patch.setattr(f"kvutils.run.download.{name}", replacement, raising=False)
        assert main("toy") == code and not place.exists() and said in "".join(capsys.readouterr())
    server.plan.clear()
    arrived = place.with_name("list.bin.part").stat().st_size
    assert arrived >= transfer.BLOCK and main("toy") == DONE and place.read_bytes() == BODY
    assert server.asked[-1] == ("list.bin", f"bytes={arrived}-") and not list(place.parent.glob("*.part*"))


def test_halves_of_two_versions_are_never_taken_for_one_file(server, toy, capsys):
    """The published checksum finds them out; where there is none, nothing is resumed in another run."""
    other = BODY[::-1]

    def change(handler, body):
        CUT(handler, body)
        server.files["list.bin"] = other

    place, server.plan = toy(checksum=sha256(other)), [change]
    assert main("toy") == FAILED and not place.exists() and "is not the published file" in capsys.readouterr().out
    assert main("toy") == DONE and place.read_bytes() == other
    place = toy("unknown", checksum="", size=None)
    place.parent.mkdir()
    place.with_name("list.bin.part").write_bytes(b"another version")
    assert main("unknown") == DONE and place.read_bytes() == BODY and server.asked[-1][1] is None


def test_another_address_of_the_same_bytes(server, toy, capsys):
    place = toy(mirrors=["copy.bin"])
    server.files = {"copy.bin": BODY}
    assert main("toy") == DONE and place.read_bytes() == BODY and record(place)["address"].endswith("/copy.bin")
    assert "trying another address" in capsys.readouterr().out
    assert main("toy") == DONE and len(server.asked) == 2


def test_another_file_is_put_aside_and_can_be_accepted(server, toy, capsys):
    place, broken = toy(), BODY[:1000] + b"?" + BODY[1001:]
    server.plan = [lambda handler, body: serve(handler, broken)]
    assert main("toy") == FAILED and not place.exists() and place.with_name("list.bin.bad").read_bytes() == broken
    out = capsys.readouterr().out
    assert all(word in out for word in (sha256(BODY), sha256(broken), "list.bin.bad", "--accept-changed"))
    assert main("toy") == DONE and place.read_bytes() == BODY and server.asked[-1][1] is None
    place, server.files["list.bin"] = toy("changed"), b"new"
    assert main("changed", "--accept-changed") == DONE and place.read_bytes() == b"new"
    assert "NOT the published file: expected size 512000, found 3" in capsys.readouterr().out
    assert main("changed") == DONE, "accepted once"
    place = toy("older", body=BODY)
    place.parent.mkdir()
    place.write_bytes(b"an older list")
    assert main("older") == DONE and place.read_bytes() == BODY
    assert place.with_name("list.bin.bad").read_bytes() == b"an older list" and "is now list.bin.bad" in capsys.readouterr().out


def test_too_little_space_is_said_before_anything_is_received(archive, root, monkeypatch, capsys):
    archive({"a": BODY}, "a")
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert main("toy") == FAILED and not list(root.rglob("*.part"))
    assert "needed to download and extract" in capsys.readouterr().out


def test_an_archive_is_extracted_and_removed_unless_it_lacks_what_it_should_hold(server, archive, root, capsys):
    name = "JSON/000001-2008_002719-2008_004100:aeroplane.json"
    members = {f"top/{name}": "{}", "top/b/c.txt": "c", "__MACOSX/top/._c.txt": "x", "top/__MACOSX/d": "x", "top/b/._c.txt": "x"}
    folder = archive(members, "b/c.txt", strip="top")
    assert main("toy") == DONE and "2 files extracted" in capsys.readouterr().out
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [name, "b/c.txt", "set.zip.fetched.json"]
    assert record(folder / "set.zip")["size"] == len(a_zip(members))
    assert main("toy") == DONE and len(server.asked) == 1
    (folder / "b/c.txt").unlink()
    assert main("toy", "--keep-archives") == DONE and (folder / "set.zip").exists() and (folder / "b/c.txt").exists()
    folder = archive({"other/b.txt": "b"}, "a/b.txt", "without")
    assert main("without") == FAILED and not (folder / "other").exists()
    assert "expected a/b.txt in it, found other" in capsys.readouterr().out


def test_what_was_put_there_by_hand_is_not_fetched(server, archive, tmp_path):
    """An archive is checked and extracted; content, or a link to it, is left alone."""
    folder = archive({"a/b.txt": "b"}, "a/b.txt")
    folder.mkdir(parents=True)
    (folder / "set.zip").write_bytes(a_zip({"a/b.txt": "b"}))
    assert main("toy") == DONE and (folder / "a/b.txt").exists()
    folder = archive({"a/b.txt": "b"}, "a", "linked")
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path)
    assert main("linked") == DONE and server.asked == []


def test_archives_join_what_is_there_also_behind_a_link_and_lead_nowhere_else(tmp_path):
    own, coco = tmp_path / "disk" / "own.json", tmp_path / "coco"
    own.parent.mkdir()
    own.write_text("own")
    coco.mkdir()
    (coco / "annotations").symlink_to(own.parent)
    (coco / "a.zip").write_bytes(a_zip({"annotations/new.json": "new", "val/1.jpg": "1"}))
    assert extract(coco / "a.zip", coco) == 2
    assert {path.name for path in own.parent.iterdir()} == {"own.json", "new.json"} and (coco / "val/1.jpg").exists()
    (coco / "b.zip").write_bytes(a_zip(dict.fromkeys(["../evil.txt", "/evil.txt", "a/../../evil.txt"], "x")))
    extract(coco / "b.zip", coco)
    assert {p.name for p in tmp_path.iterdir()} == {"coco", "disk"} and not Path("/evil.txt").exists()


@pytest.mark.parametrize(("function", "call"), [("zipfile.ZipFile.extractall", 1), ("shutil.move", 2)])
def test_an_interrupted_extraction_leaves_nothing_half(server, archive, monkeypatch, capsys, function, call):
    folder = archive({f"{folder}/{i}.txt": "x" for folder in ("a", "b", "c") for i in range(3)}, "a")
    with monkeypatch.context() as patch:
        patch.setattr(function, Mock(wraps=os.replace, side_effect=[DEFAULT] * (call - 1) + [KeyboardInterrupt]))
        assert main("toy") == STOPPED
    assert not (folder / "set.zip.fetched.json").exists() and main() == DONE
    assert any("toy " in line and "missing" in line for line in capsys.readouterr().out.splitlines())
    assert main("toy") == DONE and len(server.asked) == 1, "the archive was there already"
    assert len(list(folder.glob("[abc]/*.txt"))) == 9 and not list(folder.glob(".*"))


def tar_member(name, kind=tarfile.REGTYPE, link="", data=b""):
    buffer, info = io.BytesIO(), tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


ENCRYPTED = bytearray(a_zip({"good.txt": "good", "evil": "x"}))
ENCRYPTED[ENCRYPTED.rfind(b"PK\x01\x02") + 8] |= 1  # the flag in the directory's last entry


@pytest.mark.parametrize(("name", "data"), [
    ("encrypted.zip", ENCRYPTED), ("html.zip", b"<html>"), ("dots.tgz", tar_member("../evil.txt")),
    ("link.tar.gz", tar_member("evil", tarfile.SYMTYPE, "/etc")), ("cut.tgz", tar_member("evil", data=os.urandom(90_000))[:50_000]),
], ids=["encrypted", "html", "dots", "link", "cut"])  # not of the bytes, in which the time stands: processes must collect the same names
def test_harmful_archives_write_nothing(tmp_path, name, data):
    path = tmp_path / "inner" / name
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged, or no archive to trust"):
        extract(path, path.parent)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{name}.bad"]


def test_a_gated_or_failed_set_does_not_stop_the_others(server, toy, root, capsys):
    place = toy()
    toy("gone", file="gone.bin")
    del server.files["gone.bin"]
    assert main("gone", "bdd-10k", "toy") == FAILED and place.exists()
    out = capsys.readouterr().out
    assert "1. Log in at https://bdd-data.berkeley.edu" in out and f"3. Extract each in {root}/bdd-10k" in out
    assert out.splitlines()[-3:] == ["there: toy", "left to do by hand: bdd-10k", "failed: gone"]
    for either in CATALOG["bdd-10k"].by_hand:
        assert main("bdd-10k") == BY_HAND
        (root / either.split("|")[-1]).mkdir(parents=True)
    assert main("bdd-10k") == DONE


def test_the_hub_copy_at_its_fixed_revision(root, monkeypatch, capsys):
    calls = []

    def snapshot(repository, **options):
        if repository != "BLINK-Benchmark/BLINK":
            raise ConnectionError("no route to the hub")
        calls.append(options)
        path = options["local_dir"] / "Art_Style" / "val-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PAR1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(hub, "revision_of", lambda repository: "c0ffee" * 6)
    assert main("blink") == DONE
    [options] = calls
    assert options["revision"] == "c0ffee" * 6 and options["repo_type"] == "dataset" and options["allow_patterns"] == ["*/val-*.parquet"]
    found = record(root / "blink" / "hub")
    assert found["files"] == ["Art_Style/val-00000-of-00001.parquet"] and found["revision"] == options["revision"]
    assert main("blink") == DONE and len(calls) == 1 and "all there already" in capsys.readouterr().out
    assert main("mme") == FAILED
    out = capsys.readouterr().out
    assert "no route to the hub; the same command goes on" in out and "1. Instead of the hub copy" in out


def test_the_list_fits_on_a_screen_and_names_and_folder_are_checked_first(root, capsys, monkeypatch):
    assert main() == DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines[1:])) <= 118
    assert {line.split()[0] for line in lines if line.split()[1:2] == ["missing"]} == set(CATALOG)
    assert main("davis-2016", "bdd-10k") == MISUSED
    captured = capsys.readouterr()
    assert "did you mean 'davis-2017'?" in captured.err and captured.out == "" and not root.exists()
    assert main("bdd") == BY_HAND and capsys.readouterr().out.startswith("bdd-10k: ")
    assert main("p") == MISUSED and "unknown data set 'p'" in capsys.readouterr().err  # pascal-5i or pope
    monkeypatch.delenv("KVUTILS_DATA")
    assert main() == DONE and "is not set" in capsys.readouterr().out
    assert main("davis-2017") == MISUSED and 'make data DATASETS="davis-2017" KVUTILS_DATA=' in capsys.readouterr().err


def test_a_second_command_waits_for_the_first(server, toy, root, capsys):
    place, seen, held, ended = toy(), [], threading.Event(), threading.Event()
    root.mkdir(parents=True)

    def hold():
        with FileLock(root / ".download.lock"):
            held.set()
            time.sleep(0.5)
            ended.set()

    threading.Thread(target=hold).start()
    server.plan = [lambda handler, body: (seen.append(ended.is_set()), serve(handler, body))]
    assert held.wait(10) and main("toy") == DONE and seen == [True], "did not wait"
    assert "waiting until it is done" in capsys.readouterr().out and place.read_bytes() == BODY


DOWNLOADS = [item for about in CATALOG.values() for item in about.downloads]


def test_every_data_set_can_be_had_somehow_and_its_downloads_are_well_formed():
    for about in CATALOG.values():
        assert (about.downloads or about.hub or about.steps) and bool(about.by_hand) == bool(about.steps), about.name
        folders = [item.path for item in about.downloads] + [one for each in about.by_hand for one in each.split("|")]
        assert all(Path(folder).parts[0] in (about.name, "coco") for folder in folders), about.name
    for item in DOWNLOADS:
        assert all(url.startswith(("http://", "https://")) for url in (item.url, *item.mirrors)), item
        kind, _, digest = item.checksum.partition(":")
        assert len(digest) == {"md5": 32, "sha256": 64, "": 0}[kind] and set(digest) <= set("0123456789abcdef"), item
        assert item.url.startswith("https://") or kind, "neither address nor checksum to trust"
        is_archive = item.url.endswith(transfer.ARCHIVES)
        assert bool(item.holds) == is_archive and (not is_archive or item.holds.startswith(f"{item.path}/")), item
        assert ".." not in Path(item.path).parts and not Path(item.path).is_absolute(), item


@pytest.mark.skipif(not os.environ.get("KVUTILS_SAMPLES"), reason="KVUTILS_SAMPLES names no folder with real lists")
def test_the_lists_checksums_are_those_of_the_real_files():
    folder, compared = Path(os.environ["KVUTILS_SAMPLES"]), []
    for item in DOWNLOADS:
        path = folder / item.path.replace("imagenet-s/data/", "imagenet-s/")
        if path.is_file() and item.checksum:
            data = path.read_bytes()
            assert (item.size, item.checksum) == (len(data), sha256(data)), item.path
            compared.append(path.name)
    assert {"coco_pope_random.json", "fold0.txt", "ImageNetS_categories_im919.txt"} <= set(compared)
    assert len(compared) == 11
