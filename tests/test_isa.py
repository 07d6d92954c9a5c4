"""One source, one answer: every op has the same bits on AVX-512, AVX2 and plain C++."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from bicompile import native, registry, testing

AXES = ("M", "N", "N1", "N2", "K", "K1", "K2", "B", "H", "H1", "Q", "S", "D", "C", "G")
AXES += ("I1", "I2", "I3", "W1", "W2", "W3")
SMALL = (5, 7, 3, 6, 45, 5, 9, 2, 4, 3, 3, 70, 24, 3, 2, 19, 7, 5, 3, 2, 1)
LARGE = (37, 50, 17, 40, 64, 4, 16, 2, 2, 1, 19, 33, 16, 2, 1, 9, 18, 3, 4, 5, 3)
SIZES = [dict(zip(AXES, sizes, strict=True)) for sizes in (SMALL, LARGE)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@cache
def digests() -> dict[str, str]:
    """A hash of the bits of every op's results on fixed inputs, subnormal and infinite ones too."""
    found = {}
    for kernel in registry.load_all().values():
        for dtype in DTYPES:
            digest = hashlib.sha256()
            for number, sizes in enumerate(SIZES):
                for case in kernel.contract.cases:
                    sample = testing.make_sample(kernel, case, dtype, sizes, seed=number)
                    for tensors in (sample.tensors, _extreme(sample.tensors)):
                        for out in testing.outputs(sample.run(kernel.op, tensors)):
                            digest.update(testing.bits(out).numpy().tobytes())
            found[f"{kernel.name} {dtype}"] = digest.hexdigest()
    return found


def _extreme(tensors):
    """The tensors with tiny, huge and infinite elements among them."""
    changed = {}
    for name, t in tensors.items():
        if t is not None and t.is_floating_point():
            t = t.clone()
            flat = t.view(-1)
            flat[::3] *= torch.finfo(t.dtype).tiny * 8
            flat[5::17] *= torch.finfo(t.dtype).max / 64
            flat[40::101] = torch.inf
        changed[name] = t
    return changed


def run_with(isa: str) -> dict[str, str]:
    command = [sys.executable, __file__, isa]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(native.isa() == "plain", reason="this machine has one instruction set")
@pytest.mark.soak
@pytest.mark.parametrize("isa", [name for name in native.ISA_FLAGS if name != native.isa()])
def test_same_bits(isa):
    if not native.runs(isa):
        pytest.skip(f"this machine has no {isa}")
    native.load()
    ours, theirs = digests(), run_with(isa)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert not different


if __name__ == "__main__":
    native.load(isa=sys.argv[1])
    print(json.dumps(digests()))
