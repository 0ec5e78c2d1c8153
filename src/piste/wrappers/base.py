"""What all wrappers share: they are optimizers to schedulers and frameworks, over the groups of the one inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from piste.capture import loaded_in_place
from piste.checkpoint import after_loading, before_loading, check_tensor, weights_by_id
from piste.device_numbers import recording
from piste.roster import real
from piste.slots import Part
from piste.storage import State
from piste.wrappers.arithmetic import Arithmetic, formats_of

__all__ = ["Wrapper", "layers"]


class Wrapper(torch.optim.Optimizer):
    """An optimizer around ``optimizer``, with tensors of its own for every weight.

    Groups and hyper-parameters are the inner optimizer's, the very same objects, so schedulers act on it. The state
    dictionary is the inner one's, with this wrapper's tensors beside it under ``<name>.<state>``.
    """

    name: str  # prefix of this wrapper's entries in state dictionaries
    recordable = False  # can its own part in a step be recorded where the step of the optimizer inside can?

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"{type(self).__name__} got optimizer={kind}; legal: an instance of torch.optim.Optimizer")
        self._refuse_capturable(optimizer)
        self.optimizer = optimizer
        self.own: dict[Tensor, dict[str, Any]] = {}
        self._arithmetic: dict[Any, Arithmetic] = {}
        super().__setstate__({"defaults": optimizer.defaults})  # torch's hooks; its groups stay the inner one's

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph record its steps? The optimizer inside decides, which may be refused here."""
        return bool(getattr(self.optimizer, "capturable", False))

    def _refuse_capturable(self, optimizer: torch.optim.Optimizer) -> None:
        if getattr(optimizer, "capturable", False) and not self.recordable:
            raise ValueError(
                f"{type(self).__name__} got a {type(optimizer).__name__} with capturable=True, and would count and "
                "decide on the host round it; legal: capturable=False"
            )

    # the inner optimizer's face --------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def last_step(self) -> Any:
        """The inner optimizer's account of the last step, where it gives one."""
        return self.optimizer.last_step  # type: ignore[attr-defined]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def train(self) -> None:
        """Make the weights those to train with, where the inner optimizer knows two kinds (Schedule-Free)."""
        getattr(self.optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Make the weights those to evaluate, where the inner optimizer knows two kinds."""
        getattr(self.optimizer, "eval", lambda: None)()

    def buffers(self) -> Iterator[Tensor]:
        """Tensors that are held from step to step and are in no state dictionary, of what is inside, too."""
        yield from getattr(self.optimizer, "buffers", lambda: ())()

    def inner_step(
        self, closure: Callable[[], float] | None, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[float | None, bool]:
        """Step the inner optimizer (or another one inside); what it returned, and whether it took the step.

        GradScaler leaves its findings on the optimizer it was given, which is this wrapper: they are handed on.
        """
        if recording() and not self.capturable:
            raise RuntimeError(
                f"a step of {type(self).__name__} is being recorded into a CUDA graph, but it counts and decides on "
                "the host; record the forward and the backward pass alone, or Lookahead round an optimizer of piste "
                "with capturable=True"
            )
        optimizer = self.optimizer if optimizer is None else optimizer
        handed = [name for name in ("grad_scale", "found_inf") if hasattr(self, name)]
        for name in handed:
            setattr(optimizer, name, getattr(self, name))
        try:
            loss = optimizer.step() if closure is None else optimizer.step(closure)
        finally:
            for name in handed:
                delattr(optimizer, name)
        if self.capturable:  # whether it was taken is known on the device alone
            return loss, True
        found = getattr(self, "found_inf", None)
        last = getattr(optimizer, "last_step", None)
        return loss, not ((found is not None and bool(found.item())) or (last is not None and last.skipped))

    def compute(
        self,
        part: Part,
        weights: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        groups: Sequence[int],
        hp: Sequence[Mapping[str, float]],
        gradients: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run a part of the wrapper's own on weights; see :meth:`piste.wrappers.arithmetic.Arithmetic.run`."""
        if part.function not in self._arithmetic:
            self._arithmetic[part.function] = Arithmetic(part, capturable=self.capturable)
        formats = formats_of(self.optimizer, weights, states)
        skip = getattr(self, "found_inf", None) if self.capturable else None
        run = self._arithmetic[part.function].run
        return run(weights, states, groups, hp, self.engine_name, formats, gradients, skip)

    @property
    def engine_name(self) -> str:
        """The engine of the inner optimizer, where it has one."""
        return str(getattr(self.optimizer, "_engine_name", "auto"))

    # state -----------------------------------------------------------------------------------------------------------

    def states(self) -> Mapping[str, State]:
        """The tensors that this wrapper keeps for a weight, besides a step count."""
        raise NotImplementedError

    def _numbers(self) -> dict[Tensor, int]:
        """The number that ``state_dict`` gives to each weight: its place in the order of groups."""
        weights = [p for group in self.param_groups for p in group["params"]]
        return {p: i for i, p in enumerate(dict.fromkeys(weights))}

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dictionary with this wrapper's entries."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed = self._packed()
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def _packed(self) -> dict[str, Any]:
        packed = self.optimizer.state_dict()
        state = {number: dict(entries) for number, entries in packed["state"].items()}
        numbers, saved = self._numbers(), ("step", *self.states())
        for weight, entries in self.own.items():
            if weight in numbers:
                own = {f"{self.name}.{key}": value for key, value in entries.items() if key in saved}
                if "step" in entries:  # it may be counted on the device
                    own[f"{self.name}.step"] = int(entries["step"])
                state.setdefault(numbers[weight], {}).update(own)
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; a dictionary of the inner optimizer alone is refused."""
        self._unpack(before_loading(self, state_dict))
        after_loading(self)

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        weights = weights_by_id(self.param_groups, state_dict["param_groups"])
        inner: dict[Any, dict[str, Any]] = {}
        own: dict[Tensor, dict[str, Any]] = {}
        prefix = f"{self.name}."
        for number, entries in state_dict["state"].items():
            rest = {key: value for key, value in entries.items() if not key.startswith(prefix)}
            if rest:
                inner[number] = rest
            mine = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
            if number in weights:
                own[weights[number][0]] = self._checked(mine, *weights[number])
        self.optimizer.load_state_dict({**state_dict, "state": inner})
        if self.capturable:
            with torch.no_grad():
                loaded_in_place(self.own, (), own, ())
        self.own = own

    def _checked(self, entries: Mapping[str, Any], weight: Tensor, name: str) -> dict[str, Any]:
        legal = {"step", *self.states()}
        if set(entries) != legal:
            had = ", ".join(sorted(entries)) or "none"
            raise ValueError(f"parameter {name} has {self.name} entries: {had}; expected: {', '.join(sorted(legal))}")
        checked = {
            key: check_tensor(entries[key], key, name, state, real(weight)) for key, state in self.states().items()
        }
        return {"step": int(entries["step"]), **checked}

    def __getstate__(self) -> dict[str, Any]:
        skipped = ("_arithmetic", "step")  # derived; torch's patch of step is made anew
        return {k: v for k, v in self.__dict__.items() if k not in skipped and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_arithmetic": {}, **state})

    def __repr__(self) -> str:
        inner = "\n    ".join(repr(self.optimizer).splitlines())
        return f"{type(self).__name__}(\n    {inner}\n)"


def layers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """An optimizer with what it is wrapped round, the outermost first. Wrappers of other libraries are not known here.

    >>> import torch, piste
    >>> from piste.wrappers.base import layers
    >>> optimizer = piste.create("sam+lookahead+sgd", torch.nn.Linear(2, 1), lr=0.1)
    >>> [type(layer).__name__ for layer in layers(optimizer)]
    ['SAM', 'Lookahead', 'SGD']
    """
    found = [optimizer]
    while isinstance(found[-1], Wrapper):
        found.append(found[-1].optimizer)
    return found
