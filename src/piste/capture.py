"""``capturable=True``: what a step has to be like so that a CUDA graph can record it, and who is refused.

:mod:`piste.selects` traces such a step and :mod:`piste.device_numbers` keeps its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from piste.sharding import is_sharded
from piste.symbol import topological
from piste.variants import Graph

__all__ = [
    "check_engine",
    "check_group",
    "loaded_in_place",
    "on_device",
    "place_numbers",
    "refuse_missing",
    "refuse_opaque",
    "saved",
]

#: what can be done about an optimizer that decides on the host
_INSTEAD = "legal: False, and a graph of the forward and the backward pass alone, with step() after each of its replays"

#: the numbers of a group that are put on the device; others may be given as tensors
PLACED = ("lr", "weight_decay")


def check_engine(owner: str, engine: str, nonfinite: str) -> None:
    """Refuse options that have the host decide in every step."""
    if engine == "compile":
        raise ValueError(
            f"{owner} got capturable=True with engine='compile', which sends numbers from the host in every step; "
            "legal: 'auto', 'triton', 'foreach', 'reference', 'cpp'"
        )
    if nonfinite != "ignore":
        raise ValueError(
            f"{owner} got capturable=True with nonfinite={nonfinite!r}, which waits for the device to look at the "
            "gradients; legal: 'ignore', or torch.amp.GradScaler, whose found_inf is heeded on the device"
        )


def check_group(owner: str, group: Mapping[str, Any], *, numbers_on_host: bool) -> None:
    """Refuse weights and settings of a group whose step cannot be recorded."""
    if numbers_on_host:
        raise ValueError(
            f"{owner} got capturable=True, and works out numbers of its groups on the host in every step (a schedule "
            f"of its own, a running average, an estimate); {_INSTEAD}"
        )
    for p in group["params"]:
        if is_sharded(p):
            raise ValueError(
                f"{owner} got capturable=True for a sharded weight; legal: False, or weights that are whole"
            )
        if p.device.type not in ("cuda", "cpu"):
            raise ValueError(
                f"{owner} got capturable=True for a weight on {str(p.device)!r}; legal: weights on CUDA devices (or on "
                "the CPU, where the step is worked out in the same way and nothing records it)"
            )
    placed = {p.device.type for p in group["params"]}
    for name, value in _tensors(group):
        if placed != {value.device.type}:
            raise ValueError(
                f"{owner} got {name} as a tensor on {str(value.device)!r} with capturable=True; legal: a number, or a "
                f"tensor on {', '.join(sorted(placed))} as the weights are"
            )


def refuse_opaque(owner: str, graph: Graph) -> None:
    """Refuse a rule with functions of whole matrices that wait for the device, or take numbers of the step."""
    for sym in topological(graph.outputs.values()):
        if sym.op == "opaque":
            work = sym.attr[0]
            if not getattr(work, "recordable", False) or any(a.op == "number" for a in sym.args):
                function = getattr(work, "call", work)
                while hasattr(function, "func"):
                    function = function.func
                raise ValueError(
                    f"{owner} got capturable=True, and its rule calls {function.__name__!r}, a function of whole "
                    f"matrices that decides on the host; {_INSTEAD}"
                )


def place_numbers(group: dict[str, Any]) -> None:
    """Make the learning rate and the decay tensors on the device of the weights, which schedules fill."""
    device = next((p.device for p in group["params"]), None)
    for name in PLACED:
        value = group.get(name)
        if device is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            group[name] = torch.tensor(float(value), dtype=torch.float64, device=device)


def saved(packed: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary with Python's numbers in the place of those on the device."""
    state = {
        number: {**entries, "step": int(entries["step"])} if "step" in entries else entries
        for number, entries in packed["state"].items()
    }
    return {**packed, "state": state, "param_groups": [_plain_numbers(group) for group in packed["param_groups"]]}


def loaded_in_place(
    state: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    loaded: Mapping[Tensor, dict[str, Any]],
    new_groups: Sequence[dict[str, Any]],
) -> None:
    """Put what was loaded into the tensors that are there, so that a step recorded before goes on from it.

    Args:
        state: the states that are there.
        groups: the groups that are there.
        loaded: states to load; what fits is written and exchanged for the tensor it was written to.
        new_groups: their groups.
    """
    for own, new in [
        *((state.get(p, {}), entries) for p, entries in loaded.items()),
        *zip(groups, new_groups, strict=True),
    ]:
        for name, value in new.items():
            here = own.get(name)
            if not isinstance(here, Tensor):
                continue
            if isinstance(value, Tensor) and (value.shape, value.dtype) == (here.shape, here.dtype):
                new[name] = here.copy_(value)
            elif isinstance(value, (int, float)) and not here.ndim:
                new[name] = here.fill_(value)


def _plain_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with Python's numbers in the place of tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return float(value)
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else value

    return {name: value if name in ("params", "param_names") else plain(value) for name, value in group.items()}


def on_device(hp: Mapping[str, Any]) -> frozenset[str]:
    """The hyper-parameters, of a group's numbers, that are tensors."""
    return frozenset(name for name, value in hp.items() if isinstance(value, Tensor))


def refuse_missing(owner: str, missing: Iterable[str]) -> None:
    """Refuse a step in which weights that are trained have no gradient."""
    names = list(missing)
    if names:
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        raise ValueError(
            f"{owner} with capturable=True has no gradient for {len(names)} weights ({shown}): a recorded step cannot "
            "tell when one arrives; legal: a gradient for every weight (zeros count), or requires_grad=False"
        )


def _tensors(group: Mapping[str, Any]) -> Sequence[tuple[str, Tensor]]:
    found = []
    for name, value in group.items():
        if name != "params":
            inside = value if isinstance(value, (tuple, list)) else (value,)
            found += [(name, x) for x in inside if isinstance(x, Tensor)]
    return found
