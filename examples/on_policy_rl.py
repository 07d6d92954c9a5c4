# %% [markdown]
"""Reinforcement learning that is truly on-policy: sampler and trainer agree bit by bit.

A small language model learns sums by GRPO: it answers each problem several times, and answers that
are better than the others of their problem become more likely.  The answers are sampled token by
token from a cache, in batches of mixed sizes, padded on the left; the trainer sees them whole, in
batches of another size, padded on the right, with gradients.  At every step each sampled token's
log-probability is compared with what the trainer finds for it.  With default torch.compile they
differ, so that the trainer corrects another policy than the one that was sampled; with bicompile
they are the same numbers, and the KL divergence between the two is exactly 0.

    python examples/on_policy_rl.py --steps 50 --device cuda --checkpoint rl --output rl

A run that was killed goes on from its last checkpoint, with the bits of an unbroken run.
"""

# %%
from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

import bicompile
from bicompile import models
from bicompile.machine import check_device, machine, title
from bicompile.testing import bits

SAMPLED_TOGETHER = (3, 16, 5, 24)  # rows of the sampler's batches, in turn
TRAINED_TOGETHER = 8  # rows of a batch of the trainer
NEW_TOKENS = 6
LARGEST = 20  # number in a problem
EXAMPLES = "2 + 3 = 5\n7 + 1 = 8\n6 + 9 = 15\n"
WINDOW = 10  # steps whose mean reward is shown, at the beginning and at the end


# %% Problems, and what an answer is worth.
@dataclass(frozen=True)
class Problem:
    """A sum."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        """What the model goes on from, up to the end of the line."""
        return f"{EXAMPLES}{self.a} + {self.b} ="

    def reward(self, answer: str) -> float:
        """1 for the right sum, 0.1 for what begins as a number."""
        if answer.strip() == str(self.a + self.b):
            return 1.0
        return 0.1 if answer.strip()[:1].isdigit() else 0.0


@dataclass
class Sample:
    """An answer: its tokens, how likely the sampler found them, and what it is worth."""

    prompt: list[int]
    tokens: list[int]
    log_probabilities: torch.Tensor
    reward: float = 0.0
    advantage: float = 0.0


def give_advantages(samples: Sequence[Sample], group: int) -> None:
    """GRPO: how much better an answer is than the other answers to its problem."""
    for rows in cut(samples, [group]):
        rewards = [s.reward for s in rows]
        spread = statistics.pstdev(rewards)
        for sample in rows:
            sample.advantage = (sample.reward - statistics.fmean(rewards)) / (spread + 1e-4)


def cut(rows: Sequence, sizes: Iterable[int]) -> Iterator[Sequence]:
    """Pieces of these sizes, again and again."""
    for size in itertools.cycle(sizes):
        if not rows:
            return
        yield rows[:size]
        rows = rows[size:]


# %% The policy: one model that is sampled and trained.
def chosen(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens, [B, T]."""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


class Policy:
    """A model whose one compiled forward is used by sampler and trainer.

    Weights are kept in float32 for the optimizer, and rounded to the model's dtype for both.
    """

    def __init__(self, model, tokenizer, backend: str, learning_rate: float) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        if backend == "bicompile":
            bicompile.compile(model, dynamic=True)
            self.chosen = bicompile.compile(chosen, dynamic=True)
        else:
            model.forward = torch.compile(model.forward, dynamic=True)
            self.chosen = torch.compile(chosen, dynamic=True)
        name = "batch_invariant" if backend == "bicompile" else backend
        self.clip = torch.compile(torch.nn.utils.clip_grad_norm_, backend=name)
        self.parameters = list(model.parameters())
        self.weights = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=0.0)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        line_end = tokenizer("\n", add_special_tokens=False).input_ids[-1]
        self.ends = [*(ends if isinstance(ends, list) else [ends]), line_end]
        longest = len(tokenizer(Problem(LARGEST, LARGEST).prompt).input_ids)
        self.slots = -(-(longest + NEW_TOKENS) // 64) * 64

    @torch.no_grad()
    def sample(self, problems: Sequence[Problem]) -> list[Sample]:
        """One answer for each problem, decoded from a cache in batches of mixed sizes."""
        settings = transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=1.0,  # the distribution itself, nothing cut off
            top_k=0,
            top_p=1.0,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        samples = []
        for rows in cut(problems, SAMPLED_TOGETHER):
            prompts = [p.prompt for p in rows]
            inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.device)
            output = self.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                generation_config=settings,
                cache=transformers.StaticCache(self.model.config, max_cache_len=self.slots),
                disable_compile=True,  # it is compiled already
                output_logits=True,
                return_dict_in_generate=True,
            )
            new = output.sequences[:, inputs.input_ids.shape[1] :]
            found = self.chosen(torch.stack(output.logits, 1), new).cpu()
            for row, problem in enumerate(rows):
                prompt = inputs.input_ids[row][inputs.attention_mask[row].bool()].tolist()
                tokens = new[row].tolist()
                end = next((i + 1 for i, t in enumerate(tokens) if t in self.ends), len(tokens))
                text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
                reward = problem.reward(text)
                samples.append(Sample(prompt, tokens[:end], found[row, :end], reward))
        return samples

    def train(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """One step of the optimizer; returns the log-probabilities that the trainer found."""
        total = sum(len(s.tokens) for s in samples)
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        found = []
        for rows in cut(samples, [TRAINED_TOGETHER]):
            ids, mask, places = self._padded(rows)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            log_probabilities = self.chosen(logits[:, :-1], ids[:, 1:])
            advantages = torch.zeros_like(log_probabilities)
            for row, sample in enumerate(rows):
                advantages[row, places[row]] = sample.advantage
            (-(advantages * log_probabilities).sum() / total).backward()
            for weight, parameter in zip(self.weights, self.parameters, strict=True):
                weight.grad += parameter.grad
                parameter.grad = None
            both = zip(log_probabilities.detach().cpu(), places, strict=True)
            found += [row[place] for row, place in both]
        with torch.no_grad():
            self.clip(self.weights, 1.0)
            self.optimizer.step()
            self.round()
        return found

    def _padded(self, rows: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
        """Token ids and mask [B, T], and where each row's answer is predicted."""
        whole = [torch.tensor(s.prompt + s.tokens) for s in rows]
        pad = functools.partial(pad_sequence, batch_first=True)
        ids = pad(whole, padding_value=self.tokenizer.pad_token_id)
        mask = pad([torch.ones_like(t) for t in whole])
        places = [slice(len(s.prompt) - 1, len(t) - 1) for s, t in zip(rows, whole, strict=True)]
        return ids.to(self.device), mask.to(self.device), places

    @torch.no_grad()
    def round(self) -> None:
        """Give the optimizer's weights to the model."""
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            parameter.copy_(weight)

    def state(self) -> dict:
        """All that a later run needs to go on."""
        return {"weights": self.weights, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict) -> None:
        """Go on from there."""
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.round()

    def digest(self) -> str:
        """A name for the bits of all weights."""
        content = b"".join(w.cpu().numpy().tobytes() for w in self.weights)
        return hashlib.sha256(content).hexdigest()


# %% A step: sample, compare, train.
def compare(samples: Sequence[Sample], found: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the sampler's."""
    sampler, trainer = torch.cat([s.log_probabilities for s in samples]), torch.cat([*found])
    ratio = trainer.double() - sampler.double()
    return {
        "kl": (ratio.expm1() - ratio).mean().item(),  # an estimate without bias, never below 0
        "largest_difference": ratio.abs().max().item(),
        "other_bits": int((bits(sampler) != bits(trainer)).sum()),
        "tokens": len(ratio),
    }


def one_step(policy: Policy, step: int, args: argparse.Namespace) -> dict[str, float]:
    """Everything random follows from the seed and the number of the step."""
    rng = random.Random(f"{args.seed} {step}")
    torch.manual_seed(rng.getrandbits(62))
    number = functools.partial(rng.randint, 1, LARGEST)
    drawn = [Problem(number(), number()) for _ in range(args.problems)]
    asked = [p for p in drawn for _ in range(args.group)]
    order = rng.sample(range(len(asked)), len(asked))  # the sampler's; the trainer keeps groups
    answered = policy.sample([asked[i] for i in order])
    samples = [answered[order.index(i)] for i in range(len(asked))]
    give_advantages(samples, args.group)
    found = policy.train(samples)
    reward = statistics.fmean(s.reward for s in samples)
    return {"step": step, "reward": reward, **compare(samples, found)}


# %% A run of one backend, and its checkpoint.
def run(backend: str, args: argparse.Namespace, progress: Progress) -> tuple[list[dict], str]:
    """All steps; returns what was seen at each, and a name for the bits of the last weights."""
    torch.compiler.reset()
    loaded = models.load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    policy = Policy(*loaded, backend, args.learning_rate)
    kept = ("model", "dtype", "device", "learning_rate", "problems", "group", "seed")
    settings = {name: getattr(args, name) for name in kept}
    rows: list[dict] = []
    file = args.checkpoint and args.checkpoint / f"{backend}.pt"
    if file and file.exists():
        saved = torch.load(file, map_location=args.device)
        if saved["settings"] != settings:
            sys.exit(f"{file} is of a run with other settings: {saved['settings']}")
        policy.restore(saved["policy"])
        rows = saved["rows"]
    task = progress.add_task(backend, total=args.steps, completed=len(rows))
    for step in range(len(rows), args.steps):
        row = one_step(policy, step, args)
        rows.append({"backend": backend, **row})
        said = f"{backend}: reward {row['reward']:.2f}, KL {row['kl']:.1e}"
        progress.update(task, advance=1, description=said)
        if file and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            save(file, {"settings": settings, "policy": policy.state(), "rows": rows})
    return rows, policy.digest()


def save(file: Path, state: dict) -> None:
    """Write the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)


# %% What is shown.
def show(console: Console, rows: Sequence[dict], backends: Sequence[str]) -> None:
    """A table of all steps of each backend."""
    table = Table(title="sampler and trainer over all steps")
    for name in ("backend", "reward", "largest KL", "difference", "KL 0", "other bits"):
        table.add_column(name, justify="right")
    for backend in backends:
        own = [r for r in rows if r["backend"] == backend]
        first, last = (
            statistics.fmean(r["reward"] for r in part) for part in (own[:WINDOW], own[-WINDOW:])
        )
        table.add_row(
            backend,
            f"{first:.2f} to {last:.2f}",
            *(f"{max(r[name] for r in own):.3g}" for name in ("kl", "largest_difference")),
            f"{sum(r['kl'] == 0 for r in own)} of {len(own)}",
            f"{sum(r['other_bits'] for r in own)} of {sum(r['tokens'] for r in own)}",
        )
    console.print(table)
    console.print(
        f"[dim]reward: mean of the first and the last {WINDOW} steps; difference: largest"
    )
    console.print(
        "[dim]of a log-probability; KL 0: in how many steps; other bits: of how many tokens"
    )


def write(folder: Path, rows: Sequence[dict], backends: Sequence[str]) -> None:
    """The curves as a table and as a picture."""
    from matplotlib.figure import Figure  # comes with pip install "bicompile[bench]"

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "on_policy_rl.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(8, 9), layout="constrained")
    labels = "reward", "KL(trainer, sampler)", "largest difference of a log-probability"
    names = zip(("reward", "kl", "largest_difference"), labels, strict=True)
    for axes, (name, label) in zip(figure.subplots(3, 1, sharex=True), names, strict=True):
        for backend in backends:
            own = [r for r in rows if r["backend"] == backend]
            axes.plot([r["step"] for r in own], [r[name] for r in own], label=backend, marker=".")
        if name != "reward":
            axes.set_yscale("symlog", linthresh=1e-18)  # shows 0, too
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.axes[0].legend()
    figure.savefig(folder / "on_policy_rl.png", dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--steps", type=int, default=50)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--backend", choices=("inductor", "bicompile"), action="append", help="both if left out")
    add("--model", metavar="ID_OR_FOLDER", help="instead of SmolLM2-135M-Instruct")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--learning-rate", type=float, default=1e-5)
    add("--problems", type=int, default=8, help="problems of a step")
    add("--group", type=int, default=8, help="answers to a problem")
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, metavar="FOLDER", help="go on from there, and save there")
    add("--save-every", type=int, default=10, metavar="STEPS")
    add("--output", type=Path, metavar="FOLDER", help="curves as CSV and PNG")
    add("--json", type=Path, metavar="FILE", help="write everything that was seen")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 only if bicompile's trainer found every bit of its sampler."""
    args = parse(arguments)
    check_device(args.device)
    backends = args.backend or ["inductor", "bicompile"]
    console, found = Console(), machine(args.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows, weights = [], {}
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as progress:
        for backend in backends:
            seen, weights[backend] = run(backend, args, progress)
            rows += seen
    console.print(title(found), style="dim", markup=False)
    show(console, rows, backends)
    if args.output:
        write(args.output, rows, backends)
    if args.json:
        report = {"machine": found, "settings": vars(args), "weights": weights, "steps": rows}
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return int(any(r["other_bits"] for r in rows if r["backend"] == "bicompile"))


if __name__ == "__main__":
    sys.exit(main())
