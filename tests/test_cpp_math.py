"""The number formats and element functions of generated C++, built with the engine's own flags, over whole ranges."""

from __future__ import annotations

import ctypes
import itertools
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from piste.engines import cpp_build

HEADER = Path(cpp_build.__file__).with_name("cpp_math.h")
NAN, INF = float("nan"), float("inf")
TYPES = {"float": torch.float32, "double": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
REALS = ("float", "double")
X86 = platform.machine().lower() in ("x86_64", "amd64")

#: what a loop computes from x, y (elements of two arrays) and number (the same for all)
FUNCTIONS = {
    "exp": "exp(x)",
    "log": "log(x)",
    "cbrt": "cbrt(x)",
    "softplus": "softplus(x)",
    "sqrt": "sqrt(x)",
    "rsqrt": "1 / sqrt(x)",
    "abs": "abs(x)",
    "sign": "sign<R>(x)",
    "minimum": "minimum<R>(x, y)",
    "maximum": "maximum<R>(x, y)",
    "lowered": "minimum<R>(x, number)",
    "raised": "maximum<R>(x, number)",
    "number_lowered": "minimum<R>(number, x)",
    "number_raised": "maximum<R>(number, x)",
    "lerp": "lerp<R>(x, y, number)",
    "pow": "pow<R>(x, number)",
    "square": "pow<R>(x, R(2))",
    "lt": "x < y",
    "le": "x <= y",
    "gt": "x > y",
    "ge": "x >= y",
    "eq": "x == y",
    "ne": "x != y",
    "where": "x < number ? y : x",
}
#: loops that call the C library: powers other than the usual ones, and the functions of double
CALLING = {"pow_float", "pow_double", "exp_double", "log_double", "cbrt_double", "softplus_double"}
LOOP = (
    'extern "C" void {name}(const {stored}* a, const {stored}* b, {to}* __restrict out, int64_t n, double given) {{\n'
    "  typedef {real} R; const R number = (R)given; (void)number;\n"
    "  #pragma omp simd  // LOOP {name}\n"
    "  for (int64_t i = 0; i < n; ++i) {{\n"
    "    const R x = get<R>(a, i), y = get<R>(b, i); (void)y;\n"
    "    put(out, i, R({text}));\n"
    "  }}\n"
    "}}\n"
)


def source() -> str:
    """The header and a loop for each function in each precision, and for each pair of formats."""
    kinds = [(f"{name}_{real}", real, real, real, text) for name, text in FUNCTIONS.items() for real in REALS]
    for real, stored in itertools.product(REALS, TYPES):
        if stored != real:
            kinds.append((f"{stored}_to_{real}", stored, real, real, "x"))
            kinds.append((f"{real}_into_{stored}", real, stored, real, "x"))
    loops = [
        LOOP.format(name=name, stored=stored, to=to, real=real, text=text) for name, stored, to, real, text in kinds
    ]
    return "\n".join([HEADER.read_text(encoding="utf-8"), "namespace piste {", *loops, "}"])


def by_lines(remarks: str, text: Path) -> set[str]:
    """The vectorised loops as clang tells them: by the line of the pragma."""
    lines = text.read_text(encoding="utf-8").splitlines()
    found = re.findall(r"loops\.cpp:(\d+):.*vectorized loop", remarks)
    return {lines[int(number) - 1].rpartition("// LOOP ")[2] for number in found}


def by_functions(dump: str) -> set[str]:
    """The same as gcc tells it: under the name of the function."""
    return {part.split()[0].rpartition("::")[2] for part in dump.split(";; Function ")[1:] if "loop vectorized" in part}


class Built(NamedTuple):
    library: ctypes.CDLL
    content: bytes
    vectorised: set[str]  # names of loops, by the compiler's own account
    clang: bool

    def __call__(self, name: str, x: Tensor, y: Tensor | None = None, number: float = 0.0) -> Tensor:
        to = TYPES[name.rpartition("_")[2]]
        out = torch.empty(x.shape, dtype=to)
        places = [ctypes.c_void_p(t.data_ptr()) for t in (x, x if y is None else y, out)]
        getattr(self.library, name)(*places, ctypes.c_int64(x.numel()), ctypes.c_double(number))
        return out


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Compiles with the flags of the engine, or with others in the place of those that name the processor."""
    try:
        chain = cpp_build.toolchain()
    except cpp_build.BuildError as error:
        pytest.skip(f"no C++ compiler: {error}")
    version = subprocess.run([*chain.command, "--version"], capture_output=True, text=True, check=True).stdout
    clang = "clang" in version.lower()

    def compiled(*processor: str) -> Built:
        folder = tmp_path_factory.mktemp("math")
        text, target = folder / "loops.cpp", folder / "loops.so"
        text.write_text(source(), encoding="utf-8")
        # loops alone need no OpenMP runtime
        flags = ["-fopenmp-simd" if flag == "-fopenmp" else flag for flag in chain.flags if flag != "-Xclang"]
        if processor:
            flags = [*(flag for flag in flags if not flag.startswith(("-march", "-mcpu"))), *processor]
        dump = folder / "vectorised.txt"
        # clang would also warn of the loops that call something
        remarks = ["-Rpass=loop-vectorize", "-Wno-pass-failed"]
        notes = remarks if clang else [f"-fdump-tree-vect-optimized={dump}"]
        notes += ["-Wall", "-Wno-unused-function"]
        command = [*chain.command, *flags, *notes, "-shared", str(text), "-o", str(target)]
        told = subprocess.run(command, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        assert "warning" not in told.stderr, told.stderr
        names = by_lines(told.stderr, text) if clang else by_functions(dump.read_text(encoding="utf-8"))
        return Built(ctypes.CDLL(str(target)), target.read_bytes(), names, clang)

    return compiled


@pytest.fixture(scope="module")
def loops(build: Callable[..., Built]) -> Built:
    return build()


def floats(bits: Any) -> Tensor:
    """Floats with these patterns."""
    return torch.from_numpy(np.asarray(bits, dtype=np.int64).astype(np.uint32).view(np.float32))


def assert_same(actual: Tensor, expected: Tensor, *, zeros: bool = True) -> None:
    """Bit by bit, but any NaN is like any other; without `zeros` the two zeros are alike too."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.nan_to_num(0, INF, -INF), expected.nan_to_num(0, INF, -INF)
    if not zeros:
        assert torch.equal(actual, expected)
        return
    wrong = actual.view(BITS[actual.dtype]) != expected.view(BITS[expected.dtype])
    assert not wrong.any(), (actual[wrong][:5], expected[wrong][:5])


SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.0, -3.5, 1e-40, -1e-40, 3e38, -3e38, 0.25, 1e-20]


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every special value with every other, often enough for vectors and for what remains beside them."""
    both = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=dtype).T
    random = torch.randn(2, 1000, dtype=dtype, generator=torch.Generator().manual_seed(3))
    x, y = torch.cat([both, random], dim=1)
    return x.contiguous(), y.contiguous()


# exp, log, cbrt ------------------------------------------------------------------------------------------------------

TRUE = {"exp": np.exp, "log": np.log, "cbrt": np.cbrt, "softplus": lambda x: np.logaddexp(0.0, x)}
#: units in the last place; the promise is 2, or 3 where the error of exp counts in the smaller units of its logarithm,
#: and this is what the arithmetic gives on every machine
WORST = {"exp": 1.25, "log": 0.86, "cbrt": 0.55, "softplus": 3.0}


def units(actual: Any, true: Any) -> Any:
    """Errors in units of the last place of a float near the true value; infinite where a special value is missed."""
    rounded = true.astype(np.float32)
    same = (actual == rounded) | (np.isnan(actual) & np.isnan(true))
    both = np.isfinite(actual) & np.isfinite(rounded)
    unit = np.ldexp(1.0, np.maximum(np.frexp(true)[1] - 24, -149))
    return np.where(both, np.abs(actual - true) / unit, np.where(same, 0.0, INF))


def sweep() -> Iterator[Any]:
    """Patterns of floats: an even sample of all of them, then every pattern around places of interest."""
    for start in range(0, 1 << 32, 1 << 28):
        yield np.arange(start, start + (1 << 28), 131)
    every = np.arange(1 << 16)
    centres = [0.0, 2.0**-126, 1.0, 0.7071, 1.4142, 88.72, -87.33, -103.97, 0.3466, 2.0**-60, 2.0**60, 8.0, 3.4e38]
    at = np.asarray([float(c) for c in centres], dtype=np.float32).view(np.uint32).astype(np.int64)
    for centre in at:
        around = np.maximum(centre + every - (1 << 15), 0)
        yield np.concatenate([around, around | 1 << 31])
    yield np.arange(0x7F7F8000, 0x7F808000)


@pytest.mark.parametrize("name", sorted(TRUE))
def test_elementary_functions_over_the_whole_range(loops: Built, name: str) -> None:
    worst, at = 0.0, NAN
    with np.errstate(all="ignore"):
        for patterns in sweep():
            x = floats(patterns)
            if name == "softplus":  # below, it is next to nothing, and not exactly how little
                x = torch.where(x < -87, 0.0, x)
            error = units(
                loops(f"{name}_float", x).numpy().astype(np.float64), TRUE[name](x.numpy().astype(np.float64))
            )
            place = int(error.argmax())
            if error[place] > worst:
                worst, at = float(error[place]), float(x[place])
    assert worst <= WORST[name], f"{name}({at!r}) is off by {worst} units"
    assert worst > 0.4, "no arithmetic rounds better than this: the measure is wrong"


def test_elementary_functions_of_special_values(loops: Built) -> None:
    x = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, -1e-45, -1e38])
    e, logs = 2.7182817, torch.tensor([NAN, INF, NAN, -INF, -INF, 0.0, NAN, NAN, NAN])
    assert_same(loops("exp_float", x), torch.tensor([NAN, INF, 0.0, 1.0, 1.0, e, 1 / e, 1.0, 0.0]))
    assert_same(loops("log_float", x), logs)
    assert_same(loops("log_double", x.double()), logs.double())
    assert_same(loops("cbrt_float", x[:7]), x[:7])
    small = loops("softplus_float", x[:3])
    assert_same(small[:2], x[:2])
    assert 0 <= small[2] < 2e-38
    cubes = torch.arange(-200.0, 201.0)
    assert_same(loops("cbrt_float", cubes**3), cubes)
    assert_same(loops("cbrt_float", -cubes[201:] * 1e-40), -loops("cbrt_float", cubes[201:] * 1e-40))


@pytest.mark.parametrize("name", sorted(TRUE))
def test_functions_of_double(loops: Built, name: str) -> None:
    x = torch.rand(5000, dtype=torch.float64) * 1400 - 700
    x = x if name != "log" else x.abs() ** 20
    np.testing.assert_allclose(loops(f"{name}_double", x).numpy(), TRUE[name](x.numpy()), rtol=1e-15)


def test_functions_of_floats_are_loops_of_vectors_that_call_nothing(loops: Built) -> None:
    expected = {name for name in re.findall(r"// LOOP (\w+)", source()) if name not in CALLING}
    assert expected - loops.vectorised == set()
    for name in ("expf", "logf", "cbrtf"):
        assert f"\0{name}\0".encode() not in loops.content
    assert b"\0powf\0" in loops.content, "names of called functions are not found this way"


@pytest.mark.parametrize("name", sorted(TRUE))
def test_a_result_depends_on_the_element_alone(loops: Built, name: str) -> None:
    """Not on whether an element falls into a vector or into what remains at the end of a loop."""
    x = floats(np.random.default_rng(1).integers(0, 1 << 32, 67))
    whole = loops(f"{name}_float", x)
    assert_same(torch.cat([loops(f"{name}_float", x[i : i + 1]) for i in range(67)]), whole)
    assert_same(torch.cat([loops(f"{name}_float", x[:29]), loops(f"{name}_float", x[29:])]), whole)


@pytest.mark.skipif(not X86, reason="processors of one family")
@pytest.mark.parametrize(
    "processor", [("-march=x86-64",), ("-march=x86-64", "-mavx2"), ("-march=native", "-O3")], ids="".join
)
def test_other_processors_and_levels_give_the_same_bits(
    build: Callable[..., Built], loops: Built, processor: tuple[str, ...]
) -> None:
    if "-mavx2" in processor and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    other = build(*processor)
    x = floats(np.random.default_rng(2).integers(0, 1 << 32, 500_000))
    for name in TRUE:
        assert f"{name}_float" in other.vectorised
        assert_same(other(f"{name}_float", x), loops(f"{name}_float", x))
    for stored in ("bf16", "f16"):
        assert_same(other(f"float_into_{stored}", x), loops(f"float_into_{stored}", x))
        halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TYPES[stored])
        assert_same(other(f"{stored}_to_float", halves), loops(f"{stored}_to_float", halves))


# number formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["bf16", "f16"])
@pytest.mark.parametrize("real", REALS)
def test_all_halves_are_read_as_torch_reads_them(loops: Built, stored: str, real: str) -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TYPES[stored])
    read = loops(f"{stored}_to_{real}", halves)
    assert_same(read, halves.to(TYPES[real]))
    assert_same(loops(f"{real}_into_{stored}", read), halves)


def near_halves(stored: torch.dtype) -> Tensor:
    """All numbers of a format, the middles between neighbours, and the floats next to these on both sides."""
    halves = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(stored).double()
    finite = halves[halves.isfinite()]
    beyond = finite[-1] + (finite[-1] - finite[-2])
    middles = (finite + torch.cat([finite[1:], beyond[None]])) / 2
    near = torch.cat([finite, middles]).float().view(torch.int32)
    around = torch.cat([near - 1, near, near + 1]).view(torch.float32)
    return torch.cat([around, -around])


@pytest.mark.parametrize("stored", ["bf16", "f16"])
@pytest.mark.parametrize("real", REALS)
def test_numbers_are_stored_as_torch_stores_them(loops: Built, stored: str, real: str) -> None:
    random = floats(np.random.default_rng(4).integers(0, 1 << 32, 2_000_000))
    nans = floats([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF])
    x = torch.cat([random, near_halves(TYPES[stored]), nans, torch.tensor(SPECIAL)]).to(TYPES[real])
    if real == "double":
        x = torch.cat([x, x * (1 + 2.0**-30), torch.tensor([1e300, -1e300, 1e-300, 5e-324], dtype=x.dtype)])
    assert_same(loops(f"{real}_into_{stored}", x), x.to(TYPES[stored]))


def test_float_and_double_into_each_other(loops: Built) -> None:
    x = torch.cat([floats(np.random.default_rng(5).integers(0, 1 << 32, 100_000)), torch.tensor(SPECIAL)])
    assert_same(loops("float_to_double", x), x.double())
    assert_same(loops("float_into_double", x), x.double())
    wide = torch.cat([x.double() * 1.1, torch.tensor([1e300, -1e300, 1e-300, NAN], dtype=torch.float64)])
    assert_same(loops("double_into_float", wide), wide.float())


# element functions ---------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("real", REALS)


@BOTH
def test_functions_of_one_value(loops: Built, real: str) -> None:
    x, _ = pairs(TYPES[real])
    assert_same(loops(f"sign_{real}", x), torch.sign(x))
    assert_same(loops(f"abs_{real}", x), torch.abs(x))
    # torch's square root is not always the nearest number, numpy's is
    with np.errstate(all="ignore"):
        roots = torch.from_numpy(np.sqrt(x.numpy()))
    assert_same(loops(f"sqrt_{real}", x), roots)
    assert_same(loops(f"rsqrt_{real}", x), 1 / roots)
    assert_same(loops(f"pow_{real}", x, None, 0.5), roots)
    assert_same(loops(f"pow_{real}", x, None, -0.5), 1 / roots)


@BOTH
def test_comparisons_and_choices(loops: Built, real: str) -> None:
    x, y = pairs(TYPES[real])
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        assert_same(loops(f"{name}_{real}", x, y), getattr(torch, name)(x, y).to(x.dtype))
    for number in SPECIAL:
        assert_same(loops(f"where_{real}", x, y, number), torch.where(x < number, y, x))


@BOTH
def test_extremes(loops: Built, real: str) -> None:
    x, y = pairs(TYPES[real])
    # torch itself takes either zero, depending on where an element lies
    assert_same(loops(f"minimum_{real}", x, y), torch.minimum(x, y), zeros=False)
    assert_same(loops(f"maximum_{real}", x, y), torch.maximum(x, y), zeros=False)
    for number in torch.tensor(SPECIAL, dtype=x.dtype).tolist():
        assert_same(loops(f"lowered_{real}", x, None, number), x.clamp(max=number))
        assert_same(loops(f"raised_{real}", x, None, number), x.clamp(min=number))
        assert_same(loops(f"number_lowered_{real}", x, None, number), x.clamp(max=number), zeros=False)
        assert_same(loops(f"number_raised_{real}", x, None, number), x.clamp(min=number), zeros=False)


WEIGHTS = [0.0, 1.0, 0.1, 0.25, 0.499, 0.5, 0.75, 0.999, -0.3, -0.75, 1.5, -2.0]


@BOTH
@pytest.mark.parametrize("weight", WEIGHTS)
def test_lerp(loops: Built, real: str, weight: float) -> None:
    x, y = pairs(TYPES[real])
    ours, theirs = loops(f"lerp_{real}", x, y, weight), torch.lerp(x, y, weight)
    w = torch.tensor(weight, dtype=x.dtype)
    # the formula, rounded after each operation
    assert_same(ours, x + w * (y - x) if abs(weight) < 0.5 else y - (y - x) * (1 - w))
    # torch's own may keep a product unrounded, and then does not overflow in between
    huge = torch.maximum(x.abs(), y.abs()).isfinite() & ((x.abs() > 1e38) | (y.abs() > 1e38))
    x, y, ours, theirs = x[~huge], y[~huge], ours[~huge], theirs[~huge]
    whole = ours.isfinite()
    assert_same(ours[~whole], theirs[~whole])
    scale = torch.maximum(x.abs(), y.abs()) * (1 + abs(weight)) * torch.finfo(x.dtype).eps
    assert ((ours - theirs).abs() <= 2 * scale + 1e-44)[whole].all()


@BOTH
def test_lerp_reaches_its_ends(loops: Built, real: str) -> None:
    x, y = pairs(TYPES[real])
    narrow = x.isfinite() & y.isfinite() & (x.abs() < 1e30) & (y.abs() < 1e30)
    x, y = x[narrow], y[narrow]
    assert_same(loops(f"lerp_{real}", x, y, 0.0), x, zeros=False)
    assert_same(loops(f"lerp_{real}", x, y, 1.0), y, zeros=False)


@BOTH
@pytest.mark.parametrize("exponent", [2.0, 1.0, -1.0, 3.0, -2.0, 0.0])
def test_usual_powers_are_products(loops: Built, real: str, exponent: float) -> None:
    x, _ = pairs(TYPES[real])
    ours = loops(f"pow_{real}", x, None, exponent)
    assert_same(ours, x**exponent)
    if exponent == 2:
        assert_same(loops(f"square_{real}", x), ours)


@BOTH
@pytest.mark.parametrize("exponent", [0.5, -0.5, 0.25, -0.8, 1 / 3, 4.0, -3.0, INF, NAN])
def test_other_powers(loops: Built, real: str, exponent: float) -> None:
    x, _ = pairs(TYPES[real])
    ours, theirs = loops(f"pow_{real}", x, None, exponent), x**exponent
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.allclose(ours, theirs, rtol=1e-6 if real == "float" else 1e-14, atol=1e-44, equal_nan=True)
