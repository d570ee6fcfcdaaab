"""The compute process of one run: `python -m obowlab.training RUN_DIR`, started by the launcher, once per rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.track.folder import RunFolder
from obowlab.training.distributed import World, join
from obowlab.training.loop import Interrupted, StopRequest, train
from obowlab.training.progress import Reporter
from obowlab.training.finish import finish


def main(argv: list[str]) -> int:
    """Train and evaluate the run of a folder; return the exit code (0 done, 2 a mistake to mend, 128 + signal when stopped)."""
    folder = RunFolder.open(Path(argv[0]))
    machine = folder.machine
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    with StopRequest().listening() as stop, join(machine) as world:
        if not world.is_main:
            return _work(folder, machine=machine, world=world, stop=stop)
        with folder.lock():
            return _work(folder, machine=machine, world=world, stop=stop)


def _work(folder: RunFolder, *, machine: Machine, world: World, stop: StopRequest) -> int:
    recipe, seed = folder.info.recipe, folder.info.seed
    reporter = Reporter(folder.path / "log.txt" if world.is_main else None)
    try:
        method = train(folder, recipe=recipe, seed=seed, machine=machine, world=world, reporter=reporter, stop=stop)
        if world.is_main:
            finish(folder, method=method, recipe=recipe, seed=seed, machine=machine, world=world, reporter=reporter, stop=stop)
            folder.set_state(status="finished", message="")
        return 0
    except Interrupted as interruption:
        if world.is_main:
            folder.set_state(status="interrupted", message="stopped by a signal; the same command goes on")
            reporter.say("Stopped; the same command goes on from here.")
        code = 128 + interruption.signum
    except UserError as error:
        if world.is_main:
            folder.set_state(status="failed", message=str(error))
            reporter.say(f"Error: {error}")
        code = 2
    # torchrun would start a group again that ends with an error; the launcher reads the state instead.
    return code if world.world_size == 1 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
