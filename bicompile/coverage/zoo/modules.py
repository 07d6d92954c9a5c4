"""Modules of torch.nn, recurrent nets, and bundles of rare operations on one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bicompile.coverage.zoo.entry import Entry, Inputs

ZOO: dict[str, Entry] = {}


class _Bundle(nn.Module):
    """A function of a row, with a module if it needs one."""

    def __init__(self, function: Callable[..., Any], module: nn.Module | None) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, **inputs: torch.Tensor) -> Any:
        held = () if self.module is None else (self.module,)
        return self.function(*held, *inputs.values())


def _add(
    name: str,
    kind: str,
    *shapes: Sequence[int],
    function: Callable[..., Any] | None = None,
    module: Callable[[], nn.Module] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Register a module, or a function of it and of inputs with these sizes of a row."""

    def inputs(model: Any, batch: int) -> Inputs:
        return {f"x{i}": torch.randn(batch, *shape).to(dtype) for i, shape in enumerate(shapes)}

    def build() -> nn.Module:
        return _Bundle(function or (lambda m, *x: m(*x)), module() if module else None)

    ZOO[name] = Entry(kind, build, inputs, dtype=dtype)


_ROW = (11, 16)
_IMAGE = (8, 6, 6)


def _first(module: nn.Module, x: torch.Tensor) -> Any:
    return module(x)[0]


_add(
    "LSTM", "recurrent", _ROW, function=_first, module=lambda: nn.LSTM(16, 16, 2, batch_first=True)
)
_add(
    "LSTM, both directions",
    "recurrent",
    _ROW,
    function=_first,
    module=lambda: nn.LSTM(16, 16, batch_first=True, bidirectional=True),
)
_add("GRU", "recurrent", _ROW, function=_first, module=lambda: nn.GRU(16, 16, batch_first=True))
_add("RNN", "recurrent", _ROW, function=_first, module=lambda: nn.RNN(16, 16, batch_first=True))
_add("LSTMCell", "recurrent", (16,), function=_first, module=lambda: nn.LSTMCell(16, 16))

_add(
    "MLP",
    "module",
    (16,),
    module=lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)),
)
_add(
    "TransformerEncoder",
    "module",
    _ROW,
    module=lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2
    ),
)
_add(
    "TransformerDecoder",
    "module",
    _ROW,
    (7, 16),
    module=lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1
    ),
)
_add(
    "MultiheadAttention",
    "module",
    _ROW,
    function=lambda m, x: m(x, x, x),
    module=lambda: nn.MultiheadAttention(16, 2, batch_first=True),
)
_add("Bilinear", "module", (16,), (8,), module=lambda: nn.Bilinear(16, 8, 4))
_add("BatchNorm, eval", "module", _IMAGE, module=lambda: nn.BatchNorm2d(8))
_add("GroupNorm", "module", _IMAGE, module=lambda: nn.GroupNorm(2, 8))
_add("InstanceNorm", "module", _IMAGE, module=lambda: nn.InstanceNorm2d(8, affine=True))
_add(
    "LocalResponseNorm",
    "module",
    _IMAGE,
    module=lambda: nn.LocalResponseNorm(2),
    dtype=torch.float32,
)
_add("Conv1d", "module", (8, 11), module=lambda: nn.Conv1d(8, 4, 3, padding=1))
_add("Conv1d, depthwise", "module", (8, 11), module=lambda: nn.Conv1d(8, 8, 3, padding=2, groups=8))
_add("Conv2d", "module", _IMAGE, module=lambda: nn.Conv2d(8, 4, 3, stride=2, dilation=2, padding=2))
_add("Conv2d, same", "module", _IMAGE, module=lambda: nn.Conv2d(8, 4, 4, padding="same"))
_add("Conv3d", "module", (4, 5, 5, 5), module=lambda: nn.Conv3d(4, 4, 3))
_add("ConvTranspose2d", "module", _IMAGE, module=lambda: nn.ConvTranspose2d(8, 4, 3, stride=2))
_add("U-Net", "module", (3, 16, 16), module=lambda: _UNet())
_add(
    "autoencoder",
    "module",
    (64,),
    module=lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 64), nn.Sigmoid()),
)


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norm(self.down(x)))
        out: torch.Tensor = self.up(hidden + F.silu(self.inner(hidden)))
        return x + out


_add(
    "pooling",
    "rare operations",
    (8, 7, 7),
    function=lambda x: (
        F.adaptive_avg_pool2d(x, (3, 2)),
        F.adaptive_max_pool2d(x, 2),
        F.avg_pool2d(x, 3, 2, 1),
        F.max_pool2d(x, 2),
        F.lp_pool2d(x, 2.0, 2),
    ),
)
_add(
    "interpolation",
    "rare operations",
    (4, 6, 6),
    function=lambda x: tuple(
        F.interpolate(x, scale_factor=2.0, mode=m)
        for m in ("nearest", "bilinear", "bicubic", "area", "nearest-exact")
    ),
)
_add(
    "grid_sample",
    "rare operations",
    (4, 6, 6),
    (5, 5, 2),
    function=lambda x, g: F.grid_sample(x, g, align_corners=False),
)
_add(
    "fold, pixel_shuffle",
    "rare operations",
    (4, 6, 6),
    function=lambda x: (F.fold(F.unfold(x, 3), (6, 6), 3), F.pixel_shuffle(x, 2)),
)
_add(
    "padding",
    "rare operations",
    (4, 6, 6),
    function=lambda x: tuple(
        F.pad(x, (1, 2, 2, 1), mode=m) for m in ("constant", "reflect", "replicate", "circular")
    ),
)
_add(
    "scans",
    "rare operations",
    _ROW,
    function=lambda x: (
        x.cumsum(1),
        x.cumprod(-1),
        x.logcumsumexp(-1),
        x.cummax(-1)[0],
        x.cummin(1)[0],
    ),
)
_add(
    "sorting",
    "rare operations",
    _ROW,
    function=lambda x: (
        *x.topk(3, -1),
        *x.sort(dim=-1, stable=True),
        *x.kthvalue(2, -1),
        *x.median(-1),
        x.argmax(-1),
    ),
)
_add(
    "quantiles",
    "rare operations",
    _ROW,
    function=lambda x: (x.quantile(0.5, -1), x.nanmedian(-1)[0], x.mode(-1)[0]),
    dtype=torch.float32,
)
_add(
    "reductions",
    "rare operations",
    _ROW,
    function=lambda x: (
        x.sum(1),
        x.mean((1, 2)),
        x.var(-1),
        x.std(1),
        x.prod(1),
        x.amax(1),
        x.norm(dim=-1),
        x.logsumexp(1),
        x.nansum(1),
        x.count_nonzero(1),
        x.aminmax(dim=1)[0],
    ),
)
_add(
    "products",
    "rare operations",
    _ROW,
    _ROW,
    function=lambda x, y: (
        torch.einsum("bsd,btd->bst", x, y),
        torch.einsum("bsd,bsd->bs", x, y),
        x @ y.mT,
        torch.linalg.vecdot(x, y),
        torch.baddbmm(x @ y.mT, x, y.mT),
    ),
)
_add(
    "distances",
    "rare operations",
    _ROW,
    _ROW,
    function=lambda x, y: (
        torch.cdist(x, y),
        torch.cdist(x, y, p=1.0),
        F.pairwise_distance(x, y),
        F.cosine_similarity(x, y, dim=-1),
    ),
    dtype=torch.float32,
)
_add(
    "losses of each row",
    "rare operations",
    (16,),
    (16,),
    function=lambda x, y: (
        F.mse_loss(x, y, reduction="none").mean(-1),
        F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none").sum(-1),
        F.cross_entropy(x, y.argmax(-1), reduction="none"),
        F.smooth_l1_loss(x, y, reduction="none"),
        F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none"),
    ),
)
_add(
    "fft",
    "rare operations",
    (4, 16),
    function=lambda x: (torch.fft.rfft(x).abs(), torch.fft.irfft(torch.fft.rfft(x))),
    dtype=torch.float32,
)
_add(
    "solving",
    "rare operations",
    (4, 4),
    function=lambda x: torch.linalg.solve(x + 9 * torch.eye(4), x),
    dtype=torch.float32,
)
_add(
    "decompositions",
    "rare operations",
    (4, 4),
    function=lambda x: (torch.linalg.svdvals(x), torch.linalg.cholesky(x @ x.mT + torch.eye(4))),
    dtype=torch.float32,
)
_add(
    "writing by index",
    "rare operations",
    _ROW,
    function=lambda x: (
        x.scatter(1, x.argsort(dim=1, stable=True), x),
        x.gather(1, x.argmax(1, keepdim=True)),
        x.masked_fill(x > 0, 1.0),
        x.scatter_add(1, x.argmax(1, keepdim=True), x),
    ),
)
_add(
    "views",
    "rare operations",
    _ROW,
    function=lambda x: (
        x.roll(1, 1),
        x.flip(1),
        x.tril(),
        x.unfold(1, 2, 1),
        x.repeat_interleave(2, 1),
        torch.complex(x, x).abs(),
        F.one_hot(x.argmax(-1), 16),
        torch.diff(x, dim=1),
        x.bfloat16().float(),
    ),
    dtype=torch.float32,
)
_add(
    "activations",
    "rare operations",
    _ROW,
    function=lambda x: tuple(
        getattr(F, f)(x)
        for f in (
            "relu",
            "gelu",
            "silu",
            "mish",
            "selu",
            "elu",
            "celu",
            "softplus",
            "softsign",
            "tanh",
            "sigmoid",
            "hardswish",
            "hardsigmoid",
            "leaky_relu",
            "logsigmoid",
            "softshrink",
            "tanhshrink",
            "glu",
        )
    ),
)
_add(
    "special functions",
    "rare operations",
    _ROW,
    function=lambda x: (
        x.erf(),
        x.lgamma(),
        x.digamma(),
        torch.special.i0(x),
        x.abs().log(),
        x.atan2(x + 1),
        torch.special.entr(x.sigmoid()),
        x.abs().pow(2.5),
        x.sinc(),
        x.expm1(),
    ),
)
