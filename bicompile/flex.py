"""FlexAttention as our attention: masks by index arithmetic, scores that are capped or added to.

`torch.nn.attention.flex_attention.flex_attention` takes two functions of one element: `mask_mod` of
its indices, and `score_mod` of its score and its indices. ::

    flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + slope[h] * (j - i), block_mask=m)

becomes::

    index = b [B, 1, 1, 1], h [1, H, 1, 1], i [1, 1, Q, 1], j [1, 1, 1, S]
    seen = mask_mod(*index) & blocks of m
    bicompile.sdpa(q, k, v, where(seen, slope[h] * (j - i), -inf), False, scale)

because pointwise functions of indices are the same for a whole tensor of indices, and what may
become of a score is known: nothing, `cap * tanh(score / cap)`, sums with functions of indices,
`where` with -inf.  Anything else stays FlexAttention, which the audit refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from bicompile.attention_parts import attention_in_parts
from bicompile.contract import HALF_AND_FLOAT
from bicompile.passes.audit import ALLOWED
from bicompile.registry import load_all

_SDPA = load_all()["sdpa"].op


@dataclass(frozen=True)
class Score:
    """What became of the scores.

    Args:
        cap: bound of the scores, 0 for none.
        within: of a cap that is not complete: what was divided by, and whether tanh was taken.
        bias: what is added, over [B, H, Q, S], or a number.
        seen: where they are not -inf.
    """

    cap: float = 0.0
    within: tuple[float, bool] | None = None
    bias: Any = None
    seen: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Nothing became of them yet."""
        return self.cap == 0.0 and self.within is self.bias is self.seen is None

    def plus(self, bias: Any) -> Score:
        """With a bias."""
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    def where(self, seen: torch.Tensor) -> Score:
        """With -inf elsewhere."""
        return replace(self, seen=seen if self.seen is None else self.seen & seen)


class _Unknown(Exception):
    """Not pointwise in the indices, or not one of the known functions of a score."""


_POINTWISE = ALLOWED["pointwise"][1] | frozenset(
    """
    and iand or ior xor invert not pos truediv floordiv mod iadd isub imul
    to type_as float double long int bool half bfloat16
    """.split()
)
_CREATION = frozenset("new_ones new_zeros new_full ones zeros full tensor".split())


class _OfIndices(Interpreter):
    """Runs a function of one element on tensors of indices, with a `Score` for the score."""

    def run_node(self, n: Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
        name = name.strip("_")
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if any(isinstance(self.env[given], Score) for given in n.all_input_nodes):
            if name not in _FUNCTIONS or kwargs:
                raise _Unknown
            return _FUNCTIONS[name](*args)
        if name == "getitem":
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            known = len(at) == args[0].dim() and all(isinstance(i, torch.Tensor) for i in at)
        else:
            known = name in _POINTWISE or name in _CREATION
        result = super().run_node(n) if known else None
        if result is None or (name in _CREATION and result.dim()):
            raise _Unknown
        return result


def _add(a: Any, b: Any) -> Score:
    score, bias = (a, b) if isinstance(a, Score) else (b, a)
    if isinstance(bias, Score) or score.within:
        raise _Unknown
    return score.plus(bias)


def _sub(a: Any, b: Any) -> Score:
    if not isinstance(a, Score):
        raise _Unknown
    return _add(a, -b)


def _div(a: Any, b: Any) -> Score:
    if not isinstance(a, Score) or not a.plain or not isinstance(b, int | float) or b <= 0:
        raise _Unknown
    return replace(a, within=(float(b), False))


def _tanh(a: Score) -> Score:
    if a.within is None or a.within[1]:
        raise _Unknown
    return replace(a, within=(a.within[0], True))


def _mul(a: Any, b: Any) -> Score:
    score, cap = (a, b) if isinstance(a, Score) else (b, a)
    if score.within is None or not isinstance(cap, int | float) or score.within != (cap, True):
        raise _Unknown
    return Score(cap=float(cap))


def _where(condition: Any, a: Any, b: Any) -> Score:
    score, other = (a, b) if isinstance(a, Score) else (b, a)
    if isinstance(condition, Score) or isinstance(other, Score) or score.within:
        raise _Unknown
    if isinstance(other, torch.Tensor) or other != float("-inf"):
        raise _Unknown
    return score.where(condition if score is a else ~condition)


_FUNCTIONS: dict[Any, Callable[..., Score]] = {
    "add": _add, "iadd": _add, "sub": _sub, "isub": _sub, "div": _div, "truediv": _div,
    "true_divide": _div, "tanh": _tanh, "mul": _mul, "imul": _mul, "where": _where,
    "masked_fill": lambda a, hidden, value: _where(hidden, value, a),
}  # fmt: skip


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: GraphModule,
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
) -> torch.Tensor | None:
    """FlexAttention by our op, if its functions are known.

    Args:
        query: [B, H, Q, D].
        key: [B, G, S, D], each head for H / G heads of the queries.
        value: [B, G, S, E].
        score_mod: (score, b, h, i, j, *buffers) -> score.
        block_mask: as `BlockMask.as_tuple` has it; the last is (b, h, i, j, *buffers) -> bool.
        scale: of the scores.
        kernel_options: hints of speed.
        score_mod_other_buffers: what `score_mod` reads besides.
        mask_mod_other_buffers: what the mask reads besides.

    Returns:
        [B, H, Q, E], or None.
    """
    batch, length = max(query.shape[0], key.shape[0]), key.shape[2]
    sizes = (batch, query.shape[1], query.shape[2], length)
    index = [
        torch.arange(n, dtype=torch.int32, device=query.device).view(
            *(-1 if axis == at else 1 for axis in range(4))
        )
        for at, n in enumerate(sizes)
    ]
    try:
        score = _OfIndices(score_mod).run(Score(), *index, *_wide(score_mod_other_buffers))
        mask = _seen(block_mask, index, _wide(mask_mod_other_buffers))
    except _Unknown:
        return None
    if not isinstance(score, Score) or score.within:
        return None
    if score.seen is not None:
        mask = mask & score.seen
    if score.bias is not None:
        mask = torch.where(mask, score.bias, float("-inf"))
        mask = mask if mask.dtype in HALF_AND_FLOAT else mask.float()
    query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    args = (query, key, value, mask.expand(-1, -1, *sizes[2:]))
    if query.dtype not in HALF_AND_FLOAT:
        return attention_in_parts(*args, 0.0, False, scale, score.cap)
    out: torch.Tensor = _SDPA(*args, False, scale, score.cap)
    return out


def _wide(buffers: tuple[Any, ...]) -> list[Any]:
    """Single numbers as tensors with axes: dtypes are promoted as among the elements."""
    return [
        b.view(1, 1, 1, 1) if isinstance(b, torch.Tensor) and b.dim() == 0 else b for b in buffers
    ]


def _seen(block_mask: tuple[Any, ...], index: list[torch.Tensor], buffers: list[Any]) -> Any:
    """Which keys are seen: those of a full block, and those of a partial one that the mask says."""
    _, _, *lists = block_mask
    rows, columns, mask_mod = block_mask[-3:]
    b, h, i, j = index
    seen = _OfIndices(mask_mod).run(b, h, i, j, *buffers)
    at = (i // rows).long(), (j // columns).long()
    seen = seen & _listed(lists[0], lists[1], b, h, *at)
    if lists[2] is not None:
        seen = seen | _listed(lists[2], lists[3], b, h, *at)
    return seen


def _listed(
    count: torch.Tensor,
    blocks: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
) -> torch.Tensor:
    """Whether a block is among the first `count` of the list [B, H, rows, columns] of its row."""
    place = torch.arange(blocks.shape[-1], device=blocks.device)
    listed = (blocks[..., None] == place) & (place < count[..., None])[..., None]
    there = listed.any(-2)
    batch, head = (
        x.long() if n > 1 else torch.zeros_like(x[:1, :1], dtype=torch.long)
        for x, n in ((b, blocks.shape[0]), (h, blocks.shape[1]))
    )
    return there[batch, head, row, column]
