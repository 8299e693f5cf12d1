"""Read a run log back as pandas frames."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from llm_dynamics.runlog import schema
from llm_dynamics.runlog.blame import blame
from llm_dynamics.runlog.family_influence import family_influence
from llm_dynamics.runlog.parts import RunLogError, completed_steps, find_run_log, read_meta, read_part

OnError = Literal["raise", "warn"]

_MAY_LACK = frozenset({**schema.ACCOUNT_TABLES, **schema.ROLLOUT_TABLES}) - {"influence", "accounts"} | {"tokens"}
"""Tables that a complete observation or account may be without: the token budget was spent, nobody asked for them."""
_INDICES = ("position", "m", "l", "example", "question", "n_tokens")
_BOUNDS: Mapping[str, Mapping[str, str]] = {
    "tokens": {"position": "probe"},
    "influence_tokens": {"position": "probe"},
    "influence_maps": {"m": "probe", "l": "training"},
    "training_tokens": {"position": "training"},
}
"""By table and column, the tokens of what an index counts; all others, which are names, must be no less than 0."""


@dataclass(frozen=True)
class RunLog:
    """A run log, read table by table when first asked for.

    Attributes:
        path: The run-log folder.
        errors: "raise" (a bad file raises `RunLogError`) or "warn" (it is named in a warning and left out).
    """

    path: Path
    errors: OnError = "raise"

    @property
    def name(self) -> str:
        """Name of the run: the output folder's."""
        return self.path.resolve().parent.name if self.path.name == schema.FOLDER else self.path.resolve().name

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The contents of `meta.json`."""
        return read_meta(self.path)

    @cached_property
    def probes(self) -> pd.DataFrame:
        """One row per probe; columns of `schema.PROBES`."""
        return read_part(self.path / schema.PROBES_FILE, schema.PROBES, meta=self.meta).to_pandas()

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """One row per probe and observation; columns of `schema.SEQUENCES`."""
        return self._read("sequences")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per probe token and observation; columns of `schema.TOKENS`."""
        return self._read("tokens")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per observation; columns of `schema.STEPS` and the run's metrics."""
        return self._read("steps")

    @cached_property
    def influence(self) -> pd.DataFrame:
        """One row per target (probe or family), cause and explained step; columns of `schema.INFLUENCE`."""
        return self._read("influence")

    @cached_property
    def influence_tokens(self) -> pd.DataFrame:
        """One row per probe token, cause and explained step, where they were asked for."""
        return self._read("influence_tokens")

    @cached_property
    def training_examples(self) -> pd.DataFrame:
        """One row per training example of each explained step."""
        return self._read("training_examples")

    @cached_property
    def training_tokens(self) -> pd.DataFrame:
        """One row per target, training token and explained step."""
        return self._read("training_tokens")

    @cached_property
    def influence_maps(self) -> pd.DataFrame:
        """One row per probe token and training token of the selected pairs."""
        return self._read("influence_maps")

    @cached_property
    def accounts(self) -> pd.DataFrame:
        """One row per explained step: how well the account balances."""
        return self._read("accounts")

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        """One row per completion of the generations that `NTHRGRPOTrainer` logged."""
        return self._read("rollouts")

    @cached_property
    def nthr_tokens(self) -> pd.DataFrame:
        """One row per token of these completions: score, threshold, advantage before and after."""
        return self._read("nthr_tokens")

    @cached_property
    def displacements(self) -> pd.DataFrame:
        """One row per correct completion of a mixed question: its log-prob before and after a step."""
        return self._read("displacements")

    @property
    def observed_steps(self) -> list[int]:
        """Optimizer steps at which a complete observation exists, ascending."""
        return completed_steps(self.path)

    @property
    def explained_steps(self) -> list[int]:
        """Optimizer steps that have a complete account, ascending; empty where none was asked for."""
        return completed_steps(self.path, "accounts")

    def delta_from_start(self) -> pd.DataFrame:
        """Return `sequences` with the change of each probe since the first observation.

        Returns:
            The sequences table with `delta_logp_sum` (nats, sum over tokens) and `delta_logp_mean` (nats per token):
            the value at a step minus the value of the same probe at its first observation.
        """
        frame = self.sequences.sort_values("step", kind="stable").reset_index(drop=True)
        start = frame.groupby("probe_id", sort=False)["logp_sum"].transform("first", skipna=False)
        delta = frame["logp_sum"] - start
        return frame.assign(delta_logp_sum=delta, delta_logp_mean=delta / frame["n_tokens"])

    def family_influence(self) -> pd.DataFrame:
        """Return what each cause did to each family in each explained step, whichever detail was logged.

        Returns:
            Columns `step`, `family`, `cause`; `share`, `own_share` and `measured`, means over the family's probes
            (nats, of the summed log-prob); `n_probes`, probes of the mean; `n_nonfinite`, probes left out of it because
            a number of theirs is not finite. See `runlog.family_influence`.
        """
        return family_influence(self.influence)

    def blame(self, target: str = "chosen") -> pd.DataFrame:
        """Return which rows of the training data moved a family, those that pushed it down most first.

            share of a row = sum over explained steps, and over its tokens l, of the share of l in the target's change

        with shares as in `training_tokens`: through each step's own gradient, so without what its momentum carries on,
        and without the steps that were not explained. Sums of a sample, then, and not what the run did in all.

        Args:
            target: A family, or a probe id, that `training_tokens` tells of.

        Returns:
            One row per text that was trained on, by `share`, ascending: `row`, of `trainer.train_dataset` (Int64, null
            where the log does not know; the two answers of a pair share it); `role`, `prompt`, `response`; `share`
            (nats); `c_sum` (sum of dL/d log pi over tokens and steps); `n_steps`, explained steps that trained on it;
            `n_tokens`; `n_nonfinite`, shares that are NaN or infinite and left out.

        Raises:
            ValueError: Where no training token is told for the target, naming those that there are.
        """
        names = ["step", "target", "example", "share"]
        return blame(self.columns("training_tokens", names), self.training_examples, target)

    def columns(self, table: str, names: Sequence[str]) -> pd.DataFrame:
        """Return some columns of a table; the others are not read (where the table is in memory, it is used).

        Args:
            table: A name in `schema.TABLES`, or "probes".
            names: Columns that the schema names.

        Returns:
            The columns, in the order of `names`.
        """
        if table in self.__dict__:
            return self.__dict__[table][list(names)]
        if table == "probes":
            return read_part(self.path / schema.PROBES_FILE, schema.PROBES, names, meta=self.meta).to_pandas()
        return self._read(table, names)

    def parts(
        self,
        table: str,
        steps: Iterable[int] | None = None,
        columns: Sequence[str] | None = None,
        *,
        dictionaries: Sequence[str] = (),
    ) -> Iterator[pa.Table]:
        """Yield the parts of a table one by one, so that a long run's tokens need not lie in memory whole.

        Args:
            table: A name in `schema.TABLES`.
            steps: The steps wanted, in the order wanted; all complete ones, ascending, where None.
            columns: The columns wanted; all where None. The others are not read.
            dictionaries: String columns to be given as Arrow dictionaries, which takes a fraction of the memory.

        Yields:
            The part of each step as an Arrow table. A step without a part is passed over where the table may lack one.

        Raises:
            RunLogError: Where a part is unreadable, or an index in it is beyond what the log says there is, and the run
                was opened with `errors="raise"`.
        """
        if steps is None and table in schema.ROLLOUT_TABLES:
            steps = completed_steps(self.path, table)
        elif steps is None:
            steps = self.observed_steps if table in schema.OBSERVED_TABLES else self.explained_steps
        for step in steps:
            file = self.path / table / schema.part_name(step)
            if table in _MAY_LACK and not file.exists():
                continue
            try:
                part = read_part(file, schema.TABLES[table], columns, dictionaries=dictionaries, meta=self.meta)
                self._check_indices(file, part)
            except RunLogError as error:
                if self.errors == "raise":
                    hint = 'load_run(path, errors="warn") reads the rest.'
                    raise RunLogError(f"{str(error).rstrip('.')}. {hint}") from error
                warnings.warn(f"left out of {table}: {error}", stacklevel=4)
            else:
                yield part

    def _check_indices(self, file: Path, part: pa.Table) -> None:
        """Refuse an index beyond the tokens that there are: a page would make room for it.

        Raises:
            RunLogError: For the first such column; it names file and column.
        """
        bounds = _BOUNDS.get(file.parent.name, {})
        for column in part.column_names:
            if column not in _INDICES or not part.num_rows:
                continue
            least, most = pc.min_max(part[column]).as_py().values()
            bound = self._counts(file.name)[bounds[column]] if column in bounds and most is not None else None
            if least is not None and (least < 0 or (bound is not None and most >= bound)):
                allowed = "from 0" if bound is None else f"from 0 to {bound - 1}"
                raise RunLogError(f"{file} is damaged: column `{column}` holds {least} to {most}; allowed: {allowed}")

    def _counts(self, part_name: str) -> Mapping[str, int | None]:
        """Return how many tokens the longest probe and the longest training example of the step have.

        None where the table that says so cannot be read: asking for that table tells.
        """
        if part_name not in self._counted:
            read = partial(read_part, meta=self.meta)
            longest = tokens = None
            with contextlib.suppress(RunLogError):
                ids = read(self.path / schema.PROBES_FILE, schema.PROBES, ["response_ids"])["response_ids"]
                longest = pc.max(pc.list_value_length(ids)).as_py()
            with contextlib.suppress(RunLogError):
                file = self.path / "training_examples" / part_name
                told = read(file, schema.TABLES["training_examples"], ["n_tokens"])
                tokens = pc.max(told["n_tokens"]).as_py()
            self._counted[part_name] = {"probe": longest, "training": tokens}
        return self._counted[part_name]

    @cached_property
    def _counted(self) -> dict[str, dict[str, int | None]]:
        return {}

    def _read(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        tables = list(self.parts(name, columns=columns))
        if not tables:
            empty = schema.TABLES[name].empty_table()
            return (empty if columns is None else empty.select(list(columns))).to_pandas()
        return pa.concat_tables(tables, promote_options="default").to_pandas()


def load_run(path: str | Path, *, errors: OnError = "raise") -> RunLog:
    """Open the run log at `path`.

    Args:
        path: A trainer's output_dir, or the `dynamics` folder in it.
        errors: What to do with a truncated or foreign file among the observations: "raise" names it in a
            `RunLogError`; "warn" names it in a warning and reads the rest. An observation that was cut short by a
            crash is no error: it is left out, since its `steps` part was never written.

    Returns:
        The run log; `.sequences`, `.tokens`, `.steps` and `.probes` are pandas frames, `.meta` a dict.

    Raises:
        RunLogError: Where there is no run log, or its `meta.json` is unreadable or of another schema version.
        ValueError: Where `errors` is neither "raise" nor "warn".

    Example:
        >>> run = load_run("runs/dpo")  # doctest: +SKIP
        >>> run.delta_from_start().groupby(["step", "family"])["delta_logp_sum"].mean()  # doctest: +SKIP
    """
    if errors not in ("raise", "warn"):
        raise ValueError(f'errors is {errors!r}; allowed: "raise", "warn"')
    run = RunLog(find_run_log(path), errors)
    _ = run.meta  # a foreign folder is refused here rather than at first use
    return run
