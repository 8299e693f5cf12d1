"""What the page shows of the verdicts on a run: what was found first, then what went as hoped, and statements."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

from llm_dynamics.report.statements import statements
from llm_dynamics.report.text import visible
from llm_dynamics.rules import judge
from llm_dynamics.runlog import RunLog

_MINUS = re.compile(r"(?<![\w.-])-(?=\d|inf\b)")
"""A hyphen that stands for a minus: not the one in `1e-05` or in a name."""


def normal_view(name: str, run: RunLog) -> dict[str, Any]:
    """Return the verdicts of one run for the template.

    Args:
        name: The run's name on the page.
        run: The run log.

    Returns:
        `name`, `trainer`; `found`, `clear` and `unknown`, each a list of verdicts on faults (`rules.Verdict` as dicts);
        `hoped`, those on hopes that came true; `statements`. All texts are safe to show.
    """
    verdicts = [replace(own, evidence=_MINUS.sub("−", visible(own.evidence))) for own in judge(run)]
    faults = [asdict(own) for own in verdicts if own.kind == "fault"]
    return {
        "name": name,
        "trainer": str(run.meta.get("trainer") or ""),
        **{status: [own for own in faults if own["status"] == status] for status in ("found", "clear", "unknown")},
        "hoped": [asdict(own) for own in verdicts if own.kind == "hope" and own.status == "found"],
        "statements": statements(verdicts),
    }
