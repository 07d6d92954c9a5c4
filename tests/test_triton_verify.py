"""`bicompile verify` on the GPU and in the interpreter: what it finds, writes, and what follows."""

import json

import planted_schedules
import torch
from triton_set_up import INTERPRET, on_device

from bicompile import certificate, cli, sweep, verify
from bicompile.certificate import Certificate, Machine
from bicompile.kernels.attention import gpu as attention
from bicompile.kernels.matmul import schedules as matmul

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
        text = verify.describe(difference)
        assert f"{result.bit_class}: {planted} is not in its class" in text
        assert "first at [" in text and " is not 0x" in text
    verify.certify(results, machine()).write(own_certificates)
    real = matmul.TABLE["half"][0][1]
    assert certificate.choose("matmul", "half", real, matmul.SINGLE["half"]) == real
    for result, (planted, _) in zip(results, planted_schedules.PLANTED.values(), strict=True):
        assert certificate.choose(result.family, result.bit_class, planted, "single") == "single"


@on_device
def test_the_command_certifies_this_machine(own_certificates, tmp_path, capsys):
    more = ["--json", str(tmp_path / "seen")]
    if INTERPRET:
        assert cli.main(["verify", *more]) == 0
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
