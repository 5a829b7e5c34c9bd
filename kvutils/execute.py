"""Execute one notebook with papermill: its parameters, progress, a cleaned copy, and what is said where it stops."""

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from kvutils import errors, notebook
from kvutils.errors import KVUtilsError, ParameterError

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
