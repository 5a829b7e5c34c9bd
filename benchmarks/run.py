"""Runs every benchmarks/bench_*.py, prints one line per figure and stores them in benchmarks/results.json.

    python benchmarks/run.py [--only NAME ...]      (or python -m benchmarks.run; any working directory)

A bench is a module with `run() -> list of {name, value, goal, detail}`, on one thread; lower is better, goal may be None. A
missed goal is marked MISSED and is no failure; a bench that raises is recorded under "errors", and then the
exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")


def describe_machine() -> dict:
    """CPU model, cores this process may use, memory in GiB, and the GPU's name or None."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    memory = round(os.sysconf("SC_PAGE_SIZE") * pages / 2**30, 1) if pages else None
    return {"cpu": model, "cores": cores, "memory_gib": memory,
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}


def describe_versions() -> dict:
    """Version of Python and of the packages that the timings depend on."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def load_bench(path: Path):
    """The module at `path`, imported under its file name."""
    spec = importlib.util.spec_from_file_location(f"benchmarks.{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def format_figure(figure: dict) -> str:
    """`name: value (goal <= x) detail`, with MISSED where the goal is missed."""
    goal = figure["goal"]
    parts = [f"{figure['name']}: {figure['value']:.4g}"]
    if goal is not None:
        parts.append(f"(goal <= {goal:g})" + ("" if figure["met"] else " MISSED"))
    return " ".join([*parts, figure["detail"]])


def write_results(results: dict) -> None:
    """Sorted JSON, replaced in one step, so that an interrupted run leaves the old file whole."""
    temporary = RESULTS.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, RESULTS)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when a bench failed."""
    benches = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    parser = argparse.ArgumentParser(description="Run the benchmarks and store their figures.")
    parser.add_argument("--only", nargs="+", choices=benches, metavar="NAME",
                        help=f"some of: {', '.join(benches)}")
    chosen = parser.parse_args(arguments).only or list(benches)
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]  # kvutils need not be installed; benches share modules
    torch.set_num_threads(1)

    results = {"machine": describe_machine(), "versions": describe_versions(), "figures": [], "errors": {}}
    if RESULTS.exists() and len(chosen) < len(benches):  # keep the others' figures if comparable
        stored = json.loads(RESULTS.read_text())
        if all(stored.get(key) == results[key] for key in ("machine", "versions")):
            kept = set(benches) - set(chosen)
            results["figures"] = [figure for figure in stored["figures"] if figure["bench"] in kept]
            results["errors"] = {name: error for name, error in stored["errors"].items() if name in kept}
    failed = False
    known = json.loads(RESULTS.read_text()).get("seconds", {}) if RESULTS.exists() else {}  # of the run before
    results["seconds"] = dict(known)
    for number, name in enumerate(chosen, 1):
        about = f", about {known[name]:.0f} s" if name in known else ""
        print(f"{name} ({number} of {len(chosen)}{about}) ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            bench = load_bench(benches[name])
            with threadpool_limits(1):  # of the libraries that are loaded by now
                figures = bench.run()
            for figure in figures:
                met = figure["goal"] is None or figure["value"] <= figure["goal"]
                figure.update(bench=name, met=bool(met))
        except Exception as error:  # one failing bench must not lose the results of the others
            failed = True
            results["errors"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            seconds = time.perf_counter() - start
            print(f"{name}: FAILED after {seconds:.0f} s, {results['errors'][name]}", flush=True)
        else:
            results["figures"] += figures
            results["seconds"][name] = round(time.perf_counter() - start)
            for figure in figures:
                print(format_figure(figure), flush=True)
        results["figures"].sort(key=lambda figure: (figure["bench"], figure["name"]))
        results["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        write_results(results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
