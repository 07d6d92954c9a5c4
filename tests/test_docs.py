"""README, docs and examples are executed, and what they show is what comes out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bicompile.bench import page, plot
from bicompile.bench.results import Report, summary
from bicompile.testing import PROPERTIES, InvarianceViolation

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def blocks(text, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def execute(*arguments):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ELSEWHERE = ("on_policy_rl.py", "quickstart.py")  # have tests of their own
LONG = ("third_party_model.py",)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(p, marks=pytest.mark.soak if p.name in LONG else [])
        for p in EXAMPLES
        if p.name not in ELSEWHERE
    ],
    ids=lambda p: p.name,
)
def test_example_runs(example):
    assert execute(example)


def test_readme_shows_the_quickstart():
    program = blocks(README, "python")[0]
    source = (ROOT / "examples" / "quickstart.py").read_text()
    assert source.split('"""\n', 1)[1].strip() == program.strip()


def test_readme_shows_real_output():
    """How many numbers differ by default depends on the machine; that ours do not, does not."""
    shown = blocks(README, "")[0].splitlines()
    real = execute(ROOT / "examples" / "quickstart.py").splitlines()
    assert len(shown) == len(real) == 2
    assert re.sub(r"\d+ of", "n of", shown[0]) == re.sub(r"\d+ of", "n of", real[0])
    assert shown[1] == real[1] == "batch_invariant: 0 of 512 numbers of the row differ"


def test_testing_names_every_property():
    page = (ROOT / "docs" / "testing.md").read_text()
    assert re.findall(r"^\| `([\w ]+)` \|", page, re.MULTILINE) == list(PROPERTIES)


def test_testing_shows_real_output():
    """Which elements differ, and by how much, depends on the machine."""
    page = (ROOT / "docs" / "testing.md").read_text()
    with pytest.raises(InvarianceViolation) as caught:
        exec(blocks(page, "python")[0], {})

    def words(text):
        return re.sub(r"0x\w+|-?\d[\w.+]*", "n", text).splitlines()

    assert words(blocks(page, "")[0].strip()) == words(str(caught.value))


def test_programs_about_testing_run():
    """But for the first, which fails and is compared above."""
    for block in blocks((ROOT / "docs" / "testing.md").read_text(), "python")[1:]:
        execute("-c", block)


def test_readme_states_the_measured_cost():
    """In the order of the sentence: decoding at batch 1, then 16, each in bfloat16 and float32."""
    tables = json.loads((ROOT / "docs" / "bench-cpu.json").read_text())["tables"]
    (cost,) = (line for line in README.splitlines() if line.startswith("Cost:"))
    stated = re.findall(r"\b0\.\d\d\b", cost)
    measured = [
        f"{row['figures']['bicompile'] / row['figures']['inductor']:.2f}"
        for batch in (1, 16)
        for dtype in ("bfloat16", "float32")
        for row in tables[f"model, {dtype}"]
        if row["what"] == f"decode batch {batch}"
    ]
    assert stated == measured


def test_readme_states_what_a_gpu_takes():
    """Decoding at batch 1, 8, 32 and 128; the least and the most of prompts."""
    (table,) = Report.load(ROOT / "docs/bench-h200.json").tables.values()
    ratios = {row.what: row.ratio("inductor", "reduce-overhead") for row in table}
    prompts = [ratio for what, ratio in ratios.items() if what.startswith("prefill")]
    decoding = [ratios[f"decode 1024 batch {batch}"] for batch in (1, 8, 32, 128)]
    (line,) = (line for line in README.splitlines() if line.startswith("On an H200:"))
    measured = [f"{ratio:.2f}" for ratio in (*decoding, min(prompts), max(prompts))]
    assert re.findall(r"\b[01]\.\d\d\b", line) == measured


def test_the_performance_page_shows_the_figures_of_the_bench(monkeypatch):
    """After a new run: bicompile bench --page docs/performance.md docs/bench-*.json."""
    monkeypatch.chdir(ROOT)
    files = sorted(Path("docs").glob("bench-*.json"))
    shown = Path("docs/performance.md")
    assert shown.read_text() == page.render(shown, files)
    for file in files:
        if plot.panels(Report.load(file).tables):
            assert plot.identity(file) in page.plot_of(shown, file).read_text()


def test_the_limits_are_those_of_the_bench():
    """Of docs/limits.md the two tables of goals."""
    rows = {}
    for name in ("", "-ops", "-sequences"):
        tables = Report.load(ROOT / f"docs/bench-h200{name}.json").tables
        rows |= {r.what: r for table in tables.values() for r in table}
        if name == "-ops":
            ops = {
                (s.what, s.base): f"mean {s.mean:.2f}, worst {s.worst:.2f}" for s in summary(tables)
            }
    text = (ROOT / "docs/limits.md").read_text()
    for what, reached, default, ours in re.findall(
        r"\| ((?:decode|prefill|1000|compile|second|peak)[^|]+)"
        r" \| [\d.]+ \| ([\d.]+) \| (\S+) \| (\S+) \|",
        text,
    ):
        row = rows[what]
        ratio = row.ratio("inductor", "reduce-overhead")
        assert reached == f"{ratio:.2f}", what
        if "limit" in row.figures:
            of_limit = row.ratio("limit")
            assert (default, ours) == (f"{of_limit / ratio:.2f}", f"{of_limit:.2f}"), what
    stated = re.findall(r"\| (\S[^|]+) \| [^|]+ \| (mean [\d.]+, worst [\d.]+) \|", text)
    kinds = [
        ("mm, M <= 128", "cublas"), ("mm, M > 128", "cublas"), ("decode", "flash"),
        ("prefill", "flash"), *((n, "inductor") for n in ("rms_norm", "softmax", "log_softmax")),
    ]  # fmt: skip
    assert [figures for _, figures in stated] == [ops[kind] for kind in kinds]


def test_the_plot_is_drawn_from_the_figures(tmp_path):
    file = ROOT / "docs" / "bench-cpu.json"
    drawn = [tmp_path / name for name in ("a.svg", "b.svg")]
    for target in drawn:
        plot.draw(file, target)
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    panels = plot.panels(Report.load(file).tables)
    (first, *_, last) = panels["model, bfloat16"]["decode"]
    assert [first[0], last[0]] == [1, 16]
    for panel in panels:
        assert f"{panel}: time of bicompile" in drawn[0].read_text()


SHOWING_OUTPUT = ("explain.md", "testing.md")  # run by a test that compares what they print


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in SHOWING_OUTPUT], ids=lambda p: p.name
)
def test_python_blocks_run(page):
    quickstart = page.name == "README.md"  # the first block, which has a test of its own
    for block in blocks(page.read_text(), "python")[quickstart:]:
        execute("-c", block)


def test_two_set_up_commands():
    commands = "".join(blocks(README, "sh")).splitlines()
    assert len(commands) == 2
    project = (ROOT / "pyproject.toml").read_text()
    for command in commands:
        extra = re.fullmatch(r'pip install -e "\.\[(\w+)\]" && .+', command)
        assert extra, command
        assert re.search(rf"^{extra[1]} = \[", project, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def parts_about_commands():
    """Command -> the text that documents its options."""
    demo, bench = (ROOT / "docs" / "demo.md").read_text().split("## Bench")
    return {
        "demo": demo,
        "bench": bench,
        "explain": (ROOT / "docs" / "explain.md").read_text(),
        "verify": (ROOT / "docs" / "schedules.md").read_text(),
        "coverage": (ROOT / "docs" / "coverage.md").read_text(),
        "soak": (ROOT / "docs" / "testing.md").read_text(),
    }


def test_every_option_is_documented():
    from bicompile.cli import make_parser

    commands = make_parser()._subparsers._group_actions[0].choices
    for name, part in parts_about_commands().items():
        for action in commands[name]._actions:
            for option in action.option_strings:
                if option.startswith("--") and option not in ("--help", "--debug"):
                    assert f"`{option}" in part, f"{name} {option}"


def test_explain_shows_real_output():
    """Programs of the page alternate with what they print."""
    page = (ROOT / "docs" / "explain.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(shown) == len(blocks(page, "python")) == 3
    for program, output in shown:
        printed = [line.rstrip() for line in execute("-c", program).rstrip().splitlines()]
        assert printed == output.splitlines()


def test_the_picture_is_made_by_the_command_beside_it():
    page = (ROOT / "docs" / "explain.md").read_text()
    (command,) = (line for line in page.splitlines() if "--picture docs/explain.png" in line)
    assert command.startswith("bicompile explain examples.qwen3_8b:model")
    assert (ROOT / "docs" / "explain.png").read_bytes().startswith(b"\x89PNG")


def test_independence_shows_real_output(capsys):
    page = (Path(__file__).parent.parent / "docs" / "independence.md").read_text()
    program, shown = re.findall(r"^```(?:python)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(program, {"__name__": "shown"})
    assert capsys.readouterr().out == shown
