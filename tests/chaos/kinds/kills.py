"""Processes that die: worker, launcher, tracker, one of a group; storms of signals; two commands on one run; clocks that jump."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

from obowlab.runs.folder import RunFolder
from tests.chaos import forks
from tests.chaos.forks import Child
from tests.chaos.judge import BrokenError, ended_well, sentence, settle
from tests.chaos.ledger import Case, Kind
from tests.chaos.stage import TOTAL_STEPS, prepare_group

A_WHOLE_RUN_S = 4.5
"""About how long the small run takes from its start to its end, in seconds; moments are drawn from it."""
STORM = 30


def worker(case: Case) -> None:
    """Kill -9 the training process at random steps, in measuring and in writing the model, again and again."""
    folder = case.stage.new_run(case.place)
    for number in range(case.num_faults):
        child = forks.train(folder.path, place=case.place)
        wanted = min(TOTAL_STEPS, (number + 1) * TOTAL_STEPS // case.num_faults + case.dice.randint(-2, 4))
        _wait_for_step(child, folder, step=wanted)
        time.sleep(case.dice.random() * (0.06 if wanted < TOTAL_STEPS else 2.5))
        _kill(case, child, note=f"at step {folder.state.step}")
        child.wait()
    settle(case, folder, expected=case.stage.reference())


def tracker(case: Case) -> None:
    """Kill -9 the process that sends a run to MLflow while the run goes on."""
    folder = case.stage.new_run(case.place)
    training = forks.train(folder.path, place=case.place)
    for _ in range(case.num_faults):
        sync = forks.obowlab(["runs", "sync", "--runs-root", str(folder.path.parent)], place=case.place, name="sync")
        time.sleep(0.15 + case.dice.random() * 0.8)
        _kill(case, sync, note=f"after {time.monotonic() - sync.began:.2f} s")
        sync.wait()
    ended_well(training)
    settle(case, folder, expected=case.stage.reference())


def launcher(case: Case) -> None:
    """Kill -9 the launcher, what it started, or both, at random moments; the same command is typed again at once."""
    folder = case.stage.new_run(case.place)
    for _ in range(case.num_faults):
        command = _start(case, folder)
        time.sleep(case.dice.uniform(0.1, 1.6 * A_WHOLE_RUN_S))
        victim = case.dice.choice(("launcher", "training", "both"))
        below = [pid for pid in command.family() if pid != command.pid]
        if victim == "training":
            hit = _kill_pids(below)
            case.injected += hit
            command.wait()
        elif victim == "launcher":
            _kill(case, command, note="launcher")
        else:
            case.injected += command.kill_family()
    _finish(case, folder)


def storm(case: Case) -> None:
    """Send tens of SIGTERM within a second to the launcher, to its group or to the training process; to the launcher SIGINT too.

    The training process is in a session of its own, so that Ctrl-C never reaches it by itself; and Python, in the first hundredth
    of a second of its life, answers SIGINT with a trace that no program can prevent.
    """
    folder = case.stage.new_run(case.place)
    for _ in range(case.num_faults):
        command = _start(case, folder)
        time.sleep(case.dice.uniform(0.2, 1.4 * A_WHOLE_RUN_S))
        where = case.dice.choice(("launcher", "group", "training", "all"))
        sent = 0
        for _ in range(STORM):
            targets = {
                "launcher": [command.pid],
                "group": [-command.pid],
                "training": command.family()[1:],
                "all": command.family(),
            }[where]
            if command.poll() is not None:
                break
            for pid in targets:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, case.dice.choice((signal.SIGTERM, signal.SIGINT)) if abs(pid) == command.pid else signal.SIGTERM)
                    sent += 1
            time.sleep(case.dice.random() * 0.02)
        if sent:
            case.fault(f"{sent} signals to {where}")
        code = command.wait()
        if "Traceback" in command.said():
            raise BrokenError(f"exit code {code} and a trace: {command.said()[-500:]!r}")
    _finish(case, folder)


def together(case: Case) -> None:
    """Type the same command twice within milliseconds: one trains, the other says so in a sentence."""
    folder = case.stage.new_run(case.place)
    for number in range(case.num_faults):
        pair = [
            _start(case, folder, name=f"duplicate-{number}") for number in range(2) if not time.sleep(case.dice.random() * 0.02)
        ]
        last = number == case.num_faults - 1
        refused = _first_to_end(pair)
        winner = pair[1] if refused is pair[0] else pair[0]
        case.fault()
        if refused.wait() == 0 and folder.state.status == "finished":
            continue  # it was finished already
        case.sentence(sentence(refused))
        if not last:
            time.sleep(case.dice.random() * A_WHOLE_RUN_S)
            winner.kill_family()
            _wait_until_free(case, folder)
        else:
            ended_well(winner)
    _finish(case, folder)


def group(case: Case) -> None:
    """Kill -9 one rank, the agent that started it, or all of a run of two processes."""
    expected = prepare_group(case.stage)
    folder = case.stage.new_run(case.place, procs=2)
    command = _start(case, folder, procs=2)
    for number in range(case.num_faults):
        _wait_for_step(command, folder, step=(number + 1) * TOTAL_STEPS // (case.num_faults + 1) + case.dice.randint(-3, 3))
        below = command.family()[1:]
        if below:
            case.injected += _kill_pids(case.dice.choice((below[:1], below[-1:], below[1:2])))
        if case.dice.random() < 0.7:  # otherwise its launcher starts the group again
            command.kill_family()
            _wait_until_free(case, folder)
            command = _start(case, folder, procs=2)
    ended_well(command)
    _finish(case, folder, procs=2, expected=expected)


def clock(case: Case) -> None:
    """Let the time of day jump by hours and years in both directions, within and between processes."""
    folder = case.stage.new_run(case.place)
    for number in range(case.num_faults):
        seed = case.dice.random()
        child = forks.train(folder.path, place=case.place, first=lambda seed=seed: _jump(seed))  # type: ignore[misc]
        sync = forks.fork(
            lambda seed=seed: _jump(-seed) or forks.main(["runs", "sync", "--runs-root", str(folder.path.parent)]),  # type: ignore[misc]
            place=case.place,
            name="sync",
        )
        case.fault(f"jumps of seed {seed:.3f}")
        if number < case.num_faults - 1:
            _wait_for_step(child, folder, step=(number + 1) * TOTAL_STEPS // case.num_faults)
            child.send(case.dice.choice((signal.SIGKILL, signal.SIGTERM)))
            child.wait()
        else:
            ended_well(child)
        ended_well(sync)
    settle(case, folder, expected=case.stage.reference())


def _jump(seed: float) -> None:
    dice, real = random.Random(seed), time.time
    offset = dice.uniform(-1e8, 1e8)

    def now() -> float:
        nonlocal offset
        if dice.random() < 0.05:
            offset += dice.choice((-1, 1)) * 10 ** dice.uniform(0, 8)
        return max(1.0, real() + offset)

    time.time = now


# --------------------------------------------------------------------------------------------------------------- helpers


def _start(case: Case, folder: RunFolder, *, procs: int = 1, name: str = "run") -> Child:
    return forks.obowlab(case.stage.words(case.place, procs=procs), place=case.place, name=name)


def _finish(case: Case, folder: RunFolder, *, procs: int = 1, expected: RunFolder | None = None) -> None:
    """Type the command until it says that the run is finished, and judge."""
    for _ in range(8):
        command = _start(case, folder, procs=procs)
        if ended_well(command, codes=(0, 2)) == 0:
            break
        time.sleep(0.3)  # a process that was left behind is still saving
    else:
        raise BrokenError(f"the run does not go on: {command.said()[-500:]!r}")
    settle(case, folder, expected=expected or case.stage.reference())


def _wait_for_step(child: Child, folder: RunFolder, *, step: int) -> None:
    while child.poll() is None and folder.state.step < step:
        time.sleep(0.004)


def _wait_until_free(case: Case, folder: RunFolder) -> None:
    from obowlab.runs.locks import is_locked

    end = time.monotonic() + 30
    while is_locked(folder.path):
        if time.monotonic() > end:
            raise BrokenError("the run stays locked although its launcher is dead")
        time.sleep(0.02)


def _first_to_end(pair: list[Child]) -> Child:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for child in pair:
            if child.poll() is not None:
                return child
        time.sleep(0.01)
    for child in pair:
        child.kill_family()
    raise BrokenError("both commands went on for a minute")


def _kill(case: Case, child: Child, *, note: str) -> None:
    if child.send(signal.SIGKILL):
        case.fault(f"killed {note}")


def _kill_pids(pids: list[int]) -> int:
    hit = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            hit = 1
    return hit


KINDS = {
    "worker": Kind("kill -9 of the training process", worker, share=160, per_case=8),
    "tracker": Kind("kill -9 of the process that sends to MLflow", tracker, share=80, per_case=6),
    "launcher": Kind("kill -9 of the launcher, of what it started, of both", launcher, share=60, per_case=4),
    "storm": Kind("storms of SIGTERM and SIGINT", storm, share=40, per_case=4),
    "together": Kind("two commands on one run at once", together, share=40, per_case=5),
    "group": Kind("kill -9 in a group of two processes", group, share=15, per_case=3),
    "clock": Kind("clock jumps", clock, share=40, per_case=4),
}
