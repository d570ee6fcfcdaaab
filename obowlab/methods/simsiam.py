"""SimSiam: predict one view's projection from the other's, without negatives and without a teacher (docs/method.md, 10.5).

Chen and He, "Exploring simple Siamese representation learning", CVPR 2021.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Simsiam
from obowlab.methods import bow
from obowlab.methods.base import Batch, SelfSupervised, StepOutput
from obowlab.methods.projection import GlobalBatchNorm1d, channel_std, hidden_layer


class SimSiam(SelfSupervised[Simsiam]):
    """One network encodes both crops of an image, each in a pass of its own; a small predictor tells one from the other.

    What is predicted gets no gradient. The batch norms of the heads see the images of all processes.
    """

    def build(self, method: Simsiam) -> None:
        """Make projection and predictor."""
        features, size = self.student.num_features, method.projection_size
        self.projection = build_projection(features, size=size, num_layers=method.projection_layers)
        self.prediction = nn.Sequential(*hidden_layer(size, method.prediction_size), nn.Linear(method.prediction_size, size))

    def rate_groups(self) -> list[dict[str, Any]]:
        """Return the predictor, whose rate no schedule changes."""
        if not self.method.fixed_prediction_rate:
            return []
        return [{"name": "prediction", "params": list(self.prediction.parameters()), "fixed_rate": True}]

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; the original view plays no part.

        The online classifier sees the features of the first crop.
        """
        crops = batch.views["crops"]
        features = [self.student(crops[view::2]) for view in range(2)]
        projected = [self.projection(each) for each in features]
        predicted = [self.prediction(each) for each in projected]
        loss = 0.5 * (negative_cosine(predicted[0], projected[1]) + negative_cosine(predicted[1], projected[0]))
        metrics = {}
        if batch.wants_metrics:
            metrics["projection_std"] = torch.stack(
                [channel_std(self.comm.all_gather(each.detach())) for each in projected]
            ).mean()
        return self._output({"crops": loss}, metrics, features=features[0], labels=batch.labels)


def build_projection(features: int, *, size: int, num_layers: int) -> nn.Sequential:
    """Return the MLP from features to projections, all of whose layers but the first have the same width.

    The bias before the last batch norm is frozen, as in the authors' code: it has no effect. That batch norm has no parameters.
    """
    widths = [features, *[size] * (num_layers - 1)]
    hidden = [module for inputs in widths[:-1] for module in hidden_layer(inputs, size)]
    last = nn.Linear(widths[-1], size)
    last.bias.requires_grad_(False)
    return nn.Sequential(*hidden, last, GlobalBatchNorm1d(size, affine=False))


def negative_cosine(predicted_ND: Tensor, projected_ND: Tensor) -> Tensor:
    """Return minus the mean cosine of predictions and what they predict, 0-dim; no gradient reaches the second."""
    cosines = F.cosine_similarity(bow.at_least_float32(predicted_ND), bow.at_least_float32(projected_ND.detach()), dim=1)
    return -cosines.mean()
