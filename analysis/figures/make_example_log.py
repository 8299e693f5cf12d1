"""Make the small run logs in `analysis/figures/example_log`, on which every figure script is tried.

    python analysis/figures/make_example_log.py                     # CPU, a minute
    python analysis/figures/make_example_log.py --out runs/example  # elsewhere

Real runs of the tiny untrained model of `llm_dynamics.demo.tiny` on the demo's pairs, two seeds. They show that a
script works and say nothing about language models. Per seed: `sft` (chosen answers), `dpo` from it, `extend` (SFT on
chosen and rejected answers alike), `extend_dpo` from that; two prompts are watched with seven families each. In seed
0 some steps are explained for all families: every step of `dpo`, the first, the last and some between of the others,
`extend` by the role of the answer. `grpo` and `nthr`, of seed 0, hold what single steps did to correct answers.

The parts are packed anew without column statistics and descriptions, which takes a third of the room, and the tables in
`LEFT_OUT` stay behind; values and types are those that the run wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llm_dynamics import ProbeSet, watch
from llm_dynamics.demo import reinforcement
from llm_dynamics.demo.job import QUICK, build_demo_probes
from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.influence import MicroBatch

EXAMPLE = Path(__file__).parent / "example_log"
SEEDS, EXPLAINED_SEED = (0, 1), 0
FAMILIES = (
    "chosen",
    "rejected",
    "chosen_semantic",
    "rejected_semantic",
    "other_train",
    "human_random",
    "ungrammatical",
)
PROMPTS, PAIRS, BATCH = 2, 32, 4
SFT_STEPS, EXTEND_STEPS, DPO_STEPS = 8, 12, 4
SFT_RATE, DPO_RATE = 2e-3, 2e-3
LEFT_OUT = ("tokens", "training_tokens", "rollouts", "nthr_tokens")
"""Large tables that no figure of this folder reads."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all runs and put their logs in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EXAMPLE, help="folder of the logs; replaced if there")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    torch.set_num_threads(1)  # the model is tiny
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # the logs then name no folder of this machine
        try:
            for seed in SEEDS:
                run_seed(seed, Path(f"seed{seed}"))
            settings = replace(reinforcement.QUICK, steps=3, seed=EXPLAINED_SEED)
            reinforcement.run_reinforcement(settings, Path(f"seed{EXPLAINED_SEED}"), print)
        finally:
            os.chdir(here)
        shutil.rmtree(options.out, ignore_errors=True)
        for log in sorted(Path(scratch).glob("seed*/*/dynamics")):
            pack(log, options.out / log.relative_to(scratch))
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{options.out}: {size / 1000:.0f} kB")


def run_seed(seed: int, folder: Path) -> None:
    """Train sft, dpo, extend, extend_dpo of one seed into sub-folders of `folder`."""
    rows = load_preferences("train")[:PAIRS]
    texts = [row[name][-1]["content"] for row in rows for name in ("prompt", "chosen", "rejected")]
    tokenizer = build_tiny_tokenizer(texts)
    probes = build_demo_probes(tokenizer, replace(QUICK, prompts=PROMPTS, seed=seed)).select(families=FAMILIES)
    raw = folder / "raw"
    build_tiny_model(len(tokenizer), seed=seed).save_pretrained(raw)
    tokenizer.save_pretrained(raw)

    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    rejected = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]
    for name, data, steps in (("sft", chosen, SFT_STEPS), ("extend", chosen + rejected, EXTEND_STEPS)):
        sft = SFTTrainer(
            str(raw),
            args=SFTConfig(**_flags(folder / name, steps, SFT_RATE, seed)),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        explain = {"every": 4, "split_by": ByCompletion(sft, len(rows)) if name == "extend" else "sign"}
        _train(
            sft,
            probes,
            4 if name == "sft" else 6,
            explain if seed == EXPLAINED_SEED else None,
            folder / name,
            tokenizer,
        )
        after = "dpo" if name == "sft" else "extend_dpo"
        dpo = DPOTrainer(
            str(folder / name),
            args=DPOConfig(beta=0.1, **_flags(folder / after, DPO_STEPS, DPO_RATE, seed)),
            train_dataset=Dataset.from_list(
                [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
            ),
            processing_class=tokenizer,
        )
        explain = {"every": 1 if after == "dpo" else 2}
        _train(dpo, probes, 2, explain if seed == EXPLAINED_SEED else None, folder / after, tokenizer)


class ByCompletion:
    """Labels training tokens by the answer that they are part of: `chosen` or `rejected`, both pulled up by SFT.

    Args:
        trainer: Its data set holds the chosen answers first.
        n_chosen: How many they are.
    """

    def __init__(self, trainer: SFTTrainer, n_chosen: int) -> None:
        rows: Any = trainer.train_dataset
        self.chosen = {tuple(rows[place]["input_ids"]) for place in range(n_chosen)}

    def __call__(self, batch: MicroBatch) -> Mapping[str, torch.Tensor]:
        """Return the masks (B, S) of both labels."""
        kept = batch.inputs["attention_mask"].bool()
        ids = [tuple(row[mask].tolist()) for row, mask in zip(batch.inputs["input_ids"], kept, strict=True)]
        is_chosen = torch.tensor([row in self.chosen for row in ids], device=batch.labels.device)
        mask = is_chosen[:, None].expand_as(batch.labels)
        return {"chosen": mask, "rejected": ~mask}


def pack(source: Path, target: Path) -> None:
    """Copy a run log; Parquet parts are written without statistics and descriptions, with their values and types."""
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if not file.is_file() or place.relative_to(target).parts[0] in LEFT_OUT:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".parquet":
            shutil.copy(file, place)
            if file.name == "meta.json":  # parts packed anew carry no stamp of the run, so it must not ask for one
                meta = json.loads(file.read_text(encoding="utf-8"))
                place.write_text(json.dumps(meta | {"run_id": None}, indent=2), encoding="utf-8")
            continue
        table = pq.read_table(file).replace_schema_metadata(None)
        pq.write_table(
            table, place, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
        )
        assert pq.read_table(place).equals(table), f"{file} changed when it was packed"


def _flags(folder: Path, steps: int, rate: float, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": seed,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def _train(
    trainer: Trainer,
    probes: ProbeSet,
    every: int,
    explain: dict[str, Any] | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Train, watched and explained, and save the model for what comes after."""
    influence: Any = (
        {"training_tokens": ["chosen"], "tokens_every": 1000, "history": "split", "rule": "gauss2", **explain}
        if explain
        else False
    )
    watch(trainer, probes, every, influence=influence, tokens=False, reference="none")
    trainer.train()
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
