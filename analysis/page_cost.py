"""What the report page costs: bytes, seconds to write, seconds to open, at 500 probes x 100 observations x 200 tokens.

    python analysis/page_cost.py                       # about 5 minutes; the log is made in a temporary folder
    python analysis/page_cost.py --log runs/big        # keep the log there, and use it again
    python analysis/page_cost.py --like runs/demo/sft  # also: how the made-up tokens compare with a real run's
    python analysis/page_cost.py --probes 60 --steps 20 --tokens 30    # seconds: checks that the script runs

The log is made up (no model): ten families on fifty prompts. Each token has a logit that drifts and jitters from one
observation to the next, and from it a log-prob, a rank and a greedy token. What decides the size of the page is how
unpredictable they are from one observation to the next; the third table says how much, beside a real run where one is
given with --like.

Opening is measured in headless Chromium (Debian: `apt-get install chromium`; the driver of the tests), by the page's
own clock: from the start of the navigation until every figure is drawn and the first probe's tokens are unpacked. A
page of an empty log, which holds plotly.js and little else, stands beside it: it is what any page costs here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from llm_dynamics.report import write_report
from llm_dynamics.report.token_blocks import levels_of
from llm_dynamics.report.token_section import token_section
from llm_dynamics.report.token_table import TokenTable, read_token_table
from llm_dynamics.runlog import RunLog, RunLogError, RunLogs, RunLogWriter, load_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.report.chromium import Chromium, find_chromium

FAMILIES = (
    "chosen", "rejected", "chosen_semantic", "rejected_semantic", "chosen_format", "rejected_format", "other_train",
    "other_test", "ungrammatical", "random_tokens",
)  # fmt: skip
DRIFT = (-0.6, -2.4, -0.9, -1.8, -1.0, -1.6, -1.2, -1.1, -1.9, -0.8)
"""Nats by which the logit of a token of each family drifts over the run, on average."""
BROWSERS = ("starting", "rested", "used")
REST = 5.0
"""Seconds after which a browser has done what it does at its start."""
JITTER = 0.15
"""Standard deviation of a logit around its drift, independent from one observation to the next."""


def write_log(folder: Path, *, n_probes: int, n_steps: int, n_tokens: int, seed: int = 0) -> RunLog:
    """Write a run log of made-up tokens; `n_probes` is rounded down to whole prompts of ten families."""
    rng = np.random.default_rng(seed)
    n_prompts = n_probes // len(FAMILIES)
    syllables = ["ba", "re", "mi", "to", "lu", "sha", "ken", "vor", "ti", "pan", "os", "el", "gra", "ny", "ix", "dom"]
    words = np.array([" " + "".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(8000)])
    names = [(family, number) for number in range(n_prompts) for family in FAMILIES]
    tokens = rng.choice(words, (len(names), n_tokens))  # (P, M)
    probes = pd.DataFrame(
        {
            "probe_id": [f"{family}-{number}" for family, number in names],
            "prompt_id": [f"prompt-{number}" for _, number in names],
            "family": [family for family, _ in names],
            "prompt": [f"Question {number}:{''.join(words[number : number + 40])}?" for _, number in names],
            "response": ["".join(row) for row in tokens],
            "source_row": [number for _, number in names],
            "n_cut": 0,
        }
    )
    writer = RunLogWriter(folder)
    writer.start(probes, {"trainer": "DPOTrainer", "model": "made up: no model", "every": 10})
    start = rng.normal(-1.5, 3.5, tokens.shape)
    drift = rng.normal([DRIFT[FAMILIES.index(family)] for family, _ in names], 1.0, tokens.shape[::-1]).T
    others = rng.choice(words, (3, *tokens.shape))
    rival = np.zeros(tokens.shape, int)
    about = probes[["probe_id", "prompt_id", "family"]]
    for number in range(n_steps):
        logit = start + drift * number / max(1, n_steps - 1) + rng.normal(0, JITTER, tokens.shape)
        logp = -np.logaddexp(0, -logit)
        rank = np.round(np.exp(0.95 * np.maximum(0, -logit) + rng.normal(0, 0.04, tokens.shape))).astype(int)
        rival = np.where(rng.random(tokens.shape) < 0.06, rng.integers(0, 3, tokens.shape), rival)
        greedy = np.where(rank == 1, tokens, np.take_along_axis(others, rival[None], axis=0)[0])
        rows = pd.DataFrame(
            {
                "probe_id": np.repeat(probes["probe_id"].to_numpy(), n_tokens),
                "position": np.tile(np.arange(n_tokens), len(names)),
                "token_id": 0,
                "token": tokens.ravel(),
                "logp": logp.ravel(),
                "greedy_token": greedy.ravel(),
                "rank": rank.ravel(),
            }
        )
        squeezing = {f"{name}_sum": np.exp(logp).sum(1) for name in ("p_label", "p_other", "collision", "entropy")}
        sequences = about.assign(
            n_tokens=n_tokens, n_nonfinite=0, logp_sum=logp.sum(1), argmax_logp_sum=0.4 * logp.sum(1), **squeezing
        )
        writer.write(10 * number, sequences=sequences, tokens=rows, scalars=lambda: {"n_probes": len(names)})
    return load_run(folder)


def empty_log(folder: Path) -> RunLog:
    """Write the log of a run that observed nothing."""
    probes = pd.DataFrame(
        {"probe_id": ["chosen-0"], "prompt_id": ["0"], "family": ["chosen"], "prompt": ["?"], "response": ["!"]}
    )
    RunLogWriter(folder).start(probes, {"trainer": "DPOTrainer"})
    return load_run(folder)


def opening_seconds(browser: Chromium, page: Path) -> float:
    """Return the seconds from the start of the navigation until the page says that it is drawn, by its own clock."""
    browser.open(page)
    if browser.errors:
        raise RuntimeError(f"{page} has errors: {browser.errors}")
    return float(browser.js("Number(document.documentElement.dataset.drawn)")) / 1000


def predictability(table: TokenTable) -> dict[str, float]:
    """Return how tokens change from one observation to the next: entropies in bits, shares of cells."""
    bits = {
        "log-prob, to 0.01 nats": np.diff(np.round(table.logp.astype(float) / 0.01), axis=0),
        "rank, to 10%": np.diff(levels_of(table.rank), axis=0),
    }
    return {
        **{f"bits of the change of {name}": _entropy(change[np.isfinite(change)]) for name, change in bits.items()},
        "share of greedy tokens that change": float((np.diff(table.greedy, axis=0) != 0).mean()),
        "share of tokens of rank 1": float((table.rank == 1).mean()),
    }


def _entropy(values: np.ndarray) -> float:
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="openings of each page; medians are printed")
    parser.add_argument("--log", type=Path, help="where the log is kept; one that is there is used")
    parser.add_argument("--like", type=Path, nargs="*", default=(), help="real runs to compare the made-up tokens with")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.log or Path(scratch) / "log"
        try:
            run = load_run(folder)
        except RunLogError:
            size = {"n_probes": options.probes, "n_steps": options.steps, "n_tokens": options.tokens}
            run = write_log(folder, **size)
        pages = {"this log": Path(scratch) / "big.html", "an empty log": Path(scratch) / "empty.html"}
        wall, cpu = time.perf_counter(), time.process_time()
        write_report(run, pages["this log"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        write_report(empty_log(Path(scratch) / "empty"), pages["an empty log"])
        table = read_token_table(run)
        n_steps, n_tokens = table.logp.shape
        print(f"{len(run.probes)} probes x {n_steps} observations x {n_tokens / len(table.probe_ids):g} tokens.")
        print(f"Page written in {cpu:.1f} s of CPU ({wall:.1f} s by the clock). Notes on the page:")
        for note in token_section(RunLogs({"this log": run})).view["notes"]:
            print(f"- {note}")
        opened = open_in_turn(pages, options.rounds, Path(scratch) / "profiles")
        print(f"\nLoad average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n")
        print("| page of | MB | browser | seconds to open, median | each |\n|---|---|---|---|---|")
        for (name, state), seconds in opened.items():
            each = ", ".join(f"{value:.2f}" for value in seconds)
            median = f"{statistics.median(seconds):.2f}" if seconds else "no Chromium found"
            print(f"| {name} | {pages[name].stat().st_size / 1e6:.2f} | {state} | {median} | {each} |")
    tables = {"this log": table} | {str(path): read_token_table(load_run(path)) for path in options.like}
    known = {name: predictability(table) for name, table in tables.items() if table is not None}
    print(f"\n| from one observation to the next | {' | '.join(known)} |\n|---|{'---|' * len(known)}")
    for name in known["this log"]:
        print(f"| {name} | {' | '.join(f'{own[name]:.3g}' for own in known.values())} |")


def open_in_turn(pages: dict[str, Path], rounds: int, profiles: Path) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of each opening, by page and browser; pages take turns, so that load from outside meets all.

    A browser is starting when the page is its first, at once and with an empty profile; rested, when it was started
    some seconds ago and has shown no page before; used, when it has shown this page before, in the same tab.
    """
    opened: dict[tuple[str, str], list[float]] = {(name, state): [] for name in pages for state in BROWSERS}
    binary = find_chromium()
    if binary is None:
        return opened
    for number in range(rounds):
        for name, page in pages.items():
            for state in BROWSERS:
                if state != "used":
                    browser = Chromium(binary, profiles / f"{name}-{state}-{number}")
                if state == "rested":
                    time.sleep(REST)
                opened[name, state].append(opening_seconds(browser, page))
                if state != "rested":
                    browser.close()
    return opened


if __name__ == "__main__":
    main()
