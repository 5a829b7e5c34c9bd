"""Verdicts follow their rules, and what is committed follows from the results."""

import json
import re
import subprocess

import pytest

from kvutils.errors import DataError
from kvutils.metrics.statistics import undefined
from kvutils.run import notebook, report
from kvutils.run.cli import main
from kvutils.store import write_json

UP, DOWN, OPEN = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1)


def claim(**rule) -> dict:
    return {"id": "C1", "section": "3", "statement": "It is so.", "paper": 1.5, "unit": "points",
            "notebook": "01_value_flow", "rule": rule}


def measured(*intervals) -> dict:
    return {"value": 0.2, "low": intervals[0][0], "high": intervals[0][1], "n": 10, "unit": "F1",
            "entries": [{"name": f"e{i}", "value": (a + b) / 2, "low": a, "high": b, "n": 5}
                        for i, (a, b) in enumerate(intervals)]}


@pytest.mark.parametrize(("rule", "intervals", "verdict"), [
    ({"kind": "above"}, [UP], "reproduced"),
    ({"kind": "above"}, [DOWN], "not reproduced"),
    ({"kind": "above"}, [OPEN], "inconclusive"),
    ({"kind": "above"}, [(0.0, 0.1)], "inconclusive"),
    ({"kind": "above", "null": 2.0}, [UP], "not reproduced"),
    ({"kind": "above", "null": 2.0}, [(2.1, 2.2)], "reproduced"),
    ({"kind": "entries_above", "at_least": "all"}, [UP, UP], "reproduced"),
    ({"kind": "entries_above", "at_least": "all"}, [UP, OPEN], "inconclusive"),
    ({"kind": "entries_above", "at_least": "all"}, [UP, DOWN], "not reproduced"),
    ({"kind": "entries_above", "at_least": 2}, [UP, DOWN, UP], "reproduced"),
    ({"kind": "entries_above", "at_least": 2}, [UP, DOWN, OPEN], "inconclusive"),
    ({"kind": "entries_above", "at_least": 2}, [UP, DOWN, DOWN], "not reproduced"),
    ({"kind": "entries_above", "at_least": 3}, [UP, UP], "inconclusive"),  # a third was not measured
    ({"kind": "entries_above", "at_least": 3}, [UP, DOWN], "not reproduced"),
    ({"kind": "entries_within", "tolerance": 0.2, "at_least": "all"}, [OPEN, OPEN], "reproduced"),
    ({"kind": "entries_within", "tolerance": 0.2, "at_least": "all"}, [OPEN, UP], "inconclusive"),
    ({"kind": "entries_within", "tolerance": 0.05, "at_least": "all"}, [(-0.01, 0.01), DOWN],
     "not reproduced"),
])
def test_rules(rule, intervals, verdict):
    assert report.judge(claim(**rule), measured(*intervals))[0] == verdict


def test_no_measurement_is_not_run():
    line = report.row(claim(kind="above"), None)
    assert line["verdict"] == "not run"
    assert [line[key] for key in ("ours", "low", "high", "n")] == [None] * 4


def test_ours_counts_the_entries_when_there_is_no_value():
    found = measured(UP, OPEN, UP)
    del found["value"], found["low"], found["high"]
    line = report.row(claim(kind="entries_above", at_least=2), found)
    assert (line["ours"], line["low"], line["verdict"], line["unit"]) == (2, None, "reproduced", "F1")


@pytest.mark.parametrize("broken", [
    {"value": 1.0}, {"value": 1.0, "low": 2.0, "high": 1.0}, {"low": float("nan"), "high": 1.0},
    {"low": 0.0, "high": None}, {"low": 0.0, "high": float("inf")},
])
def test_a_verdict_needs_an_interval(broken):
    with pytest.raises(DataError, match="claim C1.*interval"):
        report.judge(claim(kind="above"), broken)
    with pytest.raises(DataError, match="e1"):
        report.judge(claim(kind="entries_above", at_least="all"),
                     {"entries": [measured(UP)["entries"][0], broken | {"name": "e1"}]})


def test_an_undefined_part_neither_holds_nor_is_against():
    nothing = undefined("e1", "no item shows it")
    for entries, verdict in (([UP], "inconclusive"), ([DOWN], "not reproduced"), ([], "inconclusive")):
        found = {"value": None, "low": None, "high": None, "n": 2, "entries": [*(measured(*entries)["entries"] if entries else []), nothing]}
        line = report.row(claim(kind="entries_above", at_least="all"), found)
        assert line["verdict"] == verdict and line["ours"] == entries.count(UP)
    line = report.row(claim(kind="above"), nothing)  # as the headline
    assert (line["verdict"], line["ours"]) == ("inconclusive", None)
    assert report.interval(nothing) == "not defined: no item shows it"


def test_a_rule_over_entries_needs_entries():
    with pytest.raises(DataError, match="entries"):
        report.judge(claim(kind="entries_above", at_least="all"), {"value": 1.0, "low": 0.5, "high": 2.0})


def test_all_claims_are_there():
    claims = report.load_claims()
    assert [c["id"] for c in claims] == [f"C{i}" for i in range(1, 9)] + [f"X{i}" for i in range(1, 7)]
    assert all(c["rule"]["kind"] == "above" or "at_least" in c["rule"] for c in claims)


def test_a_claim_with_another_rule_is_refused(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(json.dumps({"claims": [claim(kind="looks good")]}))
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
    blocks = "".join(f"<!-- {name}:start -->\nTYPED BY HAND\n<!-- {name}:end -->\n"
                     for name in ("badges", "gallery", "verdicts"))
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


@pytest.mark.parametrize("edit", ["README.md", "claims.json", "results"])
def test_a_stale_file_is_found(root, edit):
    report.write(root)
    folder = root / "data" / "results" / "pocket" / "pocket"
    if edit == "README.md":
        path = root / edit
        path.write_text(path.read_text().replace("**reproduced**", "**not reproduced**", 1))
    elif edit == "claims.json":
        path = folder / edit
        path.write_text(path.read_text().replace('"reproduced"', '"inconclusive"'))
    else:
        results = json.loads((folder / "01_value_flow.json").read_text())
        results["claims"]["C1"]["entries"][0]["low"] = -1.0
        write_json(folder / "01_value_flow.json", results)
    assert main(["report", "--check"]) == 1


def test_a_readme_without_markers_is_an_error(root, capsys):
    (root / "README.md").write_text("# T\n")
    assert main(["report"]) == 2
    assert "<!-- badges:start -->" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [
    (None, "–"), (6, "6"), ("a range", "a range"), (0.12345, "0.123"), (33.333, "33.3"), (1234.5, "1,234"),
    (-0.0004, "0.000")])
def test_numbers(value, shown):
    assert report.number(value) == shown


def as_committed(root, copy):
    """A copy of what the tables are made from and of the tables, where git says that results differ as it has them: they
    are those of a `make replicate` that was interrupted before it wrote the tables."""
    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *arguments, "--", "README.md", "data/results"], capture_output=True)

    changed = git("status", "--porcelain")
    if changed.returncode or not re.search(rb"/\d\d_\w+\.json", changed.stdout):
        return root
    subprocess.run(["tar", "-x", "-C", str(copy)], input=git("archive", "HEAD").stdout, check=True)
    for name in ("notebooks", "pyproject.toml"):
        if (root / name).exists():
            (copy / name).symlink_to(root / name)
    return copy


def test_an_interrupted_run_is_not_taken_for_stale_tables(root, tmp_path_factory):
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x"]
    report.write(root)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "tables and results"]):
        subprocess.run([*git, *command], check=True)
    assert as_committed(root, root) == root
    path = root / "data" / "results" / "pocket" / "pocket" / "01_value_flow.json"
    write_json(path, json.loads(path.read_text()) | {"finding": "Another."})
    copy = tmp_path_factory.mktemp("copy")
    assert report.stale(root) and report.stale(as_committed(root, copy)) == []
    subprocess.run([*git, "commit", "-qam", "results without their tables"], check=True)
    assert report.stale(as_committed(root, copy)), "committed so, they are stale"


def test_the_committed_tables_are_those_of_the_committed_results(tmp_path):
    assert report.stale(as_committed(notebook.ROOT, tmp_path)) == [], "run `make report`"
