"""The stages of a recipe, each a run of its own: which of them are to be trained, and whether they can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from obowlab.config import Loaded, Machine
from obowlab.errors import UserError
from obowlab.launch.cost import Cost, quoted
from obowlab.launch.gpu_leases import check_gpus
from obowlab.launch.preflight import check_data, check_nodes
from obowlab.runs.folder import RunFolder, run_id_of
from obowlab.runs.lineage import stages_of


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        loaded: its recipe.
        number: from 1.
        is_last: whether it is the last one that was asked for.
        folder: its run; None when it never began.
        is_due: whether it is to be trained.
        fresh: whether its present folder is put aside first.
    """

    loaded: Loaded
    number: int
    is_last: bool
    folder: RunFolder | None
    is_due: bool
    fresh: bool

    def cost(self, machine: Machine, *, measure: bool) -> Cost | None:
        """Return what training it will cost; None when it has begun. See `quoted`."""
        is_new = self.folder is None or self.fresh or not self.folder.attempts()
        return quoted(self.loaded.recipe, machine=machine, measure=measure) if is_new else None


def open_stages(loaded: Loaded, *, seed: int, machine: Machine, last: int | None, resume: bool | None) -> list[Stage]:
    """Return the stages of a recipe, first to last, as the run store has them.

    Args:
        loaded: the recipe.
        seed: of all its runs.
        machine: where they are.
        last: number of the stage to end with; all if absent.
        resume: True requires a run to resume, False puts the last one aside.

    Raises:
        UserError: there is no such stage, or no run to resume.
    """
    stages = stages_of(loaded, seed=seed, runs_root=machine.runs_root)
    if last is not None and last > len(stages):
        raise UserError(f"Recipe '{loaded.name}' has {len(stages)} stage{'s' * (len(stages) > 1)}, not {last}: lower --stage.")
    found = []
    for number, each in enumerate(stages[:last], start=1):
        path = machine.runs_root / run_id_of(each, seed=seed)
        folder = RunFolder.open(path) if (path / "run.json").is_file() else None
        is_last = number == (last or len(stages))
        fresh = is_last and resume is False
        is_finished = folder is not None and folder.current_state().status == "finished"
        found.append(Stage(each, number, is_last, folder, is_due=fresh or not is_finished, fresh=fresh))
    if resume and all(stage.folder is None for stage in found):
        run_id = run_id_of(found[-1].loaded, seed=seed)
        raise UserError(f"There is no run '{run_id}' in {machine.runs_root} to resume; `obowlab runs list` shows what is there.")
    return found


def check_stages(stages: Sequence[Stage], *, machine: Machine, dry_run: bool, say: Callable[[str], None]) -> None:
    """Refuse stages that could not be trained to their end on this machine; see `check_data` for the arguments.

    Raises:
        UserError: says what is missing.
    """
    if machine.launcher == "local":
        check_nodes(machine)
        check_gpus(machine)
    checked = []
    for stage in stages:
        if stage.is_due:
            stage.loaded.recipe.check_procs(machine.procs)
            if stage.loaded.recipe.data not in checked:
                check_data(stage.loaded, machine=machine, dry_run=dry_run, say=say)
            checked.append(stage.loaded.recipe.data)
