"""PSGD with Kronecker factors: against kron_torch and formulas, what whitening means, probes, schedule, failures."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import matrix
from oracles.replay import assert_same, by_formula, by_optimizer, random_problem, set_gradients
from torch import nn

import piste
from piste.whitening import whitening

PROBLEM = random_problem([(), (5,), (3, 4), (2, 3, 4), (4, 3, 2, 2), (1, 7)], seed=14, steps=12)
KRON = json.loads((Path(__file__).parent / "oracles" / "kron_torch.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", KRON["runs"], ids=lambda run: "-".join(run["settings"]))
def test_is_kron_torchs(run: dict[str, Any]) -> None:
    """The weights that their code gave with the same probes; the file says how they were made."""
    problem = random_problem([(5,), (3, 2), (4, 6), (1, 7), (2, 3, 4)], seed=13, steps=10)
    actual = by_optimizer(lambda p: piste.PSGDKron(p, engine="reference", **run["settings"]), problem)
    assert_same(actual[-1:], [[np.array(w) for w in run["weights"]]], 1e-11, 1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.0, "clip_rms": None, "seed": 3},
        {"whiten": "gradient", "weight_decay": 0.3, "diagonal": "longest"},
        {"merge_dims": False, "max_size": 3, "init_scale": 2.0, "decoupled_weight_decay": False, "weight_decay": 0.3},
        {"flat_start": 3, "probability_decay": 0.3, "least_probability": 0.4, "diagonal": "all"},
    ],
    ids=str,
)
def test_is_the_formula(settings: dict[str, Any]) -> None:
    ours = {"lr": 0.05} | settings
    actual = by_optimizer(lambda p: piste.PSGDKron(p, engine="reference", **ours), PROBLEM)
    assert_same(actual, by_formula(matrix.psgd_kron, PROBLEM, ours), 1e-12, 1e-13)


# --- whitening --------------------------------------------------------------------------------------------------------


def test_a_fitted_preconditioner_whitens() -> None:
    """Normal gradients a hundred times as large along some axes come out with nearly the identity as covariance."""
    how, generator = whitening(None, "none", merge=True), torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    left, right = left * torch.tensor([10.0, 3.0, 1.0, 0.1]), torch.tensor([10.0, 1.0, 0.3]).double()
    flat = how.identity(torch.zeros(4, 3)).double()[None]
    for step in range(1, 1201):
        g = left @ torch.randn(4, 3, generator=generator, dtype=torch.float64) * right
        flat = how.fitted(g[None], flat, 0.1 if step < 900 else 0.01, 0, step, 0.0)
    q1, q2 = (q[0] for q in how.factors(flat, (4, 3)))
    whole = torch.kron(q1.T @ q1 @ left, q2.T @ q2 * right)
    torch.testing.assert_close(whole @ whole.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=0.35)
    assert torch.equal(q1, torch.triu(q1))


def test_balancing_leaves_the_product() -> None:
    how = whitening(None, "none", merge=False)
    flat = torch.cat([4.0 * torch.eye(2).flatten(), 0.25 * torch.triu(torch.ones(3, 3)).flatten()])[None]
    x = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(2))
    balanced = how.fitted(x, flat, 0.0, 0, 1, 1.0)
    assert [float(q.abs().max()) for q in how.factors(balanced, (2, 3))] == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(how.whitened(x, balanced), how.whitened(x, flat))


def test_every_hundredth_update_balances() -> None:
    p = nn.Parameter(torch.zeros(2, 3))
    optimizer = piste.PSGDKron([p], factor_lr=0.0, lr=0.0)
    p.grad = torch.ones(2, 3)
    optimizer.step()
    optimizer.state[p]["factors"][:4] *= 16.0  # and with no steps of the factors nothing else changes them
    for step in range(2, 101):
        assert float(optimizer.state[p]["factors"].max()) == 16.0, step
        optimizer.step()
    assert float(optimizer.state[p]["factors"].max()) == pytest.approx(4.0)


def test_a_matrix_is_the_most_nearly_square() -> None:
    how = whitening(8192, "none", merge=True)
    assert how.axes((64, 32, 3, 3)) == (64, 288)
    assert how.axes((2, 3, 30)) == (6, 30)
    assert how.axes(()) == (1,)
    assert whitening(None, "none", merge=False).axes((2, 3, 4)) == (2, 3, 4)
    assert how.sizes((9000, 4)) == [(9000,), (4, 4)]
    assert how.sizes((5,)) == [(5,)]
    assert whitening(None, "longest", merge=True).sizes((3, 4)) == [(3, 3), (4,)]


# --- probes and schedule ----------------------------------------------------------------------------------------------


def _factors_after(steps: int, shapes: list[tuple[int, ...]], seed: int = 0) -> list[torch.Tensor]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = piste.PSGDKron(params, seed=seed)
    for _ in range(steps):
        torch.randn(3)  # what others draw means nothing
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return [optimizer.state[p]["factors"] for p in params]


def test_probes_follow_from_seed_step_and_shape() -> None:
    """Not from the order of weights, nor from who else has a gradient, nor from other people's random numbers."""
    (alone,) = _factors_after(3, [(4, 3)])
    torch.manual_seed(7)
    first, second, _ = _factors_after(3, [(4, 3), (4, 3), (2, 2)])
    assert torch.equal(first, alone)
    assert torch.equal(second, alone)
    (other,) = _factors_after(3, [(4, 3)], seed=1)
    assert not torch.equal(other, alone)


def test_updates_are_as_many_as_probabilities_add_up_to() -> None:
    """Each of the first steps has one; then they thin out, and no new plan is built for it."""
    from piste import execution

    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = piste.PSGDKron([p], lr=0.0, flat_start=5, probability_decay=0.1, least_probability=0.1)
    changed, expected, built = [], 0.0, 0
    for step in range(1, 151):
        p.grad = torch.eye(2)
        before = optimizer.state[p]["factors"].clone() if step > 1 else torch.zeros(8)
        optimizer.step()
        if not torch.equal(before, optimizer.state[p]["factors"]):
            changed.append(step)
        expected += min(1.0, max(0.1, float(np.exp(-0.1 * (step - 0.5 - 5)))))
        if step == 30:
            built = execution.plans_built()
        assert abs(len(changed) - expected) <= 1, step
    assert changed[:6] == [1, 2, 3, 4, 5, 6] or changed[:5] == [1, 2, 3, 4, 5]
    assert changed[-2] - changed[-3] == 10
    assert execution.plans_built() == built


# --- awkward gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survives(factors: str, dtype: torch.dtype) -> None:
    """Numbers, vectors, tall, wide, rank 4, of one rank, zeros: every step is finite and no longer than the clip."""
    shapes = [(), (5,), (40, 2), (2, 40), (4, 3, 2, 2), (8, 8), (6, 6)]
    params = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]
    optimizer = piste.PSGDKron(params, lr=0.01, factors=factors)
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        before = [p.detach().clone() for p in params]
        for p in params[:-2]:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        params[-2].grad = torch.outer(torch.arange(8.0), torch.ones(8)).to(dtype)
        params[-1].grad = torch.zeros(6, 6, dtype=dtype)
        optimizer.step()
        for p, b in zip(params, before, strict=True):
            step = (p.detach() - b).float().square().mean().sqrt()
            assert step <= 0.011 * (1.001 if dtype == torch.float32 else 2.0)
    assert torch.equal(params[-1], torch.ones(6, 6, dtype=dtype))
    assert not torch.equal(params[-2], torch.ones(8, 8, dtype=dtype))
    kept = optimizer.state[params[2]]["factors"]
    assert kept.dtype == (torch.bfloat16 if factors == "bf16" else torch.float32)
    assert torch.isfinite(kept).all()


def test_nan_keeps_the_last_factors_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = piste.PSGDKron([bad, good])
    set_gradients([bad, good], [np.eye(3), np.eye(3)])
    optimizer.step()
    before = optimizer.state[bad]["factors"].clone()
    bad.grad.fill_(torch.nan)
    with caplog.at_level(logging.WARNING, "piste"):
        optimizer.step()
    assert "1 of 2 whitening factors failed" in caplog.text
    assert torch.equal(optimizer.state[bad]["factors"], before)
    assert torch.isfinite(good).all()
    skipping = piste.PSGDKron([good], nonfinite="skip")
    good.grad.fill_(torch.nan)
    skipping.step()
    assert skipping.last_step.skipped
    assert not skipping.state[good]


def test_refused() -> None:
    w = nn.Parameter(torch.zeros(3, 3))
    for option, value in (("diagonal", "some"), ("least_probability", 0.0), ("clip_rms", 0.0), ("momentum", 1.0)):
        with pytest.raises(ValueError, match=f"PSGDKron got {option}={value!r}; legal"):
            piste.PSGDKron([w], **{option: value})
