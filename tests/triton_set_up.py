"""Set-up of the Triton tests, on an NVIDIA GPU (`pytest -m gpu`) or in the interpreter.

In the interpreter a dot is replaced by one chain over K in the accumulator's type, which is the
order that the laws assume of the hardware; so equal bits there show the structure, and on the GPU
they show the rest.
"""

import os

import numpy
import pytest
import torch

pytest.importorskip("triton")

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"

if INTERPRET:
    import triton.language as tl
    from triton.runtime import interpreter

    numpy.seterr(all="ignore")

    def _floats(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(numpy.uint32) << 16).view(numpy.float32)
        return handle.data

    def _chain(self, a, b, acc, *rest):
        x, y = _floats(a).astype(numpy.float64), _floats(b).astype(numpy.float64)
        total, kind = acc.data, numpy.float64 if acc.dtype.scalar == tl.float64 else numpy.float32
        for k in range(x.shape[-1]):
            total = (total + x[..., :, k, None] * y[..., k, None, :]).astype(kind)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = _chain

HALF, FULL = torch.bfloat16, torch.float32
DTYPES = (torch.float16, FULL) if INTERPRET else (HALF, torch.float16, FULL)
BATCHES = (2,) if INTERPRET else (1, 2, 3, 5, 8, 17, 32)
INF, NAN = float("inf"), float("nan")


def on_device(test):
    """A test for the device, or for the interpreter inside `test_triton_interpreter`."""
    if INTERPRET:
        return test
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    return pytest.mark.gpu(absent(test))


def law(test):
    """The same, on the schedules that the tables name, certified or not."""
    return pytest.mark.usefixtures("whole_table", "fast_double_or_not")(on_device(test))


real_dot = pytest.mark.skipif(INTERPRET, reason="the interpreter's dot is a stand-in")


def randn(*shape, dtype=FULL, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def bits(x):
    x = x.contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(a, b):
    """Equal bits, in every tensor of a result."""
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        different = bits(x) != bits(y)
        assert not different.any(), f"{int(different.sum())} of {x.numel()} elements differ"


def rows(result, index):
    return tuple(x[index] for x in result) if isinstance(result, tuple) else result[index]


def views(x):
    """The same values behind other strides and alignments."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    yield flat.view(x.shape).copy_(x)
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), NAN, dtype=x.dtype, device=x.device)
    yield wide[..., 1:-2].copy_(x)
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)


def no_worse(ours, theirs, exact):
    """Root mean square error against float64; under half a unit in the last place is luck."""
    error = [float((r.double() - exact).pow(2).mean().sqrt()) for r in (ours.cpu(), theirs.cpu())]
    unit = float(exact.abs().mean()) * torch.finfo(ours.dtype).eps / 2
    assert error[0] <= 1.25 * error[1] + unit, error
    return error
