"""The bench: bits before times, workers, the course of a race, and a whole run at tiny sizes."""

from __future__ import annotations

import io
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_model import make_tiny_model

from bicompile import cli
from bicompile.bench import cases, ops, processes, race, random_model, real_model, training, worker
from bicompile.bench import sequences as seq
from bicompile.bench.cases import OURS, SMALL, TINY, Case, System
from bicompile.bench.limits import Limits, least_seconds
from bicompile.bench.processes import WorkerFailed
from bicompile.bench.results import Report

EAGER = System("eager", "eager")
RIVAL = "inductor"


def test_a_group_names_its_sizes():
    case = Case("prefill 32x8x16384x128", 1)
    assert (case.kind, case.sizes) == ("prefill", (32, 8, 16384, 128))
    assert (Case("decode", 4).kind, Case("decode", 4).sizes) == ("decode", ())


@pytest.mark.parametrize("suite", [s for both in cases.SUITES.values() for s in both])
def test_the_bits_of_every_timed_case_can_be_compared(suite):
    for cs in (suite.models, suite.ops, suite.training):
        for group, members in cases.by_group(cs):
            assert len({case.batch for case in members}) > 1, group
    assert set(suite.first) <= set(suite.models)


# ---- Workers -------------------------------------------------------------------------------------


def settings(**more):
    course = race.Race("model", "float32", "cpu", SMALL)
    return course.settings(EAGER) | more


def talk(given, requests):
    """What a worker answers to some requests, without a process."""
    replies = []
    lines = io.StringIO("".join(json.dumps({"more": {}} | r) + "\n" for r in requests))
    worker.serve(given, lines, replies.append)
    assert replies.pop(0) == "ready"
    return replies


def test_a_worker_with_the_real_model(tmp_path):
    decode = ["decode", 2]
    first, fastest, rows, peak, failed, again = talk(
        settings(model=str(make_tiny_model(tmp_path))),
        [
            {"do": "first", "case": decode},
            {"do": "sample", "case": decode, "more": {"calls": 2}},
            {"do": "digests", "case": ["prefill", 3]},
            {"do": "memory", "case": None},
            {"do": "digests", "case": ["prefill", -1]},
            {"do": "first", "case": decode},
        ],
    )
    assert first > 0
    assert fastest > 0
    assert len(set(rows)) == 3
    assert peak > 10
    assert "RuntimeError" in failed["error"]
    assert again > 0


def test_decode_starts_again_when_the_cache_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "SLOTS", real_model.CONTEXT + 3)
    work = real_model.RealModel(EAGER, str(make_tiny_model(tmp_path)), "cpu", "float32")
    with torch.no_grad():
        steps = [work.prepare(Case("decode", 1))().clone() for _ in range(4)]
    assert torch.equal(steps[0], steps[3])
    assert not torch.equal(steps[0], steps[1])


def test_a_worker_that_cannot_start_says_why():
    process = processes.Worker(settings(model="/no/such"), "/tmp")
    said = pytest.raises(WorkerFailed, match="eager: ModelNotFound: cannot load the model /no/such")
    with processes.running({"eager": process}), said:
        process.ask("first", Case("decode", 1))


class FakeWorker:
    """Answers with given figures; its rows' bits depend on the batch if it is planted."""

    def __init__(self, seconds=1.0, planted=False, fails_at=None):
        self.seconds = seconds
        self.planted = planted
        self.fails_at = fails_at

    def ask(self, do, case=None, **more):
        if case and case.batch == self.fails_at:
            raise WorkerFailed("out of memory")
        if do == "digests":
            of = case.batch if self.planted else "any"
            return [f"row {i} of {of}" for i in range(case.batch)]
        return self.seconds


GROUP = (Case("mm 8x8", 2, timed=False), Case("mm 8x8", 1), Case("mm 8x8", 4))


def rows_of(rival, ours, group=GROUP):
    course = race.Race("ops", "float32", "cpu", SMALL, rounds=2)
    return list(race.one_group(course, group, {RIVAL: rival, OURS: ours}))


def test_ratios():
    rows = rows_of(FakeWorker(2.0), FakeWorker(1.0))
    assert [row.what for row in rows] == ["mm 8x8 batch 1", "mm 8x8 batch 4"]
    assert [row.figures for row in rows] == [{RIVAL: 2000.0, OURS: 1000.0}] * 2
    assert [row.ratio(RIVAL) for row in rows] == [0.5, 0.5]


def test_no_time_for_wrong_bits():
    rows = rows_of(FakeWorker(2.0), FakeWorker(1.0, planted=True))
    assert [row.figures for row in rows] == [{RIVAL: 2000.0}] * 2
    assert {row.missing[OURS] for row in rows} == {"bits of a row differ at batch 1"}
    assert rows[0].ratio(RIVAL) is None


def test_no_time_where_bits_could_not_be_compared():
    rows = rows_of(FakeWorker(2.0), FakeWorker(1.0, fails_at=2))
    assert [row.missing for row in rows] == [{OURS: "out of memory"}] * 2
    rows = rows_of(FakeWorker(2.0), FakeWorker(1.0, fails_at=4), GROUP[1:])
    why = "only one batch size ran, so that no bits could be compared"
    assert [row.missing for row in rows] == [{OURS: why}, {OURS: "out of memory"}]


def test_one_that_fails_stops_nobody_else():
    rows = rows_of(FakeWorker(2.0, fails_at=4), FakeWorker(1.0))
    assert rows[0].missing == {}
    assert rows[1].missing == {RIVAL: "out of memory"}
    assert rows[1].figures == {OURS: 1000.0}


def test_who_races_on_a_gpu():
    """All compile at once there; each op meets the library that is known for it."""
    course = race.Race("ops", "bfloat16", "cuda", cases.QWEN3, rounds=1)
    fakes = {system.name: FakeWorker() for system in course.systems}
    rows = list(race.groups(course, course.suite.ops, fakes, Console(quiet=True)))
    assert [row.what for row in rows] == [c.name for c in course.suite.ops if c.timed]
    kinds = ("decode", "prefill", "attention_backward")
    rivals = {"mm": {"cublas"}} | {kind: {"flash", "cudnn"} for kind in kinds}
    rivals |= {kind: {"eager"} for kind in ("conv2d", "depthwise")}
    for row in rows:
        assert set(row.figures) - {OURS} == rivals.get(row.case.kind, {"inductor"})
        assert OURS in row.figures


# ---- The random model ----------------------------------------------------------------------------


def test_the_model_has_the_sizes_it_was_asked_for():
    shapes = TINY.shapes
    model = random_model.build(shapes, "cpu", "bfloat16")
    again = random_model.build(shapes, "cpu", "bfloat16")
    layer = model.model.layers[0]
    weights = [layer.mlp.gate_proj, layer.mlp.up_proj]
    assert sum(w.weight.numel() for w in weights) == shapes.hidden * shapes.matmuls["gate_up"][1]
    assert model.lm_head.weight.shape == (shapes.vocabulary, shapes.hidden)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert len(model.model.layers) == shapes.layers


def test_cases_of_the_random_model():
    """A step repeats itself, whatever was timed in between, and row i is one row in every batch."""
    work = random_model.RandomModel(EAGER, TINY.shapes, "cpu", "float64")
    with torch.no_grad():
        for group in ("decode 24", "prefill 8"):
            case = Case(group, 3)
            assert work.first(case) > 0
            before = work.digests(case)
            assert work.sample(case, 3) > 0
            assert work.digests(case) == before
            assert len(set(before)) == 3
            steps = {b: work.hold(Case(group, b))[2][0] for b in (1, 3)}
            logits = {b: work.forward(**step).logits[:1] for b, step in steps.items()}
            torch.testing.assert_close(logits[1], logits[3])  # the order of sums may differ
        work.forget()
        assert not work.held


def test_the_limit_is_the_one_that_was_worked_out_by_hand():
    """Milliseconds for 8 layers at 4.3 TB/s and 790 TFLOP/s."""
    rates = {"bytes": 4.3e12, "operations": 790e12}
    layer = 4096 * (6144 + 4096 + 24576) + 12288 * 4096
    head = 4096 * 151936
    keys = 2 * 128 * 8 * 1025 * 128
    decode = (8 * (layer + keys) + head) * 2 / 4.3e12
    prefill = 8 * (2 * 2048 * layer + 2 * 32 * 128 * 2048 * 2049) / 790e12 + head * 2 / 4.3e12
    for case, seconds in ((Case("decode 1024", 128), decode), (Case("prefill 2048", 1), prefill)):
        assert least_seconds(case, cases.Shapes(), 2, rates) == pytest.approx(seconds)
    assert 1e3 * decode == pytest.approx(2.068, rel=0.05)  # with norms and activations
    assert 1e3 * prefill == pytest.approx(8.87, rel=0.05)


def test_what_the_machine_can_do_is_measured():
    rates = Limits("cpu", "float32").measure(copied=1 << 16, size=64)
    assert 0 < rates["bytes"] < 1e13
    assert 0 < rates["operations"] < 1e15


# ---- Sequences -----------------------------------------------------------------------------------


@pytest.fixture
def served():
    return seq.SequencesWork(EAGER, TINY.shapes, TINY.sequences, "cpu", "float64")


def test_requests_get_what_generate_gives_them(served):
    with torch.no_grad():
        for number, tokens in enumerate(served._serve(range(4), 4)):
            prompt = served.requests[number].prompt
            said = served.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=served.requests[number].wanted,
                eos_token_id=None,
                do_sample=False,
            )
            assert said[0, len(prompt) :].tolist() == tokens


def test_a_step_is_prepared_as_transformers_prepares_it(served):
    with torch.no_grad():
        cache = served._cache(2)
        step, mask = served._prompts(served.requests[:2], cache)
        served.forward(**step)
        token = torch.tensor([5, 6])
        step = served._first_step(step, token, mask)
        served.forward(**step)
        seq._advance(step, token, served.width + 1)
        mask = torch.nn.functional.pad(mask, (0, 2), value=1)
        positions = mask.cumsum(-1)[:, -1:] - 1
        want = random_model.inputs(served.model, token[:, None], cache, mask, positions)
    assert torch.equal(step["position_ids"], want["position_ids"])
    assert step["attention_mask"].keys() == want["attention_mask"].keys()
    for name, made in want["attention_mask"].items():
        assert torch.equal(step["attention_mask"][name], made)


# ---- A whole run ---------------------------------------------------------------------------------


class InProcess:
    """A worker without a process; what goes to and fro is JSON all the same."""

    def __init__(self, given, cache):
        self.settings = json.loads(json.dumps(given))

    def start(self):
        self.work = worker.make_work(self.settings)

    def wait(self):
        pass

    end = wait

    def ask(self, do, case=None, **more):
        request = {"do": do, "case": [case.group, case.batch] if case else None, "more": more}
        with torch.no_grad():
            try:
                return json.loads(json.dumps(worker.answer(self.work, request)))
            except training.OtherBits as error:
                raise WorkerFailed(str(error)) from error


def by_rows(function):
    """An op that cannot see the batch."""

    def call(*inputs):
        batched = [not isinstance(t, torch.nn.Parameter) for t in inputs]
        rows = range(inputs[0].shape[0])
        picked = ([t[i : i + 1] if b else t for t, b in zip(inputs, batched)] for i in rows)  # noqa: B905
        return torch.cat([function(*row) for row in picked])

    return call


def trained_stand_in(forward, planted):
    """A model trained row by row; planted: each step's gradients are other ones."""
    steps = itertools.count(1)

    def call(**step):
        ids = step["input_ids"]
        found = [forward(input_ids=row, labels=row, use_cache=False) for row in ids.split(1)]
        loss = sum(one.loss for one in found) / len(found)
        logits = torch.cat([one.logits for one in found])
        if planted:  # the loss is what it was
            loss = loss.detach() + (loss - loss.detach()) * next(steps)
        return SimpleNamespace(loss=loss, logits=logits)

    return call


def stand_in(forward, planted):
    """A model whose logits follow from the row's last token and position, or also the batch."""

    def call(**step):
        forward(**step)
        row = step["input_ids"][:, -1:] * 31 + step["position_ids"][:, -1:]
        row = (row + (len(row) if planted else 0)) % (TINY.shapes.vocabulary - 3) + 3
        return SimpleNamespace(logits=torch.nn.functional.one_hot(row, TINY.shapes.vocabulary))

    return call


@pytest.mark.parametrize("planted", [False, True])
def test_a_whole_run(planted, tmp_path, monkeypatch, capsys):
    eager = (System(RIVAL, "eager"), System(OURS, "eager"))
    for part in ("model", "ops", "sequences", "training"):
        monkeypatch.setitem(cases.SYSTEMS, ("cpu", part), eager)
    monkeypatch.setattr(race, "Worker", InProcess)

    def under(system, function, owner=None):
        if owner is None:
            return (
                function
                if planted and function.__name__.startswith("softmax")
                else by_rows(function)
            )
        return stand_in(function, planted)

    for module in (ops, random_model, seq):
        monkeypatch.setattr(module, "under", under)
    trained = lambda system, function, owner: trained_stand_in(  # noqa: E731
        function, planted and system.name == OURS
    )
    monkeypatch.setattr(training, "under", trained)
    if planted:
        monkeypatch.setitem(ops.OPS, "softmax", softmax_of_the_batch)
    file = tmp_path / "tiny.json"
    options = ["--suite", "tiny", "--rounds", "1", "--dtype", "float32", "--json", str(file)]
    assert cli.main(["bench", *options]) == int(planted)
    shown = capsys.readouterr().out
    report = Report.load(file)
    rows = {f"{t.split(',')[0]} {r.what}": r for t, rs in report.tables.items() for r in rs}
    assert report.limits["float32"]["bytes"] > 0
    assert rows["model decode 40 batch 2"].figures["limit"] > 0
    assert rows["ops rms_norm 64 batch 5"].ratio(RIVAL) > 0
    assert rows["training second process, peak memory"].ratio(RIVAL) > 0
    (served,) = (r for name, r in rows.items() if " sequences, " in name)
    refused = [name for name, row in rows.items() if OURS in row.missing]
    if not planted:
        assert refused == []
        assert served.ratio(RIVAL) > 0
        assert rows["model decode 24 batch 1"].ratio("limit") > 0
        assert all(rows[f"training {c.name}"].ratio(RIVAL) > 0 for c in TINY.training if c.timed)
        return
    timed = {f"model {c.name}" for c in TINY.models if c.timed}
    timed |= {f"ops {c.name}" for c in TINY.ops if c.timed and c.kind == "softmax"}
    timed |= {f"training {c.name}" for c in TINY.training if c.timed}
    assert set(refused) == timed | {f"sequences {served.what}"}
    assert served.missing[OURS] == "2 of 2 requests get other bits in other company"
    assert "bits of a row differ" in shown
    why = rows["training training 8 batch 1"].missing[OURS]
    assert "differ in a second step: model.embed_tokens.weight" in why


def softmax_of_the_batch(x):
    """Planted: one element of each row knows how many rows there are."""
    y = x.softmax(-1)
    y[:, 0] += len(x)
    return y


@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(tmp_path):
    file = tmp_path / "tiny.json"
    options = ["--device", "cuda", "--suite", "tiny", "--rounds", "1", "--json", str(file)]
    assert cli.main(["bench", *options]) == 0
    for name, rows in Report.load(file).tables.items():
        for row in rows:
            assert OURS in row.figures, f"{name}: {row}"
