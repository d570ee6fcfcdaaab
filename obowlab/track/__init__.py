"""What is remembered of a run: its folder on disk, what its numbers mean, and the window on it in MLflow."""

from obowlab.track.folder import RunFolder, RunSummary, list_runs
from obowlab.track.info import RunInfo, State
from obowlab.track.journal import MetricLog, Point
from obowlab.track.metrics import METRICS, Metric, lookup

__all__ = ["METRICS", "Metric", "MetricLog", "Point", "RunFolder", "RunInfo", "RunSummary", "State", "list_runs", "lookup"]
