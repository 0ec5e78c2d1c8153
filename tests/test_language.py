"""The language of rules: kinds, stages, guards and errors, on test rules for everything no optimizer uses yet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import piste
from piste import execution, opaques, ops
from piste.parts.prepare import clip_norm
from piste.parts.standard import standard
from piste.slots import Pipeline, after, direction, prepare, scale, update
from piste.storage import State, anchor, moment, second_moment
from piste.symbol import FULL, MATRIX, TENSOR, LanguageError, reduced, traces_made

# Inductor's import warns of torch's own use of a deprecated decorator
inductor = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
ENGINES = ["reference", "foreach", "cpp", pytest.param("compile", marks=[pytest.mark.slow, inductor])]
SHAPES = [(2, 3, 4, 5), (3, 4, 2, 2)]


def optimizer_of(pipeline: Pipeline, **hyper: Any) -> type[piste.Optimizer]:
    """An optimizer with this pipeline and these hyper-parameters."""

    class Test(piste.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.0, **hyper}, options)

        @classmethod
        def pipeline(cls, group: Any) -> Pipeline:
            return pipeline

    return Test


def weights(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def run(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int, seed: int = 1
) -> list[list[Tensor]]:
    """Step with random gradients; the gradients of every step, by weight."""
    generator = torch.Generator().manual_seed(seed)
    given = []
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        given.append([p.grad.clone() for p in params])
        optimizer.step()
    return given


def axes_but(ndim: int, keep: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(ndim) if axis not in keep]


# --------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep", [(), (0,), (1,), (2,), (3,), (0, 1, 2), (0, 3)])
@pytest.mark.parametrize("how", ["mean", "norm", "peak"])
def test_reductions_keep_any_axes(engine: str, keep: tuple[int, ...], how: str) -> None:
    """Each single axis of a rank-4 weight, all but the last, two at once, none; in states of just that shape."""

    @direction(r=State("accumulator", kind=reduced(keep)))
    def rule(g: Any, st: Any) -> Any:
        r = st.r + getattr(ops, how)(ops.absolute(g), keep)
        return g / (1 + r), {"r": r}

    params = weights(SHAPES)
    expected = [p.detach().clone() for p in params]
    optimizer = optimizer_of(Pipeline(direction=rule))(params, engine=engine)
    given = run(optimizer, params, 3)
    sums = [torch.zeros(())] * len(params)
    for step in given:
        for i, g in enumerate(step):
            axes, size = axes_but(4, keep), g.abs()
            r = {
                "mean": size.mean(axes, True),
                "peak": size.amax(axes, True),
                "norm": (size**2).sum(axes, True).sqrt(),
            }[how]
            sums[i] = sums[i] + r
            expected[i] -= 0.1 * g / (1 + sums[i])
    for p, e, total in zip(params, expected, sums, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)
        state = optimizer.state[p]["r"]
        assert state.numel() == math.prod(p.shape[axis] for axis in keep)
        torch.testing.assert_close(state.flatten(), total.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_keeping_every_axis_reduces_nothing(engine: str) -> None:
    """To torch a reduction over no axes is one over all of them."""

    @direction
    def rule(g: Any, ndim: int) -> Any:
        every = tuple(range(ndim))
        return ops.sum_(g, keep=every) + ops.peak(g, keep=every) + ops.mean(g, keep=every)

    params = weights([(5,), (3, 4), (1,)])
    before = [p.detach().clone() for p in params]
    (given,) = run(optimizer_of(Pipeline(direction=rule))(params, engine=engine), params, 1)
    for p, b, g in zip(params, before, given, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * 3 * g)


@pytest.mark.parametrize("engine", ENGINES)
def test_reductions_meet_and_are_reduced_again(engine: str) -> None:
    """Row and column factors, as in Adafactor: their product is of full shape, the row's own mean a number."""

    @direction
    def rule(g: Any, ndim: int) -> Any:
        row, col = ops.mean(ops.square(g), keep=(0,)), ops.mean(ops.square(g), keep=(ndim - 1,))
        return g * ops.rsqrt(row / ops.mean(row) * col)

    params = weights([(3, 5), (4, 2)])
    expected = [p.detach().clone() for p in params]
    ((first, second),) = run(optimizer_of(Pipeline(direction=rule))(params, engine=engine), params, 1)
    for p, e, g in zip(params, expected, (first, second), strict=True):
        row, col = (g**2).mean(1, keepdim=True), (g**2).mean(0, keepdim=True)
        torch.testing.assert_close(p.detach(), e - 0.1 * g / (row / row.mean() * col).sqrt(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_number_per_weight_and_a_value_that_crosses_a_stage(engine: str) -> None:
    """NovoGrad's and LAMB's needs: a state of one number, and a direction used on both sides of its own norm."""

    @direction(v=State("second_moment", kind=TENSOR), m=moment)
    def rule(g: Any, st: Any, t: Any) -> Any:
        size = ops.sum_(ops.square(g))
        v = size if t == 1 else 0.5 * st.v + 0.5 * size
        m = 0.9 * st.m + g / (ops.sqrt(v) + 1e-8)
        return m, {"v": v, "m": m}

    @scale
    def trust(d: Any, p: Any) -> Any:
        d = d + 0.01 * p
        ratio = ops.norm(p) / ops.norm(d)
        return d * ops.where(ratio > 0, ratio, 1.0)

    params = weights([(3, 4), (5,), ()])
    params[1].data.zero_()  # a zero weight has ratio 0, so 1
    expected = [p.detach().clone() for p in params]
    optimizer = optimizer_of(Pipeline(direction=rule, scale=(trust,)))(params, engine=engine)
    v, m = [0.0] * 3, [torch.zeros(())] * 3
    for number, step in enumerate(run(optimizer, params, 4)):
        for i, g in enumerate(step):
            v[i] = g.square().sum() if number == 0 else 0.5 * v[i] + 0.5 * g.square().sum()
            m[i] = 0.9 * m[i] + g / (v[i] ** 0.5 + 1e-8)
            d = m[i] + 0.01 * expected[i]
            ratio = expected[i].norm() / d.norm()
            expected[i] = expected[i] - 0.1 * d * (ratio if ratio > 0 else 1.0)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-11, atol=1e-12)
    assert optimizer.state[params[0]]["v"].shape == ()


@pytest.mark.parametrize("engine", ENGINES)
def test_totals_span_groups_rules_and_stages(engine: str) -> None:
    """One gradient norm over two groups under different rules, complete in a later stage for one of them."""

    @prepare
    def centered_first(g: Any, ndim: int) -> Any:
        return g - ops.mean(g, keep=(0,)) if ndim > 1 else g

    @direction
    def plain(g: Any) -> Any:
        return g

    class TwoRules(piste.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {"lr": 0.1, "rule": "late", "clip_norm": 0.5}, options)

        @classmethod
        def pipeline(cls, group: Any) -> Pipeline:
            late = group["rule"] == "late"
            return Pipeline(direction=plain, prepare=(centered_first, clip_norm) if late else (clip_norm,))

    a, b = weights([(3, 4), (6,)])
    before = a.detach().clone(), b.detach().clone()
    optimizer = TwoRules([{"params": [a]}, {"params": [b], "rule": "early"}], engine=engine)
    ((ga, gb),) = run(optimizer, [a, b], 1)
    ga = ga - ga.mean(1, keepdim=True)
    factor = min(1.0, 0.5 / (float((ga.square().sum() + gb.square().sum()).sqrt()) + 1e-6))
    assert factor < 1
    torch.testing.assert_close(a.detach(), before[0] - 0.1 * factor * ga, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.detach(), before[1] - 0.1 * factor * gb, rtol=1e-12, atol=1e-12)
    assert optimizer.last_step.gradient_norm == pytest.approx(float((ga.square().sum() + gb.square().sum()).sqrt()))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_total_beside_numbers_that_differ_from_weight_to_weight(engine: str) -> None:
    """A rate over a global norm is one number for each weight, where groups have other rates and weights wake late."""

    @direction
    def rule(g: Any, hp: Any, t: Any) -> Any:
        norm = ops.sqrt(ops.total(ops.square(g), "norm"))
        return g * ops.where(norm > 0, hp.lr * ops.sqrt(t) / norm, 0.0)

    params = weights([(3, 4), (5,), (2,)])
    expected = [p.detach().clone() for p in params]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.3}]
    optimizer = optimizer_of(Pipeline(direction=rule))(groups, engine=engine)
    steps = [0, 0, 0]
    for number in range(3):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.5 + i) if number >= i else None
        size = sum(float(p.grad.square().sum()) for p in params if p.grad is not None) ** 0.5
        for i, p in enumerate(params):
            if p.grad is not None:
                steps[i] += 1
                rate = 0.1 if i == 0 else 0.3
                expected[i] = expected[i] - rate * p.grad * rate * steps[i] ** 0.5 / size
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_total_of_an_average_waits_for_no_pass(engine: str) -> None:
    """Its new end has a factor that is known late; the sums of both ends are ready before, and are all that is."""

    @direction(v=second_moment)
    def rule(g: Any, st: Any, t: Any) -> Any:
        v = ops.lerp(st.v, ops.square(g / (ops.norm(g) + 1)), 0.25)
        return g / ops.sqrt(ops.total(v / (1 - 0.75**t), "everything")), {"v": v}

    params = weights([(3, 4), (5,)])
    expected, v = [p.detach().clone() for p in params], [torch.zeros_like(p.detach()) for p in params]
    optimizer = optimizer_of(Pipeline(direction=rule))(params, engine=engine)
    for t, given in enumerate(run(optimizer, params, 3), 1):
        v = [x + 0.25 * ((g / (g.norm() + 1)).square() - x) for x, g in zip(v, given, strict=True)]
        size = (sum(x.sum() for x in v) / (1 - 0.75**t)).sqrt()
        expected = [p - 0.1 * g / size for p, g in zip(expected, given, strict=True)]
    for p, e, x in zip(params, expected, v, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["v"], x, rtol=1e-12, atol=1e-12)
    ((part,),) = optimizer._roster.layouts.values()
    plan = part.seats.plan
    assert [len([s for s in stage.loads if s.kind == FULL]) for stage in plan.stages] == [2, 0, 3], plan.text()
    assert [list(stage.writes) for stage in plan.stages] == [[], [], ["state.v", "p"]]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_covers_direction_to_apply(engine: str) -> None:
    """Dual averaging from the initial weight, as in MADGRAD: the weight is made anew, not moved."""

    @update(s=State("accumulator"), x0=anchor)
    def dual_averaging(g: Any, st: Any, hp: Any, t: Any) -> Any:
        s = st.s + g
        return st.x0 - hp.lr * s / ops.sqrt(t), {"s": s, "x0": st.x0}

    (p,) = weights([(4, 3)])
    start = p.detach().clone()
    optimizer = optimizer_of(Pipeline(direction=dual_averaging))([p], engine=engine)
    given = run(optimizer, [p], 4)
    torch.testing.assert_close(p.detach(), start - 0.1 * sum(g for (g,) in given) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_rules_in_one_plan(engine: str) -> None:
    """A magnitude and a direction, as in AdaGraft: the same part twice, under two names, with its own settings."""

    @direction(m=moment)
    def heavy(g: Any, st: Any, hp: Any) -> Any:
        m = hp.beta * st.m + g
        return m, {"m": m}

    @scale(m=moment)
    def magnitude(d: Any, g: Any, st: Any, hp: Any) -> Any:
        m = hp.beta * st.m + g
        return d * (ops.norm(m) / ops.norm(d)), {"m": m}

    pipeline = Pipeline(direction=heavy, scale=(magnitude.named("magnitude", beta="beta_of_magnitude"),))
    (p,) = weights([(4, 3)])
    start = p.detach().clone()
    optimizer = optimizer_of(pipeline, beta=0.9, beta_of_magnitude=0.5)([p], engine=engine)
    (g1,), (g2,) = run(optimizer, [p], 2)
    assert set(optimizer.state[p]) == {"step", "m", "magnitude.m"}
    direction2, magnitude2 = 0.9 * g1 + g2, 0.5 * g1 + g2
    expected = start - 0.1 * g1 - 0.1 * direction2 * magnitude2.norm() / direction2.norm()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(LanguageError, match="two parts keep a state named 'm'"):
        _ = Pipeline(direction=heavy, scale=(magnitude,)).states


@pytest.mark.parametrize("engine", ENGINES)
def test_opaque_functions_get_equal_shapes_at_once(engine: str) -> None:
    """A matrix function runs between two stages, once per shape, on full values, a matrix state and a host number."""
    calls: list[tuple[int, ...]] = []

    def whiten(x: Tensor, factor: Tensor, power: float) -> Tensor:
        calls.append(tuple(x.shape))
        return torch.linalg.solve(factor, x) * power

    def gram(x: Tensor) -> Tensor:
        return x @ x.mT

    def identity(weight: Tensor) -> Tensor:
        return torch.eye(weight.shape[0])

    @direction(factor=State("accumulator", start=identity, kind=MATRIX))
    def rule(g: Any, st: Any, hp: Any) -> Any:
        factor = st.factor + ops.opaque(gram, g, kind=MATRIX)
        return ops.opaque(whiten, g, factor, hp.power), {"factor": factor}

    params = weights([(2, 3), (2, 3), (4, 2)])
    expected = [p.detach().clone() for p in params]
    optimizer = optimizer_of(Pipeline(direction=rule), power=2.0)(params, engine=engine)
    factors = [torch.eye(p.shape[0], dtype=torch.float64) for p in params]
    for step in run(optimizer, params, 2):
        for i, g in enumerate(step):
            factors[i] = factors[i] + g @ g.T
            expected[i] -= 0.1 * 2.0 * torch.linalg.solve(factors[i], g)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-9, atol=1e-10)
    assert sorted(calls) == [(1, 4, 2), (1, 4, 2), (2, 2, 3), (2, 2, 3)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stage_may_read_nothing_but_values(engine: str) -> None:
    """Between two opaque functions no weight, gradient or state is read; of states a plan may leave some alone."""

    def double(x: Tensor) -> Tensor:
        return 2 * x

    @direction(a=moment, b=State("accumulator", start=lambda weight: torch.eye(3), kind=MATRIX))
    def rule(g: Any, st: Any, t: Any) -> Any:
        unused = st.a, st.b
        d = ops.opaque(double, 3 * ops.opaque(double, g))
        return d, {} if t != 3 else {"a": unused[0] + d, "b": 2 * unused[1]}

    params = [torch.randn(4, 5, dtype=torch.float64).t().requires_grad_(), *weights([(2, 3)])]
    expected = [p.detach().clone() for p in params]
    optimizer = optimizer_of(Pipeline(direction=rule))(params, engine=engine)
    for step in run(optimizer, params, 4):
        expected = [e - 0.1 * 12 * g for e, g in zip(expected, step, strict=True)]
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)
        assert torch.equal(optimizer.state[p]["b"], 2 * torch.eye(3, dtype=torch.float64))


def test_large_weights_go_to_opaque_functions_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    @direction
    def rule(g: Any) -> Any:
        return ops.opaque(noted, g)

    monkeypatch.setattr(opaques, "_MOST_STACKED_ON_CPU", 12)
    params = weights([(2, 3)] * 5 + [(4, 4)] * 2)
    before = [p.detach().clone() for p in params]
    ((*given,),) = run(optimizer_of(Pipeline(direction=rule))(params, engine="reference"), params, 1)
    assert sizes == [2, 2, 1, 1, 1]
    for p, b, g in zip(params, before, given, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * g)


def _shaped(rank: int, dtype: torch.dtype | None) -> Pipeline:
    """Keeps a matrix of this many rows for each weight."""

    def zeros(weight: Tensor) -> Tensor:
        return torch.zeros(rank, weight.shape[-1])

    def first_rows(x: Tensor) -> Tensor:
        return x[:, :rank]

    @direction(kept=State("accumulator", start=zeros, kind=MATRIX, dtype=dtype))
    def rule(g: Any, st: Any) -> Any:
        return g, {"kept": st.kept + ops.opaque(first_rows, g, kind=MATRIX)}

    return Pipeline(direction=rule)


@pytest.mark.parametrize("engine", ENGINES)
def test_states_may_have_a_shape_that_a_number_gives(engine: str) -> None:
    """The number is seen by `pipeline`; the state is saved and loaded in its own dtype, and no other shape is taken."""

    class Ranked(piste.Optimizer):
        shaping = ("rank",)

        def __init__(self, params: Any, rank: int = 2, low: bool = False, **options: Any) -> None:
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.0, "rank": rank, "low": low}, options)

        @classmethod
        def pipeline(cls, group: Any) -> Pipeline:
            return _shaped(group["rank"], torch.bfloat16 if group["low"] else None)

    for low in (False, True):
        (p,) = weights([(4, 3)])
        optimizer = Ranked([p], low=low, engine=engine)
        steps = run(optimizer, [p], 2)
        kept = optimizer.state[p]["kept"]
        assert kept.dtype == (torch.bfloat16 if low else torch.float64)
        total = steps[0][0] + steps[1][0]
        torch.testing.assert_close(kept.double(), total[:2], rtol=0.02 if low else 1e-12, atol=0.02 if low else 0)
        again = Ranked([p], low=low, engine=engine)
        again.load_state_dict(optimizer.state_dict())
        assert torch.equal(again.state[p]["kept"], kept)
        assert again.state[p]["kept"].dtype == kept.dtype
        saved = optimizer.state_dict()
        saved["param_groups"][0]["rank"] = 3
        with pytest.raises(ValueError, match=r"'kept' of parameter .* has shape \(2, 3\); expected \(3, 3\)"):
            again.load_state_dict(saved)
        assert again.param_groups[0]["rank"] == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_scratch_keeps_a_value_across_a_stage(engine: str) -> None:
    @direction
    def rule(g: Any) -> Any:
        d = ops.scratch(ops.exp(g), "d")
        return d / ops.norm(d)

    params = weights([(3, 4), (2,)])
    before = [p.detach().clone() for p in params]
    optimizer = optimizer_of(Pipeline(direction=rule))(params, engine=engine)
    (given,) = run(optimizer, params, 1)
    for p, b, g in zip(params, before, given, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * g.exp() / g.exp().norm(), rtol=1e-12, atol=1e-12)
    ((part,),) = optimizer._roster.layouts.values()
    first, second = part.seats.plan.stages
    assert [k.attr for k in first.keeps] == ["d"]
    assert "exp" not in {s.op for s in second.compute}, "a value in scratch is not computed again"


@pytest.mark.parametrize("engine", ENGINES)
def test_old_states_stay_until_the_last_stage_that_reads_them(engine: str) -> None:
    """The new value is known in stage 0, the old one is still wanted after the reduction; and two states swap."""

    @direction(a=moment, b=State("moment", start="weight"))
    def rule(g: Any, st: Any) -> Any:
        a = st.a + g
        return (st.a - g) / ops.norm(a), {"a": st.b, "b": a}

    (p,) = weights([(3, 4)])
    w, a, b = p.detach().clone(), torch.zeros(3, 4, dtype=torch.float64), p.detach().clone()
    optimizer = optimizer_of(Pipeline(direction=rule))([p], engine=engine)
    for (g,) in run(optimizer, [p], 3):
        new = a + g
        w = w - 0.1 * (a - g) / new.norm()
        a, b = b, new
    torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.state[p]["a"], a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.state[p]["b"], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["reference", "foreach", "cpp"])
@pytest.mark.parametrize(
    "formula",
    [
        lambda g, p: 2.0 / (1.0 + ops.square(g)),
        lambda g, p: ops.square(g) * p * ops.square(p),
        lambda g, p: p * ops.square(g + p),
        lambda g, p: (g + 1) / (3 * ops.sqrt(ops.absolute(p) + 1)) / 2,
        lambda g, p: -(g * p) + 3 * (p / (ops.square(g) + 1)) - 1,
        lambda g, p: 1 - g,
        lambda g, p: ops.lerp(g, -ops.square(p), 0.25),
        lambda g, p: ops.lerp(g, g * p / (1 + ops.square(p)), 0.25),
        lambda g, p: ops.lerp(g, p, ops.absolute(ops.sign(p))),
        lambda g, p: ops.clamp(g, -0.3, 0.3) + ops.maximum(g, p) - ops.minimum(g, p),
        lambda g, p: ops.where(g * p > 0, g, 0.0) + ops.where(g <= p, p, g),
        lambda g, p: ops.exp(-ops.absolute(g)) * ops.log(ops.square(p) + 1) + ops.cbrt(g),
        lambda g, p: (g / 2) ** 2 + ops.absolute(p) ** 0.5 + ops.rsqrt(1 + ops.square(p)),
        lambda g, p: g * p - p * g + g * 1 + 0 + p / 1,
        lambda g, p: ops.norm(g) * (ops.mean(p) - ops.norm(p) / 2) * g + ops.peak(g),
    ],
    ids=range(15),
)
def test_formulas_mean_on_engines_what_they_mean_on_tensors(engine: str, formula: Any) -> None:
    """The rewriting of products, sums and averages changes nothing; nor is a gradient or a weight overwritten early."""

    @direction(d=moment)
    def rule(g: Any, p: Any) -> Any:
        d = formula(g, p)
        return d, {"d": d}

    params = weights([(3, 4), (2, 5)])
    before = [p.detach().clone() for p in params]
    optimizer = optimizer_of(Pipeline(direction=rule))(params, engine=engine)
    (given,) = run(optimizer, params, 1)
    for p, b, g in zip(params, before, given, strict=True):
        d = formula(g, b)
        torch.testing.assert_close(optimizer.state[p]["d"], d, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(p.detach(), b - 0.1 * d, rtol=1e-12, atol=1e-13)
        assert torch.equal(p.grad, g)


def test_large_weights_are_worked_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a weight, with reductions over it, give what the whole gives; odd lengths and strides included."""
    from piste.engines import foreach

    monkeypatch.setattr(foreach, "_CHUNK_CPU", 64)

    @direction(m=moment)
    def rule(g: Any, st: Any) -> Any:
        m = ops.lerp(st.m, g, 0.1)
        return m / ops.norm(m) + g * ops.peak(g) / ops.sqrt(ops.total(ops.square(m), "m")), {"m": m}

    results = []
    for engine in ("reference", "foreach", "cpp"):
        params = weights([(1000,), (7,), (40, 30), (3, 3)])
        params[2] = torch.nn.Parameter(params[2].detach().t())  # not contiguous
        run(optimizer_of(Pipeline(direction=rule))(params, engine=engine), params, 3)
        results.append([p.detach().clone() for p in params])
    reference, *others = results
    for other in others:
        for a, b in zip(other, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# --------------------------------------------------------------------------------------------------- variants and plans


def test_a_branch_on_host_numbers_is_a_variant() -> None:
    """Nested conditions on step and settings; each outcome is traced once and found again ever after."""

    @direction
    def rule(g: Any, hp: Any, t: Any) -> Any:
        if t % 3 == 0:
            return 2 * g if hp.boost > 1 else g
        return -g if t == 1 else 0.5 * g

    (p,) = weights([(2,)])
    optimizer = optimizer_of(Pipeline(direction=rule), boost=0.0)([p], engine="reference")
    factors = {1: -1.0, 2: 0.5, 3: 1.0, 4: 0.5, 5: 0.5, 6: 2.0, 7: 0.5}
    for t, factor in factors.items():
        optimizer.param_groups[0]["boost"] = 2.0 if t == 6 else 0.0
        before = p.detach().clone()
        ((g,),) = run(optimizer, [p], 1, seed=t)
        torch.testing.assert_close(p.detach(), before - 0.1 * factor * g)
    known = traces_made(), execution.plans_built()
    for t in range(8, 100):
        optimizer.param_groups[0]["boost"] = float(t % 5)
        run(optimizer, [p], 1, seed=t)
    assert (traces_made(), execution.plans_built()) == known


def test_whole_numbers_unroll_loops() -> None:
    @direction
    def rule(g: Any, hp: Any) -> Any:
        for _ in range(hp.rounds):
            g = g / 2
        return g

    (p,) = weights([(2,)])
    optimizer = optimizer_of(Pipeline(direction=rule), rounds=3)([p])
    before = p.detach().clone()
    ((g,),) = run(optimizer, [p], 1)
    torch.testing.assert_close(p.detach(), before - 0.1 * g / 8)
    optimizer.param_groups[0]["rounds"] = 1
    before = p.detach().clone()
    ((g,),) = run(optimizer, [p], 1)
    torch.testing.assert_close(p.detach(), before - 0.1 * g / 2)


def test_shapes_select_variants_and_ranks_share_plans() -> None:
    """A condition on sizes is decided weight by weight; equal graphs of different ranks are one plan."""

    @direction
    def rule(g: Any, shape: Any) -> Any:
        return 2 * g if shape and shape[0] >= 4 else g

    params = weights([(4, 2), (3, 2), (5,), (2,), ()])
    optimizer = optimizer_of(Pipeline(direction=rule))(params)
    before = [p.detach().clone() for p in params]
    (given,) = run(optimizer, params, 1)
    for p, b, g, factor in zip(params, before, given, (2, 1, 2, 1, 1), strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * factor * g)
    (layout,) = optimizer._roster.layouts.values()
    assert sorted(len(part.members) for part in layout) == [2, 3]


def test_a_state_appears_when_a_rule_first_needs_it() -> None:
    (p,) = weights([(2,)])
    optimizer = piste.SGD([p], lr=0.1)
    run(optimizer, [p], 1)
    assert "buf" not in optimizer.state[p]
    optimizer.param_groups[0]["momentum"] = 0.9
    ((g,),) = run(optimizer, [p], 1, seed=2)
    torch.testing.assert_close(optimizer.state[p]["buf"], g)


def test_steps_let_go_of_gradients_and_buffers() -> None:
    """Between steps nothing of the last one is held but states: no gradient, no temporary."""
    import gc
    import weakref

    (p,) = weights([(64, 64)])
    optimizer = piste.Ranger([p], clip_norm=1.0)
    run(optimizer, [p], 3)
    gradient = weakref.ref(p.grad)
    p.grad = None
    gc.collect()
    assert gradient() is None


# -------------------------------------------------------------------------------------------------------------- errors


def refuse(rule: Any, message: str, **hyper: Any) -> None:
    (p,) = weights([(2, 2)])
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    pipeline = Pipeline(direction=rule) if rule.slot == "direction" else standard({}, rule)
    with pytest.raises(LanguageError, match=message):
        optimizer_of(pipeline, **hyper)([p]).step()
    assert torch.equal(p, before)


def test_what_is_outside_the_language_is_named_with_its_rule() -> None:
    @direction
    def calls_torch(g: Any) -> Any:
        return torch.tanh(g)

    @direction
    def uses_a_method(g: Any) -> Any:
        return g.topk(3)

    @direction
    def branches_on_data(g: Any) -> Any:
        return g if g > 0 else -g

    @direction
    def freezes_a_number(g: Any, hp: Any) -> Any:
        return g * math.sqrt(hp.lr)

    @direction
    def mixes_in_a_tensor(g: Any) -> Any:
        return g + torch.ones(2)

    @direction
    def unknown_setting(g: Any, hp: Any) -> Any:
        return g * hp.beta3

    @direction(m=moment)
    def unknown_state(g: Any, st: Any) -> Any:
        return st.v

    @direction(m=moment)
    def undeclared_result(g: Any, st: Any) -> Any:
        return g, {"v": g}

    @direction(m=moment)
    def assigns_state(g: Any, st: Any) -> Any:
        st.m = g
        return g

    @direction(v=State("accumulator", kind=TENSOR))
    def too_large_a_state(g: Any, st: Any) -> Any:
        return g, {"v": g}

    @direction
    def counts_from_the_end(g: Any) -> Any:
        return g - ops.mean(g, keep=(-1,))

    refuse(calls_torch, "'calls_torch' calls torch.tanh, which is not in the language")
    refuse(uses_a_method, r"'uses_a_method' uses \.topk")
    refuse(branches_on_data, "'branches_on_data' branches on data")
    refuse(freezes_a_number, "'freezes_a_number' turns hp.* into a Python float")
    refuse(mixes_in_a_tensor, "'mixes_in_a_tensor' (mixes symbols with Tensor|calls torch.add)")
    refuse(unknown_setting, "'unknown_setting' reads the hyper-parameter 'beta3'; it has:.*lr")
    refuse(unknown_state, "'unknown_state' reads the state 'v'; it has: m")
    refuse(undeclared_result, "'undeclared_result' returns the state 'v', which it does not declare")
    refuse(assigns_state, "'assigns_state' sets 'm'; new values are returned")
    refuse(too_large_a_state, "'too_large_a_state' puts a value of kind full into state.v")
    refuse(counts_from_the_end, "write ndim - 1 for the last axis")


def test_parts_go_where_they_belong() -> None:
    @after
    def late(p: Any) -> Any:
        return p

    @direction
    def first(g: Any) -> Any:
        return g

    with pytest.raises(LanguageError, match="late fills the slot after, not prepare"):
        Pipeline(direction=first, prepare=(late,))
    with pytest.raises(LanguageError, match="can see g, d, p"):

        @direction
        def asks_too_much(momentum: Any) -> Any:
            return momentum

    @direction
    def too_early(d: Any) -> Any:
        return d

    refuse(too_early, "'too_early' wants 'd', which its slot 'direction' does not have")


def test_rules_are_functions_of_tensors_too() -> None:
    """A rule can be called as it stands, in a debugger or a notebook, on tensors and plain numbers."""
    from types import SimpleNamespace as Names

    from piste.rules.adaptive import radam

    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    st = Names(m=torch.zeros(2, dtype=torch.float64), v=torch.zeros(2, dtype=torch.float64))
    hp = Names(beta1=0.9, beta2=0.999, eps=0.0, degenerated_to_sgd=True)
    d, new = radam(g, st, hp, 6)
    torch.testing.assert_close(new["v"], 0.001 * g**2)
    torch.testing.assert_close(d, torch.tensor([0.1, -0.1], dtype=torch.float64) / 0.001**0.5)


def test_second_moment_declares_its_role() -> None:
    assert second_moment.role == "second_moment"
    assert moment.role == "moment"


# --- sums of host numbers, states of parts before, rounded corners -------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_tally_adds_host_numbers_of_the_weights_that_step(engine: str) -> None:
    """Over groups and buckets; a weight that makes no use of the sum counts, one without a gradient does not."""

    @direction
    def shared(g: Any, hp: Any, t: Any) -> Any:
        elements = ops.tally(ops.size(g) * hp.weight, "elements")
        return g if hp.idle == 1 else g / elements

    cls = optimizer_of(Pipeline(direction=shared), weight=1.0, idle=0.0)
    params = weights([(3, 4), (5,), (2,), (7,)])
    start = [p.detach().clone() for p in params]
    groups = [{"params": params[:2]}, {"params": params[2:3], "weight": 2.0, "idle": 1.0}, {"params": params[3:]}]
    optimizer = cls(groups, engine=engine)
    for p in params[:3]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, before, step in zip(params, start, (0.1 / 21, 0.1 / 21, 0.1, 0.0), strict=True):
        torch.testing.assert_close(p.detach(), before - step, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_part_sees_what_parts_before_it_left(engine: str) -> None:
    @prepare(m=moment)
    def gather(g: Any, st: Any) -> Any:
        return g, {"m": st.m + g}

    @direction
    def gathered(new: Any) -> Any:
        return new.m

    (p,) = params = weights([(3, 2)])
    start = p.detach().clone()
    optimizer = optimizer_of(Pipeline(prepare=(gather,), direction=gathered))(params, engine=engine)
    first, second = (row[0] for row in run(optimizer, params, 2))
    torch.testing.assert_close(p.detach(), start - 0.1 * (2 * first + second), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_torch_s(engine: str, dtype: torch.dtype) -> None:
    """From far below zero to past the threshold where it is the identity; no overflow on the way."""

    @update
    def rounded(p: Any, hp: Any) -> Any:
        return ops.softplus(p, hp.sharpness)

    p = torch.nn.Parameter(torch.tensor([-1e4, -3.0, -1e-3, 0.0, 1e-9, 0.1, 0.39999, 0.41, 3.0, 1e4], dtype=dtype))
    expected = torch.nn.functional.softplus(p.detach().double(), beta=50.0).to(dtype)
    optimizer = optimizer_of(Pipeline(direction=rounded), sharpness=50.0)([p], engine=engine)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-9)


def test_tally_is_for_host_numbers_in_a_step() -> None:
    with pytest.raises(LanguageError, match="tally"):
        ops.tally(3.0, "elements")
