"""Records in the files of PEFT's benchmark (huggingface/peft, method_comparison/MetaMathQA): one JSON object per run.

run_info says what was asked, train_info what came of it, meta_info where.
"""

from experiments.records.method_comparison.reading import read
from experiments.records.method_comparison.writing import write

__all__ = ["read", "write"]
