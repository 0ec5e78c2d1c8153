"""Shampoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.kronecker import kronecker
from piste.optimizers.statistics import FactorsOfOthers
from piste.options import Options, Params, hyperparameters
from piste.parts.prepare import l2
from piste.parts.standard import standard
from piste.rules.shampoo import shampoo_google, shampoo_meta
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Shampoo"]

#: what the options that only the other form has must be in each form
_OF_FORM: Mapping[str, Mapping[str, Any]] = {
    "meta": {"nesterov": False, "average_momentum": False},
    "google": {"beta3": None, "corrected": False},
}
#: and what those of roots must be where there are none
_CORRECTED: Mapping[str, Any] = {"root": "eigen", "relative_eps": False}


class Shampoo(FactorsOfOthers):
    r"""Gradients multiplied, along every axis, by an inverse root of what gradients have been along it.

    .. math::
        L_t = \beta_2 L_{t-1} + (1-\beta_2)\, G_t G_t^\top, \quad R_t = \beta_2 R_{t-1} + (1-\beta_2)\, G_t^\top G_t,
        \quad D_t = L_t^{-1/4}\, X_t\, R_t^{-1/4}, \quad
        p_t = (1-\eta\lambda)\, p_{t-1} - \eta\,\frac{\lVert A_t\rVert}{\lVert D_t\rVert} D_t

    for a matrix; a weight of r axes has r factors to the power :math:`-1/(2r)`. Neighbouring axes are merged up to
    ``block_size``, and longer ones cut into blocks of it. The length is that of another optimizer's step A (grafting).
    Roots are worked out every so many steps and used in between.

    Two public forms differ in more than names. ``"meta"`` (facebookresearch/optimizers): X is the momentum, bias
    corrected like the factors; each block is grafted to its own length; merging begins at the last axis.
    ``"google"`` (google-research's ``scalable_shampoo``): X is the gradient, grafting is of whole weights, momentum is
    of what comes out of it; factors begin at ``eps`` times the identity; merging begins at the first axis; decay that
    is not decoupled enters the momentum, after grafting.

    **When to use**: matrices and convolutions, large batches, runs long enough for the cost of a step to count less
    than their number. **When not**: small batches of a model that is mostly vectors; where a step of AdamW is already
    slower than a batch. At weights of two short sides it costs next to nothing, at ``block_size`` of thousands seconds
    per refresh.

    State of a square block: 8 bytes per parameter of factors and as much of roots, 4 of momentum, 4 of most magnitudes;
    ``"google"`` keeps a second momentum, 4, if ``start`` is above 1. A vector that fits into a block has the square of
    its length, twice. ``factors="bf16"`` halves factors and roots. Under ``state="bf16"``, ``"8bit"``, ``"4bit"`` the
    moments of a matrix take 4, 2.05, 1.06. With ``corrected`` bases stand for roots, and 4 more bytes hold squares.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, of the optimizer whose lengths are taken.
        betas: kept fractions of the momentum and of the factors; 1 for the second adds up all of them.
        eps: the ridge added to factors before a root is taken.
        weight_decay: decoupled decay; with ``decoupled_weight_decay=False`` L2, or inside the momentum of ``"google"``.
        form: ``"meta"`` or ``"google"``.
        graft: whose length: ``"adam"``, ``"rmsprop"`` (without bias correction), ``"adagrad"``, ``"sgd"``, ``"sign"``
            (the root of the number of elements), or ``"none"``.
        graft_beta: kept fraction of the magnitude's average of squares; None for ``betas[1]``.
        graft_eps: added to the magnitude's denominator.
        graft_normalized: the magnitude sees gradients divided by their norm.
        every: steps from one renewal of the roots to the next.
        statistics_every: steps from one update of the factors to the next.
        start: the first step (from 1) that is preconditioned; before it the magnitude is the step. Roots are first
            worked out then (``"meta"``), or in the first step (``"google"``).
        block_size: longest side of a block, None for whole weights.
        merge_dims: merge neighbouring axes while their product is at most ``block_size``; axes of one always go.
        sides: ``"all"``, or ``"one"``: only the shortest axis of a weight has factors, so that a matrix is multiplied
            from one side by an inverse square root (Xie et al. 2025), and factors take the square of the shorter side.
        corrected: the gradient is divided by a root mean square of its own in the eigenbasis of the factors, in the
            place of their roots: SOAP as Meta has it (see the page on matrices for what differs); ``"meta"`` alone.
        exponent: the power of the inverse, in the place of ``1 / (2 r)`` for r axes with factors, or of 1/2 with
            ``corrected``. Weights that need another one go into a group of their own.
        root: ``"eigen"`` or ``"newton"``: by eigendecomposition, or by the coupled Newton iteration, which needs
            products alone (for devices that decompose slowly) and an exponent of one over a whole number.
        relative_eps: the ridge is ``eps`` times the largest eigenvalue.
        factors: how factors and roots are kept: ``"fp32"`` (float64 for float64 weights) or ``"bf16"``.
        bias_correction: of momentum and factors; ``"meta"`` alone.
        beta3: kept fraction of the momentum that is used, where another one is kept; None for ``betas[0]``; ``"meta"``
            alone.
        nesterov: look ahead by one step; ``"google"`` alone.
        average_momentum: momentum is an average, not a sum; ``"google"`` alone.
        preconditioner_gradients: factors are made of gradients that :meth:`give_preconditioner_gradients` brings, not
            of those of the loss; 4 more bytes per parameter.
        **options: see :class:`piste.options.Options`.

    A root whose residual is 0.1 or more, or that is not finite, is not taken: the last one stays, and the log says so.

    Raises:
        ValueError: a value is out of range, ``root="newton"`` with an exponent that is not one over a whole number, or
            an option of the other form.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Shampoo(model.parameters(), lr=1e-3, every=10)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Gupta, Koren & Singer 2018, arXiv 1802.09568; Anil et al. 2020, arXiv 2002.09018; Shi et al. 2023, arXiv
    2309.06497; one side: Xie et al. 2025, arXiv 2503.10537. Parity with formulas typed from both public codes, and with
    numbers that facebookresearch/optimizers gave.
    """

    shaping = ("block_size",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        form: str = "meta",
        graft: str = "adam",
        graft_beta: float | None = None,
        graft_eps: float = 1e-8,
        graft_normalized: bool = False,
        every: int = 10,
        statistics_every: int = 1,
        start: int = 10,
        block_size: int | None = 1024,
        merge_dims: bool = True,
        sides: str = "all",
        corrected: bool = False,
        exponent: float | None = None,
        root: str = "eigen",
        relative_eps: bool = False,
        factors: str = "fp32",
        bias_correction: bool = True,
        beta3: float | None = None,
        nesterov: bool = False,
        average_momentum: bool = False,
        preconditioner_gradients: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = hyperparameters(locals())
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        exponent, form = group["exponent"], group["form"]
        if group["root"] == "newton" and exponent is not None and abs(1 / exponent - round(1 / exponent)) > 1e-9:
            raise ValueError(
                f"{cls.__name__} got exponent={exponent!r} with root='newton'; legal: one over a whole number, or "
                "root='eigen'"
            )
        bound = [(f"form={form!r}", _OF_FORM[form]), *([("corrected=True", _CORRECTED)] if group["corrected"] else [])]
        for choice, options in bound:
            for option, value in options.items():
                if group[option] != value:
                    raise ValueError(f"{cls.__name__} got {option}={group[option]!r} with {choice}; legal: {value!r}")

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        google = group["form"] == "google"
        block = group["block_size"]
        merge = block if group["merge_dims"] and block else 1
        how = kronecker(block, merge, backwards=not google, one_sided=group["sides"] == "one")
        rule = (shampoo_google if google else shampoo_meta)(how, group["factors"] == "bf16")
        return standard(group, rule, coupled=None if google else l2)
