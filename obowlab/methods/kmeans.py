"""Offline k-means: faiss on a CPU (this is its only importer), torch on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obowlab.precision import full_precision

CHUNK_ELEMENTS = 1 << 27
"""Distances that a GPU holds at a time: 512 MiB."""

SPLIT = 1.0 / 1024.0
"""By this share of itself an empty centre is moved away from the one it is put beside, as in faiss."""


def kmeans(points_NC: Tensor, *, num_words: int, iterations: int, seed: int, report: Callable[[str], None]) -> Tensor:
    """Return the centres of Lloyd's algorithm, float32 [num_words, C] on the device of the points, a function of its arguments.

    It starts from points that the seed chooses; a centre that loses all its points is moved next to one that has many.

    Args:
        points_NC: at least `num_words` points.
        num_words: number of centres.
        iterations: passes over the points.
        seed: of the first centres.
        report: takes a line of progress after every tenth pass and the last one.
    """
    assert len(points_NC) >= num_words
    points = points_NC.detach().float().contiguous()
    one_pass = _pass_on_cpu if points.device.type == "cpu" else lloyd_pass
    centres = points[_first(len(points), num_words=num_words, seed=seed).to(points.device)] if one_pass is lloyd_pass else None
    for number in range(1, iterations + 1):
        # One pass at a time, to report progress and to handle signals in between.
        centres, mean_distance = one_pass(points, centres, num_words=num_words, seed=seed)
        if number % 10 == 0 or number == iterations:
            report(f"k-means: pass {number} of {iterations}, mean squared distance {mean_distance:.4g}.")
    assert centres is not None
    return centres


def _first(count: int, *, num_words: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_words]


def _pass_on_cpu(points: Tensor, centres: Tensor | None, *, num_words: int, seed: int) -> tuple[Tensor, float]:
    import faiss  # slow, and most methods do not need it

    faiss.omp_set_num_threads(torch.get_num_threads())
    search = faiss.Kmeans(
        points.shape[1], num_words, niter=1, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(points)
    )
    search.train(points.numpy(), init_centroids=None if centres is None else centres.numpy())
    assert search.obj is not None
    assert search.centroids is not None
    return torch.from_numpy(search.centroids.copy()), float(search.obj[-1]) / len(points)


@torch.no_grad()
def lloyd_pass(points: Tensor, centres: Tensor | None, *, num_words: int, seed: int) -> tuple[Tensor, float]:
    """Return the centres after one pass, [K, C], and the mean squared distance of the points to the centres before it.

    Sums are products with one-hot rows, chunk by chunk: unlike additions in parallel, they are the same in every run.

    Args:
        points: float32 [N, C].
        centres: before the pass, [K, C].
        num_words: K.
        seed: of the run; which large centres empty ones are put beside follows from it.
    """
    assert centres is not None
    sums, counts = torch.zeros_like(centres), centres.new_zeros(num_words)
    total = points.new_zeros((), dtype=torch.float64)
    with full_precision(points.device):
        squares = centres.square().sum(dim=1)
        for chunk in torch.split(points, max(1, CHUNK_ELEMENTS // num_words)):
            nearest = torch.addmm(squares, chunk, centres.T, alpha=-2.0).min(dim=1)
            total += (nearest.values + chunk.square().sum(dim=1)).clamp(min=0.0).sum(dtype=torch.float64)
            members = torch.zeros(len(chunk), num_words, device=points.device).scatter_(1, nearest.indices[:, None], 1.0)
            sums.addmm_(members.T, chunk)
            counts += members.sum(dim=0)
    centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1.0), centres)
    return _fill_empty(centres, counts, seed=seed), float(total) / len(points)


def _fill_empty(centres: Tensor, counts: Tensor, *, seed: int) -> Tensor:
    """Put every empty centre beside one with many points, and share its points between the two."""
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return centres
    left, generator = counts.double().cpu(), torch.Generator().manual_seed(seed)
    sign = centres.new_ones(centres.shape[1])
    sign[1::2] = -1.0
    for place in empty:
        donor = int(torch.multinomial((left - 1.0).clamp(min=0.0), 1, generator=generator))
        centres[place] = centres[donor] * (1.0 + SPLIT * sign)
        centres[donor] = centres[donor] * (1.0 - SPLIT * sign)
        left[place] = left[donor] / 2
        left[donor] /= 2
    return centres
