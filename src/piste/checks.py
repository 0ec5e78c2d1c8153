"""Legal ranges of hyper-parameters, and errors that name the argument, its value and the range."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from piste.orthogonal import ITERATIONS, PRECISIONS
from piste.storage import STATE_FORMATS, WEIGHT_FORMATS

__all__ = ["check_choice", "check_hyperparameters", "kind_of", "near", "refuse_unknown"]

_Check = Callable[[Any], bool]


def near(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` if something known is spelt nearly so, else nothing."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def kind_of(value: object) -> str:
    """What was given where something else belongs: the name of its class, or of the class that it is."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first name that is not known, with those that are spelt nearly so."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{owner} got an unknown option {name!r}{near(name, known)}; legal: {', '.join(known)}")


def check_choice(name: str, value: object, legal: Iterable[str]) -> None:
    """Refuse a value that is not among the legal ones."""
    legal = list(legal)
    if value not in legal:
        hint = near(value, legal) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} is not legal{hint}; legal: {', '.join(map(repr, legal))}")


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _within(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> _Check:
    def legal(value: Any) -> bool:
        x = _number(value)
        return x is not None and (low < x if open_low else low <= x) and (x < high if open_high else x <= high)

    return legal


def _fractions(value: Any) -> bool:
    legal = _within(0, 1, open_high=True)
    return isinstance(value, (tuple, list)) and len(value) in (2, 3) and all(map(legal, value))


def _fractions_or_one(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list)) and len(value) == 2 and _fractions((value[0], 0)) and _within(0, 1)(value[1])
    )


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(low: int) -> _Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _one_of(*values: str) -> _Check:
    return lambda value: value in values


def _or_none(legal: _Check) -> _Check:
    return lambda value: value is None or legal(value)


def _growth(value: Any) -> bool:
    return value == math.inf or _within(1, open_low=True)(value)


_FLAG = (_flag, "True or False")
_GRAFTS = ("adam", "rmsprop", "adagrad", "sgd", "sign", "none")
#: what the two classes that route weights to rules share
_ROUTED: Mapping[str, tuple[_Check, str]] = {
    "momentum": (_within(0, 1, open_high=True), "a number in [0, 1)"),
    "rule": (_one_of("auto", "muon", "adamw"), "'auto', 'muon' or 'adamw'"),
    "scale": (_one_of("moonlight", "keller", "spectral"), "'moonlight', 'keller' or 'spectral'"),
}

#: hyper-parameter, or class.hyper-parameter where a class has its own range -> (is this value legal?, the range)
_LEGAL: Mapping[str, tuple[_Check, str]] = {
    "lr": (_within(0), "a finite number >= 0"),
    "betas": (_fractions, "two numbers, each in [0, 1)"),
    "eps": (_within(0), "a finite number >= 0"),
    "weight_decay": (_within(0), "a finite number >= 0"),
    "momentum": (_within(0), "a finite number >= 0"),
    "dampening": (_within(-math.inf), "a finite number"),
    "alpha": (_within(0, 1), "a number in [0, 1]"),
    "AdEMAMix.alpha": (_within(0), "a finite number >= 0"),
    "k": (_whole(1), "a whole number >= 1"),
    "beta": (_within(0, 1), "a number in [0, 1]"),
    "SM3.momentum": (_within(0, 1, open_high=True), "a number in [0, 1)"),
    "trust_denominator": (_one_of("update", "weights"), "'update' or 'weights'"),
    "state": (_one_of(*STATE_FORMATS), ", ".join(map(repr, STATE_FORMATS))),
    "weights": (_one_of(*WEIGHT_FORMATS), ", ".join(map(repr, WEIGHT_FORMATS))),
    "seed": (_whole(0), "a whole number >= 0"),
    "lr_scale": (_within(0), "a finite number >= 0"),
    "ModelEMA.decay": (_within(0, 1, open_high=True), "a number in [0, 1)"),
    "beta0": (_within(0), "a finite number >= 0"),
    "clip_norm": (_or_none(_within(0, open_low=True)), "None or a finite number > 0"),
    "clip_exponent": (_within(0), "a finite number >= 0"),
    "momentum_decay": (_within(0), "a finite number >= 0"),
    "warmup_steps": (_or_none(_whole(1)), "None or a whole number >= 1"),
    "max_weight_norm": (_or_none(_within(0, open_low=True)), "None or a finite number > 0"),
    "agc_clip": (_within(0, open_low=True), "a finite number > 0"),
    "agc_eps": (_within(0), "a finite number >= 0"),
    "base_lr": (_within(0), "a finite number >= 0"),
    "batches_per_epoch": (_or_none(_whole(1)), "None or a whole number >= 1"),
    "beta_softplus": (_within(0, open_low=True), "a finite number > 0"),
    "current_lr": (_within(0), "a finite number >= 0"),
    "epochs": (_or_none(_whole(1)), "None or a whole number >= 1"),
    "norm_loss": (_within(0), "a finite number >= 0"),
    "schedule_step": (_whole(0), "a whole number >= 0"),
    "total_steps": (_or_none(_whole(1)), "None or a whole number >= 1"),
    "Adafactor.lr": (_or_none(_within(0)), "None or a finite number >= 0"),
    "Amos.momentum": (_within(0, 1, open_high=True), "a number in [0, 1)"),
    "Amos.beta": (_within(0, 1, open_high=True), "a number in [0, 1)"),
    "beta1": (_or_none(_within(0, 1, open_high=True)), "None or a number in [0, 1)"),
    "c_coef": (_within(0), "a finite number >= 0"),
    "clip_threshold": (_within(0, open_low=True), "a finite number > 0"),
    "clip_value": (_or_none(_within(0, open_low=True)), "None or a finite number > 0"),
    "d_coef": (_within(0), "a finite number >= 0"),
    "decay_rate": (_within(-math.inf, 0), "a finite number <= 0"),
    "eps_scale": (_within(0), "a finite number >= 0"),
    "factor": (_one_of("matrix", "last"), "'matrix' or 'last'"),
    "scale": (_within(0, open_low=True), "a finite number > 0"),
    "Shampoo.betas": (_fractions_or_one, "two numbers, the first in [0, 1), the second in [0, 1]"),
    "Shampoo.start": (_whole(1), "a whole number >= 1"),
    "block_size": (_or_none(_whole(1)), "None or a whole number >= 1"),
    "every": (_whole(1), "a whole number >= 1"),
    "exponent": (_or_none(_within(0, open_low=True)), "None or a finite number > 0"),
    "factors": (_one_of("fp32", "bf16"), "'fp32' or 'bf16'"),
    "form": (_one_of("meta", "google"), "'meta' or 'google'"),
    "graft": (_one_of(*_GRAFTS), ", ".join(map(repr, _GRAFTS))),
    "graft_beta": (_or_none(_within(0, 1)), "None or a number in [0, 1]"),
    "graft_eps": (_within(0), "a finite number >= 0"),
    "max_size": (_or_none(_whole(1)), "None or a whole number >= 1"),
    "sides": (_one_of("all", "one"), "'all' or 'one'"),
    "shampoo_beta": (_or_none(_within(0, 1, open_high=True)), "None or a number in [0, 1)"),
    "root": (_one_of("eigen", "newton"), "'eigen' or 'newton'"),
    "statistics_every": (_whole(1), "a whole number >= 1"),
    "iteration": (_one_of(*ITERATIONS), ", ".join(map(repr, ITERATIONS))),
    "precision": (_one_of(*PRECISIONS), ", ".join(map(repr, PRECISIONS))),
    "row_beta": (_within(0, 1, open_high=True), "a number in [0, 1)"),
    "split": (_whole(1), "a whole number >= 1"),
    "steps": (_or_none(_whole(1)), "None or a whole number >= 1"),
    "averaging": (_within(0, 1), "a number in [0, 1]"),
    "beta3": (_or_none(_within(0, 1, open_high=True)), "None or a number in [0, 1)"),
    "d": (_within(0, open_low=True), "a finite number > 0"),
    "d0": (_within(0, open_low=True), "a finite number > 0"),
    "PSGDKron.momentum": (_within(0, 1, open_high=True), "a number in [0, 1)"),
    "clip_rms": (_or_none(_within(0, open_low=True)), "None or a finite number > 0"),
    "diagonal": (_one_of("none", "longest", "all"), "'none', 'longest' or 'all'"),
    "factor_lr": (_within(0, 1), "a number in [0, 1]"),
    "flat_start": (_whole(0), "a whole number >= 0"),
    "init_scale": (_within(0, open_low=True), "a finite number > 0"),
    "least_probability": (_within(0, 1, open_low=True), "a number in (0, 1]"),
    "probability_decay": (_within(0, open_low=True), "a finite number > 0"),
    "whiten": (_one_of("momentum", "gradient"), "'momentum' or 'gradient'"),
    "Prodigy.d_coef": (_within(0, open_low=True), "a finite number > 0"),
    "d_max": (_within(0, open_low=True), "a finite number > 0"),
    "d_numerator": (_within(-math.inf), "a finite number"),
    "growth_rate": (_growth, "a number > 1, infinity included"),
    "lr_max": (_within(0), "a finite number >= 0"),
    "r": (_within(0), "a finite number >= 0"),
    "weight": (_within(0), "a finite number >= 0"),
    "temperature": (_within(0, open_low=True), "a finite number > 0"),
    "start": (_whole(0), "a whole number >= 0"),
    "lag": (_whole(1), "a whole number >= 1"),
    "samples": (_whole(1), "a whole number >= 1"),
    "classes": (_whole(1), "a whole number >= 1"),
    "ESAM.beta": (_within(0, 1, open_low=True), "a number in (0, 1]"),
    "gamma": (_within(0, 1, open_low=True), "a number in (0, 1]"),
    "rho": (_within(0, open_low=True), "a finite number > 0"),
    "rho_min": (_within(0), "a finite number >= 0"),
    "eta": (_within(0), "a finite number >= 0"),
    "interval": (_whole(1), "a whole number >= 1"),
    "lr_min": (_within(0), "a finite number >= 0"),
    **{f"{name}.{key}": legal for name in ("Muon", "NorMuon") for key, legal in _ROUTED.items()},
    "weight_lr_power": (_within(0), "a finite number >= 0"),
    "weight_sum": (_within(0), "a finite number >= 0"),
    "warmdown_min_lr": (_within(0), "a finite number >= 0"),
    "warmdown_start": (_within(0, 1), "a number in [0, 1]"),
    "warmup_fraction": (_within(0, 1), "a number in [0, 1]"),
    **dict.fromkeys(
        (
            "always_adapt",
            "amsgrad",
            "average_momentum",
            "graft_normalized",
            "merge_dims",
            "relative_eps",
            "bias_correction",
            "cautious",
            "centered",
            "corrected",
            "decoupled_weight_decay",
            "degenerated_to_sgd",
            "faithful",
            "fixed_decay",
            "gc_conv_only",
            "gc_loc",
            "grad_averaging",
            "late_start",
            "lookahead",
            "lr_in_momentum",
            "maximize",
            "nesterov",
            "no_prox",
            "normalize",
            "pnm",
            "precondition_1d",
            "preconditioner_gradients",
            "rectify",
            "scale_parameter",
            "transposed",
            "warmup_init",
            "safeguard_warmup",
            "silent_sgd_phase",
            "softplus",
            "stable_decay",
            "tf",
            "train_mode",
            "trust_clip",
            "use_agc",
            "use_cheb",
            "use_gc",
            "use_madgrad",
            "use_warmdown",
            "use_warmup",
        ),
        _FLAG,
    ),
}


def check_hyperparameters(owner: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse hyper-parameters outside of their legal range, and names that are probably a slip of the pen.

    Groups may carry entries of other people's (a scheduler's ``initial_lr``, a framework's ``name``), so an unknown
    name is refused only where it is nearly that of a hyper-parameter.
    """
    known = set(known)
    for name, value in values.items():
        if name in known:
            legal, words = _LEGAL.get(f"{owner}.{name}") or _LEGAL.get(name, (lambda _: True, ""))
            if not legal(value):
                raise ValueError(f"{owner} got {name}={value!r}; legal: {words}")
        elif name not in _FOREIGN:
            similar = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if similar:
                raise ValueError(f"{owner} got a group with {name!r}; did you mean {similar[0]!r}?")


#: entries that torch, its schedulers and frameworks put into groups
_FOREIGN = frozenset(
    (
        *("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "lr_scale", "swap_lr", "state"),
        *("max_momentum", "base_momentum", "cycle_momentum", "foreach", "fused", "capturable", "differentiable"),
    )
)
