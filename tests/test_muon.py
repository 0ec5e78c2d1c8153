"""Muon: against torch, against its polynomials, on awkward matrices, and the routing of a model's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from oracles import matrix
from oracles.replay import assert_same, by_formula, by_optimizer, parameters, random_problem, set_gradients
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import piste
from piste.costs import flops
from piste.orthogonal import ITERATIONS, orthogonalizer

MATRICES = random_problem([(6, 4), (4, 6), (5, 5), (1, 7)], seed=3, steps=8)
FILTERS = random_problem([(6, 4), (6, 2, 3), (6, 2, 2, 2), (6, 1, 2, 2, 2)], seed=4, steps=5)


@pytest.fixture
def without_bfloat16() -> Iterator[None]:
    """torch's iterations run in bfloat16 whatever they are given; this lets them run in what they are given."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone, create=True):
        yield


@pytest.mark.parametrize(("scale", "theirs"), [("keller", "original"), ("moonlight", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.usefixtures("without_bfloat16")
def test_is_torchs(scale: str, theirs: str, nesterov: bool) -> None:
    shared: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.8, "nesterov": nesterov}
    expected = by_optimizer(lambda p: torch.optim.Muon(p, adjust_lr_fn=theirs, **shared), MATRICES)
    assert_same(by_optimizer(lambda p: piste.Muon(p, scale=scale, **shared), MATRICES), expected, 1e-12, 1e-13)


def test_is_torchs_in_bfloat16() -> None:
    """As torch comes: an update of about one, worked out in eight bits, over eight steps."""
    shared: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3}
    expected = by_optimizer(lambda p: torch.optim.Muon(p, **shared), MATRICES, torch.float32)
    ours = by_optimizer(lambda p: piste.Muon(p, scale="keller", precision="bf16", **shared), MATRICES, torch.float32)
    assert_same(ours, expected, 0.0, 8 * 0.05 * 2**-6)


@pytest.mark.usefixtures("without_bfloat16")
def test_goes_on_from_torch_and_back() -> None:
    """Three steps by one, the state handed over, and the rest by the other: as if one had taken all."""
    shared: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3}

    def made(params: list[nn.Parameter], ours: bool) -> torch.optim.Optimizer:
        return piste.Muon(params, scale="keller", **shared) if ours else torch.optim.Muon(params, **shared)

    straight = by_optimizer(lambda p: made(p, ours=True), MATRICES)[-1]
    for first in (True, False):
        params = parameters(MATRICES)
        optimizers = {ours: made(params, ours) for ours in (True, False)}
        for step, row in enumerate(MATRICES.gradients):
            if step == 3:
                before = optimizers[first]
                saved = before.torch_state_dict() if isinstance(before, piste.Muon) else before.state_dict()
                optimizers[not first].load_state_dict(saved)
            set_gradients(params, row)
            optimizers[first if step < 3 else not first].step()
        assert_same([[p.detach().numpy() for p in params]], [straight], 1e-12, 1e-13)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": "spectral"},
        {"scale": "keller", "iteration": "polar_express"},
        {"iteration": "polar_express", "steps": 7, "nesterov": False},
        {"iteration": "deflated"},
        {"iteration": "deflated", "steps": 6, "split": 2},
        {"steps": 2, "momentum": 0.0},
        {"split": 3},
        {"split": 6, "scale": "spectral", "decoupled_weight_decay": False},
    ],
    ids=str,
)
def test_is_the_formula(settings: dict[str, Any]) -> None:
    """All ranks of matrices, and blocks of rows; also a weight in a group with a rule of its own."""
    ours = {"lr": 0.05, "weight_decay": 0.3} | settings
    expected = by_formula(matrix.muon, FILTERS, ours)
    assert_same(by_optimizer(lambda p: piste.Muon(p, **ours), FILTERS), expected, 1e-11, 1e-12)
    each = [ours, ours | {"rule": "adamw"}, ours, ours]
    groups = [{"rule": "auto"}, {"rule": "adamw"}, {"rule": "muon"}, {"rule": "muon"}]

    def grouped(params: list[nn.Parameter]) -> piste.Muon:
        return piste.Muon([{"params": [p], **g} for p, g in zip(params, groups, strict=True)], **ours)

    assert_same(by_optimizer(grouped, FILTERS), by_formula(matrix.muon, FILTERS, each), 1e-11, 1e-12)


@pytest.mark.parametrize(
    "settings", [{}, {"row_beta": 0.5, "scale": "keller", "split": 2}, {"iteration": "deflated"}], ids=str
)
def test_normuon_is_its_formula(settings: dict[str, Any]) -> None:
    ours = {"lr": 0.05, "weight_decay": 0.3} | settings
    expected = by_formula(matrix.normuon, FILTERS, ours)
    assert_same(by_optimizer(lambda p: piste.NorMuon(p, **ours), FILTERS), expected, 1e-11, 1e-12)


def test_transposed_weights_have_the_length_of_what_they_stand_for() -> None:
    """A weight that is kept as (in, out) moves as its transpose does."""
    for scale in ("keller", "moonlight", "spectral"):
        upright, turned = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4, 6))
        upright.grad = torch.tensor(MATRICES.gradients[0][0], dtype=torch.float32)
        turned.grad = upright.grad.t().clone()
        piste.Muon([upright], scale=scale).step()
        piste.Muon([turned], scale=scale, transposed=True).step()
        torch.testing.assert_close(turned.t(), upright)


@pytest.mark.parametrize(
    ("iteration", "least", "low", "high"), [("quintic", 0.01, 0.68, 1.135), ("polar_express", 0.001, 0.84, 1.145)]
)
def test_iterations_bring_singular_values_near_one(iteration: str, least: float, low: float, high: float) -> None:
    values = torch.logspace(np.log10(least), 0, 2000, dtype=torch.float64)
    x = values / 1.02 if iteration == "polar_express" else values.clone()
    for a, b, c in ITERATIONS[iteration].polynomials(5):
        x = a * x + b * x**3 + c * x**5
    assert low < x.min() < low + 0.01
    assert high - 0.01 < x.max() < high


@pytest.mark.parametrize("shape", [(66, 70), (150, 64), (64, 150), (1, 5), (5, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_deflation_is_its_formula(shape: tuple[int, int], decay: float) -> None:
    """In float64, of flat and of falling singular values, by both ways of iterating; scales far off, and zeros."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    x = (left * values * torch.exp(-decay * torch.arange(len(values)))) @ right
    found = orthogonalizer("deflated", "fp32")(torch.stack([x, 1e-30 * x, 1e200 * x, 0 * x]), 3, 1)
    expected = torch.from_numpy(matrix.orthogonal(x.numpy(), "deflated", 3))
    # a Krylov space of falling singular values is known to fewer digits than the matrix
    torch.testing.assert_close(found[:3], expected.expand(3, *shape), rtol=0, atol=1e-9)
    assert not found[3].any()


def test_polynomials_are_the_best_for_what_the_last_one_left() -> None:
    triples = ITERATIONS["deflated"].triples
    best = matrix.best_polynomials([(1, 3, 5), (1, 3, 5), (1, 3), (1, 3)], 0.025, 1.01)
    for triple, expected in zip(triples, best, strict=False):
        np.testing.assert_allclose(triple[: len(expected)], expected, rtol=1e-9)
    assert triples[len(best) :] == ((1.5, -0.5, 0.0),)


def falling(n: int, power: float) -> torch.Tensor:
    """A matrix with singular values i^-power."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
    return (left * torch.arange(1.0, n + 1) ** -power) @ right


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_steps_after_a_deflation_are_nearer_than_five_quintics(power: float, precision: str) -> None:
    """To U V^T, per direction; where one singular value is nearly all there is, by far."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(4)) if power == 0 else falling(256, power)
    left, _, right = torch.linalg.svd(x)
    errors = {
        name: float(torch.linalg.matrix_norm(orthogonalizer(name, precision)(x[None], steps, 1)[0] - left @ right)) / 16
        for name, steps in (("quintic", 5), ("deflated", 3), ("polar_express", 3))
    }
    assert errors["deflated"] < 0.9 * errors["quintic"]
    assert errors["deflated"] < 0.6 * errors["polar_express"]  # three steps alone do not do it


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_deflation_at_the_ends_of_the_range(precision: str, size: float) -> None:
    x = falling(64, 0.5)[None]
    orthogonalize = orthogonalizer("deflated", precision)
    atol = 1e-3 if precision == "fp32" else 0.1  # powers of ten round, and bfloat16 rounds each otherwise
    torch.testing.assert_close(orthogonalize(size * x, 3, 1), orthogonalize(x, 3, 1), rtol=0, atol=atol)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_deflation_keeps_what_is_not_finite_to_itself(bad: float) -> None:
    good = falling(32, 1.0)
    spoilt = good.clone()
    spoilt[3, 4] = bad
    found = orthogonalizer("deflated", "fp32")(torch.stack([spoilt, good]), 3, 1)
    assert torch.isnan(found[0]).any()
    torch.testing.assert_close(found[1], orthogonalizer("deflated", "fp32")(good[None], 3, 1)[0], rtol=0, atol=1e-5)


def test_each_iteration_has_its_usual_number_of_steps_and_its_cost() -> None:
    """Two products for a step without a fifth power, three for others, as torch counts them."""
    for iteration, steps in (("quintic", 5), ("polar_express", 5), ("deflated", 3)):
        given = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
        for p, chosen in zip(given, (None, steps), strict=True):
            p.grad = falling(64, 1.0)
            optimizer = piste.Muon([p], rule="muon", iteration=iteration, steps=chosen)
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
        assert torch.equal(*given)
        by_formula = flops(orthogonalizer(iteration, "auto"), (64, 64), (steps, 1))
        assert counter.get_total_flops() <= by_formula <= 1.3 * counter.get_total_flops()  # QR is not counted


def test_a_graph_cannot_record_a_deflation() -> None:
    with pytest.raises(ValueError, match="capturable"):
        piste.Muon([nn.Parameter(torch.zeros(8, 8))], rule="muon", iteration="deflated", capturable=True)


@pytest.mark.parametrize("iteration", ITERATIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_awkward_matrices(iteration: str, precision: str) -> None:
    """Zeros stay zeros, small matrices give no smaller steps, and directions without rank get none."""
    orthogonalize = orthogonalizer(iteration, precision)
    generator = torch.Generator().manual_seed(1)
    tall, wide = torch.randn(9, 2, generator=generator), torch.randn(2, 5, generator=generator)
    stack = torch.stack([torch.zeros(9, 5), tall @ wide, 1e-3 * tall @ wide])
    found = orthogonalize(stack, ITERATIONS[iteration].steps, 1)
    assert found.dtype == stack.dtype
    assert not found[0].any()
    assert (torch.linalg.svdvals(found)[1:, :2] - 1).abs().max() < 0.35
    if precision == "fp32":  # in bfloat16 the rounding of the matrix itself has full rank and is made orthogonal, too
        torch.testing.assert_close(found[1], found[2], rtol=0.01, atol=0.005)
        assert torch.linalg.svdvals(found[1])[2] < 1e-3


def test_the_size_of_gradients_means_nothing() -> None:
    updates = []
    for size in (1.0, 1e4):
        (p,) = (nn.Parameter(torch.zeros(4, 3)),)
        optimizer = piste.Muon([p])
        for row in MATRICES.gradients[:3]:
            p.grad = size * torch.tensor(row[1][:, :3], dtype=torch.float32)
            optimizer.step()
        updates.append(p.detach())
    torch.testing.assert_close(*updates)


def test_matrices_of_equal_shape_go_in_one_stack() -> None:
    sizes: list[tuple[int, ...]] = []
    real = torch.baddbmm

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(tuple(x.shape))
        return real(x, *args, **kwargs)

    params = [nn.Parameter(torch.zeros(4, 3)) for _ in range(24)]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 1.0 + i)
    with mock.patch("torch.baddbmm", spy):
        piste.Muon(params, steps=1).step()
    assert sizes == [(24, 3, 3), (24, 3, 3), (24, 3, 4)]


def test_nan_is_skipped_and_reported_or_stays_where_it_came_from() -> None:
    bad, good = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    bad.grad, good.grad = torch.full((3, 3), torch.nan), torch.eye(3)
    optimizer = piste.Muon([bad, good], nonfinite="skip")
    optimizer.step()
    assert optimizer.last_step.skipped
    assert torch.equal(bad, torch.ones(3, 3))
    piste.Muon([bad, good]).step()
    assert torch.isnan(bad).all()
    assert torch.isfinite(good).all()


# --- routing --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Language(nn.Module):
    def __init__(self, *, tied: bool = False, first: bool = False) -> None:
        super().__init__()
        if first:
            self.head = nn.Linear(8, 30)
        self.tokens, self.positions = nn.Embedding(30, 8), nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        if not first:
            self.head = nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def routed(model: nn.Module, **options: Any) -> dict[str, tuple[str, int]]:
    """What becomes of each weight of more than one axis; that vectors go to AdamW is checked here."""
    found = {}
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    for group in piste.Muon.groups(model, **options):
        for name in group["param_names"]:
            if shapes[name] > 1:
                found[name] = (group["rule"], group["split"])
            else:
                assert group["rule"] == "adamw", name
    assert set(found) == {name for name, ndim in shapes.items() if ndim > 1}
    return found


def test_a_language_model() -> None:
    hidden = {
        "attention.in_proj_weight": ("muon", 3),
        "attention.out_proj.weight": ("muon", 1),
        "up.weight": ("muon", 1),
        "down.weight": ("muon", 1),
    }
    expected = {f"blocks.{i}.{name}": route for i in range(2) for name, route in hidden.items()}
    expected |= dict.fromkeys(("tokens.weight", "positions.weight"), ("adamw", 1))
    assert routed(Language()) == expected | {"head.weight": ("adamw", 1)}
    assert routed(Language(tied=True)) == expected


def test_a_head_that_cannot_be_told_is_asked_for() -> None:
    model = Language(first=True)
    with pytest.raises(ValueError, match=r"blocks\.1\.down\.weight.*heads="):
        piste.Muon.groups(model)
    assert routed(model, heads=["head"])["head.weight"][0] == "adamw"
    assert routed(model, heads=["head"])["blocks.1.down.weight"][0] == "muon"
    assert routed(model, heads=())["head.weight"][0] == "muon"
    with pytest.raises(ValueError, match="heads='haed'"):
        piste.Muon.groups(model, heads=["haed"])


@pytest.mark.parametrize("shelf", [nn.ModuleList, lambda layers: nn.ModuleDict({"a": layers[0], "b": layers[1]})])
def test_one_of_several_heads_is_not_taken_for_the_head(shelf: Any) -> None:
    """In a list or dictionary of layers nothing says which comes last; in a Sequential the place does."""
    model = nn.Sequential(nn.Linear(4, 8), shelf([nn.Linear(8, 2), nn.Linear(8, 3)]))
    with pytest.raises(ValueError, match=r"'1\.(1|b)\.weight'.*heads="):
        piste.Muon.groups(model)
    assert {name for name, (rule, _) in routed(model, heads=["1"]).items() if rule == "muon"} == {"0.weight"}
    chain = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert {name for name, (rule, _) in routed(chain).items() if rule == "adamw"} == {"1.2.weight"}


def test_convolutions_and_recurrent_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 6, 3),
        nn.LSTM(6, 5, proj_size=2),
        nn.GRU(5, 4),
        nn.RNN(4, 4),
        nn.Linear(4, 2),
    )
    found = routed(model)
    assert found["0.weight"] == ("muon", 2)
    assert found["2.weight"] == ("muon", 1)
    assert found["3.weight_ih_l0"] == found["3.weight_hh_l0"] == ("muon", 4)
    assert found["3.weight_hr_l0"] == ("muon", 1)
    assert found["4.weight_hh_l0"] == ("muon", 3)
    assert found["5.weight_ih_l0"] == ("muon", 1)
    assert found["6.weight"] == ("adamw", 1)
    assert [g["transposed"] for g in piste.Muon.groups(model) if "2.weight" in g["param_names"]] == [True]


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


def test_weights_of_unknown_modules_go_to_adamw_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Strange(), nn.Linear(4, 4), nn.Linear(4, 2))
    with caplog.at_level(logging.WARNING, "piste"):
        assert routed(model)["0.weight"] == ("adamw", 1)
    assert "Strange" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "piste"):
        assert routed(model, matrices=(Strange,))["0.weight"] == ("muon", 1)
        assert routed(model, aux=(Strange,))["0.weight"] == ("adamw", 1)
    assert not caplog.text


def test_create_sorts_by_itself_and_shows_it() -> None:
    shown: list[str] = []
    optimizer = piste.create("muon", Language(), lr=3e-3, weight_decay=0.2, aux_lr=1e-3, table=shown.append)
    rules = {(g["rule"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups}
    assert rules == {("muon", 0.2, 3e-3), ("adamw", 0.2, 1e-3), ("adamw", 0.0, 1e-3)}
    (text,) = shown
    assert "rule" in text.splitlines()[0]
    assert any("muon" in line and "blocks.*.up.weight x2" in text for line in text.splitlines())
    with pytest.raises(ValueError, match="heads"):
        piste.create("adamw", Language(), heads=())


@pytest.mark.parametrize("cls", [piste.Muon, piste.NorMuon])
def test_bare_parameters_are_taken_with_a_word(cls: type[piste.Muon], caplog: pytest.LogCaptureFixture) -> None:
    """By create and by the class; not where somebody has said what weights are, nor for vectors."""
    model = nn.Linear(3, 2)
    with caplog.at_level(logging.WARNING, "piste"):
        piste.create(cls.__name__, model.parameters(), weight_decay=0.0)
        assert f"{cls.__name__} goes by shapes for 1 weights: embeddings and heads" in caplog.text
        caplog.clear()
        optimizer = cls([model.bias])
        optimizer.add_param_group({"params": [model.weight]})
        assert len(caplog.records) == 1
        caplog.clear()
        cls([model.weight], rule="muon")
        cls(cls.groups(model, heads=()))
    assert not caplog.text


def test_a_vector_or_a_split_that_does_not_fit_is_refused() -> None:
    vector, square = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"rule='muon' for a weight of shape \(4,\)"):
        piste.Muon([{"params": [vector], "rule": "muon"}])
    with pytest.raises(ValueError, match="split=3 for a weight of 4 rows"):
        piste.Muon([square], split=3)
    optimizer = piste.Muon([square])
    with pytest.raises(ValueError, match="rule='muon'"):
        optimizer.add_param_group({"params": [vector], "rule": "muon"})
    assert len(optimizer.param_groups) == 1


def test_one_state_dict_for_both_rules() -> None:
    """Each weight has the states of its rule; saved, loaded by name in another order, and on."""
    models = [Language(), Language()]
    models[1].load_state_dict(models[0].state_dict())
    made = [piste.create("muon", model, lr=0.01) for model in models]
    rng = np.random.default_rng(5)
    gradients = [[rng.normal(size=tuple(p.shape)) for p in models[0].parameters()] for _ in range(4)]
    for step in gradients[:2]:
        set_gradients(list(models[0].parameters()), step)
        made[0].step()
    kept = {name: set(made[0].state[p]) - {"step"} for name, p in models[0].named_parameters()}
    assert kept["blocks.0.up.weight"] == {"buf"}
    assert kept["tokens.weight"] == kept["head.weight"] == kept["blocks.0.up.bias"] == {"m", "v"}
    models[1].load_state_dict(models[0].state_dict())
    made[1].load_state_dict(made[0].state_dict())
    for model, optimizer in zip(models, made, strict=True):
        for step in gradients[2:]:
            set_gradients(list(model.parameters()), step)
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("iteration", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (390, 600), (384, 384)])
def test_wide_matrices_by_their_gram_matrices(iteration: str, shape: tuple[int, int]) -> None:
    """The iteration as it is written in float64, to 1e-4 in float32, with singular values from 1 to 1e-6."""
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    x = (u * torch.logspace(0, -6, min(shape), dtype=torch.float64)) @ v
    expected = x / (x.norm() if iteration == "quintic" else 1.02 * x.norm() + 1e-6)
    for a, b, c in ITERATIONS[iteration].polynomials(7):
        gram = expected @ expected.T
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    found = orthogonalizer(iteration, "fp32")(x[None], 7, 1)[0]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-8)
    single = orthogonalizer(iteration, "fp32")(x[None].float(), 7, 1)[0]
    torch.testing.assert_close(single.double(), expected, rtol=0.0, atol=1e-4)
