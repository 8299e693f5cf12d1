"""Shared fixtures: a tiny tokenizer and tiny models, built in code, offline."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ["TRACKIO_DIR"] = os.path.join(tempfile.gettempdir(), f"trackio-{os.getpid()}")  # read at its import

import pytest
import torch

from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.probes.rows import prompt_id

atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)
torch.set_num_threads(1)  # models so small lose more to waiting for a second thread than they gain

CORPUS = [
    "How long should I boil an egg? About ten minutes in gently boiling water.",
    "Why is the sky blue? Because air scatters blue light more than red light.",
    "Name the capital of France. The capital of France is Paris.",
    "Write a short greeting. Dear friend, I hope that this letter finds you well.",
    "Figure it out yourself; it is not that hard. Why would I know or care about that?",
]

PREFERENCES = [
    {
        "prompt": "How long should I boil an egg?",
        "chosen": "About ten minutes in gently boiling water.",
        "rejected": "Figure it out yourself; eggs are not that hard.",
    },
    {
        "prompt": "Why is the sky blue?",
        "chosen": "Because air scatters blue light more than red light.",
        "rejected": "Why would I know or care about the sky?",
    },
    {
        "prompt": "Name the capital of France.",
        "chosen": "The capital of France is Paris.",
        "rejected": "Everybody knows that one, so look at a map.",
    },
    {
        "prompt": "Write a short greeting.",
        "chosen": "Dear friend, I hope that this letter finds you well.",
        "rejected": "Hi, whatever your name is.",
    },
    {
        "prompt": "What do plants need to grow?",
        "chosen": "They need light, water, air and a little patience.",
        "rejected": "Plants again; ask somebody who cares.",
    },
    {
        "prompt": "How do I clean a window?",
        "chosen": "Use warm water with a little vinegar and a soft cloth.",
        "rejected": "With your hands, obviously, what else.",
    },
]
FIRST, SECOND = (prompt_id(row["prompt"]) for row in PREFERENCES[:2])
"""Ids of the first two prompts."""


@pytest.fixture(scope="session")
def preference_rows():
    """Six plain-text preference rows (prompt, chosen, rejected)."""
    return [dict(row) for row in PREFERENCES]


@pytest.fixture(scope="session")
def chat_preference_rows():
    """The same rows in TRL's conversational form."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in PREFERENCES
    ]


@pytest.fixture
def tokenizer():
    """A fresh tiny byte-level tokenizer with a ChatML template (trainers may change theirs)."""
    return build_tiny_tokenizer(CORPUS, vocab_size=400)


@pytest.fixture
def tiny_model(tokenizer):
    """A fresh tiny tied Llama in float32, evaluation mode."""
    return build_tiny_model(len(tokenizer))
