"""The demo: batches, counting, exit status; on a tiny random model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tiny_model import make_tiny_model

import bicompile
from bicompile import answers, cli, demo


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def invariant(monkeypatch):
    """In place of the compiler: logits that look at the row's last token and at nothing else."""

    def compile(model):
        forward = model.forward

        def call(*args, input_ids, **kwargs):
            output = forward(*args, input_ids=input_ids, **kwargs)
            size = output.logits.shape[-1]
            following = (input_ids[:, -1:] + 1) % size
            output.logits = torch.nn.functional.one_hot(following, size).float()
            return output

        model.forward = call
        return model

    monkeypatch.setattr(bicompile, "compile", compile, raising=False)


def run(tiny, *options):
    return cli.main(
        ["demo", "--model", tiny, "--max-new-tokens", "4", "--dtype", "float32", *options]
    )


def test_batches_hold_the_question_once():
    batches = demo.make_batches(demo.OTHERS, (1, 2, 3, 5, 8, 17))
    for batch, size in zip(batches, (1, 2, 3, 5, 8, 17), strict=True):
        assert len(batch.prompts) == size
        asked = [i for i, p in enumerate(batch.prompts) if p == answers.QUESTION]
        assert asked == list(batch.asked)
    assert len({b.asked for b in batches}) >= 4


@pytest.mark.parametrize("n", [1, 7, 100])
def test_mixed_batches_ask_exactly_n_times(n):
    batches = demo.mixed_batches(demo.OTHERS, n)
    assert sum(len(b.asked) for b in batches) == n
    assert all(1 <= len(b.prompts) <= 256 for b in batches)
    assert all(b.prompts[i] == answers.QUESTION for b in batches for i in b.asked)
    assert batches == demo.mixed_batches(demo.OTHERS, n)


def said(*texts):
    return [answers.Answer(i + 1, 0, [ord(c) for c in t], t) for i, t in enumerate(texts)]


def test_counts_and_first_difference():
    result = answers.Result("eager", said("abcd", "abxd", "abcd", "abcx"))
    assert result.unique == 3
    assert result.first_difference == 3
    assert answers.Result("eager", said("ab", "ab")).first_difference is None
    assert answers.Result("eager", said("ab", "abc")).first_difference == 3
    mixed = answers.Result("eager", said("ab"), said("ab", "xb"))
    assert (mixed.unique, mixed.unique_completions, mixed.first_difference) == (1, 2, 1)


def test_other_bits_are_counted_up_to_the_first_other_token():
    first = answers.Answer(1, 0, [5, 6, 7], "", ["a", "b", "c"])
    bits = answers.Answer(2, 0, [5, 6, 7], "", ["a", "x", "c"])
    tokens = answers.Answer(3, 0, [5, 9, 7], "", ["a", "y", "z"])
    assert answers.Result("eager", [first, bits, tokens]).other_bits == (2, 5)
    assert answers.Result("eager", [first]).other_bits == (0, 0)


def test_digests_name_bits():
    steps = [torch.randn(3, 1000, dtype=torch.bfloat16) for _ in range(2)]
    steps[1][2, 7] = 0.0
    before = answers.digests(steps, (0, 2))
    steps[1][2, 7] = -0.0
    after = answers.digests(steps, (0, 2))
    assert before[0] == after[0]
    assert before[1][0] == after[1][0]
    assert before[1][1] != after[1][1]
    assert len({name for row in before for name in row}) == 4


def test_answers_are_shown_where_they_part():
    lines = answers.part_lines(
        said("one two three four", "one two [red] four", "one two three four")
    )
    assert lines[0].startswith("batch 1, 3: ")
    assert "one two[/] [bold red]three[/] four" in lines[0]
    assert "[bold red]\\[red][/] four" in lines[1]
    three = answers.part_lines(said("a x", "b x y", "b x z"))
    assert [re.search(r"red\](\w+)", line)[1] for line in three] == ["a", "y", "z"]
    assert answers.part_lines(said("one", "one")) == ["at every batch size: one"]
    assert "(end)" in answers.part_lines(said("one", "one two"))[0]


def test_report_and_exit_status(tiny, invariant, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n\na longer prompt than the question, to be padded to\n")
    report = tmp_path / "report.json"
    options = ("--prompts", str(prompts), "--json", str(report), "--batch-sizes", "1,3")
    assert run(tiny, *options, "--completions", "5") == 0
    seen = json.loads(report.read_text())
    assert seen["machine"]["torch"] == torch.__version__
    assert seen["settings"]["dtype"] == "float32"
    assert [s["system"] for s in seen["systems"]] == ["eager", "bicompile"]
    for system in seen["systems"]:
        assert [a["batch_size"] for a in system["answers"]] == [1, 3]
        assert len(system["completions"]) == 5
        assert system["other_bits"][1] > 0
        assert all(0 < len(a["tokens"]) <= 4 for a in system["answers"])
        assert system["tokens_per_second"] > 0
    assert seen["systems"][1]["unique"] == 1
    assert seen["systems"][1]["other_bits"][0] == 0
    shown = capsys.readouterr().out
    assert "plain PyTorch" in shown
    assert "at every batch size" in shown


def test_a_row_that_depends_on_the_batch_is_seen(tiny, monkeypatch, capsys):
    """Canary: a model whose tokens change with the batch size makes the exit status 1."""

    def planted(model):
        forward = model.forward

        def call(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits[..., 40 + len(output.logits)] += 100
            return output

        model.forward = call
        return model

    monkeypatch.setattr(bicompile, "compile", planted, raising=False)
    assert run(tiny, "--batch-sizes", "1,2,3") == 1
    assert "batch 1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompts", "/no/such/file"), "--prompts is /no/such/file: No such file or directory"),
        (("--model", "/no/such/folder"), "cannot load the model /no/such/folder"),
    ],
)
def test_wrong_arguments_are_explained(tiny, options, said, capsys):
    assert run(tiny, *options) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in shown
    assert "next:" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("sizes", ["0", "1,,2", "x", "-1"])
def test_wrong_batch_sizes(tiny, sizes, capsys):
    with pytest.raises(SystemExit) as caught:
        run(tiny, "--batch-sizes", sizes)
    assert caught.value.code == 2
    assert "is not a whole number above 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(tiny, capsys):
    assert run(tiny, "--device", "cuda") == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


def test_compiled(tiny, capsys):
    """The whole way, with our backend."""
    assert run(tiny, "--batch-sizes", "1,2,3") == 0


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_model(dtype, tmp_path):
    report = tmp_path / "report.json"
    assert cli.main(["demo", "--dtype", dtype, "--json", str(report)]) == 0
    eager, ours = json.loads(report.read_text())["systems"]
    assert ours["unique"] == 1
    assert dtype == "float32" or eager["unique"] > 1
