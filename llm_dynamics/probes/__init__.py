"""What is watched: prompts with responses of named families."""

from llm_dynamics.probes.endpoint import OpenAIRephraser
from llm_dynamics.probes.families import FAMILIES, FAMILY_ORDER, Family
from llm_dynamics.probes.hh import HH_COLUMNS, HH_DROP_IF
from llm_dynamics.probes.probe import DroppedProbe, Probe
from llm_dynamics.probes.probe_set import ProbeSet
from llm_dynamics.probes.rephrase import ChatModelRephraser, Rephraser, RephraseRequest
from llm_dynamics.probes.tables import probe_table
from llm_dynamics.probes.tokenization import EncodedProbe, EncodedProbes, TruncationRule, encode_probes

__all__ = [
    "FAMILIES",
    "FAMILY_ORDER",
    "HH_COLUMNS",
    "HH_DROP_IF",
    "ChatModelRephraser",
    "DroppedProbe",
    "EncodedProbe",
    "EncodedProbes",
    "Family",
    "OpenAIRephraser",
    "Probe",
    "ProbeSet",
    "RephraseRequest",
    "Rephraser",
    "TruncationRule",
    "encode_probes",
    "probe_table",
]
