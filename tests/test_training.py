"""Training: the forward is that of inference, gradients have the same bits in every run.

Tiny random models, dropout 0; what is followed is a row that the sampler computes in a small batch
and the trainer in a larger one, padded to another length.  Without gradients log-probabilities are
spelled as a sampler does, with them as a trainer does.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_subject import CONFIGS, Trained

from bicompile import testing

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
KINDS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {"dtype": torch.float32, "autocast": True},
}


def cases(*quick):
    """Every model in every kind of precision; those not in `quick` only in the long run."""
    names = [f"{name}-{kind}" for name in CONFIGS for kind in KINDS]
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.soak) for n in names]


def trained(case, device="cpu", **kwargs):
    name, kind = case.split("-")
    return Trained(name, **KINDS[kind], device=device, **kwargs)


def eagerly(function, **kwargs):
    """In place of `bicompile.compile`."""
    return function


class Batches:
    """Two rows as the sampler has them, and the same behind three others as the trainer has."""

    def __init__(self, subject):
        self.few = subject.batch(9, 5, seed=1)
        self.others = subject.batch(44, 13, 31, 20, seed=2)
        self.many = self.few.among(self.others, junk=7)

    def rows(self, of_few, of_many):
        """Pairs of what belongs to a row of `few`, there and in `many`, without padding."""
        for number, length in enumerate((9, 5)):
            a, b = of_few[number], of_many[4 + number]
            yield (a, b) if self.few.mask is None else (a[:length], b[:length])


def check_forward(subject):
    """Log-probabilities without gradients, among few, are those with gradients, among many."""
    batches = Batches(subject)
    sampled = subject.log_probabilities(batches.few)
    for found in (subject.step(batches.many), subject.step(batches.few.among(batches.others, 11))):
        for a, b in batches.rows(sampled, found.log_probabilities):
            testing.assert_same_bits(a, b, "with and without gradients")
    for a, b in batches.rows(sampled, subject.log_probabilities(batches.many)):
        testing.assert_same_bits(a, b, "without gradients")


def check_rows(subject):
    """The gradient of a row's input is the same whatever else is in the batch."""
    batches = Batches(subject)
    few, many = (subject.step(b).gradients["the input"] for b in (batches.few, batches.many))
    for a, b in batches.rows(few, many):
        testing.assert_same_bits(a, b, "the gradient of a row")


def check_runs(subject):
    """Loss and every gradient again, with other numbers of threads."""
    batch = Batches(subject).many
    expected = subject.step(batch)
    for threads in (1, 2, 3):
        with testing.num_threads(threads):
            found = subject.step(batch)
        assert list(found.gradients) == list(expected.gradients)
        testing.assert_same_bits(found.tensors(), expected.tensors(), f"{threads} threads")
    first, second = (subject.step(batch, parts=2) for _ in range(2))
    testing.assert_same_bits(first.tensors(), second.tensors(), "gradients added up over two parts")
    with pytest.raises(testing.InvarianceViolation):  # another order of the same sum
        testing.assert_same_bits(first.tensors(), expected.tensors(), "in one part")


@each_device
@pytest.mark.parametrize("case", cases("gpt2-float32"))
def test_one_forward_and_gradients(case, device):
    subject = trained(case, device)
    check_forward(subject)
    check_runs(subject)
    check_rows(subject)


def test_pytorch_itself_is_caught():
    """The checks of this file can fail."""
    subject = trained("qwen3-bfloat16", compile=eagerly)
    for check in (check_forward, check_rows):
        with pytest.raises(testing.InvarianceViolation):
            check(subject)


@each_device
@pytest.mark.parametrize("case", [c for c in cases() if "resnet" not in c.values[0]])
def test_checkpointing_changes_no_bit(case, device):
    """What is computed again is what was computed; transformers has none for ResNet."""
    plain, checkpointed = (trained(case, device, checkpointing=c) for c in (False, True))
    batch = Batches(plain).many
    expected, found = plain.step(batch), checkpointed.step(batch)
    assert list(found.gradients) == list(expected.gradients)
    testing.assert_same_bits(found.tensors(), expected.tensors(), "with checkpointing")


@pytest.mark.parametrize("case", cases())
def test_static_and_dynamic_graphs_agree(case):
    static, dynamic = (trained(case, dynamic=d) for d in (False, True))
    batch = Batches(static).many
    expected, found = static.step(batch), dynamic.step(batch)
    testing.assert_same_bits(found.tensors(), expected.tensors(), "dynamic shapes")


@pytest.mark.parametrize("case", cases())
def test_another_process(case):
    program = (
        f"import test_training as t; t.torch.set_num_threads(2); subject = t.trained({case!r});"
        "print(*t.digests(subject.step(t.Batches(subject).many)))"
    )
    command = [sys.executable, "-c", program]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    subject = trained(case)
    assert done.stdout.split() == digests(subject.step(Batches(subject).many))


def digests(step):
    """A name for the bits of each tensor."""
    found = (testing.bits(t).long().flatten().tolist() for t in step.tensors())
    return [hashlib.sha256(str(numbers).encode()).hexdigest() for numbers in found]


class Errors:
    """Root mean square errors against float64, for each tensor of a step, over many batches.

    A token of a mixture that goes to another expert is an error of its own size, which one batch
    has and another not, whoever computes it: medians are compared.
    """

    def __init__(self, case, device="cpu", batches=20):
        ours, eager = trained(case, device), trained(case, device, compile=eagerly)
        true = Trained(ours.name, torch.float64, device=device, compile=eagerly)
        true.model.load_state_dict(ours.model.state_dict())  # the same weights, rounded
        self.ours, self.eager = {}, {}
        for seed in range(batches):
            batch = ours.batch(44, 13, 31, 20, 9, 5, seed=seed)
            expected = self._named(true.step(batch.double()), batch)
            for subject, errors in ((ours, self.ours), (eager, self.eager)):
                for name, found in self._named(subject.step(batch), batch).items():
                    error = (found.double() - expected[name]).square().mean().sqrt()
                    errors.setdefault(name, []).append(error.item())

    def _named(self, step, batch):
        """What is compared: not the log-probabilities behind the end of a row."""
        mask = 1 if batch.mask is None else batch.mask
        other = {"log-probabilities": step.log_probabilities * mask, "loss": step.loss}
        return {**other, **step.gradients}

    def check(self):
        """Typical errors of each tensor lie within PyTorch's; on the whole they are no larger."""
        ratios = []
        for name, ours in self.ours.items():
            eager = self.eager[name]
            assert statistics.median(ours) <= max(eager), name
            if name != "loss":  # one number, whose error is luck
                ratios.append(math.log(statistics.median(ours) / statistics.median(eager)))
        assert statistics.fmean(ratios) <= math.log(1.02)


@each_device
@pytest.mark.parametrize("case", cases("llama-bfloat16", "resnet-float32"))
def test_errors_are_no_worse_than_pytorchs(case, device):
    errors = Errors(case, device)
    errors.check()
    errors.ours = {n: [1.1 * e for e in found] for n, found in errors.eager.items()}
    with pytest.raises(AssertionError):
        errors.check()


def weights_after(case, steps, device="cpu"):
    """All weights and the optimizer's memory after some steps, each on a batch in two parts."""
    subject = trained(case, device)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    clip = torch.compile(torch.nn.utils.clip_grad_norm_, backend="batch_invariant")
    update = torch.compile(optimizer.step, backend="batch_invariant")
    for number in range(steps):
        subject.step(subject.batch(14, 3, 11, 8, seed=number), parts=2)
        clip(parameters, 1.0)
        update()
    memory = [t for state in optimizer.state.values() for t in state.values()]
    return [*(p.detach() for p in parameters), *memory]


@each_device
@pytest.mark.parametrize(
    ("case", "steps"),
    [pytest.param("gpt2-float32", 3, id="gpt2-float32")]
    + [pytest.param(*c.values, 50, marks=pytest.mark.soak) for c in cases()],
)
def test_two_runs_end_in_the_same_weights(case, steps, device):
    """With clipping, and weights that are tied (GPT-2, Qwen3)."""
    first, second = (weights_after(case, steps, device) for _ in range(2))
    testing.assert_same_bits(first, second, f"after {steps} steps")
