"""Tables of transfer, for `obowlab ablate` and `obowlab table`: measure the encoders of their rows, show what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from obowlab import text
from obowlab.cli.options import when_interrupted, would
from obowlab.cli.output import print_grids, print_lines, print_table
from obowlab.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obowlab.cli.options import MachineOptions
    from obowlab.config import Machine, Recipe
    from obowlab.runs.listing import RunSummary
    from obowlab.tables.render import Format
    from obowlab.tables.transfer import Entry, Given, TransferRow, Transfers, TransferTable
    from obowlab.weights.source import Source


@dataclass(frozen=True)
class _Due:
    """A measurement that is asked for.

    Attributes:
        row: of the table.
        protocol: of `obowlab eval`.
        seed: of a training; 0 for others.
        source: the encoder.
        question: see `tables.transfer.question`.
    """

    row: TransferRow
    protocol: str
    seed: int
    source: Source
    question: str


def measure_rows(
    names: Sequence[str],
    *,
    scale: str,
    row_keys: Sequence[str],
    seeds: int,
    weights: Sequence[str],
    machine: Machine,
    options: MachineOptions,
    records: Path | None,
    dry_run: bool,
) -> int:
    """Measure what tables of transfer ask of the encoders there are, show the tables, and keep the records if asked.

    Args:
        names: of the tables.
        scale: one of `SCALES`.
        row_keys: rows to measure; all if there are none.
        seeds: 0 to this many less one, of every protocol that is a training.
        weights: texts ROW=RUN or ROW=FILE: encoders of rows.
        machine: where and with what; its processes share every training.
        options: of the command line.
        records: folder that what was measured is written to as well.
        dry_run: only say what would be done.

    Returns:
        The exit code: 1 when something could not be measured.

    Raises:
        UserError: there is no such table, row or encoder, or nothing of it can be measured here.
    """
    from obowlab.tables.transfer import load_transfer, select, write_transfers

    if machine.launcher == "slurm":
        raise UserError(f"{names[0]} is measured where the command runs: leave --launcher out, and start it in a job of its own.")
    tables = [load_transfer(name, scale=scale) for name in names]
    code = 0
    for table in tables:
        if not table.protocols:
            raise UserError(
                f"{table.name} has the paper's values alone so far: nothing of it can be measured. Show it with `table`."
            )
        chosen = select(row_keys, table=table)
        work = _Work(table, machine=machine, options=options, dry_run=dry_run)
        work.give(weights)
        due = work.due(chosen, seeds=seeds)
        refused = work.refusals({each.protocol for each in due})
        _print_work(work, chosen=chosen, due=due, refused=refused)
        print_lines([f"Left out: {protocol}: {why}" for protocol, why in refused.items()])
        due = [each for each in due if each.protocol not in refused]
        if refused and not due and not any(work.transfers.of_row(key) for key in chosen):
            raise UserError(f"Nothing of {table.name} can be measured here, see above.")
        if dry_run:
            would(f"measure {len(due)} times")
            continue
        when_interrupted("the same command continues.")
        code = max(code, work.measure(due))
        if code >= 128:
            return code
        if records is not None:
            write_transfers(work.transfers, records / table.file_name)
        click.echo()
        _print(table, transfers=work.transfers)
    return code


def show_transfers(names: Sequence[str], *, scale: str, source: Path, form: Format, out: Path | None, dry_run: bool) -> None:
    """Show tables of transfer as a run store or a folder of records has them."""
    from obowlab.tables import transfer_render
    from obowlab.tables.transfer import find_transfers, load_transfer

    if form == "verdicts":
        raise UserError(f"{names[0]} has no directions: show it with another --format.")
    tables = [load_transfer(name, scale=scale) for name in names]
    if dry_run:
        return would(f"build {', '.join(names)} at scale {scale} from {source}")
    measured = [(table, find_transfers(table, folder=source)) for table in tables]
    if form == "rich" and out is None:
        for table, transfers in measured:
            _print(table, transfers=transfers)
        return None
    grids = [transfer_render.grid(table, transfers=transfers) for table, transfers in measured]
    values = [transfers.model_dump(mode="json") for _, transfers in measured]
    return print_grids(grids, names=[(table.name, table.scale) for table in tables], values=values, form=form, out=out)


# -------------------------------------------------------------------------------------------------------------- helpers


class _Work:
    """What is measured of a table's rows, and what was."""

    def __init__(self, table: TransferTable, *, machine: Machine, options: MachineOptions, dry_run: bool) -> None:
        from obowlab.tables.kept import KEPT
        from obowlab.tables.transfer import find_transfers

        self.table, self.machine, self.options, self.dry_run = table, machine, options, dry_run
        self.path = machine.runs_root / KEPT / table.file_name
        self.transfers = find_transfers(table, folder=machine.runs_root)
        self._sources: dict[str, Source | None] = {}

    def give(self, weights: Sequence[str]) -> None:
        """Let rows be measured with the encoders that --weights names, from now on.

        Raises:
            UserError: there is no such row or encoder.
        """
        from obowlab.tables.transfer import select

        given = dict(self.transfers.given)
        for word in weights:
            row, _, ref = word.partition("=")
            if not ref:
                raise UserError(f"--weights {word}: name a row and its encoder, as --weights obow=RUN or obow=FILE.")
            (key,) = select([row], table=self.table)
            given[key] = self._given(ref)
        if given != self.transfers.given:
            self._keep(self.transfers.model_copy(update={"given": given}))

    def due(self, rows: Sequence[str], *, seeds: int) -> list[_Due]:
        """Return what is asked of the encoders of rows and was not measured yet."""
        from obowlab.config import Evaluation
        from obowlab.config.protocols import TRAININGS
        from obowlab.tables.transfer import question

        found = []
        for row in self.table.file.row:
            source = self.source(row) if row.key in rows else None
            if source is None or source.info is None:
                continue
            evaluation = source.folder.info.recipe.evaluation if source.folder is not None else Evaluation()
            settings = evaluation.voc07_svm.model_dump(mode="json")
            for protocol in self.table.protocols:
                for seed in range(seeds if protocol in TRAININGS else 1):
                    word = question(
                        self.table, protocol=protocol, seed=seed, weights_hash=source.info.weights_hash, settings=settings
                    )
                    answer = self.transfers.answer(word)
                    if answer is None:
                        found.append(_Due(row, protocol, seed, source, word))
                    elif answer.row != row.key:  # the same encoder in another row
                        self._keep(self.transfers.with_entry(answer.model_copy(update={"row": row.key})))
        return found

    def source(self, row: TransferRow) -> Source | None:
        """Return a row's encoder: the one it was given, else that of a finished run of its recipe; None where there is none."""
        if row.key not in self._sources:
            self._sources[row.key] = self._find(row)
        return self._sources[row.key]

    def refusals(self, protocols: set[str]) -> dict[str, str]:
        """Return the protocols that cannot be measured here, and why."""
        from obowlab.launch.preflight import check_protocols
        from obowlab.launch.stages import find_obstacles, obstacles_of

        refused = {}
        for protocol in self.table.protocols:
            if protocol not in protocols:
                continue
            training = self.table.trainings.get(protocol)
            if training is not None:
                obstacles = find_obstacles([training], machine=self.machine, say=lambda _: None)
            else:
                recipe, dataset = next(iter(self.table.pretraining.values())).recipe, self.table.datasets[protocol]
                check = partial(check_protocols, recipe, protocols=(protocol,), dataset=dataset, machine=self.machine)
                obstacles = obstacles_of([check])
            if sentences := (*obstacles.absent, *obstacles.refused):
                refused[protocol] = " ".join(sentences)
        return refused

    def measure(self, due: Sequence[_Due]) -> int:
        """Measure, and keep what was measured each time; return 1 when something failed, or a signal's exit code."""
        failed = []
        for number, each in enumerate(due, start=1):
            what = f"{each.protocol} of {each.row.label}" + (
                f", seed {each.seed}" if each.protocol in self.table.trainings else ""
            )
            click.echo(f"Measuring {what} ({number} of {len(due)}).", err=True)
            try:
                code, entry = self._measure(each)
            except UserError as error:
                code, entry = 1, None
                click.echo(f"{what} failed: {error}", err=True)
            if code >= 128:
                return code
            if entry is None:
                failed.append(what)
            else:
                self._keep(self.transfers.with_entry(entry))
        if failed:
            click.echo(f"Not measured: {'; '.join(failed)}.", err=True)
        return int(bool(failed))

    def _measure(self, due: _Due) -> tuple[int, Entry | None]:
        from obowlab.cli.eval import keep_results, measure_here
        from obowlab.cli.run import Wanted
        from obowlab.cli.transfer import add_results, train_beginning_with
        from obowlab.runs.results import LEARNED
        from obowlab.weights.subject import find_subject

        folder = due.source.folder
        training = self.table.trainings.get(due.protocol)
        if training is not None:
            wanted = Wanted(training.name, due.seed, self.table.changes[due.protocol])
            code, trained = train_beginning_with(
                due.source, wanted=wanted, machine=self.machine, options=self.options, dry_run=False
            )
            if trained is None:
                return code, None
            if folder is not None:
                add_results(trained, to=folder, protocol=due.protocol, machine=self.machine)
            results = [result for result in trained.results() if result["protocol"] in LEARNED]
            return code, self._entry(due, result=results[-1], run_id=trained.run_id) if results else None
        ref = str(folder.path if folder is not None else due.source.path)
        chosen = find_subject(ref, recipe_name=None, overrides=(), runs_root=self.machine.runs_root)
        one = self.machine.model_copy(update={"procs": 1})
        dataset = self.table.datasets[due.protocol]
        values = measure_here(chosen, protocols=(due.protocol,), dataset=dataset, with_random=False, machine=one)
        if folder is not None:
            keep_results(values, folder=folder, machine=one)
        return 0, self._entry(due, result=values[0], run_id=None)

    def _entry(self, due: _Due, *, result: Mapping[str, Any], run_id: str | None) -> Entry:
        from obowlab.tables.transfer import Entry

        assert due.source.info is not None
        given = self.transfers.given.get(due.row.key)
        return Entry(
            row=due.row.key,
            protocol=due.protocol,
            seed=due.seed,
            question=due.question,
            encoder=given.name if given is not None else due.source.info.source if due.source.folder is None else due.source.name,
            weights_hash=due.source.info.weights_hash,
            dataset=str(result.get("details", {}).get("dataset", "")),
            basis=f"{result['protocol']} v{result['version']} {result['protocol_hash']} {result['data_hash']}",
            run_id=run_id,
            measurements=tuple(result["measurements"]),
        )

    def _given(self, ref: str) -> Given:
        from obowlab.tables.transfer import Given
        from obowlab.weights.source import find_source

        source = find_source(ref, runs_root=self.machine.runs_root, tracking_uri=self.machine.tracking_uri)
        info = source.info
        if info is None or (source.folder is None and not self.dry_run):
            from obowlab.weights.encoder_file import read_source
            from obowlab.weights.kept import keep_weights

            encoder = read_source(source)
            info = encoder.info
            if not self.dry_run:
                keep_weights(encoder, runs_root=self.machine.runs_root)
        is_here = source.folder is not None and source.folder.path.parent.resolve() == self.machine.runs_root.resolve()
        return Given(name=source.name, run_id=source.name if is_here else None, weights_hash=info.weights_hash)

    def _find(self, row: TransferRow) -> Source | None:
        from obowlab.runs.info import ENCODER_FILE
        from obowlab.weights.kept import kept_path
        from obowlab.weights.source import find_source

        runs_root = self.machine.runs_root
        given = self.transfers.given.get(row.key)
        if given is not None:
            kept = kept_path(given.weights_hash, runs_root=runs_root)
            if given.run_id is None and self.dry_run and not kept.is_file():
                return find_source(given.name, runs_root=runs_root)
            return find_source(given.run_id if given.run_id is not None else str(kept), runs_root=runs_root)
        loaded = self.table.pretraining.get(row.key)
        if loaded is None:
            return None
        if row.untrained:
            return self._untrained(loaded.recipe)
        keys = loaded.recipe.fingerprints(seeds=sorted({run.info.seed for run in self._runs.values()})).values()
        for key in keys:
            run = self._runs.get(key)
            if run is not None and (run.path / ENCODER_FILE).is_file():
                return find_source(str(run.path), runs_root=runs_root)
        return None

    def _untrained(self, recipe: Recipe) -> Source:
        """Return the network of a recipe as seed 0 begins it, which is kept as an encoder but for a dry run."""
        from obowlab.weights.kept import keep_weights, kept_path, untrained
        from obowlab.weights.source import Source

        encoder = untrained(recipe)
        if not self.dry_run:
            keep_weights(encoder, runs_root=self.machine.runs_root)
        path = kept_path(encoder.info.weights_hash, runs_root=self.machine.runs_root)
        return Source(str(path), path=path, info=encoder.info)

    @cached_property
    def _runs(self) -> dict[str, RunSummary]:
        from obowlab.runs.records import store_runs

        return store_runs(self.machine.runs_root)

    def _keep(self, transfers: Transfers) -> None:
        from obowlab.tables.transfer import write_transfers

        self.transfers = transfers
        if not self.dry_run:
            write_transfers(transfers, self.path, shared=True)


def _print_work(work: _Work, *, chosen: Sequence[str], due: Sequence[_Due], refused: Mapping[str, str]) -> None:
    """Print what is measured of every row, and what is to be."""
    table = work.table
    columns = ("row", "encoder", *table.protocols)
    rows = []
    for row in table.file.row:
        if row.key not in chosen:
            continue
        source = work.source(row)
        if source is None:
            rows.append([row.key, text.ABSENT, *[""] * len(table.protocols)])
            continue
        done = {(entry.protocol, entry.seed) for entry in work.transfers.of_row(row.key)}
        states = []
        for protocol in table.protocols:
            left = sum((each.row.key, each.protocol) == (row.key, protocol) for each in due)
            measured = sum(name == protocol for name, _ in done)
            states.append("left out" if left and protocol in refused else f"{left} to do" if left else f"{measured} done")
        rows.append([row.key, source.name if source.folder is not None else _shown(source), *states])
    print_table(columns, rows, title=table.file.title, names=("encoder",), prose=())


def _shown(source: Source) -> str:
    return source.info.source if source.info is not None else source.name


def _print(table: TransferTable, *, transfers: Transfers) -> None:
    from obowlab.tables import transfer_render as render

    columns, rows = render.columns_of(table), render.overview(table, transfers=transfers)
    title, hide = render.heading(table), render.expendable(table)
    print_table(columns, rows, title=title, right=columns[1:], names=("row",), hide=hide)
    print_lines(render.remarks(table, transfers=transfers))
    click.echo()
