"""All use of private Dynamo and AOTAutograd interfaces: what reaches our passes, and in which form.

Attention is kept whole by overriding the op's Python kernels while AOTAutograd traces: the only
place that also sees nn.MultiheadAttention and that autocast has already passed.  The decomposition
table is Inductor's without the ops that we own.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch._C import DispatchKey
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.exc import Unsupported as Unsupported
from torch._guards import CompileContext
from torch.fx import GraphModule

from bicompile import decompositions, flex, graph, interpolation
from bicompile.attention_parts import attention
from bicompile.contract import HALF_AND_FLOAT
from bicompile.errors import (
    BicompileError,
    GraphBreak,
    RecompileLimit,
    SuppressedErrors,
    UnsupportedDevice,
)
from bicompile.options import Options

aten = torch.ops.aten

RECOMPILE_LIMIT = 64


def configure() -> None:
    """Set Dynamo's global switches that the guarantee needs; called when the backend is imported.

    Recurrent nets are captured (`allow_rnn`), Python floats are constants (`specialize_float`), and
    a function that needs too many graphs is an error instead of an eager run.
    """
    config = torch._dynamo.config
    config.allow_rnn = True
    config.specialize_float = True
    config.fail_on_recompile_limit_hit = True
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    _give_shapes_to_encoder_layer()


# ----------------------------------------------------------------------------- checks of a graph


def check(gm: GraphModule, inputs: list[Any], options: Options) -> None:
    """Refuse a graph around which something would run without the guarantee."""
    config = torch._dynamo.config
    if config.suppress_errors:
        raise SuppressedErrors()
    config.fail_on_recompile_limit_hit = True
    for device in {x.device.type for x in inputs if isinstance(x, torch.Tensor)}:
        if device not in ("cpu", "cuda"):
            raise UnsupportedDevice(device=device)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break and options.graph_breaks == "error":
        raise GraphBreak(reason=reason.reason.strip(), line=_last_line(reason))
    compile_id = CompileContext.current_compile_id()
    number = getattr(compile_id, "frame_compile_id", None) or 0
    if number + 1 >= config.recompile_limit:
        raise RecompileLimit(
            function="the compiled function",
            limit=config.recompile_limit - 1,
            line=None if reason is None else _last_line(reason),
        )


@contextlib.contextmanager
def any_number_of_recompilations() -> Iterator[None]:
    """Let a search try any number of shapes and layouts: beyond its limit Dynamo runs eager."""
    many = 1 << 20
    with torch._dynamo.config.patch(recompile_limit=many, accumulated_recompile_limit=many):
        yield


def _last_line(reason: Any) -> str | None:
    if not reason.user_stack:
        return None
    return graph.frame_line(reason.user_stack[-1])


def fingerprint(gm: GraphModule, inputs: list[Any]) -> list[str]:
    """What a captured graph is, as texts: its code, its inputs, whether gradients are recorded."""
    described = [
        f"{graph.describe(x)} {x.stride()} {x.device} {x.requires_grad}"
        if isinstance(x, torch.Tensor)
        else str(x)
        for x in inputs
    ]
    return [gm.code, *described, str(torch.is_grad_enabled())]


@functools.cache
def _raisable(cls: Any) -> type[BicompileError]:
    """The same class as one that Dynamo hands to the user unwrapped."""
    fields = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls, ShortenTraceback), {**fields, "first_useful_frame": None})


@contextlib.contextmanager
def error_boundary() -> Iterator[None]:
    """Let our errors reach the user as they are, not inside BackendCompilerFailed."""
    try:
        yield
    except BicompileError as error:
        error.__class__ = _raisable(type(error))  # type: ignore[arg-type]
        raise


def mark_batch_dynamic(x: torch.Tensor) -> None:
    """Let the first axis vary without a new graph."""
    if x.dim() > 0 and not isinstance(x, torch.nn.Parameter):
        torch._dynamo.maybe_mark_dynamic(x, 0)


# ------------------------------------------------------------------------------ attention whole

_SDPA = aten.scaled_dot_product_attention.default
_KEYS = tuple(
    getattr(DispatchKey, name)
    for name in "AutogradCPU AutogradCUDA CPU CUDA CompositeImplicitAutograd".split()
)
_lock = threading.RLock()


@contextlib.contextmanager
def attention_whole() -> Iterator[None]:
    """While it is open, attention is traced as one node of ours, however it is called.

    So are ops whose parts PyTorch chooses by sizes or strides, always in the same parts.
    """
    with _lock, contextlib.ExitStack() as stack:
        for op, function in _WHOLE.items():
            stack.enter_context(_instead(op, function))
        yield


@contextlib.contextmanager
def _instead(op: Any, function: Callable[..., Any] | None) -> Iterator[None]:
    """An op is traced as what a function of ours does; None: as it is.

    Of an op that is not a composite, the gradient is replaced and the op itself stays.
    """
    composite = "CompositeImplicitAutograd"
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), composite)
    saved = {key: op.py_kernels.get(key) for key in (_KEYS if is_composite else _KEYS[:2])}
    try:
        for key in saved:
            op.py_kernels.pop(key, None)
            if function is not None:
                op.py_kernels[key] = function
        op._dispatch_cache.clear()
        yield
    finally:
        for key, kernel in saved.items():
            op.py_kernels.pop(key, None)
            if kernel is not None:
                op.py_kernels[key] = kernel
        op._dispatch_cache.clear()


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear` with the bias always added before the product is rounded.

    PyTorch adds it afterwards if the input is not contiguous, as of a transposed batch, but not of
    one row, which is contiguous in any order of its axes.
    """
    if bias is None:
        return torch.matmul(input, weight.t())
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    out = torch.addmm(bias, rows, weight.t())
    return out if input.dim() == 2 else out.view(*input.shape[:-1], out.shape[-1])


def multi_dot(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`torch.linalg.multi_dot` from left to right.

    PyTorch chooses an order by all sizes, among them the number of rows.
    """
    return functools.reduce(torch.matmul, tensors)


def logcumsumexp(self: torch.Tensor, dim: int) -> torch.Tensor:
    """`torch.logcumsumexp` with the gradient of our op; in other dtypes as it is."""
    if self.dtype not in HALF_AND_FLOAT or self.dim() == 0:
        with _instead(aten.logcumsumexp.default, None):
            return torch.logcumsumexp(self, dim)
    out: torch.Tensor = torch.ops.bicompile.logcumsumexp.default(self, dim % self.dim(), self.dtype)
    return out


_FLEX = torch.ops.higher_order.flex_attention


def open_flex_attention(gm: GraphModule) -> None:
    """Let calls of FlexAttention be traced as what `bicompile.flex` makes of them.

    Those that also ask for the sum of the weights or the largest score stay as they are.
    """
    for node in gm.graph.find_nodes(op="call_function", target=_FLEX):
        if all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
            node.target = flex_attention
    gm.recompile()


def flex_attention(*args: Any) -> Any:
    """FlexAttention in one node of ours, or as it is."""
    found = flex.attention(*args)
    return _FLEX(*args) if found is None else (found,)


def _by_parts(op: Any) -> Callable[..., Any]:
    """An op opened before gradients are recorded, so that these are the gradients of its parts."""

    def opened(*args: Any, **kwargs: Any) -> Any:
        found = decomposition_table()[op](*args, **kwargs)
        if found is NotImplemented:
            with _instead(op, None):
                found = op(*args, **kwargs)
        return found

    return opened


_PARTS = (
    aten._cdist_forward.default,
    aten._fused_rms_norm.default,
    aten._pdist_forward.default,
    aten._weight_norm_interface.default,
    aten.grid_sampler_2d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    *interpolation.TABLE,
)

_WHOLE: dict[Any, Callable[..., Any]] = {
    _SDPA: attention,
    aten.linear.default: linear,
    aten.linalg_multi_dot.default: multi_dot,
    aten.logcumsumexp.default: logcumsumexp,
    **{op: _by_parts(op) for op in _PARTS},
}

# --------------------------------------------------------------------------- decomposition table

OWNED = frozenset(
    """
    mm bmm addmm baddbmm addbmm addmv mv dot vdot linear
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm native_batch_norm_backward
    _native_batch_norm_legit _native_batch_norm_legit_functional
    _batch_norm_with_update _batch_norm_with_update_functional
    _softmax _softmax_backward_data logsumexp
    sum mean prod var std var_mean norm linalg_vector_norm
    convolution convolution_backward embedding_dense_backward _embedding_bag
    index_add index_put _unsafe_index_put scatter_add scatter_reduce
    upsample_bilinear2d upsample_nearest2d
    """.split()
)
"""Ops that reach our passes whole: Inductor's decompositions of them depend on shapes, or sum."""


class _Table(dict[Any, Callable[..., Any]]):
    """Pickled by reference, so that graphs compiled with it can be kept on disk."""

    def __reduce__(self) -> tuple[Any, ...]:
        return decomposition_table, ()


@functools.cache
def decomposition_table() -> _Table:
    """Inductor's table without the ops we own, with the encoder layer's fast path opened."""
    from torch._inductor.decomposition import select_decomp_table

    table = _Table(
        (op, function)
        for op, function in select_decomp_table().items()
        if not (
            isinstance(op, torch._ops.OpOverload)
            and op.namespace == "aten"
            and op._schema.name.removeprefix("aten::") in OWNED
        )
    )
    table.update(decompositions.TABLE)
    table[aten._transformer_encoder_layer_fwd.default] = encoder_layer
    table[aten.mkldnn_rnn_layer.default] = lstm_layer
    # In eval mode this op is pointwise; in training mode it arrives as its functional form.
    in_place = aten._native_batch_norm_legit.default
    table[in_place] = select_decomp_table()[in_place]
    return table


@functools.cache
def _give_shapes_to_encoder_layer() -> None:
    """Dynamo asks for the shape of the encoder layer's op, which has none before PyTorch 2.13."""
    name = "aten::_transformer_encoder_layer_fwd"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        torch.library.impl(name, "Meta")(lambda src, *_, **__: torch.empty_like(src))


def encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """nn.TransformerEncoderLayer in eval mode, one fused op in PyTorch, opened into its parts.

    `mask` is True where a key is hidden; `mask_type` 0 is [S, S], 1 is [B, S], 2 is [B, H, S, S].
    """

    def attend(x: torch.Tensor) -> torch.Tensor:
        b, s, e = x.shape
        qkv = F.linear(x, qkv_weight, qkv_bias).view(b, s, 3, num_heads, e // num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        visible = None
        if mask is not None:
            visible = ~mask.bool()
            visible = visible.view(b, 1, 1, s) if mask_type == 1 else visible
        out = attention(query, key, value, visible)
        return F.linear(out.transpose(1, 2).reshape(b, s, e), proj_weight, proj_bias)

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    def norm_1(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


def lstm_layer(
    x: torch.Tensor,
    ih_weight: torch.Tensor,
    hh_weight: torch.Tensor,
    ih_bias: torch.Tensor,
    hh_bias: torch.Tensor,
    hx: torch.Tensor,
    cx: torch.Tensor,
    reverse: bool,
    batch_sizes: list[int],
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    *_: bool,
) -> tuple[torch.Tensor, ...]:
    """A layer of nn.LSTM, one op of a library on a CPU, opened into its steps.

    `x` is [S, B, D]; the fourth result is for a backward pass alone.
    """
    from torch._decomp.decompositions import one_layer_lstm

    weights = [ih_weight, hh_weight, *((ih_bias, hh_bias) if has_biases else ())]
    out, (h, c) = one_layer_lstm(x, (hx[0], cx[0]), weights, has_biases, reverse)
    return out, h[None], c[None], x.new_empty(0, dtype=torch.uint8)
