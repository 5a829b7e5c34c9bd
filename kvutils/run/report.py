"""Claims to verdicts to tables, from stored results alone: `kvutils report`, and `--check` to see whether anything is stale.

Reads data/claims.yaml and data/results/<profile>/<model>/<notebook>.json. Writes claims.json and REPORT.md beside the results, and
the generated parts of README.md. A verdict is computed here or not at all."""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from kvutils import data_folder, plots
from kvutils.errors import DataError
from kvutils.plots import models
from kvutils.run import DEFAULT, across
from kvutils.run.verdicts import HOLDS, NOT_MEASURED, NOTHING, OPPOSITE, PRESENT, SAY_FEW, amount, decided_by, interval_of, judge, rough, smallest_of, word_of_part
from kvutils.store import read_json, to_json, write_text

PICTURES = {"02_siglip_baseline": "02_steps", "03_input_agnostic_keys": "03_block_effects", "04_prefix": "04_prefix_effects",
            "05_blink_gap": "05_gap"}  # the figure that stands for a notebook in the README, where it is not named after it
FIRST = "A generated scene, the colours of its tokens through the model, and what is like one clicked point"  # README's first figure
COMPARISONS = ("claim", "comparison", "value [95 % interval]", "smallest effect of interest", "detectable", "n", "units", "verdict")


@cache
def load_claims() -> list[dict]:
    """The claims of data/claims.yaml, in their order."""
    file = data_folder() / "claims.yaml"
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))["claims"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise DataError(f"{file}: expected YAML with a list `claims`, found {error}") from error


def row(claim: Mapping, found: Mapping | None) -> dict:
    """One line of claims.json: the verdict, why, and the numbers that it rests on, in the claim's unit."""
    verdict = judge(claim, found)
    found = found if found and "primary" in found else {}
    one, tasks = decided_by(claim, found) if found else {}, found.get("tasks", []) if claim["kind"] == "tasks" else []
    return {"id": claim["id"], "verdict": verdict.word, "why": verdict.why, "note": found.get("note", ""),
            **{key: claim[key] for key in ("kind", "paper", "effect", "unit", "smallest", "notebook")}, "comparison": one.get("name"),
            **{key: one.get(key) for key in ("value", "low", "high", "detectable", "n", "units", "reason")},
            "tasks": {each["name"]: word_of_part(claim, each) for each in tasks}, "prerequisites": found.get("prerequisites", [])}  # fmt: skip


def ours(line: Mapping) -> str:
    """What was measured of a line of claims.json: `+0.04 [+0.00, +0.10] F1 points`, or on how many tasks it is ahead, and behind on any."""
    if line["kind"] == "tasks":
        ahead, behind = (list(line["tasks"].values()).count(word) for word in (PRESENT, OPPOSITE))
        return f"{ahead} of {len(line['tasks'])} tasks{f' ({behind} behind)' if behind else ''}" if line["tasks"] else "–"
    if line["value"] is None:
        return "–"
    return interval_of(line) if line["low"] is None else f"{interval_of(line)} {line['unit']}"


def comparisons(claim: Mapping, found: Mapping) -> list[list]:
    """What stands behind a verdict: rows under `COMPARISONS`, the one that decides in bold, each with its own word."""
    if "primary" not in found:
        return [[claim["id"], judge(claim, found).why, *[""] * (len(COMPARISONS) - 3), NOT_MEASURED]]
    parts = {each["name"]: each for each in (found["primary"], *found.get("tasks", ()), *found["others"])}
    first, line = decided_by(claim, found), row(claim, found)
    del parts[first["name"]]
    counted = claim["kind"] == "tasks" and first["low"] is not None  # what is judged is the number; its mean is one of the others
    lines = [(claim["id"], first, *((f"{interval_of(first)} {claim['unit']}", word_of_part(claim, first)) if counted
                                    else (ours(line), line["verdict"])))]
    for one in parts.values():
        value = interval_of(one) if one["low"] is None else f"{interval_of(one)} {one.get('unit', claim['unit'])}"
        lines.append((claim["id"], one, value, word_of_part(claim, one)))
    cells = [[name, one["name"], value, (least := smallest_of(claim, one)) and f"{least:g}", one["detectable"] and rough(one["detectable"]),
              one["n"], units(one), word] for name, one, value, word in lines]  # fmt: skip
    cells[0][:2] = (f"**{text}**" for text in cells[0][:2])
    return cells


def units(one: Mapping) -> str:
    """The number of independent units, and whether an interval rests on few."""
    few = one["low"] is not None and one["units"] < SAY_FEW
    return f"{one['units']:,}{', few units' if few else ''}" if one["units"] else "–"


def measurement(claim: Mapping, results: Mapping) -> Mapping | None:
    """What is stored of a claim, by its notebook or for several models; None if it was not measured."""
    return results.get(claim["notebook"], {}).get("claims", {}).get(claim["id"])


def rows(results: Mapping) -> list[dict]:
    """The lines of claims.json, one per claim, from `read_all`."""
    return [row(claim, measurement(claim, results)) for claim in load_claims()]


_IN_A_CELL = str.maketrans({"|": "\\|", "<": "&lt;", "\n": "<br>"})


def read_results(folder: Path) -> dict[str, dict]:
    """{notebook: results} of the results files in a folder."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("[0-9][0-9]_*.json"))}


def read_all(folder: Path) -> dict:
    """The results in data/results/<profile>/<model>, and under None the claims that all models of the profile are read for."""
    return {**read_results(folder), None: {"claims": across.measure(of_profile(folder.parent), load_claims())}}


def of_profile(home: Path) -> across.Models:
    """Results and provenance of every model in data/results/<profile>."""
    models = sorted({path.parent for path in home.glob("*/[0-9][0-9]_*.json")})
    return {each.name: (read_results(each), read_results(each / "provenance")) for each in models}


def number(value: object) -> str:
    """As the tables show it: three decimals below 10, one below 100, else none; what is no fraction as it is."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no "-0.000"


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table as Markdown; numbers as `number` shows them. Prompts, as `<|im_start|>user` and a line break, stay in their cell."""
    lines = [f"| {' | '.join(number(each).translate(_IN_A_CELL) for each in line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def sentence(line: Mapping) -> str:
    """One sentence on a line of claims.json whose numbers stand beside: why the verdict is what it is; of an effect that is there, and of
    which the paper states no figure to compare with, what it consists of."""
    there = line["verdict"] in (PRESENT, HOLDS) and line["kind"] == "effect" and line["effect"] is None
    return re.split(r"(?<=\.) (?=[A-Z])", line["note"])[0] if there and line["note"] else line["why"]


def table(lines: list[dict], profile: str) -> str:
    """The verdicts of claims.json's lines as Markdown: the paper's claims, then our questions."""
    claims = {claim["id"]: claim for claim in load_claims()}
    here = f"{'in this small model' if profile == 'pocket' else 'ours'} [95 % interval]"
    out = []
    for question, header in ((False, ("", "claim", "paper", here, "verdict", "why")), (True, ("", "question of ours", here, "verdict", "why"))):
        cells = [[line["id"], claims[line["id"]]["short"], *([] if question else [line["paper"]]), ours(line), f"**{line['verdict']}**", sentence(line)]
                 for line in lines if line["id"].startswith("X") == question]  # fmt: skip
        out.append(markdown_table(header, cells))
    return "\n\n".join(out)


def numbers_table(lines: list[dict]) -> str:
    """What the verdicts rest on, as Markdown."""
    header = ("", "verdict", "paper", "ours [95 % interval]", "smallest effect of interest", "detectable", "n", "units", "what has to hold first")
    cells = []
    for line in lines:
        needs = "\n".join(f"{'yes' if each['holds'] else '**no**'}: {each['reason']}" for each in line["prerequisites"]) or "–"
        detectable = None if line["kind"] == "tasks" else line["detectable"] and f"{rough(line['detectable'])} {line['unit']}"
        effect = line["paper"] if line["effect"] is None else amount(line["effect"], "tasks" if line["kind"] == "tasks" else line["unit"])
        cells.append([line["id"], f"**{line['verdict']}**", effect, ours(line), amount(line["smallest"], line["unit"]), detectable,
                      line["n"], units(line), needs])  # fmt: skip
    return markdown_table(header, cells)


def details(lines: list[dict], results: Mapping, provenance: Mapping[str, Mapping]) -> str:
    """REPORT.md's other parts: the comparisons behind each verdict, the choices made, what was measured on which data; but
    not commit, versions and processor, which differ from machine to machine."""
    out = []
    for claim, line in zip(load_claims(), lines, strict=True):
        paper = "A question of ours." if claim["paper"] is None else f"The paper, section {claim['section']}: {claim['paper']}."
        out += [f"\n## {claim['id']}: {line['verdict']}\n", f"{claim['statement'].strip()} {paper}\n", f"**{line['why']}** {line['note']}".strip(),
                f"\nJudged by: {claim['primary'].strip()}. Smallest effect of interest: {amount(claim['smallest'], claim['unit'])} ({claim['why']}). "
                f"What has to hold first: {claim['needs']}."]  # fmt: skip
        found = measurement(claim, results)
        if found and "primary" in found:
            out += ["", markdown_table(COMPARISONS[1:], [cells[1:] for cells in comparisons(claim, found)])]
    for name, found in results.items():
        if found.get("choices"):
            out.append(f"\n## {name}: choices where the paper is silent\n")
            out += [f"- {key}: {text}" for key, text in sorted(found["choices"].items())]
        for each in found.get("tables", ()):  # too wide or too long for the notebook
            out += [f"\n## {name}: {each['title']}\n", markdown_table(each["header"], each["rows"])]
        about = sorted((key, value) for key, value in provenance.get(name, {}).items() if key != "machine")
        if about:
            out += [f"\n## {name}: provenance\n", markdown_table(["", ""], about)]
    return "\n".join(out) + "\n"


def side_by_side(folders: Sequence[Path]) -> str:
    """Each model of a profile in a column, as Markdown: its word for every claim and the numbers behind it; the header links its report.
    What is said of all models together is said once."""
    columns = [rows(read_all(folder)) for folder in folders]
    header = ("", "claim", *(f"[{folder.name}](data/results/{folder.parent.name}/{folder.name}/REPORT.md)" for folder in folders))
    cells = []
    for claim, *lines in zip(load_claims(), *columns, strict=True):
        words = [f"**{line['verdict']}** {ours(line)}".removesuffix(" –") for line in lines]
        cells.append([claim["id"], claim["short"], *(words if claim["notebook"] else (f"{words[0]}, all models together", *["″"] * len(words[1:])))])
    profile = folders[0].parent.name
    figure = f"![Claims C1 and C2 in every model, and C3](figures/models_{profile}.png)"
    return f"Every finished model of profile `{profile}`, with its report:\n\n{markdown_table(header, cells)}\n\n{figure}"


def draw_models(root: Path) -> None:
    """The figure of a profile's models beside each other, of profiles that have several."""
    for profile in {folder.parent for folder in result_folders(root)}:
        if len(found := across.shown(of_profile(profile))) > 1:
            plots.save({f"models_{profile.name}": models.beside_each_other(found)}, root / "figures")


def result_folders(root: Path) -> list[Path]:
    """data/results/<profile>/<model> folders that hold results, the committed run's first."""
    folders = {path.parent for path in (root / "data" / "results").glob("*/*/[0-9][0-9]_*.json")}
    return sorted(folders, key=lambda path: ((path.parent.name, path.name) != DEFAULT, path))


def title_of(folder: Path) -> str:
    """Profile, model and size of a folder of results, as a heading names them."""
    size = across.size_of(read_results(folder))
    about = f"Profile `{folder.parent.name}`, model `{folder.name.removesuffix(f'-{size}')}`"
    return about if size == "full" else f"{about}, **{size}**: a sample of the data, so its intervals are wide"


def runs(folders: Iterable[Path]) -> str:
    """Every run in a line, as Markdown: on what it ran, for how long, and its words for the paper's claims about one model."""
    lines = []
    for folder in folders:
        words: dict[str, list[str]] = {}
        for line in rows(read_all(folder)):
            if line["id"].startswith("C") and line["notebook"]:
                words.setdefault(line["verdict"], []).append(f"{line['id']} ({ours(line).partition(' tasks')[0]})" if line["tasks"] else line["id"])
        machines = [about.get("machine", {}) for about in read_results(folder / "provenance").values()]
        named = ({each[key] for each in machines if key in each} for key in ("device", "torch", "transformers"))
        hardware, torch, transformers = (", ".join(sorted(each)) or "–" for each in named)
        hours = [each["hours"] for each in machines if "hours" in each]
        size = across.size_of(read_results(folder))
        report = f"[{folder.name.removesuffix(f'-{size}')}](data/results/{folder.parent.name}/{folder.name}/REPORT.md)"
        lines.append([report, f"{folder.parent.name}, {size}", hardware, f"torch {torch}, transformers {transformers}",
                      f"{sum(hours):.2g}" if hours else None, "; ".join(f"{word}: {' '.join(names)}" for word, names in words.items())])  # fmt: skip
    return markdown_table(("model", "data", "hardware", "versions", "hours", "verdicts"), lines)


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
    """README.md with its generated parts: the badge of the quickstart, what the first picture shows, the verdicts, a figure of each
    notebook and the verdicts that it gave, the runs."""
    address = repository(root)
    badges = [badge("00_quickstart", address)] if address else []
    lines = rows(read_all(root / "data" / "results" / Path(*DEFAULT)))
    overview = [f"![{FIRST}](figures/01_overview.png)\n\n{FIRST}. In this small model the image values hold more than pixels or random "
                f"weights give on **{ours(lines[0])}**."] if lines[0]["tasks"] else []  # fmt: skip
    shorts = {claim["id"]: claim["short"] for claim in load_claims()}
    gallery = []
    for name in dict.fromkeys(line["notebook"] for line in lines if line["notebook"] and line["why"] != NOTHING):
        said = "; ".join(f"{line['id']}, {shorts[line['id']]}: **{line['verdict']}**" for line in lines if line["notebook"] == name)
        gallery.append(f"![{name}](figures/{PICTURES.get(name, name)}.png)\n\n[{name}](notebooks/{name}.ipynb). {said}.".replace("?:", "?"))
    folders = result_folders(root)
    tables = [f"Profile `{DEFAULT[0]}`, model `{DEFAULT[1]}`:\n\n{table(lines, DEFAULT[0])}"]
    for profile in sorted({folder.parent.name for folder in folders if (folder.parent.name, folder.name) != DEFAULT}):
        tables.append(side_by_side([folder for folder in folders if folder.parent.name == profile and not folder.name.endswith(models.BEFORE)]))
    blocks = {"badges": badges, "overview": overview, "gallery": gallery, "verdicts": tables, "runs": [runs(folders)]}
    for block, parts in blocks.items():
        text = fill(text, block, "\n\n".join(parts))
    return text


def generated(root: Path) -> dict[Path, str]:
    """{path: text} of every generated file as the results under `root` make it."""
    files = {}
    for folder in result_folders(root):
        results = read_all(folder)
        lines = rows(results)
        files[folder / "claims.json"] = to_json(lines)
        about = "Made by `make report` from the results beside it, by the rules of `kvutils/run/verdicts.py`; the README says what the words mean."
        parts = [f"# {title_of(folder)}", about, table(lines, folder.parent.name), f"## The numbers\n\n{numbers_table(lines)}"]
        files[folder / "REPORT.md"] = "\n\n".join([*parts, details(lines, results, read_results(folder / "provenance"))])
    path = root / "README.md"
    if path.exists():  # a folder of results somewhere else has none
        files[path] = readme(path.read_text(encoding="utf-8"), root)
    return files


def stale(root: Path) -> dict[Path, str]:
    """{path: text} of the generated files that are missing or differ from what the results make."""
    return {path: text for path, text in generated(root).items() if not path.exists() or path.read_text(encoding="utf-8") != text}


def write(root: Path) -> list[Path]:
    """Write the generated files that are stale, and draw the models' figure anew; returns the files' paths."""
    for path, text in (old := stale(root)).items():
        write_text(path, text)
    draw_models(root)
    return list(old)
