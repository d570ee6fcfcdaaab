"""What passes between the training loop and a method: the batch, the step's output, the other processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from obowlab.config import Backbone, Level, Section, Views, compatibility
from obowlab.config.pixels import MEAN, STD
from obowlab.methods.backbones import ResNet, build_backbone, zero_last_scales
from obowlab.methods.detection.objects import Objects
from obowlab.methods.online_classifier import OnlineClassifier

if TYPE_CHECKING:
    from obowlab.methods.detection.two_stage import TwoStageDetector

T = TypeVar("T")
SettingsT = TypeVar("SettingsT", bound=Section)
"""The settings of one method: `config.Obow` and its likes."""


class Comm(Protocol):
    """Collectives over the processes of a run; every process makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Return the number of this process, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate `x` over the processes along dimension 0, in rank order, without gradient."""
        ...

    def all_gather_with_gradient(self, x: Tensor) -> Tensor:
        """Do as `all_gather`; `x` gets the sum of the gradients that its copies have on all processes.

        So a loss that is a mean over this process's rows, against the rows of all, has the gradient of the mean over all rows,
        once gradients are averaged over processes.
        """
        ...

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Average `x` over the processes, without gradient."""
        ...

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail on one process and has no collectives in it; then every process raises an exception."""
        ...


class OneProcess:
    """The Comm of a run with a single process."""

    rank: int = 0
    world_size: int = 1

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x` without gradient."""
        return x.detach()

    def all_gather_with_gradient(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Return `x` without gradient."""
        return x.detach()

    def together(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()


@dataclass(frozen=True)
class Batch:
    """This process's share of the images of one training step.

    Attributes:
        original: the whole images, [B, 3, S, S].
        views: kind of view (`crops`, `patches`, `small_crops`) to the student's views, [B·V, 3, s, s], all views of an image
            together.
        uniforms: random numbers in [0, 1), float64 [B, num_uniforms].
        step: number of this step, from 0.
        labels: classes of the images, [B]; for the online classifier, and a method that learns from labels.
        cutmix_lambda: for the kinds that cutmix mixed, the fraction of every view that shows its own image, [B·V]; the rest
            shows the neighbouring image (0 and 1, 2 and 3, ...).
        wants_metrics: whether this step is logged, and the metrics that cost something are worth their time.
        objects: of every image, for a detector, which sees whole images of any size: `original`, padded at the right and below.
        first: place of the first of these images in the batch of all processes.
    """

    original: Tensor
    views: Mapping[str, Tensor]
    uniforms: Tensor
    step: int
    labels: Tensor | None = None
    cutmix_lambda: Mapping[str, Tensor] = field(default_factory=dict)
    wants_metrics: bool = True
    objects: tuple[Objects, ...] = ()
    first: int = 0


@dataclass
class StepOutput:
    """What one training step returns.

    Attributes:
        loss: 0-dim, to be differentiated; includes the online classifier's loss (whose features are detached).
        metrics: 0-dim detached tensors of this process, under the names of `obowlab.runs.metrics`. Losses and accuracies are
            there at every step, the others when the batch wants metrics.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Preparation:
    """What a method may use in `prepare`.

    Attributes:
        teacher: the encoder of the stage before, or of the weights that the settings name; None when there is neither.
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
    """The vocabulary of one level, and how a map of that level is assigned to it.

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
    """The words of a method, and the network whose maps they describe.

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
        num_uniforms: random numbers a step needs per image.
        monitor: the online classifier, or None.
        pixel_statistics: mean and deviation that whole images are normalised by, of a detector.
    """

    num_uniforms: int
    monitor: OnlineClassifier | None
    pixel_statistics: tuple[tuple[float, ...], tuple[float, ...]] = (MEAN, STD)

    def __init__(
        self, method: SettingsT, *, backbone: Backbone, total_steps: int, seed: int, num_classes: int | None, comm: Comm
    ) -> None:
        """Build with the initial weights of a seed.

        Args:
            method: the method's settings.
            backbone: the network to learn.
            total_steps: steps of the whole training, for schedules.
            seed: of the initial weights.
            num_classes: of the data set, for the online classifier or a method that learns from labels; None for neither.
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
        compatibility.check_views(method, backbone=backbone, views=views)

    @classmethod
    def check_batch(cls, method: SettingsT, *, batch_size: int, world_size: int) -> None:
        """Refuse, before anything is loaded, a batch size that the method cannot split over the processes.

        Raises:
            UserError: names the setting to change.
        """
        compatibility.check_batch(method, batch_size=batch_size, world_size=world_size)

    def prepare(self, preparation: Preparation) -> bool:
        """Do once what must be done before the first step, and return whether there was anything to do.

        The result is kept in parameters or persistent buffers: a resumed run does not prepare again. Every process calls it and
        ends with the same state.

        Raises:
            UserError: there are too few training images, or the teacher does not fit.
        """
        return False

    @property
    @abstractmethod
    def encoder(self) -> ResNet:
        """Return the network that is learnt."""

    @property
    def own_classifier(self) -> nn.Module | None:
        """Return what maps the encoder's features to scores of the classes, of a method that learns that; else None."""
        return None

    @property
    def own_detector(self) -> TwoStageDetector | None:
        """Return what finds objects, of a method that learns that; else None."""
        return None

    def finish(self, batches: Callable[[int], Iterator[Batch]]) -> None:
        """Do once what must be done after the last step; done again from the same weights, it changes nothing.

        Every process calls it and ends with the same state.

        Args:
            batches: yields so many further batches, as training would go on with them.
        """

    def visual_words(self) -> VisualWords | None:
        """Return the words, sharing memory with the method; None for a method that has none."""
        return None

    def rate_groups(self) -> list[dict[str, Any]]:
        """Return what is learnt at a rate of its own, in groups of `name`, `params`, and one or both of these.

        `rate_factor` multiplies the rate. With `fixed_rate` true it is the recipe's at every step, whatever the schedule.
        """
        return []

    def param_groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's groups.

        They are `method`, which is student and heads, those of `rate_groups`, and `monitor` if there is an online classifier.
        """
        monitor = [] if self.monitor is None else list(self.monitor.parameters())
        own = self.rate_groups()
        apart = {id(parameter) for parameter in [*monitor, *(p for group in own for p in group["params"])]}
        learnt = [p for p in self.parameters() if p.requires_grad and id(p) not in apart]
        groups: list[dict[str, Any]] = [{"name": "method", "params": learnt, "weight_decay": weight_decay}]
        groups += [{**group, "weight_decay": weight_decay} for group in own]
        if monitor:
            groups.append({"name": "monitor", "params": monitor, "weight_decay": weight_decay})
        return groups

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss."""

    def _output(
        self,
        losses: Mapping[str, Tensor],
        metrics: dict[str, Tensor],
        *,
        features: Tensor | None = None,
        labels: Tensor | None = None,
        target_entropy: Tensor | None = None,
    ) -> StepOutput:
        """Add up the losses of the kinds of views, and the online classifier's.

        Args:
            losses: kind of view to its loss, 0-dim.
            metrics: whatever else there is to log.
            features: what the online classifier sees, [N, D]; None for a method that has none.
            labels: classes of its rows, [N].
            target_entropy: the least that the sum of the losses can be, 0-dim; None where that is 0.
        """
        loss = torch.stack(list(losses.values())).sum()
        metrics = {**metrics, **{f"loss_{kind}": value for kind, value in losses.items()}, "loss": loss}
        if target_entropy is not None:
            metrics["loss_kl"] = loss - target_entropy
        if self.monitor is not None and features is not None and labels is not None:
            online = self.monitor.metrics(features, labels)
            metrics |= online
            loss = loss + online["monitor_loss"]
        return StepOutput(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})


class SelfSupervised(Method[SettingsT]):
    """A method that learns a student without labels, with the online classifier beside it.

    Attributes:
        student: the network that is learnt.
    """

    num_uniforms = 0
    student: ResNet

    def __init__(
        self, method: SettingsT, *, backbone: Backbone, total_steps: int, seed: int, num_classes: int | None, comm: Comm
    ) -> None:
        super().__init__(method, backbone=backbone, total_steps=total_steps, seed=seed, num_classes=num_classes, comm=comm)
        self.student = build_student(method, backbone=backbone, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)  # the student's weights are a function of the seed alone: see build_backbone
            self.build(method)
            features = self.student.num_features
            self.monitor = None if num_classes is None else OnlineClassifier(num_features=features, num_classes=num_classes)

    @abstractmethod
    def build(self, method: SettingsT) -> None:
        """Add to the student what the method needs beside it: its teacher, heads and buffers, in their initial state."""

    @property
    def encoder(self) -> ResNet:
        """Return the student."""
        return self.student


def build_student(method: Section, *, backbone: Backbone, seed: int) -> ResNet:
    """Return the network that a method learns, with the weights that a seed begins it with."""
    student = build_backbone(backbone, seed=seed)
    if getattr(method, "zero_residual", False):
        zero_last_scales(student)
    return student
