"""Learning rates beyond the grid: where the best lies at its edge, tuning goes on outwards, by one rule."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.files import read_json, write_json
from experiments.records.reading import CHOICE
from experiments.runs.folder import CONFIG, RESULT
from experiments.sweeps import protocol
from experiments.sweeps.file import read
from experiments.sweeps.sweep import Sweep

# scores of a trial by projection and rate; None where it diverges
Scores = Mapping[str, Mapping[float, float | None]]


def _trainer(scores: Scores, trained: list[tuple[str, float]], most: int | None = None) -> protocol.Train:
    """Writes the result of every trial that has none; after `most` of them, Ctrl-C."""

    def train(folders: Sequence[Path]) -> dict[Path, str]:
        for folder in (folder for folder in folders if not (folder / RESULT).exists()):
            if len(trained) == most:
                raise KeyboardInterrupt
            config = read_json(folder / CONFIG)
            score = scores[config["projection"]][config["lr"]]
            stuck = "it diverged" if score is None else None
            result = {"config": config, "metric": "accuracy", "score": score, "did_not_train": stuck}
            more = {"validation": score, "validation_best": score, "higher_is_better": True, "cost": {"seconds": 1.0}}
            write_json(folder / RESULT, {**result, **more})
            trained.append((config["projection"], config["lr"]))
        return {}

    return train


def _never(folders: Sequence[Path]) -> dict[Path, str]:
    raise AssertionError("the choice was locked")


@pytest.fixture
def sweep(file: Path) -> Sweep:
    return read(file, ["tune.lr=[0.01,0.05]"])


def _choices(runs: Path, sweep: Sweep) -> dict[str, dict[str, Any]]:
    """choice.json by projection."""
    found = read_json(protocol.sweep_folder(runs, sweep) / CHOICE)["choices"]
    return {choice["cell"]["projection"]: choice for choice in found}


BEYOND: Scores = {
    # the best lies two rates above the grid for one, two below for the other
    "lora": {0.01: 0.1, 0.05: 0.2, 0.1: 0.3, 0.3: 0.4, 1.0: 0.3},
    "unilora": {0.01: 0.5, 0.05: 0.2, 0.003: 0.6, 0.001: 0.7, 0.0003: 0.6},
}
# all that is tried beyond a grid from 0.01 to 0.03 or 0.05
BOTH_SIDES = [0.003, 0.001, 0.0003, 0.0001, 0.1, 0.3, 1.0, 3.0]


def test_the_best_rate_is_followed_beyond_the_edge_of_the_grid(sweep: Sweep, runs: Path, monkeypatch) -> None:
    monkeypatch.setattr(tasks.Task, "split", None)  # rows are for the trials alone
    trained: list[tuple[str, float]] = []
    chosen = list(protocol.tune(sweep, runs, _trainer(BEYOND, trained)).values())
    assert chosen == [{"lr": 0.3}, {"lr": 0.001}]
    assert sorted(trained) == sorted((name, rate) for name, own in BEYOND.items() for rate in own)
    choices = _choices(runs, sweep)
    assert choices["lora"]["beyond"] == [0.1, 0.3, 1.0] and choices["unilora"]["beyond"] == [0.003, 0.001, 0.0003]
    assert [choice["at_edge"] for choice in choices.values()] == [[], []]
    assert [trial["lr"] for trial in choices["lora"]["trials"]] == [0.01, 0.05, 0.1, 0.3, 1.0]
    assert list(protocol.tune(sweep, runs, _never).values()) == chosen


def test_a_best_rate_within_the_grid_is_not_followed(sweep: Sweep, file: Path, runs: Path) -> None:
    inside = read(file, ["tune.lr=[0.01,0.03,0.1]", "axes.projection=[lora]"])
    trained: list[tuple[str, float]] = []
    (chosen,) = protocol.tune(inside, runs, _trainer({"lora": {0.01: 0.1, 0.03: 0.2, 0.1: 0.1}}, trained)).values()
    assert chosen == {"lr": 0.03} and len(trained) == 3 and _choices(runs, inside)["lora"]["beyond"] == []


@pytest.mark.parametrize(
    ("scores", "tried", "best", "at_edge"),
    [
        # what guesses the most frequent label at every rate of the grid: it learns below
        ({0.01: 0.6, 0.03: 0.6, 0.003: 0.6, 0.001: 0.7, 0.0003: 0.6}, [0.003, 0.001, 0.0003], 0.001, []),
        # as good at an edge as within
        ({0.01: 0.7, 0.03: 0.7, 0.003: 0.6, 0.1: 0.6}, [0.003, 0.1], 0.01, []),
        ({0.01: 0.6, 0.03: 0.7, 0.1: 0.7, 0.3: 0.8, 1.0: 0.7}, [0.1, 0.3, 1.0], 0.3, []),
        (dict.fromkeys([0.01, 0.03, *BOTH_SIDES], 0.6), BOTH_SIDES, 0.01, ["lr"]),
    ],
)
def test_rates_as_good_as_the_best_are_followed_too(
    scores: dict[float, float], tried: list[float], best: float, at_edge: list[str], file: Path, runs: Path
) -> None:
    one = read(file, ["tune.lr=[0.01,0.03]", "axes.projection=[lora]"])
    (chosen,) = protocol.tune(one, runs, _trainer({"lora": scores}, [])).values()
    choice = _choices(runs, one)["lora"]
    assert (chosen, choice["beyond"], choice["at_edge"]) == ({"lr": best}, tried, at_edge)
    assert list(protocol.tune(one, runs, _never).values()) == [chosen]


def test_a_rate_beyond_the_edge_that_diverges_ends_the_search(file: Path, runs: Path) -> None:
    one = read(file, ["tune.lr=[0.01,0.05]", "axes.projection=[lora]"])
    scores: Scores = {"lora": {0.01: 0.1, 0.05: 0.2, 0.1: 0.3, 0.3: None}}
    (chosen,) = protocol.tune(one, runs, _trainer(scores, [])).values()
    choice = _choices(runs, one)["lora"]
    assert chosen == {"lr": 0.1} and choice["beyond"] == [0.1, 0.3] and choice["at_edge"] == []
    assert choice["trials"][-1]["did_not_train"] == "it diverged"


def test_the_search_is_bounded_and_says_that_it_ended_at_the_edge(file: Path, runs: Path) -> None:
    one = read(file, ["tune.lr=[0.01,0.05]", "axes.projection=[lora]"])
    rates = [0.01, 0.05, 0.1, 0.3, 1.0, 3.0]
    (chosen,) = protocol.tune(one, runs, _trainer({"lora": {r: 0.1 * k for k, r in enumerate(rates)}}, [])).values()
    choice = _choices(runs, one)["lora"]
    assert chosen == {"lr": 3.0} and choice["beyond"] == rates[2:] and choice["at_edge"] == ["lr"]


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.001, [0.003, 0.001, 0.0003]),  # full fine-tuning on a grid for LoRA
        (1.0, BOTH_SIDES),
        (None, BOTH_SIDES),
    ],
)
def test_where_nothing_trained_the_rates_below_are_tried_and_then_those_above(
    best: float | None, tried: list[float], file: Path, runs: Path
) -> None:
    one, trained = read(file, ["tune.lr=[0.01,0.05]", "axes.projection=[lora]"]), list[tuple[str, float]]()
    scores = {"lora": {rate: 0.5 if rate == best else None for rate in [0.01, 0.05, *tried]}}
    (chosen,) = protocol.tune(one, runs, _trainer(scores, trained)).values()
    assert [rate for _, rate in trained] == [0.01, 0.05, *tried]
    assert (best is None or chosen == {"lr": best}) and _choices(runs, one)["lora"]["trained"] == (best is not None)
    assert list(protocol.tune(one, runs, _never).values()) == [chosen]


def test_every_tuned_setting_is_crossed_with_a_rate_beyond(file: Path, runs: Path) -> None:
    crossed = read(file, ["tune.lr=[0.01,0.05]", "+tune.alpha=[4,8]", "axes.projection=[lora]"])
    trained: list[tuple[str, float]] = []
    protocol.tune(crossed, runs, _trainer({"lora": {0.01: 0.1, 0.05: 0.3, 0.1: 0.2}}, trained))
    assert [rate for _, rate in trained] == [0.01, 0.01, 0.05, 0.05, 0.1, 0.1]


@pytest.mark.parametrize("most", [3, 8])
def test_a_search_that_is_interrupted_goes_on_where_it_was(most: int, sweep: Sweep, runs: Path, tmp_path: Path) -> None:
    whole: list[tuple[str, float]] = []
    expected = protocol.tune(sweep, tmp_path / "whole", _trainer(BEYOND, whole))
    first: list[tuple[str, float]] = []
    with pytest.raises(KeyboardInterrupt):
        protocol.tune(sweep, runs, _trainer(BEYOND, first, most))
    assert not (protocol.sweep_folder(runs, sweep) / CHOICE).exists()
    second: list[tuple[str, float]] = []
    assert protocol.tune(sweep, runs, _trainer(BEYOND, second)) == expected
    assert sorted(first + second) == sorted(whole) and len(first) == most
    assert _choices(runs, sweep) == _choices(tmp_path / "whole", sweep)


def _older(choice: dict[str, Any]) -> None:
    """As choice.json was before rates beyond the grid were tried, whose trials had their best at the edge."""
    del choice["most_beyond"]
    for cell, rate, edge in zip(choice["choices"], (0.05, 0.01), (["lr"], ["lr"]), strict=True):
        del cell["beyond"]
        cell |= {"chosen": {"lr": rate}, "at_edge": edge, "trials": cell["trials"][:2]}


def _without_the_last(choice: dict[str, Any]) -> None:
    choice["choices"][0]["trials"].pop()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_older, None),
        (_without_the_last, "must hold of the cell {'projection': 'lora'} what its trials say, trials"),
        (lambda choice: choice.update(most_beyond=0), "what its trials say, chosen {'lr': 0.05}, got {'lr': 0.3}"),
        (lambda choice: choice["choices"][0].update(beyond="all"), "beyond must be a list of values, got 'all'"),
    ],
    ids=["an older one", "a trial less", "another bound", "no list"],
)
def test_a_locked_choice_is_believed_as_its_trials_make_it(
    edit: Callable[[dict[str, Any]], None], message: str | None, sweep: Sweep, runs: Path
) -> None:
    protocol.tune(sweep, runs, _trainer(BEYOND, []))
    path = protocol.sweep_folder(runs, sweep) / CHOICE
    choice = json.loads(path.read_text())
    edit(choice)
    path.write_text(json.dumps(choice))
    if message is None:
        assert list(protocol.tune(sweep, runs, _never).values()) == [{"lr": 0.05}, {"lr": 0.01}]
        return
    with pytest.raises(ExperimentError) as raised:
        protocol.tune(sweep, runs, _never)
    assert message in str(raised.value)


def test_the_committed_choices_are_read_as_they_were_locked() -> None:
    for path in sorted((Path(__file__).parents[3] / "results" / "sweeps").glob(f"*/{CHOICE}")):
        choice = read_json(path)
        protocol.check_record("", protocol.Locked, choice)
        for each in choice["choices"]:
            seeds = {trial["train_seed"] for trial in each["trials"]}
            beyond = len(each.get("beyond", ())) * len(seeds)
            assert len(each["trials"]) == choice["trials_per_cell"] + beyond, (path, each["cell"])
