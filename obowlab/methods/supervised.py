"""Supervised training: the classes of the images, by cross-entropy (docs/method.md, 10.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from obowlab.config import Backbone, Supervised
from obowlab.methods import bow
from obowlab.methods.backbones import ResNet, build_backbone
from obowlab.methods.base import Batch, Comm, Method, StepOutput


class SupervisedTraining(Method[Supervised]):
    """A linear classifier on the pooled feature of every view.

    It has no online classifier beside its own.
    """

    num_uniforms = 0

    def __init__(
        self, method: Supervised, *, backbone: Backbone, total_steps: int, seed: int, num_classes: int | None, comm: Comm
    ) -> None:
        super().__init__(method, backbone=backbone, total_steps=total_steps, seed=seed, num_classes=num_classes, comm=comm)
        assert num_classes is not None, "data.protocol_needs refuses images without labels"
        self.student = build_backbone(backbone, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)  # the student's weights are a function of the seed alone: see build_backbone
            self.classifier = nn.Linear(self.student.num_features, num_classes)
        self.monitor = None

    @property
    def encoder(self) -> ResNet:
        """Return the student."""
        return self.student

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; the original view plays no part."""
        assert batch.labels is not None
        losses, hits = {}, []
        for kind, images in batch.views.items():
            logits = bow.at_least_float32(self.classifier(self.student(images)))
            num_views = len(images) // len(batch.labels)
            labels = batch.labels.repeat_interleave(num_views)
            loss_N = F.cross_entropy(logits, labels, reduction="none")
            if kind in batch.cutmix_lambda:
                share_N = batch.cutmix_lambda[kind].to(loss_N.dtype)
                pasted = bow.neighbours(batch.labels).repeat_interleave(num_views)
                loss_N = share_N * loss_N + (1.0 - share_N) * F.cross_entropy(logits, pasted, reduction="none")
                labels = torch.where(share_N < 0.5, pasted, labels)
            losses[kind] = loss_N.mean()
            hits.append(logits.argmax(dim=1) == labels)
        return self._output(losses, {"class_accuracy": 100.0 * torch.cat(hits).float().mean()})
