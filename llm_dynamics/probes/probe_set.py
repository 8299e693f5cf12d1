"""`ProbeSet`: the prompts and responses that are watched, and how they were made."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_dynamics.probes import change, storage, tables
from llm_dynamics.probes.build import BuildOptions, build_probes
from llm_dynamics.probes.families import check_families
from llm_dynamics.probes.probe import DroppedProbe, Probe, check_probes, prompt_identity
from llm_dynamics.probes.rephrase import Rephraser
from llm_dynamics.probes.rows import Columns, DropIf, Rows, as_records, read_jsonl


class ProbeSet(Sequence[Probe]):
    """An immutable sequence of probes, with the account of how they were made and which were dropped.

    Args:
        probes: The probes; ids unique, one prompt per `prompt_id`.
        dropped: Probes that were asked for and are not there.
        metadata: JSON-able: seed, join rule, source, and how each family was made.

    Raises:
        TypeError: If `probes` holds something else.
        ValueError: If there are no probes, ids repeat, a family is unknown, or one prompt_id has two prompts.

    Example:
        >>> probes = ProbeSet.from_preference_dataset(rows, families=("chosen", "rejected", "ungrammatical"))
        >>> probes.summary()
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        *,
        dropped: Sequence[DroppedProbe] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._probes = tuple(check_probes(probes))
        self._dropped = tuple(dropped)
        self._metadata = json.loads(json.dumps(dict(metadata or {})))
        if not self._probes:
            raise ValueError("A probe set needs at least one probe; got none.")
        repeated = [name for name, n in Counter(probe.probe_id for probe in self._probes).items() if n > 1]
        if repeated:
            raise ValueError(f"{len(repeated)} probe ids occur more than once, e.g. {repeated[:3]}; make them unique.")
        self._families = check_families(tuple({probe.family: None for probe in self._probes}))
        prompts: dict[str, str] = {}
        for probe in self._probes:
            identity = prompt_identity(probe.prompt, probe.template)
            if prompts.setdefault(probe.prompt_id, identity) != identity:
                raise ValueError(f"prompt_id {probe.prompt_id!r} stands for two different prompts; give each its own.")
        self._prompt_ids = tuple(prompts)

    # -- Making one ----------------------------------------------------------------------------------------------

    @classmethod
    def from_preference_dataset(
        cls,
        dataset: Rows,
        *,
        columns: Columns | None = None,
        **options: Unpack[BuildOptions],
    ) -> ProbeSet:
        """Make probes from preference rows, in any form that `DPOTrainer` or `KTOTrainer` takes.

        Args:
            dataset: A `datasets.Dataset`, a data frame, or dictionaries: plain or chat, with a prompt column or the
                prompt inside both responses, or KTO's rows of a completion with its label.
            columns: By family, the column that holds it, or several. The family of a writer needs no entry if a
                column bears its name.
            **options: See `BuildOptions`. `families`: those wanted; by default chosen and rejected, and those of
                `columns`. `n_prompts`: how many distinct prompts to draw; None for all. `seed` of every draw.
                `held_out`: rows that are not trained on; `other_test` and `random` draw from them. `tokenizer`: the
                trainer's; `random_tokens` needs it. `rephraser` writes the writer's families that have no column.
                `join`: `reference` (chosen and rejected stay byte for byte, every other response gets the leading
                whitespace of its row's chosen response and no trailing whitespace) or `as_is`. `prompt`: name of the
                prompt column. `drop_if`: by family, a text that must not occur, or a test that is true for those to
                drop. `as_chat`: make plain prompts and responses chat messages, as the recipes' `--as_chat` does.

        Returns:
            The set, by row and then by family: one row per distinct prompt, whose ids depend on the prompt alone.

        Raises:
            ValueError: For bad input, saying what was seen and what to change.
        """
        mapping = {"chosen": "chosen", "rejected": "rejected", **(columns or {})}
        return cls._built(build_probes(dataset, columns=mapping, source={"kind": "preference dataset"}, **options))

    @classmethod
    def from_prompt_completion(
        cls,
        dataset: Rows,
        *,
        columns: Columns | None = None,
        completion: str = "completion",
        **options: Unpack[BuildOptions],
    ) -> ProbeSet:
        """Make probes from the rows of `SFTTrainer`: prompt and completion, `messages`, `conversations` or `text`.

        The completion is family `chosen`; of a conversation it is the last assistant turn, of a text without turns its
        second half. With KTO's labels, the completions labelled False are `rejected`.

        Args:
            dataset: A `datasets.Dataset`, a data frame, or dictionaries.
            columns: By family, its column or columns; by default there is the completion only.
            completion: Name of the completion column.
            **options: As in `from_preference_dataset`.

        Returns:
            The set, by row and then by family.

        Raises:
            ValueError: For bad input, saying what was seen and what to change.
        """
        mapping = {"chosen": completion, **(columns or {})}
        source = {"kind": "prompt-completion dataset"}
        return cls._built(build_probes(dataset, columns=mapping, source=source, **options))

    @classmethod
    def from_records(
        cls,
        records: Rows,
        *,
        columns: Columns,
        source: Mapping[str, Any] | None = None,
        **options: Unpack[BuildOptions],
    ) -> ProbeSet:
        """Make probes from records whose columns hold responses of several families.

        Args:
            records: Dictionaries, a data frame, or a `datasets.Dataset`.
            columns: By family, its column, or several columns (then `-2`, `-3`... is added to the later ids). A cell
                may also hold a list of texts, or None if this row has none.
            source: Where the records came from, for the metadata; JSON-able.
            **options: As in `from_preference_dataset`. Families that have no column are built or written.

        Returns:
            The set, by row and then by family.

        Raises:
            ValueError: For bad input, saying what was seen and what to change.
        """
        described = {"kind": "records", **(source or {})}
        return cls._built(build_probes(records, columns=columns, source=described, **options))

    @classmethod
    def from_jsonl(cls, path: str | Path, *, columns: Columns, **options: Unpack[BuildOptions]) -> ProbeSet:
        """Make probes from a JSON Lines file, one record per line.

        Args:
            path: The file.
            columns: By family, its column or columns, e.g. `HH_COLUMNS`.
            **options: As in `from_records`, e.g. `drop_if=HH_DROP_IF`.

        Returns:
            The set, by row and then by family.

        Raises:
            ValueError: If a line is no JSON object, or for bad input as in `from_records`.
        """
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        source = {"kind": "jsonl", "file": Path(path).name, "sha256": digest}
        records = as_records(read_jsonl(path), str(path))
        return cls._built(build_probes(records, columns=columns, source=source, **options))

    @classmethod
    def _built(cls, parts: tuple[list[Probe], list[DroppedProbe], dict[str, Any]]) -> ProbeSet:
        probes, dropped, metadata = parts
        return cls(probes, dropped=dropped, metadata=metadata)

    # -- Looking at it -------------------------------------------------------------------------------------------

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The probes, by row and then by family."""
        return self._probes

    @property
    def dropped(self) -> tuple[DroppedProbe, ...]:
        """What was asked for and is not there, with reasons."""
        return self._dropped

    @property
    def metadata(self) -> dict[str, Any]:
        """Seed, join rule, source, and how each family was made (a copy)."""
        return copy.deepcopy(self._metadata)

    @property
    def families(self) -> tuple[str, ...]:
        """Families present, in canonical order."""
        return self._families

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """Ids of the prompts, in order."""
        return self._prompt_ids

    @overload
    def __getitem__(self, index: int) -> Probe: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Probe, ...]: ...
    def __getitem__(self, index: int | slice) -> Probe | tuple[Probe, ...]:
        return self._probes[index]

    def __len__(self) -> int:
        return len(self._probes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProbeSet) and self._probes == other._probes

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return f"ProbeSet({len(self)} probes, {len(self.prompt_ids)} prompts, families: {', '.join(self.families)})"

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex), equal exactly when two sets hold the same probes, whatever rows they are from."""
        records = [{**storage.probe_record(probe), "source_row": None} for probe in self._probes]
        lines = sorted(json.dumps(record, sort_keys=True) for record in records)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def summary(self) -> pd.DataFrame:
        """Return one row per family, dropped ones included, in canonical order.

        Returns:
            A frame indexed by `family` with `n` probes, `prompts`, `dropped` (bad responses), `not_given` (rows whose
            data holds none), `mean_chars` and `mean_words` of the responses, `made_by`, and `drop_reasons`.
        """
        return tables.summarise(self._probes, self._dropped, self._metadata.get("families", {}))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per probe with the fields of `Probe`; chat prompts as text, `role: content` per line."""
        return tables.as_frame(self._probes)

    def to_dataset(self) -> Dataset:
        """Return a `datasets.Dataset` with the fields of `Probe`; chat prompts stay messages.

        Raises:
            ValueError: If some prompts are chat and others are text: one column cannot hold both.
        """
        return tables.as_dataset(self._probes)

    # -- Keeping it ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one Parquet file (data and JSON, no pickle), atomically, and return its path."""
        storage.write_probes(Path(path), self._probes, self._dropped, self._metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ProbeSet:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, foreign, or of a later version; it names the file.
        """
        probes, dropped, metadata = storage.read_probes(Path(path))
        try:
            return cls(probes, dropped=dropped, metadata=metadata)
        except ValueError as error:
            raise ValueError(f"the probe set {path} cannot be read: {error}") from error

    # -- Changing it (into another) ------------------------------------------------------------------------------

    def select(
        self,
        *,
        families: Sequence[str] | None = None,
        prompt_ids: Sequence[str] | None = None,
        n_prompts: int | None = None,
        seed: int | None = None,
    ) -> ProbeSet:
        """Return the set restricted to families and prompts; the order stays.

        Args:
            families: Families to keep; None for all.
            prompt_ids: Prompts to keep; None for all.
            n_prompts: How many of these to draw; None for all.
            seed: Seed of the draw; None for the set's own.

        Returns:
            The smaller set.

        Raises:
            ValueError: If a family or prompt is not in the set, there are fewer prompts than asked, or none is left.
        """
        parts = change.select_probes(self, families=families, prompt_ids=prompt_ids, n_prompts=n_prompts, seed=seed)
        return self._built(parts)

    def add_family(
        self,
        name: str,
        *,
        responses: Mapping[str, Any] | Sequence[Any] | None = None,
        training_rows: Rows | None = None,
        held_out: Rows | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rephraser: Rephraser | None = None,
        seed: int | None = None,
        join: str | None = None,
        drop_if: DropIf | None = None,
    ) -> ProbeSet:
        """Return a new set with one more family for the same prompts.

        Args:
            name: The family, not yet in the set.
            responses: Given texts: by `prompt_id`, or one per prompt in the order of `prompt_ids`. An entry is a text,
                a list of texts, or None.
            training_rows: All rows that are trained on, for `other_train` to draw from; None for this set's prompts.
            held_out: Rows that are not trained on, for `other_test` and `random`.
            tokenizer: The trainer's tokenizer, for `random_tokens`.
            rephraser: Writer of a writer's family without `responses`.
            seed: Seed of the draws; None for the set's own.
            join: `reference` or `as_is`; None for the set's own.
            drop_if: By family, what to drop.

        Returns:
            The larger set.

        Raises:
            ValueError: If the family is unknown, already there, or what it needs is missing.
        """
        parts = change.add_family(
            self,
            name,
            responses=responses,
            training_rows=training_rows,
            held_out=held_out,
            tokenizer=tokenizer,
            rephraser=rephraser,
            seed=seed,
            join=join,
            drop_if=drop_if,
        )
        return self._built(parts)
