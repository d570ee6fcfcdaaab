"""The stages of a recipe, each a run of its own: which of them are to be trained, and whether they can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from obowlab.config import Loaded, Machine
from obowlab.config.compatibility import check_cpu, check_procs
from obowlab.errors import AbsentError, UserError
from obowlab.launch.cost import Cost, quoted
from obowlab.launch.gpu_leases import check_gpus
from obowlab.launch.preflight import check_compiler, check_loader, check_nodes, data_checks, to_measure
from obowlab.launch.system import count_gpus
from obowlab.runs.folder import RunFolder, refuse_others
from obowlab.runs.lineage import stages_of
from obowlab.runs.listing import has_run
from obowlab.runs.names import run_id_of


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        loaded: its recipe.
        number: from 1.
        is_last: whether it is the last one that was asked for.
        folder: its run; None when it never began.
        is_due: whether it is to be trained, or at least measured.
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
        folder = RunFolder.open(path) if has_run(path) else None
        is_last = number == (last or len(stages))
        fresh = is_last and resume is False
        is_due = fresh or folder is None or folder.current_state().status != "finished"
        if is_last and not is_due and folder is not None:
            is_due = bool(to_measure(each.recipe, folder=folder, machine=machine))
        if is_due:
            refuse_others(path)
        found.append(Stage(each, number, is_last, folder, is_due=is_due, fresh=fresh))
    if resume and all(stage.folder is None for stage in found):
        run_id = run_id_of(found[-1].loaded, seed=seed)
        raise UserError(f"There is no run '{run_id}' in {machine.runs_root} to resume; `obowlab runs list` shows what is there.")
    return found


def check_stages(stages: Sequence[Stage], *, machine: Machine, say: Callable[[str], None]) -> None:
    """Refuse stages that could not be trained to their end on this machine; draw the synthetic images on first use.

    Args:
        stages: of one recipe.
        machine: where they would be trained.
        say: prints one line.

    Raises:
        UserError: says what is missing.
    """
    due = [stage.loaded for stage in stages if stage.is_due]
    for check in _checks(due, machine=machine, at_a_time=1, dry_run=False, say=say):
        check()


@dataclass(frozen=True)
class Obstacles:
    """Why trainings could not be trained here and now.

    Attributes:
        absent: what this machine lacks and another may have: GPUs, images.
        refused: what no machine could do.
    """

    absent: tuple[str, ...]
    refused: tuple[str, ...]


def find_obstacles(
    due: Sequence[Loaded],
    *,
    machine: Machine,
    say: Callable[[str], None],
    at_a_time: int = 1,
    required: str | None = None,
) -> Obstacles:
    """Return everything for which trainings would be refused; changes nothing.

    Args:
        due: their recipes.
        machine: where each of them would be trained.
        say: prints one line.
        at_a_time: how many share its GPUs out.
        required: a protocol of the last of them that may not be left out.
    """
    return obstacles_of(_checks(due, machine=machine, at_a_time=at_a_time, dry_run=True, say=say, required=required))


def obstacles_of(checks: Iterable[Callable[[], object]]) -> Obstacles:
    """Return what checks refuse."""
    absent: list[str] = []
    refused: list[str] = []
    for check in checks:
        try:
            check()
        except AbsentError as error:
            absent.append(str(error))
        except UserError as error:
            refused.append(str(error))
    return Obstacles(tuple(dict.fromkeys(absent)), tuple(dict.fromkeys(refused)))


def _checks(
    due: Sequence[Loaded],
    *,
    machine: Machine,
    at_a_time: int,
    dry_run: bool,
    say: Callable[[str], None],
    required: str | None = None,
) -> Iterator[Callable[[], None]]:
    if machine.launcher == "local":
        yield partial(check_nodes, machine)
        yield partial(check_compiler, machine)
        yield partial(check_loader, machine)
        yield partial(check_gpus, machine.model_copy(update={"procs": machine.procs * at_a_time}))
        if machine.device == "cpu" or (machine.device == "auto" and not count_gpus()):
            yield from (partial(check_cpu, loaded.recipe) for loaded in due)
    yield from (partial(check_procs, loaded.recipe, procs=machine.procs) for loaded in due)
    yield from data_checks(due, machine=machine, dry_run=dry_run, say=say, required=required)
