"""Execute one notebook with papermill: its parameters, progress, a cleaned copy, and what is said where it stops.

Run the notebooks: `python -m kvutils.run.replicate --profile pocket --model pocket`.

Each notebook is executed by papermill with this interpreter, cleaned of what changes from run to run, and
written back when it is finished: one that fails or is interrupted leaves the previous version as it was.
The notebooks store their captures and finished parts, so the same command goes on where a run was stopped.

`accelerate launch -m kvutils.run.replicate ...` does the same with several processes, GPUs or nodes with a common file
system: every process runs the notebooks and they share the parts (`store.Parts.make_all`); the first writes the results.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import write_kernel_spec
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from kvutils import errors
from kvutils.errors import KVUtilsError, ParameterError
from kvutils.run import notebook, plan, report
from kvutils.run.notebook import Run
from kvutils.store import read_json, write_json, write_text

WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\d%\||\d\w* \[\d+:\d\d")  # what every line of a tqdm bar contains
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def find_notebooks(wanted: list[str], folder: Path) -> list[Path]:
    """The notebooks `NN_name.ipynb` of a folder in order: all, or those that begin with one of `wanted`."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    names = ", ".join(path.stem for path in found) or "none"
    chosen = [path for path in found if not wanted or any(path.stem.startswith(name) for name in wanted)]
    unknown = [name for name in wanted if not any(path.stem.startswith(name) for path in found)]
    if unknown or not chosen:
        raise ParameterError(f"no notebook {' '.join(unknown) or 'to run'} in {folder}; there are: {names}.")
    return chosen


def defaults(book: NotebookNode) -> dict:
    """The parameters of a notebook with their default values, from its cell tagged `parameters`."""
    cells = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"expected one cell tagged `parameters`, found {len(cells)}.")
    values: dict = {}
    exec(cells[0].source, values)  # the notebook is about to be executed in any case
    return {name: value for name, value in values.items() if not name.startswith("__")}


def changed_parameters(book: NotebookNode, given: dict) -> dict:
    """The given parameters that differ from the notebook's defaults; `ParameterError` for an unknown name."""
    known = defaults(book)
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ParameterError(f"unknown parameter {', '.join(unknown)}; the notebook has: {', '.join(known)}.")
    return {name: value for name, value in given.items() if value != known[name]}


def set_colab_cells(book: NotebookNode, name: str) -> None:
    """Make the cells tagged `colab` those for the repository's public address (none without one)."""
    cells = []
    for i, (kind, source) in enumerate(notebook.colab_cells(name)):
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        cells.append(make(source, id=f"colab-{i}", metadata={"tags": ["colab"]}))
    book.cells = cells + [cell for cell in book.cells if "colab" not in cell.metadata.get("tags", [])]


def clean(book: NotebookNode) -> NotebookNode:
    """The executed notebook without what changes from run to run: times, widget state, paths, versions."""
    book.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        language_info={"name": "python"})
    for i, cell in enumerate(book.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        if "injected-parameters" in tags:
            cell.id = f"injected-{i}"  # papermill draws one at random
        outputs = []
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            if output.get("name") == "stderr":  # progress bars go; anything else stays to be seen
                lines = re.split(r"[\r\n]|\x1b\[A", output.text)
                output.text = "".join(f"{line}\n" for line in lines if line.strip() and not BAR.search(line))
                if not output.text:
                    continue
            if WIDGET in output.get("data", {}):
                del output.data[WIDGET]
                output.metadata.pop(WIDGET, None)
                if set(output.data) <= {"text/plain"}:  # only the widget's name is left
                    continue
            for holder in (output, output.get("data", {})):
                for key, value in holder.items():
                    if isinstance(value, str) and not key.startswith("image/png"):
                        holder[key] = value.replace(f"{notebook.ROOT}{os.sep}", "").replace(str(notebook.ROOT), ".")
            # How a stream is cut into pieces depends on timing.
            same = outputs and output.output_type == "stream" == outputs[-1].output_type
            if same and output.name == outputs[-1].name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return book


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """One line per notebook: the cell, the time gone and the time of the last run; redrawn on a terminal."""

    def __init__(self, name: str, cells: int, last: float | None):
        self.name, self.cells, self.cell, self.start = name, cells, 0, time.monotonic()
        self.last = f", {duration(last)} the last time" if last else ""
        self.stop, self.live = threading.Event(), sys.stdout.isatty()

    def __enter__(self) -> "Progress":
        print(f"{self.name}  running{self.last}", end="" if self.live else "\n", flush=True)
        self.thread = threading.Thread(target=self._tick, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.live:
            print("\r\x1b[K", end="")

    def _tick(self) -> None:
        while not self.stop.wait(1 if self.live else 60):
            line = f"{self.name}  cell {self.cell} of {self.cells}, {duration(self.elapsed)}{self.last}"
            print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", flush=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start


def failed_copy(path: Path) -> Path:
    """Where a failed notebook is kept as far as it was executed."""
    return notebook.cache_root() / "failed" / path.name


def execute(path: Path, parameters: dict, last: float | None) -> tuple[NotebookNode, float]:
    """Execute a notebook with papermill; (the cleaned notebook, seconds). The file itself is not touched.

    Raises `PapermillExecutionError` for a failing cell (what was executed is kept in data/cache/failed/) and
    `KeyboardInterrupt` when interrupted.
    """
    book = nbformat.read(path, as_version=4)
    parameters = changed_parameters(book, parameters)
    set_colab_cells(book, path.stem)
    with tempfile.TemporaryDirectory() as folder, Progress(path.stem, len(book.cells), last) as progress:
        # A kernel named python3 that is this interpreter, wherever Jupyter would have looked first.
        write_kernel_spec(os.path.join(folder, "share", "kernels", "python3"),
                          extra_arguments=["--log-level=CRITICAL"])
        environment = {"JUPYTER_PATH": os.path.join(folder, "share"),
                       "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        source, target = Path(folder, path.name), Path(folder, "executed.ipynb")
        nbformat.write(book, source)
        try:
            done = papermill.execute_notebook(
                source, target, parameters, kernel_name="python3", progress_bar=False, cwd=path.parent,
                # papermill adds a cell with the parameters
                on_cell_start=lambda cell, cell_index: setattr(progress, "cell", min(cell_index + 1, progress.cells)))
        except PapermillExecutionError:
            failed_copy(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, failed_copy(path))
            raise
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return clean(done), progress.elapsed


def explain(path: Path, error: Exception) -> str:
    """What went wrong in a notebook, briefly: the message alone where the library raised it on purpose."""
    if isinstance(error, KVUtilsError):
        return f"{path.stem}  not run: {error}"
    if not isinstance(error, PapermillExecutionError):
        return f"{path.stem}  stopped: {type(error).__name__}: {error} (out of memory?)"
    text = f"{path.stem}  stopped in cell {error.cell_index + 1}: {error.ename}: {ANSI.sub('', error.evalue)}"
    if not issubclass(getattr(errors, error.ename, Exception), KVUtilsError):
        lines = ANSI.sub("", "\n".join(error.traceback)).splitlines()
        text += "\n" + "\n".join(f"    {line}" for line in lines[-12:])
    return f"{text}\nAs far as it was executed it is in {show(failed_copy(path))}."


def show(path: Path) -> str:
    """A path as a user types it: relative to the working directory where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def verdict_lines(lines: list[dict]) -> str:
    """The verdict table for a terminal; claims that are not run in one line."""
    run = [line for line in lines if line["verdict"] != "not run"]
    out = [f"{line['id']:<4}{line['verdict']:<16}{report.interval(line, 'ours')} {line['unit']}"
           f"  (paper: {report.number(line['paper'])})" for line in run]
    return "\n".join([*out, "not run: " + " ".join(x["id"] for x in lines if x not in run)])


def compare(old: Path, new: Path, names: list[str]) -> list[str]:
    """Where the verdicts of two folders of results differ, for the claims of the notebooks `names`."""
    def read(folder: Path) -> dict[str, str]:
        lines = report.rows(report.read_results(folder))
        return {line["id"]: line["verdict"] for line in lines if line["notebook"] in names}
    before, after = read(old), read(new)
    return [f"{claim}: {before[claim]} in {show(old)}, {after[claim]} now" for claim in before
            if before[claim] != after[claim]]


def run_all(paths: list[Path], parameters: dict, out: Path, executed: Path) -> list[str]:
    """Execute the notebooks one after the other, write them to `executed`; returns those that failed."""
    stored = notebook.cache_root() / "timings.json"
    failures = []
    for path in paths:
        timings = read_json(stored) if stored.exists() else {}
        key = "/".join([str(parameters["profile"]), str(parameters["model"]), path.stem])
        try:
            book, seconds = execute(path, parameters, timings.get(key))
        except (KVUtilsError, PapermillExecutionError, RuntimeError) as error:  # the last: the kernel died
            print(explain(path, error), file=sys.stderr if notebook.rank() else sys.stdout, flush=True)
            failures.append(path.stem)
            continue
        write_text(executed / path.name, nbformat.writes(book) + "\n")
        if not notebook.rank():
            write_json(stored, timings | {key: round(seconds, 1)})
        print(f"{path.stem}  done in {duration(seconds)}: {show(executed / path.name)}", flush=True)
    return failures


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvutils.run.replicate", description=(
        "Run the notebooks; write them executed, their results, figures and the verdict table. "
        "Interrupted, the same command goes on."))
    parser.add_argument("--profile", default=notebook.DEFAULT[0], choices=notebook.PROFILES)
    parser.add_argument("--model", default=notebook.DEFAULT[1], help="a name, a folder or a hub id")
    parser.add_argument("--notebooks", nargs="+", default=[], metavar="NN", help="01 03; all without")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        dest="parameters", help="a notebook parameter; writes below data/cache/runs")
    parser.add_argument("--out", type=Path, help="write everything below this folder, not the repository")
    parser.add_argument("--check", action="store_true",
                        help="write below data/cache/check and compare the verdicts with the committed ones")
    parser.add_argument("--figures-only", action="store_true", help="draw the stored results, run nothing")
    return parser.parse_args(arguments)


def replicate(chosen: argparse.Namespace) -> int:
    """Run what `options` describes; 0, or 1 if something failed."""
    parameters = {"profile": chosen.profile, "model": chosen.model}
    if Path(chosen.model).is_dir():  # the notebooks run in their own folder
        parameters["model"] = str(Path(chosen.model).resolve())
    more = {name: yaml.safe_load(value) for name, value in chosen.parameters}
    out = chosen.out
    if out is None and chosen.check:
        out = notebook.cache_root() / "check"
    elif out is None and more:
        name = "-".join(re.sub(r"[^\w.]+", "_", f"{key}_{value}") for key, value in sorted(more.items()))
        out = notebook.cache_root() / "runs" / name
    if out is not None:
        os.environ["KVUTILS_OUT"] = str(out.resolve())
    if notebook.rank():  # another process writes the results; what this one writes beside the parts is thrown away
        os.environ["KVUTILS_OUT"] = str(notebook.cache_root() / "processes" / str(notebook.rank()))
    out = notebook.output_root()
    run = Run("", **parameters)
    if chosen.figures_only:
        from kvutils import plots
        plots.draw_all(run.folder, run.figures)
        print(f"figures: {show(run.figures)}")
        return 0
    paths = find_notebooks(chosen.notebooks, notebook.ROOT / "notebooks")
    if chosen.profile != "pocket":
        plan.check_ready(chosen.profile, parameters["model"], [path.stem[:2] for path in paths], more.get("data_options"))
    default = (chosen.profile, chosen.model) == notebook.DEFAULT
    failures = run_all(paths, parameters | more, out, out / "notebooks" if default else run.folder)
    if notebook.rank():
        return int(bool(failures))
    if not run.folder.exists():
        return 1
    written = report.write(out)
    print(f"\n{verdict_lines(report.rows(report.read_results(run.folder)))}\n")
    print(f"results: {show(run.folder)}\nfigures: {show(run.figures)}")
    print("".join(f"updated: {show(path)}\n" for path in written), end="")
    if failures:
        print(f"FAILED: {', '.join(failures)}; verdicts of these, if any, are an earlier run's.")
    if chosen.check:
        committed = notebook.ROOT / "data" / "results" / run.profile / run.folder.name
        failures += (differences := compare(committed, run.folder, [path.stem for path in paths]))
        print("\n".join(differences) or f"the verdicts are those in {show(committed)}")
    return int(bool(failures))


@contextmanager
def silent() -> Iterator[None]:
    """No output of a process beside the first; its errors still appear."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    try:
        with silent() if notebook.rank() else nullcontext():
            return replicate(chosen)
    except KVUtilsError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Finished parts are stored: the same command goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
