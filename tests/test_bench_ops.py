"""The bench's ops and training steps compute what they are named after."""

from __future__ import annotations

import pytest
import torch

from bicompile.bench import ops, random_model, training
from bicompile.bench.cases import SMALL, TINY, Case, System

EAGER = System("eager", "eager")


@pytest.mark.parametrize("case", [*SMALL.ops, *TINY.ops], ids=lambda c: c.name)
def test_ops_run(case):
    group, batch = case.group.replace("49152", "512"), min(case.batch, 4)
    work = ops.OpWork(EAGER, "cpu", "float32", {group: 5})
    assert len(set(work.digests(Case(group, batch)))) == batch


def test_rows_of_inputs_do_not_depend_on_their_number():
    few, many = (ops.Maker(n, "cpu", torch.bfloat16) for n in (2, 5))
    assert torch.equal(few.batch(7, 3), many.batch(7, 3)[:2])


def test_an_attention_backend_that_is_not_there_is_a_missing_figure():
    work = ops.OpWork(System("cudnn", "CUDNN_ATTENTION"), "cpu", "float32", {"decode 4x2x8x16": 1})
    with pytest.raises(RuntimeError, match=r"No (available|viable)"):
        work.first(Case("decode 4x2x8x16", 1))


def test_attention_backward_is_the_gradient_of_attention():
    work = ops.OpWork(EAGER, "cpu", "float64", {"attention_backward 4x2x6x8": 2})
    case = Case("attention_backward 4x2x6x8", 2)
    with torch.no_grad():
        found = work.prepare(case)()
    *read, gradient = work._inputs(case)
    query, key, value = (t.clone().requires_grad_() for t in read)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    result = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    want = torch.autograd.grad(result, (query, key, value), gradient)
    torch.testing.assert_close(found, (result.detach(), *want))


def test_a_training_step_gives_the_gradients_of_the_mean_loss():
    model = random_model.build(TINY.shapes, "cpu", "float64")
    work = training.TrainingWork(EAGER, model, "cpu")
    case = Case("training 8", 3)
    with torch.no_grad():  # as a worker does
        assert work.first(case) > 0
        rows = work.digests(case)
        assert work.sample(case, 1) > 0
        work._step(case)()
    assert len(set(rows)) == 3
    found = {name: weight.grad for name, weight in model.named_parameters()}
    ids = work._tokens(case)
    logits = model(input_ids=ids).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    want = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(list(found.values()), list(want), rtol=1e-4, atol=1e-7)
