"""An op that a graph meets for the first time late costs what it costs early."""

from __future__ import annotations

import torch
from torch._inductor import exc, ir, lowering

from bicompile import inductor, registry

registry.load_all()
LATE = torch.ops.bicompile.softmax.default


def model(x, w):
    for _ in range(3):
        x = x @ w
    return torch.softmax(x, -1)


def described(*_):
    raise AssertionError("the text of a node holds all that it was computed from")


def test_its_text_is_not_made(monkeypatch):
    """Before 2.13, PyTorch makes it for its log even if nobody reads it: 30 layers, no end."""
    monkeypatch.delitem(lowering.lowerings, LATE, raising=False)
    for name in ("__str__", "__repr__"):
        monkeypatch.setattr(ir.ExternKernel, name, described)
    torch.compile(model, backend="batch_invariant")(torch.randn(3, 8), torch.randn(8, 8))


def test_the_log_names_the_op_alone():
    class Deep:
        __str__ = __repr__ = described

    with inductor.overrides():
        assert exc.OperatorIssue.operator_str(LATE, [Deep()], {}) == str(LATE)
