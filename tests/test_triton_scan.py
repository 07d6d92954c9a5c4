"""The laws of the Triton kernel of the scans."""

import pytest
import torch
from triton_set_up import DEVICE, DTYPES, INF, INTERPRET, NAN, law, no_worse, randn, same, views

from bicompile.kernels.scan import gpu as scan
from bicompile.testing.contents import CONTENTS

EAGER = {"cumsum": torch.cumsum, "cumprod": torch.cumprod, "logcumsumexp": torch.logcumsumexp}
each_scan = pytest.mark.parametrize("name", EAGER)


def near_one(name, *shape, dtype=torch.float32, seed=0):
    """Numbers whose running products stay in the range of a half-precision float."""
    x = randn(*shape, dtype=torch.float32, seed=seed)
    return (torch.exp(x / 64) if name == "cumprod" else x).to(dtype)


@law
@each_scan
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_is_the_end_of_its_prefix(name, dtype):
    op = getattr(scan, name)
    for rows, n in ((3, 5), (2, 130), (2, 2100)) if INTERPRET else ((3, 5), (17, 130), (3, 5000)):
        x = near_one(name, rows, n, dtype=dtype)
        whole = op(x, 1, dtype)
        for k in (1, 2, 3, n // 2, n - 1):
            same(op(x[:, :k], 1, dtype), whole[:, :k])
        later = x.clone()
        later[:, n // 2 :], later[0] = NAN, INF
        same(op(later, 1, dtype)[1:, : n // 2], whole[1:, : n // 2])
        no_worse(whole, EAGER[name](x.cpu(), 1), EAGER[name](x.cpu().double(), 1))


@law
@each_scan
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_layouts(name, dtype):
    op = getattr(scan, name)
    x = near_one(name, 4, 37, 6, dtype=dtype)
    whole = op(x, 1, torch.float32)
    same(op(x[2:3], 1, torch.float32), whole[2:3])
    same(op(x[..., 4:5], 1, torch.float32), whole[..., 4:5])
    for view in views(x):
        same(op(view, 1, torch.float32), whole)
    for dim in (0, 2):
        moved = x.movedim(1, dim)
        same(op(moved, dim, torch.float32), whole.movedim(1, dim).contiguous())
    same(op(x[0, 0, 0], 0, torch.float32), whole[0, 0, 0])


@law
@pytest.mark.parametrize("n", [37, 300, 2100])
def test_a_row_alone_has_the_order_that_it_has_among_others(n):
    """Sums in double hide their order from ordinary numbers; terms that cancel show it."""
    generator = torch.Generator().manual_seed(n)
    x = CONTENTS["cancelling"]([5, n], 1, generator).to(DEVICE)
    whole = scan.cumsum(x, 1, torch.float32)
    for rows in (slice(1), slice(3, 4), slice(3)):
        same(scan.cumsum(x[rows], 1, torch.float32), whole[rows])


@law
def test_zeros_keep_what_a_chain_gives_them():
    def row(*numbers):
        return torch.tensor(numbers, device=DEVICE)

    same(scan.cumsum(row(-0.0, -0.0, 1.0, -1.0), 0, torch.float32), row(0.0, 0.0, 1.0, 0.0))
    same(scan.cumprod(row(-0.0, 2.0, -3.0), 0, torch.float32), row(-0.0, -0.0, 0.0))


@law
def test_a_run_may_leave_the_range_that_its_products_keep():
    """2000 factors of 1e30 behind a zero: their own product is beyond any double."""
    x = torch.full((2, 2001), 1e30, device=DEVICE)
    x[0, 0] = 0.0
    x[1, 0], x[1, 1:301], x[1, 301:601], x[1, 601:] = 1.0, 1e-30, 1e30, 1.0
    y = scan.cumprod(x, 1, torch.float32)
    assert not y[0].any()
    true = torch.cumprod(torch.tensor([1e-30, 1e30]).double(), 0)[1].pow(300).float()
    torch.testing.assert_close(y[1, 600:], true.expand(1401).to(DEVICE))
    x[0, 1500] = INF
    y = scan.cumprod(x, 1, torch.float32)
    assert not y[0, :1500].any() and y[0, 1500:].isnan().all()


@law
def test_infinities_and_nan_in_logarithms():
    x = torch.tensor([-INF, -INF, 1.0, 2.0, INF, INF, -INF, NAN, 3.0] * 3, device=DEVICE)
    same(scan.logcumsumexp(x, 0, torch.float32)[[0, 1, 2, 4, 5, 6]], x[[0, 1, 2, 4, 5, 5]])
    assert scan.logcumsumexp(x, 0, torch.float32)[7:].isnan().all()
    y = scan.logcumsumexp(torch.tensor([0.0, -40.0], device=DEVICE), 0, torch.float32)
    if not INTERPRET:  # which has no log1p
        assert y[1] > 0
