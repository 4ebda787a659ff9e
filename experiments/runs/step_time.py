"""The time of a training step, which decides no score."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model

from experiments.runs.run import Run, optimizer
from experiments.runs.shapes import layout_of
from experiments.timing import compare_steps


def step_times(run: Run) -> dict[str, Any]:
    """This run's step beside PEFT's LoRA of the same rank, on a batch of median length. Trains the model further."""
    config, args = run.config, run.trainer.args
    layout = layout_of(config.task, config.data, config.model, config.target_modules, config.r)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        target_modules=list(layout.modules),
        task_type=run.family.task_type,
        modules_to_save=list(run.family.modules_to_save) if run.family.modules_to_save else None,
    )
    reference = get_peft_model(run.family.load(run.task.split("train")), lora).to(args.device)
    batch = {key: value.to(args.device) for key, value in _middle_batch(run).items()}

    def make_optimizer(model: Any) -> Any:
        return optimizer(model, config, args, run.family)

    return compare_steps(run.model, reference, batch, make_optimizer, config.dtype == "bfloat16")


def _middle_batch(run: Run) -> Any:
    data = run.trainer.train_dataset
    if "length" in data.column_names:
        data = data.sort("length").remove_columns("length")
    middle = max(0, len(data) // 2 - run.config.batch_size // 2)
    rows = data.select(range(middle, min(len(data), middle + run.config.batch_size)))
    return run.family.collate(list(rows))
