"""Matrix functions: what rules call through :func:`piste.ops.opaque`, on stacks of equal shapes.

Plain torch functions, each usable and tested by itself. A stack has the shape ``(n, *shape)``; a weight of more than
two axes stands for the matrix ``(first axis, all others)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["ITERATIONS", "PRECISIONS", "orthogonalizer"]

#: odd polynomials ``a x + b x^3 + c x^5`` of singular values, one triple for each iteration; the last one repeats
ITERATIONS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Jordan et al. 2024: the steepest at 0 that keeps values near 1
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al. 2025 (arXiv 2505.16932), theorem 3.1 for values from 1e-3 to 1: each the best for what the last left
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
PRECISIONS = ("auto", "fp32", "bf16")


def _at_most_one(x: Tensor, iteration: str) -> Tensor:
    """Divided by the Frobenius norm, so that no singular value exceeds 1; zeros stay zeros."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / (1.02 * norm + 1e-6) if iteration == "polar_express" else x / norm.clamp(min=1e-7)


@cache
def orthogonalizer(iteration: str, precision: str) -> Callable[[Tensor, float, float], Tensor]:
    """The function that brings the singular values of matrices near 1 and leaves their singular vectors.

    Args:
        iteration: one of ``ITERATIONS``.
        precision: ``"bf16"``, ``"fp32"``, or ``"auto"``: float32 on CPUs, bfloat16 elsewhere. Matrices in float64 are
            worked on in float64.

    Returns:
        A function of a stack, the number of iterations, and the number of blocks of rows that are matrices of their
        own (3 for queries, keys and values in one weight). Its result has the precision of the stack.
    """

    def orthogonalize(stack: Tensor, steps: float, split: float) -> Tensor:
        rows = stack.shape[1] // int(split)
        x = stack.reshape(len(stack) * int(split), rows, -1)
        upright = rows > x.shape[-1]
        x = x.mT if upright else x
        low = precision == "bf16" or (precision == "auto" and x.device.type != "cpu")
        x = _at_most_one(x.bfloat16() if low and x.dtype == torch.float32 else x, iteration)
        triples = ITERATIONS[iteration]
        for step in range(int(steps)):
            a, b, c = triples[min(step, len(triples) - 1)]
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.mT if upright else x).reshape(stack.shape).to(stack.dtype)

    return orthogonalize
