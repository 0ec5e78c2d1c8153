"""piste in fastai: ``Learner(dls, model, opt_func=opt_func("ranger"), cbs=PisteCallback)``.

fastai's own ``OptimWrapper`` takes any torch optimizer, but decays biases and norms whatever ``wd_bn_bias`` says, gives
Lookahead's ``alpha`` the name of a momentum, and leaves out what an optimizer may want to know of the training loop.
:func:`opt_func` mends the first two, and :class:`PisteCallback` the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

import piste
from piste.integrations.framework import framework
from piste.integrations.wrapped import from_outside_in, two_pass_of

with framework("fastai"):
    from fastai.callback.core import Callback, CancelStepException  # type: ignore[import-untyped]
    from fastai.callback.fp16 import MixedPrecision  # type: ignore[import-untyped]
    from fastai.callback.mixup import MixHandler  # type: ignore[import-untyped]
    from fastai.callback.schedule import LRFinder, ParamScheduler  # type: ignore[import-untyped]
    from fastai.callback.training import GradientAccumulation  # type: ignore[import-untyped]
    from fastai.optimizer import OptimWrapper  # type: ignore[import-untyped]

__all__ = ["LearnerOptimizer", "PisteCallback", "opt_func"]

#: what stays when the state is cleared: the numbers that fastai itself sets and reads
_KEPT = ("lr", "mom", "sqr_mom", "wd", "eps")


def opt_func(
    name: str | piste.Preset, *, true_wd: bool | None = None, model: nn.Module | None = None, **options: Any
) -> partial[LearnerOptimizer]:
    """What ``Learner(opt_func=...)`` takes, for an optimizer of piste by name.

    A ``functools.partial``, so that ``partial(opt_func("ranger"), eps=1e-4)`` adds to it.

    * The learning rate is the learner's, as ever in fastai: ``Learner(lr=)``, that of ``fit_…``, or 1e-3.
      ``piste.presets[name].lr_prior`` tells where to look for one; ``learn.lr_find()`` works.
    * ``fit_one_cycle`` cycles ``mom``: what ``piste.schedules.one_cycle`` would cycle, so not that of presets with
      ``set_betas=False``, nor where there is none. It is reported as it is.
    * ``Learner(wd=)`` is the weight decay, that of the preset if None. Biases and norms have none unless
      ``Learner(wd_bn_bias=True)``, which goes before the preset's ``bn_wd``.

    Args:
        name: as for :func:`piste.create`: a preset, a class, or ``"sam+adamw"``. Optimizers with two passes, with a
            schedule of their own, and schedule-free ones need :class:`PisteCallback` in the learner.
        true_wd: True shrinks weights by ``lr * wd``, False adds an L2 term to the gradient; None for the preset's.
        model: the learner's, for what only modules tell: names of weights (which checkpoints and ASAM use), 32-bit
            state of embeddings under ``state="8bit"``, the scales that Amos wants.
        **options: as for :func:`piste.create` with bare parameters.

    Returns:
        A function of parameters, in one list or one for each group of a splitter, and ``lr``.

    Raises:
        TypeError, ValueError: the name is unknown. Options are checked when the learner makes its optimizer.

    Not for ``Learner``'s that are given a made optimizer: that is ``OptimWrapper(opt=...)``.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from piste.integrations.fastai import opt_func
        >>> make = partial(opt_func("ranger", use_gc=False), eps=1e-4)
        >>> optimizer = make(list(torch.nn.Linear(3, 1).parameters()), lr=2e-3)
        >>> [optimizer.hypers[0][name] for name in ("lr", "mom", "sqr_mom", "wd", "eps")]
        [0.002, 0.95, 0.999, 0.01, 0.0001]

    Source: fastai 2.8; ``true_wd`` and ``bn_wd`` are words of fastai 1.
    """
    piste.preset_of(name)
    return partial(LearnerOptimizer, name=name, true_wd=true_wd, model=model, **options)


@dataclass
class _Inside:
    """The optimizer inside, the numbers of its groups in each group of the splitter, and whether each is decayed."""

    optimizer: torch.optim.Optimizer
    members: list[list[int]]
    decayed: list[bool]


class LearnerOptimizer(OptimWrapper):  # type: ignore[misc]
    """An optimizer of piste as fastai's learner sees it; made by :func:`opt_func`.

    It has one group of hyper-parameters for each group of the splitter, under fastai's names. Inside, a group may be
    several of the optimizer's: with and without decay.

    Args:
        params: the weights, in one list or one for each group of the splitter.
        lr: learning rate.
        name: see :func:`opt_func`; and so on.
        true_wd: see there.
        model: see there.
        **options: see there.

    Attributes:
        attended: is there a :class:`PisteCallback` that does its part?

    Raises:
        TypeError: a group of the splitter is no list of weights.
        ValueError: a group is empty; and as :func:`piste.create`.

    Not to be made by hand.

    Example:
        >>> import torch
        >>> from piste.integrations.fastai import opt_func
        >>> body, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        >>> optimizer = opt_func("adamw")([list(body.parameters()), list(head.parameters())], lr=1e-3)
        >>> optimizer.set_hyper("lr", slice(1e-4, 1e-2))
        >>> [round(hypers["lr"], 6) for hypers in optimizer.hypers]
        [0.0001, 0.01]
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        name: str | piste.Preset,
        true_wd: bool | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self._lists, self._lr, self._options = _lists(params), float(lr), options
        self._preset, self._model = _with_decay(piste.preset_of(name), true_wd), model
        # fastai marks weights here after it has called us: "do_wd", "force_train"
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        self.frozen_idx, self.attended = 0, False
        self._made: _Inside | None = None

    # the optimizer inside --------------------------------------------------------------------------------------------

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The optimizer, made when it is first needed: only then has fastai said which weights are not decayed."""
        return self._inside.optimizer

    @property
    def _inside(self) -> _Inside:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> _Inside:
        known = {} if self._model is None else _settings(self._preset, self._model)
        groups: list[dict[str, Any]] = []
        members, decayed = [], []
        for weights in self._lists:
            parts: dict[Any, dict[str, Any]] = {}
            for p in weights:
                decays = bool(self.state.get(p, {}).get("do_wd", True))
                name, settings = known.get(p, (None, {}))
                key = (decays, name is None, *settings.items())
                part = parts.setdefault(key, {"params": [], **settings, **({} if decays else {"weight_decay": 0.0})})
                part["params"].append(p)
                if name is not None:
                    part.setdefault("param_names", []).append(name)
            members.append(list(range(len(groups), len(groups) + len(parts))))
            decayed += [key[0] for key in parts]
            groups += parts.values()
        return _Inside(piste.create(self._preset, groups, lr=self._lr, **self._options), members, decayed)

    @property
    def base(self) -> torch.optim.Optimizer:
        """What is inside of all wrappers."""
        *_, innermost = from_outside_in(self.opt)
        return innermost

    @property
    def two_pass(self) -> piste.SAM | None:
        """The wrapper that steps in two passes, if there is one."""
        return two_pass_of(self.opt)

    @property
    def is_schedule_free(self) -> bool:
        """Has it other weights for validation than for training?"""
        return hasattr(self.base, "train") and hasattr(self.base, "eval")

    @property
    def has_schedule(self) -> bool:
        """Does it want to know the length of the run, for a schedule of its own?"""
        given = self._options.get("total_steps") or self._options.get("epochs")
        return given is None and issubclass(self._preset.optimizer, piste.Ranger21)

    @property
    def needs(self) -> str | None:
        """What it needs :class:`PisteCallback` for."""
        if self.two_pass is not None:
            return "its second pass"
        if self.is_schedule_free:
            return "train() and eval() around validation"
        return "the length of the run" if self.has_schedule else None

    # fastai's side ---------------------------------------------------------------------------------------------------

    @property
    def param_lists(self) -> list[list[Tensor]]:
        """The weights of each group of the splitter."""
        return self._lists

    @property
    def hypers(self) -> list[dict[str, Any]]:
        """The hyper-parameters of each group of the splitter, under fastai's names."""
        groups, found = self.opt.param_groups, []
        for members in self._inside.members:
            group = groups[next((i for i in members if self._inside.decayed[i]), members[0])]
            numbers = {name: group[key] if i is None else group[key][i] for name, (key, i) in _places(group).items()}
            found.append({"mom": 0.0, **numbers})
        return found

    def _set_hyper(self, name: str, values: Sequence[Any]) -> None:
        for members, given in zip(self._inside.members, values, strict=True):
            value = given.item() if hasattr(given, "item") else given
            for i in members:
                self._put(self.opt.param_groups[i], name, value if name != "wd" or self._inside.decayed[i] else 0.0)

    def _put(self, group: dict[str, Any], name: str, value: Any) -> None:
        if name == "mom":
            piste.schedules.set_momentum([group], value)
            return
        places = _places(group)
        if name not in places:
            raise ValueError(f"{self._preset.name} has no {name!r}; legal: {', '.join(places)}")
        key, place = places[name]
        if name == "wd" and value:
            self._preset.with_decay()  # or it is refused
        group[key] = value if place is None else (*group[key][:place], value, *group[key][place + 1 :])

    def step(self, closure: None = None) -> None:
        """Take a step.

        Raises:
            RuntimeError: it needs the callback.
        """
        if not self.attended and self.needs is not None:
            raise RuntimeError(
                f"{self._preset.name} needs PisteCallback, for {self.needs}: "
                "Learner(..., cbs=PisteCallback), with piste.integrations.fastai.PisteCallback"
            )
        self.opt.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.opt.zero_grad()

    def clear_state(self) -> None:
        """Begin anew with the same hyper-parameters, as after freezing."""
        before = self.hypers
        self._made = None
        for name in _KEPT:
            if name in before[0]:
                self._set_hyper(name, [hypers[name] for hypers in before])

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside, its hyper-parameters included."""
        return self.opt.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on bit by bit where :meth:`state_dict` was taken."""
        self.opt.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return repr(self.opt)


class PisteCallback(Callback):  # type: ignore[misc]
    """The training loop's part of what optimizers of piste need.

    * **Two passes** (SAM and its descendants): the second pass runs before the step, at the perturbed weights, on the
      same batch; under ``GradientAccumulation`` the climb is one, with the gradient of all micro-batches, which then
      run again. ``GradientClip`` clips what the optimizer steps with; ``MixedPrecision`` skips a step in which either
      pass overflowed. BatchNorm's statistics, metrics and the recorded loss are those of the first pass.
    * **Schedule-free** optimizers: ``train()`` before each epoch, ``eval()`` before validation and after the fit.
    * **Ranger21**: the length of the run, and its schedule begins with every fit. ``learn.fit`` alone: it is refused
      under ``fit_one_cycle`` and the like. In ``lr_find`` its schedule rests.

    Other optimizers do not mind it. Give it with the learner, not with one fit: ``lr_find`` needs it too.

    Raises:
        TypeError: the learner's optimizer is not of :func:`opt_func`.
        ValueError: another schedule beside the optimizer's own; ESAM with ``gamma`` below 1, which wants a loss for
            each sample; ``MixUp`` or ``CutMix`` under ``GradientAccumulation``, as they keep the last mix only.

    Not for models that keep a state from batch to batch (recurrent ones): it moves in both passes.

    Example:
        >>> import torch
        >>> from fastai.data.core import DataLoaders
        >>> from fastai.learner import Learner
        >>> from piste.integrations.fastai import PisteCallback, opt_func
        >>> data = torch.utils.data.TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
        >>> dls = DataLoaders(torch.utils.data.DataLoader(data, 4), torch.utils.data.DataLoader(data, 4))
        >>> model = torch.nn.Linear(3, 1)
        >>> learn = Learner(dls, model, torch.nn.MSELoss(), opt_func("sam+adamw", rho=0.1), cbs=PisteCallback)
        >>> with learn.no_bar(), learn.no_logging():
        ...     learn.fit_one_cycle(1, 1e-3)

    Source: ``piste.sharpness_step`` is the same for any loop.
    """

    # behind GradientAccumulation, which decides whether there is a step; before MixedPrecision, which unscales, and
    # GradientClip
    order, run_valid = MixedPrecision.order - 1, False

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Any, Any]] = []
        self._again = self._begins = False

    @property
    def _sam(self) -> piste.SAM | None:
        found: piste.SAM | None = self.learn.opt.two_pass
        return found

    def before_fit(self) -> None:
        """Refuse what cannot work, and begin."""
        opt = self.learn.opt
        if opt is None:  # a learner that has only been asked to predict
            return
        if not isinstance(opt, LearnerOptimizer):
            raise TypeError(
                f"PisteCallback got a learner with opt={type(opt).__name__}; legal: "
                "Learner(opt_func=piste.integrations.fastai.opt_func(name))"
            )
        self._check(opt)
        opt.attended, self._seen, self._begins = True, [], True
        if opt.two_pass is not None:
            opt.two_pass.model = self.learn.model  # whose BatchNorm layers are to move in the first pass only

    def _check(self, opt: LearnerOptimizer) -> None:
        name = opt._preset.name
        outside = [cb for cb in self._others(ParamScheduler) if "lr" in cb.scheds and not isinstance(cb, LRFinder)]
        if outside and (opt.has_schedule or opt.is_schedule_free):
            raise ValueError(f"{name} has a schedule of its own, or needs none; legal: learn.fit(epochs, lr)")
        if opt.two_pass is not None and opt.two_pass.selects:
            raise ValueError(
                f"{name} got gamma below 1, which needs the loss of each sample; legal: gamma=1, or a loop of your "
                "own with piste.sharpness_step"
            )
        if opt.two_pass is not None and self._others(MixHandler) and self._others(GradientAccumulation):
            raise ValueError(
                f"{name} got MixUp or CutMix with GradientAccumulation; legal: one of them, as only the last mix is "
                "kept and the second pass needs all"
            )

    def before_train(self) -> None:
        """Tell the optimizer about the run, and that it trains."""
        opt = self.learn.opt
        if self._begins and opt.has_schedule and isinstance(opt.base, piste.Ranger21):
            self._tell_length(opt.base)
        self._begins = False
        if opt.is_schedule_free:
            opt.base.train()

    def before_validate(self) -> None:
        """Put in the weights to be validated."""
        if self.learn.opt is not None and self.learn.opt.is_schedule_free:
            self.learn.opt.base.eval()

    def after_fit(self) -> None:
        """Leave the weights that are to be used."""
        if self.learn.opt is None:
            return
        self.before_validate()
        self.learn.opt.attended = False
        if self._sam is not None:
            self._sam.model = None

    def _tell_length(self, optimizer: piste.Ranger21) -> None:
        """Begin the schedule inside with the run."""
        epochs, batches, every = self.learn.n_epoch, len(self.learn.dls.train), self._batches_per_step()
        if self._others(LRFinder):
            optimizer.begin()
        elif self.learn.epoch and optimizer.param_groups[0]["total_steps"] is not None:
            return  # a run that goes on, with an optimizer that was loaded
        elif every == 1:
            optimizer.begin(epochs=epochs, batches_per_epoch=batches)
        else:
            optimizer.begin(max(1, epochs * batches // every))

    def _batches_per_step(self) -> int:
        counts: list[int] = [ceil(cb.n_acc / self.learn.dls.train.bs) for cb in self._others(GradientAccumulation)]
        return max([1, *counts])

    def _others(self, kind: type) -> list[Any]:
        return [cb for cb in self.learn.cbs if isinstance(cb, kind)]

    # two passes ------------------------------------------------------------------------------------------------------

    def before_backward(self) -> None:
        """Remember a batch, in case that it has to run again."""
        if self._sam is not None and not self._again:
            self._seen.append((self.learn.xb, self.learn.yb))

    def before_step(self) -> None:
        """Make the second pass, and leave the gradient that the optimizer is to step with."""
        sam, batches = self._sam, self._seen
        self._seen = []
        if sam is None:
            return
        if sam.needs_two_passes and sam.first_step():
            try:
                self._second_pass(batches)
            except BaseException:
                sam.restore()
                raise
        if not sam.descend():
            if not self._scaled():
                raise CancelStepException
            for p in self.learn.opt.param_lists[0][:1]:
                p.grad = torch.full_like(p, torch.inf)  # so that the scaler knows, whatever it was that overflowed

    def after_step(self) -> None:
        """Count a step that was skipped; one that was taken is counted."""
        if self._sam is not None:
            self._sam.finish()

    def _second_pass(self, batches: Sequence[tuple[Any, Any]]) -> None:
        learn = self.learn
        before = learn.xb, learn.yb, learn.pred, learn.loss_grad
        self._again = True
        try:
            for learn.xb, learn.yb in batches:
                for cb in self._others(MixedPrecision):
                    cb.before_batch()  # into autocast, which it leaves behind the loss
                learn.pred = learn.model(*learn.xb)
                learn("after_pred")
                learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
                learn("after_loss")
                learn("before_backward")
                learn.loss_grad.backward()
        finally:
            self._again = False
            learn.xb, learn.yb, learn.pred, learn.loss_grad = before

    def _scaled(self) -> bool:
        return bool(self._others(MixedPrecision)) and self.learn.scaler.is_enabled()


def _lists(params: Any) -> list[list[Tensor]]:
    """The weights of each group of a splitter."""
    entries = list(params)
    flat = all(isinstance(each, Tensor) for each in entries)
    groups = [entries] if flat else [list(each) if isinstance(each, Sequence) else each for each in entries]
    for number, group in enumerate(groups):
        if isinstance(group, Mapping) or not isinstance(group, list):
            raise TypeError(f"group {number} of the splitter is a {type(group).__name__}; legal: a list of weights")
        if not group:
            raise ValueError(f"group {number} of the splitter has no weights; legal: at least one in each group")
    return groups


def _with_decay(preset: piste.Preset, true_wd: bool | None) -> piste.Preset:
    """The preset, of a class that can decay weights: there may be some decay later on."""
    try:
        return preset.with_decay(true_wd)
    except ValueError:  # good as long as nothing is decayed
        return preset


def _settings(preset: piste.Preset, model: nn.Module) -> dict[Tensor, tuple[str, dict[str, Any]]]:
    """The name of each weight, and what its module says about it; decay is fastai's affair."""
    groups = piste.param_groups(model, weight_decay=0.0, decay_norm_and_bias=True, include_frozen=True)
    if issubclass(preset.optimizer, piste.Amos):
        groups = preset.optimizer.groups(model, groups)
    found: dict[Tensor, tuple[str, dict[str, Any]]] = {}
    for group in groups:
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names", "weight_decay")}
        found |= {p: (name, settings) for p, name in zip(group["params"], group["param_names"], strict=True)}
    return found


def _places(group: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """fastai's name of each hyper-parameter of a group: its key here, and its place where that has several numbers."""
    ours = {"weight_decay": "wd"}
    if "betas" not in group:  # else alpha is Lookahead's
        ours |= {"momentum": "mom", "alpha": "sqr_mom"}
    found: dict[str, tuple[str, int | None]] = {}
    for key, value in group.items():
        if key in ("params", "param_names"):
            continue
        if not isinstance(value, (tuple, list)):
            found[ours.get(key, key)] = key, None
            continue
        usual = {0: "mom", 1: "sqr_mom" if len(value) == 2 else "betas__1"} if key == "betas" else {}
        found |= {usual.get(i, f"{key}__{i}"): (key, i) for i in range(len(value))}
    return found
