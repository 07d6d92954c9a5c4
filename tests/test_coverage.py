"""docs/coverage.md says what the survey found, of every op and rule; some of it is found again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from rewriting import x

from bicompile import cli, coverage, native, registry, testing
from bicompile.coverage import checks, models, ops, page
from bicompile.coverage.results import CLASSES, FAILED, UNUSED, OnGpu, Results, first_line
from bicompile.coverage.zoo import ZOO, Entry
from bicompile.passes.rules import RULES

ROOT = Path(__file__).parent.parent
RESULTS = Results.load(ROOT / "docs" / "coverage.json")
PAGE = (ROOT / "docs" / "coverage.md").read_text()
AGAIN = [
    name
    for name in sorted(RESULTS.ops)[::67]
    if name in ops.database()
    and not any("any size" in r for r in RESULTS.ops[name]["float32"].reasons)
]


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


def test_the_page_shows_the_results():
    """After a change: bicompile coverage --only [NAME ...] --json FILE --page FILE."""
    assert page.render(RESULTS) == PAGE


def test_every_kernel_and_every_rule_stands_on_the_page():
    for kernel in registry.load_all():
        assert f"`{kernel}`" in PAGE, kernel
    for target in RULES:
        assert f"| `{target}` |" in PAGE, target


def test_every_operation_is_classified():
    known = set(ops.names())
    assert len(known & set(RESULTS.ops)) > 600
    assert {RESULTS.verdict(name) for name in RESULTS.ops} <= set(CLASSES)


def test_every_model_is_classified():
    assert set(RESULTS.models) == set(ZOO)
    assert len(ZOO) >= 60
    assert {found.verdict for found in RESULTS.models.values()} <= set(CLASSES)


@pytest.mark.parametrize("name", AGAIN)
def test_some_operations_are_judged_again(name):
    found, shown = ops.judge(name)["float32"], RESULTS.ops[name]["float32"]
    assert (found.verdict, found.samples) == (shown.verdict, shown.samples)


def test_the_command_continues_a_file(tmp_path, capsys):
    file, shown = tmp_path / "found.json", tmp_path / "found.md"
    RESULTS.save(file)
    command = ["coverage", "--ops", "--only", "floor", "--json", str(file), "--page", str(shown)]
    assert cli.main(command) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{len(RESULTS.ops)} operations: invariant" in told
    assert "floor" in told and "deterministic only" in told and "refused" in told
    found = Results.load(file)
    assert found.ops["floor"]["bfloat16"].checks
    assert {n for n in found.ops if found.ops[n] != RESULTS.ops[n]} <= {"floor"}
    assert "| `floor` |" in shown.read_text()


def test_what_holds_is_run_again_on_a_gpu(tmp_path, monkeypatch, capsys):
    file, shown = tmp_path / "found.json", tmp_path / "found.md"
    before = copy.deepcopy(RESULTS)
    for result in (*before.models.values(), *(r for d in before.ops.values() for r in d.values())):
        result.gpu = None
    before.save(file)
    asked = []

    def each(function, tasks, **how):
        for task in tasks:
            assert how["device"] == task[-1] == "cuda"
            asked.append(task[:-1])
            if task[0] == "MLP":
                yield task, RESULTS.models["MLP"]
            else:
                yield task, RuntimeError("misaligned") if task[1] == "bfloat16" else ["value"]

    monkeypatch.setattr(coverage.pool, "each", each)
    monkeypatch.setattr(coverage, "check_device", lambda device: None)
    monkeypatch.setattr(coverage, "machine", lambda device: {})
    monkeypatch.setattr(coverage, "title", lambda found: "a GPU")
    names = ["floor", "MLP", "FNet"]  # the last is refused on the CPU
    command = ["coverage", "--device", "cuda", "--only", *names, "--json", str(file)]
    assert cli.main([*command, "--page", str(shown)]) == 1
    assert {task[0] for task in asked} == {"floor", "MLP"}
    found = Results.load(file)
    assert found.gpu == "a GPU" and found.on_gpu("floor") == FAILED
    assert found.ops["floor"]["float32"].gpu == OnGpu(checks=["value"])
    assert found.ops["floor"]["float32"].checks == RESULTS.ops["floor"]["float32"].checks
    assert found.models["MLP"].gpu.checks == RESULTS.models["MLP"].checks
    assert "1 models on a GPU: invariant 1" in " ".join(capsys.readouterr().out.split())
    text = shown.read_text()
    assert "on a GPU: RuntimeError: misaligned" in text and "| the same |" in text


def test_moved_tensors_keep_their_layout():
    t = testing.LAYOUTS["misaligned"](x(3, 5)).t()
    (moved,) = checks.moved([t], "meta")
    assert moved.device.type == "meta"
    assert (moved.stride(), moved.storage_offset()) == (t.stride(), t.storage_offset())
    assert t.storage_offset() > 0


# ------------------------------------------------------------------------- the checks can fail


def rows(x):
    return x.amax(-1, keepdim=True) + x


def mean_of_the_batch(x):
    return rows(x) + 0 * x.mean()


def depends_on_the_batch_size(x):
    return rows(x) * (1 + 1e-6 * len(x))


def depends_on_the_place(x):
    return rows(x) * (1 + 1e-6 * torch.arange(len(x))[:, None])


def depends_on_strides(x):
    return rows(x) * (1 + 1e-6 * x.stride(0))


VARIANTS = {
    mean_of_the_batch: "neighbours",
    depends_on_the_batch_size: "rows",
    depends_on_the_place: "rows",
    depends_on_strides: "reversed strides",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_planted_variants_are_caught(variant, monkeypatch):
    """What is compiled behaves otherwise than the function says."""
    x = torch.randn(5, 7)
    monkeypatch.setattr(checks, "assert_right", lambda *_: None)
    monkeypatch.setattr(checks, "_compiled", lambda *_, **__: variant)
    with pytest.raises(testing.InvarianceViolation, match=VARIANTS[variant]):
        checks.check(rows, [x])


def test_a_wrong_value_is_caught(monkeypatch):
    monkeypatch.setattr(checks, "_compiled", lambda *_, **__: lambda x: rows(x) + 1e-4)
    with pytest.raises(AssertionError, match="relative error"):
        checks.check(rows, [torch.randn(5, 7)])


def test_what_pytorch_has_not_on_a_device_is_no_failure():
    def absent(x):
        raise NotImplementedError("\"absent\" not implemented for 'BFloat16'")

    with pytest.raises(checks.NotThere, match="not implemented") as told:
        checks.check(absent, [torch.randn(3)])
    assert coverage._on_gpu(told.value).verdict == UNUSED
    with pytest.raises(checks.NotThere, match="has it not"):
        ops.check("an operation of a later release", "float32", 0)


def test_what_pytorch_cannot_trace_is_no_failure(monkeypatch):
    """A failure of ours alone is one."""
    found = checks.check(lambda x: torch.view_copy(x, (35,)), [torch.randn(5, 7)])
    assert "alignment" in found
    assert "strides" not in found

    def fails(*_):
        raise ValueError("ours")

    monkeypatch.setattr(checks, "_compiled", lambda *_, **__: fails)
    with pytest.raises(ValueError, match="ours"):
        checks.check(rows, [torch.randn(5, 7)])
    with pytest.raises(checks.NotThere, match="PyTorch cannot trace it: ValueError: ours"):
        checks.check(lambda x: x if x.sum() > 0 else -x, [torch.randn(5, 7)])


def test_the_cause_is_told_where_a_backend_failed():
    told = RuntimeError("BackendCompilerFailed: backend='ours' raised:\nValueError: the cause\n")
    assert first_line(told) == "RuntimeError: ValueError: the cause"


def test_rows_are_found_where_they_are():
    found = checks.find_rows(lambda a, b: a @ b, [torch.randn(3, 4), torch.randn(4, 5)])
    assert (found.size, found.inputs, found.outputs) == (5, (None, 1), (1,))
    assert checks.find_rows(lambda x: x.softmax(0), [torch.randn(4)]) is None


class Planted(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "verdict", "reason"),
    [
        (rows, "invariant", ""),
        (lambda x: torch.linalg.pinv(x) @ x, "refused", "linalg"),
        (lambda x: x - x.mean(0), FAILED, "other bits"),
        (lambda x: x.log().log(), FAILED, "no finite numbers"),
    ],
    ids=["good", "refused", "mixes rows", "vacuous"],
)
def test_models_are_judged(function, verdict, reason, monkeypatch):
    entry = Entry("planted", lambda: Planted(function), lambda _, b: {"x": torch.randn(b, 7)})
    monkeypatch.setitem(ZOO, "planted", entry)
    found = models.check("planted")
    assert found.verdict == verdict
    assert reason in found.reason
