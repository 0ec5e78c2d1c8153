"""PSGD with Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params, hyperparameters
from piste.parts.standard import standard
from piste.rules.psgd import psgd_kron
from piste.slots import Pipeline
from piste.whitening import whitening

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PSGDKron"]


class PSGDKron(Optimizer):
    r"""Momentum whitened by Kronecker factors, which are themselves found by descent.

    .. math::
        m_t = \mu m_{t-1} + (1-\mu)\, g_t, \qquad x_t = \frac{m_t}{1-\mu^t}, \qquad
        A = Q_1 X Q_2^\top, \quad B = Q_1^{-\top} V Q_2^{-1}, \quad V_{ij} \sim \mathcal N(0, 1)

    .. math::
        Q_1 \leftarrow Q_1 - \alpha\,\frac{\operatorname{triu}(A A^\top - B B^\top)}
        {\lVert A A^\top + B B^\top\rVert}\, Q_1, \qquad Q_2 \text{ alike with } A^\top A - B^\top B, \qquad
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta\, Q_1^\top Q_1 X Q_2^\top Q_2

    The factors Q are upper triangular and stay so: a step multiplies them by a triangular matrix near the identity (it
    moves in their group), so that no inverse or root is ever taken, only triangular systems are solved. Where they fit,
    the step is as white as noise of size 1; it is clipped to a root mean square of ``clip_rms``, in which it resembles
    Adam's. Vectors, axes of one and axes above ``max_size`` have diagonal factors.

    Factors are updated in every step at first, and then as often as a probability says that falls from 1 to
    ``least_probability``: updates are spread evenly, after the weight's own steps, so that the number of updates is the
    sum of probabilities so far. Every hundredth one brings the factors of a weight to one size.

    The probes V follow from the group's ``seed``, the weight's own step and its shape: a run that is resumed goes on
    with the same ones, on every process alike. Weights of one shape share them.

    **When to use**: where Shampoo and SOAP are used, on devices that decompose matrices slowly; small and recurrent
    networks, which its author shows most. **When not**: gradients that are nearly always zero (embeddings of rare
    words), whose factors grow until the clip alone gives the step its length.

    State of a square matrix: 8 bytes per parameter of factors, 4 of momentum; ``diagonal="all"`` leaves 4, and next to
    nothing for factors. Under ``state="bf16"``, ``"8bit"``, ``"4bit"`` momentum takes 2, 1.02, 0.516;
    ``factors="bf16"`` halves the factors.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; about a third of AdamW's.
        momentum: kept fraction of the average of gradients; 0 keeps none.
        weight_decay: decoupled decay, three to ten times AdamW's; L2 with ``decoupled_weight_decay=False``.
        factor_lr: length of the factors' steps (:math:`\alpha`).
        init_scale: the factors begin at the identity times this, for all axes together.
        whiten: what the factors are fitted to: ``"momentum"`` or ``"gradient"``.
        clip_rms: largest root mean square of a weight's step before ``lr``; None clips nothing.
        flat_start: steps of a weight with an update in each.
        probability_decay: how fast the probability falls after them, per step.
        least_probability: where it stops falling.
        max_size: longer axes have diagonal factors; None for no limit.
        diagonal: which other axes have diagonal factors: ``"none"``, ``"longest"`` or ``"all"``.
        merge_dims: weights of more than two axes are taken for matrices, the most nearly square of (first, others) and
            (others, last).
        factors: how factors are kept: ``"fp32"`` (float64 for float64 weights) or ``"bf16"``.
        **options: see :class:`piste.options.Options`.

    Factors that are not finite are not taken: the last ones stay, and the log says so.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.PSGDKron(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Li 2018, arXiv 1512.04202; Li 2024, arXiv 2402.11858; as in ``Kron`` of kron_torch, whose numbers it gives
    with equal probes. That one adds its noise to the momentum as it is used, too, takes the less square of the two
    matrices of most convolutions, and counts updates and their balancing over the whole optimizer. The author's newest
    code updates factors in other coordinates by default.
    """

    shaping = ("max_size",)

    def __init__(
        self,
        params: Params,
        lr: float = 3e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        factor_lr: float = 0.1,
        init_scale: float = 1.0,
        whiten: str = "momentum",
        clip_rms: float | None = 1.1,
        flat_start: int = 500,
        probability_decay: float = 1e-3,
        least_probability: float = 0.03,
        max_size: int | None = 8192,
        diagonal: str = "none",
        merge_dims: bool = True,
        factors: str = "fp32",
        **options: Unpack[Options],
    ) -> None:
        hyper = hyperparameters(locals())
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        how = whitening(group["max_size"], group["diagonal"], merge=group["merge_dims"])
        return standard(group, psgd_kron(how, group["factors"] == "bf16"))
