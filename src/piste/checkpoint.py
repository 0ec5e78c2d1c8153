"""Loading an optimizer's state: everything is checked before anything is changed, and nothing is cast.

torch's own loader casts every tensor to the dtype of its weight, which ruins float32 moments of bfloat16 weights and
any encoded state. Here tensors, codes and scales keep the dtype they were saved with and only move to the weight's
device; unless another format is asked for: then they are decoded and stored anew, rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.checks import kind_of, near
from piste.codecs import Codec
from piste.coding import fresh
from piste.sharding import matching
from piste.storage import State, allocate, codec_for, companion, in_codes, out_of_codes, shape_of, weight_codec
from piste.symbol import FULL, MATRIX

__all__ = ["after_loading", "before_loading", "check_tensor", "for_torch", "matched", "weights_by_id"]

StatesOf = Callable[[Mapping[str, Any]], Mapping[str, State]]


def before_loading(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary to load, after torch's hooks and checked to be one of an optimizer."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {kind_of(state_dict)}; legal: what an optimizer's state_dict() returns")
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
    groups: Sequence[dict[str, Any]],
    saved: Mapping[str, Any],
    states_of: StatesOf,
    real: Callable[[Tensor], Tensor],
    forms: Sequence[str | None],
    names: Mapping[str, str],
) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]:
    """New state and groups for an optimizer with these groups, from a saved dictionary.

    Args:
        groups: the optimizer's groups.
        saved: what ``state_dict()`` gave.
        states_of: the states that the rule of a group may keep.
        real: the view of a weight that states are shaped after.
        forms: by group, the format that states are to have; None for that in which they were saved.
        names: what others call states, with what they are called here.

    Raises:
        ValueError: the dictionary is not one of an optimizer of this kind over these weights.
    """
    saved_groups = saved["param_groups"]
    weights = weights_by_id(groups, saved_groups)
    merged = [_group(group, new, form) for group, new, form in zip(groups, saved_groups, forms, strict=True)]
    home = {id(p): i for i, group in enumerate(groups) for p in group["params"]}

    state: dict[Tensor, dict[str, Any]] = {}
    for key, entries in saved["state"].items():
        if key not in weights:
            raise ValueError(f"state_dict has state for parameter {key!r}, which is in none of its groups")
        weight, name = weights[key]
        index = home[id(weight)]
        here = {names.get(k, k): v for k, v in entries.items()}
        reader = _Reader(name, real(weight), states_of(merged[index]), saved_groups[index].get("state", "fp32"))
        state[weight] = reader.entries(here, merged[index]["state"], merged[index]["weights"])
    return state, merged


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


class _Reader(NamedTuple):
    """Reads the saved entries of one weight."""

    name: str
    weight: Tensor
    states: Mapping[str, State]
    saved_form: str

    def entries(self, saved: Mapping[str, Any], form: str, weights: str) -> dict[str, Any]:
        """The weight's state in these formats, checked and copied."""
        beside = {companion(key) for key in self.states if self.codec(key, self.saved_form) is not None}
        own = weight_codec(self.weight, weights)
        legal = {"step", *self.states, *beside, *([companion("p")] if own is not None and own.rest else [])}
        found: dict[str, Any] = {}
        for key, value in saved.items():
            if key not in legal:
                kept = ", ".join(["step", *self.states])
                raise ValueError(
                    f"parameter {self.name} has a state {key!r} that this optimizer does not keep; it keeps: {kept}"
                )
            if key == "step":
                found[key] = _count(value, self.name)
            elif key == companion("p") and own is not None:
                found[key] = _copied(value, key, self.name, self.weight, *_expected(own, self.weight)[1])
            elif key in self.states:
                found |= self.state(key, saved, form)
        return found

    def codec(self, key: str, form: str) -> Codec | None:
        return codec_for(self.states[key], self.weight, form)

    def state(self, key: str, saved: Mapping[str, Any], form: str) -> dict[str, Tensor]:
        """One state with what goes with it, in this format."""
        before, after = self.codec(key, self.saved_form), self.codec(key, form)
        if before is None:
            numbers = check_tensor(saved[key], key, self.name, self.states[key], self.weight)
            kept = {key: numbers}
        else:
            kept = self.codes(key, saved, before)
            numbers = kept[key]
        if before == after:
            return kept
        if before is not None:
            numbers = out_of_codes(key, before, kept, self.weight)
        return {key: numbers} if after is None else in_codes(key, after, self.weight, numbers)

    def codes(self, key: str, saved: Mapping[str, Any], codec: Codec) -> dict[str, Tensor]:
        """Codes and scales as they are."""
        beside, (main, second) = companion(key), _expected(codec, self.weight)
        found = {key: _copied(saved[key], key, self.name, self.weight, *main)}
        if second is not None:
            if beside not in saved:
                raise ValueError(f"state {key!r} of parameter {self.name} is in codes, and {beside!r} is missing")
            found[beside] = _copied(saved[beside], beside, self.name, self.weight, *second)
        return found


def _count(value: Any, name: str) -> int:
    count = value.item() if isinstance(value, Tensor) else value
    if isinstance(count, bool) or count != int(count) or count < 0:
        raise ValueError(f"state 'step' of parameter {name} is {value!r}; legal: a whole number >= 0")
    return int(count)


def _expected(codec: Codec, weight: Tensor) -> tuple[Any, Any]:
    """Shape and dtype of the tensors of a codec."""
    codes, rest = fresh(codec, torch.empty(weight.shape, device="meta"))
    return (tuple(codes.shape), codes.dtype), None if rest is None else (tuple(rest.shape), rest.dtype)


def _copied(value: Any, key: str, name: str, weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A saved tensor, if it has this shape and dtype, copied to the weight's device."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        had = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"state {key!r} of parameter {name} is {had}; expected {dtype} of {shape}")
    return matching(value.detach().to(device=weight.device, copy=True).contiguous(), weight)


def check_tensor(value: Any, key: str, name: str, state: State, weight: Tensor) -> Tensor:
    """A saved tensor, if it has the shape it should have, copied to the weight's device in its own dtype."""
    kind = state.kind_of(weight.ndim)
    expected = shape_of(kind, weight)
    if expected is None:
        expected = tuple(allocate(state, torch.empty(weight.shape, device="meta")).shape)
    if not isinstance(value, Tensor) or tuple(value.shape) != expected:
        had = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"state {key!r} of parameter {name} has shape {had}; expected {expected}")
    copied = value.detach().to(device=weight.device, copy=True)
    if kind == MATRIX:  # the next step brings it to the process that works on it
        return copied
    return matching(copied, weight, None if kind == FULL else kind.keep)


def for_torch(
    packed: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    theirs: Mapping[str, Any],
    names: Mapping[str, str],
    states_of: StatesOf,
) -> dict[str, Any]:
    """A state dictionary of ours as one of ``torch.optim``.

    Args:
        packed: ours.
        groups: the groups it was made of.
        theirs: the settings that torch's class has, with its defaults.
        names: what torch calls states, with what we call them.
        states_of: the states that the rule of a group may keep.
    """
    state: dict[Any, dict[str, Any]] = {}
    for group, saved in zip(groups, packed["param_groups"], strict=True):
        states = states_of(group)
        for weight, number in zip(group["params"], saved["params"], strict=True):
            entries = packed["state"].get(number)
            if entries:
                found = {"step": torch.tensor(float(entries["step"]))}
                for other, own in names.items():
                    if own in entries:
                        codec = codec_for(states[own], weight, group["state"])
                        found[other] = (
                            entries[own].clone() if codec is None else out_of_codes(own, codec, entries, weight)
                        )
                state[number] = found
    kept = ("params", "param_names", "initial_lr", *theirs)
    settings = [{**theirs, **{k: v for k, v in saved.items() if k in kept}} for saved in packed["param_groups"]]
    return {"state": state, "param_groups": settings}


def _group(group: Mapping[str, Any], saved: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    """The saved settings over the weights that are here; settings that the saved group lacks stay as they are."""
    names = {"param_names": group["param_names"]} if "param_names" in group else {}
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
    asked = {} if form is None else {"state": form}
    return {**group, **copied, "params": group["params"], **names, **asked}
