"""Nodes that train one run together, and the folder in the run store where they meet.

Node 0 runs the `obowlab` command. It calls the others to every start of a group of training processes; they start their share
and say when it dies, and then everybody begins anew from the last checkpoint. Neither a port nor a host name is agreed on
beforehand: torchrun's c10d rendezvous uses a file in this folder, and the agent of rank 0 announces there the port it was given.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from obowlab.files import write_atomic

MEETING_VARIABLE = "OBOWLAB_MEETING"
"""The folder where the nodes of this job meet; set for the command on node 0."""

POLL_S = 0.5
BEAT_S = 5.0
SILENCE_S = 120.0
"""Without a sign of life of node 0 for so long, the others give up."""

CALL, BEAT, OVER, FAILED = "call.json", "beat", "over", "failed"


class Call(BaseModel):
    """One start of a group of training processes.

    Attributes:
        number: of all starts of this job, from 1.
        run: the run folder.
        token: of the run's lock, which the processes of every node share.
    """

    number: int
    run: Path
    token: str


@dataclass
class Meeting:
    """The folder, as every node sees it."""

    folder: Path
    _beat: str = ""
    _heard_at: float = field(default_factory=time.monotonic)

    # ------------------------------------------------------------------------------------------------- node 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Show that node 0 is alive for as long as the context lasts, and say at its end that all is over."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ended = threading.Event()

        def beat() -> None:
            count = 0
            while True:
                count += 1
                write_atomic(self.folder / BEAT, str(count))
                if ended.wait(BEAT_S):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            write_atomic(self.folder / OVER, "")

    def call(self, run: Path, *, token: str) -> Call:
        """Call all nodes to another start."""
        before = self.last_call()
        call = Call(number=before.number + 1 if before else 1, run=run, token=token)
        write_atomic(self.folder / CALL, call.model_dump_json())
        return call

    def has_failed(self, call: Call) -> bool:
        """Tell whether another node's share of a start has died."""
        return any(self.folder.glob(f"{FAILED}-{call.number}-*"))

    # --------------------------------------------------------------------------------------------- other nodes

    def next_call(self, *, after: int) -> Call | None:
        """Wait for a newer call; None when all is over or node 0 is silent."""
        while self.goes_on():
            call = self.last_call()
            if call is not None and call.number > after:
                return call
            time.sleep(POLL_S)
        return None

    def stands(self, call: Call) -> bool:
        """Tell whether a call is still the last one."""
        return self.goes_on() and self.last_call() == call

    def report_failure(self, call: Call, *, node: int) -> None:
        """Say that this node's share of a start has died."""
        write_atomic(self.folder / f"{FAILED}-{call.number}-{node}", "")

    def is_over(self) -> bool:
        """Tell whether node 0 has said so."""
        return (self.folder / OVER).exists()

    # ----------------------------------------------------------------------------------------------- everybody

    def goes_on(self) -> bool:
        """Tell whether it is neither over nor node 0 silent; clocks of different nodes are not compared."""
        beat = _read(self.folder / BEAT)
        if beat != self._beat:
            self._beat, self._heard_at = beat, time.monotonic()
        return not self.is_over() and time.monotonic() - self._heard_at < SILENCE_S

    def last_call(self) -> Call | None:
        """Return the newest call; None before the first."""
        text = _read(self.folder / CALL)
        return Call.model_validate_json(text) if text else None

    def rendezvous(self, call: Call) -> Mapping[str, str]:
        """Return the variables that tell torchrun where the processes of a start find each other."""
        return {"PET_RDZV_ID": str(call.number), "PET_RDZV_ENDPOINT": str(self.folder / f"rendezvous-{call.number}")}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
