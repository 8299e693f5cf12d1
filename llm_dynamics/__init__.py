"""See what post-training really does to a language model: every optimizer step moves responses never trained on.

Watch a run with one line, `watch(trainer, probes)`; read what it wrote with `load_run`.
"""

from llm_dynamics.callbacks import ProbeCallback, watch
from llm_dynamics.likelihood import score_responses, squeezing_stats
from llm_dynamics.probes import Probe, ProbeSet, encode_probes
from llm_dynamics.report import write_report
from llm_dynamics.runlog import load_run, load_runs

__all__ = [
    "Probe",
    "ProbeCallback",
    "ProbeSet",
    "encode_probes",
    "load_run",
    "load_runs",
    "score_responses",
    "squeezing_stats",
    "watch",
    "write_report",
]
