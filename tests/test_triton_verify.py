"""`bicompile verify` on the GPU and in the interpreter: what it finds, writes, and what follows."""

import json

import planted_schedules
import pytest
import torch
from triton_set_up import DEVICE, INTERPRET, law, on_device, same

from bicompile import backend, certificate, cli, registry, sweep, verify, verify_text
from bicompile.certificate import Certificate, Machine
from bicompile.kernels.attention import gpu as attention
from bicompile.kernels.common.launch import capability, processors
from bicompile.kernels.matmul import table as matmul

DEPTH = sweep.Depth.SMALL if INTERPRET else sweep.Depth.QUICK
if INTERPRET:
    attention.CHUNK, attention.TILE, attention.MERGE_ROWS = 32, {2: 16, 4: 16}, 128


def machine():
    return Machine.here(-1 if INTERPRET else torch.cuda.current_device())


@on_device
def test_planted_schedules_are_found_and_then_refused(own_certificates):
    results = verify.sweep(["planted_schedules"], DEPTH, verify.default_jobs())
    assert [r.bit_class for r in results] == list(planted_schedules.PLANTED)
    for result, (planted, _) in zip(results, planted_schedules.PLANTED.values(), strict=True):
        (difference,) = result.splits
        assert difference.schedule == repr(planted)
        assert set(result.schedules) - set(result.members) == {repr(planted)}
        text = verify_text.describe(difference)
        assert f"{result.bit_class}: {planted} is not in its class" in text
        assert "first at [" in text and " is not 0x" in text
    verify.certify(results, machine()).write(own_certificates)
    real = matmul.schedules("half", "9.0")[1]
    assert certificate.choose("matmul", "half", real, matmul.SINGLE["half"], tuple) == real
    for result, (planted, _) in zip(results, planted_schedules.PLANTED.values(), strict=True):
        assert (
            certificate.choose(result.family, result.bit_class, planted, "single", tuple)
            == "single"
        )


@on_device
def test_the_command_certifies_this_machine(own_certificates, tmp_path, capsys):
    more = ["--json", str(tmp_path / "seen")]
    if INTERPRET:
        assert cli.main(["verify", "--family", "softmax", "--family", "rope", *more]) == 0
    else:
        assert cli.main(["verify", "--quick", *more]) == 0
        assert not (own_certificates / machine().file).exists()
        assert cli.main(["verify", "--family", "softmax", *more]) == 0
    found = Certificate.read(own_certificates / machine().file)
    seen = json.loads((tmp_path / "seen").read_text())["results"]
    assert {r["family"] for r in seen} == set(found.families)
    for result in seen:
        listing = found.families[result["family"]].classes[result["bit_class"]]
        assert listing.schedules == tuple(result["schedules"])
        assert listing.cases == result["outcome"]["cases"] > 0
    assert "equal bits" in capsys.readouterr().out


@on_device
def test_processes_see_what_one_sees():
    name = verify.modules()["softmax"]  # without a dot: its stand-in is in this process alone
    assert verify.sweep([name], DEPTH, 2) == verify.sweep([name], DEPTH, 1)


@law
def test_the_overload_single_runs_one_schedule(monkeypatch):
    """Also beside the certified one, in one process; and both have the same bits."""
    used = []
    choose = matmul.choose
    monkeypatch.setattr(matmul, "choose", lambda *a: used.append(choose(*a)) or used[-1])
    x, w = (torch.randn(n, 32, device=DEVICE).half() for n in (3, 7))
    mm = registry.load_all()["mm"]
    calls = [mm.op, mm.single, mm.op]
    if INTERPRET:  # no CUDA tensors to dispatch on
        calls = [
            registry._cuda_implementation("mm", mm.family, manager)
            for manager in (registry.nullcontext, certificate.one_schedule, registry.nullcontext)
        ]
    results = [call(x, w.t(), False) for call in calls]
    here = (f(torch.device(DEVICE)) for f in (capability, processors))
    small, single = matmul.ranked("half", *here, 3, 7, 32, False)[-1], matmul.SINGLE["half"]
    assert used == [small, single, small]
    same(results[1], results[0])


@law
@pytest.mark.skipif(INTERPRET, reason="compiles for the GPU")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_models_with_different_options_in_one_process(monkeypatch, mode):
    used = []
    choose = matmul.choose
    monkeypatch.setattr(matmul, "choose", lambda *a: used.append(choose(*a)) or used[-1])
    layer = torch.nn.Linear(64, 48).to(DEVICE, torch.bfloat16)

    def compiled(schedules):
        return torch.compile(
            lambda x: layer(x),
            fullgraph=True,
            backend=lambda gm, x: backend.batch_invariant(
                gm, x, mode=mode, options={"schedules": schedules}
            ),
        )

    x = torch.randn(3, 64, device=DEVICE, dtype=torch.bfloat16)
    seen = {}
    with torch.no_grad():
        for schedules in ("certified", "single"):
            used.clear()
            f = compiled(schedules)
            seen[schedules] = [f(x).clone() for _ in range(4)][-1]
            here = capability(x.device), processors(x.device)
            small = matmul.ranked("half", *here, 3, 48, 64, True)[-1]
            single = matmul.SINGLE["half"]
            assert set(used) == {small if schedules == "certified" else single}
    same(seen["certified"], seen["single"])
