"""The accuracy of the classifier that a supervised training learned itself, on the validation images (docs/transfer.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from obowlab.errors import UserError
from obowlab.evaluation.result import Measurement, proportion_with_interval

CHUNK = 8192


def accuracies(
    classifier: nn.Module, *, features: Tensor, labels: Tensor, ranks: Sequence[int], name: str
) -> tuple[Measurement, ...]:
    """Return how often the class of an image is among the first guesses, `NAME_topK` in percent for every rank K.

    Of equal scores the class with the lower number is the earlier guess. With fewer classes than K every guess is right.

    Args:
        classifier: maps features [B, c] to scores [B, num_classes]; in evaluation mode.
        features: float32 [N, c].
        labels: int64 [N], on the same device.
        ranks: how many guesses are allowed.
        name: of the measurements.

    Raises:
        UserError: scores are not finite.
    """
    places: list[int] = []
    with torch.no_grad():
        for rows, truth in zip(torch.split(features, CHUNK), torch.split(labels, CHUNK), strict=True):
            scores = classifier(rows).float()
            if not torch.isfinite(scores).all():
                raise UserError(
                    "The classifier gives scores that are not finite: its training diverged. Lower optimizer.learning_rate."
                )
            own = scores.gather(1, truth[:, None])
            earlier = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
            places += ((scores > own) | ((scores == own) & earlier)).sum(dim=1).tolist()
    return tuple(proportion_with_interval(f"{name}_top{rank}", [int(place < rank) for place in places]) for rank in ranks)
