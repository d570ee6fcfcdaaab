"""OBoW: a student predicts, from small crops, the bag of visual words its teacher sees in the whole image (SPEC section 1)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from obowlab.config import Backbone, Level, Obow, Views
from obowlab.errors import UserError
from obowlab.methods import bow
from obowlab.methods.backbones import ResNet, build_backbone, map_size
from obowlab.methods.base import Comm, LevelWords, Method, StepOutput, VisualWords
from obowlab.methods.heads import DynamicHead, FixedHead
from obowlab.methods.online_classifier import Monitor
from obowlab.methods.schedules import teacher_momentum
from obowlab.methods.vocabulary import VOCABULARIES, Vocabulary, level_metrics


class OBoW(Method[Obow]):
    """One call is one training step without its backward pass, in the order that SPEC pins.

    Attributes:
        num_draws: uniforms a step needs per image: one per level.
    """

    def __init__(
        self,
        method: Obow,
        *,
        backbone: Backbone,
        total_steps: int,
        seed: int,
        num_classes: int | None,
        comm: Comm,
    ):
        super().__init__(method, backbone=backbone, total_steps=total_steps, seed=seed, num_classes=num_classes, comm=comm)
        self.num_draws = len(method.levels)
        self.student = build_backbone(backbone, seed=seed)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)  # the student's weights are a function of the seed alone: see build_backbone
            channels, features = self.student.level_channels, self.student.num_features
            make_vocabulary = VOCABULARIES[method.vocabulary]
            self.vocabularies = nn.ModuleDict(
                {level: make_vocabulary(method, num_channels=channels[level]) for level in method.levels}
            )
            self.heads = nn.ModuleDict(
                {
                    level: DynamicHead(method, num_channels=channels[level], num_features=features)
                    if method.head == "dynamic"
                    else FixedHead(num_words=method.num_words, num_features=features)
                    for level in method.levels
                }
            )
            self.monitor = Monitor(num_features=features, num_classes=num_classes) if num_classes is not None else None

    @classmethod
    def check_views(cls, method: Obow, *, backbone: Backbone, views: Views) -> None:
        """Refuse feature maps that are too small for the vocabulary.

        Raises:
            UserError: the border leaves nothing, or less than the 3x3 that `local_average` averages.
        """
        for level in method.levels:
            _refuse_small_map(method, level=level, size=map_size(backbone, level=level, image_size=views.original_size))

    @property
    def encoder(self) -> ResNet:
        """The network this method is for: the student."""
        return self.student

    def visual_words(self) -> VisualWords:
        """Return the words of every level; delta is that of soft codes, also where training used hard ones."""
        levels = {
            level: LevelWords(
                vectors=vocabulary.words,
                delta=self.method.delta_base * vocabulary.msd,
                border=self.method.border,
                inserted_at=vocabulary.inserted_at,
            )
            for level, vocabulary, _ in self._levels()
        }
        return VisualWords(teacher=self.teacher, levels=levels)

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
        """Do one training step up to its loss; teacher and vocabularies move on.

        Args:
            original: teacher's view, [B, 3, S, S].
            views: kind of view (`crops`, `patches`) to the student's views, [B·V, 3, s, s], all views of an image together.
            step: number of this step, from 0.
            draws: uniforms in [0, 1), [B, num_draws].
            labels: classes of the images, [B]; only the monitor sees them.
            shares: kind of view to the fraction of every view that is its own image's, [B·V]; see `Method.forward`.

        Raises:
            UserError: a cropped feature map is too small for the vocabulary.
        """
        num_images = len(original)
        draws = draws.to(original.device)
        # (2) The student meets its views, one pass per kind.
        features = {kind: self.student(images) for kind, images in views.items()}
        # (3) The teacher follows, before it looks.
        momentum = self._move_teacher(step)
        # (4) In train mode: its batch norms use the statistics of this batch.
        with torch.no_grad():
            maps, pooled = self.teacher.levels(original, self.method.levels)
        features_ND = torch.cat(list(features.values()))
        losses: dict[str, list[Tensor]] = {kind: [] for kind in features}
        floors: dict[str, list[Tensor]] = {kind: [] for kind in features}
        metrics: dict[str, Tensor] = {}
        for index, (level, vocabulary, head) in enumerate(self._levels()):
            _refuse_small_map(self.method, level=level, size=min(maps[level].shape[-2:]))
            metrics[f"word_age_{level}"] = vocabulary.mean_age(step=step)
            # (1, 2) Predictions are made with the words as they are before (5 - 9) move them.
            weights_KD = head(vocabulary.words)
            reading = vocabulary.read(maps[level], draws_B=draws[:, index], step=step, comm=self.comm)
            log_prediction_NK = torch.log_softmax(bow.bow_logits(features_ND, weights_KD, kappa=head.kappa), dim=-1)
            # (10) Mean over the views of a kind and over levels, sum over kinds.
            parts = torch.split(log_prediction_NK, [len(each) for each in features.values()])
            for kind, part_NK in zip(features, parts, strict=True):
                part_BVK = part_NK.view(num_images, -1, self.method.num_words)
                share_BV = shares[kind].view(num_images, -1) if shares is not None and kind in shares else None
                loss, floor = bow.prediction_loss(part_BVK, reading.targets, share_BV=share_BV)
                losses[kind].append(loss)
                floors[kind].append(floor)
            metrics |= level_metrics(level, reading, log_prediction_NK.detach(), comm=self.comm)
            metrics[f"msd_{level}"] = vocabulary.msd.clone()
            metrics[f"kappa_{level}"] = head.kappa.detach().clone()
        of_kind = {f"loss_{kind}": torch.stack(each).mean() for kind, each in losses.items()}
        loss = torch.stack(list(of_kind.values())).sum()
        floor = torch.stack([torch.stack(each).mean() for each in floors.values()]).sum()
        metrics |= of_kind | {"loss_kl": loss - floor}
        metrics["teacher_momentum"] = torch.full((), momentum, device=original.device)
        return self._output(loss, metrics, features=pooled, labels=labels)

    def _levels(self) -> Iterator[tuple[Level, Vocabulary, DynamicHead | FixedHead]]:
        for level in self.method.levels:
            yield level, cast(Vocabulary, self.vocabularies[level]), cast("DynamicHead | FixedHead", self.heads[level])

    @torch.no_grad()
    def _move_teacher(self, step: int) -> float:
        """Move the teacher's parameters towards the student's (eq. 3); its batch-norm statistics are its own."""
        method = self.method
        alpha = teacher_momentum(
            step, start=method.teacher_momentum, schedule=method.teacher_momentum_schedule, total_steps=self.total_steps
        )
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - alpha)
        return alpha


def _refuse_small_map(method: Obow, *, level: Level, size: int) -> None:
    needed = 3 if method.vocabulary == "queue" and method.queue_vector == "local_average" else 1
    left = max(0, size - 2 * method.border)
    if left < needed:
        raise UserError(
            f"The {level} map of the original view is {size}x{size}, method.border = {method.border} leaves {left}x{left}, the "
            f"vocabulary needs {needed}x{needed}: lower method.border or raise views.original_size."
        )
