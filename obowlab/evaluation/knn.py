"""Weighted vote of the nearest training images: a check without any training (not in the paper).

The `num_neighbours` training features of highest cosine each vote for their class with weight exp(cosine / temperature).
Of equal cosines the earlier training image is nearer, and of equal votes the class of the lower number wins, so that the
blocks in which the bank is searched change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from obowlab.config import Knn
from obowlab.data.protocol_needs import knn_need, refuse_unmet
from obowlab.evaluation.result import Measurement, proportion_with_interval


@dataclass(frozen=True)
class Blocks:
    """How many queries and how many images of the bank meet at a time; neither changes a result."""

    queries: int
    images: int


BLOCKS = {"cpu": Blocks(queries=512, images=8192), "cuda": Blocks(queries=4096, images=1 << 16)}
"""On a CPU the similarities fit its cache (16 MiB), on a GPU they keep it busy (1 GiB)."""

VOTERS = 4096
"""Queries whose votes are counted at a time: a row of votes is as long as there are classes."""


def largest(similarity: torch.Tensor, *, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest entries of every row in descending order, and their columns; of equal entries the first columns.

    `topk` alone may return any of equal entries. It is asked for one more: only a row where that one equals the last
    that counts can hold a wrong choice, and is sorted whole.

    Args:
        similarity: [M, n].
        count: at most n.

    Returns:
        values [M, count] and columns, int64 [M, count].
    """
    values, columns = similarity.topk(min(count + 1, similarity.shape[1]), dim=1)
    tied = (values[:, count - 1 : count] == values[:, count:]).nonzero()[:, 0]  # none where all entries count
    values, columns = values[:, :count], columns[:, :count]
    if len(tied):
        in_order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = in_order.values[:, :count], in_order.indices[:, :count]
    columns, by_column = columns.sort(dim=1)
    values, by_value = values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, by_value)


def neighbours(
    queries: torch.Tensor, *, bank: torch.Tensor, num_neighbours: int, blocks: Blocks | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest images of the bank for every query, nearest first, and their cosines.

    The bank is normalised and searched block by block, and every query keeps the best so far: beside the inputs there are only
    one block, one chunk of similarities and the neighbours.

    Args:
        queries: float32 [M, c].
        bank: float32 [N, c].
        num_neighbours: at most N.
        blocks: by default those of the device.

    Returns:
        cosines, float32 [M, num_neighbours], and positions in the bank, int64 [M, num_neighbours].
    """
    blocks = blocks or BLOCKS.get(bank.device.type, BLOCKS["cpu"])
    starts = range(0, len(queries), blocks.queries)
    best = [(queries.new_empty(0, 0), queries.new_empty(0, 0, dtype=torch.int64)) for _ in starts]
    for first in range(0, len(bank), blocks.images):
        block = F.normalize(bank[first : first + blocks.images], dim=1)
        for chunk, start in enumerate(starts):
            similarity = F.normalize(queries[start : start + blocks.queries], dim=1) @ block.T
            found, columns = largest(similarity, count=min(num_neighbours, len(block)))
            best[chunk] = _merged(best[chunk], (found, columns + first), count=num_neighbours) if first else (found, columns)
    return torch.cat([cosines for cosines, _ in best]), torch.cat([positions for _, positions in best])


def _merged(
    before: tuple[torch.Tensor, torch.Tensor], after: tuple[torch.Tensor, torch.Tensor], *, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best of two lists of neighbours, the second from later in the bank."""
    cosines, positions = (torch.cat(both, dim=1) for both in zip(before, after, strict=True))
    cosines, columns = largest(cosines, count=min(count, cosines.shape[1]))
    return cosines, positions.gather(1, columns)


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
    refuse_unmet(knn_need(len(bank), config=config))
    cosines, positions = neighbours(queries, bank=bank, num_neighbours=config.num_neighbours)
    winners = []
    for cosine, position in zip(torch.split(cosines, VOTERS), torch.split(positions, VOTERS), strict=True):
        weights = ((cosine - cosine[:, :1]) / config.temperature).exp()  # a common factor per query: no overflow, same winner
        votes = weights.new_zeros(len(cosine), num_classes).scatter_add_(1, bank_labels[position], weights)
        winners.append(votes.argmax(dim=1))
    return torch.cat(winners)


def nearest_neighbours(
    queries: torch.Tensor, *, labels: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor, num_classes: int, config: Knn
) -> tuple[Measurement, ...]:
    """Measure `knn_top1` in percent, with Wilson's interval over the M queries; arguments as in `neighbour_votes`."""
    predicted = neighbour_votes(queries, bank=bank, bank_labels=bank_labels, num_classes=num_classes, config=config)
    return (proportion_with_interval("knn_top1", (predicted == labels).int().tolist()),)
