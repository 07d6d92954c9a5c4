"""Numbers that follow from sizes: the same whether a graph knows the sizes or not."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from torch.utils._sympy import functions

from bicompile import inductor, testing

SIZES = range(2, 200)
FUNCTIONS = {
    "quotient": lambda n: n / 7,
    "part": lambda n: 1 / n,
    "product": lambda n: n * (1 / 3),
    "root": lambda n: math.sqrt(n),
    "root of a quotient": lambda n: 1 / math.sqrt(n / 3),
    "power": lambda n: n**0.3,
    "sine": lambda n: math.sin(n),
}


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU")])],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_meets_a_number(name, dtype, device):
    """Plain PyTorch computes the number in Python, in float64."""
    if device == "cuda" and dtype is torch.float64 and name in ("power", "sine"):
        pytest.skip("CUDA's library and Python's may differ in the last bit of a float64")
    torch._dynamo.reset()
    function = FUNCTIONS[name]

    def program(x):
        return x * function(x.shape[0])

    compiled = torch.compile(program, backend="batch_invariant", dynamic=True, fullgraph=True)
    for n in list(SIZES)[:: 1 if device == "cuda" else 13]:
        x = torch.randn(n, 3, dtype=dtype, device=device)
        testing.assert_same_bits(compiled(x), program(x), f"{n} rows")


class Spelled:
    """Triton's words for torch's: int / int is float32 in both."""

    float32, float64 = torch.float32, torch.float64

    @staticmethod
    def full(size, value, dtype):
        return torch.full(size, value, dtype=dtype)

    @staticmethod
    def sqrt(x):
        return torch.tensor(math.sqrt(x.item()), dtype=x.dtype)

    sqrt_rn = sqrt


n, m = sympy.symbols("n m", integer=True, positive=True)
EXPRESSIONS = {
    "quotient": (functions.IntTrueDiv(n, m), lambda n, m: n / m),
    "part": (functions.IntTrueDiv(sympy.Integer(1), m), lambda n, m: 1 / m),
    "of sums": (functions.IntTrueDiv(n + 1, 2 * m), lambda n, m: (n + 1) / (2 * m)),
    "product": (sympy.Float(1 / 3) * functions.ToFloat(n), lambda n, m: (1 / 3) * n),
    "root": (functions.OpaqueUnaryFn_sqrt(functions.ToFloat(n)), lambda n, m: math.sqrt(n)),
}


def evaluated(expr, n, m):
    """What the text means that Inductor prints into a Triton kernel."""
    from torch._inductor.codegen.triton import texpr

    sizes = {"n": torch.tensor(n, dtype=torch.int32), "m": torch.tensor(m, dtype=torch.int32)}
    return eval(texpr(expr), {"tl": Spelled, "libdevice": Spelled, **sizes})


@pytest.mark.parametrize(("expr", "python"), EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_triton_computes_it_as_python_does(expr, python, monkeypatch):
    from torch._inductor.codegen import triton

    if hasattr(triton, "device_supports_fp64"):  # since 2.13; asks for a device
        monkeypatch.setattr(triton.TritonPrinter, "_get_scalar_float_type", lambda _: "tl.float64")
    with inductor.overrides():
        assert all(evaluated(expr, n, 7).item() == python(n, 7) for n in SIZES)
    assert any(evaluated(expr, n, 7).item() != python(n, 7) for n in SIZES)
