"""Fetching data sets: from a local server that misbehaves on demand, and archives that mean harm."""

import errno
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from kvutils.datasets import hub
from kvutils.datasets.catalog import CATALOG, About, Download
from kvutils.errors import DataError
from kvutils.run import BY_HAND, DONE, FAILED, MISUSED, STOPPED, cli
from kvutils.run import download as transfer
from kvutils.run.download import extract

BODY = bytes(range(256)) * 2000  # 512,000 bytes


def main(arguments):
    return cli.main(["data", *arguments])


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; each request takes the next of `server.plan`, a function of (handler, body)."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        name = self.path.lstrip("/")
        plan = self.server.plan.pop(0) if self.server.plan else serve
        if name in self.server.files:
            plan(self, self.server.files[name])
        else:
            self.send_error(404)

    def log_message(self, *_):
        return


def serve(handler, body, cut=None, ranges=True, length=None, headers=()):
    """Answer with `body`, as a good server does unless told otherwise. cut: hang up after so many bytes."""
    asked, start = handler.headers.get("Range"), 0
    if asked and ranges:
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        handler.send_response(200)
    given = {"Content-Length": str(length or len(body) - start), **dict(headers)}
    for key, value in given.items():
        handler.send_header(key, value)
    handler.end_headers()
    sent = body[start:] if cut is None else body[start : start + cut]
    handler.wfile.write(sent)
    handler.server.sent.append(len(sent))
    handler.close_connection = True


def status(code):
    return lambda handler, body: handler.send_error(code)


def cut(after):
    return lambda handler, body: serve(handler, body, cut=after)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.plan, running.asked, running.sent = {}, [], [], []
        running.url = f"http://127.0.0.1:{running.server_port}"
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

    def add(body=BODY, name="toy", file="list.bin", path="toy/list.bin", **fields):
        server.files[file] = body
        fields = {"size": len(body), "checksum": sha256(body), **fields}
        item = Download(f"{server.url}/{file}", path, **fields)
        monkeypatch.setitem(CATALOG, name, About(name, "A toy", 0.001, "free", "nowhere", name, downloads=(item,)))
        return root / path

    return add


def a_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def test_a_file_arrives_is_compared_and_recorded_and_a_second_run_does_nothing(server, toy, root, capsys):
    place = toy()
    assert main(["toy"]) == DONE
    assert place.read_bytes() == BODY and len(server.asked) == 1
    record = json.loads(place.with_name("list.bin.fetched.json").read_text())
    assert record["size"] == len(BODY) and record["address"] == f"{server.url}/list.bin"
    assert record["checksum"] == sha256(BODY) and record["compared"] == "sha256 as published"
    assert sorted(path.name for path in place.parent.iterdir()) == ["list.bin", "list.bin.fetched.json"]
    assert "list.bin: 0.5 MB, sha256 as published" in capsys.readouterr().out
    assert main(["toy"]) == DONE and len(server.asked) == 1
    assert "all there already" in capsys.readouterr().out


def test_without_a_published_checksum_it_says_so_and_writes_down_what_came(toy, capsys):
    place = toy(size=None, checksum="")
    assert main(["toy"]) == DONE
    out = capsys.readouterr().out
    assert "no checksum is published, nothing to compare with" in out and sha256(BODY)[7:] in out
    assert json.loads(place.with_name("list.bin.fetched.json").read_text())["compared"].startswith("no checksum")


@pytest.mark.parametrize("after", [1000, 300_000])
def test_a_cut_connection_is_resumed_where_it_broke(server, toy, after):
    place = toy()
    server.plan = [cut(after), cut(100_000)]
    assert main(["toy"]) == DONE and place.read_bytes() == BODY
    starts = [int((asked or "bytes=0-")[6:-1]) for _, asked in server.asked]
    assert len(starts) == 3 and starts[0] == 0 < starts[2] and starts == sorted(starts)
    assert starts[1] > 0 or after < transfer.BLOCK  # less than a block may not have been written
    assert server.sent[-1] == len(BODY) - starts[2]


def test_what_has_arrived_serves_the_next_run(server, toy, capsys):
    place = toy()
    server.plan = [cut(200_000)] + [status(503)] * (transfer.TRIES - 1)
    assert main(["toy"]) == FAILED and not place.exists()
    out = capsys.readouterr().out
    assert "503" in out and "are kept, the same command goes on" in out
    arrived = place.with_name("list.bin.part").stat().st_size
    assert main(["toy"]) == DONE and place.read_bytes() == BODY
    assert server.asked[-1] == ("/list.bin", f"bytes={arrived}-") and arrived > 100_000
    assert not list(place.parent.glob("*.part*"))


def test_ctrl_c_keeps_what_has_arrived(server, toy, monkeypatch, capsys):
    place = toy()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer.tqdm, "update", stop)
        assert main(["toy"]) == STOPPED and "same command goes on" in capsys.readouterr().err
    assert place.with_name("list.bin.part").stat().st_size == transfer.BLOCK
    assert main(["toy"]) == DONE and place.read_bytes() == BODY and server.asked[-1][1] == f"bytes={transfer.BLOCK}-"


def test_a_server_that_cannot_go_on_is_asked_from_the_beginning(server, toy, capsys):
    """It ignores Range, continues somewhere else, or says 416."""
    place = toy()
    server.plan = [cut(200_000), lambda handler, body: serve(handler, body, ranges=False)]
    assert main(["toy"]) == DONE and place.read_bytes() == BODY and server.sent[-1] == len(BODY)

    def elsewhere(handler, body):
        handler.headers.replace_header("Range", "bytes=7-")
        serve(handler, body)

    for name, plan in (("shifted", elsewhere), ("refused", status(416))):
        place = toy(name=name, path=f"{name}/list.bin")
        server.asked.clear()
        server.plan = [cut(200_000), plan]
        assert main([name]) == DONE and place.read_bytes() == BODY
        assert [asked is None for _, asked in server.asked] == [True, False, True] and "from the start" in capsys.readouterr().out


def test_halves_of_two_versions_are_never_taken_for_one_file(server, toy, capsys):
    """The published checksum finds them out; where there is none, nothing is resumed in another run."""
    other = BODY[::-1]

    def change(handler, body):
        serve(handler, body, cut=200_000)
        server.files["list.bin"] = other

    place = toy(checksum=sha256(other))
    server.plan = [change]
    assert main(["toy"]) == FAILED and not place.exists() and "is not the published file" in capsys.readouterr().out
    assert main(["toy"]) == DONE and place.read_bytes() == other
    place = toy(name="unknown", path="unknown/list.bin", checksum="", size=None)
    place.parent.mkdir()
    place.with_name("list.bin.part").write_bytes(b"another version")
    assert main(["unknown"]) == DONE and place.read_bytes() == BODY and server.asked[-1][1] is None


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, toy, code):
    place = toy()
    server.plan = [status(code)] * 2
    assert main(["toy"]) == DONE and place.read_bytes() == BODY and len(server.asked) == 3


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (status(404), "404 Not Found: the file may have moved, or want a login"),
        (status(403), "403"),
        (lambda handler, body: serve(handler, body, headers={"Content-Type": "text/html"}), "answers a web page"),
    ],
)  # fmt: skip
def test_answers_that_no_patience_mends(server, toy, capsys, plan, message):
    place = toy()
    server.plan = [plan]
    assert main(["toy"]) == FAILED and len(server.asked) == 1 and not place.exists()
    assert message in capsys.readouterr().out


def test_another_address_of_the_same_bytes(server, toy, capsys):
    place = toy(mirrors=(f"{server.url}/copy.bin",))
    server.files["copy.bin"] = BODY
    del server.files["list.bin"]
    assert main(["toy"]) == DONE and place.read_bytes() == BODY
    assert "trying another address" in capsys.readouterr().out
    assert json.loads(place.with_name("list.bin.fetched.json").read_text())["address"].endswith("/copy.bin")
    assert main(["toy"]) == DONE and len(server.asked) == 2


def test_another_file_is_put_aside_and_can_be_accepted(server, toy, capsys):
    place, broken = toy(), BODY[:1000] + b"?" + BODY[1001:]
    server.plan = [lambda handler, body: serve(handler, broken)]
    assert main(["toy"]) == FAILED and not place.exists()
    out = capsys.readouterr().out
    assert all(word in out for word in (sha256(BODY), sha256(broken), "list.bin.bad", "--accept-changed"))
    assert place.with_name("list.bin.bad").read_bytes() == broken
    assert main(["toy"]) == DONE and place.read_bytes() == BODY and server.asked[-1][1] is None
    place = toy(name="changed", path="changed/list.bin")
    server.files["list.bin"] = b"new"
    assert main(["changed", "--accept-changed"]) == DONE and place.read_bytes() == b"new"
    assert "NOT the published file: expected size 512000, found 3" in capsys.readouterr().out
    assert main(["changed"]) == DONE, "accepted once"


def test_a_list_of_another_version_is_replaced_and_kept(toy, capsys):
    place = toy()
    place.parent.mkdir(parents=True)
    place.write_bytes(b"an older list")
    assert main(["toy"]) == DONE and place.read_bytes() == BODY
    assert place.with_name("list.bin.bad").read_bytes() == b"an older list"
    assert "is now list.bin.bad" in capsys.readouterr().out


def test_a_full_disk_keeps_what_has_arrived(server, toy, monkeypatch, capsys):
    place = toy()

    class Full(io.FileIO):
        def write(self, block):
            if self.tell() > 150_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(block)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "open", lambda path, mode: Full(path, mode), raising=False)
        assert main(["toy"]) == FAILED
    assert "the disk is full; what has arrived is kept" in capsys.readouterr().out
    arrived = place.with_name("list.bin.part").stat().st_size
    assert arrived > 150_000
    assert main(["toy"]) == DONE and place.read_bytes() == BODY and server.asked[-1][1] == f"bytes={arrived}-"


def test_too_little_space_is_said_before_anything_is_received(toy, root, monkeypatch, capsys):
    toy(a_zip({"a": BODY}), file="a.zip", path="toy", holds="toy/a")
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert main(["toy"]) == FAILED and not list(root.rglob("*.part"))
    assert "needed to download and extract" in capsys.readouterr().out


def test_an_archive_is_extracted_and_removed(server, toy, root, capsys):
    name = "JSON/000001-2008_002719-2008_004100:aeroplane.json"
    body = a_zip({f"top/{name}": "{}", "top/b/c.txt": "c", "__MACOSX/top/._c.txt": "x", "top/b/._c.txt": "x"})
    archive = toy(body, file="set.zip", path="toy", holds="toy/b/c.txt", strip="top") / "set.zip"
    assert main(["toy"]) == DONE and "2 files extracted" in capsys.readouterr().out
    assert (root / "toy" / name).read_text() == "{}" and (root / "toy/b/c.txt").read_text() == "c"
    assert not archive.exists() and not list(root.rglob("._*")) and not list(root.rglob("*.extracting"))
    assert json.loads((root / "toy/set.zip.fetched.json").read_text())["size"] == len(body)
    assert main(["toy"]) == DONE and len(server.asked) == 1
    (root / "toy/b/c.txt").unlink()
    assert main(["toy", "--keep-archives"]) == DONE and archive.exists() and (root / "toy/b/c.txt").exists()


def test_what_was_put_there_by_hand_is_not_fetched(server, toy, tmp_path):
    """An archive is checked and extracted; content, or a link to it, is left alone."""
    body = a_zip({"a/b.txt": "b"})
    folder = toy(body, file="set.zip", path="toy", holds="toy/a/b.txt")
    folder.mkdir(parents=True)
    (folder / "set.zip").write_bytes(body)
    assert main(["toy"]) == DONE and (folder / "a/b.txt").exists()
    folder = toy(body, name="linked", file="set.zip", path="linked", holds="linked/a")
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path)
    assert main(["linked"]) == DONE and server.asked == []


def test_archives_join_what_is_there_also_behind_a_link(tmp_path):
    own = tmp_path / "disk" / "own.json"
    own.parent.mkdir()
    own.write_text("own")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "annotations").symlink_to(own.parent)
    path = tmp_path / "coco" / "a.zip"
    path.write_bytes(a_zip({"annotations/new.json": "new", "val/1.jpg": "1"}))
    assert extract(path, tmp_path / "coco") == 2
    assert {p.name for p in own.parent.iterdir()} == {"own.json", "new.json"} and (tmp_path / "coco/val/1.jpg").exists()


@pytest.mark.parametrize(("function", "call"), [("zipfile.ZipFile.extractall", 1), ("shutil.move", 2)])
def test_an_interrupted_extraction_leaves_nothing_half(server, toy, monkeypatch, capsys, function, call):
    body = a_zip({f"{folder}/{i}.txt": "x" for folder in ("a", "b", "c") for i in range(3)})
    folder = toy(body, file="set.zip", path="toy", holds="toy/a")
    calls = []

    def stop(source, *target):
        calls.append(source)
        if len(calls) == call:
            raise KeyboardInterrupt
        return os.replace(source, *target)

    with monkeypatch.context() as patch:
        patch.setattr(function, stop)
        assert main(["toy"]) == STOPPED
    assert not (folder / "set.zip.fetched.json").exists() and main([]) == DONE
    assert any("toy " in line and "missing" in line for line in capsys.readouterr().out.splitlines())
    assert main(["toy"]) == DONE and len(server.asked) == 1, "the archive was there already"
    assert len(list(folder.glob("[abc]/*.txt"))) == 9 and not list(folder.glob(".*"))


def test_an_archive_without_what_it_should_hold_is_not_moved_into_place(toy, root, capsys):
    folder = toy(a_zip({"other/b.txt": "b"}), file="set.zip", path="toy", holds="toy/a/b.txt")
    assert main(["toy"]) == FAILED
    assert "expected a/b.txt in it, found other" in capsys.readouterr().out
    assert not (folder / "other").exists()


def tar_member(name, kind=tarfile.REGTYPE, link="", data=b""):
    buffer, info = io.BytesIO(), tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


ENCRYPTED = bytearray(a_zip({"good.txt": "good", "evil": "x"}))
ENCRYPTED[ENCRYPTED.rfind(b"PK\x01\x02") + 8] |= 1  # the flag in the directory's last entry
HARMFUL = {
    "zip encrypted": ("a.zip", ENCRYPTED),
    "no zip": ("a.zip", b"<html>"),
    "tar ..": ("a.tgz", tar_member("../evil.txt")),
    "tar symlink": ("a.tar.gz", tar_member("evil", tarfile.SYMTYPE, "/etc")),
    "tgz cut": ("a.tgz", tar_member("evil", data=os.urandom(90_000))[:50_000]),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_harmful_archives_write_nothing(tmp_path, case):
    name, data = HARMFUL[case]
    path = tmp_path / "inner" / name
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged, or no archive to trust"):
        extract(path, path.parent)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{name}.bad"]


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt"])
def test_no_name_in_a_zip_leads_out_of_the_folder(tmp_path, name):
    path = tmp_path / "inner" / "a.zip"
    path.parent.mkdir()
    path.write_bytes(a_zip({name: "x"}))
    extract(path, path.parent)
    assert [p.name for p in tmp_path.iterdir()] == ["inner"] and not Path("/evil.txt").exists()


def test_a_gated_or_failed_set_does_not_stop_the_others(server, toy, root, capsys):
    place = toy()
    toy(name="gone", file="gone.bin", path="gone/list.bin")
    del server.files["gone.bin"]
    assert main(["gone", "bdd-10k", "toy"]) == FAILED and place.exists()
    out = capsys.readouterr().out
    assert "1. Log in at https://bdd-data.berkeley.edu" in out and f"3. Extract each in {root}/bdd-10k" in out
    assert out.splitlines()[-3:] == ["there: toy", "left to do by hand: bdd-10k", "failed: gone"]
    for either in CATALOG["bdd-10k"].by_hand:
        assert main(["bdd-10k"]) == BY_HAND
        (root / either.split("|")[-1]).mkdir(parents=True)
    assert main(["bdd-10k"]) == DONE


def test_the_hub_copy_at_its_fixed_revision(root, monkeypatch, capsys):
    calls = []

    def snapshot(repository, **options):
        calls.append((repository, options))
        path = options["local_dir"] / "Art_Style" / "val-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PAR1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(hub, "revision_of", lambda repository: "c0ffee" * 6)
    assert main(["blink"]) == DONE
    [(repository, options)] = calls
    assert repository == "BLINK-Benchmark/BLINK" and options["revision"] == "c0ffee" * 6
    assert options["repo_type"] == "dataset" and options["allow_patterns"] == ["*/val-*.parquet"]
    record = json.loads((root / "blink/hub.fetched.json").read_text())
    assert record["files"] == ["Art_Style/val-00000-of-00001.parquet"] and record["revision"] == options["revision"]
    assert main(["blink"]) == DONE and len(calls) == 1 and "all there already" in capsys.readouterr().out

    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert main(["mme"]) == FAILED
    out = capsys.readouterr().out
    assert "no route to the hub; the same command goes on" in out and "1. Instead of the hub copy" in out


def test_the_list_fits_on_a_screen(root, capsys, monkeypatch):
    assert main([]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines[1:])) <= 118
    for name in CATALOG:
        assert any(line.split()[:2] == [name, "missing"] for line in lines), name
    monkeypatch.delenv("KVUTILS_DATA")
    assert main([]) == DONE and "is not set" in capsys.readouterr().out


def test_names_and_folder_are_checked_first(root, capsys, monkeypatch):
    assert main(["davis-2016", "bdd-10k"]) == MISUSED
    captured = capsys.readouterr()
    assert "did you mean 'davis-2017'?" in captured.err and captured.out == "" and not root.exists()
    assert main(["bdd"]) == BY_HAND and capsys.readouterr().out.startswith("bdd-10k: ")
    assert main(["p"]) == MISUSED and "unknown data set 'p'" in capsys.readouterr().err  # pascal-5i or pope
    monkeypatch.delenv("KVUTILS_DATA")
    assert main(["davis-2017"]) == MISUSED and 'make data DATASETS="davis-2017" KVUTILS_DATA=' in capsys.readouterr().err


HOLD = """
import sys, time
from pathlib import Path
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(0.5)
    Path(sys.argv[2]).touch()
"""


def test_a_second_command_waits_for_the_first(server, toy, root, tmp_path, capsys):
    place, ended, seen = toy(), tmp_path / "ended", []
    root.mkdir(parents=True)
    server.plan = [lambda handler, body: (seen.append(ended.exists()), serve(handler, body))]
    command = [sys.executable, "-c", HOLD, root / ".download.lock", ended]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        assert main(["toy"]) == DONE and seen == [True], "did not wait"
    assert "waiting until it is done" in capsys.readouterr().out and place.read_bytes() == BODY


DOWNLOADS = [item for about in CATALOG.values() for item in about.downloads]


def test_every_data_set_can_be_had_somehow():
    for about in CATALOG.values():
        assert about.downloads or about.hub or about.steps, about.name
        assert bool(about.by_hand) == bool(about.steps), about.name
        folders = [item.path for item in about.downloads] + [one for each in about.by_hand for one in each.split("|")]
        assert all(Path(folder).parts[0] in (about.name, "coco") for folder in folders), about.name


def test_downloads_are_well_formed():
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
