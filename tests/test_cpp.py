"""The cpp engine beyond the conformance matrix: threads, chunks, forks, orders of memory, and life without it."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import tensors
from conformance.subjects import subjects

import piste
from piste import execution, ops, roster
from piste.engines import cpp, cpp_build, cpp_source
from piste.slots import Pipeline, direction
from piste.storage import State
from piste.symbol import TENSOR, reduced

try:
    cpp_build.toolchain()
    MISSING = ""
except cpp_build.BuildError as error:
    MISSING = str(error)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no C++ compiler: {MISSING}")

#: shapes with every number of axes, some larger than a task of 16,384 elements
SHAPES = [(), (1,), (5,), (3, 4), (40_000,), (7, 1, 5), (64, 3, 7, 7), (300, 301), (2, 20_000), (20_000, 3)]


def make(pipeline: Pipeline) -> type[piste.Optimizer]:
    class Tested(piste.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
            super().__init__(params, {"lr": lr, "c": 0.3}, options)

        @classmethod
        def pipeline(cls, group: Any) -> Pipeline:
            return pipeline

    return Tested


def train(
    build: Callable[..., torch.optim.Optimizer],
    engine: str,
    shapes: list[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda w: w,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    params = [torch.nn.Parameter(arrange(w)) for w in draw]
    optimizer = build(params, engine=engine)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    states = [s for p in params for s in optimizer.state[p].values() if isinstance(s, torch.Tensor)]
    return [p.detach().clone() for p in params] + states


def reductions(ndim_first: tuple[int, ...] = (0,)) -> type[piste.Optimizer]:
    """A rule with every kind: rows, columns, one number per weight, one over all; sums and peaks; small states."""
    vector = State("accumulator", kind=reduced((0,)))
    number = State("accumulator", kind=TENSOR)

    @direction(row=vector, level=number)
    def rule(g: Any, st: Any, hp: Any, ndim: int) -> Any:
        if ndim == 0:
            return g
        row = ops.lerp(st.row, ops.mean(ops.square(g), keep=(0,)), hp.c)
        level = st.level + ops.sum_(row) * 0.01
        column = ops.peak(ops.absolute(g), keep=(ndim - 1,))
        norm = ops.sqrt(ops.total(ops.square(g), "norm"))
        d = g / (ops.sqrt(row) + column + 0.1) + ops.peak(g) / (1 + level) + g / norm
        return d - ops.mean(d, keep=(0,)) if ndim > 1 else d, {"row": row, "level": level}

    return make(Pipeline(direction=rule))


@pytest.fixture
def fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans that no other test has lowered."""
    monkeypatch.setattr(roster, "_PLANS", {})
    monkeypatch.setattr(execution.ENGINES["cpp"], "broken", "")
    return


@pytest.fixture
def tiny_tasks(fresh_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that cut even small weights into many tasks, and wake threads for them."""
    text = cpp_source._headers()
    for name, old, new in (("CHUNK", 16384, 5), ("SHARE", 32768, 2), ("GROUP", 262144, 7), ("SLOTS", 32, 3)):
        assert f"{name} = {old};" in text
        text = text.replace(f"{name} = {old};", f"{name} = {new};")
    monkeypatch.setattr(cpp_source, "_headers", lambda: text)


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_small_tasks_agree_with_the_reference(tiny_tasks: None, threads: int) -> None:
    torch.set_num_threads(threads)
    shapes = [s for s in SHAPES if torch.Size(s).numel() < 2000] + [(2, 9), (9, 2), (4, 3, 2, 5), (1, 6), (6, 1)]
    tolerance = {"rtol": 1e-11, "atol": 1e-12}
    assert_close(
        train(reductions(), "cpp", shapes, torch.float64),
        train(reductions(), "reference", shapes, torch.float64),
        **tolerance,
    )
    for transposed in (False, True):
        arrange = (lambda w: w.t().contiguous().t()) if transposed else (lambda w: w)
        matrices = [(3, 4), (17, 5), (2, 40), (40, 2)]
        assert_close(
            train(reductions(), "cpp", matrices, torch.float64, arrange=arrange),
            train(reductions(), "reference", matrices, torch.float64, arrange=arrange),
            **tolerance,
        )


@pytest.mark.parametrize("keep", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "strided"])
def test_axes_of_convolutions_in_any_order_of_memory(tiny_tasks: None, keep: tuple[int, ...], layout: str) -> None:
    def arrange(w: torch.Tensor) -> torch.Tensor:
        if layout == "channels_last":
            return w.to(memory_format=torch.channels_last)
        if layout == "permuted":
            return w.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
        if layout == "strided":
            return torch.stack([w, w])[0].repeat_interleave(2, dim=3)[..., ::2]
        return w

    @direction(s=State("accumulator", kind=reduced(keep)))
    def rule(g: Any, st: Any, hp: Any) -> Any:
        s = st.s + ops.sum_(ops.square(g), keep=keep)
        return g / ops.sqrt(s) - ops.peak(g, keep=keep), {"s": s}

    shapes = [(4, 3, 2, 5), (2, 1, 3, 3), (1, 6, 1, 4), (5, 2, 4, 1)]
    build = make(Pipeline(direction=rule))
    found = train(build, "cpp", shapes, torch.float64, arrange=arrange)
    assert_close(found, train(build, "reference", shapes, torch.float64, arrange=arrange), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "build",
    [piste.AdamW, piste.Ranger, lambda p, **o: piste.RAdam(p, clip_norm=0.1, **o), reductions()],
    ids=["AdamW", "Ranger", "clipped", "reductions"],
)
def test_the_same_bits_for_any_number_of_threads(build: Callable[..., torch.optim.Optimizer]) -> None:
    results = []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        results.append(train(build, "cpp", steps=7))
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=0)


def test_nan_and_infinity_stay_what_they_are() -> None:
    """Element by element where the reference has them, and nowhere else."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, 1.0])
    for build in (piste.AdamW, piste.AdaBelief, piste.RMSprop, lambda p, **o: piste.Adam(p, amsgrad=True, **o)):
        results = []
        for engine in ("reference", "cpp"):
            p = torch.nn.Parameter(torch.linspace(-1, 1, 8))
            optimizer = build([p], engine=engine)
            for _ in range(3):
                p.grad = special.clone()
                optimizer.step()
            results.append(p.detach())
        torch.testing.assert_close(results[1], results[0], equal_nan=True)
        assert results[0].isnan().any()
        assert results[0].isfinite().any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_steps_alone_and_does_not_hang() -> None:
    torch.set_num_threads(2)
    params = [torch.nn.Parameter(torch.ones(200_000))]
    params[0].grad = torch.ones(200_000)
    optimizer = piste.AdamW(params, engine="cpp")
    optimizer.step()  # the threads of this process are up now
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(300)  # what hangs is ended
        optimizer.step()
        os.write(writer, _digest(params[0]))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    optimizer.step()
    assert os.read(reader, 100) == _digest(params[0]), "the child's step is the parent's, bit by bit"


def _digest(p: torch.Tensor) -> bytes:
    return hashlib.sha256(p.detach().numpy().tobytes()).digest()


def test_weights_that_move_between_steps() -> None:
    """`.data` swapped for other memory, for other formats, and gradients of another order: as the reference has it."""
    results = []
    for engine in ("reference", "cpp"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(6, 5, generator=generator)) for _ in range(3)]
        optimizer = piste.AdamW(params, engine=engine)
        for step in range(9):
            for p in params:
                p.grad = None
            if step == 2:
                params[0].data = params[0].data.clone()
            if step == 4:
                params[1].data = params[1].data.t().contiguous().t()
            if step == 6:
                params[2].data = params[2].data.double()
            for i, p in enumerate(params):
                g = torch.randn(6, 5, generator=generator).to(p.dtype)
                if (step + i) % 4 != 3:
                    p.grad = g.t().contiguous().t() if step % 2 else g
            optimizer.step()
        results.append([p.detach() for p in params])
    assert_close(results[1], results[0])


def test_a_weight_replaced_by_one_of_another_size_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    optimizer = piste.AdamW([p], engine="cpp")
    optimizer.step()
    p.grad = torch.ones(8)
    p.data = torch.ones(3)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0, 1.0]


SHARDED = """
import os, torch, piste
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = DeviceMesh("cpu", [0])
results = []
for engine in ("foreach", "cpp"):
    p = torch.nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
    optimizer = piste.AdamW([p, torch.nn.Parameter(torch.ones(3))], engine=engine)
    optimizer.step()
    results.append(p.full_tensor().detach())
assert torch.equal(*results) and results[0][0, 0] < 1
torch.distributed.destroy_process_group()
"""


def test_sharded_weights_beside_whole_ones() -> None:
    """A DTensor has no address of its own; a kernel that took it for one would end the process."""
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("options", [{}, {"state": "8bit"}], ids=["plain", "codes"])
def test_states_that_take_turns_share_a_kernel(options: dict[str, Any]) -> None:
    """Odd and even steps of positive-negative momentum differ in nothing but which buffer is which."""
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = piste.PNM([p], engine="cpp", **options)
    for _ in range(2):
        p.grad = torch.ones(5000)
        optimizer.step()
    parts = [part for layout in optimizer._roster.layouts.values() for part in layout]
    assert len({part.seats.plan for part in parts}) == 2
    assert len({part.seats.kept["cpp"].kernels.source for part in parts}) == 1


def test_nothing_grows_over_thousands_of_steps() -> None:
    params = [torch.nn.Parameter(torch.ones(16)) for _ in range(4)]
    optimizer = piste.Ranger(params, engine="cpp")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))

    def go(steps: int) -> None:
        for step in range(steps):
            for i, p in enumerate(params):
                p.grad = torch.ones(16) if step % 7 != i else None
            optimizer.step()
            scheduler.step()

    go(100)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    go(5000)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 500_000, f"{grown} bytes more after 5,000 steps"


def test_auto_says_once_what_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    execution._fastest.cache_clear()
    with caplog.at_level(logging.INFO, "piste"):
        assert execution.engine_for("auto").name == execution.engine_for("auto").name == "cpp"
    (message,) = [r.getMessage() for r in caplog.records]
    assert "engine='auto' takes 'cpp'" in message


def test_auto_without_a_compiler(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise cpp_build.BuildError("no compiler on the path")

    monkeypatch.setattr(cpp_build, "toolchain", none)
    execution._fastest.cache_clear()
    with caplog.at_level(logging.INFO, "piste"):
        assert execution.engine_for("auto").name == execution.engine_for("auto").name == "foreach"
    (message,) = [r.getMessage() for r in caplog.records]
    assert "'foreach'" in message
    assert "no compiler on the path" in message
    execution._fastest.cache_clear()


def test_foreach_takes_over_when_a_build_fails(
    fresh_plans: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fails(source: str, what: str = "") -> None:
        asked.append(what)
        raise cpp_build.BuildError("the compiler went away")

    monkeypatch.setattr(cpp_build, "library", fails)
    small = [(3, 4), (5,)]
    found = train(piste.Ranger, "cpp", small, steps=7)
    assert_close(found, train(piste.Ranger, "foreach", small, steps=7), rtol=0, atol=0)
    assert len(asked) == 1, "a compiler that failed is not asked for every plan"
    (message,) = [r.getMessage() for r in caplog.records]
    assert "foreach" in message
    assert "the compiler went away" in message


def test_more_axes_than_kernels_follow() -> None:
    """Nine axes and a reduction that keeps one: another engine's work; without axes it does not matter."""
    shapes = [(2,) * 9]
    for build in (reductions(), piste.AdamW):
        assert_close(train(build, "cpp", shapes, torch.float64), train(build, "reference", shapes, torch.float64))


def test_the_source_can_be_read() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = piste.AdamW([weight])
    optimizer.step()
    ((part,),) = optimizer._roster.layouts.values()
    assert "#pragma omp simd" in cpp.source(part.seats.plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "Ranger21", "Adafactor", "SM3", "Lamb", "Prodigy"])
def test_the_matrix_with_two_threads(name: str) -> None:
    """The cells of the conformance matrix whose weights are large enough to be shared out to threads, for a rule of
    each kind of loop: element by element, with sums and peaks that keep axes, of a weight and of all.

    All other cells have one thread, and their small weights would wake no other. That threads change no bit is what
    `test_many_small_tasks_agree_with_the_reference` and `test_the_same_bits_for_any_number_of_threads` hold to.
    """
    torch.set_num_threads(2)
    tensors.large_weights(next(subject for subject in subjects() if subject.name == name), "cpp")


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="reads the assembly of x86")
@pytest.mark.parametrize("name", ["AdamW", "Ranger21", "Adafactor", "Lamb", "Prodigy"])
def test_every_loop_over_elements_is_vectorised(name: str, tmp_path: Path) -> None:
    """A loop that a compiler gives up on is right and ten times slower, which no other test would see."""
    weight = torch.nn.Parameter(torch.randn(64, 32))
    optimizer = getattr(piste, name)([weight], engine="cpp")
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    plan = next(iter(optimizer._roster.layouts.values()))[0].seats.plan
    source = cpp.source(plan)
    (tmp_path / "kernel.cpp").write_text(source)
    chain = cpp_build.toolchain()
    subprocess.run(
        [*chain.command, *chain.flags, "-S", "kernel.cpp", "-o", "kernel.s"], cwd=tmp_path, check=True, timeout=600
    )
    bodies = re.findall(r"^static ONCE void (\w+)\((.*?)^}", source, re.MULTILINE | re.DOTALL)
    loops = [body for body, text in bodies if "#pragma omp simd" in text]
    assert loops
    assembly = (tmp_path / "kernel.s").read_text()
    for body in loops:
        found = re.search(rf"^\w*{body}[\w.]*:\n(.*?)\.cfi_endproc", assembly, re.MULTILINE | re.DOTALL)
        assert found is not None, f"{body} has gone into another function"
        assert re.search(r"\tv?(mul|add|sub|max|div|sqrt)p[sd]\t", found[1]), f"{body} works on single numbers"


@pytest.mark.parametrize("name", ["Adafactor", "SM3"])
def test_rows_taken_together_are_what_they_are_one_by_one(name: str) -> None:
    """Numbers of rows that groups do not divide, of one row, of more than two axes; the reference engine is the oracle.

    It is asked in float32: beside float64 the rounding of the largest weight, which both engines share, hides the rest.
    """
    shapes = [(37, 130), (1, 50), (9, 5, 3, 3), (11, 13, 17), (34, 2100)]
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    found = {}
    for engine in ("cpp", "reference"):
        weights = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = getattr(piste, name)(weights, engine=engine, lr=1e-2)
        gradients = torch.Generator().manual_seed(6)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=gradients)
            optimizer.step()
        found[engine] = weights
        if engine == "cpp":
            plan = next(iter(optimizer._roster.layouts.values()))[0].seats.plan
            assert re.search(r"_rows\d\(", cpp.source(plan)), "no rows are taken together: this test sees nothing"
    for ours, theirs in zip(found["cpp"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
