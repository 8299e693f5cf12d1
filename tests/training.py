"""Tiny trainers of every kind, in seconds on a CPU, and what is compared of a run."""

from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from llm_dynamics.callbacks import InfluenceCallback
from llm_dynamics.callbacks.displacement import DisplacementOptions
from llm_dynamics.callbacks.probe_options import ProbeOptions
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.probes import ProbeSet
from tests.conftest import CORPUS, PREFERENCES

# In tests a fault of ours is a failure, unless a test says what it wants.
for options in (ProbeOptions, DisplacementOptions):
    *others, on_error = options.__init__.__defaults__
    assert on_error == "warn"
    options.__init__.__defaults__ = (*others, "raise")
assert InfluenceCallback.__init__.__kwdefaults__["on_error"] == "warn"
InfluenceCallback.__init__.__kwdefaults__["on_error"] = "raise"

# On tiny models a second thread gains nothing, and costs tenfold where the cores are busy with something else.
torch.set_num_threads(1)

KINDS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "plain": (Trainer, TrainingArguments),
}
FAMILIES = ("chosen", "rejected", "other_train", "ungrammatical")
OURS = ("probe/", "squeeze/", "dynamics/", "influence/")
TIMED = ("_runtime", "_per_second", "step_time", "tps")
TIMED_COLUMNS = ["seconds_observing", "seconds_training", "overhead"]


def save_tiny_model(folder, *, dropout=0.0):
    """Save a tiny Llama and its tokenizer to `folder`: DPO reloads its reference from there."""
    tokenizer = build_tiny_tokenizer(CORPUS, vocab_size=320)
    model = build_tiny_model(len(tokenizer), hidden_size=32)
    model.config.attention_dropout = dropout
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_probes(n_prompts=4, families=FAMILIES):
    """Probes of the first `n_prompts` preference rows."""
    probes = ProbeSet.from_preference_dataset(PREFERENCES, families=families)
    return probes.select(prompt_ids=probes.prompt_ids[:n_prompts])


def many_letters(completions, **_):
    """Reward: distinct characters of a completion, a text or the last of its messages."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(len(set(text))) for text in texts]


def dataset_for(kind, tokenizer):
    """The six preference rows in the form that a kind of trainer takes."""
    if kind == "dpo":
        return Dataset.from_list(PREFERENCES)
    if kind == "sft":
        return Dataset.from_list([{"prompt": row["prompt"], "completion": " " + row["chosen"]} for row in PREFERENCES])
    if kind == "kto":
        return Dataset.from_list(
            [
                {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
                for row in PREFERENCES
                for name in ("chosen", "rejected")
            ]
        )
    if kind in ("grpo", "rloo"):
        return Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES])
    texts = [f"{row['prompt']} {row['chosen']}" for row in PREFERENCES]
    return Dataset.from_list([{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]])


def build_trainer(
    kind, model_folder, output_dir, *, lora=False, dropout=0.0, callbacks=(), rows=None, evaluates=False, **arguments
):
    """Build a trainer of `kind` on the model of `model_folder`; a run of it depends on nothing but its arguments.

    `dropout` is the adapter's; attention dropout is a setting of the saved model. `rows` stand for those of
    `dataset_for`; where `evaluates`, they are evaluated on too.
    """
    transformers.set_seed(0)
    trainer_class, config_class = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if kind in ("dpo", "kto"):
        settings["disable_dropout"] = False
    options = {}
    if kind in ("grpo", "rloo"):
        settings |= {"num_generations": 2, "max_completion_length": 6}
        options["reward_funcs"] = many_letters
    if kind == "plain":
        options["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if lora:
        options["peft_config"] = LoraConfig(
            r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    data = dataset_for(kind, tokenizer) if rows is None else rows
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=config_class(**settings | arguments),
        train_dataset=data,
        eval_dataset=data if evaluates else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **options,
    )


def weights_of(trainer):
    """Every parameter and buffer of the trained model as bytes, by name."""
    return {name: tensor.numpy().tobytes() for name, tensor in trainer.model.state_dict().items()}


def own_rows(trainer):
    """The trainer's own part of its log rows: all but our metrics and wall time; values as their exact text."""
    rows = []
    for row in trainer.state.log_history:
        kept = {key: repr(value) for key, value in row.items() if not key.startswith(OURS) and not key.endswith(TIMED)}
        if kept.keys() - {"step", "epoch"}:
            rows.append(kept)
    return rows


def uses_dropout(trainer):
    """Whether two forwards in training mode differ, and the dropout of an adapter was left on."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    model = trainer.model.train()
    with torch.no_grad():
        differ = not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    layers = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    return differ and all(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in layers)


def plain_sums(model_folder, encoded, trainer=None):
    """Each probe's sum of log-probs and of greedy log-probs by its definition: one row, one whole log-softmax.

    Under the model saved at `model_folder`, or with the weights of a full fine-tune `trainer`.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    if trainer is not None:
        model.load_state_dict(trainer.model.state_dict())
    sums, greedy = [], []
    for probe in encoded:
        labels = torch.tensor(probe.response_ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*probe.prompt_ids, *probe.response_ids]])).logits[0].double()
        logp = logits.log_softmax(-1)[len(probe.prompt_ids) - 1 : -1]
        sums.append(float(logp.gather(1, labels[:, None]).sum()))
        greedy.append(float(logp.max(dim=1).values.sum()))
    return sums, greedy
