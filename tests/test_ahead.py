"""Kernels that are built before the first call: which, and that nothing runs meanwhile."""

from __future__ import annotations

import contextlib
import importlib
import itertools

import pytest
import torch
from rewriting import rewrite, x
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from bicompile import ahead, certificate, registry, testing

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from bicompile.kernels.common import launch as launching
from bicompile.kernels.common.room import rows_with_room
from bicompile.kernels.matmul import gpu as matmul
from bicompile.kernels.matmul.table import ranked
from bicompile.kernels.reduce import parts, rows

KERNELS = registry.load_all()


@pytest.fixture
def built(monkeypatch):
    """What is asked for, on an imagined device."""
    asked = []

    def launch(kernel, grid, *args, **options):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert all(a.is_meta and type(a) is torch.Tensor for a in tensors)
        asked.append((kernel.__name__, options))

    monkeypatch.setattr(matmul, "launch", launch)
    for module in (rows, parts):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(certificate, "permits", lambda *a: True)
    monkeypatch.setattr(launching, "capability", lambda device: "9.0")
    monkeypatch.setattr(matmul, "capability", lambda device: "9.0")
    monkeypatch.setattr(matmul, "processors", lambda device: 132)
    return asked


def mlp(t, w, v):
    return torch.nn.functional.rms_norm(torch.relu(t @ w), (32,)) @ v


def _served(built, *sizes):
    """The tiles that were built, among them those of any number of rows of matrices [K, N]."""
    names = "BM", "BN", "BK", "num_warps", "num_stages", "MASKED"
    products = [o for kernel, o in built if kernel != "rms_norm_kernel"]
    tiles = {tuple(o.get(n, False) for n in names) for o in products}
    for n, k in sizes:
        for m, whole in itertools.product(range(2, 5000), (False, True)):
            room = rows_with_room(m) if whole else m
            s = ranked("half", "9.0", 132, m, n, k, True, room)[-1]
            assert (s.bm, s.columns[0], s.bk, s.warps, s.stages, s.masked) in tiles, (m, room)
    return tiles


def nodes(gm):
    return [n for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "bicompile"]


def test_every_schedule_of_a_varying_size(built):
    torch._dynamo.reset()
    t = x(6, 64, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(t, 0)
    gm, _, _, _ = rewrite(mlp, t, x(64, 32).bfloat16(), x(32, 16384).bfloat16())
    for node in nodes(gm):
        ahead.build(node)
    assert len(_served(built, (32, 64), (16384, 32))) >= 7
    assert {o["num_warps"] for name, o in built if name == "rms_norm_kernel"} == {1, 4}


def test_rows_that_are_sequences_by_tokens(built):
    torch._dynamo.reset()
    t, w = x(2, 6, 64, dtype=torch.bfloat16), x(64, 4096).bfloat16()
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(t, dim)
    gm, _, _, _ = rewrite(lambda t, w: t @ w, t, w)
    for node in nodes(gm):
        ahead.build(node)
    assert len(_served(built, (4096, 64))) >= 7


def test_rows_times_weights_whose_sizes_vary(built):
    """Weights that are no parameters: they are taken to be as they were when the graph was made."""
    torch._dynamo.reset()
    args = x(6, 64).bfloat16(), x(64, 32).bfloat16(), x(32, 4096).bfloat16()
    for t, dim in itertools.product(args, (0, 1)):
        torch._dynamo.maybe_mark_dynamic(t, dim)
    gm, _, _, _ = rewrite(mlp, *args)
    for node in nodes(gm):
        ahead.build(node)
    assert len(_served(built, (32, 64), (4096, 32))) >= 7


def test_rows_whose_strides_vary(built):
    """The last token of each sequence: how far they stand apart follows from no size of theirs."""
    torch._dynamo.reset()
    t, w = x(2, 6, 64, dtype=torch.bfloat16), x(64, 4096).bfloat16()
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(t, dim)
    gm, _, _, _ = rewrite(lambda t, w: t[:, -1] @ w, t, w)
    for node in nodes(gm):
        ahead.build(node)
    assert len(_served(built, (4096, 64))) >= 7


def test_known_sizes_are_built_once(built):
    torch._dynamo.reset()
    args = x(6, 64), x(64, 32), x(32, 8)
    gm, _, _, _ = rewrite(mlp, *args)
    with FakeTensorMode():  # as Inductor has it
        for node in nodes(gm):
            ahead.build(node)
    names = [kernel for kernel, _ in built]
    assert names == 2 * ["matmul_kernel"] + ["rms_norm_kernel"] + 2 * ["matmul_kernel"]


def test_a_known_size_is_built_as_rows_with_memory_behind_them_need_it(built):
    """One row is read as a tile of 16 or 64 rows then, by another kernel than where it has none."""
    torch._dynamo.reset()
    t, w = x(1, 4096, dtype=torch.bfloat16), x(4096, 4096).bfloat16()
    gm, _, _, _ = rewrite(lambda t, w: t @ w, t, w)
    for node in nodes(gm):
        ahead.build(node)
    wanted = [ranked("half", "9.0", 132, 1, 4096, 4096, True, room)[-1] for room in (1, 16)]
    found = [(k == "block_kernel", o["BM"], o["BN"], o["BK"], o["num_stages"]) for k, o in built]
    assert found == [(s.tma, s.bm, s.bn, s.bk, s.stages) for s in wanted]
    assert len(set(found)) == 2


def test_layers_that_are_alike_are_built_once(built, monkeypatch):
    torch._dynamo.reset()
    t = x(6, 64)
    torch._dynamo.mark_dynamic(t, 0)
    layers = lambda t, a, b, c, d: ((t @ a).relu() @ b @ c).relu() @ d  # noqa: E731
    gm, _, _, _ = rewrite(layers, t, x(64, 32), x(32, 64), x(64, 32), x(32, 48))
    found, distinct = nodes(gm), []
    assert len(found) == 4
    monkeypatch.setattr(ahead, "_ops_on_gpu", lambda gm: found)
    monkeypatch.setattr(ahead, "build", distinct.append)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    with ahead.kernels_built(gm):
        pass
    widths = {tuple(n.args[1].meta["val"].shape) for n in distinct}
    assert len(distinct) == 3
    assert widths == {(64, 32), (32, 64), (32, 48)}


def test_nothing_to_do_on_a_cpu():
    torch._dynamo.reset()
    gm, _, _, _ = rewrite(mlp, x(6, 64), x(64, 32), x(32, 8))
    with ahead.kernels_built(gm):
        pass


def test_long_rows_are_built_whole_and_in_parts(built):
    torch._dynamo.reset()
    t = x(6, 40000)
    torch._dynamo.mark_dynamic(t, 0)
    gm, _, _, _ = rewrite(lambda t: t.softmax(1).logsumexp(1), t)
    for node in nodes(gm):
        ahead.build(node)
    names = {name for name, _ in built}
    assert names == {
        *("extremes_kernel", "lanes_kernel", "softmax_part_kernel"),
        *("softmax_kernel", "logsumexp_kernel"),
    }
    assert {o["num_warps"] for name, o in built if name == "softmax_kernel"} == {4}


@pytest.mark.gpu
def test_no_kernel_is_built_after_compilation():
    """Other numbers of rows find their kernels."""
    from triton import knobs

    torch._dynamo.reset()
    t, w, v = (a.cuda().bfloat16() for a in (x(6, 64), x(64, 32), x(32, 4096)))
    compiled = torch.compile(mlp, backend="batch_invariant", dynamic=True)
    with torch.no_grad():
        compiled(t, w, v)
        seen = []
        knobs.runtime.jit_post_compile_hook = lambda **kwargs: seen.append(kwargs["fn"].name)
        try:
            for rows in (2, 3, 17, 40, 100, 300, 3000):
                compiled(x(rows, 64).cuda().bfloat16(), w, v)
        finally:
            knobs.runtime.jit_post_compile_hook = None
    assert seen == []


def test_parts_of_attention_are_built_by_their_own_names(monkeypatch):
    """What a pass opens on a GPU is built ahead, too, through the tensor memory accelerator."""
    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: launched.append((self, a, k)))
    monkeypatch.setattr(certificate, "permits", lambda *a: True)
    monkeypatch.setattr(launching, "_real", lambda device: torch.device("cpu"))

    def layer(q, k, mask):
        visible = torch.ops.bicompile.visible_range(mask)
        out = torch.ops.bicompile.sdpa_visible(q, k, k, mask, visible, 0.3)
        return torch.ops.bicompile.sdpa_backward_visible(out, q, k, k, mask, visible, 0.3)

    q, k = (torch.empty(2, h, 16, 64, dtype=torch.bfloat16, device="meta") for h in (4, 2))
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool, device="meta")
    for node in nodes(make_fx(layer, tracing_mode="fake")(q, k, mask)):
        ahead.build(node)
    names = [function.__name__ for function, _, _ in launched]
    assert names == [
        *("range_kernel", "attention_kernel"),
        *("query_kernel", "query_kernel", "span_kernel", "key_kernel", "key_kernel"),
    ]
    assert all(k["warmup"] for _, _, k in launched)
    assert launched[1][2]["TMA"]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_every_op_can_be_built_without_being_run(kernel, monkeypatch):
    """With meta tensors every launch of every family only compiles."""
    runs = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, warmup, **k: runs.append(warmup))
    monkeypatch.setattr(certificate, "permits", lambda *a: True)
    monkeypatch.setattr(launching, "_real", lambda device: torch.device("cpu"))
    function = getattr(
        importlib.import_module(f"bicompile.kernels.{kernel.family}.gpu"), kernel.name
    )
    for case in kernel.contract.cases:
        sizes = dict.fromkeys(case.axes, 16) | {"G": case.params.get("groups", 1), "C": 4}
        sample = testing.make_sample(kernel, case, torch.bfloat16, sizes)
        function(*tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, sample.arguments()))
    assert set(runs) == {True}
