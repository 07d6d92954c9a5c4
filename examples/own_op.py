"""An op of your own with a contract: graphs may hold it, and its properties are tested."""

import torch

import bicompile
from bicompile.testing import assert_op_invariant


@torch.library.custom_op("mine::scaled_sum", mutates_args=())
def scaled_sum(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of x * weight over the last axis: 16 lanes, each in rising order, then halves."""
    terms = torch.nn.functional.pad(x.float() * weight.float(), (0, -x.shape[-1] % 16))
    lanes = terms.new_zeros(len(x), 16)
    for step in terms.unflatten(-1, (-1, 16)).unbind(1):
        lanes = lanes + step
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0].to(x.dtype)


scaled_sum.register_fake(lambda x, weight: x.new_empty(len(x)))
order = "16 lanes in rising order, then a tree of halves"
bicompile.register_op(torch.ops.mine.scaled_sum, "x: M K, weight: K -> M", order=order)

assert_op_invariant("mine::scaled_sum", cases=100)

weight = torch.randn(300)
model = bicompile.compile(lambda x: torch.ops.mine.scaled_sum(torch.tanh(x), weight))
batch = torch.randn(8, 300)
with torch.no_grad():
    print((model(batch)[:1] == model(batch[:1])).all().item())
