"""Every pointwise function gives an element the same bits, whichever loop body computes it.

All functions of the table run in one graph, compiled by the real Inductor path under
`bicompile.inductor.overrides()`; each layout below reaches other loop bodies (vector, tail, scalar,
strided, broadcast, masked, one and two threads).  A canary runs the same check without overrides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch.nn.functional as F
from pointwise_functions import FUNCTIONS, VARIANT, Function
from torch import Tensor
from torch._inductor import dependencies
from torch._inductor.compile_fx import compile_fx_inner

from bicompile import inductor
from bicompile.errors import UnknownOption

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 70, 127, 130, 1000, 4097)
SPECIAL = (
    *(0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 1.17e-38),
    *(1.0, -1.0, 0.5, 1e-5, 88.0, -88.0, 90.0, -104.0, 1e30, -1e30, 5e4, 1e6),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def base_row(n: int, dtype: torch.dtype) -> Tensor:
    """Values of all magnitudes, the special ones spread among them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(1.5).exp()
    x[::7] *= 0.01
    at = torch.arange(len(SPECIAL)) * 3 + 1
    x[at] = torch.tensor(SPECIAL)
    return x.to(dtype)


def bits(t: Tensor) -> Tensor:
    """The bits of every element, all NaNs alike."""
    if not t.is_floating_point():
        return t.to(torch.int64)
    integer = {2: torch.int16, 4: torch.int32}[t.element_size()]
    return t.contiguous().view(integer).to(torch.int64).masked_fill(t.isnan(), -1)


def plain_inner(gm, example_inputs, **kwargs):
    """What the canary compiles with: Inductor without our overrides."""
    return compile_fx_inner(gm, example_inputs, **kwargs)


class Sweep:
    """Runs functions in many layouts and records which of them gave an element other bits."""

    def __init__(self, names: Sequence[str], dtype: torch.dtype, inner=inductor.compile_inner):
        self.names, self.inner = list(names), inner
        self.row = base_row(4097, dtype)
        self.found: dict[str, list[str]] = {}
        self.reference: list[Tensor] = []

    def compile(self, layout: Callable[[Function, Tensor], Tensor], dynamic: bool = False):
        """A new graph of all functions, each applied as `layout` says."""
        torch._dynamo.reset()
        functions = [FUNCTIONS[name] for name in self.names]

        def backend(gm, example_inputs, **kwargs):
            stamp = self.inner.__name__
            return inductor.compile_graph(gm, example_inputs, inner=self.inner, stamp=stamp)

        def model(x):
            return tuple(layout(f, x) for f in functions)

        return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)

    def check(self, label: str, outputs: Sequence[Tensor], at: Tensor) -> None:
        """Element i of each output must have the bits of element at[i] of the reference."""
        for name, out, want in zip(self.names, outputs, self.reference, strict=True):
            if not torch.equal(bits(out).reshape(-1), want[at.reshape(-1)]):
                self.found.setdefault(name, []).append(label)

    def dynamic(self, sizes: Sequence[int] = SIZES) -> None:
        """One dynamic graph: sizes, offsets, neighbours, unaligned views, two threads."""
        x = self.row
        run = self.compile(lambda f, x: f(x), dynamic=True)
        self.reference = [bits(out) for out in run(x)]
        for n in sizes:
            self.check(f"size {n}", run(x[:n].clone()), torch.arange(n))
        for start in (1, 3, 5, 8):
            at = torch.arange(start, start + 100)
            self.check(f"moved by {start}", run(x[at]), at)
            self.check(f"unaligned by {start}", run(x[start : start + 100]), at)
        for value in (float("nan"), float("inf"), 1e6, -1e30, 1e-40):
            crowd = x.clone()
            crowd[1::2] = value
            self.check(f"beside {value}", [out[::2] for out in run(crowd)], torch.arange(4097)[::2])
        at = torch.arange(4097).repeat(40)
        self.check("long", run(x[at]), at)

    def static(self, n: int) -> None:
        self.check(f"static {n}", self.compile(lambda f, x: f(x))(self.row[:n]), torch.arange(n))

    def strided(self, n: int = 1000) -> None:
        x = torch.stack([self.row[:n], self.row[1 : n + 1]], 1)[:, 0]
        self.check("stride 2", self.compile(lambda f, x: f(x))(x), torch.arange(n))

    def transposed(self) -> None:
        x, at = self.row[:1000].view(25, 40).t(), torch.arange(1000).view(25, 40).t()
        self.check("transposed", self.compile(lambda f, x: f(x).contiguous())(x), at)

    def broadcast(self, dim: int) -> None:
        at = torch.arange(64).unsqueeze(dim).expand(*((33, 64) if dim == 0 else (64, 33)))
        run = self.compile(lambda f, x: f(x.unsqueeze(dim)).expand(at.shape).clone())
        self.check(f"broadcast over dim {dim}", run(self.row[:64]), at)

    def masked(self, n: int = 130) -> None:
        run = self.compile(lambda f, x: F.pad(f(x), (3, 2)))
        self.check("padded", [out[3:-2] for out in run(self.row[:n])], torch.arange(n))


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Compile anew, and leave the number of threads as it was."""
    threads = torch.get_num_threads()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch.set_num_threads(threads)


def test_the_table_is_long_enough():
    assert len(FUNCTIONS) >= 75
    assert set(VARIANT) <= set(FUNCTIONS)


def test_every_function_is_invariant_in_float32():
    torch.set_num_threads(2)
    sweep = Sweep(list(FUNCTIONS), torch.float32)
    sweep.dynamic()
    torch.set_num_threads(1)
    sweep.strided()
    sweep.broadcast(dim=1)
    sweep.masked()
    assert sweep.found == {}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.soak)], ids=str
)
def test_functions_with_two_bodies_are_invariant_in_half_types(dtype):
    sweep = Sweep(VARIANT, dtype)
    sweep.dynamic()
    sweep.strided()
    assert sweep.found == {}


def without_the_other_half_type(dtype: torch.dtype) -> list[str]:
    """Inductor does not vectorise a kernel in which both half types occur."""
    other = {torch.bfloat16: "float16 and back", torch.float16: "bfloat16 and back"}
    return [name for name in FUNCTIONS if name != other.get(dtype)]


@pytest.mark.soak
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_function_is_invariant_in_every_layout(dtype, threads):
    torch.set_num_threads(threads)
    sweep = Sweep(without_the_other_half_type(dtype), dtype)
    sweep.dynamic(sizes=(*range(1, 71), 127, 128, 129, 130, 1000, 4097))
    for n in (1, 3, 8, 17, 33, 130, 1000):
        sweep.static(n)
    sweep.strided()
    sweep.transposed()
    sweep.broadcast(dim=0)
    sweep.broadcast(dim=1)
    sweep.masked()
    assert sweep.found == {}


def test_canary_plain_inductor_is_caught():
    sweep = Sweep(VARIANT, torch.float32, inner=plain_inner)
    sweep.dynamic()
    sweep.strided()
    assert len(sweep.found) >= 30, sweep.found
    assert "beside 1000000.0" in sweep.found["sin"]  # its vector form reads the other lanes


def test_vector_widths_give_the_same_bits():
    x = torch.cat([base_row(4097, torch.float32), torch.linspace(-6e4, 6e4, 2000)])
    names = [name for name in FUNCTIONS if name in inductor.FAST]
    assert len(names) == len(inductor.FAST)
    results = []
    for width in (None, 256, 1):  # the widest, AVX2, scalar
        sweep = Sweep(names, torch.float32)
        with torch._inductor.config.patch({"cpp.simdlen": width}):
            results.append([bits(out) for out in sweep.compile(lambda f, x: f(x))(x)])
    for other in results[1:]:
        for name, a, b in zip(names, results[0], other, strict=True):
            assert torch.equal(a, b), name


# ---- Accuracy ------------------------------------------------------------------------------------

# Largest error in units in the last place, as functions.h states it (sigmoid: where exp(-x) is
# finite).
ULP = {
    "exp": 0.99,
    "expm1": 1.36,
    "tanh": 1.23,
    "log": 0.81,
    "log1p": 0.88,
    "erf": 0.99,
    "sin": 0.77,
    "cos": 0.77,
    "sigmoid": 2.2,
}


def ulp_error(got: Tensor, exact: Tensor) -> float:
    """The largest error over all finite results, in units in the last place of float32."""
    exponent = torch.frexp(exact.abs().clamp_min(2.0**-126))[1].double() - 24
    finite = exact.abs() <= torch.finfo(torch.float32).max
    return ((got.double() - exact).abs() / torch.exp2(exponent))[finite].max().item()


def test_float32_functions_are_accurate():
    x = torch.arange(-(2**31), 2**31, 4093).to(torch.int32).view(torch.float32)
    x = x[x.isfinite()]
    inputs = dict.fromkeys(ULP, x)
    inputs |= {name: x[x.abs() < 1e8] for name in ("sin", "cos")}
    inputs |= {"log": x[x > 0], "log1p": x[x > -1], "sigmoid": x[x > -88]}

    def backend(gm, example_inputs, **kwargs):
        return inductor.compile_graph(gm, example_inputs, stamp="accuracy")

    run = torch.compile(
        lambda xs: {name: getattr(torch, name)(v) for name, v in xs.items()}, backend=backend
    )
    for name, got in run(inputs).items():
        error = ulp_error(got, getattr(torch, name)(inputs[name].double()))
        assert error <= ULP[name], f"{name}: {error}"


SPECIAL_VALUES = {
    "exp": {"-inf": "0", "inf": "inf", "-0.0": "1", "89": "inf", "-104": "0"},
    "expm1": {"-inf": "-1", "inf": "inf", "-0.0": "-0.0", "89": "inf", "1e-45": "1e-45"},
    "tanh": {"-inf": "-1", "inf": "1", "-0.0": "-0.0", "1e-45": "1e-45"},
    "log": {"0.0": "-inf", "-0.0": "-inf", "inf": "inf", "-1": "nan", "1": "0"},
    "log1p": {"-1": "-inf", "-0.0": "-0.0", "inf": "inf", "-2": "nan", "1e-45": "1e-45"},
    "erf": {"-inf": "-1", "inf": "1", "-0.0": "-0.0"},
    "sin": {"inf": "nan", "-0.0": "-0.0", "1e-45": "1e-45"},
    "cos": {"inf": "nan", "-0.0": "1"},
    "sigmoid": {"-inf": "0", "inf": "1", "0": "0.5"},
}


def test_float32_functions_are_right_at_special_values():
    def backend(gm, example_inputs, **kwargs):
        return inductor.compile_graph(gm, example_inputs, stamp="special")

    names = list(SPECIAL_VALUES)
    inputs = [torch.tensor([*map(float, SPECIAL_VALUES[name]), float("nan")]) for name in names]
    run = torch.compile(
        lambda xs: [getattr(torch, name)(x) for name, x in zip(names, xs, strict=True)],
        backend=backend,
    )
    for name, got in zip(names, run(inputs), strict=True):
        want = torch.tensor([*map(float, SPECIAL_VALUES[name].values()), float("nan")])
        assert torch.equal(bits(got), bits(want)), (name, got, want)


# ---- The overrides themselves --------------------------------------------------------------------


def snapshot() -> list[dict[str, object]]:
    from torch._inductor.codegen import cpp
    from torch._inductor.scheduler import Scheduler

    classes = cpp.CppOverrides, cpp.CppVecOverrides, cpp.KernelGroup, Scheduler
    return [dict(vars(c)) for c in classes]


def test_overrides_leave_inductor_as_it_was():
    before = snapshot()
    with inductor.overrides():
        inside = snapshot()
        with inductor.overrides():
            assert snapshot() == inside
        assert snapshot() == inside
    assert all(now != then for now, then in zip(inside, before, strict=True))
    assert snapshot() == before
    with pytest.raises(ZeroDivisionError), inductor.overrides():
        raise ZeroDivisionError
    assert snapshot() == before


def test_small_kernels_are_joined_though_both_could_reuse_memory():
    # Else the keys and the values of a token go into a cache by a kernel each.
    def reading(*sizes):
        cache = dependencies.StarDep("cache")
        reads = [dependencies.MemoryDep(str(size), sympy.S.Zero, (), ()) for size in sizes]
        return SimpleNamespace(read_writes=SimpleNamespace(reads=[*reads, cache]))

    def size(dep):
        return int(dep.name) if dep.name != "cache" else 2 * inductor.LITTLE

    scheduler = SimpleNamespace(dep_size_hint=size)
    always, never = (inductor._raises_memory(lambda *_, r=r: r) for r in (True, False))
    small, large = reading(2048, 8), reading(inductor.LITTLE)
    assert not always(scheduler, small, small)
    assert always(scheduler, small, large)
    assert not never(scheduler, large, large)


def test_every_replaced_function_keeps_its_name():
    # Inductor falls back from the vector body to the scalar body by name.
    for owner, name, value in inductor._replacements():
        if isinstance(value, staticmethod):
            assert value.__func__.__name__ == name, owner


def test_every_pinned_key_of_the_config_is_known_or_left_out():
    patches = inductor.config_patches(None, "stamp")
    known = torch._inductor.config.get_config_copy()
    assert set(patches) <= set(known)
    assert all(reason for _, reason in inductor.PINNED.values())


def test_modes():
    assert inductor.config_patches("reduce-overhead", "s")["triton.cudagraphs"] is True
    assert inductor.config_patches("max-autotune", "s")["max_autotune"] is False
    assert "triton.cudagraphs" not in inductor.config_patches("max-autotune-no-cudagraphs", "s")
    with pytest.raises(UnknownOption, match="mode"):
        inductor.config_patches("fast", "s")


def test_the_stamp_holds_the_identity_of_header_and_overrides():
    one, two = (inductor.config_patches(None, s)["joint_custom_pre_pass"] for s in "ab")
    assert one.uuid() != two.uuid()
    assert one.uuid().endswith(inductor._own_hash())
