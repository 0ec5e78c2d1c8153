"""The one optimizer class: parameter groups, state and protocol of ``torch.optim.Optimizer`` round a pipeline."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor

from piste import capture, execution
from piste.checkpoint import after_loading, before_loading, for_torch, matched
from piste.checks import check_choice, check_hyperparameters, refuse_unknown
from piste.device_numbers import Counters, recording
from piste.distribution import Sharing, check_distribute, whole_matrices
from piste.execution import Member, Roster
from piste.group_values import Flags, Number, listed, split
from piste.last_step import LastStep, nonfinite
from piste.options import ENGINE_OPTIONS, GROUP_OPTIONS, LEGAL_OPTIONS, Params, engine_name
from piste.roster import Sorted, real
from piste.slots import Part, Pipeline, program
from piste.storage import STATE_FORMATS, Formats, State, check_formats, full_precision
from piste.symbol import Row
from piste.variants import Variants

__all__ = ["Optimizer"]


class Due(NamedTuple):
    """What an optimizer brings to a step.

    Attributes:
        carried: for each group, the numbers of its own as they are after the step.
        gradients: of all weights; None where one rests.
        numbers: for each group, what its parts read.
    """

    carried: Sequence[Mapping[str, Any]]
    gradients: list[Tensor | None]
    numbers: list[dict[str, float]]


class Optimizer(torch.optim.Optimizer):
    """Base class of all optimizers of piste; a subclass names its parts in :meth:`pipeline` and nothing else.

    Args:
        params: tensors, parameter groups, or ``(name, tensor)`` pairs. Names are saved, and matched when loading.
        defaults: hyper-parameters with their default values, as they appear in ``param_groups``.
        options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is outside of its range, an option is unknown, weights are missing or repeated. Nothing
            has been changed then.

    Example:
        >>> import torch, piste
        >>> from piste.rules.sgd import sgd
        >>> from piste.parts.standard import standard
        >>> class HeavyBall(piste.Optimizer):
        ...     def __init__(self, params, lr=0.1, momentum=0.9, **options):
        ...         hyper = {"lr": lr, "momentum": momentum, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
        ...         super().__init__(params, hyper, options)
        ...     @classmethod
        ...     def pipeline(cls, group):
        ...         return standard(group, sgd)
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = HeavyBall([w])
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.tolist()
        [0.800000011920929, 0.800000011920929]
    """

    #: measure the norm of every update from the next step on; see :class:`piste.last_step.LastStep`
    measure_updates: bool = False
    #: what is done with the change of every weight, which then stays; for wrappers, and only while they step
    instead: Part | None = None
    #: what ``torch.optim`` calls the states of the same algorithm, with what they are called here
    torch_names: ClassVar[Mapping[str, str]] = {}
    #: how many numbers ``betas`` has
    betas_count: ClassVar[int] = 2
    #: may schedules cycle the momentum? If not, groups are marked so
    cycles_momentum: ClassVar[bool] = True
    #: whole numbers (or None) that the shapes of states depend on: :meth:`pipeline` sees their values
    shaping: ClassVar[tuple[str, ...]] = ()
    _programs: ClassVar[dict[Any, tuple[Variants, Mapping[str, State]]]] = {}

    def __init__(self, params: Params, defaults: dict[str, Any], options: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if not options.keys() <= GROUP_OPTIONS.keys() | ENGINE_OPTIONS.keys():  # then those of the class, too
            refuse_unknown(name, options, [*_own_arguments(type(self)), *GROUP_OPTIONS, *ENGINE_OPTIONS])
        self._options = {**ENGINE_OPTIONS, **{k: v for k, v in options.items() if k in ENGINE_OPTIONS}}
        for option, legal in LEGAL_OPTIONS.items():
            check_choice(option, self._options[option], legal)
        self._sharing = Sharing(check_distribute(name, self._options.pop("distribute")))
        self._engine_name = engine_name(self._options)
        if self.capturable:
            capture.check_engine(name, self._engine_name, self._options["nonfinite"])
        group_options = {k: v for k, v in options.items() if k in GROUP_OPTIONS}
        defaults = {**GROUP_OPTIONS, **defaults, **group_options}
        self._check(defaults, defaults)
        self._chosen: list[int] = []
        super().__init__(listed(name, params), defaults)
        self._check_weights()
        self._finish()

    def _finish(self) -> None:
        if self._options["amp_unscale"] or self.capturable:
            self._step_supports_amp_scaling = True
        self._counters: Counters | None = getattr(self, "_counters", None)
        # what recorded steps refer to, for as long as somebody may replay them
        self._recorded: list[Any] = getattr(self, "_recorded", [])
        for group in self.param_groups if self.capturable else ():
            capture.place_numbers(group)
        self.last_step = LastStep(self.param_groups, {}, None, skipped=False)
        self._roster = Roster([])
        self._any_complex = False
        self._roster_of: tuple[Any, list[Tensor], Any] = (None, [], None)

    @classmethod
    @abstractmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        """The parts that make up a step for weights of this group.

        ``group`` holds the flags of the group (bool, str, None) by name, and ``Number`` for every number: numbers
        change during training and select nothing here; a rule may branch on them. Those of :attr:`shaping` are flags.
        """

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        """Refuse combinations of hyper-parameters that make no sense; each value is already within its own range."""

    def flags_of(self, group: int, position: int) -> tuple[tuple[str, Any], ...]:
        """Flags of one weight, by its place, that :meth:`pipeline` sees besides those of its group.

        They may change which parts a weight has, not which states it may keep.
        """
        return ()

    def advance(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The next values of the numbers that a group itself carries from step to step, by name.

        Asked once per group before every step that is taken; parts see the new values as hyper-parameters, and the
        group keeps them once the step is done. ``group`` must not be changed here. A class that carries numbers (a
        schedule's position, a running product) gives them their start among its defaults, so that they are saved,
        loaded and checked like any hyper-parameter.
        """
        return {}

    def absorb(self, group: Mapping[str, Any], totals: Mapping[str, Tensor]) -> dict[str, Any]:
        """Numbers that a group keeps for later steps out of what the parts summed over all weights, by name.

        Asked once per group after every step that was taken. ``totals`` holds what :func:`piste.ops.total` summed;
        reading one waits for the device.
        """
        return {}

    def _check(self, group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        check_hyperparameters(type(self).__name__, group, known)
        betas = group.get("betas")
        if betas is not None and len(betas) != self.betas_count:
            many = {2: "two", 3: "three"}[self.betas_count]
            raise ValueError(f"{type(self).__name__} got betas={betas!r}; legal: {many} numbers, each in [0, 1)")
        self.check_group({**known, **group})

    # groups and state ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights, with hyper-parameters of their own where they differ from the defaults.

        Beside groups with names, as :func:`piste.create` makes them, weights without names (those that Lightning's
        ``BaseFinetuning`` thaws, say) get names by their place: ``"group2.0"``.
        """
        (group,) = listed(type(self).__name__, [dict(param_group)])
        named = "param_names" in group or any(isinstance(p, tuple) for p in group["params"])
        if not named and any("param_names" in g for g in self.param_groups):
            place = f"group{len(self.param_groups)}"
            group["params"] = [(f"{place}.{n}", p) for n, p in enumerate(group["params"])]
        for position, p in enumerate(group["params"]):
            tensor = p[1] if isinstance(p, tuple) else p
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(f"parameter {position} is of {tensor.dtype}; legal: floating point or complex tensors")
            if not (tensor.is_leaf or tensor.retains_grad):
                raise ValueError(f"parameter {position} is no leaf: can't optimize a non-leaf Tensor")
        self._check(group, self._hyper_defaults)
        self._check_formats(group)
        if not self.cycles_momentum:
            group.setdefault("cycle_momentum", False)
        if "state" in group:
            self._chosen.append(len(self.param_groups))
        super().add_param_group(group)
        if self.capturable:
            self._make_capturable(self.param_groups[-1])

    def _make_capturable(self, group: dict[str, Any]) -> None:
        """Put the numbers of a new group on the device; a group that cannot be recorded is refused and gone."""
        cls = type(self)
        try:
            carries = cls.absorb is not Optimizer.absorb or bool(self.advance(group))
            capture.check_group(cls.__name__, group, numbers_on_host=carries)
            capture.place_numbers(group)
            statics, hp = split(group, self._hyper_defaults, self.shaping, device=True)
            for shape in {p.ndim: tuple(real(p).shape) for p in group["params"]}.values():
                program, _ = self._program(statics, len(shape), scaled=False, device=capture.on_device(hp))
                capture.refuse_opaque(cls.__name__, program.graph(Row(hp, 0), shape))
        except Exception:
            self.param_groups.pop()
            raise

    def _check_formats(self, group: Mapping[str, Any]) -> None:
        whole = {**self._hyper_defaults, **group}
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        check_formats(type(self).__name__, whole, tensors, self._states_of(whole))

    def _check_weights(self) -> None:
        """Refuse a format of bfloat16 weights where there are none."""
        marked = [group for group in self.param_groups if group["weights"] != "plain"]
        weights = [p for group in marked for p in group["params"]]
        if weights and all(p.dtype != torch.bfloat16 for p in weights):
            raise ValueError(
                f"{type(self).__name__} got weights={marked[0]['weights']!r} for weights of {weights[0].dtype}; legal: "
                "'plain', or a model in bfloat16 (model.to(torch.bfloat16) before the optimizer is made)"
            )

    def full_precision(self, p: Tensor) -> Tensor:
        """What a weight stands for, in full.

        Args:
            p: a weight of this optimizer.

        Returns:
            A new tensor of the weight's shape: float32 for bfloat16 weights, with what ``weights="kahan"`` or
            ``"remainder"`` keep beside them; else a copy.

        Raises:
            ValueError: ``p`` is no weight of this optimizer.
        """
        for group in self.param_groups:
            if any(p is q for q in group["params"]):
                return full_precision(p.detach(), self.state.get(p, {}), group["weights"])
        raise ValueError(f"full_precision got a tensor of shape {tuple(p.shape)} that is in no group of this optimizer")

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph record its steps? See :class:`piste.options.EngineOptions`."""
        return bool(self._options["capturable"])

    @property
    def _hyper_defaults(self) -> dict[str, Any]:
        return {k: v for k, v in self.defaults.items() if k != "differentiable"}  # torch puts that one in

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
            "measure_updates": self.measure_updates,
            "_options": self._options,
            "_engine_name": self._engine_name,
            "_chosen": self._chosen,
            "_sharing": self._sharing,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._finish()

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer as torch's optimizers give it, for :meth:`load_state_dict`.

        Where processes share matrix work (``distribute=``), all of them have to call this, for matrices are kept by one
        process each. Of sharded weights they come sharded, for ``torch.distributed.checkpoint``; of others, whole.
        """
        packed = super().state_dict()
        if self.capturable:
            packed = capture.saved(packed)
        matrices = whole_matrices(self._roster.members)
        if matrices:
            weights = [p for group in self.param_groups for p in group["params"]]
            for number, p in zip((n for g in packed["param_groups"] for n in g["params"]), weights, strict=True):
                if p in matrices:
                    packed["state"][number] = packed["state"][number] | matrices[p]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any], *, state: str | None = None) -> None:
        """Load what :meth:`state_dict` gave; weights are matched by name where both sides have names.

        Args:
            state_dict: codes, scales and numbers come back bit by bit, in the formats that they were saved in. Groups
                of ``torch.optim`` say nothing of formats: what they hold comes in the format of the groups here.
            state: the format that states are to have from now on, whatever they were saved in: decoded, and rounded to
                the nearest code. Groups that were given a ``"state"`` of their own here (embeddings, by
                :func:`piste.param_groups`) keep it.

        Raises:
            ValueError: something does not fit; nothing has been changed then.
        """
        saved = before_loading(self, state_dict)
        if state is not None:
            check_choice("state", state, STATE_FORMATS)
            forms = [g["state"] if i in self._chosen else state for i, g in enumerate(self.param_groups)]
        else:
            forms = [None] * len(self.param_groups)
        loaded, groups = matched(self.param_groups, saved, self._states_of, real, forms, self.torch_names)
        for group in groups:
            self._check({k: v for k, v in group.items() if k not in ("params", "param_names")}, self._hyper_defaults)
            self._check_formats(group)
        if self.capturable:
            with torch.no_grad():
                capture.loaded_in_place(self.state, self.param_groups, loaded, groups)
        self.__setstate__({"state": defaultdict(dict, loaded), "param_groups": groups})
        after_loading(self)

    def torch_state_dict(self) -> dict[str, Any]:
        """A state dictionary for the class of ``torch.optim`` that has the name of this one; the way back is
        :meth:`load_state_dict`.

        Returns:
            States under torch's names, in float32 whatever they are stored in here (torch casts them to the dtype of
            their weights), and torch's settings with the values of this optimizer where it has them.

        Raises:
            ValueError: ``torch.optim`` has no such class, or one that keeps other states.

        Example:
            >>> import torch, piste
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = piste.AdamW(model.parameters(), lr=3e-4)
            >>> torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.torch_state_dict())
        """
        name = type(self).__name__
        if not self.torch_names:
            raise ValueError(f"{name} has no counterpart in torch.optim that keeps the same states")
        theirs: dict[str, Any] = getattr(torch.optim, name)([torch.zeros(1, 1)]).defaults
        return for_torch(self.state_dict(), self.param_groups, theirs, self.torch_names, self._states_of)

    # stepping --------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]  # in a compiled function the graph is broken here, and the step runs as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
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
        if self.capturable:
            self._step_on_device()
            return loss
        if recording():
            raise RuntimeError(
                f"a step of {type(self).__name__} is being recorded into a CUDA graph, which needs capturable=True"
            )
        inverse_scale, overflow = self._loss_scale()
        if overflow or not self._finite():
            self.last_step = LastStep(self.param_groups, {}, inverse_scale, skipped=True)
        else:
            self._take(inverse_scale)
        return loss

    def _step_on_device(self) -> None:
        """Take a step of which the host knows nothing that changes."""
        step = self._take(self._inverse_scale, getattr(self, "found_inf", None))
        if recording():
            self._recorded.append(step.referred)

    def _take(self, inverse_scale: Tensor | None, skip: Tensor | None = None) -> Sorted:
        """Take the step that is due; :class:`piste.joint.JointStep` takes those of several optimizers so."""
        due = self._due(scaled=inverse_scale is not None)
        step = self._roster.sort(due.gradients, due.numbers)
        totals = execution.take(step, self._engine_name, inverse_scale=inverse_scale, skip=skip)
        self._taken(due, totals, step.renews, inverse_scale, skip)
        return step

    def _due(self, *, scaled: bool = False) -> Due:
        """What the step to come begins with. The roster is brought up to date, and nothing else is changed."""
        carried = [{} if self.capturable else self.advance(group) for group in self.param_groups]
        return Due(carried, *self._gather(carried, scaled=scaled))

    def _taken(
        self,
        due: Due,
        totals: Mapping[str, Tensor],
        renewed: bool,
        inverse_scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Keep what comes of a step: what groups carry from one to the next, and what can be told about it."""
        if any(g is not None for g in due.gradients):  # else none was taken
            for group, new in zip(self.param_groups, due.carried, strict=True):
                group.update(new)
                group.update(self.absorb(group, totals))
        skipped = False if skip is None else skip
        self.last_step = LastStep(self.param_groups, totals, inverse_scale, skipped, renewed)

    @property
    def _inverse_scale(self) -> Tensor | None:
        scale = getattr(self, "grad_scale", None)
        return None if scale is None else scale.double().reciprocal()

    def _loss_scale(self) -> tuple[Tensor | None, bool]:
        """What GradScaler left for us, as a factor and a verdict."""
        found = getattr(self, "found_inf", None)
        return self._inverse_scale, found is not None and bool(found.item())

    def _finite(self) -> bool:
        """Are all gradients finite, or is that nobody's concern?"""
        policy = self._options["nonfinite"]
        if policy == "ignore":
            return True
        bad = nonfinite(self.param_groups)
        if bad and policy == "raise":
            names = ", ".join(self._name(i, n) for i, n in bad[:5]) + (" ..." if len(bad) > 5 else "")
            raise FloatingPointError(
                f"the gradients of {len(bad)} parameters are not finite ({names}); nothing was changed"
            )
        return not bad

    def _name(self, group: int, position: int) -> str:
        names = self.param_groups[group].get("param_names")
        return repr(names[position]) if names else f"parameter {position} of group {group}"

    def _gather(
        self, carried: Sequence[Mapping[str, Any]], *, scaled: bool
    ) -> tuple[list[Tensor | None], list[dict[str, float]]]:
        """The gradients of all weights and the numbers of all groups; the roster is brought up to date."""
        known, capturable = self._hyper_defaults, self.capturable
        groups = [
            split({**g, **new} if new else g, known, self.shaping, device=capturable)
            for g, new in zip(self.param_groups, carried, strict=True)
        ]
        weights = [p for group in self.param_groups for p in group["params"]]
        seeds = [group["seed"] for group in self.param_groups]
        on_device = [capture.on_device(hp) if capturable else None for _, hp in groups]
        if capturable:
            self._ready(weights)
        flags = [statics for statics, _ in groups]
        device = on_device, capturable and self._skippable, self._counters and id(self._counters)
        setting = scaled, self.measure_updates, self._instead, flags, seeds, device
        if not self._current(weights, setting):
            formats = [Formats(g["state"], g["weights"], g["seed"]) for g in self.param_groups]
            members = [
                self._member(p, i, n, statics, formats[i], scaled=scaled, device=on_device[i])
                for i, (group, (statics, _)) in enumerate(zip(self.param_groups, groups, strict=True))
                for n, p in enumerate(group["params"])
            ]
            members = self._sharing.deal(members, [hp for _, hp in groups])
            self._roster = Roster(members, self._counters)
            self._roster_of = self.state, weights, setting
            self._any_complex = any(p.is_complex() for p in weights)
        gradients = [p.grad for p in weights]
        layouts = {g.layout for g in gradients if g is not None}
        if self._any_complex or not layouts <= {torch.strided}:
            self._refuse(gradients, [hp for _, hp in groups])
        return gradients, [hp for _, hp in groups]

    def _member(
        self,
        p: Tensor,
        group: int,
        position: int,
        statics: tuple[tuple[str, Any], ...],
        formats: Formats,
        *,
        scaled: bool,
        device: frozenset[str] | None,
    ) -> Member:
        flags = statics + self.flags_of(group, position)
        variants, states = self._program(flags, p.ndim, scaled=scaled, device=device)
        return Member(p, group, self.state[p], states, variants, formats)

    @property
    def _skippable(self) -> bool:
        return getattr(self, "found_inf", None) is not None

    def _ready(self, weights: list[Tensor]) -> None:
        """Make ready for a step on the device; every weight that is trained has to have a gradient."""
        if any(p.grad is None and p.requires_grad for p in weights):
            places = ((i, n, p) for i, g in enumerate(self.param_groups) for n, p in enumerate(g["params"]))
            missing = (self._name(i, n) for i, n, p in places if p.grad is None and p.requires_grad)
            capture.refuse_missing(type(self).__name__, missing)
        if self._counters is None or not self._counters.serves(weights):
            self._counters = Counters(weights)

    @property
    def _instead(self) -> Any:
        """What tells one :attr:`instead` from another."""
        return None if self.instead is None else self.instead.function

    def _current(self, weights: list[Tensor], setting: Any) -> bool:
        """Does the roster hold these weights, with the states they have now and these flags?"""
        states, known, flags = self._roster_of
        return (
            setting == flags
            and self.state is states
            and len(weights) == len(known)
            and all(map(operator.is_, weights, known))
            and self._same_states(weights)
        )

    def _same_states(self, weights: list[Tensor]) -> bool:
        """Usually the states stand in the order of the weights, and a look-up by tensor costs ten times as much."""
        known = self._roster.states
        in_order = len(self.state) == len(known) and all(map(operator.is_, self.state.values(), known))
        return in_order or all(map(operator.is_, map(self.state.get, weights), known))

    def _refuse(self, gradients: list[Tensor | None], hp: list[dict[str, float]]) -> None:
        """Refuse gradients that are sparse, and complex ones where elements of a weight are combined."""
        for m, g in zip(self._roster.members, gradients, strict=True):
            if g is None:
                continue
            position = next(i for i, p in enumerate(self.param_groups[m.group]["params"]) if p is m.p)
            if g.layout != torch.strided:
                raise ValueError(
                    f"{self._name(m.group, position)} has a {g.layout} gradient; {type(self).__name__} needs dense "
                    "ones (sparse=False in the embedding, or torch.optim.SparseAdam for that parameter)"
                )
            row = Row(hp[m.group], m.state.get("step", 0) + 1)
            if g.is_complex() and m.variants.graph(row, tuple(m.p.shape)).reduces:
                raise ValueError(
                    f"{self._name(m.group, position)} is complex, and {type(self).__name__} as it is set up takes "
                    "means or norms of whole weights, which have no complex form here; legal: real weights "
                    "(torch.view_as_real), or an optimizer that goes element by element (AdamW, and use_gc=False)"
                )

    def _program(
        self, statics: tuple[tuple[str, Any], ...], ndim: int, *, scaled: bool, device: frozenset[str] | None
    ) -> Any:
        skippable = device is not None and self._skippable
        key = type(self), statics, ndim, scaled, self.measure_updates, self._instead, device, skippable
        if key not in self._programs:
            pipeline = replace(self.pipeline(Flags(statics)), instead=self.instead)
            flags = {k: v for k, v in statics if v is not Number}
            variants = program(
                pipeline, flags, ndim, scaled=scaled, watch=self.measure_updates, device=device, skippable=skippable
            )
            self._programs[key] = variants, pipeline.states
        return self._programs[key]

    def _states_of(self, group: Mapping[str, Any]) -> Mapping[str, State]:
        statics, _ = split({**self._hyper_defaults, **group}, self._hyper_defaults, self.shaping)
        return self.pipeline(Flags(statics)).states


def _own_arguments(cls: type[Optimizer]) -> list[str]:
    """What a class itself takes, beside what all of them take."""
    return [name for name in signature(cls).parameters if name not in ("params", "options")]
