"""The online classifier: how linearly separable the classes are, while training goes on."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.methods import bow


class OnlineClassifier(nn.Module):
    """A linear classifier on detached features, which has no influence on the method."""

    def __init__(self, *, num_features: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(num_features, affine=False)
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the logits of the classes."""
        return cast(Tensor, self.fc(self.norm(bow.at_least_float32(features_BD.detach()))))

    def metrics(self, features_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return `monitor_loss`, to be minimised, and `monitor_accuracy` in percent."""
        logits = self(features_BD)
        accuracy = 100.0 * (logits.argmax(dim=1) == labels_B).float().mean()
        return {"monitor_loss": F.cross_entropy(logits, labels_B), "monitor_accuracy": accuracy}
