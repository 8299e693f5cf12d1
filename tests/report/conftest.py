import pytest

from llm_dynamics.runlog import load_runs

from .chromium import NAMES, Chromium, find_chromium
from .synthetic import ANSWERS, DPO_DELTA, HOSTILE, SFT_DELTA, write_accounts, write_run


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


@pytest.fixture(scope="session")
def explained(tmp_path_factory):
    """A DPO run of which every optimizer step is explained."""
    run = write_run(
        tmp_path_factory.mktemp("explained") / "dynamics",
        "DPOTrainer",
        DPO_DELTA,
        steps=(0, 12, 24),
        seed=3,
        n_prompts=3,
    )
    return write_accounts(run, nan_tokens=3)


@pytest.fixture(scope="session")
def hostile_account(tmp_path_factory):
    """An explained run in which every free text is an attack."""
    run = write_run(
        tmp_path_factory.mktemp("hostile_account") / "dynamics", "DPOTrainer", {"chosen": -1.0, HOSTILE: -3.0},
        words=[HOSTILE, "\u202e"], text=HOSTILE, prompt=HOSTILE, n_prompts=2, steps=(0, 3),
    )  # fmt: skip
    answers = {HOSTILE: f"{HOSTILE} \u202e x", "rejected": f"{ANSWERS['rejected']} {HOSTILE}"}
    return write_accounts(run, steps=range(1, 4), roles=tuple(answers), answers=answers, note=HOSTILE, prompt=HOSTILE)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    # tests that need it are skipped where none is installed
    binary = find_chromium()
    if binary is None:
        pytest.skip(f"no Chromium found; looked for {', '.join(NAMES)} on PATH (Debian: apt-get install chromium)")
    chromium = Chromium(binary, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()
