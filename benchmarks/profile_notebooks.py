"""Where the notebooks' time goes: CPU seconds of every cell, and of the package's functions that take most.

    python benchmarks profile [--notebooks 01 03] [-p bootstrap 200] [--top 25]

Every notebook is executed in this process, on one thread, with cProfile counting CPU seconds: other work on the machine does not
change them. Parts are computed anew, and results and figures thrown away. The profiler itself makes loops of small functions
up to twice as slow, so seconds compare with one another, not with those of `make replicate`."""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def profile(path: Path, given: dict, top: int) -> str:
    """Executes a notebook in a process of its own: a table of its cells and of functions, as Markdown."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"KVUTILS_OUT": folder, "KVUTILS_CACHE": folder, "IPYTHONDIR": folder}
        from IPython.core.interactiveshell import InteractiveShell
        shell, profiler = InteractiveShell.instance(), cProfile.Profile(time.process_time)
        shell.user_ns["__name__"] = "__main__"
        os.chdir(path.parent)
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        seconds = []
        for number, cell in enumerate(cells, 1):
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", []):
                source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in ({"progress": False} | given).items() if name in source)
            start = time.process_time()
            profiler.enable()
            shell.run_cell(source).raise_error()
            profiler.disable()
            line = next((line for line in source.splitlines() if line and not line.startswith("#")), "")
            seconds.append((time.process_time() - start, number, line))
        return table(path.stem, seconds, pstats.Stats(profiler), top)


def table(name: str, cells: list[tuple[float, int, str]], stats: pstats.Stats, top: int) -> str:
    """cells: (seconds, number, first line); of them those above one per cent are shown."""
    whole = sum(seconds for seconds, *_ in cells)
    lines = [f"### {name}: {whole:.0f} s", "", "| cell | CPU seconds |", "|---|---|"]
    lines += [f"| {number}: `{line[:90]}` | {seconds:.1f} |" for seconds, number, line in cells if seconds > whole / 100]
    found = [(cumulative, own, calls, f"{Path(file).relative_to(ROOT)}:{function}")
             for (file, _, function), (_, calls, own, cumulative, _) in stats.stats.items() if file.startswith(str(ROOT / "kvutils"))]  # fmt: skip
    lines += ["", "| function | seconds, with what it calls | its own | calls |", "|---|---|---|---|"]
    lines += [f"| {where} | {cumulative:.1f} | {own:.1f} | {calls:,} |" for cumulative, own, calls, where in sorted(found, reverse=True)[:top]]
    others = sorted(((own, calls, f"{Path(file).name}:{function}") for (file, _, function), (_, calls, own, *_) in stats.stats.items()), reverse=True)
    lines += ["", "| own seconds, any package | seconds | calls |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {where} | {own:.1f} | {calls:,} |" for own, calls, where in others[:top]), ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks profile", description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", nargs="+", default=["0"], metavar="NN")
    parser.add_argument("--top", type=int, default=25, help="functions to show")
    parser.add_argument("-p", action="append", nargs=2, default=[], metavar=("NAME", "VALUE"), help="a notebook's parameter, JSON")
    chosen = parser.parse_args(arguments)
    given = {name: json.loads(value) for name, value in chosen.p}
    spawn = multiprocessing.get_context("spawn")
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if path.name.startswith(tuple(chosen.notebooks)):
            with spawn.Pool(1) as pool:
                print(pool.apply(profile, (path, given, chosen.top)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
