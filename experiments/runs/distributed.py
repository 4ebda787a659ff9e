"""One run over several processes: the same global batches in the same order as on one, and the same checkpoints.

`torchrun` or `accelerate launch` starts the processes; each holds the whole model (DDP), or a part of the frozen base
where Accelerate's ACCELERATE_USE_FSDP is set (FSDP2). Either way what is trained is whole on each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from experiments.errors import ExperimentError
from experiments.processes import ALONE, Processes, is_sharded, world_size
from experiments.runs.config import RunConfig
from uniproj.tuner import shard_base

_EPOCH_STATE = "epoch_rng_state.pth"
# what torchrun, and what `accelerate launch`, sets for the processes that it starts
TORCHRUN, ACCELERATE = "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"


def asked_of_accelerate() -> Processes:
    """What `accelerate launch --num_processes N` was asked for where it started this process alone.

    That is what it does on CPUs, whatever N: only MPI would start more. Its command line is all that tells N.
    """
    if ACCELERATE not in os.environ or "WORLD_SIZE" in os.environ:
        return ALONE
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:  # no process that this one may look at
        return ALONE
    launch = next((i for i, word in enumerate(words) if word.endswith("launch")), None)
    if launch is None:
        return ALONE
    asked = launch_command_parser().parse_args(words[launch + 1 :])
    stored = asked.config_file or (Path(default_config_file).is_file() and not asked.cpu)
    defaults = vars(load_config_from_file(asked.config_file)) if stored else {}

    def option(name: str, otherwise: Any) -> Any:
        return next((x for x in (getattr(asked, name), defaults.get(name)) if x is not None), otherwise)

    nodes = option("num_machines", 1)
    return Processes(
        max(1, option("num_processes", 1) // nodes),
        nodes=nodes,
        node=option("machine_rank", 0),
        address=f"{option('main_process_ip', '')}:{option('main_process_port', 29500)}",
    )


def share(config: RunConfig) -> tuple[int, int]:
    """(batch_size, accumulation) of each process: together they step on batch_size * accumulation rows, as one would.

    Raises ExperimentError where neither number can be divided by the number of processes.
    """
    world = world_size()
    if config.accumulation % world == 0:
        return config.batch_size, config.accumulation // world
    if config.batch_size % world == 0:
        return config.batch_size // world, config.accumulation
    raise ExperimentError(
        f"distributed: accumulation or batch_size must be a multiple of the {world} processes, got "
        f"{config.accumulation} and {config.batch_size}. Start another number of processes."
    )


class DistributedTrainer(Trainer):
    """Transformers' Trainer with the order of rows of one process, and a base that may be sharded.

    Where the number of rows is no multiple of the global batch, the last batch of an epoch is filled up with rows of
    its beginning, which a single process does not do.
    """

    _order: _OneOrder | None = None

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        if is_sharded():
            # Trainer's word for a model that must be neither wrapped nor moved
            self.is_distributed_loading_by_transformers = True
            shard_base(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not hasattr(sampler, "lengths"):
            return sampler
        # rows of like length are gathered by the global batch
        sampler.batch_size *= world_size()
        self._order = _OneOrder(sampler)
        return self._order

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if world_size() > 1:
            # an evaluation marks the model as prepared, and Accelerate would then train it without DDP and say nothing
            self.model._is_accelerate_prepared = False
        state = Path(resume_from_checkpoint or "") / _EPOCH_STATE
        if self._order is not None and resume_from_checkpoint and state.exists():
            self._order.resumed = torch.load(state, weights_only=True)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """A loss that is the mean over its own batch on any number of processes, not over the batches of all."""
        averaged, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = averaged

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing: `shard_base` averages the gradients, also with gloo."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._order is not None and self.state.epoch % 1 and self.is_world_process_zero():
            torch.save(self._order.began, Path(output_dir) / _EPOCH_STATE)
        if world_size() > 1:
            if self.is_world_process_zero():
                # by this name a single process looks for it
                shutil.copy(Path(output_dir) / "rng_state_0.pth", Path(output_dir) / "rng_state.pth")
            # trainer_state.json comes next and says that all files are there
            self.accelerator.wait_for_everyone()


class _OneOrder(Sampler):
    """The first process's order of an epoch on all, and again after a resumption within the epoch.

    The sampler draws it from the global generator, which dropout leaves in other states on other processes, and of
    which a checkpoint within an epoch keeps the state of that moment only. began: the state from which this epoch was
    drawn; resumed: that of the epoch to be gone on with.
    """

    resumed: Tensor | None = None
    began: Tensor | None = None

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        now = torch.get_rng_state()
        self.began = now if self.resumed is None else self.resumed
        torch.set_rng_state(self.began)
        order = [list(self.sampler)]
        if self.resumed is not None:
            # the checkpoint's own state, or the one it is about to replace
            torch.set_rng_state(now)
            self.resumed = None
        if world_size() > 1:
            dist.broadcast_object_list(order)
        return iter(order[0])
