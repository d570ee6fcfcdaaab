"""What is drawn of a run, kept: the metrics of hundreds of runs are hundreds of megabytes, and nearly all no longer change.

`RUNS_ROOT/.drawn/RUN_ID.json` holds a run's curves and its page's figures, for one state of its metric files, its results and
this code. It may be deleted at any time, and is written beside and renamed: several processes may draw one run at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydantic_core

from obowlab.files import write_atomic
from obowlab.report.curves import Curve, read_curves, with_point
from obowlab.report.figures import TRAINING, VOCABULARY, run_figures
from obowlab.report.model import Figure, Measured

FOLDER = ".drawn"
METRIC_FILES = ("metrics.jsonl", "online.jsonl")
ALSO_DRAWING = ("lab/chart.py", "track/journal.py", "track/metrics.py")
"""Files of the package on which figures depend, beside this folder's."""

EDGES = ("epoch", "mean", "low", "high")


@dataclass(frozen=True)
class Drawn:
    """The curves of a run and the charts of its page.

    Attributes:
        curves: metric to curve; those of results during training end with the final result.
        training: figures of the loss and of what is measured during training.
        vocabulary: figures of the vocabulary.
    """

    curves: Mapping[str, Curve]
    training: tuple[Figure, ...]
    vocabulary: tuple[Figure, ...]


def drawn(run: Path, *, epochs: int, measured: Iterable[Measured]) -> Drawn:
    """Return what is drawn of a run, as an earlier call kept it or from its metric files.

    Args:
        run: its folder.
        epochs: of the whole training.
        measured: its results, which end the curves of results during training.
    """
    final = {m.metric: m.student[0] for m in reversed(list(measured)) if m.student is not None}
    stamps = [f"{path.stat().st_size}-{path.stat().st_mtime_ns}" if path.exists() else "" for path in _files(run)]
    stamp = json.dumps([code_hash(), epochs, final, stamps])
    path = run.parent / FOLDER / f"{run.name}.json"
    kept = _read(path, stamp=stamp)
    if kept is None:
        kept = draw(run, epochs=epochs, final=final)
        with suppress(OSError):  # a store that only may be read: it is drawn again next time
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, pydantic_core.to_json({"stamp": stamp, **asdict(kept)}))
    return kept


def draw(run: Path, *, epochs: int, final: Mapping[str, float]) -> Drawn:
    """Draw a run from its metric files.

    Args:
        run: its folder.
        epochs: of the whole training.
        final: the student's final results, percent, by metric.
    """
    logged = {name: curve for path in _files(run) for name, curve in read_curves(path, epochs=epochs).items()}
    curves = {
        name: with_point(curve, epoch=float(epochs), value=final[name]) if name in final and curve.epoch[-1] < epochs else curve
        for name, curve in logged.items()
    }
    return Drawn(
        curves=curves,
        training=tuple(run_figures(curves, metrics=TRAINING)),
        vocabulary=tuple(run_figures(curves, metrics=VOCABULARY)),
    )


@cache
def code_hash() -> str:
    """Return the hash of the code that reads and draws: whoever changes it sees new figures, not kept ones."""
    digest = hashlib.sha256(np.__version__.encode())
    package = Path(__file__).parents[2]
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *(package / name for name in ALSO_DRAWING)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files(run: Path) -> list[Path]:
    return [run / name for name in METRIC_FILES]


def _read(path: Path, *, stamp: str) -> Drawn | None:
    """Return what was kept under this stamp; None when there is nothing, or it is damaged: the metric files are the truth."""
    try:
        kept = pydantic_core.from_json(path.read_bytes())
        return _parse(kept) if kept["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parse(kept: Mapping[str, Any]) -> Drawn:
    curves = {name: Curve(**{**curve, **{edge: tuple(curve[edge]) for edge in EDGES}}) for name, curve in kept["curves"].items()}
    parts = {part: tuple(Figure(**figure) for figure in kept[part]) for part in ("training", "vocabulary")}
    return Drawn(curves=curves, **parts)
