"""HumanEval's tests, through lm-evaluation-harness: who may run them, and what of an answer is run."""

import sys
from types import SimpleNamespace

import evaluate
import pandas as pd
import pytest

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.tasks.humaneval import passes

STUB = '''from typing import List


def total(of: List[int]) -> int:
    """Their sum.
    >>> total([1, 2])
    3
    """
'''
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n"
ROW = {"stub": STUB, "test": TEST, "entry_point": "total"}
RIGHT = "    return sum(of)\n"
MODULES = ("lm_eval.tasks.humaneval.utils", "lm_eval.tasks.humaneval")


def _compute(references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[dict, dict]:
    """What the hub's metric does for one problem and one answer; every program of this file is written in it."""
    try:
        exec(f"{predictions[0][0]}\n{references[0]}", {})
    except Exception:
        return {"pass@1": 0.0}, {}
    return {"pass@1": 1.0}, {}


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch):
    """A machine that may run code, with a metric in place of the hub's."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr(evaluate, "load", lambda name: SimpleNamespace(compute=_compute))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (f"```python\n{STUB}{RIGHT}```", True),
        ("Here it is:\n```py\ndef total(of):\n    return sum(of)\n```\nIt sums.\n```\n1 / 0\n```", True),
        (RIGHT, True),
        (f"```python\n{STUB}{RIGHT}", True),
        ("```python\ndef total(of):\n    return len(of)\n```", False),
        ("I cannot.", False),
        ("", False),
    ],
    ids=["whole", "anew, between words", "body", "not closed", "wrong", "words", "none"],
)
def test_the_first_block_is_run_behind_the_stub(answer: str, is_right: bool, allowed) -> None:
    assert passes(answer, ROW) is is_right


def test_nothing_is_run_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ExperimentError, match=r"^code: .* HF_ALLOW_CODE_EVAL must be 1, got None"):
        passes(RIGHT, ROW)


def test_the_metric_may_be_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise FileNotFoundError(name)

    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr(evaluate, "load", load)
    with pytest.raises(ExperimentError, match=r"code_eval of `evaluate` must be at hand, got FileNotFoundError"):
        passes(RIGHT, ROW)


def test_the_published_solution_is_a_right_completion(tmp_path, allowed) -> None:
    (tmp_path / "humaneval").mkdir()
    problem = {"task_id": "0", "prompt": STUB, "canonical_solution": RIGHT, "test": TEST, "entry_point": "total"}
    pd.DataFrame([problem]).to_json(tmp_path / "humaneval" / "test.jsonl", orient="records", lines=True)
    task = tasks.get("code", str(tmp_path))
    row = task.split("test").iloc[0].to_dict()
    assert task.judge is not None and task.judge(row["completion"], row) and STUB in row["prompt"]


def test_pefts_benchmark_asks_as_peft_does_and_leaves_long_rows_out(tmp_path) -> None:
    """The template of its default_training_params.json, and its limit of 1,300 characters of f"{query} {response}"."""
    (tmp_path / "metamathqa").mkdir()
    lengths = [40] * 20 + [1300, 1301]
    rows = [{"query": f"What is {i}?", "response": "."} for i in range(len(lengths))]
    for row, length in zip(rows, lengths, strict=True):
        row["response"] = "The answer is: 7".rjust(length - len(row["query"]) - 1)
    pd.DataFrame(rows).to_json(tmp_path / "metamathqa" / "train.jsonl", orient="records", lines=True)
    task = tasks.get("metamath/gsm8k", str(tmp_path))
    kept = pd.concat([task.split("train"), task.split("validation")])
    asked = {f"Question: What is {i}? Think step by step.\nAnswer:" for i in range(21)}
    assert set(kept["prompt"]) == asked and set(kept["answer"]) == {"7"}
