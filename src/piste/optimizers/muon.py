"""Muon and NorMuon."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from piste.optimizer import Optimizer
from piste.options import Options, Params, hyperparameters
from piste.parts.standard import standard
from piste.routing import matrix_groups
from piste.rules.matrix import muon, normuon
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Muon", "NorMuon"]

log = logging.getLogger("piste")


class Muon(Optimizer):
    r"""Momentum made orthogonal: for matrices a step of one size in every direction, for the rest AdamW.

    .. math::
        B_t = \mu B_{t-1} + (1-\mu) g_t, \qquad X = (1-\mu) g_t + \mu B_t, \qquad
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta\, s\, \operatorname{orth}(X)

    :math:`\operatorname{orth}(U \Sigma V^\top) \approx U V^\top`, by a few iterations of an odd polynomial on
    :math:`X / \lVert X\rVert_F`. A convolution is the matrix (out, in * kernel). The length s is, by name of the rule,

    .. math::
        \text{keller: } \sqrt{\max(1, \tfrac{out}{in})}, \qquad \text{moonlight: } 0.2\sqrt{\max(out, in)}, \qquad
        \text{spectral: } \sqrt{out / in}

    **Which weights**: embeddings, heads, norms and biases are no matrices that map features to features, and belong to
    AdamW. Shapes do not tell; modules do: :meth:`groups` (and ``piste.create("muon", model)``, which calls it) sorts
    weights into groups whose ``"rule"`` is ``"muon"`` or ``"adamw"``. Groups without one have ``"auto"``: AdamW for
    vectors and numbers, Muon for all others, embeddings and heads included, of which a warning tells.

    **When to use**: training transformers and convolutional nets from scratch, from moderate batches on. **When not**:
    fine-tuning a model that AdamW trained, or models that are mostly embeddings. Clipping by norm does next to nothing
    to it.

    State: 4 bytes per parameter of matrices, 8 of others. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 2, 1.02,
    0.516 of matrices. The iterations work on stacks of weights of equal shape.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs; :meth:`groups` makes groups with their rules.
        lr: learning rate. Under ``"moonlight"`` the same as AdamW's, for all weights; under ``"keller"`` about 0.02 for
            matrices, with an AdamW rate for the others (``aux_lr`` of :meth:`groups`).
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        momentum: kept fraction of the average of gradients.
        nesterov: look ahead by one gradient.
        betas: kept fractions of AdamW's averages.
        eps: added to AdamW's denominator.
        scale: ``"moonlight"``, ``"keller"`` (torch's ``"original"``) or ``"spectral"``.
        iteration: ``"quintic"`` leaves singular values between 0.68 and 1.14 where they were above a hundredth of the
            Frobenius norm, ``"polar_express"`` between 0.84 and 1.15 from a thousandth on, at the same cost.
            ``"deflated"`` first brings the largest eighth of the singular values down to the least of them, and then
            needs fewer products for the same accuracy: for CPUs; a CUDA graph cannot record it.
        steps: of the iteration; None for its usual number: 3 for ``"deflated"``, 5 for the others.
        precision: of the iterations: ``"fp32"``, ``"bf16"``, or ``"auto"``: float32 on CPUs, bfloat16 elsewhere. Where
            gradients lack rank, bfloat16 steps along its own rounding.
        rule: ``"auto"``, ``"muon"`` or ``"adamw"``; of a group.
        split: how many matrices a weight holds, one below the other (queries, keys and values: 3; a grouped
            convolution: its groups); of a group.
        transposed: outputs lie along the other axes, as in transposed convolutions; of a group. It matters for s alone.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range, ``rule="muon"`` for a weight of fewer than two axes, or a ``split`` that
            does not divide the rows of a weight.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = piste.Muon(piste.Muon.groups(model), lr=1e-3)
        >>> [(group["rule"], group["param_names"]) for group in optimizer.param_groups]
        [('muon', ['0.weight']), ('adamw', ['2.weight']), ('adamw', ['0.bias', '2.bias'])]
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; "moonlight": Liu et al. 2025, arXiv 2502.16982;
    "polar_express": Amsel et al. 2025, arXiv 2505.16932; "deflated" is their theorem 3.1 after a block power iteration
    (Halko, Martinsson and Tropp 2011, algorithm 4.4). Parity with ``torch.optim.Muon`` to the precision of its
    bfloat16 iterations, and with formulas typed from the sources to rounding. Its state dictionaries load here, and
    :meth:`torch_state_dict` goes the other way.
    """

    torch_names: ClassVar[Mapping[str, str]] = {"momentum_buffer": "buf"}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        scale: str = "moonlight",
        iteration: str = "quintic",
        steps: int | None = None,
        precision: str = "auto",
        rule: str = "auto",
        split: int = 1,
        transposed: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = hyperparameters(locals())
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        matrices = sum(p.ndim > 1 for p in group["params"])
        if group["rule"] == "auto" and matrices:
            log.warning(
                "%s goes by shapes for %d weights: embeddings and heads among them are taken for matrices, too; "
                "%s.groups(model) asks their modules, rule='muon' says that all are matrices",
                type(self).__name__, matrices, type(self).__name__,
            )  # fmt: skip

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        tensors = [p[1] if isinstance(p, tuple) else p for p in group.get("params", ())]
        for p in tensors if group["rule"] != "adamw" else ():
            if p.ndim < 2 and group["rule"] == "muon":
                raise ValueError(
                    f"{cls.__name__} got rule='muon' for a weight of shape {tuple(p.shape)}; legal: 'adamw' or 'auto' "
                    "for weights of fewer than two axes"
                )
            if p.ndim > 1 and p.shape[0] % group["split"]:
                raise ValueError(
                    f"{cls.__name__} got split={group['split']} for a weight of {p.shape[0]} rows; legal: a divisor"
                )

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, muon)

    @classmethod
    def groups(
        cls,
        model: nn.Module,
        groups: Iterable[dict[str, Any]] | None = None,
        *,
        heads: Sequence[str] | None = None,
        aux: Sequence[type[nn.Module]] = (),
        matrices: Sequence[type[nn.Module]] = (),
        aux_lr: float | None = None,
        table: Callable[[str], object] | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups with the rule for each weight, from the modules that own them.

        Matrices are the weights of dense layers, convolutions (transposed and grouped ones included), recurrent layers
        and attention; but not those that make predictions. Everything else goes to AdamW: embeddings and what is tied
        to them, norms, biases, and the weights of modules of unknown type, of which a warning tells.

        Args:
            model: that owns the weights.
            groups: as :func:`piste.param_groups` makes them; None for its defaults. What a group says itself stays.
            heads: names of the layers (or weights) that make predictions. None takes the last matrix in the order of
                registration, or, in a model with tied embeddings, none besides those; and raises an error where that
                last matrix is inside of one of several like blocks. ``()`` says that there are none.
            aux: further types of modules whose weights go to AdamW.
            matrices: further types of modules whose weights are matrices.
            aux_lr: learning rate of the groups under AdamW; None for the optimizer's own.
            table: a function that is handed the table of what went where: ``table=print``.

        Returns:
            New groups with "rule", "split" and "transposed".

        Raises:
            ValueError: the head cannot be told, a name in ``heads`` is none of the model's, or a type is no module.

        >>> import piste, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 9))
        >>> for group in piste.Muon.groups(model):
        ...     print(group["rule"], group["param_names"])
        adamw ['0.weight', '3.weight']
        muon ['1.weight']
        adamw ['1.bias', '2.weight', '2.bias', '3.bias']
        """
        return matrix_groups(
            cls.__name__, model, groups, heads=heads, aux=aux, matrices=matrices, aux_lr=aux_lr, table=table
        )


class NorMuon(Muon):
    r"""Muon whose rows are brought to one size: no neuron moves much more than another.

    .. math::
        U = \operatorname{orth}(X), \qquad v_t = \beta v_{t-1} + (1-\beta) \operatorname{mean}_{row}(U^2), \qquad
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta\, s\,
        \frac{U / \sqrt{v_t}}{\lVert U / \sqrt{v_t} \rVert_F}\, \lVert U \rVert_F

    with X, s and the other weights as in :class:`Muon`, whose :meth:`~Muon.groups` serve this class, too. A row is what
    makes one output: of a convolution the whole filter. (The released code takes each row of each kernel apart.)

    **When to use**: where Muon is used; it costs a pass and a number per row more. **When not**: as there.

    State: 4 bytes per parameter of matrices, and a number per row; 8 of others. Under ``state="bf16"``, ``"8bit"``,
    ``"4bit"``: 2.02, 1.03, 0.531 of matrices of 256 columns.

    Args:
        params: as for :class:`Muon`, and so are all that are not named here.
        lr: learning rate.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        momentum: kept fraction of the average of gradients.
        nesterov: look ahead by one gradient.
        row_beta: kept fraction of the average of the rows' squares.
        betas: kept fractions of AdamW's averages.
        eps: added to AdamW's denominator.
        scale: ``"moonlight"``, ``"keller"`` or ``"spectral"``.
        iteration: ``"quintic"``, ``"polar_express"`` or ``"deflated"``.
        steps: of the iteration; None for its usual number.
        precision: of the iterations.
        rule: ``"auto"``, ``"muon"`` or ``"adamw"``; of a group.
        split: how many matrices a weight holds; of a group.
        transposed: outputs lie along the other axes; of a group. Rows are those of the weight as it is.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: as :class:`Muon`.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = piste.NorMuon(piste.NorMuon.groups(model), lr=1e-3)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()

    Source: Li et al. 2025, arXiv 2510.05491; parity with formulas typed from the paper and the authors' code.
    """

    torch_names: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        row_beta: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        scale: str = "moonlight",
        iteration: str = "quintic",
        steps: int | None = None,
        precision: str = "auto",
        rule: str = "auto",
        split: int = 1,
        transposed: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = hyperparameters(locals())
        Optimizer.__init__(self, params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, normuon)
