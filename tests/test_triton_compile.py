"""Triton kernels compiled for sm_90, without a GPU: what equal bits need of the compiler."""

import importlib
import re

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bicompile import certificate, verify
from bicompile.kernels.matmul.candidates import SHARED
from bicompile.sweep import Depth, make


class _NoDevice:
    """A driver that knows a target and nothing else."""

    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)  # noqa: E731
    get_active_torch_device = lambda self: torch.device("cpu")  # noqa: E731


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that a call would launch; they are compiled and left at that."""
    kernels, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", _NoDevice())
    monkeypatch.setattr(certificate, "permits", lambda *_: True)
    return kernels


def _operand_layouts(kernel):
    return {int(k) for k in re.findall(r"kWidth = (\d)", kernel.asm["ttgir"])}


@triton.jit
def _weights_from_bytes(MASK, V, OUT):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    p = tl.where(tl.load(MASK + i) != 0, 1.0, 0.5).to(tl.bfloat16)
    tl.store(OUT + i, tl.dot(p, tl.load(V + i)))


def test_bytes_that_decide_an_operand_change_its_layout(compiled):
    """The trap: with another layout of its operands mma.sync adds in another order."""
    mask, v = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.bfloat16)
    _weights_from_bytes[(1,)](mask, v, torch.zeros(256))
    assert _operand_layouts(compiled["_weights_from_bytes"]) == {4}


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int32])
def test_masks_do_not_change_the_layout_of_operands(compiled, rows, dtype):
    from bicompile.kernels.attention import gpu, table

    use = next(s for s in table.table((2, 64), "9.0") if s.rows == rows)
    q, k = (torch.zeros(1, h, 64, 64, dtype=torch.bfloat16) for h in (4, 2))
    gpu.sdpa(q, k, k, torch.ones(64, 64, dtype=dtype), False, 0.125, chosen=use)
    assert _operand_layouts(compiled["attention_kernel"]) == {2}


@pytest.mark.parametrize("number", range(4))
def test_products_fit_shared_memory(compiled, number):
    """Every schedule with whatever follows the product, and with operands that lie as they can."""
    from bicompile.kernels.matmul import gpu
    from bicompile.kernels.matmul.table import schedules

    x, w, c = (
        torch.zeros(*size, dtype=torch.bfloat16) for size in ((160, 64), (64, 512), (160, 512))
    )
    along_k, along_m = w.t().contiguous().t(), x.t().contiguous().t()
    columns = c.t().contiguous().t()
    calls = {
        "half": (
            lambda s: gpu.mm(along_m, along_k, False, s),
            lambda s: gpu.addmm(columns, x, w, 0.5, 2.0, False, s),
        ),
        "half pair": (lambda s: gpu.swiglu(x, along_k, along_k, False, s),),
    }
    for kind, launches in calls.items():
        for s in [s for s in schedules(kind, "9.0") if s.tma][number::4]:
            for launch in launches:
                compiled.clear()
                launch(s)
                assert compiled["block_kernel"].metadata.shared <= SHARED, s


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 64])
def test_attention_compiles(compiled, rows, dtype):
    from bicompile.kernels.attention import gpu

    q, k = (torch.zeros(1, h, n, 80, dtype=dtype) for h, n in ((4, rows), (2, 64)))
    gpu.sdpa(q, k, k[..., :48], None, rows > 1, -0.125, split=rows == 1)
    capped = {"softcap": 50.0, "sinks": torch.zeros(4, dtype=dtype)}
    gpu.sdpa(q, k, k, None, rows > 1, 0.125, **capped, split=rows == 1)
    assert {"attention_kernel"} <= set(compiled) <= {"attention_kernel", "merge_kernel"}


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 128), (torch.float32, 64)])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_attention_compile(compiled, masked, dtype, size):
    from bicompile.kernels.attention_backward import gpu

    q, k = (torch.zeros(1, h, 64, size, dtype=dtype) for h in (4, 2))
    mask = torch.ones(64, 64, dtype=torch.bool) if masked else None
    gpu.sdpa_backward(q, q, k, k, mask, not masked, 0.125)
    assert {"query_kernel", "key_kernel"} <= set(compiled)
    if dtype is torch.bfloat16:
        assert _operand_layouts(compiled["query_kernel"]) <= {2}


@pytest.mark.soak
@pytest.mark.parametrize("family", sorted(verify.modules()))
def test_what_verify_tries_compiles(compiled, family):
    """On a GPU, a kernel that does not compile costs a verification."""
    for bit_class in importlib.import_module(verify.modules()[family]).classes(Depth.QUICK):
        for problem in bit_class.problems:
            tensors = make(problem, problem.values[0], "cpu")
            for schedule in (bit_class.single, *bit_class.others):
                problem.run(tensors, schedule)
    assert compiled


@pytest.mark.parametrize("k", [16, 576, 4096, 5000])
def test_norms_compile_with_and_without_weights(compiled, k):
    """Of one block and of more: a name that is None before a loop cannot be given a value in it."""
    from bicompile.kernels.norm import gpu

    x, w = torch.zeros(3, k), torch.zeros(k)
    for weight in (w, None):
        gpu.rms_norm(x, 1, weight, 1e-6, 0.0, True)
        gpu.layer_norm(x, 1, weight, weight, 1e-5)
    assert set(compiled) == {"rms_norm_kernel", "layer_norm_kernel"}
