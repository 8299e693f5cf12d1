"""Score saved checkpoints on a probe set: a run log like that of a watched run, written after the fact."""

from __future__ import annotations

import gc
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_dynamics.callbacks.metrics import observation_metrics
from llm_dynamics.likelihood import score_logps, score_responses, sequence_table, token_table
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS, ResponseScores
from llm_dynamics.posthoc.loading import DTYPES, TRAINER, encoding_of, load_checkpoint, load_tokenizer, training_run
from llm_dynamics.probes import ProbeSet, encode_probes, probe_table
from llm_dynamics.probes.forms import forms, other_form
from llm_dynamics.runlog import RunLog, RunLogWriter, load_run, schema

logger = logging.getLogger(__name__)


def score_checkpoints(
    checkpoints: Sequence[str],
    probes: ProbeSet,
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    reference: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> RunLog:
    """Score every probe under every checkpoint, one after the other, and write a run log.

    Where a checkpoint lies in the folder of a run that was watched, probes are encoded as that run's log says
    (truncation, chat template and its arguments, tools) and scored in its precision: what `watch` saw at that step.
    Elsewhere they are encoded by the tokenizer's own rules, which a warning says.

    Args:
        checkpoints: Folders or hub ids. Where all names end in different numbers, as `checkpoint-500`, those are the
            steps, and the order is theirs; else the order given, with steps 0, 1, 2...
        probes: The probes.
        folder: Output folder; the run log goes to `dynamics` in it, and one that is there is moved aside.
        tokenizer: Folder or hub id; None: the first checkpoint's.
        reference: A checkpoint whose log-probs stand beside (`ref_logp`); None: none.
        dtype: Precision of the weights: "float32", "bfloat16" or "float16"; None: that of the run, autocast included,
            and float32 where there is none.
        device: Where to compute; None: a GPU where there is one.
        trust_remote_code: Let models and tokenizers that bring Python code run it.
        batch_tokens: Most tokens in one forward, padding included.
        on_progress: Told the checkpoint, the probes scored and those to score.

    Returns:
        The run log; differences in it are in nats since the first checkpoint.

    Raises:
        TypeError: For arguments of another kind.
        ValueError: For no checkpoints, one that does not load, probes that its tokenizer cannot encode, or a folder
            with the log of a training run.
        NotImplementedError: For models that cannot be scored.
    """
    if isinstance(checkpoints, str) or not all(isinstance(name, str | Path) for name in checkpoints):
        raise TypeError(f"checkpoints is {checkpoints!r}; give a list of folders or hub ids")
    if not isinstance(probes, ProbeSet):
        raise TypeError(f"probes is a {type(probes).__name__}; give a ProbeSet (a file: `ProbeSet.load(path)`)")
    if not checkpoints:
        raise ValueError("give at least one checkpoint")
    log_folder = Path(folder) / schema.FOLDER
    if (log_folder / schema.META_FILE).is_file() and load_run(folder).meta.get("trainer") != TRAINER:
        raise ValueError(f"{log_folder} is the log of a training run: choose another output folder")
    steps, checkpoints = in_order([str(name) for name in checkpoints])
    run = _run_of(checkpoints)
    processing_class = load_tokenizer(tokenizer or checkpoints[0], trust_remote_code=trust_remote_code)
    encoded = encode_probes(probes, processing_class, **({} if run is None else encoding_of(run)))
    form = forms(probes, processing_class, None if run is None else (run.meta.get("forms") or {}).get("rows"))
    if doubt := other_form(form):
        logger.warning("%s", doubt)
    table = probe_table(probes, encoded)
    precision, mixed = _precision(run, dtype)
    load = partial(load_checkpoint, dtype=precision, device=device, trust_remote_code=trust_remote_code)
    ref_logp = None
    if reference is not None:
        model = load(reference)
        ref_logp = score_logps(model, list(encoded), autocast=_autocast(model, mixed))
    writer = RunLogWriter(log_folder)
    start: dict[str, float] = {}
    for step, name in zip(steps, checkpoints, strict=True):
        begun = time.monotonic()
        model = load(name)
        if not start:
            meta = _meta(model, probes, encoded, processing_class, dict(zip(steps, checkpoints, strict=True)))
            encoded_as: dict[str, Any] = {}
            if run is not None:
                encoded_as = {key: run.meta[key] for key in ("truncation", "rendering") if key in run.meta}
            writer.claim()
            writer.start(
                table,
                {
                    **meta,
                    **encoded_as,
                    "forms": form,
                    "mixed_precision": mixed,
                    "encoded_as_in": None if run is None else str(run.path),
                },
            )
        done = 0

        def progress(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(name, done, len(encoded))

        found = score_responses(
            model,
            list(encoded),
            batch_tokens=batch_tokens,
            squeeze_strength=1.0 if run is None else run.meta.get("squeeze_strength", 1.0),
            autocast=_autocast(model, mixed),
            on_progress=progress,
        )
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
    writer.close()
    return load_run(writer.folder)


def in_order(checkpoints: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return steps and names: by the numbers that the names end in, where all differ; else as given, 0, 1, 2..."""
    numbers = [re.search(r"(\d+)/?$", name) for name in checkpoints]
    steps = [int(number[1]) for number in numbers if number]
    if len(set(steps)) < len(checkpoints):
        return list(range(len(checkpoints))), list(checkpoints)
    pairs = sorted(zip(steps, checkpoints, strict=True))
    return [step for step, _ in pairs], [name for _, name in pairs]


def _run_of(checkpoints: Sequence[str]) -> RunLog | None:
    """Return the run whose way of encoding counts: that of the first checkpoint that lies in a watched run."""
    runs = {name: found for name in checkpoints if (found := training_run(name)) is not None}
    if not runs:
        logger.warning(
            "%s lies in no run that was watched: probes are encoded without truncation, by the tokenizer's own chat "
            "template. Where training did otherwise, these are not the numbers that `watch` would have logged",
            checkpoints[0],
        )
        return None
    first, run = next(iter(runs.items()))
    for name, other in runs.items():
        if encoding_of(other) != encoding_of(run):
            logger.warning(
                "%s was trained on rows encoded otherwise than %s; all are scored as the latter", name, first
            )
    return run


def _precision(run: RunLog | None, dtype: str | None) -> tuple[str, str | None]:
    """Return the precision of the weights, and that of the autocast; say where they are not the run's."""
    if run is None:
        return dtype or "float32", None
    own, mixed = str(run.meta.get("dtype")), run.meta.get("mixed_precision")
    mixed = mixed if mixed in ("bf16", "fp16") else None
    if dtype is None and own in DTYPES:
        return own, mixed
    if dtype != own or mixed:
        logger.warning(
            "scored in %s, watched in %s%s: log-probs differ by rounding",
            dtype or "float32",
            own,
            f" under {mixed} autocast" if mixed else "",
        )
    return dtype or "float32", None


def _autocast(model: Any, mixed: str | None) -> Callable[[], AbstractContextManager[Any]] | None:
    """Return what makes the autocast of a run, on the model's device; None for none."""
    if mixed is None:
        return None
    kind = torch.bfloat16 if mixed == "bf16" else torch.float16
    return lambda: torch.autocast(next(model.parameters()).device.type, dtype=kind)


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
