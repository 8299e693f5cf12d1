"""What the section "Is it normal?" shows: the verdicts of each run, what was found first."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from llm_dynamics.likelihood.verdicts import judge
from llm_dynamics.report.text import visible
from llm_dynamics.runlog import RunLog

_MINUS = re.compile(r"(?<![\w.-])-(?=\d|inf\b)")
"""A hyphen that stands for a minus: not the one in `1e-05` or in a name."""


def normal_view(name: str, run: RunLog) -> dict[str, Any]:
    """Return the verdicts of one run for the template.

    Args:
        name: The run's name on the page.
        run: The run log.

    Returns:
        `name`, `trainer`; `found`, `clear` and `unknown`, each a list of `likelihood.verdicts.Verdict` as dicts, with
        `unsure`, whose texts are safe to show.
    """
    verdicts = [
        asdict(verdict) | {"evidence": _MINUS.sub("−", visible(verdict.evidence)), "unsure": verdict.unsure}
        for verdict in judge(run)
    ]
    by_status = {
        status: [verdict for verdict in verdicts if verdict["status"] == status]
        for status in ("found", "clear", "unknown")
    }
    return {"name": name, "trainer": str(run.meta.get("trainer") or ""), **by_status}
