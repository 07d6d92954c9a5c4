"""The page of a search, such as docs/soak.md, from what `bicompile soak --json` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bicompile.soak.subjects import MODELS

HEADER = """# What soak searched

Written by `bicompile soak --page` from `{file}`; a test compares the two. What is searched, and
how, stands in [testing.md](testing.md).

"""


def render(summary: Mapping[str, Any], file: str) -> str:
    """The page of a summary of `State`, which a file of that name holds."""
    identity, rates = summary["identity"], summary["cases a second of one process"]
    differences = Counter(failure["subject"] for failure in summary["failures"])
    minutes = summary["seconds"] / 60
    text = (
        f"{HEADER.format(file=file)}{summary['cases']:,} cases in {minutes:.0f} minutes of work, "
        f"{differences.total() or 'no'} differences; {identity['device']}, torch "
        f"{identity['torch']}, sources {identity['sources']}.\n\n"
        "| subject | cases | a second | differences |\n|---|---|---|---|\n"
    )
    for name, laws in summary["subjects"].items():
        text += f"| {name} | {sum(laws.values())} | {rates[name]} | {differences[name]} |\n"
    if missing := [name for name in MODELS if name not in summary["subjects"]]:
        text += f"\nNot searched in this run: {', '.join(missing)}.\n"
    return text
