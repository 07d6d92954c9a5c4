"""The laws of the Triton kernels on small sizes, in Triton's interpreter: no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent


FAMILIES = "attention convolution matmul mixtures order rows scan scatter schedules solve verify"


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="the interpreter of this Triton needs NumPy below 2.4",
)
@pytest.mark.parametrize(
    "family", [*FAMILIES.split(), pytest.param("windows", marks=pytest.mark.soak)]
)
def test_in_the_interpreter(family):
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, HERE / f"test_triton_{family}.py"],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
