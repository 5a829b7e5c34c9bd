"""The tables of the verdicts, from stored results alone: `kvutils report`, and `--check` to see whether anything is stale.

Writes claims.json and REPORT.md beside the results of every run, and the generated parts of README.md."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvutils import plots
from kvutils.errors import DataError
from kvutils.plots import models
from kvutils.run import DEFAULT, across, judged
from kvutils.run.verdicts import NOTHING, amount, is_current, rough
from kvutils.store import to_json, write_text

PICTURES = {"02_siglip_baseline": "02_steps", "03_input_agnostic_keys": "03_block_effects", "04_prefix": "04_prefix_effects",
            "05_blink_gap": "05_gap"}  # the figure that stands for a notebook in the README, where it is not named after it
FIRST = "A generated scene and its tokens from encoder to last layer: principal components as colours, and what is similar to the marked point"  # README's first figure
_IN_A_CELL = str.maketrans({"|": "\\|", "<": "&lt;", "\n": "<br>"})


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


def table(lines: list[dict], profile: str) -> str:
    """The verdicts of claims.json's lines as Markdown: the paper's claims, then our questions."""
    claims = {claim["id"]: claim for claim in judged.load_claims()}
    here = f"{'in this small model' if profile == 'pocket' else 'ours'} [95 % interval]"
    out = []
    for question, header in ((False, ("", "claim", "paper", here, "verdict", "why")), (True, ("", "question of ours", here, "verdict", "why"))):
        cells = [[line["id"], claims[line["id"]]["short"], *([] if question else [line["paper"]]), judged.ours(line), f"**{line['verdict']}**", judged.sentence(line)]
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
        cells.append([line["id"], f"**{line['verdict']}**", effect, judged.ours(line), amount(line["smallest"], line["unit"]), detectable,
                      line["n"], judged.units(line), needs])  # fmt: skip
    return markdown_table(header, cells)


def details(lines: list[dict], results: Mapping, provenance: Mapping[str, Mapping]) -> str:
    """REPORT.md's other parts: the comparisons behind each verdict, the choices made, what was measured on which data; but
    not commit, versions and processor, which differ from machine to machine."""
    out = []
    for claim, line in zip(judged.load_claims(), lines, strict=True):
        paper = "A question of ours." if claim["paper"] is None else f"The paper, section {claim['section']}: {claim['paper']}."
        out += [f"\n## {claim['id']}: {line['verdict']}\n", f"{claim['statement'].strip()} {paper}\n", f"**{line['why']}** {line['note']}".strip(),
                f"\nJudged by: {claim['primary'].strip()}. Smallest effect of interest: {amount(claim['smallest'], claim['unit'])} ({claim['why']}). "
                f"What has to hold first: {claim['needs']}."]  # fmt: skip
        found = judged.measurement(claim, results)
        if found and is_current(found):
            out += ["", markdown_table(judged.COMPARISONS[1:], [cells[1:] for cells in judged.comparisons(claim, found)])]
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
    columns = [judged.rows(judged.read_all(folder)) for folder in folders]
    header = ("", "claim", *(f"[{folder.name}](data/results/{folder.parent.name}/{folder.name}/REPORT.md)" for folder in folders))
    cells = []
    for claim, *lines in zip(judged.load_claims(), *columns, strict=True):
        words = [f"**{line['verdict']}** {judged.ours(line)}".removesuffix(" –") for line in lines]
        cells.append([claim["id"], claim["short"], *(words if claim["notebook"] else (f"{words[0]}, all models together", *["″"] * len(words[1:])))])
    profile = folders[0].parent.name
    figure = f"![Claims C1 and C2 in every model, and C3](figures/models_{profile}.png)"
    summary = f"<details><summary><b>The same for every finished model of profile {profile}, {len(folders)} of them</b></summary>"
    return f"{summary}\n\n{markdown_table(header, cells)}\n\n{figure}\n\n</details>"


def draw_models(root: Path) -> None:
    """The figure of a profile's models beside each other, of profiles that have several."""
    for profile in {folder.parent for folder in judged.result_folders(root)}:
        if len(found := across.shown(judged.of_profile(profile))) > 1:
            plots.save({f"models_{profile.name}": models.beside_each_other(found)}, root / "figures")


def title_of(folder: Path) -> str:
    """Profile, model and size of a folder of results, as a heading names them."""
    size = across.size_of(judged.read_results(folder))
    about = f"Profile `{folder.parent.name}`, model `{folder.name.removesuffix(f'-{size}')}`"
    return about if size == "full" else f"{about}, **{size}**: a sample of the data, so its intervals are wide"


def runs(folders: Iterable[Path]) -> str:
    """Every run in a line, as Markdown: on what it ran, for how long, and its words for the paper's claims about one model."""
    lines = []
    for folder in folders:
        words: dict[str, list[str]] = {}
        for line in judged.rows(judged.read_all(folder)):
            if line["id"].startswith("C") and line["notebook"]:
                words.setdefault(line["verdict"], []).append(f"{line['id']} ({judged.ours(line).partition(' tasks')[0]})" if line["tasks"] else line["id"])
        machines = [about.get("machine", {}) for about in judged.read_results(folder / "provenance").values()]
        named = ({each[key] for each in machines if key in each} for key in ("device", "torch", "transformers"))
        hardware, torch, transformers = (", ".join(sorted(each)) or "–" for each in named)
        hours = [each["hours"] for each in machines if "hours" in each]
        size = across.size_of(judged.read_results(folder))
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
    lines = judged.rows(judged.read_all(root / "data" / "results" / Path(*DEFAULT)))
    overview = [f"![{FIRST}](figures/01_overview.png)\n\n{FIRST}. In this small model the image values hold more than their controls, "
                f"such as pixels or random weights, give on **{judged.ours(lines[0])}**."] if lines[0]["tasks"] else []  # fmt: skip
    shorts = {claim["id"]: claim["short"] for claim in judged.load_claims()}
    gallery = []
    for name in dict.fromkeys(line["notebook"] for line in lines if line["notebook"] and line["why"] != NOTHING):
        said = "; ".join(f"{line['id']}, {shorts[line['id']]}: **{line['verdict']}**" for line in lines if line["notebook"] == name)
        gallery.append(f"![{name}](figures/{PICTURES.get(name, name)}.png)\n\n[{name}](notebooks/{name}.ipynb). {said}.".replace("?:", "?"))
    folders = judged.result_folders(root)
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
    for folder in judged.result_folders(root):
        results = judged.read_all(folder)
        lines = judged.rows(results)
        files[folder / "claims.json"] = to_json(lines)
        about = "Made by `make report` from the results beside it, by the rules of `kvutils/run/verdicts.py`; the README says what the words mean."
        parts = [f"# {title_of(folder)}", about, table(lines, folder.parent.name), f"## The numbers\n\n{numbers_table(lines)}"]
        files[folder / "REPORT.md"] = "\n\n".join([*parts, details(lines, results, judged.read_results(folder / "provenance"))])
    path, project = root / "README.md", root / "pyproject.toml"
    if path.exists() and project.exists() and "[tool.kvutils]" in project.read_text(encoding="utf-8"):  # elsewhere it is another's
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
