"""How bits are shown and how far apart two numbers are."""

from __future__ import annotations

import torch

from bicompile import testing


def test_ulps():
    one = torch.tensor(1.0)
    assert testing.ulps(one, torch.nextafter(one, 2 * one)) == 1
    assert testing.ulps(torch.tensor(0.0), torch.tensor(-0.0)) == 0
    smallest = torch.tensor(1e-45)
    assert testing.ulps(smallest, -smallest) == 2
    assert testing.ulps(torch.tensor(1.0).bfloat16(), torch.tensor(1.0078125).bfloat16()) == 1
    assert testing.pattern(torch.tensor(-0.0)) == "0x80000000"
    assert testing.pattern(torch.tensor(1.0).bfloat16()) == "0x3f80"
