"""How do training tokens reach a probe? Kernels between the log-prob gradients of tokens."""

from llm_dynamics.kernel.exact import token_kernel
from llm_dynamics.kernel.rows import RowIndex
from llm_dynamics.kernel.table import TokenKernel, predict_from_kernel

__all__ = ["RowIndex", "TokenKernel", "predict_from_kernel", "token_kernel"]
