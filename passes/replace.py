"""Put our ops in the place of PyTorch's, by the table in `passes/rules/`.

Before::

    %y = aten.addmm.default(%bias, %x, %w, beta=1, alpha=2)
    %s = aten.sum.dim_IntList(%y, [-1])

becomes::

    %y = bicompile.addmm.default(%bias, %x, %w, 1.0, 2.0, False)
    %s = bicompile.sum.default(%y, [1], False, torch.float32)

because the kernels behind the aten ops change their order of summation with the number of rows.
Integer sums are exact in any order: but for the order of elements, only nodes with floating-point
results are touched.
This is the only pass that inserts our ops; attention arrives as ours already (`bicompile.capture`).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from bicompile.errors import BatchStatistics, BicompileError, UnsupportedDtype
from bicompile.graph import Emit, constant, describe_call, user_line, value
from bicompile.passes.rules import Rule, over_the_batch, rule_of
from bicompile.registry import KERNELS, Kernel
from bicompile.report import Verdict


def replace(gm: GraphModule, *, run) -> None:
    """Apply RULES to every node."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if getattr(node.target, "namespace", "") == "bicompile":
            _check_dtype(node, node.target, run)
            verdict = _verdict([node.target], run)
            run.decide(node, "captured whole", became=str(node.target), verdict=verdict)
        elif (rule := rule_of(node.target)) is not None and (rule.integers or _is_float(node)):
            _apply(rule, node, run)


def _is_float(node: Node) -> bool:
    """By the first of several results that there is: gradients that nobody wants are absent."""
    out = value(node)
    if isinstance(out, (tuple, list)):
        out = next(o for o in out if o is not None)
    return out.dtype.is_floating_point or out.dtype.is_complex


def _apply(rule: Rule, node: Node, run) -> None:
    mixes = over_the_batch(node)
    if mixes and run.options.batch_statistics == "error":
        error = BatchStatistics(op=node.target, given=describe_call(node), line=user_line(node))
        run.refuse(node, error)
        return
    if not _check_dtype(node, rule.target, run) or not run.fuel():
        return
    emit = Emit(node)
    args, kwargs = _numbers(node)
    try:
        new = rule.bind(emit, *args, **kwargs)
    except BicompileError as error:
        run.refuse(node, error)
        return
    if new is NotImplemented:
        return
    verdict = Verdict.DETERMINISTIC if mixes else _verdict(emit.called, run)
    kernel = _kernel(rule, emit.called)
    run.decide(node, kernel.order, became=str(kernel.op), verdict=verdict)
    emit.take_place(new)


def _kernel(rule: Rule, called: list[object]) -> Kernel:
    """The rule's kernel, or the first of those that were called without it."""
    found = [kernel for op in called for kernel in KERNELS.values() if kernel.op is op]
    return rule.kernel if rule.kernel in found or not found else found[0]


_NUMBERS = ("number", "Optional[number]", "float")


def _numbers(node: Node) -> tuple[list, dict]:
    """The arguments; a factor or exponent that may vary between calls is guarded to be what it is.

    Under `dynamic=True` a Python number, such as alpha of addmm, is a node.
    """
    schema = getattr(node.target, "_schema", None)
    arguments = schema.arguments if schema else ()
    numbers = {a.name for a in arguments if str(a.type) in _NUMBERS}
    places = [a.name in numbers for a in arguments]
    args = [constant(a) if n else a for a, n in zip(node.args, places, strict=False)]
    kwargs = {k: constant(a) if k in numbers else a for k, a in node.kwargs.items()}
    return [*args, *node.args[len(args) :]], kwargs


def _verdict(called: list[object], run) -> Verdict:
    """A sum in a backward graph may run over the batch; ops of gradients of rows never do."""
    ours = [str(op).split(".")[1] for op in called if getattr(op, "namespace", "") == "bicompile"]
    by_row = all(name.endswith("_backward") for name in ours)
    return Verdict.INVARIANT if by_row or not run.backward else Verdict.DETERMINISTIC


def _check_dtype(node: Node, op: object, run) -> bool:
    """Whether the node computes in a dtype that the kernels have; otherwise it is refused."""
    values = map(value, (*node.all_input_nodes, node))  # of a sum, dtype= may name another
    tensors = [a for a in values if isinstance(a, torch.Tensor)]
    dtypes = {t.dtype for t in tensors if t.dtype.is_floating_point or t.dtype.is_complex}
    accepted = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes - set(accepted):
        if run.options.unsupported == "allow":
            return False
        error = UnsupportedDtype(
            op=op,
            dtype=dtype,
            given=describe_call(node),
            accepted=accepted,
            line=user_line(node),
        )
        run.refuse(node, error)
        return False
    return True
