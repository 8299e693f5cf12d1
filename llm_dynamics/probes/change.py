"""Make a probe set into another: a part of it, or one more family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from transformers import PreTrainedTokenizerBase

from llm_dynamics.options import Limit, checked
from llm_dynamics.probes.build import check_join, collect_probes, read_candidates
from llm_dynamics.probes.builders import Source, build_family, pairs_of
from llm_dynamics.probes.families import FAMILY_ORDER, check_families, stable_hash
from llm_dynamics.probes.probe import DroppedProbe, Probe, prompt_identity
from llm_dynamics.probes.rephrase import Rephraser
from llm_dynamics.probes.rows import DropIf, Row, Rows, read_texts

if TYPE_CHECKING:
    from llm_dynamics.probes.probe_set import ProbeSet

Parts = tuple[list[Probe], list[DroppedProbe], dict[str, Any]]
"""Probes, dropped probes and metadata of the new set."""


def select_probes(
    probe_set: ProbeSet,
    *,
    families: Sequence[str] | None,
    prompt_ids: Sequence[str] | None,
    n_prompts: int | None,
    seed: int | None,
) -> Parts:
    """Return the parts of `ProbeSet.select`.

    Raises:
        ValueError: As `ProbeSet.select`.
    """
    metadata = probe_set.metadata
    kept_families = probe_set.families if families is None else check_families(families)
    absent = [family for family in kept_families if family not in probe_set.families]
    if absent:
        raise ValueError(f"No probe of family {', '.join(map(repr, absent))} here; there are: {probe_set.families}.")
    wanted = probe_set.prompt_ids if prompt_ids is None else tuple(prompt_ids)
    unknown = [name for name in wanted if name not in set(probe_set.prompt_ids)]
    if unknown:
        raise ValueError(
            f"No prompt {unknown[:3]} here; ids go from {probe_set.prompt_ids[0]} to {probe_set.prompt_ids[-1]}."
        )
    n_prompts = checked("n_prompts", Annotated[int | None, Limit(least=1)], n_prompts)
    seed = checked("seed", int | None, seed)
    if n_prompts is not None:
        if not 1 <= n_prompts <= len(wanted):
            raise ValueError(f"n_prompts is {n_prompts} and there are {len(wanted)} prompts; ask for 1 to all.")
        seed = metadata.get("seed", 0) if seed is None else seed
        identity = {probe.prompt_id: prompt_identity(probe.prompt) for probe in probe_set.probes}
        wanted = tuple(sorted(wanted, key=lambda name: (stable_hash(seed, "select", identity[name]), name))[:n_prompts])
    kept = set(wanted)
    probes = [probe for probe in probe_set.probes if probe.family in kept_families and probe.prompt_id in kept]
    if not probes:
        raise ValueError("No probe is left: these prompts have no response of these families.")
    # What was dropped is known by its source row alone; that of rows with no probe left at all is kept.
    others = {probe.source_row for probe in probe_set.probes} - {probe.source_row for probe in probes}
    dropped = [
        item
        for item in probe_set.dropped
        if (families is None or item.family in kept_families) and item.source_row not in others
    ]
    made_by = {
        name: how for name, how in metadata.get("families", {}).items() if families is None or name in kept_families
    }
    return probes, dropped, {**metadata, "families": made_by}


def add_family(
    probe_set: ProbeSet,
    name: str,
    *,
    responses: Mapping[str, Any] | Sequence[Any] | None,
    training_rows: Rows | None,
    held_out: Rows | None,
    tokenizer: PreTrainedTokenizerBase | None,
    rephraser: Rephraser | None,
    seed: int | None,
    join: str | None,
    drop_if: DropIf | None,
) -> Parts:
    """Return the parts of `ProbeSet.add_family`.

    Raises:
        ValueError: As `ProbeSet.add_family`.
    """
    metadata = probe_set.metadata
    check_families((name,))
    if name in probe_set.families:
        raise ValueError(f"Family {name!r} is already in the set; leave it out first with `select(families=...)`.")
    seed = metadata.get("seed", 0) if seed is None else seed
    join = metadata.get("join", "reference") if join is None else join
    check_join(join, (*probe_set.families, name))
    own = _rows(probe_set)
    as_chat = not any(isinstance(row.prompt, str) for row in own)
    made_by: dict[str, Any] = {"made_by": "given to add_family"}
    if responses is None:
        extra = [] if training_rows is None else read_candidates(training_rows, what="training_rows", as_chat=as_chat)
        means = Source(
            own,
            training=pairs_of([*own, *extra]),
            held_out=None
            if held_out is None
            else pairs_of(read_candidates(held_out, what="held_out", as_chat=as_chat)),
            seed=seed,
            tokenizer=tokenizer,
            rephraser=rephraser,
        )
        made_by = build_family(name, means)
    else:
        _give(own, name, responses, probe_set.prompt_ids)
    added, dropped = collect_probes(own, (name,), join=join, drop_if=drop_if)
    families = {**metadata.get("families", {}), name: {**made_by, "seed": seed, "join": join}}
    order = {prompt_id: index for index, prompt_id in enumerate(probe_set.prompt_ids)}
    probes = sorted(
        (*probe_set.probes, *added), key=lambda probe: (order[probe.prompt_id], FAMILY_ORDER.index(probe.family))
    )
    return probes, [*probe_set.dropped, *dropped], {**metadata, "families": families}


def _rows(probe_set: ProbeSet) -> list[Row]:
    """Return the set as rows, one per prompt."""
    by_prompt: dict[str, Row] = {}
    for probe in probe_set.probes:
        row = Row(probe.prompt_id, probe.source_row, probe.prompt, template=probe.template)
        row = by_prompt.setdefault(probe.prompt_id, row)
        row.texts.setdefault(probe.family, []).append(probe.response)
    return list(by_prompt.values())


def _give(
    own_rows: Sequence[Row], name: str, responses: Mapping[str, Any] | Sequence[Any], prompt_ids: Sequence[str]
) -> None:
    """Put given responses into the rows.

    Raises:
        ValueError: If they do not match the prompts.
    """
    if isinstance(responses, str):
        raise ValueError("responses is one text; give one per prompt, or a mapping from prompt_id.")
    if not isinstance(responses, Mapping):
        if len(responses) != len(own_rows):
            raise ValueError(f"{len(responses)} responses for {len(own_rows)} prompts; give one per prompt.")
        responses = dict(zip(prompt_ids, responses, strict=True))
    unknown = [key for key in responses if key not in set(prompt_ids)]
    if unknown:
        raise ValueError(f"responses names prompts that are not in the set: {unknown[:3]}.")
    for row in own_rows:
        row.texts[name] = read_texts(responses.get(row.prompt_id), row.prompt)
