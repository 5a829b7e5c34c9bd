"""Run the notebooks: `kvutils replicate`; with several processes, GPUs or nodes `accelerate launch -m kvutils replicate`.

Each notebook is executed by papermill with this interpreter, cleaned of what changes from run to run, and written back when it is
finished: one that fails or is interrupted leaves the previous version as it was. The notebooks store their finished parts, so the
same command goes on where a run was stopped. Of several processes with a common file system every one runs the notebooks and they
share the parts (`store.Parts.make_all`); the first writes the results."""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from kvutils import errors, plots
from kvutils.checkpoints import MODELS, find_model
from kvutils.errors import DataError, KVUtilsError, ParameterError, StoreError, not_written, one_of
from kvutils.run import compare, notebook, plan, report
from kvutils.run.notebook import Run
from kvutils.run.sizes import left_out, parameters_of
from kvutils.run.verdicts import NOTHING
from kvutils.store import atomic, digest, need_writable, read_json, write_text

BAR = re.compile(r"\d%\||\d\w* \[\d+:\d\d")  # what every line of a tqdm bar contains
ANSI = re.compile(r"\x1b\[[0-9;]*m")
SETUP = """\
import importlib.util, os, subprocess, sys, tomllib
from importlib.metadata import version

# On Colab: fetch the code and install what is missing; the torch that is there stays, as another build may not fit the
# driver. A T4 has room for model = "llava-onevision-0.5b" with profile = "paper" (see "The real models" in the README).
if importlib.util.find_spec("kvutils") is None:
    if not os.path.isdir("repository"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", "repository"], check=True)
    with open("repository/pyproject.toml", "rb") as file:
        wanted = [each for each in tomllib.load(file)["project"]["dependencies"] if not each.startswith("torch>")]
    keep = [f"{{name}}=={{version(name)}}" for name in ("torch", "torchvision") if importlib.util.find_spec(name)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *keep, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", "repository"], check=True)
    sys.path.insert(0, "repository")"""


def rank() -> int:
    """Number of this process among those that `accelerate launch` or torchrun started for one run; 0 alone."""
    return int(os.environ.get("RANK", 0))


def need_clone() -> None:
    """DataError where there are no notebooks, as in an installed package."""
    if not (notebook.ROOT / "notebooks").is_dir():
        raise DataError(f"this needs a clone of the repository, with its notebooks and results; {notebook.ROOT} has no notebooks/. "
                        "Clone it and run `make replicate` there. `kvutils capture` and `import kvutils` work from anywhere.")


def find_notebooks(wanted: list[str], folder: Path) -> list[Path]:
    """The notebooks `NN_name.ipynb` of a folder in order: all, or those that begin with one of `wanted`."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    for name in wanted or [""]:
        if not any(path.stem.startswith(name) for path in found):
            raise ParameterError(f"no notebook {name or 'to run'} in {folder}; there are: {', '.join(path.stem for path in found) or 'none'}.")
    return [path for path in found if path.stem.startswith(tuple(wanted or [""]))]


def changed_parameters(book: NotebookNode, given: dict) -> dict:
    """The given parameters that differ from the defaults in the cell tagged `parameters`; an unknown name is an error."""
    source = next(cell.source for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    known: dict = {}
    exec(source, {}, known)  # the notebook is about to be executed in any case
    for name, value in given.items():
        one_of("parameter", name, known)
        notebook.check_value(name, value, type(known[name]))
    return {name: value for name, value in given.items() if value != known[name]}


def check_given(paths: Mapping[Path, dict]) -> None:
    """ParameterError, once and before any of them runs, for what every notebook objects to in its parameters."""
    for path, parameters in paths.items():
        with suppress(ParameterError):
            changed_parameters(nbformat.read(path, as_version=4), parameters)
            return
    changed_parameters(nbformat.read(path, as_version=4), parameters)


def set_colab_cells(book: NotebookNode, name: str, address: str) -> None:
    """Make the cells tagged `colab` a badge and a set-up for the repository's public address (none without one)."""
    new = nbformat.v4
    cells = [new.new_markdown_cell(report.badge(name, address)), new.new_code_cell(SETUP.format(address=address))] if address else []
    for i, cell in enumerate(cells):
        cell.id, cell.metadata = f"colab-{i}", NotebookNode(tags=["colab"])
    book.cells = cells + [cell for cell in book.cells if "colab" not in cell.metadata.get("tags", [])]


def clean(book: NotebookNode) -> NotebookNode:
    """The executed notebook without what changes from run to run: times, widget state, paths, versions."""
    book.metadata = NotebookNode(kernelspec={"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
                                 language_info={"name": "python"})
    for i, cell in enumerate(book.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        if "injected-parameters" in tags:
            cell.id = f"injected-{i}"  # papermill draws one at random
        outputs = []
        for output in filter(_stays, cell.get("outputs", [])):
            for holder in (output, output.get("data", {})):
                for key, value in holder.items():
                    if isinstance(value, str) and not key.startswith("image/png"):
                        holder[key] = value.replace(f"{notebook.ROOT}{os.sep}", "").replace(str(notebook.ROOT), ".")
            if outputs and output.output_type == "stream" == outputs[-1].output_type and output.name == outputs[-1].name:
                outputs[-1].text += output.text  # how a stream is cut into pieces depends on timing
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return book


def _stays(output: NotebookNode) -> bool:
    """Whether anything is left of an output without progress bars and widgets, which are taken out of it."""
    output.pop("transient", None)
    if output.get("name") == "stderr":  # anything but the bars stays to be seen
        lines = re.split(r"[\r\n]|\x1b\[A", output.text)
        output.text = "".join(f"{line}\n" for line in lines if line.strip() and not BAR.search(line))
        return bool(output.text)
    widget = output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return widget is None or "image/png" in output.data  # a widget's picture is what remains of it without a kernel


def execute(path: Path, parameters: dict, failed: Path) -> NotebookNode:
    """The notebook as papermill executed it, cleaned; the file itself is not touched. `PapermillExecutionError` for a failing
    cell: what was executed is then kept as the file `failed`."""
    book = nbformat.read(path, as_version=4)
    parameters = changed_parameters(book, parameters)
    set_colab_cells(book, path.stem, report.repository(notebook.ROOT))
    with tempfile.TemporaryDirectory() as folder:
        # A kernel named python3 that is this interpreter, wherever Jupyter would have looked first.
        write_kernel_spec(os.path.join(folder, "share", "kernels", "python3"), extra_arguments=["--log-level=CRITICAL"],
                          overrides={"env": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}})
        # What Jupyter and IPython would write below the home folder, which may be read-only, goes there too.
        os.environ.update(JUPYTER_PATH=os.path.join(folder, "share"), JUPYTER_RUNTIME_DIR=os.path.join(folder, "runtime"),
                          IPYTHONDIR=os.path.join(folder, "ipython"))  # fmt: skip
        source, target = Path(folder, path.name), Path(folder, "executed.ipynb")
        nbformat.write(book, source)
        bar = {"desc": path.stem, "leave": False, "disable": True if rank() else None}  # None: unless it is a terminal
        try:
            return clean(papermill.execute_notebook(source, target, parameters, kernel_name="python3", progress_bar=bar, cwd=path.parent))
        except PapermillExecutionError:
            with suppress(StoreError), atomic(failed) as temporary:  # what stopped the notebook is more to the point
                shutil.copy(target, temporary)
            raise


def explain(path: Path, error: Exception, failed: Path) -> str:
    """What went wrong in a notebook, briefly: the message alone where the library raised it on purpose."""
    if isinstance(error, KVUtilsError):
        return f"{path.stem}  not run: {error}"
    if isinstance(error, OSError):
        return f"{path.stem}  stopped: {not_written(f'what goes through {tempfile.gettempdir()}', error)}"
    if not isinstance(error, PapermillExecutionError):
        return f"{path.stem}  stopped: {type(error).__name__}: {error} (out of memory?)"
    line = next((line.strip() for line in error.source.splitlines() if line.strip() and not line.startswith("#")), "")  # as a reader sees the cell
    text = f"{path.stem}  stopped in cell [{error.exec_count}] `{line[:60]}`: {error.ename}: {ANSI.sub('', error.evalue)}"
    if not issubclass(getattr(errors, error.ename, Exception), KVUtilsError):
        lines = ANSI.sub("", "\n".join(error.traceback)).splitlines()
        text += "\n" + "\n".join(f"    {line}" for line in lines[-12:])
    return f"{text}\nAs far as it was executed it is in {show(failed)}." if failed.exists() else text


def show(path: Path) -> str:
    """A path as a user types it: relative to the working directory where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def verdict_lines(lines: list[dict]) -> str:
    """The verdict table for a terminal; claims that nothing has measured in one line."""
    silent = " ".join(line["id"] for line in lines if line["why"] == NOTHING)
    out = [f"{line['id']:<5}{line['verdict']:<20}{line['why']}" for line in lines if line["why"] != NOTHING]
    return "\n".join([*out, f"not measured: {silent}"] if silent else out)


def expected(run: Run, kept: Path, name: str) -> str:
    """How long a notebook may take: as its committed run took, else by a rehearsal of the model; "" where there is neither."""
    before = read_json(file)["machine"] if (file := kept / "provenance" / f"{name}.json").is_file() else {}
    hours, whence = before.get("hours"), f"as on {before.get('device')}"
    if hours is None and run.profile != "pocket" and (rehearsed := plan.find_rehearsal(run.model)):
        hours, whence = plan.hours_of(rehearsed, run.size)[0].get(name[:2]), "by a rehearsal; `make plan` says more"
    return f", about {f'{60 * hours:.0f} min' if hours < 1.5 else f'{hours:.1f} h'} in all ({whence})" if hours else ""


def run_all(paths: Mapping[Path, dict], executed: Path, takes: Mapping[str, str]) -> list[str]:
    """Execute the notebooks {path: parameters} one after the other, write them to `executed`; returns those that failed.
    takes: {notebook: how long it may take, in words}."""
    failures = []
    for path, parameters in paths.items():
        print(f"{path.stem}  running{takes[path.stem]}", flush=True)
        start, failed = time.monotonic(), notebook.cache_root() / "failed" / path.name
        failed.unlink(missing_ok=True)
        try:
            write_text(executed / path.name, nbformat.writes(execute(path, parameters, failed)) + "\n")
        except (KVUtilsError, PapermillExecutionError, OSError, RuntimeError) as error:  # the last: the kernel died
            print(explain(path, error, failed), file=sys.stderr if rank() else sys.stdout, flush=True)
            failures.append(path.stem)
        else:
            print(f"{path.stem}  done in {tqdm.format_interval(time.monotonic() - start)} min: {show(executed / path.name)}", flush=True)
    return failures


def given_parameters(pairs: list[tuple[str, str]]) -> dict:
    """{name: value} of `-p NAME VALUE`: JSON, and what is none a text as it stands (YAML would make 010 an 8 and no a False)."""
    found = {}
    for name, text in pairs:
        if name in ("profile", "model", "size"):
            raise ParameterError(f"-p {name} {text}: write --{name} {text}")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def model_of(chosen: argparse.Namespace) -> str:
    """The model as notebooks, which run in their own folder, find it; ModelError for one that is neither known, a folder nor a hub id."""
    spec = find_model(chosen.model)
    return chosen.model if chosen.model in MODELS or not Path(spec.source).is_dir() else str(Path(spec.source).resolve())


def output_folder(chosen: argparse.Namespace, more: Mapping[str, object]) -> Path:
    """Where to write: `--out`, a folder of the cache for a trial, else the repository (or `KVUTILS_OUT`)."""
    if rank():  # another process writes the results; what this one writes beside the parts is thrown away
        return notebook.cache_root() / "processes" / str(rank())
    if chosen.out is None and chosen.check:
        return notebook.cache_root() / "check"
    if chosen.out is None and more:
        name = "-".join(re.sub(r"[^\w.]+", "_", f"{key}_{value}") for key, value in sorted(more.items()))
        return notebook.cache_root() / "runs" / (name if len(name) < 100 else f"{name[:80]}-{digest(more)}")  # file names end at 255
    return Path(chosen.out or notebook.output_root())


def replicate(chosen: argparse.Namespace) -> int:
    """Run what the command line says; 0, or 1 if something failed. Of several processes only the first speaks."""
    model = model_of(chosen)
    parameters = {"profile": chosen.profile, "model": model}
    more = given_parameters(chosen.parameters)
    os.environ["KVUTILS_OUT"] = str(output_folder(chosen, more).resolve())
    out, run = notebook.output_root(), Run("", **parameters, size=chosen.size)
    paths = {path: parameters | parameters_of(path.stem[:2], chosen.profile, chosen.size, chosen.data, more)
             for path in find_notebooks(chosen.notebooks, notebook.ROOT / "notebooks")
             if chosen.notebooks or run.is_default and not more or not path.stem.startswith("00")}  # which measures nothing  # fmt: skip
    check_given(paths)
    plan.check_ready(chosen.profile, model, {path.stem[:2]: each for path, each in paths.items()})
    need_writable(out, "--out or KVUTILS_OUT")
    need_writable(notebook.cache_root(), "KVUTILS_CACHE")
    kept = notebook.ROOT / "data" / "results" / run.profile / run.folder.name
    before = {path.stem: compare.committed(kept / f"{path.stem}.json") for path in paths}
    executed = out / "notebooks" if run.is_default else run.folder
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        for path, each in paths.items():
            if absent := left_out(path.stem[:2], chosen.profile, each):
                print(f"{path.stem}  without {', '.join(absent)}: no hub copy of {', '.join(absent.values())}")
        failures = run_all(paths, executed, {path.stem: expected(run, kept, path.stem) for path in paths})
    if rank() or not run.folder.exists():
        return int(bool(failures))
    written = report.write(out)
    said = "In this small model:\n" if run.profile == "pocket" else ""
    print(f"\n{said}{verdict_lines(report.rows(report.read_all(run.folder)))}\n")
    print(f"results: {show(run.folder)}\nfigures: {show(run.figures)}")
    print("".join(f"updated: {show(path)}\n" for path in written), end="")
    if failures:
        print(f"FAILED: {', '.join(failures)}; verdicts of these, if any, are an earlier run's.")
    if chosen.check:
        failures += (differences := compare.verdicts_apart(kept, run.folder, [path.stem for path in paths]))
        print("\n".join(differences) or f"the verdicts are those in {show(kept)}")
    if not more:
        done = [name for name in before if name not in failures and (run.folder / f"{name}.json").exists()]
        print(compare.numbers_apart({name: before[name] for name in done}, {name: read_json(run.folder / f"{name}.json") for name in done}))
    return int(bool(failures))


def figures(chosen: argparse.Namespace) -> int:
    """Draw the stored results of a profile and model; nothing is run."""
    run = Run("", chosen.profile, model_of(chosen), chosen.size)
    names = [path.stem for path in sorted(run.folder.glob("[0-9][0-9]_*.json"))]
    for name in tqdm(names or [""], "figures", disable=None):  # none: `draw_all` says so
        plots.draw_all(run.folder, run.figures, name)
    print(f"figures: {show(run.figures)}")
    return 0


def make_report(chosen: argparse.Namespace) -> int:
    """Write the generated files that are stale, or with --check only name them; 1 if there are some then."""
    root = notebook.output_root()
    paths = list(report.stale(root)) if chosen.check else report.write(root)
    for path in paths:
        print(f"{'stale, `make report` writes it anew' if chosen.check else 'written'}: {path.relative_to(root)}")
    if not paths:
        print(f"{len(report.generated(root))} generated files, all up to date")
    return int(chosen.check and bool(paths))
