"""What the bench leaves behind: the file, the summary, the page, and what its options refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bicompile import cli
from bicompile.bench import command, page
from bicompile.bench.cases import OURS
from bicompile.bench.results import BETTER, Report, Row, summary
from bicompile.errors import UnsafeSetting

MACHINE = {
    "gpu": "NVIDIA H100",
    "torch": "2.11.0",
    "threads": 1,
    "triton": "3.6.0",
    "transformers": "5.24.0",
    "python": "3.11.7",
}
TABLES = {
    "model, bfloat16": [
        Row("compile, first answer", "s", {"inductor": 60.0, "reduce-overhead": 66.0, OURS: 20.0}),
        Row(
            "decode 1024 batch 1",
            "ms",
            {"inductor": 4.0, "reduce-overhead": 2.0, OURS: 1.0, "limit": 0.5},
        ),
        Row("decode 1024 batch 8", "ms", {"inductor": 4.0, OURS: 8.0, "limit": 4.0}),
        Row("prefill 2048 batch 1", "ms", {"inductor": 4.0}, missing={OURS: "bits differ"}),
    ],
    "ops, bfloat16": [
        Row("mm 8x8 batch 128", "ms", {"cublas": 1.0, OURS: 0.5}),
        Row("mm 8x8 batch 256", "ms", {"cublas": 1.0, OURS: 1.5}),
        Row("mm 8x8 batch 200", "ms", {"cublas": 1.0, OURS: 2.5}),
        Row("decode 2x1x8x4 batch 1", "ms", {"flash": 2.0, OURS: 1.0}, missing={"cudnn": "no"}),
    ],
    "sequences, bfloat16": [Row("9 sequences, 90 tokens", "s", {"inductor": 4.0, OURS: 1.0})],
}


def report(path):
    rates = {"bfloat16": {"bytes": 2.9e12, "operations": 7e14}}
    return Report("qwen3-8b", MACHINE, ["bicompile bench --device cuda"], rates, TABLES, path)


def test_the_summary_is_what_the_rows_say():
    found = {(r.table.partition(",")[0], r.what, r.base): r for r in summary(TABLES)}
    decode = found["model", "decode", BETTER]
    assert (decode.cases, decode.worst, decode.worst_case) == (2, 2.0, "decode 1024 batch 8")
    assert decode.mean == pytest.approx((0.5 * 2.0) ** 0.5)
    assert found["model", "decode", "reduce-overhead"].cases == 1
    assert found["model", "decode", "limit"].mean == pytest.approx(2.0)
    assert found["ops", "mm, M <= 128", "cublas"].worst == 0.5
    assert found["ops", "mm, M > 128", "cublas"].worst == 1.5
    assert found["ops", "mm, M no power of two", "cublas"].worst == 2.5
    assert found["sequences", "sequences", "inductor"].mean == 0.25
    assert not any(what == "prefill" or "compile" in what for _, what, _ in found)


def test_every_row_is_in_the_file_at_once(tmp_path):
    file = tmp_path / "bench.json"
    begun = Report.open(file, "tiny", MACHINE)
    begun.note("bicompile bench")
    begun.start("model, bfloat16")
    for i, row in enumerate(TABLES["model, bfloat16"], 1):
        begun.add("model, bfloat16", row)
        assert Report.load(file).tables["model, bfloat16"] == TABLES["model, bfloat16"][:i]
    again = Report.open(file, "tiny", MACHINE)
    again.note("bicompile bench")
    again.start("ops, bfloat16")
    again.add("ops, bfloat16", TABLES["ops, bfloat16"][0])
    assert set(Report.load(file).tables) == {"model, bfloat16", "ops, bfloat16"}
    assert Report.load(file).commands == ["bicompile bench"]
    again.start("model, bfloat16")
    again.add("model, bfloat16", TABLES["model, bfloat16"][0])
    assert len(Report.load(file).tables["model, bfloat16"]) == 1


@pytest.mark.parametrize(
    ("suite", "machine"), [("small", MACHINE), ("tiny", MACHINE | {"torch": "2.13.0"})]
)
def test_figures_of_two_machines_never_stand_in_one_file(tmp_path, suite, machine):
    file = tmp_path / "bench.json"
    Report("tiny", MACHINE, path=file).save()
    before = file.read_text()
    with pytest.raises(UnsafeSetting, match="it holds figures of another"):
        Report.open(file, suite, machine)
    assert file.read_text() == before


def test_the_page_of_a_gpu(tmp_path):
    file = tmp_path / "bench-h100.json"
    report(file).save()
    shown = tmp_path / "performance.md"
    assert cli.main(["bench", "--page", str(shown), str(file)]) == 0
    text = shown.read_text()
    for line in (
        "## NVIDIA H100, torch 2.11.0, 1 CPU threads",
        "bicompile bench --device cuda",
        "![ratios by batch size](bench-h100.svg)",
        "2.9 TB/s copied, 700 TFLOP/s in bfloat16",
        "| model, bfloat16: decode | better mode | 2 | 1.00 | 2.00 | decode 1024 batch 8 |",
        "| decode 1024 batch 1 (ms) | 4 | 2 | 0.5 | 1 | 0.50 | 2.00 |",
        "| prefill 2048 batch 1 (ms) | 4 | - | - | - | - | - |",
        "prefill 2048 batch 1, bicompile: bits differ",
        "| 9 sequences, 90 tokens (s) | 4 | 1 | 0.25 |",
    ):
        assert line in text
    assert (tmp_path / "bench-h100.svg").read_text().count("time of bicompile / the best") == 3
    assert text == page.render(shown, [file])


def test_a_file_without_batch_sizes_has_no_plot(tmp_path):
    file, shown = tmp_path / "bench.json", tmp_path / "performance.md"
    of_sequences = {n: t for n, t in report(file).tables.items() if n.startswith("sequences")}
    Report("tiny", MACHINE, tables=of_sequences, path=file).save()
    assert cli.main(["bench", "--page", str(shown), str(file)]) == 0
    assert "| 9 sequences, 90 tokens (s) | 4 | 1 | 0.25 |" in shown.read_text()
    assert "![" not in shown.read_text() and not (tmp_path / "bench.svg").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "sequences"], "suite small has none"),
        (["--suite", "tiny", "--model", "x"], "the model of suite tiny has random weights"),
        (["--page", "docs/performance.md"], "no file of the bench follows"),
        (["--page", "docs/performance.md", "absent.json"], "there is no absent.json"),
    ],
)
def test_refusals(options, said, capsys):
    assert cli.main(["bench", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_file_names_the_command():
    line = "bicompile bench --device cuda --only ops --only model --rounds 3 --json a.json --quick"
    args = cli.make_parser().parse_args(line.split()[1:])
    assert command(args) == line
    assert command(cli.make_parser().parse_args(["bench"])) == "bicompile bench"


def test_the_figures_in_docs_are_whole():
    for file in (Path(__file__).parent.parent / "docs").glob("bench-*.json"):
        assert json.loads(file.read_text()).keys() >= {"suite", "machine", "commands", "tables"}
        assert Report.load(file).commands
