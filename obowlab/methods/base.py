"""What the training loop and a method say to each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from obowlab.config import Backbone, Level, Section, Views
from obowlab.errors import UserError
from obowlab.methods.backbones import ResNet
from obowlab.methods.online_classifier import Monitor

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
        metrics: 0-dim detached tensors of this process, under the names of `obowlab.runs.metrics`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Preparation:
    """What a method may use before its first step.

    Attributes:
        teacher: the encoder of the stage before; None when the recipe has none.
        num_images: how many training images there are.
        originals: the normalised original views, unflipped, of the training images with these numbers (int64, [N]), in
            batches and in order, on the method's device.
        uniforms: `uniforms(numbers, count, lane)` draws numbers in [0, 1) for training images, float64 [N, count].
        seed: of the run.
        report: takes a line of progress.
    """

    teacher: ResNet | None
    num_images: int
    originals: Callable[[Tensor], Iterator[Tensor]]
    uniforms: Callable[[Tensor, int, int], Tensor]
    seed: int
    report: Callable[[str], None]


@dataclass(frozen=True)
class LevelWords:
    """The vocabulary of one level as it stands, and how a map of that level is read with it.

    Attributes:
        vectors: the words, [K, C].
        delta: temperature of the soft codes (eq. 4), a squared distance, 0-dim. At 0 codes are one-hot, and of equal codes the
            nearer location counts for more: for vocabularies without a temperature.
        border: pixels dropped around the map.
        inserted_at: step at which each word came into the vocabulary, int64 [K].
    """

    vectors: Tensor
    delta: Tensor
    border: int
    inserted_at: Tensor


@dataclass(frozen=True)
class VisualWords:
    """The words a method describes images with, and the network whose maps it describes.

    Attributes:
        teacher: the network.
        levels: its levels that have a vocabulary, in the recipe's order.
    """

    teacher: ResNet
    levels: Mapping[Level, LevelWords]


class Method(nn.Module, ABC, Generic[SettingsT]):
    """A way to learn an encoder: one call is one training step without its backward pass.

    Whatever must survive a restart is a parameter or a persistent buffer; nothing random is drawn but the initial weights.

    Attributes:
        num_draws: uniforms a step needs per image.
        monitor: the online linear classifier, or None.
    """

    num_draws: int
    monitor: Monitor | None

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

    @classmethod
    def check_shares(cls, method: SettingsT, *, batch_size: int, world_size: int) -> None:
        """Refuse, before anything is loaded, a batch or a number of processes that the method cannot share out.

        Raises:
            UserError: names the setting to change.
        """

    def prepare(self, preparation: Preparation) -> bool:
        """Do once what must be done before the first step, and return whether there was anything to do.

        What it makes is kept in parameters or persistent buffers: a run that goes on does not prepare again. Every process
        calls it and ends with the same state.

        Raises:
            UserError: the training images are not enough, or the teacher does not fit.
        """
        return False

    @property
    @abstractmethod
    def encoder(self) -> ResNet:
        """The network this method is for."""

    def visual_words(self) -> VisualWords | None:
        """Return the words as they stand, sharing memory with the method; None when it describes images without words."""
        return None

    def param_groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's groups: all that is learnt, then the monitor if there is one."""
        of_monitor = [] if self.monitor is None else list(self.monitor.parameters())
        apart = {id(parameter) for parameter in of_monitor}
        learnt = [p for p in self.parameters() if p.requires_grad and id(p) not in apart]
        groups: list[dict[str, Any]] = [{"name": "method", "params": learnt, "weight_decay": weight_decay}]
        if of_monitor:
            groups.append({"name": "monitor", "params": of_monitor, "weight_decay": weight_decay})
        return groups

    @abstractmethod
    def forward(
        self,
        original: Tensor,
        views: Mapping[str, Tensor],
        *,
        step: int,
        draws: Tensor,
        labels: Tensor | None = None,
        shares: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:
        """Do one training step up to its loss.

        Args:
            original: the whole image, [B, 3, S, S].
            views: kind of view (`crops`, `patches`) to the student's views, [B·V, 3, s, s], all views of an image together.
            step: number of this step, from 0.
            draws: uniforms in [0, 1), [B, num_draws].
            labels: classes of the images, [B]; only a monitor sees them.
            shares: for kinds that cutmix mixed, the fraction of every view that is its own image's, [B·V]; the rest is the
                neighbouring image's (0 and 1, 2 and 3, ...). None when nothing is mixed.
        """

    def _output(self, loss: Tensor, metrics: dict[str, Tensor], *, features: Tensor, labels: Tensor | None) -> StepOutput:
        """Add the monitor's loss on these features, [N, D], and detach the metrics."""
        metrics = metrics | {"loss": loss}
        if self.monitor is not None and labels is not None:
            judgement = self.monitor.judge(features, labels)
            metrics |= judgement
            loss = loss + judgement["monitor_loss"]
        return StepOutput(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})


def refuse_cutmix(name: str, *, views: Views) -> None:
    """Refuse mixed crops for a method that has no target to mix.

    Raises:
        UserError: names the setting to change.
    """
    if views.cutmix_probability:
        raise UserError(f"{name} has no targets that cutmix could mix: set views.cutmix_probability to 0.0.")
