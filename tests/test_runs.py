"""What a run leaves per item is enough to compute its results again, and whoever changes any of it is found out."""

import numpy as np
import pytest

from kvutils.run import items
from kvutils.store import Frame, read_frame, write_frame
from kvutils.tasks.tables import ScoreTable


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
