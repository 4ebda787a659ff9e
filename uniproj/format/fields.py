"""What each field of a configuration is: those of PEFT's LoraConfig, and those that `UniProjConfig` adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel, create_model

from uniproj.errors import AdapterError
from uniproj.format import schema
from uniproj.registry import get


class Role(Enum):
    """What a field is to an adapter."""

    P = "decides P, or is checked against it; the header has lines of its own for these"
    RANK = "the size of the factors"
    SCALE = "s of the update s B A, and the tokens that it is added at"
    PLACE = "the modules that are adapted"
    BESIDE = "what is trained beside theta_d"
    TRAINING = "leaves the update as it is"
    BASE = "where the base model lies; may be changed by hand"
    STATE = "how the adapter is used at the moment"
    VARIANT = "refused: its update is not s B A"
    START = "refused: P decides how A and B start"
    OTHER = "refused: it changes which A and B there are, or how they learn"


DEFAULT_PROJECTION = "unilora"
REFUSED = (Role.VARIANT, Role.START, Role.OTHER)


@dataclass(frozen=True)
class Field:
    """holds: the type of its values (Any: PEFT checks them); absent: the values by which the field is not in use, to
    which `{}` does not belong where PEFT makes a variant of it; why: what a refused one does that P cannot, after the
    field's name."""

    role: Role
    holds: Any = Any
    absent: tuple[Any, ...] = (None, False, {})
    why: str = ""


_STARTS = "decides the numbers that A and B start with, which are those of P theta_d + c"


def _refused(role: Role, why: str, absent: tuple[Any, ...] = (None, False, {})) -> Field:
    return Field(role, absent=absent, why=why)


FIELDS = {
    "peft_type": Field(Role.P),
    "format_version": Field(Role.P, schema.MaybeNatural),
    "projection": Field(Role.P, schema.Name),
    "projection_seed": Field(Role.P, schema.Seed),
    "projection_kwargs": Field(Role.P, schema.Object),
    "d": Field(Role.P, schema.MaybeSize),
    "layout_fingerprint": Field(Role.P, schema.MaybeText),
    "projection_checksum": Field(Role.P, schema.MaybeText),
    "r": Field(Role.RANK, schema.Rank),
    "rank_pattern": Field(Role.RANK, schema.Ranks),
    "lora_alpha": Field(Role.SCALE, schema.Alpha),
    "use_rslora": Field(Role.SCALE, schema.Flag),
    "alpha_pattern": Field(Role.SCALE, schema.Alphas),
    "alora_invocation_tokens": Field(Role.SCALE, schema.Invocation),
    "task_type": Field(Role.PLACE, schema.MaybeText),
    "target_modules": Field(Role.PLACE, schema.Pattern),
    "exclude_modules": Field(Role.PLACE, schema.Pattern),
    "layers_to_transform": Field(Role.PLACE, schema.Layers),
    "layers_pattern": Field(Role.PLACE, schema.Pattern),
    "layer_replication": Field(Role.PLACE, schema.Replication),
    "ensure_weight_tying": Field(Role.PLACE, schema.Flag),
    "fan_in_fan_out": Field(Role.PLACE, schema.Flag),
    "remap": Field(Role.PLACE, schema.Table),
    "modules_to_save": Field(Role.BESIDE, schema.Texts, (None, [])),
    "trainable_token_indices": Field(Role.BESIDE, schema.Tokens),
    "bias": Field(Role.BESIDE, schema.Bias, (None, "none")),
    "init_seed": Field(Role.TRAINING, schema.Seed),
    "lora_dropout": Field(Role.TRAINING, schema.Rate),
    "runtime_config": Field(Role.TRAINING),
    # used only by variants that are refused
    "megatron_core": Field(Role.TRAINING),
    "qalora_group_size": Field(Role.TRAINING),
    "base_model_name_or_path": Field(Role.BASE, schema.MaybeText),
    "revision": Field(Role.BASE, schema.MaybeText),
    "auto_mapping": Field(Role.BASE),
    "inference_mode": Field(Role.STATE, schema.Flag),
    "peft_version": Field(Role.STATE, schema.MaybeText),
    "arrow_config": _refused(
        Role.VARIANT,
        "mixes the updates of other adapters token by token, and has no A and B of its own for P to make",
        absent=(None,),
    ),
    "kasa_config": _refused(
        Role.VARIANT,
        "trains a diagonal v between the factors of s B diag(v) A, which theta_D has no place for",
        absent=(None,),
    ),
    "lora_bias": _refused(
        Role.VARIANT, "trains a bias beside each B, which theta_D has no place for; bias='lora_only' trains the base's"
    ),
    "monteclora_config": _refused(
        Role.VARIANT,
        "draws A from a distribution whose parameters are trained, which theta_D has no place for",
        absent=(None,),
    ),
    "use_bdlora": _refused(
        Role.VARIANT,
        "makes A or B block-diagonal, while P writes every number of an A (r, in) and a B (out, r)",
        absent=(None,),
    ),
    "use_dora": _refused(
        Role.VARIANT,
        "trains the norm of every row of W + s B A, which theta_D has no place for and which makes the update another "
        "than s B A",
    ),
    "use_qalora": _refused(
        Role.VARIANT, "feeds A the sums of groups of inputs, for which P would have to make another A than (r, in)"
    ),
    "corda_config": _refused(Role.START, _STARTS),
    "eva_config": _refused(Role.START, _STARTS),
    "init_lora_weights": _refused(Role.START, _STARTS, absent=(True,)),
    "loftq_config": _refused(Role.START, _STARTS),
    "lora_ga_config": _refused(Role.START, _STARTS),
    "megatron_config": _refused(
        Role.OTHER, "parts A and B among processes, while P makes the whole of them on each", absent=(None,)
    ),
    "target_parameters": Field(Role.PLACE, schema.Texts, (None, [])),
    "velora_config": _refused(
        Role.OTHER, "compresses the input of A for its gradient, which then is no gradient of theta_d", absent=(None,)
    ),
}


def fields_of(*roles: Role) -> tuple[str, ...]:
    """The names of the fields of these roles."""
    return tuple(name for name, field in FIELDS.items() if field.role in roles)


def used(fields: Mapping[str, Any], *roles: Role) -> list[str]:
    """The fields of these roles that are in use."""
    return [name for name in fields_of(*roles) if name in fields and fields[name] not in FIELDS[name].absent]


# in these a configuration may differ from the header: where the base lies, and how the adapter is used
FREE = frozenset(fields_of(Role.BASE, Role.STATE))


def _model(name: str, *but: str, roles: tuple[Role, ...] = tuple(Role)) -> type[BaseModel]:
    holds = {name: (FIELDS[name].holds, None) for name in fields_of(*roles) if name not in but}
    return create_model(name, __base__=schema.Schema, **holds)  # type: ignore[call-overload, no-any-return]


# the fields that the configurations of all of PEFT's methods share
CommonFields = _model(
    "CommonFields", "rank_pattern", "bias", "remap", roles=(Role.RANK, Role.PLACE, Role.BESIDE, Role.BASE, Role.STATE)
)
Configuration = _model("Configuration")


def check_fields(fields: Mapping[str, Any], what: str) -> None:
    """Raises AdapterError for a value that its field cannot hold, and for a field that no projection can serve;
    ProjectionError for an unknown projection. what: begins the sentence."""
    schema.check(Configuration, fields, what)
    if "projection" in fields:
        get(fields["projection"])
    # PEFT wants init_lora_weights beside some of the others, which say more
    if changed := sorted(used(fields, *REFUSED), key=lambda name: (name == "init_lora_weights", name)):
        raise AdapterError(
            f"{what}{changed[0]} {FIELDS[changed[0]].why}. Leave it at its default, or use PEFT's LoraConfig."
        )
    if reserved := sorted({"d", "layout", "seed", "base_weights"} & set(fields.get("projection_kwargs") or {})):
        raise AdapterError(
            f"{what}projection_kwargs holds hyperparameters of P, got {reserved}. "
            "Use the fields d, projection_seed and target_modules."
        )
