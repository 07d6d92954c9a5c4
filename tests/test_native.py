"""The C++ kernels: the order of their sums, and the cache of built libraries."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from bicompile import errors, native, registry, testing
from bicompile.backend import families_on_cpu

MM, BMM = (registry.load_all()[name].op for name in ("mm", "bmm"))
TINY = np.float32(2.0**-126)


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


# ------------------------------------------------------------------- the order of a dot product


def fma(a, b, c):
    """`a * b + c` of float32 arrays, rounded once: exact product, sum rounded to odd in double."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = total.view(np.int64) % 2 == 0
    total = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return total.astype(np.float32)


def flushed(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def tree(lanes):
    for w in (8, 4, 2, 1):
        lanes = lanes[:w] + lanes[w : 2 * w]
    return lanes[0]


def dot(a, b, *, pairs):
    """The scalar order of kernels/matmul for rows a [M, K] and b [N, K], as an [M, N] array."""
    block = 32 if pairs else 16
    pad = -a.shape[1] % block
    a, b = (np.pad(x, ((0, 0), (0, pad))) for x in (a, b))
    lanes = np.zeros((16, len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], block):
        for lane in range(16):
            for i in (2 * lane + 1, 2 * lane) if pairs else (lane,):
                x, y = a[:, None, k + i], b[None, :, k + i]
                if pairs:
                    lanes[lane] = flushed(fma(flushed(x), flushed(y), lanes[lane]))
                else:
                    lanes[lane] = fma(x, y, lanes[lane])
    return tree(lanes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 9, 77), (5, 8, 32), (7, 50, 100), (69, 66, 45)])
def test_matmul_is_its_scalar_loop(dtype, m, n, k):
    generator = torch.Generator().manual_seed(m * n * k)
    a, w = (torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n, k)))
    a[0] *= 1e-18 if dtype is not torch.float16 else 1e-3
    w[:3] *= 1e-20 if dtype is not torch.float16 else 1e-3
    expected = dot(a.float().numpy(), w.float().numpy(), pairs=dtype is torch.bfloat16)
    expected = torch.from_numpy(expected).to(dtype)
    testing.assert_same_bits(MM(a, w.t(), False), expected, "rows of b along K")
    testing.assert_same_bits(MM(a, w.t().contiguous(), False), expected, "rows of b along N")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_size_takes_the_same_sums(dtype):
    """Few rows and many rows, narrow and wide b, either layout: other code, the same bits."""
    a, w = torch.randn(150, 330).to(dtype), torch.randn(131, 330).to(dtype)
    full = MM(a, w.t(), False)
    for b in (w.t(), w.t().contiguous()):
        for m in (1, 2, 3, 4, 5, 7, 8, 23, 24, 63, 64, 65, 100):
            testing.assert_same_bits(MM(a[:m], b, False), full[:m], f"{m} rows")
        for n in (1, 15, 16, 17, 32, 33, 48, 49, 64, 80):
            testing.assert_same_bits(MM(a, b[:, :n], False), full[:, :n], f"{n} columns")
            testing.assert_same_bits(MM(a[:3], b[:, :n], False), full[:3, :n], f"3 x {n}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 63, 64, 69, 100])
def test_a_transposed_left_side_is_read_as_it_lies(dtype, rows):
    """As the gradient of a weight has it, and as a slice of a larger matrix."""
    generator = torch.Generator().manual_seed(0)
    for terms in (1, 31, 45, 128):
        whole = torch.randn(2, terms, rows + 3, generator=generator).to(dtype)
        left, right = whole[..., 1:-2].mT, torch.randn(2, terms, 50, generator=generator).to(dtype)
        for op, pick in ((MM, lambda t: t[1]), (BMM, lambda t: t)):
            apart = op(pick(left).contiguous(), pick(right), False)
            testing.assert_same_bits(op(pick(left), pick(right), False), apart, f"{terms} terms")


def test_addmm_without_beta_ignores_self():
    addmm = registry.KERNELS["addmm"].op
    a, b = torch.randn(3, 20), torch.randn(20, 4)
    out = addmm(torch.full((4,), torch.nan), a, b, 0.0, 1.0, False)
    testing.assert_same_bits(out, MM(a, b, False), "beta = 0")


def test_flushing_of_subnormals_by_the_caller_changes_nothing():
    a, b = torch.full((4, 64), 1e-20), torch.full((64, 4), 1e-20)
    before = MM(a, b, False)
    try:
        torch.set_flush_denormal(True)
        flushing = MM(a, b, False)
    finally:
        torch.set_flush_denormal(False)
    testing.assert_same_bits(flushing, before, "torch.set_flush_denormal")


# ------------------------------------------------------------------------ the cache of libraries


SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() {{ return {}; }}\n'


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A family that compiles in no time, and an empty cache."""
    family = tmp_path / "kernels" / "toy"
    family.mkdir(parents=True)
    (tmp_path / "kernels" / "common").mkdir()
    (family / "cpu.cpp").write_text(SOURCE.format(42))
    monkeypatch.setattr(native, "KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "cache")
    return family


@pytest.fixture
def compilations(monkeypatch):
    """The families that were compiled, in order."""
    seen, compile_ = [], native._compile
    monkeypatch.setattr(
        native, "_compile", lambda family, *rest: (seen.append(family), compile_(family, *rest))
    )
    return seen


def test_a_library_is_built_once(toy, compilations):
    first = native.build("plain")
    assert native.build("plain") == first
    assert compilations == ["toy"]
    assert first["toy"].is_file()


def test_sources_headers_and_isa_name_the_library(toy, compilations):
    names = {native.build("plain")["toy"].name}
    (toy.parent / "common" / "some.h").write_text("// header\n")
    names.add(native.build("plain")["toy"].name)
    (toy / "cpu.cpp").write_text(SOURCE.format(43))
    names.add(native.build("plain")["toy"].name)
    if native.runs("avx2"):
        names.add(native.build("avx2")["toy"].name)
    assert len(names) == len(compilations)


@pytest.mark.parametrize("damage", ["cut short", "foreign", "no checksum"])
def test_a_damaged_library_is_never_used(toy, compilations, damage):
    library = native.build("plain")["toy"]
    whole = library.read_bytes()
    if damage == "cut short":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "foreign":
        library.write_bytes(b"\x7fELF" + bytes(5000))
    else:
        library.with_suffix(".sha256").unlink()
    assert native.build("plain")["toy"] == library
    assert compilations == ["toy", "toy"]
    assert native._is_whole(library)


def test_processes_may_build_at_once(toy, tmp_path):
    code = (
        "import sys, pathlib; from bicompile import native\n"
        f"native.KERNELS = pathlib.Path({str(native.KERNELS)!r})\n"
        f"native.cache_folder = lambda: pathlib.Path({str(tmp_path / 'cache')!r})\n"
        "library = native.build('plain')['toy']\n"
        "import ctypes; assert ctypes.CDLL(str(library)).answer() == 42\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert native._is_whole(native._library("toy", "plain"))
    assert not any(p.is_dir() for p in (tmp_path / "cache").iterdir()), "a folder is left behind"


def test_without_a_compiler_the_error_says_what_to_install(toy, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(errors.CompilerNotFound, match="no-such-compiler"):
        native.build("plain")


def test_without_a_compiler_a_built_library_is_used(toy, compilations, monkeypatch):
    library = native.build("plain")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.build("plain") == library
    assert compilations == ["toy"]


def test_a_compiler_error_is_shown(toy):
    (toy / "cpu.cpp").write_text("this is not C++\n")
    with pytest.raises(errors.CompilationFailed, match="this is not C"):
        native.build("plain")


# ------------------------------------------------------------------- what a model needs


def test_a_graph_builds_the_families_that_it_calls(toy, compilations, monkeypatch):
    """And a family whose library is loaded is not built again."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "families", lambda: ["other", "toy"])
    native.load(["toy"], isa="plain")
    native.load(["toy"], isa="plain")
    assert compilations == ["toy"] and native._loaded == {"toy": "plain"}


def test_families_of_a_graph():
    """Those that run on the CPU, of its own nodes and of the graphs that it holds."""

    def product(device):
        graph = torch.fx.Graph()
        inputs = [graph.placeholder(name) for name in "xw"]
        for node in inputs:
            node.meta["val"] = torch.empty(2, 2, device=device)
        graph.output(graph.call_function(MM, (*inputs, False)))
        return torch.fx.GraphModule({}, graph)

    graph = torch.fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"), graph.placeholder("w"))))
    inner = product("cpu")
    outer = torch.fx.GraphModule({"inner": inner}, graph)
    assert families_on_cpu(inner) == families_on_cpu(outer) == {"matmul"}
    assert families_on_cpu(product("meta")) == set()
