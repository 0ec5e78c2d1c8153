"""Codecs: numbers against a second description of them, and what they promise whatever the numbers are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import codecs as oracle

from piste.codecs import GOLDEN, STRIDE, Codec
from piste.coding import decode, encode, fresh
from piste.storage import STATE_FORMATS, State, codec_for, weight_codec

LOW = STATE_FORMATS[1:]
ROLES = ("moment", "second_moment")
SHAPES = (*[(n,) for n in (1, 2, 127, 128, 129, 255, 256, 257, 1000, 5001)], (7, 70), (3, 256), (5, 3, 99))


def codec_of(role: str, form: str) -> Codec:
    found = codec_for(State(role), torch.empty(80, 64), form)  # type: ignore[arg-type]
    assert found is not None
    return found


def spread(n: int, role: str, seed: int = 0, octaves: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp2(octaves * torch.randn(n, generator=generator))
    return x if role == "moment" else x.square()


def through(codec: Codec, x: torch.Tensor, **where: Any) -> torch.Tensor:
    codes, rest = fresh(codec, x)
    encode(codec, x, codes, rest, **{"step": 3, "phase": 77} | where)
    return decode(codec, codes, rest, tuple(x.shape))


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [None, 1, 70_000])
def test_numbers_are_those_of_the_description(form: str, role: str, shape: tuple[int, ...], step: int | None) -> None:
    x = spread(math.prod(shape), role).view(shape)
    expected = oracle.stored(x.numpy(), role, form, step, 77)
    np.testing.assert_array_equal(through(codec_of(role, form), x, step=step).numpy(), expected)


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_stay_zeros(form: str, shape: tuple[int, ...]) -> None:
    for role in ROLES:
        codec = codec_of(role, form)
        codes, rest = fresh(codec, torch.empty(shape))
        assert not decode(codec, codes, rest, shape).any()
        assert not through(codec, torch.zeros(shape)).any()


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rows", [(0, 3), (3, 10), (9, 10), (4, 4)])
def test_rows_are_stored_as_they_are_within_the_whole(form: str, role: str, rows: tuple[int, int]) -> None:
    """A shard has the codes and words of its rows, whatever their length: no block crosses its edge."""
    codec, (first, last) = codec_of(role, form), rows
    x = spread(10 * 83 * 5, role).view(10, 83, 5)
    codes, rest = fresh(codec, x)
    encode(codec, x, codes, rest, step=5, phase=1)
    mine, own = fresh(codec, x[first:last])
    encode(codec, x[first:last], mine, own, step=5, phase=1 + first * 83 * 5 * STRIDE)
    assert torch.equal(mine, codes[first:last])
    assert own is None or (rest is not None and torch.equal(own, rest[first:last]))


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("octaves", [0.0, 1.0, 10.0, 40.0])
def test_a_second_moment_is_never_stored_as_zero(form: str, octaves: float) -> None:
    """Also where a block spans more octaves than its ramp, and among the smallest numbers there are."""
    x = spread(4096, "second_moment", octaves=octaves).clamp(1e-45, 3e38)
    for step in range(5):
        assert (through(codec_of("second_moment", form), x, step=step) > 0).all()
    tiny = torch.full((4096,), 1e-45)
    assert (through(codec_of("second_moment", form), tiny) > 0).all()


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(form: str, role: str, bad: float) -> None:
    x = spread(1000, role)
    x[300] = bad
    y = through(codec_of(role, form), x)
    assert not y[300].isfinite()
    assert torch.cat((y[:256], y[512:])).isfinite().all(), "other blocks are not concerned"


@pytest.mark.parametrize("form", ["8bit", "4bit"])
@pytest.mark.parametrize("role", ROLES)
def test_codes_that_are_stored_again_stay_what_they_are(form: str, role: str) -> None:
    """To the nearest, decoding and encoding comes to rest: a checkpoint may go to and fro."""
    codec = codec_of(role, form)
    x = spread(5001, role)
    for _ in range(4):
        x = through(codec, x, step=None)
    assert torch.equal(through(codec, x, step=None), x)


@settings(max_examples=60)
@given(
    st.lists(st.floats(width=32, min_value=0, allow_infinity=False, allow_nan=False), min_size=1, max_size=300),
    st.sampled_from(LOW),
    st.integers(0, 10_000),
)
def test_any_finite_numbers(numbers: list[float], form: str, step: int) -> None:
    """Nothing becomes infinite or NaN, signs stay, and no number grows beyond its block's largest by more than 1 %."""
    x = torch.tensor(numbers, dtype=torch.float32)
    second = through(codec_of("second_moment", form), x, step=step)
    assert second.isfinite().all()
    assert (second >= 0).all()
    assert second.max() <= x.max() * 1.01 + 1e-40 or x.max() > 3e38
    signs = torch.where(torch.arange(len(x)) % 2 == 0, x, -x)
    moment = through(codec_of("moment", form), signs, step=step)
    assert moment.isfinite().all()
    assert (moment * signs.sign() >= 0).all()


@pytest.mark.parametrize("form", LOW)
def test_small_changes_add_up(form: str) -> None:
    """A slow average arrives: over 3,000 steps of 0.1 % where every code is further away than that."""
    codec = codec_of("second_moment", form)
    target, v = torch.rand(4096, generator=torch.Generator().manual_seed(1)) + 0.5, torch.ones(4096)
    for step in range(1, 3001):
        v = through(codec, v.lerp(target, 1e-3), step=step)
    error = v.log() - (target + (1 - target) * 0.999**3000).log()
    assert error.abs().mean() < {"bf16": 0.005, "8bit": 0.01, "4bit": 0.1}[form]
    assert error.mean().abs() < {"bf16": 0.001, "8bit": 0.002, "4bit": 0.05}[form]


def test_thresholds_are_spread_evenly() -> None:
    """Any run of steps, and any run of elements, takes thresholds from all parts of the interval."""
    codec = weight_codec(torch.empty(1, dtype=torch.bfloat16), "stochastic")
    assert codec is not None
    low, high = 1.0, 1.0078125
    x = torch.full((1000,), low + 0.25 * (high - low))
    ups = torch.stack([through(codec, x, step=step) == high for step in range(200)]).double()
    assert (ups.mean(0) - 0.25).abs().max() < 0.02, "in time"
    assert (ups.mean(1) - 0.25).abs().max() < 0.02, "over elements"
    assert math.gcd(GOLDEN, 65536) == 1


@pytest.mark.parametrize("form", ["kahan", "remainder"])
def test_weights_with_a_rest(form: str) -> None:
    codec = weight_codec(torch.empty(1, dtype=torch.bfloat16), form)
    assert codec is not None
    x = spread(5001, "moment", octaves=20.0)
    x[:6] = torch.tensor([0.0, -0.0, 1e-45, -3e38, math.inf, -math.inf])
    codes, rest = fresh(codec, x)
    encode(codec, x, codes, rest, step=1)
    back = decode(codec, codes, rest, tuple(x.shape))
    if form == "remainder":
        assert torch.equal(back.view(torch.int32), x.view(torch.int32)), "every bit"
        nan = torch.full((1,), math.nan)
        encode(codec, nan, codes[:1], rest[:1] if rest is not None else None, step=1)
        assert decode(codec, codes[:1], None if rest is None else rest[:1], (1,)).isnan()
    else:
        finite = x.isfinite()
        torch.testing.assert_close(back[finite], x[finite], rtol=2.0**-16, atol=1e-40)
    assert torch.equal(codes[6:].float(), x[6:].bfloat16().float()) or form == "remainder"
    ulp = x[6:].abs() * 2.0**-8
    assert ((codes[6:].float() - x[6:]).abs() <= ulp).all()


def test_a_tensor_that_lies_otherwise() -> None:
    codec = weight_codec(torch.empty(1, dtype=torch.bfloat16), "stochastic")
    assert codec is not None
    x = spread(60 * 70, "moment").view(60, 70)
    turned = torch.zeros(70, 60, dtype=torch.bfloat16).t()
    encode(codec, x, turned, None, step=4, phase=5)
    assert torch.equal(turned.float(), through(codec, x, step=4, phase=5))
