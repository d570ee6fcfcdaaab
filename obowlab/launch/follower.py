"""What a node other than the first does for a run: `python -m obowlab.launch.follower FOLDER NODE`, started by a job.

It knows no recipe. In every round of the rendezvous it starts this node's processes and reports when they die.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from obowlab.launch.compute_command import compute_command, environment_of
from obowlab.launch.gpu_leases import leased
from obowlab.launch.nodes import POLL_S, Rendezvous, Round
from obowlab.launch.processes import StopSignals, kill_family, start
from obowlab.log import log_to_stderr
from obowlab.runs.folder import RunFolder


def follow(rendezvous: Rendezvous, *, node: int) -> int:
    """Work until the job is over; return the exit code: 0, 1 when node 0 fell silent, 128 + signal when stopped."""
    signals = StopSignals()
    current: Round | None = None
    with signals.listening():
        while not signals.received:
            current = rendezvous.next_round(after=current.number if current else 0)
            if current is None:
                return 0 if rendezvous.is_over() else 1
            _join(current, rendezvous=rendezvous, node=node, signals=signals)
    return 128 + signals.received[0]


def _join(current: Round, *, rendezvous: Rendezvous, node: int, signals: StopSignals) -> None:
    machine = RunFolder.open(current.run).machine
    with leased(machine, given_up=lambda: bool(signals.received)) as gpus:
        environment = environment_of(machine, token=current.token, progress=False)
        place = rendezvous.torchrun_variables(current)
        child = start(compute_command(current.run, machine), environment={**environment, **gpus, **place}, output=None)
        signals.watch(child)
        while child.poll() is None:
            if not rendezvous.is_current(current):
                kill_family(child)
            time.sleep(POLL_S)
    if child.returncode != 0 and not signals.received and rendezvous.is_current(current):
        rendezvous.report_failure(current, node=node)


if __name__ == "__main__":
    log_to_stderr()
    sys.exit(follow(Rendezvous(Path(sys.argv[1])), node=int(sys.argv[2])))
