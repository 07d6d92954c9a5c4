"""Follows one row through a compiled model: batches, neighbours, padding, chunks and a cache.

The reference is the row alone, in one piece, without padding or a cache.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import bicompile
from bicompile import testing
from bicompile.capture import TorchDynamoException
from bicompile.coverage import checks
from bicompile.coverage.results import FAILED, ModelResult, first_line
from bicompile.coverage.zoo import ZOO, Entry
from bicompile.coverage.zoo.entry import Inputs
from bicompile.errors import BicompileError
from bicompile.report import REPORTS, Verdict

BAD = (float("nan"), float("inf"), 3e4)
CHUNKS = (10, 6, 1, 1, 1, 1)
PADDING = 7


def check(name: str, device: str = "cpu") -> ModelResult:
    """Compile a model of the zoo and check the bits of one of its rows.

    Args:
        name: of the model.
        device: where its compiled code runs; inputs and what is compared stay on the CPU.

    Returns:
        what holds; nothing is raised for what goes wrong, it is written down.
    """
    entry = ZOO[name]
    result = ModelResult(entry.kind, Verdict.INVARIANT.value)
    REPORTS.clear()
    try:
        _check(entry, result, device)
    except testing.InvarianceViolation as error:
        result.verdict, result.reason = FAILED, f"other bits: {first_line(error)}"
    except BicompileError as error:
        result.verdict, result.reason = Verdict.REFUSED.value, _reason(error)
    except TorchDynamoException as error:
        ours = isinstance(error.__cause__, BicompileError)
        inside = "BackendCompilerFailed" in type(error).__name__ and not ours
        result.verdict = FAILED if inside else Verdict.REFUSED.value
        result.reason = _reason(error)
    except Exception as error:
        result.verdict, result.reason = FAILED, first_line(error)
    result.graphs = len(REPORTS)
    decisions = [d for report in REPORTS for d in report.decisions]
    became = {d.became for d in decisions if d.became and d.became.startswith("bicompile.")}
    result.kernels = sorted({name.split(".")[1] for name in became})
    only = any(d.verdict is Verdict.DETERMINISTIC for d in decisions)
    if only and result.verdict == Verdict.INVARIANT.value:
        result.verdict = Verdict.DETERMINISTIC.value
    return result


def _reason(error: Exception) -> str:
    line = getattr(error, "line", None)
    return first_line(error) + (f" at {line.split('/')[-1]}" if line else "")


def _check(entry: Entry, result: ModelResult, device: str) -> None:
    torch.manual_seed(0)
    model = entry.build().to(entry.dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # so large that rows differ in all bits
    torch.compiler.reset()
    row = _Row(entry, model, device)
    row.check_value()
    result.checks.append("value")
    row.check_batches()
    result.checks += ["batch size", "position", "neighbours"]
    for law in entry.laws:
        if law in entry.without:
            result.open[law] = entry.without[law]
            continue
        getattr(row, f"check_{law}")()
        result.checks += ["chunks", "decode"] if law == "cache" else [law]


class _Row:
    """A compiled model and the row that is followed through it."""

    def __init__(self, entry: Entry, model: Any, device: str) -> None:
        self.entry, self.eager, self.device = entry, model, device
        self.takes = set(inspect.signature(model.forward).parameters)
        self.row = self._random(1)
        # Some models of transformers make themselves ready in their first call.
        self.expected = self._call(model, self.row)
        self.eager = copy.deepcopy(model)
        self.model = model.to(device)
        bicompile.compile(self.model)
        self.reference = self(self.row)

    def _random(self, batch: int) -> Inputs:
        torch.manual_seed(batch)
        with torch.no_grad():
            return self.entry.inputs(self.eager, batch)

    def __call__(self, inputs: Inputs, **more: Any) -> list[torch.Tensor]:
        """The results whose rows are followed."""
        return self._call(self.model, inputs, self.device, **more)

    def _call(
        self, model: nn.Module, inputs: Inputs, device: str = "cpu", **more: Any
    ) -> list[torch.Tensor]:
        given = {**self._masks(inputs), **inputs, **more}
        if "use_cache" in self.takes:
            given.setdefault("use_cache", False)
        with torch.no_grad():
            found = model(**checks.moved(given, device))
        names = self.entry.outputs or (("logits",) if hasattr(found, "logits") else ())
        kept = [getattr(found, n) for n in names] if names else tree_leaves(found)
        return [t.cpu().clone() for t in kept if isinstance(t, torch.Tensor)]

    def _masks(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """All tokens of a text are there, and numbered."""
        if "inputs_embeds" not in inputs:
            return {}
        batch, length, _ = inputs["inputs_embeds"].shape
        return self._masked(torch.ones(batch, length, dtype=torch.long))

    def _masked(self, mask: torch.Tensor, last: int | None = None) -> dict[str, torch.Tensor]:
        """A mask and the positions of the last tokens, as far as the model takes them."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -(last or mask.shape[1]) :]
        found = {"attention_mask": mask, "position_ids": positions.contiguous()}
        return {name: t for name, t in found.items() if name in self.takes}

    def check_value(self) -> None:
        """The error against float64 is of the size of eager PyTorch's own."""
        eager = self.expected
        for t in self.reference:
            assert bool(t.isfinite().all()), "the model gives no finite numbers"
        try:
            wide = {n: checks.widened(t) for n, t in self.row.items()}
            exact = self._call(copy.deepcopy(self.eager).double(), wide)
        except RuntimeError:  # the model casts to a dtype of its own
            exact = eager
        for ours, theirs, true in zip(self.reference, eager, exact, strict=True):
            if not ours.is_floating_point():
                continue  # positions of equal numbers, of which there are many
            own, others = checks.error(ours, true), checks.error(theirs, true)
            eps = torch.finfo(ours.dtype).eps if ours.dtype.is_floating_point else 0.0
            assert own <= 4 * others + 16 * eps, f"error {own:.2g}, of eager PyTorch {others:.2g}"

    def check_batches(self) -> None:
        """The row among others in batches of several sizes, at several places."""
        for batch, at in ((3, 1), (5, 4), (2, 0)):
            for bad in (None, *BAD) if batch == 3 else (None,):
                inputs = self._random(batch)
                for name, t in inputs.items():
                    if bad is not None and t.is_floating_point():
                        t.fill_(bad)
                    t[at] = self.row[name][0]
                found = [t[at : at + 1] for t in self(inputs)]
                what = f"row {at} of {batch}, neighbours {bad or 'random'}"
                testing.assert_same_bits(found, self.reference, what)

    def check_padding(self) -> None:
        """Padding on the left of a decoder's text, on the right of an encoder's."""
        left = "cache" in self.entry.laws
        x = self.row["inputs_embeds"]
        length = x.shape[1]
        padded = torch.randn(3, length + PADDING, x.shape[2]).to(x.dtype)
        real = slice(PADDING, None) if left else slice(0, length)
        padded[-1, real] = x[0]
        mask = torch.ones(3, length + PADDING, dtype=torch.long)
        mask[-1] = 0
        mask[-1, real] = 1
        (found,) = self({"inputs_embeds": padded}, **self._masked(mask))
        testing.assert_same_bits([found[-1:, real]], self.reference, "padding")

    def check_cache(self) -> None:
        """The row in pieces, each added to a growing cache; the last ones are single tokens."""
        from transformers import DynamicCache

        x = self.row["inputs_embeds"]
        assert sum(CHUNKS) == x.shape[1]
        slot = "cache" if "cache" in self.takes else "past_key_values"
        cache, done, found = DynamicCache(config=self.eager.config), 0, []
        for size in CHUNKS:
            masks = self._masked(torch.ones(1, done + size, dtype=torch.long), size)
            piece = {"inputs_embeds": x[:, done : done + size].contiguous()}
            (logits,) = self(piece, **{slot: cache}, use_cache=True, **masks)
            found.append(logits)
            done += size
        testing.assert_same_bits([torch.cat(found, 1)], self.reference, f"chunks {CHUNKS}")
