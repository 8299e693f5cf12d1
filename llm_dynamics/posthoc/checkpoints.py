"""Score saved checkpoints on a probe set: a run log like that of a watched run, written after the fact."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llm_dynamics.callbacks.metrics import observation_metrics
from llm_dynamics.likelihood import score_logps, score_responses, sequence_table, token_table
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS, ResponseScores
from llm_dynamics.posthoc.loading import load_checkpoint, load_tokenizer
from llm_dynamics.probes import ProbeSet, encode_probes, probe_table
from llm_dynamics.runlog import RunLog, RunLogWriter, load_run, schema

TRAINER = "llm-dynamics score"
"""What `meta.json` names as trainer of a log that was written after the fact."""


def score_checkpoints(
    checkpoints: Sequence[str],
    probes: ProbeSet,
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    reference: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> RunLog:
    """Score every probe under every checkpoint, one after the other, and write a run log.

    Args:
        checkpoints: Folders or hub ids. Where all names end in different numbers, as `checkpoint-500`, those are the
            steps, and the order is theirs; else the order given, with steps 0, 1, 2...
        probes: The probes.
        folder: Output folder; the run log goes to `dynamics` in it, and one that is there is moved aside.
        tokenizer: Folder or hub id; None: the first checkpoint's.
        reference: A checkpoint whose log-probs stand beside (`ref_logp`); None: none.
        dtype: Precision of the weights: "float32", "bfloat16" or "float16".
        device: Where to compute; None: a GPU where there is one.
        batch_tokens: Most tokens in one forward, padding included.
        on_progress: Told the checkpoint, the probes scored and those to score.

    Returns:
        The run log; differences in it are in nats since the first checkpoint.

    Raises:
        ValueError: For no checkpoints, one that does not load, probes that its tokenizer cannot encode, or a folder
            with the log of a training run.
        NotImplementedError: For models that cannot be scored.
    """
    if not checkpoints:
        raise ValueError("give at least one checkpoint")
    log_folder = Path(folder) / schema.FOLDER
    if (log_folder / schema.META_FILE).is_file() and load_run(folder).meta.get("trainer") != TRAINER:
        raise ValueError(f"{log_folder} is the log of a training run: choose another output folder")
    steps, checkpoints = in_order(checkpoints)
    processing_class = load_tokenizer(tokenizer or checkpoints[0])
    encoded = encode_probes(probes, processing_class)
    table = probe_table(probes, encoded)
    ref_logp = None
    if reference is not None:
        ref_logp = score_logps(load_checkpoint(reference, dtype=dtype, device=device), list(encoded))
    writer = RunLogWriter(log_folder)
    start: dict[str, float] = {}
    for step, name in zip(steps, checkpoints, strict=True):
        begun = time.monotonic()
        model = load_checkpoint(name, dtype=dtype, device=device)
        if not start:
            writer.start(
                table, _meta(model, probes, encoded, processing_class, dict(zip(steps, checkpoints, strict=True)))
            )
        done = 0

        def progress(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(name, done, len(encoded))

        found = score_responses(model, list(encoded), batch_tokens=batch_tokens, on_progress=progress)
        scores = ResponseScores(found.lengths, found.tokens, ref_logp)
        sequences = sequence_table(scores, table)
        start = start or dict(zip(sequences["probe_id"], sequences["logp_sum"], strict=True))
        metrics = observation_metrics(sequences, start)

        def decode(token: int) -> str:
            return str(processing_class.decode([token]))

        def scalars(begun: float = begun, metrics: dict[str, float] = metrics, found: Any = found) -> dict[str, Any]:
            return {
                "seconds_observing": time.monotonic() - begun,
                "n_probes": len(encoded),
                "n_response_tokens": int(found.lengths.sum()),
                "n_nonfinite": int(metrics["probe/n_nonfinite"]),
                **metrics,
            }

        tokens = token_table(scores, table["probe_id"].tolist(), decode)
        writer.write(step, sequences=sequences, tokens=tokens, scalars=scalars)
        del model
        gc.collect()
    writer.update_meta(finished_at_step=steps[-1], token_probes="all")
    return load_run(folder)


def in_order(checkpoints: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return steps and names: by the numbers that the names end in, where all differ; else as given, 0, 1, 2..."""
    numbers = [re.search(r"(\d+)/?$", name) for name in checkpoints]
    steps = [int(number[1]) for number in numbers if number]
    if len(set(steps)) < len(checkpoints):
        return list(range(len(checkpoints))), list(checkpoints)
    pairs = sorted(zip(steps, checkpoints, strict=True))
    return [step for step, _ in pairs], [name for _, name in pairs]


def _meta(model: Any, probes: ProbeSet, encoded: Any, tokenizer: Any, names: dict[int, str]) -> dict[str, Any]:
    weights = list(model.parameters())
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trainer": TRAINER,
        "checkpoints": {str(step): name for step, name in names.items()},
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "n_parameters": sum(weight.numel() for weight in weights),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "device": str(weights[0].device),
        "tokenizer": getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
        "packages": {"torch": torch.__version__},
        "n_truncated": encoded.n_truncated,
        "n_probes": len(encoded),
        "families": list(probes.families),
        "probes_fingerprint": probes.fingerprint(),
        "dropped_probes": [{"probe_id": probe_id, "reason": reason} for probe_id, reason in encoded.dropped],
    }
