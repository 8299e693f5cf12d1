r"""Reproduction study: SFT, DPO, SFT on both responses and the DPO after it, all watched; and DPO explained.

    python analysis/reproduce/train.py --data hh_helpful_probes_train.jsonl --seed 0 --out runs/reproduce
    python analysis/reproduce/train.py --data hh_helpful_probes_train.jsonl --seed 0 --out runs/reproduce --part cells
    python analysis/reproduce/train.py --size full --model EleutherAI/pythia-410m --data ...   # needs a GPU
    python analysis/reproduce/train.py --size quick --out runs/quick                           # a tiny model, seconds

`--part chain` (the default) trains `sft`, `dpo`, `extend` and `extend_dpo` of one seed into `<out>/seed<n>/`;
`--part cells` runs the short explained DPO runs of `settings.CELLS` from the models that the chain left, into
`<out>/seed<n>/cells/`. What is done already is left alone, so that a killed study goes on. `claims.py` and
`attribution.py` read the run logs.

The data are the 500 rows released with the paper (`hh_helpful_probes_train.jsonl`), as training and probing set;
prompts are plain transcripts ("\n\nHuman: ... \n\nAssistant:"), as in the paper.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rows import Row, StudyRows, study_rows
from settings import BATCH, CELLS, SIZES, Cell, Size
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llm_dynamics import watch
from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--data", type=Path, help="hh_helpful_probes_train.jsonl; without it the package's own pairs")
    parser.add_argument(
        "--model", help="folder or hub id; default: SmolLM2-135M-Instruct, with --size quick a tiny model"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--part", choices=["chain", "cells"], default="chain")
    parser.add_argument("--cells", type=int, nargs="+", help="numbers of the cells to run; default: all")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")
    study = Study.prepare(SIZES[options.size], options)
    begun = time.monotonic()
    if options.part == "chain":
        run_chain(study)
    else:
        run_cells(study, options.cells)
    print(f"seed {options.seed}, {options.part}: {time.monotonic() - begun:.0f} s")


@dataclass(frozen=True)
class Study:
    """What all runs of one seed share.

    Attributes:
        size: How large.
        seed: Of rows, order and probes.
        folder: Where its runs go.
        raw: Folder of the untrained model.
        tokenizer: Its tokenizer.
        rows: Pairs and probes.
    """

    size: Size
    seed: int
    folder: Path
    raw: Path
    tokenizer: PreTrainedTokenizerBase
    rows: StudyRows

    @classmethod
    def prepare(cls, size: Size, options: argparse.Namespace) -> Study:
        """Save the untrained model where the runs can load it from, and draw the rows."""
        raw = options.out / "raw"
        if not (raw / "config.json").exists():
            model, tokenizer = _untrained(options)
            model.save_pretrained(raw)
            tokenizer.save_pretrained(raw)
        tokenizer = AutoTokenizer.from_pretrained(raw)
        rows = study_rows(size, tokenizer, options.seed, options.data)
        return cls(size, options.seed, options.out / f"seed{options.seed}", raw, tokenizer, rows)

    @property
    def epoch(self) -> int:
        """Steps of an epoch over the pairs."""
        return len(self.rows.pairs) // BATCH

    def arguments(self, folder: Path, steps: int, rate: float) -> dict[str, Any]:
        """Return the flags that all runs share."""
        return {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "learning_rate": rate,
            "optim": "rmsprop",
            "max_grad_norm": 10.0,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": self.size.warmup,
            "logging_steps": max(1, steps // self.size.observations),
            "save_strategy": "no",
            "report_to": "none",
            "gradient_checkpointing": False,
            "seed": self.seed,
            "bf16": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": True,
        }


def run_chain(study: Study) -> None:
    """Train sft, dpo, extend, extend_dpo."""
    pairs = study.rows.pairs
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    both = [*chosen, *({"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs)]
    train_sft(study, "sft", chosen, study.size.sft_epochs, parts=(1,))
    train_dpo(study, "dpo", "sft")
    train_sft(study, "extend", both, study.size.extend_epochs)
    train_dpo(study, "extend_dpo", "extend")


def train_sft(study: Study, name: str, rows: list[Row], epochs: int, parts: Sequence[int] = ()) -> None:
    """Train on the completions and keep the model, also as it was after the epochs `parts`."""
    epoch = len(rows) // BATCH
    folder, steps = study.folder / name, epochs * epoch
    if (folder / "config.json").exists():
        return
    arguments = study.arguments(folder, steps, study.size.sft_rate)
    if parts:
        arguments |= {"save_strategy": "steps", "save_steps": parts[0] * epoch, "save_only_model": True}
    trainer = SFTTrainer(
        str(study.raw),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=study.tokenizer,
    )
    watched = study.size.observations if name == "sft" else study.size.later_observations
    watch(trainer, study.rows.probes, max(1, steps // watched), reference="none", seed=study.seed)
    _train(trainer, study, name)
    for part in parts:
        kept = study.folder / f"{name}@{part}"
        shutil.rmtree(kept, ignore_errors=True)
        (folder / f"checkpoint-{part * epoch}").rename(kept)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    trainer.save_model(str(folder))


def train_dpo(study: Study, name: str, start: str) -> None:
    """Train DPO from the model of the run `start`; its own model is not kept."""
    folder, steps = study.folder / name, study.size.dpo_epochs * study.epoch
    if (folder / "finished").exists():
        return
    arguments = study.arguments(folder, steps, study.size.dpo_rate)
    trainer = _dpo_trainer(study, study.folder / start, study.rows.pairs, arguments, precompute=True)
    watch(trainer, study.rows.probes, max(1, steps // study.size.later_observations), reference="none", seed=study.seed)
    _train(trainer, study, name)
    (folder / "finished").touch()


def run_cells(study: Study, only: Sequence[int] | None = None) -> None:
    """Run the explained DPO runs, or those of these numbers."""
    for number, cell in enumerate(CELLS):
        if only is not None and number not in only:
            continue
        folder = study.folder / "cells" / f"{number}"
        if (folder / "finished").exists():
            continue
        start = study.raw if cell.start == "raw" else study.folder / cell.start
        pairs = _with_rejected(study, cell, start)
        probes = study.rows.probes.select(families=["chosen", "rejected"], n_prompts=study.size.cell_prompts)
        if cell.rejected != "rejected":
            probes = _with_own_rejected(probes, pairs)
        arguments = study.arguments(folder, study.size.cell_steps, cell.rate * study.size.dpo_rate)
        arguments["warmup_steps"] = 1  # the step that fills the mean square; its rate is 0
        trainer = _dpo_trainer(study, start, pairs, arguments, precompute=False)  # few pairs are seen
        explain = {"every": 1, "detail": "probe", "families": ["chosen"], "training_tokens": ()}
        watch(trainer, probes, study.size.cell_steps, reference="none", influence=explain, seed=study.seed)
        _train(trainer, study, cell.name)
        (folder / "finished").touch()


def _dpo_trainer(
    study: Study, start: Path, pairs: list[Row], arguments: dict[str, Any], *, precompute: bool
) -> DPOTrainer:
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs]
    return DPOTrainer(
        str(start),
        args=DPOConfig(beta=0.1, precompute_ref_log_probs=precompute, **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=study.tokenizer,
    )


def _with_rejected(study: Study, cell: Cell, start: Path) -> list[Row]:
    """Return the pairs with the responses that the cell pushes down."""
    pairs = study.rows.pairs
    if cell.rejected == "rejected":
        return pairs
    if cell.rejected == "random":
        shuffled = []
        for place, row in enumerate(pairs):  # the words of the next pair's answer, in a seeded order
            words = pairs[(place + 1) % len(pairs)]["chosen"].split()
            order = torch.randperm(len(words), generator=torch.Generator().manual_seed(study.seed + place)).tolist()
            shuffled.append(row | {"rejected": " " + " ".join(words[i] for i in order)})
        return shuffled
    return [row | {"rejected": text} for row, text in zip(pairs, _samples(study, start), strict=True)]


def _samples(study: Study, start: Path) -> list[str]:
    """Sample one response to each prompt from the model that DPO starts from, at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(start)
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    set_seed(study.seed)
    texts = []
    for first in range(0, len(study.rows.pairs), 16):
        batch = tokenizer(
            [row["prompt"] for row in study.rows.pairs[first : first + 16]], return_tensors="pt", padding=True
        )
        with torch.no_grad():
            ids = model.generate(
                **batch, do_sample=True, top_k=0, max_new_tokens=40, pad_token_id=tokenizer.pad_token_id
            )
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text if text.strip() else " I" for text in texts]


def _with_own_rejected(probes: Any, pairs: list[Row]) -> Any:
    """Return the probes with the responses that are really pushed down as `rejected`."""
    rejected = {row["prompt"]: row["rejected"] for row in pairs}
    own = {prompt_id: rejected[probe.prompt] for probe in probes for prompt_id in [probe.prompt_id]}
    return probes.select(families=["chosen"]).add_family("rejected", responses=own)


def _train(trainer: Any, study: Study, name: str) -> None:
    begun = time.monotonic()
    print(f"seed {study.seed}, {name}: {trainer.args.max_steps} steps", flush=True)
    trainer.train()
    print(f"seed {study.seed}, {name}: {time.monotonic() - begun:.0f} s", flush=True)


def _untrained(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), tokenizer
    if options.size == "quick":
        torch.set_num_threads(1)
        texts = [
            row[name][-1]["content"] for row in load_preferences("train") for name in ("prompt", "chosen", "rejected")
        ]
        tokenizer = build_tiny_tokenizer(texts)
        return build_tiny_model(len(tokenizer), seed=options.seed), tokenizer
    return load_smollm2()


if __name__ == "__main__":
    main()
