"""What the training loop and a method say to each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from obowlab.config import Backbone, Section, Views
from obowlab.methods.backbones import ResNet

SettingsT = TypeVar("SettingsT", bound=Section)
"""The settings of one method: `config.Obow` and its likes."""


class Comm(Protocol):
    """Talk between the processes of a run; every process makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate `x` over the processes along dimension 0, in rank order, without gradient."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Average `x` over the processes, without gradient."""
        ...


class OneProcess:
    """The Comm of a run with a single process."""

    rank: int = 0
    world_size: int = 1

    def gather(self, x: Tensor) -> Tensor:
        """Return `x`: there is nobody else."""
        return x.detach()

    def mean(self, x: Tensor) -> Tensor:
        """Return `x`: there is nobody else."""
        return x.detach()


@dataclass
class StepOutput:
    """What one training step returns.

    Attributes:
        loss: 0-dim, to be differentiated; includes the monitor's loss (whose features are detached).
        metrics: 0-dim detached tensors of this process, under the names of `obowlab.track.metrics`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Method(nn.Module, ABC, Generic[SettingsT]):
    """A way to learn an encoder: one call is one training step without its backward pass.

    Whatever must survive a restart is a parameter or a persistent buffer; nothing random is drawn but the initial weights.

    Attributes:
        num_draws: uniforms a step needs per image.
    """

    num_draws: int

    def __init__(
        self, method: SettingsT, *, backbone: Backbone, total_steps: int, seed: int, num_classes: int | None, comm: Comm
    ) -> None:
        """Build with the initial weights of a seed.

        Args:
            method: the method's settings.
            backbone: the network to learn.
            total_steps: steps of the whole training, for schedules.
            seed: of the initial weights.
            num_classes: of the data set, for the online monitor; None for no monitor.
            comm: the other processes of the run.
        """
        super().__init__()
        self.method = method
        self.total_steps = total_steps
        self.comm = comm

    @classmethod
    def check_views(cls, method: SettingsT, *, backbone: Backbone, views: Views) -> None:
        """Refuse, before anything is loaded, views that the method cannot work on.

        Raises:
            UserError: names the setting to change.
        """

    @property
    @abstractmethod
    def encoder(self) -> ResNet:
        """The network this method is for."""

    @abstractmethod
    def param_groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's groups, the monitor's apart."""

    @abstractmethod
    def forward(
        self, original: Tensor, views: Mapping[str, Tensor], *, step: int, draws: Tensor, labels: Tensor | None = None
    ) -> StepOutput:
        """Do one training step up to its loss.

        Args:
            original: the whole image, [B, 3, S, S].
            views: kind of view (`crops`, `patches`) to the student's views, [B·V, 3, s, s], all views of an image together.
            step: number of this step, from 0.
            draws: uniforms in [0, 1), [B, num_draws].
            labels: classes of the images, [B]; only a monitor sees them.
        """
