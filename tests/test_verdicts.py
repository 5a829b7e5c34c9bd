"""The rules say what is true: claims on simulated measurements, through the code that the notebooks run.

Here a few runs of what is quick; benchmarks/VERDICTS.md has every claim at the paper's size and the pocket profile's.
"""

import pytest
import simulate_verdicts as simulate

QUICK = {"C3": 40, "C7b": 25, "X1": 40, "X3": 25, "X6": 40, "C8": 8, "X5": 15, "C2b": 6, "C4": 6, "C5": 6, "C6": 4}  # claim -> runs


@pytest.mark.parametrize("name", QUICK)
def test_presence_absence_and_what_cannot_appear(name, monkeypatch):
    monkeypatch.setattr(simulate, "BOOT", 100)
    for truth in simulate.SIMULATIONS[name]():
        size = simulate.PAPER if name in ("C3", "X6") else simulate.POCKET  # where so few models and pictures tell nothing
        shares, detectable = simulate.rates(name, size, truth, QUICK[name])
        assert sum(shares.values()) == pytest.approx(1)
        assert simulate.misses(name, truth, shares, detectable, QUICK[name]) == "", truth.name


def test_the_measure_itself():
    claim, (effect, none, *_) = "C7b", simulate.SIMULATIONS["C7b"]()
    for truth, shares, detectable, said in (
        (effect, {"present": 0.9, "cannot tell": 0.1}, 1.0, ""), (effect, {"present": 0.3, "cannot tell": 0.7}, 1.0, "said in 30%"),
        (effect, {"cannot tell": 1.0}, 9.0, ""), (none, {"absent": 1.0}, 1.0, ""), (none, {"cannot tell": 1.0}, 9.0, ""),
        (none, {"absent": 0.8, "present": 0.2}, 1.0, "an effect that is not there in 20%")):  # fmt: skip
        assert simulate.misses(claim, truth, shares, detectable, 100) == said


def test_every_claim_is_simulated():
    assert list(simulate.SIMULATIONS) == list(simulate.claims())
