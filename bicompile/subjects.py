"""Programs to be explained, by name: a hub id, a folder or ``module:function``, without weights.

Models are built on the device "meta" from their configuration alone: their size does not matter.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bicompile import models
from bicompile.errors import ProgramNotFound


@dataclass(frozen=True)
class Subject:
    """A program and what it is called with."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def load(
    name: str | None, *, dtype: torch.dtype | None = None, batch: int = 2, length: int = 16
) -> Subject:
    """Find a program by its name; nothing of its weights is read or allocated.

    Args:
        name: a hub id or a folder with a transformers configuration, ``module:function``, or None
            for the small built-in model.
        dtype: of the weights; None is what the configuration says.
        batch: rows of the inputs of a transformers model.
        length: tokens of a row.

    Raises:
        ProgramNotFound: the name leads nowhere, or transformers is not installed.
        NetworkUnavailable: the built-in model could not be fetched.

    Example:
        >>> load("no.such.module:function")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ProgramNotFound: cannot explain no.such.module:function
    """
    if name is not None and ":" in name and not Path(name).exists():
        return _from_function(name)
    source = name or _built_in()
    with torch.device("meta"):
        return _from_config(source, dtype, batch, length)


def _built_in() -> str:
    return str(models.unpack(models.fetch()))


def _from_function(name: str) -> Subject:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        todo = "check the name; modules are also looked for in the current folder"
        raise ProgramNotFound(name=name, reason=error, todo=todo) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    with torch.device("meta"):
        made = function()
    if not isinstance(made, tuple) or not 1 < len(made) < 4 or not callable(made[0]):
        where = f"{inspect.getsourcefile(function)}:{function.__code__.co_firstlineno}"
        reason = f"it returned {type(made).__name__}"
        todo = "return the model, a tuple of arguments and a dict of named arguments"
        raise ProgramNotFound(name=name, reason=reason, todo=todo, line=where)
    args, kwargs = made[1], made[2] if len(made) > 2 else {}
    return Subject(made[0], tuple(args), dict(kwargs))


def _from_config(name: str, dtype: torch.dtype | None, batch: int, length: int) -> Subject:
    todo = "check the name; a hub id needs a network connection or a filled cache"
    try:
        import transformers
    except ImportError as error:
        todo = 'run: pip install "bicompile[demo]"'
        raise ProgramNotFound(name=name, reason=error, todo=todo) from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        named = (getattr(config, "architectures", None) or [""])[0]
        make = getattr(transformers, named, None) or transformers.AutoModelForCausalLM.from_config
        with _default_dtype(dtype or getattr(config, "dtype", None) or torch.float32):
            model = make(config).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProgramNotFound(name=name, reason=reason, todo=todo) from error
    kwargs: dict[str, Any] = {model.main_input_name: _input(model, batch, length)}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = kwargs[model.main_input_name]
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False
    return Subject(model, (), kwargs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _input(model: Any, batch: int, length: int) -> torch.Tensor:
    """Token ids, or pixels for a model of images."""
    if model.main_input_name != "pixel_values":
        return torch.zeros(batch, length, dtype=torch.long)
    size = model.config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.zeros(batch, model.config.num_channels, height, width, dtype=model.dtype)
