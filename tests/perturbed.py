"""A model whose rows are changed one by one, to see whether another row changes with them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bicompile import testing
from bicompile.independence import PROVEN, prove_model

ROWS = 4


class Model(nn.Module):
    """A function as a model; the exporter keeps lines of functions called `forward` alone."""

    def __init__(self, function, **modules):
        super().__init__()
        function.__code__ = function.__code__.replace(co_name="forward")
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def leaking(model, args, kwargs, axis):
    """Whether a change of one row of the inputs changes another row of some output."""

    def run(row=None):
        def changed(x):
            if not isinstance(x, torch.Tensor) or x.dim() <= axis or x.shape[axis] != ROWS:
                return x
            x = x.clone()
            if row is not None:
                x.select(axis, row).mul_(-3).add_(1).remainder_(7)
            return x

        torch.manual_seed(0)
        with torch.no_grad():
            result = model(*map(changed, args), **{k: changed(v) for k, v in kwargs.items()})
        return [testing.bits(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]

    before = run()
    for row in range(ROWS):
        differences = [a != b for a, b in zip(before, run(row), strict=True)]
        assert any(d.any() for d in differences), "the model reads nothing of the row"
        for d in differences:
            rows = [i for i in (axis, *range(d.dim())) if d.dim() > i and d.shape[i] == ROWS]
            if rows:
                d.select(rows[0], row).fill_(False)
            if d.any():
                return True
    return False


def confirm(model, *args, axis=0, **kwargs):
    """The verdicts, after a run has shown that rows meet exactly where one is not "proven"."""
    batch = None if axis == 0 else dict.fromkeys([*range(len(args)), *kwargs], axis)
    found = prove_model(model, *args, batch=batch, **kwargs)
    proven = all(f.verdict == PROVEN for f in found)
    assert leaking(model, args, kwargs, axis) != proven, found
    return found


# ---------------------------------------------------------------------------------------- models
