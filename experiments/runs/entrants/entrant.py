"""The one interface between a run and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.errors import ExperimentError
from experiments.models import Family
from experiments.runs.config import RunConfig
from uniproj.errors import unknown
from uniproj.projection import Projection

# of the trained copy of a head in a PeftModel
_COPIED = "modules_to_save"

Trained = dict[str, nn.Parameter]


class Entrant(ABC):
    """What stands in a comparison under one name.

    name: as settings spell it. version: grows when the same settings give another model. is_shardable: whether its
    base may be split over processes (FSDP2).
    """

    version: int = 1
    is_shardable: bool = False

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """r, d, hyperparameters and budget of the run with these settings: its budget is solved.

        budget is None where none was asked of this entrant: it stands at its own size. Raises ExperimentError for
        options that it does not know.
        """

    @abstractmethod
    def count(self, config: RunConfig) -> int:
        """How many numbers a run trains besides its head, without its weights."""

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Raises ExperimentError, or ProjectionError, for a run that this entrant cannot do."""

    def check_sharded(self) -> None:
        """Raises ExperimentError where the base is to be split over processes and cannot be."""
        if not self.is_shardable:
            raise ExperimentError(
                f"config: {self.name} must have its whole base on each process, got one that is to be sharded. Leave "
                "`sharded` out for it, in a sweep of its own."
            )

    @abstractmethod
    def attach(self, base: PreTrainedModel, config: RunConfig, family: Family | type[Family]) -> nn.Module:
        """The model to be trained, made of a fresh base."""

    @abstractmethod
    def save(self, model: Any, folder: Path, config: RunConfig) -> Path | None:
        """Write what was trained into a folder; the file of the numbers, or None where they are not kept."""

    @abstractmethod
    def load(self, model: Any, folder: Path) -> None:
        """Give an attached model the numbers that a folder holds."""

    @abstractmethod
    def restored(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """A fresh base with what a folder holds, as its user would load it."""

    @abstractmethod
    def check_saved(self, folder: Path) -> None:
        """Raises an error of whatever reads them unless the files of a checkpoint are whole."""

    def projection(self, model: nn.Module) -> Projection | None:
        """P of the model, where it has one."""
        return None

    def held(self, model: nn.Module) -> Iterator[Tensor]:
        """Every tensor that is kept besides the base and what is trained."""
        return iter(())


def parts(model: nn.Module, heads: Sequence[str]) -> tuple[Trained, Trained]:
    """(own, head): the trained Parameters of a method and those of the head, by name.

    heads: how the names of modules end that are a head, as PEFT takes them.
    """
    own: Trained = {}
    head: Trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if _is_of_head(name, tuple(heads)) else own)[name] = parameter
    return own, head


def _is_of_head(name: str, heads: tuple[str, ...]) -> bool:
    modules = name.split(".")[:-1]
    return _COPIED in modules or any(module.endswith(heads) for module in modules if heads)


def check_options(name: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ExperimentError for an option that an entrant does not know."""
    for option in given:
        if option not in known:
            said = unknown(f"option of {name}", option, known or ["none"])
            raise ExperimentError(f"config: {said} Correct it.")


def tensors_of(start: Sequence[Any], base: Sequence[Any], packages: Collection[str]) -> Iterator[Tensor]:
    """Every tensor that these objects hold which is not trained: buffers, caches, tables of their parts.

    base: objects that are passed over, with all that they hold; packages: whose classes are looked into,
    besides modules and containers.
    """
    seen: set[int] = {id(each) for each in base}
    waiting: list[Any] = [*start]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or (isinstance(value, nn.Parameter) and value.requires_grad):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, nn.Module) or type(value).__module__.split(".")[0] in packages:
            waiting += [getattr(value, name) for name in getattr(type(value), "__slots__", ())]
            waiting += vars(value).values() if hasattr(value, "__dict__") else ()
