"""Causal language models: trained on completions, scored by what they generate after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from experiments.models.family import Family
from experiments.models.pretrained import load_causal, load_tokenizer
from experiments.processes import is_sharded


class CausalModel(Family):
    """Supervised fine-tuning: the loss is read off the completion only.

    The prompt is the tokenizer's chat template where it has one, else the plain text and a line break. The best
    checkpoint is the one of the lowest validation loss, since generating is dear.
    """

    task_type = "CAUSAL_LM"
    auto = AutoModelForCausalLM
    selection = "eval_loss"
    higher_is_better = False
    loss_by_item = True
    metrics = None

    @cached_property
    def processor(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.base.name)

    def load(self, rows: pd.DataFrame) -> PreTrainedModel:
        return load_causal(self.base)

    def encode(self, rows: pd.DataFrame) -> Dataset:
        encoded = [self._example(p, c) for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
        return Dataset.from_list(encoded)

    def _example(self, prompt: str, completion: str) -> dict[str, Any]:
        before = self.processor(self.prompt(prompt), add_special_tokens=False)["input_ids"]
        after = self.processor(completion + self.processor.eos_token, add_special_tokens=False)["input_ids"]
        ids = (before + after)[: self.max_length]
        labels = ([-100] * len(before) + after)[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "length": len(ids)}

    def prompt(self, text: str) -> str:
        """The text up to where the model begins."""
        return self.dialogue([text], [])

    def dialogue(self, asked: Sequence[str], answered: Sequence[str]) -> str:
        """A conversation up to where the model answers the last question."""
        if self.processor.chat_template is None:
            spoken = [line for pair in zip(asked, answered, strict=False) for line in pair]
            return (self.processor.bos_token or "") + "".join(f"{line}\n" for line in [*spoken, asked[-1]])
        turns = [{"role": "user", "content": asked[0]}]
        for answer, question in zip(answered, asked[1:], strict=True):
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return DataCollatorForSeq2Seq(self.processor, padding=True)(features)

    @staticmethod
    def made_up_row(config: PretrainedConfig) -> dict[str, torch.Tensor]:
        ids = torch.ones(1, 4, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    def predict(self, trainer: Trainer, rows: pd.DataFrame) -> pd.DataFrame:
        """`prediction` is 1 where the generated `text` is right, `label` is 1: accuracy is then their agreement."""
        assert self.task.judge is not None
        texts = self.generate(trainer, [self.prompt(prompt) for prompt in rows["prompt"]])
        right = [int(self.task.judge(text, row)) for text, row in zip(texts, rows.to_dict("records"), strict=True)]
        kept = rows[["group"]] if "group" in rows else pd.DataFrame(index=rows.index)
        return kept.assign(label=1, prediction=right, text=texts)

    def generate(self, trainer: Trainer, prompts: Sequence[str]) -> list[str]:
        """The greedy continuation of every prompt, without the prompt; prompts of one batch are of like length."""
        world, rank = trainer.args.world_size, trainer.args.process_index
        by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        # as many on each process, some twice: a sharded base needs all of them in every batch
        order = list(islice(cycle(by_length), world * -(-len(prompts) // world)))[rank::world]
        model, size = trainer.model.eval(), trainer.args.per_device_eval_batch_size
        found: list[tuple[int, str]] = []
        for start in tqdm(range(0, len(order), size), desc="generating", disable=rank > 0 or None):
            chosen = order[start : start + size]
            found += zip(chosen, self._continued(model, [prompts[i] for i in chosen]), strict=True)
        everywhere = dict(gather_object(found) if world > 1 else found)
        return [everywhere[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _continued(self, model: PreTrainedModel, prompts: list[str]) -> list[str]:
        inputs = self.processor(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            synced_gpus=is_sharded(),
            pad_token_id=self.processor.pad_token_id,
        )
        return self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
