"""Notebooks are run by papermill and written back clean, or left as they were."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import nbformat
import psutil
import pytest
import torch

from kvutils import plots
from kvutils.errors import DataError, ParameterError
from kvutils.metrics.effects import measured, part
from kvutils.metrics.statistics import Effect
from kvutils.run import compare, judged, kernels, notebook, plan, replicate
from kvutils.run.cli import main
from kvutils.run.notebook import PROFILES, Run, check_parameters
from kvutils.store import Parts, write_json

REPOSITORY = str(notebook.ROOT)
STUB, RESULTS = "notebooks/01_stub.ipynb", "data/results/pocket/pocket/01_stub.json"
WRITE = """
import json, os
from pathlib import Path
folder = Path(os.environ["KVUTILS_OUT"], "data", "results", profile, model)
folder.mkdir(parents=True, exist_ok=True)
one = {"name": "a", "value": 3.0, "low": LOW, "high": 4.0, "low90": LOW, "high90": 4.0, "detectable": 5.0, "error": 1.0, "n": 50, "units": 50, "freedom": 49}
claim = {"primary": one, "others": [], "prerequisites": [], "note": ""}
found = {"claims": {"C1": claim}, "parameters": {"seed": seed}}
(folder / "01_stub.json").write_text(json.dumps(found))
"""
CLAIM = {"id": "C1", "short": "so", "section": "3", "statement": "It is so.", "paper": "so", "effect": None, "unit": "points", "smallest": 2,
         "why": "ours", "kind": "effect", "primary": "a", "needs": "-", "notebook": "01_stub"}  # fmt: skip


def write_book(path, body: str = "print(seed)", low: str = "2.0") -> nbformat.NotebookNode:
    """A notebook without kvutils, so that it starts quickly."""
    new = nbformat.v4
    settings = new.new_code_cell('profile = "pocket"\nmodel = "pocket"\nseed = 0', id="b", metadata={"tags": ["parameters"]})
    cells = [new.new_markdown_cell("# Stub", id="a"), settings, new.new_code_cell(body, id="c"),
             new.new_code_cell(WRITE.replace("LOW", low), id="d")]  # fmt: skip
    made = new.new_notebook(cells=cells, metadata={"kernelspec": {"name": "another", "display_name": "Another", "language": "python"}})
    nbformat.write(made, path)
    return made


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with a notebook 01, elsewhere."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.kvutils]\nrepository = ''\n")
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    monkeypatch.setattr(judged, "load_claims", lambda: [CLAIM])
    monkeypatch.setenv("KVUTILS_OUT", str(tmp_path))
    monkeypatch.delenv("KVUTILS_CACHE", raising=False)
    write_book(tmp_path / STUB)
    return tmp_path


OUTPUTS = """
import sys
from IPython.display import display
from ipywidgets import IntSlider
from matplotlib import pyplot
from tqdm import tqdm
print(sys.executable)
print('a', flush=True)
print('b')
print({path!r})
for i in tqdm(range(3)): pass
bar = tqdm(unit='image'); bar.update(); bar.close()
display(IntSlider())
pyplot.plot([1, 2]); pyplot.show()
"""


def test_a_run_is_clean_and_the_same_again(root, capsys):
    path = root / STUB
    write_book(path, OUTPUTS.format(path=str(root / "data" / "x")))
    assert main(["replicate"]) == 0
    first = path.read_bytes()
    done = nbformat.reads(first.decode(), as_version=4)
    nbformat.validate(done)
    assert done.metadata == {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
                             "language_info": {"name": "python"}}  # fmt: skip
    assert [cell.get("execution_count") for cell in done.cells] == [None, 1, 2, 3]
    assert all(set(cell.metadata) <= {"tags"} for cell in done.cells)
    stream, picture = done.cells[2].outputs
    assert stream.text == f"{sys.executable}\na\nb\ndata/x\n"  # this interpreter, one stream, path from root
    assert "image/png" in picture.data
    printed = capsys.readouterr().out
    assert "01_stub  done in" in printed and "In this small model:\nC1   present             The effect is +3.00 [+2.00, +4.00] points." in printed
    assert main(["replicate"]) == 0 and path.read_bytes() == first
    assert "11 numbers as committed, 0 differ" in capsys.readouterr().out
    assert json.loads((root / RESULTS).with_name("claims.json").read_text())[0]["verdict"] == "present"


def test_notebooks_that_fail_stay_as_they_were_and_the_others_are_run(root, capsys):
    """A failing cell; an error of the library, without its traceback; a dead kernel."""
    bodies = {"01_stub": "def f():\n    return 1 / 0\nf()", "03_stub": "import os; os._exit(9)",
              "02_stub": "class DataError(Exception): pass\nraise DataError('DAVIS is missing')"}
    for name, body in {**bodies, "04_stub": "print(seed)"}.items():
        write_book(root / "notebooks" / f"{name}.ipynb", body)
    before = {name: (root / "notebooks" / f"{name}.ipynb").read_bytes() for name in bodies}
    assert main(["replicate"]) == 1
    assert {name: (root / "notebooks" / f"{name}.ipynb").read_bytes() for name in bodies} == before
    printed = capsys.readouterr().out
    assert "01_stub  stopped in cell [2] `def f():`: ZeroDivisionError: division by zero" in printed and "return 1 / 0" in printed
    assert "cell [2] `class DataError(Exception): pass`: DataError: DAVIS is missing\nAs far" in printed
    assert "03_stub  stopped: DeadKernelError" in printed
    assert "04_stub  done" in printed and "FAILED: 01_stub, 02_stub, 03_stub" in printed
    kept = nbformat.read(root / "data" / "cache" / "failed" / "01_stub.ipynb", as_version=4)
    assert any(output.output_type == "error" for cell in kept.cells for output in cell.get("outputs", []))


def test_copies_are_not_run_and_what_is_no_notebook_stops_no_other(root, capsys):
    """As JupyterLab names copies; a notebook with marks of a merge, one without a cell of parameters."""
    shutil.copy(root / STUB, root / "notebooks" / "01_stub-Copy1.ipynb")
    (root / "notebooks" / "05_stub.ipynb").write_text("<<<<<<< HEAD\n{}")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), root / "notebooks" / "07_stub.ipynb")
    assert [path.stem for path in replicate.find_notebooks(["01"], root / "notebooks")] == ["01_stub"]
    assert main(["replicate", "--jobs", "3"]) == 1
    said = capsys.readouterr().out
    assert "01_stub  done in" in said and "05_stub  stopped: NotJSONError" in said and "out of memory" not in said and "07_stub  not run: unknown parameter" in said


def test_what_was_edited_while_a_notebook_ran_stays(root, capsys):
    edit = f"import pathlib\np = pathlib.Path({str(root / STUB)!r})\np.write_text(p.read_text().replace('print(', 'print (', 1))"
    write_book(root / STUB, edit)
    assert main(["replicate"]) == 0
    assert "01_stub.ipynb (the notebook was edited meanwhile)" in capsys.readouterr().out
    kept, done = (nbformat.read(path, as_version=4) for path in (root / STUB, root / "data" / "cache" / "failed" / "01_stub.ipynb"))
    assert not any(cell.get("execution_count") for cell in kept.cells) and any(cell.get("execution_count") for cell in done.cells)


def test_how_long_a_notebook_takes_is_said_before_it_runs(root, monkeypatch, capsys):
    kept = root / RESULTS.replace("01_stub", "provenance/01_stub")
    write_json(kept, {"machine": {"hours": 0.05, "device": "cpu (mine)"}})
    monkeypatch.setattr(kernels, "execute", Mock(side_effect=DataError("stopped")))
    assert main(["replicate"]) == 1
    assert capsys.readouterr().out.startswith("01_stub  running, about 3 min in all (as on cpu (mine))\n")
    run = Run("", "paper", "llava-onevision-0.5b", "quick")
    hours, whence = replicate.expected(run, root, "05_blink_gap")
    assert 0 < hours < 10 and whence == "by a rehearsal; `make plan` says more"  # the shipped one
    assert replicate.expected(Run(""), root, "05_blink_gap") == (0, "")
    write_book(root / "notebooks" / "02_stub.ipynb")
    write_json(kept.with_name("02_stub.json"), {"machine": {"hours": 0.1, "device": "cpu (mine)"}})
    for jobs, whole in ((1, 9), (2, 6)):  # the longest first
        assert main(["replicate", "--jobs", str(jobs)]) == 1
        said = capsys.readouterr().out
        assert said.startswith(f"2 notebooks, {jobs} at a time: about {whole} min if none is finished yet\n0{jobs}_stub  running")


def test_a_rank_that_is_no_number_is_said(monkeypatch):
    monkeypatch.setenv("RANK", "")
    assert notebook.rank() == 0
    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(ParameterError, match="RANK is 'abc'"):
        notebook.rank()


@pytest.mark.parametrize(("jobs", "most", "free", "process", "found"), [
    (None, 6, 24, {}, 3), (None, 2, 24, {}, 2), (None, 6, 3.5, {}, 2), (None, 6, 0.5, {}, 1), (5, 1, 1, {}, 5),
    (None, 6, 24, {"RANK": "1"}, 1), (None, 6, 24, {"RANK": "0", "WORLD_SIZE": "2"}, 1),
])
def test_as_many_notebooks_at_a_time_as_cores_and_memory_allow(monkeypatch, jobs, most, free, process, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    monkeypatch.setattr(kernels.psutil, "virtual_memory", lambda: Mock(available=free * 2**30))
    for name, value in process.items():
        monkeypatch.setenv(name, value)
    assert kernels.side_by_side(jobs, most) == found


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    (tmp_path / "max").write_text("3500000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(kernels.psutil, "virtual_memory", lambda: Mock(available=24 * 2**30))
    for limits, found in ((["max", "none", "gone"], 2), (["none"], 6)):
        monkeypatch.setattr(kernels, "LIMITS", [tmp_path / each for each in limits])
        assert kernels.side_by_side(None, 6) == found


def test_notebooks_side_by_side_have_a_thread_each(root, monkeypatch):
    """Each waits for the other, so one after the other they would fail."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = ("import os, pathlib, time\npathlib.Path({0!r}).touch()\nend = time.monotonic() + 60\n"
            "while not os.path.exists({1!r}) and time.monotonic() < end:\n    time.sleep(0.05)\n"
            "assert os.path.exists({1!r})\nprint(os.environ['OMP_NUM_THREADS'], os.getcwd(), os.environ['PYTHONPATH'].split(os.pathsep)[0])")
    for mine, other in (("01", "02"), ("02", "01")):
        write_book(root / "notebooks" / f"{mine}_stub.ipynb", meet.format(str(root / mine), str(root / other)))
    before = os.getcwd()
    assert main(["replicate", "--jobs", "2"]) == 0 and os.getcwd() == before
    said = [nbformat.read(root / "notebooks" / f"{name}_stub.ipynb", as_version=4).cells[2].outputs[0].text for name in ("01", "02")]
    assert said == ["1 notebooks .\n"] * 2  # kvutils is imported from this clone, also where it is not installed


def test_a_widget_leaves_its_picture():
    """Its model is gone with the kernel; a slider leaves nothing."""
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "Explorer(...)"}
    outputs = [nbformat.v4.new_output("display_data", each) for each in (data, data | {"image/png": "abc"})]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("explore", outputs=outputs)])
    (left,) = kernels.clean(book).cells[0].outputs
    assert left.data == {"text/plain": "Explorer(...)", "image/png": "abc"}


@pytest.mark.parametrize(("arguments", "run"), [
    ([], "00_stub 01_stub"), (["--notebooks", "00"], "00_stub"), (["-p", "seed", "3"], "01_stub"), (["--size", "quick"], "01_stub"),
])
def test_the_notebook_that_measures_nothing_is_run_by_default_and_by_name(root, monkeypatch, arguments, run):
    write_book(root / "notebooks" / "00_stub.ipynb")
    started = Mock(return_value=["all"])
    monkeypatch.setattr(replicate, "run_all", started)
    monkeypatch.setattr(replicate, "check_given", Mock())
    assert main(["replicate", *arguments]) == 1
    assert " ".join(path.stem for path in started.call_args[0][0]) == run


def test_parameters_write_elsewhere_and_a_process_beside_the_first_nowhere(root, monkeypatch, capsys):
    before = (root / STUB).read_bytes()
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        assert main(["replicate"]) == 0 and not capsys.readouterr().out
    assert main(["replicate", "-p", "seed", "3"]) == 0
    assert (root / STUB).read_bytes() == before and not (root / "data" / "results").exists()
    out = root / "data" / "cache" / "runs" / "seed_3"
    assert json.loads((out / RESULTS).read_text())["parameters"]["seed"] == 3
    done = nbformat.read(out / STUB, as_version=4)
    assert done.cells[2].metadata.tags == ["injected-parameters"]


def test_another_profile_writes_beside_its_results_once_everything_is_there(root, monkeypatch, capsys):
    missing = Mock(side_effect=DataError("Nothing was started: this is missing."))
    before = (root / STUB).read_bytes()
    monkeypatch.setattr("kvutils.checkpoints.need_model", lambda spec: None)  # as if it were on this machine
    with monkeypatch.context() as patch:
        patch.setattr(plan, "check_ready", missing)
        assert main(["replicate", "--profile", "paper", "--model", "a/big"]) == 2
    said = capsys.readouterr()
    missing.assert_called_once_with("paper", "a/big", {"01": {"profile": "paper", "model": "a/big"}})
    assert said.err == "error: Nothing was started: this is missing.\n" and not said.out and not (root / "data").exists()
    monkeypatch.setattr(plan, "check_ready", lambda *_: None)
    assert main(["replicate", "--profile", "paper", "--model", "a/big"]) == 0
    assert (root / STUB).read_bytes() == before and (root / "data/results/paper/a--big/01_stub.ipynb").exists()


ELSEWHERE = """
import sys
from pathlib import Path
from kvutils.run import cli, judged, notebook
notebook.ROOT = Path({root!r})
judged.load_claims = lambda: []
code = cli.main(['replicate', *sys.argv[1:]])
sys.exit("a grammar was built that nothing needs" if "lark" in sys.modules else code)
"""
SHARED = """
import os, time
from kvutils.store import Parts, write_json
def work(i):
    time.sleep(0.3)
    return [i, os.environ["RANK"]]
parts = Parts(os.environ["KVUTILS_CACHE"], seed=seed)
done = list(parts.make_all([(f"part/{i}", lambda i=i: work(i)) for i in range(12)]))
seed = sum(i for i, _ in done)
"""


def elsewhere(root) -> tuple[str, dict]:
    """(script, environment) of a `kvutils replicate` of another process in `root`."""
    (root / "run.py").write_text(ELSEWHERE.format(root=str(root)))
    return str(root / "run.py"), os.environ | {"PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1", "KVUTILS_CACHE": str(root / "cache")}


@pytest.mark.slow
def test_accelerate_launch_shares_the_parts_and_writes_once(root, monkeypatch, processes=2):
    """A real `accelerate launch` (its processes find no GPU, and do without): each runs the notebook, the first writes."""
    write_book(root / STUB, SHARED)
    script, environment = elsewhere(root)
    options = {"num_processes": processes, "num_machines": 1, "main_process_port": 0, "mixed_precision": "no", "dynamo_backend": "no"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run([*launch, script], cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("01_stub  done in") == 1  # one process speaks
    shared = (root / RESULTS).read_bytes()
    parts = Parts(root / "elsewhere")
    (parts.folder,) = (root / "cache").glob("*/part/..")
    by_rank = [parts.load(f"part/{i}")[1] for i in range(12)]
    assert len(by_rank) == 12 and set(by_rank) == {str(i) for i in range(processes)}, by_rank
    for name in ("PYTHONPATH", "KVUTILS_CACHE"):
        monkeypatch.setenv(name, environment[name])
    assert main(["replicate"]) == 0 and (root / RESULTS).read_bytes() == shared and json.loads(shared)["parameters"]["seed"] == 66  # alone


def test_check_compares_with_the_committed_verdicts(root, capsys):
    exec(WRITE.replace("LOW", "2.0"), {"profile": "pocket", "model": "pocket", "seed": 0})
    committed = (root / RESULTS).read_bytes()
    for low, code, said in (("2.0", 0, "the verdicts are those in"), ("-2.0", 1, "C1: present, +3.00 [+2.00, +4.00] points in")):
        write_book(root / STUB, low=low)
        assert main(["replicate", "--check"]) == code and said in capsys.readouterr().out
    assert (root / RESULTS).read_bytes() == committed


@pytest.mark.slow
def test_an_interrupted_run_ends_its_kernels_leaves_the_notebooks_and_runs_again(root):
    paths = [root / "notebooks" / f"0{i}_stub.ipynb" for i in (1, 2, 3)]
    marks = [path.with_suffix(".mark") for path in paths]
    for path, mark in zip(paths, marks, strict=True):
        write_book(path, f"import os, time, pathlib\np = pathlib.Path({str(mark)!r})\n"
                         "if not p.exists():\n    p.write_text(str(os.getpid())); time.sleep(60)")  # fmt: skip
    before = [path.read_bytes() for path in paths]
    script, environment = elsewhere(root)
    run = subprocess.Popen([sys.executable, script, "--jobs", "2"], cwd=root, env=environment, start_new_session=True, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    for _ in range(1200):  # two minutes, on a busy machine
        if all(mark.exists() and mark.read_text() for mark in marks[:2]) or run.poll() is not None:
            break
        time.sleep(0.1)
    assert marks[0].exists() and marks[1].exists(), run.communicate()[0]
    os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C does
    said = run.communicate(timeout=240)[0]
    assert run.returncode == 130 and "the same command goes on" in said and not any(each in said for each in ("stopped", "died", "Traceback")), said
    assert not any(psutil.pid_exists(int(mark.read_text())) for mark in marks[:2]) and not marks[2].exists()
    assert [path.read_bytes() for path in paths] == before and main(["replicate", "--notebooks", "01"]) == 0


def test_colab_cells_follow_the_address(tmp_path):
    made = write_book(tmp_path / "01_stub.ipynb")
    for address, count in (("", 4), ("https://github.com/example/name", 6), ("https://github.com/example/name", 6), ("", 4)):
        kernels.set_colab_cells(made, "01_stub", address)
        assert len(made.cells) == count
        if address:
            assert "/github/example/name/blob/main/notebooks/01_stub.ipynb" in made.cells[0].source
            compile(made.cells[1].source, "setup", "exec")


def test_good_parameters_pass_later_variables_are_none_and_bad_ones_do_not():
    good = {"profile": "pocket", "model": "pocket", "seed": 1, "rate": 1, "draws": 5, "max_pixels": 16384 * 28**2}
    known = {"profile": PROFILES, "model": str, "seed": int, "rate": float, "draws": int, "max_pixels": int}
    namespace = {"__name__": "x", "_": 1, "In": [], "Out": {}, "LIMIT": 3, "check": check_parameters, **good}
    assert check_parameters(namespace, **known) == good
    namespace["later"] = 3
    assert check_parameters(namespace, **known) == good
    for change, message in (
        ({"sed": 2}, "unknown parameter 'sed' .did you mean 'seed'"),
        ({"seed": "2"}, "expected int, found str"), ({"draws": 10**7}, "from 0 to 1,000,000"), ({"max_pixels": -1}, "from 0"),
        ({"seed": True}, "expected int, found bool"),
        ({"profile": "papr"}, "did you mean 'paper'.*; expected one of pocket, paper"),
        ({"items": [1]}, "unknown parameter 'items'"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            check_parameters(good | change, **known)


def test_places_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("KVUTILS_OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    run = notebook.Run("01_value_flow")
    assert run.results == notebook.ROOT / "data" / "results" / "pocket" / "pocket" / "01_value_flow.json"
    assert run.figures == notebook.ROOT / "figures"
    assert notebook.Run("01", "paper", "owner/name").folder.name == "owner--name"
    assert notebook.Run("01", "paper", "/a/b/mine").folder.name == "mine"
    monkeypatch.setenv("KVUTILS_OUT", str(tmp_path))
    assert run.figures == tmp_path / "figures"


@pytest.mark.parametrize(("model", "given", "threads"), [("pocket", {}, 1), ("pocket", {"OMP_NUM_THREADS": "2"}, 2), ("llava-onevision-7b", {}, 2)])
def test_a_notebook_takes_one_thread_for_the_pocket_model(monkeypatch, model, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Run("01_value_flow", model=model)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_environment_is_said_without_what_differs_between_two_machines(capsys, monkeypatch):
    monkeypatch.setattr(notebook, "code_commit", lambda: "c0ffee")
    notebook.environment_table(seed=3)
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "torch", "transformers", "seed"} <= lines.keys() and lines["device"] in ("cpu", "cuda")
    assert "c0ffee" not in lines.values() and "+" not in lines["torch"]
    assert notebook.provenance()["machine"]["commit"] == "c0ffee"


MEASURED = measured(part("a minus b", Effect(12.0, 10.0, 14.0, 50, 1.0, 50)), [part("c", reason="no item")], note="On 6 of 6 tasks, " + "x" * 40)


def test_the_last_cells(root, monkeypatch, capsys):
    """Verdicts, tables and `finish`: the results are apart from what differs between machines."""
    run = Run("01_stub")
    found = run.verdicts({"C1": MEASURED})
    said = "In this small model:\nC1: present. The effect is +12.0 [+10.0, +14.0] points. On 6 of 6 tasks,\n    " + "x" * 40 + "\n"
    assert capsys.readouterr().out == said and found["C1"].word == "present"
    Run("01_stub", "paper").verdicts({"C1": MEASURED})
    assert capsys.readouterr().out.startswith("C1: present.")
    assert run.claims_table({"C1": MEASURED}).data.splitlines()[2:] == [
        "| **C1** | **a minus b** | +12.0 [+10.0, +14.0] points | 2 | 2.9 | 50 | 50 | present |",
        "| C1 | c | not defined: no item | 2 | – | 0 | – | not measured |"]
    assert "| heads | together |" in run.choices({"heads": "together"}).data
    drawn = Mock()
    monkeypatch.setattr("kvutils.plots.draw_all", drawn)
    about = {"parameters": {"profile": "pocket", "model": "pocket", "seed": 1}}
    found = {"claims": {"C1": MEASURED}, "finding": "It works."}
    run.finish(None, measured={}, about=about, results=found, sources={"data": "toy"}, choices={"a": "b"})
    assert capsys.readouterr().out == "It works.\n"
    drawn.assert_called_once_with(run.folder, run.figures, "01_stub")  # not what another notebook left, perhaps long ago
    stored = json.loads(run.results.read_text())
    assert stored.keys() == {"notebook", "profile", "model", "parameters", "claims", "finding", "choices"}
    about = json.loads((run.folder / "provenance" / "01_stub.json").read_text())
    assert about["data"] == "toy" and {"commit", "device", "torch"} <= about["machine"].keys()


def test_results_of_another_version_are_not_drawn(tmp_path):
    write_json(tmp_path / "05_blink_gap.json", {"subtasks": {"Art_Style": {"title": "art style"}}})
    with pytest.raises(DataError, match="05_blink_gap.json was written by another version of kvutils: it has no '.*Run its notebook again"):
        plots.draw_all(tmp_path, tmp_path)


@pytest.mark.parametrize(("after", "said"), [
    ({"x": {"a": [1.0, 2], "b": None}}, "2 numbers as committed, 0 differ"),
    ({"x": {"a": [1.0 + 1e-8, 2]}}, "2 numbers as committed, 0 differ"),
    ({"x": {"a": [1.1, 2.4]}}, "0 numbers as committed, 2 differ (largest relative difference 0.17, at x.a.1: 2 before, 2.4 now)"),
    ({"x": {"a": [1.0], "c": 3}}, "1 numbers as committed, 0 differ; 1 new (x.c); 1 gone (x.a.1)"),
])
def test_numbers_are_compared(after, said):
    assert compare.numbers_apart({"x": {"a": [1.0, 2], "b": True, "text": "3"}}, after) == said
    assert "no earlier results" in compare.numbers_apart({"x": {}}, after)


@pytest.mark.parametrize(("low", "value", "said"), [
    (10.0, 12.1, []),  # as another processor rounds: its half interval is 2
    (10.0, 12.3, ["present, +12.0 [+10.0, +14.0] points in", "present, +12.3 [+10.0, +14.0] points now"]),
    (9.0, 12.0, ["present, +12.0 [+10.0, +14.0] points in", "present, +12.0 [+9.0, +14.0] points now"]),
    (-1.0, 12.0, ["present, +12.0 [+10.0, +14.0] points in", "cannot tell, +12.0 [-1.0, +14.0] points now"]),
    (None, None, ["present, +12.0 [+10.0, +14.0] points in", "not measured, – now"]),
])
def test_verdicts_are_compared_with_the_numbers_behind_them(tmp_path, monkeypatch, low, value, said):
    monkeypatch.setattr(judged, "load_claims", lambda: [CLAIM])
    other = part("a", Effect(value, low, 14.0, 50, 1.0, 50)) if value else part("a", reason="no item")
    for name, one in (("old", part("a", Effect(12.0, 10.0, 14.0, 50, 1.0, 50))), ("new", other)):
        write_json(tmp_path / name / "01_stub.json", {"claims": {"C1": measured(one)}})
    differ = compare.verdicts_apart(tmp_path / "old", tmp_path / "new", ["01_stub"])
    assert len(differ) == bool(said) and all(each in differ[0] for each in said)
    assert compare.verdicts_apart(tmp_path / "old", tmp_path / "new", ["02_stub"]) == []
    write_json(tmp_path / "new" / "01_stub.json", {"claims": {"C1": measured(part("b", Effect(13.0, 10.0, 14.0, 50, 1.0, 50)))}})
    assert compare.verdicts_apart(tmp_path / "old", tmp_path / "new", ["01_stub"]) == []  # another comparison decides, to the same word


def test_what_is_committed_counts_not_what_an_interrupted_run_left(root, monkeypatch):
    path = root / RESULTS
    assert compare.committed(path) == {}
    path.parent.mkdir(parents=True)
    path.write_text('{"a": 1}')
    assert compare.committed(path) == {"a": 1}
    for command in (["init", "-q"], ["add", "data"], ["commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x", *command], check=True)
    path.write_text('{"a": 2}')
    assert compare.committed(path) == {"a": 1}
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert compare.committed(path) == {"a": 2}


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["-p", "seed", "010"], 2, "parameter seed = '010': expected int, found str"), (["-p", "seed", "1:30"], 2, "'1:30'"),
    (["-p", "seed", "[" * 9999], 2, "expected int, found str"),
    (["-p", "seed", "-1"], 2, "seed = -1: expected a whole number from 0 to 4,294,967,295"), (["-p", "seed", "no"], 2, "'no'"),
    (["-p", "seed", "9" * 5000], 2, "found str"), (["-p", "seed", "{a: "], 2, "'{a: '"), (["-p", "model", "x"], 2, "write --model x"),
    (["--model", "pockett"], 2, "unknown model 'pockett' (did you mean 'pocket'?)"),
    (["--model", "~/nothing/here"], 2, "nothing/here"), (["--out", "/dev/null/x"], 2, "Name another folder with --out or KVUTILS_OUT"),
])
def test_what_cannot_be_meant_is_said_before_a_kernel_starts(root, monkeypatch, capsys, arguments, code, said):
    monkeypatch.setattr(kernels.papermill, "execute_notebook", Mock(side_effect=AssertionError))
    assert main(["replicate", *arguments]) == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err and "Traceback" not in shown.out + shown.err


def test_kernels_find_the_folders_of_the_command_and_need_no_home(root, monkeypatch, capsys):
    """Relative to where the command is given, or to home; the model's name holds a space; nothing is written below home."""
    monkeypatch.setattr(plan, "check_ready", lambda *_: None)  # that model is an empty folder
    (root / "my model").mkdir()
    names = ("KVUTILS_CACHE", "KVUTILS_DATA", "HF_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")
    write_book(root / STUB, f"import os\nprint([os.environ[name] for name in {names}] + [model])")
    monkeypatch.chdir(root)
    for name, value in {"HOME": "/dev/null/me", "KVUTILS_CACHE": "parts", "KVUTILS_DATA": "~/data", "HF_HOME": "../hub"}.items():
        monkeypatch.setenv(name, value)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_PATH"):
        monkeypatch.setenv(name, "")
    assert main(["replicate", "--model", "my model", "--out", "given here"]) == 0
    (done,) = (root / "given here").rglob("01_stub.ipynb")
    assert done.parent == root / "given here" / "data" / "results" / "pocket" / "my model"
    told = eval(nbformat.read(done, as_version=4).cells[-2].outputs[0].text)
    assert told[:3] == ["parts", "/dev/null/me/data", str(root.parent / "hub")] and told[-1] == "my model"  # the root is cut off
    assert not any(each.startswith("/dev/null") for each in told[3:])
    monkeypatch.setenv("KVUTILS_CACHE", "/dev/null/parts")
    assert main(["replicate"]) == 2 and "KVUTILS_CACHE" in capsys.readouterr().err


def test_a_full_disk_stops_one_notebook_and_says_so(root, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "executed.ipynb")
    monkeypatch.setattr(kernels.papermill, "execute_notebook", Mock(side_effect=full))
    before = (root / STUB).read_bytes()
    assert main(["replicate"]) == 1 and (root / STUB).read_bytes() == before
    said = capsys.readouterr().out
    assert "01_stub  stopped: what goes through " in said and "No space left" in said and "it resumes" in said and "Traceback" not in said


def test_mistakes_and_what_an_installed_package_lacks_are_said(root, capsys):
    write_book(root / "notebooks" / "02_stub.ipynb", "more = 1")
    assert main(["replicate", "-p", "sead", "3"]) == 2
    said = capsys.readouterr()  # once, not for each notebook
    assert said.err == "error: unknown parameter 'sead' (did you mean 'seed'?); expected one of profile, model, seed\n" and not said.out
    assert main(["replicate", "--notebooks", "07"]) == 2 and "no notebook 07" in capsys.readouterr().err
    assert main(["figures", "--size", "quck"]) == 2 and "unknown SIZE 'quck' (did you mean 'quick'?)" in capsys.readouterr().err
    shutil.rmtree(root / "notebooks")
    for verb in ("replicate", "figures", "report"):
        assert main([verb]) == 2 and "needs a clone of the repository" in capsys.readouterr().err
