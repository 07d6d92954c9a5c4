"""The command line: one subcommand per module that has `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from bicompile import __version__
from bicompile.errors import BicompileError

COMMANDS = {
    "demo": "bicompile.demo",
    "explain": "bicompile.explain_command",
    "bench": "bicompile.bench",
    "bisect": "bicompile.bisect_command",
    "verify": "bicompile.verify",
    "coverage": "bicompile.coverage",
    "soak": "bicompile.soak",
}
"""Subcommand -> module; the first line of the module's docstring is the help text."""


def make_parser() -> argparse.ArgumentParser:
    """Build the parser from `COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="bicompile",
        description="Batch-invariant torch.compile: show, explain, time and verify it.",
    )
    parser.add_argument("--version", action="version", version=f"bicompile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status: 2 if it was refused with an explanation."""
    args = make_parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except BicompileError as error:
        if args.debug:
            raise
        panel = Panel(Text(str(error)), title=type(error).__name__, border_style="red")
        Console(stderr=True).print(panel)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
