"""What the parts of a training process share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from obowlab.config import Machine, Recipe
from obowlab.data.protocol_needs import unmet_needs
from obowlab.runs.folder import RunFolder
from obowlab.training.distributed import World
from obowlab.training.reporter import Reporter
from obowlab.training.signals import StopRequest


@dataclass(frozen=True)
class RunContext:
    """What one training process needs: run folder, machine, ranks, reporter, stop request."""

    folder: RunFolder
    machine: Machine
    world: World
    reporter: Reporter
    stop: StopRequest

    @property
    def recipe(self) -> Recipe:
        """The run's resolved recipe."""
        return self.folder.info.recipe

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.folder.info.seed

    @cached_property
    def left_out(self) -> dict[str, str]:
        """The protocols that these images cannot carry, with the reasons; see `unmet_needs`."""
        return unmet_needs(self.recipe, data_root=self.machine.data_root, runs_root=self.machine.runs_root)
