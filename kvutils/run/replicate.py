"""Run the notebooks: `kvutils replicate`; with several processes, GPUs or nodes `accelerate launch -m kvutils replicate`.

Each notebook is executed by papermill with this interpreter, cleaned of what changes from run to run, and written back when it is
finished: one that fails or is interrupted leaves the previous version as it was. The notebooks store their finished parts, so the
same command goes on where a run was stopped. Small models on a CPU gain little from a second thread: there as many notebooks run at a
time as there are cores, a thread each, and share the parts that several of them read (`store.Parts.make_all`). Of several processes
with a common file system every one runs the notebooks, one after the other, and they share all parts; the first writes the results."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path

import nbformat
import torch
from tqdm import tqdm

from kvutils.checkpoints import MODELS, find_model
from kvutils.errors import DataError, ParameterError, one_of
from kvutils.run import compare, judged, notebook, plan, report
from kvutils.run.kernels import ONE_THREAD, changed_parameters, run_all, show, side_by_side, time_text
from kvutils.run.notebook import Run, rank
from kvutils.run.sizes import SIZES, left_out, parameters_of
from kvutils.run.verdicts import NOTHING
from kvutils.store import digest, need_writable, read_json


def need_clone() -> None:
    """DataError where there are no notebooks, as in an installed package."""
    if not (notebook.ROOT / "notebooks").is_dir():
        raise DataError(f"this needs a clone of the repository, with its notebooks and results; {notebook.ROOT} has no notebooks/. "
                        "Clone it and run `make replicate` there. `kvutils capture` and `import kvutils` work from anywhere.")


def find_notebooks(wanted: list[str], folder: Path) -> list[Path]:
    """The notebooks `NN_name.ipynb` of a folder in order: all, or those that begin with one of `wanted`."""
    found = sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb") if re.fullmatch(r"\w+", path.stem))  # no copy, as JupyterLab names them
    for name in wanted or [""]:
        if not any(path.stem.startswith(name) for path in found):
            raise ParameterError(f"no notebook {name or 'to run'} in {folder}; there are: {', '.join(path.stem for path in found) or 'none'}.")
    return [path for path in found if path.stem.startswith(tuple(wanted or [""]))]


def check_given(paths: Mapping[Path, dict]) -> None:
    """ParameterError, once and before any of them runs, for what every notebook objects to in its parameters."""
    for path, parameters in paths.items():
        with suppress(ParameterError):
            changed_parameters(nbformat.read(path, as_version=4), parameters)
            return
    changed_parameters(nbformat.read(path, as_version=4), parameters)


def verdict_lines(lines: list[dict]) -> str:
    """The verdict table for a terminal; claims that nothing has measured in one line."""
    silent = " ".join(line["id"] for line in lines if line["why"] == NOTHING)
    out = [f"{line['id']:<5}{line['verdict']:<20}{line['why']}" for line in lines if line["why"] != NOTHING]
    return "\n".join([*out, f"not measured: {silent}"] if silent else out)


def expected(run: Run, kept: Path, name: str) -> tuple[float, str]:
    """(hours, whence) that a notebook may take: as its committed run took, else by a rehearsal of the model; (0, "") with neither."""
    before = read_json(file)["machine"] if (file := kept / "provenance" / f"{name}.json").is_file() else {}
    hours, whence = before.get("hours"), f"as on {before.get('device')}"
    if hours is None and run.profile != "pocket" and (rehearsed := plan.find_rehearsal(run.model)):
        hours, whence = plan.hours_of(rehearsed, run.size)[0].get(name[:2]), "by a rehearsal; `make plan` says more"
    return (hours, whence) if hours else (0.0, "")


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
        name = "-".join(re.sub(r"[^\w.-]+", "_", f"{key}_{value}") for key, value in sorted(more.items()))
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
             if chosen.notebooks or run.is_default and not more or not path.stem.startswith(("00", "06"))}  # which measure nothing of a model
    small = find_model(model).profile == "pocket" and not torch.cuda.is_available()
    jobs = side_by_side(chosen.jobs, len(paths) if small else 1)
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
        takes = {path.stem: expected(run, kept, path.stem) for path in paths}
        hours = [each for each, _ in takes.values()]
        if len(paths) > 1 and any(hours):
            print(f"{len(paths)} notebooks, {jobs} at a time: {time_text(max(*hours, sum(hours) / jobs))} if none is finished yet", flush=True)
        failures = run_all(paths, executed, takes, jobs, ONE_THREAD if small else {})
    if rank() or not run.folder.exists():
        return int(bool(failures))
    written = report.write(out)
    said = "In this small model:\n" if run.profile == "pocket" else ""
    print(f"\n{said}{verdict_lines(judged.rows(judged.read_all(run.folder)))}\n")
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
    from kvutils import plots
    one_of("SIZE", chosen.size, SIZES)
    run = Run("", chosen.profile, model_of(chosen), chosen.size)
    names = [path.stem for path in sorted(run.folder.glob("[0-9][0-9]_*.json"))]
    for name in tqdm(names or [""], "figures", disable=None):  # none: `draw_all` says so
        plots.draw_all(run.folder, run.figures, name)
    report.draw_models(notebook.output_root())
    print(f"figures: {show(run.figures)}")
    return 0


def make_report(chosen: argparse.Namespace) -> int:
    """Write the generated files that are stale, or with --check only name them; 1 if there are some then."""
    root = notebook.output_root()
    if not judged.result_folders(root):
        raise DataError(f"{root} holds no results to report: expected data/results/<profile>/<model> (is KVUTILS_OUT right?)")
    paths = list(report.stale(root)) if chosen.check else report.write(root)
    for path in paths:
        print(f"{'stale, `make report` writes it anew' if chosen.check else 'written'}: {path.relative_to(root)}")
    if not paths:
        print(f"{len(report.generated(root))} generated files, all up to date")
    return int(chosen.check and bool(paths))
