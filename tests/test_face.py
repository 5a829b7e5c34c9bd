"""`import kvutils as kv`: light, complete, and what it shows of an object fits a cell's output."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny, tiny_siglip

import kvutils as kv

HEAVY = ("torch", "transformers", "numpy", "PIL", "matplotlib")


def test_the_import_is_light():
    code = f"import kvutils, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_docstring_tells_every_name_and_each_is_there():
    table = re.findall(r"^    (\w+)  +\S.*$", kv.__doc__.split("What `kv.` offers")[1].split("One vocabulary")[0], re.M)
    assert table == kv.__all__ and len(set(table)) == 14
    assert set(table) <= set(dir(kv)) and {"VOID", "data_folder"} <= set(dir(kv))
    for name in table:
        assert getattr(kv, name).__name__ == name and getattr(kv, name).__doc__
    assert kv.VOID == 255


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
    mlm, encoder = tiny("llava_onevision"), tiny_siglip()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    shot = kv.capture(mlm, [image])[0]
    expected = [  # an object, and what its repr names
        (mlm, (mlm.name, "5 layers", "llava_onevision", "float32")),
        (encoder, (encoder.name, "layers", "channels", "float32")),
        (shot.layout, (f"{len(shot.layout)} image tokens of a 60x40 picture", "base 4x4, tiles", "newlines")),
        (shot, (f"{len(shot.layout)} image tokens of a 60x40 picture", "layers 0 to 4", f"values (5, 2, {len(shot.layout)}, 8) float32")),
    ]
    for one, words in expected:
        shown = repr(one)
        assert len(shown.splitlines()) <= 3 and len(shown) < 400, shown
        assert all(word in shown for word in words), shown


def test_explore_takes_a_model_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    assert "value.2" in kv.explore(tiny("llava_onevision"), image).children[0].options
