"""The compute process of one run: `python -m obowlab.training RUN_DIR`, started by the launcher, once per rank."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # until training listens to signals, which takes seconds of imports, Ctrl-C just ends the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ctypes
import os
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch

from obowlab.errors import UserError
from obowlab.launch.gpu_leases import hold_as_worker
from obowlab.launch.processes import PR_SET_PDEATHSIG
from obowlab.runs.folder import RunFolder
from obowlab.training.context import RunContext
from obowlab.training.distributed import MainFailed, join
from obowlab.training.final_evaluation import finish
from obowlab.training.loop import train
from obowlab.training.reporter import Reporter
from obowlab.training.signals import Interrupted, StopRequest


def main(argv: list[str]) -> int:
    """Train and evaluate the run of a folder; return the exit code (0 done, 2 an error to fix, 128 + signal when stopped)."""
    stop_with_parent()
    try:
        folder = RunFolder.open(Path(argv[0]))
        machine, _ = folder.machine, folder.state  # refuses a damaged state before anything begins
        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        with (
            hold_as_worker(local_rank=int(os.environ.get("LOCAL_RANK", "0"))) or nullcontext(),
            StopRequest().listening() as stop,
            join(machine) as world,
            folder.lock() if world.is_main else nullcontext(),
        ):
            reporter = Reporter(folder.path / "log.txt" if world.is_main else None)
            code = carry_out(RunContext(folder, machine=machine, world=world, reporter=reporter, stop=stop))
            # An error of one process looks to torchrun like its death; the launcher reads the state instead.
            return code if world.world_size == 1 else 0
    except UserError as error:  # before there was a run to record it in
        print(f"Error: {error}", file=sys.stderr)
        return 2


def carry_out(run: RunContext) -> int:
    """Train and evaluate the run, and record how it ended; return the exit code."""
    status, message, code = "finished", "", 0
    try:
        method = train(run)
        if run.world.is_main:
            finish(run, method=method)
    except Interrupted as interruption:
        status, message, code = "interrupted", "stopped by a signal; the same command resumes it", 128 + interruption.signum
        run.reporter.say("Stopped; the same command resumes from here.")
    except MainFailed:
        return 2  # rank 0 says why
    except (UserError, OSError) as error:
        status, message, code = "failed", describe(error, folder=run.folder.path), 2
        run.reporter.say(f"Error: {message}")
    except Exception:
        run.reporter.log(traceback.format_exc())
        raise
    if run.world.is_main:
        try:
            run.folder.set_state(status=status, message=message)
        # The disk that ended the run may refuse this as well, or the state be damaged; the launcher sees the exit code.
        except (UserError, OSError) as error:
            if code != 2:  # one message is enough
                print(f"Error: {describe(error, folder=run.folder.path)}", file=sys.stderr)
            return 2
    return code


def describe(error: UserError | OSError, *, folder: Path) -> str:
    """Return a user's error as it is, and one of the operating system with the file that it refused."""
    if isinstance(error, UserError):
        return str(error)
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else folder
    place = named.parent if named.name.startswith(".") else named  # a temporary file beside the one that was to be replaced
    return f"Cannot use {place} ({error.strerror or error}): fix that and run the command again."


def stop_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent dies: torchrun killed with -9 must not leave its workers behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
