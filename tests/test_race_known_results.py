"""The built-in tasks against what is known about them: closed forms, other solvers, and orders found by others.

Where two optimizers are compared, each has its best of several learning rates; seeds are fixed, and the margins asked
for are smaller than those found by half or more.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import piste
from piste.race import load_task
from piste.race.contenders import make_contenders
from piste.race.data import Splits, fetch, length
from piste.race.inspection import load_data
from piste.race.record import TUNE, RunKey, RunRecord
from piste.race.task import BUILT_IN, Task
from piste.race.tasks import cartpole, digits_vae, linear_networks, logistic, mnist1d, quadratics, zipf_bigram
from piste.race.training import evaluate, fresh_model, run

CPU = torch.device("cpu")
# Others are functions to be minimised, or count the same words in every text.
HELD_OUT_TASKS = sorted(set(BUILT_IN) - {"quadratic_axis", "quadratic_rotated", "matrix_factorisation", "zipf_bigram"})
K = 100.0  # condition of the bowls with closed forms


@functools.cache
def loaded(name: str) -> tuple[Task, Splits]:
    task = load_task(name).task
    return task, load_data(task)


def made(task: Task, splits: Splits, optimizer: str, lr: float, steps: int, seed: int = 0) -> RunRecord:
    contender = make_contenders((optimizer,), ())[0]
    key = RunKey(
        task.name, "f00d", contender.name, optimizer, contender.schedule, {"lr": lr}, steps, seed, TUNE, "cpu", {}
    )
    return run(task, splits, contender, key, lambda step: None)


def score(name: str, optimizer: str, lr: float, steps: int, seed: int = 0) -> float:
    """The validation metric at the end; infinite where the run diverged."""
    record = made(*loaded(name), optimizer, lr, steps, seed)
    return record.curve.valid_metric[-1] if record.finished else math.inf


def best(name: str, optimizer: str, lrs: tuple[float, ...], steps: int) -> float:
    """Of several learning rates, for metrics of which less is better."""
    return min(score(name, optimizer, lr, steps) for lr in lrs)


@pytest.mark.parametrize("name", HELD_OUT_TASKS)
def test_no_example_stands_in_two_parts(name: str) -> None:
    """Digits, tumours and wines by the values of their features; what is drawn at random is never twice the same."""
    _, splits = loaded(name)
    parts = [splits.train, splits.valid, splits.report]
    if name == "char_transformer":  # windows of training overlap; the text is cut in three
        lengths = [length(part) for part in parts]
        assert lengths[0] > 100 * lengths[1]
        return
    rows = [{row.numpy().tobytes() for row in fetch(part, torch.arange(length(part)))[0].double()} for part in parts]
    for one, other in itertools.combinations(rows, 2):
        assert not one & other


# -- quadratics: closed forms ---------------------------------------------------------------------------------------


def distances(momentum: float, lr: float, axes: Tensor | None, ends: list[int]) -> list[float]:
    """From the minimum after each step, started at 1 along the steepest (-1) or the flattest (0) direction, or both."""
    bowl = quadratics.Bowl(K, axes).double()
    turn = torch.eye(quadratics.DIMENSIONS, dtype=torch.float64) if axes is None else axes
    minimum = torch.zeros(quadratics.DIMENSIONS, dtype=torch.float64)  # where float64 has most to say
    bowl.minimum = minimum  # type: ignore[assignment]
    bowl.matrix = turn * quadratics.eigenvalues(K) @ turn.T  # type: ignore[assignment]
    with torch.no_grad():
        bowl.point.copy_(turn[:, ends].sum(dim=1))
    optimizer = piste.SGD(bowl.parameters(), lr=lr, momentum=momentum, engine="reference")
    found = []
    for _ in range(60):
        optimizer.zero_grad()
        bowl().backward()
        optimizer.step()
        found.append(float(bowl.point.detach().norm()))
    return found


@pytest.mark.parametrize("axes", [None, quadratics.rotation()], ids=["axis", "rotated"])
def test_gradient_descent_contracts_by_its_closed_form(axes: Tensor | None) -> None:
    """At 2 / (L + m) both ends of the spectrum shrink by (k - 1) / (k + 1) in every step."""
    found = distances(0.0, 2 / (1 + 1 / K), axes, [0, -1])
    ratios = [after / before for before, after in itertools.pairwise(found)]
    assert ratios == pytest.approx([(K - 1) / (K + 1)] * len(ratios), rel=1e-9)


@pytest.mark.parametrize("end", [0, -1], ids=["flattest", "steepest"])
@pytest.mark.parametrize("axes", [None, quadratics.rotation()], ids=["axis", "rotated"])
def test_heavy_ball_contracts_by_its_closed_form(axes: Tensor | None, end: int) -> None:
    """It is critically damped at both ends, where a distance is (a + b t) r^t with r = (sqrt k - 1) / (sqrt k + 1)."""
    root = math.sqrt(K)
    rate = (root - 1) / (root + 1)
    found = distances(rate**2, 4 / (1 + 1 / root) ** 2, axes, [end])
    line = np.array(found) / rate ** np.arange(1, len(found) + 1)
    growth = np.diff(line)[2:]
    assert growth == pytest.approx(np.full_like(growth, growth[0]), rel=1e-3)
    assert abs(growth[0]) > 0.01


def test_axes_are_nothing_to_sgd_and_much_to_adam() -> None:
    lrs = (0.003, 0.01, 0.03)
    along, turned = (best(name, "adamw", lrs, 300) for name in ("quadratic_axis", "quadratic_rotated"))
    assert along < turned - 1
    along, turned = (score(name, "sgd_momentum", 0.5, 300) for name in ("quadratic_axis", "quadratic_rotated"))
    assert along == pytest.approx(turned, abs=1e-2)


def test_noise_leaves_half_its_variance_times_the_trace() -> None:
    """And both SGD with momentum and Adam come near that, as in DeepOBS."""
    task, _ = loaded("quadratic_noisy")
    eigenvalues = torch.linalg.eigvalsh(task.model().matrix.double())  # type: ignore[operator, union-attr]
    assert (eigenvalues > 29).sum() == 10
    assert ((eigenvalues > 0) & (eigenvalues < 1)).sum() == 90
    floor = float(quadratics.NOISE**2 * eigenvalues.sum() / 2)
    assert 80 < floor < 110
    for optimizer, lrs in (("sgd_momentum", (0.01, 0.03)), ("adamw", (0.03, 0.06))):
        assert best("quadratic_noisy", optimizer, lrs, 500) == pytest.approx(floor, rel=0.05)


# -- convex problems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "digits"])
def test_the_minimum_is_what_scikit_learn_finds(name: str) -> None:
    """Two rows of weights for two classes pay half of what one row would."""
    from sklearn.linear_model import LogisticRegression

    x, labels = logistic.training(name)
    classes = int(labels.max()) + 1
    solver = LogisticRegression(C=2.0 if classes == 2 else 1.0, tol=1e-10, max_iter=20_000, solver="newton-cholesky")
    solver.fit(x.numpy(), labels.numpy())
    weight, bias = torch.tensor(solver.coef_), torch.tensor(solver.intercept_)
    if classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    theirs = logistic.objective(weight, bias, x, labels, 1 / len(x))
    assert logistic.minimum(name) == pytest.approx(float(theirs), rel=1e-9)
    assert logistic.minimum(name) <= float(theirs) + 1e-12


def test_the_minimum_is_reached() -> None:
    """To what float32 weights can say: the height above it goes with their rounding squared."""
    for optimizer, lr in (("sgd_momentum", 0.5), ("adamw", 0.1)):
        assert score("logistic_wine", optimizer, lr, 1_000) < -6


# -- where SGD falls behind, and where it does not ------------------------------------------------------------------


def test_words_follow_zipfs_law() -> None:
    """Pairs are counted by their first words, and half of the second words are decided by them."""
    _, shares = loaded("zipf_bigram")[1].train  # type: ignore[misc]
    pairs = shares * (zipf_bigram.PAIRS / zipf_bigram.WORDS)
    torch.testing.assert_close(pairs.sum(), torch.tensor(float(zipf_bigram.PAIRS)))
    ranks = torch.arange(1, zipf_bigram.WORDS + 1).double()
    expected = zipf_bigram.PAIRS / ranks / (1 / ranks).sum()
    assert bool(((pairs.sum(1) - expected).abs() < 5 * expected.sqrt()).all())
    assert float(pairs.max(dim=1).values[:50].sum() / pairs[:50].sum()) == pytest.approx(0.5, abs=0.1)


def excess(splits: Splits, optimizer: str, lrs: tuple[float, ...]) -> float:
    """Training loss above its minimum, which is the entropy of the counted shares, at the best learning rate."""
    _, shares = splits.train  # type: ignore[misc]
    rows = shares.double()
    least = -(rows * (rows / rows.sum(1, keepdim=True).clamp_min(1e-9)).clamp_min(1e-300).log()).sum(1).mean()
    task = loaded("zipf_bigram")[0]
    losses = [made(task, splits, optimizer, lr, 100).curve.train_loss[-1] for lr in lrs]
    return min(loss for loss in losses if math.isfinite(loss)) - float(least)


@pytest.mark.slow
def test_sgd_is_far_behind_adam_under_zipfs_law() -> None:
    """On loss above the minimum, with momentum; with balanced words there is no such gap."""
    heavy, flat = (zipf_bigram.texts(exponent) for exponent in (1.0, 0.0))
    sgd, adam = (10.0, 30.0, 100.0), (0.1, 0.3)
    behind = excess(heavy, "sgd_momentum", sgd) / excess(heavy, "adamw", adam)
    assert behind > 5
    assert excess(flat, "sgd_momentum", (300.0, 1000.0)) < excess(flat, "adamw", adam) * behind / 2


def test_noise_of_the_autoencoder_is_fixed_in_evaluation_alone() -> None:
    task, splits = loaded("digits_vae")
    model = fresh_model(task, 0, CPU)
    assert evaluate(task, model, splits.valid, CPU) == evaluate(task, model, splits.valid, CPU)
    batch = fetch(splits.train, torch.arange(8))
    assert float(task.loss(model, batch).detach()) != float(task.loss(model, batch).detach())


@torch.no_grad()
def test_the_bound_of_a_code_that_says_nothing() -> None:
    """Without a divergence, squared errors are left: of 64 pixels over twice their variance."""
    model = fresh_model(loaded("digits_vae")[0], 0, CPU)
    for part in (model.encoder[-1], model.decoder[-1]):  # type: ignore[index]
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    batch = (torch.full((5, digits_vae.PIXELS), 0.1),)
    expected = digits_vae.PIXELS * 0.1**2 / (2 * digits_vae.VARIANCE)
    assert float(loaded("digits_vae")[0].loss(model, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_sgd_is_behind_adam_on_the_variational_autoencoder() -> None:
    sgd = best("digits_vae", "sgd_momentum", (0.0003, 0.001, 0.003), 400)
    adam = best("digits_vae", "adamw", (0.006, 0.02), 400)
    assert adam < sgd - 1


def test_digits_tie() -> None:
    """360 images: one is 0.0028."""
    found = {
        optimizer: np.mean([score("digits", optimizer, lr, 150, seed) for seed in (1, 2, 3)])
        for optimizer, lr in (("sgd_momentum", 0.03), ("adamw", 0.012))
    }
    assert min(found.values()) > 0.96
    assert abs(found["sgd_momentum"] - found["adamw"]) < 0.012


@pytest.mark.slow
def test_the_order_on_the_language_model() -> None:
    """At each one's learning rate from the race of docs/quality.md, with a third of its steps."""
    losses = {
        optimizer: np.mean([score("char_transformer", optimizer, lr, 100, seed) for seed in (1, 2)])
        for optimizer, lr in (("sgd_momentum", 0.1), ("adamw", 0.004), ("muon", 0.012))
    }
    assert losses["muon"] + 0.03 < losses["adamw"] < losses["sgd_momentum"] - 0.03


# -- matrices -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_weights_do_better_than_principal_components() -> None:
    """Weights that are the leading eigenvectors reach the minimum, and the score of zero weights is that of nothing."""
    moments, least = linear_networks.covariance()
    vectors = torch.linalg.eigh(moments).eigenvectors[:, -linear_networks.CODE :]
    task, splits = loaded("linear_autoencoder")
    wide = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)).double()
    wide[0].weight.copy_(vectors.T)
    wide[1].weight.copy_(vectors)
    assert linear_networks.autoencoder_excess(wide, None) < -12
    loss = float(task.loss(wide.float(), splits.train))
    assert loss == pytest.approx(least, rel=1e-4)
    for weight in wide.parameters():
        nn.init.zeros_(weight)
    assert linear_networks.autoencoder_excess(wide, None) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_factors_that_are_right_have_no_error() -> None:
    task, splits = loaded("matrix_factorisation")
    left, values, right = torch.linalg.svd(linear_networks.target())
    rank = linear_networks.RANK
    assert float(values[0] / values[rank - 1]) == pytest.approx(linear_networks.CONDITION)
    assert float(values[rank]) < 1e-12
    model = task.model().double()
    model[0].weight.copy_((left[:, :rank] * values[:rank]).T)  # type: ignore[index, operator]
    model[1].weight.copy_(right[:rank].T)  # type: ignore[index, operator]
    assert linear_networks.factorisation_excess(model, None) < -12
    assert float(task.loss(model.float(), splits.train)) < 1e-10
    for weight in model.parameters():
        nn.init.zeros_(weight)
    assert linear_networks.factorisation_excess(model, None) == pytest.approx(0)
    assert float(task.loss(model, splits.train)) == pytest.approx(float(values.square().sum()), rel=1e-5)


def test_muon_takes_every_matrix_of_the_linear_networks() -> None:
    """No layer of theirs is a head."""
    from piste.race.contenders import make_optimizer

    contender = make_contenders(("muon",), ())[0]
    for name, count in (("linear_autoencoder", 6), ("matrix_factorisation", 2)):
        task = loaded(name)[0]
        optimizer, _ = make_optimizer(contender, task.model(), 0.01, 10, task.domain, fixed=task.settings)
        assert sum(len(group["params"]) for group in optimizer.param_groups if group["rule"] == "muon") == count


@pytest.mark.slow
def test_matrix_methods_need_half_the_steps_on_the_autoencoder() -> None:
    """Each at its learning rate from the race of docs/quality.md, on its first four seeds."""
    found = {
        optimizer: np.mean([score("linear_autoencoder", optimizer, lr, steps, seed) for seed in (1, 2, 3, 4)])
        for optimizer, lr, steps in (("adamw", 0.02348, 200), ("muon", 0.04533, 100), ("soap", 0.01216, 100))
    }
    assert found["muon"] < found["adamw"] - 0.5
    assert found["soap"] < found["adamw"] - 0.2


# -- generated problems ---------------------------------------------------------------------------------------------


def test_disguises_are_what_they_are_said_to_be() -> None:
    x, labels = mnist1d.examples(400, np.random.default_rng(3))
    assert x.shape == (400, mnist1d.LENGTH)
    assert torch.bincount(labels, minlength=10).min() > 15
    assert bool(((x.std(dim=1) > 0.2) & (x.std(dim=1) < 2)).all())
    again, _ = mnist1d.examples(400, np.random.default_rng(3))
    assert torch.equal(x, again)
    # Where a signal lies says nothing about its digit: the mean over many examples is flat.
    assert float(x.mean(dim=0).std()) < 0.25 * float(x.std())


@pytest.mark.slow
def test_who_knows_of_neighbours_wins_on_a_line() -> None:
    from dataclasses import replace

    task, splits = loaded("mnist1d")
    accuracy = {
        model.__name__: made(replace(task, model=model), splits, "adamw", 0.01, 500).curve.valid_metric[-1]
        for model in (mnist1d.linear, mnist1d.perceptron, mnist1d.convolutional)
    }
    assert accuracy["linear"] + 0.1 < accuracy["perceptron"] < accuracy["convolutional"] - 0.05


def test_the_cart_obeys_its_equations() -> None:
    """The two equations of motion, as a linear system in both accelerations; the pole is a rod, so 4/3 and not 1."""
    draw = torch.Generator().manual_seed(0)
    state = torch.randn(20, 4, generator=draw, dtype=torch.float64)
    push = 10 * torch.randn(20, generator=draw, dtype=torch.float64)
    after = cartpole.moved(state, push)
    for before, force, now in zip(state.tolist(), push.tolist(), after.tolist(), strict=True):
        place, speed, angle, turning = before
        sine, cosine = math.sin(angle), math.cos(angle)
        system = np.array([[1.0 + 0.1, 0.1 * 0.5 * cosine], [cosine, 4 / 3 * 0.5]])
        acceleration = np.linalg.solve(system, [force + 0.1 * 0.5 * turning**2 * sine, 9.8 * sine])
        expected = [place + 0.02 * speed, speed + 0.02 * acceleration[0]]
        expected += [angle + 0.02 * turning, turning + 0.02 * acceleration[1]]
        assert now == pytest.approx(expected, rel=1e-9)


def test_an_episode_ends_where_the_pole_falls() -> None:
    """Pushed to one side only, it does so soon; a step counts if the pole stood when it was made."""
    policy = nn.Linear(4, 2)
    nn.init.zeros_(policy.weight)
    with torch.no_grad():
        policy.bias.copy_(torch.tensor([-50.0, 50.0]))  # always right
    start = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0.2, 3.0]])
    states, actions, counted = cartpole.episodes(policy, start, None)
    assert bool((actions == 1).all())
    stood = counted.sum(0)
    assert stood.tolist()[1] == 1  # 0.2 rad, at 3 rad/s, is beyond 12 degrees one step later
    assert 8 <= stood[0] <= 10
    assert bool(cartpole.upright(states[counted]).all())
    assert not counted[stood[0] :, 0].any()


def test_the_policy_gradient_is_reinforces() -> None:
    """Against a sum over episodes written out, on the very episodes that were played."""
    task, splits = loaded("cartpole")
    model = fresh_model(task, 0, CPU)
    (start,) = batch = fetch(splits.train, torch.arange(3))
    torch.manual_seed(5)
    value = task.loss(model, batch)
    value.backward()  # type: ignore[no-untyped-call]
    found = [weight.grad.clone() for weight in model.parameters()]  # type: ignore[union-attr]
    torch.manual_seed(5)
    states, actions, counted = cartpole.episodes(model, start, None)
    to_go = [[(i, t, int(counted[t:, i].sum())) for t in range(int(counted[:, i].sum()))] for i in range(3)]
    rows = [row for episode in to_go for row in episode]
    rewards = np.array([row[2] for row in rows], dtype=float)
    total = torch.zeros(())
    for (i, t, reward), _ in zip(rows, rewards, strict=True):
        advantage = (reward - rewards.mean()) / rewards.std()
        total = total - advantage * model(states[t, i]).log_softmax(0)[actions[t, i]]
    model.zero_grad()
    (total / len(rows)).backward()  # type: ignore[no-untyped-call]
    for mine, weight in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-6)
    assert float(value.detach()) == pytest.approx(1 - len(rows) / 3 / cartpole.LONGEST)


@pytest.mark.slow
def test_the_pole_is_learned() -> None:
    assert score("cartpole", "adamw", 0.012, 100) > 100 > 3 * score("cartpole", "adamw", 1e-6, 1)
