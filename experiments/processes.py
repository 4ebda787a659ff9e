"""Over which processes a run is spread."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Accelerate's word for FSDP2
SHARDED = "ACCELERATE_USE_FSDP"


@dataclass(frozen=True)
class Processes:
    """Over what one run is spread: processes on each of `nodes` machines, of which this is number `node`.

    sharded: each keeps a part of the frozen base (FSDP2) instead of all of it (DDP). address: host:port of the first
    node, where there are several.
    """

    processes: int = 1
    sharded: bool = False
    nodes: int = 1
    node: int = 0
    address: str = ""

    def torchrun(self) -> list[str]:
        """The words between `python -m` and the module of the run; none for a single process."""
        if self.processes * self.nodes == 1:
            return []
        first, port = self.address.split(":") if self.nodes > 1 else ("", "")
        where = (
            [f"--nnodes={self.nodes}", f"--node_rank={self.node}", f"--master_addr={first}", f"--master_port={port}"]
            if self.nodes > 1
            else ["--standalone"]
        )
        return ["torch.distributed.run", f"--nproc_per_node={self.processes}", *where, "-m"]


ALONE = Processes()


def world_size() -> int:
    """How many processes train this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_sharded() -> bool:
    """Whether the frozen base is to be split over them."""
    return world_size() > 1 and os.environ.get(SHARDED, "false").lower() == "true"
