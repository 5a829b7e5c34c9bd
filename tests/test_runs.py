"""What a run leaves per item is enough to compute its results again, and whoever changes any of it is found out."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from tiny_models import score_table, tiny_pocket

from kvutils.datasets import open_dataset
from kvutils.errors import StoreError
from kvutils.images import encode_image
from kvutils.run import items, notebook, report
from kvutils.run.cli import main
from kvutils.store import Frame, read_frame, write_frame, write_json
from kvutils.tasks import siglip_baseline
from kvutils.tasks.tables import ScoreTable
from kvutils.tasks.text_segmentation import ReferringSegmentation

NAME, TASK = "02_siglip_baseline", "referring_segmentation"
JSON, TABLE = f"{NAME}.json", f"items/{NAME}/{TASK}.parquet"


@pytest.mark.parametrize("groups", [["g", "g", "h"], [("g", "h"), "g", ("h", "i")]], ids=["units", "pairs"])
@pytest.mark.parametrize("more", [{}, {"skipped": {"d": "damaged"}, "left_out": {"value.1": 2}, "splits": ["s", "s", ("t", "s")],
                                       "pictures": [("p", "q"), ("q",), ("p",)]}], ids=["plain", "full"])  # fmt: skip
def test_a_score_table_comes_back_as_it_was(tmp_path, groups, more):
    values = np.random.default_rng(0).normal(size=(3, 2, 2))
    table = ScoreTable("task", ["a", "b", "c"], groups, ["pixels", "value.3"], ["intersection", "union"], values, **more)
    write_frame(tmp_path / "t.parquet", table.frame())
    frame = read_frame(tmp_path / "t.parquet")
    assert {"id", "group", "value.3/intersection"} <= frame.columns.keys() and (frame["value.3/union"] == values[:, 1, 1]).all()
    found = ScoreTable.of_frame(frame)
    assert found.values.strides == table.values.strides and found.values.tobytes("A") == table.values.tobytes("A")
    assert (found.values == values).all()
    for name in ("task", "ids", "groups", "sources", "columns", "skipped", "left_out", "splits", "pictures"):
        before = getattr(table, name)
        assert getattr(found, name) == before, name


def test_items_are_read_as_the_tables_that_were_written(tmp_path):
    scores = ScoreTable("task", ["a"], ["a"], ["value.0"], ["iou"], np.ones((1, 1, 1)))
    items.write_items(tmp_path, "01_x", {"old": scores, "scores": scores}, {}, {}, {})
    about = {"parameters": {"seed": 0, "third": 1 / 3}, "num_layers": 8}
    items.write_items(tmp_path, "01_x", {"scores": scores, "answers": Frame({"id": ["a"], "answer": ["yes"]})}, about, {"a": "b"}, {"x": 1 / 3})
    measured, rest = items.read_items(tmp_path, "01_x")
    assert rest == {"about": about, "choices": {"a": "b"}, "shown": {"x": 0.333333333}}
    assert {name: type(table) for name, table in measured.items()} == {"answers": Frame, "scores": ScoreTable}
    assert measured["scores"].task == "task" and measured["answers"]["answer"] == ["yes"]
    with pytest.raises(StoreError, match=r"01_x/pope\.parquet is missing"):
        measured["pope"]


def finish(profile: str, options: dict) -> notebook.Run:
    """A run of notebook 02 on the referring expressions of 12 scenes, of which the scores are made up."""
    run = notebook.Run(NAME, profile, "pocket" if profile == "pocket" else "big")
    levels = {"pixels": 0.1, "encoder_original": 0.5, "encoder": 0.7, "projector": 0.6, "value.0": 0.65, "value.1": 0.3, "value.2": 0.45}
    levels |= {f"uncentred.{source}": level / 2 for source, level in levels.items()} | {f"untrained.value.{layer}": 0.05 for layer in range(3)}
    levels |= {f"uncentred.untrained.value.{layer}": 0.05 for layer in range(3)}
    samples = open_dataset("pocket-refcoco", scenes=12)
    table = score_table(TASK, levels, ReferringSegmentation.columns, len(samples), 3)
    table = replace(table, ids=[one.id for one in samples], groups=[one.group for one in samples], skipped={})
    parameters = {"profile": profile, "model": run.model, "size": "full", "bootstrap": 100, "seed": 0, "data_options": options}
    about, measured = {"parameters": parameters}, {TASK: table}
    maps = {"similarity": np.zeros((4, 4)).tolist(), "pca": np.zeros((4, 4, 3), int).tolist()}
    scene = {"image": encode_image(Image.new("RGB", (32, 24), "teal")), "size": [32, 24], "point": [8, 8],
             **{kind: dict.fromkeys(("encoder_original", "encoder", "value.0"), each) for kind, each in maps.items()}}  # fmt: skip
    run.finish(replace(tiny_pocket(), name=run.model), measured=measured, about=about, results=siglip_baseline.results(measured, about), choices={"a": "b"},
               shown={"scene": scene})
    report.write(notebook.output_root())
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVUTILS_OUT", str(tmp_path_factory.mktemp("finished")))
        patch.setattr(notebook, "code_commit", lambda: "c0ffee1234")
        finish("pocket", {"pocket-refcoco": {"scenes": 12}})
        return notebook.output_root()


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """The run's folder, to be changed."""
    monkeypatch.setenv("KVUTILS_OUT", str(tmp_path))
    monkeypatch.setattr(notebook, "code_commit", lambda: "c0ffee1234")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return notebook.Run(NAME).folder


def test_results_and_figures_follow_from_the_items_without_a_model(folder, monkeypatch, capsys):
    drawn = {path.name: path.read_bytes() for path in (folder.parents[3] / "figures").glob("*.png")}
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # nothing is loaded that could be run
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "everything fits" in said and f"numbers and texts in {JSON} follow" in said and "ids are those of pocket-refcoco" in said
    assert "C4 " in said and "not run: 01_value_flow" in said
    before = (folder / JSON).read_bytes()
    (folder / JSON).unlink()
    assert main(["check", str(folder), "--figures", str(folder / "again")]) == 0
    assert (folder / JSON).read_bytes() == before and "written, as it was missing" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (folder / "again").glob("*.png")} == drawn and len(drawn) == 2
    (folder / JSON).unlink()
    assert main(["check"]) == 0 and (folder / JSON).read_bytes() == before  # a run of items alone is found as well
    monkeypatch.setenv("KVUTILS_OUT", str(folder / "nothing"))
    assert main(["check"]) == 2 and "holds no results" in capsys.readouterr().err


def edit(frame: Frame, **columns) -> Frame:
    return Frame({**frame.columns, **columns}, frame.about)


def cut(frame: Frame) -> Frame:
    return Frame({name: column[:-1] for name, column in frame.columns.items()}, frame.about)


@pytest.mark.parametrize(("change", "said"), [
    (lambda frame: cut(frame), ["1 samples of the data set have no row, such as referring-", "claims.C4."]),
    (lambda frame: edit(frame, id=[frame["id"][1], *frame["id"][1:]]), ["1 ids stand more than once", "1 samples of the data set have no row"]),
    (lambda frame: edit(frame, id=["made-up", *frame["id"][1:]]), ["1 rows of samples that the data set does not have, such as made-up"]),
    (lambda frame: edit(frame, **{"value.1/ap": frame["value.1/ap"] * np.nan}), ["1 columns of scores have NaN, such as value.1/ap"]),
    (lambda frame: edit(frame, **{"encoder/iou": frame["encoder/iou"] + 0.1}), [f"chains.{TASK}.", "follows from the items"]),
    (lambda frame: Frame(frame.columns, {**frame.about, "skipped": {f"x{i}": "damaged" for i in range(90)}}), ["90 of", "samples were skipped"]),
    (lambda frame: Frame({k: v for k, v in frame.columns.items() if k != "group"}, frame.about), ["its items are not what this version"]),
    (lambda frame: Frame({k: v for k, v in frame.columns.items() if k != "id"}, frame.about), ["unknown column of the table 'id'"]),
    (lambda frame: Frame(frame.columns, {**frame.about, "class": "Another"}), ["unknown kind of table", "'Another'"]),
], ids=["rows gone", "twice", "made up", "NaN", "better", "skipped", "no group", "no id", "class"])  # fmt: skip
def test_tables_that_are_not_the_runs_are_found(folder, capsys, change, said):
    """Also where somebody has renewed the checksum."""
    write_frame(folder / TABLE, change(read_frame(folder / TABLE)))
    assert main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "does not fit:" in out and all(each in out for each in said), out


def test_files_that_were_damaged_or_edited_are_found(folder, capsys):
    def check(said: str) -> None:
        assert main(["check", str(folder)]) == 1
        assert said in (out := capsys.readouterr().out), out

    def replaced(name: str, old: str, new: str, said: str) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
        check(said)
        (folder / name).write_text(text)

    content = json.loads((folder / JSON).read_text())
    value, steps = content["claims"]["C4"]["primary"]["value"], content["chains"][TASK]["steps"]
    steps["projection"]["mean"] = content["claims"]["C4"]["primary"]["value"] = 77
    text = (folder / JSON).read_text()
    write_json(folder / JSON, content)
    first = f"{NAME}: claims.C4.primary.value is 77, {value!r} follows from the items"
    check(f"does not fit:\n    {first}\n    {NAME}: chains.{TASK}.steps.projection.mean is 77")
    (folder / JSON).write_text(text)
    replaced(f"items/{NAME}.json", '"seed": 0', '"seed": 1', "parameters.seed is 0, 1 follows")
    replaced(f"items/{NAME}.json", '"about"', '"abuot"', "its items are not what this version of kvutils reads (KeyError: 'about')")
    replaced("claims.json", '"verdict": "', '"verdict": "surely ', "C1.verdict is 'surely not measured', 'not measured' follows: `make report`")
    replaced(f"provenance/{JSON}", '"hours"', '"days"', f"provenance/{JSON} does not say: hours")
    replaced(f"provenance/{JSON}", '"hours": ', '"hours": -', "hours; expected what the run took")
    replaced(f"provenance/{JSON}", '"hours": ', '"hours": null, "took": ', "None hours; expected what the run took")
    replaced(f"provenance/{JSON}", '"model": "pocket"', '"model": "other"', "of the model 'other', its items of 'pocket'")
    replaced(f"provenance/{JSON}", "{", "", f"provenance/{JSON} cannot be read as JSON")
    replaced(JSON, "{", "", f"{JSON} cannot be read as JSON")
    replaced("claims.json", "[", "", "claims.json cannot be read as JSON")
    replaced(f"provenance/{JSON}", "c0ffee1234", "c0ffee1234 (modified)", "is none that others can fetch")
    data = (folder / TABLE).read_bytes()
    (folder / TABLE).write_bytes(data[:-9])
    check(f"{TASK}.parquet cannot be read as a table")
    (folder / TABLE).write_bytes(data)
    table = parquet.read_table(folder / TABLE)
    parquet.write_table(table.set_column(0, "id", [["x", *table["id"].to_pylist()[1:]]]), folder / TABLE)
    check("it was changed after the run")
    (folder / TABLE).write_bytes(data)
    strange = (folder / TABLE).with_name("foo.parquet")
    strange.write_bytes(data)
    check("foo.parquet is no table of this notebook")
    strange.unlink()
    about = (folder / f"items/{NAME}.json").rename(folder / "about.json")
    check(f"items/{NAME}.json is missing: take it from")
    about.rename(folder / f"items/{NAME}.json")
    (folder / "claims.json").unlink()
    assert main(["check", str(folder)]) == 0 and "claims.json is missing" in capsys.readouterr().out  # as four notebooks are
    (folder / TABLE).unlink()
    check("has no tables: run the notebook again")
    assert main(["check", str(folder.parent)]) == 2 and "holds no run" in capsys.readouterr().err
    assert main(["check", str(folder), str(folder), "--figures", "c"]) == 2 and "found 2 folders" in capsys.readouterr().err


def test_a_run_on_real_data_is_counted_and_leaves_no_pictures(folder, capsys, monkeypatch):
    monkeypatch.delenv("KVUTILS_DATA", raising=False)
    folder = finish("paper", {}).folder
    capsys.readouterr()
    assert main(["check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "rows and 0 skipped, where the lists of refcoco have 10,834" in said and "not on this machine, so only counted: refcoco" in said
    assert "holds pictures of data sets" in said
    assert main(["check", str(folder), "--without-pictures"]) == 1
    said, shown = capsys.readouterr().out, items.read_items(folder, NAME)[1]["shown"]["scene"]
    assert "pictures" not in said and "2 figures drawn" in said
    assert shown["image"] == encode_image(Image.new("RGB", (32, 24), "grey")) and shown["size"] == [32, 24]
