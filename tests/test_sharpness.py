"""Sharpness-aware steps against formulas typed from the papers, and what they do when something goes wrong."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piste

ENGINES = ["reference", "foreach", "cpp"]
STEPS = 22
RATE, MOMENTUM, RHO = 0.05, 0.9, 0.3


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 2)).double()


def batch(t: int, n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + t)
    return (
        torch.randn(n, 5, generator=generator, dtype=torch.float64),
        torch.randn(n, 2, generator=generator, dtype=torch.float64),
    )


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def inner(model: nn.Module, engine: str = "auto", **options: Any) -> torch.optim.Optimizer:
    return piste.SGD(model.named_parameters(), lr=RATE, momentum=MOMENTUM, engine=engine, **options)


# the papers, typed a second time: lists of arrays, one for each weight

Vectors = list[Tensor]


def dot(a: Vectors, b: Vectors) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def ascent(kind: str, w: Vectors, g: Vectors, names: list[str], rho: float) -> Vectors:
    if kind == "relative":
        return [rho * x.norm() * y / y.norm() for x, y in zip(w, g, strict=True)]
    if kind == "gsam":
        return [rho * x.abs() * y / dot(g, g).sqrt() for x, y in zip(w, g, strict=True)]
    scale = {
        "sam": lambda x, name: torch.ones_like(x),
        "asam": lambda x, name: x.abs() + 0.01 if "weight" in name else torch.ones_like(x),
        "elementwise": lambda x, name: x.abs(),
        "layerwise": lambda x, name: torch.full_like(x, float(x.norm())),
    }[kind]
    t = [scale(x, name) for x, name in zip(w, names, strict=True)]
    tg = [a * b for a, b in zip(t, g, strict=True)]
    return [rho * a**2 * b / dot(tg, tg).sqrt() for a, b in zip(t, g, strict=True)]


def sam(g: Vectors, perturbed: Callable[[], Vectors], memory: dict[str, Any], t: int) -> Vectors:
    return perturbed()


def gsam(alpha: float) -> Any:
    def combined(g: Vectors, perturbed: Callable[[], Vectors], memory: dict[str, Any], t: int) -> Vectors:
        gp = perturbed()
        share = dot(g, gp) / dot(gp, gp)
        return [y - alpha * (x - share * y) for x, y in zip(g, gp, strict=True)]

    return combined


def gsam_of_clean(alpha: float) -> Any:
    def combined(g: Vectors, perturbed: Callable[[], Vectors], memory: dict[str, Any], t: int) -> Vectors:
        gp = perturbed()
        share = dot(g, gp) / dot(g, g)
        return [x + alpha * (y - share * x) for x, y in zip(g, gp, strict=True)]

    return combined


def looksam(k: int, alpha: float, each: bool) -> Any:
    def combined(g: Vectors, perturbed: Callable[[], Vectors], memory: dict[str, Any], t: int) -> Vectors:
        parts = [[i] for i in range(len(g))] if each else [list(range(len(g)))]
        out: Vectors = list(g)
        if t % k == 0:
            gs = perturbed()
            memory["v"] = list(gs)
            for part in parts:
                a, b = [gs[i] for i in part], [g[i] for i in part]
                share = dot(a, b) / dot(b, b)
                for i in part:
                    memory["v"][i], out[i] = gs[i] - share * g[i], gs[i]
            return out
        for part in parts:
            a, b = [g[i] for i in part], [memory["v"][i] for i in part]
            share = dot(a, a).sqrt() / dot(b, b).sqrt()
            for i in part:
                out[i] = g[i] + alpha * share * memory["v"][i]
        return out

    return combined


def by_hand(kind: str, combine: Any, rho: Callable[[int], float], interval: int = 1) -> list[Tensor]:
    """Heavy-ball SGD on a model with BatchNorm, whose statistics move in the first pass only."""
    model = net()
    names, weights = zip(*model.named_parameters(), strict=True)
    velocity: Vectors = []
    memory: dict[str, Any] = {}
    for t in range(STEPS):
        g = list(torch.autograd.grad(loss_of(model, batch(t)), weights))

        def perturbed(t: int = t, g: Vectors = g) -> Vectors:
            e = ascent(kind, [p.detach() for p in weights], g, list(names), rho(t))
            moved = {n: (p + x).detach().requires_grad_() for n, p, x in zip(names, weights, e, strict=True)}
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            out = torch.func.functional_call(model, {**moved, **buffers}, (batch(t)[0],))
            return list(torch.autograd.grad(nn.functional.mse_loss(out, batch(t)[1]), list(moved.values())))

        d = g if (t + 1) % interval else combine(g, perturbed, memory, t)
        velocity = (
            [x.clone() for x in d] if not velocity else [MOMENTUM * v + x for v, x in zip(velocity, d, strict=True)]
        )
        with torch.no_grad():
            for p, v in zip(weights, velocity, strict=True):
                p -= RATE * v
    return [*(p.detach() for p in weights), *model.buffers()]


CASES: dict[str, tuple[Any, Any]] = {
    **{
        kind: (lambda o, m, kind=kind: piste.SAM(o, RHO, adaptive=kind, model=m), (kind, sam, lambda t: RHO))
        for kind in ("sam", "asam", "elementwise", "layerwise", "gsam", "relative")
    },
    "interval": (lambda o, m: piste.SAM(o, RHO, interval=3, model=m), ("sam", sam, lambda t: RHO, 3)),
    "GSAM": (lambda o, m: piste.GSAM(o, RHO, alpha=0.4, model=m), ("sam", gsam(0.4), lambda t: RHO)),
    "GSAM of clean": (
        lambda o, m: piste.GSAM(o, RHO, alpha=0.4, minimize_fp=False, model=m),
        ("sam", gsam_of_clean(0.4), lambda t: RHO),
    ),
    "LookSAM": (lambda o, m: piste.LookSAM(o, RHO, k=4, model=m), ("sam", looksam(4, 0.7, False), lambda t: RHO)),
    "Look-LayerSAM": (
        lambda o, m: piste.LookSAM(o, RHO, k=4, layerwise=True, model=m),
        ("relative", looksam(4, 0.7, False), lambda t: RHO),
    ),
    "LookSAM by tensor": (
        lambda o, m: piste.LookSAM(o, RHO, k=4, projection="tensor", model=m),
        ("sam", looksam(4, 0.7, True), lambda t: RHO),
    ),
}


def closure_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = loss_of(model, data)
        loss.backward()
        return loss

    return closure


def go(way: str, optimizer: Any, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    closure = closure_of(model, data)
    if way == "closure":
        optimizer.step(closure)
    elif way == "helper":
        piste.sharpness_step(optimizer, model, loss_of, data)
    else:
        optimizer.zero_grad()
        closure()
        if optimizer.needs_two_passes:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["closure", "halves", "helper"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_papers(case: str, way: str, engine: str) -> None:
    """Float64; 1e-12 of rounding, over 22 steps that cross every branch."""
    make, (kind, combine, *rest) = CASES[case]
    model = net()
    optimizer = make(inner(model, engine), model)
    for t in range(STEPS):
        go(way, optimizer, model, batch(t))
    found = [*(p.detach() for p in model.parameters()), *model.buffers()]
    for a, b in zip(found, by_hand(kind, combine, *rest), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def each(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).square().mean(1)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("way", ["closure", "helper"])
def test_esam(way: str, faithful: bool) -> None:
    """Against its formulas, with the choices of elements, tensors and samples read from the outside."""
    model, twin = net(), net()
    optimizer = piste.ESAM(
        torch.optim.SGD(model.parameters(), RATE), RHO, 0.6, 0.5, seed=3, faithful=faithful, model=model
    )
    for t in range(STEPS):
        data = batch(t)
        active = [p.requires_grad for p in model.parameters()]
        weights = list(twin.parameters())
        known = {n: b.clone() for n, b in twin.named_buffers()}
        before = each(twin, data)
        buffers = {n: b.clone() for n, b in twin.named_buffers()}
        g = list(torch.autograd.grad(before.mean(), weights))
        g = [x if on else torch.zeros_like(x) for x, on in zip(g, active, strict=True)]
        draw = torch.Generator().manual_seed((3 + t * 0x9E3779B1) & 0xFFFFFFFF)
        masks = [torch.ones_like(x) if faithful else torch.empty_like(x).bernoulli_(0.6, generator=draw) for x in g]
        length = dot(g, g).sqrt() + (1e-7 if faithful else 0.0)
        moved = copy.deepcopy(twin)
        with torch.no_grad():
            for p, m, x in zip(moved.parameters(), masks, g, strict=True):
                p += RHO / 0.6 * m * x / length
            rise = each(moved, data) - before
        order = rise.argsort(descending=True)[: 7 if faithful else 8]
        moved.load_state_dict({**moved.state_dict(), **buffers})
        second = torch.autograd.grad(each(moved, (data[0][order], data[1][order])).mean(), list(moved.parameters()))
        with torch.no_grad():
            for p, x in zip(weights, second, strict=True):
                p -= RATE * x
        assert known.keys() == buffers.keys()
        if way == "helper":
            piste.sharpness_step(optimizer, model, each, data)
        else:
            optimizer.step(lambda i, d=data: each(model, d if i is None else (d[0][i], d[1][i])))
    for a, b in zip([*model.parameters(), *model.buffers()], [*twin.parameters(), *twin.buffers()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    optimizer.restore()
    assert all(p.requires_grad for p in model.parameters())


def test_esam_with_everything_is_sam() -> None:
    one, two = net(), net()
    first = piste.SAM(inner(one), RHO)
    second = piste.ESAM(inner(two), RHO, beta=1.0, gamma=1.0)
    for t in range(4):
        go("closure", first, one, batch(t))
        go("halves", second, two, batch(t))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_esam_needs_losses_of_samples() -> None:
    model = net()
    optimizer = piste.ESAM(inner(model))
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match="a loss for each sample"):
        piste.sharpness_step(optimizer, model, loss_of, batch(0))
    assert all(torch.equal(before[k], v) for k, v in model.named_parameters())


def test_the_radius_of_gsam_follows_the_schedule() -> None:
    model = net()
    base = inner(model)
    optimizer = piste.GSAM(base, rho=0.4, rho_min=0.1, alpha=0.0, model=model)
    schedule = torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.0, total_iters=STEPS)
    radii = []
    for t in range(STEPS):
        radii.append(optimizer.rho_now)
        go("closure", optimizer, model, batch(t))
        schedule.step()
    assert radii[0] == 0.4
    assert radii[11] == pytest.approx(0.25)
    assert optimizer.rho_now == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["AdamW", "Ranger", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    options = {"weights": "kahan"} if dtype == torch.bfloat16 and name != "torch" else {}
    base = (
        torch.optim.SGD(model.parameters()) if name == "torch" else getattr(piste, name)(model.parameters(), **options)
    )
    optimizer = piste.SAM(base, rho=0.7)

    def everything() -> list[Tensor]:
        return [p.detach().clone() for p in model.parameters()] + [
            x.clone() for s in base.state.values() for k, x in s.items() if k == "p.rest"
        ]

    def backward() -> None:
        model(batch(0)[0].to(dtype)).float().square().mean().backward()

    for _ in range(3):
        optimizer.zero_grad()
        backward()
        before = everything()
        optimizer.first_step()
        assert not torch.equal(next(model.parameters()).detach(), before[0])
        optimizer.restore()
        after = everything()[: len(before)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        optimizer.step(lambda: backward() or torch.zeros(()))


class Gated(nn.Module):
    """Which of two layers a pass uses is the test's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.active = [True, True]

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x) for layer, on in zip(self.layers, self.active, strict=True) if on), torch.zeros(()))


@pytest.mark.parametrize("kind", ["SAM", "GSAM", "LookSAM"])
@pytest.mark.parametrize("order", [((True, False), (False, True)), ((True, True), (True, False))])
def test_weights_in_one_pass_only(kind: str, order: Any) -> None:
    torch.manual_seed(0)
    model = Gated()
    optimizer = getattr(piste, kind)(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        for active in order:
            model.active = list(active)
            model(torch.ones(2, 3)).square().mean().backward()
            if active == order[0]:
                optimizer.first_step()
        optimizer.second_step()
        optimizer.zero_grad()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_gradients_are_never_taken_twice() -> None:
    model = net()
    optimizer = piste.SAM(inner(model), RHO)
    closure = closure_of(model, batch(0))
    with pytest.raises(RuntimeError, match=r"first_step\(\) found no gradients"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step"):
        optimizer.second_step()
    closure()
    with pytest.raises(RuntimeError, match="call zero_grad"):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="second half of a step"):
        optimizer.step()
    before = copy.deepcopy(list(model.parameters()))
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="called twice"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.second_step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    closure()
    optimizer.first_step()
    closure()
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="a step has had before"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.step(lambda: torch.zeros(()))


@pytest.mark.parametrize("base", ["piste", "torch", "wrapped"])
def test_nobody_else_steps_the_optimizer_inside(base: str) -> None:
    model = net()
    inside: Any = torch.optim.SGD(model.parameters(), RATE) if base == "torch" else inner(model)
    inside = piste.Lookahead(inside) if base == "wrapped" else inside
    optimizer = copy.deepcopy(piste.SAM(inside, RHO))  # a copy guards its own
    model.load_state_dict(net().state_dict())
    for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True):
        p.grad = torch.ones_like(q)
    before = copy.deepcopy(optimizer.param_groups[0]["params"])
    with pytest.raises(RuntimeError, match="inside of SAM: step that one"):
        optimizer.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(optimizer.param_groups[0]["params"], before, strict=True))
    inside, _ = optimizer.optimizer, optimizer.load_state_dict(optimizer.state_dict())
    del optimizer, _
    inside.step()  # it is on its own again
    assert not any(torch.equal(p, q) for p, q in zip(inside.param_groups[0]["params"], before, strict=True))


def test_an_error_in_the_second_pass_leaves_the_weights() -> None:
    model = net()
    optimizer = piste.SAM(inner(model), RHO)
    before = copy.deepcopy(model.state_dict())
    calls = iter([False, True])

    def closure() -> Tensor:
        if next(calls):
            raise MemoryError
        return closure_of(model, batch(0))()

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    weights = dict(model.named_parameters())
    assert all(torch.equal(before[k], v) for k, v in weights.items())
    optimizer.step(closure_of(model, batch(0)))


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("base", ["piste", "unscaling", "torch"])
@pytest.mark.parametrize("kind", ["SAM", "GSAM", "LookSAM"])
def test_grad_scaler(kind: str, base: str, bad: int) -> None:
    """Scaled steps are the steps without a scaler; a pass that overflows skips the step and restores the weights."""

    def made(model: nn.Module) -> Any:
        options = {"amp_unscale": True} if base == "unscaling" else {}
        first = torch.optim.SGD(model.parameters(), RATE) if base == "torch" else inner(model, **options)
        return getattr(piste, kind)(first, RHO, model=model)

    plain, scaled = net(), net()
    one, two = made(plain), made(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=10_000)
    for t in range(4):
        piste.sharpness_step(one, plain, loss_of, batch(t), clip=0.5)
        piste.sharpness_step(two, scaled, loss_of, batch(t), scaler=scaler, clip=0.5)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)

    before, calls = copy.deepcopy(dict(scaled.named_parameters())), iter([1, 2, 3, 4])
    two.steps = 0  # a step that climbs, for LookSAM too

    def overflowing(model: nn.Module, data: Any) -> Tensor:
        return loss_of(model, data) * (torch.inf if next(calls) == bad else 1.0)

    piste.sharpness_step(two, scaled, overflowing, batch(9), scaler=scaler)
    assert scaler.get_scale() == 2.0**6
    assert all(torch.equal(before[k], v) for k, v in scaled.named_parameters())
    piste.sharpness_step(two, scaled, loss_of, batch(9), scaler=scaler)
    assert not torch.equal(before["0.weight"], scaled[0].weight)


@pytest.mark.parametrize("bad", [1, 2])
def test_grad_scaler_by_hand(bad: int) -> None:
    """scaler.step(optimizer) after both passes, where the scaler itself would skip an optimizer that knows nothing."""
    model = net()
    optimizer = piste.SAM(torch.optim.SGD(model.parameters(), RATE), RHO)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    before = copy.deepcopy(dict(model.named_parameters()))
    for turn in (1, 2):
        loss = loss_of(model, batch(0)) * (torch.inf if turn == bad else 1.0)
        scaler.scale(loss).backward()
        if turn == 1:
            optimizer.first_step()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**6
    assert all(torch.equal(before[k], v) for k, v in model.named_parameters())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch(0))).backward()
    with pytest.raises(RuntimeError, match="call zero_grad"):
        scaler.step(optimizer, closure_of(model, batch(0)))


@pytest.mark.parametrize("cleared", [True, False])
def test_a_closure_by_way_of_a_scaler(cleared: bool) -> None:
    """Torch refuses ``closure=`` but not its place; whatever gradients there are, nothing is taken unscaled."""
    model = net()
    optimizer = piste.SAM(inner(model), rho=RHO)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    piste.sharpness_step(optimizer, model, loss_of, batch(0), scaler=scaler)

    def closure() -> Tensor:
        loss = loss_of(model, batch(1))
        scaler.scale(loss).backward()
        return loss

    if cleared:
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"cannot be given to GradScaler\.step"):
        scaler.step(optimizer, closure)
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    piste.sharpness_step(optimizer, model, loss_of, batch(1), scaler=scaler)
    assert optimizer.steps == 2


def test_autocast_round_both_passes() -> None:
    """Autocast keeps casts of the weights until it ends; the second pass must not see those of before the climb."""
    found = []
    for outside in (True, False):
        model = net().float()

        def loss_fn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(model, data)

        optimizer = piste.SAM(inner(model, "reference"), rho=RHO)
        data = tuple(x.float() for x in batch(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            piste.sharpness_step(optimizer, model, loss_fn, data)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["SAM", "GSAM", "LookSAM"])
def test_accumulation_equals_the_whole_batch(kind: str) -> None:
    """Without BatchNorm, whose statistics are those of each micro-batch."""

    def plain_net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()

    whole, parts = plain_net(), plain_net()
    one, two = (getattr(piste, kind)(inner(m), RHO) for m in (whole, parts))
    for t in range(7):
        x, y = batch(t)
        piste.sharpness_step(one, whole, loss_of, (x, y), clip=0.5)
        pieces = list(zip(x.chunk(4), y.chunk(4), strict=True))
        loss = piste.sharpness_step(two, parts, loss_of, pieces, accumulate="batch", clip=0.5)
        assert loss.shape == ()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_a_climb_for_each_micro_batch() -> None:
    """The mean of the second gradients of every micro-batch, each from the same weights (m-sharpness)."""
    model = nn.Linear(5, 2).double()
    twin = copy.deepcopy(model)
    x, y = batch(0)
    pieces = list(zip(x.chunk(4), y.chunk(4), strict=True))
    piste.sharpness_step(
        piste.SAM(torch.optim.SGD(model.parameters(), RATE), RHO), model, loss_of, pieces, accumulate="micro"
    )
    weights = list(twin.parameters())
    total = [torch.zeros_like(p) for p in weights]
    for piece in pieces:
        g = torch.autograd.grad(loss_of(twin, piece), weights)
        moved = copy.deepcopy(twin)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), g, strict=True):
                p += RHO * d / dot(list(g), list(g)).sqrt()
        for s, d in zip(total, torch.autograd.grad(loss_of(moved, piece), list(moved.parameters())), strict=True):
            s += d / len(pieces)
    for p, q, s in zip(model.parameters(), weights, total, strict=True):
        torch.testing.assert_close(p, q - RATE * s, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["SAM", "GSAM", "LookSAM"])
@pytest.mark.parametrize("between", [False, True], ids=["between steps", "between passes"])
def test_resume_is_bitwise(kind: str, between: bool) -> None:
    model = net()
    optimizer = getattr(piste, kind)(inner(model), RHO)
    for t in range(5):
        go("closure", optimizer, model, batch(t))
    if between:
        optimizer.zero_grad()
        closure_of(model, batch(5))()
        optimizer.first_step()
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)

    def finish(model: nn.Module, optimizer: Any) -> list[Tensor]:
        if between:
            closure_of(model, batch(5))()
            optimizer.second_step()
        for t in range(6, 12):
            go("closure", optimizer, model, batch(t))
        return [p.detach() for p in model.parameters()]

    again = net(seed=1)
    other = getattr(piste, kind)(inner(again), RHO)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    if not between:
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(finish(model, optimizer), finish(again, other), strict=True))
    with pytest.raises(ValueError, match="steps"):
        other.load_state_dict(other.optimizer.state_dict())


def test_schedulers_see_the_steps(recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    optimizer = piste.SAM(torch.optim.SGD(model.parameters(), 0.1), RHO)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        go("halves", optimizer, model, batch(0))
        schedule.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.025
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_ema_beside_it() -> None:
    model = net()
    optimizer = piste.SAM(inner(model), RHO)
    ema = piste.ModelEMA(model, decay=0.5, warmup=False)
    seen = []
    for t in range(3):
        go("closure", optimizer, model, batch(t))
        ema.update(optimizer)
        seen.append(model[0].weight.detach().clone())
    with ema.average():
        torch.testing.assert_close(model[0].weight, (seen[0] + seen[1]) / 4 + seen[2] / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: piste.SAM(p, rho=0.0), ValueError, "rho=0.0; legal: a finite number > 0"),
        (lambda p: piste.SAM(p, adaptive="adam"), ValueError, "adaptive='adam' is not legal"),
        (lambda p: piste.SAM(p, interval=0), ValueError, "interval=0; legal: a whole number >= 1"),
        (lambda p: piste.SAM(p, model=3), TypeError, "model=int"),
        (lambda p: piste.GSAM(p, alpha=2.0), ValueError, "alpha=2.0"),
        (lambda p: piste.GSAM(p, rho_min=-1.0), ValueError, "rho_min=-1.0"),
        (lambda p: piste.ESAM(p, beta=0.0), ValueError, r"beta=0.0; legal: a number in \(0, 1\]"),
        (lambda p: piste.ESAM(p, gamma=1.5), ValueError, "gamma=1.5"),
        (lambda p: piste.LookSAM(p, k=0), ValueError, "k=0"),
        (lambda p: piste.LookSAM(p, projection="all"), ValueError, "projection='all'"),
        (
            lambda p: piste.LookSAM(p, layerwise=True, adaptive="asam"),
            ValueError,
            "layerwise=True with adaptive='asam'",
        ),
        (lambda p: piste.SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD), TypeError, r"piste.SAM\(torch.optim.SGD"),
        (lambda p: piste.sharpness_step(p, nn.Linear(1, 1), loss_of, 0), TypeError, "legal: piste.SAM"),
        (
            lambda p: piste.sharpness_step(piste.SAM(p), nn.Linear(1, 1), loss_of, [], accumulate="batch"),
            ValueError,
            "no micro-batches",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, error: type[Exception], words: str) -> None:
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(error, match=words):
        make(base)


def test_after_descend_a_closure_only_tells_the_loss() -> None:
    """Frameworks have to hand one to ``step``; both gradients are there already."""
    mine, theirs = net(), net()
    a, b = (piste.GSAM(inner(model), RHO) for model in (mine, theirs))
    told: list[float] = []

    def closure() -> float:
        told.append(1.5)
        return 1.5

    for t in range(3):
        piste.sharpness_step(b, theirs, loss_of, batch(t))
        a.zero_grad()
        loss_of(mine, batch(t)).backward()
        a.first_step()
        loss_of(mine, batch(t)).backward()
        a.descend()
        assert a.step(closure) == 1.5
    assert told == [1.5] * 3
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
