"""bicompile: a torch.compile backend that gives each row the same bits, whatever else is there.

Public names: the backend ``"batch_invariant"`` of torch.compile, `compile`, `explain`, `compare`,
`bisect`, `register_op`, `use_attention`, `errors` and `independence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "bisect",
    "compare",
    "compile",
    "errors",
    "explain",
    "independence",
    "register_op",
    "use_attention",
]

if TYPE_CHECKING:
    from bicompile import errors, independence
    from bicompile.api import compile
    from bicompile.attention_interface import use_attention
    from bicompile.bisector import bisect
    from bicompile.comparison import compare
    from bicompile.explainer import explain
    from bicompile.registry import register_op

_HOMES = {
    "compile": "api",
    "explain": "explainer",
    "compare": "comparison",
    "bisect": "bisector",
    "register_op": "registry",
    "use_attention": "attention_interface",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing the package costs nothing."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"bicompile.{_HOMES[name]}"), name)
    if name in ("errors", "independence"):
        return importlib.import_module(f"bicompile.{name}")
    raise AttributeError(f"module 'bicompile' has no attribute {name!r}")
