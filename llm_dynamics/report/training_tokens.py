"""Which training tokens moved a family or a probe hardest, and the sentences that they stand in.

The table has a row per target and training token of every explained step, so it is read part by part; twice, since the
sentences are known only when the strongest tokens are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from llm_dynamics.runlog import RunLog

N_STRONGEST = 10
"""Training tokens shown per target and direction."""
N_EXAMPLES = 5
"""Training examples shown per target and direction."""
_WHOLE = 120
"""Responses up to this many tokens are shown whole; of longer ones, what stands around the strong tokens."""
_AROUND = 40

_COLUMNS = ["target", "kind", "example", "position", "token", "logp", "c", "share"]


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a training response as one target sees it; n tokens.

    Attributes:
        start: Position of its first token, counted among the tokens with a loss.
        tokens: The decoded tokens (n,).
        shares: What each did to the target (n,), nats; NaN where not finite.
    """

    start: int
    tokens: list[str]
    shares: np.ndarray


@dataclass(frozen=True, eq=False)
class Sentence:
    """A training response of one step, with the strong tokens in it.

    Attributes:
        step: The explained step.
        example: Index of the training example in the step's global batch.
        strong: Rows of the strong tokens: `place` (1 = strongest of all), `position`, `token`, `share`, `c`, `logp`.
        pieces: What is shown of the response, in order.
        n_tokens: Tokens of the whole response.
    """

    step: int
    example: int
    strong: list[dict[str, Any]]
    pieces: list[Piece]
    n_tokens: int


@dataclass(eq=False)
class TargetTokens:
    """The training tokens and examples that moved one target hardest.

    Attributes:
        target: Name of the family, or the probe's id.
        kind: "family" or "probe".
        down: Sentences of the tokens that pushed it down hardest, hardest first.
        up: Sentences of the tokens that pulled it up hardest.
        examples: Columns `step`, `example`, `share` (nats, summed over the example's tokens): all examples.
        n_nonfinite: Training tokens left out because their share is not finite.
    """

    target: str
    kind: str
    down: list[Sentence] = field(default_factory=list)
    up: list[Sentence] = field(default_factory=list)
    examples: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["step", "example", "share"]))
    n_nonfinite: int = 0


def strongest_tokens(run: RunLog, n: int = N_STRONGEST) -> list[TargetTokens]:
    """Find the training tokens that moved each target hardest, over all explained steps.

    Args:
        run: The run log.
        n: Tokens per target and direction.

    Returns:
        One entry per target of the training tokens, in the order logged; empty where the run has none.
    """
    targets, strong = _scan(run, n)
    wanted = {
        (str(target), int(step), int(example))
        for target, step, example in zip(strong["target"], strong["step"], strong["example"], strict=True)
    }
    responses = _responses(run, wanted)
    for target, rows in strong.groupby("target", sort=False):
        for down, sentences in ((True, targets[str(target)].down), (False, targets[str(target)].up)):
            own = rows[rows["down"] == down]
            for _, marked in own.groupby(["step", "example"], sort=False):
                key = _key(marked)
                sentences.append(_sentence(key, marked, responses[key]))
    return list(targets.values())


def strongest_examples(target: TargetTokens, examples: pd.DataFrame, n: int = N_EXAMPLES) -> tuple[pd.DataFrame, ...]:
    """Find the training examples that moved a target most; one that was trained on in several steps counts once.

    Args:
        target: The target.
        examples: The run's training examples, columns of `schema.TRAINING_EXAMPLES`.
        n: Examples per direction.

    Returns:
        Two frames with `role`, `prompt`, `response`, `share` (nats, summed over its tokens and explained steps),
        `n_steps` and `prompt_id`: those that pushed the target down, hardest first, and those that pulled it up.
    """
    texts = ["role", "prompt", "response"]
    named = target.examples.merge(
        examples[["step", "example", *texts, "prompt_id"]], on=["step", "example"], how="left"
    )
    named[texts] = named[texts].fillna("")
    added = {"share": ("share", "sum"), "n_steps": ("step", "nunique"), "prompt_id": ("prompt_id", "first")}
    sums = named.groupby(texts, sort=False).agg(**added).reset_index()
    return sums[sums["share"] < 0].nsmallest(n, "share"), sums[sums["share"] > 0].nlargest(n, "share")


def _scan(run: RunLog, n: int) -> tuple[dict[str, TargetTokens], pd.DataFrame]:
    """Read the table once: sums per example, and the rows of the strongest tokens with `down` and `place`."""
    targets: dict[str, TargetTokens] = {}
    sums: dict[str, list[pd.DataFrame]] = {}
    strong = pd.DataFrame(columns=["step", *_COLUMNS])
    waiting: list[pa.Table] = []
    for part in run.parts("training_tokens"):
        # in numpy: a part has a row per target and token, and its strings are wanted of a few rows only
        share, example = part["share"].to_numpy(), part["example"].to_numpy()
        named = part["target"].combine_chunks().dictionary_encode()
        for code, target in enumerate(named.dictionary.to_pylist()):
            own = np.flatnonzero(named.indices.to_numpy() == code)
            finite = own[np.isfinite(share[own])]
            if target not in targets:
                targets[target] = TargetTokens(target, part["kind"][int(own[0])].as_py())
            targets[target].n_nonfinite += len(own) - len(finite)
            order = finite[np.argsort(share[finite], kind="stable")]
            waiting.append(part.select(["step", *_COLUMNS]).take(np.unique(np.concatenate([order[:n], order[-n:]]))))
            examples, places = np.unique(example[finite], return_inverse=True)
            summed = np.bincount(places, weights=share[finite], minlength=len(examples))
            frame = pd.DataFrame({"step": part["step"][0].as_py(), "example": examples, "share": summed})
            sums.setdefault(target, []).append(frame)
        if len(waiting) > 1000:
            strong, waiting = _extremes(strong, waiting, n), []
    strong = _extremes(strong, waiting, n)
    for target, frames in sums.items():
        targets[target].examples = pd.concat(frames, ignore_index=True)
    strong = strong.assign(down=strong["share"] < 0)
    sizes = strong["share"].abs().groupby([strong["target"], strong["down"]])
    strong["place"] = sizes.rank(method="first", ascending=False).astype(int)
    return targets, strong.sort_values("place")


def _extremes(strong: pd.DataFrame, more: list[pa.Table], n: int) -> pd.DataFrame:
    """Return, of each target, the rows of the n most negative and the n most positive shares."""
    if not more:
        return strong
    frame = pa.concat_tables(more).to_pandas()
    frame = pd.concat([strong, frame], ignore_index=True) if len(strong) else frame
    frame = frame.sort_values("share", kind="stable")
    down = frame[frame["share"] < 0].groupby("target").head(n)
    up = frame[frame["share"] > 0].groupby("target").tail(n)
    return pd.concat([down, up], ignore_index=True)


_Key = tuple[str, int, int]


def _responses(run: RunLog, wanted: set[_Key]) -> Mapping[_Key, pd.DataFrame]:
    """Read the rows of the wanted responses (target, step, example), sorted by position."""
    found: dict[_Key, pd.DataFrame] = {}
    for part in run.parts("training_tokens", sorted({step for _, step, _ in wanted})):
        here = [(target, example) for target, step, example in wanted if step == part["step"][0].as_py()]
        of_target = pc.is_in(part["target"], value_set=pa.array({target for target, _ in here}, pa.string()))
        of_example = pc.is_in(part["example"], value_set=pa.array({example for _, example in here}, pa.int32()))
        frame = part.filter(pc.and_(of_target, of_example)).select(["step", *_COLUMNS]).to_pandas()
        for _, rows in frame.groupby(["target", "step", "example"], sort=False):
            if (key := _key(rows)) in wanted:
                found[key] = rows.sort_values("position")
    return found


def _key(rows: pd.DataFrame) -> _Key:
    """Return the target, step and example that all `rows` share."""
    return str(rows["target"].iloc[0]), int(rows["step"].iloc[0]), int(rows["example"].iloc[0])


def _sentence(key: _Key, strong: pd.DataFrame, response: pd.DataFrame) -> Sentence:
    positions = response["position"].to_numpy()
    tokens, shares = response["token"].fillna("").tolist(), response["share"].to_numpy(dtype=float)
    pieces = [
        Piece(int(positions[place]), tokens[place:end], np.where(np.isfinite(shares), shares, np.nan)[place:end])
        for place, end in _windows(len(tokens), np.searchsorted(positions, strong["position"]).tolist())
    ]
    columns = ["place", "position", "token", "share", "c", "logp"]
    marks = [{str(key): value for key, value in row.items()} for row in strong[columns].to_dict("records")]
    return Sentence(key[1], key[2], marks, pieces, len(tokens))


def _windows(length: int, places: Iterable[int]) -> list[tuple[int, int]]:
    """Return the half-open stretches to show of a response of `length` tokens with strong tokens at `places`."""
    if length <= _WHOLE:
        return [(0, length)]
    windows: list[tuple[int, int]] = []
    for place in sorted(places):
        start, end = max(0, place - _AROUND), min(length, place + _AROUND + 1)
        if windows and start <= windows[-1][1]:
            windows[-1] = (windows[-1][0], end)
        else:
            windows.append((start, end))
    return windows
