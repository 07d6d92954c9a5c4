"""Compare and lock files: equal programs are found equal, and each planted change is named."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn as nn
from explained import IDS, PROGRAMS, explain, explained, llama, mlp

import bicompile
from bicompile import errors, machine, pins
from bicompile.comparison import compare
from bicompile.explanation import Explanation
from bicompile.lock import Lock

X = torch.randn(4, 8)


def small(model=None, x=X, **options):
    return bicompile.explain(model or mlp(), x, **options)


def test_static_and_dynamic_shapes_are_the_same_numbers():
    static, dynamic = explain("llama", dynamic=False), explain("llama", dynamic=True)
    for one, two in ((explained("llama"), static), (static, dynamic)):
        result = compare(one, two)
        assert result and result.same, result.text()
        assert result.steps == len(one.graphs[0].program) > 50
    assert result.text().startswith(f"the same numbers: {result.steps} steps agree, by these pins")
    assert "float32 matmul precision: highest" in result.text()


def test_trainer_and_sampler_are_the_same_numbers():
    """A whole sequence with a causal mask, against one token with a cache."""
    import transformers

    model = llama()
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    token = {"input_ids": IDS[:, :1], "position_ids": IDS[:, :1] + 9}
    sampler = bicompile.explain(model, **token, past_key_values=cache)
    written = {row.target for row in sampler.rows} - {row.target for row in explained("llama").rows}
    assert any("index" in target for target in written), "the sampler has no cache"
    result = compare(explained("llama"), sampler)
    assert result.same, result.text()


def test_another_model_is_not_the_same():
    assert not compare(explained("llama"), explained("gpt2"))


class Changed(nn.Module):
    """`mlp`, with a plant between or in its parts."""

    def __init__(self, plant=None):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.plant = plant
        if plant == "arguments":
            self.norm.eps = 1e-6

    def forward(self, x):
        first, second = self.first, self.second
        if self.plant == "reads":
            first, second = second, first
        x = first(x)
        x = torch.sigmoid(x) if self.plant == "op" else torch.tanh(x)
        if self.plant == "rounding":
            x = x.bfloat16().float()
        if self.plant == "additional":
            x = x + 0.0
        return self.norm(second(x).view(-1, 8))


@pytest.mark.parametrize(
    ("plant", "aspect", "said"),
    [
        ("op", "op", "aten.sigmoid.default"),
        ("arguments", "arguments", "1, 1e-06"),
        ("reads", "reads", "second.weight"),
        ("rounding", "op", "only the second program has"),
        ("additional", "op", "aten.add.Tensor"),
    ],
)
def test_a_planted_change_is_named(plant, aspect, said):
    plain = small(Changed())
    assert compare(plain, small(Changed()))
    result = compare(plain, small(Changed(plant)))
    (difference,) = result.differences
    assert difference.aspect == aspect
    assert said in str(difference)
    assert "test_compare.py:" in difference.where or plant == "arguments"
    assert result.text().startswith(f"not the same numbers; the first {result.steps} steps agree")


@pytest.mark.parametrize(
    ("field", "aspect"), [("order", "order"), ("dtypes", "rounding"), ("op", "op")]
)
def test_another_order_or_rounding_is_named(field, aspect):
    plain, other = small(), small()
    program = other.graphs[0].program
    program[0] = dataclasses.replace(program[0], **{field: "another"})
    result = compare(plain, other)
    assert result.steps == 0
    assert (result.differences[0].aspect, "another" in result.differences[0].second) == (
        aspect,
        True,
    )


def test_what_moves_or_masks_is_no_difference():
    def copied(x):
        return torch.cat([x.softmax(-1).clone(), x.new_empty(0, 8)]).flip(0).contiguous()

    assert compare(small(lambda x: x.softmax(-1)), small(copied))


# ---------------------------------------------------------------------------------- lock files


@pytest.fixture
def locked(tmp_path):
    path = tmp_path / "model.lock"
    Lock.of(small()).write(path)
    return path


def difference(locked, explanation):
    with pytest.raises(errors.LockDiffers) as caught:
        Lock.of(explanation).check(locked)
    assert f"not the numbers of {locked}" in str(caught.value)
    return str(caught.value)


def test_a_lock_holds_for_the_same_program(locked):
    lock = Lock.read(locked)
    again = Lock.of(small(x=torch.randn(9, 8), dynamic=True))
    again.check(locked)
    assert again.digest == lock.digest == json.loads(locked.read_text())["digest"]
    assert compare(locked, small())


def test_a_lock_is_small():
    lock = Lock.of(explained("llama"))
    assert len({json.dumps(s.aspects()) for s in lock.steps}) <= len(lock.steps)


def test_a_changed_pin_is_named(locked):
    torch.set_float32_matmul_precision("high")
    try:
        said = difference(locked, small())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "pin: float32 matmul precision" in said
    assert "highest" in said and "high" in said


def test_a_changed_configuration_of_inductor_is_named(locked, monkeypatch):
    from bicompile import inductor

    monkeypatch.setitem(inductor.PINNED, "emulate_precision_casts", (False, "a plant"))
    assert "pin: inductor emulate_precision_casts" in difference(locked, small())


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_another_version_is_named(package, tmp_path, monkeypatch):
    graphs = small().graphs
    for_gpu = Explanation("mlp", graphs, pins.pins(graphs, "cuda"))
    path = tmp_path / "gpu.lock"
    Lock.of(for_gpu).write(path)
    real = machine.machine
    monkeypatch.setattr(machine, "machine", lambda device="cpu": real(device) | {package: "99.9"})
    changed = Explanation("mlp", graphs, pins.pins(graphs, "cuda"))
    said = difference(path, changed)
    assert f"pin: {package}" in said
    assert "99.9" in said


def test_the_cpu_does_not_depend_on_triton(locked, monkeypatch):
    real = machine.machine
    changes = {"triton": "99.9", "threads": 99, "isa": "AVX9", "transformers": "99.9"}
    monkeypatch.setattr(machine, "machine", lambda device="cpu": real(device) | changes)
    Lock.of(small()).check(locked)


@pytest.mark.parametrize(
    ("file", "family"),
    [("matmul/cpu.cpp", "matmul"), ("norm/cpu.cpp", "norm"), ("common/lanes.h", "matmul")],
)
def test_a_changed_source_is_named(file, family, locked, tmp_path, monkeypatch):
    copy = tmp_path / "kernels"
    shutil.copytree(pins._KERNELS, copy)
    monkeypatch.setattr(pins, "_KERNELS", copy)
    Lock.of(small()).check(locked)
    with (copy / file).open("a") as source:
        source.write("// another order\n")
    assert f"pin: source of {family}" in difference(locked, small())


def test_the_source_of_another_family_is_no_difference(locked, tmp_path, monkeypatch):
    copy = tmp_path / "kernels"
    shutil.copytree(pins._KERNELS, copy)
    monkeypatch.setattr(pins, "_KERNELS", copy)
    for file in ("attention/cpu.cpp", "matmul/gpu.py", "matmul/schedules.py"):
        with (copy / file).open("a") as source:
            source.write("\n")
    Lock.of(small()).check(locked)


def test_a_changed_program_is_named(locked):
    said = difference(locked, small(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))))
    assert "op: " in said and "aten.relu.default" in said


@pytest.mark.parametrize(
    "content",
    [None, "", "{}", '{"format": 99}', "edited"],
    ids=["absent", "empty", "no lock", "of a later version", "edited"],
)
def test_unreadable_lock(content, locked):
    if content is None:
        locked.unlink()
    elif content == "edited":
        locked.write_text(locked.read_text().replace("highest", "high"))
    else:
        locked.write_text(content)
    with pytest.raises(errors.LockUnreadable, match="cannot read the lock file"):
        Lock.of(small()).check(locked)


def test_every_program_locks(tmp_path):
    for name in PROGRAMS:
        path = tmp_path / f"{name}.lock"
        Lock.of(explained(name)).write(path)
        Lock.of(explained(name)).check(path)
        assert path.stat().st_size < 60_000
