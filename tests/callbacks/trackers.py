"""Stand-ins for wandb and mlflow: the few functions that transformers' callbacks and ours call, as strict as they."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import plotly.graph_objects as go


def install(monkeypatch, name, module, *submodules):
    """Make `import name` give `module`, and its submodules."""
    for full in (name, *submodules):
        entry = module if full == name else ModuleType(full)
        entry.__spec__ = ModuleSpec(full, None)
        monkeypatch.setitem(sys.modules, full, entry)
    return module


class Wandb(ModuleType):
    """wandb with one process's run; `rows` holds what was logged."""

    class Table:
        def __init__(self, columns=None, data=None):
            assert all(isinstance(name, str) for name in columns)
            assert all(len(row) == len(columns) for row in data)
            kinds = {type(value) for row in data for value in row}
            assert kinds <= {int, float, str, type(None)}, kinds
            self.columns, self.data = columns, data

    class Plotly:
        def __init__(self, value):
            assert isinstance(value, go.Figure)
            value.to_json()
            self.value = value

    class Config(dict):
        def update(self, values, allow_val_change=False):
            super().update(values)

    def __init__(self):
        super().__init__("wandb")
        self.run, self.config, self.rows, self.opened = None, self.Config(), [], 0

    def init(self, project=None, **options):
        self.opened += 1
        self.run = SimpleNamespace(_label=lambda code: None, summary={})

    def define_metric(self, name, step_metric=None, step_sync=None):
        pass

    def log(self, data, step=None):
        if self.run is None:
            raise RuntimeError("You must call wandb.init() before wandb.log()")
        assert all(isinstance(value, int | float | Wandb.Table | Wandb.Plotly) for value in data.values())
        self.rows.append(dict(data))

    def rows_with(self, name):
        return {row["train/global_step"]: row[name] for row in self.rows if name in row}


def fake_wandb(monkeypatch):
    wandb = install(monkeypatch, "wandb", Wandb(), "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")
    sys.modules["wandb.sdk.lib.config_util"].ConfigError = type("ConfigError", (Exception,), {})
    return wandb


class Mlflow(ModuleType):
    """mlflow's fluent functions, which open a run where none is; artifacts by file."""

    def __init__(self):
        super().__init__("mlflow")
        self.__version__ = "3.4.0"
        limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        self.utils = SimpleNamespace(validation=limits)
        self.active, self.opened, self.metrics, self.tables, self.figures = None, 0, [], {}, {}

    def is_tracking_uri_set(self):
        return False

    def active_run(self):
        return self.active

    def start_run(self, run_name=None, nested=False):
        self.opened += 1
        self.active = SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def end_run(self):
        self.active = None

    def _get_or_start_run(self):
        if self.active is None:
            self.start_run()

    def log_params(self, params, synchronous=None):
        self._get_or_start_run()

    def log_metrics(self, metrics, step=None, synchronous=None):
        self._get_or_start_run()
        self.metrics.append((step, metrics))

    def log_table(self, data, artifact_file, run_id=None):
        self._get_or_start_run()
        assert artifact_file.endswith((".json", ".parquet"))
        assert len({len(column) for column in data.values()}) == 1
        stored = self.tables.setdefault(artifact_file, {name: [] for name in data})  # rows are appended
        assert list(stored) == list(data)
        for name, column in data.items():
            stored[name] += column

    def log_figure(self, figure, artifact_file):
        self._get_or_start_run()
        assert isinstance(figure, go.Figure)
        assert artifact_file.endswith(".html")
        self.figures[artifact_file] = figure


def fake_mlflow(monkeypatch):
    return install(monkeypatch, "mlflow", Mlflow())
