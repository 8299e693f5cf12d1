"""Whatever of the user's draws random numbers, watching leaves the run's own numbers as they were."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from llm_dynamics import watch
from tests.training import build_trainer, dataset_for, make_probes, save_tiny_model, weights_of


def draw():
    """One number of each source."""
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class DrawingCollator(DataCollatorForLanguageModeling):
    """Masks labels at random, by all three sources."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        for threshold in draw():
            batch["labels"][:, int(threshold * batch["labels"].shape[1])] = -100
        return batch


def drawing_model(folder):
    """A model whose forward draws, as layer drop and noise on embeddings do: also in evaluation."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    noise = model.model.embed_tokens

    def shake(module, args, output):
        scale = sum(draw())
        return output * (1 + 1e-3 * scale) if module.training else output

    noise.register_forward_hook(shake)
    return model


class DrawingTokenizer:
    """Mixed into a tokenizer: draws at each call, as BPE dropout may."""

    def __call__(self, *args, **kwargs):
        draw()
        return super().__call__(*args, **kwargs)


def train(case, folder, output_dir, watched, explained):
    like = build_trainer("plain", folder, output_dir)
    tokenizer, rows = like.processing_class, dataset_for("plain", like.processing_class)
    collator, model = (
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    if case == "transform":
        rows = Dataset.from_list([{"ids": ids} for ids in rows["input_ids"]]).with_transform(
            lambda batch: {"input_ids": [ids[int(3 * draw()[k % 3]) :] for k, ids in enumerate(batch["ids"])]}
        )
    elif case == "collator":
        collator = DrawingCollator(tokenizer, mlm=False)
    elif case == "model":
        model = drawing_model(folder)
    elif case == "tokenizer":
        tokenizer.__class__ = type("Drawing", (DrawingTokenizer, type(tokenizer)), {})
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    arguments = TrainingArguments(
        str(output_dir), max_steps=4, per_device_train_batch_size=2, learning_rate=5e-3, use_cpu=True, report_to="none",
        save_strategy="no", remove_unused_columns=False, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, processing_class=tokenizer)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    if watched:
        watch(trainer, make_probes(2), 1, influence={"every": 2} if explained else False)
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    trainer.train()
    return hash(tuple(weights_of(trainer).values())), draw()


@pytest.mark.parametrize("case", ["transform", "collator", "model", "tokenizer"])
def test_what_the_user_brought_may_draw(case, model_folder, tmp_path):
    alone = train(case, model_folder, tmp_path / "alone", False, False)
    watched = train(case, model_folder, tmp_path / "watched", True, case != "model")
    assert watched == alone
