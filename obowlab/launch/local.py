"""Start a run on this machine, watch over it, and show it to MLflow meanwhile.

The launcher holds the run's lock and its GPUs, starts the compute process (or torchrun's group of them), starts it again from the
last checkpoint when it is killed, passes signals on and mirrors the run folder. It trains nothing and imports no torch: whatever
happens to it, the run folder stays whole, and whatever happens to the compute process, the folder's state says so.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from obowlab.config import Loaded, Machine
from obowlab.launch.compute_command import PATIENCE_VARIABLE, CommandFactory, compute_command, environment_of, threads_of
from obowlab.launch.cost import Cost, quote, settle
from obowlab.launch.gpu_leases import check_gpus, leased
from obowlab.launch.nodes import MEETING_VARIABLE, POLL_S, Call, Meeting
from obowlab.launch.processes import STOPPING, StopSignals, kill_family, shell_code, start
from obowlab.launch.system import SystemSampler, count_gpus
from obowlab.runs.folder import Lock, RunFolder, RunTakenError, run_id_of
from obowlab.runs.info import Status
from obowlab.runs.metric_log import MetricLog
from obowlab.tracking.mirror import Mirror, SyncReport
from obowlab.tracking.server import shown_uri, store_uri

TRASH = ".trash"
TERMINAL = "terminal.txt"
MIRROR_EVERY_S = 3.0
SAMPLE_EVERY_S = 15.0
MIRROR_TIMEOUT_S = 10.0
FIRST_SYNC_TIMEOUT_S = 60.0
"""The first sync imports mlflow and may have to create the store."""
LAST_SYNC_TIMEOUT_S = {True: 60.0, False: 15.0}
"""After a finished run, which has a model to send; after one that was stopped, whose user waits for the prompt."""
MAX_RESTARTS = 3
"""In a row without any progress, after the compute process or one of its group was killed."""


@dataclass(frozen=True)
class Plan:
    """What `launch` would do.

    Attributes:
        run_id: the run's name.
        path: its folder.
        action: `new`, `resume`, `fresh` (the present folder is put aside) or `finished` (nothing to train).
        status: the state of the present folder; None for a new run.
        step: how far it is.
        total_steps: how far it goes, once known.
        threads: CPU threads of each process.
        command: what is started.
        tracking_uri: where the run is shown, without passwords.
    """

    run_id: str
    path: Path
    action: str
    status: Status | None
    step: int
    total_steps: int | None
    threads: int
    command: tuple[str, ...]
    tracking_uri: str

    def lines(self) -> list[str]:
        """Return the plan in words, one fact a line."""
        progress = f", step {self.step} of {self.total_steps or '?'}" if self.status is not None else ""
        return [
            f"run: {self.run_id}",
            f"folder: {self.path}",
            f"action: {self.action}{f' ({self.status}{progress})' if self.status is not None else ''}",
            f"threads per process: {self.threads}",
            f"command: {shlex.join(self.command)}",
            f"tracking: {self.tracking_uri}",
        ]


def plan(loaded: Loaded, *, seed: int, machine: Machine, fresh: bool, command: CommandFactory = compute_command) -> Plan:
    """Return what `launch` would do with the same arguments; changes nothing.

    Raises:
        UserError: as `launch`.
    """
    if machine.launcher == "local":
        check_gpus(machine)
    run_id = run_id_of(loaded, seed=seed)
    path = machine.runs_root / run_id
    state = RunFolder.open(path).current_state() if (path / "run.json").is_file() else None
    if state is None:
        action = "new"
    elif fresh:
        action = "fresh"
    else:
        action = "finished" if state.status == "finished" else "resume"
    return Plan(
        run_id=run_id,
        path=path,
        action=action,
        status=state.status if state else None,
        step=state.step if state else 0,
        total_steps=state.total_steps if state else None,
        threads=threads_of(machine),
        command=tuple(command(path, machine)),
        tracking_uri=shown_uri(store_uri(machine.tracking_uri, runs_root=machine.runs_root)),
    )


def launch(
    loaded: Loaded,
    *,
    seed: int,
    machine: Machine,
    fresh: bool,
    progress: bool,
    command: CommandFactory = compute_command,
    signals: StopSignals | None = None,
    environment: Mapping[str, str] | None = None,
    quiet: bool = False,
    cost: Cost | None = None,
) -> int:
    """Carry out a run to its end, from wherever it stands, and return the exit code.

    The first SIGINT or SIGTERM is passed on, and the run saves itself and stops; a second one kills it. A compute process that is
    killed otherwise, or a group of which one dies, is started again from the last checkpoint.

    Args:
        loaded: the recipe.
        seed: of weights and data.
        machine: where and with what.
        fresh: put an existing run folder aside (into RUNS_ROOT/.trash) and begin again.
        progress: whether the compute process shows its progress on the terminal.
        command: makes the command line of the compute process.
        signals: lets another thread stop the run.
        environment: further variables for the compute process.
        quiet: put what the compute process prints into `terminal.txt` of the run folder; for several runs side by side.
        cost: what a new run is expected to cost.

    Returns:
        0 when the run is finished, 2 for a mistake the user can mend, 128 + signal when it was stopped or killed, else the
        compute process's own code or 1.

    Raises:
        RunTakenError: another process trains this run.
        UserError: too few GPUs, a tracking address MLflow cannot write to.
    """
    check_gpus(machine)
    machine = machine.model_copy(update={"threads": threads_of(machine)})
    store_uri(machine.tracking_uri, runs_root=machine.runs_root)  # complains before anything is touched
    path = machine.runs_root / run_id_of(loaded, seed=seed)
    if fresh and (path / "run.json").is_file():
        put_aside(RunFolder.open(path))
    folder = RunFolder.create(loaded, seed=seed, runs_root=machine.runs_root)
    if cost is not None:
        quote(folder, cost=cost, procs=machine.procs)
    mirror = Mirror(folder, tracking_uri=machine.tracking_uri)
    code = 0
    signals = signals or StopSignals()
    if folder.state.status != "finished":
        with (
            signals.listening(),
            _locked(folder, signals=signals) as lock,
            leased(machine, say=_say, given_up=lambda: bool(signals.received)) as gpus,
        ):
            code = _carry_out(
                folder,
                machine=machine,
                mirror=mirror,
                command=command(path, machine),
                environment={**environment_of(machine, token=lock.token, progress=progress), **gpus, **(environment or {})},
                lock=lock,
                output=path / TERMINAL if quiet else None,
                signals=signals,
            )
        if code == 0:
            settle(folder)
    _say_pending(mirror.sync(timeout_s=LAST_SYNC_TIMEOUT_S[code == 0]))
    return code


def put_aside(folder: RunFolder) -> Path:
    """Move a run folder into RUNS_ROOT/.trash and return where it lies; nothing is deleted.

    Raises:
        UserError: another process trains this run.
    """
    trash = folder.path.parent / TRASH
    trash.mkdir(exist_ok=True)
    with folder.lock():
        target = trash / f"{folder.run_id}-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**6:06d}"
        folder.path.rename(target)
    return target


# ------------------------------------------------------------------------------------------------------------ one attempt


@contextmanager
def _locked(folder: RunFolder, *, signals: StopSignals) -> Iterator[Lock]:
    """Hold the run; with patience, wait for whoever has it."""
    deadline = time.monotonic() + float(os.environ.get(PATIENCE_VARIABLE) or 0)
    told = False
    while True:
        try:
            with folder.lock() as lock:
                yield lock
            return
        except RunTakenError as error:
            if time.monotonic() >= deadline or signals.received:
                raise
            if not told:
                _say(f"{error} Waiting.")
            told = True
        time.sleep(POLL_S)


def _carry_out(
    folder: RunFolder,
    *,
    machine: Machine,
    mirror: Mirror,
    command: list[str],
    environment: Mapping[str, str],
    lock: Lock,
    output: Path | None,
    signals: StopSignals,
) -> int:
    """Start the compute process, and again whenever it is killed, until the run has ended in one way or another."""
    folder.metric_log("system").close()  # complains of a damaged file here, not in the thread that writes to it
    folder.write_machine(machine)
    if not signals.received:
        folder.set_state(status="running", message="")
    meeting = Meeting(Path(os.environ[MEETING_VARIABLE])) if machine.nodes > 1 else None
    restarts, step = 0, folder.state.step
    while not signals.received:
        call = meeting.call(folder.path, token=lock.token) if meeting else None
        place = meeting.rendezvous(call) if meeting and call else {}
        child = start(command, environment={**environment, **place}, output=output)
        signals.watch(child)
        with _watched(folder, mirror, child.pid, gpus=machine.device != "cpu"):
            returncode = _wait(child, meeting=meeting, call=call)
        if not _was_killed(folder, returncode=returncode, alone=machine.procs == 1) or signals.received:
            break
        state = folder.state
        restarts, step = (1, state.step) if state.step > step else (restarts + 1, step)
        if restarts > MAX_RESTARTS:
            break
        _say(f"A training process of {folder.run_id} was killed; starting again from the last checkpoint.")
    else:
        returncode = -signals.received[0]
    code = _conclude(folder, returncode=returncode, asked=signals.received, words=f"in {output}" if output else "on the terminal")
    if signals.reason and folder.state.status == "interrupted":
        folder.set_state(message=signals.reason)
    return code


def _wait(child: subprocess.Popen[bytes], *, meeting: Meeting | None, call: Call | None) -> int:
    """Wait for this node's processes; end them when those of another node have died."""
    if meeting is None or call is None:
        return child.wait()
    while True:
        try:
            return child.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if meeting.has_failed(call):
                kill_family(child)


def _was_killed(folder: RunFolder, *, returncode: int, alone: bool) -> bool:
    """Tell whether the compute process, or one of its group, died without a say in it."""
    if returncode == 0 or -returncode in STOPPING or folder.state.status in ("finished", "failed"):
        return False
    if alone:  # an exit code of its own is an error that would come again
        return returncode < 0
    return shell_code(returncode) not in [128 + number for number in STOPPING]


@contextmanager
def _watched(folder: RunFolder, mirror: Mirror, pid: int, *, gpus: bool) -> Iterator[None]:
    """Sample the machine and mirror the run meanwhile."""
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, mirror, pid, ended), kwargs={"gpus": gpus}, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
    watcher.join(MIRROR_TIMEOUT_S + 1.0)


def _watch(folder: RunFolder, mirror: Mirror, pid: int, ended: threading.Event, *, gpus: bool) -> None:
    """Sample the machine and mirror the run until the compute process has ended."""
    sampler = SystemSampler(pid, path=folder.path, gpus=gpus and count_gpus() > 0)
    sampled_at = time.monotonic()
    warned = False
    timeout_s = FIRST_SYNC_TIMEOUT_S
    with folder.metric_log("system") as log:
        # From here on by a clock that nobody sets; a resumed run goes on to the right of its past.
        created = time.monotonic() - max(time.time() - folder.info.created_at, log.last_step + 1)
        while not ended.wait(MIRROR_EVERY_S):
            if time.monotonic() - sampled_at >= sample_interval_s(time.monotonic() - created):
                sampled_at = time.monotonic()
                _sample(log, sampler, seconds=int(sampled_at - created))
            report = mirror.sync_when_due(timeout_s=timeout_s)
            timeout_s = MIRROR_TIMEOUT_S
            if report is not None and report.error is not None and not warned:
                warned = True
                _say(f"Warning: MLflow does not follow ({report.error}); training goes on, and what is missing is sent later.")
            elif report is not None and report.error is None:
                warned = False


def sample_interval_s(elapsed_s: float) -> float:
    """Return the seconds between two samples of the machine: more in a long run, so that MLflow has about 2000 points of each."""
    return max(SAMPLE_EVERY_S, elapsed_s / 400)


def _sample(log: MetricLog, sampler: SystemSampler, *, seconds: int) -> None:
    try:
        log.append(seconds, sampler.sample())
    except OSError as error:
        _say(f"Warning: the system metrics cannot be written to {log.path}: {error.strerror}.")


def _conclude(folder: RunFolder, *, returncode: int, asked: list[int], words: str) -> int:
    """Settle the state when the compute process could not, and return the launcher's exit code."""
    state = folder.state
    if state.status == "finished":
        return 0
    if state.status == "interrupted":
        if asked or returncode == 0:
            return 128 + (asked[0] if asked else signal.SIGTERM)
        return shell_code(returncode)
    if state.status == "failed":
        return shell_code(returncode) if returncode != 0 else 2  # a group of processes ends with 0
    goes_on = "the same command goes on from the last checkpoint"
    if asked:
        folder.set_state(status="interrupted", message=f"stopped by {signal.Signals(asked[-1]).name}; {goes_on}")
        return 128 + asked[0]
    if -returncode in STOPPING:
        folder.set_state(status="interrupted", message=f"stopped by {signal.Signals(-returncode).name}; {goes_on}")
        return shell_code(returncode)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (out of memory?)" if -returncode == signal.SIGKILL else ""
        message = f"the training process was killed by {name}{hint}; {goes_on}"
    else:
        message = f"the training process ended with exit code {returncode} before it was done; its last words are {words}"
    folder.set_state(status="failed", message=message)
    _say(f"Run {folder.run_id} failed: {message}.")
    return shell_code(returncode) or 1


# ---------------------------------------------------------------------------------------------------------------- helpers


def _say_pending(report: SyncReport) -> None:
    if report.error is not None:
        missing = f"{report.pending} values, files or facts of this run"
        _say(f"Warning: MLflow lacks {missing} ({report.error}); 'obowlab runs sync' sends them.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
