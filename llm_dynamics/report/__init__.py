"""How people see a run: frames that answer a question, and one self-contained HTML page.

Reads only what `runlog` wrote; never loads a model.
"""

from llm_dynamics.frames import family_curves, squeezing_curves, what_moved
from llm_dynamics.report.causes import family_accounts
from llm_dynamics.report.model_card import model_card_section
from llm_dynamics.report.page import write_report
from llm_dynamics.report.statements import Statement, reading
from llm_dynamics.report.training_tokens import strongest_tokens

__all__ = [
    "Statement",
    "family_accounts",
    "family_curves",
    "model_card_section",
    "reading",
    "squeezing_curves",
    "strongest_tokens",
    "what_moved",
    "write_report",
]
