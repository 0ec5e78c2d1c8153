"""The slots of an optimizer's step, and the pipeline that fills them.

===============  ====================  ================================================================
slot             turns                 for instance
===============  ====================  ================================================================
``prepare``      g -> g                centralization, clipping, L2
``direction``    g, states -> d        sgd, adam, adabelief
``scale``        d -> d                trust ratio, rectified step, decay inside the direction
``decay``        p -> p                decoupled decay
``apply``        p, d, lr -> p         plain subtraction
``after``        p, states -> p        Lookahead
``update``       g, p, states -> p     rules whose paper couples direction, scale and apply
``instead``      p, d, states -> p     what a wrapper does with the change ``d`` of the weight, not adding it
===============  ====================  ================================================================

A part is a function marked with the slot it fills. It names what it wants to see, out of ``g`` (gradient), ``d``
(direction), ``p`` (weight), ``st`` (its own states), ``new`` (states as parts before it have left them), ``hp``
(hyper-parameters), ``t`` (this weight's own step number, from 1), ``ndim`` and ``shape``; and returns its new value,
with a dictionary of new states if it keeps any::

    @direction(m=moment)
    def momentum(g, st, hp):
        m = hp.beta * st.m + g
        return m, {"m": m}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeAlias, overload

from piste.selects import all_outcomes
from piste.storage import State
from piste.symbol import ALL, FULL, HOST, LanguageError, Row, Sym, Trace, nary
from piste.variants import Graph, Variants

__all__ = [
    "Part",
    "Pipeline",
    "after",
    "apply",
    "decay",
    "direction",
    "instead",
    "prepare",
    "program",
    "scale",
    "update",
]

Hyper: TypeAlias = Any  # namespaces: their attributes are the states and hyper-parameters of one optimizer
States: TypeAlias = Any

_VOCABULARY = ("g", "d", "p", "st", "new", "hp", "t", "ndim", "shape")


@dataclass(frozen=True)
class Part:
    """A function that fills one slot, with the states it keeps."""

    slot: str
    function: Callable[..., Any]
    states: Mapping[str, State] = field(default_factory=dict)
    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.wants:
            if name not in _VOCABULARY:
                raise LanguageError(f"{self.name} wants {name!r}; a part can see {', '.join(_VOCABULARY)}")

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def wants(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.function).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the bare function, on tensors or numbers: in a debugger, a notebook, another part."""
        return self.function(*args, **kwargs)

    def named(self, prefix: str, **renamed: str) -> Part:
        """The same part under another name, so that it can stand in one pipeline twice.

        Its states become ``prefix.state``; ``renamed`` maps its hyper-parameters to the group's
        (``beta1="graft_beta1"``).
        """
        return replace(self, prefix=f"{prefix}.", renamed=renamed)


class _Slot:
    """A decorator that makes a function a part for one slot; keyword arguments declare its states."""

    def __init__(self, slot: str) -> None:
        self.slot = slot

    @overload
    def __call__(self, function: Callable[..., Any], /) -> Part: ...
    @overload
    def __call__(self, /, **states: State) -> Callable[[Callable[..., Any]], Part]: ...
    def __call__(self, function: Callable[..., Any] | None = None, /, **states: State) -> Any:
        if function is not None:
            return Part(self.slot, function)
        return lambda function: Part(self.slot, function, states)


prepare = _Slot("prepare")
direction = _Slot("direction")
scale = _Slot("scale")
decay = _Slot("decay")
apply = _Slot("apply")
after = _Slot("after")
update = _Slot("update")
instead = _Slot("instead")


@apply
def plain(p: Any, d: Any, hp: Hyper) -> Any:
    """Gradient descent: ``p - lr * d``."""
    return p - hp.lr * d


@dataclass(frozen=True)
class Pipeline:
    """The parts of one optimizer, slot by slot; the order of slots is fixed, see the head of this module."""

    direction: Part
    prepare: tuple[Part, ...] = ()
    scale: tuple[Part, ...] = ()
    decay: tuple[Part, ...] = ()
    apply: Part = plain
    after: tuple[Part, ...] = ()
    instead: Part | None = None

    def __post_init__(self) -> None:
        for slot in ("prepare", "scale", "decay", "after"):
            for part in getattr(self, slot):
                self._check(part, slot)
        self._check(self.apply, "apply")
        if self.instead is not None:
            self._check(self.instead, "instead")
        if self.direction.slot != "update":
            self._check(self.direction, "direction")
        elif self.scale or self.apply is not plain:
            raise LanguageError(f"{self.direction.name} is an update: it leaves no room for scale and apply")

    def _check(self, part: Part, slot: str) -> None:
        if part.slot != slot:
            raise LanguageError(f"{part.name} fills the slot {part.slot}, not {slot}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in the order in which they run."""
        last = () if self.direction.slot == "update" else (self.apply,)
        instead = () if self.instead is None else (self.instead,)
        return (*self.prepare, self.direction, *self.scale, *self.decay, *last, *self.after, *instead)

    @property
    def states(self) -> dict[str, State]:
        """Every state that any part may keep, under the name it has in ``optimizer.state[weight]``."""
        found: dict[str, State] = {}
        for part in self.parts:
            for name, state in part.states.items():
                if part.prefix + name in found:
                    raise LanguageError(f"two parts keep a state named {name!r}; give one a name with .named(...)")
                found[part.prefix + name] = state
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading a pipeline into a graph


class _Namespace:
    """Attributes by name, with an error that lists what there is."""

    def __init__(self, what: str, rule: str, get: Callable[[str], Any], names: Callable[[], list[str]]) -> None:
        self.__dict__.update(_what=what, _rule=rule, _get=get, _names=names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._get(name)
        except KeyError:
            legal = ", ".join(self._names()) or "none"
            raise LanguageError(f"rule {self._rule!r} reads the {self._what} {name!r}; it has: {legal}") from None

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise LanguageError(f"rule {self._rule!r} sets {name!r}; new values are returned, never assigned")


class _Reader:
    """Calls the parts of a pipeline in order on symbols, and gathers what they return."""

    def __init__(self, pipeline: Pipeline, statics: Mapping[str, Any], ndim: int, trace: Trace) -> None:
        self.pipeline, self.statics, self.ndim, self.trace = pipeline, statics, ndim, trace
        self.declared = pipeline.states
        self.touched: set[str] = set()
        self.outputs: dict[str, Sym] = {}
        self.p = trace.node("p", kind=FULL)

    def read(self, *, scaled: bool, watch: bool) -> Graph:
        pipeline, p = self.pipeline, self.p
        g = self.trace.node("g", kind=FULL)
        if scaled:
            g = g * self.trace.node("inverse_scale", kind=ALL)
        for part in pipeline.prepare:
            g = self.call(part, g=g, p=p)
        if pipeline.direction.slot == "update":
            for part in pipeline.decay:
                p = self.call(part, g=g, p=p)
            p = self.call(pipeline.direction, g=g, p=p)
        else:
            d = self.call(pipeline.direction, g=g, p=p)
            for part in pipeline.scale:
                d = self.call(part, g=g, p=p, d=d)
            for part in pipeline.decay:
                p = self.call(part, g=g, p=p, d=d)
            p = self.call(pipeline.apply, g=g, p=p, d=d)
        for part in pipeline.after:
            p = self.call(part, g=g, p=p)
        if watch:
            self.outputs["watch.update_norm"] = nary("total", (p - self.p) ** 2, attr="update_norm", kind=ALL)
        if pipeline.instead is not None:
            p = self.call(pipeline.instead, g=g, p=self.p, d=_change(p, self.p))
        self.put("p", p, self.p, FULL)
        for node in list(self.trace.nodes.values()):
            if node.op in ("total", "tally"):  # a weight adds to a sum whatever becomes of it
                self.outputs[f"watch.{node.attr}"] = node
        return Graph(self.outputs, frozenset(self.touched))

    def call(self, part: Part, **values: Any) -> Any:
        self.trace.rule = part.name
        names: dict[str, Callable[[], Any]] = {
            "st": lambda: self.states_of(part),
            "new": lambda: self.left_of(part),
            "hp": lambda: self.hyper_of(part),
            "t": lambda: self.trace.node("t", kind=HOST),
            "ndim": lambda: self.ndim,
            "shape": lambda: tuple(self.trace.node("shape", attr=i, kind=HOST) for i in range(self.ndim)),
        }
        missing = [w for w in part.wants if w not in values and w not in names]
        if missing:
            raise LanguageError(f"rule {part.name!r} wants {missing[0]!r}, which its slot {part.slot!r} does not have")
        result = part.function(*(values[w] if w in values else names[w]() for w in part.wants))
        value, states = result if isinstance(result, tuple) else (result, {})
        for name, new in states.items():
            if name not in part.states:
                raise LanguageError(f"rule {part.name!r} returns the state {name!r}, which it does not declare")
            self.put("state." + part.prefix + name, new, self.state(part, name), part.states[name].kind_of(self.ndim))
        return value

    def state(self, part: Part, name: str) -> Sym:
        self.touched.add(part.prefix + name)
        return self.trace.node("state", attr=part.prefix + name, kind=part.states[name].kind_of(self.ndim))

    def states_of(self, part: Part) -> _Namespace:
        def get(name: str) -> Sym:
            if name not in part.states:
                raise KeyError(name)
            return self.state(part, name)

        return _Namespace("state", part.name, get, lambda: sorted(part.states))

    def left_of(self, part: Part) -> _Namespace:
        """States as the parts that ran before have left them, under the names they have in the optimizer."""
        left = {target.removeprefix("state."): new for target, new in self.outputs.items() if target != "p"}
        return _Namespace("new state", part.name, left.__getitem__, lambda: sorted(left))

    def hyper_of(self, part: Part) -> _Namespace:
        def get(name: str) -> Any:
            name = part.renamed.get(name, name)
            if name in self.statics:
                return self.statics[name]
            self.trace.row.hp[name]
            return self.trace.node("hp", attr=name, kind=HOST)

        return _Namespace("hyper-parameter", part.name, get, lambda: sorted([*self.statics, *self.trace.row.hp]))

    def put(self, target: str, new: Any, old: Sym, kind: Any) -> None:
        """Record the new value of the weight or a state."""
        new = new if isinstance(new, Sym) else self.trace.node("const", attr=new, kind=HOST)
        if new.kind.level > kind.level or (new.kind.level == kind.level and not set(new.kind.keep) <= set(kind.keep)):
            raise LanguageError(
                f"rule {self.trace.rule!r} puts a value of kind {new.kind} into {target}, kept as {kind}"
            )
        if new.kind != kind:
            new = nary("expand", new, old, kind=kind)
        if new is not old:
            self.outputs[target] = new


def _change(new: Sym, old: Sym) -> Sym:
    """``new - old``, not rounded to the size of ``old`` where ``new`` is ``old`` with terms added or subtracted."""
    terms = _terms(new, old)
    if terms is None:
        difference: Sym = new - old
        return difference
    change: Any = None
    for sign, term in terms:
        signed = term if sign > 0 else -term
        change = signed if change is None else change + signed
    if isinstance(change, Sym) and change.kind == FULL:
        return change
    return nary("expand", 0.0 if change is None else change, old, kind=FULL)


def _terms(new: Sym, old: Sym) -> list[tuple[int, Sym]] | None:
    """The terms, with their signs, that were added to ``old`` one after the other; None if that is not how it went."""
    if new is old:
        return []
    if new.op not in ("add", "sub"):
        return None
    x, y = new.args
    before = _terms(x, old)
    if before is not None:
        return [*before, (1 if new.op == "add" else -1, y)]
    before = _terms(y, old) if new.op == "add" else None
    return None if before is None else [*before, (1, x)]


def program(
    pipeline: Pipeline,
    statics: Mapping[str, Any],
    ndim: int,
    *,
    scaled: bool = False,
    watch: bool = False,
    device: frozenset[str] | None = None,
    skippable: bool = False,
) -> Variants:
    """All variants of a pipeline for weights of one rank under one choice of flags.

    Args:
        pipeline: what is to be read.
        statics: hyper-parameters that are flags (bool, str, None), by name.
        ndim: rank of the weights.
        scaled: gradients are multiplied by the inverse of a loss scale as they are read.
        watch: the norm of the whole update is measured.
        device: hyper-parameters that live on the device, as the step number then does, too; None if all are the host's.
        skippable: of a step on the device, whether it may be undone by what is found there (an overflow).
    """

    def read(current: Trace) -> Graph:
        return _Reader(pipeline, statics, ndim, current).read(scaled=scaled, watch=watch and device is None)

    def trace(row: Row) -> tuple[list[tuple[Sym, bool]], Graph]:
        if device is not None:
            return all_outcomes(read, row, device, skippable=skippable, watch=watch)
        with Trace(row) as current:
            graph = read(current)
        return current.path, graph

    return Variants(trace)
