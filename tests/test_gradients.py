"""Laws of every gradient: a row's by itself, sums in a pinned order, values as exact as PyTorch's.

The kernels have no float64: instead of differences of values (gradcheck) the true gradient is that
of the same numbers in float64, which PyTorch holds against differences itself.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backward import Compiled
from gradient_subjects import SUBJECTS

from bicompile import backend, capture, certificate, decompositions, testing
from bicompile.passes.rules import RULES, gradients
from bicompile.passes.rules.common import KERNELS, Rule

aten = torch.ops.aten
QUICK = """
linear, experts, conv2d, softmax, log_softmax, layer_norm, batch_norm, weight_norm, avg_pool2d,
attention/window, max_pool2d, logcumsumexp, scatter_add, index_put, index, embedding, cdist,
cross_entropy, solve_triangular, interpolate
"""
QUICK = [name.strip().replace("/", ", ") for name in QUICK.split(",")]
each_subject = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.soak) for n in SUBJECTS]
)


def normal(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7 + seed)).to(dtype)


def eagerly(function):
    """In place of a compiler."""
    return function


def by_inductor(function):
    return torch.compile(function, backend="batch_invariant", fullgraph=True)


class Gradients:
    """Of a subject, by a function compiled in any way."""

    def __init__(self, subject, compile=Compiled, device="cpu", dtype=torch.float32):
        self.subject, self.device, self.dtype = subject, device, dtype
        self.function = compile(subject.function)

    def problem(self, rows, seed=0):
        """Rows, weights, and the gradient of the result."""
        given = self.subject.problem(rows, self.dtype, seed)
        with torch.no_grad():
            out = self.subject.function(*given[0], *given[1])
        return (*given, normal(out.shape, self.dtype, seed))

    def __call__(self, rows, weights, grad):
        """Those of rows, and behind them those of weights."""
        made = [t.to(self.device, copy=True) for t in (*rows, *weights)]
        leaves = [t.requires_grad_() for t in made if t.is_floating_point()]
        for t in made[: len(rows)]:
            capture.mark_batch_dynamic(t)
        out = self.function(*made)
        return [t.cpu() for t in torch.autograd.grad(out, leaves, grad.to(self.device))]

    def of_rows(self, rows, weights, grad):
        """Those of rows alone."""
        return self(rows, weights, grad)[: -len(weights) or None]


def exactly(subject, rows, weights, grad):
    """The same in float64."""
    wide = [[t.double() if t.is_floating_point() else t for t in p] for p in (rows, weights)]
    function = subject.reference or subject.function
    return Gradients(replace(subject, function=function), eagerly)(*wide, grad.double())


def check_rows(gradients):
    """A row's are the same alone, in another batch, and among NaN."""
    rows, weights, grad = gradients.problem(5)
    whole = gradients.of_rows(rows, weights, grad)
    for chosen in ([4, 1], [3]):
        found = gradients.of_rows([t[chosen] for t in rows], weights, grad[chosen])
        testing.assert_same_bits(found, [t[chosen] for t in whole], f"rows {chosen}")
    others = torch.tensor([0, 1, 3, 4])
    rows = [t.index_fill(0, others, torch.nan) if t.is_floating_point() else t for t in rows]
    found = gradients.of_rows(rows, weights, grad.index_fill(0, others, torch.nan))
    testing.assert_same_bits([t[2] for t in found], [t[2] for t in whole], "among NaN")


def check_runs(gradients, seed=1):
    """All of them again, with other numbers of threads and other schedules of a GPU."""
    problem = gradients.problem(24, seed)
    expected = gradients(*problem)
    for threads in (1, 2):
        with testing.num_threads(threads), certificate.random_schedules(threads):
            found = gradients(*problem)
        testing.assert_same_bits(found, expected, f"{threads} threads")


def error(found, true):
    return (found.double() - true).square().mean().sqrt().item()


def check_errors(gradients):
    """As exact as PyTorch's, or as the true values rounded, over some batches.

    Typical errors of each lie within those of the other; on the whole they are no larger, neither
    of the gradients of rows nor of those of weights.
    """
    eager, errors = Gradients(gradients.subject, eagerly, gradients.device, gradients.dtype), []
    batches = 4
    if gradients.device == "cuda":  # PyTorch's own errors vary more there, and more in half types
        batches = 16 if gradients.dtype == torch.float32 else 64
    for seed in range(batches):
        problem = gradients.problem(24, seed)
        true = exactly(gradients.subject, *problem)
        pairs = zip(gradients(*problem), eager(*problem), true, strict=True)
        for a, b, c in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype
            errors.append([error(v, c) for v in (a, b, c.to(a.dtype))])
    ours, theirs, rounding = (
        torch.tensor(errors, dtype=torch.float64).view(batches, -1, 3).unbind(-1)
    )
    theirs = theirs.maximum(rounding)
    assert (ours.median(0).values <= theirs.amax(0)).all(), (ours, theirs)
    ratios = ours.mean(0).clamp(min=1e-30) / theirs.mean(0).clamp(min=1e-30)
    weights = len(gradients.subject.weights)
    for part in (ratios[: -weights or None], ratios[len(ratios) - weights :]):
        assert not len(part) or part.log().mean().exp() <= 1.02, ratios


# ---------------------------------------------------------------------------------- the subjects


def check(found):
    if found.subject.by_row:
        check_rows(found)
    check_runs(found)
    check_errors(found)


@each_subject
def test_laws(name):
    subject = SUBJECTS[name]
    found = Gradients(subject)
    found(*found.problem(5))
    assert [found.function.forward_ops, found.function.ops] == subject.graphs
    check(found)


@pytest.mark.soak
@pytest.mark.parametrize("name", [n for n in SUBJECTS if SUBJECTS[n].half])
def test_laws_in_bfloat16(name):
    check(Gradients(SUBJECTS[name], dtype=torch.bfloat16))


@pytest.mark.soak
@pytest.mark.parametrize("name", SUBJECTS)
def test_laws_by_inductor(name):
    check(Gradients(SUBJECTS[name], by_inductor))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_laws_on_a_gpu(name, dtype):
    subject = SUBJECTS[name]
    if dtype is torch.float32 or subject.half:
        check(Gradients(subject, device="cuda", dtype=dtype))


def digests(names):
    """A name for the bits of all gradients of each subject."""
    for name in names:
        found = Gradients(SUBJECTS[name])
        numbers = [testing.bits(t).flatten().tolist() for t in found(*found.problem(24))]
        yield hashlib.sha256(str(numbers).encode()).hexdigest()


FEW = ["linear", "conv2d", "layer_norm", "embedding"]


@pytest.mark.parametrize("names", [FEW, pytest.param([*SUBJECTS], marks=pytest.mark.soak)], ids=len)
def test_another_process(names):
    program = f"import test_gradients as t; t.torch.set_num_threads(2); print(*t.digests({names}))"
    here = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*digests(names)]


# ------------------------------------------------------------------------- none may be forgotten

ON_A_GPU = {"_thnn_fused_lstm_cell_backward_impl", "_thnn_fused_gru_cell_backward"}
"""Of ops that PyTorch opens on a CPU: tests/test_recurrent.py."""
INFERENCE = {"qk_norm_rope", "rms_norm", "swiglu"}
"""Fused where no gradient needs what lies between the ops."""


def missing(kernels):
    """Ops of ours, and gradients with an entry in our tables, that no subject meets."""
    entries = [op for op in (*RULES, *decompositions.TABLE) if "_backward" in str(op)]
    names = {str(op).split(".")[1] for op in entries} | {*kernels}
    met = set(itertools.chain(*itertools.chain(*(s.graphs for s in SUBJECTS.values()))))
    assert not (ON_A_GPU | INFERENCE) & met
    return names - met - ON_A_GPU - INFERENCE


def test_every_op_and_every_gradient_has_a_subject():
    assert not missing(KERNELS)
    assert missing([*KERNELS, "a_new_op"]) == {"a_new_op"}


# ------------------------------------------------------------------------------ planted variants


def halves_in_a_large_batch(emit, grad, output, dim, dtype):
    """Sums of a softmax's gradient in two halves where there are more than two rows."""
    width = output.meta["val"].shape[-1]
    cuts = [0, width // 2, width] if output.meta["val"].shape[0] > 2 else [0, width]
    product, total = emit(aten.mul.Tensor, grad, output), None
    for begin, end in itertools.pairwise(cuts):
        part = emit(aten.slice.Tensor, product, -1, begin, end)
        part = emit(KERNELS["sum"].op, part, [part.meta["val"].dim() - 1], True, torch.float32)
        total = part if total is None else emit(aten.add.Tensor, total, part)
    return emit(aten.mul.Tensor, emit(aten.sub.Tensor, grad, total), output)


def test_a_rule_whose_order_follows_the_batch_is_caught(monkeypatch):
    op = aten._softmax_backward_data.default
    planted = Rule(op, KERNELS["softmax_backward"], halves_in_a_large_batch)
    monkeypatch.setitem(RULES, op, planted)
    with pytest.raises(testing.InvarianceViolation):
        check_rows(Gradients(SUBJECTS["softmax"]))


class Planted(Gradients):
    """Gradients added up over as many parts of the batch as there are threads."""

    def __call__(self, rows, weights, grad):
        parts = zip(*(t.chunk(torch.get_num_threads()) for t in (*rows, grad)), strict=True)
        found = [super(Planted, self).__call__(p[:-1], weights, p[-1]) for p in parts]
        sums = zip(*(f[-len(weights) :] for f in found), strict=True)
        return [torch.stack(t).sum(0) for t in sums]


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_parts_of_threads_are_caught(name):
    with pytest.raises(testing.InvarianceViolation):
        check_runs(Planted(SUBJECTS[name]))


def test_sums_of_rounded_terms_are_caught(monkeypatch):
    """A weight's gradient in float32 from terms in bfloat16."""

    def rounded(emit, x, dim, dtype):
        x = emit(torch.ops.prims.convert_element_type.default, x, torch.bfloat16)
        return emit(KERNELS["sum"].op, x, list(dim), False, dtype)

    monkeypatch.setattr(gradients, "_sum", rounded)
    with pytest.raises(AssertionError):
        check_errors(Gradients(SUBJECTS["layer_norm"]))


def test_another_function_is_caught(monkeypatch):
    """The gradient of a weight without the mean."""
    found = gradients.normalised
    monkeypatch.setattr(gradients, "normalised", lambda e, x, mean, rstd: found(e, x, None, rstd))
    with pytest.raises(AssertionError):
        check_errors(Gradients(SUBJECTS["layer_norm"]))


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm"])
def test_statistics_of_a_norm_stay_wide(norm, monkeypatch):
    """Under autocast, where the weight is float32, PyTorch's graphs round them and its kernels not.

    Its own compiler has this error, too.
    """

    def function(x, weight):
        if norm == "layer_norm":
            return torch.nn.functional.layer_norm(x, weight.shape, weight)
        return torch.nn.functional.group_norm(x, 4, weight)

    def errors(width):
        x, g = (normal((300, width), torch.bfloat16, seed) for seed in (0, 1))
        x, w = 3 + x, normal((width,), torch.float32, 2)

        def gradient(run, x):
            x = x.clone().requires_grad_()
            run(x, w.to(torch.promote_types(x.dtype, w.dtype))).backward(g.to(x.dtype))
            return x.grad.double()

        exact = gradient(function, x.double())
        runs = by_inductor(function), function
        return [(gradient(run, x) - exact).square().mean().sqrt() for run in runs]

    ours, eager = errors(64)
    assert ours <= 1.01 * eager
    monkeypatch.setattr(backend, "wide_statistics", lambda graph: None)
    torch._dynamo.reset()
    ours, eager = errors(72)
    assert ours > 1.01 * eager
