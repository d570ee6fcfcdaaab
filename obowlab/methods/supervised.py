"""Supervised training: the classes of the images, by cross-entropy (docs/method.md, 10.4).

From the seed's weights it is the paper's comparison. From an encoder's it is fine-tuning, and with a frozen trunk a linear
classifier on the encoder's features of ever new crops (docs/transfer.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Backbone, Supervised
from obowlab.methods import bow
from obowlab.methods.backbones import ResNet, build_backbone
from obowlab.methods.base import Batch, Comm, StepOutput
from obowlab.methods.fine_tuning import FineTuning
from obowlab.methods.projection import GlobalBatchNorm1d

HEAD_DEVIATION = 0.01
"""Of the initial weights of a classifier that starts `normal`."""


class SupervisedTraining(FineTuning[Supervised]):
    """A linear classifier on the pooled feature of every view.

    It has no online classifier beside its own.

    Attributes:
        student: the trunk; frozen, it stays in evaluation mode, and neither weights nor statistics move.
        head_norm: normalises features before the classifier by the statistics of the global batch, or leaves them alone.
        classifier: linear, on them.
    """

    num_uniforms = 0
    _usual_pixels: Tensor

    def __init__(
        self, method: Supervised, *, backbone: Backbone, total_steps: int, seed: int, num_classes: int | None, comm: Comm
    ) -> None:
        super().__init__(method, backbone=backbone, total_steps=total_steps, seed=seed, num_classes=num_classes, comm=comm)
        assert num_classes is not None, "data.protocol_needs refuses images without labels"
        self.student = build_backbone(backbone, seed=seed)
        width = self.student.num_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)  # the student's weights are a function of the seed alone: see build_backbone
            self.classifier = nn.Linear(width, num_classes)
            if method.head_start == "normal":
                nn.init.normal_(self.classifier.weight, std=HEAD_DEVIATION)
                nn.init.zeros_(self.classifier.bias)
        self.head_norm = GlobalBatchNorm1d(width, affine=False) if method.head_batchnorm else nn.Identity()
        if method.weights:
            self.keep_pixels()
            self.register_buffer("_usual_pixels", self.pixels.clone(), persistent=False)
            self.look_at_pixels()
        if method.trunk == "frozen":
            self.student.requires_grad_(False)
        self.monitor = None

    @property
    def encoder(self) -> ResNet:
        """Return the student."""
        return self.student

    @property
    def own_classifier(self) -> nn.Module:
        """Return normalisation and classifier, on features [B, c]."""
        return nn.Sequential(self.head_norm, self.classifier)

    def train(self, mode: bool = True) -> SupervisedTraining:
        """Set the mode of the parts that learn."""
        super().train(mode)
        if self.method.trunk == "frozen":
            self.student.eval()
        return self

    def rate_groups(self) -> list[dict[str, Any]]:
        """Return the trunk, where its rate is not the classifier's."""
        if self.method.trunk == "frozen" or self.method.trunk_rate == 1.0:
            return []
        return [{"name": "trunk", "params": list(self.student.parameters()), "rate_factor": self.method.trunk_rate}]

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features [B, c] of views that are normalised as all others, [B, 3, S, S]."""
        if self.method.weights and self._other_pixels:
            images = self._own_pixels(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method.trunk == "trained"):
            features: Tensor = self.student(images)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Return what the classifier says of features [B, c], in at least float32 [B, num_classes]."""
        return bow.at_least_float32(self.classifier(self.head_norm(features)))

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; the original view plays no part."""
        assert batch.labels is not None
        losses, hits = {}, []
        for kind, images in batch.views.items():
            logits = self.logits(self.features(images))
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

    def _own_pixels(self, images: Tensor) -> Tensor:
        """Return images that were normalised by ImageNet's statistics as the encoder's own would have them."""
        usual, own = (values.to(images.dtype).view(2, 3, 1, 1) for values in (self._usual_pixels, self.pixels))
        return (images * usual[1] + usual[0] - own[0]) / own[1]

    def look_at_pixels(self) -> None:
        """Remember whether views must be normalised anew for the encoder."""
        super().look_at_pixels()
        self._other_pixels = not torch.equal(self.pixels, self._usual_pixels)


def classifier_from(state: Mapping[str, Tensor]) -> nn.Module:
    """Return a classifier on features, in evaluation mode, from the state dict of `SupervisedTraining.own_classifier`.

    Raises:
        KeyError, RuntimeError: tensors are missing, left over, or of another shape.
    """
    num_classes, width = state["1.weight"].shape
    norm = GlobalBatchNorm1d(width, affine=False) if "0.running_mean" in state else nn.Identity()
    classifier = nn.Sequential(norm, nn.Linear(width, num_classes)).eval()
    classifier.load_state_dict(state)
    return classifier
