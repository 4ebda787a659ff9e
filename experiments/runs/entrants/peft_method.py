"""Any method that PEFT knows, its own or another package's, under the name by which it is registered."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from peft import PeftConfig, PeftModel, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.checks import check_fields
from experiments.errors import ExperimentError
from experiments.models import Family
from experiments.runs.config import RANK, SEEDS, RunConfig
from experiments.runs.entrants.adapter import Adapter
from experiments.runs.entrants.entrant import check_options, parts, tensors_of
from experiments.runs.entrants.solve import VALUES, nearest
from experiments.runs.shapes import bare, family_class, shapes_of, targets_of
from uniproj.errors import shown
from uniproj.tuner import UniProjConfig

PREFIX = "peft/"
# of the options in a sweep, not PEFT's: the one over which a budget is solved, in place of the table's
_BUDGET_OPTION = "budget_option"


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("peft.yaml").read_text())
    return found


def _registered() -> dict[str, Any]:
    """The key of every method in PEFT's dictionaries, by its name: a member of an enumeration, or another's text.

    Projections stand there by names of their own.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.items()
    return {str(getattr(key, "value", key)).lower(): key for key, cls in known if cls is not UniProjConfig}


def names() -> list[str]:
    """Every method as a comparison spells it, such as `peft/fourierft`."""
    known = _registered()
    also = [name for name, about in _table()["methods"].items() if about.get("of") in known]
    return sorted(PREFIX + name for name in {*known, *also})


class PeftMethod(Adapter):
    """A method of PEFT's by its name, on the modules of the run; its options are those of its configuration."""

    def __init__(self, name: str):
        super().__init__(name)
        short = name.removeprefix(PREFIX)
        self._about: Mapping[str, Any] = _table()["methods"].get(short, {})
        key = _registered()[self._about.get("of", short)]
        self._config_class: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[key]
        self._tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(key)
        self._defaults = {field.name: field.default for field in fields(self._config_class)}

    def settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """An option that scales the count is taken as it is where it is given; else a budget is solved over it, and
        without a budget PEFT's default, or the run's r, stands."""
        given = dict(settings.get("hyperparameters", {}))
        option, kind = self._scaled_by(given.pop(_BUDGET_OPTION, None))
        # what makes it another method under this name is settled
        free = [known for known in self._defaults if known not in self._about.get("options", {})]
        check_options(self.name, given, [*free, _BUDGET_OPTION])
        if reason := self._about.get("cannot"):
            raise ExperimentError(
                f"config: {self.name} needs {reason}, which runs do not have. Choose another entrant."
            )
        if settings.get("d") is not None:
            raise ExperimentError(
                f"config: d must be left to projections, got d={settings['d']} for {self.name}. Write it as a budget."
            )
        budget, is_given = settings.get("budget"), option in given
        if option is not None and budget is None and not is_given and self._defaults[option] is None:
            raise ExperimentError(
                f"config: {self.name} needs a budget or its option {option}, got neither. Add {option} to its options."
            )
        asked_r = settings.get("r", RANK)
        r = asked_r if self._about.get("own_rank") else given.pop("r", asked_r)
        check_fields(f"config: {self.name}: ", RunConfig, {"r": r})
        sizes = {"r": r, "d": None, "budget": None if is_given else budget, "hyperparameters": given}
        if budget is None or is_given or option is None:
            return sizes
        config = RunConfig(**{**settings, **sizes, "version": self.version})
        return {**sizes, **self._solved(config, budget, option, self._values(config, budget, kind))}

    def _scaled_by(self, asked: Any) -> tuple[str | None, str]:
        """The option over which a budget is solved and the kind of its values; (None, "") where there is none."""
        by_rank = {"r": "integers"} if "r" in self._defaults else {}
        found = {asked: "integers"} if isinstance(asked, str) else asked or self._about.get("budget", by_rank)
        if not found:
            return None, ""
        if not isinstance(found, Mapping) or len(found) != 1 or next(iter(found.values())) not in [*VALUES]:
            raise ExperimentError(
                f"config: {_BUDGET_OPTION} of {self.name} must be one of its options, or one option with the kind of "
                f"its values ({', '.join(VALUES)}), got {shown(asked)}. Correct it."
            )
        ((option, kind),) = found.items()
        check_options(self.name, {option: kind}, [*self._defaults])
        return option, kind

    def _values(self, config: RunConfig, budget: int, kind: str) -> Sequence[int]:
        targets = config.hyperparameters.get("target_modules", config.target_modules)
        if kind.endswith("integers") and not kind.startswith("falling"):
            return VALUES[kind](budget)
        shapes = shapes_of(config.task, config.data, config.model, targets)
        widths = [width for shape in shapes.values() for width in shape]
        return VALUES[kind](math.gcd(*widths) if kind.endswith("divisors") else min(widths))

    def _solved(self, config: RunConfig, budget: int, option: str, values: Sequence[int]) -> dict[str, Any]:
        """r or hyperparameters of the count that is nearest to the budget.

        A value that the method refuses counts as too large; the least of all must be possible. Raises ExperimentError
        for an option that changes no count.
        """

        def sizes(value: int) -> dict[str, Any]:
            if option == "r":
                return {"r": value}
            return {"hyperparameters": {**config.hyperparameters, option: value}}

        def count(value: int) -> float:
            try:
                return self.count(replace(config, **sizes(value)))
            except ExperimentError:
                if value == values[0]:
                    raise
                return math.inf

        found = nearest(count, values, budget)
        if found == values[0] and len(values) > 1 and count(values[1]) == count(found):
            # it is the first of equal counts, of which a larger value may be no other
            further = (count(values[2**k]) for k in range(1, (len(values) - 1).bit_length()))
            if any(each not in (count(found), math.inf) for each in further):
                return sizes(found)
            raise ExperimentError(
                f"config: the budget of {self.name} must be solved over an option that changes how many numbers it "
                f"trains, got {option}, at whose values it trains {count(found):,}. Name another as {_BUDGET_OPTION}."
            )
        return sizes(found)

    def count(self, config: RunConfig) -> int:
        # nothing that differs between the runs of a cell changes a count
        alike = {"lr": 1.0, "score_on": "test", "budget": None, **dict.fromkeys(SEEDS, 0)}
        return _count(json.dumps({**config.to_json(), **alike}))

    def check(self, config: RunConfig) -> None:
        self._refuse(config)
        family = family_class(config)
        model = self.made_up(config)
        own, head = parts(model, family.heads)
        is_empty = not any(p.numel() for p in own.values())
        if is_empty or (family.heads and not head):
            lost = "numbers of its own" if is_empty else f"the head of {config.task}"
            raise ExperimentError(
                f"config: {self.name} must train {lost} on {config.model}, got none. Choose other target_modules or "
                "options, or another entrant."
            )
        if any(isinstance(part, nn.Linear) for part in getattr(model, "prompt_encoder", nn.Module()).modules()):
            raise ExperimentError(
                f"config: {self.name} must have checkpoints that hold what it trains, got a network that makes its "
                "tokens, of which PEFT saves the tokens alone. Choose peft/prompt_tuning or peft/prefix_tuning."
            )
        base = _base(config)
        row = family.made_up_row(base.config)
        # of a row that the base cannot read either nothing is known
        if _failure(base, row) is None and (failed := _failure(model, row)) is not None:
            with self._own_words(config, "give a loss on"):
                raise failed

    def _refuse(self, config: RunConfig) -> None:
        """What attaching does not show."""
        reason, remedy = None, "Choose another entrant"
        for option, values in _table()["unprepared"].items():
            if (given := config.hyperparameters.get(option)) in values:
                reason = f"needs more than a run does for {option}: {given}, and would be as without it"
        if issubclass(self._config_class, PromptLearningConfig) and family_class(config).task_type is None:
            reason = f"puts tokens before a text, and {config.task} has pictures"
        elif config.quantization and not self._reads_packed_weights():
            reason, remedy = f"cannot adapt weights packed as {config.quantization}", "Leave quantization out for it"
        elif config.dropout and not {*_table()["dropouts"]} & {*self._defaults}:
            reason, remedy = f"has no dropout of its input, got {config.dropout}", "Set dropout: 0 for it in `cases`"
        if reason is not None:
            raise ExperimentError(f"config: {self.name} {reason}. {remedy}.")

    def _reads_packed_weights(self) -> bool:
        """PEFT's own tuners have a file for these layers, if they can; of others nothing is known."""
        package = getattr(self._tuner, "__module__", "").rpartition(".")[0]
        return not package.startswith("peft.tuners.") or importlib.util.find_spec(f"{package}.bnb") is not None

    def attach(self, base: PreTrainedModel, config: RunConfig, family: Family | type[Family]) -> PeftModel:
        # what a method draws comes from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.init_seed)
            return get_peft_model(base, self._peft_config(config, family))

    def _peft_config(self, config: RunConfig, family: Family | type[Family]) -> PeftConfig:
        common = {
            "task_type": family.task_type,
            "modules_to_save": list(family.modules_to_save) if family.modules_to_save else None,
            **({} if self._about.get("own_modules") else {"target_modules": targets_of(config)}),
            **({} if self._about.get("own_rank") else {"r": config.r}),
            **dict.fromkeys(_table()["seeds"], config.projection_seed),
            **({name: alpha for name in _table()["alphas"] if (alpha := self._alpha(name, config)) is not None}),
            **(dict.fromkeys(_table()["dropouts"], config.dropout) if config.dropout else {}),
        }
        known = {name: value for name, value in common.items() if name in self._defaults}
        return self._config_class(**{**known, **self._about.get("options", {}), **config.hyperparameters})

    def _alpha(self, name: str, config: RunConfig) -> float | None:
        if config.alpha is not None:
            return config.alpha
        alpha, r = (self._defaults.get(key) for key in (name, "r"))
        if not isinstance(alpha, int | float) or not isinstance(r, int) or not r:
            return None
        scaled = alpha * config.r / r
        return int(scaled) if scaled.is_integer() else scaled

    def made_up(self, config: RunConfig) -> PeftModel:
        """The method on a stand-in for the run's base.

        Raises ExperimentError with the method's own words where it cannot be attached.
        """
        family = family_class(config)
        with self._own_words(config, "be attached to"):
            last: Exception | None = None
            for base, device in _stand_ins(config):
                try:
                    with device:
                        return self.attach(base, config, family)
                except Exception as error:  # of the device or of the method: the last stand-in tells
                    last = error
            assert last is not None
            raise last

    @contextmanager
    def _own_words(self, config: RunConfig, what: str) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ExperimentError:
            raise
        except Exception as error:  # whatever a method, or PEFT around it, refuses
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExperimentError(
                f"config: {self.name} must {what} {config.model} at r = {config.r} with "
                f"{dict(config.hyperparameters) or 'no options'}, got: {said} Change the options or target_modules, or "
                "choose another entrant."
            ) from error

    def held(self, model: nn.Module) -> Iterator[Tensor]:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        tuners = [module for module in model.modules() if isinstance(module, BaseTuner)]
        bases = [*(layer.get_base_layer() for layer in layers), *(tuner.model for tuner in tuners)]
        return tensors_of([*layers, *tuners], bases, {type(each).__module__.split(".")[0] for each in tuners})


def _stand_ins(config: RunConfig) -> Iterator[tuple[PreTrainedModel, torch.device]]:
    """Bases in place of the run's, the cheapest first, and where an adapter is made on each."""
    yield _base(config), torch.device("meta")
    # for what draws with a generator of the CPU
    yield _base(config), torch.device("cpu")
    # for what reads weights
    base = _base(config)
    if sum(p.nbytes for p in base.parameters()) < psutil.virtual_memory().available / 2:
        base = base.to_empty(device="cpu")
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.02)
        yield base, torch.device("cpu")


def _base(config: RunConfig) -> PreTrainedModel:
    """The base on the meta device, with checkpointing where the run has it, which not all methods allow."""
    base = bare(config)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable()
    return base


def _failure(model: nn.Module, row: Mapping[str, Tensor]) -> Exception | None:
    """Why a model on the meta device gives no loss on a row; None where it does, or that device cannot tell."""
    if not all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return None
    try:
        model(**{name: value.to("meta") for name, value in row.items()})
    except NotImplementedError:
        return None
    except Exception as error:  # whatever a method does
        return None if "meta" in str(error) else error
    return None


@cache
def _count(config: str) -> int:
    """The count of a run's own trained numbers, from its settings as JSON."""
    run = RunConfig.from_json(json.loads(config))
    own, _ = parts(PeftMethod(run.projection).made_up(run), family_class(run).heads)
    return sum(p.numel() for p in own.values())
