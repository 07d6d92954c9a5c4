"""The page of the survey, docs/coverage.md, from its results and the registry."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from bicompile import registry
from bicompile.coverage.results import (
    CLASSES,
    FAILED,
    UNUSED,
    ModelResult,
    OpResult,
    Results,
    worst,
)
from bicompile.passes.rules import OVER_THE_BATCH, RULES

HEADER = """# Coverage

Written by `bicompile coverage`; a test compares it with its figures and the rules.

`invariant` is the promise: no bit of a row depends on what else is in the batch. `deterministic
only` gives the same bits in every run, but reduces over the batch. `refused` is an error that names
the op and the line of your program. How to run the survey, and what it checks, stands at the end.
"""

METHOD = """
## How it is found out

```
bicompile coverage --jobs 4 --json docs/coverage.json --page docs/coverage.md
```

Nothing is read off a list: each entry is traced and judged by the passes that compile any model.

- **Operations** are the entries of PyTorch's own test database (OpInfo) that have float32, bfloat16
  or float16 on a CPU, with its sample inputs: up to 8 in float32, 2 in each of the others. The
  class is that of the sample and dtype that fare worst; *samples* says how many have it. A refused
  sample is also handed to `torch.compile`, which must raise. The largest of the others is compiled
  and run, in float32 and bfloat16: its value against float64, a second run, two threads, misaligned
  memory, other strides, dynamic shapes; and, along an axis of rows if the operation has one, a row
  alone, at another place, and beside NaN, infinity and huge values. *bits* says in which dtypes
  all these agree.
- **Models** are tiny, with random weights, built from transformers' configurations or from modules
  of `torch.nn`. One row is followed through batches of 1, 2, 3 and 5, at several places and beside
  NaN, infinity and huge values; a text also through padding, in chunks and token by token with a
  cache.

`--ops` or `--models` alone; `--only NAME ...` for some entries, the others staying as the file of
`--json` has them (`--only` without a name writes the page anew); `--resume` for what the file
lacks, which is written after each entry; `--jobs N` processes, of which a crash takes no other
along; `--page FILE` for this page. The command prints the counts; its exit status is 1 if anything
is wrong. It needs `pip install "bicompile[coverage]"`.

`--device cuda --json docs/coverage.json` then compiles for a GPU what holds on the CPU and makes
the same checks there; they stand in the column *GPU*. Inputs, and what is held against,
stay on the CPU. Triton kernels are also checked by the tests ([CONTRIBUTING](../CONTRIBUTING.md))
and by `bicompile verify` ([schedules](schedules.md)).
"""


def render(results: Results) -> str:
    """The whole page."""
    machine = f"The GPU: {results.gpu}." if results.gpu else ""
    parts = [HEADER, machine, _models(results.models), _ops(results), _targets(results), METHOD]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


# ---------------------------------------------------------------------------------------- models


def _models(models: Mapping[str, ModelResult]) -> str:
    text = f"## Models\n{_counts(m.verdict for m in models.values())}\n"
    text += _counts_on_gpu(m.gpu.verdict for m in models.values() if m.gpu)
    kinds = list(dict.fromkeys(m.kind for m in models.values()))
    for kind in kinds:
        own = {name: m for name, m in models.items() if m.kind == kind}
        text += f"\n### {kind.capitalize()}\n"
        rows = [
            [
                name,
                m.verdict,
                str(m.graphs or ""),
                ", ".join(m.checks),
                _gpu(m),
                _ops_of_ours(m.kernels),
                _why(m),
            ]
            for name, m in own.items()
        ]
        heads = ["model", "class", "graphs", "bits agree in", "GPU", "kernels", "why"]
        text += _table(heads, rows)
    return text


def _why(m: ModelResult) -> str:
    told = [m.reason] if m.reason else []
    told += [f"{law}: {reason}" for law, reason in m.open.items()]
    told += [f"on a GPU: {m.gpu.reason}"] if m.gpu and m.gpu.reason else []
    return _quoted("; ".join(told))


def _gpu(m: ModelResult) -> str:
    """The same checks, or what became of the model there."""
    if m.gpu is None:
        return ""
    return "the same" if m.gpu.checks == m.checks else m.gpu.verdict


# ------------------------------------------------------------------------------------ operations


def _ops(results: Results) -> str:
    by_class: dict[str, list[str]] = defaultdict(list)
    for name in results.ops:
        by_class[results.verdict(name)].append(name)
    text = f"## Operations\n{_counts(results.verdict(n) for n in results.ops)}\n"
    text += _counts_on_gpu(found for n in results.ops if (found := results.on_gpu(n)))
    for name in (FAILED, *CLASSES):
        if by_class[name]:
            rows = [_op_row(n, results.ops[n], name) for n in sorted(by_class[name], key=str.lower)]
            text += f"\n### {name.capitalize()}: {len(rows)}\n"
            text += _table(["operation", "samples", "bits", "GPU", "kernels", "why"], rows)
    return text


def _op_row(name: str, by_dtype: Mapping[str, OpResult], verdict: str) -> list[str]:
    used = {d: r for d, r in by_dtype.items() if r.verdict != UNUSED}
    samples = Counter[str]()
    for result in used.values():
        samples.update(result.samples)
    compiled = [d for d, r in used.items() if r.checks]
    on_gpu = [d for d, r in used.items() if r.gpu and r.gpu.checks]
    kernels = sorted({k for r in used.values() for k in r.kernels})
    reasons = dict.fromkeys(reason for r in used.values() for reason in r.reasons)
    told = (f"on a GPU: {r.gpu.reason}" for r in used.values() if r.gpu and r.gpu.reason)
    reasons |= dict.fromkeys(told)
    return [
        f"`{name}`",
        f"{samples[verdict]} of {samples.total()}",
        ", ".join(compiled),
        ", ".join(on_gpu),
        _ops_of_ours(kernels),
        _quoted("; ".join(list(reasons)[:2])),
    ]


def _targets(results: Results) -> str:
    """The aten ops that the operations arrive as, and every rule."""
    verdicts: dict[str, set[str]] = defaultdict(set)
    for by_dtype in results.ops.values():
        for result in by_dtype.values():
            for target, found in result.targets.items():
                verdicts[target].update(found)
    rules = {str(target): rule.kernel for target, rule in RULES.items()}
    over_the_batch = {*map(str, OVER_THE_BATCH)}
    rows = []
    for target in sorted({*verdicts, *rules}):
        kernel = rules.get(target) if target not in over_the_batch else None
        reached = _span(verdicts[target]) if target in verdicts else "not reached"
        rows.append([f"`{target}`", reached, f"{kernel.family}: `{kernel.name}`" if kernel else ""])
    kernels = registry.load_all().values()
    widened = sorted(k.name for k in kernels if k.name not in {k.name for k in rules.values()})
    text = (
        "## Ops of PyTorch's graphs\nWhat the operations arrive as at our passes, and the rules.\n"
    )
    text += f"{_counts(worst(v) for v in verdicts.values())}\n\n"
    text += _table(["op", "class", "kernel"], rows)
    return text + f"\nKernels of several ops at once: {_ops_of_ours(widened)}.\n"


def _span(verdicts: Iterable[str]) -> str:
    found = set(verdicts)
    return " or ".join(c for c in CLASSES if c in found)


# ------------------------------------------------------------------------------------------ text


def _counts(verdicts: Iterable[str]) -> str:
    counts = Counter(verdicts)
    told = [f"{name} **{counts[name]}**" for name in CLASSES]
    told += [f"{name} **{n}**" for name, n in counts.items() if name not in CLASSES]
    return f"Of {counts.total()}: {', '.join(told)}."


def _counts_on_gpu(verdicts: Iterable[str]) -> str:
    found = [*verdicts]
    return f"\nOn a GPU, of {_counts(found)[3:]}\n" if found else ""


def _ops_of_ours(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _quoted(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without the columns in which nothing stands."""
    rows = [*rows]
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (heads, ["---"] * len(heads), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
