"""What an optimizer costs: on a model, worked out without the model's memory; and per weight, measured."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from piste import execution, optimizers
from piste.bucket import Bucket, beside
from piste.factory import create
from piste.matrices import Work
from piste.optimizer import Optimizer
from piste.plan import Stage
from piste.registry import preset_of
from piste.storage import shape_of
from piste.symbol import ALL, MATRIX, Sym
from piste.wrappers.base import Wrapper, layers
from piste.wrappings import WRAPPINGS

__all__ = ["MemoryEstimate", "estimate_memory", "state_bytes"]

#: steps until every state exists (past every rectification and the first synchronisation), and as many as most periods
#: (Lookahead's 5 and 6 among them) go into
_FIRST, _PERIOD = 8, 60
#: numbers of one argument in a stack that a function of whole matrices gets on CPUs
_STACKED = 1 << 18


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training a model takes.

    Args:
        optimizer: name of the preset.
        precision: how moments are stored.
        parameters: numbers that are trained.
        weights: of all parameters and buffers.
        gradients: of the parameters that are trained.
        state: of the optimizer, for good.
        matrices: what of it belongs to whole matrices: factors, inverse roots, eigenbases.
        extra: buffers of the optimizer for the length of a step, the largest there is.
        workspace: what of them is held by functions of whole matrices: roots, bases, orthogonal iterations.
        moved: read and written by a step, on average.

    >>> import torch, piste
    >>> cost = piste.estimate_memory(torch.nn.Linear(100, 100, bias=False), "lion")
    >>> cost.weights, cost.gradients, cost.state, cost.peak
    (40000, 40000, 40000, 120000)
    """

    optimizer: str
    precision: str
    parameters: int
    weights: int
    gradients: int
    state: int
    matrices: int
    extra: int
    workspace: int
    moved: float

    @property
    def peak(self) -> int:
        """At the height of a step; activations are gone by then."""
        return self.weights + self.gradients + self.state + self.extra


def estimate_memory(
    model: nn.Module, optimizer: str, *, state: str = "fp32", weights: str = "plain", **overrides: Any
) -> MemoryEstimate:
    """What an optimizer costs on a model. Nothing is run and nothing of the model's size is allocated.

    Args:
        model: may be on the meta device (``with torch.device("meta"): model = Net()``), and is not changed.
        optimizer: a preset, as :func:`piste.create` takes it, with wrappers before it or without.
        state: how moments are stored.
        weights: what bfloat16 weights stand for.
        **overrides: as for :func:`piste.create`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: as :func:`piste.create`; or the preset's class is none of piste, or a wrapper needs something of the
            data (ESAM, SAF, MESA).

    State is what the optimizer will hold from step to step, to the byte: the copies of weights between the two passes
    of SAM, whose buffers stay, are in it. Traffic and buffers are those of the engines that work
    stage by stage in one pass (cpp); ``foreach`` moves more and decodes codes of a whole bucket at a time. Buffers of
    the matrix optimizers are those of the step that renews roots or bases, to about a quarter, as seen on CPUs.
    Activations are the model's business: they are not in it, and at the time of a step they are gone.

    >>> import torch, piste
    >>> with torch.device("meta"):
    ...     model = torch.nn.Linear(2**17, 2**17, bias=False)
    >>> cost = piste.estimate_memory(model, "adamw", state="8bit")
    >>> cost.state / cost.parameters, cost.moved / cost.parameters
    (2.046875, 16.09375)
    """
    for wrapping in preset_of(optimizer).wrappings:
        if WRAPPINGS[wrapping].needs:
            raise ValueError(
                f"optimizer={optimizer!r} needs {WRAPPINGS[wrapping].needs}, of which a model's shapes tell nothing; "
                "legal: what is inside, and wrappers that need nothing of the data"
            )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; legal: an instance of nn.Module")
    twin = _without_memory(model)
    made = create(optimizer, twin, state=state, weights=weights, **overrides)
    inner = layers(made)[-1]
    if not isinstance(inner, Optimizer):
        raise ValueError(
            f"optimizer={optimizer!r} is of {type(inner).__module__}; legal: presets of piste's own classes"
        )
    trained = [p for group in made.param_groups for p in group["params"]]
    seen = _Seen()
    with execution.only_looked_at(seen.look):
        for number in range(_FIRST + _PERIOD):
            seen.begin(counts=number >= _FIRST)
            seen.copied(_bytes(_step_with(made, trained, torch.empty_like)))
    return MemoryEstimate(
        optimizer=optimizer,
        precision=state,
        parameters=sum(p.numel() for p in trained),
        weights=_bytes((*twin.parameters(), *twin.buffers())),
        gradients=_bytes(trained),
        state=_bytes(_kept(made)),
        matrices=_bytes(seen.matrices.values()),
        extra=seen.extra,
        workspace=seen.workspace,
        moved=seen.moved / _PERIOD,
    )


def state_bytes(name: str, shape: tuple[int, ...] = (256, 256), state: str = "fp32") -> float:
    """Bytes of state per weight that a preset keeps, measured: by taking steps on a float32 weight.

    Args:
        name: of a preset, as :func:`piste.create` takes it. A wrapper's tensors count, the copies of weights between
            the two passes of SAM among them.
        shape: of the weight. Rules that keep rows and columns keep less the larger it is.
        state: how moments are stored: "fp32", "bf16", "8bit" or "4bit".

    Raises:
        ValueError: there is no such preset, or its rule keeps no moments that could be stored so; or its wrapper needs
            more than weights (SAF, MESA).

    Not the memory of training: weights, gradients and what a step needs for a moment come on top.

    >>> import piste
    >>> piste.state_bytes("adamw"), piste.state_bytes("ranger"), piste.state_bytes("adamw", state="8bit")
    (8.0, 12.0, 2.046875)
    """
    weight = nn.Parameter(torch.ones(shape))
    of_matrices = issubclass(preset_of(name).optimizer, optimizers.Muon)
    group = {"params": [weight], **({"rule": "muon"} if of_matrices and weight.ndim > 1 else {})}
    optimizer = create(name, [group], weight_decay=0.0, engine="reference", state=state)
    for _ in range(_FIRST):
        _step_with(optimizer, [weight], torch.ones_like)
    saved = (x for entries in optimizer.state_dict()["state"].values() for x in entries.values())
    kept = [x for x in (*saved, *getattr(optimizer, "buffers", lambda: ())()) if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in kept) / weight.numel()


def _step_with(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], gradient: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Take a step, of two passes where it has to be, on made-up gradients; the copies held between the passes."""
    for p in weights:
        p.grad = gradient(p)
    copies: list[Tensor] = []
    if getattr(optimizer, "needs_two_passes", False):
        optimizer.first_step()  # type: ignore[attr-defined]
        copies = optimizer.copies  # type: ignore[attr-defined]
        for p in weights:
            p.grad = gradient(p)
    optimizer.step()
    return copies


class _Seen:
    """What steps were seen to hold and to move."""

    def __init__(self) -> None:
        self.moved = self.extra = self.workspace = 0
        self.matrices: dict[int, Tensor] = {}
        self._counts = False

    def begin(self, *, counts: bool) -> None:
        """Before a step, whose traffic counts or not."""
        self._counts = counts

    def copied(self, copies: int) -> None:
        """Of so many bytes, which were made of the weights and went back: each read and written twice."""
        self.moved += 4 * copies if self._counts else 0

    def look(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            self.matrices.update((id(x), x) for states in _matrices(bucket) for x in states)
        works = [_workspace(bucket) for bucket in buckets]
        held = sum(map(_extra, buckets)) + max(works, default=0)
        if held > self.extra:
            self.extra, self.workspace = held, max(works)
        if self._counts:
            self.moved += sum(map(_moved, buckets))


def _kept(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer holds for good, with its wrappers' own: each tensor once."""
    wrappers = [layer for layer in layers(optimizer) if isinstance(layer, Wrapper)]
    entries = [*optimizer.state.values(), *(own for wrapper in wrappers for own in wrapper.own.values())]
    held = [*(x for one in entries for x in one.values()), *(x for outer in wrappers[:1] for x in outer.buffers())]
    return list({id(x): x for x in held if isinstance(x, Tensor)}.values())


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes and nothing else."""
    empty: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, empty)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _homes(stage: Stage) -> Iterator[str]:
    """What a stage reads, and what it writes."""
    yield from dict.fromkeys(home for home in stage.loads.values() if home != "value")
    yield from stage.writes


def _moved(bucket: Bucket) -> int:
    """Bytes that the stages of a bucket read and write."""
    total = 0
    for stage in bucket.plan.stages:
        for home in _homes(stage):
            total += _bytes(bucket.homes[home]) + _bytes(bucket.homes.get(beside(home), ()))
        values = [sym for sym, home in stage.loads.items() if home == "value"]
        total += sum(_size(bucket, sym) for sym in (*values, *_left(stage)))
    return total


def _extra(bucket: Bucket) -> int:
    """Bytes of what a plan keeps between its stages."""
    return sum(_size(bucket, sym) for stage in bucket.plan.stages for sym in _left(stage))


def _left(stage: Stage) -> list[Sym]:
    """What a stage, and the opaque functions after it, leave in buffers that were not there before."""
    kept = [sym for sym in stage.kept if not _stays(stage, sym)]
    return [*kept, *stage.partials, *stage.opaques]


def _stays(stage: Stage, sym: Sym) -> bool:
    """Is it looked at where it is: in its buffer already, or a matrix that does not change in this stage?"""
    home = stage.loads.get(sym, "")
    return home == "value" or (sym.kind == MATRIX and home != "" and home not in stage.writes)


def _size(bucket: Bucket, sym: Sym) -> int:
    """Bytes of a value of all weights in the precision of the arithmetic."""
    if sym.kind == MATRIX:
        count = sum(_numbers_of_matrices(bucket))
    elif sym.kind == ALL:
        count = 1
    else:
        count = sum(prod(shape_of(sym.kind, p) or ()) for p in bucket.homes["p"])
    return count * bucket.dtype.itemsize


def _matrices(bucket: Bucket) -> list[list[Tensor]]:
    """The states that belong to whole matrices, each for all weights."""
    homes: dict[str, None] = {}
    for stage in bucket.plan.stages:
        kinds = [(home, sym.kind) for sym, home in stage.loads.items() if home != "value"]
        kinds += [(home, sym.kind) for home, sym in stage.writes.items()]
        homes.update(dict.fromkeys(home for home, kind in kinds if kind == MATRIX))
    return [bucket.homes[home] for home in homes]


def _numbers_of_matrices(bucket: Bucket) -> list[int]:
    """For each weight, how many numbers a value of its matrices has: as many as its largest state."""
    return [max(x.numel() for x in states) for states in zip(*_matrices(bucket), strict=True)]


def _workspace(bucket: Bucket) -> int:
    """Bytes that functions of whole matrices hold while they run, the most of all of them."""
    functions = [o.attr[0] for stage in bucket.plan.stages for o in stage.opaques]
    if not functions:
        return 0
    numbers = _numbers_of_matrices(bucket) or [0] * len(bucket)
    most = 0
    for shape, count in Counter(bucket.seats.shapes).items():
        i = bucket.seats.shapes.index(shape)
        stacked = min(count, max(1, _STACKED // max(1, prod(shape), numbers[i])))
        plain = 2 * stacked * prod(shape)  # blocks, and a product on its way
        held = (f.held(shape, stacked) if isinstance(f, Work) else plain for f in functions)
        most = max(most, *held)
    return most * bucket.dtype.itemsize
