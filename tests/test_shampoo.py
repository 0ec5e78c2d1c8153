"""Shampoo: both public forms against formulas typed apart, inverse roots, blocks, failures."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from unittest import mock

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
from piste.blocks import merged
from piste.kronecker import kronecker
from piste.matrices import (
    MOST_RESIDUAL,
    eigen,
    inverse_roots,
    largest_eigenvalue,
    root_by_eigen,
    root_by_newton,
)
from piste.products import outer, triangular_products

PROBLEM = random_problem([(), (5,), (6, 4), (7, 3), (6, 2, 3, 3), (1, 7), (2, 3, 4)], seed=8, steps=9)
PLAIN: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3, "every": 2, "start": 3}
PLAIN["engine"] = "reference"  # the matrix of promises has the others


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """What a formula is told: it has no engine."""
    return {key: value for key, value in settings.items() if key != "engine"}


@pytest.mark.parametrize("form", ["meta", "google"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": 4},
        {"block_size": 4, "merge_dims": False, "graft": "rmsprop"},
        {"block_size": 12, "graft": "adagrad", "betas": (0.8, 1.0)},
        {"block_size": None, "graft": "sgd", "graft_normalized": True},
        {"graft": "sign", "every": 3, "statistics_every": 2, "start": 1},
        {"graft": "none", "exponent": 0.5, "relative_eps": True},
        {"graft_beta": 0.9, "graft_eps": 1e-2, "decoupled_weight_decay": False},
        {"sides": "one", "block_size": 4},
    ],
    ids=str,
)
def test_is_the_formula(form: str, settings: dict[str, Any]) -> None:
    ours = PLAIN | {"form": form} | settings
    actual = by_optimizer(lambda p: piste.Shampoo(p, **ours), PROBLEM)
    assert_same(actual, by_formula(matrix.shampoo, PROBLEM, _told(ours)), 1e-8, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "meta", "beta3": 0.5},
        {"form": "meta", "bias_correction": False},
        {"form": "google", "nesterov": True},
        {"form": "google", "average_momentum": True, "nesterov": True, "start": 1},
    ],
    ids=str,
)
def test_momentum_is_the_formulas(settings: dict[str, Any]) -> None:
    ours = PLAIN | settings
    actual = by_optimizer(lambda p: piste.Shampoo(p, **ours), PROBLEM)
    assert_same(actual, by_formula(matrix.shampoo, PROBLEM, _told(ours)), 1e-8, 1e-9)


@pytest.mark.parametrize("name", ["shampoo_meta", "shampoo_google"])
def test_presets_are_the_formulas(name: str) -> None:
    """With refreshes as often as nine steps can show; Newton's roots against eigenvalues.

    A ridge of 1e-12 would divide what rounding leaves in directions that no gradient has had yet by 1e-6.
    """
    changed = {"lr": 0.05, "every": 2, "start": 3, "eps": 1e-6, "weight_decay": 0.1}
    settings = dict(piste.presets[name].hyperparameters) | changed
    settings["decoupled_weight_decay"] = piste.presets[name].wd.true_wd
    actual = by_optimizer(lambda p: piste.create(name, p, engine="reference", **_given(settings)), PROBLEM)
    assert_same(actual, by_formula(matrix.shampoo, PROBLEM, settings), 1e-5, 1e-6)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """What `create` is told: the preset itself says how it decays."""
    return {key: value for key, value in settings.items() if key != "decoupled_weight_decay"}


@pytest.mark.parametrize("form", ["meta", "google"])
def test_factors_of_other_gradients(form: str) -> None:
    """Against the formulas; and none may be forgotten."""
    ours = PLAIN | {"form": form}
    params = parameters(PROBLEM)
    optimizer = piste.Shampoo(params, preconditioner_gradients=True, **ours)
    set_gradients(params, PROBLEM.gradients[0])
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"none for a weight of shape \(\)"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    found, expected = with_statistics(params, optimizer, matrix.shampoo, _told(ours), PROBLEM)
    assert_same([found], [expected], 1e-8, 1e-9)


def test_sampled_gradients_make_fisher_factors() -> None:
    """Softmax regression, whose Fisher matrix is known: with labels drawn from the model's own predictions the mean of
    G G^T is that of |x|^2 (diag p - p p^T), over the size of the batch, whatever the true labels are."""
    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(5, 4, generator=generator), torch.tensor([0, 0, 1, 1, 2])
    weight = nn.Parameter(torch.randn(3, 4, generator=generator))
    settings: dict[str, Any] = {"lr": 0.0, "betas": (0.0, 1.0), "start": 10_000, "merge_dims": False}
    optimizer = piste.Shampoo([weight], preconditioner_gradients=True, **settings)
    draws = 1500
    with torch.no_grad():
        p = torch.softmax(x @ weight.T, 1)
    weight.grad = (p - nn.functional.one_hot(y, 3)).T @ x / 5
    for _ in range(draws):
        sampled = nn.functional.one_hot(torch.multinomial(p, 1, generator=generator)[:, 0], 3)
        optimizer.give_preconditioner_gradients({weight: (p - sampled).T @ x / 5})
        optimizer.step()
    expected = torch.einsum("i,ij,jk->jk", x.square().sum(1), p, torch.eye(3))
    expected = (expected - torch.einsum("i,ij,ik->jk", x.square().sum(1), p, p)) / 25
    found = optimizer.state[weight]["factors"][:9].view(3, 3) / draws
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_other_gradients_are_checked() -> None:
    p, q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2))
    optimizer = piste.Shampoo([{"params": [p], "preconditioner_gradients": True}, {"params": [q]}])
    with pytest.raises(ValueError, match=r"got \(3, 2\) for a weight of \(2, 3\)"):
        optimizer.give_preconditioner_gradients({p: torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="in no group with preconditioner_gradients=True"):
        optimizer.give_preconditioner_gradients({p: torch.zeros(2, 3), q: torch.zeros(2)})
    assert not optimizer.state


def _told_apart(run: dict[str, Any]) -> str:
    """A run's settings without those that all runs have."""
    own = {k: v for k, v in run["settings"].items() if any(v != r["settings"].get(k) for r in META["runs"])}
    return "-".join(f"{k}={v}" for k, v in own.items())


# Gradients enough, before the first basis, for every eigenvector of a block of three to be its own.
DETERMINED = random_problem([(), (5,), (3, 4), (4, 2, 3)], seed=12, steps=9)


@pytest.mark.parametrize(
    "settings",
    [
        {"graft": "none"},
        {"graft": "adam", "sides": "one"},
        {"graft": "none", "betas": (0.8, 1.0), "beta3": 0.5},
        {"graft": "none", "exponent": 0.25, "bias_correction": False},
    ],
    ids=str,
)
def test_corrected_eigenvalues_are_the_formulas(settings: dict[str, Any]) -> None:
    ours = PLAIN | {"block_size": 3, "start": 4, "corrected": True} | settings
    actual = by_optimizer(lambda p: piste.Shampoo(p, **ours), DETERMINED)
    assert_same(actual, by_formula(matrix.shampoo, DETERMINED, _told(ours)), 1e-10, 1e-11)


META = json.loads((Path(__file__).parent / "oracles" / "shampoo_meta.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", META["runs"], ids=_told_apart)
def test_is_facebookresearchs(run: dict[str, Any]) -> None:
    """The weights that their code gave; the file says how they were made."""
    problem = random_problem([(5,), (3, 2), (4, 2, 3)], seed=11, steps=8)
    settings = run["settings"] | {"betas": tuple(run["settings"]["betas"])}
    actual = by_optimizer(lambda p: piste.Shampoo(p, engine="reference", **settings), problem)
    assert_same(actual[-1:], [[np.array(w) for w in run["weights"]]], 1e-10, 1e-11)


# --- inverse roots ----------------------------------------------------------------------------------------------------


def symmetric(values: torch.Tensor, count: int = 1) -> torch.Tensor:
    """Random symmetric matrices with these eigenvalues."""
    n = len(values)
    bases, _ = torch.linalg.qr(torch.randn(count, n, n, generator=torch.Generator().manual_seed(n), dtype=values.dtype))
    return (bases * values) @ bases.mT


@pytest.mark.parametrize("method", [root_by_eigen, root_by_newton])
@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("decades", [2, 4, 6])
def test_inverse_roots(method: Any, p: int, decades: int) -> None:
    """X^p A = I, in float64 to 1e-8; in float32 as far as its digits go with eigenvalues so far apart."""
    values = torch.logspace(-decades, 0, 20, dtype=torch.float64)
    stack = symmetric(values, 3)
    root, residual = method(stack, 1 / p, 0.0, relative=False)
    eye = torch.eye(20, dtype=torch.float64)
    assert (torch.linalg.matrix_power(root, p) @ stack - eye).abs().max() < 1e-8
    assert residual.max() < 1e-8
    single, residual = method(stack.float(), 1 / p, 1e-6, relative=True)
    exact, _ = root_by_eigen(stack, 1 / p, 1e-6, relative=True)
    assert (single - exact).abs().max() / exact.abs().max() < 2e-7 * 10**decades
    assert residual.max() < 0.01


def test_a_root_that_fails_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    stack = symmetric(torch.logspace(-2, 0, 6), 3)
    stack[1, 0, 0] = torch.nan
    old = torch.full_like(stack, 7.0)
    for method in ("eigen", "newton"):
        found, failed = inverse_roots(stack, old, 0.25, 1e-6, method=method, relative=True)
        assert failed == 1
        assert torch.equal(found[1], old[1])
        assert torch.isfinite(found).all()
        assert not (found[[0, 2]] == 7.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [5, 31])  # of an odd size every other one is not aligned
def test_newton_on_a_matrix_does_not_depend_on_its_stack(size: int, dtype: torch.dtype) -> None:
    """They converge at different paces: bit by bit what each gives alone, also in an order of another process."""
    stack = torch.cat([symmetric(torch.logspace(-decades, 0, size, dtype=dtype), 1) for decades in (6, 0, 3, 1, 5)])
    roots, residuals = root_by_newton(stack, 0.25, 1e-4, relative=True)
    for chosen in ([0], [1], [2], [3, 0], [4, 2, 1]):
        some, residual = root_by_newton(stack[chosen], 0.25, 1e-4, relative=True)
        assert torch.equal(some, roots[chosen])
        assert torch.equal(residual, residuals[chosen])


def test_the_largest_eigenvalue_rests_where_it_is_found() -> None:
    """One that would take long does not move the others; eight rows, whose products are not rounded by place."""
    stack = torch.cat([symmetric(torch.logspace(-d, 0, 8, dtype=torch.float64), 1) for d in (0.1, 6, 1)])
    together = largest_eigenvalue(stack)
    assert torch.equal(together, torch.cat([largest_eigenvalue(matrix[None]) for matrix in stack]))
    torch.testing.assert_close(together[1:], torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0.0)


def test_newton_falls_back_on_eigenvalues() -> None:
    """A matrix of zeros has no root that products could find; by eigenvalues the ridge alone gives one."""
    stack = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    found, failed = inverse_roots(stack, torch.zeros_like(stack), 0.25, 1e-4, method="newton", relative=False)
    assert failed == 0
    torch.testing.assert_close(found[0], 10 * torch.eye(4), rtol=1e-4, atol=1e-4)


def test_roots_are_worked_out_in_full_precision() -> None:
    """Whatever the user allows for float32 products, through either of torch's two ways to say so, and for long."""
    seen: list[str] = []
    real = torch.linalg.eigh

    def spy(stack: torch.Tensor) -> Any:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return real(stack)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with mock.patch("torch.linalg.eigh", spy):
            inverse_roots(torch.eye(3)[None], torch.eye(3)[None], 0.5, 0.0, method="eigen", relative=False)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"]


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_merged_axes() -> None:
    assert merged((1, 2, 512, 1, 2048, 1, 3, 4), 1024, backwards=False) == (1024, 2048, 12)
    assert merged((32, 3, 64, 64), 8192, backwards=True) == (96, 4096)
    assert merged((32, 3, 64, 64), 8192, backwards=False) == (6144, 64)
    assert merged((), 10, backwards=True) == merged((1, 1), 10, backwards=False) == (1,)


def test_blocks_and_their_factors() -> None:
    """A 5 x 3 weight in blocks of 2: the identity changes nothing, a gram is that of its block, norms are blocks'."""
    how = kronecker(2, 1)
    stack = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(1))
    flat = how.identity(stack[0]).expand(3, -1)
    torch.testing.assert_close(how.times(stack, flat), stack)
    gram = how.gram(stack)
    layout = how.layout((5, 3))
    assert sorted(kind.shape for kind in layout.kinds) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert gram.shape == (3, layout.total)
    first = next(view for kind, axis, view in layout.factors(gram) if layout.kinds[kind].shape == (2, 2) and axis == 0)
    torch.testing.assert_close(first[:, 0], stack[:, :2, :2] @ stack[:, :2, :2].mT)
    norms = how.norms(stack)
    torch.testing.assert_close(norms[:, 1, 0], torch.linalg.vector_norm(stack[:, :2, :2], dim=(1, 2)))
    torch.testing.assert_close(norms[:, 4, 2], stack[:, 4, 2].abs())


def test_costs_are_worked_out_without_memory() -> None:
    """137 GB of factors and roots, on the meta device."""
    with torch.device("meta"):
        model = nn.Linear(2**17, 2**17, bias=False)
    for name, each in (("shampoo", 24.0), ("soap", 8.0)):  # SOAP leaves axes above 10,000 alone
        cost = piste.estimate_memory(model, name)
        assert cost.state / cost.parameters == each


# --- awkward gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["meta", "google"])
@pytest.mark.parametrize("root", ["eigen", "newton"])
@pytest.mark.parametrize("factors", ["fp32", "bf16"])
def test_survives(form: str, root: str, factors: str) -> None:
    """Numbers, vectors, tall, wide, rank 4, of one rank, zeros: every step is finite, in float32 and bfloat16."""
    shapes = [(), (5,), (40, 2), (2, 40), (4, 3, 2, 2), (8, 8), (6, 6)]
    for dtype in (torch.float32, torch.bfloat16):
        params = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]
        settings = {"graft": "adam" if form == "meta" else "sgd", "every": 2, "start": 2, "block_size": 16}
        optimizer = piste.Shampoo(params, lr=0.01, form=form, root=root, factors=factors, **settings)
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            for p in params[:-2]:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            params[-2].grad = torch.outer(torch.arange(8.0), torch.ones(8)).to(dtype)
            params[-1].grad = torch.zeros(6, 6, dtype=dtype)
            optimizer.step()
        assert all(torch.isfinite(p).all() for p in params)
        assert torch.equal(params[-1], torch.ones(6, 6, dtype=dtype))
        assert not torch.equal(params[-2], torch.ones(8, 8, dtype=dtype))
        kept = optimizer.state[params[2]]
        assert kept["factors"].dtype == kept["roots"].dtype == (torch.bfloat16 if factors == "bf16" else torch.float32)


def test_nan_keeps_the_last_root_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = piste.Shampoo([bad, good], every=1, start=1, merge_dims=False)
    for value in (1.0, torch.nan):
        bad.grad, good.grad = torch.full((3, 3), value), torch.eye(3)
        with caplog.at_level(logging.WARNING, "piste"):
            optimizer.step()
    assert "2 of 4 inverse roots of size 3 failed" in caplog.text
    assert torch.isfinite(optimizer.state[bad]["roots"]).all()
    assert torch.isfinite(good).all()
    skipping = piste.Shampoo([good], nonfinite="skip")
    good.grad = torch.full((3, 3), torch.nan)
    skipping.step()
    assert skipping.last_step.skipped


def test_roots_rest_between_refreshes() -> None:
    """And no step builds a plan once all of its kinds have been seen."""
    from piste import execution

    (p,) = (nn.Parameter(torch.ones(4, 3)),)
    optimizer = piste.Shampoo([p], every=5, start=3)
    rng = np.random.default_rng(1)
    changed = []
    for step in range(1, 31):
        p.grad = torch.tensor(rng.normal(size=(4, 3)), dtype=torch.float32)
        before = optimizer.state[p]["roots"].clone() if "roots" in optimizer.state[p] else None
        optimizer.step()
        if before is not None and not torch.equal(before, optimizer.state[p]["roots"]):
            changed.append(step)
        if step == 10:
            built = execution.plans_built()
    assert changed == [3, 5, 10, 15, 20, 25, 30]
    assert execution.plans_built() == built


def test_refused() -> None:
    w = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"exponent=0\.3 with root='newton'"):
        piste.Shampoo([w], root="newton", exponent=0.3)
    for option, value in (("root", "newton"), ("relative_eps", True)):
        with pytest.raises(ValueError, match=f"{option}={value!r} with corrected=True; legal"):
            piste.Shampoo([w], corrected=True, **{option: value})
    for option in ({"nesterov": True}, {"average_momentum": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=True with form='meta'; legal: False"):
            piste.Shampoo([w], **option)
    with pytest.raises(ValueError, match=r"beta3=0\.5 with form='google'; legal: None"):
        piste.Shampoo([w], form="google", beta3=0.5)
    with pytest.raises(ValueError, match="corrected=True with form='google'"):
        piste.Shampoo([w], form="google", corrected=True)
    with pytest.raises(ValueError, match="sides='left'; legal: 'all' or 'one'"):
        piste.Shampoo([w], sides="left")
    with pytest.raises(ValueError, match="block_size=0"):
        piste.Shampoo([w], block_size=0)
    with pytest.raises(ValueError, match=r"betas=\(1\.0, 0\.9\)"):
        piste.Shampoo([w], betas=(1.0, 0.9))


# --- symmetric products and refreshes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 384, 401])
def test_symmetric_products(n: int) -> None:
    """Half of them and its mirror image, below and above the size from which on that is done, with what was there."""
    rows = torch.randn(2, n, 200, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    before = rows @ rows.mT + torch.eye(n)
    found = outer(rows, before.clone().view(1, 2, n, n), beta=0.75, alpha=0.5)[0]
    torch.testing.assert_close(found, 0.75 * before + 0.5 * rows @ rows.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [7, 384, 401])
@pytest.mark.parametrize("transposed", [False, True])
def test_triangular_products(n: int, transposed: bool) -> None:
    """Below and above the size from which on zeros are left out; of what is given as a transpose, too."""
    upper = torch.randn(2, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).triu()
    x = torch.randn(2, 30, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mT
    expected = (upper.mT if transposed else upper) @ x
    torch.testing.assert_close(triangular_products(upper, x, transposed=transposed), expected, rtol=1e-12, atol=1e-12)


def test_a_decomposition_that_is_wrong_shows_in_its_residual() -> None:
    """Also one whose vectors are not orthogonal, or where a single entry of many is off."""
    stack = symmetric(torch.logspace(-2, 0, 50), 1)
    values, vectors = torch.linalg.eigh(stack)
    assert eigen(stack)[2] < 1e-5
    spoilt = vectors.clone()
    spoilt[0, 3, 49] += 0.5
    for wrong in (0.5 * vectors, spoilt, vectors.flip(-1)):
        with mock.patch("torch.linalg.eigh", lambda _, wrong=wrong: (values, wrong)):
            assert eigen(stack)[2] > MOST_RESIDUAL


def test_last_step_tells_of_renewals() -> None:
    p = nn.Parameter(torch.eye(3))
    google = piste.Shampoo([p], form="google", every=3)
    soap = piste.SOAP([p], every=2)
    adamw = piste.AdamW([p])
    told: dict[str, list[bool]] = {"google": [], "soap": [], "adamw": []}
    for _ in range(7):
        p.grad = torch.ones(3, 3)
        for name, optimizer in (("google", google), ("soap", soap), ("adamw", adamw)):
            optimizer.step()
            told[name].append(optimizer.last_step.renewed)
    assert told["google"] == [True, False, False, True, False, False, True]
    assert told["soap"] == [True, False, True, False, True, False, True]
    assert not any(told["adamw"])
