"""From text to padded batches."""

from __future__ import annotations

import random

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from experiments.tasks import text_columns


def draw(rows: pd.DataFrame, size: int, seed: int) -> pd.DataFrame:
    """The first `size` rows of a seeded shuffle; all rows where there are fewer."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows.iloc[order[:size]]


def encode(rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids of at most `max_length`, `label` and `length` of every row, in the order of `rows`."""
    texts = [rows[column].tolist() for column in text_columns(rows, "data")]
    encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    return Dataset.from_dict(
        {**encoded, "label": rows["label"].tolist(), "length": [len(ids) for ids in encoded["input_ids"]]}
    )


def by_length(data: Dataset) -> Dataset:
    """The same rows, longest first: batches of scoring then hold little padding."""
    return data.sort("length", reverse=True)
