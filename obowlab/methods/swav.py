"""SwAV: predict from one view of an image how another is shared out among prototypes (docs/method.md, 10.8).

Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Swav
from obowlab.methods import bow
from obowlab.methods.base import Batch, SelfSupervised, StepOutput
from obowlab.methods.projection import hidden_layer
from obowlab.precision import full_precision

NUM_ASSIGNED = 2
"""The first so many crops of an image have codes; every other view predicts them."""


class SwAV(SelfSupervised[Swav]):
    """One network encodes all views; codes share the large crops out evenly among prototypes, and the other views predict them.

    The head's batch norm sees the views of all processes, and so do the codes.

    Attributes:
        queue: projections of the first crops of earlier images, newest first, [queue_size, NUM_ASSIGNED, C]; the same on every
            process, and 0 where nothing has come in yet.
    """

    queue: Tensor

    def build(self, method: Swav) -> None:
        """Make projection, prototypes and the queue."""
        features, hidden, size = self.student.num_features, method.hidden_size, method.projection_size
        self.projection = nn.Sequential(*hidden_layer(features, hidden, bias=True), nn.Linear(hidden, size))
        self.prototypes = nn.Linear(size, method.num_prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(method.queue_size, NUM_ASSIGNED, size))

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; the queue moves on. The original view plays no part.

        The online classifier sees the features of the first crop.
        """
        views = {kind: batch.views[kind] for kind in ("crops", "small_crops") if kind in batch.views}
        num_views = {kind: len(images) // len(batch.original) for kind, images in views.items()}
        features = {kind: self.student(images) for kind, images in views.items()}
        projected_ND = self.projection(torch.cat(list(features.values())))
        unit_NC = F.normalize(bow.at_least_float32(projected_ND), dim=1)
        prototypes_KC = self.unit_prototypes(step=batch.step)
        with full_precision(unit_NC.device):
            scores_NK = unit_NC @ prototypes_KC.T
        parts = torch.split(scores_NK, [len(images) for images in views.values()])
        scores = {kind: part.view(-1, num_views[kind], part.shape[1]) for kind, part in zip(views, parts, strict=True)}
        codes_BAK = self.assign(scores["crops"].detach()[:, :NUM_ASSIGNED], prototypes_KC.detach(), step=batch.step)
        log_predictions = {kind: F.log_softmax(each / self.method.temperature, dim=-1) for kind, each in scores.items()}
        losses = prediction_losses(log_predictions, codes_BAK)
        metrics = self.metrics(codes_BAK) if batch.wants_metrics else {}
        crops_BVC = unit_NC.detach()[: len(views["crops"])].view(-1, num_views["crops"], unit_NC.shape[1])
        self.update_queue(crops_BVC[:, :NUM_ASSIGNED], step=batch.step)
        return self._output(
            losses,
            metrics,
            features=features["crops"][:: num_views["crops"]],
            labels=batch.labels,
            target_entropy=bow.entropy(codes_BAK).mean(),
        )

    def unit_prototypes(self, *, step: int) -> Tensor:
        """Scale the prototypes to length 1, in place, and return them, [K, C]; while they are frozen their gradient is 0.

        A gradient of 0 and not none, which DistributedDataParallel would refuse. The optimiser then moves them along
        themselves at most (weight decay), which the scaling takes back.
        """
        weight = self.prototypes.weight
        with torch.no_grad():
            weight.copy_(F.normalize(weight, dim=1))
        return weight if step >= self.method.frozen_steps else weight.detach() + 0.0 * weight

    @torch.no_grad()
    def assign(self, scores_BAK: Tensor, prototypes_KC: Tensor, *, step: int) -> Tensor:
        """Return the codes of this process's crops, [B, A, K], balanced over those of all processes and the queue, if it is full.

        Each process takes its part of the queue. Whether it is full is known from the step, for which no host need wait.
        """
        num_images = len(scores_BAK)
        filled = (step - self.method.queue_start_step) * num_images * self.comm.world_size
        if 0 < self.method.queue_size <= filled:
            part = len(self.queue) // self.comm.world_size
            mine = self.queue[self.comm.rank * part : (self.comm.rank + 1) * part]
            with full_precision(mine.device):
                scores_BAK = torch.cat((scores_BAK, mine @ prototypes_KC.T))
        codes_NAK = balanced_codes(
            scores_BAK,
            epsilon=self.method.sinkhorn_epsilon,
            iterations=self.method.sinkhorn_iterations,
            all_gather=self.comm.all_gather,
        )
        return codes_NAK[:num_images]

    @torch.no_grad()
    def update_queue(self, unit_BAC: Tensor, *, step: int) -> None:
        """Put the projections of the global batch into the queue, whose oldest leave it."""
        if self.method.queue_size and step >= self.method.queue_start_step:
            self.queue.copy_(torch.cat((self.comm.all_gather(unit_BAC), self.queue))[: len(self.queue)])

    @torch.no_grad()
    def metrics(self, codes_BAK: Tensor) -> dict[str, Tensor]:
        """Return how sure the codes are, and how many prototypes the global batch uses."""
        used_K = codes_BAK.new_zeros(codes_BAK.shape[-1])
        used_K.index_fill_(0, codes_BAK.argmax(dim=-1).flatten(), 1.0)  # to assign a number would wait for a GPU
        used_K = self.comm.all_reduce_mean(used_K)
        return {
            "code_entropy": bow.entropy(codes_BAK).mean(),
            "prototypes_used": 100.0 * (used_K > 0).to(used_K.dtype).mean(),
        }


def balanced_codes(scores_NAK: Tensor, *, epsilon: float, iterations: int, all_gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the codes of rows, [N, A, K], by Sinkhorn and Knopp's algorithm, for each of A batches on its own.

    Every iteration gives all prototypes the same share of the batch, then every row a sum of 1. As it ends with the rows, the
    prototypes are balanced as far as the iterations got. In the log domain: e^(1/ε) is too much for float16, and no sum is 0.

    Args:
        scores_NAK: similarities of this process's rows to the prototypes.
        epsilon: temperature of the codes.
        iterations: at least 1.
        all_gather: concatenates a tensor over the processes; makes the prototypes' shares global.
    """
    log_codes_NAK = scores_NAK / epsilon
    for _ in range(iterations):
        log_mass_AK = all_gather(log_codes_NAK.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
        log_codes_NAK = F.log_softmax(log_codes_NAK - log_mass_AK, dim=-1)
    return log_codes_NAK.exp()


def prediction_losses(log_predictions: dict[str, Tensor], codes_BAK: Tensor) -> dict[str, Tensor]:
    """Return each kind of views' part of the loss, 0-dim.

    Their sum is the cross-entropy of the code of a crop and what another view predicts, mean over images, the views other than
    that crop, and the crops that have codes.

    Args:
        log_predictions: logarithms of the predicted codes of views, [B, V, K]; the first `crops` are those with codes.
        codes_BAK: without gradient.
    """
    num_pairs = codes_BAK.shape[1] * (sum(each.shape[1] for each in log_predictions.values()) - 1)
    losses = {}
    for kind, log_prediction_BVK in log_predictions.items():
        with full_precision(codes_BAK.device):
            cross_AV = -(codes_BAK @ log_prediction_BVK.mT).mean(dim=0)
        own = cross_AV.diagonal().sum() if kind == "crops" else 0.0  # no crop predicts its own code
        losses[kind] = (cross_AV.sum() - own) / num_pairs
    return losses
