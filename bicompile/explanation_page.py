"""An explanation as one self-contained page: both graphs side by side, without a network.

The rows are data in the page; a small script draws the branches that are open, so that a graph of
thousands of nodes stays quick.  Code is highlighted by Pygments, the page is a Jinja template.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import shutil
import subprocess
import tempfile
import webbrowser
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import DiffLexer, PythonLexer

from bicompile.errors import BrowserNotFound
from bicompile.report import Verdict

if TYPE_CHECKING:
    from bicompile.explanation import Explanation, GraphExplanation, Row

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Names under which a browser that can draw a page without a screen is looked for."""

_VERDICTS = list(Verdict)
_AROUND = 3  # lines of code shown before and behind the user's
_PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+), in ")
_MOVES = ("audit: view or copy", "audit: one of the results", "audit: arithmetic", "audit: size")


class _Texts:
    """Texts that many rows share, each kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {"": 0}

    def __call__(self, text: str | None) -> int:
        return self.places.setdefault(text or "", len(self.places))


def render(explanation: Explanation) -> str:
    """The page."""
    texts = _Texts()
    graphs = [_graph(graph, texts) for graph in explanation.graphs]
    lines = {row.line for row in explanation.rows if row.line}
    sources = {texts(_place(line)): code for line in sorted(lines) if (code := _source(line))}
    data = {
        "graphs": graphs,
        "texts": list(texts.places),
        "sources": sources,
        "verdicts": [v.value for v in _VERDICTS],
    }
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "page")
    template = jinja2.Environment(loader=folder, autoescape=True).get_template("page.html")
    return template.render(
        explanation=explanation,
        verdicts=data["verdicts"],
        counts=explanation.counts(),
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        diffs=[_highlighted_diff(graph) for graph in explanation.graphs],
        styles=Markup(_formatter().get_style_defs()),
    )


def _graph(graph: GraphExplanation, texts: _Texts) -> dict[str, Any]:
    places = {node.name: i for i, node in enumerate(graph.after)}
    arguments = {node.name: node.arguments for node in graph.before}
    return {
        "name": graph.name,
        "rows": [_row(row, arguments[row.name], places, texts) for row in graph.rows],
        "after": [[n.name, n.target, n.arguments] for n in graph.after],
    }


def _row(row: Row, arguments: str, places: dict[str, int], texts: _Texts) -> list[Any]:
    """The columns that page.js names."""
    return [
        row.name,
        row.target,
        arguments,
        row.holds,
        row.module,
        _VERDICTS.index(row.verdict),
        texts(_place(row.line)),
        row.kind,
        [places[name] for name in row.became],
        texts(row.rule),
        texts(row.order),
        row.schedule,
        texts("; ".join(row.schedules)),
        row.flop,
        row.bytes,
        int(row.rule.startswith(_MOVES)),
    ]


@cache
def _formatter() -> HtmlFormatter[str]:
    return HtmlFormatter(nobackground=True)


def _highlighted_diff(graph: GraphExplanation) -> Markup:
    return Markup(highlight(graph.diff(), DiffLexer(), _formatter()))


def _place(line: str | None) -> str:
    """A user's line without the folder in which packages are installed on this machine."""
    return (line or "").rpartition("/site-packages/")[2]


def _source(line: str) -> str | None:
    """The lines around a user's line, highlighted; None where the file is not here."""
    place = _PLACE.match(line)
    if place is None:
        return None
    number = int(place["line"])
    first = max(1, number - _AROUND)
    code = [linecache.getline(place["file"], n) for n in range(first, number + _AROUND + 1)]
    if not code[number - first]:
        return None
    formatter = HtmlFormatter(nobackground=True, hl_lines=[number - first + 1])
    shown: str = highlight("".join(code), PythonLexer(stripnl=False), formatter)
    return shown.strip()


def open_page(page: Path) -> None:
    """Show a page in the user's browser.

    Raises:
        BrowserNotFound: there is none on this machine.
    """
    try:
        shown = webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        shown = False
    if not shown:
        raise BrowserNotFound(purpose="show the page", tried="the default browser", file=page)


def draw(page: Path, picture: Path, *, hash: str = "", size: Sequence[int] = (1500, 900)) -> None:
    """Write a picture of a page by a browser without a screen.

    Args:
        page: the file.
        picture: the PNG file to write.
        hash: what the page is asked to show, as ``search=sdpa&node=mm_3``.
        size: width and height in pixels.

    Raises:
        BrowserNotFound: no Chromium or Chrome on PATH, or it cannot draw.
    """
    browser = find_browser()
    if browser is None:
        raise BrowserNotFound(purpose="draw the page", tried=BROWSERS, file=page)
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        command += [f"--screenshot={picture.resolve()}", f"{page.resolve().as_uri()}#{hash}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # the sandbox refuses to start for root
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not picture.exists():
        said = (done.stderr.strip().splitlines() or ["no picture came"])[-1]
        raise BrowserNotFound(purpose="draw the page", tried=f"{browser}: {said}", file=page)


def find_browser() -> str | None:
    """The path of a browser that can draw without a screen."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)
