"""Notebooks executed by papermill, side by side, and cleaned of what changes from run to run.

Each runs in a kernel of its own, a process that is this interpreter; threads of this process wait for them."""

import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import psutil
from ipykernel.kernelspec import write_kernel_spec
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from kvutils import errors
from kvutils.errors import KVUtilsError, ParameterError, StoreError, at_least, not_written, one_of
from kvutils.run import notebook, report
from kvutils.store import atomic, write_text

BAR = re.compile(r"\d%\||\d\w* \[\d+:\d\d")  # what every line of a tqdm bar contains
ANSI = re.compile(r"\x1b\[[0-9;]*m")
GIB_EACH = 1.5  # main memory of a notebook with the pocket model, at most
LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # of small models: threads mostly wait, and collapse beside other work
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


def changed_parameters(book: NotebookNode, given: dict) -> dict:
    """The given parameters that differ from the defaults in the cell tagged `parameters`; an unknown name is an error."""
    source = next((cell.source for cell in book.cells if "parameters" in cell.metadata.get("tags", [])), "")
    known: dict = {}
    exec(source, {}, known)  # the notebook is about to be executed in any case
    for name, value in given.items():
        one_of("parameter", name, known)
        notebook.check_value(name, value, type(known[name]))
    return {name: value for name, value in given.items() if value != known[name]}


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


@contextmanager
def kernels(environment: Mapping[str, str]) -> Iterator[Path]:
    """While it lasts a kernel named python3 is this interpreter, wherever Jupyter would have looked first; the folder for its files.
    environment: variables of the kernels, where this process has none of the name. No history: they would wait; no gc until `notebook.Run`."""
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what stops a notebook is said by `explain`, and what stops all by `cli`
    with tempfile.TemporaryDirectory() as folder:
        own = {name: os.environ.get(name, value) for name, value in environment.items()} | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        own["PYTHONPATH"] = os.pathsep.join([str(notebook.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # a clone that is not installed
        options = ["--log-level=CRITICAL", "--HistoryManager.enabled=False", "--IPKernelApp.exec_lines=__import__('gc').disable()"]
        write_kernel_spec(os.path.join(folder, "share", "kernels", "python3"), extra_arguments=options, overrides={"env": own})
        # What Jupyter and IPython would write below the home folder, which may be read-only, goes there too.
        os.environ.update(JUPYTER_PATH=os.path.join(folder, "share"), JUPYTER_RUNTIME_DIR=os.path.join(folder, "runtime"),
                          IPYTHONDIR=os.path.join(folder, "ipython"))  # fmt: skip
        yield Path(folder)


def execute(path: Path, parameters: dict, failed: Path, folder: Path) -> NotebookNode:
    """The notebook as papermill executed it in `folder` of `kernels`, cleaned; the file itself is not touched. `PapermillExecutionError`
    for a failing cell: what was executed is then kept as the file `failed`."""
    book = nbformat.read(path, as_version=4)
    parameters = changed_parameters(book, parameters)
    set_colab_cells(book, path.stem, report.repository(notebook.ROOT))
    source, target = folder / path.name, folder / f"executed-{path.name}"
    nbformat.write(book, source)
    bar = {"desc": path.stem, "leave": False, "disable": True if notebook.rank() else None}  # None: unless it is a terminal
    where = {"metadata": {"path": str(path.parent)}}  # papermill's `cwd` would be that of this whole process, of all its notebooks
    try:
        return clean(papermill.execute_notebook(source, target, parameters, kernel_name="python3", progress_bar=bar, resources=where))
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
        return f"{path.stem}  stopped: {type(error).__name__}: {error}{' (out of memory?)' * isinstance(error, RuntimeError)}"  # the kernel died
    line = next((line.strip() for line in error.source.splitlines() if line.strip() and not line.startswith("#")), "")  # as a reader sees the cell
    text = f"{path.stem}  stopped in cell [{error.exec_count}] `{line[:60]}`: {error.ename}: {ANSI.sub('', error.evalue)}"
    if not issubclass(getattr(errors, error.ename, Exception), KVUtilsError):
        lines = ANSI.sub("", "\n".join(error.traceback)).splitlines()
        text += "\n" + "\n".join(f"    {line}" for line in lines[-12:])
    return f"{text}\nAs far as it was executed it is in {show(failed)}." if failed.exists() else text


def show(path: Path) -> str:
    """A path as a user types it: relative to the working directory where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def time_text(hours: float) -> str:
    """Hours as they are said."""
    return f"about {60 * hours:.0f} min" if hours < 1.5 else f"about {hours:.1f} h"


def side_by_side(jobs: int | None, most: int) -> int:
    """How many notebooks run at a time: `jobs` if given, else `most` of them where there are as many cores, and free memory for what a
    notebook takes with the pocket model; one where each is shared by several processes."""
    if jobs is not None:
        at_least("--jobs", jobs)
        return jobs
    if "WORLD_SIZE" in os.environ or notebook.rank():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    limits = [int(text) for file in LIMITS if file.is_file() and (text := file.read_text().strip()).isdecimal()]  # of a container
    return max(1, min(most, cores, int(min([psutil.virtual_memory().available, *limits]) / 2**30 / GIB_EACH)))


def say(text: str, file: TextIO | None = None) -> None:
    """Print beside the progress bars of notebooks that run."""
    tqdm.write(text, file)
    (file or sys.stdout).flush()


def run_one(path: Path, parameters: dict, executed: Path, folder: Path, takes: str) -> tuple[str, bool]:
    """Execute a notebook and write it to `executed`; (what to say of it, whether it failed)."""
    say(f"{path.stem}  running{takes}")
    start, target, failed = time.monotonic(), executed / path.name, notebook.cache_root() / "failed" / path.name
    failed.unlink(missing_ok=True)
    try:
        before = path.read_bytes()
        text = nbformat.writes(execute(path, parameters, failed, folder)) + "\n"
        target = target if path.read_bytes() == before else failed  # edited meanwhile: that stays
        write_text(target, text)
    except Exception as error:  # also of a dead kernel, or of what is no notebook: the others go on
        return explain(path, error, failed), True
    said = " (the notebook was edited meanwhile)" if target == failed else ""
    return f"{path.stem}  done in {tqdm.format_interval(time.monotonic() - start)} min: {show(target)}{said}", False


def run_all(paths: Mapping[Path, dict], executed: Path, takes: Mapping[str, tuple[float, str]], jobs: int, environment: Mapping) -> list[str]:
    """Execute the notebooks {path: parameters}, `jobs` at a time and the longest first, and write them to `executed`; returns those that
    failed. takes: {notebook: (hours, whence)}; environment: as `kernels` takes it. Interrupted, it ends all kernels at once."""
    failures, running = [], {}
    with kernels(environment) as folder, ThreadPoolExecutor(jobs) as pool:
        try:
            for path in sorted(paths, key=lambda path: -takes[path.stem][0]) if jobs > 1 else paths:
                hours, whence = takes[path.stem]
                said = f", {time_text(hours)} in all ({whence})" if hours else ""
                running[pool.submit(run_one, path, paths[path], executed, folder, said)] = path.stem
            for done in as_completed(running):
                said, failed = done.result()
                say(said, sys.stderr if failed and notebook.rank() else None)
                failures += [running[done]] * failed
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(each.done() for each in running):  # one may just be starting its kernel
                for kernel in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        kernel.kill()
                time.sleep(0.1)
            raise
    return sorted(failures)
