"""What our passes did, in PyTorch's own places: TORCH_LOGS="+bicompile" and TORCH_TRACE.

The log has the unified diff of each graph; the structured trace, which tlparse shows, has the diff
(``bicompile_diff``) and one row for each captured node (``bicompile_nodes``).
"""

from __future__ import annotations

import json
import logging

from torch.fx import GraphModule

from bicompile import dry_capture
from bicompile.explanation import GraphExplanation
from bicompile.pipeline import Run

log = logging.getLogger(__name__)


def wanted() -> bool:
    """Whether anybody reads them: account of every node is kept only then."""
    return log.isEnabledFor(logging.DEBUG) or dry_capture.traces()


def emit(gm: GraphModule, run: Run) -> None:
    """Write down a graph that has been through the passes."""
    explained = GraphExplanation.of(gm, run)
    diff = explained.diff()
    log.debug("captured and rewritten graph\n%s", diff)
    rows = json.dumps([row.json() for row in explained.rows])
    dry_capture.trace_artifact("bicompile_diff", "string", lambda: diff)
    dry_capture.trace_artifact("bicompile_nodes", "json", lambda: rows)
