"""Start a run on this machine, supervise it, and mirror it to MLflow meanwhile.

The launcher holds the run's lock and its GPUs, starts the compute process (or torchrun's group of them), starts it again from the
last checkpoint when it is killed, passes signals on and mirrors the run folder. It trains nothing and imports no torch: whatever
happens to it, the run folder stays intact, and whatever happens to the compute process, the folder's state says so.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from obowlab.config import Loaded, Machine
from obowlab.files.sharing import is_others
from obowlab.launch.compute_command import PATIENCE_VARIABLE, CommandFactory, compute_command, environment_of, threads_of
from obowlab.launch.cost import Cost, refuse_without_room, write_actual_cost, write_quote
from obowlab.launch.gpu_leases import check_gpus, leased
from obowlab.launch.nodes import POLL_S, RENDEZVOUS_VARIABLE, Rendezvous, Round
from obowlab.launch.preflight import to_measure
from obowlab.launch.processes import StopSignals, kill_family, shell_code, start
from obowlab.launch.system import SystemSampler, count_gpus
from obowlab.runs.folder import RunFolder, refuse_others
from obowlab.runs.info import ENCODER_FILE, TRAINED, Status
from obowlab.runs.listing import has_run
from obowlab.runs.locks import Lock, RunTakenError
from obowlab.runs.metric_log import MetricLog
from obowlab.runs.names import run_id_of
from obowlab.runs.trash import put_aside
from obowlab.signals import STOPPING
from obowlab.tracking.mirror import Mirror
from obowlab.tracking.server import shown_uri, store_uri

TERMINAL = "terminal.txt"
MIRROR_EVERY_S = 3.0
SAMPLE_EVERY_S = 15.0
MIRROR_TIMEOUT_S = 10.0
FIRST_SYNC_TIMEOUT_S = 60.0
"""The first sync imports mlflow and may have to create the store."""
FINISHED_SYNC_TIMEOUT_S = 60.0
"""The last sync of a finished run has a model to send."""
STOPPED_SYNC_TIMEOUT_S = 15.0
"""The last sync of a run that was stopped keeps its user waiting for the prompt."""
MAX_RESTARTS = 3
"""In a row without any progress, after the compute process or one of its group was killed."""

StartCompute = Callable[[Mapping[str, str]], "subprocess.Popen[bytes]"]
"""Starts the compute process with further environment variables."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What `launch` would do.

    Attributes:
        run_id: the run's name.
        path: its folder.
        action: `new`, `resume`, `fresh` (the present folder is put aside), `measure` (trained, and evaluated otherwise) or
            `finished` (nothing to do).
        status: the state of the present folder; None for a new run.
        step: optimiser updates done.
        total_steps: of the whole training, once known.
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
        """Return the plan as text, one fact a line."""
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
        UserError: the recipe's name or the tracking address is refused.
    """
    run_id = run_id_of(loaded, seed=seed)
    path = machine.runs_root / run_id
    state = RunFolder.open(path).current_state() if has_run(path) else None
    if state is None:
        action = "new"
    elif fresh:
        action = "fresh"
    else:
        missing = state.status == "finished" and to_measure(loaded.recipe, folder=RunFolder.open(path), machine=machine)
        action = "resume" if state.status != "finished" else "measure" if missing else "finished"
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
    """Train a run to its end, from its last checkpoint if it has one, evaluate it, and return the exit code.

    It is measured as the recipe says now, whatever it said when the run began; of a finished run only what is missing.

    The first SIGINT or SIGTERM is passed on, and the run saves itself and stops; a second one kills it. A compute process that is
    killed otherwise, or a group of which one dies, is started again from the last checkpoint.

    Args:
        loaded: the recipe.
        seed: of weights and data.
        machine: where and with what.
        fresh: put an existing run folder aside (into RUNS_ROOT/.trash) and start again.
        progress: whether the compute process shows its progress on the terminal.
        command: makes the command line of the compute process.
        signals: lets another thread stop the run.
        environment: further variables for the compute process.
        quiet: redirect the output of the compute process to `terminal.txt` of the run folder; for several runs side by side.
        cost: what a new run is expected to cost.

    Returns:
        0 when the run is finished, 2 for a mistake the user can fix, 128 + signal when it was stopped or killed, else the
        compute process's own code or 1.

    Raises:
        RunTakenError: another process trains this run.
        UserError: too few GPUs, no room on the disk, a tracking address MLflow cannot write to.
    """
    check_gpus(machine)
    machine = machine.model_copy(update={"threads": threads_of(machine)})
    store_uri(machine.tracking_uri, runs_root=machine.runs_root)  # refuses a wrong address before anything is touched
    path = machine.runs_root / run_id_of(loaded, seed=seed)
    if fresh and has_run(path):
        put_aside(RunFolder.open(path))
    if cost is not None and not has_run(path):
        refuse_without_room(cost, run=path.name, runs_root=machine.runs_root)
    folder = RunFolder.create(loaded, seed=seed, runs_root=machine.runs_root)
    if is_others(path):
        if folder.state.status == "finished" and not to_measure(loaded.recipe, folder=folder, machine=machine):
            return 0
        refuse_others(path)
    if cost is not None:
        write_quote(folder, cost=cost, procs=machine.procs)
    mirror = Mirror(folder, tracking_uri=machine.tracking_uri)
    code = 0
    signals = signals or StopSignals(notice=f"Stopping: {folder.run_id} saves itself; a second Ctrl-C kills it.")
    if folder.state.status != "finished" or to_measure(loaded.recipe, folder=folder, machine=machine):
        with (
            signals.listening(),
            _held(folder, signals=signals) as lock,
            leased(machine, given_up=lambda: bool(signals.received)) as gpus,
        ):
            inherited = {**environment_of(machine, token=lock.token, progress=progress), **gpus, **(environment or {})}
            output = path / TERMINAL if quiet else None

            def start_compute(variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
                child = start(command(path, machine), environment={**inherited, **variables}, output=output)
                signals.watch(child)
                return child

            folder.metric_log("system").close()  # refuses a damaged file here, not in the thread that writes to it
            folder.write_machine(machine)
            folder.set_evaluation(loaded.recipe.evaluation)
            returncode = _train(folder, machine=machine, mirror=mirror, start_compute=start_compute, lock=lock, signals=signals)
            code = _conclude(
                folder, returncode=returncode, signals=signals, place=f"in {output}" if output else "on the terminal"
            )
        if code == 0:
            write_actual_cost(folder)
    report = mirror.sync(timeout_s=FINISHED_SYNC_TIMEOUT_S if code == 0 else STOPPED_SYNC_TIMEOUT_S)
    if report.error is not None:
        missing = f"{report.pending} values, files or facts of this run"
        logger.warning("MLflow lacks %s (%s); 'obowlab runs sync' sends them.", missing, report.error)
    return code


# ------------------------------------------------------------------------------------------------------------- training


@contextmanager
def _held(folder: RunFolder, *, signals: StopSignals) -> Iterator[Lock]:
    """Hold the run; with patience (`PATIENCE_VARIABLE`), wait for the process that has it."""
    deadline = time.monotonic() + float(os.environ.get(PATIENCE_VARIABLE) or 0)
    waiting = False
    while True:
        try:
            with folder.lock() as lock:
                yield lock
            return
        except RunTakenError as error:
            if time.monotonic() >= deadline or signals.received:
                raise
            if not waiting:
                logger.info("%s Waiting.", error)
            waiting = True
        time.sleep(POLL_S)


def _train(
    folder: RunFolder, *, machine: Machine, mirror: Mirror, start_compute: StartCompute, lock: Lock, signals: StopSignals
) -> int:
    """Start the compute process, and again whenever it is killed, and return its last exit code.

    That ends when the run is finished, stopped or failed, or was killed `MAX_RESTARTS` times without progress.
    """
    rendezvous = Rendezvous(Path(os.environ[RENDEZVOUS_VARIABLE])) if machine.nodes > 1 else None
    if not signals.received:
        folder.set_state(status="running", message="")
    step, restarts = folder.state.step, 0
    while not signals.received:
        current = rendezvous.start_round(folder.path, token=lock.token) if rendezvous else None
        child = start_compute(rendezvous.torchrun_variables(current) if rendezvous and current else {})
        with _watched(folder, mirror, child.pid, gpus=machine.device != "cpu"):
            returncode = _wait(child, rendezvous=rendezvous, current=current)
        if signals.received or not _was_killed(folder, returncode=returncode, alone=machine.procs == 1):
            return returncode
        reached = folder.state.step
        step, restarts = (reached, 1) if reached > step else (step, restarts + 1)
        if restarts > MAX_RESTARTS:
            return returncode
        logger.info("A training process of %s was killed; starting again from the last checkpoint.", folder.run_id)
    return -signals.received[0]


def _wait(child: subprocess.Popen[bytes], *, rendezvous: Rendezvous | None, current: Round | None) -> int:
    """Wait for this node's processes; kill them when those of another node have died."""
    if rendezvous is None or current is None:
        return child.wait()
    while True:
        try:
            return child.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if rendezvous.has_failed(current):
                kill_family(child)


def _was_killed(folder: RunFolder, *, returncode: int, alone: bool) -> bool:
    """Return whether the compute process, or one of its group, was killed rather than ended by itself."""
    if returncode == 0 or -returncode in STOPPING or folder.state.status in (*TRAINED, "failed"):
        return False
    if alone:  # with an exit code of its own it met an error, which would come again
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
        # Monotonic from here on, offset so that a resumed run continues the time axis.
        created = time.monotonic() - max(time.time() - folder.info.created_at, log.last_step + 1)
        while not ended.wait(MIRROR_EVERY_S):
            if time.monotonic() - sampled_at >= sample_interval_s(time.monotonic() - created):
                sampled_at = time.monotonic()
                _sample(log, sampler, seconds=int(sampled_at - created))
            report = mirror.sync_when_due(timeout_s=timeout_s)
            timeout_s = MIRROR_TIMEOUT_S
            if report is not None and report.error is not None and not warned:
                warned = True
                logger.warning(
                    "MLflow does not follow (%s); training continues, and what is missing is sent later.", report.error
                )
            elif report is not None and report.error is None:
                warned = False


def sample_interval_s(elapsed_s: float) -> float:
    """Return the seconds between two samples of the machine: more in a long run, so that MLflow has about 2000 points of each."""
    return max(SAMPLE_EVERY_S, elapsed_s / 400)


def _sample(log: MetricLog, sampler: SystemSampler, *, seconds: int) -> None:
    try:
        log.append(seconds, sampler.sample())
    except OSError as error:
        logger.warning("The system metrics cannot be written to %s: %s.", log.path, error.strerror)


def _conclude(folder: RunFolder, *, returncode: int, signals: StopSignals, place: str) -> int:
    """Write the final state if the compute process could not, and return the launcher's exit code; its output is at `place`."""
    code = _settle(folder, returncode=returncode, asked=signals.received, place=place)
    if signals.reason and folder.state.status == "interrupted":
        folder.set_state(message=signals.reason)
    return code


def _settle(folder: RunFolder, *, returncode: int, asked: list[int], place: str) -> int:
    state = folder.state
    if state.status == "finished":
        return 0
    if state.status == "interrupted":
        if asked or returncode == 0:
            return 128 + (asked[0] if asked else signal.SIGTERM)
        return shell_code(returncode)
    if state.status in ("failed", "unevaluated"):
        return shell_code(returncode) if returncode != 0 else 2  # a group of processes ends with 0
    resumes = "the same command resumes from the last checkpoint"
    if asked:
        folder.set_state(status="interrupted", message=f"stopped by {signal.Signals(asked[-1]).name}; {resumes}")
        return 128 + asked[0]
    if -returncode in STOPPING:
        folder.set_state(status="interrupted", message=f"stopped by {signal.Signals(-returncode).name}; {resumes}")
        return shell_code(returncode)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (out of memory?)" if -returncode == signal.SIGKILL else ""
        message = f"the training process was killed by {name}{hint}; {resumes}"
    else:
        message = f"the training process ended with exit code {returncode} before it was done; its last output is {place}"
    trained = (folder.path / ENCODER_FILE).is_file()
    folder.set_state(status="unevaluated" if trained else "failed", message=message)
    logger.error("Run %s %s: %s.", folder.run_id, "is trained, but not evaluated" if trained else "failed", message)
    return shell_code(returncode) or 2  # a group whose state could not be written has said why
