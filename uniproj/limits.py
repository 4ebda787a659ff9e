"""How large an adapter file of unknown origin may be. If you trust the file, raise a limit in Python
(`uniproj.limits.rows = 2**34`) or by an environment variable, read on import (`UNIPROJ_MAX_ROWS=17179869184`).
"""

from __future__ import annotations

import os

from uniproj.errors import AdapterError


def _from_environment(name: str, default: int) -> int:
    variable = f"UNIPROJ_MAX_{name.upper()}"
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or len(text) > 18:
        raise AdapterError(f"{variable}: must be a whole number below 10^18, got {text!r}. Correct or unset it.")
    return int(text)


# the largest D, unless the base model's own D is larger: theta_D then takes 512 MiB in float32, P and its checks a few
# times as much. Llama-2-7B has D = 80e6 with all linear layers at r = 32
rows = _from_environment("rows", 2**27)
# modules of a layout: three times as many as the largest mixtures of experts have
modules = _from_environment("modules", 2**17)
# random numbers drawn for P, D d for a dense one (`Projection.draws`): minutes on a CPU
draws = _from_environment("draws", 2**34)
# bytes of a weights file, which is read into memory: embedding and head of a large model take 4 GiB in float16
file_bytes = _from_environment("file_bytes", 2**33)
# bytes of the JSON header of a weights file: 14 MB for a LoRA of 40,000 modules. Parsed, it takes up to 30 times that
header_bytes = _from_environment("header_bytes", 2**24)
# bytes of a configuration, and of one entry of the header: the full names of 40,000 target modules take 3 MB
config_bytes = _from_environment("config_bytes", 2**22)


def check(limit: str, found: int, what: str, where: str, also: int = 0) -> None:
    """Raises AdapterError where `found` is more than the limit of this name, and more than `also`."""
    most = max(int(globals()[limit]), also)
    if found > most:
        raise AdapterError(
            f"{where}: {what} must be at most {most:,}, got {found:,}. If you trust the file, raise "
            f"uniproj.limits.{limit}, or the variable UNIPROJ_MAX_{limit.upper()} for a command."
        )
