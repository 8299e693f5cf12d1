"""The exact token kernel between two files of responses, as tables."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Literal

import pandas as pd

from llm_dynamics.kernel import TokenKernel, token_kernel
from llm_dynamics.kernel.exact import DEFAULT_MEMORY_MB
from llm_dynamics.posthoc.loading import encoding_of, load_checkpoint, load_tokenizer, training_run
from llm_dynamics.probes import Probe, encode_probes
from llm_dynamics.probes.rows import Rows, read_rows

logger = logging.getLogger(__name__)


def kernel_of_files(
    checkpoint: str,
    train: Rows,
    probes: Rows,
    *,
    rows: Literal["tokens", "responses"] = "responses",
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    memory_budget_mb: float = DEFAULT_MEMORY_MB,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[pd.DataFrame, TokenKernel]:
    """Compute how a gradient step on each training response would move each probe: `token_kernel` over rows of files.

    The kernel runs over what training changes: all parameters, or those of the checkpoint's adapter. Rows are encoded
    as by the run that the checkpoint lies in, where that was watched (`score_checkpoints`).

    Args:
        checkpoint: Folder or hub id of the model.
        train: Rows in any form that TRL's trainers take (`read_rows`); of a pair, the chosen response counts.
        probes: The same.
        rows: One row and column per response, or per response token.
        tokenizer: Folder or hub id; None: the checkpoint's.
        dtype: Precision of the weights.
        device: Where to compute; None: a GPU where there is one.
        trust_remote_code: Let a model and a tokenizer that bring Python code run it.
        memory_budget_mb: As for `token_kernel`.
        on_progress: As for `token_kernel`.

    Returns:
        A long table, and the kernel. Columns: `probe` and `train`, the rows' numbers in their files; for responses
        their texts, `probe_text` and `train_text`; for tokens `m`, `probe_token`, `l`, `train_token`; `kernel`,
        T = <d log pi(probe)/dtheta, d log pi(train)/dtheta>, nats^2 per squared unit of parameter: a plain gradient
        step of size eta on log pi(train) moves log pi(probe) by eta T nats.

    Raises:
        ValueError: For rows without a prompt or response, or a checkpoint that does not load.
        NotImplementedError: As for `token_kernel`.
    """
    processing_class = load_tokenizer(tokenizer or checkpoint, trust_remote_code=trust_remote_code)
    texts = {name: _texts(given, name) for name, given in (("train", train), ("probes", probes))}
    run = training_run(checkpoint)
    if run is None:
        logger.warning(
            "%s lies in no run that was watched: rows are encoded without truncation, by the tokenizer's own chat "
            "template. Where training did otherwise, this is not the kernel of its rows",
            checkpoint,
        )
    encoding = {} if run is None else encoding_of(run)
    encoded = {name: encode_probes(given, processing_class, **encoding) for name, given in texts.items()}
    # with their numbers in the files: some rows may leave nothing to score
    sides = {name: [(int(probe.probe_id), probe) for probe in side] for name, side in encoded.items()}
    model = load_checkpoint(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    kernel = token_kernel(
        model,
        [encoded for _, encoded in sides["train"]],
        [encoded for _, encoded in sides["probes"]],
        train_rows=rows,
        probe_rows=rows,
        memory_budget_mb=memory_budget_mb,
        on_progress=on_progress,
    )
    own = {name: [number for number, _ in side] for name, side in sides.items()}
    long = pd.DataFrame(
        {
            "probe": [own["probes"][i] for i in kernel.probes.response.tolist() for _ in range(len(kernel.train))],
            "train": [own["train"][i] for i in kernel.train.response.tolist()] * len(kernel.probes),
            "kernel": kernel.values.flatten().double().numpy(),
        }
    )
    if rows == "responses":
        said = {name: {int(probe.probe_id): probe.response for probe in given} for name, given in texts.items()}
        long.insert(1, "probe_text", [said["probes"][i] for i in long["probe"]])
        long.insert(3, "train_text", [said["train"][i] for i in long["train"]])
    else:
        decoded = {
            name: [processing_class.decode([token]) for _, encoded in side for token in encoded.response_ids]
            for name, side in sides.items()
        }
        n_train = len(kernel.train)
        long.insert(1, "m", [m for m in kernel.probes.start.tolist() for _ in range(n_train)])
        long.insert(2, "probe_token", [text for text in decoded["probes"] for _ in range(n_train)])
        long.insert(4, "l", kernel.train.start.tolist() * len(kernel.probes))
        long.insert(5, "train_token", decoded["train"] * len(kernel.probes))
    return long, kernel


def _texts(rows: Rows, what: str) -> list[Probe]:
    """Return the prompt and response of every row, as its trainer reads them; odd rows are left out with a warning.

    Raises:
        ValueError: Where no row has both.
    """
    read = read_rows(rows, what=what)
    probes, reasons = [], Counter(dropped.reason for dropped in read.dropped if dropped.family == "chosen")
    for row in read.rows:
        text = row.first("chosen") or (row.first("rejected") if read.form.label else None)
        if text is None:
            reasons["no response"] += 1
            continue
        number = str(row.source_row)
        probes.append(Probe(number, number, row.prompt, text, "chosen", template=row.template))
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    if not probes:
        raise ValueError(f"{what}: no row has a prompt and a response: {listed}")
    if listed:
        logger.warning("%s: rows left out: %s", what, listed)
    return probes
