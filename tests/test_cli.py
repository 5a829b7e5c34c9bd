"""One command with verbs: what each writes, and what is said of mistakes."""

import io
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from kvutils.kvcache import capture
from kvutils.models import load_mlm
from kvutils.run import cli
from kvutils.run.cli import VERBS, main
from kvutils.run.notebook import ROOT
from tests.mini_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny("llava_onevision", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.jpg"]
    for path, size in zip(paths, [(50, 40), (40, 90)], strict=True):
        Image.effect_noise(size, 90).convert("RGB").save(path)
    return [str(path) for path in paths]


def shell(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240, **options,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_help_names_every_verb_and_is_light():
    shown = shell("-X", "importtime", "-m", "kvutils", "--help")
    assert shown.returncode == 0 and all(f"\n    {verb}" in shown.stdout for verb in VERBS)
    assert not {"torch", "transformers", "numpy"} & {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}


@pytest.mark.parametrize("verb", ["probe", "check"])
def test_a_folder_that_is_not_there_is_said_before_torch_is_loaded(verb):
    shown = shell("-X", "importtime", "-m", "kvutils", verb, "nowhere")
    assert shown.returncode == 2 and "error: nowhere: expected a folder, found nothing" in shown.stderr
    assert not {"torch", "transformers", "numpy"} & {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}


@pytest.mark.slow
def test_capture_loads_nothing_that_it_does_not_need():
    loaded = shell("-X", "importtime", "-c", "import kvutils; kvutils.capture").stderr
    names = {line.split("|")[-1].strip() for line in loaded.splitlines()}
    assert "torch" in names and not {"datasets", "sklearn", "matplotlib", "pandas", "pyarrow", "IPython"} & names


@pytest.mark.parametrize(("arguments", "said"), [
    (["replicat"], "unknown verb 'replicat' (did you mean 'replicate'?); expected one of capture, "),
    (["plan", "--notebooks", "07"], "unknown notebook '07'"),
])
def test_a_misspelt_word_is_answered(arguments, said, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_utf_8_shows_what_it_can(monkeypatch, encoding):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "run", lambda chosen: print("C8  \u2013 [0.1, 0.2] \udce9.png"))
    main(["report"])
    terminal.flush()
    assert terminal.buffer.getvalue().decode(encoding).startswith("C8  \u2013" if encoding == "utf-8" else "C8  ? [0.1, 0.2] ?.png")


@pytest.mark.parametrize(("arguments", "said"), [
    (["replicate", "--model", "pokcet"], "unknown model 'pokcet' (did you mean 'pocket'?)"),
    (["plan", "--model", "pokcet"], "unknown model 'pokcet'"),
    (["replicate", "--model", "my/big model"], "is neither a folder nor a hub id"),
    (["replicate", "--profile", "paper", "--model", "llava-onevision-0.5b", "--data", "hub"], "cannot be looked up on the hub"),
])
def test_a_misspelt_model_and_a_hub_out_of_reach_are_said_once_and_at_once(tmp_path, arguments, said):
    """Before torch is loaded, which takes seconds; without a word of the hub's client."""
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    code = f"import sys; from kvutils.run.cli import main; assert main({arguments}) == 2 and not {{'torch', 'numpy'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0 and done.stderr.startswith("error: ") and done.stderr.count(said) == 1 and "Retry" not in done.stderr


def test_ctrl_c_is_answered_in_words(monkeypatch, capsys):
    monkeypatch.setattr(cli, "run", Mock(side_effect=KeyboardInterrupt))
    assert main(["report"]) == 130 and "the same command goes on" in capsys.readouterr().err
    assert main(["capture", "photo.jpg", "--out", "x.safetensors"]) == 130 and "Nothing is written before the last photo is read" in capsys.readouterr().err


def test_ctrl_c_is_answered_in_one_sentence_where_the_reader_of_the_pipe_is_gone():
    code = """if True:
        import sys
        from kvutils.run import cli
        def run(chosen):
            print("not yet written")
            sys.stdin.read()
            raise KeyboardInterrupt
        cli.run = run
        sys.exit(cli.main(["report"]))"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""})
    process.stdout.close()  # as a `tee` does that Ctrl-C has ended
    process.stdin.close()
    assert process.stderr.read() == b"\nStopped. What is finished is kept, and the same command goes on.\n" and process.wait() == 130


def test_capture_writes_everything_that_is_needed(folder, photos, tmp_path):
    out = tmp_path / "result.safetensors"
    arguments = ["capture", *photos, "--model", folder, "--layers", "0,2-3", "--prefix", "a red fish", "--out", str(out)]
    assert main([*arguments, "--device", "cpu"]) == 0
    tensors = load_file(out)
    mlm = load_mlm(folder, device="cpu")
    for number, one in enumerate(capture(mlm, photos, prefix="a red fish", layers=[0, 2, 3])):
        for name in ("keys", "values", "encoder", "projector"):
            assert torch.equal(tensors[f"{number}.{name}"], getattr(one, name))
        for name in ("slots", "rects", "cells", "view", "is_newline"):
            assert np.array_equal(tensors[f"{number}.{name}"].numpy(), getattr(one.layout, name), equal_nan=True)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["layers"]) == [0, 2, 3] and metadata["prefix"] == "a red fish"
    assert json.loads(metadata["files"]) == photos and json.loads(metadata["image_sizes"]) == [[50, 40], [40, 90]]
    assert metadata["revision"] == mlm.revision and metadata["model"] == folder
    assert [path.name for path in tmp_path.glob("*result*")] == ["result.safetensors"]


def test_capture_never_loses_an_existing_file(folder, photos, tmp_path, capsys):
    out = tmp_path / "result.safetensors"
    out.write_text("precious")
    arguments = ["capture", photos[0], "--model", folder, "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 2 and out.read_text() == "precious"
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0 and "0.keys" in load_file(out)


@pytest.mark.parametrize(("change", "words"), [
    (["PHOTOS/letter.jpg", "PHOTOS/gone.png"], ["letter.jpg", "gone.png"]),
    (["--layers", "0,99"], ["99"]), (["--layers", "3-1"], ["3-1"]), (["--layers", "two"], ["two"]), (["--layers", "0-999999999999"], ["below 10000"]),
    (["--max-pixels", "5000"], ["max_pixels"]), (["--model", "pokcet"], ["pokcet", "pocket"]),
    (["--out", f"{'x' * 300}.safetensors"], ["safetensors: File name too long"]), (["--device", "meta"], ["'meta' is not usable"]), (["--batch-size", "0"], ["batch_size"]),
    (["PHOTOS"], ["is a folder, and a picture is meant"]),
    (["--out", "no/x.safetensors"], ["no"]), (["--out", "x.png"], ["ends in .safetensors"]), (["--out", "/dev", "--overwrite"], ["/dev", "expected a file"]),
])
def test_capture_reports_errors(folder, photos, tmp_path, capsys, change, words):
    (tmp_path / "letter.jpg").write_bytes(b"Dear reader")
    change = [word.replace("PHOTOS", str(tmp_path)) for word in change]
    arguments = ["--model", folder, "--out", str(tmp_path / "x.safetensors"), "--device", "cpu", *change]
    assert main(["capture", *photos, *arguments] if change[0].startswith("--") else ["capture", *change, *arguments[:6]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not list(tmp_path.glob("*.safetensors*"))


def test_capture_from_the_shell(tmp_path, capsys):
    assert main(["capture", str(tmp_path / "nothing.png"), "--out", str(tmp_path / "x.safetensors")]) == 2
    wrong = capsys.readouterr().err
    assert "nothing.png" in wrong and "Traceback" not in wrong
    with pytest.raises(SystemExit):
        main(["capture", "--help"])
    explained = capsys.readouterr().out
    assert all(word in explained for word in ("keys", "values", "encoder", "projector", "slots", "rects", "is_newline", "0,3,5-7"))
