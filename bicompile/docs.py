"""Writes docs/ops.md from the registry: ``python -m bicompile.docs``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bicompile import registry
from bicompile.passes.audit import ALLOWED, EXACT_FOR_INTEGERS, RANDOM
from bicompile.passes.rules import OVER_THE_BATCH, RULES

HEADER = """# Ops

Written by `python -m bicompile.docs`; a test compares it with the registry.

## Ops with a kernel of ours
Each has a C++ kernel for the CPU and a Triton kernel for NVIDIA GPUs, in float32, bfloat16 and
float16. The order of summation is part of the promise.

| family | op | takes the place of | axes | order |
|---|---|---|---|---|
"""

ALLOW = 'deterministic only with `options={{"{}": "allow"}}`'
FUSED = "several ops, joined by the pass `fuse`"


def render() -> str:
    """The text of docs/ops.md."""
    kernels = registry.load_all()
    places: dict[str, list[str]] = defaultdict(list)
    for target, rule in RULES.items():
        if target not in OVER_THE_BATCH:
            places[rule.kernel.name].append(f"`{target}`")
    places["sdpa"].append("`aten.scaled_dot_product_attention` in every form")
    rows = [
        f"| {k.family} | `{k.name}` | {', '.join(places[k.name]) or FUSED} "
        f"| `{k.contract.cases[0].signature}` | {k.order} |"
        for k in sorted(kernels.values(), key=lambda k: (k.family, k.name))
    ]
    text = HEADER + "\n".join(rows)
    text += "\n\n## Ops that need none\nInvariant by their nature; compiled by Inductor or moved.\n"
    for kind, (reason, names) in ALLOWED.items():
        text += f"\n- **{kind}**: {reason}. {_names(names)}\n"
    text += f"- **integers**: exact in every order. {_names(EXACT_FOR_INTEGERS)}\n"
    text += "\n## Refused\nEverything else, with the user's line in the error.\n"
    text += f"\n- **random ops**, {ALLOW.format('random')}: {_names(RANDOM)}\n"
    text += f"- **statistics over the batch**, {ALLOW.format('batch_statistics')}: "
    return text + f"{_names(map(str, OVER_THE_BATCH))}\n"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in sorted(names))


def main() -> None:
    """Write the file."""
    path = Path(__file__).parent.parent / "docs" / "ops.md"
    path.write_text(render())


if __name__ == "__main__":
    main()
