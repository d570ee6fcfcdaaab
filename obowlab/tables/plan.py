"""From tables to trainings: which runs the rows need, in which order, and how many of them are left.

A job is a recipe and a seed, and it is done when the run store has a finished run with its fingerprint. So a plan has no state of
its own, and rows of any tables that resolve to the same recipe share one job.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from obowlab import text
from obowlab.config import Loaded, Machine, nearest
from obowlab.errors import UserError
from obowlab.launch.cost import CostBook
from obowlab.launch.preflight import data_checks, to_measure
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import RunSummary
from obowlab.runs.names import run_id_of
from obowlab.runs.records import Record, Records
from obowlab.runs.results import not_measured
from obowlab.tables.spec import PlannedRow, PlannedTable, override_texts


@dataclass(frozen=True)
class Job:
    """One training of the plan.

    Attributes:
        loaded: its recipe.
        seed: its seed.
        fingerprint: of both.
        run_id: what a new run of it is called.
        command: arguments of `obowlab` that train it.
        needs: fingerprint of the stage that must be finished before; None for none.
        places: the rows it serves, as `table1/queue_local`; stages of a row serve it too.
        is_stage: whether it serves rows only as an earlier stage.
    """

    loaded: Loaded
    seed: int
    fingerprint: str
    run_id: str
    command: tuple[str, ...]
    needs: str | None
    places: tuple[str, ...]
    is_stage: bool


@dataclass(frozen=True)
class Plan:
    """Every training that tables need, once each, in the order of execution: seed by seed, stages first."""

    tables: tuple[PlannedTable, ...]
    seeds: tuple[int, ...]
    jobs: tuple[Job, ...]

    @property
    def fingerprints(self) -> set[str]:
        """The fingerprints of all jobs."""
        return {job.fingerprint for job in self.jobs}


def make_plan(tables: Sequence[PlannedTable], *, seeds: Sequence[int], rows: Mapping[str, Sequence[str]]) -> Plan:
    """Return what tables need.

    Args:
        tables: at one scale.
        seeds: every row has a run of each.
        rows: table -> keys of the rows wanted, all if empty; the base row is always included, as the others are compared with it.
    """
    jobs: dict[str, Job] = {}
    for seed in seeds:
        for table in tables:
            for row in sorted(table.rows, key=lambda row: not row.is_base):
                if not rows or row.is_base or row.row.key in rows.get(table.name, ()):
                    for job in _jobs_of(row, table=table, seed=seed):
                        before = jobs.get(job.fingerprint)
                        jobs[job.fingerprint] = job if before is None else _merged(before, job)
    return Plan(tables=tuple(tables), seeds=tuple(seeds), jobs=tuple(jobs.values()))


def _jobs_of(row: PlannedRow, *, table: PlannedTable, seed: int) -> list[Job]:
    """Return the jobs of one row, earlier stages first."""
    command = text.arguments("run", row.base_recipe, set=override_texts({**row.overrides, **table.changes}), seed=seed)
    jobs: list[Job] = []
    stages = row.loaded.stages()
    for number, stage in enumerate(stages, start=1):
        is_last = number == len(stages)
        jobs.append(
            Job(
                loaded=stage,
                seed=seed,
                fingerprint=stage.recipe.fingerprint(seed=seed),
                run_id=run_id_of(stage, seed=seed),
                command=(*command, *text.arguments(stage=None if is_last else number)),
                needs=jobs[-1].fingerprint if jobs else None,
                places=(f"{table.name}/{row.row.key}",),
                is_stage=not is_last,
            )
        )
    return jobs


def _merged(first: Job, second: Job) -> Job:
    """Return the job of two rows with the same recipe; name and command are those of the first."""
    places = tuple(dict.fromkeys((*first.places, *second.places)))
    return replace(first, places=places, is_stage=first.is_stage and second.is_stage)


def without_recorded(plan: Plan, *, records: Records, runs: Mapping[str, RunSummary]) -> Plan:
    """Return what is left of a plan where some of its runs are recorded, trained on another machine perhaps.

    A recorded run counts when it is finished and measured as its row asks, unless the run store has it finished as well: that one
    can be measured again. Stages that then serve no run are left out too.

    Args:
        plan: of the tables.
        records: that `ablate --records` reads.
        runs: of the run store, by fingerprint.
    """
    here = {key for key, run in runs.items() if run.state.status == "finished"}
    left = [job for job in plan.jobs if job.fingerprint in here or not _is_recorded(job, record=records.get(job.fingerprint))]
    needed = {job.needs for job in left}
    for job in reversed([job for job in left if job.is_stage]):  # a stage may serve another stage
        if job.fingerprint not in needed:
            left.remove(job)
            needed = {each.needs for each in left}
    return replace(plan, jobs=tuple(left))


def _is_recorded(job: Job, *, record: Record | None) -> bool:
    if record is None or record.status != "finished":
        return False
    missing = {protocol for _, protocol in not_measured(job.loaded.recipe, results=record.results)}
    return missing.isdisjoint(result["protocol"] for result in record.results)


def select_rows(keys: Iterable[str], *, tables: Sequence[PlannedTable]) -> dict[str, list[str]]:
    """Return the rows wanted of every table; empty for all rows.

    Args:
        keys: of `--rows`: `KEY` in every table that has it, or `TABLE/KEY`; several are separated by commas.
        tables: that are planned.

    Raises:
        UserError: no table has such a row.
    """
    wanted: dict[str, list[str]] = {}
    known = {table.name: [row.row.key for row in table.rows] for table in tables}
    for place in (part for listed in keys for part in listed.split(",") if part):
        table, _, key = place.rpartition("/")
        found = [name for name, there in known.items() if key in there and table in ("", name)]
        if not found:
            hint = nearest(key, [each for there in known.values() for each in there])
            raise UserError(f"None of these tables has a row '{place}' (--rows).{hint}")
        for name in found:
            wanted.setdefault(name, []).append(key)
    return wanted


def labels_of(job: Job, *, plan: Plan) -> dict[str, str]:
    """Return the labels of a run: the rows it serves, with what all rows of their table change, and at which scale."""
    places = [place.split("/", maxsplit=1) for place in job.places]
    changed = {table.name: f" (--set {', '.join(table.changed)})" if table.changes else "" for table in plan.tables}
    rows = {f"obowlab.{table}": f"{row}{changed[table]}{' (stage)' if job.is_stage else ''}" for table, row in places}
    return {**rows, "obowlab.scale": plan.tables[0].scale}


def check_images(jobs: Iterable[Job], *, machine: Machine, say: Callable[[str], None]) -> None:
    """Refuse jobs whose images are missing; draw the synthetic images if they are not there.

    Raises:
        UserError: a data set is not prepared.
    """
    for check in data_checks([job.loaded for job in jobs], machine=machine, dry_run=False, say=say):
        check()


def unmeasured(plan: Plan, *, runs: Mapping[str, RunSummary], machine: Machine) -> set[str]:
    """Return the jobs whose runs are finished and not measured as their rows ask now, as far as the images here can carry it.

    Args:
        plan: of the tables.
        runs: of the run store, by fingerprint.
        machine: where the images are.

    Raises:
        UserError: the images or a result are damaged.
    """
    finished = {key: RunFolder(run.path, run.info) for key, run in runs.items() if run.state.status == "finished"}
    return {
        job.fingerprint
        for job in plan.jobs
        if not job.is_stage
        and job.fingerprint in finished
        and to_measure(job.loaded.recipe, folder=finished[job.fingerprint], machine=machine)
    }


def due_jobs(plan: Plan, *, runs: Mapping[str, RunSummary], again: Collection[str]) -> list[Job]:
    """Return the jobs that are to be trained, or at least measured.

    Args:
        plan: of the tables.
        runs: of the run store, by fingerprint.
        again: fingerprints of finished jobs that are to be measured, see `unmeasured`.
    """
    done = {key for key, run in runs.items() if run.state.status == "finished"} - set(again)
    return [job for job in plan.jobs if job.fingerprint not in done]


# ------------------------------------------------------------------------------------------------------------ what is left

OVERVIEW_COLUMNS = ("run", "status", "steps", "training", "rows")


def overview(
    plan: Plan,
    *,
    runs: Mapping[str, RunSummary],
    book: CostBook,
    slots: int,
    on_cluster: bool,
    again: Collection[str] = (),
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Describe a plan before it is executed.

    Args:
        plan: of the tables.
        runs: of the run store, by fingerprint.
        book: what trainings cost.
        slots: trainings at a time.
        on_cluster: whether they are jobs of a cluster.
        again: fingerprints of finished jobs that are to be measured, see `unmeasured`.

    Returns:
        A row of `OVERVIEW_COLUMNS` per training, and lines with what is done, running and missing, and how long the rest takes.
    """
    rows: list[tuple[str, ...]] = []
    left_s, unknown, counts = 0.0, 0, dict.fromkeys(("done", "running", "missing"), 0)
    for job in plan.jobs:
        run, cost = runs.get(job.fingerprint), book.cost(job.loaded.recipe)
        status = str(run.state.status) if run is not None else "missing"
        counts[{"finished": "done", "running": "running"}.get(status, "missing")] += 1
        share = 1.0
        if run is not None and run.state.total_steps:
            share -= run.state.step / run.state.total_steps
            if status != "finished":
                status = f"{status} {100 * run.state.step // run.state.total_steps} %"
        if cost.seconds is not None:
            left_s += share * cost.seconds
        elif share:
            unknown += 1
        if job.fingerprint in again:
            status = "finished, to be measured"
        time_text = f"{text.duration(cost.seconds)} ({cost.source})" if cost.seconds is not None else "unknown"
        places = ", ".join(f"{place} (stage)" if job.is_stage else place for place in job.places)
        rows.append((run.info.run_id if run is not None else job.run_id, status, str(cost.steps or "?"), time_text, places))
    num_stages = sum(job.is_stage for job in plan.jobs)
    num_rows = len({place for job in plan.jobs if not job.is_stage for place in job.places})
    staged = f" and {num_stages} stages before them" if num_stages else ""
    lines = [
        f"{num_rows} rows at scale {plan.tables[0].scale}, {len(plan.seeds)} seed(s): "
        f"{len(plan.jobs) - num_stages} trainings{staged}; "
        f"{counts['done']} done{f' ({len(again)} to be measured with other settings)' if again else ''}, "
        f"{counts['running']} running, {counts['missing']} missing.",
        *_lines_of_tables(plan),
    ]
    if left_s or not unknown:
        lines.append(f"Expected: {text.duration(left_s)} of training left; {slots} at a time: {text.duration(left_s / slots)}.")
    if unknown:
        when = "in their jobs" if on_cluster else "when the command runs"
        lines.append(f"{unknown} of them were never timed here; a few steps of each are {when}.")
    return rows, lines


def _lines_of_tables(plan: Plan) -> list[str]:
    """Return a line per table: its rows, and how many trainings it needs in addition to those of the tables before it."""
    lines: list[str] = []
    seen: set[str] = set()
    for table in plan.tables:
        jobs = [job for job in plan.jobs if not job.is_stage]
        places = {place for job in jobs for place in job.places if place.startswith(f"{table.name}/")}
        trainings = {job.fingerprint for job in jobs if places & set(job.places)}
        more, shared = len(trainings - seen), len(trainings & seen)
        note = f", {shared} of its trainings shared with the tables before" if shared else ""
        lines.append(f"  {table.name}: {len(places)} rows, {more} trainings{' more' if seen else ''}{note}")
        seen |= trainings
    return lines
