"""`python -m tests.chaos`: inject faults, judge, print a table; typed again, it goes on where it was."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from tests import optimized

optimized.enter()  # before the package is imported

from tests.chaos import forks, ledger
from tests.chaos.kinds import KINDS
from tests.chaos.ledger import Case, Outcome
from tests.chaos.stage import Stage, prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when everything survived and nothing was lost or doubled."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="inject at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the dice: which faults, and when")
    parser.add_argument("--only", choices=sorted(KINDS), help="one case of one kind; --seed is then the case's own")
    parser.add_argument("--kinds", help="only these kinds, separated by commas")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="cases at a time")
    parser.add_argument("--work", type=Path, help="folder to work in; kept, and continued by the same command")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier command did")
    options = parser.parse_args(argv)
    chosen = {name: kind for name, kind in KINDS.items() if options.kinds is None or name in options.kinds.split(",")}
    lacking = {name: reason for name, kind in chosen.items() if (reason := kind.lacking()) is not None}
    playable = {name: kind for name, kind in chosen.items() if name not in lacking}
    if options.only:
        reason = KINDS[options.only].lacking()
        if reason is not None:
            return _refuse(f"{options.only}: {reason}")
        planned = [(options.only, options.seed, KINDS[options.only].per_case)]
    else:
        planned = ledger.plan(playable, faults=options.faults, seed=options.seed)
    work = options.work or Path(tempfile.gettempdir()) / f"obowlab-chaos-{os.getuid()}"
    state = work / (f"only-{options.only}.jsonl" if options.only else f"faults-{options.faults}-{options.seed}.jsonl")
    if options.fresh or options.only:
        state.unlink(missing_ok=True)
    _say(f"working in {work}")
    forks.import_everything()
    stage = prepare(work / "stage", say=_say)
    done = {(one.kind, one.seed): one for one in ledger.read(state)}
    left = [case for case in planned if case[:2] not in done]
    if done:
        _say(f"going on: {len(done)} of {len(planned)} cases are done")
    runner = _Runner(stage=stage, work=work, state=state, total=len(planned), done=len(planned) - len(left))
    try:
        runner.play(left, jobs=options.jobs)
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        return 130
    outcomes = [one for one in ledger.read(state) if (one.kind, one.seed) in {case[:2] for case in planned}]
    _print(outcomes, lacking=lacking)
    state.unlink()
    return 1 if any(one.failed for one in outcomes) else 0


@dataclass
class _Runner:
    """Plays cases in forks, a few at a time."""

    stage: Stage
    work: Path
    state: Path
    total: int
    done: int

    def play(self, cases: list[tuple[str, int, int]], *, jobs: int) -> None:
        """Play all cases; Ctrl-C kills what is under way."""
        waiting = list(cases)
        running: dict[Connection, tuple[int, tuple[str, int, int]]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    case = waiting.pop(0)
                    pipe, pid = self._start(case)
                    running[pipe] = (pid, case)
                for pipe in wait(list(running)):
                    assert isinstance(pipe, Connection)
                    pid, case = running.pop(pipe)
                    self._note(pipe, pid, case)
        finally:
            for pid, _ in running.values():
                for number in forks.process_tree(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)

    def _start(self, case: tuple[str, int, int]) -> tuple[Connection, int]:
        name, seed, size = case
        reader, writer = Pipe(duplex=False)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            reader.close()
            place = self.work / "cases" / f"{name}-{seed}"
            remove(place)
            place.mkdir(parents=True)
            played = ledger.play(KINDS[name], Case(kind=name, seed=seed, place=place, stage=self.stage, num_faults=size))
            if not played.failed:
                remove(place)
            writer.send(played)
            writer.close()
            os._exit(0)
        writer.close()
        return reader, pid

    def _note(self, pipe: Connection, pid: int, case: tuple[str, int, int]) -> None:
        try:
            outcome: Outcome = pipe.recv()
        except EOFError:
            outcome = Outcome(case[0], case[1], 0, 0, 0, 0, 0, 0.0, problem="the case itself died")
        os.waitpid(pid, 0)
        ledger.append(self.state, outcome)
        self.done += 1
        verdict = "FAILED" if outcome.failed else "ok"
        counted = f"{outcome.examples} examples" if outcome.examples else f"{outcome.injected} faults"
        _say(f"{self.done}/{self.total} {outcome.kind} {outcome.seed}: {counted}, {outcome.elapsed_s:.1f} s, {verdict}")
        if outcome.failed:
            _say(outcome.problem or "points lost or doubled")


def remove(place: Path) -> None:
    """Remove a case's folder."""
    shutil.rmtree(place, ignore_errors=True)


def _print(outcomes: list[Outcome], *, lacking: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, reason in lacking.items():
        print(f"not played: {KINDS[name].title} ({reason})")
    table = Table(*ledger.HEADINGS)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in ledger.rows(KINDS, outcomes):
        if row[0] == "total":
            table.add_section()
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 150
    Console(width=width, highlight=False).print(table)
    for text in ledger.failures(outcomes):
        print(text)


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def _refuse(text: str) -> int:
    print(f"Error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
