"""The command line: its commands, refusals and exit statuses."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from bicompile import cli, demo
from bicompile.errors import NetworkUnavailable


def test_python_m_lists_the_commands():
    command = [sys.executable, "-m", "bicompile", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in cli.COMMANDS:
        assert f"\n    {name} " in shown


def refuse(args):
    raise NetworkUnavailable(model="tiny", output="  ERROR: no index")


def test_error_is_a_panel(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", refuse)
    assert cli.main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert "NetworkUnavailable" in shown
    assert "cannot download tiny" in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(demo, "run", refuse)
    with pytest.raises(NetworkUnavailable):
        cli.main(["demo", "--debug"])


def test_interrupt(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(["demo"]) == 130


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["demo", "--nothing"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: bicompile" in capsys.readouterr().err


def test_every_command_declares_its_options():
    parser = cli.make_parser()
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert set(actions[0].choices) == set(cli.COMMANDS)
