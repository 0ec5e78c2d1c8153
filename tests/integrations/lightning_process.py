"""One of several processes that train with Lightning; started by test_lightning.py, which it imports."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torchvision_stub import declare_operators


def process(rank: int, folder: str, processes: int) -> None:
    """Save the weights after every run of ``test_lightning.RUNS``."""
    declare_operators()  # what conftest.py does for tests
    from integrations.test_lightning import RUNS, train_on_processes

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # tells Lightning not to start processes itself
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    try:
        results = {f"{name} {way}": train_on_processes(rank, name, way) for name, way in RUNS}
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
