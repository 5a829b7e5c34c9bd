"""The repository keeps its own rules: notebooks, commands, files."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from PIL import Image

from kvutils.run import cli, report
from kvutils.run.cli import VERBS
from kvutils.run.notebook import ROOT

TOP = {"notebooks", "kvutils", "data", "figures", "tests", "benchmarks", "environment.yml", "README.md",
       "CHANGELOG.md", "CONTRIBUTING.md", "requirements.txt", "Makefile", "LICENSE", "CITATION.cff", "pyproject.toml"}
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
    assert [name for name in tracked() if (ROOT / name).stat().st_size > (50e6 if name.endswith(".parquet") else 20e6)] == []
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


PAGES = [name for name in tracked() if re.fullmatch(r"[A-Z]+\.md|(data|benchmarks|\.github)/.*\.md|notebooks/.*\.ipynb", name)]


def prose(name: str) -> str:
    """A page's text; of a notebook its Markdown cells."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        return "\n\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "markdown")
    return text


def broken_links(name: str, text: str) -> list[str]:
    """Relative links of a page whose file, or whose heading in it, is not there; headings become anchors as on GitHub."""
    broken = []
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]*)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        page = text if not path else prose(target.resolve().relative_to(ROOT).as_posix()) if anchor and target.exists() else ""
        headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if not target.exists() or anchor and anchor not in slugs:
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert broken_links(name, prose(name)) == []


def test_a_broken_link_is_found():
    text = "# Über uns: x\n[a](README.md) [b](#über-uns-x) [c](#c) [d](no.md) [e](README.md#no-such) [f](https://x.org/y) `[g](g)`"
    assert broken_links("README.md", text) == ["#c", "no.md", "README.md#no-such"]


README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = [line for language, block in FENCE.findall(README) if not language for line in block.splitlines()]
SHELL += re.findall(r"`((?:make|kvutils|\.venv/bin/kvutils|pip) [^`]+)`", FENCE.sub("", README).replace("\n", " "))


@pytest.mark.parametrize("command", dict.fromkeys(SHELL))
def test_the_readmes_commands_are_understood(command):
    """Targets and variables by make, the rest by the command's own parser; what it takes seconds to run is run below."""
    words = shlex.split(command.replace("$HOME", "/home"))
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert words[1] in re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), words[1]
        known = set(re.findall(r"^([A-Z_]+) *\??=", makefile, re.MULTILINE)) | {"KVUTILS_DATA"}
        assert {word.split("=")[0] for word in words[2:]} <= known and all("=" in word for word in words[2:])
        make = ["make", "-n", "-C", str(ROOT), f"PYTHON={sys.executable}", "VENV=nowhere"]
        shown = subprocess.run([*make, *words[1:]], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert all(word.removeprefix("ARGS=") in shown.stdout for word in words if word.startswith("ARGS="))
        assert words[1] != "lab" or ("--allow-root" in shown.stdout) == (os.getuid() == 0)  # which JupyterLab asks for
    elif "kvutils" in words[0].split("/") or "kvutils" in words:
        arguments = words[next(i for i, word in enumerate(words) if word.split("/")[-1] == "kvutils") + 1:]
        assert arguments[0] == "VERB" or cli.parser().parse_args(arguments).verb in VERBS or "--help" in arguments
    else:
        assert command == "pip install ."


def test_the_readmes_first_minute_runs(tmp_path, monkeypatch, capsys):
    """The lines of Python, and every command of one's own pictures, on pictures made here; the others that need no data, network or hours."""
    (tmp_path / "FOLDER").mkdir()
    for path in (tmp_path / "PHOTO.jpg", tmp_path / "FOLDER" / "a.png", tmp_path / "FOLDER" / "b.png"):
        Image.effect_noise((96, 96), 90).convert("RGB").save(path)
    monkeypatch.chdir(tmp_path)
    (lines,) = [block for language, block in FENCE.findall(README) if language == "python"]
    assert len(lines.splitlines()) == 4 and "import kvutils as kv" in lines
    exec(lines, {})
    assert "torch.Size([145, 32])" in capsys.readouterr().out
    own = [line.split()[1:] for line in SHELL if line.startswith(".venv/bin/kvutils ") and "VERB" not in line]
    assert {"capture", "probe"} == {arguments[0] for arguments in own}
    for arguments in own:
        assert cli.main(arguments) == 0, arguments
    assert (tmp_path / "FILE.safetensors").exists() and (tmp_path / "FOLDER-probe").is_dir()
    (plan,) = [line for line in SHELL if line.startswith("make plan PROFILE=paper MODEL=llava-onevision-7b ")]
    given = dict(word.lower().split("=") for word in plan.split()[2:])
    assert cli.main(["plan", *(each for name, value in given.items() for each in (f"--{name}", value))]) == 0
    assert "assumed" in capsys.readouterr().out


def test_every_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    explained = re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE)
    assert sorted(phony) == sorted(explained) and set(re.findall(r"-m kvutils (\S+)", text)) <= set(VERBS)
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
