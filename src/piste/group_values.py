"""Parameter groups as they are given, and their values apart: flags that choose parts, and numbers that parts read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Flags", "Number", "listed", "split"]


def listed(owner: str, params: Any) -> list[dict[str, Any]]:
    """Parameters in any accepted form as groups, none of them empty or repeated."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            f"{owner} got params={type(params).__name__}; legal: an iterable of tensors, pairs or groups, such as "
            "model.parameters(), model.named_parameters() or piste.param_groups(model)"
        )
    entries = list(params)
    if not entries:
        raise ValueError(f"{owner} got an empty parameter list in params; legal: at least one tensor")
    groups = [dict(e) for e in entries] if isinstance(entries[0], dict) else [{"params": entries}]
    seen: set[int] = set()
    for index, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"group {index} has no 'params'")
        if isinstance(group["params"], set):
            raise TypeError("optimizer parameters need to be organized in ordered collections; params is a set")
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = members
        for position, member in enumerate(members):
            tensor = member[1] if isinstance(member, tuple) and len(member) == 2 else member
            if not isinstance(tensor, Tensor):
                raise TypeError(f"parameter {position} of group {index} is a {type(member).__name__}; legal: tensors")
            if id(tensor) in seen:
                raise ValueError(f"parameter {position} of group {index} is a duplicate: it was given before")
            seen.add(id(tensor))
    return groups


class _Number:
    """Stands for a number in the group that :meth:`Optimizer.pipeline` sees: it is there, and says no more."""

    def __bool__(self) -> bool:
        raise TypeError("a number of the group decides nothing in pipeline(); branch on it inside a part")

    def __repr__(self) -> str:
        return "Number"


Number = _Number()


class Flags(dict[str, Any]):
    """A group as :meth:`Optimizer.pipeline` sees it."""


def split(
    group: Mapping[str, Any], known: Iterable[str], shaping: Sequence[str], *, device: bool = False
) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """The flags of a group, and its numbers as host numbers: ``betas`` become ``beta1`` and ``beta2``.

    Tensors stay on the ``device`` or become numbers.
    """

    def number(value: Any) -> Any:
        return value.detach() if device and isinstance(value, Tensor) else float(value)

    statics: list[tuple[str, Any]] = []
    numbers: dict[str, Any] = {}
    for name in known:
        value = group[name]
        if value is None or isinstance(value, (bool, str)) or name in shaping:
            statics.append((name, value))
        elif isinstance(value, (tuple, list)):
            statics.append((name, Number))
            for i, x in enumerate(value):
                numbers[f"{name.removesuffix('s')}{i + 1}"] = number(x)
        else:
            statics.append((name, Number))
            numbers[name] = number(value)
    return tuple(statics), numbers
