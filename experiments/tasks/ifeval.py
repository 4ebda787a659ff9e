"""IFEval's verifiable checks, as lm-evaluation-harness implements them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.errors import ExperimentError


def follows(text: str, row: Mapping[str, Any]) -> bool:
    """Whether a response follows every instruction of its prompt, strictly read.

    row: `key`, `prompt`, `instruction_id_list` and `kwargs` of the data set. Raises ExperimentError where the
    harness or the sentence splitter it needs is not installed.
    """
    return bool(_harness().process_results(row, [text])["prompt_level_strict_acc"])


def _harness() -> Any:
    try:
        from lm_eval.tasks.ifeval import utils
    except (ImportError, LookupError, OSError) as error:
        raise ExperimentError(
            f"ifeval: lm-evaluation-harness and NLTK's punkt_tab must be installed, got {error!r}. "
            "`pip install lm_eval[ifeval]`, and set NLTK_DATA to a folder that holds tokenizers/punkt_tab."
        ) from error
    return utils
