"""How do training tokens reach a probe? Kernels between the log-prob gradients of tokens.

The exact one is `token_kernel`. Cheaper: the LM head's own part (`last_layer_kernel`, `last_layer_scores`, `gwhes`),
hidden states alone (`ches_scores`), one random or centred logit direction (`pseudo_kernel`), the norm of a block
(`token_block_norms`, `response_block_norms`, `exact_block_norms`) and the proxies of the papers (`kernel_proxies`).
"""

from llm_dynamics.kernel.ches import ches_scores
from llm_dynamics.kernel.exact import token_kernel
from llm_dynamics.kernel.exact_norms import exact_block_norms
from llm_dynamics.kernel.gwhes import gwhes
from llm_dynamics.kernel.last_layer import last_layer_kernel, last_layer_scores
from llm_dynamics.kernel.norms import relative_stability, response_block_norms, token_block_norms
from llm_dynamics.kernel.proxies import kernel_proxies
from llm_dynamics.kernel.pseudo import pseudo_kernel, pseudo_token_kernel
from llm_dynamics.kernel.residuals import EXACT_RULE, PAPER_RULE, ResidualRule
from llm_dynamics.kernel.rows import RowIndex
from llm_dynamics.kernel.table import TokenKernel, predict_from_kernel

__all__ = [
    "EXACT_RULE",
    "PAPER_RULE",
    "ResidualRule",
    "RowIndex",
    "TokenKernel",
    "ches_scores",
    "exact_block_norms",
    "gwhes",
    "kernel_proxies",
    "last_layer_kernel",
    "last_layer_scores",
    "predict_from_kernel",
    "pseudo_kernel",
    "pseudo_token_kernel",
    "relative_stability",
    "response_block_norms",
    "token_block_norms",
    "token_kernel",
]
