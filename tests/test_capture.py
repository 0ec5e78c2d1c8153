"""Steps that a CUDA graph can record (``capturable=True``), played again from a tape on the CPU and, where there is a
GPU, from a graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tape import Steps, taped
from torch import Tensor

import piste
from piste.engines import triton
from piste.optimizer import Optimizer

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
Like = Callable[[], list[torch.nn.Parameter]]

REFUSED = {
    "PSGDKron": "a function of whole matrices that decides on the host",
    "Prodigy": "on the host in every step",
    "Ranger21": "on the host in every step",
    "SOAP": "a function of whole matrices that decides on the host",
    "ScheduleFreeAdamW": "on the host in every step",
    "ScheduleFreeRAdam": "on the host in every step",
    "ScheduleFreeSGD": "on the host in every step",
    "Shampoo": "a function of whole matrices that decides on the host",
}
CLASSES = {
    name: cls
    for name, cls in vars(piste).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer and name not in REFUSED
}
SHAPES = [(5, 7), (7,), (3, 2, 2, 2)]
#: kernels take the same double numbers rounded to the same floats, so that their results are the same bits; in torch, a
#: number in a tensor meets other kernels than one of Python's
TOLERANCE = {"cpp": 0.0, "triton": 0.0, "reference": 2e-6, "foreach": 2e-6}
INTERPRETED = pytest.mark.skipif(not triton.works_on(torch.device("cpu")), reason="Triton comes for Linux only")


def parameters(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    numbers = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=numbers).to(dtype)) for s in shapes]


def gradient(p: Tensor, step: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + step)
    return torch.randn(p.shape, generator=generator).to(p)


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """New gradients in the memory of those before, as a graph has them."""
    for number, p in enumerate(params):
        new = gradient(p, step, number)
        p.grad = new if p.grad is None else p.grad.copy_(new)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """A schedule: the learning rate is ``factor`` times its first one, filled in where it is a tensor."""
    for group in optimizer.param_groups:
        new = float(group.setdefault("initial_lr", float(group["lr"]))) * factor
        group["lr"] = group["lr"].fill_(new) if isinstance(group["lr"], Tensor) else new


def trained(
    make: Make,
    steps: int,
    patch: pytest.MonkeyPatch,
    *,
    record: int | None = None,
    like: Like = parameters,
    **how: bool,
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Steps under a schedule; the first ones warm up where one is recorded, and the others are played from the tape."""
    params = like()
    optimizer = make(params)
    take = Steps(optimizer, patch, record, **how)
    for step in range(steps):
        set_rate(optimizer, 1 + step / 10)
        give_gradients(params, step)
        take()
    return [p.detach() for p in params], optimizer


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compare(
    name: str, engine: str, patch: pytest.MonkeyPatch, steps: int = 22, like: Like = parameters, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after steps from the tape, and after the same steps without one."""

    def make(ps: list[torch.nn.Parameter], **more: Any) -> Optimizer:
        optimizer: Optimizer = getattr(piste, name)(ps, engine=engine, **({"lr": 0.01} | options | more))
        return optimizer

    now, _ = trained(make, steps, patch, like=like)
    # kernels of before may send host numbers that have not changed; those that would change stand still on the tape
    uploads = engine == "triton"
    recordable = partial(make, capturable=True)
    again, optimizer = trained(recordable, steps, patch, record=1, like=like, uploads=uploads)
    assert {state["step"].item() for state in optimizer.state.values()} == {steps}
    return again, now


# ---------------------------------------------------------------------------------------------------------------------
# Played again


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_step_plays_again_under_a_schedule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times from the tape: bias corrections, rectification, synchronisation and the learning rate move on."""
    assert_close(*compare(name, "reference", monkeypatch), TOLERANCE["reference"])


@pytest.mark.parametrize("engine", ["foreach", "cpp", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("name", ["RAdam", "Ranger"])
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")
def test_branches_play_again_on_every_engine(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_close(*compare(name, engine, monkeypatch), TOLERANCE[engine])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["foreach", "cpp", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"RAdam", "Ranger"}))
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")
def test_every_rule_plays_again_on_every_engine(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_close(*compare(name, engine, monkeypatch), TOLERANCE[engine])


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.5},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"cautious": True, "maximize": True},
        {"betas": (0.8, 0.9)},
    ],
    ids=str,
)
def test_options_play_again(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_close(*compare("RAdam", "reference", monkeypatch, steps=12, **options), TOLERANCE["reference"])


def coded_parameters(form: str) -> list[torch.nn.Parameter]:
    """A matrix whose moments are stored as codes, with rows that cut a block off, and a vector too small for that."""
    return parameters([(2, 2060), (7,)], torch.float32 if form == "plain" else torch.bfloat16)


CODED = [
    ("AdamW", "bf16", "plain"),
    ("AdamW", "8bit", "plain"),
    ("Lion", "4bit", "stochastic"),
    ("AdamW", "4bit", "kahan"),
    ("AdamW", "8bit", "remainder"),
]
ON_ENGINES = [  # of those that are built or interpreted, the fast tests have one
    pytest.param(
        *coded,
        engine,
        marks=[
            *([pytest.mark.slow] if i and engine in ("cpp", "triton") else []),
            *([INTERPRETED] if engine == "triton" else []),
        ],
    )
    for i, coded in enumerate(CODED)
    for engine in TOLERANCE
]


@pytest.mark.parametrize(("name", "state", "weights", "engine"), ON_ENGINES)
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")
def test_codes_play_again(name: str, state: str, weights: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of rounding move on with a step number on the device.

    The cpp engine reads it, as no graph records a CPU: there, steps are taken one by one. Its codes are triton's, to
    the bit, and ten times as quick to have. In torch, a number that differs in the last bit falls on the other side of
    a threshold now and then.
    """
    like = partial(coded_parameters, weights)
    make = partial(getattr(piste, name), state=state, weights=weights, lr=0.01)
    plain = partial(make, engine="cpp" if engine == "triton" else engine)
    now, theirs = trained(plain, 12, monkeypatch, like=like)
    recordable, record = partial(make, engine=engine, capturable=True), None if engine == "cpp" else 1
    again, ours = trained(recordable, 12, monkeypatch, record=record, like=like, uploads=engine == "triton")
    if TOLERANCE[engine]:
        for a, b, start in zip(again, now, like(), strict=True):
            assert (a.float() - b.float()).norm() <= 2e-3 * (b.float() - start.detach().float()).norm()
    else:
        assert_close(again, now, 0.0)
        torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0)


def test_a_step_with_numbers_from_the_host_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tape is able to fail: what Python knew when it was recorded stays."""

    def make(ps: list[torch.nn.Parameter]) -> Optimizer:
        return piste.RAdam(ps, lr=0.01, engine="reference")

    now, _ = trained(make, 22, monkeypatch)
    again, _ = trained(make, 22, monkeypatch, record=1)
    assert max((a - b).abs().max() for a, b in zip(again, now, strict=True)) > 1e-3


def test_waiting_for_the_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with taped(monkeypatch), pytest.raises(RuntimeError, match="cannot be recorded"):
        torch.ones(()).item()


def test_betas_play_again_as_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum is cycled by piste's schedules, which fill tensors."""

    def steps(*, recorded: bool) -> list[Tensor]:
        params = parameters()
        beta: Any = torch.tensor(0.9, dtype=torch.float64) if recorded else 0.9
        optimizer = piste.AdamW(params, lr=0.01, betas=(beta, 0.99), engine="reference", capturable=recorded)
        schedule = piste.schedules.one_cycle(optimizer, 10)
        take = Steps(optimizer, monkeypatch, 2 if recorded else None)
        for step in range(10):
            give_gradients(params, step)
            take()
            schedule.step()
        return [p.detach() for p in params]

    assert_close(steps(recorded=True), steps(recorded=False), 2e-6)


def test_torch_schedulers_fill_the_learning_rate() -> None:
    (params,) = [parameters()]
    optimizer = piste.AdamW(params, lr=0.1, capturable=True)
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    give_gradients(params, 0)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert 0.09 < rate.item() < 0.1


def test_groups_with_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has a tensor that the user keeps, one is not decayed, and their weights share kernels."""
    kept = torch.tensor(0.02, dtype=torch.float64)

    def make(*, capturable: bool) -> Make:
        def of(ps: list[torch.nn.Parameter]) -> Optimizer:
            groups = [{"params": ps[:2], "lr": kept.clone()}, {"params": ps[2:], "weight_decay": 0.0, "k": 5}]
            return piste.Ranger(groups, lr=0.01, weight_decay=0.1, engine="cpp", capturable=capturable)

        return of

    again, _ = trained(make(capturable=True), 15, monkeypatch, record=1)
    now, _ = trained(make(capturable=False), 15, monkeypatch)
    assert_close(again, now, 0.0)


def test_weights_count_their_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was frozen at first is ten steps younger, before and while the tape plays."""

    def steps(*, recorded: bool) -> list[Tensor]:
        params = parameters()
        optimizer = piste.RAdam(params, lr=0.01, engine="cpp", capturable=recorded)
        params[1].requires_grad_(False)
        take = Steps(optimizer, monkeypatch, 12 if recorded else None)
        for step in range(20):
            params[1].requires_grad_(step > 9)
            give_gradients(params, step)
            if step <= 9:
                params[1].grad = None
            take()
        assert [int(optimizer.state[p]["step"]) for p in params] == [20, 10, 20]
        return [p.detach() for p in params]

    assert_close(steps(recorded=True), steps(recorded=False), 0.0)


def test_a_schedule_builds_nothing_new() -> None:
    params = parameters()
    optimizer = piste.Ranger(params, capturable=True, engine="reference")
    give_gradients(params, 0)
    optimizer.step()
    plans, traces = piste.execution.plans_built(), piste.symbol.traces_made()
    for step in range(1, 20):
        set_rate(optimizer, 1 + step)
        give_gradients(params, step)
        optimizer.step()
    assert (plans, traces) == (piste.execution.plans_built(), piste.symbol.traces_made())


# ---------------------------------------------------------------------------------------------------------------------
# Lookahead round an optimizer


def lookahead(params: list[torch.nn.Parameter], inner: str = "AdamW", **options: Any) -> torch.optim.Optimizer:
    return piste.Lookahead(getattr(piste, inner)(params, lr=0.05, **options), k=5, alpha=0.3)


@pytest.mark.parametrize("engine", ["reference", "foreach", "cpp", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")
def test_lookahead_plays_again(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now, _ = trained(partial(lookahead, engine=engine), 22, monkeypatch)
    recordable = partial(lookahead, engine=engine, capturable=True)
    again, _ = trained(recordable, 22, monkeypatch, record=1, uploads=engine == "triton")
    assert_close(again, now, TOLERANCE[engine])


@pytest.mark.parametrize("weights", ["stochastic", "kahan", "remainder"])
def test_lookahead_of_weights_that_stand_for_more(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are written in every step: where nothing is to change, they stand for what they stood for."""
    whole = []
    for capturable in (False, True):
        make = partial(lookahead, engine="cpp", weights=weights, capturable=capturable)
        _, optimizer = trained(make, 12, monkeypatch, like=partial(coded_parameters, weights))
        own = [p for group in optimizer.param_groups for p in group["params"]]
        whole.append([optimizer.optimizer.full_precision(p) for p in own])  # type: ignore[attr-defined]
    assert_close(*whole, 0.0)


def test_lookahead_leaves_a_skipped_step_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    params, twins = parameters(), parameters()
    optimizer, plain = lookahead(params, engine="reference", capturable=True), lookahead(twins, engine="reference")
    found = optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
    take = Steps(optimizer, monkeypatch, 3)
    for step in range(14):
        skipped = step in (1, 4, 9)
        found.fill_(skipped)
        give_gradients(params, step)
        take()
        if not skipped:
            give_gradients(twins, step)
            plain.step()
    assert_close([p.detach() for p in params], [p.detach() for p in twins], TOLERANCE["reference"])
    counts = {entries["lookahead.step"] for entries in optimizer.state_dict()["state"].values()}
    assert counts == {11}


@pytest.mark.parametrize("capturable", [False, True])
def test_lookahead_goes_on_from_a_checkpoint(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kind it was saved from; a tape goes on from what was loaded, too."""
    expected, _ = trained(partial(lookahead, engine="cpp"), 14, monkeypatch)
    params = parameters()
    half = lookahead(params, engine="cpp", capturable=not capturable)
    for step in range(7):
        set_rate(half, 1 + step / 10)
        give_gradients(params, step)
        half.step()
    saved, weights = copy.deepcopy(half.state_dict()), [p.detach().clone() for p in params]
    optimizer = lookahead(params, engine="cpp", capturable=capturable)
    take = Steps(optimizer, monkeypatch, 2 if capturable else None)
    for step in (*range(4), *range(7, 14)):
        if step == 7:
            optimizer.load_state_dict(saved)
            for p, w in zip(params, weights, strict=True):
                p.detach().copy_(w)
        set_rate(optimizer, 1 + step / 10)
        give_gradients(params, step)
        take()
    assert_close([p.detach() for p in params], expected, 0.0)


def test_a_wrapper_that_is_recorded_without_being_able_to(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = piste.Lookahead(torch.optim.SGD(params, lr=0.1))
    give_gradients(params, 0)
    optimizer.step()
    monkeypatch.setattr("piste.wrappers.base.recording", lambda: True)
    with pytest.raises(RuntimeError, match="a step of Lookahead is being recorded into a CUDA graph"):
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# Overflow


@pytest.mark.parametrize(
    ("name", "engine"), [("AdamW", "cpp"), ("AdamW", "foreach"), ("Ranger", "reference"), ("Lamb", "reference")]
)
def test_grad_scaler(name: str, engine: str) -> None:
    """torch's own, in every detail the same as for a step that the host leads: scale, weights, states, step numbers."""

    def train(*, capturable: bool) -> tuple[list[Tensor], list[int], float]:
        params = parameters()
        optimizer = getattr(piste, name)(params, lr=0.01, clip_norm=1.0, engine=engine, capturable=capturable)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
        for step in range(12):
            for number, p in enumerate(params):
                p.grad = scaler.scale(gradient(p, step, number))
                if step in (3, 4, 8):
                    p.grad.view(-1)[0] = torch.inf
            before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
            scaler.step(optimizer)
            scaler.update()
            if capturable:
                assert optimizer.last_step.skipped is (step in (3, 4, 8))
            if step in (3, 4, 8):
                assert all(map(torch.equal, params, before[0]))
                torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
        counts = [int(optimizer.state[p]["step"]) for p in params]
        return [p.detach() for p in params], counts, scaler.get_scale()

    (ours, our_counts, our_scale), (theirs, counts, scale) = train(capturable=True), train(capturable=False)
    assert (our_counts, our_scale) == (counts, scale) == ([9] * 3, scale)
    assert_close(ours, theirs, 2e-6)


@pytest.mark.parametrize("engine", ["reference", "foreach"])
def test_found_inf_is_heeded_on_the_tape(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = piste.Ranger(params, lr=0.01, engine=engine, capturable=True)
    plain = piste.Ranger(twin := parameters(), lr=0.01, engine=engine)
    scale, found = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.grad_scale, optimizer.found_inf = scale, found  # type: ignore[attr-defined]
    take = Steps(optimizer, monkeypatch, 3)
    for step in range(14):
        skipped = step in (0, 5, 6)
        found.fill_(skipped)
        scale.fill_(2.0 ** (step % 3))
        for number, (p, q) in enumerate(zip(params, twin, strict=True)):
            q.grad = gradient(q, step, number)
            given = q.grad * scale if not skipped else q.grad * torch.nan
            p.grad = given if p.grad is None else p.grad.copy_(given)
        take()
        if not skipped:
            plain.step()
    assert_close([p.detach() for p in params], [p.detach() for p in twin], TOLERANCE[engine])
    assert {int(state["step"]) for state in optimizer.state.values()} == {11}


@pytest.mark.parametrize(("state", "weights"), [("fp32", "kahan"), ("8bit", "remainder"), ("4bit", "stochastic")])
def test_what_stands_beside_a_weight_is_left_alone(state: str, weights: str) -> None:
    params = coded_parameters(weights)
    optimizer = piste.AdamW(params, lr=0.01, state=state, weights=weights, capturable=True)
    for step in range(6):
        give_gradients(params, step)
        optimizer.found_inf = torch.tensor(float(step >= 3))  # type: ignore[attr-defined]
        kept = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
        optimizer.step()
        if step >= 3:
            torch.testing.assert_close(optimizer.state_dict()["state"], kept[0], rtol=0, atol=0)
            assert all(map(torch.equal, params, kept[1]))
        elif step:
            assert not torch.equal(params[0], kept[1][0])


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_optimizers_that_decide_on_the_host(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} got capturable=True.*{REFUSED[name]}.*; legal: False"):
        getattr(piste, name)(parameters([(8, 8)]), capturable=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engine": "compile"}, "engine='compile', which sends numbers"),
        ({"nonfinite": "skip"}, "nonfinite='skip', which waits for the device"),
    ],
    ids=str,
)
def test_options_that_need_the_host(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        piste.AdamW(parameters(), capturable=True, **options)


def test_wrappers_that_count_on_the_host() -> None:
    with pytest.raises(ValueError, match="SAM got a AdamW with capturable=True"):
        piste.SAM(piste.AdamW(parameters(), capturable=True))
    with pytest.raises(ValueError, match="Graft got a AdamW with capturable=True"):
        piste.Graft(piste.SGD(ps := parameters()), piste.AdamW(ps, weight_decay=0.0, capturable=True))


def test_a_missing_gradient() -> None:
    """By name, before anything changes; a weight that is not trained may have none."""
    model = torch.nn.Linear(3, 2)
    optimizer = piste.AdamW(model.named_parameters(), capturable=True)
    before = [p.detach().clone() for p in model.parameters()]
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(ValueError, match=r"AdamW with capturable=True has no gradient for 1 weights \('bias'\)"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state
    model.bias.requires_grad_(False)
    optimizer.step()
    assert not torch.equal(model.weight, before[0])


def test_a_refused_group_is_gone() -> None:
    optimizer = piste.AdamW(parameters(), capturable=True)
    with pytest.raises(ValueError, match="AdamW got capturable=True for a weight on 'meta'"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.empty(3, device="meta"))]})
    assert len(optimizer.param_groups) == 1


def test_a_recording_is_refused_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without capturable=True, and without a step before."""
    monkeypatch.setattr("piste.optimizer.recording", lambda: True)
    monkeypatch.setattr("piste.roster.recording", lambda: True)
    params = parameters()
    give_gradients(params, 0)
    with pytest.raises(RuntimeError, match="AdamW is being recorded into a CUDA graph, which needs capturable=True"):
        piste.AdamW(params).step()
    with pytest.raises(RuntimeError, match="take one like it before the recording begins"):
        piste.AdamW(params, capturable=True).step()


# ---------------------------------------------------------------------------------------------------------------------
# Saved, copied, moved


def test_state_dicts_say_nothing_of_it() -> None:
    """Plain numbers, which either kind of optimizer loads and goes on from."""
    params = parameters()
    optimizer = piste.Ranger(params, lr=0.01, engine="cpp", capturable=True)
    for step in range(7):
        give_gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] == 0.01
    assert {entries["step"] for entries in saved["state"].values()} == {7}
    start = [p.detach().clone() for p in params]
    ends = []
    for capturable in (True, False):
        for p, q in zip(params, start, strict=True):
            p.detach().copy_(q)
        other = piste.Ranger(params, lr=0.5, engine="cpp", capturable=capturable)
        other.load_state_dict(saved)
        for step in range(7, 14):
            give_gradients(params, step)
            other.step()
        ends.append([p.detach().clone() for p in params])
        assert isinstance(other.param_groups[0]["lr"], Tensor) is capturable
    assert_close(*ends, 0.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_by_themselves(copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = piste.RAdam(params, lr=0.01, engine="reference", capturable=True)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    other = copied(optimizer)
    for step in range(3, 9):
        give_gradients(params, step)
        optimizer.step()
        give_gradients(twins := [p for group in other.param_groups for p in group["params"]], step)
        other.step()
    assert_close([p.detach() for p in params], [p.detach() for p in twins], 0.0)


def test_a_tape_goes_on_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded goes into the tensors that the recorded step knows."""
    params = parameters()
    optimizer = piste.Ranger(params, lr=0.01, engine="reference", capturable=True)
    take = Steps(optimizer, monkeypatch, 3)
    saved: Any = None
    for step in range(9):
        if step == 5:
            saved = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
        give_gradients(params, step)
        take()
    end = [p.detach().clone() for p in params]
    optimizer.load_state_dict(saved[0])
    for p, q in zip(params, saved[1], strict=True):
        p.detach().copy_(q)
    for step in range(5, 9):
        give_gradients(params, step)
        take()
    assert_close([p.detach() for p in params], end, 0.0)
    give_gradients(params, 9)
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {10}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("engine", ["cpp", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")
def test_memory_that_moves_is_noticed(engine: str, capturable: bool) -> None:
    """Gradients made anew, weights whose ``.data`` was exchanged, and models that were converted and back."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    twin = copy.deepcopy(model)
    optimizer = piste.AdamW(model.parameters(), lr=0.01, engine=engine, capturable=capturable)
    plain = piste.AdamW(twin.parameters(), lr=0.01, engine="reference")
    held = []
    for step in range(6):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad, q.grad = gradient(p, step, 0), gradient(q, step, 0)
        if step == 2:  # elsewhere, and the old memory is somebody else's
            for p in model.parameters():
                held.append(p.data)
                p.data = p.data.clone()
                held[-1].fill_(torch.nan)
        if step == 4:
            for p in model.parameters():
                held.append(p.data)
            model.to(torch.float64).to(torch.float32)
        optimizer.step()
        plain.step()
        for p in model.parameters():
            held.append(p.grad)
            p.grad = None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_training_steps_that_are_compiled(inside: bool) -> None:
    """With ``optimizer.step()`` outside of the compiled region, and inside, where the graph is broken."""

    def train(*, compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        optimizer = piste.Ranger(model.parameters(), lr=0.01)
        inputs = torch.randn(16, 4)

        def loss_of(x: Tensor) -> Tensor:
            result: Tensor = model(x).square().mean()
            return result

        forward = torch.compile(loss_of, backend="aot_eager") if compiled and not inside else loss_of

        def step() -> None:
            optimizer.zero_grad()
            forward(inputs).backward()
            optimizer.step()

        run = torch.compile(step, backend="aot_eager") if compiled and inside else step
        for _ in range(8):
            run()
        return [p.detach() for p in model.parameters()]

    assert_close(train(compiled=True), train(compiled=False), 1e-6)
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def _on_gpu(make: Make, *, recorded: bool, like: Like = parameters) -> list[Tensor]:
    """Two steps on a side stream, one that is recorded, and 21 replays; one in between is taken without the graph, with
    gradients in memory that the graph does not know."""
    params = [torch.nn.Parameter(p.detach().cuda()) for p in like()]
    optimizer = make(params)
    graph = torch.cuda.CUDAGraph() if recorded else None
    side = torch.cuda.Stream()
    for step in range(24):
        set_rate(optimizer, 1 + step / 10)
        give_gradients(params, step)
        known = [p.grad for p in params]
        if graph is None or step < 2 or step == 12:
            for p in params if step == 12 else ():
                p.grad = p.grad.clone()  # type: ignore[union-attr]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
            for p, gradient in zip(params, known, strict=True):
                p.grad = gradient
        else:
            if step == 2:
                with torch.cuda.graph(graph, stream=side):  # records, and runs nothing
                    optimizer.step()
            graph.replay()
    torch.cuda.synchronize()
    return [p.detach() for p in params]


def _coded(params: list[torch.nn.Parameter], **options: Any) -> Optimizer:
    """No number of its step follows from the step number, so that codes are the same ones."""
    return piste.SGD(params, lr=0.01, momentum=0.9, state="8bit", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("engine", ["triton", "foreach"])
@pytest.mark.parametrize("name", ["AdamW", "RAdam", "Ranger", "Lamb", "Muon", "Lookahead", "codes"])
def test_a_cuda_graph_replays(name: str, engine: str) -> None:
    made: Any = {"Lookahead": lookahead, "codes": _coded}.get(name) or partial(getattr(piste, name), lr=0.01)
    like = partial(coded_parameters, "plain") if name == "codes" else parameters
    make = partial(made, engine=engine)
    both = (_on_gpu(partial(make, capturable=recorded), recorded=recorded, like=like) for recorded in (True, False))
    assert_close(*both, 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gradients_are_let_go_of_early() -> None:
    """On a side stream, and memory that is given to others at once."""
    params = [torch.nn.Parameter(torch.zeros(1 << 20, device="cuda")) for _ in range(4)]
    optimizer = piste.SGD(params, lr=1.0, momentum=0.0, engine="triton")
    side = torch.cuda.Stream()
    for _ in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for p in params:
            torch.full_like(p, torch.nan)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(p, torch.full_like(p, -5.0)) for p in params)
