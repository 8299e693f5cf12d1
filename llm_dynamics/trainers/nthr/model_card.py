"""What the model card of a run calls its method, and the paper that introduced it."""

from __future__ import annotations

import textwrap

from trl import GRPOTrainer

from llm_dynamics import _trl


def _paper(title: str, number: str, authors: str, key: str) -> dict[str, str]:
    """Return a paper as TRL's trainers describe theirs."""
    citation = f"""\
        @article{{{key},
            title        = {{{{{title}}}}},
            author       = {{{authors}}},
            year         = 2025,
            eprint       = {{arXiv:{number}}},
        }}"""
    return {"title": title, "id": number, "citation": textwrap.dedent(citation)}


NTHR_PAPER = _paper(
    "On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization",
    "2505.18830",
    "Wenlong Deng and Yi Ren and Muchen Li and Danica J. Sutherland and Xiaoxiao Li and Christos Thrampoulidis",
    "deng2025effect",
)
THR_PAPER = _paper(
    "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning",
    "2510.03669",
    "Wenlong Deng and Yi Ren and Yushu Li and Boying Gong and Danica J. Sutherland and Xiaoxiao Li and Christos "
    "Thrampoulidis",
    "deng2025token",
)
NSR_PAPER = _paper(
    "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning",
    "2506.01347",
    "Xinyu Zhu and Mengzhou Xia and Zhepei Wei and Wei-Lin Chen and Danqi Chen and Yu Meng",
    "zhu2025surprising",
)
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "nthr": ("NTHR", NTHR_PAPER),
    "thr": ("THR", THR_PAPER),
    "nsr": ("NSR", NSR_PAPER),
    "w_reinforce": ("W-REINFORCE", NSR_PAPER),
    "pos_only": ("GRPO without negative advantages", {}),
    "random": ("GRPO with the penalty of randomly drawn tokens changed", {}),
    "none": _trl.name_and_paper(GRPOTrainer),
}
"""What a card calls each `nthr_method`, and the paper that introduced it; none for controls."""
