r"""Data of the recipes: preference pairs and questions, by a short name, a hub id, a local folder or a local file.

| `--dataset_name` | what |
|---|---|
| `polite_pairs` | the package's own 112 short pairs; needs no network |
| `hh_helpful_base` | `Anthropic/hh-rlhf`, data_dir `helpful-base`: transcripts, split at the last "Assistant:" |
| `ultrafeedback` | `trl-lib/ultrafeedback_binarized` |
| `math` | `DigitalLearningGmbH/MATH-lighteval`: `problem`, `solution` (`--task math` of grpo.py) |
| a hub id, or a folder laid out like one | `--dataset_config` names the configuration (of a folder: the subfolder) |
| a .jsonl, .json, .parquet or .csv file | its rows are the split `train` |

A `datasets:` section in the YAML mixes several, as in TRL's own scripts; its `test_split_size` holds rows out.

Pairs may be plain or conversational, with a prompt column or the prompt inside both responses; SFT also takes rows of
prompt and completion, `messages`, `conversations` or `text`, KTO rows of prompt, completion and label. Models without a
chat template get conversations as plain text in the form of HH's transcripts ("\n\nHuman: ... \n\nAssistant:"); models
with one get transcripts as chat messages, and with `--as_chat` any plain text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset

from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.probes.forms import ASSISTANT, HUMAN, OddRow, RowForm, response_text, to_chat
from llm_dynamics.probes.rows import read_jsonl

logger = logging.getLogger(__name__)

PAIR = ("prompt", "chosen", "rejected")
SOURCES: dict[str, dict[str, str]] = {
    "hh_helpful_base": {"path": "Anthropic/hh-rlhf", "data_dir": "helpful-base"},
    "ultrafeedback": {"path": "trl-lib/ultrafeedback_binarized"},
    "math": {"path": "DigitalLearningGmbH/MATH-lighteval"},
}
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
CONSUMED = ("completion", "label", "messages", "conversations", "text")
"""Columns whose contents are prompt and answers."""
ROLES = {"user": HUMAN, "assistant": ASSISTANT}


@dataclass
class PairArguments(ScriptArguments, DatasetMixtureConfig):
    """TRL's script arguments, its mixture of data sets, and how pairs are read.

    Attributes:
        as_chat: Make plain prompts and responses chat messages, so that the model's chat template is applied.
    """

    as_chat: bool = field(
        default=False,
        metadata={
            "help": "Make plain prompts and responses chat messages, so that the model's chat template is applied. By "
            "default plain text is trained on as it stands, as TRL does."
        },
    )


def uses_chat(model_args: ModelConfig, training_args: Any) -> bool:
    """Tell whether the model is trained on chat messages: it has a chat template, or SFT gives it one."""
    if getattr(training_args, "chat_template_path", None):
        return True
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    return tokenizer.chat_template is not None


def load_pairs(args: PairArguments, *, chat: bool, held_out: bool = False, needs: Sequence[str] = PAIR[1:]) -> Dataset:
    """Load rows of any form as one prompt with its answers, TRL's explicit form.

    Args:
        args: `dataset_name`, `dataset_config`, `datasets`, the splits and `as_chat` are used.
        chat: Whether the model reads chat messages, see `uses_chat`.
        held_out: Load the test split.
        needs: Answers that every row must have; none: one of the two, as KTO's rows have.

    Returns:
        Rows of `prompt`, `chosen`, `rejected`, and the other columns of the source. What has no prompt with these
        answers is left out and counted in a warning.

    Raises:
        ValueError: If no row is a pair, the source cannot be named, or a model without chat template is asked for chat.
    """
    if args.as_chat and not chat:
        raise ValueError(
            "as_chat is True, and the model has no chat template; leave it out (SFT: --chat_template_path)"
        )
    split = args.dataset_test_split if held_out else args.dataset_train_split
    name = "datasets" if args.datasets else args.dataset_name
    if args.datasets:
        rows = load_mixture(args, split)
    else:
        rows = load_preferences(split) if name == "polite_pairs" else load_rows(args, split)
    form = RowForm.of(list(rows), as_chat=args.as_chat, transcripts=True)
    if args.as_chat and set(rows[0]) & {"text"} and not set(rows[0]) & {"prompt", *PAIR[1:], "messages"}:
        raise ValueError(f"{name}: as_chat is True, and the rows are a text each, without turns; leave as_chat out")
    pairs = [pair for row in rows if (pair := as_pair(row, form, chat=chat, needs=needs)) is not None]
    wanted = "two answers" if len(needs) > 1 else "an answer"
    if len(pairs) < len(rows):
        logger.warning("%d of %d rows are not one prompt with %s; left out", len(rows) - len(pairs), len(rows), wanted)
    if not pairs:
        raise ValueError(
            f"{name}: no row is a prompt with {wanted}; columns seen: {list(rows[0])}. Rows need prompt, "
            "chosen and rejected (texts, or chat messages), or chosen and rejected that begin with the prompt; SFT "
            "takes prompt and completion, messages or text, too, KTO prompt, completion and label: rename columns"
        )
    if chat and isinstance(pairs[0]["prompt"], str):
        logger.warning(
            "the model has a chat template, and the rows are plain text: they are trained on as they stand, without "
            "it. Add --as_chat to make them chat messages"
        )
    names = dict.fromkeys(name for pair in pairs for name in pair)  # from_list takes the columns of the first row
    return Dataset.from_list([{name: pair.get(name) for name in names} for pair in pairs])


def load_mixture(args: DatasetMixtureConfig, split: str) -> Dataset:
    """Load a split of a mixture: `train`, and `test` where `test_split_size` holds rows out, by a fixed seed.

    Raises:
        ValueError: For streaming, or another split.
    """
    if args.streaming:
        raise ValueError("streaming is True; probes are drawn from all rows, so load them")
    splits = get_dataset(replace(args, test_split_size=None))
    if args.test_split_size is not None:  # TRL's own split has no seed: a resumed run would train on other rows
        splits = splits["train"].train_test_split(test_size=args.test_split_size, seed=0)
    if split not in splits:
        raise ValueError(
            f"datasets has the splits {', '.join(splits)}, not {split!r}; set test_split_size to hold rows out"
        )
    return splits[split]


def load_rows(args: ScriptArguments, split: str) -> Dataset:
    """Load a split of what `dataset_name` names, as it is.

    Raises:
        ValueError: For no name, streaming, a file that is empty or of another kind, a line of a .jsonl that is no JSON
            object, or another split than train of a single file.
        FileNotFoundError: If the name is that of a file, and there is none.
        DatasetGenerationError: If `datasets` cannot make a table of the file.
    """
    name, config = args.dataset_name, args.dataset_config
    if name is None:
        raise ValueError(f"dataset_name is not given; allowed: polite_pairs, {', '.join(SOURCES)}, a hub id or a path")
    if args.dataset_streaming:
        raise ValueError("dataset_streaming is True; probes are drawn from all rows, so load the whole split")
    if name in SOURCES:
        return load_dataset(**SOURCES[name], name=config, split=split)
    path = Path(name)
    if path.is_file():
        if not split.startswith("train"):
            raise ValueError(f"{name} is one file, which is the split train; for {split!r} give a folder with both")
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"{name} ends in {path.suffix!r}; allowed: {', '.join(FILE_TYPES)}")
        if not path.stat().st_size:
            raise ValueError(f"{name} is empty; give a line per pair")
        try:
            return load_dataset(FILE_TYPES[path.suffix], data_files={"train": str(path)}, split=split)
        except DatasetGenerationError:
            if path.suffix == ".jsonl":
                read_jsonl(path)  # names the line that is no JSON
            raise
    if path.suffix in FILE_TYPES:
        raise FileNotFoundError(f"there is no file {name} in {Path.cwd()}")
    if path.is_dir():
        return load_dataset(str(path), data_dir=config, split=split)
    return load_dataset(name, name=config, split=split)


def as_pair(
    row: Mapping[str, Any], form: RowForm, *, chat: bool, needs: Sequence[str] = PAIR[1:]
) -> dict[str, Any] | None:
    """Return a row with an explicit prompt and the answers in `needs`, or None where it is not that."""
    try:
        pair = form.explicit(row)
        if chat and isinstance(pair["prompt"], str) and pair["prompt"].startswith(HUMAN):
            pair = to_chat(pair)
        texts = {name: pair[name] for name in PAIR[1:] if pair[name]}
        texts = {name: text if isinstance(text, str) else response_text(text) for name, text in texts.items()}
    except OddRow:
        return None
    if not pair["prompt"] or not all(texts.get(name, "").strip() for name in needs or texts or PAIR):
        return None
    if not chat and not isinstance(pair["prompt"], str):
        pair = {"prompt": write_transcript(pair["prompt"])} | {name: f" {texts[name].strip()}" for name in texts}
    rest = {name: value for name, value in row.items() if name not in (*PAIR, *CONSUMED)}
    if not any(row.get(name) for name in (*PAIR, "completion")):  # SFTTrainer trains on the whole
        if isinstance(pair["chosen"], list):
            rest["messages"] = [*pair["prompt"], *pair["chosen"]]
        elif row.get("text"):
            rest["text"] = row["text"]
    return rest | {name: value for name, value in pair.items() if value}


def write_transcript(messages: list[dict[str, str]]) -> str:
    """Return chat messages as a transcript that ends in "Assistant:"; a system message stands before it."""
    turns = [
        f"{ROLES[turn['role']]} {turn['content']}" if turn["role"] in ROLES else turn["content"] for turn in messages
    ]
    return "".join(turns) + ASSISTANT
