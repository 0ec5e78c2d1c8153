"""ModelEMA against typed averages and torch's, its swap, its checkpoints; BatchNorm's recalibration."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import piste


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype)


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, ema: piste.ModelEMA | None, steps: int) -> list[Any]:
    """Weights after every step."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(net.parameters()).dtype
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 3, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()
        if ema is not None:
            ema.update()
        seen.append({name: p.detach().double().clone() for name, p in net.named_parameters()})
    return seen


@pytest.mark.parametrize("engine", ["reference", "foreach", "cpp"])
@pytest.mark.parametrize("warmup", [True, False])
def test_the_average(warmup: bool, engine: str) -> None:
    """Float64 against the recursion, typed here; the first update copies."""
    net = model(torch.float64)
    ema = piste.ModelEMA(net, decay=0.9, warmup=warmup, engine=engine)
    seen = trained(net, piste.AdamW(net.parameters(), lr=0.05), ema, 12)
    for name in seen[0]:
        average = seen[0][name]
        for t, row in enumerate(seen[1:], start=1):
            decay = min(0.9, (1 + t) / (10 + t)) if warmup else 0.9
            average = decay * average + (1 - decay) * row[name]
        torch.testing.assert_close(ema.state_dict()["averages"][name], average, rtol=1e-13, atol=1e-14)


def test_parity_with_torch() -> None:
    net = model()
    ema = piste.ModelEMA(net, decay=0.9, warmup=False)
    theirs = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(7):
        trained(net, optimizer, ema, 1)
        theirs.update_parameters(net)
    expected = dict(theirs.module.named_parameters())
    with ema.average():
        for name, p in net.named_parameters():
            torch.testing.assert_close(p, expected[name])


@pytest.mark.parametrize("wrap", [lambda o: o, piste.Lookahead], ids=["alone", "Lookahead"])
def test_does_not_disturb_training(wrap: Any) -> None:
    """Bit by bit the same run with an average beside it, evaluated in between."""
    runs = []
    for with_ema in (False, True):
        net = model()
        optimizer = wrap(piste.Ranger(net.parameters(), lr=0.05))
        ema = piste.ModelEMA(net) if with_ema else None
        for _ in range(4):
            trained(net, optimizer, ema, 3)
            if ema is not None:
                with ema.average() as averaged:
                    averaged.eval()(torch.ones(2, 3))
                net.train()
        runs.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_swap_restores_bits_even_after_an_error() -> None:
    net = model()
    ema = piste.ModelEMA(net, decay=0.5)
    trained(net, piste.SGD(net.parameters(), lr=0.1), ema, 4)
    before = copy.deepcopy(net.state_dict())

    def spoilt() -> None:
        with ema.average():
            assert any(not torch.equal(p, before[name]) for name, p in net.named_parameters())
            for again in (ema.update, ema.average().__enter__):
                with pytest.raises(RuntimeError, match="inside average"):
                    again()
            raise KeyError

    with pytest.raises(KeyError):
        spoilt()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    ema.update()


def test_half_precision_weights_average_in_float32() -> None:
    """A decay of 0.999 moves an average by less than a bfloat16 can show; it must not stand still."""
    net = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    ema = piste.ModelEMA(net, decay=0.999, warmup=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
        ema.update()
        net.weight.fill_(2.0)
        for _ in range(100):
            ema.update()
    average = ema.state_dict()["averages"]["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((1, 4), 2 - 0.999**100), rtol=1e-5, atol=0)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers(buffers: str) -> None:
    net = model()
    ema = piste.ModelEMA(net, decay=0.5, buffers=buffers)  # type: ignore[arg-type]
    trained(net, piste.SGD(net.parameters(), lr=0.1), ema, 3)
    live = net[1].running_mean.clone()
    with ema.average():
        assert torch.equal(net[1].running_mean, live) is (buffers == "copy")
        assert int(net[1].num_batches_tracked) == 3
    assert torch.equal(net[1].running_mean, live)


def test_tied_weights_are_averaged_once() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    net["b"].weight = net["a"].weight
    ema = piste.ModelEMA(net, decay=0.5, warmup=False)
    for value in (1.0, 3.0):
        with torch.no_grad():
            net["a"].weight.fill_(value)
        ema.update()
    with ema.average():
        assert torch.equal(net["b"].weight, torch.full((3, 3), 2.0))


def test_checkpoint() -> None:
    net = model()
    ema = piste.ModelEMA(net, decay=0.9)
    trained(net, piste.SGD(net.parameters(), lr=0.1), ema, 5)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    again = piste.ModelEMA(other, decay=0.9)
    again.load_state_dict(torch.load(file, weights_only=True))
    for weights, one in ((net, ema), (other, again)):
        trained(weights, piste.SGD(weights.parameters(), lr=0.1), one, 3)
    mine, theirs = ema.state_dict(), again.state_dict()
    assert mine["updates"] == theirs["updates"] == 8
    assert all(torch.equal(value, theirs["averages"][name]) for name, value in mine["averages"].items())
    with pytest.raises(ValueError, match="no average of this model"):
        piste.ModelEMA(nn.Linear(2, 2)).load_state_dict(mine)


def test_a_buffer_that_repeats_its_elements() -> None:
    """An expanded buffer has one element in memory, which torch does not write to through the expansion."""
    net = nn.Linear(2, 2)
    net.register_buffer("position", torch.zeros(1, 2).expand(3, 2))
    ema = piste.ModelEMA(net)
    ema.update()
    with torch.no_grad():
        net.position[0].add_(1)  # type: ignore[union-attr, operator]
    with ema.average():
        assert torch.equal(net.position, torch.zeros(3, 2))  # type: ignore[arg-type]
    assert torch.equal(net.position, torch.ones(3, 2))  # type: ignore[arg-type]


def test_a_model_that_changes() -> None:
    """Other precision, a weight more, a weight less: averages follow, and their checkpoint loads."""
    net = nn.Linear(2, 2)
    ema = piste.ModelEMA(net, decay=0.5, warmup=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
        ema.update()
        net.double()
        net.weight.fill_(1 + 2**-40)
        ema.update()
    average = ema.state_dict()["averages"]["weight"]
    assert torch.equal(average, torch.full((2, 2), 1 + 2**-41, dtype=torch.float64))
    net.extra = nn.Parameter(torch.ones(2))
    ema.update()
    assert "extra" in ema.state_dict()["averages"]
    del net.extra
    ema.update()
    piste.ModelEMA(copy.deepcopy(net)).load_state_dict(ema.state_dict())


def test_incomplete_checkpoints_are_refused() -> None:
    net = nn.Linear(2, 2)
    ema = piste.ModelEMA(net)
    ema.update()
    saved = ema.state_dict()
    other = piste.ModelEMA(nn.Linear(2, 2))
    for key, words in (("averages", "no 'averages'"), ("steps", "no 'steps'")):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict({k: v for k, v in saved.items() if k != key})
    with pytest.raises(ValueError, match="number of steps of the average 'weight'"):
        other.load_state_dict({**saved, "steps": {}})
    with pytest.raises(ValueError, match="lacks the average of 'bias'"):
        other.load_state_dict({**saved, "averages": {"weight": saved["averages"]["weight"]}})
    assert other.updates == 0
    assert other.state_dict()["averages"] == {}


def test_copy_to() -> None:
    net = model()
    ema = piste.ModelEMA(net, decay=0.5)
    trained(net, piste.SGD(net.parameters(), lr=0.1), ema, 3)
    twin = model()
    ema.copy_to(twin)
    with ema.average():
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True)
        )
    with pytest.raises(ValueError, match=r"no tensor '0\.weight'"):
        ema.copy_to(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"decay": 1.0}, ValueError, r"ModelEMA got decay=1\.0; legal: a number in \[0, 1\)"),
        ({"buffers": "keep"}, ValueError, "'copy', 'average'"),
        ({"engine": "warp"}, ValueError, "engine='warp'"),
        ({"model": "net"}, TypeError, "model=str"),
    ],
    ids=str,
)
def test_refusals(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        piste.ModelEMA(**{"model": model(), **settings})


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def test_recalibrate_gives_the_statistics_of_all_inputs() -> None:
    """Batches of unequal size count by their examples; other layers are in evaluation mode; modes come back."""
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    data = torch.randn(10, 3, 4, 5, dtype=torch.float64).float() * 3 + 1
    assert piste.recalibrate(net, [(data[:7], "label"), (data[7:], "label")]) == 2
    whole = data.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(net[1].running_mean.double(), whole.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net[1].running_var.double(), whole.var(1), rtol=1e-6, atol=1e-6)
    assert net.training
    assert net[0].training


def test_recalibrate_changes_nothing_when_it_fails() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    before = copy.deepcopy(net.state_dict())

    def broken() -> Any:
        yield torch.randn(4, 3)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        piste.recalibrate(net, broken())
    with pytest.raises(ValueError, match="got no batch"):
        piste.recalibrate(net, [])
    assert not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net[1]._forward_pre_hooks


def test_recalibrate_passes_over_an_empty_batch() -> None:
    net = nn.BatchNorm1d(2)
    data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert piste.recalibrate(net, [data[:0], data]) == 2
    assert torch.equal(net.running_mean, torch.tensor([2.0, 3.0]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recalibrate got model=str"):
        piste.recalibrate("net", [data])  # type: ignore[arg-type]


def test_recalibrate_after_a_schedule_free_run() -> None:
    net = model()
    optimizer = piste.ScheduleFreeSGD(net.parameters(), lr=0.5)
    trained(net, optimizer, None, 5)
    optimizer.eval()
    data = torch.randn(32, 3)
    assert piste.recalibrate(net, [data[:16], data[16:]]) == 2
    torch.testing.assert_close(net[1].running_mean, net[0](data).mean(0), rtol=1e-4, atol=1e-5)
    assert piste.recalibrate(nn.Linear(1, 1), iter(())) == 0
