"""The answers of the demo: which differ, from where on, and how that is shown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import torch

QUESTION = "Tell me about Richard Feynman"
TITLES = {
    "eager": "plain PyTorch",
    "inductor": "torch.compile",
    "bicompile": "bicompile",
}
_WORDS_SHOWN = 8


@dataclass
class Answer:
    """What the question's row got in one batch."""

    batch_size: int
    position: int
    tokens: list[int]
    text: str
    #: Digest of the logits behind each token.
    logits: list[str] = field(default_factory=list)


@dataclass
class Result:
    """What one system did over all batches."""

    system: str
    answers: list[Answer] = field(default_factory=list)
    completions: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    decoded: int = 0
    decode_seconds: float = 0.0

    @property
    def unique(self) -> int:
        """Number of different answers over the batch sizes."""
        return len({tuple(a.tokens) for a in self.answers})

    @property
    def unique_completions(self) -> int:
        """Number of different answers over all completions."""
        return len({tuple(a.tokens) for a in self.completions})

    @property
    def first_difference(self) -> int | None:
        """The first token, counted from 1, at which any two answers differ."""
        rows = [a.tokens for a in self.answers + self.completions]
        first = rows[0] if rows else []
        differs = [_common(first, row) for row in rows if row != first]
        return min(differs) + 1 if differs else None

    @property
    def other_bits(self) -> tuple[int, int]:
        """Steps whose logits differ in any bit from the first answer's, and steps compared.

        Two answers are compared as long as their tokens so far agree.
        """
        first, *others = self.answers + self.completions
        differing = compared = 0
        for other in others:
            steps = min(_common(first.tokens, other.tokens) + 1, len(first.tokens))
            pairs = list(zip(first.logits[:steps], other.logits, strict=False))
            differing += sum(a != b for a, b in pairs)
            compared += len(pairs)
        return differing, compared

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding over all rows, without compilation."""
        return self.decoded / self.decode_seconds if self.decode_seconds else float("nan")


def digests(steps: Sequence[torch.Tensor], rows: Sequence[int]) -> list[list[str]]:
    """Short names for the bits behind each token of some rows; a step: logits [B, vocabulary].

    Multilinear hashing modulo 2 ** 64, on the device of the logits, as 256 rows of 60 tokens are
    3 GB; the factors are random, so two patterns share a name with a probability of 2 ** -32.
    """
    import torch

    from bicompile.testing import bits

    size, device = steps[0].shape[-1], steps[0].device
    generator = torch.Generator().manual_seed(0)
    bounds = -(1 << 63), (1 << 63) - 1
    factors = torch.randint(*bounds, (size,), generator=generator).to(device)
    hashed = [(bits(step[list(rows)]).long() * factors).sum(-1) for step in steps]
    return [[f"{n & (1 << 64) - 1:016x}" for n in row] for row in torch.stack(hashed, 1).tolist()]


def as_json(result: Result) -> dict[str, Any]:
    """A result and what follows from it."""
    return asdict(result) | {
        "unique": result.unique,
        "unique_completions": result.unique_completions,
        "other_bits": result.other_bits,
        "first_difference": result.first_difference,
        "tokens_per_second": result.tokens_per_second,
    }


def show(console: Console, results: Sequence[Result], args: argparse.Namespace) -> None:
    """Print the table of all systems, and the answers where they part."""
    sizes = ", ".join(map(str, args.batch_sizes))
    table = Table(
        title=f'"{QUESTION}"\ngreedy, {args.dtype}, {args.max_new_tokens} tokens, '
        f"among 0 to {max(args.batch_sizes) - 1} other prompts",
    )
    table.add_column("system")
    counted = ["answers", *(["completions"] if args.completions else [])]
    for name in (*counted, "parts", "other bits", "tokens/s", "seconds"):
        table.add_column(name, justify="right")
    for r in results:
        counts = [r.unique, *([r.unique_completions] if args.completions else [])]
        shown = [f"[bold {'green' if n == 1 else 'red'}]{n}[/]" for n in counts]
        differing, compared = r.other_bits
        shown += [str(r.first_difference or "-"), f"{differing} of {compared}"]
        shown += [f"{r.tokens_per_second:.1f}", f"{r.seconds:.1f}"]
        table.add_row(TITLES[r.system], *shown)
    console.print(table)
    console.print(f"[dim]answers: different ones at batch sizes {sizes}; parts: first token that")
    console.print(
        "[dim]differs; other bits: tokens whose logits are not bit for bit those of batch"
    )
    console.print(f"[dim]{args.batch_sizes[0]}; tokens/s: decoding, all rows; seconds: all,")
    console.print("[dim]compilation included")
    for r in results:
        console.print(f"[bold]{TITLES[r.system]}[/]")
        for line in part_lines(r.answers):
            console.print("  " + line)


def part_lines(answers: Sequence[Answer]) -> list[str]:
    """One line per different answer; the word at which it leaves the others stands out."""
    groups: dict[tuple[int, ...], list[Answer]] = {}
    for answer in answers:
        groups.setdefault(tuple(answer.tokens), []).append(answer)
    if len(groups) == 1:
        return [f"at every batch size: {escape(answers[0].text.strip())}"]
    texts = [group[0].text.strip().split(" ") for group in groups.values()]
    lines = []
    for words, group in zip(texts, groups.values(), strict=True):
        same = max(_common(words, other) for other in texts if other is not words)
        at = ", ".join(str(a.batch_size) for a in group)
        before = escape(" ".join(words[max(0, same - _WORDS_SHOWN) : same]))
        word = escape(" ".join(words[same : same + 1])) or "(end)"
        after = escape(" ".join(words[same + 1 : same + 1 + _WORDS_SHOWN]))
        lines.append(f"batch {at}: [dim]... {before}[/] [bold red]{word}[/] {after} ...")
    return [line.replace("\n", " ") for line in lines]


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
