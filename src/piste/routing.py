"""Which weights of a model are matrices for Muon, and which go to the rule beside it.

Decided by what a weight is: the type of the module that owns it, whether it is tied to an embedding, and for the head,
which no type tells from other layers, by its place at the end of the model. Where that tells nothing, nothing is
guessed: the caller is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from piste.groups import (
    CONTAINERS,
    TRANSPOSED,
    ModelWeight,
    check_types,
    groups_table,
    is_norm,
    model_weights,
    owned_by,
    param_groups,
    split_groups,
)

__all__ = ["matrix_groups"]

log = logging.getLogger("piste")

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DENSE = (nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
#: how many matrices one weight holds, one below the other: gates; queries, keys and values
_GATES: tuple[tuple[type[nn.Module], int], ...] = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))


class _Route(NamedTuple):
    """What becomes of one weight."""

    rule: str
    split: int = 1
    transposed: bool = False


def matrix_groups(
    owner: str,
    model: nn.Module,
    groups: Iterable[dict[str, Any]] | None,
    *,
    heads: Sequence[str] | None,
    aux: Sequence[type[nn.Module]],
    matrices: Sequence[type[nn.Module]],
    aux_lr: float | None,
    table: Callable[[str], object] | None,
) -> list[dict[str, Any]]:
    """Groups with ``"rule"``, ``"split"`` and ``"transposed"``; see :meth:`piste.Muon.groups`, whose owner it names."""
    check_types("aux", aux)
    check_types("matrices", matrices)
    weights = model_weights(model)
    dense = (*_DENSE, *matrices)
    eligible = [w for w in weights if _is_matrix(w, dense, tuple(aux))]
    ends = _heads(owner, model, weights, eligible, heads)
    routes = {id(w.tensor): _route(w) for w in eligible if w.name not in ends}
    _tell_of_strangers(owner, weights, eligible, tuple(aux))

    def settings(tensor: Tensor) -> dict[str, Any]:
        route = routes.get(id(tensor), _Route("adamw"))
        rate = {} if aux_lr is None or route.rule == "muon" else {"lr": aux_lr}
        return {**route._asdict(), **rate}

    found = split_groups(param_groups(model) if groups is None else groups, settings)
    if table is not None:
        table(groups_table(found))
    return found


def _is_matrix(weight: ModelWeight, dense: tuple[type[nn.Module], ...], aux: tuple[type[nn.Module], ...]) -> bool:
    if weight.tensor.ndim < 2 or owned_by(weight, (*_EMBEDDINGS, *aux)) or any(map(is_norm, weight.owners)):
        return False
    is_vector = weight.tensor.shape[0] == 1 and owned_by(weight, (nn.MultiheadAttention,))  # bias_k and bias_v
    return not is_vector and owned_by(weight, (*dense, *_CONVOLUTIONS, *TRANSPOSED))


def _route(weight: ModelWeight) -> _Route:
    owner, rows = weight.owners[0], weight.tensor.shape[0]
    if isinstance(owner, (*_CONVOLUTIONS, *TRANSPOSED)):
        return _Route("muon", owner.groups, isinstance(owner, TRANSPOSED))
    for kind, count in _GATES:
        if isinstance(owner, kind) and rows == count * int(owner.hidden_size):  # type: ignore[arg-type]
            return _Route("muon", count)
    fused = isinstance(owner, nn.MultiheadAttention) and weight.tensor is owner.in_proj_weight
    return _Route("muon", 3 if fused else 1)


def _heads(
    owner: str, model: nn.Module, weights: list[ModelWeight], eligible: list[ModelWeight], heads: Sequence[str] | None
) -> set[str]:
    """The names of the weights that make predictions."""
    if heads is not None:
        return set().union(*(_named(owner, weights, name) for name in heads))
    tied = any(owned_by(w, _EMBEDDINGS) and not all(isinstance(o, _EMBEDDINGS) for o in w.owners) for w in weights)
    if tied or not eligible:
        return set()
    last = eligible[-1]
    if _in_repeated_block(model, last.name):
        raise ValueError(
            f"{owner}.groups cannot tell which layer makes predictions: the last matrix, {last.name!r}, is in one of "
            "several blocks or layers alike; legal: heads= with the names of such layers, heads=() where there are none"
        )
    return {last.name}


def _named(owner: str, weights: list[ModelWeight], name: str) -> set[str]:
    found = {w.name for w in weights if w.name == name or w.name.startswith(f"{name}.")}
    if not found:
        raise ValueError(f"{owner}.groups got heads={name!r}; legal: names of layers or weights of the model")
    return found


def _in_repeated_block(model: nn.Module, name: str) -> bool:
    """Does the layer of this weight, or a block that it is in, stand in a row of others of its type?

    In a ``Sequential`` the last layer is the last one to run; in a list or dictionary nobody can tell.
    """
    path = name.split(".")[:-1]
    module = model
    for depth, step in enumerate(path):
        child: nn.Module = getattr(module, step)
        alike = [other for other in module.children() if type(other) is type(child)]
        chained = isinstance(module, nn.Sequential) and depth + 1 == len(path)
        if isinstance(module, CONTAINERS) and len(alike) > 1 and not chained:
            return True
        module = child
    return False


def _tell_of_strangers(
    owner: str, weights: list[ModelWeight], eligible: list[ModelWeight], aux: tuple[type[nn.Module], ...]
) -> None:
    """Say once which weights of several axes go to AdamW only because nothing is known of their modules."""
    known = {id(w.tensor) for w in eligible}
    strange = [
        w
        for w in weights
        if w.tensor.ndim > 1
        and id(w.tensor) not in known
        and not owned_by(w, (*_EMBEDDINGS, *aux, nn.MultiheadAttention))
        and not any(map(is_norm, w.owners))
    ]
    if strange:
        types = ", ".join(sorted({type(w.owners[0]).__name__ for w in strange}))
        log.warning(
            "%s.groups: %d weights of modules that it does not know (%s) go to AdamW; matrices=(...) names those whose "
            "weights are matrices, aux=(...) those that belong there",
            owner, len(strange), types,
        )  # fmt: skip
