"""Where observations are kept: Parquet on disk, read back as pandas."""

from llm_dynamics.runlog.parts import RunLogError
from llm_dynamics.runlog.reader import RunLog, load_run
from llm_dynamics.runlog.several import RunLogs, load_runs
from llm_dynamics.runlog.writer import RunLogWriter

__all__ = ["RunLog", "RunLogError", "RunLogWriter", "RunLogs", "load_run", "load_runs"]
