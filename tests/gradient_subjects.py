"""Functions of every family that can be trained, and what their gradients are made of.

A function has rows [B, ...] first and weights behind them, and gives rows.  `ops` are those of ours
in its forward graph -> in its backward graph, there with PyTorch's own ops of gradients for which
rules and decompositions have an entry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

importlib.import_module("transformers.integrations.moe")  # defines the op of mixtures of experts
GROUPED = torch.ops.transformers.grouped_mm_fallback


@dataclass(frozen=True)
class Below:
    """Whole numbers below a number, for an index."""

    number: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A function, the shapes of a row's inputs and of weights, and the ops of its gradient."""

    ops: str
    function: Callable[..., torch.Tensor]
    rows: tuple[tuple[int, ...] | Below, ...]
    weights: tuple[tuple[int, ...], ...] = ()
    by_row: bool = True
    """Whether rows are apart: a loss that is a mean is not."""
    half: bool = True
    """Whether PyTorch has it in bfloat16, with roundings between the same ops."""
    reference: Callable[..., torch.Tensor] | None = None
    """The same function, where PyTorch chooses freely among equal elements: we take the first."""

    @property
    def graphs(self):
        """The ops of the forward and of the backward graph."""
        return [set(part.split()) for part in self.ops.split("->")]

    def problem(self, rows, dtype, seed=0):
        """Rows and weights, all of them normal numbers."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for shape in self.rows:
            if isinstance(shape, Below):
                size = (rows, *shape.shape)
                found.append(torch.randint(shape.number, size, generator=generator))
            else:
                found.append(torch.randn(rows, *shape, generator=generator).to(dtype))
        weights = [torch.randn(s, generator=generator).to(dtype) for s in self.weights]
        return found, weights


def experts(x, w):
    """Token t of every row meets matrix t."""
    ends = (torch.arange(x.shape[1], dtype=torch.int32, device=x.device) + 1) * x.shape[0]
    rows = GROUPED(x.transpose(0, 1).flatten(0, 1), w, ends)
    return rows.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


def attend(**how):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **how)


def window(q, k, v):
    """Keys up to five behind, some of them masked by numbers of the row."""
    i = torch.arange(q.shape[-2], device=q.device)
    near = (i[:, None] >= i) & (i[:, None] < i + 5)
    mask = near & ((k[:, :1, :, 0] < 1)[:, :, None, :] | (i[:, None] == i))
    return F.scaled_dot_product_attention(q, k, v, mask)


def rope(q, k, w, u):
    """Norms of heads and rotation, as in Qwen3."""

    def rotate(x, weight):
        x = F.rms_norm(x, (16,), weight, 1e-6).transpose(1, 2)
        angle = torch.arange(7, device=x.device)[:, None] * 0.3 ** torch.arange(8, device=x.device)
        cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angle.cos(), angle.sin()))
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    return torch.cat([rotate(q, w), rotate(k, u)], 1)


def row(x):
    """The number of each row."""
    return torch.arange(len(x), device=x.device)[:, None]


PLACES = [0, 3, 1, 4, 3, 3, 0, 2, 3]


def places(x):
    """Places in an axis of five, some of them often."""
    return torch.tensor(PLACES, device=x.device)


HEADS = (4, 20, 16), (4, 20, 16), (4, 20, 16)
GROUPS = (4, 20, 16), (2, 20, 16), (2, 20, 16)
IMAGE = ((4, 9, 10),)
SOLID = ((2, 5, 6, 7),)
LINE = ((5, 40),)
SCATTERED = (5, 40), Below(5, (9, 40)), (9, 40)
LABELS = Below(40, (5,))

CONVOLUTION = "convolution -> bmm convolution convolution_backward sum"
SOFTMAX = "softmax -> _softmax_backward_data softmax_backward"
LOG_SOFTMAX = "softmax_statistics -> _log_softmax_backward_data sum"
ATTENTION = "sdpa -> sdpa_backward"
INDEX_ADD = "-> index_add"

SUBJECTS = {
    # matmul
    "linear": Subject("addmm -> mm sum", F.linear, ((5, 40),), ((24, 40), (24,))),
    "bmm": Subject("bmm -> bmm", torch.matmul, ((9, 12), (12, 11))),
    "addmm": Subject(
        "addmm -> mm sum",
        lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2),
        ((40,),),
        ((40, 24), (24,)),
    ),
    "baddbmm": Subject("baddbmm -> bmm", torch.baddbmm, ((9, 11), (9, 12), (12, 11))),
    "mv": Subject("mm -> mm", lambda x, w: torch.stack([x @ w, x @ w], 1), ((40,),), ((40,),)),
    "experts": Subject(
        "grouped_mm -> bmm grouped_mm grouped_mm_fallback_backward index_add",
        experts,
        ((3, 24),),
        ((3, 24, 17),),
    ),
    "swiglu": Subject(
        "mm mm_add -> mm mm_add",
        lambda x, g, u, d: x + F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
        ((5, 24),),
        ((40, 24), (40, 24), (24, 40)),
    ),
    "qkv": Subject(
        "qkv_proj -> mm mm_add",
        lambda x, q, k, v: F.linear(x, q) * F.linear(x, k) + F.linear(x, v),
        ((5, 24),),
        ((40, 24), (40, 24), (40, 24)),
    ),
    "einsum": Subject(
        "bmm -> bmm sum",
        lambda x, y, w: torch.einsum("bik,bjk,kl->bijl", x, y, w),
        ((5, 12), (6, 12)),
        ((12, 8),),
    ),
    "bilinear": Subject("mm sum -> sum", F.bilinear, ((12,), (9,)), ((11, 12, 9), (11,))),
    # convolution
    "conv1d": Subject(
        CONVOLUTION,
        lambda x, w, b: F.conv1d(x, w, b, 2, 2, groups=2),
        ((4, 12),),
        ((24, 2, 3), (24,)),
    ),
    "conv2d": Subject(
        CONVOLUTION,
        lambda x, w, b: F.conv2d(x, w, b, 2, 1),
        IMAGE,
        ((12, 4, 3, 3), (12,)),
    ),
    "conv3d": Subject(
        CONVOLUTION,
        lambda x, w: F.conv3d(x, w, padding=1),
        SOLID,
        ((8, 2, 3, 3, 3),),
    ),
    "conv_transpose2d": Subject(
        CONVOLUTION,
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1),
        IMAGE,
        ((4, 3, 3, 3),),
    ),
    # reduce
    "sum": Subject("sum ->", lambda x: x.sum(-1), LINE),
    "mean": Subject("mean ->", lambda x: x.mean((1, 2)), LINE),
    "var": Subject("var -> mean", lambda x: x.var(-1), LINE),
    "std": Subject("std -> mean", lambda x: x.std(-1, correction=0), LINE),
    "var_mean": Subject("var_mean -> mean", lambda x: torch.stack(torch.var_mean(x, -1), 1), LINE),
    "prod": Subject("prod -> cumprod", lambda x: (1 + x / 4).prod(-1), LINE),
    "norm": Subject("norm ->", lambda x: torch.linalg.vector_norm(x, dim=-1), LINE),
    "logsumexp": Subject("logsumexp ->", lambda x: x.logsumexp(-1), LINE),
    # softmax
    "softmax": Subject(SOFTMAX, lambda x: x.softmax(-1), LINE),
    "softmax across": Subject(SOFTMAX, lambda x: x.softmax(1), LINE),
    "log_softmax": Subject(
        LOG_SOFTMAX,
        lambda x: x.log_softmax(-1),
        LINE,
    ),
    # norms
    "layer_norm": Subject(
        "layer_norm -> layer_norm_backward native_layer_norm_backward sum",
        lambda x, w, b: F.layer_norm(x, (40,), w, b),
        LINE,
        ((40,), (40,)),
    ),
    "rms_norm": Subject("mean -> sum", lambda x, w: F.rms_norm(x, (40,), w), LINE, ((40,),)),
    "group_norm": Subject(
        "group_norm -> group_norm_backward native_group_norm_backward sum",
        lambda x, w, b: F.group_norm(x, 2, w, b),
        IMAGE,
        ((4,), (4,)),
    ),
    "instance_norm": Subject(
        "group_norm -> group_norm_backward native_batch_norm_backward sum",
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        IMAGE,
        ((4,), (4,)),
    ),
    "batch_norm": Subject(
        "-> native_batch_norm_backward sum",
        lambda x, w, b: F.batch_norm(
            x, x.new_tensor([0.1, 0.2, 0.3, 0.4]), x.new_ones(4) / 2, w, b
        ),
        IMAGE,
        ((4,), (4,)),
    ),
    "normalize": Subject("norm -> sum", lambda x: F.normalize(x, dim=-1), LINE),
    "weight_norm": Subject(
        "mm norm -> mm sum",
        lambda x, v, g: F.linear(x, torch._weight_norm(v, g)),
        LINE,
        ((24, 40), (24, 1)),
    ),
    # attention
    "attention": Subject(ATTENTION, attend(is_causal=True), HEADS),
    "attention, groups": Subject(ATTENTION, attend(enable_gqa=True, scale=0.3), GROUPS),
    "attention, window": Subject(ATTENTION, window, HEADS),
    "avg_pool2d": Subject("-> avg_pool2d_backward", lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGE),
    "avg_pool3d": Subject(
        "-> avg_pool3d_backward", lambda x: F.avg_pool3d(x, 2), SOLID, half=False
    ),
    "adaptive_avg_pool2d": Subject(
        "-> _adaptive_avg_pool2d_backward", lambda x: F.adaptive_avg_pool2d(x, (2, 4)), IMAGE
    ),
    "adaptive_avg_pool3d": Subject(
        "-> _adaptive_avg_pool3d_backward", lambda x: F.adaptive_avg_pool3d(x, (2, 4, 1)), SOLID
    ),
    "max_pool1d": Subject(
        "-> index_add max_pool2d_with_indices_backward", lambda x: F.max_pool1d(x, 3, 2), LINE
    ),
    "max_pool2d": Subject(
        "-> index_add max_pool2d_with_indices_backward", lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE
    ),
    "max_pool3d": Subject(
        "-> max_pool3d_with_indices_backward", lambda x: F.max_pool3d(x, 2), SOLID
    ),
    "adaptive_max_pool2d": Subject(
        "-> adaptive_max_pool2d_backward index_add",
        lambda x: F.adaptive_max_pool2d(x, (2, 4)),
        IMAGE,
    ),
    "adaptive_max_pool3d": Subject(
        "-> adaptive_max_pool3d_backward index_add",
        lambda x: F.adaptive_max_pool3d(x, (2, 4, 1)),
        SOLID,
    ),
    # scan
    "cumsum": Subject("cumsum -> cumsum", lambda x: x.cumsum(-1), LINE),
    "cumprod": Subject("cumprod -> cumprod cumsum sum", lambda x: (1 + x / 8).cumprod(-1), LINE),
    "logcumsumexp": Subject(
        "logcumsumexp -> cumsum logcumsumexp", lambda x: x.logcumsumexp(-1), LINE
    ),
    "cummax": Subject(INDEX_ADD, lambda x: x.cummax(-1).values, LINE),
    # scatter and gather
    "scatter_add": Subject("index_add ->", lambda x, i, y: x.scatter_add(1, i, y), SCATTERED),
    "scatter_reduce": Subject(
        "index_add ->",
        lambda x, i, y: x.scatter_reduce(1, i, y, "sum", include_self=False),
        SCATTERED,
    ),
    "scatter_reduce, amax": Subject(
        INDEX_ADD, lambda x, i, y: x.scatter_reduce(1, i, y, "amax"), SCATTERED
    ),
    "scatter": Subject("->", lambda x, i, y: x.scatter(1, i[:, :1], y[:, :1]), SCATTERED),
    "gather": Subject(INDEX_ADD, lambda x, i: x.gather(1, i), (*LINE, Below(5, (9, 40)))),
    "index_add": Subject(
        "index_add ->", lambda x, y: x.index_add(1, places(x), y), ((5, 40), (9, 40))
    ),
    "index_put": Subject(
        "index_add ->",
        lambda x, i, y: x.index_put((row(x), i), y, accumulate=True),
        ((5, 40), Below(5, (9,)), (9, 40)),
    ),
    "index": Subject(INDEX_ADD, lambda x, i: x[row(x), i], (*LINE, Below(5, (9,)))),
    "index of axes apart": Subject(
        INDEX_ADD, lambda x, i: x[row(x), :, i], (*LINE, Below(40, (9,)))
    ),
    "index of the last axes": Subject(INDEX_ADD, lambda x: x[:, :, [[-1], [3]], PLACES], IMAGE),
    "index_select": Subject(INDEX_ADD, lambda x: x.index_select(1, places(x)), LINE),
    "take_along_dim": Subject(
        INDEX_ADD, lambda x: x.take_along_dim(torch.sort(x, stable=True).indices, -1), LINE
    ),
    "embedding": Subject(
        "-> embedding_dense_backward index_add", F.embedding, (LABELS,), ((40, 24),)
    ),
    "embedding, padding": Subject(
        "-> embedding_dense_backward index_add",
        lambda i, w: F.embedding(i, w, padding_idx=3),
        (LABELS,),
        ((40, 24),),
    ),
    "sort": Subject("->", lambda x: torch.sort(x, stable=True).values, LINE),
    "topk": Subject(
        "topk ->",
        lambda x: x.topk(5).values,
        LINE,
        reference=lambda x: x.sort(stable=True, descending=True).values[..., :5],
    ),
    "kthvalue": Subject(
        "topk ->",
        lambda x: x.kthvalue(3).values,
        LINE,
        reference=lambda x: x.sort(stable=True).values[..., 2],
    ),
    # losses
    "cross_entropy": Subject(
        "softmax_statistics sum -> _log_softmax_backward_data nll_loss_backward sum",
        lambda x, i: F.cross_entropy(x, i, reduction="none", label_smoothing=0.1),
        ((40,), Below(40, ())),
    ),
    "nll_loss, a mean": Subject(
        "softmax_statistics mm sum -> _log_softmax_backward_data nll_loss_backward mm",
        lambda x, i, w: F.cross_entropy(F.linear(x, w), i),
        ((24,), Below(40, ())),
        ((40, 24),),
        by_row=False,
    ),
    "nll_loss2d": Subject(
        "softmax_statistics -> _log_softmax_backward_data nll_loss2d_backward",
        lambda x, i: F.cross_entropy(x, i, reduction="none"),
        ((40, 9), Below(40, (9,))),
    ),
    "mse_loss": Subject("mean ->", lambda x, y: F.mse_loss(x, y), (*LINE, *LINE), by_row=False),
    "kl_div": Subject(
        "softmax_statistics softmax sum -> _log_softmax_backward_data _softmax_backward_data "
        "softmax_backward sum",
        lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none").sum(-1),
        (*LINE, *LINE),
    ),
    "cosine_similarity": Subject(
        "norm sum -> sum", lambda x, y: F.cosine_similarity(x, y, -1), (*LINE, *LINE)
    ),
    "multi_margin": Subject(
        "mean -> sum",
        lambda x, i: F.multi_margin_loss(x, i, reduction="none"),
        ((40,), Below(40, ())),
        half=False,
    ),
    "cdist": Subject("norm -> sum", torch.cdist, ((5, 12), (6, 12)), half=False),
    "cdist, p = 1": Subject(
        "norm -> sum", lambda x, y: torch.cdist(x, y, 1.0), ((5, 12), (6, 12)), half=False
    ),
    "pdist": Subject("norm -> index_add", F.pdist, ((12,),), by_row=False, half=False),
    # rotations, systems
    "rope": Subject("mean -> sum", rope, ((7, 2, 16), (7, 1, 16)), ((16,), (16,))),
    "solve_triangular": Subject(
        "solve_triangular -> bmm solve_triangular",
        lambda a, b: torch.linalg.solve_triangular(
            a.tril() * 0.1 + torch.eye(8, dtype=a.dtype, device=a.device), b, upper=False
        ),
        ((8, 8), (8, 5)),
        half=False,
    ),
    # images
    "interpolate": Subject(INDEX_ADD, lambda x: F.interpolate(x, (13, 7), mode="bilinear"), IMAGE),
    "interpolate, corners": Subject(
        INDEX_ADD,
        lambda x: F.interpolate(x, (13, 17), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "interpolate, nearest": Subject(INDEX_ADD, lambda x: F.interpolate(x, (13, 7)), IMAGE),
    "interpolate, bicubic": Subject(
        INDEX_ADD, lambda x: F.interpolate(x, (13, 7), mode="bicubic"), IMAGE
    ),
    "interpolate, antialias": Subject(
        "sum -> index_add",
        lambda x: F.interpolate(x, (3, 7), mode="bicubic", antialias=True),
        IMAGE,
        half=False,
    ),
    "interpolate, trilinear": Subject(
        INDEX_ADD, lambda x: F.interpolate(x, (7, 8, 9), mode="trilinear"), SOLID
    ),
    "grid_sample": Subject(
        "-> index_add sum",
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        (*IMAGE, (5, 6, 2)),
    ),
    "pad, reflect": Subject("->", lambda x: F.pad(x, (2, 1, 3, 0), "reflect"), IMAGE),
    "pad, replicate": Subject(INDEX_ADD, lambda x: F.pad(x, (2, 1, 3, 0), "replicate"), IMAGE),
    "pad, replicate, cut": Subject(INDEX_ADD, lambda x: F.pad(x, (2, -1), "replicate"), LINE),
    "pad, replicate, 3d": Subject(
        INDEX_ADD, lambda x: F.pad(x, (2, 1, 0, 1, 1, 1), "replicate"), SOLID
    ),
    "fold": Subject("->", lambda x: F.fold(x, (6, 7), 2), ((8, 30),)),
    "unfold": Subject("->", lambda x: F.unfold(x, 3, padding=1), IMAGE),
    "glu": Subject("->", lambda x: F.glu(F.gelu(x), -1), LINE),
    "prelu": Subject("-> sum", F.prelu, LINE, ((5,),)),
    "cross": Subject("->", lambda x, y: torch.linalg.cross(x, y), ((5, 3), (5, 3))),
}
