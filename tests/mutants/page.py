"""docs/mutants.md, made of the results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from .judge import KILLED, ROOT, Result
from .table import MUTANTS, PARTS

RESULTS = ROOT / "docs" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"

HEADER = """# Planted faults

Written by `python -m tests.mutants` from `mutants.json`; a test compares it with the results.

A test suite that passes says little until it has been seen to fail. Here are {count} faults for the kernels and passes, planted one at a time, each of a kind that real kernels had: a loop bound that follows the number of rows, a sum that follows a tile, a lost mask, a rounding at another point, a tail handled otherwise, a guard that is gone. {ran} of them were run so far; the tests see {killed} of those.

```sh
python -m tests.mutants --work FOLDER   # hours on a laptop; stopped, it continues where it was
python -m tests.mutants --only "lanes meet" --again   # some of them, by a part of their name
```

The tables are in `tests/mutants/`: a fault is a text of a file and what takes its place. Whoever changes a kernel changes them along with it: continuous integration checks that each text still stands where it did, once.
"""  # noqa: E501


def load(path: Path = RESULTS) -> dict[str, Result]:
    """The results by the name of the fault."""
    if not path.exists():
        return {}
    return {name: Result(**found) for name, found in json.loads(path.read_text()).items()}


def save(results: Mapping[str, Result], path: Path = RESULTS) -> None:
    """Write them down, in the order of the table."""
    order = [key(m) for m in MUTANTS]
    kept = {
        name: {"digest": found.digest, "verdict": found.verdict, "by": found.by}
        for name in order
        if (found := results.get(name))
    }
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def key(mutant) -> str:
    """The name of a fault among the results."""
    return f"{mutant.file}: {mutant.name}"


def render(results: Mapping[str, Result]) -> str:
    """The text of the page."""
    killed = sum(found.verdict == KILLED for found in results.values())
    text = HEADER.format(count=len(MUTANTS), ran=len(results), killed=killed)
    for part, mutants in PARTS.items():
        text += f"\n## {part}\n\n| fault | in | what it breaks | seen by |\n|---|---|---|---|\n"
        for mutant in mutants:
            found = results.get(key(mutant))
            seen = "not run" if found is None else found.verdict
            if found and found.verdict == KILLED:
                seen = f"`{_short(found.by)}`"
            cells = (mutant.name, f"`{mutant.file}`", mutant.breaks, seen)
            text += f"| {' | '.join(c.replace('|', '/') for c in cells)} |\n"
    return text


def _short(test: str) -> str:
    return re.sub(r"^tests/", "", test)
