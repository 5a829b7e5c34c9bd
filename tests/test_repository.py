"""The repository keeps its own rules: notebooks, commands, files."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml

from kvutils.run import report
from kvutils.run.cli import VERBS
from kvutils.run.notebook import ROOT

TOP = {"notebooks", "kvutils", "data", "figures", "tests", "benchmarks", "environment.yml", "README.md",
       "requirements.txt", "Makefile", "LICENSE", "CITATION.cff", "pyproject.toml"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""(?<![\w.:/])/(?:home|root|tmp|work|content|Users|mnt|opt)/[\w.]""")


def tracked() -> list[str]:
    """The files that git tracks; all below the repository's own folders where there is no git."""
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listing.returncode == 0:
        return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]
    return [path.relative_to(ROOT).as_posix() for name in TOP
            for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()]


def texts() -> dict[str, str]:
    """The tracked text files and their content."""
    suffixes = {".py", ".md", ".yml", ".yaml", ".toml", ".cff", ".txt", ".ipynb", ".json"}
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in tracked()
            if (ROOT / name).suffix in suffixes or name in ("Makefile", ".ci/run")}


def test_nothing_else_at_the_top_and_nothing_large():
    found = {name.split("/")[0] for name in tracked()}
    assert {name for name in found if not name.startswith(".")} <= TOP
    assert {"README.md", "LICENSE", "Makefile", "CITATION.cff", ".ci", ".gitignore"} <= found
    assert [name for name in tracked() if (ROOT / name).stat().st_size > 20e6] == []
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed_and_clean(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert re.fullmatch(r"\d\d_[a-z_]+", path.stem)
    assert book.metadata.kernelspec.name == "python3"
    assert "widgets" not in book.metadata and "papermill" not in book.metadata
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in cells]
    assert sum("parameters" in each for each in tags) == 1
    assert not any("injected-parameters" in each for each in tags)
    following = next(i for i, each in enumerate(tags) if "parameters" in each) + 1
    assert "check_parameters(" in cells[following].source, "the cell after the parameters checks them"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make replicate`"
    outputs = [output for cell in cells for output in cell.outputs]
    assert [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert any("NBVAL_CHECK_OUTPUT" in cell.source for cell in cells), "nothing is compared"


def test_the_workflow_has_a_job_for_every_notebook():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    named = workflow["jobs"]["notebook"]["strategy"]["matrix"]["notebook"]
    assert not NOTEBOOKS or named == [path.stem for path in NOTEBOOKS]


def test_no_absolute_paths():
    assert {name: found for name, text in texts().items() if (found := ABSOLUTE.findall(text)) and name != "tests/test_repository.py"} == {}


def test_the_readme_names_only_what_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", readme, re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert {"replicate", "test"} <= named <= targets
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)\)", readme):
        assert (ROOT / link).exists(), link
    verbs = re.findall(r"(?:bin/|-m )kvutils(\S*) (\S+)", code + (ROOT / "Makefile").read_text())
    assert len(verbs) >= 8 and all(not module and verb in VERBS for module, verb in verbs), verbs


def test_every_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    explained = re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE)
    assert sorted(phony) == sorted(explained)
    # A model's name may hold anything; folders are those of the one who types, also for notebooks, which run elsewhere.
    given = ["MODEL=it's my pocket", "KVUTILS_DATA=my data", f"PYTHON={sys.executable}", "VENV=nowhere"]
    printed = subprocess.run(["make", "-C", str(ROOT), "-pn", "replicate", "plan", *given], capture_output=True, text=True).stdout
    assert printed.count("--model 'it'\\''s my pocket'") == 2 and f"KVUTILS_DATA := {ROOT}/my data" in printed
    shown = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"], capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in shown for target in phony)


def test_the_public_address_has_one_home():
    """Links to this repository are derived from pyproject's setting; nothing else holds (or invents) one."""
    address = report.repository(ROOT)
    pattern = re.compile(r"github\.com/[\w.-]+/kvutils|colab\.research\.google\.com/github/[\w.-]+/[\w.-]+")
    allowed = {"pyproject.toml", "tests/test_repository.py", "kvutils/run/report.py"}
    if address:  # then also where `make replicate` and `make report` put it
        allowed |= {"README.md"} | {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS}
    assert [name for name, text in texts().items() if name not in allowed and pattern.search(text)] == []


def test_pinned_versions_are_within_the_ranges():
    from packaging.requirements import Requirement
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pinned = {name: version for name, version in (line.split("==") for line in lines if line)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    ranges = {each.name: each.specifier for each in wanted if each.name != "ipykernel"}  # comes with jupyterlab
    assert pinned.keys() == ranges.keys()
    assert [name for name in ranges if not ranges[name].contains(pinned[name])] == []


def test_modules_say_what_they_are_and_trust_nothing():
    for path in sorted((ROOT / "kvutils").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not tree.body or ast.get_docstring(tree), f"{path}: no docstring"
        for node in ast.walk(tree):
            where = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None and not all(isinstance(each, ast.Pass) for each in node.body), f"{where}: errors are swallowed"
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", where
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "cuda", f"{where}: the device comes from the model"
