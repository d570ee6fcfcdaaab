"""Time the linear probe, k-NN and Sinkhorn, each beside its obvious alternative, as a ratio.

The probe stands beside its two matrix products alone, k-NN beside a running `topk` over blocks, and Sinkhorn beside a softmax and
column sums of the same distances. Data are random: only time is measured. Ways take turns, and the median of the ratios counts.

    python tests/benchmarks/bench_kernels.py --rounds 7 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from obowlab.config import Linear
from obowlab.evaluation.knn import BLOCKS, neighbours
from obowlab.evaluation.linear import train_probe
from obowlab.methods import bow


def ratio(ours: Callable[[], object], obvious: Callable[[], object], *, rounds: int) -> float:
    """Return the median of ours / obvious over rounds in which both take turns."""

    def seconds(way: Callable[[], object]) -> float:
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    seconds(ours), seconds(obvious)
    return statistics.median(seconds(ours) / seconds(obvious) for _ in range(rounds))


def probe(num_features: int, *, rounds: int) -> float:
    """Return the probe's time over that of its matrix products: 1000 classes, 40 steps of 256 images."""
    views = (torch.randn(5120, num_features).relu(), torch.randn(5120, num_features).relu())
    labels = torch.randint(0, 1000, (5120,))
    x, weight, error = views[0][:256], torch.randn(1000, num_features), torch.randn(256, 1000)
    config = Linear(epochs=2, batch_size=256, learning_rate=0.1)

    def products() -> None:
        for _ in range(40):
            x @ weight.T
            error.T @ x

    return ratio(lambda: train_probe(views, labels=labels, num_classes=1000, config=config, seed=0), products, rounds=rounds)


def running_topk(queries: torch.Tensor, bank: torch.Tensor, *, num_neighbours: int) -> torch.Tensor:
    """Return the cosines of the nearest images, block by block, without a rule for ties."""
    blocks, queries = BLOCKS["cpu"], F.normalize(queries, dim=1)
    best = queries.new_empty(len(queries), 0)
    for block in bank.split(blocks.images):
        unit = F.normalize(block, dim=1)
        found = [(chunk @ unit.T).topk(min(num_neighbours, len(unit)), dim=1).values for chunk in queries.split(blocks.queries)]
        best = torch.cat([best, torch.cat(found)], dim=1)
        best = best.topk(min(num_neighbours, best.shape[1]), dim=1).values
    return best


def knn(num_features: int, *, num_neighbours: int, rounds: int) -> float:
    """Return the time of `neighbours` over that of a running top-k: 512 queries against 20 000 images."""
    bank, queries = torch.randn(20_000, num_features).relu(), torch.randn(512, num_features).relu()
    found, _ = neighbours(queries, bank=bank, num_neighbours=num_neighbours)
    assert torch.equal(found, running_topk(queries, bank, num_neighbours=num_neighbours)), "the two ways must agree"
    return ratio(
        lambda: neighbours(queries, bank=bank, num_neighbours=num_neighbours),
        lambda: running_topk(queries, bank, num_neighbours=num_neighbours),
        rounds=rounds,
    )


def plain_scaling(distances: bow.Distances, *, epsilon: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return Sinkhorn's potential by a softmax and column sums: right while no word is so far that its mass is 0."""
    potential = torch.zeros(len(distances.words_KC))
    for _ in range(iterations):
        mass = [torch.softmax((potential - dist / epsilon).flatten(0, 1), dim=1).sum(0) for _, dist in distances]
        potential = potential - torch.stack(mass).sum(0).log()
        potential -= potential.mean()
    return potential


def sinkhorn(num_locations: int, *, num_channels: int, rounds: int) -> float:
    """Return Sinkhorn's time over that of plain scaling, distances given: 8192 words, 8 images, 3 iterations."""
    local, words = torch.randn(8, num_locations, num_channels).relu(), torch.randn(8192, num_channels).relu()
    epsilon = 0.05 * bow.mean_squared_distance(local, words)
    distances = bow.Distances(local, words, keep=local.shape[0] * num_locations * len(words))

    def ours() -> torch.Tensor:
        return bow.sinkhorn(distances, epsilon=epsilon, iterations=3, all_gather=lambda x: x)

    assert torch.allclose(ours(), plain_scaling(distances, epsilon=epsilon, iterations=3), atol=1e-5), "the two ways must agree"
    return ratio(ours, lambda: plain_scaling(distances, epsilon=epsilon, iterations=3), rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for num_features in (512, 2048):
        print(f"linear probe / its matrix products, {num_features} features: {probe(num_features, rounds=args.rounds):.2f}")
    for num_features, num_neighbours in ((512, 20), (512, 200), (2048, 20)):
        found = knn(num_features, num_neighbours=num_neighbours, rounds=args.rounds)
        print(f"k-NN / running topk, {num_features} features, {num_neighbours} neighbours: {found:.2f}")
    for num_locations, num_channels in ((144, 256), (25, 512)):
        found = sinkhorn(num_locations, num_channels=num_channels, rounds=args.rounds)
        print(f"Sinkhorn / softmax and column sums, {num_locations} locations: {found:.2f}")


if __name__ == "__main__":
    main()
