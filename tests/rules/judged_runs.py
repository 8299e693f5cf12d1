"""Real runs of TRL's trainers on a tiny model, each about a second, for the rules to judge.

Twelve prompts ("Where is the egg?") have an answer each of six words of one vocabulary, and a rejected one of another.
Held-out answers use a third. What a model knows before it is watched is itself trained here:

    blank      nothing
    generic    one reply to every prompt, so that it is sure of that and of little else
    extended   generic, then SFT on both responses of every pair: what is rejected is likely
    ambiguous  every answer to two prompts: all phrases are known, which belongs where is not
"""

import contextlib
import io
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_dynamics import load_run, watch
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.probes import ProbeSet
from tests.trainers.runs import EOS, G, build, run
from tests.trainers.runs import tokenizer as tokenizer_of_rollouts
from tests.training import KINDS, make_probes

THINGS = ["egg", "key", "lamp", "boat", "shoe", "clock", "bread", "chair", "apple", "horse", "drum", "cup"]
HELD_OUT_THINGS = ["fork", "coat", "bell", "ring", "door", "nail", "rope", "tree", "fish", "bird", "moon", "star"]
WORDS = ["kitchen", "river", "garden", "table", "under", "beside", "behind", "window"]
HELD_OUT_WORDS = ["attic", "harbour", "meadow", "shelf", "above", "near", "inside", "tower"]
REJECTED_WORDS = ["never", "always", "maybe", "nobody", "somewhere", "else", "gone", "lost"]
FAMILIES = ("chosen", "rejected", "other_train", "other_test", "ungrammatical", "random_tokens")
REPLY = " I do not know where that thing is."
RIGHT = range(20, 24)
"""Token ids that right and wrong rollouts share."""


@dataclass(frozen=True)
class Rows:
    """Training pairs, and pairs that no run is trained on."""

    pairs: list
    held_out: list

    @property
    def both(self):
        """Prompt and completion, of both responses of every pair."""
        return [
            {"prompt": row["prompt"], "completion": row[name]} for name in ("chosen", "rejected") for row in self.pairs
        ]

    @property
    def chosen(self):
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in self.pairs]

    @property
    def ambiguous(self):
        """Every answer at its own prompt and at another."""
        shifted = self.pairs[5:] + self.pairs[:5]
        others = [
            {"prompt": row["prompt"], "completion": other["chosen"]}
            for row, other in zip(self.pairs, shifted, strict=True)
        ]
        return self.chosen + others

    @property
    def generic(self):
        return [{"prompt": row["prompt"], "completion": REPLY} for row in self.pairs + self.held_out]

    @property
    def thumbs_down(self):
        """KTO's rows of the rejected responses alone."""
        return [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in self.pairs]


def make_rows():
    """Return the rows, the same at every call."""
    draw = random.Random(0)

    def rows(things, words):
        sentence = [" " + " ".join(draw.choice(pool) for _ in range(6)) + "." for pool in (words, REJECTED_WORDS) * 12]
        texts = zip(things, sentence[::2], sentence[1::2], strict=True)
        return [{"prompt": f"Where is the {thing}?", "chosen": yes, "rejected": no} for thing, yes, no in texts]

    return Rows(rows(THINGS, WORDS), rows(HELD_OUT_THINGS, HELD_OUT_WORDS))


ROWS = make_rows()


class Runs:
    """Trains a run when it is first asked for; later ones start from the folders of earlier ones.

    Args:
        folder: Where all of them go.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    @cache  # noqa: B019 (one object a test module)
    def model(self, name):
        """Return the folder of a model of the module's docstring."""
        if name == "blank":
            texts = [row[key] for row in ROWS.pairs + ROWS.held_out for key in row] + [REPLY]
            tokenizer = build_tiny_tokenizer(texts * 3, vocab_size=420)
            folder = self.folder / "blank"
            tokenizer.save_pretrained(folder)
            build_tiny_model(len(tokenizer), hidden_size=32).save_pretrained(folder)
            return folder
        start, rows, arguments = {
            "generic": ("blank", ROWS.generic, {"max_steps": 25, "learning_rate": 5e-3}),
            "extended": ("generic", ROWS.both, {"max_steps": 80, "learning_rate": 3e-3}),
            "ambiguous": ("blank", ROWS.ambiguous, {"max_steps": 80, "learning_rate": 3e-3}),
        }[name]
        trainer = self._trainer("sft", start, name, rows, per_device_train_batch_size=24, **arguments)
        trainer.train()
        trainer.save_model(self.folder / name)
        trainer.processing_class.save_pretrained(self.folder / name)
        return self.folder / name

    @cache  # noqa: B019
    def watched(
        self, kind, start, rows, *, n_prompts=12, families=FAMILIES, influence=False, max_steps=10, **arguments
    ):
        """Return the log of a run that was watched from its first step to its last.

        Args:
            kind: "sft", "dpo" or "kto".
            start: Name of the model that it starts from.
            rows: Attribute of `Rows`.
            n_prompts: Prompts that are watched.
            families: Families that are watched.
            influence: Whether every step is explained.
            max_steps: Optimizer steps.
            **arguments: Of the trainer's config.
        """
        number = len(list(self.folder.glob("run_*")))
        trainer = self._trainer(
            kind, start, f"run_{number}", getattr(ROWS, rows), max_steps=max_steps,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()},
        )  # fmt: skip
        probes = ProbeSet.from_preference_dataset(
            ROWS.pairs, families=families, held_out=ROWS.held_out, tokenizer=trainer.processing_class
        )
        accounted = {"every": 1, "training_tokens": ()} if influence else False
        probes = probes.select(prompt_ids=probes.prompt_ids[:n_prompts])
        watch(trainer, probes, every=1000, tokens=False, influence=accounted)
        trainer.train()
        return load_run(trainer.args.output_dir)

    @cache  # noqa: B019
    def reinforced(self, method):
        """Return the log of a GRPO run whose wrong answers repeat the tokens of the right ones, by `nthr_method`."""
        trainer = build(
            self.folder / f"grpo_{method}", rewards=(1, 0, 0, 0), script=repeats, max_steps=6, nthr_method=method,
            optim="adamw_torch",
        )  # fmt: skip
        probes = make_probes(n_prompts=2, families=("chosen", "rejected"))
        watch(trainer, probes, every=1000, tokens=False, displacement={"every": 1})
        run(trainer)
        return load_run(trainer.args.output_dir)

    def _trainer(self, kind, start, name, rows, **arguments):
        transformers.set_seed(0)
        trainer_class, config_class = KINDS[kind]
        folder = self.model(start)
        settings = {
            "output_dir": str(self.folder / name), "per_device_train_batch_size": 12, "lr_scheduler_type": "constant",
            "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "dataloader_pin_memory": False, "gradient_checkpointing": False, "logging_steps": 1000,
        }  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            return trainer_class(
                model=AutoModelForCausalLM.from_pretrained(folder),
                args=config_class(**settings | arguments),
                train_dataset=Dataset.from_list(rows),
                processing_class=AutoTokenizer.from_pretrained(folder),
            )


def repeats(prompts, trainer):
    """Answer each question with one short right answer, and long wrong ones of the same tokens."""
    draw = random.Random(trainer.state.global_step)
    completions = [[*(draw.choice(RIGHT) for _ in range(8 if i % G else 3)), EOS] for i in range(len(prompts))]
    prompt_ids = [tokenizer_of_rollouts()(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def ends(run):
    """Every probe at both ends of a run, by pandas alone: one row a probe, columns `<column>_start`, `<column>_end`."""
    rows = pd.read_parquet(run.path / "sequences")
    steps = rows["step"]
    first, last = (rows[steps == step].set_index("probe_id") for step in (steps.min(), steps.max()))
    table = pd.concat([first.add_suffix("_start"), last.add_suffix("_end")], axis=1)
    return table.rename(columns={"family_start": "family", "n_tokens_start": "n_tokens"})
