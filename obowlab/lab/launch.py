"""Start a run on this machine, watch over it, and show it to MLflow meanwhile.

The launcher holds the run's lock, starts the compute process (or torchrun's group of them), passes signals on and mirrors
the run folder. It trains nothing and imports no torch: whatever happens to it, the run folder stays whole, and whatever
happens to the compute process, the folder's state says so.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from obowlab.config import Loaded, Machine
from obowlab.errors import UserError
from obowlab.lab.system import SystemSampler, count_gpus, process_tree
from obowlab.track.folder import LOCK_TOKEN_VARIABLE, Lock, RunFolder, Status, run_id_of
from obowlab.track.journal import MetricLog
from obowlab.track.mirror import Mirror, SyncReport
from obowlab.track.store import shown_uri, store_uri

CommandFactory = Callable[[Path, Machine], list[str]]

NO_PROGRESS_VARIABLE = "OBOWLAB_NO_PROGRESS"
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
"""Of a group of processes of which one died; the new group goes on from the last checkpoint."""
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


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


def compute_command(path: Path, machine: Machine) -> list[str]:
    """Return the command that trains and evaluates the run of a folder, through torchrun for more than one process."""
    launcher: list[str] = []
    if machine.procs > 1:  # --standalone: torchrun finds a free port itself, without a race
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(machine.procs),
            "--max-restarts",
            str(MAX_RESTARTS),
        ]
    return [sys.executable, *launcher, "-m", "obowlab.training", str(path)]


def plan(loaded: Loaded, *, seed: int, machine: Machine, fresh: bool, command: CommandFactory = compute_command) -> Plan:
    """Return what `launch` would do with the same arguments; changes nothing.

    Raises:
        UserError: as `launch`.
    """
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
        threads=_threads(machine),
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
) -> int:
    """Carry out a run to its end, from wherever it stands, and return the exit code.

    The first SIGINT or SIGTERM is passed on, and the run saves itself and stops; a second one kills it.

    Args:
        loaded: the recipe.
        seed: of weights and data.
        machine: where and with what.
        fresh: put an existing run folder aside (into RUNS_ROOT/.trash) and begin again.
        progress: whether the compute process shows its progress on the terminal.
        command: makes the command line of the compute process.
        signals: lets another thread stop the run.
        environment: variables for the compute process, `CUDA_VISIBLE_DEVICES` for instance.
        quiet: put what the compute process prints into `terminal.txt` of the run folder; for several runs side by side.

    Returns:
        0 when the run is finished, 2 for a mistake the user can mend, 128 + signal when it was stopped or killed, else the
        compute process's own code or 1.

    Raises:
        RunTakenError: another process trains this run.
        UserError: too few GPUs, a tracking address MLflow cannot write to.
    """
    check_gpus(machine)
    machine = machine.model_copy(update={"threads": _threads(machine)})
    store_uri(machine.tracking_uri, runs_root=machine.runs_root)  # complains before anything is touched
    path = machine.runs_root / run_id_of(loaded, seed=seed)
    if fresh and (path / "run.json").is_file():
        put_aside(RunFolder.open(path))
    folder = RunFolder.create(loaded, seed=seed, runs_root=machine.runs_root)
    mirror = Mirror(folder, tracking_uri=machine.tracking_uri)
    code = 0
    if folder.state.status != "finished":
        with folder.lock() as lock:
            code = _carry_out(
                folder,
                machine=machine,
                mirror=mirror,
                command=command(path, machine),
                environment={**_environment(machine, lock=lock, progress=progress), **(environment or {})},
                output=path / TERMINAL if quiet else None,
                signals=signals or StopSignals(),
            )
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


@dataclass
class StopSignals:
    """Passes the first stopping signal on to the compute process and kills its whole family at the second.

    Attributes:
        received: what came, in order.
        reason: why the run is stopped, for its state; empty for a plain signal.
        child: the compute process, once there is one.
    """

    received: list[int] = field(default_factory=list)
    reason: str = ""
    child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals of this process for as long as the context lasts; in another thread than the main one, none."""
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """Do now what a signal asked for before there was a process."""
        if self.received and self.child is not None:
            self.child.send_signal(self.received[0])

    def send(self, number: int, *, reason: str = "") -> None:
        """Do as if this signal had come; for threads, which receive none."""
        if not self.received:
            self.reason = reason
        self._receive(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.child is None or self.child.returncode is not None:
            return
        if len(self.received) == 1:
            self.child.send_signal(number)
        else:
            for pid in process_tree(self.child.pid) or [self.child.pid]:
                _kill(pid)


def _carry_out(
    folder: RunFolder,
    *,
    machine: Machine,
    mirror: Mirror,
    command: list[str],
    environment: Mapping[str, str],
    output: Path | None,
    signals: StopSignals,
) -> int:
    folder.write_machine(machine)
    folder.set_state(status="running", message="")
    with signals.listening():
        child = _start(command, environment=environment, output=output)
        signals.child = child
        signals.pass_on()
        watching = threading.Event()
        watcher = threading.Thread(
            target=_watch, args=(folder, mirror, child.pid, watching), kwargs={"gpus": machine.device != "cpu"}, daemon=True
        )
        watcher.start()
        try:
            returncode = child.wait()
        finally:
            watching.set()
    watcher.join(MIRROR_TIMEOUT_S + 1.0)
    code = _conclude(folder, returncode=returncode, asked=signals.received, words=f"in {output}" if output else "on the terminal")
    if signals.reason and folder.state.status == "interrupted":
        folder.set_state(message=signals.reason)
    return code


def _environment(machine: Machine, *, lock: Lock, progress: bool) -> dict[str, str]:
    environment = {
        **os.environ,
        LOCK_TOKEN_VARIABLE: lock.token,
        "OMP_NUM_THREADS": str(machine.threads),
        # Workers of another node must not be met at addresses of dead ones (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if not progress:
        environment[NO_PROGRESS_VARIABLE] = "1"
    return environment


def _start(command: list[str], *, environment: Mapping[str, str], output: Path | None) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
    with output.open("ab") if output is not None else nullcontext() as sink:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=tied_to_this_process(), stdout=sink, stderr=sink
        )


def tied_to_this_process() -> Callable[[], None]:
    """Return what a child does between fork and exec so that Linux sends it a SIGTERM when this process dies."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: little is safe between fork and exec

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the line above
                os.kill(os.getpid(), signal.SIGTERM)

    return die_with_parent


def _watch(folder: RunFolder, mirror: Mirror, pid: int, ended: threading.Event, *, gpus: bool) -> None:
    """Sample the machine and mirror the run until the compute process has ended."""
    sampler = SystemSampler(pid, path=folder.path, gpus=gpus and count_gpus() > 0)
    sampled_at = time.monotonic()
    warned = False
    timeout_s = FIRST_SYNC_TIMEOUT_S
    with folder.metric_log("system") as log:
        while not ended.wait(MIRROR_EVERY_S):
            if time.monotonic() - sampled_at >= sample_interval_s(time.time() - folder.info.created_at):
                sampled_at = time.monotonic()
                _sample(folder, sampler, log)
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


def _sample(folder: RunFolder, sampler: SystemSampler, log: MetricLog) -> None:
    seconds = int(time.time() - folder.info.created_at)  # a resumed run goes on to the right of its past
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
        return _shell_code(returncode)
    if state.status == "failed":
        return _shell_code(returncode) if returncode != 0 else 2  # torchrun's group ends with 0: it must not start it again
    goes_on = "the same command goes on from the last checkpoint"
    if asked:
        folder.set_state(status="interrupted", message=f"stopped by {signal.Signals(asked[-1]).name}; {goes_on}")
        return 128 + asked[0]
    if -returncode in _STOPPING:
        folder.set_state(status="interrupted", message=f"stopped by {signal.Signals(-returncode).name}; {goes_on}")
        return _shell_code(returncode)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (out of memory?)" if -returncode == signal.SIGKILL else ""
        message = f"the training process was killed by {name}{hint}; {goes_on}"
    else:
        message = f"the training process ended with exit code {returncode} before it was done; its last words are {words}"
    folder.set_state(status="failed", message=message)
    _say(f"Run {folder.run_id} failed: {message}.")
    return _shell_code(returncode) or 1


# ---------------------------------------------------------------------------------------------------------------- helpers


def check_gpus(machine: Machine) -> None:
    """Refuse a machine that asks for more GPUs than there are.

    Raises:
        UserError: says how many there are.
    """
    if machine.device == "cpu" or (machine.device == "auto" and machine.procs == 1):
        return
    there = count_gpus()
    if machine.device == "auto" and there == 0:
        return  # several processes on the CPU
    if there < machine.procs:
        fewer = f"--gpus {there} or " if there else ""
        noun = "GPU" if there == 1 else "GPUs"
        raise UserError(f"This machine has {there} {noun}, not {machine.procs}; use {fewer}--device cpu --procs N.")


def _threads(machine: Machine) -> int:
    """Return the CPU threads of one process: as set, as OMP_NUM_THREADS says, or the default.

    Beside a GPU that is the process's share of the cores. On the CPU it is 1: two threads that wait for each other within every
    operation fall to a hundredth of their speed as soon as anything else runs on the machine, and with one thread the bits of a
    result do not depend on the number of cores.
    """
    if machine.threads is not None:
        return machine.threads
    inherited = os.environ.get("OMP_NUM_THREADS", "")
    if inherited.isdigit() and int(inherited) > 0:
        return int(inherited)
    if machine.device == "cpu" or (machine.device == "auto" and count_gpus() == 0):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // machine.procs)


def _shell_code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it was quicker


def _say_pending(report: SyncReport) -> None:
    if report.error is not None:
        missing = f"{report.pending} values, files or facts of this run"
        _say(f"Warning: MLflow lacks {missing} ({report.error}); 'obowlab runs sync' sends them.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
