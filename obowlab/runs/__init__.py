"""The run folder: what is on disk of a run, and what its numbers mean."""

from obowlab.runs.folder import RunFolder
from obowlab.runs.info import RunInfo, State
from obowlab.runs.listing import RunSummary, list_runs
from obowlab.runs.metric_log import MetricLog, Point
from obowlab.runs.metrics import METRICS, Metric, lookup

__all__ = ["METRICS", "Metric", "MetricLog", "Point", "RunFolder", "RunInfo", "RunSummary", "State", "list_runs", "lookup"]
