"""`pip install .` gives a package that works from any folder, with the pocket model, claims and catalogue in it."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from kvutils.run.notebook import ROOT

USE = """
import sys
import kvutils
from kvutils.datasets import open_dataset
from kvutils.datasets.catalog import CATALOG
from kvutils.models import load_encoder, load_mlm
from kvutils.run import cli
from kvutils.run.judged import load_claims
assert kvutils.__file__.startswith(sys.argv[1]), kvutils.__file__
assert load_mlm("pocket").num_layers == 12 and load_encoder("pocket-siglip")
assert len(load_claims()) == 16 and len(CATALOG) == 11 and len(open_dataset("pocket-imagenet-s", scenes=2)) > 0
assert cli.main(["data"]) == 0
assert cli.main(["capture", "photo.png", "--out", "photo.safetensors"]) == 0
assert cli.main(["replicate"]) == 2
assert cli.main(["plan"]) == 0
assert sorted(kvutils.__all__)[0] == "Capture" and kvutils.load_mlm
"""


def run(*command: str, **options) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=400, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_installed_package_works_from_any_folder(tmp_path):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "kvutils", source / "kvutils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", source / "data", ignore=shutil.ignore_patterns("cache", "results", "training"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source))
    with zipfile.ZipFile(next(tmp_path.glob("kvutils-*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(site)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kvutils").rglob("*.py")}
    assert modules <= names, "a package is missing in pyproject.toml"
    data = {name.removeprefix("kvutils/data/") for name in names if name.startswith("kvutils/data/")}
    assert {"claims.yaml", "pocket/llava-onevision/model.safetensors", "pocket/siglip/model.safetensors"} <= data
    assert not [name for name in data if name.startswith(("results", "pocket/recipe"))]
    elsewhere.mkdir()
    Image.new("RGB", (60, 40)).save(elsewhere / "photo.png")
    said = run("-c", USE, str(site), cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site), "KVUTILS_OUT": "", "KVUTILS_DATA": ""})
    assert "this needs a clone of the repository" in said and (elsewhere / "photo.safetensors").exists()
