"""`python -m uniproj restore PATH`: adapter_config.json again, from the header of the weights."""

from __future__ import annotations

from pathlib import Path

from uniproj.format import disk, file
from uniproj.tuner.config import UniProjConfig


def restore(folder: str | Path) -> UniProjConfig:
    """Write `adapter_config.json` again, from the header of the weights.

    For a configuration that was edited or lost, or is still the old one because a crash fell between the two renames.
    Raises AdapterError as `uniproj.format.file.of_weights` does.
    """
    config = UniProjConfig.of_saved(file.of_weights(folder), folder)
    disk.replace({Path(folder, file.CONFIG): file.config_text(config.to_dict()).encode()})
    return config
