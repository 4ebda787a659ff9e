"""Processes read and write one bank while they are killed: nothing is lost, torn or blocked."""

import pytest
import torch

from analysis.bank.soak import prepare, run, token_of, vector
from uniproj.bank import AdapterBank


@pytest.mark.system
def test_a_short_soak(tmp_path) -> None:
    found = run(prepare(tmp_path, 800, d=1100, processes=4, seed=0), kills_per_second=120)
    # a write in which its process was killed may have happened and is done, or not and is done again
    assert found["operations"] >= 800 and found["kills"] > 2
    assert found["read_blocked_most_seconds"] < 1


@pytest.mark.slow
def test_a_long_soak(tmp_path) -> None:
    found = run(prepare(tmp_path, 100_000, d=2048, processes=4, seed=0), kills_per_second=2)
    assert found["operations"] >= 100_000 and found["kills"] > 20 and found["read_blocked_most_seconds"] < 1


def test_a_torn_vector_and_that_of_another_name_are_found() -> None:
    theta = vector("a", 2**21 + 5, 64)
    assert token_of("a", theta) == 2**21 + 5
    torn = torch.cat([theta[:32], vector("a", 7, 64)[32:]])
    for name, wrong in (("a", torn), ("b", theta)):
        with pytest.raises(AssertionError, match="torn, or another name's"):
            token_of(name, wrong)


def test_a_lost_adapter_is_found(tmp_path, monkeypatch) -> None:
    """A deletion that takes another adapter with it is noticed."""
    delete = AdapterBank.delete

    def forget_another_too(self: AdapterBank, name: str) -> None:
        delete(self, name)
        if own := [n for n in self.names() if n.startswith(name.split("/")[0]) and n != name]:
            delete(self, own[0])

    monkeypatch.setattr(AdapterBank, "delete", forget_another_too)
    with pytest.raises(AssertionError, match=r"lost|must hold the name"):
        run(prepare(tmp_path, 800, d=64, processes=4, seed=0), kills_per_second=120)
