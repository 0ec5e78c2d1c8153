"""Schedules: fastai's formulas typed again here, resuming, any torch optimizer, bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

import piste
from piste import schedules

STEPS = 40


def weights(*sizes):
    return [torch.nn.Parameter(torch.ones(size)) for size in sizes]


def sgd(lr=1.0, momentum=0.9):
    return torch.optim.SGD(weights(3), lr=lr, momentum=momentum)


def walk(optimizer, schedule, steps, read):
    """What `read(group)` gives for every group at every batch."""
    seen = []
    for _ in range(steps):
        seen.append([read(group) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def cos(a, b, y):
    return a + (b - a) * (1 - math.cos(math.pi * y)) / 2


def lr(group):
    return float(group["lr"])


def beta1(group):
    return float(group["betas"][0])


def momentum(group):
    return float(group["momentum"])


@pytest.mark.parametrize(("steps", "pct"), [(1, 0.25), (7, 0.25), (40, 0.25), (40, 0.0), (33, 0.3), (10, 0.99)])
def test_one_cycle_is_the_formula(steps, pct):
    optimizer = torch.optim.Adam([{"params": weights(2)}, {"params": weights(3), "lr": 0.5}], lr=2.0)
    schedule = schedules.one_cycle(optimizer, steps, pct_start=pct, div=10.0, div_final=1e3, moms=(0.9, 0.7, 0.8))
    assert isinstance(schedule, LRScheduler)
    seen = walk(optimizer, schedule, steps, lambda group: (lr(group), beta1(group)))
    for done, groups in enumerate(seen):
        x = done / steps
        for peak, (rate, mom) in zip((2.0, 0.5), groups, strict=True):
            if x < pct:
                expected = cos(peak / 10, peak, x / pct), cos(0.9, 0.7, x / pct)
            else:
                y = (x - pct) / (1 - pct)
                expected = cos(peak, peak / 1e3, y), cos(0.7, 0.8, y)
            assert (rate, mom) == pytest.approx(expected, rel=1e-12)


def test_one_cycle_defaults_are_those_of_fit_one_cycle():
    optimizer = sgd(lr=1.0)
    schedule = schedules.one_cycle(optimizer, 4)
    seen = walk(optimizer, schedule, 4, lambda group: (lr(group), momentum(group)))
    # By hand: up over the first quarter, then 0, 1/3 and 2/3 of the way down a half cosine (1, 3/4, 1/4).
    rates, moms = zip(*(groups[0] for groups in seen), strict=True)
    assert rates == pytest.approx((1 / 25, 1.0, 0.75 + 0.25e-5, 0.25 + 0.75e-5), rel=1e-12)
    assert moms == pytest.approx((0.95, 0.85, 0.875, 0.925), rel=1e-12)


@pytest.mark.parametrize(("steps", "pct"), [(1, 0.75), (8, 0.75), (40, 0.0), (33, 0.72)])
def test_flat_cosine_is_the_formula(steps, pct):
    optimizer = sgd(lr=0.3)
    schedule = schedules.flat_cosine(optimizer, steps, pct_start=pct, div_final=50.0)
    seen = walk(optimizer, schedule, steps, lambda group: (lr(group), momentum(group)))
    for done, [(rate, mom)] in enumerate(seen):
        x = done / steps
        expected = 0.3 if x < pct else cos(0.3, 0.3 / 50, (x - pct) / (1 - pct))
        assert rate == pytest.approx(expected, rel=1e-12)
        assert mom == 0.9


@pytest.mark.parametrize("shape", ["sqrt", "linear", "cosine"])
@pytest.mark.parametrize(("warm", "decay"), [(0.1, 0.2), (0.0, 0.5), (0.9, 0.1), (0.25, 0.0)])
def test_warmup_stable_decay_is_the_formula(shape, warm, decay):
    optimizer = sgd(lr=4.0)
    schedule = schedules.warmup_stable_decay(
        optimizer, STEPS, pct_warmup=warm, pct_decay=decay, shape=shape, div=8, div_final=100
    )
    for done, [rate] in enumerate(walk(optimizer, schedule, STEPS, lr)):
        x = done / STEPS
        if x < warm:
            expected = 0.5 + (4 - 0.5) * x / warm
        elif x <= 1 - decay:
            expected = 4.0
        else:
            y = (x - (1 - decay)) / decay
            left = {"sqrt": 1 - math.sqrt(y), "linear": 1 - y, "cosine": (1 + math.cos(math.pi * y)) / 2}[shape]
            expected = 0.04 + (4 - 0.04) * left
        assert rate == pytest.approx(expected, rel=1e-6)


def test_untuned_warmup_reads_beta2_of_each_group():
    groups = [{"params": weights(2), "betas": (0.9, 0.9)}, {"params": weights(2), "betas": (0.9, 0.5)}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    seen = walk(optimizer, schedules.untuned_warmup(optimizer), 25, lr)
    slow, fast = zip(*seen, strict=True)
    assert slow == pytest.approx([min(1, t / 20) for t in range(1, 26)])  # 2 / (1 - 0.9) = 20 steps
    assert fast == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 22)


def test_untuned_warmup_of_an_optimizer_without_betas():
    optimizer = torch.optim.RMSprop(weights(2), lr=1.0, alpha=0.5)
    with pytest.raises(ValueError, match="parameter group 0 has no betas"):
        schedules.untuned_warmup(optimizer)
    assert "initial_lr" not in optimizer.param_groups[0]
    assert walk(optimizer, schedules.untuned_warmup(optimizer, beta2=0.5), 4, lr) == [[0.25], [0.5], [0.75], [1.0]]


def test_constant_is_constant():
    optimizer = sgd(lr=0.7)
    assert walk(optimizer, schedules.constant(optimizer, 3), 5, lr) == [[0.7]] * 5


def test_stepping_past_the_end_holds_the_end_value():
    for name, end in [("one_cycle", 1e-5), ("flat_cosine", 1e-5), ("warmup_stable_decay", 1e-5)]:
        optimizer = sgd(lr=1.0)
        rates = walk(optimizer, schedules.named(name)(optimizer, 6), 12, lr)
        assert [rate for [rate] in rates[6:]] == pytest.approx([end] * 6)
        assert rates[5][0] > 100 * end  # the last batch itself is still on the way


@pytest.mark.parametrize("moms", [None, (0.95, 0.85, 0.95)])
def test_momentum_left_alone(moms):
    marked = {"params": weights(2), "cycle_momentum": False}
    for optimizer, read in [
        (torch.optim.SGD([marked], lr=1.0, momentum=0.6), lambda g: g["momentum"]),
        (torch.optim.SGD(weights(2), lr=1.0), lambda g: g["momentum"]),
        (torch.optim.AdamW(weights(2), betas=(0.0, 0.9)), lambda g: g["betas"]),
        (torch.optim.Adagrad(weights(2)), lambda g: g.get("momentum")),
        (piste.ScheduleFreeSGD(weights(2)), lambda g: g["momentum"]),  # whose average is found by it
        (piste.ScheduleFreeAdamW(weights(2)), lambda g: g["betas"]),
    ]:
        before = read(optimizer.param_groups[0])
        schedule = schedules.one_cycle(optimizer, 8, moms=moms)
        assert walk(optimizer, schedule, 9, read) == [[before]] * 9
    optimizer = sgd(momentum=0.6)
    schedule = schedules.one_cycle(optimizer, 8, moms=moms)
    assert (optimizer.param_groups[0]["momentum"] == 0.6) == (moms is None)
    assert schedule.get_last_lr() == [1 / 25]


OPTIMIZERS = {
    "piste.Ranger": lambda params: piste.Ranger(params, lr=0.1),
    "piste.SGD": lambda params: piste.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "AdamW, tensor lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1)),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}
NAMES = ["one_cycle", "flat_cosine", "warmup_stable_decay", "untuned_warmup", "constant"]


class Run:
    """A little training whose gradients depend on the step, with two groups."""

    def __init__(self, make, name):
        self.params = [torch.nn.Parameter(torch.linspace(-1, 1, 5)), torch.nn.Parameter(torch.ones(2))]
        self.optimizer = make([{"params": self.params[:1]}, {"params": self.params[1:], "lr": self.other_lr(make)}])
        betas = {"beta2": 0.9} if name == "untuned_warmup" else {}
        self.schedule = schedules.named(name)(self.optimizer, 12, **betas)

    @staticmethod
    def other_lr(make):
        rate = make(weights(1)).param_groups[0]["lr"]
        return rate / 2

    def train(self, steps):
        for step in steps:
            for param in self.params:
                param.grad = torch.cos(param.detach() * 3 + step)
            self.optimizer.step()
            self.schedule.step()

    def save(self):
        file = io.BytesIO()
        state = [param.detach() for param in self.params], self.optimizer.state_dict(), self.schedule.state_dict()
        torch.save(state, file)
        return file.getvalue()

    def load(self, data, order):
        params, optimizer, schedule = torch.load(io.BytesIO(data), weights_only=True)
        with torch.no_grad():
            for mine, saved in zip(self.params, params, strict=True):
                mine.copy_(saved)
        loads = {
            "o": lambda: self.optimizer.load_state_dict(optimizer),
            "s": lambda: self.schedule.load_state_dict(schedule),
        }
        for key in order:
            loads[key]()


@pytest.mark.parametrize("order", ["os", "so"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_resuming_is_bitwise(make, name, order):
    whole, first = Run(make, name), Run(make, name)
    whole.train(range(14))
    first.train(range(5))
    resumed = Run(make, name)
    resumed.load(first.save(), order)
    assert resumed.schedule.get_last_lr() == first.schedule.get_last_lr()
    for mine, theirs in zip(resumed.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    resumed.train(range(5, 14))
    for mine, theirs in zip(resumed.params, whole.params, strict=True):
        assert torch.equal(mine, theirs)


def test_a_schedule_made_on_a_resumed_optimizer_continues():
    """The trap of torch's schedulers: made after the optimizer was loaded, they train one batch at the first rate."""
    first = Run(OPTIMIZERS["SGD"], "one_cycle")
    first.train(range(5))
    params = weights(5, 2)
    optimizer = OPTIMIZERS["SGD"]([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.load_state_dict(first.optimizer.state_dict())
    schedule = schedules.one_cycle(optimizer, 12)
    schedule.load_state_dict(first.schedule.state_dict())
    for mine, theirs in zip(optimizer.param_groups, first.optimizer.param_groups, strict=True):
        assert (mine["lr"], mine["momentum"]) == (theirs["lr"], theirs["momentum"])


def test_the_peaks_are_part_of_the_state():
    first, other = sgd(lr=1.0), sgd(lr=0.125)
    saved = schedules.flat_cosine(first, 8).state_dict()
    schedule = schedules.flat_cosine(other, 8)
    schedule.load_state_dict(saved)
    assert walk(other, schedule, 2, lr) == [[1.0], [1.0]]


def test_a_tensor_learning_rate_keeps_its_memory():
    rate, first = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    optimizer = torch.optim.Adam(weights(2), lr=rate)
    optimizer.param_groups[0]["betas"] = (first, 0.999)
    schedule = schedules.one_cycle(optimizer, 8)
    place, rates = optimizer.param_groups[0]["lr"].data_ptr(), []
    for _ in range(8):
        group = optimizer.param_groups[0]
        assert group["lr"].data_ptr() == place
        assert group["betas"][0] is first
        rates.append((float(group["lr"]), float(first)))
        schedule.optimizer.step()
        schedule.step()
    numbers = torch.optim.Adam(weights(2), lr=2.0)
    expected = walk(numbers, schedules.one_cycle(numbers, 8), 8, lambda g: (lr(g), beta1(g)))
    assert torch.allclose(torch.tensor(rates), torch.tensor(expected).squeeze(1))


def test_a_group_added_later_joins_in():
    optimizer = sgd(lr=1.0)
    schedule = schedules.flat_cosine(optimizer, 8)
    walk(optimizer, schedule, 3, lr)
    optimizer.add_param_group({"params": weights(2), "lr": 0.5})
    rates = walk(optimizer, schedule, 5, lr)
    assert rates[-1] == pytest.approx([0.5, 0.25], rel=1e-4)
    again = sgd(lr=1.0)
    again.add_param_group({"params": weights(2), "lr": 0.5})
    resumed = schedules.flat_cosine(again, 8)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr() == [lr(group) for group in again.param_groups]


@pytest.mark.parametrize("outside", [True, False])
def test_a_wrapped_optimizer_is_scheduled_from_outside_and_from_inside(outside):
    inner = torch.optim.AdamW(weights(2), lr=1.0)
    wrapper = piste.Lookahead(inner)
    schedule = schedules.one_cycle(wrapper if outside else inner, 4)
    for optimizer in (wrapper, inner):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"]) == (1 / 25, (0.95, 0.999))
    wrapper.step()
    schedule.step()
    assert (inner.param_groups[0]["lr"], wrapper.param_groups[0]["betas"][0]) == pytest.approx((1.0, 0.85))


def test_pickle_and_deepcopy():
    optimizer = sgd(lr=1.0)
    schedule = schedules.one_cycle(optimizer, 8)
    walk(optimizer, schedule, 3, lr)
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin.state_dict() == schedule.state_dict()


def test_a_state_of_another_schedule_is_refused_and_nothing_changes():
    optimizer = sgd(lr=1.0)
    schedule = schedules.one_cycle(optimizer, 8)
    walk(optimizer, schedule, 3, lr)
    before = schedule.state_dict(), lr(optimizer.param_groups[0])
    for other in (
        schedules.one_cycle(sgd(), 9),
        schedules.flat_cosine(sgd(), 8),
        schedules.one_cycle(sgd(), 8, moms=None),
    ):
        with pytest.raises(ValueError, match="state_dict is of another schedule"):
            schedule.load_state_dict(other.state_dict())
    two = torch.optim.SGD([{"params": weights(1)}, {"params": weights(1)}], lr=1.0)
    with pytest.raises(ValueError, match="2 learning rates for the optimizer's 1 parameter groups"):
        schedule.load_state_dict(schedules.one_cycle(two, 8).state_dict())
    with pytest.raises(ValueError, match="state_dict is of another schedule"):
        schedule.load_state_dict({})
    assert (schedule.state_dict(), lr(optimizer.param_groups[0])) == before


BAD = [
    ("one_cycle", {"total_steps": 0}, "total_steps=0"),
    ("one_cycle", {"total_steps": -3}, "total_steps=-3"),
    ("one_cycle", {"total_steps": 2.5}, "total_steps=2.5"),
    ("one_cycle", {"total_steps": True}, "total_steps=True"),
    ("one_cycle", {"total_steps": None}, "total_steps=None"),
    ("one_cycle", {"pct_start": 1.0}, "pct_start=1.0"),
    ("one_cycle", {"pct_start": math.nan}, "pct_start=nan"),
    ("one_cycle", {"pct_start": "a"}, "pct_start='a'"),
    ("one_cycle", {"div": 0.5}, "div=0.5"),
    ("one_cycle", {"div_final": math.inf}, "div_final=inf"),
    ("one_cycle", {"moms": (0.9, 0.8)}, "moms="),
    ("one_cycle", {"moms": (0.9, 0.0, 0.9)}, "moms="),
    ("one_cycle", {"moms": 0.9}, "moms=0.9"),
    ("flat_cosine", {"total_steps": 0}, "total_steps=0"),
    ("flat_cosine", {"pct_start": -0.1}, "pct_start=-0.1"),
    ("flat_cosine", {"div_final": 0}, "div_final=0"),
    ("warmup_stable_decay", {"pct_warmup": 1.5}, "pct_warmup=1.5"),
    ("warmup_stable_decay", {"pct_warmup": 0.6, "pct_decay": 0.5}, "pct_decay=0.5"),
    ("warmup_stable_decay", {"shape": "exp"}, "shape='exp'"),
    ("warmup_stable_decay", {"shape": []}, "shape="),
    ("warmup_stable_decay", {"div": math.nan}, "div=nan"),
    ("untuned_warmup", {"total_steps": 0}, "total_steps=0"),
    ("untuned_warmup", {"beta2": 1.0}, "beta2=1.0"),
    ("constant", {"total_steps": "9"}, "total_steps='9'"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_is_refused_before_anything_changes(name, arguments, message):
    optimizer = sgd()
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="is not legal; legal: ") as caught:
        schedules.named(name)(optimizer, **{"total_steps": 8, **arguments})
    assert message in str(caught.value)
    assert optimizer.param_groups[0] == before


def test_the_first_argument_must_be_an_optimizer():
    with pytest.raises(TypeError, match="is not an Optimizer"):
        schedules.constant(weights(1))


def test_named():
    assert schedules.named("One-Cycle") is schedules.one_cycle
    with pytest.raises(ValueError, match="did you mean 'flat_cosine'"):
        schedules.named("flat_cos")
    with pytest.raises(ValueError, match="constant, flat_cosine, one_cycle"):
        schedules.named("zzz")
