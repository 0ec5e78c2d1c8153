"""What every optimizer takes besides its own hyper-parameters: options of groups, and of the whole optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from torch import Tensor

from piste import execution

__all__ = [
    "ENGINE_OPTIONS",
    "GROUP_OPTIONS",
    "LEGAL_OPTIONS",
    "EngineOptions",
    "Options",
    "Params",
    "engine_name",
    "hyperparameters",
]

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class EngineOptions(TypedDict, total=False):
    """Options that every optimizer takes.

    Settings that may differ from group to group, and are written into ``param_groups``:

    * ``decoupled_weight_decay`` (bool): shrink weights by ``lr * weight_decay`` instead of adding an L2 gradient.
    * ``clip_norm`` (float or None): scale all gradients so that their global norm is at most this.
    * ``cautious`` (bool): only the elements of a step that agree in sign with their gradient are taken, the longer for
      it (Liang et al. 2024, arXiv 2411.16085). Decay is not masked, except where the rule itself has it in its
      direction (StableAdamW). Rules without a direction apart from the weight refuse it.
    * ``maximize`` (bool): climb instead of descend.
    * ``state``: how moments are stored: ``"fp32"``, ``"bf16"``, ``"8bit"`` or ``"4bit"``. Weights of fewer than 4,096
      numbers keep float32, and so do states that are no moments (copies of weights, gradients, accumulators); in 8 and
      4 bits also vectors below 65,536 numbers and matrices with rows shorter than 64.
    * ``weights``: what bfloat16 weights stand for: ``"plain"``, themselves; ``"stochastic"``, rounded so that small
      steps add up; ``"kahan"``, with what rounding took away in 2 more bytes; ``"remainder"``, exact float32 in 2 more
      bytes. :meth:`piste.Optimizer.full_precision` gives the number they stand for. Other weights stay as they are.
    * ``seed`` (int): where the thresholds of rounding begin; the same on all processes.

    Settings of the whole optimizer:

    * ``engine``: ``"auto"`` (the fastest that works here), ``"cpp"``, ``"foreach"``, ``"compile"`` or ``"reference"``;
      ``"triton"`` is there to be tried on GPUs, where ``"auto"`` is ``"foreach"`` until it has been measured.
    * ``nonfinite``: what to do about NaN or infinite gradients: ``"ignore"`` as torch does, ``"raise"``
      ``FloatingPointError``, or ``"skip"`` the step. The last two look at all gradients before anything is written.
    * ``amp_unscale`` (bool): take part in ``torch.amp.GradScaler``'s fused protocol: gradients are unscaled as they
      are read and stay scaled in ``p.grad``. Off by default; Lightning refuses to clip gradients when it is on.
    * ``distribute``: which processes share the work on whole matrices (Muon, Shampoo, SOAP and the like; other rules
      have none). ``"auto"``: of weights that are sharded, those that have a part of them; of other weights nobody.
      A process group (or a device mesh of one axis): those of the group, which have to be replicas of one model with
      averaged gradients, as ``DistributedDataParallel`` makes them. Then :meth:`piste.Optimizer.state_dict`
      has to be called on every process. ``None``: every process does all.
    * ``capturable`` (bool): make steps that a ``torch.cuda.CUDAGraph`` can record and replay. ``lr``,
      ``weight_decay`` and step counts are tensors on the device, which schedules fill; other numbers are constants of
      a recording, unless they are given as tensors. Branches on the step number are worked out both ways, and
      ``GradScaler``'s ``found_inf`` is heeded on the device. Every weight that is trained needs a gradient in every
      step. Not for steps that no graph records: they take longer then. Refused with the reason by optimizers whose
      host decides in a step (Shampoo, SOAP, PSGDKron, Prodigy, Schedule-Free, Ranger21) and by all wrappers but
      Lookahead.
    * ``foreach``, ``fused``: torch's names; ``foreach=True`` is ``engine="foreach"``, ``foreach=False`` is
      ``engine="reference"``, ``fused=True`` is ``engine="auto"``.
    """

    decoupled_weight_decay: bool
    clip_norm: float | None
    cautious: bool
    maximize: bool
    state: str
    weights: str
    seed: int
    engine: str
    nonfinite: str
    amp_unscale: bool
    distribute: Any
    capturable: bool
    foreach: bool | None
    fused: bool | None


class Options(EngineOptions, total=False):
    """:class:`EngineOptions`, and gradient centralization for optimizers that do not have it from birth.

    * ``use_gc`` (bool): take the mean of each output unit from gradients of matrices and convolutions.
    * ``gc_conv_only`` (bool): of 2-D and 3-D convolutions alone.
    * ``gc_loc`` (bool): of the gradient, the default; else of the final direction.
    """

    use_gc: bool
    gc_conv_only: bool
    gc_loc: bool


GROUP_OPTIONS: Mapping[str, Any] = {
    "decoupled_weight_decay": False,
    "clip_norm": None,
    "cautious": False,
    "maximize": False,
    "state": "fp32",
    "weights": "plain",
    "seed": 0,
    "use_gc": False,
    "gc_conv_only": False,
    "gc_loc": True,
}
ENGINE_OPTIONS: Mapping[str, Any] = {
    "engine": "auto",
    "nonfinite": "ignore",
    "amp_unscale": False,
    "distribute": "auto",
    "capturable": False,
    "foreach": None,
    "fused": None,
}
LEGAL_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "engine": ("auto", *execution.ENGINES),
    "nonfinite": ("ignore", "raise", "skip"),
    "amp_unscale": (False, True),
    "capturable": (False, True),
    "foreach": (None, False, True),
    "fused": (None, False, True),
}


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor hands on as defaults, of its ``locals()``: all but ``self``, ``params`` and ``options``.

    To be called before the constructor has variables of its own. A method with ``super()`` in it counts ``__class__``
    among its locals.
    """
    return {k: v for k, v in arguments.items() if k not in ("self", "params", "options", "__class__")}


def engine_name(options: Mapping[str, Any]) -> str:
    """The engine that ``engine=`` and torch's keywords ask for together."""
    engine, foreach, fused = options["engine"], options["foreach"], options["fused"]
    if foreach and fused:
        raise ValueError("foreach=True and fused=True contradict each other; legal: one of them, or engine=...")
    wanted = "foreach" if foreach else "reference" if foreach is False else None
    if wanted is not None and engine not in ("auto", wanted):
        raise ValueError(f"foreach={foreach} asks for engine={wanted!r} and contradicts engine={engine!r}")
    if fused and engine in ("reference", "foreach"):
        raise ValueError(f"fused=True asks for the fastest engine and contradicts engine={engine!r}")
    return wanted or str(engine)
