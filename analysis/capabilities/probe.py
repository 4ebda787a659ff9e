"""A probe does what a user would do, checks the outcome against an independent fact, and is filed by how it ended."""

from __future__ import annotations

import contextlib
import io
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from uniproj.errors import AdapterError, ProjectionError

YES, REFUSES, NO = "yes", "refuses", "no"
LIBRARIES = {"peft": "PEFT", "transformers": "Transformers", "trl": "TRL", "accelerate": "Accelerate"}
# what these libraries raise, with a sentence, where they do not take part
_REFUSALS = (ValueError, TypeError, NotImplementedError)
LONGEST = 400
# Transformers repeats other errors with all their lines, which name the folders of a machine
_TRACE = ": Traceback (most recent call last)"

Action = Callable[[Path], str | None]


class Wrong(Exception):
    """The capability ran and did something else than it should."""


@dataclass(frozen=True)
class Probe:
    """`act` gets an empty folder; it returns a remark or nothing, and raises where the capability is missing."""

    section: str
    name: str
    slow: bool
    act: Action


@dataclass(frozen=True)
class Outcome:
    """answer: yes, refuses or no; remark: what was measured, or the sentence of the refusal or fault."""

    section: str
    name: str
    answer: str
    remark: str


PROBES: list[Probe] = []


def probe(section: str, name: str, slow: bool = False) -> Callable[[Action], Action]:
    """Register a function as the probe of one capability; `slow` ones take more than about a second."""

    def register(act: Action) -> Action:
        PROBES.append(Probe(section, name, slow, act))
        return act

    return register


def check(holds: object, otherwise: str) -> None:
    """Raise Wrong, with the sentence `otherwise`, where a fact does not hold."""
    if not holds:
        raise Wrong(otherwise)


def run(probe: Probe) -> Outcome:
    """Do it, in silence and in a folder of its own; nothing it raises gets out, but an interrupt."""
    # offloading to disk leaves files in the working folder
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                remark = probe.act(Path(folder)) or ""
            return Outcome(probe.section, probe.name, YES, remark)
        except Exception as error:
            answer, sentence = _judge(error)
            sentence = sentence.replace(folder, "FOLDER")
            sentence = sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]} ..."
            return Outcome(probe.section, probe.name, answer, sentence)


def _judge(error: Exception) -> tuple[str, str]:
    """A refusal is a sentence of uniproj's, or one that PEFT and its neighbours raise themselves."""
    sentence = " ".join(str(error).split()).partition(_TRACE)[0] or type(error).__name__
    if isinstance(error, AdapterError | ProjectionError):
        return REFUSES, sentence
    if isinstance(error, Wrong):
        return NO, sentence
    parts = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    speaker = next((LIBRARIES[part] for part in parts if part in LIBRARIES), "")
    if speaker and isinstance(error, _REFUSALS) and "site-packages" in parts:
        return REFUSES, f"{speaker}: {sentence}"
    return NO, f"{type(error).__name__}: {sentence}"
