"""The machine: where and with what a run is computed, and nothing that changes a result beyond the order of float sums."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from obowlab import text
from obowlab.config.base import Count, Positive, Section
from obowlab.config.validation import check_keys, flat_pairs, known_keys, nest, read_toml, validate
from obowlab.errors import UserError


class Slurm(Section):
    """How jobs of `--launcher slurm` are submitted; what is absent is left to the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Annotated[str, Field(pattern=r"^[0-9][0-9:-]*$")] = Field("1-00:00:00", description="limit of one start, as for sbatch")
    gpus_per_node: Count = Field(8, description="no job asks one node for more")
    gpu_type: str | None = Field(None, description="as in --gres=gpu:TYPE:N")
    cpus_per_process: Count = Field(8, description="cores of each training process, for its loader")
    memory_per_process: str | None = Field(None, description="'64G', say")
    save_before_s: Count = Field(120, description="seconds before the limit at which a run saves itself and queues again")
    container: str | None = Field(None, description="stands before the command: 'apptainer exec --nv obowlab.sif', say")
    setup: tuple[str, ...] = Field((), description="shell lines before the command: 'module load cuda', say")
    options: tuple[Annotated[str, Field(pattern=r"^[a-z][a-z-]*(=.*)?$")], ...] = Field(
        (), description="further options of sbatch without their dashes: 'reservation=x', 'exclusive', say"
    )


class Machine(Section):
    """Where and with what a run is computed; nothing here changes a result."""

    data_root: Path = Field(Path("data"), strict=False)
    runs_root: Path = Field(Path("runs"), strict=False)
    tracking_uri: str | None = Field(None, description="MLflow store; sqlite in the run store if absent")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    procs: Count = Field(1, description="processes on all nodes together, one per GPU on a GPU machine")
    nodes: Count = 1
    launcher: Literal["local", "slurm"] = Field("local", description="here and now, or as jobs of a cluster")
    slurm: Slurm = Slurm()
    workers: Annotated[int, Field(ge=0)] | None = Field(None, description="loader threads or processes per training process")
    threads: Count | None = Field(None, description="of one process; on the CPU 1 if absent, else a share of the cores")
    loader: Literal["auto", "ffcv", "torch"] = "auto"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = Field(False, description="on a GPU, the same bits in every run, at the price of slower kernels")
    checkpoint_every_s: Positive = 120.0
    log_points: Count = Field(2000, description="limit on the points of a training metric")

    def local_args(self) -> tuple[str, ...]:
        """Return the options with which another `obowlab` command, started here or by a job, uses the same places and device."""
        places = text.arguments(runs_root=self.runs_root, data_root=self.data_root)
        return (*places, *text.arguments(loader=self.loader, workers=self.workers, device=self.device, launcher="local"))


def load_machine(*, file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Machine:
    """Read the machine file (`--machine`, `$OBOWLAB_MACHINE` or ~/.config/obowlab/machine.toml) under the given overrides.

    `$XDG_CONFIG_HOME` stands for ~/.config where it is set.

    `$OBOWLAB_DATA_ROOT`, `$OBOWLAB_RUNS_ROOT` and `$MLFLOW_TRACKING_URI` stand between the file and the overrides.
    """
    named = file or (Path(os.environ["OBOWLAB_MACHINE"]) if os.environ.get("OBOWLAB_MACHINE") else None)
    path = named or Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "obowlab" / "machine.toml"
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
    check_keys(values, known=list(known_keys(Machine)), sources=sources)
    machine = validate(Machine, nest(values), sources=sources)
    if machine.procs % machine.nodes:
        raise UserError(
            f"{machine.procs} process(es) cannot spread evenly over {machine.nodes} nodes: change --nodes, --gpus or --procs."
        )
    roots = {"data_root": machine.data_root, "runs_root": machine.runs_root}
    return machine.model_copy(update={name: path.expanduser().absolute() for name, path in roots.items()})
