"""What figures, tables and the report call methods, tasks and models: those of names.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("names.yaml")


@cache
def mapping(kind: str) -> dict[str, str]:
    """Names of "methods", "tasks" or "models" by what they are called in settings."""
    found: dict[str, str] = yaml.safe_load(FILE.read_text())[kind]
    return found


def method(name: str) -> str:
    """A projection of the registry, or another entrant of a comparison or a measurement."""
    return mapping("methods").get(name, name)


def variant(text: str) -> str:
    """A projection with the hyperparameters behind it: `lora_xs (side=A)`."""
    name, space, rest = text.partition(" (")
    return method(name) + space + rest


def task(name: str) -> str:
    """A task; one's own is called as its folder."""
    return mapping("tasks").get(name, _folder(name))


def model(name: str) -> str:
    """A base model; one's own is called as its folder."""
    return mapping("models").get(name, _folder(name))


def _folder(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name
