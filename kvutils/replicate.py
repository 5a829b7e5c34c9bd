"""Run the notebooks: `python -m kvutils.replicate --profile pocket --model pocket`.

Each notebook is executed by papermill with this interpreter, cleaned of what changes from run to run, and
written back when it is finished: one that fails or is interrupted leaves the previous version as it was.
The notebooks store their captures and finished parts, so the same command goes on where a run was stopped.

`accelerate launch -m kvutils.replicate ...` does the same with several processes, GPUs or nodes with a common file
system: every process runs the notebooks and they share the parts (`store.Parts.make_all`); the first writes the results.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import nbformat
import yaml
from papermill.exceptions import PapermillExecutionError

from kvutils import notebook, plan, report
from kvutils.errors import KVUtilsError
from kvutils.execute import duration, execute, explain, find_notebooks, show
from kvutils.notebook import Run
from kvutils.store import read_json, write_json, write_text


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
    parser = argparse.ArgumentParser(prog="python -m kvutils.replicate", description=(
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
