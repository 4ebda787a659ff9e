"""A model whose loss and score are functions of theta_D, so that theta_D can come from any projection."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis.command import at_least, positive
from experiments import models, tasks
from experiments.errors import ExperimentError
from experiments.tasks import HUB, text_columns
from uniproj import LoRALayout
from uniproj.tuner import UniProjConfig, adapter_of

ADAPTER = "default"
HEAD = "modules_to_save"
_TASK = "SEQ_CLS"
Batch = dict[str, Tensor]
Head = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A text classifier and what it is trained on; rank: LoRA's; batch_size: in rows; max_length: in tokens per row."""

    model: str = "minilm"
    task: str = "vader"
    data: str = HUB
    rank: int = 4
    batch_size: int = 16
    max_length: int = 64
    test_size: int = 400
    seed: int = 0


def add_options(options: argparse.ArgumentParser) -> None:
    """The fields of `Setting` that a command offers."""
    options.add_argument("--model", default=Setting.model, help="minilm, a hub id or a local folder")
    options.add_argument("--task", default=Setting.task, help="a task of `experiments.tasks` that classifies text")
    options.add_argument("--data", default=Setting.data, help="hub, or a folder of data")
    options.add_argument("--rank", type=positive, default=Setting.rank)
    options.add_argument("--batch-size", type=positive, default=Setting.batch_size, help="rows per batch")
    options.add_argument("--max-length", type=positive, default=Setting.max_length, help="tokens per row")
    options.add_argument("--test-size", type=positive, default=Setting.test_size, help="rows that are scored")
    options.add_argument("--seed", type=int, default=Setting.seed, help="of P, the head and the order of rows")


def add_training(options: argparse.ArgumentParser, steps: int, purpose: str, vector: str, least: int = 1) -> None:
    """The options of a short training: steps (and at least), what for, and the rate of which vector."""
    options.add_argument("--steps", type=at_least(least), default=steps, help=f"of training{purpose}")
    options.add_argument("--lr", type=float, default=1e-2, help=f"of {vector}, AdamW")


def from_options(args: argparse.Namespace) -> Setting:
    """The setting of these options."""
    return Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})


def named_factors(layout: LoRALayout, theta_D: Tensor) -> dict[str, Tensor]:
    """The factors A and B that theta_D (D,) holds, each under the name of its parameter in PEFT's LoRA."""
    names = [f"base_model.model.{block.module}.lora_{block.factor}.{ADAPTER}.weight" for block in layout.blocks]
    return dict(zip(names, layout.split(theta_D), strict=True))


class Subject:
    """The base model of a setting with PEFT's LoRA layers, whose factors are views of a given theta_D.

    adapter: a folder with a LoRA adapter of PEFT or one of uniproj, whose rank, modules, theta_D and head are taken.

    Raises ExperimentError for a task that does not classify text.
    """

    def __init__(self, setting: Setting, adapter: Path | None = None):
        self.setting, self.task = setting, tasks.get(setting.task, setting.data)
        if self.task.family != "text":
            raise ExperimentError(
                f"subject: the task must classify text, got {setting.task} of family {self.task.family!r}. "
                f"Take one of glue/<name>, vader, or a folder of labelled text."
            )
        self.tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(setting.model)
        self.model: PeftModel = (self._fresh() if adapter is None else self._load(adapter)).eval()
        self.layers = {n: m for n, m in self.model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}
        self.layout = LoRALayout.from_shapes(shapes, {n: layer.r[ADAPTER] for n, layer in self.layers.items()})

    def _base(self) -> PreTrainedModel:
        padding = self.tokenizer.pad_token_id
        return models.load_classifier(models.BaseModel(self.setting.model), self._labels, padding, self.setting.seed)

    def _fresh(self) -> PeftModel:
        targets = models.target_modules(self.setting.model)
        rank = self.setting.rank
        return get_peft_model(
            self._base(), LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type=_TASK)
        )

    def _load(self, folder: Path) -> PeftModel:
        """PEFT's LoRA from a folder; uniproj's theta_D and head are written into LoRA layers of the same shapes."""
        if not (folder / CONFIG_NAME).is_file():
            raise ExperimentError(
                f"subject: {folder} must be a folder with an adapter, got no {CONFIG_NAME} there. Check the path."
            )
        loaded = PeftModel.from_pretrained(self._base(), str(folder))
        config = loaded.peft_config[ADAPTER]
        if not isinstance(config, UniProjConfig):
            return loaded
        shared = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
        options = {key: getattr(config, key) for key in shared}
        model = get_peft_model(self._base(), LoraConfig(**options, task_type=_TASK))
        P, theta_d = adapter_of(loaded, ADAPTER)
        factors = named_factors(P.layout, P(theta_d).detach())
        own = dict(model.named_parameters())
        odd = [name for name, factor in factors.items() if name not in own or own[name].shape != factor.shape]
        if odd:
            raise ExperimentError(
                f"subject: {folder} must adapt linear layers alone, got {odd[0]}. Take another adapter."
            )
        head = {name: p.detach() for name, p in loaded.named_parameters() if HEAD in name}
        model.load_state_dict({**factors, **head}, strict=False)
        return model

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The training rows, shuffled by the seed."""
        rows = self.task.split("train")
        order = list(range(len(rows)))
        random.Random(self.setting.seed).shuffle(order)
        return rows.iloc[order].reset_index(drop=True)

    @property
    def _labels(self) -> int:
        labels = self.rows["label"]
        return 1 if labels.dtype.kind == "f" else int(labels.max()) + 1

    @property
    def base_weights(self) -> dict[str, Tensor]:
        """W (out, in) of every adapted module, for projections that are made of it."""
        return {name: layer.get_base_layer().weight.detach() for name, layer in self.layers.items()}

    @property
    def theta_D(self) -> Tensor:
        """LoRA's own start or what was loaded, (D,) float32."""
        parameters = dict(self.model.named_parameters())
        names = named_factors(self.layout, torch.empty(self.layout.D))
        return torch.cat([parameters[name].detach().flatten() for name in names])

    @property
    def head(self) -> dict[str, Tensor]:
        """The parameters that are trained whole beside the adapter."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if HEAD in n}

    def logits(self, theta_D: Tensor, head: Head, batch: Batch) -> Tensor:
        """The model's logits with the factors in theta_D (D,) and this head; differentiable in both."""
        return self._call(theta_D, head, batch).logits

    def loss(self, theta_D: Tensor, head: Head, batch: Batch) -> Tensor:
        """The mean loss of a batch, without dropout; differentiable in theta_D (D,) and the head."""
        return self._call(theta_D, head, batch).loss

    def _call(self, theta_D: Tensor, head: Head, batch: Batch) -> Any:
        parameters = {**named_factors(self.layout, theta_D.float()), **head}
        return functional_call(self.model, parameters, args=(), kwargs=dict(batch))

    def batch(self, rows: pd.DataFrame) -> Batch:
        """The rows as the model reads them, padded to the longest."""
        texts = [rows[column].tolist() for column in text_columns(rows, "subject")]
        encoded = self.tokenizer(
            *texts, truncation=True, max_length=self.setting.max_length, padding=True, return_tensors="pt"
        )
        kind = torch.float32 if self._labels == 1 else torch.int64
        return {**encoded, "labels": torch.tensor(rows["label"].to_numpy(), dtype=kind)}

    def batches(self, count: int, skip: int = 0) -> list[Batch]:
        """`count` batches of training rows after the first `skip`, from the start again where they end."""
        size = self.setting.batch_size
        starts = [((skip + i) * size) % max(1, len(self.rows) - size + 1) for i in range(count)]
        return [self.batch(self.rows.iloc[start : start + size]) for start in starts]

    def gradient(self, theta_D: Tensor, head: Head, batch: Batch) -> Tensor:
        """dloss / dtheta_D, (D,) float64."""
        theta_D = theta_D.detach().float().requires_grad_()
        return torch.autograd.grad(self.loss(theta_D, head, batch), theta_D)[0].double()

    @torch.no_grad()
    def score(self, theta_D: Tensor, head: Head) -> float:
        """The metric of the task on the first test rows (at most `test_size`), a fraction."""
        rows = self.task.split("test").head(self.setting.test_size)
        size = 4 * self.setting.batch_size
        answers = [
            self.logits(theta_D, head, self.batch(rows.iloc[first : first + size]))
            for first in range(0, len(rows), size)
        ]
        logits = torch.cat(answers)
        predicted = logits[:, 0] if self._labels == 1 else logits.argmax(1)
        scored = pd.DataFrame({"label": rows["label"].to_numpy(), "prediction": predicted.numpy()})
        return self.task.score(scored)
