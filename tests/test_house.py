"""The house keeps its plan: rooms in the order of the data, none larger than its budget, nothing that nobody uses."""

import ast
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kvutils"
CORE = ("checkpoints", "models", "vision", "prompts", "language", "kvcache", "keys", "block", "answer")  # in the order of the data
BASE = ("images", "processors", "layout", "probes", "store")

# Room -> the rooms that it may import, beside its own files, `errors` and the face (`kvutils` itself).
ALLOWED = {
    **{room: () for room in ("errors", *BASE, "metrics")},
    **{room: (*BASE, *CORE[:place]) for place, room in enumerate(CORE)},
    "datasets": ("images", "store"),
    "readout": (*BASE, *CORE, "metrics"),
    "tasks": (*BASE, *CORE, "metrics", "datasets", "readout"),
    "plots": ("store",),
    "explorer": (*BASE, *CORE, "metrics", "readout"),
    "run": (*BASE, *CORE, "metrics", "datasets", "readout", "tasks", "plots", "explorer"),
    "__main__": ("run",),
}

# Lines per room, blank ones and comments counted, rounded up to tens. A budget goes down as its room shrinks. It is raised
# only by a commit that says what the new lines are for and what they made superfluous.
BUDGET = {
    "__init__": 90, "errors": 100, "checkpoints": 130, "images": 90, "processors": 150, "layout": 300, "probes": 320, "store": 320, "models": 320, "vision": 200,
    "prompts": 160, "language": 270, "kvcache": 160, "keys": 240, "block": 150, "answer": 320,
    "metrics": 800, "datasets": 2410, "datasets/pocket": 1140, "readout": 1170, "tasks": 4270, "plots": 990, "explorer": 680, "run": 2630, "__main__": 10,
}
CORE_BUDGET, PACKAGE_BUDGET = 3_273, 17_320  # the flat files together, the whole package; last: notebooks edited while they run, memory of containers, clones that are not installed (run); unknown characters of a question are said; slots, points, masks and options that do not fit are refused; before: options of the wrong type, models in training mode, tiles cut otherwise, values of other layers and texts that are none are refused; claims (judged) apart from their tables (report); intervals over strips of a picture
LARGEST = 320  # lines of a module: a longer one is two ideas


@cache
def modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of the package."""
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """A module's folder, or itself where it lies flat; "" for the face."""
    return module.split(".")[1] if "." in module else ""


def imports(tree: ast.Module) -> set[tuple[str, str]]:
    """(module, name) of all that a file takes from the package, wherever in the file; name "" for a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(each.name, "") for each in node.names if each.name.split(".")[0] == "kvutils"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "kvutils").split(".")[0] == "kvutils":
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                found.add((inner, "") if inner in modules() else (node.module, each.name))
    return found


def wrong_arrows(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    wrong = {}
    for module, tree in trees.items():
        allowed = {"", "errors", room(module), *ALLOWED[room(module)]} if module != "kvutils" else {""}
        beyond = sorted(target for target, _ in imports(tree) if room(target) not in allowed)
        if beyond:
            wrong[module] = beyond
    return wrong


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, [] if there is none."""
    left = dict(graph)
    while free := [name for name, targets in left.items() if not targets & left.keys() - {name}]:
        for name in free:
            del left[name]
    return sorted(left)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def room_lines() -> Counter:
    found: Counter = Counter()
    for path in PACKAGE.rglob("*.py"):
        folders = path.relative_to(PACKAGE).parts[:-1]
        found["/".join(folders) or path.stem] += lines(path)
    return found


def identifiers(tree: ast.AST) -> Counter:
    """How often each name is read, called or imported in a file."""
    found: Counter = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.alias):
            found[node.name.rpartition(".")[2]] += 1
    return found


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    """{name: node} of the public functions, classes, methods and constants of a file."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {each.id: node for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found |= {f"{node.name}.{each.name}": each for each in node.body if isinstance(each, ast.FunctionDef)}
    return {name: node for name, node in found.items() if not name.rpartition(".")[2].startswith("_")}


def notebook_code(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def unused(trees: dict[str, ast.Module], outside: list[ast.AST], offered: set[str]) -> list[str]:
    """module.name of the public definitions that neither another place of the package nor `outside` uses."""
    used = sum(map(identifiers, (*trees.values(), *outside)), Counter())
    found = ((module, name, name.rpartition(".")[2], node) for module, tree in trees.items() for name, node in definitions(tree).items())
    return sorted(f"{module}.{name}" for module, name, short, node in found
                  if used[short] <= identifiers(node)[short] and short not in offered)  # fmt: skip


def test_arrows_point_one_way():
    assert {room(module) for module in modules()} - {""} == ALLOWED.keys(), "a room that the plan does not know"
    assert wrong_arrows(modules()) == {}


def test_no_circle_of_imports():
    graph = {module: {target for target, _ in imports(tree)} for module, tree in modules().items()}
    assert circle(graph) == []


def test_nothing_is_imported_out_of_sight():
    """By name at run time, relatively, or a name that its file keeps to itself."""
    found = [(module, name) for module, tree in modules().items() for name in ("import_module", "__import__") if identifiers(tree)[name]]
    found += [(module, node.lineno) for module, tree in modules().items() for node in ast.walk(tree)
              if isinstance(node, ast.ImportFrom) and node.level]
    found += [(module, name) for module, tree in modules().items() for _, name in imports(tree) if re.match("_[^_]", name)]
    assert [each for each in found if each != ("kvutils", "import_module")] == []  # the face loads its names when they are used


def test_rooms_keep_their_budgets():
    found = room_lines()
    assert found.keys() == BUDGET.keys()
    assert {name: (found[name], budget) for name, budget in BUDGET.items() if found[name] > budget} == {}
    flat = [path for path in PACKAGE.glob("*.py") if path.stem != "__main__"]
    assert len(flat) <= 16 and sum(map(lines, flat)) <= CORE_BUDGET
    assert sum(found.values()) <= PACKAGE_BUDGET
    assert {name_of(path): lines(path) for path in PACKAGE.rglob("*.py") if lines(path) > LARGEST} == {}


def test_everything_public_is_used():
    """By the package, a notebook, a benchmark, the training recipe or a user; a test alone is no use."""
    files = [path for folder in ("benchmarks", "data/pocket/recipe") for path in (ROOT / folder).rglob("*.py")]
    outside = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    outside += [ast.parse(notebook_code(path)) for path in (ROOT / "notebooks").glob("*.ipynb")]
    import kvutils

    assert unused(modules(), outside, set(kvutils.__all__)) == []


def test_image_tokens_are_embedded_in_one_place():
    assert [module for module, tree in modules().items() if identifiers(tree)["masked_scatter"]] == ["kvutils.language"]


def test_stored_parts_depend_on_the_rooms_that_measure():
    """Drawing and reporting may change without a new measurement; nothing that measures is left out."""
    from kvutils.store import NOT_MEASURING

    apart = {each.rstrip("/") for each in NOT_MEASURING}
    assert apart == {"plots", "explorer", "run", "__main__"}
    measuring = {room(target) for module, tree in modules().items() if room(module) not in apart for target, _ in imports(tree)}
    assert not measuring & apart


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from kvutils.tasks.base import Task", ["kvutils.tasks.base"]),  # the core looks up
        ("def late():\n    from kvutils.plots import style", ["kvutils.plots.style"]),  # also inside a function
        ("import kvutils.run.cli", ["kvutils.run.cli"]),
        ("from kvutils.errors import ModelError\nfrom kvutils.images import open_image", []),
    ],
)
def test_a_wrong_arrow_is_found(code, found):
    assert wrong_arrows({"kvutils.models": ast.parse(code)}) == ({"kvutils.models": found} if found else {})


def test_a_broken_rule_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    code = "def used():\n    return alone\ndef alone():\n    return alone()\nclass Box:\n    def lid(self): ...\nX = used()"
    assert unused({"m": ast.parse(code)}, [], set()) == ["m.Box", "m.Box.lid", "m.X"]
    assert unused({"m": ast.parse(code)}, [ast.parse("from m import Box, X\nBox().lid()")], {"X"}) == []
