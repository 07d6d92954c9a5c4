"""The gallery of PyTorch's rows that change: the search, and the page of what it found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from bicompile.testing import gallery


def test_a_piece_of_the_gallery_breaks_by_default_and_holds_under_ours():
    broken = gallery.search("Linear", "eager", 60)
    assert broken.property == "batch size"
    assert broken.example["batch"] == 2
    assert "first at [0, " in broken.difference
    assert gallery.search("Linear", "batch_invariant", 1).property == ""


def test_the_page_of_the_gallery_shows_its_record():
    """After a new run: python -m bicompile.testing.gallery --json docs/... --page docs/..."""
    docs = Path(__file__).parent.parent / "docs"
    record = json.loads((docs / "gallery.json").read_text())
    assert (docs / "gallery.md").read_text() == gallery.render(record)
    broken = Counter(one["backend"] for one in record["found"] if one["property"])
    assert min(broken["eager"], broken["inductor"]) >= 10
    assert broken["batch_invariant"] == 0
    assert {one["piece"] for one in record["found"]} == {*gallery.PIECES}
    assert max(one["seconds"] for one in record["found"] if one["property"]) < 60
