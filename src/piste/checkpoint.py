"""Loading an optimizer's state: everything is checked before anything is changed, and nothing is cast.

torch's own loader casts every tensor to the dtype of its weight, which ruins float32 moments of bfloat16 weights and
any encoded state. Here tensors keep the dtype they were saved with and only move to the weight's device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from piste.checks import near
from piste.storage import State, shape_of

__all__ = ["after_loading", "before_loading", "check_tensor", "matched", "weights_by_id"]

StatesOf = Callable[[Mapping[str, Any]], Mapping[str, State]]


def before_loading(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary to load, after torch's hooks and checked to be one of an optimizer."""
    saved = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        saved = hook(optimizer, saved) or saved
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"state_dict has no {key!r}; it is not what an optimizer's state_dict() returns")
    return saved


def after_loading(optimizer: torch.optim.Optimizer) -> None:
    """Run torch's hooks."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def matched(
    groups: Sequence[dict[str, Any]], saved: Mapping[str, Any], states_of: StatesOf, real: Callable[[Tensor], Tensor]
) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]:
    """New state and groups for an optimizer with these groups, from a saved dictionary.

    Args:
        groups: the optimizer's groups.
        saved: what ``state_dict()`` gave.
        states_of: the states that the rule of a group may keep.
        real: the view of a weight that states are shaped after.

    Raises:
        ValueError: the dictionary is not one of an optimizer of this kind over these weights.
    """
    saved_groups = saved["param_groups"]
    weights = weights_by_id(groups, saved_groups)
    home = {id(p): group for group, new in zip(saved_groups, groups, strict=True) for p in new["params"]}

    state: dict[Tensor, dict[str, Any]] = {}
    for key, entries in saved["state"].items():
        if key not in weights:
            raise ValueError(f"state_dict has state for parameter {key!r}, which is in none of its groups")
        weight, name = weights[key]
        state[weight] = _entries(entries, name, real(weight), states_of(home[id(weight)]))
    return state, [_group(group, new) for group, new in zip(groups, saved_groups, strict=True)]


def weights_by_id(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> dict[Any, tuple[Tensor, str]]:
    """Saved parameter number -> the weight here, with a name for messages: by name where both sides have names."""
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict has {len(saved_groups)} parameter groups, this optimizer has {len(groups)}")
    named = all("param_names" in group for group in (*groups, *saved_groups))
    if named:
        here = {n: p for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)}
        there = {n: i for group in saved_groups for n, i in zip(group["param_names"], group["params"], strict=True)}
        for name in there:
            if name not in here:
                raise ValueError(f"state_dict has a parameter {name!r} that this optimizer has not{near(name, here)}")
        for name in here:
            if name not in there:
                raise ValueError(f"state_dict lacks the parameter {name!r}{near(name, there)}")
        return {number: (here[name], repr(name)) for name, number in there.items()}
    found = {}
    for index, (group, old) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(old["params"]):
            raise ValueError(
                f"group {index} of state_dict has {len(old['params'])} parameters, here it has {len(group['params'])}"
            )
        for position, (p, number) in enumerate(zip(group["params"], old["params"], strict=True)):
            found[number] = p, f"{position} of group {index}"
    return found


def _entries(entries: Mapping[str, Any], name: str, weight: Tensor, states: Mapping[str, State]) -> dict[str, Any]:
    """One weight's state, checked and copied."""
    found: dict[str, Any] = {}
    for key, value in entries.items():
        if key == "step":
            count = value.item() if isinstance(value, Tensor) else value
            if isinstance(count, bool) or count != int(count) or count < 0:
                raise ValueError(f"state 'step' of parameter {name} is {value!r}; legal: a whole number >= 0")
            found[key] = int(count)
        elif key not in states:
            legal = ", ".join(["step", *states])
            raise ValueError(
                f"parameter {name} has a state {key!r} that this optimizer does not keep; it keeps: {legal}"
            )
        else:
            found[key] = check_tensor(value, key, name, states[key], weight)
    return found


def check_tensor(value: Any, key: str, name: str, state: State, weight: Tensor) -> Tensor:
    """A saved tensor, if it has the shape it should have, copied to the weight's device in its own dtype."""
    expected = shape_of(state.kind_of(weight.ndim), weight)
    if not isinstance(value, Tensor) or (expected is not None and tuple(value.shape) != expected):
        had = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"state {key!r} of parameter {name} has shape {had}; expected {expected}")
    return value.detach().to(device=weight.device, copy=True)


def _group(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved settings over the weights that are here; settings that the saved group lacks stay as they are."""
    names = {"param_names": group["param_names"]} if "param_names" in group else {}
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
    return {**group, **copied, "params": group["params"], **names}
