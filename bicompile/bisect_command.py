"""Name the first operation of a real model at which a row's bits depend on its batch."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from bicompile.answers import QUESTION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    programs = ("eager", "inductor", "bicompile")
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="instead of SmolLM2-135M-Instruct")
    add("--program", choices=programs, default="inductor", help="what runs the model")
    add("--other-program", choices=programs, help="what runs it the other time (default: the same)")
    add("--batch-sizes", type=_pair, default=(1, 5), metavar="1,5", help="of the two runs")
    add("--padding", type=int, default=0, metavar="0", help="left padding of the other run")
    add("--tokens", type=int, default=1, metavar="1", help="greedy tokens until a difference")
    add("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--prompt", default=QUESTION, help="of the row that is followed")


def run(args: argparse.Namespace) -> int:
    """Run the search; the exit status is 0 if no bit differs, 1 if one does."""
    import torch

    from bicompile import bisector, models
    from bicompile.machine import check_device, machine, title

    check_device(args.device)
    console, progress_console = Console(), Console(file=sys.stderr)
    console.print(f"[dim]{escape(title(machine(args.device)))}[/]")
    model, tokenizer = models.load(
        args.model,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        console=progress_console,
    )
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(args.device)
    first, other = (_batch(ids, size, model.config.vocab_size) for size in args.batch_sizes)
    found = bisector.bisect(
        logits_of(model),
        _inputs(first, 0),
        _inputs(other, args.padding),
        row=len(first) - 1,
        other_row=len(other) - 1,
        program=args.program,
        other_program=args.other_program,
        steps=args.tokens,
        advance=_next_token,
    )
    console.print(escape(str(found or "no bit differs")), soft_wrap=True)
    return 0 if found is None else 1


def logits_of(model: Any) -> Any:
    """The model as a module from ids, mask and positions to logits, without a cache."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, positions: Any) -> Any:
            return self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits

    return Logits().eval()


def _batch(ids: Any, size: int, vocabulary: int) -> Any:
    """The prompt as the last row behind rows of random tokens."""
    import torch

    rng = torch.Generator().manual_seed(size)
    others = torch.randint(0, vocabulary, (size - 1, ids.shape[1]), generator=rng)
    return torch.cat([others.to(ids.device), ids])


def _inputs(ids: Any, padding: int) -> tuple[Any, Any, Any]:
    import torch

    ids = torch.nn.functional.pad(ids, (padding, 0))
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _next_token(inputs: Any, logits: Any) -> tuple[Any, Any, Any]:
    import torch

    ids, mask, positions = inputs
    new = logits[:, -1].argmax(-1, keepdim=True)
    ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids, mask, torch.cat([positions, positions[:, -1:] + 1], 1)


def _pair(text: str) -> tuple[int, int]:
    sizes = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(sizes) != 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not two batch sizes")
    return sizes[0], sizes[1]
