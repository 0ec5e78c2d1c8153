"""Lookahead around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from piste.checks import check_hyperparameters
from piste.parts.after import lookahead
from piste.roster import real
from piste.storage import State, allocate
from piste.wrappers.base import Wrapper

__all__ = ["Lookahead"]


class Lookahead(Wrapper):
    r"""Every k steps of any optimizer, keep only a fraction of the way gone and start again from there.

    .. math::
        t \bmod k = 0:\quad s \leftarrow s + \alpha (p - s), \quad p \leftarrow s

    The slow weights :math:`s` begin as the weights before the first step (as in the authors' code; some ports start
    them at the first synchronisation, which makes that one do nothing). All weights synchronise, also those without a
    gradient in that step.

    **When to use**: to steady an optimizer that is run at a high learning rate. **When not**: around Ranger, which has
    it already; when a copy of all weights does not fit. Evaluate after a multiple of k steps.

    State: 4 bytes per parameter on top of the inner optimizer's. Round an optimizer with ``capturable=True``, a CUDA
    graph can record its steps; every step reads the slow weights then.

    Args:
        optimizer: any ``torch.optim.Optimizer``. Its groups are shared, so schedulers may be given either.
        k: steps between synchronisations.
        alpha: fraction of the way that is kept.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Lookahead(torch.optim.AdamW(model.parameters()), k=5, alpha=0.8)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Zhang, Lucas, Hinton, Ba, "Lookahead optimizer: k steps forward, 1 step back" (NeurIPS 2019, arXiv
    1907.08610); defaults are Ranger's.
    """

    name = "lookahead"
    recordable = True

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 6, alpha: float = 0.5) -> None:
        check_hyperparameters("Lookahead", {"k": k, "alpha": alpha}, ("k", "alpha"))
        super().__init__(optimizer)
        self.k, self.alpha = k, alpha

    def states(self) -> Mapping[str, State]:
        return lookahead.states

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step the inner optimizer, and synchronise if it is time; a skipped step does not count."""
        weights = [p for group in self.param_groups for p in group["params"] if p.requires_grad and p.numel()]
        for p in weights:
            if p not in self.own:
                kept = getattr(self.optimizer, "full_precision", torch.Tensor.detach)
                self.own[p] = {"step": 0, "slow": allocate(lookahead.states["slow"], real(kept(p)))}
        loss, taken = self.inner_step(closure)
        if taken and weights:
            self._synchronise([p for p in weights if p in self.own])
        return loss

    def _synchronise(self, weights: list[torch.Tensor]) -> None:
        states = [self.own[p] for p in weights]
        self.compute(lookahead, weights, states, [0] * len(weights), [{"k": self.k, "alpha": self.alpha}])
