"""A hundred users of one bank in vLLM: the tokens of `mixed`, and what it takes beside `mixed` and PEFT's adapters.

`python -m pytest tests/engines -m slow -k many_users --engines results/engines` writes many_users.json and .md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from analysis.bank.report import table
from analysis.overhead.workloads import greedy
from experiments import models
from experiments.files import write_json, write_text
from experiments.provenance import provenance
from experiments.timing import ratio, take_turns
from tests.engines.engine import ENGINES
from tests.engines.server import Server, serving
from tests.engines.subject import MODULES, NEW_TOKENS, PROMPTS, Subject
from uniproj.bank import AdapterBank, mixed
from uniproj.tuner import adapter_of

USERS = [f"user-{k}" for k in range(100)]
# all of them in one batch, as in `mixed`
OPTIONS = {"--max-loras": len(USERS), "--max-cpu-loras": len(USERS), "--max-lora-rank": 8, "--max-num-seqs": len(USERS)}
# a server that remembers the prompts of the round before would be another race
FLAGS = ("--enable-lora", "--enforce-eager", "--no-enable-prefix-caching")
MIXED, VLLM, PEFT = "bank.mixed", "vLLM", "PEFT: adapter_names"
ROUNDS = 6

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@dataclass(frozen=True)
class Crowd:
    """A bank of users, and the prompt of each, `ids` without and `inputs` with padding."""

    model: PeftModel
    bank: AdapterBank
    ids: Sequence[Sequence[int]]
    inputs: Mapping[str, Tensor]

    @classmethod
    def of(cls, subject: Subject, folder: Path) -> Crowd:
        """The prompts are the subject's, in turn; the users' vectors as long as that of ada."""
        subject.model.set_adapter("ada")
        bank = AdapterBank.create(folder, subject.model)
        bank.add_many((user, cls.vector(subject.model, seed)) for seed, user in enumerate(USERS))
        texts = [PROMPTS[k % len(PROMPTS)] for k in range(len(USERS))]
        inputs = subject.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        return cls(subject.model, bank, subject.tokenizer(texts).input_ids, inputs)

    @staticmethod
    def vector(model: PeftModel, seed: int) -> Tensor:
        _, theta_d = adapter_of(model, "ada")
        return theta_d.std() * torch.randn(theta_d.shape, generator=torch.Generator().manual_seed(seed))

    def mixed(self) -> list[list[int]]:
        with mixed(self.model, *self.bank.batch(USERS)):
            return self.generate(self.model)

    @torch.no_grad()
    def generate(self, model: PeftModel, **options: Any) -> list[list[int]]:
        """The tokens that follow each prompt."""
        whole = model.generate(**self.inputs, **greedy(NEW_TOKENS), **options)
        return whole[:, self.inputs["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def peer(self) -> PeftModel:
        """PEFT's model with a LoRA for each user, whose factors are those that `bank.select` makes."""
        own = self.model.peft_config["ada"]
        config = LoraConfig(r=own.r, lora_alpha=own.lora_alpha, target_modules=MODULES, task_type="CAUSAL_LM")
        peer = get_peft_model(models.load_causal(models.BaseModel("smollm2")), config, adapter_name=USERS[0])
        pairs = list(zip(_layers(self.model), _layers(peer), strict=True))
        for _, theirs in pairs:
            for user in USERS[1:]:  # as `add_adapter` does, which walks the whole model for each
                theirs.update_layer(user, own.r, lora_alpha=own.lora_alpha, config=config)
        for user in USERS:
            self.bank.select(self.model, user)
            for ours, theirs in pairs:
                theirs.lora_A[user].weight.copy_(ours.lora_A["ada"].weight)
                theirs.lora_B[user].weight.copy_(ours.lora_B["ada"].weight)
        return peer.eval()


def _layers(model: PeftModel) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    folder = tmp_path_factory.mktemp("crowd")
    return Crowd.of(Subject.make(folder), folder / "bank")


@pytest.fixture(scope="module")
def server(crowd: Crowd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base, options = crowd.bank.folder.with_name("base"), [word for pair in OPTIONS.items() for word in pair]
    folder = tmp_path_factory.mktemp("server")
    with serving(base, crowd.bank.folder, folder, "--dtype", "float32", "--max-model-len", 256, *FLAGS, *options) as it:
        yield it
    assert not list(it.temporary.glob("uniproj-*"))


def test_a_user_is_exported_when_he_is_asked_for_and_again_after_unloading(crowd: Crowd, server: Server) -> None:
    def ask(user: str) -> list[int]:
        return server.complete([user], crowd.ids[:1], NEW_TOKENS)[0]

    def ours(user: str) -> list[int]:
        with mixed(crowd.model, *crowd.bank.batch([user])), torch.no_grad():
            whole = crowd.model.generate(torch.tensor(crowd.ids[:1]), **greedy(NEW_TOKENS))
        return whole[0, len(crowd.ids[0]) :].tolist()

    assert not list(server.temporary.glob("uniproj-*"))
    assert server.post("/v1/completions", {"model": "nobody", "prompt": "Hello"}) == 404
    crowd.bank.add("guest", Crowd.vector(crowd.model, 1000))
    old = ours("guest")
    assert ask("guest") == old
    (folder,) = server.temporary.glob("uniproj-*")
    assert len(list(folder.iterdir())) == 2  # with the one that P was read from
    crowd.bank.replace("guest", Crowd.vector(crowd.model, 1001))
    assert ours("guest") != old and ask("guest") == old
    server.post("/v1/unload_lora_adapter", {"lora_name": "guest"})
    assert ask("guest") == ours("guest")


def test_all_get_the_tokens_of_mixed(crowd: Crowd, server: Server, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    wanted = crowd.mixed()
    assert len(set(map(tuple, wanted))) == len(USERS)  # else one for another would pass
    ask = partial(server.complete, USERS, crowd.ids, NEW_TOKENS)
    began = time.perf_counter()
    equal = {VLLM: _equal(ask(), wanted)}
    first_seconds = time.perf_counter() - began
    if folder := pytestconfig.getoption("--engines", None):
        beside = partial(crowd.generate, crowd.peer(), adapter_names=USERS)
        equal[PEFT] = _equal(beside(), wanted)
        record = {
            "users": len(USERS),
            "new_tokens": NEW_TOKENS,
            "prompt_tokens": sum(map(len, crowd.ids)),
            "d": crowd.bank.header.d,
            "D": crowd.bank.header.layout.D,
            "dtype": "float32",
            "server": {name.lstrip("-"): value for name, value in OPTIONS.items()} | {"flags": FLAGS},
            "dependencies": ENGINES["vllm"].dependencies,
            "tokens": len(USERS) * NEW_TOKENS,
            "tokens_equal": equal,
            "first_pass_seconds": first_seconds,
            **_raced({MIXED: crowd.mixed, VLLM: ask, PEFT: beside}),
            "load_average": os.getloadavg()[1],
            "provenance": provenance("cpu"),
        }
        write_json(Path(folder) / "many_users.json", record)
        write_text(Path(folder) / "many_users.md", _page(record))
    assert equal[VLLM] == len(USERS) * NEW_TOKENS


def _equal(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> int:
    return sum(a == b for pair in zip(found, wanted, strict=True) for a, b in zip(*pair, strict=True))


def _raced(ways: Mapping[str, Callable[[], list]]) -> dict[str, list[dict[str, Any]]]:
    """Seconds on the clock of all requests, in turns, and the paired ratios."""
    # what an action returns would be called
    actions = {name: lambda way=way: way() and None for name, way in ways.items()}
    seconds = {name: found[:, 0] for name, found in take_turns(actions, ROUNDS).items()}
    rows = [
        {
            "way": name,
            "rounds": ROUNDS,
            "seconds": float(np.median(found)),
            "lower_quartile": float(np.quantile(found, 0.25)),
            "upper_quartile": float(np.quantile(found, 0.75)),
            "requests_per_second": len(USERS) / float(np.median(found)),
            "tokens_per_second": len(USERS) * NEW_TOKENS / float(np.median(found)),
        }
        for name, found in seconds.items()
    ]
    pairs = [(VLLM, MIXED), (PEFT, MIXED), (PEFT, VLLM)]
    ratios = [{"ratio": f"{a} / {b}", **ratio("clock", seconds[a], seconds[b])} for a, b in pairs]
    return {"seconds": rows, "ratios": ratios}


def _page(record: Mapping[str, Any]) -> str:
    where, hardware = record["provenance"], record["provenance"]["hardware"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "peft", "transformers"))
    shape = (
        f"{record['users']} users of one bank (d = {record['d']:,}, D = {record['D']:,}), one request each, "
        f"{record['prompt_tokens']} tokens of prompts in all, {record['new_tokens']} new ones each, SmolLM2-135M in "
        f"{record['dtype']}. Of {record['tokens']:,} tokens equal to those of `bank.mixed`: "
        + ", ".join(f"{name} {count:,}" for name, count in record["tokens_equal"].items())
        + f". vLLM's first pass, in which every user is exported: {record['first_pass_seconds']:.1f} s."
    )
    origin = (
        f"{hardware['device']}, {hardware['cores']} cores, {hardware['threads']} threads, load average "
        f"{record['load_average']:.1f}; {', '.join(record['dependencies'])}; {versions}; commit {where['commit']}; "
        f"{where['finished']}."
    )
    texts = ["# Many users in vLLM, measured", shape, origin]
    return "\n\n".join([*texts, table(record["seconds"]), table(record["ratios"])]) + "\n"
