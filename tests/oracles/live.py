"""Other people's optimizers, made to run quietly and in float64.

Each function builds one oracle over given parameters. What has to be arranged for a comparison to be fair is arranged
here, once, and said in the docstring.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Params = Sequence[torch.Tensor]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Both AdaBelief packages print banners from their constructors."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def adabelief(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """adabelief-pytorch 0.2.1, the authors' package. It writes L2 into `p.grad`: give it gradients of its own."""
    from adabelief_pytorch import AdaBelief

    with _quietly():
        return AdaBelief(params, print_change_log=False, **settings)


def ranger_adabelief(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """ranger-adabelief 0.1.0 in float64.

    The package converts everything with `.float()` and so would compare in single precision only; during its step
    `.float()` means float64 here, which leaves every formula as released.
    """
    from ranger_adabelief import RangerAdaBelief

    class InDouble(RangerAdaBelief):
        def step(self, closure: Any = None) -> Any:
            with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
                return super().step(closure)

    with _quietly():
        return InDouble(params, **settings)


def ranger(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """pytorch_optimizer's Ranger with the SGD phase switched on, which makes it lessw2020's ranger.py.

    Right only where every weight has a gradient at every step (it counts steps per group) and where L2 is off (it
    centralizes before it adds L2).
    """
    from pytorch_optimizer import Ranger

    return Ranger(params, degenerated_to_sgd=True, foreach=False, **settings)


def resting_radam(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """pytorch_optimizer's RAdam, which like the authors' code rests while the average is short.

    Dense only (steps are counted per group) and with decoupled decay only (its L2 is not applied at all).
    """
    from pytorch_optimizer import RAdam

    return RAdam(params, degenerated_to_sgd=False, weight_decouple=True, foreach=False, **settings)


def eager_lookahead(optimizer: torch.optim.Optimizer, k: int, alpha: float) -> torch.optim.Optimizer:
    """pytorch_optimizer's Lookahead, whose slow weights start at the initial weights; it skips weights without a
    gradient at the sync step, where the authors sync all."""
    from pytorch_optimizer import Lookahead

    return Lookahead(optimizer, k=k, alpha=alpha)


def timm_module(name: str) -> Any:
    """One module of `timm.optim`, without running timm's own `__init__`.

    `import timm` needs an importable torchvision, which the CPU wheel of torch lacks (its custom operators do not
    register). The optimizer files themselves need torch alone, so they are imported under two empty packages that
    only carry timm's path.
    """
    full = f"timm.optim.{name}"
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise ImportError("timm is not installed")
    root = Path(found.submodule_search_locations[0])
    shells = {"timm": root, "timm.optim": root / "optim"}
    with mock.patch.dict(sys.modules):
        for shell, path in shells.items():
            module = types.ModuleType(shell)
            module.__path__ = [str(path)]
            sys.modules[shell] = module
        return importlib.import_module(full)


def rmsprop_tf(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's RMSpropTF."""
    return timm_module("rmsprop_tf").RMSpropTF(params, foreach=False, **settings)


def lazy_lookahead(optimizer: torch.optim.Optimizer, k: int, alpha: float) -> Any:
    """timm's Lookahead: its slow weights are made at the first sync, from weights that have already moved."""
    return timm_module("lookahead").Lookahead(optimizer, alpha=alpha, k=k)


def madgrad(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's MADGRAD, which counts steps per weight; only with a learning rate above 0 and without decoupled decay."""
    return timm_module("madgrad").MADGRAD(params, **settings)


def _in_double(base: Any) -> Any:
    """The class, with the numbers that it makes for itself during a step (norms, products) in double."""

    class InDouble(base):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                return super().step(closure)
            finally:
                torch.set_default_dtype(before)

    return InDouble


def novograd(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's NvNovoGrad, NVIDIA's Jasper code with decoupled decay added; its norms are made in double here."""
    return _in_double(timm_module("nvnovograd").NvNovoGrad)(params, **({"weight_decay": 0.0} | settings))


def nadam(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """torch's NAdam, whose product of momenta is in double here."""
    return _in_double(torch.optim.NAdam)(params, foreach=False, **settings)


def positive_negative(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """pytorch_optimizer's PNM; dense only, it counts steps per group."""
    from pytorch_optimizer import PNM

    return PNM(params, **settings)


def adaptive_positive_negative(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """pytorch_optimizer's AdaPNM; dense only, it counts steps per group."""
    from pytorch_optimizer import AdaPNM

    return AdaPNM(params, **settings)


def lamb(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's Lamb without its global clipping; it counts steps per group, so dense only."""
    return timm_module("lamb").Lamb(params, max_grad_norm=None, **settings)


def adan(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's Adan, which follows the authors' code; it counts steps per group, so dense only."""
    return timm_module("adan").Adan(params, foreach=False, **settings)


def lion(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's Lion."""
    return timm_module("lion").Lion(params, foreach=False, **settings)


def laprop(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's LaProp; equal to the paper at a constant learning rate. Its bias corrections are in double here."""
    return _in_double(timm_module("laprop").LaProp)(params, foreach=False, **settings)


def adopt(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """timm's Adopt with the clipping of the authors' code."""
    return timm_module("adopt").Adopt(params, clip_exp=0.25, foreach=False, **settings)


def stable_adamw(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """torch-optimi's StableAdamW; it counts steps per group, so dense only."""
    from optimi import StableAdamW

    return StableAdamW(params, foreach=False, **settings)


def ademamix(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """pytorch_optimizer's AdEMAMix; it counts steps per group, so dense only."""
    from pytorch_optimizer import AdEMAMix

    return AdEMAMix(params, foreach=False, **settings)


def ranger21(params: Params, **settings: Any) -> torch.optim.Optimizer:
    """ranger21 0.1.0, silent; it imports matplotlib for a plot that nobody asks for here.

    Its gradients are changed in place: give it copies.
    """
    names = ("matplotlib", "matplotlib.pyplot")
    with mock.patch.dict(sys.modules, {name: types.ModuleType(name) for name in names}):
        package = importlib.import_module("ranger21")

    class Quiet(package.Ranger21):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            with _quietly():
                return super().step(closure)

    with _quietly():
        return Quiet(params, logging_active=False, **settings)
