"""SimCLR: tell the other view of an image from the views of all other images in the batch (docs/method.md, 10.7).

Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Simclr
from obowlab.methods import bow
from obowlab.methods.base import Batch, SelfSupervised, StepOutput
from obowlab.methods.projection import GlobalBatchNorm1d, hidden_layer
from obowlab.precision import full_precision

WEIGHT_STD = 0.01
"""Standard deviation of the head's weights at the start, the authors'."""


class SimCLR(SelfSupervised[Simclr]):
    """One network encodes both crops of all images in one pass; the crops of other images, on all processes, are negatives.

    The batch norms of the head see the images of all processes.
    """

    def build(self, method: Simclr) -> None:
        """Make the projection."""
        features = self.student.num_features
        self.projection = build_projection(features, size=method.projection_size, num_layers=method.projection_layers)

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; the original view plays no part.

        The online classifier sees the features of the first crop.
        """
        features = self.student(batch.views["crops"])
        projected = F.normalize(bow.at_least_float32(self.projection(features)), dim=1)
        everyone = self.comm.all_gather_with_gradient(projected)
        logits, partners = contrast(projected, everyone, rank=self.comm.rank, temperature=self.method.temperature)
        hits = logits.detach().argmax(dim=1) == partners
        metrics = {"contrast_accuracy": 100.0 * hits.float().mean()}
        return self._output({"crops": F.cross_entropy(logits, partners)}, metrics, features=features[::2], labels=batch.labels)


def contrast(own_ND: Tensor, everyone_MD: Tensor, *, rank: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the similarities of this process's crops to those of all, and which of these is the other crop of the image.

    Args:
        own_ND: unit vectors, the two crops of an image beside each other.
        everyone_MD: those of all processes, in the order of their ranks.
        rank: whose part of them `own_ND` is.
        temperature: what similarities are divided by.

    Returns:
        The logits, [N, M], minus infinity for a crop and itself; and the columns of the partners, int64 [N].
    """
    columns = rank * len(own_ND) + torch.arange(len(own_ND), device=own_ND.device)
    with full_precision(own_ND.device):
        logits = own_ND @ everyone_MD.T / temperature
    return logits.scatter(1, columns[:, None], -torch.inf), columns ^ 1


def build_projection(features: int, *, size: int, num_layers: int) -> nn.Sequential:
    """Return the MLP from features to projections, without biases; its last batch norm has no shift.

    All layers but the last are as wide as the features.
    """
    hidden = [module for _ in range(num_layers - 1) for module in hidden_layer(features, features)]
    last = GlobalBatchNorm1d(size)
    last.register_parameter("bias", None)
    head = nn.Sequential(*hidden, nn.Linear(features, size, bias=False), last)
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=WEIGHT_STD)
    return head
