"""What values may be, in a configuration and in a header: the same for files and for what is made in code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from uniproj.errors import AdapterError, shown

# levels of lists and objects inside one another
DEPTH = 16
# sizes of alpha: s B A stays within float32
_LEAST, _MOST = 1e-30, 1e30
# of a model, replicated ones included, which are copied one by one before the model is compared with a file
_LAYERS = 1024


def parse_json(text: str | bytes) -> Any:
    """What JSON text says. Raises ValueError for a key that stands twice, and for what `_check_json` refuses."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError(f"more than {DEPTH} levels") from None
    return _check_json(value)


def _check_json(value: Any, levels: int = DEPTH) -> Any:
    """The value itself. Raises ValueError for what JSON cannot express (NaN, infinity, lone surrogates, objects of
    Python's own) and for more than `levels` of lists and objects inside one another."""
    if isinstance(value, Mapping | list | tuple):
        if levels == 0:
            raise ValueError(f"more than {DEPTH} levels")
        for key in value if isinstance(value, Mapping) else ():
            if not isinstance(key, str):
                raise ValueError(f"the key {shown(key)} of another type than text")
            _text(key)
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_json(item, levels - 1)
    elif isinstance(value, str):
        _text(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the number {value}")
    elif not isinstance(value, int | None):
        raise ValueError(f"a {type(value).__name__}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON with these pairs. Raises ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that stands twice")
    return found


def _text(value: str) -> str:
    if not value.isascii():
        value.encode()  # which a lone surrogate does not allow
    return value


def _alpha(value: Any) -> Any:
    if isinstance(value, int | float) and not _LEAST <= abs(value) <= _MOST:
        raise ValueError("its size")
    return value


def _spans(value: Any) -> Any:
    if any(start >= end for start, end in value) or sum(end - start for start, end in value) > _LAYERS:
        raise ValueError("its layers")
    return value


Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[Text, Field(min_length=1, max_length=200, description="a name of 1 to 200 letters")]
MaybeText = Annotated[
    Annotated[Text, Field(max_length=4096)] | None, Field(description="text of at most 4096 letters, or null")
]
Flag = Annotated[bool, Field(description="true or false")]
_Natural = Annotated[int, Field(ge=0, lt=2**31, description="a whole number in [0, 2^31)")]
Seed = Annotated[int, Field(ge=0, lt=2**64, description="a whole number in [0, 2^64)")]
MaybeNatural = Annotated[_Natural | None, Field(description="a whole number of at least 0, or null")]
Size = Annotated[int, Field(ge=1, lt=2**63, description="a whole number in [1, 2^63)")]
MaybeSize = Annotated[Size | None, Field(description="a whole number of at least 1, or null")]
Rank = Annotated[int, Field(ge=1, lt=2**31, description="a whole number in [1, 2^31)")]
Alpha = Annotated[
    int | float,
    BeforeValidator(_alpha),  # as pydantic reads no integer of thousands of digits
    Field(description=f"a finite number other than 0, of a size in [{_LEAST:g}, {_MOST:g}]"),
]
Rate = Annotated[float, Field(ge=0, lt=1, description="a number in [0, 1)")]
_Texts = list[Text] | tuple[Text, ...] | set[Text]
Texts = Annotated[_Texts | None, Field(description="a list of texts, or null")]
Pattern = Annotated[Text | _Texts | None, Field(description="text, a list of texts, or null")]
_Indices = list[_Natural] | tuple[_Natural, ...]
Layers = Annotated[
    _Natural | _Indices | None, Field(description="a whole number in [0, 2^31), a list of them, or null")
]
Tokens = Annotated[
    _Indices | dict[Text, _Indices] | None,
    Field(description="a list of whole numbers in [0, 2^31), one such list for each of some modules, or null"),
]
Invocation = Annotated[
    Annotated[_Indices, Field(min_length=1)] | None,
    Field(description="a list of one or more whole numbers in [0, 2^31), or null"),
]
_Span = Annotated[list[_Natural], Field(min_length=2, max_length=2)] | tuple[_Natural, _Natural]
Replication = Annotated[
    Annotated[list[_Span], Field(min_length=1), AfterValidator(_spans)] | None,
    Field(description=f"a list of pairs [start, end) of layers, at most {_LAYERS} layers in all, or null"),
]
_Row = Annotated[list[Text], Field(min_length=2, max_length=2)] | tuple[Text, Text]
Table = Annotated[list[_Row] | None, Field(description="a list of pairs [old, new] of parts of names, or null")]
Ranks = Annotated[dict[Text, Rank] | None, Field(description="patterns of names with whole numbers in [1, 2^31)")]
Alphas = Annotated[dict[Text, Alpha] | None, Field(description="patterns of names with finite numbers other than 0")]
Bias = Annotated[Literal["none", "all", "lora_only"], Field(description="none, all or lora_only")]
Object = Annotated[
    dict[Text, Any],
    AfterValidator(_check_json),
    Field(description=f"JSON, an object of at most {DEPTH} levels with finite numbers"),
]


class Schema(BaseModel):
    """No value is converted, and a field that is not here is left to those who know it."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Lines(Schema):
    """The lines of a header that hold one value each; `settings` are fields of a configuration."""

    format_version: _Natural
    library_version: Name
    projection: Name
    projection_version: _Natural
    projection_kwargs: Object
    d: Size
    projection_seed: Seed
    checksum: Name
    base_model: MaybeText
    base_revision: MaybeText
    base_quantisation: MaybeText
    settings: Annotated[dict[Text, Any], Field(description="an object")]


def check(schema: type[BaseModel], values: Mapping[str, Any], what: str, remedy: str = "Correct it.") -> None:
    """Raises AdapterError for the first of these values that its field cannot hold. what: begins the sentence."""
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
        words = schema.model_fields[name].description
        got = shown(values[name]) if name in values else "none"
        raise AdapterError(f"{what}{name} must be {words}, got {got}. {remedy}") from None
