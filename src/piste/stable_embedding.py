"""An embedding whose gradients suit optimizer state in few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StableEmbedding"]


class StableEmbedding(nn.Embedding):
    """``nn.Embedding`` with Xavier's uniform initialisation and a LayerNorm behind it.

    Rows of an embedding get gradients of very different sizes, some of them rarely, which is what blocks of codes stand
    least. The norm evens out what comes from the rows; their optimizer state stays in float32
    (:func:`piste.param_groups` sees to that, as for any ``nn.Embedding``).

    Args:
        num_embeddings: rows.
        embedding_dim: numbers per row.
        padding_idx: a row that stays zero and gets no gradient; the norm behind it gives its bias there.
        **options: as for ``nn.Embedding`` (``max_norm``, ``device``, ``dtype``, ...).

    Input: whole numbers of any shape; output: that shape and ``embedding_dim``, in the dtype of the weight.

    **When not**: for a model whose checkpoint has a plain embedding; there is a norm more to train.

    Example:
        >>> import torch, piste
        >>> words = piste.StableEmbedding(10, 4)
        >>> words(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", section 2.3 (arXiv 2110.02861).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(self, input: Tensor) -> Tensor:
        """Rows, normalised."""
        rows: Tensor = self.norm(super().forward(input))
        return rows
