"""Weighted vote of the nearest training images: a check without any training (not in the paper).

The `num_neighbours` training features of highest cosine each vote for their class with weight exp(cosine / temperature).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from obowlab.config import Knn
from obowlab.errors import UserError
from obowlab.evaluation.result import Measurement, proportion_with_interval

MAX_SIMILARITIES = 1 << 24
"""Most float32 similarities held at once (64 MiB)."""


def neighbour_votes(
    queries: torch.Tensor, *, bank: torch.Tensor, bank_labels: torch.Tensor, num_classes: int, config: Knn
) -> torch.Tensor:
    """Return the class with the most votes for every query.

    Args:
        queries: float32 [M, c].
        bank: float32 [N, c], the training features.
        bank_labels: int64 [N].
        num_classes: number of classes.
        config: neighbours and temperature.

    Returns:
        int64 [M].

    Raises:
        UserError: more neighbours than training images.
    """
    if config.num_neighbours > len(bank):
        raise UserError(f"evaluation.knn.num_neighbours = {config.num_neighbours} exceeds the {len(bank)} training images.")
    bank = F.normalize(bank, dim=1)
    winners = []
    for chunk in torch.split(queries, max(1, MAX_SIMILARITIES // len(bank))):
        similarity, position = (F.normalize(chunk, dim=1) @ bank.T).topk(config.num_neighbours, dim=1)
        weights = (
            (similarity - similarity[:, :1]) / config.temperature
        ).exp()  # a common factor per query: no overflow, same winner
        votes = weights.new_zeros(len(chunk), num_classes).scatter_add_(1, bank_labels[position], weights)
        winners.append(votes.argmax(dim=1))
    return torch.cat(winners)


def nearest_neighbours(
    queries: torch.Tensor, *, labels: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor, num_classes: int, config: Knn
) -> tuple[Measurement, ...]:
    """Measure `knn_top1` in percent, with Wilson's interval over the M queries; arguments as in `neighbour_votes`."""
    predicted = neighbour_votes(queries, bank=bank, bank_labels=bank_labels, num_classes=num_classes, config=config)
    return (proportion_with_interval("knn_top1", (predicted == labels).int().tolist()),)
