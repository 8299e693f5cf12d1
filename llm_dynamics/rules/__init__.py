"""Is this normal? Named rules over a run's numbers, each with its limit, its evidence and what to do.

One rulebook for all who judge: the page, the model card, the command line, the alert during a run. Reads tables alone.
"""

from llm_dynamics.rules.faults import too_small_to_measure
from llm_dynamics.rules.rulebook import RULE_NAMES, RULES, Rule
from llm_dynamics.rules.terms import THRESHOLDS, RunTables
from llm_dynamics.rules.verdicts import Verdict, is_squeezing, judge

__all__ = [
    "RULES",
    "RULE_NAMES",
    "THRESHOLDS",
    "Rule",
    "RunTables",
    "Verdict",
    "is_squeezing",
    "judge",
    "too_small_to_measure",
]
