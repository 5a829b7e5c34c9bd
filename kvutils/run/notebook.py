"""What every notebook's first and last cells need: parameters, paths, environment, results file, Colab cells.

Nothing here depends on the working directory: papermill runs a notebook from one folder, nbval from another.
"""

import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from kvutils.errors import ParameterError
from kvutils.store import rounded, write_json

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("pocket", "paper")
DEFAULT = ("pocket", "pocket")  # the profile and model whose results, figures and notebooks are committed


def output_root() -> Path:
    """Where results and figures go: `KVUTILS_OUT` if set (tests write elsewhere), else the repository."""
    return Path(os.environ.get("KVUTILS_OUT") or ROOT).resolve()


def rank() -> int:
    """Number of this process among those that `accelerate launch` or torchrun started for one run; 0 alone."""
    return int(os.environ.get("RANK", 0))


def cache_root() -> Path:
    """Where captures and finished parts are kept: `KVUTILS_CACHE` if set, else data/cache."""
    return Path(os.environ.get("KVUTILS_CACHE") or ROOT / "data" / "cache").resolve()


@dataclass(frozen=True)
class Run:
    """The places of one notebook's run.

    >>> run = Run("01_value_flow", profile, model)
    >>> run.results, run.figures, run.cache
    """

    notebook: str
    profile: str = DEFAULT[0]
    model: str = DEFAULT[1]

    @property
    def folder(self) -> Path:
        """data/results/<profile>/<model>/; of a model's folder its name, of a hub id "owner--name"."""
        name = Path(self.model).name if os.path.isabs(self.model) else self.model.replace("/", "--")
        return output_root() / "data" / "results" / self.profile / name

    @property
    def results(self) -> Path:
        """The results file of this notebook."""
        return self.folder / f"{self.notebook}.json"

    @property
    def figures(self) -> Path:
        """The folder of the figures; only the committed run draws into figures/ itself."""
        default = (self.profile, self.model) == DEFAULT
        return output_root() / "figures" if default else self.folder / "figures"

    @property
    def cache(self) -> Path:
        """The folder of captures and parts, for `Store` and `Parts`."""
        return cache_root() / self.profile / self.folder.name

    def write(self, *, parameters: Mapping, provenance: Mapping, claims: Mapping, **sections: object) -> Path:
        """Write the results file: `claims` {id: {value, low, high, n, unit, entries}}, and `sections`."""
        write_json(self.results, rounded({
            "notebook": self.notebook, "profile": self.profile, "model": self.model, "parameters": parameters,
            "provenance": provenance, "claims": claims, **sections}))
        return self.results


def check_parameters(namespace: dict, **known: type | tuple) -> dict:
    """The notebook's parameters, checked; call it with `globals()` in the first cell after the parameters.

    `known` gives each name's type, or the tuple of its possible values. An unknown name (papermill only
    warns), a wrong type and an impossible value are each a `ParameterError`. Every lower-case variable with a
    plain value counts as a parameter, so the cells before this one only import.

    >>> parameters = check_parameters(globals(), profile=PROFILES, model=str, seed=int)
    """
    if "_parameters" not in namespace:  # when the cell is run again, later variables are not parameters
        plain = (str, int, float, bool, list, dict, tuple, type(None))
        for name, value in namespace.items():
            if name in known or name.startswith("_") or name.upper() == name or not isinstance(value, plain):
                continue
            if name not in ("In", "Out"):
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ParameterError(f"unknown parameter {name!r}{hint} There are: {', '.join(known)}.")
    for name, expected in known.items():
        if name not in namespace:
            raise ParameterError(f"parameter {name!r} is not set: the cell tagged `parameters` must set it.")
        value = namespace[name]
        if isinstance(expected, tuple):
            if value not in expected:
                choices = ", ".join(map(repr, expected))
                raise ParameterError(f"parameter {name} = {value!r}: expected one of {choices}.")
        elif type(value) is not expected and not (expected is float and type(value) is int):
            raise ParameterError(f"parameter {name} = {value!r}: expected {expected.__name__}, found "
                                 f"{type(value).__name__}.")
    namespace["_parameters"] = {name: namespace[name] for name in known}
    return namespace["_parameters"]


@cache
def code_commit() -> str:
    """The commit that last changed the code, with " (modified)" if the files differ; "unknown" without git.

    Of the code only, so that committing results does not change the next run's results.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments, "--", "kvutils", "requirements.txt"],
                              capture_output=True, text=True, check=True).stdout.strip()
    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=10")
        return (commit or "unknown") + (" (modified)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(mlm: object = None, **more: object) -> dict:
    """What a result came from: commit, versions, device; of an `MLM` also revision, dtype, attention and resizer."""
    device = torch.device(getattr(mlm, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {"commit": code_commit(), "device": f"{device.type} ({name})",
             "python": platform.python_version()}
    about |= {package: version(package) for package in ("torch", "transformers", "numpy", "scikit-learn")}
    if mlm is not None:
        about |= {"model": mlm.name, "family": mlm.family, "revision": mlm.revision,
                  "dtype": str(mlm.dtype).removeprefix("torch."), "attention": mlm.attention,
                  "image_backend": mlm.image_backend}
    return about | more


def environment_table(mlm: object = None, **more: object) -> None:
    """Print `provenance` as a table."""
    about = provenance(mlm, **more)
    width = max(map(len, about))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in about.items()))


def repository() -> str:
    """The public address of this repository from pyproject.toml, "" while there is none."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["kvutils"]["repository"].rstrip("/").removesuffix(".git")


def colab_cells(notebook: str, address: str | None = None) -> list[tuple[str, str]]:
    """The first cells of a notebook as (cell type, source): Colab badge and set-up; none without an address.

    On Colab the set-up clones the repository and installs what is missing; the torch that is there stays, whatever its
    version: another build may not fit the machine's driver.
    """
    address = repository() if address is None else address
    if not address:
        return []
    path = address.removeprefix("https://").removeprefix("github.com/")
    link = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{notebook}.ipynb"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
    setup = f'''\
import importlib.util, os, subprocess, sys, tomllib
from importlib.metadata import version

# On Colab: fetch the code and install what is missing; the torch that is there stays. A T4 has room for
# model = "llava-onevision-0.5b" with profile = "paper" (see "Real models" in the README for the data).
if importlib.util.find_spec("kvutils") is None:
    if not os.path.isdir("repository"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", "repository"], check=True)
    with open("repository/pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    with open("keep.txt", "w") as file:
        file.write("".join(f"{{name}}=={{version(name)}}\\n" for name in ("torch", "torchvision") if importlib.util.find_spec(name)))
    wanted = [each for each in wanted if not each.startswith("torch>")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", "keep.txt", *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", "repository"], check=True)
    sys.path.insert(0, "repository")'''
    return [("markdown", badge), ("code", setup)]
