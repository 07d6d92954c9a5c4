"""Certificates: what is refused, what is used without one, and what the user is told."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import threading
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

import bicompile
from bicompile import certificate, cli, registry, sweep, verify
from bicompile.certificate import Certificate, Family, Listing, Machine, choose
from bicompile.errors import DamagedCertificate
from bicompile.kernels.attention import gpu as attention_gpu
from bicompile.kernels.attention import schedules as attention
from bicompile.kernels.attention import table as attention_table
from bicompile.kernels.convolution import schedules as convolution
from bicompile.kernels.matmul import table as matmul
from bicompile.kernels.matmul.schedules import kinds
from bicompile.kernels.reduce import table as rows
from bicompile.kernels.reduce.rows import row_schedule
from bicompile.kernels.rope import schedules as rope
from bicompile.options import Options
from bicompile.passes.schedule import schedule
from bicompile.pipeline import Run
from bicompile.report import Report

H100 = Machine("NVIDIA H100 80GB HBM3", "9.0", "3.6.0", "2.11.0")
SINGLE = matmul.SINGLE["half"]
LISTED = matmul.schedules("half", "9.0")[1]
UNLISTED = dataclasses.replace(LISTED, warps=8)


@pytest.fixture(autouse=True)
def h100(own_certificates, monkeypatch):
    """This machine passes for an H100; returns its folder of certificates."""
    monkeypatch.setattr(certificate, "_device", lambda: 0)
    monkeypatch.setattr(Machine, "here", lambda device: H100)
    return own_certificates


def make(machine=H100, family="matmul", bit_class="half", sources=None):
    listing = Listing((repr(SINGLE), repr(LISTED)), 100, "0123")
    found = Family(sources or certificate.sources(family), {bit_class: listing})
    return Certificate(machine, {family: found}, {"driver": "580.1"})


def chosen(wanted=LISTED, bit_class="half"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return choose("matmul", bit_class, wanted, SINGLE, tuple)


def test_round_trip(h100):
    path = make().write(h100)
    assert path.name == "nvidia-h100-80gb-hbm3-sm9.0-triton3.6.0-torch2.11.0.json"
    assert Certificate.read(path) == make()


def test_what_is_listed_is_used_and_nothing_else(h100, recwarn):
    make().write(h100)
    assert choose("matmul", "half", LISTED, SINGLE, tuple) == LISTED
    assert choose("matmul", "half", UNLISTED, SINGLE, tuple) == SINGLE
    assert not recwarn.list


def test_the_last_before_it_serves_for_what_is_not_listed(h100):
    make().write(h100)
    beyond = dataclasses.replace(UNLISTED, stages=UNLISTED.stages + 1)
    for table, expected in (
        ((SINGLE, LISTED, UNLISTED), LISTED),
        ((SINGLE, LISTED, beyond, UNLISTED), LISTED),
        ((LISTED, SINGLE, UNLISTED), SINGLE),
        ((beyond, UNLISTED, LISTED), SINGLE),
    ):
        assert choose("matmul", "half", UNLISTED, SINGLE, lambda t=table: t) == expected


@pytest.mark.filterwarnings("ignore:no certificate covers")
def test_tables_ask_the_certificate(h100):
    few, many = (("half", "9.0", 132, m, 4096, 4096, True) for m in (1, 1_000_000))
    assert chosen() == matmul.schedule(*many) == SINGLE
    make().write(h100)
    assert matmul.schedule(*few) == matmul.schedule(*many) == LISTED
    assert row_schedule(torch.empty(1_000_000, 50, device="meta")) == rows.TABLE[1].single
    assert attention_gpu._schedule(2, 128, 1, "9.0") == attention.SINGLE[2, 128]
    assert attention_table.splits(1, 8, 1024) and not attention_gpu._split(1, 8, 1024)


def test_unknown_machine_is_told_once(h100):
    with pytest.warns(UserWarning) as told:
        assert choose("matmul", "half", LISTED, SINGLE, tuple) == SINGLE
        assert choose("matmul", "half", UNLISTED, SINGLE, tuple) == SINGLE
        assert (
            choose("reduce", "blocks", rows.LONG.many, rows.LONG.single, tuple) == rows.LONG.single
        )
    (text,) = {str(w.message) for w in told.list}
    assert len(told.list) == 1
    assert f"there is no certificate for {H100}" in text
    assert "run `bicompile verify` on it once" in text


def test_single_schedule_needs_no_certificate(recwarn):
    assert choose("matmul", "half", SINGLE, SINGLE, tuple) == SINGLE
    assert not recwarn.list


CHANGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "emptied": lambda text: "",
    "no object": lambda text: "[]",
    "a schedule added": lambda text: text.replace(repr(LISTED), repr(UNLISTED)),
    "another source": lambda text: text.replace(certificate.sources("matmul"), "0" * 64),
    "without checksum": lambda text: text.replace('"checksum"', '"sum"'),
    "a note": lambda text: text.replace("580.1", "580.2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_certificate_is_refused(h100, change):
    path = make().write(h100)
    text = path.read_text()
    path.write_text(CHANGES[change](text))
    assert path.read_text() != text
    for _ in range(2):  # the second launch finds no way around it
        with pytest.raises(DamagedCertificate) as caught:
            choose("matmul", "half", LISTED, SINGLE, tuple)
        assert f"the certificate {path} is refused" in str(caught.value)
        assert "remove the file" in str(caught.value)


def test_the_certificate_of_another_machine_is_refused(h100):
    path = make(dataclasses.replace(H100, gpu="NVIDIA H200")).write(h100)
    path.rename(h100 / H100.file)
    with pytest.raises(DamagedCertificate, match="written for another machine: NVIDIA H200"):
        choose("matmul", "half", LISTED, SINGLE, tuple)


def test_a_later_format_is_refused(h100, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(certificate, "FORMAT", 2)
        make().write(h100)
    with pytest.raises(DamagedCertificate, match="its format is 2, not 1"):
        choose("matmul", "half", LISTED, SINGLE, tuple)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Machine)])
def test_each_part_of_the_machine_counts(h100, field):
    make(dataclasses.replace(H100, **{field: "other"})).write(h100)
    assert chosen() == SINGLE
    make().write(h100)
    assert chosen() == LISTED


def test_the_driver_does_not_count(h100):
    dataclasses.replace(make(), notes={"driver": "999"}).write(h100)
    assert chosen() == LISTED


def test_a_change_of_the_sources_ends_a_certificate(h100, tmp_path, monkeypatch):
    folder, found = tmp_path / "kernels", {}
    certificate._collect(certificate.KERNELS / "matmul" / "gpu.py", found)
    assert {"matmul/tiles.py", "matmul/schedules.py", "common/launch.py"} < set(found)
    assert "matmul/table.py" not in found
    for name in map(str, found):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((certificate.KERNELS / name).read_bytes())
    before = certificate.sources("matmul")
    monkeypatch.setattr(certificate, "KERNELS", folder)
    certificate.forget()
    assert certificate.sources("matmul") == before
    make().write(h100)
    assert chosen() == LISTED
    for name in ("matmul/gpu.py", "matmul/schedules.py", "common/trees.py"):
        text = (folder / name).read_text()
        (folder / name).write_text(text + "# changed\n")
        certificate.forget()
        with pytest.warns(UserWarning, match="of other sources of the matmul kernels"):
            assert choose("matmul", "half", LISTED, SINGLE, tuple) == SINGLE
        (folder / name).write_text(text)


def test_sources_are_what_the_kernels_import():
    found = {}
    certificate._collect(certificate.KERNELS / "norm" / "gpu.py", found)
    common = {f"common/{name}.py" for name in ("blocks", "launch", "room", "trees")}
    assert {"norm/gpu.py", "reduce/rows.py", "reduce/schedules.py", *common} == set(found)
    certificate._collect(certificate.KERNELS / "softmax" / "gpu.py", found)
    assert "reduce/parts.py" in found


def test_a_family_or_class_that_was_not_swept_is_not_certified(h100):
    make(family="softmax", bit_class="blocks").write(h100)
    with pytest.warns(UserWarning, match="no certificate covers the matmul kernels"):
        assert choose("matmul", "half", LISTED, SINGLE, tuple) == SINGLE
    make(bit_class="ieee").write(h100)
    with pytest.warns(UserWarning, match="does not cover matmul kernels of class half"):
        assert choose("matmul", "half", LISTED, SINGLE, tuple) == SINGLE


def test_what_the_user_found_comes_before_what_the_package_brings(h100):
    make().write(certificate.PACKAGED)
    assert chosen() == LISTED
    alone = Listing((repr(SINGLE),), 100, "0123")
    only = Family(certificate.sources("matmul"), {"half": alone})
    Certificate(H100, {"matmul": only}).write(h100)
    assert chosen() == SINGLE
    make(sources="outdated").write(h100)
    assert chosen() == LISTED


def test_one_schedule_holds_for_its_thread_alone(h100):
    make().write(h100)
    seen = []
    with certificate.one_schedule():
        assert chosen() == SINGLE
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == [LISTED]
    assert chosen() == LISTED


def test_packaged_certificates_are_whole():
    folder = certificate.Path(certificate.__file__).parent / "certificates"
    for path in folder.glob("*.json"):
        assert Certificate.read(path).families


def test_every_table_is_swept():
    """A bit class that nobody sweeps would never be certified."""
    swept = {
        (c.family, c.name): {c.single, *c.others}
        for module in verify.modules().values()
        for c in sweep.classes(module, sweep.Depth.FULL)
    }
    tables = {("attention", "split"): {False, True}, ("rope", "heads"): set(rope.TABLE)}
    for kind in kinds("9.0"):
        tables["matmul", kind] = set(matmul.schedules(kind, "9.0"))
        if kind in convolution.SINGLE:
            tables["convolution", kind] = set(convolution.schedules(kind))
    for at, single in attention.SINGLE.items():
        tables["attention", attention.bit_class(*at)] = {
            single,
            *attention_table.schedules(at, "9.0"),
        }
    for family in ("reduce", "softmax", "norm"):
        for entry in (*rows.TABLE, rows.LONG):
            tables[family, entry.name] = set(entry.schedules(cut=family != "norm"))
    assert swept == tables


def test_every_kernel_is_swept():
    swept = {
        (c.family, p.name.split()[0])
        for module in verify.modules().values()
        for c in sweep.classes(module, sweep.Depth.FULL)
        for p in c.problems
    }
    for kernel in registry.load_all().values():
        gpu = importlib.import_module(f"bicompile.kernels.{kernel.family}.gpu")
        if "chosen" in inspect.signature(getattr(gpu, kernel.name)).parameters:
            assert (kernel.family, kernel.name) in swept
    assert not certificate.chooses("sort") and certificate.chooses("softmax")


@pytest.mark.parametrize("family", verify.modules())
def test_a_quick_sweep_leaves_out_no_class_and_a_full_one_no_problem_of_it(family):
    module = verify.modules()[family]
    quick, full = (
        {(c.family, c.name): c for c in sweep.classes(module, depth)}
        for depth in (sweep.Depth.QUICK, sweep.Depth.FULL)
    )
    assert quick.keys() == full.keys()
    for name, bit_class in quick.items():
        assert 0 < len(bit_class.problems) <= len(full[name].problems)
        names = [p.name for p in full[name].problems]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("values", sweep.VALUES)
def test_values_are_what_their_name_says(values):
    def draw(dtype, name="x"):
        problem = sweep.Problem(name, dtype, ((64, 512), None, (512,)), lambda x, s: None)
        return sweep.make(problem, values, "cpu")

    x, absent, w = draw(torch.bfloat16)
    assert absent is None
    assert x.dtype is w.dtype is torch.bfloat16
    assert x.view(torch.int16).equal(draw(torch.bfloat16)[0].view(torch.int16)), "same every time"
    assert not x.view(torch.int16).equal(draw(torch.bfloat16, "y")[0].view(torch.int16))
    assert w.isfinite().all()
    size = x.abs()[x != 0]
    facts = {
        "random": x.isfinite().all() and (x == 0).any(),
        "cancelling": (size == 1024).any() and size.min() < 1 and abs(x.double().mean()) < 50,
        "wide": size.max() / size.min() > 2.0**90,
        "subnormal": (size < torch.finfo(x.dtype).tiny).any(),
        "special": all(f(x).any() for f in (torch.isnan, torch.isposinf, torch.isneginf))
        and x.isfinite().all(1).any(),
        "ties": (x[x == 0].view(torch.int16) < 0).any() and size.max() <= 0.75,
    }
    assert facts[values]


def graph_on(device, **options):
    """The targets of a small graph after the pass."""
    with FakeTensorMode():
        x, w = torch.empty(3, 4, device=device), torch.empty(4, 5, device=device)
        gm = make_fx(lambda x, w: torch.ops.bicompile.mm.default(x, w, False).relu())(x, w)
    run = Run(Options.parse(options), Report("test"))
    for _ in range(2):
        schedule(gm, run=run)
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_the_option_is_part_of_the_graph():
    mm, single, relu = "bicompile.mm.default", "bicompile.mm.single", "aten.relu.default"
    assert graph_on("cuda") == graph_on("cuda", schedules="certified") == [mm, relu]
    assert graph_on("cuda", schedules="single") == [single, relu]
    assert graph_on("cpu", schedules="single") == [mm, relu]


def test_the_option_changes_nothing_on_the_cpu():
    layer, x = torch.nn.Linear(64, 48), torch.randn(3, 64)
    with torch.no_grad():
        compiled = [
            bicompile.compile(lambda x: layer(x), options={"schedules": schedules})(x)
            for schedules in ("certified", "single")
        ]
    assert torch.equal(*compiled)


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["verify"]) == 2
    shown = capsys.readouterr().err
    assert "GpuNotFound" in shown and "PyTorch sees no NVIDIA GPU" in shown


def test_checksum_covers_everything(h100):
    path = make().write(h100)
    content = json.loads(path.read_text())
    assert set(content) == {"format", "machine", "families", "notes", "checksum"}
