"""Rank and alpha of a module as PEFT finds them: by the pattern that fits its name, else those of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def of_module(patterns: Mapping[str, T] | None, module: str, default: T) -> T:
    """The value of the first pattern that fits the module's name, in PEFT's sense; `default` where none does."""
    from peft.utils.other import get_pattern_key  # here, as PEFT imports the tuner, which imports this module

    patterns = patterns or {}
    return patterns.get(get_pattern_key(list(patterns), module), default)


def scale(alpha: float, r: int, use_rslora: bool | None) -> float:
    """s of delta W = s B A: alpha / r, or alpha / sqrt(r) under use_rslora."""
    return alpha / (r**0.5 if use_rslora else r)
