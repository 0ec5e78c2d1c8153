"""A process that is killed in the middle of training: what the others are told, and what is left to go on from."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import piste

BATCH, SAVED, KILLED, STEPS = 8, 2, 4, 6  # of steps: a checkpoint after two, a death in the fourth
VICTIM = 2

pytestmark = pytest.mark.slow  # six processes that import torch


def ready(mesh: Any = None) -> tuple[nn.Module, piste.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    if mesh is not None:
        model = fully_shard(model, mesh=mesh)
    return model, piste.Muon(piste.Muon.groups(model), lr=0.01)


def backward(model: nn.Module, step: int, rank: int = 0, size: int = 1) -> None:
    """Gradients of this process's share of the batch."""
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, n, generator=generator, dtype=torch.float64).chunk(size)[rank] for n in (6, 3))
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def contents(model: nn.Module, optimizer: piste.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def finished(model: nn.Module, optimizer: piste.Optimizer, folder: Path, rank: int = 0, size: int = 1) -> Any:
    """The weights at the end of a run that goes on from the checkpoint."""
    state = contents(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "checkpoint", no_dist=size == 1)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for step in range(SAVED, STEPS):
        backward(model, step, rank, size)
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def process(rank: int, size: int, folder: Path) -> None:
    """Four train until one is killed between backward and step; two go on."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group{size}", rank=rank, world_size=size, timeout=timedelta(seconds=600)
    )
    model, optimizer = ready(init_device_mesh("cpu", (size,)))
    if size == 2:
        torch.save(finished(model, optimizer, folder, rank, size), folder / f"resumed{rank}.pt")
        dist.destroy_process_group()
        return
    for step in range(STEPS):
        backward(model, step, rank, size)
        if step == KILLED:
            (folder / f"gradients{rank}").touch()  # no barrier: a death might still reach others inside of it
            if rank == VICTIM:
                while len(list(folder.glob("gradients*"))) < size:  # it is the step that misses somebody
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            optimizer.step()
        except RuntimeError as error:
            (folder / f"words{rank}").write_text(str(error))
            os._exit(3)
        if step == SAVED - 1:
            dcp.save(contents(model, optimizer), checkpoint_id=folder / "checkpoint")


def launch(size: int, folder: Path) -> list[int | None]:
    """Exit codes of so many processes; none is stopped because another one failed.

    They wait for each other longer than is waited for them: a death is noticed at once, or not at all.
    """
    context = torch.multiprocessing.get_context("spawn")
    started = [context.Process(target=process, args=(rank, size, folder)) for rank in range(size)]
    for one in started:
        one.start()
    for one in started:
        one.join(300)
    late = [one for one in started if one.exitcode is None]
    for one in late:
        one.kill()
    assert not late, "a process still waits for the one that is dead"
    return [one.exitcode for one in started]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # so it is, in the one process that goes on alone
def test_a_killed_process_ends_the_others_and_two_go_on(tmp_path: Path) -> None:
    codes = launch(4, tmp_path)
    assert codes == [-signal.SIGKILL if rank == VICTIM else 3 for rank in range(4)]
    for rank in (0, 1, 3):
        words = (tmp_path / f"words{rank}").read_text()
        assert words.startswith("a step that shares matrix work needs all 4 processes")
        assert "start again from the last checkpoint" in words
    assert launch(2, tmp_path) == [0, 0]
    expected = finished(*ready(), tmp_path)
    for rank in range(2):
        for found, value in zip(torch.load(tmp_path / f"resumed{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)  # halves of a batch in float64
