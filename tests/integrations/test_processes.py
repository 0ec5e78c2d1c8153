"""A Trainer and accelerate on two real processes: together they make the steps of one with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

PROCESSES, STEPS, BATCH = 2, 4, 8
SETTINGS: dict[str, Any] = {"lr": 0.1, "rho": 0.3, "engine": "reference"}
NAMES = ("sam+sgd_momentum", "gsam+adamw")

pytestmark = pytest.mark.slow  # two processes that import transformers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(STEPS * BATCH, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def by_trainer(name: str, share: int, folder: str) -> list[Tensor]:
    from transformers import TrainingArguments

    from piste.integrations.transformers import SharpnessTrainer, trainer_kwargs

    args = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // share // 2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = Net()
    trainer = SharpnessTrainer(model, args, train_dataset=rows(), **trainer_kwargs(name, model, args, **SETTINGS))
    assert trainer.accelerator.num_processes == share
    trainer.train()
    return [p.detach().clone() for p in model.parameters()]


def by_accelerate(name: str, share: int, rank: int, perturbation: str) -> list[Tensor]:
    from accelerate import Accelerator

    import piste
    from piste.integrations.accelerate import sharpness_step

    accelerator, net, data = Accelerator(cpu=True), Net(), rows()
    model, optimizer = accelerator.prepare(net, piste.create(name, net, **SETTINGS))
    for t in range(STEPS):
        mine = data[t * BATCH : (t + 1) * BATCH][rank::share]
        batch = {key: torch.stack([row[key] for row in mine]) for key in ("x", "y")}
        sharpness_step(
            accelerator,
            optimizer,
            model,
            lambda model, b: model(**b)["loss"],
            batch,
            clip=0.5,
            perturbation=perturbation,
        )
    return [p.detach().clone() for p in net.parameters()]


def runs(share: int, rank: int, folder: str) -> dict[str, list[Tensor]]:
    found = {f"{name} trainer": by_trainer(name, share, folder) for name in NAMES}
    for way in ("averaged", "local"):
        found |= {f"{name} {way}": by_accelerate(name, share, rank, way) for name in NAMES}
    return found


def process(rank: int, folder: str) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, but not used by who finds a group
    os.environ |= {**address, "WORLD_SIZE": str(PROCESSES), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    from torchvision_stub import declare_operators

    declare_operators()
    torch.set_num_threads(1)
    # Here, as both frameworks would by a port that another process may have taken meanwhile.
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    torch.save(runs(PROCESSES, rank, folder), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), PROCESSES)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(PROCESSES))
    alone = runs(1, 0, str(tmp_path))
    for key, expected in alone.items():
        for a, b, c in zip(first[key], second[key], expected, strict=True):
            assert a.equal(b), key
            if "local" in key:  # another algorithm: each climbs with its own gradient
                assert not torch.allclose(a, c, rtol=1e-5, atol=1e-5), key
            else:
                torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)
