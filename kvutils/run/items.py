"""What a run leaves per item, and the results that follow from it: no model and no data set is needed to compute these again.

`items/<notebook>/<table>.parquet` in a folder of results holds what was measured; `items/<notebook>.json` what neither a model nor
arithmetic gives again: `about` (the parameters and facts that the results depend on), `choices` (texts) and `shown` (illustrations)."""

from collections.abc import Callable, Mapping
from pathlib import Path

from kvutils.errors import StoreError, one_of
from kvutils.store import Frame, plain, read_frame, read_json, to_json, write_frame, write_text
from kvutils.tasks import blink_interventions, input_agnostic_keys, prefix_effects, siglip_baseline, value_flow
from kvutils.tasks.choices import ChoiceTable
from kvutils.tasks.key_table import KeyTable
from kvutils.tasks.knock_out import KnockOut
from kvutils.tasks.tables import ScoreTable
from kvutils.tasks.yes_no import Answers

Table = ScoreTable | KeyTable | KnockOut | Answers | ChoiceTable | Frame
TABLES = {kind.__name__: kind for kind in (ScoreTable, KeyTable, KnockOut, Answers, ChoiceTable)}  # every class with `frame` and `of_frame`
RESULTS: dict[str, Callable[[Mapping[str, Table], Mapping], dict]] = {  # notebook -> what gives everything derived
    "01_value_flow": value_flow.results,
    "02_siglip_baseline": siglip_baseline.results,
    "03_input_agnostic_keys": input_agnostic_keys.results,
    "04_prefix": prefix_effects.results,
    "05_blink_gap": blink_interventions.results,
}


class _Tables(dict):
    """Tables by name; which were asked for, and an error that names the file of one that is not there."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.asked = folder, set()

    def __getitem__(self, name: str) -> Table:
        if name not in self:
            raise StoreError(f"{self.folder / name}.parquet is missing: take it from where the results are, or run the notebook again.")
        self.asked.add(name)
        return super().__getitem__(name)


def write_items(folder: Path, notebook: str, measured: Mapping[str, Table], about: Mapping, choices: Mapping, shown: Mapping) -> None:
    """Write the tables {name: table} and the JSON beside them; tables of an earlier run go. about["parameters"]: the notebook's."""
    tables = folder / "items" / notebook
    for name, table in measured.items():
        if isinstance(table, Frame):
            write_frame(tables / f"{name}.parquet", table)
        else:
            frame = table.frame()
            write_frame(tables / f"{name}.parquet", Frame(frame.columns, {"class": type(table).__name__, **frame.about}))
    for path in tables.glob("*.parquet"):
        if path.stem not in measured:
            path.unlink()
    content = {"about": about, "choices": choices, "shown": plain(shown, 9, "shown")}
    write_text(tables.with_name(f"{notebook}.json"), to_json(content, sort=False))  # results may depend on the order of what is about them


def read_items(folder: Path, notebook: str) -> tuple[_Tables, dict]:
    """What `write_items` wrote: the tables, and the JSON. StoreError for what is missing or damaged."""
    paths = sorted((folder / "items" / notebook).glob("*.parquet"))
    if not paths:
        raise StoreError(f"{folder / 'items' / notebook} has no tables: run the notebook again, or take its items from where the results are.")
    if not (file := folder / "items" / f"{notebook}.json").exists():
        raise StoreError(f"{file} is missing: take it from where the results are, or run the notebook again.")
    measured = _Tables(folder / "items" / notebook)
    for path in paths:
        frame = read_frame(path)
        if name := frame.about.get("class"):
            one_of(f"kind of table in {path}:", name, TABLES, StoreError)
            frame = TABLES[name].of_frame(frame)
        measured[path.stem] = frame
    return measured, read_json(file)


def results_file(notebook: str, about: Mapping, choices: Mapping, found: Mapping) -> dict:
    """The content of a results file: what was found, by which parameters and choices."""
    parameters = about["parameters"]
    named = {"notebook": notebook, "profile": parameters["profile"], "model": parameters["model"]}
    return {**named, "parameters": parameters, "choices": choices, **found}


def derive(folder: Path, notebook: str) -> dict:
    """The content of a results file, computed again from the items beside it."""
    one_of("notebook", notebook, RESULTS)
    measured, rest = read_items(folder, notebook)
    found = RESULTS[notebook](measured, rest["about"])
    if strange := sorted(measured.keys() - measured.asked):
        raise StoreError(f"{measured.folder / strange[0]}.parquet is no table of this notebook: no result follows from it. Remove it.")
    return results_file(notebook, rest["about"], rest["choices"], found)
