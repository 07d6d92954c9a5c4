"""Every law for every registered kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import samples

from bicompile import native, registry, testing

KERNELS = registry.load_all()
WITH_WINDOWS = [k for k in KERNELS.values() if any(c.windows for c in k.contract.cases)]
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
each_property = pytest.mark.parametrize("law", testing.kernels.PROPERTIES, ids=lambda p: p.__name__)


each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


@each_device
@each_kernel
@each_dtype
@each_property
def test_law(kernel, dtype, law, device):
    @given(sample=samples(kernel, dtype, device), seed=st.integers(0, 99))
    def holds(sample, seed):
        law(kernel.op, sample, seed=seed)

    holds()


@each_device
@pytest.mark.parametrize("kernel", WITH_WINDOWS, ids=lambda k: k.name)
@each_dtype
@pytest.mark.parametrize("law", testing.kernels.OF_WINDOWS, ids=lambda p: p.__name__)
def test_law_of_windows(kernel, dtype, law, device):
    """The laws for windows that slide over an image."""
    test_law(kernel, dtype, law, device)


@each_device
@each_kernel
@each_dtype
def test_every_element_is_written(kernel, dtype, poisoned_memory, device):
    @given(sample=samples(kernel, dtype, device))
    def holds(sample):
        clean = sample.run(kernel.op)
        torch.use_deterministic_algorithms(False)
        testing.assert_same_bits(clean, sample.run(kernel.op), "poisoned memory")
        torch.use_deterministic_algorithms(True, warn_only=True)

    holds()


SIZES = {
    "M": 512,  # each row has its own error of scale: with few, chance decides
    "N": 48,
    "N1": 20,
    "N2": 33,
    "K": 777,
    "K1": 37,
    "K2": 21,
    "B": 3,
    "H": 4,
    "H1": 2,
    "Q": 33,
    "S": 129,
    "D": 64,
    "C": 3,
    "G": 2,
    "I1": 33,
    "I2": 19,
    "I3": 6,
    "W1": 5,
    "W2": 3,
    "W3": 2,
}

OWN_SIZES = {
    "prod": {"K": 60, "K1": 6, "K2": 9},  # a longer product leaves the range
    "cumprod": {"K": 60},
    "logcumsumexp": {"N": 3},
    "qk_norm_rope": {"Q": 500},  # tokens are its rows
    "convolution": {"C": 12},  # with few terms, chance decides
}


@each_device
@each_kernel
@each_dtype
def test_error_is_no_worse_than_pytorchs(kernel, dtype, device):
    for number, case in enumerate(kernel.contract.cases):
        sizes = SIZES | OWN_SIZES.get(kernel.name, {})
        sample = testing.make_sample(kernel, case, dtype, sizes, seed=number, device=device)
        ours, torchs, rounding = testing.error_against_float64(kernel.op, sample)
        # Where both only round once they differ by chance alone: the figures agree to the percent.
        assert ours <= 1.02 * max(torchs, rounding), (case, ours, torchs, rounding)


@each_device
@each_kernel
def test_fake_agrees_with_the_kernel(kernel, device):
    for case in kernel.contract.cases:
        sizes = {**SIZES, "K": 7, "S": 9, "Q": 5}
        sample = testing.make_sample(kernel, case, torch.float32, sizes, device=device)
        torch.library.opcheck(
            kernel.op, sample.arguments(), test_utils=("test_schema", "test_faketensor")
        )


# PyTorch's own op has no value there.
UNDEFINED = {
    *(("group_norm", axis) for axis in ("K", "K1", "K2")),
    ("index_add", "S"),
    ("softmax_statistics", "K"),
    ("convolution", "N"),
}


@each_device
@each_kernel
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_zero_sizes(kernel, device):
    for case in kernel.contract.cases:
        for axis in case.axes:
            if axis[0] in "1CGDHIW" or (kernel.name, axis) in UNDEFINED:
                continue
            if kernel.name == "norm" and axis[0] == "K" and not 0 <= case.params["p"] < math.inf:
                continue
            sizes = {**SIZES, "K": 7, "S": 9, "Q": 5, "M": 3, "N": 2, axis: 0}
            sample = testing.make_sample(kernel, case, torch.float32, sizes, device=device)
            ours, true = sample.run(kernel.op), sample.run(kernel.reference)
            for a, b in zip(testing.outputs(ours), testing.outputs(true), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, msg=f"{case} {axis}=0")
