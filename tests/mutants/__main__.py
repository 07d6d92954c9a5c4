"""The command: ``python -m tests.mutants``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .judge import INVALID, KILLED, copy, judge, run
from .page import PAGE, key, load, render, save
from .table import MUTANTS


def main() -> int:
    """Plant what has no result yet; 1 if a fault is not seen."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    results = {} if args.again and not args.only else load()
    chosen = [m for m in MUTANTS if not args.only or any(o in key(m) for o in args.only)]
    if args.again:
        waiting = chosen
    else:
        waiting = [m for m in chosen if _is_new(m, results)]
    if waiting and not args.trust and not _passes_unchanged(waiting, args.work):
        return 2
    for number, mutant in enumerate(waiting, 1):
        start = time.perf_counter()
        found = results[key(mutant)] = judge(mutant, args.work)
        save(results)
        PAGE.write_text(render(results))
        seconds = time.perf_counter() - start
        print(f"{number}/{len(waiting)} {found.verdict:>8} {seconds:5.0f} s  {key(mutant)}")
        print(f"{'':>12} {found.by} {found.says}"[:200], flush=True)
    PAGE.write_text(render(results))
    open_ones = [key(m) for m in chosen if results[key(m)].verdict != KILLED]
    print(f"{len(chosen) - len(open_ones)} of {len(chosen)} are seen")
    for name in open_ones:
        print(f"  {results[name].verdict}: {name}")
    return int(bool(open_ones))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    work = Path(tempfile.gettempdir()) / "bicompile-mutants"
    parser.add_argument("--work", type=Path, default=work, metavar="FOLDER",
                        help="where copies are made and built kernels are kept")  # fmt: skip
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="faults whose name has it")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--trust", action="store_true", help="do not run the tests unchanged first")
    return parser.parse_args()


def _is_new(mutant, results) -> bool:
    found = results.get(key(mutant))
    return found is None or found.digest != mutant.digest or found.verdict == INVALID


def _passes_unchanged(mutants, work: Path) -> bool:
    """Whether the tests pass without a fault: else they would see any."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        tree = copy(Path(__file__).parent.parent.parent, Path(folder) / "tree")
        for tests in sorted({m.tests for m in mutants}):
            code, output = run(tests, tree, work, Path(folder))
            print(f"unchanged: {' '.join(tests)}: {'passes' if code == 0 else 'FAILS'}", flush=True)
            if code:
                print(output[-3000:])
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
