"""No bit follows the schedule: each launch draws its own, on the GPU and in the interpreter."""

import planted_schedules
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import samples
from triton_set_up import DEVICE, DTYPES, HALF, INTERPRET, on_device, randn, same

from bicompile import certificate, registry, testing
from bicompile.kernels.attention import gpu as attention
from bicompile.kernels.matmul import gpu as matmul
from bicompile.kernels.matmul.schedules import SINGLE

KERNELS = registry.load_all()
IN_THE_INTERPRETER = ("mm", "sum", "softmax", "rms_norm")
LAWS = (testing.rows_do_not_depend_on_the_batch, testing.bits_do_not_depend_on_layout)

if INTERPRET:
    attention.CHUNK, attention.TILE, attention.MERGE_ROWS = 32, {2: 16, 4: 16}, 128


def launcher(name):
    """The op as it is launched on this device; the interpreter is not an op's implementation."""
    if not INTERPRET:
        return KERNELS[name].op
    module = __import__(f"bicompile.kernels.{KERNELS[name].family}.gpu", fromlist=[name])
    return getattr(module, name)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IN_THE_INTERPRETER if INTERPRET else list(KERNELS))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(name, dtype, law):
    @given(sample=samples(KERNELS[name], dtype, DEVICE), seed=st.integers(0, 99))
    def holds(sample, seed):
        with testing.random_schedules(seed):
            law(launcher(name), sample, seed=seed)

    if INTERPRET:  # other sizes are for the GPU
        sizes = {"M": 37, "N": 24, "K": 70, "K1": 5, "K2": 9, "N1": 3, "N2": 5, "B": 2}
        for number, case in enumerate(KERNELS[name].contract.cases[:2]):
            sample = testing.make_sample(KERNELS[name], case, dtype, sizes, seed=number)
            with testing.random_schedules(number):
                law(launcher(name), sample)
    else:
        holds()


@on_device
def test_a_schedule_that_sets_bits_is_caught():
    real, planted = SINGLE["half"], planted_schedules.SplitK(16, 32, 64)
    large, w = 1000 * randn(33, 100), randn(24, 100, dtype=HALF)
    x = torch.cat([large + randn(33, 100), -large], 1).to(HALF)  # what is left shows the order
    w = torch.cat([w, w], 1)

    def op(x):
        s = certificate.choose("matmul", "half", real, real, lambda: (real, planted))
        if s == planted:
            return planted_schedules.split_k((x, w), s)
        return matmul.mm(x, w.t(), False, chosen=s)

    same(op(x), op(x))
    with testing.random_schedules(), pytest.raises(AssertionError):
        for _ in range(10):
            same(op(x), op(x))


def test_draws_can_be_repeated_and_end():
    def draw():
        return certificate.choose("any", "any", 1, 1, lambda: range(1000))

    seen = []
    for _ in range(2):
        with testing.random_schedules(3):
            seen.append([draw() for _ in range(5)])
    assert seen[0] == seen[1] and len(set(seen[0])) > 1
    assert draw() == 1


@on_device
@pytest.mark.skipif(INTERPRET, reason="a model runs on a GPU")
@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["plain", "CUDA graphs"])
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_models(options, dynamic):
    """Where a CUDA graph is recorded, it keeps the schedules that were drawn for its batch."""
    from test_cuda_graphs import decoded
    from test_models import compiled

    expected = decoded(compiled("qwen3", torch.bfloat16, DEVICE), 1)
    subject = compiled("qwen3", torch.bfloat16, DEVICE, dynamic=dynamic, **options)
    for seed, batch in enumerate((1, 2, 5)):
        with testing.random_schedules(seed):
            for run in range(3):  # warm-up, recording, replay
                testing.assert_same_bits(decoded(subject, batch), expected, f"{batch}, run {run}")
