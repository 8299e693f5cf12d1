"""Tables of what a step trained on: its examples and their tokens, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from llm_dynamics.influence import MicroBatch
from llm_dynamics.influence.plain_logits import IGNORED
from llm_dynamics.influence.tape import Labelling

_EXAMPLE_COLUMNS = ["example", "row", "role", "prompt_id", "prompt", "response", "n_tokens", "c_sum"]
_TOKEN_COLUMNS = ["example", "token_id", "logp", "c", "position"]


@dataclass(frozen=True)
class TrainingExamples:
    """The examples of a step on one process.

    Attributes:
        examples: Columns of `schema.TRAINING_EXAMPLES`, step excepted.
        tokens: One row per token with a loss, in the order of `TokenInfluence.places`: example, position, token_id,
            token, logp, c.
    """

    examples: pd.DataFrame
    tokens: pd.DataFrame


def describe_examples(
    batches: Sequence[MicroBatch],
    roles: Labelling,
    prompts: Mapping[tuple[int, ...], str],
    decode: Callable[[list[int]], str],
    *,
    n_processes: int = 1,
    row_of: Callable[[list[int]], int | None] = lambda ids: None,
) -> TrainingExamples:
    """Describe what a step trained on.

    Args:
        batches: The micro-batches of the tape.
        roles: Names each example's role.
        prompts: Prompt id of each probe prompt, by its token ids.
        decode: Text of token ids.
        n_processes: Processes that gradients are averaged over: coefficients count 1/n.
        row_of: Row of the data set that has these ids, where one alone has them.

    Returns:
        The tables; examples are numbered from 0 on this process.
    """
    examples: list[dict[str, object]] = []
    tokens = [pd.DataFrame(columns=_TOKEN_COLUMNS)] if not batches else []
    for batch in batches:
        ids, labels, owner = batch.inputs["input_ids"].cpu(), batch.labels.cpu(), batch.example.cpu()
        starts, stops = _sequence_starts(batch), _sequence_stops(batch)
        names = {name: mask.cpu() for name, mask in roles(batch).items()}
        for example in owner.unique().tolist():
            row, columns = _loss_tokens(owner, labels, example)
            if len(columns) == 0:
                continue
            first = int(columns[0]) + 1  # a label at column j is the token at place j + 1 of the row
            start = max(place for place in starts[row] if place < first)
            stop = min([place for place in starts[row] if place > start], default=stops[row])
            prompt, response = ids[row, start:first].tolist(), labels[row, columns].tolist()
            examples.append(
                {
                    "example": example,
                    "row": row_of(ids[row, start:stop].tolist()),
                    "role": next((name for name, mask in names.items() if mask[row, columns].any()), "trained"),
                    "prompt_id": _prompt_id(prompts, prompt, ids[row, start:].tolist()),
                    "prompt": decode(prompt),
                    "response": decode(response),
                    "n_tokens": len(columns),
                    "c_sum": float(batch.c[row, columns.to(batch.c.device)].double().sum()) / n_processes,
                }
            )
        where = batch.has_loss.cpu()
        tokens.append(
            pd.DataFrame(
                {
                    "example": owner[where].numpy(),
                    "token_id": labels[where].numpy(),
                    "logp": batch.logps.cpu()[where].double().numpy(),
                    "c": batch.c.cpu()[where].double().numpy() / n_processes,
                    "position": _place_in_example(labels, owner)[where].numpy(),
                }
            )
        )
    all_tokens = pd.concat(tokens, ignore_index=True)
    texts = {token: decode([token]) for token in all_tokens["token_id"].unique().tolist()}
    named = all_tokens.assign(token=all_tokens["token_id"].map(texts))
    frame = pd.DataFrame(examples, columns=_EXAMPLE_COLUMNS)
    return TrainingExamples(frame.astype({"row": "Int64"}), named)


def _prompt_id(prompts: Mapping[tuple[int, ...], str], prompt: list[int], sequence: list[int]) -> str | None:
    """Return the id of the probe prompt that an example has.

    Args:
        prompts: Prompt id of each probe prompt, by its token ids.
        prompt: The example's tokens before the first with a loss.
        sequence: Its tokens from the first on. Where all but the first have a loss, the data do not say where a prompt
            ends: then it is the longest probe prompt that the sequence begins with.
    """
    if len(prompt) > 1 or tuple(prompt) in prompts:
        return prompts.get(tuple(prompt))
    lengths = sorted({len(known) for known in prompts}, reverse=True)
    return next((prompts[begin] for n in lengths if (begin := tuple(sequence[:n])) in prompts), None)


def _sequence_starts(batch: MicroBatch) -> list[list[int]]:
    """Return, for every row, the places where a sequence begins: one, or several in a packed row."""
    mask, positions = batch.inputs.get("attention_mask"), batch.inputs.get("position_ids")
    if mask is not None:
        return [[int(row.argmax())] for row in mask.cpu().long()]
    if positions is not None and positions.dim() == 2:
        rows = positions.cpu().expand(len(batch.labels), -1)
        return [(row == 0).nonzero()[:, 0].tolist() or [0] for row in rows]
    return [[0]] * len(batch.labels)


def _sequence_stops(batch: MicroBatch) -> list[int]:
    """Return, for every row, the place after its last token that is not padding, as far as the batch tells."""
    mask, length = batch.inputs.get("attention_mask"), batch.inputs["input_ids"].shape[1]
    if mask is None:
        return [length] * len(batch.labels)
    return [length - int(row.flip(0).argmax()) for row in mask.cpu().long()]


def _loss_tokens(owner: Tensor, labels: Tensor, example: int) -> tuple[int, Tensor]:
    """Return the row of an example and the columns of its labels."""
    places = ((owner == example) & (labels != IGNORED)).nonzero()
    return (int(places[0, 0]), places[:, 1]) if len(places) else (0, places[:, 1])


def _place_in_example(labels: Tensor, owner: Tensor) -> Tensor:
    """Return the index of each label among the labels of its example, (B, S)."""
    valid = (labels != IGNORED).long()
    place = valid.cumsum(dim=1) - 1
    for row in range(len(labels)):
        for example in owner[row].unique().tolist():
            mine = owner[row] == example
            if valid[row][mine].any():
                place[row][mine] -= place[row][mine & (valid[row] > 0)].min()
    return place
