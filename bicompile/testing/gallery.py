"""Twelve pieces of PyTorch, each searched for a row whose bits change.

``python -m bicompile.testing.gallery`` searches them under the default backends and ours, each for
at most a minute; its options stand in docs/testing.md.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from bicompile.testing.bits import InvarianceViolation
from bicompile.testing.kernels import num_threads
from bicompile.testing.search import assert_batch_invariant
from bicompile.testing.subject import BACKENDS

HEADER = """# Where PyTorch's rows change

Written by `python -m bicompile.testing.gallery` from `gallery.json`; a test compares the two.

Each piece is searched as [testing.md](testing.md) says, with the properties that apply to it, under
plain PyTorch, under default `torch.compile` and under bicompile. A search ends with the first
property that breaks, shrunk to its smallest case, or when all hold or its time is over.

"""
NONE = "none found"


@dataclass(frozen=True)
class Piece:
    """What is searched.

    Args:
        make: builds the function or module; after `torch.manual_seed(0)`.
        inputs: makes its keyword arguments for a batch size, and a `length` of texts.
        options: more arguments of `assert_batch_invariant`.
    """

    make: Callable[[], Callable[..., Any]]
    inputs: Callable[..., Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        piece: its name.
        backend: under which it ran.
        seconds: how long it was searched, with compiling and shrinking.
        property: that broke; "" if none did.
        example: the smallest case, as `assert_batch_invariant` takes it.
        difference: how many elements differ, the first, and both bit patterns.
    """

    piece: str
    backend: str
    seconds: float
    property: str = ""
    example: Mapping[str, Any] = field(default_factory=dict)
    difference: str = ""


def _rows(*shape: int, **options: Any) -> Callable[[int], dict[str, Any]]:
    return lambda batch_size: {"input": torch.randn(batch_size, *shape, **options)}


def _attend(
    query: torch.Tensor, position: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Queries [T, H, D] at some positions of a text; a row alone is a step of decoding."""
    visible = torch.arange(key.shape[1], device=key.device) <= position[:, None]
    heads = query.transpose(0, 1)[None]
    found = F.scaled_dot_product_attention(heads, key[None], value[None], visible)
    return found[0].transpose(0, 1)


def _outputs(module: nn.Module) -> Callable[..., Any]:
    """The first result of a module: its state has the batch elsewhere."""
    return lambda input: module(input)[0]


def _queries(batch_size: int) -> dict[str, Any]:
    key, value = torch.randn(2, 2, 80, 32)
    position = 33 + torch.arange(batch_size)
    return {
        "query": torch.randn(batch_size, 2, 32), "position": position, "key": key, "value": value
    }  # fmt: skip


def _llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


def _tokens(batch_size: int, length: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 97, (batch_size, length))}


_TEXTS = {"max_batch_size": 5, "max_length": 40}
PIECES: Mapping[str, Piece] = {
    "Linear": Piece(lambda: nn.Linear(256, 256), _rows(256)),
    "feed-forward": Piece(
        lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), _rows(64)
    ),
    "softmax": Piece(lambda: nn.Softmax(-1), _rows(1000)),
    "RMSNorm": Piece(lambda: nn.Sequential(nn.RMSNorm(576)), _rows(576)),
    "mean over tokens": Piece(lambda: lambda input: input.mean(1), _rows(33, 20)),
    "sum": Piece(lambda: lambda input: input.sum(-1), _rows(1000)),
    "logsumexp": Piece(lambda: lambda input: input.logsumexp(-1), _rows(1000)),
    "GELU": Piece(lambda: F.gelu, _rows(7)),
    "Conv1d": Piece(lambda: nn.Conv1d(16, 8, 3), _rows(16, 50)),
    "LSTM": Piece(lambda: _outputs(nn.LSTM(16, 16, batch_first=True)), _rows(5, 16)),
    "attention: decoding against a prompt": Piece(
        lambda: _attend, _queries, {"axes": {"key": None, "value": None}}
    ),
    "Llama: padding": Piece(_llama, _tokens, {**_TEXTS, "properties": ["padding"]}),
}
"""Name -> what is searched; sizes are those at which kernels change their ways."""


def search(name: str, backend: str, seconds: float) -> Found:
    """Search a piece under a backend until something is found, or for so long."""
    piece = PIECES[name]
    torch.manual_seed(0)
    torch.compiler.reset()
    start = time.perf_counter()
    problem: InvarianceViolation | None = None
    with num_threads(2):
        try:
            assert_batch_invariant(
                piece.make(), piece.inputs, backend=backend, max_seconds=seconds, **piece.options
            )
        except InvarianceViolation as violation:
            problem = violation
    took = round(time.perf_counter() - start, 1)
    if problem is None:
        return Found(name, backend, took)
    example = dict(problem.example or {})
    difference = str(problem).splitlines()[1].strip()
    return Found(name, backend, took, example.pop("property"), example, difference)


def _cells(found: Found) -> list[str]:
    """The cells of a table; of a difference, the elements that differ and the first of them."""
    case = ", ".join(f"{name} {value}" for name, value in found.example.items())
    difference = found.difference.partition(": ")[2]
    return [found.property or NONE, case, difference, f"{found.seconds:.1f}"]


HEADS = ("piece", "property that broke", "smallest case", "difference", "seconds")


def table(backend: str, found: Sequence[Found]) -> Table:
    """What was found under a backend."""
    broken = sum(bool(f.property) for f in found)
    shown = Table(*HEADS, title=f"{backend}: {broken} of {len(found)} break", show_lines=True)
    for one in found:
        shown.add_row(one.piece, *_cells(one), style=None if one.property else "dim")
    return shown


def render(record: Mapping[str, Any]) -> str:
    """The page."""
    text = HEADER + "{device}, torch {torch}, {threads} threads.\n".format_map(record)
    found = [Found(**one) for one in record["found"]]
    for backend in dict.fromkeys(f.backend for f in found):
        own = [f for f in found if f.backend == backend]
        broken = sum(bool(f.property) for f in own)
        text += f"\n## {backend}: {broken} of {len(own)} break\n\n| {' | '.join(HEADS)} |\n"
        text += "|---" * len(HEADS) + "|\n"
        text += "".join(f"| {' | '.join([f.piece, *_cells(f)])} |\n" for f in own)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Search; 1 if something was found under our backend."""
    parser = argparse.ArgumentParser(prog="python -m bicompile.testing.gallery")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES), metavar="PIECE")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each search (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write it as a page")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    console = Console(highlight=False)
    found: list[Found] = []
    for backend in args.backend:
        own = []
        for name in args.only:
            console.print(f"[dim]{backend}: {name}[/dim]")
            own.append(search(name, backend, args.seconds))
        console.print(table(backend, own))
        found += own
    record = {
        "torch": torch.__version__,
        "device": f"a CPU with {torch.backends.cpu.get_cpu_capability()}",
        "threads": 2,
        "found": [asdict(f) for f in found],
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if args.page:
        args.page.write_text(render(record))
    return int(any(f.property for f in found if f.backend == "batch_invariant"))


if __name__ == "__main__":
    raise SystemExit(main())
