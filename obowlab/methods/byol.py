"""BYOL: predict a slowly following teacher's projection of the other view, without negatives (docs/method.md, 10.6).

Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning", NeurIPS 2020.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Byol
from obowlab.methods import bow
from obowlab.methods.base import Batch, SelfSupervised, StepOutput
from obowlab.methods.projection import channel_std, hidden_layer
from obowlab.methods.schedules import teacher_momentum
from obowlab.methods.teacher import follow_student

NORM_EPSILON = 1e-6
"""Least length that a vector is divided by: the authors have 1e-12 under the root."""


class BYOL(SelfSupervised[Byol]):
    """From one crop of an image the student predicts what the teacher makes of the other, and the other way round.

    Every crop goes through each network in a pass of its own. The batch norms of the heads see the images of all processes.
    """

    def build(self, method: Byol) -> None:
        """Make the teacher, both projections and the predictor."""
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        features, size = self.student.num_features, method.projection_size
        self.projection = build_head(features, hidden=method.hidden_size, size=size)
        self.teacher_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.prediction = build_head(size, hidden=method.hidden_size, size=size)

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; the teacher moves on. The original view plays no part.

        The online classifier sees the student's features of the first crop.
        """
        momentum = self.update_teacher(batch.step)
        crops = [batch.views["crops"][view::2] for view in range(2)]
        features = [self.student(each) for each in crops]
        projected = [self.projection(each) for each in features]
        predicted = [self.prediction(each) for each in projected]
        targets = self.forward_teacher(crops)
        loss = squared_distance(predicted[0], targets[1]) + squared_distance(predicted[1], targets[0])
        metrics = {}
        if batch.wants_metrics:
            metrics["projection_std"] = torch.stack(
                [channel_std(self.comm.all_gather(each.detach())) for each in projected]
            ).mean()
            metrics["teacher_momentum"] = torch.full((), momentum, device=loss.device)
        return self._output({"crops": loss}, metrics, features=features[0], labels=batch.labels)

    def update_teacher(self, step: int) -> float:
        """Move the teacher as the step before ends, and return that step's momentum.

        The authors do it after the update of the student. Here the student's parameters of a step are first known in the next
        one; in the first, teacher and student are equal.
        """
        momentum = teacher_momentum(
            max(step - 1, 0), start=self.method.teacher_momentum, schedule="cosine", total_steps=self.total_steps
        )
        follow_student(
            [(self.teacher, self.student), (self.teacher_projection, self.projection)],
            momentum=momentum,
        )
        return momentum

    @torch.no_grad()
    def forward_teacher(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Return the teacher's projections of each crop, [B, E], with batch norms that use the statistics of this crop."""
        return [self.teacher_projection(self.teacher(each)) for each in crops]


def build_head(inputs: int, *, hidden: int, size: int) -> nn.Sequential:
    """Return the MLP of projection and prediction, with the authors' initial values.

    Weights are normal with standard deviation 1/√inputs, drawn anew beyond two of these; biases are 0.
    """
    head = nn.Sequential(*hidden_layer(inputs, hidden, bias=True), nn.Linear(hidden, size, bias=False))
    for layer in head:
        if isinstance(layer, nn.Linear):
            deviation = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2.0 * deviation, b=2.0 * deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return head


def squared_distance(predicted_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Return the mean squared distance of normalised predictions and targets, 0-dim, in [0, 4]: 2 minus twice the cosine."""
    ends = [F.normalize(bow.at_least_float32(each), dim=1, eps=NORM_EPSILON) for each in (predicted_ND, target_ND)]
    return (ends[0] - ends[1]).square().sum(dim=1).mean()
