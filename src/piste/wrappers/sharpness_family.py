"""Descendants of SAM: what two gradients make, a second pass now and then, or with some of the weights and samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from piste.checks import check_choice, check_hyperparameters
from piste.parts.sharpness import of_some, projection, surrogate_gap, surrogate_gap_of_clean
from piste.roster import real
from piste.sharding import local
from piste.slots import Part
from piste.storage import State, allocate
from piste.wrappers.climb import gradient_of
from piste.wrappers.sharpness import SAM

__all__ = ["ESAM", "GSAM", "LookSAM"]

_TOGETHER, _APART = projection(together=True), projection(together=False)


class GSAM(SAM):
    r"""SAM that also narrows the gap between the loss nearby and the loss here.

    .. math::
        \rho_t &= \rho_{\min} + (\rho_{\max} - \rho_{\min})
                  \frac{\eta_t - \eta_{\min}}{\eta_{\max} - \eta_{\min}} \\
        g_\perp &= g - \frac{\langle g, g_p \rangle}{\lVert g_p \rVert^2}\, g_p, \qquad
        \text{step with } g_p - \alpha\, g_\perp

    with the gradients :math:`g` here and :math:`g_p` at the perturbed weights; norms and products are over all weights
    together. :math:`\rho_t` follows the learning rate :math:`\eta_t` of the first group, as its schedule left it.

    **When to use**: where SAM helps and ``alpha`` can be searched (0.4 for vision transformers, 0.01 for ResNets).
    **When not**: as SAM.

    State: as SAM, and between the passes the first gradient.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        rho: :math:`\rho_{\max}`, above 0.
        rho_min: :math:`\rho_{\min}`; None for ``rho``, a constant radius.
        alpha: weight of the gap, in [0, 1].
        lr_max: the learning rate at which the radius is ``rho``; None for that of the first group when this is made
            (its ``"initial_lr"``, if a scheduler has been there).
        lr_min: the learning rate at which it is ``rho_min``.
        minimize_fp: False steps with :math:`g` and ``alpha`` times what :math:`g_p` has across it, the calmer form of
            the authors' JAX code.
        adaptive: as in :class:`SAM`.
        eta: as in :class:`SAM`.
        interval: as in :class:`SAM`.
        model: as in :class:`SAM`.

    Raises:
        TypeError, ValueError, RuntimeError: as SAM.

    Example:
        >>> import torch, piste
        >>> optimizer = piste.GSAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), rho=0.1, rho_min=0.01)
        >>> optimizer.param_groups[0]["lr"] = 0.05
        >>> round(optimizer.rho_now, 3)
        0.055

    Source: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, "Surrogate gap minimization improves
    sharpness-aware training" (ICLR 2022, arXiv 2203.08065).
    """

    combines = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        rho_min: float | None = None,
        alpha: float = 0.4,
        lr_max: float | None = None,
        lr_min: float = 0.0,
        minimize_fp: bool = True,
        adaptive: bool | str = False,
        eta: float = 0.01,
        interval: int = 1,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(optimizer, rho, adaptive, eta, interval, model)
        first = self.param_groups[0]
        self.rho_min = rho if rho_min is None else rho_min
        self.lr_max = float(first.get("initial_lr", first["lr"]) if lr_max is None else lr_max)
        self.alpha, self.lr_min, self.minimize_fp = alpha, lr_min, minimize_fp
        given = {"alpha": alpha, "rho_min": self.rho_min, "lr_min": lr_min, "lr_max": self.lr_max}
        check_hyperparameters("GSAM", given, given)

    @property
    def rho_now(self) -> float:
        span = self.lr_max - self.lr_min
        share = (float(self.param_groups[0]["lr"]) - self.lr_min) / span if span else 1.0
        return self.rho_min + (self.rho - self.rho_min) * min(1.0, max(0.0, share))

    def _combine(self, weights: list[Tensor], clean: list[Tensor]) -> None:
        part = surrogate_gap if self.minimize_fp else surrogate_gap_of_clean
        _on_gradients(self, part, weights, {"alpha": self.alpha}, clean)


class LookSAM(SAM):
    r"""SAM whose second pass is made in every k-th step only, and remembered in between.

    .. math::
        t \bmod k = 0:&\quad g_v = g_s - \frac{\langle g_s, g \rangle}{\lVert g \rVert^2}\, g,
            \quad \text{step with } g_s \\
        \text{else:}&\quad \text{step with } g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert}\, g_v

    with the gradients :math:`g` here and :math:`g_s` at the perturbed weights. This is the paper that some lists call
    "efficient SAM" (2203.02714); ESAM is another.

    **When to use**: where SAM helps and its second pass costs too much: a step costs :math:`1 + 1/k` passes.
    **When not**: with learning rates that change much within k steps.

    State: 4 bytes per parameter (:math:`g_v`), saved; and between two passes as SAM, and the first gradient.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        rho: radius, above 0.
        k: steps from one second pass to the next; 1 is SAM.
        alpha: how much of :math:`g_v` is added, in [0, 1].
        projection: ``"global"``, norms and products over all weights together, as in the paper; or ``"tensor"``, for
            each tensor by itself, as most ports have it.
        adaptive: as in :class:`SAM`.
        eta: as in :class:`SAM`.
        model: as in :class:`SAM`.
        layerwise: Look-LayerSAM, for batches of thousands: the same as ``adaptive="relative"``, so that ``rho`` is the
            share of its norm by which each tensor moves. Ports differ in a further factor, a power of the gradient's
            norm; here there is none, and the way up does not depend on the scale of the loss.

    Raises:
        TypeError, ValueError, RuntimeError: as SAM; ``layerwise`` beside another ``adaptive``.

    Example:
        >>> import torch, piste
        >>> optimizer = piste.LookSAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), k=5)
        >>> optimizer.needs_two_passes
        True

    Source: Liu, Mai, Chen, Hsieh, You, "Towards efficient and scalable sharpness-aware minimization" (CVPR 2022, arXiv
    2203.02714).
    """

    combines = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        projection: str = "global",
        adaptive: bool | str = False,
        eta: float = 0.01,
        model: nn.Module | None = None,
        layerwise: bool = False,
    ) -> None:
        if layerwise and adaptive not in (False, "relative"):
            raise ValueError(
                f"LookSAM got layerwise=True with adaptive={adaptive!r}; legal: one of them, as layerwise is 'relative'"
            )
        super().__init__(optimizer, rho, "relative" if layerwise else adaptive, eta, 1, model)
        check_hyperparameters("LookSAM", {"k": k, "alpha": alpha}, ("k", "alpha"))
        check_choice("projection", projection, ("global", "tensor"))
        self.k, self.alpha, self.projection = k, alpha, projection

    def states(self) -> Mapping[str, State]:
        return _TOGETHER.split.states

    @property
    def needs_two_passes(self) -> bool:
        return self.steps % self.k == 0 or not self.own

    @property
    def _parts(self) -> Any:
        return _TOGETHER if self.projection == "global" else _APART

    def _combine(self, weights: list[Tensor], clean: list[Tensor]) -> None:
        totals = _on_gradients(self, self._parts.split, weights, {}, clean, self._own(weights))
        if not torch.isfinite(totals["across"]).item():
            self.own.clear()  # nothing to go by: the next step climbs again

    def _plain(self, weights: list[Tensor]) -> None:
        _on_gradients(self, self._parts.reuse, weights, {"alpha": self.alpha}, None, self._own(weights))

    def _own(self, weights: list[Tensor]) -> list[dict[str, Any]]:
        return [self.own.setdefault(p, {"step": 0}) for p in weights]


class ESAM(SAM):
    r"""SAM that perturbs some of the weights and makes its second pass with some of the samples.

    .. math::
        \epsilon = \frac{\rho}{\beta}\, m \odot \frac{g}{\lVert g \rVert_2}, \quad m_i \sim \mathrm{Bernoulli}(\beta);
        \qquad \text{second pass with the } \gamma B \text{ samples of largest } \ell_j(p + \epsilon) - \ell_j(p)

    Which samples they are takes one more forward pass without gradients. So losses are needed sample by sample:
    :func:`piste.sharpness_step` with a ``loss_fn`` that returns a vector of them; or ``step(closure)`` with a closure
    that takes ``samples``, None for all of the batch or the indices of some, and returns their losses without calling
    ``backward()``. With ``gamma=1`` it is used like SAM.

    This is 2110.03141; the paper that some lists call ESAM (2205.14083) is SAF, and their "efficient SAM" (2203.02714)
    is :class:`LookSAM`.

    **When to use**: where SAM helps and forward passes are cheap beside backward passes. **When not**: with shapes that
    must not change (compiled graphs): the second pass has fewer samples.

    State: as SAM, and between the passes 4 bytes per parameter for the choice.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        rho: radius, above 0.
        beta: probability with which an element is perturbed, in (0, 1]; 1 perturbs all.
        gamma: fraction of the samples, in (0, 1]; 1 takes all, without the pass that ranks them.
        seed: of the choice of elements; the choice depends on it and the number of the step alone.
        faithful: as the released code does it: whole tensors are chosen, by not computing the first gradient of the
            others, which saves time; the norm is over those alone; and samples are those strictly above the last of
            the :math:`\gamma B`, so one less, but never none.
        model: as in :class:`SAM`.

    Raises:
        TypeError, ValueError, RuntimeError: as SAM.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.ESAM(torch.optim.SGD(model.parameters(), lr=0.1), beta=0.6, gamma=0.5)
        >>> loss_fn = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> loss = piste.sharpness_step(optimizer, model, loss_fn, (torch.randn(8, 3), torch.randn(8, 1)))

    Source: Du, Yan, Feng, Zhou, Zhen, Goh, Tan, "Efficient sharpness-aware minimization for improved training of neural
    networks" (ICLR 2022, arXiv 2110.03141); defaults are those of its ResNet-18 runs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        seed: int = 0,
        faithful: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(optimizer, rho, model=model)
        given = {"beta": beta, "gamma": gamma, "seed": seed, "faithful": faithful}
        check_hyperparameters("ESAM", given, given)
        self.beta, self.gamma, self.seed, self.faithful = beta, gamma, seed, faithful
        self._frozen: list[Tensor] = []

    @property
    def selects(self) -> bool:
        return self.gamma < 1

    def chosen(self, before: Tensor, after: Tensor) -> Tensor:
        """The indices of the samples for the second pass.

        Args:
            before: losses of the samples at the weights, a vector.
            after: losses of the same samples at the perturbed weights.
        """
        if before.ndim != 1 or before.shape != after.shape:
            raise ValueError(
                f"ESAM got losses of shapes {tuple(before.shape)} and {tuple(after.shape)}; legal: two vectors with a "
                "loss for each sample (reduction='none'), or gamma=1"
            )
        rise = after - before
        value, index = rise.topk(max(1, int(len(rise) * self.gamma)))
        above = (rise > value[-1]).nonzero().flatten()
        return above if self.faithful and len(above) else index

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        if closure is None or not self.selects:
            return super().step(closure)
        losses: list[Tensor] = []

        def both_passes() -> Tensor:
            chosen = None
            if losses:
                with torch.no_grad():
                    chosen = self.chosen(losses[0], closure(None))
            found = closure(chosen)
            losses.append(found.detach())
            found.mean().backward()
            return losses[-1].mean()

        return super().step(both_passes)

    def _ascend(self, weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
        self._thaw()
        states = [self._scratch.setdefault(p, {"step": 0}) for p in weights]
        generators: dict[torch.device, torch.Generator] = {}
        for p, state in zip(weights, states, strict=True):
            mask = state.setdefault("mask", allocate(of_some.states["mask"], real(p)))
            if self.faithful:
                mask.fill_(1)
            else:
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(self._drawn_from)
                local(mask).bernoulli_(self.beta, generator=generators[p.device])
        numbers = [{"rho": self.rho_now, "beta": self.beta, "eps": 1e-7 if self.faithful else 1e-12}]
        return self.compute(of_some, weights, states, [0] * len(weights), numbers, gradients)["ascent"]

    def finish(self) -> None:
        counted = not self._finished
        super().finish()
        if counted:
            self._freeze()

    @property
    def _drawn_from(self) -> int:
        """A seed for this step. torch's generators look at 32 bits, over which golden steps are spread evenly."""
        return (self.seed + self.steps * 0x9E3779B1) & 0xFFFFFFFF

    def _freeze(self) -> None:
        """Leave out some tensors of the next first pass, as the released code does."""
        if self.faithful:
            draw = random.Random(self._drawn_from)
            self._frozen = [p for p in self._weights() if p.requires_grad and draw.random() > self.beta]
            for p in self._frozen:
                p.requires_grad_(False)

    def _thaw(self) -> None:
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []

    def restore(self) -> None:
        self._thaw()
        super().restore()

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        self._thaw()
        super()._unpack(state_dict)
        if self._climb is None and self.steps:
            self._freeze()


def _on_gradients(
    wrapper: SAM,
    part: Part,
    weights: Sequence[Tensor],
    numbers: dict[str, float],
    clean: Sequence[Tensor] | None,
    states: Iterable[dict[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """Run a part on the gradients of weights, as if these were weights; its totals."""
    gradients = [gradient_of(p) for p in weights]
    own = [{"step": 0} for _ in weights] if states is None else list(states)
    return wrapper.compute(part, gradients, own, [0] * len(weights), [numbers], clean)
