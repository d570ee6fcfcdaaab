"""From a table of transfer to measurements: the encoder of every row, what is asked of it and not known, and what came of that.

What was measured is kept each time, and nothing is measured twice: killed at any moment, the same command continues.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from obowlab import text
from obowlab.config import Evaluation, Machine, Recipe
from obowlab.config.protocols import TRAININGS
from obowlab.errors import UserError
from obowlab.launch.preflight import check_protocols
from obowlab.launch.stages import find_obstacles, obstacles_of
from obowlab.runs.info import ENCODER_FILE
from obowlab.runs.listing import RunSummary
from obowlab.runs.records import store_runs
from obowlab.tables.kept import KEPT
from obowlab.tables.measured import change_kept, find_kept, select_keys
from obowlab.tables.transfer import Entry, Given, TransferRow, Transfers, TransferTable, question
from obowlab.weights.info import EncoderInfo
from obowlab.weights.source import Source, find_source, kept_path


@dataclass(frozen=True)
class Due:
    """A measurement that is asked for.

    Attributes:
        row: of the table.
        protocol: of `obowlab eval`.
        seed: of a training; 0 for others.
        source: the encoder.
        info: what is known of it.
        question: see `tables.transfer.question`.
        name: what a message calls it.
    """

    row: TransferRow
    protocol: str
    seed: int
    source: Source
    info: EncoderInfo
    question: str
    name: str


class Outcome(NamedTuple):
    """How a measurement ended: the exit code, 128 and more for a signal; the result, if there is one; the training, if it was."""

    code: int
    result: Mapping[str, Any] | None = None
    run_id: str | None = None


@dataclass
class Measuring:
    """What is measured of a table's rows, and what was.

    Attributes:
        table: at its scale.
        machine: where and with what; its run store keeps the results.
        keep: keeps an encoder, or a recipe's network as it is before training, in the run store, but for a dry run.
        dry_run: keep nothing.
        transfers: what was measured.
    """

    table: TransferTable
    machine: Machine
    keep: Callable[[Source | Recipe], EncoderInfo]
    dry_run: bool
    transfers: Transfers = field(init=False)
    _sources: dict[str, Source | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.transfers = find_kept(Transfers, self.table.file_name, folder=self.machine.runs_root) or Transfers()

    def select(self, asked: Sequence[str]) -> list[str]:
        """Return the keys of the rows that `--rows` asks for; all where it is not given.

        Raises:
            UserError: there is no such row.
        """
        return select_keys(asked, keys=[row.key for row in self.table.file.row], table=self.table.name)

    def give(self, weights: Sequence[str]) -> None:
        """Let rows be measured with the encoders that --weights names (ROW=RUN or ROW=FILE), from now on.

        Raises:
            UserError: there is no such row or encoder.
        """
        given = {}
        for each in weights:
            row, _, ref = each.partition("=")
            if not ref:
                raise UserError(f"--weights {each}: name a row and its encoder, as --weights obow=RUN or obow=FILE.")
            (key,) = self.select([row])
            source = find_source(ref, runs_root=self.machine.runs_root, tracking_uri=self.machine.tracking_uri)
            is_here = source.folder is not None and source.folder.path.parent.resolve() == self.machine.runs_root.resolve()
            info = source.info if is_here and source.info is not None else self.keep(source)
            given[key] = Given(name=source.name, run_id=source.name if is_here else None, weights_hash=info.identity)
            if self.dry_run:  # it is nowhere else
                self._sources[key] = replace(source, info=info)
        if given:
            self._change(lambda there: there.model_copy(update={"given": {**there.given, **given}}))

    def due(self, rows: Collection[str], *, seeds: int) -> list[Due]:
        """Return what is asked of the encoders of rows and was not measured yet; trainings are asked for with so many seeds."""
        found = []
        for row in self.table.file.row:
            source = self.source(row) if row.key in rows else None
            if source is None or source.info is None:
                continue
            evaluation = source.folder.info.recipe.evaluation if source.folder is not None else Evaluation()
            settings = evaluation.voc07_svm.model_dump(mode="json")
            ask = partial(question, self.table, weights_hash=source.info.identity, settings=settings)
            for protocol in self.table.protocols:
                is_training = protocol in TRAININGS
                for seed in range(seeds if is_training else 1):
                    asked = ask(protocol=protocol, seed=seed)
                    answer = self.transfers.answer(asked)
                    if answer is None:
                        name = f"{protocol} of {row.label}" + (f", seed {seed}" if is_training else "")
                        found.append(Due(row, protocol, seed, source, source.info, asked, name))
                    elif answer.row != row.key:  # the same encoder in another row
                        self.record(answer.model_copy(update={"row": row.key}))
        return found

    def refusals(self, due: Collection[Due]) -> dict[str, str]:
        """Return the protocols that cannot be measured here, and why."""
        protocols = {each.protocol for each in due}
        refused = {}
        for protocol in (each for each in self.table.protocols if each in protocols):
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

    def overview(self, rows: Collection[str], *, due: Collection[Due], refused: Collection[str]) -> list[list[str]]:
        """Return, under row, encoder and the table's protocols, what of rows is measured, and what is to be."""
        lines = []
        for row in (each for each in self.table.file.row if each.key in rows):
            source = self.source(row)
            if source is None:
                lines.append([row.key, text.ABSENT, *[""] * len(self.table.protocols)])
                continue
            done = [entry.protocol for entry in self.transfers.of_row(row.key)]
            left = [each.protocol for each in due if each.row.key == row.key]
            states = [
                f"{done.count(each)} done" if each not in left else "left out" if each in refused else f"{left.count(each)} to do"
                for each in self.table.protocols
            ]
            lines.append([row.key, _shown(source), *states])
        return lines

    def measure(self, due: Sequence[Due], *, measured: Callable[[Due], Outcome], say: Callable[[str], None]) -> int:
        """Measure, and keep what was measured each time; return 0, 1 when something failed, or the exit code of a signal."""
        failed = []
        for number, each in enumerate(due, start=1):
            say(f"Measuring {each.name} ({number} of {len(due)}).")
            try:
                outcome = measured(each)
            except UserError as error:
                outcome = Outcome(1)
                say(f"{each.name} failed: {error}")
            if outcome.code >= 128:
                return outcome.code
            if outcome.result is None:
                failed.append(each.name)
            else:
                self.record(self._entry(each, result=outcome.result, run_id=outcome.run_id))
        if failed:
            say(f"Not measured: {'; '.join(failed)}.")
        return int(bool(failed))

    def record(self, entry: Entry) -> None:
        """Keep what was measured, beside what other processes have kept meanwhile."""
        self._change(lambda there: there.with_entry(entry))

    def source(self, row: TransferRow) -> Source | None:
        """Return a row's encoder: the one it was given, else that of a finished run of its recipe; None where there is none."""
        if row.key not in self._sources:
            self._sources[row.key] = self._find(row)
        return self._sources[row.key]

    # ------------------------------------------------------------------------------------------------------------ helpers

    def _find(self, row: TransferRow) -> Source | None:
        runs_root = self.machine.runs_root
        if (given := self.transfers.given.get(row.key)) is not None:
            return find_source(given.run_id or str(kept_path(given.weights_hash, runs_root=runs_root)), runs_root=runs_root)
        if (loaded := self.table.pretraining.get(row.key)) is None:
            return None
        if row.untrained:
            info = self.keep(loaded.recipe)
            path = kept_path(info.identity, runs_root=runs_root)
            return Source(str(path), path=path, info=info)
        keys = loaded.recipe.fingerprints(seeds=sorted({run.info.seed for run in self._runs.values()})).values()
        runs = (self._runs[key] for key in keys if key in self._runs)
        run = next((run for run in runs if (run.path / ENCODER_FILE).is_file()), None)
        return None if run is None else find_source(str(run.path), runs_root=runs_root)

    def _entry(self, due: Due, *, result: Mapping[str, Any], run_id: str | None) -> Entry:
        given = self.transfers.given.get(due.row.key)
        return Entry(
            row=due.row.key,
            protocol=due.protocol,
            seed=due.seed,
            question=due.question,
            encoder=given.name if given is not None else _shown(due.source),
            weights_hash=due.info.identity,
            dataset=str(result.get("details", {}).get("dataset", "")),
            basis=f"{result['protocol']} v{result['version']} {result['protocol_hash']} {result['data_hash']}",
            run_id=run_id,
            measurements=tuple(result["measurements"]),
        )

    def _change(self, change: Callable[[Transfers], Transfers]) -> None:
        """Change what is kept, which another process may have changed since; for a dry run, what is known here."""
        if self.dry_run:
            self.transfers = change(self.transfers)
        else:
            path = self.machine.runs_root / KEPT / self.table.file_name
            self.transfers = change_kept(Transfers, path, lambda there: change(there or self.transfers))

    @cached_property
    def _runs(self) -> dict[str, RunSummary]:
        return store_runs(self.machine.runs_root)


def _shown(source: Source) -> str:
    return source.name if source.folder is not None or source.info is None else source.info.source
