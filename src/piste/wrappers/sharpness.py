"""Sharpness-aware minimisation around any optimizer: the gradient is taken where the loss is higher nearby.

A step has two passes. After the first backward pass the weights climb to the edge of a small ball (*ascent*); there the
second one finds the gradient that the optimizer inside steps with, from the weights where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from piste.batchnorm import put_back, statistics_of
from piste.checkpoint import check_tensor
from piste.checks import check_choice, check_hyperparameters
from piste.parts.sharpness import ASCENTS
from piste.roster import real
from piste.storage import State, companion
from piste.wrappers.arithmetic import formats_of
from piste.wrappers.base import Wrapper, layers
from piste.wrappers.climb import Climb, aligned, gradient_of, guard, is_new, refuse_lightning

__all__ = ["SAM"]

_GRADIENT = State("gradient")
_STEPS, _PERTURBED = "sharpness.steps", "sharpness.perturbed"


class SAM(Wrapper):
    r"""Step with the gradient at the point nearby where the loss is about highest.

    .. math::
        \epsilon = \rho\,\frac{T^2 g}{\lVert T g \rVert_2}, \qquad g_s = \nabla L(p + \epsilon), \qquad
        \text{and the optimizer inside steps from } p \text{ with } g_s

    with :math:`T = 1` (SAM), or ``adaptive=``:

    * ``"asam"``, the same as True: :math:`T = |p| + \eta` where a name contains "weight" (without names: where a tensor
      has two axes or more), else 1, as the authors of ASAM do it; with a ten times larger ``rho``, 0.5 or 1;
    * ``"elementwise"``: :math:`T = |p|` for all, as ``davda54/sam`` does it; its author takes a ``rho`` of 2. Weights
      that are zero, biases as a rule, are never moved;
    * ``"layerwise"``: :math:`T = \lVert p \rVert_2` of each tensor;
    * ``"gsam"``: :math:`\epsilon = \rho\,|p|\,g / \lVert g \rVert_2`, what GSAM's JAX code calls adaptive;
    * ``"relative"``: :math:`\epsilon = \rho\,\lVert p \rVert_2\,g / \lVert g \rVert_2` of each tensor by itself, the
      layer-wise SAM of :class:`LookSAM`'s paper: every tensor moves by the same share of its own norm.

    Otherwise the norm is one over all weights of all groups, and under FSDP2 over all shards. :math:`T` is no part of
    the gradient that the optimizer sees; neither is weight decay part of the ascent.

    Three ways to use it, with the same numbers. ``step(closure)`` calls the closure twice: it clears nothing, computes
    the loss, calls ``backward()`` and returns the loss; ``step`` returns the first. Or ``backward()``,
    ``first_step()``, ``backward()`` again on the same batch, ``second_step()``. Or :func:`piste.sharpness_step`, which
    knows about scalers, accumulation, clipping and processes.

    **When to use**: small and noisy data sets, vision transformers without much augmentation, when twice the time of a
    step is worth better generalisation. **When not**: a language model's single epoch; where the time goes further with
    a longer run, which the race tells: it charges two gradient evaluations a step. Plain bfloat16 weights are too
    coarse for a small ``rho``; with ``weights="remainder"`` inside they are not.

    State: none that is saved. Between the passes one copy of the weights in their own precision (the buffers stay),
    from which they come back bit by bit.

    Args:
        optimizer: any ``torch.optim.Optimizer``. Its groups are shared, so schedulers may be given either.
        rho: radius, above 0.
        adaptive: see above.
        eta: of ``"asam"``.
        interval: climb in every n-th step only, the first being the n-th; other steps are plain ones of the optimizer,
            with one pass.
        model: if given, running statistics of its BatchNorm layers move in the first pass only.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: a value is out of range, or ``optimizer`` makes two passes already.
        RuntimeError: by steps whose gradients are missing or were used before; weights are where they were then.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.SAM(piste.AdamW(model.parameters(), lr=1e-3), rho=0.05)
        >>> x = torch.ones(2, 3)
        >>> def closure():
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> model(x).square().mean().backward()   # the same in two parts
        >>> optimizer.first_step()
        True
        >>> model(x).square().mean().backward()
        >>> optimizer.second_step()

    Sources: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-aware minimization for efficiently improving generalization"
    (ICLR 2021, arXiv 2010.01412); Kwon, Kim, Park, Choi, "ASAM" (ICML 2021, arXiv 2102.11600). ``interval`` is that of
    MosaicML's Composer.
    """

    name = "sharpness"
    #: does a step combine the gradients of both passes?
    combines: ClassVar[bool] = False
    _guard: RemovableHandle | None = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        interval: int = 1,
        model: nn.Module | None = None,
    ) -> None:
        owner = type(self).__name__
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{owner} got optimizer={type(optimizer).__name__}; legal: an instance of torch.optim.Optimizer, as in "
                f"piste.{owner}(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)"
            )
        for each in layers(optimizer):
            if isinstance(each, SAM):
                raise ValueError(
                    f"{owner} got an optimizer that is in {type(each).__name__} already and makes two passes; legal: "
                    "one that makes one"
                )
        kind = {False: "sam", True: "asam"}.get(adaptive, adaptive) if isinstance(adaptive, bool) else adaptive
        check_choice("adaptive", kind, ASCENTS)
        check_hyperparameters("SAM", {"rho": rho, "eta": eta, "interval": interval}, ("rho", "eta", "interval"))
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"{owner} got model={type(model).__name__}; legal: None or an nn.Module")
        super().__init__(optimizer)
        self.rho, self.adaptive, self.eta, self.interval, self.model = rho, str(kind), eta, interval, model
        #: steps begun so far, those that were skipped included
        self.steps = 0
        self._start()

    def _start(self) -> None:
        if self._guard is not None:
            self._guard.remove()
        self._guard, self._stepping = guard(self), False
        self._climb: Climb | None = None
        self._skip = self._returned = False
        self._finished = True
        self._clip_norm: float | None = None
        self._used: dict[Tensor, tuple[Tensor, int]] = {}  # gradients that a step has had, and their versions
        self._buffers: dict[Tensor, list[Tensor]] = {}
        self._scratch: dict[Tensor, dict[str, Any]] = {}
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def states(self) -> Mapping[str, State]:
        return {}

    def buffers(self) -> Iterator[Tensor]:
        yield from super().buffers()
        yield from (x for copies in self._buffers.values() for x in copies)
        yield from (x for entries in self._scratch.values() for x in entries.values() if isinstance(x, Tensor))

    @property
    def copies(self) -> list[Tensor]:
        """What the weights come back from; none but between the passes."""
        return [] if self._climb is None else [x for kept in self._climb.kept for x in kept]

    # what members of the family do otherwise -------------------------------------------------------------------------

    @property
    def rho_now(self) -> float:
        """The radius of the next ascent."""
        return self.rho

    @property
    def selects(self) -> bool:
        """Is the second pass made with some samples only? Losses are needed sample by sample then."""
        return False

    @property
    def needs_two_passes(self) -> bool:
        """Does the next step climb? If not, it is one pass and ``step()``."""
        return (self.steps + 1) % self.interval == 0

    def _combine(self, weights: list[Tensor], clean: list[Tensor]) -> None:
        """Put into ``p.grad``, the gradient at the perturbed weights, what the optimizer is to step with."""

    def _plain(self, weights: list[Tensor]) -> None:
        """Change the gradients of a step with one pass."""

    # the two halves --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self) -> bool:
        """Climb, with the gradients of the first pass. Gradients are cleared: the second pass makes its own.

        Returns:
            False if the gradients were not finite: then weights and gradients stay, and the step will be skipped.

        Raises:
            RuntimeError: there are no gradients, or only such as a step has had; or the weights have climbed already.
        """
        if self._climb is not None:
            raise RuntimeError(
                f"{type(self).__name__}.first_step() was called twice; call backward() at the perturbed weights, then "
                "second_step(), or restore() to give up"
            )
        weights = self._with_new_gradients("first_step")
        gradients = [gradient_of(p) for p in weights]
        climb = Climb(weights, self._copies(weights), gradients if self.combines else None)
        if self.needs_two_passes:
            total = self._ascend(weights, gradients)
            if not torch.isfinite(total).item():
                self._put_back(climb)
                self._climb, self._skip = Climb([], [], None), True
                return False
            torch.clear_autocast_cache()  # casts of the weights that autocast keeps for a loop inside of it
        self._climb, self._returned = climb, False
        self._statistics = [] if self.model is None else statistics_of(self.model)
        for p in weights:
            p.grad = None
        return True

    def second_step(self, clip_norm: float | None = None) -> None:
        """Bring the weights back and let the optimizer inside step with the gradients of the second pass.

        Args:
            clip_norm: clip the gradient that the optimizer steps with to this global norm.

        Raises:
            RuntimeError: the weights have not climbed, or nothing called ``backward()`` since. They are where they were
                then.
        """
        if self._climb is None:
            raise RuntimeError(
                f"{type(self).__name__}.second_step() without first_step(): call backward() and first_step() before it"
            )
        self._clip_norm = clip_norm
        self.step()  # by this name, which schedulers watch

    @torch.no_grad()
    def descend(self) -> bool:
        """All of a step but the step: weights go back, and ``p.grad`` becomes what the optimizer inside steps with.

        For loops that do something about that gradient, such as average or unscale it; ``step()`` then takes the step.

        Returns:
            False if the step is to be skipped.
        """
        climb, skip = self._climb, self._skip
        self.restore()
        if skip:
            return False
        weights = self._with_new_gradients("step", "the weights are where they were")
        if climb is None:
            self._plain(weights)
        elif climb.clean is not None and self.needs_two_passes:
            self._combine(*aligned(weights, climb))
        self._returned = True
        return True

    def give_up(self) -> None:
        """Skip the step that has begun, for a reason of the loop's: a scaler's, or that another process cannot take it.

        A closure may call it, in either pass.
        """
        self.restore()
        self._climb, self._skip, self._finished = Climb([], [], None), True, False

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back to where they were before :meth:`first_step`, bit by bit, and give up the step.

        To be called when the second pass failed; nothing happens if they have not climbed.
        """
        if self._climb is not None:
            self._put_back(self._climb)
            put_back(self._statistics)
            self._climb, self._statistics, self._skip = None, [], False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a whole step with a closure; without one, the second half of a step, or a plain one.

        Args:
            closure: computes the loss of a batch, calls ``backward()`` and returns the loss. It is called twice (once
                in steps that do not climb), on cleared gradients and with gradients on.

        After :meth:`descend` both gradients have been made: a closure is called once, for what it returns.

        Returns:
            What the closure returned the first time.
        """
        if closure is None:
            return self._step_without_closure()
        if self._returned:
            loss = closure()
            self._step_without_closure()
            return loss
        refuse_lightning(type(self).__name__, closure)
        if any(is_new(p, self._used) for p in self._weights()) and self._climb is None:
            raise RuntimeError(
                f"{type(self).__name__}.step(closure) makes both gradients itself, and there are some that no step has "
                "had: call zero_grad() before, or first_step() and second_step() for gradients that you made"
            )
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale  # after an error nobody else does
            raise RuntimeError(
                f"{type(self).__name__}.step(closure) cannot be given to GradScaler.step(), which unscales no "
                "gradient that a closure is yet to make: use piste.sharpness_step(..., scaler=scaler)"
            )
        for p in self._weights():
            p.grad = None
        climbs = self.needs_two_passes
        with torch.enable_grad():
            loss = closure()
        if climbs and not self._skip and self.first_step():
            with self._given_up_on_error(), torch.enable_grad():
                closure()
        self._step_without_closure()
        return loss

    def _step_without_closure(self) -> None:
        clip_norm, self._clip_norm = self._clip_norm, None
        climbed, plain = self._climb is not None, not self.needs_two_passes
        if self._overflowed():
            self.restore()
            self.finish()
            return
        if not (climbed or plain or self._returned):
            raise RuntimeError(
                f"{type(self).__name__}.step() without a closure is the second half of a step: call backward(), "
                "first_step(), backward() again before it; or step(closure), or piste.sharpness_step; for trainers see "
                "piste.integrations"
            )
        self._unscale()
        if self._returned or self.descend():
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(self._weights(), clip_norm)
            self.inner_step(None)
        self.finish()

    def finish(self) -> None:
        """Count a step, taken or skipped, and its gradients as used. ``step()`` does so; a second call does nothing."""
        if self._finished:
            return
        self.steps += 1
        self._returned, self._skip, self._finished = False, False, True
        self._used = {p: (p.grad, p.grad._version) for p in self._weights() if p.grad is not None}

    def inner_step(
        self, closure: Callable[[], float] | None, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[float | None, bool]:
        self._stepping = True
        try:
            return super().inner_step(closure, optimizer)
        finally:
            self._stepping = False

    @contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise

    # gradients -------------------------------------------------------------------------------------------------------

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _with_new_gradients(self, action: str, after: str = "nothing was changed") -> list[Tensor]:
        self._finished = False
        present = [p for p in self._weights() if p.grad is not None and p.numel()]
        fresh = [p for p in present if is_new(p, self._used)]
        if not fresh:
            why = "gradients that a step has had before" if present else "no gradients"
            raise RuntimeError(
                f"{type(self).__name__}.{action}() found {why}: call zero_grad() and backward() before it; {after}"
            )
        return present

    # AMP -------------------------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Has GradScaler to come here whatever it found?

        Between the passes it has to, for weights to be restored; and where there is nothing that it could have
        unscaled, for only a closure can be what it brings, and that is refused.
        """
        waits = self._finished and not any(is_new(p, self._used) for p in self._weights())
        return self._climb is not None or waits or super()._step_supports_amp_scaling

    def _overflowed(self) -> bool:
        found = getattr(self, "found_inf", None)
        return found is not None and bool(found.item())

    def _unscale(self) -> None:
        """Unscale gradients that GradScaler left to an optimizer which cannot do so itself."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None and not super()._step_supports_amp_scaling:
            torch._foreach_div_([p.grad for p in self._weights() if p.grad is not None], scale)
            self.grad_scale = None

    # weights ---------------------------------------------------------------------------------------------------------

    def _ascend(self, weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
        """Move the weights; the squared norm by which the way was divided."""
        states = [self._scratch.setdefault(p, {"step": 0}) for p in weights]
        scaled = self._scaled() if self.adaptive == "asam" else set()
        numbers = [{"rho": self.rho_now, "eta": self.eta, "scaled": float(x)} for x in (0, 1)]
        groups = [int(p in scaled) for p in weights]
        return self.compute(ASCENTS[self.adaptive], weights, states, groups, numbers, gradients)["ascent"]

    def _scaled(self) -> set[Tensor]:
        """The weights that ASAM's operator scales."""
        found: set[Tensor] = set()
        for group in self.param_groups:
            names = group.get("param_names") or ["weight" if p.ndim > 1 else "" for p in group["params"]]
            found |= {p for p, name in zip(group["params"], names, strict=True) if "weight" in name}
        return found

    def _copies(self, weights: list[Tensor]) -> list[list[Tensor]]:
        """Copies of the weights, with what belongs to them, in buffers that stay from step to step."""
        formats_of(self.optimizer, weights, [{} for _ in weights])  # sees to it that rests are there
        kept = []
        for p in weights:
            tensors = self._belonging(p)
            buffers = self._buffers.get(p, [])
            if [(x.shape, x.dtype, x.device) for x in buffers] != [(x.shape, x.dtype, x.device) for x in tensors]:
                buffers = self._buffers[p] = [torch.empty_like(x) for x in tensors]
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor)
            kept.append(buffers)
        return kept

    def _put_back(self, climb: Climb) -> None:
        for p, kept in zip(climb.weights, climb.kept, strict=True):
            for tensor, before in zip(self._belonging(p), kept, strict=True):
                tensor.copy_(before)
        torch.clear_autocast_cache()

    def _belonging(self, p: Tensor) -> list[Tensor]:
        rest = self.optimizer.state[p].get(companion("p")) if p in self.optimizer.state else None
        return [p] if rest is None else [p, rest]

    # state -----------------------------------------------------------------------------------------------------------

    def _packed(self) -> dict[str, Any]:
        packed = super()._packed()
        first, *others = packed["param_groups"]
        marks = {_STEPS: self.steps, _PERTURBED: self._climb is not None}
        packed["param_groups"] = [{**first, **marks}, *others]
        if self._climb is not None:
            numbers = self._numbers()
            for i, p in enumerate(self._climb.weights):
                entries = packed["state"].setdefault(numbers[p], {})
                entries |= {f"{self.name}.kept{j}": x.clone() for j, x in enumerate(self._climb.kept[i])}
                if self._climb.clean is not None:
                    entries[f"{self.name}.clean"] = self._climb.clean[i].clone()
        return packed

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        first, *others = state_dict["param_groups"]
        steps, perturbed = first.get(_STEPS), first.get(_PERTURBED, False)
        if steps is None:
            raise ValueError(f"state_dict has no {_STEPS!r}; it is not what {type(self).__name__}.state_dict() returns")
        groups = [{k: v for k, v in first.items() if k not in (_STEPS, _PERTURBED)}, *others]
        super()._unpack({**state_dict, "param_groups": groups})
        self._start()
        self.steps = int(steps)
        between = {p: own for p, own in self.own.items() if "kept0" in own}
        if perturbed:
            kept = [[own.pop(k) for k in ("kept0", "kept1") if k in own] for own in between.values()]
            clean = [own.pop("clean") for own in between.values()] if self.combines else None
            self._climb = Climb(list(between), kept, clean)
        self.own = {p: own for p, own in self.own.items() if set(own) > {"step"}}

    def _checked(self, entries: Mapping[str, Any], weight: Tensor, name: str) -> dict[str, Any]:
        """Copies of what was saved for a weight; there is none for one that no step has met."""
        legal = {**self.states(), "clean": _GRADIENT}
        found: dict[str, Any] = {"step": int(entries.get("step", 0))}
        for key, value in entries.items():
            if key.startswith("kept"):
                found[key] = value.detach().to(device=weight.device, copy=True)
            elif key in legal:
                found[key] = check_tensor(value, key, name, legal[key], real(weight))
            elif key != "step":
                raise ValueError(f"parameter {name} has {self.name} entries {key!r}; expected: {', '.join(legal)}")
        return found

    def __getstate__(self) -> dict[str, Any]:
        transient = (
            "_guard",
            "_stepping",
            "_climb",
            "_skip",
            "_returned",
            "_finished",
            "_clip_norm",
            "_used",
            "_buffers",
            "_scratch",
            "_statistics",
        )
        if self._climb is not None:
            raise RuntimeError(
                f"{type(self).__name__} cannot be copied between its two passes; state_dict() can be taken"
            )
        return {k: v for k, v in super().__getstate__().items() if k not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
