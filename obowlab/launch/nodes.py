"""Nodes that train one run together, and the folder of the run store in which they find each other.

Node 0 runs the `obowlab` command. It opens a round for every start of the training processes; the other nodes start their share,
report when it dies, and all begin the next round from the last checkpoint. No port and no host name has to be agreed on:
torchrun's c10d rendezvous uses a file in this folder, in which the agent of rank 0 announces the port it was given.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from obowlab.files.replacing import write_atomic

RENDEZVOUS_VARIABLE = "OBOWLAB_RENDEZVOUS"
"""The rendezvous folder of this job; set for the command on node 0."""

POLL_S = 0.5
HEARTBEAT_S = 5.0
SILENCE_S = 120.0
"""Without a heartbeat of node 0 for so long, the other nodes give up."""

ROUND, HEARTBEAT, OVER, FAILED = "round.json", "heartbeat", "over", "failed"


class Round(BaseModel):
    """One start of the training processes on all nodes.

    Attributes:
        number: among all starts of this job, from 1.
        run: the run folder.
        token: of the run's lock, which the processes of every node share.
    """

    number: int
    run: Path
    token: str


@dataclass
class Rendezvous:
    """The rendezvous folder, as every node sees it."""

    folder: Path
    _heartbeat: str = ""
    _heard_at: float = field(default_factory=time.monotonic)

    # ------------------------------------------------------------------------------------------------- node 0

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Show that node 0 is alive for as long as the context lasts, and at its end that the job is over."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ended = threading.Event()

        def beat() -> None:
            count = 0
            while True:
                count += 1
                write_atomic(self.folder / HEARTBEAT, str(count))
                if ended.wait(HEARTBEAT_S):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            write_atomic(self.folder / OVER, "")

    def start_round(self, run: Path, *, token: str) -> Round:
        """Ask all nodes to start their training processes."""
        before = self.last_round()
        current = Round(number=before.number + 1 if before else 1, run=run, token=token)
        write_atomic(self.folder / ROUND, current.model_dump_json())
        return current

    def has_failed(self, current: Round) -> bool:
        """Return whether the processes of another node have died in this round."""
        return any(self.folder.glob(f"{FAILED}-{current.number}-*"))

    # --------------------------------------------------------------------------------------------- other nodes

    def next_round(self, *, after: int) -> Round | None:
        """Wait for a round with a higher number; None when the job is over or node 0 is silent."""
        while self.is_alive():
            current = self.last_round()
            if current is not None and current.number > after:
                return current
            time.sleep(POLL_S)
        return None

    def is_current(self, current: Round) -> bool:
        """Return whether no later round has begun."""
        return self.is_alive() and self.last_round() == current

    def report_failure(self, current: Round, *, node: int) -> None:
        """Report that this node's processes have died in this round."""
        write_atomic(self.folder / f"{FAILED}-{current.number}-{node}", "")

    def is_over(self) -> bool:
        """Return whether node 0 has ended the job."""
        return (self.folder / OVER).exists()

    # ----------------------------------------------------------------------------------------------- all nodes

    def is_alive(self) -> bool:
        """Return whether the job is not over and node 0 not silent; clocks of different nodes are not compared."""
        heartbeat = _read(self.folder / HEARTBEAT)
        if heartbeat != self._heartbeat:
            self._heartbeat, self._heard_at = heartbeat, time.monotonic()
        return not self.is_over() and time.monotonic() - self._heard_at < SILENCE_S

    def last_round(self) -> Round | None:
        """Return the latest round; None before the first."""
        text = _read(self.folder / ROUND)
        return Round.model_validate_json(text) if text else None

    def torchrun_variables(self, current: Round) -> Mapping[str, str]:
        """Return the variables that tell torchrun where the processes of a round find each other."""
        return {"PET_RDZV_ID": str(current.number), "PET_RDZV_ENDPOINT": str(self.folder / f"torchrun-{current.number}")}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
