"""Whether tests see a fault: they run in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .mutant import Mutant

ROOT = Path(__file__).parent.parent.parent
SECONDS = 1200
"""After which a fault is taken to hang."""
KILLED, SURVIVED, INVALID = "killed", "survived", "invalid"
_LEFT_OUT = (".*", "__pycache__", "build", "dist", "*.egg-info")
_NOT_BUILT = (
    *("CompilationFailed", "SyntaxError", "IndentationError", "CompilationError"),
    "InterpreterError",  # a Triton kernel whose types do not fit
)


@dataclass(frozen=True)
class Result:
    """What became of a fault.

    Args:
        digest: of the edit and its tests.
        verdict: killed, survived, or invalid: what was edited does not compile.
        by: the first test that failed.
        says: the first line of its message; shown, not kept.
    """

    digest: str
    verdict: str
    by: str = ""
    says: str = ""


def judge(mutant: Mutant, work: Path, root: Path = ROOT) -> Result:
    """Run the tests of a fault in a copy below `work`, which also keeps what was built."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        tree = copy(root, Path(folder) / "tree")
        mutant.apply(tree)
        code, output = run(mutant.tests, tree, work, Path(folder))
    if code == 0:
        return Result(mutant.digest, SURVIVED)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", output, re.MULTILINE)
    by, says = (failed[1], failed[2] or "") if failed else ("", output[-300:])
    if code not in (1, 124) or any(word in output for word in _NOT_BUILT):
        return Result(mutant.digest, INVALID, by, says)
    return Result(mutant.digest, KILLED, by or "the time limit", says if failed else "")


def copy(root: Path, tree: Path) -> Path:
    """A copy of the repository as it lies in the folder."""
    ignore = shutil.ignore_patterns(*_LEFT_OUT)
    return Path(shutil.copytree(root, tree, symlinks=True, ignore=ignore))


def run(tests: tuple[str, ...], tree: Path, work: Path, scratch: Path) -> tuple[int, str]:
    """The exit status of pytest in a tree, 124 if it did not end, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "--tb=line"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(work / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "HYPOTHESIS_PROFILE": "ci",
        "COLUMNS": "400",
    }
    if any(t.startswith("tests/test_triton_") for t in tests):
        environment["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *tests],
            cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout + done.stderr
