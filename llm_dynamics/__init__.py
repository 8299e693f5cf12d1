"""See what post-training really does to a language model: every optimizer step moves responses never trained on.

Watch a run with one line, `watch(trainer, probes)`; read what it wrote with `load_run`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_dynamics.callbacks.displacement import DisplacementCallback
    from llm_dynamics.callbacks.influence import InfluenceCallback
    from llm_dynamics.callbacks.probe import ProbeCallback
    from llm_dynamics.callbacks.squeezing_alert import SqueezingAlert
    from llm_dynamics.callbacks.watch import watch
    from llm_dynamics.callbacks.watch_config import WatchConfig
    from llm_dynamics.frames import align, compare, delta, family_curves, token_curves
    from llm_dynamics.influence import LossTape, account_for_change, split_update
    from llm_dynamics.kernel import token_kernel
    from llm_dynamics.likelihood import score_responses, squeezing_stats
    from llm_dynamics.probes import Probe, ProbeSet, encode_probes
    from llm_dynamics.report import write_report
    from llm_dynamics.rules import Verdict, judge
    from llm_dynamics.runlog import load_run, load_runs
    from llm_dynamics.trainers import NTHRConfig, NTHRGRPOTrainer, measure_lld

__all__ = [
    "DisplacementCallback",
    "InfluenceCallback",
    "LossTape",
    "NTHRConfig",
    "NTHRGRPOTrainer",
    "Probe",
    "ProbeCallback",
    "ProbeSet",
    "SqueezingAlert",
    "Verdict",
    "WatchConfig",
    "account_for_change",
    "align",
    "compare",
    "delta",
    "encode_probes",
    "family_curves",
    "judge",
    "load_run",
    "load_runs",
    "measure_lld",
    "score_responses",
    "split_update",
    "squeezing_stats",
    "token_curves",
    "token_kernel",
    "watch",
    "write_report",
]

_FOLDERS = {
    "callbacks": (
        "DisplacementCallback",
        "InfluenceCallback",
        "ProbeCallback",
        "SqueezingAlert",
        "WatchConfig",
        "watch",
    ),
    "frames": ("align", "compare", "delta", "family_curves", "token_curves"),
    "influence": ("LossTape", "account_for_change", "split_update"),
    "kernel": ("token_kernel",),
    "likelihood": ("score_responses", "squeezing_stats"),
    "probes": ("Probe", "ProbeSet", "encode_probes"),
    "report": ("write_report",),
    "rules": ("Verdict", "judge"),
    "runlog": ("load_run", "load_runs"),
    "trainers": ("NTHRConfig", "NTHRGRPOTrainer", "measure_lld"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: reading a log must not load torch and TRL.

    Raises:
        AttributeError: For a name that is not public.
    """
    for folder, names in _FOLDERS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{folder}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
