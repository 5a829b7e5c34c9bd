"""`import kvutils as kv`: light, complete, and what it shows of an object fits a cell's output."""

import doctest
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny, tiny_siglip

import kvutils as kv
from kvutils.readout.features import FeatureExtractor

HEAVY = ("torch", "transformers", "numpy", "PIL", "matplotlib")


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_the_import_is_light_and_says_how_threads_wait(monkeypatch, given, found):
    code = f"import kvutils, os, sys; print([name for name in {HEAVY} if name in sys.modules], os.environ['OMP_WAIT_POLICY'])"
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **given}).stdout
    assert told == f"[] {found}\n"


def test_the_docstring_tells_every_name_and_each_is_there():
    table = re.findall(r"^    (\w+)  +\S.*$", kv.__doc__.split("What `kv.` offers")[1].split("One vocabulary")[0], re.M)
    assert table == kv.__all__ and len(set(table)) == 16
    assert set(table) <= set(dir(kv)) and {"VOID", "data_folder"} <= set(dir(kv))
    for name in table:
        assert getattr(kv, name).__name__ == name and getattr(kv, name).__doc__
    assert kv.VOID == 255


@pytest.mark.parametrize("name", [*kv.__all__, ""])
def test_the_example_of_every_name_runs(name, tmp_path, monkeypatch):
    """As `help` shows it, with what the face's own docstring names: `mlm` and `scene`; and errors are told where there can be any."""
    monkeypatch.chdir(tmp_path)
    scene = kv.open_dataset("pocket-coco", count=1)[0].image
    scene.save("photo.jpg")
    text, about = (getattr(kv, name) if name else kv).__doc__, {"kv": kv, "scene": scene, "mlm": kv.load_mlm("pocket", device="cpu"), "torch": torch}
    examples = doctest.DocTestParser().get_doctest(text, about, name, None, 0)
    said = []
    found = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert found.attempted and not found.failed, "".join(said)
    assert examples.examples[-1].want, "an example shows what comes of it"
    assert "Error" in text or not name, "which errors?"


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'captures'.*capture"):
        kv.captures  # noqa: B018


def test_names_of_the_face_hide_no_module():
    import kvutils.answer
    import kvutils.block
    import kvutils.keys

    assert kvutils.keys.KeyVariance is kv.KeyVariance and kvutils.block.block_keys is kv.block_keys
    assert kvutils.answer.ImageSession is kv.ImageSession


def test_objects_show_themselves_in_at_most_three_lines():
    """What a cell's last line prints: name, layers, tokens, shape; not thousands of numbers."""
    mlm, encoder = tiny("llava_onevision"), tiny_siglip()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    shot = kv.capture(mlm, [image])[0]
    tokens = len(shot.layout)
    every = kv.KeySelection("every key", torch.ones(2, mlm.num_kv_heads, tokens, dtype=torch.bool), (1, 3))
    extractor = FeatureExtractor(mlm)
    with kv.ImageSession(mlm, image) as session:
        shown = {  # what is shown -> what it names
            repr(mlm): (mlm.name, "5 layers", "llava_onevision", "float32"),
            repr(encoder): (encoder.name, "layers", "channels", "float32"),
            repr(shot): (str(tokens), "layers", "60x40"),
            repr(shot.layout): (str(tokens), "60x40"),
            repr(kv.key_variance(mlm, [image, image], progress=False)): ("images: 2", str(tokens)),
            repr(every): ("every key", "[1, 3]", str(tokens)),
            repr(session): (mlm.name, str(tokens)),
            repr(extractor): (mlm.name, "layers 0-4"),
            repr(extractor.images([("a", image)])[0]): ("image tokens", "60x40", "value"),
        }
    for text, words in shown.items():
        assert len(text.splitlines()) <= 3 and len(text) < 400, text
        assert all(word in text for word in words), text
