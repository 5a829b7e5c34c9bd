"""Claims to verdicts to tables, from stored results alone: `kvutils report`, and `--check` to see whether anything is stale.

Reads data/claims.yaml and data/results/<profile>/<model>/<notebook>.json. Writes claims.json and REPORT.md beside the results, and
the generated parts of README.md. A verdict is computed here or not at all."""

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from kvutils import data_folder
from kvutils.errors import DataError
from kvutils.run import DEFAULT
from kvutils.store import read_json, to_json, write_text

RULES = ("above", "entries_above", "entries_within")
PICTURES = {"02_siglip_baseline": "02_steps", "03_input_agnostic_keys": "03_block_effects", "04_prefix": "04_prefix_effects",
            "05_blink_gap": "05_readouts"}  # the figure that stands for a notebook in the README, where it is not named after it
FIELDS = {"id", "section", "statement", "paper", "unit", "notebook", "rule"}


def load_claims(path: Path | None = None) -> list[dict]:
    """The claims of data/claims.yaml, in their order."""
    path = path or data_folder() / "claims.yaml"
    claims = yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]
    for claim in claims:
        if claim.keys() != FIELDS or claim["rule"].get("kind") not in RULES:
            raise DataError(f"{path}: claim {claim.get('id')}: expected {sorted(FIELDS)} and a rule of kind {', '.join(RULES)}; found {claim}.")
    return claims


def _side(part: Mapping, rule: Mapping, where: str) -> int:
    """+1 if the part's interval satisfies the rule, -1 if it is wholly on the other side, 0 if it is open or undefined."""
    low, high = part.get("low"), part.get("high")
    if low is None and high is None and part.get("reason"):
        return 0
    if low is None or high is None or not -math.inf < low <= high < math.inf:
        raise DataError(f"{where}: expected an interval with low <= high, found low={low!r}, high={high!r}.")
    if rule["kind"] == "entries_within":
        bound = rule["tolerance"]
        return 1 if -bound <= low and high <= bound else -1 if low > bound or high < -bound else 0
    null = rule.get("null", 0.0)
    return 1 if low > null else -1 if high < null else 0


def judge(claim: Mapping, measured: Mapping | None) -> tuple[str, int]:
    """(verdict, number of parts that hold) of a claim, by its rule; see data/claims.yaml for the rules."""
    if measured is None:
        return "not run", 0
    rule = claim["rule"]
    parts = [measured] if rule["kind"] == "above" else measured.get("entries") or []
    if not parts:
        raise DataError(f"claim {claim['id']}: its rule needs `entries` and the results have none.")
    sides = [_side(part, rule, f"claim {claim['id']}, {part.get('name', 'headline')}") for part in parts]
    needed = len(parts) if rule.get("at_least", "all") == "all" else rule["at_least"]
    if sides.count(1) >= needed:
        return "reproduced", sides.count(1)
    possible = max(len(parts), needed) - sides.count(-1)
    return ("inconclusive" if possible >= needed else "not reproduced"), sides.count(1)


def row(claim: Mapping, measured: Mapping | None) -> dict:
    """One line of claims.json. Where the results give entries but no value of their own, ours is how many of them hold; a value
    that is undefined for a reason stays so, as a count would not be in its unit."""
    verdict, holding = judge(claim, measured)
    measured = measured or {}
    ours = measured.get("value")
    if ours is None and measured and not measured.get("reason") and claim["rule"]["kind"] != "above":
        ours = holding
    return {"id": claim["id"], "verdict": verdict, "paper": claim["paper"], "ours": ours,
            "low": measured.get("low"), "high": measured.get("high"), "n": measured.get("n"),
            "unit": measured.get("unit") or claim["unit"], "notebook": claim["notebook"]}


def measurement(claim: Mapping, results: Mapping[str, Mapping]) -> Mapping | None:
    """What a claim's notebook has stored of it; None if it was not run or not measured."""
    return results.get(claim["notebook"], {}).get("claims", {}).get(claim["id"])


def rows(results: Mapping[str, Mapping]) -> list[dict]:
    """The lines of claims.json, one per claim, from {notebook: its results}."""
    return [row(claim, measurement(claim, results)) for claim in load_claims()]


_IN_A_CELL = str.maketrans({"|": "\\|", "<": "&lt;", "\n": "<br>"})


def read_results(folder: Path) -> dict[str, dict]:
    """{notebook: results} of the results files in a folder."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("[0-9][0-9]_*.json"))}


def number(value: object) -> str:
    """As the tables show it: three decimals below 10, one below 100, else none; what is no fraction as it is."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no "-0.000"


def interval(part: Mapping, value: str = "value") -> str:
    """`0.123 [0.100, 0.146]`."""
    if part.get("low") is None:
        return f"not defined: {part['reason']}" if part.get("reason") else number(part.get(value))
    return f"{number(part.get(value))} [{number(part['low'])}, {number(part['high'])}]"


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table as Markdown; numbers as `number` shows them. Prompts, as `<|im_start|>user` and a line break, stay in their cell."""
    lines = [f"| {' | '.join(number(each).translate(_IN_A_CELL) for each in line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def table(lines: list[dict]) -> str:
    """The verdict table of claims.json's lines as Markdown."""
    header = ["", "claim", "paper §", "paper", "ours [95 % interval]", "unit", "n", "verdict", "notebook"]
    return markdown_table(header, [[line["id"], claim["statement"].strip(), claim["section"], line["paper"], interval(line, "ours"), line["unit"],
        line["n"], f"**{line['verdict']}**", line["notebook"][:2]] for claim, line in zip(load_claims(), lines, strict=True)])  # fmt: skip


def details(results: Mapping[str, Mapping], provenance: Mapping[str, Mapping]) -> str:
    """REPORT.md's other parts: the comparisons behind each verdict, the choices made, what was measured on which data; but
    not commit, versions and processor, which differ from machine to machine."""
    out = []
    for claim in load_claims():
        entries = (measurement(claim, results) or {}).get("entries")
        if entries:
            comparisons = markdown_table(["", "value [95 % interval]", "n"], [[each["name"], interval(each), each.get("n")] for each in entries])
            out += [f"\n## {claim['id']}: the comparisons\n", comparisons]
    for name, found in results.items():
        if found.get("choices"):
            out.append(f"\n## {name}: choices where the paper is silent\n")
            out += [f"- {key}: {text}" for key, text in sorted(found["choices"].items())]
        about = sorted((key, value) for key, value in provenance.get(name, {}).items() if key != "machine")
        if about:
            out += [f"\n## {name}: provenance\n", markdown_table(["", ""], about)]
    return "\n".join(out) + "\n"


def result_folders(root: Path) -> list[Path]:
    """data/results/<profile>/<model> folders that hold results, the committed run's first."""
    folders = {path.parent for path in (root / "data" / "results").glob("*/*/[0-9][0-9]_*.json")}
    return sorted(folders, key=lambda path: ((path.parent.name, path.name) != DEFAULT, path))


def title_of(folder: Path) -> str:
    """Profile, model and size of a folder of results, as a heading names them."""
    size = next((found["parameters"]["size"] for found in read_results(folder).values() if "size" in found.get("parameters", {})), "full")
    about = f"Profile `{folder.parent.name}`, model `{folder.name.removesuffix(f'-{size}')}`"
    return about if size == "full" else f"{about}, **{size}**: a sample of the data, so its intervals are wide"


def fill(text: str, block: str, content: str) -> str:
    """`text` with the lines between `<!-- block:start -->` and `<!-- block:end -->` replaced."""
    start, end = f"<!-- {block}:start -->", f"<!-- {block}:end -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise DataError(f"README.md needs the markers {start} and {end}, once each.")
    return text[:text.index(start) + len(start)] + f"\n{content}".rstrip() + "\n" + text[text.index(end):]


def repository(root: Path) -> str:
    """The public address of the repository at `root` from its pyproject.toml, "" while there is none."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["tool"]["kvutils"]["repository"].rstrip("/").removesuffix(".git")


def badge(notebook: str, address: str) -> str:
    """"Open in Colab" for a notebook of the repository at `address`, as Markdown."""
    path = address.removeprefix("https://").removeprefix("github.com/")
    link = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{notebook}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def readme(text: str, root: Path) -> str:
    """README.md with its generated parts: the badges, a figure and the finding of each notebook, the verdicts."""
    names = sorted(path.stem for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    address = repository(root)
    badges = [f"{name} {badge(name, address)}" for name in names if address]
    results = read_results(root / "data" / "results" / Path(*DEFAULT))
    gallery = [f"![{name}](figures/{PICTURES.get(name, name)}.png)\n\n**{name[:2]}** {found['finding']}"
               for name, found in results.items() if found.get("finding")]
    tables = [f"{title_of(folder)}:\n\n{table(rows(read_results(folder)))}" for folder in result_folders(root)] or [table(rows({}))]
    for block, parts in {"badges": badges, "gallery": gallery, "verdicts": tables}.items():
        text = fill(text, block, "\n\n".join(parts))
    return text


def generated(root: Path) -> dict[Path, str]:
    """{path: text} of every generated file as the results under `root` make it."""
    files = {}
    for folder in result_folders(root):
        results, provenance = read_results(folder), read_results(folder / "provenance")
        lines = rows(results)
        files[folder / "claims.json"] = to_json(lines)
        title = f"# Verdicts: {title_of(folder)}\n\nMade by `make report`.\n\n"
        files[folder / "REPORT.md"] = title + table(lines) + "\n" + details(results, provenance)
    path = root / "README.md"
    if path.exists():  # a folder of results somewhere else has none
        files[path] = readme(path.read_text(encoding="utf-8"), root)
    return files


def stale(root: Path) -> list[Path]:
    """The generated files that are missing or differ from what the results make."""
    return [path for path, text in generated(root).items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def write(root: Path) -> list[Path]:
    """Write the generated files that are stale; returns their paths."""
    files, old = generated(root), stale(root)
    for path in old:
        write_text(path, files[path])
    return old
