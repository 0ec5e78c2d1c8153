"""ScheduleFreeSGD, ScheduleFreeAdamW, ScheduleFreeRAdam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import check_update, standard
from piste.rules import schedule_free
from piste.slots import Pipeline
from piste.storage import full_precision, put_full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ScheduleFree", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"]

#: before the first step; the position and the sums are the group's, as all its weights are averaged over the same steps
_START = {"schedule_step": 0, "weight_sum": 0.0, "lr_max": 0.0, "current_lr": 0.0, "averaging": 0.0, "train_mode": True}


class ScheduleFree(Optimizer):
    """What schedule-free optimizers share: the average, and the switch between training and evaluation."""

    cycles_momentum = False  # the average is found by it, so it has to stay

    @classmethod
    def between(cls, group: Mapping[str, Any]) -> float:
        """Where gradients are taken: 0 at the last step, 1 at the average."""
        return float(group["momentum"] if "momentum" in group else group["betas"][0])

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        check_update(cls.__name__, group)
        _check_between(cls.__name__, group, cls.between(group))

    def pace(self, group: Mapping[str, Any], step: int) -> float:
        """The learning rate of this step of the group: a straight line up to ``lr``."""
        warmup = group["warmup_steps"]
        return float(group["lr"]) * (min(1.0, step / warmup) if warmup else 1.0)

    def advance(self, group: Mapping[str, Any]) -> dict[str, Any]:
        step = group["schedule_step"] + 1
        return _averaging(group, step, self.pace(group, step))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; see :meth:`piste.Optimizer.step`.

        Raises:
            RuntimeError: the weights are the average, after :meth:`eval`. Nothing has been changed then.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(f"{type(self).__name__} is in evaluation mode; call optimizer.train() before training")
        return super().step(closure)

    def eval(self) -> None:
        """Put the average into the weights: before evaluating, exporting, or saving the model alone.

        Called twice it does nothing the second time.
        """
        self._move(training=False)

    def train(self) -> None:
        """Put back the weights at which gradients are taken: before training goes on. They come back to rounding."""
        self._move(training=True)

    def _move(self, *, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not training:
                way = self.between(group)
                _mix(group["params"], self.state, 1 - way if training else 1 - 1 / way, group["weights"])
                group["train_mode"] = training


def _check_between(name: str, group: Mapping[str, Any], between: float) -> None:
    if not between > 0:
        hyper = "momentum" if "momentum" in group else "betas"
        raise ValueError(f"{name} got {hyper}={group[hyper]!r}; legal: above 0, for the average is found by it")


def _averaging(group: Mapping[str, Any], step: int, lr: float) -> dict[str, Any]:
    """The numbers of a step at this learning rate: above all its share in the average."""
    lr_max = max(lr, group["lr_max"])
    weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
    weight_sum = group["weight_sum"] + weight
    share = weight / weight_sum if weight_sum else 0.0
    numbers = {"schedule_step": step, "weight_sum": weight_sum, "lr_max": lr_max}
    return numbers | {"current_lr": lr, "averaging": share}


@torch.no_grad()
def _mix(weights: Iterable[Tensor], states: Mapping[Tensor, Mapping[str, Any]], share: float, form: str) -> None:
    """Move weights by this share of the way to their z; those without a step so far have none, and stay."""
    for p in weights:
        state = states.get(p, {})
        z = state.get("z")
        if z is not None:
            put_full_precision(p, torch.lerp(full_precision(p, state, form).to(z.dtype), z, share), state, form)


class ScheduleFreeSGD(ScheduleFree):
    r"""SGD that needs no schedule: it averages its steps, and takes gradients near the average.

    .. math::
        y_t &= (1 - \mu)\, z_t + \mu\, x_t, \qquad z_{t+1} = z_t - \eta_t\, (g(y_t) + \lambda y_t) \\
        x_{t+1} &= (1 - c_t)\, x_t + c_t\, z_{t+1}, \qquad
        c_t = \frac{t^r\, \eta_{\max,t}^{\,q}}{\sum_{i \le t} i^r\, \eta_{\max,i}^{\,q}}

    Weights are :math:`y` while training. Call ``optimizer.eval()`` before evaluating, which turns them into the average
    :math:`x`, and ``optimizer.train()`` before training goes on; a step in evaluation mode is refused.

    **When to use**: when it is not known how long training will go on, or it has to be good at every moment. **When
    not**: under a decaying schedule, which would average twice. Models with BatchNorm need its running statistics made
    anew after ``eval()``: run some batches through the model in training mode, or see ``piste.recalibrate``.

    State: 4 bytes per parameter. It has no moments that could be stored in fewer bits.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; 10 to 50 times that of SGD with momentum under a schedule (authors' advice).
        momentum: how near to the average gradients are taken, in (0, 1).
        weight_decay: added to the gradient, times y.
        warmup_steps: steps in which lr climbs from 0; None for none.
        r: power of the step number in the weights of the average.
        weight_lr_power: power of the largest lr so far in the weights of the average.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.
        RuntimeError: in ``step``, after ``eval()`` without ``train()``.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.ScheduleFreeSGD(model.parameters(), lr=1.0)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # evaluate here
        >>> optimizer.train()

    Source: Defazio et al. 2024, arXiv 2405.15682, algorithm 1; parity with ``schedulefree`` 1.4.1, except that it
    starts in training mode.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int | None = None,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        super().__init__(params, hyper | {"r": r, "weight_lr_power": weight_lr_power} | _START, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, schedule_free.sgd, decoupled=None)


class ScheduleFreeAdamW(ScheduleFree):
    r"""AdamW that needs no schedule: it averages its steps, and takes gradients near the average.

    .. math::
        y_t = (1 - \beta_1)\, z_t + \beta_1\, x_t, \qquad
        z_{t+1} = z_t - \eta_t \Big(\frac{g(y_t)}{\sqrt{\hat v_t} + \epsilon} + \lambda y_t\Big), \qquad
        x_{t+1} = (1 - c_t)\, x_t + c_t\, z_{t+1}

    with :math:`c_t` as in :class:`ScheduleFreeSGD`. Weights are :math:`y` while training: call ``optimizer.eval()``
    before evaluating and ``optimizer.train()`` before training goes on.

    **When to use**: when it is not known how long training will go on; it won the self-tuning track of the AlgoPerf
    competition of 2024. **When not**: under a decaying schedule. Models with BatchNorm: see :class:`ScheduleFreeSGD`.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 6, 5.03, 4.55.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; one to ten times AdamW's.
        betas: how near to the average gradients are taken, in (0, 1); fraction of the mean square that is kept.
        eps: added to the root of the mean square.
        weight_decay: strength of decoupled decay, at y; L2 with ``decoupled_weight_decay=False``.
        warmup_steps: steps in which lr climbs from 0; None for none.
        r: power of the step number in the weights of the average.
        weight_lr_power: power of the largest lr so far in the weights of the average.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.
        RuntimeError: in ``step``, after ``eval()`` without ``train()``.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.ScheduleFreeAdamW(model.parameters(), lr=2.5e-3, warmup_steps=100)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Defazio et al. 2024, arXiv 2405.15682; parity with ``schedulefree`` 1.4.1, whose bias correction counts the
    steps of the group: here those of the weight.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int | None = None,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        hyper |= {"r": r, "weight_lr_power": weight_lr_power, "decoupled_weight_decay": True}
        super().__init__(params, hyper | _START, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, schedule_free.adam, decoupled=None)


class ScheduleFreeRAdam(ScheduleFree):
    r"""RAdam that needs no schedule and no warm-up, which its rectifier is.

    :class:`ScheduleFreeAdamW` with the learning rate :math:`\eta r_t`, where :math:`r_t` is RAdam's rectifier once
    :math:`\rho_t > 4`. Before that weights rest (``silent_sgd_phase``), or take steps along the plain gradient.

    Weights are those between step and average while training: call ``optimizer.eval()`` before evaluating and
    ``optimizer.train()`` before training goes on.

    **When to use**: ScheduleFreeAdamW without a warm-up to choose. **When not**: under a decaying schedule.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 6, 5.03, 4.55.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; one to ten times AdamW's.
        betas: how near to the average gradients are taken, in (0, 1); fraction of the mean square that is kept.
        eps: added to the root of the mean square.
        weight_decay: strength of decoupled decay, at y; L2 with ``decoupled_weight_decay=False``.
        silent_sgd_phase: rest until the step is rectified.
        r: power of the step number in the weights of the average.
        weight_lr_power: power of the largest lr so far in the weights of the average.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.
        RuntimeError: in ``step``, after ``eval()`` without ``train()``.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.ScheduleFreeRAdam(model.parameters(), lr=2.5e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Defazio et al. 2024, arXiv 2405.15682, in the form of the authors' package; parity with ``schedulefree``
    1.4.1.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        silent_sgd_phase: bool = True,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        hyper |= {"silent_sgd_phase": silent_sgd_phase, "r": r, "weight_lr_power": weight_lr_power}
        super().__init__(params, hyper | {"decoupled_weight_decay": True} | _START, options)

    def pace(self, group: Mapping[str, Any], step: int) -> float:
        early = 0.0 if group["silent_sgd_phase"] else 1.0
        return float(group["lr"]) * schedule_free.rectified(group["betas"][1], step, early)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, schedule_free.radam, decoupled=None)
