"""OBoW: a student predicts, from small crops, the bag of visual words of the whole image (docs/method.md).

The teacher that assigns the words is a moving average of the student.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from obowlab.config import Level, Obow
from obowlab.config.compatibility import refuse_small_map
from obowlab.methods import bow
from obowlab.methods.base import Batch, LevelWords, SelfSupervised, StepOutput, VisualWords
from obowlab.methods.heads import DynamicHead, FixedHead
from obowlab.methods.schedules import teacher_momentum
from obowlab.methods.teacher import follow_student
from obowlab.methods.vocabulary import VOCABULARIES, Vocabulary, level_metrics


class OBoW(SelfSupervised[Obow]):
    """One call is one training step without its backward pass, in the order of docs/method.md, 7.

    It is the authors' order:
    https://github.com/valeoai/obow/blob/45af1490d3c076a924ceaf02bbaf201bc74c7f99/obow/builder_obow.py#L398-L425

    Attributes:
        num_uniforms: random numbers a step needs per image: one per level.
    """

    def build(self, method: Obow) -> None:
        """Make the teacher, a vocabulary and a head per level."""
        self.num_uniforms = len(method.levels)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
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

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; teacher and vocabularies move on.

        Raises:
            UserError: a cropped feature map is too small for the vocabulary.
        """
        features = self.forward_student(batch.views)  # (2)
        momentum = self.update_teacher(batch.step)  # (3), before it looks
        maps, pooled = self.forward_teacher(batch.original)  # (4)
        losses: dict[Level, dict[str, Tensor]] = {}
        entropies: dict[Level, dict[str, Tensor]] = {}
        metrics: dict[str, Tensor] = {}
        for index, (level, vocabulary, head) in enumerate(self._levels()):
            weights_KD = head(vocabulary.words)  # (1, 2) the words as they are before (7) moves them
            log_predictions = predict(features, weights_KD, kappa=head.kappa)
            assignment = vocabulary.assign(maps[level], comm=self.comm)  # (5, 6, 8, 9)
            losses[level], entropies[level] = bow.prediction_losses(
                log_predictions, assignment.targets, cutmix_lambda=batch.cutmix_lambda
            )
            if batch.wants_metrics:
                metrics |= level_metrics(level, assignment, torch.cat(list(log_predictions.values())), comm=self.comm)
                metrics |= {f"word_age_{level}": vocabulary.mean_age(step=batch.step), f"msd_{level}": assignment.msd}
                metrics |= {f"kappa_{level}": head.kappa.clone()}
            vocabulary.update(assignment, uniforms_B=batch.uniforms[:, index], step=batch.step, comm=self.comm)  # (7)
        if batch.wants_metrics:
            metrics["teacher_momentum"] = torch.full((), momentum, device=pooled.device)
        # (10) The mean over the views of a kind and over levels, the sum over kinds.
        return self._output(
            mean_over_levels(losses),
            metrics,
            features=pooled,
            labels=batch.labels,
            target_entropy=torch.stack(list(mean_over_levels(entropies).values())).sum(),
        )

    def forward_student(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the features of every kind of views, [B·V, D], one pass per kind."""
        return {kind: self.student(images) for kind, images in views.items()}

    def update_teacher(self, step: int) -> float:
        """Move the teacher's parameters towards the student's (eq. 3) and return the momentum.

        The teacher's batch-norm statistics are its own.
        """
        method = self.method
        momentum = teacher_momentum(
            step, start=method.teacher_momentum, schedule=method.teacher_momentum_schedule, total_steps=self.total_steps
        )
        follow_student([(self.teacher, self.student)], momentum=momentum)
        return momentum

    @torch.no_grad()
    def forward_teacher(self, original: Tensor) -> tuple[dict[Level, Tensor], Tensor]:
        """Return the maps of the levels and the pooled features, with batch norms that use the statistics of this batch.

        Raises:
            UserError: a cropped map is too small for the vocabulary.
        """
        maps, pooled = self.teacher.levels(original, self.method.levels)
        for level in self.method.levels:
            refuse_small_map(self.method, level=level, size=min(maps[level].shape[-2:]))
        return maps, pooled

    def _levels(self) -> Iterator[tuple[Level, Vocabulary, DynamicHead | FixedHead]]:
        for level in self.method.levels:
            yield level, cast(Vocabulary, self.vocabularies[level]), cast("DynamicHead | FixedHead", self.heads[level])


def predict(features: Mapping[str, Tensor], weights_KD: Tensor, *, kappa: Tensor) -> dict[str, Tensor]:
    """Return the logarithms of the BoW that every view's feature predicts, [B·V, K], by kind of view."""
    logits_NK = bow.bow_logits(torch.cat(list(features.values())), weights_KD, kappa=kappa)
    parts = torch.split(torch.log_softmax(logits_NK, dim=-1), [len(each) for each in features.values()])
    return dict(zip(features, parts, strict=True))


def mean_over_levels(values: Mapping[Level, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean over levels of every kind's value, 0-dim."""
    kinds = next(iter(values.values()))
    return {kind: torch.stack([of_level[kind] for of_level in values.values()]).mean() for kind in kinds}
