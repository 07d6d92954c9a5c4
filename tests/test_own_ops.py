"""Ops of other packages with a contract: what is found, what a graph may hold, what is refused."""

from __future__ import annotations

import subprocess
import sys

import planted_ops  # noqa: F401
import pytest
import torch

from bicompile import errors, registry
from bicompile.testing import InvarianceViolation, assert_op_invariant, kernels
from bicompile.testing.plan import LAWS, plan

SUM = registry.load_all()["sum"].contract


def test_a_case_follows_from_its_number():
    assert plan("sum", SUM, 7) == plan("sum", SUM, 7)
    code = (
        "from bicompile import registry; from bicompile.testing.plan import plan\n"
        "print(repr([plan('sum', registry.load_all()['sum'].contract, n) for n in range(50)]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == repr([plan("sum", SUM, n) for n in range(50)])


def test_cases_cover_laws_dtypes_and_contents():
    cases = [plan("sum", SUM, n) for n in range(400)]
    assert {c.law for c in cases} == {law.__name__ for law in kernels.PROPERTIES}
    assert {c.dtype for c in cases} == {"float32", "bfloat16", "float16"}
    assert len({c.contents for c in cases}) == 5
    assert len({tuple(c.sizes.values()) for c in cases}) > 100
    windows = [plan("convolution", registry.KERNELS["convolution"].contract, n) for n in range(200)]
    assert {c.law for c in windows} == set(LAWS)


def test_the_planted_op_is_found_and_reproduced():
    assert_op_invariant("planted::honest", cases=40)
    with pytest.raises(InvarianceViolation) as caught:
        assert_op_invariant("planted::small_batches")
    message = str(caught.value)
    assert message.startswith("rows_do_not_depend_on_the_batch: ")
    with pytest.raises(InvarianceViolation):
        exec(message[message.index("from bicompile") :])


def test_a_graph_may_hold_a_registered_op():
    @torch.library.custom_op("planted::unknown", mutates_args=())
    def unknown(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    unknown.register_fake(torch.empty_like)
    x = torch.randn(3, 7)
    with pytest.raises(errors.UnsupportedOp, match=r"planted\.unknown"):
        torch.compile(lambda x: unknown(x.exp()), backend="batch_invariant")(x)
    compiled = torch.compile(lambda x: torch.ops.planted.honest(x.exp()), backend="batch_invariant")
    torch.testing.assert_close(compiled(x), x.exp() * 2)


@pytest.mark.parametrize(
    ("signature", "reason"),
    [("y: M K -> M K", "names 'y'"), ("x: M K -> M K", "is registered")],
)
def test_a_contract_fits_its_op(signature, reason):
    with pytest.raises(errors.RegistrationError, match=reason):
        name = "honest" if "x:" in signature else "free"
        if name == "free":
            torch.library.custom_op("planted::free", mutates_args=())(_twice)
        op = getattr(torch.ops.planted, name)
        registry.register_op(op, signature, order="no sum")


def test_every_argument_is_in_the_contract():
    torch.library.custom_op("planted::two", mutates_args=())(_scaled)
    with pytest.raises(errors.RegistrationError, match="nothing of the argument 'factor'"):
        registry.register_op(torch.ops.planted.two, "x: M K -> M K", order="no sum")


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor
