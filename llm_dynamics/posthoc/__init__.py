"""After the fact: score saved checkpoints on a probe set, and compute kernels between files of responses."""

from llm_dynamics.posthoc.checkpoints import score_checkpoints
from llm_dynamics.posthoc.kernel import kernel_of_files

__all__ = ["kernel_of_files", "score_checkpoints"]
