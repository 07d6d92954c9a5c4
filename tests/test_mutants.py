"""The table of planted faults fits the sources, and its page the results; the runner itself works.

The faults are run by ``python -m tests.mutants``, not here.
"""

from __future__ import annotations

from collections import Counter

import pytest
from mutants import judge, page
from mutants.mutant import Mutant
from mutants.table import MUTANTS

ROOT = judge.ROOT


@pytest.mark.parametrize("file", sorted({m.file for m in MUTANTS}))
def test_each_old_text_stands_once(file):
    text = (ROOT / file).read_text()
    wrong = [m.name for m in MUTANTS if m.file == file and text.count(m.old) != 1]
    assert not wrong
    assert all(m.old != m.new for m in MUTANTS if m.file == file)


def test_there_are_enough_and_each_has_a_name():
    assert len(MUTANTS) >= 60
    assert max(Counter(map(page.key, MUTANTS)).values()) == 1
    for mutant in MUTANTS:
        files = [t for t in mutant.tests if t.startswith("tests/")]
        assert files and all((ROOT / t).exists() for t in files), mutant.name


def test_every_fault_that_was_run_is_seen():
    results = page.load()
    assert len(results) >= 60
    assert {name for name, found in results.items() if found.verdict != judge.KILLED} == set()
    assert set(results) <= set(map(page.key, MUTANTS))


def test_the_page_is_made_of_the_results():
    """After a run of `python -m tests.mutants`."""
    assert page.PAGE.read_text() == page.render(page.load())


@pytest.fixture
def tree(tmp_path):
    """A repository of one module and its test."""
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "sums.py").write_text("def total(x):\n    return sum(x)\n\n\nUNUSED = 1\n")
    test = "import sums\n\n\ndef test_total():\n    assert sums.total([1, 2]) == 3\n"
    (root / "tests" / "test_sums.py").write_text(test)
    return root


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("sum(x)", "sum(x[1:])", judge.KILLED),
        ("UNUSED = 1", "UNUSED = 2", judge.SURVIVED),
        ("sum(x)", "sum(x", judge.INVALID),
    ],
)
def test_judges(tree, tmp_path, old, new, verdict):
    mutant = Mutant("planted", "sums.py", old, new, "the sum", ("tests/test_sums.py",))
    found = judge.judge(mutant, tmp_path, tree)
    assert found.verdict == verdict
    assert found.digest == mutant.digest
    assert (tree / "sums.py").read_text().count(old) == 1
    if verdict == judge.KILLED:
        assert found.by == "tests/test_sums.py::test_total"


def test_a_text_that_is_not_there_is_refused(tree):
    with pytest.raises(ValueError, match=r"stands 0 times in sums\.py"):
        Mutant("planted", "sums.py", "nothing", "else", "it", ()).apply(tree)
