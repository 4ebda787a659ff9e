"""IFEval's checks through lm-evaluation-harness, on responses whose verdict is plain to see."""

import pytest

from experiments import tasks
from experiments.tasks.ifeval import follows


def _row(**kwargs) -> dict:
    ((name, values),) = kwargs.items()
    kind, _, check = name.partition("__")
    return {"key": 1, "prompt": "p", "instruction_id_list": [f"{kind}:{check}"], "kwargs": [values]}


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (_row(punctuation__no_comma={}), "No such mark here.", "Well, one here."),
        (_row(change_case__english_lowercase={}), "all small letters in this answer.", "One Capital."),
        (
            _row(length_constraints__number_words={"relation": "at least", "num_words": 4}),
            "one two three four",
            "one two",
        ),
        (_row(length_constraints__number_sentences={"relation": "less than", "num_sentences": 2}), "One.", "A. B. C."),
        (_row(detectable_format__json_format={}), '{"a": 1}', "a: 1"),
        (_row(keywords__existence={"keywords": ["rank", "vector"]}), "a vector of low rank", "a vector"),
        (_row(startend__end_checker={"end_phrase": "That is all."}), "So. That is all.", "That is all. No."),
    ],
)
def test_plain_cases(row: dict, right: str, wrong: str) -> None:
    assert follows(right, row) and not follows(wrong, row)


def test_every_published_prompt_is_checked(shared_data: str) -> None:
    rows = tasks.get("alpaca", shared_data).split("test")
    assert len(rows) == 541
    verdicts = [follows("This answer follows nothing, on purpose.", row) for row in rows.to_dict("records")]
    assert 0 < sum(verdicts) < 54
