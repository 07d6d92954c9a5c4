"""The data of the registry is consistent: contracts, schemas, kernels, rules, reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bicompile import certificate, registry
from bicompile.contract import Case, Role
from bicompile.errors import RegistrationError
from bicompile.passes import audit, rules

KERNELS = registry.load_all()
ROOT = Path(__file__).parent.parent
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@each_kernel
def test_contract_names_the_arguments_of_the_schema(kernel):
    names = {a.name for a in kernel.op._schema.arguments}
    for case in kernel.contract.cases:
        assert {a.name for a in case.inputs} | set(case.params) == names
        optional = {a.name for a in kernel.op._schema.arguments if "Optional" in str(a.type)}
        assert {a.name for a in case.inputs if a.optional} == optional


@each_kernel
def test_kernel_is_complete(kernel):
    folder = ROOT / "kernels" / kernel.family
    files = {"__init__.py", "op.py", "gpu.py", "cpu.cpp"}
    if certificate.chooses(kernel.family):
        files |= {"sweep.py"}
    assert files <= {f.name for f in folder.iterdir()}
    gpu = (folder / "gpu.py").read_text()
    assert f"def {kernel.name}(" in gpu or f"import {kernel.name} as {kernel.name}" in gpu
    assert f'"{kernel.name}"' in (folder / "cpu.cpp").read_text()
    assert kernel.order and kernel.reference.__doc__
    assert kernel.contract.dtypes == (torch.float32, torch.bfloat16, torch.float16)


def test_every_kernel_has_a_rule():
    captured_whole = {"sdpa", "sdpa_backward", "softmax_statistics"}
    fused = {"mm_add", "qk_norm_rope", "qkv_proj", "rms_norm", "swiglu"}
    made = {rule.kernel.name for rule in rules.RULES.values()}
    assert made | captured_whole | fused == set(KERNELS)


def test_families_are_documented():
    for family in {k.family for k in KERNELS.values()}:
        text = __import__(f"bicompile.kernels.{family}", fromlist=["x"]).__doc__
        assert text and len(text.split()) > 40, f"kernels/{family}/__init__.py explains its order"


def test_every_allowed_op_stands_on_one_list_with_a_reason():
    names = [n for _, ops in audit.ALLOWED.values() for n in ops]
    assert len(names) == len(set(names))
    assert all(reason for reason, _ in audit.ALLOWED.values())
    assert not set(names) & audit.RANDOM


def test_signatures():
    case = Case("x: B K, w?: K N -> B N, B")
    assert [a.name for a in case.inputs] == ["x", "w"]
    assert [a.optional for a in case.inputs] == [False, True]
    assert case.row_axes == ("B",)
    assert Role.ROW is not Role.REDUCED
    for wrong in ("x: M K", "x M -> M", "x: Z -> Z"):
        with pytest.raises(RegistrationError):
            _ = Case(wrong).inputs, Case(wrong).outputs


def test_registration_is_refused():
    mm = KERNELS["mm"]
    with pytest.raises(RegistrationError, match="the name is taken"):
        registry.register(mm)

    def elsewhere(self):
        """A reference outside the package."""

    other = registry.Kernel(**{**vars(mm), "name": "mm2", "reference": elsewhere})
    with pytest.raises(RegistrationError, match="import it as"):
        registry.register(other)


def test_docs_of_the_ops_are_current():
    from bicompile import docs

    assert docs.render() == (ROOT / "docs" / "ops.md").read_text(), "run python -m bicompile.docs"
