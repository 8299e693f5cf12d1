"""Tables of observations in the experiment tracker that the run reports to."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from transformers import TrainerControl, TrainerState, TrainingArguments

from llm_dynamics import _trl
from llm_dynamics.callbacks.guard import GuardedCallback
from llm_dynamics.callbacks.probe import ProbeCallback, require_open_log
from llm_dynamics.runlog import RunLog, RunLogs, RunLogWriter, load_run, schema
from llm_dynamics.runlog.parts import read_part

logger = logging.getLogger(__name__)

TOKEN_PROBES = 3
"""Probes whose tokens are sent; the run log keeps more."""
TOKEN_LENGTH = 40
"""Characters after which a token is cut."""
FAMILIES, TOKENS, CURVES = "dynamics/families", "dynamics/tokens", "dynamics/curves"
"""Names in the tracker."""
_GLOBAL_STEP = "train/global_step"
"""By this, transformers' callbacks tell wandb and trackio the optimizer step of a row."""


class TrackerTables(GuardedCallback):
    """Sends each observation as tables to the trackers of the run, and at the end the curves of the families.

    wandb, trackio, mlflow and TensorBoard get `dynamics/families` (means over the probes of a family) and
    `dynamics/tokens` (the tokens of the first probes that keep theirs), see `observation_tables`; at the last step
    `dynamics/curves`, a plotly figure, or in TensorBoard a chart of its own scalars. Only runs that transformers'
    own callback opened are added to, by public functions of the tracker; without one nothing happens. An error of a
    tracker is logged once and stops nothing. Training is not changed by one bit.

    Args:
        watcher: The callback that observes; it must come before this one in the trainer's list.
    """

    part = "sending tables to trackers"
    collective = False  # the main process alone sends

    def __init__(self, watcher: ProbeCallback) -> None:
        self.trainer, self.watcher, self.on_error = watcher.trainer, watcher, watcher.on_error
        self._sent: int | None = None
        self._drawn = False
        self._failed: set[str] = set()

    def due(self, event: str, state: TrainerState, control: TrainerControl) -> bool:
        """Tell whether an event has anything to do."""
        if event == "on_epoch_end":
            return control.should_training_stop and not self._drawn
        fresh = self.watcher.observed_step == state.global_step != self._sent
        return event == "on_train_begin" or fresh or (state.global_step >= state.max_steps > 0 and not self._drawn)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew; of a resumed run, the observation that it begins with was sent."""
        require_open_log(self.watcher)
        resumed = state.is_world_process_zero and self._log.steps() != [state.global_step]
        self._sent, self._drawn = state.global_step if resumed else None, False
        self._failed.clear()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the first observation, when all trackers are open."""
        self._send(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send the observation of this step, and after the last the curves."""
        self._send(state)
        if state.global_step >= state.max_steps > 0:
            self._draw(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send what a run that stops early observed last: later its trackers are closed."""
        self._send(state)
        self._draw(state)

    @property
    def _log(self) -> RunLogWriter:
        return self.watcher.recorder.log

    def _send(self, state: TrainerState) -> None:
        step = state.global_step
        if not state.is_world_process_zero or self._sent == step or not self._log.has(step):
            return
        trackers = _trl.open_trackers(self.watcher.trainer)
        if trackers:
            recorder, suffix = self.watcher.recorder, self.watcher.rows.suffix
            assert recorder.first is not None
            first = int(recorder.first["step"].iloc[0])
            tables = observation_tables(self._log, first, step, self.watcher.table, recorder.token_probes)
            named = {f"{name}{suffix}": frame for name, frame in tables.items()}
            self._to_each(trackers, step, lambda name, tracker: _TABLES[name](tracker, step, named))
        self._sent = step

    def _draw(self, state: TrainerState) -> None:
        if not state.is_world_process_zero or self._drawn:
            return
        self._drawn = True
        trackers = _trl.open_trackers(self.watcher.trainer)
        if trackers:
            run, step = load_run(self._log.folder), state.global_step
            self._to_each(trackers, step, lambda name, tracker: _CURVES[name](tracker, step, run, self.watcher))

    def _to_each(self, trackers: Mapping[str, Any], step: int, send: Callable[[str, Any], None]) -> None:
        begun = time.monotonic()
        for name, tracker in trackers.items():
            try:
                send(name, tracker)
            except Exception as error:  # a service that is down must not end the run
                if name not in self._failed:
                    logger.warning(
                        "%s did not take the tables of step %d (%s: %s); training goes on, and further errors of it "
                        "are not told",
                        name,
                        step,
                        type(error).__name__,
                        error,
                    )
                self._failed.add(name)
        self.watcher.clock.add(time.monotonic() - begun)


def observation_tables(
    log: RunLogWriter, first: int, step: int, probes: pd.DataFrame, token_probes: set[str]
) -> dict[str, pd.DataFrame]:
    """Return the tables of one observation.

    Args:
        log: The run log.
        first: The step of the first observation.
        step: A step whose observation is complete.
        probes: The probes table.
        token_probes: Probes that keep their tokens.

    Returns:
        `dynamics/families`: `step`, `family`, `n_probes`, `logp` and `delta`, means over probes of the summed log-prob
        and of its change since the first observation (nats), `delta_per_token`, mean over probes of change / tokens
        (nats per token). `dynamics/tokens`, where some are kept: `step`, `probe_id`, `position`, `token` (spaces and
        line breaks drawn), `logp`, `delta` (nats).
    """
    from llm_dynamics.report.text import token_label  # the report loads plotly, which runs without a tracker need not

    sequences = _part(log, "sequences", step)
    start = _part(log, "sequences", first).set_index("probe_id")["logp_sum"]
    sequences = sequences.assign(delta=sequences["logp_sum"] - sequences["probe_id"].map(start))
    sequences["delta_per_token"] = sequences["delta"] / sequences["n_tokens"]
    by_family = sequences.groupby("family", sort=False)
    families = pd.DataFrame(
        {
            "n_probes": by_family.size(),
            "logp": by_family["logp_sum"].agg(_mean),
            "delta": by_family["delta"].agg(_mean),
            "delta_per_token": by_family["delta_per_token"].agg(_mean),
        }
    ).reset_index()
    tables = {FAMILIES: families}
    shown = [probe_id for probe_id in probes["probe_id"] if probe_id in token_probes][:TOKEN_PROBES]
    if shown and (log.folder / "tokens" / schema.part_name(step)).exists():
        tokens = _part(log, "tokens", step)
        tokens = tokens[tokens["probe_id"].isin(shown)][["probe_id", "position", "token", "logp"]]
        at_start = _part(log, "tokens", first)[["probe_id", "position", "logp"]]
        tokens = tokens.merge(at_start, on=["probe_id", "position"], how="left", suffixes=("", "_start"))
        tokens["delta"] = tokens["logp"] - tokens.pop("logp_start")
        tokens["token"] = [token_label(token, TOKEN_LENGTH) for token in tokens["token"]]
        tables[TOKENS] = tokens
    for table in tables.values():
        table.insert(0, "step", step)
    return tables


def _part(log: RunLogWriter, table: str, step: int) -> pd.DataFrame:
    file = log.folder / table / schema.part_name(step)
    return (
        read_part(file, schema.TABLES[table]).to_pandas()
        if file.exists()
        else schema.TABLES[table].empty_table().to_pandas()
    )


def _mean(values: pd.Series) -> float:
    return float(values.mean(skipna=False))


# ---- one pair of functions per tracker ------------------------------------------------------------------------------


def _cells(frame: pd.DataFrame) -> dict[str, Any]:
    """Return columns and rows as plain Python values, None where a number is not finite."""
    rows = [[_plain(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return {"columns": list(frame.columns), "data": rows}


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table_rows(module: Any, step: int, tables: Mapping[str, pd.DataFrame]) -> None:
    """Send to wandb or trackio, whose functions have the same names."""
    module.log({name: module.Table(**_cells(frame)) for name, frame in tables.items()} | {_GLOBAL_STEP: step})


def _artifacts(mlflow: Any, step: int, tables: Mapping[str, pd.DataFrame]) -> None:
    for name, frame in tables.items():
        cells = _cells(frame)
        columns = {column: [row[i] for row in cells["data"]] for i, column in enumerate(cells["columns"])}
        mlflow.log_table(data=columns, artifact_file=f"{name}.json")  # mlflow adds rows to those of earlier steps


def _texts(writer: Any, step: int, tables: Mapping[str, pd.DataFrame]) -> None:
    from llm_dynamics.report.markdown import markdown_table

    for name, frame in tables.items():
        writer.add_text(name, markdown_table(frame), step)
    writer.flush()


def _figure(run: RunLog) -> Any:
    from llm_dynamics.report.figures import curves_figure

    return curves_figure(RunLogs({run.name: run}))


def _name(watcher: ProbeCallback) -> str:
    return f"{CURVES}{watcher.rows.suffix}"


def _scalar_charts(writer: Any, step: int, run: RunLog, watcher: ProbeCallback) -> None:
    """Tell TensorBoard to draw the curves that it has in charts; it draws no figures of others."""
    charts = {}
    for other in watcher.trainer.callback_handler.callbacks:  # a writer keeps one layout, that of the last call
        if isinstance(other, ProbeCallback):
            suffix = other.rows.suffix
            tags = [f"train/probe/{family}_delta{suffix}" for family in dict.fromkeys(other.table["family"])]
            charts[f"change of log-prob by family, nats{suffix}"] = ["Multiline", tags]
    writer.add_custom_scalars({"dynamics": charts})
    writer.flush()


_TABLES: dict[str, Callable[[Any, int, Mapping[str, pd.DataFrame]], None]] = {
    "wandb": _table_rows,
    "trackio": _table_rows,
    "mlflow": _artifacts,
    "tensorboard": _texts,
}
_CURVES: dict[str, Callable[[Any, int, RunLog, ProbeCallback], None]] = {
    "wandb": lambda wandb, step, run, of: wandb.log({_name(of): wandb.Plotly(_figure(run)), _GLOBAL_STEP: step}),
    "trackio": lambda trackio, step, run, of: trackio.log({_name(of): trackio.Html(_figure(run)), _GLOBAL_STEP: step}),
    "mlflow": lambda mlflow, step, run, of: mlflow.log_figure(_figure(run), f"{_name(of)}.html"),
    "tensorboard": _scalar_charts,
}
