"""What a node other than the first does for a run: `python -m obowlab.launch.follower MEETING NODE`, started by a job.

It knows no recipe. It starts its share of whatever node 0 calls for, says when that dies, and begins again at the next call.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from obowlab.launch.compute_command import compute_command, environment_of
from obowlab.launch.gpu_leases import leased
from obowlab.launch.nodes import POLL_S, Call, Meeting
from obowlab.launch.processes import StopSignals, kill_family, start
from obowlab.runs.folder import RunFolder


def follow(meeting: Meeting, *, node: int) -> int:
    """Work until all is over; return the exit code: 0, 1 when node 0 fell silent, 128 + signal when stopped."""
    signals = StopSignals()
    call: Call | None = None
    with signals.listening():
        while not signals.received:
            call = meeting.next_call(after=call.number if call else 0)
            if call is None:
                return 0 if meeting.is_over() else 1
            _answer(call, meeting=meeting, node=node, signals=signals)
    return 128 + signals.received[0]


def _answer(call: Call, *, meeting: Meeting, node: int, signals: StopSignals) -> None:
    machine = RunFolder.open(call.run).machine
    with leased(machine, say=_say, given_up=lambda: bool(signals.received)) as gpus:
        environment = {**environment_of(machine, token=call.token, progress=False), **gpus, **meeting.rendezvous(call)}
        child = start(compute_command(call.run, machine), environment=environment, output=None)
        signals.watch(child)
        while child.poll() is None:
            if not meeting.stands(call):
                kill_family(child)
            time.sleep(POLL_S)
    if child.returncode != 0 and not signals.received and meeting.stands(call):
        meeting.report_failure(call, node=node)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(follow(Meeting(Path(sys.argv[1])), node=int(sys.argv[2])))
