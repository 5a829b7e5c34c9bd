"""What `make bench-peers` compares gives the same numbers, and README shows the table that peers.json says."""

import dataclasses
from pathlib import Path

import numpy as np
import peers
import pytest
from PIL import Image
from tiny_models import tiny_onevision

from kvutils.run.report import fill
from kvutils.store import read_json

ALONE = [(task, way) for task, ways in peers.TASKS.items() for way, each in ways.items() if not each.wrap and way != "kvutils"]


@pytest.fixture(scope="module")
def case() -> peers.Case:
    """Three tiles and a base view of a random model, four questions."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)) for _ in range(2)]
    return peers.make_case(tiny_onevision(), photos, ["is a fish red ?", "what colour is this car ?", "left", "is this a fish on the right ?"])


@pytest.mark.parametrize(("task", "way"), ALONE)
def test_the_ways_agree(case, task, way):
    expected = peers.TASKS[task]["kvutils"].run(case)
    found = peers.difference(peers.TASKS[task][way].run(case), expected)
    assert found == "4 of 4 the same" if task == "18 questions" else found < 1e-5


def test_a_block_and_another_question_are_noticed(case):
    open_case = dataclasses.replace(case, mask=case.mask & False)
    assert peers.difference(peers.block_hooks(case), peers.block_hooks(open_case)) > 1e-3
    assert peers.difference(["a", "b"], ["a", "c"]) == "1 of 2 the same"
    first, second = peers.keys_kvutils(case)
    assert peers.difference([first], [second]) > 1e-3


def test_what_a_peer_says_is_kept_and_the_others_are_measured(case, monkeypatch):
    def wrap(model, tokenizer):
        raise TypeError("no such model")

    monkeypatch.setattr(peers, "load", lambda name: case)
    monkeypatch.setitem(peers.TASKS["blocked keys"], "nnsight", dataclasses.replace(peers.TASKS["blocked keys"]["nnsight"], wrap=wrap))
    found = peers.measure("blocked keys", "pocket", list(peers.TASKS["blocked keys"]))
    assert found["nnsight"] == {"message": "TypeError: no such model"} and found["kvutils"]["difference"] == 0
    assert found["hooks, additive mask"]["difference"] < 1e-5 and found["hooks, additive mask"]["seconds"] > 0


def test_readme_shows_what_was_measured_of_this_code():
    found, readme = read_json(peers.RESULTS), peers.README.read_text(encoding="utf-8")
    assert fill(readme, "peers", peers.table(found)) == readme
    assert {task: {way: each["lines"] for way, each in ways.items()} for task, ways in found["tasks"].items()} == {
        task: {way: each.lines for way, each in ways.items()} for task, ways in peers.TASKS.items()}  # fmt: skip
    pins = [line.split("==") for line in Path(peers.FOLDER / "requirements-peers.txt").read_text().splitlines() if "==" in line]
    assert len(pins) == 2 and {name: found["versions"][name] for name, _ in pins} == dict(pins)
