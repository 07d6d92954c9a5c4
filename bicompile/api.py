"""The front door: `bicompile.compile`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from bicompile import backend, capture, inductor
from bicompile.errors import UnsafeSetting

T = TypeVar("T", bound=Callable[..., Any])


def compile(
    model: T,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    options: Mapping[str, object] | None = None,
) -> T:
    """Compile a model or a function such that its rows' bits do not depend on the batch.

    The same as ``torch.compile(model, backend="batch_invariant", fullgraph=True)``, and also: the
    batch axis of every input may vary without a new graph, a module keeps its class (its `forward`
    is compiled in place, so that transformers' `generate` uses it), and settings under which the
    guarantee cannot hold are refused.

    Args:
        model: an nn.Module, compiled in place, or a function.
        mode: as in torch.compile; "reduce-overhead" records CUDA graphs.
        dynamic: as in torch.compile.
        options: see `bicompile.options.Options`.

    Returns:
        the module itself, or the compiled function.

    Raises:
        UnsafeSetting: the model is set up in a way for which the guarantee cannot hold.

    Example:
        >>> model = compile(torch.nn.Linear(8, 4).eval())
        >>> x = torch.randn(5, 8)
        >>> with torch.no_grad():
        ...     bool((model(x)[2:3] == model(x[2:3])).all())
        True
    """
    inductor.load()
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    breaks = dict(options or {}).get("graph_breaks") == "allow"
    compiled = torch.compile(
        forward,
        backend=functools.partial(_backend, mode=mode, options=options),
        fullgraph=not breaks,
        dynamic=dynamic,
    )
    if isinstance(model, torch.nn.Module):
        check_settings(model)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                capture.mark_batch_dynamic(leaf)
        _warn_of_positions(kwargs)
        return compiled(*args, **kwargs)

    call.bicompile_original = forward  # type: ignore[attr-defined]  # what explain looks at
    if isinstance(model, torch.nn.Module):
        model.forward = call
        return model
    return call  # type: ignore[return-value]


def _backend(gm: Any, inputs: list[Any], **kwargs: Any) -> Any:
    return backend.batch_invariant(gm, inputs, **kwargs)


def check_settings(model: torch.nn.Module) -> None:
    """Refuse settings of transformers models that leave the graph or the guarantee."""
    config = getattr(model, "config", None)
    refused = {
        "_attn_implementation": ("flex_attention", "it builds its masks outside the graph", "sdpa")
    }
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        reason = "its loop over experts leaves the graph"
        refused["_experts_implementation"] = ("eager", reason, "grouped_mm")
    for name, (value, reason, instead) in refused.items():
        if getattr(config, name, None) == value:
            raise UnsafeSetting(
                setting=name.removeprefix("_"),
                value=value,
                reason=reason,
                accepted=[instead],
                todo=f'load the model with {name.removeprefix("_")}="{instead}"',
            )
    devices = {p.device.type for p in model.parameters()}
    if (why := _wants_our_attention(config, devices)) is not None:
        _warn_once(
            f"of the attention of {type(model).__name__}, {why}; "
            "call bicompile.use_attention(model) before it is compiled (docs/attention.md)"
        )


def _wants_our_attention(config: Any, devices: set[str]) -> str | None:
    """What padding changes, or what is slow, if `use_attention` is not called."""
    implementation = getattr(config, "_attn_implementation", None)
    if implementation == "eager":
        return 'padding may change bits of a row with attn_implementation="eager"'
    if implementation != "sdpa" or "cuda" not in devices:
        return None
    if getattr(config, "relative_attention_num_buckets", None):
        return "on a GPU, padding on the left changes bits of a row where a bias is added"
    kinds = getattr(config, "layer_types", None) or []
    windows = any(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    if windows or (not kinds and getattr(config, "sliding_window", None) is not None):
        return "on a GPU, queries beyond a window are slow: they are computed one by one"
    return None


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _warn_of_positions(kwargs: Mapping[str, Any]) -> None:
    """A left-padded row without positions is computed at other positions than the row alone."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None or not isinstance(mask, torch.Tensor):
        return
    if mask.dim() == 2 and mask.device.type == "cpu" and bool((mask[:, :1] == 0).any()):
        _warn_once(
            "a left-padded attention_mask came without position_ids: the model counts positions "
            "from the padding, so the padded row is another row than the unpadded one; pass "
            "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)"
        )
