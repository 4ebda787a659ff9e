"""The table: ranked by score, silent about nothing."""

import pandas as pd
import pytest

from experiments import report


@pytest.fixture
def finished() -> pd.DataFrame:
    def run(projection: str, score: float, seed: int = 0, error: float | None = 0.0, stuck: str | None = None) -> dict:
        return {
            "model": "minilm", "task": "vader", "projection": projection, "metric": "accuracy", "score": score,
            "validation": score, "majority": 0.5, "rows": 1566, "lr": 0.01, "r": 4, "trained": 4740, "head": 770,
            "budget_error": error, "isometry_error": None, "step_ratio": 1.0, "step_ratio_low": 0.9,
            "step_ratio_high": 1.1, "adapter_bytes": 19272, "head_bytes": 3080, "train_seed": seed,
            "did_not_train": stuck,
        }  # fmt: skip

    return pd.DataFrame(
        [
            run("lora", 0.78, error=None),
            run("vera", 0.99, stuck="the loss went from 0.692 to 0.694"),
            run("unilora", 0.79),
            run("unilora", 0.81, seed=1),
            run("tied_lora", 0.75, error=0.05),
        ]
    )


def test_projections_are_ranked_by_their_mean_and_a_stuck_one_is_not(finished: pd.DataFrame) -> None:
    table = report.summarise(finished)
    assert list(table["projection"]) == ["unilora", "lora", "tied_lora", "vera"]
    assert list(table["ranked"]) == [True, True, True, False]
    assert table["score"][0] == pytest.approx(0.80) and table["score_sd"][0] == pytest.approx(0.02 / 2**0.5)


def test_the_text_says_what_the_numbers_hide(finished: pd.DataFrame) -> None:
    text = report.as_text(report.summarise(finished), finished, 4740)
    assert "80.0 [67.3, 92.7]" in text and "reference" in text and "not measured" in text
    assert "tied_lora cannot come nearer to the budget than +5.0%" in text
    assert "vera did not train (train_seed 0: the loss went from 0.692 to 0.694) and is not ranked" in text
    assert "1,566 test rows, majority class 50.0 %, 2 seed(s)" in text
