"""What a run needs of a family of models: the base, the inputs, and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from experiments.models.pretrained import BaseModel, target_modules, unloaded
from experiments.tasks import Task
from uniproj.format import adapted_modules, layout_on
from uniproj.layout import LoRALayout


class Family(ABC):
    """One family, bound to a run. `processor` turns rows into tensors and is saved beside checkpoints.

    task_type: PEFT's; auto: the transformers class of its models; selection: the evaluation by which the best
    checkpoint is told; by_length: whether rows have a `length` by which batches are formed; loss_by_item: whether the
    model divides its loss by the number of items it is told, that of all accumulated batches, and not by its own.
    probe_rows: of how many training rows the loss tells whether a run trained; modules_to_save: what PEFT must be
    told to train whole; heads: how the names of modules end that are a fresh head.
    """

    task_type: ClassVar[str | None]
    auto: ClassVar[Any]
    selection: ClassVar[str] = "eval_score"
    higher_is_better: ClassVar[bool] = True
    by_length: ClassVar[bool] = True
    loss_by_item: ClassVar[bool] = False
    probe_rows: ClassVar[int] = 32
    modules_to_save: ClassVar[Sequence[str] | None] = None
    heads: ClassVar[Sequence[str]] = ()

    def __init__(self, base: BaseModel, task: Task, seed: int, max_length: int, max_new_tokens: int):
        self.base, self.task, self.seed = base, task, seed
        self.max_length, self.max_new_tokens = max_length, max_new_tokens

    @property
    @abstractmethod
    def processor(self) -> PreTrainedTokenizerBase | Any:
        """Tokenizer or image processor."""

    @abstractmethod
    def load(self, rows: pd.DataFrame) -> PreTrainedModel:
        """The frozen base for the training rows."""

    @abstractmethod
    def encode(self, rows: pd.DataFrame) -> Dataset:
        """The rows as the model reads them, in their order."""

    @abstractmethod
    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A padded batch."""

    @staticmethod
    @abstractmethod
    def made_up_row(config: PretrainedConfig) -> dict[str, torch.Tensor]:
        """A batch of one row without meaning, with its label, as a model of this configuration reads it."""

    @property
    @abstractmethod
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Scores during training, or None where the loss is what is watched."""

    @abstractmethod
    def predict(self, trainer: Trainer, rows: pd.DataFrame) -> pd.DataFrame:
        """`label` and `prediction` of every row, in its order, and what else a reader of them needs."""


def family_of(name: str) -> type[Family]:
    """The family of a task."""
    module, cls = {
        "text": ("text", "TextClassifier"),
        "image": ("image", "ImageClassifier"),
        "causal": ("causal", "CausalModel"),
    }[name]
    return getattr(import_module(f"experiments.models.{module}"), cls)


def adapted_shapes(family: str, model: str, targets: Sequence[str] | str | None = None) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every module that PEFT adapts, by name, without loading weights."""
    return _adapted_shapes(family, model, targets if isinstance(targets, str | None) else tuple(targets))


def adapted_layout(family: str, model: str, targets: Sequence[str] | str | None, r: int) -> LoRALayout:
    """The layout of these modules at PEFT's rank r, which a convolution parts among its groups."""
    return _adapted_layout(family, model, targets if isinstance(targets, str | None) else tuple(targets), r)


@cache
def _adapted_shapes(family: str, model: str, targets: tuple[str, ...] | str | None) -> dict[str, tuple[int, int]]:
    return adapted_modules(*_adapted(family, model, targets, 1))


@cache
def _adapted_layout(family: str, model: str, targets: tuple[str, ...] | str | None, r: int) -> LoRALayout:
    return layout_on(*_adapted(family, model, targets, r))


def _adapted(
    family: str, model: str, targets: tuple[str, ...] | str | None, r: int
) -> tuple[PreTrainedModel, LoraConfig]:
    base = unloaded(family_of(family).auto, model)
    with torch.device("meta"):
        chosen = targets if isinstance(targets, str) else list(targets or target_modules(model))
        # a classification head is trained whole: PEFT's LoRA leaves it out under this task type, as the tuner does
        lora = LoraConfig(r=r, target_modules=chosen, task_type=family_of(family).task_type)
    return base, lora
