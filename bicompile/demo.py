"""Ask a real model one question at several batch sizes and count its different answers."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bicompile.answers import QUESTION, TITLES, Answer, Result, as_json, digests, show
from bicompile.errors import UnsafeSetting

if TYPE_CHECKING:
    import torch

SYSTEM = "You are a helpful assistant."
OTHERS = (
    "Explain how a bicycle stays upright while it moves.",
    "Give me a recipe for pancakes with oat milk, blueberries and maple syrup.",
    "Hi!",
    "List three uses of baking soda in the kitchen and one in the garden, each in a single short "
    "sentence.",
    "What is the capital of Peru?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle, and end it "
    "with a question that the keeper asks the sea.",
    "Why is the sky blue?",
    "Translate 'good morning' into French, Italian and Welsh.",
)
_LARGEST_MIXED_BATCH = 256


@dataclass(frozen=True)
class Batch:
    """Prompts that are answered together; `asked` are the rows that hold the question."""

    prompts: tuple[str, ...]
    asked: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="instead of SmolLM2-135M-Instruct")
    add("--batch-sizes", type=_sizes, default=(1, 2, 3, 5, 8), metavar="1,2,3,5,8")
    add("--prompts", type=Path, metavar="FILE", help="the other prompts, one per line")
    add("--max-new-tokens", type=_positive, default=60, metavar="60")
    add("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--compare", choices=("inductor",), help="run default torch.compile as well")
    add(
        "--completions",
        type=_positive,
        metavar="N",
        help=f"also N completions of the question in random batches of 1 to {_LARGEST_MIXED_BATCH}",
    )
    add("--json", type=Path, metavar="FILE", help="write everything that was seen")


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit status is 0 only if bicompile gave one answer, of the same bits."""
    import torch

    from bicompile import models
    from bicompile.machine import check_device, machine, title

    check_device(args.device)
    console, progress_console = Console(), Console(file=sys.stderr)
    others = _read_prompts(args.prompts)
    batches = make_batches(others, args.batch_sizes)
    mixed = mixed_batches(others, args.completions or 0)
    found = machine(args.device)
    console.print(f"[dim]{escape(title(found))}[/]")
    dtype = getattr(torch, args.dtype)
    loaded = models.load(args.model, dtype=dtype, device=args.device, console=progress_console)
    asker = Asker(*loaded, args.max_new_tokens, batches + mixed, progress_console)
    systems = ["eager", *([args.compare] if args.compare else []), "bicompile"]
    results = [asker.run(system, batches, mixed) for system in systems]
    show(console, results, args)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, tuple))}
        report = {"machine": found, "settings": settings, "question": QUESTION}
        seen = {"systems": [as_json(r) for r in results]}
        args.json.write_text(json.dumps(report | seen, indent=1) + "\n")
    ours = results[-1]
    one = ours.unique == 1 and ours.unique_completions <= 1
    return 0 if one and ours.other_bits[0] == 0 else 1


def make_batches(others: Sequence[str], sizes: Sequence[int]) -> list[Batch]:
    """Put the question among the other prompts, at another position in each batch."""
    batches = []
    for size in sizes:
        position = 5 * size // 8
        rows = [others[i % len(others)] for i in range(size - 1)]
        rows.insert(position, QUESTION)
        batches.append(Batch(tuple(rows), (position,)))
    return batches


def mixed_batches(others: Sequence[str], completions: int, seed: int = 0) -> list[Batch]:
    """Draw batches of random size and order in which most rows hold the question."""
    rng = random.Random(seed)
    batches = []
    while completions > 0:
        size = rng.randint(1, _LARGEST_MIXED_BATCH)
        asked = min(completions, size - rng.randint(0, size // 2))
        rows = [QUESTION] * asked + rng.choices(others, k=size - asked)
        rng.shuffle(rows)
        places = tuple(i for i, row in enumerate(rows) if row == QUESTION)
        batches.append(Batch(tuple(rows), places))
        completions -= asked
    return batches


class Asker:
    """Answers batches greedily with one model, as it is or compiled."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int,
        batches: Sequence[Batch],
        console: Console,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.console = console
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        longest = max(len(self._encode(b.prompts).input_ids[0]) for b in batches)
        # One length for all batches: one shape less that varies.
        self.cache_slots = -(-(longest + max_new_tokens) // 64) * 64

    def run(self, system: str, batches: Sequence[Batch], mixed: Sequence[Batch]) -> Result:
        """Answer all batches with one system."""
        result = Result(system)
        start = time.perf_counter()
        with self._compiled(system), _live(self.console) as say:
            for batch in batches:
                result.answers += self._ask(batch, result, say)
            for batch in mixed:
                result.completions += self._ask(batch, result, say)
        result.seconds = time.perf_counter() - start
        return result

    @contextmanager
    def _compiled(self, system: str) -> Iterator[None]:
        """Compile the model's forward in place for a while."""
        import torch

        import bicompile

        if system == "inductor":
            self.model.forward = torch.compile(self.model.forward)
        elif system == "bicompile":
            self.model = bicompile.compile(self.model)
        try:
            yield
        finally:
            vars(self.model).pop("forward", None)
            torch.compiler.reset()

    def _encode(self, prompts: Sequence[str]) -> Any:
        if self.tokenizer.chat_template:
            prompts = [self._as_chat(p) for p in prompts]
        return self.tokenizer(
            list(prompts),
            padding=True,
            return_tensors="pt",
            add_special_tokens=not self.tokenizer.chat_template,
        )

    def _as_chat(self, prompt: str) -> str:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        render = partial(
            self.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False
        )
        try:
            return str(render(messages))
        except jinja2.TemplateError:  # some models know no system message
            return str(render(messages[1:]))

    def _ask(self, batch: Batch, result: Result, say: Any) -> list[Answer]:
        import torch
        import transformers

        size = len(batch.prompts)
        inputs = self._encode(batch.prompts).to(self.model.device)
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=self.cache_slots)
        label = f"{TITLES[result.system]}, batch of {size}"
        times: list[float] = []

        def tick(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            say(f"{label}: token {len(times)} of {self.max_new_tokens}")
            return torch.zeros(size, dtype=torch.bool, device=input_ids.device)

        say(f"{label}: first token" + ("" if result.system == "eager" else ", compiling"))
        start = time.perf_counter()
        with torch.no_grad():
            # disable_compile keeps transformers from compiling what is compiled here.
            output = self.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                cache=cache,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=transformers.StoppingCriteriaList([tick]),
                disable_compile=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
        seconds = time.perf_counter() - start
        self.console.print(f"[dim]{label}: {len(times)} tokens in {seconds:.1f} s[/]")
        steps = [b - a for a, b in itertools.pairwise(times)]
        if steps:
            # The median leaves out the step that compiled.
            result.decode_seconds += statistics.median(steps) * len(steps)
            result.decoded += size * len(steps)
        new = output.sequences[:, inputs.input_ids.shape[1] :].tolist()
        logits = digests(output.logits, batch.asked)
        return [
            self._answer(size, row, new[row], names)
            for row, names in zip(batch.asked, logits, strict=True)
        ]

    def _answer(self, size: int, position: int, tokens: list[int], logits: list[str]) -> Answer:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        end = next((i + 1 for i, t in enumerate(tokens) if t in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Answer(size, position, tokens[:end], text, logits[:end])


@contextmanager
def _live(console: Console) -> Iterator[Any]:
    """One line that lives while a system works: what it does, the graphs so far, the seconds."""
    from bicompile.report import REPORTS

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    before = len(REPORTS)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")

        def say(text: str) -> None:
            graphs = len(REPORTS) - before
            compiled = f" ({graphs} graphs compiled)" if graphs else ""
            progress.update(task, description=text + compiled)

        yield say


def _read_prompts(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return OTHERS
    reason = "the file holds no prompt"
    try:
        lines = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    except OSError as error:
        lines, reason = (), error.strerror or str(error)
    if not lines:
        raise UnsafeSetting(
            setting="--prompts",
            value=str(file),
            reason=reason,
            accepted=["a text file with one prompt per line"],
            todo="correct the path or the file",
        )
    return lines


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(part.strip()) for part in text.split(","))
