"""Logs that outgrow memory: what curves of 50,000,000 token rows cost in seconds and in memory, way by way.

    python analysis/large_log.py                                   # 50 million rows, every column: about 2.2 GB in /tmp
    python analysis/large_log.py --rows 5_000_000 --whole          # and the whole table in pandas, for comparison
    python analysis/large_log.py --lean --ways token_curves        # columns that nobody reads are null: quick to write
    python analysis/large_log.py --log runs/dpo                    # a log of your own

It writes a log of the real layout (probes, sequences, steps, and tokens with one Parquet part per observation) with
made-up numbers into a temporary folder, removed at the end, and takes the mean log-prob per token of every family at
every observation in several ways, each in a process of its own:

- `bare read`: the columns needed, part by part, and nothing is computed: the floor;
- `token_curves`: `llm_dynamics.token_curves(run)`, with percentiles; `delta`: each token against its own start;
  `by position`: by family and position;
- `DuckDB`, `polars`: the one-liners of docs/runlog.md, means alone; `DuckDB with percentiles`: what token_curves gives;
- `family_curves`: `llm_dynamics.family_curves(run)`, from the sequences table, which has a row per response: what to
  use where its sums will do;
- `whole table` (with `--whole`): `load_run(...).tokens` in pandas, all columns at once.

All must agree. Seconds are wall time of the work, imports left out, CPU seconds those of all threads; medians over
rounds in which the ways take turns. Peak memory is that of the whole process, imports included: VmHWM of Linux, which
unlike ru_maxrss does not start at the peak of the parent; ru_maxrss elsewhere.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llm_dynamics.runlog import RunLog, load_run, schema

FAMILIES = ("chosen", "rejected", "chosen_semantic", "rejected_semantic", "chosen_format", "rejected_format",
            "other_train", "other_test", "ungrammatical", "random")  # fmt: skip
RESPONSE = 200
"""Tokens of every response."""
EVERY = 25
"""Optimizer steps between observations."""
VOCABULARY = 49_152
LEAN = ("step", "probe_id", "position", "logp")
"""Columns that are written where the others are left null."""


def main() -> None:
    """Write the log, run every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000_000, help="rows of the tokens table")
    parser.add_argument("--observations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--whole", action="store_true", help="also the whole table in pandas: about 400 bytes a row")
    parser.add_argument("--lean", action="store_true", help="leave null what no way reads")
    parser.add_argument("--log", type=Path, help="a run log that is there already, instead of a made-up one")
    parser.add_argument("--run-way", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_way:
        print(json.dumps(run_way(options.run_way, load_run(options.log))))
        return
    ways = [*dict.fromkeys(["bare read", *options.ways]), *(["whole table"] if options.whole else [])]
    with tempfile.TemporaryDirectory(prefix="large_log_") as folder:
        log = options.log
        if log is None:
            log = Path(folder) / "run"
            started = time.perf_counter()
            write_log(log, options.rows, options.observations, lean=options.lean)
            print(f"log written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        measured = [(way, in_a_process(way, log)) for way in ways * options.rounds]
        check([answer for _, answer in measured])
        print("\n".join(table(measured, log)))


# ---- the log ---------------------------------------------------------------------------------------------------------


def write_log(folder: Path, rows: int, observations: int, *, lean: bool = False, seed: int = 0) -> None:
    """Write a run log of `rows` token rows: every family falls or rises at its own pace, token by token with noise."""
    n_probes = max(1, rows // (observations * RESPONSE))
    rng = np.random.default_rng(seed)
    families = [FAMILIES[number % len(FAMILIES)] for number in range(n_probes)]
    prompts = [f"p{number // len(FAMILIES):06d}" for number in range(n_probes)]
    ids = [f"{prompt}/{family}" for prompt, family in zip(prompts, families, strict=True)]
    about = {"probe_id": ids, "prompt_id": prompts, "family": families}
    for table in ("sequences", "tokens", "steps"):
        (folder / table).mkdir(parents=True)
    (folder / schema.META_FILE).write_text(json.dumps({"schema_version": schema.SCHEMA_VERSION, "trainer": "made up"}))
    _write(folder / schema.PROBES_FILE, schema.PROBES, n_probes, {**about, "prompt": prompts, "response": ids})
    owner = np.repeat(np.arange(n_probes), RESPONSE)
    token_ids = rng.integers(0, VOCABULARY, len(owner), dtype=np.int32)
    vocabulary = pa.array([f" t{token}" for token in range(VOCABULARY)])
    fixed = {
        "probe_id": pa.array(ids).take(pa.array(owner)),
        "position": np.tile(np.arange(RESPONSE, dtype=np.int32), n_probes),
        "token_id": token_ids,
        "token": vocabulary.take(pa.array(token_ids)),
        "ref_logp": (start := -rng.gamma(1.0, 2.0, len(owner)).astype(np.float32)),
    }
    pace = np.linspace(-0.02, 0.01, len(FAMILIES), dtype=np.float32)[owner % len(FAMILIES)]
    for number in range(observations):
        step, part = number * EVERY, schema.part_name(number * EVERY)
        noise = rng.standard_normal(len(owner), dtype=np.float32) * np.float32(0.1)
        logp = np.minimum(start + pace * np.float32(number) + noise, np.float32(-1e-6))
        columns = {**fixed, "step": np.full(len(owner), step), "logp": logp}
        columns |= {} if lean else _further(rng, len(owner), vocabulary)
        kept = LEAN if lean else schema.TOKENS.names
        _write(folder / "tokens" / part, schema.TOKENS, len(owner), {k: v for k, v in columns.items() if k in kept})
        sums = logp.reshape(n_probes, RESPONSE).sum(axis=1, dtype=np.float64)
        sequences = {**about, "step": [step] * n_probes, "n_tokens": [RESPONSE] * n_probes, "logp_sum": sums}
        _write(folder / "sequences" / part, schema.SEQUENCES, n_probes, sequences)
        _write(folder / "steps" / part, schema.STEPS, 1, {"step": [step]})


def _further(rng: np.random.Generator, n: int, vocabulary: pa.Array) -> dict:
    """Return the other columns of the tokens table: random numbers, which compress as badly as real ones."""
    greedy = rng.integers(0, VOCABULARY, n, dtype=np.int32)
    floats = ("entropy", "greedy_logp", "other_logp", "collision", "tau0", "tau", "riser_mass")
    return {
        **{name: rng.random(n, dtype=np.float32) for name in floats},
        "greedy_id": greedy,
        "greedy_token": vocabulary.take(pa.array(greedy)),
        "other_id": greedy,
        "rank": rng.geometric(0.05, n).astype(np.int32),
        "riser_count": rng.geometric(0.2, n).astype(np.int32),
    }


def _write(file: Path, columns: pa.Schema, n: int, values: dict) -> None:
    arrays = [
        pa.array(values[field.name], type=field.type) if field.name in values else pa.nulls(n, field.type)
        for field in columns
    ]
    coded = [
        name for name in ("step", "probe_id", "position", "token", "greedy_token", "family") if name in columns.names
    ]
    pq.write_table(pa.Table.from_arrays(arrays, schema=columns), file, compression="zstd", use_dictionary=coded)


# ---- the ways: each returns step, family, mean -----------------------------------------------------------------------


def bare_read(run: RunLog) -> None:
    """Read the columns needed, part by part; compute nothing."""
    for _ in run.parts("tokens", columns=["step", "probe_id", "logp"], dictionaries=["probe_id"]):
        pass


def by_token_curves(run: RunLog) -> pd.DataFrame:
    """Take means and percentiles over the tokens of each family."""
    from llm_dynamics import token_curves

    return token_curves(run)


def by_token_curves_delta(run: RunLog) -> None:
    """Take each token's change since its own start: another quantity, so there is nothing to compare."""
    from llm_dynamics import token_curves

    token_curves(run, delta=True)


def by_token_curves_position(run: RunLog) -> pd.DataFrame:
    """Group by family and position, and average over positions, which are equally many here."""
    from llm_dynamics import token_curves

    curves = token_curves(run, by=("family", "position"))
    curves["total"] = curves["mean"] * curves["n"]
    totals = curves.groupby(["step", "family"], as_index=False)[["total", "n"]].sum()
    return totals.assign(mean=totals["total"] / totals["n"])


def by_duckdb(run: RunLog) -> pd.DataFrame:
    """Ask DuckDB, in SQL."""
    import duckdb

    return duckdb.sql(
        f"SELECT step, family, avg(logp) AS mean FROM '{run.path}/tokens/*.parquet' "
        f"JOIN '{run.path}/probes.parquet' USING (probe_id) GROUP BY ALL"
    ).df()


def by_duckdb_percentiles(run: RunLog) -> pd.DataFrame:
    """Ask DuckDB for the percentiles that `token_curves` gives, too."""
    import duckdb

    return duckdb.sql(
        "SELECT step, family, avg(logp) AS mean, quantile_cont(logp, [0.1, 0.9]) AS ends, count(logp) AS n "
        f"FROM '{run.path}/tokens/*.parquet' JOIN '{run.path}/probes.parquet' USING (probe_id) GROUP BY ALL"
    ).df()


def by_polars(run: RunLog) -> pd.DataFrame:
    """Ask polars, lazily, with its streaming engine."""
    import polars as pl

    families = pl.scan_parquet(run.path / "probes.parquet").select("probe_id", "family")
    tokens = pl.scan_parquet(run.path / "tokens" / "*.parquet").select("step", "probe_id", "logp")
    mean = pl.col("logp").cast(pl.Float64).mean().alias("mean")
    answer = tokens.join(families, on="probe_id").group_by("step", "family").agg(mean)
    return pd.DataFrame(answer.collect(engine="streaming").to_dict(as_series=False))


def by_family_curves(run: RunLog) -> pd.DataFrame:
    """Take means over responses of the mean per token, from the sequences table."""
    from llm_dynamics import family_curves

    return family_curves(run, per_token=True).query("~family.str.startswith('argmax')")


def by_whole_table(run: RunLog) -> pd.DataFrame:
    """Load the whole table into pandas."""
    frame = run.tokens.merge(run.probes[["probe_id", "family"]], on="probe_id")
    frame["mean"] = frame["logp"].astype("float64")
    return frame.groupby(["step", "family"], as_index=False)["mean"].mean()


WAYS: dict[str, Callable[[RunLog], pd.DataFrame | None]] = {
    "bare read": bare_read,
    "token_curves": by_token_curves,
    "token_curves, delta": by_token_curves_delta,
    "token_curves, by position": by_token_curves_position,
    "DuckDB": by_duckdb,
    "DuckDB with percentiles": by_duckdb_percentiles,
    "polars": by_polars,
    "family_curves": by_family_curves,
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def run_way(way: str, run: RunLog) -> dict:
    """Run one way in this process; return seconds, CPU seconds, peak bytes and the means that it found."""
    for module in {"DuckDB": ["duckdb"], "DuckDB with percentiles": ["duckdb"], "polars": ["polars"]}.get(way, []):
        __import__(module)
    import llm_dynamics.frames  # noqa: F401

    wall, cpu = time.perf_counter(), time.process_time()
    found = by_whole_table(run) if way == "whole table" else WAYS[way](run)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    means = None
    if found is not None:
        found = found.sort_values(["step", "family"])
        means = [[int(step), str(family), float(mean)] for step, family, mean in
                 found[["step", "family", "mean"]].itertuples(index=False)]  # fmt: skip
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes(), "means": means}


def peak_bytes() -> int:
    """Return the peak of the resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(way: str, log: Path) -> dict:
    """Run one way in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--log", log, "--run-way", way], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{way}: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    seconds = f"{answer['seconds']:.1f} s, {answer['cpu_seconds']:.1f} s of CPU"
    print(f"{way}: {seconds}, {answer['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)
    return answer


def check(answers: list[dict]) -> None:
    """Stop where two ways found other means: every response is equally long here, so all must agree."""
    means = [answer["means"] for answer in answers if answer["means"]]
    for other in means[1:]:
        for (step, family, one), (other_step, other_family, two) in zip(means[0], other, strict=True):
            if (step, family) != (other_step, other_family) or abs(one - two) > 1e-6:
                sys.exit(f"the ways disagree at step {step}, {family}: {one} and {two}")


def table(measured: list[tuple[str, dict]], log: Path) -> Iterator[str]:
    """Yield the lines of the table."""
    tokens = [pq.ParquetFile(part).metadata for part in (load_run(log).path / "tokens").glob("*.parquet")]
    size = sum(part.stat().st_size for part in (load_run(log).path / "tokens").glob("*.parquet"))
    yield f"{sum(part.num_rows for part in tokens):,} token rows in {len(tokens)} parts, {size / 1e9:.2f} GB on disk"
    yield ""
    yield "| way | seconds | CPU seconds | / bare read | peak memory, MB |"
    yield "|---|---|---|---|---|"
    by_way: dict[str, list[dict]] = {}
    for way, answer in measured:
        by_way.setdefault(way, []).append(answer)
    floor = statistics.median(answer["cpu_seconds"] for answer in by_way["bare read"])
    for way, answers in by_way.items():
        seconds, cpu = (statistics.median(answer[key] for answer in answers) for key in ("seconds", "cpu_seconds"))
        peak = max(answer["peak_bytes"] for answer in answers)
        yield f"| {way} | {seconds:.1f} | {cpu:.1f} | {cpu / floor:.1f} | {peak / 1e6:.0f} |"


if __name__ == "__main__":
    main()
