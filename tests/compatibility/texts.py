"""A tokenizer of single letters, and rows of text of every shape that TRL's trainers take."""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_WORDS = [f"{letter}{digit}" for letter in "abcdefghij" for digit in ("", *"01234")]
_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """60 words, by spaces, and four special tokens: 64 in all."""
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *_WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=_TEMPLATE, **special)


def plain() -> Dataset:
    return Dataset.from_dict({"text": ["a b c d e f", "g h i j a b", "c1 d2 e3 f4", "a0 b1 c2 d3"] * 2})


def preferences() -> Dataset:
    return Dataset.from_dict({
        "prompt": ["a b", "c d", "e f", "g h"] * 2,
        "chosen": [" c1 d1 e1", " e1 f1", " g1 h1 i1", " i1 j1"] * 2,
        "rejected": [" c2 d2", " e2 f2 g2", " g2 h2", " i2 j2 a2"] * 2,
    })  # fmt: skip


def labelled() -> Dataset:
    rows = preferences()
    return Dataset.from_dict({
        "prompt": rows["prompt"][:] * 2,
        "completion": [*rows["chosen"], *rows["rejected"]],
        "label": [True] * len(rows) + [False] * len(rows),
    })  # fmt: skip


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"] * 2})
