"""Nothing gets past: every node is ours, or invariant by its nature, or an error.

The last pass.  It changes nothing. ::

    %y = aten._linalg_svd.default(%x)       # UnsupportedOp, naming the user's line
    %z = aten.mul.Tensor(%y, 2)             # pointwise: on the list below

The list says for each op why it needs no kernel of ours.  Pointwise code is compiled by Inductor
under pinned numerics (`bicompile.inductor`), where each function has one body for every shape.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch.fx import GraphModule, Node

from bicompile.errors import RandomOp, UnsupportedGradient, UnsupportedOp
from bicompile.graph import describe_call, user_line, value
from bicompile.registry import OTHERS
from bicompile.report import Verdict

ALLOWED: dict[str, tuple[str, frozenset[str]]] = {
    "pointwise": (
        "an output element reads one element of each input",
        frozenset(
            """
            __lshift__ __rshift__ abs acos acosh add addcdiv addcmul angle asin asinh atan atan2
            atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
            bitwise_xor ceil clamp clamp_max clamp_min complex copysign cos cosh deg2rad digamma div
            elu eq erf erfc erfinv exp exp2 expm1 fill floor floor_divide fma fmax fmin fmod frac
            frexp gcd ge gelu gt hardsigmoid hardswish hardtanh heaviside hypot i0 i0e i1 i1e igamma
            igammac imag isinf isnan isneginf isposinf ldexp le leaky_relu lerp lgamma log log10
            log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
            masked_fill maximum minimum mish mul nan_to_num ne neg nextafter polar polygamma pow
            rad2deg real reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign
            signbit silu sin sinc sinh softplus special_bessel_j0 special_bessel_j1 special_erfcx
            special_i0e special_i1 special_i1e special_log_ndtr special_ndtri sqrt square sub tan
            tanh threshold true_divide trunc where xlogy conj_physical div_rn
            inductor_force_stride_order
            """.split()
        ),
    ),
    "halves": (
        "an output element reads one element of each half of an axis",
        frozenset(["glu"]),
    ),
    "conversion": (
        "an output element is one input element in another dtype, rounded to nearest",
        frozenset("_to_copy convert_element_type device_put to bitcast view_of_dtype".split()),
    ),
    "view or copy": (
        "elements are moved, not combined",
        frozenset(
            """
            _unsafe_view alias as_strided as_strided_scatter broadcast_in_dim cat clone
            constant_pad_nd contiguous copy copy_ detach diagonal diagonal_scatter expand flip
            lift_fresh lift_fresh_copy movedim narrow permute repeat reshape roll select
            select_scatter slice slice_scatter split split_with_sizes squeeze stack t transpose
            tril triu unbind unfold unsqueeze view view_as_complex view_as_real view_copy
            _conj _neg_view rev pixel_shuffle pixel_unshuffle channel_shuffle _reshape_alias
            expand_copy permute_copy squeeze_copy unsqueeze_copy _resize_output collapse_view
            copy_strided
            """.split()
        ),
    ),
    "gather": (
        "an output element is one input element, chosen by index",
        frozenset(
            "embedding gather index index_select take take_along_dim _unsafe_index "
            "_unsafe_masked_index masked_gather".split()
        ),
    ),
    "write": (
        "an output element is one input element, placed by index (no accumulation)",
        frozenset("index_copy index_fill masked_scatter scatter".split()),
    ),
    "creation": (
        "an output element depends on its own coordinates only",
        frozenset(
            """
            arange empty empty_like empty_permuted empty_strided eye full full_like iota linspace
            logspace new_empty new_empty_strided new_full new_ones new_zeros ones ones_like
            scalar_tensor zeros zeros_like tril_indices triu_indices
            """.split()
        ),
    ),
    "order-free reduction": (
        "maximum, minimum and logical reductions are exact in every order",
        frozenset(
            "all amax amin any aminmax argmax argmin cummax cummin max min _is_all_true "
            "_is_any_true "
            "_low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices".split()
        ),
    ),
    "count": (
        "whole numbers, exact in every order",
        frozenset("count_nonzero histc".split()),
    ),
    "search": (
        "a position found by comparing",
        frozenset("bucketize searchsorted".split()),
    ),
    "assertion": (
        "a condition is checked, no number is computed",
        frozenset(
            "_assert_async _functional_assert_async _functional_assert_scalar _make_dep_token "
            "_make_token".split()
        ),
    ),
    "size": (
        "a number computed from sizes",
        frozenset(
            "sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous "
            "sym_constrain_range sym_constrain_range_for_size _assert_scalar "
            "_assert_tensor_metadata item _local_scalar_dense".split()
        ),
    ),
}

EXACT_FOR_INTEGERS = frozenset(
    """
    sum cumsum cumprod prod unique bincount mm _int_mm
    index_add scatter_add index_put _unsafe_index_put scatter_reduce
    """.split()
)
"""Ops whose result is exact in any order when it holds integers or booleans."""

RANDOM = frozenset(
    """
    _standard_gamma bernoulli bernoulli_ binomial cauchy dropout exponential exponential_ geometric
    inductor_lookup_seed inductor_random inductor_randint inductor_seed inductor_seeds log_normal
    multinomial native_dropout normal normal_ normal_functional philox_rand poisson rand rand_like
    randint randint_like randn randn_like randperm rrelu_with_noise rrelu_with_noise_functional
    uniform uniform_
    """.split()
)

_DRAWN_AGAIN = {
    "run_and_save_rng_state": 0,
    "run_with_rng_state": 1,
    "graphsafe_run_with_rng_state": 0,
}
"""What gradient checkpointing makes of a random op, to draw the same numbers again, and which of
its arguments the op is."""

_MODULES_OF_SIZE_ARITHMETIC = ("_operator", "operator", "math", "torch", "builtins")
_REASONS = {
    "flex_attention": "the score is known to be invariant as it is, as cap * tanh(score / cap), in "
    "sums with functions of the indices, and in where(condition, score, -inf); without return_lse, "
    "and where score_mod and mask_mod are pointwise: table[b, j], not table[b][j]",
}
_WRAPPERS = frozenset(("auto_functionalized", "auto_functionalized_v2", "invoke_subgraph"))


def audit(gm: GraphModule, *, run) -> None:
    """Check every node of the graph and record why it stays.

    Raises:
        UnsupportedOp: no reason is known why the node should be invariant.
        UnsupportedGradient: the same in a backward graph.
        RandomOp: the node draws random numbers.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") == "bicompile":
            continue
        if node in run.refused:
            continue
        reason = reason_to_stay(node)
        if reason is not None:
            run.decide(node, reason)
            continue
        at = _DRAWN_AGAIN.get(_name(node))
        op = node.target if at is None else node.args[at]
        if _op_name(op) in RANDOM:
            if run.options.random == "allow":
                reason, verdict = _drawn(node)
                run.decide(node, reason, verdict=verdict)
            else:
                run.refuse(node, RandomOp(op=op, line=user_line(node)))
        elif run.options.unsupported == "allow":
            run.decide(node, "let through by an option", verdict=Verdict.ALLOWED)
        elif run.backward:
            run.refuse(node, UnsupportedGradient(op=node.target, line=user_line(node)))
        else:
            error = UnsupportedOp(
                op=node.target,
                reason=_REASONS.get(_name(node), "its order of summation is not pinned"),
                given=describe_call(node),
                line=user_line(node),
            )
            run.refuse(node, error)


def _drawn(node: Node) -> tuple[str, Verdict]:
    """What is said of a random op that is allowed."""
    replacement = True in (*node.args[2:3], *node.kwargs.values())
    if _name(node) == "multinomial" and replacement and value(node).is_cuda:
        return "PyTorch adds up the chances in no fixed order", Verdict.ALLOWED
    return "the same numbers for the same seed and shapes, by place", Verdict.DETERMINISTIC


def reason_to_stay(node: Node) -> str | None:
    """Why a node needs no kernel of ours, or None."""
    name = _name(node)
    if node.target is getitem:
        return "one of the results of a node that is decided on by itself"
    if not isinstance(node.target, torch._ops.OpOverload):
        if getattr(node.target, "__module__", "") in _MODULES_OF_SIZE_ARITHMETIC:
            return "arithmetic on sizes"
        return "its graph is audited by itself" if name in _WRAPPERS else None
    if (other := OTHERS.get(node.target)) is not None:
        return f"registered with a contract: {other.order}"
    if node.target.namespace not in ("aten", "prims", "prim", "inductor_prims"):
        return None
    single = name.removeprefix("_foreach_")  # the same on each tensor of a list
    for kind, (reason, names) in ALLOWED.items():
        if single in names:
            return f"{kind}: {reason}"
    if name in EXACT_FOR_INTEGERS and not _floats(node):
        return "integers: exact in every order"
    if name == "sort" and node.kwargs.get("stable"):
        return "stable sort: equal elements keep their order"
    if name == "scatter_reduce" and {"amax", "amin"} & set(node.args):
        reason, _ = ALLOWED["order-free reduction"]
        return f"order-free reduction: {reason}"
    if name in ("index_put", "_unsafe_index_put") and not _accumulates(node):
        reason, _ = ALLOWED["write"]
        return f"write: {reason}"
    return None


def is_pointwise(node: Node) -> bool:
    """Whether Inductor computes each element of a node from one element of each input."""
    kinds = ("pointwise", "halves", "conversion")
    is_op = isinstance(node.target, torch._ops.OpOverload)
    return is_op and any(_name(node) in ALLOWED[kind][1] for kind in kinds)


def _name(node: Node) -> str:
    return _op_name(node.target)


def _op_name(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        # A reducing scatter has an overload of its own.
        return "scatter_reduce" if name == "scatter" and "reduce" in target._overloadname else name
    return getattr(target, "__name__", str(target))


def _accumulates(node: Node) -> bool:
    return bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))


def _floats(node: Node) -> bool:
    if isinstance(dtype := node.kwargs.get("dtype"), torch.dtype):
        return dtype.is_floating_point or dtype.is_complex  # converted before anything is added
    values = [value(n) for n in node.all_input_nodes]
    return any(
        isinstance(v, torch.Tensor) and (v.dtype.is_floating_point or v.dtype.is_complex)
        for v in values
    )
