"""Ranger21."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.optimizers.ranger21_released import as_released, check_faithful, released, released_start, struck_flag
from piste.optimizers.ranger21_schedule import START, check_schedule, length, scheduled
from piste.options import EngineOptions, Params, hyperparameters
from piste.parts import decay
from piste.parts.after import lookahead
from piste.parts.prepare import adaptive_clip, keep_second_moment, normalize
from piste.parts.standard import check_update, standard
from piste.rules.dual import ranger21_dual
from piste.rules.positive_negative import ranger21
from piste.slots import Part, Pipeline, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Ranger21"]


class Ranger21(Optimizer):
    r"""AdamW (or MADGRAD) with eight more ideas of 2019 to 2021 and a schedule of its own; each can be switched off.

    .. math::
        g_t &\leftarrow \operatorname{clip}(g_t, \text{agc\_clip} \cdot \lVert p \rVert_{\text{unit}}), \quad
        g_t \leftarrow g_t - \operatorname{mean}_{\text{all but output axis}}(g_t), \quad
        g_t \leftarrow g_t / \operatorname{std}(g_t) \\
        m_t &= \beta_1^2 m_{t-2} + (1 - \beta_1^2) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \hat v_t = \max_{i \le t} v_i / (1 - \beta_2^t) \\
        \sigma_t &= \sqrt{\operatorname{mean}_{\text{all weights}}(v_t / (1 - \beta_2^t))}, \qquad
        p \leftarrow (1 - \eta_t \lambda / \sigma_t)\, p, \quad
        p \leftarrow \big(1 - 2 \eta_t \nu (1 - 1 / \lVert p \rVert_{\text{unit}})\big)\, p \\
        p_t &= p - \frac{\eta_t}{1 - \beta_1^t} \cdot
        \frac{(1 + \beta_0) m_t - \beta_0 m_{t-1}}{\sqrt{(1 + \beta_0)^2 + \beta_0^2}} \Big/
        \operatorname{softplus}_{50}(\sqrt{\hat v_t} + \epsilon)

    and Lookahead every k steps. :math:`\eta_t` climbs to ``lr`` on a straight line, stays, and falls on another one.

    **When to use**: runs of a known length, with no schedule to choose: say ``total_steps``. **When not**: where 20
    bytes of state per parameter do not fit, where a gradient's size means something (it is normalised away), or for
    fine-tuning (norm loss pulls every unit to norm 1).

    State: 20 bytes per parameter; 4 less without each of ``pnm``, ``amsgrad`` and ``lookahead``; 20 with
    ``use_madgrad``. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 14, 11.1, 9.58.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate between warm-up and warm-down; of the size that suits AdamW. (Released code: no default.)
        betas: fractions that are kept: the first (squared, with ``pnm``) of momentum, the second of mean squares.
        eps: added to the root of the mean squares, and to norms in the norm loss.
        weight_decay: relative to sigma with ``stable_decay``; L2 with ``decoupled_weight_decay=False``.
        total_steps: length of the run. Without it, and without ``epochs``, there is no inner schedule, and any
            scheduler may stand around; with it, one that changes ``lr`` is refused. ``param_groups`` keep ``lr`` as
            it is and show what it is now as ``current_lr``; the position is saved.
        epochs: the same length, with ``batches_per_epoch``.
        batches_per_epoch: see ``epochs``.
        use_warmup: climb for ``warmup_steps``; if None, for ``2 / (1 - beta2)`` steps (Ma & Yarats 2019), or
            ``warmup_fraction`` of the run if that would be more than 45 % of it.
        warmup_steps: see ``use_warmup``.
        warmup_fraction: see ``use_warmup``.
        use_warmdown: fall to ``warmdown_min_lr`` from the fraction ``warmdown_start`` of the run on.
        warmdown_start: see ``use_warmdown``.
        warmdown_min_lr: see ``use_warmdown``; a lower ``lr`` stays as it is.
        use_cheb: between the two, multiply by Chebyshev's fractal steps (1 to 10), one an epoch; needs ``epochs``.
        use_agc: clip each unit's gradient to ``agc_clip`` times its norm, at least ``agc_clip * agc_eps``.
        agc_clip: see ``use_agc``.
        agc_eps: see ``use_agc``.
        use_gc: centralize gradients.
        gc_conv_only: of 2-D and 3-D convolutions alone.
        normalize: divide each gradient by its standard deviation (tensors of more than two elements).
        pnm: positive-negative momentum; else an average.
        beta0: how much of the older average is taken off.
        amsgrad: divide by the largest mean square so far.
        softplus: soften small denominators.
        beta_softplus: how sharply: they are at least ``log(2) / beta_softplus``.
        stable_decay: divide the decay by sigma; else ``lr * weight_decay``.
        norm_loss: strength of the pull of units' norms to 1; 0 for none.
        lookahead: every ``k`` steps go back ``1 - alpha`` of the way.
        k: see ``lookahead``.
        alpha: see ``lookahead``.
        use_madgrad: dual averaging in the place of Adam; momentum is ``momentum``, and ``pnm``, ``amsgrad``, ``eps``
            have no effect on the step. Sigma is a cube root then, and the decay's rate grows with the step.
        momentum: see ``use_madgrad``.
        faithful: do what the released code does, bugs included; see below.
        **options: see :class:`piste.options.EngineOptions`.

    Raises:
        ValueError: a value is out of range, ``faithful`` with what crashes in the released code; in ``step``, another
            learning-rate schedule beside the inner one.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Ranger21(model.parameters(), lr=1e-3, total_steps=100)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> round(optimizer.param_groups[0]["current_lr"], 6)  # the first of 22 steps up
        4.5e-05

    Source: Wright & Demeure 2021, arXiv 2106.13731, in the form of the released code (``ranger21`` 0.1.0), from which
    the paper differs: its warm-down ends at 0, norm loss and decay are one, beta0 is 0.9. ``faithful=True`` is in
    parity with ``ranger21`` 0.1.0. These are its bugs, mended without ``faithful``:

    * decay and norm loss reach one tensor only: the last one of each group, at the rates of the next group;
    * positive-negative momentum is divided by the noise of ``beta2`` in the place of ``beta0``, which is always 1;
    * amsgrad's maximum is written to the wrong tensor and so never kept;
    * a group's biases and schedule follow the step of some other group's last weight, and Lookahead has one count;
    * warm-down takes the constructor's ``lr`` for all groups, raises one below ``warmdown_min_lr``, and overrides a
      warm-up that is still on its way;
    * gradients of zeros divide by a sigma of 0;
    * positions of schedule and Lookahead are not saved, and gradients are changed in place: never reproduced;
    * gradients are normalised twice, which is once but for 1e-8.

    Not reproduced either: that a last tensor *without* a gradient is decayed all the same. Refused, because it crashes
    there: ``pnm=False`` and ``use_cheb``. AdaBelief's variance is left out: it is computed there and thrown away.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        *,
        total_steps: int | None = None,
        epochs: int | None = None,
        batches_per_epoch: int | None = None,
        use_warmup: bool = True,
        warmup_steps: int | None = None,
        warmup_fraction: float = 0.22,
        use_warmdown: bool = True,
        warmdown_start: float = 0.72,
        warmdown_min_lr: float = 3e-5,
        use_cheb: bool = False,
        use_agc: bool = True,
        agc_clip: float = 1e-2,
        agc_eps: float = 1e-3,
        use_gc: bool = True,
        gc_conv_only: bool = False,
        normalize: bool = True,
        pnm: bool = True,
        beta0: float = 1.0,
        amsgrad: bool = True,
        softplus: bool = True,
        beta_softplus: float = 50.0,
        stable_decay: bool = True,
        norm_loss: float = 1e-4,
        lookahead: bool = True,
        k: int = 5,
        alpha: float = 0.5,
        use_madgrad: bool = False,
        momentum: float = 0.9,
        faithful: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        hyper = hyperparameters(locals()) | length(total_steps, epochs, batches_per_epoch) | START
        hyper |= released_start(faithful=faithful) | {"decoupled_weight_decay": True}
        super().__init__(params, hyper, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        check_schedule(group)
        if group["use_madgrad"]:
            check_update("Ranger21 with use_madgrad=True", group)
        check_faithful(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; a group that joins late finds the schedule where the others are."""
        here = {"schedule_step": self.param_groups[0]["schedule_step"]} if self.param_groups else {}
        super().add_param_group({**here, **param_group})

    def begin(
        self, total_steps: int | None = None, *, epochs: int | None = None, batches_per_epoch: int | None = None
    ) -> None:
        """Begin the schedule anew, for a run whose length is known now; what has been learnt stays.

        Args:
            total_steps: as for the class; without any length there is no inner schedule.
            epochs: as for the class.
            batches_per_epoch: as for the class.

        Raises:
            ValueError: as the class; or steps have been taken with ``faithful``, where weights count for the schedule.
                Nothing has been changed then.

        Not in the middle of a run: a checkpoint knows where in it the schedule is.

        >>> import torch, piste
        >>> optimizer = piste.Ranger21([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
        >>> optimizer.begin(total_steps=100)
        >>> optimizer.param_groups[0]["total_steps"]
        100
        """
        new = length(total_steps, epochs, batches_per_epoch)
        if self.state and any(group["faithful"] for group in self.param_groups):
            raise ValueError("Ranger21.begin() with faithful=True after the first step; legal: a new optimizer")
        for group in self.param_groups:
            self._check(new, self._hyper_defaults | {k: v for k, v in group.items() if k in self._hyper_defaults})
        for group in self.param_groups:
            group.update({**START, **new})

    def advance(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return released(self, group) if group["faithful"] else scheduled(group)

    def flags_of(self, group: int, position: int) -> tuple[tuple[str, Any], ...]:
        return struck_flag(self.param_groups, group, position)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        whole = standard(
            group,
            ranger21_dual if group["use_madgrad"] else ranger21,
            clip=(adaptive_clip,) if group["use_agc"] else (),
            finish=((normalize,) if group["normalize"] else ()) + (keep_second_moment,),
            decoupled=_decay(group),
            after=(lookahead,) if group["lookahead"] else (),
        )
        return _scheduled(as_released(whole, group) if group["faithful"] else _pulled(whole))


def _decay(group: Mapping[str, Any]) -> Part:
    if not group["stable_decay"]:
        return decay.decoupled
    return decay.stable_dual if group["use_madgrad"] else decay.stable


def _pulled(whole: Pipeline) -> Pipeline:
    """The same, with norm loss behind the decay."""
    return replace(whole, decay=(*whole.decay, decay.norm_loss))


def _scheduled(whole: Pipeline) -> Pipeline:
    """The same, with ``current_lr`` for ``lr``."""

    def at(part: Part) -> Part:
        return replace(part, renamed={"lr": "current_lr", **part.renamed})

    step = whole.apply if whole.direction.slot == "update" else at(plain)
    return replace(whole, direction=at(whole.direction), decay=tuple(map(at, whole.decay)), apply=step)
