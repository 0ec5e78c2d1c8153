"""Grafting: the length of one optimizer's step, the direction of another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from piste.checks import check_hyperparameters
from piste.optimizer import Optimizer
from piste.parts.grafting import Kit, graft, kit
from piste.slots import Part
from piste.storage import State, allocate, companion, compute_dtype
from piste.wrappers.base import Wrapper

__all__ = ["Graft"]

_LAYERWISE, _GLOBAL = kit(together=False), kit(together=True)
_SAVED = ("scale", "counted")
_INSIDE = "graft"  # prefix of what an optimizer inside leaves in its state while it steps
_THEIRS = "direction."  # prefix of the direction's entries in state dictionaries


class Graft(Wrapper):
    r"""AdaGraft: every step as long as one optimizer's, in the direction of another's.

    .. math::
        \Delta^M = M(p, g), \quad \Delta^D = D(p, g), \qquad
        p \leftarrow (1 - \eta_M \lambda)\, p + \eta\,\frac{\|\Delta^M\|}{\|\Delta^D\| + \epsilon}\,\Delta^D

    Both optimizers see the same weights and the same gradients, which stay as they are, and each keeps its own state as
    if its own step had been taken. Norms are those of each tensor (the paper's main form, "layer-wise"), or with
    ``use_global_norm`` of all tensors together. A direction of zero gives a step of zero.

    The groups are the magnitude's, the very same objects, so schedules act on the magnitude, where the learning rate
    lives. The direction's own learning rate cancels, as long as its steps are far longer than ``eps``.

    **When to use**: to find out whether an optimizer's merit is its direction or its step sizes; to give a direction
    whose learning rate is unknown that of a tuned optimizer; to train with SGD's memory after a first part with an
    adaptive method (:meth:`scaled_groups`). **When not**: when either optimizer alone does; two optimizers step for
    one. Optimizers that hold on to earlier weights (Ranger's slow weights, MADGRAD's starting point) work as children,
    but what they hold is out of step with weights that others move.

    State: that of both optimizers. Besides, 4 bytes per parameter of scratch memory for the direction's step (8 for
    float64), which is not saved, and a few numbers per tensor.

    Optimizers of piste compute their step as a step, in float32, whatever the weights' format: nothing is lost to a
    bfloat16 weight until the grafted step is added. Any other optimizer is run on the weights, which are then put
    back, and the difference is taken; its weights have to be float32 or float64.

    Args:
        magnitude: an optimizer over the weights.
        direction: another one over the same weights, in the same groups.
        lr: factor on every step, for a magnitude that is to be damped or raised as a whole.
        eps: added to the norm of the direction.
        weight_decay: decoupled decay :math:`\lambda`, the only one there is: decay inside either optimizer would be
            part of its step, and turned and scaled with it. A group of the magnitude may have its own, as
            ``"outer_decay"``; the others follow this argument, which is not written into the groups.
        use_global_norm: one ratio for all tensors together.

    Raises:
        TypeError: ``magnitude`` or ``direction`` is no optimizer.
        ValueError: a value is out of range, the optimizers are over different weights, are one and the same, treat
            non-finite gradients differently, or decay weights themselves; weights are complex; an optimizer that is not
            of piste has weights in half precision.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> magnitude = piste.Adam(model.parameters(), lr=1e-3)
        >>> direction = piste.SGD(model.parameters(), lr=1.0, momentum=0.9)
        >>> optimizer = piste.Graft(magnitude, direction, weight_decay=0.01)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling adaptive gradient methods from learning rates" (2020,
    arXiv 2002.11803); ``eps`` is that of an author's PyTorch code (optimetry).
    """

    name = "graft"

    def __init__(
        self,
        magnitude: torch.optim.Optimizer,
        direction: torch.optim.Optimizer,
        lr: float = 1.0,
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        use_global_norm: bool = False,
    ) -> None:
        given = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "use_global_norm": use_global_norm}
        check_hyperparameters("Graft", given, given)
        for role, child in (("magnitude", magnitude), ("direction", direction)):
            if not isinstance(child, torch.optim.Optimizer):
                kind = type(child).__name__
                raise TypeError(f"Graft got {role}={kind}; legal: an instance of torch.optim.Optimizer")
        self._check_pair(magnitude, direction)
        super().__init__(magnitude)
        self._refuse_capturable(direction)
        self.direction = direction
        self.lr, self.eps, self.weight_decay, self.use_global_norm = lr, eps, weight_decay, use_global_norm
        self._took: dict[Tensor, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._check_decays()

    @property
    def magnitude(self) -> torch.optim.Optimizer:
        """The optimizer whose steps give the length."""
        return self.optimizer

    @property
    def engine_name(self) -> str:
        named = (getattr(child, "_engine_name", None) for child in (self.magnitude, self.direction))
        return next((str(name) for name in named if name is not None), "auto")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        children = (self.magnitude, self.direction)
        return all(bool(getattr(child, "_step_supports_amp_scaling", False)) for child in children)

    def states(self) -> Mapping[str, State]:
        return {name: graft.states[name] for name in _SAVED}

    # groups ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_pair(magnitude: torch.optim.Optimizer, direction: torch.optim.Optimizer) -> None:
        if magnitude is direction:
            raise ValueError("Graft got one optimizer as both magnitude and direction; legal: two of them")
        mine, theirs = ([[id(p) for p in g["params"]] for g in child.param_groups] for child in (magnitude, direction))
        if mine != theirs:
            raise ValueError(
                "Graft got magnitude and direction over different weights; legal: the same, in equal groups"
            )
        policies = {c._options["nonfinite"] for c in (magnitude, direction) if isinstance(c, Optimizer)}
        if len(policies) > 1:
            raise ValueError("Graft got magnitude and direction with different nonfinite=; legal: the same for both")
        formats = {tuple(g.get("weights", "plain") for g in c.param_groups) for c in (magnitude, direction)}
        if len(formats) > 1:
            raise ValueError("Graft got magnitude and direction with different weights=; legal: the same for both")
        for role, child in (("magnitude", magnitude), ("direction", direction)):
            for index, group in enumerate(child.param_groups):
                if group.get("weight_decay", 0) != 0:
                    raise ValueError(
                        f"Graft got {role}={type(child).__name__} with weight_decay={group['weight_decay']!r} in group "
                        f"{index}; legal: 0, as decay inside would be turned and scaled with the step. "
                        "Graft(weight_decay=...) decays outside"
                    )
                if isinstance(child, Graft) and child._decay(group) != 0:
                    raise ValueError(
                        f"Graft got {role}=Graft with a decay of {child._decay(group)!r} in group {index}; "
                        "legal: 0, and the decay of the outer one"
                    )
                for p in group["params"]:
                    if p.is_complex():
                        raise ValueError("Graft got complex weights, whose norms have no form here; legal: real ones")
                    if not isinstance(child, Optimizer) and p.dtype != compute_dtype(p.dtype):
                        raise ValueError(
                            f"Graft got {role}={type(child).__name__} over weights of {p.dtype}, which it would round "
                            "its step to; legal: float32 or float64 weights, or an optimizer of piste"
                        )

    def _decay(self, group: Mapping[str, Any]) -> float:
        """A group's own decay, or that of this wrapper; groups are shared, so nothing is written into them."""
        return float(group.get("outer_decay", self.weight_decay))

    def _check_decays(self) -> None:
        for group in self.param_groups:
            own = group.get("outer_decay", self.weight_decay)
            check_hyperparameters("Graft", {"weight_decay": own}, ("weight_decay",))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights to both optimizers.

        The entries are the magnitude's; settings for the direction stand under ``"direction"``, in a dictionary.
        """
        group = dict(param_group)
        theirs = group.pop("direction", {})
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        given = group["params"]
        self.magnitude.add_param_group(group)
        try:
            self.direction.add_param_group({"params": given, **theirs})
            try:
                self._check_pair(self.magnitude, self.direction)
                self._check_decays()
            except Exception:
                del self.direction.param_groups[-1]
                raise
        except Exception:
            del self.magnitude.param_groups[-1]
            raise

    # stepping --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss with its gradients anew and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p.numel()]
        active = [(p, i) for p, i in weights if p.grad is not None]
        parts = _GLOBAL if self.use_global_norm else _LAYERWISE
        if not self._half_step(self.magnitude, parts.measure, "magnitude", parts, weights):
            return loss
        if self._half_step(self.direction, parts.keep, "size", parts, weights) and active:
            states = [self._own(p) for p, _ in active]
            self.compute(graft, [p for p, _ in active], states, [i for _, i in active], self._numbers_of_groups())
        return loss

    def _half_step(
        self, child: torch.optim.Optimizer, part: Part, size: str, kit: Kit, weights: Sequence[tuple[Tensor, int]]
    ) -> bool:
        """Let one optimizer inside find its step without taking it, and say whether it did not skip it."""
        if not isinstance(child, Optimizer):
            return self._step_and_recede(child, size, kit, [p for p, _ in weights])
        left = {f"{_INSIDE}.{key}": size if key == "size" else key for key in part.states}
        active = [p for p, _ in weights if p.grad is not None]
        for p in active:
            own = self._own(p)
            child.state[p].update({inside: own[key] for inside, key in left.items()})
            rest = self.magnitude.state[p].get(companion("p"))
            if rest is not None and child is not self.magnitude:  # a weight stands for one thing to both
                child.state[p][companion("p")] = rest
        child.instead = part.named(_INSIDE)
        try:
            return self.inner_step(None, child)[1]
        finally:
            child.instead = None
            for p in active:
                for inside in left:
                    del child.state[p][inside]

    def _step_and_recede(self, child: torch.optim.Optimizer, size: str, kit: Kit, weights: Sequence[Tensor]) -> bool:
        """For other people's optimizers: step, keep the difference, put weights and gradients back."""
        weights = [p for p in weights if p.requires_grad or p.grad is not None]
        gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in weights]
        for p in weights:
            self._own(p)["change"].copy_(p)
        try:
            taken = self.inner_step(None, child)[1]
        except BaseException:
            for p in weights:
                p.copy_(self._own(p)["change"])
            raise
        finally:
            for p, gradient, copy in gradients:
                p.grad = gradient
                if gradient is not None and copy is not None:
                    gradient.copy_(copy)
        states = [self._taken_by(p, size) for p in weights]
        if weights:
            self.compute(kit.recede, weights, states, [0] * len(weights), [{}])
        return taken

    def _own(self, p: Tensor) -> dict[str, Any]:
        """What is kept for a weight; scratch tensors are not saved, so they may have to be made again."""
        own = self.own.setdefault(p, {"step": 0})
        for name, state in graft.states.items():
            if name not in own:
                own[name] = allocate(state, p)
        return own

    def _taken_by(self, p: Tensor, size: str) -> dict[str, Any]:
        """The same tensors under the names that the part which takes a step back gives them."""
        own = self._own(p)
        known = self._took.get(p)
        if known is None or known[0]["change"] is not own["change"]:
            known = (
                {"change": own["change"], "size": own["magnitude"]},
                {"change": own["change"], "size": own["size"]},
            )
            self._took[p] = known
        return known[0 if size == "magnitude" else 1]

    def _numbers_of_groups(self) -> list[dict[str, float]]:
        found = []
        for group, theirs in zip(self.param_groups, self.direction.param_groups, strict=True):
            rate, other = _rate(group), _rate(theirs) * self._own_scale(theirs)
            found.append(
                {
                    "lr": self.lr,
                    "eps": self.eps,
                    "decay": rate * self._decay(group),
                    "unit": self.lr * other / rate if rate else 0.0,
                }
            )
        return found

    def _own_scale(self, group: Mapping[str, Any]) -> float:
        """The factor that piste.SGD as the direction has on its steps; others do not read a group's "lr_scale"."""
        known = isinstance(self.direction, Optimizer) and "lr_scale" in self.direction.defaults
        return float(group["lr_scale"]) if known else 1.0

    # step sizes ------------------------------------------------------------------------------------------------------

    def layer_scales(self) -> dict[Tensor, float]:
        """For every tensor that has moved, the mean ratio of the two step sizes, each divided by its learning rate.

        A step of the direction alone, with the *magnitude's* learning rate times this number, is as long as the
        grafted one. So the direction can go on with it alone, under the same schedule. An ``lr_scale`` that the
        direction's groups had counts as part of its learning rate, so this number takes its place. The mean is over all
        steps since the start or :meth:`reset_layer_scales`; steps in which either learning rate or the direction was 0
        do not count. Reading it waits for the device.
        """
        measured = [(p, own) for p, own in self.own.items() if "scale" in own]
        return {p: own["scale"].item() for p, own in measured if own["counted"].item() > 0}

    def reset_layer_scales(self) -> None:
        """Begin the mean of :meth:`layer_scales` anew, for instance after warm-up."""
        for own in self.own.values():
            for name in _SAVED:
                own[name].zero_()

    def scaled_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Groups, one per tensor, with which the direction goes on alone, without the magnitude's state.

        The learning rate that they are used with stands for that of the magnitude's first group. Where other groups
        had another one, their scales are larger or smaller by as much (by ``"initial_lr"``, under a schedule), so one
        ``lr`` for all keeps the proportions.

        Args:
            lr: None gives each group an ``"lr_scale"``, which ``piste.SGD`` multiplies into whatever ``lr`` a schedule
                sets. A number gives each group ``"lr"``, that number times its scale, for optimizers that know no
                ``lr_scale``; schedules have to start from each group's own ``lr`` then, as most of torch's do.

        Returns:
            Groups with "params", "param_names" if there are any, the learning rate as above, and as "weight_decay"
            (decoupled; torch's SGD takes it as L2) what shrinks weights as fast as this wrapper's decay. A tensor that
            never moved gets the median of the others.

        Raises:
            RuntimeError: nothing has moved yet.

        Under timm's schedulers take ``scaled_groups()`` with ``torch.optim.SGD``: those schedulers multiply
        ``lr_scale`` into ``lr`` themselves, which ``piste.SGD`` would then do once more.

        >>> import torch, piste
        >>> w = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = piste.Graft(piste.Adam([w], lr=0.1), piste.SGD([w], lr=1.0))
        >>> w.grad = torch.full_like(w, 0.5)
        >>> optimizer.step()
        >>> groups = optimizer.scaled_groups()
        >>> round(groups[0]["lr_scale"], 4)  # Adam moved each weight by lr, SGD would move it by half of its lr
        2.0
        >>> sgd = piste.SGD(groups, lr=0.1)
        """
        scales = self.layer_scales()
        if not scales:
            raise RuntimeError("no step sizes have been measured yet; take steps first")
        usual = median(scales.values())
        groups = []
        first = _peak(self.param_groups[0])
        for group in self.param_groups:
            names, decay = group.get("param_names"), self._decay(group)
            share = _peak(group) / first if first else 1.0
            for position, p in enumerate(group["params"]):
                scale = scales.get(p, usual) * share
                new: dict[str, Any] = {"params": [p]}
                if lr is None:
                    new |= {"lr_scale": scale, "weight_decay": decay * share}
                else:  # decay is per unit of lr, which has the scale in it here
                    new |= {"lr": lr * scale, "weight_decay": decay * share / scale if scale else 0.0}
                if names:
                    new["param_names"] = [names[position]]
                if decay:
                    new["decoupled_weight_decay"] = True
                groups.append(new)
        return groups

    # state -----------------------------------------------------------------------------------------------------------

    def _packed(self) -> dict[str, Any]:
        packed, theirs = super()._packed(), self.direction.state_dict()
        state = packed["state"]
        for number, entries in theirs["state"].items():
            state.setdefault(number, {}).update({_THEIRS + key: value for key, value in entries.items()})
        groups = [
            {**mine, **{_THEIRS + key: value for key, value in other.items() if key not in ("params", "param_names")}}
            for mine, other in zip(packed["param_groups"], theirs["param_groups"], strict=True)
        ]
        return {**packed, "state": state, "param_groups": groups}

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        mine: dict[str, Any] = {**state_dict, "state": {}, "param_groups": []}
        theirs: dict[str, Any] = {"state": {}, "param_groups": []}
        for group in state_dict["param_groups"]:
            ours, other = _parted(group)
            if not other:
                raise ValueError(
                    "state_dict has no entries of the direction; it is not what Graft.state_dict() returns"
                )
            mine["param_groups"].append(ours)
            theirs["param_groups"].append(other | {k: ours[k] for k in ("params", "param_names") if k in ours})
        for number, entries in state_dict["state"].items():
            ours, other = _parted(entries)
            mine["state"].update({number: ours} if ours else {})
            theirs["state"].update({number: other} if other else {})
        before = self.direction.state_dict()
        self.direction.load_state_dict(theirs)
        try:
            super()._unpack(mine)
        except Exception:
            self.direction.load_state_dict(before)
            raise
        self._check_decays()

    def __getstate__(self) -> dict[str, Any]:
        kept = {p: {k: own[k] for k in ("step", *_SAVED)} for p, own in self.own.items()}
        return {**super().__getstate__(), "own": kept, "_took": {}}

    def __repr__(self) -> str:
        inner = "\n".join(
            f"    {role}: " + "\n    ".join(repr(child).splitlines())
            for role, child in (("magnitude", self.magnitude), ("direction", self.direction))
        )
        return f"Graft(\n{inner}\n)"


def _rate(group: Mapping[str, Any]) -> float:
    """A group's learning rate; 1 where the optimizer finds its own (Adafactor)."""
    lr = group.get("lr")
    return 1.0 if lr is None else float(lr)


def _peak(group: Mapping[str, Any]) -> float:
    """A group's learning rate before any schedule."""
    initial = group.get("initial_lr")
    return _rate(group) if initial is None else float(initial)


def _parted(entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is not the direction's, and what is, under its own names."""
    mine = {key: value for key, value in entries.items() if not key.startswith(_THEIRS)}
    theirs = {key.removeprefix(_THEIRS): value for key, value in entries.items() if key.startswith(_THEIRS)}
    return mine, theirs
