import pytest

from llm_dynamics.runlog import load_runs

from .synthetic import DPO_DELTA, HOSTILE, SFT_DELTA, write_run


@pytest.fixture(scope="session")
def sft(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("sft") / "dynamics", "SFTTrainer", SFT_DELTA, seed=1)


@pytest.fixture(scope="session")
def dpo(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("dpo") / "dynamics", "DPOTrainer", DPO_DELTA, seed=2, nan_probe="other_test-3"
    )


@pytest.fixture(scope="session")
def both(sft, dpo):
    return load_runs({"sft": sft.path, "dpo": dpo.path})


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A run in which every free text is an attack."""
    return write_run(
        tmp_path_factory.mktemp("hostile") / "dynamics", f"DPOTrainer{HOSTILE}",
        {"chosen": -1.0, "rejected": -9.0, HOSTILE: -3.0}, words=[HOSTILE, "&lt;b&gt;", "\u202e", "\u2028"],
        text=HOSTILE, prompt=HOSTILE, n_prompts=2, meta={"note": HOSTILE, HOSTILE: {"deep": [HOSTILE]}},
    )  # fmt: skip
