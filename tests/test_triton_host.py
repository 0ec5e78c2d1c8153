"""What the triton engine does on the host: what it sends and when, which kernel it takes, what it never waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import interpreter
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import piste
from piste.engines import triton as engine
from piste.engines import triton_upload

pytestmark = interpreter.MARKS


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """With gradients."""
    made = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def kept(optimizer: piste.Optimizer) -> dict[Any, Any]:
    """What the engine keeps of the only bucket."""
    ((part,),) = optimizer._roster.layouts.values()
    return part.seats.kept


def uploads(optimizer: piste.Optimizer, what: str = "table") -> int:
    """How often tables, or ``numbers``, were sent."""
    own = [(key[1], one) for key, one in kept(optimizer).items() if isinstance(one, triton_upload.Upload)]
    return sum(one.times for name, one in own if what in name)


# --- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [piste.AdamW, piste.Lamb, piste.StableAdamW], ids=lambda m: m.__name__)
def test_a_table_is_sent_when_it_differs(make: Any) -> None:
    """Not for gradients that are filled anew, nor for norms of whole weights and models; once when a gradient moved."""
    params = weights((3, 2), (4,))
    optimizer = make(params, engine="triton", clip_norm=1.0)
    optimizer.step()
    first = uploads(optimizer)
    for _ in range(3):
        for p in params:
            p.grad.mul_(2)
        optimizer.step()
    assert uploads(optimizer) == first > 0
    held = [p.grad for p in params]  # so that their memory is not used again
    params[1].grad = torch.randn_like(params[1])
    optimizer.step()
    reads_gradients = sum(c.source == "home" and c.key == "g" for step in steps(optimizer) for c in step.columns)
    assert uploads(optimizer) == first + reads_gradients
    params[1].grad = held[1]
    optimizer.step()
    assert uploads(optimizer) == first + 2 * reads_gradients


def steps(optimizer: piste.Optimizer) -> list[Any]:
    return [step for stage in kept(optimizer)["triton"].kernels.stages for step in stage]


def test_one_upload_for_a_gradient_that_moved() -> None:
    """AdamW has one pass, and so one table, for all weights."""
    params = weights((3, 2), (4,))
    optimizer = piste.AdamW(params, engine="triton")
    for expected in (1, 1, 2):
        if expected == 2:
            params[0].grad, held = torch.randn(3, 2), params[0].grad
        optimizer.step()
        assert uploads(optimizer) == expected
    assert held is not None


def test_a_weight_that_moved_is_noticed() -> None:
    params = weights((5,), (4,))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizers = [piste.AdamW(own, lr=0.1, engine="triton") for own in (params, twins)]
    for step in range(3):
        for p, twin in zip(params, twins, strict=True):
            p.grad = twin.grad = torch.randn_like(p)
        if step == 1:
            held = params[0].data
            params[0].data = held.clone()
            held.fill_(float("nan"))
        for optimizer in optimizers:
            optimizer.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)


def test_host_numbers_are_sent_when_they_differ() -> None:
    """SGD's are its settings; AdamW's bias corrections are others in every step."""
    for make, times in ((piste.SGD, [1, 1, 2, 2]), (piste.AdamW, [1, 2, 3, 4])):
        optimizer = make(weights((3, 2)), lr=0.1, engine="triton")
        found = []
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 if step < 2 else 0.05
            optimizer.step()
            found.append(uploads(optimizer, "numbers"))
        assert found == times


class Event:
    """Stands for an event of CUDA whose copy is done when the test says so."""

    def __init__(self) -> None:
        self.done, self.recorded, self.waited = False, 0, 0

    def record(self) -> None:
        self.done = False
        self.recorded += 1

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited += 1


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    made: list[Event] = []

    def piece(like: torch.Tensor, device: torch.device) -> triton_upload.Piece:
        made.append(Event())
        return triton_upload.Piece(torch.empty_like(like), made[-1])

    monkeypatch.setattr(triton_upload, "_piece", piece)
    return made


def test_pinned_memory_is_used_again_when_the_device_has_taken_it(events: list[Event]) -> None:
    upload = triton_upload.Upload(torch.device("cpu"))
    for i in range(3):
        upload.send(i, lambda i=i: torch.tensor([i, i]), 0)
    assert len(events) == 3  # no copy is done: each has memory of its own
    events[0].done = True
    there = upload.send(3, lambda: torch.tensor([3, 3]), 0)
    assert there.tolist() == [3, 3]
    assert len(events) == 3
    assert [event.recorded for event in events] == [2, 1, 1]


def test_python_waits_only_when_it_is_many_steps_ahead(events: list[Event]) -> None:
    upload = triton_upload.Upload(torch.device("cpu"))
    for i in range(triton_upload.MOST_PIECES):
        upload.send(i, lambda i=i: torch.tensor([i]), 0)
    assert not any(event.waited for event in events)
    upload.send(-1, lambda: torch.tensor([-1]), 0)
    assert [event.waited for event in events] == [1] + [0] * (triton_upload.MOST_PIECES - 1)


def test_what_a_recorded_step_sends_has_memory_of_its_own(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay copies again, from and to where it did when it was recorded: nobody may write there. While a graph is
    recorded, the device may not be asked for anything, nor for pinned memory."""
    upload = triton_upload.Upload(torch.device("cpu"), recordable=True)
    eager = upload.send("before", lambda: torch.tensor([0, 0]), 0)
    made = len(events)
    for event in events:
        event.done = True
    with monkeypatch.context() as patch:
        patch.setattr(triton_upload, "recording", lambda: True)
        for name in ("query", "synchronize", "record"):
            patch.setattr(Event, name, lambda self: pytest.fail("the device was asked for something"))
        there = upload.send("before", lambda: torch.tensor([1, 1]), 0)
    assert len(events) == made
    for i in range(3 * triton_upload.MOST_PIECES):
        for event in events:
            event.done = True
        assert upload.send(i, lambda i=i: torch.tensor([i, i]), 0) is eager
    ((piece, table),) = upload.recorded
    assert table is there is not eager
    assert piece.memory.tolist() == there.tolist() == [1, 1]


def test_every_recorded_step_has_its_own(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a step between two of them, which would lay memory by; and none is laid by that nobody records."""
    upload = triton_upload.Upload(torch.device("cpu"), recordable=True)
    upload.send(0, lambda: torch.tensor([0]), 0)
    with monkeypatch.context() as patch:
        patch.setattr(triton_upload, "recording", lambda: True)
        one, other = (upload.send(0, lambda i=i: torch.tensor([i]), 0) for i in (1, 2))
    assert [piece.memory.item() for piece, _ in upload.recorded] == [one.item(), other.item()] == [1, 2]
    made = len(events)
    upload.send(0, lambda: torch.tensor([0]), 0)
    assert len(events) == made + 1  # for the next recording, though nothing was sent
    events.clear()
    triton_upload.Upload(torch.device("cpu")).send(0, lambda: torch.tensor([0]), 0)
    assert len(events) == 1


def test_tables_of_a_recorded_step_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every pass, with the host numbers; steps outside of the graph, with other gradients, leave them alone."""
    params = weights((3, 2), (4,))
    optimizer = piste.Lamb(params, engine="triton", capturable=True)
    optimizer.step()
    with monkeypatch.context() as patch:
        for module in ("piste.engines.triton", "piste.engines.triton_upload", "piste.optimizer", "piste.roster"):
            patch.setattr(f"{module}.recording", lambda: True)
        optimizer.step()
    own = [one for one in kept(optimizer).values() if isinstance(one, triton_upload.Upload)]
    assert len(own) > 1
    recorded = [(table, table.clone()) for upload in own for _, table in upload.recorded]
    assert len(recorded) == len(own)
    held = [p.grad for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert held
    assert all(torch.equal(table, before) for table, before in recorded)


def test_another_stream_has_a_table_of_its_own() -> None:
    """Overwriting the one that kernels of the first stream may still read would need a wait."""
    upload = triton_upload.Upload(torch.device("cpu"))
    one = upload.send("same", lambda: torch.tensor([7]), 1)
    assert upload.send("same", lambda: torch.tensor([7]), 1) is one
    other = upload.send("same", lambda: torch.tensor([7]), 2)
    assert other.data_ptr() != one.data_ptr()
    assert one.tolist() == other.tolist() == [7]


# --- which kernel ----------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the main kernels that are launched."""
    found: list[dict[str, Any]] = []
    run = engine._run

    def noted(*arguments: Any) -> None:
        names = ("kernel", "tiles", "table", "n", "axes", "numbers", "parts", "aligned")
        found.append(dict(zip(names, arguments, strict=True)))
        run(*arguments)

    monkeypatch.setattr(engine, "_run", noted)
    return found


@pytest.mark.parametrize("make", [piste.AdamW, piste.Lamb], ids=lambda m: m.__name__)
@pytest.mark.parametrize("odd", [None, "weight", "gradient"])
def test_wide_loads_where_all_tensors_begin_at_16_bytes(launches: list[Any], make: Any, odd: str | None) -> None:
    """Norms, one number after the other for all weights, do not matter: nobody walks through them."""
    memory = torch.randn(2, 12)
    assert memory.data_ptr() % 16 == 0
    p = torch.nn.Parameter(memory[0, 1:9] if odd == "weight" else memory[0, :8])
    p.grad = memory[1, 1:9] if odd == "gradient" else memory[1, :8]
    other = weights((3,))
    ours, twins = [p, *other], [torch.nn.Parameter(x.detach().clone()) for x in (p, *other)]
    for x, twin in zip(ours, twins, strict=True):
        twin.grad = x.grad.clone()
    make(ours, engine="triton").step()
    large = [launch["aligned"] for launch in launches if launch["kernel"] is not None]
    assert large[0] is (odd is None)
    if odd is None:
        assert all(large)
    make(twins, engine="reference").step()
    for x, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(x, twin, rtol=1e-6, atol=1e-7)


def test_offsets_of_64_bits(launches: list[Any]) -> None:
    """A tile beyond two thousand million elements: its tensors are as far before where it says as the tile is in."""
    p = weights((1024,))[0]
    twin = torch.nn.Parameter(p.detach().clone())
    twin.grad = p.grad.clone()
    optimizer = piste.AdamW([p], lr=0.1, engine="triton")
    optimizer.step()
    launch = launches[0]
    table, number = launch["table"].clone(), 3 * 2**22  # tiles of 1,024: element 3 * 2**32
    columns = len(steps(optimizer)[0].columns)
    table[0] += number * 1024
    table[2 : 2 + columns] -= number * 1024 * 4
    tiles = launch["tiles"]._replace(map=torch.tensor([0, number]))
    kept(optimizer)["triton", "numbers"].there.copy_(numbers_of_step(2))
    before = p.detach().clone()
    engine._run(launch["kernel"], tiles, table, 1, 0, launch["numbers"], launch["parts"], launch["aligned"])
    assert not torch.equal(before, p)
    reference = piste.AdamW([twin], lr=0.1, engine="triton")
    reference.step()
    reference.step()
    assert torch.equal(p, twin)


def numbers_of_step(step: int) -> torch.Tensor:
    """AdamW's host numbers in a later step, from an optimizer that takes it."""
    optimizer = piste.AdamW(weights((2,)), lr=0.1, engine="triton")
    for _ in range(step):
        optimizer.step()
    return kept(optimizer)["triton", "numbers"].there


_SPECIALIZED = """
import torch, piste
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from piste.engines import triton as engine

engine.works_on = lambda device: True
backend, binders, keys = CUDABackend(GPUTarget("cuda", 90, 32)), {}, set()

class Launched:
    # takes a launch as Triton does, up to the key under which it looks for a compiled kernel
    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            f = self.function
            if f not in binders:
                binders[f] = create_function_from_signature(f.signature, f.params, backend)
            _, specialization, chosen = binders[f](*arguments, debug=False, **options)
            keys.add((id(f), str(specialization), str(chosen)))
        return launch

kernel, math = engine._kernel, engine._math()
engine._kernel = lambda *given: engine._Kernel(*[
    part and (Launched(part) if i == 0 else [(r, Launched(k)) for r, k in part])
    for i, part in enumerate(kernel(*given))])
math.finish = Launched(math.finish)

grown = {}
for make in (piste.AdamW, piste.Ranger, piste.Lamb):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(40,), (3, 5), (2000,)]]
    optimizer = make(params, lr=1.0, engine="triton", clip_norm=1.0)
    for step in range(1000):
        group = optimizer.param_groups[0]
        group["lr"], group["betas"] = 1 / (step + 1), (0.9 - step * 1e-4, 0.999 - step * 1e-6)
        group["weight_decay"] = step * 1e-3
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        if step == 20:
            known = len(keys)
    grown[make.__name__] = known, len(keys) - known
print(grown)
"""


def test_a_thousand_scheduled_steps_compile_nothing_new() -> None:
    """Triton's own key of a compiled kernel, for a GPU that is not there, of every launch of three optimizers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", _SPECIALIZED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    grown = eval(done.stdout)
    assert set(grown) == {"AdamW", "Ranger", "Lamb"}
    for known, more in grown.values():
        assert known > 0
        assert more == 0, grown


# --- reductions ------------------------------------------------------------------------------------------------------


def clipped(order: list[int]) -> list[torch.Tensor]:
    """Weights in two formats, hence buckets, after steps whose clipping feels the norm of all of them."""
    numbers = torch.Generator().manual_seed(3)
    shapes = [((700,), torch.float32), ((33, 40), torch.bfloat16), ((3000,), torch.float64), ((9,), torch.float16)]
    params = [torch.nn.Parameter(torch.randn(s, generator=numbers).to(d)) for s, d in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=numbers) * 10).to(p.dtype)
    optimizer = piste.AdamW([params[i] for i in order], lr=0.1, clip_norm=0.1, engine="triton")
    for _ in range(2):
        optimizer.step()
    return [p.detach() for p in params]


def test_sums_have_the_same_bits_every_time_and_in_every_order_of_buckets() -> None:
    first = clipped([0, 1, 2, 3])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        for a, b in zip(first, clipped(order), strict=True):
            assert torch.equal(a, b)


class NoWaiting(TorchDispatchMode):
    """Whatever brings a number from the device to Python, and so waits for it, is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        }, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (piste.AdamW, {"clip_norm": 1.0}),
        (piste.Lamb, {"clip_norm": 1.0}),
        (piste.Ranger21, {"total_steps": 100}),
        (piste.Adafactor, {}),
        (piste.StableAdamW, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_norms_never_come_to_the_host(make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights((3, 2), (4,))
    optimizer = make(params, engine="triton", **options)
    before = [p.detach().clone() for p in params]

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor was brought to the host")

    for name in ("tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with NoWaiting():
        for _ in range(3):
            optimizer.step()
    monkeypatch.undo()
    assert all(not torch.equal(b, p) for b, p in zip(before, params, strict=True))


def test_what_would_wait_is_seen() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(()).item()


def test_a_default_device_changes_nothing() -> None:
    """``torch.set_default_device("cuda")`` is what many scripts begin with; what is made for the host stays there."""
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        params = weights((33, 40), (5000,))
        with torch.device(device):
            optimizer = piste.Lamb(params, lr=0.1, engine="triton", state="8bit")
            for _ in range(2):
                optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
