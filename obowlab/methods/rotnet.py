"""RotNet: by how many quarter turns was this view rotated? (Gidaris, Singh, Komodakis, ICLR 2018; docs/method.md, 10.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Rotnet
from obowlab.methods import bow
from obowlab.methods.base import Batch, SelfSupervised, StepOutput

NUM_ROTATIONS = 4


def rotations(images: Tensor) -> Tensor:
    """Return every image [N, C, s, s] turned anticlockwise by 0, 1, 2 and 3 quarters, one after the other, [N·4, C, s, s]."""
    turned = [torch.rot90(images, quarters, dims=(2, 3)) for quarters in range(NUM_ROTATIONS)]
    memory = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.stack(turned, dim=1).flatten(0, 1).contiguous(memory_format=memory)


class RotNet(SelfSupervised[Rotnet]):
    """Every view of every kind in its four rotations, and a linear classifier of the rotation on the pooled feature."""

    def build(self, method: Rotnet) -> None:
        """Make the classifier of rotations."""
        features = self.student.num_features
        self.head = nn.Linear(features, NUM_ROTATIONS)

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; the online classifier sees the unrotated views."""
        num_images = len(batch.original)
        features = {kind: self.student(rotations(images)) for kind, images in batch.views.items()}
        losses, hits, upright = {}, [], []
        for kind, features_ND in features.items():
            logits = bow.at_least_float32(self.head(features_ND))
            turns = torch.arange(NUM_ROTATIONS, device=logits.device).repeat(len(logits) // NUM_ROTATIONS)
            losses[kind] = F.cross_entropy(logits, turns)
            hits.append(logits.argmax(dim=1) == turns)
            upright.append(features_ND[::NUM_ROTATIONS].view(num_images, -1, features_ND.shape[1]))
        metrics = {"rotation_accuracy": 100.0 * torch.cat(hits).float().mean()}
        features_BVD = torch.cat(upright, dim=1)
        labels = None if batch.labels is None else batch.labels.repeat_interleave(features_BVD.shape[1])
        return self._output(losses, metrics, features=features_BVD.flatten(0, 1), labels=labels)
