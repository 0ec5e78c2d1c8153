"""SOAP: the authors' steps by formula, the order of columns, bases that fail, awkward gradients."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from oracles import matrix
from oracles.replay import (
    assert_same,
    by_formula,
    by_optimizer,
    parameters,
    random_problem,
    set_gradients,
    with_statistics,
)
from torch import nn

import piste
from piste.householder import orthogonal_factors
from piste.kronecker import kronecker
from piste.matrices import descending, eigenbases, moved, next_bases
from piste.renewals import rebasing

# No axis longer than the others have numbers: the eigenvectors beyond those would be anybody's choice.
PROBLEM = random_problem([(), (5,), (4, 4), (3, 4), (2, 3, 3), (4, 3, 2, 2)], seed=3, steps=12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"every": 3, "weight_decay": 0.3},
        {"every": 1, "shampoo_beta": 0.8, "betas": (0.8, 0.9)},
        {"every": 2, "normalize": True, "max_size": 3},
        {"every": 2, "merge_dims": True, "max_size": 4, "bias_correction": False},
        {"every": 4, "decoupled_weight_decay": False, "weight_decay": 0.3, "max_size": None},
    ],
    ids=str,
)
def test_is_the_formula(settings: dict[str, Any]) -> None:
    ours = {"lr": 0.05} | settings
    actual = by_optimizer(lambda p: piste.SOAP(p, engine="reference", **ours), PROBLEM)
    assert_same(actual, by_formula(matrix.soap, PROBLEM, ours), 1e-10, 1e-11)


def test_vectors_have_a_basis_if_asked() -> None:
    """One gradient makes a basis of one direction, which is all that the second needs to be told apart by."""
    (p,) = (nn.Parameter(torch.zeros(3, dtype=torch.float64)),)
    optimizer = piste.SOAP([p], lr=1.0, precondition_1d=True, weight_decay=0.0)
    for _ in range(2):
        p.grad = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, -0.8, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_bases_of_other_gradients() -> None:
    """Against the formula; matrices alone need them, for vectors have no basis."""
    ours = {"lr": 0.05, "every": 3}
    params = parameters(PROBLEM)
    optimizer = piste.SOAP(params, engine="reference", preconditioner_gradients=True, **ours)
    set_gradients(params, PROBLEM.gradients[0])
    with pytest.raises(ValueError, match=r"none for a weight of shape \(4, 4\)"):
        optimizer.step()
    found, expected = with_statistics(params, optimizer, matrix.soap, ours, PROBLEM)
    assert_same([found], [expected], 1e-10, 1e-11)


def test_the_first_step_moves_nothing() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = piste.SOAP([p], weight_decay=0.5)
    p.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(p, torch.ones(3, 3))
    assert set(optimizer.state[p]) == {"step", "factors", "bases", "m", "v"}
    assert not optimizer.state[p]["m"].any()


# --- bases ------------------------------------------------------------------------------------------------------------


def factor(values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors in their order."""
    generator = torch.Generator().manual_seed(4)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T, basis


def test_bases_come_in_descending_order() -> None:
    a, basis = factor([1.0, 9.0, 4.0])
    found, failed = eigenbases(a[None], torch.zeros(1, 3, 3, dtype=torch.float64))
    assert failed == 0
    torch.testing.assert_close((found[0].T @ basis[:, [1, 2, 0]]).abs(), torch.eye(3, dtype=torch.float64))
    assert descending(moved(a[None], basis[None]), basis[None]).tolist() == [[1, 2, 0]]


def test_power_iterations_find_the_basis() -> None:
    """From the basis of another matrix, sorted on the way: off-diagonals shrink by the ratio of eigenvalues."""
    a, basis = factor([1.0, 9.0, 4.0])
    found = torch.eye(3, dtype=torch.float64)[None]
    for _ in range(40):
        found, failed = next_bases(moved(a[None], found), found)
        assert failed == 0
    torch.testing.assert_close((found[0].T @ basis[:, [1, 2, 0]]).abs(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("rank", [519, 100, 0])
def test_large_orthogonal_factors_are_lapack_s(rank: int) -> None:
    """With its signs, column by column up to the rank; what is beyond it is anybody's choice, and orthogonal."""
    n = 519
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(n, rank, generator=generator, dtype=torch.float64) @ torch.eye(rank, n, dtype=torch.float64)
    expected = torch.linalg.qr(a).Q
    found = orthogonal_factors(a.clone()[None])[0]
    torch.testing.assert_close(found[:, :rank], expected[:, :rank], rtol=0, atol=1e-11)
    torch.testing.assert_close(found.T @ found, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_second_moments_follow_their_columns() -> None:
    """A weight's numbers move along each axis as the columns of that axis's basis do."""
    how = kronecker(None)
    left, right = factor([1.0, 9.0, 4.0])[0], factor([2.0, 1.0])[0]
    flat = torch.cat([left.flatten(), right.flatten()])[None]
    bases = torch.cat([factor([1.0, 9.0, 4.0])[1].flatten(), factor([2.0, 1.0])[1].flatten()])[None]
    v = torch.arange(6.0, dtype=torch.float64).view(1, 3, 2)
    assert torch.equal(how.in_order(v, how.moved(flat, bases, 3, 2), bases), v[:, [1, 2, 0]])
    flat, bases, v = _swapped(flat), _swapped(bases), v.mT.contiguous()
    assert torch.equal(how.in_order(v, how.moved(flat, bases, 2, 3), bases), v[:, :, [1, 2, 0]])


def _swapped(flat: torch.Tensor) -> torch.Tensor:
    return torch.cat([flat[:, 9:], flat[:, :9]], 1)


def test_a_basis_that_fails_stays(caplog: pytest.LogCaptureFixture) -> None:
    how = kronecker(None)
    flat = torch.cat([how.gram(torch.randn(1, 3, 4)), how.gram(torch.full((1, 3, 4), torch.nan))])
    old = how.identity(torch.zeros(3, 4)).expand(2, -1)
    for method in ("eigen", "qr"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "piste"):
            found = rebasing(how, method)(flat, old, 3, 4)
        assert "1 of 2 eigenbases of size 3" in caplog.text
        assert "1 of 2 eigenbases of size 4" in caplog.text
        assert torch.equal(found[1], old[1])
        assert not torch.equal(found[0], old[0])


@pytest.mark.parametrize("factors", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survives(factors: str, dtype: torch.dtype) -> None:
    """Numbers, vectors, tall, wide, rank 4, of one rank, zeros, over several renewals."""
    shapes = [(), (5,), (40, 2), (2, 40), (4, 3, 2, 2), (8, 8), (6, 6)]
    params = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]
    optimizer = piste.SOAP(params, lr=0.01, every=2, factors=factors, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(7):
        for p in params[:-2]:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        params[-2].grad = torch.outer(torch.arange(8.0), torch.ones(8)).to(dtype)
        params[-1].grad = torch.zeros(6, 6, dtype=dtype)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert torch.equal(params[-1], torch.ones(6, 6, dtype=dtype))
    assert not torch.equal(params[-2], torch.ones(8, 8, dtype=dtype))
    kept = optimizer.state[params[2]]
    assert kept["factors"].dtype == (torch.bfloat16 if factors == "bf16" else torch.float32)
    n = 40
    basis = kept["bases"][: n * n].view(n, n)
    torch.testing.assert_close(basis @ basis.T, torch.eye(n), rtol=0, atol=1e-5)


def test_a_nan_is_skipped_or_stays_where_it_came_from() -> None:
    bad, good = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = piste.SOAP([bad, good], every=1)
    rng = np.random.default_rng(0)
    for step in range(4):
        bad.grad = torch.full((3, 3), torch.nan if step else 1.0)
        good.grad = torch.tensor(rng.normal(size=(3, 3)), dtype=torch.float32)
        optimizer.step()
    assert torch.isnan(bad).all()
    assert torch.isfinite(good).all()
    assert torch.isfinite(optimizer.state[bad]["bases"]).all()
    skipping = piste.SOAP([good], nonfinite="skip")
    good.grad = torch.full((3, 3), torch.nan)
    skipping.step()
    assert skipping.last_step.skipped
    assert "factors" not in skipping.state[good]


def test_merging_needs_a_size() -> None:
    with pytest.raises(ValueError, match="merge_dims=True with max_size=None"):
        piste.SOAP([nn.Parameter(torch.zeros(2, 2))], merge_dims=True, max_size=None)
