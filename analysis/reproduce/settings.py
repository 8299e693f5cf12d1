"""Sizes and rates of the reproduction study.

What the paper (Ren and Sutherland, arXiv 2407.10490, and its released code) does, and what is scaled here:

| | paper | `cpu` | `full` |
|---|---|---|---|
| model | Pythia and Qwen1.5, 0.4B to 2.8B, pre-trained | SmolLM2-135M-Instruct, all weights | any, `--model` |
| pairs | 5,000 of HH helpful-base | 64 of the 500 released probe rows | 440 of them |
| watched | 500 of the training prompts | 10 | 100 |
| epochs of SFT, of SFT on both, of DPO | 4, 4, 4 | 4, 2, 2 | 4, 4, 4 |
| optimizer | RMSprop, batch 4, clip 10 | same | same |
| learning rate | 5e-7 | 1e-5 in SFT, 5e-6 in DPO | same as `cpu` |
| steps of warm-up | 150 | 8 | 8 |
| beta | 0.1 | 0.1 | 0.1 |

Learning rate times steps is of the paper's order (5e-7 x 5,000 = 2.5e-3; here 1e-5 x 64 = 6.4e-4 in SFT): the rates are
larger because there are so few steps. RMSprop has no momentum, so a step of the account has two causes only.
"""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = (
    "chosen",
    "rejected",
    "chosen_initial",
    "chosen_semantic",
    "rejected_semantic",
    "chosen_format",
    "rejected_format",
    "other_train",
    "other_test",
    "human_random",
    "ungrammatical",
    "random",
)
"""What is watched: the released file's families without `chosen_selfr`, which is broken there, and `other_test`."""


@dataclass(frozen=True)
class Size:
    """How large the study is.

    Attributes:
        pairs: Training pairs.
        prompts: Training prompts that are watched.
        prompt_tokens: Longest prompt taken.
        response_tokens: Longest response taken, of chosen and rejected; other families may be twice as long.
        sft_epochs: Epochs of SFT.
        extend_epochs: Epochs of SFT on both responses, which are twice as long.
        dpo_epochs: Epochs of DPO.
        observations: Observations of SFT, the first not counted.
        later_observations: Observations of each later run of the chain, the first not counted.
        cell_steps: DPO steps of a cell of the attribution, each explained.
        cell_prompts: Prompts that a cell explains.
        sft_rate: Learning rate of SFT.
        dpo_rate: Learning rate of DPO.
        warmup: Steps of warm-up.
    """

    pairs: int
    prompts: int
    prompt_tokens: int
    response_tokens: int
    sft_epochs: int
    extend_epochs: int
    dpo_epochs: int
    observations: int
    later_observations: int
    cell_steps: int
    cell_prompts: int
    sft_rate: float = 1e-5
    dpo_rate: float = 5e-6
    warmup: int = 8


SIZES = {
    "quick": Size(8, 3, 10**6, 10**6, 2, 2, 2, 2, 2, 2, 2, sft_rate=1e-3, dpo_rate=1e-3, warmup=1),
    "cpu": Size(64, 10, 96, 64, 4, 2, 2, 8, 4, 4, 6),
    "full": Size(440, 100, 512, 256, 4, 4, 4, 20, 20, 24, 32),
}

BATCH = 4


@dataclass(frozen=True)
class Cell:
    """A short explained DPO run of the attribution.

    Attributes:
        name: Its name in the tables.
        start: The run whose weights it starts from: "raw" (the model as it is), "sft", "extend", or a part of sft such
            as "sft@1" (after one epoch).
        rejected: What is pushed down: "rejected", "random" (shuffled words of another answer: improbable) or "own"
            (sampled from the start itself: probable).
        rate: Its learning rate as a multiple of `Size.dpo_rate`.
    """

    name: str
    start: str = "sft"
    rejected: str = "rejected"
    rate: float = 1.0


CELLS = (
    Cell("base"),
    Cell("start: raw", start="raw"),
    Cell("start: sft, 1 epoch", start="sft@1"),
    Cell("start: extend", start="extend"),
    Cell("rejected: shuffled words", rejected="random"),
    Cell("rejected: the model's own samples", rejected="own"),
    Cell("learning rate x 1/4", rate=0.25),
    Cell("learning rate x 4", rate=4.0),
)
"""`base` is DPO from the model of SFT; every other cell changes one thing."""
