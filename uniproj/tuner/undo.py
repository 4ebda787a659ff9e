"""A model is changed whole or not at all."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, the model has its modules, attributes, configuration, hooks and requires_grad of old.

    The numbers in its tensors are not restored: code inside must check everything before it changes any.
    """
    modules = list(model.modules())
    # of Transformers' models, which say how many layers there are
    configs = {id(found): found for module in modules if hasattr(found := vars(module).get("config"), "__dict__")}
    attributes = [(vars(owner), dict(vars(owner))) for owner in (*modules, *configs.values())]
    held = [value for _, before in attributes for value in before.values() if type(value) in _CONTAINERS]
    contents = [(container, copy.copy(container)) for container in held]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for container, before in [*attributes, *contents]:
            _fill(container, before)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise


# in place, as others may hold the same object: a model and its tuner share their peft_config
_CONTAINERS = (dict, OrderedDict, list, set)


def _fill(container: dict | list | set, before: dict | list | set) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)  # type: ignore[arg-type]
