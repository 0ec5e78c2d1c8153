"""State in codes and weights of more bits: memory, loading, groups, refusals; numbers against a second description."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from oracles import codecs as oracle
from torch import nn

import piste
from piste.memory import state_bytes
from piste.registry import OPTIMIZERS
from piste.storage import LEAST_ROW, LEAST_VECTOR

LOW = piste.STATE_FORMATS[1:]
SHAPE = (64, 70)


def weight(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def step(p: torch.Tensor, optimizer: torch.optim.Optimizer, seed: int) -> None:
    gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + seed)) * 0.1
    p.grad = gradient.to(p.dtype)
    optimizer.step()


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "foreach", "cpp"])
@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize(
    ("name", "roles", "settings"),
    [
        ("SGD", {"buf": "moment"}, {"momentum": 0.9}),
        ("Lion", {"m": "moment"}, {}),
        ("AdamW", {"m": "moment", "v": "second_moment"}, {}),
        ("Adan", {"m": "moment", "d": "moment", "n": "second_moment"}, {}),
        ("AdEMAMix", {"m": "moment", "slow": "moment", "v": "second_moment"}, {}),
    ],
)
def test_states_are_what_storing_makes_of_them(
    name: str, roles: dict[str, str], settings: dict[str, float], form: str, engine: str
) -> None:
    """The float32 optimizer, with every moment put through the second description of the codecs after each step.

    Engines round float32 differently in the last bit, which may take a number across a threshold: a few codes in a
    thousand may differ by one there, and everything else is equal to rounding.
    """
    p, q = weight(), weight()
    coded = getattr(piste, name)([p], lr=0.01, state=form, engine=engine, **settings)
    plain = getattr(piste, name)([q], lr=0.01, engine="reference", **settings)
    phase = int(coded._roster._phase(0)) if coded._roster.members else 0
    for t in range(1, 7):
        step(p, coded, t)
        step(q, plain, t)
        phase = coded._roster._phase(0)
        for state, role in roles.items():
            kept = oracle.stored(plain.state[q][state].numpy(), role, form, t, phase)
            plain.state[q][state] = torch.from_numpy(np.ascontiguousarray(kept))
    error = (p - q).detach().abs()
    assert (error > 1e-6).double().mean() <= 0.004, "numbers that took the other side of a threshold"
    assert error.max() <= 0.06


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "most"),
    [
        ("adamw", "8bit", 2.05),
        ("adamw", "4bit", 1.07),
        ("adamw", "bf16", 4.0),
        ("lion", "8bit", 1.03),
        ("adan", "8bit", 3.1 + 4),
        ("ranger", "8bit", 2.05 + 4),
        ("lamb", "8bit", 2.05),
        ("sgd_momentum", "8bit", 1.03),
    ],
)
def test_bytes_of_state(name: str, form: str, most: float) -> None:
    assert state_bytes(name, (256, 256), state=form) <= most


@pytest.mark.parametrize(("form", "more"), [("plain", 0), ("stochastic", 0), ("kahan", 2), ("remainder", 2)])
def test_bytes_of_weights(form: str, more: int) -> None:
    p = weight(dtype=torch.bfloat16)
    optimizer = piste.SGD([p], lr=0.1, weights=form)
    step(p, optimizer, 0)
    kept = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in kept) == more * p.numel()


@pytest.mark.parametrize("form", ["8bit", "4bit"])
def test_small_weights_and_other_roles_stay_in_full(form: str) -> None:
    small, large = weight((65, 63)), weight((64, 64))
    short, thin, long = weight((LEAST_VECTOR - 1,)), weight((80, LEAST_ROW - 1)), weight((LEAST_VECTOR,))
    optimizer = piste.Adan([small, large, short, thin, long], state=form)
    for p in (small, large, short, thin, long):
        step(p, optimizer, 0)
    for p in (small, short, thin):
        assert all(x.dtype == torch.float32 for k, x in optimizer.state[p].items() if k != "step")
    assert optimizer.state[long]["n"].dtype == torch.uint8
    assert optimizer.state[large]["n"].dtype == torch.uint8
    assert optimizer.state[large]["previous"].dtype == torch.float32


def test_every_role_that_must_keep_its_precision_does() -> None:
    """Anchors, accumulators, gradients, and everything that is not of the weight's shape."""
    for info in OPTIMIZERS:
        try:
            optimizer = info.optimizer([weight()], state="8bit")
        except ValueError:
            continue
        p = optimizer.param_groups[0]["params"][0]
        for t in range(8):
            step(p, optimizer, t)
        states = optimizer._states_of(optimizer.param_groups[0])
        for name, tensor in optimizer.state[p].items():
            if name in states and isinstance(tensor, torch.Tensor):
                coded = tensor.dtype in (torch.int8, torch.uint8)
                moment = states[name].role in ("moment", "second_moment") and tensor.shape == p.shape
                assert coded == moment, (info.name, name)


# --- loading ------------------------------------------------------------------------------------------------------


def trained(form: str, steps: int = 5, **options: Any) -> tuple[nn.Parameter, piste.Optimizer]:
    p = weight()
    optimizer = piste.AdamW([p], lr=0.01, state=form, **options)
    for t in range(steps):
        step(p, optimizer, t)
    return p, optimizer


@pytest.mark.parametrize("before", piste.STATE_FORMATS)
@pytest.mark.parametrize("after", piste.STATE_FORMATS)
def test_a_checkpoint_moves_between_precisions(before: str, after: str) -> None:
    """On request; without it the saved format comes back bit by bit. Numbers are rounded to the nearest."""
    p, optimizer = trained(before)
    saved = through_a_file(optimizer.state_dict())
    other = piste.AdamW([p], lr=0.5)
    other.load_state_dict(saved)
    assert other.param_groups[0]["state"] == before
    for name, value in optimizer.state[p].items():
        assert name == "step" or (
            torch.equal(other.state[p][name], value) and other.state[p][name].dtype == value.dtype
        )
    other.load_state_dict(saved, state=after)
    assert other.param_groups[0]["state"] == after
    whole, again = piste.AdamW([p]), piste.AdamW([p])
    whole.load_state_dict(saved, state="fp32")
    again.load_state_dict(other.state_dict(), state="fp32")
    for name, role in (("m", "moment"), ("v", "second_moment")):
        expected = whole.state[p][name]
        if after not in ("fp32", before):
            expected = torch.from_numpy(oracle.stored(expected.numpy(), role, after, None))
        assert torch.equal(again.state[p][name], expected)
    step(p, other, 9)


@pytest.mark.parametrize("form", piste.STATE_FORMATS)
def test_checkpoints_of_torch_load_and_go_back(form: str) -> None:
    p, q = weight(), weight()
    theirs = torch.optim.AdamW([p], lr=0.01, weight_decay=0.1)
    for t in range(5):
        step(p, theirs, t)
    ours = piste.AdamW([q], state=form)
    with torch.no_grad():
        q.copy_(p)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.param_groups[0]["state"], ours.param_groups[0]["lr"], ours.state[q]["step"]) == (form, 0.01, 5)
    for t in range(5, 8):
        step(p, theirs, t)
        step(q, ours, t)
    limit = {"fp32": 1e-6, "bf16": 1e-3, "8bit": 5e-3, "4bit": 5e-2}[form]
    assert (p - q).abs().max() < limit
    back = torch.optim.AdamW([q])
    back.load_state_dict(through_a_file(ours.torch_state_dict()))
    assert back.param_groups[0]["weight_decay"] == 0.1
    assert float(back.state[q]["step"]) == 8
    step(q, back, 8)
    step(p, theirs, 8)
    assert (p - q).abs().max() < limit


def test_no_way_back_to_a_class_that_torch_lacks() -> None:
    with pytest.raises(ValueError, match="Lion has no counterpart"):
        piste.Lion([weight()]).torch_state_dict()


def damages() -> list[Any]:
    def cut(entries: dict[str, Any]) -> None:
        entries["m"] = entries["m"][:-1]

    def scales(entries: dict[str, Any]) -> None:
        entries["v.scale"] = entries["v.scale"][:-1]

    def cast(entries: dict[str, Any]) -> None:
        entries["m"] = entries["m"].float()

    return [
        pytest.param(cut, "'m'", id="codes cut off"),
        pytest.param(scales, "'v.scale'", id="scales cut off"),
        pytest.param(cast, "'m'", id="codes cast"),
        pytest.param(lambda entries: entries.pop("m.scale"), "'m.scale' is missing", id="no scales"),
        pytest.param(lambda entries: entries.update(extra=torch.ones(1)), "'extra'", id="something else"),
    ]


@pytest.mark.parametrize(("damage", "word"), damages())
@pytest.mark.parametrize("form", ["8bit", "4bit"])
def test_damaged_codes_are_refused_whole(damage: Any, word: str, form: str) -> None:
    _, optimizer = trained(form)
    saved = optimizer.state_dict()
    damage(saved["state"][0])
    q, other = trained(form, steps=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=word):
        other.load_state_dict(saved)
    after = other.state_dict()
    assert after["param_groups"][0]["lr"] == before["param_groups"][0]["lr"]
    assert all(torch.equal(after["state"][0][k], v) for k, v in before["state"][0].items() if k != "step")
    step(q, other, 3)


# --- groups -------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = piste.StableEmbedding(100, 64)
        self.out = nn.Linear(64, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.words(x))
        return out


def run(model: Words, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(100)).square().mean().backward()
    optimizer.step()


def formats(model: Words, optimizer: Any) -> dict[str, torch.dtype]:
    return {name: optimizer.state[p]["m"].dtype for name, p in model.named_parameters()}


WANTED = {
    "words.weight": torch.float32,
    "words.norm.weight": torch.float32,
    "words.norm.bias": torch.float32,
    "out.weight": torch.int8,
    "out.bias": torch.float32,
}


def test_embeddings_stay_in_32_bits() -> None:
    """Through ``create``, a copy, ``.to()``, loading into a fresh optimizer, a change of precision, and a wrapper."""
    model = Words()
    optimizer: Any = piste.create("adamw", model, state="8bit")
    run(model, optimizer)
    assert formats(model, optimizer) == WANTED
    twin, copied = copy.deepcopy((model, optimizer))
    run(twin, copied)
    assert formats(twin, copied) == WANTED
    model.to(torch.float32)
    fresh: Any = piste.create("adamw", model, state="fp32")
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    run(model, fresh)
    assert formats(model, fresh) == WANTED
    whole: Any = piste.create("adamw", model)
    run(model, whole)
    other: Any = piste.create("adamw", model)
    other.load_state_dict(whole.state_dict(), state="8bit")
    run(model, other)
    assert formats(model, other) == WANTED
    wrapped = piste.Lookahead(piste.create("adamw", model, state="8bit"))
    run(model, wrapped)
    assert formats(model, wrapped) == WANTED


def test_formats_per_group() -> None:
    p, q = weight(), weight(seed=1)
    optimizer = piste.Adam([{"params": [p], "state": "4bit"}, {"params": [q]}], state="bf16")
    for x in (p, q):
        step(x, optimizer, 0)
    assert optimizer.state[p]["v"].dtype == torch.uint8
    assert optimizer.state[q]["v"].dtype == torch.bfloat16


def test_the_seed_moves_the_thresholds() -> None:
    runs = []
    for seed in (0, 0, 1):
        p = weight(dtype=torch.bfloat16)
        optimizer = piste.SGD([p], lr=1e-4, weights="stochastic", seed=seed)
        for t in range(3):
            step(p, optimizer, t)
        runs.append(p.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# --- weights ------------------------------------------------------------------------------------------------------


def test_small_steps_are_not_lost() -> None:
    """A thousand steps, each a twentieth of what bfloat16 can tell from 1: plain weights never move."""
    moved = {}
    for form in piste.WEIGHT_FORMATS:
        p = nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))
        optimizer = piste.SGD([p], lr=1e-4, weights=form)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[form] = float((1 - optimizer.full_precision(p)).mean())
    assert moved["plain"] == 0
    assert moved["remainder"] == pytest.approx(0.1, rel=1e-3)
    assert moved["kahan"] == pytest.approx(0.1, rel=1e-2)
    assert moved["stochastic"] == pytest.approx(0.1, rel=2e-2)


def test_full_precision() -> None:
    p = weight(dtype=torch.bfloat16)
    optimizer = piste.AdamW([p], weights="remainder")
    assert torch.equal(optimizer.full_precision(p), p.float())
    step(p, optimizer, 0)
    full = optimizer.full_precision(p)
    assert full.dtype == torch.float32
    assert not torch.equal(full, p.float())
    with pytest.raises(ValueError, match="no group"):
        optimizer.full_precision(weight())


@pytest.mark.parametrize("k", [1, 3])
def test_wrappers_see_what_weights_stand_for(k: int) -> None:
    p, q = weight(dtype=torch.bfloat16), weight(dtype=torch.bfloat16)
    q = nn.Parameter(q.detach().float())
    inner = piste.AdamW([p], lr=0.01, weights="remainder")
    ours, full = piste.Lookahead(inner, k=k), piste.Lookahead(piste.AdamW([q], lr=0.01), k=k)
    model, plain = nn.ParameterList([p]), nn.ParameterList([q])
    ema, expected = piste.ModelEMA(model, decay=0.9), piste.ModelEMA(plain, decay=0.9)
    for t in range(7):
        p.grad = (torch.ones(SHAPE) * (t - 3)).bfloat16()
        q.grad = p.grad.float()
        ours.step()
        full.step()
        ema.update(ours)
        expected.update()
    assert torch.equal(inner.full_precision(p), q)
    assert torch.equal(ema._values()["0"], expected._values()["0"])


def test_evaluation_of_schedule_free_weights_loses_nothing() -> None:
    """To the average and back, over and over: bfloat16 weights with remainder do what float32 ones do."""
    p, q = weight(dtype=torch.bfloat16), nn.Parameter(weight(dtype=torch.bfloat16).detach().float())
    ours, full = piste.ScheduleFreeAdamW([p], lr=0.01, weights="remainder"), piste.ScheduleFreeAdamW([q], lr=0.01)
    for t in range(6):
        p.grad = (torch.ones(SHAPE) * (t - 3)).bfloat16()
        q.grad = p.grad.float()
        for optimizer, x in ((ours, p), (full, q)):
            optimizer.step()
            optimizer.eval()
            average = optimizer.full_precision(x)
            optimizer.train()
        assert torch.equal(ours.full_precision(p), q)
    assert average.isfinite().all()


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "dtype", "words"),
    [
        ("MADGRAD", {"state": "8bit"}, torch.float32, "MADGRAD got state='8bit'.*no moments"),
        ("AdamW", {"state": "8bit"}, torch.float64, "AdamW got state='8bit'.*float64"),
        ("AdamW", {"state": "16bit"}, torch.float32, "state='16bit'.*'8bit'"),
        ("AdamW", {"weights": "kahan"}, torch.float16, "weights='kahan'.*float16"),
        ("AdamW", {"weights": "kahan"}, torch.float32, "weights='kahan'.*float32.*bfloat16"),
        ("AdamW", {"weights": "master"}, torch.bfloat16, "weights='master'.*'remainder'"),
        ("AdamW", {"seed": -1}, torch.float32, "seed=-1"),
    ],
)
def test_formats_that_make_no_sense(name: str, options: dict[str, Any], dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(piste, name)([weight(dtype=dtype)], **options)


def test_a_request_for_no_format() -> None:
    p, optimizer = trained("8bit")
    with pytest.raises(ValueError, match="state='9bit'"):
        optimizer.load_state_dict(optimizer.state_dict(), state="9bit")
    step(p, optimizer, 9)


def test_weights_in_channels_last() -> None:
    """Codes go by rows wherever the weight lies."""
    p = nn.Parameter(weight((16, 8, 6, 6)).detach().to(memory_format=torch.channels_last))
    q = nn.Parameter(weight((16, 8, 6, 6)).detach())
    ours, plain = piste.Ranger([p], lr=0.01, state="8bit"), piste.Ranger([q], lr=0.01, state="8bit")
    for t in range(4):
        step(p, ours, t)
        step(q, plain, t)
    assert torch.equal(ours.state[p]["m"], plain.state[q]["m"])
    assert torch.equal(p, q)


def test_what_is_kept_after_a_move_of_layouts() -> None:
    """A contiguous model's codes, loaded into the same model in another order of memory."""
    q, optimizer = nn.Parameter(weight((16, 8, 6, 6)).detach()), None
    optimizer = piste.AdamW([q], lr=0.01, state="4bit")
    step(q, optimizer, 0)
    p = nn.Parameter(q.detach().clone().to(memory_format=torch.channels_last))
    other = piste.AdamW([p], lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    step(q, optimizer, 1)
    step(p, other, 1)
    assert torch.equal(p, q)
