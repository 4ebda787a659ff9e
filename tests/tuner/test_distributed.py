"""DDP and FSDP2 with two gloo processes: what they train is what one process trains, and lies whole on each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from tests.tuner.models import TARGETS, base_model, config
from tests.tuner.two_processes import CASES
from uniproj import AdapterError
from uniproj.tuner import shard_base

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each process found, by case."""
    folder = tmp_path_factory.mktemp("seen")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.tuner.two_processes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [c for c in CASES if c[-1] != "reentrant"], ids=lambda c: " ".join(map(str, c)))
def test_two_processes_train_what_one_trains(case: tuple, seen: list[dict]) -> None:
    for found in (process[" ".join(map(str, case))] for process in seen):
        assert found["loss_difference"] < 1e-5 and found["trained_difference"] < 1e-4 < 0.1 < found["trained_change"]
        assert found["replicated"] and found["adapter_difference"] < 1e-5
        if case[1] == "fsdp2":
            # the base, and nothing else, is split
            assert found["sharded"] > 20
            assert all("uniproj_theta_d" in n or "projections" in n or "modules_to_save" in n or "original_module" in n
                       for n in found["whole"])  # fmt: skip
        else:
            assert found["sharded"] == 0


@pytest.mark.parametrize("case", [c for c in CASES if c[-1] == "reentrant"], ids=lambda c: " ".join(map(str, c)))
def test_reentrant_checkpointing_is_refused(case: tuple, seen: list[dict]) -> None:
    for process in seen:
        assert "need the non-reentrant kind, got use_reentrant=True" in process[" ".join(map(str, case))]["refused"]


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(AdapterError, match="a process group must exist"):
        shard_base(get_peft_model(base_model("llama"), config("llama")))
    lora = LoraConfig(r=2, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match="must hold a uniproj adapter, got a LoraModel"):
        shard_base(get_peft_model(base_model("llama"), lora))
