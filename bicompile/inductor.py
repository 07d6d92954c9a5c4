"""All private use of TorchInductor: pinned configuration, pointwise overrides, cache stamp.

Inductor's C++ backend prints one body for vectors, one for scalars, and sizes, strides and tails
decide which of the two an element meets.  Under `overrides()` the two are one function.  And its
Triton backend computes with sizes that vary in float32, where Python computes with known ones in
float64.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._python_dispatch import _disable_current_modes

from bicompile.errors import UnknownOption
from bicompile.graph import subgraphs

HEADER = Path(__file__).parent / "kernels" / "common" / "functions.h"

# ---- Configuration -------------------------------------------------------------------------------

# Each key with the reason why the value is part of the promise.
PINNED: Mapping[str, tuple[object, str]] = {
    "pattern_matcher": (False, "its rewrites (pad_mm, attention, mkldnn) depend on sizes"),
    "joint_graph_constant_folding": (False, "the graph that was audited is the graph that runs"),
    "shape_padding": (False, "pads matmuls by size"),
    "permute_fusion": (False, "moves permutes into matmuls by size"),
    "b2b_gemm_pass": (False, "fuses matmuls by size"),
    "batch_fusion": (False, "joins ops by how many there are"),
    "group_fusion": (False, "joins ops by how many there are"),
    "decompose_mem_bound_mm": (False, "decomposes matmuls by size"),
    "efficient_conv_bn_eval_fx_passes": (False, "folds batch norm into weights"),
    "conv_1x1_as_mm": (False, "respells convolutions by size"),
    "layout_optimization": (False, "chooses convolution layouts by size"),
    "freezing": (False, "folds and repacks weights"),
    "max_autotune": (False, "chooses kernels by timing"),
    "max_autotune_gemm": (False, "chooses kernels by timing"),
    "max_autotune_pointwise": (False, "chooses kernels by timing"),
    "coordinate_descent_tuning": (False, "chooses kernels by timing"),
    "benchmark_fusion": (False, "chooses fusions by timing"),
    "benchmark_combo_kernel": (False, "chooses fusions by timing"),
    "combo_kernels": (False, "joins kernels by size"),
    "online_softmax": (False, "another order of summation"),
    "split_reductions": (False, "splits sums by size"),
    "apply_gumbel_max_trick": (False, "respells sampling"),
    "use_fast_math": (False, "approximate functions"),
    "triton.enable_pdl": (False, "its kernels wait for one before them, ours start before they do"),
    "emulate_precision_casts": (True, "each op rounds to its dtype, whatever is fused; no fma"),
    "eager_numerics.division_rounding": (True, "division rounds correctly on the GPU too"),
    "triton.codegen_upcast_to_fp32": (True, "half types compute in float32"),
    "cpp.enable_floating_point_contract_flag": ("off", "no fma that the graph does not ask for"),
    "cpp.enable_unsafe_math_opt_flag": (False, "no reassociation"),
    "cpp.use_decompose_tanh": (False, "another tanh"),
    "cpp.enable_concat_linear": (False, "joins matmuls"),
}

# No bit follows these; each key with what it is good for.
_TUNED: Mapping[str, tuple[object, str]] = {
    "score_fusion_memory_threshold": (1, "kernels of a cache's counters, of 8 bytes, are joined"),
}

_MODES: Mapping[str | None, Mapping[str, object]] = {
    None: {},
    "default": {},
    "reduce-overhead": {"triton.cudagraphs": True},
    "max-autotune": {"triton.cudagraphs": True},
    "max-autotune-no-cudagraphs": {},
}


Whole = Callable[[torch.fx.graph.Graph], None]


class Stamp(CustomGraphPass):
    """A pass over forward and backward together, which puts our identity into the caches' keys.

    Without it, code that plain Inductor cached for the same graph would be served to us.
    """

    def __init__(self, identity: str, whole: Whole | None = None) -> None:
        self.identity = identity
        self.whole = whole

    def __call__(self, graph: torch.fx.graph.Graph) -> None:
        """Apply the pass, if there is one."""
        if self.whole is not None:
            self.whole(graph)

    def uuid(self) -> str:
        """The identity, which Inductor hashes into its keys."""
        return self.identity


def _known(key: str) -> bool:
    owner: Any = config
    for part in key.split("."):
        owner = getattr(owner, part, _MISSING)
        if owner is _MISSING:
            return False
    return True


def config_patches(mode: str | None, stamp: str, whole: Whole | None = None) -> dict[str, object]:
    """The configuration of one call, never set globally: what is pinned or tuned, mode and stamp.

    Keys that this version of PyTorch does not have are left out.

    Raises:
        UnknownOption: `mode` is not one of torch.compile's modes.
    """
    if mode not in _MODES:
        accepted = [m for m in _MODES if m is not None]
        raise UnknownOption(option="mode", value=repr(mode), accepted=accepted)
    patches = {key: value for key, (value, _) in {**PINNED, **_TUNED}.items() if _known(key)}
    identity = f"{stamp}-{_own_hash()}"
    return {**patches, **_MODES[mode], "joint_custom_pre_pass": Stamp(identity, whole)}


@functools.cache
def _own_hash() -> str:
    sources = Path(__file__).read_bytes(), HEADER.read_bytes()
    return hashlib.sha256(b"".join(sources)).hexdigest()


# ---- C++ pointwise overrides ---------------------------------------------------------------------

# Functions of kernels/common/functions.h: one template for scalars and vectors, float32.
FAST = ("exp", "expm1", "tanh", "log", "log1p", "erf", "sin", "cos", "sigmoid")

# Functions whose vector body is another algorithm: the scalar body, lane by lane.
SCALARIZED = (
    *("tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("exp2", "log2", "log10", "pow", "hypot", "fmod", "remainder", "nextafter", "copysign"),
    *("erfc", "erfinv", "lgamma", "digamma", "i0", "i0e", "fma"),
)

LITTLE = 1 << 20
"""Bytes: two kernels that read no more are joined, though each alone could reuse their memory."""
_PREFIX = re.compile(r"#include .*cpp_prefix.*\n")
_MISSING: Any = object()
_lock = threading.RLock()
_depth = 0


def _named(name: str, function: Callable[..., Any]) -> staticmethod[..., Any]:
    # Inductor falls back from vector to scalar by the function's name.
    function.__name__ = name
    return staticmethod(function)


def _is_float(x: Any, dtype: torch.dtype | None = None) -> bool:
    found = getattr(x, "dtype", None)
    if dtype is not None:
        return bool(found == dtype)
    return found is None or found.is_floating_point  # a lane of a scalarised body has no dtype


def _fast(name: str, scalar: Any, vector: Any) -> tuple[Any, Any]:
    """bic::name for float32; other dtypes keep the scalar body, lane by lane in vectors."""
    plain = getattr(scalar, name)
    if name == "sigmoid":  # Inductor's spelling does not compile lane by lane

        def plain(x: Any) -> str:
            return f"bic::sigmoid({x})"

    lane_by_lane = vector._scalarize(_named(name, lambda x: plain(x)).__func__)

    def one(x: Any) -> Any:
        return f"bic::{name}({x})" if _is_float(x, torch.float32) else plain(x)

    def many(x: Any) -> Any:
        return f"bic::{name}({x})" if _is_float(x, torch.float32) else lane_by_lane(x)

    return _named(name, one), _named(name, many)


def _remainder(scalar: Any, vector: Any) -> tuple[Any, Any]:
    """One spelling of the float remainder; integers keep theirs."""
    integers, integer_vectors = scalar.remainder, vector.remainder

    def spelled(a: Any, b: Any) -> str:
        return f"bic::remainder({a}, {b})"

    lane_by_lane = vector._scalarize(spelled)

    def one(a: Any, b: Any) -> Any:
        return spelled(a, b) if _is_float(a) else integers(a, b)

    def many(a: Any, b: Any) -> Any:
        return lane_by_lane(a, b) if _is_float(a) else integer_vectors(a, b)

    return _named("remainder", one), _named("remainder", many)


def _scalarized(name: str, scalar: Any, vector: Any) -> Any:
    """The scalar body, lane by lane; integer vectors keep their own body."""
    plain, lane_by_lane = getattr(vector, name), vector._scalarize(getattr(scalar, name))

    def many(*args: Any) -> Any:
        return lane_by_lane(*args) if _is_float(args[0]) else plain(*args)

    return _named(name, many)


def _to_dtype(owner: Any) -> Any:
    """Floats become 8-bit integers by way of int32: the vector body alone would saturate."""
    plain = owner.to_dtype

    def step(x: Any, dtype: torch.dtype) -> Any:
        if x.dtype == dtype:
            return x
        y = plain(x, dtype, x.dtype)
        y.dtype = dtype
        return y

    def to_dtype(x: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        if dtype in (torch.int8, torch.uint8) and x.dtype and x.dtype.is_floating_point:
            wide = x if x.dtype == torch.float64 else step(x, torch.float32)
            return plain(step(wide, torch.int32), dtype, torch.int32)
        return plain(x, dtype, *args, **kwargs)

    return _named("to_dtype", to_dtype)


def _with_header(codegen_group: Callable[..., str]) -> Callable[..., str]:
    """Put functions.h into the kernels that call it, behind Inductor's precompiled prefix."""
    header = HEADER.read_text()

    @functools.wraps(codegen_group)
    def wrapper(*args: Any, **kwargs: Any) -> str:
        source = codegen_group(*args, **kwargs)
        if "bic::" not in source:
            return source
        return _PREFIX.sub(lambda prefix: prefix.group() + header, source, count=1)

    return wrapper


def _quotient(printer: Any, expr: Any) -> str:
    """A size by a size, in float64."""
    a, b = (
        f"tl.full([], {float(x)}, tl.float64)"
        if x.is_Integer
        else f"({printer._print(x)}).to(tl.float64)"
        for x in expr.args
    )
    return f"({a} / {b})"


def _number(printer: Any, expr: Any) -> str:
    """A constant with all its digits; a whole one as Inductor spells it."""
    return str(int(expr)) if expr.is_integer else f"tl.full([], {float(expr)!r}, tl.float64)"


def _functions_of_sizes(printer: type[Any]) -> Iterator[tuple[Any, str, Any]]:
    """Roots, logarithms and so on, of float64 where Inductor rounds a size to float32."""

    def wide(plain: Callable[[Any, Any], str]) -> Callable[[Any, Any], str]:
        def spelled(printer: Any, expr: Any) -> str:
            found = plain(printer, expr).replace("tl.float32", "tl.float64")
            return found.replace("tl.sqrt_rn", "libdevice.sqrt")  # which rounds to nearest, too

        return spelled

    for name, value in vars(printer).items():
        if name == "_helper_sqrt" or name.startswith("_print_OpaqueUnaryFn_"):
            yield printer, name, wide(value)


def _raises_memory(of_any_size: Callable[..., bool]) -> Callable[..., bool]:
    """Whether two kernels that read more than LITTLE hold more memory as one.

    What a kernel only writes into, as a cache, stands among its reads as a whole (a `StarDep`).
    """
    from torch._inductor.dependencies import MemoryDep

    def raises(self: Any, *kernels: Any) -> bool:
        if not of_any_size(self, *kernels):
            return False
        read = (d for k in kernels for d in k.read_writes.reads if isinstance(d, MemoryDep))
        return bool(sum(map(self.dep_size_hint, read)) > LITTLE)

    return raises


@functools.cache
def _replacements() -> tuple[tuple[Any, str, Any], ...]:
    """What `overrides()` installs, as (owner, attribute, value)."""
    from torch._inductor import exc, graph, lowering
    from torch._inductor.codegen import cpp
    from torch._inductor.codegen.triton import TritonPrinter
    from torch._inductor.scheduler import Scheduler

    scalar, vector = cpp.CppOverrides, cpp.CppVecOverrides
    pairs = {name: _fast(name, scalar, vector) for name in FAST}
    pairs["remainder"] = _remainder(scalar, vector)
    table: list[tuple[Any, str, Any]] = []
    for name, (one, many) in pairs.items():
        table += [(scalar, name, one), (vector, name, many)]
    for name in SCALARIZED:
        if name not in pairs and hasattr(scalar, name):
            table.append((vector, name, _scalarized(name, scalar, vector)))
    table += [(owner, "to_dtype", _to_dtype(owner)) for owner in (scalar, vector)]
    # Before 2.13 a value rounded to bfloat16 was read back unrounded in the same kernel.
    table.append((cpp.CppKernel, "cache_dtype_convert", lambda *_: None))
    # The first node of an op without a lowering is logged with all that it was computed from: a
    # text that doubles with every layer, and that PyTorch before 2.13 makes though nobody reads it.
    text = "operator_str"
    table.append((exc.OperatorIssue, text, _named(text, lambda target, *_: str(target))))
    # With CI in the environment, an op that Inductor would have decomposed is else an error here.
    table.append((graph, "make_fallback", functools.partial(lowering.make_fallback, warn=False)))
    # On a GPU a constant divisor becomes a factor, with other bits than where it is not known: a
    # number of rows in a graph with sizes that vary.
    table.append((lowering, "get_constant_value", lambda *_: None))
    table += [(TritonPrinter, "_print_IntTrueDiv", _quotient)]
    table += [(TritonPrinter, "_print_Float", _number), *_functions_of_sizes(TritonPrinter)]
    # Keys and values of a token go into a cache by one kernel, if it is one kernel's worth.
    raises = "can_fusion_increase_peak_memory"
    if hasattr(Scheduler, raises):
        table.append((Scheduler, raises, _raises_memory(getattr(Scheduler, raises))))
    group = cpp.KernelGroup
    table.append((group, "codegen_group", _with_header(group.codegen_group)))
    return tuple(table)


@contextlib.contextmanager
def overrides() -> Iterator[None]:
    """Install what replaces parts of Inductor; on leaving, its classes are exactly as before.

    May be nested and entered from several threads, one at a time.
    """
    global _depth
    with _lock:
        saved: list[tuple[Any, str, Any]] = []
        if _depth == 0:
            for owner, name, value in _replacements():
                saved.append((owner, name, vars(owner).get(name, _MISSING)))
                setattr(owner, name, value)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            for owner, name, value in saved:
                if value is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


@contextlib.contextmanager
def _one_libdevice() -> Iterator[None]:
    """Keep Inductor from switching the process to another CUDA libdevice.

    It would do so at its first kernel under `emulate_precision_casts`, and kernels compiled before
    and after would have other bits.
    """
    from torch._inductor import async_compile

    name = "_set_triton_libdevice_path"
    with _lock:
        switch = getattr(async_compile, name, None)
        if switch is not None:
            setattr(async_compile, name, lambda: None)
        try:
            yield
        finally:
            if switch is not None:
                setattr(async_compile, name, switch)


# ---- Compilation ---------------------------------------------------------------------------------


def _round_every_op(gm: torch.fx.GraphModule) -> None:
    """Let `emulate_precision_casts` hold for what decompositions are made of, too.

    Tracing marks the ops of the program alone: a half type inside a decomposition would be rounded
    where a kernel ends and not where kernels are joined, which follows sizes and strides.
    """
    halves = torch.bfloat16, torch.float16
    for node in (n for module in subgraphs(gm) for n in module.graph.nodes):
        values = (n.meta.get("val") for n in (node, *node.all_input_nodes))
        if any(getattr(v, "dtype", None) in halves for v in values):
            node.meta["low_precision_pointwise_barrier"] = True


def load() -> None:
    """Import the compiler, as torch.compile does for its own backend where it wraps a function."""
    importlib.import_module("torch._inductor.compile_fx")


def compile_inner(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's inner compiler under `overrides()`: takes what `compile_fx` gives to `inner`."""
    from torch._inductor.compile_fx import compile_fx_inner

    _round_every_op(gm)
    with overrides(), _one_libdevice():
        return compile_fx_inner(gm, example_inputs, **kwargs)


def compile_graph(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    inner: Callable[..., Any] = compile_inner,
    decompositions: Any = None,
    whole: Whole | None = None,
    mode: str | None = None,
    stamp: str = "",
    caches: bool = True,
) -> Any:
    """Compile a captured graph with Inductor, pinned so that it keeps every element's bits.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        inner: compiles each traced graph (forward, backward); ends in `compile_inner`.
        decompositions: table of decompositions; must pickle, or the caches never hit.
        whole: a pass over each traced graph before its gradient is a graph of its own.
        mode: one of torch.compile's modes; nothing is autotuned in any of them.
        stamp: identity of all that decides bits outside this file, part of the cache keys.
        caches: whether a graph compiled earlier may be taken from the disk.

    Raises:
        UnknownOption: `mode` is unknown.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    seen: dict[str, Any] = {} if caches else {"enable_autograd_cache": False}
    with functorch_config.patch(**seen), _one_libdevice():
        return compile_fx(
            gm,
            list(example_inputs),
            inner_compile=inner,
            config_patches=config_patches(mode, stamp, whole),
            decompositions=decompositions,
        )


def outside_tracing() -> contextlib.AbstractContextManager[Any]:
    """Let new tensors be real ones, although Inductor works among fake ones."""
    return _disable_current_modes()


def cache_dir() -> Path:
    """The folder in which Inductor keeps compiled graphs (TORCHINDUCTOR_CACHE_DIR)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as folder

    return Path(folder())


def falls_back(target: object) -> bool:
    """Whether Inductor runs this op with PyTorch's own kernel, which no override reaches."""
    from torch._inductor import lowering

    return target in lowering.fallbacks or target not in lowering.lowerings
