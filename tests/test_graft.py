"""AdaGraft: against formulas typed from optimetry's and lingvo's semantics, around anybody's optimizers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import formulas, live
from oracles.replay import (
    FEWER,
    GAPS,
    Problem,
    Trajectory,
    assert_same,
    parameters,
    random_problem,
    set_gradients,
    snapshot,
)

import piste

RTOL, ATOL = 1e-11, 1e-13  # the direction's step is divided by its own norm
DENSE = random_problem(seed=81)
FEWER_DENSE = random_problem(FEWER, seed=81)
GAPPY = random_problem(seed=82, missing=GAPS)
ENGINES = ["reference", "foreach", "cpp"]

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def grafted(
    magnitude: tuple[Any, dict[str, Any]],
    direction: tuple[Any, dict[str, Any]],
    problem: Problem,
    *,
    lr: float = 1.0,
    eps: float = 1e-16,
    decay: float = 0.0,
    together: bool = False,
) -> Trajectory:
    """Agarwal et al. 2020 in NumPy: both children step from the same weights, and neither step is taken as it is."""
    weights = [w.copy() for w in problem.weights]
    states: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in weights]
    trajectory = []
    for row in problem.gradients:
        steps = {}
        for i, g in enumerate(row):
            if g is not None:
                steps[i] = tuple(
                    formula(weights[i].copy(), g, state, **settings) - weights[i]
                    for (formula, settings), state in zip((magnitude, direction), states[i], strict=True)
                )
        squares = {i: [float((d * d).sum()) for d in pair] for i, pair in steps.items()}
        for i, (_, d) in steps.items():
            mine = [squares[i]] if not together else list(squares.values())
            length, other = (np.sqrt(sum(pair[side] for pair in mine)) for side in (0, 1))
            kept = weights[i] * (1 - magnitude[1]["lr"] * decay)
            weights[i] = kept + (lr * length / (other + eps) * d if other > 0 else 0.0)
        trajectory.append([w.copy() for w in weights])
    return trajectory


def run(make: Make, problem: Problem, dtype: torch.dtype = torch.float64) -> Trajectory:
    params = parameters(problem, dtype)
    optimizer = make(params)
    trajectory = []
    for row in problem.gradients:
        set_gradients(params, row)
        before = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step()
        for p, g in zip(params, before, strict=True):
            assert (g is None) if p.grad is None else torch.equal(p.grad, g)
        trajectory.append(snapshot(params))
    return trajectory


ADAM = (formulas.adam, {"lr": 0.02})
SGD = (formulas.sgd, {"lr": 0.5, "momentum": 0.9})
TYPED = {"Adam": ADAM, "SGD": SGD}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("problem", [DENSE, GAPPY], ids=["dense", "gaps"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"together": True}, {"lr": 0.5, "decay": 0.3}, {"eps": 0.1}, {"together": True, "decay": 0.3}],
    ids=str,
)
def test_formula(settings: dict[str, Any], problem: Problem, engine: str) -> None:
    """Adam's length, SGD's direction, and the other way round."""
    own = {"together": "use_global_norm", "decay": "weight_decay"}
    ours = {own.get(key, key): value for key, value in settings.items()}
    for first, second in (("Adam", "SGD"), ("SGD", "Adam")):

        def make(params: list[torch.nn.Parameter], first: str = first, second: str = second) -> piste.Graft:
            children = (getattr(piste, name)(params, engine=engine, **TYPED[name][1]) for name in (first, second))
            return piste.Graft(*children, **ours)

        assert_same(run(make, problem), grafted(TYPED[first], TYPED[second], problem, **settings), RTOL, ATOL)


@pytest.mark.parametrize("problem", [DENSE, GAPPY], ids=["dense", "gaps"])
def test_other_peoples_optimizers(problem: Problem) -> None:
    """torch's Adam and SGD inside, which step on the weights and are taken back: the same numbers."""
    expected = grafted(ADAM, SGD, problem)
    adam, sgd = torch.optim.Adam, torch.optim.SGD
    for first, second in ((adam, sgd), (adam, piste.SGD), (piste.Adam, sgd)):
        actual = run(lambda p, a=first, b=second: piste.Graft(a(p, **ADAM[1]), b(p, **SGD[1])), problem)
        assert_same(actual, expected, RTOL, 1e-12)  # a step of 0.02 as a difference of weights near 1


def test_a_child_that_writes_into_gradients_spoils_nothing() -> None:
    """adabelief-pytorch adds its L2 to p.grad in place, NvNovoGrad's decay too: the second child sees the true one."""

    class Spoiler(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(7.0)
            return super().step(closure)

    actual = run(lambda p: piste.Graft(Spoiler(p, lr=0.1), torch.optim.Adam(p, **ADAM[1])), DENSE)
    assert_same(actual, grafted((formulas.sgd, {"lr": 0.7}), ADAM, DENSE), RTOL, 1e-12)
    theirs = run(lambda p: piste.Graft(live.adabelief(p, lr=0.02, weight_decay=0.0), piste.SGD(p, lr=0.1)), DENSE)
    assert np.isfinite(theirs[-1][0]).all()


def test_any_class_is_a_child() -> None:
    """Every class of piste as magnitude and as direction: finite, and the step has the magnitude's length."""
    for info in piste.registry.OPTIMIZERS:
        params, alone = parameters(FEWER_DENSE), parameters(FEWER_DENSE)
        lr = {} if info.name == "Adafactor" else {"lr": 0.01}
        optimizer = piste.Graft(piste.AdamW(params, lr=0.02, weight_decay=0.0), _undecayed(info.optimizer, params, lr))
        single = piste.AdamW(alone, lr=0.02, weight_decay=0.0)
        for weights, one in ((params, optimizer), (alone, single)):
            set_gradients(weights, FEWER_DENSE.gradients[0])
            one.step()
        for p, a, start in zip(params, alone, FEWER_DENSE.weights, strict=True):
            mine, theirs = ((w.detach() - torch.tensor(start)).norm() for w in (p, a))
            rests = bool(mine == 0)  # a direction may rest at first (ScheduleFreeRAdam)
            assert rests or torch.isclose(mine, theirs, rtol=1e-9), info.name


def _undecayed(cls: Any, params: list[torch.nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    return cls(params, weight_decay=0.0, **settings)  # type: ignore[no-any-return]


def test_bfloat16_weights_lose_nothing_of_a_small_step() -> None:
    """A step of 1e-5 is nothing beside a bfloat16 1.0, but it has a length all the same, which a large lr shows."""
    w = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = piste.Graft(piste.Adam([w], lr=1e-5), piste.SGD([w], lr=1e-6), lr=1e4)
    w.grad = torch.arange(1, 9, dtype=torch.bfloat16)
    optimizer.step()
    unit = torch.arange(1, 9).double() / torch.arange(1, 9).double().norm()
    expected = 1 - 1e4 * 1e-5 * np.sqrt(8) * unit
    torch.testing.assert_close(w.detach().double(), expected, rtol=2**-8, atol=0)  # one rounding to bfloat16
    with pytest.raises(ValueError, match="would round its step to"):
        piste.Graft(torch.optim.Adam([w]), piste.SGD([w]))


def test_resume_is_bitwise() -> None:
    def make(params: list[torch.nn.Parameter]) -> piste.Graft:
        return piste.Graft(piste.Adam(params, lr=0.02), piste.SGD(params, lr=0.1, momentum=0.9), weight_decay=0.1)

    params = parameters(DENSE)
    straight = make(params)
    for row in DENSE.gradients[:7]:
        set_gradients(params, row)
        straight.step()
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied, theirs = copy.deepcopy((params, straight))
    for weights, one in ((params, straight), (again, resumed), (copied, theirs)):
        for row in DENSE.gradients[7:]:
            set_gradients(weights, row)
            one.step()
    for a, b, c in zip(params, again, copied, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert straight.layer_scales().values() is not None
    assert list(straight.layer_scales().values()) == list(resumed.layer_scales().values())
    with pytest.raises(ValueError, match="state"):
        resumed.load_state_dict(piste.Adam(again).state_dict())


def test_schedules_act_on_the_magnitude() -> None:
    params = parameters(DENSE)
    magnitude = piste.Adam(params, lr=0.02)
    optimizer = piste.Graft(magnitude, piste.SGD(params, lr=0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    set_gradients(params, DENSE.gradients[0])
    optimizer.step()
    scheduler.step()
    assert magnitude.param_groups[0]["lr"] == 0.01


def test_layer_scales_make_plain_sgd_as_long() -> None:
    """With the scales of one step, SGD alone takes that very step: the adaptive state is needed no more."""
    params, alone = parameters(DENSE), parameters(DENSE)
    optimizer = piste.Graft(piste.Adam(params, lr=0.02), piste.SGD(params, lr=0.3))
    set_gradients(params, DENSE.gradients[0])
    optimizer.step()
    scales = list(optimizer.layer_scales().values())
    groups = [{"params": [p], "lr_scale": scale} for p, scale in zip(alone, scales, strict=True)]
    sgd = piste.SGD(groups, lr=0.02)
    set_gradients(alone, DENSE.gradients[0])
    sgd.step()
    for a, b in zip(params, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert not sgd.state[alone[0]] or set(sgd.state[alone[0]]) == {"step"}


def test_scaled_groups_go_on_alone() -> None:
    """Mean ratios over a first part of training, as groups: named, decayed as before, one lr for a scheduler."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    named = list(model.named_parameters())
    optimizer = piste.Graft(piste.Adam(named, lr=0.01), piste.SGD(named, lr=1.0), weight_decay=0.1)
    with pytest.raises(RuntimeError, match="no step sizes have been measured yet"):
        optimizer.scaled_groups()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    groups = optimizer.scaled_groups()
    assert [group["param_names"] for group in groups] == [[name] for name, _ in named]
    assert all(group["weight_decay"] == 0.1 and group["decoupled_weight_decay"] for group in groups)
    sgd = piste.SGD(groups, lr=0.01)
    assert {group["lr"] for group in sgd.param_groups} == {0.01}
    rates = [group["lr"] for group in optimizer.scaled_groups(lr=0.01)]
    assert rates == pytest.approx([0.01 * group["lr_scale"] for group in groups])
    optimizer.reset_layer_scales()
    assert optimizer.layer_scales() == {}


def test_scaled_groups_reproduce_the_step_of_unequal_groups() -> None:
    """Groups with learning rates and decays of their own, and a direction that had an lr_scale: one lr for all."""
    rates, decays = [0.02, 0.2], [0.3, 0.0]

    def groups(params: list[torch.nn.Parameter], **each: list[float]) -> list[dict[str, Any]]:
        halves = (params[:3], params[3:])
        return [{"params": half, **{k: v[i] for k, v in each.items()}} for i, half in enumerate(halves)]

    params = parameters(DENSE)
    magnitude = piste.Adam(groups(params, lr=rates, outer_decay=decays))
    optimizer = piste.Graft(magnitude, piste.SGD(groups(params, lr_scale=[0.5, 3.0]), lr=0.3), weight_decay=0.7)
    set_gradients(params, DENSE.gradients[0])
    optimizer.step()
    by_scale = [{**g, "params": []} for g in optimizer.scaled_groups()]
    by_rate = [{**g, "params": []} for g in optimizer.scaled_groups(lr=rates[0])]
    for alone in (by_scale, by_rate):
        fresh = parameters(DENSE)
        sgd = piste.SGD([{**g, "params": [p]} for g, p in zip(alone, fresh, strict=True)], lr=rates[0])
        set_gradients(fresh, DENSE.gradients[0])
        sgd.step()
        for a, b in zip(params, fresh, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for group in magnitude.param_groups:  # a schedule that has ended at 0 does not hide the proportion
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    assert [g["lr_scale"] for g in optimizer.scaled_groups()] == [g["lr_scale"] for g in by_scale]


def test_decay_is_the_wrappers_own() -> None:
    """Nothing is left in the groups, which a second wrapper round the same magnitude shares."""
    params = parameters(DENSE)
    magnitude = piste.Adam(params, lr=0.02)
    piste.Graft(magnitude, piste.SGD(params, lr=0.1), weight_decay=0.9)
    second = piste.Graft(magnitude, piste.SGD(params, lr=0.1), weight_decay=0.0)
    set_gradients(params, DENSE.gradients[0])
    second.step()
    expected = grafted(ADAM, (formulas.sgd, {"lr": 0.1}), DENSE)[0]
    assert_same([snapshot(params)], [expected], RTOL, ATOL)


def test_grafts_nest() -> None:
    """A graft inside another: its step is taken back as anybody's; decay belongs to the outermost."""

    def make(params: list[torch.nn.Parameter]) -> piste.Graft:
        inner = piste.Graft(piste.Adam(params, **ADAM[1]), piste.SGD(params, lr=0.3))
        return piste.Graft(inner, piste.SGD(params, **SGD[1]), weight_decay=0.3)

    assert_same(run(make, DENSE), grafted(ADAM, SGD, DENSE, decay=0.3), 1e-10, 1e-12)


def test_an_error_inside_leaves_weights_and_gradients() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(3.0)
            raise KeyboardInterrupt

    params = parameters(DENSE)
    set_gradients(params, DENSE.gradients[0])
    gradients = [p.grad for p in params]
    for optimizer in (
        piste.Graft(Broken(params, lr=0.5), piste.SGD(params, lr=0.1)),
        piste.Graft(piste.Adam(params), Broken(params, lr=0.5)),
    ):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        for p, g, start, given in zip(params, gradients, DENSE.weights, DENSE.gradients[0], strict=True):
            np.testing.assert_array_equal(p.detach().numpy(), start)
            assert p.grad is g
            np.testing.assert_array_equal(g.numpy(), given)  # type: ignore[union-attr]


def test_a_tensor_at_rest_does_not_stop_the_others() -> None:
    """One norm for all: lingvo zeroes every step when the last tensor's direction is zero; here only that one rests."""
    zeros = [[np.zeros_like(g) if i == len(row) - 1 else g for i, g in enumerate(row)] for row in DENSE.gradients]
    problem = Problem(DENSE.weights, zeros)
    plain = (formulas.sgd, {"lr": 0.5})
    for together in (False, True):

        def make(params: list[torch.nn.Parameter], together: bool = together) -> piste.Graft:
            return piste.Graft(piste.Adam(params, lr=0.02), piste.SGD(params, lr=0.5), use_global_norm=together)

        seen = run(make, problem)
        assert_same(seen, grafted(ADAM, plain, problem, together=together), RTOL, ATOL)
        np.testing.assert_array_equal(seen[-1][-1], DENSE.weights[-1])
        assert not np.array_equal(seen[-1][0], DENSE.weights[0])


@pytest.mark.parametrize("eps", [1e-16, 0.0])
def test_a_direction_of_zero_and_a_zero_gradient_move_nothing(eps: float) -> None:
    params = parameters(DENSE)
    before = snapshot(params)
    optimizer = piste.Graft(piste.Adam(params), piste.SGD(params, lr=0.0), eps=eps)
    set_gradients(params, DENSE.gradients[0])
    optimizer.step()
    for p in params:
        p.grad = torch.zeros_like(p)
    zero = piste.Graft(piste.Adam(params), piste.SGD(params, lr=0.1), eps=eps)
    zero.step()
    for p, b in zip(params, before, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), b)


def test_non_finite_gradients_are_skipped_whole() -> None:
    params = parameters(DENSE)
    optimizer = piste.Graft(
        piste.Adam(params, nonfinite="skip"), piste.SGD(params, lr=0.1, momentum=0.9, nonfinite="skip")
    )
    set_gradients(params, DENSE.gradients[0])
    optimizer.step()
    before, saved = snapshot(params), copy.deepcopy(optimizer.state_dict())
    set_gradients(params, DENSE.gradients[1])
    params[1].grad = torch.full_like(params[1], float("nan"))
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), b)
    now = optimizer.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    assert all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for number in saved["state"]
        for x, y in zip(now["state"][number].values(), saved["state"][number].values(), strict=True)
    )


def test_state_is_measured() -> None:
    """Adam's 8 bytes, SGD's 0, and 4 of scratch, which is not saved."""
    w = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = piste.Graft(piste.Adam([w]), piste.SGD([w], lr=0.1))
    w.grad = torch.ones_like(w)
    optimizer.step()
    children = [x for child in (optimizer.magnitude, optimizer.direction) for x in child.state[w].values()]
    held = [x for x in (*children, *optimizer.own[w].values()) if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in held) / w.numel() == pytest.approx(12, abs=0.02)
    saved = [x for x in optimizer.state_dict()["state"][0].values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in saved) / w.numel() == pytest.approx(8, abs=0.02)


def test_a_late_group() -> None:
    params = parameters(DENSE)
    optimizer = piste.Graft(piste.Adam(params[:2]), piste.SGD(params[:2], lr=0.1))
    optimizer.add_param_group({"params": params[2:4], "lr": 0.01, "direction": {"momentum": 0.9}})
    set_gradients(params, DENSE.gradients[0])
    optimizer.step()
    assert optimizer.magnitude.param_groups[1]["lr"] == 0.01
    assert optimizer.direction.param_groups[1]["momentum"] == 0.9
    with pytest.raises(ValueError, match="legal: 0"):
        optimizer.add_param_group({"params": params[4:], "direction": {"weight_decay": 0.1}})
    assert len(optimizer.magnitude.param_groups) == len(optimizer.direction.param_groups) == 2


def _pair(**settings: Any) -> Callable[[list[torch.nn.Parameter]], Any]:
    return lambda p: piste.Graft(piste.Adam(p), piste.SGD(p), **settings)


REFUSED: list[tuple[Callable[[list[torch.nn.Parameter]], Any], str]] = [
    (lambda p: piste.Graft(piste.Adam(p), piste.SGD(p[:1])), "different weights"),
    (lambda p: (lambda a: piste.Graft(a, a))(piste.Adam(p)), "one optimizer as both"),
    (lambda p: piste.Graft(piste.AdamW(p), piste.SGD(p)), r"magnitude=AdamW with weight_decay=0\.01"),
    (lambda p: piste.Graft(piste.Adam(p, nonfinite="skip"), piste.SGD(p)), "different nonfinite"),
    (_pair(lr=-1.0), r"Graft got lr=-1\.0"),
    (_pair(eps=-1.0), r"Graft got eps=-1\.0"),
    (_pair(weight_decay=-1.0), r"Graft got weight_decay=-1\.0"),
    (lambda p: piste.Graft(piste.Adam([{"params": p, "outer_decay": -0.5}]), piste.SGD(p)), r"weight_decay=-0\.5"),
    (lambda p: piste.Graft(_pair(weight_decay=0.2)(p), piste.SGD(p)), r"magnitude=Graft with a decay of 0\.2"),
    (lambda p: piste.Graft(piste.SGD(p), _pair(weight_decay=0.2)(p)), r"direction=Graft with a decay of 0\.2"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refusals(make: Callable[[list[torch.nn.Parameter]], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(parameters(DENSE))


def test_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="magnitude=str"):
        piste.Graft("adam", piste.SGD(parameters(DENSE)))  # type: ignore[arg-type]


def test_lr_scale_is_a_factor_of_the_step_alone() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    scaled = piste.SGD([p], lr=0.1, lr_scale=0.5, weight_decay=0.2, decoupled_weight_decay=True)
    p.grad = q.grad = torch.ones(2, dtype=torch.float64)
    scaled.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 - 0.1 * 0.2 - 0.05, dtype=torch.float64))
    with pytest.raises(ValueError, match="lr_scale=-1"):
        piste.SGD([q], lr_scale=-1.0)
