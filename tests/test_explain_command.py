"""The command: programs by name, without weights; files; refusals with a next step."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_model import make_tiny_model

from bicompile import cli, errors, explainer, explanation_page, models, subjects

MODULE = """
import torch

def model():
    made = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    return made, (torch.randn(3, 8),)

def huge():
    return torch.nn.Linear(1 << 20, 1 << 20), (torch.empty(2, 1 << 20),), {}

def wrong():
    return torch.nn.ReLU()

def deep():
    def program(x):
        for _ in range(600):
            x = x + 1
        return x
    return program, (torch.ones(2, 3),)

def branches():
    def program(x):
        return x + 1 if x.sum() > 0 else x
    return program, (torch.ones(3),)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a module of programs."""
    (tmp_path / "programs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("programs", None)


def run(*arguments):
    return cli.main(["explain", *arguments])


def test_a_function_by_name(here, capsys):
    assert run("programs:model") == 0
    shown = capsys.readouterr().out
    assert "Sequential: 3 nodes, 3 invariant" in shown
    assert "addmm" in shown
    assert "float32[3, 8]" in shown


def test_a_model_larger_than_the_memory(here, capsys):
    assert run("programs:huge") == 0
    assert "GB moved node by node" in capsys.readouterr().out


def test_a_folder_with_a_configuration_alone(here, capsys):
    folder = make_tiny_model(here / "tiny")
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert run(str(folder), "--dtype", "bfloat16", "--batch", "3", "--length", "7") == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    assert "input_ids=int64[3, 7]" in shown


def test_the_built_in_model(here, monkeypatch):
    monkeypatch.setattr(models, "fetch", lambda: here)
    folder = make_tiny_model(here / "tiny")
    monkeypatch.setattr(models, "unpack", lambda gguf: folder)
    subject = subjects.load(None)
    assert type(subject.model).__name__ == "LlamaForCausalLM"
    assert subject.model.lm_head.weight.device.type == "meta"


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_inputs_of_other_families(kind, here):
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "bert": lambda: transformers.BertConfig(**small, intermediate_size=16),
        "t5": lambda: transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        "vit": lambda: transformers.ViTConfig(**small, intermediate_size=16, image_size=32),
    }[kind]()
    names = {"bert": "BertModel", "t5": "T5ForConditionalGeneration", "vit": "ViTModel"}
    config.architectures = [names[kind]]
    config.save_pretrained(here / kind)
    subject = subjects.load(str(here / kind))
    assert type(subject.model).__name__ == names[kind]
    assert explainer.explain(subject.model, *subject.args, **subject.kwargs).rows


def test_files(here, capsys):
    files = [f"--{kind}" for kind in ("html", "json", "lock")]
    arguments = [a for kind in files for a in (kind, f"out.{kind.strip('-')}")]
    assert run("programs:model", *arguments) == 0
    assert json.loads((here / "out.json").read_text())["title"] == "Sequential"
    assert "<title>Sequential" in (here / "out.html").read_text()
    assert run("programs:model", "--shapes", "dynamic", "--check", "out.lock") == 0
    assert "out.lock: the same numbers, 2 steps" in capsys.readouterr().out


def test_a_lock_that_differs_fails_and_names_it(here, capsys):
    assert run("programs:model", "--lock", "a.lock") == 0
    text = MODULE.replace("torch.nn.ReLU())", "torch.nn.Tanh())")
    (here / "programs.py").write_text(text)
    sys.modules.pop("programs")
    assert run("programs:model", "--check", "a.lock") == 2
    shown = capsys.readouterr().err
    assert "LockDiffers" in shown
    assert "aten.tanh.default" in shown
    assert "--lock a.lock" in shown


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("programs:nothing", "has no attribute 'nothing'"),
        ("no_such_module:model", "No module named 'no_such_module'"),
        ("programs:wrong", "it returned ReLU"),
        ("./no/such/folder", "cannot explain ./no/such/folder"),
    ],
)
def test_names_that_lead_nowhere(name, said, here, capsys):
    assert run(name) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "ProgramNotFound" in shown
    assert said in shown
    assert "module:function" in shown
    assert "Traceback" not in shown


def test_a_program_that_cannot_be_traced(here, capsys):
    assert run("programs:branches") == 2
    shown = "".join(capsys.readouterr().err.replace("│", "").split())  # a path may be folded
    assert "Untraceable" in shown
    assert "programs.py" in shown


def test_a_graph_too_large_for_the_terminal(here, capsys):
    assert run("programs:deep", "--all", "--shapes", "static") == 2
    shown = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "600 rows, too many for a terminal" in shown
    assert "--html FILE" in shown


def test_a_machine_without_a_browser(here, capsys, monkeypatch):
    monkeypatch.setattr(explanation_page.webbrowser, "open", lambda url: False)
    monkeypatch.setattr(explanation_page, "find_browser", lambda: None)
    for option in (["--open"], ["--picture", "page.png"]):
        assert run("programs:model", "--html", "page.html", *option) == 2
        assert "BrowserNotFound" in capsys.readouterr().err
        assert (here / "page.html").exists()


def test_transformers_is_not_needed_for_a_function(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("programs:model") == 0
    with pytest.raises(errors.ProgramNotFound, match="pip install"):
        subjects.load(str(here))
