"""What a file from elsewhere may cost. Whoever trusts it raises a limit, here (`uniproj.limits.rows = 2**34`) or by a
variable of the environment that is read on import (`UNIPROJ_MAX_ROWS=17179869184`).
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


# D of a layout, where no base model tells a larger one: theta_D takes 512 MiB in float32, and what P holds and what
# checks it a few times that. Llama-2-7B has D = 80e6 with all linear layers at r = 32
rows = _from_environment("rows", 2**27)
# of a layout: three times the experts' layers of the largest mixtures
modules = _from_environment("modules", 2**17)
# random numbers that P takes beyond D + d, as a dense one does: minutes on a CPU
draws = _from_environment("draws", 2**34)
# of a file of weights, which is held in memory: the embedding and head of a large model in float16 have 4 GiB
file_bytes = _from_environment("file_bytes", 2**33)
# of the JSON at its beginning: 40,000 modules of a LoRA take 14 MB. Python holds JSON in up to 30 times its bytes
header_bytes = _from_environment("header_bytes", 2**24)
# of a configuration, and of a line of the header: 40,000 target modules by their whole names take 3 MB
config_bytes = _from_environment("config_bytes", 2**22)


def check(limit: str, found: int, what: str, where: str, also: int = 0) -> None:
    """Raises AdapterError where `found` is more than the limit of this name, and more than `also`."""
    most = max(int(globals()[limit]), also)
    if found > most:
        raise AdapterError(
            f"{where}: {what} must be at most {most:,}, got {found:,}. If you trust the file, raise "
            f"uniproj.limits.{limit}, or the variable UNIPROJ_MAX_{limit.upper()} for a command."
        )
