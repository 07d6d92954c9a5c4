"""Tiny random models of every kind that users bring, built from configurations alone."""

from __future__ import annotations

from bicompile.coverage.zoo import modules, signals, text
from bicompile.coverage.zoo.entry import Entry

__all__ = ["ZOO", "Entry"]

ZOO: dict[str, Entry] = {**text.ZOO, **signals.ZOO, **modules.ZOO}
"""All models by name."""
