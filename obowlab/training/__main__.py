"""The compute process of one run: `python -m obowlab.training RUN_DIR`, started by the launcher, once per rank."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # until training listens to signals, which takes seconds of imports, Ctrl-C just ends the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ctypes
import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import torch

from obowlab.config import Machine
from obowlab.errors import UserError, memory_sentence, refusal_of
from obowlab.launch.gpu_leases import hold_as_worker
from obowlab.launch.processes import PR_SET_PDEATHSIG
from obowlab.log import show_anything
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import Status
from obowlab.runs.locks import RunTakenError
from obowlab.training.context import RunContext
from obowlab.training.distributed import OtherRankCrashed, OtherRankFailed, join
from obowlab.training.final_evaluation import keep, measure, trained
from obowlab.training.reporter import Reporter
from obowlab.training.signals import Interrupted, StopRequest

T = TypeVar("T")


def main(argv: list[str]) -> int:
    """Train and evaluate the run of a folder; return the exit code (0 done, 2 an error to fix, 128 + signal when stopped).

    An error of one process looks to torchrun like its death; so those of a group end with 0 and the launcher reads the state.
    """
    stop_with_parent()
    show_anything()
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    folder: RunFolder | None = None
    try:
        folder = RunFolder.open(Path(argv[0]))
        machine, _ = folder.machine, folder.state  # refuses a damaged state before anything begins
        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        code = work(folder, machine=machine)
        return code if alone else 0
    except OtherRankFailed:
        return 0
    except (UserError, OSError) as error:  # before there was a run to record it in
        return refuse(error, folder=folder, alone=alone)
    except Exception as error:
        if not alone:
            end_at_once(error)
        shortage = memory_sentence(error)
        if shortage is None:
            raise
        return refuse(UserError(shortage), folder=folder, alone=True)


def work(folder: RunFolder, *, machine: Machine) -> int:
    """Train with all ranks and evaluate on rank 0 alone; return the exit code."""
    with (
        hold_as_worker(local_rank=int(os.environ.get("LOCAL_RANK", "0"))) or nullcontext(),
        StopRequest().listening() as stop,
        ExitStack() as held,
    ):
        with join(machine) as world:
            world.on_main(lambda: held.enter_context(folder.lock()))
            reporter = world.together(lambda: Reporter(folder.path / "log.txt" if world.is_main else None))
            run = RunContext(folder, machine=machine, world=world, reporter=reporter, stop=stop)
            code, networks = carry_out(trained, run=run)
        if networks is None or not world.is_main:  # the others end here, and their GPUs are free while rank 0 measures
            return code
        run = replace(run, world=world.alone())
        code, _ = carry_out(lambda run: keep(run, networks=networks), run=run)
        if not code:
            code, _ = carry_out(lambda run: measure(run, networks=networks), run=run, failure="unevaluated")
        return code if code else record(run, status="finished", message="")


def carry_out(
    part: Callable[[RunContext], T], *, run: RunContext, failure: Literal["failed", "unevaluated"] = "failed"
) -> tuple[int, T | None]:
    """Do a part of the run; return the exit code and what it returned. If it cannot be done, how it ended is recorded.

    Args:
        part: of the run.
        run: folder, ranks, reporter.
        failure: the state of the run when the part cannot be done.
    """
    try:
        return 0, part(run)
    except Interrupted as interruption:
        code = 128 + interruption.signum
        with suppress(OSError):
            run.reporter.say("Stopped; the same command resumes from here.")
        return record(run, status="interrupted", message="stopped by a signal; the same command resumes it") or code, None
    except OtherRankFailed:
        return 2, None  # rank 0 says why
    except OtherRankCrashed:
        raise
    except (UserError, OSError) as error:
        message = describe(error, folder=run.folder.path)
        with suppress(OSError):  # it is on the terminal, and the log may be on the disk that is full
            run.reporter.say(f"Error: {message}")
        record(run, status=failure, message=message)
        return 2, None
    except Exception as error:
        with suppress(OSError):
            run.reporter.log(traceback.format_exc())
        shortage = memory_sentence(error)
        if shortage is None:
            raise
        with suppress(UserError, OSError):  # by whatever rank it is: the others wait for it in a collective, and cannot say why
            run.folder.set_state(status=failure, message=shortage)
        if run.world.world_size > 1:
            raise
        with suppress(OSError):
            run.reporter.say(f"Error: {shortage}")
        return 2, None


def record(run: RunContext, *, status: Status, message: str) -> int:
    """Write how the run ended into its state; return the exit code 2 if that is refused, else 0."""
    if not run.world.is_main:
        return 0
    try:
        run.folder.set_state(status=status, message=message)
    # The disk that ended the run may refuse this as well, or the state be damaged; the launcher sees the exit code.
    except (UserError, OSError) as error:
        if status not in ("failed", "unevaluated"):  # one message is enough
            print(f"Error: {describe(error, folder=run.folder.path)}", file=sys.stderr)
        return 2
    return 0


def refuse(error: UserError | OSError, *, folder: RunFolder | None, alone: bool) -> int:
    """Say and record, once for a node and once for the run, why nothing was begun; return the exit code."""
    message = describe(error, folder=folder.path if folder is not None else Path())
    if alone or os.environ.get("LOCAL_RANK") == "0":
        print(f"Error: {message}", file=sys.stderr)
    if alone or folder is None or isinstance(error, RunTakenError):
        return 2
    try:
        if os.environ.get("RANK") == "0":  # or the launcher would take the group for one that was killed, and start it again
            folder.set_state(status="failed", message=message)
    except (UserError, OSError):
        return 2
    return 0


def end_at_once(error: Exception) -> NoReturn:
    """End this process of a group although others may wait for it: torchrun then ends them.

    The ordinary end would wait in turn, for the collectives that the others do not take part in.
    """
    message = memory_sentence(error)
    if message is not None:
        print(f"Error: {message}", file=sys.stderr)
    elif not isinstance(error, OtherRankCrashed):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def describe(error: UserError | OSError, *, folder: Path) -> str:
    """Return a user's error as it is, and one of the operating system with the file that it refused."""
    if isinstance(error, UserError):
        return str(error)
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else folder
    place = named.parent if named.name.startswith(".") else named  # a temporary file beside the one that was to be replaced
    return refusal_of(error, file=place)


def stop_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent dies: torchrun killed with -9 must not leave its workers behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
