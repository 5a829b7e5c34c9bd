"""What every notebook's first and last cells need: parameters, places, environment, verdicts, tables, results file.
Nothing here depends on the working directory: papermill runs a notebook from one folder, nbval from another."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from IPython.display import Markdown

from kvutils import named_folder
from kvutils.checkpoints import MODELS, base_name
from kvutils.datasets import USES, data_sources
from kvutils.errors import ParameterError, one_of
from kvutils.run import DEFAULT, judged, report
from kvutils.run import PROFILES as PROFILES
from kvutils.run.sizes import SIZES as SIZES
from kvutils.run.verdicts import Verdict, judge
from kvutils.store import Parts, read_json, write_json

if TYPE_CHECKING:  # a run that only starts notebooks needs neither models nor tasks, which take seconds to import
    from kvutils.models import MLM
    from kvutils.run import items

ROOT = Path(__file__).resolve().parents[2]


def output_root() -> Path:
    """Where results and figures go: `KVUTILS_OUT` if set (tests write elsewhere), else the repository."""
    return (named_folder("KVUTILS_OUT") or ROOT).resolve()


def cache_root() -> Path:
    """Where finished parts are kept: `KVUTILS_CACHE` if set, else data/cache."""
    return (named_folder("KVUTILS_CACHE") or ROOT / "data" / "cache").resolve()


@dataclass(frozen=True)
class Run:
    """The places of one notebook's run, and what its last cells show and write: `Run("01_value_flow", profile, model, size)`."""

    notebook: str
    profile: str = DEFAULT[0]
    model: str = DEFAULT[1]
    size: str = "full"
    made: list[Parts] = field(default_factory=list, init=False, repr=False, compare=False)  # by `parts`

    def __post_init__(self):
        """The pocket model runs on one thread, also in JupyterLab: a second one gains a fifth, and beside other work both collapse."""
        if not gc.isenabled():  # by `kernels`, while a million objects are imported; frozen, no collection looks at them again
            gc.freeze()
            gc.enable()
        known = MODELS.get(base_name(self.model))
        if known and known.profile == "pocket" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)

    @property
    def folder(self) -> Path:
        """data/results/<profile>/<model>/; of a model's folder its name, of a hub id "owner--name", of name@commit the name; another
        size than full behind it."""
        name = Path(self.model).name if os.path.isabs(self.model) else base_name(self.model).replace("/", "--")
        return output_root() / "data" / "results" / self.profile / (name if self.size == "full" else f"{name}-{self.size}")

    @property
    def is_default(self) -> bool:
        """Whether it is the run whose notebooks, results and figures are committed."""
        return (self.profile, self.model, self.size) == (*DEFAULT, "full")

    @property
    def results(self) -> Path:
        return self.folder / f"{self.notebook}.json"

    @property
    def figures(self) -> Path:
        """The folder of the figures; only the committed run draws into figures/ itself."""
        return (output_root() if self.is_default else self.folder) / "figures"

    def parts(self, mlm: MLM, data_options: Mapping, **depends: object) -> Parts:
        """The finished parts of this profile and model: they depend on the model's settings, on which data are read how and from
        where (samples of another source or size have the same ids), and on whatever else is given (JSON-able). ParameterError where
        the results of a folder's other weights would be lost."""
        came = self.folder / "provenance" / self.results.name
        kept = not mlm.revision.startswith("untrained") and not rank()  # what other processes write is thrown away
        if os.path.isabs(self.model) and kept and came.is_file() and (other := read_json(came).get("revision")) != mlm.revision:
            raise ParameterError(f"{self.folder} holds results of other weights ({other}; {self.model} has {mlm.revision}). Move it away, or "
                                 "write elsewhere: KVUTILS_OUT=/a/folder")  # fmt: skip
        sources = data_sources(USES[self.profile].get(self.notebook[:2], {}).values(), data_options)
        self.made.append(Parts(cache_root() / self.profile / self.folder.name / "parts", self.notebook, mlm=mlm.settings,
                               profile=self.profile, options=data_options, sources=sources, **depends))  # fmt: skip
        return self.made[-1]

    def verdicts(self, claims: Mapping[str, Mapping]) -> dict[str, Verdict]:
        """Print the verdict of each claim of this notebook, why, and its note; -> {claim: verdict}."""
        found = {claim["id"]: judge(claim, claims[claim["id"]]) for claim in judged.load_claims() if claim["id"] in claims}
        if self.profile == "pocket":
            print("In this small model:")
        for name, verdict in found.items():
            text = f"{name}: {verdict.word}. {verdict.why} {claims[name].get('note', '')}"
            print(textwrap.fill(text, 110, subsequent_indent="    ", break_on_hyphens=False))
        return found

    def claims_table(self, claims: Mapping[str, Mapping]) -> Markdown:
        """What stands behind the verdicts: of each claim its primary comparison (bold) and the others, each with its own word."""
        lines = [line for claim in judged.load_claims() if claim["id"] in claims for line in judged.comparisons(claim, claims[claim["id"]])]
        return table(judged.COMPARISONS, lines)

    def choices(self, choices: Mapping[str, str]) -> Markdown:
        """The choices made where the paper is silent."""
        return table(("what", "our choice"), choices.items())

    def finish(self, mlm: MLM, *, measured: Mapping[str, items.Table], about: Mapping, results: Mapping, choices: Mapping,
               shown: Mapping | None = None, sources: Mapping | None = None) -> None:  # fmt: skip
        """Write what was measured, the results and where they came from; draw the figures; print the finding.

        measured: the tables by name, and about: {"parameters": ..., and facts of the model such as "num_layers"}, of which the notebook's
        function (`kvutils.run.items.RESULTS`) made `results`: its sections, "claims" and "finding". choices: texts; shown: illustrations,
        which figures read with the results. sources: what the run came from beside the model, such as `data_sources(...)`."""
        from kvutils import plots
        from kvutils.run import items
        came = provenance(mlm, **sources or {})
        # Parts also of earlier starts, but each in one notebook only; the rest (imports, statistics, figures) as this process computed it.
        rest = time.process_time() - sum(parts.busy for parts in self.made)
        came["machine"]["hours"] = float(f"{(sum(sum(parts.seconds.values()) for parts in self.made) + rest) / 3600:.3g}")
        write_json(self.folder / "provenance" / self.results.name, came)
        items.write_items(self.folder, self.notebook, measured, about, choices, shown or {})
        write_json(self.results, items.results_file(self.notebook, about, choices, results), digits=9)
        plots.draw_all(self.folder, self.figures, self.notebook)  # others' results may be of another version
        print(results["finding"])


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markdown:
    """A table to display; texts as they are, numbers with three decimals below 10, one below 100."""
    return Markdown(report.markdown_table(header, rows))


def check_parameters(namespace: dict, **known: type | tuple) -> dict:
    """The notebook's parameters, checked: `check_parameters(globals(), profile=PROFILES, seed=int)` in the cell after them.

    `known` gives each name's type, or the tuple of its possible values. An unknown name (papermill only warns), a wrong type and an
    impossible value are each a `ParameterError`. Every lower-case variable with a plain value counts as a parameter, so the cells before
    this one only import."""
    if "_parameters" not in namespace:  # when the cell is run again, later variables are not parameters
        plain = (str, int, float, bool, list, dict, tuple, type(None))
        for name, value in namespace.items():
            if isinstance(value, plain) and not name.startswith("_") and name != name.upper() and name not in ("In", "Out"):
                one_of("parameter", name, known)
    for name, expected in known.items():
        value = namespace[name]
        if isinstance(expected, tuple):
            one_of(f"value of the parameter {name}:", value, expected)
        else:
            check_value(name, value, expected)
    namespace["_parameters"] = {name: namespace[name] for name in known}
    return namespace["_parameters"]


def check_value(name: str, value: object, expected: type) -> None:
    """ParameterError unless a parameter has its type, and a whole number a size that a run can have."""
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ParameterError(f"parameter {name} = {value!r}: expected {expected.__name__}, found {type(value).__name__}.")
    most = 2**32 - 1 if name in ("seed", "max_pixels") else 10**6  # more resamples, draws or images fill the memory
    if expected is int and not 0 <= value <= most:
        raise ParameterError(f"parameter {name} = {value}: expected a whole number from 0 to {most:,}.")


def rank() -> int:
    """Number of this process among those that `accelerate launch` or torchrun started for one run; 0 alone."""
    told = os.environ.get("RANK") or "0"
    if not told.isdecimal():
        raise ParameterError(f"the environment variable RANK is {told!r}: expected the number of a process, or nothing")
    return int(told)


@cache
def code_commit() -> str:
    """The commit that last changed the code, with " (modified)" if the files differ; "unknown" without git."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments, "--", "kvutils", "requirements.txt"],
                              capture_output=True, encoding="utf-8", check=True).stdout.strip()
    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=10")
        return (commit or "unknown") + (" (modified)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The name of this machine's processor and how many cores there are, as `Intel(R) Xeon(R), 8 cores`."""
    file = Path("/proc/cpuinfo")  # of Linux
    named = re.search(r"^model name\s*: (.*)$", file.read_text(), re.MULTILINE) if file.exists() else None
    return f"{named[1] if named else platform.machine()}, {psutil.cpu_count()} cores"


def provenance(mlm: MLM | None = None, **more: object) -> dict:
    """What a result came from: the settings of an `MLM`; commit, device and versions under "machine"."""
    device = torch.device(getattr(mlm, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name, memory = processor(), psutil.virtual_memory().total
    versions = {package: version(package) for package in ("torch", "transformers", "numpy", "scikit-learn")}
    hardware = f"{device.type} ({name}, {memory / 2**30:.0f} GiB)"
    about = {"machine": {"commit": code_commit(), "device": hardware, "python": platform.python_version(), **versions}}
    if mlm is not None:
        about |= mlm.settings
    return about | more


def environment_table(mlm: MLM | None = None, **more: object) -> None:
    """Print `provenance`, without what differs between two machines of a kind."""
    about = provenance(mlm, **more)
    machine = about.pop("machine")
    about = {name: value.split()[0].split("+")[0] for name, value in machine.items() if name != "commit"} | about
    width = max(map(len, about))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in about.items()))
