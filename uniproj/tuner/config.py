"""`UniProjConfig`: PEFT's LoraConfig plus the choice of P."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import Tensor

from uniproj.errors import AdapterError, ProjectionError
from uniproj.format import disk, file
from uniproj.format.fields import DEFAULT_PROJECTION, check_fields
from uniproj.format.header import Header
from uniproj.format.remap import rename


class _PeftType(str):
    """A name that PEFT can treat as one of its own enumeration's members."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


PEFT_TYPE = _PeftType("UNIPROJ")


@dataclass
class UniProjConfig(LoraConfig):
    """Adapter configuration: every field of `LoraConfig` that shapes plain LoRA, and

    projection: name of P (`uniproj.names()`); d: length of theta_d where the method leaves it free;
    projection_seed: seed of P; init_seed: seed of theta_d's start; projection_kwargs: hyperparameters of P.
    `lora_alpha` is `r` unless given, so the scale alpha / r is 1 (where no rank_pattern changes r).
    `layout_fingerprint`, `projection_checksum`, `format_version` and `remap` are a saved adapter's; leave them out.
    `header` is what the file says of itself, or None for a configuration that was not read from a file with one.

    Raises ProjectionError for an unknown projection, and AdapterError for a value that its field cannot hold and for a
    LoRA variant that does not apply.
    """

    lora_alpha: int | None = None  # type: ignore[assignment]
    projection: str = field(default=DEFAULT_PROJECTION, metadata={"help": "Name of the projection P."})
    d: int | None = field(default=None, metadata={"help": "Length of theta_d."})
    projection_seed: int = field(default=0, metadata={"help": "Seed of P."})
    init_seed: int = field(default=0, metadata={"help": "Seed of the start of theta_d."})
    projection_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "Hyperparameters of P."})
    layout_fingerprint: str | None = field(default=None, metadata={"help": "Set on saving, checked on loading."})
    projection_checksum: str | None = field(default=None, metadata={"help": "Set on saving, checked on loading."})
    format_version: int | None = field(default=None, metadata={"help": "Of the file, set on saving."})
    remap: list[list[str]] | None = field(default=None, metadata={"help": "[old, new] parts of module names."})

    def __post_init__(self) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        # NumPy's numbers are taken like Python's, but JSON cannot hold them
        self.__dict__.update({k: v.item() for k, v in vars(self).items() if isinstance(v, np.generic)})
        check_fields(vars(self), "UniProjConfig: ")
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.header: Header | None = None
        self.unsaved: tuple[Mapping[str, Tensor], Header] | None = None  # between PEFT's two writes, see `files`
        self.renames_heads: list[tuple[str, str]] = []  # rows of `remap` that the file does not know yet
        self.takes_other_sizes = False  # while PEFT loads under ignore_mismatched_sizes
        # while PEFT injects: the modules to adapt, each with r and alpha, and those to leave as they are
        self.places: dict[str, tuple[int, Any]] | None = None
        self.left: set[str] = set()
        self._attached: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """The fields, with fingerprint and checksum of the P that this configuration built last."""
        return {**super().to_dict(), **self._attached}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        remap: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> UniProjConfig:
        """The configuration of a saved adapter, after every check of its file that needs no model.

        remap: {old: new} for modules of the base model that were renamed since; both are runs of whole components of
        their names. Raises AdapterError for a file that is not what was saved (see `uniproj.format.file.read`).
        """
        hub, _, _ = cls._split_kwargs(kwargs)
        folder = file.locate(pretrained_model_name_or_path, subfolder, **hub)
        if file.is_template(folder):
            return super().from_pretrained(str(folder))
        saved = file.read(folder)
        if not remap:
            return cls.of_saved(saved, folder)
        if not isinstance(remap, Mapping):
            raise AdapterError(f"{folder}: remap must be a dict {{old: new}}, got {remap!r}. Write it as one.")
        if saved.header is None:
            raise AdapterError(
                f"{folder}: remap needs a file with the list of its modules, got one from before format 1. "
                "Load it on the base model it was trained on and save it again."
            )
        rows = list(remap.items())
        config = cls.of_saved(replace(saved, config=rename(saved.config, saved.header.layout, rows)), folder)
        config.renames_heads = rows
        return config

    @classmethod
    def of_saved(cls, saved: file.SavedAdapter, where: str | Path) -> UniProjConfig:
        """The configuration of an adapter that was read. Raises AdapterError for values that PEFT cannot use."""
        try:
            config: UniProjConfig = cls.from_peft_type(**cls.check_kwargs(**saved.config))
        except (AdapterError, ProjectionError) as error:
            raise AdapterError(f"{Path(where, file.CONFIG)}: {error}") from error
        except Exception as error:  # whatever PEFT raises for a field of another type
            raise AdapterError(
                f"{Path(where, file.CONFIG)}: must be a configuration of {file.KIND}, got {error}. Restore it."
            ) from error
        config.header = saved.header
        return config

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the configuration and the numbers that PEFT saves beside it: both files or none.

        Raises AdapterError beside an adapter_model.bin, and as `uniproj.format.file.write` does.
        """
        folder = Path(save_directory)
        file.refuse_unsafe(folder)
        noted = self.to_dict()
        if (auto_mapping := kwargs.get("auto_mapping_dict")) is not None:
            noted["auto_mapping"] = auto_mapping
        if self.unsaved is None:
            disk.replace({folder / file.CONFIG: file.config_text(noted).encode()})
        else:
            file.write(folder, *self.unsaved, noted)
            self.unsaved = None
