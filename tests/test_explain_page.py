"""The page of explain, in a real browser: search, fold, filter, a click; and without a browser."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from explained import explained

import bicompile
from bicompile import dry_capture, errors, explanation_page

NO_BROWSER = "no browser: install chromium, or run `playwright install chromium`"


@pytest.fixture(scope="module")
def browser():
    """A headless browser on this machine, or the one that Playwright has fetched."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=NO_BROWSER)
    with sync_api.sync_playwright() as playwright:
        arguments = {"args": ["--no-sandbox"], "executable_path": explanation_page.find_browser()}
        try:
            started = playwright.chromium.launch(**arguments)
        except sync_api.Error:
            pytest.skip(NO_BROWSER)
        yield started
        started.close()


class Page:
    """A page of an explanation; any request and any error in its script fails the test."""

    def __init__(self, browser, explanation, path):
        self.path = explanation.html(path)
        self.view = browser.new_page(viewport={"width": 1400, "height": 900})
        self.problems = []
        self.view.on("pageerror", lambda error: self.problems.append(str(error)))
        self.view.on("console", lambda m: m.type == "error" and self.problems.append(m.text))
        self.view.on("request", lambda r: r.url[:5] != "file:" and self.problems.append(r.url))
        self.view.goto(path.as_uri())

    def rows(self):
        return self.view.locator(".row:visible")

    def names(self):
        return [row.get_attribute("data-name") for row in self.rows().all()]

    def shown(self):
        return self.view.locator("#shown").inner_text()

    def close(self):
        self.view.close()
        assert self.problems == []


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """Of a model of several layers, small enough to be shown open."""
    opened = Page(browser, explained("llama"), tmp_path_factory.mktemp("page") / "llama.html")
    yield opened
    opened.close()


@pytest.fixture
def fresh(page):
    page.view.reload()
    return page


def test_rows_are_aligned(fresh):
    view = fresh.view
    view.click("#open")
    assert fresh.names() == [row.name for row in explained("llama").rows]
    product = view.locator('.row[data-name="mm"]')
    left, right = product.locator("> span").all()
    assert left.inner_text().startswith("mm = aten.mm.default(")
    assert right.inner_text().startswith("mm_default = bicompile.mm.default(") or "/" in (
        right.inner_text()
    )
    absorbed = view.locator(".row", has_text="aten.rsqrt.default").first
    assert "computed by" in absorbed.inner_text()


def test_search(fresh):
    fresh.view.fill("#search", "sdpa layers.1")
    attention = [r for r in explained("llama").rows if r.target == "bicompile.sdpa.default"]
    assert attention[1].name in fresh.names()
    assert not {attention[0].name, attention[2].name} & set(fresh.names())
    assert all("self_attn" in text or "sdpa" in text for text in fresh.rows().all_inner_texts())
    total = len(explained("llama").rows)
    assert fresh.shown() == f"{len(fresh.names())} of {total} nodes"
    fresh.view.fill("#search", "modeling_llama.py mul")
    assert len(fresh.names()) > 3
    fresh.view.fill("#search", "nothing like this")
    assert fresh.names() == []
    fresh.view.fill("#search", "")
    assert fresh.shown() == f"{total} of {total} nodes"


def test_fold(fresh):
    view = fresh.view
    view.click("#close")
    assert fresh.names() == []
    for path in ("model", "model.layers", "model.layers.1", "model.layers.1.mlp"):
        view.locator(f'details[data-path="{path}"] > summary').first.click()
    branch = '.row:visible >> xpath=ancestor::details[@data-path="model.layers.1.mlp"]'
    view.locator(branch).first.wait_for()
    assert view.locator('details[data-path="model.layers.0.mlp"] .row:visible').count() == 0
    view.locator('details[data-path="model"] > summary').first.click()
    assert fresh.names() == []


def test_filter(fresh):
    view = fresh.view
    view.click("#open")
    everything = fresh.names()
    view.uncheck("#moves")
    computing = fresh.names()
    assert 0 < len(computing) < len(everything)
    assert not any("aten.view" in text.split("\n")[0] for text in fresh.rows().all_inner_texts())
    view.uncheck("#classes input[value='0']")
    assert fresh.names() == []


def test_click_shows_the_source(fresh):
    fresh.view.fill("#search", "q_proj aten.mm")
    fresh.rows().first.click()
    detail = fresh.view.locator("#detail").inner_text()
    assert "self.q_proj(hidden_states)" in detail
    assert "fuse -> bicompile.qkv_proj.default" in detail
    assert "never split" in detail
    assert "rows; panels" in detail
    assert "model.layers.0.self_attn.q_proj" in detail
    assert fresh.view.locator("#detail .hll").inner_text().strip().startswith("query_states = ")


def test_unified_diff(fresh):
    view = fresh.view
    assert not view.locator("#diff").is_visible()
    view.click("#unified")
    text = view.locator("#diff").inner_text()
    assert re.search(r"^-mm: .* = aten\.mm\.default", text, re.MULTILINE)
    assert re.search(
        r"^\+\S*qkv_proj_default: .* = bicompile\.qkv_proj\.default", text, re.MULTILINE
    )
    view.click("#unified")
    assert view.locator("#tree").is_visible()


def test_refusals_are_filtered_by_class(browser, tmp_path):
    page = Page(browser, explained("convolutional"), tmp_path / "refused.html")
    for number in (0, 1, 2):
        page.view.uncheck(f"#classes input[value='{number}']")
    assert page.names() == [row.name for row in explained("convolutional").refused]
    page.rows().first.click()
    assert "takes its statistics over the batch" in page.view.locator("#detail").inner_text()
    page.close()


class Layer(torch.nn.Module):
    """A few nodes."""

    def __init__(self):
        super().__init__()
        self.product, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

    def forward(self, x):
        return x + self.norm(self.product(x))


class Layers(torch.nn.Module):
    """Many layers of them."""

    def __init__(self, number):
        super().__init__()
        self.layers = torch.nn.Sequential(*(Layer() for _ in range(number)))

    def forward(self, x):
        return self.layers(x)


def test_thousands_of_nodes(browser, tmp_path):
    model = Layers(250)
    found = bicompile.explain(model, torch.ones(2, 4), dynamic=False)
    assert len(found.rows) > 1000
    page = Page(browser, found, tmp_path / "large.html")
    assert page.path.stat().st_size < 5_000_000
    assert page.view.locator('details[data-path="layers.3"]').count()
    assert page.view.locator(".row").count() < 50, "branches that are folded should not be drawn"
    page.view.fill("#search", "layers.71. aten.addmm")
    assert len(page.names()) == 1
    page.view.fill("#search", "")
    page.view.click("#open")
    assert len(page.names()) == len(found.rows)
    page.close()


def test_markup_in_a_program_is_text(browser, tmp_path):
    def script(x):
        return x + 1  # <script>document.title = "planted"</script>

    script.__qualname__ = "<script>document.title = 'planted'</script>"
    page = Page(browser, bicompile.explain(script, torch.ones(3)), tmp_path / "markup.html")
    page.rows().first.click()
    assert "<script>" in page.view.locator("#detail").inner_text()
    assert "planted" in page.view.title() and page.view.title().startswith("<script>")
    assert page.view.locator("script").count() == 2
    page.close()


def test_picture(tmp_path):
    if explanation_page.find_browser() is None:
        pytest.skip(NO_BROWSER)
    page = explained("bert").html(tmp_path / "bert.html")
    picture = tmp_path / "bert.png"
    explanation_page.draw(page, picture, hash="search=sdpa", size=(800, 500))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert int.from_bytes(picture.read_bytes()[16:20]) == 800


# ------------------------------------------------------------------------- without a browser


def test_the_page_needs_no_network(tmp_path):
    text = explained("bert").html(tmp_path / "bert.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)=|url\(|https?://(?!meta)""", text.split("<script")[0])


def test_no_browser_to_draw(tmp_path, monkeypatch):
    page = explained("bert").html(tmp_path / "bert.html")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.BrowserNotFound) as caught:
        explanation_page.draw(page, tmp_path / "bert.png")
    assert "no browser found to draw the page" in str(caught.value)
    assert "tried: chromium, " in str(caught.value)
    assert f"open {page} on a machine with a browser" in str(caught.value)


def test_a_browser_that_fails(tmp_path, monkeypatch):
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\necho 'no display' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(errors.BrowserNotFound, match="no display"):
        explanation_page.draw(tmp_path / "page.html", tmp_path / "page.png")


def test_no_browser_to_open(tmp_path, monkeypatch):
    monkeypatch.setattr(explanation_page.webbrowser, "open", lambda url: False)
    with pytest.raises(errors.BrowserNotFound, match="show the page"):
        explanation_page.open_page(tmp_path / "page.html")


def test_a_source_that_is_gone(tmp_path):
    """Rows keep their place where the file cannot be read."""
    module = tmp_path / "gone.py"
    module.write_text("def program(x):\n    return x * 2\n")
    space = {}
    exec(compile(module.read_text(), str(module), "exec"), space)
    module.unlink()
    text = bicompile.explain(space["program"], torch.ones(3)).html(tmp_path / "p.html").read_text()
    assert "gone.py:2, in program" in text


# -------------------------------------------------------------- logs and traces of PyTorch

PROGRAM = """
import torch
f = torch.compile(lambda x: x.softmax(-1) + 1, backend="batch_invariant")
with torch.no_grad():
    f(torch.randn(3, 7))
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What a compilation writes under TORCH_LOGS and TORCH_TRACE."""
    import os
    import sys

    folder = tmp_path_factory.mktemp("traced")
    settings = {
        "TORCH_LOGS": "+bicompile",
        "TORCH_TRACE": str(folder / "trace"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, check=True
    )
    (trace,) = (folder / "trace").glob("*.log")
    return done.stderr, trace


def test_logs_have_the_diff(traced):
    log, _ = traced
    assert "captured and rewritten graph" in log
    assert "bicompile.softmax.default" in log
    assert re.search(r"-_softmax: .* = aten\._softmax\.default", log)


def test_traces_have_the_nodes(traced):
    _, trace = traced
    text = trace.read_text()
    assert '"artifact": {"name": "bicompile_diff", "encoding": "string"}' in text
    assert '"artifact": {"name": "bicompile_nodes", "encoding": "json"}' in text
    assert '\\"op\\"' in text or '"op": "bicompile.softmax.default"' in text


def test_nobody_keeps_account_unasked():
    from bicompile import artifacts

    torch.compile(lambda x: x + 1, backend="batch_invariant")(torch.ones(3))
    assert not dry_capture.traces()
    assert not artifacts.wanted()
