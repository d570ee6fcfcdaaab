"""The machine: where and with what a run is carried out, and nothing that changes a result beyond the order of float sums."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from obowlab.config.base import Count, Positive, Section
from obowlab.config.checking import check_keys, flat_pairs, read_toml, validate


class Machine(Section):
    """Where and with what a run is carried out; nothing here changes a result."""

    data_root: Path = Field(Path("data"), strict=False)
    runs_root: Path = Field(Path("runs"), strict=False)
    tracking_uri: str | None = Field(None, description="MLflow store; sqlite in the run store if absent")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    procs: Count = Field(1, description="processes, one per GPU on a GPU machine")
    workers: Annotated[int, Field(ge=0)] | None = Field(None, description="loader threads or processes per training process")
    threads: Count | None = Field(None, description="of one process; on the CPU 1 if absent, else a share of the cores")
    loader: Literal["auto", "ffcv", "torch"] = "auto"
    channels_last: bool = True
    compile: bool = False
    checkpoint_every_s: Positive = 120.0
    log_points: Count = Field(2000, description="at most so many points per training metric")


def load_machine(*, file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Machine:
    """Read the machine file (`--machine`, `$OBOWLAB_MACHINE` or ~/.config/obowlab/machine.toml) under the given overrides.

    `$OBOWLAB_DATA_ROOT`, `$OBOWLAB_RUNS_ROOT` and `$MLFLOW_TRACKING_URI` stand between the file and the overrides.
    """
    named = file or (Path(os.environ["OBOWLAB_MACHINE"]) if os.environ.get("OBOWLAB_MACHINE") else None)
    path = named or Path("~/.config/obowlab/machine.toml").expanduser()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if named is not None or path.is_file():
        values = dict(flat_pairs(read_toml(path)))
        sources = dict.fromkeys(values, str(path))
    variables = {"data_root": "OBOWLAB_DATA_ROOT", "runs_root": "OBOWLAB_RUNS_ROOT", "tracking_uri": "MLFLOW_TRACKING_URI"}
    for key, variable in variables.items():
        if os.environ.get(variable):
            values[key] = os.environ[variable]
            sources[key] = f"${variable}"
    for key, value in (overrides or {}).items():
        if value is not None:
            values[key] = str(value) if isinstance(value, Path) else value
            sources[key] = f"--{key.replace('_', '-')}"
    check_keys(values, known=list(Machine.model_fields), sources=sources)
    machine = validate(Machine, values, sources=sources)
    roots = {"data_root": machine.data_root, "runs_root": machine.runs_root}
    return machine.model_copy(update={name: path.expanduser().absolute() for name, path in roots.items()})
