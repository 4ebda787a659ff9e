"""Which processes train a run, told by their command lines."""

from pathlib import Path


def training_processes(folder: Path) -> list[int]:
    """Ids of the processes that train a run in this folder or below it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode()
        except OSError:
            continue
        if "experiments.train" in line and str(folder) in line:
            found.append(int(path.parent.name))
    return found
