"""Verdicts follow their rules, and what is committed follows from the results."""

import json
import re
import subprocess

import numpy as np
import pytest

from kvutils.errors import DataError
from kvutils.metrics.statistics import Interval, undefined
from kvutils.run import notebook, report
from kvutils.run.cli import main
from kvutils.store import write_json

UP, DOWN, OPEN = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1)
ABOVE, ALL, TWO, THREE = {"kind": "above"}, *({"kind": "entries_above", "at_least": least} for least in ("all", 2, 3))
WITHIN = {"kind": "entries_within", "tolerance": 0.2, "at_least": "all"}


def claim(rule) -> dict:
    return {"id": "C1", "section": "3", "statement": "It is so.", "paper": 1.5, "unit": "points", "notebook": "01_value_flow", "rule": rule}


def measured(*intervals) -> dict:
    return {"value": 0.2, "low": intervals[0][0], "high": intervals[0][1], "n": 10, "unit": "F1",
            "entries": [{"name": f"e{i}", "value": (a + b) / 2, "low": a, "high": b, "n": 5} for i, (a, b) in enumerate(intervals)]}


@pytest.mark.parametrize(("rule", "intervals", "verdict"), [
    (ABOVE, [UP], "reproduced"), (ABOVE, [DOWN], "not reproduced"), (ABOVE, [OPEN], "inconclusive"), (ABOVE, [(0.0, 0.1)], "inconclusive"),
    (ABOVE | {"null": 2.0}, [UP], "not reproduced"), (ABOVE | {"null": 2.0}, [(2.1, 2.2)], "reproduced"),
    (ALL, [UP, UP], "reproduced"), (ALL, [UP, OPEN], "inconclusive"), (ALL, [UP, DOWN], "not reproduced"),
    (TWO, [UP, DOWN, UP], "reproduced"), (TWO, [UP, DOWN, OPEN], "inconclusive"), (TWO, [UP, DOWN, DOWN], "not reproduced"),
    (THREE, [UP, UP], "inconclusive"), (THREE, [UP, DOWN], "not reproduced"),  # a third was not measured
    (WITHIN, [OPEN, OPEN], "reproduced"), (WITHIN, [OPEN, UP], "inconclusive"),
    (WITHIN | {"tolerance": 0.05}, [(-0.01, 0.01), DOWN], "not reproduced"),
])
def test_rules(rule, intervals, verdict):
    assert report.judge(claim(rule), measured(*intervals))[0] == verdict


def test_lines_without_a_value():
    line = report.row(claim(ABOVE), None)
    assert line["verdict"] == "not run" and {line[name] for name in ("ours", "low", "high", "n")} == {None}
    found = measured(UP, OPEN, UP) | {"value": None, "low": None, "high": None}
    line = report.row(claim(TWO), found)  # then ours counts the entries that hold
    assert (line["ours"], line["low"], line["verdict"], line["unit"]) == (2, None, "reproduced", "F1")
    assert report.row(claim(TWO), found | {"reason": "no answer names an option"})["ours"] is None  # no count in "% of items"


@pytest.mark.parametrize("broken", [
    {"value": 1.0}, {"low": 2.0, "high": 1.0}, {"low": float("nan"), "high": 1.0}, {"low": 0.0, "high": None}, {"low": 0.0, "high": float("inf")}])
def test_a_verdict_needs_an_interval(broken):
    with pytest.raises(DataError, match="claim C1.*interval"):
        report.judge(claim(ABOVE), broken)
    with pytest.raises(DataError, match="e1"):
        report.judge(claim(ALL), {"entries": [measured(UP)["entries"][0], broken | {"name": "e1"}]})
    with pytest.raises(DataError, match="entries"):
        report.judge(claim(ALL), measured(UP) | {"entries": []})


def test_an_undefined_part_neither_holds_nor_is_against():
    nothing = undefined("e1", "no item shows it")
    for entries, verdict in (([UP], "inconclusive"), ([DOWN], "not reproduced"), ([], "inconclusive")):
        line = report.row(claim(ALL), {"value": None, "entries": [*(measured(*entries)["entries"] if entries else []), nothing]})
        assert line["verdict"] == verdict and line["ours"] == entries.count(UP)
    bare = Interval(150.0, np.nan, np.nan, 28).claim("total of MME, one image of each subtask")  # no resample has all of them
    assert report.judge(claim(ALL), {"entries": [bare]})[0] == "inconclusive" and "too few independent units" in report.interval(bare)
    line = report.row(claim(ABOVE), nothing)  # as the headline
    assert (line["verdict"], line["ours"]) == ("inconclusive", None)
    assert report.interval(nothing) == "not defined: no item shows it"


def test_all_claims_are_there():
    claims = report.load_claims()
    assert [c["id"] for c in claims] == [f"C{i}" for i in range(1, 9)] + [f"X{i}" for i in range(1, 7)]
    assert all(c["rule"]["kind"] == "above" or "at_least" in c["rule"] for c in claims)


def test_a_claim_with_another_rule_is_refused(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(json.dumps({"claims": [claim({"kind": "looks good"})]}))
    with pytest.raises(DataError, match="C1"):
        report.load_claims(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one result and a README."""
    monkeypatch.setenv("KVUTILS_OUT", str(tmp_path))
    run = notebook.Run("01_value_flow")
    found = measured(*[UP] * 6) | {"n": 60}
    write_json(run.results, {"claims": {"C1": found}, "finding": "It works.", "choices": {"regularisation": "0.1"}})
    write_json(run.folder / "provenance" / "01_value_flow.json", {"revision": "abc", "machine": {"device": "cpu (mine)"}})
    (tmp_path / "pyproject.toml").write_text("[tool.kvutils]\nrepository = ''\n")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    blocks = "".join(f"<!-- {name}:start -->\nTYPED BY HAND\n<!-- {name}:end -->\n" for name in ("badges", "gallery", "verdicts"))
    (tmp_path / "README.md").write_text(f"# T\n{blocks}")
    return tmp_path


def test_everything_is_made_from_the_results(root, capsys):
    assert main(["report", "--check"]) == 1
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0
    folder = root / "data" / "results" / "pocket" / "pocket"
    lines = json.loads((folder / "claims.json").read_text())
    assert len(lines) == 14
    assert lines[0] == {"id": "C1", "verdict": "reproduced", "paper": 6, "ours": 0.2, "low": 0.1, "high": 0.3,
                        "n": 60, "unit": "F1", "notebook": "01_value_flow"}
    readme = (root / "README.md").read_text()
    assert "TYPED" not in readme and "**reproduced**" in readme and "0.200 [0.100, 0.300]" in readme
    assert "It works." in readme and "figures/01_value_flow.png" in readme
    text = (folder / "REPORT.md").read_text()
    assert "| e5 | 0.200 [0.100, 0.300] | 5 |" in text and "- regularisation: 0.1" in text
    assert "| revision | abc |" in text and "mine" not in text, "what differs between machines has no place in it"
    assert "written: README.md" in capsys.readouterr().out


@pytest.mark.parametrize(("edit", "old", "new"), [
    ("README.md", "**reproduced**", "**not reproduced**"), ("data/results/pocket/pocket/claims.json", '"reproduced"', '"inconclusive"'),
    ("data/results/pocket/pocket/01_value_flow.json", '"low": 0.1', '"low": -1.0')])
def test_a_stale_file_is_found(root, edit, old, new):
    report.write(root)
    text = (root / edit).read_text()
    assert old in text
    (root / edit).write_text(text.replace(old, new, 1))
    assert main(["report", "--check"]) == 1


def test_a_readme_without_markers_is_an_error(root, capsys):
    (root / "README.md").write_text("# T\n")
    assert main(["report"]) == 2
    assert "<!-- badges:start -->" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [
    (None, "–"), (6, "6"), ("a range", "a range"), (0.12345, "0.123"), (33.333, "33.3"), (1234.5, "1,234"), (-0.0004, "0.000")])
def test_numbers(value, shown):
    assert report.number(value) == shown


def test_a_prompt_stays_in_its_cell_of_a_table():
    table = report.markdown_table(("what", "found"), [("prompt", "<|im_start|>user <image>\nIs it?")])
    assert table.splitlines()[2] == r"| prompt | &lt;\|im_start\|>user &lt;image><br>Is it? |"


def test_the_committed_tables_are_those_of_the_committed_results():
    stale = report.stale(notebook.ROOT)
    status = subprocess.run(["git", "-C", str(notebook.ROOT), "status", "--porcelain", "data/results"], capture_output=True, text=True)
    if stale and re.search(r"/\d\d_\w+\.json", status.stdout):
        pytest.skip("a `make replicate` was interrupted between its results and the tables")
    assert stale == [], "run `make report`"
