"""HumanEval's tests, run as lm-evaluation-harness runs them: by executing what a model wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from experiments.errors import ExperimentError

# the metric of `evaluate` that the harness uses asks for it too
_ALLOWED = "HF_ALLOW_CODE_EVAL"
# the first block of code of an answer, to its end where it does not close
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def may_run_code() -> bool:
    """Whether this process may execute programs that a model wrote."""
    return os.environ.get(_ALLOWED) == "1"


def check_allowed(who: str) -> None:
    """Raises ExperimentError, in the name of `who`, unless it may."""
    if not may_run_code():
        raise ExperimentError(
            f"{who}: programs that a model wrote are executed here, for which {_ALLOWED} must be 1, got "
            f"{os.environ.get(_ALLOWED)!r}. Set it where they can do no harm, without network and secrets."
        )


def passes(text: str, row: Mapping[str, Any]) -> bool:
    """Whether the program of an answer passes its problem's tests.

    The program is the stub, and behind it the answer's first block of code, or all of an answer without one: that may
    go on with the body or state the function anew. row: `stub`, `test` and `entry_point`.
    Raises ExperimentError as `check_allowed` does, and where the harness or its metric cannot be had.
    """
    check_allowed("code")
    block = _BLOCK.search(text)
    program = f"{row['stub']}\n{block[1] if block else text}"
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    return bool(_harness().pass_at_k(references=[tests], predictions=[[program]], k=[1])["pass@1"])


def _harness() -> Any:
    try:
        from lm_eval.tasks.humaneval import utils
    except (ImportError, OSError, ValueError) as error:
        raise ExperimentError(
            f"code: lm-evaluation-harness and the metric code_eval of `evaluate` must be at hand, got {error!r}. "
            "`pip install lm_eval evaluate`, and connect once, so that the hub's evaluate-metric/code_eval is cached."
        ) from error
    return utils
